"""Untrusted and broken input through the command line: the right kind and exit code, nothing left behind.

Every case runs the program in a child process with an address space limit and a time limit, and with a
marker file that any executed payload would create.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import program
from ckpt_tool.convert import disk
from ckpt_tool.fixtures.variants import VARIANTS
from tests import (
    test_archives,
    test_safetensors,
    test_tf_bundle,
    test_torch_legacy,
    test_torch_zip,
    test_unpickle,
    test_zip_reader,
)
from tests.forked import MOMENT, Forker
from tests.test_archives import special, tar_of

CLI = [sys.executable, "-m", "ckpt_tool"]
MEMORY = 250 << 20
SPACE = 6 << 30
SECONDS = 20.0  # of computing: on a busy machine it takes longer
TICKS = os.sysconf("SC_CLK_TCK")


def high_water(pid: int) -> int:
    """The most resident memory the program has had so far, in bytes; 0 before it runs and after it ends."""
    try:
        process = Path(f"/proc/{pid}")
        if b"ckpt_tool" not in (process / "cmdline").read_bytes():
            return 0
        found = re.search(r"VmHWM:\s*(\d+) kB", (process / "status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def computed(pid: int) -> float:
    """Seconds of CPU that the program has had so far; 0 after it ends."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime, proc(5)


@pytest.fixture(scope="module", autouse=True)
def forker() -> Iterator[None]:
    Run.forker = Forker()
    yield
    Run.forker.close()


def loaded(
    arguments: list[str], cwd: Path, environment: dict[str, str]
) -> tuple[int, Callable[[], int | None]]:
    """A child that loads the program itself: its process id, and what waits for it as `Forker.ended` does."""
    with open(cwd / "stdout", "wb") as out, open(cwd / "stderr", "wb") as err:
        child = subprocess.Popen(
            [*CLI, *arguments],
            cwd=cwd,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE)),
        )

    def ended() -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(MOMENT)
        return None

    return child.pid, ended


class Run:
    """One finished child: exit code, what it printed, peak resident bytes. With an `environment` of its own
    it loads the program anew."""

    forker: Forker

    def __init__(self, arguments: list[str], cwd: Path, environment: dict[str, str] | None = None) -> None:
        began = time.monotonic()
        if environment is None:
            pid, ended = self.forker.start(arguments, cwd, SPACE), self.forker.ended
        else:
            pid, ended = loaded(arguments, cwd, environment)
        self.peak = 0
        while (code := ended()) is None:
            # not ru_maxrss: it counts what this test process held when it forked
            self.peak = max(self.peak, high_water(pid))
            waited = time.monotonic() - began
            if waited > SECONDS and (computed(pid) > SECONDS or waited > 10 * SECONDS):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.code = code
        self.out = (cwd / "stdout").read_text(encoding="utf-8", errors="replace")
        self.err = (cwd / "stderr").read_text(encoding="utf-8", errors="replace")
        (cwd / "stdout").unlink()
        (cwd / "stderr").unlink()

    @property
    def kinds(self) -> set[str]:
        return {p["kind"] for p in json.loads(self.out)["problems"]}


def convert(cwd: Path, source: Path, *more: str, family: str = "auto") -> Run:
    return Run(["convert", family, "--in", str(source), "--out", "out", "--json", *more], cwd)


def assert_refused(run: Run, cwd: Path, *kinds: str) -> None:
    """Exit 2, one of `kinds`, no traceback, no output, no temporary folder, nothing executed."""
    assert run.code == 2, (run.code, run.out[-600:], run.err[-2000:])
    assert run.kinds & set(kinds), (run.kinds, run.out[-800:])
    assert "Traceback" not in run.err
    assert run.peak <= MEMORY, f"peak {run.peak >> 20} MiB"
    left = {p.name for p in cwd.iterdir()} - {"in"}
    assert not left, left


# --- builders -------------------------------------------------------------------------------------------


@pytest.fixture
def pth(tmp_path: Path, originals: Callable[[str], Path]) -> Path:
    """A private copy of a tiny Mistral original with consolidated.00.pth."""
    return Path(shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "in"))


