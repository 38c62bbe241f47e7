"""States that lie in buckets of each model-parallel rank in a torch_dist folder, laid out as each release
does it. Those that megatron-core writes are in test_optimizer_buffers.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckpt_tool import api
from tests.conftest import Written
from tests.test_dcp import Chunk
from tests.test_optimizer_buffers import MADE, checked
from tests.test_optimizer_state import parameters, refused
from tests.test_torch_dist import joined

WITH = api.Options(with_optimizer=True)
HEAD = (
    "optimizer.distributed.dp_group_idx_{}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_{}.{}"
)
NORM, FUSED = "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
# Where modules stand in a layer, without Transformer Engine and with it.
PLAIN = ("embedding", NORM, "linear_proj", "linear_qkv", "pre_mlp", "fc1", "fc2", "final", "output")
ENGINE = (
    "embedding",
    "linear_proj",
    "layer_norm_weight",
    "linear_qkv",
    "pre_mlp",
    "fc1",
    "fc2",
    "final",
    "output",
)
Model = dict[str, Tensor]
Change = Callable[[int, str, list[Tensor]], None]


@dataclass
class Laid:
    """How buckets are filled. `place` is asked where a parameter stands among its layer's."""

    order: tuple[str, ...] = PLAIN
    fused: bool = False
    unit: int = 64
    bucket: int = 5000
    stages: tuple[range, ...] = (range(3),)  # the layers of each
    change: Change = lambda rank, state, buckets: None
    model: Callable[[Model], None] = lambda model: None
    made: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=lambda: dict(MADE))


def in_order(model: Model, order: tuple[str, ...]) -> list[str]:
    """The names as the modules of a rank come."""

    def place(name: str) -> tuple[int, int, int]:
        part = next(k for k, word in enumerate(order) if word in name)
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        return (1 if layer >= 0 else 0 if not part else 2), layer, part

    return sorted(model, key=place)


def buckets(model: Model, laid: Laid, state: str) -> list[Tensor]:
    """Those of one rank."""
    made: list[list[Tensor]] = [[]]
    size = 0
    for name in reversed(in_order(model, laid.order)):
        if size >= laid.bucket:
            made.append([])
            size = 0
        gap = torch.full((-size % laid.unit,), 7.0)
        made[-1] += [gap, laid.made[state](model[name]).flatten()]
        size += len(gap) + model[name].numel()
    return [torch.cat(own) for own in made]


def is_in(name: str, stage: range) -> bool:
    """Of three layers; the first stage has the embedding, and the last what stands behind them."""
    if ".layers." in name:
        return int(name.split(".")[2]) in stage
    return (0 if "embedding" in name else 2) in stage


def folder(source: Path, where: Path, laid: Laid) -> Path:
    """A torch_dist folder of the run with its states."""
    shutil.copytree(source, where / "ranks")
    beside: dict[str, list[Chunk]] = {}
    for rank, path in enumerate(sorted((where / "ranks").rglob("model_optim_rng.pt"))):
        file = torch.load(path, weights_only=False)
        model = {n.removeprefix("model."): w.bfloat16() for n, w in parameters(file).items()}
        laid.model(model)
        if laid.fused:
            model = {n.replace(NORM, FUSED): w for n, w in model.items()}
        torch.save(file | {"model": model}, path)
        for (p, stage), state in product(enumerate(laid.stages), MADE):
            own = buckets({n: w for n, w in model.items() if is_in(n, stage)}, laid, state)
            laid.change(rank, state, own)
            for k, whole in enumerate(own):
                middle = len(whole) // 2  # of two data-parallel ranks
                halves = Chunk((0,), whole[:middle].clone()), Chunk((middle,), whole[middle:].clone())
                beside[HEAD.format(2 * p + rank, k, state)] = list(halves)
    made = joined(where / "ranks", where / "in", beside)
    (common,) = made.rglob("common.pt")
    held = torch.load(common, weights_only=False)
    torch.save(held | {"optimizer": {"param_state_sharding_type": "dp_reshardable"}}, common)
    return made


LAID = {
    "local, aligned": Laid(),
    "local, one bucket": Laid(bucket=1 << 30),
    "two stages": Laid(stages=(range(1), range(1, 3))),
    "engine, aligned": Laid(order=ENGINE, fused=True),
    "engine, not aligned": Laid(order=ENGINE, fused=True, unit=1),
    "local norms under fused names": Laid(order=(*PLAIN[:1], "layer_norm_weight", *PLAIN[2:]), fused=True),
}


@pytest.mark.parametrize("laid", LAID)
def test_buckets_of_two_ranks_are_read_and_verified(laid: str, originals: Written, tmp_path: Path) -> None:
    source = folder(originals("llama-mcore"), tmp_path, LAID[laid])
    made = api.convert(source, tmp_path / "out", family="llama", options=WITH)
    checked(tmp_path / "out")
    assert any("lies in buckets was proved" in n for n in made.plan.notes)
    assert not any("order of the modules alone" in n for n in made.plan.notes)
    assert not any("bucket" in d.tensor.name for d in made.plan.dropped)


