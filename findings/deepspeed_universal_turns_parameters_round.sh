#!/usr/bin/env bash
# ds_to_universal.py of DeepSpeed 0.19.8 gives parameters the numbers of others where a run of ZeRO 2 had
# "round_robin_gradients": true. Nothing is said, and the shapes are right.
#
# Such a run deals its parameters out in another order than they are defined in, and lists them in that order in
# `param_shapes`, which zero_to_fp32.py follows: its result, rounded, is the 16-bit model. `param_slice_mappings`, which
# ds_to_universal.py follows, are counted in the order of definition. Whoever goes on from a universal checkpoint of such
# a run goes on from shuffled weights and moments; joining by zero_to_fp32.py, or loading the step itself, does not.
#
# Seen: eight layers on two processes; zero_to_fp32.py gives all 16 parameters of the model, ds_to_universal.py 2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/train.py" <<'PY'
import sys

import deepspeed
import torch

deepspeed.init_distributed(dist_backend="gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(8)))
zero = {"stage": 2, "round_robin_gradients": True}
config = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": zero,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
engine.backward(engine(torch.ones(1, 6, dtype=torch.bfloat16)).sum())
engine.step()
engine.save_checkpoint(sys.argv[1])
PY
cat > "$work/compare.py" <<'PY'
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

run = Path(sys.argv[1])
step = run / (run / "latest").read_text()
model = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)["module"]
joined = get_fp32_state_dict_from_zero_checkpoint(str(run))
parts = {n: torch.load(run / "universal" / "zero" / n / "fp32.pt", weights_only=False)["param"] for n in model}


def right(found):
    return sum(torch.equal(found[n].bfloat16().reshape(-1), model[n].reshape(-1)) for n in model)


print(f"deepspeed {deepspeed.__version__}: of {len(model)} parameters zero_to_fp32 has {right(joined)}, universal {right(parts)}")
sys.exit(0 if right(joined) == len(model) > right(parts) else 1)
PY
python3 -m venv "$work/venv"
bin="$work/venv/bin"
"$bin/pip" install -q "numpy==2.4.6" "torch==2.13.0" "setuptools<82" wheel ninja
export DS_ACCELERATOR=cpu DS_BUILD_OPS=0 OMP_NUM_THREADS=1 LOCAL_SIZE=2
"$bin/pip" install -q --no-build-isolation "deepspeed==0.19.8"
PATH="$bin:$PATH" "$bin/python" -W ignore -m torch.distributed.run --standalone --nproc_per_node 2 "$work/train.py" "$work/run" > "$work/log" 2>&1
step="$work/run/$(cat "$work/run/latest")"
"$bin/python" -W ignore -m deepspeed.checkpoint.ds_to_universal --input_folder "$step" --output_folder "$work/run/universal" \
    --num_extract_workers 1 --num_merge_workers 1 --inject_missing_state > "$work/log" 2>&1
"$bin/python" -W ignore "$work/compare.py" "$work/run" 2> /dev/null | tail -1
