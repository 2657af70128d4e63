"""What the four scripts share: data sets as tensors, digit accuracy, FID, KID and IS, labelled picture grids.

  python common.py fid GENERATED REFERENCE      # folders of images; REFERENCE may be an .npz with mu and sigma, as pytorch-fid writes it
  python common.py data OUT [--from DIR]        # the course's layout from the original data sets, downloaded or in DIR
  python common.py report OUT                   # OUT/report.html of what run_all.sh left in OUT

A data set is one uint8 tensor (N, 3, H, W) and one int64 tensor (N,) of labels. `load_digits` looks for, in this order,

1. the course layout: ROOT/digits/DOMAIN/{data/*.png,train.csv,val.csv} (2022, 2023) or
   ROOT/digits/DOMAIN/{train,test}/*.png + {train,test}.csv (2021); CSV header `image_name,label`;
2. a torchvision root: ROOT/MNIST/raw, usps.bz2 + usps.t.bz2, {train,test}_32x32.mat; MNIST-M is blended from MNIST and
   a folder of photographs (BSDS500 or BSR, or else every *.jpg below ROOT), as Ganin et al. did (arXiv 1505.07818): |patch - digit|;
3. ROOT = None: built-in data, made in seconds from files that scikit-learn and matplotlib ship.

`load_faces` takes every PNG and JPEG of ROOT/face/{train,val} or ROOT/{train,val} (2021: face/test), or draws its own.

Decoded PNG folders are cached in $XDG_CACHE_HOME (or ~/.cache), keyed by every file's path, size and time.
"""
import argparse
import csv
import fcntl
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import scipy.special
from PIL import Image, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models import inception
from tqdm import tqdm

DOMAINS = ("mnistm", "svhn", "usps")
MAX_PIXELS = 2**24  # of one input image: a PNG of a few kB can unpack to gigabytes


def fail(message):
    """Wrong usage or input: one line on standard error, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


LOCKS = {}  # the open files of claim_checkpoint


def claim_checkpoint(ckpt, resume):
    """Before training: refuses to overwrite without `resume`, makes the folder, sees that it can be written, and keeps other processes of this machine out until this one ends."""
    name = hashlib.sha256(str(Path(ckpt).resolve()).encode()).hexdigest()[:32]
    if name not in LOCKS:
        LOCKS[name] = os.open(Path(tempfile.gettempdir()) / f"p1-p4-{os.getuid()}-{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(LOCKS[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"--ckpt {ckpt}: another process is training into it; wait for it, or give another --ckpt")
    if Path(ckpt).is_dir():
        fail(f"--ckpt {ckpt}: a folder; expected a file in it")
    if Path(ckpt).exists() and not resume:
        fail(f"--ckpt {ckpt}: exists; go on with --resume, or give another --ckpt")
    Path(ckpt).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{ckpt}.tmp").touch()  # an unwritable folder shows now, not after hours
    Path(f"{ckpt}.tmp").unlink()


def join_processes(args):
    """Under torchrun: joins the other processes (gloo, on GPUs nccl); each takes its share of --batch-size."""
    if args.batch_size % args.world:
        fail(f"--batch-size {args.batch_size}: expected a multiple of the {args.world} processes")
    if args.world > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if args.rank:  # one of them talks and writes
        sys.stdout = open(os.devnull, "w")


def any_process(stop, args):
    """True in all processes where one of them was told to stop."""
    if args.world == 1:
        return bool(stop)
    flag = torch.tensor(float(bool(stop)), device=args.device)
    dist.all_reduce(flag)
    return flag.item() > 0


# ------------------------------------------------------------------ images on disk

def read_image(path, size=None):
    """One image file as a uint8 array (H, W, 3); `size` = (width, height) resizes (bilinear) images that are not of that size."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                fail(f"{path}: {image.width}x{image.height} pixels, expected at most {MAX_PIXELS} in all")
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as e:  # PIL's readers raise many types
        fail(f"{path}: cannot be read as an image ({type(e).__name__}); replace or remove the file")
    if size and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def cache_file(name):
    """Path of a file in $XDG_CACHE_HOME/p1-p4-images, or ~/.cache/p1-p4-images."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "p1-p4-images" / name


def write_cache(path, **arrays):
    """Writes an .npz, whole or not at all; a read-only home or a full disk is no error: the cache only saves time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            np.savez(f"{folder}/cache.npz", **arrays)
            os.replace(f"{folder}/cache.npz", path)
    except OSError:
        pass


def read_folder(folder, names, size):
    """The named images of `folder` as one uint8 tensor (N, 3, H, W), decoded once and then cached."""
    folder, width, height = Path(folder).resolve(), *size
    key = hashlib.sha256(f"{folder} {size}".encode())
    for name in names:
        try:
            stat = os.stat(folder / name)
        except OSError as e:
            fail(f"{folder / name}: {e.strerror}")
        key.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = cache_file(f"{key.hexdigest()[:32]}.npz")
    try:
        with np.load(cache, allow_pickle=False) as f:
            images = f["images"]
        if images.shape == (len(names), 3, height, width) and images.dtype == np.uint8:
            return torch.from_numpy(images)
    except Exception:
        pass  # no cache yet, or a damaged one (numpy and zipfile raise many types): decode again
    images = np.ascontiguousarray(np.stack([read_image(folder / name, size) for name in names]).transpose(0, 3, 1, 2))
    write_cache(cache, images=images)
    return torch.from_numpy(images)


