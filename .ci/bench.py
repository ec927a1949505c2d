"""Measures speed as ratios within one run, each the median of alternations.

    python .ci/bench.py [--rounds N] [--seconds S] [--json FILE]
        [--only ingest|pages|start|capture|host]
    python .ci/bench.py --against FILE [--rounds N] [--seconds S] [--json FILE]

Needs bottle, waitress, sentry-sdk and, for ingest and pages, wrk. Everything that is compared runs
in turn on loopback:
- reports a second, over 1, 8 and 32 connections, one a request, in batches of 100 and as the
  envelopes of Sentry's SDK, with a waitress that reads the body and stores nothing ("no-op", always
  at 8 connections) and with SQLite alone; what they cost in memory and on disk;
- pages at a million occurrences with pages at ten thousand, and under full load with idle;
- a start until the first 202 with a Python that imports bottle and waitress;
- importing miniapm with importing bottle; one record_error on the calling thread with one
  logging.exception to a file, at 10 and 100 frames with 3 and 50 variables each; a request to a
  plain WSGI application with the same application wrapped, called in process and served by waitress
  to four clients;
- what a program with 20 threads gets done that fails 500 times a second, while the tracker is away,
  hangs and takes the reports, with the same program without capture; its threads either wait after
  each piece of work or never.

With --against it compares ingest with another version of the tracker and nothing else, and that
version with itself: what it finds there is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import random
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
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import miniapm


class Results:
    """What was measured, by name, each figure of each round."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        self.targets: dict[str, str] = {}

    def keep(self, name: str, value: float, target: str = "") -> None:
        """Keep a figure; `target` is what the project aims at, such as ">= 2.0"."""
        self.found.setdefault(name, []).append(value)
        self.targets[name] = target

    def divide(self, name: str, by: str, target: str = "") -> None:
        """Add what each round's figure is of the best that another one reached in any round."""
        best = (min if name.endswith("ms") else max)(self.found[by])
        for value in self.found[name]:
            self.keep(f"{name} / {by.partition(':')[0]}", value / best, target)

    def rows(self) -> list[dict[str, Any]]:
        """Return the medians."""
        return [
            {
                "name": name,
                "median": float(f"{statistics.median(values):.4g}"),
                "least": float(f"{min(values):.4g}"),
                "most": float(f"{max(values):.4g}"),
                "rounds": len(values),
                "target": self.targets[name],
            }
            for name, values in self.found.items()
        ]

    def print(self) -> None:
        """Print the medians as a table, with what is aimed at and whether it is reached."""
        print(f"{'median':>10}  {'from':>9} {'to':>9}  {'aim':<8}      what")
        for row in self.rows():
            sign, _, aim = row["target"].partition(" ")
            reached = not aim or (
                row["median"] >= float(aim) if sign == ">=" else row["median"] <= float(aim)
            )
            mark = "" if reached else "MISSED"
            print(
                f"{row['median']:>10g}  {row['least']:>9g} {row['most']:>9g}"
                f"  {row['target']:<8} {mark:<6}{row['name']}"
            )


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


VALUES = ("17", "'some text'", "None", "(17, 'text')", "{'a': 17}")  # of variables, in turn


def failing(folder: Path, frames: int, variables: int) -> Callable[[Callable[..., Any]], Any]:
    """Return what makes, of a report function, a work that raises from some frames and reports.

    Raising is part of both sides. The code is a file of the project, for its source is read.
    """
    names = [f"item_{number}" for number in range(variables - 1)]
    lines = [
        "def fail(depth):",
        *(f"    {name} = {VALUES[number % 5]}" for number, name in enumerate(names)),
        "    if depth > 1:",
        "        fail(depth - 1)",
        "    raise ValueError(f'no such order: {depth}')",
        "def attempt(report):",
        "    try:",
        f"        fail({frames})",
        "    except ValueError as error:",
        "        report(error)",
    ]
    file = folder / f"failing_{frames}_{variables}.py"
    file.write_text("\n".join(lines) + "\n")
    namespace: dict[str, Any] = {"__name__": "failing"}
    exec(compile(file.read_text(), str(file), "exec"), namespace)  # noqa: S102 - our own
    return lambda report: lambda: namespace["attempt"](report)


