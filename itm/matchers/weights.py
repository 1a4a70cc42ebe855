"""What tells two matchers apart."""

from __future__ import annotations

import hashlib

import torch

from itm.matchers.uni_heads import heads_of
from itm.types import Matcher


def weights_hash(matcher: Matcher) -> str:
    """12 hex digits over the names, shapes and values of all parameters and buffers, and the options."""
    digest = hashlib.sha256(repr((matcher.kind, matcher.options)).encode())
    if heads := heads_of(matcher):
        digest.update(repr(heads.options).encode())
    for name, value in sorted(matcher.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
