"""Which parts of which logical tensors a rank holds, and what fills them.

The oracle is counting: for parameters of random shapes, stacked of random pieces, divided and cut at random, the
shards of all ranks put back together must give every element of every logical tensor once, with its own value. One
that is missing would stay at its initial value after loading; one held twice would be saved from two places.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tetrascope.engine.logical import Shard, shards
from tetrascope.engine.source import HuggingFaceFolder, Source, fill, memory_source, random_source, read_hf_config
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.weights import HFTensor
from tetrascope.parallel.tensor.placement import Block, row_blocks, share, whole
from tetrascope.tools.verify.families.qwen2_vl import tiny_config

LocalPart = tuple[tuple[int, ...], tuple[Block, ...]]
"""Shape of a local parameter, and its place in the whole one."""


def random_pieces(rng: np.random.Generator) -> list[HFTensor]:
    """One to four tensors that can be stacked: vectors, matrices, or one convolution kernel."""
    kind = rng.choice(["vector", "matrix", "kernel"])
    if kind == "kernel":
        return [HFTensor("kernel", (int(rng.integers(1, 7)), *(int(n) for n in rng.integers(1, 4, 4))))]
    tail = () if kind == "vector" else (int(rng.integers(1, 9)),)
    return [HFTensor(f"piece{i}", (int(rng.integers(1, 10)), *tail)) for i in range(rng.integers(1, 5))]


def random_division(rng: np.random.Generator, pieces: list[HFTensor], parts: int) -> list[LocalPart]:
    """Every part's share: by rows of the pieces or of other segments, by columns, or not at all (one part)."""
    rows, tail = sum(p.matrix[0] for p in pieces), pieces[0].matrix[1:]
    kind = rng.choice(["pieces", "segments", "columns" if tail else "pieces", "whole"])
    if kind == "whole":
        return [((rows, *tail), whole((rows, *tail)))]
    if kind == "columns":
        cuts = [share(tail[0], parts, i) for i in range(parts)]
        return [((rows, len(c)), (Block(0, (0, c.start), (rows, len(c))),)) for c in cuts]
    segments = tuple(p.matrix[0] for p in pieces)
    if kind == "segments":
        borders = sorted(rng.integers(0, rows + 1, rng.integers(1, 4)).tolist())
        segments = tuple(int(n) for n in np.diff([0, *borders, rows]))
    divided = [row_blocks(segments, tail, parts, i) for i in range(parts)]
    return [((sum(b.size[0] for b in blocks), *tail), blocks) for blocks in divided]


def stacked(tensors: dict[str, Tensor], pieces: list[HFTensor]) -> Tensor:
    return torch.cat([tensors[p.name].reshape(p.matrix) for p in pieces])


def local_part(stack: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """The blocks cut out of the whole parameter, one below the other."""
    return torch.cat([stack[tuple(slice(s, s + n) for s, n in zip(b.start, b.size, strict=True))] for b in blocks])


def random_cuts(rng: np.random.Generator, total: int) -> list[tuple[int, int]]:
    borders = [0, *sorted(rng.integers(0, total + 1, rng.integers(0, 6)).tolist()), total]
    return list(itertools.pairwise(borders))


@pytest.mark.parametrize("seed", range(300))
def test_shards_hold_every_element_of_every_logical_tensor_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = random_pieces(rng)
    tensors = {p.name: torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32)) for p in pieces}
    stack = stacked(tensors, pieces)
    counts = {p.name: torch.zeros(p.matrix, dtype=torch.int64) for p in pieces}
    for shape, blocks in random_division(rng, pieces, parts=int(rng.integers(1, 5))):
        local = local_part(stack, blocks)
        assert tuple(local.shape) == shape
        memory = local.reshape(-1).clone()
        for start, stop in random_cuts(rng, memory.numel()):
            run = memory[start:stop]
            for shard in shards(run, start, shape, blocks, pieces):
                logical = tensors[shard.name].reshape(shard.shape)
                place = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
                assert torch.equal(shard.tensor, logical[place])
                assert shard.tensor.numel()
                counts[shard.name][place] += 1
                shard.tensor.zero_()  # a view: what is written into a shard lands in the local memory
        assert not memory.any()
    assert all((count == 1).all() for count in counts.values())


def test_golden_shards_of_a_fused_projection() -> None:
    # q of 4 rows, k and v of 2, two columns each; the second of two ranks holds q2 q3 k1 v1; of its eight numbers,
    # the five from the fourth on: the second number of q3, then k1 and v1.
    pieces = [HFTensor("q", (4, 2)), HFTensor("k", (2, 2)), HFTensor("v", (2, 2))]
    blocks = row_blocks((4, 2, 2), (2,), 2, 1)
    flat = torch.arange(3, 8)
    found = [(s.name, s.shape, s.offset, s.tensor.tolist()) for s in shards(flat, 3, (4, 2), blocks, pieces)]
    assert found == [
        ("q", (4, 2), (3, 1), [[3]]),
        ("k", (2, 2), (1, 0), [[4, 5]]),
        ("v", (2, 2), (1, 0), [[6, 7]]),
    ]


def test_an_empty_run_has_no_shards() -> None:
    assert shards(torch.empty(0), 4, (3, 4), whole((3, 4)), [HFTensor("w", (3, 4))]) == []


