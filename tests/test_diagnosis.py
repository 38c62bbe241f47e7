"""Planted mistakes of every kind: caught, located and named, and nothing named that was not planted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.convert.layout import apply
from ckpt_tool.fixtures import flaws_values
from ckpt_tool.fixtures.flaws import Folder, NotHere, half_split, interleaved
from ckpt_tool.fixtures.flaws_documents import MISTAKES
from ckpt_tool.fixtures.flaws_kinds import KINDS, Roles, Truth, numbers
from ckpt_tool.fixtures.numbers import to_bits
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import Report, verify
from ckpt_tool.verify.altered import alteration, place
from ckpt_tool.verify.diagnose import Diagnosis
from ckpt_tool.verify.explain import Evidence, Explanation, explain
from ckpt_tool.verify.measure import Distance
from ckpt_tool.verify.mistakes import to_plant
from ckpt_tool.verify.rowmaps import Rows, as_text, hashes, located
from ckpt_tool.verify.sides import Change, Side, converted_side, original_side
from ckpt_tool.verify.subject import opened
from tests import packed_models

Written = Callable[[str], Path]
assert flaws_values  # adds its kinds

# One or two of each family; a kind is planted in the first that has what it needs, from a moving start.
PLANTED = (
    "mistral-7b-v0.3",
    "qwen2-0.5b",
    "gpt2-v2-tp2",
    "mixtral-c",
    "opt-13b",
    "bert-v2-tp2",
    "llama-3-70b",
    "codegen-350m-mono",
    "opt-float32",
    "llama-3.1-405b-mp16",
    "mistral-7b-v0.1",
    "bert-v1-bare",
    "qwen3-0.6b",
    "gemma-2-2b",
    "pythia-410m",
)
CONFIG = [k for k in KINDS if k.startswith("config: ")]
SEEN_BY_NO_PASS = (  # compared with the documents, not computed
    "config: end of text",
    "config: begin of text",
    "config: padding",
    "config: another dtype",
    "config: another model type",
)


@pytest.fixture
def tampered(
    originals: Written, conversions: Written, tmp_path: Path
) -> Callable[[str], tuple[str, Path, Truth]]:
    """`tampered(kind)`: the variant, its copy with the mistake in it, and what was planted."""

    def plant(kind: str) -> tuple[str, Path, Truth]:
        at = list(KINDS).index(kind) % len(PLANTED)
        for variant in chain(PLANTED[at:], PLANTED[:at]):
            folder = Path(shutil.copytree(conversions(variant), tmp_path / variant))
            opened = Folder(folder)
            try:
                return variant, folder, KINDS[kind](opened, Roles(opened))
            except NotHere:
                continue
            finally:
                opened.checkpoint.close()
        raise AssertionError(f"{kind} can be planted nowhere")

    return plant


@pytest.mark.parametrize(
    "variant", ["gemma-2-2b", "pythia-410m", "qwen3-8b", "mega-wikitext", "mobilebert-uncased"]
)
def test_every_kind_is_planted_or_has_no_place(variant: str, conversions: Written, tmp_path: Path) -> None:
    """Whatever names and norms a family has; Mega's config.json counts no heads."""
    places = 0
    for kind, plant in KINDS.items():
        opened = Folder(
            Path(shutil.copytree(conversions(variant), tmp_path / str(len(kind)), dirs_exist_ok=True))
        )
        try:
            places += bool(plant(opened, Roles(opened)).tensors)
        except NotHere:
            pass
        finally:
            opened.checkpoint.close()
    assert places > 40


def causes(report: Report) -> list[str]:
    return [str(f.data["cause"]) for f in report.level("diagnosis") if f.data["cause"] is not None]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in CONFIG])
