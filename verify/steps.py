"""What one phase of a lockstep run showed."""

from __future__ import annotations

from ckpt_tool.records import dataclass
from ckpt_tool.verify.measure import Bar, Distance
from ckpt_tool.verify.sides import Phase


@dataclass
class Step:
    """What one phase showed. `distances` is by prompt; `broken` says why the converted side could not run
    it."""

    phase: Phase
    bar: Bar
    distances: dict[str, Distance]
    broken: str | None = None

    @property
    def holds(self) -> bool:
        return self.broken is None and all(self.bar.holds(d) for d in self.distances.values())

    @property
    def cannot_tell(self) -> bool:
        """Everything that is over its bar may be noise."""
        over = [d for d in self.distances.values() if not self.bar.holds(d)]
        return self.broken is None and bool(over) and all(self.bar.cannot_tell(d) for d in over)

    @property
    def worst(self) -> tuple[str, Distance]:
        return max(self.distances.items(), key=lambda item: (item[1].nmse, item[1].max_delta))
