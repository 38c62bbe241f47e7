"""`ckpt-tool generate`: what a model goes on with, under the rules of a named release, and whether the
original it was made from goes on with the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ckpt_tool.errors import fail, printable
from ckpt_tool.terminal import Column, Screen, paragraph, table

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "sample": {"do_sample": True, "num_beams": 1},
    "beam": {"do_sample": False, "num_beams": 4},
}
SHOWN = 24  # new tokens of a row on a screen


def arguments(mode: str | None, pairs: tuple[str, ...], file: str | None) -> dict[str, Any]:
    """Options by the library's names: those of the mode, then of the file, then KEY=VALUE, whose values are
    JSON, or words."""
    made = dict(MODES[mode]) if mode is not None else {}
    if file is not None:
        made |= _read(file)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            fail("usage", f"expected KEY=VALUE, found {pair!r}", where="--option")
        try:
            made[name] = json.loads(text)
        except ValueError:
            made[name] = text
    return made


def _read(file: str) -> dict[str, Any]:
    from ckpt_tool.verify.generate_run import read_json

    data = read_json(file, "--options", 1 << 20)
    if not isinstance(data, dict):
        fail("usage", f"expected an object, found {type(data).__name__}", file=file, where="--options")
    return data


def rows_of(ids: tuple[str, ...]) -> list[list[int]]:
    """`1,2,3` or `1 2 3`, a row each."""
    try:
        return [[int(i) for i in text.replace(",", " ").split()] for text in ids]
    except ValueError:
        fail("usage", f"expected token ids such as 1,15,27, found {', '.join(ids)}", where="--prompt-ids")


def run(
    out: str,
    source: str | None,
    asked: dict[str, Any],
    as_json: bool,
    screen: Screen,
    tell: Callable[[str], None],
) -> int:
    """0; with a source 1 where it goes on otherwise."""
    import torch

    from ckpt_tool import api
    from ckpt_tool.verify.compute import computing_for
    from ckpt_tool.verify.generate_run import Request, bar_of, compared, said_by_source, to_json
    from ckpt_tool.verify.generate_run import run as go_on
    from ckpt_tool.verify.prompts import tokenizer_of
    from ckpt_tool.verify.subject import opened

    with ExitStack() as stack:
        settings = api.settings(asked["pairs"])
        subject = stack.enter_context(opened(out, source, settings, look_for_source=False))
        stack.enter_context(computing_for(subject.output))
        tokenizer = tokenizer_of(subject.hf)
        rows, mask = _prompts(asked, tokenizer)
        request = Request(rows, mask, arguments(asked["mode"], asked["options"], asked["options_file"]),
                          asked["rules"], asked["seed"], not asked["no_cache"])  # fmt: skip
        dtype, device = asked["compute_dtype"], asked["device"]
        sides = _sides(subject, getattr(torch, dtype), device, source is not None)
        own = replace(request, said=said_by_source(subject) if source is not None else None)
        made = [
            go_on(subject, side, each, device=device, tell=tell, keep=source is not None)
            for side, each in zip(sides, (request, own), strict=False)
        ]
        data = to_json(made[0], request)
        if tokenizer is not None:
            new = [row[made[0].width :] for row in made[0].generated.sequences]
            data["texts"] = [tokenizer.decode(row) for row in new]
        apart, bar = None, 0.0
        if source is not None:
            whole = replace(own, cache=False)
            plain = go_on(subject, sides[1], whole, device=device) if made[1].kept else made[1]
            bar = bar_of(dtype, made[1], plain)
            apart = compared(made[1], made[0], bar)
            data["source"] = _against(made, apart, bar)
    good = apart is None or (apart.first is None and apart.worst <= bar)
    if as_json:
        data["computed"] = f"{dtype} on {device}"
        lines = (f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in data.items())
        print("{\n" + ",\n".join(lines) + "\n}")
    else:
        _show(screen, data, made[0], apart, good)
    return 0 if good else 2 if apart is not None and apart.tie else 1


def _against(made: list[Any], apart: Any, bar: float) -> dict[str, Any]:
    """How the source goes on beside the output, and which options its files give otherwise."""
    from ckpt_tool.verify.generate_run import options_apart

    others = options_apart(made[1].options, made[0].options)
    return {
        "same_tokens": apart.first is None,
        "first_difference": apart.first,
        "tie": apart.tie,
        "worst_score": apart.worst if apart.first is None else None,
        "bar": bar,
        **({"other_options": others} if others else {}),
    }


def _prompts(asked: dict[str, Any], tokenizer: Any) -> tuple[list[list[int]], list[list[int]] | None]:
    from ckpt_tool.verify.generate_run import read_request

    ways = [name for name in ("prompt_ids", "prompt", "prompts") if asked[name]]
    if len(ways) > 1:
        found = " and ".join("--" + w.replace("_", "-") for w in ways)
        fail("usage", f"expected prompts in one way, found {found}", where="--prompts")
    if asked["prompts"]:
        return read_request(asked["prompts"])
    if asked["prompt_ids"]:
        return rows_of(asked["prompt_ids"]), None
    if asked["prompt"] and tokenizer is None:
        text = "expected a tokenizer.json beside the model to read text with, found none"
        fail("missing-file", text, where="--prompt", hint="--prompt-ids 1,15,27 gives token ids")
    rows = [tokenizer.encode(text).ids for text in asked["prompt"]]
    return rows, [[1] * len(row) for row in rows] if rows else None


def _sides(subject: Any, dtype: Any, device: str, both: bool) -> list[Any]:
    """The converted reading, and the original one where both are asked for."""
    from ckpt_tool.reference import NotComputed
    from ckpt_tool.verify.compute import UNREADABLE
    from ckpt_tool.verify.sides import converted_side, original_side

    if subject.hf is None:
        fail("wrong-format", "expected a model in the Hugging Face layout, found an original")
    try:
        made = [converted_side(subject, dtype, device)]
        if both and subject.original is not None:
            made.append(original_side(subject, dtype, device))
    except (NotComputed, *UNREADABLE) as error:
        fail("unsupported", f"expected a model that is computed here, found another ({error})")
    if both and len(made) == 1:
        fail("usage", "expected an original as the source, found another layout", where="--source")
    return made


def _show(screen: Screen, data: dict[str, Any], made: Any, apart: Any, good: bool) -> None:
    g, o = made.generated, made.options
    how = (
        f"beam search with {o.num_beams} beams" if o.beams else "sampling" if o.do_sample else "greedy search"
    )
    how = f"beam sampling with {o.num_beams} beams" if o.beams and o.do_sample else how
    seed = f", seed {data['seed']}" if o.do_sample else ""
    cache = f"a cache of {size(made.kept)}" if made.kept else "no cache"
    paragraph(screen, f"{how}{seed} by the rules of transformers {o.rules}: {g.steps} steps with {cache}")
    own = g.sequences_scores or [sum(row) for row in g.normalized]
    heads = (
        Column("row", right=True),
        Column("what follows"),
        Column("score" if o.beams else "log-probability", right=True),
    )
    table(screen, heads, [(str(r), _text(data, made, r), f"{s:.4f}") for r, s in enumerate(own)])
    if apart is None:
        return
    others = "; ".join(data["source"].get("other_options", ()))
    under = f", by options of its own (the source's and these: {others})" if others else ""
    if good:
        paragraph(
            screen,
            f"the source goes on with the same tokens{under}; scores are at most {apart.worst:.2g} apart",
            style="green",
        )
    else:
        tie = ", a tie of their scores" if apart.tie else ""
        where = apart.first or f"scores are {apart.worst:.3g} apart"
        words = f"the source goes on otherwise{under}: {where}{tie}"
        paragraph(screen, words, style="yellow" if apart.tie else "bold red")


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _text(data: dict[str, Any], made: Any, r: int) -> str:
    """The new part of a row: its text where there is a tokenizer, else its ids."""
    if "texts" in data:
        return printable(data["texts"][r])
    new = made.generated.sequences[r][made.width :]
    more = f" and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
    return " ".join(map(str, new[:SHOWN])) + more
