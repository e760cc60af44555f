"""Certify a target, evaluate drafters: statistics over traces, real decoding, one report (floor 4)."""

from certdraft.evaluation.certify import CertifyProtocol as CertifyProtocol
from certdraft.evaluation.certify import CertifyReport as CertifyReport
from certdraft.evaluation.certify import certify as certify
from certdraft.evaluation.certify_report import certify_tables as certify_tables
from certdraft.evaluation.certify_report import write_certify as write_certify
from certdraft.evaluation.commands import run_certify as run_certify
from certdraft.evaluation.statistics import Interval as Interval
from certdraft.evaluation.statistics import compare_ratios as compare_ratios
from certdraft.evaluation.statistics import pooled_ratio as pooled_ratio
