"""Plans as data: checked before anything is written, the same for the same input, readable."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ckpt_tool.checkpoint import torch_zip_writer
from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorFile
from ckpt_tool.checkpoint.tensor_names import fold_key, folded_name
from ckpt_tool.checkpoint.zip_reader import MEMBER_LIMIT
from ckpt_tool.convert import plan_checks
from ckpt_tool.convert.expanding import expand
from ckpt_tool.convert.families import family
from ckpt_tool.convert.layout import Step, rule
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import (
    Chunk,
    Options,
    OutputFile,
    Plan,
    ToWrite,
    Value,
    assemble,
    config_document,
    dtype_option,
    place,
)
from ckpt_tool.convert.plan_text import pieces
from ckpt_tool.convert.render import plan_table
from ckpt_tool.convert.steps import Steps
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.consolidated import Original
from ckpt_tool.fixtures.headers import real_header
from ckpt_tool.fixtures.variants import VARIANTS
from tests.headers_only import Headers
from tests.in_process import program


def opened(original: Original, folder: Path) -> Checkpoint:
    path = folder / "params.json"
    path.write_text(json.dumps(original.params))
    files: dict[str, TensorFile] = {f: Headers(f, rows) for f, rows in original.headers.items()}
    return Checkpoint(folder, files, {"params.json": Document("params.json", path, path.stat().st_size)})


def planned(name: str, folder: Path, **options: Any) -> Plan:
    variant = VARIANTS[name]
    settings = {**variant.settings, **options.pop("settings", {})}
    return family(variant.family).plan(
        opened(variant.original, folder), Options(settings=settings, **options)
    )


def refused(make: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        make()
    return caught.value


def document(plan: Plan, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(d.content for d in plan.documents if d.name == name))
    return found


# --- files ----------------------------------------------------------------------------------------------


def to_write(*sizes: int) -> ToWrite:
    made = ToWrite()
    for k, n in enumerate(sizes):
        made.add("", "U8", (n,), (f"t{k}",))
    return made


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_placing_keeps_every_tensor_once_and_the_limit(sizes: list[int], limit: int) -> None:
    files, index, home = place(to_write(*sizes), limit)
    assert [t.name for f in files for t in f.tensors] == [f"t{k}" for k in range(len(sizes))]
    assert all(sum(t.nbytes for t in f.tensors) <= limit or len(f.tensors) == 1 for f in files)
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not index
    else:
        held = json.loads(index[0].content)
        assert held["metadata"]["total_size"] == sum(sizes)
        assert held["weight_map"] == {t.name: f.name for f in files for t in f.tensors}
        assert [f.name for f in files] == sorted(f.name for f in files)
    assert home == {t.name: t.file for f in files for t in f.tensors}
    assert all(f.metadata == (("format", "pt"),) for f in files)  # transformers 4 fails without it


def test_no_file_is_planned_that_could_not_be_read(
    conversions: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch_zip_writer.TENSOR_LIMIT < MEMBER_LIMIT - 100  # the other members of a torch file
    for name, module in (("a.safetensors", plan_checks), ("a.pth", torch_zip_writer)):
        monkeypatch.setattr(module, "TENSOR_LIMIT", 3)
        made: list[str] = []
        for count in (3, 4):
            wanted = to_write(*[1] * count)
            wanted.names[name] = wanted.names.pop("")
            made += [p.message for p in plan_checks.too_many([wanted.whole(name)])]
        assert made == ["expected at most 3 tensors in one file, found 4"]
    back = ("convert", "mistral", "--to", "original", "--in", str(conversions("mistral-float32")))
    done = program(*back, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "expected at most 3 tensors" in done.stderr, done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_layers_tensors_stand_together_in_the_order_of_layers(tmp_path: Path) -> None:
    plan = planned("mistral-7b-v0.1", tmp_path)
    names = [t.name for f in plan.outputs for t in f.tensors]
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert layers == sorted(layers) and max(layers) == 10
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "lm_head.weight"


ODD = ['"name":""', '\\"name\\":\\"\\"', "", "é\u2028\U0001f600\x00\n"]


@pytest.mark.parametrize("odd", ODD)
def test_the_digest_is_of_the_text_of_the_json_whatever_its_words_are(odd: str, tmp_path: Path) -> None:
    """Texts are put together from templates: names, notes and files that look like one must not be taken for
    it."""
    plan = planned("mistral-7b-v0.1", tmp_path, max_shard_bytes=50_000)

    def renamed(step: Step) -> Step:
        sources, targets = (
            tuple(replace(p, name=odd + p.name) for p in s) for s in (step.sources, step.targets)
        )
        return replace(step, sources=sources, targets=targets, note=odd, compare=odd or None, copied=True)

    constants = ((odd, "F32", (1,), b"four"),)
    outputs = [
        OutputFile(odd + f.name, odd, f.tensors[:k], (), (odd,), {odd: odd}, constants, (Chunk(odd, (k,)),))
        for k, f in enumerate(plan.outputs)
    ]
    for steps in (tuple(map(renamed, plan.steps)), Steps(map(renamed, plan.steps)), Steps()):
        made = replace(plan, steps=steps, outputs=tuple(outputs), notes=(odd,), original={odd: odd})
        text = json.dumps(made.to_json(), sort_keys=True, separators=(",", ":"))
        assert "".join(pieces(made)) == text
        assert made.digest() == sha256(text.encode()).hexdigest()


# --- the plan as data -----------------------------------------------------------------------------------


def test_equal_inputs_give_equal_digests_and_other_inputs_others(tmp_path: Path) -> None:
    first = planned("llama-2-70b", tmp_path).digest()
    assert planned("llama-2-70b", tmp_path).digest() == first
    assert planned("llama-2-70b", tmp_path, settings={"rope_theta": 5.0}).digest() != first
    assert planned("llama-2-70b", tmp_path, max_shard_bytes=50_000).digest() != first


def test_a_plan_is_json_and_names_no_path(tmp_path: Path) -> None:
    text = json.dumps(planned("llama-2-70b", tmp_path).to_json())
    assert str(tmp_path) not in text
    held = json.loads(text)
    assert held["config"]["rms_norm_eps"] == {"value": 1e-5, "source": "params.json: norm_eps"}
    ranked = next(s for s in held["steps"] if s["sources"][0]["name"] == "layers.0.attention.wq.weight")
    assert [s["ranges"] for s in ranked["sources"]] == [{"n": [2 * r, 2 * r + 2]} for r in range(8)]


def test_every_config_value_says_where_it_is_from(tmp_path: Path) -> None:
    for name in ("mistral-7b-v0.1", "mixtral-a", "llama-3.1-8b"):
        plan = planned(name, tmp_path)
        assert document(plan, "config.json").keys() == plan.config.keys()
        assert all(v.source for v in plan.config.values())


CONFIG_4_37 = {
    "mistral-7b-v0.3": "architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size "
    "initializer_range intermediate_size max_position_embeddings model_type num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps rope_theta sliding_window tie_word_embeddings "
    "torch_dtype use_cache vocab_size",
    "mixtral-c": "architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size "
    "initializer_range intermediate_size max_position_embeddings model_type num_attention_heads "
    "num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts output_router_logits "
    "rms_norm_eps rope_theta router_aux_loss_coef sliding_window tie_word_embeddings torch_dtype use_cache "
    "vocab_size",
    "llama-2-7b": "architectures attention_bias attention_dropout bos_token_id eos_token_id hidden_act "
    "hidden_size initializer_range intermediate_size max_position_embeddings model_type num_attention_heads "
    "num_hidden_layers num_key_value_heads pretraining_tp rms_norm_eps rope_scaling rope_theta "
    "tie_word_embeddings torch_dtype use_cache vocab_size",
}


@pytest.mark.parametrize("name", CONFIG_4_37)
def test_config_has_the_keys_that_transformers_4_writes(name: str, tmp_path: Path) -> None:
    """All but its own version, and with head_dim and mlp_bias, which later ones write and this one
    ignores."""
    config = document(planned(name, tmp_path), "config.json")
    assert config.keys() - {"head_dim", "mlp_bias"} == set(CONFIG_4_37[name].split())
    assert list(config) == sorted(config)
    generation = document(planned(name, tmp_path), "generation_config.json")
    assert generation == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}


def test_a_cast_shows_in_the_config_and_is_lossy_where_it_rounds(tmp_path: Path) -> None:
    plan = planned("mistral-7b-v0.3", tmp_path, dtype="F32")
    assert "--dtype: floating tensors widened from BF16 to F32, which loses no value" in plan.notes
    assert not plan.lossy
    rounded = planned("mistral-7b-v0.3", tmp_path, dtype="F16")
    assert rounded.lossy == ("--dtype: floating tensors cast from BF16 to F16",)
    assert not any(note.startswith("--dtype") for note in rounded.notes)
    assert {t.dtype for f in plan.outputs for t in f.tensors} == {"F32"}
    assert plan.config["torch_dtype"] == Value("float32", "--dtype")
    assert not planned("mistral-7b-v0.3", tmp_path, dtype="BF16").lossy


@pytest.mark.parametrize("text", ["bfloat16", "bf16", "BF16"])
def test_dtype_names(text: str) -> None:
    assert dtype_option(text) == "BF16"


def test_dtypes_that_cannot_be_cast_to_are_refused() -> None:
    assert refused(lambda: dtype_option("int8")).kind == "usage"


# --- names and problems ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["norm.weight"], "norm.weight"),
        (["layers.3.norm.weight"], "layers.3.norm.weight"),
        ([f"layers.{i}.w" for i in (9, 10, 11)], "layers.{9..11}.w"),
        (["layers.1.w", "layers.4.w"], "layers.{1,4}.w"),
        (
            [f"layers.{i}.experts.{e}.w1" for i in (0, 1) for e in (0, 1, 2)],
            "layers.{0..1}.experts.{0..2}.w1",
        ),
    ],
)
def test_names_fold_into_ranges(names: list[str], folded: str) -> None:
    assert len({fold_key(n) for n in names}) == 1
    assert folded_name(names) == folded


def small(rows: Mapping[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    return Checkpoint(Path("x"), {"a": Headers("a", [(n, d, s) for n, (d, s) in rows.items()])})


def assembled(checkpoint: Checkpoint, **axes: int) -> Plan:
    table = (
        rule("l.{i}.q", "m.{i}.q", "(n two h) d -> (n h two) d"),
        rule("l.{i}.o", "m.{i}.o", "d n"),
    )
    expansion = expand(
        table,
        axes={"two": 2, **axes},
        indices={"i": 2},
        original=lambda name: [(t.file, t.dtype) for t in checkpoint.find(name)],
        converted=lambda _: ("", "F32"),
    )
    config = {"width": Value(axes["d"], "test")}
    return assemble(
        family="test",
        direction="to-hf",
        checkpoint=checkpoint,
        expansion=expansion,
        ignored={r"old\..*": "not needed"},
        config=config,
        documents=[config_document(config)],
        options=Options(),
    )


GOOD = {f"l.{i}.{n}": ("F32", s) for i in (0, 1) for n, s in (("q", (12, 5)), ("o", (5, 2)))}


def test_what_is_ignored_is_listed_with_its_reason() -> None:
    plan = assembled(small({**GOOD, "old.table": ("F32", (3,))}), n=2, h=3, d=5)
    assert [(d.tensor.name, d.reason) for d in plan.dropped] == [("old.table", "not needed")]
    assert plan.bytes_out == 4 * 2 * (60 + 10)


def test_all_problems_of_a_plan_come_together() -> None:
    bad = {**GOOD, "l.1.o": ("F32", (5, 3)), "extra": ("F32", (1,))}
    del bad["l.1.q"]
    error = refused(lambda: assembled(small(bad), n=2, h=3, d=5))
    assert {(p.kind, p.where) for p in error.problems} == {
        ("missing-tensor", "l.1.q"),
        ("shape-mismatch", "l.1.o"),
        ("uncovered-tensors", "extra"),
    }


# --- facts ----------------------------------------------------------------------------------------------


def test_settings_win_over_the_file_and_the_file_over_the_rule() -> None:
    facts = Facts({"n_heads": 4, "dim": None}, "params.json", {"hidden_size": 7})
    assert facts.integer("num_attention_heads", "n_heads") == Value(4, "params.json: n_heads")
    assert facts.integer("hidden_size", "dim") == Value(7, "--set")
    assert facts.integer("vocab_size", "vocab_size", rule=Value(9, "rule: nine")) == Value(9, "rule: nine")
    facts.check()


def test_facts_are_collected_before_they_are_refused() -> None:
    facts = Facts({"a": "4", "b": 0, "c": float("nan")}, "f.json", {"x": True})
    facts.integer("a", "a")
    facts.integer("b", "b")
    facts.number("c", "c")
    facts.number("d", "d")
    facts.integer("x")
    error = refused(facts.check)
    found = [(p.kind, p.where) for p in error.problems]
    assert found == [
        ("bad-config", "a"),
        ("config-mismatch", "b"),
        ("bad-config", "c"),
        ("missing-fact", "d"),
        ("bad-config", "x"),
    ]


def test_two_names_of_one_fact_must_agree() -> None:
    facts = Facts({"n_heads": 4, "num_attention_heads": 5}, "params.json", {})
    facts.integer("num_attention_heads", "n_heads", "num_attention_heads")
    assert refused(facts.check).kind == "bad-config"
    facts = Facts({"n_heads": 4, "num_attention_heads": 4}, "params.json", {})
    assert facts.integer("num_attention_heads", "n_heads", "num_attention_heads").value == 4
    facts.check()


# --- the plan for people --------------------------------------------------------------------------------


def shown(plan: Plan) -> str:
    out = io.StringIO()
    plan_table(plan, Console(file=out, width=240, force_terminal=False))
    return out.getvalue()


def test_a_plan_prints_one_row_for_each_rule(tmp_path: Path) -> None:
    text = shown(planned("llama-2-70b", tmp_path))
    lines = text.splitlines()
    at, query = next((k, line) for k, line in enumerate(lines) if "attention.wq" in line)
    assert query.split()[0] == "2" and "layers.{0..1}.attention.wq.weight" in query and "(8 ranks)" in query
    assert "12x96 bfloat16" in query
    assert "-> model.layers.{0..1}.self_attn.q_proj.weight" in lines[at + 1] and "96x96" in lines[at + 1]
    assert lines[at + 2].strip() == "(n half two) d -> (n two half) d"
    copies = [k for k, line in enumerate(lines) if "copies on other ranks" in line]
    assert any("norm.weight" in lines[k - 2] for k in copies)
    assert any(line.startswith("needs: ") and "free where the output goes" in line for line in lines)
    assert any(line.startswith("rms_norm_eps") and "params.json: norm_eps" in line for line in lines)
    assert any("rope.freqs" in line and "recomputed from rope_theta" in line for line in lines)
    assert any(line.startswith("model.safetensors") for line in lines)
    assert len(lines) < 100


def test_the_largest_plan_prints_as_a_page(tmp_path: Path) -> None:
    plan = family("llama").plan(opened(real_header("llama-3.1-405b-mp8"), tmp_path), Options())
    text = shown(plan)
    assert "405" not in text.splitlines()[0] and "811.71 GB" in text.splitlines()[0]
    assert len(text.splitlines()) < 100


def test_stacked_experts_and_lossy_casts_are_shown(tmp_path: Path) -> None:
    text = shown(planned("mixtral-b", tmp_path, dtype="F16"))
    assert "(e f) d -> d (e f)" in text
    assert "experts.{0..7}.w2.weight" in text
    assert "lossy: --dtype" in text


def test_a_tensor_that_two_rows_ask_for_is_missing_once() -> None:
    rows = [rule("a", "x", "d"), rule("a", "y", "d")]
    filled = expand(rows, axes={"d": 2}, indices={}, original=lambda _: [], converted=lambda _: ("", "F32"))
    assert [(p.kind, p.where) for p in filled.problems] == [("missing-tensor", "a")]
