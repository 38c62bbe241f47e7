"""Config files and heads as the world has them: one value in two spellings, values that no release reads, a
tied head with values of its own, stale rotary frequencies, chat templates. Each is converted as it is meant,
or refused by name with a way out."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import api
from ckpt_tool.api import Options
from ckpt_tool.convert.facts import classes
from ckpt_tool.errors import CkptToolError, Problem

Written = Callable[[str], Path]
Tensors = dict[str, tuple[str, list[int], bytes]]
CASES = Path(__file__).parents[2] / "shared" / "cases"


def case(name: str) -> Path:
    if not (CASES / name).is_dir():
        pytest.skip("the cases are not beside this checkout")
    return CASES / name


# --- folders, edited ------------------------------------------------------------------------------------


def read_tensors(file: Path) -> Tensors:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    return {
        name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])])
        for name, t in header.items()
        if name != "__metadata__"
    }


def write_tensors(file: Path, tensors: Tensors) -> None:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))


@pytest.fixture
def edited(conversions: Written, tmp_path: Path) -> Callable[..., Path]:
    """A conversion of the variant, as nobody's output, with these keys of config.json (None: without it)."""

    def made(variant: str, keys: Mapping[str, Any] = {}, *absent: str) -> Path:
        folder = tmp_path / "in"
        shutil.copytree(conversions(variant), folder)
        (folder / "ckpt-tool.json").unlink()
        config = {**json.loads((folder / "config.json").read_text()), **keys}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))
        return folder

    return made


def refused(folder: Path, to: str, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(CkptToolError) as caught:
        api.plan(folder, to=to, options=Options(**options))
    return caught.value.problems


def planned(folder: Path, to: str, **options: Any) -> dict[str, Any]:
    """The values that the plan writes, by every name that they have."""
    return {k: v.value for k, v in api.plan(folder, to=to, options=Options(**options)).config.items()}


# --- rotary values in every spelling --------------------------------------------------------------------

# a variant of each family that turns, with the way in which config.json is read
TURNED = {
    "mistral-7b-v0.1": "original",
    "mixtral-c": "original",
    "code-llama-7b": "original",
    "qwen2-0.5b": "hf",
    "qwen3-0.6b": "hf",
    "gemma-2-2b": "hf",
    "pythia-410m": "hf",
}
BOTH_WAYS = [*TURNED.items(), *((v, "original") for v, to in TURNED.items() if to == "hf")]
KINDS = ("full_attention", "sliding_attention")


def base_of(folder: Path) -> tuple[str, float]:
    config = json.loads((folder / "config.json").read_text())
    name = classes()[config["model_type"]].aliases.get("rope_theta", ("rope_theta",))[0]
    return name, config[name]


SPELLED: dict[str, Callable[[float], dict[str, Any]]] = {
    "one object": lambda b: {"rope_parameters": {"rope_type": "default", "rope_theta": b}},
    "each kind of layer": lambda b: {
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": b} for k in KINDS}
    },
    "inside the scaling": lambda b: {"rope_scaling": {"rope_type": "default", "rope_theta": b}},
    "the older word": lambda b: {"rope_scaling": {"type": "default", "rope_theta": b}},
}


@pytest.mark.parametrize("spelling", SPELLED)
@pytest.mark.parametrize(("variant", "to"), BOTH_WAYS)
def test_a_base_is_read_in_every_spelling(
    variant: str, to: str, spelling: str, edited: Callable[..., Path], conversions: Written
) -> None:
    name, base = base_of(conversions(variant))
    alone = edited(variant, {"rope_scaling": None, **SPELLED[spelling](base)}, name)
    assert base in [v for v in planned(alone, to).values() if isinstance(v, int | float)]
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**config, name: 3 * base}))
    (problem,) = refused(alone, to)
    assert (problem.kind, problem.where) == (
        "bad-config",
        "rope_theta",
    ) and "expected one value" in problem.message
    assert problem.hint == "--set rope_theta=VALUE says which"
    for chosen in (base, 3 * base):
        values = planned(alone, to, settings={"rope_theta": chosen}).values()
        assert chosen in [v for v in values if isinstance(v, int | float)]


ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown kind": ({"rope_scaling": {"rope_type": "stretchy", "factor": 2.0}}, "unsupported", "stretchy"),
    "two kinds": ({"rope_scaling": {"rope_type": "linear", "type": "yarn"}}, "bad-config", "yarn"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "bad-config", "a value beside rope_type linear"),
    "no kind": ({"rope_scaling": {"factor": 2.0}}, "bad-config", "rope_type beside factor"),
    "true as a factor": ({"rope_scaling": {"rope_type": "yarn", "factor": True}}, "bad-config", "found true"),
    "trained for two lengths": (
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        },
        "bad-config",
        "original_max_position_embeddings 64",
    ),
    "other values in some layers": (
        {"rope_parameters": {KINDS[0]: {"rope_theta": 1e4}, KINDS[1]: {"rope_theta": 1e6}}},
        "unsupported",
        "the same rotary values in all layers",
    ),
    "text": ({"rope_scaling": "linear"}, "bad-config", "an object or null"),
    "a list": ({"rope_parameters": [1]}, "bad-config", "an object or null"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("variant", "to"), BOTH_WAYS)
