"""ONNX: exports are proved, those of others are judged, files that lie are refused before anything opens
them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tool.api import convert
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.onnx_file import open_onnx
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.qwen3 import qwen3
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference.phases import leaves
from ckpt_tool.verify import onnx_export, onnx_made, onnx_mistakes, onnx_parity
from ckpt_tool.verify.onnx_export import DATA, for_task, form_of, needed
from ckpt_tool.verify.onnx_judges import source_of
from ckpt_tool.verify.onnx_partly import RUN, RUNS, in_part
from ckpt_tool.verify.onnx_runs import Case, opened_graph, recognised
from ckpt_tool.verify.onnx_weights import in_graph, pieces, put_outside, without_values
from ckpt_tool.verify.sides import converted_side
from ckpt_tool.verify.subject import opened
from ckpt_tool.verify.weights import Weights, ranks_of
from tests.in_process import program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Written = Callable[[str], Path]
# Grouped heads, norms of heads, and one layer: what an export costs is the exporter's, layer by layer.
VARIANT = qwen3(1, 56, 6, 2, 12, 88, 336, 2, tie_word_embeddings=True).variant("one-layer", "a Qwen3")
# torch and onnxscript say of themselves, while they are imported, what will be otherwise one day
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANT.write(tmp_path_factory.mktemp("original") / "in")


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    convert(original, original.parent / "out", family=VARIANT.family)
    return original.parent / "out"


@pytest.fixture(scope="module")
def exported(
    converted: Path, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A graph with past keys and values, and the report of its export."""
    folder = tmp_path_factory.mktemp("onnx")
    run = program(
        "export", "onnx", str(converted), "--out", "model.onnx", "--with-past",
        "--source", str(original), "--json", "report.json",
        cwd=folder, columns=80,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr + run.stdout
    return folder / "model.onnx", json.loads((folder / "report.json").read_text())


def copied(exported: tuple[Path, Any], folder: Path) -> Path:
    path, _ = exported
    for name in (path.name, path.name + DATA):
        shutil.copy(path.parent / name, folder / name)
    return folder / path.name


def found(report: dict[str, Any], check: str) -> dict[str, Any]:
    (one,) = (f for f in report["findings"] if f["check"] == check)
    return dict(one)


# --- what is exported -------------------------------------------------------------------------------------


def test_an_export_is_published_with_its_proof(exported: tuple[Path, dict[str, Any]]) -> None:
    path, report = exported
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data", "report.json"]
    assert report["headline"] == (
        "the numbers that onnxruntime gives of prompts of up to 600 tokens are those of its source"
    )
    assert found(report, "weights")["data"]["tensors"] == 13
    outputs, control = found(report, "outputs"), found(report, "negative control")
    rows = {row[0]: row for row in outputs["tables"][0]["rows"]}
    assert {"short", "long", "padded", "padded left", "batch", "past 1", "past 7", "padded, past 4"} <= set(
        rows
    )
    assert outputs["data"]["max_delta"] < 1e-4 and outputs["status"] == "pass"
    assert control["data"]["caught"] == control["data"]["planted"] > 20
    planted = {row[0] for row in control["tables"][0]["rows"]}
    assert {"attention_mask not read", "epsilon ten times as large"} <= planted
    assert any("exchanged" in words for words in planted) and any("transposed" in words for words in planted)


def test_names_axes_and_opset_are_the_documented_ones(exported: tuple[Path, Any]) -> None:
    path, _ = exported
    with closing(open_onnx(path)) as file:
        names = [v.name for v in file.inputs]
        assert names[0] == "input_ids" and names[-1] == "attention_mask"
        assert names[1:3] == ["past_key_values.0.key", "past_key_values.0.value"]
        shapes = {v.name: v.shape for v in (*file.inputs, *file.outputs)}
        assert shapes["input_ids"] == ("batch", "sequence")
        assert shapes["attention_mask"] == ("batch", "past_sequence + sequence")
        assert shapes["past_key_values.0.value"] == ("batch", 2, "past_sequence", 12)
        assert shapes["present.0.value"] == ("batch", 2, "past_sequence + sequence", 12)
        assert shapes["logits"] == ("batch", "sequence", 336)
        assert file.opset == 18
        assert {place.file for place in file.outside.values()} == {"model.onnx.data"}


def test_keys_and_values_are_named_layer_by_layer(conversions: Written) -> None:
    with opened(conversions("qwen3-0.6b"), None, {}) as subject:
        side = for_task(converted_side(subject, torch.float32, "cpu"), "causal-lm")
        form = form_of(side, "causal-lm", with_past=True)
    layers = range(side.config.n_layers)
    assert [f"{p.name} {p.own}" for p in form.outputs[1:]] == [
        f"present.{i}.{kind} model.layers.{i}.{n}" for i in layers for n, kind in enumerate(("key", "value"))
    ]
    assert [p.own for p in form.inputs[1:-1]] == [p.own for p in form.outputs[1:]] and len(layers) > 1


def test_a_table_of_few_positions_is_enough(conversions: Written) -> None:
    with opened(conversions("bert-v1-bare"), None, VARIANTS["bert-v1-bare"].settings) as subject:
        side = for_task(converted_side(subject, torch.float32, "cpu"), "default")
        table = "embeddings.position_embeddings.weight"
        (name,) = (n for n in side.ranks[0] if n.endswith(table))
        side = replace(side, ranks=({**side.ranks[0], name: side.ranks[0][name][:16]},))
        assert name in needed(side, form_of(side, "default", with_past=False))


def test_a_graph_says_nothing_of_the_machine_that_wrote_it(exported: tuple[Path, Any]) -> None:
    path, _ = exported
    content = path.read_bytes()
    assert b".py" not in content and os.fsencode(Path.cwd()) not in content
    assert not any(node.metadata_props for node in onnx.load(path, load_external_data=False).graph.node)


def test_weights_keep_names_shapes_and_bits(exported: tuple[Path, Any], converted: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(converted / "model.safetensors")
    with closing(open_onnx(exported[0])) as file:
        assert set(file.tensors) == set(tensors)
        for name, x in tensors.items():
            assert file.tensors[name].shape == x.shape
            held = np.empty(x.shape, np.float32)
            file.read_into(name, 0, memoryview(held.reshape(-1).view(np.uint8)))
            assert np.array_equal(held, x.astype(np.float32))


class Codes(Weights):
    def _load(self, info: TensorInfo) -> torch.Tensor:
        return 2 * super()._load(info)


def test_large_weights_lie_at_pages_and_are_written_a_piece_at_a_time(tmp_path: Path) -> None:
    """Of tensors that have no values in the graph; one of few bytes stands in it."""
    import onnx_ir
    from safetensors.torch import save_file
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.onnx._internal.exporter._core import TorchTensor

    stored = {name: torch.randn(shape) for name, shape in (("a", (3, 100)), ("b", (600, 500)), ("c", (2, 7)))}
    save_file(stored, tmp_path / "m.safetensors")
    with closing(open_checkpoint(tmp_path / "m.safetensors")) as checkpoint:
        (infos,) = ranks_of(checkpoint)
        weights, mode = Weights(checkpoint, infos, torch.float32, "cpu"), FakeTensorMode()
        values = [
            onnx_ir.Value(name=n, const_value=TorchTensor(without_values(x, mode), n))
            for n, x in stored.items()
        ]
        graph = onnx_ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18})
        put_outside(graph, weights, tmp_path / "m.onnx.data")
        assert len(list(pieces(weights, "b"))) == 3
        codes = Codes(checkpoint, infos, torch.float32, "cpu")  # made of more than they are stored as
        assert torch.equal(torch.cat(list(pieces(codes, "b"))), 2 * stored["b"].reshape(-1))
        onnx.save(onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)), tmp_path / "m.onnx")
        with closing(open_onnx(tmp_path / "m.onnx")) as file:
            places = {n: (p.offset, p.size) for n, p in file.outside.items()}
            assert places == {"a": (0, 1200), "b": (1 << 16, 1_200_000)}
            assert all(in_graph(file, weights, n) for n in stored)
            data = tmp_path / "m.onnx.data"
            content = bytearray(data.read_bytes())
            content[-1] ^= 1
            data.write_bytes(content)
    with closing(open_checkpoint(tmp_path / "m.safetensors")) as checkpoint:
        weights = Weights(checkpoint, ranks_of(checkpoint)[0], torch.float32, "cpu")
        with closing(open_onnx(tmp_path / "m.onnx")) as file:
            assert [n for n in stored if not in_graph(file, weights, n)] == ["b"]