def read_csv(path, folder):
    """Rows of a course CSV: ([image_name], [label]).

    Every name must be a plain file name in `folder` and every label a digit; anything else exits with code 2 and the line number.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, skipinitialspace=True)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        fail(f"{path}: cannot be read as CSV ({e})")
    if not rows:
        fail(f"{path}: no rows, expected the header image_name,label and one row per image")
    missing = {"image_name", "label"} - set(rows[0][1])
    if missing:
        fail(f"{path}: no column {' and '.join(sorted(missing))}; found {','.join(map(str, rows[0][1]))}, expected image_name,label")
    present = set(os.listdir(folder))
    names, labels = [], []
    for number, row in rows:
        name, label = row["image_name"], (row["label"] or "").strip()
        if name not in present:  # also refuses ../x.png: only plain names are in a folder's listing
            fail(f"{path}, line {number}: image {name!r} is not in {folder}")
        if label not in list("0123456789"):
            fail(f"{path}, line {number}: label {label!r}, expected a digit 0-9")
        names.append(name)
        labels.append(int(label))
    return names, labels


# ------------------------------------------------------------------ faces

def load_faces(root, split, size=64):
    """Faces as uint8 (N, 3, size, size), from ROOT/face/train and ROOT/face/val (2021: face/test), or built-in for root = None; split: train or val.

    Images of another size are resized (bilinear). Exits with code 2 if nothing is there.
    """
    if root is None:
        return F.interpolate(builtin_faces(split).float(), (size, size), mode="bilinear", antialias=True).round().byte() if size != 64 else builtin_faces(split)
    folder = face_folder(root, split)
    return read_folder(folder, sorted(filter(is_image, os.listdir(folder))), (size, size))


def is_image(name):
    """True for the names of PNG and JPEG files."""
    return str(name).lower().endswith((".png", ".jpg", ".jpeg"))


def face_folder(root, split):
    """The folder of the course layout that holds the faces of a split."""
    for folder in (Path(root) / "face" / split, Path(root) / split, *((Path(root) / "face" / "test",) if split == "val" else ())):
        if folder.is_dir() and any(map(is_image, os.listdir(folder))):
            return folder
    fail(f"--data {root}: no {split} faces; looked for PNG or JPEG files in face/{split}{' and face/test' if split == 'val' else ''}; leave --data out for the built-in faces")


# ------------------------------------------------------------------ digits

def load_digits(root, domain, split):
    """Digits of one domain as (uint8 (N, 3, 28, 28), int64 (N,)), grey images repeated to three channels.

    root: folder (see the top of this file) or None for the built-in data; domain: mnistm, svhn or usps; split: train or val
    (2021's and torchvision's test part counts as val). Exits with code 2 and the list of what it looked for if nothing is there.
    """
    if root is None:
        return builtin_digits(domain, split)
    root = Path(root)
    if not root.is_dir():
        fail(f"--data {root}: no such folder; give the folder that holds digits/{domain}, or leave --data out for the built-in data")
    other = "train" if split == "train" else "test"
    for base in (root / "digits" / domain, root / domain):
        for table, folder in ((f"{split}.csv", "data"), (f"{other}.csv", other)):
            if (base / table).is_file() and (base / folder).is_dir():
                names, labels = read_csv(base / table, base / folder)
                return read_folder(base / folder, names, (28, 28)), torch.tensor(labels)
    try:
        return torchvision_digits(root, domain, split)
    except FileNotFoundError:  # nothing of it is there
        parts = {"mnistm": "MNIST/raw with BSDS500 or other *.jpg photographs", "svhn": f"{other}_32x32.mat", "usps": "usps.bz2, usps.t.bz2"}
        fail(f"--data {root}: no {domain} {split} images; looked for digits/{domain}/{split}.csv with data/ (2022, 2023), "
             f"digits/{domain}/{other}.csv with {other}/ (2021), {parts[domain]} (torchvision)")
    except Exception as e:  # what the readers of .mat, .bz2 and idx files raise has no common type
        fail(f"--data {root}: the {domain} files of the torchvision layout are damaged ({type(e).__name__}: {e}); download them again")


def torchvision_digits(root, domain, split, photographs=None):
    """`load_digits` from the files that torchvision.datasets downloads, MNIST-M's photographs in another folder if given; FileNotFoundError if they are not there."""
    import scipy.io
    from torchvision import datasets
    train = split == "train"
    if domain == "svhn":
        path = root / f"{'train' if train else 'test'}_32x32.mat"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}")
        data = scipy.io.loadmat(path)
        images = torch.from_numpy(data["X"]).permute(3, 2, 0, 1).float()  # (N, 3, 32, 32)
        images = F.interpolate(images, (28, 28), mode="bilinear", antialias=True).round().byte()
        return images, torch.from_numpy(data["y"].flatten().astype(np.int64)) % 10  # 0 is written as 10
    if domain == "usps":
        data = datasets.USPS(str(root), train=train)
        grey = torch.from_numpy(data.data)[:, None].float()
        return F.interpolate(grey, (28, 28), mode="bilinear").round().byte().repeat(1, 3, 1, 1), torch.tensor(data.targets)
    if not (root / "MNIST" / "raw").is_dir():
        raise FileNotFoundError(f"no {root / 'MNIST' / 'raw'}")
    data = datasets.MNIST(str(root), train=train)
    folder = photographs or root
    files = sorted(folder.glob("BS[DR]*/**/*.jpg")) or sorted(p for p in folder.rglob("*.jpg") if "celeba" not in str(p.relative_to(folder)))
    photographs = [p for p in map(read_image, files) if min(p.shape[:2]) >= 28]
    if not photographs:
        raise FileNotFoundError("no photographs")
    return blend(data.data, photographs, seed=int(train)), data.targets


def blend(digits, photographs, seed):
    """MNIST-M's recipe: |patch - digit| with a random patch of a random photograph for each digit (arXiv 1505.07818, section 5.2).

    digits: uint8 (N, H, W); photographs: list of uint8 (H', W', 3). Returns uint8 (N, 3, H, W).
    """
    rng, (n, h, w) = np.random.default_rng(seed), digits.shape
    out = np.empty((n, h, w, 3), np.uint8)
    for i, digit in enumerate(digits.numpy()):
        photo = photographs[rng.integers(len(photographs))]
        y, x = rng.integers(photo.shape[0] - h + 1), rng.integers(photo.shape[1] - w + 1)
        out[i] = np.abs(photo[y:y + h, x:x + w].astype(np.int16) - digit[:, :, None])
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------ the course's layout from the original data sets

BSDS500 = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
SPLIT = {"mnistm": (44_800, 11_200, 70_000), "usps": (5_950, 1_488, 9_298), "svhn": (63_544, 15_887, 99_289), "face": (38_464, 2_025, 42_621)}  # the course's train, val, all


