"""What the four scripts share: data sets as tensors, digit accuracy, FID, KID and IS, labelled figures.

  python common.py fid GENERATED REFERENCE      # folders of images; REFERENCE may be pytorch-fid's .npz
  python common.py data OUT [--from DIR]        # the course's layout from the original data sets
  python common.py report OUT                   # OUT/report.html of what run_all.sh left in OUT

A data set is one uint8 tensor (N, 3, H, W) and one int64 tensor (N,) of labels, read from a folder ROOT:
ROOT/digits/DOMAIN/{data/*.png,train.csv,val.csv} (2022, 2023), ROOT/digits/DOMAIN/{train,test}/*.png with
{train,test}.csv (2021), ROOT/face/{train,val}. `common.py data` makes this layout of torchvision's files.
ROOT = None stands for the built-in data, made in seconds from what scikit-learn and matplotlib ship.
"""

# SPDX-License-Identifier: MIT
import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import html
import json
import os
import platform
import re
import shutil
import sys
import tarfile
import warnings
from pathlib import Path
from string import Template

import numpy as np
import scipy
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import datasets, models
from torchvision.models import inception
from tqdm import tqdm

BSDS500 = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
INCEPTION += "pt_inception-2015-12-05-6726825d.pth"
DOMAINS = ("mnistm", "svhn", "usps")
MAX_PIXELS = 2**24  # of one input image: a PNG of a few kB can unpack to gigabytes
CACHE = 2**31  # bytes of decoded images that are kept
NO_PIXELS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # PIL knows these formats and decodes none of them


# ---------------- files, images, data sets ----------------


