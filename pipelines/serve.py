"""Serve a matcher over HTTP, with a page to search by: text, photo or both, filters, where the words look, two models side by side.

    itm serve runs/demo/demo/matcher --shards data/shards/test                     # http://127.0.0.1:8000
    itm serve models:/itm-matcher@champion --index data/index --calibrate data/shards/val --replicas 2
    itm serve --model old=models:/itm-matcher@previous --model new=models:/itm-matcher@champion --shards data/shards/test
    ITM_TOKEN=$(openssl rand -hex 24) itm serve models:/itm-matcher@champion --index s3://itm/index --auth --host 0.0.0.0

A moved alias is seen within 30 seconds: the new version is loaded and its index opened (or made, from --shards) while the old one answers,
then they change places between two questions. A version that does not fit its index is refused, and the old one goes on.
One --index or --shards counts for every model; as many as models, in their order, belong to one each. In --index, {version} is the number
of a version: --index 'data/index/{version}'.
The API is described at /v1/docs and in docs/registry-and-serving.md.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from itm.arguments import read_from
from itm.device import HELP
from pipelines.cli import allow_argument, script

if TYPE_CHECKING:
    from pipelines.serving.app import Settings
    from pipelines.serving.limits import Limits
    from pipelines.serving.served import Place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=read_from, help="models:/name@alias, models:/name/version or a matcher folder")
    parser.add_argument("--model", dest="more", action="append", default=[], metavar="[NAME=]URI", help="several: side by side on the page")
    parser.add_argument("--index", type=read_from, action="append", default=[], metavar="URI", help="what `itm index` wrote")
    parser.add_argument("--shards", type=read_from, action="append", default=[], metavar="URI", help="make the index from this split")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1; 0.0.0.0 = all of this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--replicas", type=int, default=1, help="processes that answer, for each model (default 1)")
    parser.add_argument("--rerank", type=int, metavar="N", help="candidates that are scored exactly (default: all)")
    parser.add_argument(
        "--calibrate", type=read_from, metavar="URI", help="a validation split: scores become probabilities, where the index has none yet"
    )
    parser.add_argument("--device", default="auto", help=HELP)
    allow_argument(parser)
    _limits_arguments(parser)


def _limits_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits and access")
    group.add_argument("--auth", action="store_true", help="ask for a bearer token: that of the variable ITM_TOKEN, or of --token-file")
    group.add_argument("--token-file", type=read_from, metavar="FILE", help="file that holds the token")
    group.add_argument("--rate", type=float, default=20.0, help="requests a second of one client (default 20; 0 = any number)")
    group.add_argument("--max-bytes", type=int, default=8 << 20, help="of a request (default 8 MiB)")
    group.add_argument("--max-pixels", type=int, default=24_000_000, help="of an image (default 24 million)")
    group.add_argument("--seconds", type=float, default=30.0, help="until a request is given up (default 30)")
    group.add_argument("--log-queries", action="store_true", help="log what is asked; by default no question is kept")


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    return serve_here(settings, args.host, args.port)


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ValueError for arguments that do not fit together, and a missing token."""
    from pipelines.serving.app import Settings
    from pipelines.serving.guard import Access

    if args.replicas < 1:
        raise ValueError(f"--replicas is {args.replicas}; at least one must answer")
    Access.read(args.auth, args.token_file)
    return Settings(
        places_of(args),
        args.replicas,
        limits=limits_of(args),
        auth=args.auth,
        token_file=args.token_file,
        log_queries=args.log_queries,
    )


def limits_of(args: argparse.Namespace) -> Limits:
    from pipelines.serving.limits import Limits

    return Limits(body_bytes=args.max_bytes, pixels=args.max_pixels, rate=args.rate, burst=max(1, int(2 * args.rate)), seconds=args.seconds)


