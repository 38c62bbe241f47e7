"""The files of a Hugging Face tokenizer, written as JSON by ourselves: equal inputs give equal bytes, and
only fields that tokenizers 0.15.2 (transformers 4.37) as well as 0.23 (transformers 5) read are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import PurePosixPath
from typing import Any

from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.weight_sets import is_template
from ckpt_tool.convert.plan import Value
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass

# Both libraries read `tokenizer.json` as it stands under this class name, whatever the model type beside it.
# Under `LlamaTokenizer` transformers 5 keeps only vocabulary and merges and builds the rest from class code,
# whose Metaspace step adds no dummy prefix to text that begins with a space: " Hello" loses a token. Its own
# name for the class that reads the file, `TokenizersBackend`, is unknown to transformers 4.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class TokenizerResult:
    """A converted tokenizer: files by name, what the user should know, its number of ids (0 when the
    download has no tokenizer), and what it says about config.json, in config names."""

    documents: dict[str, bytes]
    notes: list[str]
    vocab_size: int
    facts: dict[str, Value] = field(default_factory=dict)


ADDED, MAP = "added_tokens.json", "special_tokens_map.json"
# Roles that a token which was added may have, beside those that the vocabulary itself names
_ROLES = ("pad_token", "mask_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that Hugging Face looks for in text before the model sees it; `control` ones are left out by
    `skip_special_tokens`. `normalized`: looked for after the normalizer has run; `lstrip`: with the space
    before it."""

    id: int
    text: str
    control: bool = True
    normalized: bool = False
    lstrip: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "content": self.text,
            "single_word": False,
            "lstrip": self.lstrip,
            "rstrip": False,
            "normalized": self.normalized,
            "special": self.control,
        }


@dataclass(frozen=True)
class More:
    """Tokens that somebody added to a vocabulary: `ids` by text, what special_tokens_map.json beside them
    calls `special`, and which have a role by it ("pad_token" to text)."""

    ids: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    roles: Mapping[str, str] = field(default_factory=dict)

    def after(self, vocab: Mapping[str, int], size: int) -> list[AddedToken]:
        """Those that `vocab`, of `size` ids, has not. The library numbers them on from its end, so an id that
        is not the next is `bad-tokenizer`, as is another id of a token that is there."""
        made: list[AddedToken] = []
        for text, number in sorted(self.ids.items(), key=lambda item: item[1]):
            wanted = vocab.get(text, size + len(made))
            if number != wanted:
                message = f"expected id {wanted} for `{text[:40]}`, found {number}"
                hint = "--tokenizer FILE with the vocabulary alone leaves added_tokens.json out"
                fail("bad-tokenizer", message, file=ADDED, hint=hint)
            if text not in vocab:
                made.append(AddedToken(number, text, control=text in self.special))
        return made

    def named(self, added: Iterable[AddedToken]) -> dict[str, str]:
        """The roles of those that were added."""
        texts = {token.text for token in added}
        return {role: text for role, text in self.roles.items() if text in texts}


NO_MORE = More()


def read_more(documents: Mapping[str, bytes]) -> More:
    """What added_tokens.json says, and special_tokens_map.json of the same tokens."""
    if ADDED not in documents:
        return NO_MORE
    ids = parse_object(documents[ADDED], file=ADDED, kind="bad-tokenizer")
    if not all(type(v) is int and v >= 0 for v in ids.values()):
        fail("bad-tokenizer", "expected an id for each token, found something else", file=ADDED)
    listed = parse_object(documents.get(MAP, b"{}"), file=MAP, kind="bad-tokenizer")
    roles = {k: text for k, v in listed.items() if (text := _text(v)) is not None}
    others = listed.get("additional_special_tokens")
    texts = {text for v in others if (text := _text(v)) is not None} if isinstance(others, list) else set()
    named = {role: roles[role] for role in _ROLES if role in roles}
    return More(ids, frozenset({*roles.values(), *texts}), named)


def _text(value: Any) -> str | None:
    """A token as it is written in these files: plain, or with its flags."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def json_bytes(value: Any) -> bytes:
    """UTF-8, one entry a line, keys in the order given, a newline at the end."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def bos_template(bos: AddedToken) -> dict[str, Any]:
    """The post-processor that puts `bos` before each sequence."""

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos.text, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {bos.text: {"id": bos.text, "ids": [bos.id], "tokens": [bos.text]}},
    }


def tokenizer_json(
    *,
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Iterable[AddedToken],
    normalizer: Any,
    pre_tokenizer: Any,
    post_processor: Any,
    decoder: Any,
    model: Mapping[str, Any],
) -> bytes:
    """tokenizer.json of a BPE model; `model` holds its options. A merge is written as one string, the only
    form that tokenizers 0.15.2 reads, so no half may contain a space."""
    return tokenizer_file(
        added=added,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        post_processor=post_processor,
        decoder=decoder,
        model={
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{left} {right}" for left, right in merges],
        },
    )


def tokenizer_file(
    *,
    added: Iterable[AddedToken],
    normalizer: Any,
    pre_tokenizer: Any,
    post_processor: Any,
    decoder: Any,
    model: Mapping[str, Any],
) -> bytes:
    """tokenizer.json of a model of any type."""
    return json_bytes(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": token.id, **token.to_json()} for token in added],
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor,
            "decoder": decoder,
            "model": model,
        }
    )


def config_documents(
    named: Mapping[str, str], added: Iterable[AddedToken], more: Mapping[str, Any]
) -> dict[str, bytes]:
    """tokenizer_config.json and special_tokens_map.json; `named` maps "bos_token" and its like to text.

    No chat template is written: none comes with an original download.
    """
    config: dict[str, Any] = {
        "tokenizer_class": TOKENIZER_CLASS,
        # The generic class of transformers 4 would hand token_type_ids to a model that takes none
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,  # on by default in transformers 4; rewrites " ." when decoding
        "added_tokens_decoder": {str(token.id): token.to_json() for token in added},
        **named,
        **more,
    }
    return {
        "tokenizer_config.json": json_bytes(dict(sorted(config.items()))),
        "special_tokens_map.json": json_bytes(dict(sorted(named.items()))),
    }


def template_notes(files: Mapping[str, bytes]) -> list[str]:
    """What counts where chat templates stand in JSON and in files of their own, and are not the same. Source:
    transformers 4.57.6 and 5.23.0, tokenization_utils_base.py: files of their own stand for all templates of
    tokenizer_config.json, which alone 4.37.2 reads; chat_template.json is for processors of other inputs."""
    own = {n: files[n].decode(errors="replace") for n in sorted(files) if is_template(n)}
    by_name = {PurePosixPath(n).stem.replace("chat_template", "default"): text for n, text in own.items()}
    notes = []
    for name in ("tokenizer_config.json", "chat_template.json"):
        said = _templates(files[name], name) if name in files and own else {}
        odd = [k for k, text in said.items() if by_name.get(k, "").rstrip("\n") != text.rstrip("\n")]
        if odd:
            notes.append(
                f"{name} has another chat template ({', '.join(odd)}) than {', '.join(own)}, which "
                "transformers 5 reads instead; both are carried over"
            )
    return notes


def _templates(content: bytes, name: str) -> dict[str, str]:
    """Templates by name, as one text or as a list."""
    found = parse_object(content, file=name, kind="bad-tokenizer").get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
    return {str(e.get("name")): e["template"] for e in entries if isinstance(e.get("template"), str)}
