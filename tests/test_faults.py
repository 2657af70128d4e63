"""Faults that the scripts must survive, beside those in the other files:

full disk, NaN, Ctrl-C: test_p2 (and p1, p3, p4 for NaN and Ctrl-C); truncated checkpoints: every test_p*;
damaged, hostile and unwritable cache, names such as ../x.png in CSVs, PNG bombs, archives whose paths
leave the folder: test_common; damaged weights: test_metrics; several processes: test_torchrun.
"""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Hostile

import common
import p1_gan as p1
import p2_diffusion as p2
import p3_ddim as p3
import p4_dann as p4

TRAIN = {
    p1: ["--method", "dcgan", "--batch-size", "2"],
    p2: ["--channels", "32", "--T", "20", "--batch-size", "2"],
    p3: ["--channels", "32", "--attention", "--batch-size", "2"],
    p4: ["--method", "source-aug", "--target", "usps", "--batch-size", "8"],
}
SIZES = {p1: 64, p2: 28, p3: 16, p4: 28}


def data(script):
    """Random images and labels that the script's `train` takes."""
    size = SIZES[script]
    images = torch.randint(256, (8, 3, size, size), generator=torch.Generator().manual_seed(0))
    return images.byte(), torch.arange(8)


def options(script, ckpt):
    return ["--device", "cpu", "--ckpt", str(ckpt), "--steps", "3", *TRAIN[script]]


def each(*slow):
    """Parametrizes a test with the four scripts; `slow`: those in which it takes long."""
    values = []
    for script in TRAIN:
        marks = [pytest.mark.slow] if script in slow else []
        values.append(pytest.param(script, id=script.__name__, marks=marks))
    return pytest.mark.parametrize("script", values)


# The process dies when half of a checkpoint is written.
KILLED = """
import os, signal, sys
import torch
import {name} as script

def torn(state, file, save=torch.save):
    save(state, file)
    file.flush()
    os.ftruncate(file.fileno(), file.tell() // 2)
    os.kill(os.getpid(), signal.SIGKILL)

images, labels = torch.load("data.pt")
torch.save = torn
script.train(script.parse_args(sys.argv[1:]), images, labels)
"""


@each(p1)
def test_kill_9_in_the_middle_of_a_checkpoint(script, tmp_path, monkeypatch):
    """The old checkpoint is unchanged, and training goes on from it."""
    ckpt = tmp_path / "model.pt"
    arguments = options(script, ckpt)

    def stopped_early(state, file, save=torch.save):
        save({**state, "step": 1}, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stopped_early)
        script.train(script.parse_args(arguments), *data(script))
    before = ckpt.read_bytes()

    torch.save(data(script), tmp_path / "data.pt")
    command = [sys.executable, "-c", KILLED.format(name=script.__name__), *arguments, "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    torn = tmp_path / "model.pt.tmp"
    assert ckpt.read_bytes() == before and torn.stat().st_size > 0

    script.train(script.parse_args([*arguments, "--resume"]), *data(script))
    assert torch.load(ckpt, weights_only=True)["step"] == 3 and not torn.exists()


@each()
def test_a_second_training_does_not_touch_the_checkpoint_of_the_first(script, tmp_path):
    """Also while the first one runs: after its first save the second one is refused at its start."""
    ckpt = tmp_path / "model.pt"
    script.train(script.parse_args(options(script, ckpt)), *data(script))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (tmp_path / "model.pt.tmp").write_text("being written by the first")
    with pytest.raises(ValueError, match="exists; go on with --resume, or give another --ckpt"):
        script.train(script.parse_args(options(script, ckpt)), *data(script))
    assert (tmp_path / "model.pt.tmp").read_text() == "being written by the first"
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


@each()
def test_no_bar_with_tqdm_disable(script, tmp_path, capfd):
    """conftest.py sets it; test_torchrun.py sees the bars that are drawn without it."""
    assert os.environ["TQDM_DISABLE"] == "1"
    script.train(script.parse_args(options(script, tmp_path / "model.pt")), *data(script))
    assert capfd.readouterr().err == ""


def test_hostile_files_are_not_executed(tmp_path):
    """A pickle that runs code, offered as weights of all kinds, as noise and as reference statistics."""
    marker = tmp_path / "executed"
    hostile = tmp_path / "hostile.pt"
    torch.save(Hostile(marker), hostile)
    for script in TRAIN:
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            script.load_model(hostile)
    with pytest.raises(ValueError, match="not a readable tensor"):
        p3.read_noise(hostile, p3.parse_args([]))
    with pytest.raises(ValueError, match="not a state dict"):
        common.load_inception(hostile, "cpu")
    with pytest.raises(ValueError, match="not a state dict of the course's format"):
        common.load_classifier(hostile, "cpu")
    mu = np.array([Hostile(marker)], dtype=object)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=np.zeros(1))
    with pytest.raises(ValueError, match="not a readable .npz"):
        common.reference_statistics(tmp_path / "reference.npz", None, "")
    assert not marker.exists()
    torch.load(hostile, weights_only=False)  # the file does what it says
    assert marker.exists()


