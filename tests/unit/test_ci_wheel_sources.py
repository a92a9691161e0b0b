"""Parts of a wheel, from a server on this machine; pip's answer is made up."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from patch_trees import write_wheel

from ci import engine_sources, wheel_sources
from dflash_plugin import shims
from dflash_plugin.errors import DownloadError

pytest.importorskip("remotezip")
FILES = {"vllm/a.py": "A = 1\n", "vllm/b.py": "B = 1\n", "vllm/_C.so": "x" * 300_000}


class Index(ThreadingHTTPServer):
    """Serves one file, whole or in parts."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.sent, self.parts = content, 0, True


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        content, asked = self.server.content, self.headers.get("Range")
        if asked and self.server.parts:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            end = min(int(last), len(content) - 1) if first and last else len(content) - 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            content = content[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.server.sent += len(content)
        self.wfile.write(content)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture(name="index")
def index_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    wheel = write_wheel(tmp_path, FILES, version="0.33.0")
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    with Index(wheel.read_bytes()) as index:
        thread = threading.Thread(target=index.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{index.server_address[1]}/{wheel.name}"
        report = json.dumps({"install": [{"download_info": {"url": url}}]})

        def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            known = command[-1] == "vllm==0.33.0"
            return subprocess.CompletedProcess(
                command, int(not known), report if known else "", "" if known else "ERROR: no match"
            )

        monkeypatch.setattr(wheel_sources.subprocess, "run", pip)
        yield index
        index.shutdown()
        thread.join()


def test_only_what_is_asked_for_is_transferred(index: Index) -> None:
    folder = wheel_sources.fetch("vllm", "0.33.0", {"vllm/a.py", "vllm/absent.py"})
    assert folder.name == "vllm-0.33.0"
    assert (folder / "vllm" / "a.py").read_text() == FILES["vllm/a.py"]
    assert not (folder / "vllm" / "b.py").exists()
    assert (folder / "vllm-0.33.0.dist-info" / "METADATA").exists()
    assert index.sent < 200_000
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_is_there_is_not_asked_for_again(index: Index) -> None:
    wheel_sources.fetch("vllm", "0.33.0", {"vllm/a.py", "vllm/b.py"})
    sent = index.sent
    wheel_sources.fetch("vllm", "0.33.0", {"vllm/b.py"})
    assert index.sent == sent
    wheel_sources.fetch("vllm", "0.33.0", {"vllm/c.py"})
    assert index.sent > sent


def test_fetched_releases_are_at_hand(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_sources.environment, "built_engine", lambda *_: None)
    monkeypatch.delenv(engine_sources.VARIABLE, raising=False)
    monkeypatch.setattr(engine_sources, "files", lambda _: {"vllm/a.py"})
    assert engine_sources.trees("vllm") == []
    engine_sources.fetch("vllm", "0.33.0")
    (tree,) = engine_sources.trees("vllm")
    assert (tree.id, tree.python) == ("vllm-0.33.0", None)


def test_the_files_are_those_of_the_shims() -> None:
    files = engine_sources.files("vllm")
    assert "vllm/v1/spec_decode/dflash.py" in files
    assert "vllm/v1/worker/block_table.py" in files, "only fingerprinted"
    assert len(files) < 4 * len(shims.NAMES)


def test_a_server_without_parts(index: Index) -> None:
    index.parts = False
    with pytest.raises(DownloadError, match=r"vllm-0\.33\.0"):
        wheel_sources.fetch("vllm", "0.33.0", {"vllm/a.py"})
    assert list(wheel_sources.folder().iterdir()) == []


def test_no_such_release(index: Index) -> None:
    with pytest.raises(DownloadError, match=r"vllm 9\.9: pip finds no wheel \(ERROR: no match\)"):
        wheel_sources.fetch("vllm", "9.9", {"vllm/a.py"})
