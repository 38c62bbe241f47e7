"""The two checkpoints under comparison, opened, with all that the levels share: which of them is the
original, the family, the plan made again from the source's headers, the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.dcp_names import FORMAT as DISTRIBUTED
from ckpt_tool.checkpoint.opening import Limits, open_checkpoint
from ckpt_tool.checkpoint.weight_sets import Prefer
from ckpt_tool.convert import canonical
from ckpt_tool.convert.facts import class_of, classes, read
from ckpt_tool.convert.families import FAMILIES, Family, as_families_know, codes_apart, family
from ckpt_tool.convert.kept import Manifest, read_manifest
from ckpt_tool.convert.plan import Options, Plan, Value
from ckpt_tool.convert.quantised_view import as_asked
from ckpt_tool.convert.recognising import near_misses, spelled, with_config
from ckpt_tool.errors import CkptToolError, Problem, fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify.casted import as_found, cast_seen
from ckpt_tool.verify.packed import Packed
from ckpt_tool.verify.partitions import joined_anew
from ckpt_tool.verify.prefixed import is_bare, whole, with_prefix
from ckpt_tool.verify.recorded import Recorded, find_source, settled

if TYPE_CHECKING:
    from ckpt_tool.verify.carried import Carried

ARCHITECTURES = "architectures"


@dataclass
class Subject:
    """`output` is what is verified, `source` what it was made from, if given. One of them is in the Hugging
    Face layout (`hf`, `config` its config.json), the other the `original`."""

    output: Checkpoint
    source: Checkpoint | None
    hf: Checkpoint | None
    original: Checkpoint | None
    config: dict[str, Any]
    manifest: Manifest | None
    settings: dict[str, Any]  # facts the user gave, now or when converting
    recorded: Recorded = field(default_factory=Recorded)  # those of the manifest, against the source
    found: Path | None = None  # the source, where the manifest led to it
    family: Family | None = None
    plan: Plan | None = None
    problems: tuple[Problem, ...] = ()  # why there is no plan
    undeclared_cast: str | None = None  # the dtype, where nothing records that it was asked for
    packed: Packed | None = None  # what became of quantised weights
    accepted: tuple[str, ...] = ()  # names of differences that do not fail
    notes: list[str] = field(default_factory=list)
    without_head: list[str] | None = None  # the class that config.json names, where the plan's has a head
    carried: Carried | None = None  # the states of the optimizer, where they were carried along

    @property
    def direction(self) -> str:
        return "to-hf" if self.output is self.hf else "to-original"

    @property
    def keeps_layout(self) -> bool:
        """Whether the source is in the Hugging Face layout as the output is."""
        source, chosen = self.source, self.family
        return (
            source is not None
            and chosen is not None
            and source is not self.hf
            and (canonical.is_one(self.planned(source), chosen))
        )

    @cached_property
    def targets(self) -> dict[tuple[str, str], TensorInfo]:
        """The output's tensors as the plan names them. In the Hugging Face layout a name is enough: another
        converter may have dealt the tensors out to other files."""
        if self.direction == "to-hf":
            return {("", t.name): t for t in self.output}
        return {(self.named(t.file), t.name): t for t in self.output}

    def planned(self, checkpoint: Checkpoint) -> Checkpoint:
        """Either side as plans are made of it: quantised weights that are carried have their plain names."""
        return as_asked(checkpoint, Options(settings=self.settings))

    def named(self, file: str) -> str:
        """What tells a file of the output from others: nothing in a torch.distributed folder, which reads as
        one file whatever data files its tensors were dealt out to."""
        return "" if any(f.format == DISTRIBUTED for f in self.output.files.values()) else file

    def target(self, file: str, name: str) -> TensorInfo | None:
        return self.targets.get(("" if self.direction == "to-hf" else self.named(file), name))


@contextmanager
def opened(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    settings: Mapping[str, Any] | None = None,
    *,
    look_for_source: bool = True,
) -> Iterator[Subject]:
    """Open both sides and make the plan again; raises what cannot be opened, keeps what cannot be planned.
    Without a `source` the one that the manifest records is opened where it still lies there. Raises
    `input-changed` at the end where the weights are no longer those that were opened."""
    as_loaders_do = Limits(as_it_stands=True)  # which take no wrapper off
    with ExitStack() as stack:
        out = _open(output, "hf", as_loaders_do)
        manifest = _manifest_of(out)
        back = manifest is not None and manifest.direction == "to-original"
        if back:
            out.close()
            out = _open(output, "original", as_loaders_do)
        stack.enter_context(out)
        src, found, packed = None, None, Packed(out, manifest, settings or {})
        if source is not None:
            src = stack.enter_context(_open(source, "hf" if back else "original", seen=packed.seen))
        elif look_for_source and manifest is not None:
            src = find_source(out, manifest, packed.seen)
            if src is not None:
                found = stack.enter_context(src).path
        if src is not None:
            _must_be_two(out, src)
        subject = _subject(out, src, manifest, settings or {}, packed)
        if subject.carried is not None:
            stack.callback(subject.carried.close)
        subject.found = found
        yield subject
        for side in filter(None, (out, src)):
            side.check_unchanged()  # or what was found is true of nothing that is there


def _open(
    path: str | os.PathLike[str],
    prefer: Prefer,
    limits: Limits | None = None,
    seen: Callable[[Checkpoint], Checkpoint] = lambda found: found,
) -> Checkpoint:
    """The weights of one layout where there are two, else those that are there, as `seen`."""
    try:
        found = open_checkpoint(path, prefer=prefer, limits=limits, hub="download")
    except CkptToolError as error:
        if error.kind != "wrong-format":
            raise
        found = open_checkpoint(path, limits=limits, hub="download")
    try:
        as_it_stands = limits is not None and limits.as_it_stands
        apart = spelled(codes_apart(joined_anew(found)))
        return as_families_know(seen(apart), as_loaders_do=as_it_stands)
    except BaseException:
        found.close()
        raise


def _must_be_two(out: Checkpoint, src: Checkpoint) -> None:
    """A file compared with itself shows nothing."""
    ours = {os.path.realpath(f.path) for f in out.files.values()}
    same = next((f.name for f in src.files.values() if os.path.realpath(f.path) in ours), None)
    if same is not None:
        fail("usage", "expected a source apart from the output, found the same file", file=same)


def _manifest_of(out: Checkpoint) -> Manifest | None:
    try:
        return read_manifest(out)
    except BaseException:
        out.close()
        raise


def _subject(
    out: Checkpoint,
    src: Checkpoint | None,
    manifest: Manifest | None,
    settings: Mapping[str, Any],
    packed: Packed,
) -> Subject:
    # some originals look like Hugging Face's layout too
    back = manifest is not None and manifest.direction == "to-original"
    recorded = {} if manifest is None else manifest.settings
    if src is not None and not back:
        src = with_config(src, recorded | {**settings})
    carried = None
    if manifest is not None and manifest.options.get("with_optimizer"):
        from ckpt_tool.verify.carried import apart  # with readers of all that holds states

        out, manifest, carried = apart(out, manifest)
    out = out if back else with_prefix(out)
    hf = next((c for c in ((src, out) if back else (out, src)) if c is not None and is_hf(c)), None)
    original = next((c for c in (out, src) if c is not None and c is not hf), None)
    subject = Subject(
        output=out,
        source=src,
        hf=hf,
        original=original,
        config={} if hf is None else hf.json("config.json"),
        manifest=manifest,
        settings={**recorded, **settings},
        packed=packed,
        carried=carried,
    )
    _find_family(subject)
    if subject.family is not None and src is not None:
        _make_plan(subject, settings)
    elif subject.family is not None and hf is None and manifest is None:
        message = (
            f"expected a converted folder, found an original of {subject.family.name} and nothing beside"
        )
        hint = f"`ckpt-tool convert {subject.family.name}` converts it; verify compares the result with it"
        fail("wrong-format", message, file=out.path.name, hint=hint)
    return subject


def is_hf(checkpoint: Checkpoint) -> bool:
    """Whether its tensors have the names of a model of the library, config.json beside them."""
    if "config.json" not in checkpoint.documents:
        return False
    named = ("lm_head", "embeddings.", *(c.prefix for c in classes().values()))
    return any(t.name.startswith(named) for t in checkpoint) or is_bare(checkpoint)


def values_with_sources(subject: Subject) -> dict[str, tuple[Any, str]]:
    """Config values with where they come from: by the plan where there is one, else by the manifest."""
    if subject.plan is not None:
        return {k: (v.value, v.source) for k, v in subject.plan.config.items()}
    return {} if subject.manifest is None else subject.manifest.config


def _find_family(subject: Subject) -> None:
    """The family that recognises the source and knows the architecture in config.json. The manifest's word
    only decides between several that do."""
    known = [family(f) for f in FAMILIES]
    named_there = subject.config.get("architectures")
    if not isinstance(named_there, list | None):
        text = f"expected a list of classes, found {named_there!r}"
        fail("bad-config", text, file="config.json", where="architectures")
    architectures = set(map(str, named_there or []))
    fitting = [f for f in known if architectures & set(f.architectures)]
    shown = None if subject.original is None else subject.planned(subject.original)
    said = [] if shown is None else [(f, *f.recognise(shown)) for f in known]
    recognised = [f for f, yes, _ in said if yes]
    named = None if subject.manifest is None else subject.manifest.family
    both = [f for f in fitting if f in recognised]
    asked = [f for f in fitting if f.name == named]  # by a name that is not what the source looks like
    kind = class_of(subject.config) if subject.hf is not None else None
    by_class = [f for f in known if kind in f.classes]  # of another head than the family's own
    candidates = both or asked or recognised or fitting or by_class
    chosen = [f for f in candidates if f.name == named] or candidates
    if len(chosen) == 1:
        subject.family = chosen[0]
        return
    if chosen:
        found = f"expected one family, found {', '.join(f.name for f in chosen)}"
    elif said and shown is not None:
        misses = near_misses(shown, [(f.name, yes, why) for f, yes, why in said])
        reasons = "; ".join(f"{name}: {why}" for name, why in misses) or "none comes near"
        found = f"expected a known family, found none ({reasons})"
    else:
        found = f"expected a known architecture, found {', '.join(sorted(architectures)) or 'none'}"
    subject.problems = (Problem("unknown-family", found),)


def _make_plan(subject: Subject, given: Mapping[str, Any]) -> None:
    assert subject.family is not None and subject.source is not None
    chosen, forth = subject.family, subject.direction == "to-hf"
    try:
        source = subject.planned(subject.source)
    except CkptToolError as error:
        subject.problems = error.problems
        return

    def plan(options: Options) -> Plan:
        return canonical.plan(source, chosen, options) if forth else chosen.plan_original(source, options)

    options = _options(subject)
    try:
        said = {} if forth else _numbers(subject.config)
        subject.recorded, options = settled(plan, options, given, said)
        subject.plan = plan(options)
        if forth:
            _as_planned(subject)
        if subject.carried is not None:
            from ckpt_tool.verify.carried import planned

            subject.plan = planned(subject.carried, subject.plan, source)
        cast = cast_seen(subject.plan, subject.target)
        if cast is not None and options.dtype is None:
            subject.undeclared_cast = cast
            subject.plan = as_found(subject.plan, plan(replace(options, dtype=cast)), subject.target)
    except CkptToolError as error:
        if given and any(p.kind == "usage" for p in error.problems):
            raise  # a slip in what the user gives now
        subject.problems = error.problems


def _numbers(config: Mapping[str, Any]) -> dict[str, Value]:
    """What config.json says that changes what a model computes, which originals have under other names."""
    kind = class_of(config)
    found = {} if kind is None else read(config, kind).numbers
    return {n: Value(m.value, f"config.json: {m.where}") for n, m in found.items() if not m.default}


def _as_planned(subject: Subject) -> None:
    """Take an output that is the model without the head of the plan for what a class with the head reads."""
    assert subject.plan is not None
    seen = whole(subject.output, {t.name for f in subject.plan.outputs for t in f.held})
    named = subject.plan.config.get(ARCHITECTURES)
    if seen is not subject.output and named is not None:
        subject.without_head = subject.config[ARCHITECTURES]
        subject.hf = subject.output = seen
        subject.config = {**subject.config, ARCHITECTURES: named.value}


def _options(subject: Subject) -> Options:
    """The options of the conversion as far as the output tells them: what the manifest records, the number of
    ranks of an original that was written."""
    recorded = subject.manifest.options if subject.manifest else {}
    given = subject.manifest.settings if subject.manifest else {}
    made = Options(
        # on the way back the plan starts from config.json; facts given now are for reading the original
        settings=subject.settings if subject.direction == "to-hf" else given,
        dtype=recorded.get("dtype"),
        drop=tuple(recorded.get("drop") or ()),
        gqa=recorded.get("gqa"),
        **({} if subject.packed is None else subject.packed.options),
        family_options=recorded.get("family_options") or {},
    )
    if subject.direction == "to-original":
        form = subject.manifest.form if subject.manifest else {}
        asked = {**made.family_options, **form}
        made = replace(made, shards=len(subject.output.files), family_options=asked)
    return made
