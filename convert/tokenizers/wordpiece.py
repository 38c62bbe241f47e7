"""`vocab.txt` of BERT: one token a line, its id the number of the line.

The file does not say how text is prepared; google-research/bert, tokenization.py (which Megatron-LM has a copy
of, megatron/tokenizer/bert_tokenization.py) does: control characters go, Chinese characters stand alone, text
is lower-cased and loses its accents if the model is an uncased one, words end at spaces and punctuation and
are cut into the longest tokens that fit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers.hf_files import (
    AddedToken,
    TokenizerResult,
    config_documents,
    json_bytes,
    tokenizer_file,
)
from ckpt_tool.errors import Problem, fail_all

MAX_TOKENS = 1_000_000
MAX_TOKEN_CHARACTERS = 1000
PREFIX = "##"
LONGEST_WORD = 100  # characters; a longer one is [UNK] as a whole (max_input_chars_per_word)

NAMED = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# `--tokenizer-type` in Megatron's args, and whether it lower-cases (megatron/tokenizer/tokenizer.py)
_ARGS = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}


def read(data: bytes, file: str) -> dict[str, int]:
    """Token to id; `bad-tokenizer` with every problem of the file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fail_all([Problem("bad-tokenizer", f"expected UTF-8, found byte {error.start} to break it", file)])
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    problems: list[Problem] = []
    if len(lines) > MAX_TOKENS:
        message = f"expected at most {MAX_TOKENS} tokens, found {len(lines)}"
        fail_all([Problem("bad-tokenizer", message, file)])
    vocab: dict[str, int] = {}
    for number, token in enumerate(lines):
        where = f"line {number + 1}"
        if not 0 < len(token) <= MAX_TOKEN_CHARACTERS:
            message = f"expected a token of 1 to {MAX_TOKEN_CHARACTERS} characters, found {len(token)}"
            problems.append(Problem("bad-tokenizer", message, file, where))
        elif vocab.setdefault(token, number) != number:
            message = f"expected each token once, found `{token[:40]}` on line {vocab[token] + 1} too"
            problems.append(Problem("bad-tokenizer", message, file, where))
    problems += [
        Problem("bad-tokenizer", f"expected the token {token}, found none", file)
        for token in NAMED.values()
        if token not in vocab
    ]
    fail_all(problems)
    return vocab


def lower_cases(vocab: Mapping[str, int], file: str, config: Mapping[str, Any]) -> Value:
    """Whether text is lower-cased: what the checkpoint's args say, else what the vocabulary shows.

    An uncased vocabulary was made from lower-cased text, so no token of it has an upper-case letter but the
    special ones in brackets. File names are no evidence: a published `uncased` link led to the cased model."""
    named = config.get("tokenizer_type")
    if named in _ARGS:
        return Value(_ARGS[named], f"args: tokenizer_type {named}")
    upper = next((t for t in vocab if t not in NAMED.values() and not t.startswith("[") and t != t.lower()), None)
    if upper is None:
        return Value(True, f"{file}: no token has an upper-case letter")
    return Value(False, f"{file}: tokens such as `{upper}` have upper-case letters")


def convert(data: bytes, *, file: str, config: Mapping[str, Any]) -> TokenizerResult:
    """The Hugging Face files of a WordPiece vocabulary, which stays beside them as `vocab.txt`.

    `config` may have `tokenizer_type` from Megatron's args, and `max_position_embeddings`."""
    vocab = read(data, file)
    lower = lower_cases(vocab, file, config)
    special = sorted((AddedToken(vocab[t], t) for t in NAMED.values()), key=lambda token: token.id)
    more: dict[str, Any] = {
        "do_lower_case": lower.value,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": True,
    }
    length = config.get("max_position_embeddings")
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        more["model_max_length"] = length
    documents = {
        "tokenizer.json": _tokenizer_json(vocab, special, lower_case=lower.value),
        **config_documents(NAMED, special, more),
        "vocab.txt": data,
    }
    treated = "lower-cased and loses its accents" if lower.value else "taken as it is written"
    notes = [
        f"text is {treated} ({lower.source})",
        "text that spells a special token, such as [MASK], becomes that token; "
        "the original splits it at the brackets",
    ]
    if lower.value:
        notes.append(
            "a Greek capital sigma becomes σ everywhere, as in Hugging Face's own BertTokenizer; "
            "the original writes ς at the end of a word"
        )
    if lower.value == any(_has_upper_case(token) for token in vocab if token not in NAMED.values()):
        found = "has" if lower.value else "has no"
        notes.append(f"{file} {found} tokens with upper-case letters, against {lower.source}")
    facts = {"pad_token_id": Value(vocab["[PAD]"], f"{file}: [PAD]")}
    return TokenizerResult(documents, notes, len(vocab), facts)
