"""Files as the world has them: weights that training programs wrapped, state of training beside them, numbers
wider than 64 bits, an index that is out of date, zips of Windows."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import functools
import io
import json
import pathlib
import pickle
import random
import re
import shutil
import typing
import uuid
import zipfile
import zoneinfo
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ckpt_tool.api import Options, Plan, convert, open_checkpoint, plan, recognise, verify
from ckpt_tool.checkpoint.base import TensorFile, Unwrapped
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.wrapping import unwrapped
from ckpt_tool.cli import cli
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests.headers_only import Headers, planned

CASES = Path(__file__).parents[2] / "shared" / "cases"
Tensors = dict[str, torch.Tensor]


def case(name: str) -> Path:
    if not (CASES / name).is_dir():
        pytest.skip("the cases are not beside this checkout")
    return CASES / name


def same_tensors(one: Path, two: Path) -> bool:
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- wrappers and prefixes ------------------------------------------------------------------------------

BEFORE = (
    *("_orig_mod.", "module.", "model.", "state_dict.", "base_model.model.", "_forward_module."),
    *(
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "state_dict.model.",
        "model.state_dict.",
        "module.module.",
    ),
    *(
        "state_dict._forward_module.",
        "_orig_mod._fsdp_wrapped_module.",
        "state_dict.model._orig_mod.",
    ),
)
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
BESIDE = {
    "optimizer.state.0.exp_avg": (3,),
    "model_ema.decay": (),
    "ema.layers.0.x": (2, 2),
    "rng_state": (9,),
}


def rename(held: Mapping[str, list[str]], change: Callable[[str], str]) -> Unwrapped:
    files: dict[str, TensorFile] = {
        f: Headers(f, [(change(n), "F32", (2, 3)) for n in names]) for f, names in held.items()
    }
    return unwrapped(files, label="folder")


SEEN: set[frozenset[str]] = set()


WRAPPED = ("mluke-base", "mluke-deepspeed")  # as they are published, and trained


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in WRAPPED])
def test_the_names_of_no_model_are_taken_for_wrapped_ones(variant: str, originals: Any) -> None:
    """And those of every original come back from under every wrapper."""
    chosen = VARIANTS[variant]
    with open_checkpoint(originals(variant), prefer="original") as checkpoint:
        assert not checkpoint.readings and not checkpoint.left_out
        held = {name: list(file.tensors) for name, file in checkpoint.files.items()}
        made = plan(checkpoint, family=chosen.family, options=Options(settings=chosen.settings))
    for side in (held, {f: list(tensors) for f, tensors in planned(made).items()}):
        if (names := frozenset(n for listed in side.values() for n in listed)) in SEEN:
            continue  # another variant of these names
        SEEN.add(names)
        assert not rename(side, str).readings
        if any("/" in name for name in names):
            continue  # variables of TensorFlow, which no program of torch wraps
        for before in BEFORE:
            found = rename(side, lambda name, before=before: before + name)  # type: ignore[misc]
            beside = {t.tensor.name.removeprefix(before) for t in found.left_out}
            assert all(re.match(r"optimizer|(\w+_)?rng_|(opt_param|lr)_scheduler", name) for name in beside)
            side = {f: [n for n in names if n not in beside] for f, names in side.items()}
            assert {f: list(file.tensors) for f, file in found.files.items()} in (
                side,
                {f: [f"model.{n}" for n in names] for f, names in side.items()},  # a body without its head
            ), before
            assert any(before.removesuffix("model.") in r for r in found.readings) or before == "model."
        for word in INSIDE:
            changed = rename(side, lambda n, w=word: re.sub(r"\.(\d+)\.", rf".\1.{w}.", n, count=1))  # type: ignore[misc]
            assert {f: list(file.tensors) for f, file in changed.files.items()} == side
            assert any(word in r for r in changed.readings)


def weight_files(folder: Path) -> dict[Path, Tensors]:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".pth", ".pt", ".safetensors", ".bin"))
    return {p: load_file(p) if p.suffix == ".safetensors" else torch.load(p) for p in files}


def leaves(tree: Mapping[str, Any], before: str = "") -> Tensors:
    found: Tensors = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{before}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{before}{key}"] = value.clone()
    return found


STATE = ("optimizer", "lr_scheduler", "rng_state", "step", "best_loss")


def rewrite(folder: Path, change: Callable[[Tensors], dict[str, Any]]) -> None:
    """Every weight file again, its tensors wrapped by `change`, and an index that lists them; the state of
    training is in the first."""
    listed: dict[str, str] = {}
    for file, tensors in weight_files(folder).items():
        wrapped = change(tensors)
        if listed and "index.json" in str([*folder.iterdir()]):
            wrapped = {k: v for k, v in wrapped.items() if k not in STATE}
        listed |= dict.fromkeys(leaves(wrapped), file.name)
        if file.suffix == ".safetensors":
            save_file(leaves(wrapped), file, {"format": "pt"})
        else:
            torch.save(wrapped, file)
    for index in folder.glob("*.index.json"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def state_of_training(tensors: Tensors) -> dict[str, Any]:
    """What a training program saves beside the weights."""
    return {
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(5, 3), "step": 7}}, "param_groups": [{"lr": 0.1}]},
        "model_ema": {n: t + 1 for n, t in tensors.items()},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(4)}}},  # fairseq's
        "lr_scheduler": {"base_lrs": [0.1], "last": torch.zeros(2)},
        "rng_state": torch.zeros(16, dtype=torch.uint8),
        "iter_num": 5,
    }


WRAPPED: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "prefix": lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
    "model": lambda t: {"model": t, **state_of_training(t)},
    "state_dict": lambda t: {"state_dict": {f"model.{n}": v for n, v in t.items()}, "epoch": 3},
    "nested": lambda t: {
        "model": {"state_dict": t},
        "extra_state": {"ema": {n: v + 1 for n, v in t.items()}},
    },
    "deepspeed": lambda t: {"module": t, "optimizer": None, "ds_version": "0.14.0"},
    "counted": lambda t: {"model": t, "step": torch.tensor(7), "best_loss": torch.tensor([0.5])},
    "beside": lambda t: {**t, "optimizer": state_of_training(t)["optimizer"]},
}
EVERY = (
    *("mistral-7b-v0.1", "mistral-7b-v0.3", "mixtral-a", "mixtral-b", "llama-3.2-1b", "llama-2-70b"),
    *("gemma-2-2b", "qwen3-0.6b", "pythia-410m", "gpt-neox-tied", "qwen2-0.5b", "opt-bare", "codegen-16b-nl"),
)


@pytest.mark.parametrize("variant", EVERY)
def test_wrapped_weights_give_the_plan_of_plain_ones(variant: str, originals: Any, tmp_path: Path) -> None:
    options = Options(settings=VARIANTS[variant].settings)
    wanted = plan(originals(variant), family=VARIANTS[variant].family, options=options)
    for kind in WRAPPED:
        if (variant, kind) == ("opt-bare", "counted"):
            continue  # metaseq's own reader knows the dict, and asks about numbers beside it
        folder = Path(shutil.copytree(originals(variant), tmp_path / kind))
        rewrite(folder, WRAPPED[kind])
        check_same_but_for_the_wrapper(wanted, folder, kind, options)


def check_same_but_for_the_wrapper(wanted: Plan, folder: Path, kind: str, options: Options) -> None:
    found = plan(folder, family=wanted.family, options=options)
    if wanted.family != "opt":  # whose reader has a place for what stands before its names
        assert [s.sources for s in found.steps] == [s.sources for s in wanted.steps]
    assert [s.targets for s in found.steps] == [s.targets for s in wanted.steps]
    assert {k: v.value for k, v in found.config.items()} == {k: v.value for k, v in wanted.config.items()}
    extra = {d.tensor.name: d.reason for d in found.dropped} | {d.tensor.name: "" for d in wanted.dropped}
    extra = {n: reason for n, reason in extra.items() if reason}
    assert all("only training" in r or "average" in r or "training run" in r for r in extra.values())
    assert bool(extra) == (kind in ("model", "nested", "beside", "counted"))
    assert len(found.notes) > len(wanted.notes) or kind == "beside" or wanted.family == "opt"
    with open_checkpoint(folder, prefer="original") as checkpoint:
        assert [n for n, own, _ in recognise(checkpoint) if own] == [wanted.family]


@pytest.mark.parametrize(
    "folder",
    ["orig_mod", "module", "model", "wrapped_model", "wrapped_state_dict", "fsdp_inside"],
)
@pytest.mark.parametrize("family", ["llama", "auto"])
def test_wrapped_llamas_convert_to_what_they_are(folder: str, family: str, tmp_path: Path) -> None:
    there = case("state_dict_wrapped_or_prefixed")
    arguments = ["convert", family, "--in", str(there / folder), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 0, run.output
    assert "names were read without" in " ".join(run.output.split())
    assert same_tensors(tmp_path / "out" / "model.safetensors", there / "expected.safetensors")
    proof = verify(tmp_path / "out", source=there / folder, levels=("coverage", "bits"))
    assert proof.status == "pass"


def test_a_wrapped_model_is_proved_with_what_is_left_out(originals: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "in"))
    rewrite(folder, WRAPPED["model"])
    made = convert(folder, tmp_path / "out", family="mistral")
    assert "an average of the weights" in " ".join(d.reason for d in made.plan.dropped)
    proof = verify(tmp_path / "out", source=folder, levels=("coverage", "bits"))
    assert proof.status == "pass"
    text = next(f.message for f in proof.findings if f.check == "bytes")
    assert "dropped with a reason" in text


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "model.", "state_dict."])
def test_a_converted_folder_with_a_prefix_goes_back(before: str, conversions: Any, tmp_path: Path) -> None:
    for variant in ("llama-3.2-1b", "mistral-7b-v0.1"):  # tied, so that all begin with `model.`; not tied
        there = Path(shutil.copytree(conversions(variant), tmp_path / before / variant))
        tensors = load_file(there / "model.safetensors")
        plain = plan(there, family=VARIANTS[variant].family, to="original")
        (there / "ckpt-tool.json").unlink()
        save_file({before + n: t for n, t in tensors.items()}, there / "model.safetensors", {"format": "pt"})
        found = plan(there, family=VARIANTS[variant].family, to="original")
        targets = {p.name for s in found.steps for p in (*s.sources, *s.targets)}
        assert targets == {p.name for s in plain.steps for p in (*s.sources, *s.targets)}
        assert any(before in note for note in found.notes)


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "model."])
def test_an_output_with_a_prefix_is_not_what_loaders_read(
    before: str, conversions: Any, tmp_path: Path
) -> None:
    """They take no prefix off, so that a verdict may not either."""
    there = Path(shutil.copytree(conversions("llama-3.2-1b"), tmp_path / "out"))
    tensors = load_file(there / "model.safetensors")
    save_file({before + n: t for n, t in tensors.items()}, there / "model.safetensors", {"format": "pt"})
    assert verify(there, no_source=True, levels=("coverage",)).status == "fail"
    save_file({**tensors, "optimizer.x": torch.ones(2)}, there / "model.safetensors", {"format": "pt"})
    assert verify(there, no_source=True, levels=("coverage",)).status == "fail"


@pytest.mark.parametrize("only_one", [False, True])
def test_ranks_carry_the_same_prefix(only_one: bool, originals: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals("llama-2-70b"), tmp_path / "in"))
    files = sorted(folder.glob("consolidated.*.pth"))
    for file in files[: 1 if only_one else None]:
        torch.save({f"module.{n}": t for n, t in torch.load(file).items()}, file)
    if not only_one:
        assert plan(folder, family="llama").steps == plan(originals("llama-2-70b"), family="llama").steps
        return
    with pytest.raises(CkptToolError) as caught:
        plan(folder, family="llama")
    (problem,) = caught.value.problems
    assert problem.kind == "bad-name" and "`module.` before every name or none" in problem.message


REFUSED: dict[str, tuple[list[str], str]] = {
    "a prefix before some": (["module.a.weight", "b.weight"], "bad-name"),
    "two sets": (["model.tok_embeddings.weight", "state_dict.tok_embeddings.weight"], "ambiguous-input"),
    "one unknown beside": (["state_dict.a", "teacher.a"], "bad-name"),
    "two names become one": (["layers.0._orig_mod.w", "layers.0.w"], "duplicate-tensor"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_be_meant_twice_is_refused(kind: str) -> None:
    names, expected = REFUSED[kind]
    with pytest.raises(CkptToolError) as caught:
        rename({"a.pth": names}, str)
    assert caught.value.kind == expected


def test_two_ranks_with_other_words_inside_are_a_conflict() -> None:
    with pytest.raises(CkptToolError) as caught:
        rename({"a.pth": ["layers.0._orig_mod.w"], "b.pth": ["layers.0.w"]}, str)
    assert caught.value.kind == "shard-conflict"


def test_an_adapter_stays_an_adapter() -> None:
    names = ["base_model.model.layers.0.attention.wq.lora_A.weight", "base_model.model.norm.weight"]
    assert list(rename({"a.pth": names}, str).files["a.pth"].tensors) == names


@pytest.mark.parametrize("first", ["tok_embeddings.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_any_word_before_a_known_model_is_taken_off(first: str) -> None:
    found = rename({"a.pth": [f"net.{first}", "net.model.layers.0.w"]}, str)
    assert list(found.files["a.pth"].tensors) == [first, "model.layers.0.w"]
    assert "`net.`" in found.readings[0]


@pytest.mark.parametrize(
    "before", ["net.", "actor.model.", "state.", "ema.", "ema_model.module.", "trainer.model."]
)
@pytest.mark.parametrize(
    "variant", ["gpt2-v2-tp2", "gpt2-core-tp2", "bert-v3-virtual", "opt-350m", "llama-2-7b"]
)
def test_any_word_before_any_family_is_taken_off(
    before: str, variant: str, originals: Any, conversions: Any
) -> None:
    """Also one of training's, where nothing else is there: who has the average only means the average."""
    for folder in (originals(variant), conversions(variant)):
        with open_checkpoint(folder) as checkpoint:
            names = [n for n in checkpoint.names() if not re.match(r"optimizer|(\w+_)?rng_|lr_scheduler", n)]
        found = rename({"a.pth": names}, lambda n: before + n)
        own = list(found.files["a.pth"].tensors)
        assert own in (names, [f"model.{n}" for n in names])
        assert f"`{before.removesuffix('model.')}" in found.readings[0]


