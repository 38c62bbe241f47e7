"""Commands about proof that is kept and shown: certificates, comparisons, documented values."""

from __future__ import annotations

from typing import Any

import click

from ckpt_tool.command_parts import (
    any_dtype,
    as_json,
    checked_files,
    consoles,
    device_option,
    exact_dtype,
    facts_option,
    following_at,
    report_files,
    write_report,
)


@click.command()
@click.argument("out", metavar="DIR")
@click.option("--source", metavar="PATH", required=True, help="The original it was made from.")
@click.option("--sign", "key", metavar="KEY", help="Sign with the private key in this PEM file.")
@click.option("--write", "file", metavar="FILE", help="Where to; by default into DIR.")
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["coverage", "bits", "parity", "documented", "training"]),
    help="Levels to verify (default: all but training).",
)
@click.option("--against", type=click.Choice(["transformers"]), help="Also compare with transformers.")
@click.option("--accept", multiple=True, metavar="NAME", help="A foretold difference to accept, by its name.")
@exact_dtype
@click.option("--checkpoint-id", metavar="ID", help="Published name, to look up documented values.")
@device_option
@facts_option
def certificate(out: str, source: str, key: str | None, file: str | None, **asked: Any) -> int:
    """Verify DIR and write down what was shown. It is an in-toto Statement, signed on request.

    \b
    ckpt-tool certificate mistral-hf --source mistral-7B-v0.1 --sign key.pem
    """
    from ckpt_tool import api
    from ckpt_tool.certificates import made

    screen, log = consoles()
    return made(
        out,
        source,
        file,
        key,
        {**asked, "settings": api.settings(asked.pop("pairs"))},
        screen,
        following_at(log),
    )


@click.command("check-certificate")
@click.argument("out", metavar="DIR")
@click.option("--certificate", "file", metavar="FILE", help="The certificate, when not in DIR.")
@click.option("--key", metavar="KEY", help="Public key (PEM) that it must be signed with.")
@click.option("--source", metavar="PATH", help="The original, for --spot and --full.")
@click.option(
    "--spot", type=int, metavar="K", help="Make K tensors, chosen at random, again from the source."
)
@click.option("--full", is_flag=True, help="Verify again: the same certificate must come out.")
@click.option("--seed", type=int, help="Choose the same tensors as another run with this seed.")
@device_option
@facts_option
@report_files
def check_certificate(out: str, source: str | None, file: str | None, **asked: Any) -> int:
    """Check that a certificate holds for DIR. Exit code 1 when it does not.

    \b
    ckpt-tool check-certificate mistral-hf --key public.pem
    ckpt-tool check-certificate mistral-hf --source mistral-7B-v0.1 --spot 20
    """
    from ckpt_tool import api
    from ckpt_tool.verify.certificate_check import check

    files = checked_files(asked, (out, source, file, asked["key"]))
    report = check(
        out,
        file=file,
        key=asked["key"],
        source=source,
        spot=asked["spot"],
        full=asked["full"],
        seed=asked["seed"],
        settings=api.settings(asked["pairs"]),
        device=asked["device"],
        progress=following_at(consoles()[1]),
    )
    return write_report(report, asked, files)


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--family", metavar="NAME", help="Family of originals that do not tell it.")
@click.option("--logits/--no-logits", default=None, help="Compute with both (default: where they differ).")
@exact_dtype
@device_option
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A fact that an original lacks.")
@report_files
def compare(a: str, b: str, **asked: Any) -> int:
    """Compare two checkpoints of any layouts and dtypes. Exit code 1 where they differ.

    \b
    ckpt-tool compare mistral-7B-v0.1 Mistral-7B-v0.1-hf
    ckpt-tool compare base fine-tuned --html moved.html
    """
    from ckpt_tool import api
    from ckpt_tool.verify.compare import compare as run

    files = checked_files(asked, (a, b))
    if asked["family"] is not None:
        api.check_name(asked["family"])
    report = run(
        a,
        b,
        family=asked["family"],
        settings=api.settings(asked["pairs"]),
        logits=asked["logits"],
        compute_dtype=asked["compute_dtype"],
        device=asked["device"],
        progress=following_at(consoles()[1]),
    )
    return write_report(report, asked, files)


@click.group()
def expectations() -> None:
    """Documented values of published models. What is known, and what a model gives."""


@expectations.command("list")
@as_json
def list_expectations(as_json: bool) -> int:
    """List the published models of which values are documented."""
    from ckpt_tool.documented_command import listed

    return listed(as_json, consoles()[0])


@expectations.command("show")
@click.argument("name", metavar="CHECKPOINT")
@as_json
def show_expectations(name: str, as_json: bool) -> int:
    """Show what is documented of one, and what each value needs to be run."""
    from ckpt_tool.documented_command import shown

    return shown(name, as_json, consoles()[0])


@expectations.command("run")
@click.argument("out", metavar="DIR")
@click.option("--checkpoint-id", required=True, metavar="ID", help="Published name of the model in DIR.")
@any_dtype
@device_option
@report_files
def run_expectations(out: str, **asked: Any) -> int:
    """Run what is documented of a model: `verify DIR --level documented`."""
    from ckpt_tool import api

    files = checked_files(asked, (out,))
    report = api.verify(
        out,
        levels=("documented",),
        checkpoint_id=asked["checkpoint_id"],
        compute_dtype=asked["compute_dtype"],
        device=asked["device"],
        progress=following_at(consoles()[1]),
    )
    return write_report(report, asked, files)


@click.command()
@click.argument("out", metavar="DIR")
@click.option("--prompt", multiple=True, metavar="TEXT", help="A prompt, read with DIR's tokenizer.json.")
@click.option("--prompt-ids", multiple=True, metavar="1,15,27", help="A prompt as token ids.")
@click.option("--prompts", metavar="FILE", help="JSON: rows of ids, or input_ids and attention_mask.")
@click.option(
    "--mode",
    type=click.Choice(["greedy", "sample", "beam"]),
    help="How tokens are chosen (default: as generation_config.json says).",
)
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="Any option of generate, such as top_k=5."
)
@click.option("--options", "options_file", metavar="FILE", help="The same as a JSON object.")
@click.option(
    "--rules",
    type=click.Choice(["4.37", "5", "5.24"]),
    default="5",
    show_default=True,
    help="Release whose rules hold; 5 is 5.0 to 5.23.",
)
@click.option("--seed", type=int, help="Where the draws of sampling start.")
@click.option("--no-cache", is_flag=True, help="Compute the whole text again for every token.")
@click.option("--source", metavar="PATH", help="The original: exit code 1 if it goes on otherwise.")
@any_dtype
@device_option
@facts_option
@as_json
def generate(out: str, source: str | None, as_json: bool, **asked: Any) -> int:
    """Go on from prompts as transformers does, with scores.

    \b
    ckpt-tool generate DIR --prompt "Today is" --option max_new_tokens=5
    ckpt-tool generate DIR --prompt-ids 1,15,27 --mode beam --rules 4.37 --json
    """
    from ckpt_tool.generate_command import run

    screen, log = consoles()
    return run(out, source, asked, as_json, screen, following_at(log))


COMMANDS = (certificate, check_certificate, compare, expectations, generate)
