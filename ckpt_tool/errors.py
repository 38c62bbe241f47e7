"""What went wrong, as data: one `Problem` per fact, one `CkptToolError` per stage that found some.

Every module of the project may import this one; it imports nothing of the project but records.py.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from ckpt_tool.records import dataclass

NAME_LIMIT = 200  # a hostile file can hold names of any length; nobody reads more than this
SHOWN_PROBLEMS = 20
KEPT_PROBLEMS = 1000  # in the text of the exception, which nobody reads when there are more


def printable(text: object, limit: int = NAME_LIMIT) -> str:
    """`text` made safe for a terminal, a log and a report: control characters, bidirectional
    marks, line separators and lone surrogates become escapes, and it is cut at `limit` characters."""
    raw = str(text)
    cut = raw[:limit]
    shown = "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn") else _escape(c)
        for c in cut
    )
    return shown if len(raw) <= limit else f"{shown}… ({len(raw)} characters)"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way.

    `kind` is a kebab-case word for machines; `message` one sentence without a full stop, in the
    form "expected X, found Y" where that fits; `file` and `where` (tensor or field) say where.
    """

    kind: str
    message: str
    file: str | None = None
    where: str | None = None
    hint: str | None = None

    def line(self) -> str:
        """`error[kind]: FILE: WHERE: message`, and the hint on a line of its own."""
        places = [printable(p) for p in (self.file, self.where) if p is not None]
        text = f"error[{self.kind}]: " + ": ".join([*places, printable(self.message, 2000)])
        return text if self.hint is None else f"{text}\n  hint: {printable(self.hint, 1000)}"

    def to_json(self) -> dict[str, str | None]:
        return {
            "kind": self.kind,
            "message": printable(self.message, 2000),
            "file": None if self.file is None else printable(self.file),
            "where": None if self.where is None else printable(self.where),
            "hint": None if self.hint is None else printable(self.hint, 1000),
        }


