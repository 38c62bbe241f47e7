"""The digests of the plans of every tiny original, both ways and with the options that change a plan.

    .venv/bin/python tests/plan_digests.py          compares with data/plan_digests.json, exit code 1 if not
    .venv/bin/python tests/plan_digests.py --write  records what the plans are now

A digest covers all that a plan says: steps, values with their sources, notes, documents and files. A change
that is meant to alter no plan leaves the record as it is; one that is meant to records it anew, and the
review sees which plans it touches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.headers import REAL, write_sparse
from ckpt_tool.fixtures.variants import VARIANTS

RECORD = Path(__file__).parent / "data" / "plan_digests.json"


@dataclass(frozen=True)
class Way:
    """One plan of a variant: its direction, and the options beyond the variant's own settings."""

    to: str
    options: Options = field(default_factory=Options)


def _asked(**given: Any) -> Options:
    return Options(family_options=given)


FORTH = {
    "hf": Way("hf"),
    "hf cast in small files": Way("hf", Options(dtype="F16", max_shard_bytes=100_000)),
    "hf pooled": Way("hf", Options(gqa=1)),
    "hf gptj": Way("hf", _asked(architecture="gptj")),
    "hf with padding": Way("hf", _asked(keep_padding=True)),
}
BACK = {
    "original": Way("original"),
    "original cast": Way("original", Options(dtype="F32")),
    "original of two ranks": Way("original", Options(shards=2)),
    "original of four ranks": Way("original", Options(shards=4)),
    "original in pth": Way("original", _asked(container="pth")),
    "original in safetensors": Way("original", _asked(container="safetensors")),
    "original form A": Way("original", _asked(form="A")),
    "original form B": Way("original", _asked(form="B")),
    "original form mcore": Way("original", _asked(form="mcore", tensor_parallel=2)),
    "original version 0": Way("original", _asked(checkpoint_version="0")),
    "original version 2.0 of stages": Way(
        "original", _asked(checkpoint_version="2.0", tensor_parallel=2, pipeline_parallel=3)
    ),
}
ONLY = {  # where other families refuse the option, or do not look at it
    "hf gptj": ("codegen",),
    "hf with padding": ("megatron-bert", "megatron-gpt2"),
    "original in pth": ("mistral", "mixtral", "codegen", "qwen2"),
    "original in safetensors": ("mistral", "mixtral", "codegen", "qwen2"),
    "original form A": ("mixtral",),
    "original form B": ("mixtral",),
    "original form mcore": ("qwen2",),
    "original version 0": ("megatron-bert", "megatron-gpt2"),
    "original version 2.0 of stages": ("megatron-bert", "megatron-gpt2"),
}


def digest(source: Path | Checkpoint, family: str, way: Way, settings: Mapping[str, Any]) -> str:
    """Of the plan; where there is none, the kinds and places of what stands in the way."""
    options = replace(way.options, settings=settings)
    try:
        return api.plan(source, family=family, to=way.to, options=options).digest()
    except CkptToolError as error:
        return ", ".join(sorted({f"{p.kind} {p.where}" for p in error.problems}))


def of_variant(name: str, source: Path, out: Path) -> Iterator[tuple[str, str]]:
    """(way, digest) of a variant, which lies at `source`, and converted at `out`."""
    variant = VARIANTS[name]
    yield from _all(source, variant.family, FORTH, variant.settings)
    yield from _all(out, variant.family, BACK, {})


def made(name: str, folder: Path) -> tuple[Path, Path]:
    """A variant and its conversion inside `folder`."""
    variant = VARIANTS[name]
    source, out = variant.write(folder / name), folder / f"{name}-converted"
    options = Options(settings=variant.settings)
    api.convert(source, out, family=variant.family, options=options, jobs=1, check=False)
    return source, out


def _all(
    source: Path, family: str, ways: Mapping[str, Way], settings: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    (to,) = {way.to for way in ways.values()}
    with api.open_for(source, to, Options(settings=settings)) as checkpoint:
        for title, way in ways.items():
            if family in ONLY.get(title, (family,)):
                yield title, digest(checkpoint, family, way, settings)


def of_published(name: str, folder: Path) -> str:
    """The digest of the plan of a published model, from headers of its full size."""
    known = {v.real: v for v in VARIANTS.values() if v.real is not None}
    family = name.split("-")[0] if name not in known else known[name].family
    family = "llama" if family == "code" else family
    settings = known[name].settings if name in known else {}
    source = write_sparse(name, folder / "published" / name)
    return digest(source, family, FORTH["hf"], settings)


def record(folder: Path) -> dict[str, dict[str, str]]:
    tiny = {name: dict(of_variant(name, *made(name, folder))) for name in VARIANTS}
    return tiny | {f"published {name}": {"hf": of_published(name, folder)} for name in REAL}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="record what the plans are now")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    if asked.write:
        RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return 0
    known = json.loads(RECORD.read_text())
    odd = [
        f"{name}: {way}"
        for name in sorted(known.keys() | found.keys())
        for way in sorted(known.get(name, {}).keys() | found.get(name, {}).keys())
        if known.get(name, {}).get(way) != found.get(name, {}).get(way)
    ]
    print("\n".join(odd) or f"{sum(map(len, found.values()))} plans are as recorded")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
