"""Run by an engine environment's own python: one engine in this process, some shims left out.

Takes one JSON object (see ``main``), prints one: the prompts' answers and drafted blocks,
or the error that ended it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "ci" / "recorder")]


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """``target``, ``draft``, ``k``, ``prompts`` (texts), ``temperature``, ``without``."""
    record = Path(tempfile.mkdtemp()) / "blocks.jsonl"
    os.environ |= {
        "DFLASH_RECORD": str(record),
        "VLLM_PLUGINS": "",  # registered below, so that shims can be left out
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    from dflash_plugin import engines, shims, support

    engine = engines.find("vllm")
    assert engine is not None
    names = support.decide("vllm", engine.version, engine.platform).shims
    assert set(asked["without"]) <= set(names), names
    kept = [name for name in names if name not in asked["without"]]
    shims.install(kept, logging.getLogger("vllm.plugins.dflash"))
    import dflash_recorder
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    dflash_recorder.register()
    llm = LLM(
        model=asked["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        block_size=16,
        distributed_executor_backend="uni",
        speculative_config={
            "method": "dflash",
            "model": asked["draft"],
            "num_speculative_tokens": asked["k"],
        },
    )
    sampling = SamplingParams(temperature=asked["temperature"], max_tokens=32, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(asked["target"])
    sequences = []
    for number, text in enumerate(asked["prompts"]):
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(rendered, add_special_tokens=False)
        start = len(record.read_text().splitlines()) if record.exists() else 0
        answer = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        sequences.append(
            {
                "id": str(number),
                "prompt": prompt,
                "generated": list(answer[0].outputs[0].token_ids),
                "record_start": start,
            }
        )
    lines = record.read_text().splitlines() if record.exists() else []
    return {"sequences": sequences, "blocks": [json.loads(line) for line in lines]}


if __name__ == "__main__":
    try:
        answer = main(json.loads(sys.argv[1]))
    except Exception as err:
        answer = {"error": f"{type(err).__name__}: {err}"}
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # the engine's threads would keep the process
