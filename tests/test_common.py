"""Loaders on every layout, from small real-format files written here; cache; digit scores; plots."""
import bz2
import csv
import gzip
import os
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import ROOT

SHARED = ROOT.parent / "shared"


def write_images(folder, n, mode="RGB", size=(28, 28), seed=0):
    """n noise PNGs 00000.png ...; returns their names and pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shape = (n, size[1], size[0]) if mode == "L" else (n, size[1], size[0], len(mode))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    names = [f"{i:05d}.png" for i in range(n)]
    for name, p in zip(names, pixels):
        Image.fromarray(p).save(folder / name)
    return names, pixels


def write_csv(path, rows, header=("image_name", "label")):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


@pytest.fixture
def course(tmp_path):
    """A 2022/2023 course folder with 6 train and 4 val images in one data folder."""
    base = tmp_path / "digits" / "mnistm"
    names, pixels = write_images(base / "data", 10)
    write_csv(base / "train.csv", [(n, i % 10) for i, n in enumerate(names[:6])])
    write_csv(base / "val.csv", [(n, i % 10) for i, n in enumerate(names[6:], 6)])
    return tmp_path, pixels


def test_layout_2022(course):
    root, pixels = course
    for split, part in (("train", slice(0, 6)), ("val", slice(6, 10))):
        images, labels = common.load_digits(root, "mnistm", split)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert (images.permute(0, 2, 3, 1).numpy() == pixels[part]).all()
        assert labels.tolist() == list(range(10))[part]


def test_layout_2021_grey_images_of_another_size(tmp_path):
    base = tmp_path / "digits" / "usps"
    for split, n in (("train", 5), ("test", 3)):
        names, _ = write_images(base / split, n, "L", (16, 16))
        write_csv(base / f"{split}.csv", [(name, 7) for name in names])
    images, labels = common.load_digits(tmp_path, "usps", "val")
    assert images.shape == (3, 3, 28, 28) and labels.tolist() == [7] * 3
    assert (images[:, 0] == images[:, 2]).all()
    assert len(common.load_digits(tmp_path, "usps", "train")[0]) == 5


def test_header_with_space_and_byte_order_mark(course):
    table = course[0] / "digits" / "mnistm" / "train.csv"
    table.write_text("\ufeffimage_name, label\n00000.png, 3\n")
    assert common.load_digits(course[0], "mnistm", "train")[1].tolist() == [3]


def cache_files():
    folder = os.path.join(os.environ["XDG_CACHE_HOME"], "p1-p4-images")
    return {os.path.join(folder, n) for n in os.listdir(folder)} if os.path.isdir(folder) else set()


def test_cache_is_used_rebuilt_when_damaged_and_renewed_when_a_file_changes(course):
    root, pixels = course
    before = cache_files()
    common.load_digits(root, "mnistm", "train")
    (cache,) = cache_files() - before
    image = root / "digits" / "mnistm" / "data" / "00000.png"
    stat, size = image.stat(), image.stat().st_size
    image.write_bytes(b"x" * size)  # same size and time: only the cache can still know the pixels
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (common.load_digits(root, "mnistm", "train")[0][0].permute(1, 2, 0).numpy() == pixels[0]).all()
    Image.fromarray(pixels[0]).save(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for damage in (b"", b"PK\x03\x04 not a zip", open(cache, "rb").read()[:-200]):
        open(cache, "wb").write(damage)
        assert (common.load_digits(root, "mnistm", "train")[0].permute(0, 2, 3, 1).numpy() == pixels[:6]).all()
    Image.fromarray(255 - pixels[0]).save(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert (common.load_digits(root, "mnistm", "train")[0][0].permute(1, 2, 0).numpy() == 255 - pixels[0]).all()


def test_cache_with_pickled_objects_is_not_executed(course):
    root, pixels = course
    before = cache_files()
    common.load_digits(root, "mnistm", "val")
    (cache,) = cache_files() - before
    np.savez(cache, images=np.array([{"pickled": "object"}], dtype=object))
    assert (common.load_digits(root, "mnistm", "val")[0].permute(0, 2, 3, 1).numpy() == pixels[6:]).all()


def test_unwritable_cache_is_skipped(course, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(common.load_digits(course[0], "mnistm", "train")[0]) == 6


def test_bad_folders(course, tmp_path, error):
    root, _ = course
    base = root / "digits" / "mnistm"
    rows = [("00000.png", 1), ("00001.png", 2)]

    def load():
        common.load_digits(root, "mnistm", "train")

    assert "no such folder" in error(common.load_digits, tmp_path / "none", "mnistm", "train")
    for domain, file in (("svhn", "test_32x32.mat"), ("usps", "usps.t.bz2")):
        message = error(common.load_digits, root, domain, "val")
        assert all(part in message for part in (f"digits/{domain}/val.csv", f"digits/{domain}/test.csv", file))
    (root / "usps.bz2").write_bytes(b"damaged")
    assert "usps files of the torchvision layout are damaged" in error(common.load_digits, root, "usps", "train")
    write_idx(root / "MNIST" / "raw", "t10k", np.zeros((2, 28, 28), np.uint8), np.arange(2))
    images = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    base.rename(base.with_name("elsewhere"))
    assert "mnistm files of the torchvision layout are damaged" in error(common.load_digits, root, "mnistm", "val")
    base.with_name("elsewhere").rename(base)
    write_csv(base / "train.csv", rows, ("image_name", "digit"))
    assert "no column label" in error(load)
    write_csv(base / "train.csv", [])
    assert "no rows" in error(load)
    for bad in ("12", "-1", "x", ""):
        write_csv(base / "train.csv", [*rows, ("00002.png", bad)])
        assert "line 4" in error(load)
    for name in ("99999.png", "../secret.png", "/etc/passwd", ""):
        write_csv(base / "train.csv", [*rows, (name, 1)])
        assert "line 4" in error(load) and "is not in" in error(load)
    write_csv(base / "train.csv", rows)
    (base / "data" / "00001.png").write_bytes((base / "data" / "00001.png").read_bytes()[:60])
    assert "00001.png" in error(load)


def test_huge_image_is_refused(tmp_path, error):
    Image.new("1", (100_000, 200)).save(tmp_path / "bomb.png")  # a few kB on disk
    assert "pixels" in error(common.read_image, tmp_path / "bomb.png")


def write_idx(folder, part, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes())


def write_originals(root):
    """A few images in the files' real formats: MNIST, a photograph, SVHN, USPS, CelebA; returns SVHN's array."""
    from scipy.io import savemat
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 4)):
        write_idx(root / "MNIST" / "raw", part, rng.integers(0, 2, (n, 28, 28), dtype=np.uint8) * 255, np.arange(n))
    (root / "BSDS500").mkdir()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(root / "BSDS500" / "1.jpg", quality=100)
    Image.new("RGB", (20, 90)).save(root / "BSDS500" / "too_narrow.jpg")
    (root / "celeba" / "img_align_celeba").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (178, 218), (i, 0, 0)).save(root / "celeba" / "img_align_celeba" / f"{i:06d}.jpg", quality=100)  # not a background
    x = rng.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for name in ("train", "test"):
        savemat(root / f"{name}_32x32.mat", {"X": x, "y": np.array([[1], [2], [10], [4], [5]], dtype=np.uint8)})
    line = "3 " + " ".join(f"{i}:{-1 if i <= 128 else 1}" for i in range(1, 257))  # libsvm: label 1..10, pixels -1..1
    for name, n in (("usps.bz2", 3), ("usps.t.bz2", 2)):
        (root / name).write_bytes(bz2.compress("\n".join([line] * n).encode()))
    return x


def test_torchvision_root(tmp_path):
    x = write_originals(tmp_path)
    images, labels = common.load_digits(tmp_path, "mnistm", "val")
    assert images.shape == (4, 3, 28, 28) and labels.tolist() == [0, 1, 2, 3]
    assert set(images[:, 0].flatten().tolist()) <= {199, 200, 201, 54, 55, 56}  # |200 - 0| and |200 - 255|
    again, _ = common.load_digits(tmp_path, "mnistm", "val")
    assert (images == again).all()
    images, labels = common.load_digits(tmp_path, "svhn", "train")
    assert images.shape == (5, 3, 28, 28) and labels.tolist() == [1, 2, 0, 4, 5]  # SVHN writes 0 as 10
    assert abs(images.float().mean().item() - x.mean()) < 1
    images, labels = common.load_digits(tmp_path, "usps", "val")
    assert images.shape == (2, 3, 28, 28) and labels.tolist() == [2, 2]
    assert images[0, 0, 0].max() == 0 and images[0, 0, -1].min() == 255


def test_make_data(tmp_path, capsys):
    """The course's layout from the original files; interrupted and called again it completes; what is missing is named."""
    root, out = tmp_path / "original", tmp_path / "hw2_data"
    root.mkdir()
    write_originals(root)
    mat = root / "test_32x32.mat"
    whole = mat.read_bytes()
    mat.write_bytes(whole[:100])
    assert common.make_data(out, root) == ["svhn"]
    captured = capsys.readouterr()
    assert "svhn: cannot be made" in captured.err and "mnistm: 6 train, 1 val, 3 test images" in captured.out and "face: 18 train, 0 val, 2 test" in captured.out
    mat.write_bytes(whole)
    before = (out / "digits" / "mnistm" / "train.csv").stat().st_mtime_ns
    assert common.make_data(out, root) == [] and (out / "digits" / "mnistm" / "train.csv").stat().st_mtime_ns == before
    for domain, n in (("mnistm", 6), ("usps", 3), ("svhn", 6)):
        images, labels = common.load_digits(out, domain, "train")
        assert images.shape == (n, 3, 28, 28) and len(labels) == n
    assert sorted(os.listdir(out / "face" / "train"))[0] == "00000.png" and common.load_faces(out, "train").shape == (18, 3, 64, 64)
    splits = [set(p.read_text().split()[1:]) for p in (out / "digits" / "mnistm").glob("*.csv")]
    assert len(set.union(*splits)) == 10 == sum(map(len, splits))
    assert [len(part) for part in common.course_split(99_289, "svhn")] == [63_544, 15_887, 19_858]


