"""Shims for the releases with a dflash of their own (0.25 to 0.33), on real engines.

``test_..._is_still_needed`` fails once the release has it right: then the shim is to be removed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cell_runs import CellRun, harness

from ci import environment
from ci.environment import Environment
from dflash_plugin import matrix, shims, support
from dflash_plugin.shims import sources

RUN = ("0.30.0", "0.32.0")
INSTALLED = ("0.26.0", "0.28.0", *RUN, "0.31.0")
ROOT = Path(__file__).parents[2]


def stock(version: str) -> Environment:
    return environment.ensure_engine(matrix.load().engines[f"vllm-{version}"], "cpu", plugin=False)


def python(version: str, code: str) -> str:
    """What ``code`` prints in the release's own environment, this checkout importable."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [str(stock(version).python), "-c", prelude + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def site_packages(version: str) -> Path:
    (found,) = stock(version).path.glob("lib/python3*/site-packages")
    return found


@pytest.mark.parametrize("version", INSTALLED)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_every_shim_knows_the_release(version: str, platform: str) -> None:
    """The CUDA wheel of a release has the same Python files as its CPU wheel."""
    read = sources.installed(site_packages(version))
    names = support.decide("vllm", version, platform).shims
    assert len(names) >= 5
    wrong = {name: sources.differences(shims.load(name), read) for name in names}
    assert not any(wrong.values()), wrong


def test_cpu_kernels_are_still_needed() -> None:
    found = python(
        "0.30.0",
        "import vllm.v1.worker.cpu_model_runner as runner\n"
        "from vllm.v1.sample import rejection_sampler\n"
        "from vllm.v1.spec_decode import utils\n"
        "from dflash_plugin.shims import vllm_cpu_kernels as shim\n"
        "def known():\n"
        "    try:\n"
        "        return 'block_size' in utils._copy_and_expand_dflash_inputs._kernel_arg_names\n"
        "    except TypeError as err:\n"
        "        return 'Cannot inspect kernel parameters' not in str(err)\n"
        "runner.CPUModelRunner._postprocess_triton(None)\n"
        "before = known()\n"
        "shim.apply(runner)\n"
        "runner.CPUModelRunner._postprocess_triton(None)\n"
        "print(before, known())\n",
    )
    assert found == "False True"
    assert support.decide("vllm", "0.30.0", "cpu").usable


@pytest.mark.parametrize("version", RUN)
def test_cpu_expand_is_still_needed(version: str) -> None:
    found = python(
        version,
        "import torch\n"
        "from vllm.platforms import current_platform\n"
        "current_platform.import_kernels()\n"
        "from vllm.utils import cpu_triton_utils\n"
        "from vllm.v1.sample import rejection_sampler\n"
        "from dflash_plugin.shims import vllm_cpu_expand as shim\n"
        "given, ends = torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32)\n"
        "out = torch.full((3,), 9.0)\n"
        "cpu_triton_utils._expand_kernel_impl(out, given, ends, 0, 1)\n"
        "shim.apply(rejection_sampler)\n"
        "fixed = rejection_sampler.expand_batch_to_tokens(given, ends, 3)\n"
        "print(out.tolist(), fixed.tolist())\n",
    )
    assert found == "[9.0, 9.0, 9.0] [0.5, 2.0, 2.0]"


@pytest.mark.parametrize("version", RUN)
def test_mixed_swa_is_still_needed(version: str) -> None:
    found = python(
        version,
        "from types import SimpleNamespace\n"
        "import vllm.model_executor.models.qwen3_dflash as model\n"
        "model.get_current_vllm_config = lambda: SimpleNamespace(use_v2_model_runner=False)\n"
        "kinds = ['sliding_attention', 'full_attention']\n"
        "try:\n"
        "    model._resolve_layer_attention(SimpleNamespace(layer_types=kinds), 0)\n"
        "except NotImplementedError:\n"
        "    print('refused')\n",
    )
    assert found == "refused"


@pytest.mark.parametrize("version", RUN)
def test_draft_scale_is_still_needed(version: str) -> None:
    text = sources.installed(site_packages(version))("vllm.model_executor.models.qwen3_dflash")
    assert text is not None
    assert "input_embedding_scale" not in text
    assert "soft_cap" not in text


@pytest.mark.parametrize("version", RUN)
def test_draft_sampling_is_still_needed(version: str) -> None:
    found = python(
        version,
        "from dataclasses import fields\n"
        "from vllm.config import SpeculativeConfig\n"
        "by_name = {f.name: f.default for f in fields(SpeculativeConfig)}\n"
        "print(by_name['draft_sample_method'])\n",
    )
    assert "greedy" in found


@pytest.mark.parametrize("version", RUN)
def test_mm_prefix_is_still_needed(version: str) -> None:
    text = sources.installed(site_packages(version))("vllm.v1.worker.gpu.spec_decode.dflash.utils")
    assert text is not None
    assert "def load_dflash_model(" in text
    assert "is_mm_prefix_lm" not in text


@pytest.mark.parametrize("version", RUN)
def test_triton_geometry_is_still_needed(version: str) -> None:
    text = sources.installed(site_packages(version))("vllm.v1.attention.backends.triton_attn")
    assert text is not None
    assert "self.headdim = model_config.get_head_size()" in text


@pytest.fixture(scope="module", params=RUN)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CellRun:
    cell = f"vllm-{request.param}/plugin/cpu/tiny-qwen3-mixed"
    return harness(tmp_path_factory.mktemp("mixed"), "check", cell, "--profile", "tiny")


def test_mixed_drafts_are_lossless_and_faithful(mixed: CellRun) -> None:
    assert mixed.exit_code == 0, mixed.output
    result = mixed.result
    assert [result[name]["status"] for name in ("lossless", "faithful")] == ["passed"] * 2
    blocks = result["faithful"]["evidence"]["blocks"]
    assert blocks["equal"] >= 0.995 * blocks["steps"] > 200
    assert abs(result["al"] / result["al_reference"] - 1) <= 0.01
    log = next(mixed.out.glob("cells/**/server-dflash-float32.log")).read_text(encoding="utf-8")
    assert "draft in several parts on the V1 runner" in log
    assert "not applied" not in log


def test_stock_refuses_mixed_drafts(tmp_path: Path) -> None:
    cell = "vllm-0.32.0/stock/cpu/tiny-qwen3-mixed"
    run = harness(tmp_path, "check", cell, "--profile", "tiny")
    log = next(tmp_path.glob("cells/**/server-dflash-float32.log")).read_text(encoding="utf-8")
    assert "does not support: mixed sliding/full dflash drafts" in log, run.output
