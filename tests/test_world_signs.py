"""What is given instead of a checkpoint: other programs' files, a folder too high or too deep, the Hub's
cache, another family or direction. Each is told in one line, and its hint leads out: it is followed here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file as torch_file

from ckpt_tool import api, program
from ckpt_tool.checkpoint import hub, signs
from ckpt_tool.checkpoint.base import Checkpoint, TensorFile
from ckpt_tool.convert.families import FAMILIES, family
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.recognising import check_plain
from ckpt_tool.errors import CkptToolError, near
from ckpt_tool.fixtures.variants import VARIANTS

Written = Callable[[str], Path]
CASES = Path(__file__).parents[2] / "shared" / "cases"
FIRST = {f: next(n for n, v in VARIANTS.items() if v.family == f) for f in FAMILIES}  # a fixture of each
OPT = Options(settings={"num_attention_heads": 2, "activation_function": "relu"})


def case(name: str) -> Path:
    if not (CASES / name).is_dir():
        pytest.skip(f"../shared/cases/{name} is not here")
    return CASES / name


def refused(make: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        make()
    assert caught.value.exit_code == 2
    return caught.value


def hint_of(error: CkptToolError) -> str:
    hint = error.problems[0].hint
    assert hint, error
    return hint


def shown_path(hint: str) -> Path:
    """The path that a hint says to give."""
    found = re.search(r"--in (.+?)\)?$", hint)
    assert found is not None, hint
    return Path(found[1])


def put(folder: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class Nothing(TensorFile):
    """A file of which only the name matters."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise KeyError(name)

    def extent(self, name: str) -> tuple[int, int] | None:
        return None

    def check_unchanged(self) -> None:
        return None

    def close(self) -> None:
        return None


# --- other programs' files ------------------------------------------------------------------------------

TRAINERS = {
    "megatron_dist/iter_0000100": ("torch_dist", "--ckpt-format torch"),
    "megatron_dist": ("torch_dist", "--ckpt-format torch"),
    "fsdp": ("torch.distributed", "accelerate merge-weights"),
    "fsdp/pytorch_model_fsdp_0": ("torch.distributed", "accelerate merge-weights"),
    "nemo": ("NeMo archive", "nemo/model.nemo"),
    "torchtune": ("meta_model_0.pt", "meta_model_0.pt"),
}


@pytest.mark.parametrize("place", TRAINERS)
def test_files_of_other_trainers_are_named_with_what_reads_them(place: str) -> None:
    what, way = TRAINERS[place]
    path = case("files_of_other_trainers") / place
    for name in ("llama", "qwen2", "auto"):
        error = refused(lambda name=name: api.plan(path, family=name))  # type: ignore[misc]
        assert error.kind == "wrong-format" and what in error.problems[0].message
        assert way in hint_of(error) and len(error.problems) == 1


def test_the_file_that_the_hint_for_torchtune_names_converts(tmp_path: Path) -> None:
    error = refused(lambda: api.plan(case("files_of_other_trainers") / "torchtune", family="llama"))
    assert api.convert(shown_path(hint_of(error)), tmp_path / "out", family="llama").plan.outputs