def write_whole(path, write):
    """Writes a file whole or not at all: write(file) fills a temporary file of this process, then renamed."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is a folder or a device; expected the name of a file")
    target = path.resolve()  # a symbolic link stays one
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason})") from e
    finally:  # after Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink()


def cached(kind, paths, make):
    """The array make(), kept in the user's cache until one of the files `paths` changes."""
    key = hashlib.sha256(os.fsencode(f"reader 3 {kind}"))
    for path in paths:
        stat = path.stat()
        key.update(os.fsencode(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}\n"))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = Path(home) / "p1-p4-images" / f"{key.hexdigest()}.npz"
    with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as arrays:
        return arrays["array"]  # else it is missing or damaged
    array = np.asarray(make())
    if file.is_absolute():  # else there is no home folder
        with contextlib.suppress(OSError):  # an unwritable cache costs only time
            write_whole(file, functools.partial(np.savez, array=array))
            shrink_cache(file.parent)
    return array


def shrink_cache(folder):
    """Removes the files that were read longest ago, until the others fit into CACHE bytes."""
    total = 0
    for path in sorted(folder.iterdir(), key=lambda path: -path.stat().st_atime_ns):
        total += path.stat().st_size
        if total > CACHE:
            path.unlink()


def progress(items, text):
    """The items, with a bar on a terminal, a line a minute in a file, nothing without standard error."""
    if not hasattr(sys.stderr, "isatty"):
        return items
    return tqdm(items, desc=text, leave=False, mininterval=1 if sys.stderr.isatty() else 60)


def is_image(name):
    """True for the name of a file that PIL can open; hidden files such as ._a.png are none."""
    path = Path(name)
    kind = Image.registered_extensions().get(path.suffix.lower())  # loads all of PIL's formats
    return not path.name.startswith(".") and kind in Image.OPEN and kind not in NO_PIXELS


def list_images(folder, at_least=1, strict=False):
    """Sorted paths of a folder's images; ValueError for too few, a note (strict: error) for other files."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in entries if is_image(path) and path.is_file()]
    others = sorted(set(entries) - set(images))
    left_out = " ".join([f"{len(others)} other entries", *(path.name for path in others[:3])])
    if len(images) < at_least or (strict and others):
        found = f"found {len(images) or 'no'} images and {left_out}"
        expected = f"expected {at_least} or more images" + (" and nothing else" if strict else "")
        raise ValueError(f"{folder}: {found}; {expected}")
    if others:
        print(f"note: {folder}: {len(images)} images, left out {left_out}", file=sys.stderr)
    return images


def read_image(path, size=None):
    """One image file as a uint8 array (H, W, 3), resized (bilinear) to `size` = (width, height); ValueError.

    EXIF orientation applied, RGB as PIL converts it, but mode F within [0, 1], which PIL makes black, x 255.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transparent palettes, for instance
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, expected at most {MAX_PIXELS}")
                image.load()
                with contextlib.suppress(Exception):  # damaged EXIF data turn nothing
                    image = ImageOps.exif_transpose(image)
                if image.mode == "F" and min(image.getextrema()) >= 0 and max(image.getextrema()) <= 1:
                    image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
                image = image.convert("RGB")
    except Exception as e:  # PIL's readers raise many types
        reason = f"({type(e).__name__}: {e}); replace or remove the file"
        raise ValueError(f"{path}: cannot be read as an image {reason}") from e
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def read_arrays(paths, size=None):
    """`read_image` of several files, a list; one ValueError names the first damaged ones and counts all."""
    arrays = []
    damaged = []
    for path in paths:
        try:
            arrays.append(read_image(path, size))
        except ValueError as e:
            damaged.append(str(e))
    if damaged:
        first = "; ".join(damaged[:3])
        raise ValueError(f"{len(damaged)} of {len(paths)} images cannot be read, first {first}")
    return arrays


def read_images(paths, size=None):
    """`read_arrays` as one uint8 tensor (N, 3, H, W), N > 0; ValueError for images of several sizes."""
    arrays = read_arrays(paths, size)
    for path, array in zip(paths, arrays):
        if array.shape != arrays[0].shape:
            found = f"{path} has height and width {array.shape[:2]}, {paths[0]} has {arrays[0].shape[:2]}"
            raise ValueError(f"{found}; expected images of one size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def read_csv(path, folder):
    """([image_name], [label]) of a course CSV; ValueError for what is no file of `folder` or no digit."""
    names = []
    labels = []
    present = set(os.listdir(folder))  # plain names: this also refuses ../x.png
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            for row in rows:
                name = row.get("image_name")
                digit = re.fullmatch(r"\s*0*(\d)(\.0*)?\s*", str(row.get("label")), re.ASCII)  # 3, 03, 3.0
                if name not in present or digit is None:
                    expected = f"expected image_name in {folder} and label 0-9"
                    raise ValueError(f"{path}, line {rows.line_num}: found {row}; {expected}")
                names.append(name)
                labels.append(int(digit[1]))
    except csv.Error as e:
        raise ValueError(f"{path}: cannot be read as CSV ({e})") from e
    if not names:
        raise ValueError(f"{path}: no rows; expected image_name,label and one row for each image")
    return names, labels


def load_faces(root, split, size=64):
    """Faces as uint8 (N, 3, size, size); root: the course's folder, None: built-in; split: train or val."""
    if root is not None:
        paths = list_images(face_folder(root, split))
        return torch.from_numpy(cached(size, paths, functools.partial(read_images, paths, (size, size))))
    faces = builtin_faces(split).float()
    return F.interpolate(faces, (size, size), mode="bilinear", antialias=True).round().byte()


def face_folder(root, split):
    """The folder of the course layout that holds the faces of a split; ValueError where there is none."""
    places = {"train": ["face/train", "train"], "val": ["face/val", "val", "face/test"]}[split]  # test: 2021
    for folder in (Path(root) / place for place in places):
        if folder.is_dir() and any(is_image(name) for name in os.listdir(folder)):
            return folder
    raise ValueError(f"--data {root}: no {split} faces; {advice(root, places)}")


def advice(root, places):
    """The end of the message about a folder that has no data of the course's layout."""
    original = f"`python common.py data OUT --from {root}` makes them of torchvision's files"
    return f"looked for {', '.join(places)}; {original}"


def load_digits(root, domain, split):
    """Digits of one domain as (uint8 (N, 3, 28, 28), int64 (N,)), grey images repeated to three channels.

    root: folder (see the top of this file) or None for the built-in data; domain: one of DOMAINS;
    split: train or val (2021's test part). Raises ValueError with what it looked for.
    """
    if root is None:
        return builtin_digits(domain, split)
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder; leave --data out for the built-in data")
    other = {"train": "train", "val": "test"}[split]
    for base in (root / "digits" / domain, root / domain):
        for table, folder in ((f"{split}.csv", "data"), (f"{other}.csv", other)):
            if (base / table).is_file() and (base / folder).is_dir():
                names, labels = read_csv(base / table, base / folder)
                paths = [base / folder / name for name in names]
                images = cached(28, paths, functools.partial(read_images, paths, (28, 28)))
                return torch.from_numpy(images), torch.tensor(labels)
    places = dict.fromkeys(f"digits/{domain}/{name}.csv" for name in (split, other))
    raise ValueError(f"--data {root}: no {domain} {split} images; {advice(root, places)}")


def random_patch(rng, photographs, side):
    """A random square (side, side, 3) of a random one of a list of uint8 arrays (H, W, 3)."""
    photo = photographs[rng.integers(len(photographs))]
    y = rng.integers(photo.shape[0] - side + 1)
    x = rng.integers(photo.shape[1] - side + 1)
    return photo[y : y + side, x : x + side]


def blend(digits, photographs, seed):
    """MNIST-M's recipe (arXiv 1505.07818, section 5.2): |patch - digit|, a random patch for each digit.

    digits: uint8 (N, S, S); photographs: list of uint8 (H, W, 3). Returns uint8 (N, 3, S, S).
    """
    rng = np.random.default_rng(seed)
    out = []
    for digit in digits.numpy():
        patch = random_patch(rng, photographs, len(digit)).astype(np.int16)
        out.append(np.abs(patch - digit[:, :, None]).astype(np.uint8))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


# ---------------- the course's layout from the originals, and built-in data ----------------

# the course's train, val, all; faces first, because their download is what most often fails
SPLIT = {"face": (38_464, 2_025, 42_621), "mnistm": (44_800, 11_200, 70_000)}
SPLIT |= {"usps": (5_950, 1_488, 9_298), "svhn": (63_544, 15_887, 99_289)}


def make_data(out, source=None):
    """Writes the course's layout of 2022 and 2023: OUT/digits/DOMAIN/{data,*.csv}, OUT/face/{train,val,test}.

    source: folder of torchvision's files and BSDS500's; left out, they are downloaded. What the course keeps
    to itself becomes test. Returns the parts that cannot be made.
    """
    out = Path(out)
    root = Path(source or out / "downloads")
    if source is not None and not root.is_dir():
        raise ValueError(f"--from {root}: no such folder")
    missing = []
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
            write = {"face": write_faces}.get(part, write_digits)
            counts = write(partial, part, root)
            os.replace(partial, folder)
            print("{}: {:,} train, {:,} val, {:,} test images".format(folder, *counts))
        except Exception as e:  # no network, a quota, missing or damaged files: the other parts go on
            missing.append(part)
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            wanted = f"expected torchvision's files in {root}" if source else "give the files with --from DIR"
            print(f"{folder}: cannot be made ({reason}); {wanted}", file=sys.stderr)
    return missing


def download(root, part):
    """The part's files from where torchvision has them, with their MD5 checked; complete files are kept."""
    if part == "face":
        datasets.CelebA(root, download=True)
    elif part == "mnistm":
        datasets.MNIST(root, download=True)
        if not (root / "BSR_bsds500.tgz").is_file():
            torch.hub.download_url_to_file(BSDS500, root / "BSR_bsds500.tgz")
    else:
        files = {"usps": datasets.USPS, "svhn": datasets.SVHN}[part].split_list
        for url, name, md5 in (files["train"], files["test"]):
            datasets.utils.download_url(url, root, name, md5)


def course_split(n, part):
    """Seeded order of n items cut into train, val and test, in the course's sizes or proportions."""
    *sizes, whole = SPLIT[part]
    order = np.random.default_rng(0).permutation(n)[:whole]
    train, val = (len(order) * size // whole for size in sizes)
    if part == "face":
        order.sort()
    return np.split(order, [train, train + val])


def torchvision_digits(root, domain, part):
    """(images, labels) as `load_digits` has them, of the train or test part of torchvision's files."""
    if domain == "svhn":
        data = scipy.io.loadmat(str(root / f"{part}_32x32.mat"))
        images = torch.from_numpy(data["X"]).permute(3, 2, 0, 1).float()  # (N, 3, 32, 32)
        images = F.interpolate(images, (28, 28), mode="bilinear", antialias=True).round().byte()
        return images, torch.from_numpy(data["y"].flatten().astype(np.int64)) % 10  # 0 is written as 10
    if domain == "usps":
        data = datasets.USPS(root, train=part == "train")
        grey = torch.from_numpy(data.data)[:, None].float()  # (N, 1, 16, 16)
        grey = F.interpolate(grey, (28, 28), mode="bilinear").round().byte()
        return grey.repeat(1, 3, 1, 1), torch.tensor(data.targets)
    data = datasets.MNIST(root, train=part == "train")
    return blend(data.data, read_photographs(root), seed=int(part == "train")), data.targets


def read_photographs(root):
    """The photographs of BSDS500's archive or folder, for MNIST-M: a list of uint8 (H, W, 3)."""
    photographs = {}
    for archive in [*root.glob("BS[DR]*.t*"), *root.glob("bsds*.t*")]:
        with tarfile.open(archive) as tar:  # read as it is: nothing is unpacked
            for member in tar:
                if member.isfile() and member.name.endswith(".jpg") and is_image(member.name):
                    photographs[Path(member.name)] = read_image(tar.extractfile(member))
    if not photographs:
        paths = [path for path in root.glob("BS[DR]*/**/*.jpg") if is_image(path)]
        photographs = dict(zip(paths, read_arrays(paths)))
    large = [photographs[path] for path in sorted(photographs) if min(photographs[path].shape[:2]) >= 28]
    if not large:
        raise FileNotFoundError(f"no photographs of BSDS500 in {root}")
    return large


def write_digits(folder, part, root):
    """data/NNNNN.png and the three CSVs of torchvision's train and test part; returns their lengths."""
    (folder / "data").mkdir(parents=True)
    images, labels = zip(*(torchvision_digits(root, part, name) for name in ("train", "test")))
    images = torch.cat(images).permute(0, 2, 3, 1).numpy()
    labels = torch.cat(labels).tolist()
    splits = course_split(len(images), part)
    for name, split in zip(("train", "val", "test"), splits):
        lines = ["image_name,label"]
        for i in split:
            Image.fromarray(images[i]).save(folder / "data" / f"{i:05d}.png")
            lines.append(f"{i:05d}.png,{labels[i]}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return [len(split) for split in splits]


def write_faces(folder, part, root):
    """train, val, test folders of NNNNN.png, the middle squares of CelebA at 64x64; returns their lengths."""
    paths = sorted(root.rglob("img_align_celeba/*.jpg"))
    if not paths:
        raise FileNotFoundError(f"no img_align_celeba/*.jpg in {root}; unpack img_align_celeba.zip there")
    splits = course_split(len(paths), part)
    number = 0
    for name, split in zip(("train", "val", "test"), splits):
        (folder / name).mkdir(parents=True)
        for i in split:
            image = Image.fromarray(read_image(paths[i]))
            image = ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS)
            image.save(folder / name / f"{number:05d}.png")
            number += 1
    return [len(split) for split in splits]


def builtin_digits(domain, split):
    """Stand-ins, 7,185 or 7,000 train and 1,800 val images: scikit-learn's handwriting, or fonts for svhn."""
    import sklearn.datasets

    seed = DOMAINS.index(domain) * 2 + int(split == "val")
    photographs = sklearn.datasets.load_sample_images().images
    photographs = [np.concatenate([photo, 255 - photo]) for photo in photographs]  # negatives: more colours
    if domain == "svhn":
        rng = np.random.default_rng(seed)
        labels = torch.from_numpy(rng.integers(0, 10, {"train": 7000, "val": 1800}[split]))
        return draw_house_numbers(labels, photographs, rng), labels
    data = sklearn.datasets.load_digits()
    part = {"train": slice(None, 1437), "val": slice(1437, None)}[split]  # different writers
    digits = torch.from_numpy(data.images[part]).float().repeat(5, 1, 1)[:, None] / 16 * 255
    labels = torch.from_numpy(data.target[part]).long().repeat(5)
    if domain == "usps":
        digits = deform(digits, 16, seed)
        return F.interpolate(digits, (28, 28), mode="bilinear").round().byte().repeat(1, 3, 1, 1), labels
    digits = deform(digits, 28, seed)
    return blend((digits[:, 0] * 1.3).clamp(0, 255).byte(), photographs, seed), labels


def deform(digits, side, seed):
    """Slightly turned, scaled, sheared and shifted digits: (N, 1, 8, 8) -> (N, 1, side, side)."""
    rng = torch.Generator().manual_seed(seed)
    n = len(digits)
    angle, scale, shear = (torch.rand(3, n, generator=rng) * 2 - 1) * torch.tensor([[0.2], [0.12], [0.2]])
    shift = (torch.rand(n, 2, generator=rng) * 2 - 1) * 0.1
    zoom = 28 / 20 * (1 + scale)  # the digit fills 20 of 28 pixels, as in MNIST
    rows = [angle.cos() * zoom, shear - angle.sin() * zoom, shift[:, 0]]
    rows += [angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), (n, 1, side, side), align_corners=False)
    big = F.interpolate(digits, (56, 56), mode="bicubic", align_corners=False).clamp(0, 255)
    return F.grid_sample(big, grid, align_corners=False)


def draw_house_numbers(labels, photographs, rng):
    """A digit in the middle, others cut off beside it, random font and colour; uint8 (N, 3, 28, 28)."""
    folder = Path(import_matplotlib().get_data_path()) / "fonts" / "ttf"
    paths = [path for path in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in path.name]
    fonts = [ImageFont.truetype(str(path), size) for path in paths for size in (18, 22, 26)]
    out = []
    for label in labels.tolist():
        patch = random_patch(rng, photographs, 28)
        ground = rng.integers(0, 256, 3)
        ink = rng.integers(0, 256, 3)
        while abs(int(ground.sum()) - int(ink.sum())) < 200:
            ink = rng.integers(0, 256, 3)
        image = Image.fromarray((0.25 * patch + 0.75 * ground).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        font = fonts[rng.integers(len(fonts))]
        for offset, digit in ((-1, rng.integers(10)), (0, label), (1, rng.integers(10))):
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
    for _ in range({"train": 1500, "val": 400}[split]):
        image = Image.fromarray(random_patch(rng, photographs, 257)[:256, :256])
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


# ---------------- metrics: digit accuracy, FID, KID, IS ----------------


class Classifier(nn.Module):
    """The course's digit_classifier.py network: (B, 3, 28, 28) in [-1, 1] -> (B, 10) logits."""

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
    """Trains a Classifier on the MNIST-M train part of `data`, a minute, and saves it as the course does."""
    images, labels = (v.to(device) for v in load_digits(data, "mnistm", "train"))
    val, val_labels = (v.to(device) for v in load_digits(data, "mnistm", "val"))
    torch.manual_seed(0)
    net = Classifier().to(device)
    batch = 128
    steps = max(16 * len(images) // batch, 2000)
    optim = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 4e-3, total_steps=steps)
    for _ in progress(range(steps), "classifier"):
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
    state = {"state_dict": net.state_dict(), "data": str(data or "built-in data")}
    state["accuracy"] = (classify(net, val) == val_labels).float().mean().item()
    state["diversity"] = diversity(images, labels).cpu()
    write_whole(path, functools.partial(torch.save, state))


@torch.inference_mode()
def classify(net, images):
    """uint8 (N, 3, 28, 28) -> predicted digits (N,)."""
    return torch.cat([net(batch.float() / 127.5 - 1).argmax(1) for batch in images.split(1000)])


def load_weights(net, path, device, expected):
    """Fills `net` from a state dict or a dict that has one, and returns that; ValueError for other files."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        net.load_state_dict(state.get("state_dict", state))
    except OSError:
        raise
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        raise ValueError(f"{path}: not a state dict of {expected} ({type(e).__name__})") from e
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise ValueError(f"{path}: holds weights that are not finite")
    return state


def load_classifier(path, device):
    """(Classifier, the dict in the file) from a file in the course's format; ValueError for any other."""
    net = Classifier().to(device)
    return net, load_weights(net, path, device, "the course's format: conv1, conv2, fc1, fc2, fc3")


def digit_classifier(data, path, beside, device):
    """(network, the dict in its file, a sentence about it) of weights in the course's format.

    Without path: .weights/digit_classifier.pth beside this file for the built-in data; for other data, or
    where it is missing, beside/digit_classifier_<hash of the digits>.pth, which is trained if necessary.
    """
    if not path:
        path = Path(__file__).resolve().parent / ".weights" / "digit_classifier.pth"
        if data is not None or not path.is_file():
            digest = hashlib.sha256()
            for tensor in load_digits(data, "mnistm", "train"):
                digest.update(tensor.numpy().tobytes())
            path = Path(beside) / f"digit_classifier_{digest.hexdigest()[:8]}.pth"
        if not path.is_file():
            train_classifier(data, path, device)
    net, state = load_classifier(path, device)
    own = str(path)
    if "accuracy" in state:
        own += f": {100 * state['accuracy']:.2f} % on the val part of {state['data']}"
    return net, state, own


def diversity(images, labels):
    """Per digit: standard deviation over its images (0-255), mean over pixels; (10,), nan without images."""
    values = torch.full((10,), torch.nan, device=images.device)
    for digit in labels.unique().tolist():
        values[digit] = images[labels == digit].float().std(0, correction=0).mean()
    return values


def score_digits(folder, data, classifier, beside, device):
    """Accuracy and diversity of the images in `folder`, counted as the course's digit_classifier.py does.

    data: as in load_digits. classifier, beside: as in digit_classifier.
    Prints a table; returns a dict for JSON. Raises OSError, and ValueError for what the course's refuses.
    """
    paths = list_images(folder, at_least=2, strict=True)
    images = read_images(paths).to(device)
    wrong = [path.name for path in paths if path.name[0] not in "0123456789"]
    if wrong or images.shape[2:] != (28, 28):
        found = f"found images of {list(images.shape[2:])}, names {wrong[:3]}"
        raise ValueError(f"{folder}: {found}; expected 28x28 pixels, names that start with their digit")
    labels = torch.tensor([int(path.name[0]) for path in paths], device=device)
    net, state, own = digit_classifier(data, classifier, beside, device)
    right = classify(net, images) == labels
    reference = state.get("diversity")  # of the images that the classifier learned from
    if reference is None:
        reference = diversity(*load_digits(data, "mnistm", "train"))
    ratio = diversity(images, labels) / reference.to(device)
    result = {"n": len(paths), "accuracy": right.sum().item() / len(paths)}
    result |= {"diversity": ratio.nanmean().item(), "classifier": own, "per_digit": {}}
    print(f"classifier {own}\ndigit  accuracy  diversity")
    for digit in labels.unique().tolist():
        accuracy = right[labels == digit].float().mean().item()
        result["per_digit"][digit] = {"accuracy": accuracy, "diversity": ratio[digit].item()}
        print(f"{digit:5d}  {accuracy:8.3f}  {ratio[digit].item():9.3f}")
    print(
        f"diversity = {result['diversity']:.3f} (within-digit standard deviation of pixels / training data's)"
    )
    print(f"acc = {result['accuracy']} (correct/total = {right.sum().item()}/{len(paths)})")
    return result


def exact_average(module, inputs):
    """After a padded 3x3 average that counted the zeros: the average without them, as in TensorFlow."""
    return inputs[0] / F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, 1, 1)


class MaxPoolE(inception.InceptionE):
    def _forward(self, x):  # the last block of the original network pools by maximum
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, 1, 1))]


