"""``python -m dflash_plugin.reference replay|generate``: the reference as a program.

``replay`` is how other programs use it without importing torch: JSON in, JSON
out (see ``replay --help``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..acceptance import total
from ..errors import (
    CacheError,
    MissingDependencyError,
    UsageError,
    run_cli,
)
from ..pair import DraftConfig, TargetConfig, preflight, require

if TYPE_CHECKING:
    from .model import DraftModel
    from .replay import Replay
    from .target import HFTarget

_TAPPED = 16
_DTYPES = ("float32", "float64", "bfloat16")
_FORMAT = """\
input:  {"sequences": [{"id": ..., "prompt": [ids], "generated": [ids]}, ...]}
output: {"k", "dtype", "al", "stats", "versions", "taps": {"layers", "values"},
         "sequences": [{"id", "al", "target_agrees", "first_disagreement",
                        "steps": [{"position", "known", "draft", "gaps", "accepted"}]}]}
"position" is the absolute index of the last known token "known"; "gaps" are the
drafted tokens' logits above their runners-up; "al" is null where there was no step. "taps" are
of the first prompt's first tokens: outputs of the target's layers, [token][layers * hidden].
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, write; returns the exit code."""
    options = _parser().parse_args(arguments)
    run: int = options.run(options)
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dflash_plugin.reference", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    replay = commands.add_parser(
        "replay",
        help="the steps DFlash takes along greedy texts",
        epilog=_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("--input", default="-", metavar="FILE", help="JSON; - is standard input")
    replay.add_argument("--output", default="-", metavar="FILE", help="- is standard output")
    replay.set_defaults(run=_replay)

    generate = commands.add_parser("generate", help="generate a text and show every step")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)

    for command in (replay, generate):
        command.add_argument("--target", type=Path, required=True, metavar="DIR")
        command.add_argument("--draft", type=Path, required=True, metavar="DIR")
        command.add_argument("--k", type=int, metavar="K", help="default: block size - 1")
        command.add_argument("--dtype", choices=_DTYPES, default="float32")
        command.add_argument("--threads", type=int, metavar="N", help="of torch")
    return parser


def _replay(options: argparse.Namespace) -> int:
    """Replay every sequence of the input; the output is written whole or not at all."""
    sequences = _read_sequences(options.input)
    if options.output != "-" and not Path(options.output).absolute().parent.is_dir():
        raise UsageError(
            f"--output: {Path(options.output).parent} is no folder", hint="make it first"
        )
    target, draft, k = _load_pair(options)
    from tqdm import tqdm

    from .loop import check_tokens
    from .replay import replay

    for number, sequence in enumerate(sequences):
        name = f"{options.input}: sequences[{number}]"
        check_tokens(f"{name}.prompt", sequence["prompt"], target.vocab_size, at_least=1)
        check_tokens(f"{name}.generated", sequence["generated"], target.vocab_size)

    entries, stats = [], []
    for sequence in tqdm(sequences, unit="text", disable=not sys.stderr.isatty()):
        result = replay(
            target, draft, sequence["prompt"], sequence["generated"], num_speculative_tokens=k
        )
        entries.append(_entry(sequence["id"], result))
        stats.append(result.stats)
    summed = total(stats, k)
    _write(
        options.output,
        {
            "k": k,
            "dtype": options.dtype,
            "al": summed.al,
            "stats": summed.to_dict(),
            "versions": _versions(),
            "taps": _taps(target, sequences[0]["prompt"]) if sequences else None,
            "sequences": entries,
        },
    )
    return 0


def _generate(options: argparse.Namespace) -> int:
    """Generate from one message in the target's chat template, and print it."""
    target, draft, k = _load_pair(options)
    import torch
    from transformers import AutoTokenizer

    from .loop import generate

    tokenizer = AutoTokenizer.from_pretrained(options.target, local_files_only=True)
    text = options.prompt
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    special = not tokenizer.chat_template
    result = generate(
        target,
        draft,
        tokenizer(text, add_special_tokens=special)["input_ids"],
        max_new_tokens=options.max_new_tokens,
        num_speculative_tokens=k,
        temperature=options.temperature,
        generator=torch.Generator().manual_seed(options.seed),
    )
    for step in result.steps:
        tokens = [repr(tokenizer.decode([token])) for token in (step.known, *step.draft)]
        print(
            f"{step.position:6d}  {tokens[0]} -> {' '.join(tokens[1:])}  "
            f"accepted {step.accepted} of {k}"
        )
    al = "no step" if result.stats.al is None else f"AL {result.stats.al:.2f}"
    print(f"\n{tokenizer.decode(result.token_ids)}\n")
    print(f"{al}, {len(result.steps)} steps, {len(result.token_ids)} tokens, K {k}, "
          f"ended by {result.finish_reason}")  # fmt: skip
    return 0


