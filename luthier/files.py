"""Writing so that a reader never sees half of anything.

A folder is written under a temporary name, each file is flushed to disk, a manifest of sizes and
hashes is written last, then the folder is renamed. A crash at any moment leaves either the old state
or the new one; leftovers are recognised by their name and removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from luthier.errors import Refused, Unwritten

MANIFEST = "manifest.json"
Entry = dict[str, Any]  # what a manifest says of a file: size and sha256
PARTIAL = ".partial-"  # prefix of a folder that is being written


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_handle(handle: IO[Any]) -> None:
    """Flush an open file to disk."""
    handle.flush()
    os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (temporary file, fsync, rename)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (temporary file, fsync, rename)."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            sync_handle(handle)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise failed(path, error) from error


@contextmanager
def publish(folder: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `folder`, replacing an older one.

    On any error the temporary folder is removed and `folder` is as it was.
    """
    partial = partial_of(folder)
    try:
        begin(folder)
        yield partial
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        entries = {str(p.relative_to(partial)): flushed(p) for p in files}
        finish(folder, entries if manifest else None)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise failed(folder, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(folder: Path, by: str = "") -> Path:
    """The temporary name of `folder` while it is written; `by` tells those apart who write it at the same time."""
    return folder.with_name(f"{PARTIAL}{by}{folder.name}")


def begin(folder: Path, by: str = "") -> Path:
    """Make the empty temporary folder of `folder`. Raises OSError."""
    partial = partial_of(folder, by)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def flushed(path: Path) -> Entry:
    """Flush a file that was written; its size and hash."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def finish(folder: Path, entries: Mapping[str, Entry] | None, by: str = "") -> None:
    """Give the temporary folder, all of whose files are flushed, its manifest and its name. Raises OSError."""
    partial = partial_of(folder, by)
    if entries is not None:
        write_json(partial / MANIFEST, {"format": 1, "files": dict(sorted(entries.items()))})
    for path in sorted(p for p in partial.rglob("*") if p.is_dir()):
        sync(path)
    sync(partial)
    old = folder.with_name(f"{PARTIAL}{by}old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(asked: str, folder: Path) -> None:
    """Refuse unless files can be made in `folder`; where it does not exist, in its nearest parent.

    Tried with a file that has no name, so nothing is left behind.
    """
    place = folder.absolute()
    while not os.path.exists(place):  # noqa: PTH110 (Path.exists raises where a parent is closed)
        place = place.parent
    if not place.is_dir():
        raise Refused(asked, f"{place} is a file", "name a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise Refused(
            asked, f"nothing can be written in {place}: {error.strerror}", "name another place"
        ) from error


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """Why `folder` is not whole by its manifest, or None when it is."""
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
        if hashes and sha256(file) != entry["sha256"]:
            return f"{name} was altered (its SHA-256 differs)"
    return None


def failed(path: Path, error: OSError) -> Unwritten:
    """What a user is told when writing `path` failed."""
    return Unwritten(
        f"writing {path}",
        f"{error.strerror or error} ({type(error).__name__}); what was saved before is untouched",
        "free space or give another output, then go on with checkpoint.resume=auto",
    )
