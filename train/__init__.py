"""Training: LightningModules, run folders and the command line. The top floor: nothing imports it.

Names are imported when first used (see `__init__.pyi`), so that the package itself loads at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
