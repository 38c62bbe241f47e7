"""The long lists of a certificate: the leaves of both sides and the plan's rows.

Of most models they stand in the certificate. Where there are more than `INLINE` entries in all, they lie in a
file beside it (`beside`), and in their place in the certificate stands how many they are, with the SHA-256 of
that file: the certificate stays small enough to be signed and stored anywhere, and is written and checked an
entry at a time. Each line of the file is an entry as canonical JSON (`leaves.canonical`): the leaves of the
source, those of the target, the tensors of the plan's outputs, its steps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

from ckpt_tool.checkpoint.spool import Spool
from ckpt_tool.convert.manifest import LISTS_SUFFIX
from ckpt_tool.convert.plan import Plan
from ckpt_tool.convert.plan_text import step_texts, tensor_texts
from ckpt_tool.errors import fail
from ckpt_tool.verify.certificate_form import ENTRY_FORMS, unlike
from ckpt_tool.verify.leaves import Leaf, canonical
from ckpt_tool.verify.merkle import Tree

INLINE = 30_000  # entries in all
LINE = 1 << 20  # bytes of one entry
PIECE = 1 << 20
Section = Literal["source", "target", "outputs", "steps"]
SECTIONS: tuple[Section, ...] = ("source", "target", "outputs", "steps")


def beside(place: str | os.PathLike[str]) -> Path:
    """Where the lists of the certificate at `place` lie, if they are not in it."""
    path = Path(place)
    return path.with_name(path.stem + LISTS_SUFFIX)


@dataclass
class Lists:
    """Entries as they are made, in a temporary file: all of a section before the next. `counts` are those of
    the sections; the tensors of each output are a section's worth of its own."""

    spool: Spool = field(default_factory=Spool)
    counts: list[tuple[Section, int]] = field(default_factory=list)
    _held: list[bytes] = field(default_factory=list)

    def add(self, section: Section, texts: Iterable[str]) -> None:
        count = 0
        for text in texts:
            count += 1
            self._held.append(text.encode() + b"\n")
            if len(self._held) == 1000:
                self._flush()
        self._flush()
        self.counts.append((section, count))

    def _flush(self) -> None:
        if self._held:
            self.spool.write(b"".join(self._held))
            self._held.clear()

    def leaves(self, section: Section, leaves: Iterable[Leaf]) -> str:
        """Add leaves in their order; the root that stands for them."""
        tree = Tree()

        def texts() -> Iterator[str]:
            for leaf in leaves:
                text = canonical(leaf.to_json())
                tree.add(text)
                yield text.decode()

        self.add(section, texts())
        return tree.root()

    def plan(self, plan: Plan) -> None:
        for file in plan.outputs:
            self.add("outputs", tensor_texts(file))
        self.add("steps", step_texts(plan))

    def into(self, predicate: dict[str, Any]) -> bool:
        """Put the entries into their places in the predicate, or how many they are; whether they are apart
        from it."""
        apart = sum(n for _, n in self.counts) > INLINE
        lines = lines_of(self.spool.pieces())
        outputs = iter(predicate["plan"]["outputs"])
        for section, count in self.counts:
            entries = count if apart else [json.loads(line) for line in islice(lines, count)]
            if section == "steps":
                predicate["plan"]["steps"] = entries
            elif section == "outputs":
                next(outputs)["tensors"] = entries
            else:
                predicate[section]["tensors"] = entries
        if apart:
            predicate["lists"] = {"sha256": _sha256(self.spool.pieces())}
        return apart


def lines_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in pieces."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _sha256(pieces: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


# --- to be checked --------------------------------------------------------------------------------------


class Entries:
    """The entries of a certificate whose lists stand in it."""

    apart = False

    def __init__(self, predicate: Mapping[str, Any]) -> None:
        self.predicate = predicate
        self.plan = {k: v for k, v in predicate["plan"].items() if k != "sha256"}

    def each(self, section: Section) -> Iterator[dict[str, Any]]:
        if section == "steps":
            yield from self.plan["steps"]
        elif section == "outputs":
            for output in self.plan["outputs"]:
                yield from output["tensors"]
        else:
            yield from self.predicate[section]["tensors"]

    def count(self, section: Section) -> int:
        return sum(1 for _ in self.each(section))

    def plan_digest(self) -> str:
        return hashlib.sha256(canonical(self.plan)).hexdigest()


