"""Files as the world has them: dtypes of their own, experts stacked as in memory, publishers' checklists."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.api import Options
from ckpt_tool.checkpoint import checklist
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.cli import cli
from ckpt_tool.convert.families import mixtral
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.megatron_gpt2 import WIDE
from ckpt_tool.fixtures.megatron import FILE
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.inspect import inspect
from ckpt_tool.verify import holding, verify
from ckpt_tool.verify.sides import converted_side
from ckpt_tool.verify.subject import opened

SHARED = Path(__file__).parents[2] / "shared" / "cases"
Written = Callable[[str], Path]
WIDER = 1 + 2.0**-12  # a factor that 16 bits round away


class Lenient(pickle.Unpickler):
    """Classes of code that is not installed, as Megatron's, are plain records."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except ModuleNotFoundError:
            return SimpleNamespace


LENIENT = SimpleNamespace(**{**vars(pickle), "Unpickler": Lenient})


def case(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip("the shared cases are not beside this checkout")
    return SHARED / name


def changed(content: Any, change: Callable[[str, torch.Tensor], torch.Tensor], name: str = "") -> Any:
    """What a torch file holds with every tensor changed, by its dotted name."""
    if isinstance(content, torch.Tensor):
        return change(name, content)
    if isinstance(content, dict):
        made = {k: changed(v, change, f"{name}.{k}".lstrip(".")) for k, v in content.items()}
        return type(content)(made)
    return content


def rewritten(source: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of an original with its tensors changed, in containers of the same kind."""
    at = shutil.copytree(source, folder) if source.is_dir() else shutil.copy(source, folder)
    files = [at] if at.is_file() else [p for p in sorted(at.rglob("*")) if p.is_file()]
    for file in files:
        if file.suffix == ".safetensors":
            save_file({n: change(n, x) for n, x in load_file(file).items()}, file, metadata={"format": "pt"})
        elif file.suffix in (".pth", ".pt", ".bin"):
            held = torch.load(file, map_location="cpu", weights_only=False, pickle_module=LENIENT)
            torch.save(changed(held, change), file)
    return at


def wide_norms(name: str, x: torch.Tensor) -> torch.Tensor:
    """Norms in the next wider dtype, with values that only it holds."""
    if "norm" not in name.lower() and "ln_" not in name:
        return x
    wide = torch.float64 if x.dtype is torch.float32 else torch.float32
    return x.to(wide) * (1 + 2.0**-30 if wide is torch.float64 else WIDER)


def held(folder: Path, side: str) -> Counter[tuple[str, str, bytes]]:
    """Name, dtype and bytes of every tensor in a folder, whatever its file."""
    with open_checkpoint(folder, prefer=side) as checkpoint:  # type: ignore[arg-type]
        return Counter((t.name, t.dtype, checkpoint.read(t).tobytes()) for t in checkpoint)


def texts(report: Any) -> list[str]:
    return [f"{f.where}: {f.message}" for f in report.findings if f.status in ("fail", "undecided")]


# --- dtypes of their own --------------------------------------------------------------------------------

# One of each family and way of sharing a model out.
MIXED = (
    "mistral-7b-v0.3", "mixtral-a", "mixtral-b", "llama-3-70b", "bert-v2-tp2", "gpt2-2019-tp2", "opt-350m",
    "opt-13b", "codegen-2b-multi", "qwen2-window", "qwen2-mcore-tied", "qwen3-0.6b", "gemma-2-2b",
    "pythia-410m",
)  # fmt: skip


@pytest.fixture(scope="session")
def mixed(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`mixed(variant)`: that tiny original with its norms in a wider dtype."""
    root = tmp_path_factory.mktemp("mixed")

    def written(variant: str) -> Path:
        if not (root / variant).exists():
            rewritten(originals(variant), root / variant, wide_norms)
        return root / variant

    return written


@pytest.mark.parametrize("variant", MIXED)
def test_each_tensor_keeps_its_dtype_there_and_back(variant: str, mixed: Written, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    done = api.convert(
        mixed(variant), tmp_path / "out", family=chosen.family, options=Options(settings=chosen.settings)
    )
    (note,) = (n for n in done.plan.notes if "dtype" in n)
    assert "no value is rounded" in note and len(note) <= 110
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == chosen.true_config["torch_dtype"]
    assert done.plan.lossy == () and done.report is not None and done.report.exit_code == 0
    report = verify(tmp_path / "out", mixed(variant), settings=chosen.settings, levels=("coverage", "bits"))
    assert texts(report) == [] and report.exactness == "bit-identical"
    with open_checkpoint(mixed(variant), prefer="original") as opened:
        ranked = len(set(opened.names())) < sum(1 for _ in opened)
        options = Options(shards=len(opened.files) if ranked else 1)
    api.convert(
        tmp_path / "out", tmp_path / "back", family=chosen.family, to="original", options=options, check=False
    )
    there, again = held(mixed(variant), "original"), held(tmp_path / "back", "original")
    odd = {name for name, *_ in again - there}
    padded = {name for name in odd if name.endswith(("word_embeddings.weight", "lm_head.bias"))}
    assert again and odd == (padded if "megatron" in chosen.family else set())  # rows of padding are others


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("variant", ["llama-3-70b", "gpt2-2019-tp2", "qwen3-0.6b"])
def test_a_cast_of_mixed_dtypes_is_made_and_recorded(
    variant: str, dtype: str, mixed: Written, tmp_path: Path
) -> None:
    chosen = VARIANTS[variant]
    options = Options(settings=chosen.settings, dtype=dtype)
    done = api.convert(mixed(variant), tmp_path / "out", family=chosen.family, options=options, check=False)
    told = [n for n in done.plan.notes if "dtype" in n]
    (words,) = (*done.plan.lossy, *told)
    assert f"to {dtype}" in words and ("widened" in words) == bool(told) == (dtype == "F32")
    parity = ("parity",) if (variant, dtype) == ("qwen3-0.6b", "BF16") else ()
    levels = ("coverage", "bits", *parity)
    report = verify(tmp_path / "out", mixed(variant), settings=chosen.settings, levels=levels)
    assert texts(report) == [] and report.exactness == "identical after cast"
    assert done.outcome.manifest["options"]["dtype"] == dtype


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_case_of_norms_in_float32(family: str, tmp_path: Path) -> None:
    source = case("norms_in_float32") / family
    for dtype in (None, "F32", "BF16"):
        out = tmp_path / str(dtype)
        api.convert(source, out, family=family, options=Options(dtype=dtype))
        tensors = load_file(out / "model.safetensors")
        if dtype is None:
            assert {n for n, x in tensors.items() if x.dtype is torch.float32} == {
                n for n in tensors if "norm" in n
            }
            assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert texts(verify(out, source, levels=("coverage", "bits", "parity"))) == []
    if family == "llama":
        wanted = load_file(source.parent / "expected_llama_float32.safetensors")
        found = load_file(tmp_path / "F32" / "model.safetensors")
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], x) for n, x in found.items())


