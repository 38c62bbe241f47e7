"""How each tool that quantises says it: what `quantization_config` of config.json, `quantization` of
hf_quant_config.json and of a Mistral params.json mean for the numbers of weights. It is their one reader.

Sources: transformers 5.23.0 (utils/quantization_config.py: FineGrainedFP8Config, FbgemmFp8Config,
Mxfp4Config), compressed-tensors 0.20.1 (QuantizationConfig, CompressionFormat), nvidia-modelopt 0.47.0
(export/quant_utils.py, convert_hf_config.py), AMD Quark 0.12 (torch/quantization/config), vLLM
(model_executor/layers/quantization), AutoFP8 (kv_cache_scheme), mistral params.json of 2025.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.signs import UNPACKED
from ckpt_tool.convert.name_patterns import parsed
from ckpt_tool.convert.params import shown
from ckpt_tool.convert.quantised_config import (
    CONFIG,
    EIGHT,
    IN_PARAMS,
    INTEGERS,
    KEY,
    MX,
    NV,
    OF_MODELOPT,
    OF_PARAMS,
    OF_TEXT,
    OTHER_KEYS,
    PARAMS,
    PATTERN,
    PLACES,
    Scheme,
)
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

Raw = Mapping[str, Any]
MX_BLOCK = (1, 32)  # of MXFP8: the neighbours of a row that share a scale, by the format's definition
# Keys without a bearing on the numbers of the weights, by method; those of `PLACES` are known everywhere.
_FREE = {
    "fp8": ("activation_scheme", "dequantize", "kv_cache_quant_algo", "kv_cache_scheme"),
    "fbgemm_fp8": ("activation_scale_ub",),
    "mxfp4": ("dequantize",),
    "compressed-tensors": (
        "quantization_status", "global_compression_ratio", "version", "kv_cache_scheme", "sparsity_config",
        "transform_config",
    ),
    "modelopt": ("producer", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups"),
    "quark": (
        "quant_mode", "kv_cache_quant_config", "kv_cache_post_rope", "softmax_quant_spec", "version",
        "min_kv_scale", "kv_cache_group",
    ),
}  # fmt: skip
_READ = {
    "fp8": ("fmt", "weight_block_size", "scale_fmt", "expert_dtype"),
    "fbgemm_fp8": (),
    "mxfp4": (),
    "compressed-tensors": ("format", "config_groups"),
    "modelopt": ("quant_algo", "group_size", "quantized_layers"),
    "quark": (
        "global_quant_config", "layer_quant_config", "layer_type_quant_config", "export", "algo_config",
        "exclude",
    ),
}  # fmt: skip
_SAME = {"mxfp8": "fp8", "modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt"}  # read as another method
_IN_ORDER = ("weight", "static")  # of activations, which calibration alone looked at
_ROTATING = ("rotation", "quarot", "spinquant")  # algorithms of Quark after which inputs are rotated as well
ALL_PATTERNS = 10_000  # characters of all patterns of one config.json
_MIXED = "mixed-precision"  # each group says its own format
# What codes are by the format of compressed-tensors: bits and type of its weights, and what that is.
_FORMATS: Mapping[str, Mapping[tuple[Any, Any], str]] = {
    "pack-quantized": {(4, "int"): INTEGERS, (8, "int"): INTEGERS},
    "float-quantized": {(8, "float"): EIGHT},
    "int-quantized": {(8, "int"): INTEGERS},
    "naive-quantized": {(8, "float"): EIGHT, (8, "int"): INTEGERS},
    "nvfp4-pack-quantized": {(4, "float"): NV},
    "mxfp4-pack-quantized": {(4, "float"): MX},
    "mxfp8-quantized": {(8, "float"): EIGHT},
}
# The same by the algorithm of modelopt.
_ALGORITHMS = {
    "FP8": EIGHT,
    "FP8_PER_CHANNEL_PER_TOKEN": EIGHT,
    "FP8_PB": EIGHT,
    "FP8_PB_WO": EIGHT,
    "MXFP8": EIGHT,
    "NVFP4": NV,
    "W4A16_NVFP4": NV,
    "MXFP4": MX,
    "W4A8_MXFP4_FP8": MX,
}
_GROUPS = {NV: 16, MX: 32}  # neighbours that share a scale, by the formats' definition


def scheme_of(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Scheme:
    """What the documents say; `settings` (--set) stand before them. Kinds: `bad-config`, `unsupported`."""
    raw, file = _raw(checkpoint, settings)
    if raw is None:
        return _of_params(checkpoint)
    if not isinstance(raw, Mapping):
        _refuse("bad-config", "expected an object", raw, KEY, file)
    said = raw.get("quant_method")
    method = _SAME.get(said, said) if isinstance(said, str) else said
    if not isinstance(method, str) or method not in _METHODS:
        _refuse("unsupported", f"expected {' or '.join(METHODS)}", said, f"{KEY}.quant_method", file)
    fail_all(_unknown(raw, method, file))
    return _METHODS[method](raw, file)


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
    if found is None and isinstance(text := document.get(OF_TEXT), Mapping):
        found = text.get(KEY) or None
    if found is None and OF_MODELOPT in checkpoint.documents:
        return _modelopt_beside(checkpoint.json(OF_MODELOPT).get("quantization")), OF_MODELOPT
    return found, CONFIG


def _modelopt_beside(said: Any) -> Any:
    """What its file says, as newer releases say it in config.json."""
    if not isinstance(said, Mapping):
        return said
    names = {"exclude_modules": "ignore"}
    return {"quant_method": "modelopt", **{names.get(k, k): v for k, v in said.items()}}


def _refuse(kind: str, expected: str, found: Any, where: str, file: str) -> NoReturn:
    hint = UNPACKED if kind == "unsupported" else f"--set {KEY}='{{...}}' says it, if {file} is wrong"
    fail(kind, f"{expected}, found {shown(found)}", file=file, where=where, hint=hint)


def _unknown(raw: Raw, method: str, file: str) -> Iterator[Problem]:
    known = {"quant_method", *PLACES, *_FREE[method], *_READ[method]}
    for key in sorted(map(str, raw)):
        if key not in known and raw[key] not in (None, False):
            message = f"expected keys that are known of {method}, found {key} = {shown(raw[key])}"
            hint = f"--set {KEY}='{{...}}' without it, if it changes none of the weights' numbers"
            yield Problem("unsupported", message, file, f"{KEY}.{key}", hint)


def _two(block: Any, where: str, file: str) -> tuple[int, int] | None:
    if block is None:
        return None
    fits = isinstance(block, list | tuple) and len(block) == 2
    if not fits or not all(type(n) is int and 0 < n < 1 << 31 for n in block):
        _refuse("bad-config", "expected two whole numbers from 1", block, where, file)
    return block[0], block[1]


# --- fp8 of transformers, and its relatives -------------------------------------------------------------


def _fp8(raw: Raw, file: str) -> Scheme:
    if raw.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        _refuse("unsupported", "expected e4m3", raw["fmt"], f"{KEY}.fmt", file)
    if raw.get("scale_fmt") not in (None, "float", "ue8m0"):
        _refuse("unsupported", "expected float or ue8m0", raw["scale_fmt"], f"{KEY}.scale_fmt", file)
    if raw.get("expert_dtype") not in (None, "fp8"):  # transformers 5.23.0 writes it beside any fp8
        _refuse("unsupported", "expected fp8", raw["expert_dtype"], f"{KEY}.expert_dtype", file)
    block = _two(raw.get("weight_block_size"), f"{KEY}.weight_block_size", file)
    if block is None and raw["quant_method"] == "mxfp8":
        block = MX_BLOCK
    return Scheme("fp8", block, contents=(EIGHT,), file=file, raw=raw)


def _fbgemm(raw: Raw, file: str) -> Scheme:
    """A scale for each row; `activation_scale_ub` bounds what inputs are rounded with."""
    return Scheme("fbgemm_fp8", contents=(EIGHT,), file=file, raw=raw)


def _mxfp4(raw: Raw, file: str) -> Scheme:
    return Scheme("mxfp4", group=32, bits=4, contents=(MX,), file=file, raw=raw)


# --- several ways in one model --------------------------------------------------------------------------


def _together(
    schemes: Sequence[Scheme], where: str, targets: Callable[[], Sequence[tuple[str, ...]]] | None = None
) -> Scheme:
    """One scheme of several groups of weights: what the codes of a weight are, its tensors show. Where a kind
    of codes has more than one block or group, `targets` tell which weights each is of."""
    first = schemes[0]
    contents = tuple(dict.fromkeys(c for s in schemes for c in s.contents))
    eight = {s.block for s in schemes if EIGHT in s.contents}
    integers = {(s.group, s.bits, s.symmetric) for s in schemes if INTEGERS in s.contents}
    for found, words in (
        (eight, "one block for all codes of fp8"),
        (integers, "one group, width and symmetry"),
    ):
        told = targets() if len(found) > 1 and targets is not None else []
        if told and len({t for each in told for t in each}) == sum(map(len, told)):
            apart = tuple(zip(told, schemes, strict=True))
            return Scheme(first.method, contents=contents, file=first.file, raw=first.raw, groups=apart)
        if len(found) > 1:
            said = [[*s] if isinstance(s, tuple) else s for s in sorted(found, key=str)]
            _refuse("unsupported", f"expected {words}", said, where, first.file)
    group, bits, symmetric = next(iter(integers), (first.group, first.bits, True))
    block = next(iter(eight), None)
    return replace(first, block=block, group=group, bits=bits, symmetric=symmetric, contents=contents)


# --- compressed-tensors ---------------------------------------------------------------------------------


def _compressed(raw: Raw, file: str) -> Scheme:
    """Groups that say nothing of weights are of inputs or caches; which modules a group is of, the tensors
    show."""
    groups, where = raw.get("config_groups"), f"{KEY}.config_groups"
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        _refuse("bad-config", "expected an object of groups", groups, where, file)
    said = [g for g in groups.values() if g.get("weights") is not None]
    if not said:
        _refuse("bad-config", "expected a group that says how weights are quantised", groups, where, file)
    fail_all(_beside(raw, file))
    made = []
    for group in said:
        if not isinstance(group["weights"], Mapping):
            _refuse("bad-config", "expected an object", group["weights"], f"{where}.weights", file)
        made.append(_of_group(raw, group, f"{where}.weights", file))
    return replace(_together(made, where, lambda: _all_targets(said, where, file)), raw=raw)


def _all_targets(groups: Iterable[Raw], where: str, file: str) -> list[tuple[str, ...]]:
    """Those of each group. Each weight is held against each pattern, so there is a limit to their length."""
    found = [_targets(group, where, file) for group in groups]
    size = sum(len(t) for targets in found for t in targets if t.startswith(PATTERN))
    if size > ALL_PATTERNS:
        expected = f"expected patterns of at most {ALL_PATTERNS:,} characters in all"
        _refuse("unsupported", expected, size, f"{where}.targets", file)
    return found


def _targets(group: Raw, where: str, file: str) -> tuple[str, ...]:
    """Which modules a group is of, where several must be told apart: by names, patterns or the class."""
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        expected = "expected a list of names, patterns or classes"
        _refuse("bad-config", expected, targets, f"{where}.targets", file)
    for target in targets:
        if target.startswith(PATTERN) and parsed(target.removeprefix(PATTERN)) is None:
            expected = "expected a pattern of letters, points, digits and `.*`, which tells groups apart"
            _refuse("unsupported", expected, target, f"{where}.targets", file)
    return tuple(targets)


def _beside(raw: Raw, file: str) -> Iterator[Problem]:
    """What changes the numbers besides: places of zeros that are left out, and rotations of the inputs."""
    sparse, turned = raw.get("sparsity_config"), raw.get("transform_config")
    form = sparse.get("format") if isinstance(sparse, Mapping) else sparse
    if sparse and form != "dense":
        message = f"expected every number to have a code, found a sparse format ({shown(form)})"
        yield Problem("unsupported", message, file, f"{KEY}.sparsity_config", UNPACKED)
    inner = turned.get("config_groups") if isinstance(turned, Mapping) else turned
    if turned and (inner or not isinstance(turned, Mapping)):
        message = f"expected inputs as the model gives them, found transforms of them ({shown(inner)})"
        yield Problem("unsupported", message, file, f"{KEY}.transform_config", UNPACKED)


def _of_group(raw: Raw, group: Raw, where: str, file: str) -> Scheme:
    weights, form = group["weights"], group.get("format") or raw.get("format")
    if not isinstance(form, str) or form not in _FORMATS:
        _refuse("unsupported", f"expected {' or '.join(_FORMATS)}", form, f"{KEY}.format", file)
    if raw.get("format") not in (form, _MIXED):
        found = [raw.get("format"), form]
        _refuse("unsupported", f"expected one format, or {_MIXED}", found, f"{KEY}.format", file)
    if weights.get("actorder") not in (None, False, *_IN_ORDER):
        expected = "expected the scales of columns in their order, which needs no g_idx"
        _refuse("unsupported", expected, weights["actorder"], f"{where}.actorder", file)
    bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    known = isinstance(bits, int) and isinstance(kind, str)
    content = _FORMATS[form].get((bits, kind)) if known else None
    if content is None:
        expected = " or ".join(f"{b} bits of {k}" for b, k in _FORMATS[form])
        _refuse("unsupported", f"expected {expected} ({form})", f"{bits} bits, {kind}", where, file)
    if size is not None and (type(size) is not int or not (size == -1 or 0 < size < 1 << 31)):
        _refuse("bad-config", "expected a whole number from 1, or -1", size, f"{where}.group_size", file)
    symmetric = weights.get("symmetric", True) is True
    if not symmetric and content != INTEGERS:
        _refuse("unsupported", "expected floating codes around zero", False, f"{where}.symmetric", file)
    block = weights.get("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):  # its older form
        block = [int(n) for n in block.split("x")]
    made = _two(block, f"{where}.block_structure", file)
    if made is not None and content != EIGHT:
        _refuse("unsupported", "expected blocks of fp8 alone", block, f"{where}.block_structure", file)
    if form == "mxfp8-quantized":
        made = MX_BLOCK
    alone = {**raw, "config_groups": {"group": group}}
    return Scheme(
        "compressed-tensors", made, size if size != -1 else None, bits, symmetric, (content,), file, raw=alone
    )


# --- modelopt -------------------------------------------------------------------------------------------


def _modelopt(raw: Raw, file: str) -> Scheme:
    """`{"quant_algo": NAME, "group_size": N}`, or MIXED_PRECISION with such an object for each layer."""
    where = f"{KEY}.quant_algo"
    if raw.get("quant_algo") != "MIXED_PRECISION":
        return _of_algorithm(raw, raw, where, file)
    layers = raw.get("quantized_layers")
    if (
        not isinstance(layers, Mapping)
        or not layers
        or not all(isinstance(e, Mapping) for e in layers.values())
    ):
        _refuse("bad-config", "expected an object of layers", layers, f"{KEY}.quantized_layers", file)
    where = f"{KEY}.quantized_layers"
    known: dict[str, tuple[Raw, list[str]]] = {}  # what is said, and the layers of which it is
    for layer, e in layers.items():
        said = {"quant_algo": e.get("quant_algo"), "group_size": e.get("group_size")}
        known.setdefault(repr(said), (said, []))[1].append(layer)
    made = [_of_algorithm(said, raw, where, file) for said, _ in known.values()]
    return _together(made, where, lambda: [tuple(own) for _, own in known.values()])


def _of_algorithm(said: Raw, raw: Raw, where: str, file: str) -> Scheme:
    algorithm, size = said.get("quant_algo"), said.get("group_size")
    content = _ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    if content is None:
        _refuse("unsupported", f"expected {' or '.join(_ALGORITHMS)}", algorithm, where, file)
    block = {"MXFP8": MX_BLOCK, "FP8_PB": (128, 128), "FP8_PB_WO": (128, 128)}.get(str(algorithm))
    wanted = 32 if algorithm == "MXFP8" else _GROUPS.get(content)
    if wanted is not None and size not in (None, wanted):
        _refuse("unsupported", f"expected {wanted}", size, f"{KEY}.group_size", file)
    return Scheme("modelopt", block, contents=(content,), file=file, raw=raw)


# --- Quark ----------------------------------------------------------------------------------------------


def _quark(raw: Raw, file: str) -> Scheme:
    """An object for all layers, and others for some of them, by name and by type."""
    export, where = raw.get("export"), f"{KEY}.export.weight_format"
    if isinstance(export, Mapping) and export.get("weight_format", "real_quantized") != "real_quantized":
        _refuse("unsupported", "expected real_quantized", export["weight_format"], where, file)
    if turned := [a for a in _algorithms(raw.get("algo_config")) if any(r in a for r in _ROTATING)]:
        expected = "expected inputs as the model gives them"
        _refuse("unsupported", expected, turned[0], f"{KEY}.algo_config", file)
    made = [
        _of_spec(spec, raw, where, file)
        for where, group in _quark_groups(raw)
        for spec in [group.get("weight")]
        if spec is not None
    ]
    if not made:
        where = f"{KEY}.global_quant_config"
        _refuse(
            "bad-config", "expected how weights are quantised", raw.get("global_quant_config"), where, file
        )
    return _together(made, KEY)


def _algorithms(said: Any) -> list[str]:
    listed = said if isinstance(said, list) else [said]
    return [str(a.get("name", "")).lower() for a in listed if isinstance(a, Mapping)]


def _quark_groups(raw: Raw) -> Iterator[tuple[str, Raw]]:
    if isinstance(raw.get("global_quant_config"), Mapping):
        yield f"{KEY}.global_quant_config.weight", raw["global_quant_config"]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        groups = raw.get(key)
        for group in groups.values() if isinstance(groups, Mapping) else ():
            if isinstance(group, Mapping):
                yield f"{KEY}.{key}.weight", group


def _of_spec(spec: Any, raw: Raw, where: str, file: str) -> Scheme:
    """{"dtype": "fp8_e4m3", "qscheme": "per_tensor" or "per_channel"}, or "fp4" in groups of 32 with
    exponents for scales."""
    if isinstance(spec, list) and len(spec) == 1:  # its newer form
        spec = spec[0]
    if not isinstance(spec, Mapping):
        _refuse("unsupported", "expected one way of quantising a weight", spec, where, file)
    kind, how = spec.get("dtype"), spec.get("qscheme")
    if kind == "fp8_e4m3" and (
        how == "per_tensor" or (how == "per_channel" and spec.get("ch_axis") in (None, 0))
    ):
        return Scheme("quark", contents=(EIGHT,), file=file, raw=raw)
    four = (how, spec.get("group_size"), spec.get("scale_format")) == ("per_group", 32, "e8m0")
    if kind in ("fp4", "mxfp4") and four:
        return Scheme("quark", contents=(MX,), file=file, raw=raw)
    found = ", ".join(
        f"{k} {spec.get(k)}" for k in ("dtype", "qscheme", "group_size") if spec.get(k) is not None
    )
    expected = "expected fp8_e4m3 per tensor or per channel, or fp4 in groups of 32 with e8m0 scales"
    _refuse("unsupported", expected, found, where, file)


# --- params.json ----------------------------------------------------------------------------------------


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
        where = f"{IN_PARAMS}.qformat_weight"
        _refuse("unsupported", "expected fp8_e4m3", found, where, PARAMS)
    if raw.get("qscheme_act", "TENSOR") not in ("TENSOR", "NO_SCALES"):
        found = raw["qscheme_act"]
        _refuse("unsupported", "expected TENSOR or NO_SCALES", found, f"{IN_PARAMS}.qscheme_act", PARAMS)
    for key in sorted(set(raw) - {"qformat_weight", "qscheme_act"}):
        _refuse("unsupported", "expected qformat_weight and qscheme_act", key, IN_PARAMS, PARAMS)
    return Scheme(OF_PARAMS, contents=(EIGHT,), file=PARAMS, place=IN_PARAMS, raw=raw)


_METHODS = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "quark": _quark,
}
METHODS = tuple(_METHODS)
