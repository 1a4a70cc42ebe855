"""Bad, large and malicious requests against the whole service in this process: always a refusal that names a remedy, never a failure."""

from __future__ import annotations

import base64
import io
import json
import random
import string
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from itm.data.manifest import Manifest, write_manifest
from itm.data.records import Caption, Record
from itm.data.shards import write_shard
from pipelines.serving.guard import Access
from pipelines.serving.limits import Limits
from pipelines.serving.served import Place
from tests.support.disc_index import SCAN, write_discs
from tests.support.registry_world import matcher_folder, picture
from tests.support.serving_world import service

JSON = {"content-type": "application/json"}
REFUSALS = {400, 401, 404, 409, 413, 415, 422, 429, 503}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("served")
    return Place("discs", str(matcher_folder(folder / "m", 2)), shards=write_discs(folder / "test"))


@pytest.fixture(scope="module")
def client(place: Place) -> TestClient:
    app, _ = service(place, limits=Limits(rate=0, body_bytes=3 << 20))
    return TestClient(app, raise_server_exceptions=False)


def told(reply: Any, status: int) -> str:
    """What a refusal says."""
    assert reply.status_code == status, reply.text
    said = reply.json()
    assert set(said) == {"error", "remedy"} and all(said.values())
    return str(said["error"])


def unexpected(client: TestClient) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("itm_unexpected_errors_total")).split()[1])


def encoded(image: Image.Image, kind: str, **given: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **given)
    return out.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises that many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "no JSON"),
        (b"\x00\xff\xfe" * 50, 400, "no JSON"),
        (b'{"text": "a"', 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"[]", 422, "the body"),
        (b"{}", 422, "empty"),
        (b'{"text": ""}', 422, "empty"),
        (b'{"text": " \\n\\t"}', 422, "empty"),
        (b'{"text": 5}', 422, "text"),
        (b'{"text": "a", "k": 0}', 422, "k"),
        (b'{"text": "a", "k": 100000}', 422, "limit"),
        (b'{"text": "a", "k": 1e400}', 422, "k"),
        (b'{"text": "a", "offset": -1}', 422, "offset"),
        (b'{"text": "a", "find": "secrets"}', 422, "find"),
        (b'{"text": "a", "min_score": 2}', 422, "min_score"),
        (b'{"text": "a", "min_score": 0.5}', 422, "calibrat"),
        (b'{"text": "a", "where": {"colour": ["red"]}}', 422, "no column 'colour'"),
        (b'{"text": "a", "where": {"split": []}}', 422, "no value"),
        (b'{"text": "a", "where": {"split": "test"}}', 422, "where.split"),
        (b'{"text": "a", "path": "/etc/passwd"}', 422, "path"),
        (b'{"text": "a", "model": "other"}', 404, "no model 'other'"),
        (b'{"text": "a", "version": "old"}', 409, "old"),
        (b'{"like": "nobody"}', 404, "nobody"),
        (b'{"like": "k1", "image": "aaaa"}', 422, "not both"),
        (b'{"like": "k1\\u0000"}', 422, "control"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_by_its_fault(client: TestClient, body: bytes, status: int, said: str):
    assert said in told(client.post("/v1/search", content=body, headers=JSON), status)
    assert unexpected(client) == 0


def test_texts_of_any_length_and_content_are_answered_or_refused(client: TestClient):
    assert "1,000,000 characters" in told(client.post("/v1/search", json={"text": "x" * 1_000_000}), 413)
    assert "more than" in told(client.post("/v1/search", json={"text": "x" * 4_000_000}), 413)
    assert told(client.post("/v1/search", content=b'{"text": "\\ud800"}', headers=JSON), 400)
    for text in (
        "\0",
        "\u202e",
        "'; DROP TABLE images; --",
        "${jndi:ldap://x}",
        "../../etc/passwd",
        "𝕏" * 500,
        "a\u0301" * 900,
        "<script>",
    ):
        assert client.post("/v1/search", json={"text": text}).status_code == 200
    assert unexpected(client) == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 422),
        (b"not an image at all", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
        (picture("red")[:60], 415),
        (png_that_claims(60_000, 60_000), 413),
        (png_that_claims(8_000, 5_000), 413),
        (png_that_claims(100, 100), 415),
    ],
    ids=["empty", "text", "svg", "postscript", "cut short", "bomb", "40 megapixel", "fewer pixels than it says"],
)
def test_what_is_no_image_or_too_large_is_refused(client: TestClient, data: bytes, status: int):
    told(client.post("/v1/search", content=data, headers={"content-type": "image/png"}), status)
    told(client.post("/v1/search", json={"image": base64.b64encode(data).decode()}), status)
    assert unexpected(client) == 0


