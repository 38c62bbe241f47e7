"""The readings of metaseq's OPT and of its Hugging Face layout agree with each other, with transformers and
with older computations, and stop agreeing when one rule is broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import converted, hf_blocks, loss, losses, original

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

# NMSE of logits. Measured between the two readings: at most 8e-31 in float64 and 2e-13 in float32.
FLOAT64_BAR, FLOAT32_BAR = 1e-20, 1e-10

L, N, H, F, V, P, T = 3, 4, 6, 40, 44, 37, 20
D = N * H
LINEARS = ("q", "k", "v", "out", "fc1", "fc2")
HF_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
NORMS = {"norm_1": "self_attn_layer_norm", "norm_2": "final_layer_norm"}

ours, theirs = original("opt"), converted("OPTForCausalLM")


@dataclass(frozen=True)
class Case:
    """A tiny model, and how its original was stored. `E` is the width of a word, D unless it is projected."""

    layers: int = L
    E: int = D
    before: bool = True
    activation: str = "relu"
    ranks: int = 1
    fused: bool = True
    prefix: str = "decoder."

    def tensors(self) -> State:
        """In float64, under names of this test: q, k and v apart, heads in order."""
        shapes: Shapes = {"word": (V, self.E), "position": (P + 2, D)}
        shapes |= {} if self.E == D else {"in": (D, self.E), "out": (self.E, D)}
        norms = [f"{i}.{n}" for i in range(self.layers) for n in NORMS] + ["norm"] * self.before
        shapes |= {f"{n}.{kind}": (D,) for n in norms for kind in ("weight", "bias")}
        for i in range(self.layers):
            for name, linear in zip(LINEARS, [(D, D)] * 4 + [(F, D), (D, F)], strict=True):
                shapes |= {f"{i}.{name}.weight": linear, f"{i}.{name}.bias": linear[:1]}
        made = {}
        for number, (name, shape) in enumerate(sorted(shapes.items())):
            seed = torch.Generator().manual_seed(number)
            made[name] = torch.randn(shape, generator=seed, dtype=torch.float64) * 0.2
            made[name] += float("norm" in name and name.endswith("weight"))
        return made

    def files(self, order: str = "kvq") -> list[State]:
        """What each rank stores. Row t of projection j of a rank is at j * D/S + t of its fused tensor."""
        full, S, p = self.tensors(), self.ranks, self.prefix
        made: list[State] = [{p + "version": torch.tensor([3.0])} for _ in range(S)]

        def put(name: str, parts: list[Tensor]) -> None:
            for rank, part in zip(made, parts, strict=True):
                rank[p + name] = part

        put("embed_tokens.weight", list(full["word"].chunk(S)))
        put("output_projection.weight", list(full["word"].chunk(S)))
        put("embed_positions.weight", [full["position"]] * S)
        if self.E != D:
            put("project_in_dim.weight", [full["in"]] * S)
            put("project_out_dim.weight", [full["out"]] * S)
        for kind in ("weight", "bias"):
            for i in range(self.layers):
                parts = {c: full[f"{i}.{c}.{kind}"].chunk(S) for c in "kvq"}
                if self.fused:
                    put(
                        f"layers.{i}.self_attn.qkv_proj.{kind}",
                        [torch.cat([parts[c][r] for c in order]) for r in range(S)],
                    )
                else:
                    for c in "kvq":
                        put(f"layers.{i}.self_attn.{c}_proj.{kind}", list(parts[c]))
                put(f"layers.{i}.fc1.{kind}", list(full[f"{i}.fc1.{kind}"].chunk(S)))
                for own, name in (("out", "self_attn.out_proj"), ("fc2", "fc2")):
                    whole = full[f"{i}.{own}.{kind}"]
                    put(
                        f"layers.{i}.{name}.{kind}",
                        list(whole.chunk(S, 1)) if kind == "weight" else [whole] * S,
                    )
                for own, name in NORMS.items():
                    put(f"layers.{i}.{name}.{kind}", [full[f"{i}.{own}.{kind}"]] * S)
            if self.before:
                put(f"layer_norm.{kind}", [full[f"norm.{kind}"]] * S)
        return made

    def hf_state(self, prefix: str = "model.decoder.") -> State:
        full = self.tensors()
        state = {"embed_tokens.weight": full["word"], "embed_positions.weight": full["position"]}
        if self.E != D:
            state |= {"project_in.weight": full["in"], "project_out.weight": full["out"]}
        for kind in ("weight", "bias"):
            for i in range(self.layers):
                for own, name in (*zip(LINEARS, HF_LINEARS, strict=True), *NORMS.items()):
                    state[f"layers.{i}.{name}.{kind}"] = full[f"{i}.{own}.{kind}"]
            if self.before:
                state[f"final_layer_norm.{kind}"] = full[f"norm.{kind}"]
        return {prefix + name: t for name, t in state.items()}

    def hf_config(self, **changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "hidden_size": D,
            "num_hidden_layers": self.layers,
            "num_attention_heads": N,
            "ffn_dim": F,
        }
        made |= {"word_embed_proj_dim": self.E, "vocab_size": V, "max_position_embeddings": P}
        made |= {"activation_function": self.activation, "do_layer_norm_before": self.before}
        return made | {"model_type": "opt", "architectures": ["OPTForCausalLM"]} | changes

    def settings(self) -> dict[str, Any]:
        """As metaseq pickles them; it cannot say which gelu."""
        made: dict[str, Any] = {
            "decoder_layers": self.layers,
            "decoder_embed_dim": D,
            "decoder_attention_heads": N,
        }
        made |= {"decoder_ffn_embed_dim": F, "decoder_normalize_before": self.before, "activation_fn": "relu"}
        made |= {"no_scale_embedding": True, "share_decoder_input_output_embed": True}
        return {
            "cfg": {"_name": None, "model": made | {"max_target_positions": "${task.tokens}"}},
            "args": None,
        }

    def overrides(self) -> dict[str, Any]:
        return {} if self.activation == "relu" else {"activation_function": self.activation}

    def original_logits(self, dtype: torch.dtype, files: list[State] | None = None, **more: Any) -> Tensor:
        files = [{n: t.to(dtype) for n, t in f.items()} for f in files or self.files()]
        c = ours.Config.from_original(self.settings(), shapes_of(files[0]), self.ranks, self.overrides())
        logits: Tensor = ours.forward(ids(), files, c, **more)
        return logits

    def hf_logits(
        self,
        dtype: torch.dtype,
        state: State | None = None,
        changes: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        c = theirs.Config.from_hf(self.hf_config(**(changes or {})))
        w = {n: t.to(dtype) for n, t in (state or self.hf_state()).items()}
        logits: Tensor = theirs.forward(ids(), [w], c, **more)
        return logits


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(t.shape) for name, t in state.items()}


def ids() -> Tensor:
    return torch.randint(3, V, (2, T), generator=torch.Generator().manual_seed(5))


def masks() -> dict[str, Tensor]:
    """The second text is shorter: padding after it, or before it."""
    right = torch.ones(2, T, dtype=torch.long)
    right[1, -7:] = 0
    return {"right": right, "left": right.flip(1)}


def nmse(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return ((reference - other).square().mean() / reference.var()).item()


CASES = {
    "one-part": Case(),
    "two-parts": Case(ranks=2),
    "four-parts": Case(ranks=4),
    "apart": Case(fused=False),
    "apart-two-parts": Case(fused=False, ranks=2),
    "eleven-layers": Case(layers=11, ranks=2),
    "350m": Case(E=14, before=False),
    "350m-apart": Case(E=14, before=False, fused=False),
    "350m-two-parts": Case(E=14, before=False, ranks=2),
    "post-norm": Case(before=False),
    "projected": Case(E=30),
    "no-prefix": Case(prefix=""),
    "whole-pickle": Case(prefix="model.decoder.", ranks=2),
    "gelu": Case(activation="gelu"),
    "gelu_new": Case(activation="gelu_new"),
}


@pytest.fixture(params=CASES)
def tiny(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, FLOAT64_BAR), (torch.float32, FLOAT32_BAR)])
def test_both_readings_agree(tiny: Case, dtype: torch.dtype, bar: float) -> None:
    found, expected = tiny.original_logits(dtype), tiny.hf_logits(dtype)
    assert found.dtype == expected.dtype == dtype
    assert nmse(expected, found) <= bar
    assert torch.equal(expected.argmax(-1), found.argmax(-1))


@pytest.mark.parametrize("side", masks())
@pytest.mark.parametrize("name", ["two-parts", "350m"])
def test_padding_moves_positions_and_is_not_seen(name: str, side: str) -> None:
    tiny, mask = CASES[name], masks()[side]
    found, expected = (f(torch.float64, mask=mask) for f in (tiny.original_logits, tiny.hf_logits))
    real = mask.bool()
    assert nmse(expected[real], found[real]) <= FLOAT64_BAR
    assert found.isfinite().all() and expected.isfinite().all()
    short = ids()[1:, mask[1].bool()]
    files = tiny.files()
    c = ours.Config.from_original(tiny.settings(), shapes_of(files[0]), tiny.ranks, {})
    assert nmse(ours.forward(short, files, c)[0], found[1][real[1]]) <= FLOAT64_BAR


@pytest.mark.parametrize("name", ["two-parts", "350m"])
def test_layers_run_one_by_one_in_lockstep(name: str) -> None:
    tiny = CASES[name]
    files, w = tiny.files(), [tiny.hf_state()]
    c = ours.Config.from_original(tiny.settings(), shapes_of(files[0]), tiny.ranks, {})
    d = theirs.Config.from_hf(tiny.hf_config())
    x = ours.embed(ids(), files, c)
    assert nmse(x, theirs.embed(ids(), w, d)) <= FLOAT64_BAR and x.shape == (2, T, D)
    for i in range(c.n_layers):
        after = ours.layer(x, i, files, c)
        assert nmse(after, theirs.layer(x, i, w, d)) <= FLOAT64_BAR
        x = after
    found = ours.head(x, files, c)
    assert nmse(found, theirs.head(x, w, d)) <= FLOAT64_BAR
    assert torch.equal(found, tiny.original_logits(torch.float64))


def judge(tiny: Case, architecture: str, state: State, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    made = transformers.OPTConfig(
        **tiny.hf_config(**config),
        attn_implementation="eager",
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = getattr(transformers, architecture)(made).eval()
    missing, unknown = model.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}
    return model


def test_transformers_agrees_in_float32(tiny: Case) -> None:
    model = judge(tiny, "OPTForCausalLM", tiny.hf_state())
    for mask in (None, *masks().values()):
        with torch.no_grad():
            expected = model(ids(), attention_mask=mask).logits
        real = torch.ones_like(ids(), dtype=torch.bool) if mask is None else mask.bool()
        for found in (f(torch.float32, mask=mask) for f in (tiny.original_logits, tiny.hf_logits)):
            assert nmse(expected[real], found[real]) <= FLOAT32_BAR  # measured: at most 2e-13
            assert torch.equal(expected[real].argmax(-1), found[real].argmax(-1))


HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base_model": ("OPTModel", ("last_hidden_state",)),
    "causal_lm": ("OPTForCausalLM", ("logits",)),
    "sequence_classification": ("OPTForSequenceClassification", ("logits",)),
    "question_answering": ("OPTForQuestionAnswering", ("start_logits", "end_logits")),
}


@pytest.mark.parametrize("name", ["one-part", "350m"])
@pytest.mark.parametrize("head", theirs.HEADS)
def test_heads_are_those_of_transformers(head: str, name: str) -> None:
    tiny, (architecture, outputs) = CASES[name], HEADS[head]
    seed = torch.Generator().manual_seed(3)
    own: Shapes = {"score.weight": (3, tiny.E)} if head == "sequence_classification" else {}
    own |= {"qa_outputs.weight": (2, tiny.E), "qa_outputs.bias": (2,)} if head == "question_answering" else {}
    state = tiny.hf_state("decoder." if head == "base_model" else "model.decoder.")
    state |= {n: torch.randn(shape, generator=seed, dtype=torch.float64) for n, shape in own.items()}
    mask = masks()["right"]
    padded = ids().masked_fill(mask == 0, 1)
    labels: dict[str, Tensor] = {}
    if head == "sequence_classification":
        labels = {"labels": torch.tensor([2, 0])}
    elif head == "question_answering":
        labels = {"start_positions": torch.tensor([3, 25]), "end_positions": torch.tensor([6, 9])}
    model = judge(tiny, architecture, state, num_labels=3)
    with torch.no_grad():
        out = model(padded, attention_mask=mask, **labels)
    c = theirs.Config.from_hf(tiny.hf_config(architectures=[architecture]))
    w = [{n: t.float() for n, t in state.items()}]
    found = theirs.HEADS[head](theirs.encode(padded, w, c, mask=mask), w, c)
    if head == "sequence_classification":
        found = hf_blocks.of_last_token(found, padded, 1)
        by_hand = losses.classification(found, **labels)
        assert by_hand.item() == pytest.approx(out.loss.item(), abs=1e-5)
    if head == "question_answering":
        assert losses.span(*found, *labels.values()).item() == pytest.approx(out.loss.item(), abs=1e-5)
    made = found if isinstance(found, tuple) else (found,)
    kept = torch.ones(2, dtype=torch.bool) if head == "sequence_classification" else mask.bool()
    for output, one in zip(outputs, made, strict=True):
        assert out[output].shape == one.shape and nmse(out[output][kept], one[kept]) <= FLOAT32_BAR


@pytest.mark.parametrize("pad", [None, 1])
def test_the_last_token_is_the_last_that_is_no_padding(pad: int | None) -> None:
    rows = torch.tensor([[5, 7, 1, 1], [1, 1, 6, 8], [4, 1, 9, 1]])
    logits = torch.arange(12.0).view(3, 4, 1)
    last = [3, 3, 3] if pad is None else [1, 3, 2]
    assert hf_blocks.of_last_token(logits, rows, pad).flatten().tolist() == [
        4.0 * r + t for r, t in enumerate(last)
    ]


@dataclass(frozen=True)
class Toy:
    E: int
    before: bool
    last: tuple[tuple[float, ...], tuple[float, ...]]  # the first logits of the last token of each row
    sums: tuple[float, float]  # of the logits of each row's tokens
    nats: float  # of the first row


TOYS = {
    "pre-norm": Toy(
        E=8,
        before=True,
        last=((-0.08823, -0.48766, -0.55423, -0.67497), (0.03636, -0.63822, -0.59645, -0.44318)),
        sums=(1.7390, -0.8628),
        nats=2.98673,
    ),
    "post-norm-projected": Toy(
        E=4,
        before=False,
        last=((0.00764, -0.54897, -0.17165, -0.00923), (-0.14453, -0.11665, -0.55386, 0.34811)),
        sums=(10.5273, 6.3980),
        nats=2.64850,
    ),
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_a_toy_has_the_values_of_two_older_computations(toy: Toy) -> None:
    """Weights by a formula over the sorted names; 2 heads of 4, 16 words, 12 rows of positions, 12 units."""
    shapes: Shapes = {"embed_tokens.weight": (16, toy.E), "embed_positions.weight": (12, 8)}
    if toy.before:
        shapes |= {"layer_norm.weight": (8,), "layer_norm.bias": (8,)}
    else:
        shapes |= {"project_in_dim.weight": (8, 4), "project_out_dim.weight": (4, 8)}
    for i in range(2):
        for name, shape in (
            ("self_attn.qkv_proj", (24, 8)),
            ("self_attn.out_proj", (8, 8)),
            ("fc1", (12, 8)),
            ("fc2", (8, 12)),
        ):
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
        for name in NORMS.values():
            shapes |= {f"layers.{i}.{name}.{kind}": (8,) for kind in ("weight", "bias")}
    state: State = {}
    for k, name in enumerate(sorted("decoder." + n for n in shapes), 1):
        stored = shapes[name.removeprefix("decoder.")]
        e = torch.arange(1, math.prod(stored) + 1, dtype=torch.float64)
        t = 0.3 * torch.sin(0.1 * e.square() + k) + float(name.endswith("layer_norm.weight"))
        state[name] = t.float().view(stored)
    told = {"num_attention_heads": 2, "do_layer_norm_before": toy.before, "activation_function": "relu"}
    c = ours.Config.from_original({}, shapes_of(state), 1, told)
    rows = torch.tensor([[2, 7, 5, 9, 3, 12], [1, 1, 2, 8, 4, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    logits = ours.forward(rows, [state], c, mask=mask)
    for row, expected in enumerate(toy.last):
        assert logits[row, -1, :4].tolist() == pytest.approx(expected, abs=2e-5)
    assert logits[0].sum().item() == pytest.approx(toy.sums[0], abs=2e-4)
    assert logits[1, 2:].sum().item() == pytest.approx(toy.sums[1], abs=2e-4)
    assert loss(logits[:1], rows[:1]) == pytest.approx(toy.nats, abs=2e-5)


def norms_exchanged(state: State) -> State:
    one, other = "self_attn_layer_norm", "final_layer_norm"
    own = {n: n.replace(one, other) if one in n else n.replace(other, one) for n in state if ".layers." in n}
    return {own.get(n, n): t for n, t in state.items()}


def of_order(order: str) -> Callable[[State], State]:
    """As if the fused tensor, in thirds, were in this order."""
    return lambda state: {
        n.replace(f"{c}_proj", f"{order['kvq'.index(c)]}_proj")
        if (c := n[n.find("_proj") - 1]) in "kvq"
        else n: t
        for n, t in state.items()
    }


def shifted(rows: int) -> Callable[[State], State]:
    def shift(state: State) -> State:
        name = "model.decoder.embed_positions.weight"
        return state | {name: state[name].roll(-rows, 0)}

    return shift


def joined_as_they_are(tiny: Case) -> State:
    """The fused parts of all ranks one below the other, cut in thirds afterwards."""
    files, state = tiny.files(), tiny.hf_state()
    for i in range(tiny.layers):
        for kind in ("weight", "bias"):
            name = f"layers.{i}.self_attn.qkv_proj.{kind}"
            whole = torch.cat([f["decoder." + name] for f in files]).chunk(3)
            for c, part in zip("kvq", whole, strict=True):
                state[f"model.decoder.layers.{i}.self_attn.{c}_proj.{kind}"] = part
    return state


def unchanged(state: State) -> State:
    return state


def without_final_norm(state: State) -> State:
    return {n: t for n, t in state.items() if not n.startswith("model.decoder.final_layer_norm")}


# Mistakes in the converted model: name of the case, change of the tensors, of config.json.
MISTAKES: dict[str, tuple[str, Callable[[State], State], dict[str, Any]]] = {
    **{f"order-{order}": ("two-parts", of_order(order), {}) for order in ("qkv", "kqv", "qvk", "vkq", "vqk")},
    "parts-joined-as-they-are": ("two-parts", lambda _: joined_as_they_are(CASES["two-parts"]), {}),
    "positions-from-0": ("one-part", shifted(-2), {}),
    "positions-from-1": ("one-part", shifted(-1), {}),
    "positions-from-3": ("one-part", shifted(1), {}),
    "gelu-for-relu": ("one-part", unchanged, {"activation_function": "gelu"}),
    "relu-for-gelu": ("gelu", unchanged, {"activation_function": "relu"}),
    "tanh-for-erf": ("gelu", unchanged, {"activation_function": "gelu_new"}),
    "erf-for-tanh": ("gelu_new", unchanged, {"activation_function": "gelu"}),
    "norms-after": ("one-part", unchanged, {"do_layer_norm_before": False}),
    "norms-after-and-at-the-end": ("post-norm", lambda s: s | final_norm(), {"do_layer_norm_before": True}),
    "no-final-norm": ("one-part", without_final_norm, {"_remove_final_layer_norm": True}),
    "norms-exchanged": ("one-part", norms_exchanged, {}),
    "half-the-heads": ("one-part", unchanged, {"num_attention_heads": 2}),
}  # fmt: skip


def final_norm() -> State:
    made = Case().tensors()
    return {f"model.decoder.final_layer_norm.{kind}": made[f"norm.{kind}"] for kind in ("weight", "bias")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_far_above_the_bar(mistake: str) -> None:
    name, change, config = MISTAKES[mistake]
    tiny = CASES[name]
    wrong = tiny.hf_logits(torch.float32, change(tiny.hf_state()), config)
    # measured: 4e-8 between the forms of gelu, 4e-2 to 2 for the rest
    least = 1e2 if mistake in ("tanh-for-erf", "erf-for-tanh") else 1e5
    assert nmse(tiny.original_logits(torch.float32), wrong) > least * FLOAT32_BAR


def test_parts_in_another_order_are_another_model() -> None:
    tiny = CASES["two-parts"]
    expected = tiny.hf_logits(torch.float64)
    assert nmse(expected, tiny.original_logits(torch.float64, tiny.files()[::-1])) > 0.1
    assert nmse(expected, tiny.original_logits(torch.float64, tiny.files("qkv"))) > 0.1


@pytest.mark.parametrize("name", ["two-parts", "350m"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_run_in_sixteen_bits_with_float32_logits(name: str, dtype: torch.dtype) -> None:
    tiny, mask = CASES[name], masks()["left"]
    exact, real = tiny.hf_logits(torch.float64, mask=mask), mask.bool()
    for logits in (tiny.original_logits(dtype, mask=mask), tiny.hf_logits(dtype, mask=mask)):
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        assert nmse(exact[real], logits[real]) < 0.01  # measured: at most 3e-4
    files = [{n: t.to(dtype) for n, t in f.items()} for f in tiny.files()]
    c = ours.Config.from_original(tiny.settings(), shapes_of(files[0]), tiny.ranks, {})
    assert ours.layer(ours.embed(ids(), files, c), 0, files, c).dtype == dtype


def test_everything_is_computed_where_the_tensors_are() -> None:
    tiny = CASES["350m-two-parts"]
    files = [{n: t.to("meta") for n, t in f.items()} for f in tiny.files()]
    w = [{n: t.to("meta") for n, t in tiny.hf_state("decoder.").items()}]
    c = ours.Config.from_original(tiny.settings(), shapes_of(files[0]), 2, {})
    d = theirs.Config.from_hf(tiny.hf_config())
    for module, ranks, config in ((ours, files, c), (theirs, w, d)):
        logits = module.forward(ids().to("meta"), ranks, config)
        assert logits.device.type == "meta" and logits.shape == (2, T, V)


def header(layers: int, width: int, E: int, F: int, S: int, normed: bool = True) -> Shapes:
    """Rank 0 of a model with 50272 words and 2048 positions."""
    shapes: Shapes = {"embed_tokens.weight": (50272 // S, E)}
    shapes |= {"embed_positions.weight": (2050, width)}
    if width != E:
        shapes |= {"project_in_dim.weight": (width, E), "project_out_dim.weight": (E, width)}
    if normed:
        shapes |= {"layer_norm.weight": (width,), "layer_norm.bias": (width,)}
    for i in range(layers):
        for name, shape, bias in (
            ("self_attn.qkv_proj", (3 * width // S, width), 3 * width // S),
            ("self_attn.out_proj", (width, width // S), width),
            ("fc1", (F // S, width), F // S),
            ("fc2", (width, F // S), width),
        ):
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": (bias,)}
        for name in NORMS.values():
            shapes |= {f"layers.{i}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    return {"decoder." + name: shape for name, shape in shapes.items()}


def read(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], S: int = 1, **told: Any) -> Any:
    return ours.Config.from_original(params, shapes, S, told)


def test_published_sizes_need_no_settings() -> None:
    for layers, width, heads, S in (
        (12, 768, 12, 1),
        (32, 2560, 32, 4),
        (64, 9216, 72, 8),
        (96, 12288, 96, 8),
    ):
        c = read({}, header(layers, width, width, 4 * width, S), S)
        assert (c.n_heads, c.pre_norm, c.activation, c.projected) == (heads, True, "relu", False)
    c = read({}, header(24, 1024, 512, 4096, 1, normed=False))
    assert (c.n_layers, c.n_heads, c.pre_norm, c.activation, c.projected) == (24, 16, False, "relu", True)
    assert read({}, header(24, 1024, 512, 4096, 1, False), num_attention_heads=8).n_heads == 8
    with pytest.raises(ValueError, match="a final norm, as norms come before a branch, found none"):
        read({}, header(12, 768, 768, 3072, 1, normed=False))


def test_other_sizes_ask_for_what_the_file_does_not_hold() -> None:
    shapes = header(12, 768, 768, 3000, 1)
    with pytest.raises(ValueError, match="expected `num_attention_heads` in the settings or given by name"):
        read({}, shapes)
    c = read({"args": {"decoder_attention_heads": 6, "activation_fn": "relu"}}, shapes)
    assert (c.n_heads, c.pre_norm) == (6, True)
    bare = {n: s for n, s in shapes.items() if not n.startswith("decoder.layer_norm")}
    told: dict[str, Any] = {"num_attention_heads": 6, "activation_function": "relu"}
    with pytest.raises(ValueError, match="expected `do_layer_norm_before` in the settings or given by name"):
        read({}, bare, **told)
    assert not read({}, bare, do_layer_norm_before=False, **told).pre_norm
    assert not read({"cfg": {"model": {"decoder_normalize_before": False}}}, bare, **told).pre_norm


FLAT = {"decoder_attention_heads": 12, "activation_fn": "relu"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, ...] | None], str]] = {
    "norm-lost": (
        {"decoder_normalize_before": True},
        {},
        {"decoder.layer_norm.weight": None, "decoder.layer_norm.bias": None},
        "expected a final norm, as norms come before a branch, found none",
    ),
    "norm-too-many": (
        {"decoder_normalize_before": False},
        {},
        {},
        "expected no final norm, as norms come after a branch, found one",
    ),
    "own-gelu": ({"activation_fn": "gelu"}, {}, {}, "given by name, found `gelu` in the settings"),
    "swish": (
        {},
        {"activation_function": "silu"},
        {},
        "`activation_function` to be one of relu, .* found silu",
    ),
    "heads": ({}, {"num_attention_heads": 7}, {}, "heads that 1 ranks and 768 channels can share, found 7"),
    "layers": ({"decoder_layers": 13}, {}, {}, "expected layers 13, as told, found 12 in the tensors"),
    "scaled": ({"no_scale_embedding": False}, {}, {}, "expected `no_scale_embedding` True, found False"),
    "alibi": ({"alibi": True}, {}, {}, "expected `alibi` False, found True"),
    "untied": (
        {"share_decoder_input_output_embed": False},
        {},
        {},
        "`share_decoder_input_output_embed` True",
    ),
    "gap": ({}, {}, {"decoder.layers.13.self_attn.out_proj.weight": (1,)}, "one stack of layers 0, 1, 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    params, overrides, changes, message = REFUSED[name]
    shapes: dict[str, Any] = header(12, 768, 768, 3072, 1) | changes
    with pytest.raises(ValueError, match=message):
        read(FLAT | params, {n: s for n, s in shapes.items() if s is not None}, **overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"activation_function": None, "hidden_size": None},
            "hidden_size, activation_function in config.json",
        ),
        ({"do_layer_norm_before": None}, "expected do_layer_norm_before in config.json, found none"),
        ({"activation_function": "silu"}, "`activation_function` to be one of relu, .* found silu"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        theirs.Config.from_hf(Case().hf_config(**change))


def test_an_output_layer_of_its_own_is_read_where_config_json_says_so() -> None:
    state = Case().hf_state()
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].flip(0)
    tied, untied = (Case().hf_logits(torch.float64, state, {"tie_word_embeddings": t}) for t in (True, False))
    assert nmse(tied.flip(-1), untied) <= FLOAT64_BAR
