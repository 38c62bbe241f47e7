"""The family tables from headers and small arrays: no container is written or read here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, Document, TensorInfo
from ckpt_tool.convert.families import FAMILIES, family, llama
from ckpt_tool.convert.layout import apply
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.consolidated import Original
from ckpt_tool.fixtures.families import llama as llamas
from ckpt_tool.fixtures.headers import REAL
from ckpt_tool.fixtures.variants import VARIANTS
from tests.headers_only import Headers

CONSOLIDATED: dict[str, Any] = {k: v for k, v in VARIANTS.items() if isinstance(v.original, Original)}
Arrays = dict[tuple[str, str], np.ndarray]  # (file, tensor) -> raw bits


def checkpoint_of(
    folder: Path,
    files: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
    documents: Mapping[str, bytes],
) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, content in documents.items():
        (folder / name).write_bytes(content)
        found[name] = Document(name, folder / name, len(content))
    held = {f: Headers(f, [(n, *h) for n, h in tensors.items()]) for f, tensors in files.items()}
    return Checkpoint(folder, held, found)


def opened(original: Original, folder: Path, **documents: bytes) -> Checkpoint:
    """`original` as headers, with its params.json."""
    files = {f: {n: (d, s) for n, d, s in rows} for f, rows in original.headers.items()}
    return checkpoint_of(folder, files, {"params.json": json.dumps(original.params).encode(), **documents})


def planned(source: Original, folder: Path, name: str, **settings: Any) -> Plan:
    return family(name).plan(opened(source, folder), Options(settings=settings))


def refused(make: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        make()
    return caught.value


def values_of(plan: Plan) -> dict[str, Any]:
    return {k: v.value for k, v in plan.config.items()}


def document(plan: Plan, name: str) -> bytes:
    return next(d.content for d in plan.documents if d.name == name)


def contents(original: Original) -> Arrays:
    """Different bits for every element of the model; ranks hold shares and copies of the same ones."""
    random = np.random.default_rng(7)
    whole: dict[str, np.ndarray] = {}
    made: Arrays = {}
    for file, tensors in original.files.items():
        for t in tensors:
            kind = DTYPES[t.dtype].bits
            for name in t.of:
                if name not in whole:
                    whole[name] = random.integers(0, np.iinfo(kind).max, t.whole, dtype=kind)
            array = np.concatenate([whole[n].T if t.transposed else whole[n] for n in t.of])
            if t.cut is not None:
                axis, start, stop = t.cut
                array = array.take(range(start, stop), axis)
            made[file, t.name] = np.ascontiguousarray(array)
    return made


def carried_out(plan: Plan, source: Arrays) -> Arrays:
    """The tensors a plan makes; what it compares must be equal."""
    made: Arrays = {}
    compared = []
    for step in plan.steps:
        results = apply(step, [source[p.file, p.name] for p in step.sources])
        places = [(p.file, p.name) for p in step.targets]
        if step.compare:
            compared.append((step, places[0], results[0]))
        else:
            made.update(zip(places, results, strict=True))
    for step, place, array in compared:
        box = step.domain()
        part = step.targets[0]
        if all(box[a] == (0, n) for a, n in step.axes):
            np.testing.assert_array_equal(made[place], array)
        else:  # a share of the target: some of its heads
            head = part.order[0]
            start, stop = box[head]
            rows = prod(n for a, n in step.axes if a in part.dims[0] and a != head)
            np.testing.assert_array_equal(
                made[place][start * rows : stop * rows], array[start * rows : stop * rows]
            )
    assert made.keys() == {(f.name, t.name) for f in plan.outputs for t in f.tensors}
    assert all(made[f.name, t.name].shape == t.shape for f in plan.outputs for t in f.tensors)
    return made


def output(plan: Plan, folder: Path, manifest: bool = True) -> Checkpoint:
    """What opening the output of `plan` would give."""
    files = {f.name: {t.name: (t.dtype, t.shape) for t in f.tensors} for f in plan.outputs}
    documents = {d.name: d.content for d in plan.documents}
    if manifest:
        documents["ckpt-tool.json"] = json.dumps({"original": dict(plan.original)}).encode()
    return checkpoint_of(folder, files, documents)


def way_back(variant: Any, plan: Plan, folder: Path, manifest: bool = True) -> Plan:
    options: dict[str, Any] = {}
    (first, *_) = variant.original.files
    if variant.family == "mixtral":
        options["form"] = {"pth": "A", "pt": "B", "safetensors": "C"}[first.rsplit(".", 1)[1]]
    if variant.family == "mistral":
        options["container"] = "pth" if first.endswith(".pth") else "safetensors"
    ranks = variant.original.sizes.get("r", 1)
    said = {n: v for n, v in variant.settings.items() if n == "rope_scaling" and not manifest}
    return family(variant.family).plan_original(
        output(plan, folder, manifest), Options(shards=ranks, family_options=options, settings=said)
    )


# --- both directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONSOLIDATED)
def test_round_trips_are_bitwise(name: str, tmp_path: Path) -> None:
    variant = CONSOLIDATED[name]
    original = contents(variant.original)
    plan = planned(variant.original, tmp_path / "a", variant.family, **variant.settings)
    converted = carried_out(plan, original)
    back = way_back(variant, plan, tmp_path / "b")
    returned = carried_out(back, converted)
    dropped = {d.tensor.name for d in plan.dropped}
    assert all(n.endswith("rope.freqs") for n in dropped)
    kept = {k: v for k, v in original.items() if k[1] not in dropped}
    if variant.family == "llama" or len(variant.original.files) == 1:
        assert returned.keys() == kept.keys()
        assert all(np.array_equal(returned[k], kept[k]) for k in kept)
    else:  # whole tensors, which may be dealt out to other files
        by_name = {n: v for (_, n), v in returned.items()}
        assert by_name.keys() == {n for _, n in kept}
        assert all(np.array_equal(by_name[n], v) for (_, n), v in kept.items())
    again = family(variant.family).plan(output(back, tmp_path / "c"), Options(settings=variant.settings))
    once_more = carried_out(again, returned)
    assert once_more.keys() == converted.keys()
    assert all(np.array_equal(once_more[k], converted[k]) for k in converted)
    assert values_of(again) == values_of(plan)


@pytest.mark.parametrize("name", CONSOLIDATED)
def test_params_json_comes_back(name: str, tmp_path: Path) -> None:
    """With the manifest as it was; without it in other words that mean the same."""
    variant = CONSOLIDATED[name]
    plan = planned(variant.original, tmp_path / "a", variant.family, **variant.settings)
    if not variant.settings:
        back = way_back(variant, plan, tmp_path / "b")
        assert document(back, "params.json") == json.dumps(variant.original.params).encode()
    derived = way_back(variant, plan, tmp_path / "c", manifest=False)
    again = family(variant.family).plan(output(derived, tmp_path / "d"), Options(settings=variant.settings))
    assert values_of(again) == values_of(plan)


def test_an_edited_config_is_followed_and_not_the_kept_params(tmp_path: Path) -> None:
    variant = CONSOLIDATED["mistral-7b-v0.1"]
    plan = planned(variant.original, tmp_path / "a", "mistral")
    folder = output(plan, tmp_path / "b")
    config = json.loads(document(plan, "config.json")) | {"rope_theta": 77777.0}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    size = (tmp_path / "b" / "config.json").stat().st_size
    folder.documents["config.json"] = replace(folder.documents["config.json"], size=size)
    back = family("mistral").plan_original(folder, Options())
    assert json.loads(document(back, "params.json"))["rope_theta"] == 77777.0
    assert any("rope_theta" in n for n in back.notes)


def test_config_of_transformers_5_is_read_as_that_of_4(tmp_path: Path) -> None:
    variant = CONSOLIDATED["llama-3.1-8b"]
    plan = planned(variant.original, tmp_path / "a", "llama")
    config = json.loads(document(plan, "config.json"))
    rope = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    config |= {"rope_parameters": rope, "dtype": config.pop("torch_dtype")}
    files = {f.name: {t.name: (t.dtype, t.shape) for t in f.tensors} for f in plan.outputs}
    folder = checkpoint_of(tmp_path / "b", files, {"config.json": json.dumps(config).encode()})
    params = json.loads(document(family("llama").plan_original(folder, Options()), "params.json"))
    assert params["rope_theta"] == 5e5 and params["use_scaled_rope"] is True


def test_fewer_key_value_heads_than_ranks_are_copied_to_ranks(tmp_path: Path) -> None:
    """As Llama 3.1 405B for 16 ranks: each rank holds one head and n_kv_heads counts the copies."""
    variant = CONSOLIDATED["llama-3.1-405b-mp16"]
    plan = planned(variant.original, tmp_path / "a", "llama", num_key_value_heads=8)
    back = family("llama").plan_original(output(plan, tmp_path / "b"), Options(shards=16))
    assert json.loads(document(back, "params.json"))["n_kv_heads"] == 16
    made = carried_out(back, carried_out(plan, contents(variant.original)))
    for name in ("layers.0.attention.wk.weight", "layers.1.attention.wv.weight"):
        shares = [made[f"consolidated.{r:02d}.pth", name] for r in range(16)]
        assert all(np.array_equal(shares[r], shares[r + 1]) for r in range(0, 16, 2))
        assert not np.array_equal(shares[0], shares[2])


def test_ranks_that_hold_copies_of_fewer_heads_are_told_by_params(tmp_path: Path) -> None:
    """A checkpoint resharded to more ranks with its params.json left as it was."""
    variant = CONSOLIDATED["llama-3.1-405b-mp16"]
    params = {**variant.original.params, "n_kv_heads": 8}
    plan = planned(replace(variant.original, params=params), tmp_path, "llama")
    assert plan.config["num_key_value_heads"].value == 8
    assert any("the copies compared" in n for n in plan.notes)
    copies = [s for s in plan.steps if s.compare == "replicated" and "k_proj" in s.targets[0].name]
    assert len(copies) == 8 * plan.config["num_hidden_layers"].value


def test_mistral_window_without_theta_is_the_first_release(tmp_path: Path) -> None:
    with_window = CONSOLIDATED["mistral-7b-v0.1"].original
    theta = planned(with_window, tmp_path / "a", "mistral").config["rope_theta"]
    assert theta.value == 1e4 and "sliding_window" in theta.source and "rule" in theta.source
    params = {k: v for k, v in with_window.params.items() if k != "sliding_window"}
    theta = planned(replace(with_window, params=params), tmp_path / "b", "mistral").config["rope_theta"]
    assert theta.value == 1e6


@pytest.mark.parametrize(
    ("window", "meant"), [(32, 32), ("32", 32), ([32], 32), ([None, None], None), (None, None)]
)
def test_every_form_of_a_sliding_window(window: Any, meant: int | None, tmp_path: Path) -> None:
    original = CONSOLIDATED["mistral-7b-v0.3"].original
    for key in ("sliding_window", "_sliding_window"):
        params = {**original.params, key: window}
        plan = planned(replace(original, params=params), tmp_path / key, "mistral")
        assert plan.config["sliding_window"].value == meant
        assert json.loads(document(plan, "config.json"))["sliding_window"] == meant


# --- real sizes -----------------------------------------------------------------------------------------

PARAMETERS = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-30b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "code-llama-7b": 6_738_546_688,
    "code-llama-13b": 13_016_028_160,
    "code-llama-34b": 33_743_970_304,
    "code-llama-70b": 68_976_910_336,
    "code-llama-70b-python": 68_976_910_336,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b-mp8": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "mistral-small": 23_572_403_200,
    "mistral-large": 122_610_069_504,
    "mixtral-8x7b-a": 46_702_792_704,
    "mixtral-8x7b-b": 46_702_792_704,
    "mixtral-8x22b-v0.1": 140_620_634_112,
    "mixtral-8x22b-v0.3": 140_630_071_296,
}
CONTEXT = {
    "llama-1-7b": 2048,
    "llama-1-65b": 2048,
    "llama-2-70b": 4096,
    "code-llama-34b": 16384,
    "code-llama-70b": 16384,
    "code-llama-70b-python": 4096,
    "llama-3-70b": 8192,
    "llama-3.1-405b-mp8": 131072,
    "mistral-7b-v0.1": 32768,
    "mistral-nemo": 131072,
    "mixtral-8x22b-v0.3": 65536,
}


def family_of(model: str) -> str:
    publisher = model.split("-")[0]
    return "llama" if publisher == "code" else publisher


@pytest.mark.parametrize("model", PARAMETERS)
def test_every_published_size_is_planned_whole(model: str, tmp_path: Path) -> None:
    plan = planned(REAL[model](), tmp_path, family_of(model))
    tensors = [t for f in plan.outputs for t in f.tensors]
    assert sum(t.numel for t in tensors) == PARAMETERS[model]
    assert len({t.name for t in tensors}) == len(tensors)
    assert all(v.source for v in plan.config.values())
    assert all("rope.freqs" in d.tensor.name for d in plan.dropped)
    assert plan.config["max_position_embeddings"].value == CONTEXT.get(
        model, plan.config["max_position_embeddings"].value
    )
    assert plan.bytes_out == 2 * PARAMETERS[model]


def test_heads_stored_twice_are_kept_or_merged(tmp_path: Path) -> None:
    original = REAL["llama-3.1-405b-mp16"]()
    kept = planned(original, tmp_path / "a", "llama")
    assert kept.config["num_key_value_heads"].value == 16
    assert any("num_key_value_heads=8" in n for n in kept.notes)
    merged = planned(original, tmp_path / "b", "llama", num_key_value_heads=8)
    assert sum(t.numel for f in merged.outputs for t in f.tensors) == PARAMETERS["llama-3.1-405b-mp8"]
    copies = [s for s in merged.steps if s.compare == "replicated" and "k_proj" in s.targets[0].name]
    assert len(copies) == 126 * 8


@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.2-3b"])
def test_small_llama_3_is_tied_and_stretched_32_times(model: str, tmp_path: Path) -> None:
    plan = planned(REAL[model](), tmp_path, "llama")
    assert plan.config["tie_word_embeddings"].value is True
    assert plan.config["rope_scaling"].value["factor"] == 32.0
    assert [s.compare for s in plan.steps if s.sources[0].name == "output.weight"] == ["tied"]
    assert "lm_head.weight" not in {t.name for f in plan.outputs for t in f.tensors}


def test_other_scaled_llamas_are_stretched_8_times(tmp_path: Path) -> None:
    plan = planned(REAL["llama-3.1-8b"](), tmp_path, "llama")
    assert plan.config["rope_scaling"].value == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


# --- recognising ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", REAL)
def test_one_family_recognises_each_download(model: str, tmp_path: Path) -> None:
    checkpoint = opened(REAL[model](), tmp_path)
    said = {f: family(f).recognise(checkpoint) for f in FAMILIES}
    assert [f for f, (own, _) in said.items() if own] == [family_of(model)], said
    assert all(why for _, why in said.values())


DECODERS = ("mistral", "mixtral", "llama")  # the families of Meta's and Mistral's tensor names


@pytest.mark.parametrize("name", ["mistral-7b-v0.3", "mixtral-c", "llama-2-7b"])
def test_converted_folders_are_no_originals(name: str, tmp_path: Path) -> None:
    variant = CONSOLIDATED[name]
    folder = output(planned(variant.original, tmp_path / "a", variant.family), tmp_path / "b")
    for f in FAMILIES:
        assert not family(f).recognise(folder)[0]
    for f in DECODERS:
        assert "Hugging Face" in family(f).recognise(folder)[1]
        make = partial(family(f).plan, folder, Options())
        assert refused(make).kind == "already-converted"


@pytest.mark.parametrize(
    ("tensor", "word"),
    [("vision_encoder.conv.weight", "image"), ("layers.0.attention.wq.lora_A.weight", "LoRA")],
)
def test_more_than_a_plain_text_model_is_refused(tensor: str, word: str, tmp_path: Path) -> None:
    checkpoint = opened(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path)
    file = next(iter(checkpoint.files))
    checkpoint.files[file].tensors = {
        **checkpoint.files[file].tensors,
        tensor: TensorInfo(tensor, "BF16", (4, 4), file),
    }
    assert all(word in family(f).recognise(checkpoint)[1] for f in DECODERS)
    error = refused(lambda: family("mistral").plan(checkpoint, Options()))
    assert error.kind == "unsupported" and word in str(error)


# --- what is wrong is said ------------------------------------------------------------------------------


def with_params(name: str, **changes: Any) -> Original:
    """The variant with fields of params.json changed; `...` removes one."""
    original = CONSOLIDATED[name].original
    params = {k: v for k, v in {**original.params, **changes}.items() if v is not ...}
    return replace(original, params=params)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "words"),
    [
        ("mistral-7b-v0.3", {"n_heads": 5}, "config-mismatch", ("5", "num_attention_heads")),
        ("mistral-7b-v0.3", {"n_heads": 12}, "config-mismatch", ("120", "60", "attention.wq", "n_heads")),
        ("mistral-7b-v0.3", {"n_kv_heads": 6}, "config-mismatch", ("60", "30", "attention.wk")),
        ("mistral-7b-v0.3", {"n_kv_heads": ...}, "config-mismatch", ("n_kv_heads absent",)),
        ("mistral-7b-v0.3", {"hidden_dim": 90}, "config-mismatch", ("90", "88", "hidden_dim", "w1")),
        ("mistral-7b-v0.3", {"dim": 64}, "config-mismatch", ("64", "60", "dim")),
        ("mistral-7b-v0.3", {"vocab_size": 353}, "config-mismatch", ("353", "352", "vocab_size")),
        ("mistral-7b-v0.3", {"head_dim": 9}, "config-mismatch", ("9", "head_dim")),
        (
            "mistral-7b-v0.3",
            {"n_layers": 3},
            "uncovered-tensors",
            ("3 layers", "layer 3 left over", "n_layers"),
        ),
        ("mistral-7b-v0.3", {"n_layers": 6}, "missing-tensor", ("6 layers", "layers.5.attention.wq.weight")),
        ("mistral-7b-v0.3", {"n_heads": 0}, "config-mismatch", ("n_heads", "found 0")),
        ("mistral-7b-v0.3", {"n_heads": -6}, "config-mismatch", ("found -6",)),
        ("mistral-7b-v0.3", {"n_layers": 2**62}, "config-mismatch", (str(2**62),)),
        ("mistral-7b-v0.3", {"n_heads": "6"}, "bad-config", ("n_heads", '"6"')),
        ("mistral-7b-v0.3", {"n_heads": True}, "bad-config", ("n_heads", "true")),
        ("mistral-7b-v0.3", {"norm_eps": 0}, "bad-config", ("norm_eps",)),
        ("mistral-7b-v0.3", {"norm_eps": ...}, "missing-fact", ("norm_eps", "--set rms_norm_eps")),
        ("mistral-7b-v0.3", {"rope_theta": -1}, "bad-config", ("rope_theta", "-1")),
        ("mistral-7b-v0.1", {"sliding_window": 0}, "bad-config", ("sliding_window",)),
        ("mistral-7b-v0.1", {"_sliding_window": 64}, "bad-config", ("_sliding_window", "64", "32")),
        ("mistral-7b-v0.1", {"sliding_window": [32, None]}, "unsupported", ("several",)),
        ("mistral-7b-v0.3", {"model_type": "mamba"}, "unsupported", ("mamba",)),
        ("mistral-7b-v0.3", {"lora": {"rank": 4, "alpha": 8}}, "unsupported", ("lora",)),
        (
            "mixtral-a",
            {"moe": {"num_experts": 7, "num_experts_per_tok": 2}},
            "config-mismatch",
            ("7", "8", "gate"),
        ),
        ("mixtral-a", {"moe": {"num_experts": 8, "num_experts_per_tok": 9}}, "config-mismatch", ("9",)),
        ("mixtral-b-native", {"hidden_dim": 45}, "config-mismatch", ("hidden_dim",)),
        ("llama-2-70b", {"multiple_of": 64}, "config-mismatch", ("intermediate_size", "multiple_of")),
        ("llama-2-70b", {"n_kv_heads": 12}, "config-mismatch", ("num_key_value_heads 12",)),
        ("llama-2-70b", {"sliding_window": 64}, "unsupported", ("sliding window",)),
    ],
)
def test_params_that_contradict_the_tensors(
    name: str, changes: dict[str, Any], kind: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    error = refused(lambda: planned(with_params(name, **changes), tmp_path, CONSOLIDATED[name].family))
    assert error.kind == kind, error
    assert all(w in str(error) for w in words), error


def test_all_contradictions_are_told_at_once(tmp_path: Path) -> None:
    changed = with_params("mistral-7b-v0.3", hidden_dim=90, vocab_size=353, n_kv_heads=6)
    error = refused(lambda: planned(changed, tmp_path, "mistral"))
    assert {p.where for p in error.problems} == {"intermediate_size", "vocab_size", "num_key_value_heads"}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "mistral-7b-v0.1",
            {"num_attention_heads": 6, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 32},
        ),
        (
            "mistral-nemo",
            {"num_attention_heads": 6, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
        ),
        (
            "mixtral-b",
            {
                "num_attention_heads": 6,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "sliding_window": None,
                "num_experts_per_tok": 2,
            },
        ),
        ("llama-2-70b", {"num_attention_heads": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4}),
        ("llama-1-13b", {"num_attention_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4}),
    ],
)
def test_without_params_json_facts_are_asked_for_by_name(
    name: str, facts: dict[str, Any], tmp_path: Path
) -> None:
    variant = CONSOLIDATED[name]
    checkpoint = opened(variant.original, tmp_path)
    del checkpoint.documents["params.json"]
    error = refused(lambda: family(variant.family).plan(checkpoint, Options()))
    assert {p.kind for p in error.problems} == {"missing-fact"}
    assert {p.where for p in error.problems} == set(facts)
    assert all(p.hint is not None and f"--set {p.where}=" in p.hint for p in error.problems)
    plan = family(variant.family).plan(
        checkpoint,
        Options(
            settings={**facts, "max_position_embeddings": variant.true_config["max_position_embeddings"]}
        ),
    )
    config = values_of(plan)
    assert {k: config[k] for k in variant.true_config} == variant.true_config
    assert plan.config["num_attention_heads"].source == "--set"


def changed_headers(
    checkpoint: Checkpoint, file: str, change: Callable[[dict[str, TensorInfo]], object]
) -> Checkpoint:
    tensors = dict(checkpoint.files[file].tensors)
    change(tensors)
    checkpoint.files[file].tensors = tensors
    return checkpoint


def test_a_missing_last_shard_is_seen_from_the_shapes(tmp_path: Path) -> None:
    checkpoint = opened(CONSOLIDATED["llama-2-70b"].original, tmp_path)
    del checkpoint.files["consolidated.07.pth"]
    error = refused(lambda: family("llama").plan(checkpoint, Options()))
    assert error.kind == "missing-shard" and "8" in str(error) and "found 7" in str(error)


def test_a_shard_of_another_model_names_the_ranks(tmp_path: Path) -> None:
    checkpoint = opened(CONSOLIDATED["llama-2-70b"].original, tmp_path)
    other = opened(CONSOLIDATED["llama-3-70b"].original, tmp_path / "other")
    checkpoint.files["consolidated.03.pth"] = other.files["consolidated.03.pth"]
    error = refused(lambda: family("llama").plan(checkpoint, Options()))
    assert {p.kind for p in error.problems} == {"shard-conflict"}
    assert "rank 3" in str(error) and "rank 0" in str(error)


def test_a_rank_without_one_tensor_is_a_conflict(tmp_path: Path) -> None:
    checkpoint = opened(CONSOLIDATED["llama-1-13b"].original, tmp_path)
    changed_headers(checkpoint, "consolidated.01.pth", lambda t: t.pop("layers.1.attention.wo.weight"))
    error = refused(lambda: family("llama").plan(checkpoint, Options()))
    assert error.kind == "shard-conflict" and "layers.1.attention.wo.weight" in str(error)


def test_one_wrong_shape_is_that_tensors_fault(tmp_path: Path) -> None:
    name = "layers.2.feed_forward.w2.weight"

    def transpose(tensors: dict[str, TensorInfo]) -> None:
        tensors[name] = replace(tensors[name], shape=tensors[name].shape[::-1])

    checkpoint = opened(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path)
    changed_headers(checkpoint, "consolidated.safetensors", transpose)
    error = refused(lambda: family("mistral").plan(checkpoint, Options()))
    assert [(p.kind, p.where) for p in error.problems] == [("shape-mismatch", name)]
    assert "(60, 88)" in str(error) and "(88, 60)" in str(error)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_one_tensor_of_another_kind_of_numbers(dtype: str, tmp_path: Path) -> None:
    name = "layers.1.attention.wv.weight"
    checkpoint = opened(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path)
    changed_headers(
        checkpoint, "consolidated.safetensors", lambda t: t.update({name: replace(t[name], dtype=dtype)})
    )
    error = refused(lambda: family("mistral").plan(checkpoint, Options()))
    assert [(p.kind, p.where) for p in error.problems] == [("unsupported-dtype", name)]


def test_unknown_tensors_are_refused_or_dropped_by_name(tmp_path: Path) -> None:
    extra = [f"layers.{i}.attention.wq.scale" for i in (1, 2, 3)]

    def add(tensors: dict[str, TensorInfo]) -> None:
        tensors.update({n: TensorInfo(n, "BF16", (1,), "consolidated.safetensors") for n in extra})

    checkpoint = opened(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path)
    changed_headers(checkpoint, "consolidated.safetensors", add)
    error = refused(lambda: family("mistral").plan(checkpoint, Options()))
    assert [p.kind for p in error.problems] == ["uncovered-tensors"]
    assert error.problems[0].where == "layers.{1..3}.attention.wq.scale"
    plan = family("mistral").plan(checkpoint, Options(drop=tuple(extra)))
    assert [d.tensor.name for d in plan.dropped] == extra


def test_what_cannot_be_dropped_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = opened(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path)
    error = refused(lambda: family("mistral").plan(checkpoint, Options(drop=("norm.weight", "nomr.weight"))))
    assert [(p.kind, p.file, p.where) for p in error.problems] == [
        ("usage", "--drop", "nomr.weight"),
        ("usage", "--drop", "norm.weight"),
    ]
    none, needed = (p.message.rpartition("found ")[2] for p in error.problems)
    assert (none, needed) == ("none of that name", "one that it needs")


def test_missing_tensors_are_all_listed(tmp_path: Path) -> None:
    gone = ["layers.1.attention.wo.weight", "layers.3.ffn_norm.weight", "norm.weight"]
    checkpoint = opened(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path)
    changed_headers(checkpoint, "consolidated.safetensors", lambda t: [t.pop(n) for n in gone])
    error = refused(lambda: family("mistral").plan(checkpoint, Options()))
    assert [(p.kind, p.where) for p in error.problems] == [("missing-tensor", n) for n in gone]


def test_a_head_that_is_not_there_is_asked_about(tmp_path: Path) -> None:
    checkpoint = opened(CONSOLIDATED["llama-3.2-1b"].original, tmp_path)
    changed_headers(checkpoint, "consolidated.00.pth", lambda t: t.pop("output.weight"))
    error = refused(lambda: family("llama").plan(checkpoint, Options()))
    assert error.kind == "missing-tensor" and "tie_word_embeddings" in str(error)
    plan = family("llama").plan(checkpoint, Options(settings={"tie_word_embeddings": True}))
    assert plan.config["tie_word_embeddings"].value is True and plan.outputs


def test_unknown_settings_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    original = CONSOLIDATED["mistral-7b-v0.3"].original
    error = refused(lambda: planned(original, tmp_path, "mistral", n_heads=6))
    assert error.kind == "usage" and "num_attention_heads" in str(error)


def test_settings_win_and_are_recorded(tmp_path: Path) -> None:
    plan = planned(
        CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path, "mistral", rope_theta=12345, eos_token_id=[2, 7]
    )
    assert plan.config["rope_theta"].value == 12345.0 and plan.config["rope_theta"].source == "--set"
    assert json.loads(document(plan, "generation_config.json"))["eos_token_id"] == [2, 7]
    error = refused(
        lambda: planned(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path, "mistral", hidden_act="gelu")
    )
    assert error.kind == "unsupported" and "gelu" in str(error)


def test_unknown_fields_of_params_json_are_refused_unless_off(tmp_path: Path) -> None:
    known = with_params("mistral-7b-v0.3", causal=True, temperature=0.7, max_batch_size=4)
    usual = planned(CONSOLIDATED["mistral-7b-v0.3"].original, tmp_path / "a", "mistral")
    assert planned(known, tmp_path / "b", "mistral").notes == usual.notes
    plan = planned(with_params("mistral-7b-v0.3", new_norms=False), tmp_path / "c", "mistral")
    assert any("new_norms = false is not known" in n for n in plan.notes)
    error = refused(lambda: planned(with_params("mistral-7b-v0.3", new_norms=2), tmp_path / "d", "mistral"))
    assert error.kind == "unsupported" and "new_norms = 2" in str(error)


def test_params_nested_under_model_are_found(tmp_path: Path) -> None:
    original = CONSOLIDATED["llama-2-7b"].original
    nested = replace(original, params={"model": original.params})
    assert values_of(planned(nested, tmp_path / "a", "llama")) == values_of(
        planned(original, tmp_path / "b", "llama")
    )


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    variant = CONSOLIDATED["mistral-7b-v0.3"]
    name, make = variant.original.tokenizer
    words = variant.original.sizes["v"]
    right = opened(variant.original, tmp_path / "a", **{name: make(words)})
    plan = family("mistral").plan(right, Options())
    assert {"tokenizer.json", name} <= {d.name for d in plan.documents}
    wrong = opened(variant.original, tmp_path / "b", **{name: make(words + 4)})
    assert refused(lambda: family("mistral").plan(wrong, Options())).kind == "bad-tokenizer"
    none = opened(variant.original, tmp_path / "c")
    assert any("tokenizer" in n for n in family("mistral").plan(none, Options()).notes)
    beside = tmp_path / "elsewhere"
    beside.write_bytes(make(words))
    plan = family("mistral").plan(none, Options(tokenizer=str(beside)))
    assert "tokenizer.json" in {d.name for d in plan.documents}


# --- what params.json cannot say ------------------------------------------------------------------------


def edited(name: str, folder: Path, **changes: Any) -> Checkpoint:
    """The conversion of a variant with its config.json changed; `...` removes a field."""
    variant = CONSOLIDATED[name]
    plan = planned(variant.original, folder / "a", variant.family, **variant.settings)
    config = {
        k: v for k, v in {**json.loads(document(plan, "config.json")), **changes}.items() if v is not ...
    }
    files = {f.name: {t.name: (t.dtype, t.shape) for t in f.tensors} for f in plan.outputs}
    return checkpoint_of(folder / "b", files, {"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("name", "changes", "kind", "word"),
    [
        ("mistral-7b-v0.3", {"num_attention_heads": 12}, "config-mismatch", "num_attention_heads 12"),
        ("mistral-7b-v0.3", {"num_hidden_layers": 3}, "uncovered-tensors", "layer 3 left over"),
        ("mistral-7b-v0.3", {"num_hidden_layers": 5}, "missing-tensor", "model.layers.4"),
        ("mistral-7b-v0.3", {"hidden_size": ...}, "config-mismatch", "default of MistralConfig"),
        ("mistral-7b-v0.3", {"hidden_act": "gelu"}, "unsupported", "gelu"),
        (
            "mistral-7b-v0.3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "unsupported",
            "rope_scaling",
        ),
        ("mistral-7b-v0.3", {"architectures": ["LlamaForCausalLM"]}, "unsupported", "MistralForCausalLM"),
        ("mixtral-c", {"num_local_experts": 7}, "config-mismatch", "num_local_experts 7"),
        ("mixtral-c", {"tie_word_embeddings": True}, "unsupported", "tie_word_embeddings"),
        ("llama-2-7b", {"attention_bias": True}, "unsupported", "attention_bias"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "unsupported", "llama3"),
    ],
)
def test_configs_that_no_original_can_hold(
    name: str, changes: dict[str, Any], kind: str, word: str, tmp_path: Path
) -> None:
    folder = edited(name, tmp_path, **changes)
    error = refused(lambda: family(CONSOLIDATED[name].family).plan_original(folder, Options()))
    assert error.kind == kind and word in str(error), error


def test_a_mistral_config_without_a_window_has_the_class_default(tmp_path: Path) -> None:
    back = family("mistral").plan_original(edited("mistral-7b-v0.3", tmp_path, sliding_window=...), Options())
    assert (
        back.config["sliding_window"].value == 4096
        and "MistralConfig" in back.config["sliding_window"].source
    )


def test_ranks_that_cannot_share_are_refused(tmp_path: Path) -> None:
    folder = edited("llama-2-7b", tmp_path)
    error = refused(lambda: family("llama").plan_original(folder, Options(shards=3)))
    assert error.kind == "config-mismatch" and "3" in str(error)


@given(st.integers(8, 20_000), st.integers(1, 80_000), st.booleans())
def test_any_feed_forward_width_has_params_that_give_it(dim: int, width: int, later: bool) -> None:
    assert llama.width_of(dim, *llama.pair_of(dim, width, later=later)) == width


@pytest.mark.parametrize("model", [m for m in REAL if m.startswith(("llama", "code"))])
def test_published_widths_give_back_the_published_params(model: str) -> None:
    real = REAL[model]()
    later = real.params.get("vocab_size") != -1  # of Code Llama and Llama 3
    found = llama.pair_of(real.sizes["d"], real.sizes["f"], later=later)
    assert found == (real.params["multiple_of"], real.params.get("ffn_dim_multiplier"))


def test_mistral_in_model_parallel_ranks_is_joined(tmp_path: Path) -> None:
    """Not published, but copies resharded like Meta's are around: all key/value heads are joined."""
    source = llamas.llama("3", 64, 2, 8, 320, 16, ranks=2, kv_heads=4)
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 176, "norm_eps": 1e-5}
    plan = planned(replace(source, params={**params, "head_dim": 8}), tmp_path, "mistral")
    made = carried_out(plan, contents(source))
    assert {v.shape for (_, n), v in made.items() if n.endswith("k_proj.weight")} == {(32, 64)}