def make_data(out, source=None):
    """Writes the course's layout of 2022 and 2023 into `out`: digits/DOMAIN/{data,train.csv,val.csv,test.csv} and face/{train,val,test}.

    Made from MNIST with BSDS500's photographs, USPS, SVHN and CelebA: torchvision's files or the archives as they are published, in the folder
    `source`, or else downloaded into out/downloads, where torchvision checks their MD5. The split is seeded, in the course's sizes or, from fewer images,
    proportions; what the course keeps to itself becomes test. Says what it cannot get and goes on; a part that is there is not made again. Returns what is missing.
    """
    out, missing = Path(out), []
    root = Path(source) if source else out / "downloads"
    for part in SPLIT:
        folder = out / "face" if part == "face" else out / "digits" / part
        if folder.exists():
            print(f"{folder}: is there")
            continue
        try:
            if source is None:
                download(root, part)
            partial = folder.with_name(f"{folder.name}.partial")  # renamed when complete
            shutil.rmtree(partial, ignore_errors=True)
            counts = (write_faces if part == "face" else write_digits)(partial, *original(root, out, part))
            os.replace(partial, folder)
            print(f"{folder}: {counts[0]:,} train, {counts[1]:,} val, {counts[2]:,} test images")
        except (Exception, SystemExit) as e:  # no network, a quota, a file that is not there or damaged: the other parts do not need it
            missing.append(part)
            print(f"{folder}: cannot be made ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}); get the files by hand and call again with their folder as --from", file=sys.stderr)
    return missing


def download(root, part):
    """The part's files from where torchvision has them (BSDS500: Berkeley) into `root`; files that are complete are kept."""
    from torchvision import datasets
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
            if not check_integrity(str(root / name), md5):  # torchvision takes a file that is there for complete
                (root / name).unlink(missing_ok=True)
            datasets.USPS(str(root), train=split == "train", download=True)


def original(root, out, part):
    """Digits: (uint8 (N, 3, 28, 28), int64 (N,)), torchvision's training and test part together; faces: (paths,)."""
    if part == "face":
        folder, archive = next((root / d / "img_align_celeba" for d in ("celeba", "") if (root / d / "img_align_celeba").is_dir()), None), next(root.rglob("img_align_celeba.zip"), None)
        if folder is None and archive is None:
            raise FileNotFoundError(f"no img_align_celeba or img_align_celeba.zip in {root}")
        if archive:
            with zipfile.ZipFile(archive) as f:  # leaves out .. and absolute paths by itself
                if folder is None or len(list(folder.glob("*.jpg"))) < sum(name.endswith(".jpg") for name in f.namelist()):  # an extraction was interrupted
                    f.extractall(out / "downloads" / "celeba")
                    folder = out / "downloads" / "celeba" / "img_align_celeba"
        return (sorted(p for p in folder.iterdir() if p.suffix == ".jpg"),)
    photographs = None
    if part == "mnistm":
        photographs = root
        for archive in [*root.glob("BS[DR]*.t*"), *root.glob("bsds*.t*")]:
            photographs = out / "downloads" / "BSDS500"
            if not photographs.exists():
                with tarfile.open(archive) as f:
                    f.extractall(photographs.with_name("BSDS500.partial"), filter="data")  # refuses paths that leave the folder, and devices
                os.replace(photographs.with_name("BSDS500.partial"), photographs)
        if not (root / "MNIST" / "raw").is_dir():
            raw = out / "downloads" / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for archive in root.glob("*-ubyte.gz"):
                (raw / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
            root = out / "downloads"
    splits = [torchvision_digits(root, part, split, photographs) for split in ("train", "val")]
    return tuple(torch.cat(v) for v in zip(*splits))


def course_split(n, part):
    """Seeded order of n items cut into train, val and test: the course's sizes, or their proportions where there are fewer."""
    train, val, whole = SPLIT[part]
    if n < whole:
        train, val = n * train // whole, n * val // whole
    order = np.random.default_rng(0).permutation(n)[:whole]
    return np.split(np.sort(order) if part == "face" else order, [train, train + val])


def write_digits(folder, images, labels):
    """data/NNNNN.png and the three CSVs."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    parts = course_split(len(images), folder.name.removesuffix(".partial"))
    for i in np.concatenate(parts):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / "data" / f"{i:05d}.png")
    for name, part in zip(("train", "val", "test"), parts):
        with open(folder / f"{name}.csv", "w", newline="") as f:
            csv.writer(f).writerows([("image_name", "label"), *((f"{i:05d}.png", labels[i].item()) for i in part)])
    return [len(part) for part in parts]


def write_faces(folder, paths):
    """train, val and test folders of NNNNN.png: the middle square of CelebA's aligned images at 64x64."""
    parts, number = course_split(len(paths), "face"), 0
    for name, part in zip(("train", "val", "test"), parts):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in part:
            ImageOps.fit(Image.fromarray(read_image(paths[i])), (64, 64), Image.Resampling.LANCZOS).save(folder / name / f"{number:05d}.png")
            number += 1
    return [len(part) for part in parts]


# ------------------------------------------------------------------ built-in data: for every machine, never for a quoted number

def builtin_digits(domain, split):
    """Stand-ins of about 7,000 train and 1,800 val images, the same on every call and without a download.

    mnistm: scikit-learn's handwritten 8x8 digits, enlarged and slightly deformed, blended with its two photographs;
    usps: the same handwriting at 16x16, grey; svhn: matplotlib's fonts on photographs, with neighbouring digits.
    """
    import sklearn.datasets as ds
    seed = DOMAINS.index(domain) * 2 + (split == "val")
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    photographs = [np.concatenate([p, 255 - p]) for p in ds.load_sample_images().images]  # negatives, for variety of colour
    if domain == "svhn":
        labels = torch.from_numpy(rng.integers(0, 10, 7000 if split == "train" else 1800))
        return draw_house_numbers(labels, photographs, rng), labels
    data = ds.load_digits()
    part = slice(None, 1437) if split == "train" else slice(1437, None)  # different writers
    digits = torch.from_numpy(data.images[part]).float().repeat(5, 1, 1)[:, None] / 16 * 255
    labels = torch.from_numpy(data.target[part]).long().repeat(5)
    n = len(digits)
    angle, scale, shear = ((torch.rand(n, generator=generator) * 2 - 1) * s for s in (0.2, 0.12, 0.2))
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * 0.1
    zoom = 28 / 20 * (1 + scale)  # the digit fills 20 of 28 pixels, as in MNIST
    affine = torch.stack([angle.cos() * zoom, shear - angle.sin() * zoom, shift[:, 0],
                          angle.sin() * zoom, angle.cos() * zoom, shift[:, 1]], 1).view(n, 2, 3)
    side = 28 if domain == "mnistm" else 16
    big = F.interpolate(digits, (56, 56), mode="bicubic", align_corners=False).clamp(0, 255)
    digits = F.grid_sample(big, F.affine_grid(affine, (n, 1, side, side), align_corners=False), align_corners=False)
    if domain == "usps":
        return F.interpolate(digits, (28, 28), mode="bilinear").round().byte().repeat(1, 3, 1, 1), labels
    return blend((digits[:, 0] * 1.3).clamp(0, 255).byte(), photographs, seed), labels


def draw_house_numbers(labels, photographs, rng):
    """One digit in the middle, others cut off beside it, printed in a random font and colour on a random patch: uint8 (N, 3, 28, 28)."""
    import matplotlib
    from PIL import ImageDraw, ImageFont
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(p), s) for p in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in p.name for s in (18, 22, 26)]
    out = []
    for label in labels.tolist():
        photo = photographs[rng.integers(len(photographs))]
        y, x = rng.integers(photo.shape[0] - 27), rng.integers(photo.shape[1] - 27)
        patch = photo[y:y + 28, x:x + 28].astype(float)
        ground, ink = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        while abs(int(ground.sum()) - int(ink.sum())) < 200:
            ink = rng.integers(0, 256, 3)
        image = Image.fromarray((0.25 * patch + 0.75 * ground).astype(np.uint8))
        draw, font = ImageDraw.Draw(image), fonts[rng.integers(len(fonts))]
        for offset, digit in ((-1, rng.integers(10)), (0, label), (1, rng.integers(10))):
            if offset == 0 or rng.random() < 0.6:
                draw.text((14 + offset * font.size * 0.7 + rng.integers(-2, 3), 14 + rng.integers(-2, 3)), str(digit), tuple(map(int, ink)), font, anchor="mm")
        out.append(np.asarray(image))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


