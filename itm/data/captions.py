"""The captions of a sample, as the members of a shard hold them."""

from __future__ import annotations

import json

from itm.data.formats import Json
from itm.data.records import Caption


def captions_of(key: str, content: dict[str, bytes]) -> tuple[Json, list[Caption], bool]:
    """json `captions` (objects or strings), else json `caption` (one string, whatever it holds, or several), else the lines of the txt.

    Third: whether the json says that there are none.
    """
    meta: Json = json.loads(content["json"]) if "json" in content else {}
    if not isinstance(meta, dict):
        raise ValueError(f"the json holds a {type(meta).__name__}, not an object")
    raw = meta.pop("captions", None)
    said_none = raw == []
    if raw is None and (said := meta.get("caption")):
        raw = said if isinstance(said, list) else [said]
    if raw is None:  # only a newline parts captions: U+2028 and others that `splitlines` knows are part of a text
        text = content.get("txt", b"").decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
        raw = text.split("\n") if content.get("txt") else []
    if not isinstance(raw, list):
        raise ValueError(f"json captions must be a list, not a {type(raw).__name__}")
    return meta, [Caption(c["id"], c["text"]) if _plain(c) else _caption(f"{key}#{n}", c) for n, c in enumerate(raw)], said_none


def _plain(raw: object) -> bool:
    """Whether a caption has two strings, `id` and `text`, and nothing else, as nearly all have."""
    return isinstance(raw, dict) and len(raw) == 2 and isinstance(raw.get("id"), str) and isinstance(raw.get("text"), str)


def _caption(default_id: str, raw: object) -> Caption:
    if isinstance(raw, str):
        return Caption(default_id, raw)
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
        raise ValueError(f"a caption must be a string or an object with a string `text`, not {repr(raw)[:80]}")
    meta = {name: value for name, value in raw.items() if name not in ("id", "text")}
    return Caption(str(raw.get("id", default_id)), raw["text"], meta)
