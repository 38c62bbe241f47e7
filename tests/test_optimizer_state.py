"""`convert --with-optimizer`: moments go where their tensors go, and back, bit for bit. A moment is made as a
function of each number of its tensor, so that it is right where it is that function of the converted one."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckpt_tool import api
from ckpt_tool.cli import cli
from ckpt_tool.convert.optimizer_state import STATES
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests.conftest import Written
from tests.test_torch_dist import joined

MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp_avg": lambda w: w.float() * 3,
    "exp_avg_sq": lambda w: w.float().square(),
    "fp32_param": lambda w: w.float() + 1,
}
WITH = api.Options(with_optimizer=True)


def refused(run: Callable[[], Any]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        run()
    return caught.value


def states(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted((folder / "optimizer").glob("*.safetensors")):
        found |= load_file(file)
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: x for f in folder.glob("model*.safetensors") for n, x in load_file(f).items()}


def checked(out: Path, kinds: tuple[str, ...]) -> None:
    """Every tensor of the model has its states, and nothing else has any."""
    model, found = weights(out), states(out)
    assert found.keys() == {f"{kind}.{name}" for kind in kinds for name in model}
    for name, x in found.items():
        kind, _, of = name.partition(".")
        assert x.dtype == torch.float32 and torch.equal(x, MADE[kind](model[of])), name


# --- the ranks' own files -----------------------------------------------------------------------------------


def decays(name: str, x: Tensor) -> bool:
    return x.ndim > 1 and not name.endswith(".bias")


def flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, x in tree.items():
        if isinstance(x, Tensor):
            found[f"{prefix}{key}"] = x
        elif isinstance(x, dict):
            found |= flat(x, f"{prefix}{key}.")
    return found


def trained(source: Path, out: Path, change: Callable[[dict[str, Any]], None] = lambda inner: None) -> Path:
    """The same run with all of its Adam's state, as torch's optimizers number it."""
    shutil.copytree(source, out)
    for path in sorted(out.rglob("model_optim_rng.pt")):
        file = torch.load(path, map_location="cpu", weights_only=False)
        model = flat({k: v for k, v in file.items() if k.startswith("model")})
        model = {n: x for n, x in model.items() if x.is_floating_point() and "_extra_state" not in n}
        order = [n for n in model if decays(n, model[n])], [n for n in model if not decays(n, model[n])]
        numbers = {n: k for k, n in enumerate([*order[0], *order[1]])}
        inner = {
            "state": {
                k: {
                    "step": 7,
                    "exp_avg": MADE["exp_avg"](model[n]),
                    "exp_avg_sq": MADE["exp_avg_sq"](model[n]),
                }
                for n, k in numbers.items()
            },
            "param_groups": [
                {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": wd, "params": [numbers[n] for n in names]}
                for wd, names in zip((0.1, 0.0), order, strict=True)
            ],
        }
        change(inner)
        file["optimizer"] = {"optimizer": inner}
        torch.save(file, path)
    return out


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch asks for to read the loss scaler of an old run, whose place the state takes."""
    for name, kind in (
        ("megatron.fp16.loss_scaler", "DynamicLossScaler"),
        ("apex.optimizers.fused_adam", "FusedAdam"),
    ):
        for k in range(1, 4):
            module = types.ModuleType(".".join(name.split(".")[:k]))
            setattr(module, kind, type(kind, (), {}))
            monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("variant", ["gpt2-v2-tp2", "qwen2-mcore", "mixtral-mcore"])
def test_ranks_with_their_moments(variant: str, originals: Written, tmp_path: Path) -> None:
    source, chosen = trained(originals(variant), tmp_path / "in"), VARIANTS[variant]
    options = api.Options(settings=chosen.settings, with_optimizer=True)
    made = api.convert(source, tmp_path / "out", family=chosen.family, options=options)
    checked(tmp_path / "out", ("exp_avg", "exp_avg_sq"))
    told = json.loads((tmp_path / "out" / "optimizer" / "optimizer.json").read_text())
    assert told["step"] == 7 and told["states"] == ["exp_avg", "exp_avg_sq"]
    assert [g["weight_decay"] for g in told["groups"]] == [0.1, 0.0]
    assert not any(".exp_avg" in d.tensor.name for d in made.plan.dropped)
    report = api.verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    (state,) = (f for f in report.findings if f.check == "optimizer")
    assert state.status == "pass" and "exp_avg, exp_avg_sq" in state.message


