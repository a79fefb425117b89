"""The sub-networks' named transforms: shape and range are kept, and each image has draws of its own."""

import pytest
import torch

from gradaug_kernels.recipes.transforms import NAMES, OnPixels, named_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_named_transform(name, channels):
    torch.manual_seed(0)
    mean, std = torch.tensor(MEAN[:channels])[:, None, None], torch.tensor(STD[:channels])[:, None, None]
    image = (torch.rand(channels, 16, 16) - mean) / std
    images = image.expand(6, -1, -1, -1)
    transformed = named_transform(name, 16, MEAN[:channels], STD[:channels])(images)
    assert transformed.shape == images.shape
    assert transformed.is_contiguous(memory_format=torch.channels_last)
    assert len({tuple(row.flatten().tolist()) for row in transformed}) > 1
    if name.endswith("augment"):
        pixels = transformed * std + mean
        assert pixels.min() > -1e-6
        assert pixels.max() < 1 + 1e-6


def test_pixels_are_what_normalisation_made_of_them():
    pixels = torch.randint(256, (3, 5, 5), dtype=torch.uint8)
    seen = []

    def record(image):
        seen.append(image)
        return 255 - image

    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    inverted = OnPixels(record, MEAN, STD)((pixels / 255 - mean) / std)
    assert torch.equal(seen[0], pixels)
    torch.testing.assert_close(inverted, ((255 - pixels) / 255 - mean) / std)
