"""A store that fails, breaks off or is away for a while gives the bytes that it holds; one that is gone is named."""

from __future__ import annotations

import errno
import json
import random
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from itm.data import files
from itm.data.patience import ASKED, first_contact, passes
from itm.data.shards import read_manifest
from tests.support.door import door_to
from tests.support.s3_server import BUCKET, s3_server

LARGE = random.Random(0).randbytes(3_000_000)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Every third request fails: 503, or an answer that breaks off in the middle of its body."""
    with s3_server(every=3):
        yield f"s3://{BUCKET}"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_to_a_store_that_fails_every_third_request_is_read_back_from_it(store: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name, data in {"large.bin": LARGE, "a/1.txt": b"one", "a/b/2.txt": b"two", "a/none": b""}.items():
        files.write_atomic(f"{store}/folder/{name}", data)
        files.write_atomic(here / name, data)
    assert files.walk(f"{store}/folder") == files.walk(here)
    for _ in range(2):
        assert files.read_bytes(f"{store}/folder/large.bin") == LARGE
        assert bytes(files.read_view(f"{store}/folder/large.bin")) == LARGE
        assert files.read_span(f"{store}/folder/large.bin", 1000, 2_000_000) == LARGE[1000:2_000_000]
    for _ in range(2):
        with files.local_copy(f"{store}/folder") as copy:
            assert tree(copy) == tree(here)
    for name in ("1.txt", "b/2.txt"):
        files.delete(f"{store}/folder/a/{name}")
    assert files.walk(f"{store}/folder") == {"a/none": 0, "large.bin": len(LARGE)}


def test_a_half_read_stream_goes_on_where_it_was(store: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for n in range(4):
            archive.writestr(f"{n}.bin", LARGE[n * 1000 : n * 1000 + 50_000])
    files.write_atomic(f"{store}/x.zip", (tmp_path / "x.zip").read_bytes())
    with files.open_file(f"{store}/x.zip") as stream, zipfile.ZipFile(stream) as archive:
        assert [archive.read(f"{n}.bin") for n in range(4)] == [LARGE[n * 1000 : n * 1000 + 50_000] for n in range(4)]
    with files.open_file(f"{store}/x.zip") as stream:
        whole = b""
        while piece := stream.read(30_000):
            whole += piece
    assert whole == (tmp_path / "x.zip").read_bytes()


def test_a_store_that_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint, door_to(endpoint) as door:
        monkeypatch.setenv("AWS_ENDPOINT_URL", door.address)
        files.write_atomic(f"s3://{BUCKET}/x.bin", LARGE)
        with files.open_file(f"s3://{BUCKET}/x.bin") as stream:
            first = stream.read(1_000_000)
            waited = ASKED.waited
            door.shut_for(1.5)
            assert first + stream.read() == LARGE
        assert ASKED.waited > waited
        door.shut_for(1.0)
        files.write_atomic(f"s3://{BUCKET}/y.bin", LARGE)
        assert files.sizes(f"s3://{BUCKET}") == {"x.bin": len(LARGE), "y.bin": len(LARGE)}


def test_a_store_that_accepts_and_never_answers_is_refused_within_ten_seconds_at_first_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with socket.create_server(("127.0.0.1", 0)) as silent, first_contact():
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"cannot write below s3://silent/runs: .*did not answer.*nothing was begun.*--wait-for 120"):
            files.check_writable("s3://silent/runs")
        assert time.monotonic() - began < 10


def test_a_store_that_stays_away_is_named_with_the_time_it_was_asked_for_and_then_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ITM_PATIENCE", "1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    begun = time.monotonic()
    with pytest.raises(
        OSError, match=r"s3://gone/x: the store did not answer, asked \d+ times in \d+ s .*run the stage again .*it resumes"
    ):
        files.read_bytes("s3://gone/x")
    assert 1 <= time.monotonic() - begun < 12
    with pytest.raises(OSError, match=r"s3://gone/y: the store did not answer, asked once"):
        files.sizes("s3://gone/y")


def google(code: str, said: str) -> str:
    """As pyarrow words an answer of Google's store."""
    return f"google::cloud::Status({code}: {said} error_info={{reason=, domain=, metadata={{gcloud-cpp.retry.function=ReadObject}}}})"


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError("AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response stream (eof: 0, bad: 1)"), True),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Couldn't connect to server"), True),
        (OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file"), True),
        (OSError("AWS Error SLOW_DOWN during PutObject operation: try again"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 502) during HeadObject operation: No response body."), True),
        (ConnectionResetError("reset"), True),
        (TimeoutError("nothing came"), True),
        (OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist"), False),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), False),
        (OSError("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: it does not exist in our records"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."), False),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate was not OK"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError("connection refused.txt"), False),
        (OSError(google("UNAVAILABLE", "Retry policy exhausted, with a last message of backend error")), True),
        (OSError(google("UNAVAILABLE", "PerformWork() - CURL error [7]=Could not connect to server")), True),
        (OSError(google("INTERNAL", "gateway timeout")), True),
        (OSError(google("DEADLINE_EXCEEDED", "PerformWork() - CURL error [28]=Timeout was reached")), True),
        (OSError(google("ABORTED", "the request conflicts with another one")), True),
        (pa.ArrowCapacityError(google("RESOURCE_EXHAUSTED", "rate limit")), True),
        (PermissionError(13, google("PERMISSION_DENIED", "no storage.objects.get access")), False),
        (PermissionError(13, google("UNAUTHENTICATED", "Invalid Credentials")), False),
        (FileNotFoundError(2, google("NOT_FOUND", "No such object")), False),
        (OSError(google("FAILED_PRECONDITION", "at least one precondition did not hold")), False),
        (pa.ArrowInvalid(google("INVALID_ARGUMENT", "Invalid bucket name")), False),
        (OSError(google("UNAVAILABLE", "PerformWork() - CURL error [60]=SSL peer certificate was not OK")), False),
        (ValueError("whatever"), False),
    ],
)
def test_errors_that_pass_are_told_from_those_that_stay(error: Exception, passing: bool) -> None:
    assert passes(error) is passing


@pytest.fixture(scope="module")
def quiet() -> Iterator[str]:
    with s3_server():
        files.write_atomic(f"s3://{BUCKET}/shards/x.bin", b"x")
        yield f"s3://{BUCKET}"


def use(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)


def test_credentials_that_the_store_does_not_know_are_refused_with_the_variables(quiet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use("unknown", monkeypatch)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"s3://bucket/shards: the store does not know these credentials: mend AWS_ACCESS_KEY_ID"):
        files.list_files(f"{quiet}/shards")
    with pytest.raises(ValueError, match=r"cannot write below s3://bucket/out: .*does not know these credentials"):
        files.check_writable(f"{quiet}/out")
    assert time.monotonic() - began < 5


def test_a_bucket_that_may_only_be_read_is_read_and_refused_for_writing(quiet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use("reader", monkeypatch)
    assert files.read_bytes(f"{quiet}/shards/x.bin") == b"x"
    with pytest.raises(ValueError, match=r"cannot write below s3://bucket/out: .*the credentials may not do this: have the right"):
        files.check_writable(f"{quiet}/out")


def test_credentials_that_expire_in_the_middle_are_said_and_renewed_ones_count_at_once(quiet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use("expires-4", monkeypatch)
    assert files.read_bytes(f"{quiet}/shards/x.bin") == b"x"
    began = time.monotonic()
    with pytest.raises(
        OSError, match=r"have expired: renew them and run the stage again, it resumes|expired credentials \(AWS_SESSION_TOKEN\)"
    ):
        for _ in range(9):
            files.read_bytes(f"{quiet}/shards/x.bin")
    with pytest.raises(OSError, match=r"s3://bucket/shards: the credentials of the store have expired: renew them and run the stage again"):
        files.list_files(f"{quiet}/shards")
    assert time.monotonic() - began < 5
    use("key", monkeypatch)
    assert files.read_bytes(f"{quiet}/shards/x.bin") == b"x"


def test_a_bucket_that_is_not_there_is_not_taken_for_an_empty_folder(quiet: str) -> None:
    with pytest.raises((ValueError, OSError), match=r"s3://other/test: there is no (such )?bucket"):
        read_manifest("s3://other/test")
    with pytest.raises(ValueError, match=r"no manifest\.json and no \.tar in s3://bucket/test; run `itm pack`"):
        read_manifest("s3://bucket/test")


def test_an_answer_that_breaks_off_before_it_tells_the_size_is_not_taken_for_an_empty_object() -> None:
    with s3_server() as server, door_to(server) as door, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", door.address)
        for name, data in (("some.json", b"{}"), ("none", b"")):
            uri = f"s3://{BUCKET}/{name}"
            files.write_atomic(uri, data)
            for ask, known in ((files.read_bytes, data), (files.size_of, len(data))):
                door.maimed = 1
                assert ask(uri) == known
                assert not door.maimed


def test_googles_store_is_asked_again_by_us_and_a_refusal_says_the_remedy() -> None:
    answers = [503, 500, 403, 401]

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code = answers.pop(0) if answers else 404
            body = json.dumps({"error": {"code": code, "message": "as the test wants it"}}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"gs://anonymous@b/x.bin?scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
        begun, again = time.monotonic(), ASKED.again
        for code, remedy in ((403, "have the right to read"), (401, "mend GOOGLE_APPLICATION_CREDENTIALS")):
            with pytest.raises(OSError, match=remedy):
                files.exists(uri)
            assert code not in answers
        assert ASKED.again - again == 2
        assert not files.exists(uri)
        server.shutdown()
    assert time.monotonic() - begun < 30, "its client would make requests again for 15 minutes by itself"
