"""The model card (README.md) of an exported drafter, from `templates/card.md.jinja`."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from certdraft.drafters.formats.export_metadata import ExportRequest
from certdraft.drafters.protocol import Drafter

_TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    directory: Path, drafter: Drafter, model: nn.Module, request: ExportRequest, name: str
) -> None:
    """Write README.md: metadata for the hub, what the drafter is for, how to serve it, what was measured."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    facts, base, format = request.card, drafter.pretrained, request.format
    name = (facts.name if facts else None) or name
    # Metadata names what the hub can resolve; a folder on one machine is neither a model nor a data set.
    models = [m for m in (facts.target if facts else None, base) if m and is_hub_id(m)]
    metrics = dict(facts.metrics) if facts else {}
    data = ModelCardData(
        model_name=name,
        base_model=models or None,
        library_name=format if format == "speculators" else "transformers",
        pipeline_tag="text-generation",
        license=facts.license if facts else None,
        datasets=[d for d in facts.datasets if is_hub_id(d)] or None if facts else None,
        metrics=list(metrics) or None,
        tags=["speculative-decoding", "drafter", "certdraft"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=facts.evaluated_on if facts else "",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=name,
        description=drafter.description,
        format=format,
        engines=drafter.engines(format),
        taps=list(drafter.taps),
        draft_length=request.draft_length,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        vocab_size=drafter.vocab_size,
        base=base if not base or is_hub_id(base) else Path(base).name,
        facts=facts,
        target=facts.target if facts else "TARGET",
    )
    (directory / "README.md").write_text(card.content.rstrip() + "\n", encoding="utf-8")


def is_hub_id(name: str) -> bool:
    """Whether a name is "org/name" and not a folder here.

    Examples:
        >>> is_hub_id("Qwen/Qwen3-8B"), is_hub_id("embedded"), is_hub_id("runs/2025/model")
        (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()
