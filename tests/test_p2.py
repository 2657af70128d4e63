"""p2_diffusion.py: each line of the loss, the samplers, the networks and a training step; generate; modes."""

import argparse
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import p2_diffusion as p2

SHORT = ["--batch-size", "8", "--T", "20", "--device", "cpu", "--precision", "float32"]
TINY = ["--channels", "32", "32", *SHORT]
IMAGES = torch.randint(256, (10, 3, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
UNEVEN = torch.tensor([0.9, 0.64, 0.36, 0.1], dtype=torch.float64)  # an alpha_bar for values by hand


def constant(value, size=4):
    """Images that are one value everywhere."""
    return torch.full((1, 3, size, size), float(value))


def value_of(x):
    """The one value of such images."""
    assert (x == x.flatten()[0]).all()
    return x.flatten()[0].item()


# ------------------------------------------------------------------ schedule


def test_linear_alpha_bar():
    alpha_bar = p2.make_alpha_bar("linear", 1000)
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    for t, value in ((0, 0.9999), (20, 0.9937354286), (980, 0.0000590375), (999, 0.0000403583)):
        assert abs(alpha_bar[t].item() - value) < 1e-10
    assert p2.make_alpha_bar("linear", 2, 0.3).tolist() == pytest.approx([0.9999, 0.9999 * 0.7], abs=1e-12)


def test_cosine_alpha_bar():
    """f(u) / f(0) with f(u) = cos((u + 0.008) / 1.008 pi / 2)^2, where no beta is above 0.999."""
    alpha_bar = p2.make_alpha_bar("cosine", 4)
    by_hand = [0.8470121613269, 0.4938435904406, 0.1442721023857, 0.1442721023857 / 1000]
    assert alpha_bar.dtype == torch.float64 and alpha_bar.tolist() == pytest.approx(by_hand, rel=1e-10)


# ------------------------------------------------------------------ loss


def draw(monkeypatch, u, eps):
    """Makes torch.rand give `u` and torch.randn_like give `eps` everywhere."""
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.tensor(u[:n]))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, eps))


@pytest.mark.parametrize("prediction, gamma", [("v", 5.0), ("v", 0.0), ("eps", 5.0), ("eps", 0.0)])
def test_loss_by_hand(monkeypatch, prediction, gamma):
    """x0 = 0.5, eps = 2, the network says 0.25; alpha_bar is 0.9, 0.64, 0.36, 0.1 at the four steps."""
    draw(monkeypatch, [0.2], 2.0)
    seen = []

    def model(x, t, y):
        seen.append((x, t.tolist(), y.tolist()))
        return torch.full_like(x, 0.25)

    x0 = torch.full((4, 3, 5, 6), 0.5)
    loss = p2.diffusion_loss(model, x0, torch.tensor([4, 3, 2, 10]), UNEVEN, prediction, gamma)
    ((x, t, y),) = seen
    assert t == [0, 1, 2, 3] and y == [4, 3, 2, 10]  # u = 0.2, 0.45, 0.7, 0.95
    assert x.dtype == loss.dtype == torch.float32 and loss.shape == ()
    expected = 0
    for bar, image in zip((0.9, 0.64, 0.36, 0.1), x):
        a, s = math.sqrt(bar), math.sqrt(1 - bar)
        assert value_of(image) == pytest.approx(0.5 * a + 2 * s)
        snr = bar / (1 - bar)  # 9, 16/9, 9/16, 1/9
        if prediction == "v":
            error, weight = (0.25 - (2 * a - 0.5 * s)) ** 2, min(snr, 5) / (snr + 1)
        else:
            error, weight = (0.25 - 2) ** 2, min(snr, 5) / snr
        expected += error * (weight if gamma else 1) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_steps_of_a_batch(monkeypatch):
    """Stratified: one draw, then evenly on, round the end; uniform: a draw for each. T - 1 at most."""
    steps = []

    def model(x, t, y):
        steps.append(t.tolist())
        return x

    def loss(u, T, *t_sampling):
        draw(monkeypatch, u, 0.0)
        p2.diffusion_loss(model, torch.zeros(4, 3, 2, 2), None, torch.full((T,), 0.5), "v", 0, *t_sampling)
        return steps.pop()

    assert loss([0.6], 100) == [60, 85, 10, 35]
    assert loss([0.6, 0.1, 0.1, 0.9], 100, "uniform") == [60, 10, 10, 90]
    largest = 1 - 2**-24
    for T in (2, 3, 100, 400, 1000, 1001):
        assert loss([largest] * 4, T, "uniform") == [T - 1] * 4 and loss([largest], T)[0] == T - 1


# ------------------------------------------------------------------ what the samplers call


def outputs(value):
    """A network that says `value`, and notes what it was given and whether bf16 autocast was on."""
    seen = []

    def model(x, t, y):
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        seen.append((x, t.tolist(), y.tolist(), bf16))
        return torch.as_tensor(value, dtype=torch.bfloat16).view(-1, 1, 1, 1).expand(x.shape)

    return model, seen


@pytest.mark.parametrize(
    "prediction, x, options, x0, eps",
    [
        ("v", 0.5, {}, 0.6 * 0.5 - 0.8 * 0.25, 0.55),
        ("eps", 0.5, {}, (0.5 - 0.8 * 0.25) / 0.6, 0.25),
        ("v", 5.0, {}, 1.0, (5 - 0.6) / 0.8),  # clamped
        ("v", -5.0, {}, -1.0, (-5 + 0.6) / 0.8),
        ("v", 5.0, {"clamp": False}, 0.6 * 5 - 0.8 * 0.25, (5 - 0.6 * 2.8) / 0.8),
    ],
)
def test_predictor_by_hand(prediction, x, options, x0, eps):
    """alpha_bar = 0.36, so a = 0.6 and s = 0.8; the network says 0.25."""
    model, seen = outputs(0.25)
    result = p2.predictor(model, torch.tensor([7]), UNEVEN, prediction, **options)(constant(x), 2)
    assert [value_of(r) for r in result] == pytest.approx([x0, eps], rel=1e-5)
    assert all(r.dtype == torch.float32 for r in result)
    ((given, t, y, bf16),) = seen  # one branch, in float32, by default
    assert value_of(given) == x and (t, y, bf16) == ([2], [7], False)


