"""`vocab.txt` of BERT: one token a line, its id the number of the line.

The file does not say how text is prepared; google-research/bert, tokenization.py (megatron/tokenizer/
bert_tokenization.py is a copy of it) does: control characters go, Chinese characters stand alone, text is
lower-cased and loses its accents if the model is an uncased one, words end at spaces and punctuation and
are cut into the longest tokens that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers.hf_files import (
    NO_MORE,
    AddedToken,
    More,
    TokenizerResult,
    config_documents,
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

    An uncased vocabulary was made from lower-cased text, so no token of it has an upper-case letter but those
    in brackets. File names are no evidence: a link to the uncased model once led to the cased one."""
    named = config.get("tokenizer_type")
    if named in _ARGS:
        return Value(_ARGS[named], f"args: tokenizer_type {named}")
    upper = _first_upper_case(vocab)
    if upper is None:
        return Value(True, f"{file}: no token has an upper-case letter")
    return Value(False, f"{file}: tokens have upper-case letters, the first is `{upper}`")


def convert(
    data: bytes, *, file: str, config: Mapping[str, Any], more_tokens: More = NO_MORE
) -> TokenizerResult:
    """The Hugging Face files of a WordPiece vocabulary, which stays beside them as `vocab.txt`, with
    `more_tokens` after its lines.

    `config` may have `tokenizer_type` from Megatron's args, and `max_position_embeddings`."""
    vocab = read(data, file)
    lower = lower_cases(vocab, file, config)
    special = sorted((AddedToken(vocab[t], t) for t in NAMED.values()), key=lambda token: token.id)
    later = more_tokens.after(vocab, len(vocab))
    special += later
    more: dict[str, Any] = {
        "do_lower_case": lower.value,
        "tokenize_chinese_chars": True,
        "strip_accents": None,  # as do_lower_case
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
    treatment = "lower-cased and loses its accents" if lower.value else "taken in the case it is written in"
    notes = [
        f"text is {treatment} ({lower.source})",
        "text that spells a special token, such as [MASK], becomes that token; "
        "the original splits it at the brackets",
    ]
    if lower.value:
        notes.append(
            "a Greek capital sigma always becomes σ, as in Hugging Face's BertTokenizer; "
            "the original writes ς at the end of a word"
        )
    if lower.value != (_first_upper_case(vocab) is None):
        cased = "an uncased" if _first_upper_case(vocab) is None else "a cased"
        notes.append(f"{file} looks like {cased} vocabulary; {lower.source} was followed")
    facts = {"pad_token_id": Value(vocab["[PAD]"], f"{file}: [PAD]")}
    return TokenizerResult(documents, notes, len(vocab) + len(later), facts)


def _first_upper_case(vocab: Mapping[str, int]) -> str | None:
    return next((t for t in vocab if not t.startswith("[") and t != t.lower()), None)


def _tokenizer_json(vocab: Mapping[str, int], special: Sequence[AddedToken], *, lower_case: bool) -> bytes:
    cls, sep = NAMED["cls_token"], NAMED["sep_token"]
    first = [{"SpecialToken": {"id": cls, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    first += [{"SpecialToken": {"id": sep, "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": sep, "type_id": 1}}]
    return tokenizer_file(
        added=special,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lower_case,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in (cls, sep)},
        },
        decoder={"type": "WordPiece", "prefix": PREFIX, "cleanup": True},
        model={
            "type": "WordPiece",
            "unk_token": NAMED["unk_token"],
            "continuing_subword_prefix": PREFIX,
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": vocab,
        },
    )
