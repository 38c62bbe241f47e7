"""Megatron's checkpoint folders: which files are the ranks of one model, whether all of them are there and
belong together, and what stands beside the tensors.

    latest_checkpointed_iteration.txt                 `release`, or the number of an iteration
    iter_0001000/mp_rank_01/model_optim_rng.pt        tensor-parallel rank 1
    release/mp_rank_01_003/model_optim_rng.pt         tensor-parallel rank 1, pipeline stage 3
    release/mp_rank_01_003_002/model_optim_rng.pt     ... and expert-parallel rank 2
    mp_rank_01/model_weights.ckpt                     in an archive of NeMo; with pipeline stages
    tp_rank_01_pp_rank_003/model_weights.ckpt

A second number is an expert-parallel rank where there are no pipeline stages: the files tell which.

Source: NVIDIA/Megatron-LM v1.0 to core_v0.9.0, checkpointing.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from math import lcm, prod
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"  # the development versions of 2022 called it model_rng.pt
_ITERATION = re.compile(r"iter_\d{7,}|release", re.ASCII)
_RANK = re.compile(
    r"[mt]p_rank_(?P<rank>\d{2,4})(_(?:pp_rank_)?(?P<second>\d{3,5})(_(?P<third>\d{3,5}))?)?", re.ASCII
)
_PATH = re.compile(
    rf"(?P<above>.*/)?(?P<folder>{_RANK.pattern})/(model(_optim)?_rng\.pt|model_weights\.ckpt)", re.ASCII
)
_SHOWN = 8
MOST = 1 << 20  # ranks of a run
ALL_RANKS = "each rank is saved on the machine that ran it: copy the others into the same folder"
_TOGETHER = "the files of one checkpoint belong together; was one taken from another run?"
_WORDS = "embedding.word_embeddings.weight"  # of which a stage after the first has none
_EXPERTS = ".mlp.experts."
Place = tuple[int, int, int]  # tensor-parallel rank, pipeline stage, expert-parallel rank

# The arguments that say what a model computes and how it was shared out, in the order they are shown.
ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "max_position_embeddings",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "orig_vocab_size",
    "tokenizer_type",
    "model_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "layernorm_epsilon",
    "norm_epsilon",
    "bias_gelu_fusion",
    "openai_gelu",
    "onnx_safe",
    "swiglu",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "apply_residual_connection_post_layernorm",
)


@dataclass(frozen=True)
class RankFolders:
    """The weight files of one model as paths below the folder given, in the order of ranks, then stages."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_rank_folder(name: str) -> bool:
    return _RANK.fullmatch(name) is not None


def is_iteration_folder(name: str) -> bool:
    return _ITERATION.fullmatch(name) is not None


def may_hold_ranks(folder: str) -> bool:
    """Whether to look into a folder of this name."""
    return is_rank_folder(folder) or is_iteration_folder(folder)


def is_of_megatron(path: str) -> bool:
    """Whether a file at this path can only be part of a Megatron checkpoint."""
    *folders, name = path.split("/")
    return name == TRACKER or any(may_hold_ranks(f) and f != "release" for f in folders)


def find_ranks(
    names: Collection[str], *, label: str, tracker: Callable[[str], str | None]
) -> RankFolders | None:
    """The rank files among `names` (paths below a folder called `label`); None where there are none.

    Of several iterations the one is taken that `tracker(prefix)` names, the text of
    latest_checkpointed_iteration.txt in the part `prefix` of the folder. Kinds: `missing-shard`,
    `ambiguous-input`, `bad-config`.
    """
    found: dict[str, dict[str, re.Match[str]]] = {}
    for name in names:
        if m := _PATH.fullmatch(name):
            found.setdefault(m["above"] or "", {})[name] = m
    if not found:
        if any(map(is_of_megatron, names)):
            message = f"expected mp_rank_00/{FILE}, found no file of that name"
            fail("missing-shard", message, file=label, hint=ALL_RANKS)
        return None
    within, notes = current(found, label, tracker)
    matches = list(found[within].values())
    matches.sort(key=_place)
    _check_grid(matches, label)
    return RankFolders(tuple(m[0] for m in matches), tuple(notes))