def test_guidance_by_hand():
    """Both branches run as one batch; w = 2 makes 3 * 1.0078125 - 2 * 0.25, which bf16 would round."""
    model, seen = outputs([1.0078125, 0.25])
    predict = p2.predictor(model, torch.tensor([7]), UNEVEN, "eps", 2.0, clamp=False, bf16=True)
    x0, _ = predict(constant(3), 2)
    assert value_of(x0) == pytest.approx((3 - 0.8 * (3 * 1.0078125 - 2 * 0.25)) / 0.6, rel=1e-5)
    ((given, t, y, bf16),) = seen
    assert given.shape == (2, 3, 4, 4) and value_of(given) == 3
    assert (t, y, bf16) == ([2, 2], [7, p2.NULL], True)


def test_guidance_in_a_part_of_the_time():
    model, seen = outputs([0.25])
    y = torch.tensor([7])
    for guidance, interval in ((2.0, (0.25, 0.5)), (0.0, (0, 1)), (0.1, (0, 1))):
        predict = p2.predictor(model, y, UNEVEN, "v", guidance, interval)
        for t in range(4):
            predict(constant(1), t)
    assert [len(labels) for _, _, labels, _ in seen] == [1, 2, 2, 1] + [1] * 4 + [2] * 4


def test_guided_moves_away_from_the_guide():
    """0.5 + 1.5 (1.0078125 - 0.5), which bf16 would round."""
    strong, seen = outputs(1.0078125)
    weak, seen_by_guide = outputs(0.5)
    x, t, y = constant(2), torch.tensor([3]), torch.tensor([7])
    out = p2.Guided(strong, weak, 1.5)(x, t, y)
    assert value_of(out) == 1.26171875 and out.dtype == torch.float32
    assert seen == seen_by_guide == [(x, [3], [7], False)]


# ------------------------------------------------------------------ samplers


def scripted(*x0):
    """predict(x, t) that returns the given x0 one after another and eps = 0.5; notes (x, t)."""
    seen, left = [], list(x0)

    def predict(x, t):
        seen.append((value_of(x), t))
        return constant(left.pop(0)), constant(0.5)

    return predict, seen


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_by_hand(eta):
    """From alpha_bar 0.36 to 0.64; the noise is 1. The end is x0 itself, and no noise is drawn for it."""
    predict, seen = scripted(0.1, 0.2)
    left = [constant(1)]
    result = p2.ddim(predict, constant(3), UNEVEN, [2, 1], eta, left.pop)
    sigma = eta * math.sqrt(0.36 / 0.64 * (1 - 0.36 / 0.64))
    x = 0.8 * 0.1 + math.sqrt(0.36 - sigma**2) * 0.5 + sigma
    assert seen == [(3, 2), (pytest.approx(x, rel=1e-6), 1)] and value_of(result) == pytest.approx(0.2)
    assert len(left) == (eta == 0)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_by_hand(variance):
    """From alpha_bar 0.36 to 0.64: alpha = 0.5625. The last step adds no noise."""
    predict, seen = scripted(0.1, 0.2)
    result = p2.ddpm(predict, constant(3), UNEVEN, [2, 1], lambda: constant(1), variance)
    mean = 0.8 * 0.4375 / 0.64 * 0.1 + 0.75 * 0.36 / 0.64 * 3
    sigma = math.sqrt(0.4375 if variance == "beta" else 0.4375 * 0.36 / 0.64)
    assert seen == [(3, 2), (pytest.approx(mean + sigma, rel=1e-6), 1)]
    assert value_of(result) == pytest.approx(0.2)


