"""More readers that are fuzzed: the values that a plan is made from, files that the tool wrote itself and
reads again, what a user writes for it, and ONNX files."""

from __future__ import annotations

import functools
import json
import os
import random
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.convert import claims, journal, kept, replaceable
from ckpt_tool.convert.durable import Identity
from ckpt_tool.errors import fail
from ckpt_tool.fixtures.variants import VARIANTS
from tests.fuzzing import Change, Files, Read, Target

SMALLEST = "qwen2-0.5b"
JSON = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"[1]", b"1e400", b"\\ud800", b"-0")
TOML = (
    b"[[check]]",
    b"[bars]",
    b"= ",
    b'"',
    b"'''",
    b"[",
    b"]",
    b"inf",
    b"nan",
    b"\n",
    b"true",
    b"{",
    b"0x1",
)


# --- right inputs ---------------------------------------------------------------------------------------


def _files(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@functools.cache
def _original(variant: str) -> Files:
    """The files of a tiny original that lie in one folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = VARIANTS[variant].write(Path(folder))
        return _files(path if path.is_dir() else path.parent)


@functools.cache
def _conversion(*, lists_apart: bool = False) -> Files:
    """A whole output, with its manifest and its certificate."""
    from ckpt_tool.verify import certificate, certificate_lists

    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        api.convert(VARIANTS[SMALLEST].write(source), out, family="qwen2", check=False)
        request = certificate.Request(levels=("coverage", "bits"))
        with mock.patch.object(certificate_lists, "INLINE", 0 if lists_apart else 30_000):
            made = certificate.certify(out, source, request)
        assert made.statement is not None
        files = _files(out) | {replaceable.CERTIFICATE: certificate.as_bytes(made.statement)}
        if made.lists is not None:
            files[replaceable.CERTIFICATE_LISTS] = b"".join(made.lists.pieces())
        return files


def in_lines(data: bytes, chance: random.Random, change: Change) -> bytes:
    """One line of a journal changed, its checksum made right."""
    lines = [line.partition(b" ")[2] for line in data.splitlines()]
    at = chance.randrange(len(lines))
    lines[at] = change(lines[at]).replace(b"\n", b" ")
    return b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)


IDENTITY = Identity("1", "a" * 64, {"model.pth": {"size": 12, "mtime_ns": 3}})


def _journal() -> bytes:
    entry = journal.Entry(
        {"model-00001-of-00002.safetensors": {"a.weight": 1, "b.weight": 0xFFFFFFFF}},
        {("model.pth", "a"): 7},
        {("model.pth", "a"): "0" * 64},
    )
    other = journal.Entry({"model-00002-of-00002.safetensors": {"c.weight": 5}})
    return b"".join(map(journal.line, (IDENTITY.to_json(), entry.to_json(), other.to_json())))


def _onnx() -> Files:
    """One weight in the graph, one in a file beside it."""
    from onnx import TensorProto, helper

    inside = helper.make_tensor(
        "inside", TensorProto.FLOAT, [3, 4], np.arange(12, dtype="<f4").tobytes(), raw=True
    )
    outside = helper.make_tensor("outside", TensorProto.INT64, [2], bytes(16), raw=True)
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "16"), ("length", "16")):
        entry = outside.external_data.add()
        entry.key, entry.value = key, value
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("MatMul", ["x", "inside"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [inside, outside])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return {"model.onnx": model.SerializeToString(), "model.onnx.data": bytes(range(32))}


GATE = b"""title = "one"
[bars]
nmse = 1e-10

[[check]]
name = "mistral"
source = "in"
out = "out"
convert = "mistral"
levels = ["coverage", "bits"]
require = ["bits"]
overwrite = true
settings = {rope_theta = 10000.0}
bars = {catch_rate = 1.0}
"""
BASELINE = json.dumps(
    {"reports": [{"title": "a", "exactness": "bits", "findings": [
        {"level": "parity", "check": "logits", "where": "x", "status": "pass", "measured": 1e-12,
         "message": "m", "data": {"differing": ["a"]}}]}]}
).encode()  # fmt: skip
CLAIM = json.dumps({"host": "here", "machine": "1 2", "process": 12, "started": "34", "beat": 1}).encode()


# --- what reads them ------------------------------------------------------------------------------------


def _named(
    name: str, file: str, data: bytes, read: Callable[[Path], object], words: tuple[bytes, ...]
) -> Target:
    """A reader of one file by its path."""

    def whole(folder: Path) -> Read | None:
        read(folder / file)
        return None

    return Target(name, {file: data}, (file,), whole, words=words)


def _planned(name: str, variant: str, changed: tuple[str, ...], **more: Any) -> Target:
    """From headers to a plan: the files of `changed` hold the values."""
    chosen = VARIANTS[variant]
    options = api.Options(settings=chosen.settings)

    def read(folder: Path) -> Read | None:
        with api.open_for(folder) as checkpoint:
            made = api.plan(checkpoint, family=chosen.family, options=options)
        assert made.digest()
        return None

    return Target(name, _original(variant), changed, read, words=JSON, **more)


def _read_back(folder: Path) -> Read | None:
    """A manifest, by both that read one."""
    with open_checkpoint(folder) as checkpoint:
        kept.read_manifest(checkpoint)
    replaceable.look(folder, "outputs")
    return None


def _read_journal(path: Path) -> None:
    """As a run does that resumes, which goes on without a word after what it does not believe."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lines = journal.read(descriptor)
        said, _ = next(lines, ({}, 0))
        if Identity.is_one(said):
            assert all(isinstance(text, str) for text in IDENTITY.differences(said))
        for content, _ in lines:
            try:
                made = journal.Entry.from_json(content)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                fail("bad-config", f"expected what is not refused by {error}")
            assert journal.Entry.from_json(made.to_json()) == made
    finally:
        os.close(descriptor)


def _read_claim(path: Path) -> None:
    if claims._owner(claims._read(path) or b"") == claims.Owner():
        fail("bad-config", "expected the owner of a claim, found none")


def _read_onnx(folder: Path) -> Read | None:
    from ckpt_tool.checkpoint.onnx_file import open_onnx

    file = open_onnx(folder / "model.onnx")
    found = {}
    try:
        for name, tensor in file.tensors.items():
            assert tensor.nbytes <= 1 << 20, f"{tensor} of an input of a few thousand bytes"
            data = bytearray(tensor.nbytes)
            file.read_into(name, 0, memoryview(data))
            found[name] = f"{list(tensor.shape)} ".encode() + data
    finally:
        file.close()
    return found


def _by_onnx(folder: Path) -> Read | None:
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(folder / "model.onnx")
        arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    except Exception:  # it refuses in many words
        return None
    return {n: f"{list(x.shape)} ".encode() + x.tobytes() for n, x in arrays.items()}


def _certificate(name: str, *, lists_apart: bool) -> Target:
    from ckpt_tool.verify.certificate_check import check

    files = _conversion(lists_apart=lists_apart)
    own = (replaceable.CERTIFICATE, replaceable.CERTIFICATE_LISTS)

    def read(folder: Path) -> Read | None:
        check(folder)
        return None

    return Target(name, files, tuple(n for n in own if n in files), read, words=JSON)


def _envelope() -> Target:
    """A signed certificate, but for the signature."""
    import base64

    from ckpt_tool.verify.signing import payload_of

    payload = base64.b64encode(b'{"_type": "x"}').decode()
    said = {
        "payloadType": "application/vnd.in-toto+json",
        "payload": payload,
        "signatures": [{"sig": "AAAA"}],
    }

    def read(path: Path) -> None:
        payload_of(parse_object(path.read_bytes(), file=path.name), path.name)

    return _named("envelope", "certificate.json", json.dumps(said).encode(), read, JSON)


def _gate() -> Target:
    from ckpt_tool.verify.gate import read_gate

    return _named("gate", "parity.toml", GATE, read_gate, TOML)


def _baseline() -> Target:
    from ckpt_tool.verify.baseline import read_baseline

    return _named("baseline", "report.json", BASELINE, read_baseline, JSON)


def _expectations() -> Target:
    from ckpt_tool.verify import expectations

    path = Path(expectations.__file__).parent / "mistral.json"
    return _named("expectations", "recorded.json", path.read_bytes(), expectations.read_file, JSON)


def _prompts() -> Target:
    from ckpt_tool.verify.prompts import read_prompts

    return _named("prompts", "prompts.json", b'{"a": [1, 2, 3], "b": [4]}', read_prompts, JSON)


def _plan_of_arguments() -> Target:
    from tests.fuzz_targets import in_pickle

    files = _original("gpt2-v1-bare")
    return _planned("plan-arguments", "gpt2-v1-bare", tuple(files), inner=in_pickle)


RECORDS: dict[str, Callable[[], Target]] = {
    "plan-config": lambda: _planned(
        "plan-config",
        SMALLEST,
        ("config.json", "config.json", "generation_config.json", "tokenizer_config.json"),
    ),
    "plan-params": lambda: _planned(
        "plan-params", "llama-3.2-1b", ("params.json", "params.json", "checklist.chk", "tokenizer.model")
    ),
    "plan-arguments": _plan_of_arguments,
    "manifest": lambda: Target("manifest", _conversion(), (replaceable.MANIFEST,), _read_back, words=JSON),
    "journal": lambda: Target(
        "journal",
        {"run.journal": _journal()},
        ("run.journal",),
        lambda folder: _read_journal(folder / "run.journal"),
        inner=in_lines,
        words=JSON,
    ),
    "claim": lambda: _named("claim", "1.claim", CLAIM, _read_claim, JSON),
    "certificate": lambda: _certificate("certificate", lists_apart=False),
    "certificate-lists": lambda: _certificate("certificate-lists", lists_apart=True),
    "envelope": _envelope,
    "gate": _gate,
    "baseline": _baseline,
    "expectations": _expectations,
    "prompts": _prompts,
    "onnx": lambda: Target(
        "onnx",
        _onnx(),
        ("model.onnx",),
        _read_onnx,
        outside=_by_onnx,
        words=(b"model.onnx.data", b"../x", b"-1"),
    ),
}
