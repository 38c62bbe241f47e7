"""Megatron's BERT as its tasks train it further: one head on the pooled first token, in place of two."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from tests.megatron_models import State, args, megatron_files, tensors

BERT = "megatron-bert"
CLASSES = {
    "classification_head": "MegatronBertForSequenceClassification",
    "multichoice_head": "MegatronBertForMultipleChoice",
}
PRETRAINED = ("model.lm_head.", "model.binary_head.", "model.word_embeddings_for_head.")
HOSTILE = {"weight": (65537, 0), "bias": (3,)}
FULL = {n: t.float() for n, t in tensors().items()}


def write(folder: Path, ranks: int, gone: Collection[str], more: State, stages: tuple[int, ...]) -> Path:
    """The files of a run of version 3.0, without what begins with one of `gone`; `more` is of the last
    stage."""
    told = args(tensor_model_parallel_size=ranks, pipeline_model_parallel_size=len(stages), vocab_size=None)
    for r, row in enumerate(megatron_files(FULL, BERT, 3.0, "encoder", ranks, stages)):
        row[-1] |= more
        for s, held in enumerate(row):
            model = {
                n.removeprefix("model."): t
                for n, t in held.items()
                if not n.startswith(tuple(gone) or (" ",))
            }
            home = folder / "iter_0000007" / (f"mp_rank_{r:02}" + (f"_{s:03}" if len(stages) > 1 else ""))
            home.mkdir(parents=True)
            kept = {"model": model, "args": Namespace(**told), "checkpoint_version": 3.0, "iteration": 7}
            torch.save(kept, home / "model_optim_rng.pt")
    return folder


def head_of(kind: str, rows: int) -> State:
    seed = torch.Generator().manual_seed(7)
    width = FULL["word"].shape[1]
    shapes = {"weight": (rows, width), "bias": (rows,)}
    return {f"model.{kind}.{n}": torch.randn(s, generator=seed) * 0.2 for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("head", "rows", "ranks", "stages"),
    [
        ("classification_head", 3, 2, (1, 3)),
        ("classification_head", 1, 1, (4,)),
        ("multichoice_head", 1, 2, (4,)),
    ],
)
def test_the_head_of_a_task_is_that_of_its_class(
    head: str, rows: int, ranks: int, stages: tuple[int, ...], tmp_path: Path
) -> None:
    source, out, back = tmp_path / "in", tmp_path / "out", tmp_path / "back"
    more = head_of(head, rows)
    write(source, ranks, PRETRAINED, more, stages)
    done = api.convert(source, out, family=BERT, check=False)
    assert "all 44 rows of the vocabulary are kept" in " ".join(done.plan.notes)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [CLASSES[head]]
    labels = {str(k): f"LABEL_{k}" for k in range(rows)} if head == "classification_head" else None
    assert config.get("id2label") == labels
    held = load_file(out / "model.safetensors")
    assert torch.equal(held["classifier.weight"], more[f"model.{head}.weight"])
    assert not [n for n in held if n.startswith("cls.")]
    report = api.verify(out, source, mode="quick")
    assert (report.status, report.exactness) == ("pass", "bit-identical")
    api.convert(out, back, family=BERT, to="original", check=False)
    for name, file in {f.parent.name: f for f in back.rglob("*.pt")}.items():
        model = torch.load(file, weights_only=False)["model"]
        if len(stages) > 1 and not name.endswith("_001"):
            assert head not in model
            continue
        assert {f"model.{head}.{n}": t.tolist() for n, t in model[head].items()} == {
            n: t.tolist() for n, t in more.items()
        }
        assert "lm_head" not in model

    held["classifier.weight"] = held["classifier.weight"].flip(1).contiguous()
    save_file(held, out / "model.safetensors", {"format": "pt"})
    report = api.verify(out, source, levels=("parity",), mode="quick")
    wrong = [(f.check, f.where) for f in report.findings if f.status == "fail"]
    assert (report.status, wrong) == ("fail", [("lockstep", "logits")])


def test_heads_of_two_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, (), head_of("classification_head", 2), (4,))
    with pytest.raises(CkptToolError) as caught:
        api.plan(tmp_path, family=BERT)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsupported", "architectures")
    assert problem.message == "expected the heads of one class, found classification_head beside others"
    left = frozenset(["model.classification_head.weight", "model.classification_head.bias"])
    made = api.plan(tmp_path, family=BERT, options=api.Options(drop=left))  # as the hint says
    assert made.config["architectures"].value == ["MegatronBertForPreTraining"]


def test_classes_without_number_are_not_named_one_by_one(tmp_path: Path) -> None:
    """A tensor without columns takes no bytes for any number of rows."""
    head = {f"model.classification_head.{n}": torch.zeros(s) for n, s in HOSTILE.items()}
    write(tmp_path, 1, PRETRAINED, head, (4,))
    with pytest.raises(CkptToolError) as caught:
        api.plan(tmp_path, family=BERT)
    assert ("unsupported", "expected at most 65536 classes, found 65537") in [
        (p.kind, p.message) for p in caught.value.problems
    ]


def test_a_run_without_token_types_is_told_what_leads_out(tmp_path: Path) -> None:
    """--bert-no-binary-head; a table of zeros changes nothing that the original computes."""
    table = "model.language_model.embedding.tokentype_embeddings.weight"
    gone = ("model.binary_head.", "model.language_model.pooler.", table)
    write(tmp_path / "in", 1, gone, {}, (4,))
    with pytest.raises(CkptToolError) as caught:
        api.plan(tmp_path / "in", family=BERT)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("missing-tensor", "tokentype_embeddings.weight")
    assert problem.hint and "save one of zeros in the first stage" in problem.hint
    zeros = torch.zeros(2, FULL["word"].shape[1])
    write(tmp_path / "zeros", 1, gone[:2], {table: zeros}, (4,))
    made = api.plan(tmp_path / "zeros", family=BERT)
    assert made.config["architectures"].value == ["MegatronBertForMaskedLM"]
