"""The tokenizer of models that read entities beside words: XLM-R's sentencepiece model, whose ids fairseq
moved up by one, and two tokens more that mark where an entity begins and ends.

Source: transformers 4.37.2 (models/mluke/tokenization_mluke.py) and fairseq's alignment of ids there:
<s> 0, <pad> 1, </s> 2, <unk> 3, piece k of the model k + 1, and <mask> after the last piece.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.convert.tokenizers.hf_files import ADDED, MAP, AddedToken, json_bytes
from ckpt_tool.convert.tokenizers.sentencepiece import CONTROL, UNKNOWN, Piece, charsmap, pieces
from ckpt_tool.errors import Problem, fail_all

MODEL = "sentencepiece.bpe.model"
OFFSET = 1
MARKERS = {"<ent>": "@", "<ent2>": "#"}  # and the piece whose embedding each starts from
# Its class takes the pieces from tokenizer.json, and no more; nothing in the files changes that.
OTHERWISE = (
    "MLukeTokenizer of transformers 5 (5.23.0) gives what has no piece the id of <s>, 0 and not 3, replaces "
    "no characters and keeps every space; releases before 5 read texts as the model does, and so does "
    "tokenizer.json, but for marks that are characters of their own (decomposed text): tokenizers (0.23.3) "
    "leaves them apart from their letter or out, where the model's table joins them"
)
NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}


def read(data: bytes, file: str) -> tuple[Piece, ...]:
    """The pieces of the model, which begins as fairseq's alignment supposes."""
    found = pieces(data, file)
    first = [(p.text, p.kind) for p in found[:3]]
    wanted = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    if first != wanted:
        told = ", ".join(text for text, _ in first)
        message = f"expected a model whose pieces begin with <unk>, <s>, </s>, found {told or 'none'}"
        fail_all([Problem("bad-tokenizer", message, file)])
    return found


def size_of(found: tuple[Piece, ...]) -> int:
    """How many ids there are before the markers: those of all pieces, of <pad> and of <mask>."""
    return len(found) + OFFSET + 1


def started_from(found: tuple[Piece, ...], file: str) -> list[int]:
    """The ids of the pieces whose embeddings the markers start from: without a space before them."""
    ids = {piece.text: k for k, piece in enumerate(found)}
    fail_all(
        Problem(
            "bad-tokenizer",
            f"expected the piece {text}, whose embedding {marker} starts from, found none",
            file,
        )
        for marker, text in MARKERS.items()
        if text not in ids
    )
    return [ids[text] + OFFSET for text in MARKERS.values()]


def documents(data: bytes, words: int, length: int) -> dict[str, bytes]:
    """The files beside the model, for a table of `words` rows before the markers, and texts of `length`.
    Releases of transformers before 5 read the model; 5 reads tokenizer.json, without which it needs protobuf
    and takes ids that are not fairseq's."""
    found = read(data, MODEL)
    ids = {marker: words + k for k, marker in enumerate(MARKERS)}
    mask = _flags(AddedToken(words - 1, "<mask>"), lstrip=True)
    listed = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>"}
    decoder = {str(k): _flags(AddedToken(k, text)) for k, text in listed.items()}
    decoder[str(words - 1)] = mask
    decoder |= {str(k): _flags(AddedToken(k, marker)) for marker, k in ids.items()}
    # As texts, transformers 5 would put a space before them, which makes them tokens without a row.
    first, second = ({"__type": "AddedToken", **_flags(AddedToken(k, m))} for m, k in ids.items())
    config: dict[str, Any] = {
        **NAMED,
        "mask_token": {"__type": "AddedToken", **mask},
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(MARKERS),
        "entity_token_1": first,
        "entity_token_2": second,
        "entity_unk_token": "[UNK]",
        "entity_pad_token": "[PAD]",
        "entity_mask_token": "[MASK]",
        "entity_mask2_token": "[MASK2]",
        "max_entity_length": 32,
        "max_mention_length": 30,
        "model_max_length": length,
        "task": None,
        "tokenizer_class": "MLukeTokenizer",
    }
    roles: Mapping[str, Any] = {**NAMED, "mask_token": mask, "additional_special_tokens": list(MARKERS)}
    return {
        MODEL: data,
        "tokenizer.json": _tokenizer_json(found, charsmap(data, MODEL), words, decoder),
        "tokenizer_config.json": json_bytes(dict(sorted(config.items()))),
        MAP: json_bytes(dict(sorted(roles.items()))),
        ADDED: json_bytes(ids),
    }


def _tokenizer_json(
    found: Sequence[Piece], replacements: bytes, words: int, added: Mapping[str, Any]
) -> bytes:
    """The pieces in fairseq's order, with what transformers 4 makes of such a model around them (XLM-R in its
    convert_slow_tokenizer.py)."""
    first = [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
    vocab = [*first, *([p.text, p.score] for p in found[3:]), ["<mask>", 0.0]]
    assert len(vocab) == words
    frame = [_special("<s>"), _sequence("A"), _special("</s>")]
    ids = {"<s>": 0, "</s>": 2}
    end = {"type": "Strip", "strip_left": False, "strip_right": True}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    table = base64.b64encode(replacements).decode()
    replaced = [{"type": "Precompiled", "precompiled_charsmap": table}] if table else []
    space = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": int(k), **token} for k, token in added.items()],
        "normalizer": {"type": "Sequence", "normalizers": [*replaced, end, spaces]},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame,
            "pair": [*frame, _special("</s>"), _sequence("B"), _special("</s>")],
            "special_tokens": {t: {"id": t, "ids": [k], "tokens": [t]} for t, k in ids.items()},
        },
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
    }
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()


def _special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _flags(token: AddedToken, lstrip: bool = False) -> dict[str, Any]:
    return {**token.to_json(), "lstrip": lstrip}
