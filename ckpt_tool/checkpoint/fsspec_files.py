"""Files of an object store, through fsspec: s3://, gs://, az:// and whatever else is installed for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from ckpt_tool.checkpoint.remote_file import Again, Served
from ckpt_tool.checkpoint.remote_path import without_secrets
from ckpt_tool.errors import fail, printable

DEPTH = 4  # folders below the one given
_VERSION = (
    "etag", "ETag", "md5Hash", "generation", "version", "checksum", "mtime", "LastModified", "updated",
    "last_modified", "created", "modified",
)  # fmt: skip


@dataclass
class StoredFile:
    """See `Served`. The version is what the store's own list says of the file."""

    store: Any
    path: str
    label: str
    size: int
    version: Mapping[str, str]

    @property
    def stamp(self) -> Mapping[str, Any]:
        return {"size": self.size, **self.version}

    def fetch(self, start: int, buffer: memoryview) -> Iterator[int]:
        try:
            data = self.store.cat_file(self.path, start=start, end=start + len(buffer))
        except FileNotFoundError:
            fail("input-changed", "expected the file as it was, found none", file=self.label)
        except PermissionError as error:
            fail("download-failed", f"expected to be allowed to read it, found: {error}", file=self.label)
        except Exception as error:  # each store raises its own
            raise Again(f"{type(error).__name__}: {printable(error, 200)}") from None
        if len(data) > len(buffer):
            found = f"{len(data)}: the store knows no ranges"
            fail("download-failed", f"expected {len(buffer)} bytes, found {found}", file=self.label)
        buffer[: len(data)] = data
        yield len(data)

    def check_unchanged(self) -> None:
        try:
            self.store.invalidate_cache()
            told = self.store.info(self.path)
        except FileNotFoundError:
            told = {"size": -1}
        except Exception as error:
            raise Again(f"{type(error).__name__}: {printable(error, 200)}") from None
        if (told["size"], _version(told)) != (self.size, self.version):
            fail(
                "input-changed",
                f"expected the file as it was ({self.size} bytes), found another ({told['size']} bytes)",
                file=self.label,
                hint="nothing else may write to the input while it is read",
            )


def _version(told: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(told[key]) for key in _VERSION if told.get(key) is not None}


def _stored(store: Any, path: str, label: str) -> Served:
    try:
        told = store.info(path)  # lists tell less of a file
    except Exception as error:
        _refuse(error, label)
    return StoredFile(store, path, label, int(told["size"]), _version(told))


def listing(address: str) -> tuple[dict[str, Callable[[], Served]], str | None]:
    """(the files at an address by name, the name of the one that it means, None where it means a folder)."""
    shown = without_secrets(address)
    try:
        import fsspec
    except ImportError:
        fail(
            "missing-package",
            "expected the package fsspec, found none",
            file=shown,
            hint="pip install 'ckpt-tool[remote]'",
        )
    try:
        store, root = fsspec.core.url_to_fs(address)
        told = store.info(root)
        single = told["type"] != "directory"
        folder = root.rpartition("/")[0] if single else root.rstrip("/")
        found = store.find(folder, maxdepth=1 if single else DEPTH, detail=True)
    except FileNotFoundError:
        fail("not-found", "expected a checkpoint, found nothing of that name", file=shown)
    except ImportError as error:  # of the package for this store
        scheme = address.partition("://")[0]
        fail(
            "missing-package",
            f"expected the package for {scheme}://, found none: {printable(error, 200)}",
            file=shown,
        )
    except Exception as error:  # each store raises its own
        _refuse(error, shown)
    files: dict[str, Callable[[], Served]] = {}
    for path, info in found.items():
        name = path.removeprefix(folder).lstrip("/")
        if info["type"] != "file" or any(p in ("", ".", "..") for p in name.split("/")):
            continue
        label = f"{shown.rpartition('/')[0] if single else shown}/{name}"
        files[name] = partial(_stored, store, path, label)
    return files, root.rpartition("/")[2] if single else None


def _refuse(error: Exception, shown: str) -> NoReturn:
    text = printable(error, 200) or type(error).__name__
    if isinstance(error, ValueError) and re.match("Protocol not known", str(error)):
        fail(
            "bad-input",
            "expected hf://, http(s):// or an address that fsspec knows, found another",
            file=shown,
        )
    fail("download-failed", f"expected the files there, found: {text}", file=shown)
