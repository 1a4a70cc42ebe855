"""Where photos lie: a folder, a zip or a tar, on any file system that `itm.data.files` knows; one file by its name."""

from __future__ import annotations

import tarfile
import unicodedata
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable

from itm.data import files
from itm.data.sources.pictures import HEAD

MAX_MEMBER = 1 << 30
"""Bytes of one file of an archive: a crafted archive of a few KB can claim terabytes."""
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, tarfile.TarError)
_JUNK = {".ds_store", "thumbs.db", "desktop.ini"}


class Photos(ABC):
    """names: file name (relative, `/` between folders, Unicode NFC as most programs write it) -> bytes.

    passed_over: (name, reason) of the files that belong to the system that wrote the folder or archive, not to its user.
    """

    def __init__(self, uri: str, found: Iterable[tuple[str, int]]) -> None:
        self.uri = uri
        self.names: dict[str, int] = {}
        self.passed_over: list[tuple[str, str]] = []
        self._raw: dict[str, str] = {}  # a Mac writes an accent as a letter of its own (NFD)
        for raw, size in found:
            name = unicodedata.normalize("NFC", raw.removeprefix("./"))
            if reason := _junk(name):
                self.passed_over.append((name, reason))
                continue
            name = raw if name in self.names else name
            self.names[name], self._raw[name] = size, raw

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises ValueError naming it when it cannot be read."""
        try:
            return self._read(self._raw[name])
        except _UNREADABLE as error:
            raise ValueError(f"{self.place(name)} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def head(self, name: str) -> bytes:
        """Its first bytes, by which its format is known; empty when it cannot be read."""
        try:
            return self._head(self._raw[name])
        except _UNREADABLE:
            return b""

    def place(self, name: str) -> str:
        """How a message names a file."""
        return files.join(self.uri, name)

    @abstractmethod
    def _read(self, raw: str) -> bytes: ...

    def _head(self, raw: str) -> bytes:
        return self._read(raw)[:HEAD]


class Folder(Photos):
    def __init__(self, uri: str) -> None:
        super().__init__(uri, files.walk(uri).items())

    def _read(self, raw: str) -> bytes:
        return files.read_bytes(files.join(self.uri, raw))

    def _head(self, raw: str) -> bytes:
        return files.read_span(files.join(self.uri, raw), 0, min(HEAD, files.size_of(files.join(self.uri, raw))))


class Zip(Photos):
    """An encrypted file, or one that claims more than MAX_MEMBER, is no file that can be read."""

    def __init__(self, uri: str) -> None:
        try:
            self._archive = zipfile.ZipFile(files.open_file(uri))
        except zipfile.BadZipFile as error:
            raise ValueError(f"{uri} is no whole zip ({error}): copy it again") from None
        self._infos = {_unmangled(info): info for info in self._archive.infolist() if not info.is_dir()}
        super().__init__(uri, sorted((name, info.file_size) for name, info in self._infos.items()))

    def _read(self, raw: str) -> bytes:
        _check_size(self._infos[raw].file_size)
        return self._archive.read(self._infos[raw])

    def _head(self, raw: str) -> bytes:
        with self._archive.open(self._infos[raw]) as stream:
            return stream.read(HEAD)


class Tar(Photos):
    """Also a compressed one, which costs every process that packs a part of it one pass over the whole."""

    def __init__(self, uri: str) -> None:
        try:
            self._archive = tarfile.open(fileobj=files.open_file(uri), mode="r:*")  # noqa: SIM115
            held = self._archive.getmembers()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{uri} is no whole tar ({error}): copy it again") from None
        self._infos = {info.name: info for info in held if info.isreg()}
        super().__init__(uri, sorted((name, info.size) for name, info in self._infos.items()))
        self.passed_over += [(i.name, "a link or device, no file") for i in held if not i.isreg() and not i.isdir()]

    def _read(self, raw: str) -> bytes:
        _check_size(self._infos[raw].size)
        stream = self._archive.extractfile(self._infos[raw])
        assert stream is not None
        return stream.read()


def open_photos(path: str) -> Photos:
    """The folder, zip or tar at `path`. Raises ValueError when there is nothing, or a file of another kind."""
    uri = files.absolute(path)
    if files.is_folder(uri):
        return Folder(uri)
    if not files.exists(uri):
        raise ValueError(f"no folder, zip or tar of photos at {uri}")
    head = files.read_span(uri, 0, min(512, files.size_of(uri)))
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Zip(uri)
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
        return Tar(uri)
    raise ValueError(f"{uri} is a file, but no zip or tar: give the folder or archive that the photos lie in")


def _junk(name: str) -> str | None:
    parts = name.split("/")
    if "__MACOSX" in parts or parts[-1].startswith("._"):
        return "a Mac's notes on another file"
    if parts[-1].lower() in _JUNK or any(part.startswith(".") for part in parts):
        return "a hidden file"
    return None


def _unmangled(info: zipfile.ZipInfo) -> str:
    """A Mac writes UTF-8 without saying so, which is then read as the code page of DOS."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _check_size(size: int) -> None:
    if size > MAX_MEMBER:
        raise ValueError(f"it has {size:,} bytes, the limit is {MAX_MEMBER:,}")
