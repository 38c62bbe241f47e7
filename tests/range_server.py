"""A small HTTP server on 127.0.0.1 that knows ranges, redirects, pages that list files, and as much of the
Hub's API as reading and committing take. What it answers wrongly is planted with `fault`.

    python tests/range_server.py FOLDER     # serves the repositories FOLDER/org/name; prints its address
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (
    100_000  # bytes from which on a file is kept as the Hub keeps weights: elsewhere, named by its SHA-256
)
BLOCK = 1 << 20


@dataclass
class Seen:
    """A request, listed before anything is answered, and how many bytes of body went out so far."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0


@dataclass
class State:
    """`root/org/name` are repositories of one commit, `root/files` lies open. `faults` are answers planted
    for paths that contain a text, each for a number of times; `speed` is bytes a second, `delay` the seconds
    before an answer."""

    root: Path
    address: str = ""
    elsewhere: str = ""  # the address that large files are served from
    seen: list[Seen] = field(default_factory=list)
    faults: list[list[object]] = field(default_factory=list)
    digests: dict[Path, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    head: str = COMMIT
    uploads: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    keep: bool = True  # what is uploaded; else only counted
    commits: list[list[dict[str, object]]] = field(default_factory=list)
    created: list[dict[str, object]] = field(default_factory=list)
    token: str | None = None  # that is asked for
    lists: bool = True  # what lies in open folders
    delay: float = 0
    speed: float = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)  # a stalled answer waits for that

    def fault(self, kind: str, path: str = "", times: int = 1) -> None:
        self.faults.append([kind, path, times])

    def planted(self, path: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                kind, part, times = fault
                assert isinstance(times, int)
                if times and str(part) in path:
                    fault[2] = times - 1
                    return str(kind)
        return None

    def sha256(self, path: Path) -> str:
        if path not in self.digests:
            with open(path, "rb") as file:
                self.digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.digests[path]

    @property
    def sent(self) -> int:
        return sum(s.sent for s in self.seen)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _tree_entry(told: dict[str, Any]) -> dict[str, Any]:
    """A file as the list of a tree has it."""
    made = {"type": "file", "path": told["rfilename"], "size": told["size"], "oid": told["blobId"]}
    if "lfs" in told:
        made["lfs"] = {**told["lfs"], "oid": told["lfs"]["sha256"]}
    return made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        return None

    def parse_request(self) -> bool:
        """Who has an answer finds its request in `state.seen`."""
        if not super().parse_request():
            return False
        told = self.headers
        self.asked = Seen(self.command, self.path, told.get("range"), told.get("authorization"))
        with self.state.lock:
            self.state.seen.append(self.asked)
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        state, self.fault = self.state, self.state.planted(path)
        if state.delay:
            time.sleep(state.delay)
        if self.fault is not None and self.fault.isdigit():
            return self.answer(int(self.fault), b"", {"retry-after": "0"} if self.fault == "429" else {})
        if self.fault == "redirect-file":
            return self.answer(302, b"", {"location": "file:///etc/passwd"})
        if self.fault == "moved":
            return self.answer(302, b"", {"location": "/" + "/".join(["files", "moved", *parts[1:], ""])})
        if self.fault == "redirect-loop":
            return self.answer(302, b"", {"location": self.path})
        if parts[0] == "api":
            return self.api(parts[1:])
        if parts[0] == "cdn":
            digest = parts[1]
            found = next((p for p, d in state.digests.items() if d == digest), None)
            return self.file(found) if found else self.answer(404, b"")
        if parts[0] == "files":
            return self.open_folder(state.root / "/".join(parts))
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve(state.root / parts[0] / parts[1], "/".join(parts[4:]))
        return self.answer(404, b"")

    # --- reading ---

    def allowed(self) -> bool:
        state = self.state
        if state.token is None or self.headers.get("authorization") == f"Bearer {state.token}":
            return True
        self.answer(
            401, b"", {"x-error-code": "RepoNotFound", "x-error-message": "Invalid username or password."}
        )
        return False

    def api(self, parts: list[str]) -> None:
        """GET /api/models/org/name[/revision/REV]"""
        if not self.allowed():
            return
        if parts == ["whoami-v2"]:
            return self.json({"name": "me", "type": "user"})
        repo, revision = "/".join(parts[1:3]), parts[4] if len(parts) > 4 else "main"
        folder = self.state.root / repo
        if not folder.is_dir():
            return self.answer(404, b"", {"x-error-code": "RepoNotFound"})
        commit = self.state.refs.get(revision, revision if revision == self.state.head else None)
        if commit is None:
            return self.answer(404, b"", {"x-error-code": "RevisionNotFound"})
        siblings = list(self.siblings(folder))
        if parts[3:4] == ["tree"]:
            return self.json([_tree_entry(s) for s in siblings])
        self.json({"id": repo, "sha": commit, "siblings": siblings})

    def siblings(self, folder: Path) -> Iterator[dict[str, object]]:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            size = path.stat().st_size
            told = {"rfilename": path.relative_to(folder).as_posix(), "size": size}
            if size >= LARGE:
                lfs = {"sha256": self.state.sha256(path), "size": size, "pointerSize": 130}
                yield {**told, "blobId": "0" * 40, "lfs": lfs}
            else:
                yield {**told, "blobId": git_sha1(path.read_bytes())}

    def resolve(self, folder: Path, name: str) -> None:
        path = folder / name
        if not self.allowed():
            return
        if not path.is_file():
            return self.answer(404, b"", {"x-error-code": "EntryNotFound"})
        commit = {"x-repo-commit": self.state.head}
        if path.stat().st_size < LARGE:
            return self.file(path, {**commit, "etag": f'"{git_sha1(path.read_bytes())}"'})
        digest = self.state.sha256(path)
        linked = {"x-linked-etag": f'"{digest}"', "x-linked-size": str(path.stat().st_size)}
        where = f"{self.state.elsewhere}/cdn/{digest}?signature=secret"
        self.answer(302, b"", {**commit, **linked, "location": where})

    def open_folder(self, path: Path) -> None:
        if path.is_dir():
            if not self.path.endswith("/"):
                return self.answer(301, b"", {"location": self.path + "/"})
            if not self.state.lists:
                return self.answer(403, b"")
            names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
            text = "".join(f'<li><a href="{n}">{n}</a></li>' for n in ["../", *names])
            return self.answer(
                200, f"<html>{text}</html>".encode(), {"content-type": "text/html; charset=utf-8"}
            )
        if not path.is_file():
            return self.answer(404, b"")
        return self.file(path)

    def file(self, path: Path, headers: dict[str, str] | None = None) -> None:
        size, asked = path.stat().st_size, self.headers.get("range")
        told = {"etag": f'"{self.state.sha256(path)}"', "accept-ranges": "bytes", **(headers or {})}
        if self.fault == "unversioned":
            del told["etag"]
        if self.fault == "gzip":
            told["content-encoding"] = "gzip"
        if self.fault == "etag":
            told["etag"] = '"another"'
        start, stop, status = 0, size, 200
        if asked is not None and self.fault != "ignore-range":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last or size - 1) + 1, size), 206
            if start >= size:
                return self.answer(416, b"", {"content-range": f"bytes */{size}"})
            told["content-range"] = f"bytes {start}-{stop - 1}/{size}"
            if self.fault == "other-range":
                told["content-range"] = f"bytes {start + 1}-{stop}/{size}"
        self.begin(status, stop - start, told)
        if self.command == "HEAD":
            return
        end = stop
        if self.fault in ("cut", "short"):
            end = start + (stop - start) // 2
            self.close_connection = True
        if self.fault == "stall":
            self.state.ended.wait(600)
        self.body(path, start, end)

    def body(self, path: Path, start: int, end: int) -> None:
        sent, began = 0, time.monotonic()
        with open(path, "rb", buffering=0) as file:
            while start + sent < end:
                if self.state.speed:
                    time.sleep(max(0.0, sent / self.state.speed - (time.monotonic() - began)))
                try:
                    part = min(BLOCK, end - start - sent)
                    self.asked.sent = sent + part  # before it may have arrived
                    sent += os.sendfile(self.connection.fileno(), file.fileno(), start + sent, part)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                    break
        self.asked.sent = sent

    # --- writing ---

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.rfile.read(int(self.headers.get("content-length", "0")))
        self.fault = self.state.planted(path)
        if self.fault is not None and self.fault.isdigit():
            return self.answer(int(self.fault), b"{}", {"x-error-message": "planted"})
        if not self.allowed():
            return
        if path == "/api/repos/create":
            asked = json.loads(data)
            self.state.created.append(asked)
            (self.state.root / asked.get("organization", "me") / asked["name"]).mkdir(parents=True)
            return self.json(
                {"url": f"http://{self.headers['host']}/{asked.get('organization')}/{asked['name']}"}
            )
        if "/preupload/" in path:
            files = json.loads(data)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular",
                      "shouldIgnore": False, "oid": None} for f in files]  # fmt: skip
            return self.json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(data)["objects"]:
                href = f"http://{self.headers['host']}/upload/{wanted['oid']}"
                known = wanted["oid"] in self.state.uploads
                objects.append({**wanted, **({} if known else {"actions": {"upload": {"href": href}}})})
            return self.json({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(path, [json.loads(line) for line in data.splitlines()])
        return self.answer(404, b"")

    def commit(self, path: str, lines: list[dict[str, dict[str, str]]]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != self.state.head:
            return self.answer(412, b"{}", {"x-error-message": "A commit has happened since"})
        folder = self.state.root.joinpath(*path.split("/")[3:5])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":  # type: ignore[comparison-overlap]
                (folder / value["path"]).unlink()
                continue
            content = self.state.uploads.get(value.get("oid", ""), b"")
            if line["key"] == "file":  # type: ignore[comparison-overlap]
                content = base64.b64decode(value["content"])
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        self.state.commits.append(lines)  # type: ignore[arg-type]
        self.state.digests.clear()
        self.state.head = hashlib.sha1(self.state.head.encode(), usedforsecurity=False).hexdigest()
        self.state.refs["main"] = self.state.head
        url = f"http://{self.headers['host']}/{folder.parent.name}/{folder.name}/commit/{self.state.head}"
        self.json({"commitUrl": url, "commitOid": self.state.head, "success": True})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", "0")))
        self.fault = self.state.planted(self.path)
        if self.fault is not None and self.fault.isdigit():
            return self.answer(int(self.fault), b"")
        self.state.uploads[self.path.rpartition("/")[2]] = data if self.state.keep else b""
        self.answer(200, b"")

    # --- answers ---

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.begin(status, len(body), headers or {})
        if self.command != "HEAD":
            self.asked.sent = len(body)
            self.wfile.write(body)

    def begin(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "content-length": str(size)}.items():
            self.send_header(key, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that went away."""


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, State]]:
    """(address, state) of a server whose large files are served from another port: another origin."""
    state = State(root)
    made = type("Bound", (Handler,), {"state": state})
    servers = [Server(("127.0.0.1", 0), made) for _ in range(2)]
    first, second = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    state.address, state.elsewhere = first, second
    threads = [threading.Thread(target=s.serve_forever, args=(0.01,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield first, state
    finally:
        state.ended.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


if __name__ == "__main__":
    with serving(Path(sys.argv[1])) as (address, serving_state):
        print(address, flush=True)
        for line in sys.stdin:  # a line asks for the counts since the last one, of the form DELAY SPEED
            delay, speed = map(float, line.split())
            counts = {"requests": len(serving_state.seen), "sent": serving_state.sent}
            serving_state.seen.clear()
            serving_state.delay, serving_state.speed = delay, speed
            print(json.dumps(counts), flush=True)
