"""Exit 1 says that verification found a difference and nothing else: every other end has its own code, one
clear text, and no traceback."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckpt_tool.fixtures.flaws import plant
from ckpt_tool.program import as_told, wants_json
from ckpt_tool.verify.missing import not_run
from tests.in_process import program

Written = Callable[[str], Path]
VARIANT = "mistral-float32"
MAIN = "from ckpt_tool.program import main\nmain()\n"
PROGRAM = [sys.executable, "-m", "ckpt_tool"]


def run(*arguments: str, script: str | None = None, cwd: Path | None = None, **more: Any) -> Any:
    """The finished program, or `script`, which ends by calling it."""
    command = PROGRAM if script is None else [sys.executable, "-c", script]
    more.setdefault("stdout", subprocess.PIPE)
    more.setdefault("stderr", subprocess.PIPE)
    done = subprocess.run([*command, *arguments], text=True, cwd=cwd, timeout=120, check=False, **more)
    assert "Traceback" not in (done.stderr or ""), done.stderr
    return done


@pytest.fixture(autouse=True)
def signals_as_usual() -> Iterator[None]:
    """Also where these tests run in the background, or under nohup, and a program would inherit that some are
    ignored."""
    ignored = [number for number, _ in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


# --- what each command ends with ------------------------------------------------------------------------


@pytest.fixture
def tiny(originals: Written, conversions: Written, tmp_path: Path) -> Path:
    """A folder with `in`, its conversion `out` and a conversion with a mistake, `bad`."""
    (tmp_path / "in").symlink_to(originals(VARIANT))
    shutil.copytree(conversions(VARIANT), tmp_path / "out")
    plant(Path(shutil.copytree(conversions(VARIANT), tmp_path / "bad")), "q-not-permuted")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, "families"),
        (0, "--version"),
        (0, "convert --help"),
        (0, "fixtures"),
        (0, "inspect in"),
        (0, "plan auto --in in"),
        (0, "convert auto --in in --out new"),
        (0, "convert auto --in in --out new --dry-run"),
        (0, "verify out --source in --level bits"),
        (0, "verify out --no-source --level coverage"),
        (1, "verify bad --source in --level bits"),
        (1, "diagnose bad --source in"),
        (2, ""),
        (2, "nonsense"),
        (2, "convert"),
        (2, "inspect nowhere"),
        (2, "plan auto --in nowhere"),
        (2, "plan auto --in in --max-shard-size much"),
        (2, "convert auto --in in --out out"),
        (2, "convert auto --in in --out nowhere/new --dry-run --to sideways"),
        (2, "fixtures nonsense --out new"),
        (2, "fixtures mistral-float32"),
        (2, "fixtures mistral-float32 --out out"),
        (2, "table --only nonsense"),
        (2, "gate nowhere.toml"),
        (2, "demo --out out"),
        (2, "demo --out out --overwrite"),
        (2, "verify nowhere --source in"),
        (2, "verify out --level coverage"),
        (2, "verify out --no-source --level coverage --junit nowhere/x"),
    ],
)
def test_every_command_ends_with_0_1_or_2_by_one_rule(code: int, arguments: str, tiny: Path) -> None:
    done = program(*arguments.split(), cwd=tiny)
    assert done.returncode == code, (done.stdout[-500:], done.stderr[-500:])
    assert "Traceback" not in done.stderr
    if code == 2 and arguments:
        assert "error[" in done.stderr or "undecided" in done.stdout


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(0, "families"), (1, "verify bad --source in --level bits"), (2, "nonsense"), (2, "inspect nowhere")],
)
def test_the_process_ends_with_the_code_of_the_command(code: int, arguments: str, tiny: Path) -> None:
    done, here = run(*arguments.split(), cwd=tiny), program(*arguments.split(), cwd=tiny)
    assert done.returncode == here.returncode == code
    said = [re.sub(r"(?m)^  seconds .*$", "", x.stdout + x.stderr) for x in (done, here)]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("convert a --json", True),
        ("verify out --json", True),
        ("verify out --json --level bits", True),
        ("verify out --json -", True),
        ("verify out --json=-", True),
        ("verify out --json file", False),
        ("verify out --json=file", False),
        ("verify out", False),
    ],
)
def test_errors_are_json_where_json_goes_to_stdout(arguments: str, wanted: bool) -> None:
    assert wants_json(arguments.split()) is wanted


# --- defects --------------------------------------------------------------------------------------------

DEFECTS = {
    "inspect in": "ckpt_tool.inspect.inspect",
    "plan auto --in in": "ckpt_tool.api.plan",
    "convert auto --in in --out new": "ckpt_tool.convert.execute.Run._carry",
    "verify out --source in --level bits": "ckpt_tool.verify.bits.bits",
    "verify out --source in --level parity": "ckpt_tool.verify.compute.lockstep",
    "families": "ckpt_tool.convert.families.family",
    "fixtures mistral-float32 --out new": "ckpt_tool.convert.places.free_place",
    "gate parity.toml": "ckpt_tool.verify.gate.read_gate",
}
RAISED = ["ZeroDivisionError('by a\\x1b[31m zero')", "SystemExit(1)", "RecursionError()", "Alien('panicked')"]


def defect(place: str, raised: str) -> str:
    module, _, name = place.rpartition(".")
    return (
        "class Alien(BaseException): pass\n"  # as libraries in other languages raise
        f"def broken(*a, **k): raise {raised}\n"
        f"import pkgutil\nsetattr(pkgutil.resolve_name({module!r}), {name!r}, broken)\n{MAIN}"
    )


@pytest.mark.parametrize("command", DEFECTS)
def test_a_defect_is_an_error_of_its_own(command: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> None:
        raise ZeroDivisionError("by a\x1b[31m zero")

    if command == "inspect in":  # by a process too
        done = run(*command.split(), script=defect(DEFECTS[command], RAISED[0]), cwd=tiny)
    else:
        monkeypatch.setattr(DEFECTS[command], broken)
        done = program(*command.split(), cwd=tiny)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    first, second = done.stderr.strip().splitlines()
    assert first.startswith(
        "error[internal]: expected to go on, found ZeroDivisionError: by a\\x1b[31m zero ("
    )
    assert "CKPT_TOOL_TRACEBACK=1" in second and "report" in second
    assert not [p for p in tiny.iterdir() if p.name not in ("in", "out", "bad")]


@pytest.mark.parametrize("raised", RAISED[1:])
def test_whatever_is_raised_is_no_difference(raised: str, tiny: Path) -> None:
    script = defect(DEFECTS["inspect in"], raised)
    done = run("inspect", "in", "--json", script=script, cwd=tiny)
    assert done.returncode == 2 and json.loads(done.stdout)["error"] == "internal"


@pytest.mark.parametrize("how", ["environment", "--verbose"])
def test_the_traceback_is_there_for_who_asks(how: str, tiny: Path) -> None:
    script = defect(DEFECTS["convert auto --in in --out new"], RAISED[0])
    arguments = ["convert", "auto", "--in", "in", "--out", "new", *([how] if how != "environment" else [])]
    environment = {**os.environ, **({"CKPT_TOOL_TRACEBACK": "1"} if how == "environment" else {})}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=tiny, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and "Traceback" in done.stderr and "in broken" in done.stderr


# --- pipes and streams ----------------------------------------------------------------------------------

TALKING = ["families", "fixtures --json", "inspect in --all", "plan auto --in in --json", "--help"]


@pytest.mark.parametrize(
    "command",
    [*TALKING, "convert auto --in in --out new", "verify bad --source in --level bits"],
)
def test_a_pipe_that_nobody_reads_ends_with_141(command: str, tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*command.split(), cwd=tiny, stdout=writer)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_head_takes_its_line_and_the_rest_goes_nowhere(tmp_path: Path) -> None:
    """Of more lines than a pipe (64 KiB) and head (at most 128 KiB at once) take: all of fewer may be in the
    pipe before head goes away."""
    lines = {f"model.layers.{k}.{'long_' * 20}name.weight": np.zeros(1, "u1") for k in range(3000)}
    (tmp_path / "many").mkdir()
    save_file(lines, tmp_path / "many" / "model.safetensors")
    text = " ".join([*PROGRAM, "inspect many --all | head -1; echo ${PIPESTATUS[0]}"])
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "many\n141\n" and done.stderr == ""


@pytest.mark.parametrize("command", ["convert auto --in nowhere --out new", "nonsense"])
def test_an_error_that_nobody_can_read_ends_with_141_too(command: str, tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*command.split(), cwd=tiny, stderr=writer)
    os.close(writer)
    assert done.returncode == 141 and done.stdout == ""


@pytest.mark.parametrize(
    ("closed", "command", "code"),
    [
        (">&-", "families", 141),
        (">&-", "inspect in --json", 141),
        (">&- 2>&-", "families --json", 141),
        (">&- <&- 2>&-", "convert auto --in in --out new", 141),
        ("2>&-", "families", 0),
        ("2>&- <&-", "convert auto --in in --out new", 0),
        ("2>&-", "inspect nowhere", 2),
        ("<&-", "inspect nowhere", 2),
        (">/dev/full", "families", 2),
        (">/dev/full", "inspect in --json", 2),
        ("2>/dev/full", "families", 0),
        ("2>/dev/full", "inspect nowhere", 2),
    ],
)
def test_streams_that_are_closed_at_the_start(closed: str, command: str, code: int, tiny: Path) -> None:
    text = f"{' '.join(PROGRAM)} {command} {closed}"
    done = subprocess.run(["bash", "-c", text], cwd=tiny, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    if closed == ">/dev/full":
        assert done.stderr == "error[write-failed]: stdout: cannot be written: No space left on device\n"
    if "--out new" in command:  # no file of the output was taken for a stream
        assert program("verify", "new", "--source", "in", "--level", "bits", cwd=tiny).returncode == 0


# --- signals --------------------------------------------------------------------------------------------

# With two finished shards it waits, until it is stopped or the file is there that its environment names.
SLOW = """
import os
from ckpt_tool.convert.execute import Run
real = Run._carry
def slow(run, *a):
    while len(run.targets) >= 2 and not os.path.exists(os.environ["GO_ON"]) and not run.stopping.wait(0.01):
        pass
    real(run, *a)
