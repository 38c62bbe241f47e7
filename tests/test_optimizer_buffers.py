"""States of a distributed optimizer, in every form that Megatron has given their buffers, and lists of
optimizers. The buffers here are laid out as each release does it; one test asks megatron-core itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.cli import cli
from ckpt_tool.convert.optimizer_state import STATES
from ckpt_tool.fixtures.families.mixtral import MCORE
from ckpt_tool.fixtures.megatron_core import Core
from ckpt_tool.fixtures.variants import VARIANTS
from tests import megatron_judge, megatron_optimizer
from tests.conftest import Written
from tests.test_dist_write import JUDGE, needs_judge
from tests.test_optimizer_state import decays, parameters, refused, same, states, with_state
from tests.test_torch_dist import joined

WITH = api.Options(with_optimizer=True)
# Of a weight; the last rounds to it in 16 bits.
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp_avg": lambda w: w.float() * 3,
    "exp_avg_sq": lambda w: w.float().square(),
    "param": lambda w: w.float() * (1 + 2**-14),
}


@dataclass(frozen=True)
class Release:
    """How it lays buffers out: whether each bucket is a tensor, filled up to a multiple of the ranks,
    parameters begin at multiples of 64; `pair`: the key has the dtype of parameters too."""

    listed: bool = False
    filled: bool = False
    aligned: bool = False
    pair: bool = True
    bucket: int = 1 << 30


RELEASES = {
    "core_v0.2": Release(filled=True, pair=False),
    "core_v0.4": Release(listed=True, filled=True, pair=False, bucket=5000),
    "core_v0.5": Release(listed=True, pair=False, bucket=5000),
    "core_v0.7": Release(bucket=5000),
    "core_v0.9": Release(aligned=True, bucket=5000),
    "core_v0.16": Release(aligned=True),
}
DATA_RANKS = 3


def buckets_of(model: dict[str, Tensor], release: Release, state: str) -> list[Tensor]:
    """The last parameter first."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for w in reversed(model.values()):
        if size >= release.bucket:
            buckets.append([])
            size = 0
        gap = -size % 64 if release.aligned else 0
        buckets[-1] += [torch.zeros(gap), MADE[state](w).flatten()]
        size += gap + w.numel()
    made = [torch.cat(parts) for parts in buckets]
    if release.filled:
        made = [torch.cat([b, torch.full((-len(b) % DATA_RANKS,), 7.0)]) for b in made]
    return made


def buffers(model: dict[str, Tensor], release: Release) -> dict[Any, Any]:
    """What `distrib_optim.pt` holds of one optimizer."""
    held: dict[str, Any] = {s: buckets_of(model, release, s) for s in MADE}
    made: dict[Any, Any] = {"per_bucket_numel": [{}]} if release.listed else {}
    if release.listed and not release.filled:
        made["per_bucket_numel_unpadded"] = [{torch.float32: [len(b) for b in held["param"]]}]
    if not release.listed:
        held = {s: torch.cat(parts) for s, parts in held.items()}
    if not release.listed and not release.filled:
        made["buckets_coalesced"] = True
        held["numel_unpadded"] = len(held["param"])
    dtype = next(iter(model.values())).dtype
    return made | {0: {(dtype, torch.float32) if release.pair else torch.float32: held}}


def groups(model: dict[str, Tensor]) -> dict[str, Any]:
    """What the file of a rank says of it: groups without numbers."""
    kinds = [k for k in (True, False) if any(decays(n, w) == k for n, w in model.items())]
    said = [{"lr": 1e-4, "betas": (0.9, 0.95), "wd_mult": float(k), "step": 7} for k in kinds]
    return {"optimizer": {"param_groups": said}}


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def apart(model: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{n: w for n, w in model.items() if is_expert(n) == kind} for kind in (False, True)]


def distributed(source: Path, out: Path, release: Release, *, chained: bool = False) -> Path:
    """The run with the state of a distributed optimizer, of `DATA_RANKS` data-parallel ranks."""
    shutil.copytree(source, out)
    seen = set()
    for path in sorted(out.rglob("model_optim_rng.pt")):
        file = torch.load(path, map_location="cpu", weights_only=False)
        file["args"].data_parallel_size = DATA_RANKS
        model = parameters(file)
        model = {n: w.bfloat16() for n, w in model.items()}
        file["model"] |= {n.removeprefix("model."): w for n, w in model.items()}
        parts = apart(model) if chained else [model]
        said, held = [groups(own) for own in parts], [buffers(own, release) for own in parts]
        rank = path.parent.name.split("_")[2]
        if chained and rank in seen:  # of another expert-parallel rank only experts are its own
            held[0] = None  # type: ignore[call-overload]
        seen.add(rank)
        file["optimizer"] = said if chained else said[0]
        torch.save(file, path)
        torch.save(held if chained else held[0], path.with_name("distrib_optim.pt"))
    return out


def checked(out: Path) -> None:
    """Every tensor of the model has its states, and nothing else has any."""
    model = {n: x for f in out.glob("model*.safetensors") for n, x in load_file(f).items()}
    found = states(out)
    assert found.keys() == {f"{kind}.{name}" for kind in STATES for name in model}
    for name, x in found.items():
        kind, _, of = name.partition(".")
        made = MADE["param" if kind == "fp32_param" else kind]
        assert x.dtype == torch.float32 and torch.equal(x, made(model[of])), name


# --- forth and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_buffers_of_every_release_are_read(release: str, originals: Written, tmp_path: Path) -> None:
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES[release])
    made = api.convert(source, tmp_path / "out", family="llama", options=WITH)
    checked(tmp_path / "out")
    assert any("was proved: the float32 weights there" in n for n in made.plan.notes)
    told = json.loads((tmp_path / "out" / "optimizer" / "optimizer.json").read_text())
    assert told["step"] == 7 and told["ranks"]["groups"] == ["decay", "others"]


def test_what_was_carried_is_verified_and_goes_back(originals: Written, tmp_path: Path) -> None:
    """To ranks of another number, by name as a run without a distributed optimizer has it."""
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES["core_v0.9"])
    out, back, again = (tmp_path / n for n in ("out", "back", "again"))
    api.convert(source, out, family="llama", options=WITH)
    report = api.verify(out, source, levels=("coverage", "bits"))
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert report.status == "pass" and "and of the source, byte for byte" in found.message, report.headline
    given = (str(out), "--source", str(source))
    CliRunner().invoke(cli, ["certificate", *given, "--level", "coverage", "--level", "bits"])
    check = CliRunner().invoke(cli, ["check-certificate", *given, "--spot", "3"])
    assert check.output.startswith("ckpt-tool check-certificate: pass"), check.output
    one = api.Options(family_options={"tensor_parallel": 1}, with_optimizer=True)
    api.convert(out, back, to="original", options=one)
    assert api.verify(back, out, levels=("coverage", "bits")).status == "pass"
    (path,) = back.rglob("*.pt")
    held = torch.load(path, weights_only=False)["optimizer"]
    assert [g["step"] for g in held["optimizer"]["param_groups"]] == [7, 7]
    api.convert(back, again, family="llama", options=WITH)
    checked(again)


def test_a_changed_moment_fails(originals: Written, tmp_path: Path) -> None:
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES["core_v0.9"])
    api.convert(source, tmp_path / "out", family="llama", options=WITH)
    changed(source, lambda held: held["exp_avg"].__setitem__(0, 9.0))
    report = api.verify(tmp_path / "out", source, levels="bits")
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert found.status == "fail" and "differs from it in 1 of" in found.message, found


