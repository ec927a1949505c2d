"""Compares this version of the tracker with another one, in alternating blocks of load.

    python .ci/bench.py [--against FILE] [--only ingest|outgoing|pages|start|capture|host]
        [--case TEXT] [--rounds N] [--block-s S] [--json FILE]

Needs bottle, waitress and sentry-sdk, and wrk for ingest, outgoing and pages. "now" is this
version, "before" is FILE, "control" is FILE once more. Their servers run at the same time on
loopback, each with a database of its own; one at a time is loaded, for a block, and a round is a
block for each. The columns of the table:
- better: which direction is better;
- now, before: the median of the rounds;
- ratio: now / before in each round, the median of these;
- control: the same of control / before, with the least and the most: a ratio within is noise.

CPU is what the server's process used, user and system, also after the block until it rests. It
varies less than rates and times do when other programs load the machine. With TMPDIR=/dev/shm the
disk has no part in it either.

- ingest: reports a second and their 99th percentile by wrk, CPU, memory and bytes on disk;
- outgoing: reports a second of a server whose webhook and forward take what is sent and never
  answer, and whose database is being exported, against one without, of this version only;
- pages: with a million reports stored, also against ten thousand; and what it takes to render the
  list and the page of a deep chain, called in process with the errors of corpus.py;
- start: until the first 202;
- capture: importing miniapm against bottle; one record_error on the calling thread against one
  logging.exception to a file; a request to a WSGI application wrapped against plain;
- host: what a program with 20 threads gets done that fails 500 times a second, while the tracker is
  away, hangs and takes the reports, against the same program without capture.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import wsgiref.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEY, BATCH = "bench-key", "/ingest/errors/batch"
HIGHER_IS_BETTER = ("a second", "/ without them", "done / without capture", "counted as dropped")


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of the tracker: miniapm.py in a folder of its own."""

    name: str
    folder: Path

    def load(self) -> Any:
        """Return it as a module."""
        spec = importlib.util.spec_from_file_location(
            f"{self.name}_{time.monotonic_ns()}", self.folder / "miniapm.py"
        )
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


@dataclasses.dataclass(frozen=True)
class Server:
    """A running tracker."""

    port: int
    pid: int

    def cpu_s(self) -> float:
        """Return the processor time, user and system, that it has used."""
        return time.clock_gettime((~self.pid << 3) | 2)  # Linux's CPU clock of another process

    def rest(self) -> None:
        """Wait until it does nothing more, so that work put off is counted as well."""
        used_s, deadline_s = -1.0, time.monotonic() + 2
        while self.cpu_s() - used_s > 0.001 and time.monotonic() < deadline_s:
            used_s = self.cpu_s()
            time.sleep(0.04)

    def memory_mib(self, field: str) -> float:
        """Return a field of its status, such as VmRSS."""
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found[1]) / 1024


