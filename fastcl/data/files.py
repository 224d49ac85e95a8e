"""MNIST, CIFAR, STL-10 and folders of images, read from the files as their authors publish them.

The files lie where torchvision puts them (``MNIST/raw``, ``cifar-10-batches-py``,
``cifar-100-python``, ``stl10_binary``), but torchvision is not needed: the formats are a header
and bytes, and it does not import beside a CPU build of PyTorch. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastcl.data.splits import Split, Splits, divide

Images = tuple[torch.Tensor, torch.Tensor]  # [N, C, H, W] uint8, [N] int64

_DIGITS = tuple(str(digit) for digit in range(10))
_VALIDATION_SHARE = 10  # one in ten training images
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"}


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's idx format, gzipped (``.gz`` beside ``path``) or plain.

    Raises:
        FileNotFoundError: neither is there. ValueError: not an idx file of bytes, or cut short.
    """
    packed = path.with_name(path.name + ".gz")
    if path.exists():
        content = path.read_bytes()
    else:
        try:
            content = gzip.decompress(_bytes(packed, path))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{packed}: expected a gzipped file ({error})") from error
    zeros, kind, dimensions = content[:2], content[2:3], int.from_bytes(content[3:4], "big")
    if zeros != b"\0\0" or kind != b"\x08":
        raise ValueError(f"{path}: expected an idx file of unsigned bytes, got {content[:4]!r}")
    header = 4 + 4 * dimensions
    if not dimensions or len(content) < header:
        raise ValueError(f"{path}: expected a header of an idx file, got {len(content)} bytes")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    return _reshaped(content[header:], shape, path)


