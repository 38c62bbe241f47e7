"""`ckpt-tool gate parity.toml`: conversions and verifications written down once, run by CI, one verdict.

[bars]                          # for every check
catch_rate = 1.0

[[check]]
name = "Mistral 7B v0.1"
convert = "mistral"             # optional: convert `source` into `out` first
source = "mistral-7B-v0.1"      # paths are relative to this file
out = "out/mistral"
against = "transformers"
require = ["bits", "parity"]    # levels of which nothing may be skipped

[check.bars]                    # stricter than the policy, never looser
nmse = 1e-10
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.remote_path import scheme_of
from ckpt_tool.convert import options
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.convert.plan import Options, dtype_option
from ckpt_tool.convert.quantised_asked import dequantize_option
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, fail_unread, near
from ckpt_tool.verify import ASKED_FOR, DTYPES, JUDGES, claims, verify
from ckpt_tool.verify.baseline import MORE, hold_against, read_baseline
from ckpt_tool.verify.claims import MODES, Mode
from ckpt_tool.verify.report import Finding, Report, Reports, Status

LEVEL = "gate"
SIZE_LIMIT = 1 << 20  # bytes of a gate file
# Bars: the largest value that may be measured, or the smallest where more is better.
LARGEST = ("nmse", "max_delta", "kl")
SMALLEST = ("top1", "catch_rate")
CLASSES = tuple(c for c in reversed(claims.CLASSES) if c != "differs")  # the strictest first


@dataclass(frozen=True)
class Check:
    """One entry of a gate file; see the module docstring and docs/verification.md."""

    name: str
    out: str
    source: str | None = None
    convert: str | None = None
    overwrite: bool = False
    overwrite_foreign: bool = False
    dtype: str | None = None
    dequantize: str | None = None
    recipe: str | None = None
    levels: tuple[str, ...] | None = None  # None: all, and what cannot run is skipped
    require: tuple[str, ...] = ()
    against: str | None = None
    no_source: bool = False
    accept: tuple[str, ...] = ()
    prompts: str | None = None
    compute_dtype: str = "float32"
    device: str = "cpu"
    mode: Mode = "default"
    checkpoint_id: str | None = None
    transformers_python: str | None = None
    expectations: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of the family, for the conversion
    bars: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None  # the gate file itself


# Carry out checks in any order that keeps those apart of which one reads what the other writes; the callback
# takes each one's place and report as it ends, and says whether to go on.
Carry = Callable[[Sequence[Check], Callable[[int, Report], bool]], None]


def run_gate(
    path: str | os.PathLike[str],
    carry: Carry,
    *,
    only: Iterable[str] = (),
    fail_fast: bool = False,
    baseline: str | os.PathLike[str] | None = None,
) -> Reports:
    """The reports of the checks of a gate file, in its order. A check that cannot run is told in its report,
    and the others go on, unless `fail_fast`; a file that does not read as a gate file is an error of kind
    `bad-config`, with all its problems. `only` are names of checks, or shell patterns of them; `baseline` is
    the JSON report of an earlier run, of which nothing may have got worse."""
    title, checks = read_gate(Path(path))
    recorded = None if baseline is None else read_baseline(Path(baseline))
    checks = chosen(checks, only, path)
    made: dict[int, Report] = {}

    def done(place: int, report: Report) -> bool:
        if recorded is not None:
            hold_against(report, recorded)
        made[place] = report
        return not fail_fast or report.status == "pass"

    carry(checks, done)
    left = tuple(c.name for k, c in enumerate(checks) if k not in made)
    return Reports(title, [made[k] for k in sorted(made)], left)


def chosen(checks: list[Check], only: Iterable[str], file: str | os.PathLike[str]) -> list[Check]:
    """Those that a name or pattern of `only` fits, in the order of the file; all without one."""
    patterns = list(only)
    names = [c.name for c in checks]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            hint = near(pattern, names) or f"the checks are {', '.join(names)}"
            message = f"expected the name of a check or a pattern of some, found {pattern!r}"
            fail("usage", message, file=file, where="--only", hint=hint)
    return [c for c in checks if not patterns or any(fnmatchcase(c.name, p) for p in patterns)]


def run_check(
    check: Check, convert: Callable[..., object], progress: Callable[[str], None] | None = None
) -> Report:
    try:
        if check.convert is not None:
            _convert(check, convert)
        report = verify(
            check.out,
            check.source,
            levels=check.levels,
            no_source=check.no_source,
            accept=check.accept,
            against=check.against,
            prompts=check.prompts,
            compute_dtype=check.compute_dtype,
            device=check.device,
            mode=check.mode,
            checkpoint_id=check.checkpoint_id,
            settings=check.settings,
            transformers_python=check.transformers_python,
            expectations=check.expectations,
            progress=progress,
        )
    except CkptToolError as error:
        return could_not_run(check.name, error)
    report.title = check.name
    report.findings += [*_required(check, report), *_barred(check, report)]
    return report


def could_not_run(name: str, error: CkptToolError) -> Report:
    """The report of a check that has none of its own."""
    report = Report(name, could_not_run=True)
    for p in error.problems:
        where = ": ".join(x for x in (p.file, p.where) if x) or None
        text = p.message if p.hint is None else f"{p.message} ({p.hint})"
        report.findings.append(Finding(LEVEL, "run", "undecided", text, where, data={"kind": p.kind}))
    return report


def _convert(check: Check, convert: Callable[..., object]) -> None:
    numbers = (check.dequantize, check.recipe)
    asked = Options(
        settings=check.settings,
        dtype=None if check.dtype is None else dtype_option(check.dtype),
        **({} if numbers == (None, None) else dequantize_option(*numbers)),
        **options.fields(check.options),
    )
    convert(
        check.source,
        check.out,
        family=check.convert,
        options=asked,
        check=False,  # verified just after
        overwrite=check.overwrite,
        overwrite_foreign=check.overwrite_foreign,
        beside=[p for p in (check.prompts, check.file) if p is not None],
    )


# --- what a gate asks beyond the levels -----------------------------------------------------------------


def _required(check: Check, report: Report) -> list[Finding]:
    """Of a level that was skipped nothing is known: undecided, no difference."""
    made = []
    for level in check.require:
        found = report.level(level)
        skipped = [f for f in found if f.status == "skipped"]
        if not found:
            made.append(
                Finding(
                    LEVEL, "require", "undecided", f"expected level {level} to run, found no result of it"
                )
            )
        for f in skipped:
            text = f"expected nothing of level {level} to be skipped, found {f.check}: {f.message}"
            made.append(Finding(LEVEL, "require", "undecided", text))
        if found and not skipped:
            made.append(Finding(LEVEL, "require", "pass", f"nothing of level {level} was skipped"))
    return made


def _barred(check: Check, report: Report) -> list[Finding]:
    made = []
    for name, bar in check.bars.items():
        if name == "exactness":
            allowed = CLASSES[: CLASSES.index(bar) + 1]
            text = f"expected exactness {' or '.join(allowed)}, found {report.exactness or 'no comparison'}"
            status: Status = "undecided" if report.exactness is None else "fail"
            made.append(Finding(LEVEL, name, "pass" if report.exactness in allowed else status, text))
            continue
        values = [float(v) for f in report.findings if (v := _measured(f, name)) is not None]
        if not values:
            text = "expected this to be measured, found no level that did"
            made.append(Finding(LEVEL, name, "undecided", text, bar=bar))
            continue
        worst = max(values) if name in LARGEST else min(values)
        holds = worst <= bar if name in LARGEST else worst >= bar
        text = f"{'largest' if name in LARGEST else 'smallest'} of {len(values)} measurements"
        data = {MORE: True} if name in SMALLEST else {}
        status = "pass" if holds else "fail"
        made.append(Finding(LEVEL, name, status, text, measured=worst, bar=float(bar), data=data))
    return made


def _measured(f: Finding, name: str) -> float | None:
    """A finding's number for a bar of this name: those of whole passes, and the rate of the negative
    control."""
    if f.level not in ("parity", "transformers"):
        return None
    value = f.data.get("rate" if name == "catch_rate" else name)
    return value if isinstance(value, int | float) else None


# --- reading a gate file --------------------------------------------------------------------------------


def read_gate(path: Path) -> tuple[str, list[Check]]:
    """Title and checks; every problem of the file is raised together."""
    try:
        with open(path, "rb") as f:
            data = f.read(SIZE_LIMIT + 1)
    except OSError as error:
        fail_unread(error, path)
    if len(data) > SIZE_LIMIT:
        fail("bad-config", f"expected at most {SIZE_LIMIT} bytes, found more", file=path)
    try:
        content = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of too many digits
        fail("bad-config", f"expected TOML, found none ({error})", file=path)
    problems: list[Problem] = []

    def refuse(where: str, message: str) -> None:
        problems.append(Problem("bad-config", message, str(path), where))

    for key in content.keys() - {"title", "bars", "check"}:
        refuse(key, "expected title, bars or check, found an unknown key")
    entries = content.get("check")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        refuse("check", "expected one or more [[check]] tables, found none")
        entries = []
    defaults = content.get("bars", {})
    checks = [_check(entry, k, defaults, path, refuse) for k, entry in enumerate(entries)]
    names = [c.name for c in checks if c is not None]
    for name in sorted({n for n in names if names.count(n) > 1}):
        refuse(name, "expected each name once, found it twice")
    fail_all(problems)
    return str(content.get("title", path.stem)), [c for c in checks if c is not None]


_TYPES: dict[str, type | tuple[type, ...]] = {
    "overwrite": bool,
    "no_source": bool,
    "accept": list,
    "overwrite_foreign": bool,
    "levels": list,
    "require": list,
    "settings": dict,
    "options": dict,
    "bars": dict,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "convert": (*FAMILIES, "auto"),
    "against": JUDGES,
    "compute_dtype": DTYPES,
    "mode": MODES,
}


def _check(
    entry: dict[str, Any], number: int, defaults: Any, gate: Path, refuse: Callable[[str, str], None]
) -> Check | None:
    where = str(entry.get("name", f"check {number}"))
    known = {f.name for f in fields(Check)} - {"file"}
    made, sound = dict(entry), True

    def wrong(key: str, message: str) -> None:
        nonlocal sound
        sound = False
        refuse(f"{where}: {key}", message)

    for key, value in entry.items():
        wanted = _TYPES.get(key, str)
        if key not in known:
            wrong(key, "expected a known key, found an unknown one")
        elif not isinstance(value, wanted):
            wrong(key, f"expected {getattr(wanted, '__name__', 'a value')}, found {type(value).__name__}")
        elif key in _CHOICES and value not in _CHOICES[key]:
            wrong(key, f"expected {' or '.join(_CHOICES[key])}, found {value!r}")
        elif (message := _unfit(value)) is not None:
            wrong(key, message)
    for key in ("name", "out"):
        if key not in entry:
            wrong(key, "expected a value, found none")
    if "convert" in entry and "source" not in entry:
        wrong("source", "expected the source to convert, found none")
    for key, allowed in (("levels", ASKED_FOR), ("require", (*ASKED_FOR, "transformers"))):
        values = entry.get(key, [])
        if isinstance(values, list):
            for value in [v for v in values if v not in allowed]:
                wrong(key, f"expected {' or '.join(allowed)}, found {value!r}")
            made[key] = tuple(values) if key in entry else getattr(Check, key)
    accept = entry.get("accept", [])
    if isinstance(accept, list):
        if not all(isinstance(name, str) for name in accept):
            wrong("accept", "expected names of differences, found another value")
        made["accept"] = tuple(accept)
    bars = entry.get("bars", {})
    if isinstance(defaults, dict) and isinstance(bars, dict):
        made["bars"] = {**defaults, **bars}
        for key, value in made["bars"].items():
            if (message := _bar_problem(key, value)) is not None:
                wrong(f"bars.{key}", message)
    elif not isinstance(defaults, dict):
        wrong("bars", "expected a table of bars, found another value")
    if not sound:
        return None
    for key in ("out", "source", "prompts", "transformers_python", "expectations"):
        if key in made and scheme_of(made[key]) is None:
            made[key] = os.fspath(gate.parent / made[key])
    return Check(**made, file=os.fspath(gate))


def _unfit(value: Any) -> str | None:
    """What TOML has and neither a path nor the process of a check (verify.handing_over) can take."""
    if isinstance(value, str):
        return "expected text without NUL, found one" if "\0" in value else None
    try:
        json.dumps(value)
    except (TypeError, RecursionError):
        return "expected text, numbers, lists and tables, found something else, such as a date"
    return None


def _bar_problem(key: str, value: Any) -> str | None:
    if key == "exactness":
        return None if value in CLASSES else f"expected {' or '.join(CLASSES)}, found {value!r}"
    if key not in (*LARGEST, *SMALLEST):
        return f"expected {', '.join((*LARGEST, *SMALLEST, 'exactness'))}, found an unknown bar"
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        return f"expected a number from 0, found {value!r}"
    if isinstance(value, int) and value > sys.float_info.max:
        return "expected a number from 0 that a float holds, found a larger one"
    return None