def test_an_average_beside_no_weights_is_the_model() -> None:
    beside = ["optimizer.state.0.exp_avg", "rng_state"]
    names = ["layers.0.attention.wq.weight", "tok_embeddings.weight"]
    found = rename({"a.pth": [*beside, *(f"ema.{n}" for n in names)]}, str)
    assert list(found.files["a.pth"].tensors) == names and "`ema.`" in found.readings[0]
    assert [t.tensor.name for t in found.left_out] == beside
    two = [f"{word}.{n}" for word in ("ema", "model_ema") for n in names]
    assert list(rename({"a.pth": two}, str).files["a.pth"].tensors) == two


def test_virtual_stages_are_no_wrappers() -> None:
    names = ["model0.language_model.encoder.layers.0.mlp.weight", "model0.language_model.embedding.w.weight"]
    assert list(rename({"a.pth": names}, str).files["a.pth"].tensors) == names


def test_the_version_of_a_format_is_read_from_under_any_word(originals: Any, tmp_path: Path) -> None:
    file = shutil.copytree(originals("gpt2-v1-bare").parent, tmp_path / "in") / "model_optim_rng.pt"
    options = Options(settings=VARIANTS["gpt2-v1-bare"].settings)
    wanted = plan(file, family="megatron-gpt2", options=options)
    torch.save({"net": torch.load(file, map_location="cpu"), "seed": 1}, file)
    found = plan(file, family="megatron-gpt2", options=options)
    assert [s.targets for s in found.steps] == [s.targets for s in wanted.steps]
    assert [s.axes for s in found.steps] == [s.axes for s in wanted.steps]
    (told,) = (n for n in found.notes if n.startswith("beside the weights"))
    assert "only where the family knows what it is" in told


