"""Several processes carry out one plan or verify one output: shares, claims, what comes of it, wrong use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ckpt_tool.api import (
    Conversion,
    Options,
    PartMade,
    Shared,
    convert,
    convert_part,
    plan,
    publish_parts,
    verify,
    verify_part,
)
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.convert import claims, durable, parts
from ckpt_tool.convert.claims import Claim, at_work, claimed
from ckpt_tool.convert.execute import Run
from ckpt_tool.convert.layout import Part, Step, parse_dims
from ckpt_tool.convert.plan import OutputFile, Plan
from ckpt_tool.convert.shares import Worker, restricted, shares, whole_reads
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.report import Report
from ckpt_tool.verify.seen import Seen
from tests.in_process import program

ROOT = Path(__file__).parents[1]
SHARDS = Options(max_shard_bytes=60_000)
Written = Callable[[str], Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def problem(call: Callable[[], object]) -> tuple[str, str, str]:
    """Kind, message and hint of the error."""
    with pytest.raises(CkptToolError) as caught:
        call()
    found = caught.value.problems[0]
    return found.kind, found.message, found.hint or ""


def shared(source: Path, out: Path, options: Options = SHARDS, **more: object) -> Shared:
    return replace(Shared(source, out, options=options), **more)  # type: ignore[arg-type]


def by_all(asked: Shared, count: int, order: Sequence[int] = ()) -> tuple[list[PartMade], Conversion]:
    made = [convert_part(asked, Worker(k, count)) for k in order or range(1, count + 1)]
    return made, publish_parts(asked)


# --- shares ---------------------------------------------------------------------------------------------


def whole(sizes: Sequence[int], tied: Sequence[tuple[int, int]] = ()) -> Plan:
    """A plan of one tensor of bytes for each file; `tied` files are compared with each other."""
    infos = [TensorInfo(f"t{k}", "U8", (n,), f"f{k}") for k, n in enumerate(sizes)]

    def part(k: int) -> Part:
        return Part(f"f{k}", f"t{k}", "U8", parse_dims("x"))

    def step(*to: int, compare: str = "") -> Step:
        source = Part("s", f"t{to[0]}", "U8", parse_dims("x"))
        return Step((("x", sizes[to[0]]),), (source,), tuple(map(part, to)), compare=compare)

    steps = [step(k) for k in range(len(sizes))] + [step(*pair, compare="tied") for pair in tied]
    files = tuple(OutputFile(t.file, "safetensors", (t,)) for t in infos)
    return Plan("x", "to-hf", tuple(steps), files, (), {})


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([5, 5, 5, 5], 4, [1, 1, 1, 1]),
        ([5, 5, 5, 5, 5], 4, [2, 1, 1, 1]),
        ([1, 1, 1, 9, 1, 1, 1], 3, [3, 1, 3]),
        ([5, 5], 4, [1, 1, 0, 0]),
        ([], 2, [0, 0]),
        ([7] * 100, 7, [15] * 6 + [10]),
    ],
)
def test_shares_are_neighbours_and_even(sizes: list[int], count: int, expected: list[int]) -> None:
    dealt = shares(whole(sizes), count)
    assert [len(files) for files in dealt] == expected
    assert [f.name for files in dealt for f in files] == [f"f{k}" for k in range(len(sizes))]


def test_files_that_are_compared_stay_together() -> None:
    dealt = shares(whole([5, 5, 5, 5], tied=[(0, 3)]), 3)
    assert [sorted(f.name for f in files) for files in dealt] == [["f0", "f3"], ["f1"], ["f2"]]


def test_a_step_into_several_files_is_cut_down_and_every_source_is_somebodys(originals: Written) -> None:
    source = VARIANTS["llama-2-70b"]
    made = plan(originals("llama-2-70b"), family=source.family, options=Options(max_shard_bytes=100_000))
    back = whole([4, 4])
    halves = tuple(
        replace(s, ranges=(("x", a, b),))
        for s, a, b in zip([s.targets[0] for s in back.steps], (0, 4), (4, 8), strict=True)
    )
    one = Step((("x", 8),), (Part("s", "t", "U8", parse_dims("x")),), halves)
    back = replace(back, steps=(one,))
    left, right = (restricted(back, files) for files in shares(back, 2))
    assert [s.targets for s in (*left.steps, *right.steps)] == [halves[:1], halves[1:]]
    assert [s.domain()["x"] for s in (*left.steps, *right.steps)] == [(0, 4), (4, 8)]
    for some, count in ((made, 3), (back, 2)):
        homes = [whole_reads(some, files) for files in shares(some, count)]
        keys = [key for own in homes for keys in own.values() for key in keys]
        assert len(keys) == len(set(keys))
        assert set(keys) == {(p.file, p.name) for s in some.steps for p in s.sources}


# --- the same bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "shard", "back"),
    [("llama-2-70b", 100_000, 2), ("gpt2-v3-tp2-pp2", 60_000, 2)],
)
def test_all_parts_together_are_what_one_process_writes(
    originals: Written, tmp_path: Path, variant: str, shard: int, back: int
) -> None:
    """Also where steps go into several workers' files: fused tensors at the end of a shard, ranks."""
    chosen = VARIANTS[variant]
    options = Options(max_shard_bytes=shard, settings=chosen.settings)
    source = originals(variant)
    convert(source, tmp_path / "one", family=chosen.family, options=options, sha256=True, check=False)
    asked = shared(source, tmp_path / "many", options, family=chosen.family, sha256=True)
    made, done = by_all(asked, 3, order=(2, 3, 1))
    assert all(m.part.files for m in made)
    assert [m.part.missing for m in made] == [(1, 3), (1,), ()]
    assert done.outcome.bytes_read == done.outcome.bytes_written == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    ranks = Options(shards=back)
    convert(tmp_path / "one", tmp_path / "back", to="original", options=ranks)
    by_all(shared(tmp_path / "one", tmp_path / "parts", ranks, to="original"), 2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "back")
    assert hidden(tmp_path) == []


