"""Runs under an older transformers release: what its classes with heads make of given tensors and labels.

    PYTHONPATH=JUDGE python heads_script.py IN.pt OUT.pt

IN.pt holds a list of (class of the configuration, that of the model, config, tensors, arguments of the call);
OUT.pt gets what each returns, tensors by name. Not a test module.
"""

import sys
import warnings
from typing import Any

import torch


def answer(configuration: str, architecture: str, config: Any, state: Any, call: Any) -> dict[str, Any]:
    import transformers

    made = getattr(transformers, configuration)(**config)
    model = getattr(transformers, architecture)(made).eval()
    missing = model.load_state_dict(state, strict=False).missing_keys
    tied = [n for n in missing if not n.startswith("cls.predictions.decoder.")]
    if tied:
        raise SystemExit(f"no tensors for {', '.join(tied)} of {architecture}")
    with torch.no_grad():
        found = model.to(next(iter(state.values())).dtype)(**call)
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def main(source: str, target: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from transformers import modeling_utils

    # 4.37.2 loads torch's compiler to ask whether it is at work: half of the time of this script
    modeling_utils.is_torchdynamo_compiling = lambda: False
    torch.save([answer(*case) for case in torch.load(source)], target)


main(*sys.argv[1:])
