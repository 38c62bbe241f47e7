"""What a run of `generate` is asked for: arguments by the names of the library, in its order of precedence
(the caller's, then generation_config.json, then its defaults), under the rules of one of its releases.

Source: transformers 4.37.2, 5.23.0 and 5.24.0, generation/configuration_utils.py and utils.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

from ckpt_tool.errors import fail, near
from ckpt_tool.records import dataclass

RULES = ("4.37", "5", "5.24")  # 5: those of 5.0 to 5.23; 5.24 puts in order what beams draw
OPTIONS = "generation options"
MOST = 1 << 63  # no id is as large


def rules_for(release: str) -> str:
    """The rules of a release of transformers, by its version."""
    major, minor = map(int, release.split(".")[:2])
    return "4.37" if major < 5 else "5" if minor < 24 else "5.24"


@dataclass(frozen=True)
class Options:
    """One of each that changes what is generated; their defaults are those of both releases. `eos` ends a
    row, `named_eos` is what the processors know: 4.37 falls back to the model's where the caller has none."""

    rules: str = "5"
    do_sample: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    num_return_sequences: int = 1
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    use_cache: bool = True
    bos: int | None = None
    eos: tuple[int, ...] = ()
    named_eos: tuple[int, ...] = ()
    pad: int | None = None

    @property
    def beams(self) -> bool:
        return self.num_beams > 1

    @property
    def rows(self) -> int:
        """How many rows of a batch one prompt has."""
        return self.num_beams if self.beams else self.num_return_sequences

    def total(self, prompt: int, positions: Any) -> int:
        """The length at which all ends, of a prompt of so many tokens, padding included. `positions` is
        `max_position_embeddings` of config.json, beyond which 5 does not go unless it is asked to."""
        if self.max_new_tokens is not None:
            return prompt + self.max_new_tokens
        if self.max_length is not None:
            total = self.max_length
        else:
            total = 20 if self.rules == "4.37" else prompt + 20
            if self.rules != "4.37" and type(positions) is int:
                total = min(total, positions)
        if total > prompt:
            return total
        if self.overrun(prompt):
            return prompt + 1  # with a warning, as that release has it
        refuse(f"expected a length of more than the {prompt} tokens of the prompt, found {total}",
               "max_length", hint="--option max_new_tokens=20 counts the new ones alone")  # fmt: skip

    def overrun(self, prompt: int) -> bool:
        """Whether the length at which all ends is behind a prompt of so many tokens, where 4.37 adds one
        token, which is not the last one to it."""
        length = 20 if self.max_length is None else self.max_length
        return self.rules == "4.37" and not self.beams and self.max_new_tokens is None and length <= prompt

    def shortest(self, prompt: int) -> int:
        """The length before which no row ends. In 5 a number of new tokens hides `min_length`, 0 too."""
        new = None if self.min_new_tokens is None else prompt + self.min_new_tokens
        if new is None or (self.rules == "4.37" and new == prompt):
            return self.min_length
        return new if self.rules != "4.37" else max(self.min_length, new)


def refuse(message: str, name: str, *, kind: str = "usage", hint: str | None = None) -> NoReturn:
    fail(kind, message, file=OPTIONS, where=name, hint=hint)


# What turns an option off, where its default does not.
OFF: Mapping[str, Any] = {"top_k": 0}
RENAMED = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}
OWN = {f.name: f.default for f in fields(Options) if f.name not in ("rules", "named_eos", *RENAMED.values())}
# Others, with the values that change nothing; any other value asks for what is not computed here.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "low_memory": (False,),
    "token_healing": (False,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "forced_decoder_ids": ([],),
    "max_time": (False,),
    "stop_strings": (False,),
    "dola_layers": (False,),
    "watermarking_config": (False,),
    "prompt_lookup_num_tokens": (False,),
    "top_h": (False,),
    "assistant_early_exit": (False,),
    "max_matching_ngram_size": (False,),
    "speculation_type": (False,),
    "assistant_ensemble_weight": (False,),
    "use_mtp": (False,),
}
# Those of a run that change no number, and who wrote the file.
PASSED = {
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "cache_implementation", "cache_config", "return_legacy_cache",
    "disable_compile", "compile_config", "prefill_chunk_size", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "use_model_defaults", "decoder_start_token_id", "transformers_version",
    "max_cache_len", "continuous_batching_config",
    "_from_model_config", "_commit_hash", "_name_or_path", "generation_kwargs", "trust_remote_code",
}  # fmt: skip
COUNTS = (
    "num_beams", "num_beam_groups", "num_return_sequences", "max_new_tokens", "max_length", "min_new_tokens",
    "min_length", "top_k", "no_repeat_ngram_size", "bos", "forced_bos_token_id",
)  # fmt: skip
NUMBERS = (
    "diversity_penalty", "temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "length_penalty",
)  # fmt: skip
SWITCHES = ("do_sample", "remove_invalid_values", "renormalize_logits", "use_cache")


