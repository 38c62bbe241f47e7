"""The two readings of MEGA: golden toys, the damped average as steps and as a convolution, and every class of
transformers 4.37.2 with its loss."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ckpt_tool.reference import hf_mega, losses, mega
from tests import loaded

ROOT = Path(__file__).parents[1]

# --- golden toys ------------------------------------------------------------------------------------------

# Computed once with the publisher's modules (facebookresearch/mega @aeaa4b44), which agree to 1.3e-7 with
# float64: first hidden values of the first token, of the second row's second one, logits of the second token,
# sums over both rows. Row 1 has three tokens of padding.
TOYS = {
    ("softmax", "rotary", "scalenorm", -1): (
        (-0.17084, -0.06817, -0.15761, -0.26085),
        (-0.35585, 0.03912, -0.02130, -0.37361),
        (0.42949, 0.34418, 0.23375, 0.04642),
        (-0.6697, -1.3396),
    ),
    ("laplace", "simple", "layernorm", -1): (
        (-0.15417, 0.09740, 0.33711, -0.38120),
        (-0.48516, 0.02952, 0.17786, -0.52939),
        (0.27182, 0.34221, 0.40279, 0.16276),
        (-5.0565, -3.6740),
    ),
    ("relu2", "rotary", "scalenorm", 4): (
        (-0.13854, -0.09932, -0.17513, -0.24449),
        (-0.32932, 0.00821, -0.03131, -0.37834),
        (0.42145, 0.33641, 0.22702, 0.04836),
        (-0.5354, -1.4250),
    ),
}
IDS = torch.tensor([[0, 7, 5, 9, 3, 12, 4, 2], [0, 8, 4, 6, 2, 1, 1, 1]])


def shapes(bias: str, norm: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    V, D, Z, H, N, F = 14, 8, 4, 12, 2, 10
    yield "embedding_layer.weight", (V, D)
    for i in range(2):
        p, n = f"encoders.{i}.mega_layer.", f"encoders.{i}.nffn."
        yield from ((p + name, (2, Z)) for name in ("gamma", "beta"))
        yield from ((f"{p}move.{name}", (2 * D, N, 1)) for name in ("delta", "alpha", "beta"))
        yield from ((f"{p}move.gamma", (2 * D, N)), (f"{p}move.omega", (D,)))
        for stem, out, inner in (
            (f"{p}v_proj", H, D), (f"{p}mx_proj", Z + H + 2 * D, D), (f"{p}h_proj", D, H),
            (f"{n}fc1", F, D), (f"{n}fc2", D, F),
        ):  # fmt: skip
            yield from ((f"{stem}.weight", (out, inner)), (f"{stem}.bias", (out,)))
        if bias == "rotary":
            yield from ((f"{p}rel_pos_bias.{name}", (1, Z)) for name in ("alpha", "beta"))
        else:
            yield f"{p}rel_pos_bias.rel_pos_bias", (2 * 12 - 1,)
        for stem in (p, n):
            names = ("scalar",) if norm == "scalenorm" else ("weight", "bias")
            yield from ((f"{stem}norm.norm.{name}", (1 if name == "scalar" else D,)) for name in names)


def toy(bias: str, norm: str) -> dict[str, Tensor]:
    """Sines over the elements of each tensor, by its number among the sorted names of its file."""

    def numbers(k: int, shape: tuple[int, ...], plus: int) -> Tensor:
        e = np.arange(math.prod(shape))
        made = (0.3 * np.sin(0.1 * (e + 1) ** 2 + k) + plus).astype(np.float32).reshape(shape)
        return torch.from_numpy(made).double()

    of = dict(shapes(bias, norm))
    gains = (".norm.weight", ".norm.scalar")
    made = {n: numbers(k, of[n], n.endswith(gains)) for k, n in enumerate(sorted(of), 1)}
    return made | {"bias": numbers(1, (14,), 0), "weight": numbers(2, (14, 8), 0)}


def config_of(toy: Mapping[str, Tensor], scores: str, bias: str, norm: str, chunk: int) -> mega.Config:
    told = {
        "attention_activation_fn": scores,
        "rel_pos_bias": bias,
        "normalization_type": norm,
        "encoder_chunk_size": chunk,
        "activation_fn": "silu",
        "normalize_before": True,
        "truncation_length": None,
    }
    known = {n: tuple(x.shape) for n, x in toy.items()}
    return mega.Config.from_original({"mega_args": told, "depth": 2}, known, 1, {})


@pytest.mark.parametrize("kind", TOYS, ids=lambda k: "-".join(map(str, k)))
def test_golden_toys(kind: tuple[str, str, str, int]) -> None:
    w = toy(kind[1], kind[2])
    c, mask = config_of(w, *kind), (IDS != 1).long()
    x = mega.encode(IDS, [w], c, mask=mask)
    found = (x[0, 0, :4], x[1, 1, :4], mega.head(x, [w], c)[0, 1, :4])
    sums = torch.stack([x[0].sum(), x[1][mask[1].bool()].sum()])
    for one, wanted in zip((*found, sums), TOYS[kind], strict=True):
        assert torch.allclose(one, torch.tensor(wanted).double(), atol=6e-5), (one, wanted)


# --- the damped average -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [None, 1, 3, 40])
@pytest.mark.parametrize("both_ways", [True, False])
def test_the_average_by_steps_is_the_convolution(both_ways: bool, reach: int | None) -> None:
    """The original's reading takes the steps of the paper, that of the library Fourier transforms, and here
    is neither: the sum over all pairs of steps."""
    torch.manual_seed(3)
    B, T, D, N = 2, 23, 5, 4
    u = torch.randn(B, T, D, dtype=torch.float64)
    rows = 2 * D if both_ways else D
    delta, alpha, beta = (torch.randn(rows, N, 1, dtype=torch.float64) for _ in range(3))
    gamma = torch.randn(rows, N, dtype=torch.float64)
    w = {"delta": delta, "alpha": alpha, "beta": beta, "gamma": gamma}
    c = mega.Config(
        1, "scalenorm", "softmax", "silu", "rotary", True, both_ways, False, True, None, reach, None
    )
    found = mega.averages(u, w, "", c)
    p, q = torch.sigmoid(delta), 1 - torch.sigmoid(delta) * torch.sigmoid(alpha)
    steps = torch.arange(T)
    kernel = (p * beta * q**steps * gamma[..., None] / N**0.5).sum(1)  # (rows, T)
    kernel[:, reach or T :] = 0
    back = steps[:, None] - steps[None, :]
    wanted = torch.einsum("dts,bsd->btd", kernel[:D, back.clamp(min=0)] * (back >= 0), u)
    if both_ways:
        wanted += torch.einsum("dts,bsd->btd", kernel[D:, (-back).clamp(min=0)] * (back <= 0), u)
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


# --- transformers 4.37.2 ----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 14,
    "ema_projection_size": 3, "shared_representation_size": 6, "nffn_hidden_size": 10, "max_positions": 16,
    "num_labels": 3,
}  # fmt: skip
FULL = {"add_token_type_embeddings": True}
BARE = {"add_lm_hidden_dense_layer": False}
LAPLACE = {
    "attention_activation": "laplace", "relative_positional_bias": "simple", "truncation": 5,
    "normalization_type": "layernorm", "normalize_before_mega": False, **BARE,
}  # fmt: skip
CHUNKS = {
    "attention_activation": "relu2", "normalization_type": "batchnorm", "use_chunking": True, "chunk_size": 4,
    "activation": "gelu", "normalize_before_ffn": False, **BARE,
}  # fmt: skip
SIMPLE_CHUNKS = {
    "relative_positional_bias": "simple", "max_positions": 4, "use_chunking": True, "chunk_size": 4,
    "normalization_type": "rmsnorm", "use_normalized_ffn": False, "activation": "relu",
    "tie_word_embeddings": False,
}  # fmt: skip
SYNC = {"normalization_type": "syncbatchnorm", "activation": "gelu_new", **BARE}
DECODER = {"is_decoder": True, "bidirectional": False}
HEADS = {
    "MegaModel": "base_model",
    "MegaForMaskedLM": "masked_lm",
    "MegaForSequenceClassification": "sequence_classification",
    "MegaForMultipleChoice": "multiple_choice",
    "MegaForTokenClassification": "token_classification",
    "MegaForQuestionAnswering": "question_answering",
    "MegaForCausalLM": "causal_lm",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"full-{name}": (name, FULL) for name in HEADS if name != "MegaForCausalLM"},
    "laplace": ("MegaForMaskedLM", LAPLACE),
    "chunks": ("MegaForMaskedLM", CHUNKS),
    "simple-chunks": ("MegaForMaskedLM", SIMPLE_CHUNKS),
    "sync": ("MegaForTokenClassification", SYNC),
    "decoder": ("MegaForCausalLM", DECODER),
    "decoder-laplace": ("MegaForCausalLM", {**DECODER, **LAPLACE}),
    "decoder-chunks": ("MegaForCausalLM", {**DECODER, **CHUNKS}),
    "decoder-simple-chunks": ("MegaForCausalLM", {**DECODER, **SIMPLE_CHUNKS}),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mega")
    cases = {case: (name, {**SIZES, **more}) for case, (name, more) in CASES.items()}
    cases["full-MegaForQuestionAnswering"][1]["num_labels"] = 2  # the start and the end
    (folder / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [loaded.python("tf4.37"), str(ROOT / "tests" / "mega_script.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, json.loads(run.stdout.splitlines()[-1])


def original_names(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that the publisher's code has, those of a head as they are."""
    words = {
        "ema_gate.ema_expansion_matrix": "move.beta",
        "ema_gate.kernel_projection_matrix": "move.gamma",
        "ema_gate.decay_factor": "move.alpha",
        "ema_gate.damping_factor": "move.delta",
        "ema_gate.residual_weight": "move.omega",
        "mega_layer.qk_weight": "mega_layer.gamma",
        "mega_layer.qk_bias": "mega_layer.beta",
        "rel_pos_bias.b_param": "rel_pos_bias.beta",
        "embedding_layer.word_embeddings.": "embedding_layer.",
    }
    made = {}
    for name, x in w.items():
        name = re.sub(r"^mega\.|^(mlm_head|lm_head)\.", "", name)
        name = re.sub(r"^layers\.", "encoders.", name)
        for old, new in words.items():
            name = name.replace(old, new)
        made[name] = x
    return made