def test_an_export_that_does_not_pass_is_not_published(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: tuple[Path, Any]
) -> None:
    def wrong(side: Any, form: Any, opset: int, folder: Path, name: str) -> None:
        path = copied(exported, folder)
        _alter(path, "model.layers.0.mlp.gate_proj.weight")
        path.rename(folder / name)

    monkeypatch.setattr(onnx_made, "export", wrong)
    run = program("export", "onnx", str(converted), "--out", "model.onnx", cwd=tmp_path, columns=80)
    assert run.returncode == 1 and "differ from" in run.stdout
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_stays_unless_it_is_to_be_replaced(
    converted: Path, tmp_path: Path, exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "model.onnx"
    old.write_bytes(b"old")
    arguments = ("export", "onnx", str(converted), "--out", "model.onnx")
    run = program(*arguments, cwd=tmp_path)
    assert run.returncode == 2 and "error[output-exists]" in run.stderr and old.read_bytes() == b"old"
    monkeypatch.setattr(onnx_made, "export", lambda side, form, opset, folder, name: copied(exported, folder))
    run = program(*arguments, "--with-past", "--overwrite", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert old.read_bytes() == exported[0].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--opset", "13"), "expected a version of the operators from 18 to 24, found 13"),
        (("--task", "question-answering"), "expected causal-lm or default"),
        (("--task", "poetry"), "expected one of default, causal-lm"),
        (("--out", "model.bin"), "expected a name that ends in .onnx"),
        (("--out", "nowhere/model.onnx"), "expected an existing folder"),
    ],
)
def test_what_cannot_be_exported_is_said(
    options: tuple[str, ...], message: str, converted: Path, tmp_path: Path
) -> None:
    run = program("export", "onnx", str(converted), "--out", "a.onnx", *options, cwd=tmp_path)
    assert run.returncode == 2 and message in run.stderr
    assert not list(tmp_path.iterdir())


