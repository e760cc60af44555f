"""One command for a CUDA machine: is the GPU path right, how fast is it, and how much memory does it take?

    make gpu                                               # every part, some 8 minutes on one H100
    python benchmarks/gpu/run.py --parts texts train       # chosen parts
    python benchmarks/gpu/run.py --toy true --device cpu   # the same code at toy size; its test runs it

Models have random weights in the sizes of Qwen3-0.6B and of small drafters: nothing is downloaded.
Parts:

    tests    the suite's tests marked `gpu`
    kernels  forward and backward of chunked losses of an online target at V = 151,936, with the kernels that
             "auto" chooses and by the readable path, beside four bare matrix products; Liger's forward KL if
             liger-kernel is installed
    record   tokens/s of recording from the first prompt to the last row, without loading and without a disk,
             beside the target's bare passes (no output layer, nothing recorded, no host that waits) and
             transformers' `generate`; peak memory beside `certdraft plan`
    texts    recorded against live greedy text in bf16: where they differ, and by which lead
    train    tokens/s, synchronisations and peak memory of a step of every drafter kind, beside `certdraft
             plan`; a synchronisation counts from the fetching of the batch on, time from when it is there

Peaks are of memory that torch gives out, so the plan's share for the CUDA context is left out of it; on a CPU
there are none, and no synchronisations. Results go to benchmarks/results/gpu-NAME.json, one entry per part,
with the name of the card.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loss_kernels import run_kernels
from recording import run_record, run_texts
from training_steps import run_train
from work import FULL, TOY, Meter, Size, make_target

from certdraft.decoding import device_name
from certdraft.support import write_json

ROOT = Path(__file__).parents[2]


def run_tests(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Run the suite's gpu tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"exit_code": done.returncode, "said": (done.stdout.strip().splitlines() or [""])[-1]}


PARTS: dict[str, Callable[[Size, Path, Meter], dict[str, Any]]] = {
    "tests": run_tests, "kernels": run_kernels, "record": run_record, "texts": run_texts, "train": run_train,
}  # fmt: skip


def run(parts: list[str], size: Size, device: torch.device) -> dict[str, Any]:
    """Run the chosen parts; a part that fails is recorded with its error, and the others still run."""
    meter = Meter(device)
    results: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "date": date.today().isoformat(),
        "command": " ".join(["python benchmarks/gpu/run.py", *sys.argv[1:]]),
    }  # fmt: skip
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_target(folder, size)
        for name in parts:
            begin = time.perf_counter()
            try:
                results[name] = PARTS[name](size, folder, meter)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            results[name]["took_s"] = round(time.perf_counter() - begin, 1)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """The results, one line per number."""
    lines = [f"{results['device']}, PyTorch {results['torch']}"]

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix} {key}".strip(), inner)
        elif not isinstance(value, list):
            shown = f"{value:,.3f}" if isinstance(value, float) else str(value)
            lines.append(f"  {prefix:<42} {shown}")

    for name in PARTS:
        if name in results:
            walk(name, results[name])
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", type=lambda text: text.lower() == "true", default=False)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.device == "cpu" and not chosen.toy:
        raise SystemExit("no CUDA device here; --toy true --device cpu runs the same code at toy size")
    results = run(chosen.parts, TOY if chosen.toy else FULL, torch.device(chosen.device))
    print(table(results))
    name = "-".join(results["device"].lower().split())
    out = chosen.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    if not chosen.toy or chosen.out:
        write_json(out, results)
        print(f"written to {out}")
    if any("error" in results[part] or results[part].get("exit_code") for part in chosen.parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
