"""Every family that is written as Megatron-Core checkpoints, in every layout and over every number of ranks
that its options allow: written, converted back, proved. One row each.

    python benchmarks/sweep.py --parallel 1 2 --json sweep.json [--only qwen3] [--no-judge]

bits          each tensor of the conversion against the checkpoint that was written
NMSE          logits of the two readings, the worst prompt; then against transformers
there, back   the model that the checkpoint was written of, byte for byte
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from ckpt_tool import api
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.table import compare, level_status, worst

FORMS = ("mcore", "torch_dist")
AXES = ("tensor_parallel", "pipeline_parallel", "expert_parallel")


@dataclass(frozen=True)
class Row:
    """As in `ckpt_tool.table`; `asked` are the ranks of each kind, or "-" where the layout has none."""

    family: str
    variant: str
    form: str
    asked: tuple[str, ...]
    bits: str
    parity: float | None
    judge: float | None
    there_and_back: str
    verdict: str

    def __str__(self) -> str:
        nmse = [f"{x:.1e}" if x is not None else "-" for x in (self.parity, self.judge)]
        ranks = "/".join(self.asked)
        cells = (
            self.family,
            self.variant,
            self.form,
            ranks,
            self.bits,
            *nmse,
            self.there_and_back,
            self.verdict,
        )
        widths = (8, 17, 10, 9, 7, 8, 8, 14, 0)
        return " ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()


def combinations(name: str, parallel: Sequence[int]) -> Iterator[tuple[str, dict[str, int]]]:
    """The layouts of a family, and the numbers of ranks of each kind that it can be asked for."""
    options = {o.name: o for o in family(name).options}
    forms = [f for f in FORMS if "form" in options and f in (options["form"].choices or ())]
    for form in forms:
        axes = [a for a in AXES if a in options and form == "mcore"]
        for counts in product(parallel, repeat=len(axes)):
            yield form, dict(zip(axes, counts, strict=True))


def row(name: str, variant: str, form: str, asked: dict[str, int], there: Path, judge: bool) -> Row:
    """`there` is the converted model to write."""
    with tempfile.TemporaryDirectory(prefix="ckpt-tool-sweep-") as scratch:
        made, again = Path(scratch) / "made", Path(scratch) / "again"
        shown = tuple(str(asked.get(a, "-")) for a in AXES)
        try:
            written = Options(family_options={"form": form, **asked})
            api.convert(there, made, family=name, to="original", options=written, check=False)
            api.convert(made, again, family=name, check=False)
            report = api.verify(again, made, against="transformers" if judge else None)
        except CkptToolError as error:
            return Row(
                name, variant, form, shown, "-", None, None, "-", f"error: {error.problems[0].message}"
            )
        with api.open_for(there, "original") as a, api.open_for(again, "original") as b:
            unlike = compare(a, b)
        return Row(
            name,
            variant,
            form,
            shown,
            level_status(report, "bits"),
            worst(report, "parity"),
            worst(report, "transformers"),
            unlike[0] if unlike else "equal",
            "FAIL" if unlike else report.status,
        )


def rows(only: Sequence[str], parallel: Sequence[int], judge: bool) -> Iterator[Row]:
    for name in only or FAMILIES:
        known = list(combinations(name, parallel))
        for variant in (v for v in VARIANTS.values() if v.family == name and known):
            with tempfile.TemporaryDirectory(prefix="ckpt-tool-sweep-") as scratch:
                source, there = variant.write(Path(scratch) / "original"), Path(scratch) / "there"
                api.convert(
                    source, there, family=name, options=Options(settings=variant.settings), check=False
                )
                for form, asked in known:
                    yield row(name, variant.id, form, asked, there, judge)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=[])
    parser.add_argument("--parallel", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--no-judge", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    heads = Row(
        "family", "variant", "layout", ("TP", "PP", "EP"), "bits", None, None, "there, back", "verdict"
    )
    print(str(heads).replace("-        -       ", "NMSE     judge   "), flush=True)
    made = []
    for each in rows(given.only, given.parallel, not given.no_judge):
        print(each, flush=True)
        made.append(each)
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in made], indent=2))
    return 1 if any(r.verdict == "FAIL" for r in made) else 0


if __name__ == "__main__":
    raise SystemExit(main())