@functools.cache
def builtin_faces(split):
    """Drawn faces, uint8 (N, 3, 64, 64), 1500 train and 400 val, the same on every call: skin, hair, eyes, brows, nose and mouth of random shape on a photograph."""
    import sklearn.datasets as ds
    from PIL import ImageDraw
    rng, photographs, out = np.random.default_rng(split == "val"), ds.load_sample_images().images, []
    for _ in range(1500 if split == "train" else 400):
        photo = photographs[rng.integers(2)]
        y, x = rng.integers(photo.shape[0] - 256), rng.integers(photo.shape[1] - 256)
        image = Image.fromarray(photo[y:y + 256, x:x + 256])
        draw, (cx, cy) = ImageDraw.Draw(image), 128 + rng.normal(0, 8, 2)
        w, h = rng.uniform(58, 78), rng.uniform(80, 100)
        skin = np.array([rng.uniform(150, 250), 0, 0])
        skin[1:] = skin[0] * rng.uniform(0.7, 0.85), skin[0] * rng.uniform(0.5, 0.7)
        hair, dark, lips = (tuple(map(int, v)) for v in (rng.uniform(10, 160) * np.array([1, 0.8, 0.55]), skin * 0.55, skin * [0.85, 0.5, 0.5]))

        def ellipse(x, y, rx, ry, colour):
            draw.ellipse([cx + x - rx, cy + y - ry, cx + x + rx, cy + y + ry], fill=tuple(map(int, colour)))

        ellipse(0, -rng.uniform(8, 22), w + rng.uniform(4, 26), h + rng.uniform(2, 14), hair)
        ellipse(0, 8, w, h - 6, skin)
        eye, tilt = rng.uniform(8, 12), rng.uniform(-3, 3)
        for side in (-1, 1):
            ellipse(side * w * 0.42, -14, eye * 1.5, eye * 0.8, (245, 245, 245))
            ellipse(side * w * 0.42 + tilt, -14, eye * 0.7, eye * 0.7, hair if rng.random() < 0.5 else (40, 60, 90))
            ellipse(side * w * 0.42, -32, eye * 1.6, 3, hair)
        ellipse(tilt, 16, 7, 14, dark)
        ellipse(0, 48 + rng.normal(0, 3), rng.uniform(16, 30), rng.uniform(4, 11), lips)
        out.append(np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------ digit accuracy

class Classifier(nn.Module):
    """The course's digit_classifier.py network: (B, 3, 28, 28) in [-1, 1] -> (B, 10) logits; 44,674 parameters, the same state-dict keys."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 12, 12)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 4, 4)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def train_classifier(data, path, device):
    """Trains a Classifier on the MNIST-M train part of `data` (about a minute on two cores) and saves it in the course's format."""
    images, labels = (v.to(device) for v in load_digits(data, "mnistm", "train"))
    val, val_labels = (v.to(device) for v in load_digits(data, "mnistm", "val"))
    torch.manual_seed(0)
    net, batch = Classifier().to(device), 128
    steps = max(16 * len(images) // batch, 2000)
    optim = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier", leave=False):
        i = torch.randint(len(images), (batch,), device=device)
        dy, dx = torch.randint(0, 5, (2,)).tolist()
        x = F.pad(images[i].float() / 127.5 - 1, (2, 2, 2, 2), mode="replicate")[:, :, dy:dy + 28, dx:dx + 28]  # shifts by up to 2 pixels
        sign = 1 - 2 * torch.randint(0, 2, (batch, 1, 1, 1), device=device)  # half of the images as negatives
        loss = F.cross_entropy(net(x * sign), labels[i])
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    accuracy = (classify(net, val) == val_labels).float().mean().item()
    state = {"state_dict": net.state_dict(), "optimizer": optim.state_dict(), "data": str(data or "built-in data"), "accuracy": accuracy}
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        fail(f"{path}: cannot be written ({e})")
    finally:
        temporary.unlink(missing_ok=True)


@torch.inference_mode()
def classify(net, images):
    """uint8 (N, 3, 28, 28) -> predicted digits (N,)."""
    return torch.cat([net(b.float() / 127.5 - 1).argmax(1) for b in images.split(1000)])


def load_classifier(path, device):
    """(Classifier, its file's dict) from a file in the course's format: a dict whose `state_dict` holds conv1, conv2, fc1, fc2, fc3."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        net = Classifier().to(device)
        net.load_state_dict(state["state_dict"])
        return net, state
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        fail(f"classifier {path}: not in the course's format, a dict with state_dict of conv1, conv2, fc1, fc2, fc3 ({type(e).__name__})")


def diversity(images, labels):
    """Per digit: standard deviation over its images (0-255), mean over pixels and channels. Returns (10,), nan where there is no image."""
    return torch.stack([images[labels == d].float().std(0, correction=0).mean() for d in range(10)])


def score_digits(folder, data, classifier, beside, device):
    """Accuracy and diversity of the PNGs in `folder`, counted as the course's digit_classifier.py does: the first character is the label.

    data: as in load_digits, for the real images' diversity; classifier: weights in the course's format, or None for
    beside/digit_classifier_<hash of data>.pth, trained now if it is missing. Prints a table; returns a dict for JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fail(f"--input {folder}: no such folder of images")
    names = sorted(os.listdir(folder))
    wrong = [n for n in names if n[0] not in "0123456789" or not (folder / n).is_file()]
    if wrong or len(names) < 2:
        fail(f"--input {folder}: found {', '.join(wrong[:3]) or f'{len(names)} files'}; "
             "expected two images or more and nothing else, each name starting with its digit")
    arrays = [read_image(folder / n) for n in names]
    odd = [f"{n} ({a.shape[1]}x{a.shape[0]})" for n, a in zip(names, arrays) if a.shape != (28, 28, 3)]
    if odd:
        fail(f"--input {folder}: {len(odd)} images are not 28x28, for instance {odd[0]}; the course's grader does not resize")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(device)
    labels = torch.tensor([int(n[0]) for n in names], device=device)
    which = hashlib.sha256(str(Path(data).resolve() if data else "").encode()).hexdigest()[:8]
    path = Path(classifier or Path(beside) / f"digit_classifier_{which}.pth")
    if classifier and not path.is_file():
        fail(f"--classifier {path}: no such file; leave --classifier out to train one")
    if not path.is_file():
        train_classifier(data, path, device)
    net, state = load_classifier(path, device)
    own = f"{100 * state['accuracy']:.2f} % on the val part of {state['data']}" if {"accuracy", "data"} <= state.keys() else "own accuracy unknown"
    right = classify(net, images) == labels
    ratio = diversity(images, labels) / diversity(*(v.to(device) for v in load_digits(data, "mnistm", "train")))
    per_digit = [right[labels == d].float().mean().item() for d in range(10)]
    result = {"n": len(names), "accuracy": right.sum().item() / len(names), "diversity": ratio.nanmean().item(), "classifier": f"{path}: {own}",
              "per_digit": {d: {"accuracy": per_digit[d], "diversity": ratio[d].item()} for d in labels.unique().tolist()}}
    print(f"classifier {path}: {own}")
    print("digit      " + "".join(f"{d:7d}" for d in range(10)))
    print("accuracy   " + "".join(f"{v:7.3f}" for v in per_digit))
    print("diversity  " + "".join(f"{v:7.3f}" for v in ratio.tolist()) + "   within-digit standard deviation of pixels / real images'")
    print(f"diversity = {result['diversity']:.3f}")
    print(f"acc = {result['accuracy']} (correct/total = {right.sum().item()}/{len(names)})")
    return result


# ------------------------------------------------------------------ FID, KID, IS

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class ExactAverage(nn.Module):
    """After a padded 3x3 average that counted the zeros: the average without them, as the original TensorFlow network has it."""

    def forward(self, x):
        return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)


class MaxPoolE(inception.InceptionE):
    """The last block of the original network pools by maximum."""

    def _forward(self, x):
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, 1, 1))]


