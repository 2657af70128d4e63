"""Loaders on every layout, from small real-format files written here; cache; digit scores; plots."""

import bz2
import csv
import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common

CPU = torch.device("cpu")
USES_CPU = "CUDA_VISIBLE_DEVICES= uses the CPU"


def message(call, *arguments):
    """The text of the ValueError or OSError that the call must raise."""
    with pytest.raises((ValueError, OSError)) as e:
        call(*arguments)
    return str(e.value)


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
    for damage in (b"", b"PK\x03\x04 not a zip", Path(cache).read_bytes()[:-200]):
        Path(cache).write_bytes(damage)
        assert (
            common.load_digits(root, "mnistm", "train")[0].permute(0, 2, 3, 1).numpy() == pixels[:6]
        ).all()
    Image.fromarray(255 - pixels[0]).save(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert (
        common.load_digits(root, "mnistm", "train")[0][0].permute(1, 2, 0).numpy() == 255 - pixels[0]
    ).all()


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


def test_bad_folders(course, tmp_path):
    root, _ = course
    base = root / "digits" / "mnistm"
    rows = [("00000.png", 1), ("00001.png", 2)]

    def load():
        common.load_digits(root, "mnistm", "train")

    assert "no such folder" in message(common.load_digits, tmp_path / "none", "mnistm", "train")
    text = message(common.load_digits, root, "svhn", "val")
    assert "digits/svhn/val.csv" in text and "digits/svhn/test.csv" in text
    write_csv(base / "train.csv", rows, ("image_name", "digit"))
    assert "expected image_name" in message(load)
    write_csv(base / "train.csv", [])
    assert "no rows" in message(load)
    for name in ("99999.png", "../secret.png", "/etc/passwd", ""):
        write_csv(base / "train.csv", [*rows, (name, 1)])
        assert "line 4" in message(load) and f"expected image_name in {base}" in message(load)
    write_csv(base / "train.csv", rows)
    (base / "data" / "00001.png").write_bytes((base / "data" / "00001.png").read_bytes()[:60])
    assert "00001.png" in message(load)


def test_huge_image_is_refused(tmp_path):
    Image.new("1", (100_000, 200)).save(tmp_path / "bomb.png")  # a few kB on disk
    assert "pixels" in message(common.read_image, tmp_path / "bomb.png")


def write_idx(folder, part, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(
        struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()
    )
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(
        struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()
    )


def write_originals(root):
    """A few images of all five data sets in the files' real formats; returns SVHN's array."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 4)):
        write_idx(
            root / "MNIST" / "raw", part, rng.integers(0, 2, (n, 28, 28), dtype=np.uint8) * 255, np.arange(n)
        )
    (root / "BSDS500").mkdir()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(root / "BSDS500" / "1.jpg", quality=100)
    Image.new("RGB", (20, 90)).save(root / "BSDS500" / "too_narrow.jpg")
    (root / "celeba" / "img_align_celeba").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (178, 218), (i, 0, 0)).save(
            root / "celeba" / "img_align_celeba" / f"{i:06d}.jpg", quality=100
        )  # not a background
    x = rng.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for name in ("train", "test"):
        savemat(
            root / f"{name}_32x32.mat", {"X": x, "y": np.array([[1], [2], [10], [4], [5]], dtype=np.uint8)}
        )
    line = "3 " + " ".join(
        f"{i}:{-1 if i <= 128 else 1}" for i in range(1, 257)
    )  # libsvm: label 1..10, pixels -1..1
    for name, n in (("usps.bz2", 3), ("usps.t.bz2", 2)):
        (root / name).write_bytes(bz2.compress("\n".join([line] * n).encode()))
    return x


def test_original_files_as_data_are_refused_with_the_command_that_takes_them(tmp_path):
    write_originals(tmp_path)
    command = f"python common.py data OUT --from {tmp_path}"
    for domain in common.DOMAINS:
        assert command in message(common.load_digits, tmp_path, domain, "train")
    assert command in message(common.load_faces, tmp_path, "train")


def test_original_digits(tmp_path):
    x = write_originals(tmp_path)
    images, labels = common.torchvision_digits(tmp_path, "mnistm", "test")
    assert images.shape == (4, 3, 28, 28) and labels.tolist() == [0, 1, 2, 3]
    assert set(images[:, 0].flatten().tolist()) <= {199, 200, 201, 54, 55, 56}  # |200 - 0| and |200 - 255|
    images, labels = common.torchvision_digits(tmp_path, "svhn", "train")
    assert images.shape == (5, 3, 28, 28) and labels.tolist() == [1, 2, 0, 4, 5]  # SVHN writes 0 as 10
    assert abs(images.float().mean().item() - x.mean()) < 1
    images, labels = common.torchvision_digits(tmp_path, "usps", "test")
    assert images.shape == (2, 3, 28, 28) and labels.tolist() == [2, 2]
    assert images[0, 0, 0].max() == 0 and images[0, 0, -1].min() == 255


def test_make_data(tmp_path, capsys):
    """The course's layout from the original files; called again it completes, what is missing is named."""
    root, out = tmp_path / "original", tmp_path / "hw2_data"
    root.mkdir()
    write_originals(root)
    mat = root / "test_32x32.mat"
    whole = mat.read_bytes()
    mat.write_bytes(whole[:100])
    assert common.make_data(out, root) == ["svhn"]
    captured = capsys.readouterr()
    assert (
        "svhn: cannot be made" in captured.err
        and "mnistm: 6 train, 1 val, 3 test images" in captured.out
        and "face: 18 train, 0 val, 2 test" in captured.out
    )
    mat.write_bytes(whole)
    before = (out / "digits" / "mnistm" / "train.csv").stat().st_mtime_ns
    assert (
        common.make_data(out, root) == []
        and (out / "digits" / "mnistm" / "train.csv").stat().st_mtime_ns == before
    )
    for domain, n in (("mnistm", 6), ("usps", 3), ("svhn", 6)):
        images, labels = common.load_digits(out, domain, "train")
        assert images.shape == (n, 3, 28, 28) and len(labels) == n
    assert sorted(os.listdir(out / "face" / "train"))[0] == "00000.png" and common.load_faces(
        out, "train"
    ).shape == (18, 3, 64, 64)
    splits = [set(p.read_text().split()[1:]) for p in (out / "digits" / "mnistm").glob("*.csv")]
    assert len(set.union(*splits)) == 10 == sum(map(len, splits))
    assert [len(part) for part in common.course_split(99_289, "svhn")] == [63_544, 15_887, 19_858]


def test_photographs_of_an_archive(tmp_path):
    """They are read in the order of their names, and nothing is unpacked: no path can leave the folder."""
    write_originals(tmp_path)
    source = tmp_path / "archives"
    source.mkdir()
    pictures = {}
    with tarfile.open(source / "BSR_bsds500.tgz", "w:gz") as tar:
        for i, name in enumerate(("BSR/b.jpg", "BSR/a.jpg", "../../escaped.jpg", "BSR/._a.jpg", "BSR/a.txt")):
            Image.new("RGB", (30, 40), (80 * i, 0, 0)).save(tmp_path / "photo.jpg", quality=100)
            pictures[name] = common.read_image(tmp_path / "photo.jpg")
            tar.add(tmp_path / "photo.jpg", name)
    found = common.read_photographs(source)
    expected = [pictures[name] for name in ("../../escaped.jpg", "BSR/a.jpg", "BSR/b.jpg")]
    assert len(found) == 3 and all((a == b).all() for a, b in zip(found, expected))
    assert os.listdir(source) == ["BSR_bsds500.tgz"] and not list(tmp_path.rglob("escaped.jpg"))


def test_blend_is_the_absolute_difference():
    photo = np.random.default_rng(0).integers(
        0, 256, (28, 28, 3), dtype=np.uint8
    )  # exactly one possible patch
    digit = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    out = common.blend(digit, [photo], seed=0)[0].permute(1, 2, 0).int()
    assert (out == (torch.from_numpy(photo).int() - digit[0, :, :, None].int()).abs()).all()


@pytest.mark.parametrize("domain", ["mnistm", pytest.param("svhn", marks=pytest.mark.slow), "usps"])
def test_builtin(domain):
    images, labels = common.load_digits(None, domain, "train")
    val, val_labels = common.load_digits(None, domain, "val")
    assert len(images) == len(labels) > 6000 and len(val) >= 1800
    assert (
        images.shape[1:] == (3, 28, 28)
        and images.dtype == torch.uint8
        and labels.unique().tolist() == list(range(10))
    )
    again, _ = common.builtin_digits.__wrapped__(domain, "val")
    assert (val == again).all() and images.float().std() > 30
    assert not (val[:, None] == images[None, :50]).flatten(2).all(-1).any()
    if domain == "usps":
        assert (images[:, 0] == images[:, 1]).all()


def save_digits(folder, images, labels):
    folder.mkdir()
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{label}_{i:04d}.png")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Untrained weights in the course's format."""
    path = tmp_path_factory.mktemp("classifier") / "untrained.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": common.Classifier().state_dict()}, path)
    return path


