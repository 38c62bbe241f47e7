"""Right conversions that transformers has loaded and saved again pass, whatever its spelling and files; the
same with one value changed fail and name the pair of values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_tool import reference
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from tests import loaded
from tests.conftest import kind

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
Written = Callable[[str], Path]
RELEASES = ("tf5", "tf4.57", "tf4.37")
# How each release can be asked to save; 5 writes safetensors only.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shards": {"max_shard_size": "20KB"},
    "bin": {"safe_serialization": False},
    "cast-to-the-same": {"to": True},
}
# 4.37.2 cannot load a head_dim of its own, nor rope_type llama3, nor classes that are newer than it.
NOT_IN_437 = (
    "mistral-nemo",
    "mistral-small",
    "llama-3.1-8b",
    "llama-3.1-405b-mp16",
    "llama-3.2-1b",
    *(id for id, v in VARIANTS.items() if v.family in ("qwen3", "gemma2")),
)
GONE = tuple(
    id for id, v in VARIANTS.items() if v.family == "mega"
)  # not in 5; test_mega.py has it of 4.37.2
OF_FIVE = tuple(id for id, v in VARIANTS.items() if v.family == "ministral3")  # which no release 4 has
# Release 4 leaves out the words' decoder of a Luke, without which 5 makes one up: told to be incomplete.
PACKED = tuple(
    id for id, v in VARIANTS.items() if v.family == "gpt-oss"
)  # test_gpt_oss.py has what comes of it
WANTING = tuple(id for id, v in VARIANTS.items() if v.family == "mluke")
NOT_IN = {
    "tf5": (*GONE, *PACKED),
    "tf4.57": (*GONE, *PACKED, *WANTING, *OF_FIVE),
    "tf4.37": (*NOT_IN_437, *PACKED, *WANTING, *OF_FIVE),
}
# One of each family, with what is special to it: a window, tied heads, scaled frequencies, several layers.
CHOSEN = (
    "mistral-7b-v0.1",
    "mixtral-a",
    "llama-2-70b",
    "llama-3.2-1b",
    "bert-v2-tp2",
    "gpt2-2019-tp2",
    "opt-350m",
    "codegen-350m-mono",
    "qwen2-window",
    "qwen2-mcore-tied",
    "qwen3-0.6b",
    "gemma-2-2b",
    "pythia-410m",
)


def chosen(release: str, way: str, conversions: Written) -> list[str]:
    """The current release saves every variant again, plainly; older ones one of each kind, and other ways one
    of each family."""
    able = [v for v in VARIANTS if v not in NOT_IN[release]]
    if way != "plain":
        return [v for v in able if v in CHOSEN]
    if release == "tf5":
        return able
    first = {kind(conversions(v)): v for v in reversed(able)}
    return [v for v in able if v in {*first.values(), *CHOSEN, *(named for named, _, _ in WRONG.values())}]


@pytest.fixture(scope="session")
def saved_again(conversions: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """`saved_again(release, way)`: the variants that this release saves again, below `folder`. A release runs
    once and saves every way."""
    root = tmp_path_factory.mktemp("saved-again")
    known: dict[str, dict[str, list[str]]] = {}

    def save(release: str, way: str, folder: list[Path]) -> list[str]:
        folder.append(root / release / way)
        if release not in known:
            variants = {w: chosen(release, w, conversions) for r, w in CASES if r == release}
            jobs = []
            for w, v in ((w, v) for w, own in variants.items() for v in own):
                arguments = dict(WAYS[w])
                if "to" in arguments:
                    arguments["to"] = json.loads((conversions(v) / "config.json").read_text())["torch_dtype"]
                jobs.append([str(conversions(v)), str(root / release / w / v), arguments])
            listed = root / f"{release}.json"
            listed.write_text(json.dumps(jobs))
            script = ROOT / "tests" / "save_again_script.py"
            command = [loaded.python(release), "-W", "ignore", str(script), str(listed)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr[-3000:]
            assert json.loads(run.stdout.splitlines()[-1]) == {}
            known[release] = variants
        return known[release][way]

    return save


def failures(report: Any) -> list[str]:
    return [f"{f.where}: {f.message}" for f in report.findings if f.status in ("fail", "undecided")]


def read(folder: Path) -> Any:
    """The numbers and traits that parity computes with."""
    config = json.loads((folder / "config.json").read_text())
    return reference.converted(config["architectures"][0]).Config.from_hf(config)


CASES = [(r, w) for r in RELEASES for w in WAYS if not (r == "tf5" and w == "bin")]


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(("release", "way"), CASES)
def test_what_a_release_saves_again_passes(
    release: str,
    way: str,
    saved_again: Callable[..., list[str]],
    originals: Written,
    conversions: Written,
) -> None:
    """What the current release spells is computed with too; of what any does, the tensors' bits and the
    numbers that are read are those of the conversion, with which test_end_to_end.py computes."""
    folder: list[Path] = []
    variants = saved_again(release, way, folder)
    verdicts = {}
    for v in variants:
        whole = (release, way) == ("tf5", "plain") and v in CHOSEN
        levels = None if whole else ("coverage", "bits")
        report = verify(folder[0] / v, originals(v), levels=levels, settings=VARIANTS[v].settings)
        verdicts[v] = (report.status, report.exit_code, failures(report))
        if v in CHOSEN:
            assert read(folder[0] / v) == read(conversions(v)), v
    assert len(verdicts) >= len(set(CHOSEN) - set(NOT_IN[release]))
    assert {v: found for v, found in verdicts.items() if found != ("pass", 0, [])} == {}


# variant, what is changed in config.json, what the report must say: the pair of values.
WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "theta": ("mistral-7b-v0.3", lambda c: rope(c, rope_theta=1e4), "expected 1000000 .*, found 10000"),
    "theta-absent": ("mistral-7b-v0.3", lambda c: no_theta(c), "1000000 .*, found the default 10000 "),
    "mixtral-theta": ("mixtral-c", lambda c: rope(c, rope_theta=1e5), "expected 1000000 .*, found 100000"),
    "scaling-off": ("llama-3.1-8b", lambda c: scaled(c, None), "expected rope_type llama3, .*found null"),
    "scaling-factor": (
        "llama-3.1-8b",
        lambda c: scaled(c, {"factor": 32.0}),
        r"expected factor 8 \(.*\), found factor 32",
    ),
    "eps": ("llama-2-7b", lambda c: put(c, rms_norm_eps=1e-6), "expected 1e-05 .*, found 1e-06"),
    "eps-absent": ("llama-2-7b", lambda c: drop(c, "rms_norm_eps"), "1e-05 .*, found the default 1e-06 "),
    "key-value-heads": (
        "llama-2-70b",
        lambda c: put(c, num_key_value_heads=16),
        "expected 8 .*, found 16",
    ),
    "key-value-heads-absent": (
        "llama-2-70b",
        lambda c: drop(c, "num_key_value_heads"),
        "expected 8 .*, found the default 16 ",
    ),
    "heads": ("gpt2-2019-tp2", lambda c: put(c, n_head=3), "expected 6 .*, found 3"),
    "head-dim": ("mistral-nemo", lambda c: drop(c, "head_dim"), "expected 12 .*, found the default 9 "),
    "window": ("mistral-7b-v0.1", lambda c: put(c, sliding_window=64), "expected 32 .*, found 64"),
    "window-off": ("mistral-7b-v0.1", lambda c: put(c, sliding_window=None), "expected 32 .*, found null"),
    "window-on": ("mistral-7b-v0.3", lambda c: drop(c, "sliding_window"), "null .*, found the default 4096 "),
    "window-not-used": (
        "qwen2-window",
        lambda c: put(c, use_sliding_window=False, layer_types=None),
        "expected 32 .*, found null",
    ),
    "window-layers": (
        "qwen2-window",
        lambda c: put(c, max_window_layers=1, layer_types=["full_attention"] + ["sliding_attention"] * 4),
        "expected 2-4.*, found 1-4",
    ),
    "tied": ("llama-2-7b", lambda c: put(c, tie_word_embeddings=True), "expected false .*, found true"),
    "untied": ("opt-350m", lambda c: put(c, tie_word_embeddings=False), "expected true .*, found false"),
    "activation": ("opt-13b", lambda c: put(c, activation_function="gelu"), "expected relu .*, found gelu"),
    "gelu": ("gpt2-2019-tp2", lambda c: put(c, activation_function="gelu"), "gelu_new .*, found gelu"),
    "bert-gelu": ("bert-2019-tp2", lambda c: put(c, hidden_act="gelu_new"), "gelu .*, found gelu_new"),
    "norm-first": ("opt-350m", lambda c: drop(c, "do_layer_norm_before"), "false .*found the default true "),
    "rotary-dim": ("codegen-350m-mono", lambda c: put(c, rotary_dim=8), "expected 6 .*, found 8"),
    "experts-per-token": ("mixtral-a", lambda c: put(c, num_experts_per_tok=3), "expected 2 .*, found 3"),
    "scaled-by-layer": (
        "gpt2-2019-tp2",
        lambda c: put(c, scale_attn_by_inverse_layer_idx=True),
        "expected false .*, found true",
    ),
    "model-type": ("llama-2-7b", lambda c: put(c, model_type="mistral"), "expected llama .*, found mistral"),
    "architecture": (
        "bert-2019-tp2",
        lambda c: put(c, architectures=["MegatronBertForMaskedLM"]),
        "MegatronBertForPreTraining.*, found .*MegatronBertForMaskedLM",
    ),
    "eos": ("llama-2-7b", lambda c: put(c, eos_token_id=5), "expected 2 .*, found 5"),
    "bos-absent": ("llama-3-8b", lambda c: drop(c, "bos_token_id"), "284 .*, found the default 1 "),
    "pad": ("opt-13b", lambda c: put(c, pad_token_id=3), "expected 1 .*, found 3"),
    "positions": ("llama-2-7b", lambda c: put(c, max_position_embeddings=8), "expected 4096 .*, found 8"),
    "dtype": ("llama-2-7b", lambda c: dtype(c, "float16"), "expected bfloat16 .*, found float16"),
    "unknown": ("llama-2-7b", lambda c: put(c, logit_scale=0.5), r"for this value, found none \(0.5\)"),
    "code": ("llama-2-7b", lambda c: put(c, auto_map={"AutoModel": "x.Y"}), "found auto_map, which asks a"),
    "packed": (
        "llama-2-7b",
        lambda c: put(c, quantization_config={"bits": 4}),
        "that the tensors are packed",
    ),
    "partial": ("llama-2-7b", lambda c: rope(c, partial_rotary_factor=0.5), "expected 1 .*, found 0.5"),
}


def put(config: dict[str, Any], **values: Any) -> None:
    config.update(values)


def drop(config: dict[str, Any], name: str) -> None:
    config.pop(name)


def rope(config: dict[str, Any], **values: Any) -> None:
    """In the release's own spelling."""
    config.get("rope_parameters", config).update(values)


def no_theta(config: dict[str, Any]) -> None:
    config.get("rope_parameters", config).pop("rope_theta")


def scaled(config: dict[str, Any], change: dict[str, Any] | None) -> None:
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    off = {"rope_type": "default", "rope_theta": 5e5} if key == "rope_parameters" else None
    config[key] = off if change is None else {**config[key], **change}


def dtype(config: dict[str, Any], name: str) -> None:
    config["dtype" if "dtype" in config else "torch_dtype"] = name


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("release", ["tf5", "tf4.57"])
def test_a_value_changed_in_it_fails_with_the_pair_of_values(
    release: str,
    name: str,
    saved_again: Callable[..., list[str]],
    originals: Written,
    tmp_path: Path,
) -> None:
    variant, change, said = WRONG[name]
    folder: list[Path] = []
    saved_again(release, "plain", folder)
    copy = tmp_path / variant
    shutil.copytree(folder[0] / variant, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    report = verify(copy, originals(variant), levels=("coverage",), settings=VARIANTS[variant].settings)
    assert report.status == "fail" and report.exit_code == 1
    texts = failures(report)
    assert any(re.search(said, text) for text in texts), texts
