"""The two operators of `itm features`: shards -> decoded photos (Ray tasks) -> the encoder (actor pool), which writes the region shard."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from itm.config import Part
from itm.data import files
from itm.data.formats import Json
from itm.data.manifest import Receipt, write_receipt
from itm.data.pixels import decode
from itm.data.preprocess import ImageInput, as_images, fit
from itm.data.records import Problem, Regions, check_rows
from itm.data.shards import Sample, copy_samples, read_samples, scan_shard
from itm.device import resolve_device
from itm.matchers.encoders.build import build_image_encoder
from itm.matchers.encoders.features import identity_of
from itm.precision import computing
from pipelines.featuring.boxes import Boxes, read_boxes
from pipelines.featuring.regions import box_regions, grid_regions, side_of
from pipelines.on_ray.reach import Tokens, confirm
from pipelines.on_ray.shard_actors import ShardJob

_STRINGS = pa.list_(pa.string())
_PREPARED = pa.schema(
    {
        "error": pa.string(),
        "job": pa.string(),
        "problems": _STRINGS,
        "sizes": pa.list_(pa.int32()),
        "payloads": pa.large_list(pa.large_binary()),
    }
)
_WRITTEN = pa.schema({"uri": pa.string(), "samples": pa.int64(), "error": pa.string()})


@dataclass(frozen=True)
class Choices:
    """What region features depend on beside the photos. identity: of the encoder, as `identity_of` gives it."""

    encoder: Part
    image: ImageInput
    whole: bool
    keep_images: bool
    boxes: str | None
    boxes_sha256: str | None
    identity: Json

    def said(self) -> Json:
        return {
            "encoder": self.identity,
            "image": self.image.said(),
            "dtype": "fp32" if self.whole else "fp16",
            "keep_images": self.keep_images,
            "boxes": self.boxes_sha256,
        }


@dataclass(frozen=True)
class Prepare:
    """Shards -> the pixels of their photos, one table row a shard. What the user can mend travels as text in `error`."""

    image: ImageInput
    tokens: Tokens = ()  # of folders that every node must see

    def __call__(self, jobs: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(row["job"]) for row in jobs.to_pylist()], _PREPARED)

    def _shard(self, said: str) -> Json:
        job = ShardJob(**json.loads(said))
        problems: list[str | None] = []
        sizes: list[Any] = []
        payloads: list[Any] = []
        try:
            confirm(self.tokens)
            for sample in job.samples():
                pixels, size, problem = self._photo(sample)
                payloads.append(pixels)
                sizes += size
                problems.append(problem)
        except (OSError, ValueError) as error:
            return {"error": f"{job.source}: {error}", "job": said}
        return {"job": said, "problems": problems, "sizes": sizes, "payloads": payloads}

    def _photo(self, sample: Sample) -> tuple[bytes, tuple[int, int], str | None]:
        if sample.image is None:
            return b"", (0, 0), "the sample has no image"
        try:
            photo = decode(sample.image, self.image.exif)
            return fit(photo, self.image.size, self.image.crop).tobytes(), photo.size, None
        except ValueError as error:
            return b"", (0, 0), str(error)
        except MemoryError:
            return b"", (0, 0), "there is not enough memory to decode it"


class Extract:
    """The encoder's actor: makes the regions of a shard's photos and writes the region shard and its receipt before it answers."""

    def __init__(self, choices: Choices, batch_size: int, device: str = "auto", tokens: Tokens = ()) -> None:
        self.choices, self.batch_size, self.tokens = choices, batch_size, tokens
        self.device = resolve_device(device)
        encoder = build_image_encoder(choices.encoder.kind, **choices.encoder.options)
        self.same = identity_of(encoder, choices.encoder.kind) == choices.identity
        self.encoder = encoder.eval().requires_grad_(False).to(self.device)
        self.boxes: Boxes | None = read_boxes(choices.boxes) if choices.boxes else None

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(shards.slice(k, 1)) for k in range(len(shards))], _WRITTEN)

    def _shard(self, shard: pa.Table) -> Json:
        if shard["error"][0].is_valid:
            return {"error": shard["error"][0].as_py()}
        job = ShardJob(**json.loads(shard["job"][0].as_py()))
        try:
            confirm(self.tokens)
            if not self.same:
                raise ValueError(f"this node has other weights of {self.choices.encoder.kind!r} than the driver; give every node the same")
            if self.boxes and self.boxes.sha256 != self.choices.boxes_sha256:
                raise ValueError(f"{self.boxes.uri} has changed since the stage began, or is another file on this node")
            return {"uri": job.target, "samples": self._write(job, shard)}
        except (OSError, ValueError) as error:
            return {"error": f"{job.source}: {error}"}

    def _write(self, job: ShardJob, shard: pa.Table) -> int:
        said = shard["problems"][0].as_py()
        sizes = np.array(shard["sizes"][0].as_py(), np.int64).reshape(-1, 2).tolist()
        payloads = shard["payloads"][0].values
        rows = [row for row, problem in enumerate(said) if problem is None]
        features = dict(zip(rows, self._encoded([payloads[row].as_py() for row in rows]), strict=True))
        problems, made = self._regions(job, said, sizes, features)
        total = np.zeros(0)
        for regions in made.values():
            mean = regions.features.astype(np.float64).mean(0)
            total = mean if not len(total) else total + mean
        info = copy_samples(job.target, self._members(job, made), job.split)
        write_sum(job.target, total, len(made))
        index, unreadable, sha256 = scan_shard(job.target)
        if unreadable or sha256 != info.sha256 or len(index) != len(made):
            raise ValueError(f"{job.target} does not read back as written: {unreadable[0].reason if unreadable else 'other bytes'}")
        check_rows(job.target, len(said), info.samples, len(said) - len(made))
        spans = [(row.key, row.captions, row.start, row.end) for row in index]
        write_receipt(job.target, Receipt(info=info, made_from=job.made_from, rows=spans, problems=problems))
        return info.samples

    def _members(self, job: ShardJob, made: dict[int, Regions]) -> Iterator[Sample]:
        for row, sample in enumerate(job.samples()):
            if row in made:
                yield replace(sample, regions=made[row].to_npz(), image=sample.image if self.choices.keep_images else None)

    @torch.inference_mode()
    def _encoded(self, payloads: list[bytes]) -> Iterator[np.ndarray]:
        """(K,D) float32 of each photo. The same photos come together each time, as last digits depend on what else is in a batch."""
        size = self.choices.image.size
        for start in range(0, len(payloads), self.batch_size):
            some = payloads[start : start + self.batch_size]
            pixels = np.stack([np.frombuffer(data, np.uint8) for data in some]).reshape(len(some), size, size, 3)
            with computing("fp32", self.device):
                encoded = self.encoder(as_images({"pixels": pixels}, np.arange(len(some))).to(self.device))
            if encoded.parts is None:
                raise ValueError(
                    f"encoder {self.choices.encoder.kind!r} gives no parts, so no regions: choose one of grid cells or patches"
                )
            side_of(encoded.parts.shape[1])
            yield from encoded.parts.float().cpu().numpy()

    def _regions(
        self, job: ShardJob, said: list[str | None], sizes: list[list[int]], features: dict[int, np.ndarray]
    ) -> tuple[list[Problem], dict[int, Regions]]:
        """What is left out, and the regions by row of the shard."""
        name = files.name_of(job.target)
        unread = (item for item in read_samples(job.source) if isinstance(item, Problem))
        problems = [replace(problem, shard=name) for problem in unread]
        made: dict[int, Regions] = {}
        for row, sample in enumerate(job.samples()):
            try:
                if (fault := said[row]) is not None:
                    raise ValueError(fault)
                made[row], lost = self._one(sample, features[row], *sizes[row])
                if lost:
                    reason = f"{lost} boxes lie outside its {sizes[row][0]} x {sizes[row][1]} pixels, or are empty"
                    problems.append(Problem(sample.key, name, "features", reason, "member"))
            except ValueError as error:
                problems.append(Problem(sample.key, name, "features", str(error), captions=len(sample.captions)))
        return problems, made

    def _one(self, sample: Sample, features: np.ndarray, width: int, height: int) -> tuple[Regions, int]:
        if not np.isfinite(features).all():
            raise ValueError("its features are not all finite")
        if self.boxes is None:
            return grid_regions(features, width, height, self.choices.image, self.choices.whole), 0
        found = self.boxes.found(sample.key, sample.meta)
        if found is None:
            raise ValueError(f"{self.boxes.uri} has no boxes of it")
        return box_regions(features, *found, (width, height), self.choices.image, self.choices.whole)


def sum_uri(shard_uri: str) -> str:
    return shard_uri.removesuffix(".tar") + ".sum.npy"


def write_sum(shard_uri: str, total: np.ndarray, photos: int) -> None:
    """Beside a region shard: the sum over its photos of their mean feature, and how many they are, (D+1,) float64."""
    out = io.BytesIO()
    np.save(out, np.append(total, float(photos)))
    files.write_atomic(sum_uri(shard_uri), out.getvalue())


def digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
