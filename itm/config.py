"""The typed recipe: every choice of a run in one object, read from YAML with dotted overrides.

    recipe = load_recipe("demo.yaml", ["train.steps=50", "model.options.width=64"])
    recipe.fingerprint()            # 12 hex digits, the same for the same choices

An unknown key is an error that names the near one. `options` of a part are checked by the part that takes them.
"""

from __future__ import annotations

import difflib
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from itm.choices import apply_overrides, digest, flatten, known_to, merge, read_choices
from itm.kinds import packages_of

MOST_HOPS = 2  # of `extends`: who reads a recipe should have to open three files at most
OVERRIDE = "override"
_MISSING = object()


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(Strict):
    """A part and the keyword arguments it is built with. `kind`: a name, or `package.module:Name` for a part of one's own."""

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)


class MixedRoot(Strict):
    """One of several packed roots that are trained on together."""

    root: str = Field(description="folder or URI of the shards, with a sub-folder train_split")
    weight: float = Field(1.0, gt=0, description="share of the pairs, relative to the others")


class Data(Strict):
    """Where pairs come from, where their shards lie and how an image is prepared."""

    source: Part | None = Field(None, description="raw data for `itm pack`; unset = the shards exist already")
    root: str = Field("data/shards", description="folder or URI of the shards, one sub-folder a split")
    mix: list[MixedRoot] = Field(
        default_factory=list, description="roots whose training splits are mixed: [{root, weight}, ...]; unset = data.root alone"
    )
    train_split: str = Field("train", description="sub-folder that is trained on")
    val_split: str = Field("val", description="sub-folder that validation reads; empty = train without validation")
    test_split: str = Field("test", description="sub-folder that `itm evaluate` reads")
    shard_samples: int = Field(250, ge=1, description="images per packed shard")
    image: Literal["pixels", "regions"] = Field("pixels", description="what the model sees of an image: pixels, or a region file")
    image_size: int = Field(224, ge=8, description="pixels a side")
    crop: Literal["center", "random", "squash"] = Field("center", description="squash resizes without cropping; random: training only")
    flip: bool = Field(False, description="random horizontal flip in training (wrong for captions that say left or right)")
    exif: bool = Field(True, description="turn photos as their EXIF orientation says; false = as stored, for weights trained so")
    max_regions: int = Field(36, ge=1, description="regions kept of each image (image: regions)")
    shuffle_window: int = Field(8, ge=1, description="shards whose pairs are shuffled together; shuffle_pairs goes before it")
    shuffle_pairs: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        None,
        description="at least so many pairs are shuffled together, by whole shards, or all, as published loaders do; each costs "
        "48 bytes of every reader. Unset = shuffle_window",
    )
    regions_dtype: Literal["fp16", "fp32"] = Field(
        "fp16", description="how `itm pack` stores region features; fp32 as published, twice as large"
    )
    exact_pixels: bool = Field(
        False,
        description="training pixels as evaluation has them, resized by PIL: five times the time, and one level in 500 of them differs",
    )
    val_images: int | None = Field(None, ge=1, description="validation reads the first so many images of val_split; unset = all")
    max_reject_rate: float = Field(0.01, ge=0, le=1, description="share of rejected samples past which a stage fails")
    decode: Literal["actors", "trainer"] = Field("trainer", description="who decodes: actors on any node, or threads of each trainer")
    decode_workers: int | None = Field(
        None, ge=1, description="actors or threads that decode for a trainer; unset = for a GPU its share of the cores, for a CPU one"
    )


class Text(Strict):
    """How a caption becomes tokens."""

    kind: Literal["words", "hf"] = Field("words", description="a vocabulary of whole words, or a Hugging Face tokenizer")
    path: str | None = Field(None, description="HF tokenizer (name or folder), or a word-vocabulary json")
    min_count: int = Field(1, ge=1, description="a word seen less often becomes <unk>")
    max_length: int = Field(64, ge=3, description="tokens, start and end included; longer captions are cut and counted")
    clean: bool = Field(True, description="clean captions as CUSA does before tokenising")


