"""The tiny Megatron checkpoints are what they say: the real layouts, readable by torch, one model each."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import tracemalloc
import types
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tool import reference
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.signs import is_legacy
from ckpt_tool.checkpoint.torch_legacy import legacy_imports
from ckpt_tool.fixtures import variants
from ckpt_tool.fixtures.families.megatron_bert import BERT, TWO_GELUS
from ckpt_tool.fixtures.families.megatron_gpt2 import ARCHIVE, GPT2, PUBLISHED
from ckpt_tool.fixtures.megatron import TRACKER, Megatron, write_noise_archive
from ckpt_tool.fixtures.numbers import drawn
from ckpt_tool.fixtures.pickles import Tensor, legacy_stream, write_torch_zip
from ckpt_tool.reference.megatron import join_stages
from tests.conftest import Written

State = dict[str, torch.Tensor]
VARIANTS: dict[str, Any] = {k: v for k, v in variants.VARIANTS.items() if isinstance(v.original, Megatron)}
BY_ID = pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))


class Stub:
    """Stands for any class that is not installed; keeps what it was made of."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class Permissive(pickle.Unpickler):
    found: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            Permissive.found.append(f"{module}.{name}")
            return type(name, (Stub,), {})


PICKLE = types.ModuleType("permissive")
PICKLE.Unpickler = Permissive  # type: ignore[attr-defined]
PICKLE.load = pickle.load  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def written(originals: Written) -> dict[str, Path]:
    return {id: originals(id) for id in VARIANTS}


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a download by its path in it, out of the zip where it is one."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@cache
def trees(path: Path) -> dict[str, Any]:
    """The .pt files as torch reads them, classes that are not installed replaced. Not to be changed."""
    return {
        name: torch.load(io.BytesIO(data), map_location="cpu", pickle_module=PICKLE, weights_only=False)
        for name, data in contents(path).items()
        if name.endswith(".pt")
    }


def flat(value: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            yield f"{prefix}{key}", item
        elif isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{key}.")


def grid(variant: Any, path: Path) -> list[list[State]]:
    """The tensors of the model in each file: [rank][stage]."""
    found = trees(path)
    rows: list[list[State]] = [
        [{} for _ in range(variant.original.stages)] for _ in range(variant.original.ranks)
    ]
    for name, (rank, stage) in variant.original.files().items():
        rows[rank][stage] = {n: t for n, t in flat(found[name]) if n.startswith("model")}
    return rows


# --- containers and layout ------------------------------------------------------------------------------


@BY_ID
def test_torch_reads_every_file(variant: Any, written: dict[str, Path]) -> None:
    found = trees(written[variant.id])
    assert list(found) == list(variant.original.files())
    for name, tree in found.items():
        assert tree["iteration"] == variant.original.iteration
        assert tree.get("checkpoint_version") == variant.original.version
        assert ("args" in tree) == (variant.original.run is not None)
        data = contents(written[variant.id])[name]
        assert is_legacy(data[:32]) == (variant.original.container == "legacy")


@BY_ID
def test_our_reader_sees_the_tensors_that_torch_sees(variant: Any, written: dict[str, Path]) -> None:
    files = grid(variant, written[variant.id])
    with open_checkpoint(written[variant.id]) as checkpoint:
        assert len(checkpoint.files) == len(variant.original.files())
        for name in ("input_layernorm", "query_key_value", "linear_qkv.weight", "input_norm"):
            for t in [t for t in checkpoint if name in t.name]:
                own = [s[t.name] for row in files for s in row if t.name in s]
                bits = bytearray(t.nbytes)
                checkpoint.read_into(t, 0, memoryview(bits))
                assert bytes(bits) in [x.contiguous().view(torch.uint8).numpy().tobytes() for x in own]
        assert set(variant.original.vocabulary) <= set(checkpoint.documents)


@pytest.mark.parametrize("variant", ["gpt2-ngc-stored", "gpt2-ngc-deflated", "bert-ngc-uncased"])
def test_the_published_zips_hold_the_release_and_nothing_foreign(
    variant: str, written: dict[str, Path]
) -> None:
    path = written[variant]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) - set(VARIANTS[variant].original.vocabulary) == {
            "release/mp_rank_00/model_optim_rng.pt",
            TRACKER,
        }
        assert archive.read(TRACKER) == b"release"
        methods = {info.compress_type for info in archive.infolist()}
        assert methods == {zipfile.ZIP_DEFLATED if variant.endswith("deflated") else zipfile.ZIP_STORED}
        inner = io.BytesIO(archive.read("release/mp_rank_00/model_optim_rng.pt"))
    tree = torch.load(inner, map_location="cpu", weights_only=True)
    assert set(tree) == {"iteration", "model"} and tree["iteration"] == 1
    block = tree["model"]["language_model"]["transformer"]
    assert block._metadata == {"": {"version": 1}}
    assert list(block)[:4] == [
        "layers.0.input_layernorm.weight",
        "layers.0.input_layernorm.bias",
        "layers.0.attention.query_key_value.weight",
        "layers.0.attention.query_key_value.bias",
    ]


