"""What Lesson 14 computes beside the league: comparisons that the register has no rows for yet.

They follow the league's protocol (`minipeft.claims.protocol`): each side is tuned on validation under a seed of its own, and
reported on 512 test verses under five other seeds. A trial is the league's, too: what is in its rows is not computed again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from minipeft.claims import protocol
from minipeft.claims.comparison import Pair, Searches
from minipeft.claims.protocol import Choice, Search, search
from minipeft.experiments.rows import Row, read_rows
from minipeft.experiments.sweep import sweep


def near(examples: int = 500, epochs: float = 2.0, **fixed: Any) -> Search:
    """Full fine-tuning on `rewrite` in 250 steps of 4 verses. The rate alone is tuned, from the best of the league's search
    over rates, epochs and batches."""
    return search("rewrite", "full", examples, axes=("rate",), longer=500 / examples, rate=5e-4, epochs=epochs, batch_size=4, **fixed)


def _batches(size: int) -> Search:
    return search("rewrite", "full", 500, axes=("rate", "epochs"), batch_size=size)


CASE = "full, rewrite, 500 examples"
BATCHES = Pair(CASE, "batches of 64", _batches(64), "batches of 4", _batches(4))
CLEAN, HALF_CLEAN, HALF_WRONG = near(), near(250, 4.0), near(data="random:0.5")
WRONG = [
    Pair(CASE, "250 clean", HALF_CLEAN, "500 with half of them wrong", HALF_WRONG),
    Pair(CASE, "500 clean", CLEAN, "500 with half of them wrong", HALF_WRONG),
]
SEARCHES: list[Choice] = [BATCHES.one, BATCHES.other, CLEAN, HALF_CLEAN, HALF_WRONG]


def known(searches: Iterable[Choice], store: str | os.PathLike) -> list[Row]:
    """The rows that there are for these searches, of today's base: the league's, and those of the store."""
    own = [row for row in read_rows(store) if row["run"] == "Trial" and row.get("version") == protocol.version()]
    return [*Searches.of("league", searches).rows(), *own]


def compute(searches: Sequence[Choice], store: str | os.PathLike) -> None:
    """All rows that are missing, computed in this process and added to the store, round by round."""
    while trials := protocol.wanted(protocol.finder(known(searches, store)), searches):
        sweep(protocol.run, trials, 1, store, protocol.version())
