"""DeepSpeed's checkpoint folders: which file holds the weights, where one of them holds all.

latest                                                          the name of a folder
global_step500/mp_rank_00_model_states.pt                       ZeRO 0 to 2: `module` is the state dict
global_step500/(bf16_)zero_pp_rank_1_mp_rank_00_optim_states.pt the optimizer's share of a rank
global_step500/zero_pp_rank_1_mp_rank_00_model_states.pt        ZeRO 3: tensors of no elements
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

LATEST = "latest"
_STATES = re.compile(r"mp_rank_(?P<rank>\d{2,4})_model_states\.pt", re.ASCII)
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_?optim_states\.pt", re.ASCII)
_APART = re.compile(r"(zero_pp_rank|layer|expert)_.*model_states\.pt", re.ASCII)
_SHARE = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", re.ASCII)
_STEP = re.compile(r"global_step\d+(_universal)?", re.ASCII)
JOINED = (
    "the program that trained it knows how its ranks share tensors out (Megatron-DeepSpeed has "
    "tools/convert_checkpoint for its own): save the whole model with it"
)


def is_model_states(name: str) -> bool:
    return _STATES.fullmatch(name) is not None


def is_share(name: str) -> bool:
    """Whether a file of this name has tensors without elements, as ZeRO 3 leaves them."""
    return _SHARE.fullmatch(name) is not None


def root_of(names: Collection[str]) -> str | None:
    """The folder, empty or with `/` at its end, of a checkpoint among `names` that may hold a whole model:
    the one with the file `latest`, or that of the states where there is none."""
    parted = [name.rpartition("/") for name in names]
    homes = {above for above, _, last in parted if is_model_states(last)}
    if not homes or any(_APART.fullmatch(last) for _, _, last in parted):
        return None
    outer = {home: home.rpartition("/")[0] for home in homes}
    led = {home: f"{outer[home]}/".lstrip("/") for home in homes if home}
    there = frozenset(names)  # an archive of a stranger may have a folder for each of 100,000 members
    roots = {led[h] if h and f"{led[h]}{LATEST}" in there else f"{h}/".lstrip("/") for h in homes}
    return roots.pop() if len(roots) == 1 else None


def may_be_step(folder: str) -> bool:
    """Whether to look into a folder of this name, which `latest` does not name."""
    return _STEP.fullmatch(folder) is not None


def find_model_states(names: Collection[str], *, label: str, latest: str) -> tuple[str, WeightSet] | None:
    """(the part of the folder, the one file) that holds a model as a whole, of those among `names`; `latest`
    is the text of the file of that name. None where there is none, or a part of the model is elsewhere.
    Kinds: `ambiguous-input` (several steps), `unsupported` (several ranks)."""
    found: dict[str, list[str]] = {}
    for name in names:
        above, slash, last = name.rpartition("/")
        if is_model_states(last):
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
    ranks = sorted(found[within])
    if len(ranks) > 1 or ranks[0] != "mp_rank_00_model_states.pt":
        message = f"expected one model-parallel rank, found {', '.join(ranks[:4])}"
        fail("unsupported", message, file=label, hint=JOINED)
    return within, WeightSet(ranks[0], (ranks[0],), None, "original", tuple(_notes(beside)))


def _notes(beside: Collection[str]) -> list[str]:
    count = sum(_OPTIMIZER.fullmatch(n) is not None for n in beside)
    if not count:
        return []
    files = f"{count} file{'s' * (count > 1)} of the optimizer"
    copies = "their copies of the weights in float32, which zero_to_fp32.py joins, were not read either"
    return [f"{files} were left aside: only training needs them; {copies}"]


def check_one_rank(metadata: Mapping[str, object], *, file: str) -> None:
    """Fail with `unsupported` where a file says that it is one of several ranks of a model."""
    degrees = metadata.get("checkpoint_parallel_dimensions")
    told = {"mp_world_size": metadata.get("mp_world_size")}
    told |= {k: v for k, v in degrees.items() if isinstance(k, str)} if isinstance(degrees, dict) else {}
    for name, size in told.items():
        if type(size) is int and size > 1:
            message = f"expected one model-parallel rank, found {printable(name, 40)} {size}"
            fail("unsupported", message, file=file, where=printable(name, 40), hint=JOINED)