def test_no_padding_follows_where_no_id_stands_for_it(exported: tuple[Path, Any], converted: Path) -> None:
    """A sequence is labelled by its last token, which nothing tells then."""
    path, _ = exported
    with source_of(converted, None, None) as source, closing(open_onnx(path)) as file:
        side, interface = source.converted(torch.float32), recognised(file)
        for pad, task, there in (
            (None, "sequence-classification", False),
            (3, "sequence-classification", True),
            (None, "token-classification", True),
        ):
            known = replace(source, config={**source.config, "pad_token_id": pad})
            names = {case.name for case in onnx_parity._cases(known, side, interface, None, task)[0]}
            assert ("padded" in names) is there and "padded left" in names


@pytest.mark.parametrize(("cut", "kind"), [(None, "missing-tensor"), (40, "unsupported")])
def test_a_tensor_that_is_not_there_is_named(
    cut: int | None, kind: str, converted: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    """Or one of another size than config.json says."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(converted, tmp_path / "out")
    place, name = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(place)
    x = tensors.pop(name)
    save_file(tensors if cut is None else {**tensors, name: x[:cut]}, place, {"format": "pt"})
    path = str(copied(exported, tmp_path))
    for command in (("export", "onnx", "out", "--out", "a.onnx"), ("verify", path, "--source", "out")):
        run = program(*command, cwd=tmp_path)
        assert run.returncode == 2 and f"error[{kind}]" in run.stderr, run.stderr
        assert cut is not None or name in run.stderr
    assert not list(tmp_path.glob("a.onnx*"))


def test_a_tensor_before_the_head_is_not_a_missing_head(converted: Path) -> None:
    with source_of(converted, None, None) as source:
        side = source.converted(torch.float32)
        names = [n for n in side.ranks[0] if not n.endswith("up_proj.weight")]
        side = replace(side, ranks=({n: side.ranks[0][n] for n in names},))
        with pytest.raises(CkptToolError) as error:
            onnx_export._runs(side, "logits")
    assert error.value.kind == "missing-tensor"


def test_one_number_for_a_token_is_too_few_to_be_measured_by_itself() -> None:
    """Scores of a short prompt lay so close together that their rounding was over the bar."""
    close, far = torch.tensor([[1.0], [1.0001]]), torch.tensor([[-1.0], [2.0]])
    wanted = [{"start_logits": x.double(), "end_logits": -x.double()} for x in (close, far)]
    found = onnx_parity._variances(wanted, "question-answering")
    assert found == dict.fromkeys(wanted[0], pytest.approx(torch.cat([close, far]).var(correction=0).item()))
    judged = onnx_parity.Judged([], wanted, [], [], found)
    assert judged.far(0, "start_logits", close + 3e-7).nmse < 1e-12


def test_past_of_a_model_that_keeps_none_is_refused(conversions: Written, tmp_path: Path) -> None:
    for task in ((), ("--task", "default")):
        folder = str(conversions("bert-v1-bare"))
        run = program("export", "onnx", folder, "--out", "a.onnx", "--with-past", *task, cwd=tmp_path)
        assert run.returncode == 2 and not list(tmp_path.iterdir())
        assert "a decoder that keeps keys and values of earlier tokens, found MegatronBert" in run.stderr


# --- exports of others ------------------------------------------------------------------------------------


def verified(path: Path, source: Path, *options: str) -> Any:
    return program("verify", path.name, "--source", str(source), *options, cwd=path.parent, columns=80)


def _alter(path: Path, name: str) -> None:
    """The matrix transposed in its place."""
    with closing(open_onnx(path)) as file:
        place, shape = file.outside[name], file.tensors[name].shape
    data = path.parent / place.file
    content = bytearray(data.read_bytes())
    x = np.frombuffer(content, "<f4", count=place.size // 4, offset=place.offset).reshape(shape)
    content[place.offset : place.offset + place.size] = x.T.tobytes()
    data.write_bytes(content)


def as_of_another_exporter(path: Path) -> None:
    """Weights without names, other names of axes."""
    model = onnx.load(path, load_external_data=False)
    names = {t.name: f"onnx::MatMul_{k}" for k, t in enumerate(model.graph.initializer)}
    for t in model.graph.initializer:
        t.name = names[t.name]
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = {"batch": "batch_size"}.get(dim.dim_param, "length")
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())


def test_a_graph_of_another_exporter_is_judged_by_the_original(
    exported: tuple[Path, Any], original: Path, tmp_path: Path
) -> None:
    path = copied(exported, tmp_path)
    as_of_another_exporter(path)
    run = verified(path, original, "--json", "report.json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "batch_size, length" in found(report, "interface")["message"]
    assert found(report, "weights")["data"]["tensors"] == 13
    assert "the original's own reading" in found(report, "outputs")["message"]
    assert found(report, "negative control")["data"]["rate"] == 1


def _fixed(path: Path, batch: int, length: int) -> None:
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
        if value.name in ("input_ids", "logits"):
            value.type.tensor_type.shape.dim[1].dim_value = length
    path.write_bytes(model.SerializeToString())


def test_a_graph_of_fixed_sizes_is_asked_what_it_takes(
    exported: tuple[Path, Any], original: Path, tmp_path: Path
) -> None:
    """Two rows, one token after the other: those before go in one at a time."""
    path = copied(exported, tmp_path)
    _fixed(path, 2, 1)
    run = verified(path, original, "--json", "report.json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row[0] for row in found(report, "outputs")["tables"][0]["rows"]}
    assert rows == {"fixed sizes", "fixed sizes, past"}
    assert found(report, "negative control")["data"]["rate"] == 1


@pytest.mark.parametrize(
    ("shape", "past", "names"),
    [
        ((1, 129), False, {"fixed sizes", "fixed sizes, padded right", "fixed sizes, padded left"}),
        ((5, 3), False, {"fixed sizes", "fixed sizes, padded right", "fixed sizes, padded left"}),
        ((5, 1), False, set()),  # one token shows nothing of attention
        ((2, 4096), False, set()),
        ((2, 0), False, set()),
        (("batch", 4), True, {"fixed sizes", "fixed sizes, past", "fixed sizes, padded right",
                              "fixed sizes, padded left"}),
    ],
)  # fmt: skip
def test_cases_of_fixed_sizes(
    shape: Any, past: bool, names: set[str], exported: tuple[Path, Any], converted: Path
) -> None:
    path, _ = exported
    with source_of(converted, None, None) as source, closing(open_onnx(path)) as file:
        side, interface = source.converted(torch.float32), recognised(file)
        ids = replace(interface.inputs["ids"], shape=shape)
        fixed = replace(
            interface,
            inputs={**interface.inputs, "ids": ids},
            past=interface.past if past else {},
        )
        if not names:
            with pytest.raises(CkptToolError, match="2 to 4096 tokens"):
                onnx_parity._cases(source, side, fixed, None, "causal-lm")
            return
        cases, left = onnx_parity._cases(source, side, fixed, None, "causal-lm")
        assert {case.name for case in cases} == names and "long" in left


def test_a_single_row_is_not_planted_transposed() -> None:
    """It was counted as a mistake that float32 cannot see."""
    one, two = (TensorInfo(f"a.{n}", "F32", (n, 9), "x.onnx") for n in (1, 2))
    words = [name for name, _ in onnx_mistakes._weights(None, [one, two])]  # type: ignore[arg-type]
    assert "a.2 transposed" in words and "a.1 left at zero" in words and "a.1 transposed" not in words


def test_prompts_of_the_user_stay_whole(
    exported: tuple[Path, Any], converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model the fixed ones are cut; that its positions end there was said of the user's too."""
    monkeypatch.setattr(onnx_parity, "LARGE", 1)
    monkeypatch.setattr(onnx_parity, "SHORTER", 7)
    with source_of(converted, None, None) as source, closing(open_onnx(exported[0])) as file:
        side = source.converted(torch.float32)
        cases, _ = onnx_parity._cases(source, side, recognised(file), {"mine": range(9)}, "causal-lm")
        lengths = {case.name: case.ids.shape[1] for case in cases}
    assert lengths["mine"] == 9 and lengths["long"] == 7


def test_prompts_that_the_model_does_not_take_are_refused_before_the_export(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_made, "export", lambda *given: pytest.fail("exported"))
    with pytest.raises(CkptToolError) as caught:
        onnx_made.export_onnx(converted, tmp_path / "m.onnx", prompts={"mine": [1, 10**6]})
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("usage", "prompt mine")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_written_meanwhile_have_no_verdict(
    exported: tuple[Path, Any], converted: Path, tmp_path: Path
) -> None:
    path = copied(exported, tmp_path)

    def touched(words: str) -> None:
        if "planting" in words:
            with open(path.parent / (path.name + DATA), "r+b") as data:
                data.write(b"0000")

    with source_of(converted, None, None) as source, pytest.raises(CkptToolError) as error:
        onnx_parity.verify_file(path, source, tell=touched)
    assert error.value.kind == "input-changed"


def test_a_wrong_weight_is_found(exported: tuple[Path, Any], converted: Path, tmp_path: Path) -> None:
    path = copied(exported, tmp_path)
    _alter(path, "model.layers.0.self_attn.o_proj.weight")
    run = verified(path, converted, "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert run.returncode == 1 and found(report, "outputs")["status"] == "fail"
    said = found(report, "weights")
    assert said["message"].endswith("other bits under its name: model.layers.0.self_attn.o_proj.weight")
    assert said["data"]["missing"] == said["data"]["other_bits"]


def _changed(path: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> None:
    """Weights altered where they lie, by name."""
    with closing(open_onnx(path)) as file:
        places = {n: (p.offset, p.size, file.tensors[n].shape) for n, p in file.outside.items()}
    data = np.memmap(path.parent / (path.name + DATA), np.uint8, "r+")
    change({n: data[at : at + size].view("<f4").reshape(shape) for n, (at, size, shape) in places.items()})


FIRST, SECOND = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "kv")


def _exchanged(weights: dict[str, np.ndarray[Any, Any]]) -> None:
    weights[FIRST][:], weights[SECOND][:] = weights[SECOND].copy(), weights[FIRST].copy()


def _folded(weights: dict[str, np.ndarray[Any, Any]]) -> None:
    weights[SECOND][:] *= 2


def _one_bit(weights: dict[str, np.ndarray[Any, Any]]) -> None:
    weights["model.embed_tokens.weight"].view(np.uint32)[-1, 0] ^= 1  # of a word that no prompt has


@pytest.mark.parametrize(
    ("change", "producer", "status", "words"),
    [
        (_exchanged, "pytorch", "fail", f"exchanged: {FIRST} holds {SECOND}, {SECOND} holds {FIRST}"),
        (_one_bit, "ckpt-tool", "fail", "with other bits under its name: model.embed_tokens.weight"),
        (
            _one_bit,
            "pytorch",
            "fail",
            "model.embed_tokens.weight holds model.embed_tokens.weight but for 1 of",
        ),
        (_folded, "pytorch", "note", f"with other bits under its name: {SECOND}"),
    ],
)
def test_weights_are_compared_under_their_names(
    change: Any, producer: str, status: str, words: str,
    exported: tuple[Path, Any], converted: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Another's bits under a name, and a bit that no result shows: of an export that promises all, and of
    one that may fold numbers in, which changes all of a tensor."""
    path = copied(exported, tmp_path)
    _changed(path, change)
    model = onnx.load(path, load_external_data=False)
    model.producer_name = producer
    path.write_bytes(model.SerializeToString())
    with source_of(converted, None, None) as source, closing(open_onnx(path)) as file:
        (finding,) = onnx_parity._weights(file, source.converted(torch.float32))
    assert finding.status == status and words in finding.message


class _Graph:
    """Tensors as a graph holds them, and how many bytes were read."""

    def __init__(self, held: dict[str, np.ndarray[Any, Any]]) -> None:
        self.held, self.read = held, 0
        self.tensors = {n: TensorInfo(n, "F32", x.shape, "model.onnx") for n, x in held.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.read += len(buffer)
        buffer[:] = self.held[name].tobytes()[offset : offset + len(buffer)]


def test_tensors_that_share_no_number_are_not_read_in_pairs() -> None:
    """Of a graph in which all weights of one shape have something folded in; and the row that differs of one
    that is there, transposed."""
    shape, rng = (40, 50), np.random.default_rng(5)
    right = {f"w{k}": rng.standard_normal(shape).astype(np.float32) for k in range(6)}
    tensors = {n: torch.from_numpy(x) for n, x in right.items()}
    other: Any = _Graph({f"g{k}": x * 3 for k, x in enumerate(right.values())})
    assert [*in_part(other, tensors, [*right], [*other.tensors])] == []
    assert other.read <= 6 * RUNS * RUN * 4
    partly = right["w2"].T.copy()
    partly[7] = 1
    one: Any = _Graph({"g0": right["w1"] * 3, "g1": partly})
    (text,) = in_part(one, tensors, [*right], [*one.tensors])
    assert text == "g1 holds w2 but for 40 of its 2,000 numbers"


def test_weights_in_float16_under_their_names_are_told_as_such(
    exported: tuple[Path, Any], converted: Path, tmp_path: Path
) -> None:
    """Rounded ones are no other bits; one of those that was not rounded from the source is."""
    path = copied(exported, tmp_path)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in (FIRST, SECOND):
            half = onnx.numpy_helper.to_array(tensor).astype("<f2")
            half.view("<u2")[0, 0] ^= tensor.name == SECOND
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    path = tmp_path / "half.onnx"
    onnx.save(model, path)
    with source_of(converted, None, None) as source, closing(open_onnx(path)) as file:
        (finding,) = onnx_parity._weights(file, source.converted(torch.float32))
    assert f"1 rounded to float16: {FIRST}; with other bits under its name: {SECOND}" in finding.message
    assert (finding.data["float16"], finding.data["other_bits"]) == ([FIRST], [SECOND])


def _renamed(old: str, new: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    names[k] = new if name == old else name

    return change


def test_positions_count_the_tokens_of_no_padding(tmp_path: Path) -> None:
    """As optimum's graphs want them, which take position_ids."""
    helper = onnx.helper
    axes, path = ["batch_size", "length"], tmp_path / "positions.onnx"
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "position_ids"], ["logits"])],
        "positions",
        [helper.make_tensor_value_info(name, 7, axes) for name in ("input_ids", "position_ids")],
        [helper.make_tensor_value_info("logits", 1, [*axes, 1])],
        [helper.make_tensor("table", 1, [9, 1], [float(k) for k in range(9)])],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), path)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with closing(open_onnx(path)) as file:
        made = opened_graph(file, recognised(file), None).run(Case("padded", torch.zeros_like(mask), mask))
    assert made["logits"][..., 0].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("attention_mask", "mask_of_mine", "expected inputs of these names"),
        ("logits", "1234", "expected outputs of these names"),
        ("logits", "pooler_output", "expected a result that the source has for the task default"),
        ("present.0.key", "present.7.key", "expected an output present.0.key for the tokens after"),
    ],
)
def test_names_that_are_not_known_are_refused(
    old: str, new: str, message: str, exported: tuple[Path, Any], converted: Path, tmp_path: Path
) -> None:
    path = copied(exported, tmp_path)
    model = onnx.load(path, load_external_data=False)
    _renamed(old, new)(model)
    path.write_bytes(model.SerializeToString())
    run = verified(path, converted)
    assert run.returncode == 2 and message in run.stderr and (new in run.stderr or old in run.stderr)


