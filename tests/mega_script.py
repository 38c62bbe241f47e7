"""Runs under transformers 4.37.2: makes Mega models of random weights, saves them, loads them again, and
writes what each computes.

    PYTHONPATH=JUDGE python mega_script.py FOLDER

FOLDER/cases.json has by name the class and the config of each model. Beside each model, FOLDER/NAME, stand
arrays in NAME.npz: inputs, outputs and losses. Prints what loading reports. Not a test module;
tests/test_reference_mega.py starts it.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def randomised(model: Any) -> Any:
    """Parameters far from those that training begins with; statistics of a batch norm are positive."""
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if not x.is_floating_point() or name.endswith("_float_tensor"):
            continue
        wide = ".ema_gate." in name or name.endswith(("qk_weight", "rel_pos_bias.rel_pos_bias"))
        x.data.normal_(0, 1.0 if wide else 0.3)
        if name.endswith(("norm.weight", "scalar", "running_var")):
            x.data.abs_().add_(0.5)
    return model


def inputs(name: str, config: Any) -> dict[str, torch.Tensor]:
    shape = (2, 3, 8) if "MultipleChoice" in name else (2, 8)
    ids = torch.randint(3, config.vocab_size, shape)
    mask = torch.ones_like(ids)
    mask[..., -1, 5:] = 0
    types = torch.randint(0, 2, shape)
    return {"input_ids": ids, "attention_mask": mask} | (
        {"token_type_ids": types} if config.add_token_type_embeddings else {}
    )


def losses(name: str, model: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Labels by their names, and the loss, by what it is called."""
    ids = given["input_ids"]
    made: dict[str, dict[str, torch.Tensor]] = {}
    if name.endswith("LM"):
        labels = ids.clone()
        labels[:, ::3] = -100
        made["loss"] = {"labels": labels}
    elif "Sequence" in name:
        many = torch.rand(2, model.config.num_labels)
        for problem, labels in zip(PROBLEMS, (many, torch.tensor([2, 0]), many.round()), strict=True):
            made[problem] = {"labels": labels}
    elif "Choice" in name:
        made["loss"] = {"labels": torch.tensor([2, 1])}
    elif "Token" in name:
        made["loss"] = {"labels": torch.randint(0, model.config.num_labels, ids.shape)}
    elif "Question" in name:
        ends = {"start_positions": torch.tensor([1, -3]), "end_positions": torch.tensor([4, 60])}
        made["loss"] = ends
    found: dict[str, Any] = {}
    for what, labels in made.items():
        model.config.problem_type = what if what in PROBLEMS else None
        found[what] = model(**given, **labels).loss
        found |= {f"{what}.{k}": v for k, v in labels.items()}
    return found


def main(folder: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.manual_seed(7)
    reports = {}
    for case, (name, values) in json.loads((folder / "cases.json").read_text()).items():
        config = transformers.MegaConfig(**values)
        chosen = getattr(transformers, name)
        randomised(chosen(config)).save_pretrained(folder / case, safe_serialization=True)
        model, info = chosen.from_pretrained(folder / case, output_loading_info=True)
        reports[case] = {k: sorted(v) for k, v in info.items()}
        given = inputs(name, config)
        with torch.no_grad():
            out = model.eval()(**given, **({"use_cache": False} if config.is_decoder else {}))
            arrays = {**given, **{k: v for k, v in out.items() if torch.is_tensor(v)}}
            arrays |= losses(name, model, given)
        np.savez(folder / f"{case}.npz", **{k: v.numpy() for k, v in arrays.items()})
    print(json.dumps(reports))


main(Path(sys.argv[1]))