def compare(
    results: Results,
    name: str,
    one: Callable[[], Any],
    other: Callable[[], Any],
    times: int,
    rounds: int,
    target: str = "",
) -> None:
    """Alternate two works."""
    one(), other()
    for _ in range(rounds):
        results.keep(name, seconds(one, times) / seconds(other, times), target)


def compare_recording(results: Results, folder: Path, rounds: int) -> None:
    """Compare what recording costs the calling thread with logging to a file.

    A hundred at a time; the queue is emptied between the measured times, for the background
    thread shares the interpreter. The client is not installed, or it would see the log as well.
    """
    logger = logging.getLogger("bench")
    logger.propagate = False
    logger.addHandler(logging.FileHandler(folder / "bench.log"))
    client = miniapm.Client(str(folder / "record.db"), project_root=str(folder))
    for frames, variables in ((10, 3), (10, 50), (100, 3), (100, 50)):
        work = failing(folder, frames, variables)
        record = work(client.record)
        log = work(lambda error: logger.error("it failed", exc_info=error))
        name = (
            f"record_error / logging.exception to a file, {frames} frames of {variables} variables"
        )
        for round_number in range(rounds + 1):
            ratio = seconds(record, 100) / seconds(log, 100)
            if round_number:  # the first one warms up
                results.keep(name, ratio, "<= 1.5")
            client.flush(30)
    client.close()


HOST = """\
import json, logging, resource, sys, threading, time
url, lasts_s, pause_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
import miniapm
if url:
    miniapm.init(url, api_key="bench")
log = logging.getLogger("host")
log.propagate = False
log.addHandler(logging.NullHandler())
done = [0] * 20
def fail(depth, order):
    customer, total = {"id": depth, "name": "ann"}, depth * 3
    if depth:
        fail(depth - 1, order)
    raise LookupError(f"no order {order}")
def work(number):
    end_s = time.monotonic() + lasts_s
    due_s = time.monotonic() + number * 0.002
    while (now_s := time.monotonic()) < end_s:
        sum(n * n for n in range(1_000))
        done[number] += 1
        if pause_s:
            time.sleep(pause_s)
        if now_s >= due_s:
            due_s += 0.04
            try:
                fail(5, done[number])
            except LookupError:
                log.exception("order failed")
threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
began_s = time.monotonic()
for each in threads: each.start()
for each in threads: each.join()
seconds = time.monotonic() - began_s
mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"units": sum(done) / seconds, "mebibytes": mebibytes}), flush=True)
"""


class HostTracker(http.server.BaseHTTPRequestHandler):
    """Takes reports, or hangs; counts what it took and what it was told was dropped."""

    hangs = False
    taken = dropped = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        while type(self).hangs:
            time.sleep(0.1)
        for report in json.loads(body)["errors"]:
            if report["exception_class"] == "miniapm.ReportsDropped":
                type(self).dropped += int(report["message"].split()[0].replace(",", ""))
            else:
                type(self).taken += 1
        self.send_response(202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def compare_hosts(results: Results, folder: Path, rounds: int, lasts_s: int) -> None:
    """Compare a program that fails 500 times a second with the same one without capture.

    The tracker is away, hangs and takes the reports, each for a third of the time.
    """
    script = folder / "host.py"
    script.write_text(HOST)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MINI_APM_QUIET": "1"}

    def run(url: str, pause_s: float, meanwhile: Callable[[], None] = lambda: None) -> Any:
        command = [sys.executable, str(script), url, str(lasts_s), str(pause_s)]
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as host:
            meanwhile()
            return json.loads(host.communicate()[0])

    def tracker_comes_and_hangs(port: int) -> Callable[[], None]:
        def meanwhile() -> None:
            time.sleep(lasts_s / 3)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", port), HostTracker)
            HostTracker.hangs = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            time.sleep(lasts_s / 3)
            HostTracker.hangs = False

        return meanwhile

    for name, pause_s in (("that wait between", 0.02), ("that never wait", 0.0)):
        for _ in range(rounds):
            plain = run("", pause_s)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            HostTracker.taken = HostTracker.dropped = 0
            url = f"http://127.0.0.1:{port}"
            captured = run(url, pause_s, tracker_comes_and_hangs(port))
            label = f"host of 20 threads {name}"
            ratio = captured["units"] / plain["units"]
            results.keep(f"{label}: done / without capture", ratio, ">= 0.9")
            more = captured["mebibytes"] - plain["mebibytes"]
            results.keep(f"{label}: MiB more than without", more)
            accounted = HostTracker.taken + HostTracker.dropped
            results.keep(f"{label}: reports taken or counted as dropped", accounted)
            results.keep(f"{label}: of these dropped", HostTracker.dropped)


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


def report(number: int, errors: int = 20) -> dict[str, Any]:
    """Return a report of 1.8 KB, of one of some errors, that differs as real ones do."""
    error = number % errors
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
        "params": {
            "id": number,
            "page": number % 10,
            "filter": {"name": f"n{number}", "on": True},
            "cart": [{"sku": f"sku-{number * k % 9973}", "count": k} for k in range(1, 6)],
        },
        "timestamp": f"2026-11-23T12:{number % 60:02}:{number // 60 % 60:02}Z",
        "source_context": {
            "file": f"app/services/order_{error}_0.rb",
            "lineno": 10,
            "pre_context": ["  def charge", "    total = cart.sum"],
            "context_line": "    raise OrderError unless paid?(total)",
            "post_context": ["  end", ""],
        },
    }


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


