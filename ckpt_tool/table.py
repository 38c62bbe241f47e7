"""`ckpt-tool table`: every tiny variant converted, verified, judged and sent both ways, one row each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.families import family
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import fail, near, printable

if TYPE_CHECKING:
    from ckpt_tool.fixtures.families import Variant
    from ckpt_tool.terminal import Screen
    from ckpt_tool.verify.report import Report

BLOCK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One variant's results. The NMSE values are the worst over all prompts, None where not measured; `why`
    says of a verdict that is no pass what it rests on."""

    family: str
    variant: str
    ranks: int
    bits: str
    parity_nmse: float | None
    judge_nmse: float | None
    round_trip: str
    verdict: str
    why: str = ""


def run(*, only: Collection[str], judge: bool, as_json: bool, screen: Screen) -> int:
    """Print the table, of the families in `only` where there are any. 0 when every row passes, 1 when a
    difference was found, 2 when a row shows neither."""
    from ckpt_tool.fixtures.variants import VARIANTS

    known = sorted({v.family for v in VARIANTS.values()})
    for name in set(only) - {*known}:
        message = f"expected one of {', '.join(known)}, found {name!r}"
        fail("usage", message, where="--only", hint=near(name, known))
    chosen = [v for v in VARIANTS.values() if not only or v.family in only]
    made = list(rows(chosen, judge, None if as_json else screen))
    if as_json:
        print(json.dumps([asdict(r) for r in made], indent=2))
    else:
        draw(made, screen)
    verdicts = {r.verdict for r in made}
    return 0 if verdicts <= {"pass"} else 1 if "FAIL" in verdicts else 2


def rows(variants: list[Variant], judge: bool, screen: Screen | None = None) -> Iterator[Row]:
    """One row after the other; a terminal is told which is being made."""
    for k, variant in enumerate(variants, start=1):
        if screen is not None and screen.is_terminal:
            screen.print(f"{k} of {len(variants)}: {variant.id}", style="dim", soft_wrap=True)
        with tempfile.TemporaryDirectory(prefix="ckpt-tool-table-") as scratch:
            yield row(variant, Path(scratch), judge)


def row(variant: Variant, scratch: Path, judge: bool) -> Row:
    """Write the variant into `scratch`, convert it, verify it, and send it back and forth once more."""
    source, out = variant.write(scratch / "original"), scratch / "converted"
    options = Options(settings=variant.settings)
    first = api.convert(source, out, family=variant.family, options=options, check=False)
    report = api.verify(out, source, settings=variant.settings, against="transformers" if judge else None)
    with api.open_for(source) as checkpoint:
        ranks = ranks_of(checkpoint)
    differences = round_trip(variant, source, scratch, (out, first))
    return Row(
        family=variant.family,
        variant=variant.id,
        ranks=ranks,
        bits=level_status(report, "bits"),
        parity_nmse=worst(report, "parity"),
        judge_nmse=worst(report, "transformers"),
        round_trip="equal" if not differences else differences[0],
        verdict="FAIL" if differences or report.status == "fail" else report.status,
        why="" if report.status == "pass" else report.headline,
    )


def level_status(report: Report, level: str) -> str:
    """`pass`, `fail`, or `skipped` where no finding of the level has an answer."""
    found = {f.status for f in report.findings if f.level == level}
    return "fail" if "fail" in found else "pass" if "pass" in found else "skipped"


def worst(report: Report, level: str) -> float | None:
    """NMSE of the logits on the worst prompt; None where the level did not measure any."""
    found = [f.measured for f in report.level(level) if f.check == "logits" and f.measured is not None]
    return max(found, default=None)


def ranks_of(checkpoint: Checkpoint) -> int:
    """Model-parallel ranks: how many files hold the first tensor."""
    first = next(iter(checkpoint))
    return len(checkpoint.find(first.name))


