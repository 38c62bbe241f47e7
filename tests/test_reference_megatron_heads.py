"""Every head of Megatron's BERT and GPT-2, and its loss, is that of transformers on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import loss as loss_of_ids
from ckpt_tool.reference import losses
from tests.megatron_models import WORDS, State, T, args, batch, hf_config, hf_state, ours, tensors, theirs

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Head:
    """A head of transformers: its class, labels for its forward, our loss from the output of our head."""

    architecture: str
    name: str
    outputs: tuple[str, ...]
    labels: Callable[[], dict[str, Tensor]] = dict
    loss: Callable[..., Tensor] | None = None
    tensors: tuple[str, str] | None = None  # name in the layout, name in `tensors`
    config: tuple[tuple[str, Any], ...] = ()


def token_labels(choices: int) -> Tensor:
    seed = torch.Generator().manual_seed(8)
    labels = torch.randint(choices, (2, T), generator=seed)
    labels[torch.rand(2, T, generator=seed) < 0.3] = -100
    return labels.masked_fill(batch()[2] == 0, -100)


LM_LABELS, TRUTH = token_labels(WORDS), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
REAL = torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.4, -0.7]])
ONE_EACH, CLASSIFIER = torch.tensor([2, 0]), ("classifier", "classifier")
POSITIONS = {"start_positions": torch.tensor([3, 25]), "end_positions": torch.tensor([6, 9])}


def classes(labels: Tensor, problem: str | None = None, **config: Any) -> Head:
    return Head(
        "MegatronBertForSequenceClassification",
        "sequence_classification",
        ("logits",),
        lambda: {"labels": labels.clone()},
        lambda logits, labels: losses.classification(logits, labels, problem),
        CLASSIFIER if config.get("num_labels", 3) == 3 else ("classifier", "choice"),
        tuple(({"num_labels": 3, "problem_type": problem} | config).items()),
    )


HEADS = {
    "base": Head("MegatronBertModel", "base_model", ("last_hidden_state", "pooler_output")),
    "masked-lm": Head(
        "MegatronBertForMaskedLM", "masked_lm", ("logits",), lambda: {"labels": LM_LABELS}, losses.labelled
    ),
    "causal-lm": Head(
        "MegatronBertForCausalLM",
        "causal_lm",
        ("logits",),
        lambda: {"labels": LM_LABELS},
        losses.next_token,
        config=(("is_decoder", True),),
    ),
    "next-sentence": Head(
        "MegatronBertForNextSentencePrediction",
        "next_sentence_prediction",
        ("logits",),
        lambda: {"labels": torch.tensor([1, 0])},
        losses.labelled,
    ),
    "pretraining": Head(
        "MegatronBertForPreTraining",
        "pretraining",
        ("prediction_logits", "seq_relationship_logits"),
        lambda: {"labels": LM_LABELS, "next_sentence_label": torch.tensor([1, 0])},
        lambda lm, order, labels, next_sentence_label: losses.pretraining(
            lm, order, labels, next_sentence_label
        ),
    ),
    "classes": classes(ONE_EACH),
    "classes-told": classes(ONE_EACH, "single_label_classification"),
    "several-classes": classes(TRUTH),
    "several-classes-told": classes(TRUTH, "multi_label_classification"),
    "regression": classes(torch.tensor([0.7, -0.4]), num_labels=1),
    "regression-of-three": classes(REAL, "regression"),
    "multiple-choice": Head(
        "MegatronBertForMultipleChoice",
        "multiple_choice",
        ("logits",),
        lambda: {"labels": torch.tensor([1, 2])},
        losses.labelled,
        ("classifier", "choice"),
    ),
    "token-classes": Head(
        "MegatronBertForTokenClassification",
        "token_classification",
        ("logits",),
        lambda: {"labels": token_labels(3)},
        losses.labelled,
        CLASSIFIER,
        (("num_labels", 3),),
    ),
    "question": Head(
        "MegatronBertForQuestionAnswering",
        "question_answering",
        ("start_logits", "end_logits"),
        lambda: POSITIONS,
        lambda start, end, start_positions, end_positions: losses.span(
            start, end, start_positions, end_positions
        ),
        ("qa_outputs", "qa"),
    ),
}


def inputs(head: Head) -> dict[str, Tensor]:
    ids, types, mask = batch()
    if head.name == "question_answering":  # its softmax is over padding too, where the two layouts differ
        mask = torch.ones_like(mask)
    if head.name == "multiple_choice":  # three choices, each a rotation of the text

        def choices(t: Tensor) -> Tensor:
            return torch.stack([t, t.roll(1, -1), t.roll(2, -1)], dim=1)

        mask = mask[:, None].repeat(1, 3, 1)
        ids, types = choices(ids) * mask, choices(types) * mask
    return {"ids": ids, "token_types": types, "mask": mask}


def judge(head: Head, dtype: torch.dtype) -> tuple[Any, State]:
    """The class of transformers with our tensors, and the tensors of the head."""
    transformers = pytest.importorskip("transformers")
    full = tensors()
    own = (
        {}
        if head.tensors is None
        else {f"{head.tensors[0]}.{kind}": full[f"{head.tensors[1]}.{kind}"] for kind in ("weight", "bias")}
    )
    settings = hf_config("megatron-bert", **dict(head.config))
    del settings["model_type"], settings["architectures"]
    config = transformers.MegatronBertConfig(**settings, attn_implementation="eager")
    model = getattr(transformers, head.architecture)(config).to(dtype).eval()
    state = hf_state(full, "megatron-bert") | own
    if head.architecture == "MegatronBertModel":
        state = {n.removeprefix("bert."): t for n, t in state.items()}
    wanted = set(model.state_dict())
    result = model.load_state_dict({n: t.to(dtype) for n, t in state.items() if n in wanted}, strict=False)
    assert set(result.missing_keys) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    return model, own


def run_judge(model: Any, head: Head, dtype: torch.dtype) -> Any:
    given = inputs(head)
    labels = {name: t.to(dtype) if t.is_floating_point() else t.clone() for name, t in head.labels().items()}
    with torch.no_grad():
        return model(
            input_ids=given["ids"],
            token_type_ids=given["token_types"],
            attention_mask=given["mask"],
            **labels,
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_and_its_loss_are_those_of_transformers(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    """Of three of our passes: the Hugging Face layout, the original whole and on two ranks. Measured: at most
    3e-6 in float32, 6e-15 in float64."""
    head = HEADS[name]
    model, own = judge(head, dtype)
    wanted = run_judge(model, head, dtype)
    given = inputs(head)
    told: dict[str, Any] = {"is_decoder": True} if dict(head.config).get("is_decoder") else {}
    bare = head.architecture == "MegatronBertModel"
    state = hf_state(tensors(), "megatron-bert") | own
    if bare:
        state = {n.removeprefix("bert."): t for n, t in state.items()}
    readings = [
        theirs("megatron-bert", state=state, dtype=dtype, architectures=[head.architecture], **told),
        ours("megatron-bert", None, "transformer", dtype=dtype, overrides=told, more=own),
        ours("megatron-bert", 3.0, "core-fused", 2, dtype=dtype, overrides=told, more=own),
    ]
    for r in readings:
        y = r.module.encode(given["ids"], r.ranks, r.c, token_types=given["token_types"], mask=given["mask"])
        out = r.module.HEADS[head.name](y, r.ranks, r.c)
        outputs = out if isinstance(out, tuple) else (out,)
        for output, field in zip(outputs, head.outputs, strict=True):
            expected = wanted[field]
            assert output.shape == expected.shape and output.dtype == dtype
            kept = given["mask"].bool() if expected.shape[:2] == (2, T) else ...  # real positions only
            assert (output[kept] - expected[kept]).abs().max() <= bound
        if head.loss is not None:
            labels = {n: t.to(dtype) if t.is_floating_point() else t for n, t in head.labels().items()}
            loss_bound = max(bound, 1e-6) if head.name == "causal_lm" else bound  # that loss is in float32
            assert abs(head.loss(*outputs, **labels) - wanted.loss) <= loss_bound


def gpt2_judge(dtype: torch.dtype, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = hf_config("megatron-gpt2", **config)
    del settings["model_type"], settings["architectures"]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, attn_implementation="eager"))
    state = {n: t.to(dtype) for n, t in hf_state(tensors(), "megatron-gpt2", model.config.vocab_size).items()}
    result = model.to(dtype).eval().load_state_dict(state, strict=False)
    assert result.missing_keys == ["lm_head.weight"] and not result.unexpected_keys
    return model


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("gelu", ["gelu", "gelu_new", "gelu_fast"])
def test_gpt2_and_its_loss_are_those_of_transformers(gelu: str, dtype: torch.dtype, bound: float) -> None:
    """Measured: at most 2e-6 in float32, 4e-12 in float64 (the constant of gelu_fast has ten digits)."""
    model = gpt2_judge(dtype, activation_function=gelu, vocab_size=WORDS)
    ids, _, _ = batch()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :4] = 0  # on the left, as for generation
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # the token after the padding is foretold by padding, where the two layouts may differ
    labels = ids.masked_fill(mask * mask.roll(1, -1) == 0, -100)
    with torch.no_grad():
        plain = model(ids, labels=ids)
        padded = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    params = args(openai_gelu=gelu == "gelu_new", bias_gelu_fusion=gelu == "gelu_fast")
    told, loss_bound = {"vocab_size": WORDS}, max(bound, 1e-6)  # transformers has the loss in float32
    cut = hf_state(tensors(), "megatron-gpt2", WORDS)
    for r in (
        theirs("megatron-gpt2", state=cut, dtype=dtype, activation_function=gelu),
        ours("megatron-gpt2", None, "transformer", 2, dtype=dtype, params=params, overrides=told),
        ours("megatron-gpt2", 3.0, "encoder", dtype=dtype, params=params, overrides=told),
    ):
        logits = r.logits(ids)
        assert (logits - plain.logits).abs().max() <= bound
        assert abs(loss_of_ids(logits, ids) - plain.loss) <= loss_bound
        assert abs(losses.next_token(logits, ids) - plain.loss) <= loss_bound
        logits = r.logits(ids, mask=mask, positions=positions)
        assert (logits - padded.logits)[mask.bool()].abs().max() <= bound
        assert abs(losses.next_token(logits, labels) - padded.loss) <= loss_bound


def test_unknown_problems_have_no_loss() -> None:
    with pytest.raises(ValueError, match="expected problem to be one of regression, .* found `ranking`"):
        losses.classification(torch.zeros(2, 3), torch.zeros(2, 3), "ranking")
