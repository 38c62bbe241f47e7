"""Every number format in a tiny model of every family: carried, made numbers, in several files, on 1, 2 and 4
ranks, both readings, transformers, and the way to the original layout.

    python benchmarks/number_formats.py --work FOLDER [--family qwen3 ...] [--only fp8-blocks ...]

A mark is x for what was done and proved, r for what is refused by name (--why prints the sentences), ? where
nothing can judge, and ! for a difference.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt_tool.api import convert, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import found_in
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.quantised import FORMATS, LINEAR, quantise
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.report import Report

MARKS = {"pass": "x", "fail": "!", "undecided": "?"}
BITS: dict[str, Any] = {"levels": ("coverage", "bits")}
PARITY: dict[str, Any] = {"levels": ("parity",), "mode": "quick"}


def mark(report: Report) -> str:
    return MARKS.get(report.status, "?")


def same(a: Path, b: Path) -> bool:
    """Whether both folders hold the same tensors, bit for bit."""
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        names = one.names()
        return set(names) == set(other.names()) and all(
            one.read(one.find(n)[0]).tobytes() == other.read(other.find(n)[0]).tobytes() for n in names
        )


class Row:
    """One format in one family's model; `why` are the sentences of what was refused."""

    def __init__(self, source: Path, work: Path) -> None:
        self.source, self.work, self.why = source, work, list[str]()

    def made(self, name: str, **asked: Any) -> Path:
        out = self.work / name
        convert(self.source, out, **asked)
        return out

    def carried(self) -> str:
        return mark(verify(self.made("carried"), self.source, **BITS))

    def numbers(self) -> str:
        return mark(verify(self.made("numbers", options=Options(dequantize="BF16")), self.source, **BITS))

    def files(self) -> str:
        out = self.made("files", options=Options(max_shard_bytes=40_000))
        count = len(list(out.glob("*.safetensors")))
        return "x" if same(out, self.work / "carried") and count > 1 else "!"

    def ranks(self) -> str:
        found = ""
        for count in (1, 2, 4):
            options = Options(dequantize="BF16", shards=count)
            found += self.tried(lambda n=count, o=options: self.on(n, o))  # type: ignore[misc]
        return found

    def on(self, count: int, options: Options) -> str:
        out = self.made(f"ranks{count}", to="original", options=options)
        return mark(verify(out, self.source, **BITS))

    def parity(self) -> str:
        return mark(verify(self.work / "carried", self.source, **PARITY))

    def judged(self) -> str:
        report = verify(self.work / "carried", self.source, against="transformers", **PARITY)
        self.why += [f.message for f in report.findings if f.check == "load" and f.status == "undecided"]
        return mark(report)

    def back(self) -> str:
        out = self.made("original", to="original")
        convert(out, self.work / "again", options=Options())
        return "x" if same(self.work / "again", self.work / "carried") else "!"

    def tried(self, step: Callable[[], str]) -> str:
        try:
            return step()
        except CkptToolError as error:
            self.why.append(f"{error.problems[0].kind}: {error.problems[0].message}")
            return "r"


def formats_of(folder: Path, asked: list[str]) -> list[str]:
    """Those that its matrices can be quantised in, or that it has itself."""
    with open_checkpoint(folder) as checkpoint:
        own = found_in(checkpoint)
    return [n for n in asked if has_matrices(folder, n)] if own is None else [f"own {own.words[0]}"]


def has_matrices(folder: Path, name: str) -> bool:
    """Whether rows of any matrix have a length that the format takes."""
    columns = FORMATS[name].columns
    with open_checkpoint(folder) as checkpoint:
        return any(
            LINEAR.fullmatch(t.name) and len(t.shape) == 2 and t.shape[1] % columns == 0 for t in checkpoint
        )


def written(family: str, work: Path) -> Path:
    """The family's first tiny model in the Hugging Face layout."""
    chosen = next(v for v in VARIANTS.values() if v.family == family)
    folder = work / f"{family}-hf"
    convert(
        chosen.write(work / f"{family}-original"),
        folder,
        family=family,
        options=Options(settings=chosen.settings),
    )
    return folder


HEADS = ("carried", "numbers", "files", "ranks", "parity", "judged", "back")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES))
    parser.add_argument("--only", nargs="*", default=list(FORMATS))
    parser.add_argument("--why", action="store_true", help="Print what was refused, and why.")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    print(f"{'family':14} {'format':13}", *(f"{h:>7}" for h in HEADS))
    for family in asked.family:
        folder = written(family, asked.work)
        for name in formats_of(folder, asked.only):
            work = asked.work / f"{family}-{name}"
            work.mkdir()
            row = Row(quantise(folder, work / "in", name) if name in FORMATS else folder, work)
            marks = [row.tried(getattr(row, head)) for head in HEADS]
            print(f"{family:14} {name:13}", *(f"{m:>7}" for m in marks), flush=True)
            for text in dict.fromkeys(row.why) if asked.why else ():
                print(f"    {text[:200]}")
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
