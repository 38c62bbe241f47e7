"""WordPiece and GPT-2's BPE: the judges are transformers' own slow classes, in releases that had them, and
tiktoken. Real vocabularies are judged by documented ids where they lie beside this checkout."""

from __future__ import annotations

import json
import random
import subprocess
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ckpt_tool.convert.tokenizers import (
    TokenizerResult,
    byte_level,
    original_tokenizer_documents,
    tokenizer_documents,
)
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.vocabularies import byte_characters, gpt2_vocabulary, wordpiece_vocabulary
from tests import loaded

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real" / "vocabularies"
RELEASES = ("tf4.37", "tf4.57", "tf5")

DOCUMENTS: dict[str, dict[str, bytes]] = {
    "uncased": {"bert-large-uncased-vocab.txt": wordpiece_vocabulary()},
    "cased": {"vocab.txt": wordpiece_vocabulary(cased=True)},
    "gpt2": gpt2_vocabulary(400),
}
FAMILY = {"uncased": "megatron-bert", "cased": "megatron-bert", "gpt2": "megatron-gpt2"}

WRITTEN = [
    *("", " ", "  ", "Hello", " Hello", "Hello  world ", "a\tb\n\nc\r\nd", "x" * 99, "x" * 100, "x" * 101),
    *("ain't this wacky?", "The capital of France is [MASK].", "In 2020, it's 3.14 (or 1,000)…"),
    *("[CLS] a[SEP][PAD]b [UNK] [mask] [MASK][MASK]", "<|endoftext|>a <|endoftext|>", "a_b-c/d\\e@f.g"),
    *("Été ÉTÉ naïve façade", "İstanbul ISI ıi", "ΟΔΟΣ Σ'Σ ς", "ẞ ß SS ﬁ Ａ Ｂ", "ſ's 'S ’s I'LL we'Ve"),
    *("生活的真谛是life生活", "豈 一a二 か゚ が", "ปี ก", "한국어 각", "क्षत्रिय", "مرحبا שלום", "Привет, мир"),
    *("a\0b\ufffdc\x01d\x7fe\x80f\xadg\u200bh\ufeffi", "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\x1ch"),
    *("👩‍👩‍👧‍👦 👍🏽 🇩🇪 😀", "\U000e0001\U0010ffff", "£5 «a» ¿b? 100°", "e\u0301 n\u0303 a\u0308\u0323"),
    *("the helloing cafe's ##ing", "##a ## #a", "    indented\n    code", "...!!!???", "²³½ ٣٤ Ⅷ"),
    *("ab" * 300, " " * 200, "生" * 150, "\u0301" * 20, "don't!won't?"),
]


def _drawn(count: int) -> list[str]:
    """Texts of characters that are awkward for the one or the other, and of any that Unicode 3.2 had: the
    libraries carry tables of different ages."""
    draw = random.Random(5)
    awkward = " \t\n[]'.,aAbeÉéßΣσİıǅ生活\u0301\u0308\u200b\xad\ufffd\0\x7f\x85\u2028\u3000"
    awkward += "1９²½_-$`^~°«¿‐…。、ก\u0e31"
    old = unicodedata.ucd_3_2_0
    changed = {0x166D, 0x1734, 0x1885, 0x1886}  # in category since
    known = [
        chr(n)
        for n in range(1, 0x30000)
        if old.category(chr(n)) not in ("Cn", "Cs", "Co") and n not in changed
    ]
    texts = ["".join(draw.choices(awkward, k=draw.randint(1, 25))) for _ in range(count)]
    return texts + ["a".join(draw.choices(known, k=8)) for _ in range(count)]


def _entries() -> list[str]:
    """Every entry of every vocabulary as text."""
    lists = [DOCUMENTS["uncased"]["bert-large-uncased-vocab.txt"], DOCUMENTS["cased"]["vocab.txt"]]
    texts = [data.decode().replace("\n##", "").replace("\n", " ") for data in lists]
    spelled = {character: byte for byte, character in enumerate(byte_characters())}
    tokens = json.loads(DOCUMENTS["gpt2"]["vocab.json"])
    raw = (bytes(spelled[c] for c in token) for token in tokens if token != "<|endoftext|>")
    return texts + [token.decode() for token in raw if token.isascii()]


TEXTS = [*WRITTEN, *_entries(), *_drawn(400)]


