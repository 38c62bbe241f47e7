"""Checkpoints of DeepSpeed's ZeRO: parts of all ranks become the model, what is not whole is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ckpt_tool import api
from ckpt_tool.checkpoint import zero
from ckpt_tool.checkpoint.base import stored
from ckpt_tool.checkpoint.deepspeed import are_parts
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.torch_zip import TorchZipFile
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.pickles import Tensor
from ckpt_tool.fixtures.zero import Run, Weight
from ckpt_tool.verify import partitions

Written = Callable[[str], Path]

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (5, 3), "a.bias": (5,), "b.weight": (2, 4, 3), "b.bias": (1,), "c.weight": (7, 2),
    "c.bias": (2,),
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...], dtype: str = "F32") -> Weight:
    """Numbers that no two tensors share."""
    start = sum(name.encode()) * 1000
    numbers = np.arange(start, start + prod(shape), dtype="<f4")
    data = numbers.tobytes() if dtype == "F32" else (numbers.view("<u4") >> 16).astype("<u2").tobytes()
    return Weight(shape, data, dtype)


WEIGHTS = {n: weight(n, s) for n, s in SHAPES.items()}
WEIGHED = {n: w for n, w in WEIGHTS.items() if n.endswith("weight")}
OTHERS = {n: w for n, w in WEIGHTS.items() if n not in WEIGHED}
FROZEN = {"f.weight": weight("f.weight", (3, 5), "BF16"), "f.bias": weight("f.bias", (4,), "BF16")}
BUFFERS = {"g.ids": Weight((3,), np.arange(3, dtype="<i8").tobytes(), "I64")}
SIXTEEN = {n: weight(n, s, "BF16") for n, s in SHAPES.items()}
THREE = Run(3, 3, [WEIGHED, OTHERS], FROZEN, BUFFERS, {"d.weight": "a.weight"}, cut=2)
TWO = Run(2, 2, [WEIGHED, OTHERS], FROZEN, BUFFERS, sixteen=SIXTEEN)
FLAT = Tensor("I64", (2,), lambda: [bytes(16)], "cpu")
RUNS = {
    "zero3": THREE,
    "zero3-two-ranks": replace(THREE, ranks=2, cut=1),
    "zero3-more-ranks-than-elements": replace(THREE, ranks=4, prefix="", enumerated=False),
    "zero2": TWO,
    "zero1-gaps": replace(TWO, stage=1, ranks=3, gaps=3),
}


def bits(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_checkpoint(path) as found:
        return {t.name: (t.dtype, t.shape, found.read(t).tobytes()) for t in found}


def wanted(run: Run) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    held = {**{n: w for g in run.groups for n, w in g.items()}, **run.frozen, **run.buffers}
    held |= {n: held[of] for n, of in run.shared.items()}
    return {n: (w.dtype, w.shape, w.data) for n, w in held.items()}


def masters(home: Path, rank: int = 0) -> Path:
    return next(home.glob(f"*zero_pp_rank_{rank}_*_optim_states.pt"))


def refused(path: Path) -> CkptToolError:
    with pytest.raises(CkptToolError) as raised:
        open_checkpoint(path)
    return raised.value


def problem(path: Path) -> tuple[str, str, str | None]:
    error = refused(path)
    assert len(error.problems) == 1, error.text()
    (found,) = error.problems
    return found.kind, found.message, found.file


# --- what is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_the_parts_of_all_ranks_are_the_weights(kind: str, tmp_path: Path) -> None:
    run = RUNS[kind]
    home = run.write(tmp_path / "run")
    for given in (masters(home), masters(home, run.ranks - 1)):
        assert bits(given) == wanted(run)
    if run.stage == 3:
        states = next(home.glob("zero_pp_rank_1_*_model_states.pt"))
        for given in (home, home.parent, states):
            assert bits(given) == wanted(run)


@pytest.mark.parametrize("kind", RUNS)
def test_both_readings_find_the_same(kind: str, tmp_path: Path) -> None:
    run = RUNS[kind]
    with open_checkpoint(masters(run.write(tmp_path / "run"))) as first:
        other = partitions.joined_anew(first)
        assert other is not first
        found = {t.name: (t.dtype, t.shape, other.read(t).tobytes()) for t in other}
        assert found == wanted(run)
        for name, (_, _, data) in found.items():  # by parts that begin anywhere
            (tensor,) = first.find(name)
            for start in range(0, len(data), 7):
                rooms = [bytearray(min(11, len(data) - start)) for _ in range(2)]
                for checkpoint, room in zip((first, other), rooms, strict=True):
                    checkpoint.read_into(tensor, start, memoryview(room))
                assert bytes(rooms[0]) == bytes(rooms[1]) == data[start : start + 11], name


def test_sixteen_bits_are_read_unless_a_file_of_the_optimizer_is_given(tmp_path: Path) -> None:
    home = TWO.write(tmp_path / "run")
    assert {
        bits(given)["a.weight"] for given in (home.parent, home, home / "mp_rank_00_model_states.pt")
    } == {("BF16", (5, 3), SIXTEEN["a.weight"].data)}
    with open_checkpoint(home.parent) as found:
        (note,) = [n for n in found.notes if "of the optimizer" in n]
    inner = "global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert f"float32 are read where {inner} is given" in note
    assert bits(home.parent / inner)["a.weight"] == ("F32", (5, 3), WEIGHTS["a.weight"].data)


def test_latest_says_which_step_is_read(tmp_path: Path) -> None:
    later = replace(THREE, step=9, groups=[OTHERS, WEIGHED])
    THREE.write(tmp_path / "run")
    later.write(tmp_path / "run")
    assert list(bits(tmp_path / "run"))[0] == "a.bias"
    (tmp_path / "run" / "latest").write_text("global_step7")
    assert list(bits(tmp_path / "run"))[0] == "a.weight"
    (tmp_path / "run" / "latest").unlink()
    kind, message, _ = problem(tmp_path / "run")
    assert (kind, message) == ("ambiguous-input", "expected one step, found global_step7/, global_step9/")
    (tmp_path / "run" / "latest").write_text("global_step8")
    shutil.rmtree(tmp_path / "run" / "global_step9")
    with open_checkpoint(tmp_path / "run") as found:
        assert "latest names global_step8, which is not there" in found.notes


def test_a_buffer_and_a_parameter_that_is_kept_whole_are_told_apart(tmp_path: Path) -> None:
    """Small parameters stay whole on every rank (stage3_param_persistence_threshold): masters are read."""
    run = replace(THREE, sixteen={"a.bias": SIXTEEN["a.bias"]})
    assert bits(run.write(tmp_path / "run"))["a.bias"] == ("F32", (5,), WEIGHTS["a.bias"].data)


def test_what_a_run_of_zero_1_does_not_train_is_the_models(tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 lists no frozen parameters in stage 1."""
    run = replace(TWO, stage=1, told={"frozen_param_shapes": None, "frozen_param_fragments": None})
    home = run.write(tmp_path / "run")
    assert bits(masters(home)) == wanted(run)
    with open_checkpoint(masters(home)) as found:
        assert (
            "3 tensors that no optimizer has are as the model has them: f.weight, f.bias, g.ids"
            in found.notes
        )


