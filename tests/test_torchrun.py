"""p1 to p3 under torchrun with two processes on the CPU (gloo)."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

pytestmark = pytest.mark.slow  # each starts three or more processes

SCRIPTS = {
    "p1_gan": ["--method", "wgangp", "--n-critic", "1"],
    "p2_diffusion": ["--channels", "32", "32"],
    "p3_ddim": ["--size", "16", "--channels", "32", "64"],
}
SAMPLING = {
    "p1_gan": ["--num", "6"],
    "p2_diffusion": ["--num", "1", "--sample-steps", "2", "--precision", "float32"],
    "p3_ddim": ["--num", "6", "--sample-steps", "2", "--eta", "0.5", "--precision", "float32"],
}
TINY = ["--batch-size", "4", "--device", "cpu", "--ckpt", "model.pt"]


def command(processes, *program):
    """The command line of a Python program in so many processes."""
    if processes == 1:
        return [sys.executable, *map(str, program)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    return [sys.executable, *launcher, *map(str, program)]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(processes, folder, program, *arguments, **more):
    """(exit code, stdout, stderr); it hangs no longer than five minutes."""
    options = dict(cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=300)
    result = subprocess.run(command(processes, program, *arguments), **options)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes(script, tmp_path):
    """They train one network and write one checkpoint, which goes on in one process.

    Two processes sample the same files as one, and draw one bar.
    """
    program = ROOT / f"{script}.py"
    train = ["--mode", "train", *SCRIPTS[script], *TINY]
    code, out, err = run(2, tmp_path, program, *train, "--steps", "3")
    assert code == 0, err
    assert len(re.findall(r"step 3, \d+ s of training", out)) == 1
    assert "%|" not in err  # TQDM_DISABLE
    before = torch.load(tmp_path / "model.pt", weights_only=True)
    assert before["step"] == 3 and all(v.isfinite().all() for v in before["model"].values())
    code, out, err = run(1, tmp_path, program, *train, "--steps", "4", "--resume")
    assert code == 0, err
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 4

    sampling = ["--mode", "sample", *SAMPLING[script], *TINY]
    code, out, err = run(1, tmp_path, program, *sampling, "--out", "one")
    assert code == 0 and "%|" not in err, err
    code, out, err = run(2, tmp_path, program, *sampling, "--out", "two", TQDM_DISABLE="")
    assert code == 0, err
    assert out.count("weights: model.pt") == 1 and bars(err) == 1
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two")) and len(names) >= 6
    for name in names:
        one = np.array(Image.open(tmp_path / "one" / name)).astype(int)
        two = np.array(Image.open(tmp_path / "two" / name)).astype(int)
        assert np.abs(one - two).max() <= 1


def bars(err):
    """How many tqdm bars standard error shows: each starts at 0 of all after 0 seconds."""
    return len(re.findall(r"(?:train|sample|network): .* 0/\d+ \[00:00<", err))


# Trains on random images; says in pid.RANK when the third step is done.
WORKER = """
import os, sys
from pathlib import Path
import torch
import {script} as script

def record(run, *, record=script.Run.record, **values):
    record(run, **values)
    if run.step == 3:
        Path(f"started.{{run.args.rank}}").write_text(str(os.getpid()))
        os.rename(f"started.{{run.args.rank}}", f"pid.{{run.args.rank}}")

script.Run.record = record
size = {size}
images = torch.randint(256, (8, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
script.MODES["train"] = lambda args: script.train(args, images, torch.arange(8))
script.main(sys.argv[1:])
"""
IMAGES = {"p1_gan": 64, "p2_diffusion": 28, "p3_ddim": 16}
SMALL = {
    "p1_gan": ["--method", "dcgan"],
    "p2_diffusion": ["--channels", "32"],
    "p3_ddim": ["--channels", "32", "--attention"],
}


def write_worker(script, folder):
    path = folder / "worker.py"
    path.write_text(WORKER.format(script=script, size=IMAGES[script]))
    return path


def started(folder, rank, process):
    """The process id of a worker that is training."""
    path = folder / f"pid.{rank}"
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.05)
    return int(path.read_text())


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "script, signal_number, to",
    [
        ("p1_gan", signal.SIGTERM, 1),
        ("p2_diffusion", signal.SIGTERM, 1),
        ("p2_diffusion", signal.SIGINT, 0),
        ("p3_ddim", signal.SIGINT, 1),
        ("p2_diffusion", signal.SIGTERM, "launcher"),
        ("p2_diffusion", signal.SIGINT, "terminal"),
    ],
)
def test_a_signal_stops_both_and_saves(script, signal_number, to, tmp_path):
    """A signal to one process, to torchrun alone, or Ctrl-C in its terminal, which all of them get."""
    worker = write_worker(script, tmp_path)
    arguments = [*SMALL[script], *TINY, "--steps", "1000000"]
    options = dict(cwd=tmp_path, env=environment(TQDM_DISABLE=""), text=True, start_new_session=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command(2, worker, *arguments), **options, **pipes)
    try:
        pids = [started(tmp_path, rank, process) for rank in (0, 1)]
        if to == "terminal":
            os.killpg(process.pid, signal_number)
        elif to == "launcher":
            os.kill(process.pid, signal_number)
        else:
            os.kill(pids[to], signal_number)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and not any(map(is_running, pids))
    assert bars(err) == 1, err
    ckpt = torch.load(tmp_path / "model.pt", weights_only=True)
    assert ckpt["step"] >= 3 and not list(tmp_path.glob(".model.pt.*"))
    assert not (tmp_path / "model.pt.lock").exists()
    more = ["--resume", "--steps", str(ckpt["step"] + 1)]
    code, _, err = run(1, tmp_path, worker, *SMALL[script], *TINY, *more)
    assert code == 0, err


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_existing_checkpoint_is_kept(script, tmp_path):
    """Rank 0 refuses it; the other process does not wait for ever."""
    (tmp_path / "model.pt").write_text("precious")
    worker = write_worker(script, tmp_path)
    code, _, err = run(2, tmp_path, worker, *SMALL[script], *TINY, "--steps", "1")
    assert code != 0 and err.count("error: --ckpt model.pt: exists; go on with --resume") == 1
    assert (tmp_path / "model.pt").read_text() == "precious"


def test_batch_size_is_shared(tmp_path):
    train = ["--mode", "train", "--size", "16", "--batch-size", "9", "--steps", "1", "--device", "cpu"]
    code, _, err = run(2, tmp_path, ROOT / "p3_ddim.py", *train)
    assert code != 0 and "error: --batch-size 9: expected a multiple of 2 processes" in err


# Each process has half of the batch; the mean of their gradients is that of the whole batch.
GRADIENTS = """
import types
import torch
import torch.distributed as dist
import p1_gan

dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
x = torch.randn(8, 5)
net(x).mean().backward()
whole = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
half = net(x[dist.get_rank() :: 2]).mean()
p1_gan.update(types.SimpleNamespace(world=2), net, torch.optim.SGD(net.parameters(), 0.0), half)
for p, gradient in zip(net.parameters(), whole):
    assert torch.allclose(p.grad, gradient, atol=1e-6)
dist.destroy_process_group()
"""


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    (tmp_path / "check.py").write_text(GRADIENTS)
    code, _, err = run(2, tmp_path, "check.py")
    assert code == 0, err
