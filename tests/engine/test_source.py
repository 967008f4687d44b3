"""Reading Hugging Face folders: every layout, every file format, only what is asked for, and errors that name it.

The oracle is the parameters themselves: each layout's tensors are put together from them by plain indexing, and what
a folder serves must be the canonical tensors' numbers, whatever the folder looks like.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tetrascope.engine.hf_files import TensorFolder
from tetrascope.engine.logical import Shard, shards
from tetrascope.engine.source import HuggingFaceFolder, Source, fill, memory_source, read_hf_config
from tetrascope.errors import UserError
from tetrascope.models.weights import CheckpointLayout, HFTensor, Piece, WeightMap, renamed, whole
from tetrascope.parallel.tensor.placement import whole as undivided

CANONICAL: WeightMap = {
    "kernel": (whole("kernel", (4, 3, 2, 2, 2)),),
    "qkv": (whole("q", (4, 7)), whole("k", (2, 7)), whole("v", (2, 7))),
    "norm": (whole("norm", (6,)),),
    "positions": (whole("positions", (1, 5, 4), view=(5, 4)),),
    "embed": (whole("embed", (5, 3)),),
    "head": (whole("embed", (5, 3)),),
}
TENSORS = {
    "kernel": torch.arange(96.0).reshape(4, 3, 2, 2, 2),
    "q": torch.arange(28.0).reshape(4, 7),
    "k": torch.arange(100.0, 114.0).reshape(2, 7),
    "v": torch.arange(200.0, 214.0).reshape(2, 7),
    "norm": torch.arange(6.0),
    "positions": torch.arange(20.0).reshape(1, 5, 4),
    "embed": torch.arange(15.0).reshape(5, 3),
}

WQKV = HFTensor("wqkv", (8, 7))
FUSED: WeightMap = {
    **CANONICAL,
    "qkv": (Piece(WQKV, 0, 2), Piece(WQKV, 4, 2), *(Piece(WQKV, row, 1) for row in (2, 6, 3, 7))),
    "positions": (whole("positions", (5, 4)),),
}
FUSED_TENSORS = {name: TENSORS[name] for name in ("kernel", "norm", "embed")} | {
    "wqkv": torch.cat([t for i in range(2) for t in (TENSORS["q"][2 * i :][:2], TENSORS["k"][[i]], TENSORS["v"][[i]])]),
    "positions": TENSORS["positions"][0],
}
IN_FOLDERS = [(r"kernel", "tower/kernel"), (r"positions", "tower/positions"), (r"", "llm/")]


def no_files(config: Any, dtype: str) -> dict[str, dict[str, Any]]:
    return {}


LAYOUTS = {
    "plain": CheckpointLayout(lambda c: CANONICAL, no_files, (r".*inv_freq",), lambda c: {"lm_head": "embed"}),
    "fused": CheckpointLayout(lambda c: FUSED, no_files),
    "folders": CheckpointLayout(lambda c: renamed(CANONICAL, IN_FOLDERS), no_files),
}
CONTENTS = {
    "plain": TENSORS,
    "fused": FUSED_TENSORS,
    "folders": {("tower/" if name in ("kernel", "positions") else "llm/") + name: t for name, t in TENSORS.items()},
}

CUTS = [
    Shard("q", (4, 7), (0, 0), torch.empty(4, 7)),
    Shard("q", (4, 7), (1, 3), torch.empty(2, 4)),
    Shard("k", (2, 7), (0, 0), torch.empty(2, 7)),
    Shard("v", (2, 7), (1, 6), torch.empty(1, 1)),
    Shard("norm", (6,), (2,), torch.empty(3)),
    Shard("kernel", (4, 24), (0, 0), torch.empty(4, 24)),
    Shard("kernel", (4, 24), (2, 5), torch.empty(1, 11)),
    Shard("positions", (5, 4), (1, 2), torch.empty(3, 2)),
    Shard("embed", (5, 3), (3, 0), torch.empty(2, 3)),
]


def assert_cuts_are_right(source: Source, tensors: Mapping[str, Tensor] = TENSORS) -> None:
    for shard in CUTS:
        place = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
        assert torch.equal(source(shard), tensors[shard.name].reshape(shard.shape)[place]), shard.name


def write_files(folder: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    """One file, or one a tensor with an index; in safetensors or pickled, as torch does now or did before 1.6."""
    folder.mkdir(exist_ok=True)
    single = "model.safetensors" if kind.startswith("safetensors") else "pytorch_model.bin"

    def write(file: str, part: dict[str, Tensor]) -> None:
        if kind.startswith("safetensors"):
            save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization="old" not in kind)

    if kind.endswith("index"):
        stem, _, suffix = single.partition(".")
        where = {name: f"{stem}-{i:05d}.{suffix}" for i, name in enumerate(tensors)}
        for name, file in where.items():
            write(file, {name: tensors[name]})
        (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        write(single, dict(tensors))


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], kind: str = "safetensors") -> None:
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, inside = name.rpartition("/")
        places.setdefault(place, {})[inside] = tensor
    for place, part in places.items():
        write_files(folder / place, part, kind)


KINDS = ["safetensors", "safetensors index", "bin", "bin index", "old bin"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_format_serves_the_same_numbers(layout: str, kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONTENTS[layout], kind)
    folder = HuggingFaceFolder(tmp_path, LAYOUTS, None)
    folder.check()
    assert folder.layout == layout
    assert_cuts_are_right(folder)


def test_memory_gives_slices() -> None:
    assert_cuts_are_right(memory_source(TENSORS))


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, FUSED_TENSORS)
    folder = HuggingFaceFolder(tmp_path, LAYOUTS, None)
    read: list[tuple[str, tuple[slice, ...]]] = []
    real = TensorFolder.read

    def spy(self: TensorFolder, name: str, place: tuple[slice, ...] = ()) -> Tensor:
        read.append((name, place))
        return real(self, name, place)

    monkeypatch.setattr(TensorFolder, "read", spy)
    folder(Shard("q", (4, 7), (1, 3), torch.empty(2, 4)))
    assert read == [("wqkv", (slice(1, 2), slice(3, 7))), ("wqkv", (slice(4, 5), slice(3, 7)))]


def test_fill_converts_to_the_parameters_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    target = torch.empty(8, 7, dtype=torch.bfloat16, requires_grad=True)
    fill(
        shards(target.view(-1), 0, (8, 7), undivided((8, 7)), CANONICAL["qkv"]),
        HuggingFaceFolder(tmp_path, LAYOUTS, None),
    )
    assert torch.equal(target.detach(), torch.cat([TENSORS[name] for name in "qkv"]).bfloat16())


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: -tensor for name, tensor in TENSORS.items()}, "bin index")
    write_checkpoint(tmp_path, TENSORS)
    assert_cuts_are_right(HuggingFaceFolder(tmp_path, LAYOUTS, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, r"taken for layout 'plain', lacks 1 tensors \(k\); it belongs to another model or is incomplete"),
        ({"bias": torch.zeros(2)}, r"taken for layout 'plain', holds 1 tensors \(bias\) besides"),
        (
            {"norm": None, "bias": torch.zeros(2), "inv_freq.x": torch.zeros(2)},
            r"lacks 1 tensors \(norm\) and holds 2 tensors \(bias, inv_freq\.x\) besides",
        ),
    ],
)
def test_missing_and_unexpected_tensors_are_named(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    write_checkpoint(tmp_path, changed)
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)


def test_the_nearest_layout_is_compared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: t for name, t in CONTENTS["folders"].items() if name != "llm/norm"})
    with pytest.raises(UserError, match=r"taken for layout 'folders', lacks 1 tensors \(llm/norm\);"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)


def test_buffers_may_be_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**TENSORS, "layers.0.rotary.inv_freq": torch.ones(3)})
    assert HuggingFaceFolder(tmp_path, LAYOUTS, None).layout == "plain"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("name", "shape"), [("q", (4, 8)), ("q", (7, 4)), ("q", (28,)), ("kernel", (4, 24)), ("positions", (5, 4))]
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**TENSORS, name: torch.zeros(shape)}, kind)
    folder = HuggingFaceFolder(tmp_path, LAYOUTS, None)
    found = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    with pytest.raises(UserError, match=rf"{name} has shape \({found}\), the configuration expects"):
        folder.check()
    with pytest.raises(UserError, match=rf"{name} has shape \({found}\), the configuration expects"):
        assert_cuts_are_right(folder)


def test_a_tensor_that_the_model_does_not_have(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS)
    with pytest.raises(UserError, match="has no tensor 'missing', which the model needs"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)(Shard("missing", (5, 7), (0, 0), torch.empty(5, 7)))


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**TENSORS, "lm_head": TENSORS["embed"].clone()})
    folder = HuggingFaceFolder(tmp_path, LAYOUTS, None)
    folder.check()
    assert_cuts_are_right(folder)
    other = TENSORS["embed"].clone()
    other[3, 1] += 1
    write_checkpoint(tmp_path, {**TENSORS, "lm_head": other})
    folder = HuggingFaceFolder(tmp_path, LAYOUTS, None)
    folder.check()  # headers only
    folder(Shard("embed", (5, 3), (0, 0), torch.empty(3, 3)))
    with pytest.raises(UserError, match="lm_head differs from embed, but the configuration ties the two"):
        folder(Shard("embed", (5, 3), (3, 0), torch.empty(2, 3)))
    write_checkpoint(tmp_path, {**TENSORS, "lm_head": TENSORS["embed"].double()})
    with pytest.raises(UserError, match="lm_head differs from embed"):
        assert_cuts_are_right(HuggingFaceFolder(tmp_path, LAYOUTS, None))
    write_checkpoint(tmp_path, {**TENSORS, "lm_head": torch.zeros(6, 3)})
    with pytest.raises(UserError, match=r"lm_head has shape \(6, 3\), the configuration expects \(5, 3\)"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None).check()


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.init_from: .* has no model\.safetensors or pytorch_model\.bin"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)
    for index in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        for content in ("{", "[]", '{"weights": {}}', '{"weight_map": 3}'):
            (tmp_path / index).write_text(content)
            with pytest.raises(UserError, match=rf"{index}: holds no weight_map"):
                HuggingFaceFolder(tmp_path, LAYOUTS, None)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"", b"PK\x03\x04 but no zip"])
def test_files_that_cannot_be_read(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: cannot be read"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_a_file_that_was_cut_off(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, kind)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{path.name}: cannot be read"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code of the file was run",)


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**TENSORS, "q": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)
    assert "was run" not in capsys.readouterr().out


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    torch.save({"state": TENSORS}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: holds no state dict of tensors"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None)


@pytest.mark.parametrize("kind", ["safetensors index", "bin index"])
def test_a_file_that_the_index_names_but_is_gone_or_lacks_its_tensor(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, kind)
    index = next(tmp_path.glob("*.index.json"))
    where = json.loads(index.read_text())["weight_map"]
    (tmp_path / where["q"]).unlink()
    with pytest.raises(UserError, match=rf"{where['q']}: cannot be read \(no such file"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None).check()
    index.write_text(json.dumps({"weight_map": {**where, "q": where["k"]}}))
    with pytest.raises(UserError, match=rf"{where['k']}: lacks q, which its index names"):
        HuggingFaceFolder(tmp_path, LAYOUTS, None).check()


def test_config_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: holds no JSON object"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert read_hf_config(tmp_path) == {"model_type": "x"}


def test_config_json_of_the_parts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "llm": "as published"}')
    for part in ("llm", "vision_tower"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"model_type": part}))
    assert read_hf_config(tmp_path) == {
        "model_type": "x",
        "llm": {"model_type": "llm"},
        "vision_tower": {"model_type": "vision_tower"},
    }
    (tmp_path / "llm" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"llm/config\.json: cannot be read"):
        read_hf_config(tmp_path)
