"""Judging a matcher. The choices that a command line offers are named here: it must not import torch to show them."""

from __future__ import annotations

from itm.kinds import Kinds

TIES = ("pessimistic", "optimistic", "official", "official_iais", "lower_index")  # how equal scores are ordered
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # of scoring

PROTOCOLS: Kinds[object] = Kinds(
    "itm.evaluation.protocols:Protocol",
    {
        "auto": "itm.evaluation.protocols:AllPairs",
        "flickr30k-1k": "itm.evaluation.protocols:Flickr30K",
        "coco-5k": "itm.evaluation.protocols:Coco5K",
        "coco-1k-5fold": "itm.evaluation.protocols:Coco1KFolds",
        "eccv": "itm.evaluation.protocols:ECCV",
        "cxc": "itm.evaluation.protocols:CxC",
        "i2i": "itm.evaluation.protocols:ImageToImage",
        "t2t": "itm.evaluation.protocols:TextToText",
        "winoground": "itm.evaluation.winoground:Winoground",
        "positives": "itm.evaluation.positives:Positives",
        "image-retrieval": "itm.evaluation.image_retrieval:ImageRetrieval",
        "sts": "itm.evaluation.sentence_pairs:STS",
        "senteval": "itm.evaluation.senteval:SentEval",
        "sts12": "itm.evaluation.senteval:STS12",
        "sts13": "itm.evaluation.senteval:STS13",
        "sts14": "itm.evaluation.senteval:STS14",
        "sts15": "itm.evaluation.senteval:STS15",
        "sts16": "itm.evaluation.senteval:STS16",
        "isd": "itm.evaluation.relations:ISD",
        "isda": "itm.evaluation.relations:ISDa",
    },
)
