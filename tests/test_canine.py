"""CANINE from TensorFlow to transformers and back: what its files say and do not say, the heads that are left
out, the two gelus, code points as a tokenizer, and mistakes that verification names."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool import api
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.families import family
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.tokenizers import codepoints
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.canine import PAIR, TABLE, canine
from ckpt_tool.fixtures.flaws import Folder
from ckpt_tool.fixtures.tensorflow import Bundle
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from ckpt_tool.verify.report import Report
from tests import loaded
from tests.headers_only import held
from tests.headers_only import planned as headers

ROOT = Path(__file__).parents[1]
Written = Callable[[str], Path]
ERF = "canine-erf-gelu"
SMALL = {"num_hidden_layers": 2, "hidden_size": 40, "max_positions": 44, "num_hash_buckets": 44}


def planned(folder: Path, bundle: Bundle, **settings: Any) -> Plan:
    folder.mkdir()
    bundle.write(folder, "canine-small", 0)
    with open_checkpoint(folder, prefer="original") as checkpoint:
        return family("canine").plan(checkpoint, Options(settings=settings))


def value(plan: Plan, name: str) -> Any:
    return plan.config[name].value


# --- what files say ---------------------------------------------------------------------------------------


def test_the_published_sizes_need_no_config() -> None:
    """Of headers of the published size: as many parameters as transformers counts."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "max_positions": 16384, "num_hash_buckets": 16384}
    bundle = canine(num_hidden_layers=12, **sizes)
    with held({"model.ckpt.data-00000-of-00001": shapes_of(bundle)}, {}) as checkpoint:
        made = family("canine").plan(checkpoint, Options())
    assert (value(made, "num_attention_heads"), value(made, "local_transformer_stride")) == (12, 128)
    assert "canine-s" in made.config["num_attention_heads"].source
    shapes = list(headers(made)["model.safetensors"].values())
    assert (len(shapes), sum(map(math.prod, shapes))) == (246, 132_082_944)


def test_other_sizes_ask_for_what_tensors_do_not_show(tmp_path: Path) -> None:
    with pytest.raises(CkptToolError) as error:
        planned(tmp_path / "in", replace(canine(**SMALL), config=None))
    assert {p.where for p in error.value.problems} == {"num_attention_heads", "local_transformer_stride"}


def test_what_the_code_does_not_read_decides_nothing(tmp_path: Path) -> None:
    """It has 16 token types, and makes molecules with a convolution as wide as its stride."""
    made = planned(tmp_path / "in", canine(**SMALL, downsampling_kernel_size=9, __comment__="of a run"))
    assert (value(made, "type_vocab_size"), value(made, "downsampling_rate")) == (16, 4)
    assert value(made, "hidden_act") == "gelu_new"
    assert any("--set hidden_act=gelu writes" in note for note in made.notes)


