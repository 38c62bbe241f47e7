"""MobileBERT in both layouts: the golden toy, every head and its loss against transformers, every kind of
model that its config can say, and what is refused."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import hf_mobilebert as hf
from ckpt_tool.reference import losses
from ckpt_tool.reference import mobilebert as tf
from tests import loaded
from tests.mobilebert_models import (
    KINDS,
    STUDENT,
    D,
    State,
    T,
    V,
    batch,
    cast,
    converted,
    judge,
    largest,
    original,
    variables,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


# --- the golden toy ---------------------------------------------------------------------------------------

TOY = STUDENT | {
    "vocab_size": 14, "embedding_size": 4, "hidden_size": 12, "intra_bottleneck_size": 8,
    "intermediate_size": 10, "max_position_embeddings": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def toy() -> State:
    """Element e of the k-th variable: 0.3 sin(0.1 (e + 1)^2 + k), and 1 more in every gamma."""
    made = {}
    for k, (name, x) in enumerate(sorted(variables(TOY).items()), start=1):
        e = torch.arange(x.numel(), dtype=torch.float64)
        y = 0.3 * torch.sin(0.1 * (e + 1) ** 2 + k) + float(name.endswith("gamma"))
        made[name] = y.float().view(x.shape)
    assert len(made) == 107
    return made


@pytest.mark.parametrize("side", ["original", "converted"])
def test_the_golden_toy(side: str) -> None:
    """Of one that was computed in numpy from the code alone, and by transformers 4.37.2."""
    state = toy()
    module: Any = tf if side == "original" else hf
    c = original(state, TOY) if side == "original" else hf.Config.from_hf(TOY)
    ranks = [state if side == "original" else converted(state)]
    ids = torch.tensor([[3, 7, 5, 9, 2, 11], [3, 8, 4, 2, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    x = module.encode(ids, ranks, c, token_types=types, mask=mask)
    lm, order = module.HEADS["pretraining"](x, ranks, c)
    hidden = [[-0.33551, 1.19402, -0.25599], [-0.56883, 1.43233, -0.56026]]
    words = [[-0.43678, 0.39783, 0.04297, 1.17336], [-0.28056, 0.52667, 0.04901, 0.93675]]
    next_sentence = [[1.55970, 0.42525], [1.52972, 0.63382]]
    for found, expected in ((x[:, 0, :3], hidden), (lm[:, 1, :4], words), (order, next_sentence)):
        assert (found - torch.tensor(expected)).abs().max() < 6e-6
    sums = [float(lm[r][mask[r].bool()].double().sum()) for r in (0, 1)]
    assert sums == pytest.approx([11.2576, 8.1377], abs=6e-5)


# --- every head and its loss ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A class of transformers, the outputs of ours by its names for them, labels, and our loss of them."""

    name: str
    head: str
    outputs: tuple[str, ...]
    labels: Mapping[str, Tensor]
    loss: Any = None
    variables: tuple[str, int] | None = None  # what a fine-tuned head begins with, and its rows
    config: tuple[tuple[str, Any], ...] = ()


def token_labels(choices: int) -> Tensor:
    seed = torch.Generator().manual_seed(8)
    labels = torch.randint(choices, (2, T), generator=seed)
    labels[torch.rand(2, T, generator=seed) < 0.3] = -100
    return labels.masked_fill(batch()[2] == 0, -100)


def classes(labels: Tensor, problem: str | None = None, number: int = 3) -> Head:
    return Head(
        "ForSequenceClassification", "sequence_classification", ("logits",), {"labels": labels},
        lambda logits, labels: losses.classification(logits, labels, problem), ("", number),
        (("num_labels", number), ("problem_type", problem)),
    )  # fmt: skip


def question(stem: str, first: list[int], last: list[int]) -> Head:
    positions = {"start_positions": torch.tensor(first), "end_positions": torch.tensor(last)}
    return Head(
        "ForQuestionAnswering", "question_answering", ("start_logits", "end_logits"), positions,
        lambda start, end, start_positions, end_positions: losses.span(
            start, end, start_positions, end_positions
        ),
        (stem, 2),
    )  # fmt: skip