@pytest.fixture
def st(tmp_path: Path, originals: Callable[[str], Path]) -> Path:
    """A private copy of a tiny Mistral original with consolidated.safetensors."""
    return Path(shutil.copytree(originals("mistral-7b-v0.3"), tmp_path / "in"))


@pytest.fixture
def sharded(tmp_path: Path, originals: Callable[[str], Path]) -> Path:
    """A private copy of a tiny Llama original of several model-parallel ranks."""
    return Path(shutil.copytree(originals("llama-2-70b"), tmp_path / "in"))


def weights(folder: Path) -> Path:
    return folder / "consolidated.00.pth"


def state(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(weights(folder), weights_only=True)
    return loaded


def save(folder: Path, content: Any) -> None:
    torch.save(content, weights(folder))


def rezip(path: Path, changes: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """The archive with the members whose names end with the given keys replaced (or added)."""
    with zipfile.ZipFile(path) as old:
        members = {n: old.read(n) for n in old.namelist()}
    prefix = next(iter(members)).split("/")[0]
    for key, data in changes.items():
        members[next((n for n in members if n.endswith(key)), f"{prefix}/{key}")] = data
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in members.items():
            new.writestr(name, data)


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del data[key]
        else:
            data[key] = value
    path.write_text(json.dumps(data))


class Payload:
    """What a malicious pickle carries: a call that would leave a marker."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


# --- pickles (rows 1-11) --------------------------------------------------------------------------------


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(pth: Path, tmp_path: Path) -> None:
    rezip(weights(pth), {"data.pkl": pickle.dumps({"norm.weight": Payload(os.system, "touch marker")}, 2)})
    run = convert(tmp_path, pth)
    assert_refused(run, tmp_path, "unsafe-pickle")
    assert "system" in run.out and "consolidated.00.pth" in run.out
    look = Run(["inspect", str(pth)], tmp_path)
    assert look.code == 2 and "system" in look.out and not (tmp_path / "marker").exists()


def test_the_same_in_a_legacy_stream(pth: Path, tmp_path: Path) -> None:
    torch.save(
        {"norm.weight": Payload(eval, "open('marker','w')")},
        weights(pth),
        _use_new_zipfile_serialization=False,
    )
    run = convert(tmp_path, pth)
    assert_refused(run, tmp_path, "unsafe-pickle")


def test_plain_data_beside_the_tensors_is_no_reason_to_refuse(pth: Path, tmp_path: Path) -> None:
    import argparse

    save(pth, {"model": state(pth), "args": argparse.Namespace(seed=1, name="x"), "iteration": 5})
    run = convert(tmp_path, pth)
    assert run.code in (0, 2), run.err
    if run.code == 2:  # a nested state dict is a layout of its own; never a crash, never a call
        assert run.kinds & {"unknown-family", "uncovered-tensors", "missing-tensor"}


def pickle_with(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


HOSTILE_PICKLES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "tuple-key": (
        pickle_with(b"}(K\x01\x85" + b"2\x86" * 60 + b"K\x01u"),
        ("unsafe-pickle", "bad-pickle", "pickle-limit"),
    ),
    "bytearray-8GiB": (
        pickle_with(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R"),
        ("unsafe-pickle", "pickle-limit", "bad-pickle"),
    ),
    "nesting": (pickle_with(b"]" * 100_000 + b"a" * 99_999), ("pickle-limit", "bad-pickle")),
    "string-4GB": (pickle_with(b"X\xff\xff\xff\xff"), ("pickle-limit", "bad-pickle")),
    "no-stop": (b"\x80\x02}", ("bad-pickle",)),
    "bad-memo": (pickle_with(b"h\x07"), ("bad-pickle",)),
    "underflow": (pickle_with(b"}s"), ("bad-pickle",)),
    "self-reference": (pickle_with(b"}q\x00X\x01\x00\x00\x00ah\x00s"), ("bad-pickle",)),
    "not-a-dict": (pickle_with(b"K\x01"), ("bad-pickle", "wrong-format", "unknown-family")),
    "shadowed-items": (
        pickle_with(b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb"),
        ("unsafe-pickle",),
    ),
    "empty": (b"", ("bad-pickle",)),
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles(case: str, pth: Path, tmp_path: Path) -> None:
    data, kinds = HOSTILE_PICKLES[case]
    rezip(weights(pth), {"data.pkl": data})
    assert_refused(convert(tmp_path, pth), tmp_path, *kinds)


def test_a_duplicate_key_is_refused(pth: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(weights(pth)) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    a, b = b"layers.0.attention.wq.weight", b"layers.1.attention.wq.weight"
    assert data.count(b) == 1
    rezip(weights(pth), {"data.pkl": data.replace(b, a)})
    assert_refused(convert(tmp_path, pth), tmp_path, "duplicate-tensor")


# --- tensors (rows 12-20) -------------------------------------------------------------------------------


def test_a_storage_shorter_than_its_tensor_is_refused(pth: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(weights(pth)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        data = archive.read(name)
    rezip(weights(pth), {"data/0": data[:-2]})
    assert_refused(convert(tmp_path, pth), tmp_path, "size-mismatch")


def test_odd_but_honest_views_convert_to_the_same_bytes(pth: Path, tmp_path: Path) -> None:
    plain = state(pth)
    assert convert(tmp_path, pth).code == 0
    expected = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out")
    odd = dict(plain)
    odd["layers.0.attention.wq.weight"] = plain["layers.0.attention.wq.weight"].T.contiguous().T
    wide = torch.zeros(
        plain["output.weight"].shape[0],
        plain["output.weight"].shape[1] + 3,
        dtype=plain["output.weight"].dtype,
    )
    wide[:, 2:-1] = plain["output.weight"]
    odd["output.weight"] = wide[:, 2:-1]
    save(pth, odd)
    assert convert(tmp_path, pth).code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_stride_0_expansion_is_refused(pth: Path, tmp_path: Path) -> None:
    content = state(pth)
    content["norm.weight"] = torch.ones(1, dtype=content["norm.weight"].dtype).expand(
        content["norm.weight"].shape
    )
    save(pth, content)
    assert_refused(convert(tmp_path, pth), tmp_path, "bad-view")


def test_complex_weights_are_refused(pth: Path, tmp_path: Path) -> None:
    content = state(pth)
    content["norm.weight"] = content["norm.weight"].to(torch.complex64)
    save(pth, content)
    assert_refused(convert(tmp_path, pth), tmp_path, "unsupported-dtype")


def test_big_endian_is_refused(pth: Path, tmp_path: Path) -> None:
    rezip(weights(pth), {"byteorder": b"big"})
    assert_refused(convert(tmp_path, pth), tmp_path, "unsupported-byteorder")


# --- files (rows 21-30) ---------------------------------------------------------------------------------

NOT_CHECKPOINTS: dict[str, bytes] = {
    "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "empty": b"",
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "text": b"hello\n" * 9,
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "tar of the first versions": tar_of(
        special("storages", tarfile.REGTYPE), special("tensors", tarfile.REGTYPE)
    ),
}


@pytest.mark.parametrize("case", NOT_CHECKPOINTS)
def test_files_that_are_no_checkpoints(case: str, pth: Path, tmp_path: Path) -> None:
    weights(pth).write_bytes(NOT_CHECKPOINTS[case])
    assert_refused(convert(tmp_path, pth), tmp_path, "wrong-format", "truncated")


def test_a_fifo_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "consolidated.00.pth")
    assert_refused(convert(tmp_path, tmp_path / "in"), tmp_path, "wrong-format")


@pytest.mark.parametrize("kind", ["pth", "st"])
@pytest.mark.parametrize("percent", [1, 25, 50, 99, 100])
def test_cut_files(kind: str, percent: int, tmp_path: Path, originals: Callable[[str], Path]) -> None:
    variant, name = {
        "pth": ("mistral-7b-v0.1", "consolidated.00.pth"),
        "st": ("mistral-7b-v0.3", "consolidated.safetensors"),
    }[kind]
    folder = Path(shutil.copytree(originals(variant), tmp_path / "in"))
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 1 if percent == 100 else size * percent // 100)
    run = convert(tmp_path, folder)
    assert_refused(run, tmp_path, "truncated", "bad-zip", "bad-safetensors", "wrong-format")
    assert name in run.out


def test_trailing_junk_is_refused(pth: Path, tmp_path: Path) -> None:
    with open(weights(pth), "ab") as f:
        f.write(b"junk" * 100)
    assert_refused(convert(tmp_path, pth), tmp_path, "trailing-data", "bad-zip")


def test_a_flipped_bit_in_tensor_data_is_caught_by_the_checksum(pth: Path, tmp_path: Path) -> None:
    data = bytearray(weights(pth).read_bytes())
    with zipfile.ZipFile(weights(pth)) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    data[info.header_offset + 200 + info.file_size // 2] ^= 0x10
    weights(pth).write_bytes(data)
    assert_refused(convert(tmp_path, pth), tmp_path, "checksum")


@pytest.mark.parametrize(
    "name", ["archive/../../x", "/etc/x", "archive\\..\\..\\x", "archive\\data.pkl", "archive/data.pkl"]
)
def test_zip_members_with_odd_or_repeated_names(name: str, pth: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(weights(pth)) as old:
        prefix = old.namelist()[0].split("/")[0]
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(weights(pth), "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name.replace("archive", prefix), b"x")
    assert_refused(convert(tmp_path, pth), tmp_path, "bad-zip")


def test_an_inflate_bomb_stops_early(pth: Path, tmp_path: Path) -> None:
    rezip(weights(pth), {"data.pkl": b"\0" * (80 << 20)}, zipfile.ZIP_DEFLATED)
    assert_refused(convert(tmp_path, pth), tmp_path, "zip-limit", "pickle-limit", "bad-zip")


# --- safetensors (rows 31-36) ---------------------------------------------------------------------------


def raw_safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD_SAFETENSORS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "header-past-end": (
        struct.pack("<Q", 1 << 40) + b"{}",
        ("bad-safetensors", "header-limit", "wrong-format", "truncated"),
    ),
    "not-json": (raw_safetensors(b"{nope    "), ("bad-safetensors",)),
    "overlap": (
        raw_safetensors(ONE + b',"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}', bytes(6)),
        ("bad-safetensors",),
    ),
    "hole": (
        raw_safetensors(ONE + b',"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', bytes(12)),
        ("bad-safetensors",),
    ),
    "trailing": (raw_safetensors(ONE + b"}", bytes(9)), ("bad-safetensors", "trailing-data")),
    "negative": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
        ("bad-safetensors",),
    ),
    "absurd": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[0,1152921504606846976],"data_offsets":[0,0]}}'),
        ("bad-safetensors",),
    ),
    "duplicate": (
        raw_safetensors(ONE + b"," + ONE[1:] + b"}", bytes(4)),
        ("bad-safetensors", "duplicate-tensor"),
    ),
    "extra-field": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', bytes(4)),
        ("bad-safetensors",),
    ),
    "escape-in-name": (
        raw_safetensors(b'{"a\\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ("bad-name", "bad-safetensors"),
    ),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(case: str, st: Path, tmp_path: Path) -> None:
    data, kinds = BAD_SAFETENSORS[case]
    (st / "consolidated.safetensors").write_bytes(data)
    run = convert(tmp_path, st)
    assert_refused(run, tmp_path, *kinds)
    assert "\x1b" not in run.out


# --- params.json and what it says (rows 37-46) ----------------------------------------------------------

BAD_PARAMS: dict[str, bytes] = {
    "empty": b"",
    "not-json": b"dim = 4096",
    "bom": b"\xef\xbb\xbf{}",
    "utf16": "{}".encode("utf-16"),
    "list": b"[1]",
    "duplicate": b'{"dim": 1, "dim": 2}',
    "nan": b'{"norm_eps": NaN}',
    "overflow": b'{"norm_eps": 1e999}',
    "digits": b'{"dim": ' + b"9" * 5000 + b"}",
    "nesting": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params(case: str, pth: Path, tmp_path: Path) -> None:
    (pth / "params.json").write_bytes(BAD_PARAMS[case])
    assert_refused(convert(tmp_path, pth, family="mistral"), tmp_path, "bad-config")


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"n_layers": True}, {"bad-config"}),
        ({"n_layers": "2"}, {"bad-config"}),
        ({"norm_eps": -1.0}, {"bad-config"}),
        ({"n_heads": 0}, {"config-mismatch"}),
        ({"n_heads": 2**62}, {"config-mismatch"}),
        ({"n_layers": 1}, {"uncovered-tensors"}),
        ({"n_layers": 99}, {"missing-tensor"}),
        ({"dim": 7}, {"config-mismatch"}),
        ({"hidden_dim": 7}, {"config-mismatch"}),
        ({"vocab_size": 7}, {"config-mismatch"}),
        ({"n_kv_heads": 5}, {"config-mismatch"}),
        ({"head_dim": 10}, {"config-mismatch"}),
        ({"rope_theta": 0}, {"bad-config"}),
        ({"rope_theta": "1e6"}, {"bad-config"}),
        ({"sliding_window": -1}, {"bad-config"}),
    ],
)
def test_params_that_disagree_with_the_tensors(
    changes: dict[str, Any], kinds: set[str], pth: Path, tmp_path: Path
) -> None:
    edit_json(pth / "params.json", **changes)
    run = convert(tmp_path, pth, family="mistral")
    assert_refused(run, tmp_path, *kinds)
    (field,) = changes
    if kinds == {"config-mismatch"}:
        assert field in run.out and str(changes[field]) in run.out


def test_missing_facts_are_asked_for_by_name(pth: Path, tmp_path: Path) -> None:
    edit_json(pth / "params.json", norm_eps=...)
    run = convert(tmp_path, pth, family="mistral")
    assert_refused(run, tmp_path, "missing-fact")
    assert "--set rms_norm_eps=" in run.out
    assert convert(tmp_path, pth, "--set", "rms_norm_eps=1e-5", family="mistral").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5


def test_an_unknown_tensor_is_refused_until_it_is_dropped_by_name(pth: Path, tmp_path: Path) -> None:
    save(pth, {**state(pth), "layers.0.attention.extra.weight": torch.ones(3, 4, dtype=torch.bfloat16)})
    run = convert(tmp_path, pth, family="mistral")
    assert_refused(run, tmp_path, "uncovered-tensors")
    assert "layers.0.attention.extra.weight" in run.out
    done = convert(tmp_path, pth, "--drop", "layers.0.attention.extra.weight", family="mistral")
    assert done.code == 0, done.err
    assert "attention.extra" in (tmp_path / "out" / "ckpt-tool.json").read_text()


def test_another_dtype_among_the_tensors_is_kept_and_told(pth: Path, tmp_path: Path) -> None:
    content = state(pth)
    content["layers.0.attention.wo.weight"] = content["layers.0.attention.wo.weight"].float()
    save(pth, content)
    run = convert(tmp_path, pth)
    assert run.code == 0 and "each tensor keeps its dtype" in " ".join(run.out.split())
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(file)["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32


def test_a_transposed_tensor_is_refused_with_both_shapes(pth: Path, tmp_path: Path) -> None:
    content = state(pth)
    before = content["layers.0.feed_forward.w1.weight"]
    content["layers.0.feed_forward.w1.weight"] = before.T.contiguous()
    save(pth, content)
    run = convert(tmp_path, pth, family="mistral")
    assert_refused(run, tmp_path, "shape-mismatch", "config-mismatch")
    assert str(before.shape[0]) in run.out and str(before.shape[1]) in run.out


def test_nan_weights_are_reported_and_refused_only_when_strict(pth: Path, tmp_path: Path) -> None:
    content = state(pth)
    content["layers.0.attention.wv.weight"][1, 2] = float("nan")
    save(pth, content)
    strict = convert(tmp_path, pth, "--strict")
    assert_refused(strict, tmp_path, "non-finite")
    run = convert(tmp_path, pth, "--no-verify")
    assert run.code == 0
    assert "non-finite" in run.out and "v_proj" in run.out
    assert Run(["verify", "out", "--level", "coverage"], tmp_path).code == 1


# --- shards (rows 48-51) --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_missing_shard_is_named(rank: int, sharded: Path, tmp_path: Path) -> None:
    (sharded / f"consolidated.{rank:02d}.pth").unlink()
    run = convert(tmp_path, sharded)
    assert_refused(run, tmp_path, "missing-shard")
    assert f"{rank:02d}" in run.out


def test_a_missing_last_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    last = max(sharded.glob("consolidated.*.pth"))
    last.unlink()
    assert_refused(convert(tmp_path, sharded), tmp_path, "missing-shard", "config-mismatch", "shard-conflict")


def test_a_shard_from_another_model_is_refused(
    sharded: Path, tmp_path: Path, originals: Callable[[str], Path]
) -> None:
    stranger = tmp_path / "stranger"
    written = VARIANTS["llama-2-70b"].write(stranger, seed=7)
    shutil.copy(written / "consolidated.01.pth", sharded / "consolidated.01.pth")
    shutil.rmtree(stranger)
    run = convert(tmp_path, sharded)
    assert_refused(run, tmp_path, "shard-conflict")
    assert "consolidated.01.pth" in run.out


def test_a_shard_of_another_size_is_refused(
    sharded: Path, tmp_path: Path, originals: Callable[[str], Path]
) -> None:
    shutil.copy(originals("llama-3-70b") / "consolidated.01.pth", sharded / "consolidated.01.pth")
    assert_refused(
        convert(tmp_path, sharded), tmp_path, "shard-conflict", "shape-mismatch", "config-mismatch"
    )


def test_two_formats_side_by_side_are_asked_about(pth: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, pth / "consolidated.safetensors")
    assert_refused(convert(tmp_path, pth), tmp_path, "ambiguous-input")


def test_a_garbage_tokenizer_is_refused(pth: Path, tmp_path: Path) -> None:
    (pth / "tokenizer.model").write_bytes(b"\xff" * 100)
    assert_refused(convert(tmp_path, pth), tmp_path, "bad-tokenizer")


# --- outputs and events (rows 57-73) --------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "folder", "empty folder"])
def test_an_existing_output_is_left_alone(what: str, pth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if what == "folder":
            (out / "mine").write_text("mine")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    run = convert(tmp_path, pth)
    assert run.code == 2 and run.kinds == {"output-exists"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_overwrite_replaces_an_existing_output(pth: Path, tmp_path: Path) -> None:
    assert convert(tmp_path, pth, "--dtype", "float32").code == 0
    before = (tmp_path / "out" / "config.json").read_bytes()
    assert convert(tmp_path, pth, "--overwrite").code == 0
    assert (tmp_path / "out" / "config.json").read_bytes() != before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("out", ["in/out", "in", "."])
def test_outputs_that_would_touch_the_input_are_refused(out: str, pth: Path, tmp_path: Path) -> None:
    run = Run(["convert", "auto", "--in", "in", "--out", out, "--overwrite", "--json"], tmp_path)
    assert run.code == 2 and run.kinds & {"output-conflict"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_missing_parent_is_refused(pth: Path, tmp_path: Path) -> None:
    run = Run(["convert", "auto", "--in", "in", "--out", "no/such/out", "--json"], tmp_path)
    assert_refused(run, tmp_path, "output-failed")


def test_a_missing_input_is_refused(tmp_path: Path) -> None:
    assert_refused(convert(tmp_path, tmp_path / "in"), tmp_path, "not-found")


def test_outputs_have_the_modes_that_the_umask_allows(pth: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert convert(tmp_path, pth).code == 0
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir() if p.is_file()} == {"0o640"}


def test_paths_with_odd_characters_and_a_plain_locale(pth: Path, tmp_path: Path) -> None:
    odd = tmp_path / "in" / ".." / "a b\nc é"
    shutil.copytree(pth, odd)
    run = Run(
        ["convert", "auto", "--in", str(odd), "--out", "out", "--json"],
        tmp_path,
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
    )
    assert run.code == 0, run.err


def test_few_file_descriptors_are_enough(sharded: Path, tmp_path: Path) -> None:
    script = f"ulimit -n 64; exec {sys.executable} -m ckpt_tool convert auto --in in --out out"
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# --- whatever a reader refuses --------------------------------------------------------------------------


def as_pth(pickled: bytes) -> dict[str, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in (("x/data.pkl", pickled), ("x/data/0", bytes(range(24))), ("x/version", b"3\n")):
            z.writestr(name, data)
    return {"consolidated.00.pth": out.getvalue()}


def listed() -> Iterator[tuple[str, dict[str, bytes], set[str]]]:
    """Every broken input of the readers' own tests: its name, its files, the kinds of the error."""
    for what, (pickled, kind, _) in test_torch_zip.HOSTILE.items():
        yield f"torch zip: {what}", as_pth(pickled), {kind}
    for what, (data, kind, _) in test_unpickle.HOSTILE.items():
        # in a file a pickle that ends early, or is followed by more, may be refused as that
        yield f"pickle: {what}", as_pth(bytes(data)), {kind, "bad-pickle", "truncated", "trailing-data"}
    for what, (data, kind, _) in test_torch_legacy.HOSTILE.items():
        yield f"legacy: {what}", {"consolidated.00.pth": data}, {kind}
    for what, (members, options, _) in test_zip_reader.BAD.items():
        yield f"zip: {what}", {"model.zip": test_zip_reader.build(*members, **options)}, {"bad-zip"}
    for what, data in test_archives.HOSTILE.items():
        yield f"tar: {what}", {"model.tar": data}, {"bad-tar", "tar-limit", "truncated"}
    for what, (data, _, _) in test_safetensors.HOSTILE.items():
        yield f"safetensors: {what}", {"model.safetensors": data}, {"bad-safetensors", "duplicate-tensor"}
    for what, (data, kind, _) in test_tf_bundle.HOSTILE.items():
        files = {"p.index": data, test_tf_bundle.DATA_FILE: test_tf_bundle.TINY_DATA}
        yield f"bundle: {what}", files, {kind}


LISTED = {name: (files, kinds) for name, files, kinds in listed()}


@pytest.mark.parametrize("what", LISTED)
def test_the_program_refuses_what_a_reader_refuses(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, kinds = LISTED[what]
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    given = source / next(iter(files)) if "model.tar" in files or "model.zip" in files else source
    assert program.run(["convert", "auto", "--in", str(given), "--out", "out", "--json"]) == 2
    told = capsys.readouterr().out
    assert {p["kind"] for p in json.loads(told)["problems"]} & kinds, told
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert not any(ord(c) < 32 and c != "\n" for c in told)


# --- more of each ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_every_protocol_are_read(protocol: int, pth: Path, tmp_path: Path) -> None:
    torch.save(state(pth), weights(pth), pickle_protocol=protocol)
    assert (
        program.run(["convert", "auto", "--in", str(pth), "--out", str(tmp_path / "out"), "--no-verify"]) == 0
    )


def test_two_names_of_one_storage_are_two_tensors(pth: Path, tmp_path: Path) -> None:
    content = state(pth)
    content["output.weight"] = content["tok_embeddings.weight"]
    save(pth, content)
    assert (
        program.run(["convert", "auto", "--in", str(pth), "--out", str(tmp_path / "out"), "--no-verify"]) == 0
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], content["tok_embeddings.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], content["tok_embeddings.weight"])


@pytest.mark.parametrize("what", ["socket", "folder"])
def test_what_is_no_file_is_not_read(what: str, pth: Path, tmp_path: Path) -> None:
    weights(pth).unlink()
    if what == "folder":
        weights(pth).mkdir()
        assert_refused(convert(tmp_path, pth), tmp_path, "wrong-format", "not-found")
        return
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(os.path.relpath(weights(pth)))
        assert_refused(convert(tmp_path, pth), tmp_path, "wrong-format", "not-found")


@pytest.mark.parametrize("where", ["the local header", "the directory"])
def test_a_flipped_bit_outside_of_the_data_is_found(where: str, pth: Path, tmp_path: Path) -> None:
    data = bytearray(weights(pth).read_bytes())
    at = data.index(b"PK\3\4", 100) + 14 if where == "the local header" else data.index(b"PK\1\2") + 16
    data[at] ^= 4  # in the checksum that it tells
    weights(pth).write_bytes(data)
    assert_refused(convert(tmp_path, pth), tmp_path, "bad-zip", "checksum")


def test_documents_that_are_missing_or_too_large(pth: Path, tmp_path: Path) -> None:
    os.truncate(pth / "params.json", 1 << 30)
    run = convert(tmp_path, pth, family="mistral")
    assert_refused(run, tmp_path, "bad-config")
    assert "params.json" in run.out
    (pth / "params.json").unlink()
    assert_refused(convert(tmp_path, pth, family="mistral"), tmp_path, "missing-fact", "bad-config")


def test_a_header_beyond_the_limit_is_not_read(st: Path, tmp_path: Path) -> None:
    with open(st / "consolidated.safetensors", "wb") as f:
        f.write(struct.pack("<Q", 40 << 20) + b"{")
        f.truncate(50 << 20)
    assert_refused(convert(tmp_path, st), tmp_path, "header-limit")


def test_an_index_leads_nowhere_else(tmp_path: Path, originals: Callable[[str], Path]) -> None:
    source = Path(shutil.copytree(originals("qwen2-0.5b"), tmp_path / "in"))
    (file,) = source.glob("*.safetensors")
    file.rename(tmp_path / "in" / "model-00001-of-00001.safetensors")
    homes = {"lm_head.weight": "../../etc/passwd"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    assert_refused(convert(tmp_path, source), tmp_path, "bad-index")


def test_one_shard_twice_is_refused(sharded: Path, tmp_path: Path) -> None:
    shutil.copy(sharded / "consolidated.01.pth", sharded / "consolidated.02.pth")
    assert_refused(convert(tmp_path, sharded), tmp_path, "shard-conflict")


def test_a_link_to_itself_is_refused_and_another_is_followed(pth: Path, tmp_path: Path) -> None:
    (pth / "loop").symlink_to("loop")
    assert_refused(convert(tmp_path, pth / "loop"), tmp_path, "bad-input", "not-found")
    (pth / "loop").unlink()
    elsewhere = pth / "elsewhere"
    weights(pth).rename(elsewhere)
    weights(pth).symlink_to("elsewhere")
    assert convert(tmp_path, pth).code == 0


def test_an_original_that_changes_meanwhile_is_not_published(
    pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = disk.fsync

    def sync(descriptor: int) -> None:
        with open(weights(pth), "r+b") as f:
            f.write(f.read(1))
            f.truncate(f.seek(0, 2) - 1)
        real(descriptor)

    monkeypatch.setattr(disk, "fsync", sync)
    assert program.run(["convert", "auto", "--in", str(pth), "--out", str(tmp_path / "out")]) == 2
    assert "error[input-changed]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_read_is_told_with_the_place(
    pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, size = os.preadv, weights(pth).stat().st_size

    def read(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if offset + sum(map(len, buffers)) > size // 2 and os.fstat(descriptor).st_size == size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset, *flags)

    def copy(*arguments: int) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "copy_file_range", copy)
    assert program.run(["convert", "auto", "--in", str(pth), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "error[read-failed]: consolidated.00.pth" in told and "Input/output error" in told
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_one_line(pth: Path, tmp_path: Path) -> None:
    script = f"ulimit -v 220000; exec {sys.executable} -m ckpt_tool verify out --source in --level parity"
    assert convert(tmp_path, pth).code == 0
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2, (run.stdout[-500:], run.stderr[-500:])
    assert "Traceback" not in run.stderr and "error[" in run.stderr
