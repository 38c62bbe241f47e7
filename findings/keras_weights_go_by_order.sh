#!/usr/bin/env bash
# Keras 3.15.1 loads a .weights.h5 file by the order of the layers of each class and not by their names: a model whose
# query, key and value are called in another order gets the value's matrix as its query. A model of one layer takes the
# first of three.
#
# Layers are given names so that weights find them, and the file has them: each group carries its layer's `name`. It is
# not compared. Groups are called dense, dense_1, dense_2, counted in the order the model lists its layers, and of a
# functional model that is the order in which the graph is walked, so moving a line is enough. Shapes fit, load_weights
# says nothing, not of the layers of the file that it leaves over either. Compare `layers/*/vars`.attrs["name"] first,
# or save the legacy way (model.save("x.h5")), which load_weights(by_name=True) reads by name.
#
# Seen: q, k, v of 1, 2, 3 saved; concatenated as v, k, q the model has q 3, k 2, v 1 after loading, and a model of v
# alone 1; no warning; the names q, k, v are in the file; from the legacy file with by_name=True 1, 2, 3 and 3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "keras==3.15.1" "h5py==3.16.0" "torch==2.13.0" "numpy==2.4.6"
cat > "$work/order.py" <<'PY'
import logging
import sys
import warnings

import h5py
import keras
import numpy as np

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
warnings.simplefilter("always")
warnings.showwarning = lambda message, kind, *_: None if kind is DeprecationWarning else said.append(str(message))


def model(names):
    x = keras.Input((4,))
    made = [keras.layers.Dense(4, use_bias=False, name=name)(x) for name in names]
    return keras.Model(x, keras.layers.Concatenate()(made) if len(made) > 1 else made[0])


def numbers(model, names):
    return {name: float(model.get_layer(name).get_weights()[0][0, 0]) for name in names}


new, old = sys.argv[1] + "/new.weights.h5", sys.argv[1] + "/old.h5"
saved = model("qkv")
for number, name in enumerate("qkv", 1):
    saved.get_layer(name).set_weights([np.full((4, 4), float(number))])
saved.save_weights(new)
saved.save(old)
logging.getLogger().addHandler(handler)
said.clear()
found, by_name = {}, {}
for names in ("qkv", "vkq", "v"):
    read = model(names)
    read.load_weights(new)
    found[names] = numbers(read, names)
with h5py.File(new) as file:
    stored = [group["vars"].attrs["name"] for name, group in file["layers"].items() if "dense" in name]
quiet = not said
for names in ("qkv", "vkq", "v"):
    legacy = model(names)
    legacy.load_weights(old, by_name=True)
    by_name[names] = numbers(legacy, names)
print(f"keras {keras.__version__}: saved q 1, k 2, v 3; loaded by call order {found}; names in the file {stored}; warned {not quiet}")
print(f"legacy file, by_name=True: {by_name}")
right = {"qkv": {"q": 1, "k": 2, "v": 3}, "vkq": {"v": 1, "k": 2, "q": 3}, "v": {"v": 1}}
named = all(v == {"q": 1, "k": 2, "v": 3}[k] for read in by_name.values() for k, v in read.items())
sys.exit(0 if found == right and stored == ["q", "k", "v"] and quiet and named else 1)
PY
KERAS_BACKEND=torch "$work/env/bin/python" "$work/order.py" "$work" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