def test_without_the_option_they_are_dropped_with_a_reason(originals: Written, tmp_path: Path) -> None:
    source = trained(originals("qwen2-mcore"), tmp_path / "in")
    plan = api.plan(source, family="qwen2")
    assert not any(f.name.startswith("optimizer/") for f in plan.outputs)
    assert {d.reason for d in plan.dropped if "exp_avg" in d.tensor.name} == {"state of the training run"}


def fewer(inner: dict[str, Any]) -> None:
    inner["param_groups"][0]["params"].pop()


def another_shape(inner: dict[str, Any]) -> None:
    inner["state"][0]["exp_avg"] = torch.zeros(3, 5)


def lacking(inner: dict[str, Any]) -> None:
    del inner["state"][2]["exp_avg_sq"]


def in_words(inner: dict[str, Any]) -> None:
    inner["param_groups"][0]["params"][0] = "first"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (in_words, "unsupported", "expected numbers of parameters"),
        (fewer, "unsupported", "expected groups of"),
        (another_shape, "shape-mismatch", "expected the shape of parameter 0, found [3, 5]"),
        (lacking, "missing-tensor", "expected exp_avg_sq of this tensor too"),
    ],
)
def test_state_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], kind: str, words: str, originals: Written, tmp_path: Path
) -> None:
    source = trained(originals("qwen2-mcore"), tmp_path / "in", change)
    error = refused(lambda: api.plan(source, family="qwen2", options=WITH))
    assert error.problems[0].kind == kind and words in str(error)


def test_numbers_of_a_run_that_are_none_are_left_out(originals: Written, tmp_path: Path) -> None:
    def broken(inner: dict[str, Any]) -> None:
        inner["param_groups"][0]["lr"] = float("inf")
        for k, one in inner["state"].items():
            one["step"] = torch.tensor(float("nan")) if k % 2 else float("nan")

    source = trained(originals("qwen2-mcore"), tmp_path / "in", broken)
    made = api.plan(source, family="qwen2", options=WITH)
    (told,) = (json.loads(d.content) for d in made.documents if d.name == "optimizer/optimizer.json")
    assert "step" not in told and [g.get("lr") for g in told["groups"]] == [None, 1e-4]


def test_ranks_that_differ_are_not_averaged_nor_cast(originals: Written, tmp_path: Path) -> None:
    source = trained(originals("qwen2-mcore"), tmp_path / "in")
    last = max(source.rglob("model_optim_rng.pt"))
    file = torch.load(last, weights_only=False)
    state = file["optimizer"]["optimizer"]["state"]
    for one in state.values():
        one["step"] = 9
    torch.save(file, last)
    made = api.plan(source, family="qwen2", options=WITH)
    assert any("ranks made 7 and 9 steps" in note for note in made.notes)
    (told,) = (json.loads(d.content) for d in made.documents if d.name == "optimizer/optimizer.json")
    assert "step" not in told
    for one in state.values():
        one["exp_avg"] = one["exp_avg"].half()
    torch.save(file, last)
    error = refused(lambda: api.plan(source, family="qwen2", options=WITH))
    assert {p.kind for p in error.problems} == {"dtype-mismatch"} and "found F16 and F32" in str(error)


# --- torch_dist ---------------------------------------------------------------------------------------------