def write_envelopes(path: Path, count: int) -> None:
    """Write envelopes as sentry-sdk sends them for exceptions, their event id left to fill in.

    In a process of its own: an SDK that was started slows down the logging of its process.
    """
    import sentry_sdk

    sent: list[bytes] = []

    class Transport(sentry_sdk.Transport):
        def capture_envelope(self, envelope: Any) -> None:
            sent.append(envelope.serialize())

    options: dict[str, Any] = {"default_integrations": False, "release": "shop@1.2"}
    sentry_sdk.init(f"http://{KEY}@127.0.0.1:1/1", transport=Transport, **options)
    for number in range(count):
        with sentry_sdk.new_scope() as scope:
            scope.set_user({"id": str(number % 500)})
            scope.set_tag("region", "eu")
            for step in ("opened", "paid", "sent"):
                scope.add_breadcrumb(category="cart", message=f"order {number} was {step}")
            failing(path.parent, 6, 1)(sentry_sdk.capture_exception)()
        event_id = json.loads(sent[-1].partition(b"\n")[0])["event_id"]
        text = sent.pop().decode().replace(event_id, "E" * 32).replace("\n", "\1")
        with path.open("a") as file:
            file.write(text + "\n")


def load(url: str, connections: int, script: Path, bodies: Path, seconds: int) -> dict[str, float]:
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