@pytest.mark.slow
def test_score_digits_of_real_images(tmp_path):
    """A classifier is trained; real images get its accuracy and a diversity of 1, wrong labels get none."""
    images, labels = common.load_digits(None, "mnistm", "val")
    images, labels = images[:600], labels[:600]
    save_digits(tmp_path / "real", images, labels.tolist())
    save_digits(tmp_path / "shifted", images[:200], ((labels[:200] + 1) % 10).tolist())
    path = tmp_path / "classifier.pth"
    common.train_classifier(None, path, CPU)
    real = common.score_digits(tmp_path / "real", None, path, tmp_path, CPU)
    own = torch.load(path, weights_only=True)["accuracy"]
    assert own > 0.8 and abs(real["accuracy"] - own) < 0.08 and real["n"] == 600
    assert 0.9 < real["diversity"] < 1.1
    assert common.score_digits(tmp_path / "shifted", None, path, tmp_path, CPU)["accuracy"] < 0.2


def test_score_digits_of_one_image_in_all_classes(tmp_path, classifier, capsys):
    same = common.load_digits(None, "mnistm", "val")[0][:1].expand(20, -1, -1, -1)
    save_digits(tmp_path / "same", same, [d for d in range(10) for _ in range(2)])
    (tmp_path / "same" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "same" / "._0_0000.png").write_bytes(b"x")
    result = common.score_digits(tmp_path / "same", None, classifier, tmp_path, CPU)
    assert result["n"] == 20 and result["diversity"] == 0 and result["accuracy"] == pytest.approx(0.1)
    printed = capsys.readouterr().out
    assert "correct/total = 2/20" in printed


