"""An ONNX graph run by onnxruntime: its inputs and outputs recognised by their names, its passes on prompts.

Source: onnxruntime 1.32.0 (InferenceSession, SessionOptions).

B rows, T tokens, P tokens before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.checkpoint.onnx_file import OnnxFile, Value
from ckpt_tool.errors import fail, near, printable
from ckpt_tool.verify.onnx_names import INPUTS, KEPT

NUMPY = {
    "I64": np.int64,
    "I32": np.int32,
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "BOOL": np.bool_,
}
HEADS = ("logits", "last_hidden_state", "pooler_output", "start_logits", "end_logits")
Kept = tuple[int, str]  # a layer, "key" or "value"
WEIGHTS_BELONG = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Interface:
    """What a graph takes and gives, as it was recognised: inputs by what they are (`ids`, `mask`,
    `token_types`, `positions`), keys and values of layer i by (i, "key"), results by their names; `others`
    are outputs that nothing is known of."""

    inputs: Mapping[str, Value]
    past: Mapping[Kept, Value]
    results: Mapping[str, Value]
    present: Mapping[Kept, Value]
    others: tuple[str, ...] = ()


def recognised(file: OnnxFile) -> Interface:
    """By names, as exporters give them; `unsupported` for an input that is not known, as nothing could be
    given for it, and where no output is known."""
    inputs: dict[str, Value] = {}
    past: dict[Kept, Value] = {}
    for value in file.inputs:
        if value.name in INPUTS:
            inputs[INPUTS[value.name]] = value
        elif found := KEPT.fullmatch(value.name):
            past[int(found[1]), found[2]] = value
        else:
            _refuse("inputs", value.name, (*INPUTS, "past_key_values.N.key"), file.name)
    if "ids" not in inputs:
        names = ", ".join(printable(v.name) for v in file.inputs[:5]) or "none"
        fail("unsupported", f"expected an input input_ids, found {names}", file=file.name)
    present, results, others = {}, {}, []
    for value in file.outputs:
        if found := KEPT.fullmatch(value.name):
            present[int(found[1]), found[2]] = value
        elif value.name in HEADS:
            results[value.name] = value
        else:
            others.append(value.name)
    if not results:
        _refuse("outputs", others[0] if others else "none", HEADS, file.name)
    for value in (*inputs.values(), *past.values()):
        if value.dtype not in NUMPY:
            text = f"expected an input that numpy has a type for, found {value.dtype}"
            fail("unsupported", text, file=file.name, where=value.name)
    for value in (*results.values(), *present.values()):
        if value.dtype not in ("F16", "F32", "F64"):
            text = f"expected results in F32, F64 or F16, found {value.dtype}"
            fail("unsupported", text, file=file.name, where=value.name)
    _check_kept(past, present, file.name)
    return Interface(inputs, past, results, present, tuple(others))


def _check_kept(past: Mapping[Kept, Value], present: Mapping[Kept, Value], file: str) -> None:
    """That keys and values which go in come out too, for the tokens after, and have the usual axes."""
    for key, value in past.items():
        if key not in present:
            text = f"expected an output present.{key[0]}.{key[1]} for the tokens after, found none"
            fail("unsupported", text, file=file, where=value.name)
        if value.shape is not None and len(value.shape) != 4:
            text = f"expected (batch, heads, past tokens, width), found {value.words}"
            fail("unsupported", text, file=file, where=value.name)


def _refuse(what: str, name: str, known: Iterable[str], file: str) -> None:
    names = tuple(known)
    text = f"expected {what} of these names: {', '.join(names)}, found {printable(name)!r}"
    fail("unsupported", text, file=file, hint=near(name, names))


@dataclass(frozen=True)
class Case:
    """Rows of token ids (B, T), or (B, C, T) of choices, that go through a graph; `mask` is 0 for padding.
    The first `past` tokens go first, and what they leave behind goes in with the others. `counted`: the graph
    is given positions, which count tokens without padding."""

    name: str
    ids: Tensor
    mask: Tensor
    token_types: Tensor | None = None
    past: int = 0
    counted: bool = False

    @property
    def real(self) -> Tensor:
        """Of the tokens that go in last: which are none of padding (B, T - P)."""
        return self.mask[..., self.past :].bool()

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def left(self) -> bool:
        """Whether padding stands before a token."""
        return bool((self.mask[..., :-1] < self.mask[..., 1:]).any())

    @property
    def given(self) -> dict[str, Tensor]:
        """What a reading takes besides ids."""
        types = {} if self.token_types is None else {"token_types": self.token_types}
        return types | ({"mask": self.mask} if self.padded else {})


@dataclass
class Graph:
    """A session of onnxruntime. `sizes` are (heads, width) of the keys and values that go in."""

    session: Any
    interface: Interface
    sizes: tuple[int, int] | None = None
    more: dict[str, np.ndarray] = field(default_factory=dict)  # weights given in the place of its own

    def run(self, case: Case) -> dict[str, Tensor]:
        """Results of the tokens after `case.past`, and `present.N.key`, of all tokens. Those before go in at
        once, or as many at a time as a graph of a fixed length takes."""
        past, before = self._nothing(case), case.past
        shape = self.interface.inputs["ids"].shape
        step = shape[1] if before and shape is not None and isinstance(shape[1], int) else before
        for start in range(0, before, max(step, 1)):
            made = self._pass(_part(case, start, start + step), case.mask[:, : start + step], past, start)
            past = {key: made[f"present.{key[0]}.{key[1]}"] for key in self.interface.past}
        return self._pass(_part(case, before, case.ids.shape[-1]), case.mask, past, before)

    def _nothing(self, case: Case) -> dict[Kept, Tensor]:
        if not self.interface.past:
            return {}
        assert self.sizes is not None
        heads, width = self.sizes
        return {key: torch.zeros(len(case.ids), heads, 0, width) for key in self.interface.past}

    def _pass(self, case: Case, mask: Tensor, past: Mapping[Kept, Tensor], start: int) -> dict[str, Tensor]:
        """`mask` is of all tokens, the `start` ones before as well."""
        if case.ids.ndim == 2:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        else:
            positions = torch.arange(case.ids.shape[-1]).expand(case.ids.shape)
        types = torch.zeros_like(case.ids) if case.token_types is None else case.token_types
        given = {"ids": case.ids, "mask": mask, "token_types": types, "positions": positions}
        values = {v: given[own] for own, v in self.interface.inputs.items()}
        values |= {v: past[key] for key, v in self.interface.past.items()}
        feeds: dict[str, np.ndarray] = {v.name: x.numpy().astype(NUMPY[v.dtype]) for v, x in values.items()}
        wanted = {v.name: v.name for v in self.interface.results.values()}
        wanted |= {v.name: f"present.{i}.{part}" for (i, part), v in self.interface.present.items()}
        try:
            found = self.session.run(list(wanted), {**feeds, **self.more})
        except Exception as error:  # onnxruntime's classes have no base of their own
            reason = printable(" ".join(str(error).split()), 300)
            fail(
                "unsupported",
                f"expected a graph that onnxruntime runs on the prompt {case.name}, "
                f"{'x'.join(map(str, case.ids.shape))} tokens, found one that it does not: {reason}",
            )
        return {name: torch.from_numpy(np.array(y)) for name, y in zip(wanted.values(), found, strict=True)}


def _part(case: Case, start: int, end: int) -> Case:
    """The tokens from `start` to `end`, of which nothing goes before."""
    types = None if case.token_types is None else case.token_types[..., start:end]
    return Case(case.name, case.ids[..., start:end], case.mask[..., start:end], types)


def opened_graph(file: OnnxFile, interface: Interface, sizes: tuple[int, int] | None) -> Graph:
    """The file as it stands; `unsupported` where onnxruntime does not load it."""
    return Graph(_session(str(file.path), file), interface, sizes)


def altered_graph(model: Any, file: OnnxFile, interface: Interface, sizes: tuple[int, int] | None) -> Graph:
    """`model` is the file's with changes, its weights where they are."""
    return Graph(_session(model.SerializeToString(), file), interface, sizes)


def _session(model: str | bytes, file: OnnxFile) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(WEIGHTS_BELONG, str(file.path.parent.absolute()))
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no base of their own
        reason = printable(" ".join(str(error).split()), 300)
        fail(
            "unsupported",
            f"expected a graph that onnxruntime loads, found one that it does not: {reason}",
            file=file.name,
        )
