"""Every number format under every family: carried, made numbers, in several files, both readings,
transformers, the way to the original layout and back, and numbers on 1, 2 and 4 ranks.

    python benchmarks/number_formats.py [--family qwen3 ...] [--only fp8-blocks ...] [--why] [--json FILE]

Each cell is a word of letters: C carried, N numbers, F files, P parity, J judged by transformers, B back, and
the counts of ranks. A letter stands for what was done and proved; `.` is refused by name (--why prints the
sentences, and how many they are of), `?` what nothing can judge, `!` a difference, `-` what a family has not
(ranks). The exit code is 1 where there is a difference. Where the package compressed-tensors can be imported,
transformers judges its formats too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ckpt_tool.api import convert, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import found_in
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families import (
    Variant,
    canine,
    gemma2,
    gpt_neox,
    megatron_bert,
    megatron_gpt2,
    ministral3,
    mistral,
    mixtral,
    mluke,
    mobilebert,
    opt,
    qwen2,
    qwen3,
)
from ckpt_tool.fixtures.megatron import Megatron
from ckpt_tool.fixtures.quantised import FORMATS, LINEAR, Format, in_blocks, quantise
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.report import Report

MARKS = {"pass": "x", "fail": "!", "undecided": "?"}
LINEAR_ALONE = "compressed-tensors"
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
        """Numbers on 1, 2 and 4 ranks."""
        return "".join(self.tried(lambda n=count: self.on(n)) for count in (1, 2, 4))  # type: ignore[misc]

    def on(self, count: int) -> str:
        asked: list[dict[str, Any]] = [
            {"shards": count},
            {"family_options": {"tensor_parallel": count}},
            {"family_options": {"form": "mcore", "tensor_parallel": count}},
        ]
        for k, more in enumerate(asked[: 1 if count == 1 else 3]):
            try:
                out = self.made(f"ranks{count}", to="original", options=Options(dequantize="BF16", **more))
            except CkptToolError as error:  # the option is another's
                if error.problems[0].kind != "usage" or count == 1:
                    raise
                if k == len(asked) - 1:
                    return "-"
                continue
            return mark(verify(out, self.source, **BITS))
        raise AssertionError

    def parity(self) -> str:
        return self.found_at("parity")

    def judged(self) -> str:
        """What cannot be loaded there is no difference: the source cannot be either."""
        config = json.loads((self.source / "config.json").read_text())
        if config["model_type"] == "gpt2" and config["quantization_config"]["quant_method"] == LINEAR_ALONE:
            self.why.append(f"{LINEAR_ALONE} takes linear layers alone, and GPT-2's are Conv1D")
            return "?"
        found = [f for f in self.report.findings if f.level == "transformers" and f.status != "pass"]
        self.why += [f"{f.check}: {f.message}" for f in found]
        failed = {f.check for f in found if f.status == "fail"}
        unloaded = any(f.check == "load" and "cannot load" in f.message for f in found)
        return "?" if failed == {"load"} and unloaded else self.found_at("transformers")

    @cached_property
    def report(self) -> Report:
        return verify(self.work / "carried", self.source, against="transformers", **PARITY)

    def found_at(self, level: str) -> str:
        states = {f.status for f in self.report.findings if f.level == level}
        return next((MARKS[s] for s in ("fail", "undecided", "pass") if s in states), "?")

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


def formats_of(folder: Path, asked: list[str]) -> dict[str, Format | None]:
    """Those that its matrices can be quantised in, or that it has itself."""
    with open_checkpoint(folder) as checkpoint:
        own = found_in(checkpoint)
    if own is not None:
        return {"own": None}
    sizes = sizes_of(folder)
    blocks = gcd(*(r for r, _ in sizes)), gcd(*(c for _, c in sizes))
    even = {  # which transformers divides, as the block of 16 x 24 is not
        "fp8-even": in_blocks(blocks, "F32"),
        "fp8-bf16": in_blocks(blocks, "BF16"),
        "fp8-e8m0": in_blocks(blocks, "F8_E8M0"),
    }
    every = {**FORMATS, **even}
    return {n: every[n] for n in asked if any(c % every[n].columns == 0 for _, c in sizes)}


def sizes_of(folder: Path) -> list[tuple[int, int]]:
    """Of the matrices that a format can take."""
    with open_checkpoint(folder) as checkpoint:
        return [
            (t.shape[0], t.shape[1]) for t in checkpoint if LINEAR.fullmatch(t.name) and len(t.shape) == 2
        ]


def wide() -> dict[str, Variant]:
    """Tiny models whose rows every format takes, of families whose fixtures have none: two layers, so that a
    run takes little time."""
    return {
        "mixtral": mixtral._variant(
            "wide", "mixtral-8x22b-v0.1", "", mixtral.mixtral("C", 64, 2, 16, 96, 4, 2, 320, theta=1e6)
        ),
        "ministral3": ministral3._variant(
            "wide",
            "",
            ministral3.ministral3(
                64, 2, 16, 96, 4, 2, 344, theta=3e4, longest=1024, length=64, betas=(4, 1), tied=True
            ),
        ),
        "megatron-bert": megatron_bert._variant("wide", "", _even(megatron_bert.WIDE)),
        "megatron-gpt2": megatron_gpt2._variant("wide", "", _even(megatron_gpt2.WIDE), act="gelu"),
        "mobilebert": mobilebert._variant(
            "wide",
            "",
            mobilebert.mobilebert(
                num_hidden_layers=2, hidden_size=64, intra_bottleneck_size=32, intermediate_size=96
            ),
        ),
        "canine": canine._variant(
            "wide",
            "",
            canine.canine(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96),
        ),
        "mluke": mluke._variant("wide", "", mluke.mluke(2, 64, 4, 128, 184, 43, 24), heads=4),
        "mistral": mistral._variant("wide", "", mistral.mistral(64, 2, 16, 96, 4, 4, 320, theta=1e6)),
        "opt": opt._variant("wide", "", opt.opt(2, 64, 4, 96, 336, parts=2)),
        "qwen2": qwen2.qwen2(2, 64, 4, 4, 96, 320, 2).variant("wide", ""),
        "qwen3": qwen3.qwen3(2, 64, 4, 4, 16, 96, 320, 2).variant("wide", ""),
        "gpt-neox": gpt_neox.gpt_neox(2, 64, 4, 96, 320).variant("wide", ""),
        "gemma2": gemma2.gemma2(2, 64, 4, 2, 16, 96, 344, query_pre_attn_scalar=16).variant("wide", ""),
    }


def _even(m: Megatron) -> Megatron:
    age = m.at("2020-10", ranks=2, home="iter_0005000", eps=2e-4)
    return replace(age, layers=2, heads=4, head_dim=16, ffn=128)


FITTING = {  # of those in the fixtures
    "llama": "llama-3-70b",
}


def written(family: str, work: Path) -> Path:
    """A tiny model of the family in the Hugging Face layout."""
    first = next(v for v in VARIANTS.values() if v.family == family)
    chosen = wide().get(family) or VARIANTS[FITTING.get(family, first.id)]
    folder = work / f"{family}-hf"
    convert(
        chosen.write(work / f"{family}-original"),
        folder,
        family=family,
        options=Options(settings=chosen.settings),
    )
    return folder


HEADS = {"carried": "C", "numbers": "N", "files": "F", "parity": "P", "judged": "J", "back": "B"}
NAMES = (*(n for n in FORMATS if n != "fp8-powers"), "fp8-even", "fp8-bf16", "fp8-e8m0")


def cell(row: Row) -> str:
    """What a format does in a family: see above."""
    made = "".join(letter_of(letter, row.tried(getattr(row, head))) for head, letter in HEADS.items())
    return f"{made} {''.join(map(letter_of, '124', row.ranks()))}"


def letter_of(letter: str, found: str) -> str:
    return {"x": letter, "r": "."}.get(found, found)


def line_of(cells: dict[str, str]) -> tuple[str, str]:
    """What most formats do, and the others by what they do."""
    usual = Counter(cells.values()).most_common(1)[0][0]
    others = defaultdict(list)
    for name, found in cells.items():
        if found != usual:
            others[found].append(name)
    return usual, "; ".join(f"`{found}` {', '.join(names)}" for found, names in others.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="A folder for the models; else one that is removed.")
    parser.add_argument("--family", nargs="*", default=list(FAMILIES))
    parser.add_argument("--only", nargs="*", default=list(NAMES))
    parser.add_argument("--why", action="store_true", help="Print what was refused, and why.")
    parser.add_argument("--json", type=Path, help="Write every cell.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        work = asked.work or Path(own)
        work.mkdir(parents=True, exist_ok=True)
        return run(asked, Path(tempfile.mkdtemp(dir=work)))


def run(asked: argparse.Namespace, work: Path) -> int:
    table: dict[str, dict[str, str]] = {}
    why: dict[str, list[str]] = defaultdict(list)
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:  # also of what it takes itself
        print(f"{LINEAR_ALONE} does not judge its formats: {error}", file=sys.stderr)
    print("| family | formats | each | otherwise |\n| --- | --- | --- | --- |")
    for family in asked.family:
        folder = written(family, work)
        for name, form in formats_of(folder, asked.only).items():
            here = work / f"{family}-{name}"
            here.mkdir()
            row = Row(folder if form is None else quantise(folder, here / "in", form), here)
            table.setdefault(family, {})[name] = cell(row)
            for text in dict.fromkeys(row.why):
                why[text].append(f"{family} {name}")
            shutil.rmtree(here)
        usual, others = line_of(table[family])
        print(f"| `{family}` | {len(table[family])} | `{usual}` | {others} |", flush=True)
    if asked.why:
        for text, where in why.items():
            print(f"{len(where):4} {where[0]}: {text[:400]}")
    if asked.json:
        asked.json.write_text(json.dumps({"cells": table, "why": why}, indent=1) + "\n")
    return int(any("!" in c for cells in table.values() for c in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
