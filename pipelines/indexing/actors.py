"""The two operators of `itm index`: shards -> decoded photos (Ray tasks) -> the matcher (actor pool), which writes what it made of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

import itm
from itm.data import files
from itm.data.formats import Json
from itm.data.pixels import decode
from itm.data.preprocess import ImageInput, Inputs, as_images, fit
from itm.data.records import Problem
from itm.data.same_image import image_number
from itm.data.shards import Sample, read_samples
from itm.device import resolve_device
from itm.evaluation.dataset import EncodedSplit, encode_samples
from itm.precision import computing
from itm.retrieval.kept import matcher_identity
from itm.retrieval.store import Choices, captions_uri, check_vectors, metadata_columns, write_rows
from itm.types import Images, Matcher
from pipelines.on_ray.reach import Tokens, confirm
from pipelines.on_ray.shard_actors import ShardJob

_PREPARED = pa.schema(
    {
        "error": pa.string(),
        "job": pa.string(),
        "problems": pa.list_(pa.string()),
        "payloads": pa.large_list(pa.large_binary()),
    }
)
_WRITTEN = pa.schema({"uri": pa.string(), "images": pa.int64(), "error": pa.string()})


@dataclass(frozen=True)
class Prepare:
    """Shards -> the pixels of their photos, one table row a shard. What the user can mend travels as text in `error`.

    image: how the matcher wants photos; None = they are left to it, as region files are.
    """

    image: ImageInput | None
    tokens: Tokens = ()

    def __call__(self, jobs: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(row["job"]) for row in jobs.to_pylist()], _PREPARED)

    def _shard(self, said: str) -> Json:
        if self.image is None:
            return {"job": said}
        job = ShardJob(**json.loads(said))
        try:
            confirm(self.tokens)
            photos = [self._photo(sample, self.image) for sample in job.samples()]
        except (OSError, ValueError) as error:
            return {"error": f"{job.source}: {error}", "job": said}
        return {"job": said, "payloads": [pixels for pixels, _ in photos], "problems": [problem for _, problem in photos]}

    def _photo(self, sample: Sample, form: ImageInput) -> tuple[bytes, str | None]:
        if sample.image is None:
            return b"", "the sample has no image"
        try:
            return fit(decode(sample.image, form.exif), form.size, form.crop).tobytes(), None
        except ValueError as error:
            return b"", str(error)
        except MemoryError:
            return b"", "there is not enough memory to decode it"


def prepared_apart(matcher: Matcher) -> ImageInput | None:
    """How photos can be prepared for a matcher elsewhere; None where it reads region files, or its members prepare each in its own way."""
    inputs = matcher.inputs
    return inputs.image if isinstance(inputs, Inputs) and inputs.image.kind == "pixels" else None


class _Decoded:
    """The inputs of a matcher whose images were prepared before: raw images are their pixels."""

    def __init__(self, inputs: Inputs) -> None:
        self.inner, self.image, self.tokenizer, self.target = inputs, inputs.image, inputs.tokenizer, inputs.target

    def images(self, raw: Sequence[bytes], image_id: Sequence[int] | None = None) -> Images:
        size = self.image.size
        pixels = np.stack([np.frombuffer(data, np.uint8) for data in raw]).reshape(len(raw), size, size, 3)
        return as_images({"pixels": pixels}, np.arange(len(raw))).to(self.target)

    def captions(self, texts: Sequence[str], image_id: Sequence[int] | None = None) -> Any:
        return self.inner.captions(texts, image_id)


class Embed:
    """The matcher's actor: encodes the images and captions of a shard and writes both files before it answers."""

    def __init__(
        self, model: str | Matcher, choices: Choices, batch_size: int, device: str = "auto", tokens: Tokens = (), allow: Sequence[str] = ()
    ) -> None:
        self.choices, self.batch_size, self.tokens = choices, batch_size, tokens
        self.device = resolve_device(device)
        self.matcher = itm.load_matcher(model, allow=allow) if isinstance(model, str) else model
        self.same = matcher_identity(self.matcher) == choices.matcher

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(row) for row in shards.to_pylist()], _WRITTEN)

    def _shard(self, shard: Json) -> Json:
        if shard["error"] is not None:
            return {"error": shard["error"]}
        job = ShardJob(**json.loads(shard["job"]))
        try:
            confirm(self.tokens)
            if not self.same:
                raise ValueError("this node has other weights of the matcher than the driver; give every node the same")
            return {"uri": job.target, "images": self._write(job, shard["payloads"], shard["problems"])}
        except (OSError, ValueError) as error:
            return {"error": f"{job.source}: {error}"}

    def _write(self, job: ShardJob, payloads: list[bytes] | None, problems: list[str | None] | None) -> int:
        items = list(read_samples(job.source, job.sha256))
        samples = {item.key: item for item in items if isinstance(item, Sample)}
        encoded = self._encoded(job, items, payloads, problems)
        names = encoded.names
        check_vectors(encoded.images, "image", names.image_keys)
        check_vectors(encoded.captions, "caption", names.caption_ids)
        numbers = [image_number(samples[key], job.split) for key in names.image_keys]
        images = {"key": pa.array(names.image_keys, pa.string()), "image": pa.array(numbers, pa.int64())}
        images |= metadata_columns(names.image_metas, self.choices.fields)
        captions = {
            "id": pa.array(names.caption_ids, pa.string()),
            "text": pa.array(names.texts, pa.string()),
            "image": pa.array(names.caption_image.numpy(), pa.int32()),
        }
        lost = [asdict(problem) for problem in encoded.problems]
        header = {**self.choices.said(), "shard": files.name_of(job.source), "sha256": job.sha256, "made_from": job.made_from}
        write_rows(captions_uri(job.target), header, captions, encoded.captions, self.choices.dtype)
        write_rows(
            job.target,
            header | {"images": len(numbers), "captions": len(names.texts), "problems": lost},
            images,
            encoded.images,
            self.choices.dtype,
        )
        return len(names.image_keys)

    def _encoded(
        self, job: ShardJob, items: list[Sample | Problem], payloads: list[bytes] | None, problems: list[str | None] | None
    ) -> EncodedSplit:
        """Images that cannot be read become problems; the photos were prepared where there are payloads, one a sample."""
        matcher, inputs = self.matcher, self.matcher.inputs
        if payloads is not None and problems is not None and isinstance(inputs, Inputs):
            matcher = copy.copy(matcher)  # shares its weights
            matcher._inputs = _Decoded(inputs)  # type: ignore[assignment]
            name, given = files.name_of(job.source), iter(zip(payloads, problems, strict=True))
            items = [item if isinstance(item, Problem) else _with_pixels(item, name, *next(given)) for item in items]
        with computing("fp32", self.device):
            return encode_samples(matcher, job.source, items, self.batch_size, None, self.device)


def _with_pixels(sample: Sample, shard: str, pixels: bytes, problem: str | None) -> Sample | Problem:
    if problem is not None:
        return Problem(sample.key, shard, "index", problem, captions=len(sample.captions))
    return replace(sample, image=pixels)


def in_this_process(actor: Embed, prepare: Prepare, jobs: Sequence[ShardJob]) -> Iterator[str]:
    """The two operators without Ray between them; yields the files as they are written. Raises ValueError as they say."""
    for job in jobs:
        (row,) = actor(prepare(pa.table({"job": [json.dumps(asdict(job))]}))).to_pylist()
        if row["error"]:
            raise ValueError(row["error"])
        yield row["uri"]
