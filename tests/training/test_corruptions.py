"""The common corruptions: within rounding of an independent package where it is installed, and what each must do."""

import numpy as np
import pytest
from scipy import ndimage

from gradaug_kernels.evaluate.corruptions import COMMON, CONSTANTS, EXTRA, SEVERITIES, corrupt
from gradaug_kernels.evaluate.corruptions._filters import plasma

ALL = (*COMMON, *EXTRA)


def picture(size, channels=3, seed=0):
    """Smooth patches of all brightnesses: uint8 [size, size, channels]."""
    x = ndimage.gaussian_filter(np.random.RandomState(seed).rand(size, size, channels), (3, 3, 0))
    return (255 * (x - x.min()) / (x.max() - x.min())).astype(np.uint8)


@pytest.fixture(scope="module")
def package():
    """imagecorruptions, which has ImageNet-C's constants only, made to run with today's NumPy and scikit-image."""
    package = pytest.importorskip("imagecorruptions", reason="imagecorruptions is not installed")
    from skimage.filters import gaussian

    def with_channels(*args, multichannel=False, **kwargs):
        return gaussian(*args, channel_axis=-1 if multichannel else None, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float_", np.float64, raising=False)  # a name that NumPy 2 removed
        patch.setattr(package.corruptions, "gaussian", with_channels)
        yield package


# Its impulse noise draws from a generator of its own, its frost is photographs, its elastic transform is another.
COMPARED = [name for name in ALL if name not in ("impulse_noise", "frost", "elastic_transform", "snow", "spatter")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", COMPARED)
def test_within_rounding_of_an_independent_package(package, name):
    image = picture(96)
    for severity in SEVERITIES:
        np.random.seed(severity)
        expected = package.corrupt(image, severity=severity, corruption_name=name).astype(int)
        actual = corrupt(image, name, severity, np.random.RandomState(severity)).astype(int)
        assert np.abs(actual - expected).max() <= 1, severity


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "severities"), [("snow", (2, 3)), ("spatter", SEVERITIES)])
def test_near_an_independent_package(package, name, severities):
    """Snow: where that package's zoom, which is not centred, has nothing to cut. Spatter: exactly for mud; for water it
    measures distances in steps of a 5x5 mask, this package exactly."""
    image = picture(64)
    for severity in severities:
        np.random.seed(severity)
        expected = package.corrupt(image, severity=severity, corruption_name=name).astype(int)
        difference = np.abs(corrupt(image, name, severity, np.random.RandomState(severity)).astype(int) - expected)
        if name == "snow" or severity >= 4:
            assert difference.max() <= 1, severity
        else:
            assert difference.mean() < 2, severity
            assert np.abs(expected - image.astype(int)).mean() > 2 * difference.mean(), severity


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("name", ALL)
def test_shape_determinism_and_severity(name, constants):
    image = picture(32)
    results = [corrupt(image, name, severity, np.random.RandomState(1), constants) for severity in SEVERITIES]
    for severity, result in zip(SEVERITIES, results, strict=True):
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        again = corrupt(image, name, severity, np.random.RandomState(1), constants)
        assert np.array_equal(result, again), severity
    change = [np.abs(result.astype(int) - image).mean() for result in results]
    assert change[-1] > 0.5
    if name not in ("saturate", "elastic_transform", "spatter", "snow"):  # not one after the other in strength
        assert change[-1] > change[0]
    grey = picture(32, 1)
    assert corrupt(grey, name, 3, np.random.RandomState(1), constants).shape == (32, 32, 1)


def test_the_constants_differ():
    image = picture(32)
    noise = {c: corrupt(image, "gaussian_noise", 1, np.random.RandomState(0), c).astype(int) - image for c in CONSTANTS}
    inside = (image > 80) & (image < 175)  # nothing is clipped
    assert noise["imagenet"][inside].std() == pytest.approx(255 * 0.08, rel=0.05)
    assert noise["cifar"][inside].std() == pytest.approx(255 * 0.04, rel=0.05)


def test_impulse_noise_hits_as_many_values_as_it_says():
    image = np.full((100, 100, 3), 128, np.uint8)
    noisy = corrupt(image, "impulse_noise", 5, np.random.RandomState(0))
    assert (noisy != 128).mean() == pytest.approx(0.27, abs=0.01)
    assert (noisy == 255).mean() == pytest.approx(0.135, abs=0.01)
    assert set(np.unique(noisy)) == {0, 128, 255}


def test_contrast_and_a_white_image():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = 200
    faint = corrupt(image, "contrast", 1, np.random.RandomState(0), "cifar")
    assert np.unique(faint).tolist() == [25, 175]  # 100 -+ 0.75 * 100
    white = np.full((32, 32, 3), 255, np.uint8)
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "pixelate", "brightness", "gaussian_blur"):
        assert (corrupt(white, name, 3, np.random.RandomState(0)) >= 254).all(), name


def test_an_elastic_transform_moves_three_points():
    """Severity 1 of CIFAR-C has no local displacement: an affine map, which keeps straight lines and ratios."""
    rows, columns = np.mgrid[:64, :64]
    ramps = np.stack([2 * rows + 60, 2 * columns + 60, rows + columns + 60], axis=2).astype(np.uint8)
    moved = corrupt(ramps, "elastic_transform", 1, np.random.RandomState(3), "cifar").astype(float)[12:52, 12:52]
    r, c = rows[12:52, 12:52].ravel(), columns[12:52, 12:52].ravel()
    design = np.column_stack([r, c, np.ones(r.size)])
    for channel in range(3):
        values = moved[..., channel].ravel()
        fit, *_ = np.linalg.lstsq(design, values, rcond=None)
        assert np.abs(design @ fit - values).max() < 1.5
    sums = (moved[..., 0] + moved[..., 1]) / 2
    assert np.abs(sums - moved[..., 2]).max() <= 1.5
    assert np.abs(moved - ramps[12:52, 12:52]).max() > 3


def test_plasma_is_a_map_of_the_unit_interval_that_wraps_around():
    heights = plasma(64, 2.0, np.random.RandomState(0))
    assert (heights.min(), heights.max()) == (0, 1)
    across = np.abs(heights[:, 0] - heights[:, -1]).mean()
    assert across < 3 * np.abs(np.diff(heights, axis=1)).mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4, 2), np.uint8)}, r"image must be uint8 .*, got uint8 \[4, 4, 2\]"),
        ({"image": np.zeros((4, 4, 3))}, "got float64"),
        ({"name": "rain"}, "corruption must be one of gaussian_noise, .* got rain"),
        ({"severity": 6}, "severity must be from 1 to 5, got 6"),
        ({"constants": "mnist"}, "constants must be one of imagenet, cifar, got mnist"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"image": picture(8), "name": "fog", "severity": 1, "constants": "cifar"} | change
    with pytest.raises(ValueError, match=message):
        corrupt(rng=np.random.RandomState(0), **arguments)
