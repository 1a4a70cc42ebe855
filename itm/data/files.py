"""Files by URI: a local path, or any filesystem that pyarrow (s3, gs, hdfs) or fsspec knows."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

# A put to an object store shows nothing until it is complete, so the detour over a temporary name would only copy twice.
_ATOMIC_STORES = {"s3", "gcs", "abfs"}
_TEMPORARY = ".tmp-"


def resolve(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem and the path inside it. Raises ValueError for a scheme that neither pyarrow nor fsspec knows."""
    uri = str(uri)
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    try:
        return fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {uri}: {error}") from None
        return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def join(uri: str | Path, *names: str) -> str:
    """`uri/name/name`, whatever the scheme."""
    return "/".join([str(uri).rstrip("/") or "/", *names]).replace("//", "/", 1 if str(uri) == "/" else 0)


def name_of(uri: str | Path) -> str:
    """The last component of a URI."""
    return str(uri).rstrip("/").rsplit("/", 1)[-1]


def exists(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def size_of(uri: str | Path) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(f"no file at {uri}")
    return int(info.size)


def read_bytes(uri: str | Path) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as stream:
        return stream.read()


def read_span(uri: str | Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file in one range read."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as stream:
        return stream.read_at(end - start, start)


def list_files(uri: str | Path, suffix: str = "") -> list[str]:
    """URIs of the files right inside a folder, sorted; half-written files are left out. A missing folder is empty."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = [i.base_name for i in infos if i.type == fs.FileType.File and _TEMPORARY not in i.base_name]
    return [join(uri, name) for name in sorted(names) if name.endswith(suffix)]


def list_folders(uri: str | Path) -> list[str]:
    """URIs of the folders right inside a folder, sorted."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [join(uri, i.base_name) for i in sorted(infos, key=lambda i: i.base_name) if i.type == fs.FileType.Directory]


@contextlib.contextmanager
def atomic_stream(uri: str | Path) -> Iterator[Any]:
    """A binary stream whose file appears under its name only when the block ends without an error."""
    filesystem, path = resolve(uri)
    make_parent(uri)
    target = path if filesystem.type_name in _ATOMIC_STORES else f"{path}{_TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        with filesystem.open_output_stream(target) as stream:
            yield stream
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(target)
        raise
    if target != path:
        filesystem.move(target, path)


def write_atomic(uri: str | Path, data: bytes) -> None:
    """Write a whole file: temporary name, then move."""
    with atomic_stream(uri) as stream:
        stream.write(data)


def make_parent(uri: str | Path) -> None:
    filesystem, path = resolve(uri)
    if filesystem.type_name not in _ATOMIC_STORES and "/" in path:
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)


def delete(uri: str | Path) -> None:
    """Delete a file that exists."""
    filesystem, path = resolve(uri)
    filesystem.delete_file(path)


def check_writable(uri: str | Path) -> None:
    """Raise ValueError now, not after an hour of work, when nothing can be written below `uri`."""
    probe = join(uri, f"write-check{_TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        write_atomic(probe, b"")
        delete(probe)
    except OSError as error:
        raise ValueError(f"cannot write below {uri}: {error}; choose another folder or mend its permissions") from None


def local_copy(uri: str | Path) -> Path:
    """A local folder (or file) with the content of `uri`: itself when local, else a fresh temporary copy."""
    filesystem, path = resolve(uri)
    if filesystem.type_name == "local":
        if not os.path.exists(path):
            raise FileNotFoundError(f"nothing at {uri}")
        return Path(path)
    target = Path(tempfile.mkdtemp(prefix="itm-")) / name_of(path)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        target.mkdir()
    fs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
    return target