def test_what_is_odd_stands_in_the_order_of_one_process(originals: Written, tmp_path: Path) -> None:
    import torch

    source = Path(shutil.copytree(originals("llama-3-70b"), tmp_path / "in"))
    (source / "checklist.chk").unlink(missing_ok=True)
    for rank, file in enumerate(sorted(source.glob("consolidated.*.pth"))):
        state = torch.load(file)
        for layer in range(2):
            state[f"layers.{layer}.ffn_norm.weight"] *= 1 + (rank > 0) * 2**-8
        state["layers.1.attention.wq.weight"][0, 0] = float("nan")
        state["layers.0.feed_forward.w1.weight"].zero_()
        torch.save(state, file)
    options = Options(max_shard_bytes=100_000)
    done = convert(source, tmp_path / "one", family="llama", options=options, check=False)
    kinds = [f.kind for f in done.outcome.findings]
    assert kinds.count("replica-difference") >= 2 and {"non-finite", "all-zero"} <= set(kinds)
    asked = shared(source, tmp_path / "many", options, family="llama")
    made = [convert_part(asked, Worker(k, 3)) for k in (3, 1, 2)]
    assert sum(bool(m.part.outcome.findings) for m in made) >= 2
    alike = replace(asked, options=replace(options, strict_replicas=True))
    for strict, expected in ((replace(asked, strict=True), "non-finite"), (alike, "shard-conflict")):
        with pytest.raises(CkptToolError) as caught:
            publish_parts(strict)
        assert {p.kind for p in caught.value.problems} == {expected}
        assert "it is only recorded; finished files are kept" in (caught.value.problems[0].hint or "")
    publish_parts(asked)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert hidden(tmp_path) == []
    asked = replace(asked, out=tmp_path / "strict")
    odd = next(m.part for m in made if "non-finite" in {f.kind for f in m.part.outcome.findings}).worker
    convert_part(asked, odd)
    assert problem(lambda: convert_part(replace(asked, strict=True), odd))[0] == "non-finite"  # taken up


KILLED = """
import os, signal, sys
from pathlib import Path
from ckpt_tool.api import Options, Shared, convert_part
from ckpt_tool.convert import disk
from ckpt_tool.convert.shares import Worker

calls, real = 0, disk.fdatasync
def counted(descriptor):
    global calls
    calls += 1
    real(descriptor)
    if calls == 1:  # the head of the journal, and one file
        os.kill(os.getpid(), signal.SIGKILL)
disk.fdatasync = counted
convert_part(Shared(sys.argv[1], sys.argv[2], options=Options(max_shard_bytes=30_000)), Worker(2, 4))
"""