def places_of(args: argparse.Namespace) -> tuple[Place, ...]:
    """The models with their names, and what each searches."""
    from pipelines.serving.served import Place

    given = ([args.model] if args.model else []) + args.more
    if not given:
        raise ValueError("name a model: itm serve models:/itm-matcher@champion --index data/index")
    if not args.index and not args.shards:
        raise ValueError("nothing to search: give --index, what `itm index` wrote, or --shards, a split to make one from")
    named = [_named(one) for one in given]
    if len({name for name, _ in named}) < len(named):
        raise ValueError(f"two models are called {named[0][0]!r}: write --model NAME=URI")
    indexes, shards = _each(args.index, len(named), "--index"), _each(args.shards, len(named), "--shards")
    return tuple(
        Place(
            name, _anywhere(uri), _anywhere(index), _anywhere(split), tuple(args.allow), args.device, args.rerank, _anywhere(args.calibrate)
        )
        for (name, uri), index, split in zip(named, indexes, shards, strict=True)
    )


def _named(given: str) -> tuple[str, str]:
    """(name, URI) of [NAME=]URI; a name is what clients and addresses can hold."""
    name, mark, uri = given.partition("=")
    if mark and re.fullmatch(r"[\w.@-]{1,64}", name):
        return name, read_from(uri)
    uri = read_from(given)
    parts = re.sub(r"/matcher/?$", "", uri.removeprefix("models:/")).rstrip("/").split("/")
    usual = "-".join(parts) if uri.startswith("models:/") else parts[-1]
    return re.sub(r"[^\w.@-]", "-", usual)[:64] or "model", uri


@overload
def _anywhere(uri: str) -> str: ...


@overload
def _anywhere(uri: None) -> None: ...


def _anywhere(uri: str | None) -> str | None:
    """A path as processes with another working folder can read it; an address, or the name of a model, as it is."""
    from itm.data import files

    if uri is None or re.match(r"(models|runs):/", uri) or not files.exists(uri.partition("{")[0]):
        return uri
    return files.absolute(uri)


def _each(given: Sequence[str], models: int, flag: str) -> Sequence[str | None]:
    if len(given) <= 1:
        return [given[0] if given else None] * models
    if len(given) != models:
        raise ValueError(f"{len(given)} times {flag} for {models} models: give it once, or once for each")
    return given


def serve_here(settings: Settings, host: str, port: int) -> int:
    """Serves until Ctrl-C or SIGTERM. Raises ValueError for a model that cannot be served, before anything is started."""
    import io
    from contextlib import redirect_stdout
    from dataclasses import replace

    import ray
    from ray import serve

    from pipelines.on_ray.session import connect
    from pipelines.serving.app import application
    from pipelines.serving.served import ServedModel

    _check_free(host, port)
    if any(place.model.startswith(("models:/", "runs:/")) for place in settings.places):
        from itm.tracking.addresses import tracking_uri

        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()  # absolute: the replicas have another working folder
    for place in settings.places:
        said = ServedModel(place).said()  # what is wrong is said here; an index that must be made is made once
        print(f"{place.name}: {said.kind} version {said.version}, {said.images} images, {said.captions} captions", flush=True)
    connect()
    gpus, cpus = _shares(len(settings.places) * settings.replicas)
    settings = replace(settings, gpus=gpus, cpus=cpus)
    quietly = {"enable_access_log": False, "log_level": "WARNING"}
    http = {"host": host, "port": port, "request_timeout_s": 2 * settings.limits.seconds}
    try:
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quietly)
        serve.run(application(settings), name="itm", route_prefix="/", logging_config=quietly)
        print(f"page  http://{host}:{port}/\nAPI   http://{host}:{port}/v1/docs\nCtrl-C stops it", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("\nitm serve: stopped", flush=True)
        return 0
    finally:
        with redirect_stdout(io.StringIO()):  # Ray would tell of its controller, which it kills itself, that it does not answer
            serve.shutdown()
            ray.shutdown()


def _shares(replicas: int) -> tuple[float, float]:
    """The GPUs and CPUs that each replica may keep for itself of what Ray has, so that all of them find a place."""
    import ray

    there = ray.cluster_resources()
    return min(1.0, there.get("GPU", 0.0) / replicas), min(1.0, there.get("CPU", 1.0) / 2 / replicas)


def _check_free(host: str, port: int) -> None:
    """Raises ValueError where something listens there already, or the address is not of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}; give another --port or --host") from None


if __name__ == "__main__":
    script(__file__)
