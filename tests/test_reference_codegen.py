"""The readings of CodeGen, as published and as transformers has it, and of the same model as GPT-J agree with
each other, with transformers and with older computations, and stop agreeing when one rule is broken."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import converted, hf_blocks, loss, original
from ckpt_tool.reference.blocks import layer_norm, rotate_neighbours
from ckpt_tool.reference.rope import turns

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]

# NMSE of logits. Measured between the readings: at most 2e-30 in float64 and 3e-13 in float32.
FLOAT64_BAR, FLOAT32_BAR = 1e-20, 1e-10

V, T = 58, 40

ours, theirs, gptj = original("codegen"), converted("CodeGenForCausalLM"), converted("GPTJForCausalLM")


@dataclass(frozen=True)
class Case:
    """A tiny model. `M` is the number of cores whose blocks its original has."""

    layers: int = 3
    N: int = 8
    H: int = 6
    R: int = 4
    F: int = 200
    M: int = 4
    activation: str = "gelu_new"
    eps: float = 3e-4

    @property
    def D(self) -> int:
        return self.N * self.H

    def tensors(self) -> State:
        """GPT-J's tensors in float64: q, k and v apart, heads in order."""
        D = self.D
        shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D), "lm_head.weight": (V, D)}
        shapes |= {"lm_head.bias": (V,)}
        norms = ["transformer.ln_f."] + [f"transformer.h.{i}.ln_1." for i in range(self.layers)]
        shapes |= {norm + kind: (D,) for norm in norms for kind in ("weight", "bias")}
        for i in range(self.layers):
            p = f"transformer.h.{i}."
            shapes |= {f"{p}attn.{n}_proj.weight": (D, D) for n in ("q", "k", "v", "out")}
            shapes |= {p + "mlp.fc_in.weight": (self.F, D), p + "mlp.fc_in.bias": (self.F,)}
            shapes |= {p + "mlp.fc_out.weight": (D, self.F), p + "mlp.fc_out.bias": (D,)}
        made = {}
        for number, (name, shape) in enumerate(sorted(shapes.items())):
            seed = torch.Generator().manual_seed(number)
            made[name] = torch.randn(shape, generator=seed, dtype=torch.float64) * 0.2
            made[name] += float("ln_" in name and name.endswith("weight"))
        return made

    def fused(self, order: str = "qvk", M: int | None = None, state: State | None = None) -> State:
        """One tensor for q, k and v: M blocks, each with the rows of N/M heads of each of the three."""
        state, blocks = state or self.tensors(), M or self.M
        made = {
            n: t
            for n, t in state.items()
            if not n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        }
        for i in range(self.layers):
            p = f"transformer.h.{i}.attn."
            parts = {c: state[f"{p}{c}_proj.weight"].chunk(blocks) for c in "qkv"}
            made[p + "qkv_proj.weight"] = torch.cat([parts[c][j] for j in range(blocks) for c in order])
        return made

    def buffers(self) -> State:
        """What some files hold beside the model."""
        made: State = {}
        for i in range(self.layers):
            p = f"transformer.h.{i}.attn."
            made |= {p + "causal_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()}
            made |= {p + "masked_bias": torch.tensor(-1e9)}
        return made

    def config(self, architecture: str = "CodeGenForCausalLM", **changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"n_layer": self.layers, "n_embd": self.D, "n_head": self.N, "n_inner": self.F}
        made |= {"rotary_dim": self.R, "layer_norm_epsilon": self.eps, "vocab_size": V, "n_positions": 64}
        made |= {"activation_function": self.activation, "n_ctx": 64, "tie_word_embeddings": False}
        made |= {"model_type": "codegen" if "CodeGen" in architecture else "gptj"}
        return made | {"architectures": [architecture], "bos_token_id": None, "eos_token_id": None} | changes

    def original_logits(self, dtype: torch.dtype, state: State | None = None, **more: Any) -> Tensor:
        w = {n: t.to(dtype) for n, t in (state or self.fused()).items()}
        told = {} if self.M == 4 else {"mp_num": self.M}
        c = ours.Config.from_original(self.config(), shapes_of(w), 1, told)
        logits: Tensor = ours.forward(ids(), [w], c, **more)
        return logits

    def hf_logits(
        self,
        dtype: torch.dtype,
        state: State | None = None,
        changes: Mapping[str, Any] | None = None,
        module: Any = theirs,
        **more: Any,
    ) -> Tensor:
        if state is None:
            state = self.fused(M=4) if module is theirs else self.tensors()
        c = module.Config.from_hf(self.config(**(changes or {})))
        logits: Tensor = module.forward(ids(), [{n: t.to(dtype) for n, t in state.items()}], c, **more)
        return logits


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
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
    "tiny": Case(),
    "all-turned": Case(R=6),
    "wide-heads": Case(N=4, H=10, R=2),
    "twelve-heads": Case(N=12, H=4, R=2),
    "eleven-layers": Case(layers=11),
    "eight-cores": Case(M=8),
    "gelu": Case(activation="gelu"),
}


