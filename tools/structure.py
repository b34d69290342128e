"""The package's floor plan in numbers: python tools/structure.py [--root FOLDER] [--check].

It reads the files, imports nothing, and works on any commit: git worktree add /tmp/old COMMIT, then --root /tmp/old.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "lisatune"
MOST_TOP_FILES = 12
MOST_BODY_LINES = 60
MOST_SETTINGS_LINES = 200

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file, of the whole package."""
    source = root / "src"
    paths = sorted((source / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(files: Mapping[str, Path]) -> Graph:
    """Which file imports which, inside functions too; what stands under ``TYPE_CHECKING`` is never run."""
    graph: Graph = {}
    for module, path in files.items():
        found = set(_imported(ast.parse(path.read_text(encoding="utf-8")), set(files)))
        graph[module] = found - {module}
    return graph


def _imported(node: ast.AST, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in known else node.module
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, known)


def room(module: str) -> str:
    """The file or folder at the package's top that ``module`` is in."""
    return [*module.split("."), "__init__"][1]


def rooms(graph: Graph) -> Graph:
    """Which room imports which."""
    found: Graph = {room(module): set() for module in graph}
    for module, imported in graph.items():
        found[room(module)] |= {room(other) for other in imported} - {room(module)}
    return found


def circles(graph: Graph) -> list[set[str]]:
    """Sets of two or more that import one another, directly or through others."""
    reach = {name: _reachable(graph, name) for name in graph}
    found = []
    for name in graph:
        circle = {other for other in reach[name] if name in reach[other]} | {name}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for other in graph.get(left.pop(), set()) - seen:
            seen.add(other)
            left.append(other)
    return seen


def floors(graph: Graph) -> int:
    """Length of the longest chain of imports; a circle counts as one floor."""
    reach = {name: _reachable(graph, name) for name in graph}
    height: dict[str, int] = {}
    for name in sorted(graph, key=lambda name: len(reach[name])):
        below = [other for other in graph[name] if name not in reach[other]]
        height[name] = 1 + max((height.get(other, 1) for other in below), default=0)
    return max(height.values())


def functions(files: Mapping[str, Path]) -> list[tuple[int, str]]:
    """Lines of the body, without its docstring, and name of each function; the longest first."""
    found = []
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                found.append((lines, f"{module}.{node.name}"))
    return sorted(found, reverse=True)


def class_named(files: Mapping[str, Path], name: str) -> ast.ClassDef | None:
    """The first class of that name in the package."""
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
    return None


def fields(node: ast.ClassDef | None) -> set[str]:
    """Names that a class declares with a type."""
    body = [] if node is None else node.body
    return {line.target.id for line in body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)}


def branches_of_step(learner: ast.ClassDef | None) -> int:
    """How often ``Learner.step`` chooses between two ways."""
    body = [] if learner is None else learner.body
    steps = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "step"]
    return sum(isinstance(node, ast.If | ast.IfExp) for step in steps for node in ast.walk(step))


def settings_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """The files that hold settings: the folder, or the one file that there was before it."""
    return {name: path for name, path in files.items() if room(name) == "settings" or name == f"{PACKAGE}.config"}


def readers_of_settings(files: Mapping[str, Path]) -> set[str]:
    """Files outside of the settings that read ``config.x`` for a setting x."""
    settings = settings_files(files)
    names: set[str] = set()
    for path in settings.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names |= fields(node)
    pattern = re.compile(rf"\bconfig\.({'|'.join(sorted(names))})\b")
    return {name for name, path in files.items() if name not in settings and pattern.search(path.read_text("utf-8"))}


def numbers(root: Path) -> dict[str, int | str]:
    """All numbers, by what they count."""
    files = modules(root)
    graph = imports(files)
    by_room = rooms(graph)
    in_circles = sum(len(by_room[name] & circle) for circle in circles(by_room) for name in circle)
    longest = functions(files)
    learner = class_named(files, "Learner")
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    benchmarks = int((root / "benchmarks").is_dir())
    return {
        "files at the top of the package": len(list((root / "src" / PACKAGE).glob("*.py"))),
        "rooms (files and folders at the top, with benchmarks/)": len(by_room) + benchmarks,
        "arrows between rooms": sum(map(len, by_room.values())),
        "arrows inside circles of rooms": in_circles,
        "circles of rooms": len(circles(by_room)),
        "circles of files": len(circles(graph)),
        "floors of imports": floors(by_room),
        "longest function body": f"{longest[0][0]} ({longest[0][1]})",
        f"function bodies over {MOST_BODY_LINES} lines": sum(length > MOST_BODY_LINES for length, _ in longest),
        "body of the loop": next((n for n, name in longest if re.fullmatch(r"lisatune\.train\._?loop", name)), 0),
        "fields of Learner": len(fields(learner)),
        "branches in Learner.step": branches_of_step(learner),
        "files outside settings that read config.x": len(readers_of_settings(files)),
        "largest file of settings": max(lengths[name] for name in settings_files(files)),
        "functions": len(longest),
        "files": len(files),
        "lines": sum(lengths.values()),
    }


def faults(root: Path) -> list[str]:
    """What the floor plan forbids, in words; empty if all is well."""
    files = modules(root)
    graph = imports(files)
    top = len(list((root / "src" / PACKAGE).glob("*.py")))
    found = [f"{top} files at the top of the package, at most {MOST_TOP_FILES}"] if top > MOST_TOP_FILES else []
    found += [f"files import one another: {', '.join(sorted(circle))}" for circle in circles(graph)]
    found += [f"rooms import one another: {', '.join(sorted(circle))}" for circle in circles(rooms(graph))]
    long = [(lines, name) for lines, name in functions(files) if lines > MOST_BODY_LINES]
    found += [f"{name} has a body of {lines} lines, at most {MOST_BODY_LINES}" for lines, name in long]
    for name, path in settings_files(files).items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_SETTINGS_LINES:
            found.append(f"{name} has {lines} lines, at most {MOST_SETTINGS_LINES}")
    return found


def main() -> None:
    """Print the numbers; with ``--check`` the faults, and fail if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="Folder of the repository.")
    parser.add_argument("--check", action="store_true", help="Report what the floor plan forbids.")
    options = parser.parse_args()
    if options.check:
        found = faults(options.root)
        print("\n".join(found) or "the floor plan holds")
        sys.exit(1 if found else 0)
    for name, value in numbers(options.root).items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")


if __name__ == "__main__":
    main()
