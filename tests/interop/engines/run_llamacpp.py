"""Jobs in llama.cpp: `run_llamacpp.py JOBS.json RESULTS.json`, run by the environment that has xllamacpp.

A job: name, family, target and drafter (GGUF files; no drafter: plain decoding), num_tokens, max_new_tokens,
prompts (token ids), threads (1 if not given). A result: tokens and seconds of every prompt, drafted and
accepted draft tokens.
"""

import xllamacpp
from jobs import run_jobs, timed

KINDS = {"causal": "DRAFT_SIMPLE", "eagle3": "DRAFT_EAGLE3", "dflash": "DRAFT_DFLASH"}


def run(job):
    params = xllamacpp.CommonParams()
    params.model.path = job["target"]
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 2048, 1, False, 0
    threads = job.get("threads", 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job.get("drafter"):
        kind = "COMMON_SPECULATIVE_TYPE_" + KINDS[job["family"]]
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
        draft = params.speculative.draft
        draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = job["drafter"], job["num_tokens"], 0, 0.0
        draft.n_gpu_layers = 0
        draft.cache_type_k = draft.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    tokens, seconds, drafted, accepted = [], [], 0, 0
    for prompt in job["prompts"]:
        request = {
            "prompt": prompt,
            "n_predict": job["max_new_tokens"],
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "ignore_eos": True,
            "cache_prompt": False,
            "logprobs": 1,  # token ids come with them, and nowhere else once there are drafts
        }
        answer = timed(seconds, server.handle_completions, request)
        tokens.append([entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]])
        drafted += answer["timings"].get("draft_n", 0)
        accepted += answer["timings"].get("draft_n_accepted", 0)
    return {"tokens": tokens, "seconds": seconds, "drafted": drafted, "accepted": accepted}


run_jobs("llama.cpp", f"xllamacpp {xllamacpp.__version__}", run)