def current(
    found: Mapping[str, object], label: str, tracker: Callable[[str], str | None]
) -> tuple[str, list[str]]:
    """The iteration folder to read, as a prefix of names, and what to say about the others."""
    named: dict[str, str] = {}
    for above in found:
        root = above.rstrip("/").rpartition("/")[0]
        prefix = root + "/" if root else ""
        text = tracker(prefix) if above else None
        if text is None:
            continue
        text = text.strip()
        number = re.fullmatch(r"[0-9]{1,12}", text)
        if number is None and text != "release":
            message = f"expected `release` or the number of an iteration, found {printable(text, 40)!r}"
            fail("bad-config", message, file=prefix + TRACKER)
        named[prefix] = prefix + ("release/" if number is None else f"iter_{int(text):07d}/")
    if len(named) == 1:
        ((prefix, within),) = named.items()
        if within not in found:
            there = ", ".join(sorted(found)[:_SHOWN])
            fail(
                "missing-shard",
                f"expected {within} as {prefix}{TRACKER} says, found only {there}",
                file=label,
                hint=f"give the folder of the iteration that is meant, or correct {TRACKER}",
            )
        others = sorted(a for a in found if a != within)
        aside = f"{TRACKER} says {within.rstrip('/')}; {', '.join(others[:_SHOWN])} left aside"
        return within, [aside] if others else []
    if len(found) > 1:
        fail(
            "ambiguous-input",
            f"expected one iteration, or {TRACKER} to say which, found {', '.join(sorted(found)[:_SHOWN])}",
            file=label,
            hint="give the folder of the iteration that is meant",
        )
    return next(iter(found)), []


def _place(m: re.Match[str], *, experts: bool = False) -> Place:
    """`experts`: a second number is an expert-parallel rank where it is the last."""
    second, third = int(m["second"] or 0), int(m["third"] or 0)
    return (int(m["rank"]), 0, second) if experts and not m["third"] else (int(m["rank"]), second, third)


def _check_grid(matches: Sequence[re.Match[str]], label: str) -> None:
    """Every stage of every rank once. What may be all that a run saved is told by the files, once opened."""
    places = [_place(m) for m in matches]
    counts = Counter(places)
    twice = sorted({m["folder"] for m, place in zip(matches, places, strict=True) if counts[place] > 1})
    if twice:
        message = f"expected each rank once, found {' and '.join(twice)}"
        fail("ambiguous-input", message, file=label, hint=_TOGETHER)
    pairs = [(t, e if m["third"] else p) for (t, p, e), m in zip(places, matches, strict=True)]
    if _shared_by(pairs) is None:
        _check_complete(matches, label)


def _check_complete(matches: Sequence[re.Match[str]], label: str) -> None:
    """Fail with `missing-shard` unless there is every stage of every rank."""
    there = {_place(m): m["folder"] for m in matches}
    sizes = ranks, stages, experts = [1 + max(p[k] for p in there) for k in range(3)]
    if prod(sizes) > 16 * len(there) + 64:
        fail(
            "missing-shard",
            f"expected ranks numbered from 0 on, found {len(there)} up to {there[max(there)]}",
            file=label,
            hint=ALL_RANKS,
        )
    numbered = max((2 if m["third"] else 1 if m["second"] else 0) for m in matches)
    missing = [
        _folder((t, p, e), numbered)
        for t in range(ranks)
        for p in range(stages)
        for e in range(experts)
        if (t, p, e) not in there
    ]
    if missing:
        second = "pipeline stages" if numbered != 1 else "pipeline stages or expert-parallel ranks"
        said = f"{ranks} tensor-parallel ranks" + (f" x {stages} {second}" if numbered else "")
        said += f" x {experts} expert-parallel ranks" if numbered > 1 else ""
        fail(
            "missing-shard",
            f"expected {said}, found {len(there)} of {prod(sizes)}: {_list(missing)} not there",
            file=label,
            hint=ALL_RANKS,
        )


def _folder(place: Place, numbered: int) -> str:
    return f"mp_rank_{place[0]:02d}" + "".join(f"_{n:03d}" for n in place[1 : 1 + numbered])


