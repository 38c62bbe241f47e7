"""`export onnx`, and `verify` of a file that ends in .onnx."""

from __future__ import annotations

from typing import Any

import click

from ckpt_tool.command_parts import (
    checked_files,
    consoles,
    facts_option,
    following_at,
    report_files,
    write_report,
)
from ckpt_tool.errors import fail

# Options of `verify` that are of checkpoints alone, by what the command calls them.
OF_CHECKPOINTS = {
    "no_source": "--no-source",
    "accept": "--accept",
    "against": "--against",
    "checkpoint_id": "--checkpoint-id",
    "expectations": "--expectations",
    "record": "--record",
    "worker": "--worker",
    "finish": "--finish",
    "ray": "--ray",
    "quick": "--quick",
    "memory": "--memory",
}


@click.group()
def export() -> None:
    """Write a model in another format. With the proof that it computes the same."""


@export.command()
@click.argument("folder", metavar="DIR")
@click.option("--out", required=True, metavar="FILE.onnx", help="File to write; its weights go beside it.")
@click.option(
    "--task",
    metavar="NAME",
    help="default, causal-lm, masked-lm, sequence-classification ... (default: that of the model's class).",
)
@click.option("--with-past", is_flag=True, help="Take and give keys and values of earlier tokens.")
@click.option("--opset", type=int, default=18, show_default=True, help="Version of the operators.")
@click.option("--source", metavar="PATH", help="The original that DIR was made from, which then judges.")
@click.option("--prompts", metavar="FILE", help="More rows of token ids (JSON).")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@facts_option
@report_files
def onnx(folder: str, out: str, source: str | None, **asked: Any) -> int:
    """Export DIR to ONNX. What onnxruntime computes is compared with the source.

    \b
    ckpt-tool export onnx Mistral-7B-v0.1-hf --out mistral.onnx --with-past
    """
    from ckpt_tool import api
    from ckpt_tool.verify.onnx_made import Asked
    from ckpt_tool.verify.prompts import read_prompts

    files = checked_files(asked, (folder, source, asked["prompts"]))
    report = api.export_onnx(
        folder,
        out,
        source,
        asked=Asked(asked["task"], asked["with_past"], asked["opset"], asked["overwrite"]),
        settings=api.settings(asked["pairs"]),
        prompts=None if asked["prompts"] is None else read_prompts(asked["prompts"]),
        tell=following_at(consoles()[1]),
    )
    return write_report(report, asked, files)


def verify_onnx(out: str, source: str | None, levels: tuple[str, ...], asked: dict[str, Any]) -> int:
    """`verify FILE.onnx --source PATH`: `usage` for options that say nothing of a graph."""
    from ckpt_tool import api
    from ckpt_tool.verify.prompts import read_prompts

    if source is None:
        hint = "--source PATH names the original, or a folder in the Hugging Face layout"
        fail(
            "usage",
            "expected the model that the graph was made from, found none",
            where="--source",
            hint=hint,
        )
    if other := [level for level in levels if level != "parity"]:
        why = ": it has no gradients" if "training" in other else ""
        text = f"expected parity, which is all that a graph is asked, found {', '.join(other)}{why}"
        fail("usage", text, where="--level", hint="verify the model that it was made from at this level")
    given = [option for name, option in OF_CHECKPOINTS.items() if asked.get(name)]
    given += ["--compute-dtype"] if asked.get("compute_dtype") not in (None, "float32") else []
    given += ["--device"] if asked.get("device") not in (None, "cpu") else []
    if given:
        text = f"expected options of an ONNX file, found {', '.join(given)}, of checkpoints alone"
        fail("usage", text, where=given[0], hint="--source, --set, --prompts and the reports go with it")
    files = checked_files(asked, (out, source, asked["prompts"]))
    report = api.verify_onnx(
        out,
        source,
        settings=api.settings(asked["pairs"]),
        prompts=None if asked["prompts"] is None else read_prompts(asked["prompts"]),
        tell=following_at(consoles()[1]),
    )
    return write_report(report, asked, files)