def load_inception(path, device):
    """(network, its name): pytorch-fid's Inception-v3, to be used by `inception_features`.

    path: its state dict, else ValueError or OSError; None: the published one, downloaded once ("FID"), or
    random weights of seed 0, whose distance is no FID ("fd_random").
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        net.Mixed_7c = MaxPoolE(2048)
        torch.manual_seed(0)
        for conv in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight)
    name = "FID"
    if path is not None:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if not digest.startswith("6726825d"):
            name = f"Frechet distance with {Path(path).name}, SHA-256 {digest[:8]}"
        load_weights(net, path, "cpu", "pytorch-fid's Inception network")
    else:
        try:
            options = {"progress": False, "check_hash": True, "weights_only": True}
            net.load_state_dict(torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", **options))
        except Exception as e:  # of the network, the disk, a damaged file
            name = "fd_random"
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            print(f"note: no FID without {INCEPTION} ({reason}); give it with --inception", file=sys.stderr)
    for number in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        net.get_submodule(f"Mixed_{number}.branch_pool").register_forward_pre_hook(exact_average)
    net.eval()
    for module in net.modules():
        if isinstance(module, inception.BasicConv2d):  # the same arithmetic in a sixth less time
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return net.to(device, memory_format=torch.channels_last), name


@torch.inference_mode()
def inception_features(net, images, batch=50):
    """(features (N, 2048), probabilities (N, classes)), float64, of uint8 images (N, 3, H, W)."""
    features = []
    probabilities = []
    hook = net.avgpool.register_forward_hook(lambda module, inputs, output: features.append(output))
    for part in progress(images.split(batch), "inception"):
        x = part.to(net.fc.weight.device).float() / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        probabilities.append(net(2 * x - 1).double().softmax(1))
    hook.remove()
    features = torch.cat(features).flatten(1).double()
    return features.cpu().numpy(), torch.cat(probabilities).cpu().numpy()


def frechet_distance(features, mean, covariance):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64 (arXiv 1706.08500, equation 6).

    Between features (N, D) and a reference's mean (D,) and covariance (D, D). With S1 = R^T R the
    eigenvalues of S1 S2 are those of the symmetric R S2 R^T: no matrix square root, for any N.
    """
    shift = features.mean(0) - mean
    root = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    distance = (shift**2).sum() + (root**2).sum() + np.trace(covariance)
    if len(root) >= len(mean):
        root = np.linalg.qr(root, mode="r")
    eigenvalues = np.linalg.eigvalsh(root @ covariance @ root.T).clip(min=0)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def kernel_distance(x, y):
    """KID (arXiv 1801.01401) of at most 5000 random features of (N, D) and (M, D).

    The unbiased estimate of MMD^2 with the kernel (x.y / D + 1)^3.
    """
    rng = np.random.default_rng(0)
    x = x[rng.permutation(len(x))[:5000]]
    y = y[rng.permutation(len(y))[:5000]]
    value = -2 * np.mean((x @ y.T / x.shape[1] + 1) ** 3)
    for z in (x, y):
        kernel = (z @ z.T / z.shape[1] + 1) ** 3
        value += (kernel.sum() - kernel.trace()) / (len(z) * (len(z) - 1))  # pairs of different images
    return float(value)