def resident_mb(pid: int) -> float:
    """Return the memory that a process has now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024


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
        rate = count / (time.perf_counter() - began)
    path.unlink()
    return rate


KEY = "bench-key"
SERVE = [sys.executable, str(ROOT / "miniapm.py"), "--api-key", KEY]
LOADS = (  # name, connections, path, file of bodies
    ("single reports, 8 connections", 8, "/ingest/errors", "one.txt"),
    ("single reports, 32 connections", 32, "/ingest/errors", "one.txt"),
    ("batches of 100, 4 connections", 4, "/ingest/errors/batch", "hundred.txt"),
    ("Sentry envelopes, 8 connections", 8, f"/api/1/envelope/?sentry_key={KEY}", "sentry.txt"),
)
MANY = ["--max-occurrences", "1000000"]  # nothing is removed, as by those it is compared with


NO_OP_RATE, NO_OP_P99 = "no-op: requests/s", "no-op: p99 ms"
SQLITE = "SQLite alone, one a transaction: reports/s"
SQLITE_HUNDREDS = "SQLite alone, 100 a transaction: reports/s"
RATIOS = (
    ("single reports, 1 connections: reports/s", NO_OP_RATE, ""),
    ("single reports, 8 connections: reports/s", NO_OP_RATE, ">= 1.4"),
    ("single reports, 32 connections: reports/s", NO_OP_RATE, ">= 2.0"),
    ("single reports, 8 connections: p99 ms", NO_OP_P99, "<= 0.8"),
    ("single reports, 1 connections: reports/s", SQLITE, ">= 0.5"),
    ("single reports, 8 connections: reports/s", SQLITE, ">= 1.4"),
    ("single reports, 32 connections: reports/s", SQLITE, ""),
    ("batches of 100, 4 connections: reports/s", SQLITE_HUNDREDS, ">= 0.65"),
    ("Sentry envelopes, 8 connections: reports/s", NO_OP_RATE, ">= 0.8"),
    ("single reports, 32 connections, as many removed: reports/s", NO_OP_RATE, ""),
)


class Ingest:
    """Alternates ways to send reports with the server that stores nothing and with SQLite."""

    def __init__(self, results: Results, folder: Path, seconds: int) -> None:
        self.results, self.folder, self.seconds = results, folder, seconds
        self.script, self.one, self.hundred, self.sentry = (
            folder / name for name in ("send.lua", "one.txt", "hundred.txt", "sentry.txt")
        )
        self.script.write_text(WRK_SCRIPT)
        self.one.write_text("".join(json.dumps(report(n)) + "\n" for n in range(1_000)))
        hundreds = [[report(n) for n in range(at, at + 100)] for at in range(0, 1_000, 100)]
        self.hundred.write_text("".join(json.dumps({"errors": some}) + "\n" for some in hundreds))
        writing = multiprocessing.get_context("spawn").Process(
            target=write_envelopes, args=(self.sentry, 500)
        )
        writing.start()
        writing.join()
        (folder / "no_op.py").write_text(NO_OP)

    def send(self, port: int, path: str, connections: int, bodies: Path) -> dict[str, float]:
        """Send for some seconds."""
        url = f"http://127.0.0.1:{port}{path}"
        found = load(url, connections, self.script, bodies, self.seconds)
        self.results.keep("requests that failed", found["failed"], "<= 0")
        return found

    def compare(self, rounds: int) -> None:
        """Start the servers and alternate.

        The no-op is started anew each round and counts with its best one: its threads get into
        each other's way in some runs, down to a tenth, and that must not flatter.
        """
        ours, full = free_port(), free_port()
        command = [*SERVE, "--port", str(ours), "--db", str(self.folder / "ingest.db"), *MANY]
        crowded = [*SERVE, "--port", str(full), "--db", str(self.folder / "crowded.db")]
        with running(command, ours) as our_pid, running(crowded, full):
            self.results.keep("memory idle, MB", resident_mb(our_pid))
            for _ in range(rounds):
                none_mb = self.round_of_others()
                self.round(ours, full)
                self.results.keep("memory under load, MB", resident_mb(our_pid))
                self.results.keep(
                    "memory under load / no-op", resident_mb(our_pid) / none_mb, "<= 2.5"
                )
        for name, by, target in RATIOS:
            self.results.divide(name, by, target)

    def round_of_others(self) -> float:
        """Measure what the tracker is compared with; return the memory that the no-op takes."""
        keep = self.results.keep
        port = free_port()
        with running([sys.executable, str(self.folder / "no_op.py"), str(port)], port) as pid:
            no_op = self.send(port, "/", 8, self.one)
            memory_mb = resident_mb(pid)
        keep(NO_OP_RATE, no_op["rate"])
        keep(NO_OP_P99, no_op["p99_ms"])
        keep(SQLITE, raw_sqlite(self.folder, 1, self.seconds))
        keep(SQLITE_HUNDREDS, raw_sqlite(self.folder, 100, self.seconds))
        return memory_mb

    def round(self, ours: int, full: int) -> None:
        """Measure the tracker once."""
        keep, path = self.results.keep, "/ingest/errors"
        for count in (1, 8, 32):
            found = self.send(ours, path, count, self.one)
            keep(f"single reports, {count} connections: reports/s", found["rate"])
            keep(f"single reports, {count} connections: p99 ms", found["p99_ms"])
        batches = self.send(ours, path + "/batch", 4, self.hundred)["rate"]
        keep("batches of 100, 4 connections: reports/s", 100 * batches)
        sentry = self.send(ours, f"/api/1/envelope/?sentry_key={KEY}", 8, self.sentry)["rate"]
        keep("Sentry envelopes, 8 connections: reports/s", sentry)
        crowded = self.send(full, path, 32, self.one)["rate"]
        keep("single reports, 32 connections, as many removed: reports/s", crowded)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare_versions(results: Results, ingest: Ingest, other: Path, rounds: int) -> None:
    """Alternate this version with another one, and the other one with itself."""
    files = {"now": ROOT / "miniapm.py", "before": other, "before, again": other}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, file in files.items():
            port, path = free_port(), ingest.folder / f"{name}.db"
            more = ["--port", str(port), "--db", str(path), *MANY]
            command = [sys.executable, str(file), "--api-key", KEY, *more]
            servers[name] = (port, stack.enter_context(running(command, port)))
        for load_name, connections, path, bodies in LOADS:
            for number in range(rounds + 1):
                found = {}
                for name, (port, pid) in servers.items():
                    began = cpu_seconds(pid)
                    sent = ingest.send(port, path, connections, ingest.folder / bodies)
                    cpu = (cpu_seconds(pid) - began) / (sent["rate"] * ingest.seconds)
                    found[name] = {"reports/s": sent["rate"], "CPU a report": cpu} | sent
                if not number:  # the first one warms up
                    continue
                for name in ("now", "before, again"):
                    for figure in ("reports/s", "CPU a report", "p99_ms"):
                        ratio = found[name][figure] / found["before"][figure]
                        aim = ">= 0.9" if "Sentry" in load_name else ">= 0.95"
                        aim = aim if name == "now" and figure == "reports/s" else ""
                        results.keep(f"{load_name}: {figure}, {name} / before", ratio, aim)
    for source in ("reports", "events"):
        sizes = [database_bytes(ingest.folder, file, source) for file in (files["now"], other)]
        results.keep(f"{source}: bytes on disk", sizes[0])
        results.keep(f"{source}: bytes on disk, now / before", sizes[0] / sizes[1], "<= 1.3")


def version_in(file: Path) -> Any:
    """Return a version of the tracker as a module."""
    spec = importlib.util.spec_from_file_location(f"version_{time.monotonic_ns()}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def database_bytes(folder: Path, file: Path, source: str = "reports") -> float:
    """Return the bytes on disk of one report, of a thousand an error, or of a Sentry event."""
    path = folder / f"size-{time.monotonic_ns()}.db"
    tracker = version_in(file)
    if source == "reports":
        fill(path, 20_000, errors=20, tracker=tracker)
        return path.stat().st_size / 20_000
    events = [line.split("\1")[2] for line in (folder / "sentry.txt").open()]
    with contextlib.closing(tracker.Store(str(path))) as store:
        project = store.ensure_default_project(KEY)
        for number in range(4_000):
            event = json.loads(events[number % len(events)]) | {"event_id": f"{number:032x}"}
            store.record(project.id, [tracker.occurrence_from_sentry(event, store.now_ms())])
    return path.stat().st_size / 4_000


def fill(path: Path, occurrences: int, errors: int = 2_000, tracker: Any = miniapm) -> None:
    """Make a database: its occurrences happened within the last 30 days."""
    chance = random.Random(1)
    # An older version has another way to take a report's text as it is.
    read = getattr(tracker, "read_report", None) or (
        lambda text, now_ms: tracker.parse_occurrence(json.loads(text), now_ms, plain=text)
    )
    with contextlib.closing(tracker.Store(str(path))) as store:
        project = store.ensure_default_project(KEY)
        now_ms = store.now_ms()
        for at in range(0, occurrences, 1_000):
            made = []
            for number in range(at, at + 1_000):
                time_ms = now_ms - int(chance.random() * 30 * 24 * tracker.HOUR_MS)
                said = report(number, errors) | {"timestamp": tracker.iso_time(time_ms)}
                made.append(read(json.dumps(said), now_ms))
            store.record_here([(project.id, one) for one in made])


class Pages:
    """Compares pages of two databases, and of a server that is idle and one that is not."""

    paths: ClassVar = {
        "list page": "/errors",
        "error page": "/errors/1007",
        "search": "/errors?q=order+1007",
        "list as JSON": "/errors.json",
        "error as JSON": "/errors/1007.json",
    }

    def __init__(self, results: Results, ingest: Ingest, small: Path, large: Path) -> None:
        self.results, self.ingest, self.small, self.large = results, ingest, small, large

    def latencies_ms(self, port: int, path: str, times: int) -> list[float]:
        """Return what requests over one connection took."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        found = []
        for _ in range(times):
            began = time.perf_counter()
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            found.append((time.perf_counter() - began) * 1_000)
        connection.close()
        return sorted(found)

    def compare(self, rounds: int) -> None:
        """Start the servers and alternate."""
        ports = [free_port() for _ in range(3)]
        paths = (self.small, self.large, self.ingest.folder / "empty.db")
        with contextlib.ExitStack() as stack:
            for port, path in zip(ports, paths, strict=True):
                command = [*SERVE, "--port", str(port), "--db", str(path), *MANY]
                stack.enter_context(running(command, port))
            for _ in range(rounds):
                self.round(*ports)

    def round(self, small: int, large: int, empty: int) -> None:
        """Measure everything once."""
        keep = self.results.keep
        for name, path in self.paths.items():
            few, many = (
                statistics.median(self.latencies_ms(port, path, 50)) for port in (small, large)
            )
            keep(f"{name}, a million occurrences: ms", many)
            aim = "<= 2" if name == "search" else "<= 1.3"
            keep(f"{name}, a million / ten thousand occurrences", many / few, aim)
        into_few, into_many = (
            self.ingest.send(port, "/ingest/errors", 8, self.ingest.one)["rate"]
            for port in (empty, large)
        )
        keep("ingest, into a million occurrences / none", into_many / into_few, ">= 0.9")
        idle = self.latencies_ms(large, "/errors", 100)[94]
        sending = threading.Thread(
            target=self.ingest.send, args=(large, "/ingest/errors", 32, self.ingest.one)
        )
        sending.start()
        busy = self.latencies_ms(large, "/errors", 40)
        sending.join()
        keep("list page, p95 under full ingest / idle", busy[37] / idle, "<= 6")
        keep("list page, slowest under full ingest: ms", busy[-1], "<= 500")


