"""Plans of very many tensors: steps that share templates, names that fold in columns, an index written some
of it at a time, and a `.metadata` that is read a batch at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as classes
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckpt_tool.checkpoint import dcp_listing
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.dcp_metadata import Metadata
from ckpt_tool.checkpoint.safetensors import index_document
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.tensor_names import Folded, fold_key, folded_name
from ckpt_tool.convert.expanding import Column, Columns, Expansion, expand
from ckpt_tool.convert.fitting import expected_alike, fit
from ckpt_tool.convert.layout import Part, Step, rule
from ckpt_tool.convert.shares import first_readers
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import CkptToolError, fail_all
from tests.test_scale import read

DIMS = (("v",), ("d",))


def step(k: int, **more: Any) -> Step:
    source, target = Part("a", f"l.{k}.w", "F32", DIMS), Part("b", f"m.{k}.w", "F32", DIMS)
    return Step((("v", 3), ("d", 2)), (source,), (target,), "rename", **more)


def joined(k: int) -> Step:
    halves = tuple(Part("a", f"l.{k}.{n}", "F32", DIMS, (("v", n, n + 1),)) for n in (0, 1, 2))
    return replace(step(k), sources=halves)


MIXED = [step(0), joined(1), step(2), step(3, compare="tied"), joined(4), step(5)]


# --- steps ------------------------------------------------------------------------------------------------


def test_steps_are_those_that_were_put_in() -> None:
    packed = Steps(MIXED)
    assert list(packed) == MIXED == packed[:] and packed == tuple(MIXED)
    assert [packed[k] for k in range(-6, 6)] == MIXED * 2
    assert len(packed) == 6 and len(packed.templates) == 3  # plain, joined and compared
    with pytest.raises(IndexError):
        packed[6]
    assert packed != MIXED[:-1] and packed != [*MIXED[:-1], step(6)]
    more = Steps(MIXED[:2])
    more.extend(Steps(MIXED[2:]))
    assert more == MIXED


def test_what_changes_steps_leaves_the_others_in_their_place() -> None:
    packed = Steps(MIXED)
    twice = packed.changed(
        lambda s: (s, replace(s, compare="replicated")), where=lambda s: len(s.sources) > 1
    )
    expected = [t for s in MIXED for t in ((s, replace(s, compare="replicated")) if s.sources[1:] else (s,))]
    assert twice == expected
    named = packed.changed(lambda s: replace(s, hint=s.sources[0].name), where=lambda s: s.compare)
    assert [s.hint for s in named] == ["", "", "", "l.3.w", "", ""]
    assert packed.alike(lambda s: replace(s, note="x")) == [replace(s, note="x") for s in MIXED]
    assert packed.inverse() == [s.inverse() for s in MIXED]
    assert list(packed.where(lambda s: s.compare)) == [MIXED[3]]
    assert packed.changed(lambda s: s, where=lambda s: s.mean) is packed


def test_a_table_of_many_layers_has_a_template_for_each_row() -> None:
    table = [rule("l.{i}.a.{e}.w", "m.{i}.a.{e}.w", "f d"), rule("l.{i}.n", "m.{i}.n", "d")]
    filled = expand(
        table,
        axes={"f": 2, "d": 3},
        indices={"i": 40, "e": 50},
        original=lambda name: [("a", "F32")] if name != "l.7.n" else [],
        converted=lambda name: ("", "F32", f"x.{name}"),
    )
    assert [(p.kind, p.where) for p in filled.problems] == [("missing-tensor", "l.7.n")]
    assert len(filled.steps) == 40 * 51 - 1 and len(filled.steps.templates) == 2
    last = filled.steps[-2]
    assert (last.sources[0].name, last.targets[0].name) == ("l.39.a.49.w", "x.m.39.a.49.w")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_columns_of_steps_with_many_parts_are_those_of_few(count: int) -> None:
    def wide(k: int) -> Step:
        experts = tuple(Part("a", f"l.{k}.{e}", "F32", DIMS, (("v", e, e + 1),)) for e in range(3))
        return replace(step(k), sources=experts)

    packed = Steps(
        [wide(k) if k % 2 else step(k) for k in range(2 * count)] + [wide(90 + k) for k in range(count)]
    )
    expected: dict[int, list[tuple[str, ...]]] = {0: [], 1: []}
    for s in packed:
        expected[len(s.sources) > 1].append(tuple(p.name for p in (*s.sources, *s.targets)))
    for runs in (packed.runs, packed.by_kind):
        found: dict[int, list[tuple[str, ...]]] = {0: [], 1: []}
        for kind, columns in runs():
            assert all(isinstance(column, list) for column in columns)
            found[kind] += zip(*columns, strict=True)
        assert found == expected


def test_steps_that_no_change_reaches_are_the_same() -> None:
    packed = Steps(MIXED)
    assert packed.alike(lambda s: s) is packed


@pytest.mark.parametrize("lacking", ["", "m.1.e.5"])
def test_many_names_of_a_row_are_looked_for_together_or_one_by_one(lacking: str) -> None:
    held = {f"m.{i}.e.{e}": (f"f{e // 7}", "F32", f"own.{i}.{e}") for i in (0, 1) for e in range(10)}
    held.pop(lacking, None)
    asked: list[int] = []

    def together(names: Sequence[str]) -> Column | None:
        asked.append(len(names))
        found = [held[n] for n in names if n in held]
        return ([h[:2] for h in found], [h[2] for h in found]) if len(found) == len(names) else None

    def filled(converteds: Columns | None) -> Expansion:
        return expand(
            [rule("l.{i}", "m.{i}.e.{e}", "(e f) d -> e f d", cut="e")],
            axes={"e": 10, "f": 2, "d": 3},
            indices={"i": 2, "e": 10},
            original=lambda name: [("a", "F32")],
            converted=held.get,
            converteds=converteds,
        )

    many, one_by_one = filled(together), filled(None)
    assert asked == [10, 10]
    assert list(many.steps) == list(one_by_one.steps) and len(many.steps) == (1 if lacking else 2)
    assert many.problems == one_by_one.problems
    assert [p.where for p in many.problems] == [lacking] * bool(lacking)


def test_shapes_of_neighbouring_parts_are_compared_together() -> None:
    held = {n: TensorInfo(n, "F32", (2, k), "f") for k, names in ((3, "abc"), (4, "de")) for n in names}
    other = {"a": TensorInfo("a", "F32", (9,), "g")}
    parts = [((2, 3), held), ((2, 3), held), ((2, 4), held), ((9,), other)]
    expected = expected_alike(parts)
    assert [(first, stop) for _, first, stop in expected] == [(0, 2), (2, 3), (3, 4)]
    assert fit(expected, [["a", "b"], ["c", "none"], ["d", "e"], ["a", "a"]])
    for k, wrong in enumerate("ddaz"):
        columns = [["a"], ["c"], ["d"], ["a"]]
        columns[k].append(wrong)
        assert fit(expected, columns) == (wrong == "z")  # which is not there


PLACES = {
    "one file": lambda n: ("a", "F32"),
    "two files": lambda n: (n[-3] + ".st", "F32" if "7" in n else "F16"),
}


@pytest.mark.parametrize("where", PLACES)
def test_layers_at_once_are_those_that_come_one_by_one(where: str) -> None:
    table = [rule("l.{i}.w", "m.{i}.w", "f d -> d f"), rule("l.{i}.n", "m.{i}.n", "d"), rule("e", "f", "d")]
    place = PLACES[where]
    asked = {
        "axes": {"f": 2, "d": 3},
        "indices": {"i": 40},
        "original": lambda name: [place(name.rjust(3))],
        "converted": lambda name: ("b", "F32", f"x.{name}"),
    }
    columns = {
        "originals": lambda names: ([place(n) for n in names], names),
        "converteds": lambda names: ([("b", "F32")] * len(names), [f"x.{n}" for n in names]),
    }
    one_by_one, at_once = expand(table, **asked), expand(table, **asked, **columns)
    assert list(at_once.steps) == list(one_by_one.steps) and len(at_once.steps) == 81
    assert at_once.steps.templates == one_by_one.steps.templates and at_once.problems == []
    lacking = columns | {"converteds": lambda _: None}
    assert list(expand(table, **asked, **lacking).steps) == list(one_by_one.steps)


def test_the_names_of_steps_by_template_and_by_file() -> None:
    layers = Steps([s for k in range(9) for s in (step(2 * k), replace(step(2 * k + 1), note="other"))])
    for steps in (layers, Steps(MIXED)):
        found = {kind: list(zip(*columns, strict=True)) for kind, columns in steps.by_kind()}
        wanted: dict[int, list[tuple[str, ...]]] = {}
        for kind, names in steps.packed():
            wanted.setdefault(kind, []).append(tuple(names))
        assert found == wanted
        assert steps.read() == {"a": {p.name for s in steps for p in s.sources}}
    assert layers.named([0, 1])[:3] == ["l.0.w", "m.1.w", "l.2.w"]


def test_of_tensors_that_are_read_twice_the_first_reading_counts() -> None:
    assert all((k, 0) in first_readers(Steps([step(0), step(1)])) for k in (0, 1))
    again = first_readers([step(0), joined(1), step(0), replace(step(2), compare="tied")])
    assert [(k, i) for k in range(4) for i in range(3) if (k, i) in again] == [
        *[(0, 0), (1, 0), (1, 1), (1, 2), (3, 0)]
    ]


# --- names and documents ------------------------------------------------------------------------------------


def test_names_fold_together_whatever_order_they_come_in() -> None:
    names = [f"layers.{i}.experts.{e}.w{1 + e % 2}" for i in range(30) for e in range(12)]
    first = Folded(names[0])
    assert not first.take(names) and first.columns == [set(), set()]  # nothing done
    odd = [n for n in names if n.endswith("1")]
    assert first.take(odd) and str(first) == folded_name(odd) == "layers.{0..29}.experts.{0,2,4,6,8,10}.w1"
    fitting = [n for n in names if first.read([n]) is not None]
    assert fitting == [n for n in names if fold_key(n) == first.key] == odd
    plain = Folded("norm.weight")
    assert plain.take(["norm.weight"]) and str(plain) == "norm.weight" and not plain.take(["norm.bias"])


@pytest.mark.parametrize("count", [0, 1, 4096, 4097])
def test_an_index_is_what_json_makes_of_it(count: int) -> None:
    names = {f'layers.{k}."é\\.weight': f"model-{k % 7}.safetensors" for k in range(count)}
    index = {"metadata": {"total_size": 7}, "weight_map": dict(sorted(names.items()))}
    assert index_document(names, 7).decode() == json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def test_the_memory_that_values_take_has_a_limit_of_its_own() -> None:
    text = b'{"a": [' + b",".join([b"{}"] * 100) + b"]}"
    assert len(parse_object(text, file="x", most=1 << 20)["a"]) == 100
    with pytest.raises(CkptToolError, match="values that take at most 0 MiB of memory"):
        parse_object(text, file="x", most=1 << 10)


# --- .metadata ----------------------------------------------------------------------------------------------


def written(folder: Path, count: int, *, change: Any = None) -> Path:
    """One piece for each of `count` tensors, as one process of torch writes them: names and files are shared,
    some of these are texts of their own, and names are full of bytes that look like recalls of the memo."""
    state: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    shared = [f"__{k}_0.distcp" for k in range(3)]
    for k in range(count):
        name, shape = f"j\x20{chr(33 + k % 90)}j.{k}.w", torch.Size((3, 2) if k % 5 else (4,))
        box = classes.ChunkStorageMetadata(torch.Size((0,) * len(shape)), torch.Size(tuple(shape)))
        properties = classes.TensorProperties(dtype=torch.bfloat16)
        state[name] = classes.TensorStorageMetadata(properties, shape, [box])
        index = classes.MetadataIndex(name, torch.Size((0,) * len(shape)), 0)
        path = f"{shared[k % 3]} "[:-1] if k % 7 else shared[k % 3]
        places[index] = _StorageInfo(path, 700 * k, 700)
    made = classes.Metadata(state, {n: (n,) for n in state}, places)
    if change is not None:
        change(made)
    (folder / ".metadata").write_bytes(pickle.dumps(made, protocol=4))
    return folder / ".metadata"


def told(found: Metadata) -> list[object]:
    return [
        (t.name, t.dtype, t.shape, [(p.start, p.size, found.table.item(p.place)) for p in t.pieces])
        for t in map(found.told, found.tensors)
    ]


def test_batches_say_what_their_opcodes_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, 3000)
    counts = {"run_of": 0, "passed": 0, "named": 0}

    def counted(name: str) -> None:
        own = getattr(dcp_listing.Listing, name)

        def call(self: Any, *args: Any) -> Any:
            before = self.pos
            result = own(self, *args)
            counts[name] += self.pos - before if name != "passed" else max(0, self.pos - before)
            return result

        monkeypatch.setattr(dcp_listing.Listing, name, call)

    for name in counts:
        counted(name)
    fast = told(read(file))
    assert all(count > 10_000 for count in counts.values()), counts  # bytes that each of them took
    for name in counts:
        monkeypatch.setattr(dcp_listing.Listing, name, lambda *_: 0)
    assert told(read(file)) == fast
    assert [t[2] for t in fast[:6]] == [(4,), (3, 2), (3, 2), (3, 2), (3, 2), (4,)]  # type: ignore[index]


def late(field: str, value: object) -> Any:
    """A place far behind in the list, with another value."""
    return lambda made: setattr(list(made.storage_data.values())[2500], field, value)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (late("relative_path", "../x"), "bad-input"),
        (late("relative_path", ".."), "bad-input"),
        (late("offset", -1), "size-mismatch"),
        (late("offset", (1 << 63) - 100), "size-mismatch"),
        (late("length", "7"), "bad-pickle"),
        (late("offset", 705), "shard-conflict"),
        (late("transform_descriptors", ("zstd",)), "unsupported"),
    ],
)
def test_what_one_place_of_a_batch_says_wrong_is_told(change: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CkptToolError) as raised:
        fail_all(read(written(tmp_path, 2600, change=change)).shared)
    (problem, *_) = raised.value.problems
    assert problem.kind == kind and (problem.where or "").endswith(".w"), str(raised.value)


def test_what_the_planner_names_may_still_not_be_called(tmp_path: Path) -> None:
    class Called:
        def __reduce__(self) -> Any:
            return (print, ("called",))

    file = written(tmp_path, 2600, change=lambda made: made.planner_data.update({"z": Called()}))
    with pytest.raises(CkptToolError, match="unsafe-pickle"):
        read(file)
