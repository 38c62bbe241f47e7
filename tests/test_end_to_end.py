"""Every variant of every family: converted, proved at every level, judged by transformers, sent back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from ckpt_tool import api, table
from ckpt_tool.convert.facts import classes
from ckpt_tool.convert.facts_parts import in_one_row
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from tests import loaded
from tests.conftest import kind
from tests.in_process import program

Written = Callable[[str], Path]
# What the current release of transformers has dropped is judged by the oldest one.
DROPPED = ("mega",)
# What transformers loads with accelerate alone; without it test_house_reference.py has its model as a judge.
ACCELERATED = ("gpt-oss",)


def test_every_family_has_variants() -> None:
    assert {v.family for v in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_picks_the_family(variant: str, originals: Written) -> None:
    with api.open_checkpoint(originals(variant)) as checkpoint:
        if variant == "llama-mcore":  # in Megatron-Core's names Llama and Mistral are the same
            with pytest.raises(CkptToolError, match="llama and mistral"):
                api.choose(checkpoint)
        else:
            assert api.choose(checkpoint).name == VARIANTS[variant].family


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_holds_what_the_original_means(variant: str, conversions: Written) -> None:
    config = json.loads((conversions(variant) / "config.json").read_text())
    expected = VARIANTS[variant].true_config
    if (parts := classes()[config["model_type"]].parts) is not None:
        config = in_one_row(config, parts)
    assert {k: config.get(k) for k in expected} == expected
    assert set(config["architectures"]) <= set(family(VARIANTS[variant].family).architectures)


@dataclass(frozen=True)
class Ready:
    """A download that has been written."""

    path: Path

    def write(self, folder: Path, model: str, seed: int) -> Path:
        return self.path


# Of a config.json what a release loads or reports by and no pass computes with.
NOT_COMPUTED = ("torch_dtype", "output_router_logits", "router_aux_loss_coef")
NOT_COMPUTED += ("bos_token_id", "eos_token_id", "pad_token_id")


def computed(folder: Path) -> str:
    """What is computed of it, but for sizes and other numbers."""
    values = json.loads(kind(folder))
    return json.dumps({k: v for k, v in values.items() if k not in NOT_COMPUTED and v is not None})


@pytest.fixture(scope="module")
def first_of_kind(conversions: Written) -> set[str]:
    return set({computed(conversions(v)): v for v in reversed(VARIANTS)}.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_verified_at_every_level_judged_and_round_tripped(
    variant: str,
    first_of_kind: set[str],
    originals: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The first of each kind with every prompt; of another one of it, layouts and sizes differ."""
    if variant not in first_of_kind:
        request.getfixturevalue("few_prompts")
    if VARIANTS[variant].family in DROPPED:
        monkeypatch.setenv("CKPT_TOOL_TRANSFORMERS", loaded.python("tf4.37"))
    judged = find_spec("accelerate") is not None or VARIANTS[variant].family not in ACCELERATED
    found = table.row(replace(VARIANTS[variant], original=Ready(originals(variant))), tmp_path, judge=judged)
    assert found.verdict == "pass", found
    assert found.bits == "pass"
    assert found.parity_nmse is not None and found.parity_nmse <= 1e-10
    if judged:
        assert found.judge_nmse is not None and found.judge_nmse <= 1e-10


@pytest.mark.parametrize("variant", ["mistral-7b-v0.1", "mixtral-b", "llama-3-70b"])
def test_float64_parity(variant: str, originals: Written, conversions: Written) -> None:
    report = api.verify(
        conversions(variant),
        originals(variant),
        levels=("parity",),
        compute_dtype="float64",
        settings=VARIANTS[variant].settings,
    )
    assert report.exit_code == 0
    (logits,) = (f for f in report.findings if f.check == "logits")
    assert logits.data["max_delta"] <= 1e-9


def test_equal_inputs_give_equal_bytes(originals: Written, tmp_path: Path) -> None:
    for name in ("a", "b"):
        api.convert(originals("mixtral-a"), tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes()
        for n in names
        if (tmp_path / "a" / n).is_file()
    )


