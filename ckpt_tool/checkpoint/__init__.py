"""Reading checkpoints: one module per container format, and `open_checkpoint` over all of them."""

from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorFile, TensorInfo
from ckpt_tool.checkpoint.opening import Limits, open_checkpoint

__all__ = ["Checkpoint", "Document", "Limits", "TensorFile", "TensorInfo", "open_checkpoint"]