def test_altered_tensors_are_named_by_their_bits(
    kind: str, tampered: Callable[[str], tuple[str, Path, Truth]], originals: Written
) -> None:
    variant, folder, truth = tampered(kind)
    report = verify(folder, originals(variant), levels="bits", settings=VARIANTS[variant].settings)
    assert report.exit_code == 1
    found = causes(report)
    assert found and all(truth.names(c) for c in found), (
        truth,
        [f.message for f in report.level("diagnosis")],
    )
    told = {t for f in report.level("diagnosis") for t in f.data["tensor"]}
    assert told & set(truth.tensors)
    assert report.headline.endswith(found[0])


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("kind", [k for k in CONFIG if k not in SEEN_BY_NO_PASS])
def test_values_of_config_json_are_named(
    kind: str, tampered: Callable[[str], tuple[str, Path, Truth]], originals: Written
) -> None:
    variant, folder, truth = tampered(kind)
    settings = VARIANTS[variant].settings
    report = verify(
        folder, originals(variant), levels=("coverage", "parity"), settings=settings, mode="quick"
    )
    assert report.exit_code == 1
    assert set(truth.tensors) & {str(f.where) for f in report.findings if f.status == "fail"}
    assert all(truth.names(c) for c in causes(report)), causes(report)


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("mobilebert-uncased", "q heads exchanged"),
        ("mobilebert-uncased", "q bias heads exchanged"),
        ("mluke-base", "a head twice"),
        ("canine-s", "o columns of heads exchanged"),
        ("canine-s", "q and k permuted like Llama's"),
    ],
)
def test_whole_heads_are_called_heads_where_the_table_has_one_axis_of_all_channels(
    variant: str, kind: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions(variant), tmp_path / variant))
    opened = Folder(folder)
    truth = KINDS[kind](opened, Roles(opened))
    opened.checkpoint.close()
    (cause,) = causes(verify(folder, originals(variant), levels="bits"))
    assert truth.names(cause), cause


def test_columns_of_a_query_are_not_called_heads(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """They are channels of what it reads, as many as all of its heads have."""
    folder = Path(shutil.copytree(conversions("mluke-base"), tmp_path / "out"))
    opened = Folder(folder)
    name = "luke.encoder.layer.1.attention.self.query.weight"
    opened.set(name, np.roll(opened.get(name), 8, 1))  # a head's width
    opened.checkpoint.close()
    report = verify(folder, originals("mluke-base"), levels="bits")
    assert causes(report) == ["attention.self.query columns shifted by +8"]


def test_pieces_of_a_unigram_vocabulary_exchange_their_ids(conversions: Written, tmp_path: Path) -> None:
    """It is a list of pieces with scores."""
    folder = Path(shutil.copytree(conversions("mluke-base"), tmp_path / "out"))
    before = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert MISTAKES["tokenizer: two ids exchanged"](folder)
    after = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(before) == sorted(after) and sum(a != b for a, b in zip(before, after, strict=True)) == 2


@pytest.mark.usefixtures("few_prompts")
def test_a_change_of_tensors_and_of_a_value_is_told_as_both(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions("mistral-7b-v0.3"), tmp_path / "out"))
    opened = Folder(folder)
    name = "model.layers.0.mlp.gate_proj.weight"
    opened.set(name, np.roll(opened.get(name), 1, 0))
    opened.write_config(rope_theta=1e4)
    opened.checkpoint.close()
    report = verify(folder, originals("mistral-7b-v0.3"), levels="parity")
    assert causes(report)[0] == (
        "mlp.gate_proj rows shifted by +1; rope_theta 10000 where it should be 1e+06"
    )


@pytest.mark.usefixtures("few_prompts")
def test_two_mistakes_in_one_layer_are_both_named(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions("mistral-7b-v0.3"), tmp_path / "out"))
    opened = Folder(folder)
    gate, down = ("model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.down_proj.weight")
    opened.set(gate, opened.get(gate)[::-1])
    opened.set(down, np.roll(opened.get(down), 2, 0))
    opened.checkpoint.close()
    report = verify(folder, originals("mistral-7b-v0.3"), levels=("bits", "parity"))
    assert sorted(causes(report)[0].split("; ")) == [
        "mlp.down_proj rows shifted by +2",
        "mlp.gate_proj rows in reverse order",
    ]
    assert len(report.level("diagnosis")) == 1


@pytest.mark.usefixtures("few_prompts")
def test_what_no_mistake_explains_is_located_and_not_named(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions("llama-3-70b"), tmp_path / "out"))
    opened = Folder(folder)
    name = "model.layers.1.self_attn.v_proj.weight"
    x = opened.get(name).copy()
    x[13, 4:9] = np.arange(5) * 977 + 16000
    opened.set(name, x)
    opened.checkpoint.close()
    settings = VARIANTS["llama-3-70b"].settings
    report = verify(folder, originals("llama-3-70b"), levels=("bits", "parity"), settings=settings)
    (found,) = report.level("diagnosis")
    assert (found.where, found.data["cause"], found.data["tensor"]) == ("layer 1", None, [name])
    assert "no known mistake explains self_attn.v_proj: 5 elements differ" in found.message
    assert "in rows 13 to 13, columns 4 to 8, all in head 2" in found.message  # heads of six rows