def test_unusual_images_are_answered(client: TestClient):
    frames = [Image.new("P", (20, 20), n) for n in (0, 40)]
    usual = {
        "cmyk": encoded(Image.new("CMYK", (40, 30), (9, 99, 0, 0)), "JPEG"),
        "animated gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated webp": encoded(Image.new("RGB", (20, 20)), "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]),
        "grey of 16 bits": encoded(Image.new("I;16", (20, 20), 40_000), "PNG"),
        "one pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "a line": encoded(Image.new("RGB", (4_000, 1)), "PNG"),
        "see-through": encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "PNG"),
    }
    for name, data in usual.items():
        reply = client.post("/v1/search?k=2", content=data, headers={"content-type": "application/octet-stream"})
        assert (name, reply.status_code, len(reply.json()["answers"])) == (name, 200, 2)


def test_no_path_and_no_address_is_ever_opened(client: TestClient, tmp_path: Path, place: Place):
    """A photo of this machine by its path, and one behind an address that would answer: both are only text that is no base64."""
    (tmp_path / "photo.png").write_bytes(picture("red"))
    for given in (
        str(tmp_path / "photo.png"),
        f"file://{tmp_path}/photo.png",
        "http://169.254.169.254/latest/meta-data",
        "s3://b/k",
        "ftp://x/y",
    ):
        assert "base64" in told(client.post("/v1/search", json={"image": given}), 415)
        assert "data:" in told(client.post("/v1/search", json={"image": f"data:text/uri-list,{given}"}), 415)
        reply = client.post("/v1/search", json={"like": given})
        told(reply, 404)
    for path in (
        "../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2fetc%2fpasswd",
        "....//....//etc/passwd",
        "k1/../../m/config.json",
    ):
        reply = client.get(f"/v1/images/{path}")
        assert "root:" not in reply.text
        told(reply, 404)
    for path in ("/page.css/../../../etc/passwd", "/..%2f..%2fetc/passwd", "/static/x", "/v1/images/"):
        told(client.get(path), 404)
    for text in (client.get("/v1/images/nobody").text, client.post("/v1/search", json={"like": "nobody"}).text):
        assert str(Path(place.model).parent) not in text
    assert unexpected(client) == 0


def test_wrong_types_methods_and_addresses_are_refused(client: TestClient):
    told(client.post("/v1/search", content=b"text=a", headers={"content-type": "application/x-www-form-urlencoded"}), 415)
    told(client.post("/v1/search", content=b"a"), 415)
    told(client.post("/v1/batch", content=b"{}", headers={"content-type": "text/plain"}), 415)
    for method, path in (("GET", "/v1/search"), ("PUT", "/v1/search"), ("DELETE", "/v1/images/k1"), ("GET", "/admin"), ("POST", "/")):
        told(client.request(method, path), 404)
    assert "large" in told(client.get("/v1/images/k1?large=perhaps"), 422)


def test_one_bad_question_of_a_batch_harms_no_other(client: TestClient):
    asked = [{"text": "a red circle"}, {"text": ""}, {"like": "nobody"}, {"text": "a", "where": {"x": ["1"]}}, {"like": "k1", "k": 1}]
    replies = client.post("/v1/batch", json={"questions": asked}).json()["replies"]
    assert ["answers" in reply for reply in replies] == [True, False, False, False, True]
    assert all(reply["remedy"] for reply in replies[1:4])
    alone = client.post("/v1/search", json=asked[0]).json()
    assert replies[0] == alone
    assert "limit is" in told(client.post("/v1/batch", json={"questions": asked * 20}), 413)
    told(client.post("/v1/batch", json={"questions": []}), 422)


def test_a_token_is_asked_for_and_compared_whole(place: Place, tmp_path: Path):
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    app, _ = service(place, access=Access.read(True, str(tmp_path / "token")))
    guarded = TestClient(app, raise_server_exceptions=False)
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer a-token-of-some-lengt"},
        {"authorization": "Basic YTpi"},
    ):
        reply = guarded.post("/v1/search", json={"text": "a"}, headers=header)
        told(reply, 401)
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/images/k1", "/metrics"):
        told(guarded.get(path), 401)
    assert guarded.post("/v1/search", json={"text": "a"}, headers={"authorization": "Bearer a-token-of-some-length"}).status_code == 200
    assert [guarded.get(path).status_code for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]
    (tmp_path / "short").write_text("short")
    with pytest.raises(ValueError, match="no token of at least 16 characters"):
        Access.read(True, str(tmp_path / "short"))


def test_a_client_that_asks_too_often_waits_and_another_does_not(place: Place):
    app, _ = service(place, limits=Limits(rate=1, burst=3))
    one, other = (TestClient(app, client=(host, 1), raise_server_exceptions=False) for host in ("10.0.0.1", "10.0.0.2"))
    replies = [one.post("/v1/search", json={"text": "a"}) for _ in range(5)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429, 429]
    assert int(replies[-1].headers["retry-after"]) >= 1
    spoofed = one.post("/v1/search", json={"text": "a"}, headers={"x-forwarded-for": "10.9.9.9"})
    told(spoofed, 429)
    assert other.post("/v1/search", json={"text": "a"}).status_code == 200
    assert one.get("/healthz").status_code == 200


def test_what_takes_too_long_is_given_up(place: Place):
    app, models = service(place, limits=Limits(rate=0, seconds=0.2))
    models["discs"].now.alone.acquire()  # somebody else is being answered
    threading.Timer(1.0, models["discs"].now.alone.release).start()
    reply = TestClient(app, raise_server_exceptions=False).post("/v1/search", json={"text": "a"})
    assert "within 0.2 s" in told(reply, 503)


