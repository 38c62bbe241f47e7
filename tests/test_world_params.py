"""Files of the world that say more, less or otherwise than those published: fields of params.json, enlarged
vocabularies, cast weights, defaults that stand for what is not said."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool.api import convert
from ckpt_tool.checkpoint.base import Checkpoint, Document
from ckpt_tool.convert.dialects.params_fields import HARMLESS, OFF, OTHER_MODELS
from ckpt_tool.convert.families import family
from ckpt_tool.convert.families.llama import block_of
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.consolidated import Original
from ckpt_tool.fixtures.headers import REAL
from ckpt_tool.fixtures.tokenizers import sentencepiece_model, tiktoken_model
from ckpt_tool.fixtures.variants import VARIANTS
from tests.headers_only import Headers

CASES = Path(__file__).parents[2] / "shared" / "cases"
ONE = {"llama": "llama-3-8b", "mistral": "mistral-7b-v0.3", "mixtral": "mixtral-c"}
EACH = pytest.mark.parametrize("name", ONE)


def original(name: str) -> Any:
    return VARIANTS[name].original


def published(model: str) -> Any:
    return REAL[model]()


SHAPES = ("llama-1-65b", "llama-3.2-1b", "llama-3.2-3b")  # whose number of layers is a sign


def short(model: str) -> Any:
    """As published, but for most of the layers."""
    download = published(model)
    if model in SHAPES:
        return download
    return with_params(replace(download, sizes={**download.sizes, "i": 2}), n_layers=2)


def with_params(download: Any, **changes: Any) -> Any:
    """With fields of params.json changed; `...` removes one."""
    params = {k: v for k, v in {**download.params, **changes}.items() if v is not ...}
    return replace(download, params=params)


def opened(download: Any, folder: Path, **documents: bytes) -> Checkpoint:
    """Headers alone, with params.json and `documents` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {f: Headers(f, [(n, d, s) for n, d, s in rows]) for f, rows in download.headers.items()}
    return Checkpoint(folder, held, beside(folder, {"params.json": text(download.params), **documents}))


def beside(folder: Path, documents: Mapping[str, bytes]) -> dict[str, Document]:
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    return {n: Document(n, folder / n, len(c)) for n, c in documents.items()}


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def planned(download: Any, folder: Path, name: str, documents: Any = None, **settings: Any) -> Plan:
    return family(name).plan(opened(download, folder, **(documents or {})), Options(settings=settings))


