"""Heads of decoders that label a sequence, its tokens or an answer in it, against transformers 5.23.0 and
4.37.2: padding on the right and on the left, one row without an id for padding, and every loss."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ckpt_tool import reference
from ckpt_tool.reference import losses
from ckpt_tool.reference.hf_blocks import of_last_token
from ckpt_tool.verify.answers import Runner, Skip
from ckpt_tool.verify.prompts import padding_of
from tests import loaded

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
OLD = ROOT / ".judges" / "tf4.37"
BAR = 1e-5
PAD = 0
LLAMA = {
    "vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
OPT = {
    "vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40,
    "word_embed_proj_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 67, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQUENCE, TOKENS, ANSWER = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
ALL = (SEQUENCE, TOKENS, ANSWER)
# Stem of the class: its numbers, its heads in 5.23.0, those of them that 4.37.2 has too
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "Llama": (LLAMA, ALL, (SEQUENCE,)),
    "Mistral": (LLAMA | {"sliding_window": 32}, ALL, (SEQUENCE,)),
    "Mixtral": (LLAMA | {"num_local_experts": 4, "sliding_window": None}, ALL, (SEQUENCE,)),
    "Qwen2": (LLAMA, ALL, (SEQUENCE,)),
    "Qwen3": (LLAMA | {"head_dim": 12}, ALL, ()),
    "Gemma2": (LLAMA | {"head_dim": 12, "sliding_window": 5}, (SEQUENCE, TOKENS), ()),
    "GPTNeoX": (LLAMA | {"hidden_size": 32}, ALL, ALL),
    "OPT": (OPT, (SEQUENCE, ANSWER), (SEQUENCE, ANSWER)),
    "GPT2": (GPT2, ALL, ALL),
}
TABLE = [(stem, head) for stem, (_, heads, _) in MODELS.items() for head in heads]
HEAD = {SEQUENCE: "sequence_classification", TOKENS: "token_classification", ANSWER: "question_answering"}

WORDS = [[5, 9, 33, 8, 21, 17, 40, 3], [11, 60, 3, 44, 7, 12, 0, 0]]
IDS = {"right": WORDS, "left": [WORDS[0], WORDS[1][6:] + WORDS[1][:6]], "one row": WORDS[:1]}


@dataclass(frozen=True)
class Case:
    """One call of a class: rows padded somewhere, labels of one problem."""

    stem: str
    head: str
    padded: str
    problem: str | None
    labels: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.stem + self.head

    @property
    def call(self) -> dict[str, Tensor]:
        ids = torch.tensor(IDS[self.padded])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **self.labels}

    def config(self) -> dict[str, Any]:
        told: dict[str, Any] = {"num_labels": 2 if self.head == ANSWER else 3}
        if self.problem == "regression":
            told["num_labels"] = 1
        pad = None if self.padded == "one row" else PAD
        named = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}
        return {**MODELS[self.stem][0], **told, **named}


def cases(stem: str, head: str) -> Iterator[Case]:
    if head == TOKENS:
        labels = torch.tensor([[0, 2, 1, 1, 0, 2, -100, 1], [1, 0, 2, -100, 1, 1, -100, -100]])
        yield Case(stem, head, "right", None, {"labels": labels})
    elif head == ANSWER:
        where = {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([4, 9])}
        yield Case(stem, head, "right", None, where)
        yield Case(stem, head, "left", None, where)
    else:
        single, several = torch.tensor([2, 0]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        yield Case(stem, head, "right", "single_label_classification", {"labels": single})
        yield Case(stem, head, "left", "multi_label_classification", {"labels": several})
        yield Case(stem, head, "left", "regression", {"labels": torch.tensor([0.3, -1.7])})
        yield Case(stem, head, "one row", "single_label_classification", {"labels": single[:1]})


def built(case: Case) -> Any:
    """A random model of transformers' own making."""
    torch.manual_seed(4)
    config = getattr(transformers, f"{case.stem}Config")(**case.config())
    config._attn_implementation = "eager"
    model = getattr(transformers, case.architecture)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return model


