"""The rules of the house in reference/, each shown to fail when it is broken: blocks are shared within a side
and never across. And what the rules are for: a mistake in a block of one side is caught by parity, and the
same mistake on both sides, which parity cannot see, by transformers."""

from __future__ import annotations
import __future__

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool import reference
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference import blocks, hf_blocks, hf_decoder, hf_transformer, transformer
from ckpt_tool.reference.phases import Phase, outputs, run, trunk
from ckpt_tool.verify.sides import Side, converted_side, original_side
from ckpt_tool.verify.subject import opened
from tests import packed_models, published_models

pytestmark = pytest.mark.usefixtures("one_thread")

Written = Callable[[str], Path]
ROOM = Path(__file__).parents[1] / "reference"
# Of neither side: what a pass is made of, and the losses that the outputs of both are put into.
SHARED = {"__init__", "phases", "losses"}


# --- the rules --------------------------------------------------------------------------------------------


def side_of(stem: str) -> str | None:
    if stem in SHARED:
        return None
    return "hf" if stem.startswith("hf_") else "original"


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def foreign_imports(stem: str, tree: ast.Module) -> Iterator[str]:
    """Modules beyond torch, the standard library and the own side."""
    own = "ckpt_tool.reference"
    stems = {file.stem for file in ROOM.glob("*.py")}
    for name in imported(tree):
        top = name.split(".")[0]
        if name.startswith(own):
            module = name.removeprefix(own + ".").split(".")[0]
            if module in stems and side_of(module) not in (None, side_of(stem)):
                which = "one side" if side_of(stem) is None else "the other side"
                yield f"{stem} imports {module}, which is of {which}"
        elif top not in sys.stdlib_module_names and top != "torch":
            yield f"{stem} imports {name}"


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def bodies(tree: ast.Module) -> dict[str, str]:
    """The text of each function of more than two statements without names, docstring and annotations: dumped
    statements by the function's name."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if sum(isinstance(n, ast.stmt) for s in body for n in ast.walk(s)) > 2:
            found[node.name] = "\n".join(map(ast.dump, body))
    return found


def shared_across(trees: Mapping[str, ast.Module]) -> list[str]:
    """Functions of more than two statements whose statements are the same on both sides, whatever their
    names, but for how a class or a pass begins: `phases` and `forward` state the protocol."""
    seen: dict[str, str] = {}
    for stem, tree in trees.items():
        if side_of(stem) == "original":
            seen |= {body: f"{stem}.{name}" for name, body in bodies(tree).items()}
    return [
        f"{stem}.{name} is {seen[body]}"
        for stem, tree in trees.items()
        if side_of(stem) == "hf"
        for name, body in bodies(tree).items()
        if body in seen and name not in ("phases", "forward")
    ]


def long_functions(stem: str, tree: ast.Module, most: int = 60) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= most:
            yield f"{stem}.{node.name} has more than {most} lines"


def broken_rules(room: Path) -> list[str]:
    trees = {f.stem: parsed(f.read_text(encoding="utf-8")) for f in sorted(room.glob("*.py"))}
    assert len(trees) > 20
    each = (rule(stem, tree) for stem, tree in trees.items() for rule in (foreign_imports, long_functions))
    return [*(text for texts in each for text in texts), *shared_across(trees)]


def test_the_rules_hold() -> None:
    assert broken_rules(ROOM) == []


WAYS_TO_BREAK = {
    "import-across": (
        "hf_blocks.py",
        "import torch\n",
        "import torch\nfrom ckpt_tool.reference.blocks import wide\n",
        "hf_blocks imports blocks, which is of the other side",
    ),
    "import-across-by-package": (
        "decoder.py",
        "import torch\n",
        "import torch\nfrom ckpt_tool.reference import hf_rope\n",
        "decoder imports hf_rope, which is of the other side",
    ),
    "protocol-knows-a-side": (
        "phases.py",
        "from torch import Tensor\n",
        "from torch import Tensor\nfrom ckpt_tool.reference import blocks\n",
        "phases imports blocks, which is of one side",
    ),
    "import-of-a-library": (
        "opt.py",
        "import torch\n",
        "import torch\nimport transformers\n",
        "opt imports transformers",
    ),
    "a-copy-under-another-name": (
        "hf_blocks.py",
        "def split_heads(",
        inspect.getsource(blocks.words).replace("def words", "def looked_up") + "\n\ndef split_heads(",
        "hf_blocks.looked_up is blocks.words",
    ),
    "a-function-too-long": (
        "blocks.py",
        "def wide(",
        "def endless(x: Tensor) -> Tensor:\n" + "    x = x + 1\n" * 60 + "    return x\n\n\ndef wide(",
        "blocks.endless has more than 60 lines",
    ),
}


@pytest.mark.parametrize("name", WAYS_TO_BREAK)
def test_a_broken_rule_is_found(name: str, tmp_path: Path) -> None:
    file, old, new, said = WAYS_TO_BREAK[name]
    for source in ROOM.glob("*.py"):
        (tmp_path / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert broken_rules(tmp_path) == [said]


# --- the protocol -----------------------------------------------------------------------------------------


def test_phases_carry_any_tree_and_may_change_the_length() -> None:
    """Two streams, one of which is pooled to a quarter on its way and is drawn out again, and a cache."""

    def embed(ids: Tensor) -> dict[str, Any]:
        return {"words": ids.double(), "entities": (ids[:, :2].double(), []), "seen": []}

    def shorten(x: dict[str, Any]) -> dict[str, Any]:
        pooled = x["words"].unflatten(1, (-1, 4)).mean(-1)  # type: ignore[no-untyped-call]
        return {**x, "words": pooled, "seen": [*x["seen"], x["words"].shape[1]]}

    def lengthen(x: dict[str, Any]) -> dict[str, Any]:
        return {**x, "words": x["words"].repeat_interleave(4, 1), "seen": [*x["seen"], x["words"].shape[1]]}

    phases = [
        Phase("embed", "embed", None, embed),
        Phase("layer 0", "layer", 0, shorten),
        Phase("layer 1", "layer", 1, lengthen),
        Phase("head", "head", None, lambda x: x["words"] + x["entities"][0].sum()),
        Phase("lengths", "head", None, lambda x: x["seen"]),
    ]
    ids = torch.arange(8)[None]
    assert trunk(phases, ids)["words"].tolist() == [[1.5] * 4 + [5.5] * 4]
    assert run(phases, ids).tolist() == [[2.5] * 4 + [6.5] * 4]
    assert outputs(phases, ids)["lengths"] == [8, 2]


def test_an_input_that_no_phase_takes_is_refused() -> None:
    reading = reference.converted("LlamaForCausalLM")
    config = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    c = reading.Config.from_hf(config)
    with pytest.raises(TypeError, match="expected no inputs token_types"):
        reading.phases([{}], c, {"token_types": torch.ones(1, 2)})


def test_every_reading_has_its_phases_in_order(conversions: Written, originals: Written) -> None:
    for variant in ("llama-2-70b", "bert-ngc-cased"):
        with opened(conversions(variant), originals(variant), VARIANTS[variant].settings) as subject:
            for side in sides_of(subject):
                phases = side.module.phases(side.ranks, side.config)
                layers = [p.index for p in phases if p.kind == "layer"]
                assert layers == list(range(side.config.n_layers))
                assert [p.name for p in phases if p.kind != "layer"][:2] == ["embed", "head"]


def test_readings_are_found_by_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose decoder is Mistral's but for its theta, as two files that nobody lists."""
    assert {"llama", "megatron-bert", "opt"} <= set(reference.families())
    assert {"MegatronBertForMaskedLM", "GPTJForCausalLM"} <= set(reference.architectures())
    assert not {"blocks", "decoder", "megatron", "rope"} & set(reference.families())
    ours = (ROOM / "mistral.py").read_text(encoding="utf-8").replace("1e4 if", "2e4 if")
    theirs = (ROOM / "hf_mistral.py").read_text(encoding="utf-8")
    (tmp_path / "zephyr_one.py").write_text(ours, encoding="utf-8")
    (tmp_path / "hf_zephyr.py").write_text(theirs.replace("Mistral{end}", "Zephyr{end}"), encoding="utf-8")
    monkeypatch.setattr(reference, "__path__", [*reference.__path__, str(tmp_path)])
    try:
        assert "zephyr-one" in reference.families() and "ZephyrForCausalLM" in reference.architectures()
        params = {"dim": 4, "n_layers": 1, "n_heads": 1, "norm_eps": 1e-5, "sliding_window": 7}
        shapes = {f"layers.0.attention.{n}.weight": (4, 4) for n in ("wq", "wk")}
        found = reference.original("zephyr-one").Config.from_original(params, shapes, 1, {})
        assert (found.rope_theta, found.windows) == (2e4, (7,))
        assert reference.converted("ZephyrForCausalLM").__name__ == "ckpt_tool.reference.hf_zephyr"
    finally:
        for stem in ("zephyr_one", "hf_zephyr"):
            sys.modules.pop(f"ckpt_tool.reference.{stem}", None)
            vars(reference).pop(stem, None)