@pytest.fixture(params=CASES)
def tiny(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, FLOAT64_BAR), (torch.float32, FLOAT32_BAR)])
def test_the_readings_agree(tiny: Case, dtype: torch.dtype, bar: float) -> None:
    found = tiny.original_logits(dtype)
    for module in (theirs, gptj):
        expected = tiny.hf_logits(dtype, module=module)
        assert found.dtype == expected.dtype == dtype
        assert nmse(expected, found) <= bar
        assert torch.equal(expected.argmax(-1), found.argmax(-1))


def unpacked(state: State, D: int) -> State:
    """The re-layout to GPT-J, row by row: t of query, value and key lie B rows apart in block t // B."""
    B, made = D // 4, dict(state)
    for name in state:
        if name.endswith("qkv_proj.weight"):
            fused = made.pop(name)
            for s, c in enumerate("qvk"):
                rows = [t // B * 3 * B + s * B + t % B for t in range(D)]
                made[name.replace("qkv_proj", f"{c}_proj")] = fused[rows]
    return made


@pytest.mark.parametrize("name", ["tiny", "wide-heads", "twelve-heads", "eleven-layers"])
def test_codegen_unpacked_is_gptj_bit_for_bit(name: str) -> None:
    """The twelve blocks may also be taken in the order 0 3 6 9, 1 4 7 10, 2 5 8 11 and cut in thirds."""
    tiny = CASES[name]
    made = unpacked(tiny.fused(), tiny.D)
    assert made.keys() == tiny.tensors().keys()
    assert all(torch.equal(t, made[n]) for n, t in tiny.tensors().items())
    p = "transformer.h.1.attn."
    blocks = tiny.fused()[p + "qkv_proj.weight"].chunk(12)
    thirds = torch.cat([blocks[b] for b in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)]).chunk(3)
    assert all(torch.equal(t, made[f"{p}{c}_proj.weight"]) for t, c in zip(thirds, "qvk", strict=True))


@pytest.mark.parametrize("side", masks())
def test_padding_is_not_seen(side: str) -> None:
    tiny, mask = CASES["tiny"], masks()[side]
    real, short = mask.bool(), ids()[1:, mask[1].bool()]
    found = tiny.original_logits(torch.float64, mask=mask)
    for module in (theirs, gptj):
        expected = tiny.hf_logits(torch.float64, module=module, mask=mask)
        assert nmse(expected[real], found[real]) <= FLOAT64_BAR
    c = ours.Config.from_original(tiny.config(), shapes_of(tiny.fused()), 1, {})
    assert nmse(ours.forward(short, [tiny.fused()], c)[0], found[1][real[1]]) <= FLOAT64_BAR


def test_layers_run_one_by_one_in_lockstep() -> None:
    tiny = CASES["eight-cores"]
    own, w = [tiny.fused() | tiny.buffers()], [tiny.fused(M=4)]
    c = ours.Config.from_original(tiny.config(), shapes_of(own[0]), 1, {"mp_num": 8})
    d, e = theirs.Config.from_hf(tiny.config()), gptj.Config.from_hf(tiny.config("GPTJForCausalLM"))
    x = ours.embed(ids(), own, c)
    assert torch.equal(x, theirs.embed(ids(), w, d)) and x.shape == (2, T, tiny.D)
    for i in range(c.n_layers):
        after = ours.layer(x, i, own, c)
        assert nmse(after, theirs.layer(x, i, w, d)) <= FLOAT64_BAR
        assert nmse(after, gptj.layer(x, i, [tiny.tensors()], e)) <= FLOAT64_BAR
        x = after
    assert nmse(ours.head(x, own, c), theirs.head(x, w, d)) <= FLOAT64_BAR


