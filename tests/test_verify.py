"""Verification: what passes, what is caught and named, what is skipped and why, and its parts."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.convert.families import family
from ckpt_tool.convert.layout import Part, Step, parse_dims
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.flaws import Folder, plant
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import answers, documented, verify
from ckpt_tool.verify import bits as bits_module
from ckpt_tool.verify import passing as passing_module
from ckpt_tool.verify.against_transformers import _deviations
from ckpt_tool.verify.as_hf import shown_as_hf
from ckpt_tool.verify.bits import compare
from ckpt_tool.verify.coverage import scan
from ckpt_tool.verify.expectations import Expectation, parse
from ckpt_tool.verify.measure import CAPS, bar_for, distance, logit_distance
from ckpt_tool.verify.mistakes import planted, transpose, undone
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.orders import Reorder, _reorders, beliefs
from ckpt_tool.verify.passing import Passing
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.sides import converted_side, original_side, with_values
from ckpt_tool.verify.subject import opened
from ckpt_tool.verify.weights import Weights, ranks_of

Written = Callable[[str], Path]
BERT, GPT2 = "bert-v2-tp2", "gpt2-v2-tp2"
READ = "query, key and value read in the order"
DENSE, WINDOWED, EXPERTS, RANKS = "mistral-7b-v0.3", "mistral-7b-v0.1", "mixtral-c", "llama-3-70b"


def one(report: Report, check: str) -> Finding:
    (found,) = (f for f in report.findings if f.check == check)
    return found


def failed(report: Report, level: str) -> list[Finding]:
    return [f for f in report.level(level) if f.status == "fail"]


@pytest.fixture
def broken(conversions: Written, tmp_path: Path) -> Written:
    """`broken(variant)`: a copy of its conversion, to be tampered with."""

    def copy(variant: str) -> Path:
        return Path(shutil.copytree(conversions(variant), tmp_path / "broken"))

    return copy


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(GPT2, None), (RANKS, None), (EXPERTS, None), ("gpt2-ngc-stored", None), (DENSE, "F32")],
)
def test_what_passes_in_a_comparison_is_not_read_again(
    variant: str,
    dtype: str | None,
    originals: Written,
    broken: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checksums and looks of the values are those of a reading from the first byte to the last."""
    chosen, folder = VARIANTS[variant], tmp_path / "cast"
    if dtype is None:
        folder = broken(variant)
    else:
        api.convert(originals(variant), folder, family=chosen.family, options=Options(dtype=dtype))
    tampered = Folder(folder)
    odd = max(tampered.checkpoint, key=lambda t: (len(t.shape), t.name)).name
    bits = tampered.get(odd)
    bits[1, 2] = bits[-1, 0] = {2: 0x7FFF, 4: 0x7FFFFFFF}[bits.itemsize]
    tampered.set(odd, bits)
    tampered.checkpoint.close()
    with opened(folder, originals(variant), chosen.settings) as subject:
        assert subject.plan is not None
        read = list(scan(subject.output))
        passing = Passing(subject.output)
        assert compare(subject, subject.plan.steps, passing).differences
        again: list[str] = []
        one_by_one = passing_module.scan_one
        monkeypatch.setattr(passing_module, "scan_one", lambda c, t: again.append(t.name) or one_by_one(c, t))
        found = passing.scans()
    assert [(s.tensor, s.crc32) for s in found] == [(s.tensor, s.crc32) for s in read]
    for a, b in zip(found, read, strict=True):
        assert all(getattr(a.values, x) == getattr(b.values, x) for x in type(a.values).__slots__), a.tensor
    assert next(s.values.non_finite for s in found if s.tensor.name == odd) == 2
    assert again == []


