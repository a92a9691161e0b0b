"""The import rules of the floor plan, by walking the source of every module."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import packaging
import pytest

ROOT = Path(__file__).resolve().parents[2]
# The floor of each module or folder of dflash_plugin; a module imports lower floors only.
LAYERS = {
    "__init__": 0,
    "errors": 0,
    "acceptance": 0,
    "toml_table": 1,
    "matrix": 1,
    "matrix_rows": 1,
    "architectures": 1,
    "traits": 1,
    "config_file": 1,
    "pair": 1,
    "pair_config": 1,
    "draft_math": 1,
    "checkpoint": 1,
    "cache": 1,
    "engines": 1,
    "sglang_args": 1,
    "hardware": 1,
    "patchset": 1,
    "support_types": 1,
    "support_sglang": 1,
    "support": 2,
    "hub": 2,
    "reference": 2,
    "demo": 2,
    "shims": 3,
    "backends": 3,
    "launch": 3,
    "local": 4,
    "console": 4,
    "model_mlx": 4,
    "vllm_entry": 4,
    "sglang_entry": 4,
    "doctor": 4,
    "known_pairs": 4,
    "patch_cli": 4,
    "train_cli": 4,
    "training": 4,
    "bench": 4,
    "cli": 5,
    "benchmark": 6,
}
# On one floor, from -> to: a draft's facts are its config, read field by field, its weights,
# and what follows from the config; the matrix is a file of tables and names shapes; the
# console shows what `local` generates, and the benchmark times it; a patch set is for an
# engine's files, whose names are known there, and is written as what is in the cache; the
# doctor says what is known of a pair.
SIDEWAYS = {
    ("pair", "pair_config"),
    ("pair_config", "config_file"),
    ("pair", "checkpoint"),
    ("matrix", "toml_table"),
    ("matrix", "matrix_rows"),
    ("matrix", "architectures"),
    ("matrix_rows", "architectures"),
    ("architectures", "toml_table"),
    ("traits", "architectures"),
    ("traits", "pair_config"),
    ("architectures", "pair_config"),
    ("draft_math", "pair"),
    ("console", "local"),
    ("bench", "local"),
    ("doctor", "known_pairs"),
    ("support_sglang", "support_types"),
    ("patchset", "engines"),
    ("patchset", "cache"),
}
PLAIN = {"packaging", "tomli", *sys.stdlib_module_names}
ENTRY_MODULES = {"vllm_entry", "sglang_entry"}
# Subclasses of the engine's own, and torch code: loaded by shims once dflash is asked for.
IN_THE_ENGINE = {
    *("vllm_block_inputs", "vllm_torch_kernels", "vllm_draft_model", "vllm_proposer"),
    *("sglang_platform", "sglang_torch_kernels"),
}
HEAVY = {"vllm", "sglang", "torch", "transformers", "mlx", "mlx_lm"}
# What the modules of a local back-end may import at their top: they are imported when asked for.
BACKENDS = {
    "transformers": {"torch", "transformers", "safetensors"},
    "mlx": {"mlx", "mlx_lm"},
}


@dataclass(frozen=True)
class Import:
    """One imported module: ``top`` runs when the importer is imported."""

    file: str
    line: int
    name: str
    top: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _names(node: ast.AST, package: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) + 1 - node.level] if node.level else []
        base += node.module.split(".") if node.module else []
        # Of our own packages `from . import x` may name a module, or a value in one.
        if base[:1] in (["dflash_plugin"], ["ci"], ["tests"]):
            yield from (".".join([*base, alias.name]) for alias in node.names)
        else:
            yield ".".join(base)


def imports(path: Path) -> list[Import]:
    """Every import of a file but those for type checkers."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found: list[Import] = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if _only_for_types(child):
                continue
            for name in _names(child, list(parts[:-1])):
                found.append(Import("/".join(parts) + ".py", child.lineno, name, top))
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            walk(child, top and not inside)

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def unit(path: Path) -> str:
    """The entry of :data:`LAYERS` that a file of dflash_plugin belongs to."""
    return path.relative_to(ROOT / "dflash_plugin").with_suffix("").parts[0]


def unit_of(name: str) -> str | None:
    """The same for an imported name; None outside the package."""
    package, _, rest = name.partition(".")
    if package != "dflash_plugin":
        return None
    first = rest.partition(".")[0]
    return first if first in LAYERS else "__init__"


PLUGIN = files("dflash_plugin")


