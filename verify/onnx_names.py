"""What the inputs and outputs of an ONNX graph are called, by task, and how far they may be apart.

Names, their order and axes, and the tolerances are those of transformers 4.37.2 (onnx/config.py,
onnx/features.py and the configurations of the models: OnnxConfig, OnnxConfigWithPast), with one exception:
the axis of past keys and values that go in is `past_sequence` here, as it is that long. There it has the name
of the one that comes out, `past_sequence + sequence`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.errors import fail
from ckpt_tool.reference.hf_heads import OF_WORDS, kind_of

BATCH, SEQUENCE, CHOICE = "batch", "sequence", "choice"
PAST, WHOLE = "past_sequence", "past_sequence + sequence"
OLDEST, NEWEST, USUAL = (
    18,
    24,
    18,
)  # versions of the operators that the exporter can write, and the one it does
EXPORTER_RTOL = 1e-5

# What a pass takes, by the names of graphs; those of other exporters too.
INPUTS = {
    "input_ids": "ids",
    "attention_mask": "mask",
    "token_type_ids": "token_types",
    "position_ids": "positions",
}
# Past keys and values: this exporter's and optimum's, and those that came before.
KEPT = re.compile(
    r"(?:past_key_values|past|present|present_key_values)\.(\d{1,4})\.(?:decoder\.)?(key|value)"
)


@dataclass(frozen=True)
class Task:
    """`kind` is the head as the readings call it, `heads` are phases that give results and what these are
    called, with the names of their axes."""

    kind: str
    heads: Mapping[str, str]
    axes: tuple[str, ...]


_TOKENS = (BATCH, SEQUENCE)
TASKS = {
    "default": Task("base_model", {"head": "last_hidden_state", "pooler_output": "pooler_output"}, _TOKENS),
    "causal-lm": Task("causal_lm", {"head": "logits"}, _TOKENS),
    "masked-lm": Task("masked_lm", {"head": "logits"}, _TOKENS),
    "sequence-classification": Task("sequence_classification", {"logits": "logits"}, (BATCH,)),
    "token-classification": Task("token_classification", {"logits": "logits"}, _TOKENS),
    "multiple-choice": Task("multiple_choice", {"logits": "logits"}, (BATCH, CHOICE)),
    "question-answering": Task(
        "question_answering", {"start_logits": "start_logits", "end_logits": "end_logits"}, _TOKENS
    ),
}
ONE_ROW = ("pooler_output",)  # results that have no axis of tokens whatever the task

BASE_TOLERANCE = 1e-5  # atol_for_validation of OnnxConfig


def tolerance(module: ModuleType, config: Mapping[str, Any]) -> tuple[float, str]:
    """The absolute tolerance of the model's configuration class, which its reading tells where it has one,
    and in words whose it is."""
    kind = str(config.get("model_type"))
    own = getattr(module, "ONNX_CLASS", None)
    if own is None:
        return BASE_TOLERANCE, f"the base class, as {kind} has none of its own"
    return float(own[0]), f"{kind}'s configuration class"


def documented_opset(module: ModuleType) -> int | None:
    """The version of the operators that the model's configuration class asks for, where it has one."""
    own = getattr(module, "ONNX_CLASS", None)
    return None if own is None else int(own[1])


def own_task(config: Mapping[str, Any]) -> str:
    """The task of the class that config.json names; `unsupported` for one that no configuration names."""
    kind = kind_of(config)
    kind = "masked_lm" if kind == "pretraining" else kind
    for name, task in TASKS.items():
        if task.kind == kind:
            return name
    known = ", ".join(TASKS)
    named = (config.get("architectures") or ["none"])[0]
    text = f"expected a class of one of the tasks {known}, found {named}"
    fail(
        "unsupported",
        text,
        file="config.json",
        where="architectures",
        hint="--task default exports its model",
    )


def chosen_task(asked: str | None, config: Mapping[str, Any], *, with_past: bool) -> str:
    """The task that was asked for, else the model's own; `usage` for one that it has no head for, or past
    keys and values of one without them."""
    own = own_task(config) if asked != "default" else "default"
    task = own if asked is None else asked
    if task not in TASKS:
        fail("usage", f"expected one of {', '.join(TASKS)}, found {task!r}", where="--task")
    if task not in (own, "default"):
        named = (config.get("architectures") or ["none"])[0]
        text = f"expected {own} or default, which {named} has weights for, found {task}"
        fail("usage", text, where="--task")
    kind = classes().get(class_of(config) or "")
    if with_past and (task not in ("default", "causal-lm") or (kind is not None and not kind.causal)):
        named = (config.get("architectures") or ["none"])[0]
        text = f"expected a decoder that keeps keys and values of earlier tokens, found {named} for {task}"
        hint = "leave --with-past out, or export its model: --task default"
        fail("usage", text, where="--with-past", hint=hint if own == "causal-lm" else "leave --with-past out")
    return task


def of_rows(task: str, name: str) -> bool:
    """Whether a result has one row for a whole sequence, not one for each token."""
    if name.startswith("present."):
        return False
    return name in ONE_ROW or SEQUENCE not in TASKS[task].axes


def of_words(kind: str) -> bool:
    return kind in OF_WORDS


def layer_names(layers: int, side: str) -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ...; `side` is what they begin with."""
    return [f"{side}.{i}.{part}" for i in range(layers) for part in ("key", "value")]
