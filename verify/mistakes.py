"""Known mistakes of converters, as changes to the converted side: planted to test the bar, undone to find a
cause.

Most follow from the family's own table, so no family is named here. Where a row reorders axes, a converter
can forget to, can read the source in another order, or can cut it into another number of heads; where two
tensors of a layer have one shape, it can exchange them. What remains are values of config.json, and what the
reading of the architecture says of its own (`mistakes` and `config_mistakes`, reference/__init__.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.checkpoint.tensor_names import layer_of, short, words_of
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.plan import Plan
from ckpt_tool.verify import mistakes_packed
from ckpt_tool.verify.coverage import WITHOUT_EFFECT
from ckpt_tool.verify.orders import Belief, Fused, Reorder, beliefs, fused, layouts, reorders
from ckpt_tool.verify.packed import Packed
from ckpt_tool.verify.sides import Change, Phase, Side, Tensors
from ckpt_tool.verify.streamed import Streamed, beside, by_rows, transposed, turned_by_blocks, with_order

Sizes = Mapping[str, int]


def relayout(x: Tensor, sizes: Sizes, stored: Iterable[str], wanted: Iterable[str]) -> Tensor:
    """The elements of x, which lie in the axis order `stored`, in the order `wanted`; x keeps its shape. Of a
    matrix that is read by rows, rows in another order are read from where they are."""
    stored, wanted = list(stored), list(wanted)
    if isinstance(x, Streamed) and not x.turned and x.dim() == 2:
        inner = columns_of(stored, wanted, sizes, x.shape[1])
        if inner is not None:
            outer = stored[: len(stored) - inner]
            rows = torch.arange(x.shape[0]).reshape([sizes[a] for a in outer])
            return with_order(x, rows.permute([outer.index(a) for a in wanted[: len(outer)]]).reshape(-1))
    split = x.reshape([sizes[a] for a in stored])
    return split.permute([stored.index(a) for a in wanted]).reshape(x.shape)


def columns_of(stored: list[str], wanted: list[str], sizes: Sizes, columns: int) -> int | None:
    """How many of the last axes, which are the same in both orders, make up the columns of a matrix."""
    for count in range(1, len(stored) + 1):
        if stored[-count:] != wanted[-count:]:
            return None
        if prod(sizes[a] for a in stored[-count:]) == columns:
            return count
    return None


def planted(r: Reorder, b: Belief) -> Callable[[Tensors], dict[str, Tensor]]:
    """The tensor as a converter with that belief writes it, from the right one."""

    def make(w: Tensors) -> dict[str, Tensor]:
        source = relayout(w[r.name], r.sizes, r.right, r.left)
        return {r.name: relayout(source, b.sizes, b.order, r.right)}

    return make


def undone(r: Reorder, b: Belief) -> Callable[[Tensors], dict[str, Tensor]]:
    """The right tensor from the one that a converter with that belief wrote."""

    def make(w: Tensors) -> dict[str, Tensor]:
        source = relayout(w[r.name], b.sizes, r.right, b.order)
        return {r.name: relayout(source, r.sizes, r.left, r.right)}

    return make


def written(r: Reorder, order: tuple[str, ...]) -> Callable[[Tensors], dict[str, Tensor]]:
    """The tensor with its axes in another order."""
    return lambda w: {r.name: relayout(w[r.name], r.sizes, r.right, order)}


# --- query, key and value in one ------------------------------------------------------------------------


def with_rows(f: Fused, rows: np.ndarray) -> Callable[[Tensors], dict[str, Tensor]]:
    """The tensors with the rows of the right ones in that order."""

    def make(w: Tensors) -> dict[str, Tensor]:
        parts = [w[name] for name in f.names]
        if f.dim == 0 and all(isinstance(p, Streamed) and not p.turned and p.dim() == 2 for p in parts):
            mixed = with_order(beside([p for p in parts if isinstance(p, Streamed)]), torch.from_numpy(rows))
            ends = [*accumulate(len(p) for p in parts)]
            return {n: mixed[e - len(p) : e] for n, p, e in zip(f.names, parts, ends, strict=True)}
        index = torch.from_numpy(rows).to(parts[0].device)
        whole = torch.cat(parts, dim=f.dim).index_select(f.dim, index)
        pieces = torch.split(whole, [p.shape[f.dim] for p in parts], dim=f.dim)
        return dict(zip(f.names, pieces, strict=True))

    return make


def misread(found: list[Fused], undo: bool = False) -> list[Change]:
    """Each way to misread query, key and value, of the weight and the bias together, and of each alone."""
    made: dict[str, list[tuple[Fused, Callable[[Tensors], dict[str, Tensor]]]]] = {}
    for f in found:
        for words, rows in f.mistakes:
            made.setdefault(words, []).append((f, with_rows(f, rows.argsort() if undo else rows)))
    changes = []
    for words, makers in made.items():
        changes.append(Change(words, together(make for _, make in makers)))
        if undo and len(makers) > 1:
            changes += [Change(f"{short(f.names[0])}: {words}", make) for f, make in makers]
    return changes


def together(
    makers: Iterable[Callable[[Tensors], dict[str, Tensor]]],
) -> Callable[[Tensors], dict[str, Tensor]]:
    made = list(makers)
    return lambda w: {name: x for make in made for name, x in make(w).items()}


# --- exchanges ------------------------------------------------------------------------------------------


def exchange(pairs: list[tuple[str, str]]) -> Callable[[Tensors], dict[str, Tensor]]:
    """Each first tensor takes the place of its second, and the other way round."""

    def make(w: Tensors) -> dict[str, Tensor]:
        made = {}
        for a, b in pairs:
            if w[a].shape != w[b].shape:
                raise ValueError(f"{a} and {b} differ in shape")
            made[a], made[b] = w[b], w[a]
        return made

    return make


def exchanges(
    names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], layer: int, vectors: bool = False
) -> list[Change]:
    """Experts that change places, and tensors of one shape whose names differ in one word (gate and up); of
    `vectors` as well (two norms), which is no mistake worth planting where they are nearly alike."""
    own = [n for n in names if layer_of(n) == layer and len(shapes[n]) > (0 if vectors else 1)]
    experts: dict[tuple[str, int], dict[str, str]] = {}
    for name in own:
        parts = words_of(name)
        at = [k for k, p in enumerate(parts) if p.isdecimal()]
        if len(at) > 1:
            prefix, rest = ".".join(parts[: at[1]]), ".".join(parts[at[1] + 1 :])
            experts.setdefault((prefix, int(parts[at[1]])), {})[rest] = name
    made = []
    keys = sorted(experts)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            if a[0] == b[0] and experts[a].keys() == experts[b].keys():
                pairs = [(experts[a][k], experts[b][k]) for k in experts[a]]
                made.append(Change(f"experts {a[1]} and {b[1]} exchanged", exchange(pairs)))
    for i, x in enumerate(own):
        for y in own[i + 1 :]:
            p, q = words_of(x), words_of(y)
            unlike = [(u, v) for u, v in zip(p, q, strict=False) if u != v]
            one_word = len(p) == len(q) and len(unlike) == 1 and not unlike[0][0].isdecimal()
            if one_word and shapes[x] == shapes[y]:
                made.append(Change(f"{short(x)} and {short(y)} exchanged", exchange([(x, y)])))
    return made


# --- single tensors -------------------------------------------------------------------------------------


def transpose(name: str, back: bool = False) -> Callable[[Tensors], dict[str, Tensor]]:
    """The transposed values in the shape they had; `back` undoes it (the same where the matrix is square). Of
    one that is read by rows each block of rows by itself, unless it is a square one of a layer."""

    def make(w: Tensors) -> dict[str, Tensor]:
        x = w[name]
        if isinstance(x, Streamed) and not x.turned and x.dim() == 2:
            if x.shape[0] == x.shape[1] and layer_of(name) is not None:
                return {name: transposed(x)}
            if not back:
                return {name: turned_by_blocks(x)}
        turned = x.reshape(x.shape[::-1]).mT if back else x.mT.reshape(x.shape)
        return {name: turned.contiguous()}

    return make


PAIR = 2


def perturb(name: str, kind: Class, heads: int) -> Callable[[Tensors], dict[str, Tensor]]:
    """The largest element of a vector, one per cent larger; of query, key and value in one, the query's; of
    distances one of the least, to what is not later, which every prompt has; both of two, which may be those
    of two outputs (the first and the last token of an answer)."""

    def make(w: Tensors) -> dict[str, Tensor]:
        x = w[name].clone()
        part = torch.arange(len(x), device=x.device)
        if kind.fused_bias is not None and name.endswith(kind.fused_bias):
            part = part.view(heads if kind.fused_by_head else 1, 3, -1)[:, 0].flatten()
        if kind.distances is not None and name.endswith(kind.distances):
            part = part[: len(part) // 2 + 1][-3:]
        x[part[x[part].abs().argmax()] if len(x) > PAIR else part] *= 1.01
        return {name: x}

    return make


def roll_rows(name: str, by: int) -> Callable[[Tensors], dict[str, Tensor]]:
    """Row k of the result is row k - by of the tensor: a vocabulary shifted up by `by`."""
    return lambda w: {name: torch.roll(by_rows(w[name]), by, 0)}


# --- what to plant, what to try -------------------------------------------------------------------------

EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
GELU_KEYS = ("hidden_activation", "hidden_act", "activation_function")
OTHER_GELU = {"gelu": "gelu_new", "gelu_python": "gelu_new"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu"
)


def to_plant(
    phase: Phase,
    plan: Plan | None,
    shapes: Mapping[str, tuple[int, ...]],
    side: Side,
    packed: Packed | None = None,
) -> list[Change]:
    """The negative controls of one phase of `side`. `shapes` holds the tensors that the phase has read, so
    that an expert that no token was sent to is not blamed for staying unseen; `packed` says what became of
    quantised weights."""
    own = [Change(name, plant) for name, plant, _ in _own_tensors(side, shapes)]
    own += [Change(name, config=values) for name, values in _own_values(side)]
    of_codes = [] if packed is None else mistakes_packed.to_plant(packed, plan, shapes, side)
    return [*own, *_planted(phase, plan, shapes, side.raw), *of_codes]


def _of_kind(kind: str, changes: Iterable[Change]) -> list[Change]:
    return [replace(c, kind=kind) for c in changes]


def _own_tensors(
    side: Side, names: Iterable[str]
) -> list[tuple[str, Callable[[Tensors], dict[str, Tensor]], Callable[[Tensors], dict[str, Tensor]]]]:
    """Mistakes that the reading says its architecture's converters make in these tensors: (words, what makes
    the wrong tensors out of the right ones, and what the right ones out of the wrong)."""
    found = getattr(side.module, "mistakes", None)
    made = {} if found is None else found(tuple(names), side.config)
    return [(words, *(how if isinstance(how, tuple) else (how, how))) for words, how in made.items()]


def _own_values(side: Side) -> list[tuple[str, dict[str, Any]]]:
    """The same of config.json: (words, other values)."""
    found = getattr(side.module, "config_mistakes", None)
    return [] if found is None else list(found(side.raw).items())


def layer_in(phase: Phase, shapes: Iterable[str]) -> int | None:
    """The number that the tensors of a phase have in their names, where they are those of a layer: a model of
    several stacks counts each from 0."""
    found = {layer_of(name) for name in shapes}
    if isinstance(phase, int):
        found -= {None}
    return found.pop() if len(found) == 1 else phase if isinstance(phase, int) else None


def _planted(
    phase: Phase, plan: Plan | None, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> list[Change]:
    kind, layer = _class_of(config), layer_in(phase, shapes)
    if layer is None:
        whole = [Change(*_of_matrix(n, s, kind, undo=False)) for n, s in shapes.items() if len(s) == 2]
        made = _of_kind("outside", whole)
        made += _perturbed({n: s for n, s in shapes.items() if len(s) == 1}, kind, config)
        made += _other_gelus(config)
        if phase == "head" and config.get("tie_word_embeddings") is False:
            tied = {"tie_word_embeddings": True}
            made.append(Change("output layer tied to the embedding", config=tied, kind="outside"))
        return made
    found = [r for r in reorders(plan, layer) if r.name in shapes]
    made = []
    for r in found:
        for b in beliefs(r, found):
            if b.order == r.right or b.sizes != r.sizes:
                made.append(Change(f"{short(r.name)} {b.words}", planted(r, b), kind=r.name))
    made += _of_kind("misread", misread(fused(plan, layer))[:2])
    swaps = exchanges(shapes, shapes, layer)
    kinds = {"experts": [c for c in swaps if c.name.startswith("experts")][:1]}
    kinds["others"] = [c for c in swaps if not c.name.startswith("experts")][:4]
    made += [c for kind_of, group in kinds.items() for c in _of_kind(kind_of, group)]
    matrices = [n for n, s in shapes.items() if len(s) == 2]
    square = [n for n in matrices if shapes[n][0] == shapes[n][1]] or matrices[-1:]
    made += [Change(f"{short(n)} transposed", transpose(n), kind="transposed") for n in square[:2]]
    # Without rotary positions a key's bias adds the same to all scores of a query, which softmax takes away;
    # with them its slowly turned channels still add nearly that.
    vectors = {n: s for n, s in shapes.items() if len(s) == 1 and not n.endswith(kind.key_bias)}
    made += _perturbed(vectors, kind, config)
    if layer > 0:
        return made  # a wrong config value shows in the first layer; an epsilon hides in larger inputs
    key, theta = rope_theta(config)
    if theta is not None:
        made.append(Change(f"{key} ten times as large", config={key: theta * 10}))
    for key in EPS_KEYS:
        if config.get(key):
            made.append(Change(f"{key} ten times as large", config={key: config[key] * 10}))
    return made + _other_gelus(config)


def _class_of(config: Mapping[str, Any]) -> Class:
    """What the class of the converted model says of its tensors."""
    return classes().get(class_of(config) or "", Class("", {}, {}))


def _perturbed(
    vectors: Mapping[str, tuple[int, ...]], kind: Class, config: Mapping[str, Any]
) -> list[Change]:
    heads = int(config.get("num_attention_heads") or 1)
    return [
        Change(f"{short(n)}: {'one weight' if s > PAIR else 'both weights'} 1 % off", perturb(n, kind, heads))
        for n, (s,) in vectors.items()
    ]


def _of_words(name: str, kind: Class) -> bool:
    """Whether the rows of a matrix are the words of the vocabulary."""
    return name == kind.prefix + kind.words or name in kind.tied


def _of_matrix(name: str, shape: tuple[int, ...], kind: Class, undo: bool) -> tuple[str, Callable[..., Any]]:
    """What goes wrong with a matrix outside of the layers, or what takes it back: an embedding's rows
    shifted, the two of token types or classes exchanged, another matrix transposed."""
    if _of_words(name, kind):
        return f"{short(name)}: vocabulary shifted by one", roll_rows(name, -1 if undo else 1)
    if shape[0] == 2:
        return f"{short(name)}: the two rows exchanged", roll_rows(name, 1)
    if kind.positions and name == kind.prefix + kind.positions:
        return f"{short(name)}: positions shifted by one", roll_rows(name, -1 if undo else 1)
    return f"{short(name)} transposed", transpose(name, back=undo)


def _other_gelus(config: Mapping[str, Any]) -> list[Change]:
    """The tanh form where erf is meant, and the other way round."""
    idle = _class_of(config).idle  # a class may have both names and read one
    return [
        Change(f"{key} {other} where it is {config[key]}", config={key: other})
        for key in GELU_KEYS
        if key not in idle and (other := OTHER_GELU.get(str(config.get(key))))
    ]


def to_undo(
    phase: Phase, plan: Plan | None, shapes: Mapping[str, tuple[int, ...]], side: Side
) -> list[Change]:
    """What to try on a phase of `side` that differs: for each known mistake the change that would take it
    back."""
    own = [Change(name, undo) for name, _, undo in _own_tensors(side, shapes)]
    values = [(key, value) for _, known in _own_values(side) for key, value in known.items()]
    return [
        *_config_changes(plan, side.raw, values, phase == "head"),
        *own,
        *_undone(phase, plan, shapes, side.raw),
    ]


def _undone(
    phase: Phase, plan: Plan | None, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> list[Change]:
    layer = layer_in(phase, shapes)
    if layer is None:
        made, kind = [], _class_of(config)
        for n, s in shapes.items():
            if len(s) == 2 and _of_words(n, kind):
                made += [
                    Change(f"{short(n)}: vocabulary shifted by {by:+d}", roll_rows(n, -by))
                    for by in (1, -1, 2, -2, 3, -3, 4, -4, 768, -768)
                    if abs(by) < s[0]
                ]
            elif len(s) == 2:
                made.append(Change(*_of_matrix(n, s, kind, undo=True)))
        return made
    found = [r for r in reorders(plan, layer) if r.name in shapes]
    made = [Change(f"{short(r.name)} {b.words}", undone(r, b)) for r in found for b in beliefs(r, found)]
    if len(found) > 1:
        for rotary in ([r for r in found if r.rotary], [r for r in found if not r.rotary]):
            if len(rotary) > 1:
                names = " and ".join(short(r.name) for r in rotary)
                first = [beliefs(r, found)[0] for r in rotary]
                makers = [undone(r, b) for r, b in zip(rotary, first, strict=True)]
                made.append(Change(f"{names} {first[0].words}", together(makers)))
    made += misread(fused(plan, layer), undo=True)
    made += [
        Change(f"{short(r.name)} permuted twice", planted(r, Belief("", r.right, r.sizes))) for r in found
    ]
    made += [Change(f"{short(r.name)} {words}", written(r, o)) for r in found for words, o in layouts(r)]
    made += exchanges(shapes, shapes, layer, vectors=True)
    made += [
        Change(f"{short(n)} transposed", transpose(n, back=True)) for n, s in shapes.items() if len(s) == 2
    ]
    return made


def rope_theta(config: Mapping[str, Any]) -> tuple[str, float | None]:
    """The base of the rotary frequencies, and what the class of the config calls it."""
    newer = config.get("rope_parameters")
    if isinstance(newer, Mapping) and newer.get("rope_theta") is not None:
        return "rope_theta", float(newer["rope_theta"])
    names = (*_class_of(config).aliases.get("rope_theta", ()), "rope_theta")
    key = next((n for n in names if config.get(n) is not None), "rope_theta")
    return key, None if config.get(key) is None else float(config[key])


def _config_changes(
    plan: Plan | None, config: Mapping[str, Any], own: Iterable[tuple[str, Any]], head: bool
) -> list[Change]:
    """Other values of config.json: those that the source gives, then `own` of the architecture, then those
    that publishers have used."""
    planned = plan.config if plan is not None and plan.direction == "to-hf" else {}
    values: list[tuple[str, Any]] = [
        (k, v.value) for k, v in planned.items() if k not in WITHOUT_EFFECT and config.get(k) != v.value
    ]
    several = dict(values)
    values += own
    base, theta = rope_theta(config)
    values += [(k, v) for k in EPS_KEYS if k in config for v in (1e-5, 1e-6, 1e-12)]
    values += [(k, v) for k in GELU_KEYS if (v := OTHER_GELU.get(str(config.get(k))))]
    if head:
        values += [("tie_word_embeddings", True), ("tie_word_embeddings", False)]
    else:
        values += [(base, v) for v in (1e4, 5e5, 1e6, 1e8, 1e9) if theta is not None]
        values += [("sliding_window", None), ("sliding_window", 4096)] if "sliding_window" in config else []
        values += [
            ("rope_scaling", v) for v in (None, _llama3(8.0), _llama3(32.0)) if "rope_scaling" in config
        ]
    now = {**config, base: theta}
    made: dict[str, Change] = {}
    for key, v in values:
        if now.get(key) != v:
            name = _where(key, now.get(key), v)
            made.setdefault(name, Change(name, config={key: v}))
    singles = list(made.values())
    if len(several) > 1:
        singles.append(Change(" and ".join(c.name for c in singles[: len(several)]), config=several))
    return singles


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _where(key: str, now: Any, right: Any) -> str:
    """Two values in words: of two objects, those of their values that differ."""
    if not (isinstance(now, Mapping) and isinstance(right, Mapping)):
        return f"{key} {_show(now)} where it should be {_show(right)}"
    unlike = [k for k in dict.fromkeys([*right, *now]) if now.get(k) != right.get(k)]
    return ", ".join(_where(f"{key}.{k}", now.get(k), right.get(k)) for k in unlike)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"factor {value.get('factor')}"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
