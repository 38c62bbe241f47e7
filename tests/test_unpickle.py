"""Pickles read as data: what Python reads where that is plain, inert where not, refused where it lies."""

import argparse
import builtins
import codecs
import pickle
import struct
import sys
import time
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from datetime import date
from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.pickle_records import Global, Inert, Limits, StorageRef, TensorRecord
from ckpt_tool.checkpoint.unpickle import Machine, read_pickle
from ckpt_tool.errors import CkptToolError

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers(0, 99), inner, max_size=4)
    ),
    max_leaves=20,
)


def read(data: bytes, **options: object) -> object:
    return read_pickle(data, file="x.pkl", **options).value  # type: ignore[arg-type]


def refusal(data: bytes, **options: object) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        read(data, **options)
    return caught.value


class Colour(Enum):
    RED = 3


class Thing:
    def __init__(self) -> None:
        self.size = 5


@pytest.mark.parametrize("protocol", range(6))
@given(value=PLAIN)
@settings(max_examples=60)
def test_plain_values_equal_what_python_reads(protocol: int, value: object) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_shared_values_stay_one_object(protocol: int) -> None:
    part = [1, 2]
    first, second = read(pickle.dumps([part, part], protocol))  # type: ignore[misc]
    assert first == part
    assert first is second


@pytest.mark.parametrize("protocol", range(6))
def test_mappings_of_the_library_are_dicts(protocol: int) -> None:
    ordered = OrderedDict(b=1, a=2)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert read(pickle.dumps(ordered, protocol)) == {"b": 1, "a": 2}
    assert read(pickle.dumps(defaultdict(list, k=[1]), protocol)) == {"k": [1]}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace])
def test_saved_arguments_have_named_fields(protocol: int, kind: type) -> None:
    saved = kind(layers=24, hidden=1024, inner=kind(x="y"))
    found = read(pickle.dumps(saved, protocol))
    assert isinstance(found, Inert)
    assert str(found.type).endswith(kind.__name__)
    assert found.fields["layers"] == 24
    inner = found.fields["inner"]
    assert isinstance(inner, Inert) and inner.fields == {"x": "y"}


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_records_of_what_would_have_been_called(protocol: int) -> None:
    found = read(pickle.dumps([Colour.RED, Thing(), date(2020, 1, 2)], protocol))
    colour, thing, day = found  # type: ignore[misc]
    assert (colour.type.name, colour.args) == ("Colour", (3,))
    assert thing.type.name == "Thing" and thing.fields == {"size": 5}
    assert str(day.type) == "datetime.date"


def test_enum_members_by_name_are_records_of_their_class() -> None:
    # getattr(megatron.enums.ModelType, "encoder"), as Python 3.11.0 pickled enum members
    found = read(b"\x80\x02c__builtin__\ngetattr\ncmegatron.enums\nModelType\nX\x07\0\0\0encoder\x86R.")
    assert isinstance(found, Inert)
    assert (str(found.type), found.args) == ("megatron.enums.ModelType", ("encoder",))


def test_sets_are_lists_of_their_members_and_nothing_is_hashed() -> None:
    found = read(pickle.dumps({1, 2}, 4))
    assert isinstance(found, Inert)
    assert str(found.type) == "builtins.set" and sorted(found.items or []) == [1, 2]  # type: ignore[type-var]


def test_python_2_strings_are_text_where_they_are_utf8() -> None:
    assert read(b"S'a\\x62'\n.") == "ab"
    assert read(b"U\x03\xc3\xa9!.") == "é!"
    assert read(b"U\x02\xff\xfe.") == b"\xff\xfe"
    assert read(b"c_codecs\nencode\n(X\x03\0\0\0\xc3\xbf0X\x06\0\0\0latin1tR.") == b"\xff0"


def storage(key: str = "0", kind: str = "FloatStorage", numel: int = 6, location: str = "cpu") -> bytes:
    return pickle.dumps(("storage", None, key, location, numel), 2)[2:-1].replace(
        b"N", f"ctorch\n{kind}\n".encode(), 1
    )


def test_tensors_are_records() -> None:
    pid = storage()
    data = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"QK\x01K\x02K\x02\x86K\x02K\x01\x86\x89}tR."
    )
    found = read(data)
    assert isinstance(found, TensorRecord)
    assert found.storage == StorageRef("0", "float32", "cpu", 6)
    assert (found.offset, found.shape, found.strides, found.dtype) == (1, (2, 2), (2, 1), "float32")