@pytest.mark.parametrize("variant", ["gpt2-v2-tp2", "gpt2-core-tp2", "bert-ngc-cased", "bert-2023-float32"])
def test_a_run_does_not_load_as_weights_only(variant: str, written: dict[str, Path]) -> None:
    for name, data in contents(written[variant]).items():
        if name.endswith(".pt"):
            with pytest.raises(pickle.UnpicklingError):
                torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


FOREIGN = {
    "gpt2-ngc-stored": set(),
    "gpt2-2019-tp2": {"fp16.loss_scaler.DynamicLossScaler", "apex.optimizers.fused_adam.FusedAdam"},
    "bert-2020-03": {"megatron.fp16.loss_scaler.DynamicLossScaler", "apex.optimizers.fused_adam.FusedAdam"},
    "gpt2-v3-virtual": {"megatron.model.enums.ModelType"},
    "gpt2-core-tp2": {"megatron.core.enums.ModelType"},
}


@pytest.mark.parametrize("variant", FOREIGN)
def test_the_classes_that_are_not_installed_are_those_of_the_age(
    variant: str, written: dict[str, Path]
) -> None:
    Permissive.found.clear()
    for name, data in contents(written[variant]).items():
        if name.endswith(".pt"):
            torch.load(io.BytesIO(data), map_location="cpu", pickle_module=PICKLE, weights_only=False)
    assert set(Permissive.found) == FOREIGN[variant]


def test_random_states_are_what_torch_and_numpy_take(written: dict[str, Path]) -> None:
    (tree,) = trees(written["bert-2020-03"]).values()
    np.random.RandomState().set_state(tree["np_rng_state"])
    assert tree["np_rng_state"][1].dtype == np.uint32
    assert tree["torch_rng_state"].dtype == torch.uint8 and tree["torch_rng_state"].shape == (5056,)
    assert len(tree["random_rng_state"][1]) == 625
    assert tree["args"].layernorm_epsilon == 2e-4 and not hasattr(tree["args"], "openai_gelu")
    scaler = tree["optimizer"]["loss_scaler"]
    assert isinstance(scaler, Stub) and scaler.__dict__["cur_scale"] == 65536.0


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if v.original.run is not None], ids=lambda v: v.id
)
def test_args_say_the_sizes_and_nothing_before_their_time(variant: Any, written: dict[str, Path]) -> None:
    m = variant.original
    assert m.run is not None
    for tree in trees(written[variant.id]).values():
        args = vars(tree["args"])
        assert args["padded_vocab_size"] == m.padded and args["num_attention_heads"] == m.heads
        assert ("model_parallel_size" in args) == (m.run < "2021")
        assert ("ffn_hidden_size" in args) == (m.run >= "2021")
        assert ("bias_gelu_fusion" in args) == (m.run >= "2020-10")
        assert ("norm_epsilon" in args) == (m.run >= "2023") != ("layernorm_epsilon" in args)


def test_the_names_of_each_age(written: dict[str, Path]) -> None:
    some = {
        "gpt2-ngc-stored": "model.language_model.transformer.layers.11.attention.query_key_value.weight",
        "gpt2-2019-tp2": "model.language_model.word_embeddings.weight",
        "gpt2-v3-tp2-pp2": "model.language_model.encoder.layers.5.self_attention.query_key_value.bias",
        "gpt2-v3-virtual": "model1.language_model.encoder.layers.1.mlp.dense_4h_to_h.weight",
        "gpt2-2023-float32": "model.language_model.encoder.layers.3.post_attention_norm.weight",
        "gpt2-core-tp2": "model.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "gpt2-core-pp2": "model.decoder.layers.5.pre_mlp_layernorm.bias",
        "bert-2023-float32": "model.lm_head.norm.weight",
        "bert-v3-virtual": "model2.word_embeddings_for_head.weight",
        "bert-2019-tp2": "model.language_model.pooler.dense.weight",
    }
    for variant, name in some.items():
        files = [s for row in grid(VARIANTS[variant], written[variant]) for s in row]
        assert any(name in s for s in files), variant