# Name of a tensor in the original, and what becomes of it.
ALONE = {
    "router": ("mixtral-a", "layers.1.feed_forward.gate.weight", torch.float32),
    "head": ("mistral-7b-v0.3", "output.weight", torch.float32),
    "float16 among bfloat16": ("llama-2-7b", "layers.0.feed_forward.w1.weight", torch.float16),
    "a bias": ("qwen2-window", "model.layers.0.self_attn.q_proj.bias", torch.float32),
}


@pytest.mark.parametrize("kind", ALONE)
def test_one_tensor_of_another_dtype_keeps_it(kind: str, originals: Written, tmp_path: Path) -> None:
    variant, name, dtype = ALONE[kind]
    chosen = VARIANTS[variant]
    source = rewritten(originals(variant), tmp_path / "source", lambda n, x: x.to(dtype) if n == name else x)
    options = Options(settings=chosen.settings)
    done = api.convert(source, tmp_path / "out", family=chosen.family, options=options)
    assert any("; loaded in float32, no value is rounded" in n for n in done.plan.notes)
    assert (
        texts(verify(tmp_path / "out", source, settings=chosen.settings, levels=("coverage", "bits"))) == []
    )


def loaded_and_saved(folder: Path, out: Path) -> Path:
    """As transformers does it, which loads all in the dtype of the config."""
    shutil.copytree(folder, out)
    (out / "ckpt-tool.json").unlink()
    for file in out.glob("*.safetensors"):
        whole = {n: x.to(torch.bfloat16) for n, x in load_file(file).items()}
        save_file(whole, file, metadata={"format": "pt"})
    return out


