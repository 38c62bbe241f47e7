"""What no bit and no number of a pass tells and a loader takes all the same, and headlines that claim no more
than was compared."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.convert.plan import Options
from ckpt_tool.verify import verify
from ckpt_tool.verify.certificate import Request, as_bytes, certify
from ckpt_tool.verify.certificate_check import check
from ckpt_tool.verify.claims import Claim, judge
from ckpt_tool.verify.compare import compare
from ckpt_tool.verify.coverage import SHOWN
from ckpt_tool.verify.meanings import acts
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.strangers import taken_for
from ckpt_tool.verify.tokenizer_config import listed
from ckpt_tool.verify.tokenizer_ids import Ids
from ckpt_tool.verify.tokenizer_ids import compare as compare_ids

Written = Callable[[str], Path]
PLAIN, SEGMENTS = "mistral-7b-v0.3", "bert-2023-float32"
CHEAP = ("coverage", "bits")


def copied(folder: Path, to: Path) -> Path:
    """Without its manifest."""
    shutil.copytree(folder, to)
    (to / "ckpt-tool.json").unlink(missing_ok=True)
    return to


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def failed(report: Report) -> list[str]:
    return [str(f.where) for f in report.findings if f.status == "fail"]


# --- config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attn_implementation", "someone/kernel", "a kernel that is fetched from elsewhere"),
        ("_attn_implementation", "bogus", "or none that loads"),
        ("cache_implementation", "bogus", "none that loads"),
        ("chunk_size_feed_forward", 7, "raise where it does not divide it"),
        ("prefix", "Once", "put before every text"),
        ("task_specific_params", {"text-generation": {"max_length": 5}}, "releases 4 generate with"),
        ("initializer_range", "0.02", "do not load or run it"),
        ("use_cache", "yes", "do not load or run it"),
        ("quantization_config", {}, "do not load or run it"),
    ],
)
def test_a_key_that_no_pass_reads_acts(key: str, value: Any, words: str) -> None:
    found = acts(key, value, None)
    assert found is not None and words in found
    assert acts(key, None, None) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "sdpa"),
        ("cache_implementation", "hybrid"),
        ("chunk_size_feed_forward", 0),
        ("task_specific_params", {}),
        ("initializer_range", 0.02),
        ("classifier_dropout", None),
        ("problem_type", "regression"),
        ("num_steps", "global_step125000"),  # Pythia's
        ("use_cache", False),
    ],
)
def test_a_key_that_only_says_how_to_run_does_not(key: str, value: Any) -> None:
    assert acts(key, value, None) is None


def test_what_acts_beside_the_numbers_fails(originals: Written, conversions: Written, tmp_path: Path) -> None:
    """Release 4 of transformers generates by config.json where generation_config.json says that it was made
    of it; takes other files that a tokenizer's config names; 5 makes a special token of any `*_token`."""
    out = copied(conversions(PLAIN), tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["_from_model_config"] is True
    edit(out / "config.json", prefix="Once", repetition_penalty=5.0, suppress_tokens=[5], use_cache=False)
    edit(out / "tokenizer_config.json", vocab_file="/x/y", from_slow=True, note_token="The", legacy=True)
    report = verify(out, originals(PLAIN), levels=CHEAP)
    assert set(failed(report)) == {
        "config.json: prefix",
        "config.json: repetition_penalty",
        "config.json: suppress_tokens",
        "tokenizer_config.json: vocab_file",
        "tokenizer_config.json: from_slow",
        "tokenizer_config.json: additional_special_tokens",
    }


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"dequantize": False, "weight_block_size": None}, 0),
        ({"dequantize": True}, 1),
        ({"modules_to_not_convert": None}, 1),
    ],
)
def test_nulls_and_a_flag_that_is_off_say_nothing_of_codes(
    more: dict[str, Any], code: int, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions("gpt-oss-20b"), tmp_path / "out")
    packing = json.loads((out / "config.json").read_text())["quantization_config"]
    edit(out / "config.json", quantization_config=packing | more)
    report = verify(out, originals("gpt-oss-20b"), levels=CHEAP)
    assert report.exit_code == code
    assert failed(report) == ["config.json: quantization_config"] * code