def one_list(model: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Both optimizers of a run with experts of its own, by numbers."""
    made = []
    for own in apart(model):
        order = [*filter(lambda n: decays(n, own[n]), own), *filter(lambda n: not decays(n, own[n]), own)]
        numbers = {n: k for k, n in enumerate(order)}
        moments = {k: {m: MADE[m](own[n]) for m in ("exp_avg", "exp_avg_sq")} for n, k in numbers.items()}
        said = [
            g | {"params": [numbers[n] for n in order if decays(n, own[n]) == bool(g["wd_mult"])]}
            for g in groups(own)["optimizer"]["param_groups"]
        ]
        lists = [[MADE["param"](own[n]) for n in order if numbers[n] in g["params"]] for g in said]
        held = {"state": moments, "param_groups": said}
        made.append({"optimizer": held, "fp32_from_fp16_params": lists})
    return made


def listed(source: Path, out: Path) -> Path:
    """The run with a list of optimizers in the files of its ranks."""
    distributed(source, out, RELEASES["core_v0.16"])
    for path in out.rglob("model_optim_rng.pt"):
        file = torch.load(path, weights_only=False)
        torch.save(file | {"optimizer": one_list(parameters(file))}, path)
        path.with_name("distrib_optim.pt").unlink()
    return out


@pytest.mark.parametrize("kind", ["list", "buffers"])
def test_experts_have_an_optimizer_of_their_own(kind: str, originals: Written, tmp_path: Path) -> None:
    """Back to a list where experts are shared out, and to one optimizer where they are not."""
    source, out = originals("mixtral-mcore"), tmp_path / "out"
    if kind == "list":
        source = listed(source, tmp_path / "in")
    else:
        source = distributed(source, tmp_path / "in", RELEASES["core_v0.9"], chained=True)
    api.convert(source, out, family="mixtral", options=WITH)
    checked(out)
    told = json.loads((out / "optimizer" / "optimizer.json").read_text())
    assert told["ranks"]["optimizers"] == [2, 1] and told["ranks"]["groups"] == ["decay", "others", "all"]
    for experts in (2, 1) if kind == "list" else (2,):
        back = tmp_path / f"back{experts}"
        asked = {"expert_parallel": experts}
        api.convert(out, back, to="original", options=api.Options(family_options=asked, with_optimizer=True))
        assert api.verify(back, out, levels=("coverage", "bits")).status == "pass"
        held = [torch.load(p, weights_only=False)["optimizer"] for p in back.rglob("*.pt")]
        assert all(isinstance(h, list) == (experts == 2) for h in held)
        api.convert(back, tmp_path / f"again{experts}", family="mixtral", options=WITH)
        checked(tmp_path / f"again{experts}")
    if kind == "list":
        first = min(source.rglob("*.pt")), min((tmp_path / "back2").rglob("*.pt"))
        before, after = (torch.load(p, weights_only=False)["optimizer"] for p in first)
        assert same(before, after)


@pytest.mark.parametrize("kind", ["list", "buffers"])
def test_states_of_experts_that_are_whole_on_a_rank(kind: str, tmp_path: Path) -> None:
    """Of such a run no whole grid is saved, and each file has an optimizer of its own experts."""
    source, out = tmp_path / "run", tmp_path / "out"
    source.mkdir()
    Core(MCORE, ranks=2, parallel=2, own=1).write(source, "mixtral-mcore")
    if kind == "list":
        source = listed(source, tmp_path / "in")
    else:
        source = distributed(source, tmp_path / "in", RELEASES["core_v0.16"], chained=True)
    api.convert(source, out, family="mixtral", options=WITH)
    checked(out)
    assert api.verify(out, source, levels=("coverage", "bits")).status == "pass"


def test_experts_of_other_numbers_stay_apart(originals: Written, tmp_path: Path) -> None:
    source = listed(originals("mixtral-mcore"), tmp_path / "in")
    for path in source.rglob("*.pt"):
        file = torch.load(path, weights_only=False)
        file["optimizer"][1]["optimizer"]["param_groups"][0]["lr"] = 5e-5
        torch.save(file, path)
    api.convert(source, tmp_path / "out", family="mixtral", options=WITH)
    one = api.Options(family_options={"expert_parallel": 1}, with_optimizer=True)
    error = refused(lambda: api.plan(tmp_path / "out", to="original", options=one))
    assert error.problems[0].kind == "unsupported" and "expected the same numbers for experts" in str(error)


# --- what does not fit --------------------------------------------------------------------------------------


def changed(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The buffers of the first rank."""
    path = min(source.rglob("distrib_optim.pt"))
    file = torch.load(path, weights_only=False)
    (held,) = file[0].values()
    change(held)
    torch.save(file, path)


def moved(held: dict[str, Any]) -> None:
    """Every state one place on: lengths are right, and one moment is another's."""
    held |= {s: held[s].roll(1) for s in MADE}


def another_weight(held: dict[str, Any]) -> None:
    held["param"][100] += 1


def shorter(held: dict[str, Any]) -> None:
    held |= {s: held[s][64 * 50 :] for s in MADE}
    held["numel_unpadded"] = len(held["param"])


def said_otherwise(held: dict[str, Any]) -> None:
    held["numel_unpadded"] += 64


def lacking(held: dict[str, Any]) -> None:
    del held["exp_avg_sq"]


def of_another_length(held: dict[str, Any]) -> None:
    held["exp_avg"] = held["exp_avg"][:-1]


def longer(held: dict[str, Any]) -> None:
    held |= {s: torch.cat([held[s], torch.zeros(64)]) for s in MADE}
    held["numel_unpadded"] += 64


def narrow(held: dict[str, Any]) -> None:
    held |= {s: held[s].half() for s in MADE}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (moved, "unproved", "output_layer.weight, found others at every place"),
        (another_weight, "unproved", "output_layer.weight, found others at every place"),
        (longer, "unproved", "found some behind all parameters"),
        (shorter, "size-mismatch", "elements of 21 parameters, found"),
        (said_otherwise, "size-mismatch", "as numel_unpadded says, found"),
        (lacking, "unsupported", "expected param, exp_avg and exp_avg_sq of one length, found exp_avg F32"),
        (of_another_length, "unsupported", "expected param, exp_avg and exp_avg_sq of one length, found"),
        (narrow, "unsupported", "expected flat tensors in float32, found exp_avg F16"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], None], kind: str, words: str, originals: Written, tmp_path: Path
) -> None:
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES["core_v0.9"])
    changed(source, change)
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    assert {p.kind for p in error.problems} == {kind} and words in str(error), error
    assert all(str(p.file).endswith("mp_rank_00/distrib_optim.pt") for p in error.problems)
    api.plan(source, family="llama")


