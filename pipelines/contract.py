"""What each stage of a recipe reads and writes, and what makes it done: declared here once, read by `itm plan` and `itm run`.

A stage is done when what it writes last is there and was made from what its inputs are now. `done` looks at receipts and never works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, read_json
from pipelines.featuring import of_photos

if TYPE_CHECKING:
    from pipelines.indexing.building import Wanted


@dataclass(frozen=True)
class Contract:
    """One stage of a recipe, by the name of its command.

    asked: whether the recipe asks for it. reads, writes: URIs. manifest: what it writes last, one URI an output.
    done: one line about the finished work, None when there is work to do. work: does it, returns the same line.
    """

    stage: str
    asked: Callable[[Recipe], bool]
    reads: Callable[[Recipe], list[str]]
    writes: Callable[[Recipe], list[str]]
    manifest: Callable[[Recipe], list[str]]
    done: Callable[[Recipe], str | None]
    work: Callable[[Recipe], str]


def stages_of(recipe: Recipe) -> list[Contract]:
    """The stages that a recipe asks for, in the order of time."""
    return [contract for contract in CONTRACTS if contract.asked(recipe)]


def split_uri(recipe: Recipe, split: str) -> str:
    return files.join(recipe.data.root, split)


def in_run(*names: str) -> Callable[[Recipe], list[str]]:
    """URIs of files of a run's folder."""
    return lambda recipe: [files.join(recipe.folder, name) for name in names]


# --- pack -------------------------------------------------------------------------------------------------------------------------------


def _raw(recipe: Recipe) -> list[str]:
    """The paths that a source's options name; a generated source has none."""
    source = recipe.data.source
    options = source.options if source else {}
    named = [options[key] for key in ("path", "images", "texts", "features", "image_root") if options.get(key)]
    return [path for value in named for path in _flat(value)]


def _flat(value: object) -> list[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(v) for v in values))


def splits_of(recipe: Recipe) -> list[str]:
    """The splits that `itm pack` makes, else those that the recipe names."""
    from pipelines.features import splits_named

    return splits_named(recipe)


def _packed(recipe: Recipe) -> str | None:
    from pipelines.pack import packed

    manifests = packed(recipe)
    if manifests is None:
        return None
    return ", ".join(f"{split} {m.samples:,} images, {m.captions:,} captions, {m.rejected:,} rejected" for split, m in manifests.items())


def _pack(recipe: Recipe) -> str:
    from pipelines.pack import pack

    pack(recipe)
    return _packed(recipe) or ""


# --- features -------------------------------------------------------------------------------------------------------------------------


def _asks_features(recipe: Recipe) -> bool:
    return recipe.features.photos is not None


def _photo_shards(recipe: Recipe) -> list[str]:
    boxes = [recipe.features.boxes] if recipe.features.boxes else []
    return [split_uri(of_photos(recipe), split) for split in splits_of(recipe)] + boxes


def _photo_manifests(recipe: Recipe) -> list[str]:
    return [files.join(uri, "manifest.json") for split in splits_of(recipe) for uri in [split_uri(of_photos(recipe), split)]]


def _featured(recipe: Recipe) -> str | None:
    from pipelines.features import check, featured

    check(recipe)
    try:
        manifests = featured(recipe)
    except ValueError:  # no photos yet
        return None
    return None if manifests is None else ", ".join(f"{split} {m.samples:,} images" for split, m in manifests.items())


def _features(recipe: Recipe) -> str:
    from pipelines.features import features

    return ", ".join(f"{split} {m.samples:,} images, {m.rejected:,} rejected" for split, m in features(recipe).items())


# --- teach, train -----------------------------------------------------------------------------------------------------------------------


def _modalities(recipe: Recipe) -> list[str]:
    """Of the teachers that have stores."""
    return list(recipe.teachers.stored)


def _stores_root(recipe: Recipe) -> list[str]:
    from itm.teachers.stores import roots_of, stores_root

    return [stores_root(one, one.data.train_split) for one in roots_of(recipe)]


