"""What people do to checkpoints before they come here: changes of a tiny original or of its conversion, each
on one folder of files, whatever the family."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]


def weight_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix in WEIGHTS and f.is_file())


def without_weights(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.suffix in (*WEIGHTS, ".index") or ".data-" in file.name:
            file.unlink()


def load(file: Path) -> Tensors:
    if file.suffix == ".safetensors":
        return load_file(file)
    found: Tensors = torch.load(file, weights_only=False, map_location="cpu")  # one of our own
    return found


def save(tensors: Mapping[str, Any], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), file)


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a converted folder."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def rewritten(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Change:
    """Every weight file with the tree that it holds changed."""

    def applied(folder: Path) -> None:
        for file in weight_files(folder):
            save(change(load(file)), file)

    return applied


def valued(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Every tensor of the weights changed, in whatever dicts they lie."""

    def within(tree: Any) -> Any:
        if isinstance(tree, dict):
            return type(tree)((k, within(v)) for k, v in tree.items())
        return change(tree) if isinstance(tree, torch.Tensor) else tree

    return rewritten(lambda tree: {k: within(v) if k != "optimizer" else v for k, v in tree.items()})


def as_torch(folder: Path) -> None:
    """A folder of one model.safetensors as one of a pytorch_model.bin."""
    file = folder / "model.safetensors"
    if file.exists():
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()


def document(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """A JSON file of the folder changed in place; one that is not there is made."""

    def applied(folder: Path) -> None:
        file = next(iter(sorted(folder.rglob(name))), folder / name)
        content = json.loads(file.read_text()) if file.exists() else {}
        change(content)
        file.write_text(json.dumps(content))

    return applied


def nothing(folder: Path) -> None:
    """For a kind that is tried elsewhere."""


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")


def second_base(config: dict[str, Any]) -> None:
    """The rotary base once more, as the other release of transformers spells it, with another value."""
    if "rope_parameters" in config:
        config["rope_theta"] = 123456.0
        return
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123456.0}


def prefixed(word: str) -> Change:
    """`word` before every name; where weights lie under a key "model", before the names there."""

    def change(tree: dict[str, Any]) -> dict[str, Any]:
        if isinstance(tree.get("model"), dict):
            return {**tree, "model": {word + k: v for k, v in tree["model"].items()}}
        return {word + k: v for k, v in tree.items()}

    return rewritten(change)


def wrapped(folder: Path) -> None:
    as_torch(folder)
    rewritten(lambda ts: {"state_dict": ts, "epoch": 3, "optimizer": {"lr": 0.1}})(folder)


def with_training_state(folder: Path) -> None:
    """What training programs keep beside weights: a state of 128 bits, an order, and more than 1 MiB."""
    as_torch(folder)
    beside = {
        "rng_state": {"state": 2**127 + 1, "inc": 2**100 + 1},
        "order": list(range(4000)),
        "log": "x" * (2 << 20),
    }
    rewritten(lambda ts: {**ts, **beside})(folder)


def float32_norms(folder: Path) -> None:
    """Vectors in float32, of values that no 16-bit float holds."""
    valued(lambda t: t.float() * (1 + 2**-20) if t.ndim == 1 and t.is_floating_point() else t)(folder)


def null_metadata(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header["__metadata__"] = None
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def backslashes(folder: Path) -> None:
    """The members of torch zips named as a program on Windows names them."""
    as_torch(folder)
    rewritten(dict)(folder)  # as a zip, whatever it was
    for file in weight_files(folder):
        with zipfile.ZipFile(file) as read:
            members = [(m.filename, read.read(m)) for m in read.infolist()]
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as made:
            for name, content in members:
                made.writestr(zipfile.ZipInfo(name), content)
        data = file.read_bytes()
        for name, _ in members:  # zipfile writes slashes only
            data = data.replace(name.encode(), name.replace("/", "\\").encode())
        file.write_bytes(data)


def wrong_total_size(folder: Path) -> None:
    for file in folder.glob("*.index.json"):
        content = json.loads(file.read_text())
        content["metadata"]["total_size"] = len(content["weight_map"])
        file.write_text(json.dumps(content))
        return
    raise AssertionError("no index")


def nested(folder: Path) -> None:
    """Everything one level lower, in a folder of its own."""
    inner = folder / "download"
    inner.mkdir()
    for entry in list(folder.iterdir()):
        if entry != inner:
            shutil.move(str(entry), inner / entry.name)


def in_the_hubs_cache(folder: Path) -> None:
    nested(folder)
    revision = "0123456789abcdef0123456789abcdef01234567"
    (folder / "snapshots").mkdir()
    (folder / "refs").mkdir()
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    (folder / "download").rename(folder / "snapshots" / revision)


def adapter(folder: Path) -> None:
    without_weights(folder)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format(x): torch.zeros(4, 4) for x in "AB"}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')


def gguf(folder: Path) -> None:
    without_weights(folder)
    (folder / "model-q4_0.gguf").write_bytes(b"GGUF" + bytes(60))


def wrong_checklist(folder: Path) -> None:
    """A publisher's sums of which one, of a small document, is not that of the file beside it."""
    small = next(f for f in sorted(folder.rglob("*")) if f.suffix in (".json", ".txt", ".model"))
    (small.parent / "checklist.chk").write_text(f"{'0' * 32}  {small.name}\n")
