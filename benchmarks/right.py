"""Right conversions, of which none may fail: every tiny original, as it is and in other clothes, both ways.
Run by `detection.py --right`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from ckpt_tool.verify.claims import Mode

ROOT = Path(__file__).parent.parent
Dress = Callable[[str, Path, Path], bool]  # variant, source, where to write: False where it does not apply


def _converted(variant: str, source: Path, out: Path, **more: object) -> bool:
    chosen = VARIANTS[variant]
    convert(source, out, family=chosen.family, options=replace(Options(settings=chosen.settings), **more))
    return True


def _cast(dtype: str, variant: str, source: Path, out: Path) -> bool:
    try:
        return _converted(variant, source, out, dtype=dtype)
    except CkptToolError as error:
        if error.kind == "usage":
            return False  # codes and scales, which no cast is of
        raise


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


def _bins(variant: str, source: Path, out: Path) -> bool:
    """The same dealt out to two files with their index, as older releases save large models."""
    import torch

    if not _bin(variant, source, out):
        return False
    held = torch.load(out / "pytorch_model.bin", weights_only=True)
    (out / "pytorch_model.bin").unlink()
    names = [f"pytorch_model-{k:05d}-of-00002.bin" for k in (1, 2)]
    for k, name in enumerate(names):
        torch.save({key: held[key] for key in list(held)[k::2]}, out / name)
    held_by = {key: names[k % 2] for k, key in enumerate(held)}
    total = sum(t.nbytes for t in held.values())
    index = {"metadata": {"total_size": total}, "weight_map": held_by}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
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
        made_by = getattr(transformers, config["architectures"][0], None)
        if made_by is None:
            return False  # a release that has left the class out
        made_by.from_pretrained(right, dtype="auto").save_pretrained(out)
        _with_documents(right, out)
    return True


def _with_documents(right: Path, out: Path) -> None:
    """What lies beside the weights, as users copy it along."""
    for file in right.iterdir():
        there = (out / file.name).exists()
        if not there and file.suffix != ".safetensors" and file.name != "ckpt-tool.json":
            shutil.copy(file, out / file.name)


def _saved_by_another(variant: str, source: Path, out: Path) -> bool:
    """The same by an earlier release, of which the packages are in .judges/tf4.57."""
    packages = ROOT / ".judges" / "tf4.57"
    if not packages.is_dir():
        return False
    with tempfile.TemporaryDirectory() as temporary:
        right, jobs = Path(temporary) / "right", Path(temporary) / "jobs.json"
        _converted(variant, source, right)
        jobs.write_text(json.dumps([[str(right), str(out), {}]]), encoding="utf-8")
        script = ROOT / "tests" / "save_again_script.py"
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        done = subprocess.run(
            [sys.executable, script, jobs], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode or json.loads(done.stdout.splitlines()[-1]):
            return False  # a release without this class, which is no conversion of ours
        _with_documents(right, out)
    return _loads_whole(variant, out)


def _loads_whole(variant: str, out: Path) -> bool:
    """Whether the transformers that is installed makes up no number of the folder: what one release leaves
    out because it ties it on loading (4.57.6 the head of LUKE), another draws at random (5.23.0)."""
    if find_spec("transformers") is None:
        return True
    import transformers

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    made_by = getattr(transformers, config["architectures"][0], None)
    if made_by is None:
        return True
    _, found = made_by.from_pretrained(out, dtype="auto", output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        words = f"transformers {transformers.__version__} draws {', '.join(missing[:3])} at random"
        print(f"no right conversion: {variant}, saved by an earlier release: {words}", file=sys.stderr)
    return not missing


def _there_and_back(variant: str, source: Path, out: Path) -> bool:
    """Written as an original again, which `judged` holds against the model that it was written of."""
    right = out.parent / "right"
    _converted(variant, source, right)
    try:
        convert(right, out, family=VARIANTS[variant].family, to="original", check=False)
    except CkptToolError as error:
        if error.kind in ("unsupported", "usage", "missing-fact"):
            return False  # a layout that is only read
        raise
    return True


DRESSES: dict[str, Dress] = {
    "as it is": _converted,
    "saved again by transformers": _saved_again,
    "saved again by an earlier release": _saved_by_another,
    "written as an original": _there_and_back,
    "small shards": _shards,
    "cast to bfloat16": partial(_cast, "BF16"),
    "saved by torch": _bin,
    "saved by torch in two files": _bins,
    "reordered": _reordered,
    "dealt anew": _dealt_anew,
    "cast to float16": partial(_cast, "F16"),
    "cast to float32": partial(_cast, "F32"),
    "pooled to one key/value head": _pooled,
}
FEW = (
    "saved again by transformers",
    "saved again by an earlier release",
)  # for the first variant of each family only


@dataclass(frozen=True)
class Judged:
    """`digest` is of all files of the output: two that are alike count once. `why` it does not pass, empty if
    it does."""

    dress: str
    variant: str
    digest: str
    why: str


def judged(task: tuple[str, str, str, Mode]) -> Judged | None:
    dress, variant, root, mode = task
    with tempfile.TemporaryDirectory(prefix="right-", dir=root) as temporary:
        home = Path(temporary)
        source = VARIANTS[variant].write(home / "original")
        out, settings = home / "out", VARIANTS[variant].settings
        try:
            if not DRESSES[dress](variant, source, out):
                return None
            back = DRESSES[dress] is _there_and_back
            compared = home / "right" if back else source
            report = verify(out, compared, settings={} if back else settings, mode=mode)
        except CkptToolError as error:
            return Judged(dress, variant, digest(out), f"error: {error}")
        idle = any("pass cannot run" in f.message for f in report.level("parity"))
        why = "" if report.status == "pass" and not idle else f"{report.status}: {report.headline}"
        return Judged(dress, variant, digest(out), why)


def digest(out: Path) -> str:
    """Of the files and their names, but for the manifest, which says how they were made."""
    made = hashlib.sha256()
    files = [out] if out.is_file() else sorted(f for f in out.rglob("*") if f.is_file())
    for file in files:
        if file.name != "ckpt-tool.json":
            made.update(f"{file.relative_to(out.parent)}\0".encode() + file.read_bytes())
    return made.hexdigest()


def main(
    root: Path,
    families: Iterable[str],
    sample: int,
    offset: int,
    jobs: int,
    file: Path | None,
    mode: Mode = "default",
) -> int:
    """Dress by dress, so that a run that is cut short has seen every family."""
    own = [v for v in VARIANTS.values() if v.family in set(families)]
    firsts = {v.family: v.id for v in reversed(own)}.values()
    tasks = [(d, v.id, str(root), mode) for d in DRESSES for v in own if v.id in firsts or d not in FEW]
    found = []
    with ProcessPoolExecutor(jobs) as pool:
        for r in pool.map(judged, tasks[offset::sample], chunksize=2):
            if r is None:
                continue
            found.append(r)
            if file is not None:
                with file.open("a", encoding="utf-8") as held:
                    held.write(json.dumps(asdict(r)) + "\n")
    return shown(found)


def read(files: Iterable[Path]) -> list[Judged]:
    """What earlier runs wrote down."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Judged(**json.loads(line)) for line in lines]


def shown(found: Iterable[Judged]) -> int:
    """One line for each dress: how many distinct ones, and how many of them do not pass."""
    distinct = list({(r.variant, r.digest): r for r in reversed(list(found))}.values())[::-1]
    for r in distinct:
        if r.why:
            print(f"{r.dress}, {r.variant}: {r.why}")
    print(f"{'right conversions':34} {'distinct':>8} {'not passed':>11}")
    for dress in [*DRESSES, "all"]:
        its = [r for r in distinct if dress in (r.dress, "all")]
        if its:
            print(f"{dress:34} {len(its):8d} {sum(bool(r.why) for r in its):11d}")
    return int(any(r.why for r in distinct))
