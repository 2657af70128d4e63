"""The weights that come with the project, and --mode export, which makes them."""

# SPDX-License-Identifier: MIT
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import p1_gan as p1
import p2_diffusion as p2
import p3_ddim as p3
import p4_dann as p4

SCRIPTS = {"p1_gan": p1, "p2_diffusion": p2, "p3_ddim": p3, "p4_dann": p4}
WEIGHTS = sorted((ROOT / ".weights").glob("p*.pt"))
TRAIN = {
    p1: ["--method", "sngan", "--batch-size", "4"],
    p2: ["--channels", "32", "32", "--batch-size", "4"],
    p3: ["--size", "16", "--channels", "32", "64", "--attention", "2", "--batch-size", "4"],
    p4: ["--target", "usps", "--batch-size", "8"],
}
SAMPLE = {
    p1: ["--num", "2"],
    p2: ["--num", "1", "--sample-steps", "2"],
    p3: ["--num", "2", "--sample-steps", "2"],
}


def run(script, *options):
    script.main([*map(str, options), "--device", "cpu"])


@pytest.mark.parametrize("script", TRAIN, ids=lambda script: script.__name__)
def test_export(script, tmp_path, error, capsys):
    """Half of the bytes and none of the optimiser. p2 and p3 train on from it, the others cannot."""
    whole = tmp_path / "model.pt"
    run(script, "--mode", "train", "--steps", 2, "--ckpt", whole, *TRAIN[script])
    run(script, "--mode", "export", "--ckpt", whole, "--out", tmp_path / "w", "--note", "two steps")
    small = tmp_path / "w" / "model.pt"
    state = torch.load(small, weights_only=True)
    assert (state["note"], state["step"]) == ("two steps", 2)
    assert state["command"].startswith(f"python {script.__name__}.py --mode train --steps 2")
    before, _ = script.load_model(whole)
    after, _ = script.load_model(small)
    parameters = dict(before.named_parameters())
    for name, value in after.state_dict().items():
        exact = before.state_dict()[name]
        assert value.dtype == exact.dtype
        if name in parameters:
            exact = exact.half().float()
        assert torch.equal(value, exact)
    go_on = ["--mode", "train", "--steps", "3", "--resume", "--ckpt", str(small), "--device", "cpu"]
    if script in SAMPLE:
        run(script, "--mode", "sample", "--ckpt", small, "--out", tmp_path / "out", *SAMPLE[script])
        assert len(os.listdir(tmp_path / "out")) >= 2
    if script in (p1, p4):  # no D, no teacher: a half of the state would be another method
        assert str(small) in error(script.main, [*go_on, *TRAIN[script]])
        return
    finished = error(script.main, [*go_on, *TRAIN[script], "--steps", "2"])
    assert "--steps 2: expected more than the 2" in finished
    script.main([*go_on, *TRAIN[script], "--lr", "5e-4"])  # the settings of training may differ
    assert "averaged weights of step 2, a fresh optimiser" in capsys.readouterr().out
    state = torch.load(small, weights_only=True)
    assert state["step"] == 3 and state["optim"]["state"][0]["step"] == 1
    moved = [(state["model"][name].float() - value).abs().max() for name, value in after.state_dict().items()]
    assert 0 < max(moved) < 0.01  # one step of Adam away from the file's weights


def test_export_refuses_the_network_of_the_course(tmp_path, error, monkeypatch):
    small = {**p3.COURSE, "channels": [32, 32]}
    monkeypatch.setattr(p3, "COURSE", small)
    network = p3.UNet([32, 32], small["blocks"], small["attention"], small["dropout"])
    torch.save(network.state_dict(), tmp_path / "UNet.pt")
    command = (run, p3, "--mode", "export", "--ckpt", tmp_path / "UNet.pt", "--out", tmp_path)
    assert "the course's network" in error(*command)


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights_of_the_project(path):
    """Each file is float16, says how it was made, and loads in its script."""
    state = torch.load(path, weights_only=True)
    script = SCRIPTS[state["script"]]
    model, settings = script.load_model(path)
    assert state["note"] and state["command"].startswith(f"python {state['script']}.py --mode train")
    assert not model.training and settings.seed == state["args"]["seed"]
    if path.stem in ("p2_diffusion", "p3_ddim"):  # --resume trains on from them without further options
        args = script.parse_args(["--mode", "train"])
        assert {key: getattr(args, key) for key in script.NETWORK}.items() <= state["args"].items()
    parameters = {name for name, _ in model.named_parameters()}
    assert all(state["ema"][name].dtype == torch.float16 for name in parameters)


def test_weights_are_small():
    """The course takes repositories of at most 100 MB; 60 leave room."""
    assert WEIGHTS and sum(path.stat().st_size for path in WEIGHTS) < 60e6


@pytest.mark.slow
@pytest.mark.parametrize("script", ["p1_gan", "p2_diffusion", "p3_ddim"])
def test_a_fresh_clone_samples(script, tmp_path):
    """Without --ckpt and from another folder the script takes the weights beside it, and says so."""
    if not any(path.stem.startswith(script[:2]) for path in WEIGHTS):
        pytest.skip(f"no weights of {script} yet")
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(ROOT / ".weights", tmp_path / ".weights")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    options = ["--mode", "sample", "--out", "out", *SAMPLE[SCRIPTS[script]]]
    if script == "p3_ddim":
        options += ["--sampler", "dpm++"]
    command = [sys.executable, str(tmp_path / f"{script}.py"), *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / ".weights") in result.stdout
    assert len(os.listdir(folder / "out")) >= 2
