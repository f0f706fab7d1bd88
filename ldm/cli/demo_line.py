"""Requests in a line: one at a time is worked on, in the order in which they came, and any of them can be stopped."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from torch import Tensor

from ldm.diffusion.objectives import Objective
from ldm.randomness import Draws
from ldm.sampling.guidance import Denoiser
from ldm.sampling.samplers import Sampler

Result = TypeVar("Result")


class Halted(Exception):
    """The request was stopped by whoever made it."""


class Ticket(Generic[Result]):
    """One request: how far it is. The worker writes `doing`, `step` and `steps`; whoever asked may read them any time.

    Attributes:
        future: its result or its error. A request that was stopped while it waited is cancelled.
        doing: what is being done, in a few words.
        step, steps: of the sampler, from 1 on; 0: it has not begun.
    """

    def __init__(self) -> None:
        self.future: Future[Result] = Future()
        self.doing = ""
        self.step = self.steps = 0
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        """At once if it is waiting; if it is sampling, before the next call of the network."""
        self._stopped.set()
        self.future.cancel()

    def say(self, doing: str) -> None:
        """What is being done now."""
        self.doing = doing

    def go_on(self) -> None:
        """Raises Halted if the request was stopped."""
        if self.stopped:
            raise Halted


class Line:
    """The requests to one worker thread, which alone touches the models."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._tickets: list[Ticket] = []
        self._lock = threading.Lock()

    def ask(self, work: Callable[[Ticket[Result]], Result]) -> Ticket[Result]:
        """Put `work` at the end of the line."""
        ticket: Ticket[Result] = Ticket()
        with self._lock:
            self._tickets.append(ticket)
            self._worker.submit(_do, ticket, work)
        ticket.future.add_done_callback(lambda _: self._leave(ticket))
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """How many requests are done before this one begins; 0: it is being worked on, or done."""
        with self._lock:
            return self._tickets.index(ticket) if ticket in self._tickets else 0

    def close(self) -> None:
        """Stop every request, and wait for the one that is being worked on: for one call of the network at most."""
        with self._lock:
            tickets = [*self._tickets]
        for ticket in tickets:
            ticket.stop()
        self._worker.shutdown()

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.remove(ticket)


def _do(ticket: Ticket[Result], work: Callable[[Ticket[Result]], Result]) -> None:
    if not ticket.future.set_running_or_notify_cancel():
        return
    try:
        result = work(ticket)
    except BaseException as error:
        ticket.future.set_exception(error)
    else:
        ticket.future.set_result(result)


def watched(sampler: Sampler, ticket: Ticket) -> Sampler:
    """The same sampler, which tells `ticket` of each call of the network, and is halted before one by `ticket.stop`.

    A call belongs to the step at whose beginning it is; that of heun at a step's end belongs to the next one.
    """

    def sample(denoise: Denoiser, objective: Objective, x: Tensor, times: Tensor, *, draws: Draws) -> Tensor:
        ticket.step, ticket.steps = 0, len(times) - 1

        def reporting(x: Tensor, t: Tensor) -> Tensor:
            ticket.go_on()
            begun = int((times[:-1] >= t).sum())  # on the host, so this does not wait for the device
            ticket.step = max(1, ticket.step, begun)
            return denoise(x, t)

        return sampler(reporting, objective, x, times, draws=draws)

    return sample
