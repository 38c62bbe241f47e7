#!/usr/bin/env bash
# `head_mask` does nothing in transformers 5.24.0, and is still taken: a model with every head masked gives the same
# numbers as without. So is every other keyword that forward does not know, misspelt ones included, where 4.57.6 and
# 4.37.2 raise a TypeError for BERT and BART.
#
# Which heads matter, which can be pruned and what a head does is measured by masking heads and looking at the change.
# Under release 5 every such score is 0, without an error or a line in the log, and a sweep over heads ends in "all can
# go". `attention_maks=` lets padding through in the same way. Mask heads by a hook on the projection after them, and
# compare a keyword's effect with 0 before trusting it.
#
# Seen, head_mask of zeros: logits moved by more than 0.01 in BERT, ELECTRA, MegatronBERT, GPT-2, CodeGen, XLNet, ViT,
# and in BART by its three masks, under 4.37.2 and 4.57.6; by 0 in all under 5.24.0. OPT: moved under 4.37.2 alone. A
# misspelt attention_mask: TypeError for BERT and BART under 4.37.2 and 4.57.6, taken under 5.24.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/heads.py" <<'PY'
import logging
import sys

import torch
import transformers

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
version, good = transformers.__version__, True
bert = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
gpt = dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4)
opt = dict(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
bart = dict(vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
bart |= dict(encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64)
image = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4)
cases = {
    "BertForMaskedLM": bert,
    "ElectraForMaskedLM": bert | dict(embedding_size=32),
    "MegatronBertForMaskedLM": bert,
    "GPT2LMHeadModel": gpt,
    "CodeGenForCausalLM": gpt | dict(rotary_dim=4),
    "XLNetLMHeadModel": dict(vocab_size=40, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "ViTModel": image,
    "BartForConditionalGeneration": bart,
    "OPTForCausalLM": opt,
}
ids = torch.arange(3, 15)[None]
for name, config in cases.items():
    made = getattr(transformers, name)
    config = made.config_class(**config)
    config._attn_implementation = "eager"
    model = made(config).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    x = torch.randn(1, 3, 8, 8, generator=generator) if name == "ViTModel" else ids
    more = {"decoder_input_ids": ids} if "Conditional" in name else {}
    masks = ["head_mask", *(["decoder_head_mask", "cross_attn_head_mask"] if more else [])]
    said.clear()
    with torch.no_grad():
        wanted = model(x, **more)[0]
        said.clear()
        moved = [(model(x, **more, **{mask: torch.zeros(2, 4)})[0] - wanted).abs().max().item() for mask in masks]
        warned = list(said)
        try:
            model(x, **more, attention_maks=torch.zeros_like(ids))
            taken = True
        except TypeError:
            taken = False
    print(f"transformers {version}, {name}: moved by {[f'{m:.2g}' for m in moved]}; misspelt mask taken: {taken}")
    works = version == "4.37.2" if name == "OPTForCausalLM" else version[0] == "4"
    good &= all(m > 0.01 if works else m == 0 for m in moved)
    good &= name[:4] not in ("Bert", "Bart") or taken == (version[0] == "5")
    good &= version[0] == "4" or not warned
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.37.2 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/heads.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
