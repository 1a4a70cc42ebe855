"""What a request that cannot be answered gets: a status, what is wrong, and what to do about it."""

from __future__ import annotations


class Refused(Exception):
    """status: 400, 401, 404, 409, 413, 415, 422, 429 or 503. retry_after: seconds after which the same request may succeed."""

    def __init__(self, status: int, error: str, remedy: str, retry_after: float | None = None) -> None:
        super().__init__(status, error, remedy, retry_after)  # as they are, so that it survives the way between processes
        self.status, self.error, self.remedy, self.retry_after = status, error, remedy, retry_after

    def __str__(self) -> str:
        return f"{self.error}; {self.remedy}"

    def body(self) -> dict[str, str]:
        return {"error": self.error, "remedy": self.remedy}

    def headers(self) -> dict[str, str]:
        given = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        return given | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