def judge(tiny: Case, architecture: str, state: State) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    made = config(**tiny.config(architecture), attn_implementation="eager")
    model = getattr(transformers, architecture)(made).eval()
    model.load_state_dict({n: t.float() for n, t in state.items()})
    return model


def test_transformers_agrees_in_float32_on_both_architectures(tiny: Case) -> None:
    judges = {
        "CodeGenForCausalLM": judge(tiny, "CodeGenForCausalLM", tiny.fused(M=4)),
        "GPTJForCausalLM": judge(tiny, "GPTJForCausalLM", unpacked(tiny.fused(M=4), tiny.D)),
    }
    for mask in (None, *masks().values()):
        real = torch.ones_like(ids(), dtype=torch.bool) if mask is None else mask.bool()
        found = [tiny.original_logits(torch.float32, mask=mask)]
        found += [tiny.hf_logits(torch.float32, module=m, mask=mask) for m in (theirs, gptj)]
        with torch.no_grad():
            expected = [model(ids(), attention_mask=mask).logits for model in judges.values()]
        assert nmse(expected[0][real], expected[1][real]) <= FLOAT32_BAR  # measured: 0
        for logits in found:
            assert nmse(expected[0][real], logits[real]) <= FLOAT32_BAR  # measured: at most 3e-13
            assert torch.equal(expected[0][real].argmax(-1), logits[real].argmax(-1))


@dataclass(frozen=True)
class Toy:
    N: int
    R: int
    last: tuple[float, ...]  # the first logits of the last token
    total: float  # of all logits
    nats: float


TOYS = (
    Toy(4, 2, (-0.68954, 0.34071, 1.33323, -0.06069), 41.2010, 2.94331),
    Toy(8, 2, (-0.89740, 0.42956, 1.41423, -0.15216), 38.8970, 2.90123),
    Toy(4, 4, (-0.69080, 0.34399, 1.33268, -0.06128), 41.2065, 2.94306),
)


