"""Messages to a visitor of the page: how far a request is, how it has ended, what was wrong."""

import html
import traceback

import gradio as gr

from ldm.cli.demo_line import Ticket
from ldm.errors import LdmError
from ldm.runtime.memory import exhausted


def progress(ticket: Ticket, ahead: int) -> str:
    """How far a request is, as HTML."""
    if ahead:
        return f"<p class=said>Waiting: {ahead} request{'s' * (ahead > 1)} before yours</p><progress></progress>"
    if not ticket.step:
        return f"<p class=said>{html.escape(ticket.doing or 'Starting')}</p><progress></progress>"
    text = f"Step {ticket.step} of {ticket.steps}"
    return (
        f"<p class=said aria-hidden=true>{text}</p>"
        f'<progress aria-label="{text}" value={ticket.step} max={ticket.steps}></progress>'
    )


def ended(text: str) -> str:
    """How a request has ended, as HTML."""
    return f"<p class=said>{html.escape(text)}</p>"


def complaint(error: Exception) -> str:
    """The message of an error to a visitor: at the top of the page for a while, and as HTML to stay."""
    # Not raised as gr.Error: that writes "Error" over everything that the request would have changed.
    text = html.escape(said(error))
    gr.Warning(text)
    return f"<p class='said wrong'>{text}</p>"


def said(error: Exception) -> str:
    """The message of an error to a visitor; a fault of ours keeps its traceback for the terminal."""
    if isinstance(error, LdmError):
        return str(error)
    if exhausted(error):
        return "the device has too little memory for this: ask for fewer pictures at once"
    traceback.print_exception(error)
    return f"this failed ({type(error).__name__}); the terminal of the server says more"
