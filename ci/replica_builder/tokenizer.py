"""A byte-level tokenizer that Transformers 4 and 5 and every engine load offline.

One token per byte, so a prompt's length in tokens is its length in characters. Ids:
special tokens first, then the 256 bytes. The tables of a target may have more rows
than there are tokens, as published ones have.
"""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<user>", "<assistant>")
"""Id 4 is a mask token, as in Gemma's tokenizer."""
PAD, EOS, BOS, _UNK, _MASK, USER, ASSISTANT = range(len(SPECIAL))
SIZE = len(SPECIAL) + 256

_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encode(text: str) -> list[int]:
    """Ids of plain text; special tokens are not looked for."""
    return [len(SPECIAL) + byte for byte in text.encode()]


def chat(request: str) -> list[int]:
    """Ids of one user message as the chat template writes it, up to the answer."""
    return [BOS, USER, *encode(request), ASSISTANT]


def save(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    vocab = {name: i for i, name in enumerate(SPECIAL)}
    vocab |= {letter: len(SPECIAL) + byte for byte, letter in _letters().items()}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": name, **special, "special": True} for i, name in enumerate(SPECIAL)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {**level, "use_regex": False},
                "post_processor": None,
                "decoder": {**level, "use_regex": False},
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": False,
                    "vocab": vocab,
                    "merges": [],
                },
            },
            ensure_ascii=False,
            indent=1,
        ),
        encoding="utf-8",
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                # The name both generations of Transformers know.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "mask_token": "<mask>",
                "additional_special_tokens": ["<user>", "<assistant>"],
                "clean_up_tokenization_spaces": False,
                "model_max_length": 8192,
                "chat_template": _TEMPLATE,
            },
            indent=1,
        ),
        encoding="utf-8",
    )


def _letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: itself, or one from 256 upwards."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
