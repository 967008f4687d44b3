"""What a sample costs, in two numbers: the decoder's work and the vision encoder's.

They are kept apart because different pipeline stages do them: micro-batches and ranks that are alike in the sum may
still wait for each other at every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tetrascope.engine.flops import training_flops
from tetrascope.engine.modules import ALL_TRAINED, Trained
from tetrascope.engine.plan.sample import SampleInfo
from tetrascope.models.family import ModelConfig


class Cost(NamedTuple):
    """Work of a sample or of several, each number in a unit of its own."""

    decoder: float
    vision: float


CostFn = Callable[[SampleInfo], Cost]


def row_cost(info: SampleInfo) -> Cost:
    """Tokens and patches, each a row through its own network: the cost when no model is known."""
    return Cost(float(info.tokens), float(info.patches))


class CostModel:
    """FLOPs, forward and backward: linears by the token, attention by the pairs inside the document, the encoder by
    patches, frames and windows; less for what is frozen (`flops.training_flops`)."""

    def __init__(self, config: ModelConfig, trained: Trained = ALL_TRAINED) -> None:
        self._config, self._trained = config, trained

    def __call__(self, info: SampleInfo) -> Cost:
        vision, decoder = training_flops(self._config, info.media, (info.tokens,), self._trained)
        return Cost(decoder, vision)
