"""p2_diffusion.py: sampler mathematics, exact resume, the grader's rules, one-file use, bad input."""

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, Hostile, write_as_a_gpu
from PIL import Image

import common
import p2_diffusion as p2

SHORT = ["--batch-size", "8", "--T", "20", "--device", "cpu"]
TINY = ["--channels", "32", "32", *SHORT]


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny network after six steps."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    p2.main(["--mode", "train", "--steps", "6", "--ckpt", str(path), *TINY])
    return path


def sample(ckpt, out, *options):
    p2.main(
        [
            "--mode",
            "sample",
            "--ckpt",
            str(ckpt),
            "--out",
            str(out),
            "--num",
            "2",
            "--sample-steps",
            "4",
            "--device",
            "cpu",
            *options,
        ]
    )
    return {
        name: torch.from_numpy(np.array(Image.open(out / name)).astype(int))
        for name in sorted(os.listdir(out))
    }


# ------------------------------------------------------------------ schedule, samplers, loss


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_bar(schedule):
    alpha_bar = p2.make_alpha_bar(schedule, 1000)
    assert alpha_bar.dtype == torch.float64 and (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] < 1e-4
    if schedule == "linear":
        for t, value in ((0, 0.9999), (20, 0.9937354286), (980, 0.0000590375), (999, 0.0000403583)):
            assert abs(alpha_bar[t].item() - value) < 1e-10


def test_ddim_with_eta_1_and_all_steps_is_ddpm():
    alpha_bar = p2.make_alpha_bar("cosine", 50)
    draws = torch.randn(50, 4, 3, 28, 28, dtype=torch.float64)

    def predict(x, t):
        x0 = torch.tanh(x + t / 50)
        return x0, (x - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()

    def run(sampler, *options):
        left = iter([*draws[1:], draws[0]])
        times = p2.even_times(50, 50)
        return sampler(predict, draws[0], alpha_bar, times, *options, lambda: next(left))

    assert torch.allclose(run(p2.ddim, 1.0), run(p2.ddpm), atol=1e-10)


def test_ddpm_has_the_posterior_variance():
    alpha_bar = p2.make_alpha_bar("linear", 2)
    a, b = alpha_bar[1].item(), alpha_bar[0].item()
    seen = []

    def predict(x, t):
        seen.append(x)
        return torch.zeros_like(x), x

    p2.ddpm(predict, torch.zeros(100_000), alpha_bar, [1, 0], lambda: torch.randn(100_000))
    assert seen[1].var().item() == pytest.approx((1 - b) / (1 - a) * (1 - a / b), rel=0.02)


@pytest.mark.parametrize("sampler, order", [(p2.ddim, 1), (p2.dpm_solver, 2)])
def test_order_of_convergence_on_a_gaussian(sampler, order):
    """Data N(m, c^2): the exact predictor is known; the flow keeps (x_t - a m) / sqrt(a^2 c^2 + s^2)."""
    alpha_bar, m, c = (
        torch.sigmoid(torch.linspace(5, -5, 641, dtype=torch.float64)),
        0.3,
        0.5,
    )  # log-SNR is linear in t
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def predict(x, t):
        a, v = alpha_bar[t].sqrt(), 1 - alpha_bar[t]
        x0 = m + a * c**2 / (a**2 * c**2 + v) * (x - a * m)
        return x0, (x - a * x0) / v.sqrt()

    def exact(t):
        a, v = alpha_bar[t].sqrt(), 1 - alpha_bar[t]
        start = alpha_bar[-1]
        z = (x - start.sqrt() * m) / (start * c**2 + 1 - start).sqrt()
        return predict(a * m + (a**2 * c**2 + v).sqrt() * z, t)[0]

    errors = []
    for n in (21, 41, 81):
        result = sampler(predict, x, alpha_bar, p2.even_times(641, n))
        errors.append((result - exact(0)).abs().max().item())
    for big, small in zip(errors, errors[1:]):
        assert math.log2(big / small) == pytest.approx(order, abs=0.4)


def test_ddim_draws_no_noise_at_eta_0_and_uses_it_above():
    alpha_bar, x = p2.make_alpha_bar("cosine", 20), torch.randn(2, 3, 28, 28)
    times = p2.even_times(20, 5)

    def predict(x, t):
        return torch.tanh(x), x

    p2.ddim(predict, x, alpha_bar, times, 0.0, lambda: pytest.fail("drew noise"))
    results = [
        p2.ddim(predict, x, alpha_bar, times, 0.5, lambda: v * torch.ones_like(x)) for v in (0.5, -0.5)
    ]
    assert not torch.allclose(*results)


def test_log_snr_times_are_even_in_log_snr():
    alpha_bar = p2.make_alpha_bar("cosine", 400)
    times = p2.log_snr_times(alpha_bar, 15, 4)
    assert len(times) == 15 and times == sorted(times, reverse=True)
    assert times[0] == 399 and times[-1] == 4
    lambda_ = (alpha_bar / (1 - alpha_bar)).log() / 2  # half of the log-SNR
    ideal = torch.linspace(-4, lambda_[4].item(), 15)[1:]
    nearest = (lambda_[:, None] - ideal).abs().min(0).values
    assert torch.equal((lambda_[times[1:]] - ideal).abs(), nearest)
    assert [p2.log_snr_times(alpha_bar, calls, 4) for calls in (1, 2)] == [[399], [399, 4]]


def test_dpm_solver_leaves_the_finest_noise_to_its_last_call():
    """generate calls the network `calls` times, the last time at t / T = 0.08, or where it is told to."""
    args = p2.parse_args(["--device", "cpu"])
    model = p2.build(args).eval()
    settings = argparse.Namespace(**vars(args), size=28)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1][0])))
    p2.generate(model, settings, [3])
    assert len(seen) == 7 and seen[0] == 399 and seen[-1] == 32
    for last_time, t in ((0.02, 8), (0.5, 200)):
        args = p2.parse_args(["--mode", "sample", "--last-time", str(last_time)])
        p2.generate(model, settings, [3], **{**p2.sampling(args), "bf16": False})
        assert seen[-1] == t


