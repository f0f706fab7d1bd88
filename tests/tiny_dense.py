"""A data set in memory whose items have all that can lie on a picture, and columns that are drawn of it."""

import numpy as np
import torch
from PIL import Image

from ldm.errors import DataError

CLASSES = 40


class Scenes:
    """`number` RGB pictures of odd sizes, each with a map, a mask, boxes and a pair.

    The map is the picture's red channel, so that what is done to both can be compared.

    Args:
        salt: of the noise.
        broken: items that cannot be read.
        changes: {item: {key: value}} in place of what it has.
        captions: of all items; None: they have none. Then they can be read alone.
    """

    num_classes = 3
    class_names = None

    def __init__(self, number=10, salt=0, broken=(), changes=None, size=(21, 27)):
        self.number, self.salt, self.broken, self.changes, self.size = number, salt, broken, changes or {}, size

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"{self.path(index)}: cannot be read")
        random = np.random.default_rng([self.salt, index])
        height, width = self.size[0] + index % 3, self.size[1] - index % 4
        noise = random.integers(0, CLASSES, (height, width, 3), dtype=np.uint8)
        corners = np.sort(random.uniform(0, 1, (index % 4, 2, 2)), axis=1) * (width, height)  # none of every fourth
        boxes = np.concatenate([corners.reshape(-1, 4), random.integers(0, 9, (index % 4, 1))], 1)
        item = {
            "image": Image.fromarray(noise),
            "class_label": index % 3,
            "map": noise[..., 0].copy(),
            "mask": np.where(random.uniform(size=(height, width)) < 0.5, 255, 0).astype(np.uint8),
            "boxes": boxes.astype(np.float32),
            "pair": Image.fromarray(255 - noise).resize((width // 2, height // 2)),
        }
        return item | self.changes.get(index, {})

    def sizes(self):
        return np.array([(self.size[0] + index % 3, self.size[1] - index % 4) for index in range(self.number)])

    def path(self, index):
        return f"memory/{index}.png"

    def fingerprint(self):
        return f"{self.number} {self.salt} {sorted(self.changes)}"

    def prepare(self):
        pass


class Blocks:
    """A mask: a rectangle, and in one of four samples nothing. (Helper of tests; ldm/data/masks.py has real ones.)"""

    reads = ("image",)

    def __init__(self, salt: int = 0) -> None:
        self.salt = salt

    def describe(self):
        return {"what": "blocks", "salt": self.salt}

    def columns(self, rows):
        n, _, height, width = rows["image"].shape
        return {"mask": torch.empty(n, 1, height, width, dtype=torch.uint8, device="meta")}

    def draw(self, row, random):
        _, height, width = row["image"].shape
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        left, top = random.integers(0, width // 2), random.integers(0, height // 2)
        if random.uniform() < 0.75:
            mask[:, top : top + height // 3, left : left + width // 2] = 255
        return mask


class Halved:
    """A low-resolution picture: every second pixel, and noise."""

    reads = ("image",)
    name, step = "halved", 2

    def describe(self):
        return {"what": self.name}

    def columns(self, rows):
        return {"low_resolution": rows["image"][..., :: self.step, :: self.step]}

    def draw(self, row, random):
        small = row["image"][..., :: self.step, :: self.step].numpy()
        return torch.from_numpy(small ^ random.integers(0, 4, small.shape, dtype=np.uint8))


class Quartered(Halved):
    """The same with every fourth pixel."""

    name, step = "quartered", 4
