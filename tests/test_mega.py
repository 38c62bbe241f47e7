"""MEGA from its three files to the Hugging Face layout and back: arguments read as data, each used, checked
or refused by name, and what transformers computes otherwise said before and measured after."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pickle
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool import api
from ckpt_tool.checkpoint.arguments import read_arguments
from ckpt_tool.checkpoint.base import Document
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.families.mega import RMS_NORM
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference import hf_mega
from ckpt_tool.verify.probe import texts
from ckpt_tool.verify.sides import converted_side, original_side
from ckpt_tool.verify.subject import opened
from tests import loaded

ROOT = Path(__file__).parents[1]
Written = Callable[[str], Path]
BASE, CHUNKS, DECODER = "mega-laplace", "mega-chunks", "mega-decoder"


def arguments(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = pickle.loads((folder / "model_args.pkl").read_bytes())
    return found


def changed(folder: Path, variant: str = BASE, **told: Any) -> Path:
    """The variant with other arguments, pickled as Python does it today; None leaves one out."""
    VARIANTS[variant].write(folder)
    found = arguments(folder)
    for name, value in told.items():
        if name in found:
            found[name] = value
        elif value is ...:
            delattr(found["mega_args"], name)
        else:
            setattr(found["mega_args"], name, value)
    (folder / "model_args.pkl").write_bytes(pickle.dumps(found))
    return folder


def refused(folder: Path, **options: Any) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught, open_checkpoint(folder) as checkpoint:
        api.plan(checkpoint, family="mega", options=Options(**options))
    return caught.value


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# --- the pickle -------------------------------------------------------------------------------------------


def read(content: bytes, tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "model_args.pkl"
    path.write_bytes(content)
    return read_arguments(Document(path.name, path, len(content)))


@pytest.mark.parametrize("protocol", range(6))
def test_arguments_of_every_protocol_are_read_as_data(protocol: int, tmp_path: Path) -> None:
    inner = argparse.Namespace(encoder_z_dim=64, dropout=0.1, truncation_length=None, rel_pos_bias="rotary")
    content = pickle.dumps({"mega_args": inner, "depth": 4}, protocol)
    assert read(content, tmp_path) == {"mega_args": vars(inner), "depth": 4}


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


HOSTILE = {
    "a call": ({"mega_args": Runs(), "depth": 4}, b"", "unsafe-pickle"),
    "no dict": ([1, 2], b"", "wrong-format"),
    "more after its end": ({"depth": 4}, b"more", "trailing-data"),
    "too large": ({"depth": "x" * (1 << 20)}, b"", "bad-config"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_that_is_no_arguments_is_refused(case: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tree, after, kind = HOSTILE[case]
    with pytest.raises(CkptToolError) as caught:
        read(pickle.dumps(tree) + after, tmp_path)
    assert caught.value.kind == kind
    assert not (tmp_path / "ran").exists()


def test_shared_lists_are_not_multiplied(tmp_path: Path) -> None:
    """A few hundred bytes stand for 10^24 values."""
    many: list[Any] = [0] * 10
    for _ in range(24):
        many = [many] * 10
    assert read(pickle.dumps({"depth": 4, "x": many, "y": [1, [2]]}), tmp_path) == {
        "depth": 4,
        "x": "a list",
        "y": [1, [2]],
    }


def test_a_rate_that_json_cannot_say_is_not_carried_over(tmp_path: Path) -> None:
    with open_checkpoint(changed(tmp_path, dropout=float("nan"))) as checkpoint:
        made = api.plan(checkpoint, family="mega", options=Options())
    assert made.config["dropout_prob"].value == 0.1


# --- opening ----------------------------------------------------------------------------------------------


def test_one_of_the_files_opens_all(originals: Written) -> None:
    folder = originals(BASE)
    for path in (folder, folder / "encoder_weights.pt", folder / "mlm_head_weights.pt"):
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.files) == ["encoder_weights.pt", "mlm_head_weights.pt"]
            assert "model_args.pkl" in checkpoint.documents


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path)
    (folder / "mlm_head_weights.pt").unlink()
    problem = refused(folder).problems[0]
    assert (problem.kind, problem.file) == ("missing-file", "mlm_head_weights.pt")


def test_a_head_without_its_bias_is_refused(tmp_path: Path) -> None:
    """transformers would make one of zeros, and nobody said that it is."""
    folder = changed(tmp_path)
    torch.save({"weight": torch.zeros(324, 28).half()}, folder / "mlm_head_weights.pt")
    assert ("missing-tensor", "bias") in [(p.kind, p.where) for p in refused(folder).problems]


def test_without_arguments_each_is_asked_for(tmp_path: Path) -> None:
    folder = changed(tmp_path)
    (folder / "model_args.pkl").unlink()
    error = refused(folder)
    assert (error.problems[0].kind, "model_args.pkl" in error.problems[0].message) == ("missing-file", True)
    settings = {
        name: VARIANTS[BASE].true_config[name]
        for name in (
            *("activation", "attention_activation", "chunk_size", "truncation", "normalization_type"),
            *("normalize_before_mega", "normalize_before_ffn", "relative_positional_bias", "max_positions"),
        )
    }
    assert {p.where for p in error.problems[1:]} == settings.keys()
    with open_checkpoint(folder) as checkpoint:
        made = api.plan(checkpoint, family="mega", options=Options(settings=settings))
    assert {n: made.config[n].value for n in settings} == settings


# --- every argument is used, checked or refused ------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "norm": ({"normalization_type": "groupnorm"}, "unsupported", "normalization_type"),
    "activation": ({"activation_fn": "tanh"}, "unsupported", "activation_fn"),
    "scores": ({"attention_activation_fn": "cosine"}, "unsupported", "attention_activation_fn"),
    "bias": ({"rel_pos_bias": "alibi"}, "unsupported", "rel_pos_bias"),
    "chunk 0": ({"encoder_chunk_size": 0}, "bad-config", "encoder_chunk_size"),
    "chunk that is none": ({"encoder_chunk_size": None}, "bad-config", "encoder_chunk_size"),
    "truncation 0": ({"truncation_length": 0}, "bad-config", "truncation_length"),
    "depth": ({"depth": 4}, "missing-tensor", "num_hidden_layers"),
    "another depth": ({"encoder_layers": 5}, "bad-config", "depth"),
    "width": ({"encoder_embed_dim": 30}, "config-mismatch", "hidden_size"),
    "values": ({"encoder_hidden_dim": 46}, "config-mismatch", "intermediate_size"),
    "averages": ({"encoder_n_dim": 4}, "config-mismatch", "ema_projection_size"),
    "feed-forward": ({"encoder_ffn_embed_dim": 53}, "config-mismatch", "nffn_hidden_size"),
    "words": ({"vocab_size": 330}, "config-mismatch", "vocab_size"),
    "a norm that is a name": ({"normalize_before": "yes"}, "bad-config", "normalize_before"),
    "no chunk": ({"encoder_chunk_size": ...}, "missing-fact", "encoder_chunk_size"),
    "no truncation": ({"truncation_length": ...}, "missing-fact", "truncation_length"),
    "an object": ({"activation_fn": argparse.Namespace()}, "unsupported", "activation_fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_that_cannot_be_is_refused_by_name(case: str, tmp_path: Path) -> None:
    told, kind, where = REFUSED[case]
    error = refused(changed(tmp_path, **told))
    assert (kind, where) in [(p.kind, p.where) for p in error.problems], error.problems


def test_an_argument_that_nobody_reads_is_refused_and_the_hint_leads_out(tmp_path: Path) -> None:
    folder = changed(tmp_path, layer_scale=0.5, optimizer="adam", adam_eps=1e-8)
    problem = refused(folder).problems[0]
    assert (problem.kind, problem.where) == ("unsupported", "layer_scale")
    assert problem.hint == "--set layer_scale=null leaves it out, if it changes nothing"
    with open_checkpoint(folder) as checkpoint:
        made = api.plan(checkpoint, family="mega", options=Options(settings={"layer_scale": None}))
    assert any("layer_scale" in note for note in made.notes)


def test_the_tensors_decide_on_the_directions(tmp_path: Path, originals: Written) -> None:
    """The encoder's layer does not read `bidirectional`: what the arguments say otherwise is noted."""
    folder = changed(tmp_path, bidirectional=False)
    with open_checkpoint(folder) as checkpoint:
        made = api.plan(checkpoint, family="mega", options=Options())
    assert made.config["bidirectional"].value is True
    assert any(note.startswith("bidirectional false of the arguments") for note in made.notes)
    error = refused(originals(BASE), settings={"is_decoder": True})
    assert [(p.kind, p.where) for p in error.problems] == [("config-mismatch", "is_decoder")]


