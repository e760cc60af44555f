"""Speed, memory and accuracy of chunked losses, as ratios measured in one run.

    python benchmarks/losses.py                                    # CPU: 6 minutes, 3 GB, one thread
    python benchmarks/losses.py --device cuda                      # GPU: Qwen3's output layers, bf16

What everything is divided by are the four bare matrix products of distillation in the same run: target
logits, drafter logits, and the gradients of the drafter's hidden states and output layer. Rows:

| row | target | loss |
|---|---|---|
| kl online | still in its output layer, computed along | forward KL over the full vocabulary |
| margin online | the same | margin-discounted cross-entropy |
| kl+ce online | the same | half forward KL, half hard cross-entropy |
| kl cached, margin cached | a trace, K = 32 | the same through head and bucket: three products |
| rank cached | a trace, K = 32 | `CoverageMargin(4)`: one product, two gradient entries a step |
| naive | online | forward KL by autograd on all logits, as one writes it first |
| plain | online | this package's `ForwardKL` by autograd on all logits |
| liger kl | online | liger-kernel's `LigerFusedLinearJSDLoss(beta=0)`, if it is installed |

Times: the pieces take turns within a round, and a ratio is that of one round; reported are the median over
the rounds, the least and the largest. Process time on a CPU, which may be shared; CUDA events on a GPU.
Memory: growth of the largest resident size of a process of its own on a CPU, of allocated memory on a GPU.
Gradient error: against float64 from the same bf16 inputs, at an overlap Σ min(p, q) of 0.95.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from certdraft import losses as L
from certdraft.certificates import Head
from certdraft.decoding import device_name
from certdraft.losses.chunks.fp32_matmul import accumulate_, product
from certdraft.losses.kernels import Backend

Work = Callable[[], object]
KEPT = 32


@dataclass(frozen=True)
class Case:
    """Random hidden states and output layers with a drafter that is close to its target."""

    steps: int
    target_width: int
    width: int
    vocab_size: int
    dtype: torch.dtype
    device: str
    chunk_tokens: int | None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [N, H], weight [V, H], target hidden [N, H'], target weight [V, H']."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        hidden, weight = draw(self.steps, self.width), draw(self.vocab_size, self.width)
        weight *= 3.0 / self.width**0.5
        t_hidden, t_weight = draw(self.steps, self.target_width), draw(self.vocab_size, self.target_width)
        t_weight *= 3.0 / self.target_width**0.5
        if self.width == self.target_width:  # overlap about 0.95
            t_hidden, t_weight = hidden + 0.04 * t_hidden, weight.clone()
        hidden, weight, t_hidden, t_weight = (x.to(self.dtype) for x in (hidden, weight, t_hidden, t_weight))
        return hidden.requires_grad_(), weight.requires_grad_(), t_hidden, t_weight


def products(case: Case, how_many: int = 4) -> Work:
    """The bare products of one pass, logits in fp32; 1 is the drafter's forward product alone."""
    hidden, weight, t_hidden, t_weight = (x.detach() for x in case.tensors())
    size = case.steps if case.device == "cpu" else 1024
    logits = torch.empty(size, case.vocab_size, device=case.device)
    dz = logits if case.dtype == torch.float32 else torch.zeros_like(logits, dtype=case.dtype)
    d_weight = torch.zeros(case.vocab_size, case.width, device=case.device)

    def run() -> None:
        for start in range(0, case.steps, size):
            h, t = hidden[start : start + size], t_hidden[start : start + size]
            product(h, weight.t(), out=logits[: len(h)])
            if how_many == 4:
                product(t, t_weight.t(), out=logits[: len(h)])
                torch.mm(dz[: len(h)], weight)
                accumulate_(d_weight, dz[: len(h)].t(), h)

    return run


def ours(case: Case, loss: L.Loss, cached: bool, backend: Backend = "auto") -> Work:
    """One chunked evaluation with both gradients."""
    hidden, weight, t_hidden, t_weight = case.tensors()
    online = L.OnlineTarget(t_hidden, t_weight, KEPT, full=not cached)
    target = L.TargetBatch(trace(online)) if cached else online
    chunked = L.Chunked(loss, chunk_tokens=case.chunk_tokens, backend=backend)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(chunked(hidden, weight, target), (hidden, weight))

    return run


