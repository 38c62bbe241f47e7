"""What training programs put around a model's tensors and before their names, taken off in one place.

A dict that holds the weights beside the optimizer, a module that wraps the model for several devices, one
that wraps a part of it: each adds a word to the names, and none of them says anything about the model. Such
words: torch.nn.DataParallel and DeepSpeed `module`, torch.compile `_orig_mod`, FSDP `_fsdp_wrapped_module`,
before it `_fpw_module`, activation checkpointing `_checkpoint_wrapped_module` (torch 1.11 to 2.13), Lightning
`state_dict`, `_forward_module` and a `model` of its own, peft `base_model.model`.

A word is taken off where it stands before every name of the model; before some of them only it is an error,
as it would be a guess which of two models in the files is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import chain, repeat
from math import prod
from operator import contains

from ckpt_tool.checkpoint.base import AVERAGE, LeftOut, Renamed, TensorFile, Unwrapped
from ckpt_tool.errors import Problem, fail, fail_all, printable

# Modules that stand for the one inside them, wherever in a name.
_INSIDE = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
_ANY_INSIDE = re.compile(rf"\.({'|'.join(_INSIDE)})\.").search
# What stands before every name, or before none.
_BEFORE = ("module", "state_dict", "model_state_dict", "model_state", "base_model.model", "model")

# What stands beside the weights, by the first word of its names, and what it is.
_BESIDE = {
    r"(model_?|module_?|weights_?)?ema(_.+)?|.+_ema": AVERAGE,
    r"(last_)?optim.*|opt(_state.*)?": "state of the optimizer: only training needs it",
    r"(lr_?|opt_param_)?schedulers?(_states?)?(_dict)?": "state of the schedule: only training needs it",
    r"(grad_?|loss_?)?scaler(_.+)?|amp": "state of loss scaling: only training needs it",
    r"((\w+_)?rng|random)(_states?)?|(\w+_)?generator_states?|rng_.+": "random numbers of the training run",
    r"frozen_param_fragments": "copies that DeepSpeed keeps of what is not trained; the model's were taken",
    r"v_head": "the value head of TRL, which only training needs",
    r"extra_state|(train(er|ing)?_)?state|callbacks|loops|client_state|data_?(loader|module|sampler)s?(_.+)?|"
    "metrics": "state of the training run",
}
_STATE = {re.compile(pattern): reason for pattern, reason in _BESIDE.items()}

# `model` is a wrapper's word, and the first of all names of many models. It is the model's own where what
# follows is the body of one.
_OWN = re.compile(
    r"model\.(embed_tokens|decoder|encoder(?!\.layer\.\d)|embedding|language_model|shared|word_embeddings"
    r"|layers\.\d+\.(self_attn|self_attention|mlp|input_layernorm|post_attention_layernorm))\."
)
# It is a wrapper's before names that begin with no such word, and before another root of a whole model.
_WRAPPED = re.compile(
    r"model\.(tok_embeddings\.|(\w+\.)+(layers|layer|h)\.\d+\.|(\w+\.)*encoders\.\d+\."
    r"|layers\.\d+\.(attention|feed_forward|block_sparse_moe)\.|(\w+\.)*block\.\d+\.(attn|mlp)\.)"
)
# The first names of whole models, by which any word before all of them is known for a wrapper's; others that
# are known may stand between.
_ROOTS = (
    r"tok_embeddings|model\.embed_tokens|lm_head|transformer\.(wte|h\.0)|gpt_neox\.layers\.0|bert\.embeddings"
    r"|(model\.)?decoder\.(embed_tokens|layers\.0)|(model\d*\.)?language_model\.\w+"
    r"|model\d*\.(embedding|decoder|encoder)|(mobilebert|luke)\.(embeddings|encoder)"
    r"|mega\.(embedding_layer|layers\.0)|canine\.(char_embeddings|initial_char_encoder)"
    r"|block\.0\.(attn|mlp)|unembedding"
)
_WHOLE = re.compile(
    rf"(?!model\d*\.)\w+\.(({'|'.join(map(re.escape, (*_INSIDE, *_BEFORE)))})\.)*({_ROOTS})\.", re.ASCII
)
_ADAPTER = re.compile(r"(^|[._])(lora|ia3|hada|lokr|b?oft|vera)_")


def unwrapped(files: dict[str, TensorFile], *, label: str) -> Unwrapped:
    """`files` as they are where nobody wrapped them; `label` is how the checkpoint is called. Kinds:
    `bad-name` (a word before some names only), `ambiguous-input` (two sets of weights), `duplicate-tensor`
    and `shard-conflict` (names that become equal)."""
    tensors = [f.tensors for f in files.values()]
    own = dict(zip(chain.from_iterable(tensors), chain.from_iterable(tensors), strict=True))
    single = {s for s in {t.shape for held in tensors for t in held.values()} if prod(s) == 1}
    one: set[str] = set()
    if single:
        last = dict(chain.from_iterable(held.items() for held in tensors))
        one = {n for n, t in last.items() if t.shape in single}
    found = _Names(label, own, one)
    found.take_off()
    if not (found.before or found.inside or found.beside):
        return Unwrapped(files)
    fail_all(_conflicts(files, found.own))
    made = Unwrapped({}, found.before, [*found.words()])
    for name, file in files.items():
        made.files[name] = Renamed(file, {found.own[n]: n for n in file.tensors if n in found.own})
        made.files[name].metadata = _unwrapped_metadata(file.metadata, found.before)
        made.left_out += [LeftOut(t, found.beside[n]) for n, t in file.tensors.items() if n in found.beside]
    made.readings += _beside(made.files) if found.before else ()
    return made


class _Names:
    """Names on the way to those of the model: `own` has the present one of each in the files."""

    def __init__(self, label: str, own: dict[str, str], single: Collection[str]) -> None:
        self.label, self.own = label, own
        self.single = single  # those that hold one number
        self.before = ""  # what stood before every name
        self.inside: dict[str, None] = {}  # the words that stood inside some
        self.beside: dict[str, str] = {}  # name in the files -> what it is

    def take_off(self) -> None:
        while self._take_before() or self._take_inside():
            pass
        if self.before or self.inside or not any(map(_READERS.match, self.own.values())):
            self._set_aside(counts=bool(self.before))

    def words(self) -> Iterator[str]:
        if self.before:
            yield f"names were read without the `{self.before}` that stands before every one of them"
        if self.inside:
            shown = ", ".join(f"`{w}.`" for w in self.inside)
            yield f"names were read without {shown} inside them, which wraps a part of the model"

    def _take_inside(self) -> bool:
        """Words inside names; one that begins a name is left to `_take_before`."""
        changed = False
        if "._" not in "\n".join(self.own.values()):
            return False
        for name, own in self.own.items():
            if "._" not in own or not _ANY_INSIDE(own):
                continue
            first, *rest = own.split(".")
            kept = [word for word in rest if word not in _INSIDE]
            if len(kept) < len(rest):
                self.inside |= dict.fromkeys(word for word in rest if word in _INSIDE)
                self.own[name] = ".".join((first, *kept))
                changed = True
        return changed

    def _take_before(self) -> bool:
        """One word that stands before every name; what is known to stand beside the weights is set aside,
        unless it is the only model there."""
        words = {own.partition(".")[0] for own in self.own.values()}
        rest: set[str] = set()  # the first words of the weights
        if any(map(beside_weights, words)) or not all(map(contains, self.own.values(), repeat("."))):
            weights = [own for n, own in self.own.items() if self._beside(n) is None]
        else:
            weights, rest = list(self.own.values()), words
        if not weights:
            words = {n.partition(".")[0] for n in self.own.values() if _WHOLE.match(n)}
            weights = [n for n in self.own.values() if n.partition(".")[0] in words]
        rest = rest or {n.partition(".")[0] for n in weights}
        for word in (*_INSIDE, *_BEFORE):
            if word.partition(".")[0] not in rest:
                continue
            with_it = [n for n in weights if n.startswith(f"{word}.")]
            if not with_it or _is_own(word, weights):
                continue
            if len(with_it) < len(weights):
                self._refuse(word, with_it, weights)
            return self._strip(word)
        if len(rest) == 1 and any(map(_WHOLE.match, weights)):
            return self._strip(rest.pop())
        return False

    def _strip(self, word: str) -> bool:
        self._set_aside(counts=True)
        self.own = {n: own.removeprefix(f"{word}.") for n, own in self.own.items()}
        self.before += f"{word}."
        return True

    def _beside(self, name: str, *, counts: bool = True) -> str | None:
        """What the tensor called `name` in the files is, if it is no weight. `counts`: one number under a
        word alone is no weight either, where the weights are in a dict of their own."""
        own = self.own[name]
        word, dot, _ = own.partition(".")
        if counts and not dot and name in self.single and len(self.own) > len(self.single):
            return "one number of the training run"
        return beside_weights(word)

    def _set_aside(self, *, counts: bool) -> None:
        words = {own.partition(".")[0] for own in self.own.values()}
        if not any(map(beside_weights, words)) and all(map(contains, self.own.values(), repeat("."))):
            return
        reasons = {n: self._beside(n, counts=counts) for n in self.own}
        if all(reasons.values()):
            return
        self.beside |= {n: reason for n, reason in reasons.items() if reason is not None}
        self.own = {n: own for n, own in self.own.items() if reasons[n] is None}

    def _refuse(self, word: str, with_it: list[str], weights: list[str]) -> None:
        other = next(n for n in weights if not n.startswith(f"{word}."))
        under = next((w for w in _BEFORE if w != word and other.startswith(f"{w}.")), None)
        if under is not None:
            fail(
                "ambiguous-input",
                f"expected one set of weights, found `{self.before}{word}` and `{self.before}{under}`",
                file=self.label,
                hint="save the one that is meant alone with torch.save",
            )
        fail(
            "bad-name",
            f"expected `{word}.` before every name or none, found it before {len(with_it)} of {len(weights)}",
            file=self.label,
            where=self.before + other,
            hint="save the weights alone with torch.save, a dict whose names all begin alike",
        )


@lru_cache(1024)
def beside_weights(word: str) -> str | None:
    """What names that begin with `word` are, if it is training's and no model's."""
    return next((reason for pattern, reason in _STATE.items() if pattern.fullmatch(word)), None)


def _is_own(word: str, names: list[str]) -> bool:
    """Whether `word` belongs to the model's names, as far as they are known."""
    if word == "base_model.model":
        return any(map(_ADAPTER.search, names))  # an adapter, which has to be merged
    return word == "model" and (any(map(_OWN.match, names)) or not any(map(_WRAPPED.match, names)))


