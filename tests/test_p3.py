"""p3_ddim.py: the given network and the graded sampler against the course's golden values."""

import copy
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
from conftest import ROOT, Hostile, write_as_a_gpu
from PIL import Image

import common
import p3_ddim as p3

DATA = ROOT / "tests"


def call(*arguments):
    p3.main([str(argument) for argument in arguments])


def images(folder):
    """name -> integer array (H, W, 3) of all entries."""
    return {name: np.array(Image.open(folder / name)).astype(int) for name in sorted(os.listdir(folder))}


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
            scale = ("norm" in name or name == "out.0.weight") and name.endswith("weight")
            r = 0.1 * r + scale
        state[name].copy_(r.float())
    return model.eval()


@pytest.fixture(scope="module")
def golden():
    """(the values of the course's original network, ours with the same weights)."""
    with torch.device("meta"):  # its initial weights are replaced
        model = p3.UNet().to_empty(device="cpu")
    model.time[0].inv_freq.copy_(p3.TimeEmbedding(128).inv_freq)
    return json.loads((DATA / "unet2023_golden.json").read_text()), fill(model)


def test_golden_network(golden):
    golden, model = golden
    lines = (DATA / "unet2023_state_dict.txt").read_text().splitlines()
    wanted = [line.split("\t")[:2] for line in lines]
    assert [[name, str(tuple(v.shape))] for name, v in model.state_dict().items()] == wanted
    assert sum(p.numel() for p in model.parameters()) == 113_673_219 and len(wanted) == 427
    x = (filler(1000, (2, 3, 64, 64)) * math.sqrt(3)).float()
    t = torch.tensor([1, 981])
    with torch.inference_mode():
        time = model.time(t)
        y = model(x, t)
        swapped = model(x, t.flip(0))
    embedded = golden["time_embed_first8"]
    change = golden["diff between the two time steps (max abs, sample 0)"]
    for found, expected in (
        (time[0, :8], embedded["t=1"]),
        (time[1, :8], embedded["t=981"]),
        (y.mean(), golden["y_mean"]),
        (y.std(), golden["y_std"]),
        (y[0, :, 0, 0:4].flatten(), sum(golden["y[0,:, 0,0:4]"], [])),
        (y[1, :, 31, 30:34].flatten(), sum(golden["y[1,:,31,30:34]"], [])),
        (swapped[0, 0, 0, 0:4], golden["y swapped t [0,0,0,0:4]"]),
        ((y[0] - swapped[0]).abs().max(), change),
    ):
        assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_golden_sampler(golden):
    golden, model = golden
    rms = {}
    seen = {}

    def hook(name):  # keeps each module's output at the last of the 50 steps
        def keep(module, inputs, output):
            rms[name] = output.square().mean().sqrt().item()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_children()]
    noise = (filler(2000, (1, 3, 32, 32)) * math.sqrt(3)).float()
    alpha_bar = p3.make_alpha_bar()
    predict = p3.predictor(model, alpha_bar, "eps")

    def watched(x, t):
        seen[t] = x
        return predict(x, t)

    with torch.inference_mode():
        end = alpha_bar[0].item()
        result = p3.ddim(watched, noise, alpha_bar, p3.ddim_times(50), end=end)
    for handle in handles:
        handle.remove()
    assert list(seen) == list(range(981, 0, -20))
    # a network with random weights multiplies rounding errors from step to step: the convolution
    # backend alone moves the end by 1e-3
    states = golden["ddim 32x32, eta 0, noise r with j=2000 times sqrt(3), shape (1,3,32,32)"]
    for key, x, tolerance in (
        ("after t=981", seen[961], 1e-5),
        ("after t=501", seen[481], 5e-4),
        ("after t=1", result, 5e-3),
    ):
        assert x.mean().item() == pytest.approx(states[key]["mean"], abs=tolerance)
        assert x.std().item() == pytest.approx(states[key]["std"], abs=tolerance)
        assert x.flatten()[:4].tolist() == pytest.approx(states[key]["first4"], abs=tolerance)
    assert rms.keys() == golden["rms_per_module"].keys()
    for name, value in golden["rms_per_module"].items():
        assert rms[name] == pytest.approx(value, rel=1e-2), name
    image = p3.min_max_uint8(result)[0]
    assert image.int().sum().item() == pytest.approx(states["uint8 sum"], rel=2e-3)
    assert (image.flatten()[:8].int() - torch.tensor(states["uint8 first8"])).abs().max() <= 1


def test_copies_of_the_network_are_independent():
    model = p3.UNet((32, 64), 1, (2,))
    torch.nn.init.normal_(model.out[2].weight)
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    other = copy.deepcopy(model)
    assert torch.equal(other(x, t), model(x, t))
    with torch.no_grad():
        other.down1.weight.zero_()
        other.up1.resblocks.conv1.weight.normal_()
    assert not torch.equal(other(x, t), model(x, t))
    assert model.double()(x.double(), t).dtype == torch.float64


