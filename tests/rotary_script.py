"""Runs under one transformers release: cosines and sines of LlamaRotaryEmbedding for configs and lengths.

    PYTHONPATH=RELEASE python rotary_script.py JOBS.json OUT.npz

JOBS.json lists [config, length]; OUT.npz holds cos0, sin0, cos1, ... in that order, each from a fresh module.
Not a test module; tests/test_rope.py starts it.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch


def main(jobs: str, out: str) -> None:
    from transformers import LlamaConfig, logging
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    arrays = {}
    for i, (config, length) in enumerate(json.loads(Path(jobs).read_text(encoding="utf-8"))):
        rotary = LlamaRotaryEmbedding(config=LlamaConfig(**config))
        positions = torch.arange(length)[None]
        with torch.no_grad():
            cos, sin = rotary(torch.zeros(1, length, 1), positions)
        arrays |= {f"cos{i}": cos[0].numpy(), f"sin{i}": sin[0].numpy()}
    np.savez(out, **arrays)


main(sys.argv[1], sys.argv[2])
