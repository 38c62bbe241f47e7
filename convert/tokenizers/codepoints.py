"""Text as CANINE reads it: every character is its Unicode code point, and there is no file of a vocabulary.

Source: google-research/language, canine/special_codepoints.py and README.md (an id is `ord(character)`); the
names of the special ones are characters for private use. transformers has CanineTokenizer for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tool.convert.plan import Value
from ckpt_tool.convert.tokenizers.hf_files import AddedToken, TokenizerResult, config_documents

CODE_POINTS = 0x110000
PAD, CLS, SEP, MASK = 0, 0xE000, 0xE001, 0xE003
NAMED = {
    "bos_token": CLS,
    "eos_token": SEP,
    "sep_token": SEP,
    "cls_token": CLS,
    "pad_token": PAD,
    "mask_token": MASK,
}
LONGEST = 2048  # characters that the published models were trained on


def convert(config: Mapping[str, Any]) -> TokenizerResult:
    """The two files by which transformers makes its CanineTokenizer. `config` may have
    `max_position_embeddings`.

    The class itself takes the space before [MASK] for a part of it, which the code point is not: said
    otherwise here."""
    length = config.get("max_position_embeddings")
    more = {
        "tokenizer_class": "CanineTokenizer",
        "model_input_names": ["input_ids", "attention_mask", "token_type_ids"],
        "padding_side": "right",
        "model_max_length": min(LONGEST, length) if isinstance(length, int) and length > 0 else LONGEST,
    }
    special = [AddedToken(point, chr(point)) for point in sorted(set(NAMED.values()))]
    documents = config_documents({role: chr(point) for role, point in NAMED.items()}, special, more)
    facts = {
        f"{role}_id": Value(NAMED[role], f"CANINE's {name}")
        for role, name in (("bos_token", "[CLS]"), ("eos_token", "[SEP]"), ("pad_token", "[PAD]"))
    }
    notes = [
        "text becomes its code points, so no file holds a vocabulary",
        "transformers 5 gives token type 0 to the second of two texts too, where the original and transformers "
        "4 give it 1: pass token_type_ids",
    ]
    return TokenizerResult(documents, notes, CODE_POINTS, facts)
