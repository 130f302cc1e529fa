"""Files from afar, the cache that keeps them, and what goes wrong with both."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from datamodules import fetch, urls
from datamodules.fetch import Files, Stored
from datamodules.index import open_index
from datamodules.urls import quoted
from tests.datamodules.test_folder import write
from tests.served import served

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSE", 0.01)


def files_at(root: Path | str, cache: Path, capacity: int = 10**9) -> Files:
    return Files(str(root), str(cache), capacity)


def put(root: Path, name: str = "a.tar", content: bytes = CONTENT) -> Stored:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
    return Stored(name, len(content), hashlib.sha256(content).hexdigest())


def content_of(files: Files, file: Stored) -> bytes:
    return files.open(file).read(0, file.size)


# Addresses.


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/a b/ä#1.tar", "https://host/a%20b/%C3%A4%231.tar"),
        ("https://host/a%20b/100%.tar", "https://host/a%20b/100%25.tar"),
        ("https://host:8/x?token=a%2Bb&c=d+e", "https://host:8/x?token=a%2Bb&c=d+e"),
        ("https://user@host", "https://user@host"),
    ],
)
def test_what_may_not_stand_in_a_url_is_quoted_once(url: str, expected: str) -> None:
    assert quoted(url) == expected == quoted(expected)


def test_names_of_all_kinds_are_asked_for_by_their_names(tmp_path: Path) -> None:
    odd = "50 % of #1, ä"
    file = put(tmp_path / odd / "train", "é-0.tar")
    (file_url, cache) = (f"file://{tmp_path / odd / 'train'}", tmp_path / "cache")
    assert content_of(files_at(file_url, cache), file) == CONTENT
    shutil.rmtree(cache)
    with served(tmp_path) as (url, asked):
        assert content_of(files_at(f"{url}/{odd}/train", cache), file) == CONTENT
        shutil.rmtree(cache)
        as_browsers_copy_it = f"{url}/50%20%25%20of%20%231,%20%C3%A4/train"
        assert content_of(files_at(as_browsers_copy_it, cache), file) == CONTENT
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("http://127.0.0.1:port", "port/a.tar is no address (nonnumeric port: 'port'); expected"),
        ("http://[::1", "is no address (Invalid IPv6 URL); expected such as https://host"),
        ("http:///a", "could not be fetched, tried once: <urlopen error no host given>"),
        ("file:///nowhere", "could not be fetched, tried once: <urlopen error [Errno 2]"),
    ],
)
def test_what_can_never_come_is_told_at_once(root: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - matched below
        files_at(root, tmp_path).open(Stored("a.tar", 1, "0" * 64))
    assert says in str(error.value)


# Servers.


@pytest.mark.parametrize(
    ("faults", "tries"),
    [
        (["500", "502"], 3),
        (["429"], 2),
        (["broken off", "short"], 3),
        (["silent"], 2),
        (["/b/a.tar"], 1),
        (["503", "/b/a.tar"], 2),
    ],
)
def test_what_a_server_does_now_and_then_does_no_harm(
    tmp_path: Path, faults: list[str], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "TIMEOUT", 0.2)
    file = put(tmp_path)
    put(tmp_path / "b")
    with served(tmp_path, {"/a.tar": faults}) as (url, asked):
        assert content_of(files_at(url, tmp_path / "cache"), file) == CONTENT
    assert asked.count("/a.tar") == tries
    assert ("/b/a.tar" in asked) == ("/b/a.tar" in faults)


@pytest.mark.parametrize(
    ("fault", "tries", "says"),
    [
        *(("403", 1, "403"), ("404", 1, "404"), ("410", 1, "410"), ("500", 4, "500")),
        *(("/a.tar", 1, "infinite loop"), ("broken off", 4, "5,120 of 10,240 bytes came")),
    ],
)
def test_what_a_server_never_gives_is_named(
    tmp_path: Path, fault: str, tries: int, says: str
) -> None:
    file = put(tmp_path)
    with served(tmp_path, {"/a.tar": [fault] * 99}) as (url, asked):
        with pytest.raises(ValueError, match=rf"{url}/a\.tar could not be fetched") as error:
            content_of(files_at(url, tmp_path / "cache"), file)
        assert ("tried once: " if tries == 1 else f"tried {tries} times: ") in str(error.value)
        assert says in str(error.value)
        assert len(asked) == tries or fault == "/a.tar"  # one try follows many redirections
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_other_kinds_of_url_go_by_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/50% a#b/a.tar", CONTENT)
    files = files_at("memory://bucket/50% a#b", tmp_path / "cache")
    file = put(tmp_path)
    assert content_of(files, file) == CONTENT
    with pytest.raises(
        ValueError, match=r"b\.tar could not be fetched, tried once: there is no file .*b\.tar"
    ):
        files.open(Stored("b.tar", 1, "0" * 64))

    class TokenError(Exception):
        """As the packages behind fsspec raise them."""

    def refuse(*_: Any, **__: Any) -> None:
        raise TokenError("expired")

    monkeypatch.setattr(type(memory), "_open", refuse)
    with pytest.raises(
        ValueError, match="tried 4 times: TokenError: expired; check that it is there"
    ):
        files.open(Stored("c.tar", 1, "0" * 64))


# The cache.


def test_room_is_made_of_our_own_files_only(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    thesis = cache / "thesis.tar"
    cache.mkdir()
    thesis.write_bytes(bytes(100))
    os.utime(thesis, (0, 0))
    names = ("a.tar", "b.tar")
    stored = [put(tmp_path / "data", name, name.encode() * 20) for name in names]
    files = files_at(f"file://{tmp_path / 'data'}", cache, capacity=150)
    for file in stored:
        files.open(file)
    assert len(list(cache.rglob("*.tar"))) == 2  # b.tar, for which a.tar made room, and the thesis
    assert thesis.stat().st_size == 100


def test_a_cache_that_is_none_is_told_with_what_to_do(tmp_path: Path) -> None:
    file = put(tmp_path / "data")
    (tmp_path / "notes.txt").write_text("mine")
    file_as_cache = tmp_path / "notes.txt"
    for cache in (file_as_cache, file_as_cache / "deeper", Path("/proc/nowhere")):
        with pytest.raises(
            ValueError, match=rf"{cache}/patchlight-shards cannot be used \(.*source_args\.cache"
        ):
            files_at(f"file://{tmp_path / 'data'}", cache).open(file)


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")]
)
def test_what_cannot_be_written_is_told_and_asked_for_once(
    tmp_path: Path, number: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, cache = put(tmp_path), Path.open, tmp_path / "cache"

    class Full:
        """A file on a disk that takes a little more."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.taken = inner, 0

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def write(self, block: memoryview) -> int:
            if self.taken:
                raise OSError(number, os.strerror(number))
            self.taken = int(self.inner.write(block[:100]))
            return self.taken

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        found = real(path, mode, **options)
        return Full(found) if mode == "r+b" else found

    with served(tmp_path) as (url, asked):
        files = files_at(url, cache)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opened)
            with pytest.raises(ValueError, match=rf"cache {cache}/\S+ cannot be used .*{says}"):
                files.open(file)
        assert len(asked) == 1
        assert not list(cache.rglob("*.*"))
        assert content_of(files, file) == CONTENT