def test_norms_that_a_loader_rounded_are_a_cast_that_nobody_recorded(mixed: Written, tmp_path: Path) -> None:
    variant = "mistral-7b-v0.3"
    api.convert(mixed(variant), tmp_path / "out", family="mistral")
    again = loaded_and_saved(tmp_path / "out", tmp_path / "again")
    report = verify(again, mixed(variant), levels=("coverage", "bits"))
    assert report.exit_code == 1
    (told,) = texts(report)
    count = len(load_file(again / "model.safetensors"))
    layers = VARIANTS[variant].true_config["num_hidden_layers"]
    assert f"{2 * layers + 1} of {count} floating tensors are cast to bfloat16" in told
    report = verify(again, mixed(variant), levels=("coverage", "bits"), accept=["cast-to-bfloat16"])
    assert report.exit_code == 0 and report.exactness == "identical after cast"


@pytest.mark.usefixtures("few_prompts")
def test_heads_are_pooled_of_tensors_that_keep_a_wider_dtype(originals: Written, tmp_path: Path) -> None:
    wide = ("attention.wk.weight", "norm.weight")
    source = rewritten(
        originals("llama-2-7b"),
        tmp_path / "source",
        lambda n, x: x.float() * WIDER if n.endswith(wide) else x,
    )
    done = api.convert(source, tmp_path / "out", family="llama", options=Options(gqa=2))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype is torch.float32
    assert tensors["model.layers.0.self_attn.v_proj.weight"].dtype is torch.bfloat16
    assert done.outcome.manifest["options"]["dtype"] is None
    report = verify(tmp_path / "out", source, levels=("coverage", "bits", "parity"))
    assert texts(report) == [] and report.exactness == "identical after cast"


