"""Mistral AI's originals of 2025-26: what params.json says of them and what config.json makes of it, both
ways; mistakes of others, which are caught and named; positions past the length of the training."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.recognising import recognise
from ckpt_tool.convert.tokenizers import tokenizer_documents
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.ministral3 import LENGTH, ministral3
from ckpt_tool.fixtures.tokenizers import tekken_2025
from ckpt_tool.verify import verify
from ckpt_tool.verify.sides import converted_side, original_side
from ckpt_tool.verify.subject import opened
from tests import world

pytestmark = pytest.mark.usefixtures("one_thread")

Written = Callable[[str], Path]
VARIANT = "ministral3-3b"
CASES = Path(__file__).parents[2] / "shared" / "cases"
BETA = "llama_4_scaling_beta"
NULL = object()


def small(folder: Path, **told: Any) -> Path:
    """An original of two layers."""
    made = ministral3(40, 2, 12, 56, 4, 2, 320, theta=3e4, longest=1024, length=64, betas=(4, 1), **told)
    return made.write(folder, "small")


def altered(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of the original with other values in params.json; None takes one out, `__` goes inwards."""
    shutil.copytree(source, folder)
    params = json.loads((folder / "params.json").read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        place = params
        for key in outer:
            place = place[key]
        place.pop(last, None)
        if value is not None:
            place[last] = value
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def document(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def changed(folder: Path, **rotary: Any) -> None:
    """Other values among the rotary ones of config.json; None takes one out, `NULL` stands for null."""
    config = document(folder)
    made = {k: v for k, v in {**config["rope_parameters"], **rotary}.items() if v is not None}
    config["rope_parameters"] = {k: None if v is NULL else v for k, v in made.items()}
    (folder / "config.json").write_text(json.dumps(config))


# --- params.json ----------------------------------------------------------------------------------------

REFUSED = {
    "apply_scale is not told": ({"yarn__apply_scale": None}, "missing-fact", "readers disagree"),
    "apply_scale is no flag": ({"yarn__apply_scale": 1}, "bad-config", "expected true or false, found 1"),
    "two lengths": ({"llama_4_scaling__original_max_position_embeddings": 32}, "unsupported", "expected 64"),
    "no length of texts": ({"max_position_embeddings": None}, "missing-fact", "how long texts may be"),
    "beta is text": ({"llama_4_scaling__beta": "a"}, "bad-config", "llama_4_scaling.beta"),
    "a factor that is not there": ({"yarn__factor": None}, "missing-fact", "yarn.factor"),
    "yarn not in whole channels": ({"yarn__truncate": False}, "unsupported", "expected true, found false"),
    "an unknown value of yarn": ({"yarn__gamma": 3}, "unsupported", "yarn.gamma"),
    "windows that differ": ({"sliding_window": [8, None]}, "unsupported", "one window for all layers"),
    "no window in the list": ({"sliding_window": []}, "unsupported", "found none"),
    "growth without yarn": ({"yarn": {}}, "unsupported", "expected yarn beside it"),
    "experts": ({"moe": {"num_experts": 4, "num_experts_per_tok": 2}}, "unsupported", "moe"),
    "latent attention": ({"kv_lora_rank": 8}, "unsupported", "multi-head latent attention"),
    "a draft of another": ({"is_eagle": True}, "unsupported", "is_eagle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_params_that_leave_a_question_are_refused(name: str, originals: Written, tmp_path: Path) -> None:
    values, kind, said = REFUSED[name]
    source = altered(originals(VARIANT), tmp_path / "in", **values)
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "out", family="ministral3")
    assert caught.value.problems[0].kind == kind
    assert said in caught.value.text()
    assert "expected None" not in caught.value.text() and "moe." not in caught.value.text()
    assert not (tmp_path / "out").exists()


def test_what_was_asked_can_be_told(originals: Written, tmp_path: Path) -> None:
    source = altered(
        originals(VARIANT), tmp_path / "in", yarn__apply_scale=None, max_position_embeddings=None
    )
    told = api.Options(settings={"apply_scale": True, "max_position_embeddings": 2048})
    plan = api.convert(source, tmp_path / "out", options=told, check=False).plan
    assert plan.config["max_position_embeddings"].value == 2048
    rotary = plan.config["rope_parameters"].value
    assert (rotary["mscale"], rotary["mscale_all_dim"]) == (1.0, 0.0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("growth", [None, 0.25])
def test_params_come_back_from_config_alone(scaled: bool, growth: float | None, tmp_path: Path) -> None:
    """Without the manifest, which has the original's own text."""
    source = small(tmp_path / "in", scaled=scaled, growth=growth)
    api.convert(source, tmp_path / "hf", check=False)
    (tmp_path / "hf" / "ckpt-tool.json").unlink()
    assert document(tmp_path / "hf")["rope_parameters"][BETA] == (growth or 0.0)
    changed(tmp_path / "hf", **{LENGTH: 64.0})
    api.convert(tmp_path / "hf", tmp_path / "back", to="original", family="ministral3", check=False)
    found, told = (document(folder, "params.json") for folder in (tmp_path / "back", source))
    assert found == {k: v for k, v in told.items() if v is not False or k != "tied_embeddings"}
    assert world.equal(world.tensors_of(tmp_path / "back"), world.tensors_of(source))


def test_the_window_may_be_text_or_a_list_of_one(tmp_path: Path, originals: Written) -> None:
    for k, value in enumerate(("48", [48], [48, 48])):
        source = altered(originals(VARIANT), tmp_path / f"in{k}", sliding_window=value)
        plan = api.plan(source, family="ministral3")
        assert plan.config["sliding_window"].value == 48


NOT_SAID = {
    "no growth is told": ({BETA: None}, "bad-config", BETA),
    "another attention factor": ({"attention_factor": 1.1}, "unsupported", "found 1.1"),
    "one scale of two": ({"mscale_all_dim": 0.5}, "unsupported", "expected an attention factor"),
    "not in whole channels": ({"truncate": False}, "unsupported", "truncate"),
    "another rotary": ({"rope_type": "linear"}, "unsupported", "expected rope_type yarn"),
    "a growth of null": ({BETA: NULL}, "bad-config", BETA),
    "a length of null": ({LENGTH: NULL}, "bad-config", LENGTH),
    "a scale that is text": ({"mscale": "x"}, "bad-config", "mscale"),
    "no length": ({LENGTH: None}, "bad-config", LENGTH),
    "a length in parts": ({LENGTH: 64.5}, "bad-config", "a whole number"),
    "beta below 0": ({BETA: -0.1}, "bad-config", BETA),
}


@pytest.mark.parametrize("name", NOT_SAID)
def test_what_params_cannot_say_is_refused(name: str, conversions: Written, tmp_path: Path) -> None:
    values, kind, said = NOT_SAID[name]
    folder = Path(shutil.copytree(conversions(VARIANT), tmp_path / "hf"))
    changed(folder, **values)
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "out", to="original", family="ministral3")
    assert caught.value.problems[0].kind == kind
    assert said in caught.value.text()


def test_yarn_tells_the_family(originals: Written, tmp_path: Path) -> None:
    def owners(folder: Path) -> list[str]:
        return [name for name, own, _ in recognise(open_checkpoint(folder)) if own]

    assert owners(originals(VARIANT)) == ["ministral3"]
    plain = altered(originals(VARIANT), tmp_path / "in", yarn=None, llama_4_scaling=None)
    assert owners(plain) == ["mistral"]


def test_the_layout_is_chosen_by_the_names_of_files(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(originals(VARIANT), tmp_path / "in"))
    for file in ("model.safetensors", "config.json"):
        shutil.copyfile(conversions(VARIANT) / file, folder / file)
    made = api.convert(folder, tmp_path / "out", check=False)
    assert any("model.safetensors" in note for note in made.opened)
    out, wanted = (f / "model.safetensors" for f in (tmp_path / "out", conversions(VARIANT)))
    assert out.read_bytes() == wanted.read_bytes()


# --- what verification sees -----------------------------------------------------------------------------

MISTAKES: Mapping[str, tuple[dict[str, Any], str]] = {
    "the other apply_scale": ({"mscale_all_dim": 0.0}, "mscale_all_dim"),
    "queries do not grow": ({BETA: 0.0}, BETA),
    "yarn between channels": ({"truncate": False}, "truncate"),
    "another length": ({LENGTH: 128}, LENGTH),
}


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("two-layers")
    source = small(root / "in")
    api.convert(source, root / "hf", check=False)
    (root / "hf" / "ckpt-tool.json").unlink()
    return source, root / "hf"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_others_is_caught_and_named(
    name: str, two_layers: tuple[Path, Path], tmp_path: Path
) -> None:
    values, words = MISTAKES[name]
    source, right = two_layers
    folder = Path(shutil.copytree(right, tmp_path / "hf"))
    changed(folder, **values)
    report = verify(folder, source, levels="parity", mode="quick")
    assert report.exit_code == 1
    causes = [str(f.data["cause"]) for f in report.level("diagnosis") if f.data["cause"] is not None]
    assert causes and all(words in cause for cause in causes), causes


def test_no_growth_of_queries_shows_beyond_the_length_alone(
    two_layers: tuple[Path, Path], tmp_path: Path
) -> None:
    """Prompts of 600 tokens end before the 16,384 of the published models; one that begins there does not."""
    source, right = two_layers
    params = {"yarn__" + LENGTH: 16384, "llama_4_scaling__" + LENGTH: 16384}
    source = altered(source, tmp_path / "in", **params)
    folder = Path(shutil.copytree(right, tmp_path / "hf"))
    changed(folder, **{LENGTH: 16384, BETA: 0.0})
    report = verify(folder, source, levels="parity")
    assert report.exit_code == 1
    (found,) = (f for f in report.findings if f.check == "logits")
    assert "worst prompt far" in found.message
    notes = [f.message for f in report.findings if f.check == "unseen"]
    assert any("positions 49,132 to 49,171" in n for n in notes)


def test_a_factor_that_is_no_ratio_is_told_and_taken(two_layers: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = altered(two_layers[0], tmp_path / "in", max_position_embeddings=512)
    api.convert(source, tmp_path / "out", check=False)
    report = verify(tmp_path / "out", source, levels="coverage", against="transformers", mode="quick")
    assert report.exit_code == 0
    assert any("RoPE scaling factor" in f.message for f in report.findings if f.check == "warnings")


def converted_as_said(name: str, out: Path) -> tuple[Path, dict[str, torch.Tensor], list[float]]:
    """A public case, converted: its values and its tensors are those of its README. The case, what it
    expects, and how far the logits of both readings are from that, which deviate by some 7."""
    case = CASES / name
    if not case.is_dir():
        pytest.skip("the cases are not beside this checkout")
    api.convert(case, out, check=False)
    wanted, config = document(case, "hf_config.json"), document(out)
    wanted["torch_dtype"] = wanted.pop("dtype")
    assert {k: config[k] for k in wanted} == wanted
    tensors = world.tensors_of(out)
    digests = {n: [str(t.dtype).removeprefix("torch."), [*t.shape], digest(t)] for n, t in tensors.items()}
    assert digests == document(case, "hf_names.json")
    expected = load_file(case / "expected.safetensors")
    with opened(out, case, {}) as subject:
        sides = (side(subject, torch.float32, "cpu") for side in (original_side, converted_side))
        found = [side.forward(expected["ids"][None])[0] for side in sides]
    return case, expected, [float((x - expected["logits_float32"]).abs().max()) for x in found]


def test_the_case_of_2025_has_the_values_of_its_readme(tmp_path: Path) -> None:
    *_, off = converted_as_said("mistral-2025-tiny", tmp_path / "out")
    assert len(off) == 2 and max(off) < 1e-3


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


# --- the tokenizer --------------------------------------------------------------------------------------

TEXTS = ("Hello world", " leading", "two  spaces\n\nlines", "naïve 北京 🙂 1234", "def f(x):\n    return x")


def test_mistral_common_reads_the_tokenizers_of_2025_alike(tmp_path: Path) -> None:
    """In a process of its own: where it can be imported, transformers prefers it to tokenizer.json."""
    judge = Path(__file__).parents[1] / ".judges" / "mistral-common"
    if not judge.is_dir():
        pytest.skip("mistral_common is not set up; `make test` does it")
    versions = ("v11", "v13", "v15")
    for version in versions:
        (tmp_path / f"{version}.json").write_bytes(tekken_2025(600, version=version))
    script = (
        "import json, sys\n"
        "from mistral_common.tokens.tokenizers.tekken import Tekkenizer\n"
        "texts, versions = map(json.loads, sys.argv[1:])\n"
        "read = [Tekkenizer.from_file(f'{v}.json') for v in versions]\n"
        "assert [t.image.spatial_merge_size for t in read] == [2] * len(read)\n"
        "print(json.dumps([[t.encode(text, bos=True, eos=False) for text in texts] for t in read]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(TEXTS), json.dumps(versions)]
    env = {**os.environ, "PYTHONPATH": str(judge)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    for version, wanted in zip(versions, json.loads(run.stdout.splitlines()[-1]), strict=True):
        data = (tmp_path / f"{version}.json").read_bytes()
        made = tokenizer_documents({"tekken.json": data}, family="ministral3", config={"vocab_size": 600})
        assert made.documents["tekken.json"] == data
        tokenizer = Tokenizer.from_str(made.documents["tokenizer.json"].decode())
        assert [tokenizer.encode(text).ids for text in TEXTS] == wanted, version
        assert tokenizer.token_to_id("[IMG]") == 10 and tokenizer.token_to_id("[THINK]") == 22


# --- a model that reads images --------------------------------------------------------------------------

IMAGES = "mistral3-images"


def tower(
    w: Mapping[str, torch.Tensor], told: Mapping[str, Any], eps: float, image: torch.Tensor
) -> torch.Tensor:
    """What the original makes of one image (3, H, W), after mistral-inference @2557e12d (vision_encoder.py):
    patches are turned by row and column, each half of a head's pairs by one; then the tokens for the text."""

    def norm(x: torch.Tensor, name: str, eps: float = 1e-5) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    p = "vision_encoder."
    x = torch.nn.functional.conv2d(image[None], w[f"{p}patch_conv.weight"], stride=told["patch_size"])[0]
    _, rows, columns = x.shape
    x = norm(x.flatten(1).T, f"{p}ln_pre")  # (patches, width), row after row
    n = told["num_attention_heads"]
    width = x.shape[1] // n
    pairs = 1.0 / told["rope_theta"] ** (torch.arange(0, width, 2) / width)
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    angles = torch.cat([torch.outer(row, pairs[::2]), torch.outer(column, pairs[1::2])], dim=1)
    turned = torch.polar(torch.ones_like(angles), angles)[:, None]  # (patches, 1, pairs)
    for i in range(told["num_hidden_layers"]):
        s = f"{p}transformer.layers.{i}."
        y = norm(x, f"{s}attention_norm")
        q, k, v = ((y @ w[f"{s}attention.w{a}.weight"].T).view(len(y), n, width) for a in "qkv")
        q, k = (torch.view_as_complex(a.reshape(*a.shape[:2], -1, 2)) * turned for a in (q, k))
        q, k = (torch.view_as_real(a).flatten(-2) for a in (q, k))
        weights = (torch.einsum("qnh,knh->nqk", q, k) / width**0.5).softmax(-1)
        x = x + torch.einsum("nqk,knh->qnh", weights, v).flatten(1) @ w[f"{s}attention.wo.weight"].T
        y = norm(x, f"{s}ffn_norm")
        gate, up = (y @ w[f"{s}feed_forward.{a}.weight"].T for a in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{s}feed_forward.w2.weight"].T
    x, m = norm(x, "pre_mm_projector_norm", eps), told["spatial_merge_size"]
    grid = x.view(rows // m, m, columns // m, m, -1).permute(0, 2, 4, 1, 3)  # each channel's m x m together
    x = grid.flatten(2).flatten(0, 1) @ w["patch_merger.merging_layer.weight"].T
    x = torch.nn.functional.gelu(x @ w["vision_language_adapter.w_in.weight"].T)
    return x @ w["vision_language_adapter.w_out.weight"].T


def test_the_tower_computes_in_transformers_what_the_original_does(
    originals: Written, conversions: Written
) -> None:
    transformers = pytest.importorskip("transformers")
    params = document(originals(IMAGES), "params.json")
    told = params["vision_encoder"]
    w = {n: t.float() for n, t in load_file(originals(IMAGES) / "consolidated.safetensors").items()}
    side = told["patch_size"] * told["spatial_merge_size"]
    image = torch.randn(3, 3 * side, 2 * side, generator=torch.Generator().manual_seed(7))
    wanted = tower(w, told, params["norm_eps"], image)

    def found(folder: Path) -> torch.Tensor:
        model = transformers.Mistral3ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            sizes = torch.tensor([image.shape[1:]])
            (made,) = model.model.get_image_features(image[None], sizes).pooler_output
        return made

    made = found(conversions(IMAGES))
    assert made.shape == wanted.shape == (6, params["dim"])
    assert (made - wanted).abs().max() < 1e-4 * wanted.std()


def in_memory_names(folder: Path) -> None:
    """As whoever saves state_dict() itself has it."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        text = name.replace("language_model.model.", "language_model.")
        tensors["lm_head.weight" if name.endswith("lm_head.weight") else f"model.{text}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "ckpt-tool.json").unlink()


def test_both_spellings_of_names_go_back(originals: Written, conversions: Written, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(conversions(IMAGES), tmp_path / "hf"))
    in_memory_names(folder)
    made = api.convert(folder, tmp_path / "back", to="original", family="ministral3", check=False)
    assert made.plan.family == "ministral3"
    assert world.equal(world.tensors_of(tmp_path / "back"), world.tensors_of(originals(IMAGES)))
    report = verify(folder, originals(IMAGES), levels=("coverage", "bits"))
    assert report.exit_code == 0


def test_a_folder_that_reads_images_is_carried(conversions: Written, tmp_path: Path) -> None:
    """From the Hugging Face layout to itself: its config.json in parts, as it is but for what is asked."""
    hf = conversions(IMAGES)
    api.convert(hf, tmp_path / "again", check=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (hf / name).read_bytes()
    report = verify(tmp_path / "again", hf, levels=("coverage", "bits"))
    assert report.exit_code == 0
    wide, before = Options(dtype="F32"), document(hf, "config.json")
    api.convert(hf, tmp_path / "wide", options=wide, check=False)
    assert document(tmp_path / "wide", "config.json") == {**before, "torch_dtype": "float32"}
    newer = Path(shutil.copytree(hf, tmp_path / "newer"))  # as release 5 calls it
    said = {k: v for k, v in before.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    (newer / "config.json").write_text(json.dumps(said))
    (newer / "ckpt-tool.json").unlink()
    api.convert(newer, tmp_path / "newer-wide", options=wide, check=False)
    assert document(tmp_path / "newer-wide", "config.json") == {**said, "dtype": "float32"}
    asked = Options(settings={"rms_norm_eps": 1e-6})
    api.convert(hf, tmp_path / "other", options=asked, check=False)
    text = {**before["text_config"], "rms_norm_eps": 1e-6}
    assert document(tmp_path / "other", "config.json") == {**before, "text_config": text}


@pytest.mark.parametrize("change", ["more", "class", "none"])
def test_a_folder_that_reads_images_has_what_its_class_has(
    change: str, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions(IMAGES), tmp_path / "hf"))
    (folder / "ckpt-tool.json").unlink()
    config = document(folder, "config.json")
    if change == "more":
        tensors = load_file(folder / "model.safetensors")
        more = {**tensors, "vision_tower.more.weight": torch.ones(3)}
        save_file(more, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "class":
        config["architectures"] = ["Mistral3ForTokenClassification"]
    else:
        del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    if change == "none":  # the class that the family has for this model_type
        assert api.plan(folder).family == "ministral3"
        return
    with pytest.raises(CkptToolError) as caught:
        api.plan(folder)
    assert len(caught.value.problems) == 1
    told = {"more": "vision_tower.more.weight", "class": "such as Mistral3ForConditionalGeneration, found"}
    assert told[change] in str(caught.value) and "Masked" not in str(caught.value)


OTHER_IMAGES = {
    "no merging layer": ({"vision_encoder__mm_projector_id": "other"}, "unsupported", "mm_projector_id"),
    "no norm": ({"vision_encoder__add_pre_mm_projector_layer_norm": False}, "unsupported", "add_pre_mm"),
    "an unknown value": ({"vision_encoder__windowed": True}, "unsupported", "vision_encoder.windowed"),
    "other heads": ({"vision_encoder__num_attention_heads": 5}, "config-mismatch", "5 heads"),
    "another width": ({"vision_encoder__hidden_size": 40}, "config-mismatch", "hidden_size"),
    "no layers told": ({"vision_encoder__num_hidden_layers": None}, "missing-fact", "num_hidden_layers"),
    "a layer too few": ({"vision_encoder__num_hidden_layers": 2}, "uncovered-tensors", "layers.2"),
}


@pytest.mark.parametrize("name", OTHER_IMAGES)
def test_another_part_for_images_is_refused(name: str, originals: Written, tmp_path: Path) -> None:
    values, kind, said = OTHER_IMAGES[name]
    source = altered(originals(IMAGES), tmp_path / "in", **values)
    with pytest.raises(CkptToolError) as caught:
        api.convert(source, tmp_path / "out", family="ministral3")
    assert caught.value.problems[0].kind == kind
    assert said in caught.value.text()


def test_a_text_model_without_yarn_may_read_images(originals: Written, tmp_path: Path) -> None:
    """As those of Mistral Small 3.1 do; older ones without a patch merger are refused."""
    source = altered(originals(IMAGES), tmp_path / "in", yarn=None, llama_4_scaling=None)
    api.convert(source, tmp_path / "out")
    text = document(tmp_path / "out")["text_config"]
    assert (text["model_type"], text["rope_parameters"]) == (
        "mistral", {"rope_type": "default", "rope_theta": 20000.0},
    )  # fmt: skip
    report = verify(tmp_path / "out", source, levels=("coverage", "bits", "parity"), mode="quick")
    assert report.exit_code == 0
    said = [f.message for f in report.findings if f.check == "unseen"]
    assert any("the part that reads images: 33 tensors are read by no pass here" in t for t in said)
    assert "; the part that reads images by its bits alone" in report.headline
    (files,) = (n for n in api.plan(source).notes if "processor_config.json" in n)
    assert files.endswith("(patch_size 4, spatial_merge_size 2)")


def test_adapters_have_the_biases_that_are_there(originals: Written, tmp_path: Path) -> None:
    """The publisher's code takes biases where nothing is said, its releases say that there are none."""
    source = altered(originals(IMAGES), tmp_path / "in", vision_encoder__adapter_bias=None)
    assert api.plan(source).config["multimodal_projector_bias"].value is False
    file = source / "consolidated.safetensors"
    more = {
        f"vision_language_adapter.w_{n}.bias": torch.ones(44, dtype=torch.bfloat16) for n in ("in", "out")
    }
    save_file({**load_file(file), **more}, file)
    api.convert(source, tmp_path / "hf", check=False)
    (tmp_path / "hf" / "ckpt-tool.json").unlink()
    assert document(tmp_path / "hf")["multimodal_projector_bias"] is True
    api.convert(tmp_path / "hf", tmp_path / "back", to="original", family="ministral3", check=False)
    assert world.equal(world.tensors_of(tmp_path / "back"), world.tensors_of(source))
    assert document(tmp_path / "back", "params.json")["vision_encoder"]["adapter_bias"] is True


def test_the_part_for_images_may_be_told_in_either_place(originals: Written, tmp_path: Path) -> None:
    told = document(originals(IMAGES), "params.json")["vision_encoder"]
    wanted = {n: v.value for n, v in api.plan(originals(IMAGES)).config.items()}
    for k, first in enumerate((None, told)):
        again = {"vision_encoder": first, "multimodal": {"vision_encoder_args": told}}
        source = altered(originals(IMAGES), tmp_path / f"in{k}", **again)
        assert {n: v.value for n, v in api.plan(source).config.items()} == wanted


def test_two_bases_of_the_part_for_images_are_a_difference(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """transformers 5 reads the one in rope_parameters, older releases the one beside it."""
    folder = Path(shutil.copytree(conversions(IMAGES), tmp_path / "hf"))
    config = document(folder)
    config["vision_config"]["rope_theta"] = 1e4
    (folder / "config.json").write_text(json.dumps(config))
    report = verify(folder, originals(IMAGES), levels="coverage")
    wrong = [f.where for f in report.findings if f.status == "fail" and f.check == "config"]
    assert "config.json: vision_config.rope_parameters" in wrong


def test_the_whole_decides_whether_the_head_is_the_embedding(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions(IMAGES), tmp_path / "hf"))
    config = document(folder)
    assert config.pop("tie_word_embeddings") is False
    config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ckpt-tool.json").unlink()
    report = verify(folder, originals(IMAGES), levels="coverage")
    assert [f.where for f in report.findings if f.status == "fail" and f.check == "config"]


# --- weights in eight bits ------------------------------------------------------------------------------


def in_codes(source: Path, folder: Path, *, inputs: bool = True, images: bool = False) -> Path:
    """The original with codes and one scale for each matrix of the text model's layers."""
    shutil.copytree(source, folder)
    file, made = folder / "consolidated.safetensors", {}
    for name, tensor in load_file(file).items():
        if not name.startswith("layers.") or tensor.ndim == 1:
            made[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        stem = name.removesuffix("weight")
        made |= {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{stem}qscale_weight": scale}
        made |= {f"{stem}qscale_act": scale * 3} if inputs else {}
    made["layers.0.attention.k_fake_quantizer.qscale_act"] = torch.tensor(0.5)
    save_file(made, file)
    told = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR" if inputs else "NO_SCALES"}
    params = document(folder, "params.json") | {"quantization": told}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture(scope="module")
def coded(two_layers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_codes(two_layers[0], tmp_path_factory.mktemp("coded") / "in")


def with_tensors(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the original with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "consolidated.safetensors")
    change(tensors)
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("inputs", [True, False])
def test_codes_and_scales_are_carried_both_ways(
    images: bool, inputs: bool, two_layers: tuple[Path, Path], originals: Written, tmp_path: Path
) -> None:
    source = in_codes(originals(IMAGES) if images else two_layers[0], tmp_path / "in", inputs=inputs)
    plan = api.convert(source, tmp_path / "hf", check=False).plan
    assert [d.tensor.name for d in plan.dropped] == ["layers.0.attention.k_fake_quantizer.qscale_act"]
    config = document(tmp_path / "hf")
    packing = config["quantization_config"]
    assert packing["activation_scheme"] == ("static" if inputs else "dynamic")
    parts = ["model.vision_tower", "model.multi_modal_projector"] if images else []
    assert packing["modules_to_not_convert"] == [*parts, "lm_head"]
    found, wanted = world.tensors_of(tmp_path / "hf"), load_file(source / "consolidated.safetensors")
    root = "language_model." if images else ""
    name = f"{root}model.layers.1.self_attn.q_proj."
    own = "layers.1.attention.wq."
    assert torch.equal(found[f"{name}weight_scale_inv"], wanted[f"{own}qscale_weight"])
    assert (f"{name}activation_scale" in found) is inputs
    (tmp_path / "hf" / "ckpt-tool.json").unlink()
    api.convert(tmp_path / "hf", tmp_path / "back", to="original", family="ministral3", check=False)
    del wanted["layers.0.attention.k_fake_quantizer.qscale_act"]
    back = load_file(tmp_path / "back" / "consolidated.safetensors")
    assert back.keys() == wanted.keys()
    assert all(digest(back[n]) == digest(wanted[n]) for n in wanted)
    told = document(tmp_path / "back", "params.json")["quantization"]
    assert told == document(source, "params.json")["quantization"]


def test_carried_codes_are_verified(coded: Path, tmp_path: Path) -> None:
    api.convert(coded, tmp_path / "hf", check=False)
    report = verify(tmp_path / "hf", coded, levels=("coverage", "bits", "parity"), mode="quick")
    assert report.exit_code == 0
    folder = Path(shutil.copytree(tmp_path / "hf", tmp_path / "wrong"))
    tensors = load_file(folder / "model.safetensors")
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file(
        {**tensors, scale: tensors[scale] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert verify(folder, coded, levels="parity", mode="quick").exit_code == 1


def test_transformers_judges_codes_beside_numbers(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes numbers of the codes where there is no accelerator, and leaves bfloat16 beside them."""
    fp8 = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    monkeypatch.setattr(fp8, "is_accelerate_available", lambda *_: True)  # which it does not come to use
    api.convert(coded, tmp_path / "hf", check=False)
    report = verify(tmp_path / "hf", coded, levels="coverage", against="transformers", mode="quick")
    assert report.exit_code == 0 and ("transformers", "logits", "pass") in {
        (f.level, f.check, f.status) for f in report.findings
    }


def test_a_scale_for_each_row_goes_with_its_row(coded: Path, tmp_path: Path) -> None:
    def by_rows(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".qscale_weight")]:
            rows = len(tensors[name.replace("qscale_weight", "weight")])
            tensors[name] = tensors[name] * torch.linspace(1, 2, rows)

    source = with_tensors(coded, tmp_path / "in", by_rows)
    made = api.convert(source, tmp_path / "hf", check=False)
    said = made.plan.config["quantization_config"].value
    assert said["quant_method"] == "compressed-tensors" and said["ignore"] == ["lm_head"]
    with open_checkpoint(tmp_path / "hf") as checkpoint:  # as the loaders of that method have them
        (scale,) = checkpoint.find("model.layers.0.self_attn.q_proj.weight_scale")
        assert scale.shape == (checkpoint.find("model.layers.0.self_attn.q_proj.weight")[0].shape[0], 1)
    assert verify(tmp_path / "hf", source, levels=("bits", "parity"), mode="quick").exit_code == 0
    api.convert(tmp_path / "hf", tmp_path / "back", to="original", family="ministral3", check=False)
    wanted = {n: t for n, t in world.tensors_of(source).items() if "fake_quantizer" not in n}
    assert world.equal(world.tensors_of(tmp_path / "back"), wanted)


@pytest.mark.parametrize("images", [False, True])
def test_a_layer_of_numbers_is_named_alone(
    images: bool, coded: Path, originals: Written, tmp_path: Path
) -> None:
    """Were the whole text model named, its codes would be read as its numbers."""

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        layer = "layers.1.feed_forward.w2."
        numbers = tensors[f"{layer}weight"].float() * tensors.pop(f"{layer}qscale_weight")
        del tensors[f"{layer}qscale_act"]
        tensors[f"{layer}weight"] = numbers.bfloat16()

    source = in_codes(originals(IMAGES), tmp_path / "codes") if images else coded
    config = api.plan(with_tensors(source, tmp_path / "in", plain)).config
    named = config["quantization_config"].value["modules_to_not_convert"]
    root = "model.language_model" if images else "model"
    parts = ["model.vision_tower", "model.multi_modal_projector"] if images else []
    assert named == [f"{root}.layers.1.mlp.down_proj", *parts, "lm_head"]


def embedding_in_codes(tensors: dict[str, torch.Tensor]) -> None:
    name = "tok_embeddings.weight"
    more = {name: tensors[name].to(torch.float8_e4m3fn)}
    tensors |= more | {f"tok_embeddings.qscale_{n}": torch.tensor(0.5) for n in ("weight", "act")}


def no_inputs(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("qscale_act")]:
        del tensors[name]


ODD_CODES: Mapping[str, tuple[Callable[[dict[str, torch.Tensor]], Any], Any, str, str]] = {
    "one scale of inputs is missing": (
        lambda t: t.pop("layers.1.attention.wk.qscale_act"), "TENSOR", "missing-tensor", "found none of 1",
    ),
    "no scale of inputs": (no_inputs, "TENSOR", "config-mismatch", "expected NO_SCALES"),
    "scales of inputs unsaid": (lambda t: None, "NO_SCALES", "config-mismatch", "expected TENSOR"),
    "an embedding": (embedding_in_codes, "TENSOR", "unsupported", "no loader knows codes of it"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_CODES)
def test_codes_that_no_loader_would_read_are_refused(name: str, coded: Path, tmp_path: Path) -> None:
    change, scheme, kind, said = ODD_CODES[name]
    source = altered(
        with_tensors(coded, tmp_path / "a", change), tmp_path / "b", quantization__qscheme_act=scheme
    )
    with pytest.raises(CkptToolError) as caught:
        api.plan(source)
    assert [p.kind for p in caught.value.problems] == [kind]
    assert said in caught.value.text()


def test_a_scale_of_inputs_is_missed_on_the_way_back(coded: Path, tmp_path: Path) -> None:
    api.convert(coded, tmp_path / "hf", check=False)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.activation_scale"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CkptToolError, match="expected a scale of the inputs"):
        api.plan(tmp_path / "hf", to="original")


def test_the_case_of_eight_bits_has_the_values_of_its_readme(tmp_path: Path) -> None:
    case, expected, off = converted_as_said("mistral-fp8-tiny", tmp_path / "out")
    assert len(off) == 2 and max(off) < 1e-3
    for recipe, prefix in (("fp32-product", "fp32_product."), ("bf16-scale", "bf16_scale.")):
        options = api.Options(dequantize="BF16", recipe=recipe)
        api.convert(case, tmp_path / recipe, options=options, check=False)
        made = world.tensors_of(tmp_path / recipe)
        own = {n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix)}
        assert own and all(torch.equal(made[n], t) for n, t in own.items())
        assert "quantization_config" not in document(tmp_path / recipe)
