"""DeepSpeed's checkpoint folders: which file holds the weights, where one of them holds all.

latest                                                          the name of a folder
global_step500/mp_rank_00_model_states.pt                       ZeRO 0 to 2: `module` is the state dict
global_step500/(bf16_)zero_pp_rank_1_mp_rank_00_optim_states.pt the optimizer's share of a rank
global_step500/zero_pp_rank_1_mp_rank_00_model_states.pt        ZeRO 3: tensors of no elements, see zero.py
global_step500/layer_03-model_00-model_states.pt                a pipeline: each layer in a file
global_step500/layer_0_expert_1_mp_rank_00_model_states.pt      experts: each in a file
global_step500_universal/zero/NAME/fp32.pt                      ds_to_universal.py's, beside copies of states

Source: DeepSpeed 0.19.8 (runtime/engine.py: _get_ckpt_name, _save_checkpoint), and folders of each stage.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ckpt_tool.checkpoint.weight_sets import WeightSet
from ckpt_tool.errors import fail, printable
from ckpt_tool.records import dataclass

LATEST = "latest"
_STATES = re.compile(r"mp_rank_(?P<rank>\d{2,4})_model_states\.pt", re.ASCII)
_OPTIMIZER = re.compile(
    r"(bf16_)?zero_pp_rank_(?P<dp>\d{1,7})_mp_rank_(?P<mp>\d{1,7})_?optim_states\.pt", re.ASCII
)
_SHARE = re.compile(r"zero_pp_rank_(?P<dp>\d{1,7})_mp_rank_(?P<mp>\d{1,7})_model_states\.pt", re.ASCII)
_APART = re.compile(r"(layer|expert|(zero_)?expp_rank)_.*(model|optim)_states\.pt", re.ASCII)
_UNIVERSAL = re.compile(r"(^|/)zero/[^/]+/(fp32|exp_avg|exp_avg_sq)\.pt$", re.ASCII)
ALL = "copy the files of all ranks, which may lie on disks of several machines, into one folder"
_RANK = re.compile(r"(?<=pp_rank_)\d+", re.ASCII)
_STEP = re.compile(r"global_step\d+(_universal)?", re.ASCII)
JOINED = (
    "the program that trained it knows how its ranks share tensors out (Megatron-DeepSpeed has "
    "tools/convert_checkpoint for its own): save the whole model with it"
)


def is_model_states(name: str) -> bool:
    return _STATES.fullmatch(name) is not None


def is_share(name: str) -> bool:
    """Whether a file of this name is one rank's of ZeRO: of its optimizer, or of its model in ZeRO 3, which
    has tensors without elements."""
    return _SHARE.fullmatch(name) is not None or is_masters(name)


def is_masters(name: str) -> bool:
    """Whether a file of this name holds a rank's part of the weights in float32."""
    return _OPTIMIZER.fullmatch(name) is not None


@dataclass(frozen=True)
class Shares:
    """The files of the ranks of a checkpoint of ZeRO by rank, in the part `within` of a folder: in ZeRO 1 and
    2 one file alone has the model."""

    within: str
    optimizers: Mapping[int, str]
    models: Mapping[int, str]
    notes: tuple[str, ...] = ()

    def called(self, like: str, rank: int) -> str:
        """What the file of another rank is called."""
        return _RANK.sub(str(rank), like, count=1)


def root_of(names: Collection[str]) -> str | None:
    """The folder, empty or with `/` at its end, of a checkpoint among `names` that may hold a whole model:
    the one with the file `latest`, or that of the states where there is none."""
    parted = [name.rpartition("/") for name in names]
    homes = {above for above, _, last in parted if is_model_states(last) or is_share(last)}
    if not homes or any(_APART.fullmatch(last) for _, _, last in parted):
        return None
    outer = {home: home.rpartition("/")[0] for home in homes}
    led = {home: f"{outer[home]}/".lstrip("/") for home in homes if home}
    there = frozenset(names)  # an archive of a stranger may have a folder for each of 100,000 members
    roots = {led[h] if h and f"{led[h]}{LATEST}" in there else f"{h}/".lstrip("/") for h in homes}
    return roots.pop() if len(roots) == 1 else None


def runs_of(names: Collection[str]) -> list[str]:
    """The folders, of those among `names`, of runs whose last step has files of the optimizer's ranks and of
    the model: they hold the file `latest`, or the files themselves where there is none."""
    kinds: dict[str, set[bool]] = {}
    for name in names:
        above, _, last = name.rpartition("/")
        if is_model_states(last) or is_share(last):
            kinds.setdefault(above, set()).add(is_masters(last))
    there = frozenset(names)
    outer = {home: home.rpartition("/")[0] for home, held in kinds.items() if len(held) == 2}
    return sorted({run if f"{run}/{LATEST}".lstrip("/") in there else home for home, run in outer.items()})


