"""`transformers`, the implementation that is not ours: as it is installed here or, for an architecture that
this release does not have, in another Python environment that the user names.

Eager attention is asked for, since other kernels have deviated from the models: sdpa ignores the sliding
window in transformers 4.37, flash kernels see one key more or less (transformers issues 28980, 29623)."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckpt_tool import reference
from ckpt_tool.convert.facts import class_of
from ckpt_tool.records import dataclass
from ckpt_tool.verify.other_release import Said
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.report import shown
from ckpt_tool.verify.sides import tensors
from ckpt_tool.verify.subject import Subject

# What `load` adds to what loading reports: parameters that were narrower than asked, and how many layers
# would have rounded their inputs.
NARROW, INPUTS = "narrow", "inputs"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
VARIABLE = "CKPT_TOOL_TRANSFORMERS"
OPTION = "--transformers-python"
HINT = (
    f"{OPTION} PATH (or {VARIABLE}) names the Python of an environment with a release that has it, or a "
    "folder that such a release was installed into (pip install --target)"
)
# What a pass takes besides ids, by the library's names for our own.
ARGUMENTS = {
    "mask": "attention_mask",
    "token_types": "token_type_ids",
    "positions": "position_ids",
    "entity_ids": "entity_ids",
    "entity_mask": "entity_attention_mask",
    "entity_positions": "entity_position_ids",
    "entity_start": "entity_start_positions",
    "entity_end": "entity_end_positions",
}


class Unavailable(Exception):
    """No release at hand can judge; the message says why, and how one could."""


class NotLoaded(Exception):
    """The library raised while it loaded the output: `error` is what it said, `own` the exception where it
    was raised here."""

    def __init__(self, version: str, error: str, own: Exception | None = None) -> None:
        super().__init__(error)
        self.version, self.error, self.own = version, error, own


@dataclass(frozen=True)
class Library:
    """The output as the library loaded it: what that reported (`info`) and logged (`said`). `compute` gives
    what its model makes of the prompt of that name, by its own names for outputs, and what it logged."""

    version: str
    info: Mapping[str, Any]
    said: list[str]
    compute: Callable[[str], tuple[Mapping[str, Tensor], list[str]]]


def one_line(error: object) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return shown(" ".join(text.split()), 400)


def release(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split(".")[:2] if p.isdecimal())


def architecture_of(subject: Subject) -> str:
    """The class that config.json names; ValueError where the family knows none of that name."""
    assert subject.family is not None
    (architecture, *_) = subject.config.get("architectures") or [""]
    own = {*subject.family.architectures}
    if class_of(subject.config) in subject.family.classes:  # another head of the same model
        own |= reference.architectures().keys()
    if architecture not in own:  # a name in a file decides nothing but this
        raise ValueError(f"expected one of {subject.family.architectures}, found {architecture!r}")
    return str(architecture)


def installed() -> Any:
    """The module as it is installed here; ImportError without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    return transformers


CHOICES = "ForMultipleChoice"


