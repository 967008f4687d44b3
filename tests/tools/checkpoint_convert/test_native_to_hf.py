"""Hugging Face folder -> native checkpoint -> Hugging Face folder, in every layout, tensor by tensor bit-equal.

The oracle is transformers: it writes the folders that are read, and loads those that are written, with no tensor
missing or left over and the logits that it had before. Nothing computes between reading and writing, and bf16 numbers
pass through fp32 unchanged, so no bound is needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tools.checkpoint_convert.convert_jobs import hf_to_native
from tetrascope.cli import main
from tetrascope.engine.logical import Shard
from tetrascope.engine.source import HuggingFaceFolder
from tetrascope.errors import UserError
from tetrascope.models.layers.decoder_tables import grouped_qkv
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.models.weights import (
    CheckpointLayout,
    HFTensor,
    WeightMap,
    logical_tensors,
    renamed,
    renamed_layout,
    whole,
)
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.checkpoint_convert import hf_write, native
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf
from tetrascope.tools.verify.families.qwen2_vl import make_case, name_on_disk, oracle
from tetrascope.tools.verify.pool import RankFailure, WorkerPool

CASES = {tied: make_case(tied=tied) for tied in (False, True)}


def in_memory(name: str) -> str:
    """Hub name -> name in memory."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def expected(tied: bool, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    return {n if layout == "hub" else in_memory(n): t.to(dtype) for n, t in CASES[tied].weights.items()}