ONE_EACH, ORDER = torch.tensor([2, 0]), torch.tensor([1, 0])
HEADS = {
    "base": Head("Model", "base_model", ("last_hidden_state", "pooler_output"), {}),
    "pretraining": Head(
        "ForPreTraining", "pretraining", ("prediction_logits", "seq_relationship_logits"),
        {"labels": token_labels(V), "next_sentence_label": ORDER},
        lambda lm, order, labels, next_sentence_label: losses.pretraining(
            lm, order, labels, next_sentence_label
        ),
    ),
    "masked-lm": Head(
        "ForMaskedLM", "masked_lm", ("logits",), {"labels": token_labels(V)}, losses.labelled
    ),
    "next-sentence": Head(
        "ForNextSentencePrediction", "next_sentence_prediction", ("logits",), {"labels": ORDER},
        losses.labelled,
    ),
    "classes": classes(ONE_EACH),
    "classes-told": classes(ONE_EACH, "single_label_classification"),
    "several-classes": classes(torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    "several-classes-told": classes(torch.tensor([[1.0, 0, 1], [0, 0, 1]]), "multi_label_classification"),
    "regression": classes(torch.tensor([0.7, -0.4]), number=1),
    "regression-of-three": classes(torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.4, -0.7]]), "regression"),
    "token-classes": Head(
        "ForTokenClassification", "token_classification", ("logits",), {"labels": token_labels(3)},
        losses.labelled, ("", 3), (("num_labels", 3),),
    ),
    "multiple-choice": Head(
        "ForMultipleChoice", "multiple_choice", ("logits",), {"labels": torch.tensor([1, 2])},
        losses.labelled, ("", 1),
    ),
    "question": question("cls/squad/", [3, 5], [6, 9]),
    "question-under-its-old-name": question("squad/", [3, 5], [6, 9]),
    "question-clamped-and-ignored": question("cls/squad/", [-4, 5], [T + 9, 9]),
}  # fmt: skip
POOLED = STUDENT | {"classifier_activation": True}


def given(head: Head) -> dict[str, Tensor]:
    ids, types, mask = batch()
    if head.head == "multiple_choice":  # three choices, each a rotation of the text

        def choices(t: Tensor) -> Tensor:
            return torch.stack([t, t.roll(1, -1), t.roll(2, -1)], dim=1)

        mask = mask[:, None].repeat(1, 3, 1)
        ids, types = choices(ids) * mask, choices(types) * mask
    return {"ids": ids, "token_types": types, "mask": mask}


@dataclass(frozen=True)
class Case:
    """A head on a kind of model: what goes into a class of transformers, and into both readings."""

    head: Head
    told: Mapping[str, Any]
    ours: State
    theirs: State
    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]

    @property
    def call(self) -> dict[str, Tensor]:
        """As transformers names it."""
        x = self.inputs
        names = {"input_ids": "ids", "token_type_ids": "token_types", "attention_mask": "mask"}
        return {**{name: x[own] for name, own in names.items()}, **self.labels}


def case(name: str, told: Mapping[str, Any], dtype: torch.dtype) -> Case:
    head = HEADS[name]
    own = {} if head.variables is None else {head.variables[0]: (head.variables[1], D)}
    state = cast(variables(told, own), dtype)
    theirs = converted(state, "qa_outputs" if head.head == "question_answering" else "classifier")
    labels = {n: t.to(dtype) if t.is_floating_point() else t for n, t in head.labels.items()}
    return Case(head, told, state, theirs, given(head), labels)


def distances(case: Case, wanted: Mapping[str, Any]) -> tuple[float, float, float]:
    """How far the outputs and the losses of both readings are at most from those of transformers, and the
    largest output."""
    head, x = case.head, case.inputs
    root = "mobilebert." if head.name == "Model" else "\0"
    config = {**case.told, "architectures": [f"MobileBert{head.name}"]}
    sides: list[tuple[Any, Any, State]] = [
        (tf, original(case.ours, case.told), case.ours),
        (hf, hf.Config.from_hf(config), {n.removeprefix(root): t for n, t in case.theirs.items()}),
    ]
    off, of_loss, size = 0.0, 0.0, 0.0
    for module, c, tensors in sides:
        y = module.encode(x["ids"], [tensors], c, token_types=x["token_types"], mask=x["mask"])
        out = module.HEADS[head.head](y, [tensors], c)
        found = out if isinstance(out, tuple) else (out,)
        for output, field in zip(found, head.outputs, strict=True):
            off = max(off, largest(output, wanted[field]))
            size = max(size, float(output.abs().max()))
        if head.loss is not None:
            of_loss = max(of_loss, abs(float(head.loss(*found, **case.labels) - wanted["loss"])))
    return off, of_loss, size


