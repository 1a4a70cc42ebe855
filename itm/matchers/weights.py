"""What tells two matchers apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from itm.matchers.uni_heads import heads_of
from itm.types import Matcher


def weights_hash(matcher: Matcher) -> str:
    """12 hex digits over the names, shapes and values of all parameters and buffers, and the options; of a mean those of its members."""
    if len(matcher.averaged) > 1:
        return "+".join(map(weights_hash, matcher.averaged))
    digest = hashlib.sha256(repr((matcher.kind, matcher.options)).encode())
    if heads := heads_of(matcher):
        digest.update(repr(heads.options).encode())
    for name, value in sorted(matcher.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def tensors_sha256(module: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of all parameters and buffers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
