"""Kinds of files that people have, tried on every family to which the kind can happen: a row each, a cell for
each family, and no cell left out. A cell is tried here, or names the test that tries it, or says why the kind
cannot happen there."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from ckpt_tool import api
from ckpt_tool.convert.families import FAMILIES
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests import world

Written = Callable[[str], Path]
PUBLISHED = ("codegen", "qwen2", "qwen3", "gemma2", "gpt-neox")
CONSOLIDATED = ("mistral", "mixtral", "llama", "ministral3")
MEGATRON = ("megatron-bert", "megatron-gpt2")
TENSORFLOW = ("mobilebert", "canine")
NO_PICKLE = "Mistral AI writes these in safetensors alone, which has no dicts and no zip"
BY_CONFIG = ("gpt-oss",)  # whose config.json is the original's own
NO_TORCH = "a TensorFlow bundle has no dicts, and no program of torch writes it"
# One file of 16-bit weights each, without a set of ranks around it; of TensorFlow a bundle in float32.
BASE = {
    "mistral": "mistral-7b-v0.1",
    "mixtral": "mixtral-a",
    "ministral3": "ministral3-3b",
    "llama": "llama-3-8b",
    "megatron-bert": "bert-v1-bare",
    "megatron-gpt2": "gpt2-v1-bare",
    "mluke": "mluke-aware",
    "opt": "opt-bare",
    "codegen": "codegen-16b-nl",
    "qwen2": "qwen2-0.5b",
    "qwen3": "qwen3-0.6b",
    "gemma2": "gemma-2-27b",
    "gpt-neox": "pythia-410m",
    "mobilebert": "mobilebert-squad",
    "canine": "canine-tydi",
    "mega": "mega-laplace",
    "gpt-oss": "gpt-oss-20b",
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
    kept: str = ""  # a file that is carried over
    same: bool = True  # the tensors that come out are those that come out without the change
    elsewhere: dict[str, str] = field(default_factory=dict)
    never: dict[str, str] = field(default_factory=dict)

    def cell(self, family: str) -> str:
        if family in self.never:
            return "never"
        return "elsewhere" if family in self.elsewhere else "tried"


def each(families: tuple[str, ...], what: str) -> dict[str, str]:
    return dict.fromkeys(families, what)


def others(*families: str) -> tuple[str, ...]:
    return tuple(f for f in FAMILIES if f not in families)


OWN_LAYOUT = "the original is a Hugging Face folder itself, and is read as one"
LEARNED = "positions are learned: config.json has no rotary base"
KINDS: dict[str, Kind] = {
    # two spellings of one value
    "two rotary bases in config.json": Kind(
        world.document("config.json", world.second_base),
        back=True,
        refused="bad-config",
        says="rope_parameters.rope_theta",
        never={
            **each((*MEGATRON, *TENSORFLOW, "opt", "mluke"), LEARNED),
            **each(("codegen", "mega"), "the base is in the code: no key says it"),
        },
    ),
    "a tied head with values of its own": Kind(
        world.nothing,
        elsewhere={
            **each(
                others("mixtral", "codegen", *TENSORFLOW, "mega", "mluke"),
                "test_world_spell.py::test_a_tied_head_of_other_values_is_refused_and_each_hint_leads_out",
            ),
            "mega": "test_mega.py::test_a_head_of_other_values_is_not_tied_and_the_hint_leads_out",
            "gpt-oss": "test_gpt_oss.py::test_what_no_original_can_say_is_refused_on_the_way_back",
            "mixtral": "test_world_spell.py::test_a_mixtral_that_says_it_is_tied_can_be_told_otherwise",
            "mluke": "test_families_mluke.py::test_a_tied_head_of_other_values_is_refused",
            "mobilebert": "test_mobilebert.py::test_a_decoder_with_values_of_its_own_is_refused",
        },
        never={"codegen": "its head has a bias, and no class ties it", "canine": "it has no output layer"},
    ),
    # unknown is not harmless
    "a key of config.json that no list has": Kind(
        world.document("config.json", lambda c: c.update(logit_scale=0.5)),
        back=True,
        refused="unsupported",
        says="logit_scale",
    ),
    "a field of the original that no list has": Kind(
        world.document("params.json", lambda c: c.update(logit_scale=0.5)),
        refused="unsupported",
        says="logit_scale",
        elsewhere={
            **each(
                MEGATRON, "test_world_meg.py::test_an_argument_that_nothing_knows_is_refused_with_a_way_out"
            ),
            **each(
                PUBLISHED,
                "test_world_pub.py::test_a_key_that_nobody_reads_is_refused_by_name_and_the_hint_leads_out",
            ),
            "opt": "test_world_pub.py::test_a_setting_of_another_model_is_refused_by_name",
            "mluke": "test_families_mluke.py::test_what_metadata_says_is_used_or_refused_by_name",
            "mobilebert": "test_mobilebert.py::test_a_config_that_says_otherwise_is_refused",
            "canine": "test_canine.py::test_what_the_model_is_not_is_refused_by_name",
            "mega": "test_mega.py::test_an_argument_that_nobody_reads_is_refused_and_the_hint_leads_out",
            "gpt-oss": "test_gpt_oss.py::test_what_an_original_says_wrongly_is_refused_by_name",
        },
    ),
    "quantised weights": Kind(
        world.document("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        back=True,
        refused="unsupported",
        says="quantization_config",
    ),
    # generations and defaults
    "an enlarged vocabulary": Kind(
        world.nothing,
        elsewhere={
            "llama": "test_world_params.py::test_an_enlarged_vocabulary_is_of_the_same_generation",
            "qwen2": "test_world_pub.py::test_a_vocabulary_of_qwen2_is_told_whatever_it_is_padded_to",
            "opt": "test_world_pub.py::test_a_published_opt_asks_nothing",
        },
        never={
            **each(others("llama", "qwen2", "opt", "mistral", "mixtral"), "no value hangs on the vocabulary"),
            **each(("mistral", "mixtral"), "generations are told by window, base and tokenizer"),
        },
    ),
    "a published model asks nothing": Kind(
        world.nothing,
        elsewhere={
            **each(CONSOLIDATED, "test_world_params.py::test_no_published_model_needs_an_answer"),
            **each(PUBLISHED, "test_world_pub.py::test_what_published_models_have_besides_converts"),
            **each(MEGATRON, "test_world_meg.py::test_harmless_arguments_change_nothing"),
            "mluke": "test_families_mluke.py::test_a_published_model_asks_nothing",
            "opt": "test_world_pub.py::test_a_published_opt_asks_nothing",
            "mobilebert": "test_mobilebert.py::test_the_published_model_without_its_config",
            "canine": "test_canine.py::test_the_published_sizes_need_no_config",
            "gpt-oss": "test_gpt_oss.py::test_published_sizes_ask_nothing",
        },
    ),
    # what files have besides
    "more embedding rows than ids": Kind(
        world.nothing,
        elsewhere={
            **each(
                others(*MEGATRON, *PUBLISHED, *TENSORFLOW, *BY_CONFIG, "mega", "mluke"),
                "test_world_pub.py::test_a_download_with_more_rows_than_ids_converts",
            ),
            "mobilebert": "test_mobilebert.py::test_rows_without_an_id_are_told",
            "mega": "test_mega.py::test_the_vocabulary_is_roberta_s_in_both_releases",
            **each(PUBLISHED, "test_world_pub.py::test_ids_of_a_published_tokenizer_are_counted"),
            **each(BY_CONFIG, "test_gpt_oss.py::test_a_tokenizer_around_the_folder_is_carried"),
        },
        never={
            **each(MEGATRON, "ranks pad the vocabulary themselves: rows after the words are padding"),
            "canine": "ids are code points, which are hashed to rows",
            "mluke": "the rows after the tokenizer's ids are those that are added",
        },
    ),
    "norms in float32": Kind(
        world.float32_norms,
        note="keeps its dtype",
        same=False,
        elsewhere=each(TENSORFLOW, "test_mobilebert.py::test_every_variable_keeps_its_dtype"),
    ),
    "an index with another total_size": Kind(
        world.wrong_total_size, back=True, shards=True, note="total_size"
    ),
    "backslashes in the zip": Kind(
        world.backslashes, never={**each(TENSORFLOW, NO_TORCH), "ministral3": NO_PICKLE}
    ),
    "state_dict around the weights": Kind(
        world.wrapped, note="state_dict", never={**each(TENSORFLOW, NO_TORCH), "ministral3": NO_PICKLE}
    ),
    "_orig_mod. before every name": Kind(
        world.prefixed("_orig_mod."), note="_orig_mod.", never=each(TENSORFLOW, NO_TORCH)
    ),
    "module. before every name": Kind(
        world.prefixed("module."), note="module.", never=each(TENSORFLOW, NO_TORCH)
    ),
    "training state beside the weights": Kind(
        world.with_training_state,
        elsewhere={
            "mobilebert": "test_mobilebert.py::test_state_of_the_training_is_left_out_and_counted",
            "canine": "test_canine.py::test_heads_without_a_class_are_left_out_with_the_reason",
        },
        never={"ministral3": NO_PICKLE},
    ),
    "an integer of 10^30 in tokenizer_config.json": Kind(
        world.document("tokenizer_config.json", lambda c: c.update(model_max_length=int(1e30))), back=True
    ),
    "a header whose __metadata__ is null": Kind(world.null_metadata, back=True),
    "parts under other names": Kind(
        world.nothing,
        elsewhere={"opt": "test_world_signs.py::test_parts_by_every_name_of_metaseq_are_the_same_model"},
        never=each(others("opt"), "only metaseq's programs name parts in several ways"),
    ),
    "pipeline stages of unequal length": Kind(
        world.nothing,
        elsewhere={
            **each(MEGATRON, "test_world_meg.py::test_stages_of_any_length_are_read_and_written_again"),
            "qwen2": "test_world_meg.py::test_stages_of_core_of_any_length_are_read",
        },
        never=each(others(*MEGATRON, "qwen2"), "no layout in pipeline stages"),
    ),
    "experts stacked as transformers 5 has them": Kind(
        world.nothing,
        elsewhere={
            "mixtral": "test_world_dtypes.py::test_stacked_experts_go_back_to_the_same_files",
            "gpt-oss": "test_gpt_oss.py::test_the_folder_that_transformers_saves_is_read",
        },
        never=each(others("mixtral", "gpt-oss"), "no experts"),
    ),
    "a chat template beside the tokenizer": Kind(
        world.chat_template,
        kept="chat_template.jinja",
        elsewhere=each(BY_CONFIG, "test_gpt_oss.py::test_a_tokenizer_around_the_folder_is_carried"),
        never=each(others(*PUBLISHED, *BY_CONFIG), "no original has one, and its tokenizer is written anew"),
    ),
    # signs at the door
    "an adapter": Kind(world.adapter, refused="wrong-format", says="adapter"),
    "a folder of GGUF": Kind(world.gguf, refused="wrong-format", says="GGUF"),
    "a folder one level too high": Kind(world.nested, refused="wrong-format", says="download"),
    "the folder of the hub's cache": Kind(world.in_the_hubs_cache, note="snapshots"),
    "the other direction": Kind(
        world.nothing,
        elsewhere=each(
            others(*PUBLISHED), "test_world_signs.py::test_the_other_direction_is_said_in_one_line"
        ),
        never=each(PUBLISHED, OWN_LAYOUT),
    ),
    "another family's original": Kind(
        world.nothing, elsewhere=each(FAMILIES, "test_world_signs.py::test_another_family_is_named_first")
    ),
    # sums and shards
    "a checklist with another sum": Kind(world.wrong_checklist, note="checklist.chk"),
    "one shard under two numbers": Kind(
        world.nothing,
        elsewhere=each(
            ("llama", "opt", "qwen2", *MEGATRON),
            "test_world_dtypes.py::test_one_shard_under_two_numbers_is_a_conflict",
        ),
        never=each(
            others("llama", "opt", "qwen2", *MEGATRON),
            "files hold whole tensors: a name in two of them is refused",
        ),
    ),
    # the way back
    "what the way back cannot write": Kind(
        world.nothing, elsewhere=each(FAMILIES, "test_world_meg.py::test_no_family_is_judged_by_the_way_back")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_a_cell(kind: str) -> None:
    row = KINDS[kind]
    assert set(row.elsewhere) | set(row.never) <= set(FAMILIES)
    assert not set(row.elsewhere) & set(row.never)
    assert set(FAMILIES) == set(BASE)
    for place in set(row.elsewhere.values()):
        file, _, name = place.partition("::")
        assert name in written_in(file), place


@cache
def written_in(file: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / file).read_text())
    return {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}


PAGE = Path(__file__).parents[1] / "docs" / "files.md"
SIGNS = {"tried": "x", "elsewhere": "o", "never": "-"}


def table() -> str:
    lines = [f"| kind | {' | '.join(FAMILIES)} |", "| --- |" + " --- |" * len(FAMILIES)]
    lines += [f"| {k} | {' | '.join(SIGNS[row.cell(f)] for f in FAMILIES)} |" for k, row in KINDS.items()]
    return "\n".join(lines)


def test_the_page_has_this_table() -> None:
    text = PAGE.read_text()
    before, rest = text.split("<!-- table -->\n")
    found, after = rest.split("\n<!-- end -->")
    if os.environ.get("CKPT_TOOL_GOLDEN") == "write":
        PAGE.write_text(f"{before}<!-- table -->\n{table()}\n<!-- end -->{after}")
    else:
        assert found == table(), "CKPT_TOOL_GOLDEN=write writes it anew"


CELLS = [(k, f) for k, row in KINDS.items() for f in FAMILIES if row.cell(f) == "tried"]


@pytest.mark.parametrize(("kind", "family"), CELLS, ids=[f"{k}-{f}" for k, f in CELLS])
def test_the_kind_on_the_family(
    kind: str, family: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    row, variant = KINDS[kind], VARIANTS[BASE[family]]
    given, out = tmp_path / "models--org--name", tmp_path / "out"
    original = originals(variant.id)
    if row.shards:
        half = sum(f.stat().st_size for f in conversions(variant.id).glob("*.safetensors")) * 2 // 3
        small = api.Options(settings=variant.settings, max_shard_bytes=half)
        api.convert(original, given, family=family, options=small, check=False)
    else:
        folder = conversions(variant.id) if row.back else original
        shutil.copytree(folder if folder.is_dir() else folder.parent, given)
    row.change(given)
    options = api.Options(settings={} if row.back else variant.settings)
    to = "original" if row.back else "hf"
    asked = {"family": family, "to": to, "options": options}
    if row.refused is not None:
        with pytest.raises(CkptToolError) as caught:
            api.convert(given, out, **asked)
        assert caught.value.problems[0].kind == row.refused
        assert row.says in str(caught.value.problems[0])
        assert not out.exists()
        return
    made = api.convert(given, out, **asked, check=False)
    if row.note is not None:
        said = (*made.opened, *made.plan.notes)
        assert any(row.note in note for note in said), said
    if row.kept:
        assert (out / row.kept).read_bytes() == (given / row.kept).read_bytes()
    if not row.back and row.same:
        assert world.equal(world.tensors_of(out), world.tensors_of(conversions(variant.id)))
