"""Tokenizer conversion: the judge is the original algorithm (sentencepiece, tiktoken, mistral_common)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.convert.tokenizers import (
    TokenizerResult,
    original_tokenizer_documents,
    sentencepiece,
    tekken,
    tiktoken,
    tokenizer_documents,
)
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.tokenizers import sentencepiece_model, tekken_json, tiktoken_model

ROOT = Path(__file__).parents[1]

TEXTS = [
    *("", " ", "  ", "    ", " Hello", "  Hello", "Hello ", "Hello  ", "Hi  Hello", "Hi   Hello"),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "a\tb",
        " \n \n",
        "\0",
        "a\0b",
        "\x01\x7f\x80",
        "\u2028\u2029\u0085\u00a0\u3000",
    ),
    *(
        "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
        "e\u0301 n\u0303 ạ̈",
        "مرحبا שלום \u202eabc\u202c",
        "生活的真谛是",
        "ปี   ird   ด",
        "한국어 क्षत्रिय",
    ),
    *("\U0001f9ff\U000e0001\U0010ffff\ufffd\ufeff", "▁", "▁▁ a▁b", "<0x41>", "<0x0A>", "[", "[]", "< s >"),
    *("0123456789 3.14 1,000,000", "²³½ ٣٤٥ Ⅷ", "I'm you're WE'LL 'S ſ's 'ſ", "Ǆ ﬁ ß ẞ İ ı"),
    "def f(x):\n    return {'a': x**2,\n\t'b': [1, 2]}\n\n\n# end\n",
    "camelCase snake_case HTTPServer2 // /* && <=> :: ->",
    *("x" * 3000, " " * 3000, "\n" * 700, "ab" * 1500, "aaaaaaaab" * 200, "生活" * 300, "😀" * 300),
]


@dataclass(frozen=True)
class Case:
    """One original, and the original algorithm over it; `encode` adds no special tokens."""

    name: str
    data: bytes
    family: str
    bos: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    spelled: frozenset[str]  # text that the original reads as plain and Hugging Face as a token

    def converted(self, **config: Any) -> TokenizerResult:
        return tokenizer_documents({self.name: self.data}, family=self.family, config=config)


def sentencepiece_case(data: bytes, name: str = "tokenizer.model") -> Case:
    library = pytest.importorskip("sentencepiece")
    judge = library.SentencePieceProcessor()
    judge.LoadFromSerializedProto(data)
    ids = range(judge.get_piece_size())
    special = {judge.id_to_piece(i) for i in ids if judge.is_control(i) or judge.is_unknown(i)}
    special |= {p[1:] for p in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>") if judge.id_to_piece(judge[p]) == p}
    return Case(name, data, "llama", judge.bos_id(), judge.encode, judge.decode, frozenset(special))


def tiktoken_case(
    data: bytes,
    name: str,
    family: str,
    ranks: Mapping[bytes, int],
    pattern: str,
    first: int,
    bos: int,
    special: Iterable[str] = (),
) -> Case:
    library = pytest.importorskip("tiktoken")
    judge = library.Encoding("judge", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
    return Case(
        name,
        data,
        family,
        bos,
        lambda text: [first + rank for rank in judge.encode_ordinary(text)],
        lambda ids: str(judge.decode([id - first for id in ids])),
        frozenset(special),
    )


def tekken_case(data: bytes) -> Case:
    file = tekken.read(data, "tekken.json")
    return tiktoken_case(
        data,
        "tekken.json",
        "mistral",
        file.ranks,
        file.pattern,
        len(file.special),
        1,
        [t.text for t in file.special],
    )


def llama_3_case(data: bytes) -> Case:
    ranks = tiktoken.read_ranks(data, "tokenizer.model")
    return tiktoken_case(data, "tokenizer.model", "llama", ranks, tiktoken.PATTERN, 0, len(ranks))


CONTROL = ("[INST]", "[/INST]")
TINY: dict[str, Callable[[], Case]] = {
    "sentencepiece": lambda: sentencepiece_case(sentencepiece_model()),
    "sentencepiece-small": lambda: sentencepiece_case(sentencepiece_model(300)),
    "sentencepiece-control": lambda: sentencepiece_case(
        sentencepiece_model(600, control=CONTROL), "tokenizer.model.v3"
    ),
    "code-llama": lambda: sentencepiece_case(sentencepiece_model(infill=True)),
    "tekken": lambda: tekken_case(tekken_json(700)),
    "llama-3": lambda: llama_3_case(tiktoken_model(900)),
}


MISTRAL_COMMON = Path(__file__).parents[1] / ".judges" / "mistral-common"


def mistral_data(name: str) -> bytes:
    if not MISTRAL_COMMON.is_dir():
        pytest.skip("mistral_common, which brings the real files, is not set up; `make test` does it")
    return (MISTRAL_COMMON / "mistral_common" / "data" / name).read_bytes()


REAL: dict[str, Callable[[], Case]] = {
    "v1": lambda: sentencepiece_case(mistral_data("tokenizer.model.v1"), "tokenizer.model.v1"),
    "v3": lambda: sentencepiece_case(
        mistral_data("mistral_instruct_tokenizer_240323.model.v3"), "tokenizer.model.v3"
    ),
    "v7": lambda: sentencepiece_case(
        mistral_data("mistral_instruct_tokenizer_241114.model.v7"), "tokenizer.model.v7"
    ),
    "tekken": lambda: tekken_case(mistral_data("tekken_240911.json")),
}


def loaded(result: TokenizerResult) -> Any:
    library = pytest.importorskip("tokenizers")
    return library.Tokenizer.from_str(result.documents["tokenizer.json"].decode())


@cache
def real(name: str) -> tuple[Case, TokenizerResult, Any]:
    case = REAL[name]()
    result = case.converted()
    return case, result, loaded(result)


def write_folder(result: TokenizerResult, folder: Path, model_type: str) -> Path:
    for name, content in result.documents.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    config = {"model_type": model_type, "transformers_version": "4.37.2"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(case: Case, tokenizer: Any, texts: list[str]) -> None:
    for text in texts:
        if any(token in text for token in case.spelled):
            continue
        expected = case.encode(text)
        assert tokenizer.encode(text).ids == [case.bos, *expected], text[:60]
        assert tokenizer.decode(expected) == case.decode(expected), text[:60]


@pytest.mark.parametrize("name", TINY)
def test_ids_and_text_equal_the_original(name: str) -> None:
    case = TINY[name]()
    assert_same(case, loaded(case.converted()), TEXTS)


@pytest.mark.parametrize("name", REAL)
def test_real_files_equal_the_original(name: str) -> None:
    case, result, tokenizer = real(name)
    assert result.vocab_size == {"v1": 32000, "tekken": 131072}.get(name, 32768)
    assert_same(case, tokenizer, TEXTS)


_JUDGED = {
    name: (case := TINY[name](), loaded(case.converted())) for name in ("code-llama", "tekken", "llama-3")
}
_CHARACTERS = st.one_of(
    st.sampled_from(list(" \n\t▁aeiloths<>:'[]😀生été0")),
    st.characters(exclude_categories=["Cs"]),
)


@given(text=st.text(_CHARACTERS, max_size=60), name=st.sampled_from(list(_JUDGED)))
@settings(max_examples=300, deadline=None)
def test_any_text_equals_the_original(text: str, name: str) -> None:
    case, tokenizer = _JUDGED[name]
    assert_same(case, tokenizer, [text, text * 3, f" the test{text}  Hello"])


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("v1", "This is a test", [1, 851, 349, 264, 1369]),
        ("v1", " Hello", [1, 28705, 22557]),
        ("v1", "生活的真谛是", [1, 28705, 29128, 29785, 28914, 29974, 235, 179, 158, 28971]),
        ("v3", "Hello", [1, 23325]),
        ("v3", " Hello", [1, 29473, 23325]),
        ("v3", "[INST]Hi[/INST]", [1, 3, 16127, 4]),
        ("tekken", "This is a test", [1, 4380, 1395, 1261, 2688]),
        ("tekken", " Hello", [1, 45383]),
    ],
)
def test_documented_ids_of_real_files(name: str, text: str, ids: list[int]) -> None:
    assert real(name)[2].encode(text).ids == ids


@pytest.mark.parametrize(
    "name", ["sentencepiece", "sentencepiece-control", "code-llama", "tekken", "llama-3"]
)
def test_transformers_uses_the_file_as_written(name: str, tmp_path: Path) -> None:
    """Under `LlamaTokenizer` transformers 5 would build its own: " Hello" is the text that shows it."""
    transformers = pytest.importorskip("transformers")
    case = TINY[name]()
    folder = write_folder(case.converted(), tmp_path, case.family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == case.bos
    assert len(tokenizer) == case.converted().vocab_size, "no id beyond the embedding table"
    assert tokenizer("x").keys() == {"input_ids", "attention_mask"}
    for text in TEXTS:
        if any(token in text for token in case.spelled):
            continue
        ids = case.encode(text)
        assert tokenizer(text)["input_ids"] == [case.bos, *ids], text[:60]
        assert tokenizer.decode([case.bos, *ids], skip_special_tokens=True) == case.decode(ids), text[:60]


_OLD_JUDGE = """
import json, sys, tokenizers
folder, texts = json.load(sys.stdin)
found = {}
for name in folder:
    tokenizer = tokenizers.Tokenizer.from_file(folder[name])
    found[name] = [tokenizer.encode(text).ids for text in texts]
