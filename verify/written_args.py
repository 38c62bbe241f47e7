"""What the files of an original that was written say beside their tensors: args of Megatron's ranks, cfg of
metaseq's parts. Programs that load them take their numbers from there, and no bit of a tensor tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest

from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.checkpoint.torch_zip_writer import Held, Namespace
from ckpt_tool.convert.facts import class_of, differences, read
from ckpt_tool.convert.facts_settings import overlaid
from ckpt_tool.convert.optimizer_ranks import SCHEDULERS
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.errors import CkptToolError, printable
from ckpt_tool.verify.coverage import UNDECIDED
from ckpt_tool.verify.recorded import RULES
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject

LEVEL, CHECK = "coverage", "config"
OF_OPTIMIZERS = ("optimizer", *SCHEDULERS)  # which verify.carried_bits compares
SHOWN = 60


def written_args(subject: Subject) -> list[Finding]:
    """The findings about them; none on the way to Hugging Face. Against the plan where the manifest tells
    that this program wrote the files, else by what they mean."""
    plan = subject.plan
    if plan is None or subject.direction != "to-original":
        return []
    wrong = [] if subject.manifest is None else [*_as_planned(subject, plan)]
    return wrong or [*_read_back(subject)]


def _fail(text: str, where: str) -> Finding:
    return Finding(LEVEL, CHECK, "fail", text, where, data={"exactness": "differs"})


def _as_planned(subject: Subject, plan: Plan) -> Iterator[Finding]:
    for output in plan.outputs:
        file = subject.output.files.get(output.name)
        if file is None:
            continue  # told of its tensors
        for key, planned in output.beside.items():
            if key not in OF_OPTIMIZERS:
                odd = _unlike(planned, file.metadata.get(key), key)
                if odd is not None:
                    yield _fail(odd[1], f"{output.name}: {odd[0]}")


def _unlike(planned: object, found: object, where: str) -> tuple[str, str] | None:
    """Where a value is another than the planned one, and in words how; what is there besides may be."""
    planned, found = _fields(planned), _fields(found)
    if isinstance(planned, Mapping) and isinstance(found, Mapping):
        pairs = ((f"{where}.{key}", x, found.get(key)) for key, x in planned.items())
    elif isinstance(planned, list | tuple) and isinstance(found, list | tuple):
        pairs = ((f"{where}.{k}", x, y) for k, (x, y) in enumerate(zip_longest(planned, found)))
    elif isinstance(planned, Held) or (type(planned) is type(found) and planned == found):
        return None
    else:
        words = (printable(repr(x), SHOWN) for x in (planned, found))
        return where, "expected {}, found {}".format(*words)
    return next((odd for at, x, y in pairs if (odd := _unlike(x, y, at)) is not None), None)


def _fields(value: object) -> object:
    """An argparse.Namespace, to be written or as read, by the names of its fields."""
    if isinstance(value, Namespace):
        return value.fields
    return value.fields if isinstance(value, Inert) and value.fields else value


def _read_back(subject: Subject) -> Iterator[Finding]:
    """Numbers that a conversion of the output takes from its files, and that config.json, or what was given
    against it, has otherwise."""
    kind = class_of(subject.config)
    if subject.family is None or kind is None:
        return
    try:
        back = _config_of(subject)
    except CkptToolError as error:  # of files of others a fact may be missing
        odd = [p for p in error.problems if p.kind not in UNDECIDED] if subject.manifest is not None else []
        for p in odd:
            where = ": ".join(x for x in (p.file, p.where) if x)
            yield _fail(f"a conversion of the output would be refused: {p.message}", where)
        return
    given = subject.settings
    said_there = overlaid(subject.config, given) if given else subject.config
    right, made = (read(c, kind) for c in (said_there, {k: v.value for k, v in back.items()}))
    for name, want, have in differences(right, made):
        said = back.get(name)
        if said is None or want is None or have is None:
            continue
        if name in right.numbers and not RULES.match(said.source):
            asked = "--set" if name in given else "config.json"
            yield _fail(f"expected {want.text} ({asked}), found {have.text} ({said.source})", said.source)


def _config_of(subject: Subject) -> Mapping[str, Value]:
    """What a conversion of the output would write: by its files alone, or where these lack a fact with what
    was given on the way here."""
    assert subject.family is not None
    output = subject.planned(subject.output)
    try:
        return subject.family.plan(output, Options()).config
    except CkptToolError as error:
        given = {k: v for k, v in subject.settings.items() if v is not None}
        if not given or any(p.kind != "missing-fact" for p in error.problems):
            raise
    return subject.family.plan(output, Options(settings=given)).config
