"""What tells two matchers apart."""

from __future__ import annotations

import hashlib

import torch


def weights_hash(matcher: torch.nn.Module) -> str:
    """12 hex digits over the names, shapes and values of all parameters and buffers, and the options."""
    digest = hashlib.sha256(repr((getattr(matcher, "kind", type(matcher).__name__), getattr(matcher, "options", None))).encode())
    for name, value in sorted(matcher.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
