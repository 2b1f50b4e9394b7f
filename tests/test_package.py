"""Rules of the house: what is public is documented, imports run downward, files stay short."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pertvae

SOURCE = Path(pertvae.__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(SOURCE.rglob("*.py"))

FLOORS = {
    "_constants": 1,
    "_labels": 1,
    "_expression": 1,
    "_storage": 1,
    "_predictions": 1,
    "_criteria": 1,
    "nn": 2,
    "metrics": 2,
    "datasets": 2,
    "pl": 2,
    "data": 3,
    "pp": 3,
    "reference": 3,
    "models": 4,
    "benchmark": 5,
    "_cli": 6,
    "cli": 6,
}
MAX_LINES = 400
MAX_MODEL_LINES = 200
MAX_POSITIONAL = 3


# ---------------------------------------------------------------------------------------------- public callables


def public_modules() -> list[ModuleType]:
    return [m for m in (getattr(pertvae, n, None) for n in pertvae.__all__) if isinstance(m, ModuleType)]


def public_objects() -> dict[str, Any]:
    """Functions and classes that `pertvae` shows, by their public name."""
    found = {n: getattr(pertvae, n, None) for n in pertvae.__all__}
    for module in public_modules():
        short = module.__name__.removeprefix("pertvae.")
        found |= {f"{short}.{n}": getattr(module, n, None) for n in getattr(module, "__all__", [])}
    return {n: o for n, o in found.items() if callable(o)}


def own_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods of a class that this package defines, inherited ones too; not those of scvi-tools."""
    for name in dir(cls):
        if name.startswith("_"):
            continue
        raw = inspect.getattr_static(cls, name)
        function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if inspect.isfunction(inspect.unwrap(function)) and _is_ours(function):
            yield name, function


def _is_ours(function: Any) -> bool:
    return str(getattr(inspect.unwrap(function), "__module__", "")).startswith("pertvae")


def public_callables() -> dict[str, Callable[..., Any]]:
    """Every function, every class (its constructor) and every own method of a class."""
    found: dict[str, Callable[..., Any]] = {}
    for name, item in public_objects().items():
        found[name] = item
        if inspect.isclass(item):
            found |= {f"{name}.{m}": f for m, f in own_methods(item)}
    return found


CALLABLES = public_callables()


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    if inspect.isclass(function) and function.__init__ is object.__init__ and function.__new__ is object.__new__:
        return []
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:  # exceptions and other built-in constructors
        return []
    return [p for p in found if p.name not in ("self", "cls", "model_cls")]


