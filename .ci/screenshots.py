"""Makes the README's screenshots: python .ci/screenshots.py

Needs bottle, waitress, playwright and chromium. Runs a tracker with a database of its own on
loopback, reports errors of an invented shop, and writes three PNG files into .github/.
"""

from __future__ import annotations

import datetime
import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
KEY = "screenshots"
# Class, message, location, days since the first report and number of reports, between bars
ERRORS = """\
PaymentError|Card was declined by the bank: insufficient_funds|shop/payment.py:88|9|412
KeyError|'iban'|shop/account.py:12|5|64
TypeError|Cannot read properties of undefined (reading 'price')|web/src/cart.ts:57|0.2|31
ActiveRecord::RecordNotFound|Couldn't find Order with 'id'=4711|app/models/order.rb:42|21|958
TimeoutError|warehouse.example did not answer within 5 s|shop/stock.py:131|0.6|17
java.lang.IllegalStateException|Invoice 2026-118 has no customer|Invoice.java:204|3|120
IntegrityError|UNIQUE constraint failed: customers.email|shop/customers.py:77|14|233
panic|runtime error: index out of range [3] with length 3|rates/rates.go:33|1.5|9
ZeroDivisionError|division by zero|shop/reports.py:19|0.05|2
ErrorException|Undefined array key "vat"|src/Tax.php:61|6|75
UnicodeDecodeError|'utf-8' codec can't decode byte 0xe4 in position 7|shop/imports.py:54|8|41
System.NullReferenceException|Object reference not set to an instance|Cart.cs:22|12|138
ConnectionRefusedError|[Errno 111] Connection refused: mail.example:25|shop/mail.py:23|2|26
"""
SOURCE = '''\
def iban_of(customer):
    """Return the account that a refund goes to."""
    account = customer["account"]
    if account is None:
        raise RefundError(customer)
    return account["iban"]


def refund(order, customer):'''.splitlines()


def reports(now_s: float) -> list[dict[str, Any]]:
    """Return the reports of every error, more of them lately."""
    found = []
    for said in ERRORS.splitlines():
        exception_class, message, place, *numbers = said.split("|")
        (days, count), (file, _, line) = map(float, numbers), place.partition(":")
        frame = {"file": file, "lineno": int(line), "function": "charge", "own": True}
        for _ in range(int(count)):
            age_s = random.random() ** 2 * days * 86_400
            time_of = datetime.datetime.fromtimestamp(now_s - age_s, datetime.UTC)
            found.append(
                {
                    "exception_class": exception_class,
                    "message": message,
                    "backtrace": [],
                    "fingerprint": exception_class,
                    "exceptions": [
                        {"exception_class": exception_class, "message": message, "frames": [frame]}
                    ],
                    "timestamp": time_of.isoformat(),
                    "user_id": str(random.randrange(1 + int(count) // 3)),
                    "environment": random.choice(["production"] * 4 + ["staging"]),
                    "release": "2.3.0" if age_s < days * 20_000 else "2.2.1",
                    "tags": {"region": random.choice(["eu", "eu", "us"])},
                }
            )
    found.sort(key=lambda one: one["timestamp"])
    return found


def refund(now_s: float) -> dict[str, Any]:
    """Return a report of KeyError with source, variables, a cause, a request and breadcrumbs."""
    source = {"pre_context": SOURCE[:5], "context_line": SOURCE[5], "post_context": SOURCE[6:]}
    own: dict[str, Any] = {"file": "/srv/shop/shop/account.py", "function": "iban_of", "own": True}
    calls = [
        {"file": "/srv/shop/shop/orders.py", "lineno": 40, "function": "refund", "own": True},
        {"file": "flask/app.py", "lineno": 880, "function": "dispatch_request", "own": False},
        {"file": "flask/app.py", "lineno": 917, "function": "full_dispatch_request", "own": False},
    ]
    variables = {"customer": {"id": 7, "name": "Ann"}, "account": {"bank": "GENODEF1"}}
    frames = [own | source | {"lineno": 12, "locals": variables}, *calls]
    time_of = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    return {
        "exception_class": "KeyError",
        "message": "'iban'",
        "backtrace": [],
        "fingerprint": "KeyError",
        "exceptions": [{"exception_class": "KeyError", "message": "'iban'", "frames": frames}],
        "environment": "production",
        "release": "2.3.0",
        "user_id": "7",
        "tags": {"region": "eu"},
        "request": {
            "method": "POST",
            "url": "https://shop.example/orders/4711/refund",
            "headers": {"Accept": "text/html", "Referer": "https://shop.example/orders/4711"},
            "data": {"reason": "arrived broken"},
        },
        "breadcrumbs": [
            {"timestamp": time_of.isoformat(), "category": "query", "message": text}
            for text in ("SELECT … FROM orders WHERE id = 4711", "SELECT … FROM customers")
        ],
    }


def take(url: str, error: str) -> None:
    """Take screenshots of the list and of one error's page, from the tracker at `url`."""
    views = [
        ("list-light", "/errors", "light", 1280, 860),
        ("error-dark", error, "dark", 1280, 860),
        ("error-phone", error, "light", 390, 844),
    ]
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, page_path, scheme, width, height in views:
            size = {"width": width, "height": height}
            context = browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB")
            page = context.new_page()
            page.goto(url + page_path)
            page.wait_for_load_state("networkidle")
            page.screenshot(path=ROOT / ".github" / f"{name}.png")
        browser.close()


def main() -> None:
    """Report the errors, resolve one, report it again, and take the screenshots."""
    random.seed(1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--port", str(port), "--db", f"{folder}/shots.db", "--api-key", KEY]
        tracker = subprocess.Popen([sys.executable, str(ROOT / "miniapm.py"), *flags])

        def post(path: str, body: str, kind: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
            connection.request("POST", path, body, headers)
            return connection.getresponse().status

        try:
            while True:
                try:
                    batch = {"errors": reports(time.time() - 60)}
                    post("/ingest/errors/batch", json.dumps(batch), "application/json")
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            names = list(dict.fromkeys(one["fingerprint"] for one in batch["errors"]))
            page = f"/errors/{names.index('KeyError') + 1}"
            post(page, "action=resolve", "application/x-www-form-urlencoded")
            post("/ingest/errors", json.dumps(refund(time.time())), "application/json")
            take(f"http://127.0.0.1:{port}", page)
        finally:
            tracker.terminate()
            tracker.wait(20)


if __name__ == "__main__":
    main()
