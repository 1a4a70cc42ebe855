"""docs/results/chaos.md, of the results that `tests.support.lab.chaos` has kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HEAD = """# Chaos on a cluster

`make chaos` kills stages of one machine at random moments, and then lets faults fall on walks of a
[cluster whose machines share no disk](../clusters.md#six-machines-that-share-no-disk): pack, teach, train with two workers, evaluate, each
by `itm submit`. One to seven faults of different kinds fall on a walk, at moments that are drawn. A stage that ends with an error is
submitted again, unchanged. At the end shards, manifests, stores, weights, metrics, and the digest of the plan are compared with those of
an undisturbed walk, byte for byte. A wrong clock is not among the faults: namespaces shift no wall clock, and under libfaketime 0.9.10
`time.sleep` of Python 3.11 fails.
"""
FOUND = """What it has found, and is mended since:

- an answer of S3 that breaks off in its header was taken for that of an empty object, and read as no bytes, without an error;
- an MLflow server told its clients to fetch artifacts from the store by an address that only the server knows: minutes of silent retries.
"""
ABOUT = {
    "node lost": "a machine loses its power, an empty one joins later",
    "driver killed": "SIGKILL to the job's driver on the head",
    "store cut": "S3 refuses connections for 20 s, open ones end",
    "tracking cut": "MLflow refuses connections for 20 s, open ones end",
    "cable out": "packets of a machine are lost for 10 s",
    "disk full": "not a byte is left below /tmp of a machine for 20 s",
    "straggler": "the processes of a machine run a tenth of the time for 20 s",
    "store slow": "each request to S3 waits 10 s, for 20 s",
    "store busy": "every third request to S3 gets 503 SlowDown, for 20 s",
    "store reset": "the connection of every third request to S3 is reset, for 20 s",
    "store half": "every third answer of S3 breaks off half-way, for 20 s",
}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    done = [row for row in rows if "submissions" in row]
    counts = Counter(kind for row in done for submission in row["submissions"] for kind in submission["blows"])
    equal = sum(not row["different"] for row in done)
    lines = [HEAD, f"{sum(counts.values())} faults on {len(rows)} walks; {equal} walks ended in the bytes of the undisturbed one.", ""]
    lines += ["| fault | what happens | times |", "|---|---|---|"]
    lines += [f"| {kind} | {about} | {counts[kind]} |" for kind, about in ABOUT.items() if counts[kind]]
    lines += ["", FOUND, "| walk | stage | faults | outcome | end |", "|---|---|---|---|---|"]
    for row in rows:
        lines += _rows(row)
    return "\n".join(lines) + "\n"


def _rows(row: Mapping[str, Any]) -> list[str]:
    shares = {(blow["kind"], blow["stage"]): blow["share"] for blow in row["blows"]}
    end = "not reached" if "failed" in row else "equal" if not row["different"] else f"{len(row['different'])} files differ"
    found, submissions = [], row.get("submissions", [])
    for number, submission in enumerate(submissions):
        if not submission["blows"]:
            continue
        stage = submission["stage"]
        faults = ", ".join(f"{kind} at {shares[kind, stage]:.0%}" for kind in submission["blows"])
        again = sum(later["stage"] == stage for later in submissions[number + 1 :])
        found.append(f"| {row['walk']} | {stage} | {faults} | {_outcome(submission, again)} | {end} |")
    return found


def _outcome(submission: Mapping[str, Any], again: int) -> str:
    if submission["code"] == 0:
        return "went on"
    said = submission["said"].replace("|", "/")
    how = f"ended with {submission['code']}: `{said}`" if said else f"ended with {submission['code']}"
    return f"{how}; submitted again{f' {again} times' if again > 1 else ''}, went on"
