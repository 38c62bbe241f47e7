"""Which values a certificate has where, of which types: what `check-certificate` relies on before it compares
anything. Whoever forged one may have put anything anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from ckpt_tool.errors import fail
from ckpt_tool.verify.report import Status

# A type, a list with the form of its entries, the keys that an object must have ("?": may have), or a form of
# one in a tuple: null too.
Form = Any
LEAF: Form = {"file": str, "name": str, "dtype": str, "shape": [int], "sha256": str}
PART: Form = {"file": str, "name": str, "dtype": str}
FINDING: Form = {
    "level": str,
    "check": str,
    "status": str,
    "message": str,
    "data": dict,
    "tables": [{"columns": [str], "rows": [list]}],
}
VERIFICATION: Form = {
    "asked": {
        "levels": ([str],),
        "against": (str,),
        "compute_dtype": str,
        "checkpoint_id": (str,),
        "accept": [str],
        "?settings": dict,
    },
    "verdict": str,
    "headline": str,
    "environment": dict,
    "findings": [FINDING],
}
STEP: Form = {"sources": [PART], "targets": [PART], "?mean": int}
TENSOR: Form = {"name": str, "dtype": str, "shape": [int]}
ENTRY_FORMS: dict[str, Form] = {"source": LEAF, "target": LEAF, "outputs": TENSOR, "steps": STEP}


def _form(many: Callable[[Form], Form], more: Form) -> Form:
    """That of a Statement, whose long lists are `many` of their entries."""
    output = {"file": str, "tensors": many(TENSOR), "?constants": [list]}
    return {
        "subject": [{"name": str, "digest": {"sha256": str}}],
        "predicate": {
            "tool": {"name": str, "version": str},
            "family": str,
            "direction": str,
            "source": {"files": [{"name": str, "sha256": str}], "tensors": many(LEAF), "root": str},
            "plan": {
                "sha256": str,
                "family": str,
                "direction": str,
                "steps": many(STEP),
                "outputs": [output],
                "documents": [{"file": str, "sha256": str}],
            },
            "casts": list,
            "target": {"tensors": many(LEAF), "root": str},
            "verification": VERIFICATION,
            **more,
        },
    }


STATEMENT = _form(lambda entry: [entry], {})
APART = _form(lambda entry: int, {"lists": {"sha256": str}})  # the lists in a file of their own
WORDS = {str: "text", int: "an integer", list: "a list", dict: "an object"}


def must_fit(statement: Mapping[str, Any], file: str) -> None:
    """Refuse (bad-config) a statement that is not of the form, or says two things of one file."""
    predicate = statement.get("predicate")
    apart = isinstance(predicate, dict) and "lists" in predicate
    for where, expected in unlike(statement, APART if apart else STATEMENT, ""):
        fail("bad-config", f"expected {expected}, found another value", file=file, where=where)
    for k, entry in enumerate(statement["predicate"]["verification"]["findings"]):
        if entry["status"] not in get_args(Status):
            where = f"predicate.verification.findings[{k}].status"
            fail("bad-config", f"expected one of {', '.join(get_args(Status))}", file=file, where=where)
    for k, entry in enumerate(statement["predicate"]["plan"]["outputs"]):
        if any(len(c) != 4 or not isinstance(c[2], list) for c in entry.get("constants", ())):
            where = f"predicate.plan.outputs[{k}].constants"
            fail("bad-config", "expected name, dtype, shape and value of each", file=file, where=where)
    _one_digest_each(statement["subject"], file)


def _one_digest_each(subjects: list[dict[str, Any]], file: str) -> None:
    seen = set()
    for entry in subjects:
        if entry["name"] in seen:
            fail("bad-config", "expected each file once, found it twice", file=file, where=entry["name"])
        seen.add(entry["name"])
        others = sorted(entry["digest"].keys() - {"sha256"})
        if others:
            found = f"found {', '.join(others)} too, which is not compared"
            fail("bad-config", f"expected sha256 alone, {found}", file=file, where=entry["name"])


def unlike(value: Any, form: Form, where: str) -> Iterator[tuple[str, str]]:
    """Where a value is not of the form, and what is expected there."""
    if isinstance(form, tuple):
        if value is None:
            return
        (form,) = form
    kind: Any = form if isinstance(form, type) else type(form)
    if not isinstance(value, kind) or isinstance(value, bool):
        yield where, WORDS[kind]
    elif isinstance(form, list):
        for k, entry in enumerate(value):
            yield from unlike(entry, form[0], f"{where}[{k}]")
    elif isinstance(form, dict):
        for key, inner in form.items():
            name = key.removeprefix("?")
            if name in value or name == key:
                yield from unlike(value.get(name), inner, f"{where}.{name}" if where else name)
