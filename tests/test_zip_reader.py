"""Zip archives: read as zipfile reads the honest ones, refused in words where two readings are possible."""

import io
import random
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.byte_range import ByteRange
from ckpt_tool.checkpoint.zip_reader import ZipArchive
from ckpt_tool.errors import CkptToolError


@dataclass
class Made:
    """A member for `build`; `local` and `central` override single header fields there."""

    name: bytes = b"a.txt"
    content: bytes = b"hello"
    method: int = 0
    flags: int = 0
    attributes: int = 0
    local: dict[str, int | bytes] = field(default_factory=dict)
    central: dict[str, int | bytes] = field(default_factory=dict)
    after: bytes = b""  # between this member and the next


def build(
    *members: Made, prefix: bytes = b"", comment: bytes = b"", count: int | None = None, disk: int = 0
) -> bytes:
    out, directory = bytearray(prefix), b""
    for m in members:
        squeeze = zlib.compressobj(9, wbits=-15)
        packed = squeeze.compress(m.content) + squeeze.flush() if m.method == 8 else m.content
        facts: dict[str, int | bytes] = {
            "name": m.name,
            "flags": m.flags,
            "method": m.method,
            "crc": zlib.crc32(m.content),
            "packed": len(packed),
            "size": len(m.content),
            "header": len(out),
            "extra": b"",
            "disk": 0,
        }
        one = facts | m.local
        numbers = (20, one["flags"], one["method"], 0, 33, one["crc"], one["packed"], one["size"])
        out += struct.pack("<4s5H3L2H", b"PK\3\4", *numbers, len(one["name"]), len(one["extra"]))  # type: ignore[arg-type]
        out += one["name"] + one["extra"] + packed + m.after  # type: ignore[operator]
        one = facts | m.central
        numbers = (0x314, 20, one["flags"], one["method"], 0, 33, one["crc"], one["packed"], one["size"])  # type: ignore[assignment]
        lengths = (len(one["name"]), len(one["extra"]), 0, one["disk"], 0, m.attributes, one["header"])  # type: ignore[arg-type]
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *numbers, *lengths)
        directory += one["name"] + one["extra"]  # type: ignore[operator]
    n = len(members) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", disk, disk, n, n, len(directory), len(out), len(comment))
    return bytes(out) + directory + end + comment


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[bytes], ZipArchive]:
    def opened(data: bytes) -> ZipArchive:
        path = tmp_path / "x.zip"
        path.write_bytes(data)
        return ZipArchive(ByteRange(path, "x.zip"))

    return opened


def contents(zipped: ZipArchive) -> dict[str, bytes]:
    return {name: zipped.read(m, 1 << 24) for name, m in zipped.members.items()}


