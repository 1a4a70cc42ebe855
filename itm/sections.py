"""The sections of a recipe: every key with its type, its default and what it means. `itm.config` reads them from YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


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
        "fp16", description="how `itm pack` and `itm features` store region features; fp32 as published, twice as large"
    )
    cache_features: bool = Field(
        False,
        description="a frozen image tower is not run in training: what `itm features` stored of it is read; a frozen text tower keeps what "
        "it gave to each caption. The matcher still takes photos",
    )
    exact_pixels: bool = Field(
        False,
        description="training pixels as evaluation has them, resized by PIL: five times the time, and one level in 500 of them differs",
    )
    scaled_jpeg: bool = Field(
        False,
        description="training decodes a JPEG of at least twice image_size at 1/2, 1/4 or 1/8: 1.2 to 1.6 times as fast, pixels 1.2 to 3 "
        "levels off on average",
    )
    val_images: int | None = Field(None, ge=1, description="validation reads the first so many images of val_split; unset = all")
    max_reject_rate: float = Field(0.01, ge=0, le=1, description="share of rejected samples past which a stage fails")
    decode: Literal["actors", "trainer", "auto"] = Field(
        "trainer",
        description="who decodes: actors on any node, threads of each trainer, or auto: the threads, unless they are measured to be too "
        "slow and nodes without a trainer can do it",
    )
    decode_workers: int | None = Field(
        None, ge=1, description="actors or threads that decode for a trainer; unset = for a GPU its share of the cores, for a CPU one"
    )

    @model_validator(mode="after")
    def _check_pixels(self) -> Data:
        if self.exact_pixels and self.scaled_jpeg:
            raise ValueError("scaled_jpeg changes the pixels that exact_pixels keeps: switch one of them off")
        return self


class Features(Strict):
    """Region features that `itm features` makes of photos: with `photos` set, `itm pack` writes there, and they go to `data.root`."""

    photos: str | None = Field(None, description="folder or URI of shards of photos, one sub-folder a split; unset = no such stage")
    encoder: Part | None = Field(None, description="image encoder whose grid cells become regions; unset = model.options.image")
    boxes: str | None = Field(
        None, description="JSON lines of a detector: each box gets the mean of the cells under it; unset = every cell is a region"
    )
    keep_images: bool = Field(True, description="keep the photos beside their regions, for reports, searches and image teachers")
    batch_size: int = Field(32, ge=1, description="photos per call of the encoder")
    actors: int | None = Field(None, ge=1, description="processes that hold the encoder; unset = one for each GPU, or one without GPUs")


class Text(Strict):
    """How a caption becomes tokens."""

    kind: Literal["words", "hf"] = Field("words", description="a vocabulary of whole words, or a Hugging Face tokenizer")
    path: str | None = Field(None, description="HF tokenizer (name or folder), or a word-vocabulary json")
    min_count: int = Field(1, ge=1, description="a word seen less often becomes <unk>")
    max_length: int = Field(64, ge=3, description="tokens, start and end included; longer captions are cut and counted")
    clean: bool = Field(True, description="clean captions as CUSA does before tokenising")


class Teachers(Strict):
    """The teachers, and the soft-label stores that `itm teach` makes of them and training reads."""

    root: str | None = Field(None, description="folder or URI of the stores; unset = <data.root>/<split>/teachers")
    image: Part | None = Field(None, description="teacher of images; unset = none")
    text: Part | None = Field(None, description="teacher of captions; unset = none")
    dtype: Literal["int8", "fp16", "fp32"] = Field("fp16", description="how vectors are stored")
    online: list[Literal["image", "text"]] = Field(
        default_factory=list,
        description="those that are not stored: they run in every training step, on the worker's device, which costs their time and memory",
    )
    equal_captions: Literal["shard", "split"] = Field(
        "shard", description="where equal captions are embedded once: in a shard that has mostly repeats, or in the whole split"
    )
    views: Literal["mean", "one"] = Field(
        "mean",
        description="how training reads an image store of several views: their mean, or one a visit, the next at each epoch, "
        "whose crop the model then sees too (data.crop=random)",
    )
    batch_size: int = Field(64, ge=1, description="rows per call of a teacher")
    actors: int | None = Field(None, ge=1, description="processes that hold a teacher; unset = one for each GPU, or one without GPUs")

    @model_validator(mode="after")
    def _check_online(self) -> Teachers:
        for modality in self.online:
            part: Part | None = getattr(self, modality)
            if part is None:
                raise ValueError(f"online names {modality}, which has no teacher: set teachers.{modality}")
            if part.kind == "shuffled":
                raise ValueError(f"the control teachers.{modality} hands stored vectors round: take {modality} out of online")
        return self

    @property
    def stored(self) -> dict[Literal["image", "text"], Part]:
        """Those whose vectors `itm teach` stores."""
        named: dict[Literal["image", "text"], Part | None] = {"image": self.image, "text": self.text}
        return {modality: part for modality, part in named.items() if part is not None and modality not in self.online}


class Encoders(Strict):
    """How the encoders of a matcher learn, beside the rest of it."""

    freeze: list[Literal["image", "text"]] = Field(
        default_factory=list, description="encoders that do not learn, or not before unfreeze_step or unfreeze_epoch"
    )
    unfreeze_step: int | None = Field(None, ge=1, description="the first step (0-based) at which the encoders of freeze learn")
    unfreeze_epoch: int | None = Field(None, ge=1, description="the same in epochs: the first (0-based) in which they learn")
    encoder_rate: float = Field(1.0, gt=0, description="learning rate of the encoders as a multiple of lr, which all else has")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each layer of a Hugging Face encoder learns at this multiple of the rate of the layer above it, the embeddings last",
    )

    @model_validator(mode="after")
    def _check_freezing(self) -> Encoders:
        if self.unfreeze_step is not None and self.unfreeze_epoch is not None:
            raise ValueError("unfreeze_step and unfreeze_epoch say the same thing in two units: give one of them")
        if not self.freeze and (self.unfreeze_step or self.unfreeze_epoch):
            raise ValueError("unfreeze_step and unfreeze_epoch need freeze: [image], [text] or both")
        return self


class Train(Encoders):
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
        description="auto = on CPUs a triplet loss of the hardest negatives keeps activations of the pairs that its gradient reaches "
        "alone, where pairs do not depend on each other (scan, sgr, uarda); off = of all pairs",
    )
    shard_weights: bool = Field(
        False, description="FSDP2 instead of DDP: each worker keeps a share of weights, gradients and optimiser state; one worker keeps all"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an exponential moving average of the weights")
    validate_every: int | None = Field(None, ge=1, description="steps between validations; unset = at the end of each epoch")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints; unset = with each validation")
    patience: int | None = Field(
        None,
        ge=1,
        description="end after so many validations in a row in which registry.metric has not risen; unset = never",
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="end after so many hours of training, all restarts together, with a validation and a checkpoint; looked at with each "
        "logged step. Unset = no limit",
    )
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
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options of protocols by their name, e.g. {positives: {table: pairs.csv}}"
    )
    ensemble: list[str] = Field(default_factory=list, description="matchers whose mean score is evaluated; such a recipe is not trained")
    block: int | None = Field(None, ge=1, description="images per score tile; unset = chosen from the memory budget")
    batch_size: int = Field(256, ge=1, description="rows per encoder call")
    relations: list[Literal["isd", "isda"]] = Field(
        default_factory=list, description="distances between relations of words and of regions that each validation logs beside the recalls"
    )


class Indexed(Strict):
    """Vectors of splits by the matcher that was trained, for searching."""

    splits: list[str] = Field(default_factory=list, description="sub-folders of data.root that `itm run` indexes; empty = no such stage")
    output: str | None = Field(None, description="folder or URI of the index; unset = index in the run's folder")
    dtype: Literal["fp16", "int8", "fp32"] = Field("fp16", description="how vectors are stored; int8 with one scale each")


class Registry(Strict):
    """Experiment tracking and the promotion gate."""

    experiment: str = Field("itm", description="MLflow experiment of the runs")
    model: str = Field("itm-matcher", description="name in the model registry")
    metric: str = Field("rsum", description="metric of evaluation.json that the gate compares")
    min_gain: float = Field(0.0, ge=0, description="the champion alias moves only for a gain larger than this")
    loggers: list[Part] = Field(
        default_factory=list, description="where metrics go beside MLflow: console, tensorboard, or package.module:Name"
    )
    licence: str = Field("", description="licence of the weights, for the model card; empty = not stated there")

    @field_validator("model", "experiment")
    @classmethod
    def _check_name(cls, name: str, field: ValidationInfo) -> str:
        """MLflow would refuse these after the training."""
        refused = " or / : . % @ \" '" if field.field_name == "model" else ""
        if not name.isprintable() or name.strip() != name or not 0 < len(name) <= 250 or set(name) & set(refused.split()[1:]):
            raise ValueError(f"MLflow takes no {name!r}: 1 to 250 printable characters without outer spaces{refused}")
        return name
