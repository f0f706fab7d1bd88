"""The page of `ldm demo`, and what happens when its controls are used.

Nothing of a request is kept in a global place: what a visitor has made is in the state of their page, and the request
that is being worked on in `Page`, by the number of the visit.
"""

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.cli import demo_request
from ldm.cli.demo_controls import Controls
from ldm.cli.demo_line import Halted, Line, Ticket
from ldm.cli.demo_messages import complaint, ended, progress
from ldm.cli.demo_models import Abilities, Models
from ldm.cli.demo_pictures import (
    Shown,
    begun,
    command_html,
    drawn_layout,
    layout_file,
    painted_map,
    settings_html,
    shown,
)
from ldm.cli.demo_request import Constants, Limits, Wish
from ldm.cli.demo_style import COPY, CSS, ON_LOAD, theme

KEPT = 60
"""Pictures of a visit that stay in the gallery."""

LOOK = 0.1  # seconds between two looks at how far a request is

LARGE = 256
"""Pixels from which on pictures are scaled smoothly."""

Updates = dict[Any, Any]


@dataclass
class Visit:
    """One open page: its folder of pictures, and its request."""

    folder: Path
    ticket: Ticket[list[Shown]] | None = None

    def stop(self) -> None:
        if self.ticket is not None:
            self.ticket.stop()


