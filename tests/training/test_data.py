import gzip
import lzma
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

from gradaug_kernels import data
from gradaug_kernels.data import cifar, fashion_mnist
from gradaug_kernels.data._idx import idx_bytes, read_idx
from gradaug_kernels.data.image_data import ImageData
from gradaug_kernels.data.image_folder import Lighting
from gradaug_kernels.data.image_tensors import ImageTensors


def write_fashion_mnist(folder, value, suffix=".gz", count=6):
    """Four IDX files whose pixels all have `value`."""
    folder.mkdir(parents=True, exist_ok=True)
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    for images, targets in fashion_mnist.FILES.values():
        for name, array in ((images, np.full((count, 28, 28), value)), (targets, np.arange(count))):
            with opener(folder / (name + suffix), "wb") as file:
                file.write(idx_bytes(array.astype(np.uint8)))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Fashion-MNIST's places under tmp_path: no package yet, an empty cache, and a recorded download."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "package")

    class Download:
        def __init__(self, root, train, download):
            assert download
            write_fashion_mnist(tmp_path.__class__(root) / "FashionMNIST" / "raw", value=3)

    monkeypatch.setattr(datasets, "FashionMNIST", Download)
    return tmp_path


def pixel(images):
    return int(images.train.images[0, 16, 16, 0])


# ---- Fashion-MNIST


def test_embedded_subset():
    images = data.load("fashion-mnist", source="embedded")
    assert images.classes[9] == "Ankle boot"
    assert (images.channels, images.size) == (1, 32)
    for split, per_class in ((images.train, 400), (images.test, 100)):
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (10 * per_class, 32, 32, 1)
        assert split.targets.bincount().tolist() == [per_class] * 10
        border = F.pad(torch.zeros(28, 28), (2, 2, 2, 2), value=1).bool()
        assert not split.images[:, border].any()
        assert len(split.images.flatten(1).unique(dim=0)) >= 0.99 * len(split)
    files = list(fashion_mnist.EMBEDDED_FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert "Copyright (c) 2017 Zalando SE" in (fashion_mnist.EMBEDDED_FOLDER / "LICENSE").read_text()


@pytest.mark.skipif(
    not fashion_mnist.PACKAGE_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist as the original"
)
def test_embedded_images_are_the_originals():
    for images, targets in fashion_mnist.FILES.values():
        originals = {}
        for image, target in zip(
            *(read_idx(fashion_mnist.PACKAGE_FOLDER / f"{name}.gz") for name in (images, targets)), strict=True
        ):
            originals[image.tobytes()] = target
        embedded = (read_idx(fashion_mnist.EMBEDDED_FOLDER / f"{name}.xz") for name in (images, targets))
        assert all(originals[image.tobytes()] == target for image, target in zip(*embedded, strict=True))


def test_sources_are_used_in_their_order(places):
    def load(**options):
        images = data.load("fashion-mnist", **options)
        return pixel(images), images.origin

    assert load()[1] == "embedded in the package"
    assert load(download=True) == (3, "downloaded by torchvision")
    write_fashion_mnist(places / "package", value=2)
    assert load() == (2, "from Debian's dataset-fashion-mnist")
    assert load(download=True) == (2, "from Debian's dataset-fashion-mnist")
    assert load(source="embedded")[1] == "embedded in the package"
    for value, suffix in ((1, ""), (4, ".gz"), (5, ".xz")):
        given = places / f"given{suffix}"
        write_fashion_mnist(given, value, suffix)
        assert load(root=given) == (value, f"from {given}")
        assert load(root=given, source="embedded") == (value, f"from {given}")


def test_given_folder_in_torchvisions_layout_or_filled_by_a_download(places):
    write_fashion_mnist(places / "given" / "FashionMNIST" / "raw", value=1)
    assert pixel(data.load("fashion-mnist", places / "given")) == 1
    assert pixel(data.load("fashion-mnist", places / "new", download=True)) == 3


def test_package_is_unpacked_once_and_atomically(places, monkeypatch):
    write_fashion_mnist(places / "package", value=2)
    replace = os.replace

    def interrupted(source, target):
        if "t10k" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("fashion-mnist")
    cache = places / "cache" / "gradaug_kernels" / "fashion-mnist"
    assert sorted(path.name for path in cache.iterdir()) == ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    monkeypatch.setattr(os, "replace", replace)
    data.load("fashion-mnist")
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(times) == 4
    assert pixel(data.load("fashion-mnist")) == 2
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times


def test_package_is_read_itself_where_no_cache_can_be_made(places):
    write_fashion_mnist(places / "package", value=2)
    (places / "cache").write_text("a file where the cache folder would be")
    assert pixel(data.load("fashion-mnist")) == 2


def test_incomplete_or_damaged_folder(places):
    with pytest.raises(
        FileNotFoundError, match=r"must hold Fashion-MNIST's four IDX files, got .* without train-images"
    ):
        data.load("fashion-mnist", places / "nowhere")
    folder = places / "given"
    write_fashion_mnist(folder, value=1)
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"t10k-labels.* must be a complete compressed IDX file"):
        data.load("fashion-mnist", folder)
    with gzip.open(path, "wb") as file:
        file.write(b"\0\0\x08\1" + b"\0\0\0\7" + b"123")
    with pytest.raises(ValueError, match="must hold 7 bytes after its header, got 3"):
        data.load("fashion-mnist", folder)
    with gzip.open(path, "wb") as file:
        file.write(b"GIF89a")
    with pytest.raises(ValueError, match="must be an IDX file of unsigned bytes, got first bytes 47494638"):
        data.load("fashion-mnist", folder)
    with gzip.open(path, "wb") as file:
        file.write(idx_bytes(np.arange(6, 12, dtype=np.uint8)))
    with pytest.raises(ValueError, match="must hold one class from 0 to 9 per image"):
        data.load("fashion-mnist", folder)
    with gzip.open(path, "wb") as file:
        file.write(idx_bytes(np.zeros(5, dtype=np.uint8)))
    with pytest.raises(ValueError, match="targets must have 6 entries, one per image, got 5"):
        data.load("fashion-mnist", folder)


