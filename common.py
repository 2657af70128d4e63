"""What the four scripts share: data sets as tensors, digit accuracy, labelled picture grids.

A data set is one uint8 tensor (N, 3, H, W) and one int64 tensor (N,) of labels. `load_digits` looks for, in this order,

1. the course layout: ROOT/digits/DOMAIN/{data/*.png,train.csv,val.csv} (2022, 2023) or
   ROOT/digits/DOMAIN/{train,test}/*.png + {train,test}.csv (2021); CSV header `image_name,label`;
2. a torchvision root: ROOT/MNIST/raw, usps.bz2 + usps.t.bz2, {train,test}_32x32.mat; MNIST-M is blended from MNIST and
   a folder of photographs (BSDS500 or BSR, or else every *.jpg below ROOT), as Ganin et al. did (arXiv 1505.07818): |patch - digit|;
3. ROOT = None: built-in data, made in seconds from files that scikit-learn and matplotlib ship.

Decoded PNG folders are cached in $XDG_CACHE_HOME (or ~/.cache), keyed by every file's path, size and time.
"""
import csv
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

DOMAINS = ("mnistm", "svhn", "usps")
MAX_PIXELS = 2**24  # of one input image: a PNG of a few kB can unpack to gigabytes


def fail(message):
    """Wrong usage or input: one line on standard error, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "p1-p4-images"
    cache = home / f"{key.hexdigest()[:32]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as f:
            images = f["images"]
        if images.shape == (len(names), 3, height, width) and images.dtype == np.uint8:
            return torch.from_numpy(images)
    except Exception:
        pass  # no cache yet, or a damaged one (numpy and zipfile raise many types): decode again
    images = np.stack([read_image(folder / name, size) for name in names]).transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, suffix=".tmp", delete=False) as f:
            try:
                np.savez(f, images=images)
                os.replace(f.name, cache)
            except BaseException:
                os.unlink(f.name)
                raise
    except OSError:
        pass  # read-only home or full disk: the cache only saves time
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
    present = set(os.listdir(folder)) if Path(folder).is_dir() else fail(f"{folder}: no such folder (images of {path})")
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
    except (RuntimeError, FileNotFoundError):  # torchvision's "Dataset not found"
        parts = {"mnistm": "MNIST/raw with BSDS500 or other *.jpg photographs", "svhn": f"{other}_32x32.mat", "usps": "usps.bz2, usps.t.bz2"}
        fail(f"--data {root}: no {domain} {split} images; looked for digits/{domain}/{split}.csv with data/ (2022, 2023), "
             f"digits/{domain}/{other}.csv with {other}/ (2021), {parts[domain]} (torchvision)")
    except Exception as e:  # what the readers of .mat, .bz2 and idx files raise has no common type
        fail(f"--data {root}: the {domain} files of the torchvision layout are damaged ({type(e).__name__}: {e}); download them again")


def torchvision_digits(root, domain, split):
    """`load_digits` from the files that torchvision.datasets downloads; RuntimeError or FileNotFoundError if they are not there."""
    import scipy.io
    from torchvision import datasets
    train = split == "train"
    if domain == "svhn":
        path = root / f"{'train' if train else 'test'}_32x32.mat"
        if not path.is_file():
            raise RuntimeError("no SVHN")
        data = scipy.io.loadmat(path)
        images = torch.from_numpy(data["X"]).permute(3, 2, 0, 1).float()  # (N, 3, 32, 32)
        images = F.interpolate(images, (28, 28), mode="bilinear", antialias=True).round().byte()
        return images, torch.from_numpy(data["y"].flatten().astype(np.int64)) % 10  # 0 is written as 10
    if domain == "usps":
        data = datasets.USPS(str(root), train=train)
        grey = torch.from_numpy(data.data)[:, None].float()
        return to_rgb(F.interpolate(grey, (28, 28), mode="bilinear").round().byte()), torch.tensor(data.targets)
    data = datasets.MNIST(str(root), train=train)
    files = sorted(root.glob("BS[DR]*/**/*.jpg")) or sorted(p for p in root.rglob("*.jpg") if "celeba" not in p.parts)
    photographs = [p for p in map(read_image, files) if min(p.shape[:2]) >= 28]
    if not photographs:
        raise RuntimeError("no photographs")
    return blend(data.data, photographs, seed=int(train)), data.targets


def to_rgb(grey):
    """(N, 1, H, W) -> (N, 3, H, W)."""
    return grey.expand(-1, 3, -1, -1).contiguous()


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
        return to_rgb(F.interpolate(digits, (28, 28), mode="bilinear").round().byte()), labels
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
    own = f"{100 * state['accuracy']:.2f} % on the val part of {state['data']}" if "accuracy" in state else "own accuracy unknown"
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


# ------------------------------------------------------------------ plots

def save_grid(path, images, rows, columns, title, scale=1.0):
    """Labelled picture grid as PNG. images: uint8 (len(rows), len(columns), 3, H, W); scale: inches per image / 0.6."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    images = F.pad(images, (1, 1, 1, 1), value=255)  # a white gap between the images
    r, c, _, h, w = images.shape
    fig, ax = plt.subplots(figsize=(0.6 * scale * c + 1.0, 0.6 * scale * r + 0.9), dpi=150)
    ax.imshow(images.permute(0, 3, 1, 4, 2).reshape(r * h, c * w, 3).numpy(), interpolation="nearest")
    ax.set_xticks([w * (i + 0.5) for i in range(c)], columns)
    ax.set_yticks([h * (i + 0.5) for i in range(r)], rows)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=9)
    fig.savefig(path, bbox_inches="tight")
    plt.close(fig)


def save_curves(path, csv_path, columns, title):
    """Line plot over `step` of the named columns of a log.csv, one curve each, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = np.atleast_1d(np.genfromtxt(csv_path, delimiter=",", names=True))
    fig, ax = plt.subplots(figsize=(6, 3.2), dpi=150)
    for column in columns:
        ax.plot(log["step"], log[column], label=column)
    ax.set(xlabel="step", title=title, yscale="log")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def save_scatter(path, points, groups, names, title):
    """Scatter plot as PNG: points (N, 2), groups (N,) indices into `names`, one colour each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 5.4), dpi=150)
    colours, order = plt.get_cmap("tab10"), np.random.default_rng(0).permutation(len(points))  # shuffled: no group covers another
    ax.scatter(*points[order].T, s=5, alpha=0.7, linewidths=0, c=colours(groups[order]))
    for group, name in enumerate(names):
        ax.scatter([], [], s=5, color=colours(group), label=name)
    ax.set(xticks=[], yticks=[], title=title)
    ax.title.set_size(9)
    ax.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    fig.savefig(path, bbox_inches="tight")
    plt.close(fig)
