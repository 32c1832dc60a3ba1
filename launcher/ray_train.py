"""A run under Ray Train: its cluster, its workers, and what is told of them.

Ray owns the worker group: ranks, rendezvous, restarts. Ours are the check before anything is taken, the
placement of tensor-parallel groups, the end of a run that no restart would mend, and a machine left clean.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from triptych.launcher.config import RunConfig, validate
from triptych.launcher.errors import RunFailed
from triptych.launcher.progress import Display, Tail
from triptych.launcher.ray_cluster import check_free, cluster, local_options
from triptych.launcher.ray_settings import address
from triptych.launcher.rundir import RunDir

POLL_SECONDS = 0.2
GRACE_SECONDS = 2.0
"""After one rank failed for good, the time in which the others may still say why they did."""


def train(config: RunConfig, directory: RunDir, display: Display) -> None:
    """Run `config` on a cluster's workers until it is done, showing rank 0's events.

    Raises ValueError when the cluster has too little for it, RunFailed when the run failed, and lets
    KeyboardInterrupt and Terminated through; whatever happens, a Ray started here is stopped.
    """
    tail = Tail(directory.progress_file)
    with cluster(address(config), _local_options(config), logs=directory.path / "logs"):
        trainer = _trainer(config, directory)
        fit = _Fit(trainer)
        fit.start()
        while fit.is_alive() and directory.failure() is None:
            _show(tail, display)
            fit.join(POLL_SECONDS)
        if directory.failure() is not None:
            fit.join(GRACE_SECONDS)
        _show(tail, display)
        _raise_failure(fit, directory)


def _show(tail: Tail, display: Display) -> None:
    for event in tail.read():
        display.show(event)


class _Fit(threading.Thread):
    """TorchTrainer.fit off the main thread, so that signals reach us rather than Ray's handler."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


def _raise_failure(fit: _Fit, directory: RunDir) -> None:
    failure = directory.failure()
    if failure is not None:
        raise RunFailed.of(failure, f"rank {failure['rank']}: ")
    if fit.error is not None:
        raise RunFailed(
            f"the workers failed and were not restarted any more: {first_line(fit.error)} "
            f"(logs: {directory.path / 'logs'})",
            details=str(fit.error),
        ) from fit.error


def first_line(error: BaseException) -> str:
    """The line of a Ray error that says what happened: its own first line is a heading, tracebacks follow."""
    causes = getattr(error, "worker_failures", None)
    if causes:
        rank, cause = sorted(causes.items())[0]
        return f"rank {rank}: {first_line(cause)}"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died (killed, crashed, or out of memory)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A forwarded user exception ends with "Type: message".
    return lines[-1] if lines else type(error).__name__


class _FailureEvents(ray.train.UserCallback):
    """Runs in Ray's controller: writes each failure of the worker group to the run's events."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        ranks = "; ".join(
            f"rank {rank}: {first_line(error)}" for rank, error in sorted(worker_exceptions.items())
        )
        RunDir(self._run_dir).event("workers_failed", text=ranks)


class _Trainer(TorchTrainer):
    """For a Ray of our own: without the actors that nothing here needs, since each costs a process start.

    One guards placement groups, which do not outlive such a Ray (and floods its log when there is no
    dashboard to ask); the other deals out Ray Data sets, of which there are none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        spared = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
        every = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in every if type(callback).__name__ not in spared]


