"""Table family x mode x rules: both readings of tiny decoders against `generate` of transformers, the
installed release (rules 5, or 5.24 from that on) and 4.37.2 in its own process (rules 4.37; .judges/tf4.37,
which `make test` sets up).

    python benchmarks/generation.py [--settings 6] [--seed 1] [--rules 5|4.37|both] [VARIANT ...]

Settings are random and the same for the same seed: lengths, eos lists, penalties, bans, cuts of sampling,
beams with every kind of early stopping, left padding. A run counts where tokens, steps and parents of beams
are equal and every score is within 1e-4. What both refuse counts too; what one refuses is listed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ckpt_tool.api import Options, convert
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.generate_options import rules_for
from ckpt_tool.verify.generate_run import Request, run
from ckpt_tool.verify.sides import converted_side, original_side
from ckpt_tool.verify.subject import opened

ROOT = Path(__file__).parents[1]
OLDER = ROOT / ".judges" / "tf4.37"
BOTH = ("llama-2-7b", "mistral-7b-v0.1", "mixtral-b", "qwen2-0.5b", "pythia-410m", "gpt2-v2-tp2", "opt-350m",
        "codegen-350m-mono")  # fmt: skip
DECODERS = {
    "5": (*BOTH, "llama-3.1-8b", "mixtral-mcore", "qwen2-window", "qwen3-0.6b", "gemma-2-2b"),
    "4.37": (*BOTH, "llama-1-13b", "opt-13b"),
}
MODES = {"5": ("greedy", "sample", "beam", "beam sample")}
MODES["4.37"] = (*MODES["5"], "groups")


def arguments(r: random.Random, mode: str, rules: str, words: int) -> dict[str, Any]:
    """Random options of one mode."""

    def some(n: int) -> list[int]:
        return [r.randrange(3, words) for _ in range(n)]

    maybe = {
        "repetition_penalty": (0.25, lambda: r.choice([1.3, 0.8])),
        "no_repeat_ngram_size": (0.2, lambda: r.choice([1, 2, 3])),
        "min_length": (0.2, lambda: r.choice([9, 12])),
        "min_new_tokens": (0.2, lambda: r.choice([2, 4])),
        "bad_words_ids": (0.1, lambda: [some(1), some(2)]),
        "suppress_tokens": (0.1, lambda: some(5)),
        "begin_suppress_tokens": (0.1, lambda: some(20)),
        "forced_eos_token_id": (0.1, lambda: some(1)[0]),
        "sequence_bias": (0.1, lambda: [[some(1), 3.0], [some(2), -2.0]]),
        "renormalize_logits": (0.1, lambda: True),
    }
    cuts = {
        "temperature": (0.5, lambda: r.choice([0.7, 1.5])),
        "top_k": (0.5, lambda: r.choice([0, 5, 30])),
        "top_p": (0.4, lambda: r.choice([0.5, 0.9])),
        "typical_p": (0.2, lambda: 0.6),
        "epsilon_cutoff": (0.2, lambda: 0.02),
        "eta_cutoff": (0.2, lambda: 0.05),
        **({"min_p": (0.2, lambda: 0.1)} if rules == "5" else {}),
    }
    chosen = {**maybe, **(cuts if "sample" in mode else {})}
    made: dict[str, Any] = {name: make() for name, (often, make) in chosen.items() if r.random() < often}
    made |= {"do_sample": "sample" in mode, "pad_token_id": r.choice([0, 3, 5])}
    made |= {"max_length": 16} if r.random() < 0.2 else {"max_new_tokens": r.choice([1, 3, 8, 12])}
    made["eos_token_id"] = r.choice([some(1)[0], some(2), some(12), None])
    if "beam" in mode or mode == "groups":
        made["num_beams"] = 4 if mode == "groups" else r.choice([2, 3, 4])
        made["num_return_sequences"] = r.randint(1, made["num_beams"])
        made["length_penalty"] = r.choice([1.0, 0.0, 2.0, -1.0, 0.5])
        made["early_stopping"] = r.choice([True, False, "never"])
    if mode == "groups":
        made |= {"num_beam_groups": 2, "diversity_penalty": r.choice([0.5, 2.0])}
    return made


def jobs_for(folder: Path, rules: str, settings: int, seed: int) -> list[dict[str, Any]]:
    r, words = (
        random.Random(f"{folder.name} {seed}"),
        json.loads((folder / "config.json").read_text())["vocab_size"],
    )
    found = []
    for mode in MODES[rules]:
        for _ in range(settings):
            lengths = r.choice([[5, 3], [4, 4], [6], [1, 7, 3]])
            wide = max(lengths)
            rows = [[7] * (wide - n) + [r.randrange(8, words) for _ in range(n)] for n in lengths]
            asked = arguments(r, mode, rules, words)
            found.append({
                "folder": str(folder), "mode": mode, "input_ids": rows, "arguments": asked,
                "attention_mask": [[0] * (wide - n) + [1] * n for n in lengths],
                "seed": r.randrange(1000) if asked["do_sample"] else None,
            })  # fmt: skip
    return found


def judged(jobs: list[dict[str, Any]], rules: str, work: Path) -> list[dict[str, Any]]:
    files = [work / f"{name}-{rules}.json" for name in ("jobs", "results")]
    files[0].write_text(json.dumps(jobs))
    environment = {**os.environ, **({"PYTHONPATH": str(OLDER)} if rules == "4.37" else {})}
    command = [sys.executable, str(ROOT / "benchmarks" / "generation_judge.py"), *map(str, files)]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    found = json.loads(files[1].read_text())
    print(f"judge: transformers {found['version']}", flush=True)
    results: list[dict[str, Any]] = found["results"]
    return results


def apart(found: Any, wanted: Any) -> float:
    if isinstance(found, list):
        if len(found) != len(wanted):
            return math.inf
        return max((apart(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    b = float(wanted)
    if found == b or (math.isnan(found) and math.isnan(b)):
        return 0.0
    return abs(found - b) / max(1.0, abs(b)) if math.isfinite(found - b) else math.inf


def differs(made: Any, wanted: dict[str, Any], groups: bool) -> tuple[str | None, float]:
    """What is not equal, and how far scores are apart. 4.37's groups mix up parents, and scores with them."""
    if made.sequences != wanted["sequences"]:
        return "tokens", math.inf
    if made.steps != wanted["steps"]:
        return "steps", math.inf
    worst = 0.0
    if made.sequences_scores is not None:
        worst = apart(made.sequences_scores, wanted["sequences_scores"])
        width = len(made.beam_indices[0])
        if not groups and [row[:width] for row in wanted["beam_indices"]] != made.beam_indices:
            return "parents of beams", worst
    if not groups:
        worst = max(worst, *(apart(getattr(made, n), wanted[n]) for n in ("transition_scores", "normalized")))
    return ("scores" if worst > 1e-4 else None), worst


