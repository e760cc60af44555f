"""Jobs in OpenVINO GenAI: `run_openvino.py JOBS.json RESULTS.json`, run where optimum-intel is installed.

A job: name, family, target and drafter (folders of Hugging Face; no drafter: plain decoding), num_tokens,
max_new_tokens, prompts (token ids), taps (layers of an EAGLE-3 head, 0-based), threads (1 if not given), and
`work`, a folder for the converted models. A result: tokens and seconds of every prompt, passes of the target
after the first, and accepted draft tokens (not all of the last round's are counted).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import openvino
import openvino_genai
from jobs import run_jobs, timed


def converted(folder, work, family=None, taps=None):
    """The folder in OpenVINO's format, converted once."""
    out = Path(work) / f"openvino-{Path(folder).name}"
    if out.is_dir():
        return out
    draft = Path(work) / f"openvino-{Path(folder).name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    command = [Path(sys.executable).parent / "optimum-cli", "export", "openvino", "-m", folder]
    command += ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    command += ["--trust-remote-code"] if family in ("eagle3", "dflash") else []
    done = subprocess.run([*command, draft], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"optimum-cli: {done.stderr.strip().splitlines()[-1:]}")
    if family == "eagle3":  # its own default is off by one, and a list is refused
        name = draft / "openvino_model.xml"
        model = openvino.Core().read_model(name)
        model.set_rt_info(" ".join(map(str, taps)), "hidden_layers_list")
        openvino.save_model(model, draft / "named.xml", compress_to_fp16=False)
        del model
        for suffix in ("xml", "bin"):
            (draft / f"named.{suffix}").replace(draft / f"openvino_model.{suffix}")
    draft.rename(out)
    return out


def run(job):
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    exact |= {"INFERENCE_NUM_THREADS": job.get("threads", 1)}
    target = converted(job["target"], job["work"])
    more = {}
    if job.get("drafter"):
        folder = converted(job["drafter"], job["work"], job["family"], job.get("taps"))
        more["draft_model"] = openvino_genai.draft_model(str(folder), "CPU", **exact)
    if job["family"] == "dflash":  # refuses the cache of prefixes that is on by default
        more["scheduler_config"] = openvino_genai.SchedulerConfig()
        more["scheduler_config"].enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(str(target), "CPU", **exact, **more)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = job["max_new_tokens"], True, False
    if job.get("drafter"):
        config.num_assistant_tokens = job["num_tokens"]
    tokens, seconds, drafts, accepted = [], [], 0, 0
    for prompt in job["prompts"]:
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        inputs = openvino_genai.TokenizedInputs(ids, openvino.Tensor(numpy.ones_like(ids.data)))
        answer = timed(seconds, pipeline.generate, inputs, config)
        tokens.append(list(answer.tokens[0]))
        if job.get("drafter"):
            metrics = answer.extended_perf_metrics
            accepted += metrics.get_num_accepted_tokens()
            drafts += len(metrics.main_model_metrics.raw_metrics.m_durations) - 1
    return {"tokens": tokens, "seconds": seconds, "passes": drafts, "accepted": accepted}


run_jobs("OpenVINO GenAI", f"openvino-genai {openvino_genai.__version__}", run)
