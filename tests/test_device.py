"""A model computed on another device than the CPU. There is no GPU here: what lies on a wrong device is found
by one that is emulated (tests/elsewhere.py); of what a GPU does otherwise nothing is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_tool.api import convert
from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.quantised import quantise
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import against_transformers, verify
from ckpt_tool.verify import device as devices
from ckpt_tool.verify.weights import Weights
from tests import loaded
from tests.conftest import FEW_TOKENS, Written

SCRIPT = Path(__file__).with_name("device_script.py")
# One of each family; all others, and --thorough, took too long to stay here, and were seen once.
SEEN = (
    "mistral-7b-v0.3", "mixtral-c", "llama-3.2-1b", "bert-v2-tp2", "gpt2-v2-tp2", "opt-350m",
    "codegen-350m-mono", "qwen2-0.5b", "qwen3-0.6b", "gemma-2-27b", "pythia-410m", "gpt-oss-20b",
    "mobilebert-squad", "canine-tydi", "mega-decoder", "mluke-bare", "mistral3-images",
)  # fmt: skip
FORMATS = ("fp8-blocks", "int4-shifted")


def there(*asked: tuple[Path, Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """What quick verifications of two short prompts say on the emulated device, by one process."""
    jobs = [{"out": str(out), "source": str(source), "settings": own} for out, source, own in asked]
    command = [loaded.python(loaded.CURRENT), "-W", "ignore", str(SCRIPT), str(FEW_TOKENS), json.dumps(jobs)]
    env = {**os.environ, "PYTHONPATH": str(loaded.ROOT)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    said: list[dict[str, Any]] = json.loads(run.stdout)
    return said


@pytest.fixture(scope="module")
def seen(originals: Written, conversions: Written) -> dict[str, dict[str, Any]]:
    asked = ((conversions(v), originals(v), VARIANTS[v].settings) for v in SEEN)
    return dict(zip(SEEN, there(*asked), strict=True))


def test_every_family_is_there() -> None:
    assert {VARIANTS[v].family for v in SEEN} == {v.family for v in VARIANTS.values()}


@pytest.mark.parametrize("variant", SEEN)
def test_both_readings_and_the_planted_mistakes_stay_on_the_device(
    variant: str, seen: dict[str, dict[str, Any]]
) -> None:
    said = seen[variant]
    assert said["raised"] is None, said["raised"]
    assert (said["status"], said["failing"], said["planted"]) == ("pass", [], [1.0])
    assert said["computed"].startswith("float32 on elsewhere:0, torch ")


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_of_codes_stay_on_the_device(form: str, conversions: Written, tmp_path: Path) -> None:
    quantise(conversions("qwen3-float32"), tmp_path / "in", form)
    convert(tmp_path / "in", tmp_path / "out", check=False)
    (said,) = there((tmp_path / "out", tmp_path / "in", {}))
    assert said["raised"] is None and said["status"] == "pass", said


MIXES = """
import torch
from tests.elsewhere import DEVICE, Elsewhere

with Elsewhere():
    x, here = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
    mixes = lambda: x + here, lambda: here @ x, lambda: torch.cat([x, here]), lambda: here[x.long()]
    for mix in (*mixes, x.numpy):
        try:
            mix()
        except RuntimeError as error:
            print(str(error).partition(", found")[0][:50])
        else:
            print("nothing was refused")
    moved = here.to(DEVICE)
    print(moved.device == x.device, (x + moved).tolist(), x[torch.tensor([1])].device == x.device)
    print(x.cpu().device.type, float(x.sum()), (x * torch.tensor(3.0)).device == x.device)
