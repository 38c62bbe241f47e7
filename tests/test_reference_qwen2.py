"""The readings of Qwen2, as published, as Megatron-Core has it and as transformers has it, agree with each
other, with transformers and with older computations, and stop agreeing when one rule is broken."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import converted, hf_blocks, hf_rope, loss, losses, original, rope
from ckpt_tool.reference.blocks import rotate_halves
from ckpt_tool.reference.megatron import join_stages

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

# NMSE of logits. Measured between the readings: at most 4e-30 in float64 and 2e-12 in float32.
FLOAT64_BAR, FLOAT32_BAR = 1e-20, 1e-10

V, T = 44, 30

ours, theirs = original("qwen2"), converted("Qwen2ForCausalLM")


@dataclass(frozen=True)
class Case:
    """A tiny model; `window` and `full`, the number of layers without it, or None."""

    L: int = 3
    N: int = 6
    K: int = 2
    H: int = 4
    F: int = 52
    tied: bool = False
    window: int | None = None
    full: int = 0
    theta: float = 7e4
    eps: float = 3e-4

    @property
    def D(self) -> int:
        return self.N * self.H

    def tensors(self) -> State:
        """As published, in float64."""
        D, F = self.D, self.F
        shapes: Shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        shapes |= {} if self.tied else {"lm_head.weight": (V, D)}
        for i in range(self.L):
            p = f"model.layers.{i}."
            for name, rows in (("q", self.N), ("k", self.K), ("v", self.K)):
                shapes[f"{p}self_attn.{name}_proj.weight"] = (rows * self.H, D)
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows * self.H,)
            shapes |= {p + "self_attn.o_proj.weight": (D, D), p + "mlp.down_proj.weight": (D, F)}
            shapes |= {f"{p}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
            shapes |= {f"{p}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        made = {}
        for number, (name, shape) in enumerate(sorted(shapes.items())):
            seed = torch.Generator().manual_seed(number)
            made[name] = torch.randn(shape, generator=seed, dtype=torch.float64) * 0.2 + ("norm" in name)
        return made

    def config(self, **changes: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"hidden_size": self.D, "num_hidden_layers": self.L, "vocab_size": V}
        made |= {"num_attention_heads": self.N, "num_key_value_heads": self.K, "intermediate_size": self.F}
        made |= {"rms_norm_eps": self.eps, "rope_theta": self.theta, "tie_word_embeddings": self.tied}
        made |= {"hidden_act": "silu", "max_position_embeddings": 131072, "model_type": "qwen2"}
        made |= {"use_sliding_window": self.window is not None, "sliding_window": self.window or 3}
        return made | {"max_window_layers": self.full, "architectures": ["Qwen2ForCausalLM"]} | changes

    def args(self, **changes: Any) -> dict[str, Any]:
        """As Megatron pickles them."""
        made: dict[str, Any] = {"num_layers": self.L, "hidden_size": self.D, "num_attention_heads": self.N}
        made |= {"ffn_hidden_size": self.F, "kv_channels": self.H, "norm_epsilon": self.eps}
        made |= {
            "group_query_attention": self.K < self.N,
            "num_query_groups": self.K if self.K < self.N else 1,
        }
        made |= {"rotary_base": self.theta, "swiglu": True, "normalization": "RMSNorm", "num_experts": None}
        made |= {"add_bias_linear": False, "add_qkv_bias": True, "position_embedding_type": "rope"}
        made |= {"rotary_percent": 1.0, "rotary_interleaved": False, "padded_vocab_size": V + 4}
        return made | {"untie_embeddings_and_output_weights": not self.tied} | changes

    def megatron(
        self, ranks: int = 1, *, engine: bool = True, prefix: str = "model.", stages: int = 1
    ) -> list[list[State]]:
        """The tensors of each file, [rank][stage]; words padded by four rows. Row h of query j of group g is
        at (g * (N/K + 2) + j) * H + h of the fused tensor, the key at j = N/K, the value after it."""
        full, S, M = self.tensors(), ranks, self.N // self.K
        files: list[list[State]] = [[{} for _ in range(stages)] for _ in range(S)]

        def put(stage: int, name: str, parts: list[Tensor]) -> None:
            for rank, part in zip(files, parts, strict=True):
                rank[stage][prefix + name] = part

        padding = torch.full((4, self.D), 9.0, dtype=torch.float64)
        words = torch.cat([full["model.embed_tokens.weight"], padding]).chunk(S)
        put(0, "embedding.word_embeddings.weight", list(words))
        put(stages - 1, "decoder.final_layernorm.weight", [full["model.norm.weight"]] * S)
        if not self.tied:
            put(
                stages - 1, "output_layer.weight", list(torch.cat([full["lm_head.weight"], padding]).chunk(S))
            )
        elif stages > 1:
            put(stages - 1, "output_layer.weight", list(words))
        norms = (
            ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
            if engine
            else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        )
        each = self.L // stages
        for i in range(self.L):
            stage, p, own = i // each, f"decoder.layers.{i % each}.", f"model.layers.{i}."
            put(stage, p + norms[0], [full[own + "input_layernorm.weight"]] * S)
            put(stage, p + norms[1], [full[own + "post_attention_layernorm.weight"]] * S)
            for kind in ("weight", "bias"):
                q, k, v = (
                    full[f"{own}self_attn.{n}_proj.{kind}"].chunk(h)
                    for n, h in zip("qkv", (self.N, self.K, self.K), strict=True)
                )
                groups = [torch.cat([*q[g * M : (g + 1) * M], k[g], v[g]]) for g in range(self.K)]
                put(stage, f"{p}self_attention.linear_qkv.{kind}", list(torch.cat(groups).chunk(S)))
            gate, up = (full[f"{own}mlp.{n}_proj.weight"].chunk(S) for n in ("gate", "up"))
            put(stage, p + "mlp.linear_fc1.weight", [torch.cat(pair) for pair in zip(gate, up, strict=True)])
            for name, mine in (
                ("self_attention.linear_proj", "self_attn.o_proj"),
                ("mlp.linear_fc2", "mlp.down_proj"),
            ):
                put(stage, p + name + ".weight", list(full[f"{own}{mine}.weight"].chunk(S, 1)))
            put(stage, p + "mlp.linear_fc1._extra_state", [torch.zeros(0)] * S)
        return files

    def original_logits(self, dtype: torch.dtype, **changes: Any) -> Tensor:
        state = {n: t.to(dtype) for n, t in self.tensors().items()}
        c = ours.Config.from_original(self.config(), shapes_of(state), 1, {})
        logits: Tensor = ours.forward(ids(), [state], replace(c, **changes))
        return logits

    def megatron_logits(self, dtype: torch.dtype, files: Sequence[Mapping[str, Tensor]]) -> Tensor:
        ranks = [{n: t.to(dtype) for n, t in f.items()} for f in files]
        c = ours.Config.from_original(self.args(), shapes_of(ranks[0]), len(ranks), {"vocab_size": V})
        logits: Tensor = ours.forward(ids(), ranks, c)
        return logits

    def hf_logits(
        self, dtype: torch.dtype, state: State | None = None, changes: Mapping[str, Any] | None = None
    ) -> Tensor:
        c = theirs.Config.from_hf(self.config(**(changes or {})))
        w = {n: t.to(dtype) for n, t in (state or self.tensors()).items()}
        logits: Tensor = theirs.forward(ids(), [w], c)
        return logits


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(t.shape) for name, t in state.items()}


def ids() -> Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(5))


def nmse(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return ((reference - other).square().mean() / reference.var()).item()


CASES = {
    "grouped": Case(),
    "tied": Case(tied=True),
    "one-key": Case(K=1),
    "multi-head": Case(N=4, K=4, H=6),
    "seven-to-one": Case(N=14, K=2),
    "eleven-layers": Case(L=11),
    "window": Case(window=5),
    "window-from-layer-2": Case(L=4, window=5, full=2),
    "window-in-no-layer": Case(window=5, full=28),
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


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "local"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["grouped", "tied", "multi-head", "seven-to-one", "eleven-layers"])
def test_megatron_core_is_the_same_model(name: str, ranks: int, engine: bool) -> None:
    tiny = CASES[name]
    if tiny.K % ranks:
        tiny = replace(tiny, N=12, K=4)
    files = [stages[0] for stages in tiny.megatron(ranks, engine=engine)]
    expected, found = tiny.hf_logits(torch.float64), tiny.megatron_logits(torch.float64, files)
    assert found.shape == expected.shape == (2, T, V)
    assert nmse(expected, found) <= FLOAT64_BAR


@pytest.mark.parametrize("name", ["grouped", "tied"])
@pytest.mark.parametrize(("ranks", "prefix"), [(1, "model."), (2, "model."), (2, "")])
def test_pipeline_stages_are_joined(name: str, ranks: int, prefix: str) -> None:
    tiny = CASES[name]
    files = [join_stages(stages) for stages in tiny.megatron(ranks, prefix=prefix, stages=3)]
    assert nmse(tiny.hf_logits(torch.float64), tiny.megatron_logits(torch.float64, files)) <= FLOAT64_BAR


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_layers_run_one_by_one_in_lockstep(ranks: int) -> None:
    tiny = CASES["grouped"]
    files = [stages[0] for stages in tiny.megatron(ranks)] if ranks else [tiny.tensors()]
    params = tiny.args() if ranks else tiny.config()
    c = ours.Config.from_original(params, shapes_of(files[0]), max(1, ranks), {"vocab_size": V})
    w, d = [tiny.tensors()], theirs.Config.from_hf(tiny.config())
    x = ours.embed(ids(), files, c)
    assert torch.equal(x, theirs.embed(ids(), w, d)) and x.shape == (2, T, tiny.D)
    for i in range(c.n_layers):
        after = ours.layer(x, i, files, c)
        assert nmse(after, theirs.layer(x, i, w, d)) <= FLOAT64_BAR
        x = after
    assert nmse(ours.head(x, files, c), theirs.head(x, w, d)) <= FLOAT64_BAR


def judge(tiny: Case, architecture: str, state: State, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    told = tiny.config(**config)
    told["rope_parameters"] = {"rope_type": "default", "rope_theta": told.pop("rope_theta")}
    made = transformers.Qwen2Config(**told, attn_implementation="eager")
    model = getattr(transformers, architecture)(made).eval()
    missing, unknown = model.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
    assert not unknown and set(missing) <= ({"lm_head.weight"} if tiny.tied else set())
    model.tie_weights()
    return model


def test_transformers_agrees_in_float32(tiny: Case) -> None:
    with torch.no_grad():
        expected = judge(tiny, "Qwen2ForCausalLM", tiny.tensors())(ids()).logits
    for found in (tiny.original_logits(torch.float32), tiny.hf_logits(torch.float32)):
        assert nmse(expected, found) <= FLOAT32_BAR  # measured: at most 2e-12
        assert torch.equal(expected.argmax(-1), found.argmax(-1))


def test_layer_types_say_which_layers_have_the_window() -> None:
    tiny = CASES["window-from-layer-2"]
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    with torch.no_grad():
        expected = judge(tiny, "Qwen2ForCausalLM", tiny.tensors(), layer_types=kinds)(ids()).logits
    config = tiny.config(layer_types=kinds)
    c = ours.Config.from_original(config, shapes_of(tiny.tensors()), 1, {})
    assert c.windows == theirs.Config.from_hf(config).windows == (5, None, None, 5)
    w = [{n: t.float() for n, t in tiny.tensors().items()}]
    assert nmse(expected, ours.forward(ids(), w, c)) <= FLOAT32_BAR
    assert nmse(expected, tiny.hf_logits(torch.float32)) > 0.01


HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base_model": ("Qwen2Model", ("last_hidden_state",)),
    "causal_lm": ("Qwen2ForCausalLM", ("logits",)),
    "sequence_classification": ("Qwen2ForSequenceClassification", ("logits",)),
    "token_classification": ("Qwen2ForTokenClassification", ("logits",)),
    "question_answering": ("Qwen2ForQuestionAnswering", ("start_logits", "end_logits")),
}


@pytest.mark.parametrize("head", theirs.HEADS)
def test_heads_are_those_of_transformers(head: str) -> None:
    tiny, (architecture, outputs) = CASES["grouped"], HEADS[head]
    seed, D = torch.Generator().manual_seed(3), CASES["grouped"].D
    own: dict[str, Shapes] = {
        "sequence_classification": {"score.weight": (3, D)},
        "token_classification": {"score.weight": (3, D), "score.bias": (3,)},
        "question_answering": {"qa_outputs.weight": (2, D), "qa_outputs.bias": (2,)},
    }
    state = {n: t for n, t in tiny.tensors().items() if head == "causal_lm" or n != "lm_head.weight"}
    prefix = {"base_model": "", "question_answering": "transformer."}.get(head, "model.")
    state = {n.replace("model.", prefix, 1): t for n, t in state.items()}
    for name, shape in own.get(head, {}).items():
        state[name] = torch.randn(shape, generator=seed, dtype=torch.float64)
    labels: dict[str, Tensor] = {}
    if head == "sequence_classification":
        labels = {"labels": torch.tensor([2, 0])}
    elif head == "token_classification":
        labels = {"labels": ids() % 3}
    elif head == "question_answering":
        labels = {"start_positions": torch.tensor([3, 25]), "end_positions": torch.tensor([6, 90])}
    elif head == "causal_lm":
        labels = {"labels": ids()}
    model = judge(tiny, architecture, state, num_labels=3, pad_token_id=0)
    with torch.no_grad():
        out = model(ids(), **labels)
    c = theirs.Config.from_hf(tiny.config(architectures=[architecture]))
    w = [{n: t.float() for n, t in state.items()}]
    found = theirs.HEADS[head](theirs.encode(ids(), w, c), w, c)
    if head == "sequence_classification":
        found = hf_blocks.of_last_token(found, ids(), 0)
    made = found if isinstance(found, tuple) else (found,)
    for output, one in zip(outputs, made, strict=True):
        assert out[output].shape == one.shape and nmse(out[output], one) <= FLOAT32_BAR
    loss_of = {
        "causal_lm": losses.next_token,
        "sequence_classification": losses.classification,
        "token_classification": losses.labelled,
        "question_answering": losses.span,
    }
    if labels:
        assert loss_of[head](*made, *labels.values()).item() == pytest.approx(out.loss.item(), abs=1e-5)


def test_a_toy_has_the_values_of_two_older_computations() -> None:
    """Weights by a formula over the sorted names; 16 words, 16 channels, 12 units, 4 heads, 2 with keys."""
    shapes: Shapes = {"model.embed_tokens.weight": (16, 16), "lm_head.weight": (16, 16)}
    shapes |= {"model.norm.weight": (16,)}
    for i in range(2):
        p = f"model.layers.{i}."
        for n, width in (("q", 16), ("k", 8), ("v", 8)):
            shapes |= {f"{p}self_attn.{n}_proj.weight": (width, 16), f"{p}self_attn.{n}_proj.bias": (width,)}
        shapes |= {p + "self_attn.o_proj.weight": (16, 16), p + "mlp.down_proj.weight": (16, 12)}
        shapes |= {p + "mlp.gate_proj.weight": (12, 16), p + "mlp.up_proj.weight": (12, 16)}
        shapes |= {p + "input_layernorm.weight": (16,), p + "post_attention_layernorm.weight": (16,)}
    state: State = {}
    for k, name in enumerate(sorted(shapes), 1):
        e = torch.arange(1, math.prod(shapes[name]) + 1, dtype=torch.float64)
        t = 0.3 * torch.sin(0.1 * e.square() + k) + float("norm" in name)
        state[name] = t.float().view(shapes[name])
    told: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    told |= {"hidden_size": 16, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_window_layers": 0}
    rows = torch.tensor([[3, 7, 5, 9, 2, 11, 4]])
    expected: tuple[tuple[int | None, tuple[float, ...], float, float], ...] = (
        (None, (0.52993, -0.34922, -0.97885, 0.24488), -2.2404, 3.57643),
        (3, (1.16442, 0.21003, -1.41184, -0.02394), 5.6164, 3.76210),
    )
    for window, last, total, nats in expected:
        config = told | {"use_sliding_window": window is not None, "sliding_window": window}
        c = ours.Config.from_original(config, shapes, 1, {})
        for module, d in ((ours, c), (theirs, theirs.Config.from_hf(config))):
            logits = module.forward(rows, [state], d)
            assert logits[0, -1, :4].tolist() == pytest.approx(last, abs=2e-5)
            assert logits.sum().item() == pytest.approx(total, abs=3e-4)
            assert loss(logits, rows) == pytest.approx(nats, abs=2e-5)


def exchanged(one: str, other: str) -> Callable[[State], State]:
    """Tensors of a layer that take each other's place."""

    def change(state: State) -> State:
        return {n.replace(one, "\0").replace(other, one).replace("\0", other): t for n, t in state.items()}

    return change