def test_guidance():
    alpha_bar, y, x = p2.make_alpha_bar("cosine", 20), torch.arange(4), torch.randn(4, 3, 28, 28) * 0.1
    seen = []

    def model(x, t, labels):
        seen.append(labels.tolist())
        return 0.01 * labels.view(-1, 1, 1, 1).float().expand_as(x)

    conditional = p2.predictor(model, y, alpha_bar, "v", 0.0)(x, 10)[0]
    assert seen == [[0, 1, 2, 3]]  # w = 0: one branch
    a, s = alpha_bar[10].sqrt(), (1 - alpha_bar[10]).sqrt()
    assert torch.allclose(conditional, (a * x - s * model(x, None, y)).float(), atol=1e-6)
    seen.clear()
    guided = p2.predictor(model, y, alpha_bar, "v", 2.0)(x, 10)[0]
    assert seen == [[0, 1, 2, 3, 10, 10, 10, 10]]  # one batch for both branches
    v = 3 * 0.01 * y.float() - 2 * 0.01 * 10
    assert torch.allclose(guided, (a * x - s * v.view(-1, 1, 1, 1)).float(), atol=1e-6)
    seen.clear()
    predict = p2.predictor(model, y, alpha_bar, "v", 2.0, (0.3, 0.9))
    assert torch.equal(predict(x, 10)[0], guided)  # t / T = 0.5
    for t in (5, 6, 18, 19):
        predict(x, t)
    assert [len(labels) for labels in seen] == [8, 4, 8, 8, 4]


