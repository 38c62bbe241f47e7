"""Prompts are cut to the table of positions, in every family that has one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_tool.api import Options, convert
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from ckpt_tool.verify.compute import _with_window
from ckpt_tool.verify.prompts import cut, positions, prompts_for
from ckpt_tool.verify.sides import Side
from ckpt_tool.verify.sweeps import as_entities


@pytest.mark.parametrize("variant", ["opt-13b", "opt-350m", "gpt2-v2-tp2", "bert-v2-tp2"])
@pytest.mark.parametrize("table", [16, 64])
def test_parity_runs_on_a_short_table_and_says_what_was_cut(variant: str, table: int, tmp_path: Path) -> None:
    chosen: Any = VARIANTS[variant]
    original = chosen.original
    if variant.startswith("opt"):
        short = replace(original, told={**original.told, "max_target_positions": table})
    else:
        short = replace(original, positions=table)
    tiny = replace(chosen, original=short)
    source = tiny.write(tmp_path / "source")
    convert(source, tmp_path / "out", family=tiny.family, options=Options(settings=tiny.settings))
    report = verify(tmp_path / "out", source, levels="parity", settings=tiny.settings)
    found = {f.check: f for f in report.findings if f.level == "parity"}
    assert found["lockstep"].status == "pass", found["lockstep"].message
    assert f"long 600 to {table}" in found["prompts"].message


def test_a_config_that_claims_more_positions_than_the_table_has_is_not_believed() -> None:
    class Side:
        def __init__(self, name: str, rows: int) -> None:
            self.tensor = type("T", (), {"name": name, "shape": (rows, 4)})()

        def __iter__(self) -> Any:
            return iter([self.tensor])

    config = {"max_position_embeddings": 2048, "vocab_size": 300}
    side: Any = Side("model.decoder.embed_positions.weight", 66)
    assert positions(config, side, None) == 64  # two rows are for padding
    assert positions({**config, "max_position_embeddings": 50}, side) == 50
    assert positions(config, Side("model.norm.weight", 66)) is None  # type: ignore[arg-type]
    assert positions({"n_positions": 32}) == 32
    rows = prompts_for(config, None, table=64)
    assert max(map(len, rows.values())) == 64
    (note,) = cut(rows, config, 64)
    assert note.status == "note" and "long 600 to 64" in note.message
    assert cut(prompts_for(config, None), config, None) == []


def side_with(**values: Any) -> Side:
    return Side(SimpleNamespace(), SimpleNamespace(**values), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("original", "converted", "longest"),
    [
        ((None, None), (None, None), 600),  # turned off beside its width
        ((None, 700), (None, 700), 764),
        ((700, 700), (None, None), 764),  # which config.json lacks
        ((700, 700), (9000, None), 764),  # and another is too wide for a prompt
    ],
)
def test_a_prompt_goes_beyond_the_window_that_a_layer_has(
    original: Any, converted: Any, longest: int
) -> None:
    sides = [side_with(windows=own) for own in (original, converted)]
    config = {"vocab_size": 300, "sliding_window": 4096, "use_sliding_window": False}
    rows = prompts_for(_with_window(config, sides), None)
    assert max(map(len, rows.values())) == longest
    assert _with_window(config, [side_with()]) == config


def test_every_position_of_an_entity_has_its_prompt() -> None:
    ids, given = as_entities(torch.arange(9).view(-1, 1), named=4, places=9)
    assert given["entity_ids"].flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert given["entity_positions"].flatten().tolist() == list(range(9))
    assert ids.tolist() == [[0]] * 9
