"""transformers 4.37.2 and 4.57.6, each in its own process, load the outputs and agree with the originals.

The current 5.x release judges in test_end_to_end.py. Skipped where `make test` has not set the judges up.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool.fixtures.variants import VARIANTS
from tests import loaded

ROOT = Path(__file__).parents[1]
Written = Callable[[str], Path]
PROMPT = [[1, 5, 9, 2, 7, 3, 11, 4, 8, 6, 12, 10] * 4]
TOKENIZED = ("mistral-7b-v0.1", "llama-2-7b", "llama-3-8b")  # test_documents.py loads every kind of tokenizer
TEXTS = ["Hello world", " leading", "two  spaces", "line\nbreak", "naïve 北京 🙂"]

# What 4.37.2 cannot express: a head_dim that is not dim / heads, llama3 rotary scaling, and windows in some
# of Qwen2's layers only (its eager attention has them in every layer).
BEYOND_437 = {
    v.id
    for v in VARIANTS.values()
    if v.true_config.get("rope_scaling") is not None
    or v.true_config.get("use_sliding_window")
    or (
        v.true_config.get("head_dim") is not None
        and v.true_config["head_dim"] * v.true_config["num_attention_heads"] != v.true_config["hidden_size"]
    )
}
CODE_POINTS = 0x110000  # where a config has no size of a vocabulary
# Judged in test_end_to_end.py, by 4.37.2, with lengths that its chunks take, and what only 5 has; and in
# test_gpt_oss.py, since 4.57.6 has the bound of the units as a constant.
DROPPED = {v.id for v in VARIANTS.values() if v.family in ("mega", "ministral3", "gpt-oss")}

Verdict = tuple[dict[str, Any], Any]


@pytest.fixture(scope="module")
def judged(
    conversions: Written, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[str], Verdict]]:
    """`judged(release)`: the variants it can express, and what it reports and computes for each of them, as
    (reports, logits by variant). Each release is asked once."""

    @cache
    def asked(release: str) -> tuple[list[str], Verdict]:
        beyond = DROPPED | (BEYOND_437 if release == "tf4.37" else set())
        variants = [v for v in VARIANTS if v not in beyond]
        return variants, _judged(release, variants, conversions, tmp_path_factory.mktemp(release))

    return asked


def _judged(release: str, variants: list[str], conversions: Written, scratch: Path) -> Verdict:
    python, folders = loaded.python(release), []
    ids = np.array(PROMPT, dtype=np.int64)
    for variant in variants:
        folder = scratch / variant
        shutil.copytree(conversions(variant), folder)
        np.save(folder / "judge_ids.npy", ids)
        if variant in TOKENIZED:
            (folder / "judge_texts.json").write_text(json.dumps(TEXTS))
        folders.append(str(folder))
    run = subprocess.run(
        [
            python,
            "-W",
            "ignore",
            str(ROOT / "tests" / "judge_script.py"),
            str(scratch / "logits.npz"),
            *folders,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1]), np.load(scratch / "logits.npz")


def reference_logits(variant: str, converted: Path, source: Path) -> np.ndarray:
    """The original-layout reference's float32 logits for the judges' prompt."""
    import torch

    from ckpt_tool.verify.sides import original_side
    from ckpt_tool.verify.subject import opened

    chosen = VARIANTS[variant]
    with opened(converted, source, chosen.settings) as subject:
        side = original_side(subject, torch.float32, "cpu")
        ids = torch.tensor(PROMPT) % chosen.true_config.get("vocab_size", CODE_POINTS)
        logits: np.ndarray = side.forward(ids).numpy()
    return logits


@pytest.fixture(scope="module")
def reference(conversions: Written, originals: Written) -> Callable[[str], np.ndarray]:
    """`reference(variant)`: see `reference_logits`, computed once."""
    return cache(lambda variant: reference_logits(variant, conversions(variant), originals(variant)))


@pytest.mark.parametrize("release", ["tf4.37", "tf4.57"])
def test_older_releases_load_every_output_and_agree(
    release: str,
    judged: Callable[[str], tuple[list[str], Verdict]],
    reference: Callable[[str], np.ndarray],
) -> None:
    variants, (reports, logits) = judged(release)
    for variant in variants:
        report = reports[variant]
        assert report["missing_keys"] == [] and report["unexpected_keys"] == [], variant
        expected = reference(variant)
        found = logits[variant]
        nmse = float(((found - expected) ** 2).mean() / expected.var())
        assert nmse <= 1e-10, (variant, nmse)


def test_the_releases_tokenize_alike(
    conversions: Written, judged: Callable[[str], tuple[list[str], Verdict]]
) -> None:
    from transformers import AutoTokenizer

    for release in ("tf4.37", "tf4.57"):
        _, (reports, _) = judged(release)
        for variant in TOKENIZED:
            current = AutoTokenizer.from_pretrained(conversions(variant))
            assert reports[variant]["tokens"] == [current(t)["input_ids"] for t in TEXTS], (release, variant)