def test_what_was_carried_is_verified_and_goes_back_by_name(originals: Written, tmp_path: Path) -> None:
    source = folder(originals("llama-mcore"), tmp_path, Laid())
    out, back = tmp_path / "out", tmp_path / "back"
    api.convert(source, out, family="llama", options=WITH)
    report = api.verify(out, source, levels=("coverage", "bits"))
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert report.status == "pass" and found.message.endswith("and of the source, byte for byte")
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True)
    api.convert(out, back, to="original", options=form)
    api.convert(back, tmp_path / "again", family="llama", options=WITH)
    checked(tmp_path / "again")


def test_a_moment_moved_by_one_element_fails(originals: Written, tmp_path: Path) -> None:
    api.convert(
        folder(originals("llama-mcore"), tmp_path, Laid()), tmp_path / "out", family="llama", options=WITH
    )

    def moved(rank: int, state: str, own: list[Tensor]) -> None:
        if (rank, state) == (1, "exp_avg"):  # the output layer
            own[0].copy_(own[0].roll(1))

    (tmp_path / "other").mkdir()
    source = folder(originals("llama-mcore"), tmp_path / "other", Laid(change=moved))
    report = api.verify(tmp_path / "out", source, levels="bits")
    (failed,) = (f for f in report.findings if f.check == "optimizer" and f.status == "fail")
    assert "exp_avg.lm_head.weight differs from it in 9,232 of 18,480" in failed.message, failed


def test_equal_weights_are_told_and_not_proved(originals: Written, tmp_path: Path) -> None:
    """Two norms of ones have changed places, and nothing shows it."""

    def ones(model: Model) -> None:
        for name in (n for n in model if "norm" in n and ".layers." in n):
            model[name] = torch.ones_like(model[name])

    source = folder(originals("llama-mcore"), tmp_path, Laid(model=ones))
    made = api.convert(source, tmp_path / "out", family="llama", options=WITH)
    said = (
        "by the order of the modules alone it was told which state is whose of 6 parameters with weights that"
    )
    (note,) = (n for n in made.plan.notes if said in n)
    assert "input_layernorm.weight" in note
    report = api.verify(tmp_path / "out", source, levels="bits")
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert report.status == "pass" and said in found.message


# --- what does not fit --------------------------------------------------------------------------------------


def another_weight(rank: int, state: str, own: list[Tensor]) -> None:
    if (rank, state) == (1, "param"):
        own[1][100] += 1


def exchanged(rank: int, state: str, own: list[Tensor]) -> None:
    own[0], own[1] = own[1], own[0]


def shorter(rank: int, state: str, own: list[Tensor]) -> None:
    own[-1] = own[-1][1:]


def lacking(rank: int, state: str, own: list[Tensor]) -> None:
    if (rank, state) == (1, "exp_avg_sq"):
        own.pop()


def narrow(rank: int, state: str, own: list[Tensor]) -> None:
    own[:] = [x.half() for x in own]


def copy_that_differs(rank: int, state: str, own: list[Tensor]) -> None:
    """The last norm, which both ranks have."""
    if (rank, state) == (1, "exp_avg"):
        own[0][154 * 60 + -154 * 60 % 64] += 1


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (another_weight, "unproved", "expected weights in float32 that rounded to BF16 are decoder.layers."),
        (exchanged, "unproved", "expected buckets of the lengths that its parameters have"),
        (shorter, "unproved", "expected buckets of the lengths that its parameters have"),
        (lacking, "unsupported", "expected param, exp_avg and exp_avg_sq of one length, found exp_avg F32"),
        (narrow, "unsupported", "expected flat tensors in float32, found exp_avg F16"),
        (
            copy_that_differs,
            "shard-conflict",
            "of decoder.final_layernorm.weight as on other ranks",
        ),
    ],
)
def test_buckets_that_do_not_fit_are_refused(
    change: Callable[[int, str, list[Tensor]], None],
    kind: str,
    words: str,
    originals: Written,
    tmp_path: Path,
) -> None:
    source = folder(originals("llama-mcore"), tmp_path, Laid(bucket=15000, change=change))
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    (problem,) = error.problems
    assert problem.kind == kind and words in problem.message, error
    assert "without --with-optimizer the model alone is converted" in str(problem.hint)
    api.plan(source, family="llama")


def test_a_rank_that_is_not_there_is_missed(originals: Written, tmp_path: Path) -> None:
    def gone(rank: int, state: str, own: list[Tensor]) -> None:
        own[:] = own if rank == 0 else []

    source = folder(originals("llama-mcore"), tmp_path, Laid(change=gone))
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    (problem,) = error.problems
    assert problem.kind == "unsupported"
    assert "expected buckets of a multiple of 2 tensor-parallel ranks, found 1" in problem.message
