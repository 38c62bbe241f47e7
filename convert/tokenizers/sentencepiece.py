"""sentencepiece `tokenizer.model` of type BPE: Llama 1 and 2, Code Llama, Mistral v1 to v7.

The file is a protobuf message (google/sentencepiece, src/sentencepiece_model.proto). It is walked here, with
limits, and no library sees it: a file that passes has exactly the shape that the recipe below is right for.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers.hf_files import (
    NO_MORE,
    AddedToken,
    More,
    TokenizerResult,
    bos_template,
    config_documents,
    tokenizer_json,
)
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

MAX_BYTES = 32 << 20
MAX_PIECES = 500_000  # twice the largest published vocabulary
MAX_PIECE_BYTES = 512
SPACE = "▁"  # U+2581, how sentencepiece writes a space

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "byte"}
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Pieces of Code Llama (meta-llama/codellama, llama/tokenizer.py), and what transformers' CodeLlamaTokenizer
# calls them
_INFILL = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
}


class Piece(NamedTuple):
    """One id of the vocabulary; `kind` as in the protobuf (NORMAL, CONTROL, ...)."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says, checked: pieces in id order, -1 for a special token it does without."""

    pieces: tuple[Piece, ...]
    dummy_prefix: bool
    unk: int
    bos: int
    eos: int
    pad: int

    def ids(self, kind: int) -> dict[str, int]:
        """The pieces of one kind and their ids, in id order."""
        return {piece.text: id for id, piece in enumerate(self.pieces) if piece.kind == kind}


def looks_like(data: bytes) -> bool:
    """Whether the file begins as a ModelProto does: field 1, a piece, whose own first field is its text."""
    return data[:1] == b"\x0a" and data[2:3] == b"\x0a"


class _Fields:
    """The fields of one protobuf message; a value is an int, or the range of its bytes."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data, self.file = data, file

    def refuse(self, message: str, position: int) -> NoReturn:
        fail("bad-tokenizer", message, file=self.file, where=f"byte {position}")

    def varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        start = position
        while position < end and shift < 70:
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position
            shift += 7
        self.refuse("expected a protobuf number, found none that ends", start)

    def walk(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, first, last): the value in `first` for a varint, else its byte range."""
        position = start
        while position < end:
            tag_at = position
            tag, position = self.varint(position, end)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                value, position = self.varint(position, end)
                yield number, wire, value, 0
                continue
            if wire == _BYTES:
                size, position = self.varint(position, end)
            elif wire == _FIXED32:
                size = 4
            elif wire == _FIXED64:
                size = 8
            else:
                self.refuse(f"expected a protobuf field, found wire type {wire}", tag_at)
            if number == 0 or size > end - position:
                self.refuse(
                    f"expected a protobuf field within {end - position} bytes, found number {number} of "
                    f"{size} bytes",
                    tag_at,
                )
            yield number, wire, position, position + size
            position += size

    def text(self, first: int, last: int) -> str:
        try:
            return self.data[first:last].decode()
        except UnicodeDecodeError as error:
            self.refuse("expected UTF-8, found other bytes", first + error.start)


def read(data: bytes, file: str) -> Model:
    """The model in `data`. Refuses (`bad-tokenizer`, all problems together) what is not sentencepiece, is
    not a BPE model with byte fallback, or normalizes text in a way that a Hugging Face file could not
    repeat."""
    if len(data) > MAX_BYTES:
        fail("bad-tokenizer", f"expected at most {MAX_BYTES} bytes, found {len(data)}", file=file)
    fields = _Fields(data, file)
    pieces: list[Piece] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    charsmap = False
    for number, wire, first, last in fields.walk(0, len(data)):
        if number > 5 and number < 200:  # 200 and above are extensions
            fields.refuse(f"expected a field of ModelProto, found number {number}", first)
        if number <= 5 and wire != _BYTES:
            fields.refuse(f"expected a message in field {number}, found wire type {wire}", first)
        if number == 1:
            pieces.append(_piece(fields, first, last))
            if len(pieces) > MAX_PIECES:
                fail("bad-tokenizer", f"expected at most {MAX_PIECES} pieces, found more", file=file)
        elif number == 2:
            trainer.update((n, v) for n, w, v, _ in fields.walk(first, last) if w == _VARINT)
        elif number in (3, 5):  # normalizer, and denormalizer
            for n, w, v, end in fields.walk(first, last):
                if w == _VARINT and number == 3:
                    normalizer[n] = v
                charsmap = charsmap or (w == _BYTES and n == 2 and end > v)
    model = Model(
        tuple(pieces),
        dummy_prefix=bool(normalizer.get(3, 1)),
        unk=_signed(trainer.get(40, 0)),
        bos=_signed(trainer.get(41, 1)),
        eos=_signed(trainer.get(42, 2)),
        pad=_signed(trainer.get(43, -1)),
    )
    fail_all(_setting_problems(trainer, normalizer, charsmap, file) + _piece_problems(model, file))
    return model


