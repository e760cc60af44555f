"""Training: LightningModules, callbacks and the command line. Floor 5: nothing imports it.

Names resolve when they are asked for, so that `certdraft --help` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certdraft.train.module import DrafterModule as DrafterModule
    from certdraft.train.optim import OptimizerSettings as OptimizerSettings
    from certdraft.train.target import TargetModule as TargetModule
    from certdraft.train.validation import ValidationSettings as ValidationSettings

_HOME = {
    "DrafterModule": "module",
    "OptimizerSettings": "optim",
    "TargetModule": "target",
    "ValidationSettings": "validation",
}
__all__ = ["DrafterModule", "OptimizerSettings", "TargetModule", "ValidationSettings"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
