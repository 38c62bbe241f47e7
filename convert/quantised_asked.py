"""What `--dequantize` and `--recipe` ask for, and what a plan says of it."""

from __future__ import annotations

from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint
from ckpt_tool.convert.casting import rounds
from ckpt_tool.convert.plan import Options, dtype_option
from ckpt_tool.convert.quantised_values import RECIPES, TARGETS
from ckpt_tool.convert.quantised_view import carried_of, quantised_of
from ckpt_tool.errors import Problem, fail, fail_all

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


def check_asked(options: Options) -> None:
    """Two roundings one after the other are none of the recipes."""
    wanted, cast = options.dequantize, options.dtype
    if wanted is not None and cast is not None and rounds(wanted, cast):
        message = f"expected a dtype that holds every {DTYPES[wanted].torch}, found {DTYPES[cast].torch}"
        hint = f"--dequantize {DTYPES[cast].torch} rounds once"
        fail_all([Problem("usage", message, where="--dtype", hint=hint)])


def lossy_words(checkpoint: Checkpoint, options: Options) -> list[str]:
    """What dequantising does, in words."""
    inventory = quantised_of(checkpoint)
    if inventory is None or options.dequantize is None:
        return []
    weights, formats = len(inventory.weights), ", ".join(inventory.words)
    dtype = DTYPES[options.dequantize].torch
    return [f"--dequantize: {weights} weights ({formats}) became {dtype} by the recipe {options.recipe}"]


def carried_words(checkpoint: Checkpoint) -> list[str]:
    """That quantised weights are carried as they are."""
    inventory = carried_of(checkpoint)
    if inventory is None:
        return []
    return [f"{len(inventory.weights)} weights ({', '.join(inventory.words)}) keep their codes and scales"]
