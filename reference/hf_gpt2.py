"""GPT-2 and its heads in the Hugging Face layout (hf_transformer), `transformer.h.{i}.`, or `h.{i}.` in
GPT2Model. Its Conv1D keeps weights
(in, out) and computes x W + b; `c_attn` holds query, key and value side by side.

Source: transformers 4.37.2 and 5.23.0, models/gpt2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.reference import hf_transformer
from ckpt_tool.reference.hf_blocks import Cache, cached
from ckpt_tool.reference.hf_heads import DECODERS
from ckpt_tool.reference.hf_transformer import HEADS, head, layer, own_heads, rooted, stems
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

__all__ = ["ARCHITECTURES", "HEADS", "Config", "embed", "encode", "forward", "head", "layer", "phases"]

OTHERS = [end for end in DECODERS if end != "ForCausalLM"]
ARCHITECTURES = tuple(f"GPT2{end}" for end in ("LMHeadModel", "DoubleHeadsModel", *OTHERS))
ONNX_CLASS = (1e-5, 13)  # atol_for_validation and default_onnx_opset of its OnnxConfig in 4.37.2


class Config(hf_transformer.Config):
    conv = True
    names = stems("""
        word wte.     block h.           final_norm ln_f.
        norm_1 ln_1.  fused attn.c_attn. out attn.c_proj.
        norm_2 ln_2.  fc1 mlp.c_fc.      fc2 mlp.c_proj.
    """)
    own = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    computed = {"scale_attn_weights": True, "add_cross_attention": False}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"by_depth": bool(config.get("scale_attn_by_inverse_layer_idx"))}


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, own_heads(c), ranks, c, inputs)


forward, encode = passes(phases)


def embed(
    ids: Tensor, ranks: Ranks, c: Config, *, positions: Tensor | None = None, past: Cache | None = None
) -> Tensor:
    w, root = rooted(ranks, c)
    if positions is None:
        start = cached(past)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
    return w[root + "wte.weight"][ids] + w[root + "wpe.weight"][positions]
