"""p3_ddim.py: the given network and the graded sampler against the course's golden values."""
import functools
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import p3_ddim as p3
from conftest import ROOT

DATA = ROOT.parent / "shared" / "data"


def filler(j, shape):
    """r = 2 frac(sin(12.9898 i + 78.233 j) 43758.5453) - 1, float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    v = torch.sin(12.9898 * i + 78.233 * j) * 43758.5453
    return (2 * (v - v.floor()) - 1).view(shape)


def fill(model):
    """The closed-form weights of unet2023_golden.json."""
    state = model.state_dict()
    for j, name in enumerate(n for n in state if n != "time.0.inv_freq"):
        shape = state[name].shape
        r = filler(j, shape)
        if len(shape) >= 2:
            r = r * math.sqrt(3 / (math.prod(shape) / shape[0]))
        else:
            r = 0.1 * r + (("norm" in name or name == "out.0.weight") and name.endswith("weight"))
        state[name].copy_(r.float())
    return model.eval()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared")
def test_golden():
    golden = json.loads((DATA / "unet2023_golden.json").read_text())
    model = p3.UNet()
    wanted = [line.split("\t") for line in (DATA / "unet2023_state_dict.txt").read_text().splitlines()]
    assert [(n, str(tuple(v.shape))) for n, v in model.state_dict().items()] == [(n, s) for n, s, _ in wanted]
    assert sum(p.numel() for p in model.parameters()) == 113_673_219 and len(wanted) == 427
    fill(model)
    x, t = (filler(1000, (2, 3, 64, 64)) * math.sqrt(3)).float(), torch.tensor([1, 981])
    with torch.inference_mode():
        time = model.time(t)
        y = model(x, t)
        swapped = model(x, t.flip(0))
    near = dict(abs=1e-4)
    assert time[0, :8].tolist() == pytest.approx(golden["time_embed_first8"]["t=1"], **near)
    assert time[1, :8].tolist() == pytest.approx(golden["time_embed_first8"]["t=981"], **near)
    assert y.mean().item() == pytest.approx(golden["y_mean"], **near) and y.std().item() == pytest.approx(golden["y_std"], **near)
    assert y[0, :, 0, 0:4].flatten().tolist() == pytest.approx(sum(golden["y[0,:, 0,0:4]"], []), **near)
    assert y[1, :, 31, 30:34].flatten().tolist() == pytest.approx(sum(golden["y[1,:,31,30:34]"], []), **near)
    assert swapped[0, 0, 0, 0:4].tolist() == pytest.approx(golden["y swapped t [0,0,0,0:4]"], **near)
    assert (y[0] - swapped[0]).abs().max().item() == pytest.approx(golden["diff between the two time steps (max abs, sample 0)"], **near)

    rms, seen = {}, {}
    for name, module in model.named_children():  # each module's output at the last of the 50 steps
        module.register_forward_hook(lambda module, inputs, output, name=name: rms.__setitem__(name, output.square().mean().sqrt().item()))
    noise = (filler(2000, (1, 3, 32, 32)) * math.sqrt(3)).float()

    def eps_model(x, t):
        seen[t] = x
        return model(x, torch.tensor([t]))

    with torch.inference_mode():
        result = p3.ddim(eps_model, noise, p3.make_alpha_bar())
    assert list(seen) == list(range(981, 0, -20))
    # a network with random weights multiplies rounding errors from step to step: the convolution backend alone moves the end by 1e-3
    states = golden["ddim 32x32, eta 0, noise r with j=2000 times sqrt(3), shape (1,3,32,32)"]
    for key, x, tolerance in (("after t=981", seen[961], 1e-5), ("after t=501", seen[481], 5e-4), ("after t=1", result, 5e-3)):
        assert x.mean().item() == pytest.approx(states[key]["mean"], abs=tolerance)
        assert x.std().item() == pytest.approx(states[key]["std"], abs=tolerance)
        assert x.flatten()[:4].tolist() == pytest.approx(states[key]["first4"], abs=tolerance)
    assert rms.keys() == golden["rms_per_module"].keys()
    for name, value in golden["rms_per_module"].items():
        assert rms[name] == pytest.approx(value, rel=1e-2), name
    image = p3.to_uint8(result)[0]
    assert image.int().sum().item() == pytest.approx(states["uint8 sum"], rel=2e-3)
    assert (image.flatten()[:8].int() - torch.tensor(states["uint8 first8"])).abs().max() <= 1


# ------------------------------------------------------------------ the recipe, on a tiny network

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """p3.UNet replaced by a network of two levels; returns (a model with random weights, the path of its state dict)."""
    monkeypatch.setattr(p3, "UNet", functools.partial(p3.UNet, channel=32, multipliers=(1, 2), blocks=1, attention=(2,)))
    torch.manual_seed(0)
    model = p3.UNet().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(model.state_dict(), tmp_path / "UNet.pt")
    p3.main(["--mode", "noise", "--size", "32", "--out", str(tmp_path / "noise")])
    return model, tmp_path


def call(folder, *arguments):
    p3.main(["--noise", str(folder / "noise"), "--ckpt", str(folder / "UNet.pt"), "--device", "cpu", *arguments])


def test_schedule():
    alpha_bar = p3.make_alpha_bar()
    for t, value in ((0, 0.9999), (1, 0.9997800921), (20, 0.9937354286), (21, 0.9932203573), (961, 0.0000857310), (980, 0.0000590375), (981, 0.0000578779), (999, 0.0000403583)):
        assert abs(alpha_bar[t].item() - value) < 5e-11


def test_sample_is_the_recipe(tiny):
    """An independent writing of protocols.md's five points, from the noise file to the bytes of the PNG."""
    model, folder = tiny
    call(folder, "--mode", "sample", "--out", str(folder / "out"), "--batch-size", "3")
    assert sorted(os.listdir(folder / "out")) == [f"{i:02d}.png" for i in range(10)]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for i in (0, 7):
        x = torch.load(folder / "noise" / f"{i:02d}.pt", weights_only=True)
        for k in range(49, -1, -1):
            t, s = 1 + 20 * k, max(1 + 20 * (k - 1), 0)
            with torch.no_grad():
                eps = model(x, torch.tensor([t]))
            x0 = torch.clamp((x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), -1, 1)
            x = np.sqrt(abar[s]) * x0 + np.sqrt(1 - abar[s]) * eps
        x = (x - x.min()) / (x.max() - x.min())
        expected = (x[0] * 255 + 0.5).floor().permute(1, 2, 0).numpy()
        image = np.array(Image.open(folder / "out" / f"{i:02d}.png"), dtype=float)
        assert image.min() == 0 and image.max() == 255
        assert np.abs(image - expected).max() <= 1 and (image != expected).mean() < 0.01