# The files of a folder that is no checkpoint: one entry, or more, for each sign.
FOLDERS: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "adapter (PEFT, LoRA)": ("adapter_0.pt", "config.json"),
    "NeMo 2": ("context/io.json", "weights/.metadata", "weights/common.pt", "weights/__0_0.distcp"),
    "NeMo checkpoint in zarr": ("model_config.yaml", "model_weights/model.words.weight/.zarray"),
    "NeMo archive": ("model.nemo", "README.md"),
    ".qnemo": ("model.qnemo",),
    "NeMo model": ("model_config.yaml", "model_weights/x.bin"),
    "torch_dist": (".metadata", "metadata.json", "__0_0.distcp"),
    "zarr": ("iter_0000100/embedding.word_embeddings.weight/.zarray",),
    "FSDP weights": ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin"),
    "optimizer alone": ("optimizer_0/.metadata", "optimizer_0/__0_0.distcp"),
    "torch.distributed": (".metadata", "__0_0.distcp"),
    "without its .metadata": ("__0_0.distcp", "__1_0.distcp"),
    "without its data": (".metadata", "config.json"),
    "DeepSpeed": ("latest", "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py"),
    "universal checkpoint of DeepSpeed": ("global_step5_universal/zero/model.norm.weight/fp32.pt",),
    "DeepSpeed pipeline": ("layer_00-model_00-model_states.pt", "layer_01-model_00-model_states.pt"),
    "verl": ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt", "huggingface/config.json"),
    "NeuronX": ("model/dp_rank_00_tp_rank_00_pp_rank_00.pt",),
    "unpacked": ("consolidated.00/archive/data.pkl", "consolidated.00/archive/version", "params.json"),
    "split": ("model.safetensors.part_aa", "model.safetensors.part_ab", "config.json"),
    "gzip file": ("consolidated.00.pth.gz", "params.json"),
    "Metal": ("metal/model.bin",),
    "EasyLM": ("streaming_params", "tokenizer.model"),
    "FlexGen": ("decoder.embed_tokens.weight", "decoder.layers.0.fc1.weight"),
    "GGUF": ("model.Q4_K_M.gguf", "config.json"),
    "Ollama": ("blobs/sha256-0af4", "manifests/registry.ollama.ai/library/mistral/latest"),
    "llamafile": ("mistral.llamafile", "README.md"),
    "GGML": ("ggml-model-q4_0.bin", "params.json"),
    "Keras format": ("tf_model.h5", "config.json"),
    "HDF5": ("weights.h5",),
    "index of a TensorFlow": ("checkpoint", "m.ckpt.index", "m.ckpt.meta"),
    "data files of a TensorFlow": ("checkpoint", "m.ckpt.data-00000-of-00002", "m.ckpt.data-00001-of-00002"),
    "graph of a TensorFlow": ("checkpoint", "m.ckpt-12.meta"),
    "SavedModel": ("saved_model.pb", "variables/variables.index"),
    "TensorFlow graph": ("frozen.pb",),
    "Flax": ("flax_model.msgpack", "config.json"),
    "Orbax": ("_CHECKPOINT_METADATA", "manifest.ocdbt", "d/1"),
    "ONNX": ("onnx/model.onnx", "config.json"),
    "MLX": ("weights.npz", "config.json"),
    ".npy": ("w.npy",),
    "TensorRT engine": ("rank0.engine", "config.json"),
    "TensorRT-LLM": ("rank0.safetensors", "rank1.safetensors", "config.json"),
    "OpenVINO": ("openvino_model.xml", "openvino_model.bin"),
    "CoreML": ("model.mlpackage/Manifest.json",),
    "ExecuTorch": ("model.pte",),
    "Lite": ("model.tflite",),
    "CTranslate2": ("model.bin", "shared_vocabulary.json", "config.json"),
    "Rust": ("rust_model.ot", "config.json"),
    "diffusers": ("model_index.json", "unet/diffusion_pytorch_model.safetensors"),
    "sentence-transformers": ("modules.json", "0_Transformer/pytorch_model.bin"),
}


def test_every_sign_of_a_folder_has_an_example() -> None:
    told = {signs.of_folder([f"top/{p}" for p in paths]) for paths in FOLDERS.values()}
    whats = {found[0].what for found in told if found}
    assert {s.what for s in signs.SIGNS if s.paths is not None} == whats


@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("word", FOLDERS)
def test_a_folder_of_another_program_is_named(word: str, above: int, tmp_path: Path) -> None:
    put(tmp_path / "given" / "run" if above else tmp_path / "given", *FOLDERS[word])
    error = refused(lambda: api.open_checkpoint(tmp_path / "given"))
    (problem,) = error.problems
    if above and word in ("diffusers", "sentence-transformers"):  # the weights in it are found first
        assert word == "diffusers" or shown_path(hint_of(error)).name == "0_Transformer"
        return
    listed = any(f.endswith(".distcp") for f in FOLDERS[word])  # then the folder itself is given first
    if above and listed and any(".metadata" in f and not f.startswith("opt") for f in FOLDERS[word]):
        (problem,) = refused(lambda: api.open_checkpoint(shown_path(problem.hint or ""))).problems
    assert problem.kind == "wrong-format" and word in problem.message
    assert hint_of(error) and "{" not in hint_of(error)


STARTS = {
    "GGUF": b"GGUF\x03\0\0\0",
    "GGML": b"lmgg",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    "Xet": b"# xet version 0\n",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    ".npy": b"\x93NUMPY",
    "Lite": b"\x20\0\0\0TFL3",
    "ExecuTorch": b"\x20\0\0\0ET12",
    "TensorFlow": bytes(60) + signs.TABLE_END,
    "web page": b"<!DOCTYPE html><html>",
    "text of a link": b"../../blobs/0123456789abcdef",
}