def test_ddim_with_eta_1_and_all_steps_is_ddpm():
    alpha_bar = p2.make_alpha_bar("cosine", 50)
    draws = torch.randn(50, 4, 3, 2, 2, dtype=torch.float64)

    def predict(x, t):
        x0 = torch.tanh(x + t / 50)
        return x0, (x - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()

    def run(sampler, *options):
        left = iter([*draws[1:], draws[0]])
        return sampler(predict, draws[0], alpha_bar, list(range(49, -1, -1)), *options, lambda: next(left))

    assert torch.allclose(run(p2.ddim, 1.0), run(p2.ddpm), atol=1e-10)


def test_dpm_solver_by_hand():
    """A step is exact where x0 is linear in lambda = log(a / s): its mean is then x0 half-way.

    The first step knows one x0 only, and is DDIM's: a' x0 + s' eps.
    """
    lambdas = [math.log(math.sqrt(bar / (1 - bar))) for bar in (0.9, 0.64, 0.36, 0.1)]
    predict, seen = scripted(lambdas[3], lambdas[2], lambdas[0])
    result = p2.dpm_solver(predict, constant(3), UNEVEN, [3, 2, 0])
    eps = (3 - math.sqrt(0.1) * lambdas[3]) / math.sqrt(0.9)
    first = 0.6 * lambdas[3] + 0.8 * eps
    half_way = (lambdas[0] + lambdas[2]) / 2
    eps = (first - 0.6 * half_way) / 0.8
    second = math.sqrt(0.9) * half_way + math.sqrt(0.1) * eps
    assert [t for _, t in seen] == [3, 2, 0]
    assert [x for x, _ in seen] == pytest.approx([3, first, second], rel=1e-5)
    assert value_of(result) == pytest.approx(lambdas[0])


@pytest.mark.parametrize("sampler, order", [(p2.ddim, 1), (p2.dpm_solver, 2)])
def test_order_of_convergence_on_a_gaussian(sampler, order):
    """Data N(m, c^2): the exact predictor is known; the flow keeps (x_t - a m) / sqrt(a^2 c^2 + s^2)."""
    alpha_bar = torch.sigmoid(torch.linspace(5, -5, 641, dtype=torch.float64))  # log-SNR is linear in t
    m, c = 0.3, 0.5
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
    for stride in (32, 16, 8):
        result = sampler(predict, x, alpha_bar, list(range(640, -1, -stride)))
        errors.append((result - exact(0)).abs().max().item())
    for big, small in zip(errors, errors[1:]):
        assert math.log2(big / small) == pytest.approx(order, abs=0.4)


def test_log_snr_times():
    """alpha_bar whose lambda, half the log-SNR, falls by 0.05 a step, from 6 to -6, or from 1.5 to -1.5."""
    long = torch.sigmoid(torch.linspace(12, -12, 241, dtype=torch.float64))
    assert p2.log_snr_times(long, 10, 20) == [240, 180, 160, 140, 120, 100, 80, 60, 40, 20]  # -4 is at 200
    short = torch.sigmoid(torch.linspace(3, -3, 61, dtype=torch.float64))
    assert p2.log_snr_times(short, 7, 0) == [60, 50, 40, 30, 20, 10, 0]
    assert [p2.log_snr_times(long, calls, 20) for calls in (1, 2)] == [[240], [240, 20]]
    assert p2.log_snr_times(short[:4], 30, 0) == [3, 2, 1, 0]  # more calls than times


# ------------------------------------------------------------------ networks


def fill(net):
    """The same weights on any machine, all of them large enough to be seen in the output."""
    rng = np.random.default_rng(0)
    for p in net.parameters():
        p.data.copy_(torch.from_numpy(rng.standard_normal(p.shape) * (p.numel() / len(p)) ** -0.5))
    return net.eval()


@torch.no_grad()
def test_unet_computes_what_it_always_did():
    """What the weights in .weights/ were trained for: the values are of the first version of this network."""
    net = fill(p2.UNet((32, 64)))
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 28, 28), np.float32))
    out = net(x, torch.tensor([20, 300]), torch.tensor([7, p2.NULL]))
    assert out.shape == x.shape and [out.mean().item(), out.std().item()] == pytest.approx(
        [0.1897, 1.7189], abs=2e-4
    )
    assert out[0, :, 3, 5].tolist() == pytest.approx([0.1999, 2.3162, -2.3660], abs=1e-3)
    assert out[1, :, 20, 11].tolist() == pytest.approx([2.2207, -2.2957, 1.5641], abs=1e-3)


@torch.no_grad()
def test_attention_against_torch_s_own():
    net = fill(p2.Attention(64))
    x = torch.randn(2, 64, 3, 5)
    q, k, v = net.qkv(net.norm(x)).flatten(2).view(2, 3, 2, 32, 15).transpose(3, 4).unbind(1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 64, 3, 5)
    assert torch.allclose(net(x), x + net.out(y), atol=1e-5)


@torch.no_grad()
def test_networks_start_as_nothing():
    """Blocks add nothing, the network predicts 0: training starts from there."""
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(p2.Attention(32)(x), x)
    assert torch.equal(p2.ResBlock(32, 32, 8, 0.0, True)(x, torch.randn(2, 8)), x)
    out = p2.UNet((32, 32))(torch.randn(2, 3, 28, 28), torch.tensor([3, 4]), torch.tensor([1, 2]))
    assert out.shape == (2, 3, 28, 28) and (out == 0).all()


@pytest.mark.parametrize(
    "options", [dict(channels=(32, 64, 64), patch=1, blocks=2), dict(channels=(64,), patch=4)]
)
@torch.no_grad()
def test_unet_of_other_shapes(options):
    net = fill(p2.UNet(**options))
    x, same = torch.randn(2, 3, 28, 28), torch.tensor([40, 40])
    outs = [net(x, same, torch.full((2,), y)) for y in (3, p2.NULL)]
    assert outs[0].shape == x.shape and not torch.allclose(*outs)
    assert not torch.allclose(net(x, same + 320, torch.tensor([3, 3])), outs[0])
    assert (
        len([m for m in net.modules() if isinstance(m, p2.ResBlock)])
        == {3: 17, 1: 5}[len(options["channels"])]
    )


def test_unet_s_own_settings():
    net = p2.UNet()
    assert sum(p.numel() for p in net.parameters()) == 3_022_604 and net.T == 400 and net.patch == 2
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_build_makes_the_network_of_the_options():
    args = p2.parse_args(["--channels", "32", "64", "--blocks", "2", "--dropout", "0.3", *SHORT])
    net = p2.build(args)
    assert net.T == 20 and [m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)] == [0.3] * 12
    assert net.stem.weight.shape[:2] == (32, 12) and net.stem.weight.is_contiguous()
    assert p2.build(p2.parse_args(["--patch", "4", *TINY])).stem.weight.shape[:2] == (32, 48)


@torch.no_grad()
def test_dropout_drops_in_training_alone():
    net = fill(p2.ResBlock(32, 32, 8, 0.5))
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    assert torch.equal(net(x, emb), net(x, emb))
    net.train()
    assert not torch.equal(net(x, emb), net(x, emb))