def without(words: str) -> Callable[[State], State]:
    """Zero instead of the tensors whose names have `words`."""
    return lambda state: {n: torch.zeros_like(t) if words in n else t for n, t in state.items()}


def turned(*names: str) -> Callable[[State], State]:
    """Rows of each head permuted from neighbours to halves, as the weights of other families must be."""

    def change(state: State) -> State:
        made = dict(state)
        for name in state:
            if any(f"{n}_proj" in name for n in names):
                heads = state[name].view(-1, 2, 2, *state[name].shape[1:])  # heads of width 4
                made[name] = heads.transpose(1, 2).flatten(0, 2)
        return made

    return change


def unchanged(state: State) -> State:
    return state


# Mistakes in the converted model: name of the case, change of the tensors, of config.json.
MISTAKES: dict[str, tuple[str, Callable[[State], State], dict[str, Any]]] = {
    **{f"no-bias-of-{n}": ("grouped", without(f"{n}_proj.bias"), {}) for n in "qkv"},
    "no-bias": ("grouped", without(".bias"), {}),
    "k-and-v": ("grouped", exchanged("k_proj", "v_proj"), {}),
    "biases-of-k-and-v": ("grouped", exchanged("k_proj.bias", "v_proj.bias"), {}),
    "gate-and-up": ("grouped", exchanged("gate_proj", "up_proj"), {}),
    "norms": ("grouped", exchanged("input_layernorm", "post_attention_layernorm"), {}),
    "turned-again": ("grouped", turned("q", "k"), {}),
    "only-q-turned": ("grouped", turned("q"), {}),
    "theta": ("grouped", unchanged, {"rope_theta": 1e4}),
    "eps": ("grouped", unchanged, {"rms_norm_eps": 1e-6}),
    "one-key-for-all": ("grouped", lambda s: s | first_keys(s), {}),
    "tied": ("grouped", unchanged, {"tie_word_embeddings": True}),
    "no-window": ("window", unchanged, {"use_sliding_window": False}),
    "window-4": ("window", unchanged, {"sliding_window": 4}),
    "window-6": ("window", unchanged, {"sliding_window": 6}),
    "window-in-all-layers": ("window-from-layer-2", unchanged, {"max_window_layers": 0}),
    "window-in-one-layer-less": ("window-from-layer-2", unchanged, {"max_window_layers": 3}),
    "window-in-the-other-layers": (
        "window-from-layer-2",
        unchanged,
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
    ),
    "window-though-unused": ("grouped", unchanged, {"use_sliding_window": True}),
}


