"""What the codes of an original's quantised weights stand for, block by block as its publishers' kernels have
it. The Hugging Face side has its own reading, hf_quantised.py.

Sources: deepseek-ai/DeepSeek-V3 0623163, inference/kernel.py (a scale for each block, the last ones short);
Mistral originals of 2025 (qscale_weight multiplies); openai/gpt-oss 7b58334, gpt_oss/torch/weights.py (pairs
of four bits, the low one first, exponents from 127); compressed-tensors 0.20.1
(pack_quantized: codes from -8); modelopt 0.47 (NVFP4QTensor: the second scale is a factor; MXFP4QTensor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# The positive numbers of four bits; the other half are the same with the sign.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BESIDE = ("qscale_weight", "weight_scale_inv", "weight_scale", "scale")


@dataclass(frozen=True)
class Packed:
    """A weight under its plain name: the names of its codes, its scales and what else the formula reads, its
    shape, and how their tensors, as they are stored, become numbers of a dtype."""

    codes: str
    scales: str
    further: tuple[str, ...]
    shape: tuple[int, ...]
    numbers: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return self.codes, self.scales, *self.further


Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors calls it, shape


def packed(
    shapes: Shapes, block: tuple[int, int] | None, group: int | None, bits: int = 4
) -> dict[str, Packed]:
    """The quantised weights among these tensors, by their plain names; `block`, `group` and `bits` of codes
    in words as the documents beside them have them."""
    found: dict[str, Packed] = {}
    for name, (dtype, shape) in shapes.items():
        stem, _, last = name.rpartition(".")
        if dtype == "F8_E4M3" and last == "weight":
            beside = next((f"{stem}.{s}" for s in BESIDE if f"{stem}.{s}" in shapes), None)
            if beside is not None:
                found[name] = _of_eight_bits(name, beside, shape, shapes[beside][1], block)
        elif dtype == "U8" and last == "blocks" and f"{stem}.scales" in shapes:
            found[stem] = _of_pairs(name, f"{stem}.scales", (*shape[:-2], shape[-2] * shape[-1] * 2))
        elif dtype == "U8" and last == "weight" and f"{stem}.weight_scale" in shapes:
            beside, second = f"{stem}.weight_scale", f"{stem}.weight_scale_2"
            if shapes[beside][0] in ("U8", "F8_E8M0"):
                found[name] = _of_pairs(name, beside, (shape[0], 2 * shape[1]))
            elif second in shapes:
                found[name] = _of_pairs_twice_scaled(name, beside, second, (shape[0], 2 * shape[1]), 1)
        elif dtype == "I8" and last == "weight" and f"{stem}.weight_scale" in shapes:
            found[name] = _of_bytes(stem, shapes, shape, group)
        elif last == "weight_packed":
            made = _of_words(stem, shapes, group, bits)
            if made is not None:
                found[f"{stem}.weight"] = made
    return found


def _of_eight_bits(
    codes: str, scales: str, shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None
) -> Packed:
    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        q, s = held[codes].to(dtype), exponents(held[scales], dtype)
        if s.numel() == 1:
            return q * s.reshape(())
        if block is None:
            return q * s.reshape(-1, 1)
        s = s[:, 0, :, 0] if s.dim() == 4 else s  # as modelopt keeps them
        high, wide = block
        for i in range(0, q.shape[-2], high):
            for j in range(0, q.shape[-1], wide):
                q[..., i : i + high, j : j + wide] *= s[..., i // high, j // wide, None, None]
        return q

    return Packed(codes, scales, (), shape, numbers)


def exponents(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as numbers: bytes are exponents."""
    if scales.dtype == torch.uint8:
        return torch.pow(torch.tensor(2.0, dtype=torch.float64), scales.double() - 127).to(dtype)
    return scales.to(dtype)


def _of_pairs(codes: str, scales: str, shape: tuple[int, ...]) -> Packed:
    """32 codes of four bits for each scale, a pair in a byte."""

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        table = torch.tensor([*FP4, *(-x for x in FP4)], dtype=dtype)
        data = held[codes].reshape(*held[scales].shape, 16).long()
        out = torch.empty(*data.shape[:-1], 32, dtype=dtype)
        out[..., 0::2], out[..., 1::2] = table[data & 0xF], table[data >> 4]
        return (out * exponents(held[scales], dtype)[..., None]).reshape(shape)

    return Packed(codes, scales, (), shape, numbers)


def _of_bytes(stem: str, shapes: Shapes, shape: tuple[int, ...], group: int | None) -> Packed:
    """Codes with a sign, each an element; a scale for all, or for each row or group of columns, and a zero
    point likewise."""
    codes, scales, zeros = f"{stem}.weight", f"{stem}.weight_scale", f"{stem}.weight_zero_point"
    own = (zeros,) if zeros in shapes else ()

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        out, s = held[codes].to(dtype), held[scales].to(dtype)
        z = held[zeros].to(dtype) if own else torch.zeros_like(s)
        if s.numel() == 1:
            return (out - z.reshape(())) * s.reshape(())
        each = group or shape[1]
        for j in range(s.shape[1]):
            some = out[:, j * each : (j + 1) * each]
            some -= z[:, j : j + 1]
            some *= s[:, j : j + 1]
        return out

    return Packed(codes, scales, own, shape, numbers)


def _of_words(stem: str, shapes: Shapes, group: int | None, bits: int) -> Packed | None:
    codes, scales = f"{stem}.weight_packed", f"{stem}.weight_scale"
    if scales not in shapes:
        return None
    (dtype, (rows, width)), (kind, grid) = shapes[codes], shapes[scales]
    second = f"{stem}.weight_global_scale"
    if dtype == "U8" and kind in ("U8", "F8_E8M0"):
        return _of_pairs(codes, scales, (rows, 2 * width))
    if dtype == "U8":
        return _of_pairs_twice_scaled(codes, scales, second, (rows, 2 * width), -1)
    said, zeros = f"{stem}.weight_shape", f"{stem}.weight_zero_point"
    own = (zeros,) if zeros in shapes else ()

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        columns = int(held[said][1])
        have, low = 32 // bits, (1 << bits) - 1
        out = torch.empty(rows, width * have, dtype=dtype)
        for k in range(have):
            out[:, k::have] = (held[codes] >> bits * k & low).to(dtype)
        zero = torch.full(grid, 1 << bits - 1)  # of each row and group, those of several rows in a word
        if own:
            for row in range(rows):
                zero[row] = held[zeros][row // have] >> bits * (row % have) & low
        each = group or columns
        for j in range(grid[1]):
            some = out[:, j * each : (j + 1) * each]
            some -= zero[:, j : j + 1]
            some *= held[scales][:, j : j + 1].to(dtype)
        return out[:, :columns]

    return Packed(codes, scales, (said, *own), (rows, width * (32 // bits)), numbers)


def _of_pairs_twice_scaled(
    codes: str, scales: str, second: str, shape: tuple[int, ...], power: int
) -> Packed:
    """`power` of the second scale: 1 multiplies, -1 divides."""

    def numbers(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        table = torch.tensor([*FP4, *(-x for x in FP4)], dtype=dtype)
        data = held[codes].long()
        out = torch.stack([table[data & 0xF], table[data >> 4]], -1).reshape(shape)
        one, two = held[scales].float(), held[second].float()
        each = one / two if power < 0 else one * two
        return (out.reshape(*each.shape, 16) * each.to(dtype)[..., None]).reshape(shape)

    return Packed(codes, scales, (second,), shape, numbers)
