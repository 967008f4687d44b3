"""LLaVA-1.5 as Megatron-Core's LLaVAModel, and the language models of the other families.

The oracle is Megatron-Core's LLaVAModel from its own local layer specs (llava_jobs.py says what of them is changed):
strict loading, then its logits of samples with and without images against transformers'. The case's weights are scaled
so that exchanged patches or positions move the logits by a tenth of the largest and more (tools/verify/families).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tools.checkpoint_convert.megatron import llava_jobs
from tests.tools.checkpoint_convert.megatron.readers import Memory, assert_holds, write_megatron
from tetrascope.engine.data.collate import Document
from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, get_family
from tetrascope.models.llava import FAMILY
from tetrascope.models.weights import check_cover, logical_tensors
from tetrascope.tools.checkpoint_convert.formats import Options
from tetrascope.tools.checkpoint_convert.megatron.mapping import Naming, split
from tetrascope.tools.checkpoint_convert.megatron.model import Names, language_map, megatron_weights
from tetrascope.tools.checkpoint_convert.megatron.reader import MegatronReader
from tetrascope.tools.verify.families import get_oracle, llava
from tetrascope.tools.verify.pool import WorkerPool

CASE = llava.make_case()
BOUND = 5e-6
"""See test_gpt.py; the vision encoder before it adds as many additions again. Measured: 0 to 1.2e-6."""


def one_place_an_image(document: Document) -> Tensor:
    """Token ids with Megatron-Core's one place for each image, for transformers' one for each visual token."""
    ids, found = document.ids_T.tolist(), []
    tokens = document.media[0].tokens if document.media else 1
    while ids:
        image = ids[0] == llava.IMAGE
        found.append(llava_jobs.IMAGE_PLACE if image else ids[0])
        del ids[: tokens if image else 1]
    return torch.tensor(found)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_megatron_core_computes_what_transformers_does(number: int, pool: WorkerPool, tmp_path: Path) -> None:
    document = CASE.documents[number]
    release = write_megatron(Memory(FAMILY, CASE.config, CASE.weights), tmp_path, Options(layout="local"))
    model = llava.oracle(CASE.config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(CASE.weights[llava.name_on_disk(name)])
        expected = llava.forward(model, document, CASE.config)
    assert document.patches is not None
    images = llava.pixel_values(document.patches, CASE.config)
    ids = one_place_an_image(document)
    found = pool.run(llava_jobs.llava_logits, release, CASE.config, ids, images, world=1, timeout=180.0)[0]
    assert (found[:, : expected.shape[1]] - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["transformer-engine", "local"])
def test_the_whole_model_comes_back_bit_for_bit(layout: str, tied: bool, tmp_path: Path) -> None:
    case = llava.make_case(tied=tied)
    source = Memory(FAMILY, case.config, case.weights)
    write_megatron(source, tmp_path, Options(layout=layout))
    reader = MegatronReader(tmp_path, Options())
    assert reader.family is FAMILY and reader.config == case.config
    assert_holds(reader, source)


def test_norms_are_called_as_the_layer_spec_calls_them() -> None:
    for separate, norm in ((True, "input_layernorm.bias"), (False, "self_attention.linear_qkv.layer_norm_bias")):
        naming = Naming(separate_norms=separate)
        names = logical_tensors(megatron_weights(FAMILY, CASE.config, Names(True, Naming(), naming)))
        assert f"vision_model.decoder.layers.{norm}" in names
        # The language model's are fused in Megatron-Core's checkpoints, whatever the layer spec.
        assert "language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names


@pytest.mark.parametrize("stacked", [False, True])
def test_every_row_belongs_to_one_parameter(stacked: bool) -> None:
    naming = Naming(stacked=stacked)
    table = megatron_weights(FAMILY, CASE.config, Names(True, naming, naming))
    check_cover(table)
    assert table.keys() == FAMILY.weights(CASE.config).keys()


VARIANTS = [(name, variant) for name in FAMILIES for variant in get_oracle(name).variants()]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_language_model_of_every_family(name: str, variant: str, tmp_path: Path) -> None:
    case = get_oracle(name).variants()[variant]
    family = get_family(name)
    source = Memory(family, case.config, case.weights)
    language = logical_tensors(language_map(family, case.config)).keys()
    rest = "|".join(re.escape(tensor) for tensor in source.tensors.keys() - language)
    if name != "llava":
        with pytest.raises(UserError, match=rf"no model with the encoder and adaptor of {name} .* --allow '"):
            write_megatron(source, tmp_path / "refused")
    write_megatron(source, tmp_path / "gpt", Options(allow=(rest,)))
    reader = MegatronReader(tmp_path / "gpt", Options(allow=(rest,)))
    assert reader.absent == source.tensors.keys() - language
    assert_holds(reader, Memory(family, case.config, {n: t for n, t in case.weights.items() if n in language}))
    with pytest.raises(UserError, match=r"holds a GPTModel, the language model of .* alone"):
        MegatronReader(tmp_path / "gpt", Options())


def test_the_regular_expressions_that_the_error_names_are_enough(tmp_path: Path) -> None:
    for name in FAMILIES:
        case = next(iter(get_oracle(name).variants().values()))
        source = Memory(get_family(name), case.config, case.weights)
        if name == "llava":
            continue
        with pytest.raises(UserError) as caught:
            write_megatron(source, tmp_path / name)
        allow = tuple(re.findall(r"--allow '(.*?)'", str(caught.value)))
        assert write_megatron(source, tmp_path / name, Options(allow=allow)).is_dir()


def test_how_tensor_parallelism_cuts() -> None:
    layer = "decoder.layers.3."
    assert split(f"{layer}mlp.linear_fc1.weight", gated=True) == (0, 2)
    assert split(f"language_model.{layer}mlp.linear_fc1.weight", gated=True) == (0, 2)
    assert split(f"vision_model.{layer}mlp.linear_fc1.weight", gated=True) == (0, 1)
    assert split(f"{layer}mlp.linear_fc2.weight", gated=True) == (1, 1)
    assert split(f"{layer}mlp.linear_fc2.bias", gated=True) is None
    assert split(f"{layer}self_attention.linear_qkv.layer_norm_weight", gated=True) is None
    assert split("vision_projection.encoder.linear_fc2.weight", gated=True) == (1, 1)
    assert split("decoder.final_layernorm.weight", gated=True) is None
