"""What ``serve --dry-run`` prints for every pair, engine and release; rewritten by

python -m tests.unit.serve_golden
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from unittest import mock

from dflash_plugin import cli, demo, engines, matrix, support

PATH = Path(__file__).parent / "golden" / "serve_dry_run.txt"
_REASON = re.compile(r"^(DFlash on .*: \w+) \(.*\)$", re.MULTILINE)


def requests() -> list[list[str]]:
    """The command line of every pair x engine x {oldest, newest} release, replicas left out."""
    return [
        [row.id, "--engine", engine, "--engine-version", version]
        for row in matrix.load().pairs.values()
        if row.replica is None
        for engine in engines.DISTRIBUTIONS
        for version in support.releases(engine)
    ]


def answer(request: list[str]) -> str:
    """Exit code, output and messages of one; the reasons of a decision are left to its tests."""
    out, err = io.StringIO(), io.StringIO()
    pair = demo.DemoPair(Path("DEMO/target"), Path("DEMO/draft"))
    with (
        mock.patch.object(demo, "demo_pair", lambda **_: pair),
        mock.patch.object(demo.manifest, "hashes", lambda _: {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = cli.main(["serve", *request, "--dry-run", "--no-preflight"])
    said = _REASON.sub(r"\1", err.getvalue())
    return f"$ serve --dry-run {shlex.join(request)}\nexit {code}\n{out.getvalue()}{said}"


def render() -> str:
    """The whole file."""
    return "\n".join(answer(request) for request in requests())


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