@pytest.mark.parametrize("word", STARTS)
def test_a_file_is_told_by_its_bytes_and_never_without_a_hint(word: str, tmp_path: Path) -> None:
    start = STARTS[word] if word in ("TensorFlow", "text of a link") else STARTS[word] + bytes(80)
    for name in ("model.safetensors", "consolidated.00.pth", "weights"):
        put(tmp_path / name, name, content=start)
        for given in (tmp_path / name / name, tmp_path / name):
            error = refused(lambda given=given: api.open_checkpoint(given))  # type: ignore[misc]
            if name != "weights" or given.is_file():
                assert error.kind == "wrong-format" and word in error.problems[0].message
            assert hint_of(error)


NAMED = ("model.onnx", "rank0.engine", "model.msgpack", "x.index", "x.data-00000-of-00001", "__0_0.distcp")


@pytest.mark.parametrize("name", NAMED)
def test_a_file_whose_bytes_say_nothing_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, content=b"\x83\xa4" * 40)
    sign = signs.by_name(name)
    error = refused(lambda: api.open_checkpoint(tmp_path / name))
    assert sign is not None and sign.what in error.problems[0].message and hint_of(error)


def test_a_document_given_as_weights_leads_to_its_folder(originals: Written, tmp_path: Path) -> None:
    folder = originals("mistral-7b-v0.1")
    given = shown_path(hint_of(refused(lambda: api.open_checkpoint(folder / "params.json"))))
    with api.open_checkpoint(given) as checkpoint:
        assert checkpoint.names()


# --- downloads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".part", ".crdownload", ".incomplete", ".aria2"])
def test_an_unfinished_download_is_never_opened(suffix: str, originals: Written, tmp_path: Path) -> None:
    put(tmp_path / "only", f"consolidated.00.pth{suffix}", "params.json")
    assert refused(lambda: api.open_checkpoint(tmp_path / "only")).kind == "truncated"
    folder = shutil.copytree(originals("llama-2-7b"), tmp_path / "next")
    put(folder, f"consolidated.01.pth{suffix}")
    error = refused(lambda: api.open_checkpoint(folder))
    assert error.kind == "truncated" and f"consolidated.01.pth{suffix}" in error.problems[0].message
    (folder / f"consolidated.01.pth{suffix}").unlink()
    put(folder, f"consolidated.00.pth{suffix}")  # beside the whole file: only aria2 leaves it till the end
    for given in (folder, folder / "consolidated.00.pth"):
        if suffix == ".aria2":
            assert refused(lambda given=given: api.open_checkpoint(given)).kind == "truncated"  # type: ignore[misc]
        else:
            api.open_checkpoint(given).close()


def test_an_adapter_beside_the_weights_is_noted(originals: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "m")
    put(folder, "adapter_config.json", content=b"{}")
    with api.open_checkpoint(folder) as checkpoint:
        assert any("adapter_config.json" in n for n in checkpoint.notes)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


@pytest.mark.parametrize("name", FIRST.values())
def test_documents_that_are_pointers_are_never_taken_for_the_document(
    name: str, originals: Written, tmp_path: Path
) -> None:
    """A clone without its large files; the weights may have been downloaded apart."""
    original = originals(name)
    if original.is_file() or not any(f.suffix in (".json", ".model") for f in original.iterdir()):
        return  # an archive, or no document beside the weights
    options = Options(settings=VARIANTS[name].settings)
    unread = {"tokenizer.model"} if (original / "tokenizer.json").is_file() else set()
    for document in original.iterdir():
        if document.suffix not in (".json", ".model") or document.name in unread:
            continue
        folder = shutil.copytree(original, tmp_path / document.name)
        (folder / document.name).write_bytes(POINTER)
        error = refused(lambda f=folder: api.plan(f, family=VARIANTS[name].family, options=options))  # type: ignore[misc]
        assert any("git lfs pull" in (p.hint or "") for p in error.problems), document.name


# --- a level too high or too deep -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST.values())
def test_a_folder_too_high_leads_to_the_weights(name: str, originals: Written, tmp_path: Path) -> None:
    """Of every family, whatever container its originals come in; the hint is followed."""
    original = originals(name)
    with api.open_checkpoint(original) as checkpoint:
        names = checkpoint.names()
    (tmp_path / "repo" / "a").mkdir(parents=True)
    (tmp_path / "repo" / "a" / original.name).symlink_to(original)
    error = refused(lambda: api.plan(tmp_path / "repo", family=VARIANTS[name].family))
    assert error.kind == "wrong-format"
    with api.open_checkpoint(shown_path(hint_of(error))) as checkpoint:
        assert checkpoint.names() == names
    if original.is_dir():
        (tmp_path / "repo" / "b").symlink_to(original)
        error = refused(lambda: api.open_checkpoint(tmp_path / "repo"))
        assert error.kind == "ambiguous-input" and "b" in error.problems[0].message


