"""A plugin of pytest: begins with the slow tests, so that the others fill the gaps they leave."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the slow tests to the front; the order is the same in every worker."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
