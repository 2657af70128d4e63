"""p1_gan.py: each line of its steps, losses and loop against values worked out by hand; networks, modes."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import p1_gan as p1

slow = pytest.mark.slow
FLAT = 12288**0.5  # |gradient| of an image's mean is 1 / this


def settings(method, *options, **changes):
    args = p1.parse_args(["--method", method, "--device", "cpu", "--precision", "float32", *options])
    vars(args).update(changes)
    return args


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


def watch(net, *arguments):
    """Keeps what `net` was given, and how it was called."""
    net.given.append(arguments)
    net.gradients.append(torch.is_grad_enabled())
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    net.bf16.append(bf16)


class G(nn.Module):
    """Images of one colour: w, plus `noise` of the latent and `digit` of the label."""

    def __init__(self, size=64, noise=0.0, digit=0.0, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4))
        self.register_buffer("gain", torch.ones(()))
        self.size, self.noise, self.digit, self.dtype = size, noise, digit, dtype
        self.given, self.gradients, self.bf16 = [], [], []

    def logits(self, z):
        return (self.w + self.noise * z[:, :3, None, None]).expand(-1, 3, self.size, self.size)

    def forward(self, z, y=None):
        watch(self, z, y)
        x = self.gain * self.logits(z)
        if y is not None:
            x = x + self.digit * y[:, None, None, None]
        return x.to(self.dtype)


class D(nn.Module):
    """Logit: v times the image's mean. Digit: k, with certainty, for images of the byte 25 k."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.tensor(0.5))
        self.given, self.gradients, self.bf16 = [], [], []

    def forward(self, x):
        watch(self, x.detach())
        digits = digits_in(x).clamp(0, 9)
        return self.v * x.mean((1, 2, 3)), 20.0 * F.one_hot(digits, 10)


def digits_in(x):
    """The k of images (B, 3, H, W) in [-1, 1] of the byte 25 k."""
    return ((x.detach().float().mean((1, 2, 3)) + 1) * 127.5 / 25).round().long()


def images_of(method, n=8):
    """Random images and labels that `train` takes."""
    size = 28 if method == "acgan" else 64
    images = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0))
    return images.byte(), torch.arange(n) % 10


def even(byte, n=8):
    return torch.full((n, 3, 64, 64), byte, dtype=torch.uint8)


def of_digits(n=40):
    """Images of the byte 25 k with their digits k."""
    labels = torch.arange(n) % 10
    return (25 * labels).byte().view(-1, 1, 1, 1).expand(-1, 3, 28, 28).contiguous(), labels


def step_d(args, images, labels=None, progress=0.0, g=None, d=None):
    """One step of D with SGD, rate 0.1."""
    g = g or G(images.shape[3])
    d = d or D()
    values = p1.d_step(args, g, d, torch.optim.SGD(d.parameters(), 0.1), images, labels, progress)
    return g, d, values


def step_g(args, progress=0.0, g=None, d=None):
    g = g or G()
    d = d or D()
    return g, d, p1.g_step(args, g, d, torch.optim.SGD(g.parameters(), 0.1), progress)


# ---------------- D step ----------------

PENALTY = 0.5 / FLAT - 1
# Real images are -0.6 everywhere, generated ones w = 0.4; v = 0.5. Loss, d_real, d_fake, gradient of v:
D_STEPS = {
    "dcgan": (
        softplus(0.3) + softplus(0.2),
        sigmoid(-0.3),
        sigmoid(0.2),
        0.6 * sigmoid(0.3) + 0.4 * sigmoid(0.2),
    ),
    "sngan": (1.3 + 1.2, -0.3, 0.2, 0.6 + 0.4),
    "wgangp": (0.2 + 0.3 + 10 * PENALTY**2, -0.3, 0.2, 0.4 + 0.6 + 20 * PENALTY / FLAT),
}