def test_a_killed_worker_goes_on(originals: Written, tmp_path: Path) -> None:
    source, options = originals("mistral-7b-v0.3"), Options(max_shard_bytes=30_000)
    convert(source, tmp_path / "one", options=options, check=False)
    asked = shared(source, tmp_path / "many", options)
    convert_part(asked, Worker(1, 4))
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "many")]
    ended = subprocess.run(command, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert any(name.endswith(".2.claim-1") for name in hidden(tmp_path))
    others = [convert_part(asked, Worker(k, 4)) for k in (3, 4)]
    assert others[-1].part.missing == (2,)
    kind, message, hint = problem(lambda: publish_parts(asked))
    assert (kind, hint) == ("missing-parts", "run again: --worker 2/4")
    assert (
        message == "expected the parts of all 4 workers, found unfinished ones of worker 2/4 (1 of 3 files)"
    )
    again = convert_part(asked, Worker(2, 4))
    assert len(again.part.outcome.resumed) == 1 and again.part.missing == ()
    assert publish_parts(asked, count=4).report is not None
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert hidden(tmp_path) == []


def test_what_was_replaced_is_never_published_as_parts(originals: Written, tmp_path: Path) -> None:
    """Whoever publishes was stopped after the exchange: what stood there has the name of the parts now,
    and but for the values it is like them."""
    first, asked = originals("mistral-7b-v0.3"), shared(tmp_path / "in", tmp_path / "out", overwrite=True)
    source = Path(shutil.copytree(first, tmp_path / "in")) / "consolidated.safetensors"
    data = bytearray(source.read_bytes())
    data[-4000:-2000] = data[-2000:]
    source.write_bytes(data)
    convert(first, tmp_path / "out", options=SHARDS, check=False)
    left: list[list[str]] = []

    def remains(*_: object) -> bool:
        left.append([n for n in hidden(tmp_path) if n.endswith(".journal")])
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "remove", remains)
        patch.setattr(parts.WholeStaging, "_forget", lambda self: None)
        by_all(asked, 2)
    right = contents(tmp_path / "out")
    kind, _, hint = problem(lambda: publish_parts(asked))
    assert kind == "missing-parts" and "run again: --worker" in hint
    assert contents(tmp_path / "out") == right
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "remove", remains)
        by_all(asked, 2)
    assert contents(tmp_path / "out") == right
    assert [len(names) for names in left] == [2, 0]  # the journals go first


