"""Shims of GPU paths on the releases' own source text; nothing here runs on a GPU.

The CPU wheels carry the same Python files. ``DFLASH_WHEEL_SOURCES`` names a folder of more
unpacked wheels (``<anything>/vllm/...``), for releases that have none.
"""

from __future__ import annotations

import ast
import builtins
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from test_repairs_new import INSTALLED, site_packages

from dflash_plugin.shims import sources
from dflash_plugin.shims import vllm_mm_prefix as mm_prefix
from dflash_plugin.shims import vllm_triton_geometry as geometry

EXTRA = sorted(Path(os.environ.get("DFLASH_WHEEL_SOURCES") or "/nonexistent").glob("*/vllm"))
TRITON = "vllm.v1.attention.backends.triton_attn"
LOADER = "vllm.v1.worker.gpu.spec_decode.dflash.utils"


@pytest.fixture(params=[*INSTALLED, *(path.parent.name for path in EXTRA)])
def read(request: pytest.FixtureRequest) -> sources.Read:
    extra = {path.parent.name: path.parent for path in EXTRA}
    return sources.installed(extra.get(request.param) or site_packages(request.param))


def function(text: str, name: str, class_name: str | None = None) -> str:
    """Source of a function, or of a method as that of a class with nothing else."""
    body: list[ast.stmt] = ast.parse(text).body
    if class_name is not None:
        (owner,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == class_name)
        body = owner.body
    (found,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    source = textwrap.dedent("\n".join(text.splitlines()[found.lineno - 1 : found.end_lineno]))
    if class_name is not None:
        source = f"class {class_name}(Base):\n" + textwrap.indent(source, "    ")
    return f"from __future__ import annotations\n{source}"


def execute(source: str, **known: Any) -> dict[str, Any]:
    """Run it with a stand-in for every name that is neither known nor built in."""
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    stubs = {name: MagicMock() for name in names if not hasattr(builtins, name)}
    scope: dict[str, Any] = {**stubs, **known, "__name__": "published"}
    exec(compile(source, "published", "exec"), scope)
    return scope


@pytest.mark.parametrize(("method", "expected"), [("dflash", (2, 128)), ("eagle3", (4, 512))])
def test_triton_buffers_have_their_groups_size(
    read: sources.Read, method: str, expected: tuple[int, int]
) -> None:
    text = read(TRITON)
    assert text is not None
    name = "TritonAttentionMetadataBuilder"
    shapes: list[tuple[int, ...]] = []
    torch = MagicMock()
    torch.empty.side_effect = lambda shape, **_: shapes.append(shape) or MagicMock()

    class Base:
        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, _: Any) -> None:
            self.vllm_config = vllm_config

    scope = execute(
        function(text, "__init__", name),
        Base=Base,
        torch=torch,
        get_num_attention_heads_from_layers=lambda config, names: 32,
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
        cdiv=lambda a, b: -(-a // b),
        MIN_LAUNCH_GRID_SIZE_2D=128,
        MAX_3D_QUERY_LEN=16,
        NUM_PAR_SOFTMAX_SEGMENTS=16,
        current_platform=SimpleNamespace(is_cuda=lambda: False),
    )
    module = SimpleNamespace(**{name: scope[name]})
    geometry.apply(module)
    target = SimpleNamespace(
        get_num_kv_heads=lambda _: 4,
        get_head_size=lambda: 512,
        get_num_attention_heads=lambda _: 16,
        rswa_window=None,
    )
    config = SimpleNamespace(
        model_config=target,
        parallel_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode="NONE"),
        scheduler_config=SimpleNamespace(max_num_seqs=64),
        speculative_config=SimpleNamespace(
            method=method, num_speculative_tokens=7, parallel_drafting=method == "dflash"
        ),
    )
    spec = SimpleNamespace(block_size=16, num_kv_heads=2, head_size=128, kv_quant_mode=None)
    built = getattr(module, name)(spec, ["draft.0"], config, "cuda")
    assert (built.num_heads_kv, built.headdim) == expected
    assert built.vllm_config is config
    assert shapes[0][1:] == (32, 16, expected[1]), "scratch: tokens, query heads, segments, width"


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_draft_is_loaded_without_multimodal_prefixes(
    read: sources.Read, prefixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = read(LOADER)
    assert text is not None
    for name in (
        "vllm",
        "vllm.compilation",
        "vllm.compilation.backends",
        "vllm.model_executor",
        "vllm.model_executor.models",
        "vllm.model_executor.models.qwen3_dflash",
    ):
        monkeypatch.setitem(__import__("sys").modules, name, MagicMock())
    replaced: list[Any] = []

    def replace(config: Any, **_: Any) -> Any:
        if hasattr(config, "model_config"):
            replaced.append(config)
        return MagicMock()

    scope = execute(function(text, "load_dflash_model"), replace=replace)
    module = SimpleNamespace(load_dflash_model=scope["load_dflash_model"])
    mm_prefix.apply(module)

    class ModelConfig:
        def __init__(self) -> None:
            self.model_arch_config = SimpleNamespace(is_mm_prefix_lm=prefixed)

        is_mm_prefix_lm = property(lambda self: self.model_arch_config.is_mm_prefix_lm)

    config = SimpleNamespace(
        model_config=ModelConfig(),
        speculative_config=MagicMock(),
        attention_config=None,
        cache_config=None,
        load_config=None,
    )
    module.load_dflash_model(MagicMock(), config)
    assert [one.model_config.is_mm_prefix_lm for one in replaced] == [False]
    assert config.model_config.is_mm_prefix_lm is prefixed
