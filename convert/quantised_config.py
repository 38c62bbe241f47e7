"""What documents beside quantised weights say of them, as it is used here (quantised_methods.py reads them),
and what config.json is told of weights whose original says it in words of its own.

Sources: transformers 5.23.0 (utils/quantization_config.py), compressed-tensors 0.20.1 (QuantizationConfig).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckpt_tool.convert.name_patterns import Pattern, matches, parsed
from ckpt_tool.convert.plan import Value
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.quantised import Inventory

CONFIG, PARAMS = "config.json", "params.json"
KEY = "quantization_config"
OF_TEXT = "text_config"  # where transformers 5.23.0 (quantizers/auto.py) looks where the whole says none
OF_MODELOPT = "hf_quant_config.json"  # which its older releases write beside config.json, and vLLM reads
OTHER_KEYS = ("compression_config",)  # its older name in compressed-tensors
IN_PARAMS, OF_PARAMS = "quantization", "params"
RECIPES = ("fp32-product", "bf16-scale")  # in which order is rounded, see quantised_values.py
TARGETS = ("BF16", "F32", "F16")  # dtypes that numbers are made in
PATTERN, LINEAR = "re:", "Linear"  # how a target begins that is a pattern, and the class of all that is meant
NO_NUMBER = 255  # the E8M0 code that is NaN
_LEFT = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "exclude_modules",
    "exclude",
)  # modules that are not quantised
PLACES = (*_LEFT, "modules_to_convert")
# What codes are, as documents say it.
EIGHT, MX, NV, INTEGERS = "fp8", "MXFP4", "NVFP4", "integers"


@dataclass(frozen=True)
class Scheme:
    """`method` as config.json calls it, `OF_PARAMS` of a params.json, empty where nothing says that weights
    are quantised. `block` are the rows and columns that share a scale, where that is said; `group` neighbours
    in a row likewise; `symmetric` codes have no zero points; `contents` is what codes may be. `file` says
    it."""

    method: str = ""
    block: tuple[int, int] | None = None
    group: int | None = None
    bits: int | None = None
    symmetric: bool = True
    contents: tuple[str, ...] = ()
    file: str = CONFIG
    place: str = KEY
    raw: Mapping[str, Any] | None = None
    # Where weights are quantised in ways of which one block or group does not tell: what each is of, and how.
    groups: tuple[tuple[tuple[str, ...], Scheme], ...] = ()

    def of(self, weight: str) -> Scheme | None:
        """How the weight of that name is quantised; None where no group is of it. As compressed-tensors looks
        for its group (0.20.1, utils/match.py): by name, pattern and class, each in the order of the texts."""
        if not self.groups:
            return self
        module, (named, patterns) = weight.removesuffix(".weight"), self._targets
        if module in named:
            return named[module]
        found = (scheme for pattern, scheme in patterns if matches(pattern, module))
        return next(found, named.get(LINEAR))

    @cached_property
    def _targets(self) -> tuple[Mapping[str, Scheme], list[tuple[Pattern, Scheme]]]:
        """Names and classes with the scheme of their group, and patterns likewise, in their order."""
        named = {target: scheme for targets, scheme in self.groups for target in targets}
        listed = sorted(target for target in named if target.startswith(PATTERN))
        patterns = [(parsed(t.removeprefix(PATTERN)), named.pop(t)) for t in listed]
        return named, [(pattern, scheme) for pattern, scheme in patterns if pattern is not None]

    @property
    def said(self) -> bool:
        return bool(self.method)

    @property
    def static(self) -> bool:
        """Whether it says that inputs have scales of their own, which are stored."""
        raw = self.raw or {}
        inputs = [group.get("input_activations") for group in self._groups]
        whole = raw.get("global_quant_config")  # of Quark
        inputs.append(whole.get("input_tensors") if isinstance(whole, Mapping) else None)
        keys = ("dynamic", "is_dynamic")
        stored = any(i.get(k) is False for i in inputs if isinstance(i, Mapping) for k in keys)
        return stored or raw.get("activation_scheme") == "static" or raw.get("qscheme_act") == "TENSOR"

    @property
    def of_rows(self) -> bool:
        """Whether it says that a whole row shares a scale."""
        weights = [group.get("weights") for group in self._groups]
        return any(isinstance(w, Mapping) and w.get("group_size") == -1 for w in weights)

    @property
    def _groups(self) -> list[Mapping[str, Any]]:
        """Those of compressed-tensors, which other methods may carry unread."""
        groups = (self.raw or {}).get("config_groups")
        found = groups.values() if isinstance(groups, Mapping) else ()
        return [group for group in found if isinstance(group, Mapping)]

    def left(self, modules: Iterable[str]) -> list[str]:
        """Those of the modules that are named among what is left as it is: whole, or by their beginning or
        end. Names that are patterns are not looked at."""
        listed = [(self.raw or {}).get(place) for place in _LEFT]
        names = {n for each in listed if isinstance(each, list) for n in each if isinstance(n, str)}
        return [m for m in modules if not names.isdisjoint(_ends(m))] if names else []


def _ends(module: str) -> Iterator[str]:
    parts = module.split(".")
    for k in range(len(parts)):
        yield ".".join(parts[: k + 1])
        yield ".".join(parts[k:])


def for_transformers(inventory: Inventory, names: Iterable[str]) -> Value:
    """What transformers is told of fp8 weights whose original says it in words of its own; `names` are the
    tensors of the converted model. A part of the model without codes is named as a whole, in one with codes
    each layer that has none."""
    names = list(names)
    static = any("activation" in w.others for w in inventory.weights.values())
    ends = (".weight_scale_inv", ".weight_scale")
    codes = {n[: n.rindex("_scale")] for n in names if n.endswith(ends)}
    plain: dict[str, None] = {}
    for name in names:
        if name.endswith(".weight") and name not in codes and _is_linear(name):
            layer = name.removesuffix(".weight")
            whole = ".".join(layer.split(".")[: 2 if layer.startswith("model.") else 1])
            plain[layer if any(c.startswith(f"{whole}.") for c in codes) else whole] = None
    left = sorted(plain, key=lambda n: n == "lm_head")
    made: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": None,
        "modules_to_not_convert": left,
    }
    if any(n.endswith(ends[1]) for n in names):
        exact = {n.removesuffix(".weight") for n in names}
        heads = [] if "lm_head" in {*left, *(c.removesuffix(".weight") for c in codes)} else ["lm_head"]
        parts = [n if n in exact else rf"re:.*{n.rpartition('.')[2]}\..*" for n in left]
        made = _by_rows(static, [*parts, *heads])
    return Value(made, f"{inventory.scheme.file}: {inventory.scheme.place}")


def _by_rows(static: bool, left: list[str]) -> dict[str, Any]:
    """A scale for each row, as compressed-tensors says it (0.20.1, quant_scheme.py: FP8_DYNAMIC)."""
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    inputs = {**eight, "strategy": "tensor"} if static else None
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel"},
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
    }


def _is_linear(name: str) -> bool:
    """Whether a loader would look for scales there."""
    return "norm" not in name and "embed" not in name
