"""Files by URI: a local path, or any filesystem that pyarrow (s3, gs, hdfs) or fsspec knows.

An S3 store other than Amazon's is named by AWS_ENDPOINT_URL, its keys by the usual AWS variables: URIs stay `s3://bucket/...`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from itm.data.patience import Refused, StoreGone
from itm.data.remote import Remote, RemoteFile, open_remote

# A put to an object store shows nothing until it is complete, so the detour over a temporary name would only copy twice.
_ATOMIC_STORES = {"s3", "gcs", "abfs"}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TEMPORARY = ".tmp-"
_WRITER = re.compile(re.escape(_TEMPORARY) + r"(?P<host>(?:(?!\.tmp-).)*)-(?P<pid>\d+)-[0-9a-f]{8}$")
_ABANDONED = 3600.0  # seconds after which a half-written file of another machine is nobody's
_SPOOL = 64 << 20  # bytes of an upload that are held in memory
_COPIES = 8  # files of a folder that are copied at a time
_COPIED = 16 << 20  # bytes of a file that are asked for at a time


def is_remote(uri: str | Path) -> bool:
    """Whether a URI names a scheme other than `file`."""
    return _SCHEME.match(str(uri)) is not None and not str(uri).startswith("file:")


def absolute(uri: str | Path) -> str:
    """The one rule for every path that a person writes: what processes with another working directory can read as well.

    A local path, relative or with `~` in front, and a `file://` URI become an absolute path without `.` and `..`; a URI of another scheme
    stays as it is. Raises ValueError for a `file://` URI of another machine.
    """
    uri = str(uri)
    if is_remote(uri):
        return uri
    if _SCHEME.match(uri):
        place = urlsplit(uri)
        if place.netloc not in ("", "localhost"):
            raise ValueError(f"{uri} names a file of the machine {place.netloc!r}; say file:///absolute/path, or a plain path")
        return os.path.abspath(unquote(uri.removeprefix("file://").removeprefix(place.netloc)))
    return os.path.abspath(os.path.expanduser(uri))


def resolve(uri: str | Path) -> tuple[fs.LocalFileSystem | Remote, str]:
    """The filesystem and the path inside it. Raises ValueError for a scheme that neither pyarrow nor fsspec knows."""
    uri = absolute(uri)
    if not is_remote(uri):
        return fs.LocalFileSystem(), uri
    return open_remote(uri)


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


def modified(uri: str | Path) -> float:
    """When a file was last written, in seconds by the clock of its store. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(f"no file at {uri}")
    return _time(info)


def read_bytes(uri: str | Path) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    with open_file(uri) as stream:
        return stream.read()


def read_view(uri: str | Path) -> memoryview:
    """The whole file, for large ones: Arrow's memory is used again, fresh memory would cost five times as much as filling it."""
    with open_file(uri) as stream:
        return memoryview(stream.read_buffer())


def open_file(uri: str | Path) -> pa.NativeFile | RemoteFile:
    """A file for reads at positions, by any number of threads. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    return filesystem.open_input_file(path)


def read_span(uri: str | Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file in one range read."""
    with open_file(uri) as stream:
        return stream.read_at(end - start, start)


def list_files(uri: str | Path, suffix: str = "") -> list[str]:
    """URIs of the files right inside a folder, sorted; half-written files are left out. A missing folder is empty."""
    return [join(uri, name) for name in sorted(sizes(uri, suffix))]


def sizes(uri: str | Path, suffix: str = "") -> dict[str, int]:
    """Name -> bytes of the files right inside a folder, in one listing; half-written files are left out. A missing folder is empty."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    files = {i.base_name: int(i.size) for i in infos if i.type == fs.FileType.File}
    return {name: size for name, size in files.items() if name.endswith(suffix) and _TEMPORARY not in name}


def walk(uri: str | Path) -> dict[str, int]:
    """Name below a folder (`sub/name`) -> bytes of every file in it and its folders, sorted by name; half-written files are left out.

    A link that leads nowhere has 0 bytes. A missing folder is empty.
    """
    filesystem, path = resolve(uri)
    if filesystem.type_name == "local":
        found = _walk_local(path)
    else:
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        start = len(path.rstrip("/")) + 1
        found = {i.path[start:]: int(i.size) for i in infos if i.type == fs.FileType.File}
    return {name: found[name] for name in sorted(found) if _TEMPORARY not in name}


def _walk_local(path: str) -> dict[str, int]:
    """Links to folders are followed, each folder once."""
    found: dict[str, int] = {}
    seen: set[str] = set()
    for folder, below, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        for name in names:
            place = os.path.join(folder, name)
            if os.path.isfile(place) or not os.path.exists(place):
                found[os.path.relpath(place, path)] = os.path.getsize(place) if os.path.exists(place) else 0
    return found


def is_folder(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def check_store(uri: str | Path) -> None:
    """Raises ValueError when a URI names a bucket that is not there: a listing of it is as empty as that of a missing folder."""
    filesystem, path = resolve(uri)
    bucket = path.partition("/")[0]
    if isinstance(filesystem, Remote) and filesystem.type_name == "s3" and filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
        place = os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
        raise ValueError(f"{uri}: there is no bucket {bucket!r} at {place}: mend the name, or AWS_ENDPOINT_URL, or make the bucket")


def list_folders(uri: str | Path) -> list[str]:
    """URIs of the folders right inside a folder, sorted."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    folders = [i.base_name for i in infos if i.type == fs.FileType.Directory and _TEMPORARY not in i.base_name]
    return [join(uri, name) for name in sorted(folders)]


