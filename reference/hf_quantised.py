"""What quantised weights in the Hugging Face layout stand for, as the library dequantises them: scales spread
over their blocks and one product. Originals have their own reading, quantised.py.

Sources: transformers 5.23.0, integrations/finegrained_fp8.py (Fp8Dequantize; the block is that of config.json
here, since the library divides rows by rows of scales, another block where the last one is short) and
integrations/mxfp4.py (convert_moe_packed_tensors); compressed-tensors 0.20.1 (unpack_from_int32, unpack_fp4);
nvidia-modelopt 0.47.0 (NVFP4QTensor.dequantize).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

VALUES = (+0.0, +0.5, +1.0, +1.5, +2.0, +3.0, +4.0, +6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Packed:
    """A weight under its plain name: its tensors by name, its shape, and its numbers made of them."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    numbers: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Said:
    """What config.json says: rows and columns that share a scale, neighbours in a row that do, and the bits
    of a code in a word."""

    block: tuple[int, int] | None
    group: int | None
    bits: int


def packed(
    shapes: Shapes, block: tuple[int, int] | None, group: int | None, bits: int = 4
) -> dict[str, Packed]:
    """The quantised weights among these tensors, by their plain names; words hold integers of `bits`. MXFP4
    of experts is transposed, as the class has it in numbers."""
    said = Said(block, group, bits)
    found: dict[str, Packed] = {}
    for name in shapes:
        for end, of in _ENDS.items():
            if not name.endswith(end):
                continue
            plain = name.removesuffix(end)
            made = of(plain, name, shapes, said)
            if made is not None:
                found[made[0]] = made[1]
            break
    return found


def _inverse(plain: str, scales: str, shapes: Shapes, said: Said) -> tuple[str, Packed] | None:
    """`weight` and the scales beside it."""
    codes, block = f"{plain}.weight", said.block
    if shapes.get(codes, ("", ()))[0] == "I8":
        return codes, _integers(codes, scales, shapes, said.group)
    if f"{codes}_scale_2" in shapes and shapes.get(codes, ("", ()))[0] == "U8":
        return codes, _twice(codes, scales, f"{codes}_scale_2", shapes[codes][1])
    if shapes.get(codes, ("", ()))[0] == "U8" and shapes[scales][0] in ("U8", "F8_E8M0"):
        return codes, _by_exponents(codes, scales, shapes[codes][1])
    if shapes.get(codes, ("", ()))[0] != "F8_E4M3":
        return None
    shape = shapes[codes][1]

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        s = powers(held[scales], dtype)
        if s.dim() > 3:
            s = s.squeeze(3).squeeze(1)
        if s.numel() > 1 and block is not None:
            s = s.repeat_interleave(block[0], -2)[..., : shape[-2], :]
            s = s.repeat_interleave(block[1], -1)[..., : shape[-1]]
        elif s.numel() > 1:
            s = s.view(-1, 1)
        return held[codes].to(dtype) * s

    return codes, Packed((codes, scales), shape, numbers)


def _integers(codes: str, scales: str, shapes: Shapes, group: int | None) -> Packed:
    """int8, from which zero points are taken, times scales of the whole or of groups of each row."""
    shape, zero = shapes[codes][1], f"{codes}_zero_point"
    own = (zero,) if zero in shapes else ()

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        made, columns = held[codes].to(dtype), shape[-1]

        def spread(x: Tensor) -> Tensor:
            x = x.to(dtype)
            if x.numel() == 1:
                return x.reshape(1, 1)
            return x.repeat_interleave(group or columns, 1)[:, :columns]

        if own:
            made = made - spread(held[zero])
        return made * spread(held[scales])

    return Packed((codes, scales, *own), shape, numbers)


def _twice(codes: str, scales: str, second: str, shape: tuple[int, ...]) -> Packed:
    """Two codes in a byte, a scale for 16 of them, and one for all."""

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        each = (held[scales].float() * held[second].float()).to(dtype)
        return _lookup(held[codes], dtype) * each.repeat_interleave(16, -1)

    return Packed((codes, scales, second), (*shape[:-1], shape[-1] * 2), numbers)


def _by_exponents(codes: str, scales: str, shape: tuple[int, ...]) -> Packed:
    """Two codes in a byte, an exponent for 32 of them (MXFP4)."""

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return _lookup(held[codes], dtype) * powers(held[scales], dtype).repeat_interleave(32, -1)

    return Packed((codes, scales), (*shape[:-1], shape[-1] * 2), numbers)


def powers(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as numbers; bytes and E8M0 are exponents."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape, dtype=dtype), scales.int() - 127)
    return scales.to(dtype)


def _lookup(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of bytes, two for each along the last dimension."""
    table = torch.tensor(VALUES, dtype=dtype)
    pairs = torch.stack((table[(blocks & 0x0F).int()], table[(blocks >> 4).int()]), dim=-1)
    return pairs.flatten(-2)


def _experts(plain: str, blocks: str, shapes: Shapes, said: Said) -> tuple[str, Packed] | None:
    scales = f"{plain}_scales"
    if scales not in shapes:
        return None
    *lead, rows, count, half = shapes[blocks][1]

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        made = _lookup(held[blocks], dtype) * powers(held[scales], dtype).unsqueeze(-1)
        return made.flatten(-2).transpose(-1, -2).contiguous()

    return plain, Packed((blocks, scales), (*lead, count * half * 2, rows), numbers)


def _words(plain: str, codes: str, shapes: Shapes, of: Said) -> tuple[str, Packed] | None:
    ends = ("scale", "shape", "global_scale", "zero_point")
    scales, said, second, zero = (f"{plain}.weight_{end}" for end in ends)
    if scales not in shapes:
        return None
    rows, width = shapes[codes][1]
    of_bytes = shapes[codes][0] == "U8"

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        s = powers(held[scales], dtype) if second not in held else held[scales].float() / held[second].float()
        if of_bytes:
            made = _lookup(held[codes], dtype)
            return made * s.to(dtype).repeat_interleave(made.shape[1] // s.shape[1], 1)
        columns = int(held[said][1])
        shifts = torch.arange(0, 32, of.bits, dtype=torch.int32)
        mask, group = (1 << of.bits) - 1, of.group or columns
        made = ((held[codes].unsqueeze(-1) >> shifts) & mask).flatten(1)[:, :columns].to(dtype)
        if zero in held:
            middle = ((held[zero].unsqueeze(1) >> shifts[:, None]) & mask).flatten(0, 1)[:rows].to(dtype)
            made = made - middle.repeat_interleave(group, 1)[:, :columns]
        else:
            made = made - (1 << of.bits - 1)
        return made * s.to(dtype).repeat_interleave(group, 1)[:, :columns]

    further = tuple(n for n in (said, second, zero) if n in shapes)
    shape = (rows, width * (2 if of_bytes else 32 // of.bits))
    return f"{plain}.weight", Packed((codes, scales, *further), shape, numbers)


_ENDS = {
    ".weight_scale_inv": _inverse,
    ".weight_packed": _words,
    ".weight_scale": _inverse,
    ".scale": _inverse,
    "_blocks": _experts,
}