@pytest.mark.parametrize("place", ["a tensor", "a tensor under a word", "within the model"])
def test_the_version_of_a_format_is_not_overlooked(place: str, originals: Any, tmp_path: Path) -> None:
    """Where there is none the rows of query, key and value are read in another order."""
    file = shutil.copytree(originals("gpt2-v1-bare").parent, tmp_path / "in") / "model_optim_rng.pt"
    held = torch.load(file, map_location="cpu")
    version = held.pop("checkpoint_version")
    if place == "within the model":
        held["model"]["checkpoint_version"] = version
    else:
        held["checkpoint_version"] = torch.tensor(float(version))
    torch.save({"net": held} if place == "a tensor under a word" else held, file)
    with pytest.raises(CkptToolError, match="as a number beside the model, found it elsewhere"):
        plan(file, family="megatron-gpt2", options=Options(settings=VARIANTS["gpt2-v1-bare"].settings))


def test_an_unknown_model_keeps_its_names() -> None:
    names = ["model.stem.weight", "model.blocks.0.weight", "score.weight"]
    assert list(rename({"a.pth": names}, str).files["a.pth"].tensors) == names


def test_what_deepspeed_saved_for_one_rank_converts(tmp_path: Path) -> None:
    file = case("files_of_other_trainers") / "deepspeed/global_step100/mp_rank_00_model_states.pt"
    settings = {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    made = convert(file, tmp_path / "out", family="llama", options=Options(settings=settings))
    assert any("`module.`" in note for note in made.plan.notes)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 21


# --- state of training in pickles -----------------------------------------------------------------------


def test_wide_integers_ranges_and_uuids_are_no_reason_to_refuse(tmp_path: Path) -> None:
    there = case("training-state-beside-weights")
    for name in ("plain", "pcg64-state", "uuid-and-range"):
        convert(there / name, tmp_path / name, family="megatron-gpt2")
        assert same_tensors(tmp_path / name / "model.safetensors", tmp_path / "plain" / "model.safetensors")


@functools.cache
def inert() -> dict[str, Any]:
    """Values that training programs store, by what they are."""
    generators = (np.random.PCG64, np.random.PCG64DXSM, np.random.SFC64, np.random.Philox, np.random.MT19937)
    return {
        **{g.__name__: np.random.Generator(g(1)) for g in generators},
        "pcg64 state": np.random.PCG64(1).state,
        "seeds": np.random.SeedSequence(5),
        "RandomState": np.random.RandomState(1),
        "Random": random.Random(1),
        "wide": [2**64, -(2**63) - 1, 10**400, 2**20000],
        "order": np.random.default_rng(0).permutation(200000),
        "text": "é" * (2 << 20),
        "bytes": bytes(3 << 20),
        "more than the reader's window": np.zeros(9 << 20, np.uint8),
        "objects": np.array([1, "a", None], dtype=object),
        "masked": np.ma.array([1, 2], mask=[0, 1]),
        "numpy scalars": [np.float32(3), np.datetime64("2020"), np.bool_(True)],
        "uuid": uuid.uuid4(),
        "range": [range(3), slice(1, 2), complex(1, 2), {1, 2}, frozenset((3,)), bytearray(b"x")],
        "times": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), zoneinfo.ZoneInfo("UTC")],
        "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3)],
        "paths": [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
        "containers": [
            collections.deque([1]),
            collections.Counter({(1, 2): 3}),
            collections.defaultdict(list, a=[1]),
            collections.ChainMap({"a": 1}),
        ],
        "types": [typing.Any, type(None), int | None, list[int], typing.Optional[str], Ellipsis],  # noqa: UP045
        "torch": [torch.device("cpu"), torch.float32, torch.Size([1]), torch.__version__, torch.strided],
        "keys": {None: 1, 0.5: 2, (1, "a"): 3, torch.float32: 4, True: 5},
        "partial": functools.partial(int, base=3),
        "pattern": re.compile("a+"),
    }


