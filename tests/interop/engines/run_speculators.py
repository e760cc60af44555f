"""Jobs in the speculators library: `run_speculators.py JOBS.json RESULTS.json`, run by its own environment.

A job: name and drafter (a folder in the layout of speculators). A result: the class that the library makes of
it, its draft length, and the sum of each tensor that it loaded, which a tensor left random would not have.
"""

import json
import sys

import speculators
import torch
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


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    version = getattr(speculators, "__version__", "")
    results = {"engine": "speculators", "version": f"speculators {version}", "runs": {}}
    for job in jobs:
        try:
            results["runs"][job["name"]] = run(job)
        except Exception as error:  # one refused folder must not hide the others
            results["runs"][job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(results, file)


main()
