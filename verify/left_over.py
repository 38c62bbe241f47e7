"""Tensors of an output that no plan has and that no present release reads: tables that are computed anew when
a model is loaded (rotary frequencies, masks, positions), and a tied output layer written out. They are notes
where they hold what they should, and differences where they do not: a reader may take them at their word.

Which releases wrote them: transformers up to 4.30 kept rotary frequencies, masks and positions among the
weights; `pytorch_model.bin` of 4.x holds a tied layer twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.convert.casting import cast
from ckpt_tool.convert.facts import Reading, class_of, classes, read
from ckpt_tool.records import dataclass
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject

LEVEL = "coverage"
CHECK = "left-over tensors"
LARGEST = 1 << 26  # elements of a table that is computed anew
BLOCK = 1 << 18  # elements compared at a time
ROUNDING = {
    "F64": 1e-5,
    "F32": 1e-5,
    "F16": 2e-3,
    "BF16": 1.6e-2,
}  # relative; frequencies are float32 at best


@dataclass(frozen=True)
class Table:
    """A kind of left-over: its names, what it is in words, and its values for a config and a shape, None
    where they cannot be told."""

    pattern: str
    words: str
    values: Callable[[Reading, tuple[int, ...]], np.ndarray | None]
    turning: bool = False  # sines or cosines of positions


def left_over(subject: Subject, unplanned: list[TensorInfo]) -> tuple[list[Finding], set[str]]:
    """The findings about those of the output's tensors that the plan has not, as far as they are of a known
    kind, and the names of these."""
    wrong, equal = explained(subject.output, subject.config, unplanned)
    made = [Finding(LEVEL, CHECK, "fail", words, name) for name, words in wrong.items()]
    for words, names in equal.items():
        text = f"{len(names)} that no plan has and that loading computes anew: {words}"
        made.append(Finding(LEVEL, CHECK, "note", text, several(names), data={"tensors": names[:100]}))
    return made, {*wrong, *(n for names in equal.values() for n in names)}


def explained(
    checkpoint: Checkpoint, config: Mapping[str, Any], tensors: list[TensorInfo]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Those of a Hugging Face folder's `tensors` that are of a known kind: what is wrong with each that does
    not hold what it should, by its name; the names of the others, by what they hold in words."""
    model_type = class_of(config)
    if model_type is None or not tensors:
        return {}, {}
    reading = read(config, model_type)
    wrong: dict[str, str] = {}
    equal: dict[str, list[str]] = {}
    for t in tensors:
        table = next((k for k in TABLES if re.fullmatch(rf"(.*\.)?{k.pattern}", t.name)), None)
        partner = None if table is not None else _partner(checkpoint, reading, t.name)
        if table is not None:
            problem, words = _table(checkpoint, reading, t, table), table.words
        elif partner is not None:
            problem, words = _tied(checkpoint, t, partner), f"equal to {partner.name}, to which it is tied"
        else:
            continue
        if problem is None:
            equal.setdefault(words, []).append(t.name)
        else:
            wrong[t.name] = problem
    return wrong, equal


def several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def is_table(name: str) -> bool:
    """Whether the name is that of a table which is computed anew."""
    return any(re.fullmatch(rf"(.*\.)?{k.pattern}", name) for k in TABLES)


def _partner(checkpoint: Checkpoint, reading: Reading, name: str) -> TensorInfo | None:
    """The tensor that `name` shares its values with; None where the config does not tie them."""
    tied = reading.numbers.get("tie_word_embeddings")
    if tied is None or tied.value is not True:
        return None
    kind = classes()[reading.model_type]
    other = kind.tied.get(name)
    partners = () if other is None else (other,) if other else (kind.prefix + kind.words, kind.words)
    return next((found[0] for p in partners if (found := checkpoint.find(p))), None)


def _tied(output: Checkpoint, own: TensorInfo, other: TensorInfo) -> str | None:
    """What is wrong with a tied layer written out, in words; None where it is the other bit for bit."""
    start = f"expected {other.name} again, to which tie_word_embeddings ties it"
    if (own.dtype, own.shape) != (other.dtype, other.shape):
        return f"{start} ({other.dtype} {list(other.shape)}), found {own.dtype} {list(own.shape)}"
    different, most = 0, 0.0
    for at in range(0, own.numel, BLOCK):
        count = min(BLOCK, own.numel - at)
        a, b = (_bits(output, t, at, count) for t in (own, other))
        if not np.array_equal(a, b):
            different += int((a != b).sum())
            delta = np.abs(_floats(a, own.dtype) - _floats(b, own.dtype))
            most = max(most, float(np.nanmax(delta, initial=0.0)))
    if not different:
        return None
    size = f"{different:,} of {own.numel:,} elements differ, by up to {most:.3g}"
    return f"{start}, found other values ({size}): transformers 4 uses the one, 5 the other"


