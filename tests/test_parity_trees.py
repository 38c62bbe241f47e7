"""Parity walks any tree of tensors between two phases, and tells where the original's own pass cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tool.api import Options, convert
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference.phases import Phase, Tree, leaves, mapped, passes
from ckpt_tool.verify import compute, verify
from ckpt_tool.verify.logits import variances_of
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.parity import Parity, _both, lockstep
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.sides import Sample, Side
from ckpt_tool.verify.weights import Weights

Written = Callable[[str], Path]
WIDTH, WORDS, LENGTH = 6, 24, 8
NAMES = {"words": (WORDS, WIDTH), "0.weight": (WIDTH, WIDTH), "1.weight": (WIDTH, WIDTH), "pool": (3, WIDTH)}
PROMPTS = {
    "short": Prompt([[1, 2, 3, 4]], {}),
    "long": Prompt([[(5 * k + 3) % WORDS for k in range(LENGTH)]], {}),
    "padded": Prompt([[7, 8, 9, 10], [11, 12, 0, 0]], {"mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}),
}


# --- two made-up readings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streams:
    """Words (B, T, D), entities (B, 2, D), the rows (B, D) that a row of ids has one of, and a cache that
    begins empty."""

    words: Tensor
    entities: tuple[Tensor, Tensor]
    seen: list[Tensor] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True)
class Config:
    n_layers: int = 2
    mistake: str = ""

    @classmethod
    def from_hf(cls, config: Any) -> Config:
        return cls()


def mixed(x: Tensor, w: Any, i: int) -> Tensor:
    return torch.tanh(x @ w[f"{i}.weight"].T) + x


class TwoStreams:
    """Each layer sends the entities through its weights, and what the words say through the entities."""

    Config = Config

    @staticmethod
    def phases(ranks: Any, c: Config, inputs: Any = {}) -> list[Phase]:  # noqa: B006
        (w,) = ranks
        off = 1e-3

        def embed(ids: Tensor) -> Streams:
            words = w["words"][ids]
            return Streams(words, (words[:, :2], words.mean(1)))

        def layer(i: int) -> Callable[[Streams], Streams]:
            def run(x: Streams) -> Streams:
                entities, row = (mixed(y, w, i) for y in x.entities)
                entities = entities + off * (c.mistake == f"entities {i}")
                row = row + off * (c.mistake == f"row {i}")
                words = mixed(x.words, w, i) + entities.mean(1, keepdim=True)
                seen = [*x.seen, words.transpose(0, 1) + off * (c.mistake == f"cache {i}")]
                return Streams(words, (entities, row), seen, x.steps + 1 + (c.mistake == f"steps {i}"))

            return run

        heads = {"head": lambda x: x.words @ w["words"].T, "pooled": lambda x: x.entities[1] @ w["pool"].T}
        return [
            Phase("embed", "embed", None, embed),
            *(Phase(f"layer {i}", "layer", i, layer(i)) for i in range(c.n_layers)),
            *(Phase(name, "head", None, run) for name, run in heads.items()),
        ]


class OtherLengths:
    """The first layer pools each two positions into one, the second draws them out again."""

    Config = Config

    @staticmethod
    def phases(ranks: Any, c: Config, inputs: Any = {}) -> list[Phase]:  # noqa: B006
        (w,) = ranks

        def shorten(x: dict[str, Tensor]) -> dict[str, Tensor]:
            pairs = x["at"].view(len(x["at"]), -1, 2, WIDTH)
            short = pairs.mean(2) if c.mistake != "pooled" else pairs.amax(2)
            return {"first": x["at"], "at": mixed(short, w, 0)}

        def lengthen(x: dict[str, Tensor]) -> dict[str, Tensor]:
            long = x["at"].repeat_interleave(2, 1)
            return {"at": mixed(long if c.mistake != "not drawn out" else x["at"], w, 1) + x["first"][:, :1]}

        return [
            Phase("embed", "embed", None, lambda ids: {"at": w["words"][torch.cat([ids, ids], 1)]}),
            Phase("layer 0", "layer", 0, shorten),
            Phase("layer 1", "layer", 1, lengthen),
            Phase("head", "head", None, lambda x: x["at"][:, ::2] @ w["words"].T),
        ]


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., Parity]:
    """`compared(reading, mistake)`: parity of a reading with itself, in which the converted side makes that
    mistake."""
    seed = torch.Generator().manual_seed(3)
    save_file({n: torch.randn(s, generator=seed) for n, s in NAMES.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)

    def run(reading: Any, mistake: str = "") -> Parity:
        def side(c: Config) -> Side:
            weights = (Weights(checkpoint, {t.name: t for t in checkpoint}, torch.float32, "cpu"),)
            return Side(reading, c, weights, {"vocab_size": WORDS}, weights)

        subject: Any = SimpleNamespace(plan=None, source=None, config={}, packed=None)
        return lockstep(subject, side(Config()), side(Config(mistake=mistake)), PROMPTS)

    return run


# --- parity of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [TwoStreams, OtherLengths])
def test_trees_go_through_every_phase(reading: Any, compared: Callable[..., Parity]) -> None:
    found = compared(reading)
    assert [s.phase for s in found.steps][:4] == ["embed", 0, 1, "head"]
    assert all(s.holds and s.bar.noise.magnitude > 0 for s in found.steps)
    assert all(set(s.distances) >= set(PROMPTS) for s in found.steps)
    assert "every row" in found.steps[0].distances
    assert len(found.controls) >= 4 and all(p.caught for p in found.controls)
    assert all(x.holds for logits in found.logits.values() for x in logits.values())


@pytest.mark.parametrize(
    ("reading", "mistake", "phase"),
    [
        (TwoStreams, "entities 0", 0),
        (TwoStreams, "row 1", 1),
        (TwoStreams, "cache 0", 0),
        (TwoStreams, "steps 1", 1),
        (OtherLengths, "pooled", 0),
        (OtherLengths, "not drawn out", 1),
    ],
)
def test_a_mistake_in_one_part_of_a_tree_is_found_where_it_is(
    reading: Any, mistake: str, phase: int, compared: Callable[..., Parity]
) -> None:
    """Each is in what one phase gives beside or in its words, and nothing else of the phase is touched."""
    found = compared(reading, mistake)
    assert [s.phase for s in found.steps if not s.holds][0] == phase
    assert [d.phase for d in found.diagnoses][0] == phase


def test_a_sample_compares_every_tensor_and_what_is_none() -> None:
    def tree(words: float = 1.0, row: float = 2.0, at: int = 3) -> Tree:
        ones = torch.ones(2, 3, 4)
        return {
            "b": (words * ones.cumsum(1), [torch.arange(at)]),
            "a": Streams(ones, (ones, row * ones[:, 0])),
        }

    x = torch.zeros(2, 3, dtype=torch.long)
    wanted = tree()
    assert [tuple(t.shape) for t in leaves(wanted)] == [(2, 3, 4)] * 2 + [(2, 4), (2, 3, 4), (3,)]
    sample = Sample(x, wanted, variances=variances_of([wanted]))
    assert sample.variances == (None, None, 0.0, None, None) and sample.tokens == 3
    assert (sample.of(tree()).nmse, sample.of(tree()).magnitude) == (0.0, 3.0)
    off = sample.of(tree(words=1.5))
    assert (off.max_delta, off.worst) == (1.5, 2) and 0 < off.nmse < 2
    for other in (tree(row=2.5), tree(at=4), {"b": wanted["b"]}, list(wanted.values()), None):
        assert sample.of(other).nmse == float("inf")
    assert sample.of({**wanted, "a": mapped(lambda t: t.double().long(), wanted["a"])}).nmse == float("inf")
    assert Sample(x, {"steps": 1}).of({"steps": 1}).nmse == float("inf")  # nothing was compared
    with ReversedSums():
        assert sample.of(tree()).max_delta == 0


def test_encode_keeps_the_axes_of_choices_for_trees() -> None:
    forward, encode = passes(OtherLengths.phases)
    ranks = [{n: torch.eye(WORDS)[:, :WIDTH] if n == "words" else torch.eye(WIDTH) for n in NAMES}]
    ids = torch.arange(24).view(2, 3, 4)
    found = encode(ids, ranks, Config())
    assert found["at"].shape == (2, 3, 8, WIDTH)
    assert torch.equal(found["at"][1], encode(ids[1], ranks, Config())["at"])
    assert forward(ids[0], ranks, Config()).shape == (3, 4, WORDS)


# --- an original that does not fit together -------------------------------------------------------------


def cut(side: Side, name: str) -> None:
    """The tensor of that name with one row less, in the first rank."""
    weights = side.weights[0]
    info = weights.tensors[name]
    shape = (info.shape[0] - 1, *info.shape[1:])
    weights.tensors = {**weights.tensors, name: TensorInfo(name, info.dtype, shape, info.file)}


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("opt-13b", "model.decoder.layers.0.fc2.weight"),
        ("opt-13b", "model.decoder.layers.1.self_attn_layer_norm.weight"),
        ("opt-13b", "model.decoder.layer_norm.bias"),
        ("codegen-350m-mono", "transformer.h.0.attn.out_proj.weight"),
        ("codegen-350m-mono", "lm_head.weight"),
        ("gpt2-v2-tp2", "model.language_model.transformer.layers.0.attention.query_key_value.weight"),
        ("bert-v2-tp2", "model.language_model.transformer.layers.2.mlp.dense_4h_to_h.weight"),
        ("bert-v2-tp2", "model.lm_head.dense.weight"),
    ],
)
def test_a_wrong_shape_in_the_original_is_told_and_raises_nothing_else(
    variant: str, name: str, originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = compute.original_side

    def wrong(*args: Any) -> Side:
        side = right(*args)
        cut(side, name)
        return side

    monkeypatch.setattr(compute, "original_side", wrong)
    settings = VARIANTS[variant].settings
    report = verify(conversions(variant), originals(variant), levels=("parity",), settings=settings)
    (found,) = (f for f in report.level("parity") if f.status != "note")
    assert (found.check, found.status) == ("lockstep", "undecided")
    assert found.message.startswith("the original's own pass cannot run: ")
    assert report.exit_code == 2


@pytest.mark.parametrize("made", [lambda x: x + 1, lambda x: (x, {"m": x[:, :1]}), lambda x: (x, x.sum(0))])
def test_two_inputs_in_one_pass_give_what_each_gives(made: Callable[[Tensor], Tree]) -> None:
    """Whatever a phase makes of one tensor: a tree, of which a part may be of no batch."""
    x, y = torch.arange(12.0).view(2, 1, 6)
    for found, wanted in zip(_both(made, x, y, {}), (made(x), made(y)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(wanted), strict=True))


def test_parity_of_a_model_of_two_lengths_runs(tmp_path: Path) -> None:
    """CANINE goes on with characters and molecules."""
    variant = VARIANTS["canine-s"]
    source = variant.write(tmp_path / "original")
    convert(source, tmp_path / "out", options=Options(settings=variant.settings))
    report = verify(tmp_path / "out", source, settings=variant.settings, levels="parity", mode="quick")
    assert [f.status for f in report.level("parity") if f.check == "lockstep"] == ["pass"]
