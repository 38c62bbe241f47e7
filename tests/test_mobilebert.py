"""MobileBERT of TensorFlow: what its variables and its config json say, what is refused by name, and the way
back. Planning and copying are made of headers and tiny bundles; nothing here is computed with torch but where
a reading is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.families import family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.mobilebert import NORMED, PRETRAINED, STUDENT, TWO, mobilebert
from ckpt_tool.fixtures.shapes import shape_of, spread
from ckpt_tool.fixtures.tensorflow import Bundle
from ckpt_tool.fixtures.vocabularies import wordpiece_vocabulary
from tests.headers_only import Headers, held, hugging_face, planned

FILE = "mobilebert_variables.ckpt.data-00000-of-00001"
FIRST = "bert/encoder/layer_0/"
Shapes = dict[str, tuple[int, ...]]


def student(heads: Mapping[str, str] = PRETRAINED, **changes: Any) -> Bundle:
    """One of three layers."""
    return mobilebert(heads, **{"num_hidden_layers": 3, **changes})


def shapes_of(bundle: Bundle) -> Shapes:
    return {name: shape_of(words, bundle.sizes)[0] for name, words, _ in spread(bundle.shapes, bundle.sizes)}


def opened(folder: Path, variables: Shapes, config: Mapping[str, Any] | None, **named: Any) -> Checkpoint:
    """Headers, and the config json under another name where `named` has it."""
    documents = {} if config is None else {"bert_config.json": config}
    for name, content in {**documents, **named}.items():
        (folder / name).write_text(json.dumps(content))
    return held({FILE: variables}, {}, {n: folder / n for n in {**documents, **named}})


def plan(
    folder: Path,
    bundle: Bundle,
    settings: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **more: Any,
) -> Plan:
    """`more` are keys of the config json that are others, None for those left out; `variables` others."""
    variables = more.pop("variables", shapes_of(bundle))
    config = None if bundle.config is None else {**bundle.config, **more}
    if config is not None:
        config = {k: v for k, v in config.items() if v is not None}
    checkpoint = opened(folder, variables, config)
    return family("mobilebert").plan(checkpoint, Options(settings=settings or {}, drop=drop))


def values(made: Plan) -> dict[str, Any]:
    return {name: value.value for name, value in made.config.items()}


def problems(act: Callable[[], Plan]) -> dict[str | None, tuple[str, str]]:
    """Kind and message by place."""
    with pytest.raises(CkptToolError) as caught:
        act()
    return {p.where: (p.kind, p.message) for p in caught.value.problems}


# --- what the variables become --------------------------------------------------------------------------

# Some of each kind, below `bert/` and `mobilebert.`: [T] is transposed (modeling.py, modeling_mobilebert.py).
LAYER = ("encoder/layer_{}/", "encoder.layer.{}.")
EXPECTED = {
    "embeddings/word_embeddings": "embeddings.word_embeddings.weight",
    "embeddings/embedding_transformation/kernel": "embeddings.embedding_transformation.weight [T]",
    "embeddings/FakeLayerNorm/gamma": "embeddings.LayerNorm.weight",
    "embeddings/FakeLayerNorm/beta": "embeddings.LayerNorm.bias",
    "{10}bottleneck/input/dense/kernel": "{10}bottleneck.input.dense.weight [T]",
    "{2}bottleneck/attention/FakeLayerNorm/gamma": "{2}bottleneck.attention.LayerNorm.weight",
    "{2}attention/self/query/kernel": "{2}attention.self.query.weight [T]",
    "{2}attention/self/key/kernel": "{2}attention.self.key.weight [T]",
    "{9}attention/self/value/kernel": "{9}attention.self.value.weight [T]",
    "{9}attention/self/value/bias": "{9}attention.self.value.bias",
    "{9}ffn_layer_1/output/dense/kernel": "{9}ffn.1.output.dense.weight [T]",
    "{1}intermediate/dense/kernel": "{1}intermediate.dense.weight [T]",
    "{1}output/bottleneck/dense/kernel": "{1}output.bottleneck.dense.weight [T]",
}
HEADS = {
    "cls/predictions/transform/dense/kernel": "cls.predictions.transform.dense.weight [T]",
    "cls/predictions/transform/LayerNorm/beta": "cls.predictions.transform.LayerNorm.bias",
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/predictions/extra_output_weights": "cls.predictions.dense.weight [T]",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
}


def layered(name: str, layer: str, prefix: str) -> str:
    for number in (1, 2, 9, 10):
        name = name.replace(f"{{{number}}}", layer.format(number))
    return prefix + name


def test_every_kind_of_variable_goes_to_its_place(originals: Any, conversions: Any) -> None:
    from safetensors.numpy import load_file

    pairs = {layered(a, LAYER[0], "bert/"): layered(b, LAYER[1], "mobilebert.") for a, b in EXPECTED.items()}
    found = load_file(conversions("mobilebert-training") / "model.safetensors")
    with api.open_for(originals("mobilebert-training")) as source:
        for own, target in {**pairs, **HEADS}.items():
            name, _, turned = target.partition(" ")
            (variable,) = source.find(own)
            bits = source.read(variable).view("<f4")
            assert np.array_equal(found[name], bits.T if turned else bits), own
    assert len(found) == len(shapes_of(mobilebert()))


def test_the_published_model_without_its_config(tmp_path: Path) -> None:
    published = mobilebert(
        num_hidden_layers=24,
        hidden_size=512,
        embedding_size=128,
        intra_bottleneck_size=128,
        intermediate_size=512,
        vocab_size=30522,
    )
    made = plan(tmp_path, replace(published, config=None))
    assert len(shapes_of(published)) == 1119 == sum(map(len, planned(made).values()))
    assert made.config["num_attention_heads"].value == 4 and made.config["hidden_act"].value == "relu"
    assert "uncased_L-24_H-128_B-512_A-4_F-4_OPT" in made.config["hidden_act"].source
    assert values(made)["architectures"] == ["MobileBertForPreTraining"]
    assert sum(np.prod(s) for s in planned(made)["model.safetensors"].values()) == 36_597_564 + 88 * 512


def test_what_no_shape_tells_is_asked_for(tmp_path: Path) -> None:
    found = problems(lambda: plan(tmp_path, replace(student(), config=None)))
    assert set(found) == {"num_attention_heads", "hidden_act"}
    normed = replace(NORMED.original, config=None)  # type: ignore[type-var]
    found = problems(lambda: plan(tmp_path, normed))
    assert set(found) == {"num_attention_heads", "hidden_act", "normalization_type"}
    told = {"num_attention_heads": 4, "hidden_act": "gelu_new", "normalization_type": "layer_norm"}
    made = plan(tmp_path, normed, told)
    assert {k: v for k, v in values(made).items() if k in told} == told


def test_shapes_do_not_tell_attention_apart_where_widths_are_equal(tmp_path: Path) -> None:
    square = student(
        intra_bottleneck_size=60, key_query_shared_bottleneck=False, use_bottleneck_attention=True
    )
    told = {"num_attention_heads": 4, "hidden_act": "relu"}
    found = problems(lambda: plan(tmp_path, replace(square, config=None), told))
    assert list(found) == ["use_bottleneck_attention"]
    for answer in (True, False):
        made = plan(tmp_path, replace(square, config=None), {**told, "use_bottleneck_attention": answer})
        assert values(made)["use_bottleneck_attention"] is answer


def test_keys_that_are_absent_have_the_defaults_of_the_publishers_code(tmp_path: Path) -> None:
    bundle: Any = NORMED.original
    made = plan(
        tmp_path, bundle, hidden_act=None, normalization_type=None, use_bottleneck_attention=None,
        hidden_dropout_prob=None, initializer_range=None,
    )  # fmt: skip
    found = values(made)
    assert found["hidden_act"] == "gelu_new" and found["normalization_type"] == "layer_norm"
    assert found["use_bottleneck_attention"] is False and found["hidden_dropout_prob"] == 0.1
    assert "BertConfig" in made.config["hidden_act"].source
    plain = student(
        {}, embedding_size=60, trigram_input=False, use_bottleneck=False, num_feedforward_networks=1,
        normalization_type="layer_norm", classifier_activation=True, key_query_shared_bottleneck=False,
    )  # fmt: skip
    checkpoint = opened(tmp_path, shapes_of(plain), plain.config)
    assert family("mobilebert").recognise(checkpoint)[0] is False, "that is BERT"


ACTIVATIONS = {"gelu": "gelu_new", "GELU": "gelu_new", "relu": "relu", "relu6": "relu6", "tanh": "tanh"}


@pytest.mark.parametrize(("own", "named"), [*ACTIVATIONS.items(), ("linear", "linear"), ("", "linear")])
def test_activations_by_the_name_that_computes_the_same(own: str, named: str, tmp_path: Path) -> None:
    assert values(plan(tmp_path, student(), hidden_act=own))["hidden_act"] == named


@pytest.mark.parametrize(
    ("changes", "where", "kind", "says"),
    [
        (
            {"trigram_input": False},
            "trigram_input",
            "config-mismatch",
            "rows of bert/embeddings/embedding_tr",
        ),
        ({"use_bottleneck": False}, "use_bottleneck", "config-mismatch", "found true"),
        (
            {"key_query_shared_bottleneck": False},
            "key_query_shared_bottleneck",
            "config-mismatch",
            "found true",
        ),
        ({"use_bottleneck_attention": True}, "use_bottleneck_attention", "config-mismatch", "found false"),
        ({"num_feedforward_networks": 3}, "num_feedforward_networks", "config-mismatch", "found 4"),
        (
            {"classifier_activation": True},
            "classifier_activation",
            "config-mismatch",
            "no variable bert/pooler",
        ),
        ({"normalization_type": "layer_norm"}, "normalization_type", "config-mismatch", "LayerNorm/gamma"),
        (
            {"normalization_type": "manual_layer_norm"},
            "normalization_type",
            "unsupported",
            "manual_layer_norm",
        ),
        ({"hidden_act": "swish"}, "hidden_act", "unsupported", "swish"),
        ({"num_attention_heads": 5}, "num_attention_heads", "config-mismatch", "to divide by 5"),
        ({"hidden_size": 64}, "hidden_size", "config-mismatch", "found 60"),
        ({"embedding_size": 64}, "embedding_size", "config-mismatch", "at most hidden_size 60"),
        ({"vocab_size": 336}, "vocab_size", "config-mismatch", "found 328"),
        ({"num_hidden_layers": 4}, "num_hidden_layers", "missing-tensor", "found tensors of 3"),
        ({"hidden_dropout_prob": 2}, "hidden_dropout_prob", "bad-config", "from 0 to 1"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps", "unsupported", "publisher's code reads"),
        ({"attention_window": 8}, "attention_window", "unsupported", "publisher's code reads"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    changes: dict[str, Any], where: str, kind: str, says: str, tmp_path: Path
) -> None:
    found = problems(lambda: plan(tmp_path, student(), **changes))
    assert found[where][0] == kind and says in found[where][1], found


def test_a_key_that_changes_nothing_is_left_out_by_name(tmp_path: Path) -> None:
    made = plan(tmp_path, student(), {"author": None}, author="a lab")
    assert any("author" in note for note in made.notes) and "author" not in made.config


def test_gelu_of_transformers_is_not_the_originals(tmp_path: Path) -> None:
    assert (
        problems(lambda: plan(tmp_path, student(), {"hidden_act": "gelu"}))["hidden_act"][0] == "unsupported"
    )


def test_the_teacher_is_refused_for_what_transformers_does_not_build(tmp_path: Path) -> None:
    teacher = student(
        key_query_shared_bottleneck=False, normalization_type="layer_norm", intra_bottleneck_size=120,
        num_feedforward_networks=1, classifier_activation=True,
    )  # fmt: skip
    found = problems(lambda: plan(tmp_path, teacher))
    assert found["key_query_shared_bottleneck"][0] == "unsupported"


def test_a_flag_that_the_code_makes_nothing_of_is_off(tmp_path: Path) -> None:
    """transformers would make a bottleneck of it, and leave that untrained."""
    made = plan(tmp_path, student(use_bottleneck_attention=True, key_query_shared_bottleneck=True))
    assert values(made)["key_query_shared_bottleneck"] is False


# --- heads ----------------------------------------------------------------------------------------------


def under(stem: str, shapes: Mapping[str, str] = TWO) -> dict[str, str]:
    return {stem + name: shape for name, shape in shapes.items()}


MASKED = {n: s for n, s in PRETRAINED.items() if n.startswith("cls/predictions/")}


@pytest.mark.parametrize(
    ("heads", "architecture"),
    [
        (PRETRAINED, "ForPreTraining"),
        (MASKED, "ForMaskedLM"),
        (under("cls/seq_relationship/"), "ForNextSentencePrediction"),
        (under("cls/squad/"), "ForQuestionAnswering"),
        (under("squad/"), "ForQuestionAnswering"),
        (under("", {"output_weights": "5 d", "output_bias": "5"}), "ForSequenceClassification"),
        ({}, "Model"),
    ],
)
def test_the_class_is_that_of_the_heads(heads: dict[str, str], architecture: str, tmp_path: Path) -> None:
    bundle = student(heads)
    made = plan(tmp_path, bundle)
    assert values(made)["architectures"] == [f"MobileBert{architecture}"]
    back = family("mobilebert").plan_original(hugging_face(made, tmp_path), Options())
    assert planned(back)[FILE] == shapes_of(bundle)
    again = opened(
        tmp_path, planned(back)[FILE], None, **{d.name: json.loads(d.content) for d in back.documents}
    )
    assert values(family("mobilebert").plan(again, Options())) == values(made)


def test_a_classifier_says_how_many_classes_it_tells_apart(tmp_path: Path) -> None:
    made = plan(tmp_path, student(under("", {"output_weights": "5 d", "output_bias": "5"})))
    assert values(made)["id2label"] == {str(k): f"LABEL_{k}" for k in range(5)}
    assert any("run_classifier" in note for note in made.notes)


def test_heads_of_two_classes_are_told_apart_by_dropping_one(tmp_path: Path) -> None:
    both = student({**MASKED, **under("cls/squad/")})
    assert problems(lambda: plan(tmp_path, both))["architectures"][0] == "unsupported"
    made = plan(tmp_path, both, drop=tuple(MASKED))
    assert values(made)["architectures"] == ["MobileBertForQuestionAnswering"]
    assert {d.tensor.name for d in made.dropped} == set(MASKED)


def test_a_class_without_a_pooler_leaves_it_out(tmp_path: Path) -> None:
    made = plan(tmp_path, student(under("cls/squad/"), classifier_activation=True))
    assert {d.tensor.name: d.reason for d in made.dropped} == {
        f"bert/pooler/dense/{x}": "MobileBertForQuestionAnswering has no pooler" for x in ("kernel", "bias")
    }
    assert values(made)["classifier_activation"] is True
    made = plan(tmp_path, student(classifier_activation=True))
    assert "mobilebert.pooler.dense.weight" in planned(made)["model.safetensors"] and not made.dropped


def test_what_transformers_makes_and_does_not_use_is_told(tmp_path: Path) -> None:
    as_wide = student(MASKED, embedding_size=60, trigram_input=False)
    del (shapes := shapes_of(as_wide))["cls/predictions/extra_output_weights"]
    made = plan(tmp_path, as_wide, variables=shapes)
    notes = " ".join(made.notes)
    assert "embedding_transformation" in notes and "cls.predictions.dense.weight" in notes
    assert "cls.predictions.dense.weight" not in planned(made)["model.safetensors"]


# --- what is left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trigrams", [False, True])
def test_what_transformers_saves_and_does_not_use_is_left_out(trigrams: bool, tmp_path: Path) -> None:
    """As its classes save a model whose words are as wide as it is."""
    as_wide = student(MASKED, embedding_size=60, trigram_input=trigrams)
    del (shapes := shapes_of(as_wide))["cls/predictions/extra_output_weights"]
    made = plan(tmp_path, as_wide, variables=shapes)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values(made)))
    turned = "mobilebert.embeddings.embedding_transformation."
    more = {f"{turned}weight": (60, 180 if trigrams else 60), f"{turned}bias": (60,)}
    saved = {**planned(made)["model.safetensors"], **more, "cls.predictions.dense.weight": (0, 328)}
    folder = held({"model.safetensors": saved}, {}, {"config.json": config})
    back = family("mobilebert").plan_original(folder, Options())
    assert planned(back)[FILE] == shapes
    unused = {"cls.predictions.dense.weight"} | (set() if trigrams else more.keys())
    assert {d.tensor.name for d in back.dropped} == unused


def test_state_of_the_training_is_left_out_and_counted(tmp_path: Path) -> None:
    bundle = student()
    model = shapes_of(bundle)
    slots = ("adam_m", "adam_v", "Adam", "Adam_1", "AdamWeightDecayOptimizer", "AdamWeightDecayOptimizer_1",
             "LAMB", "Momentum", "adafactor_vr", "adafactor_vc", "accum")  # fmt: skip
    state = {f"{name}/{slot}": shape for name, shape in model.items() for slot in slots}
    of_keras = ("training/Adam/{}/m", "Adam/{}/v", "AdamWeightDecay/{}/v", "SGD/{}/momentum")
    state |= {slot.format(name): shape for name, shape in model.items() for slot in of_keras}
    scalars: Shapes = dict.fromkeys(
        ("global_step", "beta1_power", "beta2_power", "loss_scale", "good_steps", "bad_steps", "local_step",
         "batch_finite", "signal_early_stopping/STOP"), ()
    )  # fmt: skip
    teacher = {f"teacher/{name}": shape for name, shape in model.items()}
    lost: Shapes = {"hidden_distill_0/LayerNorm/beta": (60,), "hidden_distill_0/LayerNorm_1/gamma": (60,)}
    more = {**state, **scalars, **teacher, **lost}
    made = plan(tmp_path, bundle, variables={**model, **more})
    assert {d.tensor.name for d in made.dropped} == more.keys()
    assert {d.reason for d in made.dropped if d.tensor.name in state} == {"state of the optimizer"}
    assert f"{len(state) + 2} variables left out: state of the optimizer" in made.notes
    assert values(made)["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("scopes", "beside", "told"),
    [
        (("tower_0", "tower_1"), (), "each of 2 scopes: tower_0/, tower_1/"),
        # One of the names is there without the scope as well.
        (("tower_0",), ("bert/embeddings/position_embeddings",), "the scope tower_0/"),
    ],
)
def test_scopes_that_are_not_taken_off_are_named(
    scopes: tuple[str, ...], beside: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    model = shapes_of(student())
    scoped = {f"{scope}/{name}": shape for scope in scopes for name, shape in model.items()}
    scoped |= {name: model[name] for name in beside}
    with pytest.raises(CkptToolError) as caught:
        plan(tmp_path, student(), variables=scoped)
    (problem,) = caught.value.problems
    assert problem.kind == "unsupported" and problem.message.endswith(
        f"found no variable bert/embeddings/word_embeddings, but one in {told}"
    )
    assert "without its scope" in str(problem.hint)


def test_an_unknown_variable_is_refused_by_name(tmp_path: Path) -> None:
    more = {"bert/encoder/layer_1/adapter/kernel": (60, 8)}
    found = problems(lambda: plan(tmp_path, student(), variables={**shapes_of(student()), **more}))
    assert found == {next(iter(more)): found[next(iter(more))]}
    assert found[next(iter(more))][0] == "uncovered-tensors"


@pytest.mark.parametrize("name", ["layer_99999999/output", "layer_0/ffn_layer_999999/output"])
def test_a_number_in_a_name_makes_no_million_layers(name: str, tmp_path: Path) -> None:
    odd = f"bert/encoder/{name}/dense/kernel"
    told = {"num_attention_heads": 4, "hidden_act": "relu"}
    bare = replace(student(), config=None)
    found = problems(lambda: plan(tmp_path, bare, told, variables={**shapes_of(bare), odd: (44, 36)}))
    assert found[odd][0] == "uncovered-tensors"


def test_fake_quantisation_is_left_out_only_when_asked(tmp_path: Path) -> None:
    ranges: Shapes = {
        f"{FIRST}attention/self/query/MobileBertActFakeQuantWithMinMaxVars/min": (),
        f"{FIRST}attention/self/query/MobileBertWeightFakeQuantWithMinMaxVars_1/max": (),
        f"{FIRST}MobileBertActFakeQuantWithMinMaxVars/min/biased": (),
    }
    variables = {**shapes_of(student()), **ranges}
    found = problems(lambda: plan(tmp_path, student(), variables=variables, hidden_act="relu6"))
    assert found["use_quantized_training"][0] == "unsupported"
    made = plan(
        tmp_path, student(), {"use_quantized_training": False}, variables=variables, hidden_act="relu6"
    )
    assert {d.tensor.name for d in made.dropped} == set(ranges)
    assert "use_quantized_training" not in made.config


def test_rows_without_an_id_are_told(tmp_path: Path) -> None:
    longer = replace(student(vocab_size=336), documents={"vocab.txt": wordpiece_vocabulary(328)})
    made = api.plan(api.open_for(longer.write(tmp_path, "longer")))
    assert any("8 of 336 embedding rows have no id" in note for note in made.notes)
    shorter = replace(student(vocab_size=320), documents={"vocab.txt": wordpiece_vocabulary(328)})
    (tmp_path / "shorter").mkdir()
    with pytest.raises(CkptToolError, match="bad-tokenizer"):
        api.plan(api.open_for(shorter.write(tmp_path / "shorter", "shorter")))


def test_every_variable_keeps_its_dtype(tmp_path: Path) -> None:
    bundle = student()
    dtypes = {n: "F32" if len(s) == 1 else "BF16" for n, s in shapes_of(bundle).items()}
    headers = Headers(FILE, [(n, dtypes[n], s) for n, s in shapes_of(bundle).items()])
    checkpoint = replace(opened(tmp_path, {}, bundle.config), files={FILE: headers})
    made = family("mobilebert").plan(checkpoint, Options())
    assert {t.dtype for t in made.outputs[0].tensors if len(t.shape) > 1} == {"BF16"}
    assert any("keeps its dtype" in note for note in made.notes)


def test_float16_is_warned_of(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, shapes_of(student()), student().config)
    made = {d: family("mobilebert").plan(checkpoint, Options(dtype=d)) for d in ("F16", "BF16")}
    assert any("float16 ends at 65504" in note for note in made["F16"].notes)
    assert not any("float16" in note for note in made["BF16"].notes)


# --- files ----------------------------------------------------------------------------------------------


def test_the_config_json_goes_by_several_names(tmp_path: Path) -> None:
    bundle = student()
    for name in (
        "bert_config.json",
        "mobilebert_config.json",
        "uncased_L-24_H-128_B-512_A-4_F-4_OPT.json",
        "config.json",
    ):
        made = family("mobilebert").plan(
            opened(tmp_path, shapes_of(bundle), None, **{name: bundle.config}), Options()
        )
        assert made.config["hidden_size"].source == f"{name}: hidden_size"
        assert made.original["document"] == name


def test_a_config_of_transformers_is_not_the_originals(tmp_path: Path) -> None:
    theirs = {**STUDENT, "num_hidden_layers": 3, "model_type": "mobilebert"}
    checkpoint = opened(tmp_path, shapes_of(student()), None, **{"config.json": theirs})
    settings = {"num_attention_heads": 4, "hidden_act": "relu"}
    made = family("mobilebert").plan(checkpoint, Options(settings=settings))
    assert any("config.json is a model's of transformers" in note for note in made.notes)


def test_two_configs_that_differ_are_refused(tmp_path: Path) -> None:
    other = {**STUDENT, "num_attention_heads": 2}
    checkpoint = opened(tmp_path, shapes_of(student()), STUDENT, **{"mobilebert_config.json": other})
    with pytest.raises(CkptToolError, match="ambiguous-input"):
        family("mobilebert").plan(checkpoint, Options())


# --- the way back ---------------------------------------------------------------------------------------


def test_files_get_the_names_that_they_had(tmp_path: Path, conversions: Any) -> None:
    back = api.convert(conversions("mobilebert-training"), tmp_path / "back", to="original")
    names = {p.name for p in back.out.iterdir()}
    document, stem = "uncased_L-24_H-128_B-512_A-4_F-4_OPT.json", "model.ckpt-240000"
    assert {document, f"{stem}.index", f"{stem}.data-00000-of-00001", "vocab.txt"} <= names
    assert json.loads((back.out / document).read_text()) == {**STUDENT, "use_bottleneck_attention": False}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"architectures": ["MobileBertForTokenClassification"]}, "architectures"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ],
)
def test_what_the_original_cannot_compute_is_refused(
    changes: dict[str, Any], where: str, tmp_path: Path
) -> None:
    checkpoint = hugging_face(plan(tmp_path, student()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    found = problems(lambda: family("mobilebert").plan_original(checkpoint, Options()))
    assert found[where][0] == "unsupported"


@pytest.mark.parametrize("key", ["stem", "document", "spans"])
def test_a_manifest_names_no_file_outside(key: str, tmp_path: Path) -> None:
    checkpoint = hugging_face(plan(tmp_path, student()), tmp_path)
    (tmp_path / "ckpt-tool.json").write_text(json.dumps({"original": {key: "../../away"}}))
    if key == "spans":  # which is one of two words, else the usual one
        assert family("mobilebert").plan_original(checkpoint, Options())
        return
    found = problems(lambda: family("mobilebert").plan_original(checkpoint, Options()))
    assert found == {f"original.{key}": found[f"original.{key}"]}


def test_what_transformers_saves_goes_back(tmp_path: Path) -> None:
    """With the decoder, which the embedding and the bias are too, stored once more."""
    import torch
    from transformers import MobileBertConfig, MobileBertForPreTraining

    config = MobileBertConfig(**{**STUDENT, "num_hidden_layers": 2})
    model = MobileBertForPreTraining(config)
    model.config.architectures = ["MobileBertForPreTraining"]
    folder = tmp_path / "saved"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    back = api.convert(folder, tmp_path / "back", to="original")
    again = api.convert(back.out, tmp_path / "again")
    from safetensors.torch import load_file

    found, wanted = load_file(again.out / "model.safetensors"), model.state_dict()
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert found.keys() == wanted.keys() - tied
    assert all(torch.equal(found[n], wanted[n]) for n in found)


def test_a_decoder_with_values_of_its_own_is_refused(tmp_path: Path, conversions: Any) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "folder"
    shutil.copytree(conversions("mobilebert-bare"), folder)
    tensors = load_file(folder / "model.safetensors")
    own = tensors["mobilebert.embeddings.word_embeddings.weight"] + 1
    save_file({**tensors, "cls.predictions.decoder.weight": own}, folder / "model.safetensors")
    with pytest.raises(CkptToolError, match="tied-mismatch") as caught:
        api.convert(folder, tmp_path / "back", to="original")
    assert "--drop cls.predictions.decoder.weight" in str(caught.value)
    options = Options(drop=("cls.predictions.decoder.weight",))
    assert api.convert(folder, tmp_path / "back", to="original", options=options).out.is_dir()


# --- readings -------------------------------------------------------------------------------------------


def test_an_epsilon_that_config_cannot_say_is_foretold(tmp_path: Path) -> None:
    source = NORMED.write(tmp_path / "original")
    made = api.convert(source, tmp_path / "converted", check=False)
    report = api.verify(made.out, source, levels="parity")
    (first, *_) = [f for f in report.findings if f.check == "foretold" and f.status == "fail"]
    assert "mobilebert-norm-epsilon" in first.message and report.status == "fail"
    accepted = api.verify(made.out, source, levels="parity", accept=["mobilebert-norm-epsilon"])
    assert {f.status for f in accepted.findings if f.check == "foretold"} <= {"pass", "note"}
