"""Remote files: fetched once, verified, bounded, whatever the server does; against a server that really listens."""

import hashlib
import http.server
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from moa_train.data.remote import Patience
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.storage import Cache, Storage

QUICK = Patience(tries=3, timeout=5.0, wait=0.01)
CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> content), but first what `script` says for a request, one word each.

    A number: this status. "die": half of the content. "wrong": other bytes. "slow": nothing for a while.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {"/a.tar": CONTENT}
        self.script: list[object] = []
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        word = self.server.script.pop(0) if self.server.script else (200 if content is not None else 404)
        if word == "slow":
            time.sleep(2.0)
            return
        self.send_response(word if isinstance(word, int) else 200)
        body = content if word in (200, "die", "wrong") else b"no"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if word == "wrong":
            body = body[:-1] + b"?"
        self.wfile.write(body[: len(body) // 2] if word == "die" else body)
        if word == "die":
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server():
    with Server() as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", patience=QUICK)


def _content(cache: Cache, url: str, sha256: str = SHA256) -> bytes:
    with os.fdopen(cache.open(url, sha256), "rb") as file:
        return file.read()


def _kept(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.is_file())


def test_a_file_is_fetched_once_and_kept_under_its_hash(server, cache):
    assert [_content(cache, f"{server.url}/a.tar") for _ in range(3)] == [CONTENT] * 3
    assert server.asked == ["/a.tar"]
    assert [path.name for path in _kept(cache)] == [f"{SHA256[:32]}-a.tar"]


@pytest.mark.parametrize("script", [[503], ["die"], ["wrong"], [429, 500], ["die", "wrong"]])
def test_what_may_pass_is_tried_again_after_a_longer_wait_each_time(server, cache, script, caplog):
    server.script = list(script)
    with caplog.at_level(logging.WARNING):
        assert _content(cache, f"{server.url}/a.tar") == CONTENT
    assert len(server.asked) == len(script) + 1
    assert [record.args[-1] for record in caplog.records] == [0.01, 0.02][: len(script)]
    assert len(_kept(cache)) == 1


def test_a_silent_server_is_left_after_the_timeout(server, tmp_path):
    server.script = ["slow"]
    cache = Cache(tmp_path, patience=Patience(tries=2, timeout=0.3, wait=0.01))
    start = time.monotonic()
    assert _content(cache, f"{server.url}/a.tar") == CONTENT
    assert 0.3 <= time.monotonic() - start < 2.0


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (503, "cannot be read after 3 tries: the server answers 503"),
        ("wrong", f"cannot be read after 3 tries: .*its index says {SHA256}"),
        ("die", "cannot be read after 3 tries: "),
    ],
)
def test_tries_come_to_an_end_and_nothing_is_kept(server, cache, word, told):
    server.script = [word] * 5
    with pytest.raises(ValueError, match=rf"/a\.tar {told}"):
        cache.open(f"{server.url}/a.tar", SHA256)
    assert len(server.asked) == 3
    assert _kept(cache) == []


@pytest.mark.parametrize(("word", "told"), [(404, "is not there"), (403, "the server answers 403"), (401, "401")])
def test_a_definite_answer_is_not_asked_for_again(server, cache, word, told):
    server.script = [word] * 5
    with pytest.raises(ValueError, match=told):
        cache.open(f"{server.url}/a.tar", SHA256)
    assert len(server.asked) == 1
    assert _kept(cache) == []


