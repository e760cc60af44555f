"""The loop of every engine's script: jobs from the first argument's file, results into the second's."""

import json
import sys
import time


def run_jobs(engine, version, run):
    """Call `run` with each job and write what it returns, by the job's name, after each one."""
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    results = {"engine": engine, "version": version, "runs": {}}
    for job in jobs:
        try:
            results["runs"][job["name"]] = run(job)
        except Exception as error:  # one refused folder must not hide the others
            results["runs"][job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(results, file)


def timed(seconds, act, *arguments, **options):
    """What a call returns; its wall-clock seconds are appended."""
    start = time.perf_counter()
    result = act(*arguments, **options)
    seconds.append(time.perf_counter() - start)
    return result
