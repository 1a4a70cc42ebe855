"""Batches larger than memory holds: rows are encoded in chunks whose activations are dropped and made again, chunk by chunk, in the
backward pass. The loss sees all rows at once, so contrastive, hardest-negative and soft-label losses have the gradients of the big batch.

What is kept is one `Encoded` row each, the scores, and the activations of one chunk; the price is a second forward pass of the encoders.
Methods do it (`itm.matchers.chunked`); here is said which matchers it suits.
"""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from itm.types import Captions, Images, Matcher


def check_cached(matcher: Matcher, images: Images, captions: Captions) -> None:
    """Raises ValueError, with the reason, for a matcher whose rows cannot be encoded apart. images, captions: any two rows, to try it."""
    kind = matcher.kind
    if matcher.joint:
        raise ValueError(
            f"train.cache_chunk: matcher {kind!r} runs its joint encoder for every pair inside the score, so its encodings do not carry "
            "what the score needs and chunks would save nothing; unset it and use train.accumulate"
        )
    met: list[str] = []
    norms = [(name, module) for name, module in matcher.named_modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: met.append(name)) for name, module in norms]
    training = matcher.training
    try:
        with torch.no_grad():
            matcher.eval()
            matcher.encode_images(images)
            matcher.encode_captions(captions)
    finally:
        matcher.train(training)
        for hook in hooks:
            hook.remove()
    if met:
        raise ValueError(
            f"train.cache_chunk: the encoders of matcher {kind!r} use batch norm ({met[0]}), whose statistics would be those of a chunk, "
            "not of the batch; unset it, or choose encoders without batch norm"
        )
