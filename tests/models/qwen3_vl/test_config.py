"""config.json of Qwen3-VL both ways, published sizes, and shapes that do not fit.

Parameter counts of 2B, 4B and 8B are those that the hub gives for Qwen/Qwen3-VL-*-Instruct; all must be those of
transformers' model on the meta device, tensor by tensor.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers import Qwen3VLConfig as HFConfig
from transformers import Qwen3VLForConditionalGeneration

from tetrascope.engine.config import OptimizerSection, ParallelSection
from tetrascope.engine.config_file import validated
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Workload, make_pipeline
from tetrascope.errors import UserError
from tetrascope.models.family import family_of
from tetrascope.models.qwen3_vl import FAMILY
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig
from tetrascope.models.weights import logical_tensors
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.tools.verify.families.qwen3_vl import tiny_config

HUB_4B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
"""config.json of Qwen/Qwen3-VL-4B-Instruct, as transformers 4.57 wrote it."""


def changed(section: str | None, **values: Any) -> dict[str, Any]:
    raw = copy.deepcopy(HUB_4B)
    (raw if section is None else raw[section]).update(values)
    return raw


@pytest.mark.parametrize(
    ("name", "count"), [("2b", 2127532032), ("4b", 4437815808), ("8b", 8767123696), ("32b", 33357390064)]
)
def test_published_sizes(name: str, count: int) -> None:
    config = FAMILY.presets[name]()
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(HFConfig.from_dict(FAMILY.to_hf(config, "bfloat16")))
    ours = {name: tensor.shape for name, tensor in logical_tensors(FAMILY.weights(config)).items()}
    assert ours == {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert sum(math.prod(shape) for shape in ours.values()) == count


def test_the_hubs_config_json() -> None:
    before = copy.deepcopy(HUB_4B)
    assert FAMILY.from_hf(HUB_4B) == FAMILY.presets["4b"]()
    assert before == HUB_4B and family_of(HUB_4B) == "qwen3_vl"


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(tied=True), *(preset() for preset in FAMILY.presets.values())]
)
def test_config_json_round_trip(config: Qwen3VLConfig) -> None:
    raw = json.loads(json.dumps(FAMILY.to_hf(config, "bfloat16")))
    assert FAMILY.from_hf(raw) == config
    again = HFConfig.from_dict(raw).to_dict()
    assert FAMILY.from_hf(again) == config, "the form in which transformers 5 writes it"


def test_transformers_defaults_are_the_large_vision_encoder() -> None:
    large = FAMILY.to_hf(FAMILY.presets["8b"](), "bfloat16")["vision_config"]
    theirs = HFConfig(vision_config={"out_hidden_size": 4096}).vision_config.to_dict()
    assert all(list(theirs[k]) == v if isinstance(v, list) else theirs[k] == v for k, v in large.items())


def test_a_section_that_is_not_given_is_the_default() -> None:
    raw = copy.deepcopy(HUB_4B)
    del raw["text_config"]["rope_scaling"]
    assert FAMILY.from_hf(raw).mrope_section == (24, 20, 20)


def test_tie_may_sit_in_the_text_part() -> None:
    raw = copy.deepcopy(HUB_4B)
    del raw["tie_word_embeddings"]
    assert FAMILY.from_hf(raw).decoder.tied_embeddings


ROPE = HUB_4B["text_config"]["rope_scaling"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(None, model_type="qwen3_vl_moe"), "model_type is 'qwen3_vl_moe'"),
        (changed("text_config", rope_scaling={**ROPE, "rope_type": "yarn", "factor": 4.0}), "rope_type is 'yarn'"),
        (changed("text_config", rope_scaling={**ROPE, "mrope_interleaved": False}), "mrope_interleaved is False"),
        (changed("text_config", hidden_act="gelu"), "text_config.hidden_act is 'gelu'; only 'silu'"),
        (changed("text_config", attention_bias=True), "text_config.attention_bias is True"),
        (changed("text_config", attention_dropout=0.1), "text_config.attention_dropout is 0.1"),
        (changed("vision_config", hidden_act="relu"), "vision_config.hidden_act is 'relu'"),
        (changed("vision_config", out_hidden_size=2048), "vision_config.out_hidden_size is 2048; only 2560"),
        (changed("vision_config", num_position_embeddings=2305), "num_position_embeddings is 2305; only 2304"),
        (
            changed("vision_config", rope_parameters={"rope_type": "axial", "rope_theta": 100.0}),
            "vision_config.rope_parameters.rope_theta is 100.0",
        ),
    ],
)
def test_config_json_that_would_compute_something_else_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf(raw)


@pytest.mark.parametrize(
    ("decoder", "vision", "rest", "message"),
    [
        ({"head_dim": 23}, {}, {}, "head_dim: 23 must be even"),
        ({"kv_heads": 3}, {}, {}, "heads 4 must be a multiple of kv_heads 3"),
        ({"layers": -1}, {}, {}, r"decoder\.layers: -1 must be greater than 0"),
        ({"qkv_bias": True}, {}, {}, "qk_norm and no qkv_bias"),
        ({"qk_norm": False}, {}, {}, "qk_norm and no qkv_bias"),
        ({}, {"width": 36}, {}, "width 36 must be a multiple of 4 x heads 2"),
        ({}, {"table_side": 0}, {}, r"vision\.table_side: 0 must be greater than 0"),
        ({}, {"deepstack": (1, 0)}, {}, r"deepstack: \[1, 0\] must be ascending numbers of the blocks 0 to 2"),
        ({}, {"deepstack": (1, 1)}, {}, r"deepstack: \[1, 1\] must be ascending"),
        ({}, {"deepstack": (1, 3)}, {}, r"deepstack: \[1, 3\] must be ascending"),
        ({"layers": 1}, {}, {}, "2 features need as many decoder layers, the model has 1"),
        ({}, {}, {"mrope_section": (6, 3, 4)}, r"\[6, 3, 4\] must sum to half the head width, 12"),
        ({}, {}, {"mrope_section": (13, 3, -4)}, r"mrope_section: \[13, 3, -4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    decoder: dict[str, Any], vision: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    good = tiny_config()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(
            good,
            decoder=dataclasses.replace(good.decoder, **decoder),
            vision=dataclasses.replace(good.vision, **vision),
            **rest,
        )


def test_a_configuration_of_a_run() -> None:
    raw = dataclasses.asdict(tiny_config())
    raw["vision"]["deepstack"] = [0, 1]  # as YAML gives it
    assert validated(FAMILY.config_class, raw, "model.config") == tiny_config()


def cut_of(config: Any, **parallel: Any) -> Cut:
    modules = family_modules(FAMILY, config, OptimizerSection(lr=1))
    return make_pipeline(FAMILY, config, ParallelSection(**parallel), modules, Workload(2)).cut


def test_deepstack_layers_stay_on_the_first_stage() -> None:
    config = FAMILY.presets["32b"]()
    assert FAMILY.first_layers(config) == 3
    for pp in (1, 2, 4, 16, 60, 62):
        counts = cut_of(config, pp=pp).counts
        assert len(counts) == pp and counts[0] >= 3 and sum(counts) == 64
    folded = cut_of(config, pp=4, schedule="zb-v", vision_chunk=True)
    assert len(folded.counts) == 8 and folded.counts[0] >= 3 and sum(folded.counts) == 64
    tiny = tiny_config()
    cut_of(tiny, pp=4)
    cut_of(tiny, pp=2, split=[2, 3])
    with pytest.raises(UserError, match=r"parallel\.pp: 5 chunks .* need at least 6 .* must hold 2; lower .* to 4 or"):
        cut_of(tiny, pp=5)
    with pytest.raises(UserError, match=r"parallel\.split: \[1, 4\] gives the first chunk 1 layers, .* at least 2"):
        cut_of(tiny, pp=2, split=[1, 4])


def test_without_deepstack_the_first_stage_needs_one_layer() -> None:
    good = tiny_config()
    plain = dataclasses.replace(good, vision=dataclasses.replace(good.vision, deepstack=()))
    assert cut_of(plain, pp=5).counts == (1, 1, 1, 1, 1)


def test_costs_count_every_merger() -> None:
    v, cost = tiny_config().vision, tiny_config().vision_cost
    assert cost.adaptor == 3 * (128 * 128 + 128 * 64) and cost.patch == v.patch_width * 32 == 1536 * 32
