"""The two checkpoints under comparison, opened, with all that the levels share: which of them is the
original, the family, the plan made again from the source's headers, the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ckpt_tool.checkpoint.base import FLOATS, Checkpoint, TensorInfo
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.families import FAMILIES, Family, family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.verify.manifest import MANIFEST, Manifest, read_manifest


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
    family: Family | None = None
    plan: Plan | None = None
    problems: tuple[Problem, ...] = ()  # why there is no plan
    undeclared_cast: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def direction(self) -> str:
        return "to-hf" if self.output is self.hf else "to-original"

    @cached_property
    def targets(self) -> dict[tuple[str, str], TensorInfo]:
        """The output's tensors as the plan names them. In the Hugging Face layout a name is enough: another
        converter may have dealt the tensors out to other files."""
        if self.direction == "to-hf":
            return {("", t.name): t for t in self.output}
        return {(t.file, t.name): t for t in self.output}

    def target(self, file: str, name: str) -> TensorInfo | None:
        return self.targets.get(("" if self.direction == "to-hf" else file, name))


@contextmanager
def opened(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Subject]:
    """Open both sides and make the plan again; raises what cannot be opened, keeps what cannot be planned."""
    with ExitStack() as stack:
        out = stack.enter_context(_open_output(output))
        src = None if source is None else stack.enter_context(open_checkpoint(source))
        yield _subject(out, src, settings or {})


def _open_output(output: str | os.PathLike[str]) -> Checkpoint:
    """The output, also where a second set of weights lies beside its own: the level coverage names that."""
    try:
        return open_checkpoint(output)
    except CkptToolError as error:
        if {p.kind for p in error.problems} != {"ambiguous-input"} or not os.path.isdir(output):
            raise
        made = open_checkpoint(output, prefer="hf")
        if MANIFEST not in made.documents or made.json(MANIFEST).get("direction") != "to-original":
            return made
        made.close()
        return open_checkpoint(output, prefer="original")


def _subject(out: Checkpoint, src: Checkpoint | None, settings: Mapping[str, Any]) -> Subject:
    manifest = read_manifest(out)
    # some originals look like Hugging Face's layout too
    back = manifest is not None and manifest.direction == "to-original"
    hf = next((c for c in ((src, out) if back else (out, src)) if c is not None and _is_hf(c)), None)
    original = next((c for c in (out, src) if c is not None and c is not hf), None)
    recorded = {} if manifest is None else manifest.settings
    subject = Subject(
        output=out,
        source=src,
        hf=hf,
        original=original,
        config={} if hf is None else hf.json("config.json"),
        manifest=manifest,
        settings={**recorded, **settings},
    )
    _find_family(subject)
    if subject.family is not None and src is not None:
        _make_plan(subject)
    return subject


def _is_hf(checkpoint: Checkpoint) -> bool:
    if "config.json" not in checkpoint.documents:
        return False
    return any(
        t.name.startswith(("model.", "transformer.", "lm_head", "bert.", "embeddings.")) for t in checkpoint
    )


def values_with_sources(subject: Subject) -> dict[str, tuple[Any, str]]:
    """Config values with where they come from: by the plan where there is one, else by the manifest."""
    if subject.plan is not None:
        return {k: (v.value, v.source) for k, v in subject.plan.config.items()}
    return {} if subject.manifest is None else subject.manifest.config


def _find_family(subject: Subject) -> None:
    """The family that the manifest names; else the one that knows the architecture and recognises the
    source."""
    name = subject.manifest.family if subject.manifest else None
    if name in FAMILIES:
        subject.family = family(name)
        return
    known = [family(f) for f in FAMILIES]
    architectures = subject.config.get("architectures") or []
    fitting = [f for f in known if not architectures or set(architectures) & set(f.architectures)]
    if subject.original is not None:
        recognised = [(f, *f.recognise(subject.original)) for f in fitting]
        fitting = [f for f, yes, _ in recognised if yes]
        if not fitting:
            reasons = "; ".join(f"{f.name}: {why}" for f, _, why in recognised)
            subject.problems = (
                Problem("unknown-family", f"expected a known family, found none ({reasons})"),
            )
    if len(fitting) == 1:
        subject.family = fitting[0]
    elif len(fitting) > 1:
        names = ", ".join(f.name for f in fitting)
        subject.problems = (Problem("unknown-family", f"expected one family, found {names}"),)
    elif not subject.problems:
        subject.problems = (
            Problem("unknown-family", f"expected a known architecture, found {architectures}", "config.json"),
        )


def _make_plan(subject: Subject) -> None:
    assert subject.family is not None and subject.source is not None
    plan = subject.family.plan if subject.direction == "to-hf" else subject.family.plan_original
    options = _options(subject)
    try:
        subject.plan = plan(subject.source, options)
        cast = _cast_seen(subject, subject.plan)
        if cast is not None and options.dtype is None:
            subject.undeclared_cast = cast
            subject.plan = plan(subject.source, replace(options, dtype=cast))
    except CkptToolError as error:
        subject.problems = error.problems


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
        family_options=recorded.get("family_options") or {},
    )
    if subject.direction == "to-original":
        form = subject.manifest.form if subject.manifest else {}
        asked = {**made.family_options, **form}
        made = replace(made, shards=len(subject.output.files), family_options=asked)
    return made


def _cast_seen(subject: Subject, plan: Plan) -> str | None:
    """The dtype that all floating tensors of the output share where the plan expects another one."""
    pairs = [
        (t.dtype, found.dtype)
        for f in plan.outputs
        for t in f.tensors
        if (found := subject.target(t.file, t.name)) is not None and t.dtype in FLOATS
    ]
    dtypes = {b for _, b in pairs}
    return dtypes.pop() if len(dtypes) == 1 and any(a != b for a, b in pairs) else None
