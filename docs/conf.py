"""Sphinx settings. The API pages are written from what the package shows, so they cannot fall behind."""

from __future__ import annotations

import inspect
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType
from typing import Any

import pertvae

HERE = Path(__file__).parent

project = "pertvae"
author = "pertvae developers"
copyright = "2026, pertvae developers"
release = version = installed_version("pertvae")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
templates_path = ["_templates"]
exclude_patterns = ["_build", "Thumbs.db"]
html_theme = "sphinx_book_theme"
html_title = "pertvae"
html_theme_options = {"show_navbar_depth": 1}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = True
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
napoleon_use_param = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def public(kind: type | None) -> dict[str, Any]:
    """Public names of the package that exist, modules (``kind=ModuleType``) or the rest."""
    found = {n: getattr(pertvae, n, None) for n in pertvae.__all__}
    return {n: o for n, o in found.items() if o is not None and isinstance(o, ModuleType) == (kind is ModuleType)}


def own_members(cls: type) -> list[str]:
    """Public members of a class that this package defines, here or in a base; those of scvi-tools are theirs."""
    names = []
    for name in dir(cls):
        raw = inspect.getattr_static(cls, name)
        function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        function = raw.fget if isinstance(raw, property) else inspect.unwrap(function)
        if not name.startswith("_") and str(getattr(function, "__module__", "")).startswith("pertvae"):
            names.append(name)
    return names


def write_api() -> dict[str, list[str]]:
    """Write ``generated/api.md``; return the members to document of every public class."""
    shutil.rmtree(HERE / "generated", ignore_errors=True)
    (HERE / "generated").mkdir()
    sections = [("Models", "pertvae", "", list(public(None)))]
    for name, module in public(ModuleType).items():
        first_line = (inspect.getdoc(module) or "").split("\n")[0]
        sections.append((f"pertvae.{name}", f"pertvae.{name}", first_line, list(getattr(module, "__all__", []))))
    page, members = ["# API\n\nImport the package as `import pertvae as pv`.\n"], {}
    for title, module_name, text, names in sections:
        if not names:
            continue
        listed = "\n".join(f"   {n}" for n in names)
        page.append(
            f"## {title}\n\n{text}\n\n```{{eval-rst}}\n.. currentmodule:: {module_name}\n\n"
            f".. autosummary::\n   :toctree: .\n   :nosignatures:\n\n{listed}\n```\n"
        )
        owner = public(ModuleType).get(module_name.removeprefix("pertvae."), pertvae)
        classes = {n: getattr(owner, n) for n in names if inspect.isclass(getattr(owner, n, None))}
        members |= {f"{module_name}.{n}": own_members(c) for n, c in classes.items()}
    (HERE / "generated" / "api.md").write_text("\n".join(page))
    return members


autosummary_context = {"own_members": write_api()}
