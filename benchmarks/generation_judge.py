"""Runs under any release of transformers: `generate` on converted folders, as JSON.

    python generation_judge.py JOBS.json RESULTS.json

Jobs are {folder, input_ids, attention_mask or null, arguments, seed}; a result holds what came out, or the
error. Numbers that are not finite are strings. It imports nothing of ckpt-tool.
"""

import json
import math
import sys
import warnings
from functools import cache
from typing import Any

import torch


@cache
def model_of(folder: str) -> Any:
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    (named,) = config.architectures
    return getattr(transformers, named).from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    )


def plain(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return plain(x.tolist())
    if isinstance(x, list):
        return [plain(y) for y in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def run(job: dict[str, Any]) -> dict[str, Any]:
    model = model_of(job["folder"])
    ids = torch.tensor(job["input_ids"])
    mask = job.get("attention_mask")
    given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    arguments = dict(job["arguments"])
    for name in ("sequence_bias",):  # keys of a JSON object are no tuples
        if name in arguments:
            arguments[name] = {tuple(words): bias for words, bias in arguments[name]}
    if job["seed"] is not None:
        torch.manual_seed(job["seed"])
    out = model.generate(ids, **given, **arguments, return_dict_in_generate=True, output_scores=True)
    beams = getattr(out, "beam_indices", None)
    both = [
        model.compute_transition_scores(out.sequences, out.scores, beams, normalize_logits=normal)
        for normal in (False, True)
    ]
    return {
        "sequences": plain(out.sequences),
        "steps": len(out.scores),
        "transition_scores": plain(both[0]),
        "normalized": plain(both[1]),
        "beam_indices": plain(beams),
        "sequences_scores": plain(getattr(out, "sequences_scores", None)),
    }


def main(jobs: str, results: str) -> None:
    import transformers
    from transformers import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    with open(jobs, encoding="utf-8") as file:
        for job in json.load(file):
            try:
                found.append(run(job))
            except Exception as error:  # what the library refuses is a result too
                found.append({"error": f"{type(error).__name__}: {error}"[:300]})
    with open(results, "w", encoding="utf-8") as file:
        json.dump({"version": transformers.__version__, "results": found}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
