"""The shape of the package: which file may import which, where autograd's private names stand, what is exported."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rowgrad

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

# What each part may import, directly. A file takes the line of the longest name that fits; a package may import itself.
# fmt: off
MAY_IMPORT = {
    "errors":           set(),
    "answers":          {"errors"},
    "tape":             {"errors", "answers"},
    "parameters":       {"errors"},
    "rows.memory":      set(),
    "rows.factors":     {"errors", "rows.memory"},
    "rows.explain":     {"errors"},
    "rows.ownership":   {"errors", "tape"},
    "rows.pairs":       {"errors", "rows.factors", "rows.memory"},
    "rows.sliding":     set(),
    "rows.patches":     {"errors", "rows.factors", "rows.memory", "rows.pairs", "rows.sliding"},
    "rows.hadamard":    {"errors", "rows.factors", "rows.memory", "rows.pairs", "rows.patches"},
    "rows.placement":   {"errors", "tape", "rows.factors", "rows.hadamard"},
    "rows.listed":      {"errors", "tape", "rows.ownership"},
    "rows.structure":   {"errors", "tape", "rows.ownership", "rows.listed"},
    "rows.frontier":    {"errors", "tape", "rows.ownership", "rows.placement"},
    "rows":             {"errors", "answers", "tape", "parameters"},
    "rounding":         {"tape"},
    "forward":          {"errors", "tape", "parameters", "repeat", "rounding", "rows"},
    "repeat":           {"errors"},
    "files":            set(),
    "graph":            {"errors", "files", "tape", "parameters"},
    "curvature":        {"errors", "tape", "parameters"},
    "checking":         {"errors", "tape", "parameters", "repeat", "rounding", "graph", "rows"},
    "diagnosis":        {"errors", "files", "tape", "parameters", "repeat", "graph", "rows", "curvature"},
    "optim":            {"errors", "tape", "parameters", "rows", "curvature"},
    "layers":           {"errors", "parameters", "graph"},
    "data":             {"errors"},
    "uses":             {"errors", "files", "graph", "rows", "data"},
    "training":         {"errors", "files", "rows", "data", "curvature", "optim", "layers", "diagnosis", "checking",
                         "uses"},
    "integrations":     {"errors", "rows", "data", "diagnosis", "uses"},
    "report":           {"*"},
    "cli":              {"*"},
    "__main__":         {"cli"},
    "__init__":         {"errors", "tape", "rows", "forward", "graph", "curvature", "checking", "diagnosis", "optim",
                         "uses"},
}
# fmt: on

BUILT_FROM_RULES = {
    f"rows.{name}" for name in ("general", "plan", "block", "reading", "arrivals", "build", "matrix", "objective")
}
APPLICATION = {"cli", "report", "__main__"}  # what a user runs; no part of the library imports it
LIBRARY = {
    "answers",
    "tape",
    "rounding",
    "files",
    "rows",
    "forward",
    "graph",
    "curvature",
    "repeat",
    "checking",
    "diagnosis",
    "layers",
    "optim",
}
NEEDS_TORCH_ALONE = {"__init__", "errors"} | LIBRARY

PRIVATE_TO_AUTOGRAD = re.compile(
    r"_(raw_)?saved_\w*|next_functions|_input_metadata|_sequence_nr|register_prehook|GradientEdge|AccumulateGrad"
    r"|BackwardCFunction|torch::autograd::.*"
)
HOLDS_PRIVATE_NAMES = "tape"


# Reading the source


@dataclass(frozen=True)
class Import:
    """One name imported: `module` is `rowgrad.rows.matrix` or `torch.nn`, in the file `importer`."""

    importer: str
    module: str
    line: int
    in_function: bool
    guarded: bool  # where it is missing is caught: what it needs is optional

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.module}"


def _files() -> dict[str, Path]:
    """Each module by its name below `rowgrad`: `tape`, `rows.matrix`, `rows`; the package itself is `__init__`."""
    found = {}
    for path in sorted((SOURCE / "rowgrad").rglob("*.py")):
        parts = path.relative_to(SOURCE / "rowgrad").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


FILES = _files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def _imports(name: str, tree: ast.Module) -> Iterator[Import]:
    in_functions = _below(tree, lambda node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    guarded = _below(tree, _catches_missing_modules)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, node)
            modules = [f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(name, module, node.lineno, id(node) in in_functions, id(node) in guarded)


def _below(tree: ast.Module, is_meant: Callable[[ast.AST], bool]) -> set[int]:
    return {id(inner) for outer in ast.walk(tree) if is_meant(outer) for inner in ast.walk(outer)}


def _catches_missing_modules(node: ast.AST) -> bool:
    caught = [handler.type for handler in node.handlers] if isinstance(node, ast.Try) else []
    return any(isinstance(c, ast.Name) and c.id in {"ImportError", "ModuleNotFoundError"} for c in caught)


def _absolute(name: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = ["rowgrad", *name.split(".")]
    if FILES[name].name != "__init__.py" or name == "__init__":
        package.pop()
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def _is_module(module: str) -> bool:
    return module.startswith("rowgrad.") and module.removeprefix("rowgrad.") in FILES


def _own(imported: Import) -> str | None:
    """The imported module's name below `rowgrad`, None for a foreign one."""
    if imported.module == "rowgrad":
        return "__init__"
    return imported.module.removeprefix("rowgrad.") if imported.module.startswith("rowgrad.") else None


