"""The files of MLukeTokenizer in two releases of transformers, against the rules: words by sentencepiece and
fairseq's ids, entities by spans of characters.

Source of the rules: studio-ousia/luke @25165454; arXiv 2110.08151 for the tasks; fairseq's alignment of ids.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.convert.dialects.entity_vocabulary import OBJECT
from ckpt_tool.convert.tokenizers import entity_spans
from tests import loaded

ROOT = Path(__file__).parents[1]
WORDS = 176  # of the embedding before the markers
ADDED = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 175, "<ent>": 176, "<ent2>": 177}
MENTION = 30  # tokens of an entity that have a place
CLASSIFY, PAIR, SPANS = (f"entity_{x}classification" for x in ("", "pair_", "span_"))

Span = tuple[int, int]
Words = Callable[[str], list[int]]


# --- the rules ------------------------------------------------------------------------------------------


def words(folder: Path) -> Words:
    """Ids of a text without its frame: a piece is one up, what has no piece is 3."""
    library = pytest.importorskip("sentencepiece")
    model = library.SentencePieceProcessor(model_file=str(folder / entity_spans.MODEL))

    def ids(text: str) -> list[int]:
        parts = [x for x in re.split(r"\s*(<mask>)|(<ent2?>)", text) if x]
        known = [[ADDED[x]] if x in ADDED else [k + 1 if k else 3 for k in model.encode(x)] for x in parts]
        return [*chain(*known)]

    return ids


def cut(text: str, spans: Sequence[Span], ids: Words) -> tuple[list[int], list[Span]]:
    """The text cut at each border, a space going to what follows it; the spans, now of tokens."""
    made: list[int] = []
    place, done = {}, 0
    for border in sorted({*chain(*spans)}):
        stop = border - 1 if text[:border].endswith(" ") else border
        made += ids(text[done:stop])
        place[border], done = len(made), max(done, stop)
    return made + ids(text[done:]), [(place[a], place[b]) for a, b in spans]


def marked(made: list[int], spans: list[Span], markers: Sequence[int]) -> tuple[list[int], list[Span]]:
    """Each span between two of its marker, which belong to it."""
    out, moved = made, [*spans]
    for k in sorted(range(len(spans)), key=lambda k: spans[k][0], reverse=True):
        (start, stop), marker = spans[k], markers[k]
        out = [*out[:start], marker, *out[start:stop], marker, *out[stop:]]
        moved = [(a + 2, b + 2) if j != k and a >= stop else (a, b) for j, (a, b) in enumerate(moved)]
        moved[k] = (start, stop + 2)
    return out, moved


def expected(case: dict[str, Any], ids: Words, entities: dict[str, int]) -> dict[str, Any]:
    task, spans = case.get("task"), [tuple(x) for x in case.get("entity_spans") or ()]
    made, places = cut(case["text"], spans, ids)
    mask = [entities["[MASK]"], entities["[MASK2]"]]
    if task in (CLASSIFY, PAIR):
        made, places = marked(made, places, [ADDED["<ent>"], ADDED["<ent2>"]])
    told = case.get("entities")
    known = [entities.get(t, entities["[UNK]"]) for t in told] if told else [mask[0]] * len(spans)
    known = mask if task == PAIR else known
    places = [(a + 1, b + 1) for a, b in places]
    framed = [0, *made, 2]
    if "text_pair" in case:
        own = [tuple(x) for x in case.get("entity_spans_pair") or ()]
        second, more = cut(case["text_pair"], own, ids)
        places += [(a + len(made) + 3, b + len(made) + 3) for a, b in more]
        told = case.get("entities_pair")
        known += [entities.get(t, entities["[UNK]"]) for t in told] if told else [mask[0]] * len(own)
        framed += [2, *second, 2]
    found: dict[str, Any] = {"input_ids": framed, "attention_mask": [1] * len(framed)}
    if places:
        listed = [[*range(a, min(b, a + MENTION))] for a, b in places]
        found["entity_ids"], found["entity_attention_mask"] = known, [1] * len(known)
        found["entity_position_ids"] = [x + [-1] * (MENTION - len(x)) for x in listed]
    if task == SPANS:
        found["entity_start_positions"] = [a for a, _ in places]
        found["entity_end_positions"] = [b - 1 for _, b in places]
    return found


# --- texts ----------------------------------------------------------------------------------------------


def spans_of(text: str, *titles: str) -> list[Span]:
    return [(text.index(t), text.index(t) + len(t)) for t in titles]


def cases() -> list[dict[str, Any]]:
    """Spans at both ends, side by side, overlapping, inside a word, of all of a text, longer than a mention,
    in the order of the text and not; titles unknown and in several languages; two texts."""
    hello = "Hello world of the test"
    other = "été 生活 привет 😀self@# return"
    long = "the " * 40 + "world"
    pairs = [
        spans_of(hello, "Hello", "test"),
        spans_of(hello, "test", "Hello"),
        spans_of(hello, "world", "of the"),
        spans_of(other, "été", "return"),
        spans_of(other, "self", "@#"),
        spans_of(other, "привет", "生"),
    ]
    made: list[dict[str, Any]] = [{"text": t} for t in (hello, other, long, "", "@", "a <mask> test<mask>")]
    for text, spans in zip([hello] * 3 + [other] * 3, pairs, strict=True):
        titles = ["en:Japan", "ja:日本"]
        made += [{"text": text, "entity_spans": spans, "task": task} for task in (None, PAIR, SPANS)]
        made += [{"text": text, "entity_spans": [s], "task": CLASSIFY} for s in spans]
        made.append({"text": text, "entity_spans": spans, "entities": titles})
    whole: Span = (0, len(hello))
    made += [
        {"text": hello, "entity_spans": [whole], "task": CLASSIFY},
        {"text": hello, "entity_spans": [whole, (0, 5), (3, 8), (10, 23)]},
        {"text": hello, "entity_spans": [(2, 4), (6, 9), (22, 23)], "task": SPANS},
        {"text": long, "entity_spans": [(0, 159), (160, 165)], "task": SPANS},
        {"text": hello, "entity_spans": [(0, 5), (6, 11)], "entities": ["en:A: B", "en:nobody"]},
        {"text": hello, "entity_spans": [(0, 5)], "entities": ['en:with "quotes"']},
        {"text": hello, "entity_spans": [(0, 5), (6, 11)], "entities": ["[MASK]", "Japan"]},
    ]
    two = {"text": hello, "text_pair": other}
    return [
        *made,
        two,
        two | {"entity_spans": [(0, 5)], "entity_spans_pair": spans_of(other, "生活", "return")},
        two | {"entity_spans_pair": [(0, 3)], "entities_pair": ["en:Beyoncé"], "entity_spans": [(6, 11)]},
    ]


# Texts that only release 4 reads as the model does: no piece for a character, spaces at an end and two.
OLD = [{"text": t} for t in ("zzz", "a\tb", "Hello  ", "  Hello", "of  the", "the \u3000of", "``Hello''")]
OLD += [
    {"text": "Hello  z  world", "entity_spans": [(7, 8), (10, 15)], "task": t} for t in (None, PAIR, SPANS)
]

ASK = """
import json, sys
from transformers import AutoTokenizer
folder, cases = sys.argv[1], json.load(open(sys.argv[2]))
made = {}
def answer(text, task=None, **case):
    t = made.setdefault(task, AutoTokenizer.from_pretrained(folder, task=task))
    for name in [n for n in case if n.startswith("entity_spans")]:
        case[name] = [tuple(x) for x in case[name]]
    return dict(t(text, **case))
