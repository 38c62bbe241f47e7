#!/usr/bin/env bash
# The load-balancing loss of gpt-oss does next to nothing against a collapsed router in transformers 4.57.6: what is
# called router_logits there are the shares of the experts that were chosen, and 0 for the others. 5.24.0 takes the
# logits, and 0.001 of the loss where 4.57.6 took 0.9, if config.json says no router_aux_loss_coef.
#
# The loss is made for logits: it takes their softmax, and multiplies it by how often each expert is chosen. Of numbers
# between 0 and 1 the softmax is nearly even, so that a router that sends everything to the same experts costs little
# more than one that spreads, and only experts that were chosen get a gradient, too small by a factor of several. With
# output_router_logits=True the same folder and texts train by two losses. Nothing is logged.
#
# Seen, 8 experts, 2 of them for a token, all tokens to the same two: 8.00 in 5.24.0, which is all there can be, and
# less than 3 in 4.57.6; one that spreads, 2.7 and 2.5. Rows of its matrix with a gradient: all 8 in 5.24.0, fewer in
# 4.57.6. router_logits through those of the matrix itself: equal in 5.24.0, between 0 and 1 in 4.57.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/balance.py" <<'PY'
import sys

import torch
import transformers
from transformers import GptOssConfig, GptOssForCausalLM

transformers.utils.logging.set_verbosity_error()
new, good, found = transformers.__version__.startswith("5."), True, {}
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
sizes |= dict(num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64)
config = GptOssConfig(**sizes)
ids = torch.arange(3, 35)[None]
for kind in ("spread", "collapsed"):
    model = GptOssForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    router = model.model.layers[0].mlp.router
    if kind == "collapsed":
        router.bias.data[:2] += 50
    given = []
    router.register_forward_hook(lambda module, args, _, given=given: given.append(args[0].reshape(-1, 32)))
    out = model(ids, labels=ids, output_router_logits=True)
    out.aux_loss.backward()
    logits = given[0] @ router.weight.T + router.bias
    said = out.router_logits[0]
    same = torch.allclose(said, logits, atol=1e-4)
    rows = int((router.weight.grad.abs().amax(1) > 1e-9).sum())
    found[kind] = out.aux_loss.item()
    print(
        f"transformers {transformers.__version__}, {kind}: loss {found[kind]:.3g}; router_logits from {said.min().item():.2g} "
        f"to {said.max().item():.2g}, those of the matrix: {same}; rows with a gradient: {rows}"
    )
    good &= same == new and (new or (said.min() >= 0 and said.max() <= 1))
    good &= kind == "collapsed" or (rows == 8) == new
print(f"router_aux_loss_coef where config.json has none: {config.router_aux_loss_coef}")
good &= config.router_aux_loss_coef == (0.001 if new else 0.9)
good &= 2 < found["spread"] < 3 and (abs(found["collapsed"] - 8) < 1e-3 if new else found["collapsed"] < 3)
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/balance.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
