"""Casts are compared with the source cast the same way, in bits and in numbers; one that nothing records is
recognised, and passes when it is accepted by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.api import Options
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from ckpt_tool.verify.casted import cast_forward
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.subject import opened

Written = Callable[[str], Path]
Cast = Callable[[torch.Tensor], torch.Tensor]
FLOAT32 = "bert-2023-float32"
# Every dtype of a source to every other and itself, and one of each other family, rounded.
CASTS = [(v, d) for v in ("mistral-7b-v0.3", "opt-350m", FLOAT32) for d in ("BF16", "F16", "F32")] + [
    *((v, "F16") for v in ("mixtral-c", "llama-3-70b", "qwen2-window")),
    *((v, "BF16") for v in ("gpt2-v2-tp2", "codegen-2b-multi")),
]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def wrong(report: Report) -> list[tuple[str, str, str]]:
    return [(f.check, f.status, f.message) for f in report.findings if f.status in ("fail", "undecided")]


def of(report: Report, level: str, check: str) -> list[Finding]:
    return [f for f in report.level(level) if f.check == check]


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(("variant", "dtype"), CASTS)
def test_a_cast_that_was_asked_for_passes(
    variant: str, dtype: str, originals: Written, tmp_path: Path
) -> None:
    chosen = VARIANTS[variant]
    options = Options(settings=chosen.settings, dtype=dtype)
    api.convert(originals(variant), tmp_path / "out", family=chosen.family, options=options, check=False)
    report = verify(
        tmp_path / "out", originals(variant), settings=chosen.settings, levels=("coverage", "bits", "parity")
    )
    assert wrong(report) == []
    assert report.exactness in ("identical after cast", "bit-identical")
    (lockstep,) = of(report, "parity", "lockstep")
    assert lockstep.status == "pass" and lockstep.bar is not None and lockstep.bar <= 1e-10


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("variant", ["qwen2-window", "mistral-7b-v0.3"])
def test_a_cast_on_the_way_back_passes(variant: str, conversions: Written, tmp_path: Path) -> None:
    options = Options(dtype="F16")
    family = VARIANTS[variant].family
    api.convert(
        conversions(variant), tmp_path / "back", to="original", family=family, options=options, check=False
    )
    report = verify(tmp_path / "back", conversions(variant), levels=("coverage", "bits", "parity"))
    assert wrong(report) == [] and report.exactness == "identical after cast"


@pytest.mark.usefixtures("few_prompts")
def test_a_cast_of_pooled_heads_passes(originals: Written, tmp_path: Path) -> None:
    variant = VARIANTS["llama-2-7b"]
    options = Options(settings=variant.settings, dtype="F32", gqa=2)
    api.convert(originals("llama-2-7b"), tmp_path / "out", family="llama", options=options, check=False)
    report = verify(tmp_path / "out", originals("llama-2-7b"), levels=("coverage", "bits", "parity"))
    assert wrong(report) == [] and report.exactness == "identical after cast"


def test_the_source_as_cast_reads_like_the_output(originals: Written, tmp_path: Path) -> None:
    """From any byte on."""
    variant = VARIANTS[FLOAT32]
    options = Options(settings=variant.settings, dtype="BF16")
    api.convert(originals(FLOAT32), tmp_path / "out", family=variant.family, options=options, check=False)
    with opened(tmp_path / "out", originals(FLOAT32), variant.settings) as subject:
        assert subject.source is not None and subject.plan is not None
        view = cast_forward(subject.source, subject.plan)
        step = next(s for s in subject.plan.steps if "position" in s.targets[0].name)
        (source,), (target,) = step.sources, step.targets
        tensor = view.files[source.file].tensors[source.name]
        assert tensor.dtype == "BF16"
        whole = subject.output.read(subject.output.find(target.name)[0]).tobytes()
        assert view.read(tensor).tobytes() == whole
        for offset, size in ((1, 5), (2, 4), (3, 1), (0, tensor.nbytes)):
            buffer = bytearray(size)
            view.read_into(tensor, offset, memoryview(buffer))
            assert bytes(buffer) == whole[offset : offset + size]
        assert cast_forward(view, subject.plan) is view


# --- by another tool ------------------------------------------------------------------------------------


def recast(folder: Path, out: Path, cast: Cast, name: str | None = None) -> Path:
    """The folder as another tool would have written it: tensors through `cast`, config.json with the dtype,
    no manifest."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = {k: cast(x).contiguous() for k, x in load_file(file).items()}
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        elif file.name != "ckpt-tool.json":
            (out / file.name).write_bytes(file.read_bytes())
    if name is not None:
        config = json.loads((out / "config.json").read_text())
        key = "dtype" if "dtype" in config else "torch_dtype"
        (out / "config.json").write_text(json.dumps(config | {key: name}))
    return out