@pytest.mark.parametrize("method", D_STEPS)
def test_d_step(method):
    loss, real, fake, gradient = D_STEPS[method]
    g, d, values = step_d(settings(method, diffaugment="none"), even(51))
    found = {name: value.item() for name, value in values.items()}
    expected = {"d_loss": loss, "d_real": real, "d_fake": fake, "d_gradient": abs(gradient)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert d.v.item() == pytest.approx(0.5 - 0.1 * gradient, rel=1e-5)
    assert g.w.item() == pytest.approx(0.4) and g.w.grad is None
    assert g.gradients == [False] and all(d.gradients)


def test_label_smoothing_is_of_real_images():
    _, d, values = step_d(settings("dcgan", label_smoothing=0.1), even(51))
    assert values["d_loss"].item() == pytest.approx(softplus(-0.3) + 0.9 * 0.3 + softplus(0.2), rel=1e-5)
    gradient = -0.6 * (sigmoid(-0.3) - 0.9) + 0.4 * sigmoid(0.2)
    assert d.v.item() == pytest.approx(0.5 - 0.1 * gradient, rel=1e-5)


@pytest.mark.parametrize("report, size", [(None, 28), ("2021", 64)])
def test_d_step_of_digits(report, size):
    """The digit of real images counts, and with --report that of generated ones; D reads 7 in all of G's."""
    images, labels = of_digits()
    args = settings("acgan", report=report, loss="hinge", diffaugment="none", batch_size=16)
    losses = []
    for shift in (0, 1):  # the second with wrong labels
        torch.manual_seed(0)
        g, d, values = step_d(args, images, (labels + shift) % 10)
        y = g.given[0][1]
        assert torch.equal(y, (digits_in(d.given[0][0]) + shift) % 10) and len(y.unique()) > 5
        hinge = (1 - 0.5 * d.given[0][0].mean((1, 2, 3))).mean().item() + 1.2
        losses.append(values["d_loss"].item() - hinge)
        if report:
            losses[-1] -= 20 * (y != 7).float().mean().item()
    assert losses == pytest.approx([0, 20], abs=1e-4)


def test_faces_have_no_digits():
    """Labels are not looked at, and neither are the digit logits."""
    args = settings("dcgan", batch_size=16)
    g, _, values = step_d(args, even(51), torch.full((8,), 99))
    assert g.given[0][1] is None and values["d_loss"].item() == pytest.approx(D_STEPS["dcgan"][0], rel=1e-5)
    g, _, values = step_g(args)
    assert g.given[0][1] is None and values["g_loss"].item() == pytest.approx(softplus(-0.2), rel=1e-5)


def test_real_images_are_drawn_from_all():
    images = even(0, 40) + (6 * torch.arange(40)).byte().view(-1, 1, 1, 1)
    seen = []
    for _ in range(4):
        _, d, _ = step_d(settings("dcgan", batch_size=32), images)
        assert d.given[0][0].shape == d.given[1][0].shape == (32, 3, 64, 64)
        seen += [round((x.mean().item() + 1) * 127.5 / 6, 3) for x in d.given[0][0]]
    assert {*seen} <= {*range(40)} and len({*seen}) > 30
    _, d, _ = step_d(settings("dcgan", batch_size=32, world=1), images)
    assert len(d.given[0][0]) == 32


@pytest.mark.parametrize("step", [step_d, step_g])
def test_latents_of_a_step_are_new_and_normal(step):
    args = settings("dcgan", batch_size=64)
    g = G()
    for _ in range(2):
        if step is step_d:
            step(args, even(51), g=g)
        else:
            step(args, g=g)
    first, second = (z for z, _ in g.given)
    assert first.shape == (64, 100) and not torch.equal(first, second)
    assert abs(first.mean().item()) < 0.05 and first.std().item() == pytest.approx(1, abs=0.05)


def test_faces_are_mirrored_at_random():
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    images[..., :32] = 255  # bright on the left
    images[:, :, :32] //= 2  # and at the bottom
    for flip in (True, False):
        _, d, _ = step_d(settings("dcgan", flip=flip, batch_size=64), images)
        x = d.given[0][0]
        left = x[:, 0, 63, 0]
        assert 20 < (left == 1).sum() < 44 if flip else (left == 1).all()
        assert torch.equal(left == 1, x[:, 2, 63, 63] == -1)
        assert (x[:, :, 0].amax(2) < 0.1).all()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method, penalties", [("sngan", 0), ("wgangp", 1)])
def test_precision(method, penalties, bf16):
    """bf16 in G and D, in both steps; D's images, and all of the penalty, are float32."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    args = settings(method, bf16=bf16, batch_size=4)
    g, d, values = step_d(args, even(51), g=G(dtype=dtype))
    assert g.bf16 == [bf16] and d.bf16 == [bf16, bf16] + [False] * penalties
    g, other, more = step_g(args, g=G(dtype=dtype))
    assert g.bf16 == other.bf16 == [bf16]
    assert {x.dtype for (x,) in d.given + other.given} == {torch.float32}
    assert {value.dtype for value in {**values, **more}.values()} == {torch.float32}


class Counted(nn.Module):
    """A parametrization that counts its uses."""

    uses = 0

    def forward(self, x):
        self.uses += 1
        return x


def test_spectral_norm_is_computed_once_for_both_calls_of_d():
    d = D()
    count = Counted()
    nn.utils.parametrize.register_parametrization(d, "v", count)
    count.uses = 0
    step_d(settings("sngan"), even(51), d=d)
    assert count.uses == 1


def test_d_sees_real_and_generated_images_augmented_alike(monkeypatch):
    moved = []
    monkeypatch.setattr(p1, "translate", lambda x: moved.append(x) or x + 5)
    for kind, count in (("translation", 3), ("none", 0)):
        moved.clear()
        args = settings("sngan", diffaugment=kind, batch_size=6, instance_noise=0.2)
        _, d, _ = step_d(args, even(127))
        _, other, _ = step_g(args)
        seen = [x for (x,) in d.given + other.given]
        assert len(moved) == count and all((x.mean() > 4) == (kind == "translation") for x in seen)
        assert all(x.std() > 0.1 for x in moved)  # noise comes first


def test_instance_noise_decays_with_progress_in_both_steps():
    for progress, sigma in ((0.0, 0.4), (0.75, 0.1), (1.0, 0.0)):
        args = settings("dcgan", instance_noise=0.4)
        _, d, _ = step_d(args, even(127), progress=progress)
        _, other, _ = step_g(args, progress)
        noise = [x.std().item() for (x,) in d.given + other.given]
        assert noise == pytest.approx([sigma] * 3, rel=0.02, abs=1e-6)


def test_translation():
    """Each image is its own shift by up to an eighth, with zeros at the border; the gradient goes back."""
    torch.manual_seed(0)
    x = torch.rand(300, 2, 16, 16, dtype=torch.float64).requires_grad_()
    y = p1.translate(x)
    shifts = set()
    for a, b in zip(x.detach(), y.detach()):
        padded = F.pad(a, (2, 2, 2, 2))
        every = [(dy, dx) for dy in range(5) for dx in range(5)]
        (found,) = [(dy, dx) for dy, dx in every if torch.equal(padded[:, dy : dy + 16, dx : dx + 16], b)]
        shifts.add(found)
    assert y.shape == x.shape and len(shifts) == 25
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient[:, :, 2:14, 2:14] == 1).all() and set(gradient.unique().tolist()) == {0, 1}


# ---------------- G step ----------------

G_STEPS = {  # loss, gradient of w
    "dcgan": (softplus(-0.2), -0.5 * sigmoid(-0.2)),
    "sngan": (-0.2, -0.5),
    "wgangp": (-0.2, -0.5),
}


@pytest.mark.parametrize("method", G_STEPS)
def test_g_step(method):
    loss, gradient = G_STEPS[method]
    g, d, values = step_g(settings(method, diffaugment="none"))
    found = {name: value.item() for name, value in values.items()}
    assert found == pytest.approx({"g_loss": loss, "g_gradient": -gradient}, rel=1e-5)
    assert g.w.item() == pytest.approx(0.4 - 0.1 * gradient, rel=1e-5)
    assert d.v.item() == 0.5 and d.v.grad is None


@pytest.mark.parametrize("progress, weight", [(0.0, 1), (0.5, 1 + 29 / 8), (1.0, 30)])
def test_g_step_of_digits(progress, weight):
    """G is asked for random digits; a wrong one costs more and more, up to --digit-weight."""
    args = settings("acgan", diffaugment="none", batch_size=64)
    g, d, values = step_g(args, progress)  # D reads 7 in all
    y = g.given[0][1]
    assert y.shape == (64,) and y.dtype == torch.int64 and set(y.tolist()) == {*range(10)}
    wrong = (y != 7).float().mean().item()
    assert values["g_loss"].item() == pytest.approx(-0.2 + weight * 20 * wrong, rel=1e-5)
    right = G(digit=25 / 127.5)
    right.w.data.fill_(-1.0)  # draws the digit that it is asked for
    _, d, values = step_g(args, progress, g=right)
    assert values["g_loss"].item() == pytest.approx(-0.5 * d.given[0][0].mean().item(), abs=1e-4)


def test_update():
    """One plain step on the parameters of the net alone, by the gradient of this loss alone."""
    net = nn.Linear(2, 1, bias=False)
    other = nn.Parameter(torch.ones(()))
    net.weight.data.fill_(1.0)
    optim = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        before = net.weight.detach().clone()
        loss = other * net(torch.tensor([30.0, 40.0])).sum()
        norm = p1.update(settings("dcgan"), net, optim, loss)
        assert norm.item() == pytest.approx(50) and other.grad is None
        assert torch.allclose(net.weight, before - torch.tensor([[3.0, 4.0]]))


def test_gradients_and_batches_are_shared_by_processes(monkeypatch):
    """Here each of four processes has the same gradient; their mean is that of one."""
    calls = []
    monkeypatch.setattr(p1.dist, "all_reduce", lambda x: calls.append(x.clone()) or x.mul_(4))
    args = settings("dcgan", world=4, batch_size=32)
    _, d, values = step_d(args, even(51))
    _, other, _ = step_g(args)
    assert [len(x) for (x,) in d.given + other.given] == [8, 8, 8]
    gradient = D_STEPS["dcgan"][3]
    assert values["d_gradient"].item() == pytest.approx(abs(gradient), rel=1e-5)
    assert d.v.item() == pytest.approx(0.5 - 0.1 * gradient, rel=1e-5)
    assert [x.shape for x in calls] == [(), ()] and calls[0].item() == pytest.approx(gradient / 4, rel=1e-5)


# ---------------- losses ----------------


def test_losses():
    real = torch.tensor([2.0, -1.0])
    fake = torch.tensor([-3.0, 1.0])
    fakes = (softplus(-3) + softplus(1)) / 2
    found = {
        "bce": p1.d_loss("bce", real, fake),
        "smooth": p1.d_loss("bce", real, fake, 0.1),
        "wasserstein": p1.d_loss("wasserstein", real, fake),
        "hinge": p1.d_loss("hinge", real, fake),
    }
    expected = {
        "bce": (softplus(-2) + softplus(1)) / 2 + fakes,
        "smooth": (softplus(-2) + 0.2 + softplus(1) - 0.1) / 2 + fakes,
        "wasserstein": -1 - 0.5,
        "hinge": (0 + 2) / 2 + (0 + 2) / 2,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)
    assert p1.g_loss("bce", fake).item() == pytest.approx((softplus(3) + softplus(-1)) / 2, rel=1e-5)
    assert p1.g_loss("hinge", fake).item() == p1.g_loss("wasserstein", fake).item() == 1


def test_gradient_penalty_of_a_linear_critic():
    """(|s w| - 1)^2 for the critic s w.x, in float32 inside autocast; differentiable in s."""
    torch.manual_seed(0)
    w = torch.randn(192) / 4
    s = torch.ones((), requires_grad=True)
    seen = []

    def critic(x):
        seen.append(x)
        return s * (x.flatten(1) @ w)

    with torch.autocast("cpu", torch.bfloat16):
        penalty = p1.gradient_penalty(critic, torch.ones(5, 3, 8, 8).double(), torch.zeros(5, 3, 8, 8))
    norm = w.norm().item()
    assert penalty.dtype == seen[0].dtype == torch.float32
    assert penalty.item() == pytest.approx((norm - 1) ** 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, s)
    assert gradient.item() == pytest.approx(2 * (norm - 1) * norm, rel=1e-4)


def test_gradient_penalty_is_the_mean_over_images():
    """For the critic sum(x^2) / 2 the gradient is x, which lies on the line from generated to real."""
    torch.manual_seed(0)
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().flatten(1).sum(1) / 2

    penalty = p1.gradient_penalty(critic, torch.full((2000, 1, 2, 2), 2.0), torch.full((2000, 1, 2, 2), -0.5))
    x = seen[0]
    t = (x[:, 0, 0, 0] + 0.5) / 2.5
    assert torch.equal(x, x[:, :, :1, :1].expand_as(x))  # one t for each image
    assert t.min() >= 0 and t.max() <= 1 and t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert t.std().item() == pytest.approx(12**-0.5, abs=0.02)
    norms = x.flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx((norms - 1).square().mean().item(), rel=1e-5)


# ---------------- training loop ----------------


def test_rate():
    assert [p1.rate("none", p) for p in (0, 0.9)] == [1, 1]
    assert [p1.rate("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    rates = [p1.rate("thirds", epoch / 120) for epoch in (0, 39, 40, 79, 80, 119)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("step, decay, weight", [(1, 0.9, 1), (11, 0.9, 0.5), (10**6, 0.9, 0.1), (5, 0.0, 1)])
def test_ema(step, decay, weight):
    """The share of the new weights; the buffers are copied."""
    average = nn.BatchNorm1d(3)
    model = nn.BatchNorm1d(3)
    average.weight.data.fill_(2.0)
    average.bias.data.fill_(7.0)
    model.running_mean.fill_(5.0)
    p1.update_ema(average, model, step, decay)
    assert torch.allclose(average.weight, torch.full((3,), 2.0 - weight))
    assert torch.allclose(average.bias, torch.full((3,), 7.0 - 7 * weight))
    assert torch.equal(average.running_mean, model.running_mean)
    assert torch.equal(model.weight, torch.ones(3))


def test_gain():
    """Two images of +-a and +-b: tanh(gain x) has the deviations sqrt(2) tanh(gain a) and b."""
    logits = torch.tensor([[0.5, 1.5], [-0.5, -1.5]])
    for gain in (0.13, 1.4, 3.7):
        spread = (math.tanh(gain * 0.5) + math.tanh(gain * 1.5)) / 2**0.5
        assert p1.find_gain(logits, spread) == pytest.approx(gain, abs=6e-4)
    assert p1.find_gain(logits, 2.0) == pytest.approx(4, abs=1e-3)  # out of reach
    assert p1.find_gain(logits, 0.0) == pytest.approx(0.1, abs=1e-3)


class Normed(nn.Module):
    """BatchNorm of the latent; keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("gain", torch.ones(()))
        self.given = []

    def logits(self, z, y=None):
        assert self.training and not torch.is_grad_enabled()
        self.given.append((z, y))
        return self.norm(2 * z[:, :3, None, None])

    forward = logits


@pytest.mark.parametrize("method", ["sngan", "acgan"])
def test_recalibration(method, monkeypatch):
    """Statistics of the ten batches alone; faces get the gain too; training's random numbers stay."""
    monkeypatch.setattr(p1, "find_gain", lambda logits, spread: len(logits) * spread)
    found = []
    for seed in (3, 3, 4):
        ema = Normed().eval()
        ema.norm.running_mean.fill_(9.0)
        ema.norm.num_batches_tracked.fill_(50)
        before = torch.get_rng_state()
        p1.recalibrate(settings(method, seed=seed), ema, 0.002)
        assert torch.equal(before, torch.get_rng_state()) and not ema.training
        z = torch.cat([z for z, _ in ema.given])
        assert len(ema.given) == 10 and z.shape == (1000, 100) and len(z[:, 0].unique()) > 990
        assert abs(z.mean().item()) < 0.02 and z.std().item() == pytest.approx(1, abs=0.02)
        assert torch.allclose(ema.norm.running_mean, 2 * z[:, :3].mean(0), atol=1e-5)
        variance = torch.stack([(2 * z[:, :3]).var(0) for z, _ in ema.given]).mean(0)
        assert torch.allclose(ema.norm.running_var, variance, rtol=1e-4)
        assert ema.gain.item() == pytest.approx(2 if method == "sngan" else 1)
        if method == "acgan":
            y = torch.cat([y for _, y in ema.given])
            assert y.shape == (1000,) and set(y.tolist()) == {*range(10)}
            z = torch.cat([z, y[:, None].float()], 1)
        found.append(z)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", ["sngan", "acgan"])
def test_recalibration_on_another_device(method, monkeypatch):
    monkeypatch.setattr(p1, "find_gain", lambda logits, spread: 1.0)
    devices = []

    class Elsewhere(Normed):
        def logits(self, z, y=None):
            devices.extend(x.device.type for x in (z, y) if x is not None)
            return z

        forward = logits

    p1.recalibrate(settings(method, device=torch.device("meta")), Elsewhere(), 0.5)
    assert {*devices} == {"meta"}


def test_without_an_average_the_generator_stays_as_it_is():
    ema = Normed()
    p1.recalibrate(settings("dcgan", ema=0.0), ema, 0.5)
    assert ema.given == [] and ema.gain == 1


class Run:
    """In the place of p1.Run: `steps` steps, and what was recorded."""

    steps = 0
    events = []

    def __init__(self, args, steps, settings, data, parts, before_save):
        self.events.steps = steps
        self.events.given = data

    def __iter__(self):
        return iter(range(1, self.steps + 1))

    def record(self, **values):
        self.events.append(("record", *values))


def loop(monkeypatch, steps, args, images, labels=None):
    """What `train` does in so many steps: a list of events. The steps themselves do nothing."""
    nets = []

    class Events(list):
        pass

    def build(args):
        nets.append((G(), D(), torch.initial_seed()))
        return nets[-1][:2]

    def d_step(args, g, d, optim, images, labels, progress):
        assert (g, d) == nets[0][:2] and optim.param_groups[0]["params"] == [d.v]
        events.append(("D", progress, optim.param_groups[0]["lr"]))
        events.optim_d = optim
        events.data = images, labels
        return {"d": 0}

    def g_step(args, g, d, optim, progress):
        assert (g, d) == nets[0][:2] and optim.param_groups[0]["params"] == [g.w]
        events.append(("G", progress, optim.param_groups[0]["lr"]))
        events.optim_g = optim
        return {"g": 0}

    def update_ema(ema, model, step, decay):
        assert ema is nets[1][0] and model is nets[0][0] and not ema.training
        events.append(("EMA", step, decay))

    events = Events()
    monkeypatch.setattr(Run, "steps", steps)
    monkeypatch.setattr(Run, "events", events)
    replaced = dict(Run=Run, build=build, d_step=d_step, g_step=g_step, update_ema=update_ema)
    replaced["recalibrate"] = lambda args, ema, spread: events.append(("recalibrate", spread))
    replaced["save_picture"] = lambda args, ema, step: events.append(("picture", step))
    with monkeypatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(p1, name, value)
        events.ema = p1.train(args, images, labels)
    assert events.ema is nets[1][0]
    assert [seed for _, _, seed in nets] == [args.seed] * 2
    return events


def approx(events):
    return [tuple(pytest.approx(x) if isinstance(x, float) else x for x in event) for event in events]


def test_order_rates_and_log_of_training(monkeypatch):
    """Two updates of D, then two of G and one of the average; the log has what a step did, no more."""
    options = "--lr 0.8 --lr-d 0.4 --n-critic 2 --g-updates 2 --decay linear --ema 0.9 --steps 4 --seed 5"
    images = even(0)
    images[1::2] = 255  # the deviation of four of 1 and four of -1 is sqrt(8 / 7)
    events = loop(monkeypatch, 4, settings("sngan", *options.split()), images)
    assert events == approx(
        [
            ("D", 0.0, 0.4),
            ("record", "d"),
            ("D", 0.25, 0.3),
            ("G", 0.25, 0.6),
            ("G", 0.25, 0.6),
            ("EMA", 1, 0.9),
            ("record", "d", "g"),
            ("D", 0.5, 0.2),
            ("record", "d"),
            ("D", 0.75, 0.1),
            ("G", 0.75, 0.2),
            ("G", 0.75, 0.2),
            ("EMA", 2, 0.9),
            ("record", "d", "g"),
            ("recalibrate", (8 / 7) ** 0.5),
            ("picture", 4),
        ]
    )


def test_optimisers(monkeypatch):
    options = ["--betas", "0.1", "0.2", "--weight-decay", "0.4"]
    events = loop(monkeypatch, 1, settings("dcgan", *options), even(0))
    for optim in (events.optim_g, events.optim_d):
        group = optim.param_groups[0]
        assert type(optim) is torch.optim.AdamW
        assert ([*group["betas"]], group["weight_decay"]) == ([0.1, 0.2], 0.4)


def test_pictures_of_the_first_process(monkeypatch):
    for rank, steps in ((0, [500, 1000, 1200]), (1, [])):
        events = loop(monkeypatch, 1200, settings("dcgan", "--steps", "1200", rank=rank), even(0))
        assert [event[1] for event in events if event[0] == "picture"] == steps


def test_epochs_round_up_to_whole_batches(monkeypatch):
    """Ten images in batches of four are three steps; the last of six begins at 5/6."""
    args = settings("dcgan", "--epochs", "2", "--batch-size", "4")
    events = loop(monkeypatch, 6, args, even(0, 10))
    assert [event[1] for event in events if event[0] == "D"][-1] == pytest.approx(5 / 6)
    assert events[-1] == ("picture", 6) and events.steps == 6


def test_contrast_is_that_of_about_a_thousand_images(monkeypatch):
    images = even(0, 2000)
    images[1::2] = 255  # every second is left out
    assert loop(monkeypatch, 1, settings("dcgan", steps=1), images)[-2] == ("recalibrate", 0.0)


def test_images_and_labels_go_to_the_device_and_into_the_checkpoint(monkeypatch):
    images, labels = images_of("acgan")
    args = settings("acgan", device=torch.device("meta"))
    events = loop(monkeypatch, 1, args, images, labels)
    assert {x.device.type for x in events.data} == {"meta"}
    assert events.given[0] is images and events.given[1] is labels
    faces = even(0)
    events = loop(monkeypatch, 1, settings("dcgan"), faces)
    assert events.data[1] is None and len(events.given) == 1 and events.given[0] is faces


@pytest.fixture
def tiny(monkeypatch):
    """Networks that train and draw in no time."""

    def build(args):
        size = 28 if args.method == "acgan" else 64
        return G(size, noise=0.3, digit=0.05), D()

    monkeypatch.setattr(p1, "build", build)
    monkeypatch.setattr(p1, "recalibrate", lambda args, ema, spread: ema.gain.fill_(0.9))


def train(path, method, steps, *options):
    """Trains on random images; returns the checkpoint."""
    arguments = ["--steps", str(steps), "--ckpt", str(path), "--batch-size", "4", *options]
    p1.train(settings(method, *arguments), *images_of(method))
    return torch.load(path, weights_only=True)


def test_first_step_of_adamw(tiny, tmp_path):
    """By lr against the sign of the gradient, after the weights shrank; G's step follows D's. With an
    average it begins where G begins."""
    options = ["--lr", "0.01", "--lr-d", "0.02", "--weight-decay", "0.5", "--decay", "none"]
    ckpt = train(tmp_path / "a.pt", "wgangp", 1, *options, "--n-critic", "1")
    assert ckpt["discriminator"]["v"].item() == pytest.approx(0.5 * (1 - 0.01) - 0.02, abs=1e-4)
    assert ckpt["model"]["w"].item() == pytest.approx(0.4 * (1 - 0.005) + 0.01, abs=1e-4)
    assert ckpt["ema"]["w"] == ckpt["model"]["w"]
    idle = train(tmp_path / "b.pt", "wgangp", 1, *options, "--n-critic", "2")
    assert idle["model"]["w"].item() == idle["ema"]["w"].item() == pytest.approx(0.4)


@pytest.mark.parametrize("method", ["sngan", "acgan"])
def test_checkpoint_has_the_recalibrated_average(method, tiny, tmp_path):
    ckpt = train(tmp_path / "a.pt", method, 3)
    assert ckpt["ema"]["gain"].item() == pytest.approx(0.9) and ckpt["model"]["gain"] == 1
    steps = [ckpt[part]["state"][0]["step"].item() for part in ("optim_d", "optim_g")]
    assert steps == [3, 6]
    picture = Image.open(tmp_path / "a_grids" / "000003.png")
    assert picture.size == ((302, 302) if method == "acgan" else (530, 266))
    names, *rows = (tmp_path / "a.log.csv").read_text().splitlines()
    losses = "d_loss d_real d_fake d_gradient g_loss g_gradient images_per_s seconds"
    assert set(names.split(",")) == {"step", *losses.split()} and rows[-1].startswith("3,")


def test_seeds_matter(tiny, tmp_path):
    runs = [train(tmp_path / f"{i}.pt", "dcgan", 2, "--seed", str(i // 2)) for i in range(3)]
    weights = [run["model"]["w"].item() for run in runs]
    assert weights[0] == weights[1] != weights[2]


def test_a_picture_that_cannot_be_written_is_a_warning(tiny, tmp_path, capsys):
    (tmp_path / "a_grids").write_text("a file in the folder's place")
    assert train(tmp_path / "a.pt", "dcgan", 1)["step"] == 1
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, images, labels, what",
    [
        ("dcgan", torch.zeros(4, 3, 64, 64), None, "images: found torch.float32"),
        ("dcgan", torch.zeros(4, 3, 32, 32).byte(), None, "expected uint8 .N, 3, 64, 64"),
        ("dcgan", torch.zeros(1, 3, 64, 64).byte(), None, "two or more"),
        ("acgan", torch.zeros(4, 3, 28, 28).byte(), None, "labels: found none"),
        ("acgan", torch.zeros(4, 3, 28, 28).byte(), torch.zeros(4), "labels: found torch.float32"),
        ("acgan", torch.zeros(4, 3, 28, 28).byte(), torch.full((4,), 10), "labels: found"),
    ],
)
def test_tensors_that_cannot_be_trained_on(method, images, labels, what, tmp_path):
    args = settings(method, "--ckpt", str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=what):
        p1.train(args, images, labels)


# ---------------- sampling ----------------


def test_latents():
    """Of (seed, key) alone, whatever else is drawn; the figures of .weights are of these very numbers."""
    z = p1.latents([(0,), (3, 1)], 5)
    assert z[:, 0].tolist() == pytest.approx([-1.2225, 0.4656], abs=1e-4)
    assert torch.equal(p1.latents([(3, 1)], 5)[0], z[1])
    assert torch.equal(p1.latents([(0,)]), p1.latents([(0,)], 0)) and not torch.equal(
        p1.latents([(0,)])[0], z[0]
    )
    many = p1.latents([(i,) for i in range(2000)])
    assert many.dtype == torch.float32 and many.shape == (2000, 100)
    assert abs(many.mean()) < 0.01 and many.std().item() == pytest.approx(1, rel=0.01)


def test_to_uint8_rounds():
    x = torch.tensor([-1.5, -1, 0, 0.5 / 127.5 - 1 + 1e-4, 1, 2])
    assert p1.to_uint8(x).tolist() == [0, 0, 128, 1, 255, 255]
    assert p1.to_uint8(x).dtype == torch.uint8


@pytest.mark.parametrize(
    "digits", [[0, 9], np.array([0, 9], np.uint8), torch.tensor([0, 9], dtype=torch.int32)]
)
def test_generate_of_digits(digits):
    model = G(28, noise=0.3, digit=0.05)
    z = torch.randn(2, 100, dtype=torch.float64)
    images = p1.generate(model, settings("acgan"), z, digits)
    given, y = model.given[0]
    assert given.dtype == torch.float32 and torch.equal(given, z.float())
    assert y.dtype == torch.int64 and y.tolist() == [0, 9] and model.gradients == [False]
    colours = 0.4 + 0.3 * z[:, :3] + torch.tensor([[0.0], [0.45]])
    expected = ((colours.clamp(-1, 1) + 1) * 127.5).round()
    assert images.shape == (2, 3, 28, 28) and images.dtype == torch.uint8
    assert (images[:, :, 5, 7] - expected).abs().max() <= 1


def test_generate_of_faces():
    """Without digits, and as large as they are."""
    model = G()
    assert p1.generate(model, settings("dcgan"), torch.randn(2, 100)).shape == (2, 3, 64, 64)
    assert model.given[0][1] is None


def test_generate_on_another_device(monkeypatch):
    monkeypatch.setattr(p1, "to_uint8", lambda x: x)
    model = G(28).to("meta")
    p1.generate(model, settings("acgan"), torch.randn(2, 100), [1, 2])
    assert {x.device.type for x in model.given[0]} == {"meta"}


def test_digits_of_2021_shrink_smoothly():
    """A pattern finer than the pixels of 28x28 becomes grey."""

    class Stripes(G):
        def forward(self, z, y=None):
            x = torch.ones(len(z), 3, 64, 64)
            x[..., ::2] = -1
            return x

    images = p1.generate(Stripes(), settings("acgan"), torch.randn(2, 100), [1, 2])
    assert images.shape == (2, 3, 28, 28) and images.min() > 100 and images.max() < 155


def test_generate_refuses_what_it_cannot_draw():
    model = G(28)
    args = settings("acgan")
    z = p1.latents([(0,), (1,)])
    broken = z.clone()
    broken[1, 7] = math.nan
    for wrong in (broken, z[:, :99], z.long(), z[0], z.to_sparse()):
        with pytest.raises(ValueError, match="z: found"):
            p1.generate(model, args, wrong, [0, 9])
    for wrong in (None, [1], [1, 10]):
        with pytest.raises(ValueError, match="digits: "):
            p1.generate(model, args, z, wrong)
    assert model.given == []


# ---------------- networks ----------------


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_networks_of_faces():
    g = p1.Generator()
    sizes = []
    x = torch.randn(2, 100, 1, 1)
    for layer in g.main:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (3, 64, 64)]
    assert parameters(g) == 3_576_704 and parameters(p1.Generator(bias=True)) == 3_577_667
    for layer in list(g.main)[:4]:
        assert [type(part) for part in layer] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    counts = {"batch": 2_765_568, "spectral": 2_765_568, "none": 2_763_776}
    for norm, count in counts.items():
        d = p1.Discriminator(norm)
        sizes = []
        x = torch.randn(2, 3, 64, 64)
        for layer in d.main:
            x = layer(x)
            sizes.append(tuple(x.shape[1:]))
        assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (1, 1, 1), (1,)]
        assert parameters(d) == count
        convs = [layer for layer in d.modules() if isinstance(layer, nn.Conv2d)]
        assert [hasattr(conv, "parametrizations") for conv in convs] == [norm == "spectral"] * 5
        assert [isinstance(layer[1], nn.BatchNorm2d) for layer in list(d.main)[:4]] == [False] + [
            norm != "none"
        ] * 3


def test_networks_of_digits():
    g = p1.DigitGenerator()
    d = p1.DigitDiscriminator()
    assert parameters(g) == 2_688_427 and parameters(d) == 1_533_963
    x = g(torch.randn(2, 100), torch.tensor([3, 4]))
    assert x.shape == (2, 3, 28, 28) and x.abs().max() <= 1
    sizes = []
    for layer in d.main:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 28, 28), (128, 14, 14), (128, 14, 14), (256, 7, 7), (256, 7, 7), (12544,)]
    assert [type(layer[1]) for layer in list(d.main)[:5]] == [nn.Identity] + [nn.BatchNorm2d] * 4
    layers = [layer for layer in d.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 7 and all(hasattr(layer, "parametrizations") for layer in layers)
    convs = [layer for layer in g.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    sizes = [(conv.kernel_size[0], conv.stride[0]) for conv in convs]
    assert sizes == [(3, 1), (4, 2), (3, 1), (4, 2), (3, 1), (3, 1)]


def test_a_digit_multiplies_the_latent():
    g = p1.DigitGenerator()
    given = []
    g.start.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    z = torch.randn(2, 100)
    g(z, torch.tensor([3, 4]))
    assert torch.allclose(given[0], z * g.label.weight[[3, 4]])


def test_generator_is_the_tanh_of_gain_times_logits():
    g = p1.Generator().eval()
    z = torch.randn(2, 100)
    logits = g.logits(z)
    assert g.gain == 1 and "gain" in g.state_dict()
    g.gain.fill_(40.0)
    assert torch.allclose(g(z), torch.tanh(40 * logits), atol=1e-5)


def test_discriminators_give_logits_of_real_and_of_digits_in_float32():
    for d, size in ((p1.Discriminator("spectral", digits=10), 64), (p1.DigitDiscriminator(), 28)):
        with torch.autocast("cpu", torch.bfloat16):
            real, digits = d(torch.randn(2, 3, size, size))
        assert real.shape == (2,) and digits.shape == (2, 10)
        assert real.dtype == digits.dtype == torch.float32
    d = p1.Discriminator("batch", digits=10)
    d.main = nn.Flatten()
    real, digits = d(torch.arange(22.0).view(2, 11))
    assert real.tolist() == [0, 11] and digits[1].tolist() == [*range(12, 22)]
    d = p1.DigitDiscriminator()
    x = torch.randn(2, 12544)
    d.main = nn.Flatten()
    real, digits = d.eval()(x)
    assert torch.equal(real, d.real(x)[:, 0]) and torch.equal(digits, d.digit(x))


def test_layers():
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(1.0)
    x = torch.tensor([-10.0, 10.0]).view(1, 1, 1, 2)
    assert p1.down(conv, False)(x).flatten().tolist() == pytest.approx([-2, 10])
    assert p1.down(conv, True)(x).flatten().tolist() == pytest.approx([-0.2, 1], abs=1e-3)
    for layer in (p1.up(4, 4), p1.refine(4)):
        assert layer(torch.randn(2, 4, 5, 5)).min() == 0 and layer[0].bias is None


def test_spectral_norm_is_1():
    torch.manual_seed(0)
    d = p1.Discriminator("spectral")
    for _ in range(20):
        with nn.utils.parametrize.cached():
            d(torch.randn(2, 3, 64, 64))
    for layer in d.eval().modules():
        if isinstance(layer, nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("method, initialised", [("dcgan", "gd"), ("wgangp", "gd"), ("sngan", "g")])
def test_build_of_faces(method, initialised):
    """N(0, 0.02) for convolutions and N(1, 0.02) for BatchNorm, but spectral norm sets its own scale."""
    torch.manual_seed(0)
    nets = p1.build(settings(method))
    assert type(nets[0]) is p1.Generator and type(nets[1]) is p1.Discriminator
    for name, net in zip("gd", nets):
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and name in initialised:
                assert layer.weight.mean().abs() < 2e-3
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            if isinstance(layer, nn.BatchNorm2d):
                deviation = 0.02 if name in initialised else 0
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert layer.weight.std().item() == pytest.approx(deviation, rel=0.3)
    if method == "sngan":
        assert nets[1].main[0][0].parametrizations.weight.original.std() > 0.05


@pytest.mark.parametrize("method", ["sngan", "acgan"])
def test_build_on_a_device(method):
    nets = p1.build(settings(method, device=torch.device("meta")))
    names = {"sngan": ["Generator", "Discriminator"], "acgan": ["DigitGenerator", "DigitDiscriminator"]}
    assert [type(net).__name__ for net in nets] == names[method]
    assert {p.device.type for net in nets for p in net.parameters()} == {"meta"}


def test_batch_norm_hides_the_contrast_from_d():
    """The logits of a batch do not change when all its images lose half of their contrast."""
    torch.manual_seed(0)
    _, d = p1.build(settings("sngan"))
    x = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad(), nn.utils.parametrize.cached():  # one power iteration for all calls
        assert torch.allclose(d(x)[0], d(x / 2)[0], atol=1e-3)
        assert not torch.allclose(d(x)[0], d(x.square() - 1)[0], atol=0.1)


@slow
def test_the_generator_gets_the_wanted_contrast():
    torch.manual_seed(0)
    args = settings("sngan")
    g, _ = p1.build(args)
    p1.recalibrate(args, g, 0.2)  # 0.14 before
    with torch.no_grad():
        assert g(torch.randn(300, 100)).std(0).mean().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("method", [pytest.param("sngan", marks=slow), "acgan"])
def test_training_and_sampling_with_the_real_networks(method, tmp_path):
    ckpt = train(tmp_path / "a.pt", method, 2, "--ema", "0")
    model, args = p1.load_model(tmp_path / "a.pt")
    digits = [0, 9] if method == "acgan" else None
    images = p1.generate(model, args, p1.latents([(0,), (1,)]), digits)
    assert not torch.equal(images[0], images[1]) and not model.training
    assert all(torch.equal(value, ckpt["model"][name]) for name, value in ckpt["ema"].items())


# ---------------- modes ----------------


@pytest.fixture(params=["sngan", "acgan"])
def ckpt(request, tiny, tmp_path):
    path = tmp_path / f"{request.param}.pt"
    train(path, request.param, 2)
    return path


def sample(ckpt, out, *options):
    p1.main(["--mode", "sample", "--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", *options])
    return {name: np.array(Image.open(out / name)) for name in sorted(os.listdir(out))}


def test_images_do_not_depend_on_batch_or_number(ckpt, tmp_path):
    reference = sample(ckpt, tmp_path / "a", "--num", "12")
    few = sample(ckpt, tmp_path / "b", "--num", "3", "--batch-size", "2")
    assert all(np.array_equal(pixels, reference[name]) for name, pixels in few.items())
    other = sample(ckpt, tmp_path / "c", "--num", "1", "--seed", "1")
    first = next(iter(reference))
    assert not np.array_equal(other[first], reference[first])
    if ckpt.stem == "acgan":
        assert list(reference) == [f"{d}_{n:03d}.png" for d in range(10) for n in range(1, 13)]
        assert len(few) == 30 and reference[first].shape == (28, 28, 3)
    else:
        assert list(reference) == [f"{n:04d}.png" for n in range(12)]
        assert len(few) == 3 and reference[first].shape == (64, 64, 3)
    assert len({pixels.tobytes() for pixels in reference.values()}) == len(reference)


@pytest.mark.parametrize(
    "method, number, count, last",
    [
        ("wgangp", [], 1000, "0999.png"),
        ("wgangp", ["--num", "19"], 19, "0018.png"),
        ("acgan", [], 1000, "9_100.png"),
        ("acgan", ["--num", "19"], 190, "9_019.png"),
    ],
)
def test_num_is_faces_in_all_or_digits_of_each_class(method, number, count, last, tmp_path, monkeypatch):
    """The checkpoint says which."""
    names = []
    monkeypatch.setattr(p1, "load_model", lambda *_: (None, settings(method, trained="")))
    monkeypatch.setattr(p1, "from_keys", lambda model, settings, keys, seed: keys)
    monkeypatch.setattr(p1, "write_png", lambda path, image: names.append(path.name))
    p1.main(["--mode", "sample", "--ckpt", "a.pt", "--out", str(tmp_path), "--device", "cpu", *number])
    assert len({*names}) == count and names[-1] == last


def test_grid(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    p1.main(["--mode", "grid", "--ckpt", str(ckpt), str(ckpt), "--device", "cpu"])
    pictures = [f"{kind}_{ckpt.stem}.png" for kind in ("first", "interpolation", "training")]
    assert {*pictures, "compare.png"} <= {*os.listdir("p1_figures")}
    first, middle, _, both = (Image.open(f"p1_figures/{n}").size for n in (*pictures, "compare.png"))
    assert both == (2 * first[0] + 24, first[1])
    assert middle == ((272, 122) if ckpt.stem == "acgan" else (596, 266))
    assert np.array(Image.open("p1_figures/compare.png"))[:, first[0] + 5].min() == 255


def test_pictures_of_files_of_one_name_would_overwrite_each_other(tiny, tmp_path, error):
    paths = [tmp_path / folder / "model.pt" for folder in ("a", "b")]
    for path in paths:
        train(path, "dcgan", 1)
    options = ["--ckpt", *map(str, paths), "--out", str(tmp_path / "out")]
    assert "would overwrite each other" in error(p1.main, ["--mode", "grid", *options])


def test_interpolation(monkeypatch):
    """From one latent to another on the arc between them: halfway along their sum."""
    given = []
    monkeypatch.setattr(
        p1, "generate", lambda model, args, z, digits: given.append((z, digits)) or even(0, 36)
    )
    p1.interpolation(None, settings("dcgan"), 3)
    z = given[0][0].view(4, 9, 100)
    ends = p1.latents([(i,) for i in range(8)], 3)
    assert torch.allclose(z[:, 0], ends[0::2], atol=1e-5) and torch.allclose(z[:, 8], ends[1::2], atol=1e-5)
    angle = torch.acos(F.cosine_similarity(ends[0::2], ends[1::2]))[:, None]
    middle = (ends[0::2] + ends[1::2]) / (2 * torch.cos(angle / 2))
    assert torch.allclose(z[:, 4], middle, atol=1e-5)
    assert given[0][1].tolist() == [0] * 9 + [1] * 9 + [2] * 9 + [3] * 9


def test_tile():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 5)
    picture = p1.tile(images, 3)
    assert picture.shape == (3, 14, 23) and picture[:, :2].min() == 255
    found = [picture[0, 2 + 6 * row, 2 + 7 * column].item() for row in (0, 1) for column in range(3)]
    assert found == [*range(6)]


def test_eval_takes_the_method_from_the_checkpoint(ckpt, tmp_path, monkeypatch, error):
    import common

    calls = []
    monkeypatch.setattr(common, "score_digits", lambda *_: calls.append("acgan") or {})
    monkeypatch.setattr(common, "score_images", lambda *_: calls.append("sngan") or {})
    monkeypatch.setattr(common, "face_folder", lambda *_: "folder")
    out = tmp_path / "a" / "score.json"
    arguments = ["--mode", "eval", "--ckpt", str(ckpt), "--data", "x", "--device", "cpu"]
    p1.main([*arguments, "--out", str(out)])
    assert calls == [ckpt.stem] and json.loads(out.read_text()) == {}
    other = {"sngan": "--classifier", "acgan": "--inception"}[ckpt.stem]
    assert f"found {ckpt.stem}" in error(p1.main, [*arguments, other, "x"])
    assert "--method: has a use only with no --ckpt" in error(p1.main, [*arguments, "--method", "dcgan"])


def test_eval_of_faces_needs_a_reference(error):
    assert "--data DIR" in error(p1.main, ["--mode", "eval", "--method", "dcgan"])


# ---------------- command line ----------------


def test_readme():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python p1_gan.py (--mode .*?)(?:  +#.*)?$", text, re.M)
    for command in commands:
        p1.parse_args(command.split())
    assert len(commands) >= 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--lr", "-1"],
        ["--mode", "fly"],
        ["--method", "gan"],
        ["--diffaugment", "color"],
        ["--n-critic", "0"],
        ["--decay", "cosine"],
        ["--device", "mps"],
        ["--num", "0"],
        ["--batch-size", "1"],
        ["--ckpt", "a", "b"],
        ["--stepz", "1"],
        ["--betas", "0.5", "1"],
        ["--label-smoothing", "2"],
        ["--label-smoothing", "0.1"],
        ["--label-smoothing", "0.1", "--method", "wgangp"],
        ["--label-smoothing", "0.1", "--method", "acgan"],
    ],
)
def test_wrong_options(arguments, error):
    with pytest.raises(ValueError, match=arguments[0]):
        p1.parse_args(arguments)
    assert arguments[0] in error(p1.main, arguments)