def answers(cases):
    return [answer(**case) for case in cases]
"""


@pytest.fixture(scope="module")
def folder(conversions: Callable[[str], Path]) -> Path:
    return conversions("mluke-base")


@pytest.fixture(scope="module")
def rules(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    ids, entities = words(folder), json.loads((folder / OBJECT).read_text())
    return lambda case: expected(case, ids, entities)


def test_4_37_reads_words_and_entities_by_the_rules(
    folder: Path, rules: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    asked = [*cases(), *OLD]
    (tmp_path / "cases.json").write_text(json.dumps(asked))
    run = subprocess.run(
        [loaded.python("tf4.37"), "-W", "ignore", "-c", ASK + "print(json.dumps(answers(cases)))"]
        + [str(folder), str(tmp_path / "cases.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for case, found in zip(asked, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert found == rules(case), case


@pytest.fixture(scope="module")
def current(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the release of the test above")
    made = {
        task: transformers.AutoTokenizer.from_pretrained(folder, task=task)
        for task in (None, CLASSIFY, PAIR, SPANS)
    }

    def answer(case: dict[str, Any]) -> dict[str, Any]:
        asked = {n: x for n, x in case.items() if n not in ("task", "text")}
        return dict(made[case.get("task")](case["text"], **asked))

    return answer


def test_the_installed_release_reads_words_and_entities_by_the_rules(
    current: Callable[[dict[str, Any]], dict[str, Any]], rules: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    for case in cases():
        assert current(case) == rules(case), case


def test_what_the_installed_release_reads_otherwise_is_said(
    current: Callable[[dict[str, Any]], dict[str, Any]],
    rules: Callable[[dict[str, Any]], dict[str, Any]],
    folder: Path,
) -> None:
    """Its class builds another tokenizer of the pieces in tokenizer.json, which reads them by the rules."""
    tokenizers = pytest.importorskip("tokenizers")
    assert all(current(case) != rules(case) for case in OLD)
    assert current({"text": "zzz"})["input_ids"] == [0, 130, 0, 2]
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for case in [*cases(), *OLD]:
        assert alone.encode(case["text"]).ids == rules({"text": case["text"]})["input_ids"], case
    notes = json.loads((folder / "ckpt-tool.json").read_text())["notes"]
    (note,) = (n for n in notes if "transformers 5" in n)
    assert "gives what has no piece the id of <s>, 0 and not 3" in note and "before 5" in note
    assert "but for marks that are characters of their own (decomposed text)" in note


@pytest.mark.parametrize(
    ("text", "joined", "apart"),
    [("\u304b\u3099", "\u304c", "\u304b\u3099"), ("e\u0301\u0302", "\u00e9\u0302", "\u00e9")],
)
def test_tokenizers_does_not_join_marks_by_the_models_table(text: str, joined: str, apart: str) -> None:
    """Why the note excepts decomposed text: a kana and its voicing mark are one character to the model, and
    of two accents tokenizers drops the second. The table is sentencepiece's own (nmt_nfkc)."""
    library, tokenizers = pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
    trained = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["a@ b# c d e f"] * 9), model_writer=trained, vocab_size=13, minloglevel=2
    )
    data = trained.getvalue()
    size = entity_spans.size_of(entity_spans.read(data, entity_spans.MODEL))
    document = entity_spans.documents(data, size, 512)["tokenizer.json"].decode()
    assert library.SentencePieceProcessor(model_proto=data).normalize(text) == f"▁{joined}"
    assert tokenizers.Tokenizer.from_str(document).normalizer.normalize_str(text) == apart