def load_inception(path, device):
    """(network, its name): pytorch-fid's Inception-v3, uint8 images -> 2048 features by `inception_features`.

    path: a state dict of that network, or None for the published one, downloaded once. Without either, random weights of seed 0 under the
    name "fd_random": their Frechet distance is no FID. A file named <name>-<start of its SHA-256>.pth must have that hash.
    """
    net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_7c = MaxPoolE(2048)
    try:
        if path is None:
            state, name = torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True, progress=False, weights_only=True), "FID"
        else:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            wanted = re.search(r"-([0-9a-f]{8,64})\.pth?$", str(path))
            if wanted and not digest.startswith(wanted[1]):
                fail(f"--inception {path}: SHA-256 {digest[:8]}..., expected {wanted[1]}; the download is damaged")
            state, name = torch.load(path, map_location="cpu", weights_only=True), f"Frechet distance with {Path(path).name}, SHA-256 {digest[:8]}"
            name = "FID" if digest.startswith("6726825d") else name
        net.load_state_dict(state)
    except Exception as e:  # torch.load and the network raise many types
        if path is not None:
            fail(f"--inception {path}: not a state dict of pytorch-fid's Inception network ({type(e).__name__}: {str(e)[:100].split(chr(10))[0]})")
        print(f"note: {INCEPTION} cannot be downloaded here; give the file with --inception. Without it there is no FID, only fd_random", file=sys.stderr)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        name = "fd_random"
    for block in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d, net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e, net.Mixed_7b):
        block.branch_pool = nn.Sequential(ExactAverage(), block.branch_pool)
    net.eval()
    for module in net.modules():
        if isinstance(module, inception.BasicConv2d):  # the same arithmetic in a sixth less time
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return net.to(device, memory_format=torch.channels_last), name


def course_inception(device):
    """torchvision's Inception-v3, on which the course's IS.py of 2021 computes the inception score, or None where its weights cannot be downloaded."""
    try:
        return models.inception_v3(weights="IMAGENET1K_V1", transform_input=False, progress=False).eval().to(device)
    except (OSError, RuntimeError):
        return None