def test_tokens_of_names_of_their_own_are_special() -> None:
    document = {"bos_token": "<s>", "image_token": {"content": "<i>"}, "add_bos_token": True, "x_token": None}
    assert listed(document) == {"<i>"}


def test_a_published_code_llama_calls_its_own_pieces_tokens() -> None:
    """As codellama/CodeLlama-7b-hf has them; `<FILL_ME>` is no piece."""
    said = {"fill_token": "<FILL_ME>", "prefix_token": "▁<PRE>", "eot_token": "▁<EOT>"}
    assert listed({"tokenizer_class": "CodeLlamaTokenizerFast", **said}) == set()
    assert listed({"tokenizer_class": "CodeLlamaTokenizer", **said, "eot_token": "The"}) == {"The"}
    assert listed({"tokenizer_class": "LlamaTokenizer", **said}) == {"<FILL_ME>", "▁<PRE>", "▁<EOT>"}


# --- tokenizer.json ---------------------------------------------------------------------------------------


def _shorter(t: dict[str, Any]) -> None:
    t["model"]["max_input_chars_per_word"] -= 3


def _no_second_sep(t: dict[str, Any]) -> None:
    t["post_processor"]["pair"].pop()


def _one_segment(t: dict[str, Any]) -> None:
    for part in t["post_processor"]["pair"]:
        next(iter(part.values()))["type_id"] = 0


@pytest.mark.parametrize(
    ("change", "segments", "where", "words"),
    [
        (_shorter, True, "model.max_input_chars_per_word", "expected 100, found 97"),
        (_no_second_sep, True, "post_processor", "in one row: expected ids"),
        (
            _one_segment,
            True,
            "post_processor",
            "expected segments [0, 0, 0, 0, 1, 1], found [0, 0, 0, 0, 0, 0]",
        ),
        (_one_segment, False, None, "expected segments"),
    ],
)
def test_what_single_short_texts_do_not_show(
    change: Callable[[dict[str, Any]], None],
    segments: bool,
    where: str | None,
    words: str,
    conversions: Written,
) -> None:
    right = json.loads((conversions(SEGMENTS) / "tokenizer.json").read_text())
    wrong = copy.deepcopy(right)
    change(wrong)
    one, other = (Ids(json.dumps(x).encode()) for x in (right, wrong))
    found = compare_ids(one, other, segments=segments)
    assert [d.where for d in found.differences] == ([] if where is None else [where])
    assert words in (found.differences[0].message if where else str(found.apart))


# --- files beside the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["custom_generate/", "additional_chat_templates/"])
def test_a_link_to_a_folder_that_loaders_look_into_is_no_stranger_to_them(name: str) -> None:
    assert taken_for(name) == "a link to a folder that a loader looks into"
    assert taken_for("photos/") is None


@pytest.fixture(scope="module")
def certified(originals: Written, conversions: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = copied(conversions(PLAIN), tmp_path_factory.mktemp("certified") / "out")
    made = certify(out, originals(PLAIN), Request(levels=CHEAP))
    assert made.statement is not None
    (out / "ckpt-tool.certificate.json").write_bytes(as_bytes(made.statement))
    return out


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "custom_generate/generate.py", "model.gguf"]
)
def test_a_file_that_a_loader_takes_is_none_that_a_certificate_passes_over(
    name: str, certified: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(certified, tmp_path / "out"))
    assert check(out).status == "pass"
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    report = check(out)
    assert report.status == "fail"
    assert report.headline == (f"{name}: the certificate does not speak of this file, {taken_for(name)}")


@pytest.mark.parametrize(
    "more",
    [{"against": "transformers"}, {"levels": ["parity"]}, {"checkpoint_id": "mistralai/Mistral-7B-v0.1"}],
)
def test_a_certificate_shows_all_that_it_says_was_asked(
    more: dict[str, Any], certified: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(certified, tmp_path / "out"))
    path = out / "ckpt-tool.certificate.json"
    statement = json.loads(path.read_text())
    statement["predicate"]["verification"]["asked"] |= more
    path.write_text(json.dumps(statement))
    report = check(out)
    assert report.status == "fail"
    assert "it does not agree with itself: expected" in report.headline


