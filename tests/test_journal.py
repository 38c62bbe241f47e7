"""What a journal says is believed line by line, as far as types and names are right; a line that is not, and
all after it, count for nothing, and no file outside the hidden folder is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.api import Options, convert
from ckpt_tool.convert import journal
from ckpt_tool.convert.execute import Progress
from ckpt_tool.convert.journal import Entry
from ckpt_tool.errors import CkptToolError

Written = Callable[[str], Path]
OPTIONS = Options(max_shard_bytes=60_000)
FIRST, SECOND = "model-00001-of-00008.safetensors", "model-00002-of-00008.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def stopped(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the original `in`, what an interrupted run left of `out`, and the whole, `right`."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(originals("mistral-7b-v0.3"), root / "in")
    convert(root / "in", root / "right", options=OPTIONS, check=False)
    names = sorted(p.name for p in (root / "right").glob("*.safetensors"))
    assert len(names) > 4

    def stop(now: Progress) -> None:
        if now.file == names[3]:
            raise KeyboardInterrupt

    with pytest.raises(CkptToolError):
        convert(root / "in", root / "out", options=OPTIONS, check=False, progress=stop, jobs=1)
    assert len(journal_of(root).read_bytes().splitlines()) == 4
    return root


@pytest.fixture
def work(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "work")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    stat = os.stat(stopped / "in" / "consolidated.safetensors")
    os.utime(tmp_path / "work" / "in" / "consolidated.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return tmp_path / "work"


def journal_of(root: Path) -> Path:
    (found,) = root.glob(".out.ckpt-tool-partial-*.journal")
    return found


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line[9:]) for line in journal_of(root).read_bytes().splitlines()]


def resumed(work: Path) -> list[str]:
    """Go on; the files that were taken up. The result must be right and nothing else touched."""
    done = convert(work / "in", work / "out", options=OPTIONS, resume=True, check=False)
    assert contents(work / "out") == contents(work / "right")
    assert sorted(p.name for p in work.iterdir()) == ["in", "out", "right"]
    assert contents(work.parent / "victim") == {"file": b"mine"}
    return list(done.outcome.resumed)


def test_a_sound_journal_is_believed(work: Path) -> None:
    files = [name for line in lines_of(work)[1:] for name in line["files"]]
    assert len(files) == 3 and resumed(work) == files


def stopped_again(work: Path) -> Path:
    """The same, begun in this folder; the weights of the source."""

    def stop(now: Progress) -> None:
        if now.file.endswith(".safetensors") and now.file != first:
            raise KeyboardInterrupt

    first = min(p.name for p in (work / "right").glob("*.safetensors"))
    with pytest.raises(CkptToolError):
        convert(work / "in", work / "out", options=OPTIONS, check=False, progress=stop, jobs=1)
    return work / "in" / "consolidated.safetensors"


def test_a_source_that_was_written_and_its_time_set_back_is_another(work: Path) -> None:
    source = stopped_again(work)
    before = os.stat(source)
    os.chmod(source, 0o640)  # is no write
    with open(source, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
    assert resumed(work)
    shutil.rmtree(work / "out")
    stopped_again(work)
    with open(source, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CkptToolError) as caught:
        convert(work / "in", work / "out", options=OPTIONS, resume=True, check=False)
    assert caught.value.kind == "resume-mismatch" and "consolidated.safetensors" in str(caught.value)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bytes]:
    """The line that `change` makes of a sound one, with the right checksum."""

    def line(sound: dict[str, Any]) -> bytes:
        made = change(sound)
        return journal.line(sound if made is None else made)

    return line


def raw(text: bytes) -> Callable[[dict[str, Any]], bytes]:
    import zlib

    return lambda _: b"%08x %s\n" % (zlib.crc32(text), text)


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], bytes]:
    def change(line: dict[str, Any]) -> None:
        inner: Any = line
        for step in path[:-1]:
            inner = inner[next(iter(inner)) if step is None else step]
        inner[next(iter(inner)) if path[-1] is None else path[-1]] = value

    return edited(change)


def renamed(name: str) -> Callable[[dict[str, Any]], bytes]:
    return edited(lambda line: {**line, "files": {name: next(iter(line["files"].values()))}})


FINDING = {"kind": "all-zero", "message": "m", "file": FIRST, "tensor": "x", "details": {}}
BAD: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "no checksum": lambda _: b"{}\n",
    "a wrong checksum": lambda line: b"0" + journal.line(line)[1:],
    "cut": lambda line: journal.line(line)[:-20] + b"\n",
    "empty": lambda _: b"\n",
    "not JSON": raw(b"{"),
    "not UTF-8": raw(b'{"files": "\xff"}'),
    "a list": raw(b"[]"),
    "a number": raw(b"1"),
    "null": raw(b"null"),
    "deep": raw(b'{"files":' + b"[" * 100_000),
    "NaN": raw(b'{"files": NaN}'),
    "a huge integer": raw(b'{"files": {"a": {"b": ' + b"9" * 5000 + b"}}}"),
    "a key twice": raw(b'{"files": {}, "files": {}, "sources": [], "sha256": [], "findings": []}'),
    "without fields": edited(lambda _: {}),
    "a field too few": edited(lambda line: {k: v for k, v in line.items() if k != "sha256"}),
    "a field too many": edited(lambda line: {**line, "more": 1}),
    "files of no type": put("files", value=[FIRST]),
    "no files": put("files", value={}),
    "a file of no type": put("files", None, value=[1]),
    "a file above": renamed("../victim"),
    "a file far above": renamed("../../victim/file"),
    "an absolute file": renamed("/etc/passwd"),
    "a file of another plan": renamed("model-00009-of-00008.safetensors"),
    "an empty name": renamed(""),
    "two files of two groups": edited(lambda line: {**line, "files": {**line["files"], "config.json": {}}}),
    "a tensor less": edited(lambda line: {**line, "files": {next(iter(line["files"])): {}}}),
    "a tensor more": put("files", None, "lora", value=1),
    "a checksum as text": put("files", None, None, value="1"),
    "a checksum that is true": put("files", None, None, value=True),
    "a checksum as a fraction": put("files", None, None, value=1.5),
    "a negative checksum": put("files", None, None, value=-1),
    "a checksum too large": put("files", None, None, value=1 << 32),
    "sources of no type": put("sources", value={}),
    "a source of two": put("sources", value=[["a", "b"]]),
    "a source that is a number": put("sources", value=[7]),
    "an unknown source": put("sources", value=[["consolidated.safetensors", "other", 1]]),
    "a source elsewhere": put("sources", value=[["../victim/file", "x", 1]]),
    "a digest that is none": put("sha256", value=[[FIRST, "x", "00"]]),
    "a digest of an unknown tensor": put("sha256", value=[[FIRST, "x", "0" * 64]]),
    "findings of no type": put("findings", value="all-zero"),
    "a finding that is a text": put("findings", value=["all-zero"]),
    "a finding of an unknown kind": put("findings", value=[{**FINDING, "kind": "good"}]),
    "a finding elsewhere": put("findings", value=[{**FINDING, "file": "../victim"}]),
    "a finding with odd details": put("findings", value=[{**FINDING, "details": [1]}]),
    "a finding with a field more": put("findings", value=[{**FINDING, "more": 1}]),
}


@pytest.mark.parametrize("what", BAD)
def test_from_a_bad_line_on_nothing_is_believed(what: str, work: Path) -> None:
    identity, first, second, third = lines_of(work)
    good = [journal.line(x) for x in (identity, first)]
    journal_of(work).write_bytes(b"".join([*good, BAD[what](second), journal.line(third)]))
    assert resumed(work) == list(first["files"])


def test_a_line_twice_is_believed_once(work: Path) -> None:
    identity, first, second, _ = map(journal.line, lines_of(work))
    journal_of(work).write_bytes(identity + first + first + second)
    assert len(resumed(work)) == 1


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"x",
        b"\n",
        b"\0" * 4096,
        raw(b"[]")({}),
        raw(b"{}")({}),
        journal.line({"version": 1}),
        journal.line({"version": None, "plan": [], "source": 3}),
    ],
)
def test_a_journal_that_says_nothing_of_whose_it_is_starts_over(first: bytes, work: Path) -> None:
    journal_of(work).write_bytes(first + b"".join(map(journal.line, lines_of(work)[1:])))
    assert resumed(work) == []


@pytest.mark.parametrize(
    "identity",
    [
        {"version": "0", "plan": "0", "source": {}},
        {"version": "0", "plan": "\x1b[31m" * 500, "source": {"a": [1]}},
    ],
)
def test_a_journal_of_other_work_is_refused_and_printed_safely(identity: Any, work: Path) -> None:
    journal_of(work).write_bytes(journal.line(identity))
    with pytest.raises(CkptToolError) as caught:
        convert(work / "in", work / "out", options=OPTIONS, resume=True, check=False)
    assert caught.value.kind == "resume-mismatch"
    text = caught.value.text()
    assert "\x1b" not in text and len(text) < 4000
    convert(work / "in", work / "out", options=OPTIONS, check=False)
    assert contents(work / "out") == contents(work / "right")


@pytest.mark.parametrize("what", ["a link", "a folder", "a pipe", "a vast file", "nothing"])
def test_a_journal_that_is_no_file_starts_over(what: str, work: Path) -> None:
    path = journal_of(work)
    path.unlink()
    if what == "a link":
        path.symlink_to(work.parent / "victim" / "file")
    elif what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a vast file":
        with open(path, "wb") as file:
            file.truncate(journal.JOURNAL_BYTES + 1)
    assert resumed(work) == []


@pytest.mark.parametrize("what", ["the folder", "a file", "a folder inside"])
def test_links_in_what_was_left_are_not_followed(what: str, work: Path) -> None:
    folder = journal_of(work).with_suffix("")
    victim = work.parent / "victim"
    if what == "the folder":
        shutil.rmtree(folder)
        folder.symlink_to(victim)
    elif what == "a file":
        first = next(iter(lines_of(work)[1]["files"]))
        (folder / first).unlink()
        (folder / first).symlink_to(victim / "file")
    else:
        (folder / "inside").symlink_to(victim)
    assert len(resumed(work)) == {"the folder": 0, "a file": 2, "a folder inside": 3}[what]


def test_an_entry_survives_its_own_line() -> None:
    key = ("file", "tensor")
    finding = journal.Finding("all-zero", "expected values, found only zeros", "file", "tensor", {"count": 1})
    entry = Entry({"file": {"tensor": 7}}, {key: 1}, {key: "0" * 64}, (finding,))
    assert Entry.from_json(json.loads(journal.line(entry.to_json())[9:])) == entry


def test_a_line_for_a_file_of_very_many_tensors_is_read(tmp_path: Path) -> None:
    entry = Entry({"file": {"x" * 17_000_000: 1}})
    (tmp_path / "journal").write_bytes(journal.line(entry.to_json()))
    with open(tmp_path / "journal", "rb") as file:
        (content, _), *more = journal.read(file.fileno())
    assert Entry.from_json(content) == entry and not more
