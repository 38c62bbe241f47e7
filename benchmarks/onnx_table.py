"""Families as ONNX graphs: which export, without and with past keys and values, and with which heads, how far
onnxruntime is from the original's reading in float64 and float32, and how many planted mistakes are caught.

    python benchmarks/onnx_table.py [VARIANT ...]            # its own class, without and with past
    python benchmarks/onnx_table.py --heads [VARIANT ...]    # every other head that its class may have

Heads have random weights, made by transformers (MEGA's, of which release 5 has no class, by name).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api, reference
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference.hf_heads import kind_of
from ckpt_tool.verify.onnx_made import Asked, export_onnx
from ckpt_tool.verify.onnx_names import TASKS
from ckpt_tool.verify.report import Report

# The first variant of every family, and those with something of their own.
MORE = ("llama-3.1-8b", "opt-350m", "gpt-neox-tied", "mobilebert-squad", "mega-decoder", "mega-chunks")
ROW = "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |"
COLUMNS = ("family", "variant", "task", "past", "d f64", "d f32", "bar (NMSE)", "within", "caught", "s")
LABELS = 3


def main(names: list[str]) -> None:
    heads = "--heads" in names
    names = [name for name in names if not name.startswith("--")]
    first = {v.family: v.id for v in reversed(VARIANTS.values())}
    print(ROW.format(*COLUMNS), ROW.format(*["---"] * len(COLUMNS)), sep="\n")
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or [*first.values(), *(() if heads else MORE)]:
            (_heads if heads else _variant)(name, Path(scratch) / name)
            shutil.rmtree(Path(scratch) / name)


def _variant(name: str, scratch: Path) -> None:
    variant = VARIANTS[name]
    source, out = variant.write(scratch / "in"), scratch / "out"
    api.convert(source, out, family=variant.family, options=api.Options(settings=variant.settings))
    for with_past in (False, True):
        _row(variant.family, name, out, Asked(with_past=with_past, overwrite=True), source, variant.settings)


def _heads(name: str, scratch: Path) -> None:
    variant = VARIANTS[name]
    source, out = variant.write(scratch / "in"), scratch / "out"
    options = api.Options(settings=variant.settings)
    api.convert(source, out, family=variant.family, options=options)
    if "quantization_config" in json.loads((out / "config.json").read_text()):  # the library saves no scales
        out, options = scratch / "numbers", replace(options, dequantize="float32")
        api.convert(source, out, family=variant.family, options=options)
    (own, *_) = json.loads((out / "config.json").read_text())["architectures"]
    kinds = {task.kind for task in TASKS.values()} - {"base_model", kind_of({"architectures": [own]})}
    for architecture in reference.converted(own).ARCHITECTURES:
        if kind_of({"architectures": [architecture]}) in kinds:
            folder = scratch / architecture
            try:
                _with_head(out, architecture, folder)
            except (AttributeError, ValueError, RuntimeError) as error:
                print(
                    f"| {variant.family} | {architecture} | not made: {' '.join(str(error).split())[:120]} |"
                )
                continue
            _row(variant.family, architecture, folder, Asked(overwrite=True), None, {})
            shutil.rmtree(folder)


def _with_head(folder: Path, architecture: str, out: Path) -> None:
    """The model of `folder` below a random head."""
    import transformers

    torch.manual_seed(4)
    if reference.converted(architecture).__name__.endswith("hf_mega"):  # which release 5 does not have
        return _mega(folder, architecture, out)
    labels = {} if architecture.endswith(("QuestionAnswering", "MultipleChoice")) else {"num_labels": LABELS}
    transformers.utils.logging.set_verbosity_error()
    made = getattr(transformers, architecture)
    model, told = made.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **labels)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in told["missing_keys"]:
                p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    model.save_pretrained(out)


def _mega(folder: Path, architecture: str, out: Path) -> None:
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if name.startswith("mega.")}
    width, kind = config["hidden_size"], kind_of({"architectures": [architecture]})
    one = "classifier.out_proj" if kind == "sequence_classification" else "classifier"
    one = "qa_outputs" if kind == "question_answering" else one
    one = "lm_head" if kind == "causal_lm" else one
    sizes = {"question_answering": 2, "multiple_choice": 1, "causal_lm": config["vocab_size"]}
    shapes = {one: sizes.get(kind, LABELS)}
    if kind == "sequence_classification":
        shapes["classifier.dense"] = width
    if kind == "multiple_choice":
        shapes["mega.pooler.dense"] = width
    for name, rows in shapes.items():
        tensors |= {f"{name}.weight": torch.randn(rows, width) * 0.2, f"{name}.bias": torch.randn(rows) * 0.2}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))


def _row(
    family: str, name: str, folder: Path, asked: Asked, source: Path | None, settings: dict[str, object]
) -> None:
    began = time.process_time()
    past = "yes" if asked.with_past else "no"
    try:
        made = folder.parent / "model.onnx"
        report = export_onnx(folder, made, asked=asked, source=source, settings=settings)
        task, *cells = _cells(report)
        task += "" if report.status == "pass" else f" ({report.status})"
        print(ROW.format(family, name, task, past, *cells, f"{time.process_time() - began:.0f}"))
    except CkptToolError as error:
        print(f"| {family} | {name} | {past} | {error.problems[0].message[:400]} |")
    sys.stdout.flush()


def _cells(report: Report) -> list[str]:
    outputs = next(f for f in report.findings if f.check == "outputs")
    control = next((f for f in report.findings if f.check == "negative control"), None)
    data = outputs.data
    caught = "-" if control is None else f"{control.data['caught']}/{control.data['planted']}"
    exact, near = (f"{data[key]:.1e}" for key in ("max_delta", "max_delta_float32"))
    task = report.facts["graph"].partition(",")[0].partition(";")[0]
    words = f"{outputs.measured or 0:.0e} of {outputs.bar or 0:.0e}"
    return [task, exact, near, words, f"{data['within_tolerance']}/{data['results']}", caught]


if __name__ == "__main__":
    main(sys.argv[1:])
