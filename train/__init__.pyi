from .drafter_module import DrafterModule as DrafterModule
from .drafter_setup import fit_to_target as fit_to_target
from .optim import OptimizerSettings as OptimizerSettings
from .target_module import TargetModule as TargetModule
from .target_outputs import Online as Online
from .target_outputs import TargetSettings as TargetSettings
from .validation import ValidationSettings as ValidationSettings