def _within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def _part(module: str) -> str:
    """The line of the table that is about this module."""
    fitting = [part for part in MAY_IMPORT if _within(module, part)]
    assert fitting, f"{module} has no line in MAY_IMPORT of {Path(__file__).name}: say there what it may import"
    return max(fitting, key=len)


def _is_allowed(importer: str, imported: str) -> bool:
    part = _part(importer)
    targets = MAY_IMPORT[part]
    return "*" in targets or _within(imported, part) or any(_within(imported, target) for target in targets)


IMPORTS = [imported for name, tree in TREES.items() for imported in _imports(name, tree)]


# The arrows


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    part = _part(name)
    wrong = [i for i in IMPORTS if i.importer == name and _own(i) is not None and not _is_allowed(name, _own(i))]
    assert not wrong, f"{part} may import {sorted(MAY_IMPORT[part])}:\n" + "\n".join(map(str, wrong))


def test_rules_know_nothing_of_what_is_built_from_them():
    reached, waiting = set(), ["rows.rules"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += {_own(i) for i in IMPORTS if i.importer == name and _own(i) in FILES} - reached
    assert not reached & BUILT_FROM_RULES


def test_imports_have_no_cycle():
    sources = TopologicalSorter({name: set() for name in FILES})
    for imported in IMPORTS:
        if _own(imported) in FILES:
            sources.add(imported.importer, _own(imported))
    try:
        sources.prepare()
    except CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


def test_only_the_application_imports_the_application():
    wrong = [
        i
        for i in IMPORTS
        if _own(i) is not None and _own(i).split(".")[0] in APPLICATION and i.importer.split(".")[0] not in APPLICATION
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_no_import_inside_a_function_but_of_an_optional_dependency():
    always_there = sys.stdlib_module_names | {"torch", "rowgrad"}
    wrong = [i for i in IMPORTS if i.in_function and not i.guarded and i.module.split(".")[0] in always_there]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_core_names_no_dependency_but_torch():
    allowed = sys.stdlib_module_names | {"torch", "rowgrad"}
    wrong = [
        i for i in IMPORTS if i.importer.split(".")[0] in NEEDS_TORCH_ALONE and i.module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("tape", "errors", True),
        ("tape", "rows.matrix", False),
        ("errors", "tape", False),
        ("rows.factors", "tape", False),
        ("rows.ownership", "rows.frontier", False),
        ("rows.matrix", "rows.general", True),
        ("rows.matrix", "__init__", False),
        ("graph.sweep", "tape", True),
        ("graph.sweep", "rows.matrix", False),
        ("data.files", "rows", False),
        ("uses.audit", "rows.matrix", True),
        ("uses.audit", "cli.main", False),
        ("cli.main", "__init__", True),
        ("cli.main", "report.page", True),
        ("rowsx", "errors", None),
    ],
)
def test_the_table_is_read_as_meant(importer, imported, allowed):
    if allowed is None:
        with pytest.raises(AssertionError, match="no line in MAY_IMPORT"):
            _is_allowed(importer, imported)
    else:
        assert _is_allowed(importer, imported) is allowed


def test_every_kind_of_import_is_seen():
    code = """
import torch.nn as nn, rowgrad.tape
from rowgrad import errors, jacobian
from rowgrad.tape import Tape
from . import factors
from .factors import named
from .. import errors as e
def f():
    from ..tape import Tape
    try:
        import rowgrad.data
    except ModuleNotFoundError:
        pass
"""
    seen = [(i.module, i.in_function, i.guarded) for i in _imports("rows.ownership", ast.parse(code))]
    assert seen == [
        ("torch.nn", False, False),
        ("rowgrad.tape", False, False),
        ("rowgrad.errors", False, False),
        ("rowgrad", False, False),
        ("rowgrad.tape", False, False),
        ("rowgrad.rows.factors", False, False),
        ("rowgrad.rows.factors", False, False),
        ("rowgrad.errors", False, False),
        ("rowgrad.tape", True, False),
        ("rowgrad.data", True, True),
    ]


# Autograd's private names


def _private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Where autograd's private names are used: as attributes, imported names, or strings for getattr."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name.split(".")[-1] for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            names = [node.value]
        else:
            continue
        yield from ((node.lineno, name) for name in names if PRIVATE_TO_AUTOGRAD.fullmatch(name))


def test_only_the_tape_knows_private_names_of_autograd():
    wrong = [
        f"{name}, line {line}: {private}"
        for name, tree in TREES.items()
        if name != HOLDS_PRIVATE_NAMES
        for line, private in _private_names(tree)
    ]
    assert not wrong, "these belong into tape.py:\n" + "\n".join(wrong)


def test_private_names_are_found():
    code = """
'''next_functions in a docstring is prose'''
from torch.autograd.graph import GradientEdge
fn._saved_self
getattr(fn, f"_saved_{name}")
getattr(fn, "_raw_saved_input")
fn.next_functions[0]
fn.name() == "torch::autograd::AccumulateGrad"
"the next_functions of a node"
"""
    assert [name for _, name in sorted(_private_names(ast.parse(code)))] == [
        "GradientEdge",
        "_saved_self",
        "_saved_",
        "_raw_saved_input",
        "next_functions",
        "torch::autograd::AccumulateGrad",
    ]


# What is exported


def test_few_names_are_exported():
    assert len(rowgrad.__all__) <= 32
    assert len(set(rowgrad.__all__)) == len(rowgrad.__all__)


@pytest.mark.parametrize("name", rowgrad.__all__)
def test_an_export_exists_and_is_documented(name):
    exported = getattr(rowgrad, name)
    if inspect.isclass(exported) or inspect.isroutine(exported):
        assert (exported.__doc__ or "").strip(), f"rowgrad.{name} has no docstring"
    assert not inspect.ismodule(exported)


def test_no_export_shares_a_name_with_a_module():
    modules = {part for name in FILES for part in name.split(".")}
    assert not modules & set(rowgrad.__all__)


def test_every_module_can_be_imported_and_is_documented():
    for found in pkgutil.walk_packages(rowgrad.__path__, "rowgrad."):
        assert (importlib.import_module(found.name).__doc__ or "").strip(), f"{found.name} has no docstring"


# Without the extras

IMPORTED_AS = {"scikit-learn": "sklearn", "dp-accounting": "dp_accounting", "pytest-xdist": "xdist"}

WITHOUT_EXTRAS = """
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

BLOCKED = set(sys.argv[1:])
sys.meta_path.insert(0, Blocked())
if "numpy" in BLOCKED:
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)  # PyTorch's own
import torch
import rowgrad

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
losses = model(torch.randn(5, 3)).square().squeeze(1)
expected = [
    torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]).norm()
    for loss in losses
]
torch.testing.assert_close(rowgrad.jacobian(losses, model).norms(), torch.stack(expected))
loaded = BLOCKED & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
"""


def _optional_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = (re.match(r"[\w-]+", line)[0] for extra in project["optional-dependencies"].values() for line in extra)
    return {IMPORTED_AS.get(name, name) for name in names}


@pytest.mark.parametrize("also", [(), ("numpy", "scipy", "pandas")], ids=["extras", "extras and NumPy"])
def test_rows_need_torch_alone(also):
    blocked = sorted(_optional_packages() | set(also))
    assert {"typer", "rich", "sklearn", "polars", "pyarrow", "matplotlib", "jinja2", "optuna"} <= set(blocked)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS, *blocked], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
