"""Closed forms against numbers from a convex solver that enumerated every failing set of tokens."""

import json
import math
from pathlib import Path

import pytest
import torch
from oracles.mathematics.certificates import accepted_set

from certdraft import certificates
from certdraft.certificates import Coverage, Head, coarse_radius, margin_bound, radius, tv_radius
from certdraft.certificates.bounds import leading_set

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text(encoding="utf-8"))["vectors"]


def of_kind(kind: str) -> list:
    return [pytest.param(v, id=str(i)) for i, v in enumerate(VECTORS) if v["kind"] == kind]


def build(spec: list) -> certificates.Rule:
    return getattr(certificates, spec[0])(**spec[1])


def check(value: torch.Tensor, vector: dict) -> None:
    expected = float(vector["expected"])
    if math.isinf(expected):
        assert float(value) == expected
    else:
        assert float(value) == pytest.approx(expected, abs=vector["tol"])


@pytest.mark.parametrize("vector", of_kind("radius"))
def test_radius(vector: dict) -> None:
    p = torch.tensor(vector["p"], dtype=torch.float64)
    p = p / p.sum()
    rule = build(vector["rule"])
    if "accepted" in vector:
        expected = {i for i, accepted in enumerate(vector["accepted"]) if accepted}
        assert accepted_set(p.tolist(), rule) == expected
        if not isinstance(rule, Coverage):
            assert set(rule.accepted_entries(p).nonzero().flatten().tolist()) == expected
    for source in (p, Head.from_probs(p, len(p))):
        if vector["direction"] == "tv":
            check(tv_radius(source, rule), vector)
        else:
            check(radius(source, rule, vector["direction"]), vector)


@pytest.mark.parametrize("vector", of_kind("margin"))
def test_margin_bound(vector: dict) -> None:
    known = {name: torch.tensor(x, dtype=torch.float64) for name, x in vector["known"].items()}
    check(margin_bound(build(vector["rule"]), direction=vector["direction"], **known), vector)


@pytest.mark.parametrize("vector", of_kind("leading_set"))
def test_leading_set(vector: dict) -> None:
    gap = torch.tensor(vector["gap"], dtype=torch.float64)
    check(leading_set(gap, vector["k"], vector["direction"]), vector)


@pytest.mark.parametrize("vector", of_kind("coarse"))
def test_coarse_radius(vector: dict) -> None:
    p = torch.tensor(vector["p_top"], dtype=torch.float64)
    num_tail = vector["num_tail"] or 50
    head = Head(torch.arange(len(p)), -(p / p[0]).log(), -p[0].log(), len(p) + num_tail)
    above = None if vector["above"] is None else torch.tensor(vector["above"])
    check(coarse_radius(head, vector["m"], vector["direction"], tail_above=above), vector)
