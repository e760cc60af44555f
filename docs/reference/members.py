"""mkdocs hook: a page's `::: members certdraft.x` becomes one entry for every public name of that package.

The packages re-export from small files, and the name to document is the one that users import.
"""

import importlib
import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return re.sub(r"^::: members (\S+)$", lambda found: "\n\n".join(entries(found[1])), markdown, flags=re.M)


def entries(package: str) -> list[str]:
    """One mkdocstrings directive for each public class and function of a package, in reading order."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    own = {n: v for n, v in found.items() if str(getattr(v, "__module__", "")).startswith(package)}
    return [
        f"::: {value.__module__}.{value.__name__}" for value in own.values() if hasattr(value, "__name__")
    ]