# ------------------------------------------------------------------ the recipe, on a tiny network


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The course's network with two levels: (a model with random weights, a folder with it and noises)."""
    small = {"channels": [32, 64], "blocks": 1, "attention": [2]}
    monkeypatch.setattr(p3, "COURSE", {**p3.COURSE, **small})
    torch.manual_seed(0)
    model = p3.UNet(**small).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(model.state_dict(), tmp_path / "UNet.pt")
    call("--mode", "noise", "--size", 32, "--out", tmp_path / "noise")
    return model, tmp_path


def given(folder, mode, *arguments):
    options = ["--noise", folder / "noise", "--ckpt", folder / "UNet.pt", "--device", "cpu"]
    call("--mode", mode, *options, *arguments)


VALUES = {0: 0.9999, 1: 0.9997800921, 20: 0.9937354286, 21: 0.9932203573}
VALUES |= {961: 0.0000857310, 980: 0.0000590375, 981: 0.0000578779, 999: 0.0000403583}


def test_schedule():
    alpha_bar = p3.make_alpha_bar()
    for t, value in VALUES.items():
        assert abs(alpha_bar[t].item() - value) < 5e-11
    assert p3.ddim_times(50) == list(range(981, 0, -20))


def test_sample_is_the_recipe(tiny):
    """An independent writing of protocols.md's five points, from the noise file to the bytes of the PNG."""
    model, folder = tiny
    for i in (1, 2, 3, 4, 5, 6, 9):
        os.remove(folder / "noise" / f"{i:02d}.pt")
    given(folder, "sample", "--out", folder / "out", "--batch-size", 2)
    written = images(folder / "out")
    assert list(written) == ["00.png", "07.png", "08.png"]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for i in (0, 7):
        x = torch.load(folder / "noise" / f"{i:02d}.pt", weights_only=True)
        for k in range(49, -1, -1):
            t = 1 + 20 * k
            s = max(1 + 20 * (k - 1), 0)
            with torch.no_grad():
                eps = model(x, torch.tensor([t]))
            x0 = torch.clamp((x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), -1, 1)
            x = np.sqrt(abar[s]) * x0 + np.sqrt(1 - abar[s]) * eps
        x = (x - x.min()) / (x.max() - x.min())
        expected = (x[0] * 255 + 0.5).floor().permute(1, 2, 0).numpy()
        image = written[f"{i:02d}.png"]
        assert image.min() == 0 and image.max() == 255
        assert np.abs(image - expected).max() <= 1 and (image != expected).mean() < 0.01


def test_generate_from_given_noise(tiny):
    _, folder = tiny
    model, settings = p3.load_model(folder / "UNet.pt")
    assert settings.course and settings.prediction == "eps" and settings.size == 256
    noise = torch.randn(3, 3, 32, 32)

    def generate(**options):
        return p3.generate(model, settings, noise, calls=5, **options).int()

    zero = generate()
    half = generate(eta=0.5)
    assert zero.shape == (3, 3, 32, 32) and torch.equal(zero, generate()) and not torch.equal(half, zero)
    one = p3.generate(model, settings, noise[1:2], [(1, 1)], calls=5, eta=0.5).int()
    assert (one - half[1:2]).abs().max() <= 1
    assert (generate(eta=0.5, seed=1) - half).abs().max() > 1
    for bad in (
        noise[0],
        noise[:, :2],
        noise.double(),
        noise[:, :, :31],
        noise * math.inf,
        noise.to_sparse(),
    ):
        with pytest.raises(ValueError, match="noise: "):
            p3.generate(model, settings, bad)
    with pytest.raises(ValueError, match="expected one of ddim"):
        generate(sampler="dpm")


def test_dpm_solver_of_the_given_network_goes_on_to_time_0(tiny):
    _, settings = p3.load_model(tiny[1] / "UNet.pt")
    own = copy.copy(settings)
    own.course = False
    assert p3.sampling_times(settings, "dpm++", 20)[-1] == 0
    assert p3.sampling_times(own, "dpm++", 20)[-1] == p3.LAST == 20
    assert p3.sampling_times(own, "dpm++", 20)[0] == 999


def test_precision_auto_keeps_the_given_network_in_float32(tiny, monkeypatch):
    _, folder = tiny
    monkeypatch.setattr(p3, "bf16_is_fast", lambda device: True)
    for precision in ("auto", "float32", "bf16"):
        options = ["--precision", precision, "--sample-steps", 2]
        given(folder, "sample", "--out", folder / precision, *options)
    auto, float32, bf16 = (images(folder / name)["00.png"] for name in ("auto", "float32", "bf16"))
    assert (auto == float32).all() and (auto != bf16).any()


def test_slerp_and_lerp():
    a, b = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    b = b * a.norm() / b.norm()
    assert torch.allclose(p3.slerp(a, b, 0.0), a) and torch.allclose(p3.slerp(a, b, 1.0), b)
    for w in (0.1, 0.5, 0.9):
        assert p3.slerp(a, b, w).norm().item() == pytest.approx(a.norm().item(), rel=1e-9)
    assert torch.lerp(a, b, 0.5).norm() < 0.75 * a.norm()
    assert torch.allclose(p3.slerp(a, a, 0.5), a)
    assert p3.slerp(a.float(), 1.000001 * a.float(), 0.5).isfinite().all()


