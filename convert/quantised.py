"""A quantised weight as one thing: its codes, its scales, and what else belongs to it.

`found_in` looks through a checkpoint for them: by their names, and then by what they are, since a dtype alone
says nothing. The codes' dtype, the shape of the grid of scales and the block that the documents say must
agree; nothing is derived by dividing rows by scales, because a last block may be short.

Facts: transformers 5.23.0 (finegrained_fp8, mxfp4), deepseek-ai/DeepSeek-V3 (inference/kernel.py: blocks of
the config, the last one short), compressed-tensors 0.20.1, openai/gpt-oss (gpt_oss/torch/weights.py), Mistral
originals of 2025 (qscale_weight, qscale_act).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.signs import UNPACKED
from ckpt_tool.convert.one_by_one import is_stacked, stacked_from
from ckpt_tool.convert.quantised_config import EIGHT, INTEGERS, KEY, MX, NV, OF_PARAMS, Scheme
from ckpt_tool.convert.quantised_methods import scheme_of
from ckpt_tool.errors import Problem, fail_all
from ckpt_tool.records import dataclass

E4M3, E8M0 = "F8_E4M3", ("U8", "F8_E8M0")
NUMBERS = ("F32", "BF16", "F16", "F64")  # in which scales are stored that are no bare exponents
WORD, PAIR = "I32", "U8"  # elements of several codes: as many as their bits allow, and two of four bits
MX_GROUP, NV_GROUP = 32, 16  # neighbours that share a scale, by the formats' definition


@dataclass(frozen=True)
class QuantFormat:
    """How the tensors of one weight are called: by what stands after a stem that they share. `plain` is the
    end of the weight's name in a model that is not quantised. `packed` codes are several in one element.
    `own_rows` says that a family has rows for the codes and scales themselves, `turned` that the class has
    the last two dimensions of its numbers the other way round than those of its codes."""

    name: str
    codes: str
    scales: str
    plain: str
    dtypes: tuple[str, ...]
    activation: str = ""
    caches: bool = True  # whether loaders know scales of what attention caches (`CACHES`) beside it
    shape: str = ""
    zeros: str = ""
    shift: str = ""  # the zero point of the inputs
    second: str = ""  # one more scale, of the whole tensor
    multiplied: bool = False  # that the second one is a factor, no divisor
    packed: bool = False
    own_rows: bool = False
    turned: bool = False
    spread: bool = False  # scales of blocks are (rows, 1, columns, 1)

    @property
    def others(self) -> dict[str, str]:
        """What else belongs to a weight, by what it is."""
        found = {n: getattr(self, n) for n in ("activation", "shape", "zeros", "shift", "second")}
        caches = {what: end for what, (end, _) in CACHES.items()} if self.caches else {}
        return {n: end for n, end in (found | caches).items() if end}

    def end(self, what: str) -> str:
        """How the name ends of "codes", "scales" or one of the others; empty where there is none."""
        return str(getattr(self, what)) if what in ("codes", "scales") else self.others.get(what, "")


# What is rounded beside a projection, with scales for it: how their names end, and which projection it is
# that one of the whole attention belongs to (llm-compressor; vLLM's kv_scale is of keys and values, and
# AMD Quark's output_scale of what a projection gives).
CACHES = {
    "keys": (".k_scale", "k_proj"),
    "cached": (".v_scale", "v_proj"),
    "both": (".kv_scale", "k_proj"),
    "queries": (".q_scale", "q_proj"),
    "outputs": (".output_scale", ""),
}
QSCALE = QuantFormat("qscale", ".weight", ".qscale_weight", ".weight", (E4M3,), ".qscale_act", caches=False)
TRANSFORMERS = QuantFormat(
    "transformers", ".weight", ".weight_scale_inv", ".weight", (E4M3,), ".activation_scale"
)
VLLM = QuantFormat("vllm", ".weight", ".weight_scale", ".weight", (E4M3,), ".input_scale")
SPREAD = replace(VLLM, name="modelopt-blocks", spread=True)  # told by the shape of its scales
FORMATS = (
    TRANSFORMERS,
    QuantFormat("deepseek", ".weight", ".scale", ".weight", (E4M3,)),
    VLLM,
    QuantFormat(
        "int8",
        ".weight",
        ".weight_scale",
        ".weight",
        ("I8",),
        ".input_scale",
        zeros=".weight_zero_point",
        shift=".input_zero_point",
    ),
    QuantFormat(
        "modelopt",
        ".weight",
        ".weight_scale",
        ".weight",
        ("U8",),
        ".input_scale",
        second=".weight_scale_2",
        multiplied=True,
        packed=True,
    ),
    QSCALE,
    QuantFormat(
        "compressed-tensors",
        ".weight_packed",
        ".weight_scale",
        ".weight",
        ("I32", "U8"),
        ".input_global_scale",
        shape=".weight_shape",
        zeros=".weight_zero_point",
        second=".weight_global_scale",
        packed=True,
    ),
    QuantFormat("mxfp4-dotted", ".blocks", ".scales", "", ("U8",), packed=True, own_rows=True, caches=False),
    QuantFormat(
        "mxfp4", "_blocks", "_scales", "", ("U8",), caches=False, packed=True, own_rows=True, turned=True
    ),
)
_USUAL = {
    "fp8": "transformers",
    "mxfp4": "transformers",
    **dict.fromkeys(("fbgemm_fp8", "modelopt", "quark", "compressed-tensors"), "vllm"),
    OF_PARAMS: "qscale",
}
_ENDS = tuple(dict.fromkeys(f.codes for f in FORMATS))
_CODES = frozenset(d for f in FORMATS for d in f.dtypes)

# What a weight's numbers are made of.
FP8_TENSOR, FP8_ROWS, FP8_BLOCKS = (
    "fp8, a scale for each tensor",
    "fp8, a scale for each row",
    "fp8 in blocks",
)
MXFP4, INT4, INT8, NVFP4 = "MXFP4", "int4 in groups", "int8", "NVFP4"
_FP8 = (FP8_TENSOR, FP8_ROWS, FP8_BLOCKS)
_KINDS = {EIGHT: _FP8, MX: (MXFP4,), INTEGERS: (INT4, INT8), NV: (NVFP4,)}  # by what a scheme says codes are


@dataclass(frozen=True, slots=True)
class Quantised:
    """One weight. `shape` is that of its numbers, `kind` what they are made of (above), `block` how many of
    each of its last two dimensions share a scale. `others` are its further tensors by what they are."""

    name: str
    form: QuantFormat
    kind: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    codes: TensorInfo
    scales: TensorInfo
    others: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The format with its block, as people say it."""
        if self.kind == FP8_BLOCKS:
            return f"fp8 in blocks of {self.block[0]} x {self.block[1]}"
        if self.kind not in (INT4, INT8):
            return self.kind
        shifted = " with zero points" * ("zeros" in self.others)
        if self.kind == INT4 or self.block[1] != self.shape[-1]:
            return f"{self.kind[:4]} in groups of {self.block[1]}{shifted}"
        return f"int8, a scale for each {'tensor' if self.of_all else 'row'}{shifted}"

    @property
    def of_all(self) -> bool:
        """Whether its scale is one of the whole tensor."""
        return self.kind == FP8_TENSOR or (self.kind == INT8 and self.block == self.shape[-2:])

    @property
    def together(self) -> int:
        """How many codes are in one element."""
        if self.codes.dtype == WORD:
            return 32 // (8 if self.kind == INT8 else 4)
        return 2 if self.codes.dtype == PAIR else 1

    @property
    def rounds_scales(self) -> bool:
        """Whether bfloat16 may not hold the scales, so that the recipes differ."""
        return self.scales.dtype not in ("BF16", E4M3, *E8M0)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, *self.others.values()


