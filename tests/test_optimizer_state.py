"""`convert --with-optimizer`: moments go where their tensors go, and back, bit for bit. A moment is made as a
function of each number of its tensor, so that it is right where it is that function of the converted one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckpt_tool import api
from ckpt_tool.cli import cli
from ckpt_tool.convert.optimizer_ranks import crc32_of
from ckpt_tool.convert.optimizer_state import STATES
from ckpt_tool.convert.shares import Worker
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.compare import compare
from tests.conftest import Written
from tests.test_torch_dist import joined

MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp_avg": lambda w: w.float() * 3,
    "exp_avg_sq": lambda w: w.float().square(),
    "fp32_param": lambda w: w.float() + 1,
}
WITH = api.Options(with_optimizer=True)


def refused(run: Callable[[], Any]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        run()
    return caught.value


def states(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted((folder / "optimizer").glob("*.safetensors")):
        found |= load_file(file)
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: x for f in folder.glob("model*.safetensors") for n, x in load_file(f).items()}


def checked(out: Path, kinds: tuple[str, ...]) -> None:
    """Every tensor of the model has its states, and nothing else has any."""
    model, found = weights(out), states(out)
    assert found.keys() == {f"{kind}.{name}" for kind in kinds for name in model}
    for name, x in found.items():
        kind, _, of = name.partition(".")
        assert x.dtype == torch.float32 and torch.equal(x, MADE[kind](model[of])), name


# --- the ranks' own files -----------------------------------------------------------------------------------


def decays(name: str, x: Tensor) -> bool:
    return x.ndim > 1 and not name.endswith(".bias")


def flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, x in tree.items():
        if isinstance(x, Tensor):
            found[f"{prefix}{key}"] = x
        elif isinstance(x, dict):
            found |= flat(x, f"{prefix}{key}.")
    return found


def parameters(file: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a rank in the order of its file."""
    model = flat({k: v for k, v in file.items() if k.startswith("model")})
    return {n: x for n, x in model.items() if x.is_floating_point() and "_extra_state" not in n}


