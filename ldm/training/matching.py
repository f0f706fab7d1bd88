"""A file of weights beside the model that starts from it: what is kept, resized, new, and left out.

Tensors are named as in a checkpoint, without `denoiser.`: an average has the names of what it averages.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.autoencoder.codec import with_encoder
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.checkpoints.store import Verified
from ldm.config.init_from import InitFrom
from ldm.config.tree import current_plain, nearest
from ldm.diffusion.module import LatentDiffusion
from ldm.errors import ConfigError
from ldm.interop import lora, lora_files
from ldm.interop.tables import listed
from ldm.latents.manifest import Manifest
from ldm.sizes import as_size, spell
from ldm.training.resizing import resizings
from ldm.training.resume_changes import brief, differences
from ldm.weights.digest import weight_hash

_COPIES = re.compile(r"^(denoiser|ema\.average|ema\.extra\.\d+)\.")
# Neither weights of the model nor trained.
_NOT_WEIGHTS = ("ema.", "metrics.")
_KINDS: dict[type, str] = {AutoencoderKL: "autoencoder", LatentDiffusion: "diffusion"}


class Match:
    """What becomes of the tensors; the file is mapped, so that only what is loaded is read.

    Args:
        verified: the file.
        section: what is asked for.
        model: that starts from it, with values or without.
        classes: the names of its classes, if it has some.
        params: of its configuration.
        resolution: of its images or latents, if known.

    Attributes:
        file: the checkpoint.
        manifest: of its latents; None: it is no diffusion model.
        kept, resized: names of the model's tensors that come from the file.

    Raises:
        CheckpointError: it cannot be read, or is of another stage.
        ConfigError: a part that the model does not have.
    """

    def __init__(
        self,
        verified: Verified,
        section: InitFrom,
        model: nn.Module,
        classes: Sequence[str] | None,
        params: Mapping[str, Any],
        resolution: Any,
    ) -> None:
        self.file, self._section, self._model, self._params = verified.path, section, model, params
        state = store.load(verified, mapped=True)
        kind = next((kind for known, kind in _KINDS.items() if isinstance(model, known)), None)
        self._facts = store.facts(state, kind, self.file) if kind else state.get("ldm") or {}
        self._config = (self._facts.get("config") or {}).get
        self.manifest = _manifest(self._facts["latents"]) if kind == "diffusion" else None
        self._classes = classes, self.manifest.plan.class_names if self.manifest else None
        self._resolutions = resolution, self._resolution()
        self._places = _places(model)
        tensors = model.state_dict()
        self._theirs = _weights(state["state_dict"], section.average)
        self._ours = {
            name: tensors[places[0]]
            for name, places in self._places.items()
            # The hash of a text encoder is no weight, and weights of others come without.
            if name in self._theirs or not name.endswith("._extra_state")
        }
        self._check_parts()
        self._compare()

    def _compare(self) -> None:
        ours = {name: one.shape for name, one in self._ours.items() if self._asked(name)}
        theirs = {name: one.shape for name, one in self._theirs.items() if self._asked(name)}
        self._resizings = resizings(self._model, ours, theirs, self._section.resize, self._classes)
        self.resized = [name for name in ours if name in self._resizings]
        others = [name for name in ours if name not in self._resizings]
        # An adapter that the file does not have begins as none.
        self._begun = [name for name in others if lora.is_adapters(name) and name not in theirs]
        others = [name for name in others if name not in self._begun]
        # Of what a part compares itself, a tokenizer, the outline has no size.
        compared = {name for name in others if name.endswith("._extra_state") and name in theirs}
        self.kept = [name for name in others if name in compared or theirs.get(name) == ours[name]]
        self._missing = [name for name in others if name not in theirs]
        self._misfits = [name for name in others if name in theirs and name not in self.kept]
        self._left = [name for name in theirs if name not in ours]

    def _asked(self, name: str) -> bool:
        parts = self._section.parts
        return parts is None or any(_within(name, part) for part in parts)

    def _check_parts(self) -> None:
        for part in self._section.parts or ():
            if not any(_within(name, part) for name in self._ours):
                depth = part.count(".") + 1
                known = {".".join(name.split(".")[:depth]) for name in self._ours}
                raise ConfigError(f"init_from.parts: this model has no '{part}'; {nearest(part, known)}")

    def takes(self, part: str) -> bool:
        """Whether anything of a part of the model comes from the file."""
        return any(_within(name, part) for name in (*self.kept, *self.resized))

    def takes_all(self, part: str) -> bool:
        """Whether all of it does."""
        return {name for name in self._ours if _within(name, part)} <= {*self.kept, *self.resized}

    # ---- what does not fit

    def check(self) -> None:
        """ConfigError, listing what does not fit, if everything has to; or if nothing does."""
        if not self.kept and not self.resized:
            raise ConfigError(f"init_from: {self.file}: none of its {len(self._theirs)} tensors fits this model")
        if not self._section.strict:
            return
        lines = listed("not in the file", self._missing)
        lines += listed("in no place of this model", [f"{n} {[*self._theirs[n].shape]}" for n in self._left])
        lines += listed("of another shape", map(self._shapes, self._misfits))
        if "resolution" not in self._section.resize:
            lines += [f"  {text}" for text in self._other_resolution()]
        if any(map(lora.is_adapters, self._left)):
            lines.append("  its network has an adapter: make an ordinary run of it with ldm export --to merged")
        if lines:
            run, parts = self._section.run, ", ".join(self._parts())
            raise ConfigError(
                f"init_from: {self.file} does not fit the configuration:\n" + "\n".join(lines) + "\n"
                f"Name the parts that do (init_from: {{run: {run}, parts: [{parts}]}}), what may differ (resize: "
                f"[classes, channels, resolution]), or keep what fits (strict: false)."
            )

    def _shapes(self, name: str) -> str:
        return f"{name}: expected {[*self._ours[name].shape]}, found {[*self._theirs[name].shape]}"

    def _parts(self) -> list[str]:
        return [*dict.fromkeys(name.split(".")[0] for name in self._ours)]

    def _resolution(self) -> Any:
        """What the file was trained at: images of an autoencoder, latents of a diffusion model; None: not known."""
        if self.manifest is not None:
            return self.manifest.plan.shape[1:]
        return (self._config("data") or {}).get("params", {}).get("resolution")

    def _other_resolution(self) -> list[str]:
        if None in self._resolutions:
            return []
        ours, theirs = map(as_size, self._resolutions)
        return [] if ours == theirs else [f"trained at a resolution of {spell(theirs)}, this run's is {spell(ours)}"]

    # ---- what comes of it

    def load(self) -> None:
        """Put the tensors into the model."""
        state = self._model.state_dict()
        for name in (*self.kept, *self.resized):
            change = self._resizings.get(name)
            for place in self._places[name]:
                state[place] = change(state[place], self._theirs[name]) if change else self._theirs[name]
        self._model.load_state_dict(state)

    def record(self) -> dict[str, Any]:
        """For the checkpoint's facts and the run folder, in plain values; reads all of the file's weights."""
        origin = {"origin": self._facts["origin"]} if "origin" in self._facts else {}
        if any(map(lora.is_adapters, self._ours)):
            network = {name: one for name, one in self._theirs.items() if name.startswith("network.")}
            base = lora.base_weights({name.removeprefix("network."): one for name, one in network.items()})
            origin["base"] = weight_hash(base)
        if self._section.adapter is not None:
            origin["adapter"] = lora_files.read(Path(self._section.adapter)).record()
        return {
            "checkpoint": str(self.file),
            "step": self._facts.get("step"),
            "weights": weight_hash(self._theirs),
            "average": self._section.average,
            "tensors": self.counts(),
            "resized": [self._shapes(name) for name in self.resized],
            "notes": self.notes(),
            **origin,
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """{part of the model: {"kept", "resized", "new": number of its tensors}}."""
        counts = {part: {"kept": 0, "resized": 0, "new": 0} for part in self._parts()}
        became = dict.fromkeys(self.kept, "kept") | dict.fromkeys(self.resized, "resized")
        for name in self._ours:
            counts[name.split(".")[0]][became.get(name, "new")] += 1
        return counts

    def report(self) -> list[str]:
        """Lines for a person."""
        which = "" if self.manifest is None else f", {'averaged' if self._section.average else 'last'} weights"
        lines = [f"init_from {self.file} (step {self._facts.get('step')}{which}), tensors:"]
        for part, count in self.counts().items():
            lines.append(f"  {part:<16}" + "".join(f"{key} {number:<8}" for key, number in count.items()).rstrip())
        lines += listed("resized", map(self._shapes, self.resized))
        lines += listed("new, not in the file", [*self._missing, *self._begun])
        lines += listed("new, since of another shape", map(self._shapes, self._misfits))
        lines += listed("left out of the file", self._left)
        return lines + [f"  note: {note}" for note in self.notes()]

    def notes(self) -> list[str]:
        """What is different without being of another shape."""
        found = self._other_resolution()
        ours, theirs = self._classes
        renamed = ours and theirs and [*ours] != [*theirs] and "classes" not in self._section.resize
        if renamed and self.takes("conditioner"):
            found.append("its classes have other names, or another order, and rows go by their number")
        params = (self._config("model") or {}).get("params", {})
        parts = [part for part in self._parts() if self.takes(part)]
        if "objective" not in parts and self.takes("network"):
            parts.append("objective")  # most have no tensor, and a network is of no use to another
        for part in parts:
            then = current_plain(params.get(part) or {}, str(self.file))
            changed = differences(then, self._params.get(part) or {}, f"model.params.{part}")
            found += [f"{key}: there {brief(old)}, here {brief(new)}" for key, (old, new) in changed.items()]
        return found


def _manifest(tree: Mapping[str, Any]) -> Manifest:
    found = Manifest.from_dict(tree)
    return found.decoded_by(with_encoder(found.plan.autoencoder))


def _within(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def _places(model: nn.Module) -> dict[str, list[str]]:
    """{name of a weight: where it is in the model's state dict}."""
    places: dict[str, list[str]] = {}
    for key, value in model.state_dict().items():
        name = _COPIES.sub("", key)
        if isinstance(value, Tensor) and not name.startswith(_NOT_WEIGHTS):
            places.setdefault(lora.base_name(name), []).append(key)
    return places


def _weights(state_dict: Mapping[str, Any], average: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint by name: the averaged ones, if it has them and they are asked for."""
    averaged = average and any(key.startswith("ema.average.") for key in state_dict)
    unwanted = ("denoiser.", "ema.extra.") if averaged else ("ema.",)
    named: Iterable[tuple[str, Any]] = (
        (_COPIES.sub("", key), value) for key, value in state_dict.items() if not key.startswith(unwanted)
    )
    return {
        lora.base_name(n): value for n, value in named if isinstance(value, Tensor) and not n.startswith(_NOT_WEIGHTS)
    }
