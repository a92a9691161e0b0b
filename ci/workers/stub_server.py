"""A lean server for the load generator: canned streams, faults on demand; a process of its own.

``python stub_server.py '{"tokens": 64, "per_event": 1, …}'`` prints its port. Options:
tokens, per_event, delay (seconds between events; 0: all at once), ids (false: as SGLang, which
refuses to stream token ids and tells counts), and a fault of every ``fault_every``-th request:
status, malformed, cut, hang, error, empty, die.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any, ClassVar

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(index: int, count: int, last: bool, ids: bool = True) -> bytes:
    told = {"token_ids": list(range(index, index + count))} if ids else {}
    usage = {} if ids else {"usage": {"prompt_tokens": 3, "completion_tokens": index + count}}
    body = {
        **usage,
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "delta": {"content": " word" * count},
                "logprobs": None,
                "finish_reason": "length" if last else None,
                **told,
            }
        ],
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class Stub(asyncio.Protocol):
    """One connection; requests are answered in the order they come."""

    options: ClassVar[dict[str, Any]] = {}
    events: ClassVar[list[bytes]] = []
    requests = 0
    drafts = 0
    served: ClassVar[list[str]] = ["stub"]

    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, rest = self.buffer.split(b"\r\n\r\n", 1)
            low = head.lower()
            length = 0
            if b"content-length:" in low:
                length = int(low.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(rest) < length:
                return
            body, self.buffer = rest[:length], rest[length:]
            self.answer(head.split(b" ", 2)[1].decode(), body)

    def plain(self, status: int, body: str):
        data = body.encode()
        self.transport.write(
            b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)
        )

    def answer(self, path: str, body: bytes):
        cls, options = type(self), self.options
        plain = {
            "/health": lambda: "",
            "/version": lambda: '{"version": "0.0.stub"}',
            "/v1/models": lambda: json.dumps({"data": [{"id": name} for name in self.served]}),
            "/metrics": self.metrics,
        }
        if path in plain:
            return self.plain(200, plain[path]())
        asked = json.loads(body)
        if asked["model"] not in self.served:
            return self.plain(404, f"The model `{asked['model']}` does not exist.")
        if asked.get("return_token_ids") and not options.get("ids", True):
            return self.plain(400, "return_token_ids is not supported with streaming")
        cls.requests += 1
        every = options.get("fault_every", 0)
        if every and cls.requests % every == 0:
            return self.fault(options)
        cls.drafts += len(self.events) - 1
        delay = options.get("delay", 0)
        if delay:
            asyncio.get_running_loop().create_task(self.slow(delay))
            return None
        self.transport.write(self.whole)
        return None

    def metrics(self) -> str:
        per, lines = self.options.get("per_event", 1), []
        if per > 1:
            lines = [f'vllm:spec_decode_num_drafts_total{{engine="0"}} {float(self.drafts)}']
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}} '
                f"{float(self.drafts)}"
                for i in range(per - 1)
            ]
        return "\n".join([*lines, "python_info 1.0"]) + "\n"

    def fault(self, options):
        kind = options["fault"]
        if isinstance(kind, int):
            self.plain(kind, f"fault {kind}")
        elif kind == "die":
            self.transport.write(HEAD + chunk(self.events[0]))
            os._exit(1)
        elif kind == "cut":
            self.transport.write(HEAD + chunk(self.events[0]))
            self.transport.close()
        elif kind == "hang":
            self.transport.write(HEAD + chunk(self.events[0]))
        else:
            text = {
                "malformed": b'data: {"choices": [{"del\n\n',
                "error": b'data: {"error": {"message": "out of memory"}}\n\n',
                "empty": b"",
            }[kind]
            end = b"data: [DONE]\n\n"
            self.transport.write(HEAD + chunk(text + end) + b"0\r\n\r\n")

    async def slow(self, delay: float):
        self.transport.write(HEAD)
        for data in self.events:
            self.transport.write(chunk(data))
            await asyncio.sleep(delay)
        self.transport.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    @classmethod
    def set_up(cls, options: dict[str, Any]):
        cls.options = options
        total, per = options.get("tokens", 8), options.get("per_event", 1)
        starts = [0, *range(1, total, per)]  # the prefill's token, then a step each
        ids = cls.options.get("ids", True)
        cls.events = [
            event(i, min(per if i else 1, total - i), i == starts[-1], ids) for i in starts
        ]
        cls.whole = (
            HEAD + b"".join(map(chunk, cls.events)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        )


async def main(options: dict[str, Any]) -> None:
    Stub.set_up(options)
    server = await asyncio.get_running_loop().create_server(
        Stub, "127.0.0.1", options.get("port", 0)
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
