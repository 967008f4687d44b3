"""Document borders. The oracle is the definition: document i is the rows from the sum of the lengths before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tetrascope.models.layers.packed import Packed


def test_offsets_and_cu_seqlens() -> None:
    packed = Packed((3, 0, 5))
    assert packed.total == 8
    assert packed.offsets == (0, 3, 3, 8)
    cu_seqlens = packed.cu_seqlens()
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 8]
    assert Packed(()).offsets == (0,) and Packed(()).total == 0


def test_documents_of_one_length_need_no_permutation() -> None:
    assert Packed((4, 4, 4)).bucket_rows is None
    assert Packed((4, 4, 4)).buckets == ((3, 4),)
    assert Packed((1, 2, 2, 5)).bucket_rows is None


@pytest.mark.parametrize("seed", range(10))
def test_buckets_hold_every_document_whole_and_in_its_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = tuple(int(n) for n in rng.integers(0, 6, rng.integers(1, 9)))
    packed = Packed(lengths)
    rows, inverse = packed.bucket_rows or (torch.arange(packed.total),) * 2
    assert torch.equal(rows[inverse], torch.arange(packed.total))
    documents = [list(range(sum(lengths[:i]), sum(lengths[: i + 1]))) for i in range(len(lengths))]
    found, start = [], 0
    for count, length in packed.buckets:
        for _ in range(count):
            found.append(rows[start : start + length].tolist())
            start += length
    assert start == packed.total
    assert sorted(found) == sorted(d for d in documents if d)
    assert [length for _, length in packed.buckets] == sorted({n for n in lengths if n})