def test_what_is_beside_the_weights_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """So that every byte of the files is accounted for."""
    home = TWO.write(tmp_path / "run")
    with open_checkpoint(masters(home)) as found:
        left = {(t.tensor.file, t.tensor.name): t.reason for t in found.left_out}
    states = {(f, n) for (f, n), reason in left.items() if reason.startswith("state of the optimizer")}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert states == {
        (masters(home, rank).name, f"optimizer_state_dict.base_optimizer_state.state.{g}.{kind}")
        for rank in range(2) for g in range(2) for kind in kinds
    }  # fmt: skip
    module = {("mp_rank_00_model_states.pt", f"module.{n}") for n in (*SHAPES, *FROZEN)}
    assert left.keys() - states == module


def test_another_name_of_nothing_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    run = replace(TWO, order=[*SHAPES, *FROZEN, *BUFFERS], told={"shared_params": {"g.ids": "nobody"}})
    home = run.write(tmp_path / "run")
    assert bits(masters(home)) == wanted(TWO)
    with open_checkpoint(masters(home)) as found:
        assert {t.name: t.shape for t in partitions.joined_anew(found)} == {
            n: shape for n, (_, shape, _) in wanted(TWO).items()
        }


def test_model_states_of_rank_0_are_enough_where_nothing_is_frozen(tmp_path: Path) -> None:
    """A run that began with load_universal saves no others (deepspeedai/DeepSpeed#7546)."""
    run, alone = replace(THREE, frozen={}), "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    home = run.write(tmp_path / "run")
    for rank in (1, 2):
        (home / alone.format(rank)).unlink()
    assert bits(home) == wanted(run)
    with open_checkpoint(home) as found:
        note = "model states of 2 ranks are not there: nothing is frozen, so they add nothing"
        assert note in found.notes
        other = partitions.joined_anew(found)
        assert {t.name: (t.dtype, t.shape, other.read(t).tobytes()) for t in other} == wanted(run)
    (home / alone.format(0)).rename(home / alone.format(1))
    assert [p.message.split(",")[0] for p in refused(home).problems] == [
        f"expected {alone.format(rank)}" for rank in (0, 2)
    ]