def _taught(recipe: Recipe) -> str | None:
    from itm.data.shards import read_manifest
    from itm.teachers.stores import roots_of, store_for

    try:
        for one in roots_of(recipe):
            shards = [(s.name, s.sha256) for s in read_manifest(split_uri(one, one.data.train_split)).shards]
            stores = {modality: store_for(one, one.data.train_split, modality) for modality in _modalities(one)}
            for store in stores.values():
                store.check(iter(shards))
    except ValueError:  # no manifest, no store, or a store of other shards: there is work to do
        return None
    return ", ".join(f"{modality} {store.teacher}" for modality, store in stores.items())


def _teach(recipe: Recipe) -> str:
    from pipelines.teach import teach

    return ", ".join(f"{modality} {uri}" for modality, uri in teach(recipe).items())


def _train_inputs(recipe: Recipe) -> list[str]:
    splits = _train_split(recipe) + ([split_uri(recipe, recipe.data.val_split)] if recipe.data.val_split else [])
    return splits + (_stores_root(recipe) if _modalities(recipe) else []) + ([recipe.train.start] if recipe.train.start else [])


def _trained(recipe: Recipe) -> str | None:
    from pipelines.training.driver import finished

    done = finished(recipe)
    return _about_training(done) if done else None


def _train(recipe: Recipe) -> str:
    from pipelines.train import train

    return _about_training(train(recipe))


def _about_training(done: Json) -> str:
    best = f", best validation rSum {done['best']['metrics']['rsum']:.1f} at step {done['best']['step']}" if done.get("best") else ""
    return f"{done['steps']:,} steps in {done['seconds']:.0f} s{best}; {done['matcher']}"


# --- index ----------------------------------------------------------------------------------------------------------------------------


def _asks_index(recipe: Recipe) -> bool:
    return bool(recipe.index.splits) and _is_trained(recipe)


def _index_inputs(recipe: Recipe) -> list[str]:
    return [files.join(recipe.folder, "matcher"), *(split_uri(recipe, split) for split in recipe.index.splits)]


def _index_output(recipe: Recipe) -> list[str]:
    return [recipe.index.output or files.join(recipe.folder, "index")]


def _index_receipt(recipe: Recipe) -> list[str]:
    return [files.join(uri, "index.json") for uri in _index_output(recipe)]


def _indexed(recipe: Recipe) -> str | None:
    from itm.retrieval.store import NAME
    from pipelines.index import flow_line
    from pipelines.indexing.building import finished

    wanted = _wanted_index(recipe)
    if not files.exists(files.join(wanted.output, NAME)):
        return None
    catalogue = finished(wanted)
    return None if catalogue is None else flow_line(catalogue)


def _wanted_index(recipe: Recipe) -> Wanted:
    from pipelines.indexing.building import Wanted

    model, *splits = _index_inputs(recipe)
    allowed = tuple(recipe.allowed)
    return Wanted(model, tuple(splits), _index_output(recipe)[0], recipe.index.dtype, workers=recipe.train.workers or 0, allow=allowed)


def _index(recipe: Recipe) -> str:
    from dataclasses import replace

    from pipelines.index import flow_line, index

    catalogue = index(replace(_wanted_index(recipe), overwrite=True))
    assert catalogue is not None
    return flow_line(catalogue)


# --- evaluate, register, report ---------------------------------------------------------------------------------------------------------


def _members(recipe: Recipe) -> list[str]:
    return recipe.evaluation.ensemble or [files.join(recipe.folder, "matcher")]


def _evaluate_inputs(recipe: Recipe) -> list[str]:
    return [*_members(recipe), split_uri(recipe, recipe.data.test_split)]


def _evaluated(recipe: Recipe) -> str | None:
    import itm
    from itm.data.shards import read_manifest
    from itm.matchers.weights import weights_hash
    from pipelines.evaluating import FORMAT

    output = files.join(recipe.folder, "evaluation.json")
    if not files.exists(output):
        return None
    said = read_json(output, FORMAT)
    expected = [recipe.evaluation.protocol, read_manifest(split_uri(recipe, recipe.data.test_split)).fingerprint()]
    if [said.get("protocol_name"), said.get("split_hash")] != expected:
        return None
    hashes = "+".join(weights_hash(itm.load_matcher(member, allow=recipe.allowed)) for member in _members(recipe))
    return _about_evaluation(recipe, said) if said.get("matcher_hash") == hashes else None


