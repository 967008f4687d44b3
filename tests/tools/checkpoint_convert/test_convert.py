"""What `tetrascope convert` does beside copying: going on after an interruption, checking what it wrote, refusing bad
input without touching the destination, and saying what it would do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tools.checkpoint_convert.folders import case_of, contents, tensors_of, write_hf
from tetrascope.cli import main
from tetrascope.errors import UserError
from tetrascope.models.weights import HFTensor, Piece
from tetrascope.tools.checkpoint_convert import convert as module
from tetrascope.tools.checkpoint_convert import hf_write, stream
from tetrascope.tools.checkpoint_convert.command import bare_verify, parse_bytes
from tetrascope.tools.checkpoint_convert.convert import convert, plan
from tetrascope.tools.checkpoint_convert.formats import Options, Output, Target, reduce_copies
from tetrascope.tools.checkpoint_convert.hf_write import HFWriter
from tetrascope.tools.checkpoint_convert.stream import THREADS, RowStream

CASE = case_of("qwen2_vl")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", CASE, files=4)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tetrascope", "convert", *map(str, arguments)])
    try:
        return main()
    except SystemExit as end:
        return int(end.code or 0)


# Interruption.


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """The `number`-th file of the next conversion to Hugging Face is half written when the error comes."""
    original, calls = HFWriter.write, [0]

    def write(self: HFWriter, output: Output, folder: Path, rows: Any) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] == number:
            (folder / output.path).write_bytes(b"half")
            raise error
        return original(self, output, folder, rows)

    monkeypatch.setattr(HFWriter, "write", write)


def test_an_interrupted_conversion_goes_on(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(plan(hf, "hf", Options()), out)
    assert not out.exists()
    written = {path.name: path.stat().st_ino for path in (tmp_path / ".out.converting").glob("*-0000[12]-*")}
    result = convert(plan(hf, "hf", Options()), out, verify="tensors")
    assert (result.continued, result.files) == (2, 4)
    assert contents(out) == contents(hf)
    assert {name: (out / name).stat().st_ino for name in written} == written  # the same files, not written again
    assert not (tmp_path / ".out.converting").exists()


@pytest.mark.parametrize("what", ["source", "options", "journal"])
def test_what_another_conversion_left_behind_is_not_used(
    what: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", Options()
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(plan(hf, "hf", options), out)
    if what == "source":
        file = next(hf.glob("*-00001-*"))
        os.utime(file, ns=(1, 1))
    elif what == "options":
        options = Options(dtype="bfloat16")
    else:
        journal = tmp_path / ".out.converting" / "journal.jsonl"
        journal.write_text(journal.read_text()[10:])
    assert convert(plan(hf, "hf", options), out, verify="tensors").continued == 0


def test_a_journal_that_ends_in_a_half_line(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(plan(hf, "hf", Options()), out)
    journal = tmp_path / ".out.converting" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-9])
    assert convert(plan(hf, "hf", Options()), out, verify="tensors").continued == 2
    assert contents(out) == contents(hf)


def test_a_killed_process_leaves_no_destination(hf: Path, tmp_path: Path) -> None:
    """Killed while it writes its second file; the same command then ends well, and the result is whole."""
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from tetrascope.tools.checkpoint_convert import hf_write\n"
        "write = hf_write.write_file\n"
        "def dying(path, entries, chunks):\n"
        "    write(path, entries, chunks if '00001' in path.name else kill(chunks))\n"
        "def kill(chunks):\n"
        "    yield next(chunks)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "hf_write.write_file = dying\n"
        "from tetrascope.cli import main\n"
        f"sys.argv = ['tetrascope', 'convert', {str(hf)!r}, {str(out)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert convert(plan(hf, "hf", Options()), out, verify="tensors").continued == 1
    assert contents(out) == contents(hf)


# Checking what was written.


def damage_when_finished(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    original = HFWriter.finish

    def finish(self: HFWriter, folder: Path, records: Any) -> None:
        original(self, folder, records)
        damage(folder)

    monkeypatch.setattr(HFWriter, "finish", finish)


def flip(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_verify_finds_one_bit(dtype: str | None, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(hf, "hf", Options(dtype=dtype))
    assert convert(planned, tmp_path / "good", verify="tensors").verified == "94 tensors read back, all bit-equal"
    damage_when_finished(monkeypatch, flip)
    with pytest.raises(UserError, match=r"is not what the source holds; convert again"):
        convert(planned, tmp_path / "out", verify="tensors")
    assert not (tmp_path / "out").exists()


def test_verify_does_not_take_zeros_of_either_sign_for_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = {"model.norm.weight": torch.zeros(CASE.config.decoder.hidden)}
    source = write_hf(tmp_path / "hf", CASE, change=zeros)

    def negate(folder: Path) -> None:
        write_hf(folder, CASE, change={"model.norm.weight": -zeros["model.norm.weight"]})

    damage_when_finished(monkeypatch, negate)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not what the source holds"):
        convert(plan(source, "hf", Options()), tmp_path / "out", verify="tensors")


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_verify_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf", case_of(family))
    same = convert(plan(source, "hf", Options()), tmp_path / "same", verify="logits").verified
    assert same.startswith("logits: max error 0, 0 of the largest logit (3 samples, 3 pictures, ")
    rounded = convert(plan(source, "native", Options(dtype="bfloat16")), tmp_path / "rounded", verify="logits").verified
    assert 1e-4 < float(rounded.split("error ")[1].split(",")[0]) < 0.5
    damage_when_finished(monkeypatch, lambda folder: swap(folder))
    with pytest.raises(UserError, match=r"logits differ by up to .* from .*/hf's"):
        convert(plan(source, "hf", Options()), tmp_path / "out", verify="logits")
    assert not (tmp_path / "out").exists()


def swap(folder: Path) -> None:
    """Exchanges two tensors of the vision encoder: found only where pictures are looked at."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    first, second = [name for name in sorted(tensors) if "fc1.bias" in name and "vis" in name][:2]
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Bad input: one message, exit code 2, and nothing where the destination should be.


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(pattern: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = sorted(folder.glob(pattern))[0]
        file.write_bytes(file.read_bytes()[:size])

    return damage


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))