def test_shards_and_index_hold_every_tensor_once(originals: Written, tmp_path: Path) -> None:
    options = api.Options(max_shard_bytes=100_000)
    api.convert(originals("mistral-7b-v0.3"), tmp_path / "out", options=options)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    held: dict[str, str] = {}
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}
            for name in f.keys():  # noqa: SIM118 - not a dict
                assert name not in held
                held[name] = file.name
                total += f.get_tensor(name).nbytes
    assert index["weight_map"] == held and index["metadata"]["total_size"] == total


@pytest.mark.parametrize("ranks", [1, 4])
def test_re_sharding_gives_back_the_same_model(
    ranks: int, conversions: Written, originals: Written, tmp_path: Path
) -> None:
    """Two ranks to another number and back to two: the tensors of the original, bit for bit."""
    variant = "llama-1-13b"
    sharded, whole, back = tmp_path / "sharded", tmp_path / "whole", tmp_path / "back"
    api.convert(
        conversions(variant), sharded, to="original", family="llama", options=api.Options(shards=ranks)
    )
    assert len(list(sharded.glob("consolidated.*.pth"))) == ranks
    api.convert(sharded, whole)
    api.convert(whole, back, to="original", family="llama", options=api.Options(shards=2))
    with api.open_checkpoint(originals(variant)) as a, api.open_checkpoint(back) as b:
        recomputed = {t.name for t in a if t.name.endswith("rope.freqs")}
        assert table.compare(a, b, but=recomputed) == []


def test_more_ranks_than_key_value_heads_and_back(conversions: Written, tmp_path: Path) -> None:
    """Each head goes to several ranks, as in Llama 3.1 405B for 16; the way back compares and joins them."""
    variant = VARIANTS["llama-3.1-405b-mp16"]
    first, sharded, again = conversions(variant.id), tmp_path / "sharded", tmp_path / "again"
    assert json.loads((first / "config.json").read_text())["num_key_value_heads"] == 8
    api.convert(first, sharded, to="original", family="llama", options=api.Options(shards=16))
    written = json.loads((sharded / "params.json").read_text())
    assert written["n_kv_heads"] == 16  # as published, so that Meta's code loads it
    settings = {k: v for k, v in variant.settings.items() if k != "num_key_value_heads"}
    api.convert(sharded, again, options=api.Options(settings=settings))
    with api.open_checkpoint(first) as a, api.open_checkpoint(again) as b:
        assert table.compare(a, b) == []
    assert (first / "config.json").read_bytes() == (again / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_cast_is_marked_lossy_where_it_rounds_and_verified_as_such(
    dtype: str, originals: Written, tmp_path: Path
) -> None:
    variant = "mistral-7b-v0.1"
    made = api.convert(originals(variant), tmp_path / "out", options=api.Options(dtype=dtype))
    manifest = json.loads((tmp_path / "out" / "ckpt-tool.json").read_text())
    assert bool(made.plan.lossy) == bool(manifest["lossy"]) == (dtype == "F16")
    report = api.verify(tmp_path / "out", originals(variant), levels=("coverage", "bits"))
    assert report.exit_code == 0
    told = [f.message for f in report.findings if f.check == "dtype"]
    assert told == [n for n in (*made.plan.lossy, *made.plan.notes) if n.startswith("--dtype")] and told
    # older manifests call every cast lossy
    manifest["lossy"] = [f"--dtype: floating tensors cast from BF16 to {dtype}"]
    (tmp_path / "out" / "ckpt-tool.json").write_text(json.dumps(manifest))
    report = api.verify(tmp_path / "out", originals(variant), levels=("coverage", "bits"))
    assert report.exit_code == 0
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in held.values()} == {"torch.float32" if dtype == "F32" else "torch.float16"}


def test_a_conversion_says_what_comes_next(conversions: Written, tmp_path: Path) -> None:
    """The way back as well; an output in a folder that is not there names the line that makes it."""
    (tmp_path / "hf").symlink_to(conversions("mistral-float32"))
    back = ("convert", "mistral", "--to", "original", "--in", "hf", "--out")
    done = program(*back, "back", cwd=tmp_path)
    assert done.returncode == 0
    assert "   next      ckpt-tool verify back --source hf" in (done.stdout + done.stderr).splitlines()
    done = program(*back, "a b/back", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"  hint: mkdir -p '{tmp_path}/a b'")
    done = program("diagnose", "back", "--source", "hf", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("ckpt-tool diagnose: pass"), done.stderr
