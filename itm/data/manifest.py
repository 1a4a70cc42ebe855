"""The manifest of a split: which shards it has and what they hold. Written last; built by scanning for foreign layouts."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from itm.data import files
from itm.data.formats import NewerFormat, check_format
from itm.data.records import Problem

NAME = "manifest.json"
QUARANTINE = "quarantine.jsonl"
FORMAT, RECEIPT_FORMAT = 1, 1
UNCAPTIONED = 2  # the format of a manifest of images alone, which readers of format 1 would take for broken samples
FOREIGN = "foreign"  # the format of a manifest that was made by scanning shards of others
CHANGED = (
    "the shard changed after the manifest was written: run `itm pack` again, or delete manifest.json and the indexes of foreign shards"
)


class ShardInfo(BaseModel):
    """What a manifest says about one shard. captions counts those that survive reading; sha256 is of the whole tar."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[^/\\]+$", description="a file right inside the split's folder")
    samples: int = Field(ge=0)
    captions: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


@dataclass(frozen=True)
class SampleIndex:
    """Bytes [start, end) of a shard hold all members of the sample `key`, which has so many usable captions."""

    key: str
    captions: int
    start: int
    end: int


class Manifest(BaseModel):
    """`source` says what the shards were made from; `rejected` counts samples (not captions) that were left out.

    format: `itm-<number>`, or `foreign`; `itm-2` says that the samples have no captions: a split to search, not to train on.
    """

    model_config = ConfigDict(frozen=True)

    split: str
    source: str
    shards: list[ShardInfo]
    rejected: int = Field(0, ge=0)
    format: str = f"itm-{FORMAT}"

    @field_validator("shards")
    @classmethod
    def _once_each(cls, shards: list[ShardInfo]) -> list[ShardInfo]:
        if len({s.name for s in shards}) < len(shards):
            raise ValueError("a shard is listed twice")
        return shards

    def fingerprint(self) -> str:
        """12 hex digits of the sha256 over the names, counts and digests of the shards."""
        rows = [s.model_dump() for s in self.shards]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.shards)

    @property
    def captions(self) -> int:
        return sum(s.captions for s in self.shards)

    def check_captioned(self, uri: str, purpose: str) -> Self:
        """Itself. Raises ValueError naming the split where its images have no captions. purpose: what was to be done with them."""
        if self.samples and not self.captions:
            raise ValueError(
                f"{uri} holds {self.samples:,} images without captions: they can be searched and taught to images, not {purpose}; "
                "pack them with captions (a .txt beside each image, or a table), or name another split"
            )
        return self


class Receipt(BaseModel):
    """`<stem>.index.json` beside a packed shard: proof that it is complete, and where its samples lie.

    made_from: fingerprint of the source and the choices of packing; rows: (key, captions, start byte, end byte).
    """

    model_config = ConfigDict(frozen=True)

    info: ShardInfo
    made_from: str
    rows: list[tuple[str, int, int, int]]
    problems: list[Problem]
    format: int = RECEIPT_FORMAT

    @property
    def rejected(self) -> int:
        return sum(p.what in ("sample", "shard") for p in self.problems)


def manifest_of(split: str, source: str, shards: list[ShardInfo], rejected: int) -> Manifest:
    """The manifest of shards that were made here, of the format that says whether they have captions."""
    bare = any(s.samples for s in shards) and not any(s.captions for s in shards)
    return Manifest(split=split, source=source, shards=shards, rejected=rejected, format=f"itm-{UNCAPTIONED if bare else FORMAT}")


def rejected_captions(folder: str) -> int:
    """Captions that the quarantine table of a folder names, or whose sample it names; 0 where there is no table."""
    uri = files.join(folder, QUARANTINE)
    rows = files.read_bytes(uri).decode().split("\n") if files.exists(uri) else []
    said = [json.loads(row) for row in rows if row]
    return sum(1 if row["what"] == "caption" else row.get("captions", 0) for row in said)


