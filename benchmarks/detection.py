"""How many planted mistakes a verification catches, locates and names, beside the bars that others publish,
and how many right conversions fail.

    python benchmarks/detection.py [--family F] [--kind TEXT] [--sample N [--offset K]] [--json FILE]
    python benchmarks/detection.py --mode quick --level parity   # or --costly, as large models are verified
    python benchmarks/detection.py --right [--jobs 2] [--mode quick]
    python benchmarks/detection.py --show FILE...     the tables of earlier runs together

Every kind of mistake is planted into the conversion of a tiny original of every family, one at a time, and
the whole is verified. There are those in tensors and config.json (fixtures/flaws_kinds.py, flaws_values.py),
those that the reading of an architecture says are its own (own.py), rows of the family's table that are wrong
on the way in and on the way back (symmetric.py), and those in tokenizers and other documents
(fixtures/flaws_documents.py). Quantised copies of a tiny original in each format are families of their own
("qwen3 as fp8-blocks"), into which those with codes and scales are planted (fixtures/flaws_packed.py): in
what was carried, and in numbers that were made of it.

    acts      the logits of the converted model change in at least one bit; a document is another one
    caught    the verdict is not a pass; of a document: it fails
    located   a failing finding or the diagnosis names the right layer or tensor
    named     the diagnosis gives the right cause (a value of config.json: names it with the right one)
    misnamed  a diagnosis states another cause
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import own  # beside this file
import peers
import symmetric

from ckpt_tool.api import Options, convert
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures import (
    flaws_packed,
    flaws_values,  # noqa: F401  (adds its kinds)
)
from ckpt_tool.fixtures.flaws import Folder, NotHere
from ckpt_tool.fixtures.flaws_documents import MISTAKES
from ckpt_tool.fixtures.flaws_kinds import KINDS, Roles, Truth
from ckpt_tool.fixtures.quantised import FORMATS, quantise
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import LEVELS, Report, effort, verify
from ckpt_tool.verify.claims import MODES, Mode

# Per family: the variants that mistakes are planted in, in turn.
PLANTED = {
    "mistral": ("mistral-7b-v0.3", "mistral-7b-v0.1", "mistral-float32"),
    "mixtral": ("mixtral-c", "mixtral-a", "mixtral-b"),
    "llama": (
        "llama-3-70b",
        "llama-2-70b",
        "llama-1-13b",
        "llama-3.1-405b-mp16",
        "llama-3.2-1b",
        "llama-2-7b",
    ),
    "megatron-bert": ("bert-v2-tp2", "bert-v1-bare", "bert-2019-tp2"),
    "megatron-gpt2": ("gpt2-v2-tp2", "gpt2-v1-bare", "gpt2-2019-tp2", "gpt2-core-tp2"),
    "opt": ("opt-13b", "opt-float32", "opt-350m"),
    "codegen": ("codegen-350m-mono", "codegen-8-cores", "codegen-16b-nl"),
    "qwen2": ("qwen2-0.5b", "qwen2.5-14b", "qwen2-mcore", "qwen2-window"),
    "qwen3": ("qwen3-0.6b", "qwen3-8b", "qwen3-float32"),
    "gemma2": ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
    "gpt-neox": ("pythia-410m", "redpajama-3b", "gpt-neox-20b", "gpt-neox-tied"),
    "mega": ("mega-wikitext", "mega-laplace", "mega-chunks", "mega-decoder"),
    "canine": ("canine-s", "canine-c-training", "canine-tydi"),
    "mluke": ("mluke-base", "mluke-aware", "mluke-bare"),
    "mobilebert": ("mobilebert-uncased", "mobilebert-training", "mobilebert-squad"),
    "gpt-oss": ("gpt-oss-20b", "gpt-oss-120b"),
    "ministral3": ("ministral3-3b", "mistral3-images"),
}
# Quantised copies: a family as one format, and the variant that is quantised.
AS = " as "
BASES = {
    "qwen3": "qwen3-float32",
    "llama": "llama-1-13b",
    "qwen2": "qwen2.5-14b",
    "mistral": "mistral-float32",
    "mixtral": "mixtral-c",
    "ministral3": "ministral3-3b",
}
UNFIT = {
    "qwen2": 32,
    "mistral": 16,
    "mixtral": 16,
    "ministral3": 16,
}  # by columns of a block, which divide no row of theirs
CODED = {
    f"{family}{AS}{form}": (f"{base}{AS}{form}",)
    for family, base in BASES.items()
    for form, written in FORMATS.items()
    if written.columns < UNFIT.get(family, 64)
}
EVERY = {**PLANTED, **CODED}
PACKED = {"gpt-oss": PLANTED["gpt-oss"], **CODED}
NUMBERS = Options(dequantize="BF16")
OF_FORMATS = (*flaws_packed.CARRIED, *flaws_packed.NUMBERS)
ONCE = peers.Once()
BACK = "back, "  # a symmetric mistake on the way to the original


@dataclass(frozen=True)
class Outcome:
    """What became of one planted mistake."""

    kind: str
    family: str
    variant: str
    acts: bool
    caught: bool
    located: bool
    named: bool
    misnamed: bool
    cause: str
    seconds: float
    level: str = "weights"  # or "config", "table", "documents"
    bits: bool = False  # whether the levels each caught it
    parity: bool = False
    peers: dict[str, bool] = field(default_factory=dict)  # whether the bars of others catch it


@dataclass(frozen=True)
class How:
    """How each is verified: `levels` None for all; `costly` as if no long prompt were affordable, as is so of
    large models."""

    mode: Mode = "default"
    levels: tuple[str, ...] | None = None
    costly: bool = False

    def verify(self, folder: Path, source: Path, settings: Any) -> Report:
        if self.costly:
            effort.AFFORDABLE = 0.0
        return verify(folder, source, settings=settings, mode=self.mode, levels=self.levels)


@dataclass(frozen=True)
class Part:
    """Every `sample`th pair of kind and family: the parts with offsets from 0 up to it are all pairs, each
    once."""

    sample: int = 1
    offset: int = 0

    def of(self, listed: list[str]) -> list[str]:
        return listed[self.offset :: self.sample]


@dataclass(frozen=True)
class Task:
    kind: str
    variant: str
    root: str
    how: How


def family_of(variant: str) -> str:
    base, _, form = variant.partition(AS)
    return VARIANTS[base].family + (f"{AS}{form}" if form else "")


def settings_of(variant: str) -> dict[str, Any]:
    """Of a quantised copy none: it is a conversion that is quantised."""
    return {} if AS in variant else dict(VARIANTS[variant].settings)


def coded(root: Path, variant: str) -> tuple[Path, Path]:
    """A quantised copy and its conversion, written once."""
    base, _, form = variant.partition(AS)
    home = root / variant
    if not (home / "right").exists():
        quantise(made(root, base)[1], home / "original", form)
        convert(home / "original", home / "right", check=False)
    return home / "original", home / "right"


def as_numbers(root: Path, variant: str) -> Path:
    """The conversion to numbers, written once."""
    out = root / variant / "numbers"
    if not out.exists():
        options = replace(NUMBERS, settings=settings_of(variant))
        convert(made(root, variant)[0], out, options=options, check=False)
    return out


def made(root: Path, variant: str) -> tuple[Path, Path]:
    """The original and its conversion, written once."""
    if AS in variant:
        return coded(root, variant)
    chosen, home = VARIANTS[variant], root / variant
    if not (home / "path").exists():
        source = chosen.write(home / "original")
        convert(source, home / "right", family=chosen.family, options=Options(settings=chosen.settings))
        (home / "path").write_text(str(source), encoding="utf-8")
    return Path((home / "path").read_text(encoding="utf-8")), home / "right"


def planted(kind: str, folder: Path, carried: Path) -> Truth | None:
    """Plant it; None where the folder has nothing to plant it in. `carried` has the codes of its numbers."""
    if kind in KINDS or kind in OF_FORMATS:
        opened = Folder(folder)
        try:
            if kind in flaws_packed.NUMBERS:
                return flaws_packed.NUMBERS[kind](opened, carried)
            if kind in flaws_packed.CARRIED:
                return flaws_packed.CARRIED[kind](opened)
            return KINDS[kind](opened, Roles(opened))
        except NotHere:
            return None
        finally:
            opened.checkpoint.close()
    if kind.startswith(own.PREFIX):
        return own.plant(kind, folder)
    where = MISTAKES[kind](folder)
    return None if where is None else Truth(None, (where,), ".*")


def tasks(root: Path, families: Iterable[str], kinds: Sequence[str], part: Part, how: How) -> list[Task]:
    """One for each kind and family: the variant changes from kind to kind."""
    listed = []
    for at, kind in enumerate(kinds):
        for shift, family in enumerate(families):
            if (at + shift) % part.sample != part.offset:
                continue
            variants = EVERY[family]
            listed.append(
                Task(
                    kind,
                    "|".join(variants[(at + k) % len(variants)] for k in range(len(variants))),
                    str(root),
                    how,
                )
            )
    return listed


def outcome(task: Task) -> Outcome | None:
    """The first of the task's variants that the mistake can be made in, verified with it."""
    root = Path(task.root)
    for variant in task.variant.split("|"):
        source, right = made(root, variant)
        carried = right
        if task.kind in flaws_packed.NUMBERS:
            right = as_numbers(root, variant)
        folder = Path(tempfile.mkdtemp(prefix="planted-", dir=root))
        try:
            if task.kind.startswith(symmetric.PREFIX):
                return of_the_table(task, variant, folder, source, right)
            shutil.copytree(right, folder, dirs_exist_ok=True)
            truth = planted(task.kind, folder, carried)
            if truth is not None and task.kind in MISTAKES:
                return of_documents(task.kind, variant, folder, source, truth)
            if truth is not None:
                return judged(task, variant, folder, source, right, truth)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def fails(report: Report, level: str) -> bool:
    return any(f.status == "fail" for f in report.level(level))


