#!/usr/bin/env bash
# What torch.distributed.checkpoint (torch 2.13.0) raises when a checkpoint does not fit is no Exception: `except
# Exception` does not catch it, and it goes past with KeyboardInterrupt and SystemExit.
#
# "Take the newest checkpoint that loads, else the one before" is a loop with `except Exception`, and so are the
# handlers of trainers and servers that log an error and go on. A missing key, another shape or an item that cannot be
# read is wrapped as CheckpointException, which derives from BaseException, so the process ends where it was meant to
# fall back. So is a folder without .metadata, as a run that was stopped while it saved leaves one. Catch
# CheckpointException by name.
#
# Seen: a missing key, another shape, a data file cut short and no .metadata go past `except Exception`; the cause
# (RuntimeError, ValueError, AssertionError) is inside, in `failures`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - "$work" 2>/dev/null <<'PY'
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

folder = f"{sys.argv[1]}/run"
dcp.save({"w": torch.ones(2, 3)}, checkpoint_id=folder)
good = True
cut = shutil.copytree(folder, f"{sys.argv[1]}/cut")
data = next(Path(cut).glob("*.distcp"))
data.write_bytes(data.read_bytes()[:10])
cases = [("missing key", "v", (2, 3), folder, "RuntimeError"), ("another shape", "w", (3, 2), folder, "ValueError")]
cases += [("cut short", "w", (2, 3), cut, "RuntimeError"), ("no .metadata", "w", (2, 3), sys.argv[1], "AssertionError")]
for case, name, shape, place, cause in cases:
    try:
        try:
            dcp.load({name: torch.ones(shape)}, checkpoint_id=place)
            passed = "nothing raised"
        except Exception as error:
            passed = f"caught {type(error).__name__}"
    except BaseException as error:
        inner = [type(inside).__name__ for inside, _ in getattr(error, "failures", {}).values()]
        passed = f"{type(error).__name__} went past, inside: {inner}"
    print(f"torch {torch.__version__}, {case}: {passed}")
    good &= passed == f"CheckpointException went past, inside: ['{cause}']"
sys.exit(0 if good and not issubclass(CheckpointException, Exception) else 1)
PY
