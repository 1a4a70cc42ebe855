"""What the stages of a recipe will cost: counted where shards exist, else on a sample of the raw data, and measured here for a second.

Nothing is written: a sample shard is made in memory, and the steps that are timed change weights that nobody keeps.
"""

from __future__ import annotations

import resource
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from itm.config import Recipe
from itm.data import files
from itm.data.manifest import Manifest, ShardInfo
from itm.data.pixels import decode
from itm.data.preprocess import ImageInput, Inputs, as_images, fit, reads_regions
from itm.data.records import Record
from itm.data.shards import Sample, read_manifest, read_samples, write_shard
from itm.data.text import build_tokenizer
from itm.device import cores, resolve_device
from itm.kinds import build_part
from itm.matchers.encoders.build import build_image_encoder
from itm.matchers.folder import build_matcher
from itm.methods import METHODS
from itm.training.checkpoint import KEPT
from itm.training.switches import build_step
from itm.types import Batch, Method, SoftLabels
from pipelines.featuring import of_photos
from pipelines.featuring.regions import grid_regions
from pipelines.on_ray.stream import decoders
from pipelines.training.course import Course

SAMPLE = 200  # images that stand for a split
MEASURED = 1.0  # seconds
FEW = 20  # pairs whose photos go through an encoder
TEACHER_WIDTH = 384  # of vectors whose teacher has not run yet
RAY_START = 15.0  # seconds, as measured on two cores: the session, and the first worker's imports
WORKERS_START = 15.0
TRACKING = 3.0  # the first words with a tracking store


