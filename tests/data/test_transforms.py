"""Transforms, views and collation."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from ldm.data import decoding
from ldm.data.loading import BrokenImages, TransformedDataset, collate
from ldm.data.sources.folder import ImageFolder
from ldm.data.transforms import EvalTransform, TrainTransform, transformed
from ldm.errors import ConfigError, DataError


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8))


def view(folder, transform=None, **options) -> TransformedDataset:
    return TransformedDataset(ImageFolder(folder), transform or TrainTransform(16), 3, 16, seed=1, **options)


class TestTransforms:
    def test_range_and_layout(self):
        image = Image.new("RGB", (8, 8), (0, 255, 51))
        pixels = EvalTransform(8)(image)
        assert type(pixels) is torch.Tensor
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[:, 3, 4], torch.tensor([-1.0, 1.0, -0.6]))
        assert EvalTransform(8)(Image.new("L", (8, 8), 255)).shape == (1, 8, 8)

    def test_every_level_survives_the_way_there_and_back(self):
        image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        pixels = EvalTransform(16)(image)
        assert ((pixels[0] + 1) * 127.5).round().to(torch.uint8).equal(torch.from_numpy(np.array(image)))

    @pytest.mark.parametrize("size", [(16, 16), (40, 24), (24, 41), (5, 9)])
    def test_short_side_then_centre(self, size):
        pixels = EvalTransform(16, interpolation="bilinear")(noise(*size))
        short = min(size)
        resized = noise(*size).resize((size[0] * 16 // short, size[1] * 16 // short), Image.Resampling.BILINEAR)
        left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
        expected = np.asarray(resized.crop((left, top, left + 16, top + 16)), dtype=np.float32) / 127.5 - 1
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)

    def test_training_without_random_crop_is_evaluation_or_its_mirror(self):
        image, reference = noise(30, 21), EvalTransform(16)(noise(30, 21))
        assert TrainTransform(16, flip=0)(image).equal(reference)
        assert TrainTransform(16, flip=1)(image).equal(reference.flip(-1))

    @pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000), (90_000, 3)])
    @pytest.mark.parametrize("transform", [EvalTransform(256), TrainTransform(256), TrainTransform(256, True)])
    def test_thin_pictures_stay_small(self, size, transform, monkeypatch):
        """Resized whole, they would have billions of pixels."""
        resize, made = Image.Image.resize, []

        def watch(image, size, *args, **kwargs):
            made.append(size[0] * size[1])
            assert made[-1] <= 256**2
            return resize(image, size, *args, **kwargs)

        monkeypatch.setattr(Image.Image, "resize", watch)
        pixels = transform(Image.new("RGB", size, (51, 102, 204)))
        assert made
        assert pixels.shape == (3, 256, 256)
        torch.testing.assert_close(pixels[:, 7, 200], torch.tensor([-0.6, -0.2, 0.6]))

    @pytest.mark.parametrize("name", [mode.value for mode in InterpolationMode])
    @pytest.mark.parametrize("size", [(1600, 4), (7, 900), (640, 48), (24, 41)])
    def test_thin_pictures_get_the_pixels_of_the_whole(self, name, size, monkeypatch):
        x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
        waves = 127 + 60 * np.sin(x[..., None] / (9, 11, 17)) + 60 * np.cos(y[..., None] / (5, 13, 8))
        image = Image.fromarray(waves.astype(np.uint8))
        whole = EvalTransform(16, name)(image)
        monkeypatch.setattr("ldm.data.transforms.MAX_PIXELS", 0)
        monkeypatch.setattr("ldm.data.transforms._LEAST_RATIO", 1.0)
        error = (EvalTransform(16, name)(image) - whole).abs() * 127.5
        # A shift by a pixel makes 4 levels on average; between two pixels at equal distance either may be the nearest.
        assert error.mean() < 0.5
        assert "nearest" in name or name == "box" or error.max() < 1.01

    def test_a_random_crop_of_a_thin_picture_is_anywhere(self):
        ramp = Image.fromarray(np.linspace(0, 255, 30_000).astype(np.uint8)[None])
        transform = TrainTransform(64, random_crop=True, flip=0)
        torch.manual_seed(0)
        middles = [(float(transform(ramp)[0, 32, 32]) + 1) / 2 for _ in range(200)]
        assert min(middles) < 0.03
        assert max(middles) > 0.97
        assert abs(np.mean(middles) - 0.5) < 0.07

    def test_ordinary_pictures_take_the_steps_that_they_always_took(self):
        """Bit for bit, since latent caches and runs hold on to them, and with the same random numbers."""
        for size in ((16, 16), (40, 24), (300, 20), (5, 80)):
            image = noise(*size)
            steps = [v2.Resize(16, InterpolationMode.BICUBIC, antialias=True), v2.ToImage()]
            rest = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]), v2.ToPureTensor()]
            old = v2.Compose([*steps, v2.CenterCrop(16), *rest])
            assert EvalTransform(16)(image).equal(old(image))
            old = v2.Compose([*steps, v2.RandomCrop(16), v2.RandomHorizontalFlip(0.5), *rest])
            torch.manual_seed(4)
            expected = [old(image) for _ in range(9)]
            torch.manual_seed(4)
            new = TrainTransform(16, random_crop=True)
            assert all(new(image).equal(pixels) for pixels in expected)

    def test_random_crop_stays_inside(self):
        ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (16, 1)))
        torch.manual_seed(0)
        starts = {int((TrainTransform(16, random_crop=True, flip=0)(ramp)[0, 0, 0] + 1) * 127.5) for _ in range(200)}
        assert min(starts) <= 3
        assert max(starts) >= 45
        assert len(starts) > 30

    @pytest.mark.parametrize("size", [(24, 16), (48, 16), (20, 90), (31, 17)])
    def test_a_crop_that_is_not_square(self, size):
        """The smallest picture of the same proportions that covers it, and its center."""
        pixels = EvalTransform([16, 24], "bilinear")(noise(*size))
        width, height = size
        wide = width * 16 >= height * 24
        covering = (16 * width // height, 16) if wide else (24, 24 * height // width)
        resized = noise(*size).resize(covering, Image.Resampling.BILINEAR)
        left, top = round((resized.width - 24) / 2), round((resized.height - 16) / 2)
        expected = np.asarray(resized.crop((left, top, left + 24, top + 16)), dtype=np.float32) / 127.5 - 1
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)
        assert TrainTransform([16, 24], random_crop=True)(noise(*size)).shape == (3, 16, 24)
        flipped = TrainTransform([16, 24], flip=1, interpolation="bilinear")(noise(*size))
        assert flipped.equal(pixels.flip(-1))

    def test_every_size_is_covered(self):
        """The crop never reaches over the edge, where it would be filled with black."""
        random = np.random.default_rng(0)
        for height, width, *size in random.integers(1, 40, (300, 4)).tolist():
            assert EvalTransform([height, width])(Image.new("RGB", size, "white")).eq(1).all(), (height, width, size)

    @pytest.mark.parametrize("size", [(1600, 4), (7, 900), (640, 48)])
    def test_thin_pictures_of_a_crop_that_is_not_square(self, size, monkeypatch):
        x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
        image = Image.fromarray((127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 5)).astype(np.uint8))
        whole = EvalTransform([16, 24])(image)
        monkeypatch.setattr("ldm.data.transforms.MAX_PIXELS", 0)
        monkeypatch.setattr("ldm.data.transforms._LEAST_RATIO", 1.0)
        assert (EvalTransform([16, 24])(image) - whole).abs().mean() * 127.5 < 0.5

    @pytest.mark.parametrize("size", [(40, 24), (24, 41), (40_000, 1)])
    @pytest.mark.parametrize("name", ["bicubic", "lanczos", "nearest"])
    def test_each_of_many_channels_is_a_gray_picture(self, size, name):
        planes = [noise(*size, "L"), noise(size[0] + 1, size[1], "L").crop((0, 0, *size)), noise(*size, "L")]
        stacked = torch.stack([torch.from_numpy(np.array(plane)) for plane in [*planes, *planes]])
        whole = EvalTransform([16, 24], name)(stacked)
        assert whole.equal(torch.cat([EvalTransform([16, 24], name)(plane) for plane in [*planes, *planes]]))
        torch.manual_seed(0)
        cropped = TrainTransform(16, random_crop=True, interpolation=name)(stacked)
        assert cropped[0].equal(cropped[2])
        assert cropped[:3].equal(cropped[3:])

    def test_describe_names_what_decides_the_pixels(self):
        assert EvalTransform([16, 24]).describe()["resolution"] == [16, 24]
        assert EvalTransform((16, 16)).describe()["resolution"] == 16
        assert EvalTransform(16, "lanczos").describe() == {
            "resolution": 16,
            "crop": "center",
            "interpolation": "lanczos",
            "pixel_range": [-1.0, 1.0],
        }

    def test_unknown_interpolation(self):
        with pytest.raises(ConfigError, match=r"bicubic.*'cubic'"):
            TrainTransform(16, interpolation="cubic")


class TestView:
    def test_pixels_depend_on_the_number_alone(self, image_folder):
        transform = v2.Compose([v2.RandomCrop(12), v2.Resize(16), TrainTransform(16)])
        rows = view(image_folder, transform)
        before = torch.random.get_rng_state()
        first = [rows[number, 3]["image"] for number in range(8)]
        assert torch.random.get_rng_state().equal(before)
        torch.manual_seed(99)
        assert all(rows[number, 3]["image"].equal(first[number]) for number in reversed(range(8)))
        assert len({image.numpy().tobytes() for image in first}) > 5

    def test_a_failing_transform_names_the_picture(self, image_folder):
        def fail(image):
            raise MemoryError

        with pytest.raises(MemoryError) as caught:
            view(image_folder, fail)[0, 3]
        assert caught.value.__notes__ == [f"The picture was {ImageFolder(image_folder).path(3)}, 16 x 16 pixels."]

    def test_a_picture_that_cannot_be_decoded_for_want_of_memory_is_named(self, image_folder, monkeypatch):
        def fail(*_):
            raise MemoryError

        monkeypatch.setattr(decoding, "_flatten", fail)
        with pytest.raises(MemoryError) as caught:
            view(image_folder)[0, 3]
        assert caught.value.__notes__ == [f"The picture was {ImageFolder(image_folder).path(3)}."]

    def test_more_than_eight_bits_are_not_cut_off(self, image_folder, monkeypatch):
        """From a data set of one's own, which is to deliver grey or RGB."""
        rows = view(image_folder)
        wide = {"image": Image.fromarray(np.full((16, 16), 4000, dtype=np.uint16))}
        monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, index: wide)
        broken = rows[0, 3]["broken"]
        assert len(broken) == 20
        assert "expected pixels of 8 bits, gray or RGB, found mode 'I;16'" in broken[3]

    def test_grey_and_color(self, image_folder):
        grey = TransformedDataset(ImageFolder(image_folder), EvalTransform(16), 1, 16, seed=0)
        assert grey[0, 0]["image"].shape == (1, 16, 16)
        assert view(image_folder)[0, 0]["image"].shape == (3, 16, 16)

    def test_alpha_is_the_fourth_channel_or_white(self, tmp_path):
        Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.png")
        Image.new("L", (16, 16), 51).save(tmp_path / "b.png")
        found = {}
        for channels in (1, 3, 4):
            rows = TransformedDataset(ImageFolder(tmp_path), EvalTransform(16), channels, 16, seed=0)
            found[channels] = [rows[0, index]["image"][:, 3, 3] for index in (0, 1)]
        torch.testing.assert_close(found[1], [torch.ones(1), torch.full((1,), -0.6)])
        torch.testing.assert_close(found[3], [torch.ones(3), torch.full((3,), -0.6)])
        torch.testing.assert_close(found[4][0], torch.tensor([1.0, -1, -1, -1]))
        torch.testing.assert_close(found[4][1], torch.tensor([-0.6, -0.6, -0.6, 1]))

    def test_pictures_of_another_number_of_channels_are_refused_at_once(self, image_folder, monkeypatch):
        monkeypatch.setattr(ImageFolder, "__getitem__", lambda *_: {"image": np.zeros((16, 16, 5), np.uint8)})
        rows = TransformedDataset(ImageFolder(image_folder), EvalTransform(16), 5, 16, seed=0)
        assert rows[0, 0]["image"].shape == (5, 16, 16)
        for channels in (1, 4):
            rows = TransformedDataset(ImageFolder(image_folder), EvalTransform(16), channels, 16, seed=0)
            with pytest.raises(ConfigError, match=rf"expected pixels \(H,W,{channels}\) .* found \(16, 16, 5\)"):
                rows[0, 0]

    def test_a_transform_that_gives_something_else(self, image_folder):
        with pytest.raises(ConfigError, match=r"made \(3, 8, 8\) torch.float32 of .*\.png; expected \(3, 16, 16\)"):
            view(image_folder, EvalTransform(8))[0, 0]
        to_bytes = v2.Compose([v2.Resize(16), v2.ToImage()])
        with pytest.raises(ConfigError, match="uint8"):
            view(image_folder, to_bytes)[0, 0]

    def test_collate(self, image_folder):
        rows = view(image_folder)
        batch = collate([rows[number, number % 20] for number in (5, 31)])
        assert batch["image"].shape == (2, 3, 16, 16)
        assert batch["class_label"].tolist() == [0, 1]
        assert batch["class_label"].dtype == torch.int64
        assert batch["sample_number"].tolist() == [5, 31]
        assert batch["sample_number"].dtype == np.int64
        assert batch["broken"] == {}
        assert "caption" not in batch


