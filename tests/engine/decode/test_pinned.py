"""Pinned copies. No GPU is needed: what would be done on one is written down in place of being done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tetrascope.engine.data.collate import MicroBatch
from tetrascope.engine.data.decode.pinned import pinned
from tetrascope.models.inputs import Inputs, VisionInputs
from tetrascope.models.layers.packed import Packed


def batch(weights: Tensor | None = None) -> MicroBatch:
    t = torch.arange(6)
    vision = VisionInputs(t.float(), t[None], t[None, :3], Packed((6,)), None, 6, t, t[None], weights)
    return MicroBatch(Inputs(t + 1, t[None], Packed((6,)), vision), t + 2, t.float(), np.arange(6), (6,))


def test_on_the_cpu_it_is_the_same_object() -> None:
    before = batch()
    assert pinned(before, torch.device("cpu")) is before


def test_on_a_gpu_every_tensor_is_pinned_and_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Call:
        pinned: bool
        device: Any
        non_blocking: bool

    calls: list[Call] = []
    marks: list[int] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        marks.append(id(copy))
        copies.append(copy)
        return copy

    def to(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        calls.append(Call(id(tensor) in marks, device, non_blocking))
        return tensor.clone()

    copies: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    device = torch.device("cuda", 0)
    before = batch(torch.ones(1, 6))
    after = pinned(before, device)
    assert len(calls) == 10 and set(calls) == {Call(True, device, True)}
    vision, old = after.inputs.vision, before.inputs.vision
    assert vision is not None and old is not None
    assert vision.frames == old.frames and vision.windows is None and vision.features == 6
    for a, b in [(after.labels_T, before.labels_T), (vision.here_KN, old.here_KN), (vision.patches_NP, old.patches_NP)]:
        assert a is not b and torch.equal(a, b)
    calls.clear()
    inputs = Inputs(old.rows_M, old.picks_CM, Packed((6,)), None)
    text = pinned(MicroBatch(inputs, old.rows_M, old.rows_M, np.arange(6), (6,)), device)
    assert text.inputs.vision is None and len(calls) == 4
