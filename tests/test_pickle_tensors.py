"""Tensors of a pickle that are read in one go are those that its opcodes make, one by one, with all that is
counted and remembered; and what is wrong with one is said in the same words."""

import base64
import io
import pickle
import pickletools
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint import unpickle
from ckpt_tool.checkpoint.pickle_records import LIMITS, Global, Inert, Limits, StorageRef, TensorRecord
from ckpt_tool.checkpoint.unpickle import Machine
from ckpt_tool.errors import CkptToolError

REBUILD, HOOKS = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


class Pickler:
    """Writes tensors as torch does: with all that it writes remembered and recalled, or in full each time."""

    def __init__(self, remembers: bool) -> None:
        self.remembers, self.entries, self.known = remembers, 0, dict[bytes, int]()

    def put(self) -> bytes:
        if not self.remembers:
            return b""
        self.entries += 1
        k = self.entries - 1
        return b"q" + bytes([k]) if k < 256 else b"r" + k.to_bytes(4, "little")

    def once(self, data: bytes) -> bytes:
        if data in self.known:
            k = self.known[data]
            return b"h" + bytes([k]) if k < 256 else b"j" + k.to_bytes(4, "little")
        if self.remembers:
            self.known[data] = self.entries
        return data + self.put()

    def number(self, n: int) -> bytes:
        if 0 <= n < 256:
            return b"K" + bytes([n])
        return (
            b"M" + n.to_bytes(2, "little") if 0 <= n < 65536 else b"J" + n.to_bytes(4, "little", signed=True)
        )

    def sizes(self, sizes: tuple[int, ...]) -> bytes:
        inside = b"".join(map(self.number, sizes))
        if not sizes:
            return b")"
        if len(sizes) > 3 or not self.remembers:
            return b"(" + inside + b"t" + self.put()
        return inside + bytes([0x84 + len(sizes)]) + self.put()

    def tensor(
        self,
        key: str,
        sizes: tuple[int, ...],
        kind: str = "FloatStorage",
        *,
        numel: int = 900,
        legacy: bool = False,
    ) -> bytes:
        out = (
            self.once(REBUILD) + b"((" + self.once(text("storage")) + self.once(f"ctorch\n{kind}\n".encode())
        )
        out += (
            text(key)
            + self.put()
            + self.once(text("cpu"))
            + self.number(numel)
            + b"N" * legacy
            + b"t"
            + self.put()
        )
        out += b"Q" + self.number(0) + self.sizes(sizes) + self.sizes((1,) * len(sizes)) + b"\x89"
        return out + self.once(HOOKS) + b")R" + self.put() + b"t" + self.put() + b"R" + self.put()


SIZES = ((2, 3), (), (70000, 1), (4,), (2, 2, 2), (1, 2, 3, 4, 5), (300,))


def pickled(remembers: bool, *, legacy: bool = False, times: int = 6) -> bytes:
    p = Pickler(remembers)
    out = b"\x80\x02}" + p.put() + b"("
    for k in range(times * len(SIZES)):
        kind = "HalfStorage" if k % 5 == 3 else "FloatStorage"
        out += text(f"w{k}") + p.put() + p.tensor(str(k), SIZES[k % len(SIZES)], kind, legacy=legacy)
    return out + b"u."


def flat(value: object) -> object:
    """With tensors, which are equal to themselves only, as their fields."""
    if type(value) is TensorRecord:
        return tuple(getattr(value, name) for name in TensorRecord.__slots__)
    if type(value) is dict:
        return {k: flat(v) for k, v in value.items()}
    if type(value) is Inert:
        return value.type, flat(value.args), value.at, flat(value.state), flat(value.items)
    return [*map(flat, value)] if type(value) in (tuple, list) else value


def outcome(data: bytes, limits: Limits = LIMITS) -> tuple[Machine, object]:
    machine = Machine(data, file="x.pkl", limits=limits)
    try:
        read = machine.run()
    except CkptToolError as error:
        return machine, str(error)
    counted = machine.memory, machine.tensors, flat(machine.memo)
    return machine, (flat(read.value), read.imports, read.called, read.storages, read.end, *counted)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Machine, object, object]]:
    """What comes of data in one go, and by its opcodes."""
    row = unpickle.tensor_row

    def read(data: bytes, limits: Limits = LIMITS) -> tuple[Machine, object, object]:
        monkeypatch.setattr(unpickle, "tensor_row", row)
        machine, found = outcome(data, limits)
        monkeypatch.setattr(unpickle, "tensor_row", lambda _: False)
        return machine, found, outcome(data, limits)[1]

    return read


Both = Callable[..., tuple[Machine, object, object]]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("remembers", [False, True], ids=["in full", "remembered"])
def test_tensors_in_one_go_are_those_of_their_opcodes(both: Both, remembers: bool, legacy: bool) -> None:
    machine, found, expected = both(pickled(remembers, legacy=legacy))
    assert found == expected
    assert machine.tensors == 42
    in_each = machine.in_rows / 42
    assert in_each > 15  # all but those whose class or function is named for the first time


