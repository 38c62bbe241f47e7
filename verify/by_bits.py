"""The diagnosis of tensors that hold other bits than the source gives, where parity has not told of them: it
was not asked for, could not run, or cannot see the difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.verify.explain import Evidence, Explanation, explain
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject

LEVEL = "diagnosis"
DIAGNOSED = 3  # layers that are looked into


def by_bits(subject: Subject, found: Sequence[Finding], memory: int | None = None) -> list[Finding]:
    """One finding for each layer of which the round trip named a tensor and no diagnosis told yet; they are
    looked for in `memory` bytes."""
    if subject.plan is None or subject.source is None:
        return []
    evidence = Evidence(subject)
    told = {str(n) for f in found if f.level == LEVEL for n in f.data.get("tensor", ())}
    told_layers = {f.where for f in found if f.level == LEVEL}
    wrong = [n for n in _named(evidence, found) if n not in told]
    made: list[Finding] = []
    for layer in dict.fromkeys(map(layer_of, wrong)):
        if len(made) == DIAGNOSED or (layer is not None and f"layer {layer}" in told_layers):
            continue
        own = [n for n in evidence.where if layer_of(n) == layer]
        if layer is None:
            own = [n for n in wrong if layer_of(n) is None]
        explanation = explain(evidence, own, memory)
        if explanation.differing:
            where = f"layer {layer}" if layer is not None else "outside of the layers"
            made.append(finding(explanation, where))
    return made


def _named(evidence: Evidence, found: Iterable[Finding]) -> list[str]:
    """Tensors of the Hugging Face side that the round trip found to differ."""
    names: dict[str, None] = {}
    for f in found:
        if f.level == "bits" and f.check == "round trip" and f.status == "fail":
            own = (f.where or "").rsplit(": ", 1)[-1].split(" (")[0]
            for name in (str(f.data.get("counterpart") or ""), own):
                if name in evidence.where:
                    names.setdefault(name)
    return list(names)


def finding(explanation: Explanation, where: str) -> Finding:
    cause = explanation.cause
    text = "; ".join(t for t in (cause and f"cause: {cause}", explanation.text) if t)
    data = {"cause": cause, "also": [], "tensor": list(explanation.differing), "phase": where}
    return Finding(LEVEL, "bits", "note", text, where, data=data)
