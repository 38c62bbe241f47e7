"""The readings of the original and of the Hugging Face layout agree with each other, with transformers and
with a trained model, and stop agreeing when one rule is broken."""

from __future__ import annotations

import cmath
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import (
    architectures,
    converted,
    families,
    generate,
    hf_rope,
    loss,
    original,
    rope,
)

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = Path(__file__).parents[1].parent / "shared" / "real" / "aidreams260K"
State = dict[str, Tensor]

# NMSE of logits. Measured between the two readings: at most 2e-29 in float64 and 6e-12 in float32.
FLOAT64_BAR, FLOAT32_BAR = 1e-20, 1e-10


@dataclass(frozen=True)
class Case:
    """A tiny model of one family in float64; `full` has the original's names, not yet split over ranks."""

    family: str
    architecture: str
    params: dict[str, Any]
    hf_config: dict[str, Any]
    full: State
    tokens: int = 64
    ranks: int = 1
    rows: bool = False  # the embedding is split by rows (Llama 3), not by columns
    stacked: bool = False

    @property
    def readings(self) -> tuple[ModuleType, ModuleType]:
        return original(self.family), converted(self.architecture)

    def ids(self) -> Tensor:
        seed = torch.Generator().manual_seed(5)
        return torch.randint(self.hf_config["vocab_size"], (2, self.tokens), generator=seed)

    def original_logits(self, dtype: torch.dtype, **changes: Any) -> Tensor:
        files = [stack(self.full, self.hf_config)] if self.stacked else split(self)
        files = [{name: t.to(dtype) for name, t in f.items()} for f in files]
        shapes = {name: tuple(t.shape) for name, t in files[0].items()}
        reading = self.readings[0]
        c = replace(reading.Config.from_original(self.params, shapes, self.ranks, {}), **changes)
        logits: Tensor = reading.forward(self.ids(), files, c)
        return logits

    def hf_logits(self, dtype: torch.dtype, state: State | None = None, **changes: Any) -> Tensor:
        state = hf_state(self) if state is None else state
        c = replace(self.readings[1].Config.from_hf(self.hf_config), **changes)
        logits: Tensor = self.readings[1].forward(
            self.ids(), [{name: t.to(dtype) for name, t in state.items()}], c
        )
        return logits


def build(
    family: str, *, D: int, L: int, N: int, K: int, H: int, F: int, V: int, E: int = 0, **facts: Any
) -> Case:
    eps, theta, window, tied = facts["eps"], facts["theta"], facts.get("window"), facts.get("tied", False)
    shapes = {"tok_embeddings.weight": (V, D), "norm.weight": (D,), "output.weight": (V, D)}
    for i in range(L):
        p = f"layers.{i}."
        shapes |= {p + "attention_norm.weight": (D,), p + "ffn_norm.weight": (D,)}
        shapes |= {f"{p}attention.{n}.weight": (h * H, D) for n, h in (("wq", N), ("wk", K), ("wv", K))}
        shapes |= {p + "attention.wo.weight": (D, N * H)}
        experts = [f"experts.{e}." for e in range(E)] or [""]
        shapes |= {f"{p}feed_forward.{e}{n}.weight": (F, D) for e in experts for n in ("w1", "w3")}
        shapes |= {f"{p}feed_forward.{e}w2.weight": (D, F) for e in experts}
        shapes |= {p + "feed_forward.gate.weight": (E, D)} if E else {}
    seed = torch.Generator().manual_seed(11)
    full = {
        name: torch.randn(shape, generator=seed, dtype=torch.float64) * 0.2 + ("norm" in name)
        for name, shape in shapes.items()
    }
    params = {"dim": D, "n_layers": L, "n_heads": N, "n_kv_heads": K, "norm_eps": eps, "vocab_size": V}
    hf_config = {
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "intermediate_size": F,
        "vocab_size": V,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
    }
    params["rope_theta"] = theta
    if family == "llama":
        params |= {"use_scaled_rope": True} if facts.get("scaled") else {}
        hf_config["rope_scaling"] = LLAMA3_SCALING if facts.get("scaled") else None
    else:
        params |= {"hidden_dim": F, "head_dim": H, "sliding_window": window}
        hf_config |= {"head_dim": H, "sliding_window": window}
    if E:
        params["moe"] = {"num_experts": E, "num_experts_per_tok": 2}
        hf_config |= {"num_local_experts": E, "num_experts_per_tok": 2}
    if tied:
        full["output.weight"] = full["tok_embeddings.weight"].clone()
    rest = {k: facts[k] for k in ("tokens", "ranks", "rows", "stacked") if k in facts}
    architecture = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral"}[family] + "ForCausalLM"
    hf_config |= {"architectures": [architecture], "model_type": family}
    return Case(family, architecture, params, hf_config, full, **rest)


LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def split(case: Case) -> list[State]:
    """One state dict per model-parallel rank, split as Meta's layers are: by column, by row or replicated."""
    S, K, columns = case.ranks, case.params["n_kv_heads"], ("wq", "w1", "w3", "output")
    ranks: list[State] = [{"rope.freqs": torch.ones(3)} for _ in range(S)] if case.family == "llama" else [{}]
    for name, t in case.full.items():
        kind = name.split(".")[-2]
        if kind in ("wk", "wv"):
            heads = t.view(K, -1, t.shape[1])
            parts = [
                heads[r * K // S : max((r + 1) * K // S, r * K // S + 1)].flatten(0, 1) for r in range(S)
            ]
        elif kind in columns or (kind == "tok_embeddings" and case.rows):
            parts = list(t.chunk(S, 0))
        elif kind in ("wo", "w2", "tok_embeddings"):
            parts = list(t.chunk(S, 1))
        else:
            parts = [t] * S
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part
    return ranks


def stack(full: State, config: Mapping[str, Any]) -> State:
    """The names of the first Mixtral download: all experts in three tensors, w2 transposed."""
    state = {
        n.replace("feed_forward.gate", "block_sparse_moe.gate"): t
        for n, t in full.items()
        if "experts" not in n
    }
    for i in range(config["num_hidden_layers"]):
        for n in ("w1", "w2", "w3"):
            each = [
                full[f"layers.{i}.feed_forward.experts.{e}.{n}.weight"]
                for e in range(config["num_local_experts"])
            ]
            state[f"layers.{i}.block_sparse_moe.{n}"] = torch.cat([t.T if n == "w2" else t for t in each])
    return state


HF_NAMES = (
    ("tok_embeddings", "model.embed_tokens"),
    ("layers.", "model.layers."),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.", "block_sparse_moe."),
    ("output", "lm_head"),
)


def hf_state(case: Case, permuted: tuple[str, ...] = ("wq", "wk")) -> State:
    state = {}
    for name, t in case.full.items():
        kind = name.split(".")[-2]
        if kind in permuted:
            t = to_halves(t, case.params["n_heads" if kind == "wq" else "n_kv_heads"])
        if name == "norm.weight":
            name = "model.norm.weight"
        for old, new in HF_NAMES:
            name = (
                name.replace(old, new) if not name.startswith("model.layers.") or old != "layers." else name
            )
        state[name] = t
    if case.hf_config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return state


def to_halves(t: Tensor, heads: int) -> Tensor:
    """Rows (pair 0 real, pair 0 imaginary, pair 1 real, ...) of each head to (all real, all imaginary)."""
    H = len(t) // heads
    order = [h * H + 2 * i + s for h in range(heads) for s in (0, 1) for i in range(H // 2)]
    return t[order]


def nmse(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return ((reference - other).square().mean() / reference.var()).item()


LLAMA: dict[str, Any] = dict(D=48, N=8, K=2, H=6, F=76, V=92, eps=3e-4, theta=3e4)
SCALED: dict[str, Any] = dict(
    D=128, L=2, N=4, K=2, H=32, F=76, V=92, eps=3e-4, theta=5e5, scaled=True, tokens=600
)
MISTRAL: dict[str, Any] = dict(D=40, L=4, N=6, K=3, H=10, F=52, V=70, eps=3e-4, theta=7e4)
MIXTRAL: dict[str, Any] = dict(D=24, L=3, N=6, K=2, H=4, F=20, V=50, E=5, eps=3e-4, theta=2e5)
CASES = {
    "llama-1": build("llama", L=3, **LLAMA | {"K": 8}),
    "llama-1-two-ranks": build("llama", L=3, ranks=2, **LLAMA | {"K": 8}),
    "llama-2-grouped-two-ranks": build("llama", L=2, ranks=2, **LLAMA),
    "llama-2-more-ranks-than-kv-heads": build("llama", L=2, ranks=4, **LLAMA),
    "llama-eleven-layers": build("llama", L=11, **LLAMA, tokens=24),
    "llama-3-four-ranks": build("llama", L=2, ranks=4, rows=True, **LLAMA),
    "llama-3.1-long": build("llama", **SCALED),
    "llama-3.2-tied": build("llama", **SCALED | {"tied": True, "tokens": 100}),
    "mistral": build("mistral", **MISTRAL),
    "mistral-window": build("mistral", window=5, **MISTRAL),
    "mistral-long": build("mistral", window=260, tokens=600, **MISTRAL | {"L": 2}),
    "mixtral": build("mixtral", **MIXTRAL),
    "mixtral-stacked": build("mixtral", stacked=True, **MIXTRAL),
    "mixtral-window": build("mixtral", window=5, **MIXTRAL),
}


@pytest.fixture(params=CASES)
def tiny(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, FLOAT64_BAR), (torch.float32, FLOAT32_BAR)])
def test_both_readings_agree(tiny: Case, dtype: torch.dtype, bar: float) -> None:
    ours, theirs = tiny.original_logits(dtype), tiny.hf_logits(dtype)
    assert ours.dtype == theirs.dtype == dtype
    assert nmse(ours, theirs) <= bar
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", ["llama-2-grouped-two-ranks", "mistral-window", "mixtral-stacked"])
def test_layers_run_one_by_one_in_lockstep(name: str) -> None:
    tiny = CASES[name]
    (ours, theirs), ids = tiny.readings, tiny.ids()
    files = [stack(tiny.full, tiny.hf_config)] if tiny.stacked else split(tiny)
    shapes = {n: tuple(t.shape) for n, t in files[0].items()}
    c, d = (
        ours.Config.from_original(tiny.params, shapes, tiny.ranks, {}),
        theirs.Config.from_hf(tiny.hf_config),
    )
    w = [hf_state(tiny)]
    x = ours.embed(ids, files, c)
    assert torch.equal(x, theirs.embed(ids, w, d)) and x.shape == (2, 64, tiny.params["dim"])
    for i in range(c.n_layers):
        after = ours.layer(x, i, files, c)
        assert nmse(after, theirs.layer(x, i, w, d)) <= FLOAT64_BAR
        x = after
    assert nmse(ours.head(x, files, c), theirs.head(x, w, d)) <= FLOAT64_BAR


def transformers_logits(tiny: Case, folder: Path, dtype: torch.dtype) -> Tensor:
    """Logits of the model that transformers loads from a folder with the Hugging Face layout."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(tiny.hf_config))
    state = {name: t.to(dtype).contiguous() for name, t in hf_state(tiny).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        logits: Tensor = model(tiny.ids()).logits
    return logits


def test_transformers_agrees_in_float32(tiny: Case, tmp_path: Path) -> None:
    judge = transformers_logits(tiny, tmp_path, torch.float32)
    for ours in (tiny.original_logits(torch.float32), tiny.hf_logits(torch.float32)):
        assert nmse(judge, ours) <= FLOAT32_BAR  # measured: at most 6e-12
        assert torch.equal(judge.argmax(-1), ours.argmax(-1))


def test_transformers_in_float64_differs_by_its_float32_steps(tiny: Case, tmp_path: Path) -> None:
    """transformers keeps rotary tables, norms and softmax in float32 in a float64 model. Measured: 2e-6 to
    4e-5, and 6e-4 for 600 tokens with scaled frequencies, where angles of hundreds lose most in float32."""
    judge = transformers_logits(tiny, tmp_path, torch.float64)
    assert (judge - tiny.original_logits(torch.float64)).abs().max() <= 5e-3


def test_transformers_agrees_in_float64_without_them(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code of transformers with every step it does in float32 done in float64; measured: 9e-14."""
    transformers_logits(
        tiny, tmp_path, torch.float32
    )  # nothing may be imported for good with float32 exchanged
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    judge = transformers_logits(tiny, tmp_path, torch.float64)
    for ours in (tiny.original_logits(torch.float64), tiny.hf_logits(torch.float64)):
        assert (judge - ours).abs().max() <= 1e-9


def swapped(one: str, other: str) -> Callable[[State], State]:
    def swap(state: State) -> State:
        return {n.replace(one, "\0").replace(other, one).replace("\0", other): t for n, t in state.items()}

    return swap


def scaling_by(factor: float) -> Any:
    return hf_rope.RopeScaling(factor, 1.0, 4.0, 8192.0)


def unchanged(state: State) -> State:
    return state


# Mistakes in the converted model: name of the case, rows permuted, change of the tensors, of the config.
MISTAKES: dict[str, tuple[str, tuple[str, ...], Callable[[State], State], dict[str, Any]]] = {
    f"{family}-{mistake}": (family, permuted, change, config)
    for family in ("llama-2-grouped-two-ranks", "mistral-window", "mixtral")
    for mistake, permuted, change, config in (
        ("q-not-permuted", ("wk",), unchanged, {}),
        ("k-not-permuted", ("wq",), unchanged, {}),
        ("neither-permuted", (), unchanged, {}),
        ("v-permuted", ("wq", "wk", "wv"), unchanged, {}),
        ("theta", ("wq", "wk"), unchanged, {"rope_theta": 1e6}),
        ("eps", ("wq", "wk"), unchanged, {"norm_eps": 1e-5}),
        ("norms", ("wq", "wk"), swapped("input_layernorm", "post_attention_layernorm"), {}),
        ("k-and-v", ("wq", "wk"), swapped("k_proj", "v_proj"), {}),
    )
} | {
    "llama-gate-and-up": ("llama-1", ("wq", "wk"), swapped("gate_proj", "up_proj"), {}),
    "llama-factor-32": ("llama-3.1-long", ("wq", "wk"), unchanged, {"rope_scaling": scaling_by(32.0)}),
    "llama-not-scaled": ("llama-3.1-long", ("wq", "wk"), unchanged, {"rope_scaling": None}),
    "mistral-gate-and-up": ("mistral", ("wq", "wk"), swapped("gate_proj", "up_proj"), {}),
    "mistral-window-4": ("mistral-window", ("wq", "wk"), unchanged, {"windows": (4,) * 4}),
    "mistral-window-6": ("mistral-window", ("wq", "wk"), unchanged, {"windows": (6,) * 4}),
    "mistral-no-window": ("mistral-window", ("wq", "wk"), unchanged, {"windows": (None,) * 4}),
    "mistral-one-layer-window": ("mistral-window", ("wq", "wk"), unchanged, {"windows": (5, 5, None, 5)}),
    "mixtral-w1-and-w3": ("mixtral", ("wq", "wk"), swapped("w1", "w3"), {}),
    "mixtral-experts": ("mixtral", ("wq", "wk"), swapped("experts.0", "experts.4"), {}),
    "mixtral-one-expert": ("mixtral", ("wq", "wk"), unchanged, {"n_experts_per_token": 1}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_far_above_the_bar(mistake: str) -> None:
    name, permuted, change, config = MISTAKES[mistake]
    tiny = CASES[name]
    wrong = tiny.hf_logits(torch.float32, change(hf_state(tiny, permuted)), **config)
    # measured: 8e-5 for epsilon, 9e-4 for the factor, 5e-3 to 2 for the rest
    assert nmse(tiny.original_logits(torch.float32), wrong) > 1e5 * FLOAT32_BAR


def test_ranks_in_another_order_are_another_model() -> None:
    tiny = CASES["llama-3-four-ranks"]
    reading, files = original("llama"), split(tiny)
    c = reading.Config.from_original(tiny.params, {n: tuple(t.shape) for n, t in files[0].items()}, 4, {})
    exchanged = [files[1], files[0], *files[2:]]
    assert nmse(tiny.hf_logits(torch.float64), reading.forward(tiny.ids(), exchanged, c)) > 0.1


@pytest.mark.parametrize("layout", ["llama", "mistral", "mixtral"])
def test_angles_are_exact_in_float64_and_near_in_float32(layout: str) -> None:
    tiny = CASES[{"llama": "llama-3.1-long"}.get(layout, layout)]
    theta, H, at = tiny.hf_config["rope_theta"], tiny.full["layers.0.attention.wk.weight"].shape[0], 599
    H //= tiny.params["n_kv_heads"]
    frequencies = [theta ** (-2 * i / H) for i in range(H // 2)]
    if tiny.hf_config.get("rope_scaling"):
        for i, f in enumerate(frequencies):
            wave = 2 * cmath.pi / f
            blend = (8192 / wave - 1) / 3
            frequencies[i] = f if wave < 2048 else f / 8 if wave > 8192 else (1 - blend) * f / 8 + blend * f
    expected = torch.tensor([cmath.exp(1j * at * f) for f in frequencies], dtype=torch.complex128)
    ours, theirs = tiny.readings
    shapes = {n: tuple(t.shape) for n, t in tiny.full.items()}
    c, d = ours.Config.from_original(tiny.params, shapes, 1, {}), theirs.Config.from_hf(tiny.hf_config)
    for dtype, bound in (
        (torch.float64, 1e-12),
        (torch.float32, 2e-4),
    ):  # float32: half a unit of 599 is 3e-5
        x = torch.zeros(1, 600, 1, dtype=dtype)
        cos, sin = hf_rope.rotation(x, d.rope_theta, d.head_dim, d.rope_scaling)
        turned = rope.turns(x, c.rope_theta, c.head_dim, c.rope_scaling)
        for found in (turned[at], torch.complex(cos, sin)[at, : H // 2]):
            assert (found - expected).abs().max() < bound


def test_a_window_per_layer_is_repeated_over_the_layers() -> None:
    tiny = CASES["mistral-window"]
    listed = replace(tiny, params=tiny.params | {"sliding_window": [5, None]})
    expected = tiny.hf_logits(torch.float64, windows=(5, None, 5, None))
    assert nmse(expected, listed.original_logits(torch.float64)) <= FLOAT64_BAR
    assert nmse(expected, tiny.original_logits(torch.float64)) > 0.1


def test_a_window_hides_what_lies_before_it() -> None:
    tiny = CASES["mistral-window"]
    ids = tiny.ids()
    reading = original("mistral")
    c = reading.Config.from_original(tiny.params, {n: tuple(t.shape) for n, t in tiny.full.items()}, 1, {})
    x = reading.embed(ids, [tiny.full], c)
    moved = x.clone()
    moved[:, 20] += 1
    seen = (reading.layer(x, 0, [tiny.full], c) != reading.layer(moved, 0, [tiny.full], c)).any(-1)[0]
    assert seen.nonzero().flatten().tolist() == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("stacked", [False, True])
def test_a_layer_reads_its_own_tensors_and_only_the_chosen_experts(stacked: bool) -> None:
    tiny = replace(CASES["mixtral"], stacked=stacked, tokens=1)
    read: set[str] = set()

    class Recorded(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.add(name)
            return super().__getitem__(name)

    ours, theirs = tiny.readings
    state = Recorded(stack(tiny.full, tiny.hf_config) if stacked else tiny.full)
    c = ours.Config.from_original(tiny.params, {n: tuple(t.shape) for n, t in state.items()}, 1, {})
    x = torch.ones(1, 1, 24, dtype=torch.float64)
    ours.layer(x, 1, [state], c)
    assert all(name.startswith("layers.1.") for name in read)
    assert len(read) == (10 if stacked else 7 + 2 * 3)
    read.clear()
    theirs.layer(x, 1, [Recorded(hf_state(tiny))], theirs.Config.from_hf(tiny.hf_config))
    assert all(name.startswith("model.layers.1.") for name in read) and len(read) == 7 + 2 * 3


@pytest.mark.parametrize("name", ["llama-3-four-ranks", "mistral-window", "mixtral"])
def test_sixteen_bit_weights_run_in_sixteen_bits_with_float32_logits(name: str) -> None:
    tiny = CASES[name]
    exact = tiny.hf_logits(torch.float64)
    for logits in (tiny.original_logits(torch.bfloat16), tiny.hf_logits(torch.bfloat16)):
        assert logits.dtype == torch.float32
        assert nmse(exact, logits) < 0.05  # measured: 6e-4, Mixtral 4e-3 as some experts flip
    reading = original(tiny.family)
    files = [{n: t.bfloat16() for n, t in f.items()} for f in split(tiny)]
    c = reading.Config.from_original(
        tiny.params, {n: tuple(t.shape) for n, t in files[0].items()}, tiny.ranks, {}
    )
    assert reading.layer(reading.embed(tiny.ids(), files, c), 0, files, c).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama-3-four-ranks", "llama-2-grouped-two-ranks", "mistral-window"])
def test_everything_is_computed_where_the_tensors_are(name: str) -> None:
    tiny = CASES[name]
    ours, theirs = tiny.readings
    files = [{n: t.to("meta") for n, t in f.items()} for f in split(tiny)]
    c = ours.Config.from_original(
        tiny.params, {n: tuple(t.shape) for n, t in files[0].items()}, tiny.ranks, {}
    )
    w = [{n: t.to("meta") for n, t in hf_state(tiny).items()}]
    ids = tiny.ids().to("meta")
    for logits in (
        ours.forward(ids, files, c),
        theirs.forward(ids, w, theirs.Config.from_hf(tiny.hf_config)),
    ):
        assert logits.device.type == "meta" and logits.shape == (*ids.shape, tiny.params["vocab_size"])


def test_a_missing_tensor_raises_its_name() -> None:
    tiny = CASES["llama-1"]
    state = hf_state(tiny)
    del state["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(KeyError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        tiny.hf_logits(torch.float64, state)


def test_every_module_has_the_same_functions() -> None:
    modules = [original(f) for f in families()] + [converted(a) for a in architectures()]
    for module in modules:
        assert all(callable(getattr(module, f)) for f in ("phases", "forward"))
        assert "n_layers" in module.Config.__dataclass_fields__
    known = ", ".join(families())
    with pytest.raises(ValueError, match=f"expected family to be one of {known}, found `gpt5`"):
        original("gpt5")
    with pytest.raises(ValueError, match="expected architecture to be one of .* found `GPTForCausalLM`"):
        converted("GPTForCausalLM")


def test_loss_and_generation_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = 5.0
    by_hand = [-(cmath.log(cmath.exp(5) / (cmath.exp(5) + 3))).real, cmath.log(4).real]
    assert loss(logits, torch.tensor([[1, 2, 3]])) == pytest.approx(sum(by_hand) / 2, abs=1e-6)

    def next_number(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 5, 5).float()

    assert generate(next_number, torch.tensor([[3], [0]]), 3).tolist() == [[3, 4, 0, 1], [0, 1, 2, 3]]


@pytest.mark.skipif(not REAL.is_dir(), reason="the trained checkpoint lies beside the checkout, if anywhere")
def test_a_trained_model_gives_its_documented_loss_and_text() -> None:
    expected = json.loads((REAL / "expected.json").read_text())
    params = json.loads((REAL / "params.json").read_text())
    state = torch.load(REAL / "consolidated.00.pth", weights_only=True)
    reading, ids = original("llama"), torch.tensor([expected["greedy_ids_from_bos"]])
    c = reading.Config.from_original(params, {n: tuple(t.shape) for n, t in state.items()}, 1, {})

    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = reading.forward(ids, [state], c)
        return logits

    documented = expected["loss_on_greedy_ids"]["float32"]
    assert loss(forward(ids), ids) == pytest.approx(documented, abs=1e-4)
    assert torch.equal(generate(forward, ids[:, :1], ids.shape[1] - 1), ids)

    hf_config = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
    hf_config |= {"vocab_size": 512, "tie_word_embeddings": True}
    del state["rope.freqs"]
    real = Case("llama", "LlamaForCausalLM", params, hf_config, state)
    judge = converted("LlamaForCausalLM")
    d = judge.Config.from_hf(hf_config)
    assert loss(judge.forward(ids, [hf_state(real)], d), ids) == pytest.approx(documented, abs=1e-4)
    unpermuted = judge.forward(ids, [hf_state(real, ())], d)
    assert loss(unpermuted, ids) == pytest.approx(expected["loss_with_q_k_rows_not_permuted"], abs=1e-4)
