"""Everything about a training that can be refused is refused here, before a worker starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

import itm
from itm.config import Recipe, Text
from itm.data import files
from itm.data.feature_claim import read_claim
from itm.data.manifest import Manifest, check_present
from itm.data.mix import MixedStore, Mixture, folders_of, parts_of
from itm.data.pixels import decode
from itm.data.preprocess import ImageInput, Inputs, read_regions, reads_regions
from itm.data.records import Problem
from itm.data.shards import Sample, read_manifest, read_samples
from itm.data.sidecar import Store
from itm.data.text import build_tokenizer
from itm.evaluation.relations import check_annotated
from itm.matchers.encoders.build import Encoder
from itm.matchers.encoders.features import identity_of
from itm.matchers.folder import save_matcher
from itm.precision import resolve_precision, warn_if_slow
from itm.teachers.online import Online
from itm.teachers.stores import crops_of, roots_of, store_for
from itm.tracking.loggers import check_loggers
from itm.training.cached import check_cached
from itm.training.compiled import check_compiler
from itm.types import Matcher
from pipelines.training.course import Course
from pipelines.training.ending import check_watched
from pipelines.training.job import START, Job, build_method


def training_manifest(recipe: Recipe) -> Manifest | Mixture:
    """Of the training split below data.root, or of those that data.mix names. Raises ValueError as `read_manifest`."""
    data = recipe.data
    if not data.mix:
        return read_manifest(files.join(data.root, data.train_split))
    uris = tuple(files.join(one.root, data.train_split) for one in data.mix)
    return Mixture(data.train_split, uris, tuple(one.weight for one in data.mix), tuple(map(read_manifest, uris)))


def prepare(recipe: Recipe, manifest: Manifest | Mixture) -> Job:
    """Everything that can be refused is refused here: too few pairs, a missing store or split, a method that the model cannot serve."""
    data, train = recipe.data, recipe.train
    split = files.join(data.root, data.train_split)
    manifest.check_captioned(split, "trained on")
    if data.val_split:
        try:
            val = files.join(data.root, data.val_split)
            read_manifest(val).check_captioned(val, "validated on")
        except ValueError as error:
            raise ValueError(f"{error}; or train without validation: data.val_split=\"''\"") from None
        if "isda" in recipe.evaluation.relations:
            check_annotated(val)
    elif recipe.evaluation.relations:
        raise ValueError("evaluation.relations are measured in validations, and data.val_split is empty: name a split, or leave them out")
    if train.patience is not None:
        check_watched(recipe, "train.patience")
    course = Course.of(recipe, manifest)
    for part, held in parts_of(split, manifest):
        check_present(part, held)
    captions = captions_of(split, manifest) if recipe.text.kind == "words" and not recipe.text.path and not train.start else None
    first = first_sample(split, manifest, "regions" if reads_regions(data) else "pixels")
    if first is None and data.cache_features:
        raise ValueError(f"data.cache_features: {split} holds no features; run `itm features`, or train without it")
    image = ImageInput.trained_on(data, first[0] if first else None)
    tokenizer = started_from(recipe).inputs.tokenizer if train.start else build_tokenizer(recipe.text, captions)
    if train.start:
        agreed_text(recipe.text, tokenizer, train.start)
    inputs = Inputs(image, tokenizer)
    method = build_method(recipe, inputs)
    if data.cache_features:
        check_features(recipe, method.matcher, [folder for folder, _ in parts_of(split, manifest)])
    if recipe.evaluation.relations:
        method.matcher.check_relations()
    check_loggers(recipe)
    if not train.use_gpu:
        warn_if_slow(train.precision, torch.device("cpu"))
    elif not train.workers:  # others have devices of their own
        resolve_precision(train.precision, torch.device("cuda"))
    if train.compile and not train.use_gpu:
        check_compiler(torch.device("cpu"))
    if first:
        try_out(method.matcher, inputs, first)
    if first and train.cache_chunk is not None:
        check_cached(method.matcher, inputs.images([first[0]] * 2), inputs.captions([first[1]] * 2))
    online = {modality: Online.of(recipe.teachers, modality) for modality in recipe.teachers.online if modality in method.needs_teacher}
    stores = {modality: store_of(recipe, manifest, modality) for modality in method.needs_teacher if modality not in online}
    return Job(recipe, manifest, course, inputs, stores, run_id="", tracking_uri="", online=online)


def check_features(recipe: Recipe, matcher: Matcher, splits: list[str]) -> None:
    """Raises ValueError unless the region files of these splits, and of validation, are what the matcher's frozen image tower gives."""
    data, part = recipe.data, recipe.model.options.get("image") or {}
    tower = next((layer for layer in matcher.layers() if isinstance(layer, Encoder) and layer.reads_features), None)
    if tower is None or data.image == "regions":
        raise ValueError(
            "data.cache_features keeps what a frozen image tower gives: set model.options.image.freeze=true (of hf_vision also cells), "
            "data.image=pixels, or leave it out"
        )
    wanted = json.loads(json.dumps({"encoder": identity_of(tower, part["kind"]), "image": ImageInput.of(data).said(), "boxes": None}))
    for folder in splits + ([files.join(data.root, data.val_split)] if data.val_split else []):
        held = read_claim(folder)
        if held is None:
            raise ValueError(
                f"data.cache_features: {folder} holds no features that `itm features` made; run it, or point data.root at them"
            )
        if differ := [name for name in wanted if _shown(held.get(name)) != _shown(wanted[name])]:
            raise ValueError(
                f"data.cache_features: the features in {folder} are not of this image tower ({', '.join(differ)} differ): "
                "run `itm features` for it, into another data.root"
            )