def folder_name(rank: int, stage: int, staged: bool, expert: int | None = None) -> str:
    """`staged` where there is more than one pipeline stage, `expert` where there are several expert-parallel
    ranks."""
    return _folder((rank, stage, 0), int(staged)) + ("" if expert is None else f"_{expert:03d}")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shared_by(places: Collection[tuple[int, int]]) -> int | None:
    """Over how many tensor-parallel ranks each expert is shared out, where these tensor-parallel and
    expert-parallel ranks are all that a run with fewer than it has for the rest saves. None for a whole grid,
    and for one with holes.

    Process r of a stage has tensor-parallel rank r % ranks and expert-parallel rank r // own % parallel. No
    two before the least common multiple have the same ranks where `own` divides `ranks`, so as many processes
    saved as there are files."""
    there = set(places)
    ranks, parallel = (1 + max(p[k] for p in there) for k in range(2))
    if len(there) == ranks * parallel or max(ranks, parallel) > len(there):  # each number is some file's
        return None
    for own in range(1, ranks):
        if ranks % own or not own * parallel <= len(there) <= lcm(ranks, own * parallel):
            continue
        if there == {(r % ranks, r // own % parallel) for r in range(len(there))}:
            return own
    return None


# --- once they are opened -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """The files by their place, of `ranks` tensor-parallel ranks, `stages` and `experts` expert-parallel
    ranks. Each expert is shared out over `own` tensor-parallel ranks: where these are fewer than the rest is
    shared out over, a tensor-parallel rank has files of some expert-parallel ranks only."""

    files: Mapping[Place, str]
    ranks: int
    stages: int
    experts: int
    own: int

    def rows(self) -> dict[tuple[int, int], list[str]]:
        """The files of all stages by (expert-parallel rank, tensor-parallel rank), in this order."""
        found: dict[tuple[int, int], list[str]] = {}
        for t, p, e in sorted(self.files, key=lambda place: (place[2], place[0], place[1])):
            found.setdefault((e, t), []).append(self.files[t, p, e])
        return found


def placed(checkpoint: Checkpoint) -> Placed:
    """The ranks of a checkpoint. A file that no rank folder names is alone. Kinds: `missing-shard`,
    `ambiguous-input`."""
    files: dict[Place, str] = {}
    as_experts = _second_is_expert(checkpoint)
    for name in checkpoint.files:
        m = _PATH.fullmatch(name)
        files[(0, 0, 0) if m is None else _place(m, experts=as_experts)] = name
    ranks, stages, parallel = (1 + max(p[k] for p in files) for k in range(3))
    first = next(iter(checkpoint.files.values()))
    args = {} if first.format == "dcp" else arguments(first) or {}  # ranks are joined there
    wanted = max(ranks, _number(args, "tensor_model_parallel_size"))
    own = _number(args, "expert_tensor_parallel_size", wanted)
    whole = len(files) == ranks * stages * parallel
    if own < wanted and wanted % own == 0 and len(files) == len(checkpoint.files) and _routed(checkpoint):
        parallel = max(parallel, _number(args, "expert_model_parallel_size"))
        if wanted * parallel * stages > MOST:
            message = f"expected a number of ranks, found {wanted} x {parallel} x {stages}"
            fail("bad-config", message, file=first.name, where="args: expert_tensor_parallel_size")
        made = Placed(files, wanted, stages, parallel, own)
        _check_shared_out(made, checkpoint.path.name)
        return made
    matches = [m for name in checkpoint.files if (m := _PATH.fullmatch(name))]
    if not whole and len(matches) == len(checkpoint.files):
        _check_complete(matches, checkpoint.path.name)
    if len(files) != len(checkpoint.files) or not whole:
        fail(
            "ambiguous-input",
            f"expected the ranks of one Megatron checkpoint, found {_list(list(checkpoint.files))}",
            file=checkpoint.path.name,
            hint="give the folder of the iteration that is meant, with its ranks alone in it",
        )
    return Placed(files, ranks, stages, parallel, ranks)


def _number(args: Mapping[str, Any], name: str, otherwise: int = 1) -> int:
    """A count among args."""
    found = args.get(name)
    return found if type(found) is int and 0 < found < MOST else otherwise


def _routed(checkpoint: Checkpoint) -> bool:
    return any(_EXPERTS in n for f in checkpoint.files.values() for n in f.tensors)


def _check_shared_out(run: Placed, label: str) -> None:
    """Fail with `missing-shard` unless every stage has a file of each tensor-parallel rank, of each share of
    each expert-parallel rank's experts, and of all ranks that another stage has one of."""
    several = run.experts > 1

    def called(r: int, p: int) -> str:
        return folder_name(r % run.ranks, p, run.stages > 1, r // run.own % run.experts if several else None)

    # More processes may have saved, whose files repeat what those of these ranks hold.
    dense = {(t, p) for t, p, _ in run.files}
    shares = {(e, t % run.own, p) for t, p, e in run.files}
    first = run.own * run.experts
    gone = [
        called(r, p)
        for r in range(first)
        for p in range(run.stages)
        if (r // run.own, r % run.own, p) not in shares
    ]
    left = [
        called(r, p) for r in range(run.ranks) for p in range(run.stages) if (r % run.ranks, p) not in dense
    ]
    cut = [
        folder_name(t, p, run.stages > 1, e if several else None)
        for e, t in run.rows()
        for p in range(run.stages)
        if (t, p, e) not in run.files
    ]
    if not gone and not left and not cut:
        return
    said = f"{run.ranks} tensor-parallel ranks x {run.experts} expert-parallel ranks"
    unsaved = not gone and first < run.ranks and {t for t, _, _ in run.files} == set(range(first))
    way = (
        f"Megatron-Core before 0.18 saves of such a run the files of the first {first} ranks only: load it "
        "with Megatron and save it with --ckpt-format torch_dist"
        if unsaved
        else ALL_RANKS
    )
    fail(
        "missing-shard",
        f"expected {said}, each expert shared out over {run.own} (args: expert_tensor_parallel_size), found "
        f"{len(run.files)} files: {_list(list(dict.fromkeys([*gone, *left, *cut])))} not there",
        file=label,
        hint=way,
    )


def _second_is_expert(checkpoint: Checkpoint) -> bool:
    """Whether two numbers in a folder's name are a tensor-parallel and an expert-parallel rank: as args say,
    else where a file with the second above 0 has both experts and the embedding, which only the first
    pipeline stage has."""
    found = {name: m for name in checkpoint.files if (m := _PATH.fullmatch(name))}
    later = next((n for n, m in found.items() if m["second"] and int(m["second"])), None)
    if later is None or any(m["third"] or "_pp_rank_" in m["folder"] for m in found.values()):
        return False
    file = checkpoint.files[later]
    args = arguments(file) or {}
    stages, experts = args.get("pipeline_model_parallel_size"), args.get("expert_model_parallel_size")
    if isinstance(stages, int) and isinstance(experts, int) and (stages > 1) != (experts > 1):
        return experts > 1
    return any(n.endswith(_WORDS) for n in file.tensors) and any(_EXPERTS in n for n in file.tensors)


def arguments(file: TensorFile) -> dict[str, Any] | None:
    """The plain values among the pickled args, those of ARGUMENTS first; None where there are no args."""
    fields = _args_of(file)
    if fields is None:
        return None
    plain = {k: v for k, v in fields.items() if isinstance(k, str) and _is_plain(v)}
    first = {k: plain[k] for k in ARGUMENTS if k in plain}
    return {**first, **plain}


def every_argument(file: TensorFile) -> dict[str, Any] | None:
    """All pickled args: lists as lists, a global by its name, a layout of pipeline stages as it was asked
    for, and other objects in words. None where there are no args."""
    fields = _args_of(file)
    if fields is None:
        return None
    return {k: _in_words(v) for k, v in fields.items() if isinstance(k, str)}


def _args_of(file: TensorFile) -> Mapping[Any, Any] | None:
    from ckpt_tool.checkpoint.pickle_records import Inert

    found = file.metadata.get("args")
    return found.fields if isinstance(found, Inert) else found if isinstance(found, dict) else None


def _in_words(value: object, depth: int = 4) -> Any:
    from ckpt_tool.checkpoint.pickle_records import Global, Inert, describe

    if _is_plain(value):
        return value
    if isinstance(value, list | tuple) and depth:
        return [_in_words(v, depth - 1) for v in value]
    if isinstance(value, Inert) and "input_data" in value.fields and depth:
        return _in_words(value.fields["input_data"], depth - 1)
    return str(value) if isinstance(value, Global) else {} if value == {} else describe(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def check_same_run(checkpoint: Checkpoint) -> None:
    """Fail with `shard-conflict` where the files are of different iterations or versions, or of runs that
    were shared out otherwise; with `missing-shard` where args speak of more ranks than there are."""
    run = placed(checkpoint)
    names = [name for row in run.rows().values() for name in row]
    first = checkpoint.files[names[0]]
    if first.format == "dcp":
        return  # the ranks are joined there, whatever args say of them
    problems = []
    for name in names[1:]:
        file = checkpoint.files[name]
        for key in ("iteration", "checkpoint_version"):
            one, two = first.metadata.get(key), file.metadata.get(key)
            if _is_plain(one) and _is_plain(two) and one != two:
                message = f"expected {key} {one} as in {first.name}, found {two}"
                problems.append(Problem("shard-conflict", message, name, key, _TOGETHER))
        own, other = arguments(first), arguments(file)
        if (own is None) != (other is None):
            there, not_there = (first.name, name) if other is None else (name, first.name)
            message = f"expected args in all ranks or none, found them in {there} and not in {not_there}"
            problems.append(Problem("shard-conflict", message, name, "args", _TOGETHER))
            continue
        odd = [k for k in ARGUMENTS if own is not None and other is not None and own.get(k) != other.get(k)]
        if odd and own is not None and other is not None:
            message = f"expected {odd[0]} {own.get(odd[0])} as in {first.name}, found {other.get(odd[0])}"
            problems.append(Problem("shard-conflict", message, name, f"args: {odd[0]}", _TOGETHER))
    fail_all(problems)
    args = arguments(first) or {}
    told = {
        "tensor_model_parallel_size": args.get("tensor_model_parallel_size", args.get("model_parallel_size")),
        "pipeline_model_parallel_size": args.get("pipeline_model_parallel_size"),
        "expert_model_parallel_size": args.get("expert_model_parallel_size"),
    }
    sizes = zip(told, ("ranks", "stages", "experts"), (run.ranks, run.stages, run.experts), strict=True)
    for key, which, found in sizes:
        wanted = told[key]
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted == found:
            continue
        if wanted > found:
            check_complete(checkpoint, **{which: wanted}, why=key)
        message = f"expected {wanted} as args say, found {found}"
        problems.append(Problem("shard-conflict", message, first.name, f"args: {key}", _TOGETHER))
    fail_all(problems)


def check_complete(
    checkpoint: Checkpoint, *, ranks: int = 1, stages: int = 1, experts: int = 1, why: str
) -> None:
    """Fail with `missing-shard`, naming the folders that are not there, unless there are as many; `why` says
    what the numbers are known from."""
    run = placed(checkpoint)
    found = run.ranks, run.stages, run.experts
    wanted = tuple(map(max, (ranks, stages, experts), found))
    if prod(wanted) > MOST:
        fail("bad-config", f"expected a number of ranks, found {' x '.join(map(str, wanted))}", where=why)
    several = wanted[2] > 1
    missing = [
        folder_name(t, p, wanted[1] > 1, e if several else None)
        for t in range(wanted[0])
        for p in range(wanted[1])
        for e in range(wanted[2])
        if t >= found[0] or p >= found[1] or e >= found[2]
    ]
    if missing:
        shown = 3 if several else 2
        said = ("tensor-parallel ranks", "pipeline stages", "expert-parallel ranks")[:shown]
        counts = " x ".join(f"{n} {what}" for n, what in zip(wanted, said, strict=False))
        fail(
            "missing-shard",
            f"expected {counts} ({why}), found {' x '.join(map(str, found[:shown]))}: "
            f"{_list(missing)} not there",
            file=checkpoint.path.name,
            hint=ALL_RANKS,
        )