def test_no_room_for_a_thread_costs_no_part(
    originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = shared(originals("mistral-7b-v0.3"), tmp_path / "out")
    for k in (1, 2):
        convert_part(asked, Worker(k, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "conclude", Mock(side_effect=RuntimeError("can't start new thread")))
        kind, _, hint = problem(lambda: publish_parts(asked))
    assert (kind, hint) == (
        "limits",
        "--jobs 1 needs fewer; finished files are kept: run it again with --finish to go on",
    )
    assert publish_parts(asked).report is not None


# --- wrong use ------------------------------------------------------------------------------------------


def test_wrong_use_is_one_clear_sentence(originals: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals("mistral-7b-v0.3"), tmp_path / "in"))
    asked = shared(source, tmp_path / "out")
    assert problem(lambda: publish_parts(asked))[0] == "missing-parts"
    first = convert_part(asked, Worker(1, 2))
    for call, words in (
        (lambda: convert_part(asked, Worker(1, 3)), "by 3 workers, found some of plan"),
        (lambda: convert_part(replace(asked, options=Options()), Worker(1, 2)), "by 2 workers"),
        (lambda: publish_parts(replace(asked, options=Options())), "by 2 workers"),
        (lambda: publish_parts(asked, count=3), "by 3 workers"),
    ):
        kind, message, hint = problem(call)
        assert kind == "resume-mismatch" and words in message
        assert str(tmp_path / f".out.ckpt-tool-partial-{first.plan.digest()[:16]}-of-2*") in hint
    kind, message, hint = problem(lambda: publish_parts(asked))
    assert (kind, message, hint) == (
        "missing-parts",
        "expected the parts of all 2 workers, found none of worker 2/2",
        "run again: --worker 2/2",
    )
    second = convert_part(asked, Worker(2, 2))
    (folder,) = tmp_path.glob(".out.ckpt-tool-partial-*-of-2")
    damaged = second.part.files[0].name
    with open(folder / damaged, "r+b") as file:
        file.truncate(100)
    kind, _, hint = problem(lambda: publish_parts(asked))
    assert (kind, hint.split(";")[0]) == ("missing-parts", "run again: --worker 2/2")
    (folder / "odd").mkdir()
    (folder / "odd" / "link").symlink_to(tmp_path)
    kind, _, hint = problem(lambda: publish_parts(replace(asked, sha256=True)))
    assert (kind, "with --sha256" in hint) == ("missing-parts", True)
    assert damaged not in convert_part(asked, Worker(2, 2)).part.outcome.resumed
    os.utime(source / "params.json")
    os.utime(next(source.glob("consolidated*")))
    for call in (lambda: convert_part(asked, Worker(2, 2)), lambda: publish_parts(asked)):
        kind, message, _ = problem(call)
        assert kind == "resume-mismatch" and "another source (consolidated" in message
    for path in (folder, *tmp_path.glob(folder.name + ".*")):  # what the hint says
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    by_all(asked, 2)
    for call in (lambda: convert_part(asked, Worker(2, 2)), lambda: publish_parts(asked)):
        assert problem(call)[0] == "output-exists"
    before = contents(tmp_path / "out")
    by_all(replace(asked, overwrite=True), 3)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert problem(lambda: convert_part(replace(asked, overwrite=True), Worker(1, 2)))[0] == "not-replaceable"
    assert hidden(tmp_path) == []


def test_workers_that_read_other_bytes_are_found_out(originals: Written, tmp_path: Path) -> None:
    from ckpt_tool.convert import journal

    asked = shared(
        originals("llama-2-70b"), tmp_path / "out", Options(max_shard_bytes=100_000), family="llama"
    )
    for k in (1, 2):
        convert_part(asked, Worker(k, 2))
    (path,) = tmp_path.glob("*-of-2.2.journal")
    (other,) = tmp_path.glob("*-of-2.1.journal")
    with open(path, "rb") as file:
        first, *entries = [content for content, _ in journal.read(file.fileno())]
    with open(other, "rb") as file:
        name, tensor, crc = [content for content, _ in journal.read(file.fileno())][1]["sources"][0]
    entries[0]["sources"].append([name, tensor, crc ^ 1])
    path.write_bytes(b"".join(map(journal.line, (first, *entries))))
    kind, message, _ = problem(lambda: publish_parts(asked))
    assert kind == "input-changed" and "as another worker read it" in message


def test_the_command_line_makes_a_part_says_what_is_missing_and_publishes(
    originals: Written, tmp_path: Path
) -> None:
    given = ("convert", "auto", "--in", str(originals("mistral-7b-v0.3")), "--out", "out")
    given += ("--max-shard-size", "60kB")
    assert "expected I/N" in program(*given, "--worker", "1of2", cwd=tmp_path).stderr
    assert "found 3/2" in program(*given, "--worker", "3/2", cwd=tmp_path).stderr
    assert "--ray alone" in program(*given, "--worker", "1/2", "--ray", "local", cwd=tmp_path).stderr
    first = program(*given, "--worker", "1/2", "--finish", cwd=tmp_path, columns=200)
    assert first.returncode == 0 and "next      --worker 2/2, then the same command" in first.stdout
    again = json.loads(program(*given, "--worker", "1/2", "--json", cwd=tmp_path).stdout)
    assert again["missing"] == [2] and again["resumed"] == again["files"]
    refused = program(*given[:-4], "--out", "hf://org/name", "--worker", "1/2", cwd=tmp_path)
    assert refused.returncode == 2 and "found one at hf://" in refused.stderr
    last_made = program(*given, "--worker", "2/2", cwd=tmp_path, columns=200)
    assert "all parts are there" in last_made.stdout
    (folder,) = tmp_path.glob(".out.ckpt-tool-partial-*-of-2")
    with (
        claimed(folder.with_name(f"{folder.name}.0"), "another worker, which is publishing"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(parts, "_refuse_publisher", Mock())  # it began after this worker did
        busy = program(*given, "--worker", "1/2", "--finish", cwd=tmp_path, columns=200)
        assert busy.returncode == 0 and "another process publishes it" in busy.stdout
        assert program(*given, "--finish", cwd=tmp_path).returncode == 2
    last = program(*given, "--worker", "2/2", "--finish", cwd=tmp_path, columns=200)
    assert last.returncode == 0 and "every source and target tensor accounted for" in last.stdout
    assert hidden(tmp_path) == []


def test_what_other_runs_left_beside_an_output_is_named(originals: Written, tmp_path: Path) -> None:
    source = originals("mistral-7b-v0.3")
    convert_part(shared(source, tmp_path / "it's", Options()), Worker(1, 2))
    given = ("convert", "auto", "--in", str(source), "--out", "it's")
    said = program(*given, cwd=tmp_path, columns=400).stdout
    (folder,) = tmp_path.glob(".it's.ckpt-tool-partial-*-of-2")
    (line,) = [text for text in said.splitlines() if text.strip().startswith("left")]
    assert f"{folder.name} and 1 more of other runs" in line
    subprocess.run(line.partition("at work: ")[2], shell=True, check=True)
    assert hidden(tmp_path) == []
    assert "   left " not in program(*given, "--overwrite", cwd=tmp_path).stdout


@pytest.mark.parametrize("overwrite", [False, True])
def test_who_comes_just_after_the_publishing_makes_nothing(
    originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    asked = shared(originals("mistral-7b-v0.3"), tmp_path / "out", overwrite=overwrite)
    if overwrite:
        convert(asked.source, asked.out, check=False)
    convert_part(asked, Worker(1, 1))
    begun, late = parts._begun, [False]

    def slow(*given: Any) -> Any:
        found = begun(*given)
        if not late[0]:
            late[0] = True
            publish_parts(asked, check=False)
        return found

    monkeypatch.setattr(parts, "_begun", slow)
    for call in (lambda: publish_parts(asked, count=1), lambda: convert_part(asked, Worker(1, 1))):
        late[0] = False
        kind, message, _ = problem(call)
        assert kind == "output-exists" and "has published there" in message
        assert hidden(tmp_path) == []
        shutil.rmtree(asked.out)
        late[0] = True
        convert_part(asked, Worker(1, 1))


# --- claims ---------------------------------------------------------------------------------------------


def test_the_same_worker_does_not_work_twice_at_a_time(originals: Written, tmp_path: Path) -> None:
    asked = shared(originals("mistral-7b-v0.3"), tmp_path / "out")
    made = convert_part(asked, Worker(1, 2))
    convert_part(asked, Worker(2, 2))
    (folder,) = tmp_path.glob(".out.ckpt-tool-partial-*-of-2")
    with claimed(folder.with_name(f"{folder.name}.0"), "x"):  # it would change what is being published
        kind, message, _ = problem(lambda: convert_part(replace(asked, sha256=True), Worker(1, 2)))
        assert kind == "output-busy" and "nobody to publish" in message
    with claimed(folder.with_name(f"{folder.name}.1"), "x"):
        kind, message, _ = problem(lambda: convert_part(asked, Worker(1, 2)))
        assert kind == "output-busy" and f"found process {os.getpid()} on" in message
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "ENDING", 0.2)
            kind, message, _ = problem(lambda: publish_parts(asked))
        assert kind == "output-busy" and "found worker 1/2 at work" in message
    assert contents(folder).keys() >= {f.name for f in made.part.files}
    publish_parts(asked)
    assert hidden(tmp_path) == []


def test_a_claim_of_one_who_is_gone_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.02)
    monkeypatch.setattr(claims, "PATIENCE", 0.3)
    monkeypatch.setattr(claims, "WATCH", 0.03)
    stem = tmp_path / "work"
    ours = claims._machine()
    claim = Claim(stem, 1, "the work")
    monkeypatch.setattr(claims, "_machine", lambda: "another machine")
    said: list[str] = []
    assert at_work(stem) is not None  # it is seen to live
    claim._released.set()  # its owner stops to give signs of life, as one that was killed
    claim._beats.join()
    monkeypatch.setattr(claims, "_machine", lambda: "a third machine")
    with claimed(stem, "the work", said.append) as mine:
        assert "may be at work: watching for" in said[0]
        assert mine.number == 2 and claim.lost and not mine.lost
        assert problem(claim.check)[0] == "output-busy"
    claim.release()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(claims, "_machine", lambda: ours)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = {"host": "here", "machine": ours, "process": child.pid, "started": claims._started(child.pid)}
    (tmp_path / "work.claim-7").write_text(json.dumps(owner))
    child.wait()
    monkeypatch.setattr(claims, "PATIENCE", 1e9)  # of this machine's processes is known who lives
    with claimed(stem, "the work") as mine:
        assert mine.number == 8
    (tmp_path / "work.claim-1").write_bytes(b"")  # made, and not written before its owner was gone
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    with claimed(stem, "the work"):
        assert problem(lambda: claimed(stem, "the work").__enter__())[0] == "output-busy"
    assert list(tmp_path.iterdir()) == []


def test_a_worker_whose_claim_was_taken_over_stops_and_removes_nothing(
    originals: Written, tmp_path: Path
) -> None:
    asked = shared(originals("mistral-7b-v0.3"), tmp_path / "out")
    convert_part(asked, Worker(1, 2))
    (folder,) = tmp_path.glob(".out.ckpt-tool-partial-*-of-2")
    first = sorted(folder.iterdir())[0]
    first.unlink()  # so that there is something left to do

    def taken(_: Plan) -> None:
        folder.with_name(f"{folder.name}.1.claim-99").write_bytes(b"")

    create = parts.PartStaging.create

    def late(self: parts.PartStaging, name: str, size: int) -> int:
        taken(Plan("", "", (), (), (), {}))
        return create(self, name, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.PartStaging, "create", late)
        kind, message, _ = problem(lambda: convert_part(asked, Worker(1, 2)))
    assert kind == "output-busy" and "another took it over" in message
    assert len(list(folder.iterdir())) >= 1 and list(tmp_path.glob("*-of-2.1.journal"))


# --- verifying ------------------------------------------------------------------------------------------


def findings(report: Report) -> list[dict[str, object]]:
    return [f.to_json() for f in report.findings]


READ = ("coverage", "bits")  # parity by workers: test_dist.py


def looked_at(out: Path, source: Path, count: int) -> list[Seen]:
    return [verify_part(out, source, Worker(k, count), levels=READ) for k in range(1, count + 1)]


@pytest.mark.parametrize(("variant", "dtype"), [("llama-2-70b", None), ("mistral-7b-v0.3", "F16")])
def test_what_all_workers_saw_is_the_report_of_one(
    originals: Written, tmp_path: Path, variant: str, dtype: str | None
) -> None:
    source, out = originals(variant), tmp_path / "out"
    options = Options(max_shard_bytes=50_000 if dtype else 100_000, dtype=dtype)
    convert(source, out, family=VARIANTS[variant].family, options=options, check=False)
    levels = READ
    right = verify(out, source, levels=levels)
    assert right.status == "pass"
    seen = looked_at(out, source, 3)
    assert [s.missing for s in seen] == [(2, 3), (3,), ()] and not any(s.differences for s in seen)
    joined = verify(out, source, levels=levels, joined=True)
    assert findings(joined) == findings(right) and joined.headline == right.headline
    assert joined.facts["workers"].startswith("3, ") and hidden(tmp_path) == []
    for file in sorted(out.glob("*.safetensors"))[::2]:  # bytes that are not the source's, NaN among them
        data = bytearray(file.read_bytes())
        data[-1000:-990] = b"\xff" * 10
        data[-3000] ^= 1
        file.write_bytes(data)
    wrong = verify(out, source, levels=levels)
    assert wrong.status == "fail" and sum(f.check == "round trip" for f in wrong.findings) >= 4
    seen = looked_at(out, source, 4)
    assert sum(s.differences > 0 for s in seen) >= 2
    joined = verify(out, source, levels=levels, joined=True)
    assert findings(joined) == findings(wrong) and joined.exactness == "differs"


def test_a_verdict_counts_only_what_all_workers_saw(originals: Written, tmp_path: Path) -> None:
    source, out = originals("mistral-7b-v0.3"), tmp_path / "out"
    convert(source, out, options=SHARDS, check=False)

    def joined(**more: object) -> Report:
        return verify(out, source, **{"levels": READ, "joined": True, **more})

    assert problem(joined)[0] == "missing-parts"
    verify_part(out, source, Worker(1, 2), levels=READ)
    kind, message, hint = problem(joined)
    assert (kind, hint) == ("missing-parts", "run again: --worker 2/2")
    assert problem(lambda: verify_part(out, source, Worker(1, 3)))[0] == "resume-mismatch"
    assert problem(lambda: joined(levels="documented"))[0] == "usage"
    verify_part(out, source, Worker(2, 2), levels=["coverage"])
    assert problem(joined)[2] == "run again: --worker 2/2"  # it has not looked at the bits
    written = tmp_path / ".out.ckpt-tool-verify-of-2.2"
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:4]) + lines[4][:-9])  # stopped while it wrote
    assert verify_part(out, source, Worker(2, 2), levels=READ).resumed == 3
    os.utime(next(out.glob("*.safetensors")))
    kind, message, hint = problem(joined)
    assert kind == "resume-mismatch" and "found another output model-0000" in message
    assert hint == "give every worker the same output and source, and run again: --worker 1/2"
    assert [s.resumed for s in looked_at(out, source, 2)] == [0, 0]
    assert joined().status == "pass"
    assert hidden(tmp_path) == []


