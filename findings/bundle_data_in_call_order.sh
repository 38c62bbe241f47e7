#!/usr/bin/env bash
# TensorFlow 2.21.0: SaveV2 lays the tensors of a checkpoint out in the order of the call, and its index in the order of
# their names, so equal models have unequal files.
#
# tf.train.Saver sorts the variables by name before it calls, so files of TensorFlow 1 look as if the format sorted
# them, and offsets grow from one entry of the index to the next. They do not where tf.raw_ops.SaveV2 is given names in
# another order: readers that work out the length of a tensor from the next entry, or compare checkpoints by the digest
# of their data file, are right for the one and wrong for the other.
#
# Seen: the same two tensors under both orders: equal index keys and values by tf.train.load_checkpoint, data files of
# [1, 2] and of [2, 1].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "tensorflow-cpu==2.21.0" "numpy==2.4.6"
TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES="" "$work/env/bin/python" -W ignore - "$work" <<'PY'
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

work = Path(sys.argv[1])
tensors = {"a": tf.constant([1.0]), "b": tf.constant([2.0])}


def saved(*names):
    prefix = work / "-".join(names)
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * 2, tensors=[tensors[n] for n in names]
    )
    data = np.fromfile(f"{prefix}.data-00000-of-00001", "<f4").tolist()
    reader = tf.train.load_checkpoint(str(prefix))
    return data, {n: reader.get_tensor(n).tolist() for n in sorted(reader.get_variable_to_shape_map())}


(one, values), (two, others) = saved("a", "b"), saved("b", "a")
print(f"TensorFlow {tf.__version__}: data {one} and {two}, values {values} and {others}")
sys.exit(0 if (one, two) == ([1.0, 2.0], [2.0, 1.0]) and values == others else 1)
PY
