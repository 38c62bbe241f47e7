"""OPT as Meta published it: metaseq's `reshard-model_part-K.pt`, one file per model-parallel rank, or a
single `reshard.pt` (350m) or `restored.pt`.

Source: Zhang et al. 2022 (arXiv 2205.01068) and facebookresearch/metaseq @f2cd3679 and @f7ffa5fd (models/
transformer.py, modules/transformer_layer.py, model_parallel).

All sizes but 350m normalise before each branch and once more after the last layer. 350m normalises after each
sum, has no norm at the end, and words of half its width, which are projected into the model and out of it.
The 1e-5 of the norms and the scale of the words, 1, are in the code and no file has them.

The ranks, and what each of them holds, are those of transformer.py; the projections of 350m are on every
rank. B batch, T tokens, D model width, E width of a word (D but in 350m), V vocabulary, S ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ckpt_tool.reference import transformer
from ckpt_tool.reference.blocks import GELUS, KEYS_FIRST, Past, before, join_words, remembered, visible, words
from ckpt_tool.reference.facts import Shapes, disagreements, first, only, refuse
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, decoder_phases, passes
from ckpt_tool.reference.transformer import norm, transformed

PAD = 1  # the row of padding in the table of positions; the first token has the row after it
ACTIVATIONS = {"relu": "relu", **GELUS}
# By what they are for; the fused tensor has keys, then values, then queries, whatever its name says.
LAYER_STEMS = """
    norm_1 self_attn_layer_norm.  norm_2 final_layer_norm.  fc1 fc1.  fc2 fc2.  qkv self_attn.qkv_proj.
    q self_attn.q_proj.  k self_attn.k_proj.  v self_attn.v_proj.  dense self_attn.out_proj.
"""
MODEL_STEMS = """
    word embed_tokens.  position embed_positions.  into project_in_dim.  out_of project_out_dim.
    block layers.  final_norm layer_norm.
"""

# The published sizes, 125m to 175b, by what their tensors show (layers, width, width of a word, feed-forward
# width) -> heads; all have relu.
PUBLISHED = {
    (layers, D, 512 if D == 1024 else D, 4 * D): heads
    for layers, D, heads in zip(
        (12, 24, 24, 32, 32, 40, 48, 64, 96),
        (768, 1024, 2048, 2560, 4096, 5120, 7168, 9216, 12288),
        (12, 16, 32, 32, 32, 40, 56, 72, 96),
        strict=True,
    )
}
# Settings with another value are of another model than OPT.
COMPUTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("no_scale_embedding", "share_decoder_input_output_embed"), (True,)),
    **dict.fromkeys(("decoder_learned_pos", "enable_bias", "layer_norm_elementwise_affine"), (True,)),
    **dict.fromkeys(("decoder_learned_sinusoidal", "alibi", "disable_bias", "disable_affine_ln"), (False,)),
    **dict.fromkeys(("_remove_final_layer_norm", "use_stable_embedding", "sync_ln_variance"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_fc", "scale_heads"), (False,)),
    "self_attn_doc_sep": (-1,),  # the token that ends a document, before which nothing is seen; -1: none
}
# What a fork of metaseq could call a part of its model, and what is called so and is none.
OF_A_MODEL = re.compile(
    r"\w*(decoder|encoder|attn|attention|norm|embed|scale|rotary|rope|expert|moe|glu|bias|heads|position"
    r"|softmax|residual|window|adaptive|char|stable|parallel_block)\w*",
    re.ASCII,
)
OF_A_RUN = re.compile(
    r"\w*(dropout|layerdrop|_init|init_|loss_scale|clip_norm|grad_norm|log_)\w*|fp16\w*|attn_variant|xf_attn_op"
    r"|max_source_positions|adaptive_\w+_factor|char\w+_(dim|filters|layers)|softmax_batch|context_window",
    re.ASCII,
)
KNOWN = {
    *(f"decoder_{n}" for n in ("layers", "attention_heads", "normalize_before", "embed_dim", "input_dim")),
    *("decoder_output_dim", "decoder_ffn_embed_dim", "max_target_positions", "max_position_embeddings"),
    *("num_attention_heads", "do_layer_norm_before", "word_embed_proj_dim", "tie_word_embeddings"),
    *COMPUTED,
}


@dataclass(frozen=True)
class Config(transformer.Config):
    projected: bool = False  # words have a width of their own

    @classmethod
    def from_original(
        cls, params: Mapping[str, Any], shapes: Shapes, ranks: int, overrides: Mapping[str, Any]
    ) -> Self:
        """`params` are the pickled settings as plain values: `cfg` and `args` as in the file, or what is in
        one of them, or nothing; `shapes` those of rank 0, `overrides` facts from the user under their Hugging
        Face names, which win. What nobody tells is that of the published model of the same sizes. ValueError
        with all that is missing, that disagrees, and that this pass does not compute."""
        told = _settings(params)
        prefix, n_layers = _stack(shapes)
        (_, E), (_, D) = (shapes[f"{prefix}embed_{n}.weight"] for n in ("tokens", "positions"))
        F = shapes[f"{prefix}layers.0.fc1.weight"][0]
        known = PUBLISHED.get((n_layers, D, E, F * ranks))
        normed = f"{prefix}layer_norm.weight" in shapes
        heads = first(overrides.get("num_attention_heads"), told.get("decoder_attention_heads"), known, 0)
        before = first(overrides.get("do_layer_norm_before"), told.get("decoder_normalize_before"))
        before = first(before, D == E if known else None, True if normed else None)
        asked, own = overrides.get("activation_function"), told.get("activation_fn", "relu")
        said = first(overrides.get("num_hidden_layers"), told.get("decoder_layers"))
        problems = [*disagreements({"layers": n_layers}, {"layers": said})]
        problems += only({**told, **overrides}, COMPUTED)
        problems += _of_another_model({**told, **overrides})
        # metaseq's own `gelu` is no answer: the exact one at first, the tanh form when its kernel was fused
        # and since October 2022.
        given = "in the settings or given by name"
        if asked is None and own != "relu":
            problems.append(
                f"expected relu or `activation_function` given by name, found `{own}` in the settings"
            )
        elif asked not in (None, *ACTIVATIONS):
            wanted = ", ".join(ACTIVATIONS)
            problems.append(f"expected `activation_function` to be one of {wanted}, found {asked}")
        if before is None:
            problems.append(f"expected `do_layer_norm_before` {given}, or a final norm, found none of them")
        elif bool(before) != normed:
            wanted, place = ("a", "before") if before else ("no", "after")
            found = f"norms come {place} a branch, found {'one' if normed else 'none'}"
            problems.append(f"expected {wanted} final norm, as {found}")
        if not int(heads):
            problems.append(f"expected `num_attention_heads` {given}, found neither")
        elif int(heads) % ranks or D % int(heads):
            problems.append(f"expected heads that {ranks} ranks and {D} channels can share, found {heads}")
        refuse(problems)
        fused = f"{prefix}layers.0.self_attn.qkv_proj.weight" in shapes
        return cls(
            n_layers=n_layers,
            n_heads=int(heads),
            n_groups=int(heads),
            norm_eps=1e-5,
            activation=ACTIVATIONS[asked or "relu"],
            names={**_stems(LAYER_STEMS), **_stems(MODEL_STEMS, prefix)},
            order=KEYS_FIRST if fused else None,
            masked=None,  # -inf would leave padding before the first token without any key
            pre_norm=bool(before),
            projected=f"{prefix}project_in_dim.weight" in shapes,
        )


def _stems(table: str, prefix: str = "") -> dict[str, str]:
    roles, names = table.split()[::2], table.split()[1::2]
    return {role: prefix + name for role, name in zip(roles, names, strict=True)}


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model, wherever they are, without those that are unset or refer to others; `cfg`
    is newer than `args` and wins."""
    told = dict(params)
    cfg = params.get("cfg")
    for inner in (params.get("args"), cfg, cfg.get("model") if isinstance(cfg, Mapping) else None):
        if isinstance(inner, Mapping):
            told |= inner
    return {k: v for k, v in told.items() if v is not None and not (isinstance(v, str) and "${" in v)}


