from .data import TraceDataModule as TraceDataModule
from .data import load_target as load_target
from .data import open_trace as open_trace
from .data import record_trace as record_trace
from .drafters import BlockDrafter as BlockDrafter
from .drafters import CausalDrafter as CausalDrafter
from .drafters import EagleDrafter as EagleDrafter
from .drafters import export as export
from .evaluation import evaluate as evaluate
from .train import DrafterModule as DrafterModule

__version__: str
