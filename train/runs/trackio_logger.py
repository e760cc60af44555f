"""A Lightning logger for trackio, which keeps runs in files here and shows them with `trackio show`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Log to [trackio](https://github.com/gradio-app/trackio), an optional dependency: `pip install trackio`.

    Args:
        project: trackio project that the run belongs to.
        name: of the run; the run folder's, NAME/TIME, when not given.
        space_id: Hugging Face Space "USER/NAME" that runs are sent to; they stay on this machine, in
            TRACKIO_DIR or the cache of huggingface_hub, when not given.

    Raises:
        ValueError: trackio is not installed; raised when training starts.
    """

    def __init__(
        self, project: str = "certdraft", name: str | None = None, space_id: str | None = None
    ) -> None:
        super().__init__()
        self.project, self.run_name, self.space_id = project, name, space_id
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The trackio run, begun when it is first asked for."""
        if self._run is None:
            try:
                import trackio
            except ImportError as error:
                raise ValueError(
                    "trainer.logger is TrackioLogger, but trackio cannot be imported: pip install trackio"
                ) from error
            self._run = trackio.init(
                project=self.project, name=self.run_name, space_id=self.space_id, embed=False
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml of the run has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
