"""Ranks: from the launcher's environment, alone, and in a real group of two."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ldm.errors import CheckpointError
from ldm.runtime import distributed

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES")


@pytest.fixture
def launched(monkeypatch):
    """Set the launcher's environment to exactly what is given."""

    def launch(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({}, 0, 1),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, 3, 4),  # torchrun, two nodes
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, 2),  # Lightning's launcher
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "LOCAL_RANK": "1"}, 5, 8),  # srun
        ({"SLURM_NTASKS": "8"}, 0, 1),  # within an allocation, but not started by srun
        ({"RANK": "3"}, 0, 1),  # a left-over
    ],
)
def test_before_the_group_exists(launched, environment, rank, world):
    launched(**environment)
    assert (distributed.rank(), distributed.world_size()) == (rank, world)
    assert distributed.is_main() == (rank == 0)


@pytest.mark.parametrize(
    ("environment", "sizes"),
    [
        ({}, None),
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}, (3, 2)),  # torchrun
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),  # Lightning's launcher, which asks the configuration
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, (2, 4)),  # srun
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, None),  # within an allocation, but not started by srun
    ],
)
def test_machines_and_processes_on_each(launched, environment, sizes):
    launched(**environment)
    assert distributed.launched() == sizes


def test_alone_everything_is_a_no_op(launched):
    launched()
    assert distributed.max_over_ranks(5) == 5
    assert distributed.mean_over_ranks(torch.arange(3)).tolist() == [0, 1, 2]
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.from_main(lambda: 3) == 3


def _member(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    seen = distributed.rank(), distributed.world_size(), distributed.is_main()
    highest = distributed.max_over_ranks((rank + 1) * 2**40)
    gathered = distributed.gather(f"from {rank}")
    results.put((rank, seen, highest, gathered))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


@pytest.mark.timeout(60)
def test_two_ranks(tmp_path, launched):
    # The group's own numbers count, whatever the environment says.
    launched(WORLD_SIZE="7", RANK="6")
    results = mp.get_context("fork").Queue()
    mp.start_processes(_member, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")
    everything = ["from 0", "from 1"]
    assert sorted(results.get(timeout=10) for _ in range(2)) == [
        (0, (0, 2, True), 2 * 2**40, everything),
        (1, (1, 2, False), 2 * 2**40, everything),
    ]


def test_the_main_rank_works_for_all(grouped):
    def work(rank: int) -> list[object]:
        distributed.max_over_ranks(0)  # all are there
        distributed.set_timeout(1.0)

        def fails() -> None:
            raise CheckpointError(f"from {rank}")

        def slow() -> int:
            time.sleep(2.0)  # longer than a rank waits otherwise
            return rank

        with pytest.raises(CheckpointError) as caught:
            distributed.from_main(fails)
        return [distributed.from_main(slow), str(caught.value), distributed.timeout()]

    assert grouped(2, work) == [[0, "from 0", 1.0]] * 2


def test_one_process_of_each_machine_answers_for_all(grouped, monkeypatch):
    """Two machines of two ranks."""

    def work(rank: int) -> list[tuple[bool, list[int]]]:
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        answers = []
        for truth in ({0: False, 2: False}, {0: False, 2: True}):
            asked: list[int] = []
            answer = distributed.on_any_machine(lambda truth=truth, asked=asked: asked.append(rank) or truth[rank])
            answers.append((answer, asked))
        return answers

    asked = [[0], [], [2], []]
    assert grouped(4, work) == [[(False, own), (True, own)] for own in asked]
    assert distributed.on_any_machine(lambda: True)  # alone
