"""Image and text encoders that work from pixels and token ids: a small ConvNet, a max-pooled BiGRU, any Hugging Face backbone.

Each is called with Images or Captions and returns `Encoded` with `parts` (grid cells, patches or words) and `vector`. `options` holds
what rebuilds the same architecture without a network connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from itm.data.text import brief
from itm.device import send
from itm.matchers.encoders import packed_gru
from itm.matchers.encoders.build import Encoder
from itm.matchers.encoders.cells import averaged, read_back
from itm.matchers.norms import masked_mean
from itm.packaged import located
from itm.types import Captions, Encoded, Images, Options

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Normalise(nn.Module):
    """uint8 (B,3,H,W) -> float ((x / 255 - mean) / std), on the device of the pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Images) -> Tensor:
        """Raises ValueError when the images hold regions only."""
        if images.pixels is None:
            raise ValueError("this image encoder reads pixels, the data hold none: set data.image=pixels or use the encoder `regions`")
        return (images.pixels.to(self.mean.dtype) / 255 - self.mean) / self.std


class ConvTower(Encoder):
    """Three convolutions and a linear layer: 4x4/4-48, 3x3/2-96, 3x3/2-128 (BatchNorm, ReLU), flatten, linear `hidden`, ReLU.

    parts = the last grid (N, K, 128); vector = (N, hidden).
    """

    def __init__(self, *, image_size: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.options = {"image_size": image_size, "hidden": hidden}
        self.image_size = image_size
        self.normalise = Normalise((0.5,) * 3, (0.25,) * 3)
        self.grid = nn.Sequential(_conv(3, 48, 4, 4, 0), _conv(48, 96, 3, 2, 1), _conv(96, 128, 3, 2, 1))
        side = (image_size // 4 + 3) // 4
        self.linear = nn.Linear(side * side * 128, hidden)
        self.width, self.vector_width = 128, hidden

    def forward(self, images: Images) -> Encoded:
        """Raises ValueError when the pixels are not `image_size` a side."""
        pixels = self.normalise(images)
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"conv tower for {self.image_size} pixels a side got {tuple(pixels.shape[-2:])}: set its image_size to data.image_size"
            )
        grid = self.grid(pixels)
        vector = torch.relu(self.linear(grid.flatten(1)))
        parts = grid.flatten(2).transpose(1, 2)
        return Encoded(vector=vector, parts=parts, mask=parts.new_ones(parts.shape[:2], dtype=torch.bool))


def _conv(inside: int, outside: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, kernel, stride, padding, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class PooledGRU(Encoder):
    """Word embedding, bidirectional GRU. parts = both directions concatenated (N, L, 2*hidden); vector = their maximum over words."""

    def __init__(self, *, vocab_size: int, word_dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.options = {"word_dim": word_dim, "hidden": hidden}
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.gru = nn.GRU(word_dim, hidden, batch_first=True, bidirectional=True)
        self.width = self.vector_width = 2 * hidden

    def forward(self, captions: Captions) -> Encoded:
        """Raises ValueError as `check_tokens`."""
        check_tokens(captions, self.embed.num_embeddings)
        parts = read_words(self.gru, self.embed(captions.tokens), captions.host.mask.sum(1))
        vector = parts.masked_fill(~captions.mask.unsqueeze(-1), -torch.inf).amax(1)
        return Encoded(vector=vector, parts=parts, mask=captions.mask)


class HFVision(Encoder):
    """Any Hugging Face vision backbone, by `path` (hub name or folder) or by `config` ({"model_type": ...}, random weights).

    parts = patch tokens without class or register tokens, or the cells of a convolutional grid; vector = the model's pooled output,
    else the mean of the parts. `mean` and `std` default to the preprocessor_config.json of `path`, else to ImageNet's.
    layer: -1 is the final output, k the k-th hidden state. cells: the parts are averaged to a grid of so many a side, and the vector is
    their mean; frozen, such a tower also takes features that `itm features` stored, in place of pixels.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        config: Options | None = None,
        freeze: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        layer: int = -1,
        cells: int | None = None,
    ) -> None:
        """Raises ValueError unless exactly one of `path` and `config` is given."""
        super().__init__()
        self.model = load_backbone(path, config, "vision_config", "image encoder hf_vision")
        known_mean, known_std = _pixel_statistics(path, self.model.config)
        mean, std = tuple(mean or known_mean), tuple(std or known_std)
        self.normalise = Normalise(mean, std)
        self.frozen = freeze
        self.layer, self.cells = layer, cells
        chosen = {name: value for name, value, usual in (("layer", layer, -1), ("cells", cells, None)) if value != usual}
        self.options = {"config": as_config(self.model), "freeze": freeze, "mean": list(mean), "std": list(std)} | chosen
        self.model.requires_grad_(not freeze)
        if freeze:
            self.model.eval()
        widths = getattr(self.model.config, "hidden_sizes", None)
        wide = self.timm.num_features if self.timm is not None else widths[-1] if widths else self.model.config.hidden_size
        self.width = self.vector_width = int(wide)

    @property
    def timm(self) -> Any:
        """A model of timm, whose configuration here tells no sizes; None of any other."""
        return getattr(self.model, "timm_model", None)

    @property
    def reads_features(self) -> bool:
        return self.frozen and self.cells is not None

    def train(self, mode: bool = True) -> HFVision:
        if not self.frozen:
            return super().train(mode)
        self.training = mode  # the model stays as in evaluation; to tell its hundreds of modules so at every step takes 20 ms
        return self

    def forward(self, images: Images) -> Encoded:
        """Raises ValueError when the backbone cannot take this image size."""
        if self.reads_features and images.pixels is None and images.regions is not None:
            return read_back(images, self.width)
        pixels = self.normalise(images)
        try:
            out = self.model(pixel_values=pixels, **({} if self.layer == -1 else {"output_hidden_states": True}))
        except ValueError as error:
            wanted = getattr(self.model.config, "image_size", None)
            raise ValueError(f"vision backbone refuses {tuple(pixels.shape[-2:])} pixels; set data.image_size={wanted} ({error})") from None
        hidden = out.last_hidden_state if self.layer == -1 else self._hidden(out.hidden_states)
        if self.timm is not None and hidden.dim() == 4 and hidden.shape[1] != self.width:
            hidden = hidden.permute(0, 3, 1, 2)  # some of its models have the channels last
        parts = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, self._extra_tokens(hidden, pixels) :]
        parts = averaged(parts, self.cells)
        pooled = out.get("pooler_output") if self.layer == -1 and self.cells is None else None
        vector = parts.mean(1) if pooled is None else pooled.flatten(1)
        return Encoded(vector=vector, parts=parts, mask=parts.new_ones(parts.shape[:2], dtype=torch.bool))

    def _hidden(self, states: Sequence[Tensor]) -> Tensor:
        if not -len(states) <= self.layer < len(states):
            raise ValueError(f"layer={self.layer}: this vision backbone has hidden states 0 to {len(states) - 1}")
        return states[self.layer]

    def _extra_tokens(self, hidden: Tensor, pixels: Tensor) -> int:
        """Class and register tokens stand before the patches: what the patch grid does not explain."""
        patch = getattr(self.model.config, "patch_size", None)
        if not isinstance(patch, int):
            return int(getattr(self.timm, "num_prefix_tokens", 0))
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        return max(0, hidden.shape[1] - patches)


class HFText(Encoder):
    """Any Hugging Face text model, by `path` or by `config`. parts = the last hidden states.

    vector: `mean` of the real tokens, `first` (class token), `last` (CLIP: the end token), or `pooler`, the model's own pooled output
    (SigLIP). A SigLIP reads captions padded to its full length without a mask, as it was trained.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        path: str | None = None,
        config: Options | None = None,
        freeze: bool = False,
        pool: Literal["mean", "first", "last", "pooler"] = "mean",
    ) -> None:
        """Raises ValueError unless exactly one of `path` and `config` is given, or when the tokenizer has more ids than the model."""
        super().__init__()
        if config is not None:
            config = {"vocab_size": vocab_size, **config}
        self.model = load_backbone(path, config, "text_config", "text encoder hf_text")
        check_vocabulary(vocab_size, self.model.config.vocab_size)
        self.frozen, self.pool = freeze, pool
        self.memory: Any = None  # of captions that were read before (`features.remember_captions`)
        self.options = {"config": as_config(self.model), "freeze": freeze, "pool": pool}
        self.padded = padded_length(self.model.config)
        for name, parameter in self.model.named_parameters():
            pooling = "pooler" in name or (self.padded is not None and "head." in name)
            parameter.requires_grad_(not freeze and (pool == "pooler" or not pooling))
        if freeze:
            self.model.eval()
        self.width = self.vector_width = int(self.model.config.hidden_size)

    def train(self, mode: bool = True) -> HFText:
        if not self.frozen:
            return super().train(mode)
        self.training = mode  # the model stays as in evaluation; to tell its hundreds of modules so at every step takes 20 ms
        return self

    def forward(self, captions: Captions) -> Encoded:
        """Raises ValueError as `check_tokens`."""
        check_tokens(captions, self.model.config.vocab_size)
        if self.memory is not None and self.training:
            parts = self.memory.read(captions, lambda alone: self._read(alone).last_hidden_state)
            return Encoded(vector=pool_tokens(parts, captions.mask, self.pool), parts=parts, mask=captions.mask)
        out = self._read(captions)
        parts = out.last_hidden_state[:, : captions.tokens.shape[1]]
        if self.pool != "pooler":
            vector = pool_tokens(parts, captions.mask, self.pool)
        elif (vector := out.get("pooler_output")) is None:
            raise ValueError("this text model has no pooled output: choose pool=mean, first or last")
        return Encoded(vector=vector, parts=parts, mask=captions.mask)

    def _read(self, captions: Captions) -> Any:
        if self.padded is None:
            return self.model(input_ids=captions.tokens, attention_mask=captions.mask.long())
        if captions.tokens.shape[1] > self.padded:
            raise ValueError(
                f"this text model reads {self.padded} tokens, got {captions.tokens.shape[1]}: set text.max_length={self.padded}"
            )
        filler = self.model.config.pad_token_id or 0
        tokens = captions.tokens.masked_fill(~captions.mask, filler)
        return self.model(input_ids=F.pad(tokens, (0, self.padded - tokens.shape[1]), value=filler))


def pool_tokens(parts: Tensor, mask: Tensor, pool: str) -> Tensor:
    """(N,L,D) -> (N,D): `mean` of real tokens, the `first`, or the `last` real one."""
    if pool == "mean":
        return masked_mean(parts, mask)
    position = mask.sum(1) - 1 if pool == "last" else mask.new_zeros(len(mask), dtype=torch.int64)
    return parts[torch.arange(len(parts), device=parts.device), position]


def load_backbone(path: str | None, config: Options | None, inner: str, what: str) -> Any:
    """A Hugging Face model in float32; of a two-tower checkpoint (CLIP, SigLIP) the tower whose configuration is `inner`."""
    from transformers import AutoConfig, AutoModel

    if (path is None) == (config is None):
        raise ValueError(f"{what} needs either path (hub name or folder) or config (a dict with model_type)")
    if config is not None:
        choices = dict(config)
        if "model_type" not in choices:
            raise ValueError(f"{what}: config needs model_type, for instance vit, clip_vision_model or bert")
        try:
            known = AutoConfig.for_model(choices.pop("model_type"), **choices)
            one = _class_of(known)
            return AutoModel.from_config(known, dtype=torch.float32) if one is None else one(known).float()
        except (ValueError, ImportError) as error:  # ImportError: timm and what it needs is no part of this project
            raise ValueError(f"{what}: config={brief(ValueError(config), 120)} makes no model: {brief(error)}") from None
    assert path is not None
    path = located(path)
    try:
        found = AutoConfig.from_pretrained(path)
        found = getattr(found, inner, found)
        return (_class_of(found) or AutoModel).from_pretrained(path, config=found, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{what}: path={path!r} holds no model: {brief(error)}") from None


def _class_of(config: Any) -> Any:
    """The class of a tower that AutoModel does not know, such as the text side of SigLIP; None where it does, or where there is none."""
    from transformers import AutoModel, PreTrainedModel

    if type(config) in AutoModel._model_mapping:
        return None
    module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    made = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.config_class is type(config)]
    named = [c for c in made if c.__name__ == type(config).__name__.replace("Config", "Model")]
    return next(iter(named), None)


def padded_length(config: Any) -> int | None:
    """The tokens that a text model must be given: SigLIP was trained on captions padded to one length, and sees the padding; None = any."""
    return int(config.max_position_embeddings) if str(config.model_type).startswith("siglip") else None


def as_config(model: Any) -> Options:
    """The JSON-able configuration of a Hugging Face model, without what only concerns its file."""
    found: Options = model.config.to_diff_dict()
    for key in ("architectures", "transformers_version", "dtype", "_name_or_path"):
        found.pop(key, None)
    return {"model_type": model.config.model_type, **found}


def read_words(rnn: nn.GRU, words: Tensor, lengths: Tensor) -> Tensor:
    """(N,L,D) read up to the lengths (N,) int64, which lie in main memory -> (N,L,hidden), zero behind them.

    As packing with enforce_sorted=False, which would fetch the order of the rows from a GPU again.
    """
    if packed_gru.serves(rnn, words):
        return packed_gru.read_packed(rnn, words, lengths)
    longest_first, order = lengths.sort(descending=True)
    there, back = send(order, words.device), send(order.argsort(), words.device)
    packed = pack_padded_sequence(words.index_select(0, there), longest_first, batch_first=True)
    states, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=words.shape[1])
    return states.index_select(0, back)


def check_vocabulary(tokens: int, embeddings: int) -> None:
    """Raises ValueError when the tokenizer makes ids that the text model has no embedding for."""
    if tokens > embeddings:
        raise ValueError(
            f"the tokenizer has {tokens} ids, the text model embeds {embeddings}: use the tokenizer that came with it (text.path)"
        )


def check_tokens(captions: Captions, embeddings: int) -> None:
    """Raises ValueError for a caption without a token, or a token id that the model has no embedding for."""
    if torch.compiler.is_compiling():
        return
    captions = captions.host
    empty = (~captions.mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"caption rows {empty[:8]} of the batch have no word at all: the tokenizer must add start and end")
    if int(captions.tokens.max()) >= embeddings:
        raise ValueError(f"token id {int(captions.tokens.max())} in a vocabulary of {embeddings}: use the model's own vocabulary")


def _pixel_statistics(path: str | None, config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    if of_timm := getattr(config, "pretrained_cfg", None):
        return tuple(of_timm.get("mean", IMAGENET[0])), tuple(of_timm.get("std", IMAGENET[1]))
    if path is None:
        return IMAGENET
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        return IMAGENET
    return tuple(found.get("image_mean", IMAGENET[0])), tuple(found.get("image_std", IMAGENET[1]))


def load_clip(path: str | None, config: Options | None) -> Any:
    """CLIPModel in float32, by `path` or by `config` of CLIPConfig. Raises ValueError unless exactly one is given and holds one."""
    from transformers import CLIPConfig, CLIPModel

    if (path is None) == (config is None):
        raise ValueError("model clip needs either path (hub name or folder) or config (a dict with text_config and vision_config)")
    if config is not None:
        return CLIPModel(CLIPConfig(**{key: value for key, value in config.items() if key != "model_type"})).float()
    try:
        return CLIPModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"model clip: path={path!r} holds no CLIP model: {brief(error)}") from None