def test_min_max_and_rounding():
    x = torch.tensor([-2.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2).clone()
    x[0, 2] = 0  # another channel: the range is that of the whole image
    image = p3.min_max_uint8(x)[0]
    assert image[0].flatten().tolist() == [0, 128, 191, 255] and image[2].unique().tolist() == [128]
    assert p3.to_uint8(x)[0, 0].flatten().tolist() == [0, 128, 255, 255]


def test_figures(tiny, capsys):
    _, folder = tiny
    for mode in ("eta-grid", "interpolate"):
        given(folder, mode, "--out", folder / "figures", "--sample-steps", 2)
    assert sorted(os.listdir(folder / "figures")) == ["eta_grid.png", "interpolation.png"]
    norms = {}
    for name, row in re.findall(r"norm, (\w+): (.*)", capsys.readouterr().out):
        norms[name] = [float(value) for value in row.split()]
    assert min(norms["slerp"]) > 0.95 * norms["slerp"][0] and norms["lerp"][5] < 0.8 * norms["lerp"][0]


def test_repeated_eta_draws_other_noise(tiny, monkeypatch):
    _, folder = tiny
    drawn = []
    monkeypatch.setattr(common, "save_grid", lambda path, images, *_, **__: drawn.append(images))
    options = ["--sample-steps", 4, "--out", folder / "figures"]
    given(folder, "eta-grid", "--eta", 0.5, 0, 0.5, 0, *options)
    given(folder, "eta-grid", "--eta", 0.5, *options)
    rows, once = drawn[1], drawn[3]
    assert rows.shape == (4, 4, 3, 32, 32) and torch.equal(rows[0], once[0])
    assert torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("mode", ["eta-grid", "interpolate"])
def test_what_can_fail_fails_before_the_images_are_computed(tiny, mode, error, monkeypatch, capsys):
    _, folder = tiny
    (folder / "file").write_text("mine")
    arguments = [folder, mode, "--sample-steps", 2]

    def network(x, t):
        pytest.fail("the network was called")

    with monkeypatch.context() as patch:
        patch.setattr(p3.UNet, "forward", lambda self, x, t: network(x, t))
        assert "file" in error(given, *arguments, "--out", folder / "file")
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "matplotlib" in error(given, *arguments, "--out", folder / "figures")
    (folder / "figures").mkdir(exist_ok=True)
    assert os.listdir(folder / "figures") == []
    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    given(*arguments, "--out", folder / "figures")


def test_mse(tmp_path, capsys, error):
    options = ["--mode", "mse", "--input", tmp_path / "a", "--gt", tmp_path / "b"]
    for name, value in (("a", 10), ("b", 13)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (value, 250, value)).save(tmp_path / name / "00.png")
    (tmp_path / "a" / "._00.png").write_bytes(b"of macOS")
    call(*options)
    assert "00.png  6.0000" in capsys.readouterr().out
    call(*options, "--out", tmp_path / "mse.json")
    assert json.loads((tmp_path / "mse.json").read_text()) == {"n": 1, "mse": 6.0, "largest": 6.0}
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "01.bmp")
    assert "01.bmp" in error(call, *options)
    Image.new("RGB", (8, 9)).save(tmp_path / "a" / "01.bmp")
    assert "8x9 in --input, 8x8 in --gt" in error(call, *options)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module.", "_orig_mod.", "module._orig_mod."])
def test_given_weights_that_were_wrapped(tiny, wrap):
    _, folder = tiny
    state = torch.load(folder / "UNet.pt", weights_only=True)
    given(folder, "sample", "--out", folder / "plain", "--sample-steps", 2)
    if wrap.endswith("."):
        state = {f"{wrap}{name}": value for name, value in state.items()}
    else:
        state = {"epoch": 3, wrap: state}
    torch.save(state, folder / "UNet.pt")
    given(folder, "sample", "--out", folder / "wrapped", "--sample-steps", 2)
    plain, wrapped = images(folder / "plain"), images(folder / "wrapped")
    assert all((wrapped[name] == image).all() for name, image in plain.items())


def test_bad_weights(tiny, error):
    model, folder = tiny
    state = model.state_dict()

    def message(value, name="bad.pt"):
        torch.save(value, folder / name)
        return error(given, folder, "sample", "--out", folder / "out", "--ckpt", folder / name)

    assert "no such file" in error(given, folder, "sample", "--ckpt", folder / "none.pt")
    (folder / "UNet.txt").write_text("x")
    assert "not a readable" in error(given, folder, "sample", "--ckpt", folder / "UNet.txt")
    part = {name: value for name, value in state.items() if not name.startswith("mid1")}
    found = message(part)
    assert (
        f"expected the {len(state)}" in found and "mid1.attention.norm.bias is None, expected (64,)" in found
    )
    assert "extra is (1,), expected None" in message({**state, "extra": torch.zeros(1)})
    assert "out.2.bias is (5,), expected (3,)" in message({**state, "out.2.bias": torch.zeros(5)})
    assert "expected (32, 3, 3, 3)" in message({**state, "down1.weight": [1, 2]})
    sparse = {**state, "down1.weight": state["down1.weight"].to_sparse()}
    assert "sparse or not finite, for instance down1.weight" in message(sparse)
    assert "1 weights are sparse or not finite" in message(
        {**state, "out.2.bias": torch.full((3,), math.nan)}
    )
    assert "found list" in message([1, 2])
    assert not (folder / "out").exists()


