"""What an output may replace, and what it never touches: refused before any work, with everything that stood
there as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.api import Options, convert, gate
from ckpt_tool.convert import disk, durable, replaceable
from ckpt_tool.convert.durable import Identity, Staging
from ckpt_tool.convert.replaceable import look
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests.conftest import touch
from tests.in_process import program

Written = Callable[[str], Path]
Place = Callable[[Path], object]
VARIANT = "mistral-float32"


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every entry below `folder`: bytes of files, targets of links."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else ""
        for p in folder.rglob("*")
    }


@pytest.fixture
def work(originals: Written, conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an original `in` and its conversion `out`."""
    folder = tmp_path / "around" / "work"
    folder.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    shutil.copytree(originals(VARIANT), folder / "in")
    shutil.copytree(conversions(VARIANT), folder / "out")
    return folder


@pytest.fixture
def no_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened for converting: what is refused is refused before."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the source was opened")

    monkeypatch.setattr("ckpt_tool.api.open_for", opened)


def refused(out: str | Path, **more: Any) -> CkptToolError:
    more.setdefault("overwrite", True)
    with pytest.raises(CkptToolError) as caught:
        convert("in", out, **more)
    (problem,) = caught.value.problems
    assert problem.hint and caught.value.exit_code == 2
    return caught.value


# --- what is replaced -----------------------------------------------------------------------------------


def test_an_untouched_output_and_an_empty_folder_are_replaced(work: Path) -> None:
    (work / "empty").mkdir()
    for name in ("out", "empty"):
        convert("in", name, overwrite=True, options=Options(dtype="BF16"), check=False)
        assert json.loads((work / name / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(p.name for p in work.iterdir()) == ["empty", "in", "out"]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].family != "mixtral"][::4])
