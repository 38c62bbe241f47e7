"""tokenizer_config.json and what may stand beside it (special_tokens_map.json, added_tokens.json, chat
templates) by meaning: which tokens have a role, what is put around a text, how long it may
be, which class reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ckpt_tool.verify.tokenizer_ids import FLAGS, Difference, Ids, flags, shown

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_ROLES = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
NO_TOKENS = ("add_bos_token", "add_eos_token")
# What every published Code Llama says of its own class: pieces of the vocabulary, and a mark that none is.
INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
LIMIT = "model_max_length"
NO_LIMIT = 1e29  # transformers writes int(1e30) for a tokenizer that knows none
CODE = ("auto_map", "custom_pipelines")
# The class that reads the file as it stands, under its names of transformers 4 and 5.
GENERIC = frozenset(("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend"))
_OF_BERT = {f"{role}_token": (f"[{role.upper()}]",) for role in ("unk", "sep", "pad", "cls", "mask")}
# A role that a class fills in by itself where the files give it none (defaults of its constructor).
FILLED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Qwen2Tokenizer": {"unk_token": ("<|endoftext|>",), "pad_token": ("<|endoftext|>",)},
    "GPT2Tokenizer": {role: ("<|endoftext|>",) for role in ("bos_token", "eos_token", "unk_token")},
    "CodeGenTokenizer": {role: ("<|endoftext|>",) for role in ("bos_token", "eos_token", "unk_token")},
    "GPTNeoXTokenizer": {role: ("<|endoftext|>",) for role in ("bos_token", "eos_token", "unk_token")},
    "LlamaTokenizer": {"bos_token": ("<s>",), "eos_token": ("</s>",), "unk_token": ("<unk>",)},
    "GemmaTokenizer": {"mask_token": ("<mask>",)},
    **dict.fromkeys(("BertTokenizer", "MobileBertTokenizer"), _OF_BERT),
}
# Classes that pad before a text where the file does not say on which side (`padding_side` of the class).
PADS_LEFT = frozenset(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"))
# Keys with which no release loads a tokenizer: with a value, or at all, as that is a method's name.
NEVER = ("init_inputs", "tokenizer_file", "tokenizer_object", "from_slow")
WITHOUT = {"from_slow": "release 4 builds it anew from other files, or raises"}
METHOD = "add_special_tokens"
# How keys end that name another file to read: release 4 takes what stands there before the folder's own.
OTHER_FILE = "_file"
READ_APART = ("tokenizer_config_file", "special_tokens_map_file", "added_tokens_file", "chat_template_file")
# And those of which none takes a null.
ENTITY_TOKENS = ("token_1", "token_2", "unk_token", "pad_token", "mask_token", "mask2_token")
OLD_WORDS = {
    "legacy": "the class of release 4 that reads tokenizer.model itself makes other ids after special tokens",
    "use_default_system_prompt": "release 4.37 puts a system prompt before chats where there is no template",
}
NOT_NULL = (
    *("padding_side", "truncation_side", "model_input_names", "added_tokens_decoder"),
    *(f"entity_{name}" for name in ENTITY_TOKENS),
)
# What an absent key stands for, for keys that act.
DEFAULTS: Mapping[str, Any] = {
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
    "add_prefix_space": False,
    "errors": "replace",
    "strip_accents": None,
    "do_basic_tokenize": True,
    "never_split": None,
    "tokenize_chinese_chars": True,
    "do_lower_case": None,
    "pad_token_type_id": 0,
    "sp_model_kwargs": {},
    "return_token_type_ids": None,
    # of the tokenizers of LUKE
    "task": None,
    "max_entity_length": 32,
    "max_mention_length": 30,
    "entity_token_1": "<ent>",
    "entity_token_2": "<ent2>",
    "entity_unk_token": "[UNK]",
    "entity_pad_token": "[PAD]",
    "entity_mask_token": "[MASK]",
    "entity_mask2_token": "[MASK2]",
}


def differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], *, alike: Collection[str], begins: bool, ends: bool
) -> Iterator[Difference]:
    """Keys of tokenizer_config.json that act and say another thing. `begins` and `ends` tell whether the
    source's tokenizer.json puts tokens around a text, which `add_bos_token` and its like repeat; `alike` are
    classes that read the files as one another does."""
    for key in CODE:
        if found.get(key) and not expected.get(key):
            yield Difference(key, f"expected no field that asks for code, found {shown(found[key])}")
    yield from _loads(found, expected)
    for key, wanted in (("add_bos_token", begins), ("add_eos_token", ends)):
        wanted = bool(expected[key]) if expected.get(key) is not None else wanted
        if found.get(key) is not None and bool(found[key]) != wanted:
            yield Difference(key, f"expected {shown(wanted)}, found {shown(found[key])}")
    a, b = limit(expected), limit(found)
    if a != b:
        words = ["no limit" if x is None else str(x) for x in (a, b)]
        yield Difference(LIMIT, f"expected {words[0]}, found {words[1]}")
    yield from _inputs(expected, found)
    yield from _clean_up(expected, found)
    for key in DEFAULTS:
        x, y = (_acts(side, key) for side in (expected, found))
        if x != y:
            yield Difference(key, f"expected {shown(x)}, found {shown(y)}")
    yield from _class(expected.get("tokenizer_class"), found.get("tokenizer_class"), alike)


def old_words(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    """Keys that act in one class of release 4 alone, which published models of one kind have either way."""
    for key, what in OLD_WORDS.items():
        if key in found and found[key] != expected.get(key, found[key]):
            said = f"{shown(expected[key])} in the source's, {shown(found[key])} here"
            yield Difference(key, f"{said}: {what}")


def _clean_up(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    """Whether decoding takes spaces away. Absent: yes in the first releases of transformers 4, no since."""
    key = "clean_up_tokenization_spaces"
    wanted, held = expected.get(key), found.get(key)
    if wanted is None or bool(wanted) == bool(held):
        return
    seen = shown(held) if held is not None else "nothing, which transformers 5 takes for false"
    if held:
        seen += ", with which decoding takes spaces before punctuation away"
    yield Difference(key, f"expected {shown(wanted)}, found {seen}")


def _inputs(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    """What a tokenizer gives beside ids: without a mask a padded batch computes something else, and the class
    that reads the file as it stands gives token types in transformers 4, which not every model takes."""
    key, mask, types = "model_input_names", "attention_mask", "token_type_ids"
    wanted, held = (v if isinstance(v := side.get(key), list) else None for side in (expected, found))
    if found.get(key) != held and found[key] != expected.get(key):
        yield Difference(key, f"expected a list of names, found {shown(found[key])}")
        return
    if mask in (wanted or [mask]) and mask not in (held or [mask]):
        yield Difference(key, f"expected {mask} among them, found {shown(held)}")
    alone = plain_class(found.get("tokenizer_class")) == "PreTrainedTokenizer"  # not as release 5 calls it
    if wanted is not None and types not in wanted and (types in (held or ()) or (key not in found and alone)):
        was = shown(held) if held is not None else f"nothing, which transformers 4 takes for {types} too"
        yield Difference(key, f"expected {shown(wanted)}, found {was}")


def _loads(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Difference]:
    """Keys that keep every release from loading the tokenizer, where the source has them otherwise."""
    for key in (METHOD, *NEVER):
        acts = key in found if key == METHOD else found.get(key)
        if acts and not (key in expected and expected[key] == found[key]):
            what = WITHOUT.get(key, "none loads it")
            text = f"expected no such key, found {shown(found[key])}, with which {what}"
            yield Difference(key, text)
    for key, value in found.items():
        named = key.endswith(OTHER_FILE) and key not in (*NEVER, *READ_APART)
        if named and value and value != expected.get(key):
            text = (
                f"expected no such key, found {shown(value)}, which release 4 reads instead of its own file"
            )
            yield Difference(key, text)
    for key in NOT_NULL:
        if key in found and found[key] is None and expected.get(key, key) is not None:
            yield Difference(key, "expected a value or no such key, found null, which no release takes")


def _acts(document: Mapping[str, Any], key: str) -> Any:
    """What the file says under one of the keys of `DEFAULTS`, or its class where it says nothing."""
    if document.get(key) is not None:
        return _plain(document[key])
    pads_left = key == "padding_side" and plain_class(document.get("tokenizer_class")) in PADS_LEFT
    return "left" if pads_left else DEFAULTS[key]


def _plain(value: Any) -> Any:
    """A token by its text, and anything else as it is."""
    return value["content"] if isinstance(value, Mapping) and "content" in value else value


def limit(document: Mapping[str, Any]) -> Any:
    """The tokens that a text may have, None where the file says no number. `max_len` is the old name, which
    is read where the other is absent."""
    value = document.get(LIMIT, document.get("max_len"))
    return None if value is None or (isinstance(value, int | float) and value >= NO_LIMIT) else value


def plain_class(value: Any) -> str:
    """A class under the name that transformers 5 has for it."""
    return value.removesuffix("Fast") if isinstance(value, str) else ""


def _class(expected: Any, found: Any, alike: Collection[str]) -> Iterator[Difference]:
    a, b = plain_class(expected), plain_class(found)
    if a == b or found is None:
        return
    alike = GENERIC.union(alike)
    if not (b in alike and (a in alike or not a)):
        yield Difference("tokenizer_class", f"expected {shown(expected)}, found {shown(found)}")


# --- tokens with a role ---------------------------------------------------------------------------------


def roles(*documents: Mapping[str, Any]) -> dict[str, str | None]:
    """Which token has which role; of several documents the first that says so counts."""
    found: dict[str, str | None] = {}
    for document in documents:
        for role in ROLES:
            if role in document:
                found.setdefault(role, content(document[role]))
    return found


def content(token: Any) -> str | None:
    """The text of a token, written plainly or with its flags."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def wrong_roles(
    expected: Mapping[str, str | None], found: Mapping[str, str | None], made_by: str
) -> Iterator[Difference]:
    """Roles that another token has. `made_by` is the class of the source's tokenizer, which fills some in."""
    filled = FILLED.get(made_by, {})
    for role in ROLES:
        a, b = expected.get(role), found.get(role)
        if a == b or (a is None and role not in expected and b in filled.get(role, ())):
            continue
        words = [shown(x) if x is not None else "none" for x in (a, b)]
        yield Difference(role, f"expected {words[0]}, found {words[1]}")


