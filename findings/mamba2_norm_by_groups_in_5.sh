#!/usr/bin/env bash
# A Mamba-2 model with several groups (n_groups; 8 in Codestral Mamba, and where config.json says nothing) is two
# models: transformers 4.57.6 norms the whole width before the last projection of each layer, 5.24.0 each group for
# itself.
#
# mamba_ssm, where these models come from, divides each group by its own root mean square (group_size = d_ssm / ngroups
# in its RMSNormGated), and 5.24.0 does so now. 4.57.6 divides by that of all groups. The weights are the same tensors
# of the same shapes, so that nothing is missing, unexpected or logged, and with one group both are equal. What was
# fine-tuned, quantized or evaluated under release 4 was another model than the one that is published, and than the one
# that release 5 and the kernels compute.
#
# Seen: logits of up to 5.2 of one folder: off by less than 1e-5 between the releases with one group, by 4.3 with two,
# from the first token on; the layer's norm agrees with a plain one of the whole width in 4.57.6, of each group in
# 5.24.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/groups.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
new, ids, good = transformers.__version__.startswith("5."), torch.arange(1, 33)[None], True
assert Mamba2Config().n_groups == 8
for groups in (1, 2):
    folder = Path(sys.argv[1], f"groups-{groups}")
    generator = torch.Generator().manual_seed(0)
    if not new:
        sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, chunk_size=8)
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=groups))
        for p in model.parameters():
            p.data += torch.empty_like(p).normal_(0, 0.2, generator=generator)
        model.save_pretrained(folder)
    model, info = Mamba2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        logits = model.eval()(ids).logits
        norm = model.backbone.layers[0].mixer.norm
        x, gate = torch.randn(2, 3, 64, generator=generator).unbind(0)
        x[:, 32:] *= 4  # the second half is larger
        gated, eps = x * torch.nn.functional.silu(gate), norm.variance_epsilon
        parts = gated.view(3, groups, -1) if new else gated.view(3, 1, -1)
        wanted = (parts * (parts.square().mean(-1, keepdim=True) + eps).rsqrt()).view(3, 64) * norm.weight
        agrees = torch.allclose(norm(x, gate), wanted, atol=1e-5)
    if not new:
        torch.save(logits, folder / "logits.pt")
    old = torch.load(folder / "logits.pt")
    off = (logits - old).abs()[0].amax(-1)
    print(
        f"transformers {transformers.__version__}, {groups} groups: the norm as told {agrees}; logits of up to "
        f"{old.abs().max():.2g} off from 4.57.6 by {off.max():.2g}, for the first token {off[0]:.2g}"
    )
    good &= agrees and ((off.max() < 1e-4) if groups == 1 or not new else (off.max() > 1 and off[0] > 0.1))
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/groups.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
