"""Every published recipe can be loaded and planned at its real size.

Nothing is read but the recipe: sizes come from its preset. What a dry run cannot see by itself is checked here against
the papers: which modules learn, the batch, the learning rates.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tetrascope.engine.config_file import load_config
from tetrascope.engine.dryrun import DryRun, dry_run
from tetrascope.engine.modules import trained
from tetrascope.engine.setup import blueprint

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*/*.yaml") if load_config(path).model.preset)

# Which of vision, adaptor, language and embeddings learn; samples a step (0: tokens count); learning rates, ascending.
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
    "v2pe/finetune": ("vision adaptor language embeddings", 0, (5e-6,)),
    "longvila/stage4_256k": ("language embeddings", 16, (2e-5,)),
    "longvila/stage5_256frames": ("vision adaptor language embeddings", 128, (2e-5,)),
    "dynamic_llava/finetune": ("language embeddings", 64, (5e-6,)),
}


# Samples of an epoch over the batch (0: not by epochs), warm-up of the steps, last learning rate by the first, weight
# decay, longest sample.
SCHEDULES: dict[str, tuple[int, float, float, float, int]] = {
    "llava_1_5/stage1": (558_128, 0.03, 0.0, 0.0, 2048),
    "llava_1_5/stage2": (665_298, 0.03, 0.0, 0.0, 2048),
    "llava_onevision/stage1": (558_128, 0.03, 0.0, 0.0, 8192),
    "llava_onevision/stage1_5": (4_000_000, 0.03, 0.0, 0.0, 32768),
    "llava_onevision/stage2_single_image": (3_200_000, 0.03, 0.0, 0.0, 32768),
    "llava_onevision/stage2_onevision": (1_600_000, 0.03, 0.0, 0.0, 32768),
    "v2pe/finetune": (0, 0.03, 0.0, 0.05, 34000),
    "longvila/stage4_256k": (0, 2 / 80, 1.0, 0.0, 262144),
    "longvila/stage5_256frames": (6 * 15_000, 0.03, 0.0, 0.0, 131072),
    "dynamic_llava/finetune": (624_000, 0.03, 0.0, 0.0, 2048),
}
STEPS = {"v2pe/finetune": 20_000, "longvila/stage4_256k": 80}
BETAS = (0.9, 0.999)

# Tokens of a picture of 1920 x 1080 pixels: one view; 1 + 2 x 2 of them; 1 + 3 x 5, of which 9 are kept.
PICTURES = {
    "llava_onevision/stage1": 729,
    "llava_onevision/stage1_5": 729 + 30 * (54 + 1),
    "llava_onevision/stage2_single_image": 7269,
    "llava_onevision/stage2_onevision": 7269,
    "v2pe/finetune": 256 * (4 * 2 + 1),
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
    assert not samples or len(found.plan.draws) == samples
    own = {options.lr for options in found.blueprint.modules.values() if not options.frozen}
    assert tuple(sorted(own)) == rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_published_one(name: str) -> None:
    config = load_config(EXAMPLES / f"{name}.yaml")
    samples, warmup, last, weight_decay, max_tokens = SCHEDULES[name]
    steps, optimizer = config.train.steps, config.optimizer
    if samples:
        assert abs(steps - samples / (config.batch.samples or 0)) <= 0.006 * steps  # whole or round numbers
    else:
        assert steps == STEPS[name]
    assert abs(optimizer.warmup_steps - warmup * steps) <= 1
    assert (optimizer.min_lr_ratio, optimizer.weight_decay, optimizer.betas) == (last, weight_decay, BETAS)
    assert config.data.max_tokens == max_tokens


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_become_as_many_tokens_as_published(name: str) -> None:
    config = load_config(EXAMPLES / f"{name}.yaml")
    made = blueprint(config, None)
    assert made.family.media(made.model_config, config.data).image(1920, 1080, 1).tokens == PICTURES[name]


def test_v2pe_fills_32_packs_a_step() -> None:
    assert load_config(EXAMPLES / "v2pe/finetune.yaml").batch.packs == 32


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
