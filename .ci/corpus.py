"""Fills a database with errors of the kinds that programs send, to look at the pages.

    python .ci/corpus.py FILE

FILE must not exist yet. Show it with `python miniapm.py --db FILE`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECTS = ("default", "shop-web", "billing worker", "an-app-with-quite-a-long-name-2026")
HOUR_MS = 3_600_000
HOSTILE = "</td><script>window.hacked = 1</script><img src=x onerror=window.hacked=1>\"'{{7*7}}"


def frame(number: int, depth: int) -> dict[str, Any]:
    """Return a frame with source and variables; every fourth is a library frame."""
    return {
        "file": f"/srv/shop/orders/step_{number}.py",
        "lineno": 40 + number,
        "function": f"Order.step_{number}",
        "own": number % 4 != 3,
        "pre_context": [f"    def step_{number}(self, cart):", '        """Take the next step."""'],
        "context_line": f"        return self.step_{number + 1}(cart, depth={depth})",
        "post_context": ["", f"    def other_{number}(self):", "        return None"],
        "locals": {
            "self": "<Order id=7 total=19.90 items=[<Item 'tea'>, <Item 'cup'>]>",
            "cart": "{'id': 7, 'items': ['tea', 'cup'], 'paid': False}",
            "depth": depth,
            "note": "word " * 30,
        },
    }


def deep_report() -> dict[str, Any]:
    """Return a report of a chain of three exceptions, 50 frames with source and variables."""
    sizes = (30, 12, 8)
    return {
        "exception_class": "shop.errors.OrderFailed",
        "message": "order 7 could not be completed",
        "backtrace": [],
        "fingerprint": "deep",
        "exceptions": [
            {
                "exception_class": f"shop.errors.{name}",
                "message": f"{name} at step {size}",
                "frames": [frame(number, size - number) for number in range(size)],
                **({"relation": relation} if relation else {}),
            }
            for name, size, relation in zip(
                ("OrderFailed", "PaymentRefused", "ConnectionLost"),
                sizes,
                ("", "caused_by", "while_handling"),
                strict=True,
            )
        ],
        "request": {
            "url": "https://shop.example/orders/7/pay?step=2&token=hunter2hunter2",
            "method": "POST",
            "headers": {"Content-Type": "application/json", "Accept-Language": "en"},
            "data": {"card": "visa", "password": "hunter2", "amount": 1990},
        },
        "breadcrumbs": [
            {"category": "cart", "message": f"added item {number}", "level": "info"}
            for number in range(20)
        ],
        "tags": {"region": "eu-west-1", "customer": "premium"},
        "params": {"order": {"id": 7, "items": [{"sku": "tea", "count": 2}]}},
    }


def odd_reports() -> dict[str, dict[str, Any]]:
    """Return reports that are hard to show, by name."""
    long = "".join(f"Level{number}" for number in range(80))
    tall = "\n".join(f"line {number}: the value {number * 7} is wrong" for number in range(60))
    texts = {
        "long class": (f"Com.Example.{long}Error", "short"),
        "long message": ("RuntimeError", "word " * 1_800),
        "long word": ("RuntimeError", "x" * 3_000),
        "long lines": ("RuntimeError", "y" * 400),
        "multi-line": ("PG::SyntaxError", f'ERROR: syntax error at or near "FROM"\n{tall}'),
        "blank lines": ("TemplateError", "\n\n  indented\n\n\tby a tab\n\n"),
        "hostile": (f"Error{HOSTILE}", HOSTILE),
        "right to left": ("خطأ_قاعدة_البيانات", "تعذر الاتصال بالخادم db-1:5432 بعد 30 ثانية"),
        "mixed direction": ("ValueError", "אי אפשר לקרוא /srv/shop/app.py:7 (שורה 7)"),
        "override": ("ValueError", "\u202egnp.exe\u202c and \u2066isolated\u2069"),
        "emoji": ("🚨🔥Error", "👩‍👩‍👧‍👦 could not pay 💶 1 990 — 🇪🇺 🏳️‍🌈 " * 4),
        "combining": ("Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́O̵̹̻̝̳", "é́́́ ñ̃̃ 한글 ﷽"),
        "cjk": ("例外エラー", "注文を完了できませんでした。" * 20),
        "empty": ("E", ""),
        "million": ("Timeout", "no answer within 30 s"),
        "ten million": ("ActiveRecord::ConnectionTimeoutError", "could not obtain a connection"),
        "nine days ago": ("OldError", "last seen nine days ago"),
        "sixty days ago": ("OlderError", "last seen sixty days ago"),
        "resolved": ("FixedError", "this one was resolved"),
        "ignored": ("NoisyError", "this one is ignored"),
        "regressed": ("BackError", "this one came back"),
    }
    found = {
        name: {
            "exception_class": exception_class,
            "message": message,
            "backtrace": [f"app/{name.replace(' ', '_')}.rb:{7 + len(name)}:in `call'"],
            "fingerprint": name,
        }
        for name, (exception_class, message) in texts.items()
    }
    path = "/".join("folder" * 3 for _ in range(20))
    found["long lines"]["backtrace"] = [f"/srv/{path}/{'z' * 200}.rb:1:in `{'m' * 300}'"] * 3
    found["long lines"]["params"] = {"k" * 150: "v" * 900, "nested": {"a": [[1, {"b": "w" * 300}]]}}
    found["hostile"] |= {
        "backtrace": [f"{HOSTILE}.rb:1:in `{HOSTILE}'", HOSTILE, "javascript:alert(1)"],
        "params": {HOSTILE: HOSTILE},
        "tags": {HOSTILE: HOSTILE},
        "user_id": HOSTILE,
        "environment": HOSTILE,
    }
    found["deep"] = deep_report()
    return found


def known_occurrences(tracker: Any, now_ms: int) -> dict[str, Any]:
    """Return an occurrence of each of some traces and of some SDKs' events, by name."""
    traces = json.loads((HERE / "traces.json").read_text(encoding="utf-8"))
    events = json.loads((HERE / "events.json").read_text(encoding="utf-8"))
    rich = [one for one in events if "request" in one["event"] or "breadcrumbs" in one["event"]]
    rest = [one for one in events if one not in rich]
    found = {}
    for one in traces[:: max(1, len(traces) // 20)]:
        said = {
            "exception_class": f"{one['language'].title()}Error",
            "message": one["name"],
            "backtrace": one["backtrace"],
            "fingerprint": f"trace {one['language']} {one['name']}",
        }
        found[said["fingerprint"]] = tracker.parse_occurrence(said, now_ms)
    for one in rich[:12] + rest[:: max(1, len(rest) // 14)]:
        event = one["event"] | {"event_id": None, "fingerprint": [f"event {one['name']}"]}
        event.pop("timestamp", None)
        found[f"event {one['name']}"] = tracker.occurrence_from_sentry(event, now_ms)
    return found


def fill(tracker: Any, store: Any) -> dict[str, int]:
    """Record some 70 errors in four projects; return the ids of all by name.

    The names are those of odd_reports(), `trace …` and `event …`.
    """
    chance, now_ms = random.Random(1), store.now_ms()
    store.ensure_default_project()
    for name in PROJECTS[1:]:
        store.create_key(name)
    numbers = {project.name: project.id for project in store.projects()}
    odd = {name: tracker.parse_occurrence(said, now_ms) for name, said in odd_reports().items()}
    ids = {}
    for position, (name, first) in enumerate((odd | known_occurrences(tracker, now_ms)).items()):
        project = numbers[PROJECTS[position % 4 if position % 3 else 0]]
        age = {"nine days ago": 9 * 24, "sixty days ago": 60 * 24}.get(name, 0)
        hours = [age + chance.choice((0, 0, 1, 5, 20, 47)) for _ in range(1 + position % 9)]
        for hour in sorted(hours, reverse=True):
            facets = {
                "level": chance.choice(("error", "error", "warning", "fatal", "info")),
                "environment": chance.choice(("production", "production", "staging")),
                "release": f"shop@1.{chance.randrange(4)}.0",
            }
            changes = {
                "occurred_ms": now_ms - hour * HOUR_MS - chance.randrange(HOUR_MS // 2),
                "user_id": first.user_id or str(chance.randrange(500)),
                "extra": facets | first.extra,
                "sent": None,
            }
            store.record(project, [dataclasses.replace(first, **changes)])
        with store.reading() as db:
            found = db.execute(
                "SELECT id FROM errors WHERE grouping_key = ?", (first.grouping_key,)
            )
            ids[name] = found.fetchone()[0]
        if name in ("resolved", "regressed", "ignored"):
            store.set_status([ids[name]], "ignored" if name == "ignored" else "resolved")
        if name == "regressed":
            store.record(project, [first])
    if hasattr(store, "record_deploy"):  # versions to compare with may not have it
        _deploy(tracker, store, [numbers[name] for name in PROJECTS[:2]])
    for name, count in (("ten million", 10_000_000), ("million", 1_234_567), ("deep", 98_765)):
        _set_count(store, ids[name], count)
    return ids


def _deploy(tracker: Any, store: Any, project_ids: list[int]) -> None:
    """Record three deploys of each project in the last hours, one of them odd."""
    odd = ("<b>x</b> " + "e" * 250, "\u202e" + "d" * 300)
    for project_id in project_ids:
        for hour, (environment, deployer) in enumerate([("live", "ann"), ("staging", ""), odd]):
            said = {"version": f"1.{hour}.0", "environment": environment, "deployer": deployer}
            said["timestamp"] = tracker.iso_time(store.now_ms() - hour * HOUR_MS)
            store.record_deploy(project_id, tracker.parse_deploy(said, store.now_ms()))


def _set_count(store: Any, error_id: int, count: int) -> None:
    """Pretend that an error occurred `count` times, mostly in its newest hour."""
    values = {"id": error_id, "count": count}

    def work(db: Any) -> None:
        db.execute(
            """UPDATE buckets SET count = count + :count -
                (SELECT occurrence_count FROM errors WHERE id = :id) WHERE error_id = :id
                AND hour = (SELECT MAX(hour) FROM buckets WHERE error_id = :id)""",
            values,
        )
        db.execute("UPDATE errors SET occurrence_count = :count WHERE id = :id", values)

    store.write(work)


def main() -> None:
    """Fill the database that the command line names."""
    sys.path.insert(0, str(HERE.parent))
    import miniapm

    store = miniapm.Store(sys.argv[1])
    print(f"{len(fill(miniapm, store))} errors are in {sys.argv[1]}")
    store.close()


if __name__ == "__main__":
    main()
