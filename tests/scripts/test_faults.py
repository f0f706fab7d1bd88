"""The fault catalogue's own machinery: it counts, it ends what it starts, and it notices a promise that is not kept."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import store
from scripts.faults import __main__ as faults
from scripts.faults import harness, interpreter, processes, runs
from scripts.faults.attempts import Attempt, run_all
from scripts.faults.harness import (
    CATALOGUE,
    Fault,
    Figures,
    NotTried,
    Place,
    attempt,
    chosen,
    table,
)
from scripts.faults.processes import Wrong, demand, fork, wait_until

ROOT = Path(__file__).parents[2]
QUICK = Figures(quick=True)

for part in faults.PARTS:
    __import__(f"scripts.faults.{part}")


@pytest.fixture(autouse=True)
def without_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def a_fault(body: harness.Body, limit: float = 60.0) -> Fault:
    return Fault(7, "a fault", "something happens", "nothing breaks", body, limit)


def two_of_three(place: Place) -> str:
    for number in range(3):
        with place.trial(f"trial {number}"):
            demand(number != 1, "it | broke")
    return "seen"


def test_the_catalogue_is_whole():
    assert set(range(1, 41)) <= set(CATALOGUE)
    for fault in CATALOGUE.values():
        assert fault.injected.endswith("."), fault.number
        assert fault.expected.endswith("."), fault.number
    assert len(chosen([])) == len(CATALOGUE)
    assert [fault.number for fault in chosen(["8", "rank stopped", "1"])] == [1, 8, 21]
    with pytest.raises(KeyError, match="no fault has"):
        chosen(["nonsense"])


def test_a_fault_says_what_is_expected():
    with pytest.raises(ValueError, match="Expected"):
        harness.fault(1000, "x")(lambda place: "")
    with pytest.raises(ValueError, match="twice"):
        harness.fault(1, "x")(CATALOGUE[1].body)


def test_trials_are_counted_and_decide(tmp_path):
    result = attempt(a_fault(two_of_three), tmp_path / "a", tmp_path, QUICK)
    assert (result.verdict, result.passed, result.tried) == ("fail", 2, 3)
    assert result.failures == ("trial 1: it | broke",)
    assert result.observed == "2 of 3: seen"
    (line,) = [line for line in table([result]).splitlines() if line.startswith("| 7")]
    assert line.endswith(r"2 of 3: seen First failure: trial 1: it \| broke | fail |")

    def nothing(place: Place) -> str:
        return "seen"

    def crash(place: Place) -> str:
        raise RuntimeError("a bug of the catalogue")

    def elsewhere(place: Place) -> str:
        with place.trial("one"):
            raise NotTried("no such machine")

    verdicts = [attempt(a_fault(body), tmp_path / "b", tmp_path, QUICK).verdict for body in (nothing, crash, elsewhere)]
    assert verdicts == ["fail", "fail", "not tried"]


def test_repeats_are_a_sample_or_end_with_their_time(tmp_path):
    def repeats(figures: Figures) -> list[int]:
        return list(Place(CATALOGUE[1], tmp_path, tmp_path, figures).repeats(5, quick=2))

    assert repeats(Figures()) == [0, 1, 2, 3, 4]
    assert repeats(QUICK) == [0, 1]
    assert repeats(Figures(minutes=0.0)) == [0]

    def repeated(place: Place) -> str:
        for number in place.repeats(5, quick=2):
            with place.trial(f"trial {number}"):
                pass
        return "seen"

    result = attempt(a_fault(repeated), tmp_path, tmp_path, Figures(minutes=0.0))
    assert (result.verdict, result.tried) == ("pass", 1)
    assert "stopped after 0 minutes" in result.observed


def sleeps(place: Place) -> str:
    """With a grandchild whose parent is dead, in a session of its own."""
    code = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(600)"
    with place.trial("sleeps"):
        subprocess.Popen([sys.executable, "-c", code])
        (place.folder / "begun").touch()
        time.sleep(600)
    return ""


def mine() -> list[int]:
    return processes.descendants(os.getpid())


def test_what_a_fault_starts_ends_with_it(tmp_path):
    processes.adopt_orphans()
    before = set(mine())
    under_way = Attempt(a_fault(sleeps, limit=2.0), tmp_path / "1", tmp_path, QUICK)
    assert wait_until(lambda: len(set(mine()) - before) == 2, 30)
    while (result := under_way.result()) is None:
        time.sleep(0.05)
    assert (result.verdict, "not done after 2 s" in result.observed) == ("fail", True)
    assert set(mine()) <= before


def test_faults_run_beside_each_other_and_all_end_when_the_catalogue_is_stopped(tmp_path):
    processes.adopt_orphans()
    quick = [Fault(n, f"fault {n}", "", "", two_of_three, 60.0) for n in range(3)]
    results = list(run_all(quick, tmp_path, QUICK, 2, lambda under_way: None))
    assert sorted(result.number for result in results) == [0, 1, 2]
    before = set(mine())

    def interrupted(under_way) -> None:
        if len(set(mine()) - before) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_all([a_fault(sleeps)], tmp_path, QUICK, 1, interrupted))
    assert set(mine()) <= before


def test_a_started_rank_has_what_a_new_interpreter_would_have(tmp_path):
    """Also where a handler of its parent writes to a file that is closed."""
    stream = io.TextIOWrapper(io.BytesIO())
    logger, handler = logging.getLogger("closed"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    stream.close()
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, __main__\n"
        "open(sys.argv[1], 'w').write(f'{os.environ[\"RANK\"]} {os.getsid(0) == os.getpid()} {__name__} "
        "{signal.getsignal(signal.SIGTERM)}')\n"
        "sys.exit(3)\n"
    )

    def launcher() -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        command = [sys.executable, "-u", str(script), str(tmp_path / "told")]
        rank = interpreter.Started(command, env={"RANK": "5"}, start_new_session=True)
        raise SystemExit(rank.wait(60))

    try:
        child = fork(launcher, tmp_path / "log")
    finally:
        logger.removeHandler(handler)
    assert child.wait(60) == 3, child.output()
    assert (tmp_path / "told").read_text() == f"5 True __main__ {signal.SIG_DFL}"


def test_a_fork_that_is_killed_at_once_has_an_empty_log(tmp_path):
    child = fork(lambda: time.sleep(60), tmp_path / "log")
    child.send(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert child.output() == ""


def test_states_are_compared_bit_for_bit():
    ours = {"a": [torch.zeros(2), (1, 2.0)], "b": {"c": torch.ones(1)}}
    same = {"a": [torch.zeros(2), (1, 2.0)], "b": {"c": torch.ones(1)}}
    assert runs.difference(ours, same) is None
    same["a"][0][1] = 1e-30
    assert runs.difference(ours, same) == ".a.0"
    assert runs.difference({"x": torch.ones(1)}, {"x": torch.ones(1).double()}) == ".x"
    assert runs.difference([1], [1, 2]) == ": length"
    assert runs.difference({"x": 1}, {"x": 1.0}) == ".x"
    with pytest.raises(Wrong, match=r"differs at \.b\.c"):
        runs.demand_same(ours, {"a": ours["a"], "b": {"c": torch.zeros(1)}})


# ---- a promise that is not kept is noticed ------------------------------------------------------------------------


def tried(number: int, place: Path, lab: Path = Path()) -> harness.Result:
    return attempt(CATALOGUE[number], place, lab, QUICK)


def test_kills_are_survived_by_our_saves_and_not_by_plain_ones(tmp_path, monkeypatch):
    assert tried(1, tmp_path / "ours").verdict == "pass"

    def plain(path: Path, state: dict) -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.write(b" " * 1000)

    monkeypatch.setattr(store, "save", plain)
    monkeypatch.setattr(store, "load", torch.load)
    result = tried(1, tmp_path / "plain")
    assert result.verdict == "fail"
    assert result.passed < result.tried


def test_a_disk_that_loses_power_is_noticed_to_lose_what_was_not_synced(tmp_path, monkeypatch):
    ours = tried(3, tmp_path / "ours")
    if ours.verdict == "not tried":
        pytest.skip(ours.observed)
    assert ours.verdict == "pass", ours.failures
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert tried(3, tmp_path / "unsynced").verdict == "fail"


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """What all faults start from."""
    folder = tmp_path_factory.mktemp("lab")
    runs.prepare(folder, folder / "modules")
    return folder


BROKEN = {
    9: ("ldm.checkpoints.sealed_file.fault", lambda path: None),
    17: ("ldm.runtime.signals.listen", lambda: False),
    26: ("ldm.training.callbacks.skip_nonfinite.SkipNonFinite.on_before_optimizer_step", lambda *_: None),
    33: ("ldm.latents.reader.check_bytes", lambda *_: None),
    34: ("ldm.latents.manifest.CacheSpec.require", lambda *_: None),
    39: ("fcntl.lockf", lambda *_: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", BROKEN)
def test_a_fault_fails_where_its_guard_is_taken_away(number, lab, tmp_path, monkeypatch):
    monkeypatch.setattr(*BROKEN[number])
    result = tried(number, tmp_path / "place", lab)
    assert result.verdict == "fail"
    assert result.failures


# ---- the program --------------------------------------------------------------------------------------------------


def test_it_lists_and_names_what_there_is_not(capsys):
    assert faults.main(["--list"]) == 0
    assert "  8 flipped bit in a checkpoint" in capsys.readouterr().out
    assert faults.main(["--only", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def program(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "faults"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=580)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["1 2 7 8 9 10 14", "15 16 17 20 23", "26 28 33 34 36 38 39"])
def test_a_sample_of_the_catalogue_holds(only, tmp_path):
    ended = program("--quick", "--jobs", "2", "--json", str(tmp_path / "results.json"), "--only", *only.split())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [str(result["number"]) for result in results] == only.split()
    assert all(result["tried"] > 0 for result in results if result["verdict"] == "pass")
    assert ended.stdout.startswith("| # | fault | injected | expected | observed | result |")


@pytest.mark.parametrize(
    "words", [["--jobs", "0"], ["--jobs", "-2"], ["--jobs", "1.5"], *(["--minutes", n] for n in ("0", "-1", "nan"))]
)
def test_numbers_out_of_range_are_refused_by_flag(words, capsys):
    with pytest.raises(SystemExit) as end:
        faults.main([*words, "--list"])
    assert end.value.code == 2
    assert f"argument {words[0]}: expected" in capsys.readouterr().err


def test_home_in_file_names(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = faults.parse(["--json=~/a.json", "--table", "~/b.json"])
    assert (options.json, options.table) == (Path("/home/me/a.json"), [Path("/home/me/b.json")])
