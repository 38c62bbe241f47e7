"""The files beside the weights: is each what the source gives, do they mean the same, is any a stranger?"""

from __future__ import annotations

from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.subject import Subject

LEVEL = "coverage"


def documents(subject: Subject) -> list[Finding]:
    """The findings about documents, of the level coverage."""
    return []
