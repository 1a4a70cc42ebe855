"""Encoders that do not learn, not yet, or at rates of their own: `train.freeze`, `train.encoder_rate`, `train.layer_decay`.

An encoder that is to learn later takes part in every backward pass, and its gradient is dropped until then: so ranks, which must agree on
what has a gradient, need no other process group at that step. It runs as in evaluation meanwhile (no dropout).
"""

from __future__ import annotations

from torch import nn

from itm.config import Train
from itm.matchers.encoders.build import layers_of
from itm.types import Matcher, Method


def in_steps(train: Train, steps_per_epoch: int) -> Train:
    """`unfreeze_epoch` as `unfreeze_step`."""
    if train.unfreeze_epoch is None:
        return train
    return train.model_copy(update={"unfreeze_epoch": None, "unfreeze_step": train.unfreeze_epoch * steps_per_epoch})


def check_towers(matcher: Matcher, train: Train) -> None:
    """Raises ValueError for encoders that the matcher does not have, or that cannot learn as asked."""
    towers = matcher.encoders()
    own_rates = train.encoder_rate != 1.0 or train.layer_decay != 1.0
    if (train.freeze or own_rates) and not towers:
        raise ValueError(f"train.freeze, encoder_rate and layer_decay are of image and text encoders, which {matcher.kind!r} does not have")
    if train.layer_decay != 1.0 and not any(map(layers_of, towers.values())):
        raise ValueError("train.layer_decay is of Hugging Face encoders (hf_vision, hf_text, clip), and this model has none")
    if train.unfreeze_step is None and train.unfreeze_epoch is None:
        return
    for side in train.freeze:
        if not any(weight.requires_grad for weight in towers[side].parameters()):
            raise ValueError(f"train.freeze: the {side} encoder has freeze: true in the model, so it cannot learn later: leave that out")


def freeze(matcher: Matcher, train: Train) -> None:
    """Encoders that never learn get no gradient at all. Raises ValueError as `check_towers`."""
    check_towers(matcher, train)
    if train.unfreeze_step is None and train.unfreeze_epoch is None:
        for side in train.freeze:
            matcher.encoders()[side].requires_grad_(False)


def held_towers(method: nn.Module, train: Train, number: int) -> list[nn.Module]:
    """The encoders that do not learn at step `number`."""
    if not train.freeze or (train.unfreeze_step is not None and number >= train.unfreeze_step):
        return []
    matcher = method.matcher
    assert isinstance(matcher, Matcher)
    towers = matcher.encoders()
    return [towers[side] for side in train.freeze]


def rate_scales(method: Method, train: Train) -> dict[str, float]:
    """Name of a parameter -> what its learning rate is multiplied by, for those of encoders that learn at rates of their own.

    Of L layers the k-th from below (0-based) has encoder_rate * layer_decay^(L-1-k), what comes before the first encoder_rate *
    layer_decay^L, and what comes after the last encoder_rate.
    """
    if train.encoder_rate == 1.0 and train.layer_decay == 1.0:
        return {}
    places = {id(module): name for name, module in method.named_modules()}
    found = {}
    for tower in method.matcher.encoders().values():
        layers = [f"{places[id(layer)]}." for layer in layers_of(tower)]
        depth = len(layers)
        for name, _ in tower.named_parameters(prefix=places[id(tower)]):
            inside = next((k for k, prefix in enumerate(layers) if name.startswith(prefix)), None)
            if inside is not None:
                depth = len(layers) - 1 - inside
            elif depth < len(layers):  # behind the last layer
                depth = 0
            found[name] = train.encoder_rate * train.layer_decay**depth
    return found