# Parts of what becomes one tensor on the way back: variant, options, part.
JOINED = {
    "stacked experts": ("mixtral-a", {"form": "B"}, "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
    "metaseq": ("opt-13b", {}, "model.decoder.layers.0.self_attn.k_proj.weight"),
    "megatron": ("bert-v2-tp2", {}, "bert.encoder.layer.0.attention.self.key.weight"),
}


@pytest.mark.parametrize("kind", JOINED)
def test_parts_of_one_tensor_must_agree(kind: str, conversions: Written, tmp_path: Path) -> None:
    variant, asked, name = JOINED[kind]
    family = VARIANTS[variant].family
    source = rewritten(
        conversions(variant), tmp_path / "source", lambda n, x: x.float() * WIDER if n == name else x
    )
    with pytest.raises(CkptToolError) as caught:
        api.plan(source, family=family, to="original", options=Options(family_options=asked))
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("dtype-mismatch", name)
    assert problem.hint is not None and problem.hint.startswith("--dtype float32 ")
    options = Options(family_options=asked, dtype="F32")
    done = api.convert(source, tmp_path / "back", family=family, to="original", options=options, check=False)
    assert not done.plan.lossy and any("which loses no value" in n for n in done.plan.notes)
    report = verify(tmp_path / "back", source, levels=("coverage", "bits"))
    assert texts(report) == [] and report.exactness == "identical after cast"


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda n, x: change(x) if n == "output.weight" else x


def test_a_tied_head_in_a_wider_dtype_is_compared_as_it_is(originals: Written, tmp_path: Path) -> None:
    """Widened the embedding must be the head, bit for bit: rounding it there would hide a difference."""
    variant = "llama-3.2-1b"
    options = Options(settings=VARIANTS[variant].settings)
    same = rewritten(originals(variant), tmp_path / "same", with_head(lambda x: x.float()))
    done = api.convert(same, tmp_path / "out", family="llama", options=options)
    assert done.outcome.manifest["options"]["dtype"] is None
    report = verify(tmp_path / "out", same, settings=options.settings, levels=("coverage", "bits"))
    assert texts(report) == [] and report.exactness == "bit-identical"
    other = rewritten(originals(variant), tmp_path / "other", with_head(lambda x: x.float() * WIDER))
    with pytest.raises(CkptToolError) as caught:
        api.convert(other, tmp_path / "wrong", family="llama", options=options)
    assert caught.value.kind == "tied-mismatch"
    narrow = Options(settings=options.settings, dtype="BF16")
    api.convert(other, tmp_path / "cast", family="llama", options=narrow)
    report = verify(tmp_path / "cast", other, settings=options.settings, levels=("coverage", "bits"))
    assert texts(report) == [] and report.exactness == "identical after cast"


def test_a_rank_of_another_dtype_than_its_peers_is_refused(originals: Written, tmp_path: Path) -> None:
    source = shutil.copytree(originals("llama-3-70b"), tmp_path / "source")
    file = sorted(source.rglob("consolidated.*.pth"))[1]
    held = torch.load(file, weights_only=True)
    name = "layers.0.attention.wq.weight"
    torch.save({**held, name: held[name].float()}, file)
    with pytest.raises(CkptToolError) as caught:
        api.plan(source, family="llama", options=Options(settings=VARIANTS["llama-3-70b"].settings))
    assert (caught.value.kind, caught.value.problems[0].where) == ("shard-conflict", name)


@pytest.mark.parametrize("said", ["auto", "bf17", 3, "int8"])
def test_a_dtype_that_no_model_is_loaded_in_becomes_that_of_the_tensors(
    said: object, conversions: Written, tmp_path: Path
) -> None:
    """transformers 4.57.6 and 5.24.0 raise on the first two: there is no torch.auto."""
    given = Path(shutil.copytree(conversions("llama-3-8b"), tmp_path / "in"))
    (given / "ckpt-tool.json").unlink()
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(config | {"torch_dtype": said}))
    made = api.convert(given, tmp_path / "out")
    own = f"{config['torch_dtype']} is written (dtype of the tensors)"
    note = f"torch_dtype: {json.dumps(said)} is nothing that a model is loaded by; {own}"
    assert note in made.plan.notes and made.report is not None and made.report.status == "pass"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert api.verify(tmp_path / "out", given, levels=("coverage", "bits")).status == "pass"
    for kept in (config["torch_dtype"], f"torch.{config['torch_dtype']}", "float32", None):
        (given / "config.json").write_text(json.dumps(config | {"torch_dtype": kept}))
        assert "torch_dtype" not in " ".join(api.plan(given).notes)


@pytest.mark.parametrize("said", ["half", "torch.float", "double"])
def test_torchs_other_names_of_a_dtype_are_kept(said: str, conversions: Written, tmp_path: Path) -> None:
    """transformers 4.57.6 and 5.24.0 cast to what they name."""
    given = Path(shutil.copytree(conversions("llama-3-8b"), tmp_path / "in"))
    (given / "ckpt-tool.json").unlink()
    config = json.loads((given / "config.json").read_text()) | {"torch_dtype": said}
    (given / "config.json").write_text(json.dumps(config))
    made = api.convert(given, tmp_path / "out")
    assert made.report is not None and made.report.status == "pass"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert api.verify(tmp_path / "out", given, levels=("coverage", "bits")).status == "pass"


@pytest.mark.parametrize("said", ["lama", None])
def test_a_model_type_of_no_class_becomes_that_of_the_class(
    said: str | None, conversions: Written, tmp_path: Path
) -> None:
    """AutoConfig of transformers 4.57.6 and 5.24.0 knows neither."""
    given = Path(shutil.copytree(conversions("llama-3-8b"), tmp_path / "in"))
    (given / "ckpt-tool.json").unlink()
    config = json.loads((given / "config.json").read_text())
    changed = {k: v for k, v in (config | {"model_type": said}).items() if v is not None or k != "model_type"}
    (given / "config.json").write_text(json.dumps(changed))
    made = api.convert(given, tmp_path / "out")
    text = f"model_type: {json.dumps(said)} is nothing that a model is loaded by"
    assert f"{text}; llama is written (config.json: architectures)" in made.plan.notes
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert api.verify(tmp_path / "out", given, levels=("coverage", "bits")).status == "pass"


