"""The text of a plan's JSON, a piece at a time: that of half a million steps is three times what the plan
itself takes.

Steps of one template differ in the names of their tensors: each is the template's text with names put in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING

from ckpt_tool.convert.steps import Steps

if TYPE_CHECKING:
    from ckpt_tool.convert.plan import OutputFile, Plan

BATCH = 1000  # entries of a piece
NAME = '"name":""'  # stands in no string of JSON, where a quotation mark is escaped


def pieces(plan: Plan) -> Iterator[str]:
    """That of `plan.to_json()`, with sorted keys and no spaces."""
    frame = plan.frame_json()
    long = {"outputs": _outputs(plan.outputs), "steps": _listed(step_texts(plan))}
    for k, key in enumerate(sorted([*frame, *long])):
        yield f"{',' if k else '{'}{quoted(key)}:"
        yield from long[key] if key in long else (_text(frame[key]),)
    yield "}"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _listed(entries: Iterable[str]) -> Iterator[str]:
    left, sign = iter(entries), ""
    yield "["
    while batch := ",".join(islice(left, BATCH)):
        yield sign + batch
        sign = ","
    yield "]"


def step_texts(plan: Plan) -> Iterator[str]:
    """The text of each step."""
    from ckpt_tool.convert.plan import step_json

    steps = plan.steps if isinstance(plan.steps, Steps) else Steps(plan.steps)
    around = [_text(step_json(template)).split(NAME) for template in steps.templates]
    for kind, names in steps.packed():
        if len(names) == 2:  # nearly always, and as below
            before, between, after = around[kind]
            yield f'{before}"name":{quoted(names[0])}{between}"name":{quoted(names[1])}{after}'
            continue
        first, *rest = around[kind]
        named = (f'"name":{quoted(name)}{after}' for name, after in zip(names, rest, strict=True))
        yield "".join(chain((first,), named))


def tensor_texts(file: OutputFile) -> Iterator[str]:
    """The text of each tensor of a file to write."""
    from ckpt_tool.convert.plan import tensor_json

    @lru_cache(maxsize=1024)
    def around(dtype: str, shape: tuple[int, ...]) -> list[str]:
        return _text(tensor_json("", dtype, shape)).split(NAME)

    for t in file.tensors:
        before, after = around(t.dtype, t.shape)
        yield f'{before}"name":{quoted(t.name)}{after}'


def _outputs(files: Iterable[OutputFile]) -> Iterator[str]:
    from ckpt_tool.convert.plan import output_json

    yield "["
    for k, file in enumerate(files):
        # "tensors" is the last of its keys
        yield f'{"," if k else ""}{_text(output_json(file))[:-1]},"tensors":'
        yield from _listed(tensor_texts(file))
        yield "}"
    yield "]"
