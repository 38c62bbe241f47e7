"""GPTJForCausalLM in the Hugging Face layout: `config.json` and tensors named `transformer.h.{i}.` with
`attn.q_proj`, `attn.k_proj` and `attn.v_proj`.

Source: Wang and Komatsuzaki 2021 (GPT-J-6B); transformers 4.37.2 and 5.23.0, models/gptj.

B batch, T tokens, D model width, N heads, H head width, R channels of a head that are turned, V vocabulary.
Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.reference.hf_blocks import (
    GELUS,
    Tensors,
    complete,
    layer_norm,
    linear,
    one_of,
    rotate_neighbours,
    split_heads,
    unseen,
    weigh,
    wide,
)
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

ARCHITECTURES = ("GPTJForCausalLM",)
REQUIRED = ("n_layer", "n_head", "n_embd")  # in config.json, under these names or those of other models
GENERIC = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
DEFAULTS = {"rotary_dim": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}  # of GPTJConfig
FORMS = {name: form for name, form in GELUS.items() if name != "gelu_python"}


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    rotary_dim: int
    norm_eps: float
    gelu: str  # as torch calls it: "none" is erf, or "tanh"
    blocks: ClassVar[int] = 0  # of a fused query, value and key, each with its heads; 0: not fused

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """`config` is config.json as transformers 4 or 5 writes it. ValueError for a missing value that
        changes the numbers and for what this pass does not compute."""
        generic = {name: config.get(other) for name, other in GENERIC.items()}
        config = complete({**generic, **config}, REQUIRED, DEFAULTS)
        if config.get("tie_word_embeddings"):
            raise ValueError("expected `tie_word_embeddings` false in config.json, found true")
        gelu = one_of(config, "activation_function", FORMS)
        width, heads, turned = (int(config[name]) for name in ("n_embd", "n_head", "rotary_dim"))
        if heads < 1 or heads % max(1, cls.blocks) or width % heads:
            shared = f" a multiple of {cls.blocks}" if cls.blocks else ""
            raise ValueError(f"expected `n_head`{shared} that divides {width}, found {heads}")
        if turned % 2 or not 0 < turned <= width // heads:
            raise ValueError(f"expected an even `rotary_dim` up to {width // heads}, found {turned}")
        eps = float(config["layer_norm_epsilon"])
        return cls(int(config["n_layer"]), heads, turned, eps, gelu)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return F.embedding(ids, w["transformer.wte.weight"])


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    (w,), p = ranks, f"transformer.h.{i}."
    y = layer_norm(x, w, p + "ln_1.", c.norm_eps)
    units = F.gelu(linear(y, w, p + "mlp.fc_in."), approximate=c.gelu)
    return attention(y, w, p + "attn.", c, mask) + linear(units, w, p + "mlp.fc_out.") + x


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return wide(linear(layer_norm(x, w, "transformer.ln_f.", c.norm_eps), w, "lm_head."))


def attention(x: Tensor, w: Tensors, p: str, c: Config, mask: Tensor | None) -> Tensor:
    """CodeGen keeps its sines and cosines in float32, GPT-J in the dtype of x."""
    q, k, v = fused(x, w, p, c) if c.blocks else apart(x, w, p, c)
    tables = wide(x).dtype if c.blocks else x.dtype
    q, k = (wide(rotate_neighbours(y, c.rotary_dim, tables)) for y in (q, k))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return linear(weigh(scores, v, unseen(x, mask)), w, p + "out_proj.", bias=False)


def apart(x: Tensor, w: Tensors, p: str, c: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (B, N, T, H) each."""
    q, k, v = (split_heads(linear(x, w, f"{p}{n}_proj.", bias=False), c.n_heads) for n in "qkv")
    return q, k, v


def fused(x: Tensor, w: Tensors, p: str, c: Config) -> tuple[Tensor, Tensor, Tensor]:
    """The same out of one tensor, in which every block has queries, then values, then keys."""
    rows = linear(x, w, p + "qkv_proj.", bias=False)
    blocks = rows.view(*x.shape[:2], c.blocks, 3, c.n_heads // c.blocks, -1)
    q, v, k = (part.flatten(2, 3).transpose(1, 2) for part in blocks.unbind(3))
    return q, k, v