# ------------------------------------------------------------------ training


def test_learning_rate():
    """Half of it at step 100, all of it from 200 to 5,001, then as 1 / sqrt; no end is in sight."""
    args = p2.parse_args(["--lr", "1", *SHORT])
    for step, rate in ((1, 0.005), (100, 0.5), (200, 1), (300, 1), (5001, 1), (20001, 0.5), (45001, 1 / 3)):
        assert p2.learning_rate(args, step, 300) == pytest.approx(rate)
    args = p2.parse_args(["--lr", "4", "--lr-schedule", "linear", *SHORT])
    assert [p2.learning_rate(args, step, 4) for step in (1, 2, 4)] == [4, 3, 1]
    args = p2.parse_args(["--lr", "1", "--lr-schedule", "cosine", *SHORT])
    rates = [p2.learning_rate(args, step, 100) for step in (1, 6, 11, 56, 100)]
    assert rates == pytest.approx(
        [0, 0.5, 1, 0.5, math.sin(math.pi / 180) ** 2], abs=1e-9
    )  # 1/90 from the end
    args = p2.parse_args(["--lr", "1", "--lr-schedule", "constant", *SHORT])
    assert p2.learning_rate(args, 99, 100) == 1


def test_ema_averages_parameters_and_copies_buffers():
    model, ema = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    model.running_mean.fill_(7)
    for decay, step, kept in (
        (1.0, 1, 0), (1.0, 2, 0.5**17), (1.0, 100, 0.99**17), (0.9995, 100, 0.99**17), (0.9, 1000, 0.9),
        (0.0, 1000, 0),
    ):  # fmt: skip
        model.weight.data.fill_(3)
        ema.weight.data.fill_(1)
        p2.update_ema(ema, model, step, decay)
        assert ema.weight.item() == pytest.approx(kept * 1 + (1 - kept) * 3) and model.weight.item() == 3
    assert ema.running_mean.item() == 7
    ema.weight.data.fill_(1)
    p2.update_ema(ema, model, 1000)  # the default: no limit
    assert ema.weight.item() == pytest.approx(3 - 2 * 0.999**17)


class Two(torch.nn.Module):
    """A network of two weights."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """toy(*options) trains two weights on a loss with the gradient (3, 4) and returns what happened.

    Image k of 20 is 12 k everywhere, and shows the digit k % 10.
    """

    def train(*options, batch=4, network=Two, **more):
        calls = []

        def loss(net, *given):
            on = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            calls.append((net, *given, on))
            return (net.w * torch.tensor([3.0, 4.0])).sum()

        monkeypatch.setattr(p2, "build", lambda args: network())
        monkeypatch.setattr(p2, "diffusion_loss", loss)
        path = tmp_path / f"{len(os.listdir(tmp_path))}.pt"
        options = ["--ckpt", str(path), *SHORT, "--batch-size", str(batch), *options]
        args = p2.parse_args(options)
        vars(args).update(more)
        values = torch.arange(20, dtype=torch.uint8) * 12
        images = values.view(20, 1, 1, 1).expand(20, 3, 4, 4)
        net = p2.train(args, images, torch.arange(20) % 10)
        ckpt = torch.load(path, weights_only=True) if path.exists() else None
        log = path.with_suffix(".log.csv")
        rows = [line.split(",") for line in log.read_text().splitlines()] if log.exists() else None
        return argparse.Namespace(net=net, calls=calls, ckpt=ckpt, rows=rows)

    return train


def adamw(lr, steps, decay=0.0):
    """(weights, average) after AdamW steps along a constant gradient, which are the rate each."""
    w = average = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for step in range(1, steps + 1):
        rate = lr * step / 200
        w = w * (1 - rate * decay) - rate
        kept = (1 - 1 / step) ** 17
        average = kept * average + (1 - kept) * w
    return w.tolist(), average.tolist()


def test_step_by_hand(toy):
    """Gradient (3, 4): its norm 5 is clipped to 1, Adam's moments and the weights are known."""
    run = toy("--steps", "3", "--lr", "2", "--betas", "0.8", "0.9", "--weight-decay", "10")
    weights, average = adamw(2, 3, 10)
    assert run.ckpt["model"]["w"].tolist() == pytest.approx(weights, rel=1e-5)
    assert run.ckpt["ema"]["w"].tolist() == pytest.approx(average, rel=1e-5)
    assert weights != pytest.approx(average, rel=1e-4)
    assert run.net.w.tolist() == run.ckpt["ema"]["w"].tolist() and not run.net.training
    (state,) = run.ckpt["optim"]["state"].values()
    assert state["step"] == 3
    assert state["exp_avg"].tolist() == pytest.approx([(1 - 0.8**3) * 0.6, (1 - 0.8**3) * 0.8], rel=1e-5)
    assert state["exp_avg_sq"].tolist() == pytest.approx([(1 - 0.9**3) * 0.36, (1 - 0.9**3) * 0.64], rel=1e-5)
    (group,) = run.ckpt["optim"]["param_groups"]
    assert group["lr"] == pytest.approx(2 * 3 / 200) and group["fused"]
    names, row = run.rows
    w = [[2.0, -1.0], *(adamw(2, steps, 10)[0] for steps in (1, 2))]
    found = dict(zip(names, map(float, row)))
    assert found["step"] == 3 and found["gradient"] == 5  # before it is clipped
    assert found["loss"] == pytest.approx(sum(3 * a + 4 * b for a, b in w) / 3, abs=1e-4)
    assert len(run.calls) == 3 and run.calls[0][0] is not run.net