class Filed(Entries):
    """Those of the one at `place`, whose lists lie in the file `path`. `sha256` is that of the file: where it
    is not the one in the certificate, they are not to be read."""

    apart = True

    def __init__(self, predicate: Mapping[str, Any], place: Path) -> None:
        super().__init__(predicate)
        self.place, self.path = place, beside(place)
        outputs = [o["tensors"] for o in self.plan["outputs"]]
        self.counts: dict[Section, int] = {
            "source": predicate["source"]["tensors"],
            "target": predicate["target"]["tensors"],
            "outputs": sum(outputs),
            "steps": self.plan["steps"],
        }
        if any(n < 0 for n in (*self.counts.values(), *outputs)):
            fail("bad-config", "expected numbers of entries, found one below 0", file=place.name)
        self.sha256 = self._look()

    def _look(self) -> str:
        """Read all of it once, so that the sections are known by where they begin."""
        made, at, number = hashlib.sha256(), 0, 0
        wanted: dict[int, list[Section]] = {}  # an empty one begins where the next does
        total = 0
        for section in SECTIONS:
            wanted.setdefault(total, []).append(section)
            total += self.counts[section]
        self.starts: dict[Section, int] = {}
        for line in self._read(0):
            for section in wanted.get(number, ()):
                self.starts[section] = at
            made.update(line)
            at, number = at + len(line), number + 1
        for section in wanted.get(number, ()):
            self.starts[section] = at
        found = made.hexdigest()
        if number != total and found == self.predicate["lists"]["sha256"]:
            self._refuse(f"expected {total:,} entries, found {number:,}")
        return found

    def _read(self, at: int) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                file.seek(at)
                while line := file.readline(LINE + 1):
                    if len(line) > LINE:
                        self._refuse(f"expected lines of at most {LINE:,} bytes, found a longer one")
                    yield line
        except FileNotFoundError:
            hint = f"a file {LISTS_SUFFIX} belongs to {self.place.name}: copy and rename it with that"
            fail("not-found", "expected the lists of the certificate, found none", file=self.path, hint=hint)
        except OSError as error:
            fail("read-failed", f"cannot be read: {error.strerror}", file=self.path)

    def _refuse(self, message: str, where: str | None = None) -> NoReturn:
        fail("bad-config", message, file=self.path.name, where=where)

    def count(self, section: Section) -> int:
        return self.counts[section]

    def each(self, section: Section) -> Iterator[dict[str, Any]]:
        for line in self.lines(section):
            try:
                entry = json.loads(line)
                same = canonical(entry) + b"\n" == line
            except (ValueError, RecursionError):
                entry, same = None, False
            # what is written in another way (a key twice, NaN) is not what others would read
            if not same:
                self._refuse("expected an entry as canonical JSON in each line, found another")
            for where, expected in unlike(entry, ENTRY_FORMS[section], section):
                self._refuse(f"expected {expected}, found another value", where)
            yield entry

    def lines(self, section: Section) -> Iterator[bytes]:
        return islice(self._read(self.starts[section]), self.counts[section])

    def plan_digest(self) -> str:
        made, tensors = hashlib.sha256(), self.lines("outputs")

        def put(lines: Iterable[bytes]) -> None:
            made.update(b"[")
            for k, line in enumerate(lines):
                made.update(b"," * (k > 0) + line[:-1])
            made.update(b"]")

        for k, key in enumerate(sorted(self.plan)):
            made.update(b",{"[k == 0 :][:1] + canonical(key) + b":")
            if key == "steps":
                put(self.lines("steps"))
            elif key == "outputs":
                made.update(b"[")
                for at, output in enumerate(self.plan[key]):
                    rest = {name: value for name, value in output.items() if name != "tensors"}
                    made.update(b"," * (at > 0) + canonical(rest)[:-1] + b',"tensors":')
                    put(islice(tensors, output["tensors"]))
                    made.update(b"}")
                made.update(b"]")
            else:
                made.update(canonical(self.plan[key]))
        made.update(b"}")
        return made.hexdigest()


def entries_of(predicate: Mapping[str, Any], place: Path) -> Entries:
    """Of a certificate at `place` that has the form of one."""
    return Filed(predicate, place) if "lists" in predicate else Entries(predicate)
