"""Families as ONNX graphs: which export, without and with past keys and values, how far onnxruntime is from
the original's reading in float64 and float32, and how many planted mistakes are caught.

    python benchmarks/onnx_table.py [VARIANT ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.onnx_made import Asked, export_onnx
from ckpt_tool.verify.report import Report

# The first variant of every family, and those with something of their own.
MORE = ("llama-3.1-8b", "opt-350m", "gpt-neox-tied", "mobilebert-squad", "canine-tydi")
ROW = "{:<14} {:<22} {:<20} {:<4} {:>9} {:>9} {:>9} {:>8} {:>7} {:>6}"


def main(names: list[str]) -> None:
    first = {v.family: v.id for v in reversed(VARIANTS.values())}
    chosen = names or [*first.values(), *MORE]
    print(ROW.format("family", "variant", "task", "past", "d f64", "d f32", "bar", "within", "caught", "s"))
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            _variant(name, Path(scratch) / name)


def _variant(name: str, scratch: Path) -> None:
    variant = VARIANTS[name]
    source, out = variant.write(scratch / "in"), scratch / "out"
    api.convert(source, out, family=variant.family, options=api.Options(settings=variant.settings))
    for with_past in (False, True):
        began = time.monotonic()
        try:
            report = export_onnx(
                out,
                scratch / "model.onnx",
                asked=Asked(with_past=with_past, overwrite=True),
                source=source,
                settings=variant.settings,
            )
            cells = _cells(report)
        except CkptToolError as error:
            past = "past" if with_past else ""
            print(f"{variant.family:<14} {name:<22} {past}: {error.problems[0].message[:160]}")
            continue
        seconds = f"{time.monotonic() - began:.0f}"
        print(ROW.format(variant.family, name, *cells[:1], "yes" if with_past else "no", *cells[1:], seconds))


def _cells(report: Report) -> list[str]:
    outputs = next(f for f in report.findings if f.check == "outputs")
    control = next((f for f in report.findings if f.check == "negative control"), None)
    data = outputs.data
    caught = "-" if control is None else f"{control.data['caught']}/{control.data['planted']}"
    exact, near = (f"{data[key]:.1e}" for key in ("max_delta", "max_delta_float32"))
    task = report.facts["graph"].partition(",")[0].partition(";")[0]
    words = f"{outputs.measured or 0:.1e}"
    return [task, exact, near, words, f"{data['within_tolerance']}/{data['results']}", caught]


if __name__ == "__main__":
    main(sys.argv[1:])
