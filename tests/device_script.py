"""Verifies on the device of tests/elsewhere.py. Run by tests/test_device.py in a process of its own, as torch
keeps a device that it was told of, and its own parts then ask for it: `device_script.py JOB`, where JOB is a
JSON object with the folders `out` and `source` and the `settings`. Prints what the tests look at, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from ckpt_tool import verify as levels
from ckpt_tool.verify import prompts
from tests.elsewhere import DEVICE, Elsewhere


def main(job: dict[str, Any]) -> None:
    every = prompts.fixed

    def few(vocab_size: int, *, bos: int | None = 1) -> dict[str, list[int]]:
        rows = every(vocab_size, bos=bos)
        return {"other": rows["other"], "long": rows["long"][: job["tokens"]]}

    prompts.fixed = few
    levels._check_choices = lambda *asked: None  # type: ignore[assignment]  # which takes no such device
    with Elsewhere():
        report = levels.verify(
            job["out"],
            job["source"],
            settings=job["settings"],
            device=DEVICE,
            levels=("parity",),
            mode="quick",
        )
    said = {
        "status": report.status,
        "failing": [f.message for f in report.findings if f.status == "fail"],
        "computed": report.facts["computed"],
        "planted": [f.measured for f in report.findings if f.check == "negative control"],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
