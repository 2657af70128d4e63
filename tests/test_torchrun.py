"""p1 to p3 under torchrun with two processes on the CPU (gloo)."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT

SCRIPTS = {
    "p1_gan.py": ["--method", "wgangp", "--n-critic", "1"],
    "p2_diffusion.py": ["--channels", "32", "32"],
    "p3_ddim.py": ["--size", "16", "--channel", "32", "--multipliers", "1", "2"],
}
SAMPLING = {"p1_gan.py": ["--num", "6"], "p2_diffusion.py": ["--num", "1", "--sample-steps", "2"], "p3_ddim.py": ["--num", "6", "--sample-steps", "2", "--eta", "0.5"]}


def run(processes, script, folder, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"] if processes > 1 else []
    result = subprocess.run([sys.executable, *launcher, str(ROOT / script), *arguments, "--device", "cpu", "--ckpt", "model.pt"], cwd=folder,
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes(script, tmp_path):
    """They train one network and write one checkpoint, which goes on in one process; two sample the same files as one."""
    train = ["--mode", "train", "--batch-size", "8", *SCRIPTS[script]]
    code, out, err = run(2, script, tmp_path, *train, "--steps", "3")
    assert code == 0, err
    assert len(re.findall(r"step 3, \d+ s of training", out)) == 1
    before = torch.load(tmp_path / "model.pt", weights_only=True)
    assert before["step"] == 3 and all(v.isfinite().all() for v in before["model"].values())
    code, out, err = run(1, script, tmp_path, *train, "--steps", "3" if script == "p1_gan.py" else "4", "--resume")  # p1 decays its learning rate over --steps
    assert code == 0, err
    for processes, out in ((1, "one"), (2, "two")):
        code, _, err = run(processes, script, tmp_path, "--mode", "sample", "--out", out, "--precision", "float32", *SAMPLING[script])
        assert code == 0, err
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two")) and len(names) >= 6
    for name in names:
        one, two = (np.array(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1


def test_batch_size_is_shared(tmp_path):
    code, _, err = run(2, "p3_ddim.py", tmp_path, "--mode", "train", "--batch-size", "9", "--steps", "1")
    assert code != 0 and "expected a multiple of the 2 processes" in err


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """p1's average: each process has half of the batch, the mean of their gradients is that of the whole."""
    (tmp_path / "check.py").write_text(f"""
import os, sys, types; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist, p1_gan
dist.init_process_group("gloo")
torch.manual_seed(0)
net, x = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)), torch.randn(8, 5)
net(x).mean().backward()
whole = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
net(x[dist.get_rank()::2]).mean().backward()
p1_gan.average_gradients(net, types.SimpleNamespace(world=2))
assert all(torch.allclose(p.grad, w, atol=1e-6) for p, w in zip(net.parameters(), whole))
dist.destroy_process_group()
""")
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "check.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
