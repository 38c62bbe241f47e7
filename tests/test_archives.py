"""Archives are opened as if they were the folder they were made of, and hostile ones are refused flat."""

from __future__ import annotations

import gc
import gzip
import io
import os
import resource
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tool.api import _rest_seen, convert
from ckpt_tool.checkpoint import tar as tar_module
from ckpt_tool.checkpoint.base import Checkpoint, Renamed
from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.deepspeed import root_of
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.checkpoint.signs import tar_checksum
from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.checkpoint.tar import read_tar, read_tar_gz
from ckpt_tool.checkpoint.zip_reader import Member, ZipArchive
from ckpt_tool.errors import CkptToolError, Problem
from tests.headers_only import Headers

RANDOM = np.random.default_rng(5)
WEIGHTS = {
    "a": RANDOM.standard_normal((300, 70)).astype(np.float32),
    "norm": RANDOM.standard_normal(7).astype(np.float32),
}


def _torch(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    state = {n: torch.from_numpy(a) for n, a in WEIGHTS.items()}
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


CONTENTS = {
    "torch-zip": ("consolidated.00.pth", _torch(False)),
    "torch-legacy": ("consolidated.00.pth", _torch(True)),
    "safetensors": ("consolidated.safetensors", safetensors.numpy.save(WEIGHTS)),
}


def members_for(format: str) -> dict[str, bytes]:
    name, content = CONTENTS[format]
    return {
        "7B/params.json": b'{"dim": 70}',
        f"7B/{name}": content,
        "tokenizer.model": b"pieces",
        "README.md": b"read me " * 100,
    }


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_tar(
    path: Path, members: dict[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT
) -> None:
    with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("7B")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "stored.zip": lambda p, m: write_zip(p, m, zipfile.ZIP_STORED),
    "deflated.zip": write_zip,
    "pax.tar": write_tar,
    "gnu.tar": lambda p, m: write_tar(p, m, format=tarfile.GNU_FORMAT),
    "ustar.tar": lambda p, m: write_tar(p, m, format=tarfile.USTAR_FORMAT),
    "a.tar.gz": lambda p, m: write_tar(p, m, "w:gz"),
}


def refused(path: Path) -> Problem:
    gc.disable()  # what other tests left open is not closed in between
    try:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CkptToolError) as caught:
            open_checkpoint(path).close()
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
    return caught.value.problems[0]


@pytest.mark.parametrize("format", CONTENTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_an_archive_is_opened_like_its_folder(tmp_path: Path, writer: str, format: str) -> None:
    path = tmp_path / "download"  # no suffix: content decides
    WRITERS[writer](path, members_for(format))
    spool = tmp_path / "spool"
    spool.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(path, spool_dir=spool) as checkpoint:
        (file,) = checkpoint.files.values()
        assert (file.name, file.format) == (CONTENTS[format][0], format)
        assert checkpoint.json("params.json") == {"dim": 70}
        assert checkpoint.documents["tokenizer.model"].read() == b"pieces"
        for info in checkpoint:
            array = WEIGHTS[info.name]
            np.testing.assert_array_equal(checkpoint.read(info).view("<f4"), array)
            np.testing.assert_array_equal(checkpoint.read(info, 2, 5).view("<f4"), array[2:5])
            extent = file.extent(info.name)
            assert extent is not None and os.pread(extent[0], array.nbytes, extent[1]) == array.tobytes()
        checkpoint.check_unchanged()
        assert list(spool.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("writer", ["stored.zip", "pax.tar"])
def test_plain_members_are_read_in_place(tmp_path: Path, writer: str) -> None:
    path = tmp_path / writer
    WRITERS[writer](path, members_for("safetensors"))
    with open_checkpoint(path, spool_dir=tmp_path / "does not exist") as checkpoint:
        assert [f.path for f in checkpoint.files.values()] == [path]


def test_several_shards_from_a_deflated_zip_stay_unchanged(tmp_path: Path) -> None:
    content = CONTENTS["torch-zip"][1]
    write_zip(tmp_path / "z", {f"consolidated.{i:02d}.pth": content for i in range(3)})
    with open_checkpoint(tmp_path / "z") as checkpoint:
        assert len(checkpoint.files) == 3
        checkpoint.check_unchanged()


def test_the_folder_original_inside_an_archive_is_found(tmp_path: Path) -> None:
    content = CONTENTS["torch-zip"][1]
    write_tar(tmp_path / "t", {"m/original/consolidated.00.pth": content, "m/original/params.json": b"{}"})
    with open_checkpoint(tmp_path / "t") as checkpoint:
        assert list(checkpoint.documents) == ["params.json"]


def test_weights_in_several_folders_are_ambiguous(tmp_path: Path) -> None:
    content = CONTENTS["torch-zip"][1]
    write_tar(tmp_path / "t", {"7B/consolidated.00.pth": content, "13B/consolidated.00.pth": content})
    assert refused(tmp_path / "t").kind == "ambiguous-input"


def test_an_archive_without_weights_is_the_wrong_format(tmp_path: Path) -> None:
    for writer in WRITERS:
        WRITERS[writer](tmp_path / "t", {"notes.txt": b"x", "params.json": b"{}"})
        problem = refused(tmp_path / "t")
        assert problem.kind == "wrong-format" and "2 other files" in problem.message


def test_gaps_are_found_inside_archives(tmp_path: Path) -> None:
    write_zip(tmp_path / "z", {"consolidated.01.pth": CONTENTS["torch-zip"][1]})
    assert refused(tmp_path / "z").kind == "missing-shard"


# Damage


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("part", [0.25, 0.5, 0.99, -1])
def test_a_cut_archive_is_truncated(tmp_path: Path, writer: str, part: float) -> None:
    path = tmp_path / "download"
    WRITERS[writer](path, members_for("torch-legacy"))
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 if part == -1 else int(len(whole) * part)])
    assert refused(path).kind == "truncated"


