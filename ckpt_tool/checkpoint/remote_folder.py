"""A list of files that somebody serves, as a folder; and the addresses of them that are no repository of the
Hub: http(s), and whatever fsspec knows (s3, gs, az, ...)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from shlex import quote
from urllib.parse import quote as quoted
from urllib.parse import unquote, urljoin, urlsplit

from ckpt_tool.checkpoint.folders import Folder, Place
from ckpt_tool.checkpoint.http_ranges import HttpFile
from ckpt_tool.checkpoint.no_weights import Around
from ckpt_tool.checkpoint.remote_file import Fetcher, RemoteFile, Served
from ckpt_tool.checkpoint.remote_path import RemotePath, scheme_of, without_secrets
from ckpt_tool.checkpoint.weight_sets import ORIGINAL_FOLDER, TEMPLATE_FOLDER
from ckpt_tool.errors import CkptToolError, fail

PAGES = 64  # lists of files that are asked for, one for each folder
PAGE_BYTES = 4 << 20
DEPTH = 3
SHARDS = 10_000  # that a name may speak of
# What stands beside weights, asked for one by one where a server does not list its files.
PROBED = (
    "config.json", "params.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json",
    "tokenizer.model.v3", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json",
)  # fmt: skip
UNLISTED = "the server lists no files: what stands beside {} was looked for by its usual names"
_SHARD = re.compile(r"(.*?)(\d{1,6})(-of-)(\d{1,5})(\D*)", re.ASCII)
_RANK = re.compile(r"(consolidated\.)(\d{2})(\.pth?)", re.ASCII)
_NONE = (400, 401, 403, 404, 410)  # what stores say of a name that is not there
_HUB_PAGE = re.compile(
    r"/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+).*)?/?", re.ASCII
)


class RemoteFolder(Folder):
    """Files by name; each is asked for when it is first wanted."""

    def __init__(
        self,
        address: str,
        files: Mapping[str, Callable[[], Served]],
        fetcher: Fetcher,
        *,
        around: Around | None = None,
        digests: Mapping[str, str] | None = None,
        local: Mapping[str, Place] | None = None,
    ) -> None:
        """`local` are files of it that this machine holds already."""
        shown = without_secrets(address).rstrip("/")
        self.label = shown.rpartition("/")[2] or shown
        self.path, self.fetcher = RemotePath.to(shown), fetcher
        self.around = around or Around(
            shown, self.label, lambda sub: f"--in {quote(f'{shown}/{sub}')}", lambda sub: quote(shown)
        )
        self.notes: list[str] = []
        self._files, self._digests = files, digests or {}
        self._places = dict(local or {})

    def names(self) -> list[str]:
        inner = (ORIGINAL_FOLDER, TEMPLATE_FOLDER)
        return [n for n in self.survey() if "/" not in n or (n.startswith(inner) and n.count("/") == 1)]

    def below(self, enter: Callable[[str], bool], depth: int = 2) -> list[str]:
        return [
            n
            for n in self.survey()
            if 0 < n.count("/") <= depth and all(map(enter, n.split("/")[:-1]))
        ]  # fmt: skip

    def survey(self) -> list[str]:
        return sorted({*self._files, *self._places})

    def place(self, name: str) -> Place:
        if name not in self._places:
            if name not in self._files:
                fail("not-found", "expected a checkpoint, found nothing of that name", file=name)
            served = self._files[name]()
            remote = RemoteFile(served, self.fetcher, self._digests.get(name))
            path = RemotePath.to(f"{self.path}/{name}", remote)
            self._places[name] = Place(path, served.size, (0, served.size))
        return self._places[name]

    def close(self) -> None:
        self.fetcher.stop()


def open_folder(address: str) -> tuple[RemoteFolder, str | None]:
    """(the files at an address, the name of the one that it means, None where it means all)."""
    if "::" in address:
        fail("bad-input", "expected one address, found several joined by ::", file=without_secrets(address))
    if scheme_of(address) in ("http", "https"):
        return _open_http(address)
    from ckpt_tool.checkpoint.fsspec_files import listing

    files, single = listing(address)
    return RemoteFolder(address.rpartition("/")[0] if single else address, files, Fetcher()), single


# --- http(s) --------------------------------------------------------------------------------------------


def _open_http(address: str) -> tuple[RemoteFolder, str | None]:
    parts = urlsplit(address)
    _not_of_the_hub(address)
    fetcher = Fetcher()
    if not parts.path.endswith("/") and parts.path:
        first = _learnt(address, fetcher)
        if not first.kind.startswith("text/html"):
            name = unquote(parts.path.rpartition("/")[2])
            folder = urljoin(address, ".")
            others, notes = _beside(folder, name, fetcher) if not parts.query else ({}, [])
            found = RemoteFolder(folder, {**others, name: lambda: first}, fetcher)
            found.notes += notes
            return found, name
        address += "/"
    return RemoteFolder(address, _listed(address, fetcher), fetcher), None


def _not_of_the_hub(address: str) -> None:
    parts = urlsplit(address)
    page = _HUB_PAGE.fullmatch(parts.path)
    if parts.hostname in ("huggingface.co", "www.huggingface.co", "hf.co") and page is not None:
        revision = f"@{page['revision']}" if page["revision"] else ""
        fail(
            "bad-input",
            "expected the files of a model, found a page of the Hub",
            file=without_secrets(address),
            hint=f"hf://{page['repo']}{revision} is that repository",
        )


def _learnt(address: str, fetcher: Fetcher) -> HttpFile:
    """The file at an address, its size and version known."""
    file = HttpFile(address, without_secrets(address))
    fetcher.patiently(file.label, file.learn)
    return file


def _beside(folder: str, name: str, fetcher: Fetcher) -> tuple[dict[str, Callable[[], Served]], list[str]]:
    """What stands beside a file: as the folder's page lists it, else what is found by its usual name, and a
    note that says so. Of a numbered file the others are there, or asking for them says what is not."""
    try:
        return _listed(folder, fetcher), []
    except CkptToolError:
        found: dict[str, Callable[[], Served]] = {}
    for usual in PROBED:
        if (file := _there(urljoin(folder, usual), fetcher)) is not None:
            found[usual] = lambda file=file: file  # type: ignore[misc]
    if (shard := _SHARD.fullmatch(name)) and int(shard[4]) <= SHARDS:
        start, number, of, total, end = shard.groups()
        first = 0 if int(number) == 0 else 1
        for k in range(first, first + int(total)):
            other = f"{start}{k:0{len(number)}}{of}{total}{end}"
            found[other] = lambda other=other: _learnt(urljoin(folder, quoted(other)), fetcher)  # type: ignore[misc]
    if rank := _RANK.fullmatch(name):
        for k in range(100):
            other = f"{rank[1]}{k:02}{rank[3]}"
            if other != name and (file := _there(urljoin(folder, other), fetcher)) is None:
                break
            if other != name:
                found[other] = lambda file=file: file  # type: ignore[misc]
    return found, [UNLISTED.format(name)]


def _there(address: str, fetcher: Fetcher) -> HttpFile | None:
    """The file at an address, if there is one; a server that fails does not say that there is none."""
    file = HttpFile(address, without_secrets(address))
    try:
        fetcher.patiently(file.label, file.learn)
    except CkptToolError:
        if file.refused not in _NONE:
            raise
        return None
    return None if file.kind.startswith("text/html") else file


def _listed(folder: str, fetcher: Fetcher) -> dict[str, Callable[[], Served]]:
    """The files that a page lists, and those of the folders that it lists."""
    found: dict[str, Callable[[], Served]] = {}
    level, pages = [("", folder)], 0
    for _ in range(DEPTH):
        deeper: list[tuple[str, str]] = []
        for inside, page in level:
            if (pages := pages + 1) > PAGES:
                return found
            for name, link in _links(page, fetcher):
                if name.endswith("/"):
                    deeper.append((inside + name, link))
                else:
                    found[inside + name] = lambda link=link: _learnt(link, fetcher)  # type: ignore[misc]
        level = deeper
    return found


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _links(page: str, fetcher: Fetcher) -> list[tuple[str, str]]:
    """(name, address) of what is directly below `page`, or where redirects led from it, and linked to."""
    served = HttpFile(page, without_secrets(page))
    texts: list[str] = []
    fetcher.patiently(served.label, lambda: texts.append(served.page(PAGE_BYTES)))
    anchors = _Anchors()
    anchors.feed(texts[0])
    inside, base = [], urljoin(served.place, ".")
    for target in anchors.targets:
        there = urljoin(base, target)
        rest = there.removeprefix(base)
        if there.startswith(base) and rest and "/" not in rest[:-1] and not set(rest) & {"?", "#"}:
            name = unquote(rest.rstrip("/"))
            if name not in ("", ".", "..") and "/" not in name and name.isprintable():
                inside.append((name + "/" * rest.endswith("/"), there))
    return list(dict.fromkeys(inside))
