"""The weights that come with the project, and `benchmark.py export`, which makes them."""

# SPDX-License-Identifier: MIT
import os
import shutil
import subprocess
import sys

import benchmark
import pytest
import torch
from conftest import ROOT

import p2_diffusion as p2

WEIGHTS = sorted((ROOT / ".weights").glob("p*.pt"))
SAMPLE = {
    "p1_gan": ["--num", "2"],
    "p2_diffusion": ["--num", "1", "--sample-steps", "2"],
    "p3_ddim": ["--num", "2", "--sample-steps", "2"],
}


def export(ckpt, out, note=""):
    arguments = ["export", "--ckpt", str(ckpt), "--out", str(out), "--note", note]
    benchmark.export(benchmark.parse_args(arguments))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights_of_the_project(path):
    """Each file is float16, says how it was made, and loads in its script."""
    state = torch.load(path, weights_only=True)
    model, settings = benchmark.SCRIPTS[state["script"]].load_model(path)
    assert state["note"] and state["command"].startswith(f"python {state['script']}.py --mode train")
    assert not model.training and settings.seed == state["args"]["seed"]
    parameters = {name for name, _ in model.named_parameters()}
    assert all(state["ema"][name].dtype == torch.float16 for name in parameters)


@pytest.mark.parametrize("name", ["p2_diffusion", "p3_ddim"])
def test_the_default_network_trains_on_from_the_weights(name):
    """`--mode train --resume --ckpt FILE` needs no other option for the network."""
    script = benchmark.SCRIPTS[name]
    args = vars(script.parse_args(["--mode", "train"]))
    network = {key: args[key] for key in script.NETWORK if key in args}  # the rest is of the images
    assert network and network.items() <= torch.load(ROOT / ".weights" / f"{name}.pt")["args"].items()


def test_weights_are_small():
    """The course takes repositories of at most 100 MB; 60 leave room."""
    assert WEIGHTS and sum(path.stat().st_size for path in WEIGHTS) < 60e6


@pytest.mark.parametrize("script", ["p1_gan", "p2_diffusion", "p3_ddim", "p4_dann"])
def test_exported_weights_are_exported_unchanged(script, tmp_path):
    (path, *_) = (path for path in WEIGHTS if path.stem.startswith(script[:2]))
    export(path, tmp_path, "another note")
    before, after = (torch.load(file, weights_only=True) for file in (path, tmp_path / path.name))
    assert after["note"] == "another note"
    for key in ("script", "args", "step", "seconds", "command"):
        assert before[key] == after[key]
    assert before["ema"].keys() == after["ema"].keys()
    for name, value in before["ema"].items():
        assert value.dtype == after["ema"][name].dtype and torch.equal(value, after["ema"][name])


def test_export_of_a_checkpoint(tmp_path):
    """Averaged weights alone, as float16; the file of the training is left as it is."""
    whole = tmp_path / "model.pt"
    options = ["--steps", "2", "--channels", "32", "32", "--batch-size", "4", "--device", "cpu"]
    args = p2.parse_args(["--mode", "train", *options, "--ckpt", str(whole)])
    ema = p2.train(args, torch.zeros(8, 3, 28, 28, dtype=torch.uint8), torch.arange(8))
    with pytest.raises(SystemExit, match="exists; give another folder"):
        export(whole, tmp_path)
    export(whole, tmp_path / "weights", "two steps")
    state = torch.load(tmp_path / "weights" / "model.pt", weights_only=True)
    assert "optim" not in state and "model" not in state and state["step"] == 2 == state["steps"]
    model, _ = p2.load_model(tmp_path / "weights" / "model.pt")
    for exact, value in zip(ema.parameters(), model.parameters()):
        assert torch.equal(value, exact.half().float())


@pytest.mark.slow
@pytest.mark.parametrize("script", SAMPLE)
def test_a_fresh_clone_samples(script, tmp_path):
    """Without --ckpt and from another folder the script takes the weights beside it, and says so."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(ROOT / ".weights", tmp_path / ".weights")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    options = ["--mode", "sample", "--out", "out", *SAMPLE[script]]
    if script == "p3_ddim":
        options += ["--sampler", "dpm++"]
    command = [sys.executable, str(tmp_path / f"{script}.py"), *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / ".weights") in result.stdout
    assert len(os.listdir(folder / "out")) >= 2