def test_a_long_run_is_compared_piece_by_piece(
    originals: Written, broken: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each difference has its place, and values and checksums are those of a whole reading."""
    monkeypatch.setattr(bits_module, "PIECE", 200)  # bytes: a hundred numbers, and not all of a row
    folder, name = broken(DENSE), "model.embed_tokens.weight"
    tampered = Folder(folder)
    rows = tampered.get(name)
    places = [150, 950, rows.size - 1]
    rows.reshape(-1)[places] ^= 1
    rows.reshape(-1)[951] = 0x7FFF
    tampered.set(name, rows)
    tampered.checkpoint.close()
    with opened(folder, originals(DENSE)) as subject:
        assert subject.plan is not None
        passing = Passing(subject.output)
        (found,) = compare(subject, subject.plan.steps, passing).differences
        assert (found.count, found.first, found.against.name) == (4, 150, name)
        assert found.strip is not None and rows.size > 1000
        seen = next(s for s in passing.scans() if s.tensor.name == name)
        assert (seen.values.seen, seen.values.non_finite, seen.values.first) == (rows.size, 1, 951)
        assert seen.crc32 == zlib.crc32(rows.tobytes())


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("verdict", ["verify", "compare"])
def test_a_file_that_is_written_meanwhile_has_no_verdict(
    verdict: str, side: int, originals: Written, broken: Written, tmp_path: Path
) -> None:
    """What was read of it need not be what is there, even where every byte read was right."""
    sides = broken(DENSE), Path(shutil.copytree(originals(DENSE), tmp_path / "source"))
    (weights,) = (p for p in sides[side].iterdir() if p.suffix in (".pth", ".safetensors"))
    both = opened(*sides) if verdict == "verify" else ExitStack()
    with pytest.raises(CkptToolError, match="touched since") as caught, both as stack:
        for folder in sides if isinstance(stack, ExitStack) else ():
            stack.enter_context(shown_as_hf(folder))
        os.utime(weights)
    assert caught.value.kind == "input-changed"


# --- a good conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [WINDOWED, EXPERTS, RANKS])
def test_a_good_conversion_passes_every_level(variant: str, originals: Written, conversions: Written) -> None:
    report = verify(conversions(variant), originals(variant), settings=VARIANTS[variant].settings)
    assert [(f.check, f.message) for f in report.findings if f.status == "fail"] == []
    assert (report.status, report.exit_code, report.exactness) == ("pass", 0, "bit-identical")
    assert one(report, "lockstep").data["exactness"] == "within noise floor"
    logits = one(report, "logits")
    assert logits.data["nmse"] <= 1e-10
    assert logits.data["top1"] == 1.0
    assert one(report, "negative control").measured == 1.0
    (table,) = logits.tables
    assert max(int(row[1] or 0) for row in table.rows) >= 512


def test_float64_agrees_to_a_billionth(originals: Written, conversions: Written) -> None:
    report = verify(conversions(DENSE), originals(DENSE), levels="parity", compute_dtype="float64")
    assert report.status == "pass"
    assert one(report, "logits").data["max_delta"] <= 1e-9


def test_every_embedding_row_is_compared_even_if_no_prompt_has_it(
    originals: Written, broken: Written
) -> None:
    folder = broken(DENSE)
    tampered = Folder(folder)
    rows = tampered.get("model.embed_tokens.weight")
    from ckpt_tool.fixtures.prompts import prompts as fixed

    used = {i for row in fixed(len(rows), bos=1).values() for i in row}
    unused = next(i for i in range(len(rows)) if i not in used)
    rows[unused, 3] ^= 1 << 6
    tampered.set("model.embed_tokens.weight", rows)
    tampered.checkpoint.close()
    report = verify(folder, originals(DENSE), levels="parity")
    lockstep = one(report, "lockstep")
    assert lockstep.data["first"] == "embed"
    assert f"position {unused}" in lockstep.message


@pytest.mark.parametrize("variant", [DENSE, "llama-3-70b"])
def test_the_way_back_is_verified_too(variant: str, conversions: Written, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    api.convert(conversions(variant), tmp_path / "back", to="original", family=chosen.family)
    report = verify(tmp_path / "back", conversions(variant), settings=chosen.settings)
    assert [(f.check, f.message) for f in report.findings if f.status == "fail"] == []
    assert {f.level for f in report.findings if f.status == "pass"} == {"coverage", "bits", "parity"}


def test_the_cheap_levels_do_not_import_torch(originals: Written, conversions: Written) -> None:
    code = (
        "import sys; from ckpt_tool.verify import verify\n"
        f"r = verify({str(conversions(DENSE))!r}, {str(originals(DENSE))!r}, levels=('coverage', 'bits'))\n"
        "assert r.status == 'pass', r.to_json()\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr


# --- mistakes, and their diagnosis ----------------------------------------------------------------------


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("variant", "flaw", "cause"),
    [
        (DENSE, "q-not-permuted", "self_attn.q_proj rows not permuted for rotary"),
        (WINDOWED, "k-not-permuted", "self_attn.k_proj rows not permuted for rotary"),
        (DENSE, "k-wrong-heads", "self_attn.k_proj permuted with 1 heads where there are 3"),
        (RANKS, "k-not-permuted", "self_attn.k_proj rows not permuted for rotary"),
        (DENSE, "gate-up-swapped", "mlp.gate_proj and mlp.up_proj exchanged"),
        (
            EXPERTS,
            "gate-up-swapped",
            "block_sparse_moe.experts.0.w1 and block_sparse_moe.experts.0.w3 exchanged",
        ),
        (EXPERTS, "experts-swapped", "experts 0 and 1 exchanged"),
        (DENSE, "transposed", "self_attn.o_proj transposed"),
        (DENSE, "rope-theta", "rope_theta 10000 where it should be 1e+06"),
        (DENSE, "norm-eps", "rms_norm_eps 0.0001 where it should be 1e-05"),
        (DENSE, "embedding-rows", "model.embed_tokens tokens 5 and 6 exchanged"),
        (DENSE, "layer-duplicated", "holds the weights of the original's layer 0"),
        (BERT, "qkv-order", f"{READ} (t n h) of checkpoint_version 0 where it is (n t h), all ranks as one"),
        (BERT, "qkv-bias-order", f"attention.self.query.bias: {READ} (t n h)"),
        ("bert-v1-bare", "qkv-order", f"{READ} (n t h) of checkpoint_version 2.0 where it is (n h t)"),
        (GPT2, "qkv-order", f"{READ} (t n h) of checkpoint_version 0 where it is (n t h), all ranks as one"),
        ("gpt2-v1-bare", "qkv-order", f"{READ} (n t h) of checkpoint_version 2.0 where it is (n h t)"),
        (GPT2, "conv1d-not-transposed", "mlp.c_fc left in the original's order"),
        (GPT2, "transposed", "attn.c_proj left in the original's order"),
        (GPT2, "gelu", "activation_function gelu_new where it should be gelu"),
        (BERT, "gelu", "hidden_act gelu_new where it should be gelu"),
        (BERT, "norm-eps", "layer_norm_eps 0.003 where it should be 0.0003"),
        (GPT2, "head-count", "n_head 3 where it should be 6"),
        (GPT2, "untied", "tie_word_embeddings False where it should be True"),
        (BERT, "token-types", "token_type_embeddings rows 0 and 1 exchanged"),
        (BERT, "next-sentence-classes", "cls.seq_relationship rows 0 and 1 exchanged"),
        (BERT, "vocabulary-shifted", "vocabulary shifted by +1"),
    ],
)
def test_the_mistake_is_named(
    variant: str, flaw: str, cause: str, originals: Written, broken: Written
) -> None:
    folder = broken(variant)
    made = plant(folder, flaw)
    report = verify(folder, originals(variant), levels="parity", settings=VARIANTS[variant].settings)
    assert report.exit_code == 1
    where = made.where if isinstance(made.where, str) else f"layer {made.where}"
    found = report.level("diagnosis")[0]
    assert found.where == where
    assert cause in found.message
    if found.tables:  # the numbers: it was over the bar, and taken back it is not
        before, after = found.tables[0].rows[0][1:3]
        assert isinstance(before, float) and isinstance(after, float)
        lockstep = one(report, "lockstep")
        assert lockstep.bar is not None
        assert after <= lockstep.bar < before or not isinstance(made.where, int)


@pytest.mark.usefixtures("few_prompts")
def test_both_q_and_k_unpermuted_are_one_cause(originals: Written, broken: Written) -> None:
    folder = broken(DENSE)
    plant(folder, "q-not-permuted")
    plant(folder, "k-not-permuted")
    report = verify(folder, originals(DENSE), levels="parity")
    assert report.level("diagnosis")[0].data["cause"] == (
        "self_attn.q_proj and self_attn.k_proj rows not permuted for rotary"
    )


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("variant", "config", "cause"),
    [
        (WINDOWED, {"sliding_window": None}, "sliding_window none where it should be 32"),
        ("llama-3.1-8b", {"rope_scaling": None}, "rope_scaling none where it should be factor 8.0"),
        (DENSE, {"tie_word_embeddings": True}, "tie_word_embeddings True where it should be False"),
    ],
)
def test_wrong_config_values_are_caught(
    variant: str, config: dict[str, Any], cause: str | None, originals: Written, broken: Written
) -> None:
    folder = broken(variant)
    tampered = Folder(folder)
    tampered.write_config(**config)
    tampered.checkpoint.close()
    report = verify(
        folder, originals(variant), levels=("coverage", "parity"), settings=VARIANTS[variant].settings
    )
    (key,) = config
    assert f"config.json: {key}" in [f.where for f in failed(report, "coverage")]
    assert "lockstep" in [f.check for f in failed(report, "parity")]
    diagnosis = report.level("diagnosis")[0]
    assert diagnosis.data["cause"] == cause
    assert "hold the bits that the source gives" in diagnosis.message


@pytest.mark.parametrize(
    ("values", "name", "bound"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers", "at most 10,000"),  # a window for each, say
        ({"num_attention_heads": 0}, "num_attention_heads", "at least 1"),
        ({"intermediate_size": 1e308}, "intermediate_size", "at most 2,147,483,648"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 1e308}},
            "original_max_position_embeddings",
            "at most 2,147,483,648",
        ),
    ],
)
def test_numbers_beyond_any_model_are_told_and_not_computed_with(
    values: dict[str, Any], name: str, bound: str, originals: Written, broken: Written
) -> None:
    folder = broken(DENSE)
    tampered = Folder(folder)
    tampered.write_config(**values)
    tampered.checkpoint.close()
    report = verify(folder, originals(DENSE), levels=("coverage", "parity"))
    (key,) = values
    assert report.exit_code == 1
    assert f"config.json: {key}" in [f.where for f in failed(report, "coverage")]
    (found,) = failed(report, "parity")
    assert found.message.startswith(f"the converted model cannot be read: expected {name} of {bound}, found ")


@pytest.mark.parametrize(
    ("values", "status"),
    [({"pad_token_id": 3}, "note"), ({"pad_token_id": True}, "fail"), ({"pad_token_id": 10**6}, "fail")],
)
def test_an_id_for_padding_that_the_original_has_not_is_a_note_where_it_is_one(
    values: dict[str, Any], status: str, originals: Written, broken: Written
) -> None:
    folder = broken(DENSE)
    tampered = Folder(folder)
    tampered.write_config(**values)
    tampered.checkpoint.close()
    report = verify(folder, originals(DENSE), levels="coverage")
    (found,) = [f for f in report.findings if f.where == "config.json: pad_token_id"]
    assert found.status == status


@pytest.mark.parametrize(("length", "status"), [(2048, "note"), (1024, "fail"), (16384, "fail")])
def test_a_length_that_no_file_of_a_llama_says_may_be_that_of_its_class(
    length: int, status: str, originals: Written, broken: Written
) -> None:
    """As transformers 4.37.2's script writes it of Llama 2."""
    folder = broken("llama-2-7b")
    tampered = Folder(folder)
    tampered.write_config(max_position_embeddings=length)
    tampered.checkpoint.close()
    report = verify(folder, originals("llama-2-7b"), levels="coverage")
    (found,) = [f for f in report.findings if f.where == "config.json: max_position_embeddings"]
    assert found.status == status
    assert found.message.startswith(
        f"expected 4096 (rule: Llama 2 (one table of frequencies)), found {length}"
    )
    assert found.message.endswith("stop there") == (status == "note")


def test_a_model_saved_without_its_head_is_one_difference_and_not_one_a_tensor(
    originals: Written, broken: Written
) -> None:
    """As transformers 4.37.2's script writes it of an OPT, whose head is its embedding: every release loads
    it with the head."""
    from safetensors.numpy import load_file, save_file

    folder = broken("opt-restored")
    (folder / "ckpt-tool.json").unlink()
    file = folder / "model.safetensors"
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["OPTModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    report = verify(folder, originals("opt-restored"), levels=("coverage", "bits"))
    (found,) = failed(report, "coverage")
    assert (found.where, found.message) == (
        "config.json: architectures",
        'expected ["OPTForCausalLM"], found ["OPTModel"], the model without its head: OPTForCausalLM reads '
        "its tensors, and a program that goes by the name makes no head",
    )
    assert failed(report, "bits") == []
    assert [f.status for f in report.findings if f.check == "round trip"] == ["pass"]


def test_one_ulp_is_found_to_the_element(originals: Written, broken: Written) -> None:
    folder = broken(DENSE)
    plant(folder, "norm-one-ulp")
    report = verify(folder, originals(DENSE), levels=("coverage", "bits"))
    assert failed(report, "coverage") == []
    difference, checksum = failed(report, "bits")
    assert difference.where == "consolidated.safetensors: layers.1.ffn_norm.weight"
    assert (difference.data["count"], difference.data["first"]) == (1, [3])
    assert difference.data["counterpart"] == "model.layers.1.post_attention_layernorm.weight"
    assert difference.measured is not None and 0 < difference.measured < 0.02
    assert checksum.where == "model.layers.1.post_attention_layernorm.weight"
    assert report.exactness == "differs"


@pytest.mark.usefixtures("few_prompts")
def test_a_matrix_of_another_shape_is_told_and_not_crashed_on(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "out"
    shutil.copytree(conversions("mistral-float32"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.extra.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify(folder, originals("mistral-float32"))
    assert {f.where for f in failed(report, "coverage")} == {
        name,
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.mlp.extra.weight",
    }
    assert one(report, "lockstep").data["differing"] == ["layer 1", "layer 2"]


def test_values_that_are_no_numbers_are_located(broken: Written, originals: Written) -> None:
    folder = broken(DENSE)
    tampered = Folder(folder)
    bits = tampered.get("model.layers.0.mlp.up_proj.weight")
    bits[2, 5] = 0x7FC0  # NaN
    bits[7, 1] = 0xFF80  # -inf
    tampered.set("model.layers.0.mlp.up_proj.weight", bits)
    tampered.set(
        "model.layers.1.self_attn.v_proj.weight", tampered.get("model.layers.1.self_attn.v_proj.weight") * 0
    )
    tampered.checkpoint.close()
    report = verify(folder, originals(DENSE), levels=("coverage", "parity"))
    non_finite, zero = (f for f in failed(report, "coverage") if f.check == "values")
    assert non_finite.data == {"kind": "non-finite", "count": 2, "first": [2, 5]}
    assert "only zeros" in zero.message
    lockstep = one(report, "lockstep")
    assert lockstep.data["first"] == "layer 0"
    assert lockstep.measured == math.inf


# --- with less than everything --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [DENSE, RANKS])
def test_without_a_source_what_can_be_checked_is(variant: str, conversions: Written) -> None:
    report = verify(conversions(variant), no_source=True)
    assert report.exit_code == 0
    assert report.headline == "consistent with its manifest; not compared with a source"
    states = {(f.level, f.check): f.status for f in report.findings}
    assert states["coverage", "target tensors"] == "pass"
    assert states["coverage", "config"] == "pass"
    assert states["bits", "checksums"] == "pass"
    assert states["bits", "round trip"] == states["parity", "lockstep"] == "skipped"


def test_without_a_source_a_tampered_config_is_caught(broken: Written) -> None:
    folder = broken(DENSE)
    plant(folder, "rope-theta")
    report = verify(folder, levels=("coverage", "bits"), no_source=True)
    assert [f.where for f in failed(report, "coverage")] == ["config.json: rope_theta"]
    assert [f.where for f in failed(report, "bits")] == ["config.json"]


def test_a_cast_that_was_asked_for_is_identical_after_cast(originals: Written, tmp_path: Path) -> None:
    source = originals("mistral-float32")
    api.convert(source, tmp_path / "out", options=Options(dtype="BF16"))
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert (report.status, report.exactness) == ("pass", "identical after cast")


def test_a_cast_that_nothing_records_fails(originals: Written, tmp_path: Path) -> None:
    source = originals("mistral-float32")
    api.convert(source, tmp_path / "out", options=Options(dtype="BF16"))
    (tmp_path / "out" / "ckpt-tool.json").unlink()
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    (undeclared,) = (f for f in failed(report, "coverage") if f.check == "dtype")
    assert "--accept cast-to-bfloat16" in undeclared.message
    assert one(report, "round trip").data["exactness"] == "identical after cast"


def test_experts_are_not_compared_in_half_precision(originals: Written, conversions: Written) -> None:
    report = verify(conversions(EXPERTS), originals(EXPERTS), levels="parity", compute_dtype="bfloat16")
    assert one(report, "lockstep").status == "undecided"
    assert report.exit_code == 2


def test_half_precision_compares_dense_models(originals: Written, conversions: Written) -> None:
    report = verify(conversions(DENSE), originals(DENSE), levels="parity", compute_dtype="bfloat16")
    assert one(report, "lockstep").status == "pass"


@pytest.mark.parametrize(
    "asked",
    [{"levels": ("bit",)}, {"against": "jax"}, {"compute_dtype": "float8"}, {"prompts": [[1, 10**6]]}],
)
def test_wrong_arguments_are_usage_errors(asked: dict[str, Any], conversions: Written) -> None:
    with pytest.raises(CkptToolError) as caught:
        verify(conversions(DENSE), **asked)
    assert caught.value.kind == "usage"


def test_prompts_from_a_file_are_run(originals: Written, conversions: Written, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"mine": [1, 2, 3, 4]}))
    report = verify(conversions(DENSE), originals(DENSE), levels="parity", prompts=tmp_path / "rows.json")
    assert "mine" in [row[0] for row in one(report, "logits").tables[0].rows]


def test_a_manifest_that_is_none_is_refused(broken: Written) -> None:
    folder = broken(DENSE)
    (folder / "ckpt-tool.json").write_text('{"tensors": [{"name": "x"}]}')
    with pytest.raises(CkptToolError) as caught:
        verify(folder, levels="bits")
    assert caught.value.kind == "bad-config"


# --- real weights ---------------------------------------------------------------------------------------


def test_real_weights_say_what_others_computed(aidreams: Path, tmp_path: Path) -> None:
    api.convert(aidreams, tmp_path / "out", family="llama")
    expected = json.loads((aidreams / "expected.json").read_text())
    ids = torch.tensor([expected["greedy_ids_from_bos"]])
    with opened(tmp_path / "out", aidreams) as subject:
        for side in (original_side, converted_side):
            logits = side(subject, torch.float32, "cpu").forward(ids)
            assert logits[0, :-1].argmax(-1).tolist() == ids[0, 1:].tolist()


# --- documented values ----------------------------------------------------------------------------------


def entry(values: Any, **changes: Any) -> Expectation:
    """An expectation about a tiny checkpoint, `values` for its logits at one position."""
    made = {
        "id": "mistral.test", "family": "mistral", "status": "gate", "checkpoint": "test/tiny",
        "head": "causal_lm",
        "input": {"input_ids": [[1, 2, 3]]}, "input_ids_origin": "documented",
        "expected": {"kind": "logits_slice", "tensor": "logits", "slice": [0, 2, "0:3"], "values": values},
        "tolerance": {"atol": 1e-4, "rtol": 0, "basis": "source"}, "dtype": "float32", "device": "any",
        "source": {"repository": "x/y", "path": "z"}, "offline_inputs": True, "notes": "",
    }  # fmt: skip
    (parsed,) = parse({"schema_version": 1, "entries": [{**made, **changes}]}, file="test")
    return parsed


@pytest.fixture
def run_entry(conversions: Written, monkeypatch: pytest.MonkeyPatch) -> Callable[[Expectation], Finding]:
    def run(expectation: Expectation) -> Finding:
        monkeypatch.setattr(documented, "match", lambda ids: [expectation])
        report = verify(conversions(DENSE), levels="documented", checkpoint_id="test/tiny")
        return one(report, expectation.id)

    return run


@pytest.fixture
def true_logits(conversions: Written) -> torch.Tensor:
    with opened(conversions(DENSE), None) as subject:
        return converted_side(subject, torch.float32, "cpu").forward(torch.tensor([[1, 2, 3]]))


def test_documented_logits_pass_and_fail(
    run_entry: Callable[[Expectation], Finding], true_logits: torch.Tensor
) -> None:
    right = true_logits[0, 2, :3].tolist()
    assert run_entry(entry(right)).status == "pass"
    wrong = run_entry(entry([right[0], right[1] + 0.01, right[2]]))
    assert wrong.status == "fail"
    assert wrong.measured == pytest.approx(0.01, abs=1e-4)
    assert wrong.bar == pytest.approx(1e-3)  # float32 on other hardware


def test_only_gates_may_fail(run_entry: Callable[[Expectation], Finding]) -> None:
    found = run_entry(entry([9.0, 9.0, 9.0], status="secondary"))
    assert found.status == "note"
    assert "differs" in found.message


def test_documented_generations_are_run(
    run_entry: Callable[[Expectation], Finding], conversions: Written
) -> None:
    from ckpt_tool import reference

    with opened(conversions(DENSE), None) as subject:
        side = converted_side(subject, torch.float32, "cpu")
        ids = reference.generate(side.forward, torch.tensor([[1, 2, 3]]), 6)[0].tolist()
    asked = {"head": "generation", "generate": {"do_sample": False, "max_new_tokens": 6},
             "tolerance": {"atol": 0, "rtol": 0, "basis": "exact"}}  # fmt: skip
    expected = {"kind": "token_ids", "scope": "prompt + new", "values": ids}
    assert run_entry(entry(None, expected=expected, **asked)).status == "pass"
    expected["values"] = [*ids[:-1], (ids[-1] + 1) % 300]
    wrong = run_entry(entry(None, expected=expected, **asked))
    assert wrong.status == "fail"
    assert (wrong.measured, wrong.bar) == (5.0, 6.0)


def test_a_padded_row_is_computed(run_entry: Callable[[Expectation], Finding]) -> None:
    """A decoder takes a mask: numbers that are not its own fail, and are not skipped."""
    given = {"input_ids": [[0, 1, 2]], "attention_mask": [[0, 1, 1]]}
    assert run_entry(entry([0.0, 0.0, 0.0], input=given)).status == "fail"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "bfloat16"}, "no bar is known"),
        ({"dtype": "4bit (bitsandbytes)"}, "cannot be computed here"),
        ({"input": {"input_ids": [[0, 1, 2]], "token_type_ids": [[0, 1, 1]]}}, "takes no token types"),
        ({"expected": {"kind": "invariant", "rule": "scores add up"}}, "scores add up"),
        ({"head": "masked_lm"}, "for the head masked_lm"),
        ({"expected": {"kind": "logits_slice", "slice": [0, 7, 0], "values": 1.0}}, "another shape"),
    ],
)
def test_what_does_not_run_is_skipped_with_the_reason(
    changes: dict[str, Any], reason: str, run_entry: Callable[[Expectation], Finding]
) -> None:
    found = run_entry(entry([0.0, 0.0, 0.0], **changes))
    assert found.status == "skipped"
    assert reason in found.message