def trace(online: L.OnlineTarget) -> Head:
    """The heads a trace would hold."""
    heads = [online[start : start + 128].head for start in range(0, len(online), 128)]
    columns = [torch.cat([getattr(head, name) for head in heads]) for name in ("ids", "gap", "lse_gap")]
    return Head(*columns, vocab_size=online.vocab_size)


def naive(case: Case) -> Work:
    """Forward KL as one writes it first."""
    hidden, weight, t_hidden, t_weight = case.tensors()

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logp = (t_hidden @ t_weight.t()).float().log_softmax(-1)
        logq = (hidden @ weight.t()).float().log_softmax(-1)
        value = (logp.exp() * (logp - logq)).sum(-1).mean()
        return torch.autograd.grad(value, (hidden, weight))

    return run


def plain(case: Case) -> Work:
    """The same loss of this package, not chunked."""
    hidden, weight, t_hidden, t_weight = case.tensors()

    def run() -> tuple[Tensor, ...]:
        target = L.OnlineTarget(t_hidden, t_weight, KEPT)[:]
        return torch.autograd.grad(L.reduce(L.ForwardKL()(hidden @ weight.t(), target)), (hidden, weight))

    return run


def liger(case: Case, chunk_tokens: int) -> Work | None:
    """Liger's chunked forward KL; compiled on a GPU, as its default is."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, weight, t_hidden, t_weight = case.tensors()
    labels = torch.zeros(case.steps, dtype=torch.long, device=case.device)
    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=case.device != "cpu",
        chunk_size=chunk_tokens,
    )

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(hidden, weight, t_hidden, t_weight, labels), (hidden, weight))

    return run


def pieces(case: Case) -> dict[str, Callable[[], Work | None]]:
    """Everything that is measured, made when it is needed."""
    mixed = L.Mixture([L.ForwardKL(), L.HardCE()], [0.5, 0.5])
    made: dict[str, Callable[[], Work | None]] = {
        "four products": lambda: products(case),
        "kl online": lambda: ours(case, L.ForwardKL(), cached=False),
        "margin online": lambda: ours(case, L.MarginDiscountedCE(), cached=False),
        "kl+ce online": lambda: ours(case, mixed, cached=False),
        "kl cached": lambda: ours(case, L.ForwardKL(), cached=True),
        "margin cached": lambda: ours(case, L.MarginDiscountedCE(), cached=True),
        "rank cached": lambda: ours(case, L.CoverageMargin(4), cached=True),
        "one product": lambda: products(case, 1),
        "naive": lambda: naive(case),
        "plain": lambda: plain(case),
        "liger kl, chunks of 128": lambda: liger(case, 128),
        "liger kl, chunks of 1024": lambda: liger(case, 1024),
    }
    if case.device != "cpu":
        made["kl online, torch path"] = lambda: ours(case, L.ForwardKL(), False, "torch")
        made["margin online, torch path"] = lambda: ours(case, L.MarginDiscountedCE(), False, "torch")
    return made


def seconds(run: Work, device: str) -> float:
    """Process time on a CPU, time between two events on a GPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def times(case: Case, rounds: int) -> dict[str, object]:
    """Seconds, and ratios to the four products of the same round: median, least, largest."""
    work = {name: run for name, make in pieces(case).items() if (run := make()) is not None}
    for run in work.values():
        run()  # warms up
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            found[name].append(seconds(run, case.device))
    base = found["four products"]
    ratios = {name: [t / b for t, b in zip(values, base, strict=True)] for name, values in found.items()}
    result: dict[str, object] = {
        "seconds": {name: round(statistics.median(values), 4) for name, values in found.items()},
        "over_four_products": {name: _spread(values) for name, values in ratios.items()},
    }
    theirs = [name for name in found if name.startswith("liger")]
    if theirs:
        quickest = min(theirs, key=lambda name: statistics.median(found[name]))
        against = [a / b for a, b in zip(found["kl online"], found[quickest], strict=True)]
        result["kl_online_over_the_quicker_liger"] = {"which": quickest} | _spread(against)
    against = [a / b for a, b in zip(found["kl online"], found["naive"], strict=True)]
    result["kl_online_over_naive"] = _spread(against)
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "largest": round(max(values), 3),
    }


