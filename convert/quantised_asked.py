"""What `--dequantize` and `--recipe` ask for, and what a plan says of it. What computes with numbers is only
loaded where it is wanted: every family imports this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.convert.plan import Options, dtype_option
from ckpt_tool.convert.quantised_config import RECIPES, TARGETS
from ckpt_tool.convert.widths import rounds
from ckpt_tool.errors import Problem, fail, fail_all

if TYPE_CHECKING:
    from ckpt_tool.convert.quantised import Inventory

WAY_OUT = "--dequantize bfloat16 makes them plain numbers (lossy)"


def dequantize_option(dtype: str | None, recipe: str | None) -> dict[str, Any]:
    """Both options as fields of `Options`; kind `usage`."""
    if dtype is None:
        message = "expected --dequantize beside it, which it says how to do, found none"
        fail("usage", message, where="--recipe")
    made = dtype_option(dtype, "--dequantize", TARGETS)
    if recipe not in (None, *RECIPES):
        fail("usage", f"expected {' or '.join(RECIPES)}, found {recipe!r}", where="--recipe")
    return {"dequantize": made, "recipe": recipe or RECIPES[0]}


def check_asked(checkpoint: Checkpoint, options: Options) -> None:
    """Two roundings one after the other are none of the recipes, and codes are nothing to cast."""
    from ckpt_tool.convert.quantised_view import carried_of

    wanted, cast = options.dequantize, options.dtype
    if cast is not None and (inventory := carried_of(checkpoint)) is not None:
        message = f"expected no cast of weights that stay codes and scales ({', '.join(inventory.words)})"
        hint = f"--dequantize {DTYPES[cast].torch} makes them numbers first (lossy)"
        found = f"found {DTYPES[cast].torch}"
        fail_all([Problem("usage", f"{message}, {found}", where="--dtype", hint=hint)])
    if wanted is not None and cast is not None and rounds(wanted, cast):
        message = f"expected a dtype that holds every {DTYPES[wanted].torch}, found {DTYPES[cast].torch}"
        hint = f"--dequantize {DTYPES[cast].torch} rounds once"
        fail_all([Problem("usage", message, where="--dtype", hint=hint)])


def lossy_words(checkpoint: Checkpoint, options: Options) -> list[str]:
    """What dequantising does, in words."""
    from ckpt_tool.convert.quantised import CACHES
    from ckpt_tool.convert.quantised_view import quantised_of

    inventory = quantised_of(checkpoint)
    if inventory is None or options.dequantize is None:
        return []
    weights, formats = len(inventory.weights), ", ".join(inventory.words)
    dtype = DTYPES[options.dequantize].torch
    made = [f"--dequantize: {weights} weights ({formats}) became {dtype} by the recipe {options.recipe}"]
    for words, kinds, beside in (
        ("inputs", ("activation",), 0),
        ("cached keys and values", tuple(CACHES), len(inventory.beside)),
    ):
        count = beside + sum(not w.others.keys().isdisjoint(kinds) for w in inventory.weights.values())
        if count:
            made.append(f"--dequantize: scales of the {words} of {count} weights are left out")
    if options.recipe != RECIPES[0] and not any(w.rounds_scales for w in inventory.weights.values()):
        made.append(f"--recipe {options.recipe}: bfloat16 holds these scales, so {RECIPES[0]} makes the same")
    return made


def _without_inputs(inventory: Inventory) -> list[str]:
    """That scales of inputs are said to be there, and are not."""
    lacking = [n for n, w in inventory.weights.items() if "activation" not in w.others]
    if not inventory.scheme.static or not lacking:
        return []
    count = f"{len(lacking)} of {len(inventory.weights)} weights have none, as {lacking[0]}"
    file = inventory.scheme.file
    return [f"{file} says that inputs have stored scales, and {count}: loaders make them up, or stop"]


def carried_words(checkpoint: Checkpoint) -> list[str]:
    """That quantised weights are carried as they are."""
    from ckpt_tool.convert.quantised import FP8_ROWS, QSCALE, scaled_by_rows
    from ckpt_tool.convert.quantised_view import carried_of

    inventory = carried_of(checkpoint)
    if inventory is None:
        return []
    text = f"{len(inventory.weights)} weights ({', '.join(inventory.words)}) keep their codes and scales"
    mixed = not scaled_by_rows(inventory)
    if mixed and any(w.form is QSCALE and w.kind == FP8_ROWS for w in inventory.weights.values()):
        text += (
            "; transformers loads no such folder, in which some have a scale for each row and others one: "
        )
        text += WAY_OUT
    made = [text, *_without_inputs(inventory)]
    left = inventory.scheme.left(n.removesuffix(".weight") for n in inventory.weights)
    if left:
        file = inventory.scheme.file
        made.append(
            f"{file} says that {left[0]} is not quantised{f', and {len(left) - 1} more' * (len(left) > 1)}: "
            "by that, loaders take its codes as numbers, without the scales"
        )
    return made