# --- experts stacked as in memory -----------------------------------------------------------------------

MOE = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.(?:gate|experts\.(\d+)\.(w\d))\.weight")


def in_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers 5.23.0 has in memory of a Mixtral, and state_dict() therefore gives."""
    made = {n: x for n, x in tensors.items() if not MOE.fullmatch(n)}
    experts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name, x in tensors.items():
        if found := MOE.fullmatch(name):
            if found[2] is None:
                made[f"{found[1]}mlp.gate.weight"] = x
            else:
                experts.setdefault((found[1], found[3]), {})[int(found[2])] = x
    stack = {key: torch.stack([each[e] for e in sorted(each)]) for key, each in experts.items()}
    for p in {p for p, _ in stack}:
        made[f"{p}mlp.experts.gate_up_proj"] = torch.cat([stack[p, "w1"], stack[p, "w3"]], dim=1)
        made[f"{p}mlp.experts.down_proj"] = stack[p, "w2"].clone()
    return made


def stacked(folder: Path, out: Path, change: Any = in_memory, *, binary: bool = False) -> Path:
    """The folder as save_pretrained(save_original_format=False) writes it, or torch.save() of its state."""
    shutil.copytree(folder, out)
    (out / "ckpt-tool.json").unlink()
    tensors = change(load_file(out / "model.safetensors"))
    if binary:
        (out / "model.safetensors").unlink()
        torch.save(tensors, out / "pytorch_model.bin")
    else:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(("variant", "form"), [("mixtral-c", "A"), ("mixtral-c", "B"), ("mixtral-c", "C")])
def test_stacked_experts_go_back_to_the_same_files(
    variant: str, form: str, conversions: Written, tmp_path: Path
) -> None:
    fused = stacked(conversions(variant), tmp_path / "fused", binary=form == "B")
    options = Options(family_options={"form": form})
    (tmp_path / "one").mkdir()
    for source, out in ((conversions(variant), tmp_path / "one" / "out"), (fused, tmp_path / "out")):
        done = api.convert(source, out, to="original", options=options, check=False)
    assert done.plan.notes[0] == "experts are stacked as transformers 5 holds them in memory: read one by one"
    assert held(tmp_path / "out", "original") == held(tmp_path / "one" / "out", "original")
    levels = ("coverage", "bits", "parity") if form == "A" else ("coverage", "bits")
    report = verify(tmp_path / "out", levels=levels)  # finds the source by itself
    assert texts(report) == [] and report.exactness == "bit-identical"


@pytest.mark.usefixtures("few_prompts")
def test_a_stacked_folder_is_verified_like_any(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    fused = stacked(conversions("mixtral-c"), tmp_path / "fused")
    report = verify(fused, originals("mixtral-c"), levels=("coverage", "bits", "parity"))
    assert texts(report) == [] and report.exactness == "bit-identical" and report.exit_code == 0
    assert [f for f in report.findings if f.status == "note" and "stacked as transformers 5" in f.message]

    def exchanged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = in_memory(tensors)
        name = "model.layers.1.mlp.experts.gate_up_proj"
        return {**made, name: made[name].roll(made[name].shape[1] // 2, dims=1)}

    wrong = stacked(conversions("mixtral-c"), tmp_path / "wrong", exchanged)
    report = verify(wrong, originals("mixtral-c"), levels=("coverage", "bits", "parity"))
    assert report.exit_code == 1
    assert {f.level for f in report.findings if f.status == "fail"} == {"bits", "parity"}


def test_what_is_held_of_stacked_experts_is_counted_once_and_given_back(
    originals: Written, conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks and what was taken out of them come out of one room; also where they are let go of."""
    monkeypatch.setattr(holding, "SMALL", 1)
    shared = holding.Room(10**9)
    with opened(stacked(conversions("mixtral-c"), tmp_path / "fused"), originals("mixtral-c"), {}) as subject:
        weights = converted_side(subject, torch.float32, "cpu").weights[0]
        weights.within(10**9, shared)
        with weights.keep():
            sizes = []
            for _ in range(2):
                assert all(weights[n].isfinite().all() for n in weights)
                sizes.append(shared.held)
                weights.let_go()
                assert shared.held == weights.room.held == 0
            assert sizes[0] == sizes[1] > 0 and len(weights["lm_head.weight"]) > 0 < shared.held
        assert shared.held == 0