def adam(model: dict[str, Tensor]) -> dict[str, Any]:
    """The state of those parameters in this order, as torch's optimizers number it."""
    order = [n for n in model if decays(n, model[n])], [n for n in model if not decays(n, model[n])]
    numbers = {n: k for k, n in enumerate([*order[0], *order[1]])}
    moments = {k: {m: MADE[m](model[n]) for m in ("exp_avg", "exp_avg_sq")} for n, k in numbers.items()}
    return {
        "state": {k: {"step": 7, **own} for k, own in moments.items()},
        "param_groups": [
            {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": wd, "params": [numbers[n] for n in names]}
            for wd, names in zip((0.1, 0.0), order, strict=True)
        ],
    }


def mixed(model: dict[str, Tensor]) -> dict[str, Any]:
    """That of a run in 16 bits, whose steps are made on weights in float32."""
    narrow = [{n: x for n, x in model.items() if decays(n, x) == group} for group in (True, False)]
    lists = [[MADE["fp32_param"](x) for x in own.values() if x.itemsize == 2] for own in narrow]
    return {"optimizer": adam(model), "fp32_from_fp16_params": lists}


def trained(
    source: Path,
    out: Path,
    change: Callable[[dict[str, Any]], None] = lambda inner: None,
    state: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda model: {"optimizer": adam(model)},
) -> Path:
    """The same run with all of its Adam's state."""
    shutil.copytree(source, out)
    for path in sorted(out.rglob("model_optim_rng.pt")):
        file = torch.load(path, map_location="cpu", weights_only=False)
        held = state(parameters(file))
        change(held.get("optimizer", held))
        file["optimizer"] = held
        torch.save(file, path)
    return out


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch asks for to read the loss scaler of an old run, whose place the state takes."""
    for name, kind in (
        ("megatron.fp16.loss_scaler", "DynamicLossScaler"),
        ("apex.optimizers.fused_adam", "FusedAdam"),
    ):
        for k in range(1, 4):
            module = types.ModuleType(".".join(name.split(".")[:k]))
            setattr(module, kind, type(kind, (), {}))
            monkeypatch.setitem(sys.modules, module.__name__, module)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(x, b[k]) for k, x in a.items())
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def of_32_bits(model: dict[str, Tensor]) -> dict[str, Any]:
    """That of a run in 32 bits, in which torch counts the steps of each tensor."""
    held = adam(model)
    for own in held["state"].values():
        own["step"] = torch.tensor(7.0)
    return held


# Ranks and rows of padding; weights in float32; experts, stages.
RUNS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "gpt2-v2-tp2": of_32_bits,
    "qwen2-mcore": mixed,
    "mixtral-mcore": lambda model: {"optimizer": adam(model)},
}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("variant", RUNS)
def test_ranks_go_forth_and_back_with_their_state(variant: str, originals: Written, tmp_path: Path) -> None:
    chosen, state = VARIANTS[variant], RUNS[variant]
    source = trained(originals(variant), tmp_path / "in", state=state)
    kinds = STATES if state is mixed else STATES[:2]
    options = api.Options(settings=chosen.settings, with_optimizer=True)
    made = api.convert(source, tmp_path / "out", family=chosen.family, options=options)
    checked(tmp_path / "out", kinds)
    told = json.loads((tmp_path / "out" / "optimizer" / "optimizer.json").read_text())
    assert told["step"] == 7 and told["states"] == list(kinds)
    assert [g["weight_decay"] for g in told["groups"]] == [0.1, 0.0]
    assert not any(".exp_avg" in d.tensor.name for d in made.plan.dropped)
    report = api.verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert found.status == "pass" and ", ".join(kinds) in found.message
    assert not any("read by no loader" in f.message for f in report.findings)
    back = tmp_path / "back"
    api.convert(tmp_path / "out", back, to="original", options=WITH)
    files = sorted(source.rglob("model_optim_rng.pt")), sorted(back.rglob("model_optim_rng.pt"))
    assert len(files[0]) == len(files[1])
    for one, other in zip(*files, strict=True):
        before, after = (torch.load(p, weights_only=False) for p in (one, other))
        model = {n: parameters(after)[n] for n in parameters(before)}
        assert same(after["optimizer"], state(model))
        schedules = {n: before[n] for n in ("opt_param_scheduler", "lr_scheduler") if n in before}
        assert same({n: after[n] for n in schedules}, schedules)
        if all(map(torch.equal, parameters(before).values(), model.values())):  # rows of padding are made up
            assert same(after["optimizer"], before["optimizer"])
    report = api.verify(back, tmp_path / "out", levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert f"{', '.join(kinds)} of the optimizer" in found.message
    assert not any("not the one recorded" in f.message for f in report.findings)


@pytest.fixture(scope="module")
def run(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in 16 bits, `in`, and its conversion, `hf`."""
    root = tmp_path_factory.mktemp("run")
    trained(originals("qwen2-mcore"), root / "in", state=mixed)
    api.convert(root / "in", root / "hf", family="qwen2", options=WITH)
    return root


def test_ranks_are_shared_out_otherwise(run: Path, tmp_path: Path) -> None:
    """Numbers are those of the ranks that are written, in the order that the original's modules have."""
    asked = {"tensor_parallel": 1, "pipeline_parallel": 2}
    options = api.Options(family_options=asked, with_optimizer=True)
    api.convert(run / "hf", tmp_path / "back", to="original", options=options)
    files = [torch.load(p, weights_only=False) for p in sorted((tmp_path / "back").rglob("*.pt"))]
    before = torch.load(next((run / "in").rglob("*.pt")), weights_only=False)
    names = [*parameters(before)]
    assert len(files) == 2
    for file in files:
        own = parameters(file)
        ordered = {n: own[n] for n in names if n in own}
        assert ordered.keys() == own.keys() and same(file["optimizer"], mixed(ordered))
    api.convert(tmp_path / "back", tmp_path / "again", family="qwen2", options=WITH)
    assert same(states(tmp_path / "again"), states(run / "hf"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", ["hf", "original"])
def test_what_was_stopped_and_what_workers_make_is_the_same(to: str, run: Path, tmp_path: Path) -> None:
    source = run / ("in" if to == "hf" else "hf")
    given: dict[str, Any] = {"to": to, "options": replace(WITH, max_shard_bytes=200_000)}
    seen: list[tuple[str, str]] = []  # how often each is told is a matter of time

    def see(now: api.Progress) -> None:
        seen.append((now.stage, now.file))

    whole = api.convert(source, tmp_path / "whole", progress=see, jobs=1, **given)
    # With some files finished, or, where there is one, with that.
    place = ("copy", "optimizer/exp_avg_sq-00001-of-00005.safetensors") if to == "hf" else ("finish", "")
    assert place in seen

    def stop(now: api.Progress) -> None:
        if (now.stage, now.file) == place:
            raise KeyboardInterrupt

    error = refused(lambda: api.convert(source, tmp_path / "out", progress=stop, jobs=1, **given))
    assert error.kind == "interrupted"
    done = api.convert(source, tmp_path / "out", resume=True, **given)
    if to == "hf":
        assert any(name.startswith("optimizer/") for name in done.outcome.resumed)
    assert len(whole.plan.outputs) > 1
    shared = api.Shared(source, tmp_path / "shared", **given)
    for k in (2, 1):
        api.convert_part(shared, Worker(k, 2))
    api.publish_parts(shared)
    for other in ("out", "shared"):
        assert contents(tmp_path / other) == contents(tmp_path / "whole")


def another_decay(held: dict[str, Any]) -> None:
    held["optimizer"]["param_groups"][1]["weight_decay"] = 0.1


def another_count(held: dict[str, Any]) -> None:
    held["optimizer"]["state"][3]["step"] = 8


def other_numbers(held: dict[str, Any]) -> None:
    held["optimizer"]["param_groups"][0]["params"].reverse()


def test_what_ranks_say_beside_the_tensors_is_verified(run: Path, tmp_path: Path) -> None:
    one = api.Options(family_options={"tensor_parallel": 1}, with_optimizer=True)
    api.convert(run / "hf", tmp_path / "back", to="original", options=one)
    (path,) = (tmp_path / "back").rglob("*.pt")
    for change, where in (
        (another_decay, "param_groups.1.weight_decay"),
        (another_count, "state.3.step"),
        (other_numbers, "param_groups.0.params.0"),
    ):
        written = path.read_bytes()
        file = torch.load(path, weights_only=False)
        change(file["optimizer"])
        torch.save(file, path)
        report = api.verify(tmp_path / "back", run / "hf", levels="bits")
        (found,) = (f for f in report.findings if f.check == "optimizer")
        assert found.status == "fail" and str(found.where).endswith(where), found
        path.write_bytes(written)


def test_a_certificate_holds_for_ranks_with_states(run: Path, tmp_path: Path) -> None:
    one = api.Options(family_options={"tensor_parallel": 1}, with_optimizer=True)
    api.convert(run / "hf", tmp_path / "back", to="original", options=one)
    given = (str(tmp_path / "back"), "--source", str(run / "hf"))
    CliRunner().invoke(cli, ["certificate", *given, "--level", "coverage", "--level", "bits"])
    check = CliRunner().invoke(cli, ["check-certificate", *given, "--spot", "3"])
    assert check.output.startswith("ckpt-tool check-certificate: pass"), check.output
    (path,) = (tmp_path / "back").rglob("*.pt")
    file = torch.load(path, weights_only=False)
    file["optimizer"]["optimizer"]["state"][0]["exp_avg"][0] += 1
    torch.save(file, path)
    check = CliRunner().invoke(cli, ["check-certificate", *given[:1]])
    assert check.output.startswith("ckpt-tool check-certificate: fail"), check.output


def test_a_certificate_says_that_states_are_not_made_again(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run / "hf", tmp_path / "out")
    given = (str(out), "--source", str(run / "in"))
    CliRunner().invoke(cli, ["certificate", *given, "--level", "coverage", "--level", "bits"])
    check = CliRunner().invoke(cli, ["check-certificate", *given, "--spot", "3"])
    assert check.output.startswith("ckpt-tool check-certificate: pass")
    words = "the states of its optimizer were not made again: only --full compares them"
    assert words in " ".join(check.output.split())


def test_the_document_is_compared_with_the_source_whatever_the_manifest_says(
    run: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(run / "hf", tmp_path / "out")
    place, manifest = out / "optimizer" / "optimizer.json", out / "ckpt-tool.json"
    right, recorded = json.loads(place.read_text()), json.loads(manifest.read_text())
    assert right["groups"][1]["weight_decay"] == 0.0
    groups = [right["groups"][0], right["groups"][1] | {"weight_decay": 0.5}]
    schedule = {"name": "lr_scheduler", "values": {}}
    for change, where in (
        ({"step": 8}, "step"),
        ({"groups": groups}, "groups.1.weight_decay"),
        ({"schedule": schedule}, "schedule"),
    ):
        place.write_text(json.dumps(right | change))
        for entry in recorded["documents"]:
            if entry["file"] == "optimizer/optimizer.json":
                entry["sha256"] = hashlib.sha256(place.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(recorded))
        (found,) = (f for f in api.verify(out, run / "in", levels="bits").findings if f.check == "optimizer")
        assert (found.status, found.where) == ("fail", f"optimizer/optimizer.json.{where}")


def test_a_pipe_in_place_of_the_document_is_not_waited_for(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run / "hf", tmp_path / "out")
    (out / "optimizer" / "optimizer.json").unlink()
    os.mkfifo(out / "optimizer" / "optimizer.json")
    (found,) = (f for f in api.verify(out, run / "in", levels="bits").findings if f.check == "optimizer")
    assert found.status == "fail" and found.message == "expected this file, found none that can be read"


def test_a_schedule_that_the_source_has_not_fails(run: Path, tmp_path: Path) -> None:
    api.convert(run / "hf", tmp_path / "back", to="original", options=WITH)
    path = sorted((tmp_path / "back").rglob("*.pt"))[0]
    torch.save(torch.load(path, weights_only=False) | {"opt_param_scheduler": {"max_lr": 3.0}}, path)
    report = api.verify(tmp_path / "back", run / "hf", levels="bits")
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert found.status == "fail" and str(found.where).endswith(": opt_param_scheduler")


def test_states_that_no_manifest_records_are_in_the_headline(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run / "hf", tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    report = api.verify(out, run / "in", levels=("coverage", "bits"))
    assert report.status == "pass" and report.headline.endswith(
        "; optimizer not compared: no manifest records the exp_avg, exp_avg_sq, fp32_param that lie in "
        "optimizer/, and they were compared with nothing"
    )


def test_states_that_cannot_be_opened_are_in_the_headline(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run / "hf", tmp_path / "out")
    (out / "ckpt-tool.json").unlink()
    (out / "optimizer" / "exp_avg.safetensors").write_bytes(b"none")
    report = api.verify(out, run / "in", levels=("coverage", "bits"))
    words = "; optimizer not compared: what lies in optimizer/ cannot be read as states: "
    assert report.status == "pass" and words in report.headline


def test_states_of_ranks_that_differ_are_left_out_of_a_comparison(run: Path) -> None:
    report = compare(run / "in", run / "hf")
    assert report.status == "pass"
    counts = [f.data["count"] for f in report.findings if f.check == "left out"]
    assert counts == [522, len(states(run / "hf"))]
    assert f"; {sum(counts)} in the files were left out and not compared" in report.headline


def other_rate(held: dict[str, Any]) -> None:
    held["param_groups"][1]["lr"] = 5.0


def other_steps(held: dict[str, Any]) -> None:
    held["state"][2]["step"] = torch.tensor(9.0)


def half_steps(held: dict[str, Any]) -> None:
    for own in held["state"].values():
        own["step"] = torch.tensor(7.5)


def many_steps(held: dict[str, Any]) -> None:
    for n, own in held["state"].items():
        own["step"] = torch.tensor(1234567.0 + (n == 2))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("change", "ranks", "key", "note"),
    [
        (other_rate, (1,), "groups", "ranks have other numbers for groups of parameters, so "),
        (other_steps, (0, 1), "step", "ranks made 7 and 9 steps, so "),
        (other_steps, (0,), "step", "ranks made 7 and 9 steps, so "),
        (half_steps, (0, 1), "step", "ranks made 7.5 steps, so "),
        (many_steps, (0, 1), "step", "ranks made 1234567 and 1234568 steps, so "),
    ],
)
def test_what_ranks_say_otherwise_is_not_taken_from_one_of_them(
    change: Callable[[dict[str, Any]], None],
    ranks: tuple[int, ...],
    key: str,
    note: str,
    originals: Written,
    tmp_path: Path,
) -> None:
    source = trained(originals("gpt2-v2-tp2"), tmp_path / "in", state=of_32_bits)
    for rank in ranks:
        path = sorted(source.rglob("*.pt"))[rank]
        file = torch.load(path, weights_only=False)
        change(file["optimizer"])
        torch.save(file, path)
    api.convert(source, tmp_path / "out", family="megatron-gpt2", options=WITH)
    told = json.loads((tmp_path / "out" / "optimizer" / "optimizer.json").read_text())
    assert key not in told and {"states", "ranks", "groups", "step"} - told.keys() == {key}
    report = api.verify(tmp_path / "out", source, levels="bits")
    (found,) = (f for f in report.findings if f.check == "optimizer")
    assert found.status == "pass" and note in found.message  # beside what is shown
    error = refused(lambda: api.plan(tmp_path / "out", to="original", options=WITH))
    assert (error.problems[0].kind, error.problems[0].where) == ("unsupported", key)


def without_order(told: dict[str, Any]) -> None:
    told["ranks"]["order"].remove("decoder.layers.{}.mlp.linear_fc2.weight")
    told["ranks"]["crc32"] = crc32_of(told["ranks"])


def without_steps(told: dict[str, Any]) -> None:
    del told["step"]


def of_no_ranks(told: dict[str, Any]) -> None:
    del told["ranks"]


def exchanged(told: dict[str, Any]) -> None:
    """Of norms, which have one shape: each would get the state of the other."""
    order = told["ranks"]["order"]
    a, b = (k for k, name in enumerate(order) if name.endswith("layer_norm_weight"))
    order[a], order[b] = order[b], order[a]


def of_another_kind(told: dict[str, Any]) -> None:
    told["ranks"]["groups"] = ["decay", "decay"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (without_order, "unsupported", "linear_fc2.weight: expected the parameters of the ranks"),
        (exchanged, "bad-config", "ranks.crc32: expected the checksum"),
        (without_steps, "unsupported", "expected the number of steps that were made, found none"),
        (of_no_ranks, "unsupported", "--form torch_dist"),
        (of_another_kind, "bad-config", "expected `decay`, `others` or `all` for each of 2 groups"),
    ],
)
def test_ranks_that_cannot_be_numbered_are_refused(
    change: Callable[[dict[str, Any]], None], kind: str, words: str, run: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(run / "hf", tmp_path / "out")
    document = out / "optimizer" / "optimizer.json"
    told = json.loads(document.read_text())
    change(told)
    document.write_text(json.dumps(told))
    error = refused(lambda: api.plan(out, to="original", options=WITH))
    assert error.problems[0].kind == kind and words in str(error)


def test_weights_in_32_bits_have_no_others_beside_them(run: Path) -> None:
    error = refused(lambda: api.plan(run / "hf", to="original", options=replace(WITH, dtype="float32")))
    assert error.problems[0].kind == "unsupported" and "expected 16 bits beside" in str(error)


def test_without_the_option_they_are_dropped_with_a_reason(originals: Written, tmp_path: Path) -> None:
    source = trained(originals("qwen2-mcore"), tmp_path / "in")
    plan = api.plan(source, family="qwen2")
    assert not any(f.name.startswith("optimizer/") for f in plan.outputs)
    assert {d.reason for d in plan.dropped if "exp_avg" in d.tensor.name} == {"state of the training run"}


def fewer(inner: dict[str, Any]) -> None:
    inner["param_groups"][0]["params"].pop()


def another_shape(inner: dict[str, Any]) -> None:
    inner["state"][0]["exp_avg"] = torch.zeros(3, 5)


def lacking(inner: dict[str, Any]) -> None:
    del inner["state"][2]["exp_avg_sq"]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (3, "expected an optimizer, and one of experts, found 3"),
        (2, "expected groups of 0 parameters of experts (those that decay, and the others), found 50 and 37"),
    ],
)
def test_a_list_of_optimizers_is_one_of_all_and_one_of_experts(
    count: int, words: str, run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(run / "in", tmp_path / "in")
    for path in source.rglob("*.pt"):
        file = torch.load(path, weights_only=False)
        file["optimizer"] = [deepcopy(file["optimizer"]) for _ in range(count)]
        torch.save(file, path)
        assert api.plan(source, family="qwen2").dropped
    error = refused(lambda: api.plan(source, family="qwen2", options=WITH))
    assert error.problems[0].kind == "unsupported" and words in str(error)


def in_words(inner: dict[str, Any]) -> None:
    inner["param_groups"][0]["params"][0] = "first"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (in_words, "unsupported", "expected numbers of parameters"),
        (fewer, "unsupported", "expected groups of"),
        (another_shape, "shape-mismatch", "expected the shape of parameter 0, found [3, 5]"),
        (lacking, "missing-tensor", "expected exp_avg_sq of this tensor too"),
    ],
)
def test_state_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], kind: str, words: str, originals: Written, tmp_path: Path
) -> None:
    source = trained(originals("qwen2-mcore"), tmp_path / "in", change)
    error = refused(lambda: api.plan(source, family="qwen2", options=WITH))
    assert error.problems[0].kind == kind and words in str(error)


