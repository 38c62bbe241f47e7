"""The level `training`: gradients through both readings, one step of AdamW, schedules, and mistakes of
training that equal logits do not show."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckpt_tool.reference.phases as protocol
from ckpt_tool import api
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.convert.facts import classes
from ckpt_tool.convert.facts_parts import in_one_row
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.quantised import quantise
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import gradients, library, optimizer, schedules, training, training_groups, verify
from ckpt_tool.verify.claims import Claim, judge
from ckpt_tool.verify.optimizer import AdamW
from ckpt_tool.verify.packed_weights import PackedWeights
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.sides import converted_side
from ckpt_tool.verify.subject import opened
from ckpt_tool.verify.weights import Weights

transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
from optimizer_script import factors  # noqa: E402

from tests import loaded  # noqa: E402

ROOT = Path(__file__).parents[1]
OLD = ROOT / ".judges" / "tf4.37"
Written = Callable[[str], Path]


def findings(report: Report, check: str) -> list[Finding]:
    return [f for f in report.findings if (f.level, f.check) == ("training", check)]


# --- the optimizer ------------------------------------------------------------------------------------------

START = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PUSHES = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PUSHES = PUSHES * torch.tensor([1.0, 1e-3, 1e-7], dtype=torch.float64)  # a step of small ones tells eps
NUMBERS: list[dict[str, Any]] = [
    {"rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1},
    {"rate": 3e-2, "betas": (0.8, 0.999), "eps": 1e-6, "decay": 0.0},
]


def walked(recipe: AdamW, decays: bool = True) -> Tensor:
    p, moments, made = START, optimizer.start(START), []
    for g in PUSHES:
        p, moments = optimizer.step(recipe, p, g, moments, decays=decays)
        made.append(p)
    return torch.stack(made)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_step_is_that_of_torch(numbers: dict[str, Any]) -> None:
    p = torch.nn.Parameter(START.clone())
    judge = torch.optim.AdamW(
        [p], lr=numbers["rate"], betas=numbers["betas"], eps=numbers["eps"], weight_decay=numbers["decay"]
    )
    made = []
    for g in PUSHES:
        p.grad = g.clone()
        judge.step()
        made.append(p.detach().clone())
    assert torch.allclose(walked(AdamW(**numbers)), torch.stack(made), rtol=0, atol=1e-15)
    assert not torch.allclose(walked(AdamW(**numbers, eps_at="raw")), torch.stack(made), rtol=0, atol=1e-9)


W, T = 3, 9
# Our name and numbers, the function of transformers, its arguments
JUDGED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("constant", {}, "get_constant_schedule", {}),
    *(
        case
        for w in (0, W, T)
        for case in (
            ("constant_with_warmup", {"warmup": w}, "get_constant_schedule_with_warmup", {}),
            ("linear", {"warmup": w, "total": T}, "get_linear_schedule_with_warmup", {}),
            ("cosine", {"warmup": w, "total": T}, "get_cosine_schedule_with_warmup", {}),
            ("cosine", {"warmup": w, "total": T, "cycles": 1.0}, "get_cosine_schedule_with_warmup",
             {"num_cycles": 1.0}),
            ("cosine_with_restarts", {"warmup": w, "total": T, "cycles": 2},
             "get_cosine_with_hard_restarts_schedule_with_warmup", {"num_cycles": 2}),
        )
    ),
    *(
        ("polynomial", {"warmup": w, "total": T, "rate": 1e-3, "end": 1e-5, "power": 2.0},
         "get_polynomial_decay_schedule_with_warmup", {"lr_end": 1e-5, "power": 2.0})
        for w in (0, W)
    ),
    ("inverse_sqrt", {"warmup": W}, "get_inverse_sqrt_schedule", {}),
    ("inverse_sqrt", {"warmup": W, "scale": 5}, "get_inverse_sqrt_schedule", {"timescale": 5}),
]  # fmt: skip
STEPS = 13


def asked(own: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    named = {"warmup": "num_warmup_steps", "total": "num_training_steps"}
    return {named[k]: x for k, x in own.items() if k in named} | more


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], list[list[float]]]:
    """Steps and schedules of 4.37.2."""
    python = loaded.python("tf4.37")
    folder = tmp_path_factory.mktemp("old")
    options = [
        {"lr": n["rate"], "betas": n["betas"], "eps": n["eps"], "weight_decay": n["decay"],
         "correct_bias": correct}
        for n in NUMBERS for correct in (True, False)
    ]  # fmt: skip
    steps = [(o, START, PUSHES) for o in options]
    torch.save((steps, [(f, asked(own, more), 1e-3, STEPS) for _, own, f, more in JUDGED]), folder / "in.pt")
    subprocess.run(
        [python, ROOT / "tests" / "optimizer_script.py", folder / "in.pt", folder / "out.pt"],
        check=True, timeout=120,
    )  # fmt: skip
    made: tuple[list[Tensor], list[list[float]]] = torch.load(folder / "out.pt")
    return made


def test_a_step_is_that_of_transformers_4_37(old: Any) -> None:
    cases = [(n, correct) for n in NUMBERS for correct in (True, False)]
    for (numbers, correct), wanted in zip(cases, old[0], strict=True):
        recipe = AdamW(**numbers, correct_bias=correct, eps_at="raw", decay_first=False)
        assert torch.allclose(walked(recipe), wanted, rtol=0, atol=1e-15)
        other = AdamW(**numbers, correct_bias=not correct, eps_at="raw", decay_first=False)
        assert not torch.allclose(walked(other), wanted, rtol=0, atol=1e-4)


def test_schedules_are_those_of_both_releases(old: Any) -> None:
    for (name, own, function, more), before in zip(JUDGED, old[1], strict=True):
        made = [schedules.schedule(name, **own)(s) for s in range(STEPS)]
        now = factors(function, asked(own, more), 1e-3, STEPS)
        assert made == pytest.approx(now, abs=1e-12), (name, own)
        assert made == pytest.approx(before, abs=1e-12), (name, own)


def test_schedules_at_their_edges() -> None:
    wave = schedules.cosine(W, T)
    assert [round(wave(s), 3) for s in (9, 10, 11)] == [0.0, 0.067, 0.25], "rises again"
    assert [schedules.cosine_with_restarts(T, T)(s) for s in (8, 9, 10)] == [8 / 9, 1.0, 0.0]
    assert schedules.inverse_square_root(0)(10_000) == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="expected a warm-up shorter than 9 steps, found 9"):
        schedules.polynomial(T, T, rate=1e-3)
    with pytest.raises(ValueError, match="expected end below the rate"):
        schedules.polynomial(W, T, rate=1e-8)
    with pytest.raises(ValueError, match="expected a schedule of constant, .* found 'cosin'"):
        schedules.schedule("cosin")


def test_rates_of_dropout_are_those_of_the_classes() -> None:
    for kind, own in classes().items():
        if (made := getattr(transformers, own.name, None)) is not None:
            said = made().to_dict()
            said = said if own.parts is None else in_one_row(said, own.parts)
            assert {key: said[key] for key in own.dropouts} == own.dropouts, kind


# --- the level ----------------------------------------------------------------------------------------------

# Ranks and a tied output layer, stages, copies of rows and tensors, experts, variables of TensorFlow, names
# that are others in memory.
RIGHT = {
    "gpt2-v2-tp2": 7, "mluke-aware": 7, "mixtral-mcore": 6, "mobilebert-squad": 6, "pythia-410m": 6,
    "mistral3-images": 6,
}  # fmt: skip
BESIDE = (
    "mobilebert-squad",
    "pythia-410m",
    "mistral3-images",
    "mluke-aware",
)  # the class of transformers is asked as well


@pytest.mark.parametrize("variant", RIGHT)
def test_a_right_conversion_learns_as_its_original(
    variant: str, conversions: Written, originals: Written
) -> None:
    report = verify(
        conversions(variant), originals(variant), levels="training", settings=VARIANTS[variant].settings,
        against="transformers" if variant in BESIDE else None,
    )  # fmt: skip
    assert report.status == "pass", report.headline
    beside = findings(report, "transformers")
    assert [f.status for f in beside] == ["pass"] * (variant in BESIDE)
    if variant == "mluke-aware":
        assert "without the pooler_output, which the class does not give" in beside[0].message
    (gradients,), (step,) = findings(report, "gradients"), findings(report, "step")
    assert gradients.measured is not None and 0 < gradients.measured <= 1e-9
    assert step.measured is not None and step.measured <= 1e-7
    (controls,) = findings(report, "self-test")
    assert controls.data == {"caught": RIGHT[variant], "planted": RIGHT[variant]}
    for mistake, caught, place, where in controls.tables[0].rows:
        assert caught == "yes"
        if mistake in ("frozen", "wrong group of decay"):
            assert where == place, "no other tensor is blamed"
        if mistake == "not tied":
            assert str(where).endswith(("wte.weight", "embed_tokens.weight", "_embeddings.weight"))


def altered(folder: Path, out: Path, **config: Any) -> Path:
    shutil.copytree(folder, out)
    document = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return out


def test_an_output_layer_that_is_not_tied_is_named(
    conversions: Written, originals: Written, tmp_path: Path
) -> None:
    """Its copy has equal values, so that logits do not differ; the embedding lacks half of its gradient."""
    out = altered(conversions("llama-3.2-1b"), tmp_path / "out", tie_word_embeddings=False)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = verify(out, originals("llama-3.2-1b"), levels="training")
    failed = [f for f in findings(report, "gradients") if f.status == "fail"]
    assert {f.where for f in failed} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert failed[0].where == "lm_head.weight" and "tied to model.embed_tokens.weight" in failed[0].message
    assert failed[0].message in report.headline
    assert report.exit_code == 1


def test_a_head_that_the_original_has_not_is_told_in_one_sentence(
    conversions: Written, originals: Written, tmp_path: Path
) -> None:
    labels: dict[str, Any] = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    out = altered(conversions("llama-3.2-1b"), tmp_path / "out", **labels)
    tensors = load_file(out / "model.safetensors")
    tensors["score.weight"] = tensors["model.embed_tokens.weight"][:3].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = verify(out, originals("llama-3.2-1b"), levels="training")
    (found,) = (f for f in report.findings if f.level == "training")
    assert found.status == "fail" and report.exit_code == 1
    assert "expected the head of the original, found one with score.weight" in found.message


def test_another_dropout_is_named(conversions: Written, originals: Written, tmp_path: Path) -> None:
    folder = altered(conversions("opt-bare"), tmp_path / "out", dropout=0.3)
    settings = VARIANTS["opt-bare"].settings
    report = verify(folder, originals("opt-bare"), levels="training", settings=settings)
    (wrong,) = (f for f in findings(report, "dropout") if f.status == "fail")
    assert wrong.where == "config.json: dropout" and "found 0.3" in wrong.message
    plan = api.plan(originals("opt-bare"), family="opt", options=api.Options(settings=settings))
    said = json.loads((conversions("opt-bare") / "config.json").read_text())
    for rate, status in ((0.1, "pass"), (0.0, "fail")):  # which its class takes where none is said
        config = {**plan.config, "dropout": replace(plan.config["dropout"], value=rate)}
        silent: Any = SimpleNamespace(
            config={k: v for k, v in said.items() if k != "dropout"},
            plan=replace(plan, config=config), direction="to-hf", original=None,
        )  # fmt: skip
        (first, *_) = training_groups.dropouts(silent)
        assert first.status == status, first.message
    assert "found none, which its class takes as 0.1" in first.message


@pytest.mark.parametrize(("key", "value"), [("output_router_logits", True), ("router_jitter_noise", 0.1)])
def test_a_router_that_is_trained_otherwise_is_named(key: str, value: Any, conversions: Written) -> None:
    """A loss of its own beside that of the head, and noise: neither is in the gradients compared here."""
    said = json.loads((conversions("mixtral-b") / "config.json").read_text())
    subject: Any = SimpleNamespace(config=said, plan=None, direction="to-original", original=None)
    assert [f.status for f in training_groups.dropouts(subject)] == ["pass"]
    plan: Any = SimpleNamespace(config={})
    changed: Any = SimpleNamespace(config=said | {key: value}, plan=plan, direction="to-hf", original=None)
    (found,) = training_groups.dropouts(changed)
    assert (found.check, found.status, found.where) == ("router", "fail", f"config.json: {key}")
    assert found.message == f"expected {classes()['mixtral'].routing[key]}, found {value}"


def test_what_no_prompt_reached_is_in_the_headline() -> None:
    """Of a head stored beside a tie nothing is learnt here, and transformers 5 learns it."""

    class Held(dict[str, Tensor]):
        used = frozenset({"model.embed_tokens.weight"})

    held = Held.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.ones(1))
    side: Any = SimpleNamespace(weights=(held,))
    (found,) = training._unread(side)
    assert (found.status, found.where) == ("note", "lm_head.weight")
    step = Finding("training", "step", "pass", "all take it")
    assert judge([step, found], Claim()).headline == (
        "the changes of one training step on these prompts are those of its source; "
        "what no prompt reached (1 of 2 tensors) was not compared"
    )
    Held.used = frozenset(held)
    assert training._unread(side) == []


def wanted(right: np.ndarray, off: float) -> training.Wanted:
    energy = float(right @ right)
    return training.Wanted({"w": right}, {"w": energy}, {"w": off}, 1.0, (), 1e-13, energy / right.size)


def test_a_gradient_that_float32_does_not_have_is_not_judged() -> None:
    """Of an original whose own float32 is off by more than the bar can be, or is no number."""
    right = np.array([3.0, -1.0, 2.0])
    for off, bar_holds in ((1e-13, False), (1.0, True), (float("nan"), True)):
        (found,) = training.apart(wanted(right, off), {"w": right * 0.9})
        assert (found.holds, found.noisy, found.lost) == (bar_holds, bar_holds, False)
        (found,) = training.apart(wanted(right, off), {})
        assert found.lost is not bar_holds


def test_what_is_packed_is_told_from_what_learns() -> None:
    """Codes that a pass sees as numbers, and codes that it sees as they are."""
    weights = PackedWeights.__new__(PackedWeights)
    weights.formulas = {"one": Mock(), "two": Mock(), "words": Mock()}
    weights.inventory = Mock(weights={"one": Mock(), "words": Mock()})
    for name, several in (("one", False), ("words", True)):
        weights.inventory.weights[name].form.packed = several
    weights.tensors = {n: TensorInfo(n, d, (4,), "") for n, d in (("one", "BF16"), ("blocks", "U8"))}
    said = training._packed(Mock(weights=[weights]))
    assert "2 hold packed weights" in said and "2 are codes, taught here as the numbers" in said


@pytest.mark.parametrize("name", ["int4", "modelopt"])
def test_codes_of_several_in_an_element_do_not_learn(name: str, conversions: Written, tmp_path: Path) -> None:
    """Right conversions failed, or were no judge's: gradients of numbers went through the steps of words."""
    source = quantise(
        conversions("mistral-small" if name == "modelopt" else "qwen3-float32"), tmp_path / "in", name
    )
    api.convert(source, tmp_path / "out", check=False)
    report = api.verify(tmp_path / "out", source, levels="training")
    assert report.status == "pass", report.headline
    (found,) = (f for f in report.findings if f.check == "gradients")
    assert "hold packed weights, which no step changes" in found.message
    assert "are codes, taught here" not in found.message