@dataclass(frozen=True)
class Inventory:
    """The quantised weights of a checkpoint by the names of their numbers, and what the documents say.
    `beside` are scales of caches that a plain projection fills, by the name of its weight."""

    checkpoint: Checkpoint
    weights: Mapping[str, Quantised]
    scheme: Scheme
    beside: Mapping[str, Sequence[TensorInfo]] = field(default_factory=dict)

    @cached_property
    def parts(self) -> frozenset[tuple[str, str]]:
        """(file, name) of all tensors that belong to one."""
        return frozenset((t.file, t.name) for w in self.weights.values() for t in w.parts)

    @property
    def words(self) -> list[str]:
        """Each format that there is, once."""
        return list(dict.fromkeys(w.words for w in self.weights.values()))


def scaled_by_rows(inventory: Inventory) -> bool:
    """Whether all are fp8 with a scale for each row."""
    return all(w.kind == FP8_ROWS for w in inventory.weights.values())


def found_in(checkpoint: Checkpoint, settings: Mapping[str, Any] | None = None) -> Inventory | None:
    """The quantised weights of `checkpoint`; None where there are none. `settings` (--set) stand before what
    config.json says of blocks. Kinds: `missing-tensor` (scales), `shape-mismatch` (of a grid),
    `unsupported-dtype`, `missing-fact` (a block), `duplicate-tensor`, `config-mismatch`, `unsupported`."""
    of_codes = [t for t in checkpoint if t.dtype in _CODES]
    if not of_codes:  # as in nearly all, of however many tensors
        return None
    fail_all(_stacked(of_codes))
    candidates = [t for t in of_codes if t.name.endswith(_ENDS)]
    if not candidates:
        return None
    candidates = list({t.name: t for t in candidates}.values())
    tensors = {t.name: t for t in checkpoint if t.name.endswith(_KNOWN_ENDS)}
    named = [(t, f) for t in candidates for f in _formats_of(t, tensors)]
    of_files = {t for t, _ in named}
    alone = [t for t in candidates if t not in of_files and _are_codes(t)]
    if not named and not alone:
        return None
    scheme = scheme_of(checkpoint, settings or {})
    if not named and not scheme.said:
        return None
    usual = named[0][1] if named else next(f for f in FORMATS if f.name == _USUAL[scheme.method])
    problems = [*_repeated(checkpoint, {t.name for t, _ in named}), *(_no_scales(t, usual) for t in alone)]
    weights: dict[str, Quantised] = {}
    for t, form in named:
        made = _quantised(t, form, tensors, scheme, checkpoint)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            weights[made.name] = made
    problems += [*_not_as_said(weights, scheme), *_shared_blocks(weights, checkpoint)]
    fail_all([*problems, *_plain_twins(weights, checkpoint)])
    found = Inventory(checkpoint, weights, scheme)
    return replace(found, beside=_beside_plain(found, tensors))


