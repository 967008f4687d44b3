"""Every published recipe can be loaded and planned at its real size.

Nothing is read but the recipe: sizes come from its preset. What a dry run cannot see by itself is checked here against
the papers: which modules learn, the batch, the learning rates.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tetrascope.engine.config import load_config
from tetrascope.engine.dryrun import DryRun, dry_run
from tetrascope.engine.modules import trained

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*/*.yaml") if load_config(path).model.preset)

# Which of vision, adaptor, language and embeddings learn; samples a step; learning rates from lowest to highest.
PUBLISHED: dict[str, tuple[str, int, tuple[float, ...]]] = {
    "qwen2_vl/stage1": ("vision adaptor", 512, (1e-4,)),
    "qwen2_vl/stage2": ("vision adaptor language embeddings", 1024, (5e-5,)),
    "qwen2_vl/stage3": ("adaptor language embeddings", 256, (1e-5,)),
    "llava_1_5/stage1": ("adaptor", 256, (1e-3,)),
    "llava_1_5/stage2": ("adaptor language embeddings", 128, (2e-5,)),
    "llava_onevision/stage1": ("adaptor", 512, (1e-3,)),
    "llava_onevision/stage1_5": ("vision adaptor language embeddings", 256, (2e-6, 1e-5)),
    "llava_onevision/stage2_single_image": ("vision adaptor language embeddings", 256, (2e-6, 1e-5)),
    "llava_onevision/stage2_onevision": ("vision adaptor language embeddings", 256, (2e-6, 1e-5)),
    "v2pe/finetune": ("vision adaptor language embeddings", 128, (5e-6,)),
    "longvila/stage4_256k": ("language embeddings", 16, (2e-5,)),
    "longvila/stage5_256frames": ("vision adaptor language embeddings", 128, (2e-5,)),
    "dynamic_llava/finetune": ("language embeddings", 64, (5e-6,)),
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_recipe_is_in_the_table() -> None:
    assert {name_of(path) for path in RECIPES} == set(PUBLISHED)


@pytest.fixture(scope="module", params=RECIPES, ids=name_of)
def planned(request: pytest.FixtureRequest) -> tuple[str, DryRun]:
    return name_of(request.param), dry_run(load_config(request.param))


def test_it_trains_what_the_paper_trains(planned: tuple[str, DryRun]) -> None:
    name, found = planned
    modules, samples, rates = PUBLISHED[name]
    learning = trained(found.blueprint.modules)
    assert [part for part, on in vars(learning).items() if on] == modules.split()
    assert len(found.plan.draws) == samples
    own = {options.lr for options in found.blueprint.modules.values() if not options.frozen}
    assert tuple(sorted(own)) == rates


def test_ranks_hold_the_whole_model_and_it_fits(planned: tuple[str, DryRun]) -> None:
    _, found = planned
    made = found.blueprint
    weights = made.family.weights(made.model_config)
    pieces = {piece for of_param in weights.values() for piece in of_param}
    whole = sum(piece.rows * (piece.tensor.matrix[1] if len(piece.tensor.matrix) > 1 else 1) for piece in pieces)
    held = sum(stage.parameters for stage in found.stages)
    # Divided parameters add up over the tensor-parallel ranks, replicated ones (norms, position tables) are extra.
    assert whole / made.layout.tp <= held <= 1.02 * whole / made.layout.tp + whole * 0.02
    assert sum(len(stage.layers) for stage in found.stages) == made.model_config.decoder.layers
    assert max(stage.bytes for stage in found.stages) < 60 * 2**30  # of 80 GiB: the rest is for activations
    assert all(micro.samples for rank in found.plan.micro_batches for micro in rank)
    assert found.flops > 0