def test_what_is_too_big_says_how_big(
    run_entry: Callable[[Expectation], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "WORK_LIMIT", {"cpu": 1e3})
    found = run_entry(entry([0.0, 0.0, 0.0]))
    assert found.status == "skipped"
    assert "TFLOP" in found.message


def test_a_published_name_finds_its_entries(conversions: Written) -> None:
    report = verify(conversions(DENSE), levels="documented", checkpoint_id="mistralai/Mistral-7B-v0.1")
    found = one(report, "documented values")
    assert found.status == "fail" and "mistral.7b.logits_slice_fp32" in found.data["ids"]
    assert found.message.startswith("this is not mistralai/Mistral-7B-v0.1")
    assert found.message.endswith("expected a vocabulary that has token 6593, found 352 words")
    assert all(f.check != "mistral.7b.conscious.text" for f in report.findings)  # weak, never run


# --- transformers ---------------------------------------------------------------------------------------


def test_transformers_agrees_and_tells_a_wrong_theta(originals: Written, broken: Written) -> None:
    pytest.importorskip("transformers")
    folder = broken(DENSE)
    good = verify(folder, originals(DENSE), levels=(), against="transformers")
    assert [(f.check, f.status) for f in good.findings] == [("load", "pass"), ("logits", "pass")]
    plant(folder, "rope-theta")
    bad = verify(folder, originals(DENSE), levels=(), against="transformers")
    assert one(bad, "logits").status == "fail"


def test_old_releases_are_known_to_deviate(conversions: Written) -> None:
    with opened(conversions(WINDOWED), None) as subject:
        assert "sliding window" in _deviations(subject, "4.37.2")[0].message
        assert _deviations(subject, "5.23.0") == []
    with opened(conversions("mistral-nemo"), None) as subject:
        assert "head_dim" in _deviations(subject, "4.37.2")[0].message


# --- the parts ------------------------------------------------------------------------------------------


def test_reversed_sums_move_rounding_and_nothing_else() -> None:
    torch.manual_seed(3)
    a, b, w = torch.randn(5, 40), torch.randn(40, 7), torch.randn(7, 40)
    passes: list[Callable[[], torch.Tensor]] = [
        lambda: a @ b,
        lambda: torch.einsum("ik,kj->ij", a, b),
        lambda: torch.nn.functional.linear(a, w),
        lambda: a.square().mean(-1, keepdim=True),
        lambda: a.sum(),
    ]
    moved = 0
    for run in passes:
        plain = run()
        with ReversedSums():
            other = run()
        assert torch.allclose(plain, other, rtol=1e-4, atol=1e-5)
        moved += not torch.equal(plain, other)
    assert moved >= 3
    with ReversedSums():
        whole = torch.arange(12.0).view(3, 4) @ torch.arange(8.0).view(4, 2)
    assert torch.equal(whole, torch.arange(12.0).view(3, 4) @ torch.arange(8.0).view(4, 2))


@given(st.sampled_from([2, 3, 4]), st.sampled_from([2, 4, 6]), st.sampled_from([1, 3, 5]))
def test_taking_a_mistake_back_restores_the_tensor(heads: int, half: int, width: int) -> None:
    sizes = {"n": heads, "half": half, "two": 2, "d": width}
    r = Reorder("t", ("n", "half", "two", "d"), ("n", "two", "half", "d"), sizes, ("n", "half", "two"))
    right = torch.arange(heads * half * 2 * width).view(-1, width)
    for belief in beliefs(r, [r]):
        wrong = planted(r, belief)({"t": right})["t"]
        assert wrong.shape == right.shape
        assert torch.equal(undone(r, belief)({"t": wrong})["t"], right)
    turned = transpose("t")({"t": right})
    assert torch.equal(transpose("t", back=True)(turned)["t"], right)


def test_mistakes_follow_from_the_table() -> None:
    axes = (("n", 2), ("half", 3), ("two", 2), ("d", 4))
    left, right = parse_dims("(n half two) d"), parse_dims("(n two half) d")
    step = Step(axes, (Part("a", "q", "F32", left),), (Part("b", "h.5.q.weight", "F32", right),))
    (reorder,) = _reorders(step, 5)
    assert reorder.rotary
    assert list(_reorders(step, 4)) == []
    forgot = beliefs(reorder, [reorder])[0]
    source = torch.arange(48).view(12, 4)
    converted = source.view(2, 3, 2, 4).transpose(1, 2).reshape(12, 4)
    assert torch.equal(planted(reorder, forgot)({"h.5.q.weight": converted})["h.5.q.weight"], source)


def test_distance_measures_what_it_says() -> None:
    reference = torch.zeros(1, 4, 2)
    reference[..., 0], reference[..., 1] = 1.0, -1.0  # variance 1
    found = reference.clone()
    found[0, 2, 1] += 0.5
    d = distance(found, reference)
    assert (d.max_delta, d.worst, d.magnitude) == (0.5, 2, 1.0)
    assert d.nmse == pytest.approx(0.25 / 8)
    found[0, 3, 0] = math.nan
    assert distance(found, reference).nmse == math.inf
    assert distance(found[:, :2], reference).max_delta == math.inf


def test_logit_distance_over_all_positions() -> None:
    torch.manual_seed(0)
    reference = torch.randn(1, 130, 11)
    ids = torch.randint(0, 11, (1, 130))
    same = logit_distance(reference, reference, ids, 0.0)
    assert (same.kl, same.top1, same.top5, same.loss) == (0.0, 1.0, 1.0, 0.0)
    found = reference.clone()
    found[0, 129] = found[0, 129].roll(1)  # the last position only
    changed = logit_distance(found, reference, ids, 0.0)
    assert changed.top1 == pytest.approx(129 / 130)
    p, q = reference[0, 129].double().softmax(-1), found[0, 129].double().softmax(-1)
    assert changed.kl == pytest.approx(float((p * (p / q).log()).sum()))
    assert logit_distance(found, reference, ids, 100.0).ties == 1


def test_the_bar_follows_the_noise_up_to_the_cap() -> None:
    reference = torch.linspace(-1, 1, 64).view(1, 8, 8)
    quiet = bar_for([distance(reference, reference)], torch.float32)
    assert 0 < quiet.nmse < 1e-12  # rounding of the result itself stays allowed
    some = distance(reference + 1e-7 * torch.sin(1e4 * reference), reference)
    assert bar_for([some], torch.float32).nmse == pytest.approx(100 * some.nmse)
    loud = bar_for([distance(reference * 1.001, reference)], torch.float32)
    assert loud.nmse == CAPS["float32"]
    assert loud.cannot_tell(distance(reference * 1.002, reference))
    assert not loud.cannot_tell(distance(reference * 1.5, reference))
    assert bar_for([some], torch.float64).max_delta <= 1e-9


def test_weights_are_read_when_asked_for_and_kept_only_inside(conversions: Written) -> None:
    with open_checkpoint(conversions(DENSE)) as checkpoint:
        (names,) = ranks_of(checkpoint)
        weights = Weights(checkpoint, names, torch.float32, "cpu")
        name = "model.norm.weight"
        bits = checkpoint.read(names[name])
        assert torch.equal(weights[name], torch.from_numpy(bits.astype(np.int32) << 16).view(torch.float32))
        assert weights.used == {name}
        assert weights[name] is not weights[name]
        with weights.keep():
            assert weights[name] is weights[name]
        assert weights[name] is not weights[name]
        with pytest.raises(KeyError):
            weights["model.nothing"]


def test_a_pass_holds_one_layer_at_a_time(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[frozenset[int | None]] = set()
    load = Weights._load

    def watched(self: Weights, info: Any) -> torch.Tensor:
        held.add(frozenset(layer_of(n) for n in [*(self._kept or ()), info.name]))
        return load(self, info)

    monkeypatch.setattr(Weights, "_load", watched)
    assert verify(conversions(DENSE), originals(DENSE), levels="parity").status == "pass"
    assert held and all(len(layers) == 1 for layers in held)


def test_ranks_are_told_from_files_of_one_model(originals: Written) -> None:
    with open_checkpoint(originals(RANKS)) as checkpoint:
        assert len(ranks_of(checkpoint)) == len(checkpoint.files) > 1
    with open_checkpoint(originals("mistral-large")) as checkpoint:
        assert len(checkpoint.files) > 1
        assert len(ranks_of(checkpoint)) == 1


def test_config_values_change_where_transformers_5_keeps_them() -> None:
    newer = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert with_values(newer, {"rope_theta": 1e6}) == {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}
    }
    assert with_values({"rope_theta": 1e4}, {"rope_theta": 1e6}) == {"rope_theta": 1e6}


def test_the_family_table_and_the_plan_say_the_same(originals: Written) -> None:
    with open_checkpoint(originals(DENSE)) as checkpoint:
        plan = family("mistral").plan(checkpoint, Options())
    from ckpt_tool.verify.orders import reorders

    assert [r.name.rsplit(".", 2)[1] for r in reorders(plan, 2)] == ["q_proj", "k_proj"]
    assert reorders(None, 2) == []


def test_what_the_library_makes_up_is_nothing_to_compare(originals: Written, broken: Written) -> None:
    """The head of an output that has none is drawn at random when its class is loaded."""
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    folder = broken(DENSE)
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file, {"format": "pt"})
    report = verify(folder, originals(DENSE), levels="coverage", against="transformers")
    found = {f.check: (f.status, f.message) for f in report.findings if f.level == "transformers"}
    assert found["load"][0] == "fail" and "missing keys: lm_head.weight" in found["load"][1]
    status, text = found["logits"]
    assert status == "skipped"
    assert text.endswith("made up what the output has not (lm_head.weight): not compared")
    assert report.exit_code == 1
