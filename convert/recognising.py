"""Which family an original is of, and what to say where none recognises it, or not the one that was named:
the near misses only, nearest first, and what the files hold.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from shlex import quote
from typing import Any

from ckpt_tool.checkpoint import signs
from ckpt_tool.checkpoint.base import Checkpoint, Given
from ckpt_tool.checkpoint.dcp_names import FORMAT as DCP
from ckpt_tool.checkpoint.tf_coding import VARIABLE
from ckpt_tool.convert import canonical
from ckpt_tool.convert.dialects.published import model_type_of
from ckpt_tool.convert.facts import classes
from ckpt_tool.convert.families import FAMILIES, Family, as_families_know, family
from ckpt_tool.convert.layer_axis import layers_apart, of_megatron
from ckpt_tool.convert.params import NO_CONFIG
from ckpt_tool.convert.quantised import OF_WEIGHTS
from ckpt_tool.convert.quantised_view import quantised_of
from ckpt_tool.convert.widths import CASTABLE
from ckpt_tool.errors import CkptToolError, Problem, fail_all, near, printable

NEAR = 0.6  # of the parts of a name that are in a tensor's name too, in order
SHOWN = 3
NAMES = 2000  # of a folder that are looked at: it may be any
ALONE = "save what is below {} alone, with torch.save, if those are the weights that are meant"
BY_NAME = (
    "save its variables under their names in TensorFlow 1 with the program that wrote it "
    "(tf.compat.v1.train.Saver takes a dict of them), or give the release that it was made from"
)
ONE_OF = (
    "several models are in it, in the scopes {}: save the variables of the one that is meant alone, under "
    "their names without its scope (tf.compat.v1.train.Saver takes a dict of them)"
)
UNFLATTENED = (
    "what was saved as one value (flatten_state_dict=False) torch writes as a file of its own: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} OUT.pt`; then give OUT.pt"
)
COMPARED = 400  # names; those of the first layer tell as much as all

_LATER = re.compile(r"(?:^|\.)(?!0(?:\.|$))\d+(?:\.|$)")  # a part that is a number, and not 0
_OWN_WORD = re.compile(r"model\d*\.")  # where ranks of Megatron keep a model, which takes nobody's name away
GENERIC = frozenset(("model", "decoder", "encoder", "layers", "h", "0", "weight", "bias"))

Said = tuple[str, bool, str]  # name of the family, whether it is its own, why


def recognise(checkpoint: Checkpoint) -> list[Said]:
    """Each family's word on an original checkpoint."""
    checkpoint = layers_apart(checkpoint)
    return [(name, *family(name).recognise(checkpoint)) for name in FAMILIES]


Parts = list[list[str]]  # of names


def of_first_layers(names: Iterable[str]) -> Parts:
    """The parts of names without numbers but 0, at most COMPARED."""
    return [n.split(".") for n in islice((n for n in names if not _LATER.search(n)), COMPARED)]


def nearness(tensors: Collection[str], first: Parts) -> float:
    """How near names (`of_first_layers`) come to having the `tensors` of a family: 0 to 1. What stands before
    a name (a wrapper's `module.`) counts little, and what all models have nothing alone."""
    from difflib import SequenceMatcher

    def shared(tensor: list[str]) -> float:
        own = set(tensor) - GENERIC
        alike = (SequenceMatcher(None, tensor, p).ratio() for p in first if own & set(p))
        return max(alike, default=0.0)

    best = [shared(t.split(".")) for t in dict.fromkeys(tensors)]  # layouts may share some
    return max(best, default=0.0) + sum(best) / (1000 * max(1, len(best)))


def near_misses(checkpoint: Checkpoint, said: Iterable[Said]) -> list[tuple[str, str]]:
    """(family, why not) of at most three that come near, nearest first."""
    if (converted := _converted(checkpoint)) is not None:
        return [(converted, "the tensors have Hugging Face names already")]
    names = layers_apart(checkpoint).names()
    first = of_first_layers(names)
    found = [(nearness(family(f).tensors, first), f, why) for f, own, why in said if not own]
    # Of equally near ones those first that know these names and say what is otherwise.
    found.sort(key=lambda x: (-round(x[0], 2), x[2].startswith("no "), -x[0], x[1]))
    found = [x for x in found if x[0] >= NEAR]
    return [(f, _wrapped(family(f).tensors, names) or why) for _, f, why in found[:SHOWN]]