@contextlib.contextmanager
def atomic_stream(uri: str | Path) -> Iterator[Any]:
    """A binary stream whose file appears under its name only when the block ends without an error.

    Raises OSError naming the file when it cannot be written (a full disk, a store that refuses); what was there before stays whole.
    """
    filesystem, path = resolve(uri)
    with _named(uri):
        make_parent(uri)
    if isinstance(filesystem, Remote):
        with _uploaded(filesystem, path, uri) as stream:
            yield stream
        return
    target = temporary(path)
    try:
        with _named(uri):
            stream = filesystem.open_output_stream(target)
        try:
            yield _Writing(stream, uri)
        finally:
            with _named(uri):
                stream.close()
        with _named(uri):
            filesystem.move(target, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(target)
        raise


@contextlib.contextmanager
def _uploaded(remote: Remote, path: str, uri: str | Path) -> Iterator[_Writing]:
    """A stream that is sent to `path` when the block has ended: what is kept till then can be sent again, and nobody sees half of it."""
    with tempfile.SpooledTemporaryFile(_SPOOL) as spool:
        yield _Writing(spool, uri)
        target = path if remote.type_name in _ATOMIC_STORES else temporary(path)
        try:
            with _named(uri):
                remote.upload(spool, target)
                if target != path:
                    remote.move(target, path)
        except BaseException:
            if target != path:
                with contextlib.suppress(OSError):
                    remote.delete_file(target)
            raise


def temporary(name: str) -> str:
    """A name for what will be called `name` when it is whole; it tells who writes it, for `remove_abandoned`."""
    return f"{name}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class _Writing(io.RawIOBase):
    """The write end of a stream, whose errors name its file; those of what feeds it stay as they are."""

    def __init__(self, stream: Any, uri: str | Path) -> None:
        super().__init__()
        self.stream, self.uri = stream, uri

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with _named(self.uri):
            self.stream.write(data)
        return len(data)


@contextlib.contextmanager
def _named(uri: str | Path) -> Iterator[None]:
    """An OSError of this block says which file it was about."""
    try:
        yield
    except OSError as error:
        if str(uri) in str(error):
            raise
        named = type(error)(f"cannot write {uri}: {error}")
        named.errno = error.errno
        raise named from None


def remove_abandoned(folder: str | Path) -> list[str]:
    """Delete the half-written files and folders right inside a folder whose writer is dead; returns their URIs.

    Dead: a process of this machine that is gone, or, of another machine, one that has not written for an hour by the clock of
    the store itself. Stores whose uploads are atomic have none.
    """
    filesystem, path = resolve(folder)
    if filesystem.type_name in _ATOMIC_STORES:
        return []
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    halves = [(i, m) for i in found if (m := _WRITER.search(i.base_name))]
    if not halves:
        return []
    now = clock_of(folder)
    dead = [i for i, m in halves if not _alive(m["host"], int(m["pid"]), now - _time(i))]
    for info in dead:
        with contextlib.suppress(FileNotFoundError):
            (filesystem.delete_dir if info.type == fs.FileType.Directory else filesystem.delete_file)(info.path)
    return [join(folder, info.base_name) for info in dead]


def _alive(host: str, pid: int, silent: float) -> bool:
    if host != socket.gethostname():
        return silent <= _ABANDONED
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def clock_of(folder: str | Path) -> float:
    """The time that a file written now is stamped with: machines that share a store may disagree on the time."""
    probe = join(folder, temporary("clock"))
    write_atomic(probe, b"")
    stamped = modified(probe)
    delete(probe)
    return stamped


def _time(info: fs.FileInfo) -> float:
    return float(info.mtime_ns or 0) / 1e9


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A lock on a local folder itself, so that no lock file stays behind. Some network file systems lock no folders: there nobody waits."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
    """Raise ValueError now, not after an hour of work, when nothing can be written below `uri`. What dead writers left there goes."""
    probe = join(uri, temporary("write-check"))
    try:
        if is_remote(uri):
            sizes(probe)  # a question is sooner answered than an upload, and refused with a reason, which `exists` is not
        remove_abandoned(uri)
        write_atomic(probe, b"")
        delete(probe)
    except (StoreGone, Refused) as error:
        raise ValueError(f"cannot write below {uri}: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot write below {uri}: {error}; choose another folder or mend its permissions") from None


@contextlib.contextmanager
def local_copy(uri: str | Path) -> Iterator[Path]:
    """A local folder (or file) with the content of `uri`: itself when local, else a temporary copy, gone when the block ends."""
    filesystem, path = resolve(uri)
    if filesystem.type_name == "local":
        if not os.path.exists(path):
            raise FileNotFoundError(f"nothing at {uri}")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="itm-") as folder:
        target = Path(folder) / name_of(path)
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            _copy_folder(filesystem, path, target)
        else:
            _copy_file(filesystem, path, target)
        yield target


def _copy_folder(remote: Remote, path: str, target: Path) -> None:
    """Everything below a folder of a store, some files at a time."""
    start = len(path.rstrip("/")) + 1
    found = remote.get_file_info(fs.FileSelector(path, recursive=True))
    for folder in [target, *(target / i.path[start:] for i in found if i.type == fs.FileType.Directory)]:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_COPIES) as pool:
        copies = [pool.submit(_copy_file, remote, i.path, target / i.path[start:]) for i in found if i.type == fs.FileType.File]
        for copy in copies:
            copy.result()


def _copy_file(remote: Remote, path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with remote.open_input_file(path) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _COPIED)
