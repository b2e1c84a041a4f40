"""How many rows come into each stage, stay, and leave for which reason."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


class Funnel:
    """Counts of one collection. Every row is kept, or rejected by the first verdict that rejects it: counts add up."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages = tuple(dict.fromkeys(stages))
        self.num_rows = 0
        self._rejected: dict[str, Counter[str]] = {stage: Counter() for stage in self.stages}

    def add(
        self,
        num_rows: int,
        verdicts: Sequence[tuple[str, pa.Array | pa.ChunkedArray]],
        retried: Sequence[str] = (),
    ) -> None:
        """Count a shard.

        Args:
            num_rows: Rows of the shard.
            verdicts: (stage, ``reject_reason``) in order, each with one entry a row.
            retried: ``retry_reason`` of the rows of earlier shards that this one tries again: those count no more, so
                that a link counts once, as what became of it in the end.
        """
        self.num_rows += num_rows - len(retried)
        if "fetch" in self._rejected:
            self._rejected["fetch"].subtract(retried)
        left = np.ones(num_rows, bool)
        for stage, reasons in verdicts:
            rejected = left & reasons.is_valid().to_numpy(zero_copy_only=False)
            self._rejected[stage].update(reasons.take(pa.array(np.flatnonzero(rejected))).to_pylist())
            left &= ~rejected

    def rows(self) -> list[dict[str, Any]]:
        """Return one entry a stage: ``stage``, ``in``, ``out`` and ``rejected`` (reason → count, largest first)."""
        entries = []
        left = self.num_rows
        for stage in self.stages:
            rejected = self._rejected[stage]
            counted = ((reason, count) for reason, count in rejected.items() if count)
            reasons = dict(sorted(counted, key=lambda item: (-item[1], item[0])))
            entries.append({"stage": stage, "in": left, "out": left - rejected.total(), "rejected": reasons})
            left -= rejected.total()
        return entries