def test_guided_moves_away_from_the_guide():
    torch.manual_seed(0)
    model, guide = p2.UNet((32, 32)), p2.UNet((32,))
    for parameter in [*model.parameters(), *guide.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    x, t, y = torch.randn(2, 3, 28, 28), torch.tensor([3, 300]), torch.tensor([7, p2.NULL])
    with torch.no_grad():
        strong, weak = model(x, t, y), guide(x, t, y)
        for w, expected in ((0, weak), (1, strong), (2, 2 * strong - weak)):
            assert torch.allclose(p2.Guided(model, guide, w)(x, t, y), expected, atol=1e-5)


def test_prediction_targets_are_recovered():
    """A network that outputs the exact target has loss 0, and predict returns x0, for eps and for v."""
    alpha_bar, x0, y = (
        p2.make_alpha_bar("cosine", 20),
        torch.rand(6, 3, 28, 28) * 2 - 1,
        torch.zeros(6).long(),
    )
    for prediction in ("eps", "v"):
        inputs = []

        def oracle(x, t, labels):
            inputs.append((x, t))
            i = t
            a, s = (f.float().view(-1, 1, 1, 1) for f in (alpha_bar[i].sqrt(), (1 - alpha_bar[i]).sqrt()))
            eps = (x - a * x0) / s
            return eps if prediction == "eps" else a * eps - s * x0

        assert p2.diffusion_loss(oracle, x0, y, alpha_bar, prediction, 5.0) < 1e-8
        x, t = inputs[0]
        assert len(set(t.tolist())) == 6  # stratified
        off_by_one = p2.diffusion_loss(lambda *inputs: oracle(*inputs) + 1, x0, y, alpha_bar, prediction, 5.0)
        snr = (alpha_bar / (1 - alpha_bar))[inputs[-1][1]]
        weight = snr.clamp(max=5) / (snr if prediction == "eps" else snr + 1)  # min-SNR, arXiv 2303.09556
        assert off_by_one.item() == pytest.approx(weight.mean().item(), rel=1e-4)
        assert p2.diffusion_loss(
            lambda *inputs: oracle(*inputs) + 1, x0, y, alpha_bar, prediction, 0.0
        ).item() == pytest.approx(1, rel=1e-4)
        assert torch.allclose(
            p2.predictor(oracle, y, alpha_bar, prediction)(0.5 * x0 + 0.1, 8)[0], x0, atol=1e-4
        )


# ------------------------------------------------------------------ networks


def test_parameter_counts():
    assert count(p2.ContextUnet(216)) == 18_743_187  # printed in the 2023 report
    assert count(p2.UNet()) <= 5_000_000


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dropout=0.5),
        dict(channels=(32, 64, 64), patch=1, blocks=2),
        dict(channels=(64,), patch=4),
    ],
)
def test_unet_shapes_and_null_class(options):
    net = p2.UNet(**{"channels": (32, 32), **options})
    for parameter in net.parameters():  # at the start every residual branch is zero
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, 28, 28)
    outs = [net(x, torch.tensor([40, 40]), torch.full((2,), y)) for y in (3, p2.NULL)]
    assert outs[0].shape == x.shape and not torch.allclose(*outs)
    assert not torch.allclose(net(x, torch.tensor([360, 360]), torch.tensor([3, 3])), outs[0])


def test_context_unet_null_label_is_the_zero_vector():
    net, seen = p2.ContextUnet(16).eval(), []
    net.context1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    net(torch.randn(2, 3, 28, 28), torch.tensor([200, 200]), torch.tensor([3, p2.NULL]))
    assert seen == [[[0, 0, 0, 1, 0, 0, 0, 0, 0, 0], [0] * 10]]


def test_ema_averages_parameters_and_copies_buffers():
    model, ema = p2.ContextUnet(8), p2.ContextUnet(8)
    before = ema.out[0].weight.clone()
    model.init_conv.conv1[1].running_mean.fill_(7)
    p2.update_ema(ema, model, 100)
    k = (1 - 1 / 100) ** 17
    assert torch.allclose(ema.out[0].weight, k * before + (1 - k) * model.out[0].weight, atol=1e-6)
    assert (ema.init_conv.conv1[1].running_mean == 7).all()
    p2.update_ema(ema, model, 1)
    assert torch.equal(ema.out[0].weight, model.out[0].weight)
    for decay, step, k in ((0.9995, 100, 0.99**17), (0.9, 1000, 0.9), (0.0, 1000, 0.0)):
        ema.out[0].weight.data.zero_()
        p2.update_ema(ema, model, step, decay)
        assert torch.allclose(ema.out[0].weight, (1 - k) * model.out[0].weight, atol=1e-6)


