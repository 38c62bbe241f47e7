"""The readings of LUKE: the golden toy, every head and loss against transformers, and what entities mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ckpt_tool.fixtures.families.mluke import shapes as named_shapes
from ckpt_tool.fixtures.shapes import shape_of, spread
from ckpt_tool.reference import hf_luke, losses, mluke

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
SIZES = {"v": 14, "u": 6, "d": 8, "m": 4, "i": 2, "f": 12, "p": 12, "t": 1}
ROWS = {mluke.WORDS: [5, 6], mluke.ENTITIES: [2]}
TOLD = {"num_attention_heads": 2, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1}


def original_state(aware: bool = False, sizes: dict[str, int] = SIZES) -> State:
    """Tensor k in the order of names: float32(0.3 sin(0.1 (e + 1)^2 + k)), one more for the weights of
    norms."""
    rows = spread(named_shapes(aware, sizes["m"] != sizes["d"]), sizes)
    shapes = {name: shape_of(words, sizes)[0] for name, words, _ in rows}
    made = {}
    for k, name in enumerate(sorted(shapes), 1):
        e = np.arange(1, np.prod(shapes[name]) + 1, dtype=np.float64)
        norm = name.endswith("LayerNorm.weight") or name.endswith("layer_norm.weight")
        values = 0.3 * np.sin(0.1 * e**2 + k) + norm
        made[name] = torch.from_numpy(values.astype(np.float32).reshape(shapes[name]))
    return made


def converted_state(state: State) -> State:
    """By hand: names with `luke.`, rows 14 and 15 those of 5 and 6, entity 6 that of 2."""
    made = {}
    for name, x in state.items():
        if name in (mluke.WORDS, "lm_head.bias"):
            x = torch.cat([x, x[[5, 6]]])
        if name in (mluke.ENTITIES, "entity_predictions.bias"):
            x = torch.cat([x, x[[2]]])
        head = name.startswith(("lm_head", "entity_predictions"))
        made[name if head else f"luke.{name}"] = x
    return made


IDS = torch.tensor([[0, 7, 8, 9, 10, 2], [0, 11, 12, 2, 1, 1]])
MASK = (IDS != 1).long()
ENTITIES = torch.tensor([[3, 2], [4, 0]])
ENTITY_MASK = torch.tensor([[1, 1], [1, 0]])
POSITIONS = torch.tensor([[[1, 2, -1], [3, -1, -1]], [[1, 2, -1], [-1, -1, -1]]])
GIVEN = {
    "mask": MASK,
    "entity_ids": ENTITIES,
    "entity_mask": ENTITY_MASK,
    "entity_positions": POSITIONS,
}


def original_config(state: State, **more: Any) -> mluke.Config:
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    return mluke.Config.from_original({"model_config": TOLD}, shapes, 1, {"copied_rows": ROWS, **more})


def converted_config(aware: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LukeForMaskedLM"],
        "num_hidden_layers": 2,
        **TOLD,
        "hidden_size": 8,
        "intermediate_size": 12,
        "entity_emb_size": 4,
        "vocab_size": 16,
        "entity_vocab_size": 7,
        "max_position_embeddings": 12,
        "type_vocab_size": 1,
        "use_entity_aware_attention": aware,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **more,
    }


# --- the golden toy -------------------------------------------------------------------------------------

GOLDEN = {
    "words": ([0, 0], [0.00949, -0.68842, 0.48710, -0.05765]),
    "entities": ([0, 0], [-0.23970, -0.22504, -0.14784, 0.64166]),
    "word logits": ([0, 1], [0.28985, -1.02917, -0.34185, 0.25557]),
    "word logits of the padded row": ([1, 1], [0.69354, -0.86195, -0.59832, 0.63883]),
    "entity logits": ([0, 1], [0.02078, 0.02286, 0.34906, -0.17143, -0.55520, 0.52491]),
    "entity logits of the padded row": ([1, 0], [-0.01902, 0.28401, 0.64624, -0.20480, -0.51490, 0.69566]),
    "pooled": ([0], [0.49821, 0.16667, 0.41102, -0.00316]),
}


def results(side: str) -> dict[str, Tensor]:
    state = original_state()
    if side == "original":
        module, ranks, c = mluke, [state], original_config(state)
    else:
        module, ranks, c = hf_luke, [converted_state(state)], hf_luke.Config.from_hf(converted_config())  # type: ignore[assignment]
    x = module.encode(IDS, ranks, c, **GIVEN)
    words, pooled, entities = module.HEADS["base_model"](x, ranks, c)
    logits, entity_logits = module.HEADS["masked_lm"](x, ranks, c)
    return {"words": words, "pooled": pooled, "entities": entities, "word logits": logits,
            "entity logits": entity_logits}  # fmt: skip


@pytest.mark.parametrize("side", ["original", "converted"])
def test_the_golden_toy_has_its_documented_values(side: str) -> None:
    found = results(side)
    for what, (place, values) in GOLDEN.items():
        row = found[what.removesuffix(" of the padded row")][tuple(place)][: len(values)]
        assert torch.allclose(row, torch.tensor(values), atol=1e-5, rtol=0), what
    logits, entities = found["word logits"], found["entity logits"]
    assert logits.shape == (2, 6, 16) and entities.shape == (2, 2, 7)
    assert abs(float(logits[0, :, :14].sum()) - 2.6888) < 1e-3
    assert torch.allclose(logits[..., 14:], logits[..., 5:7], atol=1e-6)
    assert torch.allclose(entities[..., 6], entities[..., 2], atol=1e-6)


def test_added_words_and_the_second_mask_are_read_as_what_they_are_copies_of() -> None:
    state = original_state()
    c = original_config(state)
    added = IDS.masked_fill(IDS == 8, 14).masked_fill(IDS == 9, 15)
    plain = IDS.masked_fill(IDS == 8, 5).masked_fill(IDS == 9, 6)
    second = {**GIVEN, "entity_ids": ENTITIES.masked_fill(ENTITIES == 2, 6)}
    one, other = mluke.encode(added, [state], c, **second), mluke.encode(plain, [state], c, **GIVEN)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_reading_without_copies_has_the_logits_of_the_original_alone() -> None:
    state = original_state()
    c = original_config(state, copied_rows={})
    assert mluke.forward(IDS, [state], c, mask=MASK).shape == (2, 6, 14)


def test_words_are_shifted_and_entities_are_not() -> None:
    """An entity's position is the index of its token; a word's begins after that of padding."""
    state = original_state()
    c = original_config(state)
    before = mluke.encode(IDS, [state], c, **GIVEN)
    for name, stream in (("embeddings", 0), ("entity_embeddings", 1)):
        table = f"{name}.position_embeddings.weight"
        moved = {**state, table: state[table].clone()}
        moved[table][0] += 1  # no word has it; no entity here either
        assert torch.equal(mluke.encode(IDS, [moved], c, **GIVEN)[stream], before[stream])
    first = POSITIONS.clone()
    first[0, 1] = torch.tensor([0, -1, -1])
    assert not torch.equal(
        mluke.encode(IDS, [state], c, **{**GIVEN, "entity_positions": first})[1], before[1]
    )


@pytest.mark.parametrize("module", [mluke, hf_luke])
def test_entities_without_positions_and_heads_without_entities_are_refused(module: Any) -> None:
    state = original_state()
    ranks = [state if module is mluke else converted_state(state)]
    c = original_config(state) if module is mluke else hf_luke.Config.from_hf(converted_config())
    with pytest.raises(ValueError, match="position"):
        module.encode(IDS, ranks, c, entity_ids=ENTITIES)
    x = module.encode(IDS, ranks, c, mask=MASK)
    with pytest.raises(ValueError, match="found none"):
        module.HEADS["entity_classification"](x, ranks, c)
    with pytest.raises(TypeError, match="expected no inputs"):
        module.encode(IDS, ranks, c, spans=ENTITIES)


@pytest.mark.parametrize("name", ["num_attention_heads", "layer_norm_eps", "hidden_act"])
def test_numbers_that_nothing_says_are_asked_for(name: str) -> None:
    state = original_state()
    shapes = {n: tuple(x.shape) for n, x in state.items()}
    told = {k: v for k, v in TOLD.items() if k != name}
    with pytest.raises(ValueError, match=name):
        mluke.Config.from_original({"model_config": told}, shapes)


def test_the_longest_text_is_shorter_than_the_table_of_positions() -> None:
    state = original_state()
    c = original_config(state)
    hf = hf_luke.Config.from_hf(converted_config())
    assert (mluke.fits(100, c), hf_luke.fits(100, hf)) == (10, 10) and mluke.fits(3, c) == 3
    ids = torch.full((1, 10), 7)
    assert mluke.forward(ids, [state], c).shape == (1, 10, 16)
    with pytest.raises(IndexError):
        mluke.forward(torch.full((1, 11), 7), [state], c)


# --- against transformers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A head of transformers: its class, the shape of its own tensors, labels, our loss."""

    architecture: str
    name: str
    outputs: tuple[str, ...]
    own: tuple[tuple[str, tuple[int, ...]], ...] = ()
    labels: Callable[[], State] = dict
    loss: Callable[..., Tensor] | None = None
    config: tuple[tuple[str, Any], ...] = ()
    choices: bool = False


