"""GPT-2 as Megatron-LM trains it, in the tensors of its own checkpoints, and its language-model head.

Source: Radford et al. 2019; else that of transformer.py. Names, ages and numbers are those of megatron.py.

GPT2LMHeadModel has one value for each number used here, except that it cannot say
`apply_residual_connection_post_layernorm`, grouped queries or a head width that is not D/N.
"""

from __future__ import annotations

from torch import Tensor

from ckpt_tool.reference import megatron
from ckpt_tool.reference.blocks import Past, join_words, remembered, visible
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes
from ckpt_tool.reference.transformer import embed, norm, transformed

STAGED = True  # whatever its files are called: layers of a pipeline's stages are numbered apart


class Config(megatron.Config):
    gelu_of_version_0 = "tanh"  # without args; as in the published v0.0


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None, past: Past | None = None
) -> Tensor:
    return transformed(x, i, ranks, c, visible(x, mask=mask, before=remembered(past, (i, 0))), past)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The output layer is the word table: the copy of the last stage where there is one."""
    n = c.names
    parts = (norm(x, w, n["final_norm"], c) @ w[n["head_word"] + "weight"].T for w in ranks)
    return join_words(parts, c.n_words)