def test_rotary_values_that_nobody_reads_are_refused_by_name(
    variant: str, to: str, name: str, edited: Callable[..., Path]
) -> None:
    keys, kind, said = ODD[name]
    problems = refused(edited(variant, keys), to)
    assert any(p.kind == kind and said in p.message for p in problems), problems
    assert all(p.file == "config.json" for p in problems)


def test_what_the_user_says_twice_is_refused(edited: Callable[..., Path]) -> None:
    folder = edited("mistral-7b-v0.1")
    twice = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}
    (problem,) = refused(folder, "original", settings=twice)
    assert (problem.kind, problem.file) == ("usage", "--set") and "rope_theta 10000" in problem.message
    assert planned(folder, "original", settings={**twice, "rope_theta": 2e4})["rope_theta"] == 2e4


def test_names_that_the_user_gives_twice_are_refused(originals: Written) -> None:
    folder = originals("codegen-350m-mono")
    (problem,) = refused(folder, "hf", settings={"n_embd": 32, "hidden_size": 48})
    assert problem.kind == "usage" and "n_embd 32 and hidden_size 48" in problem.message


def test_set_comes_before_a_config_file_in_any_spelling(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2}}))
    found = api.settings(["rope_theta=7"], file)
    assert found == {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_theta": 7}


# --- other values ---------------------------------------------------------------------------------------

BAD, NOT, ONE_WAY = "bad-config", "unsupported", "use_bidirectional_attention"
VALUES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "window of none": ("qwen2-window", {"sliding_window": 0}, BAD, "sliding_window"),
    "window as text": ("qwen3-0.6b", {"sliding_window": "4096"}, BAD, "sliding_window"),
    "window true": ("gemma-2-2b", {"sliding_window": True}, BAD, "sliding_window"),
    "window of zero": ("gemma-2-2b", {"sliding_window": 0}, BAD, "sliding_window"),
    "mistral window": ("mistral-7b-v0.1", {"sliding_window": "32"}, BAD, "sliding_window"),
    "kinds of layers": ("mistral-7b-v0.1", {"layer_types": ["full_attention"]}, BAD, "layer_types"),
    "unknown kinds": ("qwen2-0.5b", {"layer_types": ["linear_attention"] * 4}, NOT, "layer_types"),
    "a flag of one": ("qwen3-0.6b", {"use_sliding_window": 1}, BAD, "use_sliding_window"),
    "tied by null": ("gemma-2-2b", {"tie_word_embeddings": None}, BAD, "tie_word_embeddings"),
    "both ways": ("gemma-2-2b", {ONE_WAY: True}, NOT, ONE_WAY),
    "both activations": ("gemma-2-2b", {"hidden_act": "gelu"}, BAD, "hidden_activation"),
    "no activation": ("pythia-410m", {"hidden_act": "geluu"}, NOT, "hidden_act"),
    "opt's activation": ("opt-bare", {"activation_function": "rellu"}, NOT, "activation_function"),
    "gpt2's activation": ("gpt2-v1-bare", {"activation_function": "gelux"}, NOT, "activation_function"),
    "bert's activation": ("bert-v1-bare", {"hidden_act": 3}, NOT, "hidden_act"),
    "parts": ("qwen2-0.5b", {"text_config": {"hidden_size": 8}}, NOT, "text_config"),
    "one for true": ("qwen3-0.6b", {"attention_bias": 0}, BAD, "attention_bias"),
    "true for one": ("codegen-350m-mono", {"n_layer": True}, BAD, "n_layer"),
    "two widths": ("codegen-350m-mono", {"hidden_size": 3}, BAD, "n_embd"),
    "two counts": ("gpt2-v1-bare", {"num_hidden_layers": 3}, BAD, "n_layer"),
    "base of text": ("pythia-410m", {"rotary_emb_base": "1e4"}, BAD, "rotary_emb_base"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_no_class_takes_is_refused_either_way(name: str, edited: Callable[..., Path]) -> None:
    variant, keys, kind, where = VALUES[name]
    folder = edited(variant, keys)
    published = {"qwen2": "hf", "qwen3": "hf", "gemma": "hf", "pythia": "hf", "codegen": "hf"}
    for to in {"original", published.get(variant.partition("-")[0].rstrip("."), "original")}:
        problems = refused(folder, to)
        assert any((p.kind, p.where) == (kind, where) for p in problems), problems
        assert all("expected" in p.message and p.file in ("config.json", None) for p in problems)


def test_a_likely_name_is_told(edited: Callable[..., Path]) -> None:
    (problem,) = refused(edited("pythia-410m", {"hidden_act": "geluu"}), "hf")
    assert "gelu?" in problem.message and problem.hint == "--set hidden_act=VALUE"


def test_generic_names_are_read_where_the_class_takes_them(edited: Callable[..., Path]) -> None:
    folder = edited("codegen-350m-mono")
    config = json.loads((folder / "config.json").read_text())
    generic = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    (folder / "config.json").write_text(json.dumps({generic.get(k, k): v for k, v in config.items()}))
    made = planned(folder, "hf")
    assert {k: made[k] for k in generic} == {k: config[k] for k in generic}
    assert not made.keys() & set(generic.values())


DEFAULTS = {"mistral-7b-v0.1": 8, "mixtral-c": 8, "qwen2-0.5b": 32, "qwen3-0.6b": 32, "gemma-2-2b": 4}


@pytest.mark.parametrize("variant", DEFAULTS)
def test_an_absent_count_of_groups_is_the_default_of_its_class(
    variant: str, edited: Callable[..., Path]
) -> None:
    """These tiny models have others, which the shapes tell; Llama's class has as many as query heads."""
    problems = refused(edited(variant, {}, "num_key_value_heads"), "original")
    assert any(
        f"num_key_value_heads {DEFAULTS[variant]}" in p.message and "rule: default of" in p.message
        for p in problems
    ), problems


def test_a_class_without_a_default_has_as_many_groups_as_heads(edited: Callable[..., Path]) -> None:
    made = api.plan(edited("llama-2-7b", {}, "num_key_value_heads"), to="original")
    assert made.config["n_heads"].value and "n_kv_heads" not in made.config


def test_what_is_set_against_the_kinds_of_layers_is_refused_before_writing(
    edited: Callable[..., Path],
) -> None:
    folder = edited("gemma-2-2b")
    count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    kinds = [KINDS[(i + 1) % 2] for i in range(count)]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": kinds}))
    assert planned(folder, "hf")["layer_types"] == kinds
    (problem,) = refused(folder, "hf", settings={"num_hidden_layers": count + 1})
    assert problem.where == "layer_types" and problem.hint and "--set layer_types=" in problem.hint
    (problem,) = refused(folder, "hf", settings={"layer_types": kinds[:-1]})
    assert (problem.where, problem.file) == ("layer_types", "--set")


# --- heads that should be the embedding -----------------------------------------------------------------

HEAD = "lm_head.weight"
# variant -> the head, the tensor that it repeats, the direction, whether the user may untie them
TIED: dict[str, tuple[str, str, str, bool]] = {
    "mistral-float32": (HEAD, "model.embed_tokens.weight", "original", True),
    "llama-3.2-1b": (HEAD, "model.embed_tokens.weight", "original", True),
    "llama-1-13b": (HEAD, "model.embed_tokens.weight", "original", True),
    "qwen2-0.5b": (HEAD, "model.embed_tokens.weight", "hf", True),
    "qwen1.5-0.5b": (HEAD, "model.embed_tokens.weight", "original", True),
    "qwen2-mcore-tied": (HEAD, "model.embed_tokens.weight", "original", True),
    "qwen3-float32": (HEAD, "model.embed_tokens.weight", "original", True),
    "qwen3-0.6b": (HEAD, "model.embed_tokens.weight", "hf", True),
    "gemma-2-2b": (HEAD, "model.embed_tokens.weight", "original", True),
    "gpt-neox-tied": ("embed_out.weight", "gpt_neox.embed_in.weight", "original", True),
    "gpt2-2023-float32": (HEAD, "transformer.wte.weight", "original", True),
    "gpt2-v2-tp2": (HEAD, "transformer.wte.weight", "original", True),
    "opt-float32": (HEAD, "model.decoder.embed_tokens.weight", "original", False),
    "opt-bare": (HEAD, "model.decoder.embed_tokens.weight", "original", False),
    "bert-2023-float32": (
        "cls.predictions.decoder.weight",
        "bert.embeddings.word_embeddings.weight",
        "original",
        False,
    ),
    "bert-v2-tp2": ("cls.predictions.decoder.bias", "cls.predictions.bias", "original", False),
}


@pytest.fixture
def with_head(edited: Callable[..., Path]) -> Callable[..., Path]:
    """The variant tied by its config, with a head of the embedding's values but for the last row."""

    def made(variant: str, *, other: bool, head: bool = True, tied: bool = True) -> Path:
        folder = edited(variant, {"tie_word_embeddings": tied})
        (file,) = folder.glob("*.safetensors")
        tensors = read_tensors(file)
        name, words, *_ = TIED[variant]
        tensors.pop(name, None)
        dtype, shape, data = tensors[words]
        if head:
            tensors[name] = dtype, shape, data[:-1] + bytes([data[-1] ^ 0x01]) if other else data
        write_tensors(file, tensors)
        return folder

    return made


@pytest.mark.parametrize("variant", TIED)
def test_a_tied_head_of_other_values_is_refused_and_each_hint_leads_out(
    variant: str, with_head: Callable[..., Path], tmp_path: Path
) -> None:
    folder, (name, words, to, unties) = with_head(variant, other=True), TIED[variant]
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", to=to)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("tied-mismatch", name) and words in problem.message
    assert "1 of " in problem.message and "max |delta|" in problem.message
    assert ("; 1 of " in problem.message) == (not name.endswith("bias"))
    assert not (tmp_path / "out").exists()
    hint = f"--drop {name} uses the embedding"
    assert problem.hint == (f"--set tie_word_embeddings=false keeps both; {hint}" if unties else hint)
    dropped = api.plan(folder, to=to, options=Options(drop=(name,)))
    assert [d.tensor.name for d in dropped.dropped] == [name]
    if unties:
        kept = api.plan(folder, to=to, options=Options(settings={"tie_word_embeddings": False}))
        assert not any(step.compare for step in kept.steps)
        assert name in {p.name for step in kept.steps for p in step.sources}


@pytest.mark.parametrize("variant", TIED)
def test_a_tied_head_of_equal_values_converts(
    variant: str, with_head: Callable[..., Path], tmp_path: Path
) -> None:
    name, _, to, _ = TIED[variant]
    made = api.convert(with_head(variant, other=False), tmp_path / "out", to=to, check=False)
    assert [s.sources[0].name for s in made.plan.steps if s.compare] == [name]


@pytest.mark.parametrize("variant", [v for v, (*_, unties) in TIED.items() if unties])
def test_a_head_that_is_not_there_is_asked_for_by_name(variant: str, with_head: Callable[..., Path]) -> None:
    folder, (name, _, to, _) = with_head(variant, other=False, head=False, tied=False), TIED[variant]
    (problem,) = refused(folder, to)
    assert (problem.kind, problem.where) == ("missing-tensor", name)
    assert problem.hint == "--set tie_word_embeddings=true if the output layer is the embedding"
    assert api.plan(folder, to=to, options=Options(settings={"tie_word_embeddings": True})).steps


def test_a_mixtral_that_says_it_is_tied_can_be_told_otherwise(edited: Callable[..., Path]) -> None:
    folder = edited("mixtral-c", {"tie_word_embeddings": True})
    (problem,) = refused(folder, "original")
    assert problem.kind == "unsupported"
    assert problem.hint == "--set tie_word_embeddings=false if the file is wrong"
    assert planned(folder, "original", settings={"tie_word_embeddings": False})


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_case_of_a_tied_config_with_an_own_head(family: str, tmp_path: Path) -> None:
    folder = case("tied_config_with_own_head")
    with pytest.raises(CkptToolError, match="tied-mismatch"):
        api.convert(folder / family, tmp_path / "out", family=family, to="original")
    options = Options(settings={"tie_word_embeddings": False})
    api.convert(folder / family, tmp_path / "out", family=family, to="original", options=options)
    head = read_tensors(folder / family / "model.safetensors")[HEAD][2]
    with api.open_for(tmp_path / "out") as checkpoint:
        (info,) = checkpoint.find("output.weight")
        found = bytearray(info.nbytes)
        checkpoint.read_into(info, 0, memoryview(found))
    assert bytes(found) == head
    api.convert(folder / "llama_equal", tmp_path / "equal", family="llama", to="original")


@pytest.mark.parametrize(("family", "to", "base"), [("llama", "original", 250000.0), ("qwen2", "hf", 1e6)])
def test_the_case_of_two_rotary_bases(family: str, to: str, base: float, tmp_path: Path) -> None:
    folder = case("config_two_rope_thetas") / family
    (problem,) = refused(folder, to)
    assert (problem.kind, problem.file) == ("bad-config", "config.json")
    assert (
        f"rope_parameters.rope_theta {base:.0f}" in problem.message and "rope_theta 10000" in problem.message
    )
    made = planned(folder, to, settings={"rope_theta": base})
    assert made["rope_theta"] == base


# --- rotary frequencies among the weights ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "to", "name", "pairs"),
    [
        ("pythia-410m", "hf", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", 3),
        ("llama-2-7b", "original", "model.layers.0.self_attn.rotary_emb.inv_freq", 5),
        ("mistral-float32", "original", "model.layers.0.self_attn.rotary_emb.inv_freq", 5),
        ("qwen3-float32", "hf", "model.rotary_emb.inv_freq", 8),
    ],
)
def test_stored_frequencies_of_another_base_are_said(
    variant: str, to: str, name: str, pairs: int, edited: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edited(variant)
    (file,) = folder.glob("*.safetensors")
    tensors, (_, base) = read_tensors(file), base_of(folder)
    for k, stored in enumerate((base, 7 * base)):
        values = [stored ** (-i / pairs) for i in range(pairs)]
        write_tensors(file, {**tensors, name: ("F32", [pairs], struct.pack(f"<{pairs}f", *values))})
        made = api.convert(folder, tmp_path / str(k), to=to)
        found = [f for f in made.outcome.findings if f.kind == "stale-frequencies"]
        assert [f.tensor for f in found] == [name][:k]
        assert all(f"{base:g}" in f.message and f"{7 * base:g}" in f.message for f in found)


# --- chat templates -------------------------------------------------------------------------------------

JINJA = {
    "chat_template.jinja": b"{{ messages }}\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
LISTED = [{"name": "default", "template": "{{ old }}"}, {"name": "tool_use", "template": "{{ tools }}"}]


@pytest.fixture
def templated(originals: Written, tmp_path: Path) -> Callable[..., Path]:
    """A published original with chat templates in files of their own, or in tokenizer_config.json."""

    def made(variant: str, files: Mapping[str, bytes], listed: Any = None) -> Path:
        folder = tmp_path / "in"
        shutil.copytree(originals(variant), folder)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        if listed is not None:
            file = folder / "tokenizer_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
        return folder

    return made


PUBLISHED = ["qwen2-0.5b", "qwen3-0.6b", "gemma-2-2b", "pythia-410m"]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_chat_templates_are_carried_over_both_ways(
    variant: str, templated: Callable[..., Path], tmp_path: Path
) -> None:
    files = {**JINJA, "chat_template.json": b'{"chat_template": "{{ messages }}"}'}
    folder = templated(variant, files, [{**LISTED[0], "template": "{{ messages }}"}, LISTED[1]])
    there = api.convert(folder, tmp_path / "there")
    back = api.convert(tmp_path / "there", tmp_path / "back", to="original")
    for made in (there, back):
        assert {n: (made.out / n).read_bytes() for n in files} == files
        assert (made.out / "tokenizer_config.json").read_bytes() == (
            folder / "tokenizer_config.json"
        ).read_bytes()
        assert not [n for n in made.plan.notes if "chat template" in n]
    again = api.convert(folder, tmp_path / "there", overwrite=True)  # a folder inside is the output's own
    assert (again.out / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"{{ tools }}"


@pytest.mark.parametrize("variant", PUBLISHED)
def test_which_of_two_chat_templates_counts_is_said(variant: str, templated: Callable[..., Path]) -> None:
    notes = api.plan(templated(variant, JINJA, LISTED)).notes
    (said,) = [n for n in notes if "chat template" in n]
    assert (
        "tokenizer_config.json has another chat template (default) than" in said and "transformers 5" in said
    )


def test_a_chat_template_that_is_changed_or_missing_is_a_difference(
    templated: Callable[..., Path], tmp_path: Path
) -> None:
    folder = templated("qwen2-0.5b", JINJA)
    out = api.convert(folder, tmp_path / "out").out
    changed = out / "additional_chat_templates" / "tool_use.jinja"
    for content in (b"{{ other }}", None):
        changed.unlink() if content is None else changed.write_bytes(content)
        report = api.verify(out, folder, levels=["coverage"])
        found = [f for f in report.findings if f.status == "fail"]
        assert any("tool_use" in str(f.where) for f in found), found


def test_templates_are_found_in_an_archive_and_beside_a_tokenizer(
    templated: Callable[..., Path], originals: Written, tmp_path: Path
) -> None:
    folder = templated("qwen2-0.5b", JINJA)
    archive = shutil.make_archive(str(tmp_path / "model"), "tar", tmp_path, "in")
    for plan in (
        api.plan(archive),
        api.plan(originals("qwen2-0.5b"), options=Options(tokenizer=str(folder))),
    ):
        found = {d.name: d.content for d in plan.documents}
        assert {n: found[n] for n in JINJA} == JINJA


def test_the_table_takes_several_families(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from ckpt_tool import table

    def made(variants: list[Any], *_: Any) -> list[table.Row]:
        return [table.Row(v.family, v.id, 1, "pass", None, None, "equal", "pass") for v in variants]

    monkeypatch.setattr(table, "rows", made)
    assert table.run(only=("qwen3", "gemma2"), judge=False, as_json=True, screen=Console()) == 0
    assert {row["family"] for row in json.loads(capsys.readouterr().out)} == {"qwen3", "gemma2"}
    with pytest.raises(CkptToolError, match="'nonsense'"):
        table.run(only=("qwen3", "nonsense"), judge=False, as_json=True, screen=Console())
