"""A matcher on disk: config.json (architecture), model.safetensors (weights), inputs.json and tokenizer/ (preparation). No pickle."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_model, save_model

from itm.config import Part
from itm.data import files
from itm.data.formats import check_format
from itm.kinds import MissingPackage, build_part, check_allowed, find_part, origins
from itm.matchers import MATCHERS
from itm.matchers.encoders.build import IMAGE_ENCODERS
from itm.matchers.mean import Mean, load_inputs
from itm.matchers.uni_heads import UniHeads, give_heads, heads_of
from itm.types import Matcher, MatcherInputs, Options

FORMAT = 2  # 1 where nothing is said that a reader of 1 does not know


def build_matcher(part: Part, inputs: MatcherInputs) -> Matcher:
    """A matcher with fresh weights that carries its `inputs`. Raises ValueError for an unknown kind or option."""
    options = _with_image_size(part, inputs.image.size)
    matcher = build_part(MATCHERS, part.kind, options, "model", vocab_size=inputs.tokenizer.vocab_size)
    matcher.inputs = inputs
    return matcher


def _with_image_size(part: Part, size: int) -> Options:
    """The options of the model, with the size of the data's images for an image encoder that is built for one size and is told none."""
    usual = find_part(MATCHERS, part.kind, "model").image_kind
    given = part.options.get("image") or {}
    kind = given.get("kind", usual) if isinstance(given, dict) else None
    if kind is None or (kind not in IMAGE_ENCODERS and ":" not in kind) or "image_size" in given:
        return part.options
    if "image_size" not in inspect.signature(find_part(IMAGE_ENCODERS, kind, "image encoder")).parameters:
        return part.options
    return {**part.options, "image": {"kind": kind, **given, "image_size": size}}


def take_weights(matcher: Matcher, uri: str, allow: Iterable[str] = ()) -> None:
    """Copy all weights of a matcher folder; uni heads that it has are attached.

    Raises ValueError when it is of another kind or of other sizes than `matcher`.
    """
    other = load_matcher_folder(uri, allow)
    if other.kind != matcher.kind:
        raise ValueError(
            f"{uri} holds a {other.kind!r}, model.kind is {matcher.kind!r}: take model.kind and model.options from its config.json"
        )
    heads = heads_of(other)
    give_heads(other, None)
    try:
        matcher.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{uri} does not fit model.options, take them from its config.json: {error}") from None
    if heads is not None:
        give_heads(matcher, heads)


def save_matcher(matcher: Matcher, folder: str | Path) -> None:
    """Write a matcher folder, local or remote. The folder appears whole or not at all (remote: config.json comes last)."""
    target = files.absolute(folder)
    local = not files.is_remote(target)
    if local:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    with _scratch(Path(target) if local else None) as scratch:
        written = scratch / "matcher"
        written.mkdir()
        save_model(matcher, str(written / "model.safetensors"))
        matcher.inputs.save(written)
        config: dict[str, object] = {"format": 1, "kind": matcher.kind, "options": matcher.options}
        if heads := heads_of(matcher):
            config["uni_heads"] = heads.options
        if heads or matcher.kind == Mean.kind:
            config["format"] = FORMAT
        if packages := origins(config):
            config["packages"] = packages
        (written / "config.json").write_text(json.dumps(config, indent=1))
        if local:
            _replace(written, Path(target))
        else:
            _upload(written, target)


@contextlib.contextmanager
def _scratch(target: Path | None) -> Iterator[Path]:
    """A folder beside the target, whose name tells the next run when its writer died; without one, anywhere."""
    if target is None:
        with tempfile.TemporaryDirectory() as anywhere:
            yield Path(anywhere)
        return
    beside = Path(files.temporary(str(target)))
    beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(written: Path, target: Path) -> None:
    """A folder cannot be renamed over a full one: the old one steps aside first."""
    aside = written.parent / "old"
    if target.exists():
        os.rename(target, aside)
    os.rename(written, target)
    shutil.rmtree(aside, ignore_errors=True)


def _upload(written: Path, target: str) -> None:
    paths = sorted((p for p in written.rglob("*") if p.is_file()), key=lambda p: p.name == "config.json")
    for path in paths:
        files.write_atomic(files.join(target, *path.relative_to(written).parts), path.read_bytes())


def load_matcher_folder(folder: str | Path, allow: Iterable[str] = ()) -> Matcher:
    """The matcher of a folder or URI, in evaluation mode, with its `inputs`.

    Raises ValueError naming what is missing, NewerFormat, and, before anything is imported, for a part of a package that is not in `allow`.
    """
    with files.local_copy(folder) if files.is_remote(folder) else contextlib.nullcontext(Path(files.absolute(folder))) as path:
        for name in ("config.json", "model.safetensors"):
            if not (path / name).exists():
                raise ValueError(f"{folder} is no matcher folder: {name} is missing; `itm train` and `itm import` make one")
        config = json.loads((path / "config.json").read_text())
        check_format(f"{folder}/config.json", config, FORMAT)
        part = Part(kind=config["kind"], options=config["options"])
        check_allowed(part.model_dump(), allow, f"{folder}/config.json")
        try:
            matcher = build_matcher(part, load_inputs(path))
        except MissingPackage as error:
            made = "; ".join(f"{name} of {origin}" for name, origin in config.get("packages", {}).items())
            raise MissingPackage(f"{folder}/config.json: {error}" + f" (the folder was made with {made})" * bool(made)) from None
        if "uni_heads" in config:
            give_heads(matcher, UniHeads(**config["uni_heads"]))
        load_model(matcher, str(path / "model.safetensors"))
    return matcher.eval()
