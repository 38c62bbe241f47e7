"""Every plan is the one that was recorded: see plan_digests.py, which records them anew."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ckpt_tool.fixtures.headers import REAL
from ckpt_tool.fixtures.variants import VARIANTS
from tests.conftest import Written


def _script() -> ModuleType:
    """tests/ is no package, so the script is loaded by its path."""
    spec = importlib.util.spec_from_file_location("plan_digests", Path(__file__).with_name("plan_digests.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()
RECORD = json.loads(SCRIPT.RECORD.read_text())


def test_every_original_is_recorded() -> None:
    assert set(RECORD) == {*VARIANTS, *(f"published {name}" for name in REAL)}


@pytest.mark.parametrize("name", VARIANTS)
def test_plans_are_as_recorded(name: str, originals: Written, conversions: Written) -> None:
    assert dict(SCRIPT.of_variant(name, originals(name), conversions(name))) == RECORD[name]


@pytest.mark.parametrize("name", REAL)
def test_plans_of_published_sizes_are_as_recorded(name: str, tmp_path: Path) -> None:
    assert SCRIPT.of_published(name, tmp_path) == RECORD[f"published {name}"]["hf"]
