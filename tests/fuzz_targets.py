"""The readers that are fuzzed: a small right input of each, how it is read, and who else reads it."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ckpt_tool.checkpoint import tf_bundle_writer
from ckpt_tool.checkpoint.base import DTYPES, Given
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.safe_yaml import read_yaml
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.checkpoint.tf_coding import Box
from ckpt_tool.checkpoint.tf_table import entries as table_entries
from ckpt_tool.checkpoint.tf_table import table
from ckpt_tool.checkpoint.unpickle import read_pickle
from ckpt_tool.convert.dialects import entity_vocabulary
from ckpt_tool.convert.tokenizers import gpt2, sentencepiece, tekken, tiktoken, wordpiece
from ckpt_tool.fixtures import pickles, tokenizers, vocabularies
from ckpt_tool.fixtures.zero import Run, Weight
from ckpt_tool.verify.partitions import joined_anew
from tests.fuzz_records import RECORDS
from tests.fuzzing import Change, Files, Read, Target

MOST = 4 << 20  # bytes that a tensor of these inputs may come to
TENSORS: dict[str, torch.Tensor] = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.bias": torch.arange(5).to(torch.bfloat16),
    "c.flag": torch.tensor([True, False]),
    "d.count": torch.tensor(7),
    "e.half": torch.arange(6).half().reshape(2, 3).t(),
}


def contents(path: Path) -> Read:
    """Every tensor of the checkpoint there, read whole, and its documents."""
    found: dict[str, bytes] = {}
    checkpoint = open_checkpoint(path)
    try:
        for tensor in checkpoint:
            assert tensor.nbytes <= MOST, f"{tensor} of an input of a few thousand bytes"
            data = bytearray(tensor.nbytes)
            checkpoint.read_into(tensor, 0, memoryview(data))
            found[tensor.name] = _told(DTYPES[tensor.dtype].torch, tensor.shape, bytes(data))
        for file in checkpoint.files.values():
            list(file.told())
        for document in checkpoint.documents.values():
            document.read()
    finally:
        checkpoint.close()
    return found


def _told(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    return f"{dtype} {list(shape)} ".encode() + data


def _bits(value: torch.Tensor) -> bytes:
    flat = value.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensors(held: object) -> Read | None:
    """What torch or safetensors read, as `contents` tells it; None where that is no dict of tensors."""
    if not isinstance(held, dict) or not all(isinstance(v, torch.Tensor) for v in held.values()):
        return None
    made = {}
    for name, value in held.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            return None
        made[str(name)] = _told(str(value.dtype).removeprefix("torch."), tuple(value.shape), _bits(value))
    return made


def _by_torch(folder: Path) -> Read | None:
    try:
        return _tensors(torch.load(folder / "model.pth", map_location="cpu", weights_only=True))
    except Exception:  # it refuses in many words
        return None


def _by_safetensors(folder: Path) -> Read | None:
    try:
        return _tensors(load_safetensors((folder / "model.safetensors").read_bytes()))
    except Exception:
        return None


# --- what is inside -------------------------------------------------------------------------------------


def in_zip(data: bytes, chance: random.Random, change: Change) -> bytes:
    """One member changed, the archive packed again as it was."""
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        members = [(info, held.read(info)) for info in held.infolist()]
    at, out = chance.randrange(len(members)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for k, (info, content) in enumerate(members):
            made.writestr(info, change(content) if k == at else content, info.compress_type)
    return out.getvalue()


def in_pickle(data: bytes, chance: random.Random, change: Change) -> bytes:
    """The pickle of a torch zip changed, the rest where it was, its checksum made right."""
    start, stop = data.index(b"\x80\x02"), data.index(b"PK\x07\x08")
    inside = change(data[start:stop])[: stop - start].ljust(stop - start, b".")
    old, new = (zlib.crc32(x).to_bytes(4, "little") for x in (data[start:stop], inside))
    return (data[:start] + inside + data[stop:]).replace(old, new)


def in_gzip(data: bytes, chance: random.Random, change: Change) -> bytes:
    return gzip.compress(in_tar(gzip.decompress(data), chance, change), mtime=0)


def in_tar(data: bytes, chance: random.Random, change: Change) -> bytes:
    """One header changed and its checksum made right."""
    at = chance.choice([k for k in range(0, len(data), 512) if data[k + 257 : k + 262] == b"ustar"])
    block = bytearray(change(data[at : at + 512])[:512].ljust(512, b"\0"))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


def in_header(data: bytes, chance: random.Random, change: Change) -> bytes:
    """The header of a safetensors file changed, its length made right."""
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def in_table(data: bytes, chance: random.Random, change: Change) -> bytes:
    """An entry of a bundle's index changed, the checksums of its blocks right."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        source = ByteRange(Path(file.name), "index")
        try:
            held = dict(table_entries(source))
        finally:
            source.close()
    key = chance.choice(list(held))
    if chance.random() < 0.2:
        held[change(key)] = held.pop(key)
    else:
        held[key] = change(held[key])
    return table(sorted(held.items()))


