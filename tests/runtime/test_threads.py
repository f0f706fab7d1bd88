"""ldm.runtime.threads: a container's share of the processors, how threads wait, and what the user has set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.runtime import threads

ROOT = Path(threads.__file__).parents[2]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread setting in the environment, and 8 processors."""
    for name in (*threads._WAITING, threads._CHOSEN, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "affinity", lambda: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)


def test_threads_wait_briefly_unless_the_user_says_how(clean, monkeypatch):
    threads.prepare()
    assert os.environ["GOMP_SPINCOUNT"] == "20000"
    assert "OMP_NUM_THREADS" not in os.environ
    for name in threads._WAITING:
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv(name, "5")
        threads.prepare()
        assert os.environ.get("GOMP_SPINCOUNT", "5") == "5"
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("quota", "expected"), [(2.0, "2"), (3.7, "3"), (0.5, "1"), (8.0, None), (12.0, None)])
def test_as_many_threads_as_the_container_has_processors(clean, monkeypatch, quota, expected):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    threads.prepare()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_the_users_number_of_threads_stays(clean, monkeypatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    threads.prepare()
    before = torch.get_num_threads()
    threads.share(2)
    assert os.environ["OMP_NUM_THREADS"] == "6"
    assert torch.get_num_threads() == before


def test_ranks_share_the_containers_threads(clean, monkeypatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 6.0)
    before = torch.get_num_threads()
    try:
        threads.prepare()
        for processes, each in ((1, 6), (2, 3), (4, 1), (9, 1), (2, 3)):  # asked again, the same
            threads.share(processes)
            assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == (str(each), each)
    finally:
        torch.set_num_threads(before)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_cgroup_v2_is_the_narrowest_on_the_way_up(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/pod/container\n")
    root = tmp_path / "cgroup"
    assert threads.cpu_quota(root, own) is None
    write(root / "pod/container/cpu.max", "max 100000\n")
    assert threads.cpu_quota(root, own) is None
    write(root / "pod/cpu.max", "150000 100000\n")
    assert threads.cpu_quota(root, own) == 1.5
    write(root / "cpu.max", "400000 100000\n")
    assert threads.cpu_quota(root, own) == 1.5
    write(tmp_path / "cpu.max", "1000 100000\n")  # outside of the hierarchy
    assert threads.cpu_quota(root, own) == 1.5


def test_quota_of_cgroup_v1(tmp_path):
    own = tmp_path / "own"
    own.write_text("5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n")
    folder = tmp_path / "cgroup" / "cpu,cpuacct"
    write(folder / "cpu.cfs_quota_us", "-1\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    assert threads.cpu_quota(tmp_path / "cgroup", own) is None
    write(folder / "cpu.cfs_quota_us", "300000\n")  # in a container the group is the hierarchy's root
    assert threads.cpu_quota(tmp_path / "cgroup", own) == 3.0
    write(tmp_path / "cgroup" / "memory" / "cpu.max", "100 100000")
    assert threads.cpu_quota(tmp_path / "cgroup", own) == 3.0


def test_no_control_groups_no_quota(tmp_path):
    assert threads.cpu_quota(tmp_path, tmp_path / "missing") is None


def test_a_program_has_it_before_torch_is_there(monkeypatch):
    program = (
        "import os, sys\nfrom ldm.cli import program\n"
        "def main():\n assert 'torch' not in sys.modules\n print(os.environ['GOMP_SPINCOUNT'])\n return 0\n"
        "program.run(main)"
    )
    for name in threads._WAITING:
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout == "20000\n"


FOLDERS = [file.parent for file in sorted((ROOT / "scripts").glob("*/__main__.py"))]
PROGRAMS = [ROOT / "main.py", *sorted((ROOT / "scripts").glob("*.py")), *FOLDERS]
WATCHED = """
import os, runpy, sys

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch meets", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watcher())
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_has_set_it_before_torch_is_imported(clean, program):
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(program)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    met = [line for line in done.stdout.splitlines() if line.startswith("torch meets")]
    assert met in ([], ["torch meets 20000"])  # a program that waits with the import has prepared by then


def test_the_library_shows_what_was_set(clean):
    """libgomp says so itself; another OpenMP library knows no such thing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "cache_latents.py"), "--help"],
        cwd=ROOT,
        env=os.environ | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    shown = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert all("'20000'" in line for line in shown)
