"""Raw data by kind: `Source(path=..., ...)` with `splits` and `records(split) -> Iterator[Record]`. One file, one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from itm.kinds import Kinds

if TYPE_CHECKING:
    from itm.data.sources.source import Source

SOURCES: Kinds[Source] = Kinds(
    "itm.data.sources.source:Source",
    {
        "imagefolder": "itm.data.sources.folder:ImageFolder",
        "parquet": "itm.data.sources.parquet:Parquet",
        "hub": "itm.data.sources.hub:Hub",
        "scenes": "itm.data.sources.scenes:Scenes",
        "pairs_json": "itm.data.sources.pairs_json:PairsJson",
        "karpathy": "itm.data.sources.karpathy:Karpathy",
        "coco_captions": "itm.data.sources.coco:CocoCaptions",
        "csv": "itm.data.sources.csv:CsvPairs",
        "precomp": "itm.data.sources.precomp:Precomp",
        "uniter_db": "itm.data.sources.uniter_db:UniterDb",
        "flickr30k_entities": "itm.data.sources.flickr30k_entities:Flickr30kEntities",
        "winoground": "itm.data.sources.winoground:Winoground",
        "labelled": "itm.data.sources.labelled:Labelled",
        "bua_tsv": "itm.data.sources.bua_tsv:BuaTsv",
    },
)
