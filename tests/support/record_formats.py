"""Writes one of everything that itm leaves on disk, and a record of names, shapes, keys and bytes.

    python -m tests.support.record_formats FOLDER       # recipe.yaml, formats.json, scores.json, {shards,runs,matchers,registry}.tar.gz

`tests/fixtures/v0_1_0` was written so by version 0.1.0 (19b1783), whose modules had other names than the imports below; it is never
written again. A version that raises the number of a format writes a folder of its own beside it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import itm
from itm.config import Part, Recipe, Train, load_recipe, parse_recipe
from itm.data.preprocess import ImageInput, Inputs
from itm.data.records import Regions
from itm.data.shards import Sample, read_samples
from itm.data.text import SPECIAL, HFTokenizer, WordVocabulary
from itm.evaluation.dataset import encode_split
from itm.evaluation.tiles import Grid, TileStore, fill
from itm.kinds import build_part
from itm.matchers.folder import build_matcher, save_matcher
from itm.methods import METHODS
from itm.training.optim import build_optimizer
from itm.training.step import Step
from pipelines.evaluate import evaluate
from pipelines.pack import pack
from pipelines.register import register
from pipelines.teach import teach
from pipelines.train import train
from tests.support.every_matcher import KINDS, POSITIONS, REGIONS, WORDS, batch_of, matcher_of

RECIPE = """\
name: whole
output: runs
data:
  source: {kind: scenes, options: {world: tiny, n_train: 12, n_val: 4, n_test: 4}}
  root: shards
  shard_samples: 6
  image_size: 16
  crop: squash
  shuffle_window: 2
text: {max_length: 16}
teachers:
  image: {kind: statistics, options: {size: 16}}
  text: {kind: scenes_text, options: {world: tiny}}
model:
  kind: clip
  options:
    heads: {cross: true, uni: true}
    config:
      model_type: clip
      projection_dim: 8
      text_config: {vocab_size: 64, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8,
                    max_position_embeddings: 16, bos_token_id: 1, eos_token_id: 2}
      vision_config: {hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8, image_size: 16, patch_size: 8}
