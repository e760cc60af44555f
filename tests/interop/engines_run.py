"""Runs jobs in an engine's own environment, and says why where it cannot."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interop.environments import CONVERTER, ENVIRONMENTS

SCRIPTS = Path(__file__).parent / "engines"


def run(engine: str, jobs: list[dict[str, Any]], *options: str, script: str | None = None) -> dict[str, Any]:
    """Results by job name, with the engine's name and version; `script` replaces `run_ENGINE.py`.

    A job that takes its process down is reported as an error, and the jobs after it get a new process.
    """
    if engine == "llamacpp":
        jobs = [as_gguf(job) for job in jobs]
    python, program = (
        ENVIRONMENTS / engine / "venv" / "bin" / "python",
        SCRIPTS / (script or f"run_{engine}.py"),
    )
    found: dict[str, Any] = {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        jobs_file, results = Path(folder) / "jobs.json", Path(folder) / "results.json"
        left = list(jobs)
        while left:
            jobs_file.write_text(json.dumps(left))
            results.unlink(missing_ok=True)
            done = subprocess.run(
                [python, program, jobs_file, results, *options], capture_output=True, text=True, check=False
            )
            fresh = json.loads(results.read_text()) if results.exists() else {"runs": {}}
            found = {**found, **fresh, "runs": {**found["runs"], **fresh["runs"]}}
            unanswered = [job for job in left if job["name"] not in found["runs"]]
            if unanswered:
                tail = " | ".join(done.stderr.strip().splitlines()[-3:])
                found["runs"][unanswered[0]["name"]] = {"error": f"exit code {done.returncode}: {tail}"}
            left = unanswered[1:]
    return found


def as_gguf(job: dict[str, Any]) -> dict[str, Any]:
    """A job for llama.cpp, whose models are GGUF files."""
    target = job["target"]
    job = job | {"target": gguf(target)}
    if "drafter" in job:
        job |= {"drafter": gguf(job["drafter"], None if job["family"] == "causal" else target)}
    return job


def gguf(folder: str, target: str | None = None) -> str:
    """A folder converted by llama.cpp's own converter, once; no file is there if it refuses."""
    out = Path(f"{folder}.gguf")
    if not out.exists():
        command = [
            sys.executable,
            SCRIPTS / "to_gguf.py",
            CONVERTER,
            folder,
            out,
            *([target] if target else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        out.with_suffix(".gguf.log").write_text(done.stdout + done.stderr)
    return str(out)