def round_trip(variant: Variant, source: Path, scratch: Path, made: tuple[Path, api.Conversion]) -> list[str]:
    """Original -> Hugging Face -> original and once more to Hugging Face; what differs, in words. Padding of
    the vocabulary is kept on this way, so that there is nothing to make up; dropped tensors stay dropped.
    The way there is `made`, the variant's conversion, where that one leaves no padding out."""
    (there, first), back, again = made, scratch / "back", scratch / "again"
    settings = {k: v for k, v in variant.settings.items() if k != "vocab_size"}
    own = {o.name for o in family(variant.family).options}
    padding = {"keep_padding": True} if "keep_padding" in own else {}
    options = Options(settings=settings, family_options=padding)
    if options != Options(settings=variant.settings):
        there = scratch / "there"
        first = api.convert(source, there, family=variant.family, options=options, check=False)
    with api.open_for(source) as checkpoint:
        form = {k: v for k, v in _form(checkpoint).items() if k in own}
        shape = Options(shards=ranks_of(checkpoint) if "shards" in own else 1, family_options=form)
    api.convert(there, back, family=variant.family, to="original", options=shape, check=False)
    api.convert(back, again, family=variant.family, options=options, check=False)
    dropped = {d.tensor.name for d in first.plan.dropped}
    with api.open_for(source) as a, api.open_for(back) as b:
        found = compare(a, b, but=dropped)
    with api.open_for(there, "original") as a, api.open_for(again, "original") as b:
        found += compare(a, b)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        one, two = there / name, again / name
        if one.exists() != two.exists() or (one.exists() and one.read_bytes() != two.read_bytes()):
            found.append(f"{name} differs after the round trip")
    return found


def _form(checkpoint: Checkpoint) -> dict[str, str]:
    names = checkpoint.names()
    suffix = next(iter(checkpoint.files)).rsplit(".", 1)[-1]
    chosen = {"container": "safetensors" if suffix == "safetensors" else "pth"}
    if any(".linear_qkv." in n for n in names):
        chosen = {}  # Megatron-Core, whose container is one
    elif any(".block_sparse_moe." in n for n in names):
        chosen = {"form": "B"}
    elif any(".feed_forward.experts." in f".{n}" for n in names):
        chosen = {"form": "C" if suffix == "safetensors" else "A"}
    return chosen


def compare(a: Checkpoint, b: Checkpoint, but: Container[str] = ()) -> list[str]:
    """Tensors of `a` that `b` lacks or holds with other bytes, rank by rank; those named in `but` aside."""
    found = []
    for name in dict.fromkeys((*a.names(), *b.names())):
        if name in but:
            continue
        left, right = a.find(name), b.find(name)
        if [(t.dtype, t.shape) for t in left] != [(t.dtype, t.shape) for t in right]:
            found.append(f"{name}: {len(left)} and {len(right)} tensors of other shapes or dtypes")
            continue
        for x, y in zip(left, right, strict=True):
            for offset in range(0, x.nbytes, BLOCK):
                size = min(BLOCK, x.nbytes - offset)
                one, two = bytearray(size), bytearray(size)
                a.read_into(x, offset, memoryview(one))
                b.read_into(y, offset, memoryview(two))
                if one != two:
                    found.append(f"{name}: bytes differ after the round trip")
                    break
    return found


def draw(made: list[Row], screen: Screen) -> None:
    """The rows as a table, and below it why some are no pass, those of one reason together."""
    from ckpt_tool.terminal import Column, Styled, paragraph, table

    columns = (
        Column("family", whole=True),
        Column("variant", whole=True),
        Column("ranks", right=True, spare=1),
        Column("bits", whole=True),
        Column("NMSE", right=True),
        Column("transformers", right=True),
        Column("there and back"),
        Column("verdict", whole=True),
    )
    cells: list[tuple[str | Styled, ...]] = [
        (
            r.family,
            r.variant,
            str(r.ranks),
            r.bits,
            *(f"{x:.1e}" if x is not None else "-" for x in (r.parity_nmse, r.judge_nmse)),
            r.round_trip,
            Styled(r.verdict, "green" if r.verdict == "pass" else "red"),
        )
        for r in made
    ]
    table(screen, columns, cells)
    reasons: dict[str, list[str]] = {}
    for r in made:
        if r.why:
            reasons.setdefault(r.why, []).append(f"{r.variant} {r.verdict}")
    for why, (first, *others) in reasons.items():
        more = f" (and {len(others)} more)" if others else ""
        paragraph(screen, printable(f"{first}{more}: {why}", 2000), hang=2)