def test_a_cache_that_was_removed_meanwhile_is_filled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = put(tmp_path), tmp_path / "cache"
    with served(tmp_path) as (url, _asked):
        files = files_at(url, cache)
        before = files.open(file)
        shutil.rmtree(cache)
        assert before.read(0, 9) == CONTENT[:9]  # who has it open keeps it
        assert content_of(files, file) == CONTENT

        def removed(*arguments: Any) -> None:
            copy(*arguments)
            shutil.rmtree(cache)

        copy: Callable[..., None] = fetch.copy
        shutil.rmtree(cache)
        with monkeypatch.context() as patch:
            patch.setattr(fetch, "copy", removed)  # while a file is fetched
            with pytest.raises(
                ValueError, match=rf"cache {cache}/\S+ cannot be used .*No such file"
            ):
                files.open(file)
        assert content_of(files, file) == CONTENT


def test_others_may_remove_a_file_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each look at a file, and before it is opened, another process makes room."""
    file, cache = put(tmp_path), tmp_path / "cache"
    files, removals, look = files_at(f"file://{tmp_path}", cache), [], fetch.size_of
    files.open(file)

    def looked(path: Path) -> int:
        size = look(path)
        if size >= 0 and len(removals) < 3:
            path.unlink()
            removals.append(path)
        return size

    monkeypatch.setattr(fetch, "size_of", looked)
    for _ in range(4):
        assert content_of(files, file) == CONTENT
    assert len(removals) == 3


def test_files_of_another_user_are_read_though_not_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    file, cache = put(tmp_path), tmp_path / "cache"
    monkeypatch.setattr(os, "utime", denied)
    assert content_of(files_at(f"file://{tmp_path}", cache), file) == CONTENT


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    file = put(tmp_path)
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ValueError, match=r"a\.tar cannot be opened .*denied.* make it readable"):
        files_at(tmp_path, tmp_path / "cache").open(file)


def test_the_index_of_a_folder_needs_a_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "images" / "ant" / "0.png")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"notes\.txt/index cannot be used .* PATCHLIGHT_CACHE"):
        open_index(tmp_path / "images")
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))
    before = open_index(tmp_path / "images")
    (pointer,) = (tmp_path / "cache" / "index").glob("*.json")
    damages = (pointer, before.arrays / "groups.npy")
    for damaged in damages:  # as a power failure leaves files: made anew
        damaged.write_bytes(b"")
        assert open_index(tmp_path / "images").names == ("ant",)
