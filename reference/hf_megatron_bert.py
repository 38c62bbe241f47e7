"""MegatronBert in the Hugging Face layout (hf_transformer), `bert.encoder.layer.{i}.`, without `bert.` for
MegatronBertModel. Each head as its class computes it.

Source: transformers 4.37.2 and 5.23.0, models/megatron_bert.

B batch, T tokens, D model width, V vocabulary, L labels, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.reference import hf_transformer
from ckpt_tool.reference.hf_blocks import Cache, activate, cached, linear, span_logits, wide
from ckpt_tool.reference.hf_heads import OF_WORDS, of_class
from ckpt_tool.reference.hf_transformer import finish, layer, norm, stems
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes

CLASSES = (
    "Model ForPreTraining ForMaskedLM ForCausalLM ForNextSentencePrediction ForSequenceClassification "
    "ForMultipleChoice ForTokenClassification ForQuestionAnswering"
)
ARCHITECTURES = tuple(f"MegatronBert{name}" for name in CLASSES.split())


class Config(hf_transformer.Config):
    names = stems("""
        word embeddings.word_embeddings.  block encoder.layer.  final_norm encoder.ln.
        norm_1 attention.ln.  norm_2 ln.  fc1 intermediate.dense.  fc2 output.dense.
        query attention.self.query.  key attention.self.key.  value attention.self.value.
        out attention.output.dense.
    """)
    absent = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    function, epsilon = "hidden_act", "layer_norm_eps"
    computed = {"position_embedding_type": "absolute", "add_cross_attention": False}

    @classmethod
    def traits(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        bare = config.get("architectures") == ["MegatronBertModel"]
        return {"causal": bool(config.get("is_decoder", False)), "roots": ("" if bare else "bert.",)}


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask")


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    if c.kind not in OF_WORDS:
        heads = of_class(c.kind, HEADS, finish)
        if c.kind == "base_model" and c.roots[0] + "pooler.dense.weight" in ranks[0]:
            heads["pooler_output"] = pool
        return decoder_phases(embed, layer, heads, ranks, c, inputs)
    heads = {"head": head}
    if "cls.seq_relationship.weight" in ranks[0]:
        heads["seq_relationship_logits"] = next_sentence
    return decoder_phases(embed, layer, heads, ranks, c, inputs)


forward, encode = passes(phases)


def embed(
    ids: Tensor, ranks: Ranks, c: Config, *, token_types: Tensor | None = None, past: Cache | None = None
) -> Tensor:
    (w,), p = ranks, c.roots[0] + "embeddings."
    types = torch.zeros_like(ids) if token_types is None else token_types
    positions = torch.arange(ids.shape[1], device=ids.device) + cached(past)
    x = w[p + "word_embeddings.weight"][ids] + w[p + "token_type_embeddings.weight"][types]
    return x + w[p + "position_embeddings.weight"][positions]


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """LM logits (B, T, V). An untied output layer has a bias of its own, as transformers 5 has it; a file
    without one is meant to share the head's."""
    (w,), p = ranks, "cls.predictions."
    z = activate(linear(finish(x, ranks, c), w, p + "transform.dense."), c.activation)
    z = norm(z, w, p + "transform.LayerNorm.", c)
    own = "" if c.tied or p + "decoder.bias" not in w else "decoder."
    return wide(z @ w[output(c)].T + w[f"{p}{own}bias"])


def output(c: Config) -> str:
    return c.roots[0] + "embeddings.word_embeddings.weight" if c.tied else "cls.predictions.decoder.weight"


def pool(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Of the first token: (B, D), or (B, C, D)."""
    return torch.tanh(linear(finish(x, ranks, c)[..., 0, :], ranks[0], c.roots[0] + "pooler.dense."))


def next_sentence(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """Logits (B, 2) of a continuation and of a random next sentence."""
    return wide(linear(pool(x, ranks, c), ranks[0], "cls.seq_relationship."))


def classified(y: Tensor, ranks: Ranks) -> Tensor:
    return wide(linear(y, ranks[0], "classifier."))


# What `encode` gives goes into each: (B, L) logits of a sequence or the values of a regression, (B, C) of
# choices, (B, T, L) of tokens. The causal one wants `c.causal`.
HEADS: dict[str, Callable[[Tensor, Ranks, Config], Tensor | tuple[Tensor, Tensor]]] = {
    "base_model": lambda x, ranks, c: (finish(x, ranks, c), pool(x, ranks, c)),
    "masked_lm": head,
    "causal_lm": head,
    "next_sentence_prediction": next_sentence,
    "pretraining": lambda x, ranks, c: (head(x, ranks, c), next_sentence(x, ranks, c)),
    "sequence_classification": lambda x, ranks, c: classified(pool(x, ranks, c), ranks),
    "multiple_choice": lambda x, ranks, c: classified(pool(x, ranks, c), ranks).squeeze(-1),
    "token_classification": lambda x, ranks, c: classified(finish(x, ranks, c), ranks),
    "question_answering": lambda x, ranks, c: span_logits(finish(x, ranks, c), ranks[0]),
}


# The two forms of gelu are nowhere further apart than 4.7324e-4, which they are at -2.699 and 2.699.
GELU_GAP = 4.74e-4


def gelu_bound(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """How far the logits (B, T, V) of `head` can move when its gelu takes the other form, each of them.

    What leaves the gelu moves by at most GELU_GAP in each of D channels, so by GELU_GAP sqrt(D) in length.
    The layer norm subtracts the mean and divides by s = sqrt(variance + eps), which moves by at most GELU_GAP
    on the way; its derivative is a contraction over s. A logit is the product with a row of the output layer,
    so by Cauchy-Schwarz it moves by at most the length of gamma times that row, times that of the move."""
    (w,), p = ranks, "cls.predictions."
    z = wide(activate(linear(finish(x, ranks, c), w, p + "transform.dense."), c.activation))
    s = (z.var(-1, correction=0, keepdim=True) + c.norm_eps).sqrt() - GELU_GAP
    moved = (GELU_GAP * z.shape[-1] ** 0.5 / s).where(s > 0, torch.inf)  # (B, T, 1)
    rows = wide(w[output(c)] * w[p + "transform.LayerNorm.weight"])  # (V, D)
    reach: Tensor = moved * torch.linalg.vector_norm(rows, dim=-1)
    return reach


# By phase: what a difference in the value of config.json that the phase shares with others may come to.
bounds: dict[str, Callable[[Tensor, Ranks, Config], Tensor]] = {"head": gelu_bound}
