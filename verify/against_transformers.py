"""A judge that is not ours: `transformers` loads the output as any user would, and its logits are held
against the original layout's own reading.

Eager attention is asked for, since other kernels have deviated from the models: sdpa ignores the sliding
window in transformers 4.37, flash kernels see one key more or less (transformers issues 28980, 29623)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.verify import logits
from ckpt_tool.verify.missing import not_run
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.report import Finding, Status, shown
from ckpt_tool.verify.sides import Sample, Side, tensors
from ckpt_tool.verify.subject import Subject

LEVEL = "transformers"


def finding(check: str, status: Status, message: str, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, **more)


def against_transformers(
    subject: Subject,
    reference: Side,
    prompts: Mapping[str, Prompt],
    *,
    dtype: str,
    device: str,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """The findings of this comparison; `reference` is the original's reading, or the converted one without a
    source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers
        except ImportError as error:
            return [not_run(LEVEL, "import", error)]
    assert subject.hf is not None
    if (reason := _unaffordable(subject, dtype, device)) is not None:
        return [finding("load", "skipped", reason)]
    if progress is not None:
        progress(f"transformers {transformers.__version__}: loading")
    deviations = [
        finding("deviation", "note", text) for text in _deviations(subject, transformers.__version__)
    ]
    said: list[str] = []
    try:
        model, info = _load(transformers, subject, dtype, device, said)
    except Exception as error:  # whatever a library raises for a folder it cannot load is its verdict
        text = (
            f"transformers {transformers.__version__} cannot load the output: {type(error).__name__}: {error}"
        )
        known = bool(deviations) and _version(transformers.__version__) < (4, 43)
        return [finding("load", "skipped" if known else "fail", shown(text, 500)), *deviations]
    made = [_loading(transformers.__version__, info, said), *deviations]
    return [*made, *_logits(transformers.__version__, subject, model, reference, prompts, progress)]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split(".")[:2] if p.isdecimal())


def _unaffordable(subject: Subject, dtype: str, device: str) -> str | None:
    assert subject.hf is not None
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    need = sum(t.numel for t in subject.hf) * itemsize
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need <= free:
        return None
    return f"the whole model takes {need / 1e9:.1f} GB in {dtype}, {free / 1e9:.1f} GB are free"


def _load(transformers: Any, subject: Subject, dtype: str, device: str, said: list[str]) -> tuple[Any, Any]:
    """The model in eval mode and what loading reports; warnings that were logged or raised are added to
    `said`."""
    assert subject.hf is not None and subject.family is not None
    (architecture, *_) = subject.config.get("architectures") or [""]
    if architecture not in subject.family.architectures:  # a name in a file decides nothing but this
        raise ValueError(f"expected one of {subject.family.architectures}, found {architecture!r}")
    chosen = getattr(transformers, architecture)
    word = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    transformers.utils.logging.disable_progress_bar()
    with _listening(said):
        model, info = chosen.from_pretrained(
            os.fspath(subject.hf.path),
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            **{word: getattr(torch, dtype)},
        )
    return model.to(device).eval(), info


@contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """What the library logs or raises as a warning inside is added to `said`, and printed nowhere."""
    logger = logging.getLogger("transformers")
    before = logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [_Listener(said)], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        own = [w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)]
        said += [str(w.message) for w in own]
    finally:
        logger.propagate, logger.handlers = before


class _Listener(logging.Handler):
    """Collects what the library logs as a warning or worse."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _loading(version: str, info: Mapping[str, Any], said: list[str]) -> Finding:
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    wrong = {k: sorted(map(str, info[k])) for k in names if info.get(k)}
    if wrong:
        text = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:4])}" for k, v in wrong.items())
        return finding("load", "fail", f"transformers {version} loads it with {text}", data=wrong)
    if said:
        text = f"transformers {version} loads it with a warning: {said[0]}"
        return finding("load", "fail", shown(text, 400), data={"warnings": said[:20]})
    return finding(
        "load",
        "pass",
        f"transformers {version} loads it: no missing, unexpected or mismatched key, no warning",
    )


def _deviations(subject: Subject, version: str) -> list[str]:
    """Where this release is known not to compute what the model is, in words."""
    made, release, config = [], _version(version), subject.config
    if isinstance(config.get("sliding_window"), int) and release < (4, 43):
        made.append(
            f"transformers {version} ignores the sliding window in its default sdpa attention; eager does not"
        )
    width = config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    if config.get("head_dim") not in (None, width) and release < (4, 43):
        made.append(
            f"transformers {version} has no head_dim and takes hidden_size / num_attention_heads = {width}"
        )
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3" and release < (4, 43):
        made.append(f"transformers {version} does not know rope_type llama3")
    return made


def _logits(
    version: str,
    subject: Subject,
    model: Any,
    reference: Side,
    prompts: Mapping[str, Prompt],
    progress: Callable[[str], None] | None,
) -> list[Finding]:
    weights = reference.weights[0]
    results: dict[str, dict[str, logits.Logits]] = {}
    pooled: dict[str, list[logits.Pass]] = {}
    said: list[str] = []
    for name, prompt in prompts.items():
        if progress is not None:
            progress(f"transformers {version}: prompt {name}")
        ids, given = tensors(prompt, weights.device)
        ours = reference.outputs(ids, given)
        with ReversedSums():
            noisy = reference.outputs(ids, given)
        with _listening(said), torch.inference_mode():
            out = model(**_arguments(model, ids, given))
        for head, wanted in ours.items():
            found = _of(out, head).to(wanted.dtype)
            one = logits.Pass(name, Sample(ids, wanted, given), found, noisy[head])
            if wanted.ndim == 2:
                pooled.setdefault(head, []).append(one)
            else:
                results.setdefault(head, {}).update(logits.by_prompt([one], weights.dtype))
    results |= {head: logits.by_prompt(passes, weights.dtype) for head, passes in pooled.items()}
    side = "the original layout's reading" if subject.original is not None else "our reading (no source)"
    text = f"transformers {version}, eager, against {side}"
    made = [
        logits.finding(LEVEL, text, found, weights.dtype, None if head == "head" else head)
        for head, found in results.items()
    ]
    if said:
        text = f"transformers {version} warns while it computes: {said[0]}"
        made.append(finding("warnings", "note", shown(text, 400), data={"warnings": said[:20]}))
    return made


def _arguments(model: Any, ids: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a call of the model: the mask even if nothing is padded, since some warn without one; no cache."""
    named = {
        "attention_mask": given.get("mask", torch.ones_like(ids)),
        "token_type_ids": given.get("token_types"),
        "use_cache": False,
    }
    known = signature(model.forward).parameters
    return {"input_ids": ids, **{k: v for k, v in named.items() if k in known and v is not None}}


def _of(out: Any, head: str) -> Tensor:
    """The logits of a head, by our name for it: the first one of a class is `logits` or, beside others,
    `prediction_logits`."""
    names = ("logits", "prediction_logits") if head == "head" else (head,)
    found: Tensor = next(out[name] for name in names if name in out)
    return found
