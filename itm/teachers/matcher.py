"""A trained matcher as a teacher, of images or of captions: a folder, or a version in the model registry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from itm.data.pixels import decode
from itm.data.preprocess import as_images, fit, read_regions
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.matchers.weights import tensors_sha256
from itm.teachers.identity import Modality, Teacher, json_sha256
from itm.teachers.image import image_bytes
from itm.types import Encoded, ImageForm, Images, Matcher


class MatcherTeacher(Teacher):
    """One vector per row of any matcher: `vector` (dual encoders: the retrieval vector; late interaction: the global mean), or
    `uni`, the uni-modal head of a CUSA student. `auto` takes `uni` where there is one.

    `allow`: packages that the matcher may name parts of (see `itm.load_matcher`).

    The weights are in the identity, so a registry alias that has moved makes another store.
    """

    def __init__(self, uri: str, modality: Modality, tap: Literal["auto", "vector", "uni"] = "auto", allow: Sequence[str] = ()) -> None:
        import itm

        if tap not in ("auto", "vector", "uni"):
            raise ValueError(f"tap {tap!r}; known: auto, vector, uni")
        self.modality, self.tap = modality, tap
        matcher: Matcher = itm.load_matcher(uri, allow=allow)
        self.module = matcher
        self.inputs, image = matcher.inputs, matcher.inputs.image
        self.prepare = _text_payload if modality == "text" else partial(_IMAGE[image.kind], image=image)
        options = {"kind": matcher.kind, **matcher.options}
        with torch.inference_mode():  # both modalities share their space, and a caption can be made up for any matcher
            self.width = self._vector(matcher.encode_captions(self.inputs.captions(["a photo"]))).shape[1]
        self.identity = {
            "kind": "matcher",
            "model": uri.rstrip("/").removeprefix("models:/") if uri.startswith("models:/") else uri.rstrip("/").rsplit("/", 1)[-1],
            "revision": None,
            "weights_sha256": tensors_sha256(matcher),
            "config_sha256": json_sha256(options),
            "layer": tap,
            "pooling": modality,
            "width": self.width,
            "dtype": "fp32",
            "preprocessing": {"image": self.inputs.image.said(), "tokenizer": type(self.inputs.tokenizer).__name__},
        }

    @torch.inference_mode()
    def embed(self, payloads: Sequence[bytes]) -> np.ndarray:
        """payloads: (S,S,3) uint8 bytes, region npz bytes or UTF-8 captions -> (N, D) float32."""
        matcher = self.module
        assert isinstance(matcher, Matcher)
        if self.modality == "image":
            encoded = matcher.encode_images(self._images(payloads))
        else:
            encoded = matcher.encode_captions(self.inputs.captions([p.decode() for p in payloads]).to(self.device))
        return self._vector(encoded).float().cpu().numpy()

    def _images(self, payloads: Sequence[bytes]) -> Images:
        """On the device. What takes time has been done in `prepare`, elsewhere than where the model runs."""
        if self.inputs.image.kind == "regions":
            return self.inputs.images(payloads).to(self.device)
        side = self.inputs.image.size
        pixels = np.stack([np.frombuffer(p, np.uint8).reshape(side, side, 3) for p in payloads])
        return as_images({"pixels": pixels}, np.arange(len(payloads))).to(self.device)

    def _vector(self, encoded: Encoded) -> Tensor:
        if self.tap == "uni" and encoded.uni is None:
            raise ValueError("this matcher has no uni-modal head; set the teacher option tap=vector")
        vector = encoded.vector if self.tap == "vector" or encoded.uni is None else encoded.uni
        if vector is None:
            raise ValueError("this matcher has no vector per row, so it cannot teach; choose a dual encoder or a late interaction")
        return vector


def _pixel_payload(sample: Sample, image: ImageForm) -> bytes:
    return fit(decode(image_bytes(sample), image.exif), image.size, image.crop).tobytes()


def _region_payload(sample: Sample, image: ImageForm) -> bytes:
    if sample.regions is None:
        raise ValueError(f"{sample.key}: no regions; this matcher reads precomputed regions")
    read_regions(sample.regions, 1)
    return sample.regions


def _text_payload(caption: Caption) -> bytes:
    return caption.text.encode()


_IMAGE = {"pixels": _pixel_payload, "regions": _region_payload}