def listed(*documents: Mapping[str, Any]) -> set[str]:
    """Further tokens that the documents call special; those with names of their own by their text, which is
    any key that ends as a role does (transformers 5)."""
    found: set[str] = set()
    for document in documents:
        own = (k for k in document if k.endswith("_token") and k not in (*ROLES, *DEFAULTS, *NO_TOKENS))
        usual = INFILLING if plain_class(document.get("tokenizer_class")) == "CodeLlamaTokenizer" else {}
        texts = {key: content(document[key]) for key in own}
        found |= {text for key, text in texts.items() if text is not None and text != usual.get(key)}
        for key in MORE_ROLES:
            value = document.get(key)
            entries = (
                value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            )
            found |= {text for entry in entries if (text := content(entry)) is not None}
    return found


def wrong_flags(
    known: Mapping[int, Mapping[str, Any]], document: Mapping[str, Any], where: str, ids: Ids | None = None
) -> Iterator[Difference]:
    """Entries of `added_tokens_decoder` that are not those of `known`, the source's table by id; `ids` is the
    source's tokenizer.json."""
    table = document.get("added_tokens_decoder")
    if not isinstance(table, Mapping):
        return
    held: dict[int, dict[str, Any]] = {}
    for key, entry in table.items():
        if not key.isdecimal() or len(key) > 9 or not isinstance(entry, Mapping):
            yield Difference(
                f"added_tokens_decoder: {key}", f"expected an id and a token, found {shown(entry)}"
            )
            continue
        held[int(key)] = {"content": entry.get("content"), **{f: _flag(entry, f) for f in FLAGS}}
    normal = ids is None or ids.normalizes(held)
    yield from flags({i: known[i] for i in held if i in known}, held, where, normal=normal)


def _flag(entry: Mapping[str, Any], name: str) -> Any:
    """A flag, which is off where it is absent; `normalized` is on for a token that is not special."""
    return entry.get(name, not entry.get("special", False) if name == "normalized" else False)


def templates(documents: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Chat templates by name, with the file that counts for each: `files` (texts of .jinja by file name) come
    before `documents` (parsed, by file name)."""
    found: dict[str, tuple[str, str]] = {}
    for name, text in sorted(files.items()):
        own = name.rpartition("/")[2].removesuffix(".jinja")
        found["default" if own == "chat_template" else own] = (name, text)
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = documents.get(name, {}).get("chat_template")
        if isinstance(value, str):
            found.setdefault("default", (name, value))
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                found.setdefault(str(entry.get("name")), (name, entry["template"]))
    return found