def read_cifar(path: Path) -> dict:
    """One batch of CIFAR's Python version: ``data`` [N, 3072] and lists of labels.

    Raises:
        FileNotFoundError: it is not there. ValueError: a pickle of anything else.
    """
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        return {key.decode(): value for key, value in batch.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path}: expected a batch of CIFAR's Python version ({error})") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain Python values; a pickle that asks for anything else is refused,
    since it could run whatever it likes."""

    def find_class(self, module: str, name: str):
        allowed = {"_reconstruct", "ndarray", "dtype"}
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name in allowed:
                return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        elif (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_stl10_images(path: Path) -> np.ndarray:
    """Images [N, 3, 96, 96] of STL-10's binary files, mapped from the disk.

    The files hold each channel column by column; what is returned is row by row.

    Raises:
        FileNotFoundError: it is not there. ValueError: not a multiple of an image's 27648 bytes.
    """
    size = path.stat().st_size
    if size == 0 or size % (3 * 96 * 96):
        raise ValueError(f"{path}: expected a multiple of 27648 bytes (3 x 96 x 96), got {size}")
    return np.memmap(path, np.uint8, "r", shape=(size // 27648, 3, 96, 96)).transpose(0, 1, 3, 2)


def mnist(root: Path, seed: int) -> Splits:
    """MNIST: 60000 training and 10000 test images [1, 28, 28], from ``root``/MNIST/raw."""
    folder = root / "MNIST" / "raw"

    def part(name: str) -> Images:
        images, labels = (
            torch.from_numpy(_dimensions(read_idx(folder / f"{name}-{what}-ubyte"), number, folder))
            for what, number in (("images-idx3", 3), ("labels-idx1", 1))
        )
        return images.unsqueeze(1), _checked(labels.long(), images, folder, len(_DIGITS))

    return _splits(part("train"), part("t10k"), _DIGITS, "MNIST", seed)


def cifar10(root: Path, seed: int) -> Splits:
    """CIFAR-10: 50000 training and 10000 test images [3, 32, 32], from
    ``root``/cifar-10-batches-py."""
    folder = root / "cifar-10-batches-py"
    train = _cifar([folder / f"data_batch_{number}" for number in range(1, 6)], "labels", 10)
    test = _cifar([folder / "test_batch"], "labels", 10)
    return _splits(train, test, _names(folder / "batches.meta", "label_names"), "CIFAR-10", seed)


def cifar100(root: Path, seed: int) -> Splits:
    """CIFAR-100 with its 100 fine labels, from ``root``/cifar-100-python."""
    folder = root / "cifar-100-python"
    train, test = (_cifar([folder / name], "fine_labels", 100) for name in ("train", "test"))
    return _splits(train, test, _names(folder / "meta", "fine_label_names"), "CIFAR-100", seed)


def stl10(root: Path, seed: int) -> Splits:
    """STL-10: 5000 training, 8000 test and 100000 unlabelled images [3, 96, 96].

    From ``root``/stl10_binary; without unlabeled_X.bin there are none. They take 2.8 GB.
    """
    folder = root / "stl10_binary"

    def part(name: str) -> Images:
        images = torch.from_numpy(np.ascontiguousarray(read_stl10_images(folder / f"{name}_X.bin")))
        labels = np.frombuffer((folder / f"{name}_y.bin").read_bytes(), np.uint8).astype(np.int64)
        return images, _checked(torch.from_numpy(labels) - 1, images, folder, 10)

    names = tuple((folder / "class_names.txt").read_text().split())
    unlabelled = None
    if (folder / "unlabeled_X.bin").exists():
        mapped = read_stl10_images(folder / "unlabeled_X.bin")
        unlabelled = torch.from_numpy(np.ascontiguousarray(mapped))
    return _splits(part("train"), part("test"), names, "STL-10", seed, unlabelled)


def image_folder(root: Path, seed: int, image_size: int = 64) -> Splits:
    """A folder ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (``val`` will do), colour, resized.

    The shorter side becomes ``image_size`` and the middle is cut out. All images are held in
    memory, 3 bytes a pixel.

    Raises:
        FileNotFoundError: no such folders. ValueError: no images, or other classes in ``test``.
    """
    held_out = root / "test" if (root / "test").is_dir() else root / "val"
    classes = _classes(root / "train")
    if (others := _classes(held_out)) != classes:
        raise ValueError(f"{held_out}: expected the classes of train, {classes}, got {others}")
    train, test = (_read_folder(part, classes, image_size) for part in (root / "train", held_out))
    return _splits(train, test, classes, f"images of {root}", seed)


DATA_SETS: dict[str, Callable[[Path, int], Splits]] = {
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "folder": image_folder,
}
"""Readers by name; each takes the folder of the data and the seed that divides training from
validation images (one in ten)."""


def _bytes(path: Path, wanted: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(2, "expected this file or the same with .gz", str(wanted))
    return path.read_bytes()


def _reshaped(content: bytes, shape: tuple[int, ...], path: Path) -> np.ndarray:
    values = np.frombuffer(content, np.uint8)
    if len(values) != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} values, got {len(values)}")
    return values.reshape(shape).copy()


def _dimensions(values: np.ndarray, number: int, folder: Path) -> np.ndarray:
    if values.ndim != number:
        raise ValueError(
            f"{folder}: expected images of 3 dimensions and labels of 1, got shape "
            f"{values.shape} for one of {number}"
        )
    return values


def _cifar(paths: list[Path], key: str, classes: int) -> Images:
    images, labels = [], []
    for path in paths:
        batch = read_cifar(path)
        data = batch.get("data")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise ValueError(f"{path}: expected data of N x 3072 bytes, got keys {list(batch)}")
        images.append(data.reshape(-1, 3, 32, 32))
        labels += _entry(batch, key, int, path)
    folder = paths[0].parent
    whole = np.concatenate(images)
    return torch.from_numpy(whole), _checked(torch.tensor(labels), whole, folder, classes)


def _names(path: Path, key: str) -> tuple[str, ...]:
    return tuple(name.decode() for name in _entry(read_cifar(path), key, bytes, path))


def _entry(batch: dict, key: str, kind: type, path: Path) -> list:
    values = batch.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{path}: expected {key}, a list of {kind.__name__}, in {list(batch)}")
    return values


def _checked(labels: torch.Tensor, images, folder: Path, classes: int) -> torch.Tensor:
    if len(labels) != len(images):
        raise ValueError(f"{folder}: expected a label per image, got {len(labels)}, {len(images)}")
    outside = int(((labels < 0) | (labels >= classes)).sum())
    if outside:
        raise ValueError(f"{folder}: expected labels of {classes} classes, got {outside} others")
    return labels


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileNotFoundError(2, "expected a folder with one folder per class", str(folder))
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def _read_folder(folder: Path, classes: tuple[str, ...], size: int) -> Images:
    from PIL import Image, ImageOps

    paths = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not paths:
        raise ValueError(f"{folder}: expected images in its classes' folders, got none")
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for row, (path, _) in enumerate(paths):
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            raise ValueError(f"{path}: expected an image ({error})") from error
        images[row] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
    return images, torch.tensor([label for _, label in paths])


def _splits(
    train: Images, test: Images, classes: tuple[str, ...], name: str, seed: int,
    unlabelled: torch.Tensor | None = None,
) -> Splits:  # fmt: skip
    count = len(train[0])
    kept, validation = divide(*train, max(1, count // _VALIDATION_SHARE), seed)
    tested = Split(*test, np.arange(count, count + len(test[0])))
    return Splits(kept, validation, tested, classes, name, unlabelled)
