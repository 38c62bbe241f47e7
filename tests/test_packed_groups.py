"""Which group of config_groups a weight is of, as verify reads it apart from convert."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.api import convert, verify
from ckpt_tool.convert import name_patterns
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised_config import Scheme
from ckpt_tool.fixtures.quantised import quantise
from ckpt_tool.verify import dequantised, packed_groups, packed_weights
from tests.conftest import Written
from tests.test_quantised_tools import INT4, KEY, MODEL, groups


@pytest.mark.parametrize("pattern", [
    r"^model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$", ".*mlp.*_proj", r"model\.layers\.[0-3]\.",
    ".*up$", "layers", r"(?:model|lm_head).+proj", r".*\.\d*\.mlp", "model.layers.1.mlp.up_proj$", "^$", "",
])  # fmt: skip
def test_verify_reads_patterns_by_itself_and_alike(pattern: str) -> None:
    names = [
        "lm_head",
        *(f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.up_proj")),
    ]
    own = [packed_groups._begins(pattern, n) for n in names]
    assert own == [re.match(pattern, n, re.ASCII) is not None for n in names]
    assert (parsed_here := name_patterns.parsed(pattern)) is None or own == [
        name_patterns.matches(parsed_here, n) for n in names
    ]


def test_a_target_by_name_goes_before_a_pattern_and_a_class() -> None:
    each = groups("pack-quantized", *({**INT4, "group_size": n} for n in (32, 64, 128, 256)))
    told = (["re:.*q_proj"], ["a.q_proj"], ["Linear"], ["re:k_pro"])
    for group, targets in zip(each["config_groups"].values(), told, strict=True):
        group["targets"] = targets
    scheme = Scheme("compressed-tensors", raw=each, groups=((("any",), Scheme()),))
    found = [
        packed_groups.codes_of(scheme, f"{n}.weight").group for n in ("a.q_proj", "b.q_proj", "k_proj", "up")
    ]
    assert found == [64, 32, 256, 128]
    del each["config_groups"]["group_2"]
    with pytest.raises(
        ValueError, match="^up.weight: expected a group of config_groups that is of it, found none$"
    ):
        packed_groups.codes_of(scheme, "up.weight")


def of_two_sizes(source: Path) -> Path:
    """With groups of 32, and of 34: of 64 columns both have two, of 104 four."""
    config = json.loads((source / "config.json").read_text())
    config[KEY] = groups("pack-quantized", *({**INT4, "group_size": n} for n in (32, 34)))
    for group, target in zip(config[KEY]["config_groups"].values(), ("re:.*attn", "re:.*mlp"), strict=True):
        group["targets"] = [target]
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("side", ["convert", "verify"])
def test_another_group_on_one_side_is_caught(
    side: str, conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    source = of_two_sizes(quantise(conversions(MODEL), tmp_path / "in", "int4"))
    if side == "convert":
        monkeypatch.setattr(Scheme, "of", lambda self, weight: self.groups[0][1] if self.groups else self)
    convert(source, tmp_path / "out", options=Options(dequantize="F32"), check=False)
    if side == "verify":

        def first(scheme: Scheme, weight: str) -> Any:
            return right(scheme, weight.replace(".mlp.", ".self_attn."))

        right = packed_groups.codes_of
        for module in (dequantised, packed_weights):
            monkeypatch.setattr(module, "codes_of", first)
    report = verify(tmp_path / "out", source, levels=("bits", "parity"), mode="quick")
    wrong = {f.level for f in report.findings if f.status == "fail"}
    assert wrong == {"bits", "parity"}, report.headline
