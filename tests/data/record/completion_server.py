"""A real HTTP server over a small target, speaking vLLM's /v1/completions and SGLang's /generate.

    python completion_server.py TARGET_FOLDER

prints its port. It knows nothing of certdraft: each next token comes from a whole forward pass of
transformers. POST /faults sets what goes wrong from then on; GET /stats says how many requests came.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from hidden_state_files import begin_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = sys.argv[1]
MODEL = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
LOCK = threading.Lock()
DEFAULTS: dict[str, Any] = {
    "max_logprobs": 20,  # vLLM's own
    "silent_cap": None,  # fewer alternatives than asked, without a word
    "errors": 0,  # this many 500s, then no more
    "hangs": 0,
    "hang_s": 1.5,  # answers that never come
    "cuts": 0,  # connections cut in the middle of an answer
    "garbage": 0,  # half of an answer, as if it were whole
    "other_ids": False,  # as if prompts were tokenised anew
    "text_names": False,  # alternatives named by their text
    "worse_token": False,  # a sampled token
    "raw_logits": False,
    "nan": False,
    "shifted_ids": 0,  # ids of a tokenizer with this many more special tokens
    "no_eos": False,  # stops without returning the end-of-text token
    "max_model_len": 512,
    "key": None,
    "models": ["tiny"],
    "shape": None,
    "features": None,  # {"folder", "layers"} of hidden-state files, as vLLM's connector writes them
    "file": None,  # what is wrong with those files: see hidden_state_files
    "file_faults": 1 << 30,  # this many wrong files, then no more
    "spoiled": None,  # answers to token ids: "null ids", "text ids", "-inf" or "deep"
}
STATE: dict[str, Any] = dict(DEFAULTS, requests=0, at_once=0, most_at_once=0)


def logprobs(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = MODEL(input_ids=torch.tensor([ids])).logits[0].float()
    if STATE["nan"]:
        logits[-1] = torch.nan
    return logits if STATE["raw_logits"] else logits.log_softmax(-1)


def generate(prompt: list[int], max_tokens: int, stop: set[int]) -> tuple[list[int], list[torch.Tensor], str]:
    ids, heads = list(prompt), []
    for _ in range(max_tokens):
        head = logprobs(ids)[-1]
        heads.append(head)
        token = int(head.nan_to_num(-1.0).topk(2).indices[1 if STATE["worse_token"] else 0])
        ids.append(token)
        if token in stop:
            if STATE["no_eos"]:
                return ids[len(prompt) : -1], heads[:-1], "stop"
            return ids[len(prompt) :], heads, "stop"
    return ids[len(prompt) :], heads, "length"


def best(head: torch.Tensor, kept: int, also: int) -> list[tuple[int, float]]:
    """The most probable tokens, and the one that was taken, in whatever order."""
    kept = min(kept, STATE["silent_cap"] or kept)
    values, ids = head.nan_to_num(-1.0).topk(kept)
    pairs = dict(zip(ids.tolist(), values.tolist(), strict=True))
    pairs.setdefault(also, float(head[also]))
    if head.isnan().any():
        pairs = dict.fromkeys(pairs, float("nan"))
    return sorted(pairs.items())


def prompt_ids(body: dict[str, Any], key: str, text_key: str) -> list[int]:
    prompt = body.get(key, body.get(text_key))
    if isinstance(prompt, str):
        ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
        return [id_ + STATE["shifted_ids"] for id_ in ids]
    return [*prompt[:-1], prompt[-1] + 1] if STATE["other_ids"] else prompt


def completions(body: dict[str, Any]) -> dict[str, Any]:
    if body["model"] not in STATE["models"]:
        raise Refusal(404, f"The model `{body['model']}` does not exist.")
    for kind, key in (("sample", "logprobs"), ("prompt", "prompt_logprobs")):
        if (body.get(key) or 0) > STATE["max_logprobs"]:
            raise Refusal(
                400,
                f"Requested {kind} logprobs of {body[key]}, which is greater than max allowed: "
                f"{STATE['max_logprobs']}",
            )
    ids = prompt_ids(body, "prompt", "prompt")
    tokens, heads, reason = generate(ids, body["max_tokens"], set(body["stop_token_ids"]))
    names = {t: TOKENIZER.decode([t]) if STATE["text_names"] else f"token_id:{t}" for t in range(304)}
    tops = [
        {names[id_]: logp for id_, logp in best(head, body["logprobs"], token)}
        for head, token in zip(heads, tokens, strict=True)
    ]
    choice: dict[str, Any] = {
        "index": 0,
        "text": TOKENIZER.decode(tokens),
        "finish_reason": reason,
        "logprobs": {"tokens": [names[t] for t in tokens], "top_logprobs": tops},
        "prompt_token_ids": ids,
        "token_ids": tokens,
    }
    if kept := body.get("prompt_logprobs"):
        inside = logprobs(ids)
        choice["prompt_logprobs"] = [None] + [
            {str(id_): {"logprob": logp, "rank": 1} for id_, logp in best(inside[step], kept, ids[step + 1])}
            for step in range(len(ids) - 1)
        ]
    if STATE["spoiled"] and not isinstance(body["prompt"], str):
        spoil(choice)
    reply = {"object": "text_completion", "choices": [choice]}
    if STATE["features"]:
        with LOCK:
            fault = STATE["file"] if STATE["file_faults"] > 0 else None
            STATE["file_faults"] -= 1
        params = body.get("kv_transfer_params") or {}
        seen = [*ids, *tokens][:-1] if params.get("include_output_tokens") else ids
        path = begin_file(MODEL, seen, body.get("request_id", "x"), STATE["features"], fault)
        reply["kv_transfer_params"] = {"hidden_states_path": path}
    return reply


def spoil(choice: dict[str, Any]) -> None:
    if STATE["spoiled"] == "null ids":
        choice["token_ids"][0] = None
    elif STATE["spoiled"] == "text ids":
        choice["token_ids"] = "12"
    elif STATE["spoiled"] == "-inf":
        choice["logprobs"]["top_logprobs"][0] = dict.fromkeys(
            choice["logprobs"]["top_logprobs"][0], -math.inf
        )


def sglang(body: dict[str, Any]) -> dict[str, Any]:
    ids = prompt_ids(body, "input_ids", "text")
    sampling, kept = body["sampling_params"], body["top_logprobs_num"]
    tokens, heads, reason = generate(ids, sampling["max_new_tokens"], set(sampling["stop_token_ids"]))
    meta: dict[str, Any] = {
        "finish_reason": {"type": reason},
        "output_token_logprobs": [[0.0, t, None] for t in tokens],
        "output_top_logprobs": [
            [[logp, id_, None] for id_, logp in best(head, kept, token)[:kept]]
            for head, token in zip(heads, tokens, strict=True)
        ],
    }
    if body["logprob_start_len"] == 0:
        inside = logprobs(ids)
        meta["input_token_logprobs"] = [[None, id_, None] for id_ in ids]
        meta["input_top_logprobs"] = [None] + [
            [[logp, id_, None] for id_, logp in best(inside[step], kept, ids[step + 1])]
            for step in range(len(ids) - 1)
        ]
    return {"text": TOKENIZER.decode(tokens), "meta_info": meta}


class Refusal(Exception):
    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/stats":
            self.send({key: STATE[key] for key in ("requests", "most_at_once")})
        elif self.path == "/version":
            self.send({"version": "0.0-test"})
        elif self.path == "/v1/models":
            entry = {"max_model_len": STATE["max_model_len"]} if STATE["max_model_len"] else {}
            self.send({"data": [{"id": name, **entry} for name in STATE["models"]]})
        else:
            self.send({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/faults":
            STATE.update(DEFAULTS, requests=0, most_at_once=0, **body)
            return self.send({})
        with LOCK:
            STATE["requests"] += 1
            STATE["at_once"] += 1
            STATE["most_at_once"] = max(STATE["most_at_once"], STATE["at_once"])
            fault = next((name for name in ("errors", "hangs", "cuts", "garbage") if STATE[name] > 0), None)
            if fault:
                STATE[fault] -= 1
        try:
            self.answer(body, fault)
        finally:
            with LOCK:
                STATE["at_once"] -= 1

    def answer(self, body: dict[str, Any], fault: str | None) -> None:
        if STATE["key"] and self.headers.get("Authorization") != f"Bearer {STATE['key']}":
            return self.send({"error": "Unauthorized"}, 401)
        if fault == "errors":
            return self.send({"error": {"message": "EngineCore died"}}, 500)
        if fault == "hangs":
            time.sleep(STATE["hang_s"])
            return None
        try:
            reply = {"/v1/completions": completions, "/generate": sglang}[self.path](body)
        except Refusal as refusal:
            return self.send({"error": {"message": refusal.message, "code": refusal.code}}, refusal.code)
        if STATE["shape"]:
            reply = STATE["shape"]
        data = json.dumps(reply).encode()
        if STATE["spoiled"] == "deep" and not isinstance(body["prompt"], str):
            data = b"[" * 100_000 + b"]" * 100_000
        if fault == "garbage":
            data = data[: len(data) // 2]
        self.send(data, cut=fault == "cuts")
        return None

    def send(self, content: Any, code: int = 200, cut: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a client that has given up


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
