"""One release served with and without DFlash, and asked the same things."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
from cell_runs import ENGINE

from ci import environment, pipeline, plan
from ci.judge import TIE_GAP, first_difference
from ci.pipeline import CellRun
from ci.serve import ServerSpec, serve_all
from dflash_plugin import matrix
from dflash_plugin.backends.server import ServerClient

RELEASE = os.environ.get("DFLASH_TEST_ENGINE", ENGINE)
"""Which release the tests of behaviour run on, e.g. ``vllm-0.24.0``."""
PAIR = os.environ.get("DFLASH_TEST_PAIR", "tiny-qwen3-mixed")
K = 7
ARGS = (
    *("--max-num-batched-tokens", "256"),  # prompts beyond it are prefilled in chunks
    *("--block-size", "32", "--enable-prefix-caching"),
)


@dataclass(frozen=True)
class Duo:
    """The two servers, the file of drafted blocks, and what they run."""

    base: ServerClient
    dflash: ServerClient
    record: Path
    run: CellRun

    def blocks(self, start: int = 0) -> list[dict[str, Any]]:
        """Drafted blocks from line ``start`` on."""
        if not self.record.exists():  # nothing has been drafted yet
            return []
        return [json.loads(line) for line in self.record.read_text().splitlines()[start:]]

    def texts(self) -> list[str]:
        """The pair's own prompts, shortest first."""
        return sorted(
            (prompt.text for prompt in self.run.plan.prompts_of(self.run.cell).prompts), key=len
        )

    def ids(self, text: str) -> list[int]:
        """Token ids of one user message."""
        return self.base.chat_prompt(text)

    def long_prompt(self, tokens: int) -> list[int]:
        """Documents one after the other, cut at the front to ``tokens`` token ids."""
        ids: list[int] = []
        while len(ids) < tokens:
            for text in reversed(self.texts()):
                ids += self.ids(text)
        return ids[-tokens:]


def prepare(pair: str, folder: Path, *, variant: str = "plugin", release: str = RELEASE) -> CellRun:
    """The cell of ``pair`` on the release under test, with its environments."""
    name = f"{release}/{variant}/cpu/{pair}"
    return pipeline.prepare(
        matrix.load().cell(name), plan.make(matrix.load(), [name], "tiny"), folder
    )


@contextmanager
def serve_duo(run: CellRun, *args: str, max_model_len: int = 4608) -> Iterator[Duo]:
    """Serve ``run`` plain and with DFlash, float32, eager, with the same extra arguments."""
    record = run.folder / "blocks.jsonl"
    record.unlink(missing_ok=True)
    specs: list[ServerSpec] = [
        replace(spec, extra_args=args, max_model_len=max_model_len)
        for spec in (run.server(False, "float32"), run.server(True, "float32", record=record))
    ]
    with serve_all(specs) as (base, dflash):
        yield Duo(base, dflash, record, run)


def stock_environment(run: CellRun) -> CellRun:
    """The same cell without the plugin installed."""
    bare = environment.ensure_engine(run.cell.engine, "cpu", plugin=False)
    return replace(run, environment=bare)


def post(client: ServerClient, body: dict[str, Any], *, model: str | None = None) -> dict[str, Any]:
    """One completion, not streamed; the answer's only choice unless ``n`` is asked for."""
    body = {"model": model or client.model, "temperature": 0.0, "return_token_ids": True, **body}
    answer = requests.post(client.base_url + "/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return choices[0] if body.get("n", 1) == 1 else {"choices": choices}


def metric(client: ServerClient, name: str) -> float:
    """The sum of one Prometheus sample over its labels."""
    found = [value for key, _, value in client.metrics() if key == name]
    assert found, f"no metric {name}"
    return sum(found)


def same_or_tie(duo: Duo, prompt: Sequence[int], plain: Sequence[int], fast: Sequence[int]) -> bool:
    """Equal tokens, or apart for the first time where the plain server sees a float32 tie."""
    at = first_difference(plain, fast)
    if at is None:
        return True
    if at >= min(len(plain), len(fast)):
        return False
    logprobs = duo.base.next_logprobs([*prompt, *plain[:at]])
    pair = [logprobs.get(plain[at]), logprobs.get(fast[at])]
    return None not in pair and abs(pair[0] - pair[1]) <= TIE_GAP  # type: ignore[operator]


def in_threads(calls: Sequence[Any], stagger: float) -> list[Any]:
    """Run calls side by side, each started ``stagger`` seconds after the one before."""
    results: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as err:  # shown by whoever looks at the results
            results[index] = err

    threads = []
    for index in range(len(calls)):
        threads.append(threading.Thread(target=work, args=(index,)))
        threads[-1].start()
        time.sleep(stagger)
    for thread in threads:
        thread.join()
    return results


def two_sample_p(a: Sequence[Any], b: Sequence[Any], *, rounds: int = 2000, seed: int = 0) -> float:
    """P-value of "both samples come from one distribution", by permutation.

    The statistic is the total variation distance between the two histograms.
    """

    def distance(x: Sequence[Any], y: Sequence[Any]) -> float:
        left, right = Counter(x), Counter(y)
        return sum(abs(left[k] / len(x) - right[k] / len(y)) for k in {*left, *right}) / 2

    found = distance(a, b)
    pool, rng, hits = [*a, *b], random.Random(seed), 0
    for _ in range(rounds):
        rng.shuffle(pool)
        hits += distance(pool[: len(a)], pool[len(a) :]) >= found - 1e-12
    return (hits + 1) / (rounds + 1)


def require_same_distribution(duo: Duo, ids: Sequence[int], n: int) -> None:
    """Three tokens drawn at temperature 1, ``3 * n`` times from both: the same distribution."""

    def sample(client: object, temperature: float) -> list[tuple[int, ...]]:
        body = {"prompt": ids, "max_tokens": 4, "n": n, "ignore_eos": True}
        rows = []
        for _ in range(3):  # unseeded: the CPU sampler knows no seed for n > 1
            answer = post(client, {**body, "temperature": temperature})
            rows += [tuple(choice["token_ids"]) for choice in answer["choices"]]
        return rows

    plain, fast = sample(duo.base, 1.0), sample(duo.dflash, 1.0)
    for position in (1, 2, 3):
        p = two_sample_p([row[position] for row in plain], [row[position] for row in fast])
        assert p > 1e-3, f"token {position}: p = {p}"
    colder = sample(duo.dflash, 0.4)
    p = two_sample_p([row[1:] for row in plain], [row[1:] for row in colder])
    assert p < 1e-2, "the comparison cannot tell two distributions apart"


def write_lora(folder: Path, target: Path, *, rank: int = 4, scale: float = 0.3) -> Path:
    """A LoRA adapter of random weights on the query and value projections of all layers."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((target / "config.json").read_text())
    config = config.get("text_config", config)
    hidden, head = config["hidden_size"], config["head_dim"]
    wide = {
        "q_proj": config["num_attention_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    torch.manual_seed(3)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in wide.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, hidden) * scale
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank) * scale
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(wide),
        "base_model_name_or_path": "target",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder
