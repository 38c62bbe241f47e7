"""Runs under megatron-core, on the CPU: loads torch_dist folders, writes the logits, and saves the first
model again in FOLDER.again.

    PYTHONPATH=JUDGE python megatron_judge.py RANKS SHARED OUT.npz FOLDER [FOLDER ...]

One process for each tensor-parallel rank, which meet in the file SHARED; all are forks of one that has
loaded megatron-core, which takes longer than the rest. Not a test module; tests/test_dist_write.py starts
it.
"""

import sys
import warnings
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import start_processes

IDS = [1, 5, 9, 2, 7, 3, 11, 4, 8, 6, 12, 10] * 4


def model_of(args: Namespace) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
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
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
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
    )


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


def logits_of(folder: Path, *, again: bool) -> np.ndarray:
    """Of the model in `folder`, with every entry of it asked for, and no other."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    common = dist_checkpointing.load_common_state_dict(str(folder))
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    args = common["args"]
    model = model_of(args).eval()
    wanted = {"model": model.sharded_state_dict(metadata=content)}
    loaded = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"])
    ids = torch.tensor([IDS]) % args.orig_vocab_size
    places = torch.arange(ids.shape[1])[None]
    hidden = torch.ones(1, 1, ids.shape[1], ids.shape[1]).triu(1).bool()  # from each token, those after it
    if again:
        save(model, args, content, folder.with_suffix(".again"))
    with torch.no_grad():
        made: np.ndarray = model(ids, places, hidden)[..., : args.orig_vocab_size].numpy()
    return made


def save(model: Any, args: Namespace, content: dict[str, Any], folder: Path) -> None:
    """By as many processes as have a part of it, one file each."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    folder.mkdir(exist_ok=True)
    held = {"model": model.sharded_state_dict(metadata=content), "args": args}
    way = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(held, str(folder), way, content_metadata=content)


def run(rank: int, ranks: int, shared: str, out: str, folders: list[str]) -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # which it asks for a device
    torch.cuda.synchronize = lambda *_: None
    torch.distributed.init_process_group("gloo", init_method=f"file://{shared}", rank=rank, world_size=ranks)
    from megatron.core import parallel_state, tensor_parallel

    # Dropout, which is off, would take numbers of the GPU's.
    tensor_parallel.get_cuda_rng_tracker = lambda: Namespace(fork=nullcontext)
    parallel_state.initialize_model_parallel(ranks)
    made = {folder: logits_of(Path(folder), again=folder == folders[0]) for folder in folders}
    if rank == 0:
        np.savez(out, **made)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(ranks: int, *where: Any) -> None:
    warnings.simplefilter("ignore")
    torch.compile = lambda f, **_: f  # it decorates many functions, and to load the compiler takes seconds
    from megatron.core import dist_checkpointing  # noqa: F401
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401

    start_processes(run, (ranks, *where), ranks, start_method="fork")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