def first_keys(state: State) -> State:
    """Every group with the first one's key and value."""
    names = [n for n in state if "k_proj" in n or "v_proj" in n]
    return {n: torch.cat([state[n][:4]] * (len(state[n]) // 4)) for n in names}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_far_above_the_bar(mistake: str) -> None:
    name, change, config = MISTAKES[mistake]
    tiny = CASES[name]
    wrong = tiny.hf_logits(torch.float32, change(tiny.tensors()), config)
    # measured: 1e-4 for epsilon, 5e-3 for theta, 5e-2 to 2 for the rest
    assert nmse(tiny.original_logits(torch.float32), wrong) > 1e4 * FLOAT32_BAR


def regrouped(order: tuple[int, ...], names: str = "linear_qkv.") -> Callable[[State], State]:
    """Heads of the fused tensors taken in another order; each group has 3 queries, a key and a value."""

    def change(state: State) -> State:
        made = dict(state)
        for name, t in state.items():
            if names in name and "norm" not in name:
                heads = t.chunk(10)
                made[name] = torch.cat([heads[j] for j in order])
        return made

    return change


def halves_exchanged(state: State) -> State:
    return {
        n: torch.cat(t.chunk(2)[::-1]) if n.endswith("linear_fc1.weight") else t for n, t in state.items()
    }


MISREAD: dict[str, Callable[[State], State]] = {
    "queries-then-keys-then-values": regrouped((0, 1, 2, 5, 6, 7, 3, 8, 4, 9)),
    "only-the-bias-so": regrouped((0, 1, 2, 5, 6, 7, 3, 8, 4, 9), "linear_qkv.bias"),
    "value-before-key": regrouped((0, 1, 2, 4, 3, 5, 6, 7, 9, 8)),
    "up-before-gate": halves_exchanged,
}


@pytest.mark.parametrize("mistake", MISREAD)
def test_another_order_in_megatrons_tensors_is_another_model(mistake: str) -> None:
    tiny = CASES["grouped"]
    wrong = MISREAD[mistake](tiny.megatron()[0][0])
    assert nmse(tiny.hf_logits(torch.float64), tiny.megatron_logits(torch.float64, [wrong])) > 0.01


def test_ranks_joined_as_they_are_are_another_model() -> None:
    """Two ranks' gates and ups, one below the other, and ranks that changed places."""
    tiny = CASES["grouped"]
    expected, files = tiny.hf_logits(torch.float64), [stages[0] for stages in tiny.megatron(2)]
    assert nmse(expected, tiny.megatron_logits(torch.float64, files[::-1])) > 0.1
    whole = tiny.megatron()[0][0]
    for name in whole:
        if name.endswith("linear_fc1.weight"):
            whole[name] = torch.cat([f[name] for f in files])
    assert nmse(expected, tiny.megatron_logits(torch.float64, [whole])) > 0.1


def test_channels_half_a_head_apart_are_turned_by_exact_angles() -> None:
    tiny = CASES["multi-head"]
    c = ours.Config.from_original(tiny.config(), shapes_of(tiny.tensors()), 1, {})
    d = theirs.Config.from_hf(tiny.config())
    expected = [cmath.exp(599j * tiny.theta ** (-2 * i / 6)) for i in range(3)]
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-4)):
        x = torch.ones(1, 600, 1, 6, dtype=dtype)
        cos, sin = hf_rope.rotation(x[..., 0], d.rope_theta, d.head_dim, d.rope_scaling)
        turned = rope.turns(x[..., 0], c.rope_theta, c.head_dim, c.rope_scaling)
        for turns in (turned[599], torch.complex(cos, sin)[599, :3]):
            assert (turns - torch.tensor(expected, dtype=torch.complex128)).abs().max() < bound
        turned_ones = rotate_halves(x, turned)[0, 599, 0]
        assert (turned_ones[:3] - cos[599, :3] + sin[599, :3]).abs().max() < bound
        assert (turned_ones[3:] - cos[599, :3] - sin[599, :3]).abs().max() < bound


def test_a_window_hides_what_lies_before_it() -> None:
    tiny, i = CASES["window"], 0
    state = tiny.tensors()
    c, d = (
        ours.Config.from_original(tiny.config(), shapes_of(state), 1, {}),
        theirs.Config.from_hf(tiny.config()),
    )
    for module, config in ((ours, c), (theirs, d)):
        x = module.embed(ids(), [state], config)
        moved = x.clone()
        moved[:, 20] += 1
        seen = (module.layer(x, i, [state], config) != module.layer(moved, i, [state], config)).any(-1)[0]
        assert seen.nonzero().flatten().tolist() == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_run_in_sixteen_bits_with_float32_logits(dtype: torch.dtype) -> None:
    tiny = CASES["grouped"]
    exact = tiny.hf_logits(torch.float64)
    files = [stages[0] for stages in tiny.megatron(2)]
    for logits in (tiny.original_logits(dtype), tiny.megatron_logits(dtype, files), tiny.hf_logits(dtype)):
        assert logits.dtype == torch.float32
        assert nmse(exact, logits) < 0.01  # measured: at most 5e-4
    state = {n: t.to(dtype) for n, t in tiny.tensors().items()}
    c = ours.Config.from_original(tiny.config(), shapes_of(state), 1, {})
    assert ours.layer(ours.embed(ids(), [state], c), 0, [state], c).dtype == dtype


def test_everything_is_computed_where_the_tensors_are() -> None:
    tiny = CASES["window"]
    state = {n: t.to("meta") for n, t in tiny.tensors().items()}
    files = [{n: t.to("meta") for n, t in stages[0].items()} for stages in tiny.megatron(2)]
    c = ours.Config.from_original(tiny.config(), shapes_of(state), 1, {})
    e = ours.Config.from_original(tiny.args(), shapes_of(files[0]), 2, {"vocab_size": V})
    for module, ranks, config in (
        (ours, [state], c),
        (ours, files, e),
        (theirs, [state], theirs.Config.from_hf(tiny.config())),
    ):
        logits = module.forward(ids().to("meta"), ranks, config)
        assert logits.device.type == "meta" and logits.shape == (2, T, V)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "theta": (
        {"rope_theta": None},
        "expected rope_theta in config.json or given by name, found none",
    ),
    "scaled": (
        {"rope_scaling": {"type": "longrope", "factor": 4.0}},
        "rope_type to be one of linear, dynamic, yarn, llama3, found `longrope`",
    ),
    "activation": ({"hidden_act": "gelu"}, "expected `hidden_act` silu, found gelu"),
    "window": (
        {"use_sliding_window": True, "max_window_layers": None},
        "max_window_layers or layer_types",
    ),
    "kinds": (
        {"use_sliding_window": True, "layer_types": ["full_attention"]},
        "expected layer_types for 3 layers, found 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    params, message = REFUSED[name]
    shapes = shapes_of(CASES["grouped"].tensors())
    with pytest.raises(ValueError, match=message):
        ours.Config.from_original(CASES["grouped"].config(**params), shapes, 1, {})


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_a_tensor_that_is_not_there_is_named(missing: str) -> None:
    tiny, state = CASES["grouped"], CASES["grouped"].tensors()
    del state[missing]
    for module, c in (
        (ours, ours.Config.from_original(tiny.config(), shapes_of(state), 1, {})),
        (theirs, theirs.Config.from_hf(tiny.config())),
    ):
        with pytest.raises(KeyError, match=missing):
            module.forward(ids(), [state], c)


def test_an_untied_output_layer_is_not_taken_from_the_words() -> None:
    tiny = CASES["grouped"]
    state = tiny.megatron()[0][0]
    del state["model.output_layer.weight"]
    with pytest.raises(KeyError, match="model.output_layer.weight"):
        tiny.megatron_logits(torch.float64, [state])


REFUSED_ARGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({name: value}, f"`{name}` .*found {value}")
        for name, value in (
            ("swiglu", False),
            ("normalization", "LayerNorm"),
            ("add_bias_linear", True),
            ("add_qkv_bias", False),
            ("position_embedding_type", "learned_absolute"),
            ("rotary_percent", 0.5),
            ("rotary_interleaved", True),
            ("apply_layernorm_1p", True),
        )
    },
    "experts": ({"num_experts": 8}, "expected no `num_experts`, found 8"),
    "window": ({"window_size": (127, 0)}, r"expected no `window_size`, found \(127, 0\)"),
}


