"""Starting from separate checkpoints of a language model, a vision encoder, an adaptor.

The oracle is the state dict of the transformers model that wrote the folder: a rank's shards must be its numbers, bit
for bit. Of what has no folder, one rank is the oracle of the other layouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.part_jobs import Cut, started
from tests.tiny import SPECIALS, write_config, write_tokenizer
from tetrascope.engine import parts
from tetrascope.engine.config_file import load_config
from tetrascope.engine.hf_files import TensorFolder
from tetrascope.engine.logical import Shard
from tetrascope.engine.parts import PartFolder, PartsSource, open_parts
from tetrascope.engine.setup import prepare
from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, Family, get_family
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.weights import logical_tensors, relative
from tetrascope.tools.verify.families import internvl, llava, llava_onevision, qwen2_vl
from tetrascope.tools.verify.pool import WorkerPool

VOCAB = 256 + len(SPECIALS)  # of the tiny tokenizer
OLD = 250  # of the language model: the others are new


def write_language(folder: Path, vocab: int = OLD, tied: bool = False, **changes: Any) -> dict[str, Tensor]:
    """A Qwen2 of the size of tests/tiny.py, biases and norms away from zero and one; returns its tensors."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**config | changes, vocab_size=vocab, tie_word_embeddings=tied))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assembled(ranks: list[tuple[str, list[Cut]]]) -> dict[str, Tensor]:
    """The logical tensors out of all ranks' shards, each element from somewhere; copies must be the same."""
    found: dict[str, Tensor] = {}
    for name, shape, offset, numbers in (cut for _, cuts in ranks for cut in cuts):
        whole = found.setdefault(name, torch.full(shape, torch.nan))
        place = whole[tuple(slice(o, o + n) for o, n in zip(offset, numbers.shape, strict=True))]
        assert torch.equal(place[~place.isnan()], numbers[~place.isnan()]), name
        place.copy_(numbers)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def grown(rows: Tensor, count: int) -> Tensor:
    mean = rows.double().mean(0, keepdim=True).float()
    return torch.cat([rows, mean.expand(count - len(rows), -1)])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run that starts from the language model in `llm`."""
    return write_config(tmp_path, model={"init_from": {"language": str(tmp_path / "llm")}})


LAYOUTS = [["parallel.tp=2"], ["parallel.pp=2"], ["parallel.tp=2", "parallel.dp=2"]]


def test_language_from_a_folder_the_rest_at_random_in_every_layout(
    pool: WorkerPool, config: Path, tmp_path: Path
) -> None:
    theirs = write_language(tmp_path / "llm")
    one = pool.run(started, config, [], world=1)
    assert one[0][0] == (
        f"starting from language from {tmp_path / 'llm'} (13 new tokens after 250, at the mean of these), "
        "vision, adaptor at random"
    )
    ours = assembled(one)
    assert ours.keys() == logical_tensors(FAMILY.weights(prepare(load_config(config), 1).model_config)).keys()
    for name, tensor in theirs.items():
        if len(tensor) == OLD:
            assert ours[name].shape == (VOCAB, 32)
            torch.testing.assert_close(ours[name][OLD:], grown(tensor, VOCAB)[OLD:], rtol=1e-6, atol=1e-8)
        assert torch.equal(ours[name][: len(tensor)], tensor), name
    kernel = ours["visual.patch_embed.proj.weight"]
    assert 0.018 < kernel.std() < 0.022, "at random, with the family's deviation"
    assert ours["visual.merger.ln_q.weight"].eq(1).all()
    for overrides in LAYOUTS:
        world = 2 ** len(overrides)
        split = assembled(pool.run(started, config, [*overrides, f"output.dir={tmp_path / 'run'}"], world=world))
        assert split.keys() == ours.keys()
        assert not [name for name, tensor in ours.items() if not torch.equal(split[name], tensor)], overrides


def test_a_tied_language_model(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    theirs = write_language(tmp_path / "llm", tied=True)
    assert "lm_head.weight" not in theirs
    tied = ["model.config.decoder.tied_embeddings=true"]
    ours = assembled(pool.run(started, config, [*tied, "parallel.pp=2"], world=2))
    assert torch.equal(ours["model.embed_tokens.weight"][:OLD], theirs["model.embed_tokens.weight"])
    assert "lm_head.weight" not in ours


def opened(folder: Path, name: str, family: Family, config: Any) -> PartFolder:
    (part,) = open_parts({name: folder}, family, config)  # type: ignore[dict-item]
    part.check()
    return part


def all_of(part: PartFolder, name: str) -> Tensor:
    shape = part.logical[name].matrix
    return part(Shard(name, shape, (0,) * len(shape), torch.empty(shape)))


TINY = {
    "hidden": 32,
    "intermediate": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
}


def tiny(vocab: int, **changes: Any) -> Any:
    """qwen2_vl around the tiny language model."""
    config = qwen2_vl.tiny_config()
    decoder = replace(config.decoder, head_dim=8, vocab=vocab, **TINY | changes)
    return replace(config, decoder=decoder, mrope_section=(1, 1, 2))


def test_the_mean_is_over_all_rows_and_read_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = write_language(tmp_path)
    expected = grown(theirs["lm_head.weight"], VOCAB)
    monkeypatch.setattr(parts, "MEAN_ROWS", 30)  # does not divide 250
    read: list[int] = []
    real = TensorFolder.read

    def spy(self: TensorFolder, name: str, place: tuple[slice, ...] = ()) -> Tensor:
        found = real(self, name, place)
        read.append(len(found))
        return found

    monkeypatch.setattr(TensorFolder, "read", spy)
    part = opened(tmp_path, "language", FAMILY, tiny(VOCAB))
    assert not read, "checks look at headers"
    across = part(Shard("lm_head.weight", (VOCAB, 32), (248, 5), torch.empty(5, 20)))
    torch.testing.assert_close(across, expected[248:253, 5:25], rtol=1e-6, atol=1e-8)
    assert torch.equal(part(Shard("lm_head.weight", (VOCAB, 32), (260, 5), torch.empty(2, 20))), across[[2, 2]])
    assert max(read) <= 30 and sum(read) == 250 + 2, "once for both"


def test_padded_vocabularies_are_cut_where_the_tokenizer_shows_it(tmp_path: Path) -> None:
    theirs = write_language(tmp_path, vocab=VOCAB + 9)
    text = rf"model\.init_from\.language: .* has rows for {VOCAB + 9} tokens, the model's vocabulary has {VOCAB}"
    with pytest.raises(UserError, match=text + rf"; set model\.config\.decoder\.vocab={VOCAB + 9}, or add its token"):
        opened(tmp_path, "language", FAMILY, tiny(VOCAB))
    write_tokenizer(tmp_path)
    part = opened(tmp_path, "language", FAMILY, tiny(VOCAB))
    assert str(part).endswith(f"(without 9 rows of padding after {VOCAB} tokens)")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(all_of(part, name), theirs[name][:VOCAB])
    text = rf"has rows for {VOCAB + 9} tokens, the model's vocabulary has {VOCAB - 1}, but its tokenizer {VOCAB}; set"
    with pytest.raises(UserError, match=text):
        opened(tmp_path, "language", FAMILY, tiny(VOCAB - 1))
    assert " (" not in str(opened(tmp_path, "language", FAMILY, tiny(VOCAB + 9)))


def changed(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


BAD_FOLDERS: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    # Shapes cannot tell these.
    ({"num_attention_heads": 8, "num_key_value_heads": 4}, {}, r"says num_attention_heads 8, num_key_value_heads 4, "),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}, r"says rope_theta 10000\.0, model\.preset"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, {}, r"says rope_type 'linear', "),
    ({"rms_norm_eps": 1e-5}, {}, r"says rms_norm_eps 1e-05, model\.preset and model\.config say decoder\.rms_eps 1e-0"),
    (
        {"hidden_act": "gelu"},
        {},
        r"says hidden_act 'gelu', model\.preset and model\.config say decoder \(activation\) ",
    ),
    ({"use_sliding_window": True, "sliding_window": 8}, {}, r"says use_sliding_window True"),
    ({"tied": True}, {}, r"says tie_word_embeddings True, .* say decoder\.tied_embeddings False; change model\.config"),
    ({"num_hidden_layers": 3}, {}, r"says num_hidden_layers 3, .* say decoder\.layers 2"),
    ({}, {"model.norm.weight": None}, r"lacks 1 tensors \(model\.norm\.weight\)"),
    ({}, {"model.norm.bias": torch.zeros(32)}, r"holds 1 tensors \(model\.norm\.bias\) besides"),
    ({}, {"model.norm.weight": torch.zeros(31)}, r"model\.norm\.weight has shape \(31,\), the configuration expects"),
    (
        {},
        {"lm_head.weight": torch.zeros(OLD, 31)},
        r"lm_head\.weight has shape \(250, 31\), the configuration expects ",
    ),
    ({}, {"lm_head.weight": torch.zeros(9, 32)}, r"lm_head\.weight 9 and model\.embed_tokens\.weight 250; both must"),
]


@pytest.mark.parametrize(("settings", "tensors", "message"), BAD_FOLDERS, ids=[bad[2][:40] for bad in BAD_FOLDERS])
def test_a_folder_that_does_not_fit_is_named_before_anything_starts(
    settings: dict[str, Any], tensors: dict[str, Tensor | None], message: str, config: Path, tmp_path: Path
) -> None:
    write_language(tmp_path / "llm", **settings)
    changed(tmp_path / "llm", tensors)
    with pytest.raises(UserError, match=message) as error:
        prepare(load_config(config), 1)
    assert str(tmp_path / "llm") in str(error.value)


def test_a_folder_of_another_kind_is_named(config: Path, tmp_path: Path) -> None:
    write_language(tmp_path / "llm")
    raw = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    text = r"init_from\.language: .*llm: config\.json: model_type is 'llama', the model needs 'qwen2'; give another fol"
    with pytest.raises(UserError, match=text):
        prepare(load_config(config), 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{visoin: a}", r"unknown part 'visoin'; known parts: language, vision, adaptor$"),
        ("{}", r"empty; give a folder for at least one of language, vision, adaptor"),
        ("{vision: 3}", r"expected a folder, or a folder for each of some parts \(language, vision, adaptor\)"),
        ("{vision: }", r"expected a folder"),
        ("[a, b]", r"expected a folder"),
    ],
)
def test_what_init_from_cannot_be(value: str, message: str, config: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(config, [f"model.init_from={value}"])
    assert str(error.value).count("'model.init_from'") == 1, "one message, not one for each type that it might have had"


def test_sizes_come_from_preset_or_config(config: Path) -> None:
    with pytest.raises(UserError, match=r"give config .* or preset .* to train from scratch or from separate parts"):
        prepare(load_config(config, ["model.config=null"]), 1)


def test_a_family_that_does_not_take_a_part_says_so() -> None:
    only = replace(FAMILY, parts={"language": FAMILY.parts["language"]})
    with pytest.raises(UserError, match=r"init_from\.vision: qwen2_vl cannot start its vision from .*; it takes langu"):
        open_parts({"vision": Path("x")}, only, tiny(VOCAB))


@pytest.mark.parametrize("original", [True, False], ids=["published names", "names in memory"])
def test_encoder_and_adaptor_out_of_a_whole_model(original: bool, tmp_path: Path) -> None:
    case = qwen2_vl.make_case()
    model = qwen2_vl.oracle(case.config)
    weights = {qwen2_vl.name_on_disk(name): param.detach() for name, param in model.named_parameters()}
    model.save_pretrained(tmp_path, save_original_format=original)
    found = {
        part: opened(tmp_path, part, FAMILY, replace(case.config, decoder=replace(case.config.decoder, vocab=99)))
        for part in ("vision", "adaptor")
    }
    visual = {name for name in weights if name.startswith("visual.")}
    assert found["vision"].logical.keys() | found["adaptor"].logical.keys() == visual
    assert not found["vision"].logical.keys() & found["adaptor"].logical.keys()
    for part in found.values():
        for name, tensor in part.logical.items():
            assert torch.equal(all_of(part, name), weights[name].reshape(tensor.matrix)), name
    other = replace(case.config, vision=replace(case.config.vision, heads=4))
    with pytest.raises(UserError, match=r"says vision\.heads 2, model\.preset and model\.config say vision\.heads 4"):
        opened(tmp_path, "vision", FAMILY, other)


def write_tower(folder: Path, kind: str, alone: bool, **vision: Any) -> dict[str, Tensor]:
    """CLIP or SigLIP; returns the tensors of its encoder, without prefix."""
    import transformers

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}VisionConfig")(**vision)
    if alone:
        model = getattr(transformers, f"{kind}VisionModel")(config)
    else:
        whole = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=config.to_dict())
        model = getattr(transformers, f"{kind}Model")(whole)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return tensors if alone else {n.removeprefix("vision_model."): t for n, t in tensors.items() if "vision_m" in n}


def tower(shape: Any, dropped: int = 0) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers + dropped,
        "num_attention_heads": shape.heads,
        "image_size": shape.image,
        "patch_size": shape.patch,
        "hidden_act": shape.activation,
        "layer_norm_eps": shape.norm_eps,
    }


TOWERS: dict[str, tuple[str, str, Callable[[], Any], int]] = {
    "clip": ("llava", "CLIP", llava.tiny_config, 0),
    "siglip": ("llava_onevision", "Siglip", llava_onevision.tiny_config, 1),
}


@pytest.mark.parametrize("alone", [True, False], ids=["encoder alone", "with text encoder"])
@pytest.mark.parametrize("name", TOWERS)
def test_an_encoder_of_transformers(name: str, alone: bool, tmp_path: Path) -> None:
    family_name, kind, make, dropped = TOWERS[name]
    family, config = get_family(family_name), make()
    theirs = write_tower(tmp_path, kind, alone, **tower(config.vision, dropped))
    part = opened(tmp_path, "vision", family, config)
    prefix = "vision_tower.vision_model."
    assert part.logical.keys() == {n for n in logical_tensors(family.weights(config)) if n.startswith(prefix)}
    for name, tensor in part.logical.items():
        assert torch.equal(all_of(part, name), theirs[name.removeprefix(prefix)].reshape(tensor.matrix)), name
    for field, value, text in (
        ("heads", config.vision.heads * 2, "num_attention_heads"),
        ("activation", "gelu", "hidden_act"),
        ("norm_eps", 1e-3, "layer_norm_eps"),
        ("layers", config.vision.layers - 1, "num_hidden_layers"),
    ):
        other = replace(config, vision=replace(config.vision, **{field: value}, used=1))
        with pytest.raises(UserError, match=rf"init_from\.vision: .*config\.json says {text} .* say vision\.{field}"):
            opened(tmp_path, "vision", family, other)


def test_an_encoder_of_another_kind_is_named(tmp_path: Path) -> None:
    config = llava.tiny_config()
    write_tower(tmp_path, "Siglip", True, **tower(config.vision))
    with pytest.raises(UserError, match="model_type is 'siglip_vision_model', the model needs 'clip_vision_model'"):
        opened(tmp_path, "vision", get_family("llava"), config)


@pytest.mark.parametrize("make", [llava.tiny_config, llava_onevision.tiny_config], ids=["llava", "llava_onevision"])
def test_the_projector_that_llavas_first_stage_writes(make: Callable[[], Any], tmp_path: Path) -> None:
    """`mm_projector.bin`: without LLaVA-OneVision's newline, which then starts at random; a whole model has it."""
    family = get_family(make.__module__.rpartition(".")[2])
    config = make()
    shapes = {
        "0.weight": (config.decoder.hidden, config.vision.width),
        "0.bias": (config.decoder.hidden,),
        "2.weight": (config.decoder.hidden, config.decoder.hidden),
        "2.bias": (config.decoder.hidden,),
    }
    theirs = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    torch.save(theirs, tmp_path / "mm_projector.bin")
    part = opened(tmp_path, "adaptor", family, config)
    names = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
    for ours, tensor in zip(names, theirs.values(), strict=True):
        assert torch.equal(all_of(part, f"multi_modal_projector.{ours}"), tensor)
    line = str(PartsSource([part], family.weights(config), lambda shard: torch.zeros(shard.tensor.shape)))
    newline = "adaptor.newline, " if family.name == "llava_onevision" else ""
    assert line == f"adaptor from {tmp_path}, vision, {newline}embed, layers, norm, head at random"
    torch.save({f"model.{n}": t for n, t in theirs.items()}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"model\.init_from\.adaptor: .* lacks 4 tensors"):
        opened(tmp_path, "adaptor", family, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_every_family_fit_its_parameters(name: str) -> None:
    family = get_family(name)
    assert set(family.parts) >= {"language", "vision", "adaptor"}
    for preset in family.presets.values():
        config = preset()
        model = family.weights(config)
        served = set()
        for part in family.parts.values():
            for layout in part.layouts.values():
                own = layout.weights(config)
                served |= own.keys()
                relative({parameter: model[parameter] for parameter in own}, own)
        assert served == model.keys()


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_internvl_from_a_language_model_and_an_internvit(kind: str, tmp_path: Path) -> None:
    """Their folders have the names of a whole InternVL without the first one."""
    family, config = get_family("internvl"), internvl.tiny_config(kind)
    names = {"vision": "vision_model.", "language": "language_model."}
    d = config.decoder
    raw = {
        "language": {
            "model_type": kind,
            "hidden_size": d.hidden,
            "intermediate_size": d.intermediate,
            "num_hidden_layers": d.layers,
            "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads,
            "rms_norm_eps": d.rms_eps,
            "rope_theta": d.rope_theta,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        },
        "vision": {
            "model_type": "intern_vit_6b",
            "num_channels": 3,
            "qk_normalization": False,
            "qkv_bias": True,
            "norm_type": "layer_norm",
            **tower(config.vision),
        },
    }
    for name, prefix in names.items():
        folder = tmp_path / name
        folder.mkdir()
        logical = {n: t for n, t in logical_tensors(family.weights(config)).items() if n.startswith(prefix)}
        theirs = {n: torch.randn(t.shape) for n, t in logical.items()}
        vocabulary = {n for n, t in logical.items() if t.shape[0] == d.vocab}
        assert len(vocabulary) == 2 * (name == "language")
        theirs |= {n: theirs[n][:-3] for n in vocabulary}
        save_file({n.removeprefix(prefix): t.contiguous() for n, t in theirs.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw[name]))
        part = opened(folder, name, family, config)
        assert part.logical.keys() == logical.keys()
        for n, tensor in part.logical.items():
            expected = grown(theirs[n], d.vocab) if n in vocabulary else theirs[n].reshape(tensor.matrix)
            torch.testing.assert_close(all_of(part, n), expected, rtol=1e-6, atol=1e-8)
    for name, key, value in [("language", "rope_theta", 9.0), ("vision", "qk_normalization", True)]:
        (tmp_path / name / "config.json").write_text(json.dumps(raw[name] | {key: value}))
        with pytest.raises(UserError, match=rf"says {key} {value}"):
            opened(tmp_path / name, name, family, config)
