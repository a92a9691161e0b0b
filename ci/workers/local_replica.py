"""A back-end with a pair, in an environment of its own: JSON lines in and out.

Requests, by ``op``: ``load`` (a back-end, used from now on; an error where it cannot load the
pair); ``chat`` (the ids of messages); ``plain`` and ``generate`` (a text
with the framework's own loop and with DFlash; ``keep``: after the text before it, in one
prompt cache); ``taps`` (the tapped states of a prompt); ``compare`` (such states with those of
Transformers, by the reference); ``fault`` (generate with one from now on; null: with none).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import traceback
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@functools.cache
def transformers_model(target, threads):
    """The target in float32; reference and back-end share it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


class Torch:
    """Transformers' own model, and what reference and back-end share."""

    def __init__(self, args):
        import torch

        self.torch = torch
        self.model = transformers_model(args.target, args.threads)

    def plain(self, ids, count):
        given = self.torch.tensor([ids])
        out = self.model.generate(
            given, attention_mask=self.torch.ones_like(given), max_new_tokens=count,
            do_sample=False,
        )  # fmt: skip
        return out[0, len(ids) :].tolist()

    def compare(self, ids, values):
        from dflash_plugin.reference.taps import compare_taps

        given = self.torch.tensor(values, dtype=self.torch.float64)
        return [vars(row) for row in compare_taps(self.target, ids, given)]


class Reference(Torch):
    """``dflash_plugin.reference``, with the target's keys and values where they can be kept."""

    def __init__(self, args):
        super().__init__(args)
        from dflash_plugin.pair import DraftConfig, TargetConfig
        from dflash_plugin.reference.model import DraftModel
        from dflash_plugin.reference.target import HFTarget

        self.target = HFTarget(self.model, DraftConfig.from_dir(args.draft).target_layer_ids)
        self.draft = DraftModel.load(
            args.draft, self.target.embedding, self.target.head,
            model_type=TargetConfig.from_dir(args.target).model_type,
        )  # fmt: skip

    def generate(self, ids, count, _keep, _fault):
        from dflash_plugin.reference.loop import generate

        made = generate(self.target, self.draft, ids, max_new_tokens=count)
        steps = [
            {"position": s.position, "known": s.known, "draft": list(s.draft),
             "accepted": s.accepted, "size": len(s.emitted)}
            for s in made.steps
        ]  # fmt: skip
        return {"tokens": made.token_ids, "steps": steps, "reused": 0}

    def taps(self, ids):
        return self.target.session().forward(ids, rows=1).taps.tolist()


class Local:
    """A back-end of ``dflash_plugin.load``."""

    def load(self, target, draft, **options):
        import dflash_plugin

        self.pair = dflash_plugin.load(target, str(draft), **options)
        self.backend = self.pair.backend
        self.cache = None

    def generate(self, ids, count, keep, fault):
        if not keep or self.cache is None:
            self.cache = self.pair.prompt_cache()
        elif fault is not None and fault.touch is not None:
            fault.touch(self.cache, ids, self.backend)
        result = self.pair.generate(ids, max_tokens=count, prompt_cache=self.cache)
        text, steps = list(ids), []
        for step in result.steps:
            if step.drafted:
                steps.append(
                    {"position": len(text) - 1, "known": text[-1], "draft": list(step.drafted),
                     "accepted": step.accepted, "size": len(step.token_ids)}
                )  # fmt: skip
            text += step.token_ids
        return {"tokens": result.token_ids, "steps": steps, "reused": result.reused_tokens}


class Transformers(Local, Torch):
    """The Transformers back-end, on the very model that generates plainly."""

    def __init__(self, args):
        Torch.__init__(self, args)
        self.load(self.model, args.draft)

    def taps(self, ids):
        target = self.backend.target
        with self.torch.inference_mode():
            output, _undo = target.forward(target.cache(1), [0], [ids], keep=1)
        return output.taps[0].tolist()


class Mlx(Local):
    """The MLX back-end."""

    def __init__(self, args):
        import mlx.core as mx

        # Stored in float32 first: mlx_lm adds 1 to Qwen3-Next's norms in the stored type.
        with tempfile.TemporaryDirectory() as folder:
            for path in args.target.iterdir():
                copy = Path(folder, path.name)
                if path.suffix == ".safetensors":
                    weights = {name: w.astype(mx.float32) for name, w in mx.load(path).items()}
                    mx.save_safetensors(str(copy), weights)
                elif path.name == "config.json":
                    copy.write_text(json.dumps(as_published(json.loads(path.read_text()))))
                else:
                    copy.symlink_to(path.resolve())
            self.load(folder, args.draft, backend="mlx", dtype="float32")

    def plain(self, ids, count):
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        tokens = []
        for token, _ in generate_step(mx.array(ids), self.backend.target.model, max_tokens=count):
            tokens.append(int(token))
            if tokens[-1] in self.backend.eos_token_ids:
                break
        return tokens

    def taps(self, ids):
        target = self.backend.target
        _logits, taps, _calls = target.forward(target.cache(), ids)
        return taps[0].tolist()


def chat(target, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    found = []
    for text in texts:
        message = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(asked, add_special_tokens=False)["input_ids"])
    return found


def as_published(config):
    """A Qwen3.5 text model's config in that of a whole model, as published checkpoints have it."""
    kind = config["model_type"]
    if not kind.startswith("qwen3_5"):
        return config
    return {"model_type": kind.removesuffix("_text"), "text_config": config}


SIDES = {"transformers": Transformers, "mlx": Mlx}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer

    def answer(data):
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    answer({"versions": versions()})
    side, fault, held = None, None, ExitStack()
    judge = functools.cache(lambda: Reference(args))
    for line in sys.stdin:
        given = json.loads(line)
        op = given["op"]
        if op == "load":
            try:
                side = judge() if given["backend"] == "reference" else SIDES[given["backend"]](args)
                error = None
            except Exception as err:
                traceback.print_exc()
                error = f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
            answer({"error": error})
        elif op == "chat":
            answer({"ids": chat(args.target, given["texts"])})
        elif op == "plain":
            answer({"tokens": side.plain(given["ids"], given["max_tokens"])})
        elif op == "generate":
            answer(side.generate(given["ids"], given["max_tokens"], given["keep"], fault))
        elif op == "taps":
            answer({"values": side.taps(given["ids"])})
        elif op == "compare":
            answer({"taps": judge().compare(given["ids"], given["values"])})
        elif op == "fault":
            from ci.workers.faults import FAULTS

            held.close()
            fault = FAULTS[given["name"]] if given["name"] else None
            applies = fault is None or fault.applies(side.backend)
            if fault is not None and applies:
                held.enter_context(fault.change(side.backend))
            answer({"applies": applies})


def versions():
    found = {}
    for name in ("torch", "transformers", "mlx", "mlx-lm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
