"""Files as the world has them: dtypes of their own, experts fused in memory, publishers' checklists."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.api import Options
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify

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
    done = api.convert(mixed(variant), tmp_path / "out", family=chosen.family, options=options)
    assert len(done.plan.lossy) == 1 and f"to {dtype}" in done.plan.lossy[0]
    assert not [n for n in done.plan.notes if "dtype" in n]
    report = verify(
        tmp_path / "out", mixed(variant), settings=chosen.settings, levels=("coverage", "bits", "parity")
    )
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
    assert done.plan.lossy
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
