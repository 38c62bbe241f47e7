"""Megatron's arguments are used, harmless, or refused by name; stages of any length are read; a conversion is
not judged by the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.cli import cli
from ckpt_tool.convert.families import Family, family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.fixtures.families.qwen2 import qwen2
from ckpt_tool.fixtures.megatron_core import Core
from ckpt_tool.fixtures.numbers import drawn
from ckpt_tool.fixtures.pickles import StateDict, Tensor, write_torch_zip
from ckpt_tool.fixtures.variants import VARIANTS
from tests.megatron_models import FAMILIES as MEGATRON
from tests.test_megatron_families import WITH_WORDS, again, carried_out, check, converted, original, truth

Written = Callable[[str], Path]
CASES = Path(__file__).parents[2] / "shared" / "cases"
QWEN = qwen2(4, 48, 6, 2, 72, 320, 5)
LINEAR = 'rope_scaling={"rope_type":"linear","factor":4.0}'


def case(*names: str) -> Path:
    folder = CASES.joinpath(*names)
    if not folder.exists():
        pytest.skip("the cases are not beside this checkout")
    return folder


def said(*arguments: object) -> tuple[int, str]:
    """Exit code, and the screen or the problems with their hints as one line."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if isinstance(done.exception, CkptToolError):
        told = [f"{p.kind}: {p.line()} hint: {p.hint}" for p in done.exception.problems]
        return 2, " ".join(" ".join(told).split())
    if done.exception is not None:
        raise done.exception
    return done.return_value or 0, " ".join(done.output.split())


# --- a conversion is not judged by the way back ---------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-2-7b", "llama-3.1-8b"])
def test_what_the_original_cannot_say_is_a_note(variant: str, originals: Written, tmp_path: Path) -> None:
    source, out = originals(variant), tmp_path / "out"
    code, text = said("convert", "llama", "--in", source, "--out", out, "--set", LINEAR)
    assert code == 0, text
    assert "note `--to original` is not possible: expected rope_type llama3" in text
    assert "coverage every source and target tensor accounted for" in text
    for how in (("--source", source), ("--no-source",)):
        code, text = said("verify", out, *how, "--level", "coverage", "--level", "bits")
        assert code == 0 if "--source" in how else 2, text
        assert "`--to original` is not possible" in text
    code, text = said("convert", "llama", "--to", "original", "--in", out, "--out", tmp_path / "back")
    assert code == 2 and "unsupported" in text and "rope_scaling" in text
    assert not (tmp_path / "back").exists()


FIRST = {v.family: id for id, v in reversed(VARIANTS.items())}