def pieces(data: bytes, file: str) -> tuple[Piece, ...]:
    """The pieces of a sentencepiece model of any type, in id order; `bad-tokenizer` for what is none."""
    if len(data) > MAX_BYTES or not looks_like(data):
        message = f"expected a sentencepiece model of at most {MAX_BYTES} bytes, found {data[:16]!r}"
        fail("bad-tokenizer", message, file=file)
    fields = _Fields(data, file)
    found: list[Piece] = []
    for number, wire, first, last in fields.walk(0, len(data)):
        if number == 1 and wire == _BYTES:
            found.append(_piece(fields, first, last))
        if len(found) > MAX_PIECES:
            fail("bad-tokenizer", f"expected at most {MAX_PIECES} pieces, found more", file=file)
    return tuple(found)


def charsmap(data: bytes, file: str) -> bytes:
    """The precompiled table by which a model replaces characters; empty where it has none."""
    fields = _Fields(data, file)
    specs = [(a, b) for n, w, a, b in fields.walk(0, len(data)) if n == 3 and w == _BYTES]
    tables = [data[a:b] for spec in specs for n, w, a, b in fields.walk(*spec) if n == 2 and w == _BYTES]
    return tables[-1] if tables else b""


def _piece(fields: _Fields, start: int, end: int) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, wire, first, last in fields.walk(start, end):
        if number == 1 and wire == _BYTES:
            if not 0 < last - first <= MAX_PIECE_BYTES:
                fields.refuse(
                    f"expected a piece of 1 to {MAX_PIECE_BYTES} bytes, found {last - first}", first
                )
            text = fields.text(first, last)
        elif number == 2 and wire == _FIXED32:
            (score,) = struct.unpack_from("<f", fields.data, first)
        elif number == 3 and wire == _VARINT:
            kind = first
    if not text or kind not in _KINDS or not math.isfinite(score):
        fields.refuse(
            f"expected a piece with text, score and kind, found kind {kind} and score {score}", start
        )
    return Piece(text, score, kind)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _setting_problems(
    trainer: dict[int, int], normalizer: dict[int, int], charsmap: bool, file: str
) -> list[Problem]:
    kind = trainer.get(3, 1)
    wrong = [
        (
            kind != _BPE,
            "trainer_spec.model_type",
            f"expected a BPE model, found {_MODEL_TYPES.get(kind, f'type {kind}')}",
        ),
        (
            not trainer.get(35, 0),
            "trainer_spec.byte_fallback",
            "expected bytes for characters without a piece, found byte_fallback off",
        ),
        (
            bool(trainer.get(24, 0)),
            "trainer_spec.treat_whitespace_as_suffix",
            "expected spaces before words, found them after",
        ),
        (charsmap, "normalizer_spec", "expected text to be taken as it is, found a table of replacements"),
        (
            bool(normalizer.get(4, 1)),
            "normalizer_spec.remove_extra_whitespaces",
            "expected spaces to be kept, found them removed",
        ),
        (
            not normalizer.get(5, 1),
            "normalizer_spec.escape_whitespaces",
            f"expected spaces written as {SPACE}, found them plain",
        ),
    ]
    return [Problem("bad-tokenizer", message, file, where) for bad, where, message in wrong if bad]


def _piece_problems(model: Model, file: str) -> list[Problem]:
    problems = []

    def problem(message: str, where: str) -> None:
        problems.append(Problem("bad-tokenizer", message, file, where))

    first: dict[str, int] = {}
    for id, piece in enumerate(model.pieces):
        if first.setdefault(piece.text, id) != id:
            problem(
                f"expected each piece once, found `{piece.text}` at {first[piece.text]} and {id}",
                f"piece {id}",
            )
        if piece.kind == UNUSED:
            problem("expected no piece marked unused, found one", f"piece {id}")
        if piece.kind == NORMAL and " " in piece.text:
            problem(f"expected spaces written as {SPACE}, found `{piece.text}`", f"piece {id}")
    spelled = {f"<0x{byte:02X}>" for byte in range(256)}
    missing, foreign = spelled - model.ids(BYTE).keys(), model.ids(BYTE).keys() - spelled
    if missing or foreign:
        message = "expected the byte pieces <0x00> to <0xFF>, found "
        problem(message + (f"no {min(missing)}" if missing else f"`{min(foreign)}`"), "pieces")
    for name, id, kind, needed in (
        ("unk", model.unk, UNKNOWN, True),
        ("bos", model.bos, CONTROL, True),
        ("eos", model.eos, CONTROL, True),
        ("pad", model.pad, CONTROL, False),
    ):
        if id < 0 and not needed:
            continue
        found = model.pieces[id].kind if 0 <= id < len(model.pieces) else None
        if found != kind:
            what = _KINDS[found] if found else "no piece"
            problem(f"expected a {_KINDS[kind]} piece at id {id}, found {what}", f"trainer_spec.{name}_id")
    return problems


