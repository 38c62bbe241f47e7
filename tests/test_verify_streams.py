"""Models of several streams: prompts with entities, stacks that change the length, lengths that a pass takes,
what an architecture's reading says of its own mistakes, and heads that give no logits."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.plan import Foretold
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.flaws import Folder, plant
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, mapped
from ckpt_tool.verify import library, other_release, verify
from ckpt_tool.verify.compute import Readings, _asked_of, _with_vocabulary, lengths_of
from ckpt_tool.verify.mistakes import to_plant, to_undo
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.parity import Parity, findings, lockstep
from ckpt_tool.verify.prompts import Lengths, Prompt, cut, positions, prompts_for, with_inputs
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.sides import Sample, Side, mask_of
from ckpt_tool.verify.weights import Weights
from tests import loaded

Written = Callable[[str], Path]
WIDTH, WORDS, NAMED = 6, 40, 12
SHAPES = {
    "words": (WORDS, WIDTH), "names": (NAMED, WIDTH), "places": (64, WIDTH), "first": (WIDTH, WIDTH),
    "layer.0.query": (WIDTH, WIDTH), "layer.0.gate": (4, WIDTH), "short": (WIDTH, WIDTH), "pool": (3, WIDTH),
}  # fmt: skip


# --- a made-up reading: words and entities, then a stack of half the length -----------------------------


@dataclass(frozen=True)
class Config:
    n_layers: int = 1
    scale: float = 2.0
    mistake: str = ""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        return cls(scale=config["scale"])


@dataclass(frozen=True)
class Streams:
    words: Tensor
    entities: Tensor | None


def inputs(ranks: Ranks, c: Config) -> tuple[str, ...]:
    return ("token_types", "mask", "entity_ids", "entity_mask", "entity_positions")


def fits(tokens: int, c: Config) -> int:
    return tokens - tokens % 2


def padding(tokens: int, longest: int, c: Config) -> int:
    return min(tokens, longest - 3)


def vocabulary(c: Config) -> int:
    return WORDS


def mistakes(names: tuple[str, ...], c: Config) -> dict[str, Any]:
    if "layer.0.gate" not in names:
        return {}

    def shifted(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"layer.0.gate": w["layer.0.gate"].roll(1, 0)}

    def back(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"layer.0.gate": w["layer.0.gate"].roll(-1, 0)}

    def negated(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"layer.0.query": -w["layer.0.query"]}

    return {"gate: rows one further": (shifted, back), "query: sign lost": negated}


def config_mistakes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {"scale of the other release": {"scale": 3.0}}


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    (w,), off = ranks, 1e-3

    def embed(ids: Tensor) -> Streams:
        words = w["words"][ids] + w["places"][torch.arange(ids.shape[1])]
        if "entity_ids" not in inputs:
            return Streams(words, None)
        at, known = inputs["entity_positions"], inputs["entity_positions"] >= 0
        mean = (w["places"][at.clamp(min=0)] * known[..., None]).sum(-2) / known.sum(-1, keepdim=True).clamp(
            1
        )
        return Streams(words, w["names"][inputs["entity_ids"]] + mean + off * (c.mistake == "entities"))

    def layer(x: Streams) -> Streams:
        whole = x.words if x.entities is None else torch.cat([x.words, x.entities], 1)
        mask = inputs.get("mask", torch.ones(x.words.shape[:2]))
        if x.entities is not None:
            mask = torch.cat([mask, inputs["entity_mask"]], 1)
        scores = (whole @ w["layer.0.query"] @ whole.mT * c.scale / 8).masked_fill(mask[:, None] == 0, -1e9)
        gate = torch.sigmoid(whole @ w["layer.0.gate"].T).repeat(1, 1, 2)[..., :WIDTH]
        y = whole + gate * (scores.softmax(-1) @ whole)
        T = x.words.shape[1]
        if c.mistake == "padding":
            y = y + off * (mask[..., None] == 0)
        return Streams(y[:, :T], None if x.entities is None else y[:, T:])

    def shorten(x: Streams) -> Streams:
        pairs = x.words.view(len(x.words), -1, 2, WIDTH).mean(2) @ w["short"]
        return Streams(pairs + off * (c.mistake == "short"), x.entities)

    def lengthen(x: Streams) -> Streams:
        return Streams(torch.tanh(x.words.repeat_interleave(2, 1) @ w["first"]), x.entities)

    made = [
        Phase("embed", "embed", None, embed),
        Phase("layer 0", "layer", 0, layer),
        Phase("shorten", "layer", None, shorten),
        Phase("lengthen", "layer", None, lengthen),
        Phase("head", "head", None, lambda x: x.words),
        Phase("pooler_output", "head", None, lambda x: x.words[:, 0] @ w["pool"].T),
    ]
    if "entity_ids" in inputs:
        made.append(Phase("entity_logits", "head", None, lambda x: x.entities @ w["names"].T))
    return made


READING: Any = SimpleNamespace(
    Config=Config, phases=phases, inputs=inputs, fits=fits, padding=padding, vocabulary=vocabulary,
    mistakes=mistakes, config_mistakes=config_mistakes,
)  # fmt: skip
RAW = {"entity_vocab_size": NAMED, "scale": 2.0, "type_vocab_size": 1, "pad_token_id": 1}
Compared = Callable[..., tuple[Parity, Side, Side, dict[str, Prompt]]]


@pytest.fixture
def sided(tmp_path: Path) -> Callable[..., Side]:
    seed = torch.Generator().manual_seed(5)
    save_file(
        {n: torch.randn(s, generator=seed) / 2 for n, s in SHAPES.items()}, tmp_path / "model.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path)

    def made(module: Any = READING, raw: Mapping[str, Any] = RAW, **config: Any) -> Side:
        weights = (Weights(checkpoint, {t.name: t for t in checkpoint}, torch.float32, "cpu"),)
        return Side(module, Config(**config), weights, raw, weights)

    return made


@pytest.fixture
def compared(sided: Callable[..., Side]) -> Compared:
    """`compared(mistake)`: parity of the reading with itself, in which the converted side makes a mistake."""

    def run(mistake: str = "", module: Any = READING) -> tuple[Parity, Side, Side, dict[str, Prompt]]:
        original, converted = sided(module), sided(module, mistake=mistake)
        lengths = lengths_of([original, converted])
        config = _with_vocabulary(RAW, [original, converted])
        rows = prompts_for(config, None, table=63, lengths=lengths)
        prompts = with_inputs(rows, original.inputs, config, lengths)
        subject: Any = SimpleNamespace(plan=None, source=None, config=RAW, packed=None)
        return lockstep(subject, original, converted, prompts), original, converted, prompts

    return run


# --- prompts --------------------------------------------------------------------------------------------


def test_entities_have_a_prompt_of_their_own_and_a_padded_one(compared: Compared) -> None:
    *_, prompts = compared()
    assert {"short", "entities", "padded"} <= prompts.keys() and "segments" not in prompts
    assert all(not p.given for name, p in prompts.items() if name not in ("entities", "padded"))
    one = prompts["entities"].given
    assert len(one["entity_ids"][0]) == 2 and "mask" not in one
    assert [sum(k >= 0 for k in mention) for mention in one["entity_positions"][0]] == [1, 3]
    both, given = prompts["padded"], prompts["padded"].given
    real = [sum(row) for row in given["mask"]]
    assert real[0] == len(both.ids[0]) > real[1] and both.ids[1][real[1] :] == [1] * (real[0] - real[1])
    assert all(1 not in row[:n] for row, n in zip(both.ids, real, strict=True))  # no token looks like padding
    assert given["entity_mask"] == [[1, 1, 1], [1, 0, 0]]
    for mentions, mask, n in zip(given["entity_positions"], given["entity_mask"], real, strict=True):
        for mention, kept in zip(mentions, mask, strict=True):
            assert max(mention) < n and (max(mention) >= 0) == bool(kept)
    assert len({len(given["entity_ids"][0]), len(given["entity_positions"][0][0]), real[0]}) == 3


def test_prompts_have_lengths_that_both_passes_take(sided: Callable[..., Side]) -> None:
    thirds: Any = SimpleNamespace(**{**vars(READING), "fits": lambda tokens, c: tokens - tokens % 3})
    lengths = lengths_of([sided(), sided(thirds)])
    assert [lengths.fits(n) for n in (5, 6, 13, 600)] == [0, 6, 12, 600]
    rows = prompts_for({"vocab_size": WORDS}, None, lengths=lengths)
    assert {len(row) % 6 for row in rows.values()} == {0} and "edges" not in rows
    (note,) = cut(rows, {"vocab_size": WORDS}, None)
    assert note.message.startswith("cut to lengths that the pass takes: ") and "edges 5 to 0" in note.message
    with pytest.raises(CkptToolError, match="found 7 \\(6 are the most below\\)"):
        prompts_for({"vocab_size": WORDS}, [[2] * 7], lengths=lengths)
    with pytest.raises(CkptToolError, match="no shorter one does either"):
        prompts_for({"vocab_size": WORDS}, [[2] * 5], lengths=lengths)


def test_no_prompt_that_fits_is_no_pass(sided: Callable[..., Side]) -> None:
    nothing: Any = SimpleNamespace(**{**vars(READING), "fits": lambda tokens, c: 0})
    side = sided(nothing)
    rows = prompts_for({"vocab_size": WORDS}, None, lengths=lengths_of([side]))
    prompts = with_inputs(rows, side.inputs, RAW)
    assert prompts == {}
    found = _asked_of(Readings(side, side, None), {"vocab_size": WORDS}, prompts)
    assert found.reason == ("skipped", "expected a prompt of a length that both passes take, found none")
    assert _asked_of(Readings(side, side, None), {"x": 1}, prompts).reason == (
        "fail", "expected vocab_size in config.json, found none: there are no prompts",
    )  # fmt: skip


def test_a_reading_chooses_how_far_a_row_is_padded(sided: Callable[..., Side]) -> None:
    rows = {"long": list(range(2, 40)), "other": list(range(2, 37))}
    padded = with_inputs(rows, ("mask",), {}, Lengths(padded=lambda tokens, longest: tokens - 5))["padded"]
    assert sum(padded.given["mask"][1]) == 20  # two thirds of 38 are 25
    assert "padded" not in with_inputs(rows, ("mask",), {}, Lengths(padded=lambda tokens, longest: 0))


def test_positions_of_every_kind_of_table() -> None:
    def side(name: str, *shape: int) -> Any:
        return [SimpleNamespace(name=name, shape=shape)]

    assert positions({}, side("bert/embeddings/position_embeddings", 77, 8)) == 77
    assert positions({}, side("char_position_embeddings.weight", 77, 8)) == 77
    assert positions({}, side("layers.0.move.rel_pos_bias.rel_pos_bias", 23)) == 12
    assert positions({"use_chunking": True}, side("layers.0.rel_pos_bias.rel_pos_bias", 23)) is None


# --- padding of every stream ----------------------------------------------------------------------------


def test_each_stream_has_its_own_mask() -> None:
    words = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    named = torch.tensor([[1, 1, 1], [1, 0, 0]])
    given = {"mask": words, "entity_mask": named}
    kept = {
        n: None if (m := mask_of(given, 2, n)) is None else m.sum(1).tolist() for n in (8, 3, 11, 4, 2, 7)
    }
    assert kept == {8: [8, 5], 3: [3, 1], 11: [11, 6], 4: [4, 3], 2: [2, 2], 7: None}
    assert mask_of({"mask": words}, 2, 3) is None  # 8 words are not three groups
    assert mask_of(given, 2, 4, grouped=False) is None and mask_of({}, 2, 8) is None
    y = torch.zeros(2, 3, 5)
    y[1, 1:] = 9.0
    assert Sample(words, torch.zeros(2, 3, 5), given).of(y).max_delta == 0
    y[1, 0] = 1.0
    assert Sample(words, torch.zeros(2, 3, 5), given).of(y).max_delta == 1


def test_streams_and_lengths_agree_and_padding_is_not_compared(compared: Compared) -> None:
    for mistake in ("", "padding"):
        result, original, converted, prompts = compared(mistake)
        assert [s.phase for s in result.steps] == [
            "embed", 0, "shorten", "lengthen", "head", "pooler_output", "entity_logits",
        ]  # fmt: skip
        assert all(s.holds for s in result.steps), [(s.phase, s.worst) for s in result.steps if not s.holds]
        assert set(result.steps[-1].distances) == {"entities", "padded"}
        assert {"every row", "every entity"} <= result.steps[0].distances.keys()
        assert all(p.caught for p in result.controls)
        found = findings(result, original, converted, prompts)
        assert [f.message for f in found if f.status not in ("pass", "note")] == []


@pytest.mark.parametrize(("mistake", "phase"), [("entities", "embed"), ("short", "shorten")])
def test_a_mistake_in_one_stream_is_found(mistake: str, phase: str, compared: Compared) -> None:
    result, *_ = compared(mistake)
    assert [s.phase for s in result.steps if not s.holds] == [phase]


def test_heads_without_logits_claim_no_tokens(compared: Compared) -> None:
    result, original, converted, prompts = compared()
    found = {f.where: f for f in findings(result, original, converted, prompts) if f.check == "logits"}
    assert found.keys() == {None, "pooler_output", "entity_logits"}
    hidden, named = found[None], found["entity_logits"]
    assert hidden.message.startswith("last hidden state of the whole pass: max |delta|")
    assert "top1" not in hidden.data and "top1" not in found["pooler_output"].data
    assert named.data["top1"] == 1.0 and named.status == hidden.status == "pass"
    tokens = {row[0]: row[1] for row in named.tables[0].rows}
    assert tokens == {"entities": 2, "padded": 4}  # two of the second row are padding


def test_what_no_prompt_has_is_said(sided: Callable[..., Side]) -> None:
    raw = {k: v for k, v in RAW.items() if k != "entity_vocab_size"}
    original, converted = sided(raw=raw), sided(raw=raw)
    config = _with_vocabulary(raw, [original, converted])
    lengths = lengths_of([original, converted])
    rows = prompts_for(config, None, table=62, lengths=lengths)
    prompts = with_inputs(rows, original.inputs, config, lengths)
    subject: Any = SimpleNamespace(plan=None, source=None, config=raw, packed=None)
    made = findings(lockstep(subject, original, converted, prompts), original, converted, prompts)
    assert any(f.check == "unseen" and "no prompt has entity_ids, entity_mask" in f.message for f in made)


# --- an architecture's own mistakes ---------------------------------------------------------------------


def test_own_mistakes_are_planted_where_they_act(compared: Compared) -> None:
    result, *_ = compared()
    planted = {(p.phase, p.name): p.caught for p in result.controls}
    assert planted[0, "gate: rows one further"] and planted[0, "query: sign lost"]
    assert planted[0, "scale of the other release"]
    assert ("head", "scale of the other release") not in planted  # it does not reach there


def test_own_mistakes_are_taken_back(sided: Callable[..., Side]) -> None:
    side = sided()
    shapes = {"layer.0.query": (WIDTH, WIDTH), "layer.0.gate": (4, WIDTH)}
    (w,) = side.ranks
    wrong = {c.name: c.tensors(w) for c in to_plant(0, None, shapes, side) if not c.config}
    for name in ("gate: rows one further", "query: sign lost"):
        spoiled = replace(side, ranks=({**w, **wrong[name]},))
        undo = next(c for c in to_undo(0, None, shapes, spoiled) if c.name == name)
        made = undo.tensors(spoiled.ranks[0])
        assert all(torch.equal(x, w[n]) for n, x in made.items())
    values = replace(side, raw={**RAW, "scale": 5.0})
    assert "scale 5 where it should be 3" in [c.name for c in to_undo(0, None, shapes, values)]


def test_the_noise_of_a_convolution_is_measured() -> None:
    seed = torch.Generator().manual_seed(2)
    x, w, b = (torch.randn(*s, generator=seed) for s in ((2, 64, 20), (32, 64, 4), (32,)))
    one = torch.nn.functional.conv1d(x, w, b, 4)
    with ReversedSums():
        other = torch.nn.functional.conv1d(x, w, b, stride=4)
    assert 0 < float((one - other).abs().max()) < 1e-4


OLDER = Path(__file__).parents[1] / ".judges" / "tf4.37"
JUDGED = "llama-2-7b"


# --- differences foretold in any phase ------------------------------------------------------------------


def bounded(x: Streams, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Streams:
    """Nothing may move but what is named: by 1 each, padding by nothing."""
    assert i == 0 and c.scale == 3.0
    words = torch.ones_like(x.words) if mask is None else torch.ones_like(x.words) * mask[..., None]
    return Streams(words, None if x.entities is None else torch.ones_like(x.entities))


@pytest.mark.parametrize(("factor", "status"), [(1.0, "pass"), (1e-3, "fail")])
def test_a_difference_foretold_in_a_layer_of_streams(
    factor: float, status: str, sided: Callable[..., Side]
) -> None:
    def bound(**asked: Any) -> Streams:
        return mapped(lambda t: t * factor, bounded(**asked))  # type: ignore[no-any-return]

    def named(x: Streams, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None) -> Streams:
        return bound(x=x, i=i, ranks=ranks, c=c, mask=mask)

    module: Any = SimpleNamespace(**{**vars(READING), "bounds": {"layer": named}})
    original, converted = sided(module), sided(module, {**RAW, "scale": 3.0}, scale=3.0)
    known: Any = Foretold("other-scale", "two scales", {"scale": 2.0}, (0,))  # type: ignore[arg-type]
    subject: Any = SimpleNamespace(
        plan=SimpleNamespace(foretold=[known]), source=None, config=RAW, packed=None
    )
    subject.plan.steps, subject.plan.config, subject.plan.direction = [], {}, "to-hf"
    lengths = lengths_of([original, converted])
    rows = prompts_for({**RAW, "vocab_size": WORDS}, None, table=62, lengths=lengths)
    prompts = with_inputs(rows, original.inputs, {**RAW, "vocab_size": WORDS}, lengths)
    result = lockstep(subject, original, converted, prompts)
    assert all(s.holds for s in result.steps)
    made = findings(result, original, converted, prompts, ["other-scale"])
    (found,) = (f for f in made if f.check == "foretold")
    assert (found.where, found.status) == ("layer 0", status), found.message
    assert found.bar == pytest.approx(factor) and 1e-3 < (found.measured or 0) < 1.0


# --- transformers of another environment ----------------------------------------------------------------


@pytest.fixture
def without_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed release has no class that any output is of."""
    monkeypatch.setattr(library, "installed", lambda: SimpleNamespace(__version__="9.9"))
    monkeypatch.delenv(library.VARIABLE, raising=False)


