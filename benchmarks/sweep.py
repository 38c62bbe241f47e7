"""Every family that is written as Megatron-Core checkpoints, in every layout and over every number of ranks
that its options allow: written, loaded by megatron-core, converted back, proved. One row each.

    python benchmarks/sweep.py --parallel 1 2 --json sweep.json [--only qwen3] [--variants llama-mcore]
        [--megatron .judges/megatron] [--no-judge]

bits          each tensor of the conversion against the checkpoint that was written
NMSE          logits of the two readings, the worst prompt; then transformers' of the model that was converted
              back, then megatron-core's of the files that were written, both against the original's reading
there, back   the model that the checkpoint was written of, byte for byte

megatron-core (a folder of packages, --megatron) loads each container over as many processes as there are
ranks, on the CPU: the files of ranks one in each process, a torch_dist folder also over other numbers of
ranks than it was written for. Where layers do not divide by the stages, the first stages have one more. What
cannot be shared out (key/value heads over ranks, experts over ranks) is refused, and counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tool import api
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families import Variant
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.table import compare, level_status, worst

RANKS, FOLDER = FORMS = ("mcore", "torch_dist")
AXES = ("tensor_parallel", "pipeline_parallel", "expert_parallel")
PROMPT = [1, 5, 9, 2, 7, 3, 11, 4, 8, 6, 12, 10] * 4  # megatron_judge.py's
JUDGE = Path(__file__).resolve().parents[1] / "tests" / "megatron_judge.py"
BAR = 1e-10  # NMSE of megatron-core's logits in float32, against the original's reading
Grid = tuple[int, int, int]  # ranks of tensor, pipeline and expert parallelism


@dataclass
class Row:
    """One container. `asked` are the ranks it was written for, or how a folder has its layers; `megatron` is
    the worst NMSE of megatron-core's logits by the ranks that loaded it."""

    family: str
    variant: str
    form: str
    asked: str
    bits: str = "-"
    parity: float | None = None
    transformers: float | None = None
    there_and_back: str = "-"
    verdict: str = "refused"
    megatron: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = max(self.megatron.values(), default=None)
        nmse = [f"{x:.1e}" if x is not None else "-" for x in (self.parity, self.transformers, worst)]
        nmse[2] += f" ({len(self.megatron)})" if self.megatron else ""
        cells = (
            self.family, self.variant, self.form, self.asked, self.bits, *nmse, self.there_and_back,
            self.verdict,
        )  # fmt: skip
        widths = (8, 17, 10, 15, 7, 8, 8, 12, 10, 0)
        return " ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()


HEAD = Row("family", "variant", "layout", "TPxPPxEP", "bits", there_and_back="back", verdict="verdict")


def grids(name: str, parallel: Sequence[int]) -> list[Grid]:
    """The ranks that a model of this family may be shared out over."""
    experts = parallel if any(o.name == AXES[2] for o in family(name).options) else (1,)
    return list(product(parallel, parallel, experts))