def foreign_pickle(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(print))
    size = (folder / ".metadata").stat().st_size
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][".metadata"]["bytes"] = size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_native(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)


BAD: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], str]] = {
    "not a checkpoint": (
        "hf",
        drop("config.json"),
        (),
        "not a checkpoint that is known (hf: config.json with safetens",
    ),
    "no folder": ("hf", shutil.rmtree, (), "no such folder; give a checkpoint folder"),
    "wrong family": ("hf", other_family, (), "no family knows a model with architectures ['GPT2LMHeadModel']"),
    "missing file": ("hf", drop("model-00002-of-00004.safetensors"), (), "model-00002-of-00004.safetensors: cannot be"),
    "cut header": ("hf", truncate("*-00001-*", 100), (), "damaged safetensors header (the file has 100 bytes, its hea"),
    "cut data": ("hf", truncate("*-00001-*", 9000), (), "damaged safetensors header (the file has 9000 bytes, by its"),
    "empty file": ("hf", truncate("*-00001-*", 0), (), "damaged safetensors header (the file has 0 bytes"),
    "format": ("hf", lambda folder: None, ("--to", "gguf"), "--to: unknown format 'gguf'; choose one of hf, native, m"),
    "dtype": ("hf", lambda folder: None, ("--dtype", "int8"), "--dtype: unknown 'int8'; choose one of float32, bfloa"),
    "layout": ("hf", lambda folder: None, ("--layout", "x"), "--layout: qwen2_vl has no layout 'x'; choose one of hub"),
    "shards": ("hf", lambda folder: None, ("--to", "native", "--shards", "dp2"), "--shards: 'dp2' is no layout; give"),
    "stages": ("hf", lambda folder: None, ("--to", "native", "--shards", "pp9"), "9 stages need as many layers, the m"),
    "native layout": ("hf", lambda folder: None, ("--to", "native", "--layout", "hub"), "means nothing to native chec"),
    "pattern": ("hf", lambda folder: None, ("--allow", "("), "--allow: '(' is no regular expression"),
    "size": ("hf", lambda folder: None, ("--file-size", "5 apples"), "--file-size: '5 apples' is no size; write it as"),
    "native again": ("native", lambda folder: None, ("--to", "native"), "is native already, and any layout loads it"),
    "native cut": ("native", truncate("__0_0*", 9000), (), "damaged (__0_0.distcp has 9000 bytes"),
    "native file": ("native", drop("__0_0.distcp"), (), "damaged (__0_0.distcp cannot be read"),
    "native contents": ("native", drop(".metadata"), (), "damaged (.metadata cannot be read"),
    "native bit": ("native", flip_native, (), "damaged (__0_0.distcp has checksum"),
    "native pickle": ("native", foreign_pickle, (), "refers to builtins.print, which has no place in a checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, damage, arguments, message = BAD[name]
    source = hf
    if kind == "native":
        source = tmp_path / "native"
        convert(plan(hf, "native", Options()), source)
    damage(source)
    out = tmp_path / "out"
    assert command(monkeypatch, source, out, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert not out.exists()


def test_a_destination_that_is_not_empty(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert command(monkeypatch, hf, out) == 2
    assert "exists and is not empty; choose another destination, or remove it" in capsys.readouterr().err
    assert contents(out) == {"notes.txt": b"mine"}
    assert command(monkeypatch, hf, hf) == 2
    (out / "notes.txt").unlink()
    assert command(monkeypatch, hf, out) == 0
    assert contents(out) == contents(hf)


def test_too_little_room_is_seen_before_anything_is_written(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=r"0\.0 GB free, 0\.1 GB needed; make room or choose another destination"):
        convert(plan(hf, "hf", Options()), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_disk_that_fills_up(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(UserError, match=r"no room \(No space left on device\); make some and run the same command"):
            convert(plan(hf, "hf", Options()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert(plan(hf, "hf", Options()), tmp_path / "out", verify="tensors").continued == 1


# Tensors too many and too few.


def test_tensors_too_many_or_too_few(tmp_path: Path) -> None:
    extra = {"extra.weight": torch.ones(3), "model.norm.weight": None}
    source = write_hf(tmp_path / "hf", CASE, change=extra)
    with pytest.raises(
        UserError, match=r"lacks 1 tensors \(model\.norm\.weight\) and holds, unused by the model,.*--allow"
    ):
        plan(source, "hf", Options())
    with pytest.raises(UserError, match=r"lacks 1 tensors \(model\.norm\.weight\); give"):
        plan(source, "hf", Options(allow=(r"extra\..*",)))
    allowed = Options(allow=(r"extra\..*", r"model\.norm\.weight"))
    result = convert(plan(source, "hf", allowed), tmp_path / "out", verify="tensors")
    assert "missing, as allowed: 1 tensors (model.norm.weight)" in result.notes
    assert "left out: 1 tensors (extra.weight), no parameters" in result.notes
    expected = tensors_of(CASE, "hub").keys() - {"model.norm.weight"}
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == expected
    with pytest.raises(
        UserError, match=r"lacks 1 tensors of the model \(model\.norm\.weight, …\), and a native checkpoi"
    ):
        plan(source, "native", allowed)


# What the user sees.


def test_the_mapping_table(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert command(monkeypatch, hf, out, "--to", "native", "--shards", "tp2", "--dtype", "bfloat16", "--dry-run") == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "model.layers.0.self_attn.o_proj.weight" in line)
    for part in ("64×32", "bfloat16", "model.layers.0.self_attn.o_proj.weight, columns 0-32 (float32)"):
        assert part in row, row
    assert "tensors in 2 files" in shown and "layout 'hub'" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_what_it_says_when_done(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert command(monkeypatch, "--verify", hf, tmp_path / "out", "--to", "native") == 0
    shown = capsys.readouterr().out
    assert "(hf, qwen2_vl) -> " in shown and "94 tensors read back, all bit-equal" in shown


def test_verify_may_stand_alone() -> None:
    assert bare_verify(["a", "b", "--verify"]) == ["a", "b", "--verify", "tensors"]
    assert bare_verify(["--verify", "a", "b"]) == ["--verify", "tensors", "a", "b"]
    assert bare_verify(["--verify", "logits", "a"]) == ["--verify", "logits", "a"]


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5g", 1_500_000_000), ("700", 700), ("2 MB", 2 * 10**6)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


# Memory and order.


class Counting:
    """A reader of one matrix that knows how many of its rows are on their way."""

    def __init__(self, rows: int, columns: int) -> None:
        self.tensor = HFTensor("a", (rows, columns))
        self.values = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
        self.given = 0
        self.calls: list[int] = []

    def read(self, name: str, start: int, rows: int) -> torch.Tensor:
        self.given += rows
        self.calls.append(rows)
        return self.values[start : start + rows]


def test_no_more_than_some_chunks_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(stream, "CHUNK_BYTES", 4 * 10 * 3)  # three rows of bf16 at a time would be 60 bytes: six are
    reader = Counting(1000, 10)
    target = Target("b", (900, 4), torch.bfloat16, (Piece(reader.tensor, 100, 900),), range(2, 6))
    taken, found = 0, []
    with ThreadPoolExecutor(THREADS) as pool:
        rows = RowStream(Output("file", (target,)), reader, pool, lambda count: None)  # type: ignore[arg-type]
        for chunk in rows.chunks(target):
            taken += len(chunk)
            found.append(chunk)
            assert reader.given - taken <= 2 * THREADS * 6
    assert max(reader.calls) == 6
    assert torch.equal(torch.cat(found), reader.values[100:, 2:6].bfloat16())


def test_copies_that_drifted_apart() -> None:
    a = torch.tensor([1.0, -0.0, 3.0])
    same, drift = reduce_copies([a, a.clone()])
    assert drift == 0 and torch.equal(same.view(torch.int32), a.view(torch.int32))
    mean, drift = reduce_copies([a, a + torch.tensor([0.5, 0.0, 0.0]), a])
    assert drift == pytest.approx(1 / 3) and mean.dtype == torch.float32
    assert torch.allclose(mean, torch.tensor([1 + 1 / 6, 0.0, 3.0]))


def test_files_are_begun_at_the_size_asked_for(hf: Path, tmp_path: Path) -> None:
    convert(plan(hf, "hf", Options(file_bytes=200_000)), tmp_path / "out", verify="tensors")
    files = sorted((tmp_path / "out").glob("model-*"))
    assert len(files) > 4 and all(file.stat().st_size < 200_000 + 20_000 for file in files)
    assert hf_write.INDEX in {path.name for path in (tmp_path / "out").iterdir()}
