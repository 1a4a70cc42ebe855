"""The rejected pairs of a training run, and when there are too many of them."""

from __future__ import annotations

import json
import re

from itm.data import files


class Problems:
    """The rejected pairs that a rank has met, each once; `quarantine-<rank>.jsonl` in the run's folder.

    samples: of the split; limit: the share of them that may be rejected. Rank 0 takes over the lists of ranks that are no longer there.
    """

    def __init__(self, folder: str, samples: int, limit: float, rank: int, ranks: int) -> None:
        self.uri = files.join(folder, f"quarantine-{rank}.jsonl")
        self.samples, self.limit = samples, limit
        self.rows: dict[str, None] = {}
        if files.exists(self.uri):
            self._read(self.uri)
        self.written = len(self.rows)
        if rank == 0:
            self._adopt(folder, ranks)

    def _read(self, uri: str) -> None:
        self.rows |= dict.fromkeys(line for line in files.read_bytes(uri).decode().split("\n") if line)

    def _adopt(self, folder: str, ranks: int) -> None:
        lists = {name: re.fullmatch(r"quarantine-(\d+)\.jsonl", name) for name in files.sizes(folder, ".jsonl")}
        left = [files.join(folder, name) for name, found in lists.items() if found and int(found[1]) >= ranks]
        for uri in left:
            self._read(uri)
        self.write()
        for uri in left:
            files.delete(uri)

    def add(self, rows: list[str]) -> None:
        """Raises ValueError when more samples of the split were rejected than `data.max_reject_rate` allows."""
        new = [row for row in rows if row not in self.rows]
        if not new:
            return
        self.rows |= dict.fromkeys(new)
        keys = {(said["shard"], said["key"]) for said in map(json.loads, self.rows)}
        if len(keys) > self.limit * self.samples:
            self.write()
            raise ValueError(
                f"{len(keys)} of {self.samples} samples were rejected, more than data.max_reject_rate={self.limit}; "
                f"the reasons are in {self.uri}; the last: {new[-1]}"
            )

    def write(self) -> None:
        if len(self.rows) > self.written:
            files.write_atomic(self.uri, "".join(row + "\n" for row in self.rows).encode())
            self.written = len(self.rows)
