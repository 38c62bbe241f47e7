#!/usr/bin/env bash
# What torch.distributed.checkpoint (torch 2.13.0) saves through FileSystemWriter(serialization_format=SAFETENSORS) it
# cannot load; and if there is a number or a text in the state, nothing else can either.
#
# The option is public, and the save ends well, with .metadata and a .distcp file that is a safetensors file for as long
# as all items are tensors (safetensors opens it). dcp.load takes each item for a torch file. The places in .metadata do
# not help: every tensor has the same offset and its bare length. A step counter or a config in the state is written in
# front of the header, and then the file is of no format. The tensors are in it: those bytes are where the header of
# safetensors begins, from the offset of the first tensor on. HuggingFaceStorageWriter has a reader of its own, and is
# for tensors only.
#
# Seen: of two tensors, offsets 0 and 0; safetensors reads both, dcp.load raises CheckpointException. With "step": 5
# beside them dcp.load raises, safetensors raises SafetensorError, and reads both from that offset on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0"
"$work/env/bin/python" -W ignore - "$work" 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, SerializationFormat


def outcome(name, state):
    folder = Path(sys.argv[1]) / name
    dcp.save(state, storage_writer=FileSystemWriter(folder, serialization_format=SerializationFormat.SAFETENSORS))
    places = FileSystemReader(folder).read_metadata().storage_data
    offsets = {index.fqn: place.offset for index, place in places.items() if index.fqn != "step"}
    (file,) = folder.glob("*.distcp")
    data = file.read_bytes()
    try:
        opened = sorted(load(data))
    except SafetensorError:
        opened = "SafetensorError"
    try:
        dcp.load(dict(state), checkpoint_id=folder)
        loaded = "loaded"
    except CheckpointException:
        loaded = "CheckpointException"
    found = load(data[offsets["a"] :])
    assert all(torch.equal(found[key], state[key]) for key in offsets)
    return offsets, opened, loaded


tensors = {"a": torch.ones(3), "b": torch.arange(4.0)}
plain, counted = outcome("plain", tensors), outcome("counted", {**tensors, "step": 5})
print(f"torch {torch.__version__}: tensors alone {plain}; with a number {counted}")
good = plain == ({"a": 0, "b": 0}, ["a", "b"], "CheckpointException") and counted[0]["a"] == counted[0]["b"] > 0
sys.exit(0 if good and counted[1:] == ("SafetensorError", "CheckpointException") else 1)
PY
