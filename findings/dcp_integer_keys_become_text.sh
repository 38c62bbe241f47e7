#!/usr/bin/env bash
# torch.distributed.checkpoint (torch 2.13.0) makes text of the integer keys of a dict, and says nothing.
#
# The state of an optimizer, and a list of experts or stages kept as a dict, have integer keys. Saved with dcp.save and
# joined with dcp_to_torch_save, the tool for it, they come back under "0", "1", ...: `state[0]` is a KeyError, and
# load_state_dict of torch.optim leaves the moments of every parameter out without a word, so that a run goes on from
# the right weights with an optimizer that knows nothing. torch.save keeps the keys.
#
# Seen: keys ['0', '1'] of type str; Adam's load_state_dict takes the joined state and has no moment of any parameter
# under its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - "$work" <<'PY'
import sys

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

work = sys.argv[1]


def made():
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters())


model, optimizer = made()
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=f"{work}/checkpoint")
dcp_to_torch_save(f"{work}/checkpoint", f"{work}/joined.pt")
joined = torch.load(f"{work}/joined.pt", weights_only=True)["optimizer"]
other, again = made()
again.load_state_dict(joined)
known = [p in again.state for p in other.parameters()]
print(
    f"torch {torch.__version__}: keys {list(optimizer.state_dict()['state'])} came back as "
    f"{list(joined['state'])}; moments of each parameter after load_state_dict: {known}"
)
sys.exit(0 if list(joined["state"]) == ["0", "1"] and not any(known) else 1)
PY
