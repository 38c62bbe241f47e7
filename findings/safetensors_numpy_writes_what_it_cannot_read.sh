#!/usr/bin/env bash
# safetensors.numpy 0.8.0 writes the float8 arrays of ml_dtypes 0.6.0 and cannot read them: load_file, safe_open and a
# slice end in AttributeError. bfloat16 it reads from a file (load_file) and not from bytes (load).
#
# save takes a dtype by its name and puts the right code into the header (F8_E4M3, F8_E8M0), so a JAX job saves its
# quantized weights, the file is valid, and only the job that should read them finds out. The reader looks the name up
# in numpy itself, which has no float8, and does not import ml_dtypes; load has a table of its own without these and
# without BF16. safetensors.torch reads all of it. With numpy, read the bytes by the header and give them the dtype.
#
# Seen: five dtypes are saved; load raises KeyError for each; load_file, get_tensor and get_slice raise AttributeError
# ("module 'numpy' has no attribute 'float8_e4m3fn'") for four and give bfloat16 right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "ml_dtypes==0.6.0" "safetensors==0.8.0"
"$work/env/bin/python" - "$work/codes.safetensors" <<'PY'
import sys

import ml_dtypes
import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import load, load_file, save, save_file

path, good = sys.argv[1], True
ways = {
    "load": lambda array: load(save({"x": array}))["x"],
    "load_file": lambda array: load_file(path)["x"],
    "get_tensor": lambda array: safe_open(path, "np").get_tensor("x"),
    "get_slice": lambda array: safe_open(path, "np").get_slice("x")[:],
}
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}")
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz"):
    array, found = np.array([1, 2, 4, 0.5]).astype(getattr(ml_dtypes, name)), []
    save_file({"x": array}, path)
    for read in ways.values():
        try:
            found.append("equal" if read(array).tobytes() == array.tobytes() else "different")
        except (AttributeError, KeyError) as error:
            found.append(type(error).__name__)
    print(f"{name}: {dict(zip(ways, found))}")
    good &= found == ["KeyError", *["equal" if name == "bfloat16" else "AttributeError"] * 3]
sys.exit(0 if good else 1)
PY
