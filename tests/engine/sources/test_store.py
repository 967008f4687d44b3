"""Reading bytes: what stays inside the root, what is tried again and how often, how many requests at once.

The oracle is a file system that counts: every request that reaches it is a request that a real one would be billed
for, and the bytes are known.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from tetrascope.engine.data import store as store_module
from tetrascope.engine.data.sources.base import BadSample, Blob
from tetrascope.engine.data.store import Store, StoreOptions
from tetrascope.errors import UserError

CONTENT = bytes(range(256))


class CountingFileSystem(AbstractFileSystem):
    """Serves CONTENT under every name but `missing`; fails its first `failures` requests."""

    protocol = "counting"
    cachable = False
    failures = 0
    error: Exception = OSError("503 slow down")
    requests = 0
    together = most_together = 0
    pause = 0.0
    ranges = True
    lock = threading.Lock()

    def _serve(self, path: str) -> None:
        cls = CountingFileSystem
        with cls.lock:
            cls.requests += 1
            failed = cls.requests <= cls.failures
            cls.together += 1
            cls.most_together = max(cls.most_together, cls.together)
        time.sleep(cls.pause)
        with cls.lock:
            cls.together -= 1
        if failed:
            raise cls.error
        if "missing" in path:
            raise FileNotFoundError(path)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._serve(path)
        return {"name": path, "size": len(CONTENT), "type": "file", "ETag": "v1"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._serve(path)
        return CONTENT[start:end] if self.ranges else CONTENT

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._serve(rpath)
        Path(lpath).write_bytes(CONTENT)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> type[CountingFileSystem]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    for name, value in (("failures", 0), ("requests", 0), ("most_together", 0), ("pause", 0.0), ("ranges", True)):
        monkeypatch.setattr(CountingFileSystem, name, value)
    monkeypatch.setattr(CountingFileSystem, "error", OSError("503 slow down"))
    return CountingFileSystem


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between attempts; nothing really waits."""
    waited: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.bin").write_bytes(CONTENT)
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inner").symlink_to(root / "sub" / "a.bin")
    (tmp_path / "data-other").mkdir()
    (tmp_path / "data-other" / "x").write_bytes(b"secret")
    yield root


@pytest.mark.parametrize("path", ["sub/a.bin", "./sub/../sub/a.bin", "inner"])
def test_paths_inside_the_root_are_read(folder: Path, path: str) -> None:
    store = Store(str(folder))
    assert store.read(Blob(store.resolve(path))) == CONTENT
    assert store.read(Blob(store.resolve(str(folder / path)))) == CONTENT
    assert store.read(Blob(store.resolve(f"file://{folder / path}"))) == CONTENT


@pytest.mark.parametrize(
    "path",
    [
        *("..", "../secret", "sub/../../secret", "link", "{parent}/secret", "../data-other/x"),
        *("{parent}/data-other/x", "file://{parent}/secret", "memory://data/x", "s3://bucket/x", "http://host/x"),
    ],
)
def test_paths_out_of_the_root_are_refused(folder: Path, path: str) -> None:
    with pytest.raises(BadSample) as found:
        Store(str(folder)).resolve(path.format(parent=folder.parent))
    assert found.value.kind == "outside root"


@pytest.mark.parametrize(
    "path",
    [
        *("../x", "a/../../x", "a/%2e%2e/%2E%2e/x", "memory://other/x", "memory://datax/x", "memory://data/../other"),
        *("s3://bucket/x", "a::file:///etc/hostname", "memory://data/a::file:///etc/hostname"),
    ],
)
def test_urls_out_of_a_remote_root_are_refused(path: str) -> None:
    with pytest.raises(BadSample) as found:
        Store("memory://data").resolve(path)
    assert found.value.kind == "outside root"


def test_urls_inside_a_remote_root() -> None:
    store = Store("memory://data/")
    assert store.resolve("a/b.png") == store.resolve("memory://data/a/b.png") == "memory://data/a/b.png"
    assert store.resolve("/etc/hostname") == "memory://data/etc/hostname"  # of the root, not of this machine


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000, "sub", "sub/missing"])
@pytest.mark.parametrize("bounded", [True, False])
def test_paths_that_are_no_file_are_bad_samples(folder: Path, path: str, bounded: bool) -> None:
    store = Store(str(folder) if bounded else None)
    with pytest.raises(BadSample) as found:
        store.read(Blob(store.resolve(path if bounded else f"{folder}/{path}")))
    assert found.value.kind == "missing file"


def test_ranges(folder: Path, remote: Any) -> None:
    for url in (str(folder / "sub" / "a.bin"), "counting://a.bin"):
        store = Store()
        assert store.read(Blob(url, 10, 20)) == CONTENT[10:30]
        assert store.read(Blob(url, 250)) == CONTENT[250:]
        assert store.read(Blob(url, 0, 3)) == CONTENT[:3]
        with store.open(Blob(url, 100, 50)) as file:
            assert file.seek(-5, os.SEEK_END) == 45
            assert file.read() == CONTENT[145:150]
            assert file.seek(3) == 3 and file.seek(2, os.SEEK_CUR) == 5 and file.tell() == 5
            assert (file.read(2), file.read(100), file.read(1)) == (CONTENT[105:107], CONTENT[107:150], b"")


