"""Several ranks without several programs: forked children, whose results come back to the test."""

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

PATIENCE = 200.0  # seconds, on a busy machine
Work = Callable[[int], Any]
Forked = Callable[[int, Work], list[Any]]


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """forked(world, work) -> [work(rank) of each rank], run under torchrun's variables; alone without any."""

    def run(world: int, work: Work) -> list[Any]:
        launcher = torchrun(world)

        def start(rank: int) -> Any:
            os.environ.update(launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if launcher else {})
            return work(rank)

        return _results(tmp_path_factory.mktemp("ranks"), world, start)

    return run


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """The same in a process group of gloo, ready for use."""

    def run(world: int, work: Work) -> list[Any]:
        folder = tmp_path_factory.mktemp("group")

        def start(rank: int) -> Any:
            store, timeout = f"file://{folder}/store", timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
            return work(rank)

        return _results(folder, world, start)

    return run


def torchrun(world: int) -> Mapping[str, str]:
    """What torchrun would put into the environment of every rank."""
    if world == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    return sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _results(folder: Path, world: int, work: Work) -> list[Any]:
    files = [folder / f"result.{rank}" for rank in range(world)]
    children: dict[int, int] = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _work_and_exit(work, rank, files[rank])
        children[child] = rank
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    try:
        while len(codes) < world and time.monotonic() < end:
            for child in set(children) - set(codes):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child]:
                        end = min(end, time.monotonic() + 10)  # the others may wait for it
            time.sleep(0.02)
    finally:
        for child in set(children) - set(codes):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert {children[child]: codes.get(child, "hung") for child in children} == dict.fromkeys(range(world), 0)
    return [pickle.loads(file.read_bytes()) for file in files]


def _work_and_exit(work: Work, rank: int, file: Path) -> None:
    code = 1
    try:
        file.write_bytes(pickle.dumps(work(rank)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
