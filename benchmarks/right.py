"""Right conversions, of which none may fail: every tiny original, as it is and in other clothes. Run by
`detection.py --right`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ckpt_tool.api import Options, convert
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.safetensors import INDEX_NAME, SafetensorsLayout
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify

Dress = Callable[[str, Path, Path], bool]  # variant, source, where to write: False where it does not apply


def _converted(variant: str, source: Path, out: Path, **more: object) -> bool:
    chosen = VARIANTS[variant]
    convert(source, out, family=chosen.family, options=replace(Options(settings=chosen.settings), **more))
    return True


def _cast(dtype: str, variant: str, source: Path, out: Path) -> bool:
    return _converted(variant, source, out, dtype=dtype)


def _shards(variant: str, source: Path, out: Path) -> bool:
    return _converted(variant, source, out, max_shard_bytes=60_000)


def _pooled(variant: str, source: Path, out: Path) -> bool:
    heads = VARIANTS[variant].true_config
    if heads.get("num_key_value_heads") != heads.get("num_attention_heads"):
        return False
    if VARIANTS[variant].family not in ("mistral", "mixtral", "llama", "qwen2"):
        return False
    return _converted(variant, source, out, gqa=1)


def _reordered(variant: str, source: Path, out: Path) -> bool:
    """The tensors of each file and the keys of config.json from the last to the first."""
    _converted(variant, source, out)
    for file in sorted(out.glob("*.safetensors")):
        with open_checkpoint(file) as held:
            listed = [(t, held.read(t).tobytes()) for t in held][::-1]
        _write(file, listed)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(dict(reversed(config.items()))), encoding="utf-8")
    (out / "ckpt-tool.json").unlink()
    return True


def _dealt_anew(variant: str, source: Path, out: Path) -> bool:
    """The tensors in turn over three files, as another tool shards them; no manifest."""
    _converted(variant, source, out)
    with open_checkpoint(out) as held:
        listed = [(t, held.read(t).tobytes()) for t in held]
    for old in out.glob("*.safetensors*"):
        old.unlink()
    names = [f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]
    for k, name in enumerate(names):
        _write(out / name, listed[k::3])
    held_by = {t.name: names[k % 3] for k, (t, _) in enumerate(listed)}
    index = {"metadata": {"total_size": sum(t.nbytes for t, _ in listed)}, "weight_map": held_by}
    (out / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    (out / "ckpt-tool.json").unlink()
    return True


def _write(path: Path, listed: list[tuple[TensorInfo, bytes]]) -> None:
    layout = SafetensorsLayout(tuple((t.name, t.dtype, t.shape) for t, _ in listed), {"format": "pt"})
    with path.open("wb") as file:
        file.write(layout.header)
        for _, data in sorted(listed, key=lambda pair: layout.offsets[pair[0].name]):
            file.write(data)


def _bin(variant: str, source: Path, out: Path) -> bool:
    """Saved by torch as pytorch_model.bin, without a manifest."""
    import torch

    from ckpt_tool.checkpoint.base import DTYPES

    _converted(variant, source, out)
    made = {}
    with open_checkpoint(out) as held:
        for t in held:
            dtype = getattr(torch, DTYPES[t.dtype].torch)
            made[t.name] = torch.frombuffer(bytearray(held.read(t).tobytes()), dtype=dtype).view(t.shape)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    torch.save(made, out / "pytorch_model.bin")
    (out / "ckpt-tool.json").unlink()
    return True


def _saved_again(variant: str, source: Path, out: Path) -> bool:
    """Loaded and saved by the transformers that is installed."""
    if find_spec("transformers") is None:
        return False
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        right = Path(temporary) / "right"
        _converted(variant, source, right)
        config = json.loads((right / "config.json").read_text(encoding="utf-8"))
        model = getattr(transformers, config["architectures"][0]).from_pretrained(right, dtype="auto")
        model.save_pretrained(out)
        for file in right.iterdir():
            if (
                not (out / file.name).exists()
                and file.suffix != ".safetensors"
                and file.name != "ckpt-tool.json"
            ):
                shutil.copy(file, out / file.name)
    return True


DRESSES: dict[str, Dress] = {
    "as it is": _converted,
    "cast to float32": partial(_cast, "F32"),
    "cast to bfloat16": partial(_cast, "BF16"),
    "cast to float16": partial(_cast, "F16"),
    "small shards": _shards,
    "reordered": _reordered,
    "dealt anew": _dealt_anew,
    "saved by torch": _bin,
    "pooled to one key/value head": _pooled,
    "saved again by transformers": _saved_again,
}
FEW = ("saved again by transformers",)  # for the first variant of each family only


def judged(task: tuple[str, str, str]) -> tuple[str, str, str] | None:
    """(dress, variant, why it does not pass or nothing)"""
    dress, variant, root = task
    with tempfile.TemporaryDirectory(prefix="right-", dir=root) as temporary:
        home = Path(temporary)
        source = VARIANTS[variant].write(home / "original")
        out = home / "out"
        try:
            if not DRESSES[dress](variant, source, out):
                return None
            report = verify(out, source, settings=VARIANTS[variant].settings)
        except CkptToolError as error:
            return dress, variant, f"error: {error}"
        return dress, variant, "" if report.status == "pass" else f"{report.status}: {report.headline}"


def main(root: Path, families: Iterable[str], sample: int | None, jobs: int, file: Path | None) -> int:
    wanted, seen = set(families), set[str]()
    tasks = []
    for variant in VARIANTS.values():
        if variant.family not in wanted:
            continue
        first = variant.family not in seen
        seen.add(variant.family)
        tasks += [(d, variant.id, str(root)) for d in DRESSES if first or d not in FEW]
    with ProcessPoolExecutor(jobs) as pool:
        found = [r for r in pool.map(judged, tasks[:: sample or 1], chunksize=2) if r is not None]
    count: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for dress, variant, why in found:
        count[dress][0] += 1
        count[dress][1] += bool(why)
        if why:
            print(f"{dress}, {variant}: {why}")
    print(f"{'right conversions':30} {'count':>6} {'not passed':>11}")
    for dress, (n, failed) in count.items():
        print(f"{dress:30} {n:6d} {failed:11d}")
    print(f"{'all':30} {len(found):6d} {sum(bool(w) for *_, w in found):11d}")
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(why for *_, why in found))