def test_nothing_is_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"x")
    fsspec.filesystem("memory").pipe_file("/store/empty", b"")
    blobs = [Blob("x", data=b""), Blob(str(tmp_path / "empty")), Blob("memory://store/empty")]
    for blob in [*blobs, Blob(str(tmp_path / "full"), 0, 0)]:
        with pytest.raises(BadSample) as found:
            Store().open(blob)
        assert found.value.kind == "empty file"


def test_failures_are_tried_again_with_growing_waits(remote: Any, waits: list[float]) -> None:
    remote.failures = 3
    assert Store(options=StoreOptions(retries=3)).read(Blob("counting://a")) == CONTENT
    assert remote.requests == 4
    assert len(waits) == 3
    assert all(0.2 * 2**i <= wait <= 0.2 * 2**i + 1 for i, wait in enumerate(waits))  # the jitter is up to 1 s


@pytest.mark.parametrize("error", [OSError("503"), RuntimeError("of the library's own"), TimeoutError()])
def test_what_fails_too_often_is_a_bad_sample_or_a_user_error(remote: Any, waits: list[float], error: Any) -> None:
    remote.failures, remote.error = 100, error
    store = Store(options=StoreOptions(retries=2))
    with pytest.raises(BadSample) as found:
        store.read(Blob("counting://a"))
    assert (found.value.kind, remote.requests) == ("missing file", 3)
    with pytest.raises(UserError, match=r"counting://a"):
        store.stamp("counting://a")
    assert remote.requests == 6


def test_what_cannot_change_is_not_tried_again(remote: Any, waits: list[float]) -> None:
    with pytest.raises(BadSample, match="does not exist"):
        Store().read(Blob("counting://missing"))
    remote.failures, remote.error = 2, PermissionError("403")
    with pytest.raises(BadSample, match="403"):
        Store().read(Blob("counting://a"))
    assert (remote.requests, waits) == (2, [])


def test_an_interrupt_ends_it(remote: Any, waits: list[float]) -> None:
    def interrupted() -> None:
        remote.requests += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store().request(interrupted)
    assert remote.requests == 1


def test_a_server_without_ranges_is_not_believed(remote: Any, waits: list[float]) -> None:
    remote.ranges = False
    with pytest.raises(BadSample, match="cannot serve ranges"):
        Store(options=StoreOptions(retries=0)).read(Blob("counting://a", 10, 5))


def test_requests_at_once_are_bounded(remote: Any) -> None:
    remote.pause = 0.01
    store = Store(options=StoreOptions(concurrency=3))
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda i: store.read(Blob(f"counting://{i}")), range(24))) == {CONTENT}
    assert (remote.requests, remote.most_together) == (24, 3)


def test_requests_per_second_are_limited(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only sleeping moves, n requests take (n - 1) / rate seconds; failed ones count too."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(
        monotonic=lambda: clock.now, sleep=lambda seconds: setattr(clock, "now", clock.now + seconds)
    )
    monkeypatch.setattr(store_module, "time", fake)
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    remote.failures = 2
    store = Store(options=StoreOptions(requests_per_second=4))
    for i in range(9):
        store.read(Blob(f"counting://{i}"))
    assert remote.requests == 11
    assert clock.now - 100 == pytest.approx(10 / 4)


def test_local_copies(remote: Any, tmp_path: Path) -> None:
    store = Store(options=StoreOptions(cache_dir=tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(store.local, ["counting://d/index.idx"] * 8))
    assert len(paths) == 1
    path = paths.pop()
    assert path.read_bytes() == CONTENT and path.suffix == ".idx" and list(path.parent.iterdir()) == [path]
    before = remote.requests
    assert store.local("counting://d/index.idx") == path
    assert remote.requests == before + 1  # whether it changed, not its bytes
    assert store.local(str(tmp_path)) == tmp_path
    assert store.local(f"file://{tmp_path}") == tmp_path
    with pytest.raises(UserError, match="missing"):
        store.local("counting://missing")


def test_stamps_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    first = Store().stamp(str(path))
    assert first == Store().stamp(str(path)) == Store().stamp(f"file://{path}")
    path.write_bytes(b"12")
    assert Store().stamp(str(path)) != first
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/stamp/a", b"1")
    first = Store().stamp("memory://stamp/a")
    memory.pipe_file("/stamp/a", b"12")
    assert Store().stamp("memory://stamp/a") != first


@pytest.mark.parametrize("url", ["nosuch://bucket/a"])
def test_an_unknown_file_system_is_a_user_error(url: str) -> None:
    with pytest.raises(UserError, match="nosuch"):
        Store().stamp(url)


def test_stores_travel_to_worker_processes(folder: Path) -> None:
    copy = pickle.loads(pickle.dumps(Store(str(folder), StoreOptions(retries=1, concurrency=2))))
    assert copy.options == StoreOptions(retries=1, concurrency=2)
    with pytest.raises(BadSample):
        copy.resolve("../secret")