@pytest.mark.parametrize("what", inert())
def test_inert_data_beside_the_weights_is_read_over(what: str, tmp_path: Path) -> None:
    """In either container, by the protocol that torch takes and by newer ones."""
    tree = {"model": {"tok_embeddings.weight": torch.ones(3)}, "held": inert()[what], "after": 7}
    file = tmp_path / "consolidated.00.pth"
    for protocol, is_zip in ((2, True), (2, False), (3, True), (4, False), (5, True)):
        torch.save(tree, file, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
        with open_checkpoint(file) as checkpoint:
            assert checkpoint.names() == ["tok_embeddings.weight"]
            assert checkpoint.files[file.name].metadata["after"] == 7


def test_a_long_list_beside_the_weights_is_read_over(tmp_path: Path) -> None:
    """Of more numbers than the reader's window holds."""
    tree = {"model": {"tok_embeddings.weight": torch.ones(3)}, "order": list(range(400_000)), "after": 7}
    torch.save(tree, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint.names() == ["tok_embeddings.weight"]
        assert checkpoint.files["x.pth"].metadata["after"] == 7


def test_whole_optimizers_are_inert_and_whole_models_are_not_weights(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    adam, steps = (made.__new__(made) for made in (torch.optim.Adam, torch.optim.lr_scheduler.StepLR))
    adam.__dict__ |= {  # as they are saved; making them loads torch's compiler
        "defaults": {"lr": 0.1},
        "state": collections.defaultdict(dict, {parameter: {"step": torch.tensor(1.0)}}),
        "param_groups": [{"params": [parameter], "lr": 0.1, "betas": (0.9, 0.999)}],
    }
    steps.__dict__ |= {"optimizer": adam, "step_size": 3, "gamma": 0.1, "base_lrs": [0.1], "last_epoch": 0}
    tree = {"state_dict": {"tok_embeddings.weight": parameter}, "optimizer": adam, "scheduler": steps}
    torch.save(tree, tmp_path / "a.pth")
    with open_checkpoint(tmp_path / "a.pth") as checkpoint:
        assert checkpoint.names() == ["tok_embeddings.weight"]
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "b.pth")
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(tmp_path / "b.pth")
    assert caught.value.kind == "unsafe-pickle"


def test_a_member_of_an_enumeration_is_data_and_getattr_of_python_is_not(tmp_path: Path) -> None:
    def saved(owner: bytes) -> Path:
        data = b"\x80\x02}(X\x01\0\0\0tc__builtin__\ngetattr\nc" + owner + b"\nX\x01\0\0\0a\x86Ru."
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(2)}, buffer)
        out = tmp_path / "x.pth"
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
            for item in old.infolist():
                new.writestr(item.filename, data if item.filename.endswith("data.pkl") else old.read(item))
        return out

    with open_checkpoint(saved(b"megatron.enums\nModelType")) as checkpoint:
        assert checkpoint.names() == []
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(saved(b"os\nsystem"))
    assert caught.value.kind == "unsafe-pickle"