@pytest.mark.parametrize("mode", ["sample", "interpolate", "eta-grid"])
def test_bad_noise(tiny, mode, error):
    _, folder = tiny
    good = torch.zeros(1, 3, 32, 32)
    nan = good.clone()
    nan[0, 0, 3, 3] = math.nan
    for bad, found in (
        (torch.zeros(1, 3, 33, 32), "found 33x32"),
        (torch.zeros(3, 32, 32), "(3, 32, 32)"),
        (torch.zeros(2, 3, 32, 32), "(2, 3, 32, 32)"),
        (good.double(), "float64"),
        (good.half(), "float16"),
        (good.long(), "int64"),
        (good.to_sparse(), "sparse"),
        (nan, "not finite"),
        (good + math.inf, "not finite"),
        ([1], "list"),
        (torch.zeros(1, 3, 64, 64), "one shape"),
    ):
        torch.save(bad, folder / "noise" / "00.pt")
        assert found in error(given, folder, mode, "--out", folder / "out")
    torch.save(Hostile(folder / "executed"), folder / "noise" / "00.pt")
    assert "not a readable tensor" in error(given, folder, mode, "--out", folder / "out")
    assert not (folder / "out").exists() and not (folder / "executed").exists()
    assert "found 0 files" in error(given, folder, mode, "--noise", folder / "nothing")
    noise = ["--mode", "noise", "--size", 32, "--out", folder / "noise"]
    assert "holds noises already" in error(call, *noise)


def test_noise_is_drawn_batch_by_batch(tiny):
    """All at once, these were 78 GB; each has the noise that --mode noise writes."""
    _, folder = tiny
    _, settings = p3.load_model(folder / "UNet.pt")
    noise = p3.StartNoise(p3.parse_args(["--mode", "sample", "--num", "100000"]), settings)
    assert len(noise.names) == 100_000 and noise.shape == (3, 256, 256)
    assert noise([99_998, 99_999]).shape == (2, 3, 256, 256)
    small = p3.StartNoise(p3.parse_args(["--mode", "sample", "--size", "32"]), settings)
    written = torch.load(folder / "noise" / "03.pt", weights_only=True)
    assert torch.equal(small([1, 3])[1:], written)


def test_noise_depends_on_seed_and_key_alone():
    one = p3.Noise([(3, 1)], (3, 8, 8), 5)
    two = p3.Noise([(0, 1), (3, 1)], (3, 8, 8), 5)
    for _ in range(2):
        first, second = one(), two()
        assert torch.equal(first[0], second[1]) and not torch.equal(second[0], second[1])
    one, other = p3.Noise([(2983,), (68855,)], (8,))()
    assert not torch.equal(one, other)  # equal when seeds were hashed to 32 bits
    big = [p3.Noise([(0,)], (2,), seed)() for seed in (1, 2**32 + 1)]
    assert not torch.equal(*big)


def test_variables_left_by_another_launcher(tiny, monkeypatch):
    _, folder = tiny
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    given(folder, "sample", "--out", folder / "out", "--sample-steps", 2)
    assert len(os.listdir(folder / "out")) == 10


# ------------------------------------------------------------------ samplers


def gaussian(alpha_bar, m=0.3, c=0.2):
    """The exact predict of data N(m, c^2), a linear score, and the map of its flow from t to s."""

    def moments(t):
        a = alpha_bar[t]
        return a.sqrt() * m, (a * c**2 + 1 - a).sqrt()

    def predict(x, t):
        mean, sd = moments(t)
        eps = (1 - alpha_bar[t]).sqrt() * (x - mean) / sd**2
        return (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt(), eps

    def flow(x, t, s):
        (mean, sd), (mean_s, sd_s) = moments(t), moments(s)
        return mean_s + sd_s * (x - mean) / sd

    return predict, flow


@pytest.mark.parametrize("last, fewest", [(None, 25), (0, 25), (20, 25)])
def test_order_of_convergence_on_a_gaussian(last, fewest):
    """Against the exact flow: DDIM's error falls as 1 / steps, DPM-Solver++(2M)'s as 1 / steps^2."""
    alpha_bar = p3.make_alpha_bar()
    x = torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)
    predict, flow = gaussian(alpha_bar, c=0.5)
    errors = []
    for calls in (fewest, 2 * fewest, 4 * fewest):
        if last is None:
            order = 1
            times = p3.ddim_times(calls)
            exact = flow(x, times[0], 0)
            result = p3.ddim(predict, x, alpha_bar, times, end=alpha_bar[0].item())
        else:
            order = 2
            exact, _ = predict(flow(x, 999, last), last)
            result = p3.dpm_solver(predict, x, alpha_bar, p3.log_snr_times(alpha_bar, calls, last))
        errors.append((result - exact).abs().max().item())
    assert errors[0] < 0.1, errors
    assert all(math.log2(a / b) > order - 0.4 for a, b in zip(errors, errors[1:])), errors


def test_ddpm_draws_from_the_gaussian():
    alpha_bar = p3.make_alpha_bar()
    g = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20_000, generator=g)

    predict, _ = gaussian(alpha_bar)
    result = p3.ddpm(predict, noise(), alpha_bar, list(range(999, -1, -1)), noise)
    assert result.mean().item() == pytest.approx(0.3, abs=0.01)
    assert result.std().item() == pytest.approx(0.2, rel=0.05)


