"""Column- and row-parallel linear and vocab-parallel embedding (arXiv 1909.08053 §3, 2205.05198 §4.2).

Each takes the undivided module (on the meta device) and holds this rank's share of it. `blocks` says where the share
lies in the whole, by parameter name; parameters not in it are undivided.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.parallel.tensor.collectives import gather_tokens, scatter_sum, sum_over
from tetrascope.parallel.tensor.linear import linear
from tetrascope.parallel.tensor.placement import Block, row_blocks, share


def _empty(*shape: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))


class ColumnParallelLinear(nn.Module):
    """This rank's output rows: `[T/tp, in]` -> `[T, out/tp]`, or from `[T, in]` when not `gather`.

    `segments`: rows of the fused parts; each part is divided on its own, so that a rank gets its share of q, of k
    and of v. Raises ValueError when they do not add up to the linear's rows.
    """

    def __init__(
        self, whole: nn.Linear, segments: tuple[int, ...], group: dist.ProcessGroup, gather: bool = True
    ) -> None:
        super().__init__()
        if sum(segments) != whole.out_features:
            raise ValueError(f"segments {segments} must add up to {whole.out_features} output rows")
        parts, index = group.size(), group.rank()
        self.group, self.gather = group, gather
        self.blocks = {"weight": row_blocks(segments, (whole.in_features,), parts, index)}
        rows = sum(block.size[0] for block in self.blocks["weight"])
        self.weight = _empty(rows, whole.in_features, like=whole.weight)
        self.bias = None
        if whole.bias is not None:
            self.blocks["bias"] = row_blocks(segments, (), parts, index)
            self.bias = _empty(rows, like=whole.bias)

    def forward(self, x_tH: Tensor) -> Tensor:
        x_TH = gather_tokens(x_tH, self.group) if self.gather else x_tH
        return linear(x_TH, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's input columns: `[T, in/tp]` -> `[T/tp, out]`, or `[T, out]` on every rank when not `scatter`.

    The bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup, scatter: bool = True) -> None:
        super().__init__()
        columns = share(whole.in_features, group.size(), group.rank())
        self.group, self.scatter = group, scatter
        self.weight = _empty(whole.out_features, len(columns), like=whole.weight)
        self.blocks = {"weight": (Block(0, (0, columns.start), (whole.out_features, len(columns))),)}
        self.bias = None if whole.bias is None else _empty(whole.out_features, like=whole.bias)

    def forward(self, x_TI: Tensor) -> Tensor:
        partial_TH = linear(x_TI, self.weight)
        out = scatter_sum(partial_TH, self.group) if self.scatter else sum_over(partial_TH, self.group)
        return out if self.bias is None else out + self.bias


class ReplicatedLinear(nn.Module):
    """An undivided linear: this rank's share of the tokens `[T/tp, in]` -> `[T/tp, out]`."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = whole.weight, whole.bias

    def forward(self, x_tH: Tensor) -> Tensor:
        return linear(x_tH, self.weight, self.bias)


class GatherTokens(nn.Module):
    """The ranks' shares of the rows `[T/tp, H]` -> all of them `[T, H]`, on every rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x_tH: Tensor) -> Tensor:
        return gather_tokens(x_tH, self.group)


class VocabParallelEmbedding(nn.Module):
    """This rank's vocabulary rows: ids `[T]` -> this rank's share of the tokens, `[T/tp, H]`."""

    def __init__(self, embedding: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.rows = share(embedding.num_embeddings, group.size(), group.rank())
        self.weight = _empty(len(self.rows), embedding.embedding_dim, like=embedding.weight)
        self.blocks = {
            "weight": row_blocks((embedding.num_embeddings,), (embedding.embedding_dim,), group.size(), group.rank())
        }

    def forward(self, ids_T: Tensor) -> Tensor:
        local_T = ids_T - self.rows.start
        elsewhere_T = (local_T < 0) | (local_T >= len(self.rows))
        out_TH = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return scatter_sum(out_TH.masked_fill(elsewhere_T[:, None], 0), self.group)
