"""What a release watch found, as a change of ``compat_matrix.toml``: comments and order stay.

Values inside a row are set through tomlkit. Rows are put in as text after the row they follow:
the comments that lead the next section are part of the last row to a TOML parser.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from dflash_plugin import matrix
from dflash_plugin.errors import MissingDependencyError
from dflash_plugin.matrix import Build, Engine, Matrix

from .releases import Found
from .revisions import Repository

UNPINNED = "The draft's revision is unknown: the repository's newest is meant."
"""The note of a row without a draft's revision; untrue once it has one."""
_NEW = "Found by the release watch: its shape and K are not looked at yet."
_SHORT = 7


def matrix_text(
    data: Matrix, text: str, found: Sequence[Found], repositories: Mapping[str, Repository]
) -> tuple[str, list[str]]:
    """(the matrix as it should be, the ids of new engines whose lock is to be written).

    Raises:
        MissingDependencyError: no tomlkit.
        MatrixError: the proposal would be no valid matrix.
    """
    try:
        import tomlkit  # noqa: F401
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            "tomlkit is needed to change the matrix",
            hint=f"{sys.executable} -m pip install tomlkit",
        ) from err
    new, locks = _with_pairs(text, repositories), []
    for one in found:
        if not one.torch or not one.requires_python:
            continue
        for engine, build in predecessors(data, one.distribution):
            new = _with_build(new, engine, build, one)
            new = _with_cells(new, engine, build, one)
            if build.lock:
                locks.append(f"{engine.name}-{one.newest}")
    if new != text:
        with tempfile.TemporaryDirectory(prefix="dflash-refresh-") as folder:
            path = Path(folder) / data.path.name
            path.write_text(new, "utf-8")
            matrix.load(path)
    return new, locks


def predecessors(data: Matrix, distribution: str) -> list[tuple[Engine, Build]]:
    """The newest engine that has builds of a distribution, with each of them."""
    rows = [
        (engine, build)
        for engine in data.engines.values()
        for build in engine.builds.values()
        if build.distribution == distribution
    ]
    newest = max((Version(engine.version) for engine, _ in rows), default=None)
    return [row for row in rows if Version(row[0].version) == newest]


# --- engines ---


def _with_build(text: str, engine: Engine, build: Build, found: Found) -> str:
    import tomlkit

    rows = tomlkit.parse(text)["engine"].unwrap()
    names = [(row["name"], row["version"]) for row in rows]
    fields: dict[str, Any] = {
        "distribution": found.distribution,
        "torch": found.torch,
        **({"torchvision": _torchvision(found.torch)} if build.torchvision else {}),
        "requires_python": found.requires_python,
    }
    if build.lock:
        fields["lock"] = build.lock.replace(engine.version, found.newest)
    block = [f"[engine.build.{build.platform}]\n", _table(fields | {"args": list(build.args)})]
    if build.env:
        block += [f"\n[engine.build.{build.platform}.env]\n", _table(build.env)]
    if (engine.name, found.newest) in names:
        return _after(text, "engine", names.index((engine.name, found.newest)), "".join(block))
    head = _table({"name": engine.name, "version": found.newest})
    at = names.index((engine.name, engine.version))
    return _after(text, "engine", at, "".join(["[[engine]]\n", head, "\n", *block]))


def _torchvision(torch: str) -> str:
    """The release for a torch release: 0.(x + 15).y for 2.x.y, since 2.0 (their own table)."""
    found = Version(torch)
    return f"0.{found.minor + 15}.{found.micro}"


def _with_cells(text: str, engine: Engine, build: Build, found: Found) -> str:
    """In every row of cells that are run with the release before, unless with its patches."""
    import tomlkit

    doc = tomlkit.parse(text)
    patched = {row["name"] for row in doc.unwrap()["variant"] if "patches" in row}
    new_id = f"{engine.name}-{found.newest}"
    for row in doc.get("cells", []):
        if (
            engine.id in row["engines"]
            and new_id not in row["engines"]
            and list(row["platforms"]) == [build.platform]
            and not patched & set(row["variants"])
            and "not_run" not in row
        ):
            row["engines"].append(new_id)
    return tomlkit.dumps(doc)