def initial(name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    return FAMILY.initial(tiny_config(), name, shape)


@pytest.mark.parametrize("seed", range(20))
def test_random_numbers_do_not_depend_on_the_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = random_pieces(rng)
    stack = torch.empty(sum(p.matrix[0] for p in pieces), *pieces[0].matrix[1:])
    shape = tuple(stack.shape)
    fill(shards(stack.view(-1), 0, shape, whole(shape), pieces), random_source(7, initial))
    for local_shape, blocks in random_division(rng, pieces, parts=3):
        memory = torch.full(local_shape, float("nan")).view(-1)
        for start, stop in random_cuts(rng, memory.numel()):
            fill(shards(memory[start:stop], start, local_shape, blocks, pieces), random_source(7, initial))
        assert torch.equal(memory.view(local_shape), local_part(stack, blocks))


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return random_source(seed, initial)(Shard(name, shape, (0,) * len(shape), torch.empty(shape)))


def test_random_numbers_are_as_the_family_says() -> None:
    weight = drawn(0, "lm_head.weight", (200, 100))
    # 20,000 draws: mean and deviation within 5 standard errors of 0 and 0.02.
    assert abs(weight.mean().item()) < 5 * 0.02 / 20000**0.5
    assert abs(weight.std().item() - 0.02) < 5 * 0.02 / 40000**0.5
    assert drawn(0, "model.norm.weight", (5,)).tolist() == [1.0] * 5
    assert drawn(0, "visual.merger.ln_q.bias", (5,)).tolist() == [0.0] * 5


def test_names_and_seeds_have_numbers_of_their_own() -> None:
    first = drawn(0, "a.weight", (4, 4))
    assert torch.equal(first, drawn(0, "a.weight", (4, 4)))
    assert not torch.equal(first, drawn(0, "b.weight", (4, 4)))
    assert not torch.equal(first, drawn(1, "a.weight", (4, 4)))


TENSORS = {
    "kernel": torch.arange(4 * 3 * 2 * 2 * 2, dtype=torch.float32).reshape(4, 3, 2, 2, 2),
    "matrix": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "vector": torch.arange(6, dtype=torch.float32),
}
CUTS = [
    Shard("matrix", (5, 7), (0, 0), torch.empty(5, 7)),
    Shard("matrix", (5, 7), (1, 3), torch.empty(2, 4)),
    Shard("vector", (6,), (2,), torch.empty(3)),
    Shard("kernel", (4, 24), (0, 0), torch.empty(4, 24)),
    Shard("kernel", (4, 24), (2, 5), torch.empty(1, 11)),
]


@pytest.fixture(params=["one file", "several files"])
def hf_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        where = {name: f"model-{i}.safetensors" for i, name in enumerate(TENSORS)}
        for name, file in where.items():
            save_file({name: TENSORS[name]}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tmp_path


def assert_cuts_are_right(source: Source) -> None:
    for shard in CUTS:
        place = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
        assert torch.equal(source(shard), TENSORS[shard.name].reshape(shard.shape)[place])


def test_hugging_face_folder_gives_slices(hf_folder: Path) -> None:
    assert_cuts_are_right(HuggingFaceFolder(hf_folder))


def test_memory_gives_slices() -> None:
    assert_cuts_are_right(memory_source(TENSORS))


def test_fill_converts_to_the_parameters_dtype(hf_folder: Path) -> None:
    target = torch.empty(5, 7, dtype=torch.bfloat16, requires_grad=True)
    fill(shards(target.view(-1), 0, (5, 7), whole((5, 7)), [HFTensor("matrix", (5, 7))]), HuggingFaceFolder(hf_folder))
    assert torch.equal(target.detach(), TENSORS["matrix"].bfloat16())


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard("missing", (5, 7), (0, 0), torch.empty(5, 7)), "has no tensor 'missing', which the model needs"),
        (Shard("matrix", (5, 8), (0, 0), torch.empty(5, 8)), r"matrix has shape \(5, 7\), .* expects \(5, 8\)"),
        (Shard("matrix", (7, 5), (0, 0), torch.empty(7, 5)), r"matrix has shape \(5, 7\), .* expects \(7, 5\)"),
        (Shard("matrix", (35,), (0,), torch.empty(35)), r"matrix has shape \(5, 7\), .* expects \(35,\)"),
        (Shard("kernel", (4, 25), (0, 0), torch.empty(1, 1)), r"kernel has shape \(4, 3, 2, 2, 2\), .* \(4, 25\)"),
        (Shard("kernel", (8, 12), (0, 0), torch.empty(1, 1)), r"kernel has shape \(4, 3, 2, 2, 2\), .* \(8, 12\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(hf_folder: Path, shard: Shard, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(hf_folder)(shard)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.init_from: .* has no model\.safetensors"):
        HuggingFaceFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        HuggingFaceFolder(tmp_path)
    for content in ("{", "[]", '{"weights": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match=r"index\.json: holds no weight_map"):
            HuggingFaceFolder(tmp_path)


def test_a_file_that_the_index_names_but_is_gone(tmp_path: Path) -> None:
    index = {"weight_map": {"matrix": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-1\.safetensors: cannot be read"):
        HuggingFaceFolder(tmp_path)(CUTS[0])


def test_config_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert read_hf_config(tmp_path) == {"model_type": "x"}


def test_hf_folder_must_hold_just_the_tensors_of_the_model(hf_folder: Path) -> None:
    """Checked from headers, before any process group: nothing missing, nothing left unread, nothing misshapen."""
    from safetensors import safe_open

    tensors = []
    for path in sorted(hf_folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            tensors += [HFTensor(name, tuple(file.get_slice(name).get_shape())) for name in names]
    folder = HuggingFaceFolder(hf_folder)
    folder.check(tensors)
    with pytest.raises(UserError, match=r"lacks 1 tensors \(head\)"):
        folder.check([*tensors, HFTensor("head", (1,))])
    with pytest.raises(UserError, match=rf"holds 1 tensors \({tensors[0].name}\) besides"):
        folder.check(tensors[1:])
    with pytest.raises(UserError, match=rf"{tensors[0].name} has shape"):
        folder.check([HFTensor(tensors[0].name, (9, 9, 9)), *tensors[1:]])
