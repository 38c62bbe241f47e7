"""Do two tokenizer.json give the same ids? Compared as data where that is total (ids of pieces, merges, flags
of special tokens), and on a corpus of probe texts where two spellings may mean the same (how text is
normalized, split, framed and decoded)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tool.records import dataclass
from ckpt_tool.verify.probe import PAIR, texts

MAX_BYTES = 64 << 20
MAX_PIECES = 400_000  # of a vocabulary whose pieces become texts of their own
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SETTINGS = ("truncation", "padding")
LONGEST_WORD = "max_input_chars_per_word"  # characters, beyond which WordPiece takes a word for unknown
SHOWN = 60


class Unreadable(Exception):
    """The library does not read the file; the message says why."""


@dataclass(frozen=True)
class Difference:
    """`where` in tokenizer.json, and what was expected and found there."""

    where: str
    message: str


@dataclass(frozen=True)
class Comparison:
    """`spelled` are the parts that are written in another way and did the same to all of `texts`, `apart`
    says what they do otherwise to two texts in one row."""

    differences: tuple[Difference, ...]
    spelled: tuple[str, ...]
    texts: int
    apart: str | None = None


class Ids:
    """One tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, data: bytes) -> None:
        from tokenizers import Tokenizer

        if len(data) > MAX_BYTES:
            raise Unreadable(f"expected at most {MAX_BYTES} bytes, found {len(data)}")
        try:
            self.library = Tokenizer.from_str(data.decode())
            self.parsed: dict[str, Any] = json.loads(self.library.to_str())
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises bare Exception, and panics as BaseException
            raise Unreadable(
                f"expected a tokenizer, found what cannot be read: {first_line(error)}"
            ) from error
        self.settings = {k: self.parsed.get(k) for k in SETTINGS}
        self.library.no_truncation()
        self.library.no_padding()

    @property
    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self.library.get_vocab(with_added_tokens=True)
        return found

    @property
    def added(self) -> dict[int, dict[str, Any]]:
        """The tokens that are looked for in text before anything else, by id, with `content` and flags."""
        return {t["id"]: {k: t[k] for k in ("content", *FLAGS)} for t in self.parsed["added_tokens"]}

    def normalizes(self, others: Mapping[int, Mapping[str, Any]]) -> bool:
        """Whether `normalized` of a token acts: there is a normalizer, or some of this table's or of `others`
        are looked for before the rest, which decides where two tokens overlap."""
        tables = (self.added, others)
        mixed = any(len({t.get("normalized") for t in table.values()}) > 1 for table in tables)
        return mixed or self.parsed.get("normalizer") is not None

    @property
    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.parsed["model"]
        return found

    def encode(self, text: str, framed: bool) -> list[int]:
        return list(self.library.encode(text, add_special_tokens=framed).ids)

    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that are put before and after every text."""
        try:
            plain, framed = self.encode("a", False), self.encode("a", True)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # as above
            raise Unreadable(first_line(error)) from error
        at = next((k for k in range(len(framed)) if framed[k : k + len(plain)] == plain), 0)
        return framed[:at], framed[at + len(plain) :]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def compare(expected: Ids, found: Ids, *, segments: bool = True) -> Comparison:
    """Every difference that acts, the one that explains most first; `segments` tells whether the model takes
    two texts in one row."""
    differences = [*_vocabulary(expected.vocabulary, found.vocabulary)]
    normal = expected.normalizes(found.added) or found.normalizes(expected.added)
    differences += flags(expected.added, found.added, "added_tokens", normal=normal)
    differences += _model(expected.model, found.model)
    for name in SETTINGS:
        a, b = expected.settings[name], found.settings[name]
        if a != b:
            differences.append(Difference(name, f"expected {shown(a)}, found {shown(b)}"))
    other = [name for name in PARTS if expected.parsed.get(name) != found.parsed.get(name)]
    other += [
        f"model.{k}"
        for k in sorted(
            {*expected.model, *found.model} - {"vocab", "merges", "type", "dropout", LONGEST_WORD}
        )
        if expected.model.get(k) != found.model.get(k)
    ]
    if not differences and expected.added != found.added:
        other.append("added_tokens: normalized")  # which nothing here reads
    if differences or not other:
        differences += [Difference(name, "written in another way") for name in other]
        return Comparison(tuple(differences), (), 0)
    return _on_texts(expected, found, other, segments)


def _vocabulary(expected: Mapping[str, int], found: Mapping[str, int]) -> Iterator[Difference]:
    if expected == found:
        return
    wrong = sorted((i, p) for p, i in expected.items() if found.get(p) != i)
    more = sorted((i, p) for p, i in found.items() if p not in expected)
    if wrong:
        i, piece = wrong[0]
        at = found.get(piece)
        text = f"expected id {i} for {shown(piece)}, found {'no such piece' if at is None else at}"
    else:
        i, piece = more[0]
        text = f"expected no piece {shown(piece)}, found it at id {i}"
    count = len(wrong) + len(more)
    yield Difference(
        "vocabulary", text + (f"; {count} of {len(expected)} pieces differ" if count > 1 else "")
    )


def flags(
    expected: Mapping[int, Mapping[str, Any]],
    found: Mapping[int, Mapping[str, Any]],
    where: str,
    *,
    normal: bool = True,
) -> Iterator[Difference]:
    """The special tokens that text is searched for, and how; `normal` tells whether `normalized` acts."""
    acting = FLAGS if normal else tuple(f for f in FLAGS if f != "normalized")
    for i in sorted({*expected, *found}):
        a, b = expected.get(i), found.get(i)
        if a is None or b is None:
            held = a or b
            assert held is not None
            what = ("expected", "found none") if b is None else ("expected no", "found it")
            yield Difference(f"{where}: {i}", f"{what[0]} {shown(held['content'])}, {what[1]}")
            continue
        for key in ("content", *acting):
            if a.get(key) != b.get(key):
                text = f"{key}: expected {shown(a.get(key))}, found {shown(b.get(key))}"
                yield Difference(f"{where}: {i} {shown(a['content'])}", text)


def _model(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    for key in ("type", "dropout", LONGEST_WORD):
        if expected.get(key) != found.get(key):
            yield Difference(
                f"model.{key}", f"expected {shown(expected.get(key))}, found {shown(found.get(key))}"
            )
    if expected.get("type") == found.get("type") == "Unigram" and expected.get("vocab") != found.get("vocab"):
        yield Difference("model.vocab", "expected the scores of the source, found others")
    a, b = expected.get("merges") or [], found.get("merges") or []
    if a == b:
        return
    at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    left, right = (shown(x[at]) if at < len(x) else "none" for x in (a, b))
    text = f"expected {left} as number {at} of {len(a)}, found {right} of {len(b)}"
    yield Difference("model.merges", text)


def _on_texts(expected: Ids, found: Ids, other: list[str], segments: bool) -> Comparison:
    """The parts `other` are written in different ways: what they do to text decides."""
    specials = [t["content"] for t in expected.added.values()]
    pieces = sorted(expected.vocabulary.items(), key=lambda item: item[1])[:MAX_PIECES]
    spellings = (expected.library.decode([i], skip_special_tokens=False) for _, i in pieces)
    count = 0
    for text in texts(specials, spellings):
        count += 1
        problem = _text(expected, found, text)
        if problem is not None:
            where = ", ".join(other)
            return Comparison((Difference(where, f"the text {shown(text)}: {problem}"),), (), count)
    problem = _pair(expected, found) if "post_processor" in other else None
    if problem is not None and segments:
        return Comparison((Difference("post_processor", problem),), (), count)
    return Comparison((), tuple(other), count, problem)


def _pair(expected: Ids, found: Ids) -> str | None:
    """What two texts in one row are framed by, and which segment each token is of: of a model with segments
    the numbers depend on both."""
    try:
        for texts_of_row in (PAIR[:1], PAIR):
            a, b = (side.library.encode(*texts_of_row) for side in (expected, found))
            for what, x, y in (("ids", a.ids, b.ids), ("segments", a.type_ids, b.type_ids)):
                if x != y:
                    words = " and ".join(map(shown, texts_of_row))
                    return f"{words} in one row: expected {what} {shown(x)}, found {shown(y)}"
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # as above
        return f"a row of two texts cannot be encoded: {first_line(error)}"
    return None


def _text(expected: Ids, found: Ids, text: str) -> str | None:
    try:
        for framed in (True, False):
            a, b = expected.encode(text, framed), found.encode(text, framed)
            if a != b:
                at = next(
                    (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
                return f"expected ids {_around(a, at)}, found {_around(b, at)}"
        for skip in (True, False):
            left = expected.library.decode(a, skip_special_tokens=skip)
            right = found.library.decode(a, skip_special_tokens=skip)
            if left != right:
                return f"expected its ids decoded as {shown(left)}, found {shown(right)}"
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # as above
        return f"cannot be encoded: {first_line(error)}"
    return None


def _around(ids: list[int], at: int) -> str:
    start = max(0, at - 2)
    part = ids[start : at + 4]
    before, after = "... " if start else "", " ..." if at + 4 < len(ids) else ""
    return f"[{before}{', '.join(map(str, part))}{after}]"


def shown(value: Any) -> str:
    """A value for a message, cut to a length."""
    text = (
        value if isinstance(value, str) and value.startswith("{") else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