def _trainer(config: RunConfig, directory: RunDir) -> TorchTrainer:
    wanted = config.cluster
    needs = worker_needs(config, uses_gpu(config, ray.cluster_resources()))
    capacities = node_capacities(needs, [node for node in ray.nodes() if node["Alive"]])
    nodes = place(capacities, config.parallel.world_size, config.parallel.tp, needs)
    check_free(needs, config.parallel.world_size, ray.available_resources())
    train_api: Any = ray.train  # its annotations are those of Ray Train v1; v2 is what runs
    selector = [{"ray.io/node-id": node} for node in nodes] if len(capacities) > 1 else None
    return (_Trainer if address(config) is None else TorchTrainer)(
        _ray_worker,
        train_loop_config={"config": config.to_dict(), "run_dir": str(directory.path), "cwd": os.getcwd()},
        torch_config=TorchConfig(timeout_s=int(wanted.collective_timeout)),
        scaling_config=train_api.ScalingConfig(
            num_workers=config.parallel.world_size,
            use_gpu="GPU" in needs,
            resources_per_worker=dict(needs),
            label_selector=selector,
        ),
        run_config=train_api.RunConfig(
            name="ray",
            storage_path=str(directory.path),
            failure_config=ray.train.FailureConfig(max_failures=wanted.max_failures),
            worker_runtime_env={"env_vars": wanted.env_vars} if wanted.env_vars else None,
            callbacks=[_FailureEvents(str(directory.path))],
        ),
    )


def _ray_worker(arguments: Mapping[str, Any]) -> None:
    """What each of Ray's workers runs; an error raised here restarts the group."""
    from triptych.launcher.worker import redirect_output, run_worker  # torch stays out of Ray's controller

    directory = RunDir(arguments["run_dir"])
    redirect_output(directory, ray.train.get_context().get_world_rank())
    if os.path.isdir(arguments["cwd"]):
        os.chdir(arguments["cwd"])
    run_worker(
        validate(arguments["config"], source=str(directory.config_file)),
        directory,
        device=ray.train.torch.get_device(),
        node=ray.get_runtime_context().get_node_id(),
    )


def _local_options(config: RunConfig) -> dict[str, Any]:
    """What a Ray of our own is started with."""
    wanted = config.cluster
    return local_options(
        config.parallel.world_size, wanted.cpus_per_worker, wanted.resources_per_worker, wanted.use_gpu
    )


# --- The check before anything is taken ------------------------------------------------------------------


def uses_gpu(config: RunConfig, resources: Mapping[str, float]) -> bool:
    """Whether workers take a GPU each; unset, they do when the cluster has any."""
    return resources.get("GPU", 0) > 0 if config.cluster.use_gpu is None else config.cluster.use_gpu


def worker_needs(config: RunConfig, gpu: bool) -> dict[str, float]:
    """Ray resources that one worker reserves."""
    needs = {"CPU": config.cluster.cpus_per_worker, **config.cluster.resources_per_worker}
    return {**needs, "GPU": 1.0} if gpu else needs


def node_capacities(needs: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many workers each node (an entry of ray.nodes()) can hold when it is free."""
    return {
        node["NodeID"]: int(
            min(node["Resources"].get(name, 0) / amount for name, amount in needs.items() if amount)
        )
        for node in nodes
    }


def place(capacities: Mapping[str, int], workers: int, tp: int, needs: Mapping[str, float]) -> list[str]:
    """The node of each worker, such that each group of tp neighbours shares one; fullest nodes first.

    Raises ValueError naming what is needed and what there is.
    """
    each = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    total = sum(capacities.values())
    if workers > total:
        raise ValueError(
            f"the layout has {workers} workers of {each} each, but the cluster has room for {total}; "
            f"lower the degrees under parallel: or cluster.cpus_per_worker, enlarge the cluster"
            + (", or set cluster.use_gpu=false" if "GPU" in needs else "")
        )
    chosen: list[str] = []
    for node, capacity in sorted(capacities.items(), key=lambda item: (-item[1], item[0])):
        chosen += [node] * min(capacity // tp * tp, workers - len(chosen))
    if len(chosen) < workers:
        rooms = ", ".join(str(count) for count in sorted(capacities.values(), reverse=True))
        raise ValueError(
            f"parallel.tp={tp}: each group of {tp} workers must share a node, but the nodes have room "
            f"for {rooms} workers; lower parallel.tp"
        )
    return chosen
