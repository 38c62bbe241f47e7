"""Runs with TensorFlow: writes bundles of its own into OUT, and says what it reads in them and in others.

    PYTHONPATH=JUDGE python tensorflow_script.py OUT PREFIX [PREFIX ...]

Prints JSON: prefix to name to (dtype, shape, bytes in hex). Not a test module;
tests/test_tf_bundle.py starts it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

FLOATS = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES = [*FLOATS, "bool", "complex64", *(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64))]


def saver(out: Path) -> str:
    """A Saver of TensorFlow 1: partitioned variables, over three devices, in three data files."""
    tf1 = tf.compat.v1
    graph = tf.Graph()
    with graph.as_default():
        random = np.random.default_rng(7)
        for k in range(3):
            with tf1.device(f"/cpu:{k}"):
                tf1.get_variable(f"w{k}/bias", initializer=random.normal(size=k + 2).astype("f4"))
        tf1.get_variable(
            "rows",
            shape=(1003, 6),
            initializer=tf1.random_normal_initializer(seed=1),
            partitioner=tf1.fixed_size_partitioner(11),
        )
        tf1.get_variable(
            "columns",
            shape=(40, 130),
            initializer=tf1.random_normal_initializer(seed=2),
            partitioner=tf1.fixed_size_partitioner(3, axis=1),
        )
        config = tf1.ConfigProto(device_count={"CPU": 3})
        with tf1.Session(config=config) as session:
            session.run(tf1.global_variables_initializer())
            return str(tf1.train.Saver(sharded=True).save(session, str(out / "saver"), global_step=12))


def raw(out: Path) -> str:
    """Every type, shapes without elements or axes, text, and slices along both axes at once."""
    random = np.random.default_rng(8)
    names, parts, tensors = [], [], []
    for dtype in DTYPES:
        for shape in ((3, 5), (), (0, 4)):
            values = tf.cast(tf.constant(random.integers(0, 9, shape) / 4, tf.float32), dtype)
            names, parts, tensors = (
                [*names, f"{dtype}/{len(shape)}{0 in shape}"],
                [*parts, ""],
                [*tensors, values],
            )
    whole = random.normal(size=(9, 7)).astype("f4")
    for a, m in ((0, 4), (4, 5)):
        for b, n in ((0, 3), (3, 1), (4, 3)):
            names, parts = [*names, "grid"], [*parts, f"9 7 {a},{m}:{b},{n}"]
            tensors = [*tensors, tf.constant(whole[a : a + m, b : b + n])]
    names, parts, tensors = (
        [*names, "text"],
        [*parts, ""],
        [*tensors, tf.constant([["hi", "world"], ["", "π\0x"]])],
    )
    prefix = str(out / "raw")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=parts, tensors=tensors)
    return prefix


def many(out: Path) -> str:
    """An index of several blocks."""
    names = sorted(f"model/layer_{k}/with/a/name/of/some/length/kernel" for k in range(6000))
    prefix = str(out / "many")
    tensors = [tf.constant(float(k)) for k in range(len(names))]
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    return prefix


def objects(out: Path) -> str:
    module = tf.Module()
    module.by_name = {"a.b": tf.Variable([1.0, 2.0]), "x/y": tf.Variable(tf.zeros([2, 3], tf.bfloat16))}
    return str(tf.train.Checkpoint(model=module).save(str(out / "objects")))


def written_anew(out: Path, old: str) -> str:
    """A checkpoint of before 2017 as the hint says to write it."""
    prefix = str(out / "anew")
    r = tf.train.load_checkpoint(old)
    n = [*r.get_variable_to_shape_map()]
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=n, shape_and_slices=[""] * len(n), tensors=[r.get_tensor(k) for k in n]
    )
    return prefix


def read(prefix: str) -> dict[str, tuple[str, list[int], str]]:
    reader = tf.train.load_checkpoint(prefix)
    found = {}
    for name, dtype in reader.get_variable_to_dtype_map().items():
        value = np.asarray(reader.get_tensor(name))
        text = (
            json.dumps(value.tolist(), default=lambda b: b.hex())
            if dtype == tf.string
            else value.tobytes().hex()
        )
        found[name] = (dtype.name, list(value.shape), text)
    return found


def main(out: Path, prefixes: list[str]) -> None:
    old, *ours = prefixes
    theirs = [saver(out), raw(out), many(out), objects(out), written_anew(out, old)]
    print(json.dumps({Path(p).name: read(p) for p in (*theirs, *ours)}))


main(Path(sys.argv[1]), sys.argv[2:])
