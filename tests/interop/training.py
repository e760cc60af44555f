"""A minute of training, so that engines have something to accept.

Exactness is what the suite is about, not quality, but a drafter whose every draft is refused would hide most
mistakes. Text is the standard library's, answers and features are the embedded target's own.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PreTrainedModel

from certdraft.data import load_tokenizer, standard_library
from certdraft.decoding import TargetRunner
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CausalDrafter,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
)

ROWS, LENGTH = 4, 128
MASK = 3  # "<think>", which the standard library never says
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def fresh(family: str, target: torch.nn.Module, counts: torch.Tensor) -> Drafter:
    """An untrained drafter; the block has two layers, so that each has norms of its own."""
    vocab_size = target.config.vocab_size
    torch.manual_seed(0)
    if family == "causal":
        return CausalDrafter(config=SIZES, init_from_target=True).build(vocab_size, target)
    num = target.config.num_hidden_layers
    taps = (num // 8, num // 2 - 1, num - 2 - num // 8)  # 1, 3 and 5 of 8
    if family == "eagle":
        config = EagleConfig(draft_vocab_size=1500, target_layer_ids=taps)
        return EagleDrafter(config, unroll=3).build(vocab_size, target, counts)
    sizes = {"num_hidden_layers": 2, "mask_token_id": MASK, "target_layer_ids": taps}
    if family.startswith("dspark"):
        config = DSparkConfig(**sizes, block_size=5, markov_rank=32, sample_from_anchor=family == "dspark")
        return DSparkDrafter(config, num_anchors=24).build(vocab_size, target)
    return BlockDrafter(BlockConfig(**sizes, block_size=6), num_anchors=24).build(vocab_size, target)


def train(family: str, steps: int, target: PreTrainedModel) -> Drafter:
    """A drafter after so many steps."""
    tokenizer = load_tokenizer()
    text = [d.text for d in standard_library("train")]
    ids = torch.tensor(tokenizer.encode("".join(t for t in text if len(t) < 40_000)[:1_500_000]))
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    counts = torch.bincount(ids.flatten(), minlength=target.config.vocab_size)
    drafter = fresh(family, target, counts).train()
    runner = TargetRunner(target, drafter.taps)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    positions, documents = (
        torch.arange(LENGTH).expand(ROWS, -1),
        torch.arange(ROWS)[:, None].expand(-1, LENGTH),
    )
    for step in range(steps):
        rows = ids[order[torch.arange(step * ROWS, step * ROWS + ROWS) % len(ids)]]
        with torch.no_grad():
            said = target(rows, output_hidden_states=True, use_cache=False)
        features = (
            torch.stack([said.hidden_states[tap + 1] for tap in runner.taps], 2) if runner.taps else None
        )
        counted = torch.ones_like(rows, dtype=torch.bool)
        counted[:, -1] = False
        paths = drafter.paths(rows, positions, documents, counted, features)
        answers = said.logits.argmax(-1).flatten()[paths.steps[paths.mask]]
        hidden = paths.hidden[paths.mask]
        logits = drafter.head(hidden).clamp(min=-50)
        loss = cross_entropy(logits, answers)
        if drafter.confidence_weight:
            right = logits.argmax(-1) == answers
            loss = loss + binary_cross_entropy_with_logits(drafter.confidence(hidden), right.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"{family} step {step}: {loss.item():.3f} nats", flush=True)
    return drafter.eval()
