"""What the documents name is really there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("converter", "passes", "runtime", "benchmarks")
REFERENCE = re.compile(r"`((?:converter|passes|runtime|benchmarks|tests|examples)/[\w/]+\.py)::(\w+(?:\.\w+)?)`")


def tree_of_the_readme() -> dict[str, str]:
    """Return what the README says of each file of the four folders, by its path."""
    block = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    folder, found = "", {}
    for line in filter(None, block.splitlines()):
        name, _, text = line.strip().partition("  ")
        if line.startswith(" "):
            found[folder + name] = text.strip()
        else:
            folder = name
    return found


def test_the_tree_of_the_readme_has_a_line_for_each_file() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for pattern in ("*.py", "*.jinja")
        for path in (ROOT / folder).rglob(pattern)
        if path.stat().st_size
    }
    tree = tree_of_the_readme()
    assert sorted(tree) == sorted(files)
    assert all(tree.values())


def references() -> list[tuple[str, str, str]]:
    """Return each ``path.py::name`` of the documents, with the document."""
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(
        {(document.name, *found) for document in documents for found in REFERENCE.findall(document.read_text())}
    )


@pytest.mark.parametrize(("document", "path", "name"), references())
def test_what_a_document_refers_to_exists(document: str, path: str, name: str) -> None:
    body = ast.parse((ROOT / path).read_text()).body
    for part in name.split("."):
        names: dict[str, list[ast.stmt]] = {}
        for statement in body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names[statement.name] = statement.body
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            names |= {target.id: [] for target in targets if isinstance(target, ast.Name)}
        assert part in names, f"{document} names {path}::{name}"
        body = names[part]
