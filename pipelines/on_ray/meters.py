"""What a running stage tells the exporter of its Ray node, which Prometheus reads: names begin with itm_, the exporter writes ray_ before.

cluster/grafana/itm.json shows them. Where this process has no Ray session nothing happens.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from typing import Any

GAUGES = {
    "itm_train_step": "steps done",
    "itm_train_steps": "steps of the whole run",
    "itm_train_loss": "mean loss of the last logged step",
    "itm_train_learning_rate": "learning rate of the last logged step",
    "itm_train_pairs_per_second": "pairs a second of all workers, validations and checkpoints not counted",
    "itm_train_waiting_share": "share of the training time in which rank 0 had no batch yet, 0 to 1",
    "itm_train_rejected": "images and captions that could not be used",
    "itm_train_seconds_left": "seconds to the last step at the pace so far, validations and checkpoints not counted",
    "itm_train_rsum": "rSum of the last validation",
    "itm_pack_rejected_images": "images that were rejected, 0 told as well",
}
COUNTERS = {
    "itm_train_pairs": "pairs that were trained on or rejected, of all workers",
    "itm_teach_rows": "rows that teachers have scored",
    "itm_teach_shards": "sidecars that were written",
    "itm_teach_busy_seconds": "seconds in which a teacher had a shard in hand",
    "itm_pack_images": "images of shards that were written or rejected",
    "itm_pack_bytes": "bytes of the shards that were written",
}
_rejected = Counter[str]()  # by split, in this process
TAGS = {"train": "run", "teach": "modality", "pack": "split"}


def gauge(name: str, value: float, label: str) -> None:
    """Set a gauge of `GAUGES`; label: the value of its tag (`TAGS`)."""
    if (meter := _meter(name)) is not None:
        meter.set(value, tags={_tag(name): label})


def count(name: str, more: float, label: str) -> None:
    """Add to a counter of `COUNTERS`."""
    if more > 0 and (meter := _meter(name)) is not None:
        meter.inc(more, tags={_tag(name): label})


def packed(split: str, images: int, rejected: int, size: int) -> None:
    """A shard of so many bytes was written; of its images some were rejected."""
    _rejected[split] += rejected
    count("itm_pack_images", images, split)
    count("itm_pack_bytes", size, split)
    gauge("itm_pack_rejected_images", _rejected[split], split)


def _tag(name: str) -> str:
    return TAGS[name.split("_")[1]]


def _meter(name: str) -> Any:
    """None where this process has no Ray session: a training inside the driver needs none."""
    begun = getattr(sys.modules.get("ray"), "is_initialized", None)  # a Ray that another thread is importing has none yet
    return _made(name) if begun is not None and begun() else None


@cache
def _made(name: str) -> Any:
    from ray.util import metrics

    kind, about = (metrics.Gauge, GAUGES[name]) if name in GAUGES else (metrics.Counter, COUNTERS[name])
    return kind(name, description=about, tag_keys=(_tag(name),))
