"""What the four scripts share: data sets as tensors, digit accuracy, FID, KID and IS, labelled figures.

  python common.py fid GENERATED REFERENCE      # folders of images; REFERENCE may be pytorch-fid's .npz
  python common.py data OUT [--from DIR]        # the course's layout from the original data sets
  python common.py report OUT                   # OUT/report.html of what run_all.sh left in OUT

A data set is one uint8 tensor (N, 3, H, W) and one int64 tensor (N,) of labels. `load_digits` looks for:

1. the course layout: ROOT/digits/DOMAIN/{data/*.png,train.csv,val.csv} (2022, 2023) or
   ROOT/digits/DOMAIN/{train,test}/*.png + {train,test}.csv (2021); CSV header `image_name,label`;
2. a torchvision root: ROOT/MNIST/raw, usps.bz2 + usps.t.bz2, {train,test}_32x32.mat. MNIST-M is blended
   from MNIST and a folder of photographs (BSDS500 or BSR, or else every *.jpg below ROOT);
3. ROOT = None: built-in data, made in seconds from files that scikit-learn and matplotlib ship.

`load_faces` takes the images of ROOT/face/{train,val} or ROOT/{train,val} (2021: face/test), or draws some.
"""

# SPDX-License-Identifier: MIT
import argparse
import base64
import contextlib
import csv
import functools
import gzip
import hashlib
import html
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from string import Template

import numpy as np
import scipy.special
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import datasets, models
from torchvision.models import inception
from tqdm import tqdm

DOMAINS = ("mnistm", "svhn", "usps")
MAX_PIXELS = 2**24  # of one input image: a PNG of a few kB can unpack to gigabytes
BAR = {"leave": False, "mininterval": 1 if sys.stderr.isatty() else 60}  # in a file a line a minute
NO_PIXELS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # PIL knows these formats and decodes none of them


# ---------------- files ----------------


def write_whole(path, write):
    """Writes a file whole or not at all: write(file) fills a temporary file, which is then renamed.

    Makes the folder. Raises OSError that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is a folder or a device; expected the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason})") from e


def cache_file(name):
    """Path of a file in $XDG_CACHE_HOME or ~/.cache; not absolute where there is no home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "p1-p4-images" / name


def read_cache(path):
    """The arrays of a cache file, or {} where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # numpy and zipfile raise many types
        return {}


def write_cache(path, arrays):
    """Writes a cache file whole or not at all; where that fails nothing is lost but time."""
    if path.is_absolute():
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                np.savez(f"{folder}/cache.npz", **arrays)
                os.replace(f"{folder}/cache.npz", path)


# ---------------- images on disk ----------------


@functools.cache
def image_extensions():
    """The file extensions of all formats that PIL can open, such as .png."""
    extensions = Image.registered_extensions()  # loads all of PIL's formats
    return {extension for extension, name in extensions.items() if name in Image.OPEN.keys() - NO_PIXELS}


def is_image(name):
    """True for the name of an image; hidden files such as ._a.png are none."""
    name = os.path.basename(name)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()


def list_images(folder):
    """Sorted paths of all images in `folder`; one note names and counts what else is there.

    Hidden files do not count. Raises ValueError where there is no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    images = []
    others = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image(entry.name) and entry.is_file():
                images.append(folder / entry.name)
            elif not entry.name.startswith("."):
                others.append(entry.name)
    left_out = f"{len(others)} other entries {shorten(sorted(others))}".strip()
    if not images:
        raise ValueError(f"{folder}: found no image and {left_out}; expected files that PIL can open")
    if others:
        print(f"note: {folder}: {len(images)} images, left out {left_out}", file=sys.stderr)
    return sorted(images)


def shorten(names):
    """The first three names, for messages."""
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def to_rgb(image):
    """Any PIL image in mode RGB, as PIL's convert has it, with its EXIF orientation applied.

    One exception: mode F with all values in [0, 1] is multiplied by 255, because PIL would make it black.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data turn nothing
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        values = np.asarray(image)
        if values.min() >= 0 and values.max() <= 1:
            image = Image.fromarray((values * 255).round().astype(np.uint8))
    return image.convert("RGB")


def read_image(path, size=None):
    """One image file as a uint8 array (H, W, 3), the only way in which images are read here (`to_rgb`).

    `size` = (width, height) resizes (bilinear) images of another size. Raises ValueError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transparent palettes, for instance
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(f"{file.width}x{file.height} pixels, expected at most {MAX_PIXELS}")
                image = to_rgb(file)
    except Exception as e:  # PIL's readers raise many types
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        raise ValueError(f"{path}: cannot be read as an image ({reason}); replace or remove the file") from e
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def read_arrays(paths, size=None):
    """`read_image` of several files, a list; one ValueError counts all damaged ones and names the first."""
    arrays = []
    errors = {}
    for path in paths:
        try:
            arrays.append(read_image(path, size))
        except ValueError as e:
            errors[path] = str(e)
    if errors:
        message = next(iter(errors.values()))
        if len(errors) > 1:
            names = shorten(list(errors))
            message = f"{len(errors)} of {len(paths)} images cannot be read: {names}; the first: {message}"
        raise ValueError(message)
    return arrays


def read_images(paths, size=None):
    """Image files as one uint8 tensor (N, 3, H, W), N > 0; size: as in read_image.

    Raises one ValueError that counts all damaged files, or names two files of different sizes.
    """
    arrays = read_arrays(paths, size)
    for path, array in zip(paths, arrays):
        if array.shape != arrays[0].shape:
            shapes = f"{array.shape[:2]}, {paths[0]} has {arrays[0].shape[:2]}"
            raise ValueError(f"{path}: height and width {shapes}; expected images of one size")
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2)))


