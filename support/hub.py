"""Whether the model hub answers: asked once with a short limit, instead of a minute of retries per file."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

HUB_TIMEOUT_S = 5.0


def hub_answers() -> bool:
    """Whether to ask the hub: HF_HUB_OFFLINE is not set, and its address answers (proxies are honoured)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    request = urllib.request.Request(hub_endpoint(), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # a refusal is an answer
    except (OSError, ValueError):
        return False
    return True


def hub_endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