# --- right inputs ---------------------------------------------------------------------------------------


def _torch_zip() -> bytes:
    out = io.BytesIO()
    torch.save(TENSORS, out)
    return out.getvalue()


def _legacy() -> bytes:
    """By the fixtures' writer: in torch's own the keys of storages are where these lay in memory."""
    names = {DTYPES[d].torch: d for d in DTYPES}
    tree = {
        n: (names[str(t.dtype).removeprefix("torch.")], tuple(t.shape), _bits(t)) for n, t in TENSORS.items()
    }
    made = {
        n: pickles.Tensor(dtype, shape, lambda data=data: [data]) for n, (dtype, shape, data) in tree.items()
    }
    return b"".join(pickles.legacy_stream(made))


def _nested() -> bytes:
    """A checkpoint of a trainer: options, and the model deeper in."""
    out = io.BytesIO()
    args = argparse.Namespace(num_layers=2, hidden_size=8, betas=(0.9, 0.95), name="x")
    torch.save({"args": args, "iteration": 3, "model": {"layers": TENSORS, "more": [torch.ones(2)]}}, out)
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, data, kind in (
            ("params.json", b'{"dim": 8, "n_layers": 2}', zipfile.ZIP_DEFLATED),
            ("consolidated.00.pth", _torch_zip(), zipfile.ZIP_STORED),
            ("tokenizer.model", b"words " * 40, zipfile.ZIP_DEFLATED),
        ):
            made.writestr(zipfile.ZipInfo(name), data, kind)
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, data in (
            ("d/params.json", b"{}"),
            ("d/consolidated.00.pth", _torch_zip()),
            ("d/" + "n" * 120, b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _bundle() -> Files:
    tensors = {n: tf_bundle_writer.Content.of(np.arange(k, dtype="<u4").reshape(k, 1), "F32") for n, k in
               (("bert/a", 3), ("bert/b", 1), ("cut", 4))}  # fmt: skip
    boxes: list[Box] = [((0, 2), (0, 1)), ((2, 2), (0, 1))]
    with tempfile.TemporaryDirectory() as folder:
        paths = tf_bundle_writer.write_bundle(
            Path(folder) / "model.ckpt", tensors, shards=2, slices={"cut": boxes}
        )
        return {p.name: p.read_bytes() for p in paths}


def _distributed() -> Files:
    """As torch writes it from one process, but for the number and the place that it notes."""
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is one process
        dcp.save(dict(TENSORS), checkpoint_id=folder, no_dist=True)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
        where = Path(folder).name.encode()
    return {
        name: re.sub(rb"[0-9a-f]{8}-[0-9a-f-]{27}", b"0" * 36, data).replace(where, b"t" * len(where))
        for name, data in files.items()
    }


def _index() -> Files:
    names = list(TENSORS)
    shards = {f"model-0000{k}-of-00002.safetensors": names[k - 1 :: 2] for k in (1, 2)}
    files = {f: save_safetensors({n: TENSORS[n].contiguous() for n in held}) for f, held in shards.items()}
    homes = {n: f for f, held in shards.items() for n in held}
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {"total_size": 99}, "weight_map": homes}
    ).encode()
    return files


