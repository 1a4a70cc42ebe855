"""The debug twin of a recipe: the same model, method and loop on tiny scenes, small enough to run in seconds anywhere.

    itm train -c sgr-f30k --debug

Sizes shrink, data and pre-trained weights are replaced by what needs no download; every choice that makes the method what it is stays.
"""

from __future__ import annotations

from itm.config import Recipe, parse_recipe
from itm.data.formats import Json

REGION_WIDTH = 358  # of the regions of scenes
REGIONS = 6
SIZES = {
    "width": 32,
    "word_dim": 16,
    "sim_dim": 16,
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "positions": 64,
    "in_width": REGION_WIDTH,
    "region_dim": REGION_WIDTH,
    "regions": REGIONS,
}
CLIP_CONFIG = {
    "projection_dim": 32,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
}


def debug_twin(recipe: Recipe) -> Recipe:
    """A recipe named <name>-debug: 3 steps on scenes-tiny, inside this process."""
    choices = recipe.model_dump(mode="json")
    regions = recipe.data.image == "regions"
    source = {"kind": "scenes", "options": {"world": "tiny", "regions": regions}}
    stored = "" if recipe.data.regions_dtype == "fp16" else f"-{recipe.data.regions_dtype}"
    root = f"{recipe.output.rstrip('/')}/debug-shards-{recipe.data.image}{stored}"
    choices["name"] = f"{recipe.name}-debug"
    choices["data"] |= {"source": source, "root": root, "image_size": 64, "crop": "squash", "max_regions": REGIONS, "shard_samples": 100}
    choices["data"] |= {"train_split": "train", "val_split": "val", "test_split": "test"}
    choices["text"] = {"kind": "words", "max_length": 32}
    if recipe.teachers.image or recipe.teachers.text:
        choices["teachers"] |= {"root": None, "image": {"kind": "scenes_image", "options": {"world": "tiny"}}}
        choices["teachers"]["text"] = {"kind": "scenes_text", "options": {"world": "tiny"}}
    choices["model"]["options"] = _model(recipe.model.kind, choices["model"]["options"])
    choices["train"] |= {
        "start": None,
        "batch_size": 16,
        "steps": 3,
        "epochs": None,
        "workers": 0,
        "use_gpu": False,
        "warmup_steps": 1,
        "validate_every": 3,
    }
    choices["train"] |= {"log_every": 1, "checkpoint_every": None}
    members = [uri.rstrip("/").split("/")[-2] for uri in recipe.evaluation.ensemble]
    choices["evaluation"] |= {"protocol": "auto", "ensemble": [f"{recipe.output.rstrip('/')}/{name}-debug/matcher" for name in members]}
    choices["registry"]["experiment"] = "itm-debug"
    return parse_recipe(choices, where=f"debug twin of {recipe.name}")


def _model(kind: str, options: Json) -> Json:
    if kind == "clip":
        return {"config": CLIP_CONFIG, "heads": options.get("heads")}
    if kind == "hf_dual":
        kept = {name: value for name, value in options.items() if name in ("heads", "freeze", "lora")}
        return {"config": {"model_type": "clip", **CLIP_CONFIG}, **kept}
    options = _shrink(options)
    if kind in ("uniter", "visual_bert"):
        options |= {"region_dim": REGION_WIDTH, "positions": SIZES["positions"]}
    return options


def _shrink(options: Json) -> Json:
    return {k: _shrink(v) if isinstance(v, dict) else SIZES.get(k, v) for k, v in options.items()}
