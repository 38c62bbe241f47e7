"""Tiny originals and their conversions, made once a session."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import loaded

# The same examples on every machine, however slow or busy it is.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
# Workers, and programs that tests start by the hundred, find the tree compiled, whatever the shell says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits


def _keep_freed_memory() -> None:
    """Memory that was freed is used again and not given back: a pass over the long prompt frees and takes
    megabytes at each operation, and a third of its time would go into fresh pages. Of this process alone:
    programs that tests start allocate as they do for everybody."""
    trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
    with suppress(AttributeError):  # another C library
        for option in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


_keep_freed_memory()

SYNCS = {name: getattr(os, name) for name in ("fsync", "fdatasync")}


def _leave_writing_to_the_system() -> None:
    """No test loses power: what is written need not be on the disk before the next line. Of this process
    alone, and not of test_durable.py: programs that tests start sync as for everybody."""

    def sync(file: Any) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())  # it fails where the file is not open

    for name in SYNCS:
        setattr(os, name, sync)


_leave_writing_to_the_system()
gc.disable()  # until all tests are collected: of their ten thousand none is garbage

# The files that take longest, each some 10 seconds or more: dealt out first, so that no worker is left alone
# with one at the end; the others by what is written in them, the shortest last. By itself xdist begins with
# those of the most tests.
LONGEST = (
    "test_end_to_end.py", "test_documents.py", "test_saved_again.py", "test_exit_codes.py", "test_claims.py",
    "test_megatron_families.py", "test_json_memory.py", "test_diagnosis.py", "test_flaws.py",
    "test_workers.py", "test_device.py", "test_verify.py", "test_precisions.py", "test_quantised.py",
    "test_families_opt_codegen_qwen2.py", "test_plan_digests.py", "test_threats.py", "test_judges.py",
    "test_optimizer_buffers.py", "test_house_reference.py", "test_casts_verified.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False
    loaded.begin()


def pytest_unconfigure() -> None:
    loaded.end()


def pytest_collection(session: pytest.Session) -> None:
    """Every worker collects all tests, from modules that pytest compiles in its own way. Where nobody has
    done that yet each begins with another part of them, and finds the rest done by the others."""
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is None:
        return
    if session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    own, workers = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    modules = sorted(Path(__file__).parent.glob("test_*.py"))
    for module in modules[own * len(modules) // workers : (own + 1) * len(modules) // workers]:
        with suppress(Exception, pytest.skip.Exception):  # told of where it is collected
            import_module(f"tests.{module.stem}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}

    @cache
    def place(path: Path) -> tuple[int, int, str]:
        return places.get(path.name, len(LONGEST)), -path.stat().st_size, path.name

    items.sort(key=lambda item: place(item.path))


def pytest_collection_finish() -> None:
    """What has been collected stays, and nobody looks through it again for cycles; nor at every 700 objects
    for new ones, where a library's module makes a hundred thousand. Parity gives no memory back at its end:
    the next one takes as much."""
    if (compute := sys.modules.get("ckpt_tool.verify.compute")) is not None:
        compute.memory_at_hand = nullcontext  # type: ignore[attr-defined]
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


Written = Callable[[str], Path]
FEW_TOKENS = 150
SHARED_REAL = Path(__file__).parents[2] / "shared" / "real"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as small as those of the readings' tests only wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the fixed prompts, the longer one cut to a quarter, in a third of the time: for tests of what is
    found, since what two prompts show all of them do. That right models of every kind pass is shown
    with all (test_end_to_end.py)."""
    from ckpt_tool.verify import prompts

    every = prompts.fixed

    def few(vocab_size: int, *, bos: int | None = 1) -> dict[str, list[int]]:
        rows = every(vocab_size, bos=bos)
        return {"other": rows["other"], "long": rows["long"][:FEW_TOKENS]}

    monkeypatch.setattr(prompts, "fixed", few)


def touch(path: Path, accessed: int, written: int) -> None:
    """Set these times, in nanoseconds, of a file; that they were set shows in the time of its inode, of which
    the clock of many systems moves every few milliseconds only."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        os.utime(path, ns=(accessed, written))


def kind(folder: Path) -> str:
    """What a release makes of a folder, but for sizes and other numbers: two of one kind are loaded, computed
    and saved again alike."""

    def without_numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_numbers(v) for k, v in value.items()}
        if isinstance(value, list):
            return sorted({json.dumps(without_numbers(v)) for v in value})
        return "a number" if type(value) in (int, float) else value

    return json.dumps(without_numbers(json.loads((folder / "config.json").read_text())), sort_keys=True)


_numbers = itertools.count()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's, which looks through thousands of others for the next free number."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}-{next(_numbers)}"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this run, one for all its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


class Shared:
    """Folders that are made once, by whichever worker asks first, and that nobody changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: dict[Path, list[tuple[str, int, int]]] = {}
        root.mkdir(exist_ok=True)

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name; `make` lets it appear whole."""
        folder = self.root / name
        if folder not in self.seen:
            with open(self.root / f".{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.exists():
                    make(folder)
            self.seen[folder] = self.stamps(folder)
        return folder

    @staticmethod
    def stamps(folder: Path) -> list[tuple[str, int, int]]:
        """Name, size and time of every file."""
        files = ((str(p), p.stat()) for p in folder.rglob("*") if not p.is_dir())
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)

    def check(self) -> None:
        changed = [folder for folder, stamps in self.seen.items() if self.stamps(folder) != stamps]
        assert not changed, f"a test changed what all share: {changed}"


@pytest.fixture(scope="session")
def originals(shared_folder: Path) -> Iterator[Written]:
    """`originals(variant)`: the folder of that tiny original. Copy it before changing it."""
    from ckpt_tool.fixtures.variants import VARIANTS

    shared = Shared(shared_folder / "originals")
    known: dict[str, Path] = {}

    def written(variant: str) -> Path:
        if variant not in known:
            told = shared.root / f".{variant}.path"  # of what is to be converted, in the folder

            def make(folder: Path) -> None:
                begun = shared.root / ".begun" / variant
                path = VARIANTS[variant].write(begun)
                told.write_text(str(path.relative_to(begun)))
                begun.rename(folder)

            known[variant] = shared.get(variant, make) / told.read_text()
        return known[variant]

    yield written
    shared.check()


@pytest.fixture(scope="session")
def conversions(originals: Written, shared_folder: Path) -> Iterator[Written]:
    """`conversions(variant)`: its conversion to the Hugging Face layout. Copy it before changing it."""
    from ckpt_tool.api import Options, convert
    from ckpt_tool.fixtures.variants import VARIANTS

    shared = Shared(shared_folder / "conversions")

    def converted(variant: str) -> Path:
        def make(folder: Path) -> None:
            chosen = VARIANTS[variant]
            options = Options(settings=chosen.settings)
            convert(originals(variant), folder, family=chosen.family, options=options)

        return shared.get(variant, make)

    yield converted
    shared.check()


@pytest.fixture(scope="session")
def aidreams() -> Path:
    """Real trained weights (4 layers, float32) in the layout of a Llama 2 download."""
    folder = SHARED_REAL / "aidreams260K"
    if not folder.is_dir():
        pytest.skip("the real weights are not beside this checkout")
    return folder
