"""Remote checkpoints, read by ranges from a server on 127.0.0.1: what is fetched, what goes wrong on the way
and what is said of it, the cache, addresses that are no repository, and publishing into one."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import snapshot_download

from ckpt_tool.api import convert, open_checkpoint, plan, verify
from ckpt_tool.checkpoint import http_ranges, remote_file
from ckpt_tool.checkpoint.remote_folder import open_folder
from ckpt_tool.checkpoint.remote_path import remote_of, without_secrets
from ckpt_tool.convert import publishing, read_ahead
from ckpt_tool.convert.execute import Progress
from ckpt_tool.convert.fingerprints import fingerprints
from ckpt_tool.convert.plan import Options
from ckpt_tool.errors import CkptToolError, Problem
from ckpt_tool.fixtures.zero import Run, Weight
from tests.conftest import Written
from tests.range_server import COMMIT, Handler, State, serving

MODEL = "mistral-7b-v0.1"
HUB = "hf://org/model"
CASES = Path(__file__).parents[2] / "shared" / "cases"
WEIGHTS = "consolidated.00.pth"
# huggingface_hub 2.4 sends files in a way that its own HTTP client warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(tmp_path: Path, originals: Written, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """The server with one tiny original, and the client of the Hub told to ask it and nobody else."""
    root = tmp_path / "served"
    shutil.copytree(originals(MODEL), root / "org" / "model")
    (root / "files").symlink_to(root / "org" / "model")
    with serving(root) as (address, state):
        constants = huggingface_hub.constants
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(remote_file, "WAIT", 0.001)
        for name in ("HF_TOKEN", "CKPT_TOOL_HUB"):
            monkeypatch.delenv(name, raising=False)
        yield state


def same(made: Path, other: Path) -> None:
    """The folders hold the same files; only where the model came from may be told otherwise."""
    assert sorted(os.listdir(made)) == sorted(os.listdir(other))
    for name in os.listdir(made):
        if name == "ckpt-tool.json":
            one, two = (json.loads((f / name).read_text()) for f in (made, other))
            assert {**one, "source": 0} == {**two, "source": 0}
        else:
            assert filecmp.cmp(made / name, other / name, shallow=False)


def refused(work: Callable[[], object]) -> Problem:
    with pytest.raises(CkptToolError) as caught:
        work()
    return caught.value.problems[0]


# --- what is read ---------------------------------------------------------------------------------------


def test_a_repository_converts_to_the_bytes_of_its_local_copy(
    server: State, conversions: Written, tmp_path: Path
) -> None:
    done = convert(HUB, tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))
    assert done.opened == (f"{HUB} is commit {COMMIT}",)
    assert not (tmp_path / "cache").exists()
    weights = (server.root / "org" / "model" / WEIGHTS).stat().st_size
    assert server.sent < 1.2 * weights + 200_000  # hardly a byte twice, though a head of 64 KiB counts here


@pytest.mark.parametrize("container", ["torch zip", "safetensors"])
def test_a_plan_fetches_headers(server: State, container: str) -> None:
    """Of 2.4 GB that are a hole: reading more than headers would take far more than the limit."""
    path = large_repository(server.root / "org" / "large", container)
    size = path.stat().st_size
    assert size > 2_400_000_000
    server.digests[path] = "ab" * 32  # nobody reads it through to compare
    with open_checkpoint("hf://org/large") as checkpoint:
        assert plan(checkpoint).bytes_out > 2_400_000_000
    assert server.sent < size / 1000
    assert len(server.seen) < 60


def large_repository(folder: Path, container: str) -> Path:
    """A Mistral of few layers with wide feed forwards, of which only the headers are on the disk."""
    from ckpt_tool.checkpoint.safetensors import SafetensorsLayout
    from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout

    dim, layers, hidden, words = 4096, 2, 45_000, 8_000
    shapes = {"tok_embeddings.weight": (words, dim), "norm.weight": (dim,), "output.weight": (words, dim)}
    for k in range(layers):
        shapes |= {f"layers.{k}.attention.{n}.weight": (dim, dim) for n in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layers.{k}.{n}_norm.weight": (dim,) for n in ("attention", "ffn")}
        shapes |= {f"layers.{k}.feed_forward.{n}.weight": (hidden, dim) for n in ("w1", "w3")}
        shapes[f"layers.{k}.feed_forward.w2.weight"] = (dim, hidden)
    tensors = [(name, "BF16", shape) for name, shape in shapes.items()]
    zipped = container == "torch zip"
    layout = TorchZipLayout(tensors) if zipped else SafetensorsLayout(tensors)
    folder.mkdir()
    path = folder / (WEIGHTS if zipped else "consolidated.safetensors")
    with open(path, "wb") as file:
        file.truncate(layout.size)
        for at, data in (*layout.header_writes(), *layout.finish(dict.fromkeys(shapes, 0))):
            file.seek(at)
            file.write(data)
    heads = {"n_heads": 32, "n_kv_heads": 32, "head_dim": 128, "sliding_window": 4096}
    told = {"dim": dim, "n_layers": layers, "hidden_dim": hidden, "vocab_size": words, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps({**told, **heads}))
    return path


@pytest.mark.parametrize(
    "case", ["torch-dist-mcore019-tp2pp2", "torch-dist-dcp-plain", "torch-dist-hf-ranks"]
)
def test_checkpoints_of_torch_distributed_are_read_like_any_other(server: State, case: str) -> None:
    if not (CASES / case / "ckpt").is_dir():
        pytest.skip("the real files are not beside this checkout")
    shutil.copytree(CASES / case / "ckpt", server.root / "org" / "cluster")
    with open_checkpoint("hf://org/cluster") as remote, open_checkpoint(CASES / case / "ckpt") as local:
        assert [(t.name, t.shape, t.dtype) for t in remote] == [(t.name, t.shape, t.dtype) for t in local]
        for one, other in zip(remote, local, strict=True):
            assert np.array_equal(remote.read(one), local.read(other))
        assert remote.documents.keys() == local.documents.keys()


def test_ranks_of_zero_are_read_like_any_other(server: State) -> None:
    weights = {n: Weight((5, 3), bytes(range(k, k + 60))) for k, n in enumerate(("a.weight", "b.weight"))}
    Run(3, 2, [weights]).write(server.root / "org" / "run")
    with open_checkpoint("hf://org/run") as remote:
        assert {t.name: remote.read(t).tobytes() for t in remote} == {n: w.data for n, w in weights.items()}


# --- what goes wrong on the way -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "times"), [("503", 3), ("429", 3), ("408", 3), ("cut", 9), ("403", 1)])
def test_a_failure_that_passes_is_tried_again(
    server: State, conversions: Written, tmp_path: Path, kind: str, times: int
) -> None:
    """403 is what an address to which a redirect led says when its time is over."""
    with open_checkpoint(HUB) as checkpoint:
        checkpoint.read(next(iter(checkpoint)))  # the redirect is known
        server.fault(kind, "/cdn/", times=times)
        for tensor in checkpoint:
            checkpoint.read(tensor)
        assert server.faults[0][2] == 0
    server.fault(kind if kind != "403" else "503", "/", times=times)
    convert(HUB, tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))


@pytest.mark.parametrize(
    ("kind", "path", "expected", "words"),
    [
        ("503", "/cdn/", "download-failed", "6 failures in a row, the last: status 503"),
        ("404", "/resolve/", "download-failed", "status 404: there is none"),
        ("403", "/resolve/", "download-failed", "status 403: it is not allowed"),
        (
            "redirect-file",
            "/cdn/",
            "download-failed",
            "expected a redirect to an http address, found one to file",
        ),
        ("redirect-loop", "/cdn/", "download-failed", "more than 5 redirects"),
        ("other-range", "/cdn/", "download-failed", "found the range bytes"),
    ],
)
def test_a_failure_that_stays_is_told(
    server: State, tmp_path: Path, kind: str, path: str, expected: str, words: str
) -> None:
    server.fault(kind, path, times=10_000)
    problem = refused(lambda: convert(HUB, tmp_path / "out"))
    assert problem.kind == expected
    assert problem.file == WEIGHTS
    assert words in problem.message
    assert sorted(os.listdir(tmp_path)) == ["served"]


def test_a_server_without_ranges_serves_small_files_only(
    server: State, monkeypatch: pytest.MonkeyPatch, conversions: Written, tmp_path: Path
) -> None:
    server.fault("ignore-range", times=10_000)
    convert(HUB, tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))
    monkeypatch.setattr(http_ranges, "WHOLE", 1000)
    problem = refused(lambda: open_checkpoint(HUB))
    assert "found the whole file: the server knows no ranges" in problem.message
    assert problem.hint == "download it first, and give the file"


def test_a_file_that_changes_is_noticed(server: State, tmp_path: Path) -> None:
    address = f"{server.address}/files/"
    with open_checkpoint(address) as checkpoint:
        first, *others = checkpoint
        checkpoint.read(first)
        checkpoint.check_unchanged()
        server.fault("etag", WEIGHTS, times=10_000)
        assert refused(checkpoint.check_unchanged).kind == "input-changed"
    with open_checkpoint(HUB) as checkpoint:
        server.faults.clear()
        server.fault("etag", "/cdn/", times=10_000)
        problem = refused(lambda: [checkpoint.read(t) for t in checkpoint])
        assert (problem.kind, problem.file) == ("input-changed", WEIGHTS)


def test_another_file_behind_the_same_address_is_noticed_at_the_end(server: State, tmp_path: Path) -> None:
    shutil.rmtree(server.root / "org" / "copy", ignore_errors=True)
    shutil.copytree(server.root / "org" / "model", server.root / "org" / "copy")
    (server.root / "files").unlink()
    (server.root / "files").symlink_to(server.root / "org" / "copy")

    def changed(_: object) -> None:
        path = server.root / "files" / WEIGHTS
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        server.digests.clear()

    problem = refused(lambda: convert(f"{server.address}/files/", tmp_path / "out", on_plan=changed))
    assert problem.kind == "input-changed"
    assert not (tmp_path / "out").exists()


def test_a_document_that_is_not_the_listed_one_is_refused(server: State) -> None:
    path = server.root / "org" / "model" / "params.json"
    with open_checkpoint(HUB) as checkpoint:
        path.write_bytes(path.read_bytes().replace(b"7", b"8", 1) if b"7" in path.read_bytes() else b"{}")
        problem = refused(lambda: checkpoint.documents["params.json"].read())
    assert problem.kind in ("download-failed", "input-changed")
    assert problem.file == "params.json"


def test_a_stalled_answer_is_given_up(server: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_ranges, "READ_SECONDS", 1)
    server.fault("stall", "/cdn/")
    with open_checkpoint(HUB) as checkpoint:
        assert len(checkpoint.names()) > 10


def test_nobody_waits_for_a_server_that_does_not_answer(
    server: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the work now, not when the time for an answer is over."""
    monkeypatch.setattr(http_ranges, "READ_SECONDS", 600)
    with open_checkpoint(HUB) as checkpoint:
        server.fault("stall", "/cdn/", times=100)
        problems: list[Problem] = []
        reading = threading.Thread(
            target=lambda: problems.append(refused(lambda: [checkpoint.read(t) for t in checkpoint]))
        )
        reading.start()
        deadline = time.monotonic() + 60
        while server.faults[0][2] == 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        remote = remote_of(next(iter(checkpoint.files.values())).paths[0])
        assert isinstance(remote, remote_file.RemoteFile)
        remote.fetcher.stop()
        reading.join(timeout=60)
        assert [p.kind for p in problems] == ["interrupted"]