def test_a_place_that_is_not_the_only_one_is_no_place(originals: Written, tmp_path: Path) -> None:
    """Weights that are zero fit at a multiple of 64 and before it, and other moments would be theirs."""
    source = shutil.copytree(originals("llama-mcore"), tmp_path / "zero")
    for path in source.rglob("*.pt"):
        file = torch.load(path, weights_only=False)
        for name, w in file["model"].items():
            if "embedding" not in name and w is not None:
                w.zero_()
        torch.save(file, path)
    source = distributed(source, tmp_path / "in", RELEASES["core_v0.9"])
    changed(source, lambda held: held | {s: held[s].zero_() for s in ("exp_avg", "exp_avg_sq")})
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    assert error.problems[0].kind == "unproved" and "found more than one place where they are" in str(error)


def test_a_rank_without_its_buffers_is_named(originals: Written, tmp_path: Path) -> None:
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES["core_v0.9"])
    max(source.rglob("distrib_optim.pt")).unlink()
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    (problem,) = error.problems
    assert problem.kind == "missing-shard" and str(problem.file).endswith("mp_rank_01/distrib_optim.pt")
    assert "expected the state of a distributed optimizer beside the model" in problem.message


def test_buffers_beside_an_empty_list_of_optimizers(originals: Written, tmp_path: Path) -> None:
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES["core_v0.9"])
    for path in source.rglob("model_optim_rng.pt"):
        torch.save(torch.load(path, weights_only=False) | {"optimizer": []}, path)
    api.convert(source, tmp_path / "out", family="llama", options=WITH)
    checked(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "optimizer" / "optimizer.json").read_text())
    assert told["ranks"] == {}  # which no ranks can be written of


def test_buffers_are_read_in_a_zip_and_not_in_a_gzipped_tar(originals: Written, tmp_path: Path) -> None:
    source = distributed(originals("llama-mcore"), tmp_path / "in", RELEASES["core_v0.9"])
    archive = shutil.make_archive(str(tmp_path / "run"), "zip", source)
    api.convert(archive, tmp_path / "out", family="llama", options=WITH)
    checked(tmp_path / "out")
    archive = shutil.make_archive(str(tmp_path / "run"), "gztar", source)
    error = refused(lambda: api.plan(archive, family="llama", options=WITH))
    (problem,) = error.problems
    assert problem.kind == "unsupported" and "was not inflated with the others" in problem.message
    assert str(problem.file).endswith("distrib_optim.pt")


def in_thirds(path: Path) -> None:
    file = torch.load(path, weights_only=False)
    torch.save([*file, deepcopy(file[1])], path)


