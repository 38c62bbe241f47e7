"""Megatron-Core's checkpoints of Llama, Mistral, Qwen2 and Qwen3: in torch_dist folders, where a tensor holds
all layers and ranks are joined, the same models come out as of the ranks' own files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool import api
from tests.conftest import Written
from tests.test_dcp import Chunk, refused, save

CASES = Path(__file__).parents[2] / "shared" / "cases"
VARIANTS = {"qwen2-mcore": "qwen2", "qwen3-mcore": "qwen3", "llama-mcore": "llama"}
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")  # which ranks share; of the others rows, but for norms
Rank = Mapping[str, torch.Tensor]


def loaded(folder: Path) -> list[Mapping[str, Any]]:
    return [torch.load(f, weights_only=False) for f in sorted(folder.rglob("model_optim_rng.pt"))]


def pieces(name: str, ranks: list[Rank]) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Where each rank's share of a tensor begins in the whole. A rank's gates and ups are apart there."""
    parts = [rank[name] for rank in ranks]
    if parts[0].ndim == 1 and not name.endswith("qkv.bias"):
        yield (0,), parts[0]
    elif name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        rows = len(halves[0][0])
        for k, (gate, up) in enumerate(halves):
            yield (k * rows, 0), gate
            yield (len(halves) * rows + k * rows, 0), up
    else:
        axis = 1 if name.endswith(COLUMNS) else 0
        for k, part in enumerate(parts):
            start = [0] * part.ndim
            start[axis] = k * part.shape[axis]
            yield tuple(start), part


def joined(source: Path, folder: Path, beside: Mapping[str, list[Chunk]] | None = None) -> Path:
    """The folder that `dist_checkpointing.save` makes of ranks, and of tensors beside them."""
    files = loaded(source)
    ranks: list[Rank] = [f["model"] for f in files]
    tensors: dict[str, list[Chunk]] = {n: list(chunks) for n, chunks in (beside or {}).items()}
    for name in ranks[0]:
        head, _, rest = name.partition("decoder.layers.")
        layer, _, inside = rest.partition(".")
        for start, part in pieces(name, ranks):
            if rest:
                key, chunk = f"{head}decoder.layers.{inside}", Chunk((int(layer), *start), part[None].clone())
            else:
                key, chunk = name, Chunk(start, part.clone())
            tensors.setdefault(key, []).append(chunk)
    shapes = {
        name: tuple(max(c.start[k] + c.data.shape[k] for c in chunks) for k in range(chunks[0].data.ndim))
        for name, chunks in tensors.items()
    }
    folder.mkdir()
    save(folder / "iter_0000100", tensors, shapes)
    torch.save(
        {"args": files[0]["args"], "iteration": 100, "checkpoint_version": 3.0},
        folder / "iter_0000100" / "common.pt",
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_ranks_are_the_model_of_the_ranks(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    source = joined(originals(variant), tmp_path / "in")
    for given, out in ((source, tmp_path / "of-run"), (source / "iter_0000100", tmp_path / "of-iteration")):
        made = api.convert(given, out, family=VARIANTS[variant])
        assert "holds all layers is read as one for each" in " ".join(made.plan.notes + made.opened)
        for file in ("model.safetensors", "config.json"):
            assert (out / file).read_bytes() == (conversions(variant) / file).read_bytes()
    report = api.verify(tmp_path / "of-run", source)
    assert report.status == "pass"


def test_ranks_of_llama_go_back(originals: Written, conversions: Written, tmp_path: Path) -> None:
    """In the layout that they came in, equal tensor by tensor, and read again; in two ranks and in one."""
    for ranks in (2, 1):
        out = tmp_path / f"tp{ranks}"
        asked = api.Options(family_options={"tensor_parallel": ranks})
        api.convert(conversions("llama-mcore"), out, to="original", options=asked)
        api.convert(out, tmp_path / f"again{ranks}", family="llama")
        again = tmp_path / f"again{ranks}" / "model.safetensors"
        assert again.read_bytes() == (conversions("llama-mcore") / "model.safetensors").read_bytes()
    before, after = loaded(originals("llama-mcore")), loaded(tmp_path / "tp2")
    for one, other in zip(before, after, strict=True):
        ours = other["model"]
        assert ours.keys() == one["model"].keys()
        assert all(torch.equal(ours[n], x) for n, x in one["model"].items())


@pytest.mark.parametrize(("variant", "ranks"), [("mistral-7b-v0.3", 1), ("llama-3-8b", 2)])
def test_a_published_model_is_written_as_ranks_where_it_is_asked_for(
    variant: str, ranks: int, conversions: Written, tmp_path: Path
) -> None:
    family = variant.partition("-")[0]
    asked = {"form": "mcore", "tensor_parallel": ranks}
    made = conversions(variant)
    api.convert(made, tmp_path / "ranks", to="original", options=api.Options(family_options=asked))
    api.convert(tmp_path / "ranks", tmp_path / "again", family=family)
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "again", made))
    assert ours.read_bytes() == theirs.read_bytes()
    for name in ("rope_theta", "num_key_value_heads", "rms_norm_eps", "head_dim", "sliding_window"):
        one, two = (json.loads((f / "config.json").read_text()).get(name) for f in (tmp_path / "again", made))
        assert one == two, name
    del asked["form"]
    error = refused(lambda: api.plan(made, to="original", options=api.Options(family_options=asked)))
    assert error.kind == "usage" and "--form mcore" in str(error)