def against(out: Path, source: Path, elsewhere: Path | None) -> Report:
    return verify(out, source, levels=(), against="transformers", transformers_python=elsewhere)


def told(report: Report, check: str) -> Finding:
    (found,) = (f for f in report.level("transformers") if f.check == check)
    return found


@pytest.mark.skipif(not OLDER.is_dir(), reason="transformers 4.37.2 is not set up; `make test` does it")
def test_a_release_elsewhere_judges_what_the_installed_one_lacks(
    originals: Written, conversions: Written, without_the_class: None
) -> None:
    report = against(conversions(JUDGED), originals(JUDGED), Path(loaded.python("tf4.37")))
    assert (report.exit_code, told(report, "load").status) == (0, "pass")
    found = told(report, "logits")
    assert found.message.startswith("transformers 4.37.2, eager, against the original layout's reading")
    assert found.status == "pass" and 0 < found.data["nmse"] <= 1e-10


@pytest.mark.skipif(not OLDER.is_dir(), reason="transformers 4.37.2 is not set up; `make test` does it")
def test_a_release_that_the_variable_names_finds_differences(
    originals: Written, conversions: Written, tmp_path: Path,
    without_the_class: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(library.VARIABLE, str(OLDER))
    folder = Path(shutil.copytree(conversions(JUDGED), tmp_path / "out"))
    plant(folder, "norm-eps")
    report = against(folder, originals(JUDGED), None)
    found = told(report, "logits")
    assert found.message.startswith("transformers 4.37.2, eager, against the original layout's reading")
    assert (report.exit_code, found.status) == (1, "fail") and found.data["nmse"] > 1e-10


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (None, "transformers 9.9 has no LlamaForCausalLM; --transformers-python PATH (or CKPT_TOOL_"),
        ("none", "none cannot be started: No such file or directory; --transformers-python"),
        ("silent", "silent ended with exit code 3 and no answer (it said nothing); --transformers-python"),
        ("bare", "cannot import what it takes (ModuleNotFoundError: No module named 'no_such_package')"),
        ("lacking", "neither this release of transformers nor 4.0 of "),
    ],
)  # fmt: skip
def test_where_no_release_judges_nothing_passes(
    where: str | None, words: str, originals: Written, conversions: Written, tmp_path: Path,
    without_the_class: None,
) -> None:  # fmt: skip
    lines = {
        "silent": "exit 3",
        "bare": f'exec {sys.executable} "$@"',
        "lacking": f'exec {sys.executable} "$@"',
    }
    path = None if where is None else tmp_path / where
    if path is not None and where in lines:
        (tmp_path / "torch.py").write_text("")  # the real one takes a second, and is not asked for anything
        (tmp_path / "transformers.py").write_text(
            "import no_such_package" if where == "bare" else "__version__ = '4.0'"
        )
        path.write_text(f"#!/bin/sh\nexport PYTHONPATH={tmp_path}\n{lines[str(where)]}\n")
        path.chmod(0o755)
    report = against(conversions(JUDGED), originals(JUDGED), path)
    found = told(report, "logits")
    assert (report.exit_code, found.status) == (2, "skipped")
    assert words in found.message


