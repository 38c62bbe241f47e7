"""`ckpt-tool.json`: what a conversion read, did and wrote. It holds no times, and no path but the way from
the output to the source, so equal inputs in equal places give equal bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import chain, islice
from json.encoder import encode_basestring_ascii
from typing import Any

from ckpt_tool import __version__
from ckpt_tool.checkpoint.base import Checkpoint, TensorFile
from ckpt_tool.checkpoint.strict_json import members
from ckpt_tool.convert.plan import ASKED, OutputDocument, Plan
from ckpt_tool.convert.steps import as_steps
from ckpt_tool.convert.widths import rounds
from ckpt_tool.records import dataclass

MANIFEST = "ckpt-tool.json"
CERTIFICATE = "ckpt-tool.certificate.json"  # which is made of an output later, see verify.certificate
LISTS_SUFFIX = ".lists.jsonl"  # of the file beside a certificate that has very many entries
CERTIFICATE_LISTS = CERTIFICATE.removesuffix(".json") + LISTS_SUFFIX
MANIFEST_VERSION = 1
MANIFEST_BYTES = 256 << 20  # that are read: half a million tensors have 140 MB
FINDINGS = (
    "non-finite",
    "all-zero",
    "denormal-only",
    "odd-scales",
    "replica-difference",
    "unchecked-records",
    "stale-frequencies",
)


@dataclass(frozen=True)
class Finding:
    """Something about the data that the reader of the result should know, and that did not stop the work.

    `kind` is one of `FINDINGS`; `details` holds the numbers (counts, the first index, the largest difference,
    file names).
    """

    kind: str
    message: str
    file: str
    tensor: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "message": self.message,
            "file": self.file,
            "tensor": self.tensor,
            "details": dict(self.details),
        }


def headers_digest(file: TensorFile) -> str:
    """SHA-256 of all that a file's headers say: tensors in order, and what is told of their bytes (as a rule
    records with their checksums)."""
    import hashlib  # and with it OpenSSL, 2 ms: for who asks for a digest

    digest = hashlib.sha256(file.format.encode())
    tensors = ((t.name, t.dtype, t.shape) for t in file.tensors.values())
    texts = map(repr, chain(tensors, file.told()))
    while some := "".join(islice(texts, 1000)):
        digest.update(some.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _source_entries(checkpoint: Checkpoint, headers: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "file": f.name,
            "format": f.format,
            "bytes": _bytes_of(f),
            "tensors": len(f.tensors),
            "headers_sha256": headers[f.name],
        }
        for f in checkpoint.files.values()
    ]


def _bytes_of(file: TensorFile) -> int:
    """The bytes of a file's tensors: unlike the size of the file it does not depend on archives around it."""
    return sum(t.nbytes for t in file.tensors.values())


def manifest(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    plan_digest: str,
    headers: Mapping[str, str],
    sources: Mapping[tuple[str, str], int],
    targets: Mapping[str, Mapping[str, int]],
    sizes: Mapping[str, int],
    sha256: Mapping[tuple[str, str], str],
    findings: Iterable[Finding],
    documents: Iterable[OutputDocument],
    source: str | None,
) -> dict[str, Any]:
    """The manifest. `source` is the address of the source, or its path from the output where that is text.
    `headers` are the source files' `headers_digest`, `sources` (CRC32) and `sha256` are by (file, tensor),
    `targets` are CRC32s by file and tensor, `sizes` those of the output files."""
    entries = _source_entries(checkpoint, headers)
    known: dict[str, dict[str, str]] = {entry["file"]: {} for entry in entries}
    for (file, name), crc in sources.items():
        known.setdefault(file, {})[name] = f"{crc:08x}"
    for entry in entries:
        entry["crc32"] = known[entry["file"]]
    findings = list(findings)
    return {
        "manifest_version": MANIFEST_VERSION,
        "tool": "ckpt-tool",
        "version": __version__,
        "family": plan.family,
        "direction": plan.direction,
        "plan": plan_digest,
        "options": _options(plan),
        "config": {k: {"value": v.value, "source": v.source} for k, v in plan.config.items()},
        "source": source,
        "sources": entries,
        "original": dict(plan.original),
        "outputs": [{"file": f.name, "format": f.format, "bytes": sizes[f.name]} for f in plan.outputs],
        "tensors": _tensor_entries(plan, targets, sha256),
        "documents": [{"file": d.name, "sha256": d.sha256, "source": d.source} for d in documents],
        "dropped": [
            {"file": d.tensor.file, "tensor": d.tensor.name, "bytes": d.tensor.nbytes, "reason": d.reason}
            for d in plan.dropped
        ],
        "lossy": list(plan.lossy),
        "notes": list(plan.notes),
        **({"foretold": [f.to_json() for f in plan.foretold]} if plan.foretold else {}),
        "replicas": [
            {"name": f.tensor, "file": f.file, **f.details}
            for f in findings
            if f.kind == "replica-difference"
        ],
        "findings": [f.to_json() for f in findings],
    }


