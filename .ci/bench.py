"""Measures speed as ratios within one run, each the median of alternations.

    python .ci/bench.py [--rounds N] [--seconds S] [--only ingest|capture] [--json FILE]

Needs bottle and waitress and, for ingest, wrk. Compares, in turn and beside each other:
- reports a second, over 1, 8 and 32 connections, one a request, in batches of 100 and as Sentry's
  envelopes, with a waitress that reads the body and stores nothing, and with SQLite alone;
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
import re
import socket
import sqlite3
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


NO_OP = """\
import sys, waitress

def app(environ, start_response):
    environ["wsgi.input"].read()
    start_response("202 Accepted", [("Content-Length", "0")])
    return [b""]

waitress.serve(app, listen=f"127.0.0.1:{sys.argv[1]}", threads=4)
"""
# Sends the bodies of a file in turn, each thread from another place on. They are made ready before,
# so that the load takes little of what the server is to have.
WRK_SCRIPT = """\
local count = 0
function setup(thread) thread:set("number", count); count = count + 1 end
function init(arguments)
  requests, at, sent = {}, number * 37, 0
  local headers = {["Content-Type"] = "application/json", ["Authorization"] = arguments[2]}
  for line in io.lines(arguments[1]) do
    local whole = wrk.format("POST", nil, headers, (line:gsub("\\1", "\\n")))
    local parts = {}
    for part in (whole .. string.rep("E", 32)):gmatch("(.-)" .. string.rep("E", 32)) do
      parts[#parts + 1] = part
    end
    requests[#requests + 1] = parts
  end
end
function request()
  at = at % #requests + 1
  local parts = requests[at]
  if #parts == 1 then return parts[1] end
  -- An event id that comes again would be passed over.
  sent = sent + 1
  local id = string.format("%08x%08x%08x%08x", number, os.time(), sent, math.random(0, 2^31))
  return table.concat(parts, id)
end
"""


def report(number: int) -> dict[str, Any]:
    """Return a report of 1.8 KB, of one of 20 errors, that differs as real ones do."""
    error = number % 20
    return {
        "exception_class": f"Shop::Order{error}Error",
        "message": f"Could not charge order {number * 7919} of user {number % 500}",
        "backtrace": [
            *(f"app/services/order_{error}_{n}.rb:{10 + n}:in `charge_{n}`" for n in range(12)),
            *(
                f"/usr/lib/ruby/gems/3.2.0/gems/rack-3.0/lib/rack/{n}.rb:{n}:in `call`"
                for n in range(8)
            ),
        ],
        "fingerprint": f"order_{error}",
        "request_id": f"{number * 2654435761 % 2**32:08x}-{number:08x}",
        "user_id": str(number % 500),
        "params": {"id": number, "page": number % 10, "filter": {"name": f"n{number}", "on": True}},
        "timestamp": f"2026-11-23T12:{number % 60:02}:{number // 60 % 60:02}Z",
        "source_context": {
            "file": f"app/services/order_{error}_0.rb",
            "lineno": 10,
            "pre_context": ["  def charge", "    total = cart.sum"],
            "context_line": "    raise OrderError unless paid?(total)",
            "post_context": ["  end", ""],
        },
    }


def sentry_envelope(number: int) -> str:
    """Return an envelope such as sentry-sdk sends for an exception with five frames."""
    frames = [
        {
            "filename": f"shop/part{n}.py",
            "abs_path": f"/srv/shop/part{n}.py",
            "function": f"step{n}",
            "module": f"shop.part{n}",
            "lineno": 10 + n,
            "pre_context": [f"    line {m} before" for m in range(5)],
            "context_line": f"    return step{n + 1}(order)",
            "post_context": [f"    line {m} after" for m in range(5)],
            "vars": {"order": f"<Order {number}>", "total": str(number)},
            "in_app": n > 1,
        }
        for n in range(5)
    ]
    event_id = "E" * 32  # filled in when it is sent
    event = {
        "level": "error",
        "exception": {
            "values": [
                {
                    "mechanism": {"type": "flask", "handled": False},
                    "module": None,
                    "type": f"Order{number % 20}Error",
                    "value": f"could not charge order {number}",
                    "stacktrace": {"frames": frames},
                }
            ]
        },
        "event_id": event_id,
        "timestamp": "2026-11-23T12:00:00.929748Z",
        "contexts": {
            "trace": {"trace_id": event_id, "span_id": "bb0418ffc9718637"},
            "runtime": {"name": "CPython", "version": "3.11.7", "build": "3.11.7 (main)"},
        },
        "user": {"id": str(number % 500)},
        "tags": {"region": "eu", "plan": "pro"},
        "breadcrumbs": {
            "values": [{"category": "ui", "message": f"clicked {n}"} for n in range(5)]
        },
        "modules": {f"package{n}": f"1.{n}" for n in range(30)},
        "release": "shop@1.2",
        "environment": "production",
        "server_name": "web-1",
        "sdk": {"name": "sentry.python.flask", "version": "2.75.0"},
        "platform": "python",
    }
    text = json.dumps(event)
    head = json.dumps({"event_id": event_id, "sent_at": "2026-11-23T12:00:00Z"})
    return f'{head}\1{{"type":"event","length":{len(text)}}}\1{text}'


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """Run a server until the block ends; yield its process id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def load(url: str, connections: int, script: Path, bodies: Path, seconds: int) -> dict[str, Any]:
    """Send requests as fast as they are answered; return rate, p99 in ms, and failures."""
    threads = min(2, connections)
    command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}", "--latency", "-s"]
    done = subprocess.run(
        [*command, str(script), url, "--", str(bodies), f"Bearer {KEY}"],
        capture_output=True,
        text=True,
        check=True,
    )
    p99, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", done.stdout).groups()
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    return {
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)[1]),
        "p99_ms": float(p99) * {"us": 0.001, "ms": 1, "s": 1000}[unit],
        "failed": int(failed[1]) if failed else 0,
    }