@pytest.mark.usefixtures("few_prompts")
def test_a_reading_takes_stacked_experts_apart_by_its_own_code(
    conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the converter wrong about the order, the bits would agree with themselves: parity tells."""
    fused = stacked(conversions("mixtral-c"), tmp_path / "fused")
    name = "model.layers.{i}.mlp.experts.gate_up_proj"
    monkeypatch.setitem(mixtral.IN_MEMORY, name, mixtral.IN_MEMORY[name][::-1])
    api.convert(fused, tmp_path / "out", to="original")
    report = verify(tmp_path / "out", fused, levels=("bits", "parity"))
    assert {f.level for f in report.findings if f.status == "fail"} == {"parity"}


def test_the_case_of_stacked_experts(tmp_path: Path) -> None:
    folder = case("mixtral-fused-experts-transformers5")
    for name in ("fused", "per-expert"):
        api.convert(folder / name, tmp_path / name, family="mixtral", to="original")
    assert held(tmp_path / "fused", "original") == held(tmp_path / "per-expert", "original")
    length = {"max_position_embeddings": 2048}  # which no original of it says
    report = verify(folder / "fused", tmp_path / "per-expert", levels=("coverage", "bits"), settings=length)
    assert texts(report) == [] and report.exactness == "bit-identical"


def one_layer_apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = {n: x for n, x in tensors.items() if n.startswith("model.layers.0.")}
    return {**in_memory({n: x for n, x in tensors.items() if n not in first}), **first}


def odd_halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = in_memory(tensors)
    return {n: x[:, 1:].clone() if n.endswith("gate_up_proj") else x for n, x in made.items()}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (one_layer_apart, "unsupported", "expected experts stacked in every layer or in none, found "),
        (odd_halves, "shape-mismatch", "mlp.experts.gate_up_proj"),
    ],
)
def test_what_is_stacked_in_part_is_refused(
    change: Any, kind: str, words: str, conversions: Written, tmp_path: Path
) -> None:
    source = stacked(conversions("mixtral-c"), tmp_path / "source", change)
    with pytest.raises(CkptToolError) as caught:
        api.plan(source, to="original")
    assert caught.value.kind == kind and words in caught.value.text()
    with pytest.raises(CkptToolError):
        verify(source, no_source=True, levels=("coverage",))


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Projections as vLLM holds them."""
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    made = dict(tensors)
    for one, several in parts.items():
        for name in [n for n in tensors if f".{several[0]}." in n]:
            all_of = [made.pop(name.replace(several[0], other)) for other in several]
            made[name.replace(several[0], one)] = torch.cat(all_of)
    return made


@pytest.mark.parametrize("variant", ["mistral-7b-v0.3", "llama-2-7b", "qwen2-window", "qwen3-0.6b"])
@pytest.mark.parametrize("to", ["hf", "original"])
def test_projections_that_a_server_joined_are_refused_in_a_line(
    variant: str, to: str, conversions: Written, tmp_path: Path
) -> None:
    source = stacked(conversions(variant), tmp_path / "source", joined)
    with pytest.raises(CkptToolError) as caught:
        api.plan(source, family=VARIANTS[variant].family, to=to)
    assert [p.kind for p in caught.value.problems] == ["unsupported", "unsupported"]
    assert "expected q_proj, k_proj and v_proj as tensors of their own" in caught.value.text()


# --- publishers' sums, and one shard under two numbers --------------------------------------------------


def sums(folder: Path, *names: str, line: str = "{md5}  {name}\n") -> str:
    digests = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in names}
    return "".join(line.format(md5=md5, name=n) for n, md5 in digests.items())


