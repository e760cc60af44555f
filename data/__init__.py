"""From a corpus to batches: prompts, the trace of a target, packing and loading; and the embedded target.

Names are imported when first used (see `__init__.pyi`), so that the package itself loads at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