def test_score_digits_without_some_digits_warns_of_nothing(tmp_path, classifier):
    images, labels = common.load_digits(None, "mnistm", "val")
    few = labels < 3
    save_digits(tmp_path / "few", images[few][:60], labels[few][:60].tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = common.score_digits(tmp_path / "few", None, classifier, tmp_path, CPU)
    assert set(result["per_digit"]) == {0, 1, 2} and 0.5 < result["diversity"] < 1.5
    assert "NaN" not in json.dumps(result)


def test_score_digits_refuses_what_the_grader_would(tmp_path, classifier):
    def score():
        common.score_digits(tmp_path / "digits", None, classifier, tmp_path, CPU)

    images, labels = common.load_digits(None, "mnistm", "val")
    save_digits(tmp_path / "digits", images[:2], labels[:2].tolist())
    other = "found 2 images and 1 other entries notes.txt; expected 2 or more images and nothing else"
    for name, expected in (("notes.txt", other), ("x_1.png", "x_1.png")):
        (tmp_path / "digits" / name).write_text("x")
        assert expected in message(score)
        (tmp_path / "digits" / name).unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "digits" / "0_big.png")
    assert "0_big.png has (32, 32)" in message(score)
    assert "no such folder" in message(
        common.score_digits, tmp_path / "none", None, classifier, tmp_path, CPU
    )
    (tmp_path / "bad.pth").write_bytes(b"x")
    (tmp_path / "digits" / "0_big.png").unlink()
    bad = [tmp_path / "digits", None, tmp_path / "bad.pth", tmp_path, CPU]
    assert "course's format" in message(common.score_digits, *bad)
    bad[2] = tmp_path / "none.pth"
    assert "No such file" in message(common.score_digits, *bad)


def test_grid_and_curves(tmp_path):
    images = torch.zeros(2, 3, 3, 28, 28, dtype=torch.uint8)
    images[1, 2, 0] = 255
    common.save_grid(tmp_path / "grid.png", images, ["a", "b"], ["x", "y", "z"], "title")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    red = (picture[:, :, 0] > 200) & (picture[:, :, 1] < 50)
    ys, xs = np.nonzero(red)
    dark = picture.sum(2) == 0
    assert red.sum() > 1000 and dark.sum() > 4 * red.sum()  # one of six tiles is red, in the lower right
    assert ys.mean() > np.nonzero(dark)[0].mean() and xs.mean() > np.nonzero(dark)[1].mean()
    write_csv(tmp_path / "log.csv", [(100, 0.5), (200, 0.25)], ("step", "loss"))
    common.save_curves(tmp_path / "curves.png", tmp_path / "log.csv", ["loss"], "loss")
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 0