def test_an_old_release_that_does_not_name_shared_parameters(tmp_path: Path) -> None:
    home = replace(THREE, told={"shared_params": None}).write(tmp_path / "run")
    assert "d.weight" not in bits(home)
    with open_checkpoint(home) as found:
        assert any("does not say which parameters are shared; left out" in n for n in found.notes)


def test_nothing_of_a_pickle_runs(tmp_path: Path) -> None:
    with open_checkpoint(THREE.write(tmp_path / "run")) as found:
        (file,) = found.files.values()
        classes = (
            "deepspeed.runtime.zero.config.ZeroStageEnum",
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        )
        assert {*classes} <= {*file.imports}
        assert stored(file).metadata["global_steps"] == 7


def test_a_step_of_a_run_may_be_in_an_archive(tmp_path: Path) -> None:
    THREE.write(tmp_path / "in" / "run")
    for kind in ("zip", "tar"):
        archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "in", "run")
        assert bits(Path(archive)) == wanted(THREE)
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "in", "run"))
    error = refused(packed)  # it would be inflated whole, moments and all
    assert (error.kind, error.problems[0].hint) == ("unsupported", "unpack the archive, and give the folder")


def test_damage_is_found_though_nobody_reads_a_tensor_twice(tmp_path: Path) -> None:
    home = THREE.write(tmp_path / "run")
    with open_checkpoint(home) as found:
        for tensor in found:
            found.read(tensor)
        (file,) = found.files.values()
        assert all(file.check_record(key) for key in file.records())
        keys = list(file.records({"f.bias"}))
        assert [k.partition(":")[0] for k in keys] == [
            f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(3)
        ]
    part = masters(home, 1)
    raw = part.read_bytes()
    number = WEIGHTS["c.weight"].data[5 * 4 : 6 * 4]  # the first that rank 1 has of it
    part.write_bytes(raw.replace(number, b"\0\0\0\x3f", 1))
    with open_checkpoint(home) as found:
        (file,) = found.files.values()
        for tensor in found:
            found.read(tensor)
        bad = []
        for key in file.records():
            try:
                file.check_record(key)
            except CkptToolError as error:
                bad.append((error.kind, error.problems[0].file))
    assert bad == [("checksum", part.name)]


# --- what is refused ------------------------------------------------------------------------------------


def change(run: Run, folder: Path, other: Run, *ranks: int) -> Path:
    """The step of `run`, with the optimizer's files of `ranks` from `other`."""
    home, source = run.write(folder / "run"), other.write(folder / "other")
    for rank in ranks:
        shutil.copy(masters(source, rank), home)
    return home


