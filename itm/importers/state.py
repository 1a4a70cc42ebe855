"""From the content of a checkpoint to a filled matcher, one way for all families: containers, wrappers, and every key that does not fit.

A training script saves its weights below a container (`{"state_dict": ..., "epoch": ...}`), and what wrapped the model while it trained
leaves a name in front of each key: DDP and DataParallel `module.`, `torch.compile` `_orig_mod.`, a Lightning module the name of its
attribute. Wrappers nest in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
LEADING = frozenset(("module", "model", "net", "network", "clip_model"))
"""Names of wrappers where they stand before the model; inside it they could be a layer's own name. CUSA calls its CLIP `clip_model`."""
ANYWHERE = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
"""Names that only a wrapper has: single layers are compiled, sharded and checkpointed too."""


def state_of(checkpoint: Mapping[str, object]) -> Mapping[str, object]:
    """The flat state dict of a checkpoint, bare or below any nesting of `CONTAINERS`."""
    inner = next((held for name in CONTAINERS if isinstance(held := checkpoint.get(name), Mapping)), None)
    return checkpoint if inner is None else state_of(inner)


def bare_name(key: str) -> str:
    """A key without the names that wrappers put before or into it."""
    parts = [part for part in key.split(".") if part not in ANYWHERE]
    while len(parts) > 1 and parts[0] in LEADING:
        parts = parts[1:]
    return ".".join(parts)


def bare_tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of a flat state dict under their bare names.

    Raises ValueError naming two keys that become one, as those of a model and its average would.
    """
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        name = bare_name(key)
        if name in origin:
            raise ValueError(f"the checkpoint holds {name} twice, as {origin[name]} and as {key}: save one of the two models alone")
        tensors[name], origin[name] = value, key
    return tensors


def check_options(needed: Mapping[str, object], known: Iterable[str], family: str) -> None:
    """Raises ValueError for an option that the family does not read: it would have no effect."""
    names = sorted(known)
    if unknown := sorted(needed.keys() - set(names)):
        raise ValueError(f"unknown option {', '.join(unknown)}: a {family} checkpoint takes {', '.join(names)}")


def tensor_of(state: Mapping[str, Tensor], key: str, family: str) -> Tensor:
    """Raises ValueError naming the key that a checkpoint of the family must have."""
    if key not in state:
        raise ValueError(f"checkpoint does not fit {family}: missing {key}. Is it whole, and of this family?")
    return state[key]


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict. Raises ValueError naming every key that is missing, unexpected or of another shape."""
    known = model.state_dict()
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
        raise ValueError(f"checkpoint does not fit {type(model).__name__}: {'; '.join(problems)}. Is it whole, and of this family?")
    model.load_state_dict(state)


def _listed(what: str, keys: Iterable[str]) -> list[str]:
    found = sorted(keys)
    return [f"{what} {', '.join(found[:8])}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"] if found else []