def write_manifest(split_uri: str, manifest: Manifest) -> None:
    files.write_atomic(files.join(split_uri, NAME), manifest.model_dump_json(indent=1).encode())


def parse_manifest(uri: str, data: bytes) -> Manifest:
    """The manifest in the bytes of the file `uri`. Raises NewerFormat; ValueError naming the first thing that is wrong."""
    with suppress(UnicodeDecodeError, json.JSONDecodeError, RecursionError):  # the validation below says what is wrong
        said = json.loads(data)
        check_format(uri, {"format": _number(said)}, UNCAPTIONED)
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{uri} is no shard manifest: {where} {first['msg']}; run `itm pack`, or delete it for foreign shards") from None


def _number(said: Any) -> Any:
    """2 for `itm-2`; what else stands there, as it is."""
    found = said.get("format", FOREIGN) if isinstance(said, dict) else FOREIGN
    named = re.fullmatch(r"itm-(\d+)", str(found))
    return int(named[1]) if named else FORMAT if found == FOREIGN else found


def list_shards(split_uri: str) -> list[str]:
    """URIs of the tars of a split in natural order (2.tar before 10.tar). Raises ValueError as `read_manifest`."""
    tars = sorted(files.list_files(split_uri, ".tar"), key=lambda uri: _natural(files.name_of(uri)))
    promised = files.join(split_uri, "nshards.txt")
    if files.exists(promised) and len(tars) != (count := _count(promised)):
        raise ValueError(f"{split_uri} holds {len(tars)} tars but its nshards.txt says {count}; copy the missing ones")
    if not tars:
        files.check_store(split_uri)
        raise ValueError(f"no {NAME} and no .tar in {split_uri}; run `itm pack`, or point data.root at the folder above the splits")
    return tars


def _count(uri: str) -> int:
    said = files.read_bytes(uri)
    try:
        return int(said)
    except ValueError:
        raise ValueError(f"{uri} must hold the number of tars, not {said[:40]!r}") from None


def check_present(split_uri: str, manifest: Manifest) -> None:
    """One listing: every shard is there with the bytes its manifest promises. Raises ValueError naming the first that is not."""
    sizes = files.sizes(split_uri, ".tar")
    for shard in manifest.shards:
        if shard.name not in sizes:
            raise ValueError(f"{files.join(split_uri, shard.name)} is in {NAME}, but not there: copy it, or run `itm pack` again")
        if sizes[shard.name] != shard.bytes:
            said = f"has {sizes[shard.name]:,} bytes, its manifest says {shard.bytes:,}"
            raise ValueError(f"{files.join(split_uri, shard.name)} {said}: {CHANGED}")


def full_key(shard_uri: str, key: str) -> str:
    """The name of a sample whose key other shards of the split use, too: `00003/000017`."""
    return f"{files.name_of(shard_uri).removesuffix('.tar')}/{key}"


def receipt_uri(shard_uri: str) -> str:
    return shard_uri.removesuffix(".tar") + ".index.json"


def write_receipt(shard_uri: str, receipt: Receipt) -> None:
    files.write_atomic(receipt_uri(shard_uri), receipt.model_dump_json().encode())


def read_receipt(shard_uri: str) -> Receipt | None:
    """The receipt of a shard that is there in full, else None (also when the receipt itself is damaged). Raises NewerFormat."""
    uri = receipt_uri(shard_uri)
    if not files.exists(uri) or not files.exists(shard_uri):
        return None
    try:
        said = json.loads(files.read_bytes(uri))
        check_format(uri, said, RECEIPT_FORMAT)
        receipt = Receipt.model_validate(said)
    except NewerFormat:
        raise
    except (ValueError, RecursionError):
        return None
    return receipt if receipt.info.bytes == files.size_of(shard_uri) else None


def _natural(name: str) -> list[int | str]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
