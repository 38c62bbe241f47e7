"""The tables of megatron-bert and megatron-gpt2 in both directions, and where their numbers come from. Mostly
in memory: what a plan says is carried out on arrays."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool import api, reference
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.dialects.megatron_args import feed_forward_gelu, lm_head_gelu
from ckpt_tool.convert.dialects.megatron_names import AGES, age_of, own_names
from ckpt_tool.convert.dialects.megatron_ranks import Run
from ckpt_tool.convert.families import family
from ckpt_tool.convert.layout import Part, Step, apply, with_padding, without_padding
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures import variants
from ckpt_tool.fixtures.families.megatron_bert import TWO_GELUS
from ckpt_tool.fixtures.megatron import Megatron
from tests.headers_only import Headers, beside, held, hugging_face, planned, rank_files
from tests.megatron_models import AGES as SPELLINGS
from tests.megatron_models import (
    FAMILIES,
    VERSIONS,
    WORDS,
    D,
    L,
    N,
    V,
    args,
    hf_state,
    megatron_files,
    tensors,
)

FULL = {n: t.float() for n, t in tensors().items()}
VARIANTS: dict[str, Any] = {k: v for k, v in variants.VARIANTS.items() if isinstance(v.original, Megatron)}
STAGES = {1: (4,), 2: (2, 2)}
Arrays = dict[tuple[str, str], np.ndarray]  # (file, tensor) -> raw bits


def original(
    name: str,
    version: float | None = 3.0,
    age: str = "encoder",
    ranks: int = 1,
    stages: tuple[int, ...] = (4,),
    chunks: int = 1,
    told: Mapping[str, Any] | None = None,
    **more: Any,
) -> tuple[Checkpoint, Arrays]:
    """The model of `megatron_models` as a checkpoint of that age, and its bits."""
    files = megatron_files(FULL, name, version, age, ranks, stages, chunks)
    depth = len(stages) // chunks
    arrays: Arrays = {}
    for r, row in enumerate(files):
        for s, state in enumerate(row):
            folder = f"mp_rank_{r:02d}_{s:03d}" if depth > 1 else f"mp_rank_{r:02d}"
            for tensor, values in state.items():
                at = (f"release/{folder}/model_optim_rng.pt", tensor)
                arrays[at] = values.contiguous().numpy().view("<u4")
    shared = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": depth}
    return (
        held(shapes_of(arrays), beside(version, {**args(), **shared} if told is None else told), **more),
        arrays,
    )


def carried_out(plan: Plan, arrays: Arrays) -> Arrays:
    """The tensors a plan makes; what it compares must be equal where the step reaches."""
    made: Arrays = {}
    for step in sorted(plan.steps, key=lambda s: bool(s.compare)):
        results = apply(step, [arrays[p.file, p.name] for p in step.sources])
        for part, values in zip(step.targets, results, strict=True):
            if not step.compare:
                made[part.file, part.name] = values
            elif set(step.domain().items()) == set(part.box(step.sizes).items()):
                np.testing.assert_array_equal(made[part.file, part.name], values)
    wanted = {(f.name, t.name): t.shape for f in plan.outputs for t in f.tensors}
    assert {k: v.shape for k, v in made.items()} == wanted
    return made


def converted(plan: Plan, made: Arrays, tmp_path: Path) -> Checkpoint:
    """What opening the output of a plan to Hugging Face would give."""
    assert shapes_of(made) == planned(plan)
    return hugging_face(plan, tmp_path)


def again(plan: Plan, made: Arrays) -> Checkpoint:
    """What opening the output of a plan to an original would give."""
    assert shapes_of(made) == planned(plan)
    return rank_files(plan)


def truth(name: str, words: int = WORDS) -> dict[str, np.ndarray]:
    return {n: t.contiguous().numpy().view("<u4") for n, t in hf_state(FULL, name, words).items()}


def shapes_of(arrays: Arrays) -> dict[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for (file, name), values in arrays.items():
        found.setdefault(file, {})[name] = values.shape
    return found


def check(made: Arrays, wanted: Mapping[str, np.ndarray]) -> None:
    found = {n: values for (_, n), values in made.items()}
    assert found.keys() == wanted.keys()
    for n, values in wanted.items():
        np.testing.assert_array_equal(found[n], values, err_msg=n)


WITH_WORDS = Options(settings={"vocab_size": WORDS})


def refused(make: Callable[[], object]) -> list[tuple[str, str]]:
    with pytest.raises(CkptToolError) as caught:
        make()
    return [(p.kind, p.line()) for p in caught.value.problems]


def values_of(plan: Plan) -> dict[str, Any]:
    return {k: v.value for k, v in plan.config.items()}


# --- both directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("age", SPELLINGS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_age_version_and_sharing_is_the_same_model_and_goes_back(
    name: str, version: float | None, age: str, tmp_path: Path
) -> None:
    for ranks, depth in product((1, 2), (1, 2)):
        checkpoint, bits = original(name, version, age, ranks, STAGES[depth])
        assert family(name).recognise(checkpoint)[0]
        plan = family(name).plan(checkpoint, WITH_WORDS)
        made = carried_out(plan, bits)
        check(made, truth(name))
        back = family(name).plan_original(converted(plan, made, tmp_path), Options())
        returned = carried_out(back, made)
        assert returned.keys() == bits.keys()
        for key, values in bits.items():
            assert returned[key].shape == values.shape
            if "word_embeddings" in key[1] or key[1].endswith(("lm_head.bias", "output_layer.weight")):
                continue  # rows of padding are not kept
            if not key[1].endswith("output_layer.bias"):
                np.testing.assert_array_equal(returned[key], values, err_msg=str(key))
        once_more = family(name).plan(again(back, returned), Options())
        check(carried_out(once_more, returned), truth(name))
        assert values_of(once_more) == values_of(plan)


def test_layers_of_transformer_engine_have_its_gelu_both_ways(tmp_path: Path) -> None:
    """Whatever the flags say; a model of another gelu goes back to the layers that have it."""
    checkpoint, bits = original("megatron-gpt2", 3.0, "engine-norm")
    plan = family("megatron-gpt2").plan(checkpoint, WITH_WORDS)
    said = plan.config["activation_function"]
    assert (said.value, said.source) == ("gelu_new", "rule: Transformer Engine's gelu is the tanh form")
    made = converted(plan, carried_out(plan, bits), tmp_path)
    for gelu, names in (("gelu_new", "layernorm_mlp.fc1_weight"), ("gelu", "mlp.dense_h_to_4h.weight")):
        asked = Options(settings={"activation_function": gelu})
        back = family("megatron-gpt2").plan_original(made, asked)
        assert any(t.name.endswith(names) for f in back.outputs for t in f.tensors), gelu


@pytest.mark.parametrize("name", FAMILIES)
def test_any_sharing_and_version_can_be_written(name: str, tmp_path: Path) -> None:
    checkpoint, bits = original(name, 2.0, "transformer")
    plan = family(name).plan(checkpoint, WITH_WORDS)
    made = carried_out(plan, bits)
    folder = converted(plan, made, tmp_path)
    for ranks, depth, version in product((1, 2, 4), (1, 2, 4), ("0", "1.0", "2.0", "3.0")):
        asked = {"tensor_parallel": ranks, "pipeline_parallel": depth, "checkpoint_version": version}
        back = family(name).plan_original(folder, Options(family_options=asked))
        assert len(back.outputs) == ranks * depth
        assert all(f.beside["checkpoint_version"] == float(version) for f in back.outputs)
        returned = carried_out(back, made)
        rows = next(v.shape[0] for k, v in returned.items() if k[1].endswith("word_embeddings.weight"))
        assert rows == (V if ranks == 1 else 128)  # as it was, else up to the next multiple
        check(carried_out(family(name).plan(again(back, returned), Options()), returned), truth(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_virtual_stages_are_joined_and_written_again(name: str, tmp_path: Path) -> None:
    checkpoint, bits = original(name, 3.0, "encoder", 2, (1, 1, 1, 1), chunks=2)
    assert any(t.name.startswith("model1.") for t in checkpoint)
    plan = family(name).plan(checkpoint, WITH_WORDS)
    made = carried_out(plan, bits)
    check(made, truth(name))
    back = family(name).plan_original(converted(plan, made, tmp_path), Options())
    returned = carried_out(back, made)
    assert returned.keys() == bits.keys()
    assert "model1.lm_head" in back.outputs[0].dicts
    check(carried_out(family(name).plan(again(back, returned), Options()), returned), truth(name))


def test_stages_may_have_different_numbers_of_layers() -> None:
    checkpoint, bits = original("megatron-gpt2", stages=(1, 3))
    check(carried_out(family("megatron-gpt2").plan(checkpoint, WITH_WORDS), bits), truth("megatron-gpt2"))


def test_a_bare_model_and_an_untied_output_layer() -> None:
    """The dict `model` alone, as some tools save it; an output layer apart from the embedding."""
    _, bits = original("megatron-gpt2", 2.0, "encoder")
    bare = {(f, n.removeprefix("model.")): v for (f, n), v in bits.items()}
    apart = (next(iter(bare))[0], "language_model.output_layer.weight")
    bare[apart] = np.random.default_rng(1).integers(0, 2**30, (V, D), dtype=np.uint32)
    source = held(shapes_of(bare), beside(2.0, args(untie_embeddings_and_output_weights=True)))
    plan = family("megatron-gpt2").plan(source, WITH_WORDS)
    made = carried_out(plan, bare)
    np.testing.assert_array_equal(made["model.safetensors", "lm_head.weight"], bare[apart][:WORDS])
    assert plan.config["tie_word_embeddings"].value is False


def test_without_a_binary_head_it_is_a_masked_language_model(tmp_path: Path) -> None:
    checkpoint, bits = original("megatron-bert")
    left = {k: v for k, v in bits.items() if "binary_head" not in k[1] and "pooler" not in k[1]}
    source = held(shapes_of(left), beside(3.0, args()))
    plan = family("megatron-bert").plan(source, WITH_WORDS)
    assert plan.config["architectures"].value == ["MegatronBertForMaskedLM"]
    made = carried_out(plan, left)
    back = family("megatron-bert").plan_original(converted(plan, made, tmp_path), Options())
    assert carried_out(back, made).keys() == left.keys()


def test_the_ages_are_told_apart_by_their_names() -> None:
    for age in AGES:
        names = ["model." + n.replace("{i}", "11") for n in own_names(age).values()]
        assert age_of(names) == age
    assert age_of(["model.layers.0.self_attn.q_proj.weight"]) is None


# --- padding --------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 40), kept=st.integers(1, 40), ranks=st.integers(1, 4))
def test_padding_is_left_out_and_put_back(rows: int, kept: int, ranks: int) -> None:
    rows, kept = max(rows, kept) * ranks, min(rows, kept)
    values = np.random.default_rng(0).integers(0, 2**30, (rows, 3), dtype=np.uint32)
    each = rows // ranks
    sources = tuple(
        Part(f"{r}", "w", "F32", (("v",), ("d",)), (("v", r * each, (r + 1) * each),)) for r in range(ranks)
    )
    step = Step((("v", rows), ("d", 3)), sources, (Part("", "w", "F32", (("v",), ("d",))),))
    cut = without_padding(step, "v", kept)
    assert cut.defects() == []
    (made,) = apply(cut, np.split(values, ranks))
    np.testing.assert_array_equal(made, values[:kept])
    filled = with_padding(step.inverse(), "v", kept)
    assert filled.defects() == []
    back = np.concatenate(apply(filled, [made] * len(filled.sources)))
    np.testing.assert_array_equal(back, np.resize(made, (rows, 3)))


def test_padding_is_kept_when_asked_for_or_when_nothing_tells() -> None:
    checkpoint, bits = original("megatron-gpt2")
    asked = family("megatron-gpt2").plan(checkpoint, Options(family_options={"keep_padding": True}))
    check(carried_out(asked, bits), truth("megatron-gpt2", V))
    assert asked.config["vocab_size"].source.startswith("--keep-padding")
    unknown = family("megatron-gpt2").plan(checkpoint, Options())
    assert unknown.config["vocab_size"].value == V
    assert unknown.config["eos_token_id"].value is None
    assert any("nothing tells how many are words" in note for note in unknown.notes)
    cut = family("megatron-gpt2").plan(checkpoint, WITH_WORDS)
    assert any(f"{V - WORDS} rows of padding" in note for note in cut.notes)


def test_padding_is_read_once_for_the_checksum_and_damage_in_it_is_found(tmp_path: Path) -> None:
    variant = VARIANTS["gpt2-v3-tp2-pp2"]
    source = variant.write(tmp_path / "in")
    options = Options(settings=variant.settings)
    done = api.convert(source, tmp_path / "out", options=options, check=False)
    with closing(open_checkpoint(source)) as checkpoint:
        sizes = {(t.file, t.name): t.nbytes for t in checkpoint}
        read = done.outcome.sources
        padded = [key for key in read if "word_embeddings" in key[1]]
        assert padded and any("rows of padding" in note for note in done.plan.notes)
        assert done.outcome.bytes_read == sum(sizes[key] for key in read)
        file = checkpoint.files[padded[-1][0]]
        place = file.extent(padded[-1][1])
    assert place is not None
    with open(file.path, "r+b") as held:  # the last row, which no step reads
        held.seek(place[1] + sizes[padded[-1]] - 1)
        byte = held.read(1)
        held.seek(-1, 1)
        held.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "again", options=options)
    assert [p.kind for p in caught.value.problems] == ["checksum"]


@pytest.mark.parametrize("id", ["bert-ngc-cased", "gpt2-v3-tp2-pp2"])
def test_a_tokenizer_says_how_many_words_there_are(id: str, tmp_path: Path) -> None:
    variant = VARIANTS[id]
    bare = replace(variant, original=replace(variant.original, vocabulary={}))
    source = bare.write(tmp_path / "in")
    (tmp_path / "vocabulary").mkdir()
    for name, content in variant.original.vocabulary.items():
        (tmp_path / "vocabulary" / name).write_bytes(content)
    wanted = variant.true_config["vocab_size"]
    files = sorted((tmp_path / "vocabulary").iterdir())
    settings = {k: v for k, v in variant.settings.items() if k != "vocab_size"}
    for given_path in (tmp_path / "vocabulary", *files):
        options = Options(tokenizer=str(given_path), settings=settings)
        plan = api.plan(source, options=options)
        assert plan.config["vocab_size"].value == wanted
        assert plan.config["vocab_size"].source.startswith("--tokenizer")
        assert "tokenizer.json" in {d.name for d in plan.documents}


def published(layers: int = 24, rows: int = 30592, bert: bool = True) -> Checkpoint:
    """The headers of a 345M file of 2020 without args."""
    width, ffn, positions = 1024, 4096, 512 if bert else 1024
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (rows, width)}
    shapes["position_embeddings.weight"] = (positions, width)
    layer = {
        "attention.query_key_value.": (3 * width, width),
        "attention.dense.": (width, width),
        "mlp.dense_h_to_4h.": (ffn, width),
        "mlp.dense_4h_to_h.": (width, ffn),
    }
    for i in range(layers):
        for stem, shape in layer.items():
            shapes |= {f"layers.{{i}}.{stem}weight".replace("{i}", str(i)): shape}
            shapes |= {f"layers.{i}.{stem}bias": shape[:1]}
        for stem in ("input_layernorm.", "post_attention_layernorm."):
            shapes |= {f"layers.{i}.{stem}{kind}": (width,) for kind in ("weight", "bias")}
    shapes |= {f"final_layernorm.{kind}": (width,) for kind in ("weight", "bias")}
    if bert:
        shapes |= {"tokentype_embeddings.weight": (2, width), "lm_head.bias": (rows,)}
        shapes |= {"binary_head.weight": (2, width), "binary_head.bias": (2,)}
        for stem in ("lm_head.dense.", "pooler.dense."):
            shapes |= {stem + "weight": (width, width), stem + "bias": (width,)}
        shapes |= {f"lm_head.layernorm.{kind}": (width,) for kind in ("weight", "bias")}
    names = own_names("transformer")

    def own(name: str) -> str:
        number = next((p for p in name.split(".") if p.isdigit()), "")
        return "model." + names[name.replace(f".{number}.", ".{i}.") if number else name].replace(
            "{i}", number
        )

    file = "release/mp_rank_00/model_optim_rng.pt"
    return held({file: {own(n): shape for n, shape in shapes.items()}}, {"iteration": 1})


@pytest.mark.parametrize(
    ("rows", "bert", "words", "act"),
    [(30592, True, 30522, "gelu"), (29056, True, 28996, "gelu"), (50304, False, 50257, "gelu_new")],
)
def test_published_files_without_args_are_known_by_their_sizes(
    rows: int, bert: bool, words: int, act: str
) -> None:
    name = "megatron-bert" if bert else "megatron-gpt2"
    plan = family(name).plan(published(rows=rows, bert=bert), Options())
    config = values_of(plan)
    assert config["vocab_size"] == words
    assert config["num_attention_heads" if bert else "n_head"] == 16
    assert config["hidden_act" if bert else "activation_function"] == act
    assert config["layer_norm_eps" if bert else "layer_norm_epsilon"] == 1e-5
    count = sum(int(np.prod(t.shape)) for f in plan.outputs for t in f.tensors)
    whole = {30592: 336_297_858, 29056: 334_723_458, 50304: 354_871_296}[rows]
    assert count == whole - (rows - words) * (1025 if bert else 1024)
    assert any("no checkpoint_version" in n for n in plan.notes)


def test_other_sizes_without_args_ask_for_the_heads() -> None:
    (problem,) = refused(lambda: family("megatron-bert").plan(published(layers=23), Options()))
    assert problem[0] == "missing-fact" and "--set num_attention_heads=VALUE" in problem[1]
    options = Options(settings={"num_attention_heads": 16})
    assert values_of(family("megatron-bert").plan(published(layers=23), options))["num_hidden_layers"] == 23


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    """The cased vocabulary with the uncased weights, which a link confused once."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(28991))]))
    options = Options(tokenizer=str(vocabulary))
    (problem,) = refused(lambda: family("megatron-bert").plan(published(), options))
    assert problem[0] == "bad-tokenizer" and "28996" in problem[1] and "30592" in problem[1]
    plan = family("megatron-bert").plan(published(rows=29056), options)
    assert values_of(plan)["vocab_size"] == 28996


