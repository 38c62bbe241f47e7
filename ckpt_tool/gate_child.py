"""One check of a gate in a process of its own. It reads the check from its standard input, and writes lines
with a word before them to what was its standard output: `tell` what it does, `report` what it found. Its
input ends when the process that waits for it does: then it ends, too."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import TextIO


def main() -> None:
    from ckpt_tool import program

    program.listen()
    # what libraries print is not part of the answer
    answer = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)
    asked = sys.stdin.readline()
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    try:
        _run(asked, answer)
    except (KeyboardInterrupt, program.Interrupted) as stop:
        os._exit(128 + getattr(stop, "number", signal.SIGINT))
    except BrokenPipeError:  # nobody waits any more
        os._exit(2)
    os._exit(0)  # at once: the thread still reads


def _end_with(asker: TextIO) -> None:
    asker.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(asked: str, answer: TextIO) -> None:
    from ckpt_tool.gate_processes import run_one
    from ckpt_tool.verify.handing_over import check_of, report_line

    def tell(text: str) -> None:
        answer.write(f"tell {json.dumps(text)}\n")

    report = run_one(check_of(asked), tell)
    answer.write(f"report {report_line(report)}\n")
    answer.close()
