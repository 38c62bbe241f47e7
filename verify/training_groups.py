"""What training takes from a checkpoint besides its tensors: which of them decay, and how much drops out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.megatron import arguments
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.verify.gradients import Rows
from ckpt_tool.verify.optimizer import decays
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject

LEVEL = "training"
# What Megatron's arguments call it -> what config.json may, of hidden states and of attention.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "hidden_dropout": ("resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "hidden_dropout"),
    "attention_dropout": ("attn_pdrop", "attention_probs_dropout_prob", "attention_dropout"),
}


def findings(rows: Rows) -> list[Finding]:
    """Whether the tensors that decay are the same ones on both sides."""
    wrong = dict(_otherwise(rows))
    if not wrong:
        text = "each tensor is in its group of weight decay: matrices decay, biases and vectors do not"
        return [Finding(LEVEL, "decay groups", "pass", text)]
    text = "decays in one layout and not in the other, where it is"
    return [Finding(LEVEL, "decay groups", "note", f"{text} {other}", n) for n, other in wrong.items()]


def _otherwise(rows: Rows) -> Iterator[tuple[str, str]]:
    for step in rows.own:
        for target in step.targets:
            name, shape = target.name, rows.shapes.get(target.name)
            for source in step.sources if shape is not None else ():
                before = source.shape(step.sizes)
                if decays(source.name, before) != decays(name, tuple(shape or ())):
                    yield name, f"{source.name} {list(before)}"


def arguments_of(source: Checkpoint) -> dict[str, Any]:
    """Those of the run that made the original, where its files have them."""
    first = next(iter(source.files.values()), None)
    return (arguments(first) if first is not None else None) or {}


def dropouts(subject: Subject) -> list[Finding]:
    """Whether config.json, as its class reads it, has the rates that the plan gives, and what else acts in
    training alone."""
    wanted = _wanted(subject)
    if not wanted:
        return [Finding(LEVEL, "dropout", "skipped", "nothing is known of the dropout of this class")]
    if made := _wrong(subject.config, wanted):
        return made
    found = {key: _said(subject.config, key) for key in wanted}
    text = ", ".join(f"{key} {wanted[key]}" for key in sorted(wanted))
    return [Finding(LEVEL, "dropout", "pass", text), *_of_run(subject, found)]


def _of_run(subject: Subject, found: Mapping[str, Any]) -> Iterator[Finding]:
    """What the original was trained with, where its arguments say so and config.json says otherwise."""
    told = {} if subject.original is None else arguments_of(subject.original)
    for argument, keys in ARGUMENTS.items():
        value = told.get(argument)
        for key in keys if type(value) in (int, float) else ():
            if key in found and not _equal(found[key], value):
                text = f"the original was trained with {argument} {value}, config.json says {found[key]}"
                yield Finding(LEVEL, "dropout of the run", "note", text, f"config.json: {key}")


def _wrong(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Finding]:
    """A finding for each rate of `config` that is not the one `wanted`."""
    return [
        Finding(LEVEL, _check_of(config, key), "fail", text, f"config.json: {key}")
        for key in sorted(wanted)
        if not _equal(_said(config, key), wanted[key])
        for text in (f"expected {wanted[key]}, found {_in_words(config, key)}",)
    ]


def planted_dropout(subject: Subject) -> tuple[str, str, list[str]] | None:
    """A rate that is left out where its class takes another one then, else one that is set otherwise: in
    words, and where it is found. None where there are no rates."""
    wanted, config = _wanted(subject), dict(subject.config)
    if not wanted:
        return None
    without = {key: {k: x for k, x in config.items() if k != key} for key in sorted(wanted)}
    silent = next((k for k in without if not _equal(_said(without[k], k), wanted[k])), None)
    key = silent or min(wanted)
    altered = without[key] if silent else config | {key: float(wanted[key] or 0) + 0.1}
    return (
        "dropout left out" if silent else "another dropout",
        key,
        [str(f.where) for f in _wrong(altered, wanted)],
    )


def _wanted(subject: Subject) -> dict[str, Any]:
    """The rates of the plan, else those that the class takes where its document says none."""
    kind = class_of(subject.config)
    usual = {} if kind is None else classes()[kind].trained
    plan = subject.plan
    if plan is None or subject.direction != "to-hf":
        return {key: _said(subject.config, key) for key in usual}
    return {key: plan.config[key].value if key in plan.config else x for key, x in usual.items()}


def _said(config: Mapping[str, Any], key: str) -> Any:
    """A rate as the class of `config` reads it."""
    kind = class_of(config)
    return config.get(key, None if kind is None else classes()[kind].trained.get(key))


def _check_of(config: Mapping[str, Any], key: str) -> str:
    kind = class_of(config)
    return "router" if kind is not None and key in classes()[kind].routing else "dropout"


def _in_words(config: Mapping[str, Any], key: str) -> str:
    return str(config[key]) if key in config else f"none, which its class takes as {_said(config, key)}"


def _equal(one: Any, other: Any) -> bool:
    return bool((one or 0) == (other or 0))