# ---------------- one way to read an image ----------------


def test_every_mode_as_pil_converts_it(tmp_path):
    """The pixels of pytorch-fid, which calls convert("RGB") on the file."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8))
    grey = rng.integers(0, 256, (9, 7))
    pictures = {f"{mode}.png": rgba.convert("RGB").convert(mode) for mode in ("1", "L", "P", "RGB", "LA")}
    pictures |= {"rgba.png": rgba, "cmyk.tif": rgba.convert("RGB").convert("CMYK")}
    pictures |= {"transparent.png": rgba.quantize(16)}
    pictures |= {"grey16.png": Image.fromarray((grey * 257).astype(np.uint16))}
    pictures |= {"int.tif": Image.fromarray(grey.astype(np.int32))}
    pictures |= {"float_255.tif": Image.fromarray(grey.astype(np.float32))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, picture in pictures.items():
            picture.save(tmp_path / name)
            ours = common.read_image(tmp_path / name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(tmp_path / name) as file:
                    assert (ours == np.asarray(file.convert("RGB"))).all(), name
            assert ours.dtype == np.uint8 and ours.shape == (9, 7, 3)


def test_float_images_from_0_to_1_are_not_black(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tif")
    assert (common.read_image(tmp_path / "float.tif") == grey[:, :, None]).all()


def test_exif_orientation(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    for name in ("photo.png", "photo.jpg"):
        picture.save(tmp_path / name, exif=exif)
        image = common.read_image(tmp_path / name)
        assert image.shape == (40, 20, 3) and image[:16].min() > 200 and image[24:].max() < 50


def test_damaged_exif_is_no_damaged_image(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x00damaged")
    assert common.read_image(tmp_path / "a.jpg").shape == (8, 8, 3)


def test_every_format_is_taken_and_the_rest_named(tmp_path, capsys):
    kinds = ("png", "webp", "bmp", "tif", "gif", "ppm", "JPG", "jpeg")
    for kind in kinds:
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"image.{kind}")
    for name in (".DS_Store", "._image.png", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    paths = common.list_images(tmp_path)
    assert capsys.readouterr().err == ""
    assert paths == sorted(tmp_path / f"image.{kind}" for kind in kinds)
    assert common.read_images(paths).shape == (8, 3, 8, 8)
    (tmp_path / "folder.png").mkdir()
    for name in ("labels.csv", "features.h5", "film.mpg", "no_extension"):
        (tmp_path / name).write_bytes(b"x")
    assert common.list_images(tmp_path) == paths
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "5 other entries" in err and "features.h5 film.mpg folder.png" in err


def test_folders_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._a.png").write_bytes(b"x")
    assert "1 other entries notes.txt" in message(common.list_images, tmp_path)
    assert "no such folder" in message(common.list_images, tmp_path / "none")
    assert "looked for face/val, val, face/test;" in message(common.load_faces, tmp_path, "val")


def test_hidden_files_are_no_faces(tmp_path):
    write_images(tmp_path / "face" / "train", 3, size=(64, 64))
    for name in (".DS_Store", "._00000.png"):
        (tmp_path / "face" / "train" / name).write_bytes(b"x")
    assert common.load_faces(tmp_path, "train").shape == (3, 3, 64, 64)


def test_several_damaged_images_in_one_message(tmp_path):
    names, _ = write_images(tmp_path / "face" / "train", 9)
    for name in names[2:7]:
        (tmp_path / "face" / "train" / name).write_bytes(b"damaged")
    text = message(common.load_faces, tmp_path, "train")
    assert "5 of 9 images" in text and all(name in text for name in names[2:5]) and names[6] not in text


def test_images_of_several_sizes(tmp_path):
    write_images(tmp_path, 1, size=(5, 6))
    Image.new("RGB", (7, 6)).save(tmp_path / "other.png")
    assert "other.png" in message(common.read_images, common.list_images(tmp_path))
    assert common.read_images(common.list_images(tmp_path), (4, 3)).shape == (2, 3, 3, 4)


@pytest.mark.parametrize("text", ["3", " 3 ", "03", "3.0"])
def test_numbers_that_are_digits_are_digits(course, text):
    write_csv(course[0] / "digits" / "mnistm" / "train.csv", [("00000.png", text)])
    assert common.load_digits(course[0], "mnistm", "train")[1].tolist() == [3]


@pytest.mark.parametrize("text", ["", "x", "12", "-1", "3.5", "nan", "tensor(3)"])
def test_what_is_no_digit(course, text):
    write_csv(course[0] / "digits" / "mnistm" / "train.csv", [("00000.png", 1), ("00001.png", text)])
    found = message(common.load_digits, course[0], "mnistm", "train")
    assert "train.csv, line 3: found" in found and "expected" in found and "label 0-9" in found


# ---------------- the user's machine ----------------


def test_no_home_folder(course, monkeypatch, tmp_path):
    """Then expanduser returns ~ as it is: no folder of that name is made."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", str)
    monkeypatch.chdir(tmp_path)
    assert len(common.load_digits(course[0], "mnistm", "train")[0]) == 6
    assert not (tmp_path / "~").exists()


