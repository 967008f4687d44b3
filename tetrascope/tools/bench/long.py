"""Long sequences on the CPU: python -m tetrascope.tools.bench.long memory | balance | video

memory: the peak of tensors alive on a rank in one training step of a tiny model, for the same pack of unequal documents
on more and more ranks. Counted, not measured: the same on every machine. Besides it a rank holds parameters and
optimizer state (`state`) and its rows of the micro-batch (`batch`), which are listed apart.
balance: attention work of the busiest ring rank over the mean, for random packs of unequal documents.
video: one training step on one long video, with what all processes together took of the system.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention import check_heads
from tetrascope.parallel.context.tokens import shard_tokens
from tetrascope.tools.bench.long_jobs import Content, Job, RankMemory, train_step, unequal
from tetrascope.tools.verify.pool import WorkerPool

SHARES = (5, 3, 2, 1)
"""Lengths of the documents of a pack, relative to each other."""

SIDE = 32
"""Patches on a side of a video's frame: 256 tokens a frame."""


def random_packs(tokens: int, count: int, seed: int = 0) -> list[list[int]]:
    """Packs of documents between 16 tokens and half a pack long, log-uniform, the last one cut to fill the pack."""
    rng, packs = np.random.default_rng(seed), []
    for _ in range(count):
        left, lengths = tokens, []
        while left:
            length = min(left, int(np.exp(rng.uniform(np.log(16), np.log(tokens / 2)))))
            lengths.append(length)
            left -= length
        packs.append(lengths)
    return packs


def balances(packs: Sequence[Sequence[int]], ring: int) -> list[float]:
    """Attention work of the busiest of `ring` ranks over the mean, of every pack."""
    return [shard_tokens(lengths, ring, 1).balance for lengths in packs]


def memory_table(found: Sequence[tuple[Job, Sequence[RankMemory]]]) -> Table:
    """One row for each job. The peak is that of the rank that has most; `ranks × peak` relative to the first row's."""
    job = found[0][0]
    tokens = sum(content.tokens for content in job.contents)
    about = f"{job.layers} layers, {job.heads}/{job.kv_heads} heads, width {job.width}, recompute {job.recompute}"
    table = Table(title=f"{tokens:,} tokens; {about}, loss_rows {job.loss_rows}, mlp_rows {job.mlp_rows}; MiB")
    for column in ("ranks", "ring", "Ulysses", "peak", "ranks × peak", "state", "batch", "sent", "loss"):
        table.add_column(column, justify="right")
    one = max(r.peak for r in found[0][1]) * len(found[0][1])
    for here, ranks in found:
        peak = max(r.peak for r in ranks)
        sizes = (ranks[0].state, max(r.batch for r in ranks), max(sum(r.sent.values()) for r in ranks))
        table.add_row(
            str(len(ranks)),
            str(here.ring),
            str(here.ulysses),
            f"{peak / 2**20:.1f}",
            f"{peak * len(ranks) / one:.3f}",
            *(f"{size / 2**20:.1f}" for size in sizes),
            f"{ranks[0].loss:.5f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tetrascope.tools.bench.long", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("memory", "balance", "video"))
    parser.add_argument("--tokens", type=int, help="of the pack (65536), or of the video (262144)")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks; memory: 1 2 4 8, video: 8")
    parser.add_argument(
        "--ulysses", type=int, default=1, help="ranks of a Ulysses group, at most; the rest is the ring"
    )
    parser.add_argument("--kv-heads", type=int, default=1, help="key heads of the model with 4 heads (memory)")
    parser.add_argument("--whole", action="store_true", help="logits and MLPs whole, for comparison (memory)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for each number of ranks")
    given = parser.parse_args(arguments)
    try:
        {"memory": _memory, "balance": _balance, "video": _video}[given.what](given, Console())
    except UserError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 1
    return 0


def _memory(given: argparse.Namespace, console: Console) -> None:
    job = Job(unequal(given.tokens or 65536, SHARES, visual=True), 1, 1, kv_heads=given.kv_heads)
    if given.whole:
        job = replace(job, loss_rows=None, mlp_rows=None)
    ranks = given.ranks or [1, 2, 4, 8]
    found = []
    with WorkerPool(max(ranks)) as pool:
        for count in ranks:
            ring, ulysses = _degrees(count, given.ulysses, job)
            here = replace(job, ring=ring, ulysses=ulysses)
            found.append((here, pool.run(train_step, here, world=count, timeout=given.timeout)))
    console.print(memory_table(found))


def _degrees(ranks: int, ulysses: int, job: Job) -> tuple[int, int]:
    ulysses = min(ranks, ulysses)
    if ranks % ulysses:
        raise UserError(f"--ulysses: {ulysses} does not divide {ranks} ranks; take a divisor, or other --ranks")
    check_heads(job.heads, job.kv_heads, 1, ulysses)
    return ranks // ulysses, ulysses


def _balance(given: argparse.Namespace, console: Console) -> None:
    table = Table(title="attention work of the busiest ring rank over the mean, 200 random packs each")
    for column in ("tokens of a pack", "documents", "ring", "mean", "worst"):
        table.add_column(column, justify="right")
    for tokens in [given.tokens] if given.tokens else [4096, 16384, 65536]:
        packs = random_packs(tokens, 200)
        documents = sum(map(len, packs)) / len(packs)
        for ring in given.ranks or [2, 4, 8]:
            found = balances(packs, ring)
            row = (f"{tokens:,}", f"{documents:.0f}", str(ring), f"{np.mean(found):.5f}", f"{max(found):.5f}")
            table.add_row(*row)
    console.print(table)


def _video(given: argparse.Namespace, console: Console) -> None:
    frames = -(-(given.tokens or 262144) // (SIDE**2 // 4))
    for ranks in given.ranks or [8]:
        job = Job((Content(frames, SIDE, 254),), 1, 1, layers=1, width=16, heads=1)
        ring, ulysses = _degrees(ranks, given.ulysses, job)
        with WorkerPool(ranks) as pool:
            job = replace(job, ring=ring, ulysses=ulysses)
            found = pool.run(train_step, job, world=ranks, timeout=given.timeout)
        console.print(
            f"{job.contents[0].visual_tokens:,} visual tokens of {frames} frames, {job.contents[0].tokens:,} in all, "
            f"ring {ring} × Ulysses {ulysses}: one step in {found[0].seconds:.0f} s, loss {found[0].loss:.4f}\n"
            f"all {ranks} processes together: {_gib(sum(r.resident for r in found))} at their peaks, of which "
            f"{_gib(sum(r.before for r in found))} before the job\n"
            f"a rank: {found[0].rows:,} token rows, {found[0].patches:,} patch rows, peak of live tensors "
            f"{_gib(max(r.peak for r in found))}, attention balance {found[0].balance:.4f}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    raise SystemExit(main())