def _shown(said: object) -> object:
    """Without what does not change the pixels of a photo that is not augmented."""
    if not isinstance(said, dict):
        return said
    other = "kind", "flip", "max_regions", "region_width", "exact", "scaled"
    return {name: value for name, value in said.items() if name not in other} or said


def try_out(matcher: Matcher, inputs: Inputs, first: tuple[bytes, str]) -> None:
    """Encode one pair, without a trace in the matcher. Raises ValueError where its sizes do not fit the data: before a worker starts."""
    training = matcher.training
    with torch.no_grad():
        matcher.eval()
        matcher.encode_images(inputs.images([first[0]]))
        matcher.encode_captions(inputs.captions([first[1]]))
    matcher.train(training)


def started_from(recipe: Recipe) -> Matcher:
    """The matcher that the run fine-tunes, as it was when the run began."""
    kept = files.join(recipe.folder, START)
    if not files.exists(files.join(kept, "config.json")):
        save_matcher(itm.load_matcher(str(recipe.train.start), allow=recipe.allowed), kept)
    return itm.load_matcher(kept, allow=recipe.allowed)


def agreed_text(text: Text, tokenizer: Any, start: str) -> None:
    """Raises ValueError where the recipe says of the captions what the tokenizer of the matcher it starts from does not do."""
    said = text.model_fields_set
    differ = [
        f"text.{name}: {given!r} here, {found!r} there"
        for name, given in text.model_dump(include=said & {"clean", "max_length"}).items()
        if (found := getattr(tokenizer, name, given)) != given
    ]
    if differ:
        raise ValueError(
            f"the recipe contradicts the tokenizer of train.start={start}, which a run takes over: {'; '.join(differ)}. Take the keys out "
            "of the recipe (or give them its values), or make the matcher again by `itm import` with those that you want"
        )


def captions_of(split: str, manifest: Manifest | Mixture) -> Iterator[str]:
    for folder, shard in zip(folders_of(split, manifest), manifest.shards, strict=True):
        for item in read_samples(files.join(folder, shard.name)):
            if isinstance(item, Sample):
                yield from (caption.text for caption in item.captions)


def first_sample(split: str, manifest: Manifest | Mixture, kind: str) -> tuple[bytes, str] | None:
    """(image or region bytes, caption) of the first sample that has what the recipe trains on."""
    for folder, shard in zip(folders_of(split, manifest), manifest.shards, strict=True):
        for item in read_samples(files.join(folder, shard.name)):
            data = None if isinstance(item, Problem) else item.regions if kind == "regions" else item.image
            with suppress(ValueError):
                if (
                    isinstance(item, Sample)
                    and item.captions
                    and data is not None
                    and (decode(data) if kind == "pixels" else read_regions(data, 1))
                ):
                    return data, item.captions[0].text
    return None


def store_of(recipe: Recipe, manifest: Manifest | Mixture, modality: str) -> Store | MixedStore:
    """The finished store of the recipe's teacher, which must have scored every shard. Raises ValueError with the remedy."""
    if getattr(recipe.teachers, modality) is None:
        raise ValueError(f"method {recipe.method.kind!r} needs {modality} teacher vectors: set teachers.{modality} and run `itm teach`")
    stores = []
    for one, part in zip(roots_of(recipe), parts_of("", manifest), strict=True):
        store = store_for(one, recipe.data.train_split, modality)
        store.check((shard.name, shard.sha256) for shard in part[1].shards)
        stores.append(replace(store, crops=crops_of(recipe, store)) if modality == "image" else store)
    return MixedStore(tuple(stores)) if recipe.data.mix else stores[0]