def _wrapped(tensors: Iterable[str], names: Collection[str]) -> str | None:
    """Where a family's tensor is there, but its name stands below another word."""
    for tensor in tensors:
        if tensor in names:
            return None
        found = next((n for n in names if n.endswith(f".{tensor}")), None)
        if found is not None and not _OWN_WORD.fullmatch(found.removesuffix(tensor)):
            return f"expected {tensor}, found it below `{found.removesuffix(tensor)}`"
    return None


def with_config(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """`checkpoint` with what a user says by --config as its config.json, where it has Hugging Face names that
    no original has and lies there without one; with the class that a user says where its own has none."""
    said = settings.get("model_type")
    if "config.json" in checkpoint.documents:
        return _with_class(checkpoint, settings.get("architectures"))
    if not isinstance(said, str):
        return checkpoint
    content = (json.dumps(dict(settings), indent=2, sort_keys=True) + "\n").encode()
    made = Given("config.json", checkpoint.path / "config.json", len(content), content)
    seen = replace(checkpoint, documents={**checkpoint.documents, "config.json": made})
    if canonical.whose(as_families_know(seen)) is None or any(own for _, own, _ in recognise(checkpoint)):
        return checkpoint
    return seen


def _with_class(checkpoint: Checkpoint, said: Any) -> Checkpoint:
    config = {} if said is None else checkpoint.json("config.json")
    if said is None or config.get("architectures") or canonical.kind_of(checkpoint) is None:
        return checkpoint
    config["architectures"] = [said] if isinstance(said, str) else said
    content = (json.dumps(config, indent=2) + "\n").encode()
    made = Given("config.json", checkpoint.documents["config.json"].path, len(content), content)
    return replace(checkpoint, documents={**checkpoint.documents, "config.json": made})


def spelled(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the class in config.json spelled as it is, where only capitals differ: the first
    conversions of Llama, of March 2023, call it LLaMAForCausalLM, and loaders go by model_type."""
    if "config.json" not in checkpoint.documents:
        return checkpoint
    try:
        named = checkpoint.json("config.json").get("architectures")
    except CkptToolError:
        return checkpoint  # whoever needs it says so
    if not (isinstance(named, list) and len(named) == 1 and isinstance(named[0], str)):
        return checkpoint
    known = {a for f in FAMILIES for a in family(f).architectures}
    called = next((a for a in known if a.lower() == named[0].lower()), None)
    if called is None or named[0] in known:
        return checkpoint
    document = checkpoint.documents["config.json"]
    content = document.read().replace(json.dumps(named[0]).encode(), json.dumps(called).encode())
    made = Given("config.json", document.path, len(content), content)
    note = f"config.json: {printable(named[0])} is {called}, and written as that"
    documents = {**checkpoint.documents, "config.json": made}
    return replace(checkpoint, documents=documents, readings=(*checkpoint.readings, note))


# --- what to say ----------------------------------------------------------------------------------------


def check_plain(checkpoint: Checkpoint) -> None:
    """Fail with `unsupported` where the tensors are packed, or an adapter's, and no family reads those.
    Beside quantised weights that are read, codes or scales alone are no other format: a plan says what is
    missing."""
    names = checkpoint.names()
    if quantised_of(checkpoint) is not None:
        names = [n for n in names if not n.endswith(OF_WEIGHTS)]
    if (found := signs.packed(names)) is not None and not _reads_packed(checkpoint):
        what, name, hint = found
        message = f"expected plain weights, found {what}{_of_codes(checkpoint, name)}"
        fail_all([Problem("unsupported", message, checkpoint.path.name, name, hint)])


def check_layout(checkpoint: Checkpoint) -> None:
    """Fail with `unsupported` where the names are another program's own, for which no family has rules."""
    names = checkpoint.names()
    found = signs.layout(names)
    told = [n for n in names if n.endswith(signs.TURNING)]
    kind = model_type_of(checkpoint) if told else None
    if found is None and (kind is None or kind in classes()):  # classes unknown here have such names, too
        found = signs.turned({n: t.shape for n in told for t in checkpoint.find(n)[:1]})
    if found is not None:
        what, name, hint = found
        message = f"expected names of a layout that is read here, found {what}"
        fail_all([Problem("unsupported", message, checkpoint.path.name, name, hint)])


def _of_codes(checkpoint: Checkpoint, name: str) -> str:
    """The dtype of the weight whose scale is called so, where that tells more than its name."""
    weight = checkpoint.find(f"{name.rpartition('.')[0]}.weight")
    return f", here {weight[0].dtype}" if weight and weight[0].dtype not in CASTABLE else ""


def check_whole(checkpoint: Checkpoint) -> None:
    """Fail with `unsupported` where parameters lie elsewhere: a run of DeepSpeed's ZeRO-3, or of FSDP, keeps
    an empty tensor in the place of each until it gathers them, older releases of DeepSpeed one number.
    No weight of a model is empty. Source: huggingface/transformers#20082, deepspeedai/DeepSpeed#1394."""
    if {t.shape for t in checkpoint}.isdisjoint(((0,), (1,))):
        return
    shapes = {t.name: t.shape for t in checkpoint if t.name.endswith((".weight", ".bias"))}
    empty = [n for n, shape in shapes.items() if shape == (0,)]
    single = [n for n, shape in shapes.items() if shape == (1,)]
    found = empty or (single if 2 * len(single) > len(shapes) else [])
    if not found:
        return
    numbers = "no number" if empty else "one number"
    message = (
        f"expected whole weights, found {len(found)} of {len(shapes)} parameters with {numbers} in them, as "
        "ZeRO-3 and FSDP hold the places of what other ranks have"
    )
    hint = (
        "DeepSpeed's own folder, global_stepN, has all of it and is read (zero_to_fp32.py joins it, too); "
        "a run saves whole weights with stage3_gather_16bit_weights_on_model_save, or FSDP's FULL_STATE_DICT"
    )
    fail_all([Problem("unsupported", message, checkpoint.path.name, found[0], hint)])


def _reads_packed(checkpoint: Checkpoint) -> bool:
    """Whether a family has rows for tensors of codes, in either layout."""
    known = [family(name) for name in FAMILIES if family(name).packed]
    return any(f.recognise(checkpoint)[0] or canonical.kind_of(checkpoint) in f.classes for f in known)


def only_family(checkpoint: Checkpoint) -> str:
    """The one family that recognises `checkpoint`, or whose Hugging Face names its tensors have. Kinds:
    `ambiguous-family`, `unknown-family`, `unsupported` (packed weights)."""
    check_plain(checkpoint)
    said = recognise(checkpoint)
    own = [(name, why) for name, is_own, why in said if is_own]
    if len(own) == 1:
        return own[0][0]
    _check_readable(checkpoint)
    fail_all(_misnamed(checkpoint, {family(name).document or "" for name, _ in own}))
    label = checkpoint.path.name
    if own:
        reasons = "; ".join(f"{n}: {why}" for n, why in own)
        message = f"expected one family to recognise it, found {' and '.join(n for n, _ in own)} ({reasons})"
        hint = f"name the one that is meant, instead of auto or by --family: {' or '.join(n for n, _ in own)}"
        raise CkptToolError(Problem("ambiguous-family", message, label, hint=hint))
    if (name := canonical.whose(as_families_know(checkpoint))) is not None:
        return name
    raise CkptToolError(*unknown(checkpoint, said))


def _check_readable(checkpoint: Checkpoint) -> None:
    """Fail as its reader does where the document that tells families apart cannot be read: what they say
    without it is of no use."""
    for name in ("params.json", "config.json"):
        if name in checkpoint.documents:
            checkpoint.json(name)


def _misnamed(checkpoint: Checkpoint, wanted: Collection[str]) -> Iterator[Problem]:
    """The one document that all of several families want, where it is there under another name."""
    for name in wanted if len(wanted) == 1 else ():
        if name and name not in checkpoint.documents and _under_another_name(checkpoint, name) is not None:
            yield _no_document(checkpoint, name)


def unknown(
    checkpoint: Checkpoint, said: Iterable[Said], wanted: str = "one family to recognise it, found none"
) -> list[Problem]:
    """That no family recognises it, or not the `wanted` one: what the files hold, and the near misses, a line
    each."""
    misses = near_misses(checkpoint, said)
    held = _held(checkpoint)
    hint = "`ckpt-tool inspect` shows all that the files hold, `ckpt-tool families` what is read"
    names = checkpoint.names()
    wrapped = _wrapped(family(misses[0][0]).tensors, names) if misses else None
    if wrapped is not None:
        hint = ALONE.format(wrapped.rpartition(" ")[2])
    elif misses:
        hint = f"the nearest are named below; `ckpt-tool convert {misses[0][0]}` would say what it lacks"
    if any(n.endswith(VARIABLE) for n in names):
        hint = BY_NAME
    for file in checkpoint.files.values() if not names else ():
        hint = UNFLATTENED.format(quote(str(file.path.parent))) if file.format == DCP else hint
    if len(several := _models(checkpoint)) > 1:
        hint = ONE_OF.format(" and ".join(printable(s, 40) or "none" for s in several[:4]))
    if canonical.named_so(layers_apart(checkpoint)) and "config.json" not in checkpoint.documents:
        message = f"expected config.json beside weights with Hugging Face names, found none; it holds {held}"
        return [Problem("missing-file", message, checkpoint.path.name, hint=NO_CONFIG)]
    if (whole := _with_head(checkpoint)) is not None:
        message = (
            f"expected {whole}, found the model alone that it is made of, without its head; it holds {held}"
        )
        hint = f"load it as {whole}, with the head that it had, and save_pretrained() that"
        return [Problem("unknown-family", message, checkpoint.path.name, hint=hint)]
    first = Problem(
        "unknown-family",
        f"expected {wanted}; it holds {held}",
        checkpoint.path.name,
        hint=hint,
    )
    return [first, *(Problem("unknown-family", why, where=name) for name, why in misses)]


def _models(checkpoint: Checkpoint) -> list[str]:
    """The scopes of the models in a checkpoint of TensorFlow."""
    if all(f.format != "tf-bundle" for f in checkpoint.files.values()):
        return []
    from ckpt_tool.checkpoint.tf_scopes import scopes

    return scopes(checkpoint.names())


def _held(checkpoint: Checkpoint) -> str:
    names = checkpoint.names()
    inside = [n for n in names if ".0." in n] or names
    text = (
        f"{len(names)} tensor{'s' * (len(names) > 1)} such as {printable(inside[0], 80)}"
        if names
        else "no tensors"
    )
    if any(f.format == "tf-bundle" for f in checkpoint.files.values()):
        objects = any(n.endswith(VARIABLE) for n in names)
        what = "2 checkpoint of objects, named after attributes" if objects else "checkpoint"
        text = f"{text} (a TensorFlow {what})"
    architecture = _architecture(checkpoint)
    return f"{text}, config.json says {printable(architecture, 60)}" if architecture else text


def _architecture(checkpoint: Checkpoint) -> str | None:
    """What config.json calls the model; None without one that can be read (planning says why)."""
    if "config.json" not in checkpoint.documents:
        return None
    try:
        config = checkpoint.json("config.json")
    except CkptToolError:
        return None
    found = config.get("architectures")
    first = found[0] if isinstance(found, list) and found else config.get("model_type")
    return first if isinstance(first, str) else None


def _with_head(checkpoint: Checkpoint) -> str | None:
    """The class that a family writes and of which config.json names the model without a head."""
    said = _architecture(checkpoint) or ""
    if not said.endswith("Model"):
        return None
    begins = f"{said.removesuffix('Model')}For"
    classes = dict.fromkeys(a for n in FAMILIES for a in family(n).architectures if a.startswith(begins))
    return next(iter(classes), None)


def _converted(checkpoint: Checkpoint) -> str | None:
    """The family whose conversions look like this, of those whose originals do not."""
    said = _architecture(checkpoint)
    found = [n for n in FAMILIES if said in family(n).architectures and not family(n).published]
    return found[0] if len(found) == 1 else None


# What planning finds missing, or in the way, where a model of another kind was given.
_OF_ANOTHER = (
    "missing-fact",
    "missing-file",
    "missing-tensor",
    "uncovered-tensors",
    "shape-mismatch",
    "config-mismatch",
    "unsupported",
    "ambiguous-input",
    "already-converted",
)


def explained(error: CkptToolError, checkpoint: Checkpoint, chosen: Family, to: str) -> CkptToolError:
    """`error` of planning with the reason first, where that is another family's model, or another direction:
    what is missing then says nothing."""
    if error.kind not in _OF_ANOTHER:
        return error
    asked = to == "hf" and error.kind == "missing-fact" and not of_megatron(checkpoint.names())
    asked = asked and any(
        p.file != "config.json" for p in error.problems
    )  # which tells what it was asked for
    if asked and chosen.document and chosen.document not in checkpoint.documents:
        error = CkptToolError(_no_document(checkpoint, chosen.document), *error.problems)
    if to == "original" and ("config.json" not in checkpoint.documents or is_original(checkpoint)):
        return CkptToolError(no_config(checkpoint))
    if to == "original":
        other = _converted_by_another(checkpoint, chosen)
        return error if other is None else CkptToolError(other)
    said = recognise(checkpoint)
    own = {name: why for name, is_own, why in said if is_own}
    if chosen.name in own:
        return error
    names = checkpoint.names()
    alike = nearness(chosen.tensors, of_first_layers(names)) >= NEAR and error.kind != "already-converted"
    if len(own) == 1:
        first = _of_another(checkpoint, chosen, *own.items())
        return CkptToolError(first, *(error.problems if alike else ()))
    if (converted := canonical.whose(as_families_know(checkpoint))) == chosen.name:
        return error
    if converted is not None:
        return CkptToolError(_of_another_folder(checkpoint, chosen, converted, "--to hf"))
    wrapped = _wrapped(chosen.tensors, names)
    if error.kind == "already-converted" or (error.kind == "unsupported" and wrapped is None):
        return error  # which knows what it is
    if not alike:
        return CkptToolError(*unknown(checkpoint, said, f"an original of {chosen.name}"))
    if wrapped is not None:  # all that is missing then is there
        message = f"expected an original of {chosen.name}; {wrapped}"
        hint = ALONE.format(wrapped.rpartition(" ")[2])
        return CkptToolError(Problem("unknown-family", message, checkpoint.path.name, hint=hint))
    why = next(why for name, _, why in said if name == chosen.name)
    first = Problem("unknown-family", f"expected an original of {chosen.name}; {why}", checkpoint.path.name)
    return CkptToolError(first, *error.problems)


def _converted_by_another(checkpoint: Checkpoint, chosen: Family) -> Problem | None:
    """That a Hugging Face folder is not of the family that was named for the way back."""
    said = _architecture(checkpoint)
    own = [n for n in FAMILIES if said in (*family(n).architectures, *family(n).classes)]
    if said is None or len(own) != 1 or chosen.name in own:
        return None
    return _of_another_folder(checkpoint, chosen, own[0], "--to original")


def _of_another_folder(checkpoint: Checkpoint, chosen: Family, own: str, way: str) -> Problem:
    said = printable(_architecture(checkpoint) or "another model", 60)
    message = f"expected a Hugging Face folder of {chosen.name}, found one of {own} (config.json: {said})"
    hint = f"`ckpt-tool convert {own} {way}`".replace(" --to hf", "")
    return Problem("unknown-family", message, checkpoint.path.name, hint=hint)


def _no_document(checkpoint: Checkpoint, name: str) -> Problem:
    """What comes before questions that a file would answer."""
    if (other := _under_another_name(checkpoint, name)) is not None:
        message = f"expected {name} beside the weights, found {other[0]}"
        return Problem("missing-file", message, checkpoint.path.name, hint=other[1])
    inside, way = _kept_by(checkpoint)
    message = f"expected {name} beside the weights{inside}, found none: shapes do not tell what follows"
    hint = (
        f"put the download's {name} there, under that name, or give each value by --set, or a JSON file of "
        f"them by --config{way}"
    )
    return Problem("missing-file", message, checkpoint.path.name, hint=hint)


def _under_another_name(checkpoint: Checkpoint, name: str) -> tuple[str, str] | None:
    """What lies there in the place of the document `name`, and what to do with it: by its name, beside an
    archive, or as config.json."""
    for file in checkpoint.files.values():
        said = file.metadata.get("model_args")
        if name == "params.json" and isinstance(said, Mapping) and "dim" in said:
            way = f"json.dump(torch.load({file.name!r})['model_args'], open('params.json', 'w')) writes it"
            return f"model_args in {file.name}, as llama2.c keeps them", f"{way}; add norm_eps and rope_theta"
    path = checkpoint.path
    try:
        folder = path if path.is_dir() else path.parent
        there = sorted(os.listdir(folder))[:NAMES]
    except OSError:  # not on this machine
        return None
    stem, _, ending = name.partition(".")
    if name in there and folder != path:
        return f"one beside the archive {path.name}", "unpack the archive there, and give that folder"
    for other in there:
        if stem in other.lower() and ending in other.lower() and not other.startswith("._"):
            return printable(other, 80), f"call it {name}, if it is the download's"
    config = checkpoint.json("config.json") if "config.json" in checkpoint.documents else {}
    if name == "params.json" and "dim" in config and "n_layers" in config:
        return "what it says in config.json", f"call config.json {name}: that has what an original's says"
    return None


def _kept_by(checkpoint: Checkpoint) -> tuple[str, str]:
    """Whose files they are where another program keeps a state dict in files of its own, and what else turns
    them into something that is read."""
    if any(name.endswith("_optim_states.pt") for name in checkpoint.files):
        return " of a DeepSpeed checkpoint", ""
    if any(name.endswith("_model_states.pt") for name in checkpoint.files):
        return " of a DeepSpeed checkpoint", "; zero_to_fp32.py in its folder writes float32 weights of it"
    if checkpoint.path.suffix == ".nemo":
        return " of a NeMo archive", "; NeMo's own scripts export it"
    return "", ""


def check_own(checkpoint: Checkpoint, chosen: Family) -> None:
    """Fail where `chosen` does not recognise what exactly one other family does: names that both have would
    be taken as they are, and what no file says (a base of frequencies) as `chosen` has it."""
    if chosen.recognise(checkpoint)[0]:
        return
    own = [(name, why) for name, is_own, why in recognise(checkpoint) if is_own]
    if len(own) == 1:
        raise CkptToolError(_of_another(checkpoint, chosen, own[0]))


def _of_another(checkpoint: Checkpoint, chosen: Family, own: tuple[str, str]) -> Problem:
    name, why = own
    message = f"expected an original of {chosen.name}, found what looks like {name} ({why})"
    hint = f"`ckpt-tool convert {name}`"
    if (
        "params.json" in checkpoint.documents
        and nearness(chosen.tensors, of_first_layers(checkpoint.names())) >= NEAR
    ):
        hint += f"; if it is {chosen.name} all the same, give its values by --set, without params.json"
    return Problem("unknown-family", message, checkpoint.path.name, hint=hint)


def is_original(checkpoint: Checkpoint) -> bool:
    """Whether it is an original in a layout of its own, whatever config.json lies beside it."""
    own = [family(name) for name, is_own, _ in recognise(checkpoint) if is_own]
    return bool(own) and not any(f.published for f in own) and canonical.kind_of(checkpoint) is None


def no_config(checkpoint: Checkpoint) -> Problem:
    """That the way back was asked for of what is no Hugging Face folder."""
    own = [name for name, is_own, _ in recognise(checkpoint) if is_own]
    message = "expected config.json beside the weights (a Hugging Face folder), found none"
    if len(own) != 1:
        hint = "give the folder that `ckpt-tool convert` wrote, or one from the Hub"
        return Problem("missing-file", message, checkpoint.path.name, hint=hint)
    (name,) = own
    message = f"expected a Hugging Face folder with config.json, found an original of {name}"
    hint = f"leave out --to original: `ckpt-tool convert {name}` goes from an original to Hugging Face"
    return Problem("wrong-format", message, checkpoint.path.name, hint=hint)


def unknown_name(name: str) -> Problem:
    """That no family is called so."""
    hint = near(name, [*FAMILIES, "auto"]) or f"one of {', '.join(FAMILIES)}"
    return Problem("usage", f"expected a family or auto, found {name!r}", where="FAMILY", hint=hint)