def converted(kind: str, **config: Any) -> TokenizerResult:
    return tokenizer_documents(DOCUMENTS[kind], family=FAMILY[kind], config=config)


@cache
def ids(kind: str) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(converted(kind).documents["tokenizer.json"].decode())
    return [tokenizer.encode(text).ids for text in TEXTS]


_JUDGE = """
import json, sys
import transformers
from transformers import AutoTokenizer
folder, texts = json.load(sys.stdin)
slow = {}
if transformers.__version__.startswith("4."):
    from transformers import BertTokenizer, GPT2Tokenizer
    slow = {
        "uncased": BertTokenizer(folder + "/uncased/vocab.txt", do_lower_case=True),
        "cased": BertTokenizer(folder + "/cased/vocab.txt", do_lower_case=False),
        "gpt2": GPT2Tokenizer(folder + "/gpt2/vocab.json", folder + "/gpt2/merges.txt"),
    }
found = {}
for kind in ("uncased", "cased", "gpt2"):
    auto = AutoTokenizer.from_pretrained(folder + "/" + kind)
    found[kind] = {
        "auto": [auto(text)["input_ids"] for text in texts],
        "pair": dict(auto("Hello", "world")),
        "named": auto.special_tokens_map,
        "count": len(auto),
        "length": auto.model_max_length,
        "decoded": [auto.decode(auto(text)["input_ids"], skip_special_tokens=True) for text in texts],
        "slow": [slow[kind](text)["input_ids"] for text in texts] if slow else None,
    }
print(json.dumps([transformers.__version__, found]))
"""


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What each release of transformers that is there says of the converted folders."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in DOCUMENTS:
        folder = root / kind
        folder.mkdir()
        for name, content in converted(kind, max_position_embeddings=512).documents.items():
            (folder / name).write_bytes(content)
        model = "gpt2" if kind == "gpt2" else "megatron-bert"
        (folder / "config.json").write_text(json.dumps({"model_type": model}))
    found = {}
    for release in RELEASES:
        if release != loaded.CURRENT and not (ROOT / ".judges" / release).is_dir():
            continue
        run = subprocess.run(
            [loaded.python(release), "-W", "ignore", "-c", _JUDGE],
            input=json.dumps([str(root), TEXTS]),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        version, found[release] = json.loads(run.stdout)
        assert version.startswith({"tf4.37": "4.37.", "tf4.57": "4.57.", "tf5": "5."}[release])
    return found


def told(judged: Mapping[str, Any], release: str, kind: str) -> Mapping[str, Any]:
    if release not in judged:
        pytest.skip(f"{release} is not set up; `make test` does it")
    found: Mapping[str, Any] = judged[release][kind]
    return found


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("release", RELEASES)
def test_auto_tokenizer_gives_the_same_ids_in_every_release(
    release: str, kind: str, judged: Mapping[str, Any]
) -> None:
    found = told(judged, release, kind)
    for text, expected, own in zip(TEXTS, found["auto"], ids(kind), strict=True):
        assert own == expected, text[:60]
    assert found["count"] == converted(kind).vocab_size, "no id beyond the embedding table"
    assert found["length"] == 512
    assert found["pair"].keys() == {"input_ids", "attention_mask"} | (
        set() if kind == "gpt2" else {"token_type_ids"}
    )
    named = {"bos_token", "eos_token", "unk_token"}
    if kind != "gpt2":
        named = {"unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
        assert found["named"]["mask_token"] == "[MASK]"
        tokenizer = Tokenizer.from_str(converted(kind).documents["tokenizer.json"].decode())
        assert found["pair"]["token_type_ids"] == tokenizer.encode("Hello", "world").type_ids
    assert set(found["named"]) == named


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("release", ["tf4.37", "tf4.57"])
def test_ids_equal_those_of_the_slow_class(release: str, kind: str, judged: Mapping[str, Any]) -> None:
    """Without text that is not composed, for a cased BERT: its slow class composes, the original does not."""
    expected = told(judged, release, kind)["slow"]
    compared = 0
    for text, own, slow in zip(TEXTS, ids(kind), expected, strict=True):
        if kind == "cased" and unicodedata.normalize("NFC", text) != text:
            continue
        if any(unicodedata.ucd_3_2_0.category(c) in ("Cn", "Co") for c in text) and kind != "gpt2":
            continue
        assert own == slow, ascii(text[:60])
        compared += 1
    assert compared > 600


@pytest.mark.parametrize("release", RELEASES)
def test_gpt2_decodes_to_the_text(release: str, judged: Mapping[str, Any]) -> None:
    for text, found in zip(TEXTS, told(judged, release, "gpt2")["decoded"], strict=True):
        if "<|endoftext|>" not in text:
            assert found == text


def test_most_entries_of_the_vocabularies_are_judged() -> None:
    for kind in DOCUMENTS:
        assert len({i for row in ids(kind) for i in row}) > converted(kind).vocab_size / 2


def test_a_cased_bert_does_not_compose_what_the_original_does_not() -> None:
    tokenizer = Tokenizer.from_str(converted("cased").documents["tokenizer.json"].decode())
    assert tokenizer.encode("é").tokens == ["[CLS]", "é", "[SEP]"]
    assert tokenizer.encode("e\u0301").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    assert tokenizer.encode("É").tokens != tokenizer.encode("é").tokens


def test_an_uncased_bert_loses_case_and_accents() -> None:
    tokenizer = Tokenizer.from_str(converted("uncased").documents["tokenizer.json"].decode())
    assert tokenizer.encode("CAFÉ").tokens == ["[CLS]", "cafe", "[SEP]"]
    assert tokenizer.encode("a [MASK] B").tokens == ["[CLS]", "a", "[MASK]", "b", "[SEP]"]
    assert tokenizer.encode("helloed", "sky").type_ids == [0, 0, 0, 0, 1, 1]
    assert tokenizer.encode("helloed", "sky").tokens[1:3] == ["hello", "##ed"]


# The split of text that openai/gpt-2 has; tiktoken knows it by heart.
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def test_gpt2_splits_as_tiktoken() -> None:
    """Over a vocabulary in which every pair of a token's parts is one of its merges, as tiktoken merges."""
    tiktoken = pytest.importorskip("tiktoken")
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b" a", b"the", b" the", b"th", b"'s", b"  ", b"\n\n", b"20", b" 20", b"he", b"..", b"..."]
    ranks = {token: rank for rank, token in enumerate(sorted(tokens, key=lambda t: (len(t), t)))}
    vocab = {byte_level.spell(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": len(ranks)}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in byte_level.merges(ranks)), ""]
    files = {"vocab.json": json.dumps(vocab).encode(), "merges.txt": "\n".join(merges).encode()}
    result = tokenizer_documents(files, family="megatron-gpt2", config={})
    own = Tokenizer.from_str(result.documents["tokenizer.json"].decode())
    judge = tiktoken.Encoding("judge", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert own.encode(text).ids == judge.encode_ordinary(text), text[:60]


# --- real vocabularies ----------------------------------------------------------------------------------


def real(kind: str) -> Tokenizer:
    """From files named as their publishers name them, in ../shared/real/vocabularies."""
    names = {
        "uncased": ("bert-large-uncased-vocab.txt",),
        "cased": ("bert-large-cased-vocab.txt",),
        "gpt2": ("gpt2-vocab.json", "gpt2-merges.txt"),
    }[kind]
    if not all((REAL / name).is_file() for name in names):
        pytest.skip(f"{' and '.join(names)} are not beside this checkout")
    files = {name: (REAL / name).read_bytes() for name in names}
    result = tokenizer_documents(files, family=FAMILY[kind], config={})
    assert result.vocab_size == {"uncased": 30522, "cased": 28996, "gpt2": 50257}[kind]
    return Tokenizer.from_str(result.documents["tokenizer.json"].decode())


def _documented() -> list[Any]:
    """(vocabulary, text, text pair or None, ids) of the documented entries that give both text and ids."""
    from ckpt_tool.verify.expectations import load

    found = []
    for entry in load("megatron_bert"):
        kind = "cased" if "-cased-" in entry.checkpoint else "uncased"
        if entry.input_ids and "text" in entry.input:
            case = (kind, entry.input["text"], entry.input.get("text_pair"), entry.input_ids[0])
            found.append(pytest.param(*case, id=entry.id))
    for entry in load("megatron_gpt2"):
        texts = entry.input.get("texts", [entry.input["text"]] if "text" in entry.input else [])
        if entry.head == "tokenizer":
            found.append(pytest.param("gpt2", texts[0], None, entry.expected.values, id=entry.id))
        elif entry.input_ids and entry.family == "gpt2":
            for number, (text, row) in enumerate(zip(texts, entry.input_ids, strict=True)):
                tokens = [i for i in row if i != 50256]
                found.append(pytest.param("gpt2", text, None, tokens, id=f"{entry.id}-{number}"))
    return found


@pytest.mark.parametrize(("kind", "text", "pair", "expected"), _documented())
def test_documented_ids_of_real_vocabularies(
    kind: str, text: str, pair: str | None, expected: list[int]
) -> None:
    assert real(kind).encode(text, pair).ids == expected


# --- cased or not ---------------------------------------------------------------------------------------


def lower_cased(result: TokenizerResult) -> bool:
    normalizer = json.loads(result.documents["tokenizer.json"])["normalizer"]
    config = json.loads(result.documents["tokenizer_config.json"])
    assert config["do_lower_case"] == normalizer["lowercase"]
    return bool(normalizer["lowercase"])


@pytest.mark.parametrize(
    ("cased", "tokenizer_type", "expected", "source"),
    [
        (False, None, True, "no token has an upper-case letter"),
        (True, None, False, "tokens have upper-case letters, the first is `A`"),
        (False, "BertWordPieceLowerCase", True, "args: tokenizer_type BertWordPieceLowerCase"),
        (True, "BertWordPieceCase", False, "args: tokenizer_type BertWordPieceCase"),
        (True, "BertWordPieceLowerCase", True, "args: tokenizer_type BertWordPieceLowerCase"),
        (False, "BertWordPieceCase", False, "args: tokenizer_type BertWordPieceCase"),
        (True, "GPT2BPETokenizer", False, "tokens have upper-case letters"),
    ],
)
def test_case_is_decided_by_args_or_vocabulary_and_the_source_named(
    cased: bool, tokenizer_type: str | None, expected: bool, source: str
) -> None:
    files = {"bert-large-uncased-vocab.txt": wordpiece_vocabulary(cased=cased)}
    result = tokenizer_documents(files, family="megatron-bert", config={"tokenizer_type": tokenizer_type})
    assert lower_cased(result) == expected
    assert source in result.notes[0]
    contradicted = tokenizer_type in ("BertWordPieceLowerCase", "BertWordPieceCase") and expected == cased
    assert any("looks like" in note for note in result.notes) == contradicted


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_vocabulary_stays_and_goes_back(kind: str) -> None:
    result = converted(kind)
    back = original_tokenizer_documents(result.documents, family=FAMILY[kind])
    assert list(back.values()) == list(DOCUMENTS[kind].values())
    assert list(back) == (["vocab.json", "merges.txt"] if kind == "gpt2" else ["vocab.txt"])
    again = tokenizer_documents(back, family=FAMILY[kind], config={})
    assert again.documents == result.documents
    assert original_tokenizer_documents(result.documents) == {}, "of no family that has such files"


def test_facts_for_the_config() -> None:
    assert converted("uncased").facts["pad_token_id"].value == 0
    end = converted("gpt2").facts
    assert end["bos_token_id"].value == end["eos_token_id"].value == 399
    assert "vocab.json" in end["eos_token_id"].source


def test_names_with_the_model_before_them() -> None:
    for before in ("", "gpt2-", "my.model_"):
        files = {before + name: content for name, content in DOCUMENTS["gpt2"].items()}
        result = tokenizer_documents(files, family="megatron-gpt2", config={})
        assert {"vocab.json", "merges.txt", "tokenizer.json"} <= result.documents.keys()
    both = DOCUMENTS["gpt2"] | {f"gpt2-{n}": c for n, c in DOCUMENTS["gpt2"].items()}
    result = tokenizer_documents(both, family="megatron-gpt2", config={})
    assert {n for n in result.documents if n.startswith("gpt2")} == set()


def test_other_families_do_not_take_them() -> None:
    every = {n: c for files in DOCUMENTS.values() for n, c in files.items()}
    assert tokenizer_documents(every, family="llama", config={}).vocab_size == 0
    assert tokenizer_documents(every, family="megatron-gpt2", config={}).vocab_size == 400


def test_a_tokenizer_must_fit_the_padded_table() -> None:
    assert converted("gpt2", padded_vocab_size=512).vocab_size == 400
    with pytest.raises(CkptToolError, match="expected a tokenizer of at most 384 ids, .*found 400"):
        converted("gpt2", padded_vocab_size=384)
    other = DOCUMENTS["uncased"] | {"vocab.txt": wordpiece_vocabulary(400)}
    result = tokenizer_documents(other, family="megatron-bert", config={"padded_vocab_size": 384})
    assert result.vocab_size == 320
    assert any("vocab.txt is left out" in note for note in result.notes)
    with pytest.raises(CkptToolError, match="expected one tokenizer, found 2 that differ"):
        tokenizer_documents(other, family="megatron-bert", config={})


def test_bytes_are_spelled_as_the_fixtures_spell_them() -> None:
    assert byte_characters() == [byte_level.spell(bytes([byte])) for byte in range(256)]


WORDS = wordpiece_vocabulary().decode()
GPT2 = {name: content.decode() for name, content in gpt2_vocabulary(300).items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WORDS.replace("[MASK]\n", "[mask]\n"), r"expected the token \[MASK\], found none"),
        (WORDS + "the\n", "expected each token once, found `the` on line"),
        (WORDS.replace("\nthe\n", "\n\n"), "expected a token of 1 to 1000 characters, found 0"),
        (WORDS + "x" * 1001, "expected a token of 1 to 1000 characters, found 1001"),
        ("", "expected a token of 1 to 1000 characters, found 0"),
    ],
)
def test_a_damaged_word_list_is_refused(content: str, message: str) -> None:
    with pytest.raises(CkptToolError, match=message) as caught:
        tokenizer_documents({"vocab.txt": content.encode()}, family="megatron-bert", config={})
    assert all(p.kind == "bad-tokenizer" and p.file == "vocab.txt" for p in caught.value.problems)


def test_lines_may_end_as_on_windows_and_the_last_one_not_at_all() -> None:
    for content in (WORDS.replace("\n", "\r\n"), WORDS.removesuffix("\n")):
        result = tokenizer_documents({"vocab.txt": content.encode()}, family="megatron-bert", config={})
        assert result.documents["tokenizer.json"] == converted("uncased").documents["tokenizer.json"]


def test_bytes_that_are_no_text_are_refused() -> None:
    for files in (
        {"vocab.txt": b"[PAD]\n\xff\xfe\n"},
        {**DOCUMENTS["gpt2"], "merges.txt": b"#version\n\xff\n"},
    ):
        family = "megatron-bert" if "vocab.txt" in files else "megatron-gpt2"
        with pytest.raises(CkptToolError, match="expected UTF-8"):
            tokenizer_documents(files, family=family, config={})


def changed(**changes: Any) -> str:
    vocab = json.loads(GPT2["vocab.json"])
    return json.dumps({k: v for k, v in (vocab | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", "expected an object of 1 to"),
        ("vocab.json", "{", "found"),
        ("vocab.json", changed(new=500), "expected each id from 0 to 300 once, found 500"),
        ("vocab.json", changed(new=5), "expected each id from 0 to 300 once"),
        ("vocab.json", changed(a=None, new=64), "expected a token for each of the 256 bytes"),
        ("vocab.json", changed(**{"<|endoftext|>": None}), r"expected the token <\|endoftext\|>"),
        ("vocab.json", changed(a="0"), "expected each id from 0"),
        ("merges.txt", GPT2["merges.txt"] + "q zz\n", "expected two tokens that make a token, found `q zz`"),
        ("merges.txt", GPT2["merges.txt"] + "Ġ t\n", "expected each merge once, found `Ġ t` again"),
        ("merges.txt", GPT2["merges.txt"].removesuffix("\n"), "expected a line break at the end"),
        ("merges.txt", GPT2["merges.txt"].partition("\n")[2], "expected a line with #version first"),
        ("merges.txt", "#version\nab\n", "expected two tokens that make a token, found `ab`"),
    ],
)
def test_a_damaged_gpt2_vocabulary_is_refused(name: str, content: str, message: str) -> None:
    files = {n: c.encode() for n, c in (GPT2 | {name: content}).items()}
    with pytest.raises(CkptToolError, match=message) as caught:
        tokenizer_documents(files, family="megatron-gpt2", config={})
    assert all(p.kind == "bad-tokenizer" for p in caught.value.problems)


@pytest.mark.parametrize(("left", "lost"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_a_gpt2_vocabulary_is_refused(left: str, lost: str) -> None:
    with pytest.raises(CkptToolError, match=f"expected gpt2-{lost} beside it"):
        files = {f"gpt2-{left}": DOCUMENTS["gpt2"][left]}
        tokenizer_documents(files, family="megatron-gpt2", config={})