def test_the_original_has_one_order_of_norms(originals: Written) -> None:
    error = refused(originals(BASE), settings={"normalize_before_mega": True})
    assert [(p.kind, p.where) for p in error.problems] == [("unsupported", "normalize_before_ffn")]


def test_a_head_of_other_values_is_not_tied_and_the_hint_leads_out(
    originals: Written, tmp_path: Path
) -> None:
    """The wrapper has an output matrix of its own: a config that ties it would load another model."""
    api.convert(originals(BASE), tmp_path / "own", family="mega", check=False)
    assert config_of(tmp_path / "own")["tie_word_embeddings"] is False
    tied = Options(settings={"tie_word_embeddings": True})
    with pytest.raises(CkptToolError) as caught:
        api.convert(originals(BASE), tmp_path / "tied", family="mega", options=tied, check=False)
    assert "--set tie_word_embeddings=false keeps both" in (caught.value.problems[0].hint or "")
    assert not (tmp_path / "tied").exists()


# --- the way back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [BASE, CHUNKS, DECODER])
def test_the_way_back_is_what_the_publishers_code_loads(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    api.convert(conversions(variant), tmp_path / "back", family="mega", to="original", check=False)
    once, again = arguments(originals(variant)), arguments(tmp_path / "back")
    assert isinstance(again["mega_args"], argparse.Namespace)
    positions = "max_target_positions" if variant == DECODER else "max_source_positions"
    if variant == DECODER:  # the table is as long as a chunk, and the number of positions is read by nobody
        setattr(once["mega_args"], positions, 20)
    assert again == once
    for name in ("encoder_weights.pt", "mlm_head_weights.pt"):
        one, two = (torch.load(f / name, weights_only=True) for f in (originals(variant), tmp_path / "back"))
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "two orders of norms": ({"normalize_before_ffn": True}, "normalize_before_ffn"),
    "chunks that are not used": ({"chunk_size": 16}, "use_chunking"),
    "token types": ({"add_token_type_embeddings": True}, "add_token_type_embeddings"),
    "a dense layer of the head": ({"add_lm_hidden_dense_layer": True}, "add_lm_hidden_dense_layer"),
    "one direction and all tokens seen": ({"bidirectional": False}, "is_decoder"),
    "a function that is none of the publisher's": ({"activation": "mish"}, "activation"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_the_original_cannot_say_is_refused_on_the_way_back(
    case: str, conversions: Written, tmp_path: Path
) -> None:
    values, where = UNSAYABLE[case]
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in conversions(BASE).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **values}))
    with pytest.raises(CkptToolError) as caught:
        api.convert(folder, tmp_path / "back", family="mega", to="original", check=False)
    assert where in [p.where for p in caught.value.problems], caught.value.problems


