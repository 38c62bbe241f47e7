"""Runs under an older transformers release: loads converted folders, prints load reports, writes logits.

    PYTHONPATH=JUDGE python judge_script.py OUT.npz FOLDER [FOLDER ...]

Not a test module; tests/test_judges.py starts it.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

CODE_POINTS = 0x110000  # where a config has no size of a vocabulary


def head(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a language model, what the last layer gives for another one."""
    if type(model).__name__.endswith(("CausalLM", "MaskedLM", "LMHeadModel", "ForPreTraining")):
        found = model(ids)
        return found.prediction_logits if "prediction_logits" in found else found.logits
    return model.base_model(ids).last_hidden_state


def main(out: str, folders: list[str]) -> None:
    import transformers
    from transformers import AutoConfig, AutoTokenizer, logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    arrays, reports = {}, {}
    for folder in folders:
        (named,) = AutoConfig.from_pretrained(folder).architectures
        model, info = getattr(transformers, named).from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        vocab = getattr(model.config, "vocab_size", CODE_POINTS)
        ids = torch.from_numpy(np.load(Path(folder) / "judge_ids.npy")) % vocab
        with torch.no_grad():
            arrays[Path(folder).name] = head(model, ids).numpy()
        report = {
            k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if (asked := Path(folder) / "judge_texts.json").exists():
            texts = json.loads(asked.read_text(encoding="utf-8"))
            report["tokens"] = [AutoTokenizer.from_pretrained(folder)(t)["input_ids"] for t in texts]
        reports[Path(folder).name] = report
    np.savez(out, **arrays)
    print(json.dumps(reports))


main(sys.argv[1], sys.argv[2:])
