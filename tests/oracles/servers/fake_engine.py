"""An inference server without a model: OpenAI's streams and vLLM's or SGLang's /metrics, over real HTTP.

    python fake_engine.py --port 8000 --model NAME [--speculative-config JSON] [--die-after N] [--fail]

takes vLLM's options. The answer to a prompt follows from its text; with a drafter it comes in rounds whose
accepted drafts follow from it too. A round takes `tick_s`, and with a drafter longer the more requests are in
flight. It knows nothing of certdraft.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Engine:
    """Behaviour, faults and counters of one server."""

    drafter: bool
    engine: str = "vllm"
    model: str = "tiny"
    depth: int = 4
    tick_s: float = 0.0
    load_cost: float = 0.0  # of a drafted round, in ticks, for each further request in flight
    ids: bool = True
    metrics: bool = True
    template: bool = True
    cached: int = 0  # prompt tokens a request finds in a cache
    foreign: int = 0  # tokens that another client gets meanwhile
    seed: int = 0  # of the texts
    restless: bool = False  # another text every time
    slower: float = 0.0  # what each request adds to the tick
    cut: bool = False  # streams end in their middle
    failing: bool = False  # streams end with an error
    merged: bool = False  # parts arrive in pairs
    odd: bool = False  # a stream of another shape
    die_after: int | None = None
    on_death: Any = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("tokens", "rounds", "cached"), 0))
    accepted: list[int] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def dead(self) -> bool:
        return self.die_after is not None and len(self.bodies) > self.die_after

    def text(self, prompt: str, limit: int) -> list[int]:
        rng = random.Random(
            zlib.crc32(prompt.encode()) + self.seed + (len(self.bodies) if self.restless else 0)
        )
        return [rng.randrange(97, 123) for _ in range(rng.choice((64, 64, 10)))][:limit]

    def rounds(self, prompt: str, text: list[int]) -> list[tuple[list[int], int]]:
        """(tokens, accepted) of each target pass; the first says one token without a draft."""
        rng = random.Random(zlib.crc32(prompt.encode()) + 1)
        found, done = [(text[:1], 0)], 1
        while done < len(text):
            accepted = rng.randrange(self.depth + 1) if self.drafter else 0
            found.append((text[done : done + accepted + 1], accepted))
            done += accepted + 1
        return found

    def page(self) -> str:
        c, drafted = self.counts, self.counts["rounds"] * self.depth
        accepted = [sum(n > at for n in self.accepted) for at in range(self.depth)]
        if self.engine == "sglang":
            return (
                f'sglang:generation_tokens_total{{model_name="m"}} {c["tokens"]}\n'
                f'sglang:cached_tokens_total{{cache_source="device"}} {float(c["cached"])}\n'
                f"sglang:spec_accept_length 2.5\nsglang:spec_verify_calls_total {c['rounds']}\n"
            )
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            "# TYPE vllm:generation_tokens_total counter",
            f'vllm:generation_tokens_total{{engine="0"}} {float(c["tokens"])}',
            'vllm:generation_tokens_created{engine="0"} 1.7e+09',
            f'vllm:prompt_tokens_cached_total{{engine="0"}} {float(c["cached"])}',
        ]
        if self.drafter:
            lines += [
                f'vllm:spec_decode_num_drafts_total{{engine="0"}} {float(c["rounds"])}',
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {float(drafted)}',
                f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {float(sum(self.accepted))}',
                *(
                    f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{at}"}} {n}'
                    for at, n in enumerate(accepted)
                ),
            ]
        return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.engine.dead:
            self.close_connection = True
            return
        if self.path == "/health":
            self.send({})
        elif self.path == "/v1/models":
            self.send({"data": [{"id": self.engine.model, "max_model_len": 512}]})
        elif self.path == "/version":
            self.send({"version": "0.0-test"})
        elif self.path == "/metrics" and self.engine.metrics:
            self.send(self.engine.page().encode())
        else:
            self.send({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.engine.lock:
            self.engine.bodies.append(body)
            self.engine.at_once += 1
            self.engine.most_at_once = max(self.engine.most_at_once, self.engine.at_once)
        try:
            if self.engine.dead:
                self.close_connection = True
                if self.engine.on_death is not None:
                    self.engine.on_death()
            elif "messages" in body and not self.engine.template:
                self.send({"error": {"message": "the tokenizer has no chat template"}}, 400)
            else:
                self.stream(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a client that has given up
        finally:
            with self.engine.lock:
                self.engine.at_once -= 1

    def stream(self, body: dict[str, Any]) -> None:
        engine = self.engine
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        text = engine.text(prompt, body["max_tokens"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        rounds = engine.rounds(prompt, text)
        if engine.merged:
            with engine.lock:  # the second of a pair
                engine.counts["rounds"] += len(rounds) // 2
            rounds = [
                (a[0] + b[0], a[1] + b[1])
                for a, b in zip(rounds[::2], [*rounds[1::2], ([], 0)], strict=False)
            ]
        first = {"prompt_token_ids": [len(prompt), 3]} if engine.ids else {}
        for number, (tokens, accepted) in enumerate(rounds):
            busy = engine.load_cost * (engine.at_once - 1) if engine.drafter else 0.0
            time.sleep(engine.tick_s * (1 + busy + engine.slower * len(engine.bodies)))
            said = {"token_ids": tokens} if engine.ids else {}
            words = "".join(map(chr, tokens))
            key = {"text": words} if "prompt" in body else {"delta": {"content": words}}
            self.event({"choices": [{"index": 0, **key, **said}], **(first if number == 0 else {})})
            with engine.lock:
                engine.counts["tokens"] += len(tokens)
                if number and engine.drafter:
                    engine.counts["rounds"] += 1
                    engine.accepted.append(accepted)
            if number == 1 and engine.cut:
                return
        with engine.lock:
            engine.counts["cached"] += engine.cached
            engine.counts["tokens"] += engine.foreign
        if engine.failing:
            self.event({"error": {"message": "EngineCore died"}})
        if engine.odd:
            self.event({"choices": "none"})
        self.event({"choices": [], "usage": {"completion_tokens": len(text)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def send(self, content: Any, code: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(engine: Engine, port: int = 0) -> ThreadingHTTPServer:
    """A server of an engine; `serve_forever` runs it."""
    handler = type("EngineHandler", (Handler,), {"engine": engine})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    return server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model")
    parser.add_argument("--speculative-config", type=json.loads)
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--fail", action="store_true")
    options, _ = parser.parse_known_args()
    if options.fail:
        sys.exit("ValueError: there is no room for this model")
    speculative = options.speculative_config or {}
    depth = speculative.get("num_speculative_tokens", 4)
    engine = Engine(bool(speculative), model=options.model, depth=depth, die_after=options.die_after)
    server = serve(engine, options.port)

    def die() -> None:
        print("RuntimeError: the engine ran out of memory", flush=True)
        threading.Thread(target=server.shutdown).start()

    engine.on_death = die
    server.serve_forever()


if __name__ == "__main__":
    main()
