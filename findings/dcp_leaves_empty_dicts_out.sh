#!/usr/bin/env bash
# torch.distributed.checkpoint (torch 2.13.0) leaves empty dicts out, and keeps empty lists. The joined state of an
# optimizer that has none yet is refused by that optimizer.
#
# The state dict is flattened to its leaves and made again from their paths. A list without tensors is a leaf and comes
# back as []; a dict is never a leaf, and without an entry it has no path. `state` of SGD without momentum, and of every
# optimizer before its first step, is {}: saved with dcp.save and joined with dcp_to_torch_save, `state` is gone, and
# load_state_dict ends in KeyError. A schedule, a registry of adapters or a config that happens to be empty goes the
# same way, and is found missing only by whoever asks for it. torch.save keeps it.
#
# Seen: {"a": {}, "b": [], "x": tensor} comes back as b and x; SGD's state dict as param_groups alone, and
# load_state_dict raises KeyError('state').
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


def joined(state, name):
    dcp.save(state, checkpoint_id=f"{sys.argv[1]}/{name}")
    dcp_to_torch_save(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}.pt")
    return torch.load(f"{sys.argv[1]}/{name}.pt")


plain = joined({"a": {}, "b": [], "x": torch.ones(2)}, "plain")
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
before = optimizer.state_dict()
after = joined({"model": layer.state_dict(), "optimizer": before}, "run")["optimizer"]
try:
    optimizer.load_state_dict(after)
    refused = None
except KeyError as error:
    refused = error
optimizer.load_state_dict(before)
print(f"torch {torch.__version__}: {plain}; SGD: {sorted(before)} becomes {sorted(after)}, load_state_dict: {refused!r}")
sys.exit(0 if sorted(plain) == ["b", "x"] and plain["b"] == [] and sorted(after) == ["param_groups"] and refused else 1)
PY
