"""The device that a model is computed on: whether it is there, how exactly it multiplies, and what is said
where it gives out, which is nothing of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from ckpt_tool.errors import fail

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def check(device: str) -> None:
    """`usage` for a GPU that this torch does not find."""
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch finds none" if built else f"torch {torch.__version__} is built without it"
        fail("usage", f"expected a CUDA device, found none: {why}", where="device", hint="--device cpu")
    count, wanted = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if wanted >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        fail("usage", f"expected {there}, found {device}", where="device")


def described(device: str) -> str:
    """With the name that the driver gives a GPU, as it is recorded beside numbers."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


@contextmanager
def exact() -> Iterator[None]:
    """Inside, float32 is multiplied as float32, and 16 bits are added up in 32, on every device; whatever the
    process has chosen stands again afterwards."""
    backends: Any = torch.backends
    held = ExitStack()

    def put(module: Any, name: str, value: object) -> None:
        held.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)

    with held:
        try:
            held.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # the process has used what torch 2.9 has in its place
            for module in (backends.cuda.matmul, backends.mkldnn.matmul):
                put(module, "fp32_precision", "ieee")
        with suppress(RuntimeError):
            put(backends.cudnn, "allow_tf32", False)  # True by default: convolutions would keep 10 bits
        # where another precision is chosen for all backends at once, that is what they have then
        for module in (getattr(backends.cudnn, part, None) for part in ("conv", "rnn")):
            if getattr(module, "fp32_precision", "none") in ("tf32", "bf16"):
                put(module, "fp32_precision", "ieee")
        if hasattr(backends.mkldnn, "conv"):
            put(backends.mkldnn.conv, "fp32_precision", "ieee")
        for name in REDUCED:
            put(backends.cuda.matmul, name, False)
        yield


@contextmanager
def blameless() -> Iterator[None]:
    """Inside, memory that runs out is `out-of-memory`, and an error that a device reports `device-failed`:
    torch raises both as it does where tensors do not fit, which is a finding."""
    try:
        yield
    except RuntimeError as error:
        said, _, _ = str(error).partition("\n")
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said:
            hint = "a smaller --memory, --quick, or another --device"
            fail(
                "out-of-memory",
                f"expected enough memory for the pass, found the end of it: {said}",
                hint=hint,
            )
        if type(error).__name__ == "AcceleratorError":
            hint = "--device cpu tells whether it is the model"
            fail("device-failed", f"expected the device to compute, found {said}", hint=hint)
        raise
