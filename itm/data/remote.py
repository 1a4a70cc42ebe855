"""A filesystem that is not this machine's own, asked again where it goes away for a while (`itm.data.patience`)."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any, TypeVar
from urllib.parse import urlparse

import pyarrow as pa
from pyarrow import fs

from itm.data.patience import asked

T = TypeVar("T")

_TRIES, _UPLOADS = 2, 5  # attempts of the S3 client itself: of one request, as an operation may take several; of a part of an upload
_CONNECT = 3  # seconds to connect
_CLIENT_SECONDS = 1  # of Google's client, in which it makes a request again itself


def open_remote(uri: str) -> tuple[Remote, str]:
    """The filesystem of a URI and the path inside it. Raises ValueError for a scheme that neither pyarrow nor fsspec knows."""
    filesystem, path = asked(lambda: _found(uri), uri, f"client of {store_of(uri)}")  # to make one is no answer of the store
    return Remote(filesystem, uri, path), path


def store_of(uri: str) -> str:
    """What answers or is gone as a whole: `s3://bucket`."""
    return "/".join(uri.split("/")[:3])


def _found(uri: str) -> tuple[fs.FileSystem, str]:
    if _plain_s3(uri):
        return _s3(*place_of(uri), _TRIES, _keys()), uri.removeprefix("s3://").rstrip("/")
    try:
        return fs.FileSystem.from_uri(_soon_tired(uri))
    except pa.ArrowInvalid:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {uri}: {error}") from None
        return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _soon_tired(uri: str) -> str:
    """Of Google's store: its client would make a request again for 15 minutes, unseen, unless the URI says another limit."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_CLIENT_SECONDS}"


def _plain_s3(uri: str) -> bool:
    """Whether a URI leaves the settings of its client to the environment."""
    return uri.startswith("s3://") and "?" not in uri and "@" not in uri


def place_of(uri: str) -> tuple[str, str | None]:
    """(bucket, endpoint of another store than Amazon's)."""
    return uri.split("/")[2], os.environ.get("AWS_ENDPOINT_URL")


def _keys() -> int:
    """Tells credentials that were renewed from those before."""
    return hash(tuple(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")))


@lru_cache(maxsize=16)
def _s3(bucket: str, endpoint: str | None, attempts: int, keys: int) -> fs.S3FileSystem:
    """One client a bucket and use: each holds its own connections, and the credentials of the environment when it was made."""
    given: dict[str, Any] = {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=attempts), "connect_timeout": _CONNECT}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        place = urlparse(endpoint)
        return fs.S3FileSystem(endpoint_override=place.netloc, scheme=place.scheme, region=region or "us-east-1", **given)
    return fs.S3FileSystem(region=region or _region(bucket), **given)


@lru_cache(maxsize=16)
def _region(bucket: str) -> str:
    """Finding it costs a request."""
    return str(fs.resolve_s3_region(bucket))


class Remote:
    """What `itm.data.files` asks of a filesystem, each of it as often as it takes. Equal to another door to the same filesystem."""

    def __init__(self, filesystem: fs.FileSystem, uri: str, path: str) -> None:
        """uri: any of this filesystem, and `path` the path inside it: messages name what they are about as the user wrote it."""
        self.filesystem, self.type_name = filesystem, str(filesystem.type_name)
        whole, inside = uri.rstrip("/"), path.rstrip("/")
        self._prefix = whole.removesuffix(inside) if whole.endswith(inside) else f"{uri.partition('://')[0]}://"
        self.store = store_of(uri)
        self._uploads = _s3(*place_of(uri), _UPLOADS, _keys()) if _plain_s3(uri) else filesystem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self.filesystem == other.filesystem)

    def __hash__(self) -> int:
        return hash(self.type_name)

    def _asked(self, ask: Callable[[], T], path: str) -> T:
        return asked(ask, self._prefix + path, self.store)

    def get_file_info(self, what: str | fs.FileSelector) -> Any:
        if not isinstance(what, str):
            return self._asked(lambda: self.filesystem.get_file_info(what), what.base_dir)

        def ask() -> fs.FileInfo:
            info = self.filesystem.get_file_info(what)
            if info.type == fs.FileType.File and not info.size:
                self._check_empty(what)
            return info

        return self._asked(ask, what)

    def _open(self, path: str) -> pa.NativeFile:
        file = self.filesystem.open_input_file(path)
        if not file.size():
            self._check_empty(path)
        return file

    def _check_empty(self, path: str) -> None:
        """An answer that breaks off in its header, before it tells the size, is taken for that of an empty object. A list tells the truth.

        Raises ConnectionError where it has another size.
        """
        if self.type_name != "s3":
            return
        beside = self.filesystem.get_file_info(fs.FileSelector(path.rpartition("/")[0], allow_not_found=True))
        if size := next((info.size for info in beside if info.path == path), 0):
            raise ConnectionError(f"the answer broke off: a size of 0 of {size:,} bytes")

    def open_input_file(self, path: str) -> RemoteFile:
        return RemoteFile(self, path)

    def upload(self, source: IO[bytes], path: str) -> None:
        """All of `source`, from its beginning; another attempt begins there again."""

        def put() -> None:
            source.seek(0)
            with self._uploads.open_output_stream(path) as stream:
                shutil.copyfileobj(source, stream, 1 << 20)

        self._asked(put, path)

    def create_dir(self, path: str, recursive: bool = True) -> None:
        self._asked(lambda: self.filesystem.create_dir(path, recursive=recursive), path)

    def delete_file(self, path: str) -> None:
        self._asked(_settled(lambda: self.filesystem.delete_file(path), lambda: not self._is_there(path)), path)

    def delete_dir(self, path: str) -> None:
        self._asked(_settled(lambda: self.filesystem.delete_dir(path), lambda: not self._is_there(path)), path)

    def move(self, source: str, target: str) -> None:
        there = lambda: not self._is_there(source) and self._is_there(target)
        self._asked(_settled(lambda: self.filesystem.move(source, target), there), target)

    def _is_there(self, path: str) -> bool:
        return bool(self.filesystem.get_file_info(path).type != fs.FileType.NotFound)


