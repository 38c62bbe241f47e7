"""Mistakes in MobileBERT: those of converters that its reading names are seen and taken back, and one in a
function of either reading is caught by the other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import hf_mobilebert as hf
from ckpt_tool.reference import mobilebert as tf
from ckpt_tool.reference.phases import outputs
from tests.mobilebert_models import (
    KINDS,
    STUDENT,
    D,
    E,
    V,
    batch,
    converted,
    judge,
    largest,
    original,
    variables,
)
from tests.test_house_reference import plant

pytestmark = pytest.mark.usefixtures("one_thread")


# --- mistakes ---------------------------------------------------------------------------------------------


def logits(module: Any, c: Any, state: Mapping[str, Tensor]) -> Tensor:
    ids, types, mask = batch()
    found: Tensor = module.forward(ids, [state], c, token_types=types, mask=mask)
    return found[mask.bool()].double()


def nmse(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).square().mean() / expected.var())


def test_a_mistake_is_seen_and_taken_back() -> None:
    """Of those that the reading says itself, each on the tensors of one layer, of all and of the rest."""
    full, c = converted(variables(STUDENT)), hf.Config.from_hf(STUDENT)
    right = logits(hf, c, full)
    known = hf.mistakes(full, c)
    assert len(known) == 6
    for part in ({n: x for n, x in full.items() if ".layer.1." in n}, full):
        for words, how in hf.mistakes(part, c).items():
            plant, undo = how if isinstance(how, tuple) else (how, how)
            wrong = {**full, **plant(full)}
            assert nmse(right, logits(hf, c, wrong)) > 1e-6, words
            back = {**wrong, **undo(wrong)}
            assert all(torch.equal(back[n], x) for n, x in full.items()), words
    touched = {n for how in known.values() for n in (how[0] if isinstance(how, tuple) else how)(full)}
    assert {n.split(".layer.0.")[-1] for n in touched if ".layer.0." in n} > {"attention.self.query.bias"}
    assert hf.mistakes((), c) == {}


def test_values_of_config_json_that_fit_other_models_are_seen() -> None:
    full, right = converted(variables(STUDENT)), hf.Config.from_hf(STUDENT)
    known = hf.config_mistakes(STUDENT | {"intra_bottleneck_size": 24})
    assert {key for values in known.values() for key in values} == {
        "normalization_type", "num_attention_heads", "num_feedforward_networks", "hidden_act",
    }  # fmt: skip
    for words, values in hf.config_mistakes(STUDENT).items():
        wrong = hf.Config.from_hf(STUDENT | values)
        assert nmse(logits(hf, right, full), logits(hf, wrong, full)) > 1e-6, words


# --- mutants ----------------------------------------------------------------------------------------------

Edit = tuple[str, str, str]  # function by module and name, text, other text
FINE_TUNED = {"": (3, D), "cls/squad/": (2, D)}
# The same mistake on each side of a kind of model.
MUTANTS: dict[str, tuple[str, Edit, Edit]] = {
    "dense, linear: bias forgotten": (
        "student",
        ("mobilebert.dense", ' + w[stem + "bias"]', ""),
        ("hf_blocks.linear", "if bias else None", 'if "seq" in stem else None'),
    ),
    "activate, bent: cut off at another place": (
        "layer norms",
        ("mobilebert.activate", "x.clamp(0, 6)", "x.clamp(0, 1)"),
        ("hf_mobilebert.bent", "else known(x)", "else x.clamp(0, 1)"),
    ),
    "norm: not shifted": (
        "student",
        ("mobilebert.norm", ' + w[stem + "FakeLayerNorm/beta"]', ""),
        ("hf_mobilebert.norm", ' + w[stem + "bias"]', ""),
    ),
    "norm: the mean taken away": (
        "student",
        ("mobilebert.norm", "return x *", "return (x - x.mean(-1, keepdim=True)) *"),
        ("hf_mobilebert.norm", "return x *", "return (x - x.mean(-1, keepdim=True)) *"),
    ),
    "embed: the word before comes first": (
        "student",
        ("mobilebert.embed", "around[:, 2:], x, around[:, :-2]", "around[:, :-2], x, around[:, 2:]"),
        ("hf_mobilebert.embedded", "(following, x, before)", "(before, x, following)"),
    ),
    "embed: one segment": (
        "student",
        ("mobilebert.embed", "w[TYPES][types]", "w[TYPES][0]"),
        ("hf_mobilebert.embedded", "token_types is None", "True"),
    ),
    "embed: positions a row late": (
        "student",
        ("mobilebert.embed", "[: ids.shape[1]]", "[1 : ids.shape[1] + 1]"),
        ("hf_mobilebert.embedded", "F.embedding(positions,", "F.embedding(positions + 1,"),
    ),
    "embed: not normalised": (
        "student",
        ("mobilebert.embed", "return norm(", "return (lambda x, *_: x)("),
        ("hf_mobilebert.embed", "return norm(", "return (lambda x, *_: x)("),
    ),
    "layer: values from the bottleneck": (
        "attention as wide as the model",
        ("mobilebert.layer", "y if c.narrow else x", "y"),
        ("hf_mobilebert.networks", "qk, v = x, x", "qk, v = residual, residual"),
    ),
    "layer: queries and keys from the other bottleneck": (
        "student",
        ("mobilebert.layer", 'narrowed("attention")', 'narrowed("input")'),
        ("hf_mobilebert.networks", '"bottleneck.attention."', '"bottleneck.input."'),
    ),
    "layer: one network fewer": (
        "student",
        ("mobilebert.layer", "range(c.n_units - 1)", "range(c.n_units - 2)"),
        ("hf_mobilebert.networks", "range(c.n_networks - 1)", "range(c.n_networks - 2)"),
    ),
    "layer: nothing beside the last network": (
        "tiny",
        ("mobilebert.layer", '"output/dense/") + y', '"output/dense/") + (0 if stem == p else y)'),
        ("hf_mobilebert.layer", "norm(added + y", "norm(added"),
    ),
    "layer: nothing beside the way out": (
        "student",
        ("mobilebert.layer", '"dense/") + x', '"dense/")'),
        ("hf_mobilebert.way_out", " + x", ""),
    ),
    "layer: a bottleneck not normalised": (
        "student",
        ("mobilebert.layer", "return norm(dense(x", "return (lambda x, *_: x)(dense(x"),
        ("hf_mobilebert.bottleneck", "return norm(", "return (lambda x, *_: x)("),
    ),
    "attention: scores not scaled": (
        "student",
        ("mobilebert.attention", " / q.shape[-1] ** 0.5", ""),
        ("hf_mobilebert.self_attention", " * query.shape[-1] ** -0.5", ""),
    ),
    "attention: queries and keys exchanged": (
        "student",
        ("mobilebert.attention", "products(q, k)", "products(k, q)"),
        ("hf_mobilebert.self_attention", "query @ key.transpose", "key @ query.transpose"),
    ),
    "attention: padding is seen": (
        "student",
        ("mobilebert.attention", "mask is not None", "False"),
        ("hf_blocks.unseen", "mask is None", "True"),
    ),
    "feed-forward: without its function": (
        "student",
        ("mobilebert.layer", "units = activate(", "units = (lambda x, _: x)("),
        ("hf_mobilebert.feed_forward", "bent(", "(lambda x, _: x)("),
    ),
    "pool: the last token": (
        "student",
        ("mobilebert.pool", "x[..., 0, :]", "x[..., -1, :]"),
        ("hf_mobilebert.pool", "x[..., 0, :]", "x[..., -1, :]"),
    ),
    "pool: without tanh": (
        "layer norms",
        ("mobilebert.pool", "torch.tanh(", "("),
        ("hf_mobilebert.pool", "torch.tanh(", "("),
    ),
    "head: epsilon": (
        "student",
        ("mobilebert.head", "c.head_eps", "0.1"),
        ("hf_mobilebert.head", "c.eps", "0.1"),
    ),
    "head: words after the others": (
        "student",
        ("mobilebert.head", "    logits = z[..., :E]", "    z = z.roll(E, -1)\n    logits = z[..., :E]"),
        ("hf_mobilebert.output", "(words, w[EXTRA])", "(w[EXTRA], words)"),
    ),
    "head: bias forgotten": (
        "student",
        ("mobilebert.head", 'logits + w[LM + "output_bias"]', "logits"),
        ("hf_mobilebert.head", ' + w[f"{p}{own}bias"]', ""),
    ),
    "next sentence: the other order": (
        "student",
        ("mobilebert.next_sentence", "NEXT)", "NEXT).flip(-1)"),
        ("hf_mobilebert.next_sentence", '"cls.seq_relationship."))', '"cls.seq_relationship.")).flip(-1)'),
    ),
    "classes: in another order": (
        "ForSequenceClassification",
        ("mobilebert.classes", "return wide(", "return -wide("),
        ("hf_mobilebert.classified", "return wide(", "return -wide("),
    ),
    "spans: the last token first": (
        "ForQuestionAnswering",
        ("mobilebert.spans", "return start, end", "return end, start"),
        ("hf_blocks.span_logits", "return first, last", "return last, first"),
    ),
}  # fmt: skip
# What no number goes through: config.json, lists of phases and mistakes; `word_table` and the bounds have
# tests of their own.
NO_NUMBERS = {
    "tf": {"inputs", "phases", "sequence", "_seen", "_narrow", "_problems"},
    "hf": {
        "unused",
        "inputs",
        "phases",
        "last",
        "_into_attention",
        "word_table",
        "mistakes",
        "config_mistakes",
    }
    | {"_moved", "_thirds_back", "_refactored", "gap", "embed_gap", "layer_bound"},
}


def test_every_function_of_a_reading_has_a_mutant() -> None:
    for side, module, place in (("tf", tf, 1), ("hf", hf, 2)):
        stem = module.__name__.rpartition(".")[2]
        functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
        own = {n for n, f in functions.items() if f.__module__ == module.__name__ and f.__name__ == n}
        touched = {m[place][0].removeprefix(f"{stem}.") for m in MUTANTS.values()}
        assert own - NO_NUMBERS[side] <= touched, own - NO_NUMBERS[side] - touched


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_reading_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By parity; the right readings are those of transformers. On both sides it is one mistake."""
    kind, ours, theirs = MUTANTS[name]
    told = KINDS.get(kind, STUDENT)
    full = variables(told)
    if kind not in KINDS:
        full = {
            n: x for n, x in variables(told, FINE_TUNED).items() if not n.startswith(("cls/p", "cls/seq"))
        }
    hf_state = converted({n: x for n, x in full.items() if "squad" not in n}) | converted(
        {n: x for n, x in full.items() if "squad" in n}, "qa_outputs"
    )
    architecture = f"MobileBert{kind if kind not in KINDS else 'ForPreTraining'}"
    config = {**told, "architectures": [architecture], hf.INNER_EPS: 1e-12}
    ids, types, mask = batch()
    inputs = {"token_types": types, "mask": mask}

    def found(module: Any) -> dict[str, Tensor]:
        c = original(full, told) if module is tf else hf.Config.from_hf(config)
        return outputs(module.phases([full if module is tf else hf_state], c, inputs), ids)

    right, also_right = found(tf), found(hf)
    heads = right.keys() & also_right.keys()

    def off(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return max(nmse(one[h], other[h]) for h in heads)

    assert off(right, also_right) <= 1e-20
    with monkeypatch.context() as planted:
        plant(planted, ours)
        wrong = found(tf)
        assert off(wrong, also_right) > 1e-8
    with monkeypatch.context() as planted:
        plant(planted, theirs)
        also_wrong = found(hf)
        assert off(also_wrong, right) > 1e-8
    assert off(wrong, also_wrong) <= 1e-20
    assert off(found(tf), found(hf)) <= 1e-20


def test_an_output_layer_of_its_own_is_that_of_transformers() -> None:
    """With the bias that transformers 5 gives it; without one in the file it is the head's."""
    full, (ids, types, mask) = converted(variables(STUDENT)), batch()
    seed = torch.Generator().manual_seed(3)
    p = "cls.predictions.decoder."
    full[p + "weight"] = torch.randn((V, E), generator=seed, dtype=torch.float64)
    full[p + "bias"] = torch.randn((V,), generator=seed, dtype=torch.float64)
    told = STUDENT | {"tie_word_embeddings": False}
    with torch.no_grad():
        model = judge(full, told, "ForMaskedLM", torch.float64)
        wanted = model(input_ids=ids, token_type_ids=types, attention_mask=mask).logits
    c = hf.Config.from_hf(told)
    assert largest(hf.forward(ids, [full], c, token_types=types, mask=mask), wanted) <= 1e-12
    shared = {n: x for n, x in full.items() if n != p + "bias"}
    moved = hf.forward(ids, [shared], c, token_types=types, mask=mask) - wanted
    assert (moved - (full["cls.predictions.bias"] - full[p + "bias"])).abs().max() <= 1e-12