def test_a_reading_says_its_config_alone_or_has_phases_of_its_own() -> None:
    """With less than its Config it has what its engine has; one whose pass is another keeps it."""
    for name in reference.families():
        module = import_module(f"ckpt_tool.reference.{name.replace('-', '_')}")
        whole = reference.original(name)
        own = [f for f in reference.PASSES if hasattr(module, f)]
        assert own == [] or "phases" in own, f"{name} has {own} and not what calls them"
        assert whole is module if own else whole.Config is module.Config
        assert all(callable(getattr(whole, f)) for f in ("phases", "forward"))
    assert reference.converted("Qwen3ForCausalLM").phases is hf_decoder.phases
    assert reference.converted("Qwen3ForCausalLM").HEADS is hf_decoder.HEADS


# --- mutants ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """The same mistake on both sides of a variant, or of a case of published_models: (function, text, other
    text), the function by module and name. One that only the original can make, as only it has ranks and
    fused tensors, has no `hf`."""

    variant: str
    original: tuple[str, str, str]
    hf: tuple[str, str, str] | None
    more: tuple[tuple[str, str, str], ...] = ()  # what it takes besides on the hf side
    alike: bool = True  # both sides then compute the same; they do not round in the same places


CHOSEN = ".softmax(-1).gather(1, chosen)"  # shares of the chosen experts out of those of all
MUTANTS = {
    "rms_norm: epsilon": Mutant(
        "mistral-7b-v0.1",
        ("blocks.rms_norm", "+ eps", "+ 10 * eps"),
        ("hf_blocks.rms_norm", "+ eps", "+ 10 * eps"),
    ),
    "layer_norm: epsilon": Mutant(
        "gpt2-2019-tp2",
        ("blocks.layer_norm", "+ eps", "+ 10 * eps"),
        ("hf_blocks.layer_norm", ", eps)", ", 10 * eps)"),
    ),
    "affine and linear: bias forgotten": Mutant(
        "codegen-350m-mono",
        ("blocks.affine", "if biased", "if False"),
        ("hf_blocks.linear", 'w[stem + "bias"] if bias else None', "None"),
    ),
    "affine and conv1d: bias forgotten": Mutant(
        "gpt2-2019-tp2",
        (
            "transformer.feed_forward",
            'activate(affine(x, w, p + c.names["fc1"])',
            'activate(x @ w[p + c.names["fc1"] + "weight"].T',
        ),
        (
            "hf_transformer.feed_forward",
            'project(x, w, p + c.names["fc1"], c)',
            'x @ w[p + c.names["fc1"] + "weight"]',
        ),
    ),
    "frequencies": Mutant(
        "mistral-7b-v0.1",
        ("rope.turns", "theta ** (even / width)", "theta ** ((even + 1) / width)"),
        ("hf_rope.rotation", "theta ** (steps / width)", "theta ** ((steps + 1) / width)"),
    ),
    "frequencies: stretched by another factor": Mutant(
        "llama-3.1-8b",
        ("rope.stretch", "torch.lerp(frequencies / s.factor", "torch.lerp(frequencies / (2 * s.factor)"),
        ("hf_rope.stretch", "(frequencies / s.factor)\n", "(frequencies / (2 * s.factor))\n"),
    ),
    "queries that grow: without steps": Mutant(
        "ministral3-3b",
        ("blocks.with_distance", "torch.floor(wide(positions) / length)", "wide(positions) / length"),
        ("hf_blocks.position_scaled", "torch.floor(positions / trained)", "positions / trained"),
    ),
    "queries that grow: keys as well": Mutant(
        "ministral3-3b",
        (
            "decoder.attention",
            "q = with_distance(q, places(x, ahead, positions), *c.far)",
            "q, k = (with_distance(y, places(x, ahead, positions), *c.far) for y in (q, k))",
        ),
        (
            "hf_decoder.attention",
            "q = position_scaled(q, position_ids(x, ahead, positions), *c.growth)",
            "q, k = (position_scaled(y, position_ids(x, ahead, positions), *c.growth) for y in (q, k))",
        ),
    ),
    "rotary of neighbours, rotate_half: turned the other way": Mutant(
        "llama-2-7b",
        ("blocks.rotate_neighbours", "pairs * turned[:, None]", "pairs * turned[:, None].conj()"),
        ("hf_blocks.rotate_half", "[-b, a]", "[b, -a]"),
    ),
    "rotary of halves, rotate_half: turned the other way": Mutant(
        "qwen2-0.5b",
        ("blocks.rotate_halves", "* turned[:, None]", "* turned[:, None].conj()"),
        ("hf_blocks.rotate_half", "[-b, a]", "[b, -a]"),
    ),
    "rotary of neighbours on both sides: turned the other way": Mutant(
        "codegen-350m-mono",
        ("blocks.rotate_neighbours", "pairs * turned[:, None]", "pairs * turned[:, None].conj()"),
        (
            "hf_blocks.rotate_neighbours",
            "a * cos - b * sin, b * cos + a * sin",
            "a * cos + b * sin, b * cos - a * sin",
        ),
    ),
    "window: one key more": Mutant(
        "mistral-7b-v0.1",
        ("blocks.visible", "back < window", "back <= window"),
        ("hf_blocks.grouped_attention", "triu(own + 1 - window)", "triu(own - window)"),
    ),
    "keys of some queries: the last one left out": Mutant(
        "llama-2-7b", ("blocks.reached", "before + last)", "before + last - 1)"), None
    ),
    "what comes later is seen: decoder": Mutant(
        "llama-2-7b",
        ("blocks.visible", "(back >= 0) if", "(back >= -1) if"),
        ("hf_blocks.grouped_attention", ".tril(own)", ".tril(own + 1)"),
    ),
    "what comes later is seen: gpt-2": Mutant(
        "gpt2-2019-tp2",
        ("blocks.visible", "(back >= 0) if", "(back >= -1) if"),
        ("hf_blocks.unseen", ".triu(offset + 1)", ".triu(offset + 2)"),
    ),
    "padding is seen": Mutant(
        "bert-2019-tp2",
        ("megatron_bert.layer", "if mask is not None:", "if False:"),
        ("hf_blocks.unseen", "mask is None", "True"),
    ),
    "weigh: weights squared": Mutant(
        "opt-13b",
        ("blocks.weigh", ".softmax(-1)", ".softmax(-1).square()"),
        ("hf_blocks.weigh", ".softmax(-1)", ".softmax(-1).square()"),
    ),
    "products: not scaled by the root": Mutant(
        "llama-2-7b",
        ("decoder.attention", "/ math.sqrt(c.query_scalar or c.head_dim)", "/ c.head_dim"),
        ("hf_blocks.grouped_attention", "* (scalar or H) ** -0.5", "/ H"),
    ),
    "products: queries and keys exchanged": Mutant(
        "codegen-350m-mono",
        ("blocks.products", '"bqnh,bknh->bnqk", q, k', '"bqnh,bknh->bnqk", k, q'),
        ("hf_transformer.scores", "q @ k.transpose(2, 3)", "k @ q.transpose(2, 3)"),
    ),
    "transformer: scores not scaled by the root": Mutant(
        "gpt2-2019-tp2",
        ("transformer.attention", "q.shape[-1] ** 0.5", "q.shape[-1]"),
        ("hf_transformer.scores", "q.shape[-1], -0.5", "q.shape[-1], -1"),
    ),
    "transformer: positions counted from the end": Mutant(
        "gpt2-2019-tp2",
        ("transformer.embed", '"weight"][positions]', '"weight"][positions.flip(-1)]'),
        ("hf_gpt2.embed", 'wpe.weight"][positions]', 'wpe.weight"][positions.flip(-1)]'),
    ),
    "transformer: epsilon": Mutant(
        "bert-2019-tp2",
        ("transformer.norm", "c.norm_eps", "10 * c.norm_eps"),
        ("hf_transformer.norm", "c.norm_eps", "10 * c.norm_eps"),
    ),
    "transformer: no second norm where norms come after": Mutant(
        "opt-350m",
        ("transformer.transformed", "return x if c.pre_norm else norm(", "return x if True else norm("),
        (
            "hf_transformer.layer",
            'return norm(x + feed_forward(x, w, p, c), w, p + n["norm_2"], c)',
            "return x + feed_forward(x, w, p, c)",
        ),
    ),
    "positions of opt: a row early": Mutant(
        "opt-13b",
        ("opt.embed", "* real + PAD", "* real"),
        ("hf_opt.embed", "positions + OFFSET", "positions + OFFSET - 1"),
    ),
    "grouped queries: dealt out the other way": Mutant(
        "mistral-7b-v0.1",
        (
            "decoder.attention",
            "y.repeat_interleave(q.shape[2] // y.shape[2], dim=2)",
            "y[:, :, torch.arange(q.shape[2]) % y.shape[2]]",
        ),
        ("hf_blocks.grouped_attention", "q.view(B, K, -1, T, H)", "q.view(B, -1, K, T, H).transpose(1, 2)"),
        (("hf_blocks.grouped_attention", "->bqkgh", "->bqgkh"),),
    ),
    "split_heads: channels before heads": Mutant(
        "qwen2-0.5b",
        ("decoder.project", "-1, c.head_dim)", "c.head_dim, -1).mT"),
        ("hf_blocks.split_heads", "x.view(*x.shape[:2], n, -1)", "x.view(*x.shape[:2], -1, n).mT"),
    ),
    "split_fused: version 0, query and key exchanged": Mutant(
        "bert-2019-tp2",
        ("blocks.split_fused", "q, k, v = x.view(B, T, 3,", "k, q, v = x.view(B, T, 3,"),
        ("hf_transformer.apart", '("query", "key", "value")', '("key", "query", "value")'),
    ),
    "split_fused: metaseq's keys and values exchanged": Mutant(
        "opt-13b", ("blocks.split_fused", "k, v, q = x.view(B, T, 3,", "v, k, q = x.view(B, T, 3,"), None
    ),
    "split_fused: version 1 read as 2": Mutant(
        "gpt2-v1-bare",
        ("blocks.split_fused", "n_heads, -1, 3).unbind(4)", "n_heads, 3, -1).unbind(3)"),
        None,
    ),
    "split_fused: a group's key and value exchanged": Mutant(
        "qwen2-mcore",
        (
            "blocks.split_fused",
            "groups[..., M, :], groups[..., M + 1, :]",
            "groups[..., M + 1, :], groups[..., M, :]",
        ),
        None,
    ),
    "activate: erf where it is tanh": Mutant(
        "gpt2-2019-tp2",
        ("blocks.activate", 'name == "erf"', 'name != "relu"'),
        ("hf_blocks.activate", "approximate=name", 'approximate="none"'),
    ),
    "activate: relu that leaks": Mutant(
        "opt-13b",
        ("blocks.activate", "clamp(min=0)", "clamp(min=-0.01)"),
        ("hf_blocks.activate", '"relu": F.relu', '"relu": lambda y: y.clamp(min=-0.01)'),
    ),
    "gated: gate and up exchanged": Mutant(
        "mistral-7b-v0.1",
        ("blocks.gated", "activate(gate, name) * up", "activate(up, name) * gate"),
        (
            "hf_blocks.gated",
            "activate(F.linear(rows, w[gate]), activation) * F.linear(rows, w[up])",
            "activate(F.linear(rows, w[up]), activation) * F.linear(rows, w[gate])",
        ),
    ),
    "activate: a bent silu": Mutant(
        "mistral-7b-v0.1",
        ("blocks.activate", "torch.sigmoid(y)", "torch.sigmoid(1.1 * y)"),
        ("hf_blocks.activate", '"silu": F.silu', '"silu": lambda y: y * torch.sigmoid(1.1 * y)'),
    ),
    "activate: tanh where it is erf": Mutant(
        "gpt-neox",
        ("blocks.activate", 'name == "erf"', "False"),
        ("hf_blocks.activate", "approximate=name", 'approximate="tanh"'),
    ),
    "rms_norm: what is stored is taken for the weight itself": Mutant(
        "gemma2",
        ("blocks.rms_norm", "(y + y * wide(weight))", "(y * wide(weight))"),
        ("hf_blocks.rms_norm", "(1.0 + wide(weight))", "wide(weight)"),
    ),
    "capped, softcap: cut off": Mutant(
        "gemma2",
        ("blocks.capped", "cap * torch.tanh(x / cap)", "x.clamp(-cap, cap)"),
        ("hf_blocks.softcap", "torch.tanh(x / cap) * cap", "x.clamp(-cap, cap)"),
    ),
    "scores not capped": Mutant(
        "gemma2",
        ("decoder.attention", "c.score_cap", "None"),
        ("hf_decoder.attention", "c.score_cap", "None"),
    ),
    "logits not capped": Mutant(
        "gemma2", ("decoder.head", "c.logit_cap", "None"), ("hf_decoder.lm_logits", "c.logit_cap", "None")
    ),
    "scores scaled by the width of a head": Mutant(
        "gemma2",
        ("decoder.attention", "c.query_scalar or c.head_dim", "c.head_dim"),
        ("hf_decoder.attention", "c.scalar", "None"),
    ),
    "words not scaled": Mutant(
        "gemma2",
        ("decoder.embed", "c.word_scale == 1", "True"),
        ("hf_decoder.embed", "if c.scaled_words", "if False"),
    ),
    "windows in the other layers": Mutant(
        "gemma2",
        ("decoder.attention", "c.windows[place[0]]", "c.windows[place[0] - 1]"),
        ("hf_decoder.layer", "c.windows[i]", "c.windows[i - 1]"),
    ),
    "attention not normalised": Mutant(
        "gemma2",
        ("decoder.layer", "if n.after[0]", "if False"),
        ("hf_decoder.layer", "if n.after[0]", "if False"),
    ),
    "feed-forward not normalised": Mutant(
        "gemma2",
        ("decoder.layer", "if n.after[1]", "if False"),
        ("hf_decoder.layer", "if n.after[1]", "if False"),
    ),
    "norms of heads forgotten": Mutant(
        "qwen3",
        ("decoder.attention", "if c.head_norms", "if False"),
        ("hf_decoder.attention", "if c.head_norms", "if False"),
    ),
    "rotate_halves, rotate: the last channels of a head": Mutant(
        "gpt-neox",
        ("blocks.rotate_halves", "y, R = wide(x)", "y, R = wide(x).flip(-1)"),
        ("hf_blocks.rotate", "    R =", "    x = x.flip(-1)\n    R ="),
    ),
    "side by side: in turn": Mutant(
        "gpt-neox",
        ("decoder.layer", "x if c.parallel else attended", "attended"),
        ("hf_decoder.layer", "x if c.parallel else attended", "attended"),
    ),
    "fused for each head: key and value exchanged": Mutant(
        "gpt-neox",
        ("decoder.attention", "q, k, v = project", "q, v, k = project"),
        ("hf_decoder.attention", "q, k, v = project", "q, v, k = project"),
    ),
    "fused for each head: bias forgotten": Mutant(
        "gpt-neox",
        ("decoder.project", '"qkv" in c.biased', "False"),
        ("hf_decoder.project", '"qkv" in c.biased', "False"),
    ),
    "units without gates: biases forgotten": Mutant(
        "gpt-neox",
        ("decoder.feed_forward", '"units" in c.biased', "False"),
        ("hf_decoder.feed_forward", '"units" in c.biased', "False"),
    ),
    "layer norms: the mean left in": Mutant(
        "gpt-neox",
        ("decoder.norm", "if c.layer_norms", "if False"),
        ("hf_decoder.norm", "if c.layer_norms", "if False"),
    ),
    "route: one expert more": Mutant(
        "mixtral-a",
        ("blocks.route", ", top)", ", top + 1)"),
        ("hf_blocks.route", ".topk(top)", ".topk(top + 1)"),
    ),
    "mixture: shares forgotten": Mutant(
        "mixtral-a",
        ("blocks.mixture", "share[rows, place, None] * ", ""),
        ("hf_blocks.mixture", " * share[rows, place, None]", ""),
    ),
    "words: one row early": Mutant(
        "llama-3-70b",
        ("blocks.words", "parts, first = [], 0", "ids, parts, first = ids - (ids > 5).long(), [], 0"),
        ("hf_decoder.embed", "F.embedding(ids,", "F.embedding(ids - (ids > 5).long(),"),
    ),
    "words: the first row of a rank counted as the last of another": Mutant(
        "llama-3-70b", ("blocks.words", "first += len(table)", "first += len(table) - 1"), None
    ),
    "join_words: ranks in another order": Mutant(
        "llama-3-70b", ("blocks.join_words", "list(parts)", "list(parts)[::-1]"), None
    ),
    "all_reduce: not all ranks": Mutant(
        "llama-2-70b", ("blocks.all_reduce", "parts)", "list(parts)[:-1])"), None
    ),
    "wide: rounded to sixteen bits": Mutant(
        "llama-2-7b",
        ("blocks.wide", "return x.to(", "return x.bfloat16().to("),
        ("hf_blocks.wide", "return x.to(", "return x.bfloat16().to("),
        alike=False,
    ),
    "side by side: feed-forward of what was not normalised": Mutant(
        "codegen-350m-mono",
        ("codegen.layer", "feed_forward(y, w", "feed_forward(x, w"),
        ("hf_transformer.layer", "attended + feed_forward(y, w", "attended + feed_forward(x, w"),
    ),
    "part of each head: two channels fewer turned": Mutant(
        "codegen-350m-mono",
        ("codegen.attention", "THETA, c.rotary_dim", "THETA, c.rotary_dim - 2"),
        ("hf_transformer.attention", "c.turned, tables", "c.turned - 2, tables"),
    ),
    "fused in blocks: keys and values exchanged": Mutant(
        "codegen-350m-mono",
        ("codegen.core", "q, v, k = (", "q, k, v = ("),
        ("hf_transformer.fused", 'in "qkv"', 'in "qvk"'),
    ),
    "output without its bias": Mutant(
        "codegen-350m-mono",
        ("codegen.head", '"lm_head.")', '"lm_head.", False)'),
        ("hf_transformer.head", "output, c.parallel", "output, False"),
    ),
    "sinks: a head leaves nothing to its own": Mutant(
        "gpt-oss-20b",
        ("gpt_oss.weigh", "scores - all_of_it", "scores - scores.logsumexp(-1, keepdim=True)"),
        ("hf_gpt_oss.with_sinks", "scores.softmax(-1)[..., :-1]", "scores[..., :-1].softmax(-1)"),
    ),
    "units: gates bounded below as well": Mutant(
        "gpt-oss-120b",
        ("gpt_oss.bent", "gate.clamp(max=limit)", "gate.clamp(-limit, limit)"),
        ("hf_gpt_oss.one_expert", "gate.clamp(max=c.limit)", "gate.clamp(-c.limit, c.limit)"),
    ),
    "units: not one more": Mutant(
        "gpt-oss-120b",
        ("gpt_oss.bent", "(up + 1)", "up"),
        ("hf_gpt_oss.one_expert", " + 1) * opened", ") * opened"),
    ),
    "units: gates, then ups": Mutant(
        "gpt-oss-20b",
        ("gpt_oss.bent", ".view(len(units), -1, 2).unbind(-1)", ".chunk(2, dim=-1)"),
        ("hf_gpt_oss.one_expert", "gate_up[..., ::2], gate_up[..., 1::2]", "gate_up.chunk(2, dim=-1)"),
    ),
    "experts: a softmax over all of them": Mutant(
        "gpt-oss-20b",
        ("gpt_oss.route", "wide(logits).softmax(-1)", f'affine(tokens, w, p + "gate."){CHOSEN}'),
        ("hf_gpt_oss.mixture", "F.softmax(wide(best), dim=-1)", f'linear(tokens, w, p + "router."){CHOSEN}'),
    ),
    "MXFP4: the higher half of a byte first": Mutant(
        "gpt-oss-20b",
        ("gpt_oss.matrix", "[codes & 15, codes >> 4]", "[codes >> 4, codes & 15]"),
        ("hf_gpt_oss.numbers", "    out[..., 0", "    blocks = blocks >> 4 | blocks << 4\n    out[..., 0"),
    ),
    "MXFP4: exponents of the block before": Mutant(
        "gpt-oss-20b",
        ("gpt_oss.matrix", "scales.int()[..., None]", "scales.roll(1, -1).int()[..., None]"),
        ("hf_gpt_oss.numbers", "[e].unsqueeze(-1)", "[e].roll(1, -1).unsqueeze(-1)"),
    ),
    "windows in layers 1, 3, ...": Mutant(
        "gpt-oss-120b",
        ("gpt_oss.attention", "window=c.windows[i]", "window=c.windows[i - 1]"),
        ("hf_gpt_oss.layer", "c.windows[i]", "c.windows[i - 1]"),
    ),
    "norms in one dtype: another epsilon": Mutant(
        "gpt-oss-20b",
        ("gpt_oss.norm", "+ EPS", "+ 1e-3"),
        ("hf_gpt_oss.norm", "+ c.norm_eps", "+ 1e-3"),
    ),
    "no norm at the end": Mutant(
        "opt-13b",
        ("opt.head", "if c.pre_norm", "if False"),
        ("hf_transformer.finish", "if c.final_norm", "if False"),
    ),
}  # fmt: skip
# What reads config.json is tested in test_reference_config.py and test_meanings.py; the heads that parity
# does not run are judged in test_reference_megatron_heads.py and those of OPT and Qwen2.
NO_NUMBERS = {"complete", "only", "one_of", "span_logits", "of_last_token", "stems", "rooted", "in_turn"}
NO_NUMBERS |= {"own_heads"}  # which heads a class has
NO_NUMBERS |= {"traced"}  # whether a pass is written down as a graph, which test_onnx.py compares
# What is kept of earlier tokens is held against passes that keep nothing, mistakes in it too, in
# test_generation.py.
NO_NUMBERS |= {"before", "remembered", "recalled", "cached", "grown"}


def test_every_block_has_a_mutant() -> None:
    touched = {edit[0] for m in MUTANTS.values() for edit in (m.original, m.hf) if edit is not None}
    touched |= {"hf_blocks.conv1d", "hf_transformer.project"}  # where they stand in feed_forward
    for module in (blocks, hf_blocks, transformer, hf_transformer):
        stem = module.__name__.rpartition(".")[2]
        own = {
            n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
        }
        assert {f"{stem}.{name}" for name in own - NO_NUMBERS} <= touched


def plant(monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str, str], *more: tuple[str, str, str]) -> None:
    """Put an edited function in the place of the right one, in every module that knows it."""
    stem, _, name = edit[0].partition(".")
    module = sys.modules[f"ckpt_tool.reference.{stem}"]
    right = getattr(module, name)
    source = inspect.getsource(right)
    for place, old, new in (edit, *more):
        assert place == edit[0] and source.count(old) == 1, f"{place}: expected {old!r} once"
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    code = compile(
        source, f"{stem}.{name} with a mistake", "exec", flags=__future__.annotations.compiler_flag
    )
    exec(code, vars(module), made)
    for other in [m for n, m in sys.modules.items() if n.startswith("ckpt_tool.reference.")]:
        for known, value in list(vars(other).items()):
            if value is right:
                monkeypatch.setattr(other, known, made[name])


def sides_of(subject: Any) -> tuple[Side, Side]:
    return original_side(subject, torch.float32, "cpu"), converted_side(subject, torch.float32, "cpu")


def nmse(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    return ((expected - found).square().mean() / expected.var()).item()


BAR = 1e-10  # of the logits' NMSE in float32, which docs/tolerances.md promises


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    given: Mapping[str, Tensor]
    real: Tensor  # (B, T), which positions are compared


def batch(vocabulary: int, padded: bool) -> Batch:
    ids = torch.tensor([[(7 + 31 * k * k + 17 * k) % vocabulary for k in range(80)]])
    ids = torch.cat([ids, (ids + 3) % vocabulary])
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 50:] = 0
    given = {"mask": mask} if padded else {}
    return Batch(ids, given, mask.bool())


Published = Callable[[str], Path]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """`published(case)`: the folder of a model that is published as the library stores it."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("published")

    def folder(case: str) -> Path:
        if not (root / case).exists():
            published_models.written(case, root / case)
        return root / case

    return folder