def test_options_of_the_step(toy):
    def moments(*options):
        (state,) = toy("--steps", "1", "--betas", "0.5", "0.5", *options).ckpt["optim"]["state"].values()
        return state["exp_avg"].tolist()

    assert moments("--clip", "0.5") == pytest.approx([0.15, 0.2])
    assert moments("--clip", "inf") == moments("--clip", "9") == [1.5, 2]
    adam = toy("--steps", "1", "--lr", "2", "--weight-decay", "1", "--optimizer", "adam")
    assert adam.ckpt["model"]["w"].tolist() == pytest.approx([1.99, -1.01 + 0.02 * 1])  # 0.8 - 1 < 0
    falling = toy("--steps", "4", "--lr", "0.1", "--lr-schedule", "linear")
    assert falling.ckpt["model"]["w"].tolist() == pytest.approx([1.75, -1.25])
    passes = toy("--epochs", "2", batch=8)
    assert passes.ckpt["step"] == 6  # 2 times 3 batches of 20 images


def test_ema_of_a_run(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(p2, "update_ema", lambda ema, model, *more: seen.append((ema, model, *more)))
    run = toy("--steps", "2", "--ema", "0.9")
    assert [more for _, _, *more in seen] == [[1, 0.9], [2, 0.9]]
    assert all(ema is run.net and model is run.calls[0][0] for ema, model, *_ in seen)


def test_what_the_loss_is_given(toy):
    _, x0, y, *rest = toy("--steps", "1", "--label-dropout", "0.25", batch=2000).calls[0]
    assert x0.shape == (2000, 3, 4, 4) and x0.dtype == torch.float32
    k = (x0[:, 0, 0, 0] + 1) * 127.5 / 12  # image k is 12 k / 127.5 - 1
    assert torch.allclose(k, k.round(), atol=1e-3) and k.round().unique().tolist() == list(range(20))
    dropped = y == p2.NULL
    assert torch.equal(y[~dropped], (k.round().long() % 10)[~dropped]) and y.dtype == torch.int64
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.05)
    alpha_bar, *rest = rest
    assert torch.equal(alpha_bar, p2.make_alpha_bar("cosine", 20)) and rest == ["v", 5.0, "stratified", False]
    options = ["--schedule", "linear", "--beta-end", "0.3", "--prediction", "eps", "--gamma", "3"]
    options += ["--t-sampling", "uniform", "--precision", "bf16", "--label-dropout", "0"]
    _, _, y, alpha_bar, *rest = toy("--steps", "1", *options, batch=50).calls[0]
    assert torch.equal(alpha_bar, p2.make_alpha_bar("linear", 20, 0.3)) and not (y == p2.NULL).any()
    assert rest == ["eps", 3.0, "uniform", True]


def test_seed_of_training(toy):
    def draws(seed):
        torch.manual_seed(1234 + len(seed))  # what happened before does not count
        return [(x0.tolist(), y.tolist()) for _, x0, y, *_ in toy("--steps", "2", "--seed", seed).calls]

    assert draws("3") == draws("3") != draws("40") and draws("5")[0] != draws("5")[1]


def test_several_processes_share_a_step(toy, monkeypatch):
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.w = model.w

    def one_step(args, steps, settings, data, parts):
        run = type("Run", (list,), {"record": lambda self, **values: None})([1])
        return run

    monkeypatch.setattr(p2, "Run", one_step)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapped)
    run = toy("--steps", "1", batch=6, world=2)
    assert isinstance(run.calls[0][0], Wrapped) and len(run.calls[0][1]) == 3
    assert isinstance(toy("--steps", "1", batch=6).calls[0][0], Two)


def test_weights_that_move(tmp_path):
    """In four steps all of the network learns, but not the digits that no image shows, nor NULL."""
    options = ["--steps", "4", "--lr", "1", "--label-dropout", "0", "--ckpt", str(tmp_path / "a.pt")]
    args = p2.parse_args([*TINY, *options])
    torch.manual_seed(0)
    before = p2.build(args).state_dict()
    p2.train(args, IMAGES, torch.arange(10) % 5)
    after = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    labels, before_labels = after.pop("label.weight"), before.pop("label.weight")
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []
    assert torch.equal(labels[5:], before_labels[5:]) and (labels[:5] != before_labels[:5]).any(1).all()


