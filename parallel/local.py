"""Several ranks on this machine: fresh processes with a gloo group, for `verify` and for tests.

The ranks are forked from a server that has imported torch and our rooms once, so that eight of them start in
under a second. Rendezvous is a TCP store held by the caller, on the loopback interface.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

# Imported once by the server. A module that is missing is skipped there; the rank that needs it says so.
PRELOADED = (
    "__main__",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.pipelining",
    "torch._dynamo",
    "triptych.kernels",
    "triptych.models",
    "triptych.parallel.parallelize",
)
# How long the others may still report after the first failure, so that a cause is told from its consequences.
GRACE_SECONDS = 1.0


class RankError(RuntimeError):
    """The traceback of one rank; the cause of the exception that `run_local` raises."""


@dataclass
class _Call:
    """What a rank runs: `qualname` of `module` (loaded from `file` when it cannot be imported by name)."""

    module: str
    file: str | None
    qualname: str
    arguments: bytes
    world_size: int
    port: int
    timeout: float
    environment: dict[str, str]


@dataclass
class _Report:
    """What a rank sends back: the pickled result, or the exception and its traceback."""

    rank: int
    time: float
    result: bytes | None
    exception: bytes | None = None
    traceback: str = ""


def run_local(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """Run `fn(*args)` in `world_size` fresh local processes with a gloo group; return the results by rank.

    `fn` is a function at the top of a module; it finds its rank by `dist.get_rank()`. Arguments and results
    travel by pickle. When one rank raises, the others are killed and its exception is raised here, with the
    rank's traceback as cause (RankError). A rank that dies without a word (a signal) raises RankError.
    TimeoutError after `timeout` seconds. No process outlives the call.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = _Call(
        module=fn.__module__,
        file=getattr(sys.modules.get(fn.__module__), "__file__", None),
        qualname=fn.__qualname__,
        arguments=pickle.dumps(args),
        world_size=world_size,
        port=store.port,
        timeout=timeout,
        environment=dict(os.environ),
    )
    context = _server(fn.__module__)
    processes, receivers = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, pickle.dumps(call), sender), daemon=True)
            receivers.append(receiver)
            processes.append(process)
            process.start()
            sender.close()
        reports = _collect(processes, receivers, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for receiver in receivers:
            receiver.close()
    return [pickle.loads(report.result or b"") for report in reports]


def _server(module: str) -> Any:
    """The forkserver context, with the server running. Its imports, and that of the first function's
    `module`, happen once per calling process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, module])
    # The server must not own a thread pool: it is forked from.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _collect(processes: list[Any], receivers: list[Any], deadline: float, timeout: float) -> list[_Report]:
    """Wait for a report of every rank; raise for the first failure or when the time is over."""
    reports: dict[int, _Report] = {}
    silent: dict[int, int] = {}
    waiting = dict(enumerate(receivers))
    failed = False
    while waiting:
        ready = connection.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
        if not ready and not failed:
            raise TimeoutError(f"ranks {sorted(waiting)} of {len(processes)} did not finish in {timeout:g} s")
        if not ready:
            break
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                reports[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                processes[rank].join()
                silent[rank] = processes[rank].exitcode
        if not failed and (silent or any(report.result is None for report in reports.values())):
            failed = True
            deadline = time.monotonic() + GRACE_SECONDS
    for rank, code in silent.items():
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RankError(f"rank {rank} of {len(processes)} died without a report ({how})")
    failures = [report for report in reports.values() if report.result is None]
    if failures:
        _raise_from(min(failures, key=lambda report: report.time))
    return [reports[rank] for rank in range(len(processes))]


def _raise_from(report: _Report) -> None:
    cause = RankError(f"in rank {report.rank}:\n{report.traceback}")
    try:
        exception = pickle.loads(report.exception or b"")
    except Exception:  # an exception class may not survive pickling; its traceback always does
        raise cause from None
    raise exception from cause


def _rank_main(rank: int, pickled_call: bytes, sender: Any) -> None:
    """Body of one rank's process."""
    call: _Call = pickle.loads(pickled_call)
    # Whatever collective this rank waits in, it ends when the caller is gone.
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    try:
        result = pickle.dumps(_run(rank, call))
        report = _Report(rank, time.monotonic(), result)
    except BaseException as error:
        report = _Report(rank, time.monotonic(), None, _pickled(error), traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(pickle.dumps(report))
    # A rank that ended now would close connections that slower ranks still make: the caller ends all at once.
    _wait_for_parent()


def _run(rank: int, call: _Call) -> Any:
    os.environ.update(call.environment)
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    torch.set_num_threads(1)
    function: Any = _module(call)
    for name in call.qualname.split("."):
        function = getattr(function, name)
    args = pickle.loads(call.arguments)
    store = dist.TCPStore("127.0.0.1", call.port, is_master=False, timeout=timedelta(seconds=call.timeout))
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout),
    )
    return function(*args)


def _module(call: _Call) -> ModuleType:
    """The function's module, by name. Test modules are not always importable so: then the folder that the
    name starts from is found from the file, or the file alone is loaded."""
    file = call.file
    if call.module in sys.modules or file is None or _is_importable(call.module, file):
        return importlib.import_module(call.module)
    root = _import_root(call.module, file)
    if root is None:
        return _load_file(call.module, file)
    sys.path.append(root)
    return importlib.import_module(call.module)


def _is_importable(module: str, file: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return False
    return spec is not None and spec.origin == file


def _import_root(module: str, file: str) -> str | None:
    """The folder that must be on sys.path for `module` to be `file`, if there is one.

    >>> _import_root("tests.parallel.training", "/repo/tests/parallel/training.py")
    '/repo'
    """
    path = Path(file).with_suffix("")
    path = path.parent if path.name == "__init__" else path
    names = module.split(".")
    return str(path.parents[len(names) - 1]) if path.parts[-len(names) :] == tuple(names) else None


def _load_file(module: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None, f"{file} is not a Python file"
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:
        return None


def _wait_for_parent() -> None:
    """Wait until the caller is gone, then end this rank."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is started by multiprocessing"
    connection.wait([parent.sentinel])
    os._exit(1)
