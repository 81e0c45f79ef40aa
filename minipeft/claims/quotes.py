"""The register's verdicts as lessons quote them, in the section that teaches the statement:

    # > `lora-10` no extra latency after merging: **holds**. The merged model takes 1.01 times the base's time, ...

`python -m minipeft.claims.quotes lessons/*.py` brings the quotations of lessons up to date; a test fails where one is not.
"""

from __future__ import annotations

import re
import sys

from ..files import rewrite
from .register import UNTRIED, Statement, Verdict, filled, followed, judge, rule_of, statements

WIDTH = 120
CELL = "# %% [markdown]\n"


def quotation(statement: Statement, verdict: Verdict) -> str:
    """A verdict as lines of a percent script; "" of what is not tried yet."""
    if verdict.verdict == UNTRIED:
        return ""
    items = "validation records" if "validation" in verdict.task else "test items"
    sizes = [f"{n} {what}" for n, what in ((verdict.seeds, "seeds"), (verdict.items, items)) if n and n > 1]
    said = f"`{statement.id}` {statement.statement}: **{verdict.verdict}**. {verdict.because}"
    if sizes:
        said = followed(said, f"({', '.join(sizes)})")
    return filled(said, WIDTH, "# > ", "# > ") + "\n"


def quoted(text: str, lesson: str) -> str:
    """The text of a lesson with today's quotations, a cell at the end of each section that teaches a statement."""
    rules = [rule for id in statements() if (rule := rule_of(id)) and rule.lesson == lesson]
    cells = [cell for cell in re.split(r"(?m)^(?=# %%)", text.rstrip("\n") + "\n\n") if not cell.startswith(CELL + "# > `")]
    section, done = None, []
    for cell in [*cells, "# ## "]:  # the last closes the last section
        if heading := re.search(r"^# ## (.*)$", cell, re.M):
            said = [quotation(statements()[rule.id], judge(rule.id)) for rule in rules if rule.section == section]
            if any(said):
                before, cell = cell[: heading.start()].removesuffix("#\n"), CELL + cell[heading.start() :]
                done += [before.rstrip("\n") + "\n\n"] * (before not in ("", CELL))  # prose that the next section followed
                done.append(CELL + "#\n".join(filter(None, said)) + "\n")
            section = heading[1]
        done.append(cell)
    return "".join(done[:-1]).rstrip("\n") + "\n"


if __name__ == "__main__":
    rewrite(sys.argv[1:], quoted)
