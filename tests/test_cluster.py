"""The scripts of configs/cluster on two "machines" that are one: network namespaces, and a SLURM of a few lines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import main
from ldm.checkpoints import store
from ldm.config.load import to_yaml

pytestmark = pytest.mark.slow

ROOT = Path(main.__file__).parent
SCRIPTS = ROOT / "configs" / "cluster"
STEPS = 40

# Starts a rank on each of two nodes, passes signals on to them as SLURM's --signal does, and ends as the worst of them.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
places = [{{"SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0"}} for i in range(2)]
tasks = [subprocess.Popen(words, env=os.environ | place) for place in places]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SCONTROL_CALLS"
"""


class Machine(NamedTuple):
    """Where an agent of torchrun runs: its address, and what to put before a command and into its environment."""

    address: str
    prefix: list[str]
    environment: dict[str, str]


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two network namespaces that see each other by a cable; where none can be made, this machine twice."""
    names = [f"ldm-{os.getpid()}-{index}" for index in range(2)]
    cables = [f"ldm{os.getpid() % 100000}v{index}" for index in range(2)]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {cables[0]} type veth peer name {cables[1]}")
    for index, (name, cable) in enumerate(zip(names, cables, strict=True)):
        inside = f"ip -n {name}"
        commands += [
            f"ip link set {cable} netns {name}",
            f"{inside} addr add 10.77.0.{index + 1}/24 dev {cable}",
            *(f"{inside} link set {device} up" for device in ("lo", cable)),
        ]
    try:
        if all(subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands):
            yield [
                Machine(f"10.77.0.{index + 1}", ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": cable})
                for index, (name, cable) in enumerate(zip(names, cables, strict=True))
            ]
        else:
            yield [Machine("127.0.0.1", [], {})] * 2
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def words(autoencoder_tree, tmp_path) -> list[str]:
    """Stage 1, as the words after a script."""
    autoencoder_tree["lightning"]["trainer"] |= {"max_steps": STEPS, "val_check_interval": 20}
    node = {"target": "ldm.training.callbacks.checkpoints.Checkpoints", "params": {"every": 5}}
    autoencoder_tree["lightning"]["callbacks"] = {"images": None, "checkpoints": node}
    autoencoder_tree["model"]["params"].pop("schedule")
    (tmp_path / "run.yaml").write_text(to_yaml(autoencoder_tree))
    return [str(tmp_path / "run.yaml"), str(SCRIPTS / "ddp.yaml"), "--logdir", str(tmp_path / "logs")]


def start(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **paths, **environment},
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_of(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


def state_of(tmp_path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_of(tmp_path) / "run_state.json").read_text())
    return record


def wait_for_a_checkpoint(tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + 120
    while not list((tmp_path / "logs").glob("*/checkpoints/*.ckpt")):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


def worker_of(agent: subprocess.Popen[bytes]) -> int:
    """The rank that an agent of torchrun has started; `ip netns exec` and the script have become the agent."""
    listed = subprocess.run(["pgrep", "-P", str(agent.pid), "-f", "main.py"], capture_output=True, text=True)
    return int(listed.stdout.split()[0])


@pytest.mark.parametrize("lose_a_rank", [False, True])
def test_torchrun_on_two_machines(machines, words, tmp_path, lose_a_rank):
    outputs = [tmp_path / f"output.{index}" for index in range(2)]
    agents = []
    for machine, output in zip(machines, outputs, strict=True):
        head = f"{machines[0].address}:{29400 + os.getpid() % 200}"
        settings = {"NODES": "2", "HEAD": head, "PROCESSES": "1", "ADDRESS": machine.address, "RESTARTS": "2"}
        command = [*machine.prefix, "bash", str(SCRIPTS / "torchrun.sh"), *words]
        agents.append(start(command, settings | machine.environment, output))
    try:
        if lose_a_rank:
            wait_for_a_checkpoint(tmp_path, agents)
            os.kill(worker_of(agents[1]), signal.SIGKILL)
        codes = [agent.wait(300) for agent in agents]
    finally:
        end(agents)
    assert codes == [0, 0], "".join(output.read_text()[-3000:] for output in outputs)
    assert (state_of(tmp_path)["status"], state_of(tmp_path)["step"]) == ("finished", STEPS)
    saved = store.load(store.verify(run_of(tmp_path)).path)
    assert saved["ldm"]["images_seen"] == STEPS * 6


def test_sbatch_is_requeued_and_goes_on(words, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"
    slurm = f"JOB_ID={40000 + os.getpid()} JOB_NAME=ldm NODELIST=127.0.0.1 NTASKS=2 NNODES=2 NTASKS_PER_NODE=1"
    settings = {f"SLURM_{name}": value for name, value in (word.split("=") for word in slurm.split())}
    settings |= {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SCONTROL_CALLS": str(calls)}
    job = start(["bash", str(SCRIPTS / "slurm.sbatch"), *words], settings, tmp_path / "output")
    try:
        wait_for_a_checkpoint(tmp_path, [job])
        (srun,) = subprocess.run(["pgrep", "-P", str(job.pid), "-f", "srun"], capture_output=True).stdout.split()
        os.kill(int(srun), signal.SIGUSR1)
        assert job.wait(120) == 128 + signal.SIGUSR1, (tmp_path / "output").read_text()[-3000:]
    finally:
        end([job])
    stopped = state_of(tmp_path)
    assert (stopped["status"], stopped["exit_code"]) == ("stopped", 138)
    assert 0 < stopped["step"] < STEPS
    assert calls.read_text() == f"requeue {settings['SLURM_JOB_ID']}\n"

    again = start(["bash", str(SCRIPTS / "slurm.sbatch"), *words], settings, tmp_path / "output")
    try:
        assert again.wait(180) == 0, (tmp_path / "output").read_text()[-3000:]
    finally:
        end([again])
    assert (state_of(tmp_path)["status"], state_of(tmp_path)["step"]) == ("finished", STEPS)
    assert len(calls.read_text().splitlines()) == 1