def checked(out: Path, source: Path, *accept: str) -> Report:
    return verify(
        out, source, settings=VARIANTS[FLOAT32].settings, levels=("coverage", "bits", "parity"), accept=accept
    )


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("norms", [True, False], ids=["all", "matrices"])
def test_a_cast_that_nothing_records_passes_when_it_is_accepted(
    name: str, norms: bool, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    to = getattr(torch, name)
    cast: Cast = lambda x: x.to(to) if norms or x.ndim > 1 else x  # noqa: E731
    out = recast(conversions(FLOAT32), tmp_path / "out", cast, name)
    report = checked(out, originals(FLOAT32))
    assert report.exit_code == 1
    assert [f.check for f in report.findings if f.status == "fail"] == ["dtype"]
    assert f"--accept cast-to-{name}" in report.headline
    report = checked(out, originals(FLOAT32), f"cast-to-{name}")
    assert wrong(report) == []
    assert (report.exit_code, report.exactness) == (0, "identical after cast")
    report = checked(out, originals(FLOAT32), "cast-to-float64")
    assert report.exit_code == 1 and of(report, "coverage", "accept")


def toward_zero(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def away_from_zero_at_ties(x: torch.Tensor) -> torch.Tensor:
    return ((x.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("cast", "words"),
    [
        (toward_zero, "rounded toward zero"),
        (lambda x: x.to(torch.float16).to(torch.bfloat16), "rounded to float16 first"),
    ],
    ids=["truncated", "by-way-of-float16"],
)
def test_another_rounding_is_not_the_cast(
    cast: Cast, words: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = recast(conversions(FLOAT32), tmp_path / "out", cast, "bfloat16")
    report = checked(out, originals(FLOAT32), "cast-to-bfloat16")
    assert report.exit_code == 1
    bits = [f for f in of(report, "bits", "round trip") if f.status == "fail"]
    assert bits and sum(words in f.message for f in bits) >= len(bits) // 2
    assert of(report, "parity", "lockstep")[0].status == "fail"


@pytest.mark.usefixtures("few_prompts")
def test_a_wider_dtype_loses_nothing_and_is_a_note(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Every value is there; config.json has to say so."""
    out = recast(conversions("qwen2-window"), tmp_path / "out", lambda x: x.float(), "float32")
    report = verify(out, originals("qwen2-window"), levels=("coverage", "bits", "parity"))
    assert wrong(report) == [] and report.exactness == "identical after cast"
    (note,) = (f for f in of(report, "coverage", "dtype") if "cast" in f.data)
    assert note.status == "note" and "holds every value" in note.message
    told = "the bits and the numbers are those of its source once they are cast (all"
    assert report.headline.startswith(told)
    assert "floating tensors to float32), which keeps every value" in report.headline


@pytest.mark.usefixtures("few_prompts")
def test_a_wrong_matrix_among_cast_ones_is_caught(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = recast(conversions(FLOAT32), tmp_path / "out", lambda x: x.bfloat16(), "bfloat16")
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("layer.1.attention.output.dense.weight"))
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    report = checked(out, originals(FLOAT32), "cast-to-bfloat16")
    assert report.exit_code == 1 and of(report, "parity", "lockstep")[0].data["first"] == "layer 1"


def test_the_source_of_these_is_float32(originals: Written) -> None:
    with open_checkpoint(originals(FLOAT32), prefer="original") as checkpoint:
        assert {t.dtype for t in checkpoint if t.name.endswith("weight")} == {"F32"}
