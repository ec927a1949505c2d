"""Measures what capture costs its host: ratios within one run, each the median of alternations.

    python .ci/bench.py [--rounds N] [--json FILE]

Needs bottle and waitress. Compares, in turn and beside each other:
- importing miniapm with importing bottle;
- one record_error on the calling thread with one logging.exception to a file;
- a request to a plain WSGI application with the same application wrapped, called in process and
  served by waitress on loopback to four clients.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wsgiref.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import miniapm


def seconds(work: Callable[[], Any], times: int) -> float:
    """Return the seconds of one call, from as many calls as given."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def import_of(module: str) -> Callable[[], Any]:
    """Return what starts a Python that imports a module, with its byte code cached."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": tempfile.gettempdir()}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", f"import {module}"]
    return lambda: subprocess.run(command, env=environ, check=True)


def plain_app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer like a small application that does a little work."""
    body = json.dumps({"path": environ["PATH_INFO"], "items": list(range(50))}).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]


def call(app: Callable[..., Any]) -> Callable[[], Any]:
    """Return a call of an application in process."""
    environ: dict[str, Any] = {"PATH_INFO": "/cart", "REMOTE_ADDR": "127.0.0.1"}
    wsgiref.util.setup_testing_defaults(environ)

    def once() -> None:
        list(app(environ | {"wsgi.input": io.BytesIO()}, lambda *_: None))

    return once


@contextlib.contextmanager
def served(app: Callable[..., Any]) -> Iterator[Callable[[], Any]]:
    """Serve an application; yield what sends it 400 requests from four clients at once."""
    import waitress

    server = waitress.create_server(app, listen="127.0.0.1:0", threads=4)
    threading.Thread(target=server.run, daemon=True).start()
    port = int(server.effective_port)

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(100):
            connection.request("GET", "/cart")
            connection.getresponse().read()
        connection.close()

    def load() -> None:
        clients = [threading.Thread(target=client) for _ in range(4)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()

    yield load
    server.task_dispatcher.shutdown()
    server.close()


def fail(depth: int = 5) -> None:
    """Raise from some frames down."""
    if depth:
        fail(depth - 1)
    raise ValueError(f"no such order: {time.time()}")


def failing(report: Callable[[BaseException], Any]) -> Callable[[], Any]:
    """Return what raises and reports; raising is part of both sides."""

    def once() -> None:
        try:
            fail()
        except ValueError as error:
            report(error)

    return once


def result(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Print and return the medians of both sides and of the ratios round by round."""
    row = {
        "name": name,
        "microseconds": round(statistics.median(pair[0] for pair in pairs) * 1e6, 1),
        "beside": round(statistics.median(pair[1] for pair in pairs) * 1e6, 1),
        "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 2),
    }
    print(f"{row['ratio']:>6} ×  {name}  ({row['microseconds']} µs beside {row['beside']} µs)")
    return row


def compare(
    name: str, one: Callable[[], Any], other: Callable[[], Any], times: int, rounds: int
) -> dict[str, Any]:
    """Alternate two works."""
    one(), other()
    return result(name, [(seconds(one, times), seconds(other, times)) for _ in range(rounds)])


def compare_recording(folder: Path, rounds: int) -> dict[str, Any]:
    """Compare what recording costs the calling thread with logging to a file.

    A hundred at a time; the queue is emptied between the measured times, for the background
    thread shares the interpreter. The client is not installed, or it would see the log as well.
    """
    logger = logging.getLogger("bench")
    logger.propagate = False
    logger.addHandler(logging.FileHandler(folder / "bench.log"))
    client = miniapm.Client(str(folder / "record.db"), project_root=str(ROOT))
    record = failing(client.record)
    log = failing(lambda error: logger.error("it failed", exc_info=error))
    pairs = []
    for _ in range(rounds + 1):
        pairs.append((seconds(record, 100), seconds(log, 100)))
        client.flush(30)
    client.close()
    return result("record_error / logging.exception to a file", pairs[1:])


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []

    def measure(name: str, one: Any, other: Any, times: int) -> None:
        rows.append(compare(name, one, other, times, given.rounds))

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        measure("import miniapm / import bottle", import_of("miniapm"), import_of("bottle"), 3)
        rows.append(compare_recording(Path(folder), given.rounds))
        undo = miniapm.init(str(Path(folder) / "bench.db"))
        measure("wrap, in process", call(miniapm.wrap(plain_app)), call(plain_app), 3_000)
        with served(miniapm.wrap(plain_app)) as wrapped, served(plain_app) as plain:
            measure("wrap, 400 requests served by waitress", wrapped, plain, 2)
        undo()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
