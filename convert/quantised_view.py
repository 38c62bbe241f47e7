"""A checkpoint with quantised weights as the families see it: each weight under its plain name.

Where it is carried (`Whole`) that name stands for all of its tensors, and weave.py turns the steps of the
name into steps of each. Where it is dequantised (quantised_numbers.py) it is a tensor of the asked dtype like
any other.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Given, Record, Renamed, TensorFile, TensorInfo, View
from ckpt_tool.checkpoint.signs import UNPACKED, packed
from ckpt_tool.convert.params import shown
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import ALONE, Inventory, Quantised, found_in
from ckpt_tool.convert.quantised_config import (
    CONFIG,
    IN_PARAMS,
    KEY,
    OF_MODELOPT,
    OF_TEXT,
    OTHER_KEYS,
    PARAMS,
)
from ckpt_tool.convert.quantised_methods import METHODS
from ckpt_tool.convert.source import CODES
from ckpt_tool.errors import fail


class Quantising(View):
    """A view of a file in which quantised weights have their plain names, and their parts are hidden."""

    def __init__(self, stored: TensorFile, inventory: Inventory) -> None:
        super().__init__(stored)
        self.inventory = inventory
        whole = [w for w in inventory.weights.values() if self.takes(w)]
        self.own = {w.codes.name: w for w in whole if w.codes.file == stored.name}
        self.by_name = {w.name: w for w in self.own.values()}
        beside = (t for held in inventory.beside.values() for t in held)
        self.tensors = dict(
            self._seen({(t.file, t.name) for t in (*beside, *(p for w in whole for p in w.parts))})
        )

    def _seen(self, hidden: Container[tuple[str, str]]) -> Iterator[tuple[str, TensorInfo]]:
        for t in self.stored.tensors.values():
            weight = self.own.get(t.name)
            if weight is not None:
                shape = self.shape_of(weight)
                yield weight.name, TensorInfo(weight.name, self.dtype_of(weight), shape, t.file)
            elif (t.file, t.name) not in hidden:
                yield t.name, t

    def takes(self, weight: Quantised) -> bool:
        """Whether it has its plain name here."""
        return True

    @abstractmethod
    def dtype_of(self, weight: Quantised) -> str:
        """What its plain name is said to hold."""

    def shape_of(self, weight: Quantised) -> tuple[int, ...]:
        return weight.shape

    def absent(self, name: str) -> str | None:
        weight = self.by_name.get(name)
        if weight is None:
            return self.stored.absent(name)
        files = self.inventory.checkpoint.files
        found = (files[t.file].absent(t.name) for t in weight.parts)
        return next((f for f in found if f is not None), None)

    def extent(self, name: str) -> tuple[int, int] | None:
        return None if name in self.by_name else self.stored.extent(name)

    def record_of(self, name: str) -> tuple[str, int] | None:
        return None if name in self.by_name else self.stored.record_of(name)

    def records(self, of: Container[str] | None = None) -> Mapping[str, Record]:
        """A record of codes is that of its weight; those of scales are looked at by themselves."""
        wanted = None if of is None else {w.codes.name for n, w in self.by_name.items() if n in of}
        wanted = None if wanted is None else wanted | {n for n in self.stored.tensors if n in (of or ())}
        return {k: r._replace(of=None) for k, r in self.stored.records(wanted).items()}

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        self.stored.expect(r for r in ranges if r[0] not in self.by_name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.stored.read_into(name, offset, buffer)


class Whole(Quantising):
    """A view for planning what is carried: nothing is read under the plain names, whose dtype is that of the
    codes. Weights for whose codes and scales a family has rows stay as they are."""

    def takes(self, weight: Quantised) -> bool:
        return not weight.form.own_rows

    def dtype_of(self, weight: Quantised) -> str:
        return weight.codes.dtype


# --- a whole checkpoint ---------------------------------------------------------------------------------


def as_asked(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """`checkpoint` as a plan with these options sees it: itself where nothing in it is quantised, or where it
    is such a view. Kinds: those of `found_in`; for --dequantize `unsupported` of weights of few bits that
    nobody here reads, `usage` of any others."""
    if quantised_of(checkpoint) is not None:
        return checkpoint
    inventory = found_in(checkpoint, options.settings)
    if options.dequantize is not None:
        if inventory is None:
            _other_packing(checkpoint)
            message = "expected quantised weights (codes with scales beside them), found none"
            alone = any(t.dtype in CODES for t in checkpoint)
            fail(
                "usage", message, where="--dequantize", hint=ALONE if alone else "--dtype casts plain weights"
            )
        return dequantised(checkpoint, inventory, options.dequantize, options.recipe)
    if inventory is None:
        return checkpoint
    return _viewed(checkpoint, {n: Whole(f, inventory) for n, f in checkpoint.files.items()})


def _other_packing(checkpoint: Checkpoint) -> None:
    """Fail with `unsupported` for weights of few bits that are not read here, by their names or by what
    config.json says."""
    expected = "expected codes and scales that are read here"
    if (held := packed(checkpoint.names())) is not None:
        what, name, hint = held
        fail("unsupported", f"{expected}, found {what}", file=checkpoint.path.name, where=name, hint=hint)
    said = checkpoint.json(CONFIG).get(KEY) if CONFIG in checkpoint.documents else None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method is not None and method not in METHODS:
        message = f"{expected}, found {shown(method)}"
        fail("unsupported", message, file=CONFIG, where=f"{KEY}.quant_method", hint=UNPACKED)


def as_read(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """`checkpoint` as a plan with these options is carried out: its own tensors, but for what is
    dequantised."""
    if quantised_of(checkpoint) is not None:
        return checkpoint
    return checkpoint if options.dequantize is None else as_asked(checkpoint, options)


def dequantised(checkpoint: Checkpoint, inventory: Inventory, dtype: str, recipe: str) -> Checkpoint:
    """The view in which weights are numbers; config.json says nothing of codes there."""
    from ckpt_tool.convert.quantised_numbers import (
        Dequantised,  # numpy, which plans of other models do without
    )

    files = {n: Dequantised(f, inventory, dtype, recipe) for n, f in checkpoint.files.items()}
    made = _viewed(checkpoint, files)
    documents = dict(made.documents)
    for name, keys in ((CONFIG, (KEY, *OTHER_KEYS)), (PARAMS, (IN_PARAMS,))):
        if name in documents and documents[name].size and (found := _without(made, name, keys)) is not None:
            documents[name] = found
    return replace(made, documents=documents)


def _without(checkpoint: Checkpoint, name: str, keys: Iterable[str]) -> Given | None:
    content = checkpoint.json(name)
    part = content.get(OF_TEXT)
    inside = {k: v for k, v in part.items() if k not in keys} if isinstance(part, Mapping) else part
    if inside == part and not any(k in content for k in keys):
        return None
    kept = {k: inside if k == OF_TEXT else v for k, v in content.items() if k not in keys}
    text = (json.dumps(kept, indent=2) + "\n").encode()
    return Given(name, checkpoint.documents[name].path, len(text), text)


def _viewed(checkpoint: Checkpoint, files: Mapping[str, TensorFile]) -> Checkpoint:
    return checkpoint.with_files(dict(files))


def view_in(file: TensorFile) -> Quantising | None:
    """The view of quantised weights that a file is, or is a view of."""
    while not isinstance(file, Quantising):
        if not isinstance(file, View):
            return None
        file = file.stored
    return file


def quantised_of(checkpoint: Checkpoint) -> Inventory | None:
    """What is quantised in the files of which `checkpoint` shows a view of the whole or of the numbers."""
    first = next((v for f in checkpoint.files.values() if (v := view_in(f)) is not None), None)
    return None if first is None else first.inventory


def carried_of(checkpoint: Checkpoint) -> Inventory | None:
    """What is quantised and carried as it is."""
    first = next((v for f in checkpoint.files.values() if (v := view_in(f)) is not None), None)
    return first.inventory if isinstance(first, Whole) else None


def names_of_codes(checkpoint: Checkpoint) -> set[str]:
    """What is quantised and carried, and what belongs to it, under the names that `checkpoint` shows: another
    view may have put a prefix before them."""
    inventory = carried_of(checkpoint)
    if inventory is None:
        return set()
    stored = {*inventory.weights, *(name for _, name in inventory.parts)}
    made: set[str] = set()
    for file in checkpoint.files.values():
        names = {name: name for name in file.tensors}
        while isinstance(file, View) and not isinstance(file, Quantising):
            if isinstance(file, Renamed):
                names = {shown: file.own[name] for shown, name in names.items()}
            file = file.stored
        made |= {shown for shown, name in names.items() if name in stored}
    return made


def packing_beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json is to say of carried codes of which another file says it."""
    inventory = carried_of(checkpoint)
    if inventory is None or inventory.scheme.file != OF_MODELOPT:
        return {}
    return {KEY: inventory.scheme.raw}


def with_packing(
    checkpoint: Checkpoint, document: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the user's settings, where these say how weights are quantised: what is carried is
    written with that, and of numbers nothing is said."""
    if quantised_of(checkpoint) is None or settings.get(KEY) is None:
        return dict(document), dict(settings)
    if carried_of(checkpoint) is not None:
        return {**document, KEY: settings[KEY]}, dict(settings)
    return dict(document), {k: v for k, v in settings.items() if k != KEY}
