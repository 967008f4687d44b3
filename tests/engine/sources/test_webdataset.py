"""Tar shards: the member table agrees with Python's tarfile, samples with what was written, and cuts lose no more than
they must.

Oracles: tarfile's own reading of the same archive (an independent reader), in every format that tarfile writes; and for
truncation, every length that an archive can be cut to.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tetrascope.engine.data.sources.base import BadSample, Blob, Record
from tetrascope.engine.data.sources.tar import Member, read_contents
from tetrascope.engine.data.sources.webdataset import WebDataset
from tetrascope.engine.data.store import Store
from tetrascope.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
QUESTION = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]}


def tar_bytes(members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(key: str, row: Any = QUESTION) -> dict[str, bytes]:
    return {f"{key}.json": json.dumps(row).encode(), f"{key}.jpg": f"picture of {key}".encode() * 30}


def shard(*keys: str) -> bytes:
    return tar_bytes({name: data for key in keys for name, data in sample(key).items()})


def open_one(tmp_path: Path, members: dict[str, bytes]) -> WebDataset:
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    return WebDataset(str(tmp_path / "a.tar"), Store(str(tmp_path)))


def contents(record: Record) -> list[bytes]:
    return [Store().read(blob) for file in record.files for blob in file.blobs]


@pytest.mark.parametrize("format", FORMATS)
def test_members_lie_where_tarfile_finds_them(tmp_path: Path, format: str) -> None:
    names = [
        "a.json",
        "dir/b.c.jpg",
        "empty.txt",
        "x" * 90 + "/" + "y" * 60 + ".jpg",
        "b512.bin",
        "b513.bin",
        "last.txt",
    ]
    if format != "ustar":
        names += ["z" * 300 + ".jpg", "é" * 120 + ".jpg", "é.txt"]
    members = {name: b"%d" % i * (i * 37) for i, name in enumerate(names)}
    members["b512.bin"], members["b513.bin"] = b"5" * 512, b"5" * 513
    data = tar_bytes(members, FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [Member(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
    assert len(expected) == len(members)
    (tmp_path / "a.tar").write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/tars/a.tar", data)
    for url in (str(tmp_path / "a.tar"), "memory://tars/a.tar"):
        found = read_contents(url, Store())
        assert found.members == expected and found.damage is None


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for name, kind in (("dir", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/" + "hostname" * 30
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    found = read_contents(str(tmp_path / "a.tar"), Store())
    assert [(one.name, one.size) for one in found.members] == [("a.txt", 3)] and found.damage is None


def test_sizes_of_8_gib_and_more(tmp_path: Path) -> None:
    """GNU's binary and pax's decimal sizes, in a sparse file: nothing of it is read or written."""
    size = 9 * 2**30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.mp4")
        info.size = size
        head = info.tobuf(format)
        with (tmp_path / "a.tar").open("wb") as file:
            file.write(head)
            file.seek(size, io.SEEK_CUR)
            file.write(tar_bytes({"after.txt": b"x"}))
        found = read_contents(str(tmp_path / "a.tar"), Store())
        after = len(head) + size + 512
        assert found.members == [Member("big.mp4", len(head), size), Member("after.txt", after, 1)]


def test_only_headers_are_read(tmp_path: Path) -> None:
    read: list[int] = []

    class Counted(Store):
        def read(self, blob: Blob) -> bytes:
            found = super().read(blob)
            read.append(len(found))
            return found

    big = {f"{i}.jpg": b"x" * 2_000_000 for i in range(5)}
    fsspec.filesystem("memory").pipe_file("/tars/big.tar", tar_bytes(big))
    assert len(read_contents("memory://tars/big.tar", Counted()).members) == 5
    assert sum(read) < 1_000_000


@pytest.mark.parametrize("path", ["shard-{000..002}.tar", "shard-*.tar", "", "shard-{000,001,002}.tar"])
@pytest.mark.parametrize("remote", [False, True])
def test_shards_are_one_source(tmp_path: Path, path: str, remote: bool) -> None:
    keys = [["a", "b", "c"], [], ["d", "e"]]
    for i, of_shard in enumerate(keys):
        (tmp_path / f"shard-{i:03d}.tar").write_bytes(shard(*of_shard))
    place, store = str(tmp_path / path), Store(str(tmp_path))
    if remote:
        for file in tmp_path.iterdir():
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{file.name}", file.read_bytes())
        place, store = f"memory://{tmp_path.name}/{path}".rstrip("/"), Store(f"memory://{tmp_path.name}")
    source = WebDataset(place, store)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.stamp() == source.stamp()
    for opened in (source, copy):
        assert (len(opened), opened.blocks(), opened.damage) == (5, [range(0, 3), range(3, 5)], [])
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(opened.record, list(range(5)) * 10))
        assert [one.name for one in found] == list("abcde") * 10
        assert [contents(one) for one in found] == [[sample(key)[f"{key}.jpg"]] for key in "abcde"] * 10
    with pytest.raises(IndexError):
        source.record(5)


def test_members_with_the_same_key_are_a_sample(tmp_path: Path) -> None:
    """The key ends at the first dot of the last path component; only neighbours are grouped."""
    members = {
        **sample("v1.0/x"),
        **sample("v1.0/y"),
        **sample("x"),
        "x.cls": b"no part of it",
        ".hidden.json": b"{}",
        "__meta__/a.json": b"{}",
        "no-suffix": b"",
        **sample("./dir/z"),
        "y.seg.PNG": b"mask",
        "y.json": json.dumps(QUESTION).encode(),
    }
    source = open_one(tmp_path, members)
    assert [source.record(i).name for i in range(len(source))] == ["v1.0/x", "v1.0/y", "x", "./dir/z", "y"]
    assert contents(source.record(4)) == [b"mask"]


def test_captions(tmp_path: Path) -> None:
    members = {"a.jpg": b"a", "a.txt": b" A cat.\n", "b.txt": b"Two.", "b.1.png": b"b1", "b.0.png": b"b0"}
    members |= {"c.mp4": b"c", "c.txt": b"A film.", "c.json": b'{"caption": "x", "url": "http://host/c.mp4"}'}
    source = open_one(tmp_path, members)
    shown = [
        ([part["type"] for part in m[0]["content"]], m[1]) for m in (source.record(i).messages or [] for i in range(3))
    ]
    assert shown == [
        (kinds, {"role": "assistant", "content": text})
        for kinds, text in ((["image"], "A cat."), (["image", "image"], "Two."), (["video"], "A film."))
    ]
    assert [contents(source.record(i)) for i in range(3)] == [[b"a"], [b"b0", b"b1"], [b"c"]]
    assert source.record(2).files[0].kind == "video"


def image(name: str | None = None) -> dict[str, Any]:
    return {"type": "image"} if name is None else {"type": "image", "image": name}


@pytest.mark.parametrize(
    ("parts", "row", "expected"),
    [
        ([image()] * 3, {}, [2, 9, 10]),  # the one without a number, then by number: 9 before 10
        ([image("10.jpg"), image(), image()], {}, [10, 2, 9]),  # those that are named, and the others
        ([image("d/k.10.jpg"), image("k.jpg"), image("9.jpg")], {}, [10, 2, 9]),
        ([image("jpg"), image("jpg"), image("k.9.jpg"), image("k.10.jpg")], {}, [2, 2, 9, 10]),
        ([image()] * 2, {"images": ["k.10.jpg", "9.jpg"]}, [10, 9]),  # the row's own list is all there is
        ([image()], {"image": "k.9.jpg"}, [9]),
        ([{"type": "image_url", "image_url": {"url": "k.9.jpg"}}, image(), image()], {}, [9, 2, 10]),
        ([{"type": "video", "video": ["9.jpg", "10.jpg"]}, image()], {}, [9, 10, 2]),
        ([image()] * 3 + [{"type": "text", "text": "jpg"}], {"caption": "9.jpg"}, [2, 9, 10]),  # no names: texts
    ],
)
def test_several_images(tmp_path: Path, parts: list[Any], row: dict[str, Any], expected: list[int]) -> None:
    data = {"d/k.10.jpg": b"10", "d/k.9.jpg": b"9", "d/k.jpg": b"2"}
    line = {"id": "s", "messages": [{"role": "user", "content": parts}], **row}
    source = open_one(tmp_path, {**data, "d/k.json": json.dumps(line).encode()})
    assert contents(source.record(0)) == [str(i).encode() for i in expected]
    assert source.record(0).name == "s"


def test_a_fuller_name_counts_before_a_suffix(tmp_path: Path) -> None:
    """Of 0.jpg and 0.0.jpg, samples of the key 0, the second's suffix is the first's name."""
    parts = [image("0.jpg"), image("0.0.jpg")]
    members = {"0.json": json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()}
    for images in ({"0.jpg": b"a", "0.0.jpg": b"b"}, {"0.0.jpg": b"b", "0.jpg": b"a"}):
        assert contents(open_one(tmp_path, {**images, **members}).record(0)) == [b"a", b"b"]


def test_llava_rows(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    found = open_one(tmp_path, sample("a", {"conversations": turns})).record(0)
    assert [part["type"] for part in (found.messages or [])[0]["content"]] == ["image", "text"]
    assert len(found.files) == 1


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"a.json": b"{"}, "bad json"),
        ({"a.json": b"\xff"}, "bad json"),
        ({"a.json": b"[1]"}, "bad json"),
        ({"a.txt": b"\xff", "a.jpg": b"x"}, "bad json"),
        ({"a.json": json.dumps(QUESTION).encode()}, "bad json"),  # no image for its place
        ({**sample("a"), "a.2.jpg": b"one too many"}, "bad json"),
        ({"a.jpg": b"x"}, "missing file"),
        ({"a.txt": b"x"}, "missing file"),
        ({"a.json": b"", "a.jpg": b"x"}, "empty file"),
        *(
            (sample("a", {"messages": [{"role": "user", "content": [image(name)]}]}), "missing file")
            for name in ("/etc/hostname", "../outside.jpg", "beside.jpg", "b.jpg", "http://host/a.jpg")
        ),
    ],
)
def test_bad_samples(tmp_path: Path, members: dict[str, bytes], kind: str) -> None:
    (tmp_path / "beside.jpg").write_bytes(b"secret")
    source = open_one(tmp_path, {**members, **sample("b")})
    with pytest.raises(BadSample, match=r"a\.tar") as found:
        source.record(0)
    assert found.value.kind == kind
    assert source.record(1).name == "b"


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/../../outside"])
def test_names_are_never_joined_with_a_path(tmp_path: Path, name: str) -> None:
    row = {"messages": [{"role": "user", "content": [image(f"{name}.jpg")]}]}
    found = open_one(tmp_path, sample(name, row)).record(0)
    assert contents(found) == [sample(name)[f"{name}.jpg"]]
    assert found.files[0].blobs[0].url == str(tmp_path / "a.tar")


def test_every_cut_loses_only_what_is_cut(tmp_path: Path) -> None:
    """Cut at any length, the samples that end before it are whole, and there is one damage that says so."""
    whole, path = shard("a", "b"), tmp_path / "shard-1.tar"
    (tmp_path / "shard-0.tar").write_bytes(shard("z"))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [one.offset_data + one.size for one in tar]  # of the members a.json, a.jpg, b.json, b.jpg
    marker = len(whole) // 512 * 512  # where the zeros begin, found below
    while not any(whole[marker - 512 : marker]):
        marker -= 512
    for cut in [*range(0, marker + 512, 37), *ends, *(end - 1 for end in ends), marker, marker + 511]:
        path.write_bytes(whole[:cut])
        source = WebDataset(str(tmp_path / "shard-*.tar"), Store(str(tmp_path)))
        assert [one.kind for one in source.damage] == ["truncated tar" if cut else "empty file"], cut
        assert "shard-1.tar" in str(source.damage[0])
        good = []
        for i in range(len(source)):
            try:
                good.append(contents(source.record(i))[0])
            except BadSample as error:
                assert error.kind == "truncated tar" and i == len(source) - 1, (cut, error)
        keys = ["z"] + ["a"] * (cut >= ends[1]) + ["b"] * (cut >= ends[3])
        assert good == [sample(key)[f"{key}.jpg"] for key in keys], cut
        if cut == marker:
            assert "without an end marker" in str(source.damage[0])
    path.write_bytes(whole[: marker + 512])
    assert not WebDataset(str(tmp_path / "shard-*.tar"), Store(str(tmp_path))).damage


def test_a_sample_whose_member_is_cut_is_left_out(tmp_path: Path) -> None:
    """Even where what is left of it would make a sample: a caption with one of its two images."""
    members = {"a.txt": b"One.", "a.jpg": b"a", "b.txt": b"Two.", "b.0.jpg": b"b" * 900, "b.1.jpg": b"c" * 900}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members)[: 9 * 512 + 1024])
    source = WebDataset(str(tmp_path / "a.tar"), Store())
    assert [source.record(i).name for i in range(len(source))] == ["a"]
    assert "b.1.jpg" in str(source.damage[0])
    members |= {"b.1.npy": members.pop("b.1.jpg")}  # nothing that is used
    (tmp_path / "a.tar").write_bytes(tar_bytes(members)[: 9 * 512 + 1024])
    source = WebDataset(str(tmp_path / "a.tar"), Store())
    assert [source.record(i).name for i in range(len(source))] == ["a", "b"]


@pytest.mark.parametrize("bad", [b"\xff" * 512, b"<html>".ljust(512), b"\x80" + b"\xff" * 11])
def test_a_header_that_is_none_ends_the_shard(tmp_path: Path, bad: bytes) -> None:
    whole = bytearray(shard("a", "b"))
    with tarfile.open(fileobj=io.BytesIO(bytes(whole))) as tar:
        start = tar.getmembers()[2].offset
    if len(bad) == 512:
        whole[start : start + 512] = bad
    else:  # a size of 2^88 bytes, with a right checksum
        whole[start + 124 : start + 136] = bad
        whole[start + 148 : start + 156] = b" " * 8
        whole[start + 148 : start + 156] = b"%06o\0 " % sum(whole[start : start + 512])
    (tmp_path / "a.tar").write_bytes(whole)
    source = WebDataset(str(tmp_path / "a.tar"), Store(str(tmp_path)))
    assert [source.record(i).name for i in range(len(source))] == ["a"]
    assert [one.kind for one in source.damage] == ["truncated tar"]


def test_files_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(shard("a")))
    (tmp_path / "b.tar").write_bytes(gzip.compress(shard("a")))
    (tmp_path / "none.tar").write_bytes(tar_bytes({"a.npy": b"x"}))
    (tmp_path / "page.tar").write_text("<html>" * 100)
    (tmp_path / "folder").mkdir()
    for name, message in {
        "a.tar.gz": r"gzip.*decompress",
        "b.tar": r"gzip.*decompress",
        "none.tar": "holds no samples",
        "page.tar": "holds no samples.*no tar header",
        "folder": "holds no .tar files",
        "{none,missing}.tar": "missing.tar cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            WebDataset(str(tmp_path / name), Store(str(tmp_path)))
    with pytest.raises(UserError, match=r"nowhere/a\.tar"):
        WebDataset("memory://nowhere/a.tar", Store())
