"""What `itm evaluate` stands on. Named here for those who must not import torch to know them."""

from collections.abc import Mapping

FORMAT = 1  # of evaluation.json


def group_of(result: Mapping[str, str]) -> str:
    """Under which heading the figures of an evaluation stand in MLflow: a protocol overwrites no other."""
    split, protocol = result["split"], result["protocol_name"]
    return f"{'test' if split == protocol else split}/{protocol}"  # sts names its pairs by the protocol
