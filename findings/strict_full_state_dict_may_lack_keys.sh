#!/usr/bin/env bash
# set_model_state_dict of torch.distributed.checkpoint (torch 2.13.0) with full_state_dict=True finds no key missing,
# whatever is missing: strict=True answers "All keys matched successfully", and the weights stay as they were made.
#
# Without that option the same call raises for a missing key, and with it for one too many or of another shape, so it
# looks as strict as load_state_dict. The model's own tensors are put where the state dict has none before the check is
# made, and so also into the dict that was given, which is complete afterwards. FSDP runs start from a downloaded file
# this way; a file that was renamed in part, or the first shard of three, trains from random layers. Compare
# state_dict.keys() with those of the model first, and give it a copy.
#
# Seen: a state dict without "1.weight": RuntimeError by default; with full_state_dict=True no missing key reported, the
# weight unchanged, and "1.weight" in the dict; with a key more, or another shape, RuntimeError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict


def outcome(change, options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = model[1].weight.detach().clone()
    given = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    change(given)
    try:
        answer = set_model_state_dict(model, given, options=options)
    except RuntimeError:
        return "RuntimeError"
    kept, first = torch.equal(model[1].weight, before), model[0].weight.sum().item()
    return list(answer.missing_keys), kept, "1.weight" in given, first


full = StateDictOptions(full_state_dict=True, strict=True)
lacking = {name: outcome(lambda d: d.pop("1.weight"), how) for name, how in (("default", None), ("full", full))}
more = outcome(lambda d: d.update({"2.weight": torch.ones(2, 2)}), full)
other = outcome(lambda d: d.update({"1.weight": torch.ones(3, 3)}), full)
print(f"torch {torch.__version__}: without 1.weight {lacking}; with a key more {more}; of another shape {other}")
right = lacking == {"default": "RuntimeError", "full": ([], True, True, 4.0)}
sys.exit(0 if right and more == other == "RuntimeError" else 1)
PY
