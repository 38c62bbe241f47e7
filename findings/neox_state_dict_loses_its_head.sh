#!/usr/bin/env bash
# The head of GPT-NeoX has one name on disk and another in memory since transformers 5, so a saved state_dict()
# loads in 4.57.6 with a head that nobody trained.
#
# save_pretrained of 5.23.0 still writes `embed_out.weight`, as every release before. model.state_dict(), which is
# what trainers and torch.save keep, says `lm_head.weight`. 5.23.0 loads both. 4.57.6 knows the first only: it
# initialises embed_out anew and logs a warning, so the file of weights is read and the logits are noise.
#
# Seen: on disk embed_out.weight, in memory lm_head.weight; the state_dict() back in 5.23.0: largest |delta| of
# logits 0, in 4.57.6: 5.5 of logits up to 5.5, missing keys ['embed_out.weight'].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
work = Path(sys.argv[1])
ids = torch.arange(20)[None]
if sys.argv[2] == "write":
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=64)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(work / "saved")
    with safe_open(work / "saved" / "model.safetensors", "pt") as file:
        disk = [k for k in file.keys() if not k.startswith("gpt_neox.")]
    memory = [k for k in model.state_dict() if not k.startswith("gpt_neox.")]
    print(f"transformers {transformers.__version__}: the head is {disk} on disk, {memory} in memory")
    (work / "state").mkdir()
    (work / "state" / "config.json").write_bytes((work / "saved" / "config.json").read_bytes())
    torch.save(model.state_dict(), work / "state" / "pytorch_model.bin")
    with torch.no_grad():
        torch.save(model(ids).logits, work / "logits.pt")
    if (disk, memory) != (["embed_out.weight"], ["lm_head.weight"]):
        sys.exit(1)
model, info = GPTNeoXForCausalLM.from_pretrained(work / "state", output_loading_info=True)
with torch.no_grad():
    logits = model.eval()(ids).logits
right = torch.load(work / "logits.pt")
delta, missing = (logits - right).abs().max().item(), sorted(info["missing_keys"])
print(
    f"transformers {transformers.__version__} reads the state_dict(): largest |delta| of logits {delta:.2g} of "
    f"logits up to {right.abs().max().item():.2g}, missing keys {missing}"
)
if transformers.__version__.startswith("5."):
    sys.exit(0 if delta == 0 and not missing else 1)
sys.exit(0 if delta > 1 and missing == ["embed_out.weight"] else 1)
PY
for pair in 5.23.0:write 4.57.6:read; do
    version=${pair%%:*}
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/run.py" "$work" "${pair##*:}"
done