def raw_sqlite(folder: Path, each: int, seconds: int) -> float:
    """Return the reports a second of SQLite alone, synchronous=FULL, `each` a transaction."""
    path = folder / f"raw-{time.monotonic_ns()}.db"
    text = json.dumps(report(1))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE reports (id INTEGER PRIMARY KEY, error_id INTEGER, body TEXT)")
        db.execute("CREATE INDEX by_error ON reports (error_id)")
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            db.execute("BEGIN IMMEDIATE")
            rows = [(number % 20, text) for number in range(count, count + each)]
            db.executemany("INSERT INTO reports (error_id, body) VALUES (?, ?)", rows)
            db.execute("COMMIT")
            count += each
        return count / (time.perf_counter() - began)


KEY = "bench-key"


def compare_ingest(folder: Path, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """Compare ways to send reports with the server that stores nothing and with SQLite."""
    script = folder / "send.lua"
    script.write_text(WRK_SCRIPT)
    singles, batches, envelopes = (folder / f"{name}.txt" for name in ("one", "hundred", "sentry"))
    singles.write_text("".join(json.dumps(report(n)) + "\n" for n in range(1_000)))
    hundreds = [[report(n) for n in range(at, at + 100)] for at in range(0, 1_000, 100)]
    batches.write_text("".join(json.dumps({"errors": some}) + "\n" for some in hundreds))
    envelopes.write_text("".join(sentry_envelope(n) + "\n" for n in range(500)))
    (folder / "no_op.py").write_text(NO_OP)
    idle, ours = free_port(), free_port()
    command = [sys.executable, str(ROOT / "miniapm.py"), "--port", str(ours), "--api-key", KEY]
    found: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with (
        running([sys.executable, str(folder / "no_op.py"), str(idle)], idle),
        running([*command, "--db", str(folder / "ingest.db")], ours),
    ):
        base = f"http://127.0.0.1:{ours}"
        for _ in range(rounds):
            none = load(f"http://127.0.0.1:{idle}/", 8, script, singles, seconds)
            keep("no-op, 8 connections: requests/s", none["rate"])
            keep("SQLite alone, one a transaction: reports/s", raw_sqlite(folder, 1, seconds))
            keep("SQLite alone, 100 a transaction: reports/s", raw_sqlite(folder, 100, seconds))
            for connections in (1, 8, 32):
                one = load(base + "/ingest/errors", connections, script, singles, seconds)
                keep(
                    f"single reports, {connections} connections / no-op", one["rate"] / none["rate"]
                )
                keep("failed", one["failed"])
                alone = found["SQLite alone, one a transaction: reports/s"][-1]
                keep(f"single reports, {connections} connections / SQLite", one["rate"] / alone)
                if connections == 8:
                    keep("p99, 8 connections / no-op", one["p99_ms"] / none["p99_ms"])
            many = load(base + "/ingest/errors/batch", 4, script, batches, seconds)
            alone = found["SQLite alone, 100 a transaction: reports/s"][-1]
            keep("batches of 100, 4 connections / SQLite", 100 * many["rate"] / alone)
            url = f"{base}/api/1/envelope/?sentry_key={KEY}"
            sentry = load(url, 8, script, envelopes, seconds)
            keep("Sentry envelopes, 8 connections / no-op", sentry["rate"] / none["rate"])
            keep("failed", many["failed"] + sentry["failed"])
    rows = []
    for name, values in found.items():
        rows.append({"name": name, "ratio": round(statistics.median(values), 2)})
        print(f"{rows[-1]['ratio']:>8}  {name}")
    return rows


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=2, help="of each load")
    parser.add_argument("--only", choices=("ingest", "capture"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []

    def measure(name: str, one: Any, other: Any, times: int) -> None:
        rows.append(compare(name, one, other, times, given.rounds))

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        if given.only != "capture":
            rows += compare_ingest(Path(folder), given.rounds, given.seconds)
        if given.only != "ingest":
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