def refused(make: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        make()
    return caught.value


def config_of(plan: Plan) -> dict[str, Any]:
    return {k: v.value for k, v in plan.config.items()}


def way_back(plan: Plan, folder: Path, settings: Any = None, **config: Any) -> Plan:
    """From the planned output without its manifest, with other values of config.json; `...` removes one."""
    folder.mkdir()
    held = {f.name: Headers(f.name, [(t.name, t.dtype, t.shape) for t in f.tensors]) for f in plan.outputs}
    said = {d.name: d.content for d in plan.documents}
    told = {**json.loads(said["config.json"]), **config}
    said["config.json"] = text({k: v for k, v in told.items() if v is not ...})
    return family(plan.family).plan_original(
        Checkpoint(folder, held, beside(folder, said)), Options(settings=settings or {})
    )


def params_of(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(d.content for d in plan.documents if d.name == "params.json"))
    return found


def read_by_the_reference(name: str, download: Any, **overrides: Any) -> Any:
    pytest.importorskip("torch")
    from ckpt_tool import reference

    shapes = {n: s for n, _, s in next(iter(download.headers.values()))}
    ranks = download.sizes.get("r", 1)
    return reference.original(name).Config.from_original(download.params, shapes, ranks, overrides)


# --- fields of params.json ------------------------------------------------------------------------------


SHARED = ("rope_scaling_factor", "rope_scale_factor", "use_qk_norm", "attention_chunk_size", "harmless")


@pytest.mark.parametrize("case", SHARED)
def test_shared_fields(case: str, tmp_path: Path) -> None:
    folder = CASES / "params_fields_that_change_numbers" / case
    if not folder.is_dir():
        pytest.skip("no shared cases here")
    field = {"use_qk_norm": "true", "attention_chunk_size": "8"}.get(case)
    if field is not None:
        error = refused(lambda: convert(folder, tmp_path / "out", family="llama"))
        assert error.exit_code == 2 and not (tmp_path / "out").exists()
        assert f"error[unsupported]: params.json: {case}: expected none, found {field}" in str(error)
        return
    convert(folder, tmp_path / "out", family="llama")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == (None if case == "harmless" else block_of(factor=32.0))
    convert(tmp_path / "out", tmp_path / "back", family="llama", to="original")
    assert (tmp_path / "back" / "params.json").read_bytes() == (folder / "params.json").read_bytes()


@EACH
def test_harmless_fields_change_nothing(name: str, tmp_path: Path) -> None:
    download = original(ONE[name])
    plain = planned(download, tmp_path / "a", name)
    fields = {f: 7 for f in HARMLESS if f not in ("vocab_size", "model_type")}
    more = with_params(download, **fields)
    plan = planned(more, tmp_path / "b", name)
    said = ("bos_token_id", "eos_token_id", *(() if name == "llama" else ("max_position_embeddings",)))
    assert config_of(plan) == {**config_of(plain), **dict.fromkeys(said, 7)}
    assert plan.notes == tuple(n for n in plain.notes if not n.startswith("null stands for"))
    assert read_by_the_reference(name, more) == read_by_the_reference(name, download)
    assert params_of(family(name).plan_original(kept(plan, tmp_path), Options())) == more.params


def kept(plan: Plan, folder: Path) -> Checkpoint:
    """The planned output with its manifest."""
    held = {f.name: Headers(f.name, [(t.name, t.dtype, t.shape) for t in f.tensors]) for f in plan.outputs}
    said = {d.name: d.content for d in plan.documents}
    manifest = {"ckpt-tool.json": text({"original": dict(plan.original)})}
    return Checkpoint(folder, held, beside(folder, {**said, **manifest}))


@EACH
def test_fields_of_other_models_are_refused_by_name_and_value(name: str, tmp_path: Path) -> None:
    download = original(ONE[name])
    of_others = {f: told for f, told in OTHER_MODELS.items() if (name, f) != ("mixtral", "moe")}
    wanted, read = config_of(planned(download, tmp_path / "a", name)), read_by_the_reference(name, download)
    for number in range(max(len(usual) for _, usual in of_others.values())):
        fields = {f: usual[min(number, len(usual) - 1)] for f, (_, usual) in of_others.items()}
        same = with_params(download, **fields)
        assert config_of(planned(same, tmp_path / f"b{number}", name)) == wanted
        assert read_by_the_reference(name, same) == read
    other = {
        f: False if usual == (True,) else True if f == "moe" else 0.375 for f, (_, usual) in of_others.items()
    }
    found = refused(lambda: planned(with_params(download, **other), tmp_path / "c", name)).problems
    assert {p.where for p in found} == other.keys()
    for p in found:
        assert p.kind == "unsupported" and p.file == "params.json" and p.where is not None
        assert json.dumps(other[p.where]) in p.message and of_others[p.where][0] in p.message
    for field, value in other.items():
        with pytest.raises(ValueError, match=field):
            read_by_the_reference(name, with_params(download, **{field: value}))


@EACH
@pytest.mark.parametrize("value", [3, 0.5, True, "yes", [1], {"a": 1}])
def test_unknown_fields_are_refused_and_the_hint_leads_out(name: str, value: Any, tmp_path: Path) -> None:
    download = original(ONE[name])
    other = with_params(download, new_norms=value)
    (problem,) = refused(lambda: planned(other, tmp_path / "a", name)).problems
    assert problem.kind == "unsupported" and "new_norms" in problem.message
    with pytest.raises(ValueError, match="new_norms"):
        read_by_the_reference(name, other)
    if isinstance(value, dict):
        return  # a part of another model, which nobody leaves out
    assert problem.hint is not None and "--set new_norms=null" in problem.hint
    plan = planned(other, tmp_path / "b", name, new_norms=None)
    assert config_of(plan) == config_of(planned(download, tmp_path / "c", name))
    assert any("new_norms" in note and "left out" in note for note in plan.notes)
    assert plan.asked["settings"] == {"new_norms": None}
    assert read_by_the_reference(name, other, new_norms=None) == read_by_the_reference(name, download)


@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_the_factors_of_a_training_run_are_merged_in_whole_weights(name: str, tmp_path: Path) -> None:
    """mistral-finetune writes `lora` into every params.json, beside whole weights too."""
    download = original(ONE[name])
    lora = {"enable": True, "rank": 64, "dropout": 0.0, "scaling": 2.0}
    tuned = with_params(download, lora=lora)
    plan = planned(tuned, tmp_path / "a", name)
    assert config_of(plan) == config_of(planned(download, tmp_path / "b", name))
    assert [n for n in plan.notes if "the weights hold no factors, or have them merged in" in n]
    assert read_by_the_reference(name, tuned) == read_by_the_reference(name, download)
    held = {
        f: [*rows, ("layers.0.attention.wq.lora_A.weight", "BF16", (4, 8))]
        for f, rows in download.headers.items()
    }
    apart = Checkpoint(
        tmp_path, {f: Headers(f, rows) for f, rows in held.items()}, opened(tuned, tmp_path).documents
    )
    said = refused(lambda: family(name).plan(apart, Options()))
    assert any("LoRA factors" in p.message for p in said.problems)
    more = with_params(download, lora={**lora, "alpha": 4})
    assert refused(lambda: planned(more, tmp_path / "c", name)).problems[0].where == "lora"


@EACH
def test_a_known_field_of_another_model_cannot_be_left_out(name: str, tmp_path: Path) -> None:
    other = with_params(original(ONE[name]), use_qk_norm=True)
    said = refused(lambda: planned(other, tmp_path, name, use_qk_norm=None))
    assert "use_qk_norm" in said.text()
    with pytest.raises(ValueError, match="use_qk_norm"):
        read_by_the_reference(name, other, use_qk_norm=None)


@EACH
@pytest.mark.parametrize("value", OFF)
def test_unknown_fields_that_are_off_are_noted(name: str, value: Any, tmp_path: Path) -> None:
    plan = planned(with_params(original(ONE[name]), new_norms=value), tmp_path, name)
    assert any("new_norms" in n and "is not known, and taken as off" in n for n in plan.notes)


@EACH
@pytest.mark.parametrize("field", ["hidden_act", "activation", "architectures"])
def test_what_the_family_has_may_only_be_repeated(name: str, field: str, tmp_path: Path) -> None:
    right: Any = [family(name).architectures[0]] if field == "architectures" else "silu"
    wrong: Any = ["Qwen2ForCausalLM"] if field == "architectures" else "gelu"
    download = original(ONE[name])
    assert planned(with_params(download, **{field: right}), tmp_path / "a", name).outputs
    error = refused(lambda: planned(with_params(download, **{field: wrong}), tmp_path / "b", name))
    assert error.kind == "unsupported" and error.problems[0].where == field


# --- stretched frequencies ------------------------------------------------------------------------------

SPELLINGS = [
    ("rope_scaling_factor", "factor"),
    ("rope_scale_factor", "factor"),
    ("rope_low_freq_factor", "low_freq_factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("rope_high_freq_factor", "high_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings", "original_max_position_embeddings"),
    ("old_context_len", "original_max_position_embeddings"),
]
PART = {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high"}


@pytest.mark.parametrize(("field", "part"), SPELLINGS)
def test_every_spelling_of_a_scaling_is_read_and_comes_back(field: str, part: str, tmp_path: Path) -> None:
    download = with_params(original("llama-3.1-8b"), **{field: 16})
    plan = planned(download, tmp_path / "a", "llama")
    assert plan.config["rope_scaling"].value == block_of(**{part: 16})
    assert f"params.json: {field}" in plan.config["rope_scaling"].source
    scaling = read_by_the_reference("llama", download).rope_scaling
    assert getattr(scaling, PART.get(part, "original_context")) == 16
    error = refused(lambda: way_back(plan, tmp_path / "no"))  # Meta's code would compute other numbers
    assert [(p.kind, p.where) for p in error.problems] == [("missing-fact", "rope_scaling")]
    assert f"which Meta's code has whatever params.json says, found {part} 16" in error.problems[0].message
    block = plan.config["rope_scaling"].value
    assert f"--set 'rope_scaling={json.dumps(block)}'" in str(error.problems[0].hint)
    back = way_back(plan, tmp_path / "b", {"rope_scaling": block})
    assert any("does not read" in n for n in back.notes)
    again = planned(replace(download, params=params_of(back)), tmp_path / "c", "llama")
    assert again.config["rope_scaling"].value == plan.config["rope_scaling"].value


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"rope_scaling_factor": 8, "rope_scale_factor": 32}, "bad-config", ("8", "32")),
        ({"rope_scaling_factor": 8, "use_scaled_rope": ...}, "missing-fact", ("use_scaled_rope",)),
        ({"rope_scaling": block_of(factor=16.0), "rope_scale_factor": 4}, "bad-config", ("rope_scaling",)),
        ({"rope_scaling": block_of(), "use_scaled_rope": False}, "bad-config", ("use_scaled_rope false",)),
    ],
)
def test_scalings_that_contradict_each_other(
    changes: dict[str, Any], kind: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    download = with_params(original("llama-3.1-8b"), **changes)
    error = refused(lambda: planned(download, tmp_path / "a", "llama"))
    assert error.kind == kind and all(w in str(error) for w in words), error
    with pytest.raises(ValueError, match="expected"):
        read_by_the_reference("llama", download)


def test_scalings_that_are_no_llama_s_are_refused_and_the_user_s_word_leads_out(tmp_path: Path) -> None:
    block = {"rope_type": "linear", "factor": 2.0}
    download = with_params(original("llama-3.1-8b"), rope_scaling=block)
    assert refused(lambda: planned(download, tmp_path / "a", "llama")).kind == "unsupported"
    plan = planned(download, tmp_path / "b", "llama", rope_scaling=block_of(factor=2.0))
    assert plan.config["rope_scaling"].value == block_of(factor=2.0)
    same = with_params(original("llama-3.1-8b"), rope_scaling=block_of(factor=16.0))
    assert planned(same, tmp_path / "c", "llama").config["rope_scaling"].value["factor"] == 16
    assert read_by_the_reference("llama", same).rope_scaling.factor == 16


def test_a_scaling_that_is_switched_off_is_none(tmp_path: Path) -> None:
    download = with_params(original("llama-3.1-8b"), use_scaled_rope=False, rope_scale_factor=8)
    assert planned(download, tmp_path, "llama").config["rope_scaling"].value is None
    assert read_by_the_reference("llama", download).rope_scaling is None


@pytest.mark.parametrize("name", ["mistral", "mixtral"])
@pytest.mark.parametrize("field", ["use_scaled_rope", "rope_scaling_factor", "rope_freq_base"])
def test_scalings_are_refused_where_no_model_has_one(name: str, field: str, tmp_path: Path) -> None:
    download = with_params(original(ONE[name]), **{field: 32})
    error = refused(lambda: planned(download, tmp_path, name))
    assert error.kind == "unsupported" and f"{field} = 32" in str(error)
    with pytest.raises(ValueError, match=field):
        read_by_the_reference(name, download)


BESIDE = [
    ({"rope_scaling": {"factor": 4}}, "expected rope_type beside factor, found none"),
    ({"rope_parameters": {"factor": 4}}, "expected rope_type beside factor, found none"),
    ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}}, "expected one value"),
    ({"model": {"norm_eps": 0.5}}, "expected one value"),
]


