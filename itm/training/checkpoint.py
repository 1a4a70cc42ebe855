"""Checkpoints on any filesystem: weights as safetensors, optimiser state read with weights_only, facts as JSON written last.

    <root>/000000100.model.safetensors, .average.safetensors (with EMA), .optimizer.pt, .json     state after step 100
    <root>/best-000000100.safetensors                                                             the matcher of the best validation

A checkpoint exists when its .json does. What restores the data is the plan position; random numbers are functions of the
step (`itm.training.step`) and of the sample (`itm.data.preprocess.draw`), so none are stored.
"""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_model, save_model
from torch import nn

from itm.data import files
from itm.data.formats import check_format
from itm.data.plan import Position
from itm.distributed import rank
from itm.training.step import Step
from itm.types import Matcher, Options

KEPT, FORMAT = 2, 2  # format 2: with `waiting`, which is written where there is one


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Waiting:
    """What `train.patience` counts: validations since the best value of a metric."""

    metric: str
    best: float
    validations: int = 0


@dataclass(frozen=True)
class State:
    """position: the next pair of the plan; digest: of the order up to there; losses: logged rows.

    seconds and pairs: trained so far; used + rejected = pairs, counted as they came.
    """

    position: Position
    digest: str
    best: Best | None = None
    seconds: float = 0.0
    pairs: int = 0
    used: int = 0
    rejected: int = 0
    losses: tuple[Options, ...] = ()
    waiting: Waiting | None = None

    def to_json(self) -> bytes:
        said = asdict(self)
        if self.waiting is None:
            del said["waiting"]
        return json.dumps({"format": FORMAT if self.waiting else 1, **said}).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str = "a checkpoint") -> State:
        """Raises NewerFormat naming the file `where`."""
        said = json.loads(data)
        check_format(where, said, FORMAT)
        said.pop("format", None)
        best = Best(**said["best"]) if said["best"] else None
        waiting = Waiting(**said["waiting"]) if said.get("waiting") else None
        return cls(**said | {"position": Position(**said["position"]), "best": best, "losses": tuple(said["losses"]), "waiting": waiting})


def save_checkpoint(root: str, state: State, step: Step) -> None:
    """Store what `load_checkpoint` restores, then remove all but the newest KEPT checkpoints and the best matcher.

    All ranks call it, since sharded weights must be gathered; rank 0 writes.
    """
    name = files.join(root, f"{state.position.step:09d}")
    for kind in step.modules:
        module = step.gathered(kind)
        if rank() == 0:
            write_weights(f"{name}.{kind}.safetensors", module)
    optimizer: Options = {"optimizer": step.optimizer_state()}
    if rank():
        return
    if step.average is not None:
        optimizer["averaged"] = int(step.average.n_averaged)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    files.write_atomic(f"{name}.optimizer.pt", buffer.getvalue())
    files.write_atomic(f"{name}.json", state.to_json())
    _prune(root, state.best)


def latest(root: str) -> State | None:
    """The state of the newest whole checkpoint. Raises NewerFormat."""
    whole = _whole(root)
    return State.from_json(files.read_bytes(whole[-1]), whole[-1]) if whole else None


def load_checkpoint(root: str, state: State, step: Step) -> None:
    """Restore weights, optimiser and moving average. Raises ValueError when they are of another architecture."""
    name = files.join(root, f"{state.position.step:09d}")
    for kind in step.modules:
        step.load(kind, partial(read_weights, f"{name}.{kind}.safetensors"))
    saved = torch.load(io.BytesIO(files.read_bytes(f"{name}.optimizer.pt")), weights_only=True, map_location="cpu")
    step.load_optimizer_state(saved["optimizer"])
    if step.average is not None:
        step.average.n_averaged.fill_(saved["averaged"])


def best_uri(root: str, best: Best) -> str:
    return files.join(root, f"best-{best.step:09d}.safetensors")


def write_weights(uri: str, module: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "weights"
        try:
            save_model(module, str(path))
        except SafetensorError as error:
            raise OSError(f"cannot write {uri}: {scratch}: {error}") from None
        files.write_atomic(uri, path.read_bytes())


def read_weights(uri: str, module: nn.Module) -> None:
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "weights"
            path.write_bytes(files.read_bytes(uri))
            load_model(module, str(path))
    except RuntimeError as error:
        raise ValueError(f"{uri} does not fit this model: {error}; restore the recipe, or start afresh with --overwrite") from None


def holds_heads(uri: str, matcher: Matcher) -> bool:
    """Whether the weights at `uri` hold those of the uni heads that are attached to the matcher, where there are some."""
    wanted = {name for name in matcher.state_dict() if name.startswith("uni_heads.")}
    return wanted <= set(load(files.read_bytes(uri)))


def _whole(root: str) -> list[str]:
    """The .json of whole checkpoints, oldest first."""
    return [uri for uri in files.list_files(root, ".json") if files.name_of(uri).removesuffix(".json").isdigit()]


def _prune(root: str, best: Best | None) -> None:
    """The .json goes first, so that a checkpoint is never there in part."""
    for gone in _whole(root)[:-KEPT]:
        files.delete(gone)
    stems = {files.name_of(uri).removesuffix(".json") for uri in _whole(root)}
    if best is not None:
        stems.add(f"best-{best.step:09d}")
    for uri in files.list_files(root):
        if files.name_of(uri).split(".")[0] not in stems:
            files.delete(uri)
