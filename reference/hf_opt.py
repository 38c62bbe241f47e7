"""OPT in the Hugging Face layout (hf_transformer): `model.decoder.layers.{i}.`, or `decoder.layers.{i}.` in
OPTModel and some uploads of the whole. Each head as its class computes it.

Source: transformers 4.37.2 and 5.23.0, models/opt.

"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference import hf_transformer
from ckpt_tool.reference.hf_blocks import GELUS, Cache, cached
from ckpt_tool.reference.hf_transformer import head, layer, own_heads, rooted, stems
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

__all__ = ["ARCHITECTURES", "HEADS", "Config", "embed", "encode", "forward", "head", "layer", "phases"]

ARCHITECTURES = ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering")
OFFSET = 2  # of the rows in the table of positions


class Config(hf_transformer.Config):
    late_scale = True
    names = stems("""
        word embed_tokens.  block layers.  final_norm final_layer_norm.  out_of project_out.
        norm_1 self_attn_layer_norm.  norm_2 final_layer_norm.  fc1 fc1.  fc2 fc2.
        query self_attn.q_proj.  key self_attn.k_proj.  value self_attn.v_proj.  out self_attn.out_proj.
    """)
    required = ("hidden_size", *hf_transformer.Config.required)
    absent = {"activation_function": "relu", "do_layer_norm_before": True}
    known = {"relu": "relu", **GELUS}
    epsilon = None

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        first = bool(config["do_layer_norm_before"])
        words = config.get("word_embed_proj_dim") or config["hidden_size"]
        return {
            "roots": ("model.decoder.", "decoder."),
            "norm_first": first,
            # models that were converted without their final norm have this since 4.20
            "final_norm": first and not config.get("_remove_final_layer_norm", False),
            "projected": int(words) != int(config["hidden_size"]),
            "biased": bool(config.get("enable_bias", True)),
            "affine": bool(config.get("layer_norm_elementwise_affine", True)),
        }


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, own_heads(c), ranks, c, inputs)


forward, encode = passes(phases)


def embed(
    ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None, past: Cache | None = None
) -> Tensor:
    """Positions count the tokens from 0 on, those of `past` too, and are -1 for padding; a `mask` (B, P + T)
    is of all of them."""
    w, p = rooted(ranks, c)
    x = F.embedding(ids, w[p + "embed_tokens.weight"])
    if c.projected:
        x = F.linear(x, w[p + "project_in.weight"])
    before = cached(past)
    mask = (
        torch.cat([ids.new_ones(len(ids), before), torch.ones_like(ids)], 1) if mask is None else mask.long()
    )
    positions = (torch.cumsum(mask, dim=1) * mask - 1)[:, before:]
    return x + F.embedding(positions + OFFSET, w[p + "embed_positions.weight"])


# What `encode` gives goes into each; tokens have no classes here.
HEADS = {name: of for name, of in hf_transformer.HEADS.items() if name != "token_classification"}
