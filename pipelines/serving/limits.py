"""How much a client may ask of the service: bytes, pixels, characters, answers, requests in a second, and seconds of waiting."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from itm.data.records import open_image
from pipelines.serving.refusals import Refused

PHOTOS = 10  # a page of answers asks for dozens
CLIENTS = 10_000  # whose buckets are kept; the one that has been silent longest goes first


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request; pixels: of one image; characters: of one text; answers: k, and how deep paging goes; questions: of a batch;
    rate and burst: requests a second of one client, and how many at once (rate 0 = any), of photos PHOTOS times as many; seconds: until an
    answer; waiting: requests that are worked on or wait at a time."""

    body_bytes: int = 8 << 20
    pixels: int = 24_000_000
    characters: int = 2_000
    answers: int = 1_000
    questions: int = 64
    rate: float = 20.0
    burst: int = 40
    seconds: float = 30.0
    waiting: int = 256

    def check_text(self, text: str) -> None:
        """Raises Refused for a text that is empty, too long or no Unicode."""
        if len(text) > self.characters:
            raise Refused(413, f"the text has {len(text):,} characters, the limit is {self.characters:,}", "ask with a shorter text")
        if not text.strip():
            raise Refused(422, "the text is empty", "say what to look for, or leave `text` out and give an image")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(422, f"the text is not Unicode: {error.reason}", "send it as UTF-8") from None

    def check_image(self, data: bytes) -> None:
        """Raises Refused for bytes that are no image (415) and for more pixels than the limit (413); nothing is decoded for that."""
        if not data:
            raise Refused(422, "the image is empty", "send the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file")
        try:
            with open_image(data) as image:
                width, height = image.size
        except Exception as error:  # hostile bytes make decoders raise almost anything
            if "the limit is" in str(error) or "bomb" in str(error):
                raise Refused(413, f"the image is too large: {error}", "send a smaller copy of it") from None
            raise Refused(415, f"cannot read the image: {error}", "send a JPEG, PNG, WebP, GIF, BMP or TIFF file") from None
        if width * height > self.pixels:
            raise Refused(413, f"the image has {width}x{height} pixels, the limit is {self.pixels:,}", "send a smaller copy of it")


class Buckets:
    """A token bucket for each client: `burst` requests at once, and `rate` a second on average."""

    def __init__(self, limits: Limits, times: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.clock = limits.rate * times, float(max(1, limits.burst) * times), clock
        self.held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, and when they were counted

    def take(self, client: str) -> float:
        """Takes a token; returns 0.0, or the seconds until there is one."""
        if not self.rate:
            return 0.0
        now = self.clock()
        tokens, counted = self.held.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - counted) * self.rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.rate
        self.held[client] = (tokens if wait else tokens - 1, now)
        while len(self.held) > CLIENTS:
            self.held.popitem(last=False)
        return wait
