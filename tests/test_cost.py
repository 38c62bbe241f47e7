"""What parity leaves out by its mode, what it holds in memory, and how long it says it takes."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ckpt_tool.api import convert, open_checkpoint
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.cli import cli
from ckpt_tool.command_parts import mode_of
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.prompts import prompts
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference import blocks, hf_blocks
from ckpt_tool.verify import (
    Report,
    diagnose,
    effort,
    holding,
    in_order,
    measure,
    mistakes,
    needs,
    pace,
    parity,
    streamed,
    verify,
    weights,
)
from ckpt_tool.verify.buffers import Buffers, memory_at_hand
from ckpt_tool.verify.effort import Effort, effort_for, first_of_each_kind, layers_text
from ckpt_tool.verify.holding import Room
from ckpt_tool.verify.measure import CAPS, Distance, distance, logit_distance
from ckpt_tool.verify.needs import read_size
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.orders import Belief, Fused, Reorder
from ckpt_tool.verify.parity import _both
from ckpt_tool.verify.positions import positions
from ckpt_tool.verify.prompts import BEYOND, Prompt
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.sides import Side, converted_side, original_side
from ckpt_tool.verify.streamed import Rows, Streamed, turned_by_blocks
from ckpt_tool.verify.subject import opened
from tests.conftest import Written

pytestmark = pytest.mark.usefixtures("one_thread")

Made = tuple[Path, Path]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def written(originals: Written, conversions: Written) -> Callable[[str], Made]:
    """The original of a variant and its conversion."""
    return lambda variant: (originals(variant), conversions(variant))


def one(report: Report, check: str) -> Finding:
    return next(f for f in report.findings if f.level == "parity" and f.check == check)


# --- modes ------------------------------------------------------------------------------------------------


def test_quick_claims_the_layers_that_ran(written: Callable[[str], Made]) -> None:
    source, out = written("mistral-7b-v0.3")
    report = verify(out, source, mode="quick")
    assert report.headline == "the bits and the numbers of 2 of 4 layers are those of its source"
    assert report.facts["mode"] == "quick; levels: coverage, bits, parity"
    assert not report.level("documented") and report.exit_code == 0
    lockstep, left = one(report, "lockstep"), one(report, "left out")
    assert lockstep.message.startswith("embedding, layers 0 and 3 of 4 and head agree on 5 prompts")
    assert lockstep.data["layers"] == [0, 3] and lockstep.data["sampled"] == "2 of 4 layers"
    assert [row[0] for row in lockstep.tables[0].rows] == ["embed", "layer 0", "layer 3", "head"]
    assert not any(f.check == "logits" for f in report.level("parity"))
    assert left.data["mode"] == "quick" and "logits of a whole pass were not compared" in left.message
    assert one(report, "negative control").status == "pass"
    assert "2 of 4 layers did not run" in json.dumps(report.to_json()) and "left out" in report.html()


def test_quick_sees_what_is_in_its_layers_and_leaves_the_others_to_the_bits(
    written: Callable[[str], Made], tmp_path: Path
) -> None:
    source, out = written("mistral-7b-v0.3")
    config = json.loads((out / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(out / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": config["rope_theta"] * 10}))
    report = verify(tmp_path, source, mode="quick", levels=("parity",))
    assert report.status == "fail" and one(report, "lockstep").data["first"] == "layer 0"


def test_a_costly_prompt_is_not_run_free_and_only_small_models_run_all(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = written("mistral-7b-v0.3")
    whole = verify(out, source, levels=("parity",))
    assert len(one(whole, "logits").tables[0].rows) == 5
    assert not any(f.check == "left out" for f in whole.findings)
    monkeypatch.setattr(effort, "AFFORDABLE", 1.0)
    report = verify(out, source, levels=("parity",))
    assert report.status == "pass"
    named = "short (8 tokens), edges (6 tokens), long (600 tokens)"
    text = f"default: prompts {named} in lockstep only, not run free (--thorough runs all)"
    assert one(report, "left out").message == text
    assert [row[0] for row in one(report, "logits").tables[0].rows] == ["other", "repeated"]
    thorough = verify(out, source, levels=("parity",), mode="thorough")
    assert one(thorough, "logits").message == one(whole, "logits").message


def test_a_floor_that_short_prompts_do_not_show_is_measured_before_anything_differs(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar of a phase is then that of all its prompts, as it is where nothing is left out."""
    source, out = written("llama-2-7b")
    monkeypatch.setattr(effort, "AFFORDABLE", 1.0)
    monkeypatch.setitem(CAPS, "float32", 1e-30)
    monkeypatch.setattr(parity, "DIAGNOSED", 0)
    report = verify(out, source, levels=("parity",))
    floors = {row[0]: row[3] for row in one(report, "lockstep").tables[0].rows}
    monkeypatch.setattr(effort, "AFFORDABLE", 1e30)
    every = verify(out, source, levels=("parity",))
    assert floors == {row[0]: row[3] for row in one(every, "lockstep").tables[0].rows}
    assert report.status == every.status == "undecided" and all(noise < 1e-11 for noise in floors.values())


