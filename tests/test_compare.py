"""`compare`: two checkpoints of one architecture in any two layouts, shardings and dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool.api import Options, convert
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.compare import compare
from ckpt_tool.verify.comparing_tensors import EIGHTS
from ckpt_tool.verify.report import Finding
from tests.in_process import program

Written = Callable[[str], Path]
VARIANT = "mistral-float32"


def differing(report: Any, level: str = "tensors") -> dict[str, Finding]:
    found = [f for f in report.findings if f.level == level and f.status == "fail" and f.where]
    return {str(f.where): f for f in found}


def tuned(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], to: Path) -> Path:
    """A copy of a converted folder with other weights."""
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    "variant",
    [VARIANT, "mixtral-b", "llama-1-13b", "gpt2-v3-tp2-pp2", "qwen2-dense", "qwen3-mcore", "opt-125m"],
)
def test_an_original_is_equal_to_what_was_made_of_it(
    variant: str, originals: Written, conversions: Written
) -> None:
    if variant not in VARIANTS:  # any of the family
        variant = next(v for v in VARIANTS if VARIANTS[v].family == variant.split("-")[0])
    report = compare(originals(variant), conversions(variant), family=VARIANTS[variant].family)
    assert (report.status, report.exactness) == ("pass", "bit-identical"), report.headline
    assert "original" in report.facts["A"] and "Hugging Face" in report.facts["B"]


def test_two_originals_of_other_shardings(originals: Written, conversions: Written, tmp_path: Path) -> None:
    back = tmp_path / "back"
    convert(conversions("llama-1-13b"), back, family="llama", to="original", options=Options(shards=1))
    report = compare(originals("llama-1-13b"), back)
    assert report.exactness == "bit-identical", report.headline
    assert "2 files" in report.facts["A"] and "1 file" in report.facts["B"]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_a_cast_is_told_from_a_change(
    dtype: str, torch_dtype: torch.dtype, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    def cast(t: dict[str, torch.Tensor]) -> None:
        t.update({k: v.to(torch_dtype) for k, v in t.items()})

    def wrong(t: dict[str, torch.Tensor]) -> None:
        cast(t)
        t["model.norm.weight"][3] *= 1.25

    there = tuned(conversions(VARIANT), cast, tmp_path / "cast")
    report = compare(originals(VARIANT), there, logits=False)
    assert report.exactness == "identical after cast", report.headline
    assert compare(there, originals(VARIANT), logits=False).exactness == "identical after cast"
    report = compare(originals(VARIANT), tuned(conversions(VARIANT), wrong, tmp_path / "w"), logits=False)
    assert report.status == "fail" and list(differing(report)) == ["model.norm.weight"]


def test_of_two_dtypes_of_16_bits_either_may_be_made_of_the_other(
    conversions: Written, tmp_path: Path
) -> None:
    def as_type(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(t: dict[str, torch.Tensor]) -> None:
            t.update({k: v.to(torch.bfloat16).to(dtype) for k, v in t.items()})

        return change

    a = tuned(conversions(VARIANT), as_type(torch.bfloat16), tmp_path / "a")
    b = tuned(conversions(VARIANT), as_type(torch.float16), tmp_path / "b")
    assert compare(a, b, logits=False).exactness == "identical after cast"
    assert compare(b, a, logits=False).exactness == "identical after cast"


@pytest.mark.parametrize(
    ("dtype", "a", "b", "delta"),
    [
        (torch.float8_e4m3fn, 2.0, -4.0, 6.0),
        (torch.float8_e5m2, 2**-16, 57344.0, 57344 - 2**-16),
        (torch.int8, -1, 1, 2.0),
        (torch.int64, 2**60, 2**60 + 1, 1.0),
        (torch.bool, False, True, 1.0),
        (torch.float64, 1e200, -1e200, 2e200),
    ],
)
def test_values_of_any_dtype_are_what_they_are(
    dtype: torch.dtype, a: float, b: float, delta: float, conversions: Written, tmp_path: Path
) -> None:
    """That none of them can be computed of is told."""
    name = "model.layers.0.self_attn.q_proj.weight"

    def all_of(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda t: t.update({name: torch.tensor([value] * 6, dtype=dtype).reshape(2, 3)})

    one, other = (tuned(conversions(VARIANT), all_of(v), tmp_path / str(v)) for v in (a, b))
    report = compare(one, other, logits=None if dtype == torch.int8 else False)
    found = differing(report)[name]
    assert f"{a!r} in A and {b!r} in B".replace("False", "0").replace("True", "1") in found.message
    assert found.data["max_delta"] == delta and found.data["relative"] > 0
    assert [f.status for f in report.findings if f.check == "lockstep"] == ["skipped"] * (dtype == torch.int8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_of_8_bits(dtype: torch.dtype) -> None:
    held = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[dtype]
    assert np.array_equal(EIGHTS[name], held, equal_nan=True)


def test_which_layers_of_a_fine_tune_moved_and_how_far(conversions: Written, tmp_path: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t["model.layers.1.self_attn.q_proj.weight"] *= 1.5
        t["model.layers.0.mlp.up_proj.weight"] = t["model.layers.0.mlp.up_proj.weight"].roll(3, 0)
        t["model.embed_tokens.weight"][10:13] += 0.5

    there = tuned(conversions(VARIANT), change, tmp_path / "tuned")
    report = compare(conversions(VARIANT), there)
    assert (report.status, report.exactness) == ("fail", "differs")
    found = differing(report)
    assert len(found) == 3
    q = found["model.layers.1.self_attn.q_proj.weight"]
    assert q.data["relative"] == pytest.approx(0.5, rel=1e-6)
    assert "rows 10 to 12" in found["model.embed_tokens.weight"].message
    assert "another order" in found["model.layers.0.mlp.up_proj.weight"].message
    summary = next(f for f in report.findings if f.check == "all tensors")
    moved = {str(row[0]): row for row in summary.tables[0].rows if str(row[1])[0] != "0"}
    assert moved.keys() == {"layer 0", "layer 1", "model.embed_tokens"}
    before = load_file(conversions(VARIANT) / "model.safetensors")
    layer = [v.double() for k, v in before.items() if k.startswith("model.layers.1.")]
    own = before["model.layers.1.self_attn.q_proj.weight"].double()
    size = float(np.sqrt(sum(float(v.square().sum()) for v in layer)))
    assert moved["layer 1"][2] == pytest.approx(0.5 * float(own.norm()) / size, rel=1e-6)
    phases = {str(r[0]): r[-1] for f in report.findings if f.check == "lockstep" for r in f.tables[0].rows}
    assert {k for k, word in phases.items() if word} == {"embed", "layer 0", "layer 1"}


def test_rounding_is_within_the_policy_of_its_dtype(conversions: Written, tmp_path: Path) -> None:
    def cast(t: dict[str, torch.Tensor]) -> None:
        t.update({k: v.bfloat16() for k, v in t.items()})

    report = compare(conversions(VARIANT), tuned(conversions(VARIANT), cast, tmp_path / "cast"))
    assert report.status == "pass", report.headline
    numbers = {f.check: f for f in report.findings if f.level == "numbers"}
    assert numbers["logits"].bar == 1e-2 and 1e-8 < (numbers["logits"].measured or 0) < 1e-2
    assert "bfloat16" in numbers["lockstep"].message


def test_values_tokenizers_and_tensors_of_one_side_alone(conversions: Written, tmp_path: Path) -> None:
    def drop(t: dict[str, torch.Tensor]) -> None:
        del t["model.norm.weight"]
        t["extra.weight"] = torch.ones(2)

    there = tuned(conversions(VARIANT), drop, tmp_path / "there")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "rope_theta": 123.0}))
    tokens = json.loads((there / "tokenizer.json").read_text())
    first = next(iter(tokens["model"]["vocab"]))
    text = (there / "tokenizer.json").read_text().replace(json.dumps(first), json.dumps(first + "x"))
    (there / "tokenizer.json").write_text(text)
    report = compare(conversions(VARIANT), there, logits=False)
    assert set(differing(report)) == {"model.norm.weight", "extra.weight"}
    assert "rope_theta" in differing(report, "config")
    assert differing(report, "tokenizer")


def test_a_tied_head_may_be_stored_or_not(originals: Written, tmp_path: Path) -> None:
    variant = next(v for v in VARIANTS if VARIANTS[v].family == "qwen2" and "tied" in VARIANTS[v].description)
    a, b = tmp_path / "a", tmp_path / "b"
    convert(originals(variant), a, family="qwen2")
    assert json.loads((a / "config.json").read_text())["tie_word_embeddings"] is True

    def store(t: dict[str, torch.Tensor]) -> None:
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()

    def other(t: dict[str, torch.Tensor]) -> None:
        t["lm_head.weight"] = t["model.embed_tokens.weight"] + 1

    assert compare(a, tuned(a, store, b)).status == "pass"
    assert compare(a, tuned(a, other, tmp_path / "c"), logits=False).status == "fail"


@pytest.mark.parametrize("change", [0, 1000])
def test_what_loading_makes_anew_may_be_stored_by_one_side(
    change: int, conversions: Written, tmp_path: Path
) -> None:
    """As pytorch_model.bin of transformers 4 has a tied layer twice, and older ones rotary frequencies."""
    folder = conversions("gpt-neox-tied")
    config = json.loads((folder / "config.json").read_text())
    turned = int(config["hidden_size"] / config["num_attention_heads"] * config["rotary_pct"])
    inv_freq = (config["rotary_emb_base"] + change) ** -(torch.arange(0, turned, 2).float() / turned)

    def store(t: dict[str, torch.Tensor]) -> None:
        t["embed_out.weight"] = t["gpt_neox.embed_in.weight"] + change
        t["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = inv_freq

    report = compare(tuned(folder, store, tmp_path / "a"), folder, logits=False)
    assert report.exactness == ("differs" if change else "bit-identical"), report.headline
    alone = {f.where: f.status for f in report.findings if f.check == "only one side"}
    assert len(alone) == 2 and set(alone.values()) == {"fail" if change else "note"}


def test_tables_of_an_old_checkpoint_are_not_differences(originals: Written, conversions: Written) -> None:
    report = compare(originals("pythia-410m"), conversions("pythia-410m"))
    assert report.exactness == "bit-identical", report.headline


def test_the_command(conversions: Written, originals: Written, tmp_path: Path) -> None:
    a, b = str(originals(VARIANT)), str(conversions(VARIANT))
    done = program("compare", a, b, cwd=tmp_path)
    assert done.returncode == 0 and "bit-identical" in done.stdout, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if "/" not in line) <= 80
    there = tuned(Path(b), lambda t: t["model.norm.weight"].add_(1), tmp_path / "there")
    done = program("compare", a, str(there), "--no-logits", "--json", "--html", "x.html", cwd=tmp_path)
    assert done.returncode == 1 and json.loads(done.stdout)["status"] == "fail"
    assert "model.norm.weight" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("nowhere", "also"), "not-found"),
        (("a", "a", "--family", "none"), "usage"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], kind: str, tmp_path: Path, conversions: Written) -> None:
    (tmp_path / "a").symlink_to(conversions(VARIANT))
    done = program("compare", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.split("]")[0]) == (2, f"error[{kind}")


def test_other_architectures_are_not_compared_by_chance(conversions: Written) -> None:
    other = next(v for v in VARIANTS if VARIANTS[v].family == "opt")
    try:
        report = compare(conversions(VARIANT), conversions(other), logits=False)
    except CkptToolError:
        return
    assert report.status == "fail"


def test_a_verdict_names_what_was_compared_only(conversions: Written, tmp_path: Path) -> None:
    """No tokenizer is on one side; numbers that were asked for and cannot be computed are no pass."""
    q = "model.layers.0.self_attn.q_proj.weight"
    same = "the tensors, the values of the configuration and the tokenizer are the same"
    assert compare(conversions(VARIANT), conversions(VARIANT)).headline == same
    bare = tuned(conversions(VARIANT), lambda t: t.update({q: t[q].to(torch.int8)}), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer.model"):
        (bare / name).unlink(missing_ok=True)
    report = compare(bare, bare)
    assert report.headline == (
        "the tensors and the values of the configuration are the same; tokenizer not compared: the two have "
        "no tokenizer file in common"
    )
    report = compare(bare, bare, logits=True)
    assert report.status == "undecided" and report.headline.startswith(
        "--logits was asked for and did not run: "
    )


# --- of no family: as stored ----------------------------------------------------------------------------

FOREIGN = {
    "tower.0.w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "tower.0.code": torch.tensor([3, 200], dtype=torch.uint8),
    "odd": torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
}


def test_what_acts_elsewhere_than_in_the_numbers_is_in_the_headline(
    conversions: Written, tmp_path: Path
) -> None:
    """Values for training and sampling, and other files of one name that loaders put on top of the model."""
    for side, rate in (("a", 0.0), ("b", 0.5)):
        out = shutil.copytree(conversions(VARIANT), tmp_path / side)
        (out / "adapter_config.json").write_text(json.dumps({"lora_alpha": rate}))
        for name, change in (("config", {"attention_dropout": rate}), ("generation_config", {"top_k": 5})):
            file = out / f"{name}.json"
            if side == "b":
                file.write_text(json.dumps(json.loads(file.read_text()) | change))
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.status == "pass" and report.headline.endswith(
        "; values for training alone are others, which are noted"
        "; generation_config.json says other things, which are noted"
        "; files that loaders take with the model are others, which are noted"
    )
    (tmp_path / "b" / "generation_config.json").unlink()
    assert "; generation_config.json is in A alone" in compare(tmp_path / "a", tmp_path / "b").headline


def test_links_among_what_loaders_take_are_compared_by_where_they_lead(
    conversions: Written, tmp_path: Path
) -> None:
    """One to nothing, as a cache that was cleared leaves it, ended the comparison with exit code 2."""
    for side in ("a", "b"):
        out = shutil.copytree(conversions(VARIANT), tmp_path / side)
        (out / "custom_generate").symlink_to(tmp_path)
    assert "loaders take" not in compare(tmp_path / "a", tmp_path / "b").headline
    for side in ("a", "b"):
        (tmp_path / side / "adapter_model.safetensors").symlink_to(tmp_path / "nothing")
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.status == "pass" and report.headline.endswith(
        "; files that loaders take with the model are not readable, which are noted"
    )


def test_states_of_a_training_run_are_left_out_in_the_headline(conversions: Written, tmp_path: Path) -> None:
    out = shutil.copytree(conversions(VARIANT), tmp_path / "out")
    (out / "optimizer").mkdir()
    states = {f"exp_avg.{k}": torch.zeros(2) for k in ("a", "b")}
    save_file(states, out / "optimizer" / "exp_avg-00001-of-00001.safetensors")
    report = compare(conversions(VARIANT), out)
    assert report.status == "pass"
    assert "; 2 in the files were left out and not compared" in report.headline
    (found,) = (f for f in report.findings if f.check == "left out")
    assert found.message == "not compared: exp_avg.a, exp_avg.b of B, left out (states of a training run)"
    (out / "optimizer" / "exp_avg-00001-of-00001.safetensors").write_bytes(b"no states")
    assert "; 1 in the files were left out and not compared" in compare(conversions(VARIANT), out).headline


def foreign(path: Path, **changed: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(FOREIGN | changed, path)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tensors_of_no_family_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """A torch.distributed folder with the same bits in safetensors; nothing of the layout is claimed."""
    import torch.distributed.checkpoint as dcp

    state = FOREIGN | {"opt": {"state": {"0": {"exp_avg": torch.ones(2)}}}}
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    report = compare(tmp_path / "run", foreign(tmp_path / "b.safetensors"))
    assert (report.status, report.exactness) == ("pass", "bit-identical")
    assert report.judgement.headline == (
        "the tensors are the same under the names that they are stored by; 1 in the files were left out and "
        "not compared; as no family recognises them, nothing of their layout or of what they compute is "
        "claimed"
    )
    assert [f.level for f in report.findings] == ["tensors", "tensors"]


def test_of_no_family_what_differs_is_named(tmp_path: Path) -> None:
    one = foreign(tmp_path / "a" / "a.safetensors")
    other = foreign(tmp_path / "b" / "b.safetensors", odd=FOREIGN["odd"].abs())
    found = differing(compare(one, other))
    assert list(found) == ["odd"] and found["odd"].data["count"] == 1
    wide = foreign(tmp_path / "c" / "c.safetensors", **{"tower.0.w": FOREIGN["tower.0.w"].double()})
    report = compare(one, wide)
    assert report.exactness == "identical after cast" and "cast; as no family" in report.judgement.headline
    longer = foreign(tmp_path / "d" / "d.safetensors", more=torch.ones(1))
    assert differing(compare(one, longer))["more"].message == "expected it on both sides, found it in B alone"


def test_of_no_family_config_json_is_compared_by_its_values(tmp_path: Path) -> None:
    one, other = (foreign(tmp_path / x / "model.safetensors").parent for x in "ab")
    (one / "config.json").write_text('{"model_type": "towers", "depth": 3}')
    report = compare(one, other)
    assert report.status == "pass" and "config not compared: A alone has a config.json" in report.headline
    (other / "config.json").write_text('{"depth": 3, "model_type": "towers"}')
    report = compare(one, other)
    assert report.status == "pass" and "not compared" not in report.headline
    (other / "config.json").write_text('{"depth": 4, "model_type": "towers", "wide": null}')
    report = compare(one, other)
    assert report.status == "fail" and "config.json: other values for depth, wide" in report.headline


def test_without_config_json_names_of_the_library_are_compared_as_stored(
    conversions: Written, tmp_path: Path
) -> None:
    alone = tmp_path / "alone" / "weights.safetensors"
    alone.parent.mkdir()
    shutil.copyfile(conversions(VARIANT) / "model.safetensors", alone)
    report = compare(conversions(VARIANT), alone)
    assert report.status == "pass" and report.judgement.headline.endswith("is claimed")


def test_what_no_name_tells_apart_stays_an_error(tmp_path: Path) -> None:
    one = foreign(tmp_path / "a" / "a.safetensors")
    other = tmp_path / "b" / "b.safetensors"
    other.parent.mkdir()
    save_file({"else": torch.ones(1)}, other)
    with pytest.raises(CkptToolError, match="expected names that are in both") as caught:
        compare(one, other)
    assert {p.kind for p in caught.value.problems} == {"unknown-family"}
    for asked in ({"logits": True}, {"family": "opt"}, {"settings": {"rope_theta": 1e4}}):
        with pytest.raises(CkptToolError) as caught:
            compare(one, one, **asked)  # type: ignore[arg-type]
        assert "as stored" not in str(caught.value)
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for k in range(2):
        torch.save(FOREIGN, ranks / f"consolidated.0{k}.pth")
    with pytest.raises(CkptToolError, match="expected one tensor of each name") as caught:
        compare(ranks, ranks)


CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"


@pytest.mark.parametrize("case", ["tf-dtypes", "tf-slices", "torch-dist-dcp-plain"])
def test_folders_that_their_own_libraries_wrote_are_what_these_gave(case: str) -> None:
    if not (CASES / case).is_dir():
        pytest.skip("the folders are not there")
    expected = CASES / case / "expected.safetensors"
    report = compare(CASES / case / "ckpt", expected)
    assert (report.status, report.exactness) == ("pass", "bit-identical")
    numbers = [v for v in load_file(expected).values() if not v.is_complex()]
    count = len(numbers) - (case == "torch-dist-dcp-plain")  # the state of an optimizer is left out
    assert f"all {count} tensors are equal, bit for bit" in [f.message for f in report.findings]