def merges(model: Model, file: str) -> list[tuple[str, str]]:
    """The merge list that makes a BPE by merge rank do what sentencepiece does by piece score.

    sentencepiece joins the adjacent pair whose concatenation is the piece of the highest score, however
    that piece is cut; so each piece brings all its cuts into two pieces, the best piece first. Only normal
    pieces take part.
    """
    ids = model.ids(NORMAL)
    found: list[tuple[str, str]] = []
    problems = []
    for text in sorted(ids, key=lambda text: (-model.pieces[ids[text]].score, ids[text])):
        cuts = []
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                cuts.append((ids[left], ids[right], left, right))
            elif (left in ids or cut == 1) and (right in ids or cut == len(text) - 1):
                # sentencepiece also joins single characters that are no pieces; merges cannot say that
                strange = left if left not in ids else right
                message = f"expected a piece for each character of `{text}`, found none for `{strange}`"
                problems.append(Problem("bad-tokenizer", message, file, f"piece {ids[text]}"))
                break
        cuts.sort()
        found.extend((left, right) for _, _, left, right in cuts)
    fail_all(problems)
    return found


def _added_tokens(model: Model) -> list[AddedToken]:
    """The pieces that Hugging Face is to find whole in text.

    Unknown and control pieces, which the original never finds but chat templates spell. User-defined
    pieces, which the original takes out of the normalized text before anything is merged. And the infilling
    pieces of Code Llama, whose ids Meta's code puts between texts: found in normalized text, they leave the
    text after them without a dummy prefix.
    """
    infill = _INFILL.values() if _can_infill(model) else ()
    found = []
    for id, (text, _, kind) in enumerate(model.pieces):
        if text in infill:
            found.append(AddedToken(id, text, normalized=True))
        elif kind in (UNKNOWN, CONTROL):
            found.append(AddedToken(id, text))
        elif kind == USER_DEFINED:
            found.append(AddedToken(id, text, control=False, normalized=True))
    return found


def _can_infill(model: Model) -> bool:
    return {piece.text for piece in model.pieces}.issuperset(_INFILL.values())


def _normalizer(model: Model, added: Iterable[AddedToken]) -> dict[str, Any]:
    """Spaces become ▁, and one ▁ comes first.

    The library looks for the normalized ones of the `added` tokens by what the normalizer makes of their
    own text. That must be the text without the leading ▁, so an input that is nothing but such a token does
    not get one.
    """
    steps: list[dict[str, Any]] = []
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    normalized = "|".join(re.escape(token.text) for token in added if token.normalized)
    if model.dummy_prefix and normalized:
        alone = f"\\A{SPACE}(?=(?:{normalized})\\z)"
        steps.append({"type": "Replace", "pattern": {"Regex": alone}, "content": ""})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: Model) -> dict[str, Any]:
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def convert(data: bytes, *, file: str, more_tokens: More = NO_MORE) -> TokenizerResult:
    """The Hugging Face files of a sentencepiece tokenizer, `more_tokens` after its pieces. The model is kept
    as `tokenizer.model`, and under its own name too where that differs (`tokenizer.model.v3`: mistral_common
    reads the version off the name)."""
    model = read(data, file)
    vocab = {piece.text: id for id, piece in enumerate(model.pieces)}
    later = more_tokens.after(vocab, len(vocab))
    added = [*_added_tokens(model), *later]
    by_id = {token.id: token for token in added}
    bos, eos = by_id[model.bos], by_id[model.eos]
    named = {"bos_token": bos.text, "eos_token": eos.text, "unk_token": by_id[model.unk].text}
    if model.pad >= 0:
        named["pad_token"] = by_id[model.pad].text
    named = {**more_tokens.named(later), **named}
    more: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,  # slow classes of transformers 4: a dummy prefix after each control token, as here
        "use_default_system_prompt": False,
    }
    notes = [
        "text that spells a control piece, such as <s>, becomes that token, and text after it gets a leading "
        "space of its own; the original reads it as plain text"
    ]
    if model.dummy_prefix and (user_defined := model.ids(USER_DEFINED)):
        notes.append(
            f"a text that is nothing but a user-defined piece, such as {next(iter(user_defined))}, gets no "
            "leading space; the original gives it one"
        )
    if _can_infill(model):
        notes.append(
            "infilling: encode `<PRE> {prefix} <SUF>{suffix} <MID>` (without a prefix: `<PRE> <SUF>`); "
            "<FILL_ME> is plain text: it takes CodeLlamaTokenizer, whose ids in transformers 5 are not Meta's"
        )
    else:
        # The class would add its infilling tokens as ids that the embedding does not have
        more |= {name: None for name in (*_INFILL, "fill_token")}
    documents = {
        "tokenizer.json": tokenizer_json(
            vocab=vocab,
            merges=merges(model, file),
            added=added,
            normalizer=_normalizer(model, added),
            pre_tokenizer=None,
            post_processor=bos_template(bos),
            decoder=_decoder(model),
            model={"unk_token": named["unk_token"], "fuse_unk": True, "byte_fallback": True},
        ),
        **config_documents(named, added, more),
        "tokenizer.model": data,
        file: data,
    }
    facts = {
        "bos_token_id": Value(bos.id, f"{file}: trainer_spec.bos_id"),
        "eos_token_id": Value(eos.id, f"{file}: trainer_spec.eos_id"),
    }
    return TokenizerResult(documents, notes, len(vocab) + len(later), facts)
