"""Hugging Face -> native, cut as by TP2 x PP2 -> Hugging Face: every file comes back byte by byte.

The oracle is the safetensors library, which writes the folders that are read. Nothing computes in between, so equality
of bytes is the only bound. What is native in between is looked at by torch's own reader of such folders, and by runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.engine.train_jobs import run_steps
from tests.tiny import write_config
from tests.tools.checkpoint_convert.convert_jobs import hf_to_native, shards_loaded
from tests.tools.checkpoint_convert.folders import case_of, contents, tensors_of, write_hf
from tetrascope.engine.checkpoint import checksum_problems, problem, read_state
from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, get_family
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.checkpoint_convert.convert import Result, convert, plan
from tetrascope.tools.checkpoint_convert.formats import Options
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf
from tetrascope.tools.verify.pool import WorkerPool

EVERY = [(family, layout) for family in FAMILIES for layout in get_family(family).layouts]


def run(source: Path, to: str, destination: Path, verify: str = "", **options: object) -> Result:
    return convert(plan(source, to, Options(**options)), destination, verify)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "layout"), EVERY, ids=[f"{f}, {layout}" for f, layout in EVERY])
def test_every_family_and_layout(family: str, layout: str, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", case_of(family), layout, torch.bfloat16, files=2)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("pass")
    run(source, "native", tmp_path / "native", verify="tensors", shards="tp2pp2")
    assert len(list((tmp_path / "native").glob("*.distcp"))) == 4
    assert problem(tmp_path / "native") is None and not checksum_problems(tmp_path / "native")
    run(tmp_path / "native", "hf", tmp_path / "back", layout=layout)
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_the_shards_are_those_of_the_ranks(variant: str, pool: WorkerPool, tmp_path: Path) -> None:
    """Cut as a run with tp=2 and pp=2 cuts; which rank has which layer is the run's choice."""
    source = write_hf(tmp_path / "hf", case_of("qwen2_vl", variant))
    planned = plan(source, "native", Options(shards="tp2xpp2"))
    convert(planned, tmp_path / "native")
    pool.run(hf_to_native, "qwen2_vl", source, tmp_path, Layout(tp=2, pp=2), world=4)
    assert chunks(tmp_path / "native") == chunks(tmp_path / "step-000000")
    written = [(output.path, target.name) for output in planned.writer.outputs for target in output.targets]
    assert len(written) == len(chunks(tmp_path / "native"))  # nothing twice, tied or replicated


def chunks(folder: Path) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        (name, tuple(chunk.offsets), tuple(chunk.sizes))
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        for chunk in entry.chunks
    }


@pytest.mark.parametrize(("shards", "layout"), [("", Layout(tp=2)), ("tp2pp2", Layout(pp=2)), ("pp3", Layout(dp=2))])
def test_a_run_loads_it(shards: str, layout: Layout, pool: WorkerPool, tmp_path: Path) -> None:
    case = case_of("qwen2_vl")
    run(write_hf(tmp_path / "hf", case), "native", tmp_path / "native", shards=shards, file_bytes=40_000)
    for of_rank in pool.run(shards_loaded, "qwen2_vl", tmp_path / "hf", tmp_path / "native", layout, world=2):
        assert of_rank
        for name, offset, tensor in of_rank:
            whole = case.weights[name].reshape(len(case.weights[name]), -1)
            rows = whole[offset[0] : offset[0] + len(tensor)]
            start = offset[1] if len(offset) > 1 else 0
            wanted = rows[:, start : start + tensor[0].numel()].reshape(tensor.shape)
            assert torch.equal(tensor, wanted), name


def test_another_dtype_and_layout(tmp_path: Path) -> None:
    case = case_of("qwen2_vl")
    source = write_hf(tmp_path / "hf", case, files=3)
    run(source, "native", tmp_path / "native", verify="tensors", dtype="bfloat16")
    run(tmp_path / "native", "hf", tmp_path / "out", layout="in-memory", file_bytes=10**6)
    expected = write_hf(tmp_path / "expected", case, "in-memory", torch.bfloat16)
    tensors = "model.safetensors"
    assert (tmp_path / "out" / tensors).read_bytes() == (expected / tensors).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    run(tmp_path / "native", "hf", tmp_path / "hub", verify="tensors")
    kept = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert kept["dtype"] == "bfloat16" and kept["note"] == "of the source"
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(case, "hub", torch.bfloat16).values())


