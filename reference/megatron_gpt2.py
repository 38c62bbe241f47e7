"""GPT-2 as Megatron-LM trains it, in the tensors of its own checkpoints, and its language-model head.

Source: Radford et al. 2019; else that of `ckpt_tool.reference.megatron_layers`. Names, versions and the rules
for gelu are those of `ckpt_tool.reference.megatron`.

GPT2LMHeadModel has one value for each number used here, except that it cannot say
`apply_residual_connection_post_layernorm`, grouped queries or a head width that is not D/N.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from ckpt_tool.reference import megatron
from ckpt_tool.reference.blocks import join_words, visible
from ckpt_tool.reference.facts import Shapes
from ckpt_tool.reference.megatron_layers import embedded, norm, transformed
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, given, run

STAGED = True  # whatever its files are called: layers of a pipeline's stages are numbered apart


@dataclass(frozen=True)
class Config(megatron.Config):
    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are the pickled args as plain values and `checkpoint_version`, each absent where the file
        has none; `shapes` those of rank 0, stages joined; `overrides` facts from the user under their Hugging
        Face names, which win. `vocab_size` there is the number of words without padding, by default all rows
        count. Without args: epsilon 1e-5; gelu tanh for version 0, as in the published v0.0. ValueError for
        what none of them tells, where they disagree, and for what this pass does not compute."""
        return cls.read(params, shapes, ranks, overrides, causal=True, gelu_of_version_0="tanh")


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


def forward(
    ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Logits (B, T, V). `mask` (B, T) is 1 for tokens and 0 for padding, `positions` (B, T) are 0, 1, 2, ...
    in every row by default."""
    logits: Tensor = run(phases(ranks, c, given(mask=mask, positions=positions)), ids)
    return logits


def embed(ids: Tensor, ranks: Ranks, c: Config, *, positions: Tensor | None = None) -> Tensor:
    return embedded(ids, ranks, c, positions)


def layer(x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Tensor:
    return transformed(x, i, ranks, c, visible(x, mask=mask))


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The output layer is the word table: the copy of the last stage where there is one."""
    n = c.names
    parts = (norm(x, w, n.final_norm, c) @ w[(n.head_word or n.word) + "weight"].T for w in ranks)
    return join_words(parts, c.n_words)
