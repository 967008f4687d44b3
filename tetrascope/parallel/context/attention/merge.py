"""Merging of partial attention: softmax over keys that were seen in parts.

With (o, l) the output and logsumexp over some keys and (o_b, l_b) those over others, the result over all of them is

    out = o - σ(l_b - l)·(o - o_b),    lse = l - log σ(l - l_b) = logaddexp(l, l_b)

(ring-flash-attention, utils.py). Neither form takes the exponential of a positive number, so that no gap between the
parts overflows; what is written here holds as well where one part, or both, saw no key at all (l = -inf, o = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import Rows


def merge(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Joins a part to out `[..., D]` and lse `[...]`, in place and in their precision."""
    out_b, lse_b = out_b.to(out.dtype), lse_b.to(lse.dtype)
    # -inf - -inf is nan: no part has a key, and any weight will do.
    weight = torch.sigmoid(torch.nan_to_num(lse_b - lse, nan=0.0, posinf=torch.inf, neginf=-torch.inf))
    out.lerp_(out_b, weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, lse_b))


class Merged:
    """Output `[T, N, D]` and logsumexp `[T, N]` of a rank's rows, as the parts come in; fp32 at least.

    Rows that no part has reached are 0 and -inf.
    """

    def __init__(self, q_TND: Tensor) -> None:
        self._like = q_TND
        self._dtype = torch.promote_types(q_TND.dtype, torch.float32)
        self._parts = 0
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, rows: Rows, out_b: Tensor, lse_b: Tensor) -> None:
        """Joins a part that holds some rows; it is kept, not copied, where it is the first and holds all of them."""
        self._parts += 1
        if self.out is None or self.lse is None:
            if rows.covers(len(self._like)):
                self.out, self.lse = out_b, lse_b
                return
            self.out = torch.zeros(self._like.shape, dtype=self._dtype, device=self._like.device)
            self.lse = torch.full(self._like.shape[:2], -torch.inf, dtype=self._dtype, device=self._like.device)
            rows.put(self.out, out_b.to(self._dtype))
            rows.put(self.lse, lse_b.to(self._dtype))
            return
        if self.out.dtype != self._dtype:
            self.out = self.out.to(self._dtype)
        out, lse = rows.take(self.out), rows.take(self.lse)
        merge(out, lse, out_b, lse_b)
        if not rows.contiguous:  # else these were views
            rows.put(self.out, out)
            rows.put(self.lse, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """The output in the dtype of q, and the logsumexp."""
        if self.out is None or self.lse is None:
            zeros = torch.zeros_like(self._like)
            return zeros, torch.full(zeros.shape[:2], -torch.inf, dtype=self._dtype, device=zeros.device)
        return self.out.to(self._like.dtype), self.lse