# --- one model ------------------------------------------------------------------------------------------


def test_rows_of_each_version_are_where_the_fact_sheet_has_them() -> None:
    """Canonical row numbers of 2 heads of 2 channels, in the order they are stored."""
    stored = {
        None: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        1.0: [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
        2.0: [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11],
        3.0: [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11],
    }

    def rows(name: str, shape: tuple[int, ...]) -> np.ndarray:
        first = {"q": 0, "k": 4, "v": 8}.get(name.split(".")[-2][-1:], 0)
        return np.arange(first, first + math.prod(shape), dtype=float).reshape(shape)

    for version, expected in stored.items():
        m = Megatron(GPT2, 1, 2, 2, 5, 3, 7, version=version, dtype="F32")
        block = m.tree(0, 0, rows)["model"]["language_model"]["transformer"]
        bias = b"".join(block["layers.0.attention.query_key_value.bias"].data())
        assert np.frombuffer(bias, "<f4").tolist() == expected


COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight", "linear_proj.weight", "linear_fc2.weight")
SPLIT = ("word_embeddings", "dense_h_to_4h", "linear_fc1.weight", "linear_fc1.bias", "query_key_value")
SPLIT += ("linear_qkv.weight", "linear_qkv.bias", "output_layer", "word_embeddings_for_head", "lm_head.bias")
RENAMED = (
    (r"model\d?.", ""),
    ("language_model.", ""),
    ("embedding.", ""),
    ("transformer.", ""),
    ("encoder.", ""),
    ("decoder.", ""),
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm."),
    ("pre_mlp_layernorm", "post_attention_layernorm"),
    ("input_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("final_norm", "final_layernorm"),
    ("lm_head.norm", "lm_head.layernorm"),
    ("self_attention.", "attention."),
    ("linear_qkv", "query_key_value"),
    ("linear_proj", "dense"),
    ("linear_fc1", "dense_h_to_4h"),
    ("linear_fc2", "dense_4h_to_h"),
)


def model(variant: Any, path: Path) -> State:
    """The whole model under the names of the first age, q, k and v after another: by the words of the
    fact sheet about shards, orders and names, and not by code of this project."""
    m = variant.original
    ranks = [join_stages(row) for row in grid(variant, path)]
    whole = {}
    for name in ranks[0]:
        parts = [r[name] for r in ranks]
        if "query_key_value" in name or name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            n, rest = m.heads // m.ranks, parts[0].shape[1:]
            version = 2 if m.core else m.version or 0
            if version >= 2:
                parts = [p.view(n, 3, m.head_dim, *rest).transpose(0, 1) for p in parts]
            elif version == 1:
                parts = [p.view(n, m.head_dim, 3, *rest).movedim(2, 0) for p in parts]
            else:
                parts = [p.view(3, n, m.head_dim, *rest) for p in parts]
            joined = torch.cat(parts, 1).reshape(3 * m.width, *rest)
        elif name.endswith(COLUMNS):
            joined = torch.cat(parts, 1)
        elif any(part in name for part in SPLIT) and "layer_norm_" not in name:
            joined = torch.cat(parts)
        else:
            assert all(torch.equal(p, parts[0]) for p in parts), name
            joined = parts[0]
        own = name.removeprefix("model.")
        for old, new in RENAMED[1:]:
            own = own.replace(old, new)
        whole[own] = joined
    return whole


@BY_ID
def test_variants_that_share_weights_hold_one_model(variant: Any, written: dict[str, Path]) -> None:
    first = next(v for v in VARIANTS.values() if v.weights == variant.weights)
    one, two = model(first, written[first.id]), model(variant, written[variant.id])
    copies = {n for n in two if n.startswith(("word_embeddings_for_head", "output_layer"))}
    assert bool(copies) == (variant.original.stages > 1)
    for name in copies:
        assert torch.equal(two.pop(name), two["word_embeddings.weight"])
    assert one.keys() == two.keys()
    for name, a in one.items():
        b = two[name]
        if name in ("word_embeddings.weight", "lm_head.bias"):
            assert len(b) == variant.original.padded > variant.original.words
            assert b[variant.original.words :].any(), "padding is not zero"
            a, b = a[: variant.original.words], b[: variant.original.words]
        rounded = 2**-10 if a.dtype != b.dtype else 0.0  # of float32 to float16
        assert torch.allclose(a.double(), b.double(), rtol=rounded, atol=rounded * 1e-4), name


@BY_ID
def test_weights_are_large_enough_to_show_a_mistake(variant: Any, written: dict[str, Path]) -> None:
    dtype = {"F16": torch.float16, "F32": torch.float32}[variant.original.dtype]
    found = model(variant, written[variant.id])
    digests = set()
    for name, tensor in found.items():
        value = tensor.double()
        assert tensor.dtype == dtype and torch.isfinite(value).all()
        is_norm = "norm" in name and name.endswith("weight")
        expected = 0.15 if is_norm else 0.1 if tensor.ndim == 1 else min(0.2, 1.2 / tensor.shape[1] ** 0.5)
        assert abs(value.mean() - float(is_norm)) < 0.12 or tensor.numel() < 10, name
        assert 0.6 < value.std() / expected < 1.4 or tensor.numel() < 10, name
        digests.add(hashlib.sha256(value.numpy().tobytes()).digest())
    copies = {n for n in found if n.startswith(("word_embeddings_for_head", "output_layer"))}
    assert len(digests) == len(found) - len(copies)


@BY_ID
def test_the_true_config_agrees_with_the_tensors(variant: Any, written: dict[str, Path]) -> None:
    true, m, found = variant.true_config, variant.original, model(variant, written[variant.id])
    sizes = [
        true.get(new, true.get(old))
        for new, old in (
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("hidden_size", "n_embd"),
            ("intermediate_size", "n_inner"),
            ("max_position_embeddings", "n_positions"),
            ("vocab_size", "vocab_size"),
        )
    ]
    layers, heads, width, ffn, positions, words = sizes
    assert len({*sizes, width // heads, m.padded}) == 8, "sizes are pairwise different"
    assert len({n.split(".")[1] for n in found if n.startswith("layers.")}) == layers
    assert found["word_embeddings.weight"].shape == (m.padded, width) and m.words == words
    assert found["position_embeddings.weight"].shape == (positions, width)
    assert found["layers.0.mlp.dense_h_to_4h.weight"].shape == (ffn, width)
    assert heads == m.heads and width % heads == 0
    assert heads == variant.settings.get("num_attention_heads", heads)
    assert ("num_attention_heads" in variant.settings) == (m.run is None)
    assert true["torch_dtype"] == {"F16": "float16", "F32": "float32"}[m.dtype]
    for name, content in variant.original.vocabulary.items():
        if not name.endswith("merges.txt"):
            assert len(content.splitlines() if name.endswith(".txt") else json.loads(content)) == words
    assert bool(variant.original.vocabulary) != ("vocab_size" in variant.settings)


GELU = {"gelu": "erf", "gelu_new": "tanh"}


@BY_ID
def test_the_reference_reads_it_with_the_numbers_of_the_true_config(
    variant: Any, written: dict[str, Path]
) -> None:
    ranks = [
        {n: t.float() for n, t in join_stages(row).items()} for row in grid(variant, written[variant.id])
    ]
    first = next(iter(trees(written[variant.id]).values()))
    params = dict(vars(first["args"])) if "args" in first else {}
    params |= {k: first[k] for k in ("checkpoint_version",) if k in first}
    true, module = variant.true_config, reference.original(variant.family)
    shapes = {n: tuple(t.shape) for n, t in ranks[0].items()}
    told = {**variant.settings, "vocab_size": true["vocab_size"]}
    config = module.Config.from_original(params, shapes, len(ranks), told)
    activation = true.get("hidden_act", true.get("activation_function"))
    assert config.activation == GELU[activation]
    if variant.family == "megatron-bert":
        assert config.head_gelu == GELU[activation]
    assert config.norm_eps == true.get("layer_norm_eps", true.get("layer_norm_epsilon"))
    ids = torch.arange(0, 250, 11)[None]
    logits = module.forward(ids, ranks, config)
    assert logits.shape == (1, ids.shape[1], true["vocab_size"])
    assert 0.8 < logits.std() < 10
    assert logits.std(dim=1).mean() > 0.1, "they depend on the position"


def test_a_family_has_a_deep_variant_every_version_and_both_gelus() -> None:
    for family in ("megatron-gpt2", "megatron-bert"):
        own = [v for v in VARIANTS.values() if v.family == family]
        assert max(v.original.layers for v in own) >= 11
        assert {v.original.version for v in own} == {None, 1, 2.0, 3.0}
        assert {v.original.container for v in own} == {"legacy", "zip"}
        assert {v.true_config.get("hidden_act", v.true_config.get("activation_function")) for v in own} == {
            "gelu",
            "gelu_new",
        }
        assert {"2019", "transformer", "encoder", "norm"} <= {v.original.names for v in own}


def test_two_gelus_are_what_megatron_bert_cannot_say(tmp_path: Path) -> None:
    tree = next(iter(trees(TWO_GELUS.write(tmp_path)).values()))
    assert tree["args"].bias_gelu_fusion and not tree["args"].openai_gelu


# --- writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2-ngc-deflated", "gpt2-core-tp2", "bert-v3-tp2-pp2"])
def test_equal_arguments_give_equal_bytes(variant: str, written: dict[str, Path], tmp_path: Path) -> None:
    again = VARIANTS[variant].write(tmp_path / "again")
    assert contents(again) == contents(written[variant])
    if again.suffix == ".zip":
        assert again.read_bytes() == written[variant].read_bytes()
    other = VARIANTS[variant].write(tmp_path / "other", seed=1)
    assert contents(other) != contents(written[variant])


def test_padding_leaves_the_words_as_they_are() -> None:
    def words(multiple: int) -> np.ndarray:
        m = Megatron(GPT2, 1, 2, 2, 5, 3, 7, divisible_by=multiple, dtype="F32")
        embedding = m.tree(0, 0, drawn("x", 0))["model"]["language_model"]["embedding"]
        return np.frombuffer(b"".join(embedding["word_embeddings"]["weight"].data()), "<f4").reshape(-1, 4)

    one, two = words(8), words(16)
    assert len(one) == 8 and len(two) == 16 and np.array_equal(one[:7], two[:7])


PARAMETERS = {
    "gpt2": (PUBLISHED, 354_871_296),
    "bert-uncased": (Megatron(BERT, 24, 16, 64, 4096, 512, 30522), 336_297_858),
    "bert-cased": (Megatron(BERT, 24, 16, 64, 4096, 512, 28996), 334_723_458),
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_published_sizes_have_the_published_number_of_parameters(model: str) -> None:
    m, expected = PARAMETERS[model]

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel
        return sum(map(count, value.values())) if isinstance(value, dict) else 0

    assert count(m.tree(0, 0, drawn("never", 0))) == expected


@pytest.mark.parametrize("deflated", [False, True])
def test_noise_needs_no_memory_and_is_finite(deflated: bool, tmp_path: Path) -> None:
    m = Megatron(GPT2, 3, 4, 64, 1024, 100, 20_000)
    tracemalloc.start()
    write_noise_archive(m, tmp_path / ARCHIVE, deflated=deflated, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, "a block at a time, of a tensor of 10 MB"
    with zipfile.ZipFile(tmp_path / ARCHIVE) as archive:
        data = archive.read("release/mp_rank_00/model_optim_rng.pt")
    tree = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    tensors = dict(flat(tree))
    assert tensors["model.language_model.embedding.word_embeddings.weight"].shape == (20_096, 256)
    assert all(torch.isfinite(t).all() and t.abs().max() < 2 for t in tensors.values())
    assert len({t.numpy().tobytes() for t in tensors.values()}) == len(tensors)


def test_pickled_values_come_back(tmp_path: Path) -> None:
    value = [
        1,
        -5,
        255,
        65_536,
        -(1 << 40),
        1 << 63,
        2.5,
        "é",
        b"\xff\0",
        (),
        (1,),
        (1, 2, 3, 4),
        {},
        None,
        True,
    ]
    shared = Tensor("F32", (2, 3), lambda: [np.arange(6, dtype="<f4").tobytes()], "cpu")
    tree = {"value": value, "a": shared, "b": {"again": shared}}
    (tmp_path / "legacy.pt").write_bytes(b"".join(legacy_stream(tree)))
    with open(tmp_path / "zip.pt", "wb") as f:
        write_torch_zip(tree, f)
    for name in ("legacy.pt", "zip.pt"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert found["value"] == value
        assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["a"].data_ptr() == found["b"]["again"].data_ptr(), "one storage"
    assert legacy_imports(tmp_path / "legacy.pt", "legacy.pt")


def test_a_tensor_must_have_the_bytes_of_its_shape() -> None:
    with pytest.raises(ValueError, match="as many bytes"):
        b"".join(legacy_stream({"a": Tensor("F32", (3,), lambda: [bytes(8)])}))
    with pytest.raises(TypeError, match="can be pickled"):
        b"".join(legacy_stream({"a": object()}))