def test_unknown_names_and_sources():
    with pytest.raises(ValueError, match='unknown data set "fashion_mnist"; the nearest is "fashion-mnist"'):
        data.load("fashion_mnist")
    with pytest.raises(ValueError, match='source must be "auto" or "embedded", got "web"'):
        data.load("fashion-mnist", source="web")


# ---- images in memory


def numbered(count=10, size=12, channels=2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, size, size, channels), generator=generator, dtype=torch.uint8)
    return ImageTensors(images, torch.arange(count), mean=[0.2] * channels, std=[0.5] * channels)


def test_items_and_batches_are_normalised():
    dataset = numbered()
    expected = (dataset.images.permute(0, 3, 1, 2) / 255 - 0.2) / 0.5
    torch.testing.assert_close(dataset[3][0], expected[3])
    assert dataset[3][1] == 3
    batches = list(dataset.loader(4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(10))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_training_batches_are_padded_crops_and_flips():
    dataset = numbered(count=64)
    offsets, flips = set(), set()
    for images, targets in dataset.loader(64, train=True):
        padded = F.pad(dataset.images.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="reflect") / 255
        for image, target in zip(images, targets, strict=True):
            pixels = image * 0.5 + 0.2
            found = [
                (dy, dx, flip)
                for dy in range(9)
                for dx in range(9)
                for flip in (False, True)
                if torch.allclose(
                    padded[target, :, dy : dy + 12, dx : dx + 12], pixels.flip(2) if flip else pixels, atol=1e-5
                )
            ]
            assert len(found) == 1
            offsets.add(found[0][:2])
            flips.add(found[0][2])
    assert len(offsets) > 30  # of 81, in 64 draws
    assert flips == {True, False}


def test_epochs_depend_on_seed_and_epoch_alone():
    dataset = numbered()

    def epoch(seed, number, before=()):
        loader = dataset.loader(3, train=True, seed=seed)
        for earlier in before:
            loader.set_epoch(earlier)
            list(loader)
        loader.set_epoch(number)
        torch.rand(5)  # the global generator has no part in it
        images, targets = zip(*loader, strict=True)
        assert all(len(batch) == 3 for batch in targets)
        assert len(set(torch.cat(targets).tolist())) == 9
        return torch.cat(images)

    assert torch.equal(epoch(0, 2), epoch(0, 2, before=(0, 1)))
    assert not torch.equal(epoch(0, 2), epoch(0, 1))
    assert not torch.equal(epoch(0, 2), epoch(1, 2))


def test_batch_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        numbered().loader(0)
    with pytest.raises(ValueError, match="batch_size must be at most 10, the number of images, got 11"):
        numbered().loader(11, train=True)
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, C\], got torch.float32"):
        ImageTensors(torch.zeros(2, 8, 8, 1), torch.zeros(2), [0.0], [1.0])
    with pytest.raises(ValueError, match="mean and std must have 1 entries, got 2 and 1"):
        ImageTensors(torch.zeros(2, 8, 8, 1, dtype=torch.uint8), torch.zeros(2), [0.0, 0.0], [1.0])


def test_held_out_images_are_training_images():
    images = data.load("fashion-mnist", source="embedded")
    held = images.hold_out(500, seed=1)
    assert (len(held.train), len(held.test)) == (3500, 500)
    together = torch.cat([held.train.images, held.test.images]).flatten(1)
    assert torch.equal(together.long().sum(1).sort().values, images.train.images.flatten(1).long().sum(1).sort().values)
    assert torch.equal(held.test.images, images.hold_out(500, seed=1).test.images)
    with pytest.raises(ValueError, match="holdout must be between 1 and 3999 training images, got 4000"):
        images.hold_out(4000)


# ---- CIFAR


