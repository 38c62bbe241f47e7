"""A file behind an http(s) address, by range requests; through the session of huggingface_hub, which keeps
connections, proxies and certificates as its users set them.

The answer to every request must be the part that was asked for, of the version that was seen first: another
`ETag` or size is `input-changed`. Redirects are followed by http(s) only and never from https to http, and a
token goes to the host that it is for and to no other. Where a redirect leads is asked once, not each time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit
from uuid import uuid4

from ckpt_tool.checkpoint.remote_file import Again
from ckpt_tool.checkpoint.remote_path import without_secrets
from ckpt_tool.errors import fail, missing_package, printable
from ckpt_tool.records import dataclass

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a byte
REDIRECTS = 5
WHOLE = 8 << 20  # bytes of a file that is read whole where its server knows no ranges
_PART = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)
EXPIRED = (400, 401, 403, 404, 410)  # what an address that was good for a while says afterwards
BUSY = (408, 425, 429, 500, 502, 503, 504)
_MOVED = (301, 302, 303, 307, 308)
_KEPT = ("etag", "last-modified")  # headers that tell a version from another; the first that there is counts

Headers = Mapping[str, str]


def _no_headers(url: str) -> Headers:
    return {}


@dataclass
class HttpFile:
    """See `Served`. `headers` gives what is sent to an address beside the range, its token among it. Where
    `size` is not known (-1), `learn` finds it."""

    url: str
    label: str
    size: int = -1
    headers: Callable[[str], Headers] = _no_headers
    named: Mapping[str, Any] = field(default_factory=dict)  # what a list of files said of it: a digest
    fixed: bool = False  # the address names one version for ever
    kind: str = ""  # of the content, once it is known
    refused: int = 0  # the status of failure that was the answer
    _place: str | None = None  # where redirects led
    _version: tuple[str, str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _once: str = field(default_factory=lambda: uuid4().hex)

    @property
    def stamp(self) -> Mapping[str, Any]:
        """Where the server tells no version, no later reading of the file counts as one of the same."""
        seen = {} if self.fixed else {"once": self._once} if self._version is None else dict([self._version])
        return {"size": self.size, **self.named, **seen}

    @property
    def place(self) -> str:
        """The address where redirects led, as far as any request was made."""
        return self._place or self.url

    def learn(self) -> None:
        """Ask for the first byte: then the size, the version and the kind are known."""
        with self._asked(0, 1) as answer:
            self._check_version(answer)
            if answer.status_code == 206:
                self._part(answer, 0, 1)
            elif answer.status_code == 416:
                self._learn_size(0)
            else:
                length = answer.headers.get("content-length", "")
                if not length.isdigit():
                    self._no_ranges("one of unknown size whole")
                self._learn_size(int(length))
            self.kind = str(answer.headers.get("content-type", ""))

    def page(self, limit: int) -> str:
        """The text behind the address, where it is a page; at most `limit` bytes of it."""
        text = bytearray()
        with self._asked(0, limit) as answer:
            if not answer.headers.get("content-type", "").startswith("text/html"):
                self._refuse("expected a page that lists files, found something else")
            for chunk in self._chunks(answer):
                text += chunk
                if len(text) > limit:
                    self._refuse(f"expected a list of at most {limit} bytes, found more")
        return text.decode("utf-8", "replace")

    def fetch(self, start: int, buffer: memoryview) -> Iterator[int]:
        with self._asked(start, len(buffer)) as answer:
            self._check_version(answer)
            skip = 0
            if answer.status_code == 206:
                self._part(answer, start, len(buffer))
            else:
                if self.size > WHOLE:
                    self._no_ranges("the whole file")
                if (length := answer.headers.get("content-length", "")).isdigit():
                    self._learn_size(int(length))
                skip = start
            done = 0
            for chunk in self._chunks(answer):
                piece = memoryview(chunk)[skip:]
                skip = max(0, skip - len(chunk))
                piece = piece[: len(buffer) - done]
                buffer[done : done + len(piece)] = piece
                done += len(piece)
                yield done
                if done == len(buffer):
                    return

    def check_unchanged(self) -> None:
        if not self.fixed and self.size:
            with self._asked(0, 1) as answer:
                self._check_version(answer)
                if answer.status_code == 206:
                    self._part(answer, 0, 1)

    # --- one request ---

    @contextmanager
    def _asked(self, start: int, size: int) -> Iterator[Any]:
        """The answer to a request of a range, its status one of success; the body is not read yet."""
        client = session()
        wanted = {"range": f"bytes={start}-{start + size - 1}", "accept-encoding": "identity"}
        known, url = self._place, self._place or self.url
        for _ in range(REDIRECTS):
            with _failures_told(), _streamed(client, url, {**self.headers(url), **wanted}) as answer:
                if answer.status_code in _MOVED:
                    url = self._onward(url, answer)
                    continue
                if known is not None and answer.status_code in EXPIRED:
                    self._forget_place()
                    raise Again(f"status {answer.status_code} from where the file was before")
                self._check_status(answer)
                self._check_coding(answer)
                self._place = url if url != self.url else None
                yield answer
                return
        fail("download-failed", f"expected a file, found more than {REDIRECTS} redirects", file=self.label)

    def _forget_place(self) -> None:
        """Where the redirect led was good for a while only. Where the address names one version, the next
        place may tell it otherwise."""
        self._place = None
        if self.fixed:
            with self._lock:
                self._version = None

    def _onward(self, url: str, answer: Any) -> str:
        told = answer.headers.get("location", "")
        there: str = urljoin(url, told)
        before, after = urlsplit(url), urlsplit(there)
        if after.scheme not in ("http", "https") or not after.hostname:
            self._refuse(f"expected a redirect to an http address, found one to {printable(told, 60)}")
        if before.scheme == "https" and after.scheme == "http":
            self._refuse("expected a redirect to an https address, found one to http")
        linked = answer.headers.get("x-linked-size")
        if linked is not None and linked.isdigit() and self.size >= 0 and int(linked) != self.size:
            self._changed(f"{self.size} bytes", f"{linked}")
        return there

    def _check_status(self, answer: Any) -> None:
        status = answer.status_code
        if status in (200, 206):
            return
        if status in BUSY:
            after = answer.headers.get("retry-after", "")
            raise Again(f"status {status}", float(after) if after.isdigit() else None)
        if status == 416 and self.size < 0 and answer.headers.get("content-range") == "bytes */0":
            return
        if status == 416:
            self._changed(f"{self.size} bytes", "a file that is shorter")
        self.refused = status
        refuse_status(status, self.label, answer.headers)

    def _check_coding(self, answer: Any) -> None:
        """The bytes as they are were asked for; in those of a compressed form no place is known."""
        coding = answer.headers.get("content-encoding", "identity")
        if coding not in ("", "identity"):
            fail(
                "download-failed",
                f"expected the bytes of the file, found them compressed ({printable(coding, 40)})",
                file=self.label,
                hint="download it first, and give the file",
            )

    def _part(self, answer: Any, start: int, size: int) -> None:
        """Whether a part is the one that was asked for, of a file of the size that is known."""
        found = _PART.fullmatch(answer.headers.get("content-range", "").strip())
        if found is None or int(found[1]) != start or int(found[2]) >= start + size:
            told = printable(answer.headers.get("content-range", "none"), 60)
            self._refuse(f"expected bytes {start} to {start + size}, found the range {told}")
        self._learn_size(int(found[3]))

    def _learn_size(self, size: int) -> None:
        with self._lock:
            if self.size < 0:
                self.size = size
        if size != self.size:
            self._changed(f"{self.size} bytes", f"{size}")

    def _check_version(self, answer: Any) -> None:
        told = [(name, answer.headers[name]) for name in _KEPT if name in answer.headers]
        if not told:
            return
        with self._lock:
            if self._version is None:
                self._version = told[0]
        if self._version not in told:
            self._changed(" ".join(map(printable, self._version)), printable(told[0][1]))

    def _chunks(self, answer: Any) -> Iterator[bytes]:
        with _failures_told():
            yield from answer.iter_raw()

    # --- what is said ---

    def _refuse(self, message: str) -> NoReturn:
        fail("download-failed", message, file=self.label)

    def _no_ranges(self, found: str) -> NoReturn:
        fail(
            "download-failed",
            f"expected the part of the file that was asked for, found {found}: the server knows no ranges",
            file=self.label,
            hint="download it first, and give the file",
        )

    def _changed(self, expected: str, found: str) -> NoReturn:
        fail(
            "input-changed",
            f"expected the file as it was ({expected}), found another ({found})",
            file=self.label,
            hint="nothing else may write to the input while it is read",
        )


def refuse_status(status: int, label: str, headers: Headers) -> NoReturn:
    """Say what a status of failure means, and what to do about it."""
    told = headers.get("x-error-message")
    reason = f": {printable(told, 200).rstrip('.')}" if told else ""
    means, hint = {
        401: ("who is asking is not known", "`hf auth login`, or HF_TOKEN, says who you are"),
        403: ("it is not allowed", "ask for access on its page; the token must be one that may read it"),
        404: ("there is none", "where it is private, `hf auth login`, or HF_TOKEN, says who you are"),
        410: ("it is gone", None),
    }.get(status, ("the server does not answer as it should", None))
    if not label.startswith("hf://"):
        hint = None
    fail("download-failed", f"expected a file, found status {status}: {means}{reason}", file=label, hint=hint)


def session() -> Any:
    """The client of huggingface_hub, which all threads share."""
    try:
        from huggingface_hub import get_session
    except ImportError as error:
        problem = missing_package(error)
        if problem is None:
            raise
        fail(problem.kind, problem.message, hint=problem.hint)
    client = get_session()
    if not streams(client):
        fail("missing-package", "expected huggingface_hub 1.0 or later, found an older one",
             hint="pip install -U huggingface_hub")  # fmt: skip
    return client


def streams(client: Any) -> bool:
    """Whether the session is one of httpx, as it is from huggingface_hub 1.0 on."""
    return callable(getattr(client, "stream", None))


@contextmanager
def _streamed(client: Any, url: str, headers: Headers) -> Iterator[Any]:
    limits = (READ_SECONDS, CONNECT_SECONDS)
    timeout = dict(zip(("timeout", "connect"), limits, strict=True))
    made = type(client.timeout)(**timeout)
    with client.stream("GET", url, headers=dict(headers), timeout=made, follow_redirects=False) as answer:
        yield answer


@contextmanager
def _failures_told() -> Iterator[None]:
    """What the client raises, as `Again` where another try may succeed. Its classes are told by name: which
    package they come from has changed, and will."""
    try:
        yield
    except Exception as error:
        names = {c.__name__ for c in type(error).__mro__}
        if "OfflineModeIsEnabled" in names:
            fail("download-failed", "expected to reach the network, found HF_HUB_OFFLINE set")
        if "UnsupportedProtocol" in names or "InvalidURL" in names or "LocalProtocolError" in names:
            fail("bad-input", f"expected an http address, found: {_first_line(error)}")
        if "TransportError" in names or "StreamError" in names:
            raise Again(_first_line(error)) from None
        raise


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(without_secrets(lines[0]) if lines else type(error).__name__, 200)
