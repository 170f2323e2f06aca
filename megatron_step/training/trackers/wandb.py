"""Weights & Biases."""

import os
import re
import secrets
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from megatron_step.engine.files import atomic_write
from megatron_step.engine.messages import warn
from megatron_step.training.trackers.scalars import is_plotted, scalars
from megatron_step.training.trackers.tracker import Metrics, TrackedRun

_START_SECONDS = 15.0  # a run waits so long for the service before it logs offline


class WeightsAndBiases:
    """Logs the shown and evaluated steps to the project `logging.wandb`, and keeps its files in OUTPUT_DIR/wandb.

    If the service does not answer within 15 s, the run is logged offline, for `wandb sync`.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # optional; `run` has checked that it is installed

        folder = Path(run.config.output_dir).absolute()

        def start(mode: Literal["offline"] | None) -> Any:
            return wandb.init(
                project=run.config.logging.wandb,
                config=asdict(run.config),
                dir=folder,
                name=f"{folder.parent.name}/{folder.name}"[-128:],
                # The agent of a sweep sets the id.
                id=os.environ.get("WANDB_RUN_ID") or run_id(folder),
                resume="allow",  # a resumed run continues in the same plots
                mode=mode,
                settings=wandb.Settings(init_timeout=_START_SECONDS, login_timeout=_START_SECONDS),
            )

        try:
            self._run = start(None)
        except wandb.errors.CommError as error:
            reason = str(error).splitlines()[0] if str(error) else "no answer"
            warn(
                f"Weights & Biases cannot be reached ({reason}): the run is logged offline. "
                f"`wandb sync {folder / 'wandb'}/offline-run-*` sends it later"
            )
            self._run = start("offline")

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Log the numbers of a step."""
        if is_plotted(metrics, shown):
            self._run.log(scalars(metrics), step=metrics["step"])

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def run_id(folder: Path) -> str:
    """Return the id of the run in `folder`: the same in every process, and unlike that of any other run.

    The id consists of letters, digits, `-` and `_`. It depends on the absolute path, so a copied folder is another run.
    It also depends on a random text kept in the folder, so the same path on another machine is another run, too.
    """
    kept = folder / "wandb" / "run_salt"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, secrets.token_hex(8))
    text = f"{kept.read_text(encoding='utf-8')} {folder.resolve()}"
    name = re.sub(r"[^A-Za-z0-9_]+", "-", folder.name).strip("-")[:40]
    return f"{name or 'run'}-{sha256(os.fsencode(text)).hexdigest()[:12]}"
