"""The vocabulary of sharding tables: how tensor parallelism divides a module.

A family's table is an ordered list of (regular expression over module names, rule). It is plain data: the model
knows nothing of it, and the engine applies it from outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tetrascope.errors import UserError


@dataclass(frozen=True)
class Column:
    """Linear divided by output rows. `segments`: sizes of the fused parts (q, k, v …), each divided on its own.

    `gather`: collect the ranks' shares of the tokens first; False where every rank has them all already.
    """

    segments: tuple[int, ...]
    gather: bool = True


@dataclass(frozen=True)
class Row:
    """Linear divided by input columns; its outputs are summed over the ranks.

    `scatter`: leave each rank with its share of the tokens (sequence parallelism); otherwise with all of them.
    """

    scatter: bool = True


@dataclass(frozen=True)
class Vocab:
    """Embedding divided by vocabulary rows; a token's vector ends up on the rank that holds the token's share."""


@dataclass(frozen=True)
class Replicated:
    """The same parameters on every rank, each rank computing on its own share of the tokens."""


@dataclass(frozen=True)
class Gather:
    """A `Collect` module: from here on every rank has all the tokens.

    What follows, up to a Row linear, is computed by every rank on all of them; the gradients of its replicated
    parameters are partial sums all the same, since each rank's gradient comes from its own part of what follows.
    """


Rule = Column | Row | Vocab | Replicated | Gather
ShardingTable = list[tuple[str, Rule]]


def rule_for(table: ShardingTable, module: str) -> Rule:
    """The one rule that matches the module's full name.

    Raises UserError when none or several match: a table must be complete and free of contradictions.
    """
    hits = [(pattern, rule) for pattern, rule in table if re.fullmatch(pattern, module)]
    if len(hits) != 1:
        found = "no rule" if not hits else f"{len(hits)} rules ({', '.join(p for p, _ in hits)})"
        raise UserError(f"sharding table: {found} for module {module!r}; exactly one must match")
    return hits[0][1]