def inception_score(probabilities):
    """exp of the mean KL(p(y|x) || p(y)) of ten splits (arXiv 1606.03498): (mean, standard deviation)."""
    scores = []
    for part in np.array_split(probabilities, min(10, len(probabilities))):
        scores.append(np.exp(scipy.special.rel_entr(part, part.mean(0)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def reference_statistics(path, net, name):
    """{mu, sigma, n, features} of a folder (cached), or of an .npz of the network `name` (no features)."""
    if not str(path).endswith(".npz"):
        files = list_images(path, at_least=4)
        features = cached(name, files, lambda: inception_features(net, read_images(files))[0])
        sigma = np.cov(features, rowvar=False)
        return {"mu": features.mean(0), "sigma": sigma, "n": len(files), "features": features}
    try:
        with np.load(path, allow_pickle=False) as file:
            stats = {"name": "FID", **file}  # pytorch-fid writes no name
    except Exception as e:  # what np.load raises for damaged files has no common type
        raise ValueError(f"reference {path}: not a readable .npz ({type(e).__name__}: {e})") from e
    expected = {"mu": (2048,), "sigma": (2048, 2048)}
    found = {key: np.shape(value) for key, value in stats.items()}
    if not expected.items() <= found.items() or not np.isfinite(stats["mu"].sum() + stats["sigma"].sum()):
        raise ValueError(f"reference {path}: found {found}, expected finite {expected}")
    if stats["name"] != name:
        found = f"statistics of {str(stats['name'])!r}, but the generated images are seen by {name!r}"
        raise ValueError(f"reference {path}: {found}; give a folder, or the network with --inception")
    return stats | {"n": "unknown", "features": None}


def face_rate(images):
    """The share of uint8 images (N, 3, H, W) in which dlib's HOG detector finds exactly one face."""
    import dlib

    detector = dlib.get_frontal_face_detector()
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    return float(np.mean([len(detector(array, 1)) == 1 for array in arrays]))


def score_images(generated, reference, weights, device):
    """FID, KID, inception score, face rate and floor of two folders; prints them, returns a dict for JSON.

    weights: as in load_inception. The floor is the distance of as many random reference images, at most
    half, to the others. Raises ValueError or OSError.
    """
    images = read_images(list_images(generated, at_least=2))
    net, name = load_inception(weights, device)
    stats = reference_statistics(reference, net, name)
    features, probabilities = inception_features(net, images)
    distance = frechet_distance(features, stats["mu"], stats["sigma"])
    result = {"n": len(images), "n_reference": stats["n"], "name": name, "distance": distance}
    print(f"{name} {distance:.3f} ({len(images)} generated, {stats['n']} reference images)")
    real = stats["features"]
    if real is not None:
        result["kid"] = kernel_distance(features, real)
        print(f"KID {result['kid']:.5f}")
        real = real[np.random.default_rng(0).permutation(len(real))]
        n = min(len(real) // 2, len(images))
        result["n_floor"] = n
        result["floor"] = frechet_distance(real[:n], real[n:].mean(0), np.cov(real[n:], rowvar=False))
        print(f"floor {result['floor']:.3f}: {n} against {len(real) - n} other reference images")
    classes = "1008 classes of this network"
    if name == "FID":
        with contextlib.suppress(OSError, RuntimeError):  # of the download
            net = models.inception_v3(weights="IMAGENET1K_V1", transform_input=False, progress=False)
            _, probabilities = inception_features(net.eval().to(device), images)
            classes = "torchvision's 1000 classes, as the course's IS.py"
    result["is"] = inception_score(probabilities)
    print("IS {:.3f} +- {:.3f} ({} splits, {})".format(*result["is"], min(10, len(images)), classes))
    try:
        result["face_rate"] = face_rate(images)
        print(f"face rate {result['face_rate']:.4f} (dlib HOG, exactly one face)")
    except ImportError:
        print("face rate: install dlib for it")
    return result


# ---------------- plots and the page of them ----------------


def import_matplotlib():
    """matplotlib, whose import fails where MPLBACKEND names a missing module, as in notebooks' commands."""
    wanted = os.environ.get("MPLBACKEND")
    if wanted is not None and "matplotlib" not in sys.modules:
        del os.environ["MPLBACKEND"]
        import matplotlib

        os.environ["MPLBACKEND"] = wanted
        with contextlib.suppress(ValueError):  # a caller's later pyplot uses what it would have used
            matplotlib.rcParams["backend"] = wanted
    import matplotlib.figure

    return matplotlib


@contextlib.contextmanager
def new_figure(path, width, height, **options):
    """Axes of width x height inches to draw on, then written as PNG with the options of savefig."""
    figure = import_matplotlib().figure.Figure(figsize=(width, height), dpi=150)
    yield figure.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        write_whole(path, functools.partial(figure.savefig, format="png", **options))


def printable(text):
    """A label for matplotlib: no formula between dollar signs, no bytes of names that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def save_grid(path, images, rows, columns, title, scale=1.0):
    """Labelled picture grid as PNG. images: uint8 (len(rows), len(columns), 3, H, W); scale: image size."""
    images = F.pad(images, (1, 1, 1, 1), value=255)  # a white gap between the images
    r, c, _, h, w = images.shape
    picture = images.permute(0, 3, 1, 4, 2).reshape(r * h, c * w, 3)
    with new_figure(path, 0.6 * scale * c + 1.0, 0.6 * scale * r + 0.9, bbox_inches="tight") as axes:
        axes.imshow(picture.numpy(), interpolation="nearest")
        axes.set_xticks([w * (i + 0.5) for i in range(c)], [printable(column) for column in columns])
        axes.set_yticks([h * (i + 0.5) for i in range(r)], [printable(row) for row in rows])
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.set_title(printable(title), fontsize=9)


def save_curves(path, csv_path, columns, title, yscale="log"):
    """Line plot over `step` of the named columns of a log.csv as PNG; yscale: log or linear."""
    log = np.atleast_1d(np.genfromtxt(csv_path, delimiter=",", names=True))
    with new_figure(path, 6, 3.2) as axes:
        for column in columns:
            axes.plot(log["step"], log[column], label=column, marker="." if log.size < 3 else None)
        axes.set(xlabel="step", title=printable(title), yscale=yscale)
        axes.legend()
        axes.figure.tight_layout()


def save_scatter(path, points, groups, names, title):
    """Scatter plot as PNG: points (N, 2), groups (N,) indices into `names`, one colour each."""
    order = np.random.default_rng(0).permutation(len(points))  # shuffled: no group covers another
    with new_figure(path, 6, 5.4, bbox_inches="tight") as axes:
        colours = [f"C{group}" for group in groups[order]]
        axes.scatter(*points[order].T, s=5, alpha=0.7, linewidths=0, c=colours)
        for group, name in enumerate(names):
            axes.scatter([], [], s=5, color=f"C{group}", label=printable(name))
        axes.set(xticks=[], yticks=[])
        axes.set_title(printable(title), fontsize=9)
        axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Four problems of deep generative vision</title>
<style>
:root { color-scheme: light dark }
body { max-width: 72rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui; overflow-wrap: anywhere }
.figures { columns: 2 22rem; column-gap: 1.2rem }
figure { margin: 0 0 1.5rem; break-inside: avoid }
figure img { display: block; width: 100%; border-radius: .5rem; background: #fff }
.scroll, pre { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td { border-bottom: 1px solid #8886; padding: .35rem 1rem .35rem 0; overflow-wrap: normal }
.pass { color: #2a9d55; font-weight: 600 } .fail { color: #d2503c; font-weight: 600 }
</style>
</head>
<body>
<h1>Four problems of deep generative vision</h1>
<p>$notes</p>
$sections
<h2>Commands, with their seconds: $minutes minutes</h2>
<pre>$commands</pre>
</body>
</html>
""")
TITLES = {"p1": "GANs", "p2": "Conditional diffusion", "p3": "DDIM", "p4": "Domain adaptation"}
LABELS = {"accuracy": "digit accuracy", "diversity": "diversity", "face_rate": "face rate"}
LABELS |= {"is": "inception score", "psnr": "PSNR in dB", "mse": "mean squared error"}
LABELS |= {"largest": "largest mean squared error"}
DOMAIN_NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN", "usps": "USPS"}
# problem or method, label: the better of two, the course's bar, best of the reports
BARS = {
    "p1 FID": (min, 27.0, 22.97),
    "p1 face rate": (max, 0.90, 0.922),
    "p1 digit accuracy": (max, 0.80, 0.998),
    "p2 digit accuracy": (max, 0.95, 0.999),
    "p3 mean squared error": (min, None, 0.0072),
    "p3 largest mean squared error": (min, 20.0, None),
    "dann MNIST-M → SVHN": (max, 0.40, 0.528),
    "dann MNIST-M → USPS": (max, 0.76, 0.933),
    "dann SVHN → MNIST-M": (max, 0.42, 0.516),
    "dann USPS → SVHN": (max, 0.28, 0.342),
}
HEADER = ("", "here", "minutes of training", "images or networks", "course's bar", "best of the reports", "")


def minutes(ckpts):
    """Mean minutes that the logs beside these checkpoints say, as a text; empty without logs."""
    logs = [Path(ckpt).with_suffix(".log.csv") for ckpt in ckpts]
    logs = [np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True)) for log in logs if log.is_file()]
    return f"{np.mean([log['seconds'][-1] for log in logs]) / 60:.0f}" if logs else ""


def read_scores(path, bars):
    """Rows as HEADER has them, of a result file."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    if path.name == "table.json":  # of p4
        report = path.parent.name.removeprefix("p4_table").replace("_", " ")
        for method, scenarios in result.items():
            for scenario, runs in scenarios.items():
                label = " → ".join(DOMAIN_NAMES[domain] for domain in scenario.split("-"))
                share = float(np.mean([run["accuracy"] for run in runs]))
                bar = bars.get(f"{method.removesuffix('-mt')} {label}")
                time = minutes([run["ckpt"] for run in runs])
                rows.append(score_row(label, method + report, share, time, len(runs), bar))
        return rows
    labels = LABELS | {"distance": result.get("name", "FID")}
    if labels["distance"] != "FID":
        del labels["is"]  # random weights have no classes
    whose = path.stem.partition("_")[2] or path.stem
    time = minutes([path.with_suffix(".pt")])
    for key in [key for key in labels if key in result]:
        value = float(np.ravel(result[key])[0])  # of mean and deviation the mean
        bar = bars.get(f"{path.stem[:2]} {labels[key]}")
        rows.append(score_row(labels[key], whose, value, time, result.get("n", ""), bar))
    return rows


def score_row(label, whose, value, time, n, bar):
    """A row of texts; shares are shown in per cent."""
    pattern = "{:.1%}" if label in ("digit accuracy", "face rate") or "→" in label else "{:.4g}"
    better, *limits = bar or (max, None, None)
    texts = ["" if number is None else pattern.format(number) for number in (value, *limits)]
    verdict = ""
    if limits[0] is not None:
        verdict = "pass" if better(value, limits[0]) == value else "fail"
    return f"{label}, {whose}", texts[0], time, n, *texts[1:], verdict


def html_table(rows):
    """A table of texts that scrolls by itself; the first row is the header."""
    body = ""
    for row in rows:
        cells = [html.escape(str(cell)) for cell in row]
        last = f'<td class="{cells[-1]}">{cells[-1]}</td>'  # pass or fail
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells[:-1]) + last + "</tr>\n"
    return f'<div class="scroll"><table>{body}</table></div>'


def write_report(out, built_in=()):
    """Writes OUT/report.html of what run_all.sh left in OUT; the problems in `built_in` have no bars."""
    out = Path(out)
    if not out.is_dir():
        raise ValueError(f"{out}: no such folder; expected the OUT of run_all.sh")
    rows = {problem: [] for problem in TITLES}
    figures = {problem: "" for problem in TITLES}
    results = [*sorted(out.glob("p[1-3]_*.json")), *sorted(out.glob("p4_table*/table.json"))]
    results += sorted(out.glob("p[1-4]_figures*/[!.]*.json"))
    for path in results:
        problem = path.relative_to(out).parts[0][:2]
        try:
            rows[problem] += read_scores(path, {} if problem in built_in else BARS)
        except (ValueError, LookupError, TypeError, AttributeError):
            print(f"note: {path}: left out, because it is no result of the scripts", file=sys.stderr)
    for path in sorted(out.glob("p[1-4]_figures*/[!.]*.png")):
        name = html.escape(f"{path.parent.name}/{path.name}")
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
        figures[name[:2]] += f"<figure>{image}<figcaption>{name}</figcaption></figure>"

    sections = ""
    for problem, title in TITLES.items():
        if rows[problem] or figures[problem]:
            sections += f"<h2>{title}</h2>\n"
            if problem in built_in:
                sections += "<p>Made with the built-in data: for trying things out, no results.</p>\n"
            if rows[problem]:
                sections += html_table([HEADER, *rows[problem]])
            sections += f'<div class="figures">{figures[problem]}</div>\n'

    notes = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    path = out / "commands.tsv"
    commands = path.read_text(encoding="utf-8", errors="backslashreplace") if path.is_file() else ""
    total = round(sum(map(int, re.findall(r"^(\d+)\t", commands, re.MULTILINE))) / 60)
    page = PAGE.substitute(notes=notes, sections=sections, commands=html.escape(commands), minutes=total)
    write_whole(out / "report.html", lambda file: file.write(page.encode("utf-8", "backslashreplace")))
    print(out / "report.html")


# ---------------- command line ----------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # of wrong usage, for `main` to print
        raise ValueError(message)


def parse_args(argv=None):
    """The settings of one command; raises ValueError for wrong usage."""
    p = Parser(description="Quality of generated images, and the course's data.", allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    f = commands.add_parser("fid", help="FID, KID, IS, face rate and floor of images", allow_abbrev=False)
    f.add_argument("generated", help="folder of images")
    f.add_argument("reference", help="folder of images, or .npz with mu and sigma")
    f.add_argument("--inception", metavar="FILE", help="pytorch-fid's weights (default: downloaded once)")
    d = commands.add_parser("data", help="make the course's layout from the originals", allow_abbrev=False)
    d.add_argument("out", help="folder to make")
    d.add_argument("--from", dest="source", metavar="DIR", help="the original files (default: downloaded)")
    r = commands.add_parser("report", help="write OUT/report.html", allow_abbrev=False)
    r.add_argument("out", help="run_all.sh's OUT")
    r.add_argument("--built-in", nargs="+", choices=tuple(TITLES), default=(), help="these have no bars")
    return p.parse_args(argv)


def main(argv=None):
    """The command line: what goes wrong becomes one line on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding
    code = 0
    try:
        args = parse_args(argv)
        if args.command == "fid":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            score_images(args.generated, args.reference, args.inception, device)
        elif args.command == "report":
            write_report(args.out, args.built_in)
        elif make_data(args.out, args.source):
            code = 1  # some parts cannot be made
    except (ValueError, OSError, ImportError) as e:
        print("error:", str(e).replace("\n", " "), file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        found = str(e).partition("\n")[0] or "out of memory"
        print(f"error: {found}; give fewer images; CUDA_VISIBLE_DEVICES= uses the CPU", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


if __name__ == "__main__":
    main()
