"""Where features go from the encoder to their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tetrascope.models.inputs import VisionInputs


class Deliver(nn.Module):
    """What the adaptor gave, several tensors `[F, H]` -> the features that visual tokens are picked from.

    Here these are the same, but for padding at the end. Under context parallelism other ranks encode a part of them,
    and a module of the engine's takes this one's place.
    """

    def forward(self, features: Sequence[Tensor], inputs: VisionInputs) -> list[Tensor]:
        return [one_FH[: inputs.features] for one_FH in features]
