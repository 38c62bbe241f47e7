"""The keys of a config.json that no field reads: those without effect are carried over, the others are
refused by name, with the way out. Which is which, `convert.facts_classes` says, as it does to verification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tool.convert.facts import Reading, read_as
from ckpt_tool.convert.facts_classes import CODE, PACKED, Class
from ckpt_tool.convert.params import left_out, shown
from ckpt_tool.errors import Problem, fail_all, near, printable


def read_keys(
    document: Mapping[str, Any],
    settings: Mapping[str, Any],
    own: Class,
    *,
    quantised: bool = False,
    file: str = "config.json",
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The document and the user's settings without what the user leaves out by setting it to null, and notes
    on that and on code of the download. Fails with `unsupported` for what may change the numbers; what says
    how tensors are packed may where they were read as that (`quantised`). `file`: where the document is."""
    found = read_as(document, own)
    out = {k for k in (*found.unknown, *found.refused) if k in settings and settings[k] is None}
    left = {k: v for k, v in document.items() if k not in out}
    plain = {k: v for k, v in left.items() if k not in PACKED} if quantised else left
    fail_all(_not_read(read_as(plain, own), plain, own, file))
    notes = [left_out(file, k, document[k]) for k in sorted(out)]
    notes += [
        f"{file}: {k} asks for code of the download ({shown(left[k])}) and is left out: {own.name} of "
        "transformers reads the output"
        for k in CODE
        if left.get(k) not in (None, False, {})
    ]
    return left, {k: v for k, v in settings.items() if k not in out}, notes


def _not_read(found: Reading, document: Mapping[str, Any], own: Class, file: str) -> Iterator[Problem]:
    """What no field reads and may change what is computed: packed tensors, a model of the download's own
    code, keys on no list of `convert.facts_classes`."""

    def problem(key: str, message: str, hint: str) -> Problem:
        return Problem("unsupported", message, file, printable(key), hint)

    for key in sorted(found.refused):
        null = f"--set {key}=null"
        if key in PACKED:
            inner = document[key]
            how = inner.get("quant_method") if isinstance(inner, Mapping) else None
            message = (
                f"expected plain tensors, found a way of packing them{f' ({shown(how)})' if how else ''}"
            )
            hint = "convert the model from before it was packed; if these tensors are plain all the same, "
            yield problem(key, message, f"{hint}{null}")
        elif key == "auto_map" and (code := _other_model(document[key], own)) is not None:
            stem = own.name.removesuffix("Config")
            message = f"expected a class of transformers, {stem}..., found code of the download, {code}"
            yield problem(key, message, f"{null} if that code computes what {stem} of transformers does")
    for key, value in sorted(found.unknown.items()):
        message = f"expected keys that {own.name} reads or that change nothing, found {shown(value)}"
        meant = near(key, [*own.numbers, *own.identity])
        hint = f"--set {printable(key)}=null leaves it out, if it changes nothing"
        yield problem(key, message, f"{meant} {hint}" if meant else hint)


def _other_model(found: Any, own: Class) -> str | None:
    """The class of the download's own code for the model where it is not named as those of the class `own`
    are: {"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"}. A name is no proof; a key that the code
    reads besides is on no list."""
    if not isinstance(found, Mapping):
        return shown(found)
    for name, place in found.items():
        stem = own.name.removesuffix("Config")
        of_model = name.startswith(("AutoModel", "FlaxAutoModel", "TFAutoModel"))
        if of_model and not str(place).rpartition(".")[2].startswith(
            (f"{stem}For", f"{stem}Model", stem + "LM")
        ):
            return printable(str(place), 80)
    return None
