"""Parquet files, Arrow IPC files and streams, read by row groups (record batches): the memory of one group at most, or less."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from itm.data import files
from itm.data.sources.splits import ORDER, SPLIT_NAMES, in_order, split_of

SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
BUFFER = 4 << 20  # bytes of a column that are read at once, so that a file with one large row group takes no more memory than others
ROWS = 16  # of a piece of a row group: images are large


class ArrowTable(ABC):
    """groups: rows of each row group."""

    schema: pa.Schema
    groups: list[int]

    @property
    def rows(self) -> int:
        return sum(self.groups)

    @abstractmethod
    def pieces(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a group in order, some at a time. A column may be a field of a struct: `image.path` leaves the bytes alone."""


class ParquetTable(ArrowTable):
    def __init__(self, uri: str) -> None:
        self._file = pq.ParquetFile(files.open_file(uri), buffer_size=BUFFER, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.groups = [self._file.metadata.row_group(n).num_rows for n in range(self._file.metadata.num_row_groups)]

    def pieces(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(ROWS, [group], list(columns), use_threads=False)


class IpcTable(ArrowTable):
    """A file or a stream; a local one is mapped, not read. Of a stream the batches are counted by going through it once."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with self._source() as source:
            stream = source.read(6) != b"ARROW1"
        self._stream = stream
        with self._source() as source:
            if stream:
                reader = ipc.open_stream(source)
                self.schema, self.groups = reader.schema, [batch.num_rows for batch in reader]
            else:
                held = ipc.open_file(source)
                self.schema, self.groups = held.schema, [held.get_batch(n).num_rows for n in range(held.num_record_batches)]

    def pieces(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with self._source() as source:
            if self._stream:
                reader = ipc.open_stream(source)
                for _ in range(group):
                    reader.read_next_batch()
                batch = reader.read_next_batch()
            else:
                batch = ipc.open_file(source).get_batch(group)
            for start in range(0, batch.num_rows, ROWS):
                yield batch.select([name.partition(".")[0] if name not in batch.schema.names else name for name in columns]).slice(
                    start, ROWS
                )

    def _source(self) -> pa.NativeFile:
        filesystem, path = files.resolve(self.uri)
        return pa.memory_map(path) if filesystem.type_name == "local" else files.open_file(self.uri)


def open_table(uri: str) -> ArrowTable:
    """Raises ValueError naming a file that is missing, truncated, or neither Parquet nor Arrow."""
    try:
        with files.open_file(uri) as stream:
            head = stream.read(7)
        if head.startswith(b"version"):
            raise ValueError(f"{uri} is a pointer of git-LFS, not the file it stands for: run `git lfs pull`")
        return ParquetTable(uri) if head.startswith(b"PAR1") else IpcTable(uri)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{uri} is no whole Parquet or Arrow file: {str(error).splitlines()[0]}") from None


def find_tables(path: str | list[str] | dict[str, Any]) -> dict[str, list[str]]:
    """split -> its files. `path` as `Parquet` takes it. Raises ValueError naming what is not there, and files that name no split beside
    others that do."""
    if isinstance(path, dict):
        return {split: [uri for uris in find_tables(inside).values() for uri in uris] for split, inside in path.items()}
    if isinstance(path, str) and "{split}" in path:
        found = {alias: list(_below(path.replace("{split}", alias))) for alias in SPLIT_NAMES}
        named = in_order({SPLIT_NAMES[alias]: uris for alias, uris in found.items() if uris})
        return named or _nothing(path)
    if isinstance(path, str) and (saved := _saved(files.absolute(path))):
        return saved
    uris = [uri for one in ([path] if isinstance(path, str) else path) for uri in (list(_below(one)) or _nothing(one))]
    start = len(_common(uris))
    said = {uri: split_of(uri[start:]) for uri in uris}
    if not any(said.values()):
        return {"train": uris}
    if silent := [uri for uri, split in said.items() if split is None]:
        others = ", ".join(sorted({str(split) for split in said.values() if split}))
        raise ValueError(f"{silent[0]} names no split, where other files do ({others}): give path as a mapping split: files")
    return in_order({split: [uri for uri in uris if said[uri] == split] for split in [*ORDER] if split in said.values()})


def _below(path: str) -> Iterable[str]:
    """The tables of a file, a glob or a folder, sorted."""
    uri = files.absolute(path)
    if any(mark in path for mark in "*?["):
        fixed = uri[: min(uri.index(mark) for mark in "*?[" if mark in uri)].rpartition("/")[0]
        return [files.join(fixed, name) for name in files.walk(fixed) if fnmatch(files.join(fixed, name), uri)]
    if files.is_folder(uri):
        return [
            files.join(uri, name) for name in files.walk(uri) if name.endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")
        ]
    return [uri] if files.exists(uri) else []


def _saved(uri: str) -> dict[str, list[str]] | None:
    """The files of a folder that `datasets.save_to_disk` wrote, in its order; None for another folder."""
    if files.exists(listing := files.join(uri, "dataset_dict.json")):
        names = json.loads(files.read_bytes(listing))["splits"]
        return in_order({SPLIT_NAMES.get(name, name): _state(files.join(uri, name)) for name in names})
    return {"train": _state(uri)} if files.exists(files.join(uri, "state.json")) else None


def _state(uri: str) -> list[str]:
    return [files.join(uri, one["filename"]) for one in json.loads(files.read_bytes(files.join(uri, "state.json")))["_data_files"]]


def _common(uris: Sequence[str]) -> str:
    """The folder that all of them lie in: what it is called says nothing of one file."""
    first, last = min(uris), max(uris)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same].rpartition("/")[0]


def _nothing(path: str) -> Any:
    raise ValueError(f"no Parquet or Arrow file at {path}")