@torch.inference_mode()
def inception_features(net, images, batch=50):
    """(features (N, 2048), class probabilities (N, 1008)), float64, of images: a list of uint8 arrays (H, W, 3), each enlarged to 299x299 (bilinear)."""
    pooled, features, probabilities = [], [], []
    hook = net.avgpool.register_forward_hook(lambda *a: pooled.append(a[2]))
    sizes = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    order = [i for same in sizes.values() for i in same]
    batches = [same[i:i + batch] for same in sizes.values() for i in range(0, len(same), batch)]
    for part in tqdm(batches, desc="inception", leave=False):
        x = torch.from_numpy(np.stack([images[i] for i in part])).to(next(net.parameters()).device).permute(0, 3, 1, 2).float() / 255
        logits = net(2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)
        features.append(pooled.pop().flatten(1).double().cpu())
        probabilities.append(logits.double().softmax(1).cpu())
    hook.remove()
    back = np.argsort(order)
    return torch.cat(features).numpy()[back], torch.cat(probabilities).numpy()[back]


def frechet_distance(features, mean, covariance):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between N features (N, D) and a reference's mean (D,) and covariance (D, D), all float64 (1706.08500, equation 6).

    With S1 = R^T R the eigenvalues of S1 S2 are those of the symmetric R S2 R^T, of size min(N, D): no matrix square root, and N < D is no special case.
    """
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    root = centred if len(centred) < centred.shape[1] else np.linalg.qr(centred, mode="r")
    eigenvalues = np.linalg.eigvalsh(root @ covariance @ root.T).clip(min=0)
    return float(((features.mean(0) - mean) ** 2).sum() + (centred**2).sum() + np.trace(covariance) - 2 * np.sqrt(eigenvalues).sum())


def kernel_distance(x, y):
    """KID (1801.01401): unbiased MMD^2 with the kernel (x.y / D + 1)^3 of features (N, D) and (M, D), of random 5000 where there are more: (value, standard error).

    The error is that of the U-statistic's linear part: each image's mean kernel with its own set less that with the other (as in 1611.04488, there for sets of one size).
    """
    rng = np.random.default_rng(0)
    x, y = (v[rng.permutation(len(v))[:5000]] for v in (x, y))
    xx, yy, xy = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    own_x, own_y = ((k.sum(1) - k.diagonal()) / (len(k) - 1) for k in (xx, yy))
    error = 2 * np.sqrt(np.var(own_x - xy.mean(1), ddof=1) / len(x) + np.var(own_y - xy.mean(0), ddof=1) / len(y))
    return float(own_x.mean() + own_y.mean() - 2 * xy.mean()), float(error)


def inception_score(probabilities):
    """exp of the mean KL(p(y|x) || p(y)) over consecutive tenths, (mean, standard deviation) (1606.03498); 1 to the number of classes; fewer than 10 images: one each."""
    scores = []
    for part in np.array_split(probabilities, min(10, len(probabilities))):
        scores.append(np.exp(scipy.special.rel_entr(part, part.mean(0)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def image_files(path, what):
    """Sorted PNG and JPEG files of a folder with two images or more."""
    if not Path(path).is_dir():
        fail(f"{what} {path}: no such folder of images{'; it is a file' if Path(path).is_file() else ''}")
    files = sorted(filter(is_image, Path(path).iterdir()))
    if len(files) < 2:
        fail(f"{what} {path}: found {len(files)} PNG or JPEG images, expected two or more")
    return files


def reference_statistics(path, net, name):
    """{mu, sigma, n, features or None} of a folder, cached by the content of its files, or of a .npz with mu and sigma as pytorch-fid writes it."""
    if str(path).endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as f:
                stats = {key: f[key] for key in f.files}
        except Exception as e:  # what np.load raises for damaged files has no common type
            fail(f"reference {path}: not a readable .npz ({type(e).__name__}: {e})")
        if {"mu", "sigma"} - stats.keys() or stats["mu"].shape != (2048,) or stats["sigma"].shape != (2048, 2048) or not all(np.isfinite(stats[k]).all() for k in ("mu", "sigma")):
            fail(f"reference {path}: found {', '.join(f'{k} {v.shape}' for k, v in stats.items())}, expected finite mu (2048,) and sigma (2048, 2048)")
        return {"mu": stats["mu"], "sigma": stats["sigma"], "features": None, "n": "unknown"}
    files = image_files(path, "reference")
    key = hashlib.sha256(name.encode())
    for file in files:
        key.update(hashlib.sha256(file.read_bytes()).digest())
    cache = cache_file(f"inception-{key.hexdigest()[:32]}.npz")
    try:
        with np.load(cache, allow_pickle=False) as f:
            return {"mu": f["mu"], "sigma": f["sigma"], "features": f["features"], "n": len(f["features"])}
    except Exception:
        pass  # no cache yet, or a damaged one
    features, _ = inception_features(net, [read_image(file) for file in files])
    stats = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False), "features": features}
    write_cache(cache, **stats)
    return {**stats, "n": len(features)}


def score_images(generated, reference, weights=None, device="cpu", out=None):
    """FID, KID, IS, face rate and the reference's floor for a folder of images against a folder or .npz of statistics; prints them, returns a dict for JSON.

    The floor is the same distance of random images of the reference, half of them or as many as are generated, to its others. out: .npz that receives the reference's mu and sigma.
    """
    files = image_files(generated, "generated")
    images = [read_image(file) for file in files]
    net, name = load_inception(weights, device)
    stats = reference_statistics(reference, net, name)
    real = stats["features"]
    sizes = {image.shape[:2] for image in images} | ({read_image(image_files(reference, "reference")[0]).shape[:2]} if real is not None else set())
    if len(sizes) > 1:
        print(f"note: images of {len(sizes)} sizes; each is enlarged to 299x299 by itself", file=sys.stderr)
    features, probabilities = inception_features(net, images)
    result = {"n": len(files), "n_reference": stats["n"], "name": name, "distance": frechet_distance(features, stats["mu"], stats["sigma"]), "is": inception_score(probabilities)}
    print(f"{name} {result['distance']:.3f} ({len(files)} generated, {stats['n']} reference images)")
    if real is not None:
        order = np.random.default_rng(0).permutation(len(real))
        half = min(len(real) // 2, len(files))
        result |= {"kid": kernel_distance(features, real), "n_floor": half,
                   "floor": frechet_distance(real[order[:half]], real[order[half:]].mean(0), np.cov(real[order[half:]], rowvar=False)) if half > 1 else None}
        print(f"KID {result['kid'][0]:.5f} +- {result['kid'][1]:.5f} (standard error)")
        print(f"floor {result['floor']:.3f}: {half} against {len(real) - half} other images of the reference" if half > 1 else "floor: too few reference images")
    classes = "1008 classes of this network"
    if name == "FID" and (net := course_inception(device)):
        result["is"], classes = inception_score(inception_features(net, images)[1]), "torchvision's 1000 classes, as the course's IS.py"
    print(f"IS {result['is'][0]:.3f} +- {result['is'][1]:.3f} (10 splits, {classes})")
    try:
        import dlib
        detector = dlib.get_frontal_face_detector()
        result["face_rate"] = float(np.mean([len(detector(np.ascontiguousarray(image), 1)) == 1 for image in images]))
        print(f"face rate {result['face_rate']:.4f} (dlib HOG, exactly one face)")
    except ImportError:
        print("face rate: install dlib for it")
    if out:
        np.savez(out, mu=stats["mu"], sigma=stats["sigma"])
    return result


# ------------------------------------------------------------------ plots

def save_grid(path, images, rows, columns, title, scale=1.0):
    """Labelled picture grid as PNG. images: uint8 (len(rows), len(columns), 3, H, W); scale: inches per image / 0.6."""
    from matplotlib.figure import Figure
    images = F.pad(images, (1, 1, 1, 1), value=255)  # a white gap between the images
    r, c, _, h, w = images.shape
    fig = Figure(figsize=(0.6 * scale * c + 1.0, 0.6 * scale * r + 0.9), dpi=150)
    ax = fig.subplots()
    ax.imshow(images.permute(0, 3, 1, 4, 2).reshape(r * h, c * w, 3).numpy(), interpolation="nearest")
    ax.set_xticks([w * (i + 0.5) for i in range(c)], columns)
    ax.set_yticks([h * (i + 0.5) for i in range(r)], rows)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=9)
    fig.savefig(path, bbox_inches="tight")


def save_curves(path, csv_path, columns, title, yscale="log"):
    """Line plot over `step` of the named columns of a log.csv, one curve each, as PNG; yscale: log or linear."""
    from matplotlib.figure import Figure
    log = np.atleast_1d(np.genfromtxt(csv_path, delimiter=",", names=True))
    fig = Figure(figsize=(6, 3.2), dpi=150)
    ax = fig.subplots()
    for column in columns:
        ax.plot(log["step"], log[column], label=column, marker="." if log.size < 3 else None)
    ax.set(xlabel="step", title=title, yscale=yscale)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)


def save_scatter(path, points, groups, names, title):
    """Scatter plot as PNG: points (N, 2), groups (N,) indices into `names`, one colour each."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6, 5.4), dpi=150)
    ax, order = fig.subplots(), np.random.default_rng(0).permutation(len(points))  # shuffled: no group covers another
    ax.scatter(*points[order].T, s=5, alpha=0.7, linewidths=0, c=[f"C{group}" for group in groups[order]])
    for group, name in enumerate(names):
        ax.scatter([], [], s=5, color=f"C{group}", label=name)
    ax.set(xticks=[], yticks=[], title=title)
    ax.title.set_size(9)
    ax.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    fig.savefig(path, bbox_inches="tight")


