"""The tiny originals are what they say: real layouts and keys, readable by the libraries, able to fail."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch

from ckpt_tool import reference
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.fixtures import headers, prompts
from ckpt_tool.fixtures.consolidated import Original
from ckpt_tool.fixtures.numbers import to_bits
from ckpt_tool.fixtures.variants import VARIANTS
from tests.conftest import Written

Tensors = dict[str, torch.Tensor]
CONSOLIDATED: dict[str, Any] = {k: v for k, v in VARIANTS.items() if isinstance(v.original, Original)}
BY_ID = pytest.mark.parametrize("variant", CONSOLIDATED.values(), ids=list(CONSOLIDATED))
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
LLAMA = [v for v in CONSOLIDATED.values() if v.family == "llama"]


@pytest.fixture(scope="session")
def written(originals: Written) -> dict[str, Path]:
    """Every variant, written once; by id the path to convert."""
    return {v.id: originals(v.id) for v in CONSOLIDATED.values()}


@cache
def load(folder: Path) -> dict[str, Tensors]:
    """The weight files of `folder` as the libraries read them; not to be changed."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pth", ".pt"):
            found[path.name] = torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            found[path.name] = safetensors.torch.load_file(path)
    return found


def params(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "params.json").read_text("utf-8"))
    return made


def head_dim(variant: Any) -> int:
    true = variant.true_config
    return int(true.get("head_dim", true["hidden_size"] // true["num_attention_heads"]))


def merged(variant: Any, files: dict[str, Tensors]) -> Tensors:
    """Whole tensors: ranks joined along the axis that the publisher split, disjoint files united."""
    ranks = list(files.values())
    if variant.family != "llama":
        united: Tensors = {}
        for rank in ranks:
            assert not united.keys() & rank.keys()
            united |= rank
        return united
    whole = {}
    for name, first in ranks[0].items():
        parts = [r[name] for r in ranks]
        if first.ndim == 1:
            assert all(torch.equal(first, p) for p in parts)
            whole[name] = first
        elif name.endswith(("wk.weight", "wv.weight")) and variant.id.endswith("mp16"):
            whole[name] = torch.cat(parts[::2], dim=0)
        elif name.endswith(COLUMNS) or (
            name == "tok_embeddings.weight" and not variant.id.startswith("llama-3")
        ):
            whole[name] = torch.cat(parts, dim=1)
        else:
            whole[name] = torch.cat(parts, dim=0)
    return whole


# --- what a variant holds -------------------------------------------------------------------------------


@BY_ID
def test_the_libraries_read_the_weights(variant: Any, written: dict[str, Path]) -> None:
    files = load(written[variant.id])
    assert list(files) == list(variant.original.files)
    for name, tensors in files.items():
        assert {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()} == {
            n: (variant.true_config["torch_dtype"], shape) for n, _, shape in variant.original.headers[name]
        }


@BY_ID
def test_weights_are_large_enough_to_show_a_mistake(variant: Any, written: dict[str, Path]) -> None:
    for name, tensor in merged(variant, load(written[variant.id])).items():
        value = tensor.double()
        if name.endswith("rope.freqs"):
            continue
        assert torch.isfinite(value).all(), name
        if tensor.ndim == 1:
            assert 0.8 < value.mean() < 1.2 and 0.08 < value.std() < 0.25, name
        else:
            stacked = variant.true_config["intermediate_size"] if name.endswith("moe.w2") else None
            expected = min(0.2, 1.2 / (stacked or tensor.shape[1]) ** 0.5)
            assert abs(value.mean()) < expected / 4 and 0.88 < value.std() / expected < 1.12, name
            assert len(torch.unique(value)) > value.numel() / 100, name


@BY_ID
def test_no_two_tensors_are_equal_unless_tied(variant: Any, written: dict[str, Path]) -> None:
    whole = merged(variant, load(written[variant.id]))
    learned = {n: t for n, t in whole.items() if not n.endswith("rope.freqs")}
    digests = {
        hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).digest() for t in learned.values()
    }
    twice = variant.true_config["tie_word_embeddings"] and "output.weight" in learned
    assert len(digests) == len(learned) - twice


@BY_ID
def test_the_true_config_agrees_with_the_tensors(variant: Any, written: dict[str, Path]) -> None:
    true, whole = variant.true_config, merged(variant, load(written[variant.id]))
    head, width = head_dim(variant), true["hidden_size"]
    assert whole["tok_embeddings.weight"].shape == (true["vocab_size"], width)
    if "output.weight" in whole or not true["tie_word_embeddings"]:
        assert whole["output.weight"].shape == (true["vocab_size"], width)
    assert whole["layers.0.attention.wq.weight"].shape == (true["num_attention_heads"] * head, width)
    assert whole["layers.0.attention.wk.weight"].shape == (true["num_key_value_heads"] * head, width)
    assert len({n.split(".")[1] for n in whole if n.startswith("layers.")}) == true["num_hidden_layers"]
    output = whole.get("output.weight", whole["tok_embeddings.weight"])
    assert torch.equal(output, whole["tok_embeddings.weight"]) == true["tie_word_embeddings"]
    w1 = next(t for n, t in whole.items() if n.endswith((".w1.weight", "block_sparse_moe.w1")))
    stacked = true["num_local_experts"] if "layers.0.block_sparse_moe.w1" in whole else 1
    assert w1.shape == (stacked * true["intermediate_size"], width)


@BY_ID
def test_sizes_are_pairwise_different(variant: Any) -> None:
    true = variant.true_config
    sizes = [
        true[k]
        for k in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
    ]
    sizes.append(head_dim(variant))
    if true["num_key_value_heads"] != true["num_attention_heads"]:
        sizes.append(true["num_key_value_heads"])
        assert true["num_key_value_heads"] ** 2 != true["num_attention_heads"]  # swapped counts would fit
    sizes += [true["num_local_experts"]] if variant.family == "mixtral" else []
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "llama"])
def test_a_family_has_a_deep_variant_and_unusual_numbers(family: str) -> None:
    own = [v.true_config for v in CONSOLIDATED.values() if v.family == family]
    assert max(c["num_hidden_layers"] for c in own) >= 11
    assert len({c["rope_theta"] for c in own}) > 1 or family == "mixtral"
    assert any(c["num_key_value_heads"] != c["num_attention_heads"] for c in own)