def test_names_that_are_not_utf_8(tmp_path, classifier, capfd):
    folder = tmp_path / os.fsdecode(b"in\xff") / "digits" / "mnistm"
    names, pixels = write_images(folder / "data", 4)
    odd = os.fsdecode(b"\xfe.png")
    os.rename(folder / "data" / names[0], folder / "data" / odd)
    (folder / "train.csv").write_bytes(b"image_name,label\n\xfe.png,7\n00001.png,1\n")
    before = cache_files()
    for _ in range(2):
        images, labels = common.load_digits(folder.parent.parent, "mnistm", "train")
        assert (images.permute(0, 2, 3, 1).numpy() == pixels[:2]).all() and labels.tolist() == [7, 1]
    assert len(cache_files() - before) == 1
    paths = common.list_images(folder / "data")
    assert common.read_images(paths).shape == (4, 3, 28, 28)
    shutil.copytree(folder / "data", tmp_path / "scored")
    os.rename(tmp_path / "scored" / odd, tmp_path / "scored" / f"0{odd}")
    assert common.score_digits(tmp_path / "scored", folder.parent.parent, classifier, tmp_path, CPU)["n"] == 4


def test_messages_in_any_encoding(tmp_path, monkeypatch):
    """A terminal that knows ASCII only, folders whose names are not ASCII or not UTF-8."""
    for name in (b"\xff", "\u00fcber".encode()):
        err = io.BytesIO()
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, "ascii", write_through=True))
        with pytest.raises(SystemExit) as stop:
            common.main(["report", str(tmp_path / os.fsdecode(name))])
        assert stop.value.code == 2 and err.getvalue().startswith(b"error: ")
        assert err.getvalue().count(b"\n") == 1 and b"no such folder" in err.getvalue()