def with_state(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The ranks' files with the states of a torch_dist folder among their tensors."""
    shutil.copytree(source, folder)
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        file = torch.load(path, map_location="cpu", weights_only=False)
        for name, x in list(file["model"].items()):
            for kind in STATES:
                file["model"][f"optimizer.state.{kind}.{name}"] = MADE[kind](x)
        change(file["model"])
        torch.save(file, path)
    return folder


@pytest.fixture(scope="module")
def dist(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch_dist folder with all states, as torch.distributed.checkpoint writes it."""
    root = tmp_path_factory.mktemp("dist")
    return joined(with_state(originals("llama-mcore"), root / "ranks", lambda model: None), root / "in")


def test_a_torch_dist_folder_goes_forth_and_back(dist: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    args = ["convert", "llama", "--in", str(dist), "--out", str(out), "--with-optimizer"]
    assert CliRunner().invoke(cli, args).exit_code == 0
    checked(out, STATES)
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True, max_shard_bytes=60_000)
    api.convert(out, tmp_path / "back", to="original", options=form)
    api.convert(tmp_path / "back", tmp_path / "again", family="llama", options=WITH)
    before, after = states(out), states(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[n], x) for n, x in after.items())
    report = api.verify(tmp_path / "back", out, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    alone = tmp_path / "alone"
    api.convert(out, alone, to="original", options=api.Options(family_options={"form": "torch_dist"}))
    api.convert(alone, tmp_path / "model", family="llama")
    assert not (tmp_path / "model" / "optimizer").exists()


@pytest.fixture(scope="module")
def hf(dist: Path) -> Path:
    """That folder in the Hugging Face layout."""
    api.convert(dist, dist.parent / "hf", family="llama", options=WITH)
    return dist.parent / "hf"


def one_narrow(tensors: dict[str, Tensor]) -> None:
    name = "exp_avg.model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()


def a_stranger(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg.model.other.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "name", "kind"),
    [
        (one_narrow, "exp_avg-00001-of-00001.safetensors", "dtype-mismatch"),
        (a_stranger, "exp_avg-00001-of-00001.safetensors", "uncovered-tensors"),
        (dict.copy, "exp_avg-00001-of-00002.safetensors", "duplicate-tensor"),
    ],
)
def test_states_that_do_not_go_back_are_refused(
    change: Callable[[dict[str, Tensor]], object], name: str, kind: str, hf: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(hf, tmp_path / "out")
    tensors = load_file(out / "optimizer" / "exp_avg-00001-of-00001.safetensors")
    change(tensors)
    save_file(tensors, out / "optimizer" / name)
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True)
    error = refused(lambda: api.plan(out, to="original", options=form))
    assert {p.kind for p in error.problems} == {kind}


def test_a_state_of_no_tensor_is_named_among_what_is_left_out(originals: Written, tmp_path: Path) -> None:
    def stranger(model: dict[str, Tensor]) -> None:
        model["optimizer.state.exp_avg.decoder.other.weight"] = torch.zeros(3)

    source = joined(with_state(originals("llama-mcore"), tmp_path / "ranks", stranger), tmp_path / "in")
    dropped = [d.tensor.name for d in api.plan(source, family="llama", options=WITH).dropped]
    assert "optimizer.state.exp_avg.decoder.other.weight" in dropped
    assert not any("exp_avg.embedding" in name for name in dropped)


def test_a_changed_moment_is_found(dist: Path, hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "out")
    file = next((tmp_path / "out" / "optimizer").glob("exp_avg-*"))
    tensors = load_file(file)
    tensors["exp_avg.model.norm.weight"][3] += 1
    save_file(tensors, file, {"format": "pt"})
    report = api.verify(tmp_path / "out", dist, levels="bits")
    wrong = [f for f in report.findings if f.check == "optimizer"]
    assert wrong[0].status == "fail" and "exp_avg.model.norm.weight" in f"{wrong[0].where} {wrong[0].message}"
    file.unlink()
    report = api.verify(tmp_path / "out", dist, levels="bits")
    assert {f.status for f in report.findings if f.check == "optimizer"} == {"fail"}


def test_flat_buffers_are_refused_by_name(originals: Written, tmp_path: Path) -> None:
    def buffers(model: dict[str, Tensor]) -> None:
        for name in [n for n in model if n.startswith("optimizer.")]:
            del model[name]
        model["optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"] = torch.zeros(64)

    source = joined(with_state(originals("llama-mcore"), tmp_path / "ranks", buffers), tmp_path / "in")
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    assert error.problems[0].kind == "unsupported" and "buffers of many parameters" in str(error)
    api.plan(source, family="llama")
    ranks = shutil.copytree(originals("qwen2-mcore"), tmp_path / "distributed")
    next(ranks.rglob("model_optim_rng.pt")).with_name("distrib_optim.pt").write_bytes(b"")
    error = refused(lambda: api.plan(ranks, family="qwen2", options=WITH))
    assert error.problems[0].kind == "unsupported" and "distrib_optim.pt" in str(error)


def test_where_there_is_none_that_is_said(conversions: Written, originals: Written) -> None:
    error = refused(lambda: api.plan(originals("llama-3.2-1b"), family="llama", options=WITH))
    assert error.problems[0].kind == "missing-tensor" and "without --with-optimizer" in str(error)
    with_objects = VARIANTS["gpt2-v2-tp2"]
    options = api.Options(settings=with_objects.settings, with_optimizer=True)
    error = refused(lambda: api.plan(originals("gpt2-v2-tp2"), family=with_objects.family, options=options))
    assert error.problems[0].kind == "unsupported" and "found it in an object" in str(error)
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True)
    error = refused(lambda: api.plan(conversions("llama-mcore"), to="original", options=form))
    assert error.problems[0].kind == "missing-tensor" and "exp_avg-00001" in str(error)
    form = api.Options(family_options={"form": "mcore"}, with_optimizer=True)
    error = refused(lambda: api.plan(conversions("llama-mcore"), to="original", options=form))
    assert error.problems[0].kind == "unsupported" and "--form torch_dist" in str(error)