@pytest.mark.parametrize("variant", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize(
    "problem",
    [
        Problem("unsupported", "expected a value that the original has a word for, found another"),
        Problem("config-mismatch", "expected 3 to divide by 2, found a rest", where="--pipeline-parallel"),
    ],
    ids=["no word", "no share"],
)
def test_no_family_is_judged_by_the_way_back(
    variant: str, problem: Problem, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Checkpoint, options: Options) -> Plan:
        raise CkptToolError(problem)

    def no_way_back(name: str) -> Family:
        return replace(family(name), plan_original=refuse)

    monkeypatch.setattr("ckpt_tool.verify.subject.family", no_way_back)
    report = api.verify(conversions(variant), levels=("coverage",), no_source=True)
    assert report.status == "pass", report.to_json()
    (note,) = (f for f in report.findings if f.check == "way back")
    assert note.status == "note" and problem.message in note.message
    (tensors,) = (f for f in report.findings if f.check == "target tensors")
    assert tensors.status == "pass" and tensors.message.endswith("are those of the manifest")


def test_tensors_are_still_accounted_for_without_a_way_back(originals: Written, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "out"
    assert not said("convert", "llama", "--in", originals("llama-1-7b"), "--out", out, "--set", LINEAR)[0]
    weights: dict[str, Any] = load_file(out / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    code, text = said("verify", out, "--no-source", "--level", "coverage")
    assert code == 1 and "model.norm.weight: expected this tensor of the manifest, found none" in text
    (out / "ckpt-tool.json").unlink()
    code, text = said("verify", out, "--no-source", "--level", "coverage")
    assert code == 2 and "neither a plan of the way back nor a manifest" in text


def test_published_ids_that_are_no_words_are_not_written(tmp_path: Path) -> None:
    folder = case("checklist_says_otherwise", "intact")
    code, text = said("convert", "llama", "--in", folder, "--out", tmp_path / "out")
    assert code == 0 and "coverage every source and target tensor accounted for" in text, text
    assert '"eos_token_id": null' in (tmp_path / "out" / "config.json").read_text()


# --- stages of any length -------------------------------------------------------------------------------

# Layers of each part: the first chunk of each stage, then the second of each.
SPLITS = {
    "longer first": ((3, 1), 1),
    "longer last": ((1, 3), 1),
    "embedding alone": ((0, 4), 1),
    "head alone": ((2, 2, 0), 1),
    "virtual": ((0, 1, 2, 1), 2),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("age", ["encoder", "core-fused"])
@pytest.mark.parametrize("name", MEGATRON)
def test_stages_of_any_length_are_read_and_written_again(
    name: str, age: str, split: str, tmp_path: Path
) -> None:
    counts, chunks = SPLITS[split]
    depth = len(counts) // chunks
    checkpoint, bits = original(name, 3.0, age, 2, counts, chunks)
    plan = family(name).plan(checkpoint, WITH_WORDS)
    made = carried_out(plan, bits)
    check(made, truth(name))
    folder = converted(plan, made, tmp_path)
    for asked in ({}, {"pipeline_parallel": depth}):
        back = family(name).plan_original(folder, Options(family_options=asked))
        returned = carried_out(back, made)
        assert returned.keys() == bits.keys()
        assert any(", ".join(map(str, counts)) in note for note in back.notes)
        check(carried_out(family(name).plan(again(back, returned), Options()), returned), truth(name))
    one = family(name).plan_original(folder, Options(family_options={"pipeline_parallel": 1}))
    assert len(one.outputs) == 2 and one.config["pipeline_model_parallel_size"].value == 1
    check(
        carried_out(family(name).plan(again(one, carried_out(one, made)), Options()), carried_out(one, made)),
        truth(name),
    )


@pytest.mark.parametrize("name", MEGATRON)
def test_a_split_that_nothing_records_becomes_one_stage_unless_asked_for(name: str, tmp_path: Path) -> None:
    checkpoint, bits = original(name, stages=(1, 2, 1))
    plan = family(name).plan(checkpoint, WITH_WORDS)
    forgotten = {k: v for k, v in plan.original.items() if k != "layers_of_parts"}
    folder = converted(replace(plan, original=forgotten), carried_out(plan, bits), tmp_path)
    back = family(name).plan_original(folder, Options())
    assert len(back.outputs) == 1
    assert "the original had 3 pipeline stages; one is written" in back.notes
    with pytest.raises(CkptToolError) as caught:
        family(name).plan_original(folder, Options(family_options={"pipeline_parallel": 3}))
    assert caught.value.problems[0].where == "--pipeline-parallel"


@pytest.mark.parametrize("split", [*SPLITS, "even"])
def test_stages_of_core_of_any_length_are_read(split: str, tmp_path: Path) -> None:
    counts, chunks = SPLITS.get(split, ((2, 2), 1))
    core = Core(QWEN, ranks=2)
    write_stages(tmp_path / "in", core, counts, chunks)
    whole = core.write(tmp_path / "whole", "qwen", 0)
    for source in ("in", "whole"):
        folder = tmp_path / source
        assert said("convert", "qwen2", "--in", folder, "--out", tmp_path / f"{source}-hf")[0] == 0
    one, other = ((tmp_path / f"{s}-hf" / "model.safetensors").read_bytes() for s in ("in", "whole"))
    assert one == other
    code, text = said("verify", tmp_path / "in-hf", "--source", tmp_path / "in", "--level", "parity")
    assert code == 0, text
    out = tmp_path / "back"
    code, text = said("convert", "qwen2", "--to", "original", "--in", tmp_path / "in-hf", "--out", out)
    assert code == 0 and f"the original had {len(counts) // chunks} pipeline stages; one is written" in text
    assert whole != out and said("convert", "qwen2", "--in", out, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == one


def write_stages(folder: Path, core: Core, counts: tuple[int, ...], chunks: int) -> None:
    """The model of `core` with these layers in each part."""
    numbers, depth = drawn("qwen", 0), len(counts) // chunks
    places = [(part, local) for part, count in enumerate(counts) for local in range(count)]
    args = {**core.args(), "pipeline_model_parallel_size": depth}
    for rank in range(core.ranks):
        parts: list[dict[str, Tensor]] = [{} for _ in counts]
        for name, tensor in core.rank(rank, numbers).items():
            part, own = 0 if name.startswith("embedding.") else -1, name
            if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                part, local = places[int(found[1])]
                own = f"decoder.layers.{local}.{found[2]}"
            parts[part][own] = tensor
        for stage in range(depth):
            models = [StateDict(parts[chunk * depth + stage]) for chunk in range(chunks)]
            named = {"model": models[0]} if chunks == 1 else {f"model{k}": m for k, m in enumerate(models)}
            at = folder / "iter_0000100" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            at.parent.mkdir(parents=True)
            with open(at, "wb") as f:
                write_torch_zip({"args": args, "iteration": 100, **named}, f)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def test_two_stages_of_two_layers_and_one(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source, out = case("uneven_pipeline_stages", "two_and_one"), tmp_path / "out"
    code, text = said("convert", "megatron-gpt2", "--in", source, "--out", out)
    assert code == 0 and "coverage every source and target tensor accounted for" in text, text
    wanted, found = load_file(source.parent / "expected.safetensors"), load_file(out / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[n].view("u2"), found[n].view("u2")) for n in wanted)
    code, text = said("verify", out, "--source", source)
    assert code == 0, text
    code, text = said("convert", "megatron-gpt2", "--to", "original", "--in", out, "--out", tmp_path / "back")
    assert code == 0 and "as the original's were: 2, 1" in text
    both = [
        (f.name, sorted(f.tensors))
        for p in (source, tmp_path / "back")
        for f in open_checkpoint(p).files.values()
    ]
    assert sorted(both[:2]) == sorted(both[2:])
