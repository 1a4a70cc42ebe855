"""The service on Ray Serve: a front that speaks HTTP, and for each model replicas that answer in batches.

`itm serve` runs `application` here; a RayService of Kubernetes names it as `pipelines.serving.app:application` (cluster/rayservice.yaml).
The front has one replica, so that the rate of a client is counted in one place. Its work is small; all that computes runs in the replicas,
and what one of them that dies was doing is asked of another.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from pipelines.on_ray.session import quiet
from pipelines.serving.api import build
from pipelines.serving.guard import Access, App
from pipelines.serving.limits import Limits
from pipelines.serving.questions import Answers, Looks, Served
from pipelines.serving.refusals import Refused
from pipelines.serving.served import Asked, Place, ServedModel

BATCH, BATCH_SECONDS = 32, 0.004  # questions that are answered together, and how long the first of them waits for others
WATCH = 10.0  # seconds between two looks at the aliases: a moved one is seen within 30
TRIES, PAUSE = 20, 0.25  # of a call whose replica died
READY_SECONDS = 5.0
log = logging.getLogger("itm.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """places: the models, the first of which answers where a client names none; gpus and cpus: what Ray keeps free for each replica."""

    places: tuple[Place, ...]
    replicas: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    limits: Limits = field(default_factory=Limits)
    auth: bool = False
    token_file: str | None = None
    log_queries: bool = False
    watch: float = WATCH

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """As a manifest says it: {models: [{name, model, index, ...}], replicas, limits: {...}, ...}. Raises TypeError for unknown keys."""
        said = dict(given)
        places = tuple(Place(**{**place, "allow": tuple(place.get("allow", ()))}) for place in said.pop("models"))
        return cls(places, limits=Limits(**said.pop("limits", {})), **said)


class Replica:
    """One model. Answers in batches, and watches its alias."""

    def __init__(self, place: Place, watch: float) -> None:
        quiet()
        self.model = ServedModel(place)
        threading.Thread(target=self._watch, args=(watch,), daemon=True, name="watch").start()

    def _watch(self, seconds: float) -> None:
        while True:
            time.sleep(seconds)
            try:
                self.model.refresh()
            except Exception:
                log.exception("the alias could not be looked at")

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_SECONDS)
    async def answer(self, calls: list[list[Asked]]) -> list[list[Answers | Refused]]:
        """The questions of several calls, answered together."""
        replies = iter(await asyncio.to_thread(self.model.answer, [asked for call in calls for asked in call]))
        return [[next(replies) for _ in call] for call in calls]

    async def explain(self, text: str, key: str) -> Looks | Refused:
        return await _told(self.model.explain, text, key)

    async def photo(self, key: str, large: bool) -> bytes | Refused:
        return await _told(self.model.photo, key, large)

    async def said(self) -> Served | Refused:
        return await _told(self.model.said)


async def _told(work: Callable[..., T], *given: Any) -> T | Refused:
    """A refusal is a value here: an exception would come out of Ray as one of another class."""
    try:
        return await asyncio.to_thread(work, *given)
    except Refused as refused:
        return refused


class OnRay:
    """The backend of the front: handles of the replicas, by model."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        self.handles = dict(handles)
        self.names = list(handles)

    async def answer(self, model: str, asked: Sequence[Asked]) -> list[Answers | Refused]:
        if not asked:
            return []
        found: list[Answers | Refused] = await _insisting(lambda: self.handles[model].answer.remote(list(asked)))
        return found

    async def explain(self, model: str, text: str, key: str) -> Looks:
        found: Looks = _raised(await _insisting(lambda: self.handles[model].explain.remote(text, key)))
        return found

    async def photo(self, model: str, key: str, large: bool) -> bytes:
        found: bytes = _raised(await _insisting(lambda: self.handles[model].photo.remote(key, large)))
        return found

    async def said(self, model: str) -> Served:
        found: Served = _raised(await _insisting(lambda: self.handles[model].said.remote()))
        return found

    async def ready(self) -> str:
        for name in self.names:
            try:
                await asyncio.wait_for(self.said(name), READY_SECONDS)
            except (Refused, TimeoutError, RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
                return f"no replica of {name} answers"
        return ""


async def _insisting(call: Callable[[], Awaitable[Any]]) -> Any:
    """What a replica answers, of another one where it dies meanwhile: every call only reads. Raises Refused where nobody is left."""
    for _ in range(TRIES):
        try:
            return await call()
        except BackPressureError:
            raise Refused(503, "too many questions wait", "ask again in a second", 1.0) from None
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
            await asyncio.sleep(PAUSE)
    raise Refused(503, "no replica answers", "ask again in a minute", 60.0)


def _raised(found: Any) -> Any:
    if isinstance(found, Refused):
        raise found
    return found


@serve.ingress()
class Front:
    """Speaks HTTP, and holds the limits."""

    def __init__(self, settings: Settings, *handles: DeploymentHandle) -> None:
        quiet()
        names = [place.name for place in settings.places]
        self.settings, self.backend = settings, OnRay(dict(zip(names, handles, strict=True)))

    def __serve_build_asgi_app__(self) -> App:
        settings = self.settings
        access = Access.read(settings.auth, settings.token_file, settings.log_queries)
        return build(self.backend, settings.limits, access)


def application(given: Settings | dict[str, Any]) -> serve.Application:
    """What Ray Serve runs: of `Settings`, or of the mapping that a manifest holds under `args`."""
    settings = given if isinstance(given, Settings) else Settings.of(given)
    actor = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
    handles = [
        _deployed(
            Replica,
            name=f"model-{place.name}",
            num_replicas=settings.replicas,
            max_ongoing_requests=2 * BATCH,
            max_queued_requests=settings.limits.waiting,
            ray_actor_options=actor,
        ).bind(place, settings.watch)
        for place in settings.places
    ]
    front = _deployed(Front, name="front", max_ongoing_requests=2 * settings.limits.waiting, ray_actor_options={"num_cpus": 0})
    return front.bind(settings, *handles)


def _deployed(kind: type, **given: Any) -> serve.Deployment:
    """A class as Ray Serve runs it, looked after often enough that a dead replica is missed within seconds."""
    often: dict[str, Any] = {"health_check_period_s": 2, "health_check_timeout_s": 20, "graceful_shutdown_timeout_s": 5}
    made: Any = serve.deployment(kind, **given, **often)
    assert isinstance(made, serve.Deployment)
    return made