def test_make_data_from_archives(tmp_path, capsys):
    """MNIST's .gz, BSDS500's tar and CelebA's zip as they are published; a path that leaves the folder is not written."""
    source, out = tmp_path / "archives", tmp_path / "out"
    source.mkdir()
    write_originals(tmp_path)
    for path in (tmp_path / "MNIST" / "raw").iterdir():
        (source / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    with tarfile.open(source / "BSR_bsds500.tgz", "w:gz") as tar:
        tar.add(tmp_path / "BSDS500" / "1.jpg", "BSR/images/1.jpg")
    with zipfile.ZipFile(source / "img_align_celeba.zip", "w") as z:
        for path in (tmp_path / "celeba" / "img_align_celeba").iterdir():
            z.write(path, f"img_align_celeba/{path.name}")
        z.write(tmp_path / "usps.bz2", "../../escaped.txt")
    assert common.make_data(out, source) == ["usps", "svhn"]
    assert (out / "digits" / "mnistm" / "train.csv").is_file() and len(os.listdir(out / "face" / "train")) == 18
    assert not list(tmp_path.glob("escaped.txt")) and not list(out.glob("escaped.txt"))
    with tarfile.open(source / "BSR_bsds500.tgz", "w:gz") as tar:
        tar.add(tmp_path / "BSDS500" / "1.jpg", "../../escaped.jpg")
    assert "mnistm" in common.make_data(tmp_path / "other", source) and not list(tmp_path.rglob("escaped.jpg"))


def test_blend_is_the_absolute_difference():
    photo = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)  # exactly one possible patch
    digit = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    out = common.blend(digit, [photo], seed=0)[0].permute(1, 2, 0).int()
    assert (out == (torch.from_numpy(photo).int() - digit[0, :, :, None].int()).abs()).all()