def sides(source: Path, out: Path) -> Iterator[tuple[Side, Side]]:
    with opened(out, source, {}) as subject:
        yield original_side(subject, torch.float32, "cpu"), converted_side(subject, torch.float32, "cpu")


def test_layers_are_of_one_kind_by_shapes_and_windows(written: Callable[[str], Made]) -> None:
    for original, converted in sides(*written("gemma-2-2b")):
        count = original.config.n_layers
        assert first_of_each_kind(original, converted) == [0, 1]
        wide = replace(converted.config, windows=(*converted.config.windows[:-1], 3))
        assert first_of_each_kind(original, replace(converted, config=wide)) == [0, 1, count - 1]


def test_a_window_goes_through_a_layer_of_each_kind(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "AFFORDABLE", 1.0)
    prompts = {n: Prompt([[1] * tokens], {}) for n, tokens in (("short", 8), ("long", 600), ("window", 4160))}
    for original, converted in sides(*written("gemma-2-2b")):
        made = effort_for("default", original, converted, prompts, frozenset())
        assert made.reach == {"window": frozenset({0, 1})} and made.free == made.floor == {"short"}
        several = {**prompts, "other": Prompt([[*range(19)]], {}), "same": Prompt([[1] * 20], {})}
        more = effort_for("default", original, converted, several, frozenset())
        assert more.free == {"other", "same"} and more.floor == {"other"}
        assert made.has("embed", "window") and made.has(1, "window")
        assert not made.has(2, "window") and not made.has("head", "window") and made.has("head", "long")
        assert "window (4,160 tokens) through layers 0 to 1 only, the first of each kind" in made.left_out[1]
        given = effort_for("default", original, converted, prompts, frozenset({"window", "long"}))
        assert given == Effort("default")
        assert effort_for("thorough", original, converted, prompts, frozenset()).left_out == ()


def test_quick_says_what_it_leaves_out_of_two_layers(written: Callable[[str], Made]) -> None:
    """All of them run, and a long prompt goes through the first one alone."""
    prompts = {n: Prompt([[1] * tokens], {}) for n, tokens in (("short", 8), ("long", 600))}
    for original, converted in sides(*written("mistral-7b-v0.3")):
        two = replace(original, config=replace(original.config, n_layers=2))
        made = effort_for("quick", two, converted, prompts, frozenset())
        assert made.layers == (0, 1) and not made.has(1, "long") and not made.has("head", "long")
        assert made.left_out[1] == "prompt long (600 tokens) through layer 0 only"