class Bench:
    """Alternates the versions and keeps what is found, by measure and version, round by round."""

    def __init__(self, folder: Path, against: Path | None, given: argparse.Namespace) -> None:
        self.folder, self.rounds, self.block_s = folder, given.rounds, given.block_s
        self.case, self.stored, self.round = given.case, given.stored, 0
        self.found: dict[str, dict[str, list[float]]] = {}
        files = {"now": ROOT / "miniapm.py"}
        if against:
            files |= {"before": against, "control": against}
        self.versions = []
        for name, file in files.items():
            (folder / name).mkdir()
            shutil.copy(file, folder / name / "miniapm.py")
            self.versions.append(Version(name, folder / name))

    def alternate(
        self, measure: Callable[[Version], dict[str, float]], rounds: int | None = None
    ) -> None:
        """Measure the versions in turn; another one is the first in each round."""
        for number in range(rounds or self.rounds):
            self.round, first = number, number % len(self.versions)
            for version in self.versions[first:] + self.versions[:first]:
                for name, value in measure(version).items():
                    values = self.found.setdefault(name, {})
                    values.setdefault(version.name, []).append(value)

    def side_by_side(self, work: Callable[[Version], Any]) -> dict[str, Any]:
        """Do what is not timed for now and before at once; return the results by version."""
        versions = self.versions[:2]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return dict(zip((one.name for one in versions), pool.map(work, versions), strict=True))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what was found, as the table has it."""
        for name, found in self.found.items():
            row: dict[str, Any] = {"measure": name, "rounds": len(found["now"])}
            row["better"] = "higher" if name.endswith(HIGHER_IS_BETTER) else "lower"
            for version in ("now", "before"):
                if version in found:
                    row[version] = statistics.median(found[version])
            for version, key in (("now", "ratio"), ("control", "control")):
                if version in found and all(found.get("before", [0])):
                    pairs = zip(found[version], found["before"], strict=True)
                    ratios = [one / other for one, other in pairs]
                    row[key] = statistics.median(ratios)
                    row[f"{key}_from"], row[f"{key}_to"] = min(ratios), max(ratios)
            yield row

    def print(self) -> None:
        """Print the table, as Markdown."""
        table = [("measure", "better", "now", "before", "ratio", "control"), ("---",) * 6]
        for row in self.rows():
            line = [row["measure"], row["better"]]
            figures = (f"{row[name]:.4g}" if name in row else "" for name in ("now", "before"))
            line += [f"{float(figure):,g}" if figure else "" for figure in figures]
            line.append(f"{row['ratio']:.3f}" if "ratio" in row else "")
            control = "{control:.3f} ({control_from:.2f} to {control_to:.2f})"
            line.append(control.format(**row) if "control" in row else "")
            table.append(tuple(line))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            print(f"| {' | '.join(padded)} |")


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
def serving(version: Version, database: str = "bench.db", *more: str) -> Iterator[Server]:
    """Run a version's server until the block ends."""
    port = free_port()
    command = [sys.executable, "miniapm.py", "--api-key", KEY, "--port", str(port)]
    command += ["--db", database, *more]
    process = subprocess.Popen(command, cwd=version.folder, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield Server(port, process.pid)
    finally:
        process.terminate()
        process.wait(20)


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


# Sends the requests of a file in turn, from a place on that the caller names.
WRK_SCRIPT = """\
function init(arguments)
  local text = io.open(arguments[1], "rb"):read("*a")
  fresh, at, sent, requests = text:find("\\1", 1, true), tonumber(arguments[2]), 0, {}
  for request in text:gmatch("%Z+") do requests[#requests + 1] = request end
  math.randomseed(os.time())
end
function request()
  at, sent = at % #requests + 1, sent + 1
  if not fresh then return requests[at] end
  -- An event id that comes again would be passed over.
  local id = string.format("%08x%08x%016x", math.random(0, 2^31), math.random(0, 2^31), sent)
  return (requests[at]:gsub("\\1", id))
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p99_ms": %f, "failed": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def varied(number: int) -> dict[str, Any]:
    """Return a report of one of 2,000 errors, full of ids, addresses and hex never seen before."""
    chance = random.Random(number)

    def digits(count: int) -> str:
        return f"{chance.getrandbits(4 * count):0{count}x}"

    some_id, address = uuid.UUID(digits(32)), f"10.{number % 250}.{chance.getrandbits(7)}.9"
    made = report(number, 2_000)
    for at in range(0, 20, 4):
        made["backtrace"][at] += f" for #<Order:0x0000{digits(12)} id: {chance.getrandbits(30)}>"
    return made | {
        "message": f"order {some_id} from {address} is held by #<Worker:0x0000{digits(12)}>",
        "request_id": str(uuid.UUID(digits(32))),
        "user_id": str(chance.getrandbits(20)),
        "params": {
            "id": str(some_id),
            "remote": f"{address}:{chance.getrandbits(15)}",
            "etag": digits(40),
            "items": [{"ref": digits(16), "count": chance.getrandbits(10)} for _ in range(5)],
        },
    }


def write_requests(path: Path, target: str, bodies: Iterable[str]) -> None:
    """Write whole requests for wrk: a NUL between two, a 1 for each event id to fill in."""
    head = (
        f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: "
    )
    requests = (f"{head}{len(body.encode())}\r\n\r\n{body}" for body in bodies)
    path.write_text("\0".join(requests).replace("E" * 32, "\1"))


def write_envelopes(path: Path, count: int) -> None:
    """Write envelopes as sentry-sdk sends them for exceptions, their event id left to fill in.

    In a process of its own: an SDK that was started slows down the logging of its process.
    """
    import sentry_sdk

    sent: list[str] = []

    class Transport(sentry_sdk.Transport):
        def capture_envelope(self, envelope: Any) -> None:
            text = envelope.serialize().decode()
            event_id = json.loads(text.partition("\n")[0])["event_id"]
            sent.append(text.replace(event_id, "E" * 32))

    options: dict[str, Any] = {"default_integrations": False, "release": "shop@1.2"}
    sentry_sdk.init(f"http://{KEY}@127.0.0.1:1/1", transport=Transport, **options)
    for number in range(count):
        with sentry_sdk.new_scope() as scope:
            scope.set_user({"id": str(number % 500)})
            scope.set_tag("region", "eu")
            for step in ("opened", "paid", "sent"):
                scope.add_breadcrumb(category="cart", message=f"order {number} was {step}")
            failing(path.parent, 6, 1)(sentry_sdk.capture_exception)()
    write_requests(path, f"/api/1/envelope/?sentry_key={KEY}", sent)


def write_loads(folder: Path) -> None:
    """Write the requests that wrk sends, and its script."""
    (folder / "send.lua").write_text(WRK_SCRIPT)
    made = {load: [json.dumps(make(n)) for n in range(10_000)] for load, make in LOADS.items()}
    for load, bodies in made.items():
        write_requests(folder / load, "/ingest/errors", bodies)
    batches = (made["20 errors alike"][at : at + 100] for at in range(0, 10_000, 100))
    write_requests(folder / "batches", BATCH, map(batch, batches))
    spawn = multiprocessing.get_context("spawn")
    writing = spawn.Process(target=write_envelopes, args=(folder / "envelopes", 500))
    writing.start()
    writing.join()


def batch(bodies: Iterable[str]) -> str:
    """Return the body of a batch."""
    return f'{{"errors": [{", ".join(bodies)}]}}'


def send(bench: Bench, server: Server, load: str, connections: int, each: int = 1) -> Any:
    """Send a block of requests as fast as they are answered; return what wrk and CPU say."""
    began_s = server.cpu_s()
    url, at = f"http://127.0.0.1:{server.port}/", str(bench.round * 1_117)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{bench.block_s}", "-s"]
    done = subprocess.run(
        [*command, str(bench.folder / "send.lua"), url, "--", str(bench.folder / load), at],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if found["failed"]:
        print(f"{load}: {found['failed']} of {found['requests']} requests failed", file=sys.stderr)
    server.rest()
    reports = (found["requests"] - found["failed"]) * each
    found["CPU µs a report"] = (server.cpu_s() - began_s) * 1e6 / reports
    found["reports a second"] = reports / found["seconds"]
    return found


MANY = ("--max-occurrences", "1000000")  # nothing is removed
LOADS = {"20 errors alike": report, "2,000 errors varied": varied}
CASES = (  # name, file of requests, connections, reports in each, flags of the server
    *(
        (f"{load}, {count} connection{'s'[: count - 1]}", load, count, 1, MANY)
        for load in LOADS
        for count in (1, 8, 32)
    ),
    ("batches of 100, 4 connections", "batches", 4, 100, MANY),
    ("Sentry envelopes, 8 connections", "envelopes", 8, 1, MANY),
    ("as many removed, 32 connections", "20 errors alike", 32, 1, ("--max-occurrences", "100")),
)


def fill(version: Version, database: str, bodies: Iterator[str]) -> None:
    """Send reports in batches to a database of its own."""
    with serving(version, database, *MANY) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        while some := list(itertools.islice(bodies, 100)):
            connection.request("POST", BATCH, batch(some), headers)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (202, b""), answer.status
        connection.close()


def stored_bytes(version: Version) -> dict[str, float]:
    """Return the bytes in the database of one report, with all tables and indexes."""
    found = {}
    for (load, make), count in zip(LOADS.items(), (10_000, 20_000), strict=True):
        fill(version, f"{load}.db", (json.dumps(make(number)) for number in range(count)))
        size = sum(each.stat().st_size for each in version.folder.glob(f"{load}.db*"))
        found[f"{load}: bytes a report in the database"] = size / count
    return found


def compare_ingest(bench: Bench) -> None:
    """Compare what taking reports costs."""
    sizes = bench.side_by_side(stored_bytes)
    bench.alternate(lambda version: sizes.get(version.name, {}), 1)
    with contextlib.ExitStack() as stack:
        servers = {
            (version.name, flags): stack.enter_context(serving(version, f"{flags[1]}.db", *flags))
            for version in bench.versions
            for flags in {case[-1]: None for case in CASES}
        }

        def measure(version: Version) -> dict[str, float]:
            found = send(bench, servers[version.name, flags], load, connections, each)
            names = ("CPU µs a report", "reports a second", "p99_ms")
            return {f"{name}: {what.replace('_', ' ')}": found[what] for what in names}

        def memory(version: Version) -> dict[str, float]:
            names = {"VmRSS": "memory at rest, MiB", "VmHWM": "memory at most, MiB"}
            server = servers[version.name, MANY]
            return {said: server.memory_mib(field) for field, said in names.items()}

        for version in bench.versions:
            send(bench, servers[version.name, MANY], "2,000 errors varied", 32)  # warms up
        for name, load, connections, each, flags in CASES:
            if bench.case in name:
                bench.alternate(measure)
        bench.alternate(memory, 1)


@contextlib.contextmanager
def exporting(version: Version, database: str) -> Iterator[None]:
    """Export a database again and again until the block ends."""
    command = f"while :; do {sys.executable} miniapm.py export --db {database} >/dev/null; done"
    process = subprocess.Popen(["sh", "-c", command], cwd=version.folder, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def compare_outgoing(bench: Bench) -> None:
    """Compare taking reports while targets hang and an export runs with taking them without."""
    with contextlib.ExitStack() as stack:
        # The system accepts connections and what they send; nobody ever answers.
        target = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        host, now = f"127.0.0.1:{target.getsockname()[1]}", bench.versions[0]
        flags = ("--webhook", f"http://{host}/", "--forward", f"http://key@{host}/1")
        servers = {
            name: stack.enter_context(serving(now, f"{name}.db", *MANY, *more))
            for name, more in (("hung", flags), ("free", ()))
        }

        def measure(version: Version) -> dict[str, float]:
            if version is not now:
                return {}
            rates = {}
            for name in sorted(servers, reverse=bool(bench.round % 2)):
                with exporting(now, "hung.db") if name == "hung" else contextlib.nullcontext():
                    found = send(bench, servers[name], "2,000 errors varied", 8)
                rates[name] = found["reports a second"]
            said = (
                "a webhook and a forward that hang, and an export: reports a second / without them"
            )
            return {said: rates["hung"] / rates["free"]}

        for server in servers.values():
            send(bench, server, "2,000 errors varied", 32)  # warms up
        bench.alternate(measure)


def old_reports(count: int) -> Iterator[str]:
    """Yield reports of 2,000 errors that happened within the last 30 days."""
    chance, now = random.Random(1), datetime.datetime.now(datetime.UTC)
    for number in range(count):
        then = now - datetime.timedelta(days=30 * chance.random())
        yield json.dumps(report(number, 2_000) | {"timestamp": then.isoformat()})


PAGES = {
    "list page": "/errors",
    "error page": "/errors/1007",
    "search": "/errors?q=order+1007",
    "list as JSON": "/errors.json",
    "error as JSON": "/errors/1007.json",
}


def page_ms(server: Server, path: str) -> float:
    """Return the milliseconds that a page takes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    began = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200, answer.status
    return (time.perf_counter() - began) * 1_000


def page_costs(bench: Bench, small: Server, large: Server) -> dict[str, float]:
    """Return what pages cost, each the median of 30 requests to each server in turn."""
    found = {}
    for name, path in PAGES.items():
        costs: dict[Server, list[float]] = {small: [], large: []}
        times_ms = []
        for server in (small, large) * 30:
            began_s = server.cpu_s()
            times_ms.append(page_ms(server, path))
            costs[server].append((server.cpu_s() - began_s) * 1_000)
        few, many = (statistics.median(costs[server]) for server in (small, large))
        found[f"{name}, {bench.stored:,} stored: CPU ms"] = many
        found[f"{name}, {bench.stored:,} stored: ms"] = statistics.median(times_ms[1::2])
        found[f"{name}, {bench.stored:,} stored / 10,000: CPU"] = many / few
    return found


def busy_costs(bench: Bench, small: Server, large: Server) -> dict[str, float]:
    """Return what reports cost beside stored ones, and how long pages take meanwhile."""
    load = "20 errors alike"
    few, many = (send(bench, server, load, 8)["CPU µs a report"] for server in (small, large))
    sending = threading.Thread(target=send, args=(bench, large, load, 32))
    sending.start()
    times_ms = []
    while sending.is_alive():
        times_ms.append(page_ms(large, "/errors"))
    return {
        f"ingest, {bench.stored:,} stored / 10,000: CPU": many / few,
        "list page under full load: p95 ms": statistics.quantiles(times_ms, n=20)[18],
        "list page under full load: slowest ms": max(times_ms),
    }


def compare_pages(bench: Bench) -> None:
    """Compare pages and ingest at ten thousand and at a million stored reports."""

    def make(version: Version) -> None:
        fill(version, "small.db", old_reports(10_000))
        fill(version, "large.db", old_reports(bench.stored))

    bench.side_by_side(make)
    for control in bench.versions[2:]:
        for database in ("small.db", "large.db"):
            shutil.copy(bench.folder / "before" / database, control.folder)
    with contextlib.ExitStack() as stack:
        servers = {
            version: [
                stack.enter_context(serving(version, database, *MANY))
                for database in ("small.db", "large.db")
            ]
            for version in bench.versions
        }
        bench.alternate(lambda version: page_costs(bench, *servers[version]))
        bench.alternate(lambda version: busy_costs(bench, *servers[version]))
    compare_renders(bench)


def compare_renders(bench: Bench) -> None:
    """Compare what rendering costs: pages that are called in process, with the same errors."""
    sys.path.insert(0, str(ROOT / ".ci"))
    import corpus

    works: dict[Version, dict[str, Callable[[], Any]]] = {}
    stores = []
    for version in bench.versions:
        tracker = version.load()
        stores.append(tracker.Store(str(version.folder / "corpus.db")))
        ids = corpus.fill(tracker, stores[-1])
        app = tracker.App(stores[-1], tracker.Config())
        works[version] = {
            "list page, 50 rows": call(app, "/errors"),
            "error page, 50 frames with source and variables": call(app, f"/errors/{ids['deep']}"),
        }

    def measure(version: Version) -> dict[str, float]:
        found = {}
        for name, work in works[version].items():
            began_s = time.thread_time()
            for _ in range(20):
                work()
            found[f"{name}, in process: CPU ms"] = (time.thread_time() - began_s) * 1_000 / 20
        return found

    bench.alternate(measure)
    for store in stores:
        store.close()


def first_answer(version: Version, *command: str) -> tuple[float, float]:
    """Return the milliseconds, and those of CPU, from starting the tracker to its first 202."""
    port = free_port()
    flags = ["--api-key", KEY, "--port", str(port), "--db", f"start-{time.monotonic_ns()}.db"]
    environ = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command, *flags],
        cwd=version.folder,
        env=environ,
        stdout=subprocess.DEVNULL,
    )
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps(report(1))
    try:
        while time.perf_counter() - began < 30:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            with contextlib.suppress(OSError):
                connection.request("POST", "/ingest/errors", body, headers)
                assert connection.getresponse().status == 202
                took_ms = (time.perf_counter() - began) * 1_000
                return took_ms, Server(port, process.pid).cpu_s() * 1_000
            time.sleep(0.002)
    finally:
        process.terminate()
        process.wait(20)
    raise TimeoutError("the tracker does not answer")


