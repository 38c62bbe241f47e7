"""Runs under one transformers release: loads folders and saves them again, as any user would.

    PYTHONPATH=RELEASE python save_again_script.py JOBS.json

JOBS.json lists [folder, new folder, arguments of save_pretrained]. Prints what could not be loaded or saved,
by new folder. Not a test module; tests/test_saved_again.py starts it.
"""

import json
import sys
import warnings
from pathlib import Path


def main(jobs: str) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    failed = {}
    for folder, target, arguments in json.loads(Path(jobs).read_text(encoding="utf-8")):
        try:
            (architecture,) = json.loads(Path(folder, "config.json").read_text())["architectures"]
            chosen = getattr(transformers, architecture)
            model = chosen.from_pretrained(folder, torch_dtype="auto")
            if dtype := arguments.pop("to", None):
                import torch

                model = model.to(getattr(torch, dtype))
            model.save_pretrained(target, **arguments)
        except Exception as error:  # whatever the library raises is the answer
            failed[target] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))


main(sys.argv[1])