def _of_another_model(told: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are called like a part of a model, are switched on, and are not known here."""
    for name, value in told.items():
        on = isinstance(value, int | float | str) and value not in (0, "", "None")
        if on and name not in KNOWN and OF_A_MODEL.fullmatch(name) and not OF_A_RUN.fullmatch(name):
            yield f"expected settings that this pass reads or that are of a run, found `{name}` {value}"


def _stack(shapes: Iterable[str]) -> tuple[str, int]:
    """What all names begin with, and the number of layers."""
    pattern = r"(|.*\.)layers\.(\d+)\.self_attn\.out_proj\.weight"
    layers = [(m[1], int(m[2])) for m in (re.fullmatch(pattern, name) for name in shapes) if m]
    prefix = layers[0][0] if layers else ""
    if not layers or sorted(layers) != [(prefix, i) for i in range(len(layers))]:
        raise ValueError("expected one stack of layers 0, 1, 2, ..., found another")
    return prefix, len(layers)


def phases(ranks: Ranks, c: Config, inputs: Inputs = NOTHING) -> list[Phase]:
    return decoder_phases(embed, layer, {"head": head}, ranks, c, inputs)


forward, encode = passes(phases)


def embed(
    ids: Tensor, ranks: Ranks, c: Config, *, mask: Tensor | None = None, past: Past | None = None
) -> Tensor:
    """Tokens are counted from row 2 of the table of positions, past any padding, which has row 1."""
    x = words(ids, [w[c.names["word"] + "weight"] for w in ranks])
    if c.projected:
        x = x @ ranks[0][c.names["into"] + "weight"].T  # (B, T, D)
    real = torch.ones_like(ids) if mask is None else mask.long()
    return x + ranks[0][c.names["position"] + "weight"][(real.cumsum(1) + before(past)) * real + PAD]


def layer(
    x: Tensor, i: int, ranks: Ranks, c: Config, mask: Tensor | None = None, past: Past | None = None
) -> Tensor:
    return transformed(x, i, ranks, c, visible(x, mask=mask, before=remembered(past, (i, 0))), past)


def head(x: Tensor, ranks: Ranks, c: Config) -> Tensor:
    """The words are the output layer; `output_projection`, where a file has it, is a copy of them."""
    parts = []
    for w in ranks:
        y = norm(x, w, c.names["final_norm"], c) if c.pre_norm else x
        y = y @ w[c.names["out_of"] + "weight"].T if c.projected else y  # (B, T, E)
        parts.append(y @ w[c.names["word"] + "weight"].T)  # (B, T, V/S)
    return join_words(parts)
