"""The command line: a thin caller of `ckpt_tool.api`.

Data goes to stdout (`--json`), progress and logs to stderr. A command returns 0 where all that was asked for
holds, 1 where verification found a difference; `ckpt_tool.program` turns every other end into an exit code.
Imports stay inside the commands, so that `--help` costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ckpt_tool import __version__
from ckpt_tool.command_parts import (
    any_dtype,
    as_json,
    checked_files,
    consoles,
    device_option,
    exact_dtype,
    facts_option,
    following_at,
    memory_of,
    mode_of,
    mode_options,
    options_of,
    print_json,
    ray_options,
    report_files,
    write_report,
)
from ckpt_tool.errors import fail, near
from ckpt_tool.family_command import FamilyCommand
from ckpt_tool.loading import load_numpy, loading
from ckpt_tool.onnx_commands import export, verify_onnx
from ckpt_tool.proof_commands import COMMANDS

if TYPE_CHECKING:
    from ckpt_tool.convert.plan import Options
    from ckpt_tool.verify.report import Report

F = TypeVar("F", bound=Callable[..., Any])


def main() -> NoReturn:
    """The program in somebody else's process, see `ckpt_tool.program`: ends by SystemExit."""
    from ckpt_tool import program

    program.main(whole=False)


source_option = click.option(
    "--in", "source", required=True, metavar="PATH", help="Folder, file, hf://org/name or URL."
)
how = options_of(
    click.option("--to", default="hf", show_default=True, help="Direction."),
    click.option(
        "--set",
        "pairs",
        multiple=True,
        metavar="KEY=VALUE",
        help="A fact the files lack (Hugging Face config name).",
    ),
    click.option("--config", "config", metavar="FILE", help="The same from a JSON file."),
    click.option(
        "--tokenizer", metavar="PATH", help="Tokenizer file or folder, when not beside the weights."
    ),
    click.option(
        "--dtype",
        metavar="NAME",
        help="Cast floating tensors: float32, float16, bfloat16 (lossy where it rounds).",
    ),
    click.option(
        "--dequantize", metavar="NAME", help="Make quantised weights numbers (lossy): bfloat16, float32 ..."
    ),
    click.option("--recipe", metavar="NAME", help="How --dequantize rounds: fp32-product, bf16-scale."),
    click.option(
        "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest output shard."
    ),
    click.option(
        "--drop",
        multiple=True,
        metavar="NAME",
        help="Leave out a tensor, or all that a pattern such as '*/Momentum' fits.",
    ),
    click.option(
        "--with-optimizer", is_flag=True, help="Carry the moments of the optimizer, too (Megatron)."
    ),
    click.option("--strict-replicas", is_flag=True, help="Refuse any difference between ranks' copies."),
)


several = options_of(
    click.option("--worker", metavar="I/N", help="Make share I of N of the files, beside other processes."),
    click.option("--finish", is_flag=True, help="Publish what all workers made (with --worker: if last)."),
    ray_options,
)


def _plan_options(asked: dict[str, Any]) -> Options:
    from ckpt_tool.api import settings
    from ckpt_tool.convert.options import fields
    from ckpt_tool.convert.plan import Options, dtype_option

    # --to names a direction, or another architecture's layout on the way to Hugging Face
    layout = {} if asked["to"] in ("hf", "original") else {"architecture": asked["to"]}
    return Options(
        settings=settings(asked["pairs"], asked["config"]),
        dtype=dtype_option(asked["dtype"]) if asked["dtype"] else None,
        **_dequantised(asked["dequantize"], asked["recipe"]),
        max_shard_bytes=byte_size(asked["max_shard_size"]),
        drop=asked["drop"],
        strict_replicas=asked["strict_replicas"],
        with_optimizer=asked["with_optimizer"],
        tokenizer=asked["tokenizer"],
        **fields({**asked["own"], **layout}),
    )


def _dequantised(dtype: str | None, recipe: str | None) -> dict[str, Any]:
    """--dequantize and --recipe as fields of `Options`."""
    if dtype is None and recipe is None:
        return {}
    from ckpt_tool.convert.quantised_asked import dequantize_option

    return dequantize_option(dtype, recipe)


def _direction(to: str) -> str:
    return "original" if to == "original" else "hf"