@EACH
@pytest.mark.parametrize(("changes", "words"), BESIDE)
def test_what_is_said_twice_or_by_halves_is_refused(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A scaling without its kind is not none at all, as both sides took it to be."""
    download = with_params(original(ONE[name]), use_scaled_rope=..., **changes)
    error = refused(lambda: planned(download, tmp_path, name))
    assert ("bad-config", words) in [(p.kind, p.message[: len(words)]) for p in error.problems]
    with pytest.raises(ValueError, match=words):
        read_by_the_reference(name, download)


@EACH
def test_one_theta_of_two_may_be_said(name: str, tmp_path: Path) -> None:
    download = with_params(original(ONE[name]), rope_theta=7.0, rope_parameters={"rope_theta": 9.0})
    assert config_of(planned(download, tmp_path, name, rope_theta=9.0))["rope_theta"] == 9.0
    assert read_by_the_reference(name, download, rope_theta=9.0).rope_theta == 9.0


SAID_TWICE = [
    ("mistral", {"rms_norm_eps": 0.5}, "rms_norm_eps", 0.5, "norm_eps"),
    ("mistral", {"sliding_window": 8, "_sliding_window": 9}, "sliding_window", 9, "windows"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok", 1, "n_experts_per_token"),
    ("llama", {"num_hidden_layers": 9}, "num_hidden_layers", 4, "n_layers"),
    ("llama", {"rope_freq_base": 7.0}, "rope_theta", 7.0, "rope_theta"),
    ("llama", {"tied_embeddings": True, "tie_word_embeddings": False}, "tie_word_embeddings", False, "names"),
]


@pytest.mark.parametrize(("name", "changes", "setting", "value", "read"), SAID_TWICE)
def test_one_value_of_two_may_be_said(
    name: str, changes: dict[str, Any], setting: str, value: Any, read: str, tmp_path: Path
) -> None:
    """The hint leads out, on both sides: the user's word decides whatever the file says twice."""
    download = original(ONE[name])
    value = download.params["n_layers"] if setting == "num_hidden_layers" else value
    twice = with_params(download, **changes)
    error = refused(lambda: planned(twice, tmp_path / "a", name))
    (problem,) = (p for p in error.problems if "expected one value" in p.message)
    assert (problem.kind, problem.hint) == ("bad-config", f"--set {setting}=VALUE says which")
    assert planned(twice, tmp_path / "b", name, **{setting: value}).config[setting].value == value
    once = read_by_the_reference(
        name, with_params(download, **dict.fromkeys(changes, ...)), **{setting: value}
    )
    assert getattr(read_by_the_reference(name, twice, **{setting: value}), read) == getattr(once, read)


def test_one_factor_of_two_may_be_said(tmp_path: Path) -> None:
    twice = with_params(original("llama-3.1-8b"), rope_scaling_factor=8, rope_scale_factor=32)
    error = refused(lambda: planned(twice, tmp_path / "a", "llama"))
    assert error.problems[0].hint == "--set rope_scaling_factor=VALUE says which"
    plan = planned(twice, tmp_path / "b", "llama", rope_scaling_factor=32)
    assert plan.config["rope_scaling"].value["factor"] == 32
    assert read_by_the_reference("llama", twice, rope_scaling_factor=32).rope_scaling.factor == 32


def test_a_window_that_the_user_takes_away_leaves_the_base_of_its_release(tmp_path: Path) -> None:
    """Mistral 7B v0.1 says no base: its window tells that it is 10000, whether or not it is used."""
    download = original("mistral-7b-v0.1")
    config = config_of(planned(download, tmp_path, "mistral", sliding_window=None))
    assert (config["sliding_window"], config["rope_theta"]) == (None, 1e4)
    assert read_by_the_reference("mistral", download, sliding_window=None).rope_theta == 1e4


@EACH
def test_a_scaling_that_the_user_says_by_halves_does_not_take_away_the_file_s(
    name: str, tmp_path: Path
) -> None:
    error = refused(lambda: planned(original(ONE[name]), tmp_path, name, rope_scaling={"factor": 4}))
    assert [(p.kind, p.where) for p in error.problems] == [("bad-config", "rope_scaling")]


def test_the_other_name_of_theta(tmp_path: Path) -> None:
    download = with_params(original("llama-3-8b"), rope_theta=..., rope_freq_base=7e4)
    assert planned(download, tmp_path / "a", "llama").config["rope_theta"].value == 7e4
    assert read_by_the_reference("llama", download).rope_theta == 7e4
    both = with_params(download, rope_theta=5e5)
    assert refused(lambda: planned(both, tmp_path / "b", "llama")).kind == "bad-config"
    with pytest.raises(ValueError, match="expected one value"):
        read_by_the_reference("llama", both)


# --- generations ----------------------------------------------------------------------------------------

LLAMAS = sorted(m for m in REAL if m.startswith(("llama", "code")))


def enlarged(download: Original, rows: int) -> Original:
    """With as many more rows of the embedding and the head on each rank."""
    words = download.sizes["v"] + rows * download.sizes["r"]
    params = dict(download.params)
    if params.get("vocab_size", -1) != -1:
        params["vocab_size"] = words
    return replace(download, params=params, sizes={**download.sizes, "v": words})


@pytest.mark.parametrize("model", LLAMAS)
def test_an_enlarged_vocabulary_is_of_the_same_generation(model: str, tmp_path: Path) -> None:
    download = short(model)
    more = enlarged(download, 9 if LLAMAS.index(model) % 2 else 4000)
    plan = planned(more, tmp_path / "a", "llama")
    same = config_of(planned(download, tmp_path / "b", "llama"))
    assert config_of(plan) == {**same, "vocab_size": more.sizes["v"]}
    assert any("the vocabulary was enlarged by" in n for n in plan.notes)
    theta = read_by_the_reference("llama", with_params(more, rope_theta=...)).rope_theta
    alone = planned(with_params(more, rope_theta=...), tmp_path / "c", "llama").config["rope_theta"]
    assert alone.value == theta == (5e5 if model.startswith("llama-3") else 1e4)
    assert alone.source.startswith("rule: rope_theta absent")


@pytest.mark.parametrize("model", LLAMAS)
def test_a_cast_model_is_of_the_same_generation(model: str, tmp_path: Path) -> None:
    """Cast to the other type of 16 bits, its tables of frequencies, which tell Llama 1 from 2, left out or
    not."""
    download = short(model)
    dtype = "F16" if download.dtype == "BF16" else "BF16"
    same = planned(download, tmp_path / "a", "llama").config["max_position_embeddings"].value
    bare = {n: r for n, r in download.rows.items() if "rope.freqs" not in n}
    for rows in (download.rows, bare):
        cast = replace(download, dtype=dtype, rows=rows)
        length = planned(cast, tmp_path / str(len(rows)), "llama").config["max_position_embeddings"]
        if model != "llama-1-65b" or rows is not bare:  # all else is as Llama 2's
            assert length.value == same, length
        assert length.source.startswith("rule: ")


def test_shared_llama_3_with_added_tokens(tmp_path: Path) -> None:
    script = CASES / "llama3_added_tokens" / "make.py"
    if not script.is_file():
        pytest.skip("no shared cases here")
    pytest.importorskip("torch")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    (tmp_path / "out").mkdir()
    for case in ("with_theta", "without_theta"):
        convert(tmp_path / case, tmp_path / "out" / case, family="llama")
        config = json.loads((tmp_path / "out" / case / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (128000, 128001)
        assert (config["rope_theta"], config["max_position_embeddings"]) == (5e5, 8192)


PIECES = {"tokenizer.model": sentencepiece_model(300)}


@pytest.mark.parametrize(
    ("model", "changes", "documents", "where"),
    [
        ("llama-3-8b", {"rope_theta": ...}, PIECES, "rope_theta"),
        ("llama-3-8b", {"rope_theta": ..., "vocab_size": -1}, {}, "rope_theta"),
        ("llama-2-7b", {}, {"tokenizer.model": tiktoken_model(600)}, "rope_theta"),
        ("llama-3-8b", {"rope_theta": 1e4}, {}, "max_position_embeddings"),
        ("llama-3.2-1b", {"rope_scale_factor": 8}, {}, "rope_scaling"),
    ],
)
def test_signs_that_contradict_each_other_are_asked_and_the_hint_leads_out(
    model: str, changes: dict[str, Any], documents: dict[str, bytes], where: str, tmp_path: Path
) -> None:
    download = with_params(published(model), **changes)
    error = refused(lambda: planned(download, tmp_path / "a", "llama", documents))
    (problem,) = error.problems
    assert (problem.kind, problem.where) == ("missing-fact", where)
    assert problem.hint is not None and f"{where}=" in problem.hint
    answer: Any = problem.hint.partition(f"{where}=")[2]
    answer = json.JSONDecoder().raw_decode(answer)[0]
    settings = {"max_position_embeddings": 4096, where: answer}
    plan = planned(download, tmp_path / "b", "llama", **settings)  # a tokenizer of this size is large
    assert plan.config[where].value == answer and plan.config[where].source == "--set"


def test_a_model_of_the_width_and_depth_of_a_small_one_is_asked_about(tmp_path: Path) -> None:
    small = published("llama-3.2-1b")
    other = replace(small, sizes={**small.sizes, "f": 5632})
    other = with_params(other, multiple_of=256, ffn_dim_multiplier=1.0)
    (problem,) = refused(lambda: planned(other, tmp_path / "a", "llama")).problems
    assert (problem.kind, problem.where) == ("missing-fact", "rope_scaling")
    plan = planned(other, tmp_path / "b", "llama", rope_scaling=block_of(factor=8.0))
    assert plan.config["tie_word_embeddings"].value is False
    back = params_of(way_back(plan, tmp_path / "c"))
    assert back["rope_scaling_factor"] == 8
    again = planned(replace(other, params=back), tmp_path / "d", "llama")
    assert again.config["rope_scaling"].value["factor"] == 8


def test_ids_of_llama_3_are_not_given_where_its_vocabulary_is_not(tmp_path: Path) -> None:
    plan = planned(original("llama-3.1-8b"), tmp_path, "llama")
    assert plan.config["bos_token_id"].value is None is plan.config["eos_token_id"].value
    assert any("null stands for bos_token_id and eos_token_id" in n and "--set" in n for n in plan.notes)
    told = planned(original("llama-3.1-8b"), tmp_path, "llama", bos_token_id=3, eos_token_id=4)
    assert not any("null stands" in n for n in told.notes)


@pytest.mark.parametrize(
    ("name", "changes", "asks"),
    [
        ("mistral-7b-v0.1", {}, None),
        ("mistral-7b-v0.3", {"rope_theta": ..., "sliding_window": 4096}, "rope_theta"),
        ("mixtral-8x7b-a", {}, None),
        ("mixtral-8x7b-a", {"sliding_window": 4096}, "rope_theta"),
    ],
)
def test_theta_of_mistrals_where_window_and_generation_disagree(
    name: str, changes: dict[str, Any], asks: str | None, tmp_path: Path
) -> None:
    download, own = with_params(published(name), **changes), name.partition("-")[0]
    if asks is None:
        theta = planned(download, tmp_path, own).config["rope_theta"].value
        assert theta == read_by_the_reference(own, download).rope_theta
        return
    (problem,) = refused(lambda: planned(download, tmp_path / "a", own)).problems
    assert (problem.kind, problem.where) == ("missing-fact", asks)
    assert planned(download, tmp_path / "b", own, rope_theta=1e6).outputs


# --- defaults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted(m for m in REAL if m.startswith(("llama", "code", "mi"))))
def test_no_published_model_needs_an_answer(model: str, tmp_path: Path) -> None:
    name = {"code": "llama"}.get(model.partition("-")[0], model.partition("-")[0])
    plan = planned(short(model), tmp_path, name)
    assert all(v.source for v in plan.config.values()) and plan.outputs


def tied(download: Original) -> Original:
    """Without a head of its own."""
    rows = {n: r for n, r in download.rows.items() if n != "output.weight"}
    return replace(download, rows=rows)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("field", ["tied_embeddings", "tie_word_embeddings"])
def test_tied_embeddings_are_read_and_come_back(name: str, field: str, tmp_path: Path) -> None:
    download = with_params(tied(original(ONE[name])), **{field: True})
    plan = planned(download, tmp_path / "a", name)
    assert plan.config["tie_word_embeddings"].value is True
    assert "lm_head.weight" not in {t.name for f in plan.outputs for t in f.tensors}
    assert read_by_the_reference(name, download).names.output == "tok_embeddings.weight"
    (tmp_path / "b").mkdir()
    back = family(name).plan_original(kept(plan, tmp_path / "b"), Options())
    assert params_of(back) == download.params
    assert "output.weight" not in {t.name for f in back.outputs for t in f.tensors}
    if name == "mistral":
        assert params_of(way_back(plan, tmp_path / "c"))["tied_embeddings"] is True


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_missing_head_that_is_not_said_to_be_tied_is_asked_about(name: str, tmp_path: Path) -> None:
    download = tied(original(ONE[name]))
    error = refused(lambda: planned(download, tmp_path / "a", name))
    assert error.kind == "missing-tensor" and "--set tie_word_embeddings=true" in str(error.problems[0].hint)
    assert planned(download, tmp_path / "b", name, tie_word_embeddings=True).outputs


def test_a_length_and_that_of_a_program(tmp_path: Path) -> None:
    for name in ("mistral", "mixtral"):
        download = with_params(original(ONE[name]), max_position_embeddings=131072, max_seq_len=2048)
        length = planned(download, tmp_path / name, name).config["max_position_embeddings"]
        assert (length.value, length.source) == (131072, "params.json: max_position_embeddings")


@pytest.mark.parametrize(("name", "heads"), [("llama", None), ("mistral", 8), ("mixtral", 8)])
def test_absent_heads_are_the_default_of_the_class(name: str, heads: int | None, tmp_path: Path) -> None:
    plan = planned(original(ONE[name]), tmp_path / "a", name)
    wanted = heads or plan.config["num_attention_heads"].value
    error = refused(lambda: way_back(plan, tmp_path / "b", num_key_value_heads=...))
    assert f"num_key_value_heads {wanted}" in str(error) and "rule:" in str(error)
    error = refused(lambda: way_back(plan, tmp_path / "c", num_key_value_heads=None))
    assert f"num_key_value_heads {plan.config['num_attention_heads'].value}" in str(error)


@pytest.mark.parametrize(("name", "eps"), [("llama", 1e-6), ("mistral", 1e-6), ("mixtral", 1e-5)])
def test_an_absent_epsilon_is_the_default_of_the_class(name: str, eps: float, tmp_path: Path) -> None:
    plan = planned(original(ONE[name]), tmp_path / "a", name)
    back = way_back(plan, tmp_path / "b", rms_norm_eps=..., head_dim=...)
    assert math.isclose(params_of(back)["norm_eps"], eps)
