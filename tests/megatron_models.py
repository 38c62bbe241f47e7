"""A tiny BERT and GPT-2 in every layout that Megatron gave them and in that of Hugging Face, both made in
memory from tensors with q, k and v apart; and the readings of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.reference import converted, original
from ckpt_tool.reference.megatron import join_stages

State = dict[str, Tensor]

# NMSE of logits. Measured between the two readings: at most 1e-30 in float64, 2e-13 in float32.
FLOAT64_BAR = 1e-20

L, N, H, F, P, V = 4, 4, 6, 40, 37, 44  # V is padded: WORDS count
D, WORDS, T = N * H, 41, 20
EPS = 3e-4
VERSIONS = (None, 1.0, 2.0, 3.0)
FAMILIES = {"megatron-bert": "MegatronBertForPreTraining", "megatron-gpt2": "GPT2LMHeadModel"}

# Age -> what tells its names from those of the others.
LEGACY = {"root": "language_model.", "embedding": "embedding.", "pooler": "pooler.dense.", "bias": "lm_head."}
CORE = {
    "root": "",
    "embedding": "embedding.",
    "pooler": "pooler.dense.",
    "bias": "output_layer.",
    "block": "decoder.",
    "norm_2": "pre_mlp_layernorm.",
    "attention": ("linear_qkv.", "linear_proj."),
    "mlp": ("mlp.linear_fc1.", "mlp.linear_fc2."),
    "final": "final_layernorm.",
    "lm_norm": "lm_head.layer_norm.",
}
ENGINE = {  # Transformer Engine's layers before Core
    "block": "encoder.",
    "inside": "self_attention.",
    "norm_1": "self_attention.layernorm_qkv.layer_norm_",
    "norm_2": "layernorm_mlp.layer_norm_",
    "attention": ("layernorm_qkv.", "proj."),
    "mlp": ("layernorm_mlp.fc1_", "layernorm_mlp.fc2_"),
}
AGES: dict[str, dict[str, Any]] = {
    "transformer": LEGACY | {"block": "transformer.", "inside": "attention.", "norm": "layernorm"},
    "encoder": LEGACY | {"block": "encoder.", "inside": "self_attention.", "norm": "layernorm"},
    "norm": LEGACY | {"block": "encoder.", "inside": "self_attention.", "norm": "norm"},
    "flat": LEGACY | {"block": "transformer.", "inside": "attention.", "norm": "layernorm", "embedding": ""},
    "engine": LEGACY | ENGINE | {"norm": "layernorm"},
    "engine-norm": LEGACY | ENGINE | {"norm": "norm"},
    "core": CORE,
    "core-fused": CORE
    | {"norm_1": "self_attention.linear_qkv.layer_norm_", "norm_2": "mlp.linear_fc1.layer_norm_"},
}


def tensors(layers: int = L) -> State:
    """One model for both families in float64, under names of this test: q, k and v apart, heads in order."""
    shapes: dict[str, tuple[int, ...]] = {"word": (V, D), "position": (P, D), "tokentype": (2, D)}
    linear: dict[str, tuple[int, ...]] = {
        "q": (D, D),
        "k": (D, D),
        "v": (D, D),
        "dense": (D, D),
        "fc1": (F, D),
        "fc2": (D, F),
    }
    for i in range(layers):
        for name in ("norm_1", "norm_2"):
            shapes |= {f"{i}.{name}.weight": (D,), f"{i}.{name}.bias": (D,)}
        for name, shape in linear.items():
            shapes |= {f"{i}.{name}.weight": shape, f"{i}.{name}.bias": shape[:1]}
    linear = {"pooler": (D, D), "lm_dense": (D, D), "binary": (2, D)}
    linear |= {"classifier": (3, D), "choice": (1, D), "qa": (2, D)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("final_norm", "lm_norm"):
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    shapes["lm_bias"] = (V,)
    made = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        seed = torch.Generator().manual_seed(number)
        made[name] = torch.randn(shape, generator=seed, dtype=torch.float64) * 0.2
        made[name] += float("norm" in name and name.endswith("weight"))
    return made


def fused(full: State, i: int, kind: str, version: float | None, ranks: int) -> list[Tensor]:
    """What each rank stores of q, k and v: row (c, head, channel) at the place its version has for it."""
    parts = [full[f"{i}.{c}.{kind}"] for c in "qkv"]
    n, made = N // ranks, []
    for r in range(ranks):
        rows: list[Tensor] = [torch.empty(0)] * (3 * n * H)
        for c in range(3):
            for a in range(n):
                for j in range(H):
                    at = (
                        (a * H + j) * 3 + c
                        if version == 1
                        else (a * 3 + c) * H + j
                        if version is not None and version >= 2
                        else (c * n + a) * H + j
                    )
                    rows[at] = parts[c][(r * n + a) * H + j]
        made.append(torch.stack(rows))
    return made


def megatron_files(
    full: State,
    family: str,
    version: float | None,
    age: str,
    ranks: int = 1,
    stages: tuple[int, ...] | None = None,
    chunks: int = 1,
) -> list[list[State]]:
    """The tensors of each file: [rank][stage]. `stages` counts the layers of each chunk of each stage, chunk
    by chunk; by default there is one stage."""
    bert, names = family == "megatron-bert", AGES[age]
    layers = sum(1 for name in full if name.endswith(".norm_1.weight"))
    counts = stages or (layers,)
    depth = len(counts) // chunks
    last = len(counts) - 1
    files: list[list[State]] = [[{} for _ in range(depth)] for _ in range(ranks)]

    def put(place: int, name: str, parts: list[Tensor]) -> None:
        top = f"model{place // depth}." if chunks > 1 else "model."
        for r, part in enumerate(parts):
            files[r][place % depth][top + name] = part

    def pair(place: int, name: str, own: str) -> None:
        for kind in ("weight", "bias"):
            put(place, name + kind, [full[f"{own}.{kind}"]] * ranks)

    root, core = names["root"], age.startswith("core")
    block = root + ("encoder." if core and bert else names["block"])
    inside = "self_attention." if core else names["inside"]
    norm = names.get("norm", "")
    embedding = root + names["embedding"]
    put(0, embedding + "word_embeddings.weight", list(full["word"].chunk(ranks)))
    put(0, embedding + "position_embeddings.weight", [full["position"]] * ranks)
    if bert:
        put(0, embedding + "tokentype_embeddings.weight", [full["tokentype"]] * ranks)
    i = 0
    for place, count in enumerate(counts):
        for local in range(count):
            p, own = f"{block}layers.{local}.", f"{i}."
            qkv, dense = names.get("attention", ("query_key_value.", "dense."))
            fc1, fc2 = names.get("mlp", ("mlp.dense_h_to_4h.", "mlp.dense_4h_to_h."))
            pair(place, p + names.get("norm_1", f"input_{norm or 'layernorm'}."), own + "norm_1")
            pair(place, p + names.get("norm_2", f"post_attention_{norm}."), own + "norm_2")
            for kind in ("weight", "bias"):
                stored = fused(full, i, kind, 3.0 if core or age.startswith("engine") else version, ranks)
                put(place, p + inside + qkv + kind, stored)
                put(place, p + fc1 + kind, list(full[f"{own}fc1.{kind}"].chunk(ranks)))
            for name, mine in ((p + inside + dense, "dense"), (p + fc2, "fc2")):
                put(place, name + "weight", list(full[f"{own}{mine}.weight"].chunk(ranks, 1)))
                put(place, name + "bias", [full[f"{own}{mine}.bias"]] * ranks)
            i += 1
    pair(last, block + (names.get("final") or f"final_{norm}."), "final_norm")
    if len(counts) > 1:
        copy = "output_layer.weight" if core else "word_embeddings_for_head.weight"
        put(last, copy, list(full["word"].chunk(ranks)))
    if bert:
        pair(last, root + names["pooler"], "pooler")
        pair(last, "lm_head.dense.", "lm_dense")
        pair(last, names.get("lm_norm") or f"lm_head.{norm}.", "lm_norm")
        put(last, names["bias"] + "bias", list(full["lm_bias"].chunk(ranks)))
        pair(last, "binary_head.", "binary")
    return files


def args(**changes: Any) -> dict[str, Any]:
    """Pickled args of a checkpoint of today, without its version."""
    told: dict[str, Any] = {"num_layers": L, "hidden_size": D, "num_attention_heads": N, "ffn_hidden_size": F}
    told |= {"max_position_embeddings": P, "padded_vocab_size": V, "layernorm_epsilon": EPS}
    return told | {"openai_gelu": False, "bias_gelu_fusion": False} | changes


def hf_state(full: State, family: str, words: int = V) -> State:
    """The Hugging Face layout; BERT with all heads at once."""
    layers = sum(1 for name in full if name.endswith(".norm_1.weight"))
    state: State = {}

    def pair(name: str, own: str, turned: bool = False) -> None:
        weight = full[own + ".weight"]
        state[name + ".weight"] = weight.T.contiguous() if turned else weight
        state[name + ".bias"] = full[own + ".bias"]

    if family == "megatron-gpt2":
        state["transformer.wte.weight"] = full["word"][:words]
        state["transformer.wpe.weight"] = full["position"]
        for i in range(layers):
            p = f"transformer.h.{i}."
            pair(p + "ln_1", f"{i}.norm_1")
            pair(p + "ln_2", f"{i}.norm_2")
            for kind in ("weight", "bias"):
                rows = torch.cat([full[f"{i}.{c}.{kind}"] for c in "qkv"])
                state[f"{p}attn.c_attn.{kind}"] = rows.T.contiguous() if kind == "weight" else rows
            for name, own in (("attn.c_proj", "dense"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2")):
                pair(p + name, f"{i}.{own}", turned=True)
        pair("transformer.ln_f", "final_norm")
        return state
    p = "bert.embeddings."
    state |= {p + "word_embeddings.weight": full["word"][:words]}
    state |= {p + "position_embeddings.weight": full["position"]}
    state |= {p + "token_type_embeddings.weight": full["tokentype"]}
    for i in range(layers):
        for name, own in (
            ("attention.ln", "norm_1"),
            ("attention.self.query", "q"),
            ("attention.self.key", "k"),
            ("attention.self.value", "v"),
            ("attention.output.dense", "dense"),
            ("ln", "norm_2"),
            ("intermediate.dense", "fc1"),
            ("output.dense", "fc2"),
        ):
            pair(f"bert.encoder.layer.{i}.{name}", f"{i}.{own}")
    pair("bert.encoder.ln", "final_norm")
    pair("bert.pooler.dense", "pooler")
    pair("cls.predictions.transform.dense", "lm_dense")
    pair("cls.predictions.transform.LayerNorm", "lm_norm")
    state["cls.predictions.bias"] = full["lm_bias"][:words]
    pair("cls.seq_relationship", "binary")
    return state


def hf_config(family: str, **changes: Any) -> dict[str, Any]:
    told: dict[str, Any]
    if family == "megatron-gpt2":
        told = {"n_layer": L, "n_embd": D, "n_head": N, "n_inner": F, "n_positions": P, "vocab_size": V}
        told |= {"layer_norm_epsilon": EPS, "activation_function": "gelu", "model_type": "gpt2"}
        # the default end of text is not a word here
        told |= {"bos_token_id": None, "eos_token_id": None}
    else:
        told = {"num_hidden_layers": L, "hidden_size": D, "num_attention_heads": N, "intermediate_size": F}
        told |= {"max_position_embeddings": P, "vocab_size": V, "layer_norm_eps": EPS, "hidden_act": "gelu"}
        told |= {"model_type": "megatron-bert", "pad_token_id": 0}
    return told | {"architectures": [FAMILIES[family]]} | changes


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, token types and mask; the second text has 7 tokens of padding at the end."""
    seed = torch.Generator().manual_seed(5)
    ids = torch.randint(1, WORDS, (2, T), generator=seed)
    types = (torch.arange(T) >= torch.tensor([[8], [5]])).long()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, -7:] = 0
    return ids * mask, types * mask, mask