def measured(name: str, told: Mapping[str, Any], dtype: torch.dtype) -> tuple[float, float, float]:
    made = case(name, told, dtype)
    model = judge(made.theirs, told, made.head.name, dtype, **dict(made.head.config))
    with torch.no_grad():
        return distances(made, model(**{n: t.clone() for n, t in made.call.items()}))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_and_its_loss_are_those_of_transformers(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    """All positions, padded ones too."""
    for told in (STUDENT, POOLED):
        off, of_loss, size = measured(name, told, dtype)
        assert size > 0.5 and off <= bound and of_loss <= bound


def test_every_head_and_its_loss_are_those_of_transformers_4_37(tmp_path: Path) -> None:
    """In float32, with a pooler and without one."""
    cases = [case(name, told, torch.float32) for name in HEADS for told in (STUDENT, POOLED)]
    asked = []
    for made in cases:
        bare = made.head.name == "Model"
        state = {n.removeprefix("mobilebert.") if bare else n: x for n, x in made.theirs.items()}
        config = {**made.told, **dict(made.head.config)}
        asked.append(("MobileBertConfig", f"MobileBert{made.head.name}", config, state, made.call))
    torch.save(asked, tmp_path / "in.pt")
    subprocess.run(
        [loaded.python("tf4.37"), ROOT / "tests/heads_script.py", tmp_path / "in.pt", tmp_path / "out.pt"],
        check=True,
        timeout=120,
    )
    answers = torch.load(tmp_path / "out.pt")
    for made, answer in zip(cases, answers, strict=True):
        off, of_loss, size = distances(made, answer)
        assert size > 0.5 and off <= 1e-5 and of_loss <= 1e-5, made.head.name


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_that_of_transformers(kind: str) -> None:
    """In float64. Two norms of transformers have an epsilon of their own where norms are layer norms, which
    the original's have not: it is compared with the other reading as it would be without that."""
    told = KINDS[kind]
    state = variables(told)
    ids, types, mask = batch()
    with torch.no_grad():
        wanted = judge(converted(state), told, "ForPreTraining", torch.float64)(
            input_ids=ids, token_type_ids=types, attention_mask=mask
        )
    sides: dict[str, tuple[Any, Any, State]] = {
        "original": (tf, original(state, told), state),
        "hf": (hf, hf.Config.from_hf(told), converted(state)),
        "with one epsilon": (hf, hf.Config.from_hf({**told, hf.INNER_EPS: 1e-12}), converted(state)),
    }
    found = {}
    for side, (module, c, tensors) in sides.items():
        x = module.encode(ids, [tensors], c, token_types=types, mask=mask)
        found[side] = module.HEADS["pretraining"](x, [tensors], c)
    alike = told["normalization_type"] == "no_norm"
    for k, field in enumerate(("prediction_logits", "seq_relationship_logits")):
        assert largest(found["hf"][k], wanted[field]) <= 1e-12
        assert largest(found["original"][k], found["with one epsilon"][k]) <= 1e-12
        assert (largest(found["original"][k], wanted[field]) <= 1e-12) == alike


@pytest.mark.parametrize("kind", ["layer norms", "layer norms without a bottleneck"])
def test_the_difference_that_an_epsilon_makes_is_inside_its_bound(kind: str) -> None:
    """At every phase, on the original's own input to it; and the bound is not idle."""
    told = KINDS[kind]
    state = {n: x * (0.002 if "output/dense" in n else 1) for n, x in variables(told).items()}
    ids, types, mask = batch()
    c = hf.Config.from_hf(told)
    ours, theirs = [state], [converted(state)]
    inputs = {"token_types": types, "mask": mask}
    x: Any = ids
    for one, other in zip(
        tf.phases(ours, original(state, told), inputs), hf.phases(theirs, c, inputs), strict=True
    ):
        if one.kind == "head":
            break
        y = one.run(x)
        moved = (y - other.run(x)).abs()
        if one.kind == "embed":
            bound = hf.bounds["embed"](x, theirs, c, token_types=types)
        else:
            bound = hf.bounds["layer"](x, one.index, theirs, c, mask=mask)
        assert bool((moved <= bound + 1e-14).all()) and float(moved.max()) > 1e-8
        assert float((moved / bound).max()) > 0.02
        x = y


# --- what a config says, and what is refused --------------------------------------------------------------


def shapes_of(told: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(x.shape) for n, x in variables(told).items()}


def test_tensors_tell_what_they_can_and_published_sizes_the_rest() -> None:
    bare = {"num_attention_heads": 2, "hidden_act": "relu6"}
    for kind, told in KINDS.items():
        if told["normalization_type"] == "no_norm" and "as wide as the model" not in kind:
            of_google = {"gelu_new": "gelu"}.get(told["hidden_act"], told["hidden_act"])
            whole = tf.Config.from_original({**told, "hidden_act": of_google}, shapes_of(told), 1, bare)
            assert tf.Config.from_original({}, shapes_of(told), 1, bare) == whole
    published = STUDENT | {"hidden_size": 512, "embedding_size": 128, "intra_bottleneck_size": 128}
    published |= {"intermediate_size": 512, "vocab_size": 3, "max_position_embeddings": 4}
    one_layer = shapes_of(published | {"num_hidden_layers": 1})
    shapes = {
        name.replace("layer_0", f"layer_{i}"): shape for i in range(24) for name, shape in one_layer.items()
    }
    c = tf.Config.from_original({}, shapes, 1, {})
    assert (c.n_layers, c.n_heads, c.activation, c.norm_eps, c.shared) == (24, 4, "relu", None, True)
    # a document that says nothing of them means what the code has for it
    silent = {k: v for k, v in STUDENT.items() if k not in ("hidden_act", "num_attention_heads")}
    silent |= {"intra_bottleneck_size": 24}
    c = tf.Config.from_original(silent, shapes_of(silent), 1, {})
    assert (c.n_heads, c.activation) == (12, "tanh")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "heads": ({"num_attention_heads": 3}, {}, "expected heads that share 20 channels, found 3"),
    "activation": ({"hidden_act": "silu"}, {}, "expected `hidden_act` to be one of relu, relu6, gelu, tanh"),
    "trigram": ({"trigram_input": False}, {}, "expected trigram_input False, as told, found 1"),
    "networks": ({"num_feedforward_networks": 3}, {}, "expected num_feedforward_networks 3, as told, found"),
    "norm": ({"normalization_type": "layer_norm"}, {}, "expected the variables of layer_norm, found those"),
    "pooler": ({"classifier_activation": True}, {}, "expected classifier_activation True, as told, found 0"),
    "shared": ({"use_bottleneck_attention": True}, {}, "expected use_bottleneck_attention True, as told"),
    "bottleneck": ({"use_bottleneck": False}, {}, "expected use_bottleneck False, as told, found 1"),
    "of another model": ({"relative_attention": 4}, {}, "found `relative_attention` 4"),
    "untied": ({}, {"tie_word_embeddings": False}, "expected `tie_word_embeddings` True, found False"),
    "by name": ({}, {"intra_bottleneck_size": 128}, "expected intra_bottleneck_size 128, as told, found 20"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_told_has_to_be_what_the_tensors_show(name: str) -> None:
    told, by_name, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        tf.Config.from_original(STUDENT | told, shapes_of(STUDENT), 1, by_name)


def test_a_quantised_model_and_another_one_are_refused() -> None:
    shapes = shapes_of(STUDENT) | {"bert/encoder/MobileBertActFakeQuantWithMinMaxVars/min": ()}
    with pytest.raises(ValueError, match="expected a model that computes in floating point"):
        tf.Config.from_original(STUDENT | {"hidden_act": "relu6"}, shapes, 1, {})
    with pytest.raises(ValueError, match="expected the variables of a MobileBERT"):
        tf.Config.from_original(STUDENT, {"model.embed_tokens.weight": (3, 4)}, 1, {})
    with pytest.raises(
        ValueError, match="`num_attention_heads` in the config or given by name.*`hidden_act`"
    ):
        tf.Config.from_original({}, shapes_of(STUDENT), 1, {})


def test_config_json_means_what_the_class_takes_for_absent_keys() -> None:
    transformers = pytest.importorskip("transformers")
    default = transformers.MobileBertConfig().to_dict()
    assert {name: default[name] for name in hf.ABSENT} == hf.ABSENT
    c = hf.Config.from_hf({"num_hidden_layers": 24, "num_attention_heads": 4})
    assert (c.pooled, c.trigram, c.into_attention, c.n_networks, c.inner_eps) == (
        True,
        True,
        "shared",
        4,
        1e-5,
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"normalization_type": "manual_layer_norm"}, "expected `normalization_type` no_norm"),
        ({"hidden_act": "mish"}, "expected `hidden_act` to be one of relu6, tanh, linear"),
        ({"embedding_size": D + 1}, f"expected `embedding_size` of at most {D}"),
        ({"key_query_shared_bottleneck": False}, "the class builds no other attention"),
    ],
)
def test_a_config_json_that_is_no_model_of_the_class_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.Config.from_hf(STUDENT | told)


