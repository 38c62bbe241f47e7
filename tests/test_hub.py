"""`hf://` addresses whose files are downloaded: which, what is checked, and what is said when that fails."""

from __future__ import annotations

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from ckpt_tool.checkpoint import hub
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.errors import CkptToolError, Problem

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = safetensors.numpy.save({"a": np.arange(3.0)})
REPOSITORY = {
    "consolidated.safetensors": WEIGHTS,
    "params.json": b"{}",
    "tekken.json": b"{}",
    "config.json": b"{}",
    "model-00001-of-00001.safetensors": WEIGHTS,
    "model.safetensors.index.json": b"{}",
    "adapter.safetensors": b"x",
    "README.md": b"x",
    "figures/one.png": b"x",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Hub, as its client shows it: a cache of blobs named by digest, and links to them in a snapshot."""
    state: dict[str, Any] = {"files": dict(REPOSITORY), "asked": [], "error": None, "cached": False}
    snapshot = tmp_path / "snapshots" / COMMIT

    class Api:
        def model_info(self, repo: str, revision: str | None = None, **_: Any) -> SimpleNamespace:
            if state["error"] is not None:
                raise state["error"]
            state["asked"].append((repo, revision))
            return SimpleNamespace(
                sha=COMMIT, siblings=[SimpleNamespace(rfilename=n) for n in state["files"]]
            )

    def download(
        repo: str, *, revision: str | None = None, allow_patterns: Any = None, local_files_only: Any = 0
    ) -> str:
        if local_files_only:
            if not state["cached"]:
                raise FileNotFoundError("nothing in the cache")
            return str(snapshot)
        snapshot.mkdir(parents=True, exist_ok=True)
        (tmp_path / "blobs").mkdir(exist_ok=True)
        for name in [n for n in state["files"] if any(fnmatch(n, p) for p in allow_patterns)]:
            content = state["files"][name]
            blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(state.get("damage", content))
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).symlink_to(blob)
        return str(snapshot)

    monkeypatch.setenv("CKPT_TOOL_HUB", "download")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    state["snapshot"] = snapshot
    return state


def refused(address: str) -> Problem:
    with pytest.raises(CkptToolError) as caught:
        open_checkpoint(address).close()
    assert caught.value.problems[0].file == address
    assert "\n" not in caught.value.problems[0].message
    return caught.value.problems[0]


def test_only_what_will_be_opened_is_downloaded(server: dict[str, Any]) -> None:
    with open_checkpoint("hf://org/name@main") as checkpoint:
        assert list(checkpoint.files) == ["consolidated.safetensors"]
        assert any(COMMIT in note for note in checkpoint.notes)
    assert server["asked"] == [("org/name", "main")]
    assert sorted(os.listdir(server["snapshot"])) == [
        "config.json",
        "consolidated.safetensors",
        "model.safetensors.index.json",
        "params.json",
        "tekken.json",
    ]


def test_the_folder_original_of_a_repository_is_used(server: dict[str, Any]) -> None:
    server["files"] = {
        "original/consolidated.00.pth": b"",
        "original/params.json": b"{}",
        "config.json": b"{}",
    }
    server["files"]["original/consolidated.00.pth"] = safetensors.numpy.save({"a": np.zeros(1)})
    with open_checkpoint("hf://org/name") as checkpoint:
        assert list(checkpoint.files) == ["consolidated.00.pth"]
        assert "params.json" in checkpoint.documents


def test_a_damaged_download_is_refused(server: dict[str, Any]) -> None:
    server["damage"] = WEIGHTS[:-1] + b"!"
    problem = refused("hf://org/name")
    assert (problem.kind, problem.where) == ("download-failed", "consolidated.safetensors")
    assert "SHA-256" in problem.message


def test_older_downloads_are_not_hashed_again(server: dict[str, Any], tmp_path: Path) -> None:
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"not what the name says")
    os.utime(blob, (1, 1))
    hub.check_digests([blob], "hf://org/name", since=1000.0)
    with pytest.raises(CkptToolError):
        hub.check_digests([blob], "hf://org/name", since=1.0)


def test_offline_is_one_line(server: dict[str, Any]) -> None:
    server["error"] = ConnectionError("cannot reach the Hub\nsecond line")
    problem = refused("hf://org/name")
    assert problem.kind == "download-failed"
    assert "cannot reach the Hub" in problem.message


def test_without_a_network_the_cache_is_used(server: dict[str, Any]) -> None:
    open_checkpoint("hf://org/name").close()
    server["error"], server["cached"] = ConnectionError("offline"), True
    with open_checkpoint("hf://org/name") as checkpoint:
        assert any("cache" in note and COMMIT in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://name", "hf://org/name/more", "hf://org/na me", "hf://org/name@"]
)
def test_malformed_addresses_are_refused(address: str) -> None:
    assert refused(address).kind == "bad-input"


def test_a_repository_without_weights_is_refused(server: dict[str, Any]) -> None:
    server["files"] = {"README.md": b"x"}
    assert refused("hf://org/name").kind == "wrong-format"