def test_what_a_conversion_writes_is_recognised_in_both_directions(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    chosen = VARIANTS[variant]
    options = Options(settings=chosen.settings)
    assert look(conversions(variant), "outputs")
    back = tmp_path / "back"
    convert(conversions(variant), back, family=chosen.family, to="original", options=options, check=False)
    assert look(back, "outputs")
    for path in back.rglob("*"):
        os.utime(path)  # now the checksums have to tell
    assert look(back, "outputs")


def test_a_copy_with_new_times_is_still_an_output(work: Path) -> None:
    shutil.copytree("out", "copy")
    for path in (work / "copy").iterdir():
        path.chmod(0o600)
        os.utime(path)
    before = (work / "copy").stat().st_ino
    convert("in", "copy", overwrite=True, check=False)
    assert (work / "copy").stat().st_ino != before


def test_an_output_of_which_files_are_missing_is_still_one(work: Path) -> None:
    (work / "out" / "model.safetensors").unlink()
    convert("in", "out", overwrite=True, check=False)
    assert (work / "out" / "model.safetensors").exists()


FOREIGN = {
    "a download": ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"],
    "shards": [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ],
    "torch": ["config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "special_tokens_map.json"],
    "an original": ["params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_weights_needs_the_other_flag(kind: str, work: Path) -> None:
    (work / "old").mkdir()
    for name in FOREIGN[kind]:
        (work / "old" / name).write_text("{}")
    error = refused("old")
    assert error.kind == "not-replaceable" and "--overwrite-foreign" in str(error)
    assert "--overwrite-foreign" in str(refused("old", overwrite=False))
    assert len(contents(work / "old")) == len(FOREIGN[kind])
    convert("in", "old", overwrite_foreign=True, check=False)  # enough alone
    assert look(work / "old", "outputs")


# --- what is somebody's work ----------------------------------------------------------------------------


def put(name: str, content: str | bytes = "mine") -> Place:
    def place(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return place


def put_link(name: str, target: str) -> Place:
    return lambda folder: (folder / name).symlink_to(target)


def change(name: str, at: int) -> Place:
    """One bit of a file of the same size, with its old times."""

    def place(folder: Path) -> None:
        path = folder / name
        before = path.stat()
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        touch(path, before.st_atime_ns, before.st_mtime_ns)

    return place


STRANGERS: dict[str, Place] = {
    "notes.txt": put("notes.txt"),
    ".notes": put(".notes"),
    "sub/deep/notes.txt": put("sub/deep/notes.txt"),
    "a folder": lambda folder: (folder / "runs").mkdir(),
    "a script": put("modeling_mine.py"),
    "an adapter": put("adapter_model.safetensors"),
    "the state of a training": put("optimizer.pt"),
    "a file that is only called like weights": put("photos.bin"),
    "a link": put_link("tokenizer.model.v3", "../in/tokenizer.model"),
    "a pipe": lambda folder: os.mkfifo(folder / "vocab.txt"),
}
CHANGES: dict[str, Place] = {
    "an edited config": change("config.json", 1),
    "a fine-tune of the same size": change("model.safetensors", -1),
    "a fine-tune of another size": put("model.safetensors", b"longer" * 1000),
    "another tokenizer": put("tokenizer.json", "{}"),
    "weights beside": put("pytorch_model.bin"),
    "a second index": put("model.safetensors.index.json", "{}"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_in_an_output_keeps_it(what: str, work: Path) -> None:
    STRANGERS[what](work / "out")
    if what != "a pipe":
        before = contents(work)
    for flag in ("overwrite", "overwrite_foreign"):
        error = refused("out", **{flag: True})
        assert error.kind == "not-replaceable" and ", found " in str(error)
        assert "--overwrite-foreign" not in str(error.problems[0].hint)  # it would not help
    if what != "a pipe":
        assert contents(work) == before


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_in_an_output_is_asked_about(
    what: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGES[what](work / "out")
    before = contents(work)
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_tool.api.open_for", None)
        error = refused("out")
    assert error.kind == "not-replaceable" and "--overwrite-foreign" in str(error)
    assert contents(work) == before
    convert("in", "out", overwrite_foreign=True, check=False)
    assert look(work / "out", "outputs")


MANIFESTS: dict[str, Any] = {
    "no JSON": "x",
    "a list": [],
    "empty": {},
    "of another tool": {"tool": "other", "manifest_version": 1},
    "of a version to come": {"tool": "ckpt-tool", "manifest_version": 99},
    "without lists": {"tool": "ckpt-tool", "manifest_version": 1, "direction": "to-hf"},
    "with odd lists": {
        "tool": "ckpt-tool", "manifest_version": 1, "direction": "to-hf", "tensors": [3], "outputs": {"a": 1},
        "documents": "notes.txt",
    },
    "deep": "[" * 100_000,
}  # fmt: skip


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("what", MANIFESTS)
def test_a_file_called_like_the_manifest_is_not_enough(what: str, work: Path) -> None:
    content = MANIFESTS[what]
    text = content if isinstance(content, str) else json.dumps(content)
    (work / "mine").mkdir()
    (work / "mine" / "ckpt-tool.json").write_text(text)
    (work / "mine" / "notes.txt").write_text("mine")
    before = contents(work)
    assert refused("mine").kind == "not-replaceable"
    assert contents(work) == before


def test_a_manifest_of_any_size_is_looked_at_in_bounded_memory(work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "notes.txt").write_text("mine")
    with (work / "mine" / "ckpt-tool.json").open("w") as file:
        file.truncate(1 << 40)  # bytes that no memory holds
    assert refused("mine").kind == "not-replaceable"


# --- places that are never replaced ---------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("flag", ["overwrite", "overwrite_foreign"])
@pytest.mark.parametrize(
    ("place", "kind", "word"),
    [
        ("file", "not-replaceable", "a file"),
        ("pipe", "not-replaceable", "a file"),
        ("link-to-out", "output-conflict", "symbolic link"),
        ("dangling", "output-conflict", "symbolic link"),
        ("docs", "not-replaceable", "a.txt, b.txt"),
        ("repository", "not-replaceable", ".git"),
        ("worktree", "not-replaceable", ".git"),
        (".", "output-conflict", "working folder"),
        ("..", "output-conflict", "working folder"),
        ("../..", "output-conflict", "working folder"),
        ("../../home", "output-conflict", "home folder"),
        ("../../around", "output-conflict", "working folder"),
        ("link-up/around", "output-conflict", "working folder"),
        ("link-up/home", "output-conflict", "home folder"),
        ("/", "output-conflict", "root of the file system"),
        ("/tmp", "output-conflict", "one that holds"),
        ("in", "output-conflict", "the input itself"),
        ("in/new", "output-conflict", "a place inside the input"),
        ("link-here/in", "output-conflict", "the input itself"),
        ("link-here/in/new", "output-conflict", "a place inside the input"),
    ],
)
def test_places_that_no_flag_opens(place: str, kind: str, word: str, flag: str, work: Path) -> None:
    (work / "file").write_text("mine")
    os.mkfifo(work / "pipe")
    (work / "link-to-out").symlink_to("out")
    (work / "dangling").symlink_to("nowhere")
    (work / "link-up").symlink_to("../..")
    (work / "link-here").symlink_to(".")
    put("a.txt")(work / "docs")
    put("b.txt")(work / "docs")
    shutil.copytree("out", "repository")
    (work / "repository" / ".git").mkdir()
    shutil.copytree("out", "worktree")
    (work / "worktree" / ".git").write_text("gitdir: elsewhere")
    (work / "pipe.txt").write_text("")
    before = sorted(map(str, work.rglob("*")))
    error = refused(place, **{flag: True})
    assert error.kind == kind and word in str(error)
    assert sorted(map(str, work.rglob("*"))) == before


@pytest.mark.usefixtures("no_work")
def test_a_folder_that_holds_the_source_is_kept_whichever_way_the_source_is_named(work: Path) -> None:
    (work / "data").mkdir()
    os.rename("in", "data/in")
    (work / "way").symlink_to("data")
    (work / "data" / "out").symlink_to("../out")
    for source in ("data/in", "way/in", str(work / "data" / "in"), "way/../data/in"):
        with pytest.raises(CkptToolError) as caught:
            convert(source, "data", overwrite_foreign=True)
        assert caught.value.kind == "output-conflict" and "holds the input" in str(caught.value)
    with pytest.raises(CkptToolError) as caught:  # the link to the source lies in it
        convert("data/out", "data", overwrite_foreign=True)
    assert caught.value.kind == "output-conflict"


@pytest.mark.usefixtures("no_work")
def test_the_tokenizer_that_is_read_is_kept_too(work: Path) -> None:
    options = Options(tokenizer="out/tokenizer.model")
    error = refused("out", options=options)
    assert error.kind == "output-conflict" and "out/tokenizer.model" in str(error)


@pytest.fixture
def mounts(work: Path) -> Iterator[Callable[..., None]]:
    made: list[str] = []

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        made.append(arguments[-1])

    yield mount
    for target in reversed(made):
        subprocess.run(["umount", target], check=True)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("out", "output-conflict"),
        ("out/sub", "not-replaceable"),
        ("out/with a space", "not-replaceable"),
        ("out/config.json", "not-replaceable"),
    ],
)
@pytest.mark.parametrize("bound", [True, False], ids=["bind", "tmpfs"])
def test_a_mount_is_not_replaced(
    target: str, kind: str, bound: bool, work: Path, mounts: Callable[..., None]
) -> None:
    place = work / target
    put("mine.txt")(work / "docs")
    if place.is_file():
        if not bound:
            pytest.skip("a tmpfs is a folder")
        mounts("--bind", str(work / "docs" / "mine.txt"), str(place))
    else:
        place.mkdir(exist_ok=True)
        arguments = ("--bind", str(work / "docs")) if bound else ("-t", "tmpfs", "tmpfs")
        mounts(*arguments, str(place))
    for flag in ("overwrite", "overwrite_foreign"):
        error = refused("out", **{flag: True})
        assert error.kind == kind and "mount" in str(error)
    assert (work / "docs" / "mine.txt").read_text() == "mine"


# --- what happens while the work goes on ----------------------------------------------------------------


def test_a_file_that_comes_meanwhile_keeps_the_folder_and_the_work(work: Path) -> None:
    def add(now: Any) -> None:
        if now.stage == "finish":
            (work / "out" / "notes.txt").write_text("mine")

    old = contents(work / "out")
    options = Options(dtype="BF16")
    error = refused("out", options=options, progress=add)
    assert error.kind == "output-changed" and "notes.txt" in str(error) and "--resume" in str(error)
    assert contents(work / "out") == {**old, "notes.txt": b"mine"}
    os.rename("out", "kept")
    done = convert("in", "out", options=options, resume=True, check=False)
    assert done.outcome.resumed == ("model.safetensors",) and look(work / "out", "outputs")
    assert contents(work / "kept")["notes.txt"] == b"mine"
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("supported", [True, False], ids=["renameat2", "plain rename"])
def test_a_file_that_comes_at_the_moment_of_the_exchange_brings_the_folder_back(
    supported: bool, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.exchange

    def exchange(source: Path, target: Path, aside: Path) -> None:
        note = target / "notes.txt"
        if (target / "tokenizer.json").exists():  # the first of the two exchanges
            note.write_text("mine")
        real(source, target, aside)

    if not supported:
        monkeypatch.setattr(disk, "_renameat2", lambda *_: (_ for _ in ()).throw(OSError(22, "unknown")))
    monkeypatch.setattr(disk, "exchange", exchange)
    old = contents(work / "out")
    staging = Staging(work / "out", Identity("1", "a" * 64, {}), "outputs")
    staging.begin(resume=False)
    staging.write("new", b"new")
    with pytest.raises(CkptToolError) as caught:
        staging.publish()
    staging.leave(keep=False)
    assert caught.value.kind == "output-changed"
    assert contents(work / "out") == {**old, "notes.txt": b"mine"}


def test_a_file_that_comes_while_the_old_is_removed_stays(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = replaceable.remove

    def remove(folder: Path, known: Any) -> bool:
        (folder / "notes.txt").write_text("mine")
        return real(folder, known)

    monkeypatch.setattr(durable, "remove", remove)
    convert("in", "out", overwrite=True, check=False)
    assert look(work / "out", "outputs")
    assert contents(work / "out.replaced-1") == {"notes.txt": b"mine"}


def test_an_old_output_that_is_gone_at_the_end_is_no_reason_to_stop(work: Path) -> None:
    def take_away(now: Any) -> None:
        if now.stage == "finish" and (work / "out").exists():
            shutil.rmtree(work / "out")

    convert("in", "out", overwrite=True, progress=take_away, check=False)
    assert look(work / "out", "outputs")


def test_a_folder_that_comes_meanwhile_is_not_replaced_for_the_flag(work: Path) -> None:
    def make(now: Any) -> None:
        if now.stage == "finish":
            put("notes.txt")(work / "new")

    error = refused("new", progress=make)
    assert error.kind == "output-exists" and "--resume" in str(error)
    assert contents(work / "new") == {"notes.txt": b"mine"}


# --- the same for every command -------------------------------------------------------------------------


def test_the_command_line_says_it_in_one_sentence_and_leads_out(work: Path) -> None:
    put("notes.txt")(work / "docs")
    before = contents(work)
    done = program("convert", "auto", "--in", "in", "--out", "docs", "--overwrite", cwd=work)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error[not-replaceable]: docs: expected an empty folder or an output of this tool, found notes.txt\n"
        "  hint: move it away, or choose another --out\n"
    )
    put("config.json", "{}")(work / "model")
    told = program("convert", "auto", "--in", "in", "--out", "model", "--overwrite", "--json", cwd=work)
    assert "--overwrite-foreign" in json.loads(told.stdout)["problems"][0]["hint"]
    shutil.rmtree(work / "model")
    assert contents(work) == before


@pytest.mark.parametrize("key", ["overwrite", "overwrite_foreign"])
def test_a_gate_refuses_the_same(key: str, work: Path) -> None:
    put("notes.txt")(work / "docs")
    put("config.json", "{}")(work / "model")
    shutil.copytree("out", "earlier")
    places = ("docs", ".", "in", "model", "earlier")
    checks = "\n".join(
        f'[[check]]\nname = "{p}"\nconvert = "auto"\nsource = "in"\nout = "{p}"\n{key} = true\n'
        'levels = ["bits"]'
        for p in places
    )
    (work / "parity.toml").write_text(checks)
    before = contents(work / "docs")
    reports = {r.title: r for r in gate(work / "parity.toml").reports}
    ran = {name for name, r in reports.items() if not r.could_not_run}
    assert ran == ({"earlier", "model"} if key == "overwrite_foreign" else {"earlier"})
    for name in {*places} - ran:
        (finding,) = reports[name].findings
        assert finding.data["kind"] in ("not-replaceable", "output-conflict") and reports[name].exit_code == 2
    assert contents(work / "docs") == before


@pytest.mark.parametrize("out", ["out", "in", ".", "/", "docs", "file", "dangling", "file/new"])
def test_fixtures_are_written_to_free_places_only(out: str, work: Path) -> None:
    put("notes.txt")(work / "docs")
    (work / "file").write_text("mine")
    (work / "dangling").symlink_to("nowhere")
    before = contents(work)
    done = program("fixtures", VARIANT, "--out", out, cwd=work)
    assert done.returncode == 2 and done.stderr.startswith("error[output-")
    assert contents(work) == before
    assert program("fixtures", VARIANT, "--out", "some/new/place", cwd=work).returncode == 0


def test_a_demo_replaces_an_earlier_demo_and_nothing_else(work: Path) -> None:
    from ckpt_tool.demo import FOLDERS, MARKER, _make_room

    def earlier() -> Path:
        folder = work / "demo"
        for name in FOLDERS:
            shutil.copytree("in" if name == "original" else "out", folder / name)
        (folder / MARKER).touch()
        (folder / "report.html").write_text("<html>")
        return folder

    folder = earlier()
    (folder / ".converted.ckpt-tool-partial-0").mkdir()
    change("model.safetensors", -1)(folder / "broken")
    with pytest.raises(CkptToolError) as caught:
        _make_room(folder, overwrite=False)
    assert caught.value.kind == "output-exists" and "--overwrite" in str(caught.value)
    _make_room(folder, overwrite=True)
    assert not folder.exists()
    for name in (
        "notes.txt",
        "original/notes.txt",
        "converted/notes.txt",
        "broken/deep/notes.txt",
        ".git/HEAD",
    ):
        put(name)(earlier())
        before = contents(folder)
        with pytest.raises(CkptToolError) as caught:
            _make_room(folder, overwrite=True)
        assert caught.value.kind == "not-replaceable" and contents(folder) == before
        shutil.rmtree(folder)
    for place in (work / "in", work, Path("/")):
        with pytest.raises(CkptToolError):
            _make_room(place, overwrite=True)
    assert look(work / "out", "outputs")