@pytest.mark.parametrize("name", REFUSED_ARGS)
def test_args_of_another_model_are_refused(name: str) -> None:
    params, message = REFUSED_ARGS[name]
    tiny = CASES["grouped"]
    shapes = shapes_of(tiny.megatron()[0][0])
    with pytest.raises(ValueError, match=message):
        ours.Config.from_original(tiny.args(**params), shapes, 1, {})


def test_where_the_numbers_come_from() -> None:
    tiny = CASES["grouped"]
    shapes, core = shapes_of(tiny.tensors()), shapes_of(tiny.megatron()[0][0])
    newer = tiny.config(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 3e5})
    assert ours.Config.from_original(newer, shapes, 1, {}).rope_theta == 3e5
    assert ours.Config.from_original(newer, shapes, 1, {"rope_theta": 2e5}).rope_theta == 2e5
    args = {"args": tiny.args(), "checkpoint_version": 3.0}
    c = ours.Config.from_original(args, core, 1, {"rms_norm_eps": 1e-5})
    assert (c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim) == (3, 6, 2, 4)
    assert (c.norm_eps, c.rope_theta, c.n_words, c.windows) == (1e-5, 7e4, V + 4, (None,) * 3)
    told = {k: v for k, v in tiny.config().items() if k != "intermediate_size"}
    assert ours.Config.from_original({}, core, 1, told).n_words == V
    with pytest.raises(ValueError, match="expected one rank .* found 2"):
        ours.Config.from_original(tiny.config(), shapes, 2, {})
    with pytest.raises(
        ValueError, match="expected num_hidden_layers, num_attention_heads, .*rope_theta in config"
    ):
        ours.Config.from_original({}, core, 1, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rms_norm_eps": None, "hidden_size": None},
            "expected hidden_size, rms_norm_eps in config.json, found",
        ),
        ({"rope_theta": None}, "expected a number as rope_theta in config.json, found null"),
        ({"hidden_act": "gelu"}, "expected `hidden_act` silu in config.json, found gelu"),
        ({"rope_scaling": {"type": "su"}}, "expected rope_type to be one of default, .*found `su`"),
        ({"rope_scaling": {"type": "yarn"}}, "expected factor beside rope_type `yarn`"),
        (
            {"rope_parameters": {"rope_theta": 1.0}},
            "expected one rope_theta in config.json, found 1.0, 70000.0",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": None},
            "expected max_window_layers or layer_types",
        ),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "for 3 layers, found"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        theirs.Config.from_hf(CASES["grouped"].config(**change))
