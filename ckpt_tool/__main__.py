"""`python -m ckpt_tool` is `ckpt-tool`."""

from ckpt_tool.program import main

main()
