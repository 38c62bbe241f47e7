"""Any checkpoint as its Hugging Face layout would be, without writing it: a view whose tensors are made by
the plan's steps when they are read, one tensor at a time in a file without a name."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorInfo, View
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.weight_sets import Prefer
from ckpt_tool.convert.families import as_families_know, as_family_knows, codes_apart, family
from ckpt_tool.convert.layer_axis import layers_apart
from ckpt_tool.convert.optimizer_document import FOLDER
from ckpt_tool.convert.optimizer_state import attached
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.quantised_view import as_asked
from ckpt_tool.convert.recognising import check_whole, only_family
from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.leaves import fill, makers
from ckpt_tool.verify.prefixed import with_prefix
from ckpt_tool.verify.subject import is_hf

OF_TRAINING = ("state of the training run", "state of the optimizer")  # why a plan leaves a tensor out
KEPT = 4  # tensors that were made and stay on the disk until others are


@dataclass(frozen=True)
class Shown:
    """`checkpoint` under Hugging Face names, config.json's values, and the documents of such a folder: those
    that lie there, or as a conversion would write them. `layout` is in words how it is stored. `states` are
    the names of tensors beside the model's that a run of training left there."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    layout: str
    documents: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    states: tuple[str, ...] = ()


@contextmanager
def shown_as_hf(
    path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, chosen: str | None = None
) -> Iterator[Shown]:
    """Open `path`; `settings` are facts that an original's files lack, `chosen` its family where it does not
    say it. Raises what opening, recognising and planning raise, and `input-changed` at the end where the
    weights are no longer those that were opened."""
    with _open(path, "hf") as found:
        known = with_prefix(as_families_know(found))
        if is_hf(known):
            config = known.json("config.json")
            own = {n: d.read for n, d in known.documents.items()}
            yield Shown(known, config, f"Hugging Face, {_files(known)}", own, _carried(known))
            found.check_unchanged()
            return
    with _open(path, "original") as found:
        options = Options(settings=dict(settings or {}))
        apart = layers_apart(as_asked(found, options))
        own_family = family(chosen or only_family(apart))
        plan = own_family.plan(as_family_knows(apart, own_family), options)
        source = as_family_knows(layers_apart(found), own_family)  # codes and scales, as steps read them
        with Made(plan, source) as made:
            view = Checkpoint(found.path, {made.name: made}, _documents(source), list(found.notes))
            config = json.loads(next(d.content for d in plan.documents if d.name == "config.json"))
            written = {d.name: _content(d.content) for d in plan.documents}
            left = tuple(d.tensor.name for d in plan.dropped if d.reason.startswith(OF_TRAINING))
            yield Shown(view, config, f"original of {own_family.name}, {_files(source)}", written, left)
        found.check_unchanged()


@contextmanager
def shown_as_stored(path: str | os.PathLike[str]) -> Iterator[Shown]:
    """Open `path` for who compares tensors under the names that they are stored by, whatever they mean; of
    its config.json nothing is known. Raises what opening raises, `unsupported` where the weights lie
    elsewhere, and `input-changed` as above."""
    with _opened(path, "hf") as found:
        check_whole(found)
        own = {n: d.read for n, d in found.documents.items()}
        yield Shown(found, {}, f"as stored, {_files(found)}", own)
        found.check_unchanged()


def _carried(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The states of an optimizer that were carried into a folder of their own, by name."""
    if not os.path.isdir(os.path.join(checkpoint.path, FOLDER)):
        return ()
    try:
        own = {n: f for n, f in attached(checkpoint).files.items() if n not in checkpoint.files}
    except CkptToolError:  # what they are cannot be told
        return (FOLDER,)
    for file in own.values():
        file.close()
    return tuple(name for file in own.values() for name in file.tensors)


def _content(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _documents(source: Checkpoint) -> dict[str, Document]:
    return dict(source.documents)


def _files(checkpoint: Checkpoint) -> str:
    files = list(checkpoint.files.values())
    kinds = sorted({f.format for f in files})
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} ({', '.join(kinds)})"


def _open(path: str | os.PathLike[str], prefer: Prefer) -> Checkpoint:
    return codes_apart(_opened(path, prefer))


def _opened(path: str | os.PathLike[str], prefer: Prefer) -> Checkpoint:
    try:
        return open_checkpoint(path, prefer=prefer)
    except CkptToolError as error:
        if error.kind != "wrong-format":
            raise
        return open_checkpoint(path)


class Made(View):
    """The tensors that a plan makes of `source`. One that is a plain copy is read where it lies."""

    def __init__(self, plan: Plan, source: Checkpoint) -> None:
        super().__init__(next(iter(source.files.values())))
        self.name, self.format, self.source, self.plan = "as converted", "made", source, plan
        self.steps = {name: made for (_, name), made in makers(plan).items()}
        infos = [t for o in plan.outputs for t in o.tensors]
        self.tensors: Mapping[str, TensorInfo] = {
            t.name: TensorInfo(t.name, t.dtype, t.shape, self.name) for t in infos
        }
        self._held: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        origin = self._copied(name)
        if origin is not None:
            self.source.read_into(origin, offset, buffer)
            return
        with self._lock:
            file = self._made(name)
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
                if count == 0:
                    raise ValueError(f"bytes beyond the end of {name}")
                done += count

    def extent(self, name: str) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        """The view's own files; the source is closed by whoever opened it."""
        with self._lock:
            for file in self._held.values():
                file.close()
            self._held.clear()

    def _copied(self, name: str) -> TensorInfo | None:
        """The source's tensor that this one is byte for byte."""
        if len(self.steps[name]) != 1:
            return None
        ((step, _),) = self.steps[name]
        if len(step.sources) != 1 or len(step.targets) != 1 or step.mean:
            return None
        (a,), (b,) = step.sources, step.targets
        plain = not (a.ranges or a.taken or b.ranges or b.taken)
        if plain and a.dims == b.dims and a.dtype == b.dtype:
            return self.source.files[a.file].tensors[a.name]
        return None

    def _made(self, name: str) -> IO[bytes]:
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        file = tempfile.TemporaryFile(prefix="ckpt-tool-")  # noqa: SIM115 - held until others are made
        try:
            fill(file, self.steps[name], self.source, self.tensors[name])
        except BaseException:
            file.close()
            raise
        self._held[name] = file
        while len(self._held) > KEPT:
            self._held.popitem(last=False)[1].close()
        return file
