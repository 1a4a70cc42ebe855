"""The arguments of `itm serve`, its limits and its client, without Ray."""

from __future__ import annotations

import http.client
import socket
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from pipelines import serve
from pipelines.serving.client import Client, ServiceRefused
from pipelines.serving.limits import Buckets, Limits
from pipelines.serving.served import Place
from tests.support.disc_index import write_discs
from tests.support.ports import free_ports
from tests.support.registry_world import matcher_folder, picture
from tests.support.serving_world import service


def parsed(*given: str) -> Namespace:
    parser = ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["models:/itm@champion", "--index", "i"], ["itm@champion"]),
        (["models:/itm/3", "--index", "i"], ["itm-3"]),
        (["runs/demo/sgr/matcher", "--shards", "s"], ["sgr"]),
        (["--model", "a=models:/itm@previous", "--model", "b=runs/x", "--index", "i"], ["a", "b"]),
    ],
)
def test_models_get_names_that_addresses_can_hold(given: list[str], names: list[str]):
    assert [place.name for place in serve.places_of(parsed(*given))] == names


def test_each_model_may_have_an_index_of_its_own(tmp_path: Path):
    places = serve.places_of(parsed("--model", "a=x", "--model", "b=y", "--index", "i", "--index", "j", "--shards", str(tmp_path)))
    assert [(place.model, place.index, place.shards) for place in places] == [("x", "i", str(tmp_path)), ("y", "j", str(tmp_path))]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--index", "i"], "name a model"),
        (["m"], "nothing to search"),
        (["--model", "a=x", "--model", "a=y", "--index", "i"], "two models are called"),
        (["--model", "a=x", "--model", "b=y", "--model", "c=z", "--index", "i", "--index", "j"], "2 times --index for 3 models"),
        (["m", "--index", "i", "--replicas", "0"], "at least one must answer"),
        (["m", "--index", "i", "--auth"], "the variable ITM_TOKEN holds no token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ITM_TOKEN", raising=False)
    with pytest.raises(ValueError, match=said):
        serve.settings_of(parsed(*given))


def test_a_port_that_is_taken_is_told_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}.*give another --port"):
            serve.serve_here(serve.settings_of(parsed("m", "--index", "i")), "127.0.0.1", port)


def test_a_bucket_gives_what_was_promised_on_average_and_at_once():
    now = [0.0]
    buckets = Buckets(Limits(rate=2, burst=4), clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(4)] == [0.0] * 4
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b") == 0.0
    taken = 0
    for _ in range(1_000):
        now[0] += 0.01
        taken += buckets.take("a") == 0.0
    assert taken == pytest.approx(20, abs=1)
    for number in range(20_000):
        buckets.take(f"made up {number}")
    assert len(buckets.held) <= 10_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service behind a real socket, in a thread."""
    folder, (port,) = tmp_path_factory.mktemp("served"), free_ports(1)
    app, _ = service(Place("discs", str(matcher_folder(folder / "m", 2)), shards=write_discs(folder / "test")))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_the_client_asks_all_that_the_api_answers(address: str, tmp_path: Path):
    client = Client(address)
    (tmp_path / "photo.png").write_bytes(picture("red"))
    by_file, by_bytes = (client.search(image=image, k=3) for image in (tmp_path / "photo.png", picture("red")))
    assert by_file == by_bytes and by_file["find"] == "captions"
    assert [answer["rank"] for answer in client.pages("a red circle", k=4)] == [1, 2, 3, 4, 5, 6]
    one, other = client.batch([{"text": "a red circle", "k": 1}, {"text": "a", "where": {"x": ["y"]}}])
    assert one["answers"] == client.search("a red circle", k=1)["answers"]
    assert "no column 'x'" in other["error"]
    assert client.photo("k1")[:3] == b"\xff\xd8\xff"
    assert client.models()[0]["images"] == 6
    with pytest.raises(ServiceRefused, match="no attention") as refused:
        client.explain("a red circle", "k1")
    assert refused.value.status == 422
    with pytest.raises(OSError, match="refused"):
        Client("http://127.0.0.1:9").models()


def test_a_body_that_never_says_how_long_it_is_is_cut_off(address: str):
    """Chunks without a Content-Length, more than may come."""
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1_000):  # 64 MB, of which 8 may come
            sent += 1
            yield b"x" * 65536

    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    try:
        connection.request("POST", "/v1/search", pieces(), {"Content-Type": "application/json"}, encode_chunked=True)
        status = connection.getresponse().status
    except ConnectionError:  # it was closed while more was sent
        status = 413
    assert status == 413
    assert sent < 500, "the service read on"