def compare_start(bench: Bench) -> None:
    """Compare starts, with and without cached byte code."""

    def measure(version: Version) -> dict[str, float]:
        found = {}
        for command in (("miniapm.py",), ("-m", "miniapm")):
            label = f"python {' '.join(command)} until the first 202"
            found[f"{label}: ms"], found[f"{label}: CPU ms"] = first_answer(version, *command)
        return found

    for version in bench.versions:
        first_answer(version, "-m", "miniapm")  # caches the byte code
    bench.alternate(measure)


def cpu_s() -> float:
    """Return the processor time that this process and those that it has waited for have used."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def ratio(
    one: Callable[[], Any],
    other: Callable[[], Any],
    times: int,
    timer: Callable[[], float] = cpu_s,
) -> float:
    """Return what calls of one work cost against another's, each the least of five tries."""
    least = []
    for work in (one, other):
        tries = []
        for _ in range(5):
            began = timer()
            for _ in range(times):
                work()
            tries.append(timer() - began)
        least.append(min(tries))
    return least[0] / least[1]


def import_of(module: str, folder: Path) -> Callable[[], Any]:
    """Return what starts a Python that imports a module, with its byte code cached."""
    environ = os.environ | {"PYTHONPATH": str(folder), "PYTHONPYCACHEPREFIX": str(folder)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", f"import {module}"]
    return lambda: subprocess.run(command, env=environ, cwd=folder, check=True)


def plain_app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer like a small application that does a little work."""
    body = json.dumps({"path": environ["PATH_INFO"], "items": list(range(50))}).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]


def call(app: Callable[..., Any], path: str = "/cart") -> Callable[[], Any]:
    """Return a call of an application in process; an answer other than 200 raises."""
    environ: dict[str, Any] = {"PATH_INFO": path, "REMOTE_ADDR": "127.0.0.1"}
    wsgiref.util.setup_testing_defaults(environ)

    def start_response(status: str, *_: Any) -> None:
        assert status.startswith("200"), status

    def once() -> None:
        list(app(environ | {"wsgi.input": io.BytesIO()}, start_response))

    return once


def serve(app: Callable[..., Any]) -> Callable[[], Any]:
    """Serve an application; return what sends it 400 requests from four clients at once."""
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

    return load


def recording_ratios(tracker: Any, folder: Path) -> dict[str, float]:
    """Compare what recording costs the calling thread with logging to a file.

    The queue is emptied between the measured times, because the background
    thread shares the interpreter. The client is not installed, or it would see the log as well.
    """
    logger = logging.getLogger("bench")
    logger.propagate = False
    logger.handlers = [logging.FileHandler(folder / "bench.log")]
    client = tracker.Client(str(folder / "record.db"), project_root=str(folder))
    found = {}
    for frames, variables in ((10, 3), (10, 50), (100, 3), (100, 50)):
        work = failing(folder, frames, variables)
        record = work(client.record)
        log = work(lambda error: logger.error("it failed", exc_info=error))
        sides = f"{frames} frames of {variables} variables, record_error / logging.exception"
        found[sides] = ratio(record, log, 20, time.thread_time)
        client.flush(30)
    client.close()
    return found


def compare_capture(bench: Bench) -> None:
    """Compare what capture costs its host."""
    modules = {version.name: version.load() for version in bench.versions}
    servers = {name: serve(module.wrap(plain_app)) for name, module in modules.items()}
    plain = serve(plain_app)

    def measure(version: Version) -> dict[str, float]:
        tracker, folder = modules[version.name], version.folder
        imports = import_of("miniapm", folder), import_of("bottle", folder)
        found = {"import miniapm / import bottle": ratio(*imports, 1)}
        found |= recording_ratios(tracker, folder)
        undo = tracker.init(str(folder / "bench.db"))
        in_process = call(tracker.wrap(plain_app)), call(plain_app)
        found["request in process, wrapped / plain"] = ratio(*in_process, 600)
        served = ratio(servers[version.name], plain, 1)
        found["request served by waitress, wrapped / plain"] = served
        undo()
        return found

    bench.alternate(measure)


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


def compare_hosts(bench: Bench) -> None:
    """Compare a program that fails 500 times a second with the same one without capture.

    The tracker is away, hangs and takes the reports, each for a third of the time.
    """
    lasts_s = 30
    script = bench.folder / "host.py"
    script.write_text(HOST)

    def run(version: Version, url: str, pause_s: float, port: int = 0) -> Any:
        command = [sys.executable, str(script), url, str(lasts_s), str(pause_s)]
        environ = os.environ | {"PYTHONPATH": str(version.folder)}
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as program:
            if port:
                time.sleep(lasts_s / 3)
                server = http.server.ThreadingHTTPServer(("127.0.0.1", port), HostTracker)
                HostTracker.hangs = True
                threading.Thread(target=server.serve_forever, daemon=True).start()
                time.sleep(lasts_s / 3)
                HostTracker.hangs = False
            return json.loads(program.communicate()[0])

    def measure(version: Version) -> dict[str, float]:
        found = {}
        for name, pause_s in (("that wait between", 0.02), ("that never wait", 0.0)):
            label = f"host of 20 threads {name}"
            port = free_port()
            HostTracker.taken = HostTracker.dropped = 0
            plain = run(version, "", pause_s)
            captured = run(version, f"http://127.0.0.1:{port}", pause_s, port)
            more = captured["mebibytes"] - plain["mebibytes"]
            found |= {
                f"{label}: done / without capture": captured["units"] / plain["units"],
                f"{label}: MiB more than without": more,
                f"{label}: reports taken or counted as dropped": HostTracker.taken
                + HostTracker.dropped,
                f"{label}: of these dropped": HostTracker.dropped,
            }
        return found

    bench.alternate(measure, 1)


PARTS = {
    "ingest": compare_ingest,
    "outgoing": compare_outgoing,
    "pages": compare_pages,
    "start": compare_start,
    "capture": compare_capture,
    "host": compare_hosts,
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, metavar="FILE", help="another miniapm.py")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--case", default="", metavar="TEXT", help="ingest whose name has this")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block-s", type=int, default=1, help="seconds of a block of load")
    parser.add_argument("--stored", type=int, default=1_000_000, help="reports behind the pages")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    parts = [given.only] if given.only else list(PARTS)
    if {"ingest", "outgoing", "pages"}.intersection(parts) and not shutil.which("wrk"):
        parser.error("wrk is not installed (its package is called wrk): --only start, for instance")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    os.environ["MINI_APM_QUIET"] = "1"
    began = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), given.against, given)
        if {"ingest", "outgoing", "pages"}.intersection(parts):
            write_loads(bench.folder)
        for part in parts:
            PARTS[part](bench)
    bench.print()
    loads = f"{began:.1f} before, {os.getloadavg()[0]:.1f} now"
    print(
        f"load average on {os.cpu_count()} cores: {loads}; rates and times suffer from others' load"
    )
    if given.json:
        given.json.write_text(json.dumps(list(bench.rows()), indent=2) + "\n")


if __name__ == "__main__":
    main()