def _table(output: Checkpoint, reading: Reading, t: TensorInfo, table: Table) -> str | None:
    """What is wrong with a table, in words; None where it holds what is computed anew."""
    wanted = table.values(reading, t.shape) if t.numel <= LARGEST else None
    if wanted is None:
        return f"expected {table.words}, found a shape {list(t.shape)} that fits no value of config.json"
    found = _numbers(output, t)
    if t.dtype == "F16":
        with np.errstate(over="ignore"):
            wanted = wanted.astype("<f2").astype("<f8")  # what masks scores becomes infinite
    rounding, small = ROUNDING.get(t.dtype, 0.0), 1e-3
    if table.turning:  # angles grow with the position, and so does what rounding leaves of them
        rounding, small = max(rounding, 2e-7 * t.numel / t.shape[-1]), 1.0
    with np.errstate(invalid="ignore"):
        near = (found == wanted) | (np.abs(found - wanted) <= rounding * np.maximum(np.abs(wanted), small))
    if near.all():
        return None
    first = int(np.flatnonzero(~near)[0])
    return (
        f"expected {table.words}, found other values in {int((~near).sum())} of {t.numel} elements: "
        f"{found[first]:.6g} at {first} instead of {wanted[first]:.6g}; releases that read it compute "
        "something else"
    )


def _bits(output: Checkpoint, t: TensorInfo, at: int, count: int) -> np.ndarray:
    kind = DTYPES[t.dtype]
    bits = np.empty(count, dtype=kind.bits)
    output.read_into(t, at * kind.itemsize, bits.data.cast("B"))
    return bits


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values as float64."""
    if dtype in ("BF16", "F16", "F32"):
        wide = np.empty(bits.shape, dtype=DTYPES["F64"].bits)
        cast(bits, dtype, "F64", wide)
        return wide.view("<f8")
    value = DTYPES[dtype].value
    return bits.astype("<f8") if value is None else bits.view(value).astype("<f8")


def _numbers(output: Checkpoint, t: TensorInfo) -> np.ndarray:
    return _floats(_bits(output, t, 0, t.numel), t.dtype)


# --- what the tables hold -------------------------------------------------------------------------------


def _frequencies(reading: Reading, shape: tuple[int, ...]) -> np.ndarray | None:
    """1 / theta^(2i / R) for the R numbers of a head that are turned: releases that wrote them scaled
    positions, not frequencies."""
    theta, width = _number(reading, "rope_theta"), _number(reading, "head_dim")
    if width is None:
        width = (_number(reading, "hidden_size") or 0) // (_number(reading, "num_attention_heads") or 1)
    share = _number(reading, "partial_rotary_factor")
    turned = int(width * (1 if share is None else share))
    if not theta or not turned or shape != (-(-turned // 2),):
        return None
    return np.asarray(theta ** -(np.arange(0, turned, 2, dtype="<f8") / turned))


def _angles(of: Callable[[np.ndarray], np.ndarray]) -> Callable[[Reading, tuple[int, ...]], Any]:
    """cos or sin of position x frequency, equal in both halves, for as many positions as there are."""

    def values(reading: Reading, shape: tuple[int, ...]) -> np.ndarray | None:
        base = _frequencies(reading, (shape[-1] // 2,)) if shape else None
        if base is None:
            return None
        positions = np.arange(int(np.prod(shape[:-1])), dtype="<f8")
        return of(np.tile(np.outer(positions, base), 2)).ravel()

    return values


def _sinusoids(reading: Reading, shape: tuple[int, ...]) -> np.ndarray | None:
    """GPT-J's table: sines, then cosines."""
    turned = _number(reading, "rotary_dim")
    if not turned or len(shape) != 2 or shape[1] != int(turned):
        return None
    steps = np.arange(0, int(turned), 2, dtype="<f8") / turned
    angles = np.outer(np.arange(shape[0], dtype="<f8"), 10000.0**-steps)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).ravel()


def _causal(reading: Reading, shape: tuple[int, ...]) -> np.ndarray | None:
    """Ones on and below the diagonal."""
    if len(shape) < 2 or shape[-1] != shape[-2] or int(np.prod(shape[:-2])) != 1:
        return None
    return np.tril(np.ones(shape[-2:], dtype="<f8")).ravel()


def _hidden(reading: Reading, shape: tuple[int, ...]) -> np.ndarray | None:
    return None if int(np.prod(shape)) != 1 else np.array([classes()[reading.model_type].masked])


def _counted(reading: Reading, shape: tuple[int, ...]) -> np.ndarray | None:
    return np.arange(shape[-1], dtype="<f8") if shape and int(np.prod(shape[:-1])) == 1 else None


def _number(reading: Reading, name: str) -> float | None:
    found: Mapping[str, Any] = reading.numbers
    value = found[name].value if name in found else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


TABLES = (
    Table(r"rotary_emb\.inv_freq", "the frequencies of rope_theta", _frequencies),
    Table(r"rotary_emb\.cos_cached", "cosines of the rotary embedding", _angles(np.cos), turning=True),
    Table(r"rotary_emb\.sin_cached", "sines of the rotary embedding", _angles(np.sin), turning=True),
    Table(r"attn\.embed_positions", "sines and cosines of the rotary embedding", _sinusoids, turning=True),
    Table(r"(attn|attention)\.(bias|causal_mask)", "the causal mask", _causal),
    Table(r"(attn|attention)\.masked_bias", "what masked scores are set to", _hidden),
    Table(r"embeddings\.position_ids", "positions from 0 on", _counted),
)
