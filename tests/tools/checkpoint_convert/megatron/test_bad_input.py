"""Checkpoints that are none, not whole, or would run code: a UserError that says where and what to do."""

from __future__ import annotations

import argparse
import enum
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tools.checkpoint_convert.megatron.cases import causal_lm
from tests.tools.checkpoint_convert.megatron.readers import Memory, assert_holds, write_megatron
from tetrascope.errors import UserError
from tetrascope.models.weights import logical_tensors, relative
from tetrascope.tools.checkpoint_convert.convert import convert, plan
from tetrascope.tools.checkpoint_convert.formats import Options
from tetrascope.tools.checkpoint_convert.megatron.arguments import from_arguments, to_arguments
from tetrascope.tools.checkpoint_convert.megatron.causal_lm import FAMILY
from tetrascope.tools.checkpoint_convert.megatron.legacy import FILE
from tetrascope.tools.checkpoint_convert.megatron.mapping import Naming, gpt_weights, split
from tetrascope.tools.checkpoint_convert.megatron.reader import MegatronReader, is_megatron


@pytest.fixture(scope="module")
def source() -> Memory:
    model: Any = causal_lm("qwen2")
    return Memory(FAMILY, FAMILY.from_hf(model.config.to_dict()), model.state_dict())


@pytest.fixture(scope="module")
def whole(source: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    write_megatron(source, folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "source")


def write_legacy(source: Memory, folder: Path, tp: int = 2, **more: Any) -> Path:
    """The older layout, cut by hand: `more` beside model and arguments in each file."""
    shape = source.config.decoder
    own = gpt_weights(shape, naming=Naming(stacked=False, separate_norms=True))
    pieces = relative(own, FAMILY.weights(source.config))
    tensors = {}
    for name in logical_tensors(own):
        parts = [source.read(piece.tensor.name, piece.start, piece.rows) for piece in pieces[name]]
        tensors[name] = torch.cat(parts)
    arguments = to_arguments(shape, shape.vocab, torch.float32, source.config.positions)
    arguments.tensor_model_parallel_size = tp
    for rank in range(tp):
        mine: dict[str, Any] = {}
        for name, tensor in tensors.items():
            cut = split(name, gated=True)
            if cut is not None:
                dim, parts_ = cut
                shares = [part.tensor_split(tp, dim)[rank] for part in tensor.chunk(parts_)]
                mine[name] = torch.cat(shares).clone()
            else:
                mine[name] = tensor + more.get("drift", 0.0) * rank
        path = folder / f"mp_rank_{rank:02d}" / FILE
        path.parent.mkdir(parents=True)
        content = {"checkpoint_version": 3.0, "args": arguments, "model": mine, **more}
        torch.save(content, path)
    return folder


def fails(folder: Path, match: str, options: Options | None = None) -> None:
    with pytest.raises(UserError, match=match):
        MegatronReader(folder, options or Options())


def test_what_is_no_megatron_checkpoint(tmp_path: Path) -> None:
    assert not is_megatron(tmp_path)
    (tmp_path / "metadata.json").write_text("[1]")
    assert not is_megatron(tmp_path)
    fails(tmp_path, r"latest_checkpointed_iteration.txt: cannot be read .* give a folder of Megatron")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    fails(tmp_path, "neither an iteration nor 'release'")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    fails(tmp_path, "iter_0000012: no Megatron checkpoint, though latest_checkpointed_iteration.txt names it")


def test_another_backend(folder: Path) -> None:
    (folder / "release/metadata.json").write_text('{"sharded_backend": "zarr"}')
    fails(folder, "is of backend 'zarr'; save it with Megatron's --ckpt-format torch_dist")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "common.pt").unlink(), "common.pt: no such file"),
        (lambda f: (f / "common.pt").write_bytes(b"PK\x03\x04 no more"), "common.pt: cannot be read"),
        (lambda f: (f / ".metadata").unlink(), r"\.metadata: cannot be read"),
        (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-9]), r"\.metadata: cannot be read"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1, 2])), "holds no list of a checkpoint's contents"),
        (lambda f: (f / "tetrascope.json").write_text("{"), "tetrascope.json: cannot be read"),
    ],
)
def test_files_missing_or_damaged(folder: Path, damage: Callable[[Path], Any], match: str) -> None:
    damage(folder / "release")
    fails(folder, match)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), r"__0_0.distcp: no such file, which .metadata names"),
        (lambda path: path.write_bytes(path.read_bytes()[:100_000]), r"__0_0.distcp: damaged at .*; copy"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), r"__0_0.distcp: damaged at .*; copy"),
    ],
)
def test_tensor_files_missing_or_damaged(
    folder: Path, tmp_path: Path, damage: Callable[[Path], Any], match: str
) -> None:
    damage(folder / "release/__0_0.distcp")
    with pytest.raises(UserError, match=match):
        convert(plan(folder, "hf", Options()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Attack:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_nothing_in_a_pickle_is_run(folder: Path, tmp_path: Path, file: str) -> None:
    path, trace = folder / "release" / file, tmp_path / "ran"
    if file == ".metadata":
        path.write_bytes(pickle.dumps(Attack(trace)))
    else:
        torch.save({"args": Attack(trace)}, path)
    fails(folder, rf"{file}: refused, since it asks for code to be run .*exec\); nothing was run")
    assert not trace.exists()


def test_nothing_in_an_older_checkpoint_is_run(source: Memory, tmp_path: Path) -> None:
    write_legacy(source, tmp_path / "source", optimizer=Attack(tmp_path / "ran"))
    fails(tmp_path / "source", r"model_optim_rng.pt: refused, .*exec.* save its model tensors and args alone")
    assert not (tmp_path / "ran").exists()


class Backend(enum.Enum):
    """Stands for Megatron's enumerations in the arguments."""

    FUSED = 1


@pytest.mark.parametrize("allowed", [[], [np.dtypes.Int64DType, np.dtype]], ids=["", "after Megatron was imported"])
def test_what_megatron_usually_saves_besides_is_passed_over(
    source: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: list[Any]
) -> None:
    """Also when a library has allowed some of it for the whole process, as Megatron-Core does."""
    monkeypatch.setattr(Backend, "__module__", "megatron.core.transformer.enums")
    monkeypatch.setitem(
        __import__("sys").modules, "megatron.core.transformer.enums", argparse.Namespace(Backend=Backend)
    )
    rng = {"np_rng_state": np.random.get_state(), "seed": np.int64(3)}
    write_legacy(source, tmp_path / "source", rng_state=[rng], backend=Backend.FUSED, where=Path("/x"))
    monkeypatch.undo()
    with torch.serialization.safe_globals(allowed):
        before = set(torch.serialization.get_safe_globals())
        assert_holds(MegatronReader(tmp_path / "source", Options()), source)
        assert set(torch.serialization.get_safe_globals()) == before


def test_copies_that_drifted_apart_are_averaged(source: Memory, tmp_path: Path) -> None:
    reader = MegatronReader(write_legacy(source, tmp_path / "source", drift=0.25), Options())
    name = "model.layers.2.input_layernorm.weight"
    assert torch.allclose(reader.read(name, 0, 64), source.read(name, 0, 64) + 0.125)
    assert dict(reader.drift) == {"decoder.layers.2.input_layernorm.weight": pytest.approx(0.125, abs=1e-6)}


def test_older_checkpoints_that_are_not_whole(source: Memory, tmp_path: Path) -> None:
    folder = write_legacy(source, tmp_path / "source", tp=2)
    shutil.rmtree(folder / "mp_rank_00")
    fails(folder, "lacks the file of tensor-parallel rank 0, pipeline rank 0")
    shutil.rmtree(folder)
    shutil.rmtree(write_legacy(source, folder, tp=4) / "mp_rank_03")
    fails(folder, "args.tensor_model_parallel_size is 4, but there are files of 3")
    shutil.rmtree(folder)
    write_legacy(source, folder, checkpoint_version=1.0)
    fails(folder, "checkpoint_version is 1.0, 3.0 is needed")
    shutil.rmtree(folder)
    write_legacy(source, folder, model={"language_model.encoder.layers.0.x": torch.zeros(1)})
    fails(folder, "no model of Megatron-Core; save it with --use-mcore-models")
    shutil.rmtree(folder)
    (write_legacy(source, folder, tp=1) / "mp_rank_00" / FILE).unlink()
    fails(folder, "model_optim_rng.pt: no such file")


def test_another_model(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    causal_lm("qwen3").config.save_pretrained(other)
    fails(folder, r"lacks .*q_layernorm.* and holds, unused by the model, .*bias", Options(config=other))
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    fails(folder, r"--config: .*no family knows a model", Options(config=other))
    causal_lm("qwen2").config.save_pretrained(other)
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"intermediate_size": 100}))
    fails(folder, r"linear_fc1.weight has shape \(4, 192, 64\), the model needs \(4, 200, 64\)", Options(config=other))
    (other / "config.json").write_text(json.dumps(raw | {"vocab_size": 300}))
    fails(folder, r"word_embeddings.weight has shape \(256, 64\), the model needs \(300, 64\)", Options(config=other))


