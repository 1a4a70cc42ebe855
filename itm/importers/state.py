"""Filling a matcher from a state dict: one way for all families, naming every key that does not fit."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from itm.types import Matcher


def fill(matcher: Matcher, state: dict[str, Tensor]) -> None:
    """Load a state dict. Raises ValueError naming every key that is missing, unexpected or of another shape."""
    known = matcher.state_dict()
    for key in known.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = known[key]
    problems = _listed("missing", known.keys() - state.keys()) + _listed("unexpected", state.keys() - known.keys())
    problems += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(known[key].shape)}"
        for key in sorted(known.keys() & state.keys())
        if state[key].shape != known[key].shape
    ]
    if problems:
        raise ValueError(f"checkpoint does not fit {type(matcher).__name__}: {'; '.join(problems)}. Is it whole, and of this family?")
    matcher.load_state_dict(state)


def _listed(what: str, keys: Iterable[str]) -> list[str]:
    found = sorted(keys)
    return [f"{what} {', '.join(found[:8])}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"] if found else []
