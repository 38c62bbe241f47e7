"""The heads that a class of transformers has, by the end of its name: as phases of its pass.

Source: transformers 4.37.2 and 5.23.0 (models/*/modeling_*.py, modeling_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# The end of a class's name -> its head, as `HEADS` of a reading calls it. A second head for choices is not
# read.
ENDS: Mapping[str, str] = {
    "LMHeadModel": "causal_lm",
    "DoubleHeadsModel": "causal_lm",
    "Model": "base_model",
    "ForCausalLM": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "pretraining",
    "ForNextSentencePrediction": "next_sentence_prediction",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForMultipleChoice": "multiple_choice",
    "ForQuestionAnswering": "question_answering",
    "ForEntityClassification": "entity_classification",
    "ForEntityPairClassification": "entity_pair_classification",
    "ForEntitySpanClassification": "entity_span_classification",
}
OF_WORDS = ("causal_lm", "masked_lm", "pretraining")
DECODERS = (
    "Model",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
Head = Callable[..., Any]


def kind_of(config: Mapping[str, Any], otherwise: str = "causal_lm") -> str:
    """The head of the class that config.json names; `otherwise` where it names none."""
    said = config.get("architectures") or [""]
    architecture = str(said[0]) if isinstance(said, list) else ""
    return next((kind for end, kind in ENDS.items() if architecture.endswith(end)), otherwise)


def of_class(kind: str, known: Mapping[str, Head], last: Head) -> dict[str, Head]:
    """The heads of a class without words, each a function of (x, ranks, c) that gives one tensor, by what
    transformers calls it: "head" is the last hidden state, which `last` gives. `known` are the `HEADS` of the
    reading."""

    def part(name: str, at: int) -> Head:
        return lambda x, ranks, c: known[name](x, ranks, c)[at]

    made: dict[str, Head] = {"head": last}
    if kind == "question_answering":
        made |= {"start_logits": part(kind, 0), "end_logits": part(kind, 1)}
    elif kind == "multiple_choice":  # of one choice
        made["logits"] = lambda x, ranks, c: known[kind](x, ranks, c).unsqueeze(-1)
    elif kind != "base_model" and kind in known:
        made["logits"] = known[kind]
    return made
