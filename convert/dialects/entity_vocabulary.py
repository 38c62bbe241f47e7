"""The entities that a model knows, as their authors list them (one JSON object a line) and as transformers
reads them (one object from "language:title" to id), and what is copied for the entity that they lack.

Source: studio-ousia/luke @25165454 (luke/utils/entity_vocab.py, convert_luke_to_huggingface_model.py).
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from json.encoder import encode_basestring
from typing import Any, BinaryIO

from ckpt_tool.checkpoint.base import Document
from ckpt_tool.checkpoint.signs import pointer
from ckpt_tool.checkpoint.spool import PIECE, Spool
from ckpt_tool.errors import Problem, fail, fail_all, printable

LINES, OBJECT = "entity_vocab.jsonl", "entity_vocab.json"
PAD, UNKNOWN, MASK, SECOND = "[PAD]", "[UNK]", "[MASK]", "[MASK2]"
SPECIAL = (PAD, UNKNOWN, MASK)
MAX_BYTES = 1 << 30  # twice what 1.2 million entities in 24 languages take
MAX_LINE = 1 << 20
_OPEN = re.compile(rb"\s*\{")
_ENTRY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*(\d{1,9})\s*([,}])')
SHOWN = 8  # problems before the rest is counted


@contextmanager
def opened(document: Document) -> Iterator[BinaryIO]:
    """A file that may be larger than what fits into memory; `bad-tokenizer` for one that no vocabulary is."""
    if document.size > MAX_BYTES:
        fail(
            "bad-tokenizer", f"expected at most {MAX_BYTES} bytes, found {document.size}", file=document.name
        )
    try:
        with document.open() as f:
            if (sign := pointer(f.read(1024))) is not None:
                message = f"expected a document, found {sign.what}"
                fail("wrong-format", message, file=document.name, hint=sign.hint)
            f.seek(0)
            yield f
    except OSError as error:
        fail("read-failed", f"cannot be read: {os.strerror(error.errno or 0)}", file=document.name)


def lines(document: Document) -> Iterator[tuple[int, bytes]]:
    """(number, line); `bad-tokenizer` for a line that no vocabulary has."""
    with opened(document) as f:
        number = 0
        while line := f.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                message = f"expected at most {MAX_LINE} bytes, found more"
                fail("bad-tokenizer", message, file=document.name, where=f"line {number}")
            if line.strip():
                yield number, line


def pieces(document: Document) -> Iterator[bytes]:
    """The bytes, some of them at a time."""
    with opened(document) as f:
        while piece := f.read(PIECE):
            yield piece


def spooled(parts: Iterable[bytes]) -> Spool:
    """All of many short parts."""
    made, held, size = Spool(), list[bytes](), 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= PIECE:
            made.write(b"".join(held))
            held, size = [], 0
    made.write(b"".join(held))
    return made


class Vocabulary:
    """The vocabulary of `document` for a table of `rows` entities. `ids` has its special tokens, `content`
    is what transformers reads, with `[MASK2]` after the last entity; every problem is raised at once. Held in
    memory are 8 bytes for each name."""

    def __init__(self, document: Document, rows: int) -> None:
        self.file, self.rows = document.name, rows
        self.ids: dict[str, int] = {}
        self.found: list[Problem] = []
        self.more = 0
        self._seen = bytearray(rows)  # by id
        self._hashes = array("q")
        self.content = spooled(self._parts(document))
        self._check(self._hashes, document)
        del self._hashes

    def _parts(self, document: Document) -> Iterator[bytes]:
        yield b"{"
        for number, line in lines(document):
            id, names = self._entry(line, f"line {number}")
            for name in names:
                self._hashes.append(hash(name))
                yield b"%s: %d, " % (_text(name), id)
        yield b"%s: %d}\n" % (_text(SECOND), self.rows)

    def _check(self, hashes: array[int], document: Document) -> None:
        """What the file says as a whole."""
        import numpy as np

        for token in (t for t in SPECIAL if t not in self.ids):
            self._refuse(f"expected the entity {token}, found none", "entities")
        if missing := self._seen.count(0):
            message = f"expected an entity for each of {self.rows} rows, found none for {missing}"
            self._refuse(message, f"id {self._seen.index(0)}")
        ordered = np.frombuffer(hashes, dtype="<i8")
        ordered.sort()
        twice = {int(h) for h in ordered[1:][ordered[1:] == ordered[:-1]][:SHOWN]}
        if twice:
            first: dict[str, int] = {}
            for number, line in lines(document):
                for name in (n for n in _names(_parsed(line)) if hash(n) in twice):
                    if first.setdefault(name, number) != number:
                        told = f"{printable(name, 60)} on line {first[name]} too"
                        self._refuse(f"expected each entity once, found {told}", f"line {number}")
        if self.more:
            self.found.append(Problem("bad-tokenizer", f"{self.more} more problems of this kind", self.file))
        fail_all(self.found)

    def _refuse(self, message: str, where: str) -> None:
        if len(self.found) < SHOWN:
            self.found.append(Problem("bad-tokenizer", message, self.file, where))
        else:
            self.more += 1

    def _entry(self, line: bytes, where: str) -> tuple[int, list[str]]:
        """Of one line: the id, and what transformers calls it in each language."""
        item = _parsed(line)
        id, names = item.get("id"), _names(item)
        if type(id) is not int or not 0 <= id < self.rows:
            found = printable(json.dumps(id, default=repr), 40)
            self._refuse(f"expected an id from 0 to {self.rows - 1}, found {found}", where)
            return -1, []
        if not names:
            self._refuse("expected entities, a list of [title, language], found something else", where)
            return -1, []
        if self._seen[id]:
            self._refuse(f"expected each id once, found {id} again", where)
        self._seen[id] = 1
        if names[0] in SPECIAL:
            self.ids[names[0]] = id
        return id, names


def _text(name: str) -> bytes:
    return encode_basestring(name).encode("utf-8", "surrogatepass")


def _parsed(line: bytes) -> dict[str, Any]:
    """One line, which is short; empty for what is no object."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return item if isinstance(item, dict) else {}


