"""`python -m ckpt_tool` is `ckpt-tool`."""

from ckpt_tool.cli import main

main()
