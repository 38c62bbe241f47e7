"""What `ckpt-tool.json` in an output says about itself, read with distrust: the file may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.errors import fail

MANIFEST = "ckpt-tool.json"
ASKED_FOR = (
    "--set",
    "--config",
    "--tokenizer",
    "--keep-padding",
)  # how the source of a value begins that the user gave

_FORM = ("tensor_parallel", "pipeline_parallel", "checkpoint_version")


@dataclass(frozen=True)
class Manifest:
    """`crcs` are CRC32s by (file, tensor), `documents` SHA-256 by file name, `config` (value, source) by
    name, `direction` "to-hf" or "to-original", `drift` the tensors whose model-parallel copies differ,
    `checkpoint_id` a published name, `form` how a Megatron original was shared out, as family options."""

    family: str | None
    crcs: dict[tuple[str, str], int]
    documents: dict[str, str]
    config: dict[str, tuple[Any, str]]
    options: dict[str, Any]
    drift: frozenset[str]
    checkpoint_id: str | None
    form: dict[str, Any]
    direction: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """The facts that the user gave when converting."""
        asked = self.options.get("settings")
        shown = {k: value for k, (value, source) in self.config.items() if source.startswith(ASKED_FOR)}
        return {**(asked if isinstance(asked, dict) else {}), **shown}


def read_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest beside the weights; None without one, `bad-config` for one that does not read as such."""
    if MANIFEST not in checkpoint.documents:
        return None
    data = checkpoint.json(MANIFEST)
    try:
        return _manifest(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(
            "bad-config",
            f"expected a manifest of ckpt-tool, found another content ({error!r})",
            file=MANIFEST,
        )


def _manifest(data: Mapping[str, Any]) -> Manifest:
    return Manifest(
        family=data.get("family"),
        crcs={(t["file"], t["name"]): int(t["crc32"], 16) for t in data.get("tensors") or []},
        documents={d["file"]: d["sha256"] for d in data.get("documents") or []},
        config={k: (v["value"], str(v["source"])) for k, v in (data.get("config") or {}).items()},
        options=dict(data.get("options") or {}),
        drift=frozenset(str(r["name"]) for r in data.get("replicas") or []),
        checkpoint_id=data.get("checkpoint_id"),
        direction=data.get("direction"),
        form={k: v for k, v in (data.get("original") or {}).items() if k in _FORM and v is not None},
    )
