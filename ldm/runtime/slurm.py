"""Requeues the job after SLURM's warning that its time limit is near."""

import os
import subprocess
import sys


def job() -> str | None:
    """The job that this process belongs to, as scontrol names it; None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(name: str) -> bool:
    """Requeue the job, and print a note; False if SLURM refuses."""
    try:
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, timeout=30)
        problem = f"scontrol ended with {done.returncode}: {done.stderr.strip()}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        print(f"SLURM job {name} was NOT requeued ({problem}): submit it again to continue", file=sys.stderr)
        return False
    print(f"SLURM job {name} is requeued; with --resume auto it continues from its last checkpoint")
    return True
