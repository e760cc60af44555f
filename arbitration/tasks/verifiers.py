"""Five ways to verify a response; text of a model is never evaluated in this process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from certdraft.arbitration.tasks.problems import Problem
from certdraft.arbitration.tasks.sandbox import run_python

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
# Where a completion has left the function it was to complete (as HumanEval's stop words have it).
_NEXT_BLOCK = re.compile(r"\n(?=(?:class|def|if|print|#|```|@)[ (_\w#`])")
_EXPRESSION = """
import ast
response, reference = {response!r}.strip(), {reference!r}.strip()
trees = ast.parse(response, mode="eval"), ast.parse(reference, mode="eval")
value, wanted = (eval(compile(tree, "response", "eval"), {{}}) for tree in trees)
def plain(x):  # an object of another class may claim to equal anything
    inside = x.items() if type(x) is dict else x if type(x) in (list, tuple, set, frozenset) else ()
    return type(x) in kinds and all(map(plain, inside))
kinds = {{type(None), bool, int, float, complex, str, bytes, dict, list, tuple, set, frozenset}}
assert plain(value), type(value)
if isinstance(value, (int, float)) and isinstance(wanted, (int, float)):
    assert abs(value - wanted) <= 1e-6 * max(1.0, abs(wanted)), value
else:
    assert type(value) is type(wanted) and value == wanted, value
"""


@dataclass(frozen=True)
class Sandbox:
    """Limits on programs that a model wrote.

    Args:
        timeout_s: wall-clock seconds a program may take.
        memory_mb: address space, in MiB.
        workers: programs that run at once.
    """

    timeout_s: float = 3.0
    memory_mb: int = 512
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.timeout_s > 0 or self.memory_mb < 32 or self.workers < 1:
            raise ValueError(
                f"sandbox limits timeout_s={self.timeout_s}, memory_mb={self.memory_mb}, "
                f"workers={self.workers}: Python itself needs time, 32 MiB and a worker"
            )


def verify(problem: Problem, response: str, sandbox: Sandbox = Sandbox()) -> bool:
    """Return whether a response to a problem is right.

    Args:
        problem: says how to check.
        response: the text behind the prompt, without the end-of-text token.
        sandbox: limits for "expression" and "tests", which run in a separate process.

    Examples:
        >>> verify(Problem("2+2=", "4", "number"), "two and two make 4.0")
        True
    """
    if problem.check == "exact":
        return response.strip() == problem.answer.strip()
    if problem.check == "contains":
        words = re.escape(problem.answer.strip())
        return re.search(rf"(?<!\w){words}(?!\w)", response, re.IGNORECASE) is not None
    if problem.check == "number":
        wanted, found = last_number(problem.answer), last_number(response)
        if wanted is None:
            raise ValueError(f"{problem.where}: the answer {problem.answer!r} holds no number")
        return found == wanted
    if not response.strip():
        return False
    if problem.check == "expression":
        program = _EXPRESSION.format(response=response, reference=problem.answer)
    else:
        program = f"{_program(problem, response)}\n{problem.answer}"
    outcome = run_python(program, timeout_s=sandbox.timeout_s, memory_bytes=sandbox.memory_mb << 20)
    return outcome.status == "ok"


def verify_all(
    problems: Sequence[Problem],
    responses: Sequence[str],
    sandbox: Sandbox = Sandbox(),
) -> list[bool]:
    """`verify` for each pair; equal pairs are checked once, programs run side by side.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = list(zip(problems, responses, strict=True))
    distinct = list(dict.fromkeys(pairs))
    if any(problem.check in ("expression", "tests") for problem, _ in distinct):
        with ThreadPoolExecutor(sandbox.workers) as pool:
            verdicts = list(pool.map(lambda pair: verify(pair[0], pair[1], sandbox), distinct))
    else:
        verdicts = [verify(problem, response, sandbox) for problem, response in distinct]
    right = dict(zip(distinct, verdicts, strict=True))
    return [right[pair] for pair in pairs]


def last_number(text: str) -> Decimal | None:
    """The number a text ends with, behind "####" where there is one; None when there is none.

    Examples:
        >>> last_number("so 3 × $1,234.50 = 3,703.5"), last_number("#### -7 apples"), last_number("none")
        (Decimal('3703.5'), Decimal('-7'), None)
    """
    _, marker, behind = text.rpartition("####")
    found = _NUMBER.findall(behind if marker else text)
    found = found[:1] if marker else found[-1:]
    try:
        return Decimal(found[0].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _program(problem: Problem, response: str) -> str:
    """The code of a response: a fenced block where there is one, else the prefix and its completion."""
    if fenced := _FENCE.search(response):
        code = fenced[1]
        return code if not problem.prefix or code.lstrip().startswith(("def ", "import ", "from ")) else (
            problem.prefix + code
        )  # fmt: skip
    if problem.prefix:
        return problem.prefix + _NEXT_BLOCK.split(response)[0]
    return response