def test_what_a_config_leaves_out_has_the_default_of_the_code(tmp_path: Path) -> None:
    bundle = canine(**SMALL | {"hidden_size": 48})
    config = {k: v for k, v in (bundle.config or {}).items() if k in ("hidden_size", "max_positions")}
    config |= {
        k: (bundle.config or {})[k] for k in ("num_hidden_layers", "intermediate_size", "num_hash_buckets")
    }
    made = planned(tmp_path / "in", replace(bundle, config=config))
    assert (value(made, "num_attention_heads"), value(made, "local_transformer_stride")) == (12, 128)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # what the config says, what the user says, where it is refused and in which words
    "positions": ({"max_positions": 45}, {}, "max_position_embeddings", "as many positions as hash buckets"),
    "tanh": ({"hidden_act": "tanh"}, {}, "hidden_act", "expected one of gelu, relu, found"),
    "silu": ({}, {"hidden_act": "silu"}, "hidden_act", "expected one of gelu_new, relu"),
    "heads": (
        {"num_attention_heads": 3},
        {},
        "num_attention_heads",
        "hidden_size 40 to divide by it",
    ),
    "tables": ({"num_hash_functions": 4}, {}, "num_hash_functions", "expected 4"),
    "unknown": ({"local_attention": True}, {}, "local_attention", "keys that the publisher's code reads"),
    "eps": ({}, {"layer_norm_eps": 1e-5}, "layer_norm_eps", "1e-12"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_is_not_is_refused_by_name(name: str, tmp_path: Path) -> None:
    said, settings, where, words = REFUSED[name]
    bundle = canine(**SMALL)
    with pytest.raises(CkptToolError) as error:
        planned(tmp_path / "in", replace(bundle, config={**(bundle.config or {}), **said}), **settings)
    assert any(p.where == where and words in p.message for p in error.value.problems), error.value.problems


def shapes_of(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    from ckpt_tool.fixtures.shapes import shape_of, spread

    return {n: shape_of(words, bundle.sizes)[0] for n, words, _ in spread(bundle.shapes, bundle.sizes)}


# --- heads ------------------------------------------------------------------------------------------------


LEFT_OUT = {
    "canine-s": {
        "cls/predictions/output_bias": "a head of pre-training",
        "cls/seq_relationship/output_weights": "a head of pre-training",
    },
    "canine-c-training": {
        "autoregressive_decoder/char_output_weights": "the decoder of pre-training",
        "char_output_weights": "the decoder of pre-training",
        f"{TABLE}0/adam_m": "state of the optimizer",
        "global_step": "state of the training run",
    },
    "canine-tydi": {"answer_type_output_weights": "the kind of answer of TyDi QA"},
}


def test_heads_without_a_class_are_left_out_with_the_reason(conversions: Written) -> None:
    for variant, wanted in LEFT_OUT.items():
        manifest = json.loads((conversions(variant) / "ckpt-tool.json").read_text())
        dropped = {d["tensor"]: d["reason"] for d in manifest["dropped"]}
        assert all(reason in dropped[name] for name, reason in wanted.items()), variant


def test_the_answers_of_tydi_qa_become_question_answering(originals: Written, conversions: Written) -> None:
    folder = conversions("canine-tydi")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["CanineForQuestionAnswering"]
    with open_checkpoint(folder) as out, open_checkpoint(originals("canine-tydi")) as source:
        assert all(n.startswith(("canine.", "qa_outputs.")) for n in out.names())
        for ours, theirs in zip(PAIR, ("weight", "bias"), strict=True):
            (found, *_), (wanted, *_) = out.find(f"qa_outputs.{theirs}"), source.find(f"cls/tydi/{ours}")
            assert np.array_equal(out.read(found), source.read(wanted))


# --- the way back -----------------------------------------------------------------------------------------


def test_the_way_back_is_what_the_code_reads(
    conversions: Written, originals: Written, tmp_path: Path
) -> None:
    variant, out = "canine-c-training", tmp_path / "back"
    api.convert(conversions(variant), out, to="original", check=False)
    stem = "model.ckpt-70000"
    files = {"ckpt-tool.json", "model_config.json", f"{stem}.index", f"{stem}.data-00000-of-00001"}
    assert {p.name for p in out.iterdir()} == files
    wanted = bundle_of(variant).config or {}
    unread = {"downsampling_kernel_size": 4, "type_vocab_size": 16}
    assert json.loads((out / "model_config.json").read_text()) | unread == {**wanted, **unread}
    with open_checkpoint(out) as back, open_checkpoint(originals(variant)) as source:
        gone = ("adam_m", "adam_v", "global_step", "char_output_weights")
        kept = [n for n in source.names() if not n.endswith(gone) and not n.startswith("autoregressive")]
        assert sorted(back.names()) == sorted(kept)
        for name in kept:
            assert np.array_equal(back.read(back.find(name)[0]), source.read(source.find(name)[0])), name


def bundle_of(variant: str) -> Bundle:
    found = VARIANTS[variant].original
    assert isinstance(found, Bundle)
    return found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type_vocab_size": 2}, "expected 16, which the code has, found 2"),
        (
            {"architectures": ["CanineForTokenClassification"]},
            "expected a class whose head Google's code has",
        ),
        ({"hidden_act": "silu"}, "expected one of gelu_new, relu"),
    ],
)
def test_what_the_code_cannot_say_is_refused(
    values: Mapping[str, Any], words: str, conversions: Written, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(conversions("canine-c-training"), tmp_path / "in"))
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CkptToolError) as error:
        api.convert(folder, tmp_path / "out", to="original", check=False)
    assert any(words in p.message for p in error.value.problems), error.value.problems


# --- the two gelus ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(originals: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with the value that models published for transformers have."""
    out = tmp_path_factory.mktemp("erf") / "out"
    options = Options(settings={"hidden_act": "gelu"})
    api.convert(originals("canine-c-training"), out, family="canine", options=options, check=False)
    return out