class CkptToolError(Exception):
    """Work that could not be done; carries every problem its stage found. Exit code 2 unless said."""

    def __init__(self, *problems: Problem, exit_code: int = 2) -> None:
        if not problems:
            raise ValueError("an error needs at least one problem")
        problems = tuple(p if p.hint is not None else replace(p, hint=HINTS.get(p.kind)) for p in problems)
        lines = [p.line() for p in problems[:KEPT_PROBLEMS]]
        if left := len(problems) - len(lines):
            lines.append(f"(+{left} more problems)")
        super().__init__("\n".join(lines))
        self.problems = problems
        self.exit_code = exit_code

    @property
    def kind(self) -> str:
        return self.problems[0].kind

    def text(self) -> str:
        """The first problems, one a line, those of several layers as one, then a count of the rest. A hint
        that several in a row share stands below the last of them."""
        groups = list(_by_layers(self.problems))
        shown = [folded for folded, _ in groups[:SHOWN_PROBLEMS]]
        following = (*(p.hint for p in shown[1:]), None)
        once = (replace(p, hint=None) if p.hint == n else p for p, n in zip(shown, following, strict=True))
        lines = [p.line() for p in once]
        if left := sum(count for _, count in groups[SHOWN_PROBLEMS:]):
            lines.append(f"(+{left} more problems)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        return {"error": self.kind, "problems": [p.to_json() for p in self.problems]}


_NUMBER = re.compile(r"(?<![^./])\d{1,9}(?![^./])", re.ASCII)  # a whole part of a tensor's name


def _by_layers(problems: Sequence[Problem]) -> Iterator[tuple[Problem, int]]:
    """Each problem and how many it stands for: those that differ in one number of a tensor's name alone, if
    the numbers follow on each other, are one of `layers.{0..31}`."""
    alike: dict[tuple[object, ...], list[tuple[Problem, tuple[int, ...]]]] = {}
    for p in problems:
        where = p.where or ""
        key = (p.kind, p.message, p.file, p.hint, _NUMBER.sub("\0", where))
        alike.setdefault(key, []).append((p, tuple(map(int, _NUMBER.findall(where)))))
    for group in alike.values():
        first, numbers = group[0][0], [n for _, n in group]
        varied = [k for k, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
        layers = sorted(n[varied[0]] for n in numbers) if len(varied) == 1 else []
        if not layers or layers != list(range(layers[0], layers[-1] + 1)):
            yield from ((p, 1) for p, _ in group)
            continue
        at = list(_NUMBER.finditer(first.where or ""))[varied[0]]
        assert first.where is not None
        named = f"{first.where[: at.start()]}{{{layers[0]}..{layers[-1]}}}{first.where[at.end() :]}"
        yield replace(first, where=named), len(group)


# What leads out of a kind, whoever finds it; a hint of its own comes before.
HINTS = {
    "truncated": "a download, a copy or a save stopped before its end: get the whole file",
    "trailing-data": "a download, a copy or a save went wrong: get the file again",
    **dict.fromkeys(
        ("bad-zip", "bad-tar", "bad-safetensors", "bad-bundle", "bad-pickle", "missing-record", "checksum"),
        "a download, a copy or a save went wrong: get the file again",
    ),
    "missing-tensor": "get the rest of the model, or save all of it again",
    "bad-tokenizer": "get the tokenizer's files again, as they were published, or give others by --tokenizer",
    "read-failed": "look at the rights of the file, the disk and the network, then run this again",
    "download-failed": "check the name and the network, then run this again",
    "unsupported-byteorder": "load it and save it again on a machine with little-endian numbers",
    "input-changed": "nothing else may write to the input while it is read",
}


def fail(
    kind: str, message: str, *, file: object = None, where: object = None, hint: str | None = None
) -> NoReturn:
    """Raise the error for one problem."""
    raise CkptToolError(
        Problem(
            kind,
            message,
            None if file is None else str(file),
            None if where is None else str(where),
            hint,
        )
    )


def fail_all(problems: Iterable[Problem]) -> None:
    """Raise one error for all of `problems`; do nothing when there are none."""
    found = tuple(problems)
    if found:
        raise CkptToolError(*found)


def fail_unread(error: OSError, path: str | os.PathLike[str], where: str | None = None) -> NoReturn:
    """Raise the error for a file given by its `path` that could not be read. Kinds: `not-found`,
    `wrong-format` (a folder), `read-failed`."""
    text = os.fspath(path)
    if isinstance(error, IsADirectoryError):
        fail("wrong-format", "expected a file, found a folder", file=text, where=where)
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        fail("read-failed", f"cannot be read: {error.strerror}", file=text, where=where)
    folder, name = os.path.split(text)
    try:
        beside = os.listdir(folder or ".")[:2000]
    except OSError:
        beside = []
    fail("not-found", "expected a file, found none", file=text, where=where, hint=near(name, beside))


def near(word: str, known: Iterable[str]) -> str | None:
    """A hint with the one or two of `known` that are spelled almost like `word`; None where none is."""
    from difflib import get_close_matches

    by_lower = {k.lower(): k for k in known}
    found = [by_lower[m] for m in get_close_matches(word.lower(), list(by_lower), 2, 0.7)]
    return f"did you mean {' or '.join(found)}?" if found else None


EXTRAS = {"torch": "verify", "transformers": "hf", "cryptography": "sign", "ray": "ray", "pandas": "notebook"}
EXTRAS |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx")
PACKAGES = ("numpy", "click", "rich", "safetensors", "huggingface_hub", "tokenizers", "sentencepiece")


# What glibc's loader says of a library that finds no place in memory.
_NO_ROOM = ("failed to map segment", "cannot map zero-fill", "cannot allocate memory", "out of memory")


def has_no_room(error: BaseException) -> bool:
    """Whether the import of a library failed as the process may not have that much memory (`ulimit -v`)."""
    if not isinstance(error, ImportError) or not any(said in str(error).lower() for said in _NO_ROOM):
        return False
    from resource import RLIM_INFINITY, RLIMIT_AS, getrlimit

    return getrlimit(RLIMIT_AS)[0] != RLIM_INFINITY  # without a limit: a file system that is mounted noexec


def missing_package(error: ImportError) -> Problem | None:
    """The problem of kind `missing-package` where an import failed of a package that an install may lack or
    hold broken; None where it is another module that was not found, or a library that has no room."""
    name = (error.name or "").partition(".")[0]
    if (name not in EXTRAS and name not in PACKAGES) or has_no_room(error):
        return None
    found = "none" if isinstance(error, ModuleNotFoundError) else f"that it cannot be loaded ({error})"
    wanted = f"'ckpt-tool[{EXTRAS[name]}]'" if name in EXTRAS else name
    message = f"expected the package {name}, found {found}"
    return Problem("missing-package", message, hint=f"pip install {wanted}")
