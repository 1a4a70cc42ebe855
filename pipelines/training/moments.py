"""What a rank does between steps, one function a moment: log, validate, checkpoint; and finish, after the last of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from itm.data import files
from itm.data.formats import Json
from itm.data.mix import Mixture, parts_of
from itm.data.patience import ASKED
from itm.data.preprocess import ImageInput, Inputs
from itm.distributed import all_reduce_sum, broadcast, rank
from itm.evaluation.metrics import retrieval_metrics
from itm.evaluation.over_ranks import encode_over_ranks, score_over_ranks
from itm.evaluation.relations import MOST_PAIRS, isd_of_split
from itm.matchers.folder import save_matcher
from itm.matchers.uni_heads import give_heads
from itm.progress import span
from itm.training.checkpoint import Best, best_uri, holds_heads, read_weights, save_checkpoint, write_weights
from itm.training.compiled import as_written
from itm.training.optim import scalars
from pipelines.on_ray import meters
from pipelines.training.ending import waited_for
from pipelines.training.rank import Rank

ISD_IMAGES = 16  # for a curve
Report = Callable[..., None]
"""(steps done, what else there is to say, the values logged or nothing), called on rank 0 at every logged step, and for other news."""


def log(here: Rank, report: Report, done: int, losses: dict[str, float]) -> None:
    """Losses, learning rate, speed and rejected pairs of all ranks, into the state and the tracker."""
    counts = torch.tensor([float(len(here.problems.rows)), ASKED.again, ASKED.waited], device=here.step.device)
    rejected, *here.asked = all_reduce_sum(counts).tolist()
    # Pairs of all ranks a second, in this process's share of the run, validation and checkpoints not counted.
    speed = (done - here.first) * here.course.plan.global_batch / max(here.clock.here, 1e-9)
    rates = {"lr": here.course.rate(done - 1), "samples_per_s": speed, "rejected": rejected}
    values = losses | rates | dict(scalars(here.step.plain)) | shares(here)
    here.state = replace(here.state, losses=(*here.state.losses, {"step": done, **values}))
    if here.tracker:
        here.tracker.metrics({f"train/{name}": value for name, value in values.items()}, step=done)
        waited = here.waited / max(here.clock.here, 1e-9)
        tell(here, done, values, waited)
        left = f", {span(seconds_left(here, done, values))} left" if done < here.course.steps else ""
        report(done, f"loss {losses['loss']:.4f}, {speed:,.0f} pairs/s, {waited:.0%} waiting for data{left}", values)


def seconds_left(here: Rank, done: int, values: dict[str, float]) -> float:
    """To the last step at the pace of this process so far, validations and checkpoints not counted."""
    return (here.course.steps - done) * here.course.plan.global_batch / max(values["samples_per_s"], 1e-9)


def tell(here: Rank, done: int, values: dict[str, float], waited: float) -> None:
    """A logged step, to the exporter of this node. waited: share of the time in which there was no batch yet."""
    run = here.job.recipe.name
    meters.count("itm_train_pairs", (done - here.told) * here.course.plan.global_batch, run)
    here.told = done
    for name, value in {
        "step": done,
        "steps": here.course.steps,
        "loss": values["loss"],
        "learning_rate": values["lr"],
        "pairs_per_second": values["samples_per_s"],
        "waiting_share": waited,
        "rejected": values["rejected"],
        "seconds_left": seconds_left(here, done, values),
    }.items():
        meters.gauge(f"itm_train_{name}", value, run)


def shares(here: Rank) -> dict[str, float]:
    """Of a mixture: `mix/<number of the root>`, the share of all ranks' pairs that it has given since this process took the run up."""
    if not isinstance(here.job.manifest, Mixture):
        return {}
    given = all_reduce_sum(here.given.clone().to(here.step.device)).cpu()
    return {f"mix/{number}": float(count / given.sum()) for number, count in enumerate(given)}


def validate(here: Rank, done: int) -> None:
    """By all ranks, in the recipe's precision; rank 0 keeps the weights of the best rSum."""
    job, recipe = here.job, here.job.recipe
    if not recipe.data.val_split:
        return
    with here.clock.stopped(), here.step.whole() as module, as_written(recipe.train.compile):
        broadcast(module.buffers())  # running statistics, and their moving average, are those of rank 0
        method: Any = module
        matcher = method.matcher
        metrics = metrics_of(here, matcher)
        if here.tracker is None:
            return
        here.tracker.metrics({f"val/{name}": value for name, value in (metrics | distances_of(here, matcher)).items()}, step=done)
        meters.gauge("itm_train_rsum", metrics["rsum"], recipe.name)
        if here.state.best is None or metrics["rsum"] > here.state.best.metrics["rsum"]:
            best = Best(done, metrics)
            with method.serving() as kept:
                write_weights(best_uri(job.checkpoints, best), kept)
            here.state = replace(here.state, best=best)
        here.state = replace(here.state, waiting=waited_for(here.state.waiting, recipe, metrics))


