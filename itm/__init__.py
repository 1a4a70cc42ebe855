"""itm: image-text matching. `itm.load_matcher(uri)` is the front door."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch comes with the first matcher
    from itm.types import Matcher

__version__ = "0.1.0"


def load_matcher(uri: str | Path, device: str = "cpu", allow: Iterable[str] = ()) -> Matcher:
    """A matcher in eval mode on `device` (auto, cpu, cuda, ...), with `.inputs` that turn raw images and texts into its input types.

    `uri` is a matcher folder, or `models:/name@alias`, `models:/name/version`, `runs:/...` in the model registry, or a Hugging Face
    model of an image and a text tower (CLIP, SigLIP, ...) by hub name or folder: that is used as it is, zero-shot. `allow`: packages whose
    code may run because the matcher names a part of them, e.g. ["acme"]; the project's own parts need none.
    Raises ValueError naming what is missing and what exists, and MissingExtra for a registry without the extra `tracking`.
    """
    from itm.device import resolve_device
    from itm.matchers.folder import load_matcher_folder

    target = resolve_device(device)
    if str(uri).startswith(("models:/", "runs:/")):
        from itm.extras import needed_by

        with needed_by(f"load_matcher({str(uri)!r})", extra="tracking"):
            from itm.tracking.fetch import download

        uri = download(str(uri))
    elif "://" not in str(uri):
        from itm.importers.hub import is_hub, load_hub

        if is_hub(str(uri)):
            return load_hub(str(uri)).to(target)
    return load_matcher_folder(uri, allow).to(target)