@pytest.mark.slow
def test_figures_under_a_notebooks_backend(tmp_path):
    """Jupyter, Colab and Kaggle export a backend that a fresh virtual environment lacks."""
    code = """
import sys
import numpy as np, torch
import common
out = sys.argv[1]
common.save_grid(out + "/grid.png", torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), ["a"], ["x", "y"], "t")
with open(out + "/log.csv", "w") as file:
    file.write("step,loss\\n1,2\\n")
common.save_curves(out + "/curves.png", out + "/log.csv", ["loss"], "t")
common.save_scatter(out + "/scatter.png", np.zeros((3, 2)), np.array([0, 1, 0]), ["a", "b"], "t")
print(len(common.load_digits(None, "svhn", "val")[0]))
"""
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error", "-c", code, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1800\n" and len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.slow
def test_figures_leave_the_callers_backend(tmp_path):
    """A notebook that imports common.py and then pyplot still shows its own figures."""
    code = """
import os
import common
with common.new_figure("figure.png", 1, 1):
    pass
import matplotlib
print(matplotlib.rcParams["backend"], os.environ["MPLBACKEND"])
"""
    environment = os.environ | {"MPLBACKEND": "svg", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.stdout == "svg svg\n", result.stderr


def test_labels_of_any_file_name(tmp_path):
    """No formula between two dollar signs, no error for names that are not UTF-8."""
    images = torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = ["$x^$.pt", "\udcff.pt"]
        common.save_grid(tmp_path / "grid.png", images, ["\u4e2d"], names, "from $\\frac$ to \udcff")
    assert (tmp_path / "grid.png").is_file()


def test_command_line(tmp_path, capsys):
    calls = ([], ["fid"], ["fid", "a", "b", "--inc", "x"], ["data", "x", "--from", str(tmp_path / "none")])
    for arguments in (*calls, ["report", str(tmp_path / "none")], ["fid", str(tmp_path), str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            common.main(arguments)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, arguments
    with pytest.raises(ValueError):
        common.parse_args(["fid"])


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "new" / "file"
    common.write_whole(path, lambda file: file.write(b"one"))

    def torn(file):
        file.write(b"tw")
        raise OSError(28, "No space left on device")

    text = message(common.write_whole, path, torn)
    assert text == f"{path}: cannot be written (No space left on device)"
    assert path.read_bytes() == b"one" and os.listdir(tmp_path / "new") == ["file"]
    for other in (tmp_path, "/dev/null"):
        assert f"{other}: is a folder or a device" in message(common.write_whole, other, torn)


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """Each fills its own temporary file: what stands there is whole at any time, and is the last one's."""
    path = tmp_path / "file"

    def slow(file):
        file.write(b"fir")
        with monkeypatch.context() as other_process:
            other_process.setattr(os, "getpid", lambda: 1)
            common.write_whole(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b"st")

    common.write_whole(path, slow)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_ctrl_c_leaves_no_temporary_file(tmp_path):
    def stopped(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write_whole(tmp_path / "file", stopped)
    assert os.listdir(tmp_path) == []


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    common.write_whole(tmp_path / "link", lambda file: file.write(b"x"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"x"


class Log:
    """What host programs put in the place of standard error."""

    def write(self, text):
        pass


@pytest.mark.parametrize("stderr", [None, Log()])
def test_no_standard_error(stderr, tmp_path, monkeypatch):
    """A closed descriptor, pythonw, a host program's logger: no bar, but the work."""
    monkeypatch.setattr(sys, "stderr", stderr)
    spec = importlib.util.spec_from_file_location("fresh", common.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert list(fresh.progress(range(3), "text")) == [0, 1, 2]
    with pytest.raises(SystemExit) as stop:
        fresh.main(["report", str(tmp_path)])
    assert stop.value.code == 0 and (tmp_path / "report.html").is_file()


def test_the_cache_keeps_what_was_read_last(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(common, "CACHE", 25_000, raising=False)

    def read(kind, second):
        """An array of 8 kB that is made or read in this second."""
        before = set(tmp_path.rglob("*.npz"))
        assert (common.cached(kind, [], lambda: np.full(1000, kind)) == kind).all()
        if kind not in files:
            (files[kind],) = set(tmp_path.rglob("*.npz")) - before
        os.utime(files[kind], (second, second))

    files = {}
    for second, kind in enumerate((1, 2, 3, 1)):
        read(kind, second)
    common.cached(4, [], lambda: np.full(1000, 4))
    assert {kind for kind, path in files.items() if path.is_file()} == {1, 3}
    assert len(list(tmp_path.rglob("*.npz"))) == 3


def test_the_classifier_belongs_to_the_digits_and_not_to_their_place(course, tmp_path, monkeypatch):
    """Other digits in the same folder get a classifier of their own; a moved folder keeps its one."""
    root, pixels = course
    trained = []

    def train(data, path, device):
        trained.append(path)
        torch.save({"state_dict": common.Classifier().state_dict()}, path)

    monkeypatch.setattr(common, "train_classifier", train)

    def classifier(data):
        common.digit_classifier(data, None, tmp_path, CPU)
        return len(set(trained)), len(trained)

    assert classifier(root) == (1, 1) == classifier(root)
    shutil.copytree(root / "digits", tmp_path / "moved" / "digits")
    assert classifier(tmp_path / "moved") == (1, 1)
    Image.fromarray(255 - pixels[0]).save(root / "digits" / "mnistm" / "data" / "00000.png")
    assert classifier(root) == (2, 2)
    table = root / "digits" / "mnistm" / "train.csv"
    table.write_text(table.read_text().replace("00001.png,1", "00001.png,2"))
    assert classifier(root) == (3, 3)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nat"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    ],
)
def test_memory_that_runs_out_is_one_line(error, monkeypatch, capsys):
    def allocate(*_):
        raise error

    monkeypatch.setattr(common, "score_images", allocate)
    with pytest.raises(SystemExit) as stop:
        common.main(["fid", "a", "b"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "memory" in line and line.endswith("give fewer images; " + USES_CPU)


def test_other_errors_are_not_called_memory(monkeypatch):
    def fail(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(common, "score_images", fail)
    with pytest.raises(RuntimeError, match="shape"):
        common.main(["fid", "a", "b"])