def _layer_seven(model: Any) -> None:
    for value in (*model.graph.input, *model.graph.output):
        _renamed(value.name, value.name.replace(".0.", ".7."))(model)


def _flat_past(model: Any) -> None:
    del model.graph.input[1].type.tensor_type.shape.dim[2:]


def _made_of_logits(kind: str, dtype: int | None = None, **attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        _renamed("logits", "made")(model)
        (value,) = (v for v in model.graph.output if v.name == "made")
        value.name = "logits"
        value.type.tensor_type.ClearField("shape")
        value.type.tensor_type.elem_type = dtype or value.type.tensor_type.elem_type
        model.graph.node.append(onnx.helper.make_node(kind, ["made"], ["logits"], **attributes))

    return change


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (_layer_seven, 2, "keys and values of 1 layers from 0 on, found 2 tensors of the layers 7"),
        (_flat_past, 2, "expected (batch, heads, past tokens, width), found F32 (batch, 2)"),
        (_made_of_logits("Transpose", perm=[0, 2, 1]), 1, "logits"),
        (_made_of_logits("ReduceSum", keepdims=0), 1, "logits"),
        (_made_of_logits("Cast", 10, to=10), 1, "logits"),
        (_made_of_logits("Cast", 11, to=11), 0, "pass"),
        (_made_of_logits("Cast", 7, to=7), 2, "expected results in F32, F64 or F16, found I64"),
    ],
    ids=["layers", "past", "turned", "one number", "half", "double", "whole numbers"],
)
def test_results_of_another_kind_are_told(
    change: Any, code: int, message: str, exported: tuple[Path, Any], converted: Path, tmp_path: Path
) -> None:
    path = copied(exported, tmp_path)
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    run = verified(path, converted)
    assert run.returncode == code and message in " ".join((run.stdout + run.stderr).split()), run.stderr