def by_numbers(out: Path, source: Path, **more: Any) -> Report:
    return verify(out, source, levels=("parity",), **more)


def test_the_other_gelu_is_foretold_bounded_and_accepted_by_name(published: Path, originals: Written) -> None:
    """In every phase that has one, each given what the original gives it; and the library computes it so."""
    report = by_numbers(
        published,
        originals("canine-c-training"),
        settings={"hidden_act": "gelu"},
        accept=[ERF],
        against="transformers",
    )
    found = [f for f in report.level("parity") if f.check == "foretold"]
    assert [f.where for f in found] == [
        *("initial_char_encoder", "chars_to_molecules", "layer 0", "layer 1", "projection"),
        "final_char_encoder",
    ]
    assert all(f.status == "pass" and f.measured and f.bar for f in found)
    assert all(1e-5 < (f.measured or 0) < (f.bar or 0) < 0.1 for f in found)
    assert (report.exit_code, report.exactness) == (0, "within the foretold difference")


@pytest.mark.usefixtures("few_prompts")
def test_a_mistake_behind_the_other_gelu_still_fails(
    published: Path, originals: Written, tmp_path: Path
) -> None:
    folder = Folder(Path(shutil.copytree(published, tmp_path / "out")))
    bias = folder.get("projection.conv.bias").copy()
    bias.view(np.float32)[0] *= 1.01
    folder.set("projection.conv.bias", bias)
    folder.checkpoint.close()
    told = {"hidden_act": "gelu"}
    report = by_numbers(tmp_path / "out", originals("canine-c-training"), settings=told, accept=[ERF])
    assert report.exit_code == 1 and first(report) == "projection"


# --- mistakes ---------------------------------------------------------------------------------------------

Edit = Callable[[Folder], None]
PRIMES = (31, 43, 59, 61, 73, 97, 103, 113, 137, 149, 157, 173)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda folder: folder.set(name, change(folder.get(name)))


def wrong_hash(folder: Folder) -> None:
    for s, prime in enumerate(PRIMES):
        name = f"char_embeddings.HashBucketCodepointEmbedder_{s}.weight"
        folder.set(name, np.roll(folder.get(name), prime, 0))


def as_text(folder: Folder) -> None:
    names = [f"char_embeddings.HashBucketCodepointEmbedder_{s}.weight" for s in range(12)]
    values = [folder.get(n).copy() for n in names]
    for name, s in zip(names, sorted(range(12), key=str), strict=True):
        folder.set(name, values[s])


