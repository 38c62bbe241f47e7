"""Both readings of Qwen3 agree with each other and with transformers, tied and not, grouped and not, with
windows; and what is new in it, norms of heads, is seen when it is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import converted, original

OURS, THEIRS = original("qwen3"), converted("Qwen3ForCausalLM")
D, F, V, T, L = 24, 40, 43, 70, 3


@dataclass(frozen=True)
class Case:
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 10  # not D / heads
    tied: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": D,
            "intermediate_size": F,
            "num_hidden_layers": L,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": V,
            "rms_norm_eps": 3e-5,
            "rope_theta": 30000.0,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
            **dict(self.more),
        }

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        N, K, H = self.heads, self.kv_heads, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        shapes |= {} if self.tied else {"lm_head.weight": (V, D)}
        own: dict[str, tuple[int, ...]] = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        own |= {f"self_attn.{n}_proj": (h * H, D) for n, h in (("q", N), ("k", K), ("v", K))}
        own |= {"self_attn.o_proj": (D, N * H), "self_attn.q_norm": (H,), "self_attn.k_norm": (H,)}
        own |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        shapes |= {f"model.layers.{i}.{n}.weight": shape for i in range(L) for n, shape in own.items()}
        seed = torch.Generator().manual_seed(3)
        made = {n: torch.randn(s, generator=seed, dtype=torch.float64) * 0.2 for n, s in shapes.items()}
        return {n: (x + ("norm" in n)).to(dtype) for n, x in made.items()}


CASES = {
    "grouped": Case(),
    "multi-head": Case(heads=5, kv_heads=5),
    "one-key": Case(heads=4, kv_heads=1),
    "tied": Case(tied=True),
    "window": Case(more=(("use_sliding_window", True), ("sliding_window", 9), ("max_window_layers", 1))),
    "yarn": Case(
        more=(
            (
                "rope_scaling",
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            ),
        )
    ),
}


def ids() -> Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(8))


def readings(tiny: Case, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Tensor]]:
    state = tiny.tensors(dtype)
    shapes = {n: tuple(x.shape) for n, x in state.items()}
    c = OURS.Config.from_original(tiny.config(), shapes, 1, {})
    return c, THEIRS.Config.from_hf(tiny.config()), state


def nmse(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    return ((expected - found).square().mean() / expected.var()).item()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_both_readings_agree(name: str) -> None:
    c, d, state = readings(CASES[name], torch.float64)
    ours, theirs = OURS.forward(ids(), [state], c), THEIRS.forward(ids(), [state], d)
    assert ours.shape == (2, T, V)
    assert nmse(ours, theirs) <= 1e-25  # measured: at most 2e-29


@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    c, d, state = readings(CASES[name], torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(CASES[name].config()))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        judge = model(ids()).logits
    for module, config in ((OURS, c), (THEIRS, d)):
        found = module.forward(ids(), [state], config)
        assert nmse(judge, found) <= 1e-10
        assert torch.equal(judge.argmax(-1), found.argmax(-1))
    plain = replace(d, head_norms=False)  # the same mistake on both sides: only the judge can see it
    wrong = OURS.forward(ids(), [state], replace(c, head_norms=()))
    assert nmse(wrong, THEIRS.forward(ids(), [state], plain)) <= 1e-10
    assert nmse(judge, wrong) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"head_norms": False},
        {"rope_theta": 10000.0},
        {"norm_eps": 3e-4},
        {"windows": (5, None, None)},
    ],
    ids=str,
)
def test_a_wrong_number_is_seen(wrong: dict[str, Any]) -> None:
    c, d, state = readings(CASES["grouped"], torch.float32)
    ours = OURS.forward(ids(), [state], c)
    assert nmse(ours, THEIRS.forward(ids(), [state], d)) <= 1e-10
    assert nmse(ours, THEIRS.forward(ids(), [state], replace(d, **wrong))) > 1e-8


def test_norms_of_query_and_key_exchanged_are_seen() -> None:
    c, d, state = readings(CASES["grouped"], torch.float64)
    swapped = {
        n.replace("q_norm", "?").replace("k_norm", "q_norm").replace("?", "k_norm"): x
        for n, x in state.items()
    }
    assert nmse(OURS.forward(ids(), [state], c), THEIRS.forward(ids(), [swapped], d)) > 1e-4


def test_what_is_absent_is_the_librarys() -> None:
    transformers = pytest.importorskip("transformers")
    bare = {k: v for k, v in CASES["grouped"].config().items() if k in ("hidden_size", "num_hidden_layers")}
    bare["num_attention_heads"] = 32
    full = transformers.Qwen3Config(**bare).to_dict()
    assert THEIRS.Config.from_hf(bare) == THEIRS.Config.from_hf(full)
    assert THEIRS.Config.from_hf(bare).head_dim == 128


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "`attention_bias` False"),
        ({"hidden_act": "gelu"}, "`hidden_act` silu"),
        ({"num_key_value_heads": None, "rope_theta": None}, "rope_theta"),
    ],
)
def test_another_model_is_refused(change: dict[str, Any], said: str) -> None:
    tiny = CASES["grouped"]
    shapes = {n: tuple(x.shape) for n, x in tiny.tensors(torch.float32).items()}
    with pytest.raises(ValueError, match=said):
        OURS.Config.from_original({**tiny.config(), **change}, shapes, 1, {})
    with pytest.raises(ValueError, match=said):
        THEIRS.Config.from_hf({**tiny.config(), **change})
    with pytest.raises(ValueError, match="expected one rank .* found 2"):
        OURS.Config.from_original(tiny.config(), shapes, 2, {})
