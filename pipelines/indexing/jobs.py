"""The shards of an index: where their vectors go, and whether they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from itm.data import files
from itm.data.formats import Json
from itm.retrieval.store import captions_uri, read_header
from pipelines.on_ray.shard_actors import ShardJob


def target_of(output: str, folder: str, shard: str) -> str:
    return files.join(output, folder, f"{shard.removesuffix('.tar')}.arrow")


def usable(job: ShardJob) -> Json | None:
    """The header of a shard's vectors that are whole and of these choices."""
    header = read_header(job.target)
    good = header is not None and header.get("made_from") == job.made_from and files.exists(captions_uri(job.target))
    return header if good else None


def taken(others: Sequence[str], job: ShardJob) -> ShardJob | None:
    """Copies a shard's vectors from the first index that has them of the same shard and choices, whether it is finished or not."""
    for other in others:
        own = replace(job, target=target_of(other, job.split, files.name_of(job.source)))
        if usable(own) is not None:
            for source, target in ((captions_uri(own.target), captions_uri(job.target)), (own.target, job.target)):
                files.write_atomic(target, files.read_bytes(source))
            return job
    return None
