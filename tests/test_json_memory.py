"""Files that are small on the disk and large once parsed are refused before they are, by name and in bounded
memory; documents of the size that is published are not."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from ckpt_tool.checkpoint import strict_json
from ckpt_tool.errors import CkptToolError
from tests.forked import Forker
from tests.test_threats import Run as Measured

MEMORY = 250 << 20
BYTES = (16 << 20) - 64
LISTS = {
    "nested lists": "[[],[],[]],",
    "integers": "7,",
    "floats": "1.5,",
    "objects": '{"a":{}},',
    "empty objects": "{},",
    "strings": '"ab",',
}


@pytest.fixture(scope="module", autouse=True)
def forker() -> Iterator[None]:
    Run.forker = Forker()
    yield
    Run.forker.close()


class Run(Measured):
    """One finished command: exit code, what it printed, the most resident bytes it had."""

    @property
    def kinds(self) -> set[str]:
        found = json.loads(self.out)
        return {p["kind"] for p in found.get("problems", found.get("refused", []))}


@cache
def bomb(kind: str) -> str:
    if kind == "keys":
        return '{"x":{' + ",".join(f'"{k:x}":1' for k in range(1_250_000)) + "}}"
    if kind == "wide text":  # one character outside the BMP makes each of them take four bytes
        return '{"x":"\U0001f600' + "a" * (BYTES - 32) + '"}'
    unit = LISTS[kind]
    return '{"x":[' + unit * ((BYTES - 16) // len(unit)) + "0]}"


@pytest.mark.parametrize("kind", [*LISTS, "keys", "wide text"])
def test_params_of_16_mib_stay_within_bounds(
    kind: str, originals: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "in"))
    (source / "params.json").write_text(bomb(kind), encoding="utf-8")
    run = Run(["convert", "mistral", "--in", str(source), "--out", "out", "--json"], tmp_path)
    expected = "missing-fact" if kind == "wide text" else "bad-config"  # long text is no reason to refuse
    assert run.code == 2 and expected in run.kinds, (run.code, run.out[-500:], run.err[-500:])
    assert 0 < run.peak <= MEMORY, f"peak {run.peak >> 20} MiB"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "ckpt-tool.json"])
@pytest.mark.parametrize("kind", ["objects", "keys"])
def test_documents_of_an_output(
    name: str, kind: str, conversions: Callable[[str], Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(conversions("mistral-7b-v0.1"), tmp_path / "in"))
    (out / name).write_text(bomb(kind), encoding="utf-8")
    run = Run(["verify", str(out), "--no-source", "--level", "coverage"], tmp_path)
    assert run.code == 2 and "at most 128 MiB of memory" in run.err, (run.code, run.err[-500:])
    assert 0 < run.peak <= MEMORY, f"peak {run.peak >> 20} MiB"


def header(kind: str) -> str:
    if kind == "empty tensors":
        entries = (f'"{k:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for k in range(400_000))
        return "{" + ",".join(entries) + "}"
    if kind == "escaped fields":  # as many, and none that a search for the field would find
        entry = r'{"dtype":"U8","shape":[0],"data\u005foffsets":[0,0]}'
        return "{" + ",".join(f'"{k:x}":{entry}' for k in range(120_000)) + "}"
    if kind == "metadata":
        return '{"__metadata__":{' + ",".join(f'"{k:x}":""' for k in range(2_000_000)) + "}}"
    return '{"a":{"dtype":"U8","shape":[' + "0," * (12 << 20) + '0],"data_offsets":[0,0]}}'


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("empty tensors", "header-limit"),
        ("escaped fields", "header-limit"),
        ("metadata", "bad-safetensors"),
        ("dimensions", "bad-safetensors"),
    ],
)
def test_safetensors_headers(kind: str, error: str, tmp_path: Path) -> None:
    text = header(kind).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    run = Run(["inspect", "model.safetensors", "--json"], tmp_path)
    assert run.code == 2 and error in run.kinds, (run.code, run.out[-500:], run.err[-500:])
    assert 0 < run.peak <= MEMORY, f"peak {run.peak >> 20} MiB"


def test_a_vocabulary_of_published_size_is_read_quickly() -> None:
    vocab = [{"rank": k, "token_bytes": f"{k:012x}", "token_str": f"tok,{k}"} for k in range(150_000)]
    data = json.dumps({"config": {}, "vocab": vocab}, indent=1).encode()
    began = time.process_time()
    found = dict(strict_json.members(data, file="tekken.json", max_bytes=64 << 20))
    assert len(found["vocab"]) == 150_000 and time.process_time() - began < 10


def test_marks_inside_strings_weigh_nothing() -> None:
    text = '[{,:\\"' * 400_000
    assert strict_json.parse_object(json.dumps({"text": text}).encode(), file="x") == {"text": text}


def test_the_message_says_where_it_became_too_much() -> None:
    with pytest.raises(CkptToolError) as caught:
        strict_json.parse(b"[\n" + b"{}," * 2_000_000 + b"0]", file="x")
    assert "128 MiB of memory, found more at line 2" in caught.value.problems[0].message
