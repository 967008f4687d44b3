"""Context-parallel attention side by side, on the CPU: python -m tetrascope.tools.bench.attention

Forward and backward of one causal document over a few ranks: our ring, gathered keys, Ulysses and both (USP) against
torch's ring attention. All have the same inputs, shards and kernel; they take turns, so that all meet the same moods of
the machine. The first line is what the ring's kernels alone take: the limit for communication that hides completely.
Processor time is the sum over the ranks, copies and transfers included; unlike the time on the clock it hardly depends
on what else runs. Errors are the largest of output and gradients against one process in fp64, of a tensor's largest
element.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention import check_heads
from tetrascope.tools.bench.attention_sides import Side, Work, measure_sides
from tetrascope.tools.verify.pool import WorkerPool

LIMIT = "kernels of the ring alone"


@dataclass(frozen=True)
class Found:
    """One side: seconds and processor seconds of all ranks in each round, and its error; None for the limit, which
    computes nothing of use."""

    name: str
    seconds: list[float]
    busy: list[float]
    error: float | None


def sides_for(work: Work, ours_only: bool = False) -> list[Side]:
    """The limit first. Raises UserError for a document that cannot be cut into equal chunks, or heads that cannot be
    divided."""
    n = work.ranks
    if work.rows % (2 * n):
        raise UserError(
            f"bench attention: torch's ring needs rows that divide by 2·ranks; {work.rows} do not divide by {2 * n}, "
            f"take --rows {-(-work.rows // (2 * n)) * 2 * n}"
        )
    check_heads(*work.heads, tp=1, ulysses=n)
    sides: list[Side] = [
        (LIMIT, ("ours", n, 1, "ring", True)),
        (f"ours: ring {n}", ("ours", n, 1, "ring")),
        (f"ours: gathered {n}", ("ours", n, 1, "gathered")),
        (f"ours: Ulysses {n}", ("ours", 1, n, "ring")),
    ]
    if n % 2 == 0 and n > 2:
        sides.append((f"ours: ring {n // 2} × Ulysses 2", ("ours", n // 2, 2, "ring")))
    if not ours_only:
        sides += [
            (f"torch: ring {n}, all-gather", ("torch", "allgather")),
            (f"torch: ring {n}, all-to-all", ("torch", "alltoall")),
        ]
    return sides


def exact(work: Work) -> list[Tensor]:
    """Output and gradients of one process, fp64."""
    q, k, v, grad = (x.double() for x in work.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = work.heads[0] // work.heads[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1).unsqueeze(0) for x in leaves[1:])
    out = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), keys, values, is_causal=True)
    out = out[0].transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def compare_attention(work: Work, sides: Sequence[Side], rounds: int, pool: WorkerPool) -> list[Found]:
    """Measures every side on the pool's processes."""
    expected = exact(work)
    ranks = pool.run(measure_sides, work, list(sides), rounds, world=work.ranks, timeout=600.0)
    found = []
    for i, (name, options) in enumerate(sides):
        ulysses = options[2] if options[0] == "ours" else 1
        inverse = torch.from_numpy(work.sharding(work.ranks // ulysses, ulysses).inverse)
        results = [torch.cat(parts)[inverse] for parts in zip(*(results[i] for results, _, _ in ranks), strict=True)]
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, expected, strict=True))
        busy = [sum(of_ranks) for of_ranks in zip(*(rank[2][i] for rank in ranks), strict=True)]
        found.append(Found(name, ranks[0][1][i], busy, None if name == LIMIT else error))
    return found


def table(work: Work, found: Sequence[Found]) -> Table:
    made = Table(
        title=f"{work.rows:,} rows, {work.heads[0]}/{work.heads[1]} heads of {work.width}, {work.dtype}, "
        f"{work.ranks} ranks of 1 thread, {len(found[0].seconds)} rounds"
    )
    for column in ("forward + backward", "time, ms", "processor time, ms", "of the limit", "error"):
        made.add_column(column, justify="right" if made.columns else "left", no_wrap=True)
    for side in found:
        made.add_row(
            side.name,
            _spread(side.seconds),
            _spread(side.busy),
            f"{statistics.median(found[0].busy) / statistics.median(side.busy):.0%}",
            "" if side.error is None else f"{side.error:.1e}",
        )
    return made


def _spread(seconds: Sequence[float]) -> str:
    """Median, and the middle half, in milliseconds."""
    quarter, median, three_quarters = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{median * 1e3:,.0f} ({quarter * 1e3:,.0f} to {three_quarters * 1e3:,.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tetrascope.tools.bench.attention", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="context-parallel ranks, processes of one thread each")
    parser.add_argument("--rows", type=int, default=4096, help="rows of the document")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key heads")
    parser.add_argument("--width", type=int, default=64, help="width of a head")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, at least 2")
    parser.add_argument("--ours", action="store_true", help="leave torch's out")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: a spread needs 2 rounds at least")
    work = Work(options.rows, (options.heads, options.kv_heads), options.width, options.dtype, options.ranks)
    try:
        sides = sides_for(work, options.ours)
    except UserError as error:
        parser.error(str(error))
    with WorkerPool(size=work.ranks) as pool:
        Console(width=max(Console().width, 110)).print(
            table(work, compare_attention(work, sides, options.rounds, pool))
        )


if __name__ == "__main__":
    main()
