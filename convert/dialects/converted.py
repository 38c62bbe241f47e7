"""The small files of a Hugging Face folder: config.json, generation_config.json, and the manifest that says
how the original was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects.config_keys import read_keys
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.facts_problems import misread
from ckpt_tool.convert.facts_rotary import ROTARY
from ckpt_tool.convert.facts_settings import overlaid
from ckpt_tool.convert.kept import read_manifest
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import OutputDocument, Value
from ckpt_tool.convert.quantised_view import carried_of
from ckpt_tool.errors import Problem, fail, fail_all

# Names that transformers has for the numbers of GPT-2 and what came from it, and those every family knows.
GPT2_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}

GENERATION = "generation_config.json"
# Tensors of decoders to leave out, with the reason; old transformers wrote one for each layer.
FREQUENCIES: Mapping[str, str] = {
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "recomputed from rope_theta",
}
# Configs of the parts of a model that reads more than text.
PARTS = ("text_config", "vision_config", "audio_config")


def read_config(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    architectures: Sequence[str],
    *,
    model_type: str | None = None,
    own: Class,
) -> Facts:
    """config.json of a model of one of `architectures`, as the class `own` reads it, with the user's
    settings. Fails for another model, for packed weights, for one value said twice and differently, and for
    what `own` does not read and may change the numbers, unless the user sets it to null; without a
    `model_type` any is taken."""
    if "config.json" not in checkpoint.documents:
        hint = "put the config.json of the same model there"
        message = "expected config.json beside the weights, found none"
        fail("missing-file", message, file=checkpoint.path.name, hint=hint)
    document = checkpoint.json("config.json")
    problems = []

    def refuse(where: str, wanted: str, found: str) -> None:
        problems.append(Problem("unsupported", f"expected {wanted}, found {found}", "config.json", where))

    said = document.get("model_type", model_type)
    if model_type is not None and said != model_type:
        refuse("model_type", json.dumps(model_type), json.dumps(said)[:100])
    named = document.get("architectures") or list(architectures[:1])
    if not isinstance(named, list) or len(named) != 1 or named[0] not in architectures:
        refuse("architectures", " or ".join(architectures), json.dumps(named)[:100])
    for name in PARTS:
        if document.get(name) is not None:
            refuse(name, "the config of a text model alone", "one of a model of several parts")
    fail_all(problems)
    carried = carried_of(checkpoint) is not None
    document, settings, notes = read_keys(document, settings, own, quantised=carried)
    fail_all(misread(overlaid(document, settings), own, settings))
    rotary = {n: own.aliases[n][0] for n in ROTARY if n in own.aliases}
    facts = Facts(document, "config.json", settings, rotary)
    facts.notes += notes
    return facts


def kept_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the conversion left in the manifest of an output of ours; empty for other folders."""
    found = read_manifest(checkpoint)
    return {} if found is None else found.original


def generation_config(config: Mapping[str, Value]) -> OutputDocument:
    """What transformers 4 derives from a config: the ids at which generation starts and ends."""
    ids = {k: config[k].value for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
    text = json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n"
    return OutputDocument(GENERATION, text.encode(), "token ids of config.json")
