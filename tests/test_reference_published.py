"""Both readings of families that are published in the tensors of transformers agree with each other and with
two releases of the library, whatever their config.json says; and a wrong number is seen."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import NotComputed, converted, original
from tests import loaded, published_models
from tests.published_models import CASES, ids

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
RELEASES = ("tf5", "tf4.57")


@dataclass(frozen=True)
class Tiny:
    """A model as a release of the library stores it, and what that release makes of it."""

    family: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    judged: dict[str, Tensor]

    def ours(self, **changes: Any) -> tuple[Any, Any]:
        """The reading of the original, and its config, with other values in config.json."""
        shapes = {n: tuple(t.shape) for n, t in self.state.items()}
        module = original(self.family)
        return module, module.Config.from_original({**self.config, **changes}, shapes, 1, {})

    def theirs(self, **changes: Any) -> tuple[Any, Any]:
        module = converted(self.config["architectures"][0])
        return module, module.Config.from_hf({**self.config, **changes})

    def logits(self, reading: tuple[Any, Any], dtype: torch.dtype = torch.float32) -> Tensor:
        module, c = reading
        found: Tensor = module.forward(ids(), self.ranks(dtype), c)
        return found

    def ranks(self, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [{n: t.to(dtype) for n, t in self.state.items()}]


Made = Callable[..., Tiny]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(case, release)`; each release is asked once, in a process of its own."""
    folders: dict[str, Path] = {}

    def tiny(case: str, release: str = "tf5") -> Tiny:
        if release not in folders:
            out = tmp_path_factory.mktemp(release)
            command = [loaded.python(release), "-W", "ignore", published_models.__file__, str(out)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr[-3000:]
            folders[release] = out
        from safetensors.torch import load_file

        folder = folders[release] / case
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state, judged = load_file(folder / "model.safetensors"), torch.load(folder / "judged.pt")
        return Tiny(CASES[case]["family"], config, state, judged)

    return tiny


def nmse(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    return ((expected - found).square().mean() / expected.var()).item()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CASES)
def test_both_readings_are_the_library(case: str, release: str, made: Made) -> None:
    tiny = made(case, release)
    readings = tiny.ours(), tiny.theirs()
    exact = [tiny.logits(reading, torch.float64) for reading in readings]
    assert nmse(*exact) <= 1e-25
    for reading in readings:
        found, judged = tiny.logits(reading), tiny.judged["logits torch.float32"]
        assert nmse(judged, found) <= 1e-10  # measured: at most 4e-13
        assert torch.equal(judged.argmax(-1), found.argmax(-1))
        half = tiny.logits(reading, torch.bfloat16)
        assert nmse(tiny.judged["logits torch.bfloat16"], half) <= 3e-3  # measured: at most 3e-4
        # words are scaled by what the dtype makes of the root
        for dtype in (torch.float32, torch.bfloat16):
            words = reading[0].embed(ids(), tiny.ranks(dtype), reading[1])
            assert torch.equal(words, tiny.judged[f"words {dtype}"])


def test_each_case_is_another_model(made: Made) -> None:
    """So that none of their config values is ignored by all."""
    for family in NUMBERS:
        found = [made(n).judged["logits torch.float32"] for n, c in CASES.items() if c["family"] == family]
        for i, one in enumerate(found):
            assert all(nmse(one, other) > 1e-8 for other in found[:i])


NUMBERS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "gemma2": {
        "hidden_activation": "gelu",
        "query_pre_attn_scalar": 10,
        "sliding_window": 10,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "gpt-neox": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.25},
    },
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in NUMBERS for name in NUMBERS[case]])
def test_a_wrong_number_is_seen_and_is_the_same_number_on_both_sides(
    case: str, name: str, made: Made
) -> None:
    tiny, change = made(case), {name: NUMBERS[case][name]}
    ours, theirs = tiny.logits(tiny.ours(**change)), tiny.logits(tiny.theirs(**change))
    assert nmse(ours, theirs) <= 1e-10
    assert nmse(tiny.judged["logits torch.float32"], ours) > 1e-8