Run._carry = slow
"""
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
SHARDED = ["--max-shard-size", "60KB", "--jobs", "1", "--no-verify"]


def go_on(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-goes-on")


def started(source: Path, folder: Path, *more: str, ignored: int | None = None) -> subprocess.Popen[str]:
    """A conversion with two finished shards, which waits for `go_on(folder)`."""

    def ignore() -> None:
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    command = ["convert", "auto", "--in", str(source), "--out", str(folder / "out"), *SHARDED, *more]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW + MAIN, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore,
        env={**os.environ, "GO_ON": str(go_on(folder))},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        journals = list(folder.glob(".*.journal"))
        if journals and journals[0].read_bytes().count(b"\n") >= 3:
            return child
        time.sleep(0.01)
    child.kill()
    raise AssertionError(child.communicate())


@pytest.mark.parametrize(("number", "code"), [*SIGNALS, (signal.SIGKILL, -9)])
def test_a_signal_keeps_what_is_finished_for_resume(
    number: signal.Signals, code: int, originals: Written, tmp_path: Path
) -> None:
    source = originals("mistral-7b-v0.3")
    child = started(source, tmp_path)
    child.send_signal(number)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == code and out == "" and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    if code > 0:
        assert f"error[interrupted]: stopped by {number.name}" in errors and "--resume" in errors
    again = ["convert", "auto", "--in", str(source), "--out", str(tmp_path / "out"), *SHARDED]
    done = program(*again, "--resume", "--json", cwd=tmp_path)
    assert done.returncode == 0 and len(json.loads(done.stdout)["resumed"]) >= 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert program("verify", "out", "--source", str(source), "--level", "bits", cwd=tmp_path).returncode == 0


def test_the_interrupt_is_told_as_json(originals: Written, tmp_path: Path) -> None:
    child = started(originals("mistral-7b-v0.3"), tmp_path, "--json")
    child.send_signal(signal.SIGTERM)
    out, errors = child.communicate(timeout=60)
    told = json.loads(out)
    assert child.returncode == 143 and told["error"] == "interrupted" and errors == ""
    assert "--resume" in told["problems"][0]["hint"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    number: signal.Signals, originals: Written, tmp_path: Path
) -> None:
    child = started(originals("mistral-7b-v0.3"), tmp_path, ignored=number)
    child.send_signal(number)
    go_on(tmp_path).touch()
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0 and errors == "" and (tmp_path / "out" / "config.json").exists()


def test_a_group_that_gets_the_signal_twice_ends_as_with_one(originals: Written, tmp_path: Path) -> None:
    child = started(originals("mistral-7b-v0.3"), tmp_path)
    for _ in range(5):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and "--resume" in errors


WAITING = {
    "while comparing with the source": "import ckpt_tool.verify.bits as m\nm.compare = wait\n",
    "while computing": "import ckpt_tool.verify.compute as m\nm.lockstep = wait\n",
}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("place", WAITING)
def test_a_signal_ends_a_verification(place: str, number: signal.Signals, code: int, tiny: Path) -> None:
    script = (
        "import time\ndef wait(*a, **k):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        + WAITING[place]
        + MAIN
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "verify", "out", "--source", "in"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "waiting\n"
    child.send_signal(number)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == code and out == ""
    assert errors.strip() == f"error[interrupted]: stopped by {number.name}"


@pytest.mark.parametrize("module", ["click", "ckpt_tool.cli", "rich.console", "numpy"])
def test_an_interrupt_while_the_program_is_loading(
    module: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # where no terminal is nothing loads rich
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n" + MAIN
    )
    done = run("inspect", "in", script=script, cwd=tiny)
    assert done.returncode == 130 and done.stderr.strip() == "error[interrupted]: stopped by SIGINT"


@pytest.mark.parametrize("place", ["leave", "gc.freeze"])
def test_an_interrupt_while_the_program_ends_is_no_difference(place: str, tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom ckpt_tool import program\n"
        f"program.{place} = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = run("inspect", "nowhere", script=script + MAIN, cwd=tmp_path)
    assert done.returncode == 143 and "Traceback" not in done.stderr


# --- packages that are not installed --------------------------------------------------------------------

BLOCKER = """
import os, sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in os.environ.get("BLOCKED", "").split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def without(packages: str, *arguments: str, cwd: Path) -> Any:
    environment = {**os.environ, "BLOCKED": packages}
    return run(*arguments, script=BLOCKER + MAIN, cwd=cwd, env=environment)


