"""p3_ddim.py: the given network and the graded sampler against the course's golden values."""
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
import p3_ddim as p3
from conftest import ROOT, Hostile

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
    noises, args = torch.randn(3, 3, 32, 32), p3.parse_args(["--mode", "sample", "--device", "cpu", "--sample-steps", "5"])
    args.own = False

    def generate(eta):
        return torch.cat([*p3.generate(model, noises, args, eta)]).int()

    zero, half = generate(0.0), generate(0.5)
    assert torch.equal(zero, generate(0.0)) and not torch.equal(half, zero)
    args.batch_size = 1
    assert (generate(0.5) - half).abs().max() <= 1
    args.seed = 1
    assert (generate(0.5) - half).abs().max() > 1


def test_slerp_and_lerp():
    a, b = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    b = b * a.norm() / b.norm()
    assert torch.allclose(p3.slerp(a, b, 0.0), a) and torch.allclose(p3.slerp(a, b, 1.0), b)
    for w in (0.1, 0.5, 0.9):
        assert p3.slerp(a, b, w).norm().item() == pytest.approx(a.norm().item(), rel=1e-9)
    assert torch.lerp(a, b, 0.5).norm() < 0.75 * a.norm()
    assert torch.allclose(p3.slerp(a, a, 0.5), a) and p3.slerp(a.float(), 1.000001 * a.float(), 0.5).isfinite().all()


def test_min_max_and_rounding():
    x = torch.tensor([-2.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2).clone()
    x[0, 2] = 0  # another channel: the range is that of the whole image
    assert p3.to_uint8(x)[0, 0].flatten().tolist() == [0, 128, 191, 255] and p3.to_uint8(x)[0, 2].unique().tolist() == [128]


def test_figures_and_mse(tiny, capsys, error):
    _, folder = tiny
    call(folder, "--mode", "eta-grid", "--out", str(folder / "figures"), "--sample-steps", "2")
    call(folder, "--mode", "interpolate", "--out", str(folder / "figures"), "--sample-steps", "2")
    assert sorted(os.listdir(folder / "figures")) == ["eta_grid.png", "interpolation.png"]
    norms = {m[0]: [float(v) for v in m[1].split()] for m in re.findall(r"norm, (\w+): (.*)", capsys.readouterr().out)}
    assert min(norms["slerp"]) > 0.95 * norms["slerp"][0] and norms["lerp"][5] < 0.8 * norms["lerp"][0]
    for name, value in (("a", 10), ("b", 13)):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8), (value, 250, value)).save(folder / name / "00.png")
    p3.main(["--mode", "mse", "--input", str(folder / "a"), "--gt", str(folder / "b")])
    assert "00.png  6.0000" in capsys.readouterr().out
    p3.main(["--mode", "mse", "--input", str(folder / "a"), "--gt", str(folder / "b"), "--out", str(folder / "mse.json")])
    assert json.loads((folder / "mse.json").read_text()) == {"n": 1, "mse": 6.0, "largest": 6.0}
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
    assert "not a readable checkpoint or state dict" in message("--ckpt", str(folder / "UNet.txt"))
    assert "found 0 files" in message("--noise", str(folder / "nothing"))
    assert "holds noises already" in error(p3.main, ["--mode", "noise", "--size", "32", "--out", str(folder / "noise")])
    for bad, found in ((torch.zeros(1, 3, 33, 32), "(1, 3, 33, 32)"), (torch.zeros(3, 32, 32), "(3, 32, 32)"), (torch.zeros(1, 3, 32, 32).double(), "float64"), ([1], "list")):
        torch.save(bad, folder / "noise" / "00.pt")
        assert found in message()
    assert not (folder / "out").exists()


# ------------------------------------------------------------------ samplers

def gaussian(alpha_bar, m=0.3, c=0.2):
    """The exact eps of data N(m, c^2), a linear score, and the map of its flow from t to s."""
    def moments(t):
        a = alpha_bar[t]
        return a.sqrt() * m, (a * c**2 + 1 - a).sqrt()

    def eps_model(x, t):
        mean, sd = moments(t)
        return (1 - alpha_bar[t]).sqrt() * (x - mean) / sd**2

    def flow(x, t, s):
        (mean, sd), (mean_s, sd_s) = moments(t), moments(s)
        return mean_s + sd_s * (x - mean) / sd

    return eps_model, flow