def of_documents(kind: str, variant: str, folder: Path, source: Path, truth: Truth) -> Outcome:
    began = time.monotonic()
    report = verify(folder, source, settings=VARIANTS[variant].settings, levels=("coverage",))
    found = any(f.status == "fail" and truth.tensors[0] in f"{f.where} {f.message}" for f in report.findings)
    return Outcome(
        kind, VARIANTS[variant].family, variant, True, report.status == "fail", found, found, False, "",
        time.monotonic() - began, "documents",
    )  # fmt: skip


def of_the_table(task: Task, variant: str, folder: Path, source: Path, right: Path) -> Outcome | None:
    """Both ways with the wrong row: the original is read through it, and so is the way back."""
    began, kind, chosen = time.monotonic(), task.kind, VARIANTS[variant]
    name = kind.removeprefix(symmetric.PREFIX)
    back, name = name.startswith(BACK), name.removeprefix(BACK)
    options = Options(settings=chosen.settings)
    known = {w.name: w for w in symmetric.listed(chosen.family, source, options)}
    if name not in known:
        return None
    wrong, out = known[name], folder / "out"
    try:
        compared = symmetric.written(chosen.family, source, right, out, options, wrong, back)
    except CkptToolError as error:
        if error.kind != "tied-mismatch":
            raise
        return None  # the conversion compares copies, so this mistake cannot be made
    once = ONCE.of((variant, kind) if back else variant)
    with symmetric.believed(chosen.family, wrong), peers.seen() as passes, once:
        report = task.how.verify(out, compared, {} if back else chosen.settings)
    acts = _acts(out, right, source, folder / "again" if back else None, variant)
    truth = Truth(None, wrong.tensors, ".*")
    causes = [str(f.data["cause"]) for f in report.level("diagnosis") if f.data.get("cause")]
    known_as = own.changed(right) if not all(map(wrong.names, causes)) else {}
    right_ones = [wrong.names(c) or known_as.get(c) == set(wrong.tensors) for c in causes]
    named = any(right_ones)
    return Outcome(
        kind, chosen.family, variant, acts, report.status != "pass", named or located(report, truth), named,
        not all(right_ones),
        "; ".join(causes), time.monotonic() - began, "table", fails(report, "bits"), fails(report, "parity"),
        peers.caught(passes) or {},
    )  # fmt: skip