# --- headlines --------------------------------------------------------------------------------------------


def test_names_and_shapes_are_not_all_of_a_manifest(conversions: Written, tmp_path: Path) -> None:
    out = Path(shutil.copytree(conversions(PLAIN), tmp_path / "out"))
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert verify(out, no_source=True).exit_code == 1
    report = verify(out, no_source=True, levels=("coverage",))
    assert report.headline == (
        "of the names, shapes and values of its manifest, whose checksums were compared with nothing; "
        "not compared with a source"
    )
    assert verify(out, no_source=True, levels=()).exit_code == 2


def test_a_fact_that_is_given_against_the_source_is_in_the_headline(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = copied(conversions(PLAIN), tmp_path / "out")
    edit(out / "config.json", rope_theta=123.0)
    report = verify(out, originals(PLAIN), levels=CHEAP, settings={"rope_theta": 123.0})
    assert report.headline == (
        "the bits are those of its source; rope_theta as given with --set, against what its files say"
    )
    (note,) = (f for f in report.findings if f.check == "settings")
    assert note.message.endswith("rope_theta = 123.0 instead of 1000000.0 (params.json: rope_theta)")


def test_experts_that_no_prompt_chose_are_in_the_headline(
    originals: Written, tmp_path: Path, few_prompts: None
) -> None:
    source = Path(shutil.copytree(originals("mixtral-a"), tmp_path / "original"))
    file = source / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    routers = [n for n in tensors if n.endswith("gate.weight")]
    for name in routers:  # the first four in pairs, of which one is always chosen
        one = tensors[name][0]
        tensors[name] = torch.stack([one, -one, one * 1e-3, -one * 1e-3, *[one * 0] * 4])
    torch.save(tensors, file)
    api.convert(source, tmp_path / "out", family="mixtral")
    for levels, words in ((("bits", "parity"), "by its bits alone"), (("parity",), "was not compared")):
        report = verify(tmp_path / "out", source, levels=levels)
        assert report.status == "pass"
        assert report.headline.endswith(
            f"; what no prompt reached ({12 * len(routers)} of 344 tensors) {words}"
        )


def test_a_graph_is_judged_on_its_prompts_alone() -> None:
    made = [
        Finding("onnx", "weights", "note", "", data={"by_results": "2 of 13 tensors"}),
        Finding("onnx", "outputs", "pass", "", data={"sampled": "prompts of up to 600 tokens"}),
    ]
    assert judge(made, Claim("source")).headline == (
        "the numbers that onnxruntime gives of prompts of up to 600 tokens are those of its source; "
        "2 of 13 tensors are not in it as they are, and judged by these prompts alone"
    )


def test_a_fault_of_the_source_is_called_no_difference(originals: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals(PLAIN), tmp_path / "original"))
    file = source / "consolidated.safetensors"
    tensors = load_file(file)
    tensors["layers.1.attention.wk.weight"].zero_()
    tensors["output.weight"][3, 0] = torch.nan
    save_file(tensors, file)
    api.convert(source, tmp_path / "out", family="mistral")
    report = verify(tmp_path / "out", source, levels=CHEAP)
    said = [f.message for f in report.findings if f.status == "fail"]
    assert len(said) == 2 and all(text.endswith(", as the source has it") for text in said)
    assert (report.exit_code, report.exactness) == (1, "bit-identical")


def test_many_faults_of_the_source_are_no_difference_either(originals: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals(PLAIN), tmp_path / "original"))
    file = source / "consolidated.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.startswith("layers.")][: SHOWN + 1]:
        tensors[name].zero_()
    save_file(tensors, file)
    api.convert(source, tmp_path / "out", family="mistral")
    report = verify(tmp_path / "out", source, levels=CHEAP)
    said = [f.message for f in report.findings if f.status == "fail"]
    assert len(said) == SHOWN + 1 and said[-1] == "1 more of this kind"
    assert (report.exit_code, report.exactness) == (1, "bit-identical")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as held:  # a bit of another tensor
        held.seek(-1, 2)
        last = held.read()[0]
        held.seek(-1, 2)
        held.write(bytes([last ^ 1]))
    assert verify(tmp_path / "out", source, levels=CHEAP).exactness == "differs"