def write_hf(folder: Path, tied: bool, dtype: torch.dtype, layout: str) -> Path:
    model = oracle(CASES[tied].config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(CASES[tied].weights[name_on_disk(name)])
    model.to(dtype).save_pretrained(folder, save_original_format=layout == "hub")
    assert load_file(folder / "model.safetensors").keys() == expected(tied, dtype, layout).keys()
    return folder


@pytest.fixture(scope="module")
def checkpoints(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Native checkpoints of the untied case, read in the hub layout by four ranks, and of the tied one, by one."""
    found = {}
    for tied, source, world, layout in ((False, "hub", 4, Layout(tp=2, pp=2)), (True, "in-memory", 1, Layout())):
        folder = tmp_path_factory.mktemp("native")
        hf = write_hf(folder / "hf", tied, torch.float32, source)
        assert pool.run(hf_to_native, "qwen2_vl", hf, folder, layout, world=world) == [source] * world
        found[tied] = folder / "step-000000"
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    """What transformers computes with a folder, which it must load without a tensor too few or too many."""
    from transformers import Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), use_cache=False).logits
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["hub", "in-memory"])
@pytest.mark.parametrize("tied", [False, True])
def test_written_tensors_and_what_transformers_makes_of_them(
    checkpoints: dict[bool, Path], tied: bool, layout: str, dtype: str, tmp_path: Path
) -> None:
    torch_dtype = getattr(torch, dtype)
    native_to_hf(checkpoints[tied], tmp_path / "out", dtype, layout=layout)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected(tied, torch_dtype, layout))
    theirs = write_hf(tmp_path / "theirs", tied, torch_dtype, "hub")
    assert torch.equal(logits(tmp_path / "out", torch_dtype), logits(theirs, torch_dtype))


@pytest.mark.parametrize("layout", ["hub", "in-memory"])
def test_bf16_checkpoints_come_back_bit_for_bit(pool: WorkerPool, layout: str, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", False, torch.bfloat16, layout)
    assert pool.run(hf_to_native, "qwen2_vl", hf, tmp_path, Layout(), world=1) == [layout]
    native_to_hf(tmp_path / "step-000000", tmp_path / "out", "bfloat16", layout=layout)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(hf / "model.safetensors"))


def test_a_tied_head_that_differs_ends_the_run(pool: WorkerPool, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", True, torch.float32, "hub")
    tensors = load_file(hf / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, hf / "model.safetensors")
    with pytest.raises(RankFailure, match=r"UserError: .*lm_head\.weight differs from model\.embed_tokens\.weight"):
        pool.run(hf_to_native, "qwen2_vl", hf, tmp_path, Layout(), world=1)


def fused(config: Qwen2VLConfig) -> WeightMap:
    """The decoder's query, key and value fused as in InternLM2, the vision encoder's apart as in CLIP."""
    table = dict(FAMILY.weights(config))
    for name, pieces in table.items():
        if name.startswith("layers.") and ".attention.qkv." in name:
            theirs = pieces[0].tensor.name.replace("q_proj", "wqkv")
            shape = (sum(config.decoder.qkv_rows), *pieces[0].tensor.matrix[1:])
            table[name] = grouped_qkv(HFTensor(theirs, shape), config.decoder)
        elif ".attention.qkv." in name:
            theirs, shape = pieces[0].tensor.name, (config.vision.width, *pieces[0].tensor.matrix[1:])
            table[name] = tuple(whole(theirs.replace("qkv", part), shape) for part in "qkv")
    return table


PARTS = [(r"visual\.merger\.", "mm_projector/"), (r"visual\.", "vision_tower/"), (r"", "llm/")]


def part_configs(config: Any, dtype: str) -> dict[str, dict[str, Any]]:
    together = FAMILY.to_hf(config, dtype)
    return {"config.json": {"model_type": "parts"}, "llm/config.json": together["text_config"]}


HUB = FAMILY.layouts["hub"]
MORE_LAYOUTS = {
    **FAMILY.layouts,
    "fused": CheckpointLayout(weights=fused, configs=HUB.configs),
    "parts": renamed_layout(replace(HUB, configs=part_configs), PARTS),
    "fused parts": CheckpointLayout(weights=lambda config: renamed(fused(config), PARTS), configs=part_configs),
}


@pytest.mark.parametrize("bytes_a_file", [10**9, 30_000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["fused", "parts", "fused parts"])
def test_layouts_that_fuse_tensors_or_keep_parts_apart(
    checkpoints: dict[bool, Path],
    layout: str,
    tied: bool,
    bytes_a_file: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Written and read again, since no other program knows them; the fused order has a test of its own."""
    monkeypatch.setattr(native, "get_family", lambda name: replace(FAMILY, layouts=MORE_LAYOUTS))
    monkeypatch.setattr(hf_write, "FILE_BYTES", bytes_a_file)
    out, config = tmp_path / "out", CASES[tied].config
    native_to_hf(checkpoints[tied], out, "float32", layout=layout)
    if "parts" in layout:
        assert json.loads((out / "config.json").read_text()) == {"model_type": "parts"}
        assert json.loads((out / "llm" / "config.json").read_text())["model_type"] == "qwen2_vl_text"
        assert not list(out.glob("*.safetensors"))
        assert len(list(out.glob("llm/model*.safetensors"))) == 1 or bytes_a_file < 10**9
    assert len(list(out.rglob("*.index.json"))) == (bytes_a_file < 10**9) * (3 if "parts" in layout else 1)
    folder = HuggingFaceFolder(out, MORE_LAYOUTS, config)
    folder.check()
    assert folder.layout == layout
    for name, tensor in logical_tensors(FAMILY.weights(config)).items():
        shard = Shard(name, tensor.matrix, (0,) * len(tensor.matrix), torch.empty(tensor.matrix))
        assert torch.equal(folder(shard), CASES[tied].weights[name].reshape(tensor.matrix)), name


def test_a_layout_that_the_family_does_not_have(
    checkpoints: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["tetrascope", "convert", str(checkpoints[True]), str(out), "--layout", "vila"])
    assert main() == 2
    assert "--layout: qwen2_vl has no layout 'vila'; choose one of hub, in-memory" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(
        "sys.argv", ["tetrascope", "convert", str(checkpoints[True]), str(out), "--layout", "in-memory"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "model.visual.merger.ln_q.weight" in load_file(out / "model.safetensors")


def test_a_damaged_checkpoint_is_named(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "step-000000"
    damaged.mkdir()
    for path in checkpoints[True].iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".distcp" else content)
    with pytest.raises(UserError, match=r"step-000000: damaged \(.*\); convert another checkpoint"):
        native_to_hf(damaged, tmp_path / "out", "float32")
    (damaged / ".metadata").unlink()
    with pytest.raises(UserError, match=r"step-000000: damaged"):
        native_to_hf(damaged, tmp_path / "out", "float32")