def told(folder: Path, **asked: Any) -> list[str]:
    """The notes of inspecting it that speak of a list."""
    return [n for n in inspect(folder, **asked).notes if ".chk" in n]


def test_the_case_of_a_checklist_that_says_otherwise(tmp_path: Path) -> None:
    folder = case("checklist_says_otherwise")
    for name, file in (("intact", ""), ("edited", "params.json"), ("other_weights", "consolidated.00.pth")):
        done = api.convert(folder / name, tmp_path / name, family="llama")
        notes = [n for n in done.plan.notes if ".chk" in n]
        assert notes == told(folder / name) and notes == done.outcome.manifest["notes"][: len(notes)]
        assert notes[-1] == f"checklist.chk: {1 if file else 2} of 2 sums agree"
        if file:
            listed = re.search(rf"(\w+)  {re.escape(file)}", (folder / name / "checklist.chk").read_text())
            found = hashlib.md5((folder / name / file).read_bytes()).hexdigest()
            assert listed is not None
            assert notes[0] == f"{file} has md5 {found}, checklist.chk lists {listed[1]}"


@pytest.mark.parametrize("variant", ["mistral-7b-v0.3", "llama-3-70b", "qwen3-0.6b", "opt-13b"])
def test_a_checklist_beside_any_model_is_compared(variant: str, originals: Written, tmp_path: Path) -> None:
    source = shutil.copytree(originals(variant), tmp_path / "source")
    with open_checkpoint(source) as opened:
        names = [*opened.files, *(n for n in opened.documents if not n.endswith(".chk"))]
    (source / "checklist.chk").write_text(sums(source, *names))
    assert told(source) == [f"checklist.chk: {len(names)} of {len(names)} sums agree"]
    options = Options(settings=VARIANTS[variant].settings)
    plan = api.plan(source, family=VARIANTS[variant].family, options=options)
    assert plan.notes[0] == f"checklist.chk: {len(names)} of {len(names)} sums agree"