def test_tensors_of_training_that_are_not_dense_are_left_out(tmp_path: Path) -> None:
    odd = {"complex": torch.ones(2, dtype=torch.complex64), "sparse": torch.eye(2).to_sparse()}
    odd |= {"meta": torch.empty(3, device="meta"), "repeated": torch.ones(1).expand(5)}
    weights = {"tok_embeddings.weight": torch.ones(3)}
    torch.save({"model": weights, "optimizer": {"state": {0: odd}}}, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint.names() == list(weights)
        assert any("no dense ones" in note for note in checkpoint.notes)
    for name, tensor in odd.items():
        torch.save({"model": {**weights, name: tensor}}, tmp_path / "y.pth")
        if name == "complex":  # a table of rotations, say; where it is a weight, the plan refuses it
            with open_checkpoint(tmp_path / "y.pth") as checkpoint:
                assert checkpoint.names() == list(weights)
                assert [t.tensor.name for t in checkpoint.left_out] == ["complex"]
            continue
        with pytest.raises(CkptToolError):
            open_checkpoint(tmp_path / "y.pth")


def test_integers_cannot_be_made_to_collide_as_keys(tmp_path: Path) -> None:
    """Equal hashes of wide integers would cost a dict a square of their number."""
    prime = (1 << 61) - 1
    tree = {k * prime: 0 for k in range(1, 300)}
    for wide in (1 << 70, -(1 << 64)):
        torch.save({"w": torch.ones(2), "held": {**tree, wide * prime: 1}}, tmp_path / "x.pth")
        with open_checkpoint(tmp_path / "x.pth") as checkpoint:
            held: Any = checkpoint.files["x.pth"].metadata["held"]
            assert all(type(k) is not int or abs(k) < 1 << 64 for k in held)


# --- JSON, index, zip -----------------------------------------------------------------------------------

LIMIT = 1000000000000000019884624838656


def test_a_limit_of_ten_to_the_thirtieth_is_carried_over(tmp_path: Path) -> None:
    there = case("tokenizer-config-model-max-length-1e30")
    for to in ("hf", "original"):
        convert(there, tmp_path / to, family="qwen2", to=to)
        text = (tmp_path / to / "tokenizer_config.json").read_text()
        assert f'"model_max_length": {LIMIT}' in text
        assert (tmp_path / to / "tokenizer.json").read_bytes() == (there / "tokenizer.json").read_bytes()
    proof = verify(tmp_path / "hf", source=there, levels=("coverage", "bits"))
    assert proof.status == "pass"


PASSED_ON = {"tokenizer_config.json": "model_max_length", "generation_config.json": "max_new_tokens"}


@pytest.mark.parametrize(
    "variant", ["qwen2-0.5b", "gemma-2-2b", "pythia-410m", "qwen3-0.6b", "codegen-2b-multi"]
)
def test_wide_integers_that_nobody_uses_are_passed_on(variant: str, conversions: Any, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    folder = Path(shutil.copytree(conversions(variant), tmp_path / "in"))
    (folder / "ckpt-tool.json").unlink()
    for name, key in PASSED_ON.items():
        fields = json.loads((folder / name).read_bytes()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**fields, key: LIMIT}))
    for to in ("hf", "original")[chosen.family == "codegen" :]:  # whose original has other tensors
        made = plan(folder, family=chosen.family, to=to)
        texts = {d.name: d.content for d in made.documents}
        for name, key in PASSED_ON.items():
            assert json.loads(texts[name])[key] == LIMIT