@pytest.mark.parametrize(
    "images, labels, what",
    [
        (torch.zeros(4, 3, 28, 28), torch.zeros(4).long(), "images: found torch.float32"),
        (torch.zeros(4, 28, 28, 3).byte(), torch.zeros(4).long(), "images: found"),
        (torch.zeros(0, 3, 28, 28).byte(), torch.zeros(0).long(), "images: found"),
        (torch.zeros(4, 3).byte(), torch.zeros(4).long(), "images: found"),
        (torch.zeros(4, 3, 0, 0).byte(), torch.zeros(4).long(), "images: found"),
        (torch.zeros(4, 3, 30, 30).byte(), torch.zeros(4).long(), "expected multiples of 4"),
        (torch.zeros(4, 3, 28, 28).byte(), torch.zeros(4), "labels: found torch.float32"),
        (torch.zeros(4, 3, 28, 28).byte(), torch.full((4,), 10), "labels: found"),
        (torch.zeros(4, 3, 28, 28).byte(), torch.zeros(5).long(), "labels: found"),
    ],
)
def test_tensors_that_cannot_be_trained_on(images, labels, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        p2.train(p2.parse_args([*TINY, "--ckpt", str(tmp_path / "a.pt")]), images, labels)


@pytest.mark.slow
def test_training_learns_the_digits(tmp_path):
    """The loss keeps falling on the built-in digits."""
    options = ["--steps", "200", "--channels", "32", "32", "--batch-size", "16"]
    p2.main(["--mode", "train", "--ckpt", str(tmp_path / "a.pt"), *options])
    log = torch.load(tmp_path / "a.pt", weights_only=True)["log"]
    loss = [row["loss"] for row in log]  # means of ten steps
    assert sum(loss[10:]) < 0.7 * sum(loss[:10])


# ------------------------------------------------------------------ noise, generate


def test_noise_depends_on_seed_and_key_alone():
    noise = p2.Noise([(3, 1), (0, 2)], (3, 4, 4), 5)
    generators = [np.random.default_rng([5, 3, 1]), np.random.default_rng([5, 0, 2])]
    for _ in range(2):
        expected = [torch.from_numpy(g.standard_normal((3, 4, 4), np.float32)) for g in generators]
        assert torch.equal(noise(), torch.stack(expected))
    assert p2.Noise([(3, 1)], (2,), 5, "meta")().device.type == "meta"


def test_to_uint8():
    result = p2.to_uint8(torch.tensor([-3, -1, -0.99, 0.5, 0.999, 1, 3]))
    assert result.dtype == torch.uint8 and result.tolist() == [0, 0, 1, 191, 255, 255, 255]


@pytest.fixture(scope="module")
def model():
    """(network, settings) as load_model gives them; some output is in the network."""
    args = p2.parse_args(TINY)
    return fill(p2.build(args)), argparse.Namespace(**vars(args) | {"size": 28})


def spied(monkeypatch, model, *arguments, **options):
    """What `generate` gives to `predictor` and to the sampler; the images are the noise."""
    seen = {}

    def predictor(*given):
        seen["predictor"] = given

    def sampler(name, predict, x, *rest):
        seen.update(sampler=name, x=x, rest=rest)
        return torch.full_like(x, 0.5)

    monkeypatch.setattr(p2, "predictor", predictor)
    for name in ("ddpm", "ddim", "dpm_solver"):
        monkeypatch.setattr(p2, name, lambda *given, name=name: sampler(name, *given))
    images = p2.generate(*model, *arguments, **options)
    assert images.dtype == torch.uint8 and (images == 191).all()
    return argparse.Namespace(**seen, shape=tuple(images.shape))


def test_generate_with_its_defaults(monkeypatch, model):
    seen = spied(monkeypatch, model, [3, 7])
    net, y, alpha_bar, *rest = seen.predictor
    assert net is model[0] and y.tolist() == [3, 7]
    assert torch.equal(alpha_bar, p2.make_alpha_bar("cosine", 20))
    assert rest == ["v", 2.0, [0.3, 0.95], False, True]
    assert seen.sampler == "dpm_solver" and seen.shape == (2, 3, 28, 28)
    generators = [np.random.default_rng([0, 3, 1]), np.random.default_rng([0, 7, 2])]
    expected = [torch.from_numpy(g.standard_normal((3, 28, 28), np.float32)) for g in generators]
    assert torch.equal(seen.x, torch.stack(expected))
    assert torch.equal(seen.rest[0], alpha_bar)
    assert seen.rest[1] == p2.log_snr_times(alpha_bar, 7, 2)  # 0.08 of 20 steps


def test_generate_with_other_values(monkeypatch, model):
    options = dict(guidance=0.5, guidance_interval=(0.1, 0.2), bf16=True, clamp=False)
    seen = spied(monkeypatch, model, [3], [9], 4, "ddim", 3, eta=0.7, **options)
    assert seen.predictor[3:] == ("v", 0.5, (0.1, 0.2), True, False)
    expected = np.random.default_rng([4, 3, 9]).standard_normal((3, 28, 28), np.float32)
    assert seen.sampler == "ddim" and torch.equal(seen.x[0], torch.from_numpy(expected))
    assert seen.rest[1:3] == ([19, 10, 0], 0.7)
    again = seen.rest[3]()
    assert again.shape == seen.x.shape and not torch.equal(again, seen.x)
    assert spied(monkeypatch, model, [3], sampler="ddim").rest[2] == 0.0
    seen = spied(monkeypatch, model, [3], sampler="ddpm", variance="beta")
    assert seen.sampler == "ddpm" and seen.rest[1] == list(range(19, -1, -1)) and seen.rest[3] == "beta"
    assert seen.rest[2]().shape == seen.x.shape
    assert spied(monkeypatch, model, [3], sampler="ddpm").rest[3] == "posterior"
    for last_time, last in ((0.5, 10), (1.0, 19), (0.0, 0)):
        assert spied(monkeypatch, model, [3], last_time=last_time).rest[1][-1] == last


def test_generate_uses_its_network(model):
    """Real samplers: another digit, number or seed is another image; no gradient is kept."""
    kinds = ([3], [1], 0), ([4], [1], 0), ([3], [2], 0), ([3], [1], 1)
    images = [p2.generate(*model, *kind, calls=2) for kind in kinds]
    assert all((image != images[0]).any() for image in images[1:])
    assert torch.equal(p2.generate(*model, torch.tensor([3]), np.array([1]), calls=2), images[0])


@pytest.mark.parametrize("options", [dict(), dict(sampler="ddpm"), dict(sampler="ddim", eta=0.5)])
def test_images_do_not_depend_on_their_neighbours(model, options):
    reference = p2.generate(*model, [5, 3, 5, 0], [1, 2, 3, 4], calls=4, **options).int()
    for i in ([0], [3, 1], [2, 2, 2]):
        digits, numbers = [[5, 3, 5, 0][j] for j in i], [[1, 2, 3, 4][j] for j in i]
        images = p2.generate(*model, digits, numbers, calls=4, **options).int()
        assert (images - reference[i]).abs().max() <= 1  # float32 sums may be ordered by the batch size


@pytest.mark.parametrize(
    "digits, options, expected",
    [
        ([3, 10], {}, "digits: found 10, expected whole numbers in 0 to 9"),
        ([-1], {}, "digits: found -1"),
        ([3.0], {}, "digits: found 3.0"),
        (["3"], {}, "digits: found '3'"),
        ([], {}, "found 0 digits"),
        ([3], {"numbers": [1, 2]}, "found 1 digits and 2 numbers, expected equally many"),
        ([3], {"numbers": [-1]}, "numbers: found -1"),
        ([3], {"numbers": [2**32]}, "numbers: found 4294967296"),
        ([3], {"seed": 2**32}, "seed: found 4294967296"),
        ([3], {"seed": -1}, "seed: found -1"),
        ([3], {"seed": 0.5}, "seed: found 0.5"),
        ([3], {"calls": 0}, "found 0, expected whole numbers in 1 to 20"),
        ([3], {"calls": 21}, "found 21, expected whole numbers in 1 to 20"),
        ([3], {"sampler": "ddim", "calls": 21}, "found 21"),
        ([3], {"sampler": "dpm"}, "expected one of dpm"),
    ],
)
def test_generate_refuses_what_it_cannot_do(model, digits, options, expected):
    with pytest.raises(ValueError, match=expected):
        p2.generate(*model, digits, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": -3.0},
        {"guidance": math.nan},
        {"guidance": "2"},
        {"last_time": 5.0},
        {"eta": 7.0},
        {"guidance_interval": [0.9, 0.3]},
        {"guidance_interval": 0.3},
    ],
)
def test_generate_refuses_values_out_of_range(options, model):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: found .*expected"):
        p2.generate(*model, [3], **options)


