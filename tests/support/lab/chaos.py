"""Chaos on the lab: walks of pack, teach, train and evaluate by `itm submit`, on which faults of many kinds fall at random moments.

python -m tests.support.lab.chaos --results docs/results/chaos.json           # until at least 20 faults have fallen, or 50 minutes are over
python -m tests.support.lab.chaos --results docs/results/chaos.json --page docs/results/chaos.md

A stage that ends with an error is submitted again, as a user would. Shards, stores, plan digests and weights must end in the bytes of an
undisturbed walk: the number of workers is the same. What was done stays in the file of results, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.lab.cluster import Lab, lab, lab_recipe
from tests.support.lab.faults import FAULTS, Blow, drawn, tidy
from tests.support.lab.machines import missing
from tests.support.s3_server import BUCKET

STAGES = ("pack", "teach", "train", "evaluate")
AGAIN = 4  # times that a stage may be submitted again
LONGEST = 900.0  # seconds after which a stage is taken to hang
FIRST = (
    (
        Blow("store cut", "pack", 0.6, 0),
        Blow("driver killed", "teach", 0.5, 0),
        Blow("tracking cut", "train", 0.4, 0),
        Blow("node lost", "train", 0.6, 0),
        Blow("store half", "evaluate", 0.3, 0),
    ),
    (
        Blow("disk full", "pack", 0.5, 1),
        Blow("store reset", "pack", 0.8, 0),
        Blow("driver killed", "teach", 0.6, 0),
        Blow("store busy", "teach", 0.8, 0),
        Blow("straggler", "train", 0.5, 1),
        Blow("cable out", "train", 0.7, 2),
        Blow("store slow", "evaluate", 0.4, 0),
    ),
)
"""The blows of the first walks, on which every kind falls; a test repeats the first. Those of the others are drawn."""
Row = dict[str, Any]


def recipe_of(walk: str) -> Row:
    """Every walk has folders of its own in the bucket, and the same name."""
    return lab_recipe(output=f"s3://{BUCKET}/{walk}/runs", data__root=f"s3://{BUCKET}/{walk}/shards")


def result(there: Lab, walk: str) -> dict[str, str]:
    """Digests of what must be equal: shards, manifests, stores, weights, metrics, and of the last checkpoint the position and the digest of
    the plan."""
    found = {name.removeprefix(f"{walk}/"): data for name, data in there.objects(walk).items()}
    states = sorted(name for name in found if "/checkpoints/" in name and name.endswith(".json"))
    state = json.loads(found[states[-1]])
    kept = {name: data for name, data in found.items() if name.startswith("shards/") or name.endswith("matcher/model.safetensors")}
    metrics = json.loads(found["runs/lab/evaluation.json"])["metrics"]
    counts = {name: state[name] for name in ("position", "digest", "pairs", "used", "rejected")}
    kept |= {"state": json.dumps(counts).encode(), "metrics": json.dumps(metrics, sort_keys=True).encode()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in kept.items()}


def refusal(said: str) -> str:
    """The line in which a stage said what stopped it; else the last line of its log."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("itm ") and ": " in line]
    return (named or lines or [""])[-1][:300]


def submit(there: Lab, stage: str, blows: Sequence[Blow], usual: float) -> Row:
    """One submission of a stage under blows; how it ended."""
    log, struck = there.folder / "submit.log", list[str]()
    log.unlink(missing_ok=True)
    job = there.start(stage, recipe="walk.yaml", log=log)
    begin = time.monotonic()

    def ended(seconds: float) -> bool:
        try:
            job.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    try:
        for blow in blows:  # in this thread: a machine dies with the thread that made it
            if not ended(begin + blow.share * usual - time.monotonic()):
                FAULTS[blow.kind](there, blow.worker, ended)
                struck.append(blow.kind)
        assert ended(LONGEST), f"{stage} hangs after {struck}: {log.read_text()[-1500:]}"
    finally:
        job.kill()
    said, code = log.read_text(), job.returncode
    row = {"blows": struck, "code": code, "seconds": round(time.monotonic() - begin, 1), "said": "" if code == 0 else refusal(said)}
    return row if code == 0 else row | {"tail": said[-1500:]}