def _pickled() -> bytes:
    import pickle

    value = {"a": [1, 2.5, "x", b"y", None, True], "b": {"c": (1 << 40, -1)}, "args": argparse.Namespace(n=3)}
    return pickle.dumps(value, protocol=4)


ENTITIES = b"".join(
    json.dumps({"id": k, "entities": [[name, None]], "count": 1}).encode() + b"\n"
    for k, name in enumerate(("[PAD]", "[UNK]", "[MASK]", "Rome", "Paris"))
)
YAML = b"model:\n  hidden_size: 8\n  layers: [1, 2]\n  name: 'x'\n  rate: 1.0e-4\n  on: true\nother: {a: 1}\n"
JSON = (
    b'{"dim": 4096, "n_layers": 32, "norm_eps": 1e-05, "rope": {"theta": 1e6}, "list": [1, "a", null, true]}'
)
WORDS = {
    "json": (
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\u0000",
        b"\\ud800",
        b"1e400",
        b"nul",
        b"\xef\xbb\xbf",
    ),
    "safetensors": (
        b'"dtype":"F64"',
        b'"shape":[0]',
        b'"data_offsets":[0,0]',
        b'"__metadata__":{}',
        b"[1,1,1,1,1]",
    ),
    "pickle": (
        b"(",
        b"}",
        b"]",
        b"t",
        b"u",
        b"R",
        b"b",
        b"q\x00",
        b"h\x00",
        b"\x8c\x01a",
        b"ctorch\nx\n",
        b".",
        b"\x85",
    ),
    "yaml": (b"&a", b"*a", b"!!x", b"- ", b": ", b"'", b"|\n", b"? ", b"\t", b"0x10", b"~", b"2001-01-01"),
}


def _document(
    name: str, file: str, data: bytes, parse: Callable[[bytes], object], words: str = "json"
) -> Target:
    def read(folder: Path) -> Read | None:
        parse((folder / file).read_bytes())
        return None

    return Target(name, {file: data}, (file,), read, words=WORDS[words])


def _checkpoint(name: str, file: str, data: bytes, **more: Any) -> Target:
    return Target(name, {file: data}, (file,), lambda folder: contents(folder / file), **more)


def _folder(name: str, files: Files, changed: tuple[str, ...], **more: Any) -> Target:
    return Target(name, files, changed, contents, **more)


def _gpt2() -> Target:
    files = vocabularies.gpt2_vocabulary(300)
    vocabulary, merges = sorted(files, key=lambda n: "merges" in n)

    def read(folder: Path) -> Read | None:
        vocab = gpt2.read_vocabulary((folder / vocabulary).read_bytes(), vocabulary)
        gpt2.read_merges((folder / merges).read_bytes(), merges, vocab)
        return None

    return Target("gpt2", files, tuple(files), read, words=WORDS["json"])


def _entities(data: bytes) -> object:
    """Both ways."""
    given = Given("entity_vocab.jsonl", Path("entity_vocab.jsonl"), len(data), data)
    with closing(entity_vocabulary.Vocabulary(given, 5).content) as made:
        written = bytes(made.size)
        return len(written)


def _with(files: Mapping[str, bytes], end: str) -> tuple[str, ...]:
    return tuple(n for n in files if n.endswith(end))


def _bundle_target() -> Target:
    files = _bundle()
    return _folder(
        "tf-bundle",
        files,
        (*_with(files, ".index"), *_with(files, ".index"), *_with(files, "2")),
        inner=in_table,
    )


def _distributed_target() -> Target:
    files = _distributed()
    return _folder("torch-dist", files, tuple(files), words=WORDS["pickle"])


def _indexed_target() -> Target:
    files = _index()
    return _folder("index", files, _with(files, ".json"), words=WORDS["json"])