@pytest.mark.parametrize("case", NUMBERS)
def test_what_is_absent_is_the_librarys(case: str, made: Made) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = made(case)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
    full = getattr(transformers, CASES[case]["model"] + "Config")(**sizes).to_dict()
    full["architectures"] = tiny.config["architectures"]
    word = "gpt_neox.embed_in.weight" if case == "gpt-neox" else "model.embed_tokens.weight"
    module, shapes = original(tiny.family), {word: (61, 48)}
    bare, told = (module.Config.from_original(c, shapes, 1, {}) for c in (sizes, full))
    assert bare == told
    module = converted(full["architectures"][0])
    assert module.Config.from_hf(sizes) == module.Config.from_hf(full)


def test_gpt_neox_ignores_the_names_of_others(made: Made) -> None:
    """`rope_theta` and `partial_rotary_factor` at the top of config.json are not what the library reads."""
    transformers = pytest.importorskip("transformers")
    others = {"rope_theta": 5.0, "partial_rotary_factor": 1.0}
    own = {"rotary_emb_base": 3e4, "rotary_pct": 0.5}
    read = transformers.GPTNeoXConfig(**others, **own).rope_parameters
    assert (read["rope_theta"], read["partial_rotary_factor"]) == (3e4, 0.5)
    older, newer = made("gpt-neox", "tf4.57"), made("gpt-neox")
    for reading in (
        older.ours(**others),
        older.theirs(**others),
        newer.ours(**others),
        newer.theirs(**others),
    ):
        assert nmse(newer.judged["logits torch.float32"], newer.logits(reading)) <= 1e-10
    silent = {k: v for k, v in older.config.items() if k not in own}
    assert transformers.GPTNeoXConfig(**silent).rope_parameters["rope_theta"] == 10000.0
    older = replace(older, config=silent)
    for _, c in (older.ours(), older.theirs()):
        assert (c.rope_theta, c.turned) == (1e4, 3)


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("gemma2", {"attention_bias": True}, "`attention_bias` False"),
        ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` False"),
        ("gemma2", {"hidden_activation": "mish"}, "`hidden_activation` to be one of .*gelu.*, found mish"),
        ("gemma2", {"sliding_window": None}, "expected sliding_window"),
        ("gemma2", {"rope_parameters": {"rope_type": "longrope"}}, "found `longrope`"),
        ("gemma2", {"num_hidden_layers": None}, "expected num_hidden_layers"),
        ("qwen3", {"attention_bias": True}, "`attention_bias` False"),
        ("qwen3", {"hidden_act": "gelu"}, "`hidden_act` silu"),
        ("gpt-neox", {"hidden_act": "mish"}, "`hidden_act` to be one of .*gelu.*, found mish"),
        ("gpt-neox", {"num_attention_heads": None}, "expected num_attention_heads"),
    ],
)
def test_another_model_is_refused(case: str, change: dict[str, Any], said: str, made: Made) -> None:
    tiny = made(case)
    for read in (tiny.ours, tiny.theirs):
        with pytest.raises(ValueError, match=said):
            read(**change)
    with pytest.raises(ValueError, match="expected one rank .* found 2"):
        original(tiny.family).Config.from_original(tiny.config, {}, 2, {})


def test_two_parts_of_a_head_are_refused(made: Made) -> None:
    tiny = made("gpt-neox")
    with pytest.raises(ValueError, match=r"one partial_rotary_factor in config.json, found 0.25, 0.5"):
        tiny.theirs(rotary_pct=0.25)
    llama = converted("LlamaForCausalLM").Config
    with pytest.raises(NotComputed, match="whole heads .* partial_rotary_factor 0.5"):
        llama.from_hf({**tiny.config, "attention_bias": False})