@pytest.mark.parametrize("toy", TOYS)
def test_a_toy_has_the_values_of_two_older_computations(toy: Toy) -> None:
    """Weights by a formula over the sorted names; 16 words, 16 channels, 2 layers."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (16, 16), "lm_head.weight": (16, 16)}
    shapes |= {"lm_head.bias": (16,)}
    for i in range(2):
        p = f"transformer.h.{i}."
        shapes |= {p + "attn.qkv_proj.weight": (48, 16), p + "attn.out_proj.weight": (16, 16)}
        shapes |= {p + "mlp.fc_in.weight": (64, 16), p + "mlp.fc_in.bias": (64,)}
        shapes |= {p + "mlp.fc_out.weight": (16, 64), p + "mlp.fc_out.bias": (16,)}
    for norm in ("h.0.ln_1", "h.1.ln_1", "ln_f"):
        shapes |= {f"transformer.{norm}.{kind}": (16,) for kind in ("weight", "bias")}
    state: State = {}
    for k, name in enumerate(sorted(shapes), 1):
        e = torch.arange(1, math.prod(shapes[name]) + 1, dtype=torch.float64)
        t = 0.3 * torch.sin(0.1 * e.square() + k) + float(name.endswith(("ln_1.weight", "ln_f.weight")))
        state[name] = t.float().view(shapes[name])
    told: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": 16,
        "n_head": toy.N,
        "rotary_dim": toy.R,
        "layer_norm_epsilon": 1e-5,
    }
    told |= {"activation_function": "gelu_new"}
    rows = torch.tensor([[3, 7, 5, 9, 2, 11, 4]])
    c, d = ours.Config.from_original(told, shapes, 1, {}), theirs.Config.from_hf(told)
    for logits in (ours.forward(rows, [state], c), theirs.forward(rows, [state], d)):
        assert logits[0, -1, :4].tolist() == pytest.approx(toy.last, abs=2e-5)
        assert logits.sum().item() == pytest.approx(toy.total, abs=1e-3)
        assert loss(logits, rows) == pytest.approx(toy.nats, abs=2e-5)


def of_order(order: str) -> Callable[[Case], State]:
    """Unpacked as if each block were in this order, and packed again in the right one."""

    def change(tiny: Case) -> State:
        right = tiny.tensors()
        wrong = {
            n: right[n.replace(f"{c}_proj", f"{'qvk'[order.index(c)]}_proj")]
            if n.endswith("_proj.weight") and (c := n[n.find("_proj") - 1]) in "qvk"
            else t
            for n, t in right.items()
        }
        return tiny.fused(state=wrong)

    return change


def believed(M: int) -> Callable[[Case], State]:
    """Unpacked as if there were M blocks."""

    def change(tiny: Case) -> State:
        state = tiny.fused()
        for name in [n for n in state if n.endswith("qkv_proj.weight")]:
            parts = state[name].view(M, 3, tiny.D // M, tiny.D).transpose(0, 1).reshape(3, tiny.D, tiny.D)
            state[name] = torch.cat([parts[s].chunk(4)[j] for j in range(4) for s in range(3)])
        return state

    return change


def exchanged(one: str, other: str) -> Callable[[Case], State]:
    def change(tiny: Case) -> State:
        state = tiny.fused()
        return state | {one: state[other], other: state[one]}

    return change


def output_tied(tiny: Case) -> State:
    state = tiny.fused()
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def output_without_bias(tiny: Case) -> State:
    state = tiny.fused()
    return state | {"lm_head.bias": torch.zeros(V)}


def unchanged(tiny: Case) -> State:
    return tiny.fused(M=4)


# Mistakes in the converted model: name of the case, change of the tensors, of config.json.
MISTAKES: dict[str, tuple[str, Callable[[Case], State], dict[str, Any]]] = {
    **{f"order-{order}": ("tiny", of_order(order), {}) for order in ("qkv", "kqv", "kvq", "vqk", "vkq")},
    **{f"{M}-blocks": ("tiny", believed(M), {}) for M in (1, 2, 8)},
    "4-blocks-of-8": ("eight-cores", lambda tiny: tiny.fused(), {}),
    "rotary-2": ("tiny", unchanged, {"rotary_dim": 2}),
    "rotary-6": ("tiny", unchanged, {"rotary_dim": 6}),
    "rotary-4-of-6": ("all-turned", unchanged, {"rotary_dim": 4}),
    "eps": ("tiny", unchanged, {"layer_norm_epsilon": 1e-5}),
    "half-the-heads": ("tiny", unchanged, {"n_head": 4}),
    "erf-for-tanh": ("tiny", unchanged, {"activation_function": "gelu"}),
    "tanh-for-erf": ("gelu", unchanged, {"activation_function": "gelu_new"}),
    "output-tied": ("tiny", output_tied, {}),
    "output-without-bias": ("tiny", output_without_bias, {}),
    "norms": ("tiny", exchanged("transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"), {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_far_above_the_bar(mistake: str) -> None:
    name, change, config = MISTAKES[mistake]
    tiny = CASES[name]
    wrong = tiny.hf_logits(torch.float32, change(tiny), config)
    # measured: 5e-8 between the forms of gelu, 1e-5 for epsilon, 2e-3 to 2 for the rest
    least = 1e2 if mistake in ("erf-for-tanh", "tanh-for-erf") else 1e4
    assert nmse(tiny.original_logits(torch.float32), wrong) > least * FLOAT32_BAR


def test_a_wrong_number_of_cores_is_a_wrong_model() -> None:
    tiny = CASES["tiny"]
    for M in (1, 2, 8):
        c = ours.Config.from_original(tiny.config(), shapes_of(tiny.fused()), 1, {"mp_num": M})
        assert nmse(tiny.hf_logits(torch.float64), ours.forward(ids(), [tiny.fused()], c)) > 0.01


def test_the_branches_stand_side_by_side() -> None:
    """One after the other, as in most models, they give something else."""
    tiny = CASES["tiny"]
    state = tiny.fused()
    c = ours.Config.from_original(tiny.config(), shapes_of(state), 1, {})
    x, p = ours.embed(ids(), [state], c), "transformer.h.0."
    normed = layer_norm(x, state, p + "ln_1.", c.norm_eps)
    after = x + ours.attention(normed, state, 0, c, None, None)
    normed = layer_norm(after, state, p + "ln_1.", c.norm_eps)
    after = after + ours.feed_forward(normed, state, p + "mlp.", c)
    assert nmse(ours.layer(x, 0, [state], c), after) > 0.01


def test_pairs_of_neighbours_are_turned_and_the_rest_stays() -> None:
    x = torch.randn(1, 30, 1, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = x[0, 29, 0].clone()
    for i in range(2):
        a, b = expected[2 * i : 2 * i + 2].tolist()
        turned = complex(a, b) * cmath.exp(29j * 10000 ** (-2 * i / 4))
        expected[2 * i : 2 * i + 2] = torch.tensor([turned.real, turned.imag], dtype=torch.float64)
    found = rotate_neighbours(x, turns(x[..., 0], 10000.0, 4, None))[0, 29, 0]
    assert (found - expected).abs().max() < 1e-12
    found = hf_blocks.rotate_neighbours(x.transpose(1, 2), 4, torch.float64)[0, 0, 29]
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_run_in_sixteen_bits_with_float32_logits(dtype: torch.dtype) -> None:
    tiny = CASES["tiny"]
    exact = tiny.hf_logits(torch.float64)
    for logits in (
        tiny.original_logits(dtype),
        tiny.hf_logits(dtype),
        tiny.hf_logits(dtype, module=gptj),
    ):
        assert logits.dtype == torch.float32
        assert nmse(exact, logits) < 0.01  # measured: at most 9e-5
    state = {n: t.to(dtype) for n, t in tiny.fused().items()}
    c = ours.Config.from_original(tiny.config(), shapes_of(state), 1, {})
    assert ours.layer(ours.embed(ids(), [state], c), 0, [state], c).dtype == dtype


def test_everything_is_computed_where_the_tensors_are() -> None:
    tiny = CASES["tiny"]
    fused, apart = ({n: t.to("meta") for n, t in s.items()} for s in (tiny.fused(), tiny.tensors()))
    c = ours.Config.from_original(tiny.config(), shapes_of(fused), 1, {})
    d, e = theirs.Config.from_hf(tiny.config()), gptj.Config.from_hf(tiny.config())
    for module, state, config in ((ours, fused, c), (theirs, fused, d), (gptj, apart, e)):
        logits = module.forward(ids().to("meta"), [state], config)
        assert logits.device.type == "meta" and logits.shape == (2, T, V)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "absent": (
        {"rotary_dim": None, "n_head": None},
        {},
        "expected n_head, rotary_dim in config.json or given",
    ),
    "activation": (
        {},
        {"activation_function": "relu"},
        "`activation_function` to be one of gelu, .* `?relu",
    ),
    "heads": ({"n_head": 7}, {}, "heads that 48 channels and 4 cores can share, found 7"),
    "cores": ({}, {"mp_num": 3}, "heads that 48 channels and 3 cores can share, found 8"),
    "rotary": ({"rotary_dim": 8}, {}, "expected an even rotary_dim up to 6, found 8"),
    "layers": ({"n_layer": 4}, {}, "expected layers 0 to 3, found 3 of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    changes, overrides, message = REFUSED[name]
    tiny = CASES["tiny"]
    with pytest.raises(ValueError, match=message):
        ours.Config.from_original(tiny.config(**changes), shapes_of(tiny.fused()), 1, overrides)


def test_the_users_word_counts_and_ranks_do_not_exist() -> None:
    tiny = CASES["tiny"]
    shapes = shapes_of(tiny.fused())
    told = {
        "num_attention_heads": 4,
        "rotary_dim": 8,
        "layer_norm_epsilon": 1e-6,
        "activation_function": "gelu",
    }
    c = ours.Config.from_original(tiny.config(), shapes, 1, told)
    assert (c.n_heads, c.rotary_dim, c.norm_eps, c.gelu) == (4, 8, 1e-6, "erf")
    with pytest.raises(ValueError, match="expected one rank .* found 2"):
        ours.Config.from_original(tiny.config(), shapes, 2, {})


@pytest.mark.parametrize("module", [theirs, gptj])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": None, "rotary_dim": None}, "expected n_embd, rotary_dim in config.json, found none"),
        ({"activation_function": "relu"}, "`activation_function` to be one of gelu, .* found relu"),
        ({"tie_word_embeddings": True}, "expected `tie_word_embeddings` false in config.json, found true"),
        ({"n_head": 7}, "expected `n_head` .* 48, found 7"),
        ({"rotary_dim": 3}, "expected an even `rotary_dim` up to 6, found 3"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(module: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.Config.from_hf(CASES["tiny"].config(**change))