# How names end of what belongs to a weight and is none, as a plain model has it.
OF_WEIGHTS = tuple({e for f in FORMATS for e in (f.codes, f.scales, *f.others.values())} - {".weight"})
# What changes the numbers besides, and nobody here applies: left out, they would be others.
_APPLIED = {
    ".weight_g_idx": "another order of its columns",
    ".pre_quant_scale": "scales of what it is given",
    ".svdquant_lora_a": "a part of it beside the codes",
}
_KNOWN_ENDS = tuple({*_ENDS, *OF_WEIGHTS, *_APPLIED})


def _formats_of(t: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Iterator[QuantFormat]:
    """The first format whose codes it may be, with scales beside them; codes that no plain tensor is called
    are codes without any."""
    fitting = [f for f in FORMATS if t.name.endswith(f.codes) and t.dtype in f.dtypes]
    yield from [f for f in fitting if _stem(t, f) + f.scales in tensors][:1] or [
        f for f in fitting if f.codes == ".weight_packed"
    ]


def _stem(t: TensorInfo, form: QuantFormat) -> str:
    return t.name[: -len(form.codes)]


def _are_codes(t: TensorInfo) -> bool:
    """Whether a tensor without scales is codes all the same, beside others that are."""
    if t.dtype == E4M3:
        return t.name.endswith(".weight") and len(t.shape) > 1
    return t.dtype == "U8" and len(t.shape) > 2 and t.shape[-1] == MX_GROUP // 2


WHOLE = "get the whole release: codes alone are no weight"


def _no_scales(t: TensorInfo, form: QuantFormat) -> Problem:
    form = next((f for f in FORMATS if f.own_rows and t.name.endswith(f.codes)), form)
    name = _stem(t, form) + form.scales
    message = f"expected the scales of {t.name}, whose {t.dtype} are codes, found none"
    return Problem("missing-tensor", message, t.file, name, WHOLE)


# Of fp8 without any scales: it may be a plain cast, or what is left of a release.
ALONE = (
    "codes of fp8 without their scales are no weights: get the whole release; of a plain cast, "
    "`.to(torch.bfloat16)` in torch makes numbers, exactly"
)


def _stacked(of_codes: Iterable[TensorInfo]) -> Iterator[Problem]:
    """Experts in one tensor that no family holds so, and has therefore none of them apart (`codes_apart`).
    Numbers that transformers makes of them are no way out: 5.23.0 finds no scales beside stacked codes where
    it dequantises, and takes the codes as numbers."""
    for t in of_codes:
        if t.dtype == E4M3 and len(t.shape) == 3 and t.name.endswith(("_proj", "experts.w1", "experts.w2")):
            message = f"expected codes of fp8 for each expert by itself, found those of {t.shape[0]} stacked"
            hint = (
                "split codes and scales by their first dimension, to the names that the release has: "
                "...experts.E.NAME.weight beside ...experts.E.NAME.weight_scale_inv"
            )
            yield Problem("unsupported", message, t.file, t.name, hint)


def _shared_blocks(weights: Mapping[str, Quantised], checkpoint: Checkpoint) -> Iterator[Problem]:
    """Gate and up of stacked experts, the last block of the first of which is short: by the grid of the whole
    it would hold rows of both, by those of its parts it does not."""
    for w in weights.values() if is_stacked(checkpoint) else ():
        rows, whole = w.codes.shape[0], stacked_from(checkpoint, w.codes)
        if w.kind == FP8_BLOCKS and rows % w.block[0] and whole.shape[1:-1] == (2 * rows,):
            message = (
                f"expected gate and up of {rows} rows to end at whole blocks of {w.block[0]}, found a block "
                "of the stacked codes with rows of both, and nothing tells whose scale it has"
            )
            hint = "split them apart where they were made, with the scales that each had"
            yield Problem("unsupported", message, whole.file, whole.name, hint)


def _repeated(checkpoint: Checkpoint, names: set[str]) -> Iterator[Problem]:
    """Files of ranks have a name each; nobody shares out codes and scales so."""
    seen: dict[str, str] = {}
    for t in checkpoint:
        if t.name in names and seen.setdefault(t.name, t.file) != t.file:
            message = f"expected quantised weights in one file each, found this one in {seen[t.name]} too"
            yield Problem("unsupported", message, t.file, t.name)


def _plain_twins(weights: Mapping[str, Quantised], checkpoint: Checkpoint) -> Iterator[Problem]:
    for t in checkpoint if any(w.form.packed for w in weights.values()) else ():
        weight = weights.get(t.name)
        if weight is not None and weight.form.packed and weight.codes.name != t.name:
            message = f"expected codes or numbers of one weight, found {weight.codes.name} beside it"
            yield Problem("duplicate-tensor", message, t.file, t.name)


def _not_as_said(weights: Mapping[str, Quantised], scheme: Scheme) -> Iterator[Problem]:
    """The first weight that is not made of what the documents say."""

    def fits(w: Quantised) -> bool:
        return any(w.kind in _KINDS[c] for c in (scheme.of(w.name) or scheme).contents)

    odd = next((w for w in weights.values() if scheme.said and not fits(w)), None)
    if odd is not None:
        contents = " or ".join((scheme.of(odd.name) or scheme).contents)
        message = f"expected codes of {contents}, as {scheme.file} says, found {odd.kind}"
        hint = f"--set {KEY}='{{...}}' says what the tensors are, if {scheme.file} is wrong"
        yield Problem("config-mismatch", message, odd.codes.file, odd.codes.name, hint)


def _quantised(
    codes: TensorInfo,
    form: QuantFormat,
    tensors: Mapping[str, TensorInfo],
    scheme: Scheme,
    checkpoint: Checkpoint,
) -> Quantised | Problem:
    stem = _stem(codes, form)
    said, scheme = scheme, scheme.of(stem + form.plain) or scheme
    if said.groups and scheme is said:
        return _of_no_group(codes, scheme)
    scales = tensors.get(stem + form.scales)
    if scales is None:
        return _no_scales(codes, form)
    named = {what: [stem + end, *_of_attention(stem, what, end)] for what, end in form.others.items()}
    others = {what: tensors[n] for what, names in named.items() for n in names[::-1] if n in tensors}
    unit = Quantised(stem + form.plain, form, "", codes.shape, (1, 1), codes, scales, others)
    if (odd := _odd_activation(unit) or _applied(stem, tensors)) is not None:
        return odd
    if not form.packed:
        return _int8(unit, scheme) if codes.dtype == "I8" else _fp8(unit, scheme)
    if form.own_rows:
        return _mxfp4_blocks(unit)
    return _packed(unit, scheme, checkpoint)


def _of_no_group(codes: TensorInfo, scheme: Scheme) -> Problem:
    groups = (
        "an entry of quantized_layers"
        if "quantized_layers" in (scheme.raw or {})
        else "a group of config_groups"
    )
    message = f"expected {groups} that is of this weight, to say what its codes are, found none"
    hint = f"--set {KEY}='{{...}}' says it, with one for it"
    return Problem("missing-fact", message, codes.file, codes.name, hint)


def _applied(stem: str, tensors: Mapping[str, TensorInfo]) -> Problem | None:
    for end, words in _APPLIED.items():
        if (t := tensors.get(stem + end)) is not None:
            message = f"expected codes and scales to make the numbers of {stem}, found {words}"
            return Problem("unsupported", message, t.file, t.name, UNPACKED)
    return None


def _of_attention(stem: str, what: str, end: str) -> list[str]:
    """The name that llm-compressor gives the scale of a cache: of the attention whose projection fills it."""
    outer, _, last = stem.rpartition(".")
    return [outer + end] if CACHES.get(what, ("", ""))[1] == last else []


def _beside_plain(inventory: Inventory, tensors: Mapping[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Scales of caches that belong to no codes, where the projection itself is there, or the attention's."""
    found: dict[str, list[TensorInfo]] = {}
    for t in tensors.values():
        end, last = next(((e, p) for e, p in CACHES.values() if t.name.endswith(e)), ("", ""))
        if not end or (t.file, t.name) in inventory.parts or _odd_cache(t):
            continue
        stem = t.name.removesuffix(end)
        of = [f"{stem}.weight", *([f"{stem}.{last}.weight"] if last else ())]
        if (weight := next((n for n in of if inventory.checkpoint.find(n)), None)) is not None:
            found.setdefault(weight, []).append(t)
    return found


def _made(unit: Quantised, kind: str, block: tuple[int, int], shape: tuple[int, ...] = ()) -> Quantised:
    return Quantised(
        unit.name, unit.form, kind, shape or unit.shape, block, unit.codes, unit.scales, unit.others
    )


def _odd_activation(unit: Quantised) -> Problem | None:
    """The scale of the inputs, or of what is cached, is one number; of caches there may be one for each
    head."""
    for what, t in unit.others.items():
        if _odd_cache(t) if what in CACHES else what == "activation" and (_odd_cache(t) or t.numel != 1):
            message = f"expected one number, a scale of inputs or of the cache, found {t.dtype} {t.shape}"
            hint = f"if the numbers of weights have nothing to do with it, --drop {t.name}"
            return Problem("unsupported", message, t.file, t.name, hint)
    return None


def _odd_cache(t: TensorInfo) -> bool:
    return t.dtype not in NUMBERS or t.numel != max(t.shape, default=1)


def _odd_dtype(t: TensorInfo, expected: tuple[str, ...]) -> Problem:
    message = f"expected scales in {' or '.join(expected)}, found {t.dtype}"
    return Problem("unsupported-dtype", message, t.file, t.name)


# --- fp8 ------------------------------------------------------------------------------------------------


def _fp8(unit: Quantised, scheme: Scheme) -> Quantised | Problem:
    codes, scales = unit.codes, unit.scales
    if scales.dtype not in (*NUMBERS, *E8M0):
        return _odd_dtype(scales, (*NUMBERS, *E8M0))
    if len(codes.shape) < 2:
        message = f"expected codes of a matrix, found shape {codes.shape}"
        return Problem("unsupported", message, codes.file, codes.name)
    rows, columns = codes.shape[-2:]
    if scales.numel == 1 and scheme.block is None:
        return _made(unit, FP8_TENSOR, (rows, columns))
    if len(codes.shape) == 2 and scheme.block is None and scales.shape in ((rows,), (rows, 1)):
        return _made(unit, FP8_ROWS, (1, columns))
    if scheme.block is None:
        return _no_block(unit, scheme)
    block = scheme.block
    if unit.form is VLLM and len(scales.shape) == 4 and scales.shape[1::2] == (1, 1):  # modelopt's FP8_PB_WO
        unit = replace(unit, form=SPREAD, scales=replace(scales, shape=scales.shape[::2]))
        scales = unit.scales
    expected = (*codes.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scales.shape != expected:
        return _wrong_grid(unit, scheme, expected)
    return _made(unit, FP8_BLOCKS, block)


def _no_block(unit: Quantised, scheme: Scheme) -> Problem:
    """A grid without a block in the documents, or a shape that no grid has."""
    scales = unit.scales
    if len(scales.shape) != len(unit.codes.shape) or scheme.file == "params.json":
        rows = unit.codes.shape[-2]
        message = f"expected one scale, or one for each of {rows} rows, found shape {scales.shape}"
        return Problem("shape-mismatch", message, scales.file, scales.name)
    if scheme.said:
        message = f"expected one scale, as {KEY} says no block, found a grid of shape {scales.shape}"
        return Problem("config-mismatch", message, scales.file, scales.name, _SET_BLOCK)
    message = f"expected {KEY} beside a grid of scales of shape {scales.shape}, to say which block has one"
    return Problem("missing-fact", message, "config.json", f"{KEY}.weight_block_size", _SET_BLOCK)


_SET_BLOCK = (
    f'--set {KEY}=\'{{"quant_method": "fp8", "weight_block_size": [128, 128]}}\', with the block of the model'
)


def _wrong_grid(unit: Quantised, scheme: Scheme, expected: tuple[int, ...]) -> Problem:
    bm, bn = unit.codes.shape[-2:] if scheme.block is None else scheme.block
    message = (
        f"expected scales of shape {expected}, one for each block of {bm} x {bn} ({scheme.file}), of codes "
        f"of shape {unit.codes.shape}, found {unit.scales.shape}"
    )
    hint = "the block of config.json must be that of the tensors; a last block may be short"
    return Problem("shape-mismatch", message, unit.scales.file, unit.scales.name, hint)


# --- four bits ------------------------------------------------------------------------------------------


def _mxfp4_blocks(unit: Quantised) -> Quantised | Problem:
    """Codes (..., rows, blocks, 16) and scales (..., rows, blocks)."""
    codes, scales = unit.codes, unit.scales
    if scales.dtype not in E8M0:
        return _odd_dtype(scales, E8M0)
    if len(codes.shape) < 3 or codes.shape[-1] != MX_GROUP // 2:
        message = f"expected blocks of 16 bytes (32 codes) in the last dimension, found shape {codes.shape}"
        return Problem("shape-mismatch", message, codes.file, codes.name)
    if scales.shape != codes.shape[:-1]:
        message = f"expected scales of shape {codes.shape[:-1]}, one for each block, found {scales.shape}"
        return Problem("shape-mismatch", message, scales.file, scales.name)
    shape = (*codes.shape[:-2], codes.shape[-2] * MX_GROUP)
    return _made(unit, MXFP4, (1, MX_GROUP), shape)


def _packed(unit: Quantised, scheme: Scheme, checkpoint: Checkpoint) -> Quantised | Problem:
    """What compressed-tensors packs: int4 in words, or two codes of E2M1 in a byte."""
    codes = unit.codes
    if len(codes.shape) != 2:
        message = f"expected packed codes of a matrix, found shape {codes.shape}"
        return Problem("shape-mismatch", message, codes.file, codes.name)
    if codes.dtype == WORD:
        return _words(unit, scheme, checkpoint)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    second = unit.others.get("second")
    if second is not None and (second.dtype, second.numel) != ("F32", 1):
        message = f"expected one number in F32, a scale of the whole, found {second.dtype} {second.shape}"
        return Problem("unsupported", message, second.file, second.name)
    if unit.scales.dtype in E8M0:
        made = _made(unit, MXFP4, (1, MX_GROUP), (rows, columns))
    elif unit.scales.dtype == E4M3 and "second" in unit.others:
        made = _made(unit, NVFP4, (1, NV_GROUP), (rows, columns))
    elif unit.scales.dtype == E4M3:
        message = f"expected a scale of the whole beside those of groups ({NVFP4}), found none"
        return Problem(
            "missing-tensor", message, codes.file, _stem(codes, unit.form) + unit.form.second, WHOLE
        )
    else:
        message = f"expected scales in U8 (MXFP4), or F8_E4M3 with a global scale, found {unit.scales.dtype}"
        return Problem("unsupported-dtype", message, unit.scales.file, unit.scales.name, UNPACKED)
    return made if _fits_groups(made) else _wrong_groups(made)


def _fits_groups(unit: Quantised) -> bool:
    rows, columns = unit.shape
    return columns % unit.block[1] == 0 and unit.scales.shape == (rows, columns // unit.block[1])


def _wrong_groups(unit: Quantised) -> Problem:
    rows, columns = unit.shape
    message = (
        f"expected scales of shape {(rows, -(-columns // unit.block[1]))}, one for {unit.block[1]} "
        f"neighbours in a row, of codes of shape {unit.codes.shape}, found {unit.scales.shape}"
    )
    return Problem("shape-mismatch", message, unit.scales.file, unit.scales.name)


# --- integers -------------------------------------------------------------------------------------------


def _int8(unit: Quantised, scheme: Scheme) -> Quantised | Problem:
    """A code in each element, with one scale, or one for each row or group of neighbours in it."""
    codes, scales = unit.codes, unit.scales
    if scales.dtype not in NUMBERS:
        return _odd_dtype(scales, NUMBERS)
    if len(codes.shape) != 2:
        message = f"expected codes of a matrix, found shape {codes.shape}"
        return Problem("unsupported", message, codes.file, codes.name)
    rows, columns = codes.shape
    if scheme.group is None and scales.numel == 1:
        made = _made(unit, INT8, (rows, columns))
    else:
        group = scheme.group or columns
        made = _made(unit, INT8, (1, group))
        if scales.shape != (rows, -(-columns // group)):
            return _wrong_groups(made)
    return _odd_zeros(made, scheme) or made


def _words(unit: Quantised, scheme: Scheme, checkpoint: Checkpoint) -> Quantised | Problem:
    """Several codes in a word, the last word of a row padded: `weight_shape` says how many columns count."""
    codes, scales = unit.codes, unit.scales
    if scales.dtype not in NUMBERS:
        return _odd_dtype(scales, NUMBERS)
    kind = INT8 if scheme.bits == 8 else INT4
    each = _made(unit, kind, (1, 1)).together
    if (shape := unit.others.get("shape")) is None:
        message = "expected this tensor, which says how many columns of the codes count, found none"
        return Problem("missing-tensor", message, codes.file, _stem(codes, unit.form) + unit.form.shape)
    said = _shape_said(shape, checkpoint)
    if said is None or said[0] != codes.shape[0] or -(-said[1] // each) != codes.shape[1]:
        if scheme.bits is None:
            return _unsaid("expected config.json to say how many bits a code has, found nothing")
        held = f"{codes.shape} words of {each} codes ({kind[:4]})"
        message = f"expected rows and columns that {held} hold, found {said}"
        return Problem("shape-mismatch", message, shape.file, shape.name)
    if scheme.of_rows and scales.shape != (said[0], 1):
        message = f"expected one scale for each of {said[0]} rows, as {scheme.file} says (group_size -1)"
        hint = "group_size in a copy of the file must be that of the tensors"
        found = f"found scales of shape {scales.shape}"
        return Problem("config-mismatch", f"{message}, {found}", scales.file, scales.name, hint)
    if scheme.group is None and scales.shape != (said[0], 1):
        return _unsaid("expected config.json to say how many neighbours share a scale, found nothing")
    group = scheme.group or said[1]
    made = _made(unit, kind, (1, group), said)
    if scales.shape != (said[0], -(-said[1] // group)):
        return _wrong_groups(made)
    return _odd_zeros(made, scheme) or made


def _unsaid(message: str) -> Problem:
    hint = f"--set {KEY}='{{...}}', as the release says it"
    return Problem("missing-fact", message, "config.json", f"{KEY}.config_groups", hint)


def _odd_zeros(unit: Quantised, scheme: Scheme) -> Problem | None:
    """Zero points are codes as well, one for each scale: in words those of several rows."""
    zeros, called = unit.others.get("zeros"), _stem(unit.codes, unit.form) + unit.form.zeros
    if zeros is None:
        if scheme.symmetric:
            return None
        message = f"expected zero points, as {scheme.file} says that codes are not symmetric, found none"
        return Problem("missing-tensor", message, unit.codes.file, called)
    if scheme.said and scheme.symmetric:
        message = f"expected symmetric codes, as {scheme.file} says, found zero points"
        return Problem("config-mismatch", message, zeros.file, zeros.name)
    packed, dtype = unit.form.packed, unit.codes.dtype
    expected = (-(-unit.shape[0] // unit.together), unit.scales.shape[1]) if packed else unit.scales.shape
    if zeros.dtype == dtype and zeros.shape == expected:
        return None
    words = f", those of {unit.together} rows in a word" * packed
    message = f"expected zero points {dtype} {expected}{words}, found {zeros.dtype}"
    return Problem("shape-mismatch", f"{message} {zeros.shape}", zeros.file, zeros.name)


def _shape_said(shape: TensorInfo, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The numbers in a `weight_shape`: the only bytes of a tensor that a plan reads."""
    if shape.shape != (2,) or shape.dtype not in ("I64", "I32"):
        return None
    data = bytearray(shape.nbytes)
    checkpoint.read_into(shape, 0, memoryview(data))
    half = len(data) // 2
    rows, columns = (int.from_bytes(data[k : k + half], "little", signed=True) for k in (0, half))
    return (rows, columns) if 0 < rows < 1 << 40 and 0 < columns < 1 << 40 else None