class TestBrokenImages:
    @pytest.fixture
    def damaged(self, tmp_path):
        """Ten images, of which 3, 4 and 9 are broken."""
        for index in range(10):
            path = tmp_path / f"{index}.png"
            Image.new("RGB", (16, 16), (index, 0, 0)).save(path)
            if index in (3, 4, 9):
                path.write_bytes(path.read_bytes()[:40])
        return tmp_path

    def test_the_next_readable_image_takes_the_place(self, damaged):
        rows = view(damaged, EvalTransform(16))
        delivered = [round(float((rows[0, index]["image"][0, 0, 0] + 1) * 127.5)) for index in range(10)]
        assert delivered == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
        assert list(rows[0, 3]["broken"]) == [3, 4]

    def test_each_is_reported_once_with_its_path(self, damaged, caplog):
        broken, rows = BrokenImages(10, allowed=0.3), view(damaged)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                batch = collate([rows[0, index] for index in range(10)])
                broken.check(batch)
                assert "broken" not in batch
        assert len(caplog.messages) == 3
        assert "3.png: cannot be read" in caplog.messages[0]
        assert "(1 so far)" in caplog.messages[0]

    def test_too_many(self, damaged):
        broken, rows = BrokenImages(10, allowed=0.2), view(damaged)
        broken.check(collate([rows[0, 3]]))
        with pytest.raises(DataError, match=r"3 of 10 .* fraction of 0\.2 .*max_broken.*9\.png"):
            broken.check(collate([rows[0, 9]]))

    def test_nothing_readable(self, damaged):
        for path in damaged.iterdir():
            path.write_bytes(b"")
        batch = collate([view(damaged, patience=4)[0, 0]])
        assert len(batch["broken"]) == 4
        with pytest.raises(DataError, match="4 of 10 images are broken"):
            BrokenImages(10, allowed=1.0).check(batch)


def test_the_color_of_what_is_transparent_does_not_reach_its_neighbors():
    """Half of it opaque red, the other half of no color and no opacity: red stays red up to the last pixel."""
    image = Image.new("RGBA", (64, 64))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    pixels = transformed(image, EvalTransform(6), 4, "icon.png")
    assert pixels.shape == (4, 6, 6)
    visible = pixels[3] > -0.9
    assert (pixels[0][visible] > 0.98).all()
    assert visible[:, :3].all()
