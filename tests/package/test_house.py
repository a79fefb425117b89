"""The structure of the package, as tools/house.py counts it: what must not grow, and no room on a circle."""

import runpy
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2] / "tools" / "house.py"
# What only some runs need: drawing figures, and a module that imports torchvision.
OPTIONAL = {"matplotlib", "..models.regularize"}
MODULE = '''
import os

def outer():
    """Two
    lines."""
    import os.path

    async def inner():
        from ..a import b

@triton.jit(do_not_specialize=["n"])
def kernel():
    pass
'''


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


def test_a_function_fits_on_a_screen(house):
    assert not [(lines, place) for lines, place in house["functions"]() if lines > 60]


def test_functions_import_what_is_optional_alone(house):
    found = house["imports_in_functions"]()
    assert not [(name, place) for name, place in found if OPTIONAL.isdisjoint((name, name.split(".")[0]))]


def test_what_is_counted(house, tmp_path, monkeypatch):
    for name, value in {"ROOT": tmp_path, "PACKAGE": "package"}.items():
        monkeypatch.setitem(house["modules"].__globals__, name, value)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(MODULE)
    outer, inner = "package/module.py:outer", "package/module.py:inner"
    assert house["functions"]() == [(5, outer), (2, inner)]
    assert set(house["imports_in_functions"]()) == {("os.path", outer), ("..a", outer), ("..a", inner)}
