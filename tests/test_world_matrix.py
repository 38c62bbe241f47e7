"""Kinds of files that people have, tried on every family to which the kind can happen: a row each, a cell for
each family, and no cell left out. A cell is tried here, or names the test that tries it, or says why the kind
cannot happen there."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests import world

Written = Callable[[str], Path]
PUBLISHED = ("codegen", "qwen2", "qwen3", "gemma2", "gpt-neox")
CONSOLIDATED = ("mistral", "mixtral", "llama")
MEGATRON = ("megatron-bert", "megatron-gpt2")
# One file of 16-bit weights each, without a set of ranks around it.
BASE = {
    "mistral": "mistral-7b-v0.1",
    "mixtral": "mixtral-a",
    "llama": "llama-3-8b",
    "megatron-bert": "bert-v1-bare",
    "megatron-gpt2": "gpt2-v1-bare",
    "opt": "opt-bare",
    "codegen": "codegen-16b-nl",
    "qwen2": "qwen2-0.5b",
    "qwen3": "qwen3-0.6b",
    "gemma2": "gemma-2-2b",
    "gpt-neox": "pythia-410m",
}


@dataclass(frozen=True)
class Kind:
    """`change` is made to the family's original, or to its conversion where `back`; what then comes out is
    the model that comes out without it, with a note that holds `note`, or a refusal of kind `refused` that
    holds `says`. `elsewhere` are cells that another test tries, `never` those that cannot be, with the
    reason; keys are families or "" for all others."""

    change: world.Change
    note: str | None = None
    refused: str | None = None
    says: str = ""
    back: bool = False
    shards: bool = False  # the conversion lies in several files
    same: bool = True  # the tensors that come out are those that come out without the change
    family: str = ""  # asked for: the cell's own where empty
    elsewhere: dict[str, str] = field(default_factory=dict)
    never: dict[str, str] = field(default_factory=dict)

    def cell(self, family: str) -> str:
        if family in self.never:
            return "never"
        return "elsewhere" if family in self.elsewhere else "tried"


def each(families: tuple[str, ...], what: str) -> dict[str, str]:
    return {f: what for f in families}


KINDS: dict[str, Kind] = {
    "state_dict around the weights": Kind(world.wrapped, note="state_dict"),
    "_orig_mod. before every name": Kind(world.prefixed("_orig_mod."), note="_orig_mod."),
    "module. before every name": Kind(world.prefixed("module."), note="module."),
    "training state beside the weights": Kind(world.with_training_state),
    "norms in float32": Kind(world.float32_norms, note="keeps its dtype", same=False),
    "backslashes in the zip": Kind(world.backslashes),
    "a header whose __metadata__ is null": Kind(world.null_metadata, back=True),
    "an index with another total_size": Kind(
        world.wrong_total_size, back=True, shards=True, note="total_size"
    ),
    "an integer of 10^30 in tokenizer_config.json": Kind(
        world.document("tokenizer_config.json", lambda c: c.update(model_max_length=int(1e30))), back=True
    ),
    "a folder one level too high": Kind(world.nested, refused="wrong-format", says="download"),
    "the folder of the hub's cache": Kind(world.in_the_hubs_cache, note="snapshots"),
    "an adapter": Kind(world.adapter, refused="wrong-format", says="adapter"),
    "a folder of GGUF": Kind(world.gguf, refused="wrong-format", says="GGUF"),
    "quantised weights": Kind(
        world.document("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        back=True,
        refused="unsupported",
        says="quantization_config",
    ),
    "a checklist with another sum": Kind(world.wrong_checklist, note="checklist.chk"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_a_cell(kind: str) -> None:
    row = KINDS[kind]
    assert set(row.elsewhere) | set(row.never) <= set(FAMILIES)
    assert not set(row.elsewhere) & set(row.never)
    assert set(FAMILIES) == set(BASE)
    for place in set(row.elsewhere.values()):
        file, _, name = place.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}, place


CELLS = [(k, f) for k, row in KINDS.items() for f in FAMILIES if row.cell(f) == "tried"]


@pytest.mark.parametrize(("kind", "family"), CELLS, ids=[f"{k}-{f}" for k, f in CELLS])
def test_the_kind_on_the_family(
    kind: str, family: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    row, variant = KINDS[kind], VARIANTS[BASE[family]]
    given, out = tmp_path / "in", tmp_path / "out"
    original = originals(variant.id)
    if row.shards:
        small = api.Options(settings=variant.settings, max_shard_bytes=1 << 14)
        api.convert(original, given, family=family, options=small)
    else:
        folder = conversions(variant.id) if row.back else original
        shutil.copytree(folder if folder.is_dir() else folder.parent, given)
    row.change(given)
    options = api.Options(settings=variant.settings)
    to = "original" if row.back else "hf"
    asked = {"family": family, "to": to, "options": options}
    if row.refused is not None:
        with pytest.raises(CkptToolError) as caught:
            api.convert(given, out, **asked)
        assert caught.value.problems[0].kind == row.refused
        assert row.says in str(caught.value.problems[0])
        assert not out.exists()
        return
    made = api.convert(given, out, **asked)
    if row.note is not None:
        said = (*made.opened, *made.plan.notes)
        assert any(row.note in note for note in said), said
    if not row.back and row.same:
        assert world.equal(world.tensors_of(out), world.tensors_of(conversions(variant.id)))