def test_a_stored_copy_of_a_tied_head_comes_back(tmp_path: Path) -> None:
    case = case_of("qwen2_vl", "tied")
    copy = {"lm_head.weight": tensors_of(case, "hub")["model.embed_tokens.weight"].clone()}
    source = write_hf(tmp_path / "hf", case, change=copy)
    run(source, "native", tmp_path / "native")
    run(tmp_path / "native", "hf", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    run(source, "hf", tmp_path / "anew", file_bytes=10**9)
    assert (tmp_path / "anew" / "model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size


def test_pickled_tensors_come_out_as_safetensors(tmp_path: Path) -> None:
    case = case_of("qwen2_vl")
    source = write_hf(tmp_path / "hf", case, dtype=torch.bfloat16)
    plain = contents(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors_of(case, "hub", torch.bfloat16), source / "pytorch_model.bin")
    run(source, "native", tmp_path / "native", verify="tensors")
    run(tmp_path / "native", "hf", tmp_path / "out")
    assert contents(tmp_path / "out") == plain


def test_rows_beyond_the_vocabulary_are_padding(tmp_path: Path) -> None:
    case = case_of("qwen2_vl")
    padded = {
        name: torch.cat([tensors_of(case, "hub")[name], torch.zeros(5, case.config.decoder.hidden)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    source = write_hf(tmp_path / "hf", case, change=padded)
    result = run(source, "hf", tmp_path / "out", verify="tensors")
    plain = write_hf(tmp_path / "plain", case)
    assert contents(tmp_path / "out") == contents(plain)
    assert "lm_head.weight: rows from 251 on are padding of the vocabulary" in result.notes
    other = write_hf(tmp_path / "other", case, change={"model.norm.weight": torch.zeros(99)})
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(99,\), the configuration expects \(64,\)"):
        plan(other, "hf", Options())


def test_what_a_run_is_told(tmp_path: Path) -> None:
    run(write_hf(tmp_path / "hf", case_of("llava")), "native", tmp_path / "native")
    state = read_state(tmp_path / "native")
    assert (state["family"], state["step"], state["adam_steps"]) == ("llava", 0, 0)
    assert state["cursor"] == {"step": 0, "position": 0, "waiting": []}


def test_training_goes_on_from_it(pool: WorkerPool, tmp_path: Path) -> None:
    """The first steps from a converted checkpoint are those of a run that starts from the Hugging Face folder."""
    config = write_config(tmp_path, train={"steps": 2})
    raw = yaml.safe_load(config.read_text())
    scratch = run_here(pool, config, tmp_path / "scratch", 1, resume=False)
    native_to_hf(Path(scratch[-1]["checkpoint"]), tmp_path / "hf", "float32")
    raw["model"] = {"family": "qwen2_vl", "init_from": str(tmp_path / "hf")}
    config.write_text(yaml.safe_dump(raw))
    started = run_here(pool, config, tmp_path / "started", 2, resume=False)
    (tmp_path / "resumed").mkdir()
    run(tmp_path / "hf", "native", tmp_path / "resumed" / "checkpoints" / "step-000000", shards="tp2")
    resumed = run_here(pool, config, tmp_path / "resumed", 2, resume=True)
    assert [step["loss"] for step in resumed] == [step["loss"] for step in started]


def run_here(pool: WorkerPool, config: Path, folder: Path, world: int, resume: bool) -> list[dict[str, Any]]:
    overrides = [f"output.dir={folder}", f"parallel.tp={world}"]
    found: list[dict[str, Any]] = pool.run(run_steps, config, overrides, 2, resume, world=world)[0]
    return found