@dataclass
class Split:
    """images, captions: of the whole; size: bytes of its shards; rows: (image or regions, caption) of a sample."""

    images: int = 0
    captions: int = 0
    size: float = 0.0
    shards: int = 0
    rows: list[tuple[bytes, str]] = field(default_factory=list)
    seconds_to_pack: float = 0.0
    seconds_to_feature: float = 0.0

    def manifest(self, name: str) -> Manifest:
        """As packing will write it, but for the digests."""
        images, captions = (
            [whole // self.shards + (n < whole % self.shards) for n in range(self.shards)] for whole in (self.images, self.captions)
        )
        rows = enumerate(zip(images, captions, strict=True))
        infos = [ShardInfo(name=f"{n:05d}.tar", samples=i, captions=c, bytes=0, sha256="") for n, (i, c) in rows]
        return Manifest(split=name, source="estimate", shards=infos)


def split_of(recipe: Recipe, name: str) -> Split:
    """A split as it lies packed, else a sample of its source blown up to the whole. Raises ValueError where there is neither."""
    uri = files.join(recipe.data.root, name)
    if files.list_files(uri, ".tar"):
        return _packed(recipe, uri)
    if recipe.features.photos is not None:
        return _featured(recipe, split_of(of_photos(recipe), name))
    if recipe.data.source is None:
        raise ValueError(f"no shards in {uri}, and the recipe has no data.source to pack them from")
    return _raw(recipe, name)


def together(splits: Sequence[Split]) -> Split:
    """The sum of several splits, whose rows stand behind one another."""
    images, captions, size, shards = (sum(getattr(split, name) for split in splits) for name in ("images", "captions", "size", "shards"))
    return Split(images, captions, size, shards, [row for split in splits for row in split.rows])


def _packed(recipe: Recipe, uri: str) -> Split:
    manifest = read_manifest(uri)
    found = Split(manifest.samples, manifest.captions, sum(s.bytes for s in manifest.shards), len(manifest.shards))
    samples = (item for shard in manifest.shards for item in read_samples(files.join(uri, shard.name)) if isinstance(item, Sample))
    for sample in islice(samples, SAMPLE):
        _add(found, sample.regions if reads_regions(recipe.data) else sample.image, [c.text for c in sample.captions])
    return found


def _featured(recipe: Recipe, photos: Split) -> Split:
    """A split of photos as `itm features` will make it, measured on a few of them."""
    from pipelines.features import choices_of

    choices = choices_of(recipe)
    encoder = build_image_encoder(choices.encoder.kind, **choices.encoder.options).eval()
    some = dict.fromkeys(data for data, _ in photos.rows[:FEW])
    made, start = {}, time.perf_counter()
    for data in some:
        photo = decode(data, choices.image.exif)
        pixels = np.stack([fit(photo, choices.image.size, choices.image.crop)])
        with torch.inference_mode():
            parts = encoder(as_images({"pixels": pixels}, np.zeros(1))).parts
        if parts is None:
            raise ValueError(f"encoder {choices.encoder.kind!r} gives no parts, so no features")
        made[data] = grid_regions(parts[0].numpy(), *photo.size, choices.image, choices.whole).to_npz()
    each = (time.perf_counter() - start) / max(1, len(some))
    larger = photos.images * max(map(len, made.values()), default=0)
    size = larger + (photos.size if recipe.features.keep_images else 0)
    rows = [(made[data], text) for data, text in photos.rows if data in made]
    return replace(photos, size=size, rows=rows, seconds_to_feature=each * photos.images)


def _raw(recipe: Recipe, name: str) -> Split:
    from pipelines.pack import Job, accepted, open_source

    assert recipe.data.source is not None
    source = open_source(recipe.data.source)
    count = source.count(name) if name in source.splits else 0
    if not count:
        raise ValueError(f"the source has no split {name!r}; there are: {', '.join(source.splits)}")
    start = time.perf_counter()
    looked = min(count, SAMPLE)
    records = list(accepted(Job(recipe.data.source, name, recipe.data.image, "", "plan", 0, looked), [], Counter()))
    shard = f"memory://itm-plan-{uuid.uuid4().hex}/00000.tar"
    size = write_shard(shard, records).bytes
    files.delete(shard)
    seconds = time.perf_counter() - start
    images, captions = (round(n * count / looked) for n in (len(records), sum(len(record.captions) for record in records)))
    shards = -(-count // recipe.data.shard_samples)
    found = Split(images, captions, size * count / looked, shards, seconds_to_pack=seconds * count / looked)
    for record in records:
        _add(found, _bytes_of(record, recipe.data.image), [c.text for c in record.captions])
    return found


def _bytes_of(record: Record, image: str) -> bytes | None:
    return record.regions.to_npz() if image == "regions" and record.regions is not None else record.image


def _add(found: Split, data: bytes | None, texts: list[str]) -> None:
    if data is not None:
        found.rows += [(data, text) for text in texts]


@dataclass(frozen=True)
class Training:
    """step, prepare: seconds of an optimiser step and of the decoding for it; look: of encoding a batch without gradients."""

    course: Course
    same_image: float
    weights: int
    trained: int
    step: float
    prepare: float
    look: float
    memory: int
    device: str

    def seconds(self, recipe: Recipe, val: Split | None) -> float:
        """Steps and validations; decoding runs beside the steps where there is a core for it."""
        train, spare = recipe.train, (torch.get_num_threads() > 1 or self.device != "cpu" or cores() > max(1, recipe.train.workers))
        waiting = self.prepare / decoders(recipe.data.decode_workers, train.use_gpu)
        steps = self.course.steps * (max(self.step, waiting) if spare else self.step + waiting)
        if val is None:
            return steps
        every = train.validate_every or max(1, self.course.plan.steps_per_epoch)
        times = -(-self.course.steps // every)
        return steps + times * val.images / train.batch_size * (self.prepare + self.look)

    def bytes(self, recipe: Recipe, validated: bool) -> int:
        """The matcher, two checkpoints with the optimiser's two moments, and the best weights."""
        one = 4 * (self.weights + 2 * self.trained + (self.weights if recipe.train.ema else 0))
        return 4 * self.weights * (1 + validated) + KEPT * one


def training_of(recipe: Recipe, split: Split) -> Training:
    """Measured with the recipe's own model, method and optimiser on a batch of its own data. Raises ValueError as `itm train`."""
    course = Course.of(recipe, split.manifest(recipe.data.train_split))
    rows = (split.rows * (recipe.train.batch_size // max(1, len(split.rows)) + 1))[: recipe.train.batch_size]
    if not rows:
        raise ValueError(f"split {recipe.data.train_split!r} has no image with a caption among its first {SAMPLE}")
    inputs = Inputs(ImageInput.trained_on(recipe.data, rows[0][0]), build_tokenizer(recipe.text, [text for _, text in split.rows]))
    method = _method(recipe, inputs)
    device = resolve_device("cuda" if recipe.train.use_gpu else "cpu")
    step = build_step(method, recipe.train, course.rate, recipe.seed, device)
    start = time.perf_counter()
    images, captions = inputs.images([data for data, _ in rows]), inputs.captions([text for _, text in rows])
    prepare = time.perf_counter() - start
    vectors = torch.nn.functional.normalize(torch.randn(len(rows), TEACHER_WIDTH), dim=-1)
    batch = Batch(images, captions, SoftLabels(vectors, vectors) if method.needs_teacher else None).to(device)
    taken = _timed(lambda: step([batch] * recipe.train.accumulate, 0), device)
    with torch.no_grad():
        look = _timed(lambda: (method.matcher.encode_images(batch.images), method.matcher.encode_captions(batch.captions)), device)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights, trained = (sum(p.numel() for p in method.parameters() if every or p.requires_grad) for every in (True, False))
    share = course.same_image_share(split.manifest(recipe.data.train_split))
    return Training(course, share, weights, trained, taken, prepare, look, memory, str(device))


def _method(recipe: Recipe, inputs: Inputs) -> Method:
    """As `build_method`, without the copy of `train.start`: its weights do not change what a step costs."""
    matcher = build_matcher(recipe.model, inputs)
    return build_part(METHODS, recipe.method.kind, recipe.method.options, "method", matcher=matcher)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the mean over a second of them after one that warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < MEASURED:
        work()
        calls += 1
        wait()
    return (time.perf_counter() - start) / calls
