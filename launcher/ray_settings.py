"""Ray's environment, set before Ray is imported; the processes that Ray starts inherit it."""

from __future__ import annotations

import os

from triptych.launcher.config import RunConfig

# Relative paths of the configuration mean the driver's directory, in the workers too.
ALWAYS = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}
OWN_RAY = {
    # A dead worker is seen after half a second instead of two.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nobody scrapes or preempts a Ray that lives as long as this run; each costs an actor's start.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it Ray warns about hiding GPUs from actors that ask for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def address(config: RunConfig) -> str | None:
    """The cluster to join, or None for a Ray of our own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def apply(join: str | None) -> None:
    """Set what the user has not set. join: the cluster to join, None for a Ray of our own."""
    for key, value in (ALWAYS if join else {**ALWAYS, **OWN_RAY}).items():
        os.environ.setdefault(key, value)