# ------------------------------------------------------------------ report

STYLE = """body{max-width:62rem;margin:0 auto;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;overflow-wrap:break-word}
h1,h2{line-height:1.2}h2{border-top:2px solid #ddd;padding-top:1rem}figure{margin:1rem 0;break-inside:avoid}img{max-width:100%;height:auto}figcaption{color:#555}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}
pre{overflow-x:auto;background:#f6f6f6;padding:.6rem;font-size:.8rem}.pass{color:#060}.fail{color:#a00}@media(max-width:40rem){td,th{padding:.2rem .3rem;font-size:.75rem}}@media print{pre{white-space:pre-wrap}}"""
TITLES = {"p1": "GANs: faces and digits", "p2": "Conditional diffusion on digits", "p3": "DDIM on faces", "p4": "Domain adaptation"}
CAPTIONS = {"compare": "First 32 images: A (left) and B (right), the same latents", "first": "First images of fixed latents", "interpolation": "Interpolation between latents",
            "training": "Training", "digits": "Ten images of each digit: rows digits, columns noises", "reverse": "Reverse process of the first 0", "guidance": "Guidance weights, the same noise in each column",
            "eta_grid": "Rows: eta, columns: noises", "tsne": "t-SNE of the CNN features"}
# figure, file, key, course's bar, best of the reports and student repositories, whether larger is better
BARS = [("FID, {}", "p1_*.json", "distance", 27.0, "22.97", False), ("face rate, {}", "p1_*.json", "face_rate", 0.90, "0.922", True), ("inception score, {}", "p1_*.json", "is", None, "", True),
        ("digit accuracy, {}", "p1_acgan.json", "accuracy", 0.80, "0.998", True), ("digit accuracy, {}", "p2_*.json", "accuracy", 0.95, "0.999", True), ("diversity, {}", "p[12]_*.json", "diversity", None, "", True),
        ("FID, {}", "p3_*.json", "distance", None, "", False), ("face rate, {}", "p3_*.json", "face_rate", None, "", True), ("mean squared error, {}", "p3_*.json", "mse", None, "0.0072", False),
        ("largest mean squared error, {}", "p3_*.json", "largest", 20.0, "", False)]
ADAPTATION = {"mnistm-svhn": (40, 52.8), "mnistm-usps": (76, 93.3), "svhn-mnistm": (42, 51.6), "usps-svhn": (28, 34.2)}  # the course's bar, best student's DANN


