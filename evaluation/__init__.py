"""Certify a target, evaluate drafters: statistics over traces, real decoding, one report (floor 4).

Start reading at `evaluate.py`: `measure/` holds the measurements, `certify/` the certificates of a target
alone, `report/` tables, figures and pages, `commands.py` the command line.
"""

from certdraft.evaluation.certify.certify import CertifyProtocol as CertifyProtocol
from certdraft.evaluation.certify.certify import CertifyReport as CertifyReport
from certdraft.evaluation.certify.certify import certify as certify
from certdraft.evaluation.certify.certify_report import certify_tables as certify_tables
from certdraft.evaluation.certify.certify_report import write_certify as write_certify
from certdraft.evaluation.commands import NotLossless as NotLossless
from certdraft.evaluation.commands import run_certify as run_certify
from certdraft.evaluation.commands import run_evaluate as run_evaluate
from certdraft.evaluation.evaluate import EvaluationReport as EvaluationReport
from certdraft.evaluation.evaluate import evaluate as evaluate
from certdraft.evaluation.measure.acceptance import Acceptance as Acceptance
from certdraft.evaluation.measure.acceptance import CertificateViolation as CertificateViolation
from certdraft.evaluation.measure.acceptance import measure_acceptance as measure_acceptance
from certdraft.evaluation.measure.acceptance_lengths import Lengths as Lengths
from certdraft.evaluation.measure.acceptance_lengths import replay_lengths as replay_lengths
from certdraft.evaluation.measure.bench import Benchmark as Benchmark
from certdraft.evaluation.measure.bench import benchmark as benchmark
from certdraft.evaluation.measure.statistics import Interval as Interval
from certdraft.evaluation.measure.statistics import compare_ratios as compare_ratios
from certdraft.evaluation.measure.statistics import pooled_ratio as pooled_ratio
from certdraft.evaluation.measure.trace_reading import greedy_documents as greedy_documents
from certdraft.evaluation.profile_command import run_profile as run_profile
from certdraft.evaluation.report.compare import flatten_settings as flatten_settings
from certdraft.evaluation.report.evaluate_report import headline_table as headline_table
from certdraft.evaluation.report.evaluate_report import write_evaluation as write_evaluation
from certdraft.evaluation.report.page import Figure as Figure
from certdraft.evaluation.report.page import Page as Page
from certdraft.evaluation.report.page import Section as Section
from certdraft.evaluation.report.page import Table as Table
from certdraft.evaluation.report.page import claim_directory as claim_directory
from certdraft.evaluation.report.page import write_json as write_json
from certdraft.evaluation.report.page import write_page as write_page
from certdraft.evaluation.report.provenance import RECORD_FILE as RECORD_FILE
from certdraft.evaluation.report.provenance import provenance as provenance
from certdraft.evaluation.report.provenance import read_parts as read_parts
from certdraft.evaluation.report.provenance import sha256 as sha256
from certdraft.support import write_text as write_atomic  # noqa: F401, of run records

__all__ = [
    "Acceptance", "Benchmark", "CertificateViolation", "CertifyProtocol", "CertifyReport", "EvaluationReport",
    "Figure", "Interval", "Lengths", "NotLossless", "Page", "RECORD_FILE", "Section", "Table", "benchmark",
    "certify", "certify_tables", "claim_directory", "compare_ratios", "evaluate", "flatten_settings",
    "greedy_documents", "headline_table", "measure_acceptance", "pooled_ratio", "provenance", "read_parts",
    "replay_lengths", "run_certify", "run_evaluate", "run_profile", "sha256", "write_certify",
    "write_evaluation", "write_json", "write_page",
]  # fmt: skip