def compared(
    jobs: list[dict[str, Any]], results: list[dict[str, Any]], rules: str, sources: dict[str, Path]
) -> int:
    """Print the table of one release; how many runs are wrong."""
    good: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    worst, wrong = defaultdict(float), 0
    with ExitStack() as stack:
        known: dict[str, Any] = {}
        for job, wanted in zip(jobs, results, strict=True):
            folder = job["folder"]
            name = Path(folder).name
            if folder not in known:
                subject = stack.enter_context(opened(folder, sources[name]))
                known[folder] = (
                    subject,
                    [make(subject, torch.float32, "cpu") for make in (original_side, converted_side)],
                )
            subject, sides = known[folder]
            own = rules_for(version("transformers")) if rules == "5" else rules
            request = Request(job["input_ids"], job["attention_mask"], job["arguments"], own, job["seed"])
            for side in sides:
                try:
                    made = run(subject, side, request).generated
                    said, far = (
                        ("they refuse", 0.0)
                        if "error" in wanted
                        else differs(made, wanted, job["mode"] == "groups")
                    )
                except CkptToolError as error:
                    said, far = (None if "error" in wanted else f"refused: {error.problems[0].message}"), 0.0
                good[name, job["mode"]][0] += said is None
                good[name, job["mode"]][1] += 1
                worst[name] = max(worst[name], far if said is None else 0.0)
                if said is not None:
                    wrong += 1
                    print(f"  {name}, {job['mode']}: {said}; {wanted.get('error', '')} {job['arguments']}")
    print(f"{'rules ' + rules:22}" + "".join(f"{mode:>13}" for mode in MODES[rules]) + "  worst score")
    for name in worst:
        cells = (good[name, mode] for mode in MODES[rules])
        print(f"{name:22}" + "".join(f"{f'{a}/{n}':>13}" for a, n in cells) + f"{worst[name]:13.1e}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", type=int, default=6, help="of each mode")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rules", choices=("5", "4.37", "both"), default="both")
    parser.add_argument("variants", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        work, sources = Path(scratch), {}
        for rules in ("5", "4.37") if asked.rules == "both" else (asked.rules,):
            jobs: list[dict[str, Any]] = []
            for name in asked.variants or DECODERS[rules]:
                if name not in sources:
                    variant = VARIANTS[name]
                    sources[name] = variant.write(work / "originals" / name)
                    convert(
                        sources[name],
                        work / name,
                        family=variant.family,
                        options=Options(settings=variant.settings),
                    )
                jobs += jobs_for(work / name, rules, asked.settings, asked.seed)
            wrong += compared(jobs, judged(jobs, rules, work), rules, sources)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
