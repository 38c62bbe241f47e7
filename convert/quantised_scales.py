"""A look at the scales of quantised weights: libraries apply whatever stands there, and disagree on some.

E8M0 code 255 is NaN by its definition (Open Compute Project, Microscaling Formats 1.0), infinite in one
public reading and a large finite number in another, so numbers are not made of it. Scales that are no number
or infinite make no numbers either. Zero and negative scales are numbers, and told.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, TensorInfo
from ckpt_tool.convert.manifest import Finding
from ckpt_tool.convert.quantised import E8M0, Inventory
from ckpt_tool.convert.quantised_config import NO_NUMBER
from ckpt_tool.convert.quantised_values import scale_numbers
from ckpt_tool.errors import Problem, fail_all

PIECE = 1 << 20  # scales looked at at a time
CARRIED = "without --dequantize codes and scales are carried as they are"


def odd_scales(inventory: Inventory | None, *, dequantised: bool) -> list[Finding]:
    """What is odd about the scales of a source. Fails with `bad-scales` where numbers were made of some that
    are none."""
    if inventory is None:
        return []
    findings, problems = [], []
    for weight in inventory.weights.values():
        for t in (weight.scales, *(t for what, t in weight.others.items() if what == "second")):
            divisor = t is not weight.scales and not weight.form.multiplied
            for words, count, first in _odd(inventory, t):
                bad = words not in (("negative",) if divisor else ("zero", "negative"))
                at = tuple(int(k) for k in np.unravel_index(first, t.shape or (1,)))
                found = f"found {count} that {_are(words, count)}, the first at {at}"
                text = f"expected positive finite scales, {found}"
                if bad and dequantised:
                    problems.append(Problem("bad-scales", text, t.file, t.name, CARRIED))
                else:
                    details = {"count": count, "first": list(at), "what": words}
                    findings.append(Finding("odd-scales", text, t.file, t.name, details))
    fail_all(problems)
    return findings


def _are(words: str, count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {words}"


def _odd(inventory: Inventory, t: TensorInfo) -> Iterator[tuple[str, int, int]]:
    """(what is odd, how many, the first of them) of one tensor of scales."""
    found: dict[str, tuple[int, int]] = {}
    for start in range(0, t.numel, PIECE):
        bits = np.empty(min(PIECE, t.numel - start), DTYPES[t.dtype].bits)
        data = bits.data.cast("B")
        inventory.checkpoint.files[t.file].read_into(t.name, start * DTYPES[t.dtype].itemsize, data)
        for words, places in _kinds(bits, t.dtype):
            if places.any():
                count, first = found.get(words, (0, start + int(np.argmax(places))))
                found[words] = count + int(np.count_nonzero(places)), first
    yield from ((words, count, first) for words, (count, first) in found.items())


def _kinds(bits: np.ndarray, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    if dtype in E8M0:
        yield "code 255, which is NaN in E8M0", bits == NO_NUMBER
        return
    numbers = scale_numbers(bits, dtype)
    yield "NaN", np.isnan(numbers)
    yield "infinite", np.isinf(numbers)
    yield "zero", numbers == 0
    yield "negative", numbers < 0
