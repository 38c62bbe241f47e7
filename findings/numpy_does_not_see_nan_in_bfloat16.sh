#!/usr/bin/env bash
# numpy 2.4.6 with ml_dtypes 0.6.0: nan_to_num leaves a bfloat16 array as it is, nansum and nanmean are NaN, and
# nanargmax is the place of the NaN. isnan finds it.
#
# What numpy has against NaN first asks whether the dtype can hold one, by `np.inexact`, and a dtype of ml_dtypes is
# none of numpy's, so that the functions go on as for integers. No error, and no warning. Cleaning weights with
# nan_to_num before a cast, or the largest absolute weight by nanmax of part of it for a scale, works in float16 and
# does nothing here; the same for the float8 dtypes. Widen first: x.astype(np.float32) is exact.
#
# Seen: of [1, nan, inf, -2] in bfloat16 and in float8_e5m2 nan_to_num is [1, nan, inf, -2], nanargmin and nanargmax 1;
# of [1, nan, 3] nansum and nanmean nan; float16: no NaN or infinity left, 3 and 2, 4 and 2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "ml_dtypes==0.6.0"
"$work/env/bin/python" - <<'PY'
import sys
import warnings

import ml_dtypes
import numpy as np

warnings.simplefilter("error")
found = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
    x, y = np.array([1, np.nan, np.inf, -2], dtype), np.array([1, np.nan, 3], dtype)
    cleaned = np.isfinite(np.nan_to_num(x).astype(np.float32)).all()
    same = np.nan_to_num(x).tobytes() == x.tobytes()
    places = int(np.nanargmin(x)), int(np.nanargmax(x))
    found[np.dtype(dtype).name] = bool(cleaned), same, places, str(np.nansum(y)), str(np.nanmean(y)), np.isnan(x).tolist()
where = [False, True, False, False]
blind = (False, True, (1, 1), "nan", "nan", where)
print(f"numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}: {found}")
sys.exit(0 if found == {"float16": (True, False, (3, 2), "4.0", "2.0", where), "bfloat16": blind, "float8_e5m2": blind} else 1)
PY