def each_file(wanted: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    """A test for each file of dflash_plugin whose unit is wanted."""
    chosen = [path for path in PLUGIN if wanted(unit(path))]
    return pytest.mark.parametrize("path", chosen, ids=lambda path: str(path.relative_to(ROOT)))


def floor(name: str) -> int:
    return LAYERS.get(name, 9)


@each_file()
def test_every_module_has_a_floor(path):
    assert unit(path) in LAYERS, (
        f"{path.name}: add {unit(path)!r} and its floor to LAYERS in {Path(__file__).name}"
    )


@each_file()
def test_modules_import_lower_floors_only(path):
    here = unit(path)
    wrong = []
    for found in imports(path):
        there = unit_of(found.name)
        if there is None or there in (here, "__init__") or (here, there) in SIDEWAYS:
            continue
        if LAYERS[there] >= LAYERS.get(here, 0):
            wrong.append(f"{found} [{LAYERS[there]}], expected below [{LAYERS[here]}]")
    assert not wrong, "\n".join(wrong)


@each_file()
def test_the_plugin_knows_neither_ci_nor_tests(path):
    wrong = [str(i) for i in imports(path) if i.name.split(".")[0] in ("ci", "tests")]
    assert not wrong, "\n".join(wrong)


@each_file(lambda name: floor(name) <= 2 and name != "reference")
def test_lower_floors_need_the_standard_library_alone(path):
    own = {"dflash_plugin"}
    late = unit(path) in ("demo", "hub")  # they may import the rest inside functions
    wrong = [
        str(found)
        for found in imports(path)
        if found.name.split(".")[0] not in PLAIN | own and (found.top or not late)
    ]
    assert not wrong, "\n".join(wrong)


# training and bench are tools that are never in an engine's process.
@each_file(lambda name: floor(name) >= 3 and name not in ("training", "bench"))
def test_upper_floors_import_third_parties_late(path):
    if path.stem in IN_THE_ENGINE:
        return
    backend = path.name.partition("_")[0] if unit(path) == "backends" else ""
    allowed = PLAIN | {"dflash_plugin"} | BACKENDS.get(backend, set())
    wrong = [
        str(found)
        for found in imports(path)
        if found.top and found.name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@each_file()
def test_classes_built_on_the_engine_are_imported_late(path):
    wrong = [
        str(found)
        for found in imports(path)
        if found.top and found.name.rpartition(".")[2] in IN_THE_ENGINE
    ]
    assert path.stem in IN_THE_ENGINE or not wrong, "\n".join(wrong)


@each_file()
def test_mlx_is_imported_by_its_backend_alone(path):
    own = unit(path) == "backends" and path.name.startswith("mlx_")
    wrong = [str(i) for i in imports(path) if i.name.split(".")[0] in BACKENDS["mlx"] and not own]
    assert not wrong, "\n".join(wrong)


@each_file(lambda name: name != "backends")
def test_a_local_backend_is_resolved_only_when_asked(path):
    local = tuple(f"dflash_plugin.backends.{name}_" for name in BACKENDS)
    wrong = [str(i) for i in imports(path) if i.top and i.name.startswith(local)]
    assert not wrong, "\n".join(wrong)


@each_file()
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_are_imported_by_their_entry_and_shims_alone(path, engine):
    allowed = unit(path) == f"{engine}_entry" or (
        unit(path) == "shims" and path.name.startswith(f"{engine}_")
    )
    wrong = [str(i) for i in imports(path) if i.name.split(".")[0] == engine and not allowed]
    assert not wrong, "\n".join(wrong)


def test_ci_imports_no_engine_and_no_torch():
    wrong = [
        str(found)
        for path in files("ci")
        # They run inside the engine, and in environments with torch.
        if not {"recorder", "replica_builder", "workers"} & set(path.parts)
        for found in imports(path)
        if found.name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_ci_imports_of_the_replica_builder_what_needs_no_torch():
    plain = {"language", "prompts", "tokenizer"}
    built = ROOT / "ci" / "replica_builder"
    wrong = [
        str(found)
        for path in (*files("ci"), *(built / f"{name}.py" for name in plain))
        if built not in path.parents or path.stem in plain
        for found in imports(path)
        if found.name.startswith("ci.replica_builder.") and found.name.split(".")[2] not in plain
    ]
    wrong += [
        str(found)
        for name in plain
        for found in imports(built / f"{name}.py")
        if found.name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source = (
        "import a.b\nfrom . import errors\nfrom ..demo import x\nfrom vllm import y\n"
        "if TYPE_CHECKING:\n    import hidden\n"
        "def f():\n    import late\nclass C:\n    import early\n"
        "try:\n    import tried\nexcept ImportError:\n    pass\n"
    )
    path = tmp_path / "dflash_plugin" / "shims" / "m.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [(found.name, found.top) for found in imports(path)] == [
        ("a.b", True),
        ("dflash_plugin.shims.errors", True),
        ("dflash_plugin.demo.x", True),
        ("vllm", True),
        ("late", False),
        ("early", True),
        ("tried", True),
    ]


# --- in a process of its own ---


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder with this package and packaging: nothing else can be imported from it."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "dflash_plugin").symlink_to(ROOT / "dflash_plugin")
    (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
    return folder


def new_modules(bare: Path, code: str) -> set[str]:
    """The modules that ``code`` adds to an interpreter without site-packages.

    Who calls an entry point has logging and importlib.metadata already.
    """
    program = (
        f"import importlib.metadata, json, logging, sys\nsys.path.insert(0, {str(bare)!r})\n"
        "before = set(sys.modules)\n"
        f"{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        env={**os.environ, "DFLASH_PLUGIN_ANNOUNCED": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_nothing_else(bare):
    assert new_modules(bare, "import dflash_plugin") <= {"dflash_plugin", "__future__"}


def test_registering_without_an_engine_is_cheap(bare):
    found = new_modules(bare, "from dflash_plugin import vllm_entry\nvllm_entry.register()")
    assert "dflash_plugin.support" in found
    assert not {name.partition(".")[0] for name in found} & HEAVY
    # Counted, not timed: a few milliseconds where a module costs a tenth of one.
    assert len(found) < 40, sorted(found)


def test_registering_on_a_release_that_gets_nothing_is_cheap(bare, tmp_path):
    info = tmp_path / "vllm-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n")
    found = new_modules(
        bare,
        f"sys.path.append({str(tmp_path)!r})\n"
        "from dflash_plugin import vllm_entry\nvllm_entry.register()",
    )
    assert "dflash_plugin.shims" not in found
    assert not {name.partition(".")[0] for name in found} & HEAVY
    assert len(found) < 40, sorted(found)