def _read_sequences(source: str) -> list[dict[str, Any]]:
    """The input's sequences, checked but for the vocabulary.

    Raises:
        UsageError: not readable, not JSON, or a field is missing or of the wrong kind.
    """
    hint = "see `python -m dflash_plugin.reference replay --help` for the format"
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as err:
        raise UsageError(f"--input: {source}: {err.strerror}", hint=hint) from err
    except ValueError as err:
        raise UsageError(f"--input: {source} is not JSON: {err}", hint=hint) from err
    sequences = data.get("sequences") if isinstance(data, dict) else None
    if not isinstance(sequences, list):
        raise UsageError(f"{source}: sequences is missing, expected a list", hint=hint)
    for number, sequence in enumerate(sequences):
        name = f"{source}: sequences[{number}]"
        if not isinstance(sequence, dict):
            raise UsageError(f"{name} is {sequence!r}, expected an object", hint=hint)
        for field, kind, expected in (
            ("id", (str, int), "a string or an integer"),
            ("prompt", list, "a list of token ids"),
            ("generated", list, "a list of token ids"),
        ):
            if not isinstance(sequence.get(field), kind):
                found = json.dumps(sequence.get(field))[:60]
                raise UsageError(f"{name}.{field} is {found}, expected {expected}", hint=hint)
    return sequences


def _load_pair(options: argparse.Namespace) -> tuple[HFTarget, DraftModel, int]:
    """Check the pair without its weights, then load it; also K."""
    require(preflight(options.target, options.draft, options.k))
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}, expected 1 or more")
    try:
        import torch
        import transformers
    except ImportError as err:
        raise MissingDependencyError(
            f"the reference needs {err.name}", hint="pip install 'dflash-plugin[transformers]'"
        ) from err
    from .model import DraftModel
    from .target import HFTarget

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = DraftConfig.from_dir(options.draft)
    dtype = getattr(torch, options.dtype)
    target = HFTarget.load(options.target, config.target_layer_ids, dtype=dtype)
    model_type = TargetConfig.from_dir(options.target).model_type
    draft = DraftModel.load(
        options.draft, target.embedding, target.head, model_type=model_type, dtype=dtype
    )
    return target, draft, config.max_speculative_tokens if options.k is None else options.k


def _entry(identity: str | int, result: Replay) -> dict[str, Any]:
    found = result.first_disagreement
    return {
        "id": identity,
        "al": result.stats.al,
        "target_agrees": found is None,
        "first_disagreement": None if found is None else asdict(found),
        "steps": [asdict(step) for step in result.steps],
    }


def _taps(target: HFTarget, prompt: Sequence[int]) -> dict[str, Any]:
    output = target.session().forward(prompt[:_TAPPED], rows=1)
    return {"layers": list(target.taps), "values": output.taps.double().tolist()}


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}


def _write(destination: str, data: dict[str, Any]) -> None:
    """Print ``data`` or write it to a file in one go.

    Raises:
        CacheError: the file cannot be written; a former one is untouched.
    """
    text = json.dumps(data) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    path = Path(destination).absolute()
    part = ""
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).replace(path)
    except OSError as err:
        raise CacheError(
            f"{path}: cannot be written: {err.strerror}", hint="choose another --output"
        ) from err
    finally:
        if part:
            Path(part).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