@pytest.mark.usefixtures("few_prompts")
def test_a_named_order_with_one_more_element_changed_is_not_named(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions("mistral-7b-v0.3"), tmp_path / "out"))
    opened = Folder(folder)
    name = "model.layers.1.mlp.gate_proj.weight"
    x = np.roll(opened.get(name), 1, 0)
    x[5, 5] ^= 1 << 9
    opened.set(name, x)
    opened.checkpoint.close()
    assert causes(verify(folder, originals("mistral-7b-v0.3"), levels=("bits", "parity"))) == []


def test_the_bits_are_explained_without_torch(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions("mistral-7b-v0.3"), tmp_path / "out"))
    opened = Folder(folder)
    opened.swap("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    opened.checkpoint.close()
    code = (
        "import sys; from ckpt_tool.verify import verify\n"
        f"r = verify({str(folder)!r}, {str(originals('mistral-7b-v0.3'))!r}, levels=('coverage', 'bits'))\n"
        "print(r.headline); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "layer 1: mlp.gate_proj and mlp.up_proj exchanged\n[]\n", run.stderr


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("attention.wq", lambda x: half_split(x, 6), "self_attn.q_proj rows not permuted for rotary"),
        ("attention.wq", lambda x: interleaved(x, 6), "self_attn.q_proj permuted twice"),
        ("feed_forward.w1", lambda x: np.roll(x, 1, 0), "mlp.gate_proj rows shifted by +1"),
    ],
)
def test_a_mistake_on_the_way_back_is_named(
    name: str, change: Callable[[np.ndarray], np.ndarray], cause: str, conversions: Written, tmp_path: Path
) -> None:
    """An original written with its rows left in the order of the Hugging Face layout, or permuted twice."""
    out, converted = tmp_path / "back", conversions("mistral-7b-v0.3")
    api.convert(converted, out, to="original", family="mistral")
    with open_checkpoint(out) as held:
        (tensor,) = held.find(f"layers.1.{name}.weight")
        file = held.files[tensor.file]
        extent, data = file.extent(tensor.name), np.ascontiguousarray(change(held.read(tensor))).tobytes()
        path = file.path
    assert extent is not None
    with path.open("r+b") as stream:
        stream.seek(extent[1])
        stream.write(data)
    assert causes(verify(out, converted, levels="bits")) == [cause]


@pytest.mark.parametrize(
    ("architecture", "name", "altered"),
    [
        ("GPT2LMHeadModel", "transformer.h.0.attn.c_attn.bias", [3]),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.query_key_value.bias", [7]),
        ("MegatronBertForMaskedLM", "bert.encoder.layer.0.attention.self.query.bias", [11]),
        ("MegatronBertForMaskedLM", "bert.encoder.layer.0.attention.self.key.bias", []),
    ],
)
def test_no_bias_of_a_key_is_planted_into(architecture: str, name: str, altered: list[int]) -> None:
    """What it adds to the scores of a query is the same for all keys, but for what the rotation makes of it:
    softmax takes it away. Twelve numbers are query, key and value of two heads of two channels."""
    config = {"architectures": [architecture], "num_attention_heads": 2}
    side: Any = SimpleNamespace(module=None, config=None, raw=config)
    made = [c for c in to_plant(0, None, {name: (12,)}, side) if c.name.endswith("1 % off")]
    right = torch.arange(1.0, 13.0)
    found = [change.tensors({name: right})[name] for change in made]
    assert [i for x in found for i in (x != right).nonzero().flatten().tolist()] == altered


# --- the same wrong row both ways ---------------------------------------------------------------------------

SQUARE = (  # a variant of each family that has matrices as wide as high
    "mistral-7b-v0.3",
    "mixtral-c",
    "llama-2-7b",
    "bert-v2-tp2",
    "gpt2-v2-tp2",
    "opt-13b",
    "codegen-350m-mono",
    "qwen2-0.5b",
    "pythia-410m",
    "canine-s",
    "mluke-base",
    "mobilebert-uncased",
    "gpt-oss-20b",
)