@pytest.mark.parametrize("script", TRAIN, ids=lambda script: script.__name__)
def test_too_little_memory_of_a_gpu_is_one_line(script, monkeypatch, capsys):
    def allocate(args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setitem(script.MODES, "train", allocate)
    with pytest.raises(SystemExit) as stop:
        script.main(["--mode", "train", "--device", "cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: CUDA out of memory") and "--batch-size" in line


def test_too_little_memory_for_fid_is_one_line(monkeypatch, capsys):
    def allocate(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(common, "score_images", allocate)
    with pytest.raises(SystemExit) as stop:
        common.main(["fid", "a", "b"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: CUDA out of memory") and "uses the CPU" in line


@each()
def test_damaged_checkpoints_are_named(script, tmp_path):
    """Whatever stands in the place of the settings and the weights."""
    ckpt = tmp_path / "model.pt"
    script.train(script.parse_args(options(script, ckpt)), *data(script))
    whole = torch.load(ckpt, weights_only=True)
    name, value = next((name, value) for name, value in whole["ema"].items() if value.ndim == 4)
    damages = [{"args": 5}, {"args": {}}, {"ema": [1]}, {"script": [1]}]
    for change in ({name: 3}, {7: value}, {name: value.to_sparse()}, {name: value * math.nan}):
        damages.append({"ema": {**whole["ema"], **change}})
    for damage in damages:
        torch.save({**whole, **damage}, tmp_path / "damaged.pt")
        with pytest.raises(ValueError, match="damaged.pt: "):
            script.load_model(tmp_path / "damaged.pt")
    script.load_model(ckpt)


@each()
def test_export_does_not_replace_what_it_reads(script, tmp_path, error):
    """Neither the state of training nor, in a fresh clone, weights whose note would be lost."""
    ckpt = tmp_path / "model.pt"
    script.train(script.parse_args(options(script, ckpt)), *data(script))
    before = ckpt.read_bytes()
    export = ["--mode", "export", "--ckpt", str(ckpt), "--out"]
    assert "give another folder" in error(script.main, [*export, str(tmp_path)])
    assert ckpt.read_bytes() == before
    script.main([*export, str(tmp_path / "weights")])
    assert (tmp_path / "weights" / "model.pt").is_file()


@pytest.mark.parametrize("script", [*TRAIN, common], ids=lambda script: script.__name__)
def test_what_cannot_be_written_is_named(script, tmp_path):
    """And not the temporary file beside it."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"model\.pt: cannot be written") as e:
        script.write_whole(tmp_path / "file" / "model.pt", lambda file: file.write(b"x"))
    assert ".tmp" not in str(e.value)


def test_a_classifier_of_nan_is_refused(tmp_path):
    """It would call every digit 0."""
    state = {name: value * math.nan for name, value in common.Classifier().state_dict().items()}
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: holds weights that are not finite"):
        common.load_classifier(tmp_path / "nan.pth", "cpu")