def test_numbers_of_a_run_that_are_none_are_left_out(originals: Written, tmp_path: Path) -> None:
    def broken(inner: dict[str, Any]) -> None:
        inner["param_groups"][0]["lr"] = float("inf")
        for k, one in inner["state"].items():
            one["step"] = torch.tensor(float("nan")) if k % 2 else float("nan")

    source = trained(originals("qwen2-mcore"), tmp_path / "in", broken)
    made = api.plan(source, family="qwen2", options=WITH)
    (told,) = (json.loads(d.content) for d in made.documents if d.name == "optimizer/optimizer.json")
    assert "step" not in told and [g.get("lr") for g in told["groups"]] == [None, 1e-4]


def test_ranks_that_differ_are_not_averaged_nor_cast(originals: Written, tmp_path: Path) -> None:
    source = trained(originals("qwen2-mcore"), tmp_path / "in")
    last = max(source.rglob("model_optim_rng.pt"))
    file = torch.load(last, weights_only=False)
    state = file["optimizer"]["optimizer"]["state"]
    for one in state.values():
        one["step"] = 9
    torch.save(file, last)
    made = api.plan(source, family="qwen2", options=WITH)
    assert any("ranks made 7 and 9 steps" in note for note in made.notes)
    (told,) = (json.loads(d.content) for d in made.documents if d.name == "optimizer/optimizer.json")
    assert "step" not in told
    for one in state.values():
        one["exp_avg"] = one["exp_avg"].half()
    torch.save(file, last)
    error = refused(lambda: api.plan(source, family="qwen2", options=WITH))
    assert {p.kind for p in error.problems} == {"dtype-mismatch"} and "found F16 and F32" in str(error)