def test_a_rank_whose_file_is_not_there_is_named(tmp_path: Path) -> None:
    home = THREE.write(tmp_path / "run")
    masters(home, 1).unlink()
    kind, message, _ = problem(home)
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert kind == "missing-shard"
    assert message == f"expected {name}, of the 3 ranks that shared the weights, found no such file"
    assert "all ranks" in (refused(home).problems[0].hint or "")
    shutil.rmtree(tmp_path / "run")
    (THREE.write(tmp_path / "run") / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    assert problem(home)[1].startswith("expected zero_pp_rank_2_mp_rank_00_model_states.pt, of the 3 ranks")


def test_files_of_other_runs_are_told(tmp_path: Path) -> None:
    first = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    cases: Mapping[str, tuple[Run, Run, str, str]] = {
        "step": (THREE, replace(THREE, step=9), "shard-conflict", f"expected step 7 as in {first}, found 9"),
        "world": (replace(THREE, ranks=2), THREE, "shard-conflict",
                  f"expected ZeRO 3 of 2 ranks as {first} says, found ZeRO 3 of 3 ranks"),
        "stage": (THREE, replace(TWO, ranks=3), "shard-conflict",
                  f"expected ZeRO 3 of 3 ranks as {first} says, found ZeRO 1 or 2 of 3 ranks"),
        "parameters": (THREE, replace(THREE, groups=[WEIGHED]), "size-mismatch",
                       "expected 22 elements for the parameters of param_shapes, found 18"),
    }  # fmt: skip
    for name, (run, other, kind, message) in cases.items():
        home = change(run, tmp_path / name, other, 1)
        assert problem(home) == (kind, message, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), name


def test_more_ranks_than_shared_the_weights(tmp_path: Path) -> None:
    home = replace(THREE, ranks=2).write(tmp_path / "run")
    shutil.copy(masters(home, 1), home / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt")
    kind, message, file = problem(home)
    assert kind == "shard-conflict" and file == "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    assert message == "expected files of 2 ranks as partition_count says, found one of rank 2"


def test_one_file_under_two_numbers(tmp_path: Path) -> None:
    home = THREE.write(tmp_path / "run")
    shutil.copy(masters(home), masters(home, 2))
    kind, message, file = problem(home)
    assert (kind, file) == ("shard-conflict", masters(home, 2).name)
    other = masters(home).name
    assert message == f"expected other weights than in {other}, found the same bytes in all 4 groups"
    nothing = {n: Weight(w.shape, bytes(len(w.data))) for n, w in WEIGHED.items()}
    home = Run(3, 3, [nothing]).write(tmp_path / "zeros")  # which tell nothing
    assert bits(home)["a.weight"][2] == bytes(60)


def test_model_states_of_another_step_or_order(tmp_path: Path) -> None:
    name = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    others = {
        "expected global_steps 7 as in zero_pp_rank_0_mp_rank_00_model_states.pt, found 9": {
            "global_steps": 9
        },
        f"expected the parameters of {name.replace('1', '0')}, in their order, found others": {
            "param_shapes": [{n: list(w.shape) for n, w in g.items()} for g in (OTHERS, WEIGHED)]
        },
    }
    for k, (message, told) in enumerate(others.items()):
        home = THREE.write(tmp_path / f"run{k}")
        shutil.copy(replace(THREE, told=told).write(tmp_path / f"other{k}") / name, home)
        assert problem(home) == ("shard-conflict", message, name)


def test_swapped_files_of_two_ranks_are_told_where_ranks_say_their_places(tmp_path: Path) -> None:
    """In ZeRO 3 nothing in them says whose they are."""
    home = TWO.write(tmp_path / "run")
    one, other = masters(home, 0), masters(home, 1)
    raw = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(raw)
    kind, message, _ = problem(one)
    assert kind == "shard-conflict"
    assert message.startswith("expected 11 elements of it from 0 on as this rank says, found")


def test_one_rank_of_several_of_a_model_is_refused(tmp_path: Path) -> None:
    told = {"mp_world_size": 2}
    for k, run in enumerate((replace(THREE, told=told), replace(TWO, told=told))):
        error = refused(masters(run.write(tmp_path / f"run{k}")))
        assert (error.kind, error.problems[0].where) == ("unsupported", "mp_world_size")
    home = THREE.write(tmp_path / "ranks")
    shutil.copy(masters(home), home / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt")
    kind, message, _ = problem(home)
    found = "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    assert (kind, message) == ("unsupported", f"expected one model-parallel rank, found {found}")


def test_pipelines_and_experts_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("layer_00-model_00-model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt",
                 "expp_rank_0_mp_rank_00_optim_states.pt"):  # fmt: skip
        home = THREE.write(tmp_path / name.partition("-")[0])
        (home / name).write_bytes(b"x")
        what = "layers of a DeepSpeed pipeline, or experts, each in a file of its own"
        message = f"expected weight files, found {what}: {name}"
        assert problem(home) == ("wrong-format", message, "global_step7")


def test_files_of_two_runs_in_one_folder(tmp_path: Path) -> None:
    home = THREE.write(tmp_path / "run")
    shutil.copy(masters(home), home / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert problem(home)[0] == "ambiguous-input"
    (home / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    (home / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert problem(home)[1].startswith(
        "expected the model states of ZeRO 3 or of one rank, found zero_pp_rank_0"
    )


def test_half_of_a_folder_says_what_is_missing(tmp_path: Path) -> None:
    for k, end in enumerate(("optim_states.pt", "model_states.pt")):
        home = THREE.write(tmp_path / f"run{k}")
        for path in home.glob(f"*_{end}"):
            path.unlink()
        kind, message, _ = problem(home)
        assert kind == "wrong-format" and "a DeepSpeed checkpoint (ZeRO) that is not whole" in message
        assert "*_optim_states.pt" in (refused(home).problems[0].hint or "")


def test_ranks_on_the_disks_of_several_machines(tmp_path: Path) -> None:
    home = THREE.write(tmp_path / "all")
    for node, ranks in (("node0", (0, 1)), ("node1", (2,))):
        own = tmp_path / "nodes" / node / home.name
        own.mkdir(parents=True)
        for file in [f for r in ranks for f in home.glob(f"*zero_pp_rank_{r}_*")]:
            shutil.copy(file, own)
    kind, message, _ = problem(tmp_path / "nodes")
    assert kind == "missing-shard" and message.endswith(
        "in one folder, found some in each of node0/global_step7 and node1/global_step7"
    )
    assert "into one folder" in str(refused(tmp_path / "nodes").problems[0].hint)
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "nodes")
    assert problem(Path(archive))[:2] == (kind, message)
    shutil.copytree(home, tmp_path / "nodes" / "node1", dirs_exist_ok=True)  # two whole runs
    shutil.copytree(home, tmp_path / "nodes" / "node0", dirs_exist_ok=True)
    assert problem(tmp_path / "nodes")[0] == "ambiguous-input"


class Looked(list[str]):
    """Names that count how often all of them are looked through."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        Looked.times += 1
        return super().__iter__()


def test_files_are_dealt_out_to_many_folders_at_once() -> None:
    """An archive of a stranger may have a folder for each of its files."""
    homes = [f"node{k}/global_step7" for k in range(20)]
    names = Looked(f"{home}/zero_pp_rank_{k}_mp_rank_00_optim_states.pt" for k, home in enumerate(homes))
    assert are_parts(homes, names) and not are_parts([*homes, "node20"], names)
    assert not are_parts(homes, [*names, names[3].replace("node3", "node4")])
    assert Looked.times <= 3


def test_a_universal_checkpoint_is_told_wherever_one_stands(tmp_path: Path) -> None:
    """Those of ZeRO 3 have copies of the states of all ranks beside them, and no shapes."""
    home = tmp_path / "run" / "global_step7_universal"
    (home / "zero" / "a.weight").mkdir(parents=True)
    torch.save(torch.zeros(15), home / "zero" / "a.weight" / "fp32.pt")
    for file in THREE.write(tmp_path / "all").glob("*model_states.pt"):
        shutil.copy(file, home)
    for given in (home.parent, home):
        kind, message, _ = problem(given)
        assert kind == "wrong-format" and "found a universal checkpoint of DeepSpeed" in message
    kind, message, _ = problem(home / "zero" / "a.weight" / "fp32.pt")
    assert (kind, message) == ("wrong-format", "expected a dict of tensors, found a tensor")
    error = refused(home / "zero" / "a.weight" / "fp32.pt")
    assert "as in universal checkpoints of DeepSpeed" in str(error.problems[0].hint)


def test_a_cut_file_is_told_with_its_rank(tmp_path: Path) -> None:
    home = THREE.write(tmp_path / "run")
    part = masters(home, 2)
    part.write_bytes(part.read_bytes()[:-300])
    kind, _, file = problem(home)
    assert (kind, file) == ("truncated", part.name)


def test_parameters_that_no_rank_saved_are_named(tmp_path: Path) -> None:
    """Trainable, and in no group of the optimizer: zero_to_fp32.py leaves them out without a word."""
    home = replace(THREE, order=[*SHAPES, *FROZEN, "lost.weight"]).write(tmp_path / "run")
    error = refused(home)
    assert (error.kind, error.problems[0].where) == ("missing-tensor", "lost.weight")
    assert "found them in none" in error.text()


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ({"param_shapes": None}, "wrong-format", "expected the shapes of the parameters, found none"),
        ({"param_shapes": [{"a": (2, -1)}]}, "wrong-format", "expected a shape of whole numbers"),
        ({"param_shapes": [{"a": (1 << 40, 1 << 40)}]}, "wrong-format", "expected a shape of whole numbers"),
        ({"param_shapes": [{"a.weight": (5, 3)}] * 2}, "duplicate-tensor", "one group"),
        ({"shared_params": 3}, "wrong-format", "expected names of parameters by other names"),
        ({"frozen_param_fragments": {}}, "missing-tensor", "the part of a rank in frozen_param_fragments"),
        ({"frozen_param_shapes": {"f.weight": (3, 50)}}, "size-mismatch", "expected 50 elements of [3, 50]"),
        ({"module": None}, "wrong-format", "expected the state dict of the model, found another value"),
    ],
)  # fmt: skip
def test_model_states_that_say_something_else(
    told: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    error = refused(replace(THREE, told=told).write(tmp_path / "run"))
    assert error.kind == kind and message in error.text()


@pytest.mark.parametrize(
    ("noted", "kind", "message"),
    [
        ({"ds_zero_partition_groups": [{"partition_count": 1}]}, "unsupported", "experts with partitions of"),
        ({"partition_count": [3, 1]}, "unsupported", "as many ranks for each group, found ZeRO 3 of 3 and 1"),
        ({"partition_count": None}, "wrong-format", "expected the number of ranks that share the optimizer"),
        ({"partition_count": 0}, "wrong-format", "expected the number of ranks that share the optimizer"),
        ({"zero_stage": 2}, "wrong-format", "expected single_partition_of_fp32_groups of that stage"),
        ({"fp32_flat_groups": []}, "wrong-format", "weights (fp32_flat_groups or single_partition_"),
        ({"single_partition_of_fp32_groups": [FLAT]}, "wrong-format", "of_fp32_groups), found both"),
        ({"param_alignment_paddings": 5}, "wrong-format", "expected numbers of elements by group"),
    ],
)  # fmt: skip
def test_files_of_the_optimizer_that_say_something_else(
    noted: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    error = refused(replace(THREE, noted=noted).write(tmp_path / "run"))
    assert error.kind == kind and message in error.text()


def test_ranks_that_say_other_padding(tmp_path: Path) -> None:
    home, name = replace(TWO, gaps=1).write(tmp_path / "run"), "param_alignment_paddings"
    other = replace(TWO, gaps=1, noted={name: [[2, 0, 1], [1, 1, 1]]}).write(tmp_path / "other")
    shutil.copy(masters(other, 1), home)
    found = refused(masters(home)).problems
    first, last = masters(home).name, masters(home, 1).name
    message = f"expected the padding after each parameter as in {first}, found another"
    assert [(p.kind, p.message, p.file, p.where) for p in found] == [("shard-conflict", message, last, name)]


@pytest.mark.parametrize(
    ("told", "kind", "where", "message"),
    [
        (
            {"param_shapes": [{n: w.shape[::-1] for n, w in g.items()} for g in (WEIGHED, OTHERS)]},
            "shape-mismatch", "a.weight", "expected shape [5, 3] as in module, found [3, 5]",
        ),
        (
            {"shared_params": {"g.ids": "a.weight"}},
            "shape-mismatch", "g.ids", "expected shape [3] as in module, found [5, 3]",
        ),
        (
            {"frozen_param_shapes": {"f.weight": (3, 6)}},
            "size-mismatch", "f.weight", "expected 18 elements of [3, 6], found 15",
        ),
        (
            {"frozen_param_shapes": {"lost": (2,)}},
            "size-mismatch", "lost", "expected 2 elements of [2], found 0",
        ),
    ],
)  # fmt: skip
def test_whole_weights_of_the_model_say_something_else(
    told: dict[str, Any], kind: str, where: str, message: str, tmp_path: Path
) -> None:
    (found, *_) = refused(masters(replace(TWO, told=told).write(tmp_path / "run"))).problems
    assert (found.kind, found.where, found.message) == (kind, where, message)


def test_a_frozen_parameter_may_have_no_elements(tmp_path: Path) -> None:
    told = {"frozen_param_shapes": {"f.none": (0, 4)}, "frozen_param_fragments": {}}
    home = replace(TWO, frozen={}, told=told).write(tmp_path / "run")
    assert bits(masters(home))["f.none"] == ("F32", (0, 4), b"")


def test_what_is_no_tensor_in_module_is_passed_over_by_both_readings(tmp_path: Path) -> None:
    """As the extra state of a layer that scales its own numbers."""
    home = replace(TWO, told={"module": {"a._extra_state": None, "b._extra_state": "x"}}).write(
        tmp_path / "r"
    )
    with open_checkpoint(masters(home)) as first:
        other = partitions.joined_anew(first)
        assert [other.read(t).tobytes() for t in other] == [first.read(t).tobytes() for t in first] != []


def test_what_a_file_holds_is_listed_once_however_many_tensors_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list for each tensor took minutes where there were ten thousand."""
    files, real = list[TorchZipFile](), TorchZipFile.records

    def records(self: TorchZipFile, *more: Any) -> Any:
        files.append(self)
        return real(self, *more)

    monkeypatch.setattr(TorchZipFile, "records", records)
    bits(masters(replace(TWO, groups=[{n: w} for n, w in WEIGHTS.items()]).write(tmp_path / "run")))
    assert len(files) == 3 == len(set(map(id, files)))


def test_partitions_that_are_no_weights(tmp_path: Path) -> None:
    home = replace(TWO, noted={"single_partition_of_fp32_groups": [FLAT] * 2}).write(tmp_path / "run")
    assert problem(masters(home))[:2] == (
        "dtype-mismatch",
        "expected partitions of F32, BF16, F16, found I64",
    )


def test_places_that_round_robin_makes_untrue_are_not_compared(tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 notes them in another order than it uses."""
    turned = {"param_slice_mappings": [], "param_alignment_paddings": [[0] * 3, [0] * 2]}
    error = refused(masters(replace(TWO, noted=turned).write(tmp_path / "gaps")))
    assert "expected the padding after each of 3 parameters, found 2" in error.text()
    home = change(TWO, tmp_path, replace(TWO, groups=[dict(reversed([*WEIGHED.items()])), OTHERS]), 0, 1)
    assert problem(masters(home))[0] == "shard-conflict"
    home = replace(TWO, robin=True).write(tmp_path / "robin")
    assert bits(masters(home)) == wanted(TWO)


def test_rows_that_are_too_long_or_short_are_refused(tmp_path: Path) -> None:
    longer = {**WEIGHED, "a.weight": Weight((7, 3), bytes(84))}
    shapes = [{n: list(w.shape) for n, w in g.items()} for g in (WEIGHED, OTHERS)]
    home = replace(TWO, groups=[longer, OTHERS], told={"param_shapes": shapes}).write(tmp_path / "run")
    kind, message, _ = problem(masters(home))
    assert kind == "size-mismatch"
    assert message == "expected 53 elements in group 0 and less than 4 of padding, found 59"
    home = replace(TWO, groups=[WEIGHED], told={"param_shapes": shapes}).write(tmp_path / "fewer")
    assert problem(masters(home))[1] == "expected 2 groups as param_shapes has, found 1"


# --- the model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(conversions: Written) -> Path:
    return conversions("qwen2-0.5b")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ZeRO 3 of the converted model, in float32, its documents around the step."""
    folder = tmp_path_factory.mktemp("zero") / "run"
    held = {
        n: Weight(tuple(x.shape), x.float().numpy().tobytes())
        for n, x in load_file(model / "model.safetensors").items()
    }
    norms = {n: w for n, w in held.items() if "norm" in n}
    groups = [{n: w for n, w in held.items() if n not in norms}, norms]
    Run(3, 3, groups, shared={"lm_head.weight": "model.embed_tokens.weight"}, cut=3).write(folder)
    for file in model.glob("*.json"):
        if file.name not in ("ckpt-tool.json", "model.safetensors.index.json"):
            shutil.copy(file, folder)
    return folder


def test_a_run_of_zero_3_converts_and_verifies(model: Path, run: Path, tmp_path: Path) -> None:
    made = api.convert(run, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n].float()).all() for n in ours)
    assert "the float32 weights of DeepSpeed's optimizer on 3 ranks were joined" in " ".join(made.opened)
    report = api.verify(tmp_path / "out", run, levels=("coverage", "bits"))
    assert (report.status, report.exactness) == ("pass", "bit-identical")
    cast = api.convert(run, tmp_path / "cast", options=api.Options(dtype="BF16"))
    again = load_file(cast.out / "model.safetensors")
    assert all((again[n] == ours[n].bfloat16()).all() for n in ours)


def test_weights_without_params_json_are_told_whose_they_are(tmp_path: Path) -> None:
    names = ("tok_embeddings", "layers.0.attention.wq", "norm", "output")
    home = Run(3, 2, [{(n := f"{k}.weight"): weight(n, (4, 4)) for k in names}]).write(tmp_path / "run")
    with pytest.raises(CkptToolError) as caught:
        api.plan(home, family="llama")
    (found,) = [p for p in caught.value.problems if p.kind == "missing-file"]
    assert str(found.hint).endswith("by --config")
    assert "params.json beside the weights of a DeepSpeed checkpoint, found none" in found.message


MISTAKES: dict[str, Callable[[zero.Dealt, int], zero.Dealt]] = {
    "ranks swapped": lambda d, k: zero.Dealt([d.rows[r] for r in (1, 0, 2)], d.first, d.share),
    "padding lost": lambda d, k: zero.Dealt(d.rows, d.first - (k == 5), d.share),
    "order of groups": lambda d, k: zero.Dealt([zero.Row(r.flats[::-1]) for r in d.rows], d.first, d.share),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_joining_is_a_difference_of_bits(
    mistake: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever verifies reads the ranks in another way."""
    right = zero._cut_each

    def wrong(*given: Any) -> dict[str, zero.Dealt]:
        return {n: MISTAKES[mistake](d, k) for k, (n, d) in enumerate(right(*given).items())}

    monkeypatch.setattr(zero, "_cut_each", wrong)
    api.convert(run, tmp_path / "out", check=False)
    report = api.verify(tmp_path / "out", run, levels=("bits",))
    assert report.status == "fail" and "round trip" in json.dumps(report.to_json())
    monkeypatch.undo()
    assert api.verify(tmp_path / "out", run, levels=("bits",)).status == "fail"
