"""Hardware profiles: those of the package, files of the user's, and measuring one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.predict.link_jobs import link
from tetrascope.engine.predict import Link, calibrate, hardware_names, load_hardware, save_hardware
from tetrascope.errors import UserError
from tetrascope.tools.verify.pool import WorkerPool


def test_profiles() -> None:
    assert hardware_names() == ["h100-sxm", "h200", "a100", "cpu"]
    for name in hardware_names():
        found = load_hardware(name)
        assert found.name == name
        assert found.peak("float32") > 0 and found.peak("bfloat16") > 0
    h100 = load_hardware("h100-sxm")
    assert h100.peak("bfloat16") == 989.4e12
    assert h100.link(8) == h100.intra_node
    assert h100.link(9) == h100.inter_node


def test_file_there_and_back(tmp_path: Path) -> None:
    found = replace(load_hardware("a100"), name="mine", matmul_share=0.5)
    save_hardware(found, tmp_path / "mine.yaml")
    assert load_hardware(str(tmp_path / "mine.yaml")) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("matmul_share: 0.5", "matmul_shares: 0.5"), r"unknown key 'matmul_shares'; did you mean 'matmul_share'"),
        (("matmul_share: 0.5", "matmul_share: 1.5"), r"'matmul_share' is 1.5: input should be less than or equal to 1"),
        (("  latency", "  latencies"), r"unknown key 'intra_node.latencies'; did you mean 'intra_node.latency'"),
        (("kernel_seconds: ", "# "), r"'kernel_seconds' is missing; add it"),
    ],
)
def test_wrong_fields(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.yaml"
    save_hardware(replace(load_hardware("a100"), matmul_share=0.5), path)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=message) as caught:
        load_hardware(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_no_such_hardware(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--hardware: 'b200' is neither a profile \(h100-sxm, h200, a100, cpu\) nor"):
        load_hardware("b200")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UserError, match=r"list\.yaml: expected the fields of a hardware profile"):
        load_hardware(str(path))
    path.write_text("a: [1\n")
    with pytest.raises(UserError, match=r"list\.yaml: cannot be read as YAML"):
        load_hardware(str(path))
    with pytest.raises(UserError, match=r"hardware cpu: peak_flops has no float16, only float32, bfloat16; add it"):
        load_hardware("cpu").peak("float16")
    with pytest.raises(UserError, match=r"cannot be written .*; give another file"):
        save_hardware(load_hardware("cpu"), tmp_path)


def test_collectives_in_a_ring() -> None:
    """Eight ranks gather 800 bytes at 100 bytes/s: seven steps of 100 bytes, each 1 s and 0.5 s of latency."""
    one = Link(latency=0.5, bandwidth=100.0)
    assert one.gather(800, 8) == 7 * 1.5
    assert one.reduce(800, 8) == 14 * 1.5
    assert one.gather(800, 1) == one.reduce(800, 1) == 0
    assert one.point_to_point(100) == 1.5


def test_measured_on_this_machine() -> None:
    """Less than 20 s of its own time, and figures in the realm of the possible for any core."""
    threads, start = torch.get_num_threads(), time.process_time()
    found = calibrate("cpu")
    assert (time.process_time() - start) / threads < 20
    assert 1e9 < found.peak("float32") < 1e13
    assert 0.2 < found.matmul_share <= 1
    assert 0.01 < found.attention_share <= 1
    assert 1e8 < found.memory_bandwidth < 1e13
    assert 1e-8 < found.kernel_seconds < 1e-3
    assert found.intra_node == load_hardware("cpu").intra_node


def test_measured_link(pool: WorkerPool) -> None:
    for found in pool.run(link, world=2):
        assert 1e-7 < found.latency < 0.1
        assert 1e6 < found.bandwidth < 1e12