def options(asked: Mapping[str, Any], model: Mapping[str, Any] | None, rules: str) -> Options:
    """`asked` is the caller's word, `model` generation_config.json, or what a config stands for without one.
    Kinds: `usage` for what no release takes, `unsupported` for what is not computed here."""
    if rules not in RULES:
        fail("usage", f"expected rules of {' or '.join(RULES)}, found {rules!r}", where="--rules")
    said = {k: v for k, v in (model or {}).items() if v is not None or (rules == "4.37" and k in OWN)}
    known = {*OWN, *RENAMED, *NEUTRAL}  # a file's other names change nothing, as in the library
    for name, value in (*((k, v) for k, v in said.items() if k in known), *asked.items()):
        _known(name, value, rules)
    told = {**said, **asked}
    made = {name: _value(name, told[name]) for name in OWN if name in told}
    if asked.get("max_length", 0) is None and made.get("max_new_tokens") is None:
        refuse("expected a number, or max_new_tokens beside it, found none", "max_length")
    found = Options(rules=rules, **made, **_ends(asked, said, rules))
    _check(found)
    return found


def _known(name: str, value: Any, rules: str) -> None:
    if name in OWN or name in RENAMED or name in PASSED:
        if name == "min_p" and rules == "4.37" and value is not None:
            refuse(f"expected an option that 4.37 has, found {value}", name, hint="--rules 5 has it")
        return
    if name not in NEUTRAL:
        refuse("expected an option of generate, found another name", name, hint=near(name, (*OWN, *RENAMED)))
    if value is not None and value not in NEUTRAL[name]:
        refuse(f"expected an option that is computed here, found {value}", name, kind="unsupported")


def _ends(asked: Mapping[str, Any], said: Mapping[str, Any], rules: str) -> dict[str, Any]:
    """Which ids begin, end and fill. Without an id to fill with it is the first that ends; a caller's none
    switches the model's off in 5 alone."""
    told = {**said, **asked}
    bos, pad = (_value(RENAMED[name], told.get(name)) for name in ("bos_token_id", "pad_token_id"))
    named = _ids("eos_token_id", told.get("eos_token_id"))
    eos = named or (_ids("eos_token_id", said.get("eos_token_id")) if rules == "4.37" else ())
    if pad is None and named:
        pad = named[0]
    if pad is None and rules == "4.37":
        pad = _value("pad", said.get("pad_token_id"))
    return {"bos": bos, "eos": eos, "named_eos": named, "pad": pad}


def _ids(name: str, value: Any) -> tuple[int, ...]:
    found = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(type(i) is not int or abs(i) >= MOST for i in found):
        refuse(f"expected a token id or a list of them, found {value!r}", name)
    return found


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _value(name: str, value: Any) -> Any:
    """A value as `Options` has it; none switches an option off."""
    if value is None:
        if name == "length_penalty":
            refuse("expected a number, found none", name)
        return OFF.get(name, OWN.get(name))
    if name == "pad":
        return _ids("pad_token_id", [value])[0]
    if name in COUNTS and (type(value) is not int or value < 0):
        refuse(f"expected a whole number from 0, found {value!r}", name)
    if name in NUMBERS and not _number(value):
        refuse(f"expected a number, found {value!r}", name)
    if name in SWITCHES and type(value) is not bool:
        refuse(f"expected true or false, found {value!r}", name)
    if name == "early_stopping" and type(value) is not bool and value != "never":
        refuse(f'expected true, false or "never", found {value!r}', name)
    if name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        return _ids(name, value)
    if name == "bad_words_ids":
        return _words(name, value)
    if name == "sequence_bias":
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        whole = isinstance(pairs, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs)
        if not whole or not all(_number(bias) for _, bias in pairs):
            refuse(f"expected pairs of ids and a bias, found {value!r}", name)
        words = _words(name, [w for w, _ in pairs])
        return tuple((w, float(b)) for w, (_, b) in zip(words, pairs, strict=True))
    if name == "exponential_decay_length_penalty":
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or type(value[0]) is not int or not _number(value[1]):
            refuse(f"expected a first step and a factor, found {value!r}", name)
        return value[0], float(value[1])
    return value


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(w, list | tuple) and w for w in value):
        refuse(f"expected lists of token ids, found {value!r}", name)
    found = tuple(_ids(name, w) for w in value)
    if any(i < 0 for word in found for i in word):
        refuse(f"expected token ids from 0, found {value!r}", name)
    return found


