"""Language models through Megatron-Core: it loads what is written, and what it writes is read.

The oracle is Megatron-Core itself. `dist_checkpointing.load` fills a GPTModel built from its own local layer spec, with
no key left over on either side, and its logits must be those of transformers for the same weights. A wrong order of
fused rows, exchanged gate and up, or swapped layers would still load: their shapes fit. The models are scaled so that
any of these moves the logits by their own size (measured in `test_a_wrong_order_would_show`).

Bound of the logits: Megatron-Core and transformers compute the same products in fp32 but add them up in another order,
at most `hidden · layers` additions deep; the error of such sums is about √n · 2⁻²⁴ of the largest, here √256 · 6e-8 =
1e-6. 5e-6 of the largest logit leaves room for the norms and the softmax. Measured: 0 to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools.checkpoint_convert.megatron import megatron_jobs
from tests.tools.checkpoint_convert.megatron.cases import KINDS, VOCAB, causal_lm, token_ids
from tests.tools.checkpoint_convert.megatron.readers import Memory, assert_holds, read_all, write_megatron
from tetrascope.models.weights import logical_tensors, relative
from tetrascope.tools.checkpoint_convert.formats import Options
from tetrascope.tools.checkpoint_convert.megatron import FORMAT
from tetrascope.tools.checkpoint_convert.megatron.causal_lm import FAMILY, CausalLMConfig
from tetrascope.tools.checkpoint_convert.megatron.mapping import Naming, gpt_weights
from tetrascope.tools.checkpoint_convert.megatron.reader import MegatronReader
from tetrascope.tools.verify.pool import WorkerPool

BOUND = 5e-6
IMPORT_SECONDS = 180.0
"""Megatron-Core takes seconds to import, on a busy machine many."""


def source(kind: str) -> Memory:
    model: Any = causal_lm(kind)
    config = FAMILY.from_hf(model.config.to_dict() | {"architectures": None})
    return Memory(FAMILY, config, model.state_dict())


def expected_logits(kind: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = causal_lm(kind)(token_ids()).logits
        return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Megatron checkpoints of all kinds."""
    root = tmp_path_factory.mktemp("megatron")
    yield {kind: write_megatron(source(kind), root / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_megatron_core_computes_what_transformers_does(kind: str, written: dict[str, Path], pool: WorkerPool) -> None:
    expected = expected_logits(kind)
    for tp in (1, 2):
        found = pool.run(megatron_jobs.logits, written[kind], token_ids(), tp, world=tp, timeout=IMPORT_SECONDS)
        for logits in found:
            assert logits.shape[-1] == 256
            assert (logits[..., :VOCAB] - expected).abs().max() <= BOUND * expected.abs().max()
            # The padding's rows are zero, where embedding and head are not one.
            assert (logits[..., VOCAB:] == 0).all()


def test_a_wrong_order_would_show() -> None:
    """Every mistake that shapes do not show, made in transformers' model: how far it moves the logits."""
    expected = expected_logits("qwen2")
    scale = expected.abs().max()

    def moved(change: Any) -> float:
        model = causal_lm("qwen2")
        with torch.no_grad():
            for layer in model.model.layers:
                change(layer)
            return float((model(token_ids()).logits - expected).abs().max() / scale)

    def swap(one: Tensor, other: Tensor) -> None:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)

    mistakes: dict[str, Callable[[Any], None]] = {
        "query heads of two groups": lambda x: swap(x.self_attn.q_proj.weight[:32], x.self_attn.q_proj.weight[32:]),
        "two query heads of a group": lambda x: swap(x.self_attn.q_proj.weight[:16], x.self_attn.q_proj.weight[16:32]),
        "key and value": lambda x: swap(x.self_attn.k_proj.weight, x.self_attn.v_proj.weight),
        "biases of key and value": lambda x: swap(x.self_attn.k_proj.bias, x.self_attn.v_proj.bias),
        "gate and up": lambda x: swap(x.mlp.gate_proj.weight, x.mlp.up_proj.weight),
        "the two norms": lambda x: swap(x.input_layernorm.weight, x.post_attention_layernorm.weight),
    }
    for name, change in mistakes.items():
        assert moved(change) > 1000 * BOUND, name


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_that_megatron_core_saves(
    kind: str, written: dict[str, Path], pool: WorkerPool
) -> None:
    keys = pool.run(megatron_jobs.keys, written[kind], world=1, timeout=IMPORT_SECONDS)[0]
    ours = {t.name: t.shape for t in logical_tensors(gpt_weights(source(kind).config.decoder)).values()}
    padded = {name: ((256, 64) if shape[0] == VOCAB else shape) for name, shape in ours.items()}
    assert padded == keys


@pytest.mark.parametrize("kind", KINDS)
def test_what_megatron_core_saves_under_tp2_pp2_is_read(
    kind: str, written: dict[str, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    saved, legacy = tmp_path / "torch_dist", tmp_path / "legacy"
    pool.run(megatron_jobs.resave, written[kind], saved, legacy, 2, 2, world=4, timeout=IMPORT_SECONDS)
    original = source(kind)
    shape = original.config.decoder
    for folder in (saved, saved / "iter_0000007", legacy, legacy / "iter_0000007"):
        assert FORMAT.recognise(folder)
        reader = MegatronReader(folder, Options())
        assert_holds(reader, original)
        # What the model is follows from Megatron's arguments alone.
        assert reader.config == CausalLMConfig(shape, 512)
        assert not reader.drift
        assert any("rows from 251 to 256 are padding" in note for note in reader.notes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_back(dtype: str, tmp_path: Path) -> None:
    original = source("qwen3")
    # Small files: a tensor of many layers is spread over several.
    write_megatron(original, tmp_path, Options(dtype=dtype, file_bytes=60_000))
    assert len(list((tmp_path / "release").glob("*.distcp"))) > 5
    reader = MegatronReader(tmp_path, Options())
    assert reader.config == original.config and reader.family is FAMILY
    for name, tensor in original.tensors.items():
        wanted = original.read(name, 0, tensor.matrix[0]).to(getattr(torch, dtype))
        # By rows, as it is asked for, not the whole at once.
        half = tensor.matrix[0] // 2
        parts = [reader.read(name, 0, half), reader.read(name, half, tensor.matrix[0] - half)]
        assert torch.equal(torch.cat(parts), wanted), name


def test_layers_that_are_saved_one_by_one_are_read(tmp_path: Path) -> None:
    """Megatron-Core's non-homogeneous layers, and norms that are modules of their own."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    original = source("llama")
    release = write_megatron(original, tmp_path / "stacked")
    tensors = read_all(original)
    own = gpt_weights(original.config.decoder, naming=Naming(stacked=False, separate_norms=True))
    pieces = relative(own, FAMILY.weights(original.config))
    state = {
        name: torch.cat([tensors[p.tensor.name][p.start : p.start + p.rows] for p in ps]) for name, ps in pieces.items()
    }
    assert "decoder.layers.3.input_layernorm.weight" in state
    folder = tmp_path / "single"
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    for file in ("common.pt", "metadata.json"):
        (folder / file).write_bytes((release / file).read_bytes())
    assert_holds(MegatronReader(folder, Options()), original)


def test_the_vocabulary_is_padded_for_tensor_parallelism(tmp_path: Path) -> None:
    release = write_megatron(source("llama"), tmp_path, Options(shards="tp4pp2"))
    reader = MegatronReader(release, Options())
    assert "output_layer.weight: rows from 251 to 512 are padding of the vocabulary" in reader.notes