def _names(item: dict[str, Any]) -> list[str]:
    """What transformers calls an entity; a special token is listed once for each language. Empty for what is
    no entity."""
    entities = item.get("entities")
    if not isinstance(entities, list) or not all(map(_is_entity, entities)):
        return []
    special = [title for title, _ in entities if title in SPECIAL]
    return special[:1] or [f"{language}:{title}" if language else title for title, language in entities]


def _is_entity(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and type(x[0]) is str and isinstance(x[1], str | None)


# --- the way back -----------------------------------------------------------------------------------------


def entries(parts: Iterable[bytes]) -> Iterator[tuple[str, int]]:
    """(name, id) of `entity_vocab.json`, in order, one at a time; `bad-tokenizer` for another file."""
    source = iter(parts)
    held, before, at = b"", 0, 0
    wanted, more = _OPEN, True
    while more:
        found = wanted.match(held, at)
        if found is None:
            piece = next(source, b"") if len(held) - at <= MAX_LINE else b""
            held, before, at = held[at:] + piece, before + at, 0
            if not piece:
                break
            continue
        at = found.end()
        if wanted is _ENTRY:
            try:
                name = json.loads(found[1])
            except ValueError:
                at = found.start()
                break
            yield name, int(found[2])
            more = found[3] == b","
        wanted = _ENTRY
    if more or held[at:].strip() or any(piece.strip() for piece in source):
        message = "expected an object from names to ids, found something else"
        fail("bad-tokenizer", message, file=OBJECT, where=f"byte {before + at}")


def special_ids(document: Document) -> dict[str, int]:
    """The ids of special tokens in `entity_vocab.json`."""
    return {name: id for name, id in entries(pieces(document)) if name in (*SPECIAL, SECOND)}


def written_back(parts: Iterable[bytes]) -> Spool:
    """`entity_vocab.jsonl` of what transformers reads, less `[MASK2]`. How often each entity was linked is
    not known any more: counts are 0."""
    return spooled(_lines_of(entries(parts)))


def _lines_of(named: Iterable[tuple[str, int]]) -> Iterator[bytes]:
    for id, held in groupby((x for x in named if x[0] != SECOND), key=lambda x: x[1]):
        item = {"id": id, "entities": [_in_parts(name) for name, _ in held], "count": 0}
        yield json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _in_parts(name: str) -> list[str | None]:
    language, colon, title = name.partition(":")
    return [title, language] if colon and name not in SPECIAL else [name, None]
