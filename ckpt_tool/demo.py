"""`ckpt-tool demo`: the whole story on a model of a few hundred kilobytes.

A tiny Mistral original is written, converted and verified at every level; then one matrix in a copy is put
back into interleaved rotary order, the classic mistake, and verification is seen to fail on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tool import api
from ckpt_tool.errors import fail

if TYPE_CHECKING:
    from rich.console import Console

VARIANT = "mistral-7b-v0.1"
FLAW = "q-not-permuted"
MARKER = ".ckpt-tool-demo"


def run(folder: Path, *, overwrite: bool, screen: Console) -> int:
    """Run the demo in `folder`. 0 when the good model passes and the broken one is caught."""
    from rich.text import Text

    from ckpt_tool.fixtures.flaws import plant
    from ckpt_tool.fixtures.variants import VARIANTS
    from ckpt_tool.progress import conversion_summary
    from ckpt_tool.terminal import paragraph, say

    if folder.exists():
        # only a folder that an earlier demo made is ever removed
        if not overwrite or not (folder / MARKER).is_file():
            fail(
                "output-exists", "expected no file or folder there, found one", file=folder, hint="--out DIR"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    original, converted, broken = (folder / n for n in ("original", "converted", "broken"))

    def heading(number: int, text: str) -> None:
        say(screen)
        paragraph(screen, text, first=Text(f"{number}. ", "bold"), style="bold")

    heading(1, f"A tiny original in the layout of {VARIANTS[VARIANT].description}: {original}")
    original = VARIANTS[VARIANT].write(original)
    for path in sorted(original.iterdir()):
        say(screen, f"   {path.name}  {path.stat().st_size:,} bytes")

    heading(2, f"ckpt-tool convert mistral --in {original} --out {converted}")
    conversion_summary(api.convert(original, converted, family="mistral"), screen, original)

    heading(3, f"ckpt-tool verify {converted} --source {original}")
    good = api.verify(converted, original, against=_judge())
    good.render(screen)
    (folder / "report.html").write_text(good.html(), encoding="utf-8")

    shutil.copytree(converted, broken)
    flaw = plant(broken, FLAW)
    heading(4, f"A copy broken on purpose, {flaw.what} in layer {flaw.where}: {broken}")
    bad = api.verify(broken, original)
    bad.render(screen)

    heading(5, "Where things are")
    for place, what in (
        (original, "the original"),
        (converted, "the result, with ckpt-tool.json"),
        (broken, "the broken copy"),
        (folder / "report.html", "the report of step 3"),
    ):
        paragraph(screen, f"{place}  {what}", first="   ")
    as_it_should = good.exit_code == 0 and bad.exit_code == 1
    say(screen)
    if as_it_should:
        say(screen, "The good conversion is proved, the broken one is caught.", "green")
    else:
        say(screen, "The demo did not go as it should: see above.", "red")
    return 0 if as_it_should else 1


def _judge() -> str | None:
    from importlib.util import find_spec

    return "transformers" if find_spec("transformers") else None
