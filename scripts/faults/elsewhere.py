"""What no trial is made of, and why; it stands in the table, so that nobody takes silence for a promise."""

from scripts.faults.harness import NotTried, Place, fault


@fault(90, "GPUs and NCCL")
def gpus(place: Place) -> str:
    """A rank is killed, stopped or cut off in an NCCL collective; a GPU falls off the bus.

    Expected: as 20 to 24.
    """
    raise NotTried("no trial is written for GPUs; ranks here talk by gloo on CPUs")


@fault(91, "network file systems")
def network_file_systems(place: Place) -> str:
    """NFS or Lustre under the run folder and the cache: stale handles, locks that are no locks, late visibility.

    Expected: as 1, 36 and 39.
    """
    raise NotTried("no network file system here")


@fault(92, "SLURM itself")
def slurm(place: Place) -> str:
    """Preemption, requeue and time limit by a real SLURM.

    Expected: as 16 and 17; the job is requeued and goes on.
    """
    raise NotTried("no SLURM here; its signals are sent by hand in 16 and 17")


@fault(93, "clock of the system set back")
def system_clock(place: Place) -> str:
    """The system's own clock jumps, under a running run.

    Expected: as 27.
    """
    raise NotTried(
        "it would set back everybody's clock, and faketime is not installed; 27 changes one process' view of it"
    )
