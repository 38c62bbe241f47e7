"""What documents beside quantised weights say of them: `quantization_config` of config.json as transformers
and vLLM read it, and `quantization` of a Mistral params.json. This is the one reader of it.

Sources: transformers 5.23.0 (utils/quantization_config.py), compressed-tensors 0.20.1 (QuantizationConfig),
vLLM (model_executor/layers/quantization), mistral params.json of 2025.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.params import shown
from ckpt_tool.convert.plan import Value
from ckpt_tool.errors import CkptToolError, Problem, fail_all
from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.convert.quantised import Inventory

CONFIG, PARAMS = "config.json", "params.json"
KEY = "quantization_config"
OF_MODELOPT = "hf_quant_config.json"  # which its older releases write beside config.json, and vLLM reads
OTHER_KEYS = ("compression_config",)  # its older name in compressed-tensors
IN_PARAMS, OF_PARAMS = "quantization", "params"
RECIPES = ("fp32-product", "bf16-scale")  # in which order is rounded, see quantised_values.py
TARGETS = ("BF16", "F32", "F16")  # dtypes that numbers are made in
NO_NUMBER = 255  # the E8M0 code that is NaN
METHODS = ("fp8", "mxfp4", "compressed-tensors", "modelopt")
_LEFT = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "exclude_modules",
)  # modules that are not quantised
_PLACES = (*_LEFT, "modules_to_convert")
# Keys without a bearing on the numbers of the weights, by method; those of `_PLACES` are known everywhere.
_FREE = {
    "fp8": ("activation_scheme", "dequantize", "kv_cache_quant_algo"),
    "mxfp4": ("dequantize",),
    "compressed-tensors": (
        "quantization_status", "global_compression_ratio", "version", "kv_cache_scheme", "sparsity_config",
        "transform_config",
    ),
    "modelopt": ("producer", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups"),
}  # fmt: skip
_READ = {
    "fp8": ("fmt", "weight_block_size", "scale_fmt", "expert_dtype"),
    "mxfp4": (),
    "compressed-tensors": ("format", "config_groups"),
    "modelopt": ("quant_algo", "group_size"),
}
_IN_ORDER = ("weight", "static")  # of activations, which calibration alone looked at
_FORMATS = (
    "pack-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)


@dataclass(frozen=True)
class Scheme:
    """`method` as config.json calls it, `OF_PARAMS` of a params.json, empty where nothing says that weights
    are quantised. `block` are the rows and columns that share a scale, where that is said; `group` neighbours
    in a row likewise; `symmetric` codes have no zero points. `file` says it."""

    method: str = ""
    block: tuple[int, int] | None = None
    group: int | None = None
    bits: int | None = None
    symmetric: bool = True
    format: str = ""
    file: str = CONFIG
    place: str = KEY
    raw: Mapping[str, Any] | None = None

    @property
    def said(self) -> bool:
        return bool(self.method)

    @property
    def static(self) -> bool:
        """Whether it says that inputs have scales of their own, which are stored."""
        raw = self.raw or {}
        groups = raw.get("config_groups")
        inputs = [g.get("input_activations") for g in groups.values()] if isinstance(groups, Mapping) else []
        stored = any(isinstance(i, Mapping) and i.get("dynamic") is False for i in inputs)
        return stored or raw.get("activation_scheme") == "static" or raw.get("qscheme_act") == "TENSOR"

    @property
    def of_rows(self) -> bool:
        """Whether it says that a whole row shares a scale."""
        groups = (self.raw or {}).get("config_groups")
        weights = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
        return any(isinstance(w, Mapping) and w.get("group_size") == -1 for w in weights)

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


def scheme_of(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Scheme:
    """What the documents say; `settings` (--set) stand before them. Kinds: `bad-config`, `unsupported`."""
    raw, file = _raw(checkpoint, settings)
    if raw is None:
        return _of_params(checkpoint)
    if not isinstance(raw, Mapping):
        _refuse("bad-config", "expected an object", raw, KEY, file)
    method = raw.get("quant_method")
    if method not in METHODS:
        _refuse("unsupported", f"expected {' or '.join(METHODS)}", method, f"{KEY}.quant_method", file)
    fail_all(_unknown(raw, method, file))
    made = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed, "modelopt": _modelopt}[method](
        raw, file
    )
    if raw.get("sparsity_config") or raw.get("transform_config"):
        _refuse("unsupported", "expected no sparsity and no transform beside the codes", "one", KEY, file)
    return made


def _raw(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[Any, str]:
    if settings.get(KEY) is not None:
        return settings[KEY], "--set"
    if CONFIG not in checkpoint.documents or KEY in settings:
        return None, CONFIG
    try:
        document = checkpoint.json(CONFIG)
    except CkptToolError:
        return None, CONFIG  # whoever reads it says why
    found = next((document[k] for k in (KEY, *OTHER_KEYS) if document.get(k)), None)
    if found is None and OF_MODELOPT in checkpoint.documents:
        return _modelopt_beside(checkpoint.json(OF_MODELOPT).get("quantization")), OF_MODELOPT
    return found, CONFIG


def _modelopt_beside(said: Any) -> Any:
    """What its file says, as newer releases say it in config.json."""
    if not isinstance(said, Mapping):
        return said
    names = {"exclude_modules": "ignore"}
    return {"quant_method": "modelopt", **{names.get(k, k): v for k, v in said.items()}}


def _refuse(kind: str, expected: str, found: Any, where: str, file: str) -> None:
    fail_all([Problem(kind, f"{expected}, found {shown(found)}", file, where)])


def _unknown(raw: Mapping[str, Any], method: str, file: str) -> Iterator[Problem]:
    known = {"quant_method", *_PLACES, *_FREE[method], *_READ[method]}
    for key in sorted(map(str, raw)):
        if key not in known and raw[key] not in (None, False):
            message = f"expected keys that are known of {method}, found {key} = {shown(raw[key])}"
            hint = f"--set {KEY}='{{...}}' without it, if it changes none of the weights' numbers"
            yield Problem("unsupported", message, file, f"{KEY}.{key}", hint)


def _fp8(raw: Mapping[str, Any], file: str) -> Scheme:
    if raw.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        _refuse("unsupported", "expected e4m3", raw["fmt"], f"{KEY}.fmt", file)
    if raw.get("scale_fmt") not in (None, "float", "ue8m0"):
        _refuse("unsupported", "expected float or ue8m0", raw["scale_fmt"], f"{KEY}.scale_fmt", file)
    if raw.get("expert_dtype") not in (None, "fp8"):  # transformers 5.23.0 writes it beside any fp8
        _refuse("unsupported", "expected fp8", raw["expert_dtype"], f"{KEY}.expert_dtype", file)
    block = raw.get("weight_block_size")
    return Scheme("fp8", _two(block, f"{KEY}.weight_block_size", file), file=file, raw=raw)


def _two(block: Any, where: str, file: str) -> tuple[int, int] | None:
    if block is None:
        return None
    fits = isinstance(block, list | tuple) and len(block) == 2
    if not fits or not all(type(n) is int and 0 < n < 1 << 31 for n in block):
        _refuse("bad-config", "expected two whole numbers from 1", block, where, file)
    return block[0], block[1]


def _mxfp4(raw: Mapping[str, Any], file: str) -> Scheme:
    return Scheme("mxfp4", group=32, bits=4, file=file, raw=raw)


def _modelopt(raw: Mapping[str, Any], file: str) -> Scheme:
    """`{"quant_algo": "FP8" or "NVFP4"}`: a scale for a matrix, or one for 16 neighbours and a second."""
    algorithm = raw.get("quant_algo")
    if algorithm not in ("FP8", "NVFP4"):
        _refuse("unsupported", "expected FP8 or NVFP4", algorithm, f"{KEY}.quant_algo", file)
    if algorithm == "NVFP4" and raw.get("group_size") not in (None, 16):
        _refuse("unsupported", "expected 16", raw["group_size"], f"{KEY}.group_size", file)
    return Scheme("modelopt", format=str(algorithm), file=file, raw=raw)


def _compressed(raw: Mapping[str, Any], file: str) -> Scheme:
    """All groups must say the same of weights; which modules they are of, the tensors show."""
    groups = raw.get("config_groups")
    where = f"{KEY}.config_groups"
    if not isinstance(groups, Mapping) or not groups:
        _refuse("bad-config", "expected an object of groups", groups, where, file)
        raise AssertionError
    said = [g.get("weights") if isinstance(g, Mapping) else None for g in groups.values()]
    weights = said[0]
    if not isinstance(weights, Mapping) or any(w != weights for w in said):
        _refuse("unsupported", "expected one way of quantising weights in all groups", said, where, file)
        raise AssertionError
    return _of_group(raw, weights, f"{where}.weights", file)


def _of_group(raw: Mapping[str, Any], weights: Mapping[str, Any], where: str, file: str) -> Scheme:
    form = raw.get("format")
    formats = [f for g in raw["config_groups"].values() if (f := g.get("format")) not in (None, form)]
    if form not in _FORMATS or formats:
        found = [form, *formats] if formats else form
        _refuse("unsupported", f"expected {' or '.join(_FORMATS)}", found, f"{KEY}.format", file)
    if weights.get("actorder") not in (None, False, *_IN_ORDER):
        _refuse("unsupported", "expected columns in order", weights["actorder"], f"{where}.actorder", file)
    bits, kind, group = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if (bits, kind) not in ((4, "int"), (8, "float"), (4, "float")):
        found = f"{bits} bits, {kind}"
        _refuse("unsupported", "expected 4 bits of int or float, or 8 of float", found, where, file)
    if group is not None and (type(group) is not int or not (group == -1 or 0 < group < 1 << 31)):
        _refuse("bad-config", "expected a whole number from 1, or -1", group, f"{where}.group_size", file)
    block = weights.get("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):  # its older form
        block = [int(n) for n in block.split("x")]
    return Scheme(
        "compressed-tensors",
        _two(block, f"{where}.block_structure", file),
        group if group != -1 else None,
        bits,
        weights.get("symmetric", True) is True,
        str(form),
        file,
        raw=raw,
    )


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


def _of_params(checkpoint: Checkpoint) -> Scheme:
    """`{"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR" or "NO_SCALES"}`."""
    if PARAMS not in checkpoint.documents:
        return Scheme()
    try:
        raw = checkpoint.json(PARAMS).get(IN_PARAMS)
    except CkptToolError:
        return Scheme()
    if not raw:
        return Scheme()
    if not isinstance(raw, Mapping) or raw.get("qformat_weight") != "fp8_e4m3":
        found = raw.get("qformat_weight") if isinstance(raw, Mapping) else raw
        _refuse("unsupported", "expected fp8_e4m3", found, f"{IN_PARAMS}.qformat_weight", PARAMS)
    if raw.get("qscheme_act", "TENSOR") not in ("TENSOR", "NO_SCALES"):
        found = raw["qscheme_act"]
        _refuse("unsupported", "expected TENSOR or NO_SCALES", found, f"{IN_PARAMS}.qscheme_act", PARAMS)
    for key in sorted(set(raw) - {"qformat_weight", "qscheme_act"}):
        _refuse("unsupported", "expected qformat_weight and qscheme_act", key, IN_PARAMS, PARAMS)
    return Scheme(OF_PARAMS, file=PARAMS, place=IN_PARAMS, raw=raw)