def documented(doc: str, section: str) -> list[str]:
    """Names in a numpydoc section; a line such as ``a, b`` or ``**kwargs`` documents each name."""
    match = re.search(rf"^{section}\n-+\n(.*?)(?=^\w[^\n]*\n-{{3,}}\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    if not match:
        return []
    heads = [line for line in match.group(1).splitlines() if line and not line[0].isspace()]
    return [name.strip().lstrip("*") for head in heads for name in head.split(" : ")[0].split(",")]


def doc_of(name: str) -> str:
    function = CALLABLES[name]
    doc = inspect.getdoc(function) or ""
    if inspect.isclass(function) and "__init__" in vars(function):
        doc += "\n\n" + inspect.cleandoc(function.__init__.__doc__ or "")
    return doc


@pytest.mark.parametrize("name", pertvae.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(pertvae, name) is not None
    assert name in dir(pertvae)


@pytest.mark.parametrize("module", public_modules(), ids=lambda m: m.__name__)
def test_public_modules_declare_what_they_show(module: ModuleType) -> None:
    assert getattr(module, "__all__", None), f"{module.__name__} has no __all__"
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
    assert inspect.getdoc(module), f"{module.__name__} has no docstring"


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_callable_is_documented(name: str) -> None:
    doc = doc_of(name)
    assert len(doc.split("\n")[0]) > 10, f"{name} has no docstring"
    named = {p.name for p in parameters(CALLABLES[name])}
    missing = named - set(documented(doc, "Parameters")) - set(documented(doc, "Attributes"))
    assert not missing, f"{name}: parameters without a description: {sorted(missing)}"
    stale = set(documented(doc, "Parameters")) - named
    assert not stale, f"{name}: descriptions of parameters it does not have: {sorted(stale)}"


@pytest.mark.parametrize("name", [n for n, c in CALLABLES.items() if not inspect.isclass(c)])
def test_every_public_function_is_typed_and_says_what_it_returns(name: str) -> None:
    function = CALLABLES[name]
    untyped = [p.name for p in parameters(function) if p.annotation is p.empty]
    assert not untyped, f"{name}: parameters without a type: {untyped}"
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty, f"{name}: no return type"
    if signature.return_annotation not in (None, "None"):
        assert re.search(r"^(Returns|Yields)\n-+\n", doc_of(name), re.MULTILINE), f"{name}: no Returns section"


@pytest.mark.parametrize("name", [n for n, c in CALLABLES.items() if "." in n and not inspect.isclass(c)])
def test_functions_take_few_positional_parameters(name: str) -> None:
    """As scanpy: what is not obvious from its place is written with its name. Models follow scvi-tools instead."""
    if name.split(".")[0] in pertvae.__all__ and inspect.isclass(getattr(pertvae, name.split(".")[0])):
        pytest.skip("model signatures are those of scvi-tools")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in parameters(CALLABLES[name]) if p.kind in kinds]
    allowed = POSITIONAL_BY_CONTRACT.get(name, POSITIONAL_BY_CONTRACT.get(name.split(".")[-1], MAX_POSITIONAL))
    assert len(positional) <= allowed, f"{name}: {len(positional)} positional parameters: {positional}"


# The documented calls whose first arguments say what they are by their place: a full name, or that of a method.
POSITIONAL_BY_CONTRACT = {"metrics.evaluate": 5, "metrics.cell_eval": 4, "benchmark.run": 5, "fit": 4}


@pytest.mark.parametrize("name", [n for n in CALLABLES if n.startswith("pp.") and inspect.isfunction(CALLABLES[n])])
def test_preprocessing_takes_adata_first(name: str) -> None:
    first = parameters(CALLABLES[name])[0]
    assert first.name == "adata"
    assert "AnnData" in str(first.annotation)


@pytest.mark.parametrize("name", [n for n, o in public_objects().items() if inspect.isclass(o) and "." in n])
def test_references_are_fitted_on_adata_first(name: str) -> None:
    fit = getattr(public_objects()[name], "fit", None)
    if fit is None:
        pytest.skip("no fit")
    first = parameters(fit)[0]
    assert first.name == "adata"
    assert "AnnData" in str(first.annotation)


# --------------------------------------------------------------------------------------------------- the house


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int | None:
    """Floor of a module; None for the package's own face, which belongs to no floor."""
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else None


MODULES = {module_name(p): p for p in FILES}


def own_imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules of this package that a file imports; ``at_import`` leaves out imports inside functions."""
    tree = ast.parse(path.read_text())
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if inside_function or typing_only:
            lazy |= set(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if at_import and node in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "pertvae"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin.split(".")[0] == "pertvae":
                for alias in node.names:
                    full = f"{origin}.{alias.name}"
                    found.add(full if full in MODULES else origin)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downward(path: Path) -> None:
    """Lazy imports count as well: a floor does not know what stands above it."""
    here = floor_of(module_name(path))
    if here is None:
        pytest.skip("the face of the package looks at every floor, lazily")
    above = {m: floor_of(m) for m in own_imports(path) if (floor_of(m) or 0) > here}
    assert not above, f"{module_name(path)} (floor {here}) imports from above: {above}"


def test_every_module_has_a_floor() -> None:
    assert {m.split(".")[1] for m in MODULES if "." in m} - set(FLOORS) == set()


def test_no_import_circles() -> None:
    graph = {m: own_imports(p, at_import=True) - {m} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            raise AssertionError("import circle: " + " -> ".join([*trail[trail.index(module) :], module]))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_methods_do_not_import_each_other() -> None:
    """A part that two methods share belongs to `nn` or `models.base`."""
    for module, path in MODULES.items():
        parts = module.split(".")
        if parts[:2] != ["pertvae", "models"] or len(parts) < 3:
            continue
        others = {m.split(".")[2] for m in own_imports(path) if m.startswith("pertvae.models.")} - {parts[2], "base"}
        assert not others, f"{module} imports from another method: {sorted(others)}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path: Path) -> None:
    """A longer file is a room to split. A method's `_model.py` is an interface: what is long is not its own."""
    is_method = path.name == "_model.py" and path.parent.name != "base" and path.parent.parent.name == "models"
    limit = MAX_MODEL_LINES if is_method else MAX_LINES
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{path.relative_to(SOURCE)} has {lines} lines, at most {limit} are allowed"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p.suffix not in {".png", ".h5ad", ".pt", ".npz"}]


def test_no_machine_paths_and_no_marks() -> None:
    path = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
    mark = re.compile(r"\b(?:TO" + "DO|FIX" + "ME|X" + r"XX)\b|\bNotImplemented" + "Error")
    for file in tracked_files():
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            where = f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            assert not path.search(line), f"absolute path of a machine, {where}"
            if file.suffix == ".py":
                assert not mark.search(line), f"unfinished, {where}"


# ------------------------------------------------------------------------------------------------------ imports


def _imported_with(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_alone_is_light() -> None:
    assert _imported_with("import pertvae") & {"torch", "scvi", "scanpy", "matplotlib.pyplot"} == set()


@pytest.mark.parametrize("module", ["pp", "reference", "metrics", "datasets", "pl"])
def test_what_needs_no_model_needs_no_torch(module: str) -> None:
    assert _imported_with(f"import pertvae\npertvae.{module}") & {"torch", "scvi"} == set()


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = pertvae.NoSuchModel


def test_version_is_that_of_the_project() -> None:
    tomllib = importlib.import_module("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pertvae.__version__ == project["version"]
    assert (SOURCE / "py.typed").is_file()
