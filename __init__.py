"""certdraft: train drafters for speculative decoding against acceptance certificates.

Names are imported when first used (see `__init__.pyi`): importing this package imports no torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
