"""Certify a target, evaluate drafters: statistics over traces, real decoding, one report (floor 4)."""

from certdraft.evaluation.acceptance import Acceptance as Acceptance
from certdraft.evaluation.acceptance import CertificateViolation as CertificateViolation
from certdraft.evaluation.acceptance import measure_acceptance as measure_acceptance
from certdraft.evaluation.bench import Benchmark as Benchmark
from certdraft.evaluation.bench import benchmark as benchmark
from certdraft.evaluation.certify import CertifyProtocol as CertifyProtocol
from certdraft.evaluation.certify import CertifyReport as CertifyReport
from certdraft.evaluation.certify import certify as certify
from certdraft.evaluation.certify_command import run_certify as run_certify
from certdraft.evaluation.certify_report import certify_tables as certify_tables
from certdraft.evaluation.certify_report import write_certify as write_certify
from certdraft.evaluation.commands import run_evaluate as run_evaluate
from certdraft.evaluation.evaluate import EvaluationReport as EvaluationReport
from certdraft.evaluation.evaluate import evaluate as evaluate
from certdraft.evaluation.evaluate_report import headline_table as headline_table
from certdraft.evaluation.evaluate_report import write_evaluation as write_evaluation
from certdraft.evaluation.lengths import Lengths as Lengths
from certdraft.evaluation.lengths import replay_lengths as replay_lengths
from certdraft.evaluation.provenance import provenance as provenance
from certdraft.evaluation.reading import greedy_documents as greedy_documents
from certdraft.evaluation.statistics import Interval as Interval
from certdraft.evaluation.statistics import compare_ratios as compare_ratios
from certdraft.evaluation.statistics import pooled_ratio as pooled_ratio