def test_markup_in_captions_and_keys_stays_text_everywhere(tmp_path: Path):
    evil = "<img src=x onerror=alert(1)>"
    rows = [Record(f"<b>{n}&\"'", "test", [Caption(f"c{n}", f"{evil} {n}")], picture("red", 33 + n), "png", None, {}) for n in range(3)]
    write_manifest(str(tmp_path / "test"), Manifest(split="test", source="x", shards=[write_shard(str(tmp_path / "test" / "0.tar"), rows)]))
    app, _ = service(Place("evil", str(matcher_folder(tmp_path / "m", 2)), shards=str(tmp_path / "test")))
    client = TestClient(app)
    reply = client.post("/v1/search", json={"text": "a circle"})
    assert reply.headers["content-type"] == "application/json" and reply.headers["x-content-type-options"] == "nosniff"
    answers = reply.json()["answers"]
    assert {answer["captions"][0] for answer in answers} == {f"{evil} {n}" for n in range(3)}
    for answer in answers:
        assert "<" not in answer["photo"] and '"' not in answer["photo"]
        photo = client.get(answer["photo"])
        assert (photo.status_code, photo.headers["content-type"]) == (200, "image/jpeg")
    script = client.get("/page.js").text
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert unsafe not in script + client.get("/docs.js").text


def test_the_page_asks_no_other_host_and_allows_no_inline_code(client: TestClient):
    for path in ("/", "/v1/docs"):
        reply = client.get(path)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert "style=" not in reply.text and "onclick" not in reply.text and "<script>" not in reply.text
    for path in ("/", "/page.css", "/page.js", "/docs.js", "/v1/docs"):
        text = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "url(" not in text
    reply = client.post("/v1/search", json={"text": "a"}, headers={"origin": "https://elsewhere.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_openapi_describes_every_route_and_its_refusals(client: TestClient):
    api = client.get("/v1/openapi.json").json()
    assert set(api["paths"]) == {
        "/v1/search", "/v1/batch", "/v1/explain", "/v1/images/{key}", "/v1/models", "/healthz", "/readyz", "/metrics"
    }  # fmt: skip
    search = api["paths"]["/v1/search"]["post"]
    assert {int(status) for status in search["responses"]} == REFUSALS | {200}
    assert {"text", "image", "like", "where", "min_score"} <= set(
        search["requestBody"]["content"]["application/json"]["schema"]["properties"]
    )


SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_requests_never_make_the_service_fail(client: TestClient, seed: int):
    """Fields with values of wrong and right kinds, whole bodies damaged byte by byte, and raw bytes as images."""
    rng = random.Random(seed)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        3,
        1e308,
        "",
        "k1",
        "a red circle",
        "\ud83d",
        "\0",
        [],
        ["a"],
        {},
        {"split": ["test"]},
        {"key": ["k*"]},
    ]
    fields = ("text", "image", "like", "find", "k", "offset", "where", "min_score", "model", "version", "key", "questions", "x")
    before = unexpected(client)
    for _ in range(60):
        body = {name: rng.choice(values) for name in rng.sample(fields, rng.randrange(6))}
        sent = bytearray(json.dumps(body).encode())
        for _ in range(rng.choice((0, 0, 1, 4))):
            sent[rng.randrange(len(sent))] = rng.randrange(256)
        path = rng.choice(("/v1/search", "/v1/batch", "/v1/explain"))
        query = "".join(rng.choice(string.printable[:-6]) for _ in range(rng.randrange(8)))
        kind = rng.choice(("application/json", "application/json", "image/png", "text/html"))
        data = bytes(sent) if kind != "image/png" else picture("red")[: rng.randrange(200)] + rng.randbytes(rng.randrange(50))
        reply = client.post(path, content=data, headers={"content-type": kind}, params={"q": query})
        assert reply.status_code in REFUSALS | {200}, (path, sent, reply.text)
        if reply.status_code != 200:
            assert set(reply.json()) == {"error", "remedy"}
    assert unexpected(client) == before


def test_a_late_matcher_explains_and_a_dual_encoder_says_why_not(client: TestClient, tmp_path: Path):
    assert "no attention" in told(client.post("/v1/explain", json={"text": "a red circle", "key": "k1"}), 422)
    app, _ = service(Place("scan", str(matcher_folder(tmp_path / "m", 2, SCAN)), shards=write_discs(tmp_path / "test")))
    late = TestClient(app)
    told(late.post("/v1/explain", json={"text": "a red circle", "key": "nobody"}), 404)
    looks = late.post("/v1/explain", json={"text": "a red circle", "key": "k1"}).json()
    assert looks["words"] == ["a", "red", "circle"]
    assert len(looks["weights"]) == 3 and all(len(row) == len(looks["boxes"]) for row in looks["weights"])
    assert all(0 <= x1 < x2 <= looks["width"] and 0 <= y1 < y2 <= looks["height"] for x1, y1, x2, y2 in looks["boxes"])