@contextmanager
def compared(
    variant: str, conversions: Written, originals: Written, published: Published
) -> Iterator[tuple[Side, Side]]:
    if variant in published_models.CASES:
        yield published_sides(variant, published(variant))
    else:
        with opened(conversions(variant), originals(variant), VARIANTS[variant].settings) as subject:
            yield sides_of(subject)


def published_sides(case: str, folder: Path) -> tuple[Side, Side]:
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "model.safetensors")
    ours = reference.original(published_models.CASES[case]["family"])
    theirs = reference.converted(config["architectures"][0])
    c = ours.Config.from_original(config, {n: tuple(t.shape) for n, t in state.items()}, 1, {})
    return Side(ours, c, (), ranks=[state]), Side(theirs, theirs.Config.from_hf(config), (), config, [state])


@pytest.fixture(scope="module")
def judged(conversions: Written, published: Published) -> Callable[[str, Batch], Tensor]:
    """The logits of transformers for a variant, computed once."""
    transformers = pytest.importorskip("transformers")
    known: dict[str, Tensor] = {}

    def logits(variant: str, inputs: Batch) -> Tensor:
        if variant not in known:
            folder = published(variant) if variant in published_models.CASES else conversions(variant)
            (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
            if packed_models.packed(folder):
                model = packed_models.loaded(folder)
            else:
                model = getattr(transformers, architecture).from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="eager"
                )
            more = {"attention_mask": inputs.given["mask"]} if "mask" in inputs.given else {}
            with torch.no_grad():
                out = model(inputs.ids, **more)
            known[variant] = out.prediction_logits if "prediction_logits" in out else out.logits
        return known[variant]

    return logits


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_block_is_caught(
    name: str,
    conversions: Written,
    originals: Written,
    published: Published,
    judged: Callable[[str, Batch], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutant = MUTANTS[name]
    with compared(mutant.variant, conversions, originals, published) as (ours, theirs):
        inputs = batch(theirs.raw["vocab_size"], "mask" in ours.inputs)
        judge = judged(mutant.variant, inputs)[inputs.real]

        def logits(side: Side) -> Tensor:
            return side.forward(inputs.ids, inputs.given)[inputs.real]

        right = logits(ours), logits(theirs)
        assert all(nmse(judge, found) <= BAR for found in right) and nmse(*right) <= BAR
        with monkeypatch.context() as planted:
            plant(planted, mutant.original)
            wrong = logits(ours)
            assert nmse(wrong, right[1]) > BAR, "parity does not see it on the original side"
            assert nmse(judge, wrong) > BAR, "the judge does not see it"
        if mutant.hf is None:
            return
        with monkeypatch.context() as planted:
            plant(planted, mutant.hf, *mutant.more)
            also_wrong = logits(theirs)
            assert nmse(also_wrong, right[0]) > BAR, "parity does not see it on the Hugging Face side"
            assert nmse(judge, also_wrong) > BAR, "the judge does not see it"
        assert (nmse(wrong, also_wrong) <= BAR) == mutant.alike, "one mistake is the same on both sides"
        assert torch.equal(logits(ours), right[0]) and torch.equal(logits(theirs), right[1])