def test_a_result_that_the_source_has_not_is_not_said_to_be_compared(
    exported: tuple[Path, Any], converted: Path, tmp_path: Path
) -> None:
    path = copied(exported, tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["pooler_output"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("pooler_output", 1, None))
    path.write_bytes(model.SerializeToString())
    run = verified(path, converted)
    assert run.returncode == 0 and "not compared: pooler_output" in " ".join(run.stdout.split())


def test_a_graph_wants_a_source_and_no_options_of_checkpoints(exported: tuple[Path, Any]) -> None:
    path, _ = exported
    run = program("verify", path.name, cwd=path.parent)
    assert run.returncode == 2 and "expected the model that the graph was made from" in run.stderr
    run = verified(path, path.parent, "--against", "transformers")
    assert run.returncode == 2 and "--against" in run.stderr
    run = verified(path, path.parent, "--level", "training")
    assert run.returncode == 2
    assert "expected parity, which is all that a graph is asked, found training: it has no gradients" in (
        " ".join(run.stderr.split())
    )


# --- files that lie ---------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """y = x W, W in a file beside it."""
    helper = onnx.helper
    weight = helper.make_tensor("W", 1, [4, 3], np.arange(12, dtype="<f4").tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", 1, ["batch", 4])],
        [helper.make_tensor_value_info("y", 1, ["batch", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    path = tmp_path / "small.onnx"
    onnx.save(model, path, save_as_external_data=True, location="small.onnx.data", size_threshold=0)
    return path


def _said(**values: str) -> Callable[[Any, Path], None]:
    def change(model: Any, folder: Path) -> None:
        (weight,) = model.graph.initializer
        said = {e.key: e.value for e in weight.external_data} | values
        del weight.external_data[:]
        for key, value in said.items():
            weight.external_data.add(key=key, value=value)

    return change


def _without_data(model: Any, folder: Path) -> None:
    (folder / "small.onnx.data").unlink()


def _cut_data(model: Any, folder: Path) -> None:
    os.truncate(folder / "small.onnx.data", 40)


def _link_out(model: Any, folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside"
    (folder / "small.onnx.data").rename(outside)
    (folder / "small.onnx.data").symlink_to(outside)


def _dims(*dims: int) -> Callable[[Any, Path], None]:
    def change(model: Any, folder: Path) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


def _twice(model: Any, folder: Path) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _outside(location: str) -> Any:
    value = onnx.helper.make_tensor("c", 1, [1], b"\0" * 4, raw=True)
    value.ClearField("raw_data")
    value.data_location = 1
    value.external_data.add(key="location", value=location)
    return value


def _hidden_in_a_constant(model: Any, folder: Path) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=_outside("../secret")))


def _hidden_in_a_sparse_one(model: Any, folder: Path) -> None:
    indices = onnx.helper.make_tensor("i", 7, [1], [0])
    value = onnx.helper.make_sparse_tensor(_outside("../secret"), indices, [4])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], sparse_value=value))


def _hidden_in_a_function(model: Any, folder: Path) -> None:
    usual = model.functions.add(name="f", domain="x").attribute_proto.add(name="a", type=4)
    usual.t.CopyFrom(_outside("../secret"))


def _hidden_in_training(model: Any, folder: Path) -> None:
    model.training_info.add().initialization.initializer.append(_outside("../secret"))


def _two_places(model: Any, folder: Path) -> None:
    model.graph.initializer[0].external_data.insert(
        0, onnx.StringStringEntryProto(key="location", value="..")
    )


def _in_memory(model: Any, folder: Path) -> None:
    place = folder / "*" / "_ORT_MEM_ADDR_"
    place.mkdir(parents=True)
    (place / "*").write_bytes(b"\0" * 48)
    _said(location="*/_ORT_MEM_ADDR_/*")(model, folder)


def _words(model: Any, folder: Path) -> None:
    model.graph.initializer.append(onnx.helper.make_tensor("s", 8, [1], [b"words"]))


def _short_inline(model: Any, folder: Path) -> None:
    value = onnx.helper.make_tensor("w", 1, [2], b"\0" * 8, raw=True)
    value.raw_data = b"\0" * 4
    model.graph.initializer.append(value)


LIES: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "a place above": (_said(location="../small.onnx.data"), "bad-onnx"),
    "a place below and above": (_said(location="a/../../small.onnx.data"), "bad-onnx"),
    "an absolute place": (_said(location="/etc/passwd"), "bad-onnx"),
    "a place of Windows": (_said(location="..\\secret"), "bad-onnx"),
    "no place": (_said(location=""), "bad-onnx"),
    "the folder itself": (_said(location="."), "bad-onnx"),
    "a link out of the folder": (_link_out, "bad-onnx"),
    "no file": (_without_data, "missing-file"),
    "a file that is cut": (_cut_data, "truncated"),
    "an offset beyond the end": (_said(offset="48"), "truncated"),
    "an offset that is no number": (_said(offset="-4"), "bad-onnx"),
    "another length": (_said(length="44"), "size-mismatch"),
    "a negative size": (_dims(-4, 3), "bad-onnx"),
    "a huge size": (_dims(1 << 40, 1 << 40), "bad-onnx"),
    "a size that the bytes are too few for": (_dims(1 << 20, 3), "size-mismatch"),
    "a name twice": (_twice, "bad-onnx"),
    "a constant elsewhere": (_hidden_in_a_constant, "bad-onnx"),
    "a sparse constant elsewhere": (_hidden_in_a_sparse_one, "bad-onnx"),
    "an attribute of a function elsewhere": (_hidden_in_a_function, "bad-onnx"),
    "a weight of training elsewhere": (_hidden_in_training, "bad-onnx"),
    "two places": (_two_places, "bad-onnx"),
    "a place in memory": (_in_memory, "bad-onnx"),
    "a key that is not known": (_said(prepacked_0="0|4|0"), "bad-onnx"),
    "words as weights": (_words, "unsupported-dtype"),
    "too few bytes in the graph": (_short_inline, "size-mismatch"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_weights_is_refused_before_they_are_opened(lie: str, small: Path) -> None:
    change, kind = LIES[lie]
    model = onnx.load(small, load_external_data=False)
    change(model, small.parent)
    small.write_bytes(model.SerializeToString())
    with pytest.raises(CkptToolError) as error:
        open_onnx(small)
    assert error.value.kind == kind
    run = program("inspect", small.name, cwd=small.parent)
    assert run.returncode == 2 and f"error[{kind}]" in run.stderr


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08\x0a", b"no protobuf at all", random.Random(3).randbytes(64)],
    ids=["nothing", "cut", "text", "noise"],
)
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CkptToolError) as error:
        open_onnx(path)
    assert error.value.kind == "bad-onnx"


