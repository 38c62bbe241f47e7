"""Carrying out plans: what is written, compared, refused and recorded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ckpt_tool.api import Options, convert
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.execute import Outcome, Progress, Run, execute, groups
from ckpt_tool.convert.layout import Part, Step, parse_dims
from ckpt_tool.convert.plan import OutputDocument, OutputFile, Plan, ToWrite, place
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests.conftest import touch

Written = Callable[[str], Path]
Arrays = dict[str, np.ndarray]


# --- plans made by hand ---------------------------------------------------------------------------------


def part(file: str, name: str, dtype: str, layout: str, *ranges: tuple[str, int, int]) -> Part:
    return Part(file, name, dtype, parse_dims(layout), ranges)


def step(
    sizes: dict[str, int], source: Part | Sequence[Part], target: Part | Sequence[Part], compare: str = ""
) -> Step:
    sources = (source,) if isinstance(source, Part) else tuple(source)
    targets = (target,) if isinstance(target, Part) else tuple(target)
    return Step(tuple(sizes.items()), sources, targets, compare=compare)


def plan_of(steps: Sequence[Step], limit: int = 1 << 40, **more: Any) -> Plan:
    wanted = ToWrite()
    for s in steps:
        for p in () if s.compare else s.targets:
            wanted.add("", p.dtype, p.shape(s.sizes), [p.name])
    files, index, home = place(wanted, limit)
    placed = tuple(
        Step(
            s.axes,
            s.sources,
            tuple(Part(home[p.name], p.name, p.dtype, p.dims, p.ranges) for p in s.targets),
            s.note,
            s.compare,
        )
        for s in steps
    )
    return Plan("test", "to-hf", placed, tuple(files), tuple(index), {}, **more)


def source_of(folder: Path, **files: Arrays) -> Checkpoint:
    """A checkpoint of safetensors files `model-0000K-of-0000N`, in the order given."""
    folder.mkdir(exist_ok=True)
    for name, arrays in files.items():
        save_file(arrays, folder / f"consolidated.{name}.safetensors")
    opened = {}
    from ckpt_tool.checkpoint.safetensors import open_safetensors

    for name in files:
        full = f"consolidated.{name}.safetensors"
        opened[full] = open_safetensors(folder / full, full)
    return Checkpoint(folder, dict(opened))


A, B = "consolidated.a.safetensors", "consolidated.b.safetensors"


def run(plan: Plan, checkpoint: Checkpoint, out: Path, **more: Any) -> tuple[Outcome, Arrays]:
    outcome = execute(plan, checkpoint, out, **more)
    arrays: Arrays = {}
    for file in plan.outputs:
        arrays.update(load_file(out / file.name))
    return outcome, arrays


def refused(plan: Plan, checkpoint: Checkpoint, out: Path, **more: Any) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        execute(plan, checkpoint, out, **more)
    assert not out.exists() and not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    return caught.value


def numbers(*shape: int, seed: int = 0, dtype: str = "<f4") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_copies_reorderings_joins_and_cuts_give_the_right_tensors(tmp_path: Path) -> None:
    x, left, right, fused = numbers(300, 70), numbers(64, 20), numbers(64, 30), numbers(90, 8)
    c = source_of(tmp_path / "in", a={"x": x, "j": left, "f": fused}, b={"j": right})
    sizes = {"d": 64, "k": 50}
    plan = plan_of(
        [
            step({"r": 300, "c": 70}, part(A, "x", "F32", "r c"), part("", "x.t", "F32", "c r")),
            step(
                sizes,
                [part(A, "j", "F32", "d k", ("k", 0, 20)), part(B, "j", "F32", "d k", ("k", 20, 50))],
                part("", "joined", "F32", "d k"),
            ),
            step(
                {"g": 3, "s": 5, "h": 6, "d": 8},
                part(A, "f", "F32", "(g s h) d"),
                [
                    part("", "q", "F32", "(g s h) d", ("s", 0, 3)),
                    part("", "k", "F32", "(g s h) d", ("s", 3, 4)),
                    part("", "v", "F32", "(g s h) d", ("s", 4, 5)),
                ],
            ),
        ]
    )
    outcome, got = run(plan, c, tmp_path / "out", sha256=True)
    assert np.array_equal(got["x.t"], x.T)
    assert np.array_equal(got["joined"], np.concatenate([left, right], axis=1))
    whole = fused.reshape(3, 5, 6, 8)
    for name, cut in (("q", whole[:, :3]), ("k", whole[:, 3:4]), ("v", whole[:, 4:])):
        assert np.array_equal(got[name], cut.reshape(-1, 8))
    size = sum(t.nbytes for t in c)
    assert (outcome.bytes_read, outcome.bytes_written) == (size, size)
    for (_, name), crc in outcome.targets.items():
        assert crc == zlib.crc32(got[name].tobytes()), name
    assert outcome.sources == {
        (A, "x"): zlib.crc32(x.tobytes()),
        (A, "j"): zlib.crc32(left.tobytes()),
        (A, "f"): zlib.crc32(fused.tobytes()),
        (B, "j"): zlib.crc32(right.tobytes()),
    }
    from hashlib import sha256

    assert all(h == sha256(got[name].tobytes()).hexdigest() for (_, name), h in outcome.sha256.items())
    assert len(outcome.sha256) == 5


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_large_tensors_are_right_whatever_the_number_of_workers(jobs: int, tmp_path: Path) -> None:
    x, y = numbers(5_000_011), numbers(1500, 1100, seed=1)
    c = source_of(tmp_path / "in", a={"x": x, "y": y})
    plan = plan_of(
        [
            step({"n": x.size}, part(A, "x", "F32", "n"), part("", "x", "F32", "n")),
            step({"r": 1500, "c": 1100}, part(A, "y", "F32", "r c"), part("", "y", "F32", "c r")),
        ]
    )
    outcome, got = run(plan, c, tmp_path / "out", jobs=jobs)
    assert np.array_equal(got["x"], x) and np.array_equal(got["y"], y.T)
    assert {n: v for (_, n), v in outcome.targets.items()} == {
        "x": zlib.crc32(x.tobytes()),
        "y": zlib.crc32(np.ascontiguousarray(y.T).tobytes()),
    }


@pytest.mark.parametrize("layout", ["r c", "c r"], ids=["copied", "reordered"])
@pytest.mark.parametrize("target", ["F16", "BF16", "F64"])
def test_casts_are_streamed(target: str, layout: str, tmp_path: Path) -> None:
    x = numbers(700, 301)
    c = source_of(tmp_path / "in", a={"x": x})
    plan = plan_of([step({"r": 700, "c": 301}, part(A, "x", "F32", "r c"), part("", "x", target, layout))])
    outcome = execute(plan, c, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as made:
        (info,) = made
        bits = made.read(info)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[target]
    wanted = torch.from_numpy(x if layout == "r c" else x.T.copy()).to(kind).contiguous()
    assert bits.tobytes() == wanted.view(torch.uint8).numpy().tobytes()
    assert outcome.targets["model.safetensors", "x"] == zlib.crc32(bits.tobytes())
    assert outcome.sources[A, "x"] == zlib.crc32(x.tobytes())
    assert outcome.manifest["options"]["dtype"] == target


def test_empty_and_scalar_tensors_pass(tmp_path: Path) -> None:
    c = source_of(tmp_path / "in", a={"e": numbers(0, 7), "s": np.array(3, "<f4"), "o": numbers(1)})
    plan = plan_of(
        [
            step({"r": 0, "c": 7}, part(A, "e", "F32", "r c"), part("", "e", "F32", "r c")),
            step({}, part(A, "s", "F32", ""), part("", "s", "F32", "")),
            step({"n": 1}, part(A, "o", "F32", "n"), part("", "o", "F32", "n")),
        ]
    )
    outcome, got = run(plan, c, tmp_path / "out")
    assert got["e"].shape == (0, 7) and got["s"].shape == () and got["s"] == 3
    assert outcome.targets["model.safetensors", "e"] == 0


def test_a_plan_that_leaves_bytes_unwritten_is_a_bug_and_publishes_nothing(tmp_path: Path) -> None:
    c = source_of(tmp_path / "in", a={"x": numbers(10)})
    plan = plan_of(
        [step({"n": 10}, part(A, "x", "F32", "n", ("n", 0, 5)), part("", "x", "F32", "n"))],
    )
    with pytest.raises(RuntimeError, match="left bytes of x unwritten"):
        execute(plan, c, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_files_that_no_step_connects_are_separate_groups() -> None:
    def file(name: str) -> OutputFile:
        return OutputFile(name, "safetensors", ())

    one = step({"n": 2}, part(A, "x", "F32", "n"), part("f1", "x", "F32", "n"))
    two = step(
        {"n": 2},
        part(A, "y", "F32", "n"),
        [part("f0", "y", "F32", "n", ("n", 0, 1)), part("f2", "z", "F32", "n", ("n", 1, 2))],
    )
    plan = Plan("test", "to-hf", (one, two), tuple(map(file, ("f0", "f1", "f2", "f3"))), (), {})
    found = [([f.name for f in files], steps) for files, steps in groups(plan)]
    assert found == [(["f0", "f2"], [1]), (["f1"], [0]), (["f3"], [])]


# --- findings -------------------------------------------------------------------------------------------


def copy_plan(arrays: Arrays, dtype: str = "F32") -> Plan:
    return plan_of(
        [
            step(
                {"n": x.shape[0], "m": x.shape[1]},
                part(A, n, dtype, "n m"),
                part("", n, dtype, "m n" if n.startswith("t") else "n m"),
            )
            for n, x in arrays.items()
        ]
    )


def test_odd_values_are_found_with_their_place(tmp_path: Path) -> None:
    plain = numbers(600, 500)
    arrays = {
        "fine": plain,
        "nan": plain.copy(),
        "tnan": plain.copy(),
        "zero": np.zeros((3, 4), "<f4"),
        "minus": np.full((3, 4), -0.0, "<f4"),
        "tiny": np.full((3, 4), 1e-40, "<f4"),
    }
    arrays["nan"][[499, 77, 300], [1, 33, 2]] = [np.nan, -np.inf, np.inf]
    arrays["tnan"][400, 3], arrays["tnan"][2, 450] = np.nan, -np.nan
    c = source_of(tmp_path / "in", a=arrays)
    outcome, _ = run(copy_plan(arrays), c, tmp_path / "out")
    found = {f.tensor: (f.kind, f.details.get("count"), f.details.get("first")) for f in outcome.findings}
    assert found == {
        "nan": ("non-finite", 3, [77, 33]),
        "tnan": ("non-finite", 2, [3, 400]),
        "zero": ("all-zero", None, None),
        "minus": ("all-zero", None, None),
        "tiny": ("denormal-only", None, None),
    }
    assert [f["tensor"] for f in outcome.manifest["findings"]] == [f.tensor for f in outcome.findings]
    error = refused(copy_plan(arrays), c, tmp_path / "strict", strict=True)
    assert {(p.kind, p.where) for p in error.problems} == {("non-finite", "nan"), ("non-finite", "tnan")}


@pytest.mark.parametrize(
    ("dtype", "bits", "kind"),
    [
        ("F16", [0x3C00, 0x7C00], "non-finite"),
        ("F16", [0xFC01, 0x0000], "non-finite"),
        ("F16", [0x7BFF, 0xFBFF], None),
        ("F16", [0x8000, 0x0000], "all-zero"),
        ("F16", [0x8001, 0x0000], "denormal-only"),
        ("BF16", [0xFF80, 0x0000], "non-finite"),
        ("BF16", [0x7F7F, 0xFF7F], None),
        ("BF16", [0x0080, 0x8000], None),
        ("F8_E4M3", [0xFF, 0x01], "non-finite"),
        ("F8_E4M3", [0x7E, 0xFE], None),
        ("F8_E5M2", [0x7C, 0x00], "non-finite"),
        ("I16", [0x7C00, 0xFFFF], None),
        ("U8", [0x00, 0x00], None),
    ],
)
def test_values_at_the_edges_of_each_type(dtype: str, bits: list[int], kind: str | None) -> None:
    from ckpt_tool.checkpoint.base import DTYPES
    from ckpt_tool.convert.values import Values

    values = Values(dtype)
    place = values.look(np.array(bits, dtype=DTYPES[dtype].bits))
    found = (
        "non-finite"
        if values.non_finite
        else "all-zero"
        if values.all_zero
        else "denormal-only"
        if values.denormal_only
        else None
    )
    assert found == kind and (place is not None) == (kind == "non-finite")


# --- copies and ties ------------------------------------------------------------------------------------


def replicas(tmp_path: Path, other: np.ndarray, compare: str = "replicated", **more: Any) -> Any:
    x = numbers(1000, seed=3, dtype="<f4")
    c = source_of(tmp_path / "in", a={"x": x}, b={"x": other})
    sizes = {"n": 1000}
    plan = plan_of(
        [
            step(sizes, part(A, "x", "F32", "n"), part("", "x", "F32", "n")),
            step(sizes, part(B, "x", "F32", "n"), part("", "x", "F32", "n"), compare),
        ],
        **more,
    )
    return plan, c


def test_equal_copies_leave_no_trace(tmp_path: Path) -> None:
    plan, c = replicas(tmp_path, numbers(1000, seed=3))
    outcome, _ = run(plan, c, tmp_path / "out")
    assert outcome.findings == () and outcome.manifest["replicas"] == []
    assert outcome.sources[A, "x"] == outcome.sources[B, "x"]


def test_small_differences_of_copies_are_recorded_with_their_size(tmp_path: Path) -> None:
    other = numbers(1000, seed=3)
    other[[5, 700]] += np.float32(1e-3)
    plan, c = replicas(tmp_path, other)
    outcome, got = run(plan, c, tmp_path / "out")
    assert np.array_equal(got["x"], numbers(1000, seed=3))  # the first copy is kept
    (finding,) = outcome.findings
    assert (finding.kind, finding.file, finding.tensor) == ("replica-difference", B, "x")
    assert finding.details["count"] == 2 and finding.details["max_delta"] == pytest.approx(1e-3, rel=1e-3)
    (entry,) = outcome.manifest["replicas"]
    assert entry["name"] == "x" and entry["file"] == B and entry["kept"] == A
    strict, c = replicas(tmp_path, other, strict_replicas=True)
    assert refused(strict, c, tmp_path / "strict").kind == "shard-conflict"


@pytest.mark.parametrize("what", ["another tensor", "one value", "NaN", "scaled"])
def test_large_differences_of_copies_are_refused_with_both_files(what: str, tmp_path: Path) -> None:
    other = numbers(1000, seed=4 if what == "another tensor" else 3)
    if what == "one value":
        other[3] = 50
    elif what == "NaN":
        other[3] = np.nan
    elif what == "scaled":
        other *= 1.05
    plan, c = replicas(tmp_path, other)
    error = refused(plan, c, tmp_path / "out")
    assert error.kind == "shard-conflict" and error.problems[0].file == B
    assert A in error.problems[0].message and "max |delta|" in error.problems[0].message


def test_tied_tensors_must_be_equal(tmp_path: Path) -> None:
    other = numbers(1000, seed=3)
    plan, c = replicas(tmp_path, other, "tied")
    assert run(plan, c, tmp_path / "out")[0].findings == ()
    other[1] = np.nextafter(other[1], np.float32(9))
    plan, c = replicas(tmp_path, other, "tied")
    assert refused(plan, c, tmp_path / "out2").kind == "tied-mismatch"


# --- checksums of the source ----------------------------------------------------------------------------


@pytest.fixture
def zipped(originals: Written, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "in"))


def flip(path: Path, name: str, at: int) -> None:
    with open_checkpoint(path) as c:
        place = c.files[path.name].extent(name)
    assert place is not None
    with open(path, "r+b") as file:
        file.seek(place[1] + at)
        byte = file.read(1)[0]
        file.seek(place[1] + at)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_while_copying(zipped: Path, tmp_path: Path) -> None:
    flip(zipped / "consolidated.00.pth", "layers.0.attention.wq.weight", 5)
    flip(zipped / "consolidated.00.pth", "norm.weight", 0)
    with pytest.raises(CkptToolError) as caught:
        convert(zipped, tmp_path / "out")
    found = {(p.kind, p.file, p.where) for p in caught.value.problems}
    assert found == {
        ("checksum", "consolidated.00.pth", "layers.0.attention.wq.weight"),
        ("checksum", "consolidated.00.pth", "norm.weight"),
    }
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_a_record_that_is_not_copied_in_order_is_read_through(zipped: Path, tmp_path: Path) -> None:
    """A transposed view is gathered, so its storage is read once more for its checksum."""
    weights = zipped / "consolidated.00.pth"
    state = torch.load(weights, weights_only=True)
    name = "layers.0.attention.wo.weight"
    state[name] = state[name].T.contiguous().T
    torch.save(state, weights)
    convert(zipped, tmp_path / "good", check=False)
    stored = state[name].T.contiguous().view(torch.uint8).numpy().tobytes()
    data = bytearray(weights.read_bytes())
    data[data.index(stored) + 9] ^= 16
    weights.write_bytes(data)
    with pytest.raises(CkptToolError) as caught:
        convert(zipped, tmp_path / "out", check=False)
    assert caught.value.kind == "checksum"


def test_records_without_a_checksum_are_said_to_be_unchecked(zipped: Path, tmp_path: Path) -> None:
    weights = zipped / "consolidated.00.pth"
    state = torch.load(weights, weights_only=True)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, weights)
    finally:
        torch.serialization.set_crc32_options(before)
    done = convert(zipped, tmp_path / "out", check=False)
    (finding,) = [f for f in done.outcome.findings if f.kind == "unchecked-records"]
    assert finding.file == "consolidated.00.pth" and finding.details["count"] > 10


# --- the whole run --------------------------------------------------------------------------------------


def test_equal_inputs_in_equal_places_give_equal_bytes(originals: Written, tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "a", tmp_path / "deep" / "two" / "b"
    for folder in (first.parent, second.parent):
        folder.mkdir(parents=True)
        shutil.copytree(originals("llama-3-70b"), folder / "download")
    convert(first.parent / "download", first, check=False, jobs=1)
    time.sleep(0.01)
    convert(second.parent / "download", second, check=False, jobs=3)
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    manifest = (first / "ckpt-tool.json").read_text()
    assert str(tmp_path) not in manifest and json.loads(manifest)["source"] == "../download"


@pytest.mark.parametrize(
    "variant",
    ["mistral-7b-v0.1", "mixtral-a", "mixtral-b", "llama-2-7b", "llama-3-70b", "llama-3.1-405b-mp16"],
)
def test_the_way_back_writes_the_original_bits_of_every_rank(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    family = VARIANTS[variant].family
    with open_checkpoint(originals(variant), prefer="original") as a:
        ranks = len(a.files) if family == "llama" else 1
        options = Options(shards=ranks)
        done = convert(
            conversions(variant),
            tmp_path / "back",
            family=family,
            to="original",
            options=options,
            check=False,
        )
        assert done.outcome.bytes_written == done.plan.bytes_out
        with open_checkpoint(tmp_path / "back") as b:
            assert set(b.names()) == {n for n in a.names() if "rope.freqs" not in n}
            for name in b.names():
                for x, y in zip(a.find(name), b.find(name), strict=True):
                    assert np.array_equal(a.read(x), b.read(y)), (x.file, name)


def test_the_manifest_says_what_was_read_and_written(originals: Written, tmp_path: Path) -> None:
    done = convert(originals("mistral-7b-v0.1"), tmp_path / "out", check=False)
    text = (tmp_path / "out" / "ckpt-tool.json").read_bytes()
    found = json.loads(text)
    assert found == json.loads(json.dumps(done.outcome.manifest))
    assert found["plan"] == done.plan.digest() and found["family"] == "mistral"
    with open_checkpoint(tmp_path / "out", prefer="hf") as made:
        crcs = {(t.file, t.name): f"{zlib.crc32(made.read(t).tobytes()):08x}" for t in made}
    assert {(t["file"], t["name"]): t["crc32"] for t in found["tensors"]} == crcs
    assert {d["file"] for d in found["documents"]} >= {"config.json"}
    assert found["config"]["rope_theta"]["source"]


def test_extra_documents_see_the_manifest_and_are_part_of_it(tmp_path: Path) -> None:
    x = {"x": numbers(4, 4)}
    c = source_of(tmp_path / "in", a=x)

    def extra(manifest: Any) -> list[OutputDocument]:
        return [OutputDocument("CARD.md", manifest["family"].encode(), "the manifest")]

    outcome, _ = run(copy_plan(x), c, tmp_path / "out", extra_documents=extra)
    assert (tmp_path / "out" / "CARD.md").read_text() == "test"
    assert outcome.manifest["documents"][-1]["file"] == "CARD.md"


def test_progress_goes_up_to_the_whole(tmp_path: Path) -> None:
    x = {"x": numbers(2000, 2000)}
    seen: list[Progress] = []
    run(copy_plan(x), source_of(tmp_path / "in", a=x), tmp_path / "out", progress=seen.append)
    done = [p.bytes_done for p in seen]
    assert done == sorted(done) and done[-1] == seen[-1].bytes_total == 16_000_000
    assert seen[-1].stage == "finish" and seen[0].file == "model.safetensors"


@pytest.mark.parametrize("change", ["touched", "replaced", "cut", "written in the same time"])
def test_a_source_that_changes_meanwhile_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = {"x": numbers(500, 500)}
    c = source_of(tmp_path / "in", a=x)
    path = tmp_path / "in" / A
    real = Run._carry

    def carry_and_change(*arguments: Any) -> None:
        if change == "cut":
            os.truncate(path, 1000)
        real(*arguments)
        if change == "touched":
            os.utime(path, (1, 1))
        elif change == "replaced":
            shutil.copy(path, tmp_path / "copy")
            os.replace(tmp_path / "copy", path)
        elif change == "written in the same time":  # as programs do that keep times
            times = path.stat()
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            touch(path, times.st_atime_ns, times.st_mtime_ns)

    monkeypatch.setattr(Run, "_carry", carry_and_change)
    assert refused(copy_plan(x), c, tmp_path / "out").kind == "input-changed"


def test_a_source_with_another_link_or_mode_is_the_same(tmp_path: Path) -> None:
    """A cache that links its files twice, or a backup, writes nothing."""
    c = source_of(tmp_path / "in", a={"x": numbers(5, 5)})
    path = tmp_path / "in" / A
    os.link(path, tmp_path / "link")
    c.check_unchanged()
    path.chmod(0o400)
    c.check_unchanged()


def test_a_source_whose_time_of_access_was_set_is_told_what_may_have_been(tmp_path: Path) -> None:
    """A backup that sets it back cannot be told from a write whose time is set back."""
    c = source_of(tmp_path / "in", a={"x": numbers(5, 5)})
    path = tmp_path / "in" / A
    touch(path, 1, path.stat().st_mtime_ns)
    with pytest.raises(CkptToolError) as caught:
        c.check_unchanged()
    (problem,) = caught.value.problems
    assert problem.kind == "input-changed" and "the last write is as it was" in problem.message
    assert "nor set its times or attributes" in (problem.hint or "")


def test_resuming_reads_only_what_is_missing_and_remakes_what_is_damaged(
    originals: Written, tmp_path: Path
) -> None:
    options = Options(max_shard_bytes=60_000)
    source = originals("mistral-7b-v0.3")
    whole = convert(source, tmp_path / "whole", options=options, check=False)
    shards = [f.name for f in whole.plan.outputs]

    def stop(now: Progress) -> None:
        if now.file == shards[3]:
            raise KeyboardInterrupt

    def interrupt(**more: Any) -> CkptToolError:
        with pytest.raises(CkptToolError) as caught:
            convert(source, tmp_path / "out", options=options, check=False, progress=stop, jobs=1, **more)
        return caught.value

    error = interrupt()
    assert error.kind == "interrupted" and error.exit_code == 130 and "--resume" in str(error)
    (partial,) = [p for p in tmp_path.iterdir() if p.is_dir() and "partial" in p.name]
    first = partial / shards[1]
    data = bytearray(first.read_bytes())
    data[-3] ^= 4
    first.write_bytes(data)
    done = convert(source, tmp_path / "out", options=options, check=False, resume=True)
    assert done.outcome.resumed == (shards[0], shards[2])
    assert done.outcome.bytes_read < whole.outcome.bytes_read
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_interrupt_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    x = {"x": numbers(500, 500)}
    c = source_of(tmp_path / "in", a=x)

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(copy_plan(x), c, tmp_path / "out", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["in"]


MEASURED = """
import re, sys
from ckpt_tool.api import convert
convert(sys.argv[1], sys.argv[2], check=False)
assert "torch" not in sys.modules
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_memory_does_not_grow_with_a_tensor_and_torch_is_not_imported(
    originals: Written, tmp_path: Path
) -> None:
    """Embeddings of 160 MB each: neither may be held whole."""
    source = shutil.copytree(originals("mistral-7b-v0.3"), tmp_path / "in")
    weights = source / "consolidated.safetensors"
    params = json.loads((source / "params.json").read_text())
    tensors = load_bits(weights)
    params["vocab_size"] = rows = 80_000_000 // params["dim"]
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = torch.ones(rows, params["dim"], dtype=torch.bfloat16)
    from safetensors.torch import save_file as save

    save(tensors, weights)
    del tensors
    (source / "params.json").write_text(json.dumps(params))
    for path in source.glob("tokenizer*"):
        path.unlink()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 << 10  # KiB


def load_bits(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load

    found: dict[str, torch.Tensor] = load(path)
    return found


def test_a_signal_to_the_program_cleans_up(originals: Written, tmp_path: Path) -> None:
    script = (
        "from ckpt_tool.convert.execute import Run\n"
        "real = Run._carry\n"
        "def slow(run, *a):\n"
        "    print('working', flush=True)\n    run.stopping.wait(60)\n    real(run, *a)\n"
        "Run._carry = slow\n"
        "from ckpt_tool.cli import main\nmain()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "convert", "auto", "--in", str(originals("mistral-7b-v0.3")), "--out",
         str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "working\n"
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate()
    assert child.returncode == 143 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