# ------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "options",
    [
        [*TINY, "--dropout", "0.2"],
        [*SHORT, "--arch", "context", "--width", "8", "--schedule", "linear", "--prediction", "eps"],
    ],
)
def test_resume_is_bit_equal(tmp_path, options):
    def run(name, steps, *more):
        p2.main(["--mode", "train", "--steps", str(steps), "--ckpt", str(tmp_path / name), *options, *more])
        return torch.load(tmp_path / name, weights_only=True)

    whole = run("whole.pt", 6)
    run("parts.pt", 3)
    write_as_a_gpu(tmp_path / "parts.pt")
    parts = run("parts.pt", 6, "--resume")
    assert parts["step"] == whole["step"] == 6
    for key in ("model", "ema"):
        assert all(torch.equal(v, parts[key][k]) for k, v in whole[key].items())
    assert whole["images"] == parts["images"]
    for i, state in whole["optim"]["state"].items():
        assert all(torch.equal(v, parts["optim"]["state"][i][k]) for k, v in state.items())
    assert torch.equal(whole["rng"]["cpu"], parts["rng"]["cpu"])
    assert re.match(
        r"step,loss,gradient,images_per_s,seconds\n3,.*\n6,", (tmp_path / "parts.log.csv").read_text()
    )


def test_generate_refuses_what_it_cannot_do(ckpt):
    model, settings = p2.load_model(ckpt)
    for digits, options, expected in (
        ([3, 10], {}, "expected integers in 0 to 9"),
        ([-1], {}, "expected integers in 0 to 9"),
        ([3], {"sampler": "dpm"}, "expected one of dpm"),
    ):
        with pytest.raises(ValueError, match=expected):
            p2.generate(model, settings, digits, calls=2, **options)