def test_a_small_graph_is_shown(small: Path) -> None:
    run = program("inspect", small.name, cwd=small.parent, columns=80)
    assert run.returncode == 0
    for words in (
        "opset ai.onnx = 18",
        "input x = F32 (batch, 4)",
        "output y = F32 (batch, 3)",
        "(4, 3)",
        "small.onnx.data: 48 bytes",
    ):
        assert words in run.stdout


# --- what the graphs are made of --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["qwen3-0.6b", "opt-float32"])
def test_padding_and_past_are_read_as_the_library_reads_them(variant: str, conversions: Written) -> None:
    """A batch with padding on the left, whole and after its first tokens."""
    from transformers import AutoModelForCausalLM

    with opened(conversions(variant), None, VARIANTS[variant].settings) as subject:
        side = converted_side(subject, torch.float32, "cpu")
        ids = torch.arange(3, 21).view(2, 9)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        model = AutoModelForCausalLM.from_pretrained(
            conversions(variant), dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask).logits
        ours = side.forward(ids, {"mask": mask})
        past: dict[str, torch.Tensor] = {}
        side.encode(ids[:, :4], {"mask": mask[:, :4], "past": past})  # type: ignore[dict-item]
        later = side.forward(ids[:, 4:], {"mask": mask, "past": past})  # type: ignore[dict-item]
    real = mask.bool()
    assert float((ours - wanted)[real].abs().max()) < 1e-4
    assert float((later - wanted[:, 4:])[real[:, 4:]].abs().max()) < 1e-4


