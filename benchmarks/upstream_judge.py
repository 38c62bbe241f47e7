"""One conversion by a script of transformers 4.37.2, in a process that has nothing of ours.

    PYTHONPATH=.judges/tf4.37 python benchmarks/upstream_judge.py FAMILY FOLDER OUT

The functions that their `main` calls, with what it gives them; what it asks of the network besides (the
tokenizer of Megatron's GPT-2) or of a file that synthetic originals lack (tokenizer.model) is left out."""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path


def mistral(folder: Path, out: Path) -> None:
    from transformers.models.mistral.convert_mistral_weights_to_hf import write_model

    write_model(str(out), str(folder), "7B")


def llama(folder: Path, out: Path) -> None:
    """The size tells how many files there are: two, as of the 13B."""
    from transformers.models.llama.convert_llama_weights_to_hf import write_model

    write_model(str(out), str(folder), "13B")


def megatron_gpt2(folder: Path, out: Path) -> None:
    import torch
    from transformers import GPT2Config
    from transformers.models.megatron_gpt2 import convert_megatron_gpt2_checkpoint as script

    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive, archive.open("release/mp_rank_00/model_optim_rng.pt") as file:
        held = torch.load(file, map_location="cpu")
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, n_inner=4096)
    made = script.convert_megatron_checkpoint(argparse.Namespace(), held, config)
    config.save_pretrained(out)
    torch.save(made, out / "pytorch_model.bin")


def opt(folder: Path, out: Path) -> None:
    from transformers.models.opt import convert_opt_original_pytorch_checkpoint_to_pytorch as script

    script.convert_opt_checkpoint(str(folder / "restored.pt"), str(out), str(folder.with_name("told")))


def mobilebert(folder: Path, out: Path) -> None:
    from transformers.models.mobilebert import convert_mobilebert_original_tf_checkpoint_to_pytorch as script

    (config,) = folder.glob("*.json")
    out.mkdir()
    script.convert_tf_checkpoint_to_pytorch(_bundle(folder), str(config), str(out / "pytorch_model.bin"))


def canine(folder: Path, out: Path) -> None:
    """But for how it saves: its transposed kernels are no memory that safetensors takes, and it ends with an
    error there; a torch file takes them."""
    from transformers import CanineConfig, CanineModel, load_tf_weights_in_canine

    config = CanineConfig()
    model = CanineModel(config).eval()
    load_tf_weights_in_canine(model, config, _bundle(folder))
    model.save_pretrained(out, safe_serialization=False)


def _bundle(folder: Path) -> str:
    """What TensorFlow calls a checkpoint: the common part of its files' names."""
    (index,) = folder.glob("*.index")
    return str(index.with_suffix(""))


if __name__ == "__main__":
    of = {f.__name__: f for f in (mistral, llama, megatron_gpt2, opt, mobilebert, canine)}
    of[sys.argv[1].replace("-", "_")](Path(sys.argv[2]), Path(sys.argv[3]))