def test_the_command_line_verifies_by_workers(
    conversions: Written, originals: Written, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(conversions("mistral-7b-v0.3"), tmp_path / "out"))
    levels = ("--level", "coverage", "--level", "bits")
    given = ("verify", "out", "--source", str(originals("mistral-7b-v0.3")), *levels)
    first = program(*given, "--worker", "1/2", cwd=tmp_path, columns=200)
    assert first.returncode == 0 and "next      --worker 2/2, then the same command" in first.stdout
    assert program(*given, "--worker", "1/2", "--finish", cwd=tmp_path).returncode == 2
    assert "found --html" in program(*given, "--worker", "1/2", "--html", "x", cwd=tmp_path).stderr
    last = json.loads(program(*given, "--worker", "2/2", "--json", cwd=tmp_path).stdout)
    assert last["missing"] == [] and last["tensors"] > 0 and last["steps"] > 0
    report = program(*given, "--finish", cwd=tmp_path, columns=200)
    assert report.returncode == 0 and "2, each with a share of the tensors and steps" in report.stdout
    file = next(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    codes = [program(*given, "--worker", f"{k}/2", cwd=tmp_path).returncode for k in (1, 2)]
    assert sorted(codes) == [0, 1]
    assert program(*given, "--finish", cwd=tmp_path).returncode == 1


# --- Ray ------------------------------------------------------------------------------------------------

BOTH = """
import sys, ray
from ckpt_tool.program import run
ray.init(address="local", include_dashboard=False, log_to_driver=False)  # it takes longer than all the rest
source = sys.argv[1]
made = ["convert", "auto", "--in", source, "--out", "many", "--max-shard-size", "60kB", "--no-verify"]
code = run([*made, "--ray", "local", "--tasks", "4"])
seen = ["verify", "many", "--source", source, "--level=coverage", "--level=bits"]
sys.exit(code or run([*seen, "--ray", "local", "--tasks", "2", "--json", "report.json"]))
"""


def test_a_local_ray_cluster_gives_the_same_bytes_and_report(originals: Written, tmp_path: Path) -> None:
    judge = ROOT / ".judges" / "ray"
    if not (judge / "ray").is_dir():
        pytest.skip("Ray is not set up; `make test` does it")
    source = originals("mistral-7b-v0.3")
    convert(source, tmp_path / "one", options=SHARDS, check=False)
    ended = subprocess.run(
        [sys.executable, "-c", BOTH, str(source)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(judge)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "4 tasks on 1 node" in ended.stderr and "(4 of 4)" in ended.stderr
    assert "2 tasks on 1 node" in ended.stderr and "part 2/2 looked at on" in ended.stderr
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    found = json.loads((tmp_path / "report.json").read_text())
    right = verify(tmp_path / "many", source, levels=READ)
    assert found["findings"] == json.loads(json.dumps(right.to_json()))["findings"]
    assert found["facts"]["workers"].startswith("2, ") and hidden(tmp_path) == []
