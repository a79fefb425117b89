"""The structure of the package, as tools/house.py counts it: what must not grow, and no room on a circle."""

import runpy
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2] / "tools" / "house.py"


@pytest.fixture(scope="module")
def house():
    return runpy.run_path(str(HOUSE))


def test_no_import_runs_in_a_circle(house):
    arrows = house["imports"]()
    assert not [room for room in arrows if room in house["reached"](arrows, room)]
    assert len(arrows) <= 16
    assert sum(map(len, arrows.values())) <= 42


def test_a_circle_is_seen(house):
    assert house["reached"]({"a": {"b"}, "b": {"c"}, "c": {"b"}}, "b") == {"b", "c"}
    assert "a" not in house["reached"]({"a": {"b"}, "b": {"c"}, "c": {"b"}}, "a")
