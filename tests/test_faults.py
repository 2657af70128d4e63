"""Faults that the scripts must survive, beside those in the other files:

full disk, NaN, Ctrl-C: test_p2 (and p1, p3, p4 for NaN and Ctrl-C); truncated and hostile checkpoints: every test_p*; damaged, hostile and unwritable cache,
names such as ../x.png in CSVs, PNG bombs, archives whose paths leave the folder: test_common; damaged weights: test_metrics.
"""
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
import p1_gan as p1
import p2_diffusion as p2
import p3_ddim as p3
import p4_dann as p4
from conftest import ROOT, Hostile

TRAIN = {
    p1: ["--method", "dcgan", "--batch-size", "4"],
    p2: ["--channels", "32", "32", "--batch-size", "4", "--T", "20"],
    p3: ["--size", "16", "--channel", "32", "--multipliers", "1", "2", "--batch-size", "4"],
    p4: ["--target", "usps", "--batch-size", "8"],
}


@pytest.mark.parametrize("script", TRAIN, ids=lambda script: script.__name__)
def test_kill_9_in_the_middle_of_a_checkpoint(script, tmp_path):
    """The process dies when half of the new checkpoint is written: the old one is unchanged, and training goes on from it."""
    ckpt = tmp_path / "model.pt"
    options = ["--mode", "train", "--device", "cpu", "--ckpt", str(ckpt), *TRAIN[script], "--steps", "3"]
    code = f"""
import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, {script.__name__} as script
whole = torch.save
def torn(state, path):
    whole(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
if os.path.exists({str(ckpt)!r}): torch.save = torn
else: torch.save = lambda state, path: whole({{**state, "step": 1}}, path)  # as if training had stopped there
script.main({options!r} + sys.argv[1:])
"""
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True).returncode == 0
    before = ckpt.read_bytes()
    assert subprocess.run([*run, "--resume"], capture_output=True).returncode == -signal.SIGKILL
    assert ckpt.read_bytes() == before and (tmp_path / "model.pt.tmp").exists()
    script.main([*options, "--resume"])
    assert torch.load(ckpt, weights_only=True)["step"] == 3 and not (tmp_path / "model.pt.tmp").exists()


def test_two_processes_do_not_train_into_one_checkpoint(tmp_path, error):
    ckpt = tmp_path / "model.pt"
    other = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; common.claim_checkpoint({str(ckpt)!r}, False); print('claimed', flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "claimed\n"
    (tmp_path / "model.pt.tmp").write_text("being written")
    assert "another process is training into it" in error(common.claim_checkpoint, ckpt, False)
    assert (tmp_path / "model.pt.tmp").read_text() == "being written"
    common.claim_checkpoint(tmp_path / "another.pt", False)
    other.communicate("\n")
    common.claim_checkpoint(ckpt, False)
    common.claim_checkpoint(ckpt, False)  # the same process again: --resume after a first training


def test_hostile_files_are_not_executed(tmp_path, error):
    """A pickle that runs code, offered as noise, as course weights and as reference statistics."""
    marker = tmp_path / "executed"
    (tmp_path / "noise").mkdir()
    torch.save(Hostile(marker), tmp_path / "noise" / "00.pt")
    torch.save(p3.UNet(32, (1,), 1, ()).state_dict(), tmp_path / "UNet.pt")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(p3, "UNet", lambda *_, original=p3.UNet, **__: original(32, (1,), 1, ()))
        assert "not a readable tensor" in error(p3.main, ["--mode", "sample", "--noise", str(tmp_path / "noise"), "--ckpt", str(tmp_path / "UNet.pt"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    torch.save(Hostile(marker), tmp_path / "weights.pth")
    assert "not a state dict" in error(common.load_inception, tmp_path / "weights.pth", "cpu")
    np.savez(tmp_path / "reference.npz", mu=np.array([Hostile(marker)], dtype=object), sigma=np.zeros(1))
    assert "not a readable .npz" in error(common.reference_statistics, str(tmp_path / "reference.npz"), None, "")
    assert not marker.exists()
