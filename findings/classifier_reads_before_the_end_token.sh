#!/usr/bin/env bash
# The sequence classifiers of decoders (reward models) take the last token that is not the padding token, and do not
# look at attention_mask: where padding and end token are one, the end token of a finished text is never read. Given
# embeddings instead of ids, they read the last place, padding or not. transformers 4.57.6 and 5.24.0.
#
# pad_token = eos_token is what most recipes say for models that have no padding token. A reward that was trained on the
# state at the end token is then read one token earlier, and a text that ends in several of them (a chat turn and the
# text) before all of them; whether it was cut off or finished makes no difference at all. Nothing is logged. With
# inputs_embeds a batch of texts of different lengths is read at the padding of all but the longest (a warning says that
# padding may be missed). A padding token of its own is what helps.
#
# Seen for Llama, Qwen2, Mixtral, Gemma 2, GPT-2 and OPT: a text with an end token and a mask of ones has the score of
# the text without it, off by less than 1e-5, and by more than 0.01 where another id is the padding; a padded text as
# embeddings with its mask is off from the same text alone by more than 0.01, as ids by less than 1e-5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/scores.py" <<'PY'
import sys

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64)
opt = dict(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
cases = {
    "Llama": sizes,
    "Qwen2": sizes,
    "Mixtral": sizes | dict(num_local_experts=4),
    "Gemma2": sizes | dict(head_dim=8),
    "GPT2": dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4),
    "OPT": opt | dict(max_position_embeddings=64),
}
end, good = 2, True
text = torch.arange(3, 27)[None]
ended = torch.cat([text, torch.tensor([[end]])], 1)
padded = torch.cat([text, torch.full((1, 4), end)], 1)
mask = torch.ones_like(padded)
mask[0, -4:] = 0
for name, config in cases.items():
    made = getattr(transformers, f"{name}ForSequenceClassification")
    scores = {}
    for padding in (end, 1):
        model = made(made.config_class(**config, pad_token_id=padding, eos_token_id=end, bos_token_id=3)).eval()
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data.normal_(0, 0.3, generator=generator)
        with torch.no_grad():
            plain = model(text, attention_mask=torch.ones_like(text)).logits
            scores[padding] = (model(ended, attention_mask=torch.ones_like(ended)).logits - plain).abs().max().item()
            if padding == end:
                ids = (model(padded, attention_mask=mask).logits - plain).abs().max().item()
                given = model.get_input_embeddings()(padded)
                embedded = (model(inputs_embeds=given, attention_mask=mask).logits - plain).abs().max().item()
    print(
        f"transformers {transformers.__version__}, {name}: the end token moves the score by {scores[end]:.2g}, with another "
        f"padding token by {scores[1]:.2g}; padding moves it by {ids:.2g}, as embeddings by {embedded:.2g}"
    )
    good &= scores[end] < 1e-5 and scores[1] > 0.005 and ids < 1e-5 and embedded > 0.01
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/scores.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