@dataclass
class Page:
    """
    Args:
        models: what can be chosen.
        line: of the requests.
        constants: flags of all commands.
        folder: for the pictures of visitors; `made` in it is this page's to empty.
        limits: of each request.
    """

    models: Models
    line: Line
    constants: Constants
    folder: Path
    limits: Limits = field(default_factory=Limits)
    visits: dict[str, Visit] = field(default_factory=dict)

    def build(self) -> gr.Blocks:
        """The page, not yet served."""
        with gr.Blocks(title="ldm demo", analytics_enabled=False) as blocks:
            gr.HTML("<h1>ldm demo</h1><p>Pictures of a latent diffusion model</p>", elem_id="title")
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320, elem_id="controls"):
                    self.controls = Controls([*self.models.runs])
                with gr.Column(scale=3, min_width=320, elem_id="results"):
                    self._results()
            self._wire(blocks)
        return blocks

    def _results(self) -> None:
        self.history = gr.State([])
        self.gallery = gr.Gallery(
            label="Pictures",
            show_label=False,
            columns=4,
            height="auto",
            object_fit="contain",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="gallery",
        )
        self.details = gr.Column(visible=False)
        with self.details:
            self.settings = gr.HTML(elem_id="settings")
            self.command = gr.HTML(elem_id="command")
            self.copy = gr.Button("Copy command", size="sm", elem_id="copy")

    def _wire(self, blocks: gr.Blocks) -> None:
        controls, of = self.controls, self.controls.of_wish
        gr.on(
            [blocks.load, controls.model.change],
            self.choose,
            [controls.model],
            [*controls.of_model, self.gallery],
            show_progress="hidden",
        )
        controls.prompts.click(lambda sample: sample[0], [controls.prompts], [of["prompt"]], show_progress="hidden")
        controls.labels.click(lambda index: index, [controls.labels], [of["label"]], show_progress="hidden")
        controls.new_seed.click(lambda: secrets.randbelow(2**31), None, [of["seed"]], show_progress="hidden")
        results = [controls.status, controls.generate, controls.stop, self.history, self.gallery, *self._detail_parts()]
        gr.on(
            [controls.generate.click, of["prompt"].submit],
            self.make,
            [controls.model, self.history, controls.start, controls.map, controls.boxes, *of.values()],
            results,
            show_progress="hidden",
            trigger_mode="once",
        )
        controls.boxes.change(
            self.draw, [controls.model, controls.boxes], [controls.drawn], show_progress="hidden", queue=False
        )
        controls.stop.click(self.stop, None, None, queue=False, show_progress="hidden")
        self.gallery.select(self.show, [self.history], self._detail_parts(), show_progress="hidden")
        self.copy.click(None, None, None, js=COPY)
        blocks.unload(self.leave)

    def _detail_parts(self) -> list[Any]:
        return [self.details, self.settings, self.command]

    async def choose(self, model: str) -> Updates:
        """Show the controls of a model."""
        try:
            abilities = await self._abilities(model)
            smooth = ["large"] if max(abilities.size) >= LARGE else []
            return {**self.controls.updates(abilities), self.gallery: gr.update(elem_classes=smooth)}
        except Exception as error:
            return {self.controls.facts: complaint(error)}

    async def _abilities(self, model: str) -> Abilities:
        if model in self.models.known:
            return self.models.known[model]
        return await asyncio.wrap_future(self.line.ask(partial(self._load, model)).future)

    def _load(self, model: str, ticket: Ticket[Abilities]) -> Abilities:
        self.models.pipeline(model, ticket.say)
        return self.models.known[model]

    async def make(
        self,
        request: gr.Request,
        model: str,
        history: list[Shown],
        editor: Any,
        painted: Any,
        boxes: Any,
        *values: Any,
    ) -> AsyncIterator[Updates]:
        """Make what the controls say, and tell how far it is."""
        visit, controls = self._visit(request), self.controls
        idle = {controls.generate: gr.update(interactive=True), controls.stop: gr.update(interactive=False)}
        began = time.monotonic()
        ticket: Ticket[list[Shown]] | None = None
        try:
            abilities = await self._abilities(model)
            image, mask = begun(editor, self.folder / "begun")
            wish = Wish(**dict(zip(controls.of_wish, values, strict=True)), image=image, mask=mask)
            wish = self._dense(wish, abilities, painted, boxes)
            self._checked(demo_request.words(wish, abilities, self.constants), abilities)  # before waiting in the line
            ticket = self._ask(visit, model, wish)
            yield {controls.generate: gr.update(interactive=False), controls.stop: gr.update(interactive=True)}
            while not ticket.future.done():
                yield {controls.status: progress(ticket, self.line.ahead(ticket))}
                await asyncio.sleep(LOOK)
            made = ticket.future.result()
        except (Halted, CancelledError):
            yield idle | {controls.status: ended("Stopped")}
        except Exception as error:
            yield idle | {controls.status: complaint(error)}
        else:
            text = f"{len(made)} picture{'s' * (len(made) > 1)} in {time.monotonic() - began:.1f} s"
            yield idle | {controls.status: ended(text)} | self._with(made, history)
        finally:
            if ticket is not None:  # not visit.stop(): the visitor may have asked for something else by now
                ticket.stop()

    def _dense(self, wish: Wish, abilities: Abilities, painted: Any, boxes: Any) -> Wish:
        """The wish with the map or the layout that the model reads."""
        folder = self.folder / "begun"
        if abilities.map_classes is not None:
            wish = replace(wish, map=painted_map(painted, abilities.map_classes, abilities.size, folder))
        if abilities.box_classes is not None:
            wish = replace(wish, layout=layout_file(boxes or [], folder))
        return wish

    def draw(self, model: str, boxes: Any) -> Any:
        """The table's layout as a picture, as far as it is one."""
        abilities = self.models.known.get(model)
        if abilities is None or abilities.box_classes is None:
            return gr.update(visible=False)
        drawn = drawn_layout(boxes or [], abilities.box_classes, abilities.size)
        return gr.update() if drawn is None else gr.update(visible=True, value=drawn)

    def _ask(self, visit: Visit, model: str, wish: Wish) -> Ticket[list[Shown]]:
        visit.stop()
        folder = visit.folder / secrets.token_hex(8)

        def work(ticket: Ticket[list[Shown]]) -> list[Shown]:
            pipeline = self.models.pipeline(model, ticket.say)
            abilities = self.models.known[model]
            arguments = demo_request.words(wish, abilities, self.constants)
            options, limits = self._checked(arguments, abilities), self.limits.of(abilities)
            made = demo_request.carried_out(pipeline, options, ticket, limits)
            return shown(made, folder, wish, abilities, model, demo_request.command(arguments))

        visit.ticket = self.line.ask(work)
        return visit.ticket

    def _checked(self, arguments: Sequence[str], abilities: Abilities) -> Any:
        return demo_request.checked(arguments, self.limits.of(abilities))

    def _with(self, made: list[Shown], history: list[Shown]) -> Updates:
        """The gallery with new pictures in front, and the details of the first."""
        history = [*made, *history][:KEPT]
        pictures = [(one.file, one.caption) for one in history]
        return {
            self.history: history,
            self.gallery: gr.update(value=pictures, selected_index=None),
            **self._details(history[0]),
        }

    def _details(self, one: Shown) -> Updates:
        return {
            self.details: gr.update(visible=True),
            self.settings: settings_html(one),
            self.command: command_html(one),
        }

    def show(self, history: list[Shown], chosen: gr.SelectData) -> Updates:
        """The settings of the picture that was clicked on."""
        return self._details(history[chosen.index])

    def stop(self, request: gr.Request) -> None:
        """End the visitor's own request."""
        self._visit(request).stop()

    def leave(self, request: gr.Request) -> None:
        """The page was closed: its request ends, and its pictures go."""
        visit = self.visits.pop(str(request.session_hash), None)
        if visit is not None:
            visit.stop()
            shutil.rmtree(visit.folder, ignore_errors=True)

    def _visit(self, request: gr.Request) -> Visit:
        # Of the browser's number nothing is made but a key.
        return self.visits.setdefault(str(request.session_hash), Visit(self.folder / "made" / secrets.token_hex(8)))


@contextmanager
def served(page: Page, host: str, port: int) -> Iterator[str]:
    """Within the block the page is served in threads of their own, with nothing from elsewhere; gives its URL."""
    blocks = page.build().queue(default_concurrency_limit=None, api_open=False)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size="32mb",
        ssr_mode=False,
        theme=theme(),
        css=CSS,
        js=ON_LOAD,
    )
    try:
        yield url
    finally:
        page.line.close()
        blocks.close(verbose=False)