@pytest.mark.parametrize("writer", WRITERS)
def test_junk_after_the_archive_is_refused(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "download"
    WRITERS[writer](path, members_for("torch-zip"))
    with open(path, "ab") as file:
        file.write(b"junk" * 5000)
    assert refused(path).kind in ("trailing-data", "truncated")


@pytest.mark.parametrize("writer", ["stored.zip", "deflated.zip", "a.tar.gz"])
def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "download"
    WRITERS[writer](path, members_for("torch-legacy"))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    assert refused(path).kind in ("checksum", "bad-zip", "zip-limit")  # a wrong length inflates to more


@pytest.mark.parametrize(
    ("variant", "family"), [("bert-v1-bare", "megatron-bert"), ("mistral-7b-v0.3", "mistral")]
)
def test_a_conversion_tells_of_a_flipped_bit_anywhere_in_a_stored_file_what_opening_does(
    variant: str, family: str, originals: Callable[[str], Path], tmp_path: Path
) -> None:
    """What it is told only once everything is copied, as the file is read once, is told before all else."""
    given, path = originals(variant), tmp_path / "d.zip"
    whole = {p.name: p.read_bytes() for p in (sorted(given.iterdir()) if given.is_dir() else [given])}
    write_zip(path, whole, zipfile.ZIP_STORED)
    name = max(whole, key=lambda n: len(whole[n]))
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset + 30 + len(name)
    right, size = path.read_bytes(), len(whole[name])
    for at in (99, 300, 700, 2000, *range(size // 11, size, size // 11), size - 1):
        damaged = bytearray(right)
        damaged[start + at] ^= 4
        path.write_bytes(damaged)
        expected = refused(path)
        with pytest.raises(CkptToolError) as told:
            convert(path, tmp_path / "out", family=family, strict=True)
        assert (
            told.value.problems == (expected,) and expected.kind == "checksum" and told.value.exit_code == 2
        )
        assert [p.name for p in tmp_path.iterdir()] == ["d.zip"]


def test_what_a_stored_archive_holds_is_read_once(
    originals: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = originals("mistral-7b-v0.3")
    weights = next(folder.glob("*.safetensors"))
    write_zip(tmp_path / "d.zip", {p.name: p.read_bytes() for p in folder.iterdir()}, zipfile.ZIP_STORED)
    asked: list[int] = []
    crc = ZipArchive._crc

    def counted(self: ZipArchive, member: Member, start: int, stop: int, left: Event) -> int:
        asked.append(stop - start)
        return crc(self, member, start, stop, left)

    monkeypatch.setattr(ZipArchive, "_crc", counted)
    convert(tmp_path / "d.zip", tmp_path / "out", family="mistral", check=False)
    with open_checkpoint(folder) as there:
        assert sum(asked) == weights.stat().st_size - sum(t.nbytes for t in there)  # the header again


def test_a_file_that_nothing_reads_is_compared_before_the_copy(tmp_path: Path) -> None:
    checks: list[int] = []

    def file(name: str) -> Headers:
        made = Headers(name, [])
        made.check = lambda known: checks.append(len([*known]))
        return made

    seen, unseen = file("seen"), file("unseen")
    opened = Checkpoint(tmp_path, {"seen": seen, "unseen": unseen})
    _rest_seen(opened, Checkpoint(tmp_path, {"seen": Renamed(seen, {})}))
    assert checks == [0] and seen.check is not None and unseen.check is None


def test_a_flipped_bit_in_a_tar_header_is_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "t", members_for("torch-zip"), format=tarfile.USTAR_FORMAT)
    whole = bytearray((tmp_path / "t").read_bytes())
    whole[512 + 3] ^= 1
    (tmp_path / "t").write_bytes(whole)
    assert refused(tmp_path / "t").kind == "checksum"


# Hostile tars


def special(name: str, type: bytes, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = type
    for key, value in more.items():
        setattr(info, key, value)
    return info


def tar_of(*infos: tarfile.TarInfo, format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(bytes(info.size)) if info.size else None)
    return buffer.getvalue()


def raw_header(name: bytes, size: bytes, type: bytes = b"0", prefix: bytes = b"") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = type
    block[257:265] = b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b"%06o\0 " % tar_checksum(bytes(block))
    return bytes(block)


END = bytes(1024)
HOSTILE: dict[str, bytes] = {
    "symbolic link": tar_of(special("consolidated.00.pth", tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": tar_of(special("consolidated.00.pth", tarfile.LNKTYPE, linkname="/etc/passwd")),
    "device": tar_of(special("consolidated.00.pth", tarfile.CHRTYPE)),
    "block device": tar_of(special("x", tarfile.BLKTYPE)),
    "fifo": tar_of(special("x", tarfile.FIFOTYPE)),
    "long link": tar_of(special("x", tarfile.SYMTYPE, linkname="y" * 300)),
    "traversal": tar_of(special("../../consolidated.00.pth", tarfile.REGTYPE)),
    "inner traversal": tar_of(special("a/../../consolidated.00.pth", tarfile.REGTYPE)),
    "absolute": tar_of(special("/consolidated.00.pth", tarfile.REGTYPE)),
    "backslash": tar_of(special("..\\consolidated.00.pth", tarfile.REGTYPE)),
    "drive": tar_of(special("C:consolidated.00.pth", tarfile.REGTYPE)),
    "pax traversal": tar_of(special("x/../../é" + "y" * 200, tarfile.REGTYPE), format=tarfile.PAX_FORMAT),
    "prefix traversal": raw_header(b"x", b"0", prefix=b"..") + END,
    "sparse": raw_header(b"x", b"0", b"S") + END,
    "unknown type": raw_header(b"x", b"0", b"V") + END,
    "long name of 1 GB": raw_header(b"././@LongLink", b"%011o" % (1 << 30), b"L") + END,
    "pax header of 1 GB": raw_header(b"x", b"%011o" % (1 << 30), b"x") + END,
    "pax without records": raw_header(b"x", b"5", b"x") + b"hello".ljust(512, b"\0") + END,
    "pax sparse": raw_header(b"x", b"%o" % 22, b"x")
    + b"22 GNU.sparse.major=1\n".ljust(512, b"\0")
    + raw_header(b"x", b"0")
    + END,
    "pax size in words": raw_header(b"x", b"%o" % 12, b"x")
    + b"12 size=1e3\n".ljust(512, b"\0")
    + raw_header(b"x", b"0")
    + END,
    "pax without a member": raw_header(b"x", b"%o" % 10, b"x") + b"10 path=a\n".ljust(512, b"\0") + END,
    "size not octal": raw_header(b"x", b"12x") + END,
    "negative size": raw_header(b"x", b"-1") + END,
    "folder with bytes": raw_header(b"x/", b"1", b"5") + bytes(512) + END,
    "same name twice": raw_header(b"a/./b", b"0") + raw_header(b"a/b", b"0") + END,
    "name in Latin-1": raw_header(b"caf\xe9", b"0") + END,
    "empty name": raw_header(b"", b"0") + END,
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
def test_hostile_tars_are_refused(tmp_path: Path, case: str, packed: bool) -> None:
    path = tmp_path / "download.tar"
    path.write_bytes(gzip.compress(HOSTILE[case]) if packed else HOSTILE[case])
    problem = refused(path)
    assert (problem.kind, problem.file) == ("bad-tar", "download.tar")


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
def test_a_size_beyond_the_file_is_truncated(tmp_path: Path, packed: bool) -> None:
    for size in (b"%011o" % (1 << 32), b"\x80" + bytes(6) + b"\xff" * 5):
        content = raw_header(b"consolidated.00.pth", size) + END
        (tmp_path / "t").write_bytes(gzip.compress(content) if packed else content)
        assert refused(tmp_path / "t").kind == "truncated"


def test_too_many_members_are_refused_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with open(path, "wb") as file:
        for i in range(tar_module.MEMBER_LIMIT + 1):
            file.write(raw_header(b"%d" % i, b"0"))
        file.write(END)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = refused(path)
    assert problem.kind == "bad-tar" and "100000 members" in problem.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_gzip_bomb_is_stopped_early(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    size = 300 << 20
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(raw_header(b"consolidated.00.pth", b"%011o" % size))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(END)
    data = ByteRange(path, "bomb.tar.gz")
    spool = Spool(tmp_path)
    with pytest.raises(CkptToolError) as caught:
        read_tar_gz(data, lambda name: True, spool)
    assert caught.value.kind == "bad-tar" and "200 times" in caught.value.problems[0].message
    assert spool.size < size
    data.close()
    spool.close()


def test_only_wanted_members_are_spooled(tmp_path: Path) -> None:
    write_tar(tmp_path / "t", {"a": b"x" * 5000, "b": b"y" * 700, "c": b"z" * 9}, "w:gz")
    data, spool = ByteRange(tmp_path / "t", "t"), Spool(tmp_path)
    kept, names = read_tar_gz(data, "b".__eq__, spool)
    assert names == ["a", "b", "c"]
    assert [(m.name, m.offset, m.size) for m in kept] == [("b", 0, 700)] and spool.size == 700
    assert spool.path.read_bytes() == b"y" * 700
    data.close()
    spool.close()


def test_gzip_files_in_several_parts_are_read_to_the_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "t", members_for("safetensors"))
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(gzip.compress(whole[:1000]) + gzip.compress(whole[1000:]) + bytes(100))
    with open_checkpoint(tmp_path / "t") as checkpoint:
        assert checkpoint.names() == ["a", "norm"]


names = st.text("abé/.", min_size=1, max_size=130).filter(
    lambda n: all(part not in ("", ".", "..") for part in n.split("/"))
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(
    st.dictionaries(names, st.binary(max_size=1200), max_size=5),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_reads_what_the_standard_library_writes(
    tmp_path: Path, members: dict[str, bytes], format: int
) -> None:
    path = tmp_path / "t.tar"
    write_tar(path, members, format=format)
    data = ByteRange(path, "t.tar")
    found = {m.name: data.read(m.offset, m.size) for m in read_tar(data)}
    data.close()
    assert found == members


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150)
@given(st.data())
def test_no_damage_brings_another_error(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere: refused with our own error, or opened."""
    writer = data.draw(st.sampled_from(sorted(WRITERS)))
    path = tmp_path / writer
    if not (tmp_path / f"{writer}.whole").exists():
        WRITERS[writer](tmp_path / f"{writer}.whole", members_for("safetensors"))
    whole = bytearray((tmp_path / f"{writer}.whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        open_checkpoint(path).close()
    except CkptToolError as error:
        assert error.exit_code == 2


def test_a_full_spool_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(tmp_path / "z", members_for("safetensors"))

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckpt_tool.checkpoint.spool.os.write", full)
    problem = refused(tmp_path / "z")
    assert problem.kind == "disk-full" and "TMPDIR" in (problem.hint or "")


def test_a_document_in_an_archive_has_the_same_limit(tmp_path: Path) -> None:
    write_tar(tmp_path / "t", members_for("safetensors"))
    with open_checkpoint(tmp_path / "t") as checkpoint, pytest.raises(CkptToolError, match="at most 3 bytes"):
        checkpoint.documents["params.json"].read(3)


def test_struct_of_the_raw_header_is_what_the_library_reads(tmp_path: Path) -> None:
    """The hostile headers above differ from good ones only where they say so."""
    assert struct.unpack("100s", raw_header(b"a", b"3")[:100])[0].rstrip(b"\0") == b"a"
    content = raw_header(b"a", b"3") + b"xyz".ljust(512, b"\0") + END
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.extractfile("a").read() == b"xyz"  # type: ignore[union-attr]
    (tmp_path / "t").write_bytes(content)
    data = ByteRange(tmp_path / "t", "t")
    (member,) = read_tar(data)
    assert data.read(member.offset, member.size) == b"xyz"
    data.close()


class _Listed(list[str]):
    """Names that are not looked for one by one, which takes the square of the time."""

    def __contains__(self, _: object) -> bool:
        raise AssertionError("expected the names to be gone through once")


def test_folders_of_deepspeed_in_an_archive_are_told_in_one_pass() -> None:
    states = "mp_rank_00_model_states.pt"
    assert root_of(_Listed([f"run/global_step5/{states}", "run/latest"])) == "run/"
    assert root_of(_Listed([f"run/global_step5/{states}"])) == "run/global_step5/"
    assert root_of(_Listed([f"{k}/{states}" for k in range(3)])) is None
