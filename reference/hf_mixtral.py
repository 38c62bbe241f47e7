"""MixtralForCausalLM in the Hugging Face layout (hf_decoder), its experts in
`model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight`."""

from collections.abc import Mapping
from typing import Any, Self

from ckpt_tool.reference import hf_decoder

ARCHITECTURES = ("MixtralForCausalLM",)


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
