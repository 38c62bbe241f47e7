"""`ckpt-tool expectations list` and `show`: the documented values that the package holds."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any

from ckpt_tool.errors import fail, near
from ckpt_tool.terminal import Column, Screen, paragraph, table
from ckpt_tool.verify.expectations import Expectation, load_all, match

DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number


def listed(as_json: bool, screen: Screen) -> int:
    """Published models with how many entries there are, how many may decide, and how many need no
    tokenizer."""
    by_model: dict[tuple[str, str], list[Expectation]] = defaultdict(list)
    for e in load_all():
        by_model[e.family, e.checkpoint].append(e)
    rows = [
        {
            "checkpoint": checkpoint,
            "family": family,
            "entries": len(entries),
            "gates": sum(e.gates for e in entries),
            "offline": sum(e.offline_inputs for e in entries),
        }
        for (family, checkpoint), entries in sorted(by_model.items())
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    heads = (
        Column("published model"),
        Column("family", whole=True),
        Column("entries", right=True),
        Column("gates", right=True),
        Column("without tokenizer", right=True, spare=1),
    )
    cells = [
        (r["checkpoint"], r["family"], str(r["entries"]), str(r["gates"]), str(r["offline"])) for r in rows
    ]
    table(screen, heads, cells)  # type: ignore[arg-type]
    entries = load_all()
    weighty = [e for e in entries if e.head != "tokenizer"]
    kinds = Counter(e.expected.kind for e in weighty)
    text = (
        f"{len(entries)} entries, {sum(e.gates for e in entries)} of which may decide; "
        f"{len(entries) - len(weighty)} want a tokenizer alone, {len(weighty)} the weights: "
        f"{', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}"
    )
    paragraph(screen, text, hang=2)
    return 0


def shown(name: str, as_json: bool, screen: Screen) -> int:
    """The entries of one published model, by any of its names."""
    entries = match([name])
    if not entries:
        known = sorted({e.checkpoint for e in load_all()})
        hint = near(name, known) or "`ckpt-tool expectations list` lists the models"
        message = "expected a published model of which values are documented, found none of that name"
        fail("usage", message, file=name, where="CHECKPOINT", hint=hint)
    if as_json:
        print(json.dumps([_plain(e) for e in entries], indent=2))
        return 0
    counts = Counter(e.status for e in entries)
    words = ", ".join(f"{n} {s}" for s, n in counts.items())
    paragraph(screen, f"{len(entries)} entries: {words}", first=f"{entries[0].checkpoint}: ")
    heads = (
        Column("entry"),
        Column("value", whole=True),
        Column("of"),
        Column("status", whole=True),
        Column("needs"),
    )
    table(screen, heads, [(e.id, e.expected.kind, e.head, e.status, needs(e)) for e in entries])
    paragraph(screen, "gate: decides; secondary: shown beside what is measured; weak, invalid: not run")
    return 0


def needs(e: Expectation) -> str:
    """What must be there to run it."""
    parts = [f"{e.dtype}" if e.dtype in DTYPES else f"{e.dtype}, which is not computed here"]
    if e.device != "any":
        parts.append(e.device)
    parts.append("ids are given" if e.offline_inputs else "its tokenizer")
    rows = e.input_ids
    if rows is not None:
        parts.append(f"{sum(map(len, rows)):,} tokens")
    if (size := _SIZE.search(e.checkpoint)) is not None and e.head != "tokenizer":
        weights = float(size["n"]) * (1e9 if size["unit"] in "bB" else 1e6)
        weights *= int(size["times"] or 1)
        width = DTYPES.get(e.dtype, 4)
        parts.append(f"{_rounded(weights * width / 1e9)} GB of weights by its name, a layer at a time")
        if rows is not None:
            parts.append(f"about {_rounded(2e-12 * weights * sum(map(len, rows)))} TFLOP a pass")
    return ", ".join(parts)


# The weights that a name tells: Mistral-7B, Mixtral-8x7B, opt-350m.
_SIZE = re.compile(r"(?<![\w.])((?P<times>\d{1,2})x)?(?P<n>\d{1,4}(\.\d{1,2})?)(?P<unit>[bBmM])(?![a-z0-9])")


def _rounded(x: float) -> str:
    """Two digits."""
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"


def _plain(e: Expectation) -> dict[str, Any]:
    return {
        "id": e.id,
        "checkpoint": e.checkpoint,
        "head": e.head,
        "kind": e.expected.kind,
        "status": e.status,
        "dtype": e.dtype,
        "device": e.device,
        "needs": needs(e),
        "input": dict(e.input),
        "values": e.expected.values,
        "tolerance": {"atol": e.tolerance.atol, "rtol": e.tolerance.rtol},
        "source": dict(e.source),
    }
