"""Runs under megatron-core, on the CPU: trains the model in files of ranks for two steps with a distributed
optimizer, and saves both as Megatron does.

    PYTHONPATH=JUDGE python megatron_optimizer.py TPxPPxEPxDP SHARED IN OUT FORM BUCKET

FORM is `ranks` (model_optim_rng.pt and distrib_optim.pt), or sharding types of torch_dist, or several with
commas, of which each after the first goes into OUT.FORM. BUCKET is the size of a bucket, 0 for one of all.
Moments are made of random gradients. Not a test module; tests/test_optimizer_buffers.py starts it.
"""

import sys
import warnings
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes


def trained(model: Any, bucket: int) -> tuple[Any, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = model.bfloat16()
    model.config.bf16 = True
    model.config.params_dtype = torch.bfloat16
    how = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=bool(bucket),
        bucket_size=bucket or None,
        grad_reduce_in_fp32=True,
    )
    ddp = DistributedDataParallel(model.config, how, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    for step in range(2):
        for number, (_, p) in enumerate(model.named_parameters()):
            tied = getattr(p, "shared_embedding", False)  # on the first stage and on the last
            torch.manual_seed(1000 * step + (999 if tied else number))
            p.main_grad.copy_(torch.randn(p.shape))
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            one.step_with_ready_grads() if not one.prepare_grads() else None
    return ddp, optimizer


def save_ranks(model: Any, optimizer: Any, args: Namespace, out: Path, data_rank: int) -> None:
    from megatron.core import parallel_state as p

    name = f"mp_rank_{p.get_tensor_model_parallel_rank():02d}"
    if p.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{p.get_pipeline_model_parallel_rank():03d}"
    if p.get_expert_model_parallel_world_size() > 1:
        name += f"_{p.get_expert_model_parallel_rank():03d}"
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    if data_rank == 0:
        held = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 2,
            "model": model.module.state_dict_for_save_checkpoint(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(held, folder / "model_optim_rng.pt")
    optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))


def save_truth(model: Any, optimizer: Any, out: Path) -> None:
    """What both data-parallel ranks of a model in one part know of parameters: {name: {state: tensor}}."""
    (one,) = optimizer.chained_optimizers
    made = {}
    for name, p in model.module.named_parameters():
        own = {s: torch.zeros(p.numel()) for s in ("param", "exp_avg", "exp_avg_sq")}
        if p in one.model_param_gbuf_map and p in one.model_param_group_index_map:
            share = one._get_model_param_range_map(p)["param"]
            held = one._get_main_param_and_optimizer_states(p)
            for state, whole in own.items():
                whole[share.start : share.end] = held[state]
        for whole in own.values():
            torch.distributed.all_reduce(whole)
        made[name] = {state: whole.reshape(p.shape) for state, whole in own.items()}
    if torch.distributed.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        torch.save(made, out / "truth.pt")


def save_folder(model: Any, optimizer: Any, args: Namespace, out: Path, form: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron_judge import fork_writers  # which lies beside this file

    fork_writers()
    content = {
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": form,
        "chained_optim_avoid_prefix": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    sharded = model.module.sharded_state_dict(metadata=content)
    state = optimizer.sharded_state_dict(sharded, metadata=content)
    held = {
        "args": args,
        "iteration": 2,
        "checkpoint_version": 3.0,
        "model": model.module.sharded_state_dict(metadata=content),
        "optimizer": state,
    }
    way = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(held, str(out), way, content_metadata=content)


def on_host(make: Any) -> Any:
    """A function of torch that is asked for tensors of a GPU."""

    def made(*args: Any, **named: Any) -> Any:
        if "cuda" in str(named.get("device")):
            named["device"] = "cpu"
        return make(*args, **named)

    return made


def run(rank: int, grid: tuple[int, ...], shared: str, source: str, out: str, form: str, bucket: int) -> None:
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_available = lambda: False
    torch.Tensor.cuda = lambda x, *_, **__: x
    for name in ("tensor", "zeros", "empty", "ones"):
        setattr(torch, name, on_host(getattr(torch, name)))
    kind = torch.Tensor.type
    torch.Tensor.type = lambda x, *a: kind(x, *a) if a else kind(x).replace("torch.", "torch.cuda.")
    tensors, stages, experts, data = grid
    ranks = tensors * stages * experts * data if experts == 1 else tensors * stages * max(experts, data)
    torch.distributed.init_process_group("gloo", init_method=f"file://{shared}", rank=rank, world_size=ranks)
    from megatron.core import parallel_state, tensor_parallel

    tensor_parallel.get_cuda_rng_tracker = lambda: Namespace(fork=nullcontext)
    parallel_state.initialize_model_parallel(
        tensors, stages, expert_model_parallel_size=experts, create_gloo_process_groups=True
    )
    from megatron_judge import of_ranks  # which lies beside this file

    model, args = of_ranks(Path(source))
    args.data_parallel_size = parallel_state.get_data_parallel_world_size()
    ddp, optimizer = trained(model, bucket)
    if data == 2 and ranks == 2:
        save_truth(ddp, optimizer, Path(out))
    for number, one in enumerate(form.split(",")):
        where = Path(f"{out}.{one}" if number else out)
        if one == "ranks":
            data_rank = (
                parallel_state.get_expert_data_parallel_rank()
                if experts > 1
                else parallel_state.get_data_parallel_rank()
            )
            save_ranks(ddp, optimizer, args, where, data_rank)
        else:
            save_folder(ddp, optimizer, args, where, one)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(asked: str, *where: Any) -> None:
    warnings.simplefilter("ignore")
    torch.compile = lambda f, **_: f
    from megatron.core import dist_checkpointing  # noqa: F401
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401

    grid = tuple(int(n) for n in asked.split("x"))
    tensors, stages, experts, data = grid
    ranks = tensors * stages * (data if experts == 1 else max(experts, data))
    start_processes(run, (grid, *where[:-1], int(where[-1])), ranks, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
