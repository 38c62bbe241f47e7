"""Small files of users, rebuilt from public reports, which lie beside this checkout: each comes out as its
README says. Skipped where the folder is not there; the same kinds on files of our own are in test_world_*."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from tests import world

CASES = Path(__file__).parents[2] / "shared" / "cases"
OPT = {"num_attention_heads": 2, "activation_function": "relu"}
ADVICE = ("--set tie_word_embeddings=false", "--drop lm_head.weight")


@dataclass(frozen=True)
class Case:
    """A folder below the cases, and what comes out: a refusal of a kind, or a model. `says` are words of the
    refusal with its hint, or of the notes; `unsaid` words that stand in no note. `expected` is a file of the
    tensors that come out, `config` values of config.json (or params.json) of the output."""

    place: str
    family: str
    refused: str | None = None
    says: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    to: str = "hf"
    options: Mapping[str, Any] = field(default_factory=dict)
    expected: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def wrapped(name: str, family: str) -> Case:
    folder = "state_dict_wrapped_or_prefixed"
    return Case(f"{folder}/{name}", family, says=("names were read without",), expected=f"{folder}/expected")


def trainer(name: str, family: str, *says: str, kind: str = "wrong-format") -> Case:
    return Case(f"files_of_other_trainers/{name}", family, kind, says)


def args(name: str, *says: str) -> Case:
    return Case(f"qwen2_core_rope_scaling_args/{name}", "qwen2", "unsupported", says)


NORMS, TIED, ROWS = "norms_in_float32/", "tied_config_with_own_head/", "more_rows_than_tokens/"
FIELDS, CHECKLIST = "params_fields_that_change_numbers/", "checklist_says_otherwise/"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
LIST = [
    Case(CHECKLIST + "intact", "llama", says=("checklist.chk: 2 of 2 sums agree",)),
    Case(CHECKLIST + "edited", "llama", says=("params.json has md5", "checklist.chk: 1 of 2 sums agree")),
    Case(CHECKLIST + "other_weights", "llama", says=("consolidated.00.pth has md5",)),
    Case("codegen2_eight_blocks/original", "codegen", "missing-fact", ("auto_map", "--set mp_num=8")),
    Case("codegen2_eight_blocks/original", "auto", "missing-fact", ("auto_map", "--set mp_num=8")),
    Case(
        "codegen2_eight_blocks/original",
        "codegen",
        options={"settings": {"mp_num": 8}},
        expected="codegen2_eight_blocks/expected",
    ),
    Case("config_two_rope_thetas/llama", "llama", "bad-config", ("10000", "250000"), to="original"),
    Case("config_two_rope_thetas/qwen2", "qwen2", "bad-config", ("10000", "1000000", "--set rope_theta")),
    Case(
        "config_two_rope_thetas/llama",
        "llama",
        to="original",
        options={"settings": {"rope_theta": 250000}},
        config={"rope_theta": 250000.0},
    ),
    trainer("megatron_dist/iter_0000100", "qwen2", ".distcp", "--ckpt-convert-format torch"),
    trainer("megatron_dist", "qwen2", ".distcp", "--ckpt-convert-format torch"),
    trainer("fsdp", "llama", ".distcp", "accelerate merge-weights"),
    trainer("deepspeed", "llama", "DeepSpeed", "zero_to_fp32.py", kind="missing-file"),
    trainer("nemo", "llama", "a NeMo archive"),
    trainer("nemo/model.nemo", "llama", "a NeMo archive", kind="missing-file"),
    trainer("torchtune", "llama", "meta_model_0.pt"),
    Case("files_of_other_trainers/torchtune/meta_model_0.pt", "llama"),
    Case("folder_one_level_too_high/models--org--name", "mistral"),
    Case("folder_one_level_too_high/hub_repo", "llama", "ambiguous-input", ("original/mp8", "original/mp16")),
    Case("index_total_size_wrong/count", "llama", to="original", says=("total_size",)),
    Case("index_total_size_wrong/twice", "qwen2", says=("total_size",)),
    Case("mixtral-fused-experts-transformers5/fused", "mixtral", to="original", says=("stacked",)),
    Case(ROWS + "rows_328", "llama", says=("6 of 328 embedding rows",), config={"vocab_size": 328}),
    Case(ROWS + "rows_323", "llama", unsaid=("embedding rows have no id",), config={"vocab_size": 323}),
    Case(ROWS + "rows_320", "llama", "bad-tokenizer", ("found 322",)),
    Case(NORMS + "llama", "llama", says=("keeps its dtype",), config={"torch_dtype": "bfloat16"}),
    Case(
        NORMS + "llama",
        "llama",
        options={"dtype": "F32"},
        expected=NORMS + "expected_llama_float32",
        config={"torch_dtype": "float32"},
    ),
    Case(NORMS + "llama", "llama", options={"dtype": "BF16"}),
    Case(NORMS + "qwen2", "qwen2", says=("keeps its dtype",)),
    Case(NORMS + "qwen2", "qwen2", options={"dtype": "F32"}),
    Case(NORMS + "qwen2", "qwen2", options={"dtype": "BF16"}),
    Case("opt_parts_named_shard0/regular", "opt", options={"settings": OPT}),
    Case("opt_parts_named_shard0/shard0", "opt", options={"settings": OPT}),
    Case("opt_parts_named_shard0/last", "opt", options={"settings": OPT}),
    Case(FIELDS + "attention_chunk_size", "llama", "unsupported", ("attention_chunk_size", "8")),
    Case(FIELDS + "use_qk_norm", "llama", "unsupported", ("use_qk_norm", "true")),
    Case(FIELDS + "rope_scale_factor", "llama", config={"rope_scaling": {**LLAMA3, "factor": 32.0}}),
    Case(FIELDS + "rope_scaling_factor", "llama", config={"rope_scaling": {**LLAMA3, "factor": 32.0}}),
    Case(FIELDS + "harmless", "llama"),
    Case("qwen2_core_rope_scaling_args/plain", "qwen2"),
    Case("qwen2_core_rope_scaling_args/scaled", "qwen2", config={"rope_scaling": LLAMA3}),
    args("scaled_32", "rope_scaling_factor", "32"),
    args("no_rope_freq", "no_rope_freq", "[0, 1]"),
    args("softmax_off_by_one", "softmax_type", "off-by-one"),
    Case("safetensors_null_metadata/qwen2", "qwen2", expected="safetensors_null_metadata/qwen2/model"),
    *(
        wrapped(name, family)
        for name in ("orig_mod", "module", "model", "wrapped_model", "wrapped_state_dict", "fsdp_inside")
        for family in ("llama", "auto")
    ),
    Case(TIED + "llama", "llama", "tied-mismatch", ("lm_head.weight", *ADVICE), to="original"),
    Case(TIED + "mistral", "mistral", "tied-mismatch", ("lm_head.weight", *ADVICE), to="original"),
    Case(
        TIED + "llama", "llama", to="original", options={"settings": {"tie_word_embeddings": False}}
    ),
    Case(TIED + "llama", "llama", to="original", options={"drop": frozenset({"lm_head.weight"})}),
    Case(TIED + "llama_equal", "llama", to="original"),
    Case("tokenizer-config-model-max-length-1e30", "qwen2"),
    Case("tokenizer-config-model-max-length-1e30", "qwen2", to="original"),
    Case("training-state-beside-weights/plain", "megatron-gpt2"),
    Case("training-state-beside-weights/pcg64-state", "megatron-gpt2"),
    Case("training-state-beside-weights/uuid-and-range", "megatron-gpt2"),
    Case(
        "uneven_pipeline_stages/two_and_one", "megatron-gpt2", expected="uneven_pipeline_stages/expected"
    ),
    Case("mistral-2025-tiny", "auto", config={"model_type": "ministral3", "tie_word_embeddings": True}),
    Case("mistral-2025-tiny", "mistral", "unknown-family", ("what looks like ministral3",)),
]  # fmt: skip


def name_of(case: Case) -> str:
    asked = " ".join(f"{k}={v}" for k, v in case.options.items())
    return f"{case.place} {case.family} {case.to} {asked}".strip()


@pytest.mark.parametrize("case", LIST, ids=name_of)
def test_a_case_comes_out_as_its_readme_says(case: Case, tmp_path: Path) -> None:
    if not CASES.is_dir():
        pytest.skip("the cases are not beside this checkout")
    out = tmp_path / "out"
    options = api.Options(**case.options)
    asked: dict[str, Any] = {"family": case.family, "to": case.to, "options": options}
    if case.refused is not None:
        with pytest.raises(CkptToolError) as caught:
            api.convert(CASES / case.place, out, **asked)
        assert caught.value.problems[0].kind == case.refused
        assert [w for w in case.says if w not in caught.value.text()] == []
        assert not out.exists()
        return
    made = api.convert(CASES / case.place, out, **asked)
    said = "\n".join([*made.opened, *made.plan.notes])
    assert [w for w in case.says if w not in said] == []
    assert [w for w in case.unsaid if w in said] == []
    assert made.report is None or made.report.exit_code == 0
    if case.expected is not None:
        assert world.equal(world.tensors_of(out), world.load(CASES / f"{case.expected}.safetensors"))
    written = (
        json.loads((out / ("config.json" if case.to == "hf" else "params.json")).read_text())
        if case.config
        else {}
    )
    assert {k: written[k] for k in case.config} == dict(case.config)


SAME = {
    "opt_parts_named_shard0": (("regular", "shard0", "last"), "opt", "hf", OPT),
    "training-state-beside-weights": (("plain", "pcg64-state", "uuid-and-range"), "megatron-gpt2", "hf", {}),
    "mixtral-fused-experts-transformers5": (("per-expert", "fused"), "mixtral", "original", {}),
}


@pytest.mark.parametrize("place", SAME)
def test_cases_that_are_one_model_give_the_same_bytes(place: str, tmp_path: Path) -> None:
    if not CASES.is_dir():
        pytest.skip("the cases are not beside this checkout")
    names, family, to, settings = SAME[place]
    digests = []
    for name in names:
        api.convert(
            CASES / place / name,
            tmp_path / name,
            family=family,
            to=to,
            options=api.Options(settings=settings),
        )
        files = world.weight_files(tmp_path / name)
        digests.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert digests[0] and all(d == digests[0] for d in digests)


def test_a_llama_3_with_added_tokens(tmp_path: Path) -> None:
    script = CASES / "llama3_added_tokens" / "make.py"
    if not script.is_file():
        pytest.skip("the cases are not beside this checkout")
    subprocess.run([sys.executable, script, tmp_path], check=True)
    for name in ("with_theta", "without_theta"):
        api.convert(tmp_path / name, tmp_path / f"{name}_out", family="llama")
        config = json.loads((tmp_path / f"{name}_out" / "config.json").read_text())
        found = {
            k: config[k] for k in ("bos_token_id", "eos_token_id", "max_position_embeddings", "rope_theta")
        }
        assert found == {
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        }
