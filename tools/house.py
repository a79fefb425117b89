"""Prints the structure of the package: `python tools/house.py`.

A room is a module or folder right under gradaug_kernels/, an arrow an import from one room of another (those inside
functions too), a floor the longest way down from a room to one that imports none. tests/package/test_house.py holds
what must not grow.
"""

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "gradaug_kernels"
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python tools/house.py", description=__doc__.split("\n")[0]).parse_args(arguments)
    arrows = imports()
    rooms = sorted(arrows)
    floors = floors_of(arrows)
    for floor in sorted(set(floors.values()), reverse=True):
        for room in (room for room in rooms if floors[room] == floor):
            print(f"{floor:2}  {room:14} -> {', '.join(sorted(arrows[room])) or '-'}")
    circles = [room for room in rooms if room in reached(arrows, room)]
    counts = {
        "rooms": len(rooms),
        "floors": len(set(floors.values())),
        "arrows": sum(map(len, arrows.values())),
        "rooms in circles": ", ".join(circles) or 0,
        "files flat in csrc/cpu": len([path for path in (ROOT / "csrc/cpu").iterdir() if path.is_file()]),
        "longest function": "{} lines, {}".format(*max(functions())),
        "private names imported across modules": len(private_imports()),
        "words before the README's first figure": words_before_first_figure(),
    }
    print()
    for name, count in counts.items():
        print(f"{name:40} {count}")
    return 1 if circles else 0


def imports() -> dict[str, set[str]]:
    """room -> the rooms it imports. The package's own __init__ is the front door, not a room."""
    sys.path.insert(0, str(ROOT))  # of this clone, installed or not
    graph = grimp.build_graph(PACKAGE, include_external_packages=False, cache_dir=None)
    arrows: dict[str, set[str]] = {}
    for module in graph.modules - {PACKAGE}:
        room = module.split(".")[1]
        found = {other.split(".")[1] for other in graph.find_modules_directly_imported_by(module) if other != PACKAGE}
        arrows.setdefault(room, set()).update(found - {room})
    return {room: found & arrows.keys() for room, found in arrows.items()}


def floors_of(arrows: dict[str, set[str]]) -> dict[str, int]:
    floors: dict[str, int] = {}

    def floor(room, above=()):
        if room not in floors:
            below = [floor(other, (*above, room)) for other in arrows[room] if other not in (*above, room)]
            floors[room] = 1 + max(below, default=-1)
        return floors[room]

    return {room: floor(room) for room in arrows}


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    """The rooms that `start` leads to, itself only on a circle."""
    found, stack = set(), [start]
    while stack:
        for room in arrows[stack.pop()] - found:
            found.add(room)
            stack.append(room)
    return found


def functions() -> list[tuple[int, str]]:
    """(lines, place) of every function of the package, its docstring not counted. Triton's kernels are left out."""
    found = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTION) and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                found.append((lines, f"{path}:{node.name}"))
    return found


def imports_in_functions() -> list[tuple[str, str]]:
    """(module, place) of every import that runs when a function is called, those of this package with their dots."""
    found = []
    for path, tree in modules():
        for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTION)):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    found.append(("." * node.level + (node.module or ""), f"{path}:{function.name}"))
                elif isinstance(node, ast.Import):
                    found += [(alias.name, f"{path}:{function.name}") for alias in node.names]
    return found


def private_imports() -> list[str]:
    """`from module import _name` of a module of the package."""
    found = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE)):
                names = [alias.name for alias in node.names if alias.name.startswith("_") and node.module]
                found += [f"{path}: {name}" for name in names]
    return found


def modules() -> list[tuple[Path, ast.Module]]:
    """The package's files, with their syntax trees."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [(path.relative_to(ROOT), ast.parse(path.read_text())) for path in paths]


def words_before_first_figure() -> int:
    words = (ROOT / "README.md").read_text().split()
    return next(i for i, word in enumerate(words) if re.fullmatch(r"\**\d+\.\d+x\**", word))


if __name__ == "__main__":
    raise SystemExit(main())
