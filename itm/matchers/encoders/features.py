"""Frozen towers whose outputs are kept: what tells them apart, whether stored features are theirs, and a memory of captions.

A frozen tower gives the same for the same input, so that training need not run it again each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from itm.data.formats import Json
from itm.device import send
from itm.matchers.encoders.build import Encoder
from itm.matchers.encoders.towers import HFText
from itm.matchers.weights import tensors_sha256
from itm.types import Captions

MOST = 2 << 30
"""Bytes of word features that a process keeps; a data set whose captions need more reads them with the tower each step."""
WORDS = 16  # of a caption, on average: an estimate
_kept: dict[str, Memory] = {}


class Memory:
    """Token ids of a caption -> the word features (L,D) float32 that a frozen text tower gives it.

    Each caption is read alone, so that its features do not depend on those it happened to come with: a run that is taken up again sees
    the same numbers.
    """

    def __init__(self) -> None:
        self.rows: dict[bytes, Tensor] = {}

    def __deepcopy__(self, memo: object) -> Memory:
        return self  # the moving average of the weights is a copy, whose tower gives the same

    def read(self, captions: Captions, tower: Callable[[Captions], Tensor]) -> Tensor:
        """(N,L,D), zero behind the end of a caption."""
        host = captions.host
        lengths = host.mask.sum(1).tolist()
        found = []
        for tokens, length in zip(host.tokens, lengths, strict=True):
            key = tokens[:length].numpy().tobytes()
            if key not in self.rows:
                alone = Captions(tokens[None, :length], torch.ones(1, length, dtype=torch.bool), captions.image_id[:1])
                self.rows[key] = tower(alone.to(captions.tokens.device))[0].detach().float().cpu()
            found.append(self.rows[key])
        parts = found[0].new_zeros(*captions.tokens.shape, found[0].shape[1])
        for row, words in zip(parts, found, strict=True):
            row[: len(words)] = words
        return send(parts, captions.tokens.device)


def remember_captions(encoder: Encoder, captions: int) -> bool:
    """Give a frozen Hugging Face text tower a memory, one for all of the same weights in this process; False where it gets none.

    captions: of the data. A tower that pools by itself (pool=pooler) gets none, nor one whose captions would take more than MOST bytes.
    """
    if not isinstance(encoder, HFText) or not encoder.frozen or encoder.pool == "pooler" or encoder.padded is not None:
        return False
    if captions * WORDS * encoder.width * 4 > MOST:
        return False
    encoder.memory = _kept.setdefault(tensors_sha256(encoder), Memory())
    return True


def identity_of(encoder: Encoder, kind: str) -> Json:
    """What tells the outputs of two encoders apart: kind, the options that change them, and all weights."""
    choices = {name: value for name, value in (encoder.options or {}).items() if name not in ("freeze", "pretrained")}
    return {"kind": kind, "options": choices, "weights_sha256": tensors_sha256(encoder)}
