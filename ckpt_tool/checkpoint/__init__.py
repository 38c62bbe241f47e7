"""Reading checkpoints: one module per container format, and `open_checkpoint` over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorFile, TensorInfo
    from ckpt_tool.checkpoint.opening import Limits, open_checkpoint

__all__ = ["Checkpoint", "Document", "Limits", "TensorFile", "TensorInfo", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    """Its modules are loaded by who needs them: who wants a tensor's dtype opens no file."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckpt_tool.checkpoint import base, opening

    return getattr(base if hasattr(base, name) else opening, name)
