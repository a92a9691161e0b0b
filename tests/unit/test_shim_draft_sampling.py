"""Which draft_sample_method is chosen, and what is left alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dflash_plugin.shims import vllm_draft_sampling as sampling

log = logging.getLogger("test-draft-sampling")


def configuration(*, draft="DFlash2DraftModel", requests=16, vocabulary=1000, k=7, **speculation):
    settings = {
        "method": "dflash",
        "num_speculative_tokens": k,
        "draft_sample_method": "greedy",
        "rejection_sample_method": "standard",
        "use_local_argmax_reduction": False,
        "draft_model_config": SimpleNamespace(architectures=[draft] if draft else None),
        **speculation,
    }
    model = SimpleNamespace(get_vocab_size=lambda: vocabulary)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**settings),
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=requests),
    )


def chosen(config, given=None):
    sampling.choose(config, given or {"method": "dflash"}, log)
    return config.speculative_config.draft_sample_method


def test_dflash2_drafts_are_sampled_and_one_line_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert chosen(configuration()) == "probabilistic"
    assert len(caplog.records) == 1
    assert "draft_sample_method=probabilistic" in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        {"draft": "DFlashDraftModel"},
        {"draft": None},
        {"method": "eagle3"},
        {"rejection_sample_method": "synthetic"},
        {"rejection_sample_method": "block"},
        {"use_local_argmax_reduction": True},
        {"use_heterogeneous_vocab": True},
    ],
)
def test_nothing_is_chosen_where_it_would_not_do(other, caplog):
    with caplog.at_level(logging.INFO):
        assert chosen(configuration(**other)) == "greedy"
    assert not caplog.records


@pytest.mark.parametrize("value", ["greedy", "probabilistic"])
def test_the_user_has_the_last_word(value, caplog):
    config = configuration(draft_sample_method=value)
    with caplog.at_level(logging.INFO):
        assert chosen(config, {"draft_sample_method": value}) == value
    assert not caplog.records


def test_no_speculation_is_left_alone():
    sampling.choose(SimpleNamespace(speculative_config=None), None, log)


def test_what_is_kept_is_counted():
    assert sampling.size(configuration(requests=3, vocabulary=100), 7) == 3 * 7 * 100 * 4


def test_too_much_memory_keeps_the_default(caplog):
    config = configuration(requests=1024, vocabulary=248320, k=15)
    with caplog.at_level(logging.INFO):
        assert chosen(config) == "greedy"
    assert "stays greedy" in caplog.text
    assert "1024 requests" in caplog.text


def test_the_choice_is_made_for_a_complete_configuration():
    class EngineArgs:
        def __init__(self, speculative_config):
            self.speculative_config = speculative_config

        def create_engine_config(self, usage=None):
            return configuration()

    module = SimpleNamespace(EngineArgs=EngineArgs, logger=log)
    sampling.apply(module)
    config = EngineArgs({"method": "dflash"}).create_engine_config(usage="x")
    assert config.speculative_config.draft_sample_method == "probabilistic"
    config = EngineArgs({"draft_sample_method": "greedy"}).create_engine_config()
    assert config.speculative_config.draft_sample_method == "greedy"