@pytest.mark.parametrize("sampler, order, last, fewest", [(p3.ddim, 1, None, 25), (p3.dpm_solver, 2, 0, 25), (p3.dpm_solver, 2, 40, 50)])
def test_order_of_convergence_on_a_gaussian(sampler, order, last, fewest):
    """Against the exact flow: DDIM's error falls as 1 / steps, that of DPM-Solver++(2M) as 1 / steps^2."""
    alpha_bar, x = p3.make_alpha_bar(), torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)
    eps_model, flow = gaussian(alpha_bar, c=0.5)
    errors = []
    for steps in (fewest, 2 * fewest, 4 * fewest):
        if last is None:
            exact, options = flow(x, p3.ddim_times(steps)[-1], 0), ()
        else:
            at_last, options = flow(x, 999, last), (last,)
            exact = p3.predict_x0(at_last, eps_model(at_last, last), alpha_bar[last].item())
        errors.append((sampler(eps_model, x, alpha_bar, steps, *options) - exact).abs().max().item())
    assert errors[0] < 0.1 and all(math.log2(a / b) > order - 0.4 for a, b in zip(errors, errors[1:])), errors


def test_ddpm_draws_from_the_gaussian():
    alpha_bar, g = p3.make_alpha_bar(), torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g)
    result = p3.ddpm(gaussian(alpha_bar)[0], x, alpha_bar, lambda: torch.randn(20_000, generator=g))
    assert result.mean().item() == pytest.approx(0.3, abs=0.01) and result.std().item() == pytest.approx(0.2, rel=0.05)


def test_inversion_undoes_sampling_on_a_linear_score():
    """Solved to the end each step is undone; one iteration leaves the error of the usual inversion."""
    alpha_bar = p3.make_alpha_bar()
    eps_model, _ = gaussian(alpha_bar)
    x = torch.linspace(-0.4, 0.9, 14, dtype=torch.float64)
    errors = [(p3.ddim(eps_model, p3.ddim_inverse(eps_model, x, alpha_bar, 50, n), alpha_bar, 50, clamp=False) - x).abs().max().item() for n in (1, 3, 60)]
    assert errors[2] < 1e-6 and errors[2] < 0.1 * errors[1] < 0.01 * errors[0], errors


# ------------------------------------------------------------------ training

TINY = ["--size", "16", "--channel", "32", "--multipliers", "1", "2", "--attention", "2", "--batch-size", "4", "--device", "cpu"]