def byte_size(text: str) -> int:
    """`5GB`, `500MiB`, `1000000` to bytes."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    digits = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        fail("usage", f"expected a size such as 5GB or 500MiB, found {text!r}", where="--max-shard-size")
    return size


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ckpt-tool")
def cli() -> None:
    """Turn original model checkpoints into Hugging Face ones and back, and prove the result right."""


@cli.command(cls=FamilyCommand)
@click.argument("family")
@source_option
@click.option("--out", required=True, metavar="DIR", help="Folder to write, or hf://org/name.")
@how
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker threads.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output (atomically, at the end).")
@click.option(
    "--overwrite-foreign", is_flag=True, help="Also a folder of other weights, configs and tokenizers."
)
@click.option("--resume", is_flag=True, help="Go on from what an interrupted run left.")
@several
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-verify", is_flag=True, help="Skip the coverage check of the result.")
@click.option("--strict", is_flag=True, help="Refuse NaN and infinite weights instead of reporting them.")
@click.option("--sha256", is_flag=True, help="Record SHA-256 of every tensor beside CRC32 (slower).")
@click.option(
    "--checksums",
    is_flag=True,
    help="Compare large weights with checklist.chk or SHA256SUMS too (reads them).",
)
@click.option("--verbose", "-v", is_flag=True, help="Print the plan before working.")
@as_json
def convert(family: str, source: str, out: str, as_json: bool, **asked: Any) -> int:
    """Convert a checkpoint. FAMILY is a name from `ckpt-tool families`, or auto.

    \b
    ckpt-tool convert mistral --in mistral-7B-v0.1 --out Mistral-7B-v0.1-hf
    ckpt-tool convert llama --to original --shards 8 --in llama-70b-hf --out orig
    """
    from ckpt_tool import api
    from ckpt_tool.progress import following
    from ckpt_tool.spread_command import carry_out, wanted

    options = _plan_options(asked)
    if asked["dry_run"]:
        to, checksums = _direction(asked["to"]), asked["checksums"]
        return _show_plan(source, family, to, options, as_json, checksums=checksums)

    def on_plan(made: Any) -> None:
        if asked["verbose"]:
            from ckpt_tool.convert.render import plan_table

            plan_table(made, consoles()[1])

    if wanted(asked):
        shared = api.Shared(source, out, family, _direction(asked["to"]), options, on_plan=on_plan)
        return carry_out(shared, asked, as_json, *consoles())
    with following(lambda: consoles()[1]) as progress:
        done = api.convert(
            source,
            out,
            family=family,
            to=_direction(asked["to"]),
            options=options,
            jobs=asked["jobs"],
            overwrite=asked["overwrite"],
            overwrite_foreign=asked["overwrite_foreign"],
            resume=asked["resume"],
            sha256=asked["sha256"],
            strict=asked["strict"],
            check=not asked["no_verify"],
            checksums=asked["checksums"],
            progress=progress,
            on_plan=on_plan,
            beside=[asked["config"]] if asked["config"] else [],
        )
    if as_json:
        print_json(done.to_json())
    else:
        from ckpt_tool.progress import conversion_summary

        conversion_summary(done, consoles()[0], source)
    return done.report.exit_code if done.report is not None else 0


@cli.command()
@click.argument("out", metavar="DIR")
@click.option("--source", metavar="PATH", help="The original it was made from.")
@click.option("--no-source", is_flag=True, help="There is none: compare with the manifest only.")
@click.option("--accept", multiple=True, metavar="NAME", help="A foretold difference to accept, by its name.")
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["coverage", "bits", "parity", "documented", "training", "generation"]),
    help="Levels to run (default: all but training and generation).",
)
@click.option(
    "--against",
    type=click.Choice(["transformers"]),
    help="Also compare with an implementation that is not ours.",
)
@click.option(
    "--prompts", metavar="FILE", help="JSON file with rows of token ids to add to the fixed prompts."
)
@mode_options
@any_dtype
@device_option
@click.option("--checkpoint-id", metavar="ID", help="Published name, to look up documented values.")
@facts_option
@click.option(
    "--transformers-python",
    metavar="PATH",
    help="Python, or folder of packages, with a transformers for what the installed one lacks.",
)
@click.option("--expectations", metavar="FILE", help="Values that a trusted run recorded, to hold against.")
@click.option("--record", metavar="FILE", help="Record what it computes, if it passes.")
@click.option("--worker", metavar="I/N", help="Look at share I of N, beside other processes.")
@click.option("--finish", is_flag=True, help="Join what all workers saw into the report.")
@ray_options
@report_files
def verify(out: str, source: str | None, levels: tuple[str, ...], **asked: Any) -> int:
    """Prove that DIR holds the same model as its source. Exit code 1 when it does not.

    \b
    ckpt-tool verify mistral-hf --source mistral-7B-v0.1 --against transformers
    ckpt-tool verify mistral.onnx --source mistral-7B-v0.1
    """
    from ckpt_tool.spread_command import look, look_on_ray, wanted

    if out.lower().endswith(".onnx"):
        return verify_onnx(out, source, levels, asked)
    _load_verify()
    spread = wanted(asked)
    if asked["worker"]:
        return look(out, source, levels, asked, *consoles())
    files = checked_files(asked, (out, source, asked["prompts"], asked["expectations"]))
    if spread and asked["ray"]:
        look_on_ray(out, source, levels, asked, consoles()[1])
    report = _run_verify(out, source, levels, asked)
    if asked["record"] is not None and report.status == "pass":
        _record(out, asked)  # first: a report may be read to its middle
    elif asked["record"] is not None:
        consoles()[1].print("nothing was recorded: only what a run that passes computes is", markup=False)
    return write_report(report, asked, files)


def _record(out: str, asked: dict[str, Any]) -> None:
    from pathlib import Path

    from ckpt_tool import api
    from ckpt_tool.report_files import write_whole
    from ckpt_tool.verify.recording import record

    name = asked["checkpoint_id"] or Path(out).resolve().name
    values = record(
        out,
        name,
        dtype=asked["compute_dtype"],
        device=asked["device"],
        settings=api.settings(asked["pairs"]),
    )
    write_whole(asked["record"], values)
    consoles()[1].print(f"recorded in {asked['record']}", markup=False)


def _load_verify() -> None:
    """What verifying without torch needs, together, which takes less than one by one."""
    with loading():
        load_numpy()
        from ckpt_tool import verify  # noqa: F401


def _run_verify(out: str, source: str | None, levels: tuple[str, ...], asked: dict[str, Any]) -> Report:
    from ckpt_tool import api

    _, log = consoles()
    chosen: dict[str, Any] = {"levels": levels} if levels else {}
    return api.verify(
        out,
        source,
        no_source=asked.get("no_source", False),
        accept=asked.get("accept", ()),
        against=asked["against"],
        prompts=asked["prompts"],
        compute_dtype=asked["compute_dtype"],
        device=asked["device"],
        checkpoint_id=asked["checkpoint_id"],
        settings=api.settings(asked["pairs"]),
        transformers_python=asked.get("transformers_python"),
        expectations=asked.get("expectations"),
        mode=mode_of(asked),
        memory=memory_of(asked),
        progress=following_at(log),
        joined=bool(asked.get("finish") or asked.get("ray")),
        **chosen,
    )


@cli.command()
@click.argument("out", metavar="DIR")
@click.option("--source", metavar="PATH", required=True, help="The original it was made from.")
@facts_option
@exact_dtype
@device_option
@report_files
def diagnose(out: str, source: str, **asked: Any) -> int:
    """Find which known mistake explains a difference. DIR is held against its source."""
    _load_verify()
    files = checked_files(asked, (out, source))
    report = _run_verify(
        out, source, ("parity",), {**asked, "against": None, "prompts": None, "checkpoint_id": None}
    )
    report.title = "ckpt-tool diagnose"
    return write_report(report, asked, files)


@cli.command()
@click.argument("path")
@click.option("--all", "everything", is_flag=True, help="List every tensor instead of folding layers.")
@click.option(
    "--checksums",
    is_flag=True,
    help="Compare large weights with checklist.chk or SHA256SUMS too (reads them).",
)
@as_json
def inspect(path: str, everything: bool, checksums: bool, as_json: bool) -> int:
    """Show what a checkpoint holds. Nothing in it is loaded or run."""
    from ckpt_tool.convert.recognising import near_misses, recognise
    from ckpt_tool.inspect import inspect as look

    found = look(path, recognise=recognise, near=near_misses, checksums=checksums)
    if as_json:
        print_json(found.to_json())
    else:
        found.render(consoles()[0], everything=everything)
    return 2 if found.refused else 0


@cli.command(cls=FamilyCommand)
@click.argument("family")
@source_option
@how
@as_json
def plan(family: str, source: str, as_json: bool, **asked: Any) -> int:
    """Print what converting would do, from headers alone. Tensors, config values and their sources."""
    return _show_plan(source, family, _direction(asked["to"]), _plan_options(asked), as_json)


def _show_plan(
    source: str, family: str, to: str, options: Options, as_json: bool, *, checksums: bool = False
) -> int:
    from ckpt_tool import api

    api.check_name(family)
    with api.open_for(source, to, options) as checkpoint:
        made = api.plan(checkpoint, family=family, to=to, options=options, checksums=checksums)
        opened = checkpoint.opened()
    if as_json:
        print_json({**made.to_json(), "opened": opened, "digest": made.digest()})
    else:
        from ckpt_tool.convert.render import plan_table

        plan_table(made, consoles()[0], opened)
    return 0


@cli.command()
@click.argument("file", metavar="PARITY.TOML")
@click.option("--only", multiple=True, metavar="NAME", help="Run this check alone; also a pattern of names.")
@click.option("--list", "listed", is_flag=True, help="List the checks and stop.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first check that does not pass.")
@click.option("--jobs", type=int, metavar="N", help="Run up to N checks at once, a process each.")
@click.option(
    "--memory", metavar="SIZE", help="What they may take together, as 4GiB (default: what is free)."
)
@click.option("--baseline", metavar="FILE", help="JSON report of an earlier run: fail on what got worse.")
@report_files
def gate(file: str, only: tuple[str, ...], listed: bool, **asked: Any) -> int:
    """Run conversions and verifications from a TOML file. For CI."""
    from pathlib import Path

    from ckpt_tool import api
    from ckpt_tool.gate_processes import last_line, listing
    from ckpt_tool.terminal import paragraph
    from ckpt_tool.verify.gate import chosen, read_gate

    checks = chosen(read_gate(Path(file))[1], only, file)
    screen, log = consoles()
    if listed:
        listing(checks, screen)
        return 0
    files = checked_files(asked, (file, *(p for c in checks for p in (c.out, c.source, c.prompts))))
    reports = api.gate(
        file,
        only=only,
        fail_fast=asked["fail_fast"],
        baseline=asked["baseline"],
        jobs=asked["jobs"],
        memory=memory_of(asked),
        progress=following_at(log, always="gate: "),
    )
    code = write_report(reports, asked, files)
    screen = log if asked["json_file"] == "-" else screen
    paragraph(screen, last_line(reports, files.files.values()), hang=2)
    return code


@cli.command()
@as_json
def families(as_json: bool) -> int:
    """List the families."""
    from ckpt_tool.convert.families import FAMILIES, family

    known = [family(n) for n in FAMILIES]
    if as_json:
        rows = [{"name": f.name, "summary": f.summary, "architectures": f.architectures} for f in known]
        print_json(rows, indent=None)
        return 0
    from ckpt_tool.terminal import Column, table

    heads = (Column("family", whole=True), Column("Hugging Face class"), Column("originals"))
    table(consoles()[0], heads, [(f.name, _first(f.architectures), f.summary) for f in known])
    return 0


def _first(names: Sequence[str]) -> str:
    """One or two names, or the first where there are more or one of 30 letters: 80 columns hold no more."""
    few = len(names) < 3 and max(map(len, names)) < 30
    return ", ".join(names) if few else f"{names[0]}\nand {len(names) - 1} more"


@cli.command()
@click.argument("name", required=False)
@click.option("--out", metavar="DIR", help="Folder to write the tiny original into.")
@as_json
def fixtures(name: str | None, out: str | None, as_json: bool) -> int:
    """Write a tiny original checkpoint to try things on. Without NAME, list them."""
    from pathlib import Path

    from ckpt_tool.convert.places import free_place
    from ckpt_tool.fixtures.variants import VARIANTS

    if name is None:
        rows = [{"name": k, "family": v.family, "description": v.description} for k, v in VARIANTS.items()]
        if as_json:
            print_json(rows)
        else:
            from ckpt_tool.terminal import Column, table

            heads = (Column("fixture", whole=True), Column("family", whole=True), Column("original"))
            table(consoles()[0], heads, [(r["name"], r["family"], r["description"]) for r in rows])
        return 0
    if name not in VARIANTS:
        hint = near(name, VARIANTS)
        fail("usage", f"expected a name from `ckpt-tool fixtures`, found {name!r}", where="NAME", hint=hint)
    if out is None:
        fail("usage", "expected --out DIR, found none", where="--out")
    free_place(Path(out), (), make_parents=True, flags=False)
    print(VARIANTS[name].write(Path(out)))
    return 0


@cli.command()
@click.option(
    "--out", default="ckpt-tool-demo", show_default=True, metavar="DIR", help="Folder for the demo's files."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo.")
def demo(out: str, overwrite: bool) -> int:
    """Convert, verify and break a tiny Mistral. The broken copy must be caught."""
    from pathlib import Path

    from ckpt_tool.demo import run

    return run(Path(out), overwrite=overwrite, screen=consoles()[0])


@cli.command()
@click.option("--only", multiple=True, metavar="FAMILY", help="One family's variants.")
@click.option("--no-judge", is_flag=True, help="Leave transformers out.")
@as_json
def table(only: tuple[str, ...], no_judge: bool, as_json: bool) -> int:
    """Convert, verify and send back every tiny variant. Prints family x variant x result."""
    from ckpt_tool.table import run

    return run(only=only, judge=not no_judge, as_json=as_json, screen=consoles()[0])


for command in (*COMMANDS, export):
    cli.add_command(command)
