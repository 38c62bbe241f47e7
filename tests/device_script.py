"""Verifies on the device of tests/elsewhere.py. Run by tests/test_device.py in a process of its own, as torch
keeps a device that it was told of, and its own parts then ask for it: `device_script.py TOKENS JOBS`. JOBS is
a JSON list of objects with the folders `out` and `source` and the `settings`. Prints what the tests look at
of each, as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from ckpt_tool import verify as levels
from ckpt_tool.verify import prompts
from tests.elsewhere import DEVICE, Elsewhere


def main(tokens: int, jobs: list[dict[str, Any]]) -> None:
    every = prompts.fixed

    def few(vocab_size: int, *, bos: int | None = 1) -> dict[str, list[int]]:
        rows = every(vocab_size, bos=bos)
        return {"other": rows["other"], "long": rows["long"][:tokens]}

    prompts.fixed = few
    levels._check_choices = lambda *asked: None  # type: ignore[assignment]  # which takes no such device
    print(json.dumps([*map(said, jobs)]))


def said(job: dict[str, Any]) -> dict[str, Any]:
    try:
        with Elsewhere():
            report = levels.verify(
                job["out"],
                job["source"],
                settings=job["settings"],
                device=DEVICE,
                levels=("parity",),
                mode="quick",
            )
    except Exception:  # the others are still asked
        return {"raised": traceback.format_exc()}
    return {
        "raised": None,
        "status": report.status,
        "failing": [f.message for f in report.findings if f.status == "fail"],
        "computed": report.facts["computed"],
        "planted": [f.measured for f in report.findings if f.check == "negative control"],
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