def asked_of(name: str, layers: int, counts: Sequence[Grid]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The containers of a family: the layout, what to call it, and the options that ask for it."""
    options = {o.name: o for o in family(name).options}
    forms = options["form"].choices if "form" in options else ()
    for grid in counts if RANKS in forms else ():
        asked = {a: n for a, n in zip(AXES, grid, strict=True) if a in options}
        if layers % grid[1]:
            split = [layers // grid[1] + (k < layers % grid[1]) for k in range(grid[1])]
            asked["pipeline_layers"] = ",".join(map(str, split))
        yield RANKS, "x".join(map(str, grid)), asked
    for how in options["layers"].choices if FOLDER in forms else ():
        yield FOLDER, how, {"layers": how}


def proved(row: Row, asked: Mapping[str, Any], there: Path, made: Path, again: Path, judge: bool) -> None:
    """Write the model `there` as it is asked for, convert it back, and fill the row in."""
    try:
        written = Options(family_options={"form": row.form, **asked})
        api.convert(there, made, family=row.family, to="original", options=written, check=False)
    except CkptToolError as error:
        row.verdict = f"refused: {error.problems[0].message}"
        return
    try:
        api.convert(made, again, family=row.family, check=False)
        report = api.verify(again, made, against="transformers" if judge else None)
    except CkptToolError as error:
        row.verdict = f"FAIL: {error.problems[0].message}"
        return
    with api.open_for(there, "original") as a, api.open_for(again, "original") as b:
        unlike = compare(a, b)
    row.bits, row.parity = level_status(report, "bits"), worst(report, "parity")
    row.transformers = worst(report, "transformers")
    row.there_and_back = unlike[0] if unlike else "equal"
    row.verdict = "FAIL" if unlike else report.status


def reading(variant: Variant, source: Path, there: Path) -> np.ndarray:
    """The original's own reading of the judge's prompt, in float32."""
    import torch

    from ckpt_tool.verify.sides import original_side
    from ckpt_tool.verify.subject import opened

    with opened(there, source, variant.settings) as subject:
        side = original_side(subject, torch.float32, "cpu")
        logits: np.ndarray = side.forward(torch.tensor([PROMPT]) % subject.config["vocab_size"]).numpy()
    return logits


def loaded(packages: Path, grid: Grid, folders: Sequence[Path], scratch: Path) -> dict[str, np.ndarray]:
    """megatron-core's logits of each folder over these ranks."""
    name = "x".join(map(str, grid))
    out = scratch / f"{name}.npz"
    script = [sys.executable, "-W", "ignore", str(JUDGE), name, str(scratch / f"{name}.meeting"), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*script, *map(str, folders)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"megatron-core on {name}: {run.stderr[-3000:]}")
    return dict(np.load(out))


def of_family(
    name: str, variants: Sequence[Variant], parallel: Sequence[int], judge: bool, packages: Path | None
) -> Iterator[Row]:
    """All containers of the variants; yielded once megatron-core, which takes seconds to start, has loaded
    all of them."""
    counts, made, wanted = grids(name, parallel), [], {}
    with tempfile.TemporaryDirectory(prefix="ckpt-tool-sweep-") as given:
        scratch = Path(given)
        for variant in variants:
            source, there = variant.write(scratch / variant.id / "original"), scratch / variant.id / "there"
            options = Options(settings=variant.settings)
            api.convert(source, there, family=name, options=options, check=False)
            wanted[variant.id] = reading(variant, source, there)
            layers = json.loads((there / "config.json").read_text())["num_hidden_layers"]
            for number, (form, words, asked) in enumerate(asked_of(name, layers, counts)):
                row, place = Row(name, variant.id, form, words), scratch / variant.id / str(number)
                proved(row, asked, there, place, place.with_suffix(".again"), judge)
                made.append((row, place / "release"))
        for grid in counts if packages is not None else ():
            words = "x".join(map(str, grid))
            there_is = [(r, p) for r, p in made if p.exists() and (r.form == FOLDER or r.asked == words)]
            found = loaded(packages, grid, [p for _, p in there_is if fits(p, grid)], scratch)
            for row, place in there_is:
                if str(place) in found:
                    expected = wanted[row.variant]
                    off = ((found[str(place)] - expected) ** 2).mean() / expected.var()
                    row.megatron[words] = float(off)
                    row.verdict = row.verdict if off <= BAR else "FAIL"
    yield from (row for row, _ in made)


def fits(release: Path, grid: Grid) -> bool:
    """Whether megatron-core shares a folder's model out over these ranks: not with a rest of key/value heads
    or experts."""
    import torch

    if not (release / "common.pt").exists():
        return True  # files of these very ranks
    args = torch.load(release / "common.pt", weights_only=False)["args"]
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    experts = getattr(args, "num_experts", None) or 1
    return (groups % grid[0], args.padded_vocab_size % grid[0], experts % grid[2]) == (0, 0, 0)


def summary(made: Sequence[Row]) -> str:
    """The table of docs: for each family and layout the containers, and what was shown of them."""
    lines = ["| family | layout | containers | refused | pass | loads by megatron-core | worst NMSE |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for name, form in dict.fromkeys((r.family, r.form) for r in made):
        rows = [r for r in made if (r.family, r.form) == (name, form)]
        states = Counter(r.verdict.partition(":")[0] for r in rows)
        loads = [x for r in rows for x in r.megatron.values()]
        far = [x for r in rows for x in (r.parity, r.transformers, *r.megatron.values()) if x is not None]
        cells = (name, form, len(rows), states["refused"], states["pass"], len(loads))
        lines.append(f"| {' | '.join(map(str, cells))} | {max(far, default=0):.1e} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=[])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[])
    parser.add_argument("--parallel", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--no-judge", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(str(HEAD).replace("-        -        -      ", "NMSE     judge    megatron"), flush=True)
    made = []
    for name in given.only or FAMILIES:
        own = [v for v in VARIANTS.values() if v.family == name and v.id in (given.variants or VARIANTS)]
        if own and any(o.name == "form" for o in family(name).options):
            for row in of_family(name, own, given.parallel, not given.no_judge, given.megatron):
                print(row, flush=True)
                made.append(row)
    print(f"\n{summary(made)}")
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in made], indent=2))
    return 1 if any(r.verdict.startswith(("FAIL", "fail")) for r in made) else 0


if __name__ == "__main__":
    raise SystemExit(main())
