"""The plugin less some shims, for tests; and, run by an engine's own python, one engine.

The command takes one JSON object (see ``main``) and prints one: the prompts' answers, or
the error that ended it. Blocks are written by the harness's recorder.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

WITHOUT = "DFLASH_PROBE_WITHOUT"


def register() -> None:
    """Entry point ``vllm.general_plugins``, in place of the plugin's own."""
    from dflash_plugin import engines, shims, support

    engine = engines.find("vllm")
    assert engine is not None
    names = support.decide("vllm", engine.version, engine.platform).shims
    without = set(filter(None, os.environ[WITHOUT].split(",")))
    assert without <= set(names), names
    kept = [name for name in names if name not in without]
    shims.install(kept, logging.getLogger("vllm.plugins.dflash"))


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """``target``, ``draft``, ``k``, ``prompts`` (texts), ``temperature``, ``record`` (a file)."""
    from pathlib import Path

    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    record = Path(asked["record"])
    llm = LLM(
        model=asked["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        speculative_config={
            "method": "dflash",
            "model": asked["draft"],
            "num_speculative_tokens": asked["k"],
        },
    )
    tokenizer = AutoTokenizer.from_pretrained(asked["target"])
    sampling = SamplingParams(temperature=asked["temperature"], max_tokens=32, seed=1)
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
    return {"sequences": sequences}


if __name__ == "__main__":
    try:
        result = main(json.loads(sys.argv[1]))
    except Exception as err:
        result = {"error": f"{type(err).__name__}: {err}"}
    print("\n" + json.dumps(result), flush=True)
