"""One plain forward pass per architecture and layout: what the converted model is measured against.

Every reading has the same functions, so that two of them run in lockstep, phase by phase:

    Config.from_original(params, shapes, ranks, overrides)   or   Config.from_hf(config)
    phases(ranks, c, inputs) -> phases    named, in order; see phases.py
    forward(ids, ranks, c) -> logits      (B, T, V), float32 or higher; ids (B, T) int64

A module that says its `Config` alone has the functions of the one that its Config comes from.

`ranks` holds one mapping of tensor names to tensors per model-parallel rank, one in all for a checkpoint
that is not model-parallel. A tensor is read when it is needed and never kept, so a lazy mapping streams a
large model. Pipeline stages are joined before, so that layers are numbered through (`megatron.join_stages`).
The pass computes in the dtype of the tensors it is given; angles, norms and softmax are never below float32,
and float64 tensors make every step float64. `c.n_layers` counts the layers in every module.

**Two sides.** The original layouts share blocks.py, rope.py, decoder.py and transformer.py, written after the
papers and the publishers' code; the Hugging Face layout shares files of those names with hf_, written after
the library. A side never uses what is of the other (tests/test_house_reference.py), so that a mistake in a
block does not agree with itself. A family adds its numbers, its traits and what is its own.

A module is found by the folder: that of a family by its name, that of architectures by its `ARCHITECTURES`.
`STAGED` says that an original may come in pipeline stages whatever its files are called.

Those with several heads have them in `HEADS`, by what they are for; each takes what `encode(ids, ranks, c)`
gives (`phases.passes` makes both it and `forward`), and losses.py has its loss. A pass that takes more than
ids says so in `inputs(ranks, c)`: "token_types" and "mask", (B, T) each; "entity_ids" and "entity_mask",
(B, E) each, with "entity_positions", (B, E, M), the tokens of each mention, -1 for none; "entity_start" and
"entity_end", (B, E), for a head that reads the words at both ends. A mask is 1 for what is real.

What verification asks a reading besides, where it says it:

    fits(tokens, c) -> int              the largest length up to `tokens` that a pass takes, 0: none
    padding(tokens, longest, c) -> int  how many of `tokens` a row may have that is padded to `longest`, where
                                        a padded position would else reach a real one in one layout only
    vocabulary(c) -> int                the ids that there are, where config.json does not say it
    needed(c) -> inputs                 those without which the class gives nothing
    traced_with(c) -> int               tokens that a graph is written with, where a few do not stand for any

a reading of the Hugging Face layout, of tensors that no pass reads, by what they are of:

    UNREAD = {words: pattern of names}

and of its architecture's own mistakes:

    mistakes(names, c) -> {words: how}  in the tensors of these names; `how` makes the wrong tensors out of
                                        all, by name, or is a pair of that and of what makes them right again
    config_mistakes(config) -> {words: other values of config.json}
    ONNX_CLASS                          the absolute tolerance and the version of operators of the library's
                                        configuration for ONNX, where there is one
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


PASSES = ("phases", "forward", "embed", "layer", "head")
OF_HEADS = ("encode", "HEADS")  # of an engine whose families have them all


class NotComputed(ValueError):
    """What a config asks for is a model that no reading here computes; it may well be right."""


def families() -> list[str]:
    """Those that have a reading of their original layout, a module of their name with `Config.from_original`
    and `phases`, of its own or of the engine; imports torch."""
    return [stem.replace("_", "-") for stem in _stems("") if _reads_originals(_module(stem))]


def architectures() -> dict[str, str]:
    """Those that have a reading of the Hugging Face layout, as it says in its `ARCHITECTURES`: the module of
    each; imports torch."""
    return {name: stem for stem in _stems("hf_") for name in getattr(_module(stem), "ARCHITECTURES", ())}


def original(family: str) -> ModuleType:
    """The reading of `family` in its original layout; imports torch. ValueError if there is none."""
    stem = family.replace("-", "_")
    if stem in _stems("") and _reads_originals(module := _module(stem)):
        return _whole(module)
    raise ValueError(f"expected family to be one of {', '.join(families())}, found `{family}`")


def converted(architecture: str) -> ModuleType:
    """The reading of `architecture` in the Hugging Face layout; imports torch. ValueError without one."""
    known = architectures()
    if architecture not in known:
        raise ValueError(f"expected architecture to be one of {', '.join(known)}, found `{architecture}`")
    return _whole(_module(known[architecture]))


def _stems(prefix: str) -> list[str]:
    """Modules of one side: those of the Hugging Face layout begin with "hf_"."""
    stems = sorted(module.name for module in iter_modules(__path__))
    return [stem for stem in stems if stem.startswith("hf_") == bool(prefix)]


def _reads_originals(module: ModuleType) -> bool:
    config = getattr(module, "Config", None)
    return hasattr(config, "from_original") and _engine(module) is not None


def _module(stem: str) -> ModuleType:
    return import_module(f"{__name__}.{stem}")


def _engine(module: ModuleType) -> ModuleType | None:
    """The module with the phases: itself, or the nearest one that its Config comes from."""
    homes = [module, *(sys.modules[base.__module__] for base in module.Config.__mro__)]
    return next((home for home in homes if hasattr(home, "phases")), None)


def _whole(module: ModuleType) -> ModuleType:
    """A module with what its engine does, unless it has phases of its own."""
    engine = _engine(module)
    if engine is module or engine is None:
        return module
    made = ModuleType(module.__name__, module.__doc__)
    shared = [name for name in (*PASSES, *OF_HEADS) if hasattr(engine, name)]
    vars(made).update({name: getattr(engine, name) for name in shared} | vars(module))
    return made


def loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross entropy, in nats, of every token given those before it: (B, T, V), (B, T), T > 1."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def generate(forward: Callable[[Tensor], Tensor], ids: Tensor, steps: int) -> Tensor:
    """`ids` (B, T) and the `steps` most probable tokens after it, each from a whole new pass."""
    import torch

    for _ in range(steps):
        ids = torch.cat([ids, forward(ids)[:, -1:].argmax(-1)], dim=1)
    return ids
