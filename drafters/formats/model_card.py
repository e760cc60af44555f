"""The model card (README.md) of an exported drafter, from `templates/card.md.jinja`."""

import re
from collections.abc import Sequence
from pathlib import Path

from certdraft.drafters.formats.export_metadata import CardFacts

_TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    directory: Path,
    *,
    name: str,
    family: str,
    format: str,
    draft_length: int,
    num_parameters: int,
    dtype: str,
    vocab_size: int,
    taps: Sequence[int] = (),
    base: str | None,
    facts: CardFacts | None,
) -> None:
    """Write README.md: metadata for the hub, what the drafter is for, how to serve it, what was measured.

    Args:
        directory: the export.
        name: title of the card.
        family: "causal", "eagle" or "block".
        format: of the files; with the family it decides who can serve them.
        draft_length: draft tokens per round the serving commands ask for.
        num_parameters: of the drafter, tied ones counted once.
        dtype: of the weights.
        vocab_size: entries of the vocabulary.
        taps: target layers it reads, 0-based.
        base: what training started from; None for fresh weights.
        facts: about target, training and metrics; None leaves these parts out.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

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
        family=family,
        format=format,
        method={"causal": "draft_model", "eagle": "eagle3", "block": "dflash"}[family],
        taps=list(taps),
        draft_length=draft_length,
        num_parameters=num_parameters,
        dtype=dtype,
        vocab_size=vocab_size,
        base=base if not base or is_hub_id(base) else Path(base).name,
        facts=facts,
        target=facts.target if facts else "TARGET",
    )
    (directory / "README.md").write_text(card.content.rstrip() + "\n", encoding="utf-8")


def is_hub_id(name: str) -> bool:
    """Whether a name is "org/name" and no folder here.

    Examples:
        >>> is_hub_id("Qwen/Qwen3-8B"), is_hub_id("embedded"), is_hub_id("runs/2025/model")
        (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()