def walk(there: Lab, name: str, blows: Sequence[Blow], usual: Mapping[str, float]) -> list[Row]:
    """All stages to their end; a row for each submission. Raises AssertionError for a stage that does not come to one."""
    there.submitter.write("walk.yaml", json.dumps(recipe_of(name)))
    rows = []
    for stage in STAGES:
        fall = sorted((blow for blow in blows if blow.stage == stage), key=lambda blow: blow.share)
        for attempt in range(AGAIN + 1):
            ended = submit(there, stage, fall if attempt == 0 else [], usual.get(stage, 60.0))
            tail = ended.pop("tail", "")
            rows.append({"stage": stage, **ended})
            print(f"{name} {stage}: {ended['blows']} -> {ended['code']} in {ended['seconds']} s {ended['said']}", flush=True)
            for machine in there.workers:
                tidy(machine)
            if ended["code"] == 0:
                break
        else:
            raise AssertionError(f"{stage} of {name} did not come to an end:\n{tail}")
    return rows


def disturbed(there: Lab, number: int, blows: Sequence[Blow], usual: Mapping[str, float], expected: Mapping[str, str]) -> Row:
    """A walk under blows, compared with the undisturbed one."""
    begin, name = time.monotonic(), f"walk-{number}"
    row: Row = {"walk": number, "blows": [blow.to_json() for blow in blows]}
    try:
        row["submissions"] = walk(there, name, blows, usual)
        found = result(there, name)
        row["different"] = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    except AssertionError as error:
        row["failed"] = str(error)[-2000:]
    return row | {"seconds": round(time.monotonic() - begin)}


def quiet(there: Lab) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each stage when nothing happens, and the result."""
    rows = walk(there, "quiet", [], {})
    return {row["stage"]: row["seconds"] for row in rows}, result(there, "quiet")


def chaos(folder: Path, kept: Path, seed: int, faults: int, seconds: float, kinds: Sequence[str] = ()) -> list[Row]:
    """Walks until `faults` have fallen or the time is over; the rows of the file, with those of earlier calls.

    The undisturbed walk is done once: the file keeps its seconds and its digests.
    """
    done: Row = json.loads(kept.read_text()) if kept.exists() else {"walks": []}
    rows, end = done["walks"], time.monotonic() + seconds
    with lab(folder, workers=3) as there:
        if "expected" not in done:
            done["usual"], done["expected"] = quiet(there)
        while fallen(rows) < faults and time.monotonic() < end:
            number = max((row["walk"] for row in rows), default=0) + 1
            blows: Sequence[Blow] = drawn(seed + number, STAGES, len(there.workers), list(kinds or FAULTS))
            if number <= len(FIRST) and not kinds:
                blows = FIRST[number - 1]
            rows.append(disturbed(there, number, blows, done["usual"], done["expected"]))
            kept.write_text(json.dumps(done, indent=1) + "\n")
            print(f"walk {number}: {fallen(rows)} faults so far, different: {rows[-1].get('different', 'not finished')}", flush=True)
    return rows


def fallen(rows: Sequence[Row]) -> int:
    return sum(len(submission["blows"]) for row in rows for submission in row.get("submissions", []))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(FAULTS), help="only these (default: all)")
    parser.add_argument("--page", type=Path, help="write the page of the results and leave")
    args = parser.parse_args()
    if args.page:
        from tests.support.lab.chaos_page import page

        args.page.write_text(page(json.loads(args.results.read_text())["walks"]))
        return 0
    if why := missing():
        print(f"NOT RUN: chaos on a cluster; {why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="itm-chaos-", dir="/var/tmp") as scratch:
        rows = chaos(Path(scratch), args.results, args.seed, args.faults, args.seconds, args.kinds)
    bad = [row["walk"] for row in rows if "failed" in row or row["different"]]
    print(f"{fallen(rows)} faults on {len(rows)} walks; ended otherwise: {bad or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