def test_large_weights_are_compared_when_it_is_asked_for(
    originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(originals("llama-2-7b"), tmp_path / "source")
    lines = sums(source, "params.json") + f"{'0' * 32}  consolidated.00.pth\n"
    (source / "checklist.chk").write_text(lines)
    monkeypatch.setattr(checklist, "SMALL", 1000)
    cost = "those of 1 weight file not compared (0.0 GB, about 0 s): --checksums does"
    assert told(source) == [f"checklist.chk: 1 of 1 sums agree; {cost}"]
    run = CliRunner().invoke(cli, ["inspect", str(source), "--checksums"])
    assert run.exit_code == 0 and f"lists {'0' * 32}" in " ".join(run.output.split())
    seen: list[Any] = []
    done = api.convert(
        source, tmp_path / "out", family="llama", checksums=True, progress=seen.append, check=False
    )
    assert done.plan.notes[0].startswith("consolidated.00.pth has md5 ")
    assert done.plan.notes[1] == "checklist.chk: 1 of 2 sums agree"
    assert any(p.stage == "check" and p.file == "consolidated.00.pth" and p.bytes_done for p in seen)


ODD_LISTS = {
    "Windows": ("{md5}  {name}\r\n", 2),
    "binary mode": ("{md5} *{name}\n", 2),
    "here": ("{md5}  ./{name}\n", 2),
    "BSD": ("MD5 ({name}) = {md5}\n", 2),
    "openssl": ("MD5({name})= {md5}\n", 2),
    "capitals": ("{md5}  {name}\n", 2),
    "from above": ("{md5}  source/{name}\n", 2),
    "elsewhere": ("{md5}  ../source/{name}\n", 0),
    "absolute": ("{md5}  /{name}\n", 0),
    "no sums": ("{name} is fine\n", 0),
}


@pytest.mark.parametrize("kind", ODD_LISTS)
def test_lists_as_they_are_found(kind: str, originals: Written, tmp_path: Path) -> None:
    source = shutil.copytree(originals("llama-2-7b"), tmp_path / "source")
    line, count = ODD_LISTS[kind]
    text = sums(source, "params.json", "consolidated.00.pth", line=line)
    text = text.upper().replace("PARAMS.JSON", "params.json") if kind == "capitals" else text
    text = text.replace("CONSOLIDATED.00.PTH", "consolidated.00.pth")
    (source / "checklist.chk").write_bytes(text.encode())
    assert told(source) == [f"checklist.chk: {count} of {count} sums agree"] * bool(count)


def test_the_sum_of_a_tokenizer_above_the_weights(originals: Written, tmp_path: Path) -> None:
    """Llama 1 and 2 have tokenizer.model and tokenizer_checklist.chk beside the folders of the weights."""
    source = Path(shutil.copytree(originals("llama-2-7b").parent, tmp_path / "all"))
    right = "tokenizer_checklist.chk: 1 of 1 sums agree"
    assert right in told(source / "llama-2-7b")
    (source / "tokenizer_checklist.chk").write_text(f"{'0' * 32}  tokenizer.model\n")
    notes = told(source / "llama-2-7b")
    assert any(n.startswith("tokenizer.model has md5 ") for n in notes) and right not in notes


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_windows_that_lists_itself(encoding: str, originals: Written, tmp_path: Path) -> None:
    source = shutil.copytree(originals("llama-2-7b"), tmp_path / "source")
    text = sums(source, "params.json", "consolidated.00.pth") + f"{'0' * 32}  checklist.chk\n"
    (source / "checklist.chk").write_bytes(text.encode(encoding))
    assert told(source) == ["checklist.chk: 2 of 2 sums agree"]


@pytest.mark.parametrize("data", [b"", b"\xff" * 5000, b"0" * (2 << 20), b"a" * 32 + b"  \0\n"])
def test_a_list_that_is_none_is_ignored(data: bytes, originals: Written, tmp_path: Path) -> None:
    source = shutil.copytree(originals("mistral-7b-v0.3"), tmp_path / "source")
    (source / "checklist.chk").write_bytes(data)
    api.convert(source, tmp_path / "out", family="mistral")
    assert told(source) == []


@pytest.mark.parametrize(
    "variant", ["llama-3-70b", "llama-2-70b", "opt-13b", "bert-v2-tp2", "gpt2-core-tp2", "qwen2-mcore"]
)
def test_one_shard_under_two_numbers_is_a_conflict(variant: str, originals: Written, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    source = shutil.copytree(originals(variant), tmp_path / "source")
    with open_checkpoint(source, prefer="original") as opened:
        first, second = [opened.files[n].path for n in sorted(opened.files)[:2]]
    shutil.copy(first, second)
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "out", family=chosen.family, options=Options(settings=chosen.settings))
    assert [p.kind for p in caught.value.problems] == ["shard-conflict"]
    assert "found the same bytes in all" in caught.value.text() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_pipeline_stage_under_two_numbers_is_a_conflict(ranks: int, tmp_path: Path) -> None:
    """Stages number their layers from 0, so that neither names nor counts tell."""
    made = WIDE.at("core-fused", flags={"swiglu": False}, stages=4, ranks=ranks, home="iter_0000100")
    source = made.write(tmp_path / "source", "stages")
    options = Options(settings=VARIANTS["gpt2-core-pp2"].settings)
    assert api.convert(source, tmp_path / "out", family="megatron-gpt2", options=options).outcome.manifest
    for rank in range(ranks):
        there = source / f"iter_0000100/mp_rank_{rank:02d}_001"
        shutil.copy(there / FILE, there.with_name(f"mp_rank_{rank:02d}_002") / FILE)
    with pytest.raises(CkptToolError, match="mp_rank_00_002.*expected other layers than in") as caught:
        api.convert(source, tmp_path / "twice", family="megatron-gpt2", options=options)
    assert [p.kind for p in caught.value.problems] == ["shard-conflict"] * ranks
    assert not (tmp_path / "twice").exists()


def test_ranks_of_zeros_are_no_conflict(originals: Written, tmp_path: Path) -> None:
    source = rewritten(originals("llama-2-70b"), tmp_path / "source", lambda n, x: torch.zeros_like(x))
    done = api.convert(source, tmp_path / "out", family="llama", check=False)
    assert {f.kind for f in done.outcome.findings} == {"all-zero"}