"""


def test_the_device_refuses_what_lies_on_the_cpu() -> None:
    command = [loaded.python(loaded.CURRENT), "-c", MIXES]
    env = {**os.environ, "PYTHONPATH": str(loaded.ROOT)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    *refused, numpy, first, second = run.stdout.splitlines()
    assert refused == ["Expected all tensors to be on the same device"] * 4, run.stderr[-2000:]
    assert "numpy" in numpy
    assert (first, second) == ("True [[2.0, 2.0], [2.0, 2.0]] True", "cpu 4.0 True")


NONE = "expected a CUDA device, found none"
LIMITS = (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "out-of-memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out-of-memory"),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), "device-failed"),
)


@pytest.mark.parametrize(("error", "kind"), LIMITS)
def test_a_device_that_gives_out_is_no_finding(
    error: RuntimeError,
    kind: str,
    originals: Written,
    conversions: Written,
    monkeypatch: pytest.MonkeyPatch,
    few_prompts: None,
) -> None:
    """Of the converted side: it would be told that it could not run, which is a difference."""
    right = Weights._load

    def load(self: Weights, info: TensorInfo) -> torch.Tensor:
        if info.name == "model.layers.0.mlp.up_proj.weight":
            raise error
        return right(self, info)

    monkeypatch.setattr(Weights, "_load", load)
    with pytest.raises(CkptToolError) as raised:
        verify(conversions(SEEN[0]), originals(SEEN[0]), levels=("parity",), mode="quick")
    (problem,) = raised.value.problems
    assert (raised.value.exit_code, problem.kind) == (2, kind)
    assert problem.message.endswith(str(error).partition("\n")[0])


def test_an_error_of_the_model_stays_one(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch, few_prompts: None
) -> None:
    right = Weights._load

    def load(self: Weights, info: TensorInfo) -> torch.Tensor:
        made = right(self, info)
        return made.flip(0)[1:] if info.name == "model.layers.0.mlp.up_proj.weight" else made

    monkeypatch.setattr(Weights, "_load", load)
    report = verify(conversions(SEEN[0]), originals(SEEN[0]), levels=("parity",), mode="quick")
    (found,) = [f for f in report.findings if f.check == "lockstep"]
    assert (report.status, found.where) == ("fail", "layer 0")
    assert "the first phase that differs (RuntimeError: The size of tensor a" in found.message


@pytest.mark.parametrize(
    ("count", "built", "device", "message"),
    [
        (0, None, "cuda", f"{NONE}: torch {torch.__version__} is built without it"),
        (0, "12.8", "cuda:0", f"{NONE}: torch finds none"),
        (1, "12.8", "cuda:1", "expected cuda:0, found cuda:1"),
        (4, "12.8", "cuda:12", "expected cuda:0 to cuda:3, found cuda:12"),
    ],
)
def test_a_device_that_is_not_there(
    count: int,
    built: str | None,
    device: str,
    message: str,
    originals: Written,
    conversions: Written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(CkptToolError) as raised:
        verify(conversions(SEEN[0]), originals(SEEN[0]), levels=("parity",), device=device)
    (problem,) = raised.value.problems
    assert (problem.kind, problem.where, problem.message) == ("usage", "device", message)


def test_a_device_of_another_kind_is_refused(originals: Written, conversions: Written) -> None:
    with pytest.raises(CkptToolError) as raised:
        verify(conversions(SEEN[0]), originals(SEEN[0]), device="mps")
    (problem,) = raised.value.problems
    assert (problem.kind, problem.message) == ("usage", "expected cpu, cuda or cuda:N, found 'mps'")


def test_the_name_of_a_gpu_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda:1": "NVIDIA T4"}.__getitem__)
    assert (devices.described("cuda:1"), devices.described("cpu")) == ("cuda:1 (NVIDIA T4)", "cpu")


def test_the_room_is_that_of_the_device_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs the first was asked whether the library's model has room on the second."""
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", {"cuda:0": (1 << 40, 1 << 40), "cuda:1": (3, 9)}.__getitem__
    )
    subject: Any = SimpleNamespace(hf=[SimpleNamespace(numel=1_000_000_000)])
    text = "the whole model takes 4.0 GB in float32, 0.0 GB are free"
    assert against_transformers._unaffordable(subject, "float32", "cuda:1") == text
    assert against_transformers._unaffordable(subject, "float32", "cuda:0") is None


def precisions() -> list[object]:
    b = torch.backends
    parts = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)
    return [*(p.fp32_precision for p in parts), *(getattr(b.cuda.matmul, r) for r in devices.REDUCED)]


@pytest.mark.parametrize("chosen", ["nothing", "medium", "every backend", "a part"])
def test_numbers_are_multiplied_as_they_are_whatever_the_process_has_chosen(chosen: str) -> None:
    b = torch.backends
    at_first = torch.get_float32_matmul_precision(), b.fp32_precision
    if chosen == "medium":
        torch.set_float32_matmul_precision("medium")
    elif chosen == "every backend":
        b.fp32_precision = "tf32"
    elif chosen == "a part":
        b.cuda.matmul.fp32_precision = "tf32"
    before = precisions()
    try:
        with devices.exact():
            inside = precisions()
        assert {*inside[:5]} <= {"ieee", "none"}
        assert inside[5:] == [False, False]
        assert [p for p in precisions() if p in ("tf32", "bf16", True)] == [
            p for p in before if p in ("tf32", "bf16", True)
        ]
    finally:
        b.cuda.matmul.fp32_precision = "ieee"
        b.fp32_precision = at_first[1]
        torch.set_float32_matmul_precision(at_first[0])