def of_two_dtypes(path: Path) -> None:
    file = torch.load(path, weights_only=False)
    file[0][1] = {(torch.float32, torch.float32): deepcopy(next(iter(file[0][0].values())))}
    torch.save(file, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_thirds, "expected an optimizer, and one of experts, found 3"),
        (of_two_dtypes, "expected a buffer for each dtype of parameters (bfloat16), found bfloat16, float32"),
    ],
)
def test_optimizers_and_buffers_of_other_numbers_are_refused(
    change: Callable[[Path], None], words: str, originals: Written, tmp_path: Path
) -> None:
    source = distributed(originals("mixtral-mcore"), tmp_path / "in", RELEASES["core_v0.9"], chained=True)
    change(min(source.rglob("distrib_optim.pt")))
    error = refused(lambda: api.plan(source, family="mixtral", options=WITH))
    assert error.problems[0].kind == "unsupported" and words in str(error)


# --- torch_dist ---------------------------------------------------------------------------------------------


def renamed(model: dict[str, Tensor]) -> None:
    """As `fully_reshardable` calls the weights in float32."""
    for name in [n for n in model if n.startswith("optimizer.state.fp32_param.")]:
        of = name.removeprefix("optimizer.state.fp32_param.")
        del model[name]
        model[f"optimizer.state.param.{of}"] = MADE["param"](model[of])


def test_weights_that_came_out_of_buffers_are_compared(originals: Written, tmp_path: Path) -> None:
    """Megatron-Core puts some of them beside their places where a run has several buckets."""
    source = joined(with_state(originals("llama-mcore"), tmp_path / "ranks", renamed), tmp_path / "in")
    api.convert(source, tmp_path / "out", family="llama", options=WITH)
    checked(tmp_path / "out")

    def beside(model: dict[str, Tensor]) -> None:
        renamed(model)
        name = "optimizer.state.param.decoder.final_layernorm.weight"
        model[name] = model[name].roll(1)

    source = joined(with_state(originals("llama-mcore"), tmp_path / "other", beside), tmp_path / "wrong")
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    (problem,) = error.problems
    assert (
        problem.kind == "unproved" and problem.where == "optimizer.state.param.decoder.final_layernorm.weight"
    )


@pytest.mark.parametrize(
    ("form", "kind", "words"),
    [
        ("dp_reshardable", "missing-tensor", "in buckets, as dp_reshardable has it, found no whole ones"),
        ("dp_zero_gather_scatter", "unsupported", "found an object of each rank (dp_zero_gather_scatter)"),
    ],
)
def test_forms_of_torch_dist_that_are_not_there_are_named(
    form: str, kind: str, words: str, originals: Written, tmp_path: Path
) -> None:
    source = joined(originals("llama-mcore"), tmp_path / "in")
    plain = api.plan(source, family="llama").digest()  # the weights alone
    (path,) = source.rglob("common.pt")
    said: dict[Any, Any] = {"param_state_sharding_type": form}
    for held in (said, {0: said, 1: {"param_state_sharding_type": []}}):
        torch.save(torch.load(path, weights_only=False) | {"optimizer": held}, path)
        error = refused(lambda: api.plan(source, family="llama", options=WITH))
        (problem,) = error.problems
        assert problem.kind == kind and words in problem.message, error
        assert "without --with-optimizer" in str(problem.hint)
    assert api.plan(source, family="llama").digest() == plain


def test_flattened_states_are_named(originals: Written, tmp_path: Path) -> None:
    """Which Megatron-Core wrote until 0.13."""

    def flat(model: dict[str, Tensor]) -> None:
        name = "optimizer.state.exp_avg.output_layer.weight"
        model[name] = model[name].flatten()

    source = joined(with_state(originals("llama-mcore"), tmp_path / "ranks", flat), tmp_path / "in")
    (path,) = source.rglob("common.pt")
    said = {"param_state_sharding_type": "fully_sharded_model_space"}
    torch.save(torch.load(path, weights_only=False) | {"optimizer": said}, path)
    (problem,) = refused(lambda: api.plan(source, family="llama", options=WITH)).problems
    assert problem.kind == "unsupported" and problem.where == "optimizer.state.exp_avg.output_layer.weight"
    assert "found [9240], flattened (fully_sharded_model_space)" in problem.message
    api.convert(source, tmp_path / "out", family="llama")  # the weights alone
    assert api.verify(tmp_path / "out", source, levels=("coverage", "bits")).status == "pass"


