"""Ulysses: an all-to-all turns rows of all heads into all rows of some heads, and another one turns them back.

Jacobs et al. 2023 (arXiv 2309.14509). Rank u of U gets query heads u·N/U and following. Key heads follow them: where U
does not divide them they are replicated to the least common multiple of both, before they travel, and the gradients of
the replicas are summed after they came back.

Bytes that a rank sends per layer, with T rows, N query and K key heads (replicas included) of width D, e bytes an
element: (U - 1)/U·T·(2·N + 2·K)·D·e in the forward, as much in the backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention.links import Links


def check_heads(heads: int, kv_heads: int, tp: int, ulysses: int) -> None:
    """Raises UserError, with the nearest valid choices, unless the heads can be divided over tp · ulysses ranks.

    heads, kv_heads: of the whole model. tp divides both; ulysses divides the query heads of a tensor-parallel rank,
    while key heads are replicated as needed.
    """
    if heads % tp or kv_heads % tp:
        both = math.gcd(heads, kv_heads)
        raise UserError(
            f"parallel.tp: {tp} must divide the {heads} attention heads and the {kv_heads} key heads; "
            f"choose {_nearest(both, tp)}"
        )
    if heads // tp % ulysses:
        share = f"the {heads} attention heads" if tp == 1 else f"the {heads // tp} attention heads that tp={tp} leaves"
        raise UserError(
            f"parallel.ulysses: {ulysses} must divide {share} on a rank; choose {_nearest(heads // tp, ulysses)}, "
            "and put the rest of the context parallelism into parallel.ring"
        )


def _nearest(of: int, wanted: int) -> str:
    """The divisors just below and above a number that is none, as words."""
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)


def replicas(kv_heads: int, ulysses: int) -> int:
    """How many times every key head travels, for `kv_heads` on a tensor-parallel rank."""
    return math.lcm(kv_heads, ulysses) // kv_heads


def heads_in(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, links: Links) -> tuple[Tensor, Tensor, Tensor]:
    """Own rows of all heads -> all rows of own heads: q `[U·T, N/U, D]`, k and v `[U·T, lcm(K, U)/U, D]`.

    Rows are in the order of the Ulysses ranks. One all-to-all for all three.
    """
    if links.size == 1:
        return q_TND, k_TKD, v_TKD
    k, v = (x.repeat_interleave(replicas(x.shape[1], links.size), dim=1) for x in (k_TKD, v_TKD))
    rows = links.exchange(_by_heads([q_TND, k, v], links.size), "ulysses").flatten(0, 1)
    q_heads, heads = q_TND.shape[1] // links.size, k.shape[1] // links.size
    q, k, v = rows.split([q_heads, heads, heads], dim=1)
    return q, k, v


def heads_in_backward(dq: Tensor, dkv: Tensor, kv_heads: int, links: Links) -> tuple[Tensor, Tensor]:
    """The way back of their gradients: `[U·T, N/U, D]`, `[2, U·T, ·, D]` -> `[T, N, D]` and `[2, T, K, D]`.

    Both must have one dtype, in which they travel; replicas are summed in fp32 at least.
    """
    if links.size == 1:
        return dq, dkv
    sent = torch.cat([dq, dkv[0], dkv[1]], dim=1).unflatten(0, (links.size, -1))
    # [U, T, heads of a rank, D] -> [T, U, heads of a rank, D]: the ranks' heads are consecutive.
    rows = links.exchange(sent.contiguous(), "ulysses").transpose(0, 1)
    q_heads, heads = dq.shape[1], dkv.shape[2]
    dq, dk, dv = (part.flatten(1, 2) for part in rows.split([q_heads, heads, heads], dim=2))
    dkv = torch.stack([dk, dv]).unflatten(2, (kv_heads, -1))
    return dq, dkv.sum(3, dtype=torch.promote_types(dkv.dtype, torch.float32)).to(dkv.dtype)


def heads_out(out: Tensor, links: Links) -> Tensor:
    """All rows of own heads -> own rows of all heads: `[U·T, N/U, D]` -> `[T, N, D]`."""
    if links.size == 1:
        return out
    rows = links.exchange(out.contiguous().unflatten(0, (links.size, -1)), "ulysses")
    return rows.transpose(0, 1).flatten(1, 2)


def heads_out_backward(grad_TND: Tensor, links: Links) -> Tensor:
    """The way back of its gradient: `[T, N, D]` -> `[U·T, N/U, D]`."""
    if links.size == 1:
        return grad_TND
    return links.exchange(_by_heads([grad_TND], links.size), "ulysses").flatten(0, 1)


def _by_heads(parts: list[Tensor], ranks: int) -> Tensor:
    """`[T, heads, D]` each -> `[ranks, T, Σ heads / ranks, D]`: what each rank is to get, side by side."""
    return torch.cat([x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in parts], dim=2).contiguous()
