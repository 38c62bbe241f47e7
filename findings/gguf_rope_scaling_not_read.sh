#!/usr/bin/env bash
# A GGUF file whose rotary positions are scaled is read with plain ones by transformers 5.23.0 and 4.57.6
# (from_pretrained(folder, gguf_file=...)), without a word.
#
# GGUF says a scaling in two ways: as metadata (llama.rope.scaling.type with its factor) and, for the kind of Llama 3.1,
# as a tensor of divisors, rope_freqs.weight. Weights, widths, the base and even the permutation of the query and key
# rows are taken from the file, so that a model without scaling comes out equal to the last bit, and one expects the
# rest to be there or to be refused. The metadata are not looked at, the tensor is dropped without being listed as
# unexpected, and the config that is saved again has no scaling. Give it as `rope_parameters` (5) or `rope_scaling` (4)
# of the config by hand.
#
# Seen, 40 tokens of a small Llama: largest |delta| of logits to the unscaled model 0 for the plain file, and 0 for
# linear with factor 4, for yarn and for a tensor of divisors; a config with linear and factor 4 moves logits of up to
# 5.6 by 6.9. No key missing or unexpected, nothing logged, in both releases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/scaled.py" <<'PY'
import logging
import sys

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "bos_token_id": 1}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
ids = torch.arange(1, 41)[None]
plain = model(ids).logits


def interleaved(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def written(path, scaling, divisors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        rows = tensor.numpy() if heads is None else interleaved(tensor.numpy(), heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(rows))
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


folder, deltas, keys = sys.argv[1], {}, []
kinds = gguf.RopeScalingType
for kind, scaling, divisors in [("plain", None, 0), ("linear", kinds.LINEAR, 0), ("yarn", kinds.YARN, 0), ("tensor", None, 1)]:
    written(f"{folder}/{kind}.gguf", scaling, divisors)
    read, info = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf", output_loading_info=True)
    deltas[kind] = (read.eval()(ids).logits - plain).abs().max().item()
    keys += [key for value in info.values() for key in value]
scaled = LlamaForCausalLM(LlamaConfig(**sizes, rope_scaling={"rope_type": "linear", "factor": 4.0})).eval()
scaled.load_state_dict(model.state_dict())
meant = (scaled(ids).logits - plain).abs().max().item()
print(f"transformers {transformers.__version__}: {deltas}; linear in the config: {meant:.2g} of up to {plain.abs().max():.2g}")
print(f"keys reported: {keys}, logged: {said}")
sys.exit(0 if not any(deltas.values()) and meant > 1 and not keys and not said else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version" "gguf==0.19.0" accelerate
    mkdir "$work/files$version"
    "$work/$version/bin/python" -W ignore "$work/scaled.py" "$work/files$version"
done
