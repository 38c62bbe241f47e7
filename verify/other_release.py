"""What a release of transformers that is installed elsewhere makes of an output: loads it, computes prompts.

    python - REQUEST.json < other_release.py

Started by library.py under the Python that the user named, so it imports nothing of this project. REQUEST
names `folder`, `architecture`, `dtype`, `device`, the arrays of the prompts (`inputs`, an .npz of
PROMPT/ARGUMENT), and where the answer goes: `answer`, JSON of what loading reported, and `outputs`, an .npz
of PROMPT/OUTPUT. An answer has `failed`, the stage that did, with `error`, where one did.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import warnings
from typing import Any

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class Said(logging.Handler):
    """Adds what is logged as a warning or worse to `texts`."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main(request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"failed": "import"}
    said = Said([])
    try:
        import numpy as np
        import torch
        import transformers

        logger = logging.getLogger("transformers")
        logger.handlers, logger.propagate = [said], False
        answer["version"] = transformers.__version__
        answer["failed"] = "class"
        chosen = getattr(transformers, request["architecture"])
        answer["failed"] = "load"
        model, info = load(transformers, torch, chosen, request)
        answer["info"] = {k: sorted(map(str, info.get(k) or ())) for k in KEYS}
        answer["loading"], said.texts = said.texts, []
        answer["failed"] = "compute"
        arrays = {}
        inputs = np.load(request["inputs"])
        for prompt in dict.fromkeys(name.split("/")[0] for name in inputs):
            given = {
                n.split("/")[1]: torch.from_numpy(inputs[n]) for n in inputs if n.split("/")[0] == prompt
            }
            for name, value in compute(torch, model, given, request["device"]).items():
                arrays[f"{prompt}/{name}"] = value.numpy()
        np.savez(request["outputs"], **arrays)
        answer["computing"] = said.texts
        del answer["failed"]
    except Exception as error:  # a library may raise anything
        answer["error"] = f"{type(error).__name__}: {error}"
    return answer


def load(transformers: Any, torch: Any, chosen: Any, request: dict[str, Any]) -> tuple[Any, Any]:
    """The model in eval mode, eager, and what loading reports."""
    release = tuple(int(p) for p in transformers.__version__.split(".")[:2])
    word = "dtype" if release >= (4, 56) else "torch_dtype"
    more = {word: getattr(torch, request["dtype"])}
    if release >= (4, 36):
        more["attn_implementation"] = "eager"
    model, info = chosen.from_pretrained(
        request["folder"], output_loading_info=True, local_files_only=True, **more
    )
    return model.to(request["device"]).eval(), info


def compute(torch: Any, model: Any, given: dict[str, Any], device: str) -> dict[str, Any]:
    """The floating outputs by their names; ValueError for an argument that the model would ignore."""
    known = inspect.signature(model.forward).parameters
    idle = {name for name, x in given.items() if name == "attention_mask" and bool((x == 1).all())}
    if unknown := sorted(given.keys() - known.keys() - idle):
        raise ValueError(f"expected {', '.join(unknown)} among the arguments of the class, found none")
    arguments = {name: x.to(device) for name, x in given.items() if name in known}
    if "use_cache" in known:
        arguments["use_cache"] = False
    torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions would keep 10 bits of float32
    with torch.inference_mode():
        out = model(**arguments, return_dict=True)
    found = {name: x for name, x in out.items() if isinstance(x, torch.Tensor)}
    wide = {name: x if x.dtype == torch.float64 else x.float() for name, x in found.items()}
    return {name: x.cpu() for name, x in wide.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1], encoding="utf-8") as asked:
        wanted = json.load(asked)
    with open(wanted["answer"], "w", encoding="utf-8") as told:
        json.dump(main(wanted), told)