def are_parts(folders: Collection[str], names: Collection[str]) -> bool:
    """Whether each of the `folders` has files of ranks, of those among `names`, that no other has: as several
    machines save them, each on its own disk."""
    held: dict[str, set[str]] = {folder: set() for folder in folders}
    for name in names:
        above, _, last = name.rpartition("/")
        while above and is_share(last):
            if above in held:
                held[above].add(last)
            above = above.rpartition("/")[0]
    parts = held.values()
    return all(parts) and len(set().union(*parts)) == sum(map(len, parts))


def is_universal(name: str) -> bool:
    """Whether a file of this name, in its folders, holds one parameter of a universal checkpoint."""
    return _UNIVERSAL.search(name) is not None


def may_be_step(folder: str) -> bool:
    """Whether to look into a folder of this name, which `latest` does not name."""
    return _STEP.fullmatch(folder) is not None


def find_states(
    names: Collection[str], *, label: str, latest: str, masters: bool = False
) -> tuple[str, WeightSet] | Shares | None:
    """What holds a model as a whole, of the files among `names`: (the part of the folder, the one file), or
    the files of all ranks: those of ZeRO 3, and with `masters` the weights in float32 of any. `latest` is the
    text of the file of that name. None where there is none, or a part of the model is elsewhere.
    Kinds: `ambiguous-input` (several steps, files of two runs), `unsupported` (several ranks of a model)."""
    found: dict[str, list[str]] = {}
    for name in names:
        above, slash, last = name.rpartition("/")
        if is_model_states(last) or is_share(last):
            found.setdefault(above + slash, []).append(last)
    if not found:
        return None
    within = f"{latest}/" if len(found) > 1 else next(iter(found))
    if within not in found:
        shown = ", ".join(sorted(found)[:8])
        hint = "give the folder that is meant"
        fail("ambiguous-input", f"expected one step, found {printable(shown)}", file=label, hint=hint)
    beside = [n.removeprefix(within) for n in names if n.startswith(within)]
    if any(map(_APART.fullmatch, beside)):
        return None
    states = sorted(filter(is_model_states, found[within]))
    if len(states) > 1 or states[:1] not in ([], ["mp_rank_00_model_states.pt"]):
        _refuse_ranks(states, label)
    optimizers = _by_rank(_OPTIMIZER, beside, label)
    models = _by_rank(_SHARE, beside, label)
    notes: tuple[str, ...] = ()
    if latest and within and within != f"{latest}/":
        notes = (f"{LATEST} names {printable(latest, 80)}, which is not there",)
    if models and states:
        message = (
            f"expected the model states of ZeRO 3 or of one rank, found {models[min(models)]} and {states[0]}"
        )
        hint = "files of two runs are in one folder: take away those of the other"
        fail("ambiguous-input", message, file=label, hint=hint)
    if states and not masters:
        own = (*notes, *_notes(within, sorted(optimizers.items())))
        return within, WeightSet(states[0], (states[0],), None, "original", own)
    if not optimizers or not (models or states):
        return None
    return Shares(within, optimizers, models or {0: states[0]}, notes)


def _refuse_ranks(names: Collection[str], label: str) -> None:
    message = f"expected one model-parallel rank, found {', '.join([*names][:4])}"
    fail("unsupported", message, file=label, hint=JOINED)


def _by_rank(pattern: re.Pattern[str], names: Collection[str], label: str) -> dict[int, str]:
    """The files of a kind by rank, in order."""
    found: dict[int, str] = {}
    others = []
    for m in filter(None, map(pattern.fullmatch, sorted(names))):
        if int(m["mp"]):
            others.append(m[0])
        elif (twin := found.setdefault(int(m["dp"]), m[0])) != m[0]:
            hint = "files of two runs are in one folder: take away those of the other"
            fail("ambiguous-input", f"expected one of {twin} and {m[0]}", file=label, hint=hint)
    if others:
        _refuse_ranks(others, label)
    return dict(sorted(found.items()))


def _notes(within: str, optimizers: Collection[tuple[int, str]]) -> list[str]:
    if not optimizers:
        return []
    files = f"{len(optimizers)} file{'s' * (len(optimizers) > 1)} of the optimizer"
    (_, first), *_ = optimizers
    way = f"their copies of the weights in float32 are read where {within}{first} is given as the input"
    return [f"{files} were left aside: only training needs them; {way}"]


def check_one_rank(metadata: Mapping[str, object], *, file: str) -> None:
    """Fail with `unsupported` where a file says that it is one of several ranks of a model."""
    degrees = metadata.get("checkpoint_parallel_dimensions")
    told = {"mp_world_size": metadata.get("mp_world_size")}
    told |= {k: v for k, v in degrees.items() if isinstance(k, str)} if isinstance(degrees, dict) else {}
    for name, size in told.items():
        if type(size) is int and size > 1:
            message = f"expected one model-parallel rank, found {printable(name, 40)} {size}"
            fail("unsupported", message, file=file, where=printable(name, 40), hint=JOINED)