def test_inversion_undoes_sampling_on_a_linear_score():
    """Solved to the end each step is undone; one iteration leaves the error of the usual inversion."""
    alpha_bar = p3.make_alpha_bar()
    predict, _ = gaussian(alpha_bar)
    x = torch.linspace(-0.4, 0.9, 14, dtype=torch.float64)
    times = p3.ddim_times(50)
    end = alpha_bar[0].item()
    errors = []
    for iterations in (1, 3, 60):
        noise = p3.ddim_inverse(predict, x, alpha_bar, times, iterations, end)
        errors.append((p3.ddim(predict, noise, alpha_bar, times, end=end) - x).abs().max().item())
    assert errors[2] < 1e-6 and errors[2] < 0.1 * errors[1] < 0.01 * errors[0], errors


def test_predict_clamps_x0_and_keeps_eps():
    alpha_bar = p3.make_alpha_bar()
    x = torch.randn(2, 3, 4, 4)
    out = torch.randn(2, 3, 4, 4)
    a, s = alpha_bar[981].sqrt().item(), (1 - alpha_bar[981]).sqrt().item()
    for prediction, eps in (("eps", out), ("v", a * out + s * x)):
        x0, found = p3.predictor(lambda x, t: out, alpha_bar, prediction)(x, 981)
        assert torch.allclose(found, eps) and x0.abs().max() <= 1
        x0, _ = p3.predictor(lambda x, t: out, alpha_bar, prediction, clamp=False)(x, 981)
        assert torch.allclose(a * x0 + s * eps, x, atol=1e-5)


# ------------------------------------------------------------------ training

TINY = ["--size", 16, "--channels", 32, 64, "--attention", 2, "--batch-size", 4, "--device", "cpu"]


