"""The rules of the house for tiny originals: a family is one file, and nothing outside it knows its name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tool.fixtures.families import modules
from ckpt_tool.fixtures.headers import REAL
from ckpt_tool.fixtures.shapes import shape_of, spread
from ckpt_tool.fixtures.variants import VARIANTS

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = [f for f in sorted(FIXTURES.glob("families/*.py")) if f.stem != "__init__"]
FAMILIES = {f.stem.replace("_", "-") for f in FILES}


def test_a_familys_variants_are_found_by_its_file() -> None:
    for module in modules():
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        assert {v.family for v in module.VARIANTS} == {name}
    assert {v.family for v in VARIANTS.values()} == FAMILIES
    assert len(VARIANTS) == sum(len(module.VARIANTS) for module in modules()), "an id names one variant"


def test_a_file_more_is_a_family_more(tmp_path: Path) -> None:
    (tmp_path / "zephyr_one.py").write_text(
        "from ckpt_tool.fixtures.published import DECODER, Published, published\n"
        "from ckpt_tool.fixtures.shapes import sized\n"
        "config = sized('idnkfv', 2, 12, 3, 1, 20, 30) | {'torch_dtype': 'float32'}\n"
        "VARIANTS = (published('zephyr-one', 'zephyr', 'one', Published(DECODER, config)),)\n"
    )
    code = (
        "from pathlib import Path\n"
        "from ckpt_tool.fixtures import families\n"
        f"families.__path__.append({str(tmp_path)!r})\n"
        "from ckpt_tool.fixtures.variants import VARIANTS\n"
        f"path = VARIANTS['zephyr'].write(Path({str(tmp_path / 'out')!r}))\n"
        "print(list(VARIANTS)[-1], *sorted(p.name for p in path.iterdir()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["zephyr", "config.json", "model.safetensors"], run.stderr


def strings(tree: ast.Module) -> set[str]:
    """Every string of a module that is not a docstring, and the names that it imports."""
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    found = {
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    }
    return found | {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("file", [*FIXTURES.glob("*.py"), *FILES], ids=lambda f: f.stem)
def test_no_family_is_named_outside_its_own_file(file: Path) -> None:
    said = {
        s.removeprefix("ckpt_tool.fixtures.families.").replace("_", "-")
        for s in strings(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert not said & (FAMILIES - {file.stem.replace("_", "-")})


def test_functions_fit_on_a_page() -> None:
    long = {
        f"{file.name}: {node.name}"
        for file in FIXTURES.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    }
    assert long == set()


def test_every_published_size_has_a_family() -> None:
    assert set(REAL) == {name for module in modules() for name in getattr(module, "REAL", {})}
    assert {v.real for v in VARIANTS.values()} - {None} <= REAL.keys()


def test_shapes_in_words() -> None:
    sizes = {"d": 6, "n": 4, "h": 2, "r": 4, "held": 2}
    assert shape_of("n*h d", sizes) == ((8, 6), None)
    assert shape_of("d 4*d", sizes) == ((6, 24), None)
    assert [shape_of("n*h/r d", sizes, rank)[1] for rank in (0, 3)] == [(0, 0, 2), (0, 6, 8)]
    assert [shape_of("d n*h/held", sizes, rank)[1] for rank in range(4)] == [
        *[(1, 0, 4)] * 2,
        *[(1, 4, 8)] * 2,
    ]
    with pytest.raises(ValueError, match="6 does not divide by 4"):
        shape_of("d/r", sizes)


def test_rows_that_count_alike_repeat_together() -> None:
    table = {"first": 0, "{i}.a": 1, "{i}.{e}.b": 2, "{i}.{e}.c": 3, "last": 4}
    assert [name for name, _, _ in spread(table, {"i": 2, "e": 2})] == [
        *("first", "0.a", "0.0.b", "0.0.c", "0.1.b", "0.1.c"),
        *("1.a", "1.0.b", "1.0.c", "1.1.b", "1.1.c", "last"),
    ]
    assert ("1.0.c", 3, {"i": 1, "e": 0}) in list(spread(table, {"i": 2, "e": 2}))