def _evaluate(recipe: Recipe) -> str:
    from pipelines.evaluate import evaluate

    return _about_evaluation(recipe, evaluate(recipe))


def _about_evaluation(recipe: Recipe, result: Json) -> str:
    names = dict.fromkeys((recipe.registry.metric, "i2t_r1", "t2i_r1", "rsum"))
    metrics, chance = result["metrics"], result["chance"]
    shown = [f"{name} {metrics[name]:.4g} (chance {_or_none(chance.get(name))})" for name in names if name in metrics]
    return ", ".join(shown) or f"{len(metrics)} metrics"


def _or_none(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def _register_inputs(recipe: Recipe) -> list[str]:
    """An ensemble is put together when it is registered."""
    if recipe.evaluation.ensemble:
        return [*_members(recipe), *in_run("evaluation.json")(recipe)]
    return in_run("matcher", "evaluation.json", "run.json")(recipe)


def _registered(recipe: Recipe) -> str | None:
    from pipelines.register import receipt

    done = receipt(recipe)
    return f"models:/{done['model']}/{done['version']}: {done['reason']}" if done else None


def _register(recipe: Recipe) -> str:
    from pipelines.register import register

    done = register(recipe)
    return f"{done.uri}: {done.reason}"


def _reported(recipe: Recipe) -> str | None:
    page, *made_from = in_run("report.html", "evaluation.json", "run.json")(recipe)
    if not files.exists(page):
        return None
    written = files.modified(page)
    return page if all(files.modified(uri) <= written for uri in made_from if files.exists(uri)) else None


def _report(recipe: Recipe) -> str:
    from pipelines.report import report

    return report(recipe)


def _is_trained(recipe: Recipe) -> bool:
    return not recipe.evaluation.ensemble


def _manifests(recipe: Recipe) -> list[str]:
    return [files.join(recipe.data.root, split, "manifest.json") for split in splits_of(recipe)]


def _shards(recipe: Recipe) -> list[str]:
    return [split_uri(recipe, split) for split in splits_of(recipe)]


def _packed_shards(recipe: Recipe) -> list[str]:
    return _shards(of_photos(recipe))


def _train_split(recipe: Recipe) -> list[str]:
    """The folder that is trained on, or those that data.mix names."""
    roots = [one.root for one in recipe.data.mix] or [recipe.data.root]
    return [files.join(root, recipe.data.train_split) for root in roots]


def _registry(recipe: Recipe) -> list[str]:
    return [f"models:/{recipe.registry.model}"]


def _store_receipts(recipe: Recipe) -> list[str]:
    return [files.join(root, "<teacher>", "store.json") for root in _stores_root(recipe)]


_run_receipt, _evaluation, _registration, _page = map(in_run, ("run.json", "evaluation.json", "registered.json", "report.html"))
_training = in_run("matcher", "losses.jsonl", "checkpoints")

CONTRACTS = (
    Contract("pack", lambda r: r.data.source is not None, _raw, _packed_shards, _photo_manifests, _packed, _pack),
    Contract("features", _asks_features, _photo_shards, _shards, _manifests, _featured, _features),
    Contract(
        "teach",
        lambda r: bool(_modalities(r)),
        _train_split,
        _stores_root,
        _store_receipts,
        _taught,
        _teach,
    ),
    Contract("train", _is_trained, _train_inputs, _training, _run_receipt, _trained, _train),
    Contract("evaluate", lambda r: True, _evaluate_inputs, _evaluation, _evaluation, _evaluated, _evaluate),
    Contract("register", lambda r: True, _register_inputs, _registry, _registration, _registered, _register),
    Contract("index", _asks_index, _index_inputs, _index_output, _index_receipt, _indexed, _index),
    Contract("report", lambda r: True, in_run("evaluation.json", "run.json", "losses.jsonl"), _page, _page, _reported, _report),
)
