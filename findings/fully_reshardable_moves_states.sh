#!/usr/bin/env bash
# megatron-core (0.16.1; as the code reads, 0.15 to 0.19) saves states of another parameter under a parameter's name.
#
# With `fully_reshardable` a distributed optimizer gathers its buffers without the padding at the ends of buckets, and
# then cuts each parameter out at its place in a buffer with that padding. From the second bucket on, places are off
# by what the buckets before were filled up with; the last parameter is filled up with zeros, and a warning says so.
#
# Seen: two buckets of 100 numbers, each filled up to 128; the float32 weights saved for the first module are its own
# moved by 28, and 28 zeros at the end.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "megatron-core==0.16.1"
"$work/env/bin/python" -W ignore - "$work/meeting" 2>/dev/null <<'PY'
import sys

import torch

torch.cuda.current_device = lambda: "cpu"
torch.Tensor.cuda = lambda x, *_, **__: x
kind = torch.Tensor.type
torch.Tensor.type = lambda x, *a: kind(x, *a) if a else kind(x).replace("torch.", "torch.cuda.")
tensor = torch.tensor
torch.tensor = lambda *a, **k: tensor(*a, **{n: v for n, v in k.items() if n != "device"})
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
from megatron.core import __version__, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

parallel_state.initialize_model_parallel()


class Model(MegatronModule):
    def __init__(self, config):
        super().__init__(config)
        self.a = torch.nn.Parameter(torch.arange(1.0, 101.0).bfloat16())
        self.b = torch.nn.Parameter(torch.arange(101.0, 201.0).bfloat16())


config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16)
how = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=90)
model = DistributedDataParallel(config, how, Model(config))
asked = OptimizerConfig(lr=0.0, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
optimizer = get_megatron_optimizer(asked, [model])
for p in model.parameters():
    p.main_grad.zero_()
optimizer.prepare_grads()
optimizer.step_with_ready_grads()
content = {"distrib_optim_sharding_type": "fully_reshardable"}
sharded = model.module.sharded_state_dict(metadata=content)
state = optimizer.sharded_state_dict(sharded, metadata=content)
saved = {t["param"].key: t["param"].data for t in state["param_state"].values()}
first = next(x for n, x in saved.items() if n.endswith(".a"))
own = model.module.a.detach().float()
print(f"megatron-core {__version__}: weights of the first module {own[:3].tolist()} to {own[-1]}, saved {first[:3].tolist()} to {first[-1]}")
sys.exit(0 if torch.equal(first[:72], own[28:]) and not first[72:].any() else 1)
PY
