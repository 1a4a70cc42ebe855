"""A data set of the Hugging Face hub, or a local folder laid out as one, through `datasets`."""

from __future__ import annotations

from itm.data import files
from itm.data.formats import Json
from itm.data.sources.parquet import Parquet
from itm.data.sources.splits import SPLIT_NAMES, in_order
from itm.extras import needed_by


class Hub(Parquet):
    """`path`: a name (`nlphuji/flickr30k`) or a folder. `name`: the configuration, where there are several; `revision`: a commit or tag.

    `datasets` downloads it, or takes it from its cache (`cache_dir`; unset = HF_DATASETS_CACHE), and nothing is asked of a network where
    HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is 1. What it made is read as `Parquet` reads a saved data set; that explains the other options.
    Raises ValueError when it cannot be had, MissingExtra without the extra `hf`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        image_column: str | None = None,
        caption_columns: list[str] | str | None = None,
        group_by: str | None = None,
    ) -> None:
        self.asked: Json = {"path": path, "name": name, "revision": revision}
        super().__init__(dict(in_order(_cached(self.asked, cache_dir))), image_column, caption_columns, group_by)

    def identity(self) -> Json:
        return super().identity() | {"source": "Hub", "asked": self.asked}


def _cached(asked: Json, cache_dir: str | None) -> dict[str, list[str]]:
    """split -> the Arrow files that `datasets` keeps of it."""
    with needed_by("the source hub", "hf"):
        import datasets
    path = str(asked["path"])
    where = files.absolute(path) if files.exists(path) else path
    cache = files.absolute(cache_dir) if cache_dir else None
    try:
        held = datasets.load_dataset(where, asked["name"], revision=asked["revision"], cache_dir=cache)
    except Exception as error:  # of the network, of the data set, of a file in it
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the data set {path} cannot be had: {said[0]} (options: name, revision; a login by HF_TOKEN)") from None
    return {SPLIT_NAMES.get(str(split), str(split)): [str(one["filename"]) for one in rows.cache_files] for split, rows in held.items()}
