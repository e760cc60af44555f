"""What speculators' folders say beside the drafter: how to propose, and for which target.

vLLM serves such a folder by its path alone, so it refuses one without these keys.
"""

from certdraft.drafters.formats.format_files import Json

VERSION = "0.9.0"  # of the library whose layout this is


def speculators_section(algorithm: str, num_tokens: int, target: str, architecture: str) -> Json:
    """`speculators_config` and what goes with it.

    Args:
        algorithm: "eagle3" or "dflash".
        num_tokens: draft tokens per round.
        target: hub id or folder of the target.
        architecture: its class, such as "Qwen3ForCausalLM".
    """
    return {
        "speculators_model_type": algorithm,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": num_tokens,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": target, "architectures": [architecture]},
        },
    }


def num_tokens_of(config: Json) -> int | None:
    """Draft tokens per round that a folder of speculators asks for."""
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    found: int | None = methods[0].get("speculative_tokens")
    return found
