"""Jobs in the speculators library: `run_speculators.py JOBS.json RESULTS.json`, run by its own environment.

A job: name and drafter (a folder in the layout of speculators). A result: the class that the library makes of
it, its draft length, and the sum of each tensor that it loaded, which a tensor left random would not have.
"""

import speculators
import torch
from jobs import run_jobs
from safetensors.torch import load_file
from speculators import SpeculatorModel, SpeculatorModelConfig


def run(job):
    config = SpeculatorModelConfig.from_pretrained(job["drafter"])
    model = SpeculatorModel.from_pretrained(job["drafter"])
    stored = load_file(f"{job['drafter']}/model.safetensors")
    loaded = model.state_dict()
    wrong = [n for n, v in stored.items() if n not in loaded or not torch.equal(loaded[n].to(v.dtype), v)]
    method = config.speculators_config.proposal_methods[0]
    return {
        "class": type(model).__name__,
        "num_tokens": method.speculative_tokens,
        "target": config.speculators_config.verifier.name_or_path,
        "wrong": wrong,
        "unset": sorted(set(loaded) - set(stored)),
    }


run_jobs("speculators", f"speculators {getattr(speculators, '__version__', '')}", run)
