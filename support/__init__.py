"""What several rooms need: whole files, progress, causal LMs and their hidden states, fp32 logits. Floor 1.

Names are imported when first used (see `__init__.pyi`), so that a reader of traces loads no transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