def _tensor_entries(
    plan: Plan, targets: Mapping[str, Mapping[str, int]], sha256: Mapping[tuple[str, str], str]
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for output in plan.outputs:
        if not output.constants and not sha256:  # nearly always, and as below
            file, crcs = output.name, targets[output.name]
            made += [
                {"name": n, "file": file, "dtype": t.dtype, "shape": list(t.shape), "crc32": f"{crcs[n]:08x}"}
                for t in output.tensors
                for n in (t.name,)
            ]
            continue
        constants = {name: zlib.crc32(data) for name, _, _, data in output.constants}
        for t in output.held:
            entry = {"name": t.name, "file": output.name, "dtype": t.dtype, "shape": list(t.shape)}
            crc = constants[t.name] if t.name in constants else targets[output.name][t.name]
            entry["crc32"] = f"{crc:08x}"
            if (output.name, t.name) in sha256:
                entry["sha256"] = sha256[output.name, t.name]
            made.append(entry)
    return made


def _options(plan: Plan) -> dict[str, Any]:
    """The options that made this plan, as far as it tells them."""
    # a comparison rounds only where that was asked for; without it is made in the wider dtype of the two
    cast = {
        s.targets[0].dtype
        for s in as_steps(plan.steps).templates
        for p in s.sources
        if p.dtype != s.targets[0].dtype and (not s.compare or rounds(p.dtype, s.targets[0].dtype))
    }
    return {
        "dtype": cast.pop() if len(cast) == 1 else None,
        "drop": [d.tensor.name for d in plan.dropped if d.reason == ASKED],
        "strict_replicas": plan.strict_replicas,
        **plan.asked,
    }


def members_of(content: bytes) -> Iterator[tuple[str, Any]]:
    """The keys and values of a manifest as read; a model of very many tensors has a long list of them, whose
    entries come one at a time as `tensors[]`."""
    return members(
        content, file=MANIFEST, max_bytes=MANIFEST_BYTES, held=False, wide=True, listed=("tensors",)
    )


def as_document(content: Mapping[str, Any]) -> bytes:
    """What `json.dumps` with an indent of one makes, without its generators: a quarter of the time."""
    return (_indented(content, "\n") + "\n").encode()


_plain = json.JSONEncoder().encode


def _indented(value: Any, line: str) -> str:
    """`line` begins a line around it."""
    inner = line + " "
    if isinstance(value, dict) and value:
        text = encode_basestring_ascii  # of nearly all keys and most values
        items = [
            f"{text(k) if type(k) is str else _key(k)}: {text(v) if type(v) is str else _indented(v, inner)}"
            for k, v in value.items()
        ]
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(value, list | tuple) and value:
        if _are_tensors(value):
            return f"[{inner}{f',{inner}'.join(_tensors(value, inner))}{line}]"
        several = [repr(v) if type(v) is int else _indented(v, inner) for v in value]
        return f"[{inner}{f',{inner}'.join(several)}{line}]"
    if type(value) is str:
        return encode_basestring_ascii(value)
    return repr(value) if type(value) is int else _plain(value)


_OF_TENSOR = ["name", "file", "dtype", "shape", "crc32"]


def _are_tensors(value: Sequence[Any]) -> bool:
    """Whether these are entries of `_tensor_entries`, of which a manifest has thousands."""
    return type(value[0]) is dict and all(type(v) is dict and list(v) == _OF_TENSOR for v in value)


def _tensors(entries: Iterable[dict[str, Any]], line: str) -> Iterator[str]:
    """The text of each: but for the name and the checksum they are alike."""
    alike: dict[tuple[str, str, tuple[int, ...]], str] = {}
    text, inner = encode_basestring_ascii, line + " "
    for entry in entries:
        name, file, dtype, shape, crc = entry.values()
        key = file, dtype, tuple(shape)
        if (middle := alike.get(key)) is None:
            told = _indented({"file": file, "dtype": dtype, "shape": shape}, line)
            middle = alike[key] = told[1 : -len(line) - 1]
        yield f'{{{inner}"name": {text(name)},{middle},{inner}"crc32": {text(crc)}{line}}}'


def _key(name: Any) -> str:
    return encode_basestring_ascii(name if isinstance(name, str) else _plain(name))