class Pipe(io.BytesIO):
    """Cannot seek, so that zipfile writes data descriptors."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise OSError


@pytest.mark.parametrize("kind", [io.BytesIO, Pipe])
def test_what_zipfile_writes_is_read(kind: type[io.BytesIO], archive: Callable[[bytes], ZipArchive]) -> None:
    noise = random.Random(3).randbytes(700_000)
    target = kind()
    with zipfile.ZipFile(target, "w") as z:
        z.writestr("empty", b"")
        z.writestr("folder/stored", noise)
        z.writestr("folder/deflated", noise + bytes(100_000), zipfile.ZIP_DEFLATED)
        z.writestr("é", b"name")
        with z.open("large", "w", force_zip64=True) as f:
            f.write(b"x" * 1000)
    assert contents(archive(target.getvalue())) == {
        "empty": b"",
        "folder/stored": noise,
        "folder/deflated": noise + bytes(100_000),
        "é": b"name",
        "large": b"x" * 1000,
    }


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_what_ends_a_member_comes_with_the_header_of_the_next(
    wide: bool, archive: Callable[[bytes], ZipArchive], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, reads = Pipe(), [0]
    with zipfile.ZipFile(target, "w") as z:
        for k in range(50):
            with z.open(f"data/{k}", "w", force_zip64=wide) as f:
                f.write(bytes([k]) * k)
    read = ByteRange.read

    def counted(self: ByteRange, offset: int, size: int) -> bytes:
        reads[0] += 1
        return read(self, offset, size)

    monkeypatch.setattr(ByteRange, "read", counted)
    opened = archive(target.getvalue())
    assert reads[0] == 50 + 5  # one for each member; the first header, the end records and the directory
    assert contents(opened) == {f"data/{k}": bytes([k]) * k for k in range(50)}


def test_folders_have_members_of_their_own(archive: Callable[[bytes], ZipArchive]) -> None:
    data = build(Made(b"a/", b"", attributes=0x10), Made(b"a/b"), Made(b"c/", b""))
    assert contents(archive(data)) == {"a/": b"", "a/b": b"hello", "c/": b""}


def test_a_window_of_a_file_is_an_archive_of_its_own(tmp_path: Path) -> None:
    inner = build(Made(), Made(b"b", b"more"))
    outer = build(Made(b"first", b"x" * 99), Made(b"inner.zip", inner))
    path = tmp_path / "outer.zip"
    path.write_bytes(outer)
    whole = ZipArchive(ByteRange(path, "outer.zip"))
    m = whole.members["inner.zip"]
    part = ZipArchive(ByteRange(path, "outer.zip/inner.zip", (m.data, m.size)))
    assert contents(part) == {"a.txt": b"hello", "b": b"more"}


WIDE = struct.pack("<2H2Q", 1, 16, 5, 5)
BAD = {
    "name only in the directory": ([Made(local={"name": b"b.txt"})], {}, "b.txt"),
    "name length": ([Made(local={"name": b"a.tx"})], {}, "name"),
    "flags differ": ([Made(local={"flags": 0x800})], {}, "flags 0 as in the directory, found 2048"),
    "method differs": ([Made(local={"method": 8})], {}, "method 0 as in the directory, found 8"),
    "size differs": ([Made(local={"size": 6})], {}, "size 5 as in the directory, found 6"),
    "packed size differs": ([Made(local={"packed": 4})], {}, "packed size 5"),
    "crc differs": ([Made(local={"crc": 1})], {}, "crc32"),
    "two names": ([Made(), Made(content=b"other")], {}, "twice"),
    "overlap": ([Made(central={"packed": 20, "size": 20}), Made(b"b")], {}, "overlap"),
    "the same bytes twice": ([Made(), Made(b"b", central={"header": 0})], {}, "overlap"),
    "quoted overlap": ([Made(content=build(Made(b"q"))), Made(b"q", central={"header": 35})], {}, "overlap"),
    "beyond the directory": ([Made(central={"packed": 5000, "size": 5000})], {}, "overlap"),
    "header beyond the directory": ([Made(), Made(b"b", central={"header": 9000})], {}, "given as 9000"),
    "hole": ([Made(after=b"hidden"), Made(b"b")], {}, "other bytes"),
    "long hole of zeros": ([Made(after=bytes(5000)), Made(b"b")], {}, "other bytes"),
    "hole before the directory": ([Made(after=b"hidden")], {}, "other bytes"),
    "bytes before the first": ([Made()], {"prefix": b"PK\3\4junk"}, "before it"),
    "parent folder": ([Made(b"../x")], {}, "relative member name"),
    "absolute": ([Made(b"/etc/passwd")], {}, "relative member name"),
    "backslash up": ([Made(b"..\\b")], {}, "relative member name"),
    "backslash first": ([Made(b"\\\\host\\b")], {}, "relative member name"),
    "backslash and slash": ([Made(b"a\\b"), Made(b"a/b")], {}, "found it twice"),
    "NUL": ([Made(b"a\0b")], {}, "relative member name"),
    "drive letter": ([Made(b"C:x")], {}, "relative member name"),
    "empty name": ([Made(b"")], {}, "relative member name"),
    "name not UTF-8": ([Made(b"\xff\xfe", flags=0x800)], {}, "UTF-8"),
    "symbolic link": ([Made(attributes=(stat.S_IFLNK | 0o777) << 16)], {}, "link"),
    "file marked as a folder": ([Made(attributes=0x10)], {}, "folder"),
    "folder with bytes": ([Made(b"a/")], {}, "folder"),
    "encrypted": ([Made(flags=1)], {}, "encrypted"),
    "strongly encrypted": ([Made(flags=0x41)], {}, "encrypted"),
    "unknown flag": ([Made(flags=0x20)], {}, "0x0020"),
    "unknown method": ([Made(method=12)], {}, "method 12"),
    "stored with two sizes": ([Made(local={"size": 9}, central={"size": 9})], {}, "5 and 9"),
    "another part": ([Made(central={"disk": 2})], {}, "part 2"),
    "split": ([Made()], {"disk": 1}, "part 1"),
    "fewer members than said": ([Made()], {"count": 2}, "expected 2"),
    "more members than said": ([Made(), Made(b"b")], {"count": 1}, "expected 1"),
    "comment with an end record": ([Made()], {"comment": build()}, "another in its comment"),
    "wide size without its field": (
        [Made(central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF})],
        {},
        "overlap",
    ),
    "wide numbers cut": (
        [Made(central={"size": 0xFFFFFFFF, "extra": struct.pack("<2HL", 1, 4, 5)})],
        {},
        "numbers in the zip64 field",
    ),
    "wide sizes lying": (
        [
            Made(
                central={
                    "size": 0xFFFFFFFF,
                    "packed": 0xFFFFFFFF,
                    "extra": struct.pack("<2H2Q", 1, 16, 1 << 60, 1 << 60),
                }
            )
        ],
        {},
        "overlap",
    ),
    "two wide fields": (
        [Made(central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE + WIDE})],
        {},
        "zip64 field, found two",
    ),
    "extra field cut": ([Made(central={"extra": struct.pack("<2H", 9, 100)})], {}, "extra field of 100"),
    "descriptor missing": ([Made(flags=8, local={"crc": 0, "size": 0, "packed": 0})], {}, "descriptor"),
    "descriptor lying": (
        [Made(flags=8, local={"crc": 0, "size": 0, "packed": 0}, after=b"PK\7\x08" + bytes(12))],
        {},
        "descriptor",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_archives_with_two_readings_are_refused(what: str, archive: Callable[[bytes], ZipArchive]) -> None:
    members, options, words = BAD[what]
    with pytest.raises(CkptToolError) as caught:
        archive(build(*members, **options))  # type: ignore[arg-type]
    assert caught.value.kind == "bad-zip"
    assert words in caught.value.text()


def test_equal_wide_and_narrow_numbers_are_accepted(archive: Callable[[bytes], ZipArchive]) -> None:
    wide = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE}
    assert contents(archive(build(Made(local=wide, central=wide)))) == {"a.txt": b"hello"}  # type: ignore[arg-type]


def test_padding_of_zeros_and_a_comment_are_accepted(archive: Callable[[bytes], ZipArchive]) -> None:
    data = build(Made(after=bytes(59)), Made(b"b"), comment=b"made by hand")
    assert set(contents(archive(data))) == {"a.txt", "b"}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("truncated", lambda data: data[:-1]),
        ("truncated", lambda data: data[: len(data) // 2]),
        ("truncated", lambda data: data[:30]),
        ("wrong-format", lambda data: b""),
        ("wrong-format", lambda data: b"<html>" + data),
        ("trailing-data", lambda data: data + b"\0"),
        ("trailing-data", lambda data: data + b"junk" * 100),
    ],
)
def test_cut_and_extended_archives(
    kind: str, change: Callable[[bytes], bytes], archive: Callable[[bytes], ZipArchive]
) -> None:
    with pytest.raises(CkptToolError) as caught:
        archive(change(build(Made(), Made(b"b"))))
    assert caught.value.kind == kind


def test_too_many_members_are_refused_before_the_directory_is_read(
    archive: Callable[[bytes], ZipArchive],
) -> None:
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 0, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 4, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0)
    with pytest.raises(CkptToolError) as caught:
        archive(b"PK\3\4" + wide + locator + end)
    assert caught.value.kind == "zip-limit"


@pytest.mark.parametrize(
    ("wide", "locator"),
    [((44, 9, 4, 0, 0, 1), (0, 4, 1)), ((44, 0, 0, 0, 0, 0), (0, 5, 1)), ((44, 0, 0, 0, 0, 0), (1, 4, 2))],
)
def test_lying_64_bit_end_records(
    wide: tuple[int, ...], locator: tuple[int, ...], archive: Callable[[bytes], ZipArchive]
) -> None:
    length, disk, start_disk, *numbers = wide
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", length, 45, 45, disk, start_disk, 0, *numbers)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(CkptToolError) as caught:
        archive(b"PK\3\4" + record + struct.pack("<4sLQL", b"PK\6\7", *locator) + end)
    assert caught.value.kind == "bad-zip"


def test_a_bomb_is_not_inflated(archive: Callable[[bytes], ZipArchive]) -> None:
    zipped = archive(build(Made(b"zeros", bytes(4 << 20), method=8)))
    with pytest.raises(CkptToolError) as caught:
        next(zipped.blocks(zipped.members["zeros"]))
    assert caught.value.kind == "zip-limit"
    assert "200 times" in caught.value.text()


def test_inflating_stops_at_the_declared_size(archive: Callable[[bytes], ZipArchive]) -> None:
    less = {"size": 1000}
    zipped = archive(build(Made(b"more", b"abcd" * 1_000_000, method=8, local=less, central=less)))  # type: ignore[arg-type]
    with pytest.raises(CkptToolError) as caught:
        list(zipped.blocks(zipped.members["more"]))
    assert caught.value.kind == "zip-limit"
    more = {"size": 50_000}
    zipped = archive(
        build(Made(b"less", random.Random(1).randbytes(40_000), method=8, local=more, central=more))
    )
    with pytest.raises(CkptToolError) as caught:
        list(zipped.blocks(zipped.members["less"]))
    assert caught.value.kind == "bad-zip"


def test_a_flipped_bit_is_a_wrong_checksum_and_its_block_is_not_given(
    archive: Callable[[bytes], ZipArchive],
) -> None:
    data = bytearray(build(Made(content=bytes(300_000))))
    data[35 + 299_000] ^= 4
    zipped = archive(bytes(data))
    given_out = 0
    with pytest.raises(CkptToolError) as caught:
        for block in zipped.blocks(zipped.members["a.txt"]):
            given_out += len(block)
    assert caught.value.kind == "checksum"
    assert given_out == 256 << 10


def test_a_checksum_of_zero_means_that_there_is_none(archive: Callable[[bytes], ZipArchive]) -> None:
    none: dict[str, int | bytes] = {"crc": 0}
    zipped = archive(build(Made(local=none, central=none)))
    assert zipped.members["a.txt"].checksum is None
    assert contents(zipped) == {"a.txt": b"hello"}


def test_deflated_members_are_spooled_to_a_file_without_a_name(
    archive: Callable[[bytes], ZipArchive],
) -> None:
    content = random.Random(9).randbytes(1_500_000)
    zipped = archive(build(Made(content=content, method=8)))
    spooled = zipped.spool(zipped.members["a.txt"])
    assert spooled.size == len(content)
    assert spooled.read(1_000_000, 400_000) == content[1_000_000:1_400_000]
    spooled.close()


WHOLE = build(Made(flags=0x800), Made(b"d/b", b"some words " * 9, method=8), Made(b"e", b"", after=bytes(7)))


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_damaged_archives_give_the_contents_or_our_error(data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.integers(0, 9)):
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del raw[at + 1 :]
    path = tmp_path / "fuzz.zip"
    path.write_bytes(raw)
    source = ByteRange(path, "fuzz.zip")
    try:
        contents(ZipArchive(source))
    except CkptToolError as error:
        assert error.kind in {
            "bad-zip",
            "zip-limit",
            "checksum",
            "truncated",
            "trailing-data",
            "wrong-format",
        }
    finally:
        source.close()
