"""The house: imports go down floors, files and functions stay short, optional packages optional."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jdfunc"
FILES = sorted(ROOT.rglob("*.py"))

#: A file imports from lower floors, or from its own folder. A new file takes its place here.
FLOORS = {
    **dict.fromkeys(["types", "pytrees", "random"], 0),
    **dict.fromkeys(["checks", "checkpoint", "functional", "remat", "factored", "solvers"], 1),
    **dict.fromkeys(["taps", "examples", "algebra"], 2),
    **dict.fromkeys(["independence", "weightings", "aggregators", "scalarizations"], 3),
    **dict.fromkeys(["linearizations", "scalarized"], 4),
    **dict.fromkeys(["plan", "rules", "curvature"], 5),
    **dict.fromkeys(["step", "mtl"], 6),
    "": 7,  # jdfunc/__init__.py
}
THIRD_PARTY = {"torch", "optree", "jaxtyping"}
#: Optional packages, imported inside functions.
OPTIONAL = {
    "solvers.qp": {"numpy", "scipy", "qpsolvers", "quadprog"},
    "curvature.operate.linear_operator": {"numpy", "scipy"},
}
MAX_FILE, MAX_FUNCTION = 300, 50
files = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def module_of(path: Path) -> str:
    """Dotted name below the package: "" for its __init__, "taps.tap"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, wherever the statement stands; `from a import b` as "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, by dotted name below it."""
    found = set()
    for name in imports(ast.parse(path.read_text())):
        first, _, rest = name.partition(".")
        if first == "jdfunc":
            while rest and rest not in MODULES:  # a name inside a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


GRAPH = {name: own_imports(path) for name, path in MODULES.items()}


def folder(module: str) -> str:
    return module.partition(".")[0]


def reached(module: str) -> set[str]:
    """Every module that is imported on behalf of one, itself left out."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        new = GRAPH[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen - {module}


def test_the_walk_finds_imports() -> None:
    """The rest of this file would also pass on a walk that finds nothing."""
    assert {"pytrees", "linearizations.structured", "weightings.cone"} <= GRAPH["step"]
    assert "taps.tap" in reached("")
    nested = "def f():\n    import numpy.linalg\n    from jdfunc.taps import tap"
    assert list(imports(ast.parse(nested))) == ["numpy.linalg", "jdfunc.taps.tap"]


def test_every_file_has_a_floor_and_every_floor_a_file() -> None:
    missing = {folder(name) for name in MODULES} - set(FLOORS)
    assert not missing, f"give these a floor: {missing}"
    assert set(FLOORS) - {folder(name) for name in MODULES} <= {"plan"}


@files
def test_imports_go_down(path: Path) -> None:
    name = module_of(path)
    for other in GRAPH[name]:
        same = folder(other) == folder(name)
        assert same or FLOORS[folder(other)] < FLOORS[folder(name)], f"{name} imports {other}"


def test_no_cycles() -> None:
    below = {name: {o for o in others if o != name} for name, others in GRAPH.items()}
    list(graphlib.TopologicalSorter(below).static_order())  # raises CycleError


def test_the_two_halves_never_meet() -> None:
    """What makes a Gramian and what weighs it know nothing of each other; `step` joins them."""
    weighing = {"weightings", "solvers"}
    making = {"taps", "factored", "linearizations", "independence", "examples", "algebra", "checks"}
    for half, other in ((weighing, making), (making, weighing)):
        for name in MODULES:
            if folder(name) in half:
                seen = {folder(o) for o in reached(name)} & other
                assert not seen, f"{name} reaches {seen}"


@files
def test_third_party(path: Path) -> None:
    """No optree outside pytrees.py; no numpy, scipy or solver package but where one is named."""
    name = module_of(path)
    allowed = {"jdfunc", *THIRD_PARTY, *sys.stdlib_module_names}
    if name != "pytrees":
        allowed.discard("optree")
    allowed |= OPTIONAL.get(name, set())
    found = {n.partition(".")[0] for n in imports(ast.parse(path.read_text()))}
    assert found <= allowed, found - allowed


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_packages_are_imported_late(name: str) -> None:
    """`import jdfunc` needs none of them: they are imported inside functions."""
    tree = ast.parse(MODULES[name].read_text())
    top = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    assert not {found.partition(".")[0] for found in imports(top)} & OPTIONAL[name]


@files
def test_no_hooks(path: Path) -> None:
    """Results do not leave backward through hooks."""
    tree = ast.parse(path.read_text())
    named = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    named |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    bad = {n for n in named if n.startswith("register_") and n.endswith("hook")}
    bad |= {n for n in imports(tree) if n.startswith("torch.") and "hooks" in n}
    assert not bad, bad


@files
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE


def code_lines(source: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body with code on them: no signature, docstring, comment or empty line."""
    body = function.body[ast.get_docstring(function, clean=False) is not None :]
    if not body:
        return 0
    lines = source.splitlines()[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@files
def test_functions_are_short(path: Path) -> None:
    source = path.read_text()
    long = {
        node.name: length
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := code_lines(source, node)) > MAX_FUNCTION
    }
    assert not long, long
