"""Certify a target, evaluate drafters: statistics over traces, real decoding, one report (floor 4).

Start reading at `evaluate.py`: `measure/` holds the measurements, `certify/` the certificates of a target
alone, `serving/` drafters in the engine that serves them, `report/` tables, figures and pages, `commands.py`
the command line.
"""

from certdraft.evaluation.certify.certify import CertifyProtocol, CertifyReport, certify
from certdraft.evaluation.certify.certify_report import certify_tables, write_certify
from certdraft.evaluation.commands import NotLossless, run_certify, run_evaluate
from certdraft.evaluation.evaluate import EvaluationReport, evaluate
from certdraft.evaluation.measure.acceptance import Acceptance, CertificateViolation, measure_acceptance
from certdraft.evaluation.measure.acceptance_lengths import Lengths, replay_lengths
from certdraft.evaluation.measure.bench import Benchmark, benchmark
from certdraft.evaluation.measure.statistics import Interval, compare_ratios, pooled_ratio
from certdraft.evaluation.measure.trace_reading import greedy_documents
from certdraft.evaluation.profile_command import run_profile
from certdraft.evaluation.prompts import read_questions
from certdraft.evaluation.report.compare import flatten_settings
from certdraft.evaluation.report.evaluate_report import headline_table, write_evaluation
from certdraft.evaluation.report.page import Figure, Page, Section, Table, write_json, write_page
from certdraft.evaluation.report.provenance import RECORD_FILE, provenance, read_parts, sha256
from certdraft.evaluation.serving.bench_command import run_bench

__all__ = [
    "Acceptance", "Benchmark", "CertificateViolation", "CertifyProtocol", "CertifyReport", "EvaluationReport",
    "Figure", "Interval", "Lengths", "NotLossless", "Page", "RECORD_FILE", "Section", "Table", "benchmark",
    "certify", "certify_tables", "compare_ratios", "evaluate", "flatten_settings", "greedy_documents",
    "headline_table", "measure_acceptance", "pooled_ratio", "provenance", "read_parts", "read_questions",
    "replay_lengths", "run_bench", "run_certify", "run_evaluate", "run_profile", "sha256", "write_certify",
    "write_evaluation", "write_json", "write_page",
]  # fmt: skip