def loss_of(name: str, out: Any, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for what in [k.rpartition(".")[0] for k in found if k.endswith((".labels", ".start_positions"))]:
        labels = found.get(f"{what}.labels")
        if "Question" in name:
            yield what, losses.span(*out, found[f"{what}.start_positions"], found[f"{what}.end_positions"])
        elif "Sequence" in name:
            assert labels is not None
            yield what, losses.classification(out, labels, what)
        else:
            assert labels is not None
            yield what, (losses.next_token if "Causal" in name else losses.labelled)(out, labels)


def outputs(name: str, found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    keys = {
        "MegaModel": ("last_hidden_state", "pooler_output"),
        "MegaForQuestionAnswering": ("start_logits", "end_logits"),
    }
    return tuple(found[k] for k in keys.get(name, ("logits",)))


def compared(name: str, out: Any, found: Mapping[str, Tensor]) -> None:
    """Outputs at every place that is no padding, and the losses, which count all."""
    mine = out if isinstance(out, tuple) else (out,)
    for one, wanted in zip(mine, outputs(name, found), strict=True):
        assert one.shape == wanted.shape
        assert (one - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    for what, loss in loss_of(name, out, found):
        assert abs(float(loss - found[what])) <= 1e-5 * max(1.0, float(found[what])), what


@pytest.mark.parametrize("case", CASES)
def test_every_class_of_the_library_and_its_loss(case: str, judged: tuple[Path, dict[str, Any]]) -> None:
    folder, reports = judged
    assert not any(reports[case].values()), "saved and loaded without a key too many or too few"
    name, _ = CASES[case]
    found = {k: torch.from_numpy(x) for k, x in np.load(folder / f"{case}.npz").items()}
    w = load_file(folder / case / "model.safetensors")
    config = json.loads((folder / case / "config.json").read_text())
    c = hf_mega.Config.from_hf(config)
    given = {"mask": found["attention_mask"], "token_types": found.get("token_type_ids")}
    x = hf_mega.encode(found["input_ids"], [w], c, **given)
    compared(name, hf_mega.HEADS[HEADS[name]](x, [w], c), found)
    if c.token_types or c.dense or (c.norm == "rmsnorm") or c.mega_first != c.ffn_first:
        return  # which the original has not
    own = original_names(w)
    y = mega.encode(found["input_ids"], [own], told(config, own), mask=given["mask"])
    compared(name, mega.HEADS[HEADS[name]](y, [own], told(config, own)), found)


def told(config: Mapping[str, Any], w: Mapping[str, Tensor]) -> mega.Config:
    known = {n: tuple(x.shape) for n, x in w.items()}
    return mega.Config.from_original({}, known, 1, config)