TUPLE_BOMB = b"\x80\x02)" + b"2\x86" * 60
HOSTILE = {
    # what: (bytes, kind, words of the message)
    "key is a tuple bomb": (b"\x80\x02}" + TUPLE_BOMB[2:] + b"K\x01s.", "unsafe-pickle", "SETITEM"),
    "key is a list": (b"\x80\x02}]K\x01s.", "unsafe-pickle", "list"),
    "key is a tuple in a tuple": (b"\x80\x02})\x85K\x01s.", "unsafe-pickle", "tuple"),
    "allocation by bytearray": (
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R.",
        "pickle-limit",
        "8589934592",
    ),
    "allocation by a storage": (
        b"\x80\x02ctorch\nFloatStorage\nJ\0\0\0\x40\x85R.",
        "pickle-limit",
        "1073741824",
    ),
    "allocation by a tensor": (
        b"\x80\x02ctorch\nTensor\nJ\0\0\0\x40\x85\x81.",
        "pickle-limit",
        "torch.Tensor",
    ),
    "a million open containers": (b"\x80\x02" + b"(" * 1_000_000 + b".", "pickle-limit", "MARK"),
    "ten million opcodes": (b"\x80\x02" + b"N0" * 5_000_000 + b"N.", "pickle-limit", "opcodes"),
    "a string of 4 GB": (b"\x80\x02X\xff\xff\xff\xff.", "bad-pickle", "4294967295"),
    "a string of 2^62 bytes": (
        b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b".",
        "bad-pickle",
        "BINUNICODE8",
    ),
    "a line without end": (b"\x80\x02cx" + b"y" * (2 << 20), "pickle-limit", "GLOBAL"),
    "a memo entry of 100 bits": (b"Np" + b"9" * 30 + b"\n.", "pickle-limit", "PUT"),
    "a shape of 100 bits": (
        b"\x80\x02ctorch\nSize\n\x8a\x0d" + b"\x11" * 13 + b"\x85\x85R.",
        "bad-pickle",
        "integers",
    ),
    "too many objects": (b"\x80\x02(" + b"}" * 3_000_000 + b"l.", "pickle-limit", "EMPTY_DICT"),
    "no stop": (b"\x80\x02}", "bad-pickle", "byte 3"),
    "cut in an argument": (b"\x80\x02X\x05\0\0\0ab", "bad-pickle", "BINUNICODE at byte 2"),
    "empty": (b"", "bad-pickle", "byte 0"),
    "memo entry that is not there": (b"\x80\x02h\x07.", "bad-pickle", "memo entry 7"),
    "empty stack": (b"\x80\x02\x85.", "bad-pickle", "TUPLE1 at byte 2"),
    "no mark": (b"\x80\x02t.", "bad-pickle", "mark"),
    "more than one value": (b"\x80\x02NN.", "bad-pickle", "one value"),
    "protocol 6": (b"\x80\x06N.", "bad-pickle", "found 6"),
    "protocol said twice": (b"\x80\x02\x80\x02N.", "bad-pickle", "PROTO at byte 2"),
    "extension registry": (b"\x80\x02\x82\x01.", "bad-pickle", "EXT1"),
    "out-of-band buffer": (b"\x80\x05\x97.", "bad-pickle", "NEXT_BUFFER"),
    "persistent id as text": (b"Pabc\n.", "bad-pickle", "PERSID"),
    "no opcode": (b"\x80\x02\xee.", "bad-pickle", "0xee"),
    "frame beyond the end": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "bad-pickle", "frame"),
    "frame in a frame": (
        b"\x80\x04\x95" + struct.pack("<Q", 11) + b"\x95" + bytes(8) + b"N.",
        "bad-pickle",
        "FRAME",
    ),
    "state that shadows items": (
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.",
        "unsafe-pickle",
        "items",
    ),
    "state that replaces the class": (
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\0\0\0__class__K\x01sb.",
        "unsafe-pickle",
        "__class__",
    ),
    "state of a global": (b"\x80\x02cos\nsystem\n}b.", "unsafe-pickle", "BUILD"),
    "call of what is no global": (b"\x80\x02K\x01)R.", "unsafe-pickle", "the number 1"),
    "call of a made object": (b"\x80\x02cx\ny\n)R)R.", "unsafe-pickle", "x.y"),
    "arguments that are no tuple": (b"\x80\x02cx\ny\n]R.", "bad-pickle", "list"),
    "append to a dict": (b"\x80\x02}Na.", "bad-pickle", "a dict"),
    "item without a value": (b"\x80\x02}(X\x01\0\0\0au.", "bad-pickle", "key more"),
    "not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", "bad-pickle", "UTF-8"),
    "duplicate key": (b"\x80\x02}(X\x01\0\0\0aNX\x01\0\0\0aNu.", "duplicate-tensor", "again at byte"),
    "storage that is no storage": (
        b"\x80\x02" + storage(kind="Oddity") + b"Q.",
        "bad-pickle",
        "torch.Oddity",
    ),
    "storage key that is a path": (b"\x80\x02" + storage("../../x") + b"Q.", "bad-pickle", "../../x"),
    "negative storage": (b"\x80\x02" + storage(numel=-1) + b"Q.", "size-mismatch", "-1"),
    "storage of two dtypes": (
        b"\x80\x02(" + storage() + b"Q" + storage(kind="LongStorage") + b"Qt.",
        "storage-conflict",
        "float32 and int64",
    ),
    "storage of two places": (
        b"\x80\x02(" + storage() + b"Q" + storage(location="cuda:1") + b"Qt.",
        "storage-conflict",
        "cpu and cuda:1",
    ),
    "persistent id of something else": (b"\x80\x02X\x03\0\0\0abc\x85Q.", "bad-pickle", "persistent id"),
    "65 dimensions": (
        b"\x80\x02ctorch\nSize\n((" + b"K\x01" * 65 + b"tt0(" + b"K\x01" * 65 + b"t\x85R.",
        "pickle-limit",
        "64 dimensions",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_are_refused_in_words(what: str) -> None:
    data, kind, words = HOSTILE[what]
    began = time.process_time()
    error = refusal(data)
    assert error.kind == kind
    assert words in error.text()
    assert "of the pickle" in error.text() or kind == "duplicate-tensor"
    assert time.process_time() - began < 10


def test_limits_can_be_set() -> None:
    assert refusal(pickle.dumps([1, 2, 3], 2), limits=Limits(opcodes=3)).kind == "pickle-limit"
    assert isinstance(read(pickle.dumps("abcdef", 2), limits=Limits(string=5)), Inert)
    assert refusal(pickle.dumps([[1], [2]], 2), limits=Limits(memo=1)).kind == "pickle-limit"
    assert read(b"\x80\x02\x8a\x0alxxxxxxxxx.", limits=Limits(integer_bits=80)) == int.from_bytes(
        b"lxxxxxxxxx", "little"
    )


def test_reading_the_same_big_tuple_again_and_again_costs_its_length() -> None:
    """Calls that name one long tuple from the memo may not multiply the work."""
    many = b"\x80\x02(" + b"K\x01" * 100_000 + b"tq\0(" + b"cx\ny\nh\0R" * 20_000 + b"t."
    began = time.process_time()
    assert refusal(many).kind == "pickle-limit"
    assert time.process_time() - began < 5


def test_more_data_can_be_asked_for() -> None:
    whole = pickle.dumps({"a": [1, "b"]}, 2)
    for size in range(len(whole)):
        asked: list[int] = []

        def feed(offset: int, asked: list[int] = asked) -> bytes:
            asked.append(offset)
            return whole[offset:]

        machine = Machine(whole[:size], file="x", end=len(whole), feed=feed)
        assert machine.run().value == {"a": [1, "b"]}
        assert len(asked) == 1 and asked[0] <= size
        assert refusal(whole[:size], cut="truncated").kind == "truncated"
    found = read_pickle(whole + b"and more", file="x")
    assert (found.value, found.end) == ({"a": [1, "b"]}, len(whole))


def test_imports_are_listed_even_before_a_fault() -> None:
    data = b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R0cnumpy\ndtype\n0cbuiltins\neval\n0\xee"
    assert Machine(data, file="x").scan() == ("os.system", "numpy.dtype", "builtins.eval")
    found = read_pickle(data[:-1] + b"N.", file="x")
    assert found.imports == {
        Global("os", "system"): 2,
        Global("numpy", "dtype"): 23,
        Global("builtins", "eval"): 37,
    }
    assert found.called == {Global("os", "system")}


EVENTS: list[str] = []
WATCHING = False


def _watch(event: str, args: tuple[object, ...]) -> None:
    if WATCHING and event in (
        "import",
        "exec",
        "compile",
        "open",
        "os.system",
        "subprocess.Popen",
        "pickle.find_class",
    ):
        EVENTS.append(event)


@pytest.fixture
def audited() -> Iterator[list[str]]:
    """The audited events of the interpreter while the test body runs."""
    global WATCHING
    if _watch not in getattr(builtins, "_ckpt_tool_hooks", ()):
        sys.addaudithook(_watch)
        builtins._ckpt_tool_hooks = (_watch,)  # type: ignore[attr-defined]
    EVENTS.clear()
    WATCHING = True
    yield EVENTS
    WATCHING = False


def test_nothing_is_imported_or_run(audited: list[str]) -> None:
    class Bomb:
        def __reduce__(self) -> object:
            return eval, ("__import__('antigravity')",)

    data = [pickle.dumps({"a": Bomb()}, protocol) for protocol in range(6)]
    codecs.lookup(
        "raw-unicode-escape"
    )  # Python loads a codec when it is first used, by nobody's name but ours
    audited.clear()  # what pickle itself did
    for one in data:
        found = read(one)
        assert isinstance(found, dict) and str(found["a"].type).endswith("eval")
    for one, _, _ in HOSTILE.values():
        Machine(one[:4096], file="x").scan()
    assert audited == []
    assert "antigravity" not in sys.modules


CORPUS = [
    pickle.dumps({"a": [1, 2.5, "x"], "n": argparse.Namespace(x=(1, 2)), 3: {"deep": b"bytes"}}, p)
    for p in range(6)
]


@given(data=st.data())
@settings(max_examples=400)
def test_damaged_pickles_give_a_value_or_our_error(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(CORPUS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case 1:
                raw[at] = data.draw(st.integers(0, 255))
            case 2:
                del raw[at + 1 :]
            case 3:
                raw[at:at] = data.draw(st.binary(max_size=8))
    try:
        read(bytes(raw))
    except CkptToolError as error:
        assert error.kind in {"bad-pickle", "unsafe-pickle", "pickle-limit", "duplicate-tensor"}
