"""Reading a download's tokenizer files: those beside the weights, or those `--tokenizer` points to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.weight_sets import TEMPLATE_FOLDER
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.tokenizers import MAX_BYTES
from ckpt_tool.errors import Problem, fail, fail_all


def files_beside_or_asked(
    checkpoint: Checkpoint,
    options: Options,
    wanted: Callable[[str], bool],
    of_file: Callable[[Path], Mapping[str, Path]],
) -> dict[str, bytes]:
    """Contents by name. `wanted` tells a tokenizer file of the family by its name; `of_file` gives the files,
    by the names they count under, that one named with `--tokenizer` stands for. Fails with `missing-file`,
    `bad-tokenizer` (too large) or `read-failed`."""
    if options.tokenizer is None:
        return {n: d.read(MAX_BYTES) for n, d in checkpoint.documents.items() if wanted(n)}
    path = Path(options.tokenizer)
    try:
        found = in_folder(path, wanted) if path.is_dir() else of_file(path)
        if not found or not all(f.is_file() for f in found.values()):
            message = "expected a tokenizer file, found none"
            fail("missing-file", message, file=path.name, where="--tokenizer")
        fail_all(
            Problem("bad-tokenizer", f"expected at most {MAX_BYTES} bytes, found more", f.name, "--tokenizer")
            for f in found.values()
            if f.stat().st_size > MAX_BYTES
        )
        return {name: f.read_bytes() for name, f in found.items()}
    except OSError as error:
        fail("read-failed", f"cannot be read: {error.strerror}", file=path.name, where="--tokenizer")


def in_folder(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """The wanted files of a folder by name."""
    found = [*sorted(folder.iterdir()), *sorted((folder / TEMPLATE_FOLDER).glob("*"))]
    named = {f.relative_to(folder).as_posix(): f for f in found}
    return {name: f for name, f in named.items() if wanted(name) and f.is_file()}