def train(path, steps, *more):
    p3.main(["--mode", "train", "--steps", str(steps), "--ckpt", str(path), *TINY, *more])
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint of three training steps on the built-in faces at 16x16."""
    path = tmp_path_factory.mktemp("own") / "own.pt"
    train(path, 3)
    return path


def test_loss_is_zero_for_the_exact_v_and_weighted_by_min_snr():
    alpha_bar, x0 = p3.make_alpha_bar(), torch.rand(64, 3, 4, 4) * 2 - 1

    def model(x, t):  # knows x0
        a = alpha_bar[t].float().view(-1, 1, 1, 1)
        return a.sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt() - (1 - a).sqrt() * x0

    assert p3.diffusion_loss(model, x0, alpha_bar, 5.0).item() < 1e-6
    snr = alpha_bar / (1 - alpha_bar)
    weight = (snr.clamp(max=5) / (snr + 1)).mean().item()
    torch.manual_seed(0)
    one_off = p3.diffusion_loss(lambda x, t: model(x, t) + 1, x0.repeat(16, 1, 1, 1)[:64], alpha_bar, 5.0).item()
    assert one_off == pytest.approx(weight, rel=0.05)


def test_resume_is_bit_equal(tmp_path, monkeypatch):
    """Six steps at once, and Ctrl-C after three with --resume: every tensor and the random state agree."""
    whole, original, count = train(tmp_path / "whole.pt", 6, "--dropout", "0.2"), p3.diffusion_loss, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(p3, "diffusion_loss", interrupted)
        train(tmp_path / "parts.pt", 6, "--dropout", "0.2")
    assert stop.value.code == 130 and torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 3
    parts = train(tmp_path / "parts.pt", 6, "--dropout", "0.2", "--resume")
    assert parts["step"] == 6
    for key in ("model", "ema"):
        assert all(torch.equal(v, parts[key][k]) for k, v in whole[key].items())
    for i, state in whole["optim"]["state"].items():
        assert all(torch.equal(v, parts["optim"]["state"][i][k]) for k, v in state.items())
    assert torch.equal(whole["rng"]["cpu"], parts["rng"]["cpu"])
    assert re.match(r"step,loss,images_per_s,seconds\n3,.*\n6,", (tmp_path / "parts.log.csv").read_text())


def test_training_learns(tmp_path):
    log = train(tmp_path / "a.pt", 300, "--batch-size", "8")["log"]
    loss = [row[1] for row in log]  # means of 15 steps
    assert sum(loss[-7:]) < 0.7 * sum(loss[:7])


def test_existing_checkpoint_is_not_overwritten(own, error):
    before = own.read_bytes()
    assert "--resume" in error(train, own, 6)
    assert "lr 0.5 (checkpoint: 0.001)" in error(train, own, 9, "--resume", "--lr", "0.5")
    assert own.read_bytes() == before


def test_nan_stops_the_run_and_keeps_the_checkpoint(own, tmp_path, capsys):
    state = torch.load(own, weights_only=True)
    state["model"]["down1.weight"][0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    before = (tmp_path / "nan.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "nan.pt", 8, "--resume")
    assert stop.value.code == 1 and "loss is nan" in capsys.readouterr().err and (tmp_path / "nan.pt").read_bytes() == before


# ------------------------------------------------------------------ sampling and inversion with one's own network

@pytest.mark.parametrize("sampler", [["--sampler", "dpm++", "--sample-steps", "4"], ["--sampler", "ddim", "--sample-steps", "4", "--eta", "0.5"]])
def test_images_do_not_depend_on_batch_size_or_number(own, tmp_path, sampler):
    def sample(out, *options):
        p3.main(["--mode", "sample", "--ckpt", str(own), "--out", str(tmp_path / out), "--device", "cpu", "--precision", "float32", *sampler, *options])
        return {name: np.array(Image.open(tmp_path / out / name)).astype(int) for name in sorted(os.listdir(tmp_path / out))}

    ten = sample("ten", "--num", "10")
    assert list(ten) == [f"{i:04d}.png" for i in range(10)] and ten["0000.png"].shape == (16, 16, 3)
    for other in (sample("batches", "--num", "10", "--batch-size", "3"), sample("few", "--num", "4")):
        assert all(np.abs(image - ten[name]).max() <= 1 for name, image in other.items())
    assert np.abs(sample("seed", "--num", "1", "--seed", "1")["0000.png"] - ten["0000.png"]).max() > 1


def test_inversion_returns_the_image_and_its_noise_interpolates(tmp_path, capsys, error):
    """With a network of 100 steps: more iterations reconstruct better, and the noises' interpolation starts and ends at the images."""
    own = tmp_path / "own.pt"
    train(own, 100)
    (tmp_path / "photos").mkdir()
    images = {}
    for name, i in (("a", 0), ("b", 1)):
        images[name] = common.load_faces(None, "val", 16)[i].permute(1, 2, 0).numpy().astype(int)
        Image.fromarray(images[name].astype(np.uint8)).save(tmp_path / "photos" / f"{name}.png")

    def invert(*options):
        p3.main(["--mode", "invert", "--ckpt", str(own), "--input", str(tmp_path / "photos"), "--out", str(tmp_path / "inverted"), "--device", "cpu", "--precision", "float32", *options])
        return float(re.search(r"PSNR of the reconstruction ([\d.]+)", capsys.readouterr().out)[1])

    usual, solved = invert("--iterations", "1"), invert("--iterations", "5")
    assert solved > usual + 3 and solved > 45, (usual, solved)
    assert sorted(os.listdir(tmp_path / "inverted")) == ["a.png", "a.pt", "b.png", "b.pt"]
    assert os.path.getsize(tmp_path / "inverted" / "a.pt") < 10_000  # one noise, not the batch's
    for name, image in images.items():
        assert np.abs(np.array(Image.open(tmp_path / "inverted" / f"{name}.png")).astype(int) - image).max() <= 2
    assert "another folder" in error(p3.main, ["--mode", "invert", "--ckpt", str(own), "--input", str(tmp_path / "photos"), "--out", str(tmp_path / "photos")])
    p3.main(["--mode", "interpolate", "--ckpt", str(own), "--noise", str(tmp_path / "inverted"), "--out", str(tmp_path / "figures"), "--sample-steps", "4", "--device", "cpu"])
    p3.main(["--mode", "grid", "--ckpt", str(own), "--out", str(tmp_path / "figures"), "--sampler", "dpm++", "--sample-steps", "2", "--device", "cpu"])
    assert sorted(os.listdir(tmp_path / "figures")) == ["first.png", "interpolation.png", "network.txt", "training.png"]