@BY_ID
def test_logits_are_neither_flat_nor_wild(variant: Any, written: dict[str, Path]) -> None:
    folder = written[variant.id]
    files, module = load(folder), reference.original(variant.family)
    ranks = list(files.values()) if variant.family == "llama" else [merged(variant, files)]
    ranks = [{n: t.float() for n, t in r.items()} for r in ranks]
    shapes = {n: tuple(t.shape) for n, t in ranks[0].items()}
    config = module.Config.from_original(params(folder), shapes, len(ranks), variant.settings)
    row = prompts.prompts(variant.true_config["vocab_size"])["other"]
    logits = module.forward(torch.tensor([row]), ranks, config)
    assert logits.shape == (1, len(row), variant.true_config["vocab_size"])
    assert 0.8 < logits.std() < 10
    assert len(set(logits.argmax(-1).flatten().tolist())) > 5


NATIVE = {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"}
LLAMA_12 = {"dim", "multiple_of", "n_heads", "n_layers", "norm_eps", "vocab_size"}
CODE = {"dim", "n_layers", "n_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"}
LLAMA_3 = CODE | {"n_kv_heads", "vocab_size"}
OF_2025 = {"rope_theta", "max_position_embeddings", "tied_embeddings", "yarn", "llama_4_scaling"}
HF_STYLE = {
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "rms_norm_eps",
    "vocab_size",
}
KEYS = {
    "mistral-7b-v0.1": NATIVE | {"sliding_window"},
    "mistral-7b-v0.3": NATIVE | {"rope_theta"},
    "mistral-nemo": NATIVE | {"rope_theta"},
    "mistral-small": NATIVE | {"rope_theta"},
    "mistral-large": NATIVE | {"rope_theta"},
    "mistral-float32": NATIVE | {"rope_theta"},
    "ministral3-3b": NATIVE | OF_2025,
    "mistral3-images": NATIVE | OF_2025 | {"vision_encoder"},
    "mixtral-a": NATIVE | {"moe"},
    "mixtral-b": HF_STYLE,
    "mixtral-b-native": NATIVE | {"moe"},
    "mixtral-c": NATIVE | {"moe", "rope_theta"},
    "mixtral-8x22b": NATIVE | {"moe", "rope_theta"},
    "llama-1-7b": LLAMA_12,
    "llama-1-13b": LLAMA_12,
    "llama-2-7b": LLAMA_12,
    "llama-2-70b": LLAMA_12 | {"n_kv_heads", "ffn_dim_multiplier"},
    "llama-3-8b": LLAMA_3,
    "llama-3-70b": LLAMA_3,
    "llama-3.1-8b": LLAMA_3 | {"use_scaled_rope"},
    "llama-3.1-405b-mp16": LLAMA_3 | {"use_scaled_rope"},
    "llama-3.2-1b": LLAMA_3 | {"use_scaled_rope"},
    "code-llama-7b": CODE,
    "code-llama-7b-python": CODE,
    "code-llama-34b": CODE | {"n_kv_heads"},
    "code-llama-70b-python": CODE | {"n_kv_heads"},
}


@BY_ID
def test_params_json_has_the_published_keys(variant: Any, written: dict[str, Path]) -> None:
    found = params(written[variant.id])
    assert set(found) == KEYS[variant.id]
    assert None not in found.values()
    if variant.real is not None and not variant.id.startswith("mixtral-b"):
        assert list(found) == list(headers.real_header(variant.real).params)


def test_params_json_says_what_the_publisher_says() -> None:
    assert CONSOLIDATED["llama-1-7b"].original.params["vocab_size"] == -1
    assert CONSOLIDATED["llama-1-7b"].original.params["norm_eps"] == 1e-6
    assert CONSOLIDATED["mistral-7b-v0.1"].original.params["sliding_window"] == 32
    assert CONSOLIDATED["llama-3.1-405b-mp16"].original.params["n_kv_heads"] == 16
    assert CONSOLIDATED["mixtral-a"].original.params["moe"] == {"num_experts_per_tok": 2, "num_experts": 8}
    assert CONSOLIDATED["code-llama-70b-python"].original.params["rope_theta"] == 10000.0


# --- layouts --------------------------------------------------------------------------------------------


def test_stacked_and_separate_experts_are_one_model(written: dict[str, Path]) -> None:
    a = merged(CONSOLIDATED["mixtral-a"], load(written["mixtral-a"]))
    files = load(written["mixtral-b"])
    b = merged(CONSOLIDATED["mixtral-b"], files)
    assert len(files) == 8 and all(files.values())
    for layer in range(11):
        for w, turn in (("w1", False), ("w2", True), ("w3", False)):
            experts = [a[f"layers.{layer}.feed_forward.experts.{e}.{w}.weight"] for e in range(8)]
            stacked = torch.cat([x.T if turn else x for x in experts])
            assert torch.equal(b[f"layers.{layer}.block_sparse_moe.{w}"], stacked)
        gate = a[f"layers.{layer}.feed_forward.gate.weight"]
        assert torch.equal(b[f"layers.{layer}.block_sparse_moe.gate.weight"], gate)
    assert torch.equal(a["output.weight"], b["output.weight"])
    assert len(a) == 11 * (7 + 24) + 3
    assert len(b) == 11 * 10 + 3


def test_sixteen_ranks_hold_each_of_eight_heads_twice(written: dict[str, Path]) -> None:
    ranks = list(load(written["llama-3.1-405b-mp16"]).values())
    for name in ("layers.0.attention.wk.weight", "layers.1.attention.wv.weight"):
        heads = [r[name] for r in ranks]
        assert all(torch.equal(heads[2 * k], heads[2 * k + 1]) for k in range(8))
        assert not any(torch.equal(heads[2 * k], heads[2 * k + 2]) for k in range(7))


def test_embeddings_are_split_as_each_generation_does(written: dict[str, Path]) -> None:
    columns = load(written["llama-2-70b"])["consolidated.03.pth"]["tok_embeddings.weight"]
    rows = load(written["llama-3-70b"])["consolidated.03.pth"]["tok_embeddings.weight"]
    assert columns.shape == (328, 96 // 8)
    assert rows.shape == (536 // 8, 96)


@pytest.mark.parametrize("variant", LLAMA, ids=lambda v: v.id)
def test_rotary_frequencies_are_there_where_published(variant: Any, written: dict[str, Path]) -> None:
    for rank in load(written[variant.id]).values():
        found = [n for n in rank if n.endswith("rope.freqs")]
        if variant.id.startswith("llama-1"):
            assert found == [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(3)]
        else:
            assert found == ([] if variant.id.startswith("llama-3") else ["rope.freqs"])
        true = variant.true_config
        for name in found:
            half = head_dim(variant) // 2
            wanted = true["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
            assert torch.equal(rank[name], wanted.to(rank[name].dtype))


@BY_ID
def test_the_tokenizer_has_as_many_ids_as_the_model(variant: Any, written: dict[str, Path]) -> None:
    folder = written[variant.id]
    name = variant.original.tokenizer[0]
    path = next(p for p in (folder / name, folder.parent / name) if p.is_file())
    assert (path.parent == folder) == (not variant.original.folder)
    data, vocab = path.read_bytes(), variant.true_config["vocab_size"]
    if name == "tekken.json":
        assert json.loads(data)["config"]["default_vocab_size"] == vocab
    elif variant.id.startswith("llama-3"):
        assert len(data.splitlines()) + 256 == vocab
    else:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        assert model.get_piece_size() == vocab
        infill = [model.piece_to_id(p) for p in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")]
        expected = variant.id in ("code-llama-7b", "code-llama-70b-python")
        assert (infill == [vocab - 9, vocab - 8, vocab - 7, vocab - 6]) == expected


@pytest.mark.parametrize("variant", LLAMA, ids=lambda v: v.id)
def test_the_checklist_has_the_digests_of_the_files(variant: Any, written: dict[str, Path]) -> None:
    folder = written[variant.id]
    lines = (folder / "checklist.chk").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert listed.keys() == {p.name for p in folder.iterdir()} - {"checklist.chk"}
    for name, digest in listed.items():
        assert hashlib.md5((folder / name).read_bytes()).hexdigest() == digest


@BY_ID
def test_our_own_reader_opens_it(variant: Any, written: dict[str, Path]) -> None:
    with open_checkpoint(written[variant.id]) as checkpoint:
        assert list(checkpoint.files) == list(variant.original.files)
        assert {t.name for t in checkpoint} == {h[0] for f in variant.original.headers.values() for h in f}
        name = "layers.1.attention.wq.weight"
        bits = checkpoint.read(checkpoint.find(name)[0])
    loaded = next(t[name] for t in load(written[variant.id]).values() if name in t)
    kind = torch.int32 if loaded.element_size() == 4 else torch.int16
    assert np.array_equal(bits, loaded.view(kind).numpy().view(bits.dtype))


# --- determinism ----------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", ["mistral-7b-v0.3", "mixtral-b", "llama-1-13b", "llama-3.2-1b"])
def test_equal_seeds_give_equal_bytes_and_others_do_not(name: str, tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    CONSOLIDATED[name].write(first)
    CONSOLIDATED[name].write(again, seed=0)
    CONSOLIDATED[name].write(other, seed=1)
    assert digests(first) == digests(again)
    weights = [n for n in digests(first) if "consolidated" in n]
    assert weights and all(digests(first)[n] != digests(other)[n] for n in weights)


def test_weights_are_the_same_with_any_numpy(written: dict[str, Path]) -> None:
    tensor = load(written["mistral-float32"])["consolidated.safetensors"]["layers.3.attention.wk.weight"]
    found = [float(v) for v in tensor[0, :3]]
    assert found == pytest.approx([-0.116859070956707, 0.12754005193710327, -0.09468974173069], rel=1e-6)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_that_of_torch(dtype: str) -> None:
    values = np.random.default_rng(1).normal(size=4096) * 10.0 ** np.arange(-4, 4).repeat(512)
    values[:4] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 0.0]  # ties
    values = values.astype(np.float32)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    wanted = torch.from_numpy(values).to(kind)
    view = torch.int32 if dtype == "F32" else torch.int16
    bits = to_bits(values, dtype)
    assert np.array_equal(bits, wanted.view(view).numpy().view(bits.dtype))


# --- prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 5, 310, 32000, 128256])
def test_prompts_are_valid_for_any_vocabulary(vocab: int) -> None:
    rows = prompts.prompts(vocab)
    assert all(0 <= i < vocab for row in rows.values() for i in row)
    assert len(rows["long"]) == 600
    assert len(set(rows["repeated"][1:])) == 1
    assert rows == prompts.prompts(vocab)
    assert {len(row) for name, row in rows.items() if name != "long"} <= set(range(2, 64))
    if vocab > 300:
        assert len(set(rows["long"])) > 250


def test_prompts_start_as_asked() -> None:
    assert {row[0] for row in prompts.prompts(1000, bos=7).values()} == {7}
    assert len(prompts.prompts(1000, bos=None)["long"]) == 600


# --- full size ------------------------------------------------------------------------------------------

PARAMETERS = {
    "ministral3-8b": 8_489_553_920,
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-30b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "code-llama-7b": 6_738_546_688,
    "code-llama-7b-python": 6_738_415_616,
    "code-llama-13b": 13_016_028_160,
    "code-llama-13b-python": 13_015_864_320,
    "code-llama-34b": 33_743_970_304,
    "code-llama-70b": 68_976_910_336,
    "code-llama-70b-python": 68_976_910_336,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b-mp8": 405_853_388_800,
    "llama-3.1-405b-mp16": 405_853_388_800,
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


@pytest.mark.parametrize("model", headers.REAL)
def test_headers_count_the_published_parameters(model: str) -> None:
    found = headers.real_header(model)
    total = 0
    for rank, tensors in enumerate(found.files.values()):
        for t in tensors:
            replicated = len(t.shape) == 1 and rank > 0 and model.startswith(("llama", "code"))
            tied = t.name == "output.weight" and model.startswith("llama-3.2")
            second = model.endswith("mp16") and ".wk." in t.name + t.name.replace("wv", "wk") and rank % 2
            if not (replicated or tied or second or t.name.endswith("rope.freqs")):
                total += int(np.prod(t.shape, dtype=np.int64))
    assert total == PARAMETERS[model]


def test_every_published_size_has_headers() -> None:
    assert headers.REAL.keys() == PARAMETERS.keys()
    assert {v.real for v in CONSOLIDATED.values()} - {None} <= headers.REAL.keys()


# Size of one rank's file, derived from the 405B download: 8 and 16 files of these sizes.
@pytest.mark.parametrize(
    ("model", "ranks", "published"),
    [("llama-3.1-405b-mp8", 8, 101_470_976_045), ("llama-3.1-405b-mp16", 16, 51_268_302_389)],
)
def test_sparse_files_have_the_published_size(model: str, ranks: int, published: int, tmp_path: Path) -> None:
    folder = headers.write_sparse(model, tmp_path / model)
    files = sorted(folder.glob("consolidated.*.pth"))
    assert len(files) == ranks
    for path in files:
        found = path.stat()
        assert abs(found.st_size - published) < published * 1e-5
        assert found.st_blocks * 512 < 8_000_000  # a block or two for the header of each of 1137 tensors
    with open_checkpoint(folder) as checkpoint:
        (first, *others) = checkpoint.find("layers.125.attention.wk.weight")
        assert len(others) == ranks - 1
        assert first.shape == (128, 16384) and first.dtype == "BF16"
        assert not checkpoint.read(first, 0, 1).any()
        assert params(folder)["n_layers"] == 126


def test_a_sparse_safetensors_original_opens(tmp_path: Path) -> None:
    folder = headers.write_sparse("mixtral-8x22b-v0.3", tmp_path / "m")
    path = folder / "consolidated.safetensors"
    assert path.stat().st_size > 281_000_000_000
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.names()) == 56 * (7 + 24) + 3