def halves(x: np.ndarray) -> np.ndarray:
    return np.roll(x, x.shape[1] // 2, 1)


UP, DOWN = "projection.conv.weight", "chars_to_molecules.conv.weight"
FIRST = "initial_char_encoder.layer.0.attention."
MISTAKES: dict[str, tuple[Edit, str, str]] = {
    "hash": (wrong_hash, "embed", "HashBucketCodepointEmbedder_0 rows shifted by +31"),
    "tables": (as_text, "embed", "HashBucketCodepointEmbedder_10, "),
    "taps": (changed(UP, lambda x: x[..., ::-1]), "projection", "projection.conv"),
    "upsampling": (changed(UP, lambda x: np.roll(x, 1, -1)), "projection", "slices shifted by +1"),
    "halves": (changed(UP, halves), "projection", "slices shifted by +60"),
    "in-out": (changed(DOWN, lambda x: x.swapaxes(0, 1)), "chars_to_molecules", "transposed: axes 2 1 3"),
    "query-key": (
        lambda f: f.swap(f"{FIRST}self.query.weight", f"{FIRST}self.key.weight"),
        "initial_char_encoder",
        "exchanged",
    ),
    "transposed": (
        changed(f"{FIRST}output.dense.weight", lambda x: x.T),
        "initial_char_encoder",
        "attention.output.dense left in the original's order",
    ),
}


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("name", MISTAKES)
def test_their_own_mistakes_are_located_and_named(
    name: str, conversions: Written, originals: Written, tmp_path: Path
) -> None:
    """Where the bits do not tell what was done, the numbers do."""
    edit, place, words = MISTAKES[name]
    folder = Folder(Path(shutil.copytree(conversions("canine-c-training"), tmp_path / "out")))
    edit(folder)
    folder.checkpoint.close()
    report = by_numbers(tmp_path / "out", originals("canine-c-training"))
    assert first(report) == place
    assert any(words in f.message for f in report.findings if f.level == "diagnosis"), report.findings


def first(report: Report) -> str:
    return str(next(f for f in report.level("parity") if f.check == "lockstep").data["first"])


# --- code points ------------------------------------------------------------------------------------------

TEXTS = (
    *("", "a", "Hello world", " lead", "tail ", "a  b   c", "[CLS] [MASK]", "\t\n\r\u2028\x85"),
    *("x\ue000 \ue001\x00 y \x00", "a \ue003 b", " \ue003", "\ue003 ", "\ue002\ue004 \ue003\ue003"),
    *("\ud800 \udfff alone", "e\u0301 é \U0001f9ff\U0010ffff\uffff", "\u200b\ufeff\u00ad"),
    *("\U0001f469\u200d\U0001f467 שלום مرحبا", "DON'T naïve Ångström Straße"),
)
JUDGE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer, logging
logging.set_verbosity_error()
folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = [tokenizer(t)["input_ids"] for t in json.load(open(f"{out}.json"))]
model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
batch = tokenizer(["Life is like a box.", "You know."], ["So?", "No"], padding=True, return_tensors="pt")
with torch.no_grad():
    found = model.eval()(**batch)
made = {"hidden": found.last_hidden_state, "pooled": found.pooler_output, **batch}
np.savez(out, **{n: t.numpy() for n, t in made.items()})
missing = sorted(map(str, info["missing_keys"]))
print(json.dumps([type(tokenizer).__name__, tokenizer.model_max_length, missing, ids]))
"""


def test_4_37_reads_texts_and_model_as_the_original_does(
    conversions: Written, originals: Written, tmp_path: Path
) -> None:
    """Any text is its code points between [CLS] and [SEP], and what the model makes of it is what the
    original computes; 5.23 is judged below and in test_end_to_end.py."""
    (tmp_path / "out.json").write_text(json.dumps(TEXTS))
    folder = conversions("canine-c-training")
    run = subprocess.run(
        [loaded.python("tf4.37"), "-c", JUDGE, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kind, longest, missing, ids = json.loads(run.stdout)
    assert (kind, longest, missing) == ("CanineTokenizer", 620, [])
    assert ids == [[57344, *map(ord, text), 57345] for text in TEXTS]
    made = np.load(tmp_path / "out.npz")
    assert made["token_type_ids"].max() == 1  # of the second text
    hidden, pooled = original(originals("canine-c-training"), made)
    real = made["attention_mask"].astype(bool)
    assert np.abs(hidden - made["hidden"])[real].max() < 2e-5 and np.abs(pooled - made["pooled"]).max() < 2e-5


def test_the_installed_release_reads_texts_as_code_points(conversions: Written) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(conversions("canine-c-training"))
    assert type(tokenizer).__name__ == "CanineTokenizer"
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [57344, *map(ord, text), 57345]
    if int(transformers.__version__.split(".")[0]) >= 5:  # what the plan's note says
        assert set(tokenizer("a", "b")["token_type_ids"]) == {0}


def original(source: Path, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What the reading of the variables makes of it."""
    import torch

    from ckpt_tool.reference import canine as reading

    with open_checkpoint(source) as checkpoint:
        wanted = [t for t in checkpoint if not t.name.endswith(("adam_m", "adam_v", "global_step"))]
        state = {t.name: torch.from_numpy(checkpoint.read(t).view(np.float32).copy()) for t in wanted}
        told = checkpoint.json("model_config.json")
    c = reading.Config.from_original(told, {n: tuple(t.shape) for n, t in state.items()}, 1, {})
    ids, mask, types = (torch.from_numpy(batch[n]) for n in ("input_ids", "attention_mask", "token_type_ids"))
    x = reading.encode(ids, [state], c, mask=mask, token_types=types)
    hidden, pooled = reading.HEADS["base_model"](x, [state], c)
    assert isinstance(hidden, torch.Tensor) and isinstance(pooled, torch.Tensor)
    return hidden.numpy(), pooled.numpy()


def test_the_tokenizer_is_as_long_as_there_are_positions() -> None:
    for positions, longest in ((16384, 2048), (2048, 2048), (620, 620)):
        made = codepoints.convert({"max_position_embeddings": positions})
        assert json.loads(made.documents["tokenizer_config.json"])["model_max_length"] == longest
        assert made.vocab_size == 0x110000
