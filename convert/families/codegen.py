"""CodeGen 1 (350M, 2B, 6B, 16B; nl, multi, mono): config.json and pytorch_model.bin in a tar.gz or a folder.

The published tensors have the names of CodeGenForCausalLM; converting leaves stale masks behind, and can
write GPT-J's layout instead, which computes the same with query, key and value apart.

Source: salesforce/CodeGen @6f09e495 (codegen1/jaxformer/hf), salesforce/jaxformer @026b4ed6, transformers
4.37.2 (models/codegen, models/gptj). Linear weights are (out, in).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.convert.dialects import published
from ckpt_tool.convert.dialects.converted import GPT2_NAMES, kept_facts, read_config
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.options import CONTAINER
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import Source, dtype_value, whole_tensors
from ckpt_tool.convert.tokenizers import tokenizer_documents
from ckpt_tool.convert.vocabularies import Vocabulary
from ckpt_tool.convert.weave import Table, Written, to_hf
from ckpt_tool.errors import fail

ARCHITECTURE, GPTJ = "CodeGenForCausalLM", "GPTJForCausalLM"
TYPES = {ARCHITECTURE: "codegen", GPTJ: "gptj"}
S = "transformer.h.{i}."
LAYER_NUMBER = r"transformer\.h\.(\d+)\."

# The rows of qkv_proj come in as many blocks as cores that the model was trained on; each block has the
# queries, the values and the keys of its heads. Transformers' class always reads four.
BLOCKS = 4


def _same(name: str, pattern: str) -> Rule:
    return rule(name, name, pattern)


def qkv(cores: int, architecture: str) -> Rule:
    """Axes: s query, value, key; a and b number the blocks of `cores` and of four (one divides the other), x
    the rows of each."""
    many, four = ("a b s x", "a s b x") if cores >= BLOCKS else ("a s b x", "a b s x")
    name = f"{S}attn.qkv_proj.weight"
    if architecture == GPTJ:
        apart = tuple(f"{S}attn.{p}_proj.weight" for p in "qvk")
        return rule(name, apart, f"({many}) d -> (s a b x) d", cut=("s", (1, 1, 1)))
    return rule(name, name, f"({many}) d -> ({four}) d")


def table(cores: int = BLOCKS, architecture: str = ARCHITECTURE) -> tuple[Rule, ...]:
    """All rows, from the original to CodeGenForCausalLM or GPTJForCausalLM."""
    return (
        _same("transformer.wte.weight", "v d"),
        *(_same(f"{S}ln_1.{kind}", "d") for kind in ("weight", "bias")),
        qkv(cores, architecture),
        _same(f"{S}attn.out_proj.weight", "d e"),
        _same(f"{S}mlp.fc_in.weight", "f d"),
        _same(f"{S}mlp.fc_in.bias", "f"),
        _same(f"{S}mlp.fc_out.weight", "d f"),
        _same(f"{S}mlp.fc_out.bias", "d"),
        *(_same(f"transformer.ln_f.{kind}", "d") for kind in ("weight", "bias")),
        _same("lm_head.weight", "v d"),
        _same("lm_head.bias", "v"),
    )


RULES = table()
IGNORED = {
    r"transformer\.h\.\d+\.attn\.(causal_mask|bias)": "the lower triangle, which the model makes itself",
    r"transformer\.h\.\d+\.attn\.masked_bias": "the score of what is not to be seen, which is in the code",
}
FIELDS = {"d": "n_embd", "e": "n_embd", "f": "n_inner", "v": "vocab_size"}
GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu")
END_OF_TEXT = 50256

# jaxformer/hf/sample.py adds these to GPT-2's vocabulary for the models that know code: runs of 31 to 2
# spaces, then of 9 to 2 tabs. It tells the models apart by their names.
WHITESPACE = (*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1)))
_NAME = re.compile(r"codegen-[\w.]+-(?P<data>nl|multi|mono)", re.ASCII | re.IGNORECASE)


def recognise(checkpoint: Checkpoint) -> tuple[bool, str]:
    names = checkpoint.names()
    if "transformer.h.0.attn.qkv_proj.weight" not in names:
        return (
            False,
            "no transformer.h.0.attn.qkv_proj.weight; these may be Hugging Face names of another model",
        )
    found = published.model_type_of(checkpoint)
    if found not in (None, "codegen"):
        return False, f"config.json is that of {found}"
    return True, "transformer.h.0.attn.qkv_proj.weight is of CodeGen alone"


# --- numbers --------------------------------------------------------------------------------------------


def dimensions(facts: Facts, download: Source) -> dict[str, Value]:
    """Sizes that the tables need, and what else changes the numbers. The defaults of CodeGenConfig are those
    of no published model, so nothing is taken from there."""
    layers = Value(download.layers, "layers in the tensor names") if download.layers else None
    made = {
        "n_embd": facts.integer("n_embd", "n_embd", rule=download.size("transformer.wte.weight", 1)),
        "n_layer": facts.integer("n_layer", "n_layer", rule=layers),
        "n_head": facts.integer("n_head", "n_head", ask="the number of attention heads"),
        "vocab_size": facts.integer(
            "vocab_size", "vocab_size", rule=download.size("transformer.wte.weight", 0)
        ),
        "n_positions": facts.integer("n_positions", "n_positions", ask="the number of positions"),
        "layer_norm_epsilon": facts.number(
            "layer_norm_epsilon", "layer_norm_epsilon", ask="the epsilon of the norms"
        ),
        "activation_function": facts.anything(
            "activation_function", "activation_function", ask="the activation of the feed-forward"
        ),
        "rotary_dim": facts.anything(
            "rotary_dim", "rotary_dim", ask="how many channels of a head are turned"
        ),
        "tie_word_embeddings": facts.fixed(
            "tie_word_embeddings", False, "the output layer has weights of its own", "tie_word_embeddings"
        ),
    }
    facts.check()
    if made["activation_function"].value not in GELUS:
        found = json.dumps(made["activation_function"].value)[:40]
        facts.refuse(
            "unsupported", f"expected one of {', '.join(GELUS)}, found {found}", "activation_function"
        )
    width, heads = made["n_embd"].value, made["n_head"].value
    if width % heads:
        message = f"expected n_embd {width} to divide by {heads} heads, found a rest"
        facts.refuse("config-mismatch", message, "n_head")
    turned = made["rotary_dim"].value
    if type(turned) is not int or turned % 2 or not 0 < turned <= width // heads:
        message = f"expected an even number up to the head's width, found {json.dumps(turned)[:40]}"
        facts.refuse("config-mismatch", message, "rotary_dim")
    inner = facts.anything("n_inner", "n_inner", rule=Value(None, "rule: absent, so 4 x n_embd"))
    made["n_inner"] = inner
    if inner.value is not None and (type(inner.value) is not int or inner.value < 1):
        facts.refuse("bad-config", "expected a width or null, found neither", "n_inner")
    facts.check()
    return made


def cores_of(facts: Facts, sizes: Mapping[str, Value]) -> Value:
    """How many cores the model was trained on, which no file says. All published models: four."""
    found = facts.integer(
        "mp_num", rule=Value(BLOCKS, "rule: every published CodeGen was trained on 4 cores")
    )
    facts.check()
    heads = sizes["n_head"].value
    if found.value % BLOCKS and BLOCKS % found.value:
        facts.refuse(
            "config-mismatch", f"expected a multiple or a divisor of 4, found {found.value}", "mp_num"
        )
    elif heads % max(found.value, BLOCKS):
        message = f"expected n_head {heads} to divide by {max(found.value, BLOCKS)} blocks, found a rest"
        facts.refuse("config-mismatch", message, "n_head")
    facts.check()
    return found


def with_width(sizes: Mapping[str, Value]) -> dict[str, Value]:
    """The sizes with n_inner as a number."""
    if sizes["n_inner"].value is not None:
        return dict(sizes)
    four = Value(4 * sizes["n_embd"].value, "rule: n_inner null or absent, so 4 x n_embd")
    return {**sizes, "n_inner": four}


def axes_of(sizes: Mapping[str, Value], cores: int) -> dict[str, int]:
    axes = {a: int(sizes[field].value) for a, field in FIELDS.items()}
    few, many = min(cores, BLOCKS), max(cores, BLOCKS)
    return {**axes, "s": 3, "a": few, "b": many // few, "x": axes["d"] // many}


# --- original to Hugging Face ---------------------------------------------------------------------------


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    architecture = GPTJ if options.family_options.get("architecture") == "gptj" else ARCHITECTURE
    refuse_others(checkpoint)
    download = whole_tensors(checkpoint, LAYER_NUMBER)
    facts = read_config(checkpoint, own_names(options), (ARCHITECTURE,), model_type="codegen")
    sizes = dimensions(facts, download)
    cores = cores_of(facts, sizes)
    config: dict[str, Value] = {
        "architectures": Value([architecture], "the layout asked for"),
        "model_type": Value(TYPES[architecture], "the layout asked for"),
        **sizes,
        "torch_dtype": dtype_value(download, options),
    }
    ids = {
        name: facts.token_ids(name, name, rule=Value(END_OF_TEXT, "rule: <|endoftext|> of GPT-2"))
        for name in ("bos_token_id", "eos_token_id")
    }
    config |= ids
    config |= published.carried(facts, config)
    facts.check_settings({*config, *GPT2_NAMES.values(), "mp_num"})
    facts.check()
    full = with_width(sizes)
    tokenizer, more_notes = tokenizer_of(checkpoint, options, full)
    beside = Written(
        "codegen",
        config,
        [published.generation(checkpoint, config), *tokenizer],
        IGNORED,
        [*id_notes(ids), *block_notes(cores), *more_notes],
        {"container": published.container_of(checkpoint), "mp_num": cores.value},
    )
    return to_hf(rows_of(full, cores.value, architecture), download, options, beside)


def rows_of(sizes: Mapping[str, Value], cores: int, architecture: str) -> Table:
    return Table(table(cores, architecture), axes_of(sizes, cores), FIELDS, sizes, sizes["n_layer"])


def own_names(options: Options) -> dict[str, Any]:
    """The user's settings under the family's names."""
    own = {generic: name for name, generic in GPT2_NAMES.items()}
    return {own.get(k, k): v for k, v in options.settings.items()}


def refuse_others(checkpoint: Checkpoint) -> None:
    own, why = recognise(checkpoint)
    if not own:
        fail("unsupported", f"expected CodeGen 1, found {why}", file=checkpoint.path.name)


def id_notes(ids: Mapping[str, Value]) -> list[str]:
    """Early uploads have ids of other tokenizers in config.json."""
    return [
        f"{name} {v.value} ({v.source}) is no end of text in CodeGen's vocabulary, so generation would not "
        f"stop or start there: --set {name}={END_OF_TEXT} gives <|endoftext|>"
        for name, v in ids.items()
        if v.value in (1, 2)
    ]


def block_notes(cores: Value) -> list[str]:
    if cores.value == BLOCKS:
        return []
    return [
        f"the {cores.value} blocks of qkv_proj ({cores.source}) are written as the 4 that the class reads"
    ]


def tokenizer_of(
    checkpoint: Checkpoint, options: Options, sizes: Mapping[str, Value]
) -> tuple[list[OutputDocument], list[str]]:
    """The tokenizer files as they are; made of vocab.json and merges.txt where there is no tokenizer.json."""
    files = published.tokenizer_files(checkpoint, options)
    if "tokenizer.json" in files:
        return published.copied(files), []
    known: dict[str, Any] = {
        "padded_vocab_size": sizes["vocab_size"].value,
        "n_positions": sizes["n_positions"].value,
    }
    notes = []
    if "added_tokens.json" in files:
        known["added_tokens"] = added_tokens(files["added_tokens.json"])
    elif (named := _NAME.search(checkpoint.path.name)) is not None:
        code = named["data"].lower() != "nl"
        words = len(parse_object(files["vocab.json"], file="vocab.json")) if "vocab.json" in files else 0
        if code and words:
            known["added_tokens"] = {text: words + k for k, text in enumerate(WHITESPACE)}
        notes.append(
            f"whitespace tokens are {'added' if code else 'not added'}, as the publisher does for models "
            f"whose name ends in {named['data']}"
        )
    elif files:
        notes.append(
            "no whitespace tokens were added: models of the kinds multi and mono have them, told by their "
            "names; added_tokens.json beside vocab.json gives them"
        )
    result = tokenizer_documents(files, family="codegen", config=known)
    made = [OutputDocument(n, d, "the download's vocabulary") for n, d in result.documents.items()]
    kept = [d for d in published.copied(files) if d.name == "added_tokens.json"]
    return [*made, *kept], [*notes, *result.notes]


def added_tokens(data: bytes) -> dict[str, int]:
    """Text to id; `bad-tokenizer` for anything else."""
    name = "added_tokens.json"
    found = parse_object(data, file=name, kind="bad-tokenizer")
    if not all(type(v) is int and v >= 0 for v in found.values()):
        fail("bad-tokenizer", "expected an id for each token, found something else", file=name)
    return found


# --- the way back ---------------------------------------------------------------------------------------


def plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    """The published layout, from CodeGen's or GPT-J's: one file, pytorch_model.bin unless the original was
    another or `container` asks for another."""
    facts = back_config(checkpoint, options)
    named = facts.document or {}
    architecture = GPTJ if named.get("model_type") == "gptj" else ARCHITECTURE
    download = whole_tensors(checkpoint, LAYER_NUMBER)
    sizes = dimensions(facts, download)
    once = kept_facts(checkpoint)
    cores = Value(once.get("mp_num", BLOCKS), "ckpt-tool.json") if "mp_num" not in facts.settings else None
    cores = cores_of(facts, sizes) if cores is None or type(cores.value) is not int else cores
    config: dict[str, Value] = {
        "architectures": Value([ARCHITECTURE], "family codegen"),
        "model_type": Value("codegen", "family codegen"),
        **sizes,
        "torch_dtype": dtype_value(download, options),
    }
    config |= published.carried(facts, config)
    facts.check_settings({*config, *GPT2_NAMES.values(), "mp_num"})
    facts.check()
    full = with_width(sizes)
    file = published.weight_file(options, once, "pth")
    return published.to_one_file(
        rows_of(full, cores.value, architecture),
        download,
        options,
        published.written("codegen", download, options, config, IGNORED),
        file,
    )


def back_config(checkpoint: Checkpoint, options: Options) -> Facts:
    found = published.model_type_of(checkpoint)
    architecture = GPTJ if found == "gptj" else ARCHITECTURE
    return read_config(checkpoint, own_names(options), (architecture,), model_type=TYPES[architecture])


FAMILY = Family(
    name="codegen",
    summary="CodeGen 1 350M to 16B (nl, multi, mono): tar.gz or folder of pytorch_model.bin; also to GPT-J",
    architectures=(ARCHITECTURE, GPTJ),
    recognise=recognise,
    plan=plan,
    plan_original=plan_original,
    targets=("gptj",),
    options=(CONTAINER,),
    vocabulary=Vocabulary("byte-level", ("CodeGenTokenizer", "GPT2Tokenizer")),
)
