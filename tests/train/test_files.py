"""Data sets in their authors' own formats, written here in small."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl.data.files import cifar10, cifar100, image_folder, mnist, read_idx, stl10

GENERATOR = np.random.default_rng(0)


def write_idx(path, array, packed):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    if packed:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content)
    path.write_bytes(content)


def write_mnist(root, packed=False):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    made = {}
    for name, count in (("train", 40), ("t10k", 7)):
        pictures = GENERATOR.integers(0, 256, (count, 28, 28))
        labels = np.arange(count) % 10
        write_idx(folder / f"{name}-images-idx3-ubyte", pictures, packed)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels, packed)
        made[name] = pictures, labels
    return folder, made


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, packed):
    _, made = write_mnist(tmp_path, packed)
    splits = mnist(tmp_path, seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [36, 4, 7]
    pictures, labels = made["train"]
    for split in (splits.train, splits.validation):
        assert split.images.dtype == torch.uint8
        assert np.array_equal(split.images[:, 0].numpy(), pictures[split.indices])
        assert np.array_equal(split.labels.numpy(), labels[split.indices])
    assert np.array_equal(splits.test.images[:, 0].numpy(), made["t10k"][0])
    together = np.concatenate([splits.train.indices, splits.validation.indices])
    assert np.array_equal(np.sort(together), np.arange(40))
    other = mnist(tmp_path, seed=1)
    assert not np.array_equal(other.validation.indices, splits.validation.indices)
    assert torch.equal(other.test.images, splits.test.images)


def test_damaged_idx_files_are_named(tmp_path):
    folder, _ = write_mnist(tmp_path)
    images = folder / "train-images-idx3-ubyte"
    content = images.read_bytes()
    images.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: expected 31360 values, got"):
        mnist(tmp_path, 0)
    images.write_bytes(b"\0\0\x0d\x03" + content[4:])  # floats
    with pytest.raises(ValueError, match="expected an idx file of unsigned bytes"):
        read_idx(images)
    images.unlink()
    with pytest.raises(FileNotFoundError, match=r"this file or the same with .gz.*train-images"):
        mnist(tmp_path, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:9], "header of an idx file, got 9 bytes"),  # within a dimension
        (lambda content: content[:4], "header of an idx file"),
        (lambda content: gzip.compress(content)[:-3], r"\.gz: expected a gzipped file \(Com"),
        (lambda content: b"<html>", r"\.gz: expected a gzipped file \(Not a gzipped file"),
        (lambda content: content[:3] + b"\1" + content[4:8] + content[-40:], "images of 3"),
    ],
)  # fmt: skip
def test_cut_and_foreign_idx_files_are_named(tmp_path, damage, message):
    folder, _ = write_mnist(tmp_path)
    images = folder / "train-images-idx3-ubyte"
    damaged = damage(images.read_bytes())
    images.unlink()
    packed = ".gz" if "gz" in message else ""
    images.with_name(images.name + packed).write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path, 0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8)}, "data_batch_2: expected labels, a list of int"),
        ({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 0]}, "data_batch_2: expected data"),
        ({b"data": np.zeros((1, 3072)), b"labels": [0]}, "data_batch_2: expected data of N x"),
        ({b"labels": [0, 0]}, "data_batch_2: expected data of N x 3072"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "labels of 10 classes, got 1"),
    ],
)  # fmt: skip
def test_foreign_cifar_batches_are_named(tmp_path, batch, message):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for n in range(1, 6):
        write_cifar(folder / f"data_batch_{n}", b"labels", 12)
    (folder / "data_batch_2").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=message):
        cifar10(tmp_path, 0)


def write_cifar(path, key, count):
    pictures = GENERATOR.integers(0, 256, (count, 3072)).astype(np.uint8)
    labels = [int(label) for label in np.arange(count) % 10]
    batch = {b"data": pictures, key: labels, b"filenames": [b"x.png"] * count}
    path.write_bytes(pickle.dumps(batch, protocol=2))
    return pictures.reshape(-1, 3, 32, 32), labels


def test_cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    parts = [write_cifar(folder / f"data_batch_{n}", b"labels", 12) for n in range(1, 6)]
    pictures, _ = write_cifar(folder / "test_batch", b"labels", 5)
    names = [b"plane", b"car"]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    splits = cifar10(tmp_path, 0)
    every = np.concatenate([part[0] for part in parts])
    assert np.array_equal(splits.train.images.numpy(), every[splits.train.indices])
    assert np.array_equal(splits.train.labels.numpy(), splits.train.indices % 12 % 10)
    assert np.array_equal(splits.test.images.numpy(), pictures)
    assert splits.classes == ("plane", "car")
    assert (splits.channels, splits.image_size) == (3, (32, 32))
    assert (len(splits.train), len(splits.validation)) == (54, 6)


def test_cifar100_reads_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        write_cifar(folder / name, b"fine_labels", 20)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple"]}, protocol=2))
    assert cifar100(tmp_path, 0).test.labels.tolist() == [*range(10), *range(10)]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_1: expected a batch .* asks for \w+.open"):
        cifar10(tmp_path, 0)
    assert not (tmp_path / "opened").exists()


def test_stl10_is_stored_column_by_column_with_labels_from_one(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    made = {}
    for name, count in (("train", 12), ("test", 3), ("unlabeled", 5)):
        made[name] = GENERATOR.integers(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        (folder / f"{name}_X.bin").write_bytes(made[name].transpose(0, 1, 3, 2).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(label % 2 + 1 for label in range(count)))
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    splits = stl10(tmp_path, 0)
    assert np.array_equal(splits.test.images.numpy(), made["test"])
    assert splits.test.labels.tolist() == [0, 1, 0]
    assert np.array_equal(splits.train.images.numpy(), made["train"][splits.train.indices])
    assert np.array_equal(splits.pretraining.numpy(), made["unlabeled"])
    assert splits.classes == ("airplane", "bird")
    (folder / "unlabeled_X.bin").unlink()
    assert torch.equal(stl10(tmp_path, 0).pretraining, splits.train.images)
    (folder / "test_y.bin").write_bytes(b"\0\1\1")  # what torchvision calls unlabelled
    with pytest.raises(ValueError, match=r"stl10_binary: expected labels of 10 classes, got 1 "):
        stl10(tmp_path, 0)
    (folder / "test_X.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"test_X.bin: expected a multiple of 27648 bytes"):
        stl10(tmp_path, 0)


def test_image_folder(tmp_path):
    for part, count in (("train", 10), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                shade = Image.new("RGB", (40 + number, 20), (200 * label, 0, 100))
                shade.save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    splits = image_folder(tmp_path, 0, image_size=16)
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 4)
    assert splits.test.images.shape == (4, 3, 16, 16)
    assert splits.test.images[:, :, 8, 8].tolist() == [[0, 0, 100]] * 2 + [[200, 0, 100]] * 2
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    damaged = tmp_path / "train" / "dog" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"3.png: expected an image \(image file is truncated"):
        image_folder(tmp_path, 0)
    (tmp_path / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"val: expected the classes of train, \('cat', 'dog'\)"):
        image_folder(tmp_path, 0)


def test_a_method_learns_from_such_files(tmp_path):
    """SimCLR on colour images from CIFAR's files, ResNet and colour recipe included."""
    from rich.console import Console

    from fastcl.trainers import METHODS, run

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        write_cifar(folder / name, b"labels", 20)
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"x"] * 10}, protocol=2))
    options = METHODS["simclr"].options(
        data="cifar10", data_root=str(tmp_path), recipe="simclr", encoder="resnet18",
        stem="imagenet", epochs=1, batch_size=16, warmup_epochs=0, label_draws=1, knn_every=9,
    )  # fmt: skip
    report = run("simclr", options, seeds=[0], out=tmp_path / "out", console=Console(quiet=True))
    assert report.as_json()["data"] == "CIFAR-10, without labels"
    assert "probe@all" in report.results[0].scores["trained"]
    assert "probe@10" not in report.results[0].scores["trained"]  # nine or fewer of a class