def shapes_of(files: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in files.items()}


@dataclass(frozen=True)
class Reading:
    """A module, its config and the tensors it reads."""

    module: ModuleType
    c: Any
    ranks: list[Mapping[str, Tensor]]

    def logits(self, ids: Tensor | None = None, **more: Any) -> Tensor:
        out: Tensor = self.module.forward(batch()[0] if ids is None else ids, self.ranks, self.c, **more)
        return out

    def changed(self, **changes: Any) -> Reading:
        return replace(self, c=replace(self.c, **changes))


def ours(
    family: str,
    version: float | None = 3.0,
    age: str = "encoder",
    ranks: int = 1,
    *,
    full: State | None = None,
    dtype: torch.dtype = torch.float64,
    params: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    more: Mapping[str, Tensor] | None = None,
    **stages: Any,
) -> Reading:
    files = megatron_files(tensors() if full is None else full, family, version, age, ranks, **stages)
    mappings = [join_stages(rank) if stages else rank[0] for rank in files]
    mappings = [{n: t.to(dtype) for n, t in {**(more or {}), **m}.items()} for m in mappings]
    told = dict(args() if params is None else params)
    told |= {} if version is None else {"checkpoint_version": version}
    module = original(family)
    c = module.Config.from_original(told, shapes_of(mappings[0]), ranks, overrides or {})
    return Reading(module, c, list(mappings))


def theirs(
    family: str,
    *,
    full: State | None = None,
    dtype: torch.dtype = torch.float64,
    state: State | None = None,
    **config: Any,
) -> Reading:
    if state is None:
        state = hf_state(tensors() if full is None else full, family)
    module = converted(FAMILIES[family])
    c = module.Config.from_hf(hf_config(family, **config))
    return Reading(module, c, [{n: t.to(dtype) for n, t in state.items()}])


def nmse(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return ((reference - other).square().mean() / reference.var()).item()