def classifier(width: int, labels: int = 3, bias: bool = True) -> tuple[tuple[str, tuple[int, ...]], ...]:
    weight = ("classifier.weight", (labels, width))
    return (weight, ("classifier.bias", (labels,))) if bias else (weight,)


WORD_LABELS = torch.tensor([[-100, 3, 15, -100, 0, -100], [14, -100, 2, -100, -100, -100]])
ENTITY_LABELS = torch.tensor([[6, -100], [1, -100]])
TRUTH = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
REAL = torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.4, -0.7]])
SPAN_TRUTH = torch.tensor([[[1.0, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]])
START, END = torch.tensor([[1, 3], [1, 0]]), torch.tensor([[2, 3], [2, 0]])


def entity_head(architecture: str, name: str, width: int, labels: Tensor, bias: bool = True) -> Head:
    return Head(
        architecture, name, ("logits",), classifier(width, bias=bias), lambda: {"labels": labels},
        losses.of_entities, (("num_labels", 3),),
    )  # fmt: skip


def sequence(labels: Tensor, problem: str, count: int = 3) -> Head:
    return Head(
        "LukeForSequenceClassification", "sequence_classification", ("logits",), classifier(8, count),
        lambda: {"labels": labels},
        lambda logits, labels: losses.classification(logits, labels, problem),
        (("num_labels", count), ("problem_type", problem)),
    )  # fmt: skip


QA = (("qa_outputs.weight", (2, 8)), ("qa_outputs.bias", (2,)))
HEADS = {
    "base": Head(
        "LukeModel", "base_model", ("last_hidden_state", "pooler_output", "entity_last_hidden_state")
    ),
    "masked-lm": Head(
        "LukeForMaskedLM", "masked_lm", ("logits", "entity_logits"),
        labels=lambda: {"labels": WORD_LABELS, "entity_labels": ENTITY_LABELS},
        loss=losses.words_and_entities,
    ),
    "entity": entity_head("LukeForEntityClassification", "entity_classification", 8, torch.tensor([2, 0])),
    "entity-multi": entity_head("LukeForEntityClassification", "entity_classification", 8, TRUTH),
    "pair": entity_head(
        "LukeForEntityPairClassification", "entity_pair_classification", 16, torch.tensor([1, 2]), bias=False
    ),
    "pair-multi": entity_head(
        "LukeForEntityPairClassification", "entity_pair_classification", 16, TRUTH, bias=False
    ),
    "spans": entity_head(
        "LukeForEntitySpanClassification", "entity_span_classification", 24, torch.tensor([[2, 0], [1, -100]])
    ),
    "spans-multi": entity_head(
        "LukeForEntitySpanClassification", "entity_span_classification", 24, SPAN_TRUTH
    ),
    "sequence": sequence(torch.tensor([2, 0]), "single_label_classification"),
    "sequence-multi": sequence(TRUTH, "multi_label_classification"),
    "regression": sequence(REAL, "regression"),
    "regression-one": sequence(REAL[:, 0], "regression", 1),
    "tokens": Head(
        "LukeForTokenClassification", "token_classification", ("logits",), classifier(8),
        lambda: {"labels": WORD_LABELS.clamp(max=2)}, losses.labelled, (("num_labels", 3),),
    ),
    "answer": Head(
        "LukeForQuestionAnswering", "question_answering", ("start_logits", "end_logits"), QA,
        lambda: {"start_positions": torch.tensor([1, 25]), "end_positions": torch.tensor([4, 2])},
        lambda s, e, start_positions, end_positions: losses.span(s, e, start_positions, end_positions),
    ),
    "choice": Head(
        "LukeForMultipleChoice", "multiple_choice", ("logits",), classifier(8, 1),
        lambda: {"labels": torch.tensor([1])}, losses.labelled, choices=True,
    ),
}  # fmt: skip


def of_head(head: Head) -> State:
    seed = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=seed) * 0.3 for name, shape in head.own}


