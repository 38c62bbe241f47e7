"""Qwen3, Gemma 2 and GPT-NeoX: values of config.json that their classes do not load or read either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError

Written = Callable[[str], Path]


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [
        ("gemma-2-2b", "attn_logit_softcapping", "50"),
        ("gemma-2-2b", "final_logit_softcapping", [30.0]),
        ("gemma-2-2b", "attn_logit_softcapping", 0),
        ("gemma-2-2b", "rope_parameters", "banana"),
        ("gemma-2-2b", "rope_scaling", [1, 2]),
        ("pythia-410m", "use_parallel_residual", None),
        ("pythia-410m", "attention_bias", None),
        ("pythia-410m", "rope_parameters", [1, 2]),
        ("qwen3-0.6b", "rope_scaling", "yarn"),
    ],
)
def test_what_no_reader_takes_is_refused(
    variant: str, name: str, value: Any, originals: Written, tmp_path: Path
) -> None:
    source = edited(originals(variant), tmp_path / "in", **{name: value})
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("bad-config", name) and problem.message.startswith("expected ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "written"), [(50, 50.0), (None, None)])
def test_a_cap_is_a_float_or_none(given: Any, written: Any, originals: Written, tmp_path: Path) -> None:
    source = edited(originals("gemma-2-2b"), tmp_path / "in", attn_logit_softcapping=given)
    api.convert(source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["attn_logit_softcapping"]
    assert found == written and type(found) is type(written)
