"""Runs under megatron-core, on the CPU: loads torch_dist folders and the files of ranks, writes the logits,
and saves the first model again in FOLDER.again where it came of a torch_dist folder.

    PYTHONPATH=JUDGE python megatron_judge.py TP[xPP[xEP[xETP]]] SHARED OUT.npz FOLDER [FOLDER ...]

One process for each rank of tensor, pipeline and expert parallelism, or as many as the tensor parallelism of
all else and of experts (ETP) need where these differ, which meet in the file SHARED; all are
forks of one that has loaded megatron-core, which takes longer than the rest. A FOLDER holds `.metadata`, or
`mp_rank_TT[_PPP][_EEE]` of as many ranks. Not a test module; tests/test_dist_write.py and
benchmarks/sweep.py start it.
"""

import sys
import warnings
from argparse import Namespace
from contextlib import nullcontext
from math import lcm
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import start_processes

IDS = [1, 5, 9, 2, 7, 3, 11, 4, 8, 6, 12, 10] * 4


def model_of(args: Namespace) -> Any:
    """This rank's part of the model that `args` describe."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **staged(args),
        **routed(args),
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=args.qk_layernorm,
        normalization=args.normalization,
    )
    if config.num_moe_experts:  # as Transformer Engine's layers call it before experts, unlike local ones
        names = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {
            k: v for k, v in names.items() if k != "pre_mlp_layernorm."
        }
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        rope_scaling=getattr(args, "use_rope_scaling", False),
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def staged(args: Namespace) -> dict[str, Any]:
    """Where layers do not divide by the stages: as args say, else one more in the first."""
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if args.num_layers % stages == 0:
        return {}
    first = getattr(args, "decoder_first_pipeline_num_layers", None)
    rest = args.num_layers % (stages - 1) if stages > 2 else -(-args.num_layers // stages)
    return {"num_layers_in_first_pipeline_stage": first or rest}


def routed(args: Namespace) -> dict[str, Any]:
    """What the configuration says of a model with experts."""
    if not getattr(args, "num_experts", None):
        return {}
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # which it takes for imported where Transformer Engine is not there
    return {
        "num_moe_experts": args.num_experts,
        "moe_router_topk": args.moe_router_topk,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
        "moe_router_pre_softmax": args.moe_router_pre_softmax,
        "moe_router_score_function": args.moe_router_score_function,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # another takes streams of a GPU
    }


def logits_of(folder: Path, *, again: bool) -> np.ndarray | None:
    """Of the model in `folder`, on the ranks that have its output layer."""
    if (folder / ".metadata").exists():
        model, args = of_folder(folder, again=again)
    else:
        model, args = of_ranks(folder)
    ids = torch.tensor([IDS]) % args.orig_vocab_size
    with torch.no_grad():
        made = passed_on(model.eval(), ids, args.hidden_size)
    return None if made is None else made[..., : args.orig_vocab_size].numpy()


def of_folder(folder: Path, *, again: bool) -> tuple[Any, Namespace]:
    """With every entry of it asked for, and no other."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    common = dist_checkpointing.load_common_state_dict(str(folder))
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    args = common["args"]
    model = model_of(args)
    wanted = {"model": model.sharded_state_dict(metadata=content)}
    loaded = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"])
    if again:
        save(model, args, content, folder.with_suffix(".again"))
    return model, args


# What layers of Transformer Engine call norms that layers without it have beside them.
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def of_ranks(folder: Path) -> tuple[Any, Namespace]:
    """The file of this rank, of which every tensor must be one of the model's, and each of those there."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    held = torch.load(folder / name / "model_optim_rng.pt", weights_only=False)
    args, state = held["args"], {}
    for key, tensor in held["model"].items():
        fused = next((f for f in NORMS if key.endswith(f)), None)
        state[key if fused is None else key.removesuffix(fused) + NORMS[fused]] = tensor
    model = model_of(args)
    missing, unexpected = model.load_state_dict(state, strict=False)
    unlike = [*unexpected, *(k for k in missing if not k.endswith("_extra_state"))]
    if unlike:
        raise ValueError(f"{folder / name}: {unlike[:5]}")
    return model, args


def passed_on(model: Any, ids: torch.Tensor, width: int) -> torch.Tensor | None:
    """One pass through all stages; the result on the last."""
    from megatron.core import parallel_state

    places = torch.arange(ids.shape[1])[None]
    hidden = torch.ones(1, 1, ids.shape[1], ids.shape[1]).triu(1).bool()  # from each token, those after it
    if not parallel_state.is_pipeline_first_stage():
        came = torch.empty(ids.shape[1], 1, width)
        torch.distributed.recv(came, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(came)
    made = model(ids, places, hidden)
    if parallel_state.is_pipeline_last_stage():
        return made
    torch.distributed.send(made.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def fork_writers() -> None:
    """Have what is between a writer and its process in a fork; the library starts a Python for it, which
    loads torch."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = get_context("fork").Manager().Queue()


def save(model: Any, args: Namespace, content: dict[str, Any], folder: Path) -> None:
    """By as many processes as have a part of it, one file each."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    fork_writers()
    folder.mkdir(exist_ok=True)
    held = {"model": model.sharded_state_dict(metadata=content), "args": args}
    way = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(held, str(folder), way, content_metadata=content)


def processes(grid: tuple[int, ...]) -> int:
    tensors, stages, experts, own = grid
    return lcm(tensors, own * experts) * stages


def run(rank: int, grid: tuple[int, ...], shared: str, out: str, folders: list[str]) -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # which it asks for a device
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda x, *_, **__: x  # where the first and last stage agree on tied words
    ranks = processes(grid)
    torch.distributed.init_process_group("gloo", init_method=f"file://{shared}", rank=rank, world_size=ranks)
    from megatron.core import parallel_state, tensor_parallel

    # Dropout, which is off, would take numbers of the GPU's.
    tensor_parallel.get_cuda_rng_tracker = lambda: Namespace(fork=nullcontext)
    tensors, stages, experts, own = grid
    parallel_state.initialize_model_parallel(
        tensors, stages, expert_model_parallel_size=experts, expert_tensor_parallel_size=own
    )
    made = {folder: logits_of(Path(folder), again=folder == folders[0]) for folder in folders}
    if rank == ranks - 1:
        np.savez(out, **made)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(asked: str, *where: Any) -> None:
    warnings.simplefilter("ignore")
    torch.compile = lambda f, **_: f  # it decorates many functions, and to load the compiler takes seconds
    from megatron.core import dist_checkpointing  # noqa: F401
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401

    asked_for = [int(n) for n in asked.split("x")]
    grid = [*asked_for, *(1, 1, asked_for[0])[len(asked_for) - 1 :]]
    start_processes(run, (tuple(grid), *where), processes(tuple(grid)), start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