# The first words of a program whose reader knows what its checkpoints hold beside the weights.
_READERS = re.compile(r"(model\d*\.)?(language_model|embedding)\.")


def _conflicts(files: Mapping[str, TensorFile], own: Mapping[str, str]) -> Iterator[Problem]:
    """Names that become one."""
    first: dict[str, tuple[str, str]] = {}
    for file, held in files.items():
        for name in held.tensors:
            if name not in own:
                continue
            other, there = first.setdefault(own[name], (name, file))
            if other != name:
                kind = "duplicate-tensor" if there == file else "shard-conflict"
                found = f"found `{printable(other)}`" + ("" if there == file else f" in {there}") + " too"
                yield Problem(kind, f"expected one tensor called {printable(own[name])}, {found}", file, name)


def _unwrapped_metadata(metadata: Mapping[str, object], before: str) -> Mapping[str, object]:
    """What stands beside the weights, as it is without the dicts of `before` around both: a version or the
    arguments of a run lie there, and without them the same names mean other weights."""
    for word in before.split("."):
        inner = metadata.get(word)
        if isinstance(inner, dict):
            metadata = {**{k: v for k, v in metadata.items() if k != word}, **inner}
    return metadata


def _beside(files: Mapping[str, TensorFile]) -> Iterator[str]:
    """What else the dicts hold in which the weights lie."""
    keys = dict.fromkeys(str(k) for f in files.values() if f.format.startswith("torch") for k in f.metadata)
    if keys:
        shown = ", ".join(printable(k, 40) for k in list(keys)[:8]) + (", ..." if len(keys) > 8 else "")
        yield f"beside the weights, read only where the family knows what it is: {shown}"
