"""docs/notebook.ipynb: its cells run in order, as a notebook runs them.

`python tests/notebook.py --write` runs them and keeps the outputs; without it, it says which are others now.
The numbers that differ from machine to machine are masked when they are compared.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
MASKS = (
    (re.compile(r"\d+(\.\d+)?e[+-]\d+"), "#"),
    (re.compile(r"<svg.*?</svg>", re.DOTALL), "<svg>"),
    (re.compile(r"<details><summary>provenance</summary>.*?</details>", re.DOTALL), "<provenance>"),
    (re.compile(r"\b\d+\.\d+(?=</td>| s<|</dd>)"), "#"),
    (re.compile(r"torch [^ ,<]+, threads: \d+|\d+,\d+ bytes of SVG|about \S+ [MG]B of memory"), "#"),
    (re.compile(r"worst prompt \w+|max KL \S+|\|delta\| \S+|position \d+|<td class=n>[^<]*</td>"), "#"),
    (re.compile(r"\w+\[\d+\]"), "#"),
)


def masked(output: Mapping[str, Any]) -> str:
    text = json.dumps(output, sort_keys=True)
    for pattern, sign in MASKS:
        text = pattern.sub(sign, text)
    return text


def shown(value: Any) -> dict[str, Any]:
    """A value as the output of a cell: its text, and its HTML where it has such a form."""
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return data


def run(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The outputs of one cell: what it prints, and the value of the expression that it ends with."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    outputs: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        result = {"data": shown(value), "metadata": {}, "execution_count": count}
        outputs.append({"output_type": "execute_result", **result})
    return outputs


def executed(notebook: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each cell of code with the outputs that it has now, run in a folder of its own."""
    made, names = [], {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        for k, cell in enumerate(cells):
            made.append((cell, run("".join(cell["source"]), names, k + 1)))
    return made


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    others = 0
    for k, (cell, outputs) in enumerate(executed(notebook)):
        before = [masked(o) for o in cell["outputs"]]
        if before != [masked(o) for o in outputs]:
            others += 1
            print(f"cell {k + 1}: its output is another now")
        cell["outputs"], cell["execution_count"] = outputs, k + 1
    if "--write" in sys.argv:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