def test_a_wide_integer_that_a_rule_uses_is_refused(originals: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals("qwen3-0.6b"), tmp_path / "in"))
    config = json.loads((folder / "config.json").read_bytes())
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "head_dim"):
        (folder / "config.json").write_text(json.dumps({**config, name: LIMIT}))
        with pytest.raises(CkptToolError) as caught:
            plan(folder, family="qwen3")
        assert caught.value.kind in ("bad-config", "config-mismatch")


@pytest.mark.parametrize("digits", [19, 31, 300])
def test_integers_of_json_are_exact(digits: int) -> None:
    assert parse_object(b'{"a": -' + b"9" * digits + b"}", file="x") == {"a": -int("9" * digits)}


@pytest.mark.parametrize(("name", "family"), [("count", "llama"), ("twice", "qwen2")])
def test_another_total_in_the_index_is_a_note(name: str, family: str, tmp_path: Path) -> None:
    there = case("index_total_size_wrong") / name
    made = convert(there, tmp_path / "out", family=family, to="original")
    assert any("total_size" in note for note in made.plan.notes)
    options = Options(max_shard_bytes=6000)
    if family == "qwen2":
        again = plan(there, family=family, options=options)
        index = next(d for d in again.documents if d.name.endswith("index.json"))
        total = sum(t.nbytes for f in again.outputs for t in f.tensors)
        assert json.loads(index.content)["metadata"]["total_size"] == total


