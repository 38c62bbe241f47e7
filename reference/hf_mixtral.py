"""Mixtral and its heads in the Hugging Face layout (hf_decoder), its experts in
`model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight`.

In memory transformers 5.23.0 (models/mixtral, MixtralExperts) has other names and one tensor for all experts
of a layer: `mlp.gate.weight` (E, D), `mlp.experts.gate_up_proj` (E, 2F, D), whose halves are the gate, w1,
and what it is multiplied with, w3; `mlp.experts.down_proj` (E, D, F) is w2. It loads experts one by one under
`mlp.experts.{e}.w1.weight`, too.
"""

import re
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from ckpt_tool.reference import hf_decoder
from ckpt_tool.reference.hf_heads import DECODERS

ARCHITECTURES = tuple(f"Mixtral{end}" for end in DECODERS)


class Config(hf_decoder.Config):
    absent = {"num_local_experts": 8, "num_experts_per_tok": 2}
    or_null = {"num_key_value_heads": 8, "sliding_window": None}
    theta, epsilon = 1000000.0, ("rms_norm_eps", 1e-5)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """A newer name of `num_local_experts` is `num_experts`."""
        generic = {"num_local_experts": config["num_experts"]} if "num_experts" in config else {}
        return super().from_hf({**generic, **config})

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        counts = int(config["num_local_experts"]), int(config["num_experts_per_tok"])
        return dict(zip(("n_experts", "n_experts_per_token"), counts, strict=True))


def apart(w: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor called `name` on the disk, out of those in memory."""
    if router := re.fullmatch(r"(.*)block_sparse_moe\.gate\.weight", name):
        return w[f"{router[1]}mlp.gate.weight"]
    expert = re.fullmatch(r"(.*)block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
    if expert is None:
        return w[name]
    p, e, kind = f"{expert[1]}mlp.experts.", int(expert[2]), expert[3]
    if (single := f"{p}{e}.{kind}.weight") in w:
        return w[single]
    if kind == "w2":
        return w[p + "down_proj"][e]
    gate, multiplied = w[p + "gate_up_proj"][e].chunk(2)
    return gate if kind == "w1" else multiplied
