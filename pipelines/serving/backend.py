"""Where the API gets its answers: models in this process, or replicas of Ray Serve (`pipelines.serving.app`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from pipelines.serving.questions import Answers, Looks, Served
from pipelines.serving.refusals import Refused
from pipelines.serving.served import Asked, ServedModel


class Backend(Protocol):
    """names: of the models, the first of which answers where a client names none. All but `ready` raise Refused."""

    @property
    def names(self) -> Sequence[str]: ...

    async def answer(self, model: str, asked: Sequence[Asked]) -> list[Answers | Refused]:
        """As many replies as questions, in their order."""

    async def explain(self, model: str, text: str, key: str) -> Looks: ...

    async def photo(self, model: str, key: str, large: bool) -> bytes:
        """A JPEG."""

    async def said(self, model: str) -> Served: ...

    async def ready(self) -> str:
        """Why no answer can be given now; '' where it can."""


class Here:
    """Models of this process, each call in a thread."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = {model.place.name: model for model in models}
        self.names = list(self.models)

    async def answer(self, model: str, asked: Sequence[Asked]) -> list[Answers | Refused]:
        return await asyncio.to_thread(self.models[model].answer, asked)

    async def explain(self, model: str, text: str, key: str) -> Looks:
        return await asyncio.to_thread(self.models[model].explain, text, key)

    async def photo(self, model: str, key: str, large: bool) -> bytes:
        return await asyncio.to_thread(self.models[model].photo, key, large)

    async def said(self, model: str) -> Served:
        return await asyncio.to_thread(self.models[model].said)

    async def ready(self) -> str:
        return ""