def train(path, steps, *more):
    call("--mode", "train", "--steps", steps, "--ckpt", path, *TINY, *more)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint of three training steps on the built-in faces at 16x16."""
    path = tmp_path_factory.mktemp("own") / "own.pt"
    train(path, 3)
    return path


def test_loss_is_zero_for_the_exact_v_and_weighted_by_min_snr():
    alpha_bar = p3.make_alpha_bar()
    x0 = torch.rand(64, 3, 4, 4) * 2 - 1

    def model(x, t):  # knows x0
        a = alpha_bar[t].float().view(-1, 1, 1, 1)
        return a.sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt() - (1 - a).sqrt() * x0

    def one_off(x, t):
        return model(x, t) + 1

    assert p3.diffusion_loss(model, x0, alpha_bar, 5.0).item() < 1e-6
    snr = alpha_bar / (1 - alpha_bar)
    weight = (snr.clamp(max=5) / (snr + 1)).mean().item()
    torch.manual_seed(0)
    assert p3.diffusion_loss(one_off, x0, alpha_bar, 5.0).item() == pytest.approx(weight, rel=0.05)
    assert p3.diffusion_loss(one_off, x0, alpha_bar, 0.0).item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("how", ["ctrl-c", "prolonged"])
def test_resume_is_bit_equal(tmp_path, monkeypatch, how):
    """Six steps at once, and three (ended by Ctrl-C or --steps) with --resume: all tensors agree."""
    whole = train(tmp_path / "whole.pt", 6, "--dropout", 0.2)
    original = p3.diffusion_loss
    count = []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    if how == "prolonged":
        train(tmp_path / "parts.pt", 3, "--dropout", 0.2)
    else:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(p3, "diffusion_loss", interrupted)
            train(tmp_path / "parts.pt", 6, "--dropout", 0.2)
        assert stop.value.code == 130
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 3
    write_as_a_gpu(tmp_path / "parts.pt")
    parts = train(tmp_path / "parts.pt", 6, "--dropout", 0.2, "--resume")
    assert parts["step"] == 6
    for key in ("model", "ema"):
        assert all(torch.equal(v, parts[key][k]) for k, v in whole[key].items())
    for i, state in whole["optim"]["state"].items():
        assert all(torch.equal(v, parts["optim"]["state"][i][k]) for k, v in state.items())
    assert torch.equal(whole["rng"]["cpu"], parts["rng"]["cpu"])
    log = (tmp_path / "parts.log.csv").read_text()
    assert re.match(r"step,loss,gradient,images_per_s,seconds\n3,.*\n6,", log)


@pytest.mark.slow
def test_training_learns(tmp_path):
    log = train(tmp_path / "a.pt", 300, "--batch-size", 8)["log"]
    loss = [row["loss"] for row in log]  # means of 15 steps
    assert sum(loss[-7:]) < 0.7 * sum(loss[:7])


def test_existing_checkpoint_is_not_overwritten(own, error):
    before = own.read_bytes()
    assert "--resume" in error(train, own, 6)
    assert "lr 0.5 (checkpoint: 0.001)" in error(train, own, 9, "--resume", "--lr", 0.5)
    assert own.read_bytes() == before


def test_nan_stops_the_run_and_keeps_the_checkpoint(own, tmp_path, capsys, error, monkeypatch):
    path = tmp_path / "nan.pt"
    shutil.copy(own, path)
    before = path.read_bytes()
    original = p3.diffusion_loss
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(p3, "diffusion_loss", lambda *arguments: original(*arguments) * math.nan)
        train(path, 8, "--resume")
    assert stop.value.code == 1 and "'loss': nan" in capsys.readouterr().err
    assert path.read_bytes() == before
    state = torch.load(own, weights_only=True)
    state["model"]["down1.weight"][0] = math.nan
    torch.save(state, path)
    assert "not finite" in error(train, path, 8, "--resume")


def test_a_failed_save_leaves_checkpoint_and_log_in_step(own, tmp_path, error, monkeypatch):
    path = tmp_path / "a.pt"
    shutil.copy(own, path)
    log = tmp_path / "a.log.csv"
    log.write_text("of step 3")
    before = path.read_bytes()

    def full(*_):
        raise RuntimeError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        options = ["--mode", "train", "--steps", 4, "--ckpt", path, *TINY, "--resume"]
        assert "cannot be written (no space left" in error(call, *options)
    assert path.read_bytes() == before and log.read_text() == "of step 3"
    assert sorted(os.listdir(tmp_path)) == ["a.log.csv", "a.pt"]
    assert str(p3.log_path("runs/model.s0")) == "runs/model.s0.log.csv"


def test_bars_heed_tqdm_disable(tmp_path, capsys):
    train(tmp_path / "a.pt", 1)
    options = ["--sample-steps", 2, "--num", 1, "--out", tmp_path / "out", "--device", "cpu"]
    call("--mode", "sample", "--ckpt", tmp_path / "a.pt", *options)
    captured = capsys.readouterr()
    assert captured.err == "" and re.search(r"about \d+ s for 2 network calls on cpu", captured.out)


def test_tensors_that_cannot_be_trained_on(tmp_path):
    args = p3.parse_args(
        [str(option) for option in [*TINY, "--channels", 32, 32, 32, 32, "--ckpt", tmp_path / "a.pt"]]
    )
    for bad, found in (
        (torch.zeros(4, 3, 16, 16), "found torch.float32"),
        (torch.zeros(4, 3).byte(), "found torch.uint8"),
        (torch.zeros(4, 16, 16, 3).byte(), "found torch.uint8"),
        (torch.zeros(0, 3, 16, 16).byte(), "found torch.uint8"),
        (torch.zeros(4, 3, 20, 20).byte(), "found 20x20, expected multiples of 8"),
    ):
        with pytest.raises(ValueError, match=f"images: {found}"):
            p3.train(args, bad)
    with pytest.raises(ValueError, match="--steps"):
        p3.parse_args(["--steps", "0"])


# ------------------------------------------------------------------ one's own network


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_images_do_not_depend_on_batch_size_or_number(own, tmp_path, sampler):
    def sample(name, *options):
        options = ["--device", "cpu", "--precision", "float32", "--sampler", sampler, *options]
        if sampler == "ddim":
            options += ["--eta", 0.5]
        call("--mode", "sample", "--ckpt", own, "--out", tmp_path / name, "--sample-steps", 4, *options)
        return images(tmp_path / name)

    ten = sample("ten", "--num", 10)
    assert list(ten) == [f"{i:04d}.png" for i in range(10)] and ten["0000.png"].shape == (16, 16, 3)
    for other in (sample("batches", "--num", 10, "--batch-size", 3), sample("few", "--num", 4)):
        assert all(np.abs(image - ten[name]).max() <= 1 for name, image in other.items())
    assert np.abs(sample("seed", "--num", 1, "--seed", 1)["0000.png"] - ten["0000.png"]).max() > 1


def test_guided_moves_away_from_the_guide():
    torch.manual_seed(0)
    shape = dict(channels=[32], attention=[])
    model, guide = p3.UNet(**shape), p3.UNet(**shape)
    for parameter in [*model.parameters(), *guide.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 800])
    with torch.no_grad():
        strong, weak = model(x, t), guide(x, t)
        for w, expected in ((0, weak), (1, strong), (2, 2 * strong - weak)):
            assert torch.allclose(p3.Guided(model, guide, w)(x, t), expected, atol=1e-5)


def test_guide(own, tmp_path, error):
    """Guidance 1 is the network alone, 50 changes the images; a guide that does not fit is refused."""
    train(tmp_path / "guide.pt", 2, "--seed", 1)
    options = ["--ckpt", own, "--device", "cpu", "--precision", "float32", "--sampler", "dpm++"]
    options += ["--sample-steps", 3, "--num", 3]

    def sample(name, *guide):
        call("--mode", "sample", "--out", tmp_path / name, *options, *guide)
        return np.stack(list(images(tmp_path / name).values())).astype(int)

    plain = sample("plain")
    guide = ["--guide", tmp_path / "guide.pt"]
    assert np.abs(sample("one", *guide, "--guidance", 1) - plain).max() <= 1
    assert np.abs(sample("far", *guide, "--guidance", 50) - plain).max() > 1
    for mode in ("grid", "interpolate"):
        call("--mode", mode, "--out", tmp_path / mode, *options, *guide)
    assert "Guided" in (tmp_path / "grid" / "network.txt").read_text()

    def message(path):
        return error(call, "--mode", "sample", "--out", tmp_path / "new", *options, "--guide", path)

    missing = message(tmp_path / "none.pt")
    assert "--guide" in missing and "make one with" in missing and missing.count("--ckpt") == 1
    ckpt = torch.load(tmp_path / "guide.pt", weights_only=True)
    ckpt["args"]["size"] = 32
    torch.save(ckpt, tmp_path / "other.pt")
    assert "found size 32, prediction v, 2 resolutions" in message(tmp_path / "other.pt")
    assert not (tmp_path / "new").exists()
    assert "has no use" in error(call, "--mode", "invert", "--ckpt", own, *guide)


def write_faces(folder, names):
    folder.mkdir()
    faces = {}
    for i, name in enumerate(names):
        faces[name] = common.load_faces(None, "val", 16)[i].permute(1, 2, 0).numpy().astype(int)
        Image.fromarray(faces[name].astype(np.uint8)).save(folder / name)
    return faces


def test_invert_without_input_draws_faces_of_the_data(own, tmp_path):
    """At most eight val faces, their noises, and what comes back, with the PSNR beside the figure."""
    options = ["--ckpt", own, "--device", "cpu", "--sample-steps", 2, "--num", 3]
    call("--mode", "invert", *options, "--out", tmp_path / "figures")
    assert sorted(os.listdir(tmp_path / "figures")) == ["inversion.json", "inversion.png"]
    result = json.loads((tmp_path / "figures" / "inversion.json").read_text())
    assert result["n"] == 3 and result["psnr"] > 0


def test_invert_takes_every_format_and_no_hidden_file(own, tmp_path, capsys, error):
    photos = tmp_path / "photos"
    write_faces(photos, ["a.png", "b.bmp", "c.webp"])
    (photos / "._a.png").write_bytes(b"of macOS")
    options = ["--mode", "invert", "--ckpt", own, "--input", photos, "--device", "cpu", "--sample-steps", 2]
    call(*options, "--out", tmp_path / "inverted")
    assert "3 images" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "inverted")) == [f"{i}.{x}" for i in "abc" for x in ("png", "pt")]
    assert os.path.getsize(tmp_path / "inverted" / "a.pt") < 10_000  # one noise, not the batch's
    assert "another folder" in error(call, *options, "--out", photos)
    Image.new("RGB", (16, 16)).save(photos / "a.bmp")
    assert "different names" in error(call, *options, "--out", tmp_path / "inverted")


def test_modes_of_ones_own_network(own, tmp_path):
    options = ["--ckpt", own, "--out", tmp_path / "figures", "--device", "cpu", "--sample-steps", 2]
    call("--mode", "interpolate", *options)
    call("--mode", "grid", *options, "--sampler", "dpm++")
    names = ["first.png", "interpolation.png", "network.txt", "training.png"]
    assert sorted(os.listdir(tmp_path / "figures")) == names


@pytest.mark.slow
def test_inversion_returns_the_image_and_its_noise_interpolates(tmp_path, capsys):
    """With a network of 100 steps: more iterations reconstruct better; the noises interpolate."""
    own = tmp_path / "own.pt"
    train(own, 100)
    faces = write_faces(tmp_path / "photos", ["a.png", "b.png"])

    def invert(iterations):
        folders = ["--input", tmp_path / "photos", "--out", tmp_path / "inverted"]
        options = ["--device", "cpu", "--precision", "float32", "--iterations", iterations]
        call("--mode", "invert", "--ckpt", own, *folders, *options)
        return float(re.search(r"PSNR of the reconstruction ([\d.]+)", capsys.readouterr().out)[1])

    usual, solved = invert(1), invert(5)
    assert solved > usual + 3 and solved > 45, (usual, solved)
    for name, image in faces.items():
        back = np.array(Image.open(tmp_path / "inverted" / name)).astype(int)
        assert np.abs(back - image).max() <= 2
    options = ["--noise", tmp_path / "inverted", "--out", tmp_path / "figures", "--sample-steps", 4]
    call("--mode", "interpolate", "--ckpt", own, *options, "--device", "cpu")
    assert os.listdir(tmp_path / "figures") == ["interpolation.png"]


def test_the_file_copied_alone_samples_and_trains(own, tmp_path):
    shutil.copy(ROOT / "p3_ddim.py", tmp_path)
    shutil.copy(own, tmp_path / "model.pt")
    names = ("tqdm", "matplotlib", "sklearn", "scipy", "common")
    tiny = [str(option) for option in [*TINY, "--steps", 2, "--ckpt", "own.pt"]]
    (tmp_path / "alone.py").write_text(f"""
