"""The module that brings features to their tokens' owners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from tetrascope.parallel.context.exchange import exchange_features


class DeliverFeatures(nn.Module):
    """What this rank's encoder gave, several tensors `[F, H]` -> what its visual tokens are picked from, `[R, H]`.

    inputs.exchange has send_rows, send_counts and receive_counts (`FeatureRoute`). gradients: whether anything in
    encoder or adaptor is trained; the same on all ranks of the group.
    """

    def __init__(self, group: dist.ProcessGroup, gradients: bool) -> None:
        super().__init__()
        self._group, self._gradients = group, gradients

    def forward(self, features: Sequence[Tensor], inputs: Any) -> list[Tensor]:
        route = inputs.exchange
        return exchange_features(
            features, route.send_rows, route.send_counts, route.receive_counts, self._group, self._gradients
        )