def theirs(head: Head, state: State, aware: bool) -> dict[str, Tensor]:
    """What transformers gives, outputs and loss, on the same tensors."""
    import transformers

    config = converted_config(aware, architectures=[head.architecture], **dict(head.config))
    model = getattr(transformers, head.architecture)(transformers.LukeConfig(**config)).eval()
    held = {**state, **of_head(head)}
    held |= {
        "lm_head.decoder.weight": state["luke." + mluke.WORDS],
        "lm_head.decoder.bias": state["lm_head.bias"],
        "entity_predictions.decoder.weight": state["luke." + mluke.ENTITIES],
    }
    if head.architecture == "LukeModel":
        held = {n.removeprefix("luke."): x for n, x in held.items()}
    own = set(model.state_dict())
    model.load_state_dict({n: x for n, x in held.items() if n in own})
    names = {
        "mask": "attention_mask",
        "entity_mask": "entity_attention_mask",
        "entity_positions": "entity_position_ids",
    }
    given = {names.get(n, n): x for n, x in GIVEN.items()}
    if head.name == "entity_span_classification":
        given |= {"entity_start_positions": START, "entity_end_positions": END}
    given |= {"input_ids": IDS}
    if head.choices:
        given = {n: x[None] for n, x in given.items()}
    with torch.no_grad():
        out = model(**given, **{n: x.clone() for n, x in head.labels().items()})
    return {n: out[n] for n in head.outputs} | ({"loss": out["loss"]} if head.loss else {})