def _zero() -> Files:
    """Two ranks of ZeRO 3: of a part that is not trained, a buffer, a parameter of two names."""
    weights = {
        n: Weight(s, bytes(range(4 * prod(s)))) for n, s in (("a", (3, 2)), ("b", (1,)), ("c", (2, 2)))
    }
    frozen = {"d": Weight((5,), bytes(range(10)), "BF16")}
    run = Run(3, 2, [weights], frozen, {"e": Weight((2,), bytes(16), "I64")}, {"f": "a"}, cut=2)
    with tempfile.TemporaryDirectory() as folder:
        return {p.name: p.read_bytes() for p in run.write(Path(folder)).iterdir()}


def _zero_target() -> Target:
    files = _zero()

    def read(folder: Path) -> Read:
        """As `contents`; whoever verifies reads the same bytes in another way."""
        found = contents(folder)
        with open_checkpoint(folder) as first:
            for tensor in (again := joined_anew(first)):
                data = again.read(tensor).tobytes()
                assert found[tensor.name] == _told(DTYPES[tensor.dtype].torch, tensor.shape, data)
        return found

    return Target("zero", files, tuple(sorted(files)), read, inner=in_zip, words=WORDS["pickle"])


TARGETS: dict[str, Callable[[], Target]] = {
    "safetensors": lambda: _checkpoint(
        "safetensors",
        "model.safetensors",
        save_safetensors({n: t.contiguous() for n, t in TENSORS.items()}),
        inner=in_header,
        outside=_by_safetensors,
        words=WORDS["safetensors"],
    ),
    "torch-zip": lambda: _checkpoint(
        "torch-zip", "model.pth", _torch_zip(), inner=in_pickle, outside=_by_torch, words=WORDS["pickle"]
    ),
    "torch-nested": lambda: _checkpoint(
        "torch-nested", "model.pth", _nested(), inner=in_pickle, words=WORDS["pickle"]
    ),
    "torch-legacy": lambda: _checkpoint(
        "torch-legacy", "model.pth", _legacy(), outside=_by_torch, words=WORDS["pickle"]
    ),
    "zip": lambda: _checkpoint("zip", "model.zip", _zip(), inner=in_zip),
    "tar": lambda: _checkpoint("tar", "model.tar", _tar(), inner=in_tar),
    "tar-gz": lambda: _checkpoint("tar-gz", "model.tar.gz", gzip.compress(_tar(), mtime=0), inner=in_gzip),
    "tf-bundle": _bundle_target,
    "torch-dist": _distributed_target,
    "zero": _zero_target,
    "index": _indexed_target,
    "pickle": lambda: _document(
        "pickle", "args.pkl", _pickled(), lambda d: read_pickle(d, file="args.pkl"), "pickle"
    ),
    "json": lambda: _document("json", "params.json", JSON, lambda d: parse_object(d, file="params.json")),
    "yaml": lambda: _document(
        "yaml", "model_config.yaml", YAML, lambda d: read_yaml(d, file="x.yaml"), "yaml"
    ),
    "sentencepiece": lambda: _document(
        "sentencepiece",
        "tokenizer.model",
        tokenizers.sentencepiece_model(300),
        lambda d: sentencepiece.convert(d, file="tokenizer.model"),
    ),
    "tekken": lambda: _document(
        "tekken", "tekken.json", tokenizers.tekken_json(300), lambda d: tekken.convert(d, file="tekken.json")
    ),
    "tiktoken": lambda: _document(
        "tiktoken",
        "tokenizer.model",
        tokenizers.tiktoken_model(520),
        lambda d: tiktoken.read_ranks(d, "tokenizer.model"),
    ),
    "wordpiece": lambda: _document(
        "wordpiece",
        "vocab.txt",
        vocabularies.wordpiece_vocabulary(320),
        lambda d: wordpiece.read(d, "vocab.txt"),
    ),
    "gpt2": _gpt2,
    "entities": lambda: _document("entities", "entity_vocab.jsonl", ENTITIES, _entities),
    **RECORDS,
}
