"""The house rules about imports: who may know whom, and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tool.fixtures.variants import VARIANTS

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "ckpt_tool.checkpoint": ROOT / "ckpt_tool" / "checkpoint",
    "ckpt_tool.convert": ROOT / "convert",
    "ckpt_tool.reference": ROOT / "reference",
    "ckpt_tool.verify": ROOT / "verify",
    "ckpt_tool.fixtures": ROOT / "fixtures",
}
# package: the packages of this project it may import, besides itself, ckpt_tool.errors, loading and records
MAY_KNOW = {
    "ckpt_tool.checkpoint": set(),
    "ckpt_tool.reference": set(),
    "ckpt_tool.fixtures": {"ckpt_tool.checkpoint"},
    "ckpt_tool.convert": {"ckpt_tool.checkpoint"},
    "ckpt_tool.verify": {
        "ckpt_tool.checkpoint",
        "ckpt_tool.convert",
        "ckpt_tool.reference",
        "ckpt_tool.fixtures",
    },
}

MAY_PRINT = {"ckpt_tool.convert", "ckpt_tool.verify"}  # in render.py and report.py


def imported(file: Path) -> set[str]:
    """Every module that `file` imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_name_that_a_module_of_it_takes_when_it_is_imported(package: str) -> None:
    """`from .bits import compare` beside compare.py holds until somebody imports that."""
    folder = PACKAGES[package]
    modules = {file.stem for file in folder.glob("*.py")}
    for node in ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module != package:
            taken = modules & {alias.asname or alias.name for alias in node.names}
            assert taken <= {(node.module or "").removeprefix(f"{package}.")}, taken


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_whom_they_may_know(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        for module in imported(file):
            if not module.startswith("ckpt_tool"):
                continue
            home = ".".join(module.split(".")[:2])
            common = set() if package == "ckpt_tool.reference" else {"ckpt_tool.loading", "ckpt_tool.records"}
            allowed = {package, "ckpt_tool.errors"} | common | MAY_KNOW[package]
            if module == "ckpt_tool":  # the version
                continue
            if home == "ckpt_tool.terminal" and package in MAY_PRINT:
                continue
            assert home in allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_the_reference_knows_torch_and_the_standard_library_only() -> None:
    for file in sorted((ROOT / "reference").glob("*.py")):
        for module in imported(file):
            top = module.split(".")[0]
            known = (
                top in sys.stdlib_module_names or top == "torch" or module.startswith("ckpt_tool.reference")
            )
            assert known, f"{file.name} imports {module}"


def modules_after(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


def test_help_loads_neither_torch_nor_numpy() -> None:
    loaded = modules_after(
        "from ckpt_tool.cli import cli\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()): cli.main(['--help'], standalone_mode=False)"
    )
    assert not loaded & {"torch", "numpy", "transformers", "rich", "json", "traceback"}


def modules_of(folder: Path, *arguments: str) -> set[str]:
    """What a command that writes into a pipe has loaded at its end, as a process of its own."""
    code = (
        "import sys; from ckpt_tool import program\n"
        f"code = program.run({list(arguments)!r})\nprint(code, *sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    ended, *loaded = run.stderr.splitlines()[-1].split()
    assert ended == "0" and run.stdout, run
    return set(loaded)


def test_a_list_of_the_families_loads_what_describes_them() -> None:
    loaded = modules_of(ROOT, "families")
    assert "ckpt_tool.convert.families.mobilebert" in loaded
    assert not loaded & {"torch", "numpy", "rich", "hashlib", "ckpt_tool.checkpoint.pickle_records"}


def test_a_command_loads_what_its_work_needs(tmp_path: Path) -> None:
    """Where no terminal is nothing draws; a conversion ends with one level of four; versions of libraries are
    read for the reports that show them."""
    VARIANTS["mistral-7b-v0.1"].write(tmp_path / "in")
    made = modules_of(tmp_path, "convert", "mistral", "--in", "in", "--out", "out")
    seen = modules_of(tmp_path, "verify", "out", "--source", "in", "--level", "bits")
    never = {"torch", "transformers", "rich", "tokenizers", "huggingface_hub", "importlib.metadata", "socket"}
    others = {
        f"ckpt_tool.verify.{name}" for name in ("parts", "expectations", "prompts", "compute", "carried")
    }
    assert {"numpy", "ckpt_tool.verify.coverage"} <= made and not made & (never | others)
    assert not made & {"ckpt_tool.verify.bits", "ckpt_tool.verify.explain", "ckpt_tool.verify.packed_bits"}
    assert "ckpt_tool.verify.bits" in seen and not seen & (never | others - {"ckpt_tool.verify.carried"})


def test_converting_loads_no_torch(tmp_path: Path) -> None:
    loaded = modules_after(
        "from pathlib import Path\n"
        "from ckpt_tool.fixtures.variants import VARIANTS\n"
        "from ckpt_tool.api import convert\n"
        f"source = VARIANTS['mistral-7b-v0.1'].write(Path({str(tmp_path / 'in')!r}))\n"
        f"convert(source, {str(tmp_path / 'out')!r})"
    )
    assert "ckpt_tool.convert.execute" in loaded
    assert not loaded & {"torch", "transformers", "sentencepiece", "tokenizers", "huggingface_hub"}


def test_no_name_of_a_package_is_that_of_a_module_it_has() -> None:
    """Whoever imports the module later would put it in the name's place: `verify.compare` once was both."""
    for package, folder in PACKAGES.items():
        modules = {f.stem for f in folder.glob("*.py")}
        for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                taken = {a.asname or a.name for a in node.names} & modules
                assert taken <= {(node.module or "").removeprefix(f"{package}.")}, (package, taken)
