#!/usr/bin/env bash
# tf.reduce_mean of float16 (TensorFlow 2.21.0, CPU) is infinite where the sum of the numbers passes 65,504, and NaN
# where their count does: 1,000 times 100 have the mean inf, 70,000 ones NaN. numpy in float16, and TensorFlow in
# bfloat16, are right.
#
# The numbers are added in float16, and the sum is divided by their count in float16. Along the first axis the sum stops
# growing long before, and the mean of ones is a few hundredths. reduce_variance and reduce_std are made of it: infinite
# or 0. Statistics of a float16 checkpoint, and a mean over tokens or pixels in a float16 model, are inf or nan while
# each weight is sound. tf.nn.moments widens first, and is right; so is a cast.
#
# Seen: reduce_mean, moments of 1,000 times 100: inf, 100; of 70,000 ones: nan, 1; variance of the former inf; of 60,000
# rows of ones the mean along the first axis less than 0.5; bfloat16 100, 1 and 1; numpy 2.4.6 in float16 100, 1 and 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "tensorflow-cpu==2.21.0" "numpy==2.4.6"
TF_CPP_MIN_LOG_LEVEL=3 "$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import math
import sys

import numpy as np
import tensorflow as tf

ones, hundreds, rows = np.ones(70_000), np.full(1000, 100.0), np.ones((60_000, 2))
found = {}
for dtype in (tf.float16, tf.bfloat16):
    a, b, c = (tf.cast(x, dtype) for x in (hundreds, ones, rows))
    moments = [float(tf.nn.moments(x, [0])[0]) for x in (a, b)]
    means = [float(tf.reduce_mean(a)), float(tf.reduce_mean(b)), round(float(tf.reduce_mean(c, 0)[0]), 2)]
    found[dtype.name] = [*means, float(tf.math.reduce_variance(a)), *moments]
by_numpy = [float(x.astype(np.float16).mean(0).ravel()[0]) for x in (hundreds, ones, rows)]
print(f"TensorFlow {tf.__version__}: [mean of 100s, of ones, of rows of ones, variance of 100s, moments] {found}")
print(f"numpy {np.__version__}, float16: {by_numpy}")
hundred, one, of_rows, variance, *moments = found["float16"]
right = hundred == variance == math.inf and math.isnan(one) and of_rows < 0.5 and moments == [100.0, 1.0]
sys.exit(0 if right and found["bfloat16"][:3] == by_numpy == [100.0, 1.0, 1.0] else 1)
PY