@pytest.fixture
def two_files(originals: Any, tmp_path: Path) -> Path:
    """A Qwen3 in two files with an index."""
    options = Options(max_shard_bytes=30_000)
    convert(originals("qwen3-0.6b"), tmp_path / "two", family="qwen3", options=options, check=False)
    (tmp_path / "two" / "ckpt-tool.json").unlink()
    return tmp_path / "two"


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> list[str]:
    """The notes of the plan made with a changed index."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    return list(plan(folder, family="qwen3").notes)


def test_any_total_is_a_note_and_none_is_no_note(two_files: Path) -> None:
    for total in (1, 1.5, "1e9", True, [], -1, 10**30):
        notes = edited(two_files, lambda index: index.update(metadata={"total_size": total}))  # noqa: B023
        assert sum("total_size" in note for note in notes) == 1, total
    for metadata in (None, {}, 5, {"total_size": None}):
        notes = edited(two_files, lambda index: index.update(metadata=metadata))  # noqa: B023
        assert not any("total_size" in note for note in notes), metadata


def test_an_index_that_is_out_of_date_is_a_note_where_each_tensor_is_once(two_files: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    files = sorted(p.name for p in two_files.glob("*.safetensors"))

    def move(index: dict[str, Any]) -> None:
        there = index["weight_map"][name]
        index["weight_map"][name] = next(f for f in files if f != there)

    assert any(name in n and "another file" in n for n in edited(two_files, move))
    assert any(
        name in n and "does not list" in n for n in edited(two_files, lambda i: i["weight_map"].pop(name))
    )
    with pytest.raises(CkptToolError) as caught:
        edited(two_files, lambda i: i["weight_map"].update({"model.ghost": files[0]}))
    assert (caught.value.kind, caught.value.problems[0].where) == ("bad-index", "model.ghost")


def test_an_index_may_list_an_output_layer_that_the_config_ties(two_files: Path) -> None:
    """Writers that leave shared tensors out list them; transformers 4.37.2, 4.57.6 and 5.23.0 load it."""
    file = next(p.name for p in two_files.glob("*.safetensors"))

    def listed(index: dict[str, Any]) -> None:
        index["weight_map"]["lm_head.weight"] = file

    config = two_files / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"tie_word_embeddings": False}))
    with pytest.raises(CkptToolError) as caught:
        edited(two_files, listed)
    assert (caught.value.kind, caught.value.problems[0].where) == ("bad-index", "lm_head.weight")
    assert content["tie_word_embeddings"] is True
    config.write_text(json.dumps(content))
    assert any("lm_head.weight, which no file holds" in n for n in edited(two_files, lambda index: None))


def test_a_dot_before_the_names_of_an_index_is_the_same_folder(two_files: Path) -> None:
    plain = edited(two_files, lambda index: None)

    def dotted(index: dict[str, Any]) -> None:
        index["weight_map"] = {k: f"./{v}" for k, v in index["weight_map"].items()}

    assert edited(two_files, dotted) == plain
    with pytest.raises(CkptToolError) as caught:
        edited(two_files, lambda i: i.update(weight_map={k: "x/" + v for k, v in i["weight_map"].items()}))
    files = len(list(two_files.glob("*.safetensors")))  # each is told once
    assert len(caught.value.problems) == files and "beside the index" in (caught.value.problems[0].hint or "")


def windows(source: Path, to: Path) -> None:
    """The zip again, its member names with backslashes, at their places."""
    data = source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        names = [i.filename for i in archive.infolist()]
    for name in names:
        data = data.replace(name.encode(), name.replace("/", "\\").encode())
    to.write_bytes(data)


def test_a_torch_zip_with_backslashes_is_read(originals: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "in"))
    file = folder / "consolidated.00.pth"
    wanted = plan(folder, family="mistral")
    windows(file, file)
    assert b"\\data.pkl" in file.read_bytes()
    convert(folder, tmp_path / "out", family="mistral")
    assert plan(folder, family="mistral").steps == wanted.steps
    with open_checkpoint(folder) as checkpoint:
        assert any("\\" in note for note in checkpoint.notes)


@pytest.mark.parametrize("inside", ["", "model/"])
def test_a_zip_of_a_folder_with_backslashes_is_read(inside: str, originals: Any, tmp_path: Path) -> None:
    folder = originals("mistral-7b-v0.1")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"download/{inside}{file.name}")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
    data = (tmp_path / "a.zip").read_bytes()
    for name in names:
        data = data.replace(name.encode(), name.replace("/", "\\").encode())
    (tmp_path / "b.zip").write_bytes(data)
    assert plan(tmp_path / "b.zip", family="mistral").steps == plan(folder, family="mistral").steps


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_pass_over_wide_values(protocol: int) -> None:
    from ckpt_tool.checkpoint.unpickle import read_pickle

    tree = {"a": 10**3000, "b": "x" * (9 << 20), "c": "é" * (2 << 20), "d": 5}
    found: Any = read_pickle(pickle.dumps(tree, protocol), file="x").value
    assert found["d"] == 5 and type(found["a"]).__name__ == type(found["b"]).__name__ == "Inert"