def test_what_no_bytes_can_be_taken_from(server: State) -> None:
    """Compressed on the way, though that was not asked for: places in the file mean nothing then."""
    server.fault("gzip", WEIGHTS, times=1000)
    problem = refused(lambda: open_checkpoint(f"{server.address}/files/"))
    assert (problem.kind, problem.hint) == ("download-failed", "download it first, and give the file")
    assert "found them compressed (gzip)" in problem.message


def test_an_empty_file_is_one(server: State) -> None:
    (server.root / "org" / "model" / "tokenizer_config.json").write_bytes(b"")
    with open_checkpoint(f"{server.address}/files/") as checkpoint:
        assert checkpoint.documents["tokenizer_config.json"].read() == b""


def test_files_of_which_no_version_is_told_are_never_the_same(server: State) -> None:
    """What was read of them before is not gone on with: nobody can tell whether they are what they were."""
    server.fault("unversioned", "/files/", times=1000)
    seen = []
    for _ in range(2):
        with open_checkpoint(f"{server.address}/files/") as checkpoint:
            seen += [fingerprints(checkpoint, dict.fromkeys(checkpoint.files, ""))]
    assert seen[0] != seen[1]


def test_an_interrupted_transfer_goes_on(
    server: State, originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is lost when half of the output is written; the second run asks for the other half."""
    shutil.copytree(originals("mistral-7b-v0.3"), server.root / "org" / "other")
    asked = Options(max_shard_bytes=60_000)
    convert(server.root / "org" / "other", tmp_path / "whole", options=asked)
    convert("hf://org/other", tmp_path / "once", options=asked)
    total = server.sent

    def lose(now: Progress) -> None:
        if now.bytes_done > now.bytes_total // 2 and not server.faults:
            server.fault("503", "/cdn/", times=10_000)

    monkeypatch.setattr(read_ahead, "AHEAD", 1)
    problem = refused(lambda: convert("hf://org/other", tmp_path / "out", options=asked, progress=lose))
    assert problem.kind == "download-failed"
    assert problem.hint is not None and "--resume" in problem.hint
    assert not (tmp_path / "out").exists()
    server.faults.clear()
    server.seen.clear()
    done = convert("hf://org/other", tmp_path / "out", options=asked, resume=True)
    assert done.outcome.resumed
    same(tmp_path / "out", tmp_path / "whole")
    assert server.sent < 0.8 * total


# --- who may read ---------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_nowhere_else(server: State, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_secret"
    problem = refused(lambda: open_checkpoint(HUB))
    assert problem.kind == "download-failed"
    assert problem.hint is not None and "HF_TOKEN" in problem.hint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.seen.clear()
    with open_checkpoint(HUB) as checkpoint:
        checkpoint.read(next(iter(checkpoint)))
    told = {s.path.split("/")[1]: s.token for s in server.seen}
    assert told == {"api": "Bearer hf_secret", "org": "Bearer hf_secret", "cdn": None}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://org/none", "no repository of that name"),
        ("hf://org/model@none", "no such branch, tag or commit"),
    ],
)
def test_what_is_not_there_is_told(server: State, address: str, words: str) -> None:
    problem = refused(lambda: open_checkpoint(address))
    assert (problem.kind, problem.file) == ("download-failed", address)
    assert words in problem.message


@pytest.mark.parametrize(
    "name", ["../../../../x.json", "/tmp/x.json", "original/../x.json", "a\x1b[31m.json"]
)
def test_a_list_names_nothing_outside_its_repository(
    server: State, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    siblings = Handler.siblings

    def more(handler: Handler, folder: Path) -> Iterator[dict[str, object]]:
        yield {"rfilename": name, "size": 5, "blobId": "0" * 40}
        yield from siblings(handler, folder)

    monkeypatch.setattr(Handler, "siblings", more)
    with open_checkpoint(HUB) as checkpoint:
        assert sorted(checkpoint.documents) == ["params.json", "tokenizer.model"]


# --- the cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", f"@{COMMIT}"])
def test_what_the_cache_holds_is_read_from_there(
    server: State, monkeypatch: pytest.MonkeyPatch, conversions: Written, tmp_path: Path, revision: str
) -> None:
    server.refs["v1.0"] = COMMIT
    snapshot_download("org/model", revision=revision[1:] or None)
    server.seen.clear()
    with open_checkpoint(HUB + revision) as checkpoint:
        assert any("3 of its 3 files were read from the cache" in n for n in checkpoint.notes)
        for tensor in checkpoint:
            checkpoint.read(tensor)
    assert [s.path.split("/")[1] for s in server.seen] == ["api"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.seen.clear()
    done = convert(HUB + revision, tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))
    assert done.opened == (f"{HUB}{revision} was read from the cache at commit {COMMIT}",)
    assert not server.seen


def test_a_file_that_was_cut_off_in_the_cache_is_asked_for(server: State, tmp_path: Path) -> None:
    cached = Path(snapshot_download("org/model")) / WEIGHTS
    os.truncate(cached, 1000)
    with open_checkpoint(HUB) as checkpoint:
        assert any("2 of its 3 files were read from the cache" in n for n in checkpoint.notes)


def test_offline_with_nothing_in_the_cache(server: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    problem = refused(lambda: open_checkpoint(HUB))
    assert "HF_HUB_OFFLINE" in problem.message
    assert "HF_HUB_OFFLINE" in refused(lambda: open_checkpoint(f"{server.address}/files/")).message


def test_the_download_is_there_for_who_wants_it(
    server: State, monkeypatch: pytest.MonkeyPatch, conversions: Written, tmp_path: Path
) -> None:
    monkeypatch.setenv("CKPT_TOOL_HUB", "download")
    (server.root / "org" / "model" / "README.md").write_text("A model")
    convert(HUB, tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))
    assert any((tmp_path / "cache").iterdir())
    with monkeypatch.context() as offline:  # what nobody reads was not downloaded, and is not missed
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with open_checkpoint(HUB) as checkpoint:
            assert checkpoint.notes == [f"{HUB} was read from the cache at commit {COMMIT}"]
        os.unlink(next((tmp_path / "cache").rglob(f"snapshots/*/{WEIGHTS}")))
        assert "not all of it in the cache" in refused(lambda: open_checkpoint(HUB)).message
    monkeypatch.setenv("CKPT_TOOL_HUB", "sideways")
    assert refused(lambda: open_checkpoint(HUB)).kind == "usage"


def test_verifying_against_the_hub(server: State, conversions: Written) -> None:
    report = verify(conversions(MODEL), HUB, levels=("coverage", "bits"))
    assert report.status == "pass"


# --- addresses that are no repository -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["files/", "files", f"files/{WEIGHTS}", f"files/{WEIGHTS}?signature=secret"])
def test_http(server: State, conversions: Written, tmp_path: Path, what: str) -> None:
    """A folder that the server lists, a file, and a file whose address is signed: beside that nothing can be
    looked for."""
    address = f"{server.address}/{what}"
    if "?" in what:
        with open_checkpoint(address) as checkpoint:
            assert list(checkpoint.files) == [WEIGHTS]
            assert not checkpoint.documents
            assert "secret" not in str(checkpoint.path)
        return
    convert(address, tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))
    assert json.loads((tmp_path / "out" / "ckpt-tool.json").read_text())["source"] == address


def test_http_of_a_folder_that_is_elsewhere(server: State, tmp_path: Path) -> None:
    (server.root / "files").unlink()
    shutil.copytree(server.root / "org" / "model", server.root / "files" / "moved" / "latest")
    server.fault("moved", "/files/latest/")
    with open_checkpoint(f"HTTP{server.address[4:]}/files/latest/?key=secret") as checkpoint:
        assert list(checkpoint.files) == [WEIGHTS]
        assert sorted(checkpoint.documents) == ["params.json", "tokenizer.model"]


@pytest.mark.parametrize(
    "names",
    [
        [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)],
        ["consolidated.00.pth", "consolidated.01.pth"],
    ],
)
def test_http_of_a_server_that_lists_nothing(server: State, names: list[str]) -> None:
    """The other files of a set are asked for by their names, and what fails is not taken for missing."""
    folder = server.root / "files"
    folder.unlink()
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"PK")
    (folder / "vocab.json").write_text("{}")
    server.lists = False
    address = f"{server.address}/files/{names[1]}"
    found, single = open_folder(address)
    assert single == names[1]
    assert found.survey() == sorted([*names, "vocab.json"])
    assert [f"what stands beside {single} was looked for" in n for n in found.notes] == [True]
    server.fault("503", "/vocab.json", times=1000)
    assert "status 503" in refused(lambda: open_folder(address)).message


def test_http_archive(server: State, conversions: Written, tmp_path: Path) -> None:
    """A tar is read in place: the heads of its members, then what is in them."""
    shutil.make_archive(str(tmp_path / "model"), "tar", server.root / "org" / "model")
    (server.root / "files").unlink()
    (server.root / "files").mkdir()
    shutil.move(tmp_path / "model.tar", server.root / "files" / "model.tar")
    convert(f"{server.address}/files/model.tar", tmp_path / "out")
    same(tmp_path / "out", conversions(MODEL))
    size = (server.root / "files" / "model.tar").stat().st_size
    ranges = [request.sent for request in server.seen]
    assert max(ranges) < size and sum(ranges) < 2 * size  # heads come with what stands behind them, never all


def test_small_tensors_of_a_torch_file_come_with_one_request(server: State, tmp_path: Path) -> None:
    """As those of safetensors do; each was asked for by itself."""
    shutil.make_archive(str(tmp_path / "model"), "tar", server.root / "org" / "model")
    (server.root / "org" / "model" / "model.tar").write_bytes((tmp_path / "model.tar").read_bytes())
    with open_checkpoint(f"{server.address}/files/model.tar") as checkpoint:
        (file,) = checkpoint.files.values()
        before = len(server.seen)
        file.expect((name, 0, t.nbytes) for name, t in file.tensors.items())
        assert len(file.tensors) > 90
        for t in file.tensors.values():
            checkpoint.read(t)
        assert len(server.seen) - before <= 3


def test_fsspec(conversions: Written, originals: Written, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(originals(MODEL)), "/bucket/model", recursive=True)
    try:
        convert("memory://bucket/model", tmp_path / "out")
        same(tmp_path / "out", conversions(MODEL))
        convert(f"memory://bucket/model/{WEIGHTS}", tmp_path / "single")
        same(tmp_path / "single", conversions(MODEL))
        with open_checkpoint("memory://bucket/model") as checkpoint:
            store.pipe(f"/bucket/model/{WEIGHTS}", b"another")
            assert refused(checkpoint.check_unchanged).kind == "input-changed"
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("nothing://bucket/model", "bad-input", "an address that fsspec knows"),
        ("memory://bucket/none", "not-found", "nothing of that name"),
        ("zip://a::memory://b", "bad-input", "several joined by ::"),
        ("https://huggingface.co/org/model/tree/v2", "bad-input", "a page of the Hub"),
        ("hf://org/model/more", "bad-input", "hf://org/name"),
    ],
)
def test_addresses_that_are_refused(address: str, kind: str, words: str) -> None:
    problem = refused(lambda: open_checkpoint(address))
    assert problem.kind == kind
    assert words in problem.message


def test_secrets_are_not_kept() -> None:
    assert without_secrets("https://me:word@host/a/b.pth?X-Amz-Signature=1#x") == "https://host/a/b.pth"
    assert without_secrets("hf://org/name@main") == "hf://org/name@main"
    assert without_secrets("s3://bucket/a?b") == "s3://bucket/a?b"
    assert without_secrets("a/folder") == "a/folder"


# --- publishing -----------------------------------------------------------------------------------------


@pytest.fixture
def writing(server: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> State:
    """The server for somebody who may write; what is made on the way lies under `tmp_path/room`."""
    (tmp_path / "room").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "room"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    server.token = "hf_writer"
    return server


def test_an_output_goes_to_a_new_repository(
    writing: State, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    done = convert(originals(MODEL), "hf://me/made")
    assert [(c["name"], c["visibility"]) for c in writing.created] == [("made", "private")]
    assert len(writing.commits) == 1
    same(writing.root / "me" / "made", conversions(MODEL))
    assert done.out == "hf://me/made"
    assert done.report is not None and done.report.status == "pass"
    assert f"hf://me/made is a new private repository, commit {writing.head}" in done.opened
    assert [list(p.iterdir()) for p in (tmp_path / "room").iterdir()] == [[]]
    with open_checkpoint("hf://me/made") as checkpoint:
        assert "config.json" in checkpoint.documents


def test_shards_go_one_by_one_and_leave_the_disk(
    writing: State, originals: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Options(max_shard_bytes=150_000)
    used: list[int] = []
    monkeypatch.setattr("tests.range_server.LARGE", 10_000)
    monkeypatch.setattr(publishing, "LARGE", 0)

    def look(_: Progress) -> None:
        files = [p for p in (tmp_path / "room").rglob("*.safetensors") if p.is_file()]
        used.append(sum(p.stat().st_blocks * 512 for p in files))

    convert(originals(MODEL), "hf://me/made", options=asked, progress=look)
    convert(originals(MODEL), tmp_path / "out", options=asked)
    same(writing.root / "me" / "made", tmp_path / "out")
    whole = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert whole > 400_000
    assert max(used) < 0.75 * whole
    assert len(writing.uploads) == 5  # four shards, and the manifest, which is large here


def test_what_is_there_is_replaced_only_if_asked(
    writing: State, originals: Written, conversions: Written
) -> None:
    folder = writing.root / "me" / "made"
    folder.mkdir(parents=True)
    for name in ("pytorch_model.bin", "config.json", "README.md"):
        (folder / name).write_text("old")
    problem = refused(lambda: convert(originals(MODEL), "hf://me/made"))
    assert problem.kind == "output-exists"
    assert problem.hint is not None and "--overwrite" in problem.hint
    convert(originals(MODEL), "hf://me/made", overwrite=True)
    assert (folder / "README.md").read_text() == "old"
    (folder / "README.md").unlink()
    same(folder, conversions(MODEL))


@pytest.mark.parametrize(
    ("fault", "path", "kind", "words"),
    [
        ("401", "/preupload/", "upload-failed", "does not know who you are"),
        ("403", "/preupload/", "upload-failed", "you may not write there"),
        ("409", "/commit/", "upload-failed", "another change is being made"),
        ("412", "/commit/", "output-changed", "found another commit"),
        ("403", "/upload/", "upload-failed", "you may not write there"),
    ],
)
def test_what_the_hub_does_not_take(
    writing: State, originals: Written, conversions: Written, tmp_path: Path,
    fault: str, path: str, kind: str, words: str,
) -> None:  # fmt: skip
    (writing.root / "me" / "made").mkdir(parents=True)
    writing.fault(fault, path, times=1)
    problem = refused(lambda: convert(originals(MODEL), "hf://me/made"))
    assert (problem.kind, problem.file) == (kind, "hf://me/made")
    assert words in problem.message
    assert not writing.commits
    convert(originals(MODEL), "hf://me/made", resume=True)
    same(writing.root / "me" / "made", conversions(MODEL))


def test_outputs_go_to_folders_and_the_hub(originals: Written) -> None:
    problem = refused(lambda: convert(originals(MODEL), "s3://bucket/model"))
    assert (problem.kind, problem.where) == ("usage", "--out")
    assert refused(lambda: convert(originals(MODEL), "hf://me")).kind == "bad-input"