@pytest.mark.parametrize("both_ways", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("reach", [None, 5])
def test_an_average_of_a_graph_is_that_of_the_fourier_transforms(both_ways: bool, reach: int | None) -> None:
    """onnxruntime's own transforms lose four digits at lengths that are no powers of two."""
    from ckpt_tool.reference.hf_mega import convolved, multiplied

    T = 13
    R = reach or T
    generator = torch.Generator().manual_seed(5)
    y = torch.randn(2, 4, T, generator=generator, dtype=torch.float64)
    taps = torch.randn(4, 2 * R - 1 if both_ways else R, generator=generator, dtype=torch.float64)
    length = T + R - 1 if both_ways else T
    assert torch.allclose(convolved(y, taps, length), multiplied(y, taps, length), rtol=0, atol=1e-12)


def test_padding_and_past_of_gpt_oss_are_left_out(
    conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows alone are right; padding on the left changes nothing, as positions are relative. As a graph the
    pass runs all experts on the tokens that chose them."""
    from ckpt_tool.reference import hf_gpt_oss

    with opened(conversions("gpt-oss-20b"), None, VARIANTS["gpt-oss-20b"].settings) as subject:
        side = converted_side(subject, torch.float32, "cpu")
        ids = torch.arange(3, 21).view(2, 9)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        alone = side.forward(ids[1:, 3:])
        whole = side.forward(ids, {"mask": mask})
        past: dict[str, torch.Tensor] = {}
        side.encode(ids[:, :4], {"mask": mask[:, :4], "past": past})  # type: ignore[dict-item]
        later = side.forward(ids[:, 4:], {"mask": mask, "past": past})  # type: ignore[dict-item]
        monkeypatch.setattr(hf_gpt_oss, "traced", lambda: True)
        written = side.forward(ids, {"mask": mask})
    assert float((whole[1:, 3:] - alone).abs().max()) < 1e-4
    assert float((whole[:, 4:] - later).abs().max()) < 1e-4
    assert torch.allclose(written, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["canine-s", "mega-chunks", "mega-decoder"])
def test_a_graph_of_windows_takes_every_length(
    variant: str, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a graph the pass does not choose by lengths, and computes the same at each."""
    from ckpt_tool.reference import hf_canine, hf_mega

    module: Any = hf_canine if variant.startswith("canine") else hf_mega
    with opened(conversions(variant), None, VARIANTS[variant].settings) as subject:
        side = converted_side(subject, torch.float64, "cpu")
        for tokens in sorted({side.fits(n) for n in (4, 9, 33)} - {0}):
            ids = torch.arange(11, 11 + 2 * tokens).view(2, tokens)
            mask = torch.ones_like(ids)
            mask[1, tokens // 2 :] = 0
            wanted = side.encode(ids, {"mask": mask})
            with monkeypatch.context() as patch:
                patch.setattr(module, "traced", lambda: True)
                found = side.encode(ids, {"mask": mask})
            for one, other in zip(leaves(wanted), leaves(found), strict=True):
                real = slice(None) if one.shape[1] != tokens else mask.bool()
                assert torch.allclose(one[real], other[real], rtol=0, atol=1e-9), tokens