def first_answer_s(folder: Path) -> float:
    """Return the seconds from starting the tracker to its first 202."""
    port = free_port()
    path = folder / f"start-{time.monotonic_ns()}.db"
    began = time.perf_counter()
    process = subprocess.Popen(
        [*SERVE, "--port", str(port), "--db", str(path)], stdout=subprocess.DEVNULL
    )
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps(report(1))
    try:
        while time.perf_counter() - began < 30:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            with contextlib.suppress(OSError):
                connection.request("POST", "/ingest/errors", body, headers)
                assert connection.getresponse().status == 202
                return time.perf_counter() - began
            time.sleep(0.002)
    finally:
        process.terminate()
        process.wait(20)
    raise TimeoutError("the tracker does not answer")


def compare_start(results: Results, folder: Path, rounds: int) -> None:
    """Alternate starts of the tracker with starts of what it imports."""
    imported = import_of("bottle, waitress")
    imported()
    for _ in range(rounds):
        alone = seconds(imported, 1)
        ours = first_answer_s(folder)
        results.keep("start to first 202: ms", ours * 1_000)
        results.keep("start to first 202 / import bottle, waitress", ours / alone, "<= 3")


def compare_capture(results: Results, folder: Path, rounds: int) -> None:
    """Compare what capture costs its host."""

    def measure(name: str, one: Any, other: Any, times: int, target: str) -> None:
        compare(results, name, one, other, times, rounds, target)

    name = "import miniapm / import bottle"
    measure(name, import_of("miniapm"), import_of("bottle"), 3, "<= 1.6")
    compare_recording(results, folder, rounds)
    undo = miniapm.init(str(folder / "bench.db"))
    measure("wrap, in process", call(miniapm.wrap(plain_app)), call(plain_app), 3_000, "<= 1.5")
    with served(miniapm.wrap(plain_app)) as wrapped, served(plain_app) as plain:
        measure("wrap, 400 requests served by waitress", wrapped, plain, 2, "<= 1.5")
    undo()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each load")
    parser.add_argument("--only", choices=("ingest", "pages", "start", "capture", "host"))
    parser.add_argument("--against", type=Path, help="another version of miniapm.py")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = Results()
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.against:
            ingest = Ingest(results, folder, given.seconds)
            compare_versions(results, ingest, given.against.resolve(), given.rounds)
            given.only = "nothing else"
        if given.only in (None, "ingest"):
            Ingest(results, folder, given.seconds).compare(given.rounds)
            size = database_bytes(folder, ROOT / "miniapm.py")
            results.keep("database: bytes a report", size, "<= 400")
        if given.only in (None, "pages"):
            small, large = folder / "small.db", folder / "large.db"
            fill(small, 10_000)
            fill(large, 1_000_000)
            Pages(results, Ingest(results, folder, given.seconds), small, large).compare(
                given.rounds
            )
        if given.only in (None, "start"):
            compare_start(results, folder, 2 * given.rounds)
        if given.only in (None, "capture"):
            compare_capture(results, folder, given.rounds)
        if given.only in (None, "host"):
            compare_hosts(results, folder, 1, 20 * given.seconds)
    results.print()
    if given.json:
        given.json.write_text(json.dumps(results.rows(), indent=2) + "\n")


if __name__ == "__main__":
    main()
