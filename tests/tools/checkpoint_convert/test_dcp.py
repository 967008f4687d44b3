"""Folders of torch.distributed.checkpoint by row ranges. The oracle is torch: it writes what is read here, and loads
what is written here."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, load, save

from tetrascope.engine.checkpoint.shards import ShardSavePlanner
from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.models.weights import HFTensor, Piece
from tetrascope.tools.checkpoint_convert.dcp import DcpFolder, write_dcp_file, write_dcp_metadata
from tetrascope.tools.checkpoint_convert.formats import Output, Target
from tetrascope.tools.checkpoint_convert.stream import THREADS, RowStream

MATRIX = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
VECTOR = torch.arange(7).bfloat16()

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def cut() -> list[Shard]:
    """The matrix in four rectangles that do not begin at the same rows, and the vector whole."""
    places = [
        (slice(0, 5), slice(0, 3)),
        (slice(5, 13), slice(0, 3)),
        (slice(0, 9), slice(3, 8)),
        (slice(9, 13), slice(3, 8)),
    ]
    shards = [Shard("m", (13, 8), (rows.start, columns.start), MATRIX[rows, columns]) for rows, columns in places]
    return [*shards, Shard("v", (7,), (0,), VECTOR)]


def torch_folder(folder: Path) -> Path:
    save({}, storage_writer=FileSystemWriter(folder), planner=ShardSavePlanner(cut()), no_dist=True)
    return folder


def test_rows_of_what_torch_wrote(tmp_path: Path) -> None:
    folder = DcpFolder(torch_folder(tmp_path))
    assert (folder.dtype("m"), folder.dtype("v")) == (torch.float32, torch.bfloat16)
    for start in range(13):
        for rows in range(1, 14 - start):
            assert torch.equal(folder.read("m", start, rows), MATRIX[start : start + rows])
    assert torch.equal(folder.read("v", 2, 4), VECTOR[2:6])


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    class Memory:
        def read(self, name: str, start: int, rows: int) -> torch.Tensor:
            return {"m": MATRIX, "v": VECTOR}[name][start : start + rows]

    tensors = {"m": HFTensor("m", (13, 8)), "v": HFTensor("v", (7,))}
    groups: dict[str, list[Shard]] = {"__0_0.distcp": cut()[1:], "__1_0.distcp": cut()[:1]}
    records, metas = {}, {}
    with ThreadPoolExecutor(THREADS) as pool:
        for path, shards in groups.items():
            targets = tuple(
                Target(
                    shard.name,
                    tuple(shard.tensor.shape),
                    shard.tensor.dtype,
                    (Piece(tensors[shard.name], shard.offset[0], len(shard.tensor)),),
                    range(shard.offset[1], shard.offset[1] + shard.tensor.shape[1]) if shard.name == "m" else None,
                )
                for shard in shards
            )
            output = Output(path, targets)
            rows = RowStream(output, Memory(), pool, lambda count: None)  # type: ignore[arg-type]
            records[path] = write_dcp_file(output, tmp_path, rows)
            metas[path] = [Shard(s.name, s.shape, s.offset, s.tensor.to("meta")) for s in shards]
    assert torch.serialization.get_crc32_options()
    files = write_dcp_metadata(tmp_path, metas, records)
    assert {name: (tmp_path / name).stat().st_size for name in files} == {n: r.bytes for n, r in files.items()}
    found = {"m": torch.empty(13, 8), "v": torch.empty(7, dtype=torch.bfloat16)}
    load(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["m"], MATRIX) and torch.equal(found["v"], VECTOR)


def test_shards_that_do_not_make_up_their_tensor_are_not_written(tmp_path: Path) -> None:
    metas = [Shard(s.name, s.shape, s.offset, s.tensor.to("meta")) for s in cut()[1:]]
    record = {"bytes": 1, "crc32": 0, "places": [[0, 1]] * len(metas)}
    with pytest.raises(ValueError, match="validate global plan"):
        write_dcp_metadata(tmp_path, {"__0_0.distcp": metas}, {"__0_0.distcp": record})


def test_bytes_that_are_not_a_plain_tensor(tmp_path: Path) -> None:
    """A transposed tensor has another order in its file; a compressed archive has no bytes to be read at an offset."""
    for damage, message in ((transposed, "not stored row by row"), (compressed, "damaged"), (zeros, "damaged")):
        folder = torch_folder(tmp_path / damage.__name__)
        file = folder / "__0_0.distcp"
        whole = DcpFolder(folder)
        info = next(info for index, info in whole._storage.items() if index.fqn == "v")
        content = bytearray(file.read_bytes())
        new = damage(bytes(content[info.offset : info.offset + info.length]))
        content[info.offset :] = new.ljust(info.length, b"\0") if damage is zeros else new
        file.write_bytes(content)
        info.length = len(content) - info.offset
        with pytest.raises(UserError, match=message):
            whole.read("v", 0, 1)


def transposed(part: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.arange(14).bfloat16()[::2], buffer)
    return buffer.getvalue()


def compressed(part: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(part)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def zeros(part: bytes) -> bytes:
    return b""