# --- pairs ---


def _with_pairs(text: str, seen: Mapping[str, Repository]) -> str:
    """Every (target, draft) with a row for the newest revisions of both."""
    import tomlkit

    doc = tomlkit.parse(text)
    groups: dict[tuple[str, str], list[int]] = {}
    for at, row in enumerate(doc.get("pair", [])):
        if row.get("draft") and not row.get("embedded"):
            groups.setdefault((row["target"], row["draft"]), []).append(at)
    blocks = {}
    for (target, draft), members in groups.items():
        rows = [doc["pair"][at] for at in members]
        for role, repo in (("target", target), ("draft", draft)):
            if repo in seen:
                _follow(rows, role, seen[repo])
        block = _new_pair(rows, seen.get(target), seen.get(draft))
        if block:
            blocks[members[-1]] = block
    new = tomlkit.dumps(doc)
    for at in sorted(blocks, reverse=True):
        new = _after(new, "pair", at, blocks[at])
    return new


def _follow(rows: Iterable[Any], role: str, seen: Repository) -> None:
    """Pin what is not pinned; move a pin along where only documents changed."""
    key = f"{role}_revision"
    rows = list(rows)
    if role == "draft" and any(row.get(key) == seen.newest for row in rows):
        return  # an unpinned row beside it means another one
    for row in rows:
        if key not in row:
            row[key] = seen.newest
            if role == "draft" and UNPINNED in row.get("notes", ""):
                rest = row["notes"].replace(UNPINNED, "").strip()
                if rest:
                    row["notes"] = rest
                else:
                    del row["notes"]
        elif seen.same_model(row[key]):
            row[key] = seen.newest


def _new_pair(
    rows: Sequence[Any], target: Repository | None, draft: Repository | None
) -> str | None:
    """A row for the newest revisions, if none of a pair's rows has both."""
    wanted = {role: seen.newest for role, seen in (("target", target), ("draft", draft)) if seen}
    if any(all(row.get(f"{r}_revision") == c for r, c in wanted.items()) for row in rows):
        return None
    like = next(
        (row for row in rows if row.get("draft_revision") == wanted.get("draft")), rows[0]
    ).unwrap()
    changed = [r for r, commit in wanted.items() if like.get(f"{r}_revision") != commit]
    short = wanted[changed[-1]][:_SHORT]
    fields = {"id": f"{like['id']}-{short}"}
    fields |= {key: like[key] for key in ("status",) if key in like}
    for role in ("target", "draft"):
        fields[role] = like[role]
        revision = wanted.get(role, like.get(f"{role}_revision"))
        fields |= {f"{role}_revision": revision} if revision else {}
    if "draft" in changed:
        fields["generation"] = f"revision {short}"
    elif "generation" in like:
        fields["generation"] = like["generation"]
    fields["num_speculative_tokens"] = like["num_speculative_tokens"]
    for role in ("target", "draft"):
        key = f"{role}_architecture"
        if role not in changed and key in like:
            fields[key] = like[key]
    block = "[[pair]]\n" + _table(fields | {"notes": _NEW})
    if "args" in like:
        block += "\n[pair.args]\n" + _table(like["args"])
    return block


# --- text ---


def _table(fields: Mapping[str, Any]) -> str:
    import tomlkit

    return tomlkit.dumps(dict(fields))


def _after(text: str, kind: str, position: int, block: str) -> str:
    """``block`` after the row ``[[kind]]`` of that position, before the comments of the next."""
    lines = text.splitlines(keepends=True)
    starts = [at for at, line in enumerate(lines) if line.rstrip() == f"[[{kind}]]"]
    end = starts[position] + 1
    while end < len(lines) and not _begins_a_row(lines[end], kind):
        end += 1
    while not lines[end - 1].strip() or lines[end - 1].startswith("#"):
        end -= 1
    return "".join([*lines[:end], "\n", block, *lines[end:]])


def _begins_a_row(line: str, kind: str) -> bool:
    """Whether a line is the head of a table that is not part of a row of that kind."""
    return line.startswith("[") and not line.startswith((f"[{kind}.", f"[[{kind}."))