def answered(case: Case, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What the reading makes of the same."""
    module = reference.converted(case.architecture)
    c, call = module.Config.from_hf(config), case.call
    ids, mask = call["input_ids"], call["attention_mask"]
    encoded = module.encode(ids, [tensors], c, mask=mask)
    found = module.HEADS[HEAD[case.head]](encoded, [tensors], c)
    if case.head == ANSWER:
        start, end = found
        places = case.labels["start_positions"], case.labels["end_positions"]
        return {"start_logits": start, "end_logits": end, "loss": losses.span(start, end, *places)}
    if case.head == TOKENS:
        return {"logits": found, "loss": losses.labelled(found, case.labels["labels"])}
    found = of_last_token(found, ids, padding_of(config))
    said = config.get("problem_type")
    return {"logits": found, "loss": losses.classification(found, case.labels["labels"], said)}


def largest(case: Case, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest difference of logits and of the loss, padded tokens aside: one on the left sees no key at
    all, where each release has its own numbers, which the softmax of an answer's loss runs over."""
    real = case.call["attention_mask"].bool()
    worst = 0.0
    if case.head == ANSWER and case.padded == "left":
        found = {name: x for name, x in found.items() if name != "loss"}
    for name, one in found.items():
        other = wanted[name]
        assert one.shape == other.shape, name
        if one.shape[:2] == real.shape and case.head != SEQUENCE:
            one, other = one[real], other[real]
        worst = max(worst, float((one - other).abs().max()))
    return worst


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[tuple[Case, Any, Any, Any]]]:
    """Of each row of the table its cases: tensors as they are saved, config.json, what 5.23.0 makes of it."""
    found: dict[tuple[str, str], list[tuple[Case, Any, Any, Any]]] = {}
    root = tmp_path_factory.mktemp("heads")
    known: dict[tuple[str, int], tuple[Any, Any]] = {}  # one model for all cases with as many labels
    for stem, head in TABLE:
        for case in cases(stem, head):
            told = case.config()
            key = (case.architecture, told["num_labels"])
            if key not in known:
                model, folder = built(case), root / f"{key[0]}{key[1]}"
                model.save_pretrained(folder)
                known[key] = model, load_file(folder / "model.safetensors")
            model, tensors = known[key]
            model.config.pad_token_id, model.config.problem_type = told["pad_token_id"], None
            with torch.no_grad():
                out = {n: x for n, x in model(**case.call).items() if isinstance(x, Tensor)}
            config = {**model.config.to_dict(), "architectures": [case.architecture]}
            found.setdefault((stem, head), []).append((case, tensors, config, out))
    return found


@pytest.mark.parametrize(("stem", "head"), TABLE)
def test_heads_are_those_of_transformers_5(stem: str, head: str, made: Any) -> None:
    for case, tensors, config, out in made[stem, head]:
        with torch.no_grad():
            found = answered(case, tensors, config)
        assert largest(case, out, found) <= BAR, case
        assert out["loss"].item() > 0.05


def test_heads_are_those_of_transformers_4_37(made: Any, tmp_path: Path) -> None:
    """Tied output layers aside, the release reads the same tensors."""
    taken = [row for (stem, head), rows in made.items() if head in MODELS[stem][2] for row in rows]
    asked = [
        (f"{case.stem}Config", case.architecture, case.config(), tensors, case.call)
        for case, tensors, _, _ in taken
    ]
    torch.save(asked, tmp_path / "in.pt")
    subprocess.run(
        [loaded.python("tf4.37"), ROOT / "tests/heads_script.py", tmp_path / "in.pt", tmp_path / "out.pt"],
        check=True,
        timeout=120,
    )
    for (case, tensors, config, _), old in zip(taken, torch.load(tmp_path / "out.pt"), strict=True):
        with torch.no_grad():
            found = answered(case, tensors, config)
        assert largest(case, old, found) <= BAR, case


def test_rows_without_an_id_for_padding_are_refused_as_the_library_does() -> None:
    """An id that config.json leaves out is the one of the class, if it has one."""
    assert padding_of({"model_type": "opt"}) == 1 and padding_of({"model_type": "llama"}) is None
    assert padding_of({"model_type": "opt", "pad_token_id": None}) is None
    subject: Any = SimpleNamespace(config={"model_type": "llama"})
    runner = Runner(subject, None, "float32", "cpu", None)  # type: ignore[arg-type]
    assert runner._padding(1) is None
    with pytest.raises(Skip, match="expected a pad_token_id to find the last token of 2 rows by, found none"):
        runner._padding(2)