def test_a_model_that_nothing_describes(folder: Path) -> None:
    (folder / "release/tetrascope.json").unlink()
    torch.save({"iteration": 3}, folder / "release/common.pt")
    fails(folder, "does not say what model it is; give --config")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalization": "LayerNorm"}, "args.normalization is 'LayerNorm'; .* has 'RMSNorm'"),
        ({"num_experts": 8}, "args.num_experts is 8"),
        ({"position_embedding_type": "learned_absolute"}, "args.position_embedding_type"),
        ({"use_rope_scaling": True}, "args.use_rope_scaling"),
        ({"num_layers": None}, "args.num_layers is None; give --config"),
        ({"qk_layernorm": True}, "both add_qkv_bias and qk_layernorm"),
    ],
)
def test_arguments_of_other_models(source: Memory, change: dict[str, Any], match: str) -> None:
    arguments = vars(to_arguments(source.config.decoder, 256, torch.float32, 512))
    assert from_arguments(arguments, "x").decoder == source.config.decoder
    with pytest.raises(UserError, match=match):
        from_arguments(arguments | change, "x")


def test_a_source_that_lacks_tensors(source: Memory, tmp_path: Path) -> None:
    part = Memory(FAMILY, source.config, {"model.norm.weight": torch.ones(64)})
    with pytest.raises(
        UserError, match=r"lacks \d+ tensors of the model \(such as .*\); give a checkpoint of the whole"
    ):
        write_megatron(part, tmp_path / "out")
    with pytest.raises(
        UserError, match="--layout: megatron has no layout 'hub'; choose one of transformer-engine, local"
    ):
        write_megatron(source, tmp_path / "out", Options(layout="hub"))
    with pytest.raises(UserError, match="--shards: 'four' is no layout"):
        write_megatron(source, tmp_path / "out", Options(shards="four"))
    assert not (tmp_path / "out").exists()
