"""The cache on disk: what comes out is what went in, or nothing; and it is never larger than it may be."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.engine.decode.jobs import fill, published
from tetrascope.engine.data.decode import cache as module
from tetrascope.engine.data.decode.cache import HEADER, DecodeCache, cache_key
from tetrascope.errors import UserError


def pixels(seed: int, frames: int = 2, side: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side + 1, 3), dtype=np.uint8)


def file_of(cache: DecodeCache, key: str) -> Path:
    (path,) = cache.folder.glob(f"*/{key}*")
    return path


def age(cache: DecodeCache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(file_of(cache, key), (then, then))


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache = DecodeCache(tmp_path / "new" / "folder", 10**6)
    arrays = {cache_key("a", 1): pixels(0), cache_key("a", 2): pixels(1, frames=1, side=31)}
    for key, array in arrays.items():
        assert cache.get(key) is None
        cache.put(key, array)
    strided = pixels(3)[:, ::-1, ::2]
    cache.put("strided", strided)
    again = pickle.loads(pickle.dumps(cache))
    for key, array in {**arrays, "strided": strided}.items():
        found = again.get(key)
        assert found is not None and found.dtype == np.uint8 and np.array_equal(found, array)


def test_keys_tell_everything_apart() -> None:
    parts = [
        ("ab", "c"),
        ("a", "bc"),
        ("a", "b", "c"),
        ("a", 1),
        ("a", "1"),
        ("a", None),
        ("a",),
        ("a", 1, 2),
        ("a", 12),
    ]
    assert len({cache_key(*one) for one in parts}) == len(parts)
    assert cache_key("a", 1) == cache_key("a", 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: HEADER.size],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: b"X" + data[1:],
    ],
)
def test_a_damaged_file_is_a_miss_and_goes(tmp_path: Path, damage: object) -> None:
    cache = DecodeCache(tmp_path, 10**6)
    cache.put("key", pixels(0))
    path = file_of(cache, "key")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.get("key") is None and not path.exists()
    cache.put("key", pixels(0))
    assert np.array_equal(cache.get("key"), pixels(0))  # type: ignore[arg-type]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    size = HEADER.size + pixels(0).nbytes
    cache = DecodeCache(tmp_path, 4 * size)
    for number in range(4):
        cache.put(f"{number}", pixels(number))
        age(cache, f"{number}", 1000 - number)
    assert cache.get("0") is not None  # used just now
    cache.put("4", pixels(4))
    # Down to nine tenths of the bound with the new one: two of five have to go.
    assert [cache.get(f"{number}") is not None for number in range(5)] == [True, False, False, True, True]
    assert published(tmp_path) == 3 * size


def test_what_is_larger_than_the_cache_is_not_kept_and_removes_nothing(tmp_path: Path) -> None:
    cache = DecodeCache(tmp_path, HEADER.size + pixels(0).nbytes)
    cache.put("fits", pixels(0))
    cache.put("larger", pixels(0, side=11))
    assert cache.get("larger") is None and cache.get("fits") is not None


def test_the_bound_holds_for_all_processes_together(tmp_path: Path) -> None:
    bound = 20_000
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as executor:
        # Two pairs put the same keys, at the same time.
        jobs = [executor.submit(fill, tmp_path, bound, first, 4) for first in (0, 0, 40, 40)]
        most = [job.result(timeout=100) for job in jobs]
    assert bound // 2 < max(most) <= bound
    assert not list(tmp_path.glob("*/*.partial"))


@pytest.mark.parametrize("text", [b"", b"-3", b"many"])
def test_a_damaged_total_is_counted_anew(tmp_path: Path, text: bytes) -> None:
    size = HEADER.size + pixels(0).nbytes
    for number in range(6):
        (tmp_path / "total").write_bytes(text)
        DecodeCache(tmp_path, 4 * size).put(f"{number}", pixels(number))
    assert published(tmp_path) <= 4 * size


def test_what_a_killed_process_left_goes_after_a_while(tmp_path: Path) -> None:
    size = HEADER.size + pixels(0).nbytes
    cache = DecodeCache(tmp_path, 2 * size)
    cache.put("0", pixels(0))
    old, new = (file_of(cache, "0").with_name(f"{name}.partial") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    for number in range(1, 4):
        cache.put(f"{number}", pixels(number))
    assert new.exists() and not old.exists()


def test_a_full_disk_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DecodeCache(tmp_path, 10**6)

    def full(path: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        cache.put("key", pixels(0))
    assert cache.get("key") is None and not list(tmp_path.glob("*/*"))


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.decode_cache\.dir: .*file cannot be used"):
        DecodeCache(tmp_path / "file", 10**6)

    def no_locks(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="name a folder on a local disk"):
        DecodeCache(tmp_path, 10**6)