def test_an_original_without_a_loss_is_undecided(originals: Written, tmp_path: Path) -> None:
    source = shutil.copytree(originals("mistral-nemo"), tmp_path / "in")
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors["output.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    api.convert(source, tmp_path / "out", family="mistral")
    report = verify(tmp_path / "out", source, levels="training")
    (found,) = findings(report, "gradients")
    assert found.status == "undecided" and "the original's own loss is nan" in found.message
    assert report.exit_code == 2 and findings(report, "step") == []


def test_a_wrong_tensor_has_another_gradient(
    conversions: Written, originals: Written, tmp_path: Path
) -> None:
    out = altered(conversions("llama-3.2-1b"), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = verify(out, originals("llama-3.2-1b"), levels="training")
    assert report.exit_code == 1 and findings(report, "self-test") == []
    failed = [f for f in findings(report, "gradients") if f.status == "fail"]
    assert any(f.where == name.replace("up", "gate") for f in failed), (
        "what it is multiplied by learns otherwise"
    )


def frozen(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)


def cut_off(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, given, out: out.detach())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (frozen, "does not teach it"),
        (cut_off, "found none"),
    ],
)
def test_what_the_class_of_transformers_learns(
    change: Callable[[Any], None],
    words: str,
    conversions: Written,
    originals: Written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its logits are the same whatever it freezes or cuts off; that unchanged ones pass, see `BESIDE`."""
    own = library.load

    def load(*given: Any) -> tuple[Any, Any]:
        model, info = own(*given)
        change(model)
        return model, info

    monkeypatch.setattr(library, "load", load)
    folders = conversions("llama-3.2-1b"), originals("llama-3.2-1b")
    report = verify(*folders, levels="training", against="transformers")
    logits = [f for f in report.findings if (f.level, f.check) == ("transformers", "logits")]
    assert [f.status for f in logits] == ["pass"]
    found = findings(report, "transformers")
    assert found[0].status == "fail" and words in found[0].message and report.exit_code == 1
    if change is frozen:
        assert [f.where for f in found] == ["model.layers.1.mlp.up_proj.weight"]


def test_too_little_memory_is_said_before(
    conversions: Written, originals: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = conversions("llama-3.2-1b"), originals("llama-3.2-1b")
    with pytest.raises(CkptToolError, match="expected at least .* for gradients, found 9 MB") as error:
        verify(*folders, levels="training", memory=9_000_000)
    (enough,) = re.findall(r"at least (\d+) MB", str(error.value))
    with monkeypatch.context() as patch:  # what is told to be enough is
        patch.setattr(training, "_compared", lambda *given: [])
        verify(*folders, levels="training", memory=int(enough) * 10**6)
    monkeypatch.setattr(training, "free_memory", lambda: 300_000_000)
    with pytest.raises(CkptToolError, match="expected 4.. MB of free memory for gradients, found 300 MB"):
        verify(*folders, levels="training")


def test_a_gradient_that_is_no_number_is_no_step(conversions: Written) -> None:
    """It was passed over; a weight that is none starts from nowhere in both layouts."""
    name = "model.norm.weight"
    with opened(conversions("llama-3.2-1b"), None, {}) as subject:
        side = converted_side(subject, torch.float32, "cpu")
        right = np.ones(side.weights[0].tensors[name].shape)
        wanted = training.Wanted({name: right}, {}, {}, 1.0, [], 0.0, 1.0)
        for found, status in ((right, "pass"), (np.where(np.arange(right.size) == 1, np.nan, right), "fail")):
            steps = training._Steps(side, wanted, optimizer.TORCH, None)
            steps.take(name, found)
            assert steps.findings()[0].status == status
    apart, p = torch.tensor([math.nan, 0.25, math.nan]), torch.tensor([math.nan, 1.0, math.inf])
    assert training._farther(0.5, apart, p) == 0.5 and training._farther(0.0, apart, p) == 0.25


class Counted(Weights):
    """Notes how many elements are in use at once."""

    alive, most = 0, 0

    def __getitem__(self, name: str) -> Tensor:
        x = super().__getitem__(name)
        Counted.alive += x.numel()
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(x.untyped_storage(), self.gone, x.numel())
        return x

    @staticmethod
    def gone(count: int) -> None:
        Counted.alive -= count


@pytest.mark.parametrize("variant", ["llama-3.2-1b", "mluke-aware"])
def test_gradients_phase_by_phase_are_those_of_one_graph(variant: str, conversions: Written) -> None:
    """Of a tied table, and of words and entities side by side; with the weights of one phase in memory, and
    each gradient handed on once."""
    with opened(conversions(variant), None, VARIANTS[variant].settings) as subject:
        side = converted_side(subject, torch.float64, "cpu")
        given = {"entity_ids": [[3, 4]], "entity_positions": [[[1, 2], [4, -1]]]}
        mask = {} if variant != "mluke-aware" else {k: torch.tensor(x) for k, x in given.items()}
        batches = [(torch.arange(5, 16)[None], mask), (torch.arange(30, 37)[None], {})]
        task = gradients.Task(side.vocabulary, variant == "llama-3.2-1b", None)
        (own,) = side.weights
        leaves = {n: own[n].requires_grad_(own.tensors[n].dtype != "I64") for n in own}
        total = torch.zeros((), dtype=torch.float64)
        for ids, more in batches:
            phases = side.module.phases((leaves,), side.config, more)
            for name, y in protocol.outputs(phases, ids).items():
                total = total + task.loss(name, y, ids, more) / 2 if y.numel() else total
        total.backward()
        counted = Counted(own.checkpoint, own.tensors, torch.float64, "cpu")
        Counted.alive = Counted.most = 0
        found: dict[Any, Any] = {}

        def take(key: Any, x: Any) -> None:
            assert key not in found
            found[key] = x

        made = gradients.taught(replace(side, weights=(counted,), ranks=(counted,)), batches, task, take)
    assert made.loss == pytest.approx(float(total.detach()), rel=1e-12)
    assert Counted.most < 0.7 * sum(t.numel for t in own.tensors.values())
    for name, info in own.tensors.items():
        wanted, x = leaves[name].grad, found.get((info.file, info.name))
        assert (wanted is None) == (x is None), name
        if wanted is not None:
            assert np.allclose(wanted.numpy(), x, rtol=1e-9, atol=1e-12), name