def test_a_cast_leaves_counts_alone(originals: Written, tmp_path: Path) -> None:
    options = Options(settings={"tie_word_embeddings": True}, dtype="BF16")
    api.convert(originals(CHUNKS), tmp_path / "out", family="mega", options=options, check=False)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        found = {t.name.rpartition(".")[2]: t.dtype for t in checkpoint}
        (count, *_) = checkpoint.find("mega.layers.0.nffn.norm.norm.num_batches_tracked")
        assert int(checkpoint.read(count).view("<i8")) == 1234
    assert (found["num_batches_tracked"], found["running_var"]) == ("I64", "BF16")


# --- what transformers computes otherwise -----------------------------------------------------------------


def test_the_norm_that_forgets_its_division_is_foretold_and_accepted_by_name(tmp_path: Path) -> None:
    source, out = RMS_NORM.write(tmp_path / "original"), tmp_path / "out"
    done = api.convert(source, out, family="mega", check=False)
    assert [f.name for f in done.plan.foretold] == ["mega-rms-norm"]
    report = api.verify(out, source)
    found = [f for f in report.level("parity") if f.check == "foretold"]
    assert report.status == "fail" and len(found) == 2
    assert all("4.37.2" in f.message and f.measured == pytest.approx(f.bar, rel=1e-5) for f in found)
    assert api.verify(out, source, accept=("mega-rms-norm",)).status == "pass"