def _settled(ask: Callable[[], None], done: Callable[[], bool]) -> Callable[[], None]:
    """`ask`, for what cannot be done twice: of an attempt whose answer was lost the next one finds that it is `done`."""
    attempts = 0

    def settled() -> None:
        nonlocal attempts
        attempts += 1
        if attempts > 1 and done():
            return
        ask()

    return settled


class RemoteFile(io.RawIOBase):
    """A file for reads at positions, by any number of threads; as a stream, it goes on where it was after a connection that broke.

    Raises FileNotFoundError when it is opened.
    """

    def __init__(self, remote: Remote, path: str) -> None:
        super().__init__()
        self._remote, self._path, self._position = remote, path, 0
        self._file: pa.NativeFile = remote._asked(lambda: remote._open(path), path)
        self._size = int(remote._asked(self._file.size, path))

    def size(self) -> int:
        return self._size

    def read_at(self, nbytes: int, offset: int) -> bytes:
        """Bytes [offset, offset + nbytes), fewer at the end of the file."""
        return self._at(nbytes, offset, lambda file, count: file.read_at(count, offset))

    def read_buffer(self, nbytes: int | None = None) -> pa.Buffer:
        """As `read`, in memory of Arrow."""
        start, count = self._position, self._left(nbytes)

        def read(file: pa.NativeFile, count: int) -> pa.Buffer:
            file.seek(start)
            return file.read_buffer(count)

        found = self._at(count, start, read)
        self._position += count
        return found

    def read(self, size: int | None = -1, /) -> bytes:
        found = self.read_at(self._left(size), self._position)
        self._position += len(found)
        return found

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _left(self, wanted: int | None) -> int:
        left = max(0, self._size - self._position)
        return left if wanted is None or wanted < 0 else min(wanted, left)

    def _at(self, nbytes: int, offset: int, read: Callable[[pa.NativeFile, int], T]) -> T:
        """What `read(file, bytes)` gives of the bytes that there are; after an error it is asked of the file opened anew."""
        wanted, failed = max(0, min(nbytes, self._size - offset)), False

        def ask() -> T:
            nonlocal failed
            if failed:
                self._file = self._remote.filesystem.open_input_file(self._path)
            failed = True
            found = read(self._file, wanted)
            if (got := len(found)) != wanted:  # type: ignore[arg-type]  # bytes or a buffer
                raise ConnectionError(f"the answer broke off after {got:,} of {wanted:,} bytes")
            return found

        return self._remote._asked(ask, self._path)
