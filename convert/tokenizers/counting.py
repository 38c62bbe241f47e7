"""How many ids a tokenizer of the Hugging Face layout has, without making its tokens: a vocabulary of 256,000
tokens and their merges takes a few hundred megabytes as Python values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# A key and its number, and what comes after. Within a string a quote has a backslash before it, so what looks
# like a key at the outset of `_VOCAB` is one.
_ENTRY = re.compile(rb'\s*+"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*+:\s*+(\d{1,10})\s*+([,}])', re.DOTALL)
_VOCAB = re.compile(rb'"vocab"\s*+:\s*+\{')
_ADDED = re.compile(rb'"added_tokens"\s*+:\s*+\[')
_ID = re.compile(rb'"id"\s*+:\s*+(\d{1,10})\s*+[,}]')
_DECODER = re.compile(rb'"added_tokens_decoder"\s*+:\s*+\{')
_KEY = re.compile(rb'"(\d{1,10})"\s*+:\s*+\{')


def ids_of(files: Mapping[str, bytes]) -> tuple[int, str] | None:
    """The ids of tokenizer.json, else of vocab.json, with those that transformers adds, of
    tokenizer_config.json or, where that has none, of added_tokens.json; with the file that has the largest.
    None where no file tells it, as one that holds another kind of vocabulary."""
    found: dict[str, int] = {}
    for name, numbers in _numbers(files):
        found[name] = max(found.get(name, -1), max(numbers, default=-1))
    if not found.keys() & {"tokenizer.json", "vocab.json"} or max(found.values()) < 0:
        return None
    largest = max(found, key=found.__getitem__)
    return found[largest] + 1, largest


def renumbered(files: Mapping[str, bytes]) -> tuple[int, str, int] | None:
    """An added token that a tokenizer.json which is read by transformers gives another id than a file says:
    its id, the file, and the next free id, which it gets. The ids of added tokens count on without a gap
    (findings/added_tokens_renumbered.sh); None where they do, and without a tokenizer.json."""
    if "tokenizer.json" not in files:
        return None
    none: Iterator[int] = iter(())
    first, *added = [*_numbers(files), ("", none)]
    free = max(first[1], default=-1) + 1
    for number, name in sorted((number, name) for name, numbers in added for number in numbers):
        if number > free:
            return (number, name, free) if free else None
        free = max(free, number + 1)
    return None


def _numbers(files: Mapping[str, bytes]) -> Iterator[tuple[str, Iterator[int]]]:
    if (data := files.get("tokenizer.json")) is not None:
        if (vocab := _VOCAB.search(data)) is None:
            return
        yield "tokenizer.json", _of_object(data, vocab.end())
        if (added := _ADDED.search(data)) is not None:
            last = _end_of_list(data, added.end())
            yield "tokenizer.json", (int(m[1]) for m in _ID.finditer(data, added.end(), last))
    elif (data := files.get("vocab.json")) is not None:
        yield "vocab.json", _of_object(data, data.find(b"{") + 1)
    if (config := files.get("tokenizer_config.json")) is not None and (at := _DECODER.search(config)):
        yield "tokenizer_config.json", (int(m[1]) for m in _KEY.finditer(config, at.end()))
    elif (more := files.get("added_tokens.json")) is not None:
        yield "added_tokens.json", _of_object(more, more.find(b"{") + 1)


def _of_object(data: bytes, start: int) -> Iterator[int]:
    """The numbers of an object, up to its end or to what is no number."""
    entry = _ENTRY.match(data, start)
    while entry is not None:
        yield int(entry[1])
        entry = _ENTRY.match(data, entry.end()) if entry[2] == b"," else None


def _end_of_list(data: bytes, start: int) -> int:
    """Where a list of flat objects ends: at a bracket outside of strings."""
    for m in re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|\]', re.DOTALL).finditer(data, start):
        if m[0] == b"]":
            return m.start()
    return len(data)
