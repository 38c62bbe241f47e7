"""A folder in which no weights were found: what it is instead, and where to go from there."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from shlex import quote
from typing import NoReturn

from ckpt_tool.checkpoint import signs
from ckpt_tool.checkpoint.dcp_folders import is_part
from ckpt_tool.checkpoint.dcp_names import METADATA
from ckpt_tool.checkpoint.deepspeed import ALL, are_parts, is_universal, runs_of
from ckpt_tool.checkpoint.folders import Directory, Folder
from ckpt_tool.checkpoint.hf_slices import JOINED, PARTS
from ckpt_tool.checkpoint.hf_slices import NAME as SLICE
from ckpt_tool.checkpoint.megatron import may_hold_ranks
from ckpt_tool.checkpoint.tf_names import DATA
from ckpt_tool.checkpoint.weight_sets import SAVED_MODEL, exports, is_document, is_weights
from ckpt_tool.checkpoint.wrapping import beside_weights
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

USUAL = "expected weight files (consolidated.*, model*.safetensors, pytorch_model*.bin)"
EMPTY = "was it downloaded? Weights that lie more than four folders deeper are opened at their own folder"
_MAY_BE_WEIGHTS = re.compile(r".+\.(pt|pth|bin|safetensors|ckpt|tar|tgz|tar\.gz|zip)", re.ASCII)
_BESIDE_WEIGHTS = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|scaler|training_args|recipe_state|trainer_state|optim_)[\w.-]*",
    re.ASCII,
)
_SHOWN = 4


@dataclass(frozen=True)
class Around:
    """How messages speak of a folder: its `label`, its `own` name, how to `give` a path below it, what to
    do where the folder `above` it holds weights (None: it does not), and what to do `first` with it."""

    label: str
    own: str
    give: Callable[[str], str]
    at: Callable[[str], str]
    above: str | None = None
    first: str = ""


def refuse(paths: Collection[str], around: Around, newest: str | None = None) -> NoReturn:
    """Say what a folder with the files `paths` (those of folders in it too) is; `newest` is the prefix that
    TensorFlow's state file in it names. Kinds: `wrong-format`,
    `ambiguous-input` (weights in several folders), `truncated` (downloads that were not finished)."""
    inner = weight_folders([p for p in paths if signs.unfinished(p) is None])
    here = [p for p in paths if "/" not in p]
    _refuse_v1(here, around, newest)
    _refuse_sign([p for p in paths if is_universal(p)], around, [])
    _refuse_sign(here, around, inner)
    exported = exports(paths)
    if not (apart := [f for f in inner if f not in exported]):
        _refuse_sign([p for p in paths if SAVED_MODEL.search(p)], around, [])
    inner = apart
    if len(inner) > 1:
        shown = _list(inner)
        if are_parts(inner, paths):
            message = (
                f"expected the files of all ranks of DeepSpeed in one folder, found some in each of {shown}"
            )
            fail("missing-shard", message, file=around.label, hint=ALL)
        fail(
            "ambiguous-input",
            f"expected weight files in the folder itself, found some in {shown}",
            file=around.label,
            hint=f"give the folder that is meant: {around.give(inner[0])}",
        )
    if inner:
        fail(
            "wrong-format",
            f"expected weight files in the folder itself, found them in {inner[0]}",
            file=around.label,
            hint=f"give that folder: {around.give(inner[0])}",
        )
    _refuse_sign(paths, around, inner)
    unfinished = [(p, whole) for p in paths if (whole := signs.unfinished(p))]
    if unfinished:
        left, whole = unfinished[0]
        fail(
            "truncated",
            f"expected whole files, found {left}, of a download that was not finished",
            file=around.label,
            hint="finish the download (most programs go on where they stopped), then run this again",
        )
    _refuse_unnamed(paths, here, around)


def around_of(folder: Folder, path: Path) -> Around:
    """How to speak of a folder, and of what is in it and around it."""
    if not isinstance(folder, Directory):
        from ckpt_tool.checkpoint.archive import around

        return folder.around or around(folder.label)
    outer = folder.outer()
    above = outer is not None and any(is_weights(n) for n in outer.names() if "/" not in n)
    own = path.resolve()
    parent = path.parent if path.name not in ("", "..") else path / ".."

    def at(place: str) -> str:
        """Of a path that starts with the folder's own name, or with nothing where it ends before it."""
        return quote(str(path / place.removeprefix(own.name).lstrip("/") if place else parent))

    def give(place: Path) -> str:
        return f"--in {quote(str(place))}"

    return Around(folder.label, own.name, lambda sub: give(path / sub), at, give(parent) if above else None)


def tells(paths: Collection[str], around: Around) -> bool:
    """Whether the names tell what it is."""
    return signs.of_folder([f"{around.own}/{p}" for p in paths]) is not None


