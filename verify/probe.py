"""Texts that show how a tokenizer splits: each kind of thing that one of the known tokenizers treats in a way
of its own, and what is made from the vocabulary under comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

ORDINARY: tuple[str, ...] = (
    "",
    "a",
    "Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "HELLO hello HeLLo",
    "I'm you're he'll we'd they've it's DON'T",
    "naïve café résumé Ångström Straße İstanbul",
    "e\u0301 and é, n\u0303 and ñ, ﬁ and fi, ①Ⅷ½",  # decomposed, ligatures, numbers that are not digits
    "生活的真谛是 東京 こんにちは 안녕하세요",
    "Привет, мир! Γειά σου ΚΌΣΜΕ. Καλημέρας",
    "שלום עולם مرحبا بالعالم हिन्दी ภาษาไทย",
    "😀 🦙🦙 👩‍👩‍👧‍👦 🇫🇷 ❤️",
    "\U0001f9ff\U000e0041\U0002a6d6 \ue000\uffff",  # rare planes, private use, not a character
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen \ufeffmark \u2028line",
    "control \x01\x07\x1b\x7f bytes \x00 end",
    "0 1 12 123 1234 12345 123456 1234567890 3.14159 1,000,000 0x1F 1e-5",
    "mixed123numbers456and789letters 2024-11-28T16:30:00Z",
    "!@#$%^&*()_+-=[]{}|;':\",./<>? ... --- ``` ''' ¿¡ „“ «»",
    "def f(x: int) -> str:\n    if x >= 10:\n        return f\"{x!r}\"\n\treturn 'no'\n",
    'for (int i=0;i<n;++i){a[i]&=~(1<<i);}  // C\n#include <stdio.h>\r\n{"k": [1, null]}',
    "https://example.org/a_b?c=d&e=%20f#g user@example.org C:\\path\\file",
    "<html><body>&amp;</body></html> ▁ ▁▁a Ġ Ċ <0x0A> ##ing",  # how tokenizers spell spaces and bytes
    "A" * 90 + " " + "ab" * 60,
    "mask: the capital of France is [MASK] or <mask>.",
)
SPACES: tuple[str, ...] = (
    " ",
    "  ",
    "   a",
    " a",
    "a ",
    "a  ",
    "a  b   c    d     e        f",
    "\t",
    "\ta\t\tb",
    "\n",
    "\n\n",
    "a\nb\n\nc\n\n\nd",
    "\r\na\r\nb\rc",
    " \n \t \n a",
    "a \n b \n\n  c",
    " " * 16 + "x" + " " * 31 + "y" + " " * 64,
    "\n" * 9 + "x",
    "　全角　空白　",
    "a\u2003b\u2009c\x0bd\x0ce\x85f",
)
PAIR = ("Hello world", "a")
ROUND = ("{}", " {}", "{} ", "a{}b", "a {} b", "{0}{0}", "\n{}\n", "{}.")


def texts(specials: Iterable[str], pieces: Iterable[str]) -> Iterator[str]:
    """The fixed texts, each of `specials` alone and embedded, and each of `pieces`: alone, capital, after
    another."""
    yield from ORDINARY
    yield from SPACES
    for special in specials:
        for frame in ROUND:
            yield frame.replace("{0}", special).replace("{}", special)
        yield special.lower()
        yield special.upper()
        yield special[:-1]
    before = "x"
    for piece in pieces:
        yield piece
        yield f"{before}{piece}"
        yield f"{before} {piece}{piece}"
        before = piece