def test_no_guidance_without_a_null_class(model):
    settings = argparse.Namespace(**vars(model[1]) | {"label_dropout": 0.0})
    with pytest.raises(ValueError, match="use --guidance 0"):
        p2.generate(model[0], settings, [3], calls=1)
    assert p2.generate(model[0], settings, [3], calls=1, guidance=0).shape == (1, 3, 28, 28)


# ------------------------------------------------------------------ modes


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny network after four large steps."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    options = [*TINY, "--steps", "4", "--lr", "1", "--ckpt", str(path)]
    p2.train(p2.parse_args(options), IMAGES, torch.arange(10))
    return path


def sample(ckpt, out, *options):
    """name -> integer array of the files that --mode sample writes."""
    command = [
        "--mode",
        "sample",
        "--ckpt",
        str(ckpt),
        "--out",
        str(out),
        "--num",
        "2",
        "--sample-steps",
        "2",
    ]
    p2.main([*command, "--device", "cpu", "--precision", "float32", *options])
    return {name: np.array(Image.open(out / name)).astype(int) for name in sorted(os.listdir(out))}


def test_files_are_what_the_grader_reads(ckpt, tmp_path):
    """digit_classifier.py opens every entry, does not resize, and takes the first character as the label."""
    sample(ckpt, tmp_path / "out", "--num", "11", "--sample-steps", "1")
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == [f"{d}_{n:03d}.png" for d in range(10) for n in range(1, 12)]
    assert p2.parse_args(["--mode", "sample"]).num == 100
    for name in names[::7]:
        image = Image.open(tmp_path / "out" / name)
        assert image.mode == "RGB" and image.size == (28, 28) and image.format == "PNG"


def test_sample_makes_each_image_from_its_digit_and_number(ckpt, tmp_path):
    found = sample(ckpt, tmp_path / "a", "--seed", "3", "--guidance", "1", "--batch-size", "7")
    model, settings = p2.load_model(ckpt)
    for digit, number in ((0, 1), (3, 2), (9, 2)):
        image = p2.generate(model, settings, [digit], [number], 3, calls=2, guidance=1.0)[0]
        difference = found[f"{digit}_{number:03d}.png"] - image.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1
    args = p2.parse_args(["--mode", "sample", "--ckpt", str(ckpt), "--num", "1", "--sample-steps", "1"])
    for rank in (0, 1):  # two processes make half of them each
        args.rank, args.world, args.out = rank, 2, str(tmp_path / f"rank{rank}")
        p2.sample(args)
        assert os.listdir(args.out) and {int(name[0]) % 2 for name in os.listdir(args.out)} == {rank}


def test_what_the_command_line_tells_generate():
    options = ["--seed", "3", "--sampler", "ddim", "--eta", "0.5", "--guidance", "1", "--sample-steps", "9"]
    args = p2.parse_args(["--mode", "sample", *options, "--guidance-interval", "0.2", "0.4"])
    expected = dict(seed=3, sampler="ddim", eta=0.5, guidance=1.0, calls=9, guidance_interval=[0.2, 0.4])
    expected |= dict(last_time=0.08, variance="posterior", clamp=True, bf16=args.bf16)
    assert p2.sampling(args) == expected
    args = p2.parse_args(["--mode", "sample", "--last-time", "0.5"])
    assert p2.sampling(args)["last_time"] == 0.5