# --- the readings can fail --------------------------------------------------------------------------------

MUTANTS = {
    "averages: damping for decay": (CHUNKS, "kernel", "1.0 - damping * decay", "1.0 - damping * damping"),
    "averages: not scaled": (CHUNKS, "kernel", "math.sqrt(1.0 / projection.shape[1])", "1.0"),
    "averages: one step late": (CHUNKS, "ema", "R - 1 if c.both_ways else 0", "R if c.both_ways else 1"),
    "averages: the own step once": (CHUNKS, "ema", "-1), (0, R - 1)", "-1)[:, :-1], (0, R)"),
    "averages: cut off late": (BASE, "ema", "min(c.truncation, T)", "min(c.truncation + 1, T)"),
    "averages: padding goes in": (CHUNKS, "ema", "if mask is None", "if True"),
    "gate: the other way round": (CHUNKS, "gated_attention", "(residual_weight)", "(-residual_weight)"),
    "norm: epsilon": (CHUNKS, "norm", "eps=EPS", "eps=10 * EPS"),
    "scores: divided by all keys": (CHUNKS, "attention", "= C if padding is None", "= C if True"),
    "scores: padding seen": (CHUNKS, "attention", "weights if padding is None", "weights if True"),
    "scores: what comes later is seen": (DECODER, "attention", "if causal is not None", "if False"),
    "scores: not scaled": (DECODER, "attention", "query * Z**-0.5", "query"),
    "laplace: mean": (BASE, "laplace", "(x - mu)", "(x + mu)"),
    "rotary bias: turned the other way": (CHUNKS, "rotary", "angles.sin()", "-angles.sin()"),
    "distances: the other way round": (BASE, "relative", "2 * C - 1]", "2 * C - 1].T"),
    "feed-forward: without what it adds to": (BASE, "feed_forward", ") + x", ")"),
}  # fmt: skip
INPUTS = torch.tensor([[5 + 7 * k for k in range(40)], [3 + k * k % 290 for k in range(40)]])
MASK = torch.ones(2, 40, dtype=torch.long)
MASK[1, 26:] = 0


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("case", MUTANTS)
def test_a_mistake_in_the_reading_is_caught(
    case: str, originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, name, old, new = MUTANTS[case]
    with opened(conversions(variant), originals(variant), VARIANTS[variant].settings) as subject:
        sides = [f(subject, torch.float64, "cpu") for f in (original_side, converted_side)]
        given = {"mask": MASK}
        wanted = sides[0].forward(INPUTS, given)[MASK.bool()]

        def apart() -> float:
            found = sides[1].forward(INPUTS, given)[MASK.bool()]
            return float((found - wanted).square().mean() / wanted.var())

        assert apart() <= 1e-20
        text = inspect.getsource(getattr(hf_mega, name))
        assert old in text
        scope: dict[str, Any] = dict(vars(hf_mega))
        exec(f"from __future__ import annotations\n{text.replace(old, new)}", scope)
        monkeypatch.setattr(hf_mega, name, scope[name])
        assert apart() > 1e-9


def test_every_own_mistake_is_taken_back(originals: Written, conversions: Written) -> None:
    for variant in ("mega-wikitext", DECODER):
        with opened(conversions(variant), originals(variant)) as subject:
            side = converted_side(subject, torch.float64, "cpu")
            (w,), c = side.ranks, side.config
            for words, how in hf_mega.mistakes(list(w), c).items():
                plant, undo = how if isinstance(how, tuple) else (how, how)
                wrong: Mapping[str, Tensor] = plant(w)
                assert any(not torch.equal(x, w[n]) for n, x in wrong.items()), words
                if "left out" in words:
                    continue
                right = undo({**{n: w[n] for n in w}, **wrong})
                assert all(torch.allclose(x, w[n], rtol=1e-12) for n, x in right.items()), words


def test_lengths_that_a_pass_takes() -> None:
    """Whole chunks; less than one but for a decoder of transformers, whose mask is for a chunk."""
    base = {"num_hidden_layers": 1, "use_chunking": True, "chunk_size": 8}
    encoder = hf_mega.Config.from_hf(base)
    decoder = hf_mega.Config.from_hf({**base, "is_decoder": True, "bidirectional": False})
    assert [hf_mega.fits(n, encoder) for n in (3, 8, 23)] == [3, 8, 16]
    assert [hf_mega.fits(n, decoder) for n in (3, 8, 23)] == [0, 8, 16]
    simple = hf_mega.Config.from_hf(
        {"num_hidden_layers": 1, "relative_positional_bias": "simple", "max_positions": 30}
    )
    assert hf_mega.fits(90, simple) == 30


# --- the tokenizer ----------------------------------------------------------------------------------------

OLDEST = ROOT / ".judges" / "tf4.37"
SLOW_AND_FAST = """
import json, sys
from transformers import AutoTokenizer, MegaForMaskedLM, RobertaTokenizer, RobertaTokenizerFast
folder, texts, out = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
MegaForMaskedLM.from_pretrained(folder).save_pretrained(out)
made = [AutoTokenizer.from_pretrained(folder), RobertaTokenizerFast.from_pretrained(folder)]
made.append(RobertaTokenizer(folder + "/vocab.json", folder + "/merges.txt"))
print(json.dumps([[t(x)["input_ids"] for x in texts] for t in made]))
"""


@pytest.fixture(scope="module")
def oldest(conversions: Written, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Any, Path]:
    """What transformers 4.37.2 makes of a conversion: texts, their ids by three classes, and the folder that
    it saves the model into again."""
    folder = tmp_path_factory.mktemp("oldest")
    asked = list(texts(["<s>", "</s>", "<mask>", "<pad>"], ["Hello", "Ġworld"]))
    (folder / "texts.json").write_text(json.dumps(asked))
    given = [str(conversions("mega-wikitext")), str(folder / "texts.json"), str(folder / "again")]
    run = subprocess.run(
        [loaded.python("tf4.37"), "-W", "ignore", "-c", SLOW_AND_FAST, *given],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return asked, json.loads(run.stdout.splitlines()[-1]), folder / "again"


def test_the_vocabulary_is_roberta_s_in_both_releases(
    oldest: tuple[list[str], Any, Path], conversions: Written
) -> None:
    """The publisher's own tokenizer is that of fairseq's files, as RobertaTokenizer of 4.37.2 reads them."""
    from transformers import AutoTokenizer

    asked, (auto, fast, slow), _ = oldest
    folder = conversions("mega-wikitext")
    now = AutoTokenizer.from_pretrained(folder)
    ids = [now(x)["input_ids"] for x in asked]
    assert auto == fast == slow == ids
    assert ids[0] == [0, 2] and ids[asked.index("<mask>")][1] == 314
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "RobertaTokenizer"


def test_what_the_library_saves_again_goes_back_to_the_original(
    oldest: tuple[list[str], Any, Path], originals: Written, tmp_path: Path
) -> None:
    _, _, saved = oldest
    api.convert(saved, tmp_path / "back", family="mega", to="original", check=False)
    for name in ("encoder_weights.pt", "mlm_head_weights.pt"):
        folders = (originals("mega-wikitext"), tmp_path / "back")
        one, two = (torch.load(f / name, weights_only=True) for f in folders)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert api.verify(tmp_path / "back", saved, levels=("bits",)).status == "pass"


def test_the_release_that_has_it_shows_what_it_forgets(tmp_path: Path) -> None:
    """The library's numbers are those that were foretold, and no release without the class passes."""
    if not OLDEST.is_dir():
        pytest.skip("tf4.37 is not set up; `make test` does it")
    source, out = RMS_NORM.write(tmp_path / "original"), tmp_path / "out"
    api.convert(source, out, family="mega", check=False)
    asked: dict[str, Any] = {"levels": (), "against": "transformers", "accept": ("mega-rms-norm",)}
    report = api.verify(out, source, transformers_python=OLDEST, **asked)
    assert report.status == "pass", report.findings
    assert any("mega-rms-norm" in f.message and "4.37.2" in f.message for f in report.level("transformers"))
    assert api.verify(out, source, **asked).exit_code == 2
