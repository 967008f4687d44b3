"""How many of the ranks that share a micro-batch form the ring, and how many a Ulysses group."""

from __future__ import annotations

from tetrascope.parallel.context.attention import check_heads


def context_degrees(ranks: int, heads: int, kv_heads: int, tp: int, ranks_per_node: int) -> tuple[int, int]:
    """Degrees of ring and Ulysses for `ranks` context-parallel ranks: the largest Ulysses that lies inside a node.

    Its all-to-all wants fast links, while the ring's transfers hide behind its computation and may cross nodes (USP,
    arXiv 2405.07719 §4). heads, kv_heads: of the whole model; as in `check_heads`, Ulysses divides the query heads that
    tp leaves. tp × Ulysses ranks, which are consecutive, must divide those of a node, so that no group crosses a
    border. Ulysses is 1 where nothing larger fits, so that there is always a choice.

    Raises UserError when tp does not divide the heads.
    """
    check_heads(heads, kv_heads, tp, 1)
    fits = [
        u for u in range(1, ranks + 1) if ranks % u == 0 and heads // tp % u == 0 and ranks_per_node % (tp * u) == 0
    ]
    ulysses = max(fits, default=1)
    return ranks // ulysses, ulysses
