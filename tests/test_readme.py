"""What the README prints can be typed in: its Python runs, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    pred = names["pred"]
    held_out = names["held_out"]
    assert "rank_genes_groups" in pred.uns  # type: ignore[attr-defined]
    assert held_out
    labels = set(pred.obs["perturbation"])  # type: ignore[attr-defined]
    assert labels == {*held_out, "control"}  # type: ignore[misc]
    for where, key in (("obsm", "X_samsvae"), ("uns", "samsvae_programs"), ("uns", "samsvae_predictions")):
        assert key in getattr(names["adata"], where)


def test_commands_of_the_readme_exist() -> None:
    from pertvae.cli import _parser

    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    seen = set()
    makefile = (ROOT / "Makefile").read_text()
    for command in filter(None, commands):
        seen.add(command[0])
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command
        else:
            assert command[0] == "pertvae"
            _parser().parse_args(command[1:])
    assert seen == {"make", "pertvae"}


def test_links_of_the_readme_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