def test_eta(tiny):
    model, folder = tiny
    noises, args = torch.randn(3, 3, 32, 32), p3.parse_args(["--device", "cpu", "--steps", "5"])
    zero = p3.generate(model, noises, args)
    assert torch.equal(zero, p3.generate(model, noises, args))
    half = p3.generate(model, noises, args, 0.5)
    assert not torch.equal(half, zero)
    args.batch_size = 1
    assert (p3.generate(model, noises, args, 0.5).int() - half.int()).abs().max() <= 1
    args.seed = 1
    assert (p3.generate(model, noises, args, 0.5).int() - half.int()).abs().max() > 1


def test_slerp_and_lerp():
    a, b = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    b = b * a.norm() / b.norm()
    assert torch.allclose(p3.slerp(a, b, 0.0), a) and torch.allclose(p3.slerp(a, b, 1.0), b)
    for w in (0.1, 0.5, 0.9):
        assert p3.slerp(a, b, w).norm().item() == pytest.approx(a.norm().item(), rel=1e-9)
    assert p3.lerp(a, b, 0.5).norm() < 0.75 * a.norm()


def test_min_max_and_rounding():
    x = torch.tensor([-2.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2).clone()
    x[0, 2] = 0  # another channel: the range is that of the whole image
    assert p3.to_uint8(x)[0, 0].flatten().tolist() == [0, 128, 191, 255] and p3.to_uint8(x)[0, 2].unique().tolist() == [128]


def test_figures_and_mse(tiny, capsys, error):
    _, folder = tiny
    call(folder, "--mode", "eta-grid", "--out", str(folder / "figures"), "--steps", "2")
    call(folder, "--mode", "interpolate", "--out", str(folder / "figures"), "--steps", "2")
    assert sorted(os.listdir(folder / "figures")) == ["eta_grid.png", "interpolation.png"]
    norms = {m[0]: [float(v) for v in m[1].split()] for m in re.findall(r"norm, (\w+): (.*)", capsys.readouterr().out)}
    assert min(norms["slerp"]) > 0.95 * norms["slerp"][0] and norms["lerp"][5] < 0.8 * norms["lerp"][0]
    for name, value in (("a", 10), ("b", 13)):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8), (value, 250, value)).save(folder / name / "00.png")
    p3.main(["--mode", "mse", "--input", str(folder / "a"), "--gt", str(folder / "b")])
    assert "00.png  6.0000" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(folder / "b" / "01.png")
    assert "01.png" in error(p3.main, ["--mode", "mse", "--input", str(folder / "a"), "--gt", str(folder / "b")])


def test_bad_input(tiny, error):
    model, folder = tiny
    state = model.state_dict()

    def message(*arguments):
        return error(call, folder, "--mode", "sample", "--out", str(folder / "out"), *arguments)

    assert "no such file" in message("--ckpt", str(folder / "none.pt"))
    torch.save({k: v for k, v in state.items() if not k.startswith("mid1")}, folder / "missing.pt")
    assert "missing, for instance mid1." in message("--ckpt", str(folder / "missing.pt"))
    torch.save({**state, "extra": torch.zeros(1)}, folder / "extra.pt")
    assert "unknown, for instance extra" in message("--ckpt", str(folder / "extra.pt"))
    torch.save({**state, "out.2.bias": torch.zeros(5)}, folder / "shape.pt")
    assert "another shape, for instance out.2.bias" in message("--ckpt", str(folder / "shape.pt"))
    (folder / "UNet.txt").write_text("x")
    assert "not a readable state dict" in message("--ckpt", str(folder / "UNet.txt"))
    assert "found 0 files" in message("--noise", str(folder / "nothing"))
    for bad, found in ((torch.zeros(1, 3, 33, 32), "(1, 3, 33, 32)"), (torch.zeros(3, 32, 32), "(3, 32, 32)"), (torch.zeros(1, 3, 32, 32).double(), "float64"), ([1], "list")):
        torch.save(bad, folder / "noise" / "00.pt")
        assert found in message()
    assert not (folder / "out").exists()