def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch):
    seen = []

    class Stub:
        base_folder, classes = "cifar-100-python", ["apple", "bear"]

        def __init__(self, root, train, download):
            seen.append((root, train, download))
            self.data = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = [0, 1] * (2 if train else 1)

    monkeypatch.setattr(datasets, "CIFAR100", Stub)
    images = data.load("cifar100", tmp_path / "cifar-100-python", download=True)
    assert seen == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    assert (len(images.train), len(images.test), images.channels, images.size) == (4, 2, 3, 32)
    assert images.classes == ("apple", "bear")
    assert images.train[1][1] == 1
    expected = (7 / 255 - torch.tensor(cifar.STATISTICS["cifar100"][0])) / torch.tensor(cifar.STATISTICS["cifar100"][1])
    torch.testing.assert_close(images.test[0][0][:, 5, 5], expected)


def test_cifar_that_is_not_there(tmp_path):
    message = f"must hold cifar-10-batches-py, undamaged, got {tmp_path} without it; data.download=true fetches it"
    with pytest.raises(FileNotFoundError, match=message):
        data.load("cifar10", tmp_path)


# ---- folders of images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def test_image_folder(folder):
    images = data.load("image_folder", folder, size=28)
    assert images.classes == ("cat", "dog")
    assert (len(images.train), len(images.test)) == (6, 2)
    assert [len(targets) for _, targets in images.train.loader(4, train=True)] == [4]
    for batch, targets in images.test.loader(4):
        assert batch.shape == (2, 3, 28, 28)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert targets.tolist() == [0, 1]
        assert torch.equal(batch[1], images.test[1][0])


def test_image_folder_epochs_depend_on_seed_and_epoch_alone(folder):
    images = data.load("image_folder", folder, size=28)

    def epochs(*numbers, seed=0, workers=0):
        loader = images.train.loader(2, train=True, seed=seed, workers=workers)
        for number in numbers:
            loader.set_epoch(number)
            batches = [batch for batch, _ in loader]
        return torch.cat(batches)

    state = torch.get_rng_state()
    expected = epochs(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.rand(1)
    assert torch.equal(epochs(0, 1), expected)
    assert torch.equal(epochs(0, 1, workers=2), expected)
    assert not torch.equal(epochs(0), expected)
    assert not torch.equal(epochs(1, seed=1), expected)


def test_lighting_adds_the_published_noise():
    torch.manual_seed(0)
    shifts = torch.stack([Lighting(0.1)(torch.zeros(3, 2, 2))[:, 0, 0] for _ in range(4000)])  # [4000, 3]
    vectors, values = torch.tensor(Lighting.EIGENVECTORS), torch.tensor(Lighting.EIGENVALUES)
    covariance = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(shifts.T.cov(), covariance, rtol=0.1, atol=1e-6)
    assert torch.equal(Lighting(0.0)(torch.ones(3, 2, 2)), torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match=r"image must be floating point in \[0, 1\], got torch.uint8"):
        Lighting(0.1)(torch.zeros(3, 2, 2, dtype=torch.uint8))


def test_folders_without_images(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be given its data folder \(--data FOLDER\), got none"):
        data.load("image_folder")
    with pytest.raises(
        FileNotFoundError, match=f"must hold train/<class>/<image files>, got no folder {tmp_path}/train"
    ):
        data.load("image_folder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="train must hold one folder of images per class, got no class folder"):
        data.load("image_folder", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match="train must hold one folder of images per class, got none in cat"):
        data.load("image_folder", tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_text("not a PNG file")
    (tmp_path / "val").symlink_to(folder / "val")
    with pytest.raises(ValueError, match="must hold the same classes, got dog in one only"):
        data.load("image_folder", tmp_path)
    (tmp_path / "val").unlink()
    (tmp_path / "test").symlink_to(tmp_path / "train")
    images = data.load("image_folder", tmp_path)
    with pytest.raises(ValueError, match=r"every image file must be readable, got .*0\.png"):
        images.train[0]


# ---- parts of the training images


def unbalanced():
    targets = torch.tensor([0] * 30 + [1] * 10 + [2] * 20)
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 2, 2, 1)
    split = ImageTensors(images, targets, (0.5,), (0.5,))
    return ImageData("numbered", "made here", ("a", "b", "c"), 1, 2, split, split)


def numbers(data):
    return data.train.images[:, 0, 0, 0].tolist()


def test_a_fraction_takes_the_same_part_of_each_class():
    data = unbalanced()
    half = data.part(0.5, seed=3)
    assert half.train.targets.bincount().tolist() == [15, 5, 10]
    assert len(set(numbers(half))) == 30
    assert len(half.test) == 60
    assert numbers(data.part(0.5, seed=3)) == numbers(half)
    assert numbers(data.part(0.5, seed=4)) != numbers(half)
    assert set(numbers(data.part(0.2, seed=3))) < set(numbers(half)), "a larger part contains the smaller"
    assert data.part() is data


def test_so_many_images_of_each_class():
    part = unbalanced().part(per_class=7)
    assert part.train.targets.bincount().tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match=r"must be at most 10, the images of class b, got 11"):
        unbalanced().part(per_class=11)
    with pytest.raises(ValueError, match=r"must be at least 1 per class, got 0"):
        unbalanced().part(0.04)


def test_a_part_of_a_folder(folder):
    part = data.load("image_folder", folder, size=28).part(per_class=2)
    assert part.train.targets.tolist() == [0, 0, 1, 1]
    assert [part.train[i][1] for i in range(4)] == [0, 0, 1, 1]