@pytest.mark.parametrize("domain", common.DOMAINS)
def test_builtin(domain):
    images, labels = common.load_digits(None, domain, "train")
    val, val_labels = common.load_digits(None, domain, "val")
    assert len(images) == len(labels) > 6000 and len(val) >= 1800
    assert images.shape[1:] == (3, 28, 28) and images.dtype == torch.uint8 and labels.unique().tolist() == list(range(10))
    again, _ = common.builtin_digits.__wrapped__(domain, "train")
    assert (images == again).all() and images.float().std() > 30
    assert not (val[:, None] == images[None, :50]).flatten(2).all(-1).any()
    if domain == "usps":
        assert (images[:, 0] == images[:, 1]).all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_real_mnist_and_bsds(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for gz in (SHARED / "data" / "originals").glob("*.gz"):
        with gzip.open(gz) as source, open(raw / gz.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    with tarfile.open(next((SHARED / "data" / "originals").glob("*.tar"))) as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][:5]
        tar.extractall(tmp_path, members, filter="data")
    images, labels = common.load_digits(tmp_path, "mnistm", "val")
    assert images.shape == (10000, 3, 28, 28) and labels[:5].tolist() == [7, 2, 1, 0, 4]


def save_digits(folder, images, labels):
    folder.mkdir()
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{label}_{i:04d}.png")


def test_score_digits(tmp_path, error):
    cpu = torch.device("cpu")
    images, labels = common.load_digits(None, "mnistm", "val")
    images, labels = images[:600], labels[:600]
    save_digits(tmp_path / "real", images, labels.tolist())
    save_digits(tmp_path / "shifted", images[:200], ((labels[:200] + 1) % 10).tolist())
    real = common.score_digits(tmp_path / "real", None, None, tmp_path, cpu)
    (classifier,) = tmp_path.glob("digit_classifier_*.pth")
    own = torch.load(classifier, weights_only=True)["accuracy"]
    assert own > 0.8 and abs(real["accuracy"] - own) < 0.08 and real["n"] == 600
    assert 0.9 < real["diversity"] < 1.1
    assert common.score_digits(tmp_path / "shifted", None, classifier, tmp_path, cpu)["accuracy"] < 0.2

    same = images[:1].expand(20, -1, -1, -1)
    save_digits(tmp_path / "same", same, [d for d in range(10) for _ in range(2)])
    result = common.score_digits(tmp_path / "same", None, classifier, tmp_path, cpu)
    assert result["diversity"] == 0 and result["accuracy"] == pytest.approx(0.1)

    for name in ("notes.txt", "x_1.png"):
        (tmp_path / "same" / name).write_text("x")
        assert name in error(common.score_digits, tmp_path / "same", None, classifier, tmp_path, cpu)
        (tmp_path / "same" / name).unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "same" / "0_big.png")
    assert "0_big.png (32x32)" in error(common.score_digits, tmp_path / "same", None, classifier, tmp_path, cpu)
    assert "no such folder" in error(common.score_digits, tmp_path / "nothing", None, classifier, tmp_path, cpu)
    (tmp_path / "bad.pth").write_bytes(b"x")
    assert "course's format" in error(common.score_digits, tmp_path / "real", None, tmp_path / "bad.pth", tmp_path, cpu)


def test_grid_and_curves(tmp_path):
    images = torch.zeros(2, 3, 3, 28, 28, dtype=torch.uint8)
    images[1, 2, 0] = 255
    common.save_grid(tmp_path / "grid.png", images, ["a", "b"], ["x", "y", "z"], "title")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    red = (picture[:, :, 0] > 200) & (picture[:, :, 1] < 50)
    ys, xs = np.nonzero(red)
    dark = (picture.sum(2) == 0)
    assert red.sum() > 1000 and dark.sum() > 4 * red.sum()  # one of six tiles is red, in the lower right
    assert ys.mean() > np.nonzero(dark)[0].mean() and xs.mean() > np.nonzero(dark)[1].mean()
    write_csv(tmp_path / "log.csv", [(100, 0.5), (200, 0.25)], ("step", "loss"))
    common.save_curves(tmp_path / "curves.png", tmp_path / "log.csv", ["loss"], "loss")
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 0