# --- torch_dist ---------------------------------------------------------------------------------------------


def with_state(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The ranks' files with the states of a torch_dist folder among their tensors."""
    shutil.copytree(source, folder)
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        file = torch.load(path, map_location="cpu", weights_only=False)
        for name, x in list(file["model"].items()):
            for kind in STATES:
                file["model"][f"optimizer.state.{kind}.{name}"] = MADE[kind](x)
        change(file["model"])
        torch.save(file, path)
    return folder


@pytest.fixture(scope="module")
def dist(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch_dist folder with all states, as torch.distributed.checkpoint writes it."""
    root = tmp_path_factory.mktemp("dist")
    return joined(with_state(originals("llama-mcore"), root / "ranks", lambda model: None), root / "in")


def test_a_torch_dist_folder_goes_forth_and_back(dist: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    args = ["convert", "llama", "--in", str(dist), "--out", str(out), "--with-optimizer"]
    assert CliRunner().invoke(cli, args).exit_code == 0
    checked(out, STATES)
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True, max_shard_bytes=60_000)
    api.convert(out, tmp_path / "back", to="original", options=form)
    api.convert(tmp_path / "back", tmp_path / "again", family="llama", options=WITH)
    before, after = states(out), states(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[n], x) for n, x in after.items())
    given = (str(tmp_path / "back"), "--source", str(out), "--level", "coverage", "--level", "bits")
    CliRunner().invoke(cli, ["certificate", *given])
    check = CliRunner().invoke(cli, ["check-certificate", given[0]])
    assert check.output.startswith("ckpt-tool check-certificate: pass"), check.output
    report = api.verify(tmp_path / "back", out, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    alone = tmp_path / "alone"
    api.convert(out, alone, to="original", options=api.Options(family_options={"form": "torch_dist"}))
    api.convert(alone, tmp_path / "model", family="llama")
    assert not (tmp_path / "model" / "optimizer").exists()


@pytest.fixture(scope="module")
def hf(dist: Path) -> Path:
    """That folder in the Hugging Face layout."""
    api.convert(dist, dist.parent / "hf", family="llama", options=WITH)
    return dist.parent / "hf"


def one_narrow(tensors: dict[str, Tensor]) -> None:
    name = "exp_avg.model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()


def a_stranger(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg.model.other.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "name", "kind"),
    [
        (one_narrow, "exp_avg-00001-of-00001.safetensors", "dtype-mismatch"),
        (a_stranger, "exp_avg-00001-of-00001.safetensors", "uncovered-tensors"),
        (dict.copy, "exp_avg-00001-of-00002.safetensors", "duplicate-tensor"),
    ],
)
def test_states_that_do_not_go_back_are_refused(
    change: Callable[[dict[str, Tensor]], object], name: str, kind: str, hf: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(hf, tmp_path / "out")
    tensors = load_file(out / "optimizer" / "exp_avg-00001-of-00001.safetensors")
    change(tensors)
    save_file(tensors, out / "optimizer" / name)
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True)
    error = refused(lambda: api.plan(out, to="original", options=form))
    assert {p.kind for p in error.problems} == {kind}


def test_a_state_of_no_tensor_is_named_among_what_is_left_out(originals: Written, tmp_path: Path) -> None:
    def stranger(model: dict[str, Tensor]) -> None:
        model["optimizer.state.exp_avg.decoder.other.weight"] = torch.zeros(3)

    source = joined(with_state(originals("llama-mcore"), tmp_path / "ranks", stranger), tmp_path / "in")
    dropped = [d.tensor.name for d in api.plan(source, family="llama", options=WITH).dropped]
    assert "optimizer.state.exp_avg.decoder.other.weight" in dropped
    assert not any("exp_avg.embedding" in name for name in dropped)


def test_a_changed_moment_is_found(dist: Path, hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "out")
    file = next((tmp_path / "out" / "optimizer").glob("exp_avg-*"))
    tensors = load_file(file)
    tensors["exp_avg.model.norm.weight"][3] += 1
    save_file(tensors, file, {"format": "pt"})
    report = api.verify(tmp_path / "out", dist, levels="bits")
    wrong = [f for f in report.findings if f.check == "optimizer"]
    assert wrong[0].status == "fail" and "exp_avg.model.norm.weight" in f"{wrong[0].where} {wrong[0].message}"
    file.unlink()
    report = api.verify(tmp_path / "out", dist, levels="bits")
    assert {f.status for f in report.findings if f.check == "optimizer"} == {"fail"}


def test_flat_buffers_are_refused_by_name(originals: Written, tmp_path: Path) -> None:
    def buffers(model: dict[str, Tensor]) -> None:
        for name in [n for n in model if n.startswith("optimizer.")]:
            del model[name]
        model["optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"] = torch.zeros(64)

    source = joined(with_state(originals("llama-mcore"), tmp_path / "ranks", buffers), tmp_path / "in")
    error = refused(lambda: api.plan(source, family="llama", options=WITH))
    assert error.problems[0].kind == "unsupported" and "buffers of many parameters" in str(error)
    api.plan(source, family="llama")
    ranks = shutil.copytree(originals("qwen2-mcore"), tmp_path / "distributed")
    for path in ranks.rglob("model_optim_rng.pt"):
        path.with_name("distrib_optim.pt").write_bytes(b"")
    error = refused(lambda: api.plan(ranks, family="qwen2", options=WITH))
    assert "mp_rank_00/distrib_optim.pt: expected a zip" in str(error), error


def test_where_there_is_none_that_is_said(conversions: Written, originals: Written) -> None:
    error = refused(lambda: api.plan(originals("llama-3.2-1b"), family="llama", options=WITH))
    assert error.problems[0].kind == "missing-tensor" and "without --with-optimizer" in str(error)
    with_objects = VARIANTS["gpt2-v2-tp2"]
    options = api.Options(settings=with_objects.settings, with_optimizer=True)
    error = refused(lambda: api.plan(originals("gpt2-v2-tp2"), family=with_objects.family, options=options))
    assert error.problems[0].kind == "unsupported" and "found it in an object" in str(error)
    form = api.Options(family_options={"form": "torch_dist"}, with_optimizer=True)
    error = refused(lambda: api.plan(conversions("llama-mcore"), to="original", options=form))
    assert error.problems[0].kind == "missing-tensor" and "exp_avg-00001" in str(error)