def test_without_torch_the_bits_are_still_compared(tiny: Path) -> None:
    done = without("torch", "verify", "out", "--source", "in", "--json", cwd=tiny)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["status"] == "pass"
    assert "parity not shown" in report["headline"] and "'ckpt-tool[verify]'" in report["headline"]
    (parity,) = [f for f in report["findings"] if f["level"] == "parity"]
    assert parity["status"] == "skipped" and parity["data"]["kind"] == "missing-package"
    assert {f["status"] for f in report["findings"] if f["level"] == "bits"} >= {"pass"}
    assert without("torch", "verify", "bad", "--source", "in", cwd=tiny).returncode == 1


@pytest.mark.parametrize(
    ("packages", "asked", "extra"),
    [
        ("torch", "--level parity", "verify"),
        ("torch", "--level documented --checkpoint-id x/y", "verify"),
        ("torch", "--against transformers", "verify"),
        ("transformers", "--level coverage --against transformers", "hf"),
    ],
)
def test_what_was_asked_for_by_name_and_needs_a_missing_package(
    packages: str, asked: str, extra: str, tiny: Path
) -> None:
    done = without(packages, "verify", "out", "--source", "in", *asked.split(), "--json", cwd=tiny)
    report = json.loads(done.stdout)
    assert done.returncode == 2 and report["status"] == "undecided"
    assert f"pip install 'ckpt-tool[{extra}]'" in report["headline"]


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("numpy", "inspect in"),
        ("numpy", "convert auto --in in --out new"),
        ("rich", "families"),
        ("click", "families"),
        ("huggingface_hub", "inspect hf://a/b"),
        ("huggingface_hub", "convert auto --in hf://a/b --out new"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    package: str, command: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # where no terminal is nothing asks for rich
    done = without(package, *command.split(), cwd=tiny)
    assert done.returncode == 2
    first, hint = done.stderr.strip().splitlines()
    assert first.startswith("error[missing-package]: ")
    assert first.endswith(f"expected the package {package}, found none")
    assert hint == f"  hint: pip install {package}"


def test_converting_needs_none_of_the_large_packages(tiny: Path) -> None:
    blocked = "torch,transformers,sentencepiece,huggingface_hub"
    done = without(blocked, "convert", "auto", "--in", "in", "--out", "new", cwd=tiny)
    assert done.returncode == 0 and (tiny / "new" / "tokenizer.json").exists()


def test_an_import_that_fails_inside_is_a_defect_and_no_missing_package(tiny: Path) -> None:
    done = without("ckpt_tool.inspect", "inspect", "in", cwd=tiny)  # blocks nothing: names are whole packages
    assert done.returncode == 0
    done = without("zlib", "inspect", "in", cwd=tiny)
    assert done.returncode == 2 and "error[internal]" in done.stderr and "zlib" in done.stderr


def test_a_library_that_finds_no_room_is_out_of_memory_and_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    named = ImportError(str(error), name="torch")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (400_000_000, resource.RLIM_INFINITY))
    assert [as_told(e).kind for e in (error, named)] == ["out-of-memory"] * 2
    with pytest.raises(ImportError):
        not_run("parity", "lockstep", named)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert [as_told(e).kind for e in (error, named)] == ["internal", "missing-package"]


@pytest.mark.parametrize("limit", [60_000, 95_000])
def test_no_room_to_load_numpy_is_no_difference(limit: int, tmp_path: Path) -> None:
    """OpenBLAS ends the process with exit code 1 there, which is that of a difference."""
    script = f"ulimit -v {limit}; exec {sys.executable} -m ckpt_tool verify {tmp_path} --source {tmp_path}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error[out-of-memory]: expected enough memory for the work")
