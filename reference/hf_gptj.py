"""GPT-J and its heads in the Hugging Face layout (hf_transformer), `transformer.h.{i}.` with `attn.q_proj`,
`attn.k_proj` and `attn.v_proj`. Attention and feed-forward start from one norm; part of each head is turned.

Source: Wang and Komatsuzaki 2021 (GPT-J-6B); transformers 4.37.2 and 5.23.0, models/gptj.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference import hf_transformer
from ckpt_tool.reference.hf_blocks import GELUS
from ckpt_tool.reference.hf_heads import DECODERS
from ckpt_tool.reference.hf_transformer import HEADS, head, layer, own_heads, rooted, stems
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

__all__ = ["ARCHITECTURES", "HEADS", "Config", "embed", "encode", "forward", "head", "layer", "phases"]

ARCHITECTURES = tuple(f"GPTJ{end}" for end in DECODERS if end != "ForTokenClassification")
ONNX_CLASS = (1e-5, 13)  # atol_for_validation and default_onnx_opset of its OnnxConfig in 4.37.2


class Config(hf_transformer.Config):
    parallel = True
    names = stems("""
        word wte.  block h.  norm_1 ln_1.  final_norm ln_f.  fc1 mlp.fc_in.  fc2 mlp.fc_out.
        query attn.q_proj.  key attn.k_proj.  value attn.v_proj.  out attn.out_proj.
    """)
    required = (*hf_transformer.Config.required, "hidden_size")
    own = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}
    absent = {"rotary_dim": 64, **hf_transformer.Config.absent}
    known = {name: form for name, form in GELUS.items() if name != "gelu_python"}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("tie_word_embeddings"):
            raise ValueError("expected `tie_word_embeddings` false in config.json, found true")
        width, heads, turned = (int(config[name]) for name in ("n_embd", "n_head", "rotary_dim"))
        if heads < 1 or heads % cls.blocks or width % heads:
            shared = f" a multiple of {cls.blocks}" if cls.blocks > 1 else ""
            raise ValueError(f"expected `n_head`{shared} that divides {width}, found {heads}")
        if turned % 2 or not 0 < turned <= width // heads:
            raise ValueError(f"expected an even `rotary_dim` up to {width // heads}, found {turned}")
        return {"turned": turned, "tied": False}


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, own_heads(c), ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    w, root = rooted(ranks, c)
    return F.embedding(ids, w[root + "wte.weight"])
