"""The rules of the house that imports do not show: who may walk from rows to a plan, and what a family is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ckpt_tool.convert.facts import classes
from ckpt_tool.convert.families import FAMILIES, family

ROOT = Path(__file__).parents[1]
CONVERT = ROOT / "convert"
ROOMS = ("ckpt_tool", "convert", "reference", "verify", "fixtures")


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(path from the root, syntax tree) of every module under the folders."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), parsed(file)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    yield
    parsed.cache_clear()


def taken_from(tree: ast.AST, *homes: str) -> set[str]:
    """The names that a module takes from these modules, by importing them or as `module.name`."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names = {a.name for n in nodes if n.module in homes for a in n.names}
    short = {
        a.asname or a.name: f"{n.module}.{a.name}"
        for n in nodes
        for a in n.names
        if f"{n.module}.{a.name}" in homes
    }
    reached = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return names | {n.attr for n in reached if isinstance(n.value, ast.Name) and n.value.id in short}


def test_one_place_walks_from_rows_to_a_plan() -> None:
    walkers = {
        path
        for path, tree in modules("convert", "verify", "ckpt_tool")
        if {"expand", "assemble"} & taken_from(tree, "ckpt_tool.convert.expanding", "ckpt_tool.convert.plan")
    }
    assert walkers == {"convert/weave.py"}


def test_a_family_is_found_by_its_file() -> None:
    files = {f.stem for f in (CONVERT / "families").glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in FAMILIES} == files
    assert all(family(name).name == name for name in FAMILIES)


def test_no_module_of_a_family_is_hidden_behind_an_underscore() -> None:
    assert not [
        f.name for f in (CONVERT / "families").glob("_*") if f.suffix == ".py" and f.stem != "__init__"
    ]


def test_no_family_knows_another_but_by_name() -> None:
    """What two families share belongs to a dialect."""
    known = {
        (path, node.module)
        for path, tree in modules("convert/families", "convert/dialects")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckpt_tool.convert.families.")
    }
    assert known == set()


MAY_IMPORT = ("ckpt_tool.convert.layout", "ckpt_tool.convert.numbers", "ckpt_tool.convert.dialects")


def test_a_family_knows_the_layout_its_numbers_and_dialects_only() -> None:
    odd = {
        path
        for path, tree in modules("convert/families")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckpt_tool")
        if not (node.module or "").startswith(MAY_IMPORT)
    }
    assert odd == {"convert/families/__init__.py"}


def test_no_family_is_named_where_any_family_is_converted() -> None:
    """As a word of a string; docstrings say which models a fact is known from."""
    odd = {
        path
        for path, tree in modules("convert")
        if not path.startswith("convert/families/")
        for text in _texts(tree)
        if any(re.search(rf"(?<![\w-]){name}(?![\w-])", text) for name in FAMILIES)
    }
    assert odd == set()


def _texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module that are no docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [n.body[0] for n in ast.walk(tree) if isinstance(n, owners) and n.body]
    docstrings = {id(n.value) for n in first if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_ranks_of_megatron_are_opened_in_one_place() -> None:
    """Of every age, Megatron-Core's included."""
    openers = {
        path
        for path, tree in modules("convert")
        if {"grid", "arguments"} & taken_from(tree, "ckpt_tool.checkpoint.megatron")
    }
    assert openers == {"convert/dialects/megatron_ranks.py"}


def test_functions_fit_on_a_page() -> None:
    longest = 60
    long = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in modules(*ROOMS)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > longest
    }
    assert long == {}


def named_families(tree: ast.Module) -> set[str]:
    """The texts of a module that are the name of a family or of a class of its models (model_type)."""
    known = {*FAMILIES, *(n.replace("-", "_") for n in FAMILIES), *classes()}
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return {text for text in texts if text in known}


def test_no_family_is_named_outside_its_own_files() -> None:
    found = {
        path: names
        for path, tree in modules("verify", "ckpt_tool", "convert")
        if not path.startswith("convert/families/") and (names := named_families(tree))
    }
    assert found == {}