def test_an_input_that_a_class_does_not_take_is_not_left_out() -> None:
    class Model:
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None: ...

    ids = torch.ones(1, 4, dtype=torch.long)
    assert library.arguments(Model(), ids, {"mask": ids}).keys() == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="expected entity_ids, token_type_ids among the arguments"):
        library.arguments(Model(), ids, {"token_types": ids, "entity_ids": ids})
    with pytest.raises(ValueError, match="expected token_type_ids among the arguments"):
        other_release.compute(torch, Model(), {"input_ids": ids, "token_type_ids": ids}, "cpu")


# --- tensors of three axes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x[:, ::-1], "ema_gate.damping_factor axis-2 slices in reverse order"),
        (lambda x: np.roll(x, 1, 0), "ema_gate.damping_factor axis-1 slices"),
        (lambda x: x.transpose(2, 1, 0).reshape(x.shape), "ema_gate.damping_factor transposed: axes 2 1 3"),
        (
            lambda x: np.where(np.arange(x.size).reshape(x.shape) % 7 == 3, x ^ (1 << 22), x),
            "bit 22 flipped in 41 elements, the first (0, 3, 0)",
        ),
    ],
)
def test_what_is_wrong_in_three_axes_is_told(
    spoil: Callable[[np.ndarray], np.ndarray], words: str, originals: Written, conversions: Written,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = Path(shutil.copytree(conversions("mega-chunks"), tmp_path / "out"))
    folder, name = Folder(out), "mega.layers.1.mega_layer.ema_gate.damping_factor"
    folder.set(name, spoil(folder.get(name)))
    folder.checkpoint.close()
    report = verify(out, originals("mega-chunks"), levels="parity")
    found = report.level("diagnosis")[0]
    assert (report.exit_code, found.where) == (1, "layer 1")
    assert words in found.message, found.message
