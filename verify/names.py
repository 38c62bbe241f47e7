"""What a tensor's name says."""

from __future__ import annotations


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: the first number among the dotted components of its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def short(name: str) -> str:
    """A tensor's name within its layer, without `weight`: `self_attn.q_proj`."""
    parts = name.split(".")
    index = next((k for k, p in enumerate(parts) if p.isdecimal()), -1)
    return ".".join(p for p in parts[index + 1 :] if p != "weight") or name
