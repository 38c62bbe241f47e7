"""Runs under transformers 4.37.2, the last release with an AdamW of its own: its steps and its schedules.

    PYTHONPATH=JUDGE python optimizer_script.py IN.pt OUT.pt

IN.pt holds a list of (options of AdamW, tensor, gradients) and one of (function, arguments, rate, steps);
OUT.pt gets the tensor after each step, and the factors of the schedule at each. Not a test module.
"""

import sys
import warnings
from typing import Any

import torch


def stepped(options: Any, start: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    from transformers.optimization import AdamW

    p = torch.nn.Parameter(start.clone())
    optimizer = AdamW([p], no_deprecation_warning=True, **options)
    made = []
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        made.append(p.detach().clone())
    return torch.stack(made)


def factors(name: str, numbers: Any, rate: float, steps: int) -> list[float]:
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = getattr(optimization, name)(optimizer, **numbers)
    made = []
    for _ in range(steps):
        made.append(schedule.get_last_lr()[0] / rate)
        optimizer.step()
        schedule.step()
    return made


def main(source: str, target: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps, schedules = torch.load(source)
    torch.save(([stepped(*case) for case in steps], [factors(*case) for case in schedules]), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