def test_a_server_that_does_not_listen_is_told(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.tar"
    with pytest.raises(ValueError, match=r"cannot be read after 3 tries: .*[Cc]onnect"):
        cache.open(url, SHA256)


def _fetch_all(folder: Path, url: str, count: int, start) -> None:
    start.wait()
    cache = Cache(folder, patience=QUICK)
    if any(_content(cache, f"{url}/{i}.tar", sha256) != content for i, content, sha256 in _numbered(count)):
        sys.exit(1)


def _numbered(count: int) -> list[tuple[int, bytes, str]]:
    contents = [bytes([i]) * 300_000 for i in range(count)]
    return [(i, content, hashlib.sha256(content).hexdigest()) for i, content in enumerate(contents)]


def test_processes_that_ask_at_once_share_one_download(server, cache):
    server.files = {f"/{i}.tar": content for i, content, _ in _numbered(5)}
    context = multiprocessing.get_context("fork")
    start = context.Event()
    arguments = (cache.folder, server.url, 5, start)
    processes = [context.Process(target=_fetch_all, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(server.asked) == sorted(server.files)


def test_the_least_recently_used_goes_and_never_one_that_is_open(server, tmp_path):
    files = _numbered(6)
    server.files = {f"/{i}.tar": content for i, content, _ in files}
    cache = Cache(tmp_path, gigabytes=0.00095, patience=QUICK)  # three of 0.3 MB
    urls = [(f"{server.url}/{i}.tar", sha256) for i, _, sha256 in files]

    def names() -> set[int]:
        return {int(path.name.split("-")[1].split(".")[0]) for path in _kept(cache)}

    held = cache.open(*urls[0])
    for number in (1, 2, 1):
        os.close(cache.open(*urls[number]))
    os.close(cache.open(*urls[3]))
    assert names() == {0, 1, 3}  # 2 was used longest ago among those that are not open
    os.close(cache.open(*urls[4]))
    assert names() == {0, 3, 4}
    os.close(held)
    os.close(cache.open(*urls[5]))
    assert names() == {3, 4, 5}
    assert _content(cache, *urls[0]) == files[0][1]


def test_files_in_use_may_exceed_the_bound(server, tmp_path):
    files = _numbered(3)
    server.files = {f"/{i}.tar": content for i, content, _ in files}
    cache = Cache(tmp_path, gigabytes=0.0001, patience=QUICK)
    handles = [cache.open(f"{server.url}/{i}.tar", sha256) for i, _, sha256 in files]
    assert [os.pread(handle, 1, 5) for handle in handles] == [content[:1] for _, content, _ in files]
    assert len(_kept(cache)) == 3
    for handle in handles:
        os.close(handle)


def test_what_a_killed_process_left_half_fetched_is_fetched_anew(server, cache):
    cache.folder.mkdir()
    (cache.folder / f".{SHA256[:32]}-a.tar.part").write_bytes(CONTENT[:1000])
    assert _content(cache, f"{server.url}/a.tar") == CONTENT
    assert len(_kept(cache)) == 1


def _serve(packed, put) -> None:
    for path in Path(packed.storage.location).iterdir():
        put(path.name, path.read_bytes())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_behind_http_has_the_samples_of_the_folder(packed, server, cache, workers):
    _serve(packed, lambda name, content: server.files.update({f"/train/{name}": content}))
    index = ShardIndex.load(f"{server.url}/train", cache)
    assert index.hash == packed.hash
    loader = DataLoader(ShardReader(index, 2), batch_size=None, num_workers=workers)
    for number, sample in enumerate(loader):
        assert sample.key == ShardReader(packed)[number].key
        np.testing.assert_array_equal(sample.image, ShardReader(packed)[number].image)
    assert sorted(server.asked) == sorted(f"/train/{p.name}" for p in Path(packed.storage.location).iterdir())


def test_a_set_behind_another_file_system_has_the_samples_of_the_folder(packed, cache):
    memory = fsspec.filesystem("memory")
    _serve(packed, lambda name, content: memory.pipe(f"/set/train/{name}", content))
    reader = ShardReader(ShardIndex.load("memory://set/train", cache))
    assert [reader[i].key for i in range(len(reader))] == [ShardReader(packed)[i].key for i in range(len(packed))]
    shard = packed.shards[0]
    assert Storage("memory://set/train", cache).path(shard.name, shard.sha256).read_bytes() == memory.cat(
        f"/set/train/{shard.name}"
    )
    memory.rm("/set", recursive=True)


def test_no_index_behind_a_url_is_told(server, cache):
    with pytest.raises(ValueError, match=rf"there is no {server.url}/nothing/index.json: give the folder of one split"):
        ShardIndex.load(f"{server.url}/nothing", cache)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "package", "told"),
    [
        ("s3://bucket/train", "s3fs", r"reading s3:// needs the package s3fs: pip install 'moa-train\[s3\]'"),
        ("gs://bucket/train", "gcsfs", r"reading gs:// needs the package gcsfs: pip install 'moa-train\[gcs\]'"),
    ],
)
def test_a_package_that_lacks_is_named(monkeypatch, cache, url, package, told):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=told):
        ShardIndex.load(url, cache)


def test_impossible_patience_is_refused():
    with pytest.raises(ValueError, match="fetch_tries is 0"):
        Patience(tries=0)