# --- the way back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_layers", 7, "expected 4, found 7"),
        ("padded_vocab_size", 9, "expected 328, found 9"),
        ("swiglu", True, "a conversion of the output would be refused: expected no gated feed-forward"),
    ],
)
def test_args_of_ranks_are_compared(
    key: str, value: Any, words: str, conversions: Written, tmp_path: Path
) -> None:
    api.convert(conversions(SEGMENTS), tmp_path / "back", to="original", options=Options())
    assert verify(tmp_path / "back", conversions(SEGMENTS), levels=CHEAP).status == "pass"
    (file,) = (tmp_path / "back").rglob("*.pt")
    content = torch.load(file, weights_only=False)  # written just before
    setattr(content["args"], key, value)
    torch.save(content, file)
    report = verify(tmp_path / "back", conversions(SEGMENTS), levels=("coverage",))
    (wrong,) = (f for f in report.findings if f.status == "fail")
    assert words in wrong.message and key in str(wrong.where)


def test_cfg_of_parts_is_compared(conversions: Written, tmp_path: Path) -> None:
    api.convert(conversions("opt-350m"), tmp_path / "back", to="original", options=Options())
    file = tmp_path / "back" / "reshard.pt"
    content = torch.load(file, weights_only=False)
    content["cfg"]["model"]["max_target_positions"] = 5
    torch.save(content, file)
    report = verify(tmp_path / "back", conversions("opt-350m"), levels=("coverage",))
    assert failed(report) == ["reshard.pt: cfg.model.max_target_positions"]


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        (PLAIN, "rope_theta", 5e3),
        (PLAIN, "rms_norm_eps", 2e-5),  # norm_eps of params.json
        (SEGMENTS, "layer_norm_eps", 2e-5),  # layernorm_epsilon of args
    ],
)
def test_a_fact_that_is_given_on_the_way_back_is_what_the_files_say(
    variant: str, key: str, value: float, conversions: Written, tmp_path: Path, few_prompts: None
) -> None:
    """And by what both are computed."""
    options = Options(settings={key: value})
    api.convert(conversions(variant), tmp_path / "back", to="original", options=options)
    levels = (*CHEAP, "parity") if key == "rms_norm_eps" else CHEAP
    report = verify(tmp_path / "back", conversions(variant), levels=levels, settings={key: value})
    assert (report.status, failed(report)) == ("pass", [])
    assert f"{key} as given with --set, against what its files say" in report.headline
    unasked = verify(tmp_path / "back", conversions(variant), levels=("coverage",))
    (told,) = (f for f in unasked.findings if f.check == "manifest" and f.where == "ckpt-tool.json: options")
    assert told.status == "fail" and f"found {key} = {value}, recorded in the manifest" in told.message


@pytest.mark.parametrize("variant", [PLAIN, "opt-350m", SEGMENTS])
def test_a_key_that_is_left_out_on_the_way_back_is_no_fact_of_the_original(
    variant: str, conversions: Written, tmp_path: Path
) -> None:
    source = copied(conversions(variant), tmp_path / "in")
    edit(source / "config.json", logit_scale=0.5)
    api.convert(source, tmp_path / "back", to="original", options=Options(settings={"logit_scale": None}))
    report = verify(tmp_path / "back", source, levels=CHEAP)
    assert (report.status, failed(report)) == ("pass", [])


# --- compare ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"prefix": "Once"}, "prefix"),
        ({"dtype": "float16", "torch_dtype": "float16"}, "torch_dtype"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta"),
    ],
)
def test_what_one_config_alone_says_is_a_difference(
    more: dict[str, Any], where: str, conversions: Written, tmp_path: Path
) -> None:
    other = copied(conversions(PLAIN), tmp_path / "b")
    edit(other / "config.json", **more)
    for a, b in ((conversions(PLAIN), other), (other, conversions(PLAIN))):
        report = compare(a, b, logits=False)
        assert report.status == "fail" and where in failed(report)
    assert compare(other, other, logits=False).status == "pass"


