"""Shards of photos -> region shards, which SCAN, SGRAF, UARDA and UNITER train from: with any image encoder, once for all runs.

    itm features -c recipe.yaml features.photos=data/photos data.root=data/regions
    itm features -c recipe.yaml 'features.encoder={kind: efficientnet_lite0, options: {cells: 5}}'
    itm features -c recipe.yaml features.boxes=detections.jsonl data.crop=squash

features.photos are the photos, data.root is where the region shards go, one for each shard of photos. A region is a cell of the encoder's
grid (or of `cells` x `cells` means of them), or what lies in a box of a detector; each has its box in pixels of the photo. Keys, captions
and, unless features.keep_images=false, photos stay as they are. Photos are prepared as data.image_size, data.crop and data.exif say.
Shards that have been made are kept, so it can be stopped at any time and run again: the shards end with the same bytes. What cannot be
used is listed in quarantine.jsonl, and fails the stage past data.max_reject_rate. mean.npy is the mean feature of each split.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines.cli import recipe_arguments, recipe_from, script

if TYPE_CHECKING:
    from itm.config import Recipe
    from itm.data.formats import Json
    from itm.data.manifest import Manifest, Receipt
    from pipelines.featuring.actors import Choices
    from pipelines.on_ray.shard_actors import ShardJob

MEAN = "mean.npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits (default: all that the recipe names)")
    parser.add_argument("--overwrite", action="store_true", help="delete features that other choices made, then make these")


def run(args: argparse.Namespace) -> None:
    from itm.data import files

    recipe = recipe_from(args)
    for split, manifest in features(recipe, args.splits, args.overwrite).items():
        folder = files.join(recipe.data.root, split)
        print(f"{split}: {flow_line(folder, manifest)}; {folder}")


def kept(args: argparse.Namespace) -> str:
    """What a stage that is stopped leaves behind."""
    from itm.data import files

    data = recipe_from(args).data
    whole = sum(len(files.list_files(folder, ".index.json")) for folder in files.list_folders(data.root))
    return f"{whole:,} whole region shards are kept in {data.root}"


def features(recipe: Recipe, splits: list[str] | None = None, overwrite: bool = False) -> dict[str, Manifest]:
    """Make (or complete) the region shards of these splits, unset = all that the recipe names; returns their manifests.

    Raises ValueError for an encoder without a grid, boxes of other photos, a folder that holds other features, and past max_reject_rate.
    """
    from itm.data import files, lease

    check(recipe)
    files.check_writable(recipe.data.root)
    choices = choices_of(recipe)
    known = splits_named(recipe)
    if unknown := set(splits or []) - set(known):
        raise ValueError(f"no split {', '.join(sorted(unknown))} in this recipe; there are: {', '.join(known)}")
    assert recipe.features.photos is not None
    photos, root = files.absolute(recipe.features.photos), files.absolute(recipe.data.root)
    made = {}
    for name in splits or known:
        folder = files.join(root, name)
        with lease.held(folder, "features"):
            made[name] = _split(recipe, choices, files.join(photos, name), folder, overwrite)
    return made


def check(recipe: Recipe) -> None:
    """Raises ValueError for choices that cannot be."""
    from itm.data import files

    if recipe.features.photos is None:
        raise ValueError("set features.photos: the folder of the shards of photos (data.root is where the region shards go)")
    if files.absolute(recipe.features.photos) == files.absolute(recipe.data.root):
        raise ValueError(f"features.photos and data.root are both {recipe.data.root}: region shards need a folder of their own")
    if recipe.data.mix:
        raise ValueError("data.mix names the roots that are trained on: make the features of each with data.root, without the mix")
    if recipe.features.boxes and recipe.data.crop != "squash":
        raise ValueError(f"features.boxes needs data.crop=squash: with crop={recipe.data.crop} some boxes lie in what was cut off")
    if recipe.data.crop == "random":
        raise ValueError("data.crop=random is of training on pixels; features need center or squash")


def splits_named(recipe: Recipe) -> list[str]:
    """The splits that `itm pack` makes, else those that the recipe names."""
    if recipe.data.source is not None:
        from pipelines.pack import open_source

        return list(open_source(recipe.data.source).splits)
    data = recipe.data
    return list(dict.fromkeys(split for split in (data.train_split, data.val_split, data.test_split) if split))


def choices_of(recipe: Recipe) -> Choices:
    """What the features depend on; builds the encoder to know its weights."""
    from itm.data.preprocess import ImageInput
    from itm.matchers.encoders.build import build_image_encoder
    from itm.matchers.encoders.features import identity_of
    from pipelines.featuring import encoder_of
    from pipelines.featuring.actors import Choices
    from pipelines.featuring.boxes import read_boxes

    part, data = encoder_of(recipe), recipe.data
    image = ImageInput(size=data.image_size, crop=data.crop, exif=data.exif)
    boxes = recipe.features.boxes
    identity = identity_of(build_image_encoder(part.kind, **part.options), part.kind)
    sha256 = read_boxes(boxes).sha256 if boxes else None
    return Choices(part, image, data.regions_dtype == "fp32", recipe.features.keep_images, boxes, sha256, identity)


def featured(recipe: Recipe) -> dict[str, Manifest] | None:
    """The manifests of all splits, where each was finished from these photos and choices; None while there is work to do."""
    from itm.data import files
    from itm.data.feature_claim import read_claim
    from itm.data.manifest import NAME
    from itm.data.shards import read_manifest

    said = _claimed(choices_of(recipe))
    found = {}
    assert recipe.features.photos is not None
    for split in splits_named(recipe):
        folder = files.join(recipe.data.root, split)
        if not files.exists(files.join(folder, NAME)) or read_claim(folder) != said:
            return None
        photos, manifest = files.join(recipe.features.photos, split), read_manifest(folder)
        jobs = list(_jobs(said, photos, folder))
        if len([job for job in jobs if _usable(job)]) < len(jobs) or {s.name for s in manifest.shards} - {_name(j) for j in jobs}:
            return None
        found[split] = manifest
    return found


def _claimed(choices: Choices) -> Json:
    from itm.data.feature_claim import FORMAT

    return {"format": FORMAT, **json.loads(json.dumps(choices.said()))}


def _name(job: ShardJob) -> str:
    from itm.data import files

    return files.name_of(job.target)


def _jobs(said: Json, photos: str, folder: str) -> Iterator[ShardJob]:
    """One a shard of photos, which keeps its name. Raises ValueError as `read_manifest`."""
    from itm.data import files
    from itm.data.shards import read_manifest
    from pipelines.featuring.actors import digest
    from pipelines.on_ray.shard_actors import ShardJob

    for shard in read_manifest(photos).shards:
        made_from = digest(said, shard.sha256)
        yield ShardJob(files.join(photos, shard.name), shard.sha256, files.join(folder, shard.name), files.name_of(folder), made_from)


def _usable(job: ShardJob) -> Receipt | None:
    from itm.data import files
    from itm.data.manifest import read_receipt
    from pipelines.featuring.actors import sum_uri

    receipt = read_receipt(job.target)
    return receipt if receipt and receipt.made_from == job.made_from and files.exists(sum_uri(job.target)) else None


def _split(recipe: Recipe, choices: Choices, photos: str, folder: str, overwrite: bool) -> Manifest:
    from itm.data import files
    from itm.data.manifest import NAME, check_present, write_manifest
    from itm.data.shards import read_manifest
    from itm.progress import Progress

    source = read_manifest(photos)
    check_present(photos, source)
    said = _claimed(choices)
    _claim(folder, said, overwrite)
    if choices.boxes:
        _check_boxes(choices.boxes, photos, source)
    jobs = list(_jobs(said, photos, folder))
    with ThreadPoolExecutor(8) as pool:
        receipts = {job.target: receipt for job, receipt in zip(jobs, pool.map(_usable, jobs), strict=True) if receipt}
    todo = [job for job in jobs if job.target not in receipts]
    if not todo and files.exists(files.join(folder, NAME)) and _is_of(read_manifest(folder), jobs):
        return read_manifest(folder)
    with _tracked(recipe, folder, photos, said, source) as told:
        images = {s.name: s.samples for s in source.shards}
        with Progress(f"features {files.name_of(folder)}", sum(images[_name(job)] for job in todo), "image") as progress:
            for target in _extract(recipe, choices, todo):
                progress.update(images[files.name_of(target)])
        files.remove_abandoned(folder)
        manifest = _close(folder, jobs, source, recipe.data.max_reject_rate)
        told(manifest)
        write_manifest(folder, manifest)
    return manifest


def _is_of(manifest: Manifest, jobs: list[ShardJob]) -> bool:
    return {s.name for s in manifest.shards} <= {_name(job) for job in jobs} and manifest.source == _source(jobs)


def _source(jobs: list[ShardJob]) -> str:
    from pipelines.featuring.actors import digest

    return f"features {digest(*(job.made_from for job in jobs))}"


def _claim(folder: str, said: Json, overwrite: bool) -> None:
    """Mark the folder before the first shard. Raises ValueError where shards of other choices lie in it, unless told to delete them."""
    from itm.data import files
    from itm.data.feature_claim import CLAIM, read_claim
    from itm.data.manifest import NAME, QUARANTINE

    held = read_claim(folder)
    if held == said:
        return
    endings = (".tar", ".index.json", ".sum.npy", NAME, QUARANTINE, CLAIM, MEAN)
    others = sorted({f for suffix in endings for f in files.list_files(folder, suffix)}, key=lambda f: files.name_of(f) != NAME)
    if others and not overwrite:
        what = (
            "no features" if held is None else f"features of other choices ({', '.join(k for k in said if held.get(k) != said[k])} differ)"
        )
        raise ValueError(f"{folder} holds shards with {what}: name another data.root, or --overwrite them")
    for other in others:
        files.delete(other)
    files.write_atomic(files.join(folder, CLAIM), json.dumps(said, indent=1, sort_keys=True).encode())


def _check_boxes(uri: str, photos: str, source: Manifest) -> None:
    """Raises ValueError where the file names none of the photos of the first shard."""
    from itm.data import files
    from itm.data.shards import Sample, read_samples
    from pipelines.featuring.boxes import read_boxes

    boxes = read_boxes(uri)
    samples = [s for s in read_samples(files.join(photos, source.shards[0].name)) if isinstance(s, Sample)]
    if samples and not any(boxes.found(s.key, s.meta) for s in samples):
        raise ValueError(
            f"{uri} is of other photos: it names none of the {len(samples)} in the first shard of {photos} "
            f"(there {samples[0].key!r}, in the file {next(iter(boxes.of))!r}); image_id must be a sample's key or its image_id"
        )


def _extract(recipe: Recipe, choices: Choices, todo: list[ShardJob]) -> Iterator[str]:
    """Make the region shards in any order; yields each as it is written."""
    if not todo:
        return
    from pipelines.featuring.actors import Extract, Prepare
    from pipelines.on_ray.reach import shared
    from pipelines.on_ray.shard_actors import through_actors

    asked = recipe.features
    rows: list[Json] = [{"job": json.dumps(asdict(job))} for job in todo]
    with shared({"data.root": recipe.data.root}, read={"features.photos": asked.photos or ""}) as tokens:

        def given(device: str) -> tuple[object, ...]:
            return choices, asked.batch_size, device, tokens

        for row in through_actors(rows, Prepare(choices.image, tokens), Extract, given, asked.actors):
            yield row["uri"]


def _close(folder: str, jobs: list[ShardJob], source: Manifest, max_reject_rate: float) -> Manifest:
    """Quarantine table, mean feature and checks over all shards; the manifest, which is not written yet."""
    import numpy as np

    from itm.data import files
    from itm.data.manifest import QUARANTINE, manifest_of
    from pipelines.featuring.actors import sum_uri

    receipts = [receipt for job in jobs if (receipt := _usable(job))]
    problems = [problem for receipt in receipts for problem in receipt.problems]
    quarantine = files.join(folder, QUARANTINE)
    if problems or files.exists(quarantine):
        files.write_atomic(quarantine, "".join(p.row() + "\n" for p in problems).encode())
    made, rejected = sum(r.info.samples for r in receipts), sum(r.rejected for r in receipts)
    if len(receipts) < len(jobs) or made + rejected < source.samples:
        raise ValueError(f"{folder}: {made} region files and {rejected} rejected of {source.samples} photos; run `itm features` again")
    if rejected > max_reject_rate * (made + rejected):
        first = next(p for p in problems if p.what in ("sample", "shard"))
        raise ValueError(
            f"{folder}: {rejected:,} of {made + rejected:,} photos rejected, more than data.max_reject_rate={max_reject_rate:g}; "
            f"the first: {first.key}: {first.reason}. All are in {quarantine}"
        )
    sums: list[Any] = [np.load(io.BytesIO(files.read_bytes(sum_uri(job.target)))) for job in jobs]
    total = sum(held for held in sums if len(held) > 1)
    out = io.BytesIO()
    np.save(out, (total[:-1] / total[-1]).astype(np.float32))
    files.write_atomic(files.join(folder, MEAN), out.getvalue())
    return manifest_of(files.name_of(folder), _source(jobs), [r.info for r in receipts if r.info.samples], rejected)


def flow_line(folder: str, manifest: Manifest) -> str:
    """Both sums of a folder, as the last line of a stage states them."""
    from itm.data import files
    from itm.data.manifest import QUARANTINE, rejected_captions

    uri = files.join(folder, QUARANTINE)
    rows = [json.loads(row) for row in files.read_bytes(uri).decode().split("\n") if row] if files.exists(uri) else []
    boxes = sum(row["what"] == "member" and row["stage"] == "features" for row in rows)
    lost = rejected_captions(folder)
    return (
        f"{manifest.samples + manifest.rejected:,} images = {manifest.samples:,} with features + {manifest.rejected:,} rejected, "
        f"{manifest.captions + lost:,} captions = {manifest.captions:,} kept + {lost:,} rejected"
        + (f"; {boxes:,} images lost boxes that lie outside of them" if boxes else "")
    )


@contextmanager
def _tracked(recipe: Recipe, folder: str, photos: str, said: Json, source: Manifest) -> Iterator[Callable[[Manifest], None]]:
    """One run a split, for the time of the work; it is told the manifest when the shards are safe."""
    from itm.data import files
    from itm.tracking.lineage import DatasetRef, packages_used
    from itm.tracking.runs import Tracker

    split = files.name_of(folder)
    params = {"split": split, "photos": photos, "root": folder, "encoder": json.dumps(said["encoder"])[:400]}
    tags = {"stage": "features", **packages_used(recipe.model_dump(mode="json"))}
    data = [DatasetRef(split, source.fingerprint(), photos, "features")]
    with Tracker.start(recipe.registry.experiment, f"features {split}", params, tags, data) as tracker:

        def told(manifest: Manifest) -> None:
            flow = {"rows_in": manifest.samples + manifest.rejected, "rows_out": manifest.samples, "rows_rejected": manifest.rejected}
            tracker.metrics(flow | {"captions": manifest.captions, "bytes": sum(s.bytes for s in manifest.shards)})
            tracker.flush()

        yield told


if __name__ == "__main__":
    script(__file__)
