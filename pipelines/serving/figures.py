"""What the service tells Prometheus about itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Figures:
    """A registry of its own, so that several services fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("itm_requests", "Requests by route and status", ("route", "status"), registry=self.registry)
        self.seconds = Histogram("itm_request_seconds", "Time to the answer", ("route",), buckets=SECONDS, registry=self.registry)
        self.busy = Gauge("itm_requests_waiting", "Requests that are worked on or wait", registry=self.registry)
        self.unexpected = Counter("itm_unexpected_errors", "Requests that failed for a reason of the service", registry=self.registry)
        self.answers = Counter("itm_answers", "Answered questions by model and version", ("model", "version"), registry=self.registry)
        self.nothing = Counter("itm_nothing_found", "Questions that min_score left without an answer", ("model",), registry=self.registry)
        self.images = Gauge("itm_index_images", "Images of the index", ("model", "version"), registry=self.registry)
        self.refused = Gauge("itm_model_refused", "1 where a newer version or index was refused", ("model",), registry=self.registry)

    def seen(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return bytes(generate_latest(self.registry))