def test_an_absurd_number_of_layers_is_refused(tmp_path: Path) -> None:
    """Which costs nothing where a layer is empty."""
    name = "decoder.layers.mlp.linear_fc2.weight"
    empty = [Chunk((0, 0, 0), torch.zeros(1 << 40, 0, 2))]
    save(tmp_path / "in", {name: empty}, {name: (1 << 40, 0, 2)})
    error = refused(lambda: api.plan(tmp_path / "in", family="llama"))
    assert error.kind == "shape-mismatch" and f"[{1 << 40}, 0, 2]" in str(error)


# --- files that megatron-core wrote -------------------------------------------------------------------------

DENSE = ("gated-tp2pp2", "mcore012", "mcore015", "mcore019-tp2pp2", "singleton")
LENGTH = {"max_position_embeddings": 128}
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not beside this checkout")


@needs_cases
@pytest.mark.parametrize("case", DENSE)
def test_shared_folders_of_megatron_core_convert(case: str, tmp_path: Path) -> None:
    """Which are Llama's as well as Mistral's, and ask for what their arguments do not say."""
    source = CASES / f"torch-dist-{case}" / "ckpt"
    error = refused(lambda: api.plan(source))
    assert error.kind == "ambiguous-family" and "llama or mistral" in (error.problems[0].hint or "")
    error = refused(lambda: api.plan(source, family="llama"))
    assert error.kind == "missing-fact" and "params.json" not in error.text()
    made = api.convert(source, tmp_path / "out", family="llama", options=api.Options(settings=LENGTH))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"], config["bos_token_id"]) == (
        2,
        24,
        None,
    )
    report = api.verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass"
    notes = " ".join(made.plan.notes + made.opened)
    assert ("linear_fc1.weight_w" in notes) == (case == "singleton")


@needs_cases
def test_shared_folders_of_other_models_are_named(tmp_path: Path) -> None:
    folder = {n: CASES / f"torch-dist-{n}" / "ckpt" for n in ("no-common", "numbered-bias", "moe")}
    error = refused(lambda: api.plan(folder["no-common"], family="llama"))
    assert "what looks like qwen3" in error.text()
    error = refused(lambda: api.plan(folder["no-common"]))  # a model alone: all of it is asked for by name
    asked = {p.where for p in error.problems}
    assert asked >= {"num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta"}
    api.convert(folder["numbered-bias"], tmp_path / "gpt2", family="megatron-gpt2")
    assert (
        api.verify(tmp_path / "gpt2", folder["numbered-bias"], levels=("coverage", "bits")).status == "pass"
    )
    error = refused(lambda: api.plan(folder["moe"], family="llama"))
    assert "with experts" in error.text() and "convert mixtral" in (error.problems[0].hint or "")
    error = refused(lambda: api.plan(folder["moe"], family="qwen2"))
    assert error.kind == "unknown-family" and "mixtral" in error.text()