# --- numbers --------------------------------------------------------------------------------------------


FLAGS = {
    "bias_gelu_fusion": (None, False, True),
    "openai_gelu": (None, False, True),
    "onnx_safe": (None, True),
    "swiglu": (None, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gelus_and_epsilons_are_those_of_the_reference(name: str) -> None:
    """Two readings of the original's code, written apart, agree for all flags, versions and ages."""
    of_version_0 = Value("erf" if name == "megatron-bert" else "tanh", "")
    module = reference.original(name)
    for age, version in product(("transformer", "core"), VERSIONS):
        checkpoint, _ = original(name, version, age)
        shapes = {t.name: t.shape for t in checkpoint}
        for has_args, *flags in product((True, False), *FLAGS.values()):
            told = {k: v for k, v in zip(FLAGS, flags, strict=True) if v is not None}
            if not has_args and told:
                continue
            sizes = {k: v for k, v in args().items() if "gelu" not in k and "eps" not in k}
            params = {**sizes, **told} if has_args else None
            found = Run(checkpoint, {}, 1, L, params, age=age, files=[[""]], said_version=version)
            heads = {} if has_args else {"num_attention_heads": N}
            both = {**(params or {}), **({} if version is None else {"checkpoint_version": version})}
            c = module.Config.from_original(both, shapes, 1, heads)
            assert feed_forward_gelu(found, of_version_0).value == c.activation, (age, version, params)
            if name == "megatron-bert":
                assert lm_head_gelu(found).value == c.head_gelu, (age, version, params)


@pytest.mark.parametrize("key", ["layernorm_epsilon", "norm_epsilon"])
def test_the_epsilon_is_that_of_args(key: str) -> None:
    told = {k: v for k, v in args().items() if k != "layernorm_epsilon"}
    checkpoint, _ = original("megatron-bert", told={**told, key: 3e-6})
    eps = family("megatron-bert").plan(checkpoint, WITH_WORDS).config["layer_norm_eps"]
    assert (eps.value, eps.source) == (3e-6, f"args: {key}")
    checkpoint, _ = original("megatron-bert", told=told)
    eps = family("megatron-bert").plan(checkpoint, WITH_WORDS).config["layer_norm_eps"]
    assert eps.value == 1e-5 and eps.source.startswith("rule:")


@pytest.mark.usefixtures("few_prompts")
def test_two_gelus_are_told_and_come_back(tmp_path: Path) -> None:
    """hidden_act is the feed-forward's; parity shows the LM head's difference; the way back has both."""
    source, out, back = TWO_GELUS.write(tmp_path / "in"), tmp_path / "out", tmp_path / "back"
    made = api.convert(source, out)
    assert made.plan.config["hidden_act"].value == "gelu_new"
    assert ["the LM head's differs" in f.reason for f in made.plan.foretold] == [True]
    report = api.verify(out, source, levels=("parity",))
    wrong = [f for f in report.findings if f.status == "fail"]
    assert report.exit_code == 1 and any("head" in (f.message + str(f.where)) for f in wrong)
    api.convert(out, back, to="original")
    with open_checkpoint(back) as checkpoint:
        first = next(iter(checkpoint.files.values()))
        told = first.metadata["args"].fields
        assert (told["bias_gelu_fusion"], told["openai_gelu"]) == (True, False)


def test_what_the_architecture_cannot_say_is_told() -> None:
    flags = {
        "attention_softmax_in_fp32": True,
        "apply_query_key_layer_scaling": True,
    }
    for name in FAMILIES:
        checkpoint, _ = original(name, told={**args(), **flags})
        plan = family(name).plan(checkpoint, WITH_WORDS)
        assert any("apply_query_key_layer_scaling" in n for n in plan.notes)
    assert plan.config["reorder_and_upcast_attn"].value is True
    assert plan.config["reorder_and_upcast_attn"].source == "args: attention_softmax_in_fp32"


def test_settings_go_by_any_of_their_names() -> None:
    told = {k: v for k, v in args().items() if k != "num_attention_heads"}
    for settings in ({"n_head": N}, {"num_attention_heads": N}):
        checkpoint, _ = original("megatron-gpt2", told=told)
        plan = family("megatron-gpt2").plan(checkpoint, Options(settings=settings))
        assert (plan.config["n_head"].value, plan.config["n_head"].source) == (N, "--set")
    both = Options(settings={"n_head": N, "num_attention_heads": 1})
    assert refused(lambda: family("megatron-gpt2").plan(checkpoint, both))[0][0] == "usage"


# --- what is left out, what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("id", [v.id for v in VARIANTS.values() if v.original.training])
def test_no_tensor_of_the_optimizer_is_taken_for_one_of_the_model(id: str, tmp_path: Path) -> None:
    variant = VARIANTS[id]
    plan = api.plan(variant.write(tmp_path), options=Options(settings=variant.settings))
    dropped = {d.tensor.name for d in plan.dropped}
    assert any(name.endswith("rng_state") or name.startswith("optimizer.") for name in dropped)
    assert not any(name.startswith("model") for name in dropped if not name.endswith("_extra_state"))
    assert all(p.name.startswith("model") for s in plan.steps for p in s.sources)


@pytest.mark.parametrize(
    ("version", "told", "settings", "kinds"),
    [
        (4.0, {}, {}, {"config-mismatch"}),
        ("3", {}, {}, {"config-mismatch"}),
        (True, {}, {}, {"config-mismatch"}),
        (3.0, {"num_attention_heads": 5}, {}, {"config-mismatch"}),
        (3.0, {"num_attention_heads": None}, {}, {"missing-fact"}),
        (3.0, {"num_layers": 3}, {}, {"uncovered-tensors"}),
        (3.0, {"num_layers": 5}, {}, {"missing-tensor"}),
        (3.0, {"hidden_size": 32, "ffn_hidden_size": 41}, {}, {"config-mismatch"}),
        (3.0, {"padded_vocab_size": 128}, {}, {"config-mismatch"}),
        (3.0, {"swiglu": True, "normalization": "RMSNorm"}, {}, {"unsupported"}),
        (3.0, {"apply_layernorm_1p": True}, {}, {"unsupported"}),
        (3.0, {"apply_residual_connection_post_layernorm": True}, {}, {"unsupported"}),
        (3.0, {"kv_channels": 5}, {}, {"unsupported"}),
        (3.0, {"group_query_attention": True, "num_query_groups": 2}, {}, {"unsupported"}),
        (3.0, {"layernorm_epsilon": 0.0}, {}, {"bad-config"}),
        (3.0, {"tensor_model_parallel_size": 2}, {}, {"missing-shard"}),
        (3.0, {"pipeline_model_parallel_size": 3}, {}, {"missing-shard"}),
        (3.0, {}, {"vocab_size": V + 1}, {"config-mismatch"}),
        (3.0, {}, {"hidden_act": "relu"}, {"unsupported"}),
        (3.0, {}, {"no_such_thing": 1}, {"usage"}),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_that_do_not_fit_are_refused(
    name: str, version: Any, told: Mapping[str, Any], settings: Mapping[str, Any], kinds: set[str]
) -> None:
    _, bits = original(name)
    source = held(shapes_of(bits), beside(version, {**args(), **told}))
    found = refused(lambda: family(name).plan(source, Options(settings=settings)))
    assert {kind for kind, _ in found} == kinds, found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_layers_of_core_add_is_the_input_whatever_args_say(name: str) -> None:
    """A layer that would add what its norm gives calls the second norm otherwise, and is no table's."""
    for age in ("core", "core-fused"):
        plans = []
        for flag in (False, True):
            checkpoint, bits = original(
                name, age=age, told=args(apply_residual_connection_post_layernorm=flag)
            )
            plans.append(family(name).plan(checkpoint, WITH_WORDS))
        one, other = plans
        assert (one.config, [*one.steps], one.notes) == (other.config, [*other.steps], other.notes)
    _, bits = original(name, age="core")
    early = {
        file: {n.replace("pre_mlp_layernorm", "post_self_attn_layernorm"): x for n, x in arrays.items()}
        for file, arrays in shapes_of(bits).items()
    }
    assert early != shapes_of(bits)
    found = refused(lambda: family(name).plan(held(early, beside(None, args())), WITH_WORDS))
    assert found and {kind for kind, _ in found} <= {"unsupported", "missing-tensor", "uncovered-tensors"}


def test_groups_are_only_grouped_where_args_say_so() -> None:
    """num_query_groups is 1 in args that do not group queries."""
    checkpoint, _ = original("megatron-gpt2", told=args(num_query_groups=1, group_query_attention=False))
    plan = family("megatron-gpt2").plan(checkpoint, WITH_WORDS)
    fused = [s for s in plan.steps if any("c_attn.weight" in p.name for p in s.targets)]
    assert fused and all({"t", "n", "h"} <= set(s.sizes) for s in fused)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda files: files.popitem(), "missing-shard", "mp_rank_01"),
        (lambda files: files[list(files)[1]].metadata.update(iteration=20), "shard-conflict", "iteration 10"),
        (
            lambda files: files[list(files)[1]].metadata.update(checkpoint_version=2.0),
            "shard-conflict",
            "checkpoint_version 3.0",
        ),
        (lambda files: files[list(files)[1]].metadata.pop("args"), "shard-conflict", "args"),
        (lambda files: _resize(files[list(files)[1]]), "shard-conflict", "input_layernorm"),
    ],
)
def test_ranks_must_belong_together(
    change: Callable[[dict[str, Headers]], object], kind: str, words: str
) -> None:
    checkpoint, _ = original("megatron-bert", ranks=2)
    for file in checkpoint.files.values():
        file.metadata = dict(file.metadata)
    change(checkpoint.files)  # type: ignore[arg-type]
    found = refused(lambda: family("megatron-bert").plan(checkpoint, WITH_WORDS))
    assert found[0][0] == kind and words in found[0][1]


def _resize(file: Headers) -> None:
    name = "model.language_model.encoder.layers.0.input_layernorm.weight"
    file.tensors = {**file.tensors, name: replace(file.tensors[name], shape=(D + 1,))}


@pytest.mark.parametrize("missing", ["rank", "stage"])
def test_a_missing_rank_shows_without_args_too(missing: str) -> None:
    ranks, depth = (2, 1) if missing == "rank" else (1, 2)
    _, bits = original("megatron-gpt2", None, "transformer", ranks, STAGES[depth])
    first = next(iter(bits))[0]
    left = {k: v for k, v in bits.items() if k[0] == first}
    source = held(shapes_of(left), beside(None, None))
    (problem,) = refused(lambda: family("megatron-gpt2").plan(source, WITH_WORDS))
    assert problem[0] == "missing-shard"


def test_heads_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    checkpoint, bits = original("megatron-gpt2")
    plan = family("megatron-gpt2").plan(checkpoint, WITH_WORDS)
    made = carried_out(plan, bits)
    folder = converted(plan, made, tmp_path)
    for asked in ({"tensor_parallel": 3}, {"tensor_parallel": 8}, {"pipeline_parallel": 3}):
        found = refused(
            lambda: family("megatron-gpt2").plan_original(folder, Options(family_options=asked))  # noqa: B023
        )
        assert {kind for kind, _ in found} == {"config-mismatch"}


def test_unknown_tensors_of_the_model_are_not_dropped_silently() -> None:
    _, bits = original("megatron-bert")
    first = next(iter(bits))[0]
    bits[first, "model.sentiment_head.weight"] = np.zeros((3, D), np.uint32)
    source = held(shapes_of(bits), beside(3.0, args()))
    (problem,) = refused(lambda: family("megatron-bert").plan(source, WITH_WORDS))
    assert problem[0] == "uncovered-tensors" and "sentiment_head" in problem[1]


def test_a_converted_folder_is_not_an_original() -> None:
    for name in FAMILIES:
        source = held({"model.safetensors": {n: t.shape for n, t in truth(name).items()}}, {})
        assert not family(name).recognise(source)[0]
        (problem,) = refused(lambda: family(name).plan(source, Options()))  # noqa: B023
        assert problem[0] == "already-converted"


# --- what is written ------------------------------------------------------------------------------------


def test_what_is_written_is_what_megatron_loads(tmp_path: Path) -> None:
    """torch opens it with nothing but argparse, and finds the dicts of that age."""
    variant = VARIANTS["bert-ngc-uncased"]
    source = variant.write(tmp_path / "in")
    api.convert(source, tmp_path / "hf", options=Options(settings=variant.settings))
    asked = {"tensor_parallel": 2, "pipeline_parallel": 2, "checkpoint_version": "2.0"}
    options = Options(family_options=asked)
    api.convert(tmp_path / "hf", tmp_path / "back", to="original", options=options)
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "release"
    at = tmp_path / "back" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(at, weights_only=True)
    assert loaded["checkpoint_version"] == 2.0 and loaded["iteration"] == 1
    told = loaded["args"]
    assert (told.num_layers, told.num_attention_heads, told.model_parallel_size) == (
        variant.original.layers,
        variant.original.heads,
        2,
    )
    language = loaded["model"]["language_model"]
    assert "embedding" not in language and "dense.weight" in language["pooler"]
    assert "layers.0.attention.query_key_value.weight" in language["transformer"]
    assert set(loaded["model"]["lm_head"]) == {
        *("bias", "dense.weight", "dense.bias", "layernorm.weight", "layernorm.bias")
    }
    assert loaded["model"]["word_embeddings_for_head"]["weight"].shape[0] == told.padded_vocab_size // 2
    api.convert(tmp_path / "back", tmp_path / "again")
    first, second = (tmp_path / n / "model.safetensors" for n in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()
    api.convert(tmp_path / "hf", tmp_path / "once more", to="original", options=options)
    assert at.read_bytes() == (tmp_path / "once more" / at.relative_to(tmp_path / "back")).read_bytes()


@pytest.mark.usefixtures("few_prompts")
def test_verify_reads_ranks_stages_and_padding(tmp_path: Path) -> None:
    for id in ("gpt2-v3-virtual", "bert-v2-tp2"):
        variant = VARIANTS[id]
        source, out, back = (tmp_path / id / n for n in ("in", "out", "back"))
        variant.write(source)
        options = Options(settings=variant.settings)
        api.convert(source, out, options=options)
        report = api.verify(out, source, levels=("coverage", "bits", "parity"), settings=variant.settings)
        assert report.exit_code == 0, [f for f in report.findings if f.status == "fail"]
        api.convert(out, back, to="original", options=Options(family_options={"pipeline_parallel": 2}))
        assert api.verify(back, out, levels=("coverage", "bits")).exit_code == 0


def test_kept_padding_is_verified_as_kept(tmp_path: Path) -> None:
    variant = VARIANTS["gpt2-v2-tp2"]
    source, out = variant.write(tmp_path / "in"), tmp_path / "out"
    api.convert(source, out, options=Options(family_options={"keep_padding": True}))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == variant.original.padded
    assert api.verify(out, source, levels=("coverage", "bits")).exit_code == 0


class Lenient:
    """A pickle module for torch.load that makes objects of classes which are not installed empty ones."""

    load = staticmethod(pickle.load)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.partition(".")[0] in ("torch", "collections", "argparse", "numpy", "_codecs"):
                return super().find_class(module, name)
            return type(name, (), {"__init__": lambda *_: None, "__setstate__": lambda *_: None})


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Save the model in `file` again after `change` to it."""
    loaded = torch.load(file, weights_only=False, map_location="cpu", pickle_module=Lenient)
    change(loaded["model"])
    plain = {k: v for k, v in vars(loaded["args"]).items() if isinstance(v, int | float | str | None)}
    left = {k: loaded[k] for k in ("model", "checkpoint_version", "iteration")}
    torch.save({**left, "args": argparse.Namespace(**plain)}, file)


def one_bit_up(norm: torch.Tensor) -> None:
    norm[0] = torch.nextafter(norm[0], torch.tensor(9.0, dtype=norm.dtype))


def test_copies_on_ranks_may_drift_and_not_differ(tmp_path: Path) -> None:
    source = VARIANTS["gpt2-v2-tp2"].write(tmp_path / "in")
    file = next(source.glob("*/mp_rank_01/*.pt"))
    name = "layers.0.input_layernorm.weight"
    changed(file, lambda model: one_bit_up(model["language_model"]["transformer"][name]))
    made = api.convert(source, tmp_path / "out")
    assert [f.kind for f in made.outcome.findings] == ["replica-difference"]
    strict = Options(strict_replicas=True)
    ((kind, _),) = refused(lambda: api.convert(source, tmp_path / "strict", options=strict))
    assert kind == "shard-conflict"
    changed(file, lambda model: model["language_model"]["transformer"][name].mul_(1.5))
    ((kind, line),) = refused(lambda: api.convert(source, tmp_path / "none"))
    assert kind == "shard-conflict" and name in line and "mp_rank_01" in line
    assert not (tmp_path / "none").exists()


def test_a_table_of_words_that_differs_on_the_last_stage_is_refused(tmp_path: Path) -> None:
    source = VARIANTS["gpt2-v3-tp2-pp2"].write(tmp_path / "in")
    for file in source.glob("*/*/*.pt"):
        changed(file, lambda model: None)
    api.convert(source, tmp_path / "out")
    file = next(source.glob("*/mp_rank_00_001/*.pt"))
    changed(file, lambda model: model["word_embeddings_for_head"]["weight"][5].add_(1))
    ((kind, line),) = refused(lambda: api.convert(source, tmp_path / "none"))
    assert kind == "tied-mismatch" and "word_embeddings_for_head" in line