@pytest.mark.parametrize("dtype", [{}, {"text_config": "bfloat16"}, ["bfloat16"]])
def test_a_dtype_that_is_no_name_is_a_difference(
    dtype: Any, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """It ended in a TypeError."""
    other = copied(conversions(PLAIN), tmp_path / "b")
    edit(other / "config.json", torch_dtype=dtype)
    assert "config.json: torch_dtype" in failed(verify(other, originals(PLAIN), levels=CHEAP))
    assert failed(compare(conversions(PLAIN), other, logits=False)) == ["torch_dtype"]


def test_what_was_not_compared_is_in_the_headline(conversions: Written, tmp_path: Path) -> None:
    other = copied(conversions(PLAIN), tmp_path / "b")
    edit(other / "tokenizer_config.json", add_eos_token=True)
    edit(other / "config.json", weird=3, suppress_tokens=[5])
    (other / "adapter_config.json").write_text("{}")
    assert compare(conversions(PLAIN), other, logits=False).headline == (
        "the tensors and the tokenizer are the same; config not compared: weird has nothing in A and 3 in B, "
        "which is not known here; config.json says other sampling values, which are noted; "
        "tokenizer_config.json says other things, which are noted; B alone has files that loaders take, "
        "which are noted"
    )


# --- levels by themselves ---------------------------------------------------------------------------------


def test_a_cast_that_nobody_asked_for_fails_whatever_level_is_asked(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """The source is cast before it is compared, so no other level would see it."""
    level = "bits"
    out = copied(conversions(PLAIN), tmp_path / "out")
    file = out / "model.safetensors"
    save_file({k: x.half() for k, x in load_file(file).items()}, file, {"format": "pt"})
    edit(out / "config.json", torch_dtype="float16")
    report = verify(out, originals(PLAIN), levels=level)
    assert report.status == "fail" and report.headline.endswith("--accept cast-to-float16 accepts it")
    accepted = verify(out, originals(PLAIN), levels=level, accept=["cast-to-float16"])
    words = "are those of its source once it is cast or pooled as recorded or accepted"
    assert accepted.status == "pass" and accepted.headline.endswith(words)


def test_a_recorded_cast_is_named_where_only_numbers_are_compared(originals: Written, tmp_path: Path) -> None:
    api.convert(originals(PLAIN), tmp_path / "out", family="mistral", options=Options(dtype="F16"))
    for levels in ("training", ("coverage", "training")):
        report = verify(tmp_path / "out", originals(PLAIN), levels=levels)
        assert report.status == "pass"
        assert report.headline.endswith("once it is cast or pooled as recorded or accepted")


@pytest.mark.parametrize("levels", ["bits", ("coverage", "bits")])
def test_what_was_left_out_by_name_and_what_the_manifest_alone_tells_is_in_the_headline(
    levels: Any, conversions: Written, tmp_path: Path
) -> None:
    """Of a model that was cut the verdict was that of the whole one."""
    source = conversions(PLAIN)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    last = tuple(n for n in load_file(source / "model.safetensors") if f".layers.{layers - 1}." in n)
    options = Options(settings={"num_hidden_layers": layers - 1}, drop=last)
    api.convert(source, tmp_path / "out", options=options, check=False)
    report = verify(tmp_path / "out", source, levels=levels)
    assert report.status == "pass" and report.headline == (
        "the bits are those of its source; only the manifest tells num_hidden_layers; "
        f"{len(last)} tensors of the source left out with --drop and compared with nothing"
    )


def test_an_adapter_beside_the_source_is_in_the_headline(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Which loaders put on top of those weights."""
    source = shutil.copytree(originals("qwen2-0.5b"), tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    report = verify(conversions("qwen2-0.5b"), source, levels=CHEAP)
    words = "; the adapter beside the source's weights was left aside"
    assert report.status == "pass" and report.headline.endswith(words)
