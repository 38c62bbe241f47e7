"""How the publishers of a family write down its vocabulary, as data that the family declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from ckpt_tool.records import dataclass

END_OF_TEXT = "<|endoftext|>"  # of GPT-2: begins and ends every text, and stands for what is unknown


@dataclass(frozen=True)
class Vocabulary:
    """`kind` is the format of the files: a sentencepiece model or Mistral AI's tekken.json, `vocab.txt` of
    WordPiece, `vocab.json` with `merges.txt` of GPT-2, or none where ids are code points; with `ranks` a
    sentencepiece model may also be a list of tiktoken ranks. `classes` are the tokenizers of transformers,
    under their names in 5.x, that read the converted files alike.

    Of GPT-2's files alone: `named` are the tokens with a meaning of their own ("bos_token" and its like, to
    text), which text can spell; with `begins` bos_token comes before every text, with `frames`, of RoBERTa,
    cls_token stands before and sep_token after it, and mask_token takes the space before it."""

    kind: Literal["sentencepiece", "wordpiece", "byte-level", "codepoints", "entity-spans"] = "sentencepiece"
    classes: tuple[str, ...] = ()
    ranks: bool = False
    named: Mapping[str, str] = field(
        default_factory=lambda: {name: END_OF_TEXT for name in ("bos_token", "eos_token", "unk_token")}
    )
    begins: bool = False
    frames: bool = False


MISTRAL_AI = Vocabulary(classes=("LlamaTokenizer", "MistralCommonTokenizer", "MistralCommonBackend"))
