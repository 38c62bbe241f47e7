"""What a program of TensorFlow put around the names of variables: scopes and averages."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool import api
from ckpt_tool.checkpoint import open_checkpoint
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import Limits
from ckpt_tool.checkpoint.tf_bundle_writer import Content, write_bundle
from ckpt_tool.checkpoint.tf_scopes import scopes
from ckpt_tool.errors import CkptToolError
from tests.conftest import Written

MODEL = ("bert/embeddings/word_embeddings", "bert/encoder/layer_0/output/dense/bias", "cls/squad/output_bias")
MOVING = "/ExponentialMovingAverage"


def bundle(folder: Path, *names: str) -> Path:
    """Variables that are told apart by their values."""
    folder.mkdir(exist_ok=True)
    values = {n: np.full(3, k, np.float32) for k, n in enumerate(names)}
    write_bundle(folder / "model.ckpt", {n: Content.of(x, "F32") for n, x in values.items()})
    return folder


def held(checkpoint: Checkpoint) -> dict[str, int]:
    """Which of the variables each name stands for."""
    found = {}
    for file in checkpoint.files.values():
        for name in file.tensors:
            buffer = bytearray(12)
            file.read_into(name, 0, memoryview(buffer))
            found[name] = int(np.frombuffer(buffer, np.float32)[0])
    return found


@pytest.mark.parametrize("scope", ["student/", "tower_0/model_1/"])
def test_a_scope_before_the_model_is_taken_off(scope: str, tmp_path: Path) -> None:
    """What stands outside of it keeps its name; what an optimizer keeps has a scope of its own before."""
    outside = ("global_step", f"training/Adam/{scope}{MODEL[0]}/m")
    folder = bundle(tmp_path / "in", *(scope + n for n in MODEL), *outside)
    with open_checkpoint(folder) as checkpoint:
        assert held(checkpoint) == {n: k for k, n in enumerate((*MODEL, *outside))}
        assert checkpoint.readings == (f"names were read without the scope {scope} before them",)
    with open_checkpoint(folder, limits=Limits(as_it_stands=True)) as checkpoint:
        assert set(checkpoint.names()) == {*(scope + n for n in MODEL), *outside}


@pytest.mark.parametrize(
    "names",
    [
        (*MODEL, *(f"teacher/{n}" for n in MODEL)),
        tuple(s + n for s in ("student/", "teacher/") for n in MODEL),
        (*(f"student/{n}" for n in MODEL), MODEL[2]),
        tuple(f"model/{n}/.ATTRIBUTES/VARIABLE_VALUE" for n in MODEL),
    ],
    ids=["one in none", "two scopes", "a name that is taken", "paths of objects"],
)
def test_scopes_that_are_not_sure_stay(names: tuple[str, ...], tmp_path: Path) -> None:
    with open_checkpoint(bundle(tmp_path / "in", *names)) as checkpoint:
        assert set(checkpoint.names()) == {*names} and not checkpoint.readings


@pytest.mark.parametrize(
    ("other", "words"), [("student/", "student/ and teacher/"), ("", "none and teacher/")]
)
def test_two_models_are_told_apart_by_their_scopes(other: str, words: str, tmp_path: Path) -> None:
    names = (*(f"teacher/{n}" for n in MODEL), *(other + n for n in MODEL), f"adam/teacher/{MODEL[0]}/m")
    with pytest.raises(CkptToolError) as caught:
        api.plan(bundle(tmp_path / "in", *names))
    problem = caught.value.problems[0]
    assert problem.kind == "unknown-family" and str(problem.hint).startswith(
        f"several models are in it, in the scopes {words}: save the variables of the one that is meant alone"
    )


class Counted(str):
    """Text that counts how often its end was compared."""

    compared = 0

    def __getitem__(self, key: Any) -> Counted:
        return Counted(super().__getitem__(key))

    def endswith(self, *given: Any) -> bool:
        Counted.compared += 1
        return super().endswith(*given)


def test_each_scope_is_not_compared_with_all_others() -> None:
    names = [Counted(f"{before}tower_{k}/{MODEL[0]}") for k in range(40) for before in ("", "adam/")]
    assert scopes(names) == sorted(f"tower_{k}/" for k in range(40))
    assert Counted.compared <= len(names)


def test_an_average_is_left_out_beside_its_variable_and_read_where_it_is_alone(tmp_path: Path) -> None:
    averages = tuple(n + MOVING for n in MODEL)
    with open_checkpoint(bundle(tmp_path / "both", *MODEL, *averages)) as checkpoint:
        assert held(checkpoint) == {n: k for k, n in enumerate(MODEL)}
        assert {x.tensor.name for x in checkpoint.left_out} == {*averages}
        assert {x.reason for x in checkpoint.left_out} == {
            "an average of the weights; the weights were taken"
        }
    with open_checkpoint(bundle(tmp_path / "alone", *averages, "global_step")) as checkpoint:
        assert held(checkpoint) == {n: k for k, n in enumerate((*MODEL, "global_step"))}
        assert "3 variables are there as their moving averages alone" in checkpoint.readings[0]
    some = (MODEL[0], *averages)
    with open_checkpoint(bundle(tmp_path / "some", *some)) as checkpoint:
        assert set(checkpoint.names()) == {*some}


@pytest.mark.parametrize("scope", ["", "student/"])
def test_averages_may_have_a_scope_of_their_own(scope: str, tmp_path: Path) -> None:
    """TensorFlow makes them below the scope that is open where ExponentialMovingAverage.apply() is called."""
    own = tuple(scope + n for n in MODEL)
    averages = tuple(f"ema/{n}{MOVING}" for n in own)
    with open_checkpoint(bundle(tmp_path / "both", *own, *averages)) as checkpoint:
        assert held(checkpoint) == {n: k for k, n in enumerate(MODEL)}
        assert {x.tensor.name for x in checkpoint.left_out} == {*averages}
    with open_checkpoint(bundle(tmp_path / "alone", *averages)) as checkpoint:
        assert held(checkpoint) == {n: k for k, n in enumerate(MODEL)}
    odd = (*averages[:2], f"other/{own[2]}{MOVING}")  # two scopes: nothing is sure
    with open_checkpoint(bundle(tmp_path / "odd", *own, *odd)) as checkpoint:
        assert not checkpoint.left_out and len(checkpoint.names()) == 6


def test_a_model_in_a_scope_converts_to_the_same_bytes(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    variant = "mobilebert-squad"
    folder = tmp_path / "in"
    folder.mkdir()
    with open_checkpoint(originals(variant)) as checkpoint:
        content = {}
        for t in checkpoint:
            buffer = bytearray(t.nbytes)
            checkpoint.files[t.file].read_into(t.name, 0, memoryview(buffer))
            values = np.frombuffer(buffer, np.float32).reshape(t.shape)
            content[f"student/{t.name}{MOVING}"] = Content.of(values, "F32")
    write_bundle(folder / "model.ckpt", content)
    for name in ("bert_config.json", "vocab.txt"):
        (folder / name).write_bytes((originals(variant) / name).read_bytes())
    api.convert(folder, tmp_path / "out")
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "out", conversions(variant)))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_v1_file_is_known_by_the_state_file(tmp_path: Path) -> None:
    """Its own name may be any, and the graph was not saved beside it."""
    (tmp_path / "old.ckpt").write_bytes(b"\0" * 60)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/home/author/old.ckpt"\n')
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(tmp_path)
    assert "found a TensorFlow V1 checkpoint (one file, as before 2017): old.ckpt" in caught.value.text()


def test_a_saved_model_in_a_folder_is_named_and_not_its_variables(tmp_path: Path) -> None:
    inner = tmp_path / "export"
    inner.mkdir()
    bundle(inner / "variables", "x")
    (inner / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(tmp_path)
    assert "found a TensorFlow SavedModel" in caught.value.text()
    assert "export/saved_model.pb" in caught.value.text()
    # TensorFlow 1 exports variables under their names.
    assert f"into {inner}/variables, which is read as it is, and give that" in caught.value.text()
    with open_checkpoint(inner / "variables") as checkpoint:
        assert [t.name for t in checkpoint] == ["x"]


def test_a_saved_model_beside_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """As in the archives of MobileBERT, which have both."""
    inner = tmp_path / "all" / "uncased"
    inner.mkdir(parents=True)
    bundle(inner, "x", "y")
    (inner / "saved").mkdir()
    bundle(inner / "saved" / "variables", "x")
    (inner / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(tmp_path / "all")
    assert caught.value.problems[0].hint == f"give that folder: --in {inner}"
    with tarfile.open(tmp_path / "release.tar.gz", "w:gz") as archive:
        archive.add(inner, "uncased")
    for given in (inner, tmp_path / "release.tar.gz"):
        with open_checkpoint(given) as checkpoint:
            assert held(checkpoint) == {"x": 0, "y": 1}


def test_objects_are_told_how_to_come_by_names(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "in", *(f"model/{n}/.ATTRIBUTES/VARIABLE_VALUE" for n in MODEL))
    with pytest.raises(CkptToolError) as caught:
        api.plan(folder)
    (problem,) = caught.value.problems
    assert problem.kind == "unknown-family" and "tf.compat.v1.train.Saver" in str(problem.hint)