def test_a_folder_one_level_too_deep_leads_up(originals: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "m")
    put(folder, "tokenizer/tokenizer.json", content=b"{}")
    error = refused(lambda: api.open_checkpoint(folder / "tokenizer"))
    assert shown_path(hint_of(error)) == folder


def test_two_sizes_below_original_are_both_named() -> None:
    folder = case("folder_one_level_too_high") / "hub_repo"
    error = refused(lambda: api.plan(folder, family="llama"))
    assert error.kind == "ambiguous-input"
    assert all(f"original/{m}" in error.problems[0].message for m in ("mp8", "mp16"))
    api.open_checkpoint(shown_path(hint_of(error))).close()


def cached(folder: Path, original: Path, *commits: str, main: str | None) -> Path:
    """`original` as the Hub's cache keeps it, once for each commit."""
    root = folder / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    for commit in commits:
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in original.iterdir():
            shutil.copy(file, root / "blobs" / f"{file.name}-blob")
            (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    if main is not None:
        put(root, "refs/main", content=main.encode())
    return root


@pytest.mark.parametrize("inside", ["", "snapshots", "blobs", "refs"])
def test_the_folder_of_the_hub_cache_is_opened_at_its_snapshot(
    inside: str, originals: Written, tmp_path: Path
) -> None:
    root = cached(tmp_path, originals("mistral-7b-v0.1"), "0123abcd", "ffff", main="0123abcd")
    with api.open_checkpoint(root / inside) as checkpoint:
        assert checkpoint.path == root / "snapshots" / "0123abcd" and "params.json" in checkpoint.documents
        assert any("snapshots/0123abcd was opened, as refs/main says" in n for n in checkpoint.notes)
    assert api.convert(root / inside, tmp_path / "out", family="mistral").plan.outputs


def test_convert_and_plan_show_what_was_opened(
    originals: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(cached(tmp_path, originals("mistral-7b-v0.1"), "0123abcd", main="0123abcd"))
    assert program.run(["plan", "mistral", "--in", root]) == 0
    assert program.run(["convert", "mistral", "--in", root, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("snapshots/0123abcd") == 2
    assert program.run(["plan", "mistral", "--in", root, "--json"]) == 0
    assert "refs/main says" in json.loads(capsys.readouterr().out)["opened"][0]


def test_many_files_share_a_note() -> None:
    files: dict[str, TensorFile] = {f"part-{k}": Nothing() for k in range(40)}
    notes = [*(f"{f}: kept as inert data" for f in files), *(f"note {k}" for k in range(30))]
    told = Checkpoint(Path("x"), files, notes=notes).opened()
    assert told[0] == "part-0 and 39 more files: kept as inert data" and told[1] == "note 0"
    assert len(told) == 11 and told[-1].startswith("21 more notes")


REPOSITORIES = {
    ("model.Q4_K_M.gguf", "config.json"): ("GGUF", "get the release"),
    ("original/mp8/consolidated.00.pth", "original/mp8/params.json"): (
        "found them in original/mp8",
        "--include 'original/mp8*'",
    ),
    ("adapter_config.json", "adapter_model.safetensors"): ("adapter", "PeftModel"),
    ("README.md",): ("1 other file: README.md", "folder that holds the weights"),
}


@pytest.mark.parametrize("names", REPOSITORIES)
def test_a_repository_of_the_hub_is_told_by_its_names(names: tuple[str, ...]) -> None:
    error = refused(lambda: hub.wanted(names, "hf://org/name@v1"))
    what, way = REPOSITORIES[names]
    assert what in error.problems[0].message and way in hint_of(error)


@pytest.mark.parametrize("called", ["consolidated.pth", "consolidated.0.pth", "consolidated.pt"])
def test_a_single_file_with_another_number_or_none(called: str, originals: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "m")
    (folder / "consolidated.00.pth").rename(folder / called)
    with api.open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.files) == [called]
    shutil.copy(folder / called, folder / "consolidated.00.pth")
    error = refused(lambda: api.open_checkpoint(folder))
    assert error.kind == "ambiguous-input"
    if called == "consolidated.pth":
        api.open_checkpoint(folder / "consolidated.00.pth").close()  # the hint, followed
    elif called == "consolidated.0.pth":
        assert "to a folder of their own" in hint_of(error)


def test_snapshots_without_a_word_on_which(originals: Written, tmp_path: Path) -> None:
    original = originals("mistral-7b-v0.1")
    api.open_checkpoint(cached(tmp_path / "one", original, "aa", main=None)).close()
    error = refused(lambda: api.open_checkpoint(cached(tmp_path / "two", original, "aa", "bb", main="../..")))
    assert error.kind == "ambiguous-input" and "aa and bb" in error.problems[0].message
    api.open_checkpoint(shown_path(hint_of(error))).close()
    empty = tmp_path / "three" / "models--org--name"
    (empty / "snapshots").mkdir(parents=True)
    assert "hf download org/name" in hint_of(refused(lambda: api.open_checkpoint(empty)))


def test_a_snapshot_whose_blobs_are_gone(originals: Written, tmp_path: Path) -> None:
    root = cached(tmp_path, originals("mistral-7b-v0.1"), "aa", main="aa")
    (root / "blobs" / "consolidated.00.pth-blob").unlink()
    error = refused(lambda: api.open_checkpoint(root))
    assert error.kind == "bad-input" and "hf download org/name" in hint_of(error)


def test_the_shared_folder_of_the_hub_cache(tmp_path: Path) -> None:
    """Its links may have come as texts, which are followed; and made links again."""
    given = case("folder_one_level_too_high") / "models--org--name"
    done = api.convert(given, tmp_path / "as-given", family="mistral")
    assert any("0123abcd" in n for n in done.opened)
    if not any(f.is_symlink() for f in given.glob("snapshots/*/*")):
        assert any("copied as texts" in n for n in done.opened)
    root = shutil.copytree(given, tmp_path / "models--org--name", symlinks=True)
    for file in root.glob("snapshots/*/*"):
        if not file.is_symlink() and (text := file.read_bytes()).startswith(b"../../blobs/"):
            file.chmod(0o644)
            file.parent.chmod(0o755)
            file.unlink()
            file.symlink_to(text.decode())
    done = api.convert(root, tmp_path / "out", family="mistral")
    assert any("0123abcd" in n for n in done.opened) and not any("as texts" in n for n in done.opened)


# --- metaseq's names ------------------------------------------------------------------------------------

PARTS = (
    "reshard-model_part-{}-shard0.pt",
    "checkpoint_last-model_part-{}-shard0.pt",
    "checkpoint_1_1000-model_part-{}-shard0.pt",
    "checkpoint_last-model_part-{}.pt",
    "checkpoint_1_4000.pt-model_part-{}.pt",
    "consolidated-model_part-{}.pt",
)


def parts(folder: Path, original: Path, name: str) -> Path:
    folder.mkdir()
    for file in original.iterdir():
        found = re.fullmatch(r"reshard-model_part-(\d+)\.pt", file.name)
        (folder / (name.format(found[1]) if found else file.name)).symlink_to(file)
    return folder


@pytest.mark.parametrize("name", PARTS)
def test_parts_by_every_name_of_metaseq_are_the_same_model(
    name: str, originals: Written, tmp_path: Path
) -> None:
    variant = VARIANTS["opt-13b"]
    folder = parts(tmp_path / "p", originals("opt-13b"), name)
    options = Options(settings=variant.settings)
    usual = api.plan(originals("opt-13b"), family="opt", options=options)
    assert api.plan(folder, family="opt", options=options).outputs == usual.outputs
    with api.open_checkpoint(folder / name.format(1)) as one, api.open_checkpoint(folder) as all_of_them:
        assert list(one.files) == list(all_of_them.files) == [name.format(k) for k in range(len(one.files))]
    (folder / name.format(0)).unlink()
    assert refused(lambda: api.open_checkpoint(folder)).kind == "missing-shard"


def test_parts_of_two_runs_are_ambiguous_and_flat_shards_refused(originals: Written, tmp_path: Path) -> None:
    folder = parts(tmp_path / "p", originals("opt-13b"), PARTS[1])
    put(folder, PARTS[2].format(0))
    error = refused(lambda: api.open_checkpoint(folder))
    assert error.kind == "ambiguous-input" and "checkpoint_1_1000-model_part-*" in error.problems[0].message
    (folder / PARTS[2].format(0)).unlink()
    put(folder, "checkpoint_last-model_part-0-shard1.pt")
    for given in (folder, folder / PARTS[1].format(0), folder / "checkpoint_last-model_part-0-shard1.pt"):
        error = refused(lambda given=given: api.open_checkpoint(given))  # type: ignore[misc]
        assert error.kind == "unsupported" and "reshard_fsdp.py" in hint_of(error)


@pytest.mark.parametrize("which", ["shard0", "last"])
def test_the_shared_parts_are_the_regular_ones(which: str, tmp_path: Path) -> None:
    folder = case("opt_parts_named_shard0")
    written = {}
    for name in ("regular", which):
        api.convert(folder / name, tmp_path / name, family="opt", options=OPT)
        written[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert written["regular"] == written[which]
    shutil.copytree(folder / which, tmp_path / "less", copy_function=shutil.copyfile)
    sorted((tmp_path / "less").iterdir())[1].unlink()
    error = refused(lambda: api.plan(tmp_path / "less", family="opt", options=OPT))
    assert error.kind == "missing-shard"


# --- another family, another direction ------------------------------------------------------------------


@pytest.mark.parametrize("named", FAMILIES)
@pytest.mark.parametrize("real", FAMILIES)
def test_another_family_is_named_first(real: str, named: str, originals: Written) -> None:
    """No family takes another's model for its own, and what it says first is whose it is."""
    if real == named:
        return
    variant = VARIANTS[FIRST[real]]
    options = Options(settings=variant.settings)
    with api.open_checkpoint(originals(FIRST[real])) as checkpoint:
        error = refused(lambda: api.plan(checkpoint, family=named, options=options))
    first = error.problems[0]
    assert f"looks like {real}" in first.message and f"convert {real}`" in (first.hint or "")


@pytest.mark.parametrize("name", [FIRST[f] for f in FAMILIES if not family(f).published])
def test_the_other_direction_is_said_in_one_line(name: str, originals: Written, conversions: Written) -> None:
    own = VARIANTS[name].family
    for asked in (own, "auto"):
        error = refused(lambda asked=asked: api.plan(originals(name), family=asked, to="original"))  # type: ignore[misc]
        assert error.kind == "wrong-format" and f"an original of {own}" in error.problems[0].message
        assert "leave out --to original" in hint_of(error) and len(error.problems) == 1
        kept = api.plan(conversions(name), family=asked)  # which is canonical already
        assert {s.note for s in kept.steps} == {"rename"}
    assert api.plan(conversions(name), to="original").outputs  # the hint, followed


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral"])
def test_a_missing_params_json_comes_before_questions_about_its_content(
    name: str, originals: Written, tmp_path: Path
) -> None:
    folder = shutil.copytree(originals(FIRST[name]), tmp_path / "m")
    (folder / "params.json").unlink()
    first, *others = refused(lambda: api.plan(folder, family=name)).problems
    if first.kind == "unknown-family":  # nothing but params.json tells these apart
        first, *others = others
    assert first.kind == "missing-file" and "params.json" in first.message
    assert {p.kind for p in others} == {"missing-fact"}


# --- auto -----------------------------------------------------------------------------------------------


def tensors(folder: Path, *names: str, **config: object) -> Path:
    folder.mkdir()
    save_file({n: np.zeros((4, 4), "f4") for n in names}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


NEARLY = {
    "layers.0.attention.wq.weight": ["ministral3", "llama", "mistral"],
    "policy.layers.0.attention.wq.weight": ["ministral3", "llama", "mistral"],
    "model.layers.0.self_attn.k_norm.weight": ["qwen3"],
    "gpt_neox.layers.0.attention.dense.weight": ["gpt-neox"],
    "transformer.h.0.attn.c_attn.weight": ["codegen"],
    "model.decoder.layers.0.self_attn_layer_norm.bias": ["opt"],
}


@pytest.mark.parametrize("name", NEARLY)
def test_auto_names_the_near_misses_only(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tensors(tmp_path / "m", name, architectures=["StrangeForCausalLM"])
    assert program.run(["convert", "auto", "--in", str(folder), "--out", str(tmp_path / "out")]) == 2
    first, hint, *misses = capsys.readouterr().err.splitlines()
    assert name in first and "StrangeForCausalLM" in first and "hint: " in hint
    assert 1 <= len(misses) <= 3 and all(len(line) <= 100 for line in misses)
    told = [line.split(": ")[1] for line in misses]
    assert told[: len(NEARLY[name])] == NEARLY[name]


def test_names_below_another_word_are_said_to_be_there(tmp_path: Path) -> None:
    folder = tensors(tmp_path / "m", "policy.layers.0.attention.wq.weight")
    for asked in ("auto", "llama"):
        error = refused(lambda asked=asked: api.plan(folder, family=asked))  # type: ignore[misc]
        assert any("found it below `policy.`" in p.message for p in error.problems)


def test_auto_says_what_the_files_hold_where_nothing_is_near(tmp_path: Path) -> None:
    error = refused(lambda: api.plan(tensors(tmp_path / "m", "conv1.weight")))
    assert len(error.problems) == 1 and "1 tensor such as conv1.weight" in error.problems[0].message


PACKED = {
    "model.layers.0.self_attn.q_proj.qweight": "GPTQ or AWQ",
    "model.layers.0.mlp.up_proj.forward_hadamard_matrix": "FP-Quant",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": "LoRA",
    "layers.0.attention.wq.lora_b.weight": "LoRA",
    "base_model.model.model.layers.0.mlp.down_proj.ia3_l": "IA3",
    "model.layers.0.self_attn.q_proj.lora_E.default": "LoRA",
    "layers.0.attention.wq.hada_w1_a": "LoHa",
    "lm_head.modules_to_save.default.weight": "modules_to_save",
    "model.layers.0.mlp.up_proj.weight.absmax": "bitsandbytes",
    "model.layers.0.mlp.up_proj.SCB": "bitsandbytes",
    "model.layers.0.mlp.up_proj.weight_packed": "compressed-tensors",
    "model.layers.0.mlp.up_proj.weight_scale_inv": "fp8",
    "layers.0.attention.wq.qscale_weight": "fp8",
    "model.layers.0.mlp.experts.gate_up_proj_blocks": "MXFP4",
    "model.layers.0.mlp.up_proj.Qidxs": "QuIP",
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("asked", ["auto", "llama", "qwen2", "opt"])
def test_packed_weights_are_named(asked: str, name: str, tmp_path: Path) -> None:
    error = refused(lambda: api.plan(tensors(tmp_path / "m", name, "norm.weight"), family=asked))
    (problem,) = error.problems
    assert problem.kind == "unsupported" and PACKED[name] in problem.message and hint_of(error)
    again = refused(lambda: api.convert(tmp_path / "m", tmp_path / "out", family=asked))
    assert again.problems == error.problems


def test_mlx_weights_and_their_way_back_are_named(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.q_proj.{k}" for k in ("weight", "scales", "biases")]
    error = refused(lambda: api.plan(tensors(tmp_path / "m", *names)))
    assert "MLX" in error.problems[0].message and "--dequantize" in hint_of(error)


@pytest.mark.parametrize("name", FIRST.values())
def test_no_original_is_taken_for_packed(name: str, originals: Written) -> None:
    with api.open_checkpoint(originals(name)) as checkpoint:
        check_plain(checkpoint)  # does not raise


# --- did you mean ---------------------------------------------------------------------------------------

TYPED = {
    "family": (["convert", "lama", "--in", "x", "--out", "y"], "did you mean llama?"),
    "family of plan": (["plan", "mistal", "--in", "x"], "did you mean mistral"),
    "fixture": (["fixtures", "opt-13", "--out", "y"], "did you mean opt-13b"),
    "table": (["table", "--only", "qwen"], "did you mean qwen"),
    "option": (["convert", "llama", "--inn", "x", "--out", "y"], "'--in'?"),
    "command": (["convret"], "Did you mean 'convert'?"),
}


@pytest.mark.parametrize("what", TYPED)
def test_a_word_spelled_wrong_is_told_right(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, hint = TYPED[what]
    assert program.run(arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", FIRST.values())
def test_a_key_of_set_spelled_wrong_is_told_right(name: str, originals: Written) -> None:
    settings = {**VARIANTS[name].settings, "num_hidden_layer": 2}
    error = refused(
        lambda: api.plan(originals(name), family=VARIANTS[name].family, options=Options(settings=settings))
    )
    wrong = next(p for p in error.problems if p.where == "num_hidden_layer")
    assert wrong.kind == "usage" and (wrong.hint or "").startswith("did you mean num_hidden_layers")


def test_a_path_spelled_wrong_and_a_name_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "Mistral-7B").mkdir()
    assert "Mistral-7B" in hint_of(refused(lambda: api.open_checkpoint(tmp_path / "mistral-7b")))
    assert "hf://org/name" in hint_of(refused(lambda: api.open_checkpoint("org/name")))
    assert near("quite", ("different",)) is None


# --- hints that are pasted ------------------------------------------------------------------------------


def pasted(hint: str) -> str:
    """The path after --in as a shell takes it."""
    return shlex.split(hint.partition("--in ")[2])[0]


def test_a_path_with_spaces_in_a_hint_can_be_pasted(
    originals: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "my runs" / "a model")
    put(inner, "tokenizer/tokenizer.json", content=b"{}")
    for given in (tmp_path / "my runs", inner / "tokenizer", inner / "params.json"):
        hint = hint_of(refused(lambda given=given: api.open_checkpoint(given)))  # type: ignore[misc]
        assert Path(pasted(hint)) == inner
    put(tmp_path / "my lora", "adapter_config.json")
    assert "'" in hint_of(refused(lambda: api.open_checkpoint(tmp_path / "my lora")))
    out = tmp_path / "o ut"
    assert program.run(["convert", "mistral", "--in", str(inner), "--out", str(out)]) == 0
    assert f"ckpt-tool verify '{out}' --source '{inner}'\n" in capsys.readouterr().out  # in one line


@pytest.mark.parametrize(("inside", "given"), [("tokenizer", "."), ("tokenizer/x", ".."), ("", "tokenizer")])
def test_the_folder_above_is_named_from_wherever_one_stands(
    inside: str, given: str, originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(originals("mistral-7b-v0.1"), tmp_path / "m")
    put(folder, "tokenizer/x/tokenizer.json", content=b"{}")
    monkeypatch.chdir(folder / inside)
    error = refused(lambda: api.open_checkpoint(given))
    assert Path(pasted(hint_of(error))).resolve() == folder.resolve()


@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "mistral"])
def test_the_way_back_of_another_family_names_it(name: str, conversions: Written) -> None:
    error = refused(lambda: api.plan(conversions("mistral-7b-v0.1"), family=name, to="original"))
    assert error.kind == "unknown-family" and "MistralForCausalLM" in error.problems[0].message
    assert "`ckpt-tool convert mistral --to original`" in hint_of(error) and len(error.problems) == 1


@pytest.mark.parametrize("command", ["fixtures mistral-7b-v0.1", "demo"])
def test_a_command_names_no_flag_that_it_has_not(
    command: str, conversions: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run([*command.split(), "--out", str(conversions("mistral-7b-v0.1"))]) == 2
    said = capsys.readouterr().err
    assert "output-exists" in said and "--overwrite" not in said and "choose another --out" in said


def test_a_file_of_two_averages_leads_to_one_of_them(originals: Written, tmp_path: Path) -> None:
    import torch

    original = originals("mistral-7b-v0.3")
    folder = shutil.copytree(original, tmp_path / "m")
    held = torch_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    slower = {k: v.clone() for k, v in held.items()}
    torch.save({"ema": held, "model_ema": slower}, folder / "consolidated.00.pth")
    for name in ("mistral", "auto"):
        error = refused(lambda name=name: api.plan(folder, family=name))  # type: ignore[misc]
        assert "below `ema.`" in str(error) and "tie_word_embeddings" not in str(error)
        assert "save what is below `ema.` alone" in hint_of(error)
    torch.save(held, folder / "consolidated.00.pth")  # as the hint says
    assert len(api.plan(folder, family="mistral").steps) == len(held)


def test_a_head_called_as_in_memory_is_read_as_on_disk(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """What transformers 5 holds of GPT-NeoX, saved as state_dict()."""
    import torch

    original, right = originals("gpt-neox-20b"), conversions("gpt-neox-20b")
    held = {n: x for f in sorted(original.glob("*.safetensors")) for n, x in torch_file(f).items()}
    held["lm_head.weight"] = held.pop("embed_out.weight")
    unwanted = shutil.ignore_patterns("*.safetensors", "*.index.json")
    for wrap in (dict, lambda held: {"state_dict": held}):
        folder = shutil.copytree(original, tmp_path / f"in{wrap is dict}", ignore=unwanted)
        torch.save(wrap(held), folder / "pytorch_model.bin")
        done = api.convert(folder, tmp_path / f"out{wrap is dict}")
        assert any("lm_head.weight was read as embed_out.weight" in n for n in done.plan.notes)
        assert (done.out / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()
        assert api.verify(done.out, folder, levels=("coverage", "bits")).exit_code == 0
    report = api.verify(tmp_path / "inTrue", original, levels=("coverage", "bits"))
    assert report.exit_code == 0 and any("in memory" in f.message for f in report.findings)
    held["embed_out.weight"] = held["lm_head.weight"] + 1
    torch.save(held, tmp_path / "inTrue" / "pytorch_model.bin")  # which of the two is the head?
    error = refused(lambda: api.plan(tmp_path / "inTrue", family="gpt-neox"))
    assert error.kind == "uncovered-tensors" and "lm_head.weight" in str(error)


def test_a_source_and_none_are_not_both_asked_for(conversions: Written, originals: Written) -> None:
    out, source = conversions("mistral-7b-v0.1"), originals("mistral-7b-v0.1")
    assert refused(lambda: api.verify(out, source, no_source=True)).kind == "usage"


def test_an_original_alone_is_nothing_to_verify(originals: Written) -> None:
    for asked in ({}, {"no_source": True}):
        error = refused(lambda asked=asked: api.verify(originals("llama-2-7b"), **asked))  # type: ignore[misc]
        assert "found an original of llama" in str(error) and "`ckpt-tool convert llama`" in hint_of(error)