import sys
for name in {names}: sys.modules[name] = None
import torch, p3_ddim as p3
p3.main("--mode sample --ckpt model.pt --out faces --num 3 --sample-steps 2".split())
args = p3.parse_args({tiny!r})
before = vars(args).copy()
images = torch.randint(256, (20, 3, 24, 24), dtype=torch.uint8)
ema = p3.train(args, images)
assert vars(args) == before and not ema.training
model, settings = p3.load_model("own.pt")
assert settings.size == 24 and settings.prediction == "v" and not settings.course
noise = torch.randn(2, 3, 24, 24)
assert p3.generate(model, settings, noise, sampler="dpm++", calls=2).shape == (2, 3, 24, 24)
try: p3.train(args, images)
except ValueError as e: assert "--resume" in str(e)
""")
    run = [sys.executable, "alone.py"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(os.listdir(tmp_path / "faces")) == 3 and (tmp_path / "own.log.csv").is_file()


def test_weights_of_ones_own_named_by_ddp_or_compile(own, tmp_path):
    state = torch.load(own, weights_only=True)
    for part in ("ema", "model"):
        state[part] = {f"module._orig_mod.{name}": value for name, value in state[part].items()}
    torch.save(state, tmp_path / "ddp.pt")
    options = ["--device", "cpu", "--num", 2, "--sample-steps", 2]
    for name, path in (("a", own), ("b", tmp_path / "ddp.pt")):
        call("--mode", "sample", "--ckpt", path, "--out", tmp_path / name, *options)
    plain, renamed = images(tmp_path / "a"), images(tmp_path / "b")
    assert all((renamed[name] == image).all() for name, image in plain.items())
    assert train(tmp_path / "ddp.pt", 4, "--resume")["step"] == 4


# ------------------------------------------------------------------ command line


def test_readme():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python p3_ddim.py (--mode .*?)(?:  +#.*)?$", text, re.M)
    for command in commands:
        p3.parse_args(command.split())
    assert len(commands) >= 3


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        call("--mode", "sample", "--sampler", "dpm++", "-h")
    out = capsys.readouterr().out
    options = re.findall(r"^  (--[\w-]+)", out, re.M)
    assert stop.value.code == 0 and "2010.02502" in out and len(options) >= 27
    assert out.count("(default:") >= len(options) - 2
    text = re.sub(r"\s+", " ", out)
    for default in (
        "dpm++ (default: 10)",
        "PATH where results go: a folder; eval, mse: a JSON file (default: samples)",
    ):
        assert default in text


def test_defaults_follow_mode_and_sampler():
    def args(*arguments):
        return p3.parse_args(list(arguments))

    for mode in ("eta-grid", "interpolate", "grid"):
        assert args("--mode", mode).out == "p3_figures"
    assert args("--mode", "eta-grid").eta == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert args("--mode", "sample").sample_steps == 50
    report = args("--mode", "eta-grid", "--report", "2023", "--sample-steps", "5")
    assert report.eta == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] and report.sample_steps == 5
    with pytest.raises(ValueError, match="trains nothing"):
        args("--mode", "train", "--report", "2023")
    assert args("--mode", "sample", "--sampler", "dpm++").sample_steps == 10
    assert args("--mode", "sample", "--sampler", "dpm++", "--sample-steps", "7").sample_steps == 7
    assert (args("--fast").size, args("--fast").steps, args().size) == (32, 1500, 64)
    assert args("--fast", "--steps", "9").steps == 9 and args("--mode", "noise").size == 256


@pytest.mark.parametrize(
    "arguments",
    [
        "--steps 0",
        "--lr -1",
        "--mode fly",
        "--size 36 --channels 32 32 32 32",
        "--size 38",
        "--mode noise --size 100",
        "--channels 33",
        "--mode sample --eta 0 1",
        "--eta 2",
        "--sample-steps 501",
        "--sample-steps 30",
        "--mode invert --sampler dpm++",
        "--device tpu",
        "--mode interpolate --eta 0.5",
        "--mode sample --sampler dpm++ --eta 0.5",
        "--mode sam",
        "--samp ddim",
    ],
)
def test_wrong_options(arguments, error):
    error(call, *arguments.split())


def test_bad_checkpoints(own, tmp_path, error):
    def message(path, *more):
        options = ["--out", tmp_path / "out", "--device", "cpu", *more]
        return error(call, "--mode", "sample", "--ckpt", path, *options)

    def saved(value):
        torch.save(value, tmp_path / "bad.pt")
        return tmp_path / "bad.pt"

    (tmp_path / "short.pt").write_bytes(own.read_bytes()[:-1000])
    assert "not a readable" in message(tmp_path / "short.pt")
    assert "found p1_gan" in message(saved({"script": "p1_gan", "args": {}}))
    old = torch.load(own, weights_only=True)
    del old["args"]["channels"]
    assert "found p3_ddim, expected" in message(saved(old))
    assert "found Tensor" in message(saved(torch.zeros(3)))
    assert "found Tensor" in error(train, tmp_path / "bad.pt", 9, "--resume")
    assert "not a readable" in message(saved(Hostile(tmp_path / "executed")))
    assert not (tmp_path / "executed").exists()
    for network in (torch.load(own, weights_only=True)["ema"], {"optim": {}}):
        assert "with other settings" in error(train, saved(network), 9, "--resume")
    (tmp_path / "noise").mkdir()
    torch.save(torch.zeros(1, 3, 17, 16), tmp_path / "noise" / "00.pt")
    assert "found 17x16, expected multiples of 2" in message(own, "--noise", tmp_path / "noise")
    assert "found 17, expected multiples of 2" in message(own, "--size", 17)
    assert "looked for" in error(train, tmp_path / "new.pt", 2, "--data", tmp_path)
    assert not (tmp_path / "out").exists()