print(json.dumps([tokenizers.__version__, found]))
"""


def test_tokenizers_0_15_reads_the_same(tmp_path: Path) -> None:
    """The release that transformers 4.37 comes with, in a process of its own."""
    judge = ROOT / ".judges" / "tf4.37"
    if not judge.is_dir():
        pytest.skip("tokenizers 0.15.2 is not set up")
    files = {}
    for name, make in TINY.items():
        files[name] = str(tmp_path / f"{name}.json")
        Path(files[name]).write_bytes(make().converted().documents["tokenizer.json"])
    run = subprocess.run(
        [sys.executable, "-c", _OLD_JUDGE],
        input=json.dumps([files, TEXTS]),
        env={**os.environ, "PYTHONPATH": str(judge)},
        capture_output=True,
        text=True,
        check=True,
    )
    version, found = json.loads(run.stdout)
    assert version.startswith("0.15.")
    for name, make in TINY.items():
        case = make()
        for text, ids in zip(TEXTS, found[name], strict=True):
            if not any(token in text for token in case.spelled):
                assert ids == [case.bos, *case.encode(text)], (name, text[:60])


def test_control_pieces_in_text_become_their_ids() -> None:
    """The one known difference: the original never finds them in text, chat templates need them found."""
    case = TINY["sentencepiece-control"]()
    tokenizer = loaded(case.converted())
    hello = case.encode("Hello")
    assert tokenizer.encode("[INST]Hello[/INST]", add_special_tokens=False).ids == [3, *hello, 4]
    assert tokenizer.encode("<s>Hello</s>", add_special_tokens=False).ids == [1, *hello, 2]
    assert case.encode("[INST]") != [3], "the original reads it as plain text"
    assert any("control piece" in note for note in case.converted().notes)


def test_user_defined_pieces_are_found_as_sentencepiece_finds_them() -> None:
    case = sentencepiece_case(sentencepiece_model(600, user_defined=("[REF]", "[REF]x", "✂")))
    result = case.converted()
    tokenizer = loaded(result)
    texts = [
        "a[REF]b",
        "[REF] the",
        "the [REF] test",
        "[REF]x[REF]",
        "✂✂",
        "a ✂b",
        "[REF",
        "[[REF]]",
        " [REF]",
        "✂ ",
    ]
    assert_same(case, tokenizer, texts)
    assert tokenizer.encode("[REF]").ids == [1, 3]
    assert any("user-defined" in note for note in result.notes)


def infill_ids(case: Case, prefix: str, suffix: str) -> list[int]:
    """Meta's definition (codellama, llama/generation.py): the suffix is encoded without its dummy prefix."""
    model = sentencepiece.read(case.data, case.name)
    pre, suf, mid = (
        next(i for i, p in enumerate(model.pieces) if p.text == f"▁<{name}>")
        for name in ("PRE", "SUF", "MID")
    )
    guarded, guard = case.encode("☺" + suffix), case.encode("☺")
    assert guarded[: len(guard)] == guard
    return [case.bos, pre, *case.encode(prefix), suf, *guarded[len(guard) :], mid]


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ('def f(x):\n    """ ', "\n    return x\n"),
        ("a", "b"),
        ("  the  ", " test"),
        ("\n", "Hello"),
        ("x", ""),
    ],
)
def test_infilling_prompt_equals_metas_ids(prefix: str, suffix: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    case = TINY["code-llama"]()
    expected = infill_ids(case, prefix, suffix)
    assert expected[1] == 512 - 9, "as 32007 is to 32016"
    prompt = f"<PRE> {prefix} <SUF>{suffix} <MID>"
    assert loaded(case.converted()).encode(prompt).ids == expected
    folder = write_folder(case.converted(), tmp_path, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(prompt)["input_ids"] == expected
    assert tokenizer.decode(expected) == f"<s> <PRE> {prefix} <SUF>{suffix} <MID>"


def test_without_infilling_pieces_no_class_may_add_them() -> None:
    config = json.loads(TINY["sentencepiece"]().converted().documents["tokenizer_config.json"])
    names = ("prefix_token", "middle_token", "suffix_token", "eot_token", "fill_token")
    assert [config[name] for name in names] == [None] * 5
    infill = json.loads(TINY["code-llama"]().converted().documents["tokenizer_config.json"])
    assert not set(names) & infill.keys()


def test_llama_3_names_follow_the_release() -> None:
    case = TINY["llama-3"]()
    first = case.bos
    plain = loaded(case.converted(rope_theta=500000.0))
    scaled = case.converted(use_scaled_rope=True)
    assert plain.token_to_id("<|reserved_special_token_2|>") == first + 4
    assert plain.token_to_id("<|reserved_special_token_250|>") == first + 255
    assert plain.token_to_id("<|eom_id|>") is None
    names = {"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4, "start_header_id": 6}
    names |= {"end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10}
    names |= {
        "reserved_special_token_2": 5,
        "reserved_special_token_3": 11,
        "reserved_special_token_247": 255,
    }
    for name, offset in names.items():
        assert loaded(scaled).token_to_id(f"<|{name}|>") == first + offset, name
    assert scaled.documents == case.converted(rope_scaling={"rope_type": "llama3"}).documents
    lengths = [
        json.loads(r.documents["tokenizer_config.json"])["model_max_length"]
        for r in (case.converted(), scaled, case.converted(max_position_embeddings=4096))
    ]
    assert lengths == [8192, 131072, 4096]


def test_ranks_in_any_order_of_lines_are_the_same_tokenizer() -> None:
    """tiktoken makes a dictionary of the lines; ranks decide, and the file goes back as it was."""
    data = b"".join(sorted(RANKS.splitlines(keepends=True)))
    assert data != RANKS
    usual, sorted_ = llama_3_case(RANKS).converted().documents, llama_3_case(data).converted().documents
    assert {n for n in usual if usual[n] != sorted_[n]} == {"original/tokenizer.model"}
    assert original_tokenizer_documents(sorted_) == {"tokenizer.model": data}


@pytest.mark.parametrize("name", TINY)
def test_the_way_back_is_exact(name: str) -> None:
    case = TINY[name]()
    result = case.converted()
    assert original_tokenizer_documents(result.documents) == {case.name: case.data}
    assert original_tokenizer_documents({"tokenizer.json": b"{}", "config.json": b"{}"}) == {}


@pytest.mark.parametrize("name", TINY)
def test_equal_inputs_give_equal_bytes(name: str) -> None:
    assert TINY[name]().converted().documents == TINY[name]().converted().documents


def test_facts_say_where_they_come_from() -> None:
    facts = TINY["sentencepiece"]().converted().facts
    assert (facts["bos_token_id"].value, facts["eos_token_id"].value) == (1, 2)
    assert facts["bos_token_id"].source == "tokenizer.model: trainer_spec.bos_id"
    facts = TINY["llama-3"]().converted().facts
    assert (facts["bos_token_id"].value, facts["eos_token_id"].value) == (900 - 256, 901 - 256)


def test_a_merge_never_has_a_space_in_a_half() -> None:
    for name in TINY:
        model = json.loads(TINY[name]().converted().documents["tokenizer.json"])["model"]
        assert model["merges"] or name == "sentencepiece-small"
        for merge in model["merges"]:
            left, right = merge.split(" ")
            assert left in model["vocab"] and right in model["vocab"] and left + right in model["vocab"]


def test_the_right_one_of_two_is_taken() -> None:
    v1, v3 = sentencepiece_model(400), sentencepiece_model(500, control=CONTROL)
    documents = {"tokenizer.model": v1, "tokenizer.model.v3": v3, "params.json": b"{}"}
    result = tokenizer_documents(documents, family="mistral", config={"vocab_size": 500})
    assert result.vocab_size == 500 and original_tokenizer_documents(result.documents) == {
        "tokenizer.model.v3": v3
    }
    assert any("tokenizer.model is left out" in note for note in result.notes)
    with pytest.raises(CkptToolError, match="expected one tokenizer, found 2 that differ") as error:
        tokenizer_documents(documents, family="mistral", config={})
    assert error.value.kind == "bad-tokenizer"


def test_two_names_of_one_file_are_one_tokenizer() -> None:
    data = sentencepiece_model(500, control=CONTROL)
    documents = {"tokenizer.model": data, "tokenizer.model.v3": data}
    result = tokenizer_documents(documents, family="mistral", config={"vocab_size": 500})
    assert result.documents["tokenizer.model"] == result.documents["tokenizer.model.v3"] == data


def test_no_tokenizer_is_a_note() -> None:
    result = tokenizer_documents({"params.json": b"{}"}, family="llama", config={})
    assert result.documents == {} and result.vocab_size == 0 and "no tokenizer" in result.notes[0]


def piece(text: bytes, kind: int = 1, score: bytes = b"\0\0\0\0") -> bytes:
    content = b"\x0a" + bytes([len(text)]) + text + b"\x15" + score + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(content)]) + content


def tekken_with(**changes: Any) -> bytes:
    content = json.loads(tekken_json(600))
    for key, value in changes.items():
        if key in content["config"]:
            content["config"][key] = value
        else:
            content[key] = value
    return json.dumps(content).encode()


SPM, RANKS = sentencepiece_model(400), tiktoken_model(600)
DEEP = b'{"config": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
WRONG = {
    "empty": ("tokenizer.model", b"", "expected a sentencepiece model or a list of tiktoken ranks"),
    "noise": ("tokenizer.model", bytes(range(1, 200)) * 50, "expected a sentencepiece model"),
    "html": ("tokenizer.model", b"<!DOCTYPE html><html>", "expected a sentencepiece model"),
    "lfs": (
        "tokenizer.model",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "expected a senten",
    ),
    "spm-cut": ("tokenizer.model", SPM[:-20], "expected a protobuf field within"),
    "spm-cut-early": ("tokenizer.model", SPM[:5], "expected a protobuf field within"),
    "spm-varint": ("tokenizer.model", b"\x0a\x03\x0a\xff\xff" + b"\xff" * 20, "expected a protobuf number"),
    "spm-group": ("tokenizer.model", b"\x0a\x02\x0a\x00\x0b", "expected a piece of 1 to 512 bytes"),
    "spm-utf8": ("tokenizer.model", piece(b"\xff\xfe"), "expected UTF-8"),
    "spm-nan": (
        "tokenizer.model",
        piece(b"a", score=b"\0\0\xc0\x7f"),
        "expected a piece with text, score and kind",
    ),
    "spm-kind": ("tokenizer.model", piece(b"a", kind=9), "found kind 9"),
    "spm-twice": (
        "tokenizer.model",
        SPM + piece(b"<0x41>", 6),
        "expected each piece once, found `<0x41>` at 68",
    ),
    "spm-unused": ("tokenizer.model", SPM + piece(b"zz", 5), "expected no piece marked unused"),
    "spm-byte": ("tokenizer.model", SPM + piece(b"<0x4a>", 6), "expected the byte pieces"),
    "spm-char": ("tokenizer.model", SPM + piece("aÿ".encode()), "found none for `ÿ`"),
    "spm-unigram": ("tokenizer.model", SPM + b"\x12\x02\x18\x01", "expected a BPE model, found unigram"),
    "spm-no-bytes": ("tokenizer.model", SPM + b"\x12\x03\x98\x02\x00", "found byte_fallback off"),
    "spm-bos": (
        "tokenizer.model",
        SPM + b"\x12\x03\xc8\x02\x05",
        "expected a control piece at id 5, found byte",
    ),
    "spm-bos-far": ("tokenizer.model", SPM + b"\x12\x04\xc8\x02\xff\x7f", "at id 16383, found no piece"),
    "spm-charsmap": ("tokenizer.model", SPM + b"\x1a\x03\x12\x01x", "found a table of replacements"),
    "spm-spaces": ("tokenizer.model", SPM + b"\x1a\x02\x20\x01", "expected spaces to be kept"),
    "ranks-gap": ("tokenizer.model", RANKS + b"enp6eg== 9999\n", "expected rank 344, found 9999"),
    "rank-twice": ("tokenizer.model", RANKS + b"enp6eg== 343\n", "expected rank 344, found 343 again"),
    "ranks-twice": ("tokenizer.model", RANKS + b"QQ== 344\n", "expected each token once"),
    "ranks-base64": ("tokenizer.model", RANKS + b"@@@ 344\n", "expected a base64 token and a rank"),
    "ranks-few": ("tokenizer.model", b"QQ== 0\nQg== 1\n", "none for 254, first 0x00"),
    "tekken-cut": ("tekken.json", tekken_json(600)[:-100], "found"),
    "tekken-deep": ("tekken.json", DEEP, "levels of nesting"),
    "tekken-list": ("tekken.json", b"[]", "expected a JSON object"),
    "tekken-none": ("tekken.json", b"{}", "expected an object, found NoneType"),
    "tekken-size": (
        "tekken.json",
        tekken_with(default_vocab_size=10**6),
        "expected 1 to 576 ordinary tokens",
    ),
    "tekken-bool": ("tekken.json", tekken_with(default_vocab_size=True), "expected an integer from 1"),
    "tekken-rank": (
        "tekken.json",
        tekken_with(vocab=[{"rank": 5, "token_bytes": "AA=="}] * 600),
        "expected rank 0",
    ),
    "tekken-base64": (
        "tekken.json",
        tekken_with(vocab=[{"rank": 0, "token_bytes": "é"}] * 600),
        "base64 token_bytes",
    ),
    "tekken-new": ("tekken.json", tekken_with(version="v13"), "expected a list of special tokens"),
    "tekken-pattern": ("tekken.json", tekken_with(pattern="x" * 5000), "expected a regular expression"),
    "tekken-special": (
        "tekken.json",
        tekken_with(special_tokens=[{"rank": i, "token_str": "<s>"} for i in range(3)]),
        "expected each special token once",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(name: str) -> None:
    file, data, message = WRONG[name]
    with pytest.raises(CkptToolError) as error:
        tokenizer_documents({file: data}, family="llama", config={})
    assert {problem.kind for problem in error.value.problems} == {"bad-tokenizer"}
    assert all(problem.file == file for problem in error.value.problems)
    assert any(message in problem.message for problem in error.value.problems), error.value.text()


def test_all_problems_of_a_model_come_together() -> None:
    data = SPM + piece(b"<0x41>", 6) + b"\x12\x02\x18\x01" + b"\x1a\x02\x20\x01"
    with pytest.raises(CkptToolError) as error:
        tokenizer_documents({"tokenizer.model": data}, family="llama", config={})
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("name", TINY)
def test_a_vocabulary_of_more_ids_than_rows_is_refused(name: str) -> None:
    case = TINY[name]()
    size = case.converted().vocab_size
    assert case.converted(vocab_size=size).vocab_size == case.converted(vocab_size=-1).vocab_size == size
    with pytest.raises(CkptToolError, match=f"expected a tokenizer of at most {size - 1} ids") as error:
        case.converted(vocab_size=size - 1)
    assert error.value.kind == "bad-tokenizer" and error.value.problems[0].file == case.name
    assert any("1 of" in note for note in case.converted(vocab_size=size + 1).notes)


def test_a_gigabyte_is_refused_before_it_is_looked_at() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 30

    for name in ("tokenizer.model", "tekken.json"):
        with pytest.raises(CkptToolError, match="expected at most 67108864 bytes, found 1073741824"):
            tokenizer_documents({name: Huge(b"\x0a\x05\x0a")}, family="llama", config={})


def test_ranks_alone_do_not_make_a_mistral_tokenizer() -> None:
    with pytest.raises(CkptToolError, match="expected a sentencepiece model for family mistral"):
        tokenizer_documents({"tokenizer.model": RANKS}, family="mistral", config={})


@given(data=st.binary(max_size=200), cut=st.integers(0, len(SPM)), at=st.integers(0, len(SPM) - 1))
@settings(max_examples=200, deadline=None)
def test_damage_never_ends_in_anything_but_an_error_of_ours(data: bytes, cut: int, at: int) -> None:
    for name, damaged in (
        ("tokenizer.model", b"\x0a\x05\x0a" + data),
        ("tokenizer.model", SPM[:cut]),
        ("tokenizer.model", SPM[:at] + data + SPM[at:]),
        ("tokenizer.model", b"QQ== 0\n" + data),
        ("tekken.json", b"{" + data),
    ):
        try:
            result = tokenizer_documents({name: damaged}, family="llama", config={})
        except CkptToolError as error:
            assert {problem.kind for problem in error.problems} == {"bad-tokenizer"}
        else:
            loaded(result)


def test_listed_special_tokens_of_tekken_are_used() -> None:
    names = ("<unk>", "<s>", "</s>", "[THINK]")
    data = tekken_json(600, special=8, special_tokens=names)
    result = tokenizer_documents({"tekken.json": data}, family="mistral", config={"vocab_size": 600})
    tokenizer = loaded(result)
    assert [tokenizer.id_to_token(i) for i in range(8)] == [*names, *(f"<SPECIAL_{i}>" for i in range(4, 8))]
    assert tokenizer.encode("[THINK]").ids == [1, 3]
    assert tokenizer.id_to_token(8) == "Ā", "the token of rank 0, a NUL byte"


def test_mistral_common_agrees_with_the_tiny_tekken(tmp_path: Path) -> None:
    """In a process of its own: where it can be imported, transformers prefers it to tokenizer.json."""
    if not MISTRAL_COMMON.is_dir():
        pytest.skip("mistral_common is not set up; `make test` does it")
    case = TINY["tekken"]()
    (tmp_path / "tekken.json").write_bytes(case.data)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    script = (
        "import json\n"
        "from mistral_common.tokens.tokenizers.tekken import Tekkenizer\n"
        "judge = Tekkenizer.from_file('tekken.json')\n"
        "texts = json.load(open('texts.json', encoding='utf-8'))\n"
        "print(json.dumps([judge.encode(t, bos=True, eos=False) for t in texts]))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(MISTRAL_COMMON)},
        capture_output=True,
        text=True,
        check=True,
    )
    tokenizer = loaded(case.converted())
    for text, ids in zip(TEXTS, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert tokenizer.encode(text).ids == ids, text[:60]


def test_fixtures_have_the_size_asked_for() -> None:
    library = pytest.importorskip("sentencepiece")
    for size, infill in ((259, False), (300, False), (1000, False), (320, True), (32016, True)):
        judge = library.SentencePieceProcessor()
        judge.LoadFromSerializedProto(sentencepiece_model(size, infill=infill))
        assert judge.get_piece_size() == size
        assert not infill or judge.id_to_piece(size - 9) == "▁<PRE>"
    assert len(tiktoken_model(900).splitlines()) == 900 - 256
    assert base64.b64decode(tiktoken_model(900).splitlines()[-1].split()[0])
    too_small: list[tuple[Callable[[int], bytes], int]] = [(sentencepiece_model, 258), (tiktoken_model, 511)]
    for make, size in [*too_small, (tekken_json, 280)]:
        with pytest.raises(ValueError, match="expected"):
            make(size)