def test_the_teacher_which_the_class_cannot_be_is_read_in_its_own_layout() -> None:
    """Queries and keys of hidden_size channels: transformers builds them for intra_bottleneck_size."""
    told = STUDENT | {"key_query_shared_bottleneck": False, "intra_bottleneck_size": 36}
    state = variables(told)
    c = original(state, told)
    assert (c.bottleneck, c.shared, c.narrow) == (True, False, False)
    ids, types, mask = batch()
    assert tf.forward(ids, [state], c, token_types=types, mask=mask).shape == (2, T, V)
    model = judge_config(told)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(ids)


def judge_config(told: Mapping[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.MobileBertModel(transformers.MobileBertConfig(**told))


# --- phases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("ForPreTraining", ["head", "seq_relationship_logits"]),
        ("ForMaskedLM", ["head"]),
        ("ForNextSentencePrediction", ["head", "seq_relationship_logits"]),
        ("ForSequenceClassification", ["head", "logits"]),
        ("ForQuestionAnswering", ["head", "start_logits", "end_logits"]),
        ("Model", ["head", "pooler_output"]),
    ],
)
def test_both_readings_have_the_heads_that_the_tensors_have(name: str, heads: list[str]) -> None:
    own = {"ForSequenceClassification": ("", 3), "ForQuestionAnswering": ("cls/squad/", 2)}.get(name)
    lm = name in ("ForPreTraining", "ForMaskedLM")
    order = name in ("ForPreTraining", "ForNextSentencePrediction")
    full = variables(STUDENT, {} if own is None else {own[0]: (own[1], D)})
    state = {
        n: x
        for n, x in full.items()
        if (lm or not n.startswith("cls/predictions/")) and (order or not n.startswith("cls/seq_"))
    }
    theirs = converted(state, "qa_outputs" if name == "ForQuestionAnswering" else "classifier")
    if name == "Model":
        theirs = {n.removeprefix("mobilebert."): x for n, x in theirs.items()}
    ids, types, mask = batch()
    inputs = {"token_types": types, "mask": mask}
    ours = tf.phases([state], original(state, STUDENT), inputs)
    found = hf.phases(
        [theirs], hf.Config.from_hf({**STUDENT, "architectures": [f"MobileBert{name}"]}), inputs
    )
    assert [p.name for p in ours] == [p.name for p in found]
    assert [p.name for p in ours if p.kind == "head"] == heads
    x: Any = ids
    for one, other in zip(ours, found, strict=True):
        y = one.run(x)
        assert largest(other.run(x), y) <= 1e-12
        x = x if one.kind == "head" else y
