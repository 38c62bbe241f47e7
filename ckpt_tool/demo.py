"""`ckpt-tool demo`: the whole story on a model of a few hundred kilobytes.

A tiny Mistral original is written, converted and verified at every level; then one matrix in a copy is put
back into interleaved rotary order, the classic mistake, and verification is seen to fail on it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tool import api
from ckpt_tool.errors import fail, printable

if TYPE_CHECKING:
    from ckpt_tool.terminal import Screen

VARIANT = "mistral-7b-v0.1"
FLAW = "q-not-permuted"
MARKER = ".ckpt-tool-demo"
REPORT = "report.html"
FOLDERS = ("original", "converted", "broken")
AWAY = "move it away, or choose another --out"
# what a demo writes, and what one that was stopped leaves of its conversion
OWN = re.compile(rf"{re.escape(MARKER)}|{re.escape(REPORT)}|{'|'.join(FOLDERS)}|\.converted\.ckpt-tool.*")


def run(folder: Path, *, overwrite: bool, screen: Screen) -> int:
    """Run the demo in `folder`. 0 when the good model passes and the broken one is caught."""
    from ckpt_tool.fixtures.flaws import plant
    from ckpt_tool.fixtures.variants import VARIANTS
    from ckpt_tool.progress import conversion_summary
    from ckpt_tool.terminal import Styled, paragraph, say

    _make_room(folder, overwrite)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    original, converted, broken = (folder / n for n in FOLDERS)

    def heading(number: int, text: str) -> None:
        say(screen)
        paragraph(screen, text, first=Styled(f"{number}. ", "bold"), style="bold")

    heading(1, f"A tiny original in the layout of {VARIANTS[VARIANT].description}: {original}")
    original = VARIANTS[VARIANT].write(original)
    for path in sorted(original.iterdir()):
        say(screen, f"   {path.name}  {path.stat().st_size:,} bytes")

    family = VARIANTS[VARIANT].family
    heading(2, f"ckpt-tool convert {family} --in {original} --out {converted}")
    conversion_summary(api.convert(original, converted, family=family), screen, original)

    heading(3, f"ckpt-tool verify {converted} --source {original}")
    good = api.verify(converted, original, against=_judge())
    good.render(screen)
    (folder / REPORT).write_text(good.html(), encoding="utf-8")

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
        (folder / REPORT, "the report of step 3"),
    ):
        paragraph(screen, f"{place}  {what}", first="   ")
    as_it_should = good.exit_code == 0 and bad.exit_code == 1
    say(screen)
    if as_it_should:
        say(screen, "The good conversion is proved, the broken one is caught.", "green")
    else:
        say(screen, "The demo did not go as it should: see above.", "red")
    return 0 if as_it_should else 1 if good.exit_code == 1 else 2


def _make_room(folder: Path, overwrite: bool) -> None:
    """Remove an earlier demo, or an empty folder, where that is asked for; refuse what holds anything that a
    demo does not write."""
    from ckpt_tool.convert.places import free_place, place_for
    from ckpt_tool.convert.replaceable import contents_of, look, remove

    if not overwrite and not (folder / MARKER).is_file():
        free_place(folder, (), make_parents=True, flags=False)
        return
    place = place_for(folder, (), make_parents=True)
    if not os.path.lexists(place):
        return
    if not overwrite:
        fail(
            "output-exists", "expected a free name, found a demo", file=folder, hint="--overwrite replaces it"
        )
    found = contents_of(place, folder)
    strangers = [n for n in found if "/" not in n and not OWN.fullmatch(n)]
    if found and (strangers or MARKER not in found):
        what = strangers[0] if strangers else f"no {MARKER}"
        fail("not-replaceable", f"expected an earlier demo, found {printable(what)}", file=folder, hint=AWAY)
    for name in FOLDERS:
        if name in found:
            look(place / name, "models", shown=folder / name)
    if not remove(place, found):
        fail("not-replaceable", "expected an earlier demo, found a file that came meanwhile", file=folder)


def _judge() -> str | None:
    from importlib.util import find_spec

    return "transformers" if find_spec("transformers") else None