def write_report(out, built_in=False):
    """Writes OUT/report.html from what run_all.sh left in OUT: one file with the pictures inside, figures beside the course's bars, networks, commands and times.

    built_in: the data were the built-in ones, whose figures are not set against those bars.
    """
    import base64
    import html
    import platform
    out, body = Path(out), []

    def table(header, rows):
        cells = ["".join(f"<th>{h}</th>" for h in header), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
        body.append('<div class="wide"><table>' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>")

    def verdict(value, bar, larger=True):
        passed = value >= bar if larger else value <= bar
        return f'<span class="{"pass" if passed else "fail"}">{"pass" if passed else "fail"}</span>'

    commands = {}
    for line in (out / "commands.tsv").read_text().splitlines() if (out / "commands.tsv").is_file() else ():
        seconds, command = line.split("\t", 1)
        command = command.replace(" --resume", "")
        commands[command] = commands.get(command, 0) + int(seconds)  # of all calls, interrupted ones as well
    for problem, title in TITLES.items():
        figures, scores, start = sorted((out / f"{problem}_figures").glob("*")), [], len(body)
        for name, pattern, key, bar, best, larger in BARS:
            for path in (p for p in sorted(out.glob(pattern)) if p.name.startswith(problem)):
                result = json.loads(path.read_text())
                value = result.get(key)
                if value is None or key == "is" and result["name"] != "FID":  # another network's classes mean nothing
                    continue
                value = value[0] if isinstance(value, list) else value
                label = name.format(path.stem.split("_", 1)[1]) if key != "distance" else f"{result['name']}, {path.stem.split('_', 1)[1]}"
                comparable = not built_in and (key != "distance" or result["name"] == "FID")
                n = f"{result['n']} images" if "n" in result else ""
                scores.append((html.escape(label), f"{value:.4g}", n, bar if comparable and bar is not None else "", best if comparable else "", verdict(value, bar, larger) if comparable and bar is not None else ""))
        if scores:
            table(("", "here", "N", "course's bar", "best of the reports", ""), scores)
        path = out / f"{problem}_table" / "table.json"
        if path.is_file():
            cells = json.loads(path.read_text())
            scenarios = list(next(iter(cells.values())))
            rows = []
            for method, results in cells.items():
                shares = [[100 * run["accuracy"] for run in results[s]] for s in scenarios]
                rows.append((method, *(f"{np.mean(v):.1f} %" + (f" &plusmn; {np.std(v, ddof=1):.1f}" if len(v) > 1 else "") + (" " + verdict(np.mean(v), ADAPTATION[s][0]) if s in ADAPTATION and method.startswith("dann") and not built_in else "")
                                           for s, v in zip(scenarios, shares))))
            if not built_in:
                rows.append(("course's bar; best student's DANN", *(f"{ADAPTATION[s][0]} %; {ADAPTATION[s][1]} %" if s in ADAPTATION else "" for s in scenarios)))
            table(("accuracy on the target's val images", *(s.replace("-", " &rarr; ") for s in scenarios)), rows)
        for path in figures:
            if path.suffix == ".png":
                caption = next((text for start_, text in CAPTIONS.items() if path.stem.startswith(start_)), path.stem)
                data = base64.b64encode(path.read_bytes()).decode()
                body.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption} ({path.stem})</figcaption></figure>')
        for path in figures:
            if path.suffix == ".txt":
                body.append(f"<details><summary>Network: {html.escape(path.stem)}</summary><pre>{html.escape(path.read_text())}</pre></details>")
        if len(body) > start:
            body.insert(start, f"<h2>{title}</h2>")
    if commands:
        body.append("<h2>Commands and times</h2>")
        table(("seconds", "command"), [(seconds, f"<code>{html.escape(command)}</code>") for command, seconds in commands.items()])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {platform.platform()}; seed 0 unless a command says otherwise"
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>Report</title><style>{STYLE}</style></head>'
            f"<body><h1>Four problems of deep generative vision</h1>{'<p><b>Made with the built-in data: for trying things out, no results.</b></p>' if built_in else ''}<p>{html.escape(versions)}</p>{''.join(body)}</body></html>")
    temporary = out / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out / "report.html")
    print(out / "report.html")


# ------------------------------------------------------------------ command line

def main():
    p = argparse.ArgumentParser(description="Quality of generated images, and the course's data for those who lack its link.")
    p.error = fail
    commands = p.add_subparsers(dest="command", required=True)
    f = commands.add_parser("fid", help="Frechet inception distance, kernel inception distance, inception score and face rate of a folder of images")
    f.add_argument("generated", help="folder of PNG or JPEG images")
    f.add_argument("reference", help="folder of images, or .npz with mu and sigma")
    f.add_argument("--inception", metavar="FILE", help="weights of pytorch-fid's Inception network (default: downloaded once)")
    f.add_argument("--json", metavar="FILE", help="write the figures there")
    f.add_argument("--save-reference", metavar="FILE.npz", help="write the reference's mu and sigma there, as pytorch-fid reads them")
    d = commands.add_parser("data", help="make the course's layout from MNIST, BSDS500, USPS, SVHN and CelebA")
    d.add_argument("out", help="folder to make")
    d.add_argument("--from", dest="source", metavar="DIR", help="folder with the original files (default: downloaded into OUT/downloads)")
    r = commands.add_parser("report", help="write OUT/report.html from what run_all.sh left there")
    r.add_argument("out", help="run_all.sh's OUT")
    r.add_argument("--built-in", action="store_true", help="the data were the built-in ones: no comparison with the course's bars")
    for command in (f, d, r):
        command.error = fail
    args = p.parse_args()
    try:
        if args.command == "data":
            if args.source and not Path(args.source).is_dir():
                fail(f"--from {args.source}: no such folder")
            raise SystemExit(1 if make_data(args.out, args.source) else 0)
        if args.command == "report":
            if not Path(args.out).is_dir():
                fail(f"{args.out}: no such folder; expected the OUT of run_all.sh")
            return write_report(args.out, args.built_in)
        for path in filter(None, (args.json, args.save_reference)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        result = score_images(args.generated, args.reference, args.inception, "cuda" if torch.cuda.is_available() else "cpu", args.save_reference)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    except OSError as e:  # a full disk, a folder without permission, a file in a folder's place
        fail(f"{e.filename or args.command}: {e.strerror or e}")
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
