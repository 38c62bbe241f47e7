"""What a program of TensorFlow 1 put around the names of Google's variables, taken off in one place: a scope
before them (`student/bert/...`), and `ExponentialMovingAverage` after them.

A scope is taken off where the model lies in it once. Two models, in two scopes or one of them in none, are
left to the family, which knows what a teacher is. An average beside its variable is left out with the reason;
where no variable is there, averages are the model.

Source: tensorflow 2.21.0 (python/ops/variable_scope.py, python/training/moving_averages.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ckpt_tool.checkpoint.base import AVERAGE, LeftOut, Renamed, TensorFile, Unwrapped
from ckpt_tool.checkpoint.tf_coding import VARIABLE
from ckpt_tool.errors import printable

MOVING = "/ExponentialMovingAverage"
# Where the names of Google's BERT and of what it made of it begin.
_ROOT = re.compile(r"(?:^|/)(?=bert/(?:embeddings|encoder|layer_\d+)/)", re.ASCII)


def without_scopes(files: Mapping[str, TensorFile]) -> Unwrapped:
    """`files` with the variables' own names, as they are where nothing was put around those."""
    names = [n for f in files.values() for n in f.tensors]
    found = Unwrapped(dict(files))
    if averages := [n for n in names if n.endswith(MOVING)]:
        own, beside = _averages(averages, {*names})
        if own:
            found.readings.append(
                f"{len(own)} variables are there as their moving averages alone, which were read as they are"
            )
        if beside:
            found.readings.append(f"{len(beside)} moving averages of variables left out: {AVERAGE}")
        _rename(found, own, beside)
        names = [n for f in found.files.values() for n in f.tensors]
    scope = _scope(names)
    if scope:
        found.before = scope
        found.readings.append(f"names were read without the scope {printable(scope)} before them")
        _rename(found, {n: n.removeprefix(scope) for n in names if n.startswith(scope)}, {})
    return found


def _averages(averages: Collection[str], names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """New names of averages that stand alone, and why others are left out; neither where only some variables
    have no other value than their average."""
    own = {n: n.removesuffix(MOVING) for n in averages}
    before = _before_averages(own.values(), names)
    there = {n for n, variable in own.items() if variable.removeprefix(before) in names}
    if there and len(there) < len(own):
        return {}, {}
    return ({}, dict.fromkeys(there, AVERAGE)) if there else (own, {})


def _before_averages(stems: Collection[str], names: Collection[str]) -> str:
    """The scope before the names that averages have of their variables, where all have one: they are made
    below what is open there. Empty where a variable is there without."""
    first, stems = min(stems), list(stems)
    ends = [0] if first in names else [at.end() for at in re.finditer("/", first)]
    for before in (first[:end] for end in ends):
        if all(s.startswith(before) and s.removeprefix(before) in names for s in stems):
            return before
    return ""


def _scope(names: Collection[str]) -> str:
    """The one before the model; empty without one, or where it is not sure. What an optimizer keeps may have
    a scope of its own before that."""
    starts = {n[: found.end()] for n in names if (found := _ROOT.search(n)) and not n.endswith(VARIABLE)}
    scope = min(starts, key=len, default="")
    own = {n.removeprefix(scope) for n in names}
    sure = all(s.endswith(f"/{scope}") for s in starts - {scope}) and len(own) == len(names)
    return scope if sure else ""


def scopes(names: Collection[str]) -> list[str]:
    """The scopes, or none (""), that models lie in; what an optimizer keeps of one is none of its own."""
    starts = {n[: found.end()] for n in names if (found := _ROOT.search(n)) and not n.endswith(VARIABLE)}

    def has_another(scope: str) -> bool:
        return any(scope[at.end() :] in starts for at in re.finditer("/", scope[:-1]))

    return sorted(s for s in starts if not has_another(s))


def _rename(found: Unwrapped, own: Mapping[str, str], beside: Mapping[str, str]) -> None:
    """Give the files the names `own` has for some tensors, and set others aside."""
    if not own and not beside:
        return
    for key, file in found.files.items():
        found.left_out += [LeftOut(t, beside[n]) for n, t in file.tensors.items() if n in beside]
        found.files[key] = Renamed(file, {own.get(n, n): n for n in file.tensors if n not in beside})