class Teachers(Strict):
    """The soft-label stores that training reads, and the teachers that `itm teach` runs."""

    root: str | None = Field(None, description="folder or URI of the stores; unset = <data.root>/<split>/teachers")
    image: Part | None = Field(None, description="teacher of images; unset = none")
    text: Part | None = Field(None, description="teacher of captions; unset = none")
    dtype: Literal["int8", "fp16", "fp32"] = Field("fp16", description="how vectors are stored")
    batch_size: int = Field(64, ge=1, description="rows per call of a teacher")
    actors: int | None = Field(None, ge=1, description="processes that hold a teacher; unset = one for each GPU, or one without GPUs")


class Train(Strict):
    """Optimisation. One step = one optimiser update on `batch_size` x the workers that are there x `accumulate` pairs."""

    start: str | None = Field(None, description="matcher folder or models:/name@alias to fine-tune: its weights and its tokenizer")
    batch_size: int = Field(128, ge=2, description="pairs per worker and micro-step")
    steps: int | None = Field(None, ge=1, description="stop after this many steps")
    epochs: int | None = Field(None, ge=1, description="stop after this many passes over all captions")
    workers: int = Field(1, ge=0, description="Ray Train workers; 0 = inside the driver process")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="train with as few workers while there is no room for all, from the last checkpoint at each change; each lost node "
        "counts in max_failures. Unset = wait for room for all",
    )
    use_gpu: bool = Field(False, description="one GPU for each worker")
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = Field(
        "fp32", description="of products and convolutions, weights stay fp32; bf16, fp16 = autocast; auto = bf16 on a GPU, fp32 on a CPU"
    )
    deterministic: bool = Field(False, description="the same bits each run on one kind of device, or an error naming what cannot; slower")
    optimizer: Literal["adam", "adamw", "adamax", "adamw_uniter"] = Field(
        "adamw", description="adamw_uniter: AdamW of UNITER's code, which adds eps before the bias correction and decays after the update"
    )
    lr: float = Field(1e-3, gt=0, description="highest learning rate")
    min_lr: float = Field(0.0, ge=0, description="lowest learning rate of the schedule")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the first and second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(1e-4, ge=0)
    decayed: Literal["matrices", "cusa", "uniter"] = Field(
        "matrices",
        description="which weights decay: matrices = all but vectors, temperatures and biases; cusa = temperatures too; uniter = all but "
        "biases and what is named LayerNorm. The last two are what the authors' code does",
    )
    schedule: Literal["constant", "cosine", "cosine_epoch", "step", "linear"] = Field(
        "cosine", description="how the learning rate falls after the warm-up; cosine_epoch changes it once an epoch"
    )
    step_epochs: int = Field(15, ge=1, description="`step`: the rate is multiplied by step_gamma every so many epochs")
    step_gamma: float = Field(0.1, gt=0, description="factor of the schedule `step`")
    warmup_steps: int = Field(0, ge=0, description="first steps, in which the learning rate rises linearly")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; unset = not clipped")
    accumulate: int = Field(1, ge=1, description="micro-steps per optimiser step")
    cache_chunk: int | None = Field(
        None, ge=1, description="rows the encoders hold activations of; the loss still sees all of batch_size. Unset = all at once"
    )
    compile: bool = Field(False, description="torch.compile of the encoders, layer by layer; validation runs them as they are")
    checkpoint_activations: bool = Field(
        False, description="make the encoders' activations again in the backward pass instead of keeping them: less memory, more time"
    )
    hardest_pairs: Literal["auto", "off"] = Field(
        "auto",
        description="auto = a triplet loss of the hardest negatives keeps activations of the pairs that its gradient reaches alone, where "
        "pairs do not depend on each other (scan, sgr, uarda); off = of all pairs",
    )
    shard_weights: bool = Field(
        False, description="FSDP2 instead of DDP: each worker keeps a share of weights, gradients and optimiser state; one worker keeps all"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an exponential moving average of the weights")
    validate_every: int | None = Field(None, ge=1, description="steps between validations; unset = at the end of each epoch")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints; unset = with each validation")
    log_every: int = Field(10, ge=1, description="steps between logged losses")
    log_shares: bool = Field(
        False,
        description="log the share of each loss in the gradient, by the norm of its own: a backward pass more for each, where logged",
    )
    max_failures: int = Field(0, ge=0, description="worker-group restarts from the last checkpoint; 0 = the first lost node ends the run")

    @model_validator(mode="after")
    def _check_workers(self) -> Train:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; lower min_workers, or leave it unset")
        if self.log_shares and self.shard_weights:
            raise ValueError("log_shares needs whole weights, which shard_weights splits: switch one of them off")
        if self.precision == "fp16" and self.shard_weights:
            raise ValueError("precision=fp16 scales its losses by each worker's own gradients, which shard_weights splits: use bf16")
        return self


class Evaluation(Strict):
    protocol: str = Field("auto", description="which pairs are asked against which truth")
    ensemble: list[str] = Field(default_factory=list, description="matchers whose mean score is evaluated; such a recipe is not trained")
    block: int | None = Field(None, ge=1, description="images per score tile; unset = chosen from the memory budget")
    batch_size: int = Field(256, ge=1, description="rows per encoder call")


class Registry(Strict):
    """Experiment tracking and the promotion gate."""

    experiment: str = Field("itm", description="MLflow experiment of the runs")
    model: str = Field("itm-matcher", description="name in the model registry")
    metric: str = Field("rsum", description="metric of evaluation.json that the gate compares")
    min_gain: float = Field(0.0, ge=0, description="the champion alias moves only for a gain larger than this")
    loggers: list[Part] = Field(default_factory=list, description="where metrics go beside MLflow: console, or package.module:Name")
    licence: str = Field("", description="licence of the weights, for the model card; empty = not stated there")

    @field_validator("model", "experiment")
    @classmethod
    def _check_name(cls, name: str, field: ValidationInfo) -> str:
        """MLflow would refuse these after the training."""
        refused = " or / : . % @ \" '" if field.field_name == "model" else ""
        if not name.isprintable() or name.strip() != name or not 0 < len(name) <= 250 or set(name) & set(refused.split()[1:]):
            raise ValueError(f"MLflow takes no {name!r}: 1 to 250 printable characters without outer spaces{refused}")
        return name


# Prose, places of outputs, processes and how they compute. What stood here in version 0.1.0 stays: `whole_fingerprint` needs it.
NO_CHOICES: dict[str, Any] = {
    "output": True,
    "allow": True,
    "about": True,
    "paper": True,
    "train": {
        "workers",
        "min_workers",
        "max_failures",
        "compile",
        "checkpoint_activations",
        "shard_weights",
        "deterministic",
        "hardest_pairs",
    },
    "data": {"decode", "decode_workers"},
    "teachers": {"actors"},
    "registry": {"loggers", "licence"},
}


class Recipe(Strict):
    name: str = Field(description="name of the run, its folder below `output`")
    seed: int = Field(0, description="of initial weights, order of pairs and augmentation")
    about: str = Field("", description="what this run is, in a sentence")
    paper: dict[str, Any] = Field(default_factory=dict, description="published figures and the decisions where code and paper differ")
    output: str = Field("runs", description="folder or URI; a run writes below <output>/<name>")
    allow: list[str] = Field(
        default_factory=list,
        description="packages whose parts may be loaded from matcher folders and the registry, beside those that this recipe names",
    )
    data: Data = Field(default_factory=Data)
    text: Text = Field(default_factory=Text)
    teachers: Teachers = Field(default_factory=Teachers)
    model: Part = Field(description="the matcher that is trained")
    method: Part = Field(Part(kind="matching"), description="how it is trained: its losses")
    train: Train = Field(default_factory=Train)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    registry: Registry = Field(default_factory=Registry)

    def fingerprint(self) -> str:
        """12 hex digits of the sha256 of all choices; prose, places of outputs, processes and how they compute do not count.

        A key at its default counts as one that is not there, so that a key that is added later makes no run another one.
        """
        return digest(self._choices(exclude_defaults=True))

    def whole_fingerprint(self, recorded: dict[str, Any]) -> str | None:
        """The fingerprint as version 0.1.0 made it, of all keys there were, defaults as well: those of the recipe that it `recorded`.

        None when this recipe chooses something by a key that was not there.
        """
        chosen = self._choices(exclude_defaults=True)
        return digest(known_to(self._choices(exclude_defaults=False), recorded)) if known_to(chosen, recorded) == chosen else None

    def _choices(self, exclude_defaults: bool) -> dict[str, Any]:
        choices = self.model_dump(mode="json", exclude=NO_CHOICES, exclude_defaults=exclude_defaults)
        return {name: value for name, value in choices.items() if value != {}}

    def flat(self) -> dict[str, Any]:
        """Dotted key -> scalar, for experiment tracking."""
        return flatten(self.model_dump(mode="json", exclude={"paper"}))

    @property
    def allowed(self) -> list[str]:
        """Packages that a matcher folder may name: a recipe is written by its user, so the packages that it names are chosen."""
        return sorted({*self.allow, *packages_of(self.model_dump(mode="json", exclude={"name", "about", "paper"}))})

    @property
    def folder(self) -> str:
        return f"{self.output.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class Layer:
    """Choices of one file of an `extends` chain, or of all overrides."""

    origin: str
    choices: dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """A recipe and the layers that it was made of, the one that has the last word last."""

    recipe: Recipe
    layers: tuple[Layer, ...]

    def origin(self, key: tuple[str, ...], value: Any) -> str:
        """Where the value of a key comes from: the name of a file, `override`, or `default`."""
        for layer in reversed(self.layers):
            said: Any = layer.choices
            for name in key:
                said = said.get(name, _MISSING) if isinstance(said, dict) else _MISSING
            # A section is told key by key, but for an empty one, which a layer may have put in place of a full one.
            if said is not _MISSING and (not isinstance(value, dict) or said == value):
                return layer.origin
        return "default"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides (values are YAML).

    A recipe may start from another by `extends: other.yaml` (relative to its own folder), which may start from a third one, and no
    further; mappings merge key by key. Raises ValueError naming the file, the key and the nearest known key.
    """
    return resolve_recipe(path, overrides).recipe


def resolve_recipe(path: str | Path, overrides: list[str] | None = None) -> Resolved:
    """The recipe of `load_recipe` with the layers it was made of."""
    layers = _layers(Path(path))
    choices: dict[str, Any] = {}
    for layer in layers:
        choices = merge(choices, layer.choices)
    choices = deepcopy(choices)
    apply_overrides(choices, overrides or [])
    given: dict[str, Any] = {}
    apply_overrides(given, overrides or [])
    return Resolved(parse_recipe(choices, where=str(path)), (*layers, Layer(OVERRIDE, given)))


def overridden(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with `key.sub=value` overrides applied. Raises ValueError as `load_recipe`."""
    choices = recipe.model_dump(mode="json", exclude_unset=True)
    apply_overrides(choices, overrides)
    return parse_recipe(choices, where=recipe.name)


def parse_recipe(choices: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a nested dict. Raises ValueError with every problem, one a line."""
    try:
        return Recipe.model_validate(choices)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {_explain(e)}" for e in error.errors())) from None


def _layers(path: Path) -> list[Layer]:
    """The files of an `extends` chain, the first base first. Raises ValueError for a circle, and for more than MOST_HOPS hops."""
    chain: list[tuple[Path, Layer]] = []
    while True:
        choices = read_choices(path, wanted_by=chain[-1][0] if chain else None)
        base = choices.pop("extends", None)
        chain.append((path, Layer(path.name, choices)))
        if base is None:
            return [layer for _, layer in reversed(chain)]
        if not isinstance(base, str):
            raise ValueError(f"{path}: extends takes the name of one recipe file, not {base!r}")
        names = " -> ".join([*(layer.origin for _, layer in chain), base])
        path = path.parent / base
        if path.resolve() in [earlier.resolve() for earlier, _ in chain]:
            raise ValueError(f"{chain[0][0]}: `extends` goes in a circle, {names}; take one of them out")
        if len(chain) > MOST_HOPS:
            raise ValueError(
                f"{chain[0][0]}: {names} is more than {MOST_HOPS} hops of `extends`; "
                f"let {chain[-2][1].origin} start from {base}, and copy into it what it takes from {chain[-1][1].origin}"
            )


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']}"
    known = _known_keys(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}")


def _known_keys(section: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for name in section:
        annotation = model.model_fields[name].annotation
        model = next((a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)