def test_quick_runs_one_short_prompt_where_a_long_one_is_costly(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one stays where it shows a window, and so do those of the user and those with more inputs."""
    rows = {"short": range(8), "edges": range(6), "other": range(19), "repeated": [1] * 49, "long": [1] * 600}
    prompts = {n: Prompt([[*row]], {}) for n, row in rows.items()}
    for original, converted in sides(*written("gemma-2-2b")):
        windowless = replace(original, config=replace(original.config, windows=(None,) * 4))
        windows = replace(original, config=replace(original.config, windows=(128, None) * 2))
        cheap = effort_for("quick", windowless, converted, prompts, frozenset())
        assert all(cheap.has("embed", n) for n in rows) and cheap.plants(0, 4)
        monkeypatch.setattr(effort, "AFFORDABLE", 1.0)
        made = effort_for("quick", windowless, converted, prompts, frozenset({"short"}))
        assert [n for n in rows if made.has("embed", n)] == ["short", "other"]  # one is the user's
        alone = effort_for("quick", windowless, converted, prompts, frozenset())
        assert [n for n in rows if alone.has("embed", n)] == ["short"] and alone.floor == {"short"}
        assert any("repeated (49 tokens), long (600 tokens) not run" in text for text in alone.left_out)
        shown = effort_for("quick", windows, converted, prompts, frozenset())
        assert [n for n in rows if shown.has(0, n)] == ["short", "long"]
        more = {**prompts, "padded": Prompt([[1] * 40] * 2, {"mask": [[1] * 40] * 2})}
        assert effort_for("quick", windowless, converted, more, frozenset()).has("embed", "padded")


def test_mistakes_of_quick_are_planted_in_the_last_layer_where_it_may_be_of_another_kind(
    written: Callable[[str], Made],
) -> None:
    for name, last in (("mistral-7b-v0.3", False), ("gemma-2-2b", True)):
        for original, converted in sides(*written(name)):
            count = original.config.n_layers
            made = effort_for("quick", original, converted, {}, frozenset())
            assert made.plants(0, count) and made.plants("head", count) and not made.plants(1, count)
            assert made.plants(count - 1, count) is last
            assert Effort().plants(count - 1, count)
            assert any("no mistakes were planted" in text for text in made.left_out) is not last


def test_quick_plants_one_of_mistakes_that_are_alike(written: Callable[[str], Made]) -> None:
    source, out = written("mistral-7b-v0.3")
    names = {
        mode: {
            row[1]
            for row in one(verify(out, source, levels=("parity",), mode=mode), "negative control")
            .tables[0]
            .rows
        }
        for mode in ("quick", "default")
    }
    assert names["quick"] < names["default"]
    alike = (
        r"transposed",
        r"q_proj (rows not )?permuted",
        r"k_proj (rows not )?permuted",
        r"exchanged",
        r"lm_head",
    )
    for words in alike:
        found = {m: sum(re.search(words, n) is not None for n in its) for m, its in names.items()}
        assert found["quick"] == 1 <= found["default"], (words, found)
    assert all(any(words in n for n in names["quick"]) for words in ("1 % off", "rope_theta", "eps"))


def test_words_for_layers() -> None:
    assert [layers_text(x) for x in ([4], [0, 31], [0, 1, 2, 31], [0, 2, 4])] == [
        "layer 4", "layers 0 and 31", "layers 0 to 2 and 31", "layers 0, 2 and 4",
    ]  # fmt: skip


def test_one_mode_at_a_time() -> None:
    assert mode_of({"quick": True, "thorough": False}) == "quick" and mode_of({}) == "default"
    with pytest.raises(CkptToolError, match="expected --quick or --thorough, found both"):
        mode_of({"quick": True, "thorough": True})
    named = {o.name for o in cli.commands["verify"].params}
    assert {"quick", "thorough", "memory"} <= named


# --- memory -----------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_what_is_needed(written: Callable[[str], Made]) -> None:
    source, out = written("mistral-7b-v0.3")
    with pytest.raises(CkptToolError, match=r"expected at least 3\d\d MB .*found 100 MB"):
        verify(out, source, levels=("parity",), memory=100_000_000)
    for original, converted in sides(source, out):
        prompts = {"short": Prompt([[1] * 8], {})}
        asked = original, converted, prompts, Effort("default")
        with pytest.raises(CkptToolError) as refused:
            pace.limit(*asked, 1)
        least = refused.value.text().split("at least ")[1].split(" for")[0]
        for told in (least, pace.limit(*asked, None).removeprefix("about ").removesuffix(" of memory")):
            assert pace.limit(*asked, read_size(told)) == f"about {told} of memory"
    assert verify(out, source, levels=("parity",), memory=1 << 30).status == "pass"


@pytest.mark.parametrize("variant", ["llama-3-70b", "gpt2-v2-tp2"])
def test_matrices_by_rows_are_proved_as_they_are_whole(
    variant: str, written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for a few rows: of several ranks, and of matrices that lie as (in, out) and are tied."""
    source, out = written(variant)
    monkeypatch.setattr(holding, "SMALL", 1)
    monkeypatch.setattr(streamed, "BLOCK", 4096)
    monkeypatch.setattr(weights.Weights, "within", lambda self, nbytes, shared, spared=0: _tight(self))
    made: list[str] = []
    load = weights.Weights._streamed
    monkeypatch.setattr(
        weights.Weights, "_streamed", lambda self, info: (made.append(info.name), load(self, info))[1]
    )
    report = verify(out, source, levels=("parity",), settings=VARIANTS[variant].settings)
    assert report.status == "pass" and one(report, "negative control").measured == 1.0
    assert {"lm_head.weight", "transformer.wte.weight"} & {*made} and len(set(made)) > 10


def _tight(held: weights.Weights) -> None:
    held.limit, held.room = 8000, Room(6000)


def a_matrix(
    rows: int, room: int, dtype: torch.dtype = torch.bfloat16, width: int = 7
) -> tuple[Streamed, Tensor]:
    stored = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    made = Rows((rows, width), lambda a, b: stored[a:b], torch.float32, torch.device("cpu"), Room(room))
    return Streamed(made), stored.float()


@pytest.mark.parametrize("room", [0, 100, 10**6])
def test_a_streamed_matrix_computes_as_an_ordinary_one(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK", 5 * 7 * 4)
    s, w = a_matrix(23, room)
    x, z = torch.randn(2, 3, 7), torch.randn(2, 3, 23)
    ids = torch.tensor([[0, 22, 3, 4, 5, 3]])
    pairs: list[tuple[Any, Tensor]] = [
        (F.linear(x, s, torch.ones(23)), F.linear(x, w, torch.ones(23))), (x @ s.T, x @ w.T), (z @ s, z @ w),
        (F.linear(z, s.T), z @ w), (s[ids], w[ids]), (s[ids - 1], w[ids - 1]), (F.embedding(ids, s), w[ids]),
        (s[3:9], w[3:9]), (s.mT.reshape(s.shape), w.mT.reshape(w.shape)), (torch.roll(s, 1, 0), w.roll(1, 0)),
        (s.roll(-9, 0)[2:22], w.roll(-9, 0)[2:22]), (x @ torch.roll(s, 20, 0).T, x @ w.roll(20, 0).T),
        (s * 2, w * 2), (torch.cat([s, s]), torch.cat([w, w])),
    ]  # fmt: skip
    turned, its = turned_by_blocks(s), torch.cat([b.T.reshape(b.shape) for b in w.split(5)])
    pairs += [(x @ turned.T, x @ its.T), (turned[ids], its[ids]), (turned[3:12], its[3:12]), (turned, its)]
    with ReversedSums():
        pairs += [(F.linear(x, s), x @ w.T), (x @ s.T, x @ w.T), (z @ s, z @ w)]
    for k, (found, wanted) in enumerate(pairs):
        assert found.shape == wanted.shape and torch.allclose(found * 1.0, wanted, atol=1e-5), k
    even, plain = a_matrix(24, room)
    for part, its in zip(even.chunk(4), plain.chunk(4), strict=True):
        assert torch.allclose(x @ part.T, x @ its.T, atol=1e-5)
    assert torch.equal(s, w) and torch.equal(w, s) and not torch.equal(s, torch.roll(s, 1, 0))
    assert (len(s), s.shape, s.ndim, s.dtype, s.numel()) == (23, w.shape, 2, torch.float32, w.numel())
    with pytest.raises(IndexError):
        s[torch.tensor([23])]
    assert s.rows.room.held <= room


def test_mistakes_in_a_matrix_by_rows_are_those_in_an_ordinary_one_without_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that a converter leaves in another order, or misreads of three matrices in one, are read from
    where they are; a square one is transposed into one copy as it is stored."""
    monkeypatch.setattr(streamed, "BLOCK", 5 * 12 * 4)
    s, w = a_matrix(12, 100, width=12)
    parts = [a_matrix(n, 0, width=12) for n in (9, 5, 4)]
    sizes, stored, wanted = (
        {"n": 2, "two": 2, "half": 3, "d": 12},
        ("n", "two", "half", "d"),
        ("n", "half", "two", "d"),
    )
    made = Reorder("q", wanted, stored, sizes, ("n", "half", "two"))
    heads = Belief("", wanted, {**sizes, "n": 1, "half": 6})
    names = tuple("abc")
    thirds = mistakes.with_rows(Fused(names, 0, ("n", "t", "h"), {}, 1), torch.randperm(18).numpy())
    makers = [mistakes.planted(made, heads), mistakes.undone(made, heads), mistakes.transpose("layers.0.q")]
    by_rows = {"q": s, "layers.0.q": s, **{n: x for n, (x, _) in zip(names, parts, strict=True)}}
    ordinary = {"q": w, "layers.0.q": w, **{n: x for n, (_, x) in zip(names, parts, strict=True)}}
    read = Rows.whole
    with monkeypatch.context() as blind:
        blind.setattr(Rows, "whole", lambda self: pytest.fail(f"a copy of all of {self.shape}"))
        found = [make(by_rows) for make in (*makers, thirds)]
        x = torch.randn(3, 12)
        products = [{n: x @ y.T for n, y in one.items()} for one in found]
    for one, its, make in zip(found, products, (*makers, thirds), strict=True):
        for name, y in make(ordinary).items():
            assert isinstance(one[name], Streamed) and torch.equal(read(one[name].rows).float(), y)
            assert not torch.equal(y, ordinary[name]) and torch.allclose(its[name], x @ y.T, atol=1e-5)


def test_blocks_that_find_no_room_take_the_place_of_the_one_before(written: Callable[[str], Made]) -> None:
    """Unless a gradient may ask for them again."""
    for _, converted in sides(*written("llama-3-70b")):
        held = converted.weights[0]
        held.within(0, Room(20_000))
        with held.keep(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(holding, "SMALL", 1)
            patch.setattr(streamed, "BLOCK", 4096)
            x, right = held["lm_head.weight"], held.checkpoint.read(held.tensors["lm_head.weight"])
            assert isinstance(x, Streamed)
            wanted = torch.from_numpy(right.astype("<i4") << 16).view(torch.float32)
            for reused in (True, False):
                with torch.set_grad_enabled(not reused):
                    places = set()
                    for first, rows in x.rows.blocks():
                        places.add(rows.data_ptr())
                        assert torch.equal(rows, wanted[first : first + len(rows)])
                assert (len(places) == 1) == reused
            assert 0 < held.room.held <= 20_000 < right.nbytes


def test_both_sides_hold_what_the_memory_leaves_for_them_together(
    written: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what differs is looked into, which holds both sides at once, but nothing while their bits
    are; all is given back."""
    source, out = written("mistral-7b-v0.3")
    monkeypatch.setattr(holding, "SMALL", 1)
    monkeypatch.setattr(streamed, "BLOCK", 8192)
    rooms: list[Room] = []
    monkeypatch.setattr(pace, "Room", lambda size: rooms.append(Room(60_000)) or rooms[-1])
    explained = diagnose.explain
    looked: list[int] = []
    monkeypatch.setattr(diagnose, "explain", lambda *a: (looked.append(rooms[-1].held), explained(*a))[1])
    wrong = shutil.copytree(out, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    rolled = shutil.copytree(out, tmp_path / "rolled")
    held, name = load_file(rolled / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    save_file({**held, name: held[name].roll(1, 0)}, rolled / "model.safetensors", {"format": "pt"})
    told = {}
    for folder, status in ((out, "pass"), (wrong, "fail"), (rolled, "fail")):
        report = verify(folder, source, levels=("parity",), mode="quick")
        room = rooms.pop()
        assert report.status == status and 50_000 < room.most <= 60_000 and room.held == 0
        told[folder] = report.level("diagnosis")
    assert looked and not any(looked) and not told[out]
    assert told[wrong][0].data["cause"].startswith("rms_norm_eps")
    taken_back = told[rolled][0].tables[0].rows[0]
    assert told[rolled][0].data["tensor"] == [name] and taken_back[2] < 1e-9 < taken_back[1]


def test_what_is_let_go_of_is_given_back_to_every_room_that_it_was_taken_within() -> None:
    """Another precision takes its own within that of a side, and a side within what both share."""
    shared = Room(100)
    side = Room(80, within=shared)
    precision = Room(60, within=side)
    assert side.take(50) and not precision.take(31) and precision.take(30) and not shared.take(21)
    assert (shared.held, side.held, precision.held, precision.left) == (80, 80, 30, 0)
    precision.clear()
    assert (shared.held, side.held, precision.held, precision.left) == (50, 50, 0, 30)
    side.clear()
    assert (shared.held, side.held, shared.most) == (0, 0, 80)


def test_logits_some_positions_at_a_time_are_as_far_apart_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, ids = torch.randn(1, 23, 50), torch.arange(23)[None]
    found = wanted + torch.randn(1, 23, 50) / 10
    whole = logit_distance(found, wanted, ids, 0.01), positions(found, wanted, tokens=True)
    monkeypatch.setattr(measure, "HELD", 3 * 50)
    assert measure.at_once(50) == 3 and measure.at_once(1000) == 1
    parts = logit_distance(found, wanted, ids, 0.01), positions(found, wanted, tokens=True)
    assert parts[1] == whole[1] and whole[1].differing > 0
    assert parts[0].kls == whole[0].kls and parts[0].loss == pytest.approx(whole[0].loss, rel=1e-12)
    assert (parts[0].top1, parts[0].ties) == (whole[0].top1, whole[0].ties)


MEASURED = {  # MB of a run of one layer by default, benchmarks/README.md
    "mistral-7b-v0.1": 2011,
    "llama-3-70b": 3578,
    "mixtral-8x22b": 3936,
    "mixtral-8x7b": 3318,
    "llama-3-8b": 2920,
    "opt-30b": 2317,
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_told_of_published_sizes_is_what_was_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From shapes alone, within a third; and never more than 4 GiB."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = import_module("geometries").GEOMETRIES[name]
    one_rank = [TensorInfo(n, d, s, "f") for n, d, s in made.tensors(made.model)]
    whole = [TensorInfo(n, d, s, "f") for n, d, s in made.tensors(replace(made.model, ranks=1))]
    rows = {n: len(r) for n, r in prompts(made.model.vocab).items()}
    if "sliding_window" in made.more:
        rows["window"] = made.more["sliding_window"] + BEYOND
    ends, free = {*rows} - {"window"}, {"other", "repeated"}
    passes = needs.Passes(rows, ends, free, made.model.dim, made.model.vocab)
    need = needs.of_parity(passes, [one_rank] * made.model.ranks, [whole], 4, None)
    assert need.about <= needs.USUAL and MEASURED[name] * 2 / 3 < need.about / 1e6 < MEASURED[name] * 4 / 3
    least = needs.of_parity(passes, [one_rank] * made.model.ranks, [whole], 4, need.least)
    assert least.about == least.least == need.least < 2 << 30


def test_attention_and_units_in_turns_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, n, 50, 8, dtype=torch.float64) for n in (6, 2, 2))
    w = {n: torch.randn(s, dtype=torch.float64) for n, s in (("g", (40, 8)), ("u", (40, 8)), ("d", (8, 40)))}
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    whole = [hf_blocks.grouped_attention(q, k, v, window) for window in (None, 1, 7, 50)]
    units = hf_blocks.gated(x, w, "g", "u", "d")
    monkeypatch.setattr(hf_blocks, "HELD", 2 * 6 * 50 * 9)
    parts = [hf_blocks.grouped_attention(q, k, v, window) for window in (None, 1, 7, 50)]
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(whole, parts, strict=True))
    assert torch.allclose(hf_blocks.gated(x, w, "g", "u", "d"), units, atol=1e-12)
    monkeypatch.setattr(hf_blocks, "HELD", 1)  # fewer than a row has
    assert torch.allclose(hf_blocks.gated(x, w, "g", "u", "d"), units, atol=1e-12)
    monkeypatch.setattr(blocks, "AT_ONCE", 100)
    taken: list[slice] = []

    def part(own: slice) -> Tensor:
        taken.append(own)
        return x[:, own]

    assert torch.equal(blocks.in_turn(part, 50, 9), x) and len(taken) == 5
    seen = blocks.visible(x, window=7)
    rows = [blocks.visible(x, window=7, queries=own) for own in taken]
    assert torch.equal(torch.cat(rows, dim=2), seen)


def test_memory_of_weights_is_lent_again_once_nobody_holds_it() -> None:
    lent = Buffers()
    first = lent.lend(4096).view(torch.float32)
    first.fill_(1)
    row, place = first.view(32, 32)[3:4], first.data_ptr()
    del first  # a view of it is left
    other = lent.lend(4096).view(torch.float32).fill_(2)
    assert other.data_ptr() != place and torch.equal(row, torch.ones(1, 32))
    assert place % 64 == other.data_ptr() % 64 == 0
    del row
    again = lent.lend(4096)
    assert again.data_ptr() == place
    del again
    assert len(lent.lend(8192)) == 8192 and len(lent._made) == 2  # what is idle and does not fit is gone


def test_memory_is_kept_for_what_comes_next_where_it_is_little(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = written("mistral-7b-v0.3")
    prompts = {"short": Prompt([[1] * 8], {})}
    for original, converted in sides(source, out):
        asked = original, converted, prompts, Effort("default")
        pace.limit(*asked, None)
        assert pace.is_light(*asked)
        with monkeypatch.context() as patch:
            patch.setattr(pace, "LIGHT", 1000)
            assert not pace.is_light(*asked)
        monkeypatch.setattr(holding, "SMALL", 1)
        _tight(converted.weights[0])
        assert not pace.is_light(*asked)  # matrices that are held by rows leave holes
    streamed.give_back()
    with memory_at_hand():
        pass
    assert streamed.give_back.cache_info().currsize == 0  # and is set anew by who needs it


def test_attention_leaves_out_keys_that_no_query_of_a_block_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the original's reading and the library's, with windows and with tokens before: as all at once."""
    assert blocks.reached(slice(10, 20), 50) == slice(0, 20)
    assert blocks.reached(slice(10, 20), 50, 5, window=3) == slice(13, 25)
    assert blocks.reached(slice(40, 60), 50, window=100) == blocks.reached(blocks.ALL, 50) == slice(0, 50)
    q, k, v = (torch.randn(1, n, 50, 8, dtype=torch.float64) for n in (6, 2, 2))
    more = (torch.cat([x, torch.randn(1, 2, 9, 8, dtype=torch.float64)], dim=2) for x in (k, v))
    for keys, values in ((k, v), tuple(more)):
        whole = [hf_blocks.grouped_attention(q, keys, values, window) for window in (None, 1, 7, 50)]
        with monkeypatch.context() as patch:
            patch.setattr(hf_blocks, "ROWS", 16)
            parts = [hf_blocks.grouped_attention(q, keys, values, window) for window in (None, 1, 7, 50)]
        assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(whole, parts, strict=True))


def test_ranks_that_have_none_of_the_words_add_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, counts = list(torch.randn(24, 3).split(4)), []
    monkeypatch.setattr(blocks, "all_reduce", lambda parts: (counts.append(len(parts)), sum(parts))[1])
    for ids, parts in (([[0, 3]], 1), ([[8], [11]], 2), ([[3, 4, 23]], 3), ([[24]], 1)):
        wanted = torch.cat([*tables, torch.zeros(1, 3)])[torch.tensor(ids)]
        assert torch.equal(blocks.words(torch.tensor(ids), tables), wanted) and counts.pop() == parts


# --- numbers ----------------------------------------------------------------------------------------------


def test_distances_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(1, 40, 30, generator=torch.Generator().manual_seed(0)) + 5
    b = a + 1e-7 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    whole = distance(b, a)
    mse = float((b - a).double().square().mean())
    assert whole.nmse == pytest.approx(mse / float(a.double().var(correction=0)), rel=1e-5)
    monkeypatch.setattr("ckpt_tool.verify.measure.BLOCK", 64)
    parts = distance(b, a)
    assert parts == Distance(
        whole.max_delta, pytest.approx(whole.nmse, rel=1e-5), whole.worst, whole.magnitude
    )
    tiny = torch.full_like(a, 1e-25)
    assert distance(tiny * 2, tiny, 1e-50).nmse == pytest.approx(1.0, rel=1e-4)  # no squares below a float's
    b[0, 33, 2] = torch.nan
    assert distance(b, a) == Distance(float("inf"), float("inf"), 33, whole.magnitude)


def test_sides_of_other_numbers_of_threads_agree_within_the_floor(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original by one, the converted model by three, which cut rows and sums otherwise."""
    source, out = written("mistral-7b-v0.3")
    run, taken = Side.run, set()

    def threaded(side: Side, *asked: Any, **more: Any) -> Any:
        torch.set_num_threads(3 if side.raw else 1)  # the converted side has a config.json
        taken.add(torch.get_num_threads())
        return run(side, *asked, **more)

    monkeypatch.setattr(Side, "run", threaded)
    report = verify(out, source, levels=("parity",))
    assert taken == {1, 3} and report.status == "pass"
    assert one(report, "negative control").measured == 1.0


def test_two_inputs_in_one_pass_come_apart_where_a_phase_makes_several_tensors() -> None:
    """CANINE's molecules begin in a phase that takes characters alone."""
    x, y = torch.ones(1, 4, 2), torch.zeros(1, 4, 2)
    for made, of in zip(_both(lambda z: (z, z[:, ::2] + 1), x, y, {}), (x, y), strict=True):
        assert [torch.equal(a, b) for a, b in zip(made, (of, of[:, ::2] + 1), strict=True)] == [True, True]


def test_the_time_that_is_left_follows_what_was_done() -> None:
    clock = pace.Pace({"embed": 0.0, 0: 50.0, 1: 50.0, "head": 100.0}, 600.0)
    assert clock.left() == ", about 10 min left"
    clock.add(0)
    clock.began -= 30  # a quarter of the work took half a minute
    assert clock.left() == ", about 90 s left"
    assert pace.Pace({0: 1.0}, pace.TOLD / 2).left() == ""
    assert [pace.duration(s) for s in (45, 240, 9000)] == ["45 s", "4 min", "2.5 h"]


def test_a_gate_names_the_mode_of_a_check(written: Callable[[str], Made], tmp_path: Path) -> None:
    from ckpt_tool.verify.gate import read_gate, run_check

    source, out = written("llama-2-7b")
    file = tmp_path / "parity.toml"
    text = f'[[check]]\nname = "a"\nout = "{out}"\nsource = "{source}"\nlevels = ["parity"]\nmode = '
    file.write_text(text + '"quick"\n')
    (check,) = read_gate(file)[1]
    report = run_check(check, convert)
    assert report.status == "pass" and one(report, "left out").data["mode"] == "quick"
    file.write_text(text + '"hasty"\n')
    with pytest.raises(CkptToolError, match="expected default or quick or thorough, found 'hasty'"):
        read_gate(file)


@pytest.mark.parametrize("flaw", [False, True])
def test_bits_by_several_threads_are_told_in_order(
    flaw: bool, written: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, right = written("llama-3-70b")
    out = tmp_path / "out"
    shutil.copytree(right, out)
    if flaw:
        (file,) = out.glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-5] ^= 64
        data[len(data) // 2] ^= 64
        file.write_bytes(data)
    alone = verify(out, source, levels=("coverage", "bits"))
    monkeypatch.setattr(in_order, "WORTH", 0)
    monkeypatch.setattr(in_order, "WINDOW", 3)
    threads: set[int] = set()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    coverage = import_module("ckpt_tool.verify.coverage")  # a function of that name stands before it
    look = coverage.scan_one
    monkeypatch.setattr(
        coverage, "scan_one", lambda *args: (threads.add(threading.get_ident()), look(*args))[1]
    )
    report = verify(out, source, levels=("coverage", "bits"))
    assert [f.to_json() for f in report.findings] == [f.to_json() for f in alone.findings]
    assert report.status == ("fail" if flaw else "pass") and threading.get_ident() not in threads


def test_several_threads_begin_with_what_is_largest_and_tell_a_failure_in_its_place(
    written: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_order, "WORTH", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    with open_checkpoint(written("llama-3-70b")[1]) as out:
        both, failed, begun = threading.Barrier(2), threading.Event(), list[int]()

        def work(size: int) -> int:
            begun.append(size)
            if size >= 7:  # each thread has one of these
                both.wait(60)
            if size == 7:
                raise ValueError("told")
            if size == 8:
                assert failed.wait(60)
            return size

        found = in_order.in_order(work, [1, 8, 2, 7, 3], out, size=int)
        assert next(found) == 1 and sorted(begun[:2]) == [7, 8] and begun[2:] == [3, 2, 1]
        failed.set()
        assert [next(found), next(found)] == [8, 2]
        with pytest.raises(ValueError, match="told"):
            next(found)
