"""A page in the browser that makes pictures with trained diffusion models.

    python scripts/demo.py -r logs/<run>
    python scripts/demo.py -r 'logs/*_my_diffusion' logs/<another run>      # to choose from on the page
    python scripts/demo.py -r logs/<run> --port 8000 --host 0.0.0.0         # for everybody who reaches this machine

    python scripts/demo.py -r logs/<run> --lora FOLDER                      # with an adapter
    python scripts/demo.py -r logs/<run> --host 0.0.0.0 --max-steps 100 --max-pictures 8 --max-size 512

The page has the settings of sample.py, and gives with every picture the command line that makes the same one, pixel for
pixel. It is served to this machine alone, until --host says otherwise, and loads nothing from anywhere else. A model is
loaded when it is first asked for, and the one before it is let go. Requests wait for one another; Ctrl+C ends it.
"""

import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import run_folder
from ldm.cli import program
from ldm.cli.options import Parser, add_precision, at_home, called, finite, path, port, whole_number
from ldm.errors import CheckpointError, ConfigError
from ldm.runtime import signals

if TYPE_CHECKING:  # importing it takes seconds, which a wrong flag need not wait for
    import torch

    from ldm.sampling.pipeline import Pipeline

PORT = 7860
PORTS = 100
"""So many are tried."""


def parse(argv: Sequence[str]) -> Any:
    """The command line; ConfigError for a wrong one."""
    parser = Parser(
        prog=called("demo.py", "demo"),
        description="Serve a page that makes pictures with trained diffusion models.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    place = "run folders, checkpoints, or quoted globs (the newest run of each)"
    add("-r", "--run", nargs="+", action="extend", required=True, type=at_home, metavar="RUN", help=place)
    add("--raw", action="store_true", help="the weights of the last step instead of their running average")
    moved = "run folder or checkpoint of each run's autoencoder, if it was moved, or of one with another decoder"
    add("--autoencoder", type=path, metavar="PATH", help=moved)
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add_precision(add)
    trusted = "let the checkpoints use objects of it"
    add("--trust", action="append", default=[], metavar="PACKAGE", help=trusted)
    here = "address to listen at (default: 127.0.0.1, this machine alone; 0.0.0.0: everybody who reaches it)"
    add("--lora", type=path, metavar="FOLDER", help="put this adapter, as peft saves it, on the network of each run")
    add("--lora-scale", type=finite, metavar="S", help="of the adapter's update: 0 is the base (default: 1)")
    most = "of a request, for which all others wait"
    add("--max-steps", type=whole_number, default=1000, metavar="N", help=f"{most} (default: 1000)")
    add("--max-pictures", type=whole_number, default=64, metavar="N", help=f"{most} (default: 64)")
    twice = "twice the longest side that the model was trained on"
    add("--max-size", type=whole_number, metavar="SIDE", help=f"{most}, pixels (default: {twice})")
    add("--host", default="127.0.0.1", help=here)
    add("--port", type=port, default=PORT, help=f"the next free one if it is taken; 0: any (default: {PORT})")
    return parser.parse_strictly(argv)


def demo(options: Any) -> None:
    """Serve the page until this process is asked to stop.

    Raises:
        ConfigError: there is no such run, address or device, or the package of the page is not installed.
        CheckpointError: there is no such run.
        Stopped: it was asked to stop.
    """
    runs = [found(run) for run in options.run]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("no_proxy", "NO_PROXY"):  # the server's look at itself
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), options.host, "localhost", "127.0.0.1"]))
    from ldm.cli.devices import Precision, usable
    from ldm.interop.exports.usage import optional_packages

    with optional_packages("ldm demo", "demo"):
        import gradio  # noqa: F401
    from ldm.cli.demo_line import Line
    from ldm.cli.demo_models import Models, named
    from ldm.cli.demo_page import Page, served
    from ldm.cli.demo_request import Constants, Limits

    device = usable(options.device)
    precision = Precision.of(options, device)
    load = partial(loaded, options=options, device=device, compute=precision.compute)
    flags = options.device, options.raw, tuple(options.trust), options.lora, options.lora_scale
    constants = Constants(*flags, precision.name, options.autoencoder)
    limits = Limits(options.max_steps, options.max_pictures, options.max_size)
    number = free_port(options.host, options.port)
    with places() as folder:
        page = Page(Models(named(runs), load), Line(), constants, folder, limits)
        with served(page, options.host, number) as url:
            print(f"ldm demo: {url} (Ctrl+C ends it)", flush=True)
            while True:
                signals.stop_if_asked()
                time.sleep(0.1)


def loaded(run: str, options: Any, device: str, compute: "torch.dtype") -> "Pipeline":
    """The model of a run as the flags say, with the adapter that they name."""
    from ldm.cli.sample import with_adapter
    from ldm.sampling.pipeline import Pipeline
    from ldm.sampling.precision import computing_in

    pipeline = Pipeline.load(
        run, ema=not options.raw, autoencoder=options.autoencoder, device=device, trust=options.trust
    )
    with_adapter(pipeline, options)
    return computing_in(pipeline, compute)


def found(run: str) -> str:
    """The run folder or checkpoint that is meant, not opened yet.

    Raises:
        ConfigError: no run matches.
        CheckpointError: there is no such file or folder.
    """
    path = run_folder.named(run)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; expected a checkpoint or a run folder.")
    return str(path)


def free_port(host: str, port: int) -> int:
    """That port, or the next one that is free; 0: any. Says which where it is another one.

    Raises:
        ConfigError: this machine has no such address, or none of the ports is free.
    """
    for number in range(port, min(port + PORTS, 2**16)):
        try:
            with socket.create_server((host, number), family=socket.getaddrinfo(host, None)[0][0]) as bound:
                chosen: int = bound.getsockname()[1]
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            raise ConfigError(f"--host {host}: cannot be listened at: {error.strerror}") from error
        if chosen != port and port:
            print(f"port {port} is taken; {chosen} is free", flush=True)
        return chosen
    raise ConfigError(f"--port {port}: none of the {PORTS} ports from there on is free; name another, or 0 for any.")


@contextmanager
def places() -> Iterator[Path]:
    """A new folder for the pictures of visitors.

    Those that they began with stay in it, because copied command lines name them; all others are removed in the end.
    """
    folder = Path(tempfile.mkdtemp(prefix="ldm_demo_"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "served")
    try:
        yield folder
    finally:
        for name in ("served", "made"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(OSError):  # not empty
            folder.rmdir()


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    return program.answer(lambda: demo(parse(argv)))