def _check(o: Options) -> None:
    """What the library refuses, and what asks for nothing."""
    if o.num_beams < 1 or o.num_return_sequences < 1:
        name = "num_beams" if o.num_beams < 1 else "num_return_sequences"
        refuse("expected at least 1, found 0", name)
    if o.num_return_sequences > (o.num_beams if o.beams or not o.do_sample else math.inf):
        found = f"found {o.num_return_sequences}"
        refuse(f"expected at most {o.num_beams}, as many as there are beams, {found}", "num_return_sequences")
    for name, low, high in (("temperature", 0, math.inf), ("repetition_penalty", 0, math.inf)):
        acts = o.do_sample or name != "temperature"
        if acts and not low < getattr(o, name) < high:
            refuse(f"expected a number above 0, found {getattr(o, name)}", name)
    parts = (("top_p", o.top_p >= 0), ("typical_p", o.typical_p > 0), ("min_p", 0 <= (o.min_p or 0) <= 1))
    for name, right in parts if o.do_sample else ():
        if not right:
            refuse(f"expected a part of 1, found {getattr(o, name)}", name)
    if o.max_new_tokens is not None and o.max_new_tokens < 1:
        refuse("expected at least 1, found 0", "max_new_tokens")
    if o.exponential_decay_length_penalty is not None and not o.named_eos:
        refuse("expected an id that ends a row beside it, found none", "eos_token_id")
    forced = {"forced_bos_token_id": o.forced_bos_token_id, "forced_eos_token_id": o.forced_eos_token_id}
    for name, value in forced.items():
        ids = set(_ids(name, value))
        if any(i < 0 for i in ids):
            refuse(f"expected a token id from 0, found {value}", name)
        if o.rules != "4.37" and ids and ids <= set(o.suppress_tokens):
            refuse(f"expected an id that suppress_tokens leaves, found {value}", name)
    _check_groups(o)


def _check_groups(o: Options) -> None:
    if o.rules == "4.37" and not (o.beams and o.num_beam_groups > 1) and o.diversity_penalty > 0:
        refuse(f"expected 0 without groups of beams, found {o.diversity_penalty}", "diversity_penalty")
    if o.num_beam_groups in (0, 1) or (o.rules == "4.37" and not o.beams):
        return
    if o.rules != "4.37":
        text = f"expected 1, as release 5 searches without groups, found {o.num_beam_groups}"
        refuse(text, "num_beam_groups", hint="--rules 4.37 has them")
    if o.num_beams % o.num_beam_groups:
        refuse(f"expected a divisor of {o.num_beams} beams, found {o.num_beam_groups}", "num_beam_groups")
    if o.diversity_penalty <= 0 or o.do_sample:
        refuse("expected a diversity_penalty above 0 and no sampling beside groups", "num_beam_groups")


def of_model(
    generation: Mapping[str, Any] | None, config: Mapping[str, Any], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """generation_config.json, or what the library makes of config.json where there is none: the ids, and old
    options of that file. Kind `usage` where nothing says what ends a row: its class would have a default."""
    if generation is not None:
        return dict(generation)
    found = {k: v for k, v in config.items() if k in OWN or k in RENAMED}
    found.pop("use_cache", None)
    if "eos_token_id" not in found and "eos_token_id" not in asked:
        message = "expected eos_token_id in generation_config.json or config.json, found neither"
        refuse(
            message, "eos_token_id", hint="--option eos_token_id=2 gives it, --option eos_token_id=null none"
        )
    return found
