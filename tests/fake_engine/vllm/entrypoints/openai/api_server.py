"""A stand-in for vLLM's OpenAI server: the routes the harness uses, and faults on demand.

Standard library only. Faults, see ``fake_model.faults``:

    exit(lines, code)   prints that many lines and ends     never_ready    health is 503
    die(after)          ends in a request                   error          requests get 500
    hang(after)         stops answering in a request        slow(seconds)  per engine step
    wrong_token(index)  that token is another one           silent         no tokens at all
    noisy_batch(index)  likewise, if not alone              wrong_block    records other drafts
    bad_draft           drafts are always wrong             unrecorded     records nothing
    ignore_sigterm      has to be killed                    grandchild     so has a child of it
    greedy              takes memory until it has no more
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

import fake_model

STEP = 0.001  # seconds
SHOWN = ("VLLM_", "PYTHON", "LD_", "DFLASH_", "HF_", "VIRTUAL_ENV")


class Engine:
    """What the requests share."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = json.loads(args.speculative_config) if args.speculative_config else {}
        self.k = config.get("num_speculative_tokens", 0)
        self.mode = "dflash" if self.k else "base"
        self.faults = fake_model.faults(Path(args.model), self.mode, args.dtype)
        self.record = os.environ.get("DFLASH_RECORD") if self.k else None
        self.step = self.faults.get("slow", {}).get("seconds", STEP)
        self.lock = threading.Lock()
        self.active = 0
        self.drafts, self.positions = 0, [0] * self.k

    def choice(self, ids, prompt):
        """The target's next token, or a wrong one where a fault says so."""
        token = fake_model.next_token(ids)
        index = len(ids) - len(prompt)
        if index == self.faults.get("wrong_token", {}).get("index"):
            return fake_model.other(token)
        if self.active > 1 and index == self.faults.get("noisy_batch", {}).get("index"):
            return fake_model.other(token)
        return token

    def draft(self, text):
        """A block, recorded as ``ci/recorder`` would."""
        block = fake_model.draft(text, self.k)
        if "bad_draft" in self.faults:
            block = [fake_model.other(fake_model.next_token(text))] * self.k
        line = {"position": len(text) - 1, "known": text[-1], "draft": block}
        if "wrong_block" in self.faults:
            line["draft"] = [*block[:-1], fake_model.other(block[-1])]
        if self.record and "unrecorded" not in self.faults:
            with self.lock, Path(self.record).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return block

    def steps(self, prompt, limit):
        """Lists of new tokens, one an engine step; cut at the limit and at the end."""
        if "silent" in self.faults:
            return
        text, left, block = list(prompt), limit, []
        while True:
            time.sleep(self.step)
            right = fake_model.accepted(block, lambda ids: self.choice(ids, prompt), text)
            new = block[:right]
            new.append(self.choice([*text, *new], prompt))
            if block:
                with self.lock:
                    self.drafts += 1
                    for i in range(right):
                        self.positions[i] += 1
            if fake_model.EOS in new:
                new = new[: new.index(fake_model.EOS) + 1]
            new = new[:left]
            text += new
            left -= len(new)
            if self.k:  # also after the last token, as the real engine does
                block = self.draft(text)
            yield new
            if not left or new[-1] == fake_model.EOS:
                return


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"  # which has chunks, as the real server's streams
    engine: Engine

    def do_GET(self):
        engine = self.engine
        if self.path == "/health":
            self._send(503 if "never_ready" in engine.faults else 200, "")
        elif self.path == "/metrics":
            lines = ["# HELP nothing of note", "python_info 1.0"]
            if engine.k:
                labels = 'engine="0",model_name="target"'
                name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                with engine.lock:
                    lines.append(
                        f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(engine.drafts)}"
                    )
                    for i, count in enumerate(engine.positions):
                        lines.append(f'{name}{{{labels},position="{i}"}} {float(count)}')
            self._send(200, "\n".join(lines) + "\n")
        elif self.path == "/v1/models":
            self._send(200, json.dumps({"data": [{"id": "target"}]}))
        elif self.path == "/version":
            self._send(200, json.dumps({"version": "0.32.0"}))
        else:
            self._send(404, "")

    def do_POST(self):
        engine = self.engine
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "error" in engine.faults:
            self._send(500, "EngineCore encountered an issue")
        elif self.path == "/tokenize":
            tokens = fake_model.tokenize(body["messages"][0]["content"])
            self._send(200, json.dumps({"tokens": tokens, "count": len(tokens)}))
        elif not body.get("stream"):
            token = fake_model.next_token(body["prompt"])
            top = {f"token_id:{token}": -0.25, f"token_id:{fake_model.other(token)}": -0.75}
            self._send(200, json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]}))
        else:
            with engine.lock:
                engine.active += 1
            try:
                chat = body.get("messages")
                prompt = fake_model.tokenize(chat[-1]["content"]) if chat else body["prompt"]
                self._stream(prompt, body["max_tokens"])
            finally:
                with engine.lock:
                    engine.active -= 1

    def _stream(self, prompt, limit):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        faults, done = self.engine.faults, 0
        for new in self.engine.steps(prompt, limit):
            done += len(new)
            ended = done == limit or new[-1] == fake_model.EOS
            reason = ("length" if done == limit else "stop") if ended else None
            self._event(json.dumps({"choices": [{"token_ids": new, "finish_reason": reason}]}))
            if done > faults.get("die", {}).get("after", limit):
                print("fake engine: CUDA error, or so", flush=True)
                os._exit(1)
            if done > faults.get("hang", {}).get("after", limit):
                print("fake engine: hanging", flush=True)
                time.sleep(600)
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data):
        event = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    def _send(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format, *args):
        """Quiet."""


class Server(ThreadingHTTPServer):
    """Without a look-up of the host's name, which can take seconds."""

    daemon_threads = True

    def server_bind(self):
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


def main():
    """Entry point."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host", "--dtype", "--served-model-name", "--speculative-config"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    args, rest = parser.parse_known_args()
    engine = Handler.engine = Engine(args)
    shown = {k: v for k, v in os.environ.items() if k.startswith(SHOWN)}
    facts = {**vars(args), "rest": rest, "env": shown, "cwd": str(Path.cwd()), "path": sys.path}
    print(f"fake engine: {json.dumps(facts)}", flush=True)
    if "ignore_sigterm" in engine.faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "grandchild" in engine.faults:
        child = subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 600"])
        print(f"fake engine: grandchild {child.pid}", flush=True)
    if "greedy" in engine.faults:
        taken = []
        while True:
            taken.append(b"x" * (1 << 24))
    if "exit" in engine.faults:
        fault = engine.faults["exit"]
        for number in range(fault["lines"]):
            print(f"fake engine: line {number}", flush=True)
        sys.exit(fault["code"])
    server = Server((args.host, args.port), Handler)
    print("fake engine: serving", flush=True)
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