method: {kind: cusa, options: {itc: {tau: 0.07}}}
train: {batch_size: 6, steps: 8, workers: 0, lr: 0.01, ema: 0.9, validate_every: 2, checkpoint_every: 2, log_every: 1}
registry: {experiment: recorded, model: recorded}
"""
SMALLER = {"dual": {"text": {"kind": "pooled_gru", "word_dim": 8, "hidden": 8}}}
STOPPED_AT = 5  # the checkpoints of steps 2 and 4 are there, step 5 is lost
STORES = {"fp16": {}, "int8": {"text": None}, "fp32": {"image": None}}
COLOURS = ("red", "green", "blue", "yellow")
TEXTS = ["a red circle", "a blue square left of a green star", "the yellow circle"]
VOCABULARY = ["a", "the", "left", "right", "above", "below", "of", *COLOURS, "circle", "square", "star", "triangle"]
METHOD_OPTIONS: dict[str, dict[str, Any]] = {"matching": {}, "cusa": {}, "iais": {"schedule": "constant", "ranking": {"hard_negatives": 2}}}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    Path("recipe.yaml").write_text(RECIPE)
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///registry/mlflow.db"
    Path("registry").mkdir()
    recipe = load_recipe("recipe.yaml")
    make_data(recipe)
    train(recipe)
    evaluate(recipe)
    register(recipe)
    train_until_stopped(load_recipe("recipe.yaml", ["name=stopped"]))
    make_score_store(recipe)
    scores = {name: make_matcher(name, Path("matchers")) for name in KINDS}
    Path("scores.json").write_text(as_text(scores))
    Path("formats.json").write_text(as_text(record(Path("."))))
    shutil.rmtree("runs/whole/checkpoints")  # a finished run does without
    for name in ("matchers", "registry", "runs", "shards"):
        pack_up(Path(name))


def make_data(recipe: Recipe) -> None:
    """Shards of all splits, and the stores of the training split in each number format."""
    pack(recipe)
    for dtype, left_out in STORES.items():
        teach(recipe.model_copy(update={"teachers": recipe.teachers.model_copy(update={"dtype": dtype, **left_out})}))


def train_until_stopped(recipe: Recipe) -> None:
    """A run that ended, as by a kill, when it was about to take step `STOPPED_AT`."""
    whole = Step.__call__

    def dying(self: Step, batches: Any, number: int) -> Any:
        if number == STOPPED_AT:
            raise KeyboardInterrupt
        return whole(self, batches, number)

    Step.__call__ = dying  # type: ignore[method-assign]
    try:
        train(recipe)
    except KeyboardInterrupt:
        pass
    finally:
        Step.__call__ = whole  # type: ignore[method-assign]


def make_matcher(name: str, root: Path) -> list[list[float]]:
    """A matcher of `KINDS` after three steps, with its preparation, as a folder; returns its scores of `images_for` x `TEXTS`."""
    torch.manual_seed(0)
    kind, options = KINDS[name]
    options = options | SMALLER.get(name, {})
    pixels = kind == "clip" or options.get("image", {}).get("kind") == "conv"
    image = ImageInput(size=16, crop="squash") if pixels else ImageInput("regions", max_regions=REGIONS, region_width=6)
    words = [*SPECIAL, *VOCABULARY, *(f"word{n}" for n in range(WORDS - len(SPECIAL) - len(VOCABULARY)))]
    tokenizer: Any = WordVocabulary({word: n for n, word in enumerate(words)}, max_length=POSITIONS)
    if kind == "clip":
        tokenizer = hugging_face(words, root.parent / "tokenizer")
    matcher: Any = build_matcher(Part(kind=kind, options=options), Inputs(image, tokenizer))
    method = build_part(METHODS, "matching", {}, "method", matcher=matcher)
    settings = Train(lr=1e-2, schedule="constant")
    step = Step(method, build_optimizer(method, settings), settings, lambda _: 1e-2, None, seed=0)
    for number in range(3):
        step([batch_of(6)], number)
    if name == "dual":  # the many weights of its convolutions, so that they compress
        for weights in matcher.image_encoder.parameters():
            weights.data = (weights.data * 16).round() / 16
    save_matcher(matcher, root / name)
    return scores_of(itm.load_matcher(root / name), root.parent / "shards")


def hugging_face(words: list[str], folder: Path) -> HFTokenizer:
    """A tokenizer of another library with the same ids."""
    raw = RawTokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    tokenizer = HFTokenizer(folder, max_length=POSITIONS)
    shutil.rmtree(folder)
    return tokenizer


def make_score_store(recipe: Recipe) -> None:
    """The scores of the test split in tiles of two images."""
    matcher = itm.load_matcher("runs/whole/matcher")
    seen = encode_split(matcher, "shards/test")
    grid = Grid.of([matcher], seen.images, seen.captions, rows=2)
    store = TileStore.create(recipe.folder, {"recorded": "test split"}, grid, seen.captions)
    fill(store, [matcher], [(seen.images, seen.captions)], (seen.names.image_keys, seen.names.caption_ids))


def scores_of(matcher: Any, shards: Path) -> list[list[float]]:
    """(images, captions), five digits after the point."""
    inputs = matcher.inputs
    with torch.no_grad():
        images = matcher.encode_images(inputs.images(images_for(inputs, shards)))
        scores = matcher.score(images, matcher.encode_captions(inputs.captions(TEXTS)))
    return [[round(value, 5) for value in row] for row in scores.tolist()]


def images_for(inputs: Inputs, shards: Path) -> list[bytes]:
    """Three images as `inputs` wants them: those of the test split, or region files of a formula."""
    if inputs.image.kind == "pixels":
        return [s.image for s in read_samples(f"{shards}/test/00000.tar") if isinstance(s, Sample) and s.image is not None][:3]
    rows = []
    for n in range(3):
        features = np.sin(np.arange(REGIONS * 6).reshape(REGIONS, 6) * (n + 1)).astype(np.float16)
        corners = np.array([[r, n, r + 8, n + 10] for r in range(REGIONS)], np.float32)
        rows.append(Regions(features, corners, 20, 16, np.ones(REGIONS, np.float32)).to_npz())
    return rows


# --- the record: nothing in it depends on the floats of a machine ----------------------------------------------------------------------


def record(folder: Path) -> dict[str, Any]:
    """What is the same on every machine of what `main` wrote into `folder`."""
    matchers = {name: shapes_of(matcher_of(name).state_dict()) for name in KINDS}
    return {
        "matchers": matchers,
        "methods": {f"{kind} {name}": method_of(kind, name, matchers[name]) for kind in METHODS for name in KINDS},
        "matcher folders": {path.name: folder_of(path) for path in sorted((folder / "matchers").iterdir())},
        "shards": {str(p.relative_to(folder / "shards")): sha256(p) for p in packed(folder / "shards")},
        "sidecars": {dtype: sidecars_of(folder, dtype) for dtype in STORES},
        "run": run_of(folder / "runs" / "whole"),
        "fingerprints": {name: load_recipe(folder / "recipe.yaml", [f"name={name}"]).fingerprint() for name in ("whole", "stopped")},
        "defaults": parse_recipe({"name": "x", "model": {"kind": "dual"}}).model_dump(mode="json"),
    }


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" for name, value in state.items()}


def method_of(kind: str, name: str, matcher: dict[str, str]) -> dict[str, str] | str:
    """The names of a method beside those of its matcher, or `refused`."""
    try:
        method = build_part(METHODS, kind, METHOD_OPTIONS[kind], "method", matcher=matcher_of(name))
    except ValueError:
        return "refused"
    shapes = shapes_of(method.state_dict())
    assert {f"matcher.{key}": value for key, value in matcher.items()}.items() <= shapes.items()
    return {key: value for key, value in shapes.items() if not key.startswith("matcher.")}


def folder_of(folder: Path) -> dict[str, Any]:
    """The keys in their order of each JSON that is ours, and the weights, of a matcher folder."""
    ours = [p for p in sorted(folder.rglob("*.json")) if p.name not in ("tokenizer.json", "tokenizer_config.json")]
    found: dict[str, Any] = {str(p.relative_to(folder)): keys_of(json.loads(p.read_text())) for p in ours}
    return found | {"model.safetensors": weights_of(folder / "model.safetensors")}


def weights_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as held:
        return {name: f"{held.get_slice(name).get_dtype()} {held.get_slice(name).get_shape()}" for name in sorted(held.keys())}


def keys_of(value: Any) -> Any:
    """The keys of nested objects in their order; of words, numbers and lists nothing."""
    return {key: keys_of(inner) for key, inner in value.items() if key != "word2idx"} if isinstance(value, dict) else type(value).__name__


def packed(shards: Path) -> list[Path]:
    return sorted(p for p in shards.rglob("*") if p.is_file() and p.parent.parent == shards)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sidecars_of(folder: Path, dtype: str) -> dict[str, Any]:
    found = {}
    for receipt in sorted((folder / "shards" / "train" / "teachers").glob("*/store.json")):
        store = json.loads(receipt.read_text())
        if store["dtype"] != dtype:
            continue
        with pa.memory_map(str(receipt.parent / "00000.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        found[store["modality"]] = {
            "store": receipt.parent.name,
            "store.json": keys_of(store),
            "columns": [f"{field.name} {field.type}" for field in table.schema],
            "metadata": {key.decode(): json.loads(value) for key, value in table.schema.metadata.items()},
            "keys": table["key"].to_pylist(),
        }
    return found


def run_of(folder: Path) -> dict[str, Any]:
    """Files of a run folder, the keys of its JSON files, the names in its newest checkpoint and in its best matcher."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "scores-" not in str(p))
    newest = max(folder.glob("checkpoints/*.optimizer.pt"))
    saved = torch.load(newest, weights_only=True)
    weights = {kind: folder / "checkpoints" / newest.name.replace("optimizer.pt", f"{kind}.safetensors") for kind in ("model", "average")}
    return {
        "files": files,
        "run.json": keys_of(json.loads((folder / "run.json").read_text())),
        "started.json": keys_of(json.loads((folder / "started.json").read_text())),
        "checkpoint": keys_of(json.loads((folder / "checkpoints" / newest.name.replace("optimizer.pt", "json")).read_text())),
        "losses.jsonl": list(json.loads((folder / "losses.jsonl").read_text().splitlines()[0])),
        "weights": {kind: weights_of(path) for kind, path in weights.items()},
        "best": weights_of(next(folder.glob("checkpoints/best-*.safetensors"))),
        "optimizer": {
            "keys": sorted(saved),
            "state": {str(key): shapes_of(state) for key, state in saved["optimizer"]["state"].items()},
            "groups": [sorted(group) for group in saved["optimizer"]["param_groups"]],
        },
    }


def as_text(value: Any) -> str:
    """JSON with a line for whatever fits into one: short, and a difference is seen."""

    def lines(value: Any, indent: str) -> str:
        whole = json.dumps(value)
        if not isinstance(value, dict) or len(indent) + len(whole) < 130:
            return whole
        inner = (f"{indent} {json.dumps(str(key))}: {lines(held, indent + ' ')}" for key, held in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"

    return lines(value, "") + "\n"


def pack_up(folder: Path) -> None:
    """`folder` becomes one file, the same for the same content."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size = path.stat().st_size
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    folder.with_suffix(".tar.gz").write_bytes(gzip.compress(held.getvalue(), 9, mtime=0))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