def ours(module: Any, head: Head, state: State, c: Any) -> dict[str, Tensor]:
    ranks = [{**state, **of_head(head)}]
    ids, given = (IDS[None], {n: x[None] for n, x in GIVEN.items()}) if head.choices else (IDS, GIVEN)
    more = {"start": START, "end": END} if head.name == "entity_span_classification" else {}
    found = module.HEADS[head.name](module.encode(ids, ranks, c, **given), ranks, c, **more)
    outputs = found if isinstance(found, tuple) else (found,)
    made = dict(zip(head.outputs, outputs, strict=True))
    return made | ({"loss": head.loss(*outputs, **head.labels())} if head.loss else {})


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "aware"])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_and_its_loss_is_that_of_transformers(name: str, aware: bool) -> None:
    head, state = HEADS[name], original_state(aware)
    converted = converted_state(state)
    wanted = theirs(head, converted, aware)
    c = hf_luke.Config.from_hf(converted_config(aware, **dict(head.config)))
    real = {"entity_logits": ENTITY_MASK.bool(), "entity_last_hidden_state": ENTITY_MASK.bool()}
    for module, held, config in ((hf_luke, converted, c), (mluke, state, original_config(state))):
        found = ours(module, head, held, config)
        assert found.keys() == wanted.keys()
        for what, x in wanted.items():
            seen = real.get(what, MASK.bool() if x.shape[:2] == MASK.shape and what != "loss" else ...)
            assert found[what].shape == x.shape
            assert float((found[what][seen] - x[seen]).abs().max()) <= 1e-5, (module.__name__, what)


def test_every_class_of_the_library_has_a_head() -> None:
    assert {h.architecture for h in HEADS.values()} == set(hf_luke.ARCHITECTURES)
    assert {h.name for h in HEADS.values()} == hf_luke.HEADS.keys() == mluke.HEADS.keys()


def test_aware_attention_asks_with_another_query_for_each_pair_of_streams() -> None:
    """Each of the three queries moves the stream that asks with it, in the first layer, and no other."""
    state = original_state(aware=True)
    c = original_config(state)
    x = mluke.embed(IDS, [state], c, entity_ids=ENTITIES, entity_positions=POSITIONS)
    before = mluke.layer(x, 0, [state], c, MASK, ENTITY_MASK)
    for name, moves in (
        ("w2e_query", (True, False)),
        ("e2w_query", (False, True)),
        ("e2e_query", (False, True)),
    ):
        key = f"encoder.layer.0.attention.self.{name}.weight"
        after = mluke.layer(x, 0, [{**state, key: state[key] * 2}], c, MASK, ENTITY_MASK)
        assert tuple(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) == moves, name


# --- typical mistakes -----------------------------------------------------------------------------------


def test_the_architectures_own_mistakes_move_its_results_and_are_taken_back() -> None:
    state = converted_state(original_state())
    c = hf_luke.Config.from_hf(converted_config())
    found = hf_luke.mistakes(tuple(state), c)
    assert len(found) >= 5
    before = torch.cat(
        [
            x.flatten()
            for x in hf_luke.HEADS["masked_lm"](hf_luke.encode(IDS, [state], c, **GIVEN), [state], c)
        ]
    )
    for name, how in found.items():
        plant, undo = how if isinstance(how, tuple) else (how, how)
        wrong = {**state, **plant(state)}
        x = hf_luke.encode(IDS, [wrong], c, **GIVEN)
        after = torch.cat([y.flatten() for y in hf_luke.HEADS["masked_lm"](x, [wrong], c)])
        assert float((before - after).abs().max()) > 1e-4, name
        right = {**wrong, **undo(wrong)}
        assert all(torch.equal(right[n], state[n]) for n in state), name


def test_mistakes_are_of_the_phase_whose_tensors_are_there() -> None:
    c = hf_luke.Config.from_hf(converted_config())
    assert hf_luke.mistakes((), c) == {} == hf_luke.mistakes(("luke.pooler.dense.weight",), c)
    assert hf_luke.config_mistakes({"layer_norm_eps": 1e-12}) == {}
    assert hf_luke.config_mistakes({"layer_norm_eps": 1e-5})