# data.pkl of torch.save of five tensors by torch 2.13.0, two of them of one storage shape.
TORCHS = (
    b"c-"
    b"mEvOH0E*6or$f4;}0KRiE{3s#3K26GVhrNaLovkWNMu2#qJXaVNNGq5s;+OcA;o7|!?IbMJ5E2bMdqEz1gE3raH)b^U_kBximmhe"
    b"e!(KFLv@X8w1Nq2juOh6?8@8GK4O24OEr8qmA>WT<N4J!%6-z2d7to!1GCKDT&<I}<E$huae@PK8L5L<)-2QO@47P-ZfGjs-EWj)"
    b"x^e)5Eg14Y3lb>5&r|`vX=ZZC&e^veLS4tQ*s)gf|IW9=3H@U}p~QVOPO6p`|KyItJJy?0Y!Sfe?oVnC<r(Bp?6l9qGs;j+LWEXq"
    b"Ri%#yH{j7^lW{MmYCyp@R~abHkr-rN9>9T7j;ru1><M1lQ#)-sIJ?*R0YF;nu@l(ftGGN^I@"
)


def test_torchs_own_file_is_read_in_one_go(both: Both) -> None:
    machine, found, expected = both(zlib.decompress(base64.b85decode(TORCHS)))
    assert found == expected
    assert machine.tensors == 5 and machine.in_rows == 81  # of three: of two a class is named first


def test_opcodes_in_rows_count_for_the_limit(both: Both) -> None:
    data = pickled(False)
    count = sum(1 for _ in pickletools.genops(data))
    _, found, expected = both(data, Limits(opcodes=count))
    assert found == expected and not isinstance(found, str)
    _, found, expected = both(data, Limits(opcodes=count - 1))
    assert found == expected
    assert f"expected at most {count - 1} opcodes, found more" in str(found)


@pytest.mark.parametrize("what", ["memory", "memo", "tensors", "nesting"])
def test_every_limit_is_met_where_the_opcodes_meet_it(both: Both, what: str) -> None:
    data = pickled(True, times=2)
    machine, *_ = both(data)
    used = {
        "memory": LIMITS.memory - machine.memory,
        "memo": len(machine.memo),
        "tensors": machine.tensors,
        "nesting": 3,
    }[what]
    refused = 0
    for limit in range(used // 2, used + 200, max(1, used // 30)):
        _, found, expected = both(data, Limits(**{what: limit}))
        assert found == expected, limit
        refused += isinstance(found, str)
    assert refused


WRONG = {
    "another dtype": Pickler(False).tensor("0", (2,), "HalfStorage"),
    "another count": Pickler(False).tensor("0", (2,), numel=901),
    "a negative count": Pickler(False).tensor("9", (2,), numel=-1),
    "no storage class": Pickler(False).tensor("9", (2,), "Tensor"),
    "a long key": Pickler(False).tensor("9" * 10, (2,)),
    "not a storage": Pickler(False).tensor("9", (2,)).replace(b"storage", b"starage"),
    "another function": Pickler(False).tensor("9", (2,)).replace(b"tensor_v2", b"tensor_v1"),
    "other hooks": Pickler(False).tensor("9", (2,)).replace(b"OrderedDict", b"Counter"),
    "the length of its key": Pickler(False).tensor("98", (2,)).replace(b"X\2\0\0\x0098", b"X\1\0\0\x0098"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_tensor_is_said_in_the_same_words(both: Both, what: str) -> None:
    known = b"".join(text(f"k{k}") + Pickler(False).tensor(str(k), (2,), kind) for k, kind in enumerate(
        ("FloatStorage", "HalfStorage")
    ))  # fmt: skip
    _, found, expected = both(b"\x80\x02}(" + known + text("w") + WRONG[what] + b"u.")
    assert found == expected


def test_a_storage_of_two_tensors_is_one(both: Both) -> None:
    p = Pickler(False)
    tensors = [text(f"w{k}") + p.tensor("0", (k,)) for k in range(4)]
    _, found, expected = both(b"\x80\x02}(" + b"".join(tensors) + b"u.")
    assert found == expected and isinstance(found, tuple)
    assert found[3] == {"0": StorageRef("0", "float32", "cpu", 900)}
    assert found[2] == {Global("torch._utils", "_rebuild_tensor_v2"), Global("collections", "OrderedDict")}


def test_what_a_tensor_remembers_anew_is_what_it_recalls(both: Both) -> None:
    """A memo entry that is written over and read again within one tensor."""
    first, again = Pickler(True), Pickler(True)
    known = (
        b"\x80\x02}(" + text("a") + first.tensor("0", (2,)) + text("b") + first.tensor("1", (2,)) + text("c")
    )
    again.known, again.entries = first.known, first.entries
    own = again.tensor("2", (3,))
    kind, key = first.known[b"ctorch\nFloatStorage\n"], text("2") + b"q"
    at = own.index(key) + len(key)
    for index in (kind, first.known[text("cpu")]):  # the key in place of another value
        _, found, expected = both(known + own[:at] + bytes([index]) + own[at + 1 :] + b"u.")
        assert found == expected
    assert isinstance(found, tuple) and found[3]["2"].location == "2"


SOUND = [pickled(False, times=1), pickled(True, times=2), pickled(True, legacy=True, times=1)]


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_tensors_end_as_their_opcodes_do(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(SOUND)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b"qrhjKMJ(t)RQ")
        )
    row = unpickle.tensor_row
    _, found = outcome(bytes(raw))
    try:
        unpickle.tensor_row = lambda _: False
        _, expected = outcome(bytes(raw))
    finally:
        unpickle.tensor_row = row
    assert found == expected


def test_the_sound_ones_are_what_python_reads_too() -> None:
    class Stub(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            return f"{module}.{name}" if module == "torch" else lambda *args: args

        def persistent_load(self, pid: object) -> object:
            return pid

    for data in SOUND:
        made = Stub(io.BytesIO(data)).load()
        _, found = outcome(data)
        assert isinstance(found, tuple)
        assert [(t[1:4]) for t in made.values()] == [(t[2:5]) for t in found[0].values()]