@pytest.mark.parametrize("variant", SQUARE)
def test_a_square_matrix_turned_both_ways_is_seen_by_parity_alone(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """A wrong row gives the source back as well as the right one does, byte for byte."""
    settings, folder = VARIANTS[variant].settings, conversions(variant)
    if packed_models.packed(folder):  # codes are carried as they lie; the trap is in numbers
        folder = tmp_path / "numbers"
        api.convert(originals(variant), folder, options=api.Options(dequantize="F32"), check=False)
    with opened(folder, originals(variant), settings) as subject:
        assert subject.plan is not None
        original, converted = (
            side(subject, torch.float64, "cpu") for side in (original_side, converted_side)
        )
        ids = torch.arange(1, 1 + converted.fits(40))[None]
        wanted = original.outputs(ids)["head"]

        def off(side: Side) -> float:
            error = side.outputs(ids)["head"] - wanted
            return float(error.square().mean() / wanted.var())

        assert off(converted) < 1e-14
        turned = []
        for step in subject.plan.steps:
            for k, part in enumerate(step.targets):
                shape = part.shape(step.sizes)
                if len(shape) < 2 or shape[-1] != shape[-2] or layer_of(part.name) != 0 or step.compare:
                    continue
                targets = list(step.targets)
                targets[k] = replace(part, dims=(*part.dims[:-2], part.dims[-1], part.dims[-2]))
                wrong = replace(step, targets=tuple(targets))
                source = [np.random.default_rng(7).random(p.shape(step.sizes)) for p in step.sources]
                back = apply(wrong.inverse(), apply(wrong, source))
                assert all(np.array_equal(x, y) for x, y in zip(source, back, strict=True))
                turned.append(part.name)
        assert turned
        for name in turned[:3]:
            other = Change("turned", lambda w, name=name: {name: w[name].mT.contiguous()})
            assert off(converted.changed(other)) > 1e-8, name


# --- orders of rows -------------------------------------------------------------------------------------


def rows_of(order: np.ndarray, *axes: tuple[str, int], ranks: int = 1) -> Rows:
    right = hashes(np.arange(len(order) * 3, dtype=np.uint16).reshape(-1, 3))
    return Rows(right, right[order], axes, ranks, "row")


@pytest.mark.parametrize(
    ("order", "axes", "ranks", "words"),
    [
        (np.roll(np.arange(12), 2), (("f", 12),), 1, "rows shifted by +2"),
        (np.roll(np.arange(12), -1), (("p", 12),), 1, "positions shifted by -1"),
        (np.roll(np.arange(12), 3), (("n", 4), ("h", 3)), 1, "heads rolled by 1"),
        (np.arange(12).reshape(4, 3)[::-1].reshape(-1), (("n", 4), ("h", 3)), 1, "heads in reverse order"),
        (np.array([0, 1, 2, 0, 1, 2, *range(6, 12)]), (("n", 4), ("h", 3)), 1, "head 1 holds head 0"),
        (np.arange(12).reshape(2, 6)[::-1].reshape(-1), (("f", 12),), 2, "ranks 0 and 1 exchanged"),
        (
            np.arange(24).reshape(12, 2)[as_text(12)].reshape(-1),
            (("f", 24),),
            12,
            "ranks in the order of their numbers as text (10 before 2)",
        ),
        (
            np.array([0, 1, 2, 3, 5, 6, 7, 8, 8, 9, 10, 11]),
            (("f", 12),),
            3,
            "a share of the rows off by one: rows 4 to 7 hold 5 to 8",
        ),
        (
            np.arange(24).reshape(2, 3, 4)[:, [0, 2, 1]].reshape(-1),
            (("a", 2), ("s", 3), ("x", 4)),
            1,
            "thirds 1 and 2 exchanged in each block of 3",
        ),
    ],
)  # fmt: skip
def test_an_order_of_rows_is_told(
    order: np.ndarray, axes: tuple[tuple[str, int], ...], ranks: int, words: str
) -> None:
    assert rows_of(order, *axes, ranks=ranks).words() == words


def test_rows_that_are_nobodys_have_no_order() -> None:
    right = hashes(np.arange(36, dtype=np.uint16).reshape(12, 3))
    found = right.copy()
    found[4] += np.uint64(1)
    assert Rows(right, found, (("f", 12),), 1, "row").words() is None


def test_equal_rows_keep_their_places() -> None:
    among = np.array([7, 7, 9, 7], np.uint64)
    assert located(among, among).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_rounding_on_the_way_is_told(dtype: str) -> None:
    drawn = to_bits(np.random.default_rng(0).standard_normal((40, 30)) * 1e-3, dtype)
    other, name = ("F16", "float16") if dtype != "F16" else ("BF16", "bfloat16")
    found = to_bits(numbers(to_bits(numbers(drawn, dtype), other), other), dtype)
    assert not np.array_equal(drawn, found)
    assert alteration(drawn, found, dtype, frozenset()) == f"rounded to {name} on the way"


def test_places_are_told_as_rows_columns_or_elements() -> None:
    wrong = np.zeros((6, 5), bool)
    wrong[2, 3] = True
    assert place(wrong) == "element (2, 3)"
    wrong[2:4] = True
    assert place(wrong) == "rows 2 to 3"
    assert place(np.ones((6, 5), bool)) == "every element"


def test_a_base_that_the_class_calls_otherwise_is_planted_and_taken_back() -> None:
    from ckpt_tool.verify.mistakes import rope_theta

    assert rope_theta({"model_type": "gpt_neox", "rotary_emb_base": 500}) == ("rotary_emb_base", 500.0)
    newer = {"rope_parameters": {"rope_theta": 7.0}}
    assert rope_theta({"model_type": "gpt_neox", **newer}) == ("rope_theta", 7.0)
    assert rope_theta({"model_type": "llama", "rotary_emb_base": 500}) == ("rope_theta", None)


@pytest.mark.parametrize(
    ("explanation", "told"),
    [
        (
            Explanation(compared=4),
            "all 4 tensors hold the bits that the source gives, so a value of config.json",
        ),
        (Explanation(compared=4, left=1), "all 4 tensors compared hold the bits that the source gives"),
        (Explanation(), None),  # nothing of the phase is there
        (
            Explanation(compared=1, left=1, missing=["pooler.dense.bias"]),
            "the output lacks pooler.dense.bias",
        ),
    ],
)
def test_config_is_at_fault_only_where_every_tensor_was_compared(
    explanation: Explanation, told: str | None
) -> None:
    found = Diagnosis("pooler_output", Distance(1.0, 1.0, 0, 1.0), [], None, explanation).finding()
    text = f"none of 0 known mistakes explains the difference{f'; {told}' if told else ''}"
    assert found.message.startswith(text)
    assert ("config.json" in found.message) == (explanation == Explanation(compared=4))


def test_what_finds_no_room_is_counted_and_not_explained(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Rows of three matrices turned round: as many pairs as half of the room takes are looked into, and
    nothing is said of the cause of all; a tensor above a quarter of it is not even compared."""
    out = shutil.copytree(conversions("qwen3-float32"), tmp_path / "out")
    w = load_file(out / "model.safetensors")
    names = [f"model.layers.1.mlp.{n}.weight" for n in ("down_proj", "gate_proj", "up_proj")]
    for name in names:
        w[name] = w[name][::-1].copy()
    save_file(w, out / "model.safetensors", metadata={"format": "pt"})
    size = w[names[0]].nbytes
    with opened(out, originals("qwen3-float32"), {}) as subject:
        whole, some, none = (explain(Evidence(subject), names, r) for r in (None, 8 * size, 4 * size - 4))
    assert whole.cause is not None and not whole.unlooked
    assert some.unlooked == names[2:] and some.cause is None and len(some.differing) == 3
    assert "1 of them not looked into for want of memory" in str(some.text)
    assert (none.compared, none.left, none.text) == (0, 3, None)


def test_a_tensor_that_is_not_there_holds_no_bits(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    out = shutil.copytree(conversions("mobilebert-classifier"), tmp_path / "out")
    w = load_file(out / "model.safetensors")
    del w["classifier.bias"]
    save_file(w, out / "model.safetensors", metadata={"format": "pt"})
    with opened(out, originals("mobilebert-classifier"), {}) as subject:
        found = explain(Evidence(subject), ["classifier.weight", "classifier.bias"])
    assert (found.compared, found.left, found.missing) == (1, 1, ["classifier.bias"])