def test_partitions_of_deepspeed_are_named(conversions: Written, tmp_path: Path) -> None:
    made = conversions("llama-3-8b")
    shutil.copy(made / "config.json", tmp_path)
    torch.save({"module": load_file(made / "model.safetensors")}, tmp_path / "mp_rank_00_model_states.pt")
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    held = {"single_partition_of_fp32_groups": [torch.zeros(10)]}
    torch.save({"optimizer_state_dict": held}, tmp_path / name)
    (problem,) = refused(lambda: api.plan(tmp_path, options=WITH)).problems
    assert (problem.kind, problem.file) == ("unsupported", name)
    assert problem.message.endswith("found flat partitions of DeepSpeed's ranks")
    api.plan(tmp_path)


# --- megatron-core ------------------------------------------------------------------------------------------


FORMS = "ranks,dp_reshardable"


def check_folder(tmp_path: Path, truth: dict[str, Any]) -> None:
    """The states in the buckets of a folder, by name."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "run" / "iter_0000002.dp_reshardable").rename(tmp_path / "dist" / "iter_0000002")
    hf, back = tmp_path / "hf-dist", tmp_path / "back-dist"
    settings = VARIANTS["qwen2-mcore-tied"].settings
    options = api.Options(settings=settings, with_optimizer=True)
    api.convert(tmp_path / "dist", hf, family="qwen2", options=options)
    told = json.loads((hf / "optimizer" / "optimizer.json").read_text())
    assert told["step"] == 2 and [g["wd_mult"] for g in told["groups"]] == [1.0, 0.0]
    form = {"form": "torch_dist", "layers": "non_homogeneous"}
    api.convert(hf, back, to="original", options=api.Options(family_options=form, with_optimizer=True))
    with open_checkpoint(back) as checkpoint:
        held = {t.name: checkpoint.read(t) for t in checkpoint if t.name.startswith("optimizer.state.")}
    fused = {plain: name for name, plain in megatron_judge.NORMS.items()}
    for name, own in truth.items():
        plain = next((n for n in fused if name.endswith(n)), None)
        called = name if plain is None else name.removesuffix(plain) + fused[plain]
        for state, whole in own.items():
            kind = "fp32_param" if state == "param" else state
            x = torch.from_numpy(held.pop(f"optimizer.state.{kind}.{called}").view("<f4"))
            wanted = whole[: len(x)]  # padding is made up
            assert torch.equal(x[: len(whole)].reshape(wanted.shape), wanted), (name, state)
    assert truth and not held


@needs_judge
def test_megatron_cores_own_buffers_are_read(originals: Written, tmp_path: Path) -> None:
    """What it saves of two data-parallel ranks in several buckets, beside what they know of parameters: in
    the files of ranks, and in the buckets of a torch_dist folder."""
    source = next(originals("qwen2-mcore-tied").glob("iter_*"))
    script = [sys.executable, "-W", "ignore", str(Path(megatron_optimizer.__file__))]
    out = tmp_path / "run" / "iter_0000002"
    run = subprocess.run(
        [*script, "1x1x1x2", str(tmp_path / "meeting"), str(source), str(out), FORMS, "3000"],
        env={**os.environ, "PYTHONPATH": str(JUDGE), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    truth = torch.load(out / "truth.pt")
    check_folder(tmp_path, truth)
    settings = VARIANTS["qwen2-mcore-tied"].settings
    options = api.Options(settings=settings, with_optimizer=True)
    api.convert(tmp_path / "run", tmp_path / "hf", family="qwen2", options=options)
    back = tmp_path / "back"
    api.convert(tmp_path / "hf", back, to="original", options=WITH)
    (path,) = back.rglob("*.pt")
    held = torch.load(path, weights_only=False)
    own = {n.removeprefix("model."): w for n, w in parameters(held).items()}
    order = [n for k in (True, False) for n in own if decays(n, own[n]) == k]
    assert order and truth.keys() == set(order)
    inner = held["optimizer"]["optimizer"]["state"]
    masters = [w for group in held["optimizer"]["fp32_from_fp16_params"] for w in group]
    for number, (name, master) in enumerate(zip(order, masters, strict=True)):
        rows = truth[name]["param"].shape[0]  # padding is made up
        for state, x in {**inner[number], "param": master}.items():
            assert torch.equal(x[:rows], truth[name][state][: x.shape[0]]), (name, state)