def _acts(out: Path, right: Path, source: Path, again: Path | None, variant: str) -> bool:
    """Whether the wrong model, or what the wrong original becomes `again`, is another one: an original that
    is refused is."""
    if again is None:
        return changes_logits(out, right, source, variant)
    try:
        options = Options(settings=VARIANTS[variant].settings)
        convert(out, again, family=VARIANTS[variant].family, options=options)
    except CkptToolError:
        return True
    return changes_logits(again, right, source, variant)


def judged(task: Task, variant: str, folder: Path, source: Path, right: Path, truth: Truth) -> Outcome:
    began, kind = time.monotonic(), task.kind
    with peers.seen() as passes, ONCE.of(f"{variant} {right.name}"):
        report = task.how.verify(folder, source, settings_of(variant))
    acts = changes_logits(folder, right, source, variant)
    causes = [str(f.data["cause"]) for f in report.level("diagnosis") if f.data.get("cause")]
    keys = [t for t in truth.tensors if t.startswith("config.json")]
    named = bool(causes) and truth.names(causes[0])
    if keys and not causes:
        named = any(f.where in keys for f in report.findings if f.status == "fail")
    return Outcome(
        kind, family_of(variant), variant, acts, report.status != "pass", located(report, truth), named,
        any(not truth.names(c) for c in causes), "; ".join(causes), time.monotonic() - began,
        "format" if kind in OF_FORMATS else "config" if keys else "weights",
        fails(report, "bits"), fails(report, "parity"),
        peers.caught(passes) or {},
    )  # fmt: skip