def metrics_of(here: Rank, matcher: Any) -> dict[str, float]:
    """Recalls on the validation split, on rank 0; {} on the others, which have done their share by then."""
    data, asked, where = here.job.recipe.data, here.job.recipe.evaluation, (here.step.device, here.step.precision)
    split = here.job.split(data.val_split)
    encoded = encode_over_ranks(matcher, split, asked.batch_size, data.val_images, data.max_reject_rate, *where)
    scores = score_over_ranks(matcher, encoded.images, encoded.captions, asked.block, *where)
    return retrieval_metrics(scores, encoded.positives) if rank() == 0 else {}


def distances_of(here: Rank, matcher: Any) -> dict[str, float]:
    """What `evaluation.relations` asks for, of the images that the recalls are of; the other ranks wait for it at their next step.

    Of method iais, with any weight, ISD of the first `ISD_IMAGES` unless the recipe asks: the curve that its report shows.
    """
    data, asked = here.job.recipe.data, here.job.recipe.evaluation
    split, size, limit = here.job.split(data.val_split), min(asked.batch_size, MOST_PAIRS), data.val_images
    if not asked.relations and here.job.recipe.method.kind == "iais":
        return isd_of_split(matcher, split, False, size, here.step.device, min(limit or ISD_IMAGES, ISD_IMAGES)).metrics
    found: dict[str, float] = {}
    for name in asked.relations:
        found |= isd_of_split(matcher, split, name == "isda", size, here.step.device, limit).metrics
    return found


def checkpoint(here: Rank, done: int) -> None:
    """Raises RuntimeError when the pairs that were used and rejected are not those that were planned."""
    here.problems.write()
    used, rejected = map(int, all_reduce_sum(here.unsaved.to(here.step.device)).tolist())
    here.unsaved.zero_()
    before, plan = here.state, here.course.plan
    with here.clock.stopped():
        position = plan.locate(done)
        here.state = replace(
            before,
            position=position,
            digest=plan.digest(position),
            seconds=here.clock.total,
            pairs=before.pairs + (done - before.position.step) * plan.global_batch,
            used=before.used + used,
            rejected=before.rejected + rejected,
        )
        after = here.state
        if after.used + after.rejected != after.pairs:
            raise RuntimeError(f"{after.pairs} pairs were planned, {after.used} used and {after.rejected} rejected up to step {done}")
        if rank() == 0:
            rows = "".join(json.dumps(row) + "\n" for row in after.losses)
            files.write_atomic(files.join(here.job.folder, "losses.jsonl"), rows.encode())
        save_checkpoint(here.job.checkpoints, after, here.step)


def finish(here: Rank, done: int, ended: str = "") -> Json:
    """Rank 0 writes the matcher folder: the best validated weights, or the last ones without a validation split.

    done: steps; ended: why the run ends before its last step. Returns what rank 0 knows: steps, seconds, samples_per_s, best,
    same_image_share, rejected, rows_in, rows_out, rows_rejected, and `ended` where there is something to say.
    """
    method: Any = here.step.gathered(here.step.kept)
    if here.tracker is None:
        return {}
    state = here.state
    best = None if state.best is None else best_uri(here.job.checkpoints, state.best)
    with method.serving() as kept:
        if best is not None:
            if not holds_heads(best, kept):  # an earlier version kept the best matcher without what its method trained beside it
                give_heads(kept, None)
            read_weights(best, kept)
        if here.job.recipe.data.cache_features:  # it was trained on features, and takes photos
            kept.inputs = Inputs(ImageInput.of(here.job.recipe.data), here.job.inputs.tokenizer)
        save_matcher(kept.cpu(), files.join(here.job.folder, "matcher"))
    here.tracker.close()
    return {
        "steps": done,
        **({"ended": ended} if ended else {}),
        "seconds": round(state.seconds, 2),
        "samples_per_s": round(state.pairs / state.seconds, 2) if state.seconds else 0.0,
        "best": {"step": state.best.step, "metrics": state.best.metrics} if state.best else None,
        "same_image_share": here.same_image[0] / max(1, here.same_image[1]),
        **({"store_asked_again": int(here.asked[0]), "store_waited_s": round(here.asked[1], 1)} if here.asked[0] else {}),
        **({"mix": _mix(here)} if isinstance(here.job.manifest, Mixture) else {}),
        "rejected": int(state.losses[-1]["rejected"]) if state.losses else 0,
        "rows_in": state.pairs,
        "rows_out": state.used,
        "rows_rejected": state.rejected,
    }


def _mix(here: Rank) -> dict[str, float]:
    """Folder of each root -> the share of the pairs that it has given, as it was last logged."""
    mixture, last = here.job.manifest, here.state.losses[-1] if here.state.losses else {}
    return {uri: last.get(f"mix/{number}", 0.0) for number, (uri, _) in enumerate(parts_of("", mixture))}
