"""Models with experts in MXFP4 as transformers computes them: its own dequantising, without the package that
it wants for loading such a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests import world

PACKING = "quantization_config"


def packed(folder: Path) -> bool:
    return PACKING in json.loads((folder / "config.json").read_text())


def loaded(folder: Path) -> Any:
    """The model of a converted folder in float32, its experts as numbers."""
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    said = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in said.items() if k != PACKING}
    state = world.tensors_of(folder)
    whole = {n: t for n, t in state.items() if not n.endswith(("_blocks", "_scales"))}
    for stem in (n.removesuffix("_blocks") for n in state if n.endswith("_blocks")):
        parts = state[f"{stem}_blocks"], state[f"{stem}_scales"]
        whole[stem] = convert_moe_packed_tensors(*parts, dtype=torch.float32)
    made = transformers.AutoConfig.for_model(**config)
    made._attn_implementation = made._experts_implementation = "eager"
    model = getattr(transformers, *said["architectures"])(made)
    model.load_state_dict(whole)
    return model.eval()