def located(report: Report, truth: Truth) -> bool:
    phase = truth.phase if isinstance(truth.phase, str) else f"layer {truth.phase}"
    for f in report.findings:
        text = f"{f.where} {f.message}"
        if f.level == "diagnosis" and f.where == phase:
            return True
        if f.status == "fail" and any(t in text for t in truth.tensors):
            return True
        if f.status == "fail" and str(f.data.get("first")) in phases_of(truth):
            return True
    return False


def phases_of(truth: Truth) -> set[str]:
    """The first layer that the mistake touches."""
    numbers = [n for t in truth.tensors if (n := symmetric.layer_of(t)) is not None]
    return {f"layer {min(numbers)}"} if numbers else {"embed", "head"} if truth.phase is None else set()


def outputs(path: Path, source: Path, variant: str) -> list[object] | None:
    """What the converted model in the folder computes of every token; None where it computes nothing."""
    import torch

    from ckpt_tool.verify.sides import converted_side
    from ckpt_tool.verify.subject import opened

    try:
        with opened(path, source, settings_of(variant)) as subject:
            if subject.hf is None:  # no such model is read
                return None
            side = converted_side(subject, torch.float32, "cpu")
            vocabulary = side.vocabulary
            ids = torch.arange(vocabulary // 2 * 2).view(2, -1)  # every row, longer than a window
            ids = ids[:, : side.fits(min(ids.shape[1], 400))]
            return list(side.outputs(ids).values())
    except (CkptToolError, KeyError, ValueError, IndexError, RuntimeError):
        return None


RIGHT: dict[str, list[object] | None] = {}


def changes_logits(folder: Path, right: Path, source: Path, variant: str) -> bool:
    """Whether the converted model computes other numbers with the mistake than without, in any bit."""
    import torch

    key = str(right)
    if key not in RIGHT:
        RIGHT[key] = outputs(right, source, variant)
    one, other = RIGHT[key], outputs(folder, source, variant)
    if one is None or other is None or len(one) != len(other):
        return True
    return any(
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and not torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


# --- tables ---------------------------------------------------------------------------------------------

COLUMNS = ("planted", "acts", "caught", "located", "named", "misnamed")
WHERE = ("weights", "config", "table", "format", "documents")


def counted(outcomes: Sequence[Outcome]) -> tuple[int, ...]:
    """Those that act; what changes no number and no document is only counted as planted."""
    act = [o for o in outcomes if o.acts]
    return (len(outcomes), len(act), *(sum(getattr(o, c) for o in act) for c in COLUMNS[2:]))


def table(outcomes: Sequence[Outcome], key: str) -> list[str]:
    groups = defaultdict(list)
    for o in outcomes:
        groups[getattr(o, key)].append(o)
    width = max([len(g) for g in groups] + [len(key)])
    lines = [f"{key:{width}} " + " ".join(f"{c:>8}" for c in COLUMNS)]
    for group, its in groups.items():
        lines.append(f"{group:{width}} " + " ".join(f"{n:8d}" for n in counted(its)))
    lines.append(f"{'all':{width}} " + " ".join(f"{n:8d}" for n in counted(outcomes)))
    return lines


def beside(outcomes: Sequence[Outcome]) -> list[str]:
    """Who catches what acts and has logits, by where it was planted."""
    held = [o for o in outcomes if o.acts and o.peers]
    names = list(peers.BARS)
    heads = ["cases", "verify", "parity", "bits", *names]
    lines = [f"{'planted in':10} " + " ".join(f"{h:>11}" for h in heads)]
    for level in (*WHERE[:4], "all"):
        its = [o for o in held if level in (o.level, "all")]
        counts = [len(its), *(sum(getattr(o, c) for o in its) for c in ("caught", "parity", "bits"))]
        counts += [sum(o.peers[n] for o in its) for n in names]
        lines.append(f"{level:10} " + " ".join(f"{n:11d}" for n in counts))
    return lines


def shortcomings(outcomes: Sequence[Outcome]) -> list[str]:
    """What acts and was not caught, not located, or called something else."""
    made = []
    for o in outcomes:
        words = [w for w in ("caught", "located", "named") if o.acts and not getattr(o, w)]
        if o.misnamed or words:
            wrong = "misnamed" if o.misnamed else f"not {words[0]}"
            made.append(f"{wrong}: {o.kind}, {o.variant}: {o.cause[:150]}")
    return sorted(made)


def shown(outcomes: Sequence[Outcome]) -> int:
    """Print all tables; 1 where something was missed or called something else."""
    kinds = {o.kind for o in outcomes}
    for text in (
        table(outcomes, "kind"),
        table(outcomes, "family"),
        table(outcomes, "level"),
        beside(outcomes),
    ):
        print("\n".join(text), end="\n\n")
    print(f"{len(kinds)} kinds in {len({o.family for o in outcomes})} families")
    print("\n".join(shortcomings(outcomes)))
    return int(any(o.acts and not o.caught for o in outcomes) or any(o.misnamed for o in outcomes))


def every_task(root: Path, families: Sequence[str], text: str, part: Part, how: How) -> list[Task]:
    packed = [f for f in families if f in PACKED]
    listed = tasks(root, packed, [k for k in OF_FORMATS if text in k], part, how)
    plain = [f for f in families if f not in CODED]
    kinds = [k for k in (*KINDS, *MISTAKES) if text in k]
    listed += tasks(root, plain, kinds, part, how)
    for family in plain:
        found = dict.fromkeys(k for v in PLANTED[family] for k in own.kinds(made(root, v)[1]))
        listed += tasks(root, [family], [k for k in found if text in k], part, how)
        first = PLANTED[family][0]
        options = Options(settings=VARIANTS[first].settings)
        rows = [w.name for w in symmetric.listed(family, made(root, first)[0], options)]
        both = [f"{symmetric.PREFIX}{way}{name}" for name in rows for way in ("", BACK)]
        wanted = part.of([k for k in both if text in k])
        listed += [Task(k, first, str(root), how) for k in wanted]
    order = {family: k for k, family in enumerate(families)}
    return sorted(listed, key=lambda t: order[family_of(t.variant.split("|")[0])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--family", choices=sorted(EVERY), action="append", metavar="F", help="one of many, again for more"
    )
    parser.add_argument("--kind", default="", help="only kinds whose name holds this text")
    parser.add_argument("--sample", type=int, metavar="N", help="every Nth pair of kind and family")
    parser.add_argument("--offset", type=int, default=0, metavar="K", help="of N parts the Kth, from 0")
    parser.add_argument("--mode", choices=MODES, default="default", help="how much of parity runs")
    parser.add_argument("--level", action="append", choices=LEVELS, help="these levels only")
    parser.add_argument("--costly", action="store_true", help="leave out what is left out of large models")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, written as it is found")
    parser.add_argument("--right", action="store_true", help="right conversions instead: none may fail")
    parser.add_argument("--work", type=Path, help="where originals and conversions are written")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="tables of earlier runs")
    asked = parser.parse_args(arguments)
    part = Part(asked.sample or 1, asked.offset)
    if not 0 <= part.offset < part.sample:
        parser.error(f"expected an --offset from 0 to {part.sample - 1}, found {part.offset}")
    if asked.show and asked.right:
        import right  # beside this file

        return int(right.shown(right.read(asked.show)))
    if asked.show:
        lines = [line for file in asked.show for line in file.read_text(encoding="utf-8").splitlines()]
        return shown([Outcome(**json.loads(line)) for line in lines])
    how = How(asked.mode, tuple(asked.level) if asked.level else None, asked.costly)
    with tempfile.TemporaryDirectory(prefix="detection-") as temporary:
        root = asked.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        families = asked.family or list(EVERY)
        if asked.right:
            import right

            return int(
                right.main(root, families, part.sample, part.offset, asked.jobs, asked.json, asked.mode)
            )
        for variant in (v for family in families for v in EVERY[family]):
            made(root, variant)
        listed = every_task(root, families, asked.kind, part, how)
        status = shown(list(run(listed, asked.jobs, asked.json)))
    levels = ", ".join(how.levels or ("all",))
    print(f"\nmode {how.mode}{', long prompts costly' * how.costly}, levels {levels}")
    return status


def run(listed: Sequence[Task], jobs: int, file: Path | None) -> Iterable[Outcome]:
    """In order, each written down at once: one JSON object in a line."""
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            yield from noted(pool.map(outcome, listed, chunksize=8), file)
    else:
        yield from noted((outcome(t) for t in listed), file)  # `map` would end at a StopIteration


def noted(found: Iterable[Outcome | None], file: Path | None) -> Iterable[Outcome]:
    for o in found:
        if o is None:
            continue
        if file is not None:
            with file.open("a", encoding="utf-8") as held:
                held.write(json.dumps(asdict(o)) + "\n")
        yield o


if __name__ == "__main__":
    sys.exit(main())
