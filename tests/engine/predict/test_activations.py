"""Formulas of activation bytes against what autograd saves.

The oracle is autograd itself: every tensor that a real layer hands it is seen by a hook, and storages are counted once,
so that views cost nothing. Widths differ from each other, so that one taken for another shows. A decoder layer's
formula names every tensor, and is exact. Encoders differ by family in what surrounds their blocks (position tables,
class tokens, windows); there 10 % is asked for, and 3 % is reached.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.predict.saved import pretended_ranks, saved_bytes
from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.data.collate import collate
from tetrascope.engine.modules import family_modules
from tetrascope.engine.predict import Candidate, MicroBatchShape, Model, activations, load_hardware, prepare
from tetrascope.engine.recompute import Recompute
from tetrascope.models.family import FAMILIES, Stage, get_family
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.layers.decoder import DecoderLayer, DecoderShape
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.rotary import linear_tables
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from tetrascope.tools.verify.families import get_oracle

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("lengths", [(64,), (32, 32), (20, 44), (44, 20)], ids=str)
def test_decoder_layer_is_exact(dtype: str, kv_heads: int, qk_norm: bool, lengths: tuple[int, ...]) -> None:
    shape = DecoderShape(56, 96, 1, 4, kv_heads, 100, 1e-6, 1e4, True, False, qk_norm=qk_norm, head_dim=16)
    layer = DecoderLayer(shape, sdpa_attention).to(DTYPES[dtype])
    tables = linear_tables(256 * torch.arange(64)[None], shape.head_dim, shape.rope_theta)
    x = torch.randn(64, shape.hidden, dtype=DTYPES[dtype], requires_grad=True)
    given = [*layer.parameters(), tables.cos_TD, tables.sin_TD]
    counted = saved_bytes(lambda: layer(x, Packed(lengths), tables), given)
    assert activations.decoder_layer(shape, lengths, 1, BYTES[dtype]).whole == counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_is_not_trained(dtype: str) -> None:
    """What only gradients of weights need is not kept; exact too."""
    shape = DecoderShape(56, 96, 1, 4, 2, 100, 1e-6, 1e4, True, False, head_dim=16)
    layer = DecoderLayer(shape, sdpa_attention).to(DTYPES[dtype]).requires_grad_(False)
    tables = linear_tables(256 * torch.arange(64)[None], shape.head_dim, shape.rope_theta)
    x = torch.randn(64, shape.hidden, dtype=DTYPES[dtype], requires_grad=True)
    given = [*layer.parameters(), tables.cos_TD, tables.sin_TD]
    counted = saved_bytes(lambda: layer(x, Packed((30, 34)), tables), given)
    found = activations.decoder_layer(shape, (30, 34), 1, BYTES[dtype], trained=False)
    assert found.whole == counted
    assert found.rest == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_encoder_block_encoder_and_head(name: str, dtype: str) -> None:
    family, case = get_family(name), next(iter(get_oracle(name).variants().values()))
    config, documents, e = case.config, case.documents[: case.batch], BYTES[dtype]
    d = config.decoder
    model: Any = family.build(config, Stage(range(d.layers), first=True, last=True), sdpa_attention).to(DTYPES[dtype])
    rows = sum(len(one.ids_T) for one in documents)
    inputs = collate(documents, family, config, rows, 1, 0, True, CPU).inputs.vision
    assert inputs is not None
    media = [one for document in documents for one in document.media]
    shape = activations.encoder_shape(config, family.weights(config))

    taken: list[tuple[Any, tuple[Any, ...]]] = []
    for block in model.vision.blocks:
        block.register_forward_pre_hook(lambda module, given: taken.append((module, given)))
    whole = saved_bytes(lambda: model.vision(inputs), [*model.parameters()])
    windowed = config.vision_cost.window_attention
    windowed /= config.vision_cost.attention + windowed
    assert activations.encoder(shape, media, windowed, 1, e).whole == pytest.approx(whole, rel=0.1)

    for block, (x, packed, *more) in taken[:2]:
        x = x.detach().requires_grad_()
        tables = [t for one in more for t in vars(one).values()]
        counted = saved_bytes(lambda: block(x, packed, *more), [*model.parameters(), *tables])  # noqa: B023
        found = activations.encoder_block(shape, packed.lengths, 1, e)
        assert found.whole == pytest.approx(counted, rel=0.03)

    hidden = torch.randn(rows, d.hidden, dtype=DTYPES[dtype], requires_grad=True)
    labels, group = torch.zeros(rows, dtype=torch.int64), SimpleNamespace(size=lambda: 1)

    def loss() -> torch.Tensor:
        return vocab_parallel_cross_entropy(model.head(model.norm(hidden)), labels, 0, group)  # type: ignore[arg-type]

    assert activations.head(d, rows, 1, e).whole == pytest.approx(saved_bytes(loss, [*model.parameters()]), rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
def test_chunks_of_the_engine_under_tensor_parallelism(tp: int, stage: int, recompute: Recompute) -> None:
    """What `prepare` says a stage keeps of a micro-batch, against the engine's own stage on a pretended rank.

    Stage 0 encodes images, stage 1 ends with the loss.
    """
    family = get_family("qwen2_vl")
    case = next(iter(get_oracle("qwen2_vl").variants().values()))
    config, documents = case.config, case.documents[: case.batch]
    modules = family_modules(family, config, OptimizerSection(lr=1e-3))
    layout = Layout(pp=2, tp=tp)
    cut = Cut.of((0, 1), (1, config.decoder.layers - 1))
    rows = -(-sum(len(one.ids_T) for one in documents) // 2) * 2
    with pretended_ranks(layout.world, layout.rank({"pp": stage, "dp": 0, "ring": 0, "ulysses": 0, "tp": 0})):
        mesh = Mesh(layout, "cpu")
        model = StageModel(family, config, mesh, cut, sdpa_attention, torch.float32, modules, recompute)
        build_optimizer(model, OptimizerSection(lr=1e-3), CPU)
        batch = collate(documents, family, config, rows, tp, 0, stage == 0, CPU)
        hidden = torch.randn(rows // tp, config.decoder.hidden, requires_grad=True)
        given = [*model.chunks[stage].parameters(), batch.inputs.token_ids_T, batch.inputs.positions_AT]
        labels = torch.zeros(rows, dtype=torch.int64)

        def forward() -> object:
            out = model.run(stage, batch.inputs, () if stage == 0 else (hidden,))
            return out if stage == 0 else vocab_parallel_cross_entropy(out[0], labels, 0, mesh.group("tp"))

        counted = saved_bytes(forward, given)
    media = tuple(one for document in documents for one in document.media)
    micro = MicroBatchShape(tuple(len(one.ids_T) for one in documents), media, rows)
    ready = prepare(
        Model(family, config, modules, "float32"),
        Candidate(layout, cut, "1f1b", recompute),
        [micro],
        load_hardware("cpu"),
    )
    assert ready.costs.activation_bytes is not None
    assert ready.costs.activation_bytes[stage][0] == pytest.approx(counted, rel=0.1)
