"""Recording: its speed and memory, and whether the recorded texts are the target's greedy texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from planned import beside_plan, expected
from transformers import DynamicCache
from work import NUM_KEPT, Meter, Size, drafters, prompts, tapped, traced

from certdraft import load_target, open_trace
from certdraft.data import Generation, LogitHead, Prompt, record_prompts
from certdraft.decoding import TargetRunner, greedy


@torch.inference_mode()
def run_record(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Tokens/s of recording, beside bare passes of the target and transformers' `generate`."""
    model: Any = load_target(str(folder / "target"), dtype=torch.bfloat16, device=meter.device)
    head, given = LogitHead(model), prompts(size, folder)

    def record(some: list[Prompt]) -> None:
        settings = Generation(max_new_tokens=size.new_tokens, loops="keep")
        rows = record_prompts(
            model, head, some, settings,
            batch_size=size.batch, num_kept=NUM_KEPT, eos_ids=frozenset(), feature_layers=tapped(size),
        )  # fmt: skip
        for _ in rows:
            pass

    record(given[: size.batch])  # the first passes choose kernels
    meter.wait()
    begin = time.perf_counter()
    peak = meter.peak_gib(lambda: record(given))
    speed = len(given) * size.new_tokens / (time.perf_counter() - begin)

    width = max(len(prompt.ids) for prompt in given)
    ids = torch.randint(1, 300, (size.batch, width), device=meter.device)

    def bare() -> None:
        """Read the prompts, then one token each at a time, as a recording does; nothing is made of it."""
        cache = DynamicCache(config=model.config)
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        for _ in range(size.new_tokens - 1):
            model.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    options = {"do_sample": False, "max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens}
    tokens = size.batch * size.new_tokens
    passes = tokens / meter.seconds(bare, 1)
    made = tokens / meter.seconds(
        lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), 1
    )
    planned = expected(size, folder, drafters(size)["causal"], beside=False).record
    return {
        "tokens_per_s": speed, "bare_tokens_per_s": passes, "of_bare": speed / passes,
        "generate_tokens_per_s": made, "of_generate": speed / made,
    } | beside_plan(peak, planned)  # fmt: skip


def run_texts(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Compare recorded texts with live greedy decoding, both in bf16, and give the lead where they part."""
    trace = open_trace(traced(size, folder, meter))
    model = load_target(str(folder / "target"), dtype=torch.bfloat16, device=meter.device)
    runner = TargetRunner(model)
    equal, leads = 0, []
    texts = min(len(trace), 24)
    for number in range(texts):
        row = trace.row(number)
        start = int(row.loss_mask.int().argmax()) + 1
        recorded = row.input_ids.tolist()
        live = greedy(runner, recorded[:start], len(recorded) - start)
        written = recorded[start:]
        first = next((i for i, (a, b) in enumerate(zip(written, live, strict=False)) if a != b), None)
        equal += first is None
        if first is not None:
            leads.append(float(row.head.gap[start - 1 + first, 1]))
    return {"texts": texts, "equal": equal, "largest_lead_nats": max(leads, default=0.0), "leads_nats": leads}