def peak_bytes(case: Case, name: str) -> int | None:
    """How much more memory than its inputs one evaluation needs at its peak; run in a process of its own."""
    run = pieces(case)[name]()
    if run is None:
        return None
    if case.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def memory(case: Case) -> dict[str, object]:
    """Peaks in MB, relative to naive autograd and to what must exist: both gradients in fp32."""
    names = ("kl online", "margin online", "kl+ce online", "margin cached", "rank cached", "naive", "plain")
    names += ("liger kl, chunks of 128", "liger kl, chunks of 1024")
    found = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if (peak := json.loads(text.splitlines()[-1])) is not None:
            found[name] = peak
    floor = 4 * case.width * case.vocab_size + case.width * case.steps * case.dtype.itemsize
    return {
        "megabytes": {name: round(peak / 1e6, 1) for name, peak in found.items()},
        "over_naive": {name: round(peak / found["naive"], 3) for name, peak in found.items()},
        "over_gradients": {name: round(peak / floor, 2) for name, peak in found.items()},
    }


def accuracy(case: Case) -> dict[str, object]:
    """Relative error of the gradients of hidden states and output layer, bf16 in, float64 as the truth."""
    small = Case(256, case.width, case.width, case.vocab_size, torch.bfloat16, case.device, None)
    hidden, weight, t_hidden, t_weight = (x.detach() for x in small.tensors())
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    chunked = L.Chunked(L.ForwardKL(), chunk_tokens=64, backend="torch")
    target = L.OnlineTarget(t_hidden.double(), t_weight.double(), KEPT)
    truth = torch.autograd.grad(chunked(*exact, target), exact)
    q = (hidden[:64].double() @ weight.double().t()).softmax(-1)
    overlap = torch.minimum(q, target[:64].logp.exp()).sum(-1).mean()  # type: ignore[union-attr]
    runs = {"kl online": ours(small, L.ForwardKL(), cached=False), "naive": naive(small)}
    if (theirs := liger(small, 128)) is not None:
        runs["liger kl"] = theirs

    def errors(run: Work) -> list[float]:
        found: tuple[Tensor, ...] = run()  # type: ignore[assignment]
        pairs = zip(found, truth, strict=True)
        return [round(float((a.double() - b).norm() / b.norm()), 5) for a, b in pairs]

    return {
        "overlap": round(float(overlap), 3),
        "steps": small.steps,
        "relative_error_hidden_weight": {name: errors(run) for name, run in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, help="N; 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--widths", type=int, nargs=2, help="hidden sizes of target and drafter")
    parser.add_argument("--vocab", type=int, help="V; 32,000 on a CPU, 151,936 on a GPU")
    parser.add_argument("--chunk-tokens", type=int, help="steps of a chunk; chosen by vocabulary and device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "losses.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_cpu = args.device == "cpu"
    widths = args.widths or ((256, 256) if on_cpu else (4096, 1024))
    case = Case(
        args.steps or (2048 if on_cpu else 8192),
        *widths,
        args.vocab or (32_000 if on_cpu else 151_936),
        torch.float32 if on_cpu else torch.bfloat16,
        args.device,
        args.chunk_tokens,
    )
    if args.peak_of:
        print(json.dumps(peak_bytes(case, args.peak_of)))
        return
    load = os.getloadavg()
    shape = {"steps": case.steps, "widths": list(widths), "vocab": case.vocab_size, "dtype": str(case.dtype)}
    result = {
        "command": " ".join(["python benchmarks/losses.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{device_name()} of {os.cpu_count()}, load {load[0]:.1f} at the start",
        "clock": "process time" if on_cpu else f"CUDA events on {torch.cuda.get_device_name()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "liger": liger_version(),
        "shape": shape,
        "chunk_tokens": case.chunk_tokens or L.auto_chunk_tokens(case.vocab_size, case.device),
        "rounds": args.rounds,
        "accuracy": accuracy(case),
        "times": times(case, args.rounds),
        "memory": memory(case),
    }
    kept = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    text = json.dumps(kept | {args.device: result}, indent=1)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def liger_version() -> str | None:
    """Of the installed liger-kernel, if any."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return importlib.metadata.version("liger-kernel")


if __name__ == "__main__":
    main()
