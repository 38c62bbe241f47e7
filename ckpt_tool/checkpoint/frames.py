"""Rows as a pandas DataFrame, for those who have pandas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ckpt_tool.errors import CkptToolError, missing_package


def data_frame(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Any:
    """A DataFrame; `missing-package` where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        if (missing := missing_package(error)) is None:
            raise
        raise CkptToolError(missing) from None
    return pandas.DataFrame(list(rows), columns=list(columns))