@pytest.mark.parametrize("side", [29, 30])
def test_train_refuses_a_size_that_the_network_cannot_halve(side, tmp_path):
    args = p2.parse_args(["--mode", "train", "--steps", "1", "--ckpt", str(tmp_path / "x.pt"), *SHORT])
    images = torch.zeros(10, 3, side, side, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected multiples of 4"):
        p2.train(args, images, torch.arange(10))


@pytest.mark.slow
def test_training_learns_the_digits(tmp_path):
    """The loss keeps falling on the built-in digits."""
    p2.main(
        [
            "--mode",
            "train",
            "--steps",
            "200",
            "--ckpt",
            str(tmp_path / "a.pt"),
            "--channels",
            "32",
            "32",
            "--batch-size",
            "16",
        ]
    )
    log = torch.load(tmp_path / "a.pt", weights_only=True)["log"]
    loss = [row["loss"] for row in log]  # means of ten steps
    assert sum(loss[10:]) < 0.7 * sum(loss[:10])


def test_guide(ckpt, tmp_path, error):
    """Autoguidance 1 is the network alone, 50 changes the digits; a guide that does not fit is refused."""
    train = ["--mode", "train", "--steps", "2", "--batch-size", "8", "--device", "cpu", "--channels", "32"]

    def make(name, *options):
        p2.main([*train, "--ckpt", str(tmp_path / name), *options])
        return ["--guide", str(tmp_path / name)]

    guide = make("guide.pt", "--T", "20")
    exact = ["--precision", "float32"]
    plain = sample(ckpt, tmp_path / "plain", *exact)
    one = sample(ckpt, tmp_path / "one", *exact, *guide, "--autoguidance", "1")
    far = sample(ckpt, tmp_path / "far", *exact, *guide, "--autoguidance", "50")
    assert max((one[name] - plain[name]).abs().max() for name in plain) <= 1
    assert max((far[name] - plain[name]).abs().max() for name in plain) > 1
    command = ["--ckpt", str(ckpt), "--out", str(tmp_path / "new"), "--device", "cpu"]
    p2.main(["--mode", "grid", *command, *guide, "--num", "1", "--sample-steps", "4"])
    assert "Guided" in (tmp_path / "new" / "network.txt").read_text()

    def message(*options):
        return error(p2.main, ["--mode", "sample", *command, *options])

    missing = message("--guide", str(tmp_path / "none.pt"))
    assert "--guide" in missing and "make one with" in missing and missing.count("--ckpt") == 1
    assert "found size 28, T 40," in message(*make("other.pt", "--T", "40"))
    assert "null class False; expected" in message(*make("no_null.pt", "--T", "20", "--label-dropout", "0"))
    assert "has no use" in error(p2.main, ["--mode", "eval", *guide])


def test_existing_checkpoint_is_not_overwritten(ckpt, error):
    before = ckpt.read_bytes()
    assert "--resume" in error(p2.main, ["--mode", "train", "--steps", "6", "--ckpt", str(ckpt), *TINY])
    assert "lr 0.5 (checkpoint: 0.001)" in error(
        p2.main, ["--mode", "train", "--resume", "--lr", "0.5", "--steps", "9", "--ckpt", str(ckpt), *TINY]
    )
    assert ckpt.read_bytes() == before


def test_nan_stops_the_run_and_keeps_the_checkpoint(ckpt, tmp_path, capsys, monkeypatch):
    path = tmp_path / "nan.pt"
    shutil.copy(ckpt, path)
    before = path.read_bytes()
    original = p2.diffusion_loss
    monkeypatch.setattr(p2, "diffusion_loss", lambda *arguments: original(*arguments) * math.nan)
    with pytest.raises(SystemExit) as stop:
        p2.main(["--mode", "train", "--resume", "--steps", "8", "--ckpt", str(path), *TINY])
    assert stop.value.code == 1 and "'loss': nan" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_resume_refuses_weights_that_are_not_finite(ckpt, tmp_path):
    state = torch.load(ckpt, weights_only=True)
    state["model"]["stem.weight"][0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    args = p2.parse_args(["--resume", "--steps", "8", "--ckpt", str(tmp_path / "nan.pt"), *TINY])
    with pytest.raises(ValueError, match="not finite"):
        p2.train(args, *common.load_digits(None, "mnistm", "train"))


def start(*arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "p2_diffusion.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_130(tmp_path):
    path = tmp_path / "stopped.pt"
    process = start("--mode", "train", "--ckpt", str(path), *TINY)
    for line in process.stdout:
        if "images, cpu" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    step = torch.load(path, weights_only=True)["step"]
    p2.main(["--mode", "train", "--resume", "--steps", str(step + 1), "--ckpt", str(path), *TINY])
    assert torch.load(path, weights_only=True)["step"] == step + 1


@pytest.mark.slow
def test_full_disk(ckpt, tmp_path):
    """Files may not grow beyond a limit: the old checkpoint stays, nothing half-written is left."""
    path = tmp_path / "old.pt"
    shutil.copy(ckpt, path)
    before = path.read_bytes()

    def limit(size):
        return lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )

    process = start(
        "--mode", "train", "--resume", "--steps", "7", "--ckpt", str(path), *TINY, preexec_fn=limit(100_000)
    )
    _, err = process.communicate()
    assert process.returncode == 2 and "cannot be written" in err and "Traceback" not in err
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["old.pt"]
    process = start(
        "--mode",
        "sample",
        "--ckpt",
        str(path),
        "--out",
        str(tmp_path / "s"),
        "--num",
        "1",
        "--sample-steps",
        "1",
        "--device",
        "cpu",
        preexec_fn=limit(500),
    )
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err and os.listdir(tmp_path / "s") == []
    Image.new("RGB", (28, 28)).save(tmp_path / "s" / "0_001.png")
    before = (tmp_path / "s" / "0_001.png").read_bytes()
    process = start(
        "--mode",
        "sample",
        "--ckpt",
        str(path),
        "--out",
        str(tmp_path / "s"),
        "--num",
        "1",
        "--sample-steps",
        "1",
        "--device",
        "cpu",
        preexec_fn=limit(500),
    )
    process.communicate()
    assert process.returncode == 2 and (tmp_path / "s" / "0_001.png").read_bytes() == before


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    "sampler", [["--sampler", "dpm++"], ["--sampler", "ddpm"], ["--sampler", "ddim", "--eta", "0.5"]]
)
def test_images_do_not_depend_on_batch_size_or_number(ckpt, tmp_path, sampler):
    reference = sample(ckpt, tmp_path / "a", "--precision", "float32", *sampler)
    assert len(reference) == 20
    for name, options in (
        ("b", ["--batch-size", "3"]),
        ("c", ["--num", "1"]),
        ("d", ["--num", "3", "--batch-size", "7"]),
    ):
        for image, pixels in sample(
            ckpt, tmp_path / name, "--precision", "float32", *sampler, *options
        ).items():
            if image in reference:
                assert (
                    pixels - reference[image]
                ).abs().max() <= 1  # float32 sums may be ordered by the batch size
    other = sample(ckpt, tmp_path / "e", "--seed", "1", "--precision", "float32", *sampler)
    assert (other["0_001.png"] - reference["0_001.png"]).abs().max() > 1


def test_noise_depends_on_seed_and_key_alone():
    one = p2.Noise([(3, 1)], (3, 28, 28), 5)
    two = p2.Noise([(0, 1), (3, 1)], (3, 28, 28), 5)
    for _ in range(2):
        first, second = one(), two()
        assert torch.equal(first[0], second[1]) and not torch.equal(second[0], second[1])
    starts = p2.Noise([(number,) for number in range(200_000)], (1,), 0)()
    assert len(starts.unique()) > 199_000  # seeds of 32 bits had equal streams
    big = [p2.Noise([(0,)], (2,), seed)() for seed in (1, 2**32 + 1, 2**64 + 1)]
    assert not torch.equal(big[0], big[1]) and not torch.equal(big[0], big[2])


def test_files_are_what_the_grader_reads(ckpt, tmp_path):
    """digit_classifier.py opens every entry, does not resize, and takes the first character as the label."""
    sample(ckpt, tmp_path / "out", "--num", "100", "--sample-steps", "1")
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == [f"{d}_{n:03d}.png" for d in range(10) for n in range(1, 101)]
    labels = []
    for name in names:
        image = Image.open(tmp_path / "out" / name)
        assert image.mode == "RGB" and image.size == (28, 28) and image.format == "PNG"
        labels.append(int(name[0]))
    assert [labels.count(d) for d in range(10)] == [100] * 10


def test_out_that_is_a_file(ckpt, tmp_path, error):
    (tmp_path / "out").write_text("mine")
    options = ["--mode", "sample", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--num", "1"]
    assert "out: File exists, expected a folder" in error(p2.main, options)


def test_other_files_in_out_are_named_and_kept(ckpt, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    p2.main(
        [
            "--mode",
            "sample",
            "--ckpt",
            str(ckpt),
            "--out",
            str(tmp_path / "out"),
            "--num",
            "1",
            "--sample-steps",
            "1",
        ]
    )
    assert "notes.txt" in capsys.readouterr().err and (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_file_copied_alone_samples_and_trains(ckpt, tmp_path):
    shutil.copy(ROOT / "p2_diffusion.py", tmp_path)
    shutil.copy(ckpt, tmp_path / "model.pt")
    names = ("tqdm", "matplotlib", "sklearn", "scipy", "common")
    alone = f"import sys\nfor name in {names}: sys.modules[name] = None\n"
    code = alone + "import p2_diffusion; p2_diffusion.main()"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--mode",
            "sample",
            "--ckpt",
            "model.pt",
            "--out",
            "digits",
            "--num",
            "1",
            "--sample-steps",
            "2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(os.listdir(tmp_path / "digits")) == 10
    code = (
        alone
        + f"""
import torch, p2_diffusion as p2
images, labels = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50) % 10
args = p2.parse_args({[*TINY, "--steps", "2", "--ckpt", "own.pt"]!r})
before = vars(args).copy()
p2.train(args, images, labels)
assert vars(args) == before
model, settings = p2.load_model("own.pt")
assert p2.generate(model, settings, [3, 7], calls=2).shape == (2, 3, 32, 32)
try: p2.train(args, images, labels)
except ValueError as e: assert "--resume" in str(e)
"""
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "own.log.csv").is_file()


@pytest.mark.parametrize(
    "images, labels, what",
    [
        (torch.zeros(4, 3, 28, 28), torch.zeros(4).long(), "images: found torch.float32"),
        (torch.zeros(4, 28, 28, 3).byte(), torch.zeros(4).long(), "images: found"),
        (torch.zeros(0, 3, 28, 28).byte(), torch.zeros(0).long(), "images: found"),
        (torch.zeros(4, 3).byte(), torch.zeros(4).long(), "images: found"),
        (torch.zeros(4, 3, 0, 0).byte(), torch.zeros(4).long(), "images: found"),
        (torch.zeros(4, 3, 28, 28).byte(), torch.zeros(4), "labels: found torch.float32"),
        (torch.zeros(4, 3, 28, 28).byte(), torch.full((4,), 10), "labels: found"),
    ],
)
def test_tensors_that_cannot_be_trained_on(images, labels, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        p2.train(p2.parse_args([*TINY, "--ckpt", str(tmp_path / "a.pt")]), images, labels)
    with pytest.raises(ValueError, match="--steps"):
        p2.parse_args(["--steps", "0"])


def test_weights_named_by_ddp_or_compile_and_broken_ones(ckpt, tmp_path, error):
    state = torch.load(ckpt, weights_only=True)
    reference = sample(ckpt, tmp_path / "a")
    state["ema"] = {f"module._orig_mod.{name}": value for name, value in state["ema"].items()}
    torch.save(state, tmp_path / "ddp.pt")
    renamed = sample(tmp_path / "ddp.pt", tmp_path / "b")
    assert all(torch.equal(renamed[name], pixels) for name, pixels in reference.items())
    state["ema"]["module._orig_mod.stem.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    assert "not finite" in error(
        p2.main, ["--mode", "sample", "--ckpt", str(tmp_path / "nan.pt"), "--out", str(tmp_path / "c")]
    )
    state["ema"] = {"another.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "other.pt")
    assert "not this network's" in error(
        p2.main, ["--mode", "sample", "--ckpt", str(tmp_path / "other.pt"), "--out", str(tmp_path / "c")]
    )


def test_two_checkpoints_without_pt_in_one_folder_have_two_logs(tmp_path):
    for name in ("model.s0", "model.s1"):
        p2.main(["--mode", "train", "--steps", "1", "--ckpt", str(tmp_path / name), *TINY])
    assert sorted(os.listdir(tmp_path)) == ["model.s0", "model.s0.log.csv", "model.s1", "model.s1.log.csv"]


def test_a_failed_save_leaves_the_log_beside_its_checkpoint(ckpt, tmp_path, monkeypatch):
    """The log is written after the checkpoint, so it is never ahead of it."""
    path = tmp_path / "model.pt"
    p2.main(["--mode", "train", "--steps", "2", "--ckpt", str(path), *TINY])
    before = (tmp_path / "model.log.csv").read_text()

    def full_disk(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        p2.train(
            p2.parse_args(["--steps", "3", "--resume", "--ckpt", str(path), *TINY]),
            *common.load_digits(None, "mnistm", "train"),
        )
    assert (tmp_path / "model.log.csv").read_text() == before


@pytest.mark.slow
def test_the_script_s_own_folder_has_weights(ckpt, tmp_path):
    """Without --ckpt: checkpoints/ here, else .weights/ beside the script, else beside it."""
    shutil.copy(ROOT / "p2_diffusion.py", tmp_path)
    command = [
        sys.executable,
        str(tmp_path / "p2_diffusion.py"),
        "--mode",
        "sample",
        "--num",
        "1",
        "--sample-steps",
        "1",
        "--out",
        "out",
    ]
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / ".weights", tmp_path / "elsewhere" / "checkpoints"):
        place.mkdir(exist_ok=True)
        shutil.copy(ckpt, place / "p2_diffusion.pt")
        result = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        used = re.search("weights: (.*)", result.stdout)[1]
        assert (tmp_path / "elsewhere" / used).resolve() == (place / "p2_diffusion.pt").resolve()


def test_ascii_terminal_and_left_over_variables(ckpt, tmp_path):
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
    }
    environment.pop("HOME", None)
    command = [
        sys.executable,
        str(ROOT / "p2_diffusion.py"),
        "--mode",
        "sample",
        "--ckpt",
        str(ckpt),
        "--num",
        "1",
        "--sample-steps",
        "1",
    ]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "\u2192\udcff")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "\\u2192" in result.stdout and len(os.listdir(tmp_path / "\u2192\udcff")) == 10


@pytest.mark.slow
def test_grid_and_eval(ckpt, tmp_path, capsys):
    p2.main(
        ["--mode", "grid", "--ckpt", str(ckpt), "--out", str(tmp_path / "figures"), "--sample-steps", "7"]
    )
    assert sorted(os.listdir(tmp_path / "figures")) == [
        "digits.png",
        "guidance.png",
        "network.txt",
        "reverse.png",
        "training.png",
    ]
    sizes = {
        name: Image.open(tmp_path / "figures" / name).size
        for name in os.listdir(tmp_path / "figures")
        if name.endswith("png")
    }
    assert (
        all(min(size) > 100 for size in sizes.values())
        and sizes["reverse.png"][0] > 3 * sizes["reverse.png"][1]
    )
    sample(ckpt, tmp_path / "digits")
    capsys.readouterr()
    score = tmp_path / "score.json"
    p2.main(["--mode", "eval", "--input", str(tmp_path / "digits"), "--ckpt", str(ckpt), "--out", str(score)])
    printed = capsys.readouterr().out
    assert re.search(r"acc = [\d.]+ \(correct/total = \d+/20\)", printed)
    assert "% on the val part of MNIST-M" in printed  # the classifier that comes with the project
    assert json.loads(score.read_text())["n"] == 20


# ------------------------------------------------------------------ command line and bad input


def test_readme():
    """Every p2 command is accepted."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3? p2_diffusion.py (--mode .*?)(?:  +#.*)?$", text, re.M)
    for command in commands:
        p2.parse_args(command.split())
    assert len(commands) >= 5


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        p2.main(["-h"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--guidance" in text and "2207.12598" in text
    options = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(options) >= 25 and text.count("(default:") >= len(options) - 3
    with pytest.raises(SystemExit):
        p2.main(["-h", "--fast", "--mode", "train"])
    assert "(default: 1600)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--lr", "-1"],
        ["--guidance", "x"],
        ["--mode", "fly"],
        ["--channels", "33"],
        ["--channels", "32", "32", "32", "32"],
        ["--lr", "inf"],
        ["--device", "mps"],
        ["--num", "0"],
        ["--sample-steps", "0"],
        ["--T", "1"],
        ["--width", "9"],
        ["--stepz", "5"],
        ["--eta", "0.5"],
        ["--guidance-interval", "0.9", "0.3"],
        ["--guidance-interval", "0.3", "1.1"],
    ],
)
def test_wrong_options(arguments, error):
    assert arguments[0] in error(p2.main, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(error):
    assert "--device cpu" in error(p2.main, ["--device", "cuda"])


def test_bad_checkpoints(ckpt, tmp_path, error):
    def message(path, *more):
        return error(
            p2.main, ["--mode", "sample", "--ckpt", str(path), "--out", str(tmp_path / "out"), *more]
        )

    assert "--mode train" in message(tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes(ckpt.read_bytes()[:-1000])
    assert "not a readable checkpoint" in message(tmp_path / "short.pt")
    torch.save({"script": "p1_gan", "args": {}}, tmp_path / "p1.pt")
    assert "found p1_gan" in message(tmp_path / "p1.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "found Tensor" in message(tmp_path / "tensor.pt")
    torch.save({**torch.load(ckpt, weights_only=True), "args": {}}, tmp_path / "old.pt")
    assert "expected a checkpoint of this" in message(tmp_path / "old.pt")
    torch.save(Hostile(tmp_path / "executed"), tmp_path / "hostile.pt")
    assert "not a readable checkpoint" in message(tmp_path / "hostile.pt")
    assert not (tmp_path / "executed").exists()
    unconditional = tmp_path / "unconditional.pt"
    p2.main(["--mode", "train", "--steps", "1", "--label-dropout", "0", "--ckpt", str(unconditional), *TINY])
    assert "use --guidance 0" in message(unconditional)
    assert "at most the network's T = 20 steps" in message(ckpt, "--sample-steps", "21")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_folders(ckpt, tmp_path, error):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", "/proc/nowhere"):
        assert str(out) in error(
            p2.main, ["--mode", "sample", "--ckpt", str(ckpt), "--out", str(out), "--num", "1"]
        )
    assert "looked for" in error(
        p2.main, ["--mode", "train", "--data", str(tmp_path), "--ckpt", str(tmp_path / "new.pt")]
    )
    assert "no such folder" in error(
        p2.main, ["--mode", "eval", "--input", str(tmp_path / "none"), "--ckpt", str(ckpt)]
    )
