"""CodeGen 1 (350M, 2B, 6B, 16B; nl, multi, mono) as Salesforce published it: `config.json` and
`pytorch_model.bin`, whose tensors have the names that transformers took over.

Source: Nijkamp et al. 2022 (arXiv 2203.13474); salesforce/CodeGen @6f09e495, codegen1/jaxformer/hf; and for
what the order of `qkv_proj` comes from, salesforce/jaxformer @026b4ed6, which trained it on `mp_num` cores.

The names are those of hf_codegen.py; the pass is not. This is the training program: each core has its own
rows of `qkv_proj` and its own heads, their results are added, and two channels are one complex number.

B batch, T tokens, D model width, N heads, H head width, R channels of a head that are turned, V vocabulary,
M cores. Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from ckpt_tool.reference.blocks import (
    GELUS,
    Past,
    Tensors,
    activate,
    affine,
    all_reduce,
    layer_norm,
    products,
    recalled,
    remembered,
    rotate_neighbours,
    visible,
    weigh,
    wide,
)
from ckpt_tool.reference.facts import Shapes, first, refuse
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes
from ckpt_tool.reference.rope import turns
from ckpt_tool.reference.unread import unread

MASKED = -1e9  # the score of a key that is not to be seen
THETA = 10000.0  # fixed in the code
CORES = 4  # every published model; one that jaxformer trained on TPU v3 would have 8
# Keys that CodeGen 2 has, whose files are otherwise like these and of 8 cores; nothing in them says so.
OTHER_CORES = ("auto_map", "head_dim")

# What is read from config.json: its name there, and where that is another the name that serves all families.
FACTS = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads"}
FACTS |= {name: name for name in ("rotary_dim", "layer_norm_epsilon", "activation_function")}
# n_inner is that of the tensors; scores are always scaled by the root of the width of a head
READ = (*FACTS, *FACTS.values(), *OTHER_CORES, "mp_num", "n_inner", "scale_attn_weights", "intermediate_size")


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    rotary_dim: int
    norm_eps: float
    gelu: str  # tanh or erf
    mp_num: int

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` is config.json, `shapes` those of all tensors, `overrides` facts from the user under
        their Hugging Face names, and `mp_num`; they win. ValueError for what is missing and what this pass
        does not compute."""
        if ranks != 1:
            raise ValueError(f"expected one rank (CodeGen's files are not model-parallel), found {ranks}")
        told = {
            name: first(*(facts.get(key) for facts in (overrides, params) for key in (name, other)))
            for name, other in FACTS.items()
        }
        if missing := [name for name, value in told.items() if value is None]:
            raise ValueError(f"expected {', '.join(missing)} in config.json or given by name, found none")
        if (gelu := told["activation_function"]) not in GELUS:
            raise ValueError(f"expected `activation_function` to be one of {', '.join(GELUS)}, found {gelu}")
        L, D, N, R = (int(told[name]) for name in ("n_layer", "n_embd", "n_head", "rotary_dim"))
        facts = {**params, **overrides}
        signs = [name for name in OTHER_CORES if facts.get(name) is not None]
        if signs and not overrides.get("mp_num"):
            raise ValueError(f"expected mp_num given by name beside {' and '.join(signs)}, found none")
        M = int(overrides.get("mp_num") or CORES)
        refuse(unread(facts, READ))
        if min(D, N, M) < 1 or D % N or N % M:
            raise ValueError(f"expected heads that {D} channels and {M} cores can share, found {N}")
        if R % 2 or not 0 < R <= D // N:
            raise ValueError(f"expected an even rotary_dim up to {D // N}, found {R}")
        numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("transformer.h.")}
        if numbers != set(range(L)):
            raise ValueError(f"expected layers 0 to {L - 1}, found {len(numbers)} of them")
        return cls(L, N, R, float(told["layer_norm_epsilon"]), GELUS[gelu], M)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def embed(ids: Tensor, ranks: Ranks, c: Config) -> Tensor:
    (w,) = ranks
    return w["transformer.wte.weight"][ids]


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None, past: Past | None = None
) -> Tensor:
    """Attention and feed-forward both start from the one norm, side by side."""
    (w,), p = ranks, f"transformer.h.{i}."
    y = layer_norm(x, w, p + "ln_1.", c.norm_eps)
    return x + attention(y, w, i, c, mask, past) + feed_forward(y, w, p + "mlp.", c)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The output layer has weights and a bias of its own."""
    (w,) = ranks
    return wide(affine(layer_norm(x, w, "transformer.ln_f.", c.norm_eps), w, "lm_head."))


def attention(x: Tensor, w: Tensors, i: int, c: Config, mask: Tensor | None, past: Past | None) -> Tensor:
    """Every core has the rows of its queries, then of its values, then of its keys, in `qkv_proj`, and the
    columns of its heads in `out_proj`."""
    p, ahead = f"transformer.h.{i}.attn.", remembered(past, (i, 0))
    turned = turns(x, THETA, c.rotary_dim, None, ahead)
    seen = visible(x, mask=mask, before=ahead)
    fused, out = w[p + "qkv_proj.weight"], w[p + "out_proj.weight"]
    cores = enumerate(zip(fused.chunk(c.mp_num, 0), out.chunk(c.mp_num, 1), strict=True))
    return all_reduce(core(x, own, turned, seen, c, past, (i, m)) for m, own in cores)


def core(
    x: Tensor,
    own: tuple[Tensor, Tensor],
    turned: Tensor,
    seen: Tensor,
    c: Config,
    past: Past | None,
    place: tuple[int, int],
) -> Tensor:
    """The part of the sum over heads that N/M heads contribute: (B, T, D). Its `own` rows (3 D/M, D) and
    columns (D, D/M). Queries and keys are float32 from the rotation on."""
    rows, columns = own
    shape = c.n_heads // c.mp_num, -1
    q, v, k = ((x @ part.T).view(*x.shape[:2], *shape) for part in rows.chunk(3, 0))  # (B, T, N/M, H)
    q, k = rotate_neighbours(q, turned), rotate_neighbours(k, turned)
    k, v = recalled(past, place, k, v)
    return weigh(products(q, k) / q.shape[-1] ** 0.5, v, seen, MASKED) @ columns.T


def feed_forward(x: Tensor, w: Tensors, p: str, c: Config) -> Tensor:
    return affine(activate(affine(x, w, p + "fc_in."), c.gelu), w, p + "fc_out.")
