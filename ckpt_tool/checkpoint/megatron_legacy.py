"""Gated decoders as Megatron-LM kept them before Core, read under Core's names for the same tensors.

Llama, Mistral and Qwen2 runs of 2023 to 2026 nest their weights as GPT-2 and BERT runs do. They have no
biases but those of queries, keys and values, and the order of rows is Core's: whole groups of queries, their
key and their value; gates before ups. So other names are all that sets them apart. GPT-2 and BERT, whose
norms have biases, keep theirs; so does a file whose version says that its rows have another order.

With `--transformer-impl transformer_engine` layers are that library's TransformerLayer, with names of its own
for the same parts: query, key and value of a group together, gates before ups.

Source: NVIDIA/TransformerEngine (pytorch/transformer.py), NVIDIA/Megatron-LM 23.06 and core_v0.9.0
(legacy/model/language_model.py, transformer.py:
ParallelAttention, ParallelMLP).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain

from ckpt_tool.checkpoint.base import Renamed, TensorFile
from ckpt_tool.checkpoint.pickle_records import Inert
from ckpt_tool.errors import fail, printable

_HOME = re.compile(r"(?P<model>(?:model\d{0,4}\.)?)language_model\.(?P<rest>.+)", re.ASCII)
_COPY = re.compile(r"(?P<model>(?:model\d{0,4}\.)?)word_embeddings_for_head\.weight", re.ASCII)
_LAYER = re.compile(r"(?:encoder|transformer)\.layers\.(?P<number>\d+)\.(?P<rest>.+)", re.ASCII)
_WHOLE = {
    "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "output_layer.weight": "output_layer.weight",
    **{
        f"{block}.final_{norm}.weight": "decoder.final_layernorm.weight"
        for block in ("encoder", "transformer")
        for norm in ("norm", "layernorm")
    },
}
_IN_LAYER = {
    **{
        f"{before}_{norm}.weight": f"{own}.weight"
        for before, own in (("input", "input_layernorm"), ("post_attention", "pre_mlp_layernorm"))
        for norm in ("norm", "layernorm")
    },
    **{
        f"{attention}.{part}": f"self_attention.{own}"
        for attention in ("self_attention", "attention")
        for part, own in (
            ("query_key_value.weight", "linear_qkv.weight"),
            ("query_key_value.bias", "linear_qkv.bias"),
            ("dense.weight", "linear_proj.weight"),
        )
    },
    # layers that are Transformer Engine's
    "self_attention.layernorm_qkv.layer_norm_weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.layernorm_qkv.weight": "self_attention.linear_qkv.weight",
    "self_attention.layernorm_qkv.bias": "self_attention.linear_qkv.bias",
    "self_attention.proj.weight": "self_attention.linear_proj.weight",
    "layernorm_mlp.layer_norm_weight": "mlp.linear_fc1.layer_norm_weight",
    "layernorm_mlp.fc1_weight": "mlp.linear_fc1.weight",
    "layernorm_mlp.fc2_weight": "mlp.linear_fc2.weight",
    **{
        f"{own}._extra_state": f"{module}._extra_state"
        for own, module in (
            ("self_attention.layernorm_qkv", "self_attention.linear_qkv"),
            ("self_attention.proj", "self_attention.linear_proj"),
            ("self_attention.core_attention", "self_attention.core_attention"),
            ("layernorm_mlp", "mlp.linear_fc1"),
        )
    },
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
}
_TELLS = re.compile(
    r"(model\d{0,4}\.)?language_model\.\w+\.layers\.\d+\.(self_)?attention\.(query_key_value|layernorm_qkv)\.weight",
    re.ASCII,
).fullmatch
ORDERED = 2.0  # since this version of the format a head's query, key and value follow one another


def named_as_core(files: Mapping[str, TensorFile]) -> tuple[dict[str, TensorFile], list[str]]:
    """`files` under Core's names, with a note; as they are where they hold something else. `duplicate-tensor`
    where a file has two tensors that Core calls the same."""
    if not any("language_model." in "\n".join(f.tensors) for f in files.values()):
        return dict(files), []
    names = dict.fromkeys(chain.from_iterable(f.tensors for f in files.values()))
    example = next(filter(_TELLS, names), None)
    if example is None or not all(map(_computes_as_core, files.values())):
        return dict(files), []
    called = {name: _core(name) for name in names}
    if None in called.values():
        return dict(files), []
    made: dict[str, TensorFile] = {}
    for name, file in files.items():
        own: dict[str, str] = {}
        for old in file.tensors:
            new = called[old] or old
            if new in own:
                found = f"found {printable(own[new], 80)} too"
                fail("duplicate-tensor", f"expected {printable(new, 80)} once, {found}", file=name, where=old)
            own[new] = old
        made[name] = Renamed(file, own)
        made[name].metadata = file.metadata
    note = (
        f"names of Megatron-LM before Core ({printable(example, 80)}) were read as Core's "
        f"({printable(called[example] or '', 80)})"
    )
    return made, [note]


def _computes_as_core(file: TensorFile) -> bool:
    """Whether Core's names stand for what the run computed: its rows have that order, positions are rotary,
    and branches are added to what was not normalised, of which Core has no other kind."""
    version = file.metadata.get("checkpoint_version", ORDERED)
    said = file.metadata.get("args")
    args = said.fields if isinstance(said, Inert) else said if isinstance(said, Mapping) else {}
    if "position_embedding_type" in args:
        rotary = args["position_embedding_type"] == "rope"
    else:  # as runs of 2023 said it
        rotary = bool(args.get("use_rotary_position_embeddings", True))
    ordered = isinstance(version, int | float) and version >= ORDERED
    return ordered and rotary and not args.get("apply_residual_connection_post_layernorm")


def _core(name: str) -> str | None:
    """What Core calls the tensor: a name that is no model's stays, None for one that no such decoder has."""
    if copy := _COPY.fullmatch(name):
        return f"{copy['model']}output_layer.weight"
    home = _HOME.fullmatch(name)
    if home is None:
        return None if re.match(r"model\d{0,4}\.", name, re.ASCII) else name
    layer = _LAYER.fullmatch(home["rest"])
    if layer is None:
        own = _WHOLE.get(home["rest"])
    else:
        inside = _IN_LAYER.get(layer["rest"])
        own = None if inside is None else f"decoder.layers.{layer['number']}.{inside}"
    return None if own is None else home["model"] + own