def weight_folders(paths: Collection[str]) -> list[str]:
    """The folders in which `paths` has weights; of Megatron's ranks and DeepSpeed's, the folder around
    them."""
    found: dict[str, None] = {}
    sliced: dict[str, None] = {}
    there = frozenset(paths)
    homes = {p.rpartition("/")[0] for p in paths if p.endswith(".distcp")}
    for path in paths:
        *folders, name = path.split("/")
        data = DATA.fullmatch(name)
        if data is not None and "/".join([*folders, f"{data['prefix']}.index"]) not in there:
            continue
        listed = name == METADATA and "/".join(folders) in homes and _is_listed(folders)
        if listed and len(folders) > 1 and is_part(folders[-1]):
            folders.pop()  # it is looked into, and documents lie around it
        if folders and (listed or is_weights(name)):
            while folders and may_hold_ranks(folders[-1]):
                folders.pop()
            found["/".join(folders)] = None
        elif folders and SLICE.fullmatch(name):
            sliced["/".join(folders[: -1 if f"{folders[-1]}/" in PARTS else None])] = None
    joined = sorted(f for f in found if f.endswith("/" + JOINED[:-1]))
    found |= {f: None for f in sliced if not _any_within(f, joined)}
    found |= dict.fromkeys(runs_of(paths))
    outermost = [f for f in found if not (f.endswith("/original") and f.removesuffix("/original") in found)]
    return sorted(f for f in outermost if f)


def _any_within(folder: str, listed: Sequence[str]) -> bool:
    """Whether one of the sorted paths `listed` is in `folder`."""
    at = bisect_left(listed, f"{folder}/")
    return at < len(listed) and listed[at].startswith(f"{folder}/")


def _is_listed(folders: list[str]) -> bool:
    """Whether the data that a `.metadata` beside it lists is not of an optimizer alone; in a folder that was
    looked into it is a file of something else."""
    seen = len(folders) <= 2 and all(map(is_part, folders))
    return not seen and beside_weights(folders[-1]) is None


def _refuse_v1(here: Collection[str], around: Around, newest: str | None) -> None:
    """Fail where a file stands beside a graph of its name, or is what the state file names: in newer
    checkpoints no file is called by the prefix alone."""
    graphs = [newest] if newest else []
    graphs += (p.removesuffix(".meta") for p in here if p.endswith(".meta"))
    whole = [n for g in graphs for n in sorted(here) if re.fullmatch(re.escape(g) + r"(-\d{5}-of-\d{5})?", n)]
    if whole:
        message = f"expected weight files, found {signs.V1.what}: {whole[0]}"
        hint = signs.V1.hint.replace("FILE", repr(around.at(f"{around.own}/{whole[0]}").strip("'")))
        fail("wrong-format", message, file=around.label, hint=hint)


def _refuse_sign(paths: Collection[str], around: Around, inner: list[str]) -> None:
    """Fail where the names tell what this is; the folder's own name tells too."""
    found = signs.of_folder([f"{around.own}/{p}" for p in paths])
    if found is None:
        return
    sign, path = found
    below = path.removeprefix(f"{around.own}/")
    hint = around.first + sign.hint.format(at=around.at(sign.place(path)))
    if sign.inner and inner:
        hint = f"{hint}; give the one that is meant: {around.give(inner[0])}"
    fail("wrong-format", f"expected weight files, found {sign.what}: {below}", file=around.label, hint=hint)


def _refuse_unnamed(paths: Collection[str], here: Collection[str], around: Around) -> NoReturn:
    """Nothing tells: name the files that may be weights, else what is there."""
    may_be = [p for p in here if _may_be_weights(p)] or [p for p in paths if _may_be_weights(p)]
    if len(may_be) == 1:
        hint = f"give the path of the file: {around.give(may_be[0])}"
        fail("wrong-format", f"{USUAL}, found {may_be[0]}", file=around.label, hint=hint)
    if may_be:
        fail(
            "wrong-format",
            f"{USUAL}, found {_list(may_be)}",
            file=around.label,
            hint=f"if one of them is the whole model, give its path ({around.give(may_be[0])}); parts of one"
            " model are read when they are called pytorch_model-00001-of-0000N.bin, or consolidated.00.pth",
        )
    if around.above is not None:
        hint = f"give the folder above, which holds weights: {around.above}"
        fail("wrong-format", f"{USUAL}, found none", file=around.label, hint=hint)
    if not paths:
        fail("wrong-format", f"{USUAL}, found no files", file=around.label, hint=EMPTY)
    alone = all(is_document(p.rpartition("/")[2]) for p in paths)
    what = "documents only" if alone else f"{len(paths)} other file{'s' * (len(paths) != 1)}"
    fail(
        "wrong-format",
        f"{USUAL}, found {what}: {_list(sorted(paths, key=lambda p: (p.count('/'), p)))}",
        file=around.label,
        hint="give the folder that holds the weights, or download them into this one",
    )


def _may_be_weights(path: str) -> bool:
    name = path.rpartition("/")[2]
    return _MAY_BE_WEIGHTS.fullmatch(name) is not None and _BESIDE_WEIGHTS.fullmatch(name) is None


def _list(names: Collection[str]) -> str:
    shown = [printable(n, 80) for n in names][:_SHOWN]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))