def as_choices(named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose rows are the choices of one question."""
    return {k: x[None] if isinstance(x, Tensor) else x for k, x in named.items()}


def of_choices(found: Mapping[str, Any]) -> dict[str, Any]:
    """The logits (1, C) as (C, 1), a row for each."""
    return {k: x.T for k, x in found.items() if k == "logits"}


def elsewhere(given: str | os.PathLike[str] | None) -> Path | None:
    """The Python, or the folder of packages, that the user named for other releases."""
    named = given or os.environ.get(VARIABLE)
    return Path(named).absolute() if named else None


# --- installed here -------------------------------------------------------------------------------------


def here(
    transformers: Any, subject: Subject, prompts: Mapping[str, Prompt], dtype: str, device: str
) -> Library:
    """Loaded by the installed release. NotLoaded where it raises."""
    said: list[str] = []
    version = str(transformers.__version__)
    try:
        model, info = load(transformers, subject, dtype, device, said)
    except Exception as error:  # a library may raise anything
        raise NotLoaded(version, one_line(error), error) from error

    def compute(name: str) -> tuple[Mapping[str, Tensor], list[str]]:
        words: list[str] = []
        ids, given = tensors(prompts[name], device)
        with listening(words), torch.inference_mode():
            named = arguments(model, ids, given)
            choices = architecture_of(subject).endswith(CHOICES)
            found = model(**(as_choices(named) if choices else named))
            found = of_choices(found) if choices else found
        return found, words

    return Library(version, info, said, compute)


def load(transformers: Any, subject: Subject, dtype: str, device: str, said: list[str]) -> tuple[Any, Any]:
    """The model in eval mode and what loading reports (with `NARROW` and `INPUTS` of codes); warnings that
    were logged or raised are added to `said`."""
    assert subject.hf is not None
    chosen = getattr(transformers, architecture_of(subject))
    word = "dtype" if release(transformers.__version__) >= (4, 56) else "torch_dtype"
    more: dict[str, Any] = {word: getattr(torch, dtype)}
    if release(transformers.__version__) >= (5, 0) and any(map(subject.config.get, EXPERTS)):
        more["experts_implementation"] = "eager"  # the default, a grouped product, has no float64
    transformers.utils.logging.disable_progress_bar()
    with listening(said):
        model, info = chosen.from_pretrained(
            os.fspath(subject.hf.path),
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            **more,
        )
    if subject.config.get("quantization_config"):
        info = {**info, INPUTS: _inputs_as_they_are(model), NARROW: _in_one_dtype(model, more[word])}
    return model.to(device).eval(), info


def _in_one_dtype(model: Any, dtype: torch.dtype) -> list[str]:
    """A model whose codes became numbers of `dtype` while it was loaded: what lay beside them stays as it was
    stored, and the two do not multiply. The names of what was narrower."""
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    if any(p.dtype.itemsize == 1 for p in floating.values()):
        return []
    narrow = [n for n, p in floating.items() if p.dtype.itemsize < dtype.itemsize]
    for p in floating.values():
        p.data = p.data.to(dtype)
    return narrow


def _inputs_as_they_are(model: Any) -> int:
    """How many layers of a model round what they are given, as compressed-tensors 0.20.1 does on any device
    (lifecycle/forward.py); here they do not any more, since no reading of weights does."""
    found = [m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    rounding = [m for m in found if m.quantization_scheme.input_activations is not None]
    for m in rounding:
        m.quantization_enabled = False
    return len(rounding)


def arguments(model: Any, ids: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a call of the model: those that it has a parameter for, no cache. ValueError for an input that it
    has none for, as it would be ignored."""
    known = signature(model.forward).parameters
    if unknown := sorted({ARGUMENTS[name] for name in given} - known.keys()):
        raise ValueError(f"expected {', '.join(unknown)} among the arguments of the class, found none")
    named = {**named_arguments(ids, given), "use_cache": False}
    return {name: x for name, x in named.items() if name in known}


def named_arguments(ids: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the library's names: the mask even if nothing is padded, since some warn without one."""
    named = {ARGUMENTS[name]: x for name, x in given.items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **named}


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """What the library logs or raises as a warning inside is added to `said`, and printed nowhere."""
    logger = logging.getLogger("transformers")
    before = logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [Said(said)], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        own = [w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)]
        said += [str(w.message) for w in own]
    finally:
        logger.propagate, logger.handlers = before


# --- installed elsewhere --------------------------------------------------------------------------------


def there(where: Path, subject: Subject, prompts: Mapping[str, Prompt], dtype: str, device: str) -> Library:
    """Loaded, and computed for all prompts at once, by the release of another environment: `where` is its
    Python, or a folder of packages that is put before those of this one. Unavailable where it cannot be
    started or has no such class, NotLoaded where it raises."""
    assert subject.hf is not None
    choices = architecture_of(subject).endswith(CHOICES)
    with tempfile.TemporaryDirectory(prefix="ckpt-tool-judge-") as scratch:
        home = Path(scratch)
        request = {
            "folder": os.fspath(Path(subject.hf.path).absolute()), "architecture": architecture_of(subject),
            "dtype": dtype, "device": device, "inputs": str(home / "inputs.npz"),
            "outputs": str(home / "outputs.npz"), "answer": str(home / "answer.json"),
        }  # fmt: skip
        answer = _asked(where, request, prompts, home)
        stage, version = answer.get("failed"), str(answer.get("version", "?"))
        error = str(answer.get("error", ""))
        if stage == "import":
            raise Unavailable(f"{where} cannot import what it takes ({one_line(error)}); {HINT}")
        if stage == "class":
            text = (
                f"neither this release of transformers nor {version} of {where} has {request['architecture']}"
            )
            raise Unavailable(f"{text}; {HINT}")
        if stage == "load":
            raise NotLoaded(version, one_line(error))
        outputs = _arrays(home / "outputs.npz") if stage is None else {}

    def compute(name: str) -> tuple[Mapping[str, Tensor], list[str]]:
        if stage is not None:
            raise RuntimeError(error)
        at = str(list(prompts).index(name))
        made = {k: x.to(device) for k, x in outputs[at].items()}
        return (of_choices(made) if choices else made), answer["computing"]

    return Library(version, answer["info"], answer["loading"], compute)


def _asked(where: Path, request: dict[str, str], prompts: Mapping[str, Prompt], home: Path) -> dict[str, Any]:
    """The answer of the script to a request."""
    import numpy as np

    arrays, choices = {}, request["architecture"].endswith(CHOICES)
    for at, prompt in enumerate(prompts.values()):
        named = named_arguments(*tensors(prompt, "cpu"))
        for argument, x in (as_choices(named) if choices else named).items():
            arrays[f"{at}/{argument}"] = x.numpy()
    np.savez(request["inputs"], **arrays)  # type: ignore[arg-type]
    (home / "request.json").write_text(json.dumps(request), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    python = os.fspath(where)
    if where.is_dir():
        python, environment["PYTHONPATH"] = sys.executable, os.fspath(where)
    script = resources.files(__package__).joinpath("other_release.py").read_bytes()
    try:
        ran = subprocess.run(
            [python, "-", "request.json"], input=script, cwd=home, env=environment, capture_output=True,
            check=False,
        )  # fmt: skip
    except OSError as error:
        raise Unavailable(f"{where} cannot be started: {error.strerror}; {HINT}") from error
    try:
        found: dict[str, Any] = json.loads((home / "answer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = (ran.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        text = f"{where} ended with exit code {ran.returncode} and no answer ({one_line(last)}); {HINT}"
        raise Unavailable(text) from None
    return found


def _arrays(path: Path) -> dict[str, dict[str, Tensor]]:
    """By prompt and output."""
    import numpy as np

    made: dict[str, dict[str, Tensor]] = {}
    with np.load(path) as found:
        for name in found:
            prompt, _, output = name.partition("/")
            made.setdefault(prompt, {})[output] = torch.from_numpy(found[name])
    return made
