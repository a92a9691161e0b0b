"""A package index and a hub on this machine, answering as the real ones do."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SIMPLE = "application/vnd.pypi.simple.v1+json"


class Watch(ThreadingHTTPServer):
    """``answers``: path -> (status, content type, body); any other path is 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, str, bytes]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, body: object, *, kind: str = SIMPLE, status: int = 200) -> None:
        """Answer a path with a text as it is, or anything else as JSON."""
        text = body if isinstance(body, str) else json.dumps(body)
        self.answers[path] = (status, kind, text.encode())

    def project(
        self,
        name: str,
        versions: Mapping[str, Mapping[str, object]],
        *,
        torch: str = "2.14.0",
    ) -> None:
        """A project page: version -> what its one wheel's entry has besides the usual."""
        files = []
        stem = name.replace("-", "_")
        for version, extra in versions.items():
            wheel = f"{stem}-{version}-cp38-abi3-manylinux_2_31_x86_64.whl"
            metadata = (
                f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
                "Requires-Python: <3.15,>=3.11\nRequires-Dist: regex\n"
                f'Requires-Dist: torch=={torch}+cpu; platform_machine == "x86_64"\n'
                'Requires-Dist: torch==1.0; platform_system == "Darwin"\n\nText.\n'
            )
            self.put(f"/files/{wheel}.metadata", metadata, kind="application/octet-stream")
            digest = hashlib.sha256(metadata.encode()).hexdigest()
            files.append(
                {
                    "filename": wheel,
                    "hashes": {"sha256": "0" * 64},
                    "requires-python": "<3.15,>=3.11",
                    "url": f"{self.url}/files/{wheel}",
                    "yanked": False,
                    "core-metadata": {"sha256": digest},
                    **extra,
                }
            )
        self.put(
            f"/simple/{name}/",
            {"meta": {"api-version": "1.1"}, "name": name, "files": files, "versions": [*versions]},
        )

    def model(self, repo: str, revision: str, files: Mapping[str, str], *, newest: bool) -> None:
        """One commit of a repository: path -> content id."""
        answer = {
            "_id": "0" * 24,
            "id": repo,
            "modelId": repo,
            "private": False,
            "gated": False,
            "sha": revision,
            "siblings": [{"rfilename": n, "blobId": b, "size": 1} for n, b in files.items()],
        }
        self.put(f"/api/models/{repo}/revision/{revision}", answer, kind="application/json")
        if newest:
            self.put(f"/api/models/{repo}", answer, kind="application/json")


class Handler(BaseHTTPRequestHandler):
    server: Watch

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(self.path)
        status, kind, body = self.server.answers.get(path, (404, "application/json", b"{}"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 404:  # as the hub tells a lost commit from a lost repository
            self.send_header(
                "X-Error-Code", "RevisionNotFound" if "/revision/" in path else "RepoNotFound"
            )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass
