"""The controls of the page: one for each setting of a `Wish`, shown where the chosen model can do something with it."""

import html
from collections.abc import Sequence
from typing import Any, Literal

import gradio as gr
from PIL import Image

from ldm.cli.demo_models import Abilities
from ldm.cli.demo_request import Wish
from ldm.cli.sample_options import named
from ldm.sampling import samplers, timesteps
from ldm.sampling.shown import color
from ldm.sizes import Size, spell

EXAMPLES = 12
"""Classes or prompts to click on, at most."""

PAINT = "#e0457b"

CANVAS = 512
"""Pixels of the longer side of a map that is painted, about."""


class Controls:
    """Everything on the left of the page; built inside of a `gr.Blocks`.

    Attributes:
        of_wish: the controls by the name of their setting in `Wish`.
        of_model: those that differ between models.
        start: the picture to begin with, and what is painted in it.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.model = gr.Dropdown([*models], value=models[0], label="Model", visible=len(models) > 1)
        self.facts = gr.HTML("Loading the model", elem_id="facts")
        self.of_wish: dict[str, Any] = {}
        self._conditions()
        self._dense()
        self._numbers()
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, min_width=80)
        self.status = gr.HTML(elem_id="status")
        self._more()
        self._start()
        of_wish = [self.of_wish[name] for name in ("prompt", "negative", "label", "guidance", "width", "height")]
        self.of_model = [self.facts, *of_wish, self.prompts, self.labels, self.guiding, self.starting, self.generate]
        self.of_model += [self.of_wish["strength"], self.of_wish["noise"]]
        self.of_model += [self.advice, self.start, self.map, self.legend, self.boxes]

    def _conditions(self) -> None:
        of = self.of_wish
        of["prompt"] = gr.Textbox(label="Prompt", placeholder="What the picture shows", max_lines=4, visible=False)
        of["label"] = gr.Dropdown([], label="Class", filterable=True, visible=False)
        self.prompts, self.labels = _tries("values"), _tries("index")
        of["negative"] = gr.Textbox(
            label="Negative prompt", placeholder="What it should not show", lines=1, visible=False
        )

    def _numbers(self) -> None:
        of = self.of_wish
        of["guidance"] = gr.Slider(
            1, 12, value=2, step=0.1, label="Guidance", info="Higher: closer to what is asked for", visible=False
        )
        with gr.Row():
            of["number"] = gr.Number(Wish.number, label="Pictures", precision=0, min_width=100)
            of["steps"] = gr.Number(Wish.steps, label="Steps", precision=0, min_width=100)
        with gr.Row():
            of["seed"] = gr.Number(Wish.seed, label="Seed", precision=0, min_width=100)
            self.new_seed = gr.Button("New seed", elem_id="new-seed", size="md", min_width=100)

    def _more(self) -> None:
        of = self.of_wish
        with gr.Accordion("More settings", open=False):
            with gr.Row():
                of["sampler"] = gr.Dropdown(named(samplers), value=Wish.sampler, label="Sampler", min_width=130)
                of["schedule"] = gr.Dropdown(named(timesteps), value=Wish.schedule, label="Schedule", min_width=130)
            with gr.Row():
                of["sampler_settings"] = gr.Textbox("", label="Sampler settings", placeholder="eta=0.5", min_width=130)
                of["schedule_settings"] = gr.Textbox("", label="Schedule settings", placeholder="rho=5", min_width=130)
            with gr.Row():
                of["width"] = gr.Number(label="Width", precision=0, min_width=100)
                of["height"] = gr.Number(label="Height", precision=0, min_width=100)
            self.guiding = gr.Column(visible=False)
            with self.guiding:
                of["rescale"] = gr.Slider(
                    0, 1, value=0, step=0.05, label="Rescale", info="Keeps high guidance from burning pictures out"
                )
                with gr.Row():
                    of["low"] = gr.Number(Wish.low, label="Guide above", info="noise / signal", min_width=110)
                    of["high"] = gr.Textbox(Wish.high, label="and up to", info="empty: no end", min_width=110)

    def _dense(self) -> None:
        self.legend = gr.HTML(visible=False, elem_id="legend")
        self.map = gr.ImageEditor(
            label="Map",
            show_label=False,
            type="pil",
            format="png",
            sources=(),
            layers=False,
            transforms=(),
            visible=False,
            elem_id="map",
        )
        self.boxes = gr.Dataframe(
            label="Boxes, from 0 to 1 of the picture",
            headers=["Class", "Left", "Top", "Right", "Bottom"],
            datatype=["str", "number", "number", "number", "number"],
            column_count=5,
            column_widths=["28%", "18%", "18%", "18%", "18%"],
            type="array",
            interactive=True,
            visible=False,
            elem_id="boxes",
        )
        self.drawn = gr.Image(
            label="Layout",
            show_label=False,
            visible=False,
            interactive=False,
            format="png",
            buttons=[],
            elem_id="drawn",
        )

    def _start(self) -> None:
        self.starting = gr.Accordion("Begin with a picture", open=False, visible=False)
        with self.starting:
            advice = "<p>What you paint over is made anew; the rest of the picture stays.</p>"
            self.advice = gr.HTML(advice, elem_id="advice")
            self.start = gr.ImageEditor(
                label="Picture to begin with",
                show_label=False,
                type="pil",
                format="png",
                sources=["upload", "clipboard"],
                layers=False,
                transforms=(),
                elem_id="start",
            )
            self.of_wish["strength"] = gr.Slider(
                0.05, 1, value=Wish.strength, step=0.05, label="Strength", info="1: nothing of the picture is left"
            )
            hides = "Higher: hides faults of the picture, and details"
            self.of_wish["noise"] = gr.Slider(
                0, 1, value=Wish.noise, step=0.05, label="Noise level", info=hides, visible=False
            )

    def updates(self, abilities: Abilities) -> dict[Any, Any]:
        """What each control becomes when this model is chosen; a setting that it knows as well is kept."""
        of, classes, prompts = self.of_wish, abilities.classes or [], abilities.prompts[:EXAMPLES]
        choices = [(label, number) for number, label in enumerate(classes)]
        return {
            self.facts: f"{spell(abilities.size)} pixels, {abilities.step:,} steps of training",
            of["prompt"]: gr.update(visible=abilities.captions),
            of["negative"]: gr.update(visible=abilities.captions and abilities.guided),
            of["label"]: gr.update(choices=choices, value=0 if choices else None, visible=bool(choices)),
            self.prompts: gr.update(samples=[[prompt] for prompt in prompts], visible=bool(prompts)),
            self.labels: gr.update(samples=[[label] for label in classes[:EXAMPLES]], visible=len(classes) > 1),
            of["guidance"]: gr.update(visible=abilities.guided),
            of["width"]: abilities.size[1],
            of["height"]: abilities.size[0],
            self.guiding: gr.update(visible=abilities.guided),
            self.starting: gr.update(
                visible=abilities.begins or abilities.picture,
                open=abilities.picture,
                label="Picture" if abilities.picture else "Begin with a picture",
            ),
            self.advice: gr.update(visible=abilities.hole or not abilities.picture),
            of["strength"]: gr.update(visible=not abilities.picture),
            of["noise"]: _noise(abilities.noise),
            **self._maps(abilities.map_classes, abilities.size),
            self.legend: _legend("Paint each class in its color.", abilities.map_classes)
            if abilities.map_classes is not None
            else _legend("Name a class in each row.", abilities.box_classes),
            self.start: _painting(abilities.size, abilities.hole or not abilities.picture),
            self.boxes: gr.update(visible=abilities.box_classes is not None, value=_boxes(abilities.box_classes)),
            self.generate: gr.update(interactive=True),
        }

    def _maps(self, classes: Sequence[str] | None, size: Size) -> dict[Any, Any]:
        """The brush of a model that reads maps: the colors of its classes."""
        if classes is None:
            return {self.map: gr.update(visible=False)}
        colors = _colors(classes)
        side = CANVAS // max(size)
        blank = Image.new("RGB", (size[1] * max(1, side), size[0] * max(1, side)))
        brush = gr.Brush(colors=[*colors], default_color=colors[0], color_mode="fixed")
        value = {"background": blank, "layers": [], "composite": None}
        return {self.map: gr.update(visible=True, brush=brush, value=value)}


def _colors(classes: Sequence[str]) -> list[str]:
    """Of the classes that have one of their own."""
    return ["#{:02x}{:02x}{:02x}".format(*color(label)) for label in range(min(len(classes), 255))]


def _legend(does: str, classes: Sequence[str] | None) -> Any:
    """What a visitor does with the classes, and each in its color."""
    if classes is None:
        return gr.update(visible=False)
    named = "".join(
        f'<span style="border-color: {one}">{html.escape(name)}</span>'
        for one, name in zip(_colors(classes), classes, strict=False)
    )
    return gr.update(visible=True, value=f"<p>{does}</p><p class=classes>{named}</p>")


def _painting(size: Size, useful: bool) -> Any:
    """Brush and eraser for a picture of about this size, or none where the model does nothing with paint."""
    if not useful:
        return gr.update(brush=False, eraser=False)
    radius = min(25, max(2, min(size) // 10))
    brush = gr.Brush(default_size=radius, colors=[PAINT], default_color=PAINT, color_mode="fixed")
    return gr.update(brush=brush, eraser=gr.Eraser(default_size=radius))


def _boxes(classes: Sequence[str] | None) -> list[list[Any]]:
    """The first rows of the table: a box of the first class, and an empty one."""
    return [[(classes or [""])[0], 0.25, 0.25, 0.75, 0.75], ["", None, None, None, None]]


def _noise(levels: tuple[float, float] | None) -> Any:
    """The slider of a model that knows noise from 0 to the second of these levels, at the first."""
    if levels is None:
        return gr.update(visible=False)
    usual, most = levels
    return gr.update(visible=True, value=usual, maximum=most)


def _tries(gives: Literal["values", "index"]) -> gr.Dataset:
    """A row of examples to click on."""
    return gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[],
        samples_per_page=EXAMPLES,
        type=gives,
        show_label=False,
        visible=False,
        elem_classes="tries",
    )