def test_guide(ckpt, tmp_path, error):
    """Autoguidance 1 is the network alone, 50 changes the digits; a guide that does not fit is refused."""

    def make(name, *options):
        command = [*SHORT, "--channels", "32", "--steps", "2", "--lr", "1", "--ckpt", str(tmp_path / name)]
        p2.train(p2.parse_args([*command, *options]), IMAGES, torch.arange(10))
        return ["--guide", str(tmp_path / name)]

    guide = make("guide.pt")
    plain = sample(ckpt, tmp_path / "plain", "--guidance", "1", "--last-time", "0.02")
    one = sample(ckpt, tmp_path / "one", *guide, "--autoguidance", "1")
    far = sample(ckpt, tmp_path / "far", *guide, "--autoguidance", "50")
    assert max(abs(one[name] - plain[name]).max() for name in plain) <= 1
    assert max(abs(far[name] - plain[name]).max() for name in plain) > 1
    command = ["--mode", "sample", "--ckpt", str(ckpt), "--out", str(tmp_path / "new"), "--device", "cpu"]

    def message(*options):
        return error(p2.main, [*command, *options])

    missing = message("--guide", str(tmp_path / "none.pt"))
    assert "--guide" in missing and "make one with" in missing
    assert "found size 28, T 40," in message(*make("other.pt", "--T", "40"))
    assert "null class False; expected" in message(*make("no_null.pt", "--label-dropout", "0"))
    args = p2.parse_args([*command, *guide])  # a guide brings the settings that are good with it
    found = args.guidance, args.sample_steps, args.last_time, args.autoguidance
    assert found == (1, 10, 0.02, 1.4)


def test_grid(ckpt, tmp_path, monkeypatch, capsys):
    """What stands in the figures; the states are those of the first digit 0, each before a step."""
    import common

    grids = {}
    monkeypatch.setattr(common, "save_grid", lambda path, *given, **_: grids.update({path.name: given}))
    monkeypatch.setattr(common, "digit_classifier", lambda *_: (None, None, "its own"))
    monkeypatch.setattr(common, "classify", lambda _, images: torch.arange(len(images)) // 2 % 3)
    command = ["--mode", "grid", "--ckpt", str(ckpt), "--out", str(tmp_path / "figures"), "--num", "2"]
    p2.main([*command, "--sample-steps", "4", "--device", "cpu", "--precision", "float32"])
    assert os.listdir(tmp_path / "figures") == ["training.png"]
    model, settings = p2.load_model(ckpt)
    rows = grids["digits.png"][0]
    expected = p2.generate(model, settings, [2, 9], [3, 10], calls=4).int()
    assert rows.shape == (10, 10, 3, 28, 28)
    assert (rows[[2, 9], [2, 9]].int() - expected).abs().max() <= 1
    (states,), _, titles, _ = grids["reverse.png"]
    assert titles == ["after 0", "after 1", "after 2", "after 2", "after 3", "after 4"]
    start = p2.to_uint8(p2.Noise([(0, 1)], (3, 28, 28))())[0]
    assert torch.equal(states[0], start) and torch.equal(states[-1], rows[0, 0])
    assert not torch.equal(states[1], states[0])
    rows, names, *_ = grids["guidance.png"]
    assert names == ["w = 0.0", "w = 0.5", "w = 2.0"] and rows.shape == (3, 10, 3, 28, 28)
    assert not torch.equal(rows[0], rows[2])
    text = capsys.readouterr().out
    assert "w = 0.5: accuracy 0.300 of 20 digits" in text  # 0 1 2 0 1 2 ... for 0 1 2 3 4 5 ...
    args = p2.parse_args([*command, "--sample-steps", "4", "--states", "0", "5"])
    with pytest.raises(ValueError, match="--states 5: expected at most the sampler's 4 steps"):
        p2.grid(args)


@pytest.mark.slow
def test_grid_and_eval_with_real_figures(ckpt, tmp_path, capsys):
    figures = tmp_path / "figures"
    p2.main(["--mode", "grid", "--ckpt", str(ckpt), "--out", str(figures), "--sample-steps", "7"])
    names = ["digits.png", "guidance.png", "reverse.png", "training.png"]
    assert sorted(os.listdir(figures)) == names
    sizes = {name: Image.open(figures / name).size for name in names}
    assert all(min(size) > 100 for size in sizes.values())
    assert sizes["reverse.png"][0] > 3 * sizes["reverse.png"][1]
    sample(ckpt, tmp_path / "digits")
    capsys.readouterr()
    score = tmp_path / "score.json"
    p2.main(["--mode", "eval", "--input", str(tmp_path / "digits"), "--ckpt", str(ckpt), "--out", str(score)])
    printed = capsys.readouterr().out
    assert re.search(r"acc = [\d.]+ \(correct/total = \d+/20\)", printed)
    assert json.loads(score.read_text())["n"] == 20


# ------------------------------------------------------------------ command line


def test_every_command_of_the_readme_is_accepted():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3? p2_diffusion.py (--mode .*?)(?:  +#.*)?$", text, re.M)
    for command in commands:
        p2.parse_args(command.split())
    assert commands


@pytest.mark.parametrize(
    "arguments",
    [
        "--steps 0", "--lr -1", "--lr nan", "--channels 33", "--T 1", "--clip -1", "--stepz 5", "--mode fly",
        "--epochs 2 --steps 3", "--width 64", "--beta-end 0.1", "--schedule linear --mode sample",
        "--guidance x --mode sample", "--num 0 --mode sample", "--sample-steps 0 --mode sample",
        "--sample-steps 9 --mode sample --sampler ddpm", "--eta 0.5 --mode sample",
        "--last-time 0.1 --mode sample --sampler ddim", "--guidance-interval 0.9 0.3 --mode sample",
        "--guidance-interval 0.3 1.1 --mode sample", "--autoguidance 50 --mode sample",
        "--guide a.pt --mode eval", "--states 1 --mode sample",
    ],
)  # fmt: skip
def test_wrong_options(arguments):
    """The first option is wrong, or has no use with what follows."""
    with pytest.raises(ValueError, match=arguments.split()[0]):
        p2.parse_args(arguments.split())
