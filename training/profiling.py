"""Traces of some steps by torch.profiler, on request: <run>/profile/rank-00000.json for chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from triptych.training.config import ProfileConfig

log = logging.getLogger("triptych.training.profiling")


class StepProfiler:
    """Traces steps start .. start + steps - 1 of this process; without a configuration it does nothing."""

    def __init__(self, config: ProfileConfig | None, run_dir: Path, rank: int) -> None:
        self.config = config
        self.path = run_dir / "profile" / f"rank-{rank:05d}.json"
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Called before step `step` (from 1)."""
        if self.config is None or step != self.config.start:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def end(self, step: int) -> None:
        """Called after step `step`."""
        if self.config is not None and step == self.config.start + self.config.steps - 1:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was."""
        if self._profile is None:
            return
        self._profile.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.path))
        log.info("trace written to %s", self.path)
        self._profile = None