def test_the_file_copied_alone_samples(own, tmp_path):
    shutil.copy(ROOT / "p3_ddim.py", tmp_path)
    shutil.copy(own, tmp_path / "model.pt")
    code = "import sys; sys.modules['tqdm'] = sys.modules['matplotlib'] = sys.modules['sklearn'] = sys.modules['scipy'] = None; import p3_ddim; p3_ddim.main()"
    result = subprocess.run([sys.executable, "-c", code, "--mode", "sample", "--ckpt", "model.pt", "--out", "faces", "--num", "3", "--sample-steps", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(os.listdir(tmp_path / "faces")) == 3


# ------------------------------------------------------------------ command line

def test_readme():
    commands = re.findall(r"^python p3_ddim.py (--mode .*?)(?:  +#.*)?$", (ROOT / "README.md").read_text(), re.M)
    for command in commands:
        p3.parse_args(command.split())
    assert len(commands) >= 3


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        p3.main(["-h"])
    out = capsys.readouterr().out
    options = re.findall(r"^  (--[\w-]+)", out, re.M)
    assert stop.value.code == 0 and "2010.02502" in out and len(options) >= 28 and out.count("(default:") >= len(options) - 2


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--lr", "-1"], ["--mode", "fly"], ["--size", "36"], ["--mode", "noise", "--size", "100"], ["--channel", "33"], ["--patch", "3"],
                                       ["--mode", "sample", "--eta", "0", "1"], ["--eta", "2"], ["--sample-steps", "501"], ["--sample-steps", "30"], ["--mode", "invert", "--sampler", "dpm++"], ["--device", "tpu"],
                                       ["--mode", "interpolate", "--eta", "0.5"]])
def test_wrong_options(arguments, error):
    error(p3.main, arguments)


def test_bad_checkpoints(own, tmp_path, error):
    def message(path, *more):
        return error(p3.main, ["--mode", "sample", "--ckpt", str(path), "--out", str(tmp_path / "out"), "--device", "cpu", *more])

    (tmp_path / "short.pt").write_bytes(own.read_bytes()[:-1000])
    assert "not a readable" in message(tmp_path / "short.pt")
    torch.save({"script": "p1_gan", "args": {}}, tmp_path / "p1.pt")
    assert "found p1_gan" in message(tmp_path / "p1.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "427 entries missing" in message(tmp_path / "tensor.pt") and "without the state of training" in error(train, tmp_path / "tensor.pt", 9, "--resume")
    torch.save(Hostile(tmp_path / "executed"), tmp_path / "hostile.pt")
    assert "not a readable" in message(tmp_path / "hostile.pt") and not (tmp_path / "executed").exists()
    torch.save(torch.load(own, weights_only=True)["ema"], tmp_path / "state.pt")
    assert "without the state of training" in error(train, tmp_path / "state.pt", 9, "--resume")
    torch.save({"optim": {}}, tmp_path / "optim.pt")
    assert "without the state of training" in error(train, tmp_path / "optim.pt", 9, "--resume")
    (tmp_path / "noise").mkdir()
    torch.save(torch.zeros(1, 3, 18, 16), tmp_path / "noise" / "00.pt")
    assert "found (1, 3, 18, 16) torch.float32" in message(own, "--noise", str(tmp_path / "noise"))
    assert "looked for" in error(train, tmp_path / "new.pt", 2, "--data", str(tmp_path))
    assert not (tmp_path / "out").exists()