def read_folder(folder, names, size):
    """`read_images` of the named files of `folder`, decoded once and then kept in the user's cache."""
    folder = Path(folder).resolve()
    width, height = size
    key = hashlib.sha256(b"reader 2 " + os.fsencode(folder) + f" {size}".encode())
    for name in names:
        stat = os.stat(folder / name)
        key.update(os.fsencode(name) + f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    path = cache_file(f"{key.hexdigest()[:32]}.npz")
    cached = read_cache(path).get("images")
    if cached is not None and cached.shape == (len(names), 3, height, width) and cached.dtype == np.uint8:
        return torch.from_numpy(cached)
    images = read_images([folder / name for name in names], size)
    write_cache(path, {"images": images.numpy()})
    return images


def parse_label(text):
    """The digit that a CSV cell such as `3`, ` 03`, `3.0` or `tensor(3)` means, or None."""
    try:
        value = float(re.sub(r"^tensor\((.*?)(,.*)?\)$", r"\1", text.strip()))
    except ValueError:
        return None
    return int(value) if value in range(10) else None


def read_csv(path, folder):
    """Rows of a course CSV: ([image_name], [digit]).

    Every name must be a plain file name in `folder` and every label a digit; else ValueError with the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise ValueError(f"{path}: cannot be read as CSV ({e})") from e
    if not rows:
        raise ValueError(f"{path}: no rows, expected the header image_name,label and one row per image")
    missing = sorted({"image_name", "label"} - set(rows[0][1]))
    if missing:
        found = f"no column {' and '.join(missing)}; found {','.join(map(str, rows[0][1]))}"
        raise ValueError(f"{path}: {found}, expected image_name,label")
    present = set(os.listdir(folder))
    names = []
    labels = []
    for number, row in rows:
        name = row["image_name"]
        label = parse_label(row["label"] or "")
        if name not in present:  # also refuses ../x.png: only plain names are in a folder's listing
            raise ValueError(f"{path}, line {number}: image {name!r} is not in {folder}")
        if label is None:
            raise ValueError(f"{path}, line {number}: label {row['label']!r}, expected a digit 0-9")
        names.append(name)
        labels.append(label)
    return names, labels


# ---------------- faces ----------------


def load_faces(root, split, size=64):
    """Faces as uint8 (N, 3, size, size); split: train or val.

    root: the course's folder, whose images of another size are resized (bilinear), or None for the built-in
    faces. Raises ValueError where nothing is there.
    """
    if root is not None:
        paths = list_images(face_folder(root, split))
        return read_folder(paths[0].parent, [path.name for path in paths], (size, size))
    faces = builtin_faces(split)
    if size == 64:
        return faces
    return F.interpolate(faces.float(), (size, size), mode="bilinear", antialias=True).round().byte()


def face_folder(root, split):
    """The folder of the course layout that holds the faces of a split; ValueError where there is none."""
    places = [f"face/{split}", split] + (["face/test"] if split == "val" else [])
    for folder in (Path(root) / place for place in places):
        if folder.is_dir() and any(is_image(name) for name in os.listdir(folder)):
            return folder
    looked = f"looked for images in {', '.join(places)}"
    raise ValueError(f"--data {root}: no {split} faces; {looked}; leave --data out for the built-in faces")


# ---------------- digits ----------------


def load_digits(root, domain, split):
    """Digits of one domain as (uint8 (N, 3, 28, 28), int64 (N,)), grey images repeated to three channels.

    root: folder (see the top of this file) or None for the built-in data; domain: mnistm, svhn or usps;
    split: train or val (2021's and torchvision's test part counts as val).
    Raises ValueError with the list of what it looked for where nothing is there.
    """
    if root is None:
        return builtin_digits(domain, split)
    root = Path(root)
    if not root.is_dir():
        advice = f"give the folder that holds digits/{domain}, or leave --data out for the built-in data"
        raise ValueError(f"--data {root}: no such folder; {advice}")
    other = "train" if split == "train" else "test"
    for base in (root / "digits" / domain, root / domain):
        for table, folder in ((f"{split}.csv", "data"), (f"{other}.csv", other)):
            if (base / table).is_file() and (base / folder).is_dir():
                names, labels = read_csv(base / table, base / folder)
                return read_folder(base / folder, names, (28, 28)), torch.tensor(labels)
    try:
        return torchvision_digits(root, domain, split)
    except FileNotFoundError as e:  # nothing of it is there
        parts = {
            "mnistm": "MNIST/raw with BSDS500 or other *.jpg photographs",
            "svhn": f"{other}_32x32.mat",
            "usps": "usps.bz2, usps.t.bz2",
        }
        raise ValueError(
            f"--data {root}: no {domain} {split} images; looked for digits/{domain}/{split}.csv with data/ "
            f"(2022, 2023), digits/{domain}/{other}.csv with {other}/ (2021), {parts[domain]} (torchvision)"
        ) from e
    except Exception as e:  # what the readers of .mat, .bz2 and idx files raise has no common type
        what = f"the {domain} files of the torchvision layout are damaged ({type(e).__name__}: {e})"
        raise ValueError(f"--data {root}: {what}; download them again") from e


def torchvision_digits(root, domain, split, photographs=None):
    """`load_digits` from the files that torchvision.datasets downloads; FileNotFoundError without them.

    photographs: the folder of MNIST-M's photographs; left out: root.
    """
    train = split == "train"
    if domain == "svhn":
        return read_svhn(root / ("train_32x32.mat" if train else "test_32x32.mat"))
    if domain == "usps":
        data = datasets.USPS(str(root), train=train)
        grey = torch.from_numpy(data.data)[:, None].float()
        grey = F.interpolate(grey, (28, 28), mode="bilinear").round().byte()
        return grey.repeat(1, 3, 1, 1), torch.tensor(data.targets)
    if not (root / "MNIST" / "raw").is_dir():
        raise FileNotFoundError(f"no {root / 'MNIST' / 'raw'}")
    data = datasets.MNIST(str(root), train=train)
    return blend(data.data, read_photographs(photographs or root), seed=int(train)), data.targets


def read_svhn(path):
    """SVHN's .mat file as (uint8 (N, 3, 28, 28), int64 (N,))."""
    import scipy.io

    if not path.is_file():
        raise FileNotFoundError(f"no {path}")
    data = scipy.io.loadmat(path)
    images = torch.from_numpy(data["X"]).permute(3, 2, 0, 1).float()  # (N, 3, 32, 32)
    images = F.interpolate(images, (28, 28), mode="bilinear", antialias=True).round().byte()
    return images, torch.from_numpy(data["y"].flatten().astype(np.int64)) % 10  # 0 is written as 10


def read_photographs(folder):
    """BSDS500's photographs below `folder`, or else every *.jpg but CelebA's; list of uint8 (H, W, 3)."""
    files = sorted(folder.glob("BS[DR]*/**/*.jpg"))
    if not files:
        files = [
            path for path in sorted(folder.rglob("*.jpg")) if "celeba" not in str(path.relative_to(folder))
        ]
    photographs = read_arrays([path for path in files if is_image(path)])
    photographs = [photo for photo in photographs if min(photo.shape[:2]) >= 28]
    if not photographs:
        raise FileNotFoundError("no photographs")
    return photographs


def blend(digits, photographs, seed):
    """MNIST-M's recipe: |patch - digit|, a random patch of a random photograph for each digit.

    arXiv 1505.07818, section 5.2. digits: uint8 (N, H, W); photographs: list of uint8 (H', W', 3).
    Returns uint8 (N, 3, H, W).
    """
    rng = np.random.default_rng(seed)
    n, h, w = digits.shape
    out = np.empty((n, h, w, 3), np.uint8)
    for i, digit in enumerate(digits.numpy()):
        photo = photographs[rng.integers(len(photographs))]
        y = rng.integers(photo.shape[0] - h + 1)
        x = rng.integers(photo.shape[1] - w + 1)
        out[i] = np.abs(photo[y : y + h, x : x + w].astype(np.int16) - digit[:, :, None])
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


# ---------------- the course's layout from the original data sets ----------------


BSDS500 = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
# the course's train, val, all
SPLIT = {
    "mnistm": (44_800, 11_200, 70_000),
    "usps": (5_950, 1_488, 9_298),
    "svhn": (63_544, 15_887, 99_289),
    "face": (38_464, 2_025, 42_621),
}


def make_data(out, source=None):
    """Writes the course's layout of 2022 and 2023: OUT/digits/DOMAIN/{data,*.csv}, OUT/face/{train,val,test}.

    Made from MNIST with BSDS500's photographs, USPS, SVHN and CelebA. `source` holds torchvision's files or
    the archives as they are published; left out, they are downloaded into out/downloads.
    The split is seeded, in the course's sizes or, from fewer images, proportions. What the course keeps
    to itself becomes test. A part that is there is not made again. Returns the parts that cannot be made.
    """
    out = Path(out)
    missing = []
    root = Path(source or out / "downloads")
    if source is None:
        check_gdown(out)
    for part in SPLIT:
        folder = out / ("face" if part == "face" else f"digits/{part}")
        if folder.exists():
            print(f"{folder}: is there")
            continue
        partial = folder.with_name(f"{folder.name}.partial")  # renamed when complete
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if source is None:
                download(root, part)
            if part == "face":
                counts = write_faces(partial, find_faces(root, out))
            else:
                counts = write_digits(partial, part, *original_digits(root, out, part))
            os.replace(partial, folder)
            print("{}: {:,} train, {:,} val, {:,} test images".format(folder, *counts))
        except Exception as e:  # no network, a quota, missing or damaged files: the other parts go on
            missing.append(part)
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            advice = "get the files by hand and call again with their folder as --from"
            print(f"{folder}: cannot be made ({reason}); {advice}", file=sys.stderr)
    return missing


def check_gdown(out):
    """Raises ImportError before the first download where CelebA's download would fail."""
    done = (out / "face").exists() or (out / "downloads" / "celeba" / "img_align_celeba").is_dir()
    if not done and importlib.util.find_spec("gdown") is None:
        advice = "pip install gdown, or give the files of all data sets with --from DIR"
        raise ImportError(f"CelebA's download needs gdown: {advice}")


def download(root, part):
    """The part's files from where torchvision has them, with their MD5 checked; complete files are kept."""
    from torchvision.datasets.utils import check_integrity

    if part == "mnistm":
        datasets.MNIST(str(root), download=True)
        if not (root / "BSR_bsds500.tgz").is_file():
            torch.hub.download_url_to_file(BSDS500, str(root / "BSR_bsds500.tgz"))
    elif part == "face":
        datasets.CelebA(str(root), download=True)
    elif part == "svhn":
        for split in ("train", "test"):
            datasets.SVHN(str(root), split, download=True)
    else:
        for split, (_, name, md5) in datasets.USPS.split_list.items():
            if not check_integrity(str(root / name), md5):
                (root / name).unlink(missing_ok=True)  # torchvision takes a file that is there for complete
            datasets.USPS(str(root), train=split == "train", download=True)


def original_digits(root, out, part):
    """(uint8 (N, 3, 28, 28), int64 (N,)): torchvision's training and test part together."""
    photographs = None
    if part == "mnistm":
        photographs = unpack_photographs(root, out / "downloads")
        root = unpack_mnist(root, out / "downloads")
    images, labels = torchvision_digits(root, part, "train", photographs)
    more_images, more_labels = torchvision_digits(root, part, "val", photographs)
    return torch.cat([images, more_images]), torch.cat([labels, more_labels])


def unpack_photographs(root, downloads):
    """The folder of BSDS500's photographs: root, or where its archive in root was unpacked."""
    archives = [*root.glob("BS[DR]*.t*"), *root.glob("bsds*.t*")]
    if not archives:
        return root
    folder = downloads / "BSDS500"
    if not folder.exists():
        if not hasattr(tarfile, "data_filter"):
            raise ValueError(f"this Python is too old to unpack {archives[0]} safely; unpack it by hand")
        partial = downloads / "BSDS500.partial"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(partial, filter="data")  # refuses devices and paths that leave the folder
        os.replace(partial, folder)
    return folder


def unpack_mnist(root, downloads):
    """The folder that holds MNIST/raw: root, or where its .gz files in root were unpacked."""
    if (root / "MNIST" / "raw").is_dir():
        return root
    raw = downloads / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for archive in root.glob("*-ubyte.gz"):
        (raw / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
    return downloads


def find_faces(root, out):
    """Sorted paths of CelebA's aligned images in root, unpacked from img_align_celeba.zip if needed."""
    folder = None
    for place in (root / "img_align_celeba", root / "celeba" / "img_align_celeba"):
        if place.is_dir():
            folder = place
    for archive in root.rglob("img_align_celeba.zip"):
        with zipfile.ZipFile(archive) as file:
            wanted = len([name for name in file.namelist() if name.endswith(".jpg") and is_image(name)])
            if folder is None or len(jpegs(folder)) < wanted:  # an extraction was interrupted
                file.extractall(out / "downloads" / "celeba")  # leaves out .. and absolute paths by itself
                folder = out / "downloads" / "celeba" / "img_align_celeba"
    if folder is None:
        raise FileNotFoundError(f"no img_align_celeba or img_align_celeba.zip in {root}")
    return jpegs(folder)


def jpegs(folder):
    """Sorted paths of the .jpg files of a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix == ".jpg" and is_image(path))


def course_split(n, part):
    """Seeded order of n items cut into train, val and test, in the course's sizes or proportions."""
    train, val, whole = SPLIT[part]
    if n < whole:
        train = n * train // whole
        val = n * val // whole
    order = np.random.default_rng(0).permutation(n)[:whole]
    if part == "face":
        order = np.sort(order)
    return np.split(order, [train, train + val])


def write_digits(folder, part, images, labels):
    """data/NNNNN.png and the three CSVs; returns the number of images of each."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    splits = course_split(len(images), part)
    for i in np.concatenate(splits):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / "data" / f"{i:05d}.png")
    for name, split in zip(("train", "val", "test"), splits):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("image_name", "label"))
            writer.writerows((f"{i:05d}.png", labels[i].item()) for i in split)
    return [len(split) for split in splits]


def write_faces(folder, paths):
    """train, val and test folders of NNNNN.png, the middle squares at 64x64; returns the number of each."""
    splits = course_split(len(paths), "face")
    number = 0
    for name, split in zip(("train", "val", "test"), splits):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in split:
            image = Image.fromarray(read_image(paths[i]))
            image = ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS)
            image.save(folder / name / f"{number:05d}.png")
            number += 1
    return [len(split) for split in splits]


# ---------------- built-in data, never for a quoted number ----------------


def builtin_digits(domain, split):
    """Stand-ins of about 7,000 train and 1,800 val images, the same on every call and without a download.

    mnistm: scikit-learn's handwritten 8x8 digits, enlarged and deformed, blended with its two photographs;
    usps: the same handwriting at 16x16, grey; svhn: matplotlib's fonts on photographs.
    """
    import sklearn.datasets

    seed = DOMAINS.index(domain) * 2 + int(split == "val")
    photographs = sklearn.datasets.load_sample_images().images
    photographs = [np.concatenate([photo, 255 - photo]) for photo in photographs]  # negatives: more colours
    if domain == "svhn":
        rng = np.random.default_rng(seed)
        labels = torch.from_numpy(rng.integers(0, 10, 7000 if split == "train" else 1800))
        return draw_house_numbers(labels, photographs, rng), labels
    data = sklearn.datasets.load_digits()
    part = slice(None, 1437) if split == "train" else slice(1437, None)  # different writers
    digits = torch.from_numpy(data.images[part]).float().repeat(5, 1, 1)[:, None] / 16 * 255
    labels = torch.from_numpy(data.target[part]).long().repeat(5)
    if domain == "usps":
        digits = deform(digits, 16, seed)
        return F.interpolate(digits, (28, 28), mode="bilinear").round().byte().repeat(1, 3, 1, 1), labels
    digits = deform(digits, 28, seed)
    return blend((digits[:, 0] * 1.3).clamp(0, 255).byte(), photographs, seed), labels


def deform(digits, side, seed):
    """Slightly turned, scaled, sheared and shifted digits: (N, 1, 8, 8) -> (N, 1, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    n = len(digits)
    angle = (torch.rand(n, generator=generator) * 2 - 1) * 0.2
    scale = (torch.rand(n, generator=generator) * 2 - 1) * 0.12
    shear = (torch.rand(n, generator=generator) * 2 - 1) * 0.2
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * 0.1
    zoom = 28 / 20 * (1 + scale)  # the digit fills 20 of 28 pixels, as in MNIST
    rows = [angle.cos() * zoom, shear - angle.sin() * zoom, shift[:, 0]]
    rows += [angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), (n, 1, side, side), align_corners=False)
    big = F.interpolate(digits, (56, 56), mode="bicubic", align_corners=False).clamp(0, 255)
    return F.grid_sample(big, grid, align_corners=False)


def draw_house_numbers(labels, photographs, rng):
    """A digit in the middle and others cut off beside it, in a random font and colour on a random patch.

    Returns uint8 (N, 3, 28, 28).
    """
    folder = Path(import_matplotlib().get_data_path()) / "fonts" / "ttf"
    fonts = []
    for path in sorted(folder.glob("DejaVu*.ttf")):
        if "Display" not in path.name:
            fonts += [ImageFont.truetype(str(path), size) for size in (18, 22, 26)]
    out = []
    for label in labels.tolist():
        photo = photographs[rng.integers(len(photographs))]
        y = rng.integers(photo.shape[0] - 27)
        x = rng.integers(photo.shape[1] - 27)
        patch = photo[y : y + 28, x : x + 28].astype(float)
        ground = rng.integers(0, 256, 3)
        ink = rng.integers(0, 256, 3)
        while abs(int(ground.sum()) - int(ink.sum())) < 200:
            ink = rng.integers(0, 256, 3)
        image = Image.fromarray((0.25 * patch + 0.75 * ground).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        font = fonts[rng.integers(len(fonts))]
        left = rng.integers(10)
        right = rng.integers(10)
        for offset, digit in ((-1, left), (0, label), (1, right)):
            if offset == 0 or rng.random() < 0.6:
                x = 14 + offset * font.size * 0.7 + rng.integers(-2, 3)
                y = 14 + rng.integers(-2, 3)
                draw.text((x, y), str(digit), tuple(map(int, ink)), font, anchor="mm")
        out.append(np.asarray(image))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


@functools.cache
def builtin_faces(split):
    """Drawn faces on photographs, uint8 (N, 3, 64, 64), 1500 train and 400 val, the same on every call."""
    import sklearn.datasets

    rng = np.random.default_rng(int(split == "val"))
    photographs = sklearn.datasets.load_sample_images().images
    out = []
    for _ in range(1500 if split == "train" else 400):
        photo = photographs[rng.integers(2)]
        y = rng.integers(photo.shape[0] - 256)
        x = rng.integers(photo.shape[1] - 256)
        image = Image.fromarray(photo[y : y + 256, x : x + 256])
        draw_face(ImageDraw.Draw(image), rng)
        out.append(np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


def draw_face(draw, rng):
    """Hair, skin, eyes, brows, nose and mouth of random shape and colour on 256x256 pixels."""
    cx, cy = 128 + rng.normal(0, 8, 2)
    w = rng.uniform(58, 78)
    h = rng.uniform(80, 100)
    red = rng.uniform(150, 250)
    skin = np.array([red, red * rng.uniform(0.7, 0.85), red * rng.uniform(0.5, 0.7)])
    hair = rng.uniform(10, 160) * np.array([1, 0.8, 0.55])

    def ellipse(x, y, rx, ry, colour):
        box = [cx + x - rx, cy + y - ry, cx + x + rx, cy + y + ry]
        draw.ellipse(box, fill=tuple(map(int, colour)))

    ellipse(0, -rng.uniform(8, 22), w + rng.uniform(4, 26), h + rng.uniform(2, 14), hair)
    ellipse(0, 8, w, h - 6, skin)
    eye = rng.uniform(8, 12)
    tilt = rng.uniform(-3, 3)
    for x in (-w * 0.42, w * 0.42):
        ellipse(x, -14, eye * 1.5, eye * 0.8, (245, 245, 245))
        iris = hair if rng.random() < 0.5 else (40, 60, 90)
        ellipse(x + tilt, -14, eye * 0.7, eye * 0.7, iris)
        ellipse(x, -32, eye * 1.6, 3, hair)
    ellipse(tilt, 16, 7, 14, skin * 0.55)
    ellipse(0, 48 + rng.normal(0, 3), rng.uniform(16, 30), rng.uniform(4, 11), skin * [0.85, 0.5, 0.5])


# ---------------- digit accuracy ----------------


class Classifier(nn.Module):
    """The course's digit_classifier.py network, with the same state-dict keys; 44,674 parameters.

    (B, 3, 28, 28) in [-1, 1] -> (B, 10) logits.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 12, 12)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def train_classifier(data, path, device):
    """Trains a Classifier on the MNIST-M train part of `data` and saves it in the course's format.

    It takes about a minute on two cores.
    """
    images, labels = (v.to(device) for v in load_digits(data, "mnistm", "train"))
    val, val_labels = (v.to(device) for v in load_digits(data, "mnistm", "val"))
    torch.manual_seed(0)
    net = Classifier().to(device)
    batch = 128
    steps = max(16 * len(images) // batch, 2000)
    optim = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier", **BAR):
        i = torch.randint(len(images), (batch,), device=device)
        dy, dx = torch.randint(0, 5, (2,)).tolist()  # shifts by up to 2 pixels
        x = F.pad(images[i].float() / 127.5 - 1, (2, 2, 2, 2), mode="replicate")
        x = x[:, :, dy : dy + 28, dx : dx + 28]
        sign = 1 - 2 * torch.randint(0, 2, (batch, 1, 1, 1), device=device)  # half of the images as negatives
        loss = F.cross_entropy(net(x * sign), labels[i])
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    state = {
        "state_dict": net.state_dict(),
        "optimizer": optim.state_dict(),
        "data": str(data or "built-in data"),
        "accuracy": (classify(net, val) == val_labels).float().mean().item(),
        "diversity": diversity(images, labels).cpu(),
    }
    write_whole(path, functools.partial(torch.save, state))


@torch.inference_mode()
def classify(net, images):
    """uint8 (N, 3, 28, 28) -> predicted digits (N,)."""
    return torch.cat([net(batch.float() / 127.5 - 1).argmax(1) for batch in images.split(1000)])


def load_classifier(path, device):
    """(Classifier, its file's dict) from a file in the course's format; ValueError for any other."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        net = Classifier().to(device)
        net.load_state_dict(state["state_dict"])
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        expected = "a dict with state_dict of conv1, conv2, fc1, fc2, fc3"
        message = f"classifier {path}: not in the course's format, {expected} ({type(e).__name__})"
        raise ValueError(message) from e
    return net, state


def diversity(images, labels):
    """Per digit: standard deviation over its images (0-255), mean over pixels and channels.

    Returns (10,), nan where there is no image.
    """
    values = torch.full((10,), torch.nan, device=images.device)
    for digit in labels.unique().tolist():
        values[digit] = images[labels == digit].float().std(0, correction=0).mean()
    return values


def read_digit_folder(folder):
    """(names, uint8 (N, 3, 28, 28), digits (N,)) of images whose names start with their digit.

    The course's digit_classifier.py opens every file and does not resize, so any other file is refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--input {folder}: no such folder of images")
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    wrong = [name for name in names if name[0] not in "0123456789" or not (folder / name).is_file()]
    if wrong or len(names) < 2:
        found = shorten(wrong) if wrong else f"{len(names)} files"
        expected = "two images or more and nothing else, each name starting with its digit"
        raise ValueError(f"--input {folder}: found {found}; expected {expected}")
    arrays = read_arrays([folder / name for name in names])
    shapes = dict(zip(names, (array.shape for array in arrays)))
    odd = [f"{name} ({w}x{h})" for name, (h, w, _) in shapes.items() if (h, w) != (28, 28)]
    if odd:
        what = f"{len(odd)} images are not 28x28, for instance {odd[0]}"
        raise ValueError(f"--input {folder}: {what}; the course's grader does not resize")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return names, images, torch.tensor([int(name[0]) for name in names])


def score_digits(folder, data, classifier, beside, device):
    """Accuracy and diversity of the images in `folder`, counted as the course's digit_classifier.py does.

    data: as in load_digits, for the real images' diversity. classifier: weights in the course's format.
    Without it: beside/digit_classifier_<hash of data>.pth, trained now if it is missing. Without data and
    classifier: .weights/digit_classifier.pth beside this file, which also knows the diversity of MNIST-M.
    Prints a table; returns a dict for JSON. Raises ValueError or OSError.
    """
    names, images, labels = read_digit_folder(folder)
    images = images.to(device)
    labels = labels.to(device)
    if classifier:
        path = Path(classifier)
        if not path.is_file():
            raise ValueError(f"--classifier {path}: no such file; leave --classifier out to train one")
    else:
        source = os.fsencode(Path(data).resolve()) if data else b""
        path = Path(beside) / f"digit_classifier_{hashlib.sha256(source).hexdigest()[:8]}.pth"
        shipped = Path(__file__).resolve().parent / ".weights" / "digit_classifier.pth"
        if data is None and shipped.is_file() and not path.is_file():
            path = shipped
        if not path.is_file():
            train_classifier(data, path, device)
    net, state = load_classifier(path, device)
    own = "own accuracy unknown"
    if "accuracy" in state and "data" in state:
        own = f"{100 * state['accuracy']:.2f} % on the val part of {state['data']}"
    right = classify(net, images) == labels
    if data is None and "diversity" in state:
        reference = state["diversity"].to(device)
    else:
        reference = diversity(*(v.to(device) for v in load_digits(data, "mnistm", "train")))
    ratio = diversity(images, labels) / reference
    accuracies = [right[labels == digit].float().mean().item() for digit in range(10)]
    result = {
        "n": len(names),
        "accuracy": right.sum().item() / len(names),
        "diversity": ratio.nanmean().item(),
        "classifier": f"{path}: {own}",
        "per_digit": {
            digit: {"accuracy": accuracies[digit], "diversity": ratio[digit].item()}
            for digit in labels.unique().tolist()
        },
    }
    print(f"classifier {path}: {own}")
    print("digit      " + "".join(f"{digit:7d}" for digit in range(10)))
    print("accuracy   " + "".join(f"{value:7.3f}" for value in accuracies))
    explanation = "within-digit standard deviation of pixels / real images'"
    print("diversity  " + "".join(f"{value:7.3f}" for value in ratio.tolist()) + f"   {explanation}")
    print(f"diversity = {result['diversity']:.3f}")
    print(f"acc = {result['accuracy']} (correct/total = {right.sum().item()}/{len(names)})")
    return result


# ---------------- FID, KID, IS ----------------


INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
INCEPTION += "pt_inception-2015-12-05-6726825d.pth"


class ExactAverage(nn.Module):
    """After a padded 3x3 average that counted the zeros: the average without them, as in TensorFlow."""

    def forward(self, x):
        return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)


class MaxPoolE(inception.InceptionE):
    """The last block of the original network pools by maximum."""

    def _forward(self, x):
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, 1, 1))]


def load_inception(path, device):
    """(network, its name): pytorch-fid's Inception-v3, to be used by `inception_features`.

    path: a state dict of that network, or None for the published one, downloaded once. Where that fails:
    random weights of seed 0 under the name "fd_random"; their Frechet distance is no FID.
    Raises ValueError or OSError for a file that is not such a state dict.
    """
    net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_7c = MaxPoolE(2048)
    if path is not None:
        name = read_inception(net, path)
    else:
        try:
            state = torch.hub.load_state_dict_from_url(
                INCEPTION, map_location="cpu", check_hash=True, progress=False, weights_only=True
            )
            net.load_state_dict(state)
            name = "FID"
        except Exception as e:  # of the network, the disk, a damaged file
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            advice = "give the file with --inception. Without it there is no FID, only fd_random"
            print(f"note: {INCEPTION} cannot be downloaded here ({reason}); {advice}", file=sys.stderr)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for module in net.modules():
                    if isinstance(module, nn.Conv2d):
                        nn.init.kaiming_normal_(module.weight)
            name = "fd_random"
    for number in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        block = net.get_submodule(f"Mixed_{number}")
        block.branch_pool = nn.Sequential(ExactAverage(), block.branch_pool)
    net.eval()
    for module in net.modules():
        if isinstance(module, inception.BasicConv2d):  # the same arithmetic in a sixth less time
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return net.to(device, memory_format=torch.channels_last), name


def read_inception(net, path):
    """Fills `net` from a file and returns its name: "FID" for the published weights.

    A file named <name>-<start of its SHA-256>.pth must have that hash.
    """
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    wanted = re.search(r"-([0-9a-f]{8,64})\.pth?$", str(path))
    if wanted and not digest.startswith(wanted[1]):
        found = f"SHA-256 {digest[:8]}..., expected {wanted[1]}"
        raise ValueError(f"--inception {path}: {found}; the download is damaged")
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # torch.load and the network raise many types
        reason = f"{type(e).__name__}: {e}"[:120].splitlines()[0]
        what = "not a state dict of pytorch-fid's Inception network"
        raise ValueError(f"--inception {path}: {what} ({reason})") from e
    own = f"Frechet distance with {Path(path).name}, SHA-256 {digest[:8]}"
    return "FID" if digest.startswith("6726825d") else own


def course_inception(device):
    """torchvision's Inception-v3, as the course's IS.py of 2021, or None where it cannot be downloaded."""
    try:
        net = models.inception_v3(weights="IMAGENET1K_V1", transform_input=False, progress=False)
    except (OSError, RuntimeError):
        return None
    return net.eval().to(device)


@torch.inference_mode()
def inception_features(net, images, batch=50):
    """(features (N, 2048), class probabilities (N, classes)), float64.

    images: a list of uint8 arrays (H, W, 3), each enlarged to 299x299 (bilinear).
    """
    features = np.empty((len(images), net.fc.in_features))
    probabilities = np.empty((len(images), net.fc.out_features))
    pooled = []
    hook = net.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    device = next(net.parameters()).device
    same_size = {}
    for i, image in enumerate(images):
        same_size.setdefault(image.shape, []).append(i)
    bar = tqdm(total=len(images), desc="inception", unit="image", **BAR)
    for indices in same_size.values():
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            x = torch.from_numpy(np.stack([images[i] for i in part])).to(device)
            x = x.permute(0, 3, 1, 2).float() / 255
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
            probabilities[part] = net(2 * x - 1).double().softmax(1).cpu().numpy()
            features[part] = pooled.pop().flatten(1).double().cpu().numpy()
            bar.update(len(part))
    bar.close()
    hook.remove()
    return features, probabilities


def frechet_distance(features, mean, covariance):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 (arXiv 1706.08500, equation 6).

    Between N features (N, D) and a reference's mean (D,) and covariance (D, D). With S1 = R^T R the
    eigenvalues of S1 S2 are those of the symmetric R S2 R^T, of size min(N, D): no matrix square root,
    and N < D is no special case.
    """
    shift = features.mean(0) - mean
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    root = centred if len(centred) < centred.shape[1] else np.linalg.qr(centred, mode="r")
    eigenvalues = np.linalg.eigvalsh(root @ covariance @ root.T).clip(min=0)
    trace = np.trace(covariance)
    return float((shift**2).sum() + (centred**2).sum() + trace - 2 * np.sqrt(eigenvalues).sum())


def kernel_distance(x, y):
    """KID (arXiv 1801.01401) of features (N, D) and (M, D): (value, standard error).

    Unbiased MMD^2 with the kernel (x.y / D + 1)^3, of random 5000 features where there are more. The error
    is that of the U-statistic's linear part: each image's mean kernel with its own set less that with
    the other (as in arXiv 1611.04488, there for sets of one size).
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3  # (len(a), len(b))

    def mean_of_others(k):
        return (k.sum(1) - k.diagonal()) / (len(k) - 1)

    rng = np.random.default_rng(0)
    x = x[rng.permutation(len(x))[:5000]]
    y = y[rng.permutation(len(y))[:5000]]
    own_x = mean_of_others(kernel(x, x))
    own_y = mean_of_others(kernel(y, y))
    between = kernel(x, y)
    variance = np.var(own_x - between.mean(1), ddof=1) / len(x)
    variance += np.var(own_y - between.mean(0), ddof=1) / len(y)
    value = own_x.mean() + own_y.mean() - 2 * between.mean()
    return float(value), float(2 * np.sqrt(variance))


def inception_score(probabilities):
    """exp of the mean KL(p(y|x) || p(y)) over consecutive tenths: (mean, standard deviation).

    arXiv 1606.03498; from 1 to the number of classes. Of fewer than 10 images each is a part.
    """
    scores = []
    for part in np.array_split(probabilities, min(10, len(probabilities))):
        divergence = scipy.special.rel_entr(part, part.mean(0)).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def two_images(folder):
    """`list_images`; ValueError where there are not at least two."""
    files = list_images(folder)
    if len(files) < 2:
        raise ValueError(f"{folder}: found 1 image, expected two or more")
    return files


def reference_statistics(path, net, name):
    """{mu, sigma, n, features, size} of a folder of two images or more, or of an .npz with mu and sigma.

    A folder's are cached by the content of its files. An .npz has no features and no size; it must be of the
    network `name`: without an entry `name`, as pytorch-fid writes it, it counts as the published network's.
    """
    if str(path).endswith(".npz"):
        return read_statistics(path, name)
    files = two_images(path)
    key = hashlib.sha256(b"reader 2 " + os.fsencode(name))
    for file in files:
        key.update(hashlib.sha256(file.read_bytes()).digest())
    cache = cache_file(f"inception-{key.hexdigest()[:32]}.npz")
    stats = read_cache(cache)
    if stats.keys() != {"mu", "sigma", "features", "name"}:
        features, _ = inception_features(net, read_arrays(files))
        stats = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False), "features": features}
        stats["name"] = np.array(name)
        write_cache(cache, stats)
    return stats | {"n": len(stats["features"]), "size": read_image(files[0]).shape[:2]}


def read_statistics(path, name):
    """`reference_statistics` of an .npz; ValueError where it is damaged or of another network."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stats = dict(file)
    except Exception as e:  # what np.load raises for damaged files has no common type
        raise ValueError(f"reference {path}: not a readable .npz ({type(e).__name__}: {e})") from e
    shapes = {key: (value.shape, value.dtype.kind) for key, value in stats.items()}
    right = shapes.get("mu") == ((2048,), "f") and shapes.get("sigma") == ((2048, 2048), "f")
    if not right or not (np.isfinite(stats["mu"]).all() and np.isfinite(stats["sigma"]).all()):
        found = ", ".join(f"{key} {value.shape}" for key, value in stats.items())
        expected = "finite mu (2048,) and sigma (2048, 2048)"
        raise ValueError(f"reference {path}: found {found}, expected {expected}")
    theirs = str(stats.get("name", "FID"))
    if theirs != name:
        what = f"statistics of the network {theirs!r}, but the generated images are seen by {name!r}"
        advice = "give a folder of images as reference, or the network's weights with --inception"
        raise ValueError(f"reference {path}: {what}; {advice}")
    return {"mu": stats["mu"], "sigma": stats["sigma"], "features": None, "n": "unknown", "size": None}


def floor(features, n):
    """Frechet distance of n random features of the reference to its others, at most half: (n, distance).

    The distance is None where there are too few.
    """
    order = np.random.default_rng(0).permutation(len(features))
    n = min(len(features) // 2, n)
    if n < 2:
        return n, None
    others = features[order[n:]]
    return n, frechet_distance(features[order[:n]], others.mean(0), np.cov(others, rowvar=False))


def face_rate(images):
    """Share of images in which dlib's HOG detector finds exactly one face, or None without dlib."""
    try:
        import dlib
    except ImportError:
        return None
    detector = dlib.get_frontal_face_detector()
    return float(np.mean([len(detector(np.ascontiguousarray(image), 1)) == 1 for image in images]))


def score_images(generated, reference, weights, device):
    """FID, KID, inception score, face rate and floor of two folders; prints them, returns a dict for JSON.

    reference: a folder, or an .npz of statistics; weights: as in load_inception. The floor is the same
    distance between random images of the reference, as many as are generated or half of them, and its
    others. Raises ValueError or OSError.
    """
    files = two_images(generated)
    images = read_arrays(files)
    net, name = load_inception(weights, device)
    stats = reference_statistics(reference, net, name)
    sizes = {image.shape[:2] for image in images} | {stats["size"]} - {None}
    if len(sizes) > 1:
        print(f"note: images of {len(sizes)} sizes; each is enlarged to 299x299 by itself", file=sys.stderr)
    features, probabilities = inception_features(net, images)
    distance = frechet_distance(features, stats["mu"], stats["sigma"])
    result = {"n": len(files), "n_reference": stats["n"], "name": name, "distance": distance}
    print(f"{name} {distance:.3f} ({len(files)} generated, {stats['n']} reference images)")
    real = stats["features"]
    if real is not None:
        result["kid"] = kernel_distance(features, real)
        result["n_floor"], result["floor"] = floor(real, len(files))
        print("KID {:.5f} +- {:.5f} (standard error)".format(*result["kid"]))
        if result["floor"] is None:
            print("floor: too few reference images")
        else:
            others = len(real) - result["n_floor"]
            print(f"floor {result['floor']:.3f}: {result['n_floor']} against {others} other reference images")
    classes = "1008 classes of this network"
    course_net = course_inception(device) if name == "FID" else None
    if course_net is not None:
        _, probabilities = inception_features(course_net, images)
        classes = "torchvision's 1000 classes, as the course's IS.py"
    result["is"] = inception_score(probabilities)
    print("IS {:.3f} +- {:.3f} (10 splits, {})".format(*result["is"], classes))
    rate = face_rate(images)
    if rate is None:
        print("face rate: install dlib for it")
    else:
        result["face_rate"] = rate
        print(f"face rate {rate:.4f} (dlib HOG, exactly one face)")
    return result


# ---------------- plots ----------------


def import_matplotlib():
    """matplotlib, whatever MPLBACKEND says: its import fails where that names a missing module.

    Notebooks export their own backend to every command. Figures in files need none.
    """
    imported = "matplotlib" in sys.modules
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted is not None and not imported:
        with contextlib.suppress(ValueError):  # a caller's later pyplot uses what it would have used
            matplotlib.rcParams["backend"] = wanted
    return matplotlib


def new_figure(width, height):
    """(figure, axes), width and height in inches; needs no screen and no backend."""
    figure = import_matplotlib().figure.Figure(figsize=(width, height), dpi=150)
    return figure, figure.subplots()


def save_figure(figure, path, **options):
    """Writes a figure as PNG, whole or not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        write_whole(path, lambda file: figure.savefig(file, format="png", **options))


def printable(text):
    """A label for matplotlib: no formula between dollar signs, no bytes of names that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def save_grid(path, images, rows, columns, title, scale=1.0):
    """Labelled picture grid as PNG.

    images: uint8 (len(rows), len(columns), 3, H, W); scale: inches per image / 0.6.
    """
    images = F.pad(images, (1, 1, 1, 1), value=255)  # a white gap between the images
    r, c, _, h, w = images.shape
    figure, axes = new_figure(0.6 * scale * c + 1.0, 0.6 * scale * r + 0.9)
    picture = images.permute(0, 3, 1, 4, 2).reshape(r * h, c * w, 3)
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_xticks([w * (i + 0.5) for i in range(c)], [printable(column) for column in columns])
    axes.set_yticks([h * (i + 0.5) for i in range(r)], [printable(row) for row in rows])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(printable(title), fontsize=9)
    save_figure(figure, path, bbox_inches="tight")


def save_curves(path, csv_path, columns, title, yscale="log"):
    """Line plot over `step` of the named columns of a log.csv as PNG; yscale: log or linear."""
    log = np.atleast_1d(np.genfromtxt(csv_path, delimiter=",", names=True))
    figure, axes = new_figure(6, 3.2)
    for column in columns:
        axes.plot(log["step"], log[column], label=column, marker="." if log.size < 3 else None)
    axes.set(xlabel="step", title=printable(title), yscale=yscale)
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)


def save_scatter(path, points, groups, names, title):
    """Scatter plot as PNG: points (N, 2), groups (N,) indices into `names`, one colour each."""
    figure, axes = new_figure(6, 5.4)
    order = np.random.default_rng(0).permutation(len(points))  # shuffled: no group covers another
    colours = [f"C{group}" for group in groups[order]]
    axes.scatter(*points[order].T, s=5, alpha=0.7, linewidths=0, c=colours)
    for group, name in enumerate(names):
        axes.scatter([], [], s=5, color=f"C{group}", label=printable(name))
    axes.set(xticks=[], yticks=[])
    axes.set_title(printable(title), fontsize=9)
    axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(figure, path, bbox_inches="tight")


# ---------------- the page of plots ----------------


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>Report</title>
<style>
body{max-width:62rem;margin:0 auto;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;
overflow-wrap:break-word} h1,h2{line-height:1.2} h2{border-top:2px solid #ddd;padding-top:1rem}
figure{margin:1rem 0;break-inside:avoid} img{max-width:100%;height:auto} figcaption{color:#555}
.wide{overflow-x:auto} .pass{color:#060} .fail{color:#a00} table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}
pre{overflow-x:auto;background:#f6f6f6;padding:.6rem;font-size:.8rem}
@media(max-width:40rem){td,th{padding:.2rem .3rem;font-size:.75rem}} @media print{pre{white-space:pre-wrap}}
</style></head>
<body><h1>Four problems of deep generative vision</h1>$notes<p>$machine</p>$body</body></html>
""")
TITLES = {
    "p1": "GANs: faces and digits",
    "p2": "Conditional diffusion on digits",
    "p3": "DDIM on faces",
    "p4": "Domain adaptation",
}
CAPTIONS = {
    "compare": "First 32 images: A (left) and B (right), the same latents",
    "first": "First images of fixed latents",
    "interpolation": "Interpolation between latents",
    "training": "Training",
    "digits": "Ten images of each digit: rows digits, columns noises",
    "reverse": "Reverse process of the first 0",
    "guidance": "Guidance weights, the same noise in each column",
    "eta_grid": "Rows: eta, columns: noises",
    "tsne": "t-SNE of the CNN features",
}
# bar: the course's; best: of the reports and student repositories; less: smaller is better
SCORES = [
    {"label": "FID", "files": "p1_*", "key": "distance", "bar": 27.0, "best": "22.97", "less": True},
    {"label": "face rate", "files": "p1_*", "key": "face_rate", "bar": 0.90, "best": "0.922"},
    {"label": "inception score", "files": "p1_*", "key": "is"},
    {"label": "digit accuracy", "files": "p1_acgan", "key": "accuracy", "bar": 0.80, "best": "0.998"},
    {"label": "digit accuracy", "files": "p2_*", "key": "accuracy", "bar": 0.95, "best": "0.999"},
    {"label": "diversity", "files": "p1_*", "key": "diversity"},
    {"label": "diversity", "files": "p2_*", "key": "diversity"},
    {"label": "FID", "files": "p3_*", "key": "distance"},
    {"label": "face rate", "files": "p3_*", "key": "face_rate"},
    {"label": "mean squared error", "files": "p3_*", "key": "mse", "best": "0.0072"},
    {"label": "largest mean squared error", "files": "p3_*", "key": "largest", "bar": 20.0, "less": True},
]
# the course's bar, the best student's DANN, in per cent
ADAPTATION = {"mnistm-svhn": (40, 52.8), "mnistm-usps": (76, 93.3)}
ADAPTATION |= {"svhn-mnistm": (42, 51.6), "usps-svhn": (28, 34.2)}


def usable(damaged, read, path, *options):
    """read(path, *options), or None with the file's name added to `damaged`."""
    try:
        return read(path, *options)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        damaged.append(path.name)
        return None


def html_table(header, rows):
    """A table of HTML cells that scrolls by itself."""
    lines = ["".join(f"<th>{cell}</th>" for cell in header)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def verdict(passed):
    """pass or fail, coloured."""
    word = "pass" if passed else "fail"
    return f'<span class="{word}">{word}</span>'


def score_row(path, score, built_in):
    """The table row that a result file has of one of SCORES, or None where it has no such figure."""
    result = json.loads(path.read_text(encoding="utf-8"))
    value = result.get(score["key"])
    if value is None or score["key"] == "is" and result["name"] != "FID":  # of other classes
        return None
    if isinstance(value, list):
        value = value[0]
    label = score["label"]
    comparable = not built_in
    if score["key"] == "distance":
        label = result["name"]
        comparable = comparable and label == "FID"
    label = html.escape(f"{label}, {path.stem.split('_', 1)[1]}")
    n = html.escape(f"{result['n']} images" if "n" in result else "")
    if not comparable:
        return label, f"{value:.4g}", n, "", "", ""
    bar = score.get("bar", "")
    passed = ""
    if "bar" in score:
        passed = verdict(value <= bar if score.get("less") else value >= bar)
    return label, f"{value:.4g}", n, bar, score.get("best", ""), passed


def score_table(out, problem, built_in, damaged):
    """The table of a problem's result files, or nothing."""
    rows = []
    for score in SCORES:
        for path in sorted(out.glob(f"{problem}_*.json")):
            if fnmatch(path.stem, score["files"]) and path.name not in damaged:
                rows.append(usable(damaged, score_row, path, score, built_in))
    rows = [row for row in rows if row is not None]
    if not rows:
        return ""
    return html_table(("", "here", "N", "course's bar", "best of the reports", ""), rows)


def adaptation_table(path, built_in):
    """p4's table of accuracies: rows methods, columns scenarios."""
    results = json.loads(path.read_text(encoding="utf-8"))
    scenarios = list(list(results.values())[0])
    rows = []
    for method, runs in results.items():
        row = [html.escape(method)]
        for scenario in scenarios:
            shares = [100 * run["accuracy"] for run in runs[scenario]]
            cell = f"{np.mean(shares):.1f} %"
            if len(shares) > 1:
                cell += f" &plusmn; {np.std(shares, ddof=1):.1f}"
            if scenario in ADAPTATION and method.startswith("dann") and not built_in:
                cell += f" {verdict(np.mean(shares) >= ADAPTATION[scenario][0])}"
            row.append(cell)
        rows.append(row)
    if not built_in:
        bars = ["{} %; {} %".format(*ADAPTATION[s]) if s in ADAPTATION else "" for s in scenarios]
        rows.append(["course's bar; best student's DANN", *bars])
    titles = [html.escape(scenario).replace("-", " &rarr; ") for scenario in scenarios]
    return html_table(("accuracy on the target's val images", *titles), rows)


def picture(path):
    """A PNG inside the page, with its caption; ValueError where it is damaged."""
    read_image(path)
    captions = [text for start, text in CAPTIONS.items() if path.stem.startswith(start)]
    caption = html.escape([*captions, path.stem][0])
    data = base64.b64encode(path.read_bytes()).decode()
    source = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{source}<figcaption>{caption} ({html.escape(path.stem)})</figcaption></figure>"


def network(path):
    """A network's description, folded."""
    text = html.escape(path.read_text(encoding="utf-8", errors="backslashreplace"))
    return f"<details><summary>Network: {html.escape(path.stem)}</summary><pre>{text}</pre></details>"


def command_table(path, damaged):
    """Each command once with the seconds of all its calls, interrupted ones as well."""
    seconds = {}
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    for number, line in enumerate(lines, 1):
        time, _, command = line.partition("\t")
        if not time.isdecimal() or not command:
            damaged.append(f"line {number} of {path.name}")
            continue
        command = command.replace(" --resume", "")
        seconds[command] = seconds.get(command, 0) + int(time)
    rows = [(time, f"<code>{html.escape(command)}</code>") for command, time in seconds.items()]
    return "<h2>Commands and times</h2>" + html_table(("seconds", "command"), rows)


def write_report(out, built_in=False):
    """Writes OUT/report.html from what run_all.sh left in OUT: one file with the pictures inside it.

    It has figures beside the course's bars, networks, commands and times. What is damaged is left out and
    named. built_in: the data were the built-in ones, whose figures are not set against those bars.
    """
    out = Path(out)
    if not out.is_dir():
        raise ValueError(f"{out}: no such folder; expected the OUT of run_all.sh")
    body = []
    damaged = []
    for problem, title in TITLES.items():
        parts = [score_table(out, problem, built_in, damaged)]
        table = out / f"{problem}_table" / "table.json"
        if table.is_file():
            parts.append(usable(damaged, adaptation_table, table, built_in))
        folder = out / f"{problem}_figures"
        parts += [usable(damaged, picture, path) for path in sorted(folder.glob("[!.]*.png"))]
        parts += [usable(damaged, network, path) for path in sorted(folder.glob("[!.]*.txt"))]
        parts = [part for part in parts if part]
        if parts:
            body += [f"<h2>{title}</h2>", *parts]
    if (out / "commands.tsv").is_file():
        body.append(usable(damaged, command_table, out / "commands.tsv", damaged) or "")
    notes = ""
    if built_in:
        notes += "<p><b>Made with the built-in data: for trying things out, no results.</b></p>"
    if damaged:
        print(f"note: {out}: left out, because damaged: {', '.join(damaged)}", file=sys.stderr)
        notes += f"<p>Left out, because damaged: {html.escape(', '.join(damaged))}.</p>"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    machine = f"{versions}, {device}, {platform.platform()}; seed 0 unless a command says otherwise"
    page = PAGE.substitute(notes=notes, machine=html.escape(machine), body="".join(body))
    write_whole(out / "report.html", lambda file: file.write(page.encode("utf-8", "backslashreplace")))
    print(out / "report.html")


# ---------------- command line ----------------


class Parser(argparse.ArgumentParser):
    """Wrong usage becomes a ValueError, for `main` to print."""

    def error(self, message):
        raise ValueError(message)


def parse_args(argv=None):
    """The settings of one command; raises ValueError for wrong usage."""
    text = "Quality of generated images, and the course's data for those who lack its link."
    p = Parser(description=text, allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    text = "FID, KID, inception score, face rate and floor of a folder of images"
    f = commands.add_parser("fid", help=text, allow_abbrev=False)
    f.add_argument("generated", help="folder of images")
    f.add_argument("reference", help="folder of images, or .npz with mu and sigma")
    text = "weights of pytorch-fid's Inception network (default: downloaded once)"
    f.add_argument("--inception", metavar="FILE", help=text)
    f.add_argument("--json", metavar="FILE", help="write the figures there (default: nowhere)")
    text = "make the course's layout from MNIST, BSDS500, USPS, SVHN and CelebA"
    d = commands.add_parser("data", help=text, allow_abbrev=False)
    d.add_argument("out", help="folder to make")
    text = "folder with the original files (default: downloaded into OUT/downloads, needs gdown)"
    d.add_argument("--from", dest="source", metavar="DIR", help=text)
    text = "write OUT/report.html from what run_all.sh left there"
    r = commands.add_parser("report", help=text, allow_abbrev=False)
    r.add_argument("out", help="run_all.sh's OUT")
    text = "the data were the built-in ones: no comparison with the course's bars"
    r.add_argument("--built-in", action="store_true", help=text)
    return p.parse_args(argv)


def run(args):
    """Runs one command; returns the exit code."""
    if args.command == "data":
        if args.source and not Path(args.source).is_dir():
            raise ValueError(f"--from {args.source}: no such folder")
        missing = make_data(args.out, args.source)
        return int(len(missing) > 0)
    if args.command == "report":
        write_report(args.out, args.built_in)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = score_images(args.generated, args.reference, args.inception, device)
    if args.json:
        text = json.dumps(result, indent=1)
        write_whole(args.json, lambda file: file.write(text.encode()))
    return 0


def main(argv=None):
    """The command line: what goes wrong becomes one line on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding
    try:
        code = run(parse_args(argv))
    except (ValueError, OSError, ImportError) as e:
        message = str(e)
        if isinstance(e, OSError) and e.filename is not None:
            message = f"{e.filename}: {e.strerror}"
        if isinstance(e, ModuleNotFoundError):
            message = f"{e}; pip install -r requirements.txt"
        print("error:", message.replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
