"""What an installation with the base dependencies alone must do: convert and verify without torch. Run by
`make base` with the installation's own Python; not a pytest module, since pytest is not installed there.

    python base_install.py CKPT_TOOL
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

VARIANTS = (
    "mistral-7b-v0.1",
    "mistral-nemo",
    "llama-3-8b",
    "bert-ngc-cased",
    "codegen-2b-multi",
    "qwen2-0.5b",
)
ABSENT = ("torch", "transformers", "sentencepiece", "tiktoken")


def ran(program: str, *arguments: str) -> str:
    """What the command printed; its failure ends this program."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    program = str(Path(sys.argv[1]).absolute())
    if present := [name for name in ABSENT if find_spec(name) is not None]:
        raise SystemExit(f"expected a base installation, found {', '.join(present)}")
    for name in VARIANTS:
        converted, back = f"{name}-hf", f"{name}-back"
        original = ran(program, "fixtures", name, "--out", f"{name}-original").strip()
        ran(program, "inspect", original)
        ran(program, "convert", "auto", "--in", original, "--out", converted)
        ran(program, "verify", converted, "--source", original, "--level", "coverage", "--level", "bits")
        if not (Path(converted) / "tokenizer.json").is_file():
            raise SystemExit(f"{name}: expected tokenizer.json in the output, found none")
        ran(program, "convert", "auto", "--to", "original", "--in", converted, "--out", back)
        print(f"{name}: converted and verified (coverage, bits) without torch")


if __name__ == "__main__":
    main()
