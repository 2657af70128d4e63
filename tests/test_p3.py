"""p3_ddim.py: each line of a training step, loss and sampler; the given network; the modes."""

import copy
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Hostile
from PIL import Image

import common
import p3_ddim as p3

DATA = ROOT / "tests"
TINY = ["--size", 16, "--channels", 32, 64, "--attention", 2, "--batch-size", 4, "--device", "cpu"]
TINY += ["--precision", "float32"]
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def call(*arguments):
    p3.main([str(argument) for argument in arguments])


def parse(*arguments):
    return p3.parse_args([str(argument) for argument in arguments])


def random_images(n, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8)


def random_weights(*modules):
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)


# ------------------------------------------------------------------ a step of training


class Steps:
    """Takes the place of Run: the loop has these numbers; keeps what the loop records."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.rows = []

    def __call__(self, *arguments, **parts):
        return self

    def __iter__(self):
        return iter(self.numbers)

    def record(self, **values):
        self.rows.append(values)


@pytest.fixture
def steps(monkeypatch):
    """steps(numbers, loss, *options): trains with loss(net, k) in the k-th step; returns what was seen."""
    images = random_images(16, 8)

    def run(numbers, loss, *options, **changes):
        seen = Namespace(images=images, nets=[], given=[], bf16=[])
        vars(seen).update(rates=[], gradients=[], weights=[], ema=[])
        build = p3.build

        def watched_build(args):
            seen.nets.append(build(args))
            return seen.nets[-1]

        def watched_loss(net, x0, alpha_bar, gamma):
            seen.weights.append(copy.deepcopy(list(seen.nets[0].parameters())))
            seen.ema.append(copy.deepcopy(list(seen.nets[1].parameters())))
            seen.given.append((net, x0, alpha_bar, gamma))
            seen.bf16.append(torch.is_autocast_enabled("cpu"))
            return loss(net, len(seen.given))

        class Optimiser(torch.optim.AdamW):
            def step(self):
                seen.rates.append(self.param_groups[0]["lr"])
                seen.gradients.append([p.grad.clone() for p in self.param_groups[0]["params"]])
                return super().step()

        args = parse(*TINY, "--size", 8, "--channels", 32, "--batch-size", 8, *options)
        vars(args).update(changes)
        runs = Steps(numbers)
        with monkeypatch.context() as patch:
            patch.setattr(p3, "Run", runs)
            patch.setattr(p3, "build", watched_build)
            patch.setattr(p3, "diffusion_loss", watched_loss)
            patch.setattr(torch.optim, "AdamW", Optimiser)
            seen.result = p3.train(args, images)
        seen.rows = runs.rows
        return seen

    return run


def total(net):
    return sum(parameter.sum() for parameter in net.parameters())


def small(net, k):
    """Every derivative is 1e-5, so that the gradient's norm is below 1."""
    return 1e-5 * total(net)


def test_a_batch_is_of_scaled_images_of_which_half_are_mirrored(steps):
    seen = steps(range(1, 21), small)
    number = 2 * seen.images.double() / 255 - 1
    left_right = torch.stack([number, number[:, :, :, list(range(7, -1, -1))]], 1)
    drawn = []
    for _, x0, _, _ in seen.given:
        assert x0.shape == (8, 3, 8, 8) and x0.dtype == torch.float32
        same = (x0[:, None, None] - left_right).abs().amax((3, 4, 5)) < 1e-6  # (B, image, mirrored)
        assert same.sum((1, 2)).tolist() == [1] * 8
        drawn.append(same.nonzero()[:, 1:])
    mirrored = torch.stack(drawn)[:, :, 1].double().mean(1)
    assert torch.cat(drawn)[:, 0].unique().tolist() == list(range(16))
    assert 0.35 < mirrored.mean() < 0.65 and ((mirrored > 0) & (mirrored < 1)).sum() > 15


def test_the_loss_gets_network_schedule_and_gamma(steps):
    seen = steps([1], small, "--gamma", 3)
    net, _, alpha_bar, gamma = seen.given[0]
    assert net is seen.nets[0] and gamma == 3.0 and np.allclose(alpha_bar.numpy(), ABAR, rtol=1e-12)


def test_rate_warms_up_for_200_steps_and_falls_after_5000(steps):
    seen = steps([1, 100, 200, 201, 5001, 20001], small, "--lr", 0.5)
    assert seen.rates == pytest.approx([0.0025, 0.25, 0.5, 0.5, 0.5, 0.25], rel=1e-12)


def test_gradients_are_of_this_step_and_clipped_to_norm_1(steps):
    seen = steps([1, 2], small)
    for gradient in seen.gradients:
        assert all(torch.allclose(g, torch.tensor(1e-5)) for g in gradient)
    seen = steps([1], lambda net, k: total(net))
    n = sum(p.numel() for p in seen.nets[0].parameters())
    clipped = torch.cat([g.flatten() for g in seen.gradients[0]])
    assert clipped.norm().item() == pytest.approx(1, rel=1e-3)
    assert seen.rows[0]["gradient"].item() == pytest.approx(math.sqrt(n), rel=1e-3)  # before clipping


def test_loss_and_gradient_are_recorded(steps):
    seen = steps([1, 2], lambda net, k: small(net, k) - small(net, k).detach() + 7 * k)
    assert [row["loss"].item() for row in seen.rows] == [7, 14]
    assert all(row.keys() == {"loss", "gradient"} for row in seen.rows)


def test_two_steps_of_adam_by_hand(steps):
    """betas 0.9 and 0.99, no weight decay: derivatives 1e-4, then 2e-4."""
    seen = steps([100, 200], lambda net, k: k * 1e-4 * total(net), "--lr", 0.2)
    m = 0.1 * 1e-4
    v = 0.01 * 1e-8
    first = 0.1 * (m / 0.1) / (math.sqrt(v / 0.01) + 1e-8)
    m = 0.9 * m + 0.1 * 2e-4
    v = 0.99 * v + 0.01 * 4e-8
    second = 0.2 * (m / 0.19) / (math.sqrt(v / 0.0199) + 1e-8)
    for start, middle, end in zip(*seen.weights, seen.nets[0].parameters()):
        assert torch.allclose(middle, start - first, atol=1e-5)
        assert torch.allclose(end, middle - second, atol=1e-5)


def test_the_averaged_network(steps):
    """It starts as the network, moves after the optimiser, and is what training returns."""
    seen = steps([10], small)
    model, ema = seen.nets
    weight = 1 - 0.9**17
    for start, average, now, then in zip(seen.weights[0], seen.ema[0], model.parameters(), ema.parameters()):
        assert torch.equal(start, average) and not torch.equal(start, now)
        assert torch.allclose(then, start + weight * (now - start), atol=1e-7)
    assert seen.result is ema and not ema.training and model.training


def test_update_ema():
    """Power function with gamma 16: after step k the weight of the new network is 1 - (1 - 1 / k)^17."""
    for step, expected in ((1, 5.0), (2, 3 + 2 * (1 - 0.5**17)), (100, 3 + 2 * (1 - 0.99**17))):
        ema, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        torch.nn.init.constant_(ema.weight, 3)
        torch.nn.init.constant_(model.weight, 5)
        p3.update_ema(ema, model, step)
        assert ema.weight.item() == pytest.approx(expected, rel=1e-6) and model.weight.item() == 5


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_loss_is_in_bf16_where_asked_for(steps, precision):
    assert steps([1], small, "--precision", precision).bf16 == [precision == "bf16"]


def test_seed_sets_weights_and_batches(steps):
    first = steps([1], small)
    torch.manual_seed(99)
    again, other = steps([1], small), steps([1], small, "--seed", 1)
    for seen, equal in ((again, True), (other, False)):
        assert torch.equal(seen.given[0][1], first.given[0][1]) == equal
        assert torch.equal(seen.weights[0][-2], first.weights[0][-2]) == equal


def test_two_processes_share_the_batch_and_their_gradients(steps, monkeypatch):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", torch.nn.Sequential)
    net, x0, _, _ = steps([1], small, world=2).given[0]
    assert isinstance(net, torch.nn.Sequential) and len(x0) == 4


def test_training_is_on_the_device(monkeypatch):
    """On the meta device, which has shapes alone, tensors of two devices do not mix."""
    monkeypatch.setattr(p3, "Run", Steps([1]))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    args = parse(*TINY)
    args.device = torch.device("meta")
    ema = p3.train(args, random_images(8, 16))
    assert all(parameter.device.type == "meta" for parameter in ema.parameters())


def test_tensors_that_cannot_be_trained_on(tmp_path):
    args = parse(*TINY, "--channels", 32, 32, 32, 32, "--ckpt", tmp_path / "a.pt")
    for bad, found in (
        (torch.zeros(4, 3, 16, 16), "found torch.float32"),
        (torch.zeros(4, 3).byte(), "found torch.uint8"),
        (torch.zeros(4, 16, 16, 3).byte(), "found torch.uint8"),
        (torch.zeros(0, 3, 16, 16).byte(), "found torch.uint8"),
        (torch.zeros(4, 3, 20, 20).byte(), "found 20x20, expected multiples of 8"),
    ):
        with pytest.raises(ValueError, match=f"images: {found}"):
            p3.train(args, bad)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ the loss


def spied_loss(monkeypatch, gamma, b=10, out=0.0, dtype=torch.float32):
    """(loss, x0, eps, x, t) of a network that says `out` and keeps what it was given."""
    g = torch.Generator().manual_seed(3)
    x0 = torch.rand(b, 3, 4, 4, generator=g) * 2 - 1
    eps = torch.randn(b, 3, 4, 4, generator=g)
    given = []

    def model(x, t):
        given.extend([x, t])
        return torch.full_like(x, out, dtype=dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: eps)
        loss = p3.diffusion_loss(model, x0, p3.make_alpha_bar(), gamma)
    return loss, x0, eps, *given


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_loss_by_hand(monkeypatch, gamma):
    loss, x0, eps, x, t = spied_loss(monkeypatch, gamma, out=0.25)
    expected = []
    for i, step in enumerate(t.tolist()):
        a, s = math.sqrt(ABAR[step]), math.sqrt(1 - ABAR[step])
        assert torch.allclose(x[i], a * x0[i] + s * eps[i], atol=1e-6)
        error = ((0.25 - (a * eps[i] - s * x0[i])) ** 2).mean().item()
        snr = (a / s) ** 2
        weight = min(snr, gamma) / (snr + 1) if gamma else 1
        expected.append(weight * error)
    assert loss.item() == pytest.approx(sum(expected) / 10, rel=1e-5)
    assert x.dtype == loss.dtype == torch.float32
    loss, *_ = spied_loss(monkeypatch, gamma, dtype=torch.bfloat16)
    assert loss.dtype == torch.float32


def test_steps_are_stratified_and_random(monkeypatch):
    """Ten images have a step in each tenth of 0 ... 999; all of them come up."""
    found = []
    for _ in range(300):
        *_, t = spied_loss(monkeypatch, 0.0)
        assert t.dtype == torch.int64
        assert sorted((t // 100).tolist()) == list(range(10))
        found += t.tolist()
    assert min(found) < 10 and max(found) > 989 and len(set(found)) > 700
    first = [spied_loss(monkeypatch, 0.0, b=1)[-1].item() for _ in range(50)]
    assert min(first) < 200 and max(first) > 800


# ------------------------------------------------------------------ schedule, samplers

TWO = torch.tensor([0.64, 0.36], dtype=torch.float64)  # a = 0.8, 0.6 and s = 0.6, 0.8


def test_schedule():
    """The values of the course's sampler of 2023."""
    alpha_bar = p3.make_alpha_bar()
    values = {0: 0.9999, 1: 0.9997800921, 20: 0.9937354286, 21: 0.9932203573}
    values |= {961: 0.0000857310, 980: 0.0000590375, 981: 0.0000578779, 999: 0.0000403583}
    for t, value in values.items():
        assert abs(alpha_bar[t].item() - value) < 5e-11
    assert alpha_bar.shape == (1000,)


def test_predictor_by_hand():
    seen = []

    def model(x, t):
        seen.append((t, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return torch.full_like(x, -2.0)

    x = torch.full((2, 1, 1, 1), 0.5)
    for prediction, clamp, x0, eps in (
        ("eps", True, 1.0, -2.0),
        ("eps", False, (0.5 + 0.8 * 2) / 0.6, -2.0),
        ("v", False, 0.6 * 0.5 + 0.8 * 2, 0.6 * -2 + 0.8 * 0.5),  # x0 = a x - s v, eps = a v + s x
        ("v", True, 1.0, 0.6 * -2 + 0.8 * 0.5),
    ):
        found = p3.predictor(model, TWO, prediction, clamp=clamp)(x, 1)
        assert [v.flatten().tolist() for v in found] == [pytest.approx([x0] * 2), pytest.approx([eps] * 2)]
    assert p3.predictor(lambda x, t: 9 + x, TWO, "eps")(x, 1)[0].unique().item() == -1.0
    t, bf16, _ = seen[0]
    assert t.tolist() == [1, 1] and t.dtype == torch.int64 and not bf16


def test_predictor_in_bf16_goes_on_in_float32():
    def model(x, t):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return torch.full_like(x, 0.3, dtype=torch.bfloat16)

    x = torch.full((1, 1, 1, 1), 0.5)
    for prediction in ("eps", "v"):
        x0, eps = p3.predictor(model, TWO, prediction, bf16=True)(x, 1)
        assert x0.dtype == eps.dtype == torch.float32
        back = 0.6 * x0 + 0.8 * eps
        assert back.item() == pytest.approx(0.5, abs=1e-6)


def scripted(*answers):
    """predict that gives these (x0, eps) in turn, and keeps the (x, t) that it was given."""
    given = []

    def predict(x, t):
        assert x.dtype == torch.float32
        x0, eps = answers[len(given)]
        given.append((x.item(), t))
        return torch.tensor(x0), torch.tensor(eps)

    return predict, given


def drawn(*values):
    left = list(values)
    return lambda: torch.tensor(left.pop(0))


def test_ddpm_by_hand():
    predict, given = scripted((0.5, 9.0), (-0.25, 9.0))
    found = p3.ddpm(predict, torch.tensor(2.0), TWO, [1, 0], drawn(3.0, 4.0))
    alpha, beta = 0.36 / 0.64, 1 - 0.36 / 0.64
    mean = 0.8 * beta / 0.64 * 0.5 + math.sqrt(alpha) * 0.36 / 0.64 * 2.0
    x = mean + math.sqrt(0.36 / 0.64 * beta) * 3.0
    assert given == [(2.0, 1), (pytest.approx(x), 0)]
    assert found.item() == pytest.approx(-0.25)  # the last step ends at x0, without noise


def test_ddim_by_hand():
    predict, given = scripted((0.5, 0.7), (-0.25, 0.1))
    found = p3.ddim(predict, torch.tensor(2.0), TWO, [1, 0])
    assert given == [(2.0, 1), (pytest.approx(0.8 * 0.5 + 0.6 * 0.7), 0)]
    assert found.item() == pytest.approx(-0.25)
    predict, _ = scripted((0.5, 0.7), (-0.25, 0.1))
    found = p3.ddim(predict, torch.tensor(2.0), TWO, [1, 0], end=0.75)
    assert found.item() == pytest.approx(math.sqrt(0.75) * -0.25 + 0.5 * 0.1)


def test_ddim_with_eta_by_hand():
    predict, given = scripted((0.5, 0.7), (-0.25, 0.1))
    found = p3.ddim(predict, torch.tensor(2.0), TWO, [1, 0], 0.5, drawn(3.0))  # the last step draws nothing
    sigma = 0.5 * math.sqrt(0.36 / 0.64 * (1 - 0.36 / 0.64))
    x = 0.8 * 0.5 + math.sqrt(0.36 - sigma**2) * 0.7 + sigma * 3.0
    assert given[1] == (pytest.approx(x), 0) and found.item() == pytest.approx(-0.25)


def test_ddim_inverse_by_hand():
    """Two iterations a step: the second takes eps at the start that the first found."""
    answers = [(9.0, 0.1), (9.0, 0.2), (9.0, 0.3), (9.0, 0.4)]
    predict, given = scripted(*answers)
    found = p3.ddim_inverse(predict, torch.tensor(0.5), TWO, [1, 0], 2)
    first = 0.8 * 0.5 + 0.6 * 0.1  # from the image, alpha_bar 1
    middle = 0.8 * 0.5 + 0.6 * 0.2
    third = 0.6 * (middle - 0.6 * 0.3) / 0.8 + 0.8 * 0.3
    last = 0.6 * (middle - 0.6 * 0.4) / 0.8 + 0.8 * 0.4
    expected = [(0.5, 0), (first, 0), (middle, 1), (third, 1)]
    assert given == [(pytest.approx(x), t) for x, t in expected] and found.item() == pytest.approx(last)
    predict, given = scripted(*[(9.0, 0.0)] * 6)
    found = p3.ddim_inverse(predict, torch.tensor(0.5), TWO, [1, 0], end=0.25)
    assert len(given) == 6 and found.item() == pytest.approx(0.6)  # eps 0: x / sqrt(end) times 0.6


def test_dpm_solver_by_hand():
    """Algorithm 2 of 2211.01095 with r = h_before / h, then x0 at the last time."""
    alpha_bar = torch.tensor([0.9, 0.64, 0.36], dtype=torch.float64)
    predict, given = scripted((0.5, 9.0), (-0.25, 9.0), (0.125, 9.0))
    found = p3.dpm_solver(predict, torch.tensor(2.0), alpha_bar, [2, 1, 0])
    lambda_ = [0.5 * math.log(bar / (1 - bar)) for bar in (0.9, 0.64, 0.36)]
    h1, h2 = lambda_[1] - lambda_[2], lambda_[0] - lambda_[1]
    x1 = 0.6 / 0.8 * 2.0 - 0.8 * (math.exp(-h1) - 1) * 0.5
    r = h1 / h2
    d = (1 + 1 / (2 * r)) * -0.25 - 1 / (2 * r) * 0.5
    x2 = math.sqrt(0.1) / 0.6 * x1 - math.sqrt(0.9) * (math.exp(-h2) - 1) * d
    assert given == [(2.0, 2), (pytest.approx(x1), 1), (pytest.approx(x2), 0)]
    assert found.item() == pytest.approx(0.125)


def test_ddim_times():
    assert p3.ddim_times(50) == list(range(981, 0, -20))
    assert p3.ddim_times(2) == [501, 1] and p3.ddim_times(500) == list(range(999, 0, -2))
    for calls in (0, 1, 3, 30, 501):
        with pytest.raises(ValueError, match=f"--sample-steps {calls}: "):
            p3.ddim_times(calls)


def test_log_snr_times():
    """999, then the times nearest to even steps of the log-SNR."""
    lambda_ = np.log(ABAR / (1 - ABAR)) / 2
    for calls, last in ((10, 20), (4, 0)):
        times = p3.log_snr_times(p3.make_alpha_bar(), calls, last)
        wanted = [-4 + (lambda_[last] + 4) * k / (calls - 1) for k in range(calls)]
        assert times == [999, *(int(np.abs(lambda_ - w).argmin()) for w in wanted[1:])]
        assert times[-1] == last and len(times) == calls
    # where the noise ends before -4 the grid does: log-SNRs 2, 1, 0, -1, -2
    alpha_bar = torch.sigmoid(2 * torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64))
    assert p3.log_snr_times(alpha_bar, 3, 0) == [4, 2, 0]
    assert p3.log_snr_times(alpha_bar, 30, 0) == [4, 3, 2, 1, 0]  # each once


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


@pytest.mark.parametrize("last", [None, 0, 20])
def test_order_of_convergence_on_a_gaussian(last):
    """Against the exact flow: DDIM's error falls as 1 / steps, DPM-Solver++(2M)'s as 1 / steps^2."""
    alpha_bar = p3.make_alpha_bar()
    x = torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)
    predict, flow = gaussian(alpha_bar, c=0.5)
    errors = []
    for calls in (25, 50, 100):
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


# ------------------------------------------------------------------ noise, images, generate


def test_noise_depends_on_seed_and_key_alone():
    one = p3.Noise([(3, 1)], (3, 8, 8), 5)
    two = p3.Noise([(0, 1), (3, 1)], (3, 8, 8), 5)
    rounds = []
    for _ in range(2):
        first, second = one(), two()
        assert first.shape == (1, 3, 8, 8) and first.dtype == torch.float32
        assert torch.equal(first[0], second[1]) and not torch.equal(second[0], second[1])
        rounds.append(second)
    assert not torch.equal(*rounds)
    one, other = p3.Noise([(2983,), (68855,)], (8,))()
    assert not torch.equal(one, other)  # equal when seeds were hashed to 32 bits
    assert p3.Noise([(0,)], (2,), 0)()[0].tolist() == pytest.approx([1.1176220, -1.3871249], abs=1e-6)
    many = p3.Noise([(0,)], (3, 100, 100), 1)()
    assert many.mean().abs() < 0.02 and many.std().item() == pytest.approx(1, abs=0.02)
    assert p3.Noise([(0,)], (2,), device="meta")().device.type == "meta"


def test_uint8_by_hand():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.2, 0.51, 1.0, 2.0])
    found = p3.to_uint8(x)
    assert found.tolist() == [0, 0, 128, 153, 193, 255, 255] and found.dtype == torch.uint8


def test_min_max_by_hand():
    x = torch.tensor([-2.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2).expand(2, 3, 2, 2).clone()
    x[0, 2] = 0  # another channel: the range is that of the whole image
    x[1] *= 3  # another image: each has its own
    found = p3.min_max_uint8(x)
    assert found[0, 0].flatten().tolist() == found[1, 2].flatten().tolist() == [0, 128, 191, 255]
    assert found[0, 2].unique().tolist() == [128] and found.dtype == torch.uint8
    assert p3.min_max_uint8(torch.full((1, 3, 2, 2), 7.0)).unique().tolist() == [0]
    narrow = torch.tensor([0.0, 0.5e-5]).view(1, 1, 1, 2)
    assert p3.min_max_uint8(narrow).flatten().tolist() == [0, 128]  # a range of at least 1e-5


@pytest.fixture
def generated(monkeypatch):
    """generated(**options): what generate gave its sampler, which makes two images of 0.5 and 0."""

    def run(course=False, prediction="v", noise=None, **options):
        given = {}
        result = torch.full((2, 3, 8, 8), 0.5)
        result[:, :, 0] = 0

        def sampler(name):
            def take(predict, x, alpha_bar, times, *more, **named):
                given.update(name=name, x=x, alpha_bar=alpha_bar, times=times, more=more, named=named)
                given.update(predict=predict, inference=torch.is_inference_mode_enabled())
                return result

            return take

        def predictor(*arguments, **named):
            given["predictor"] = [*arguments, *named.values()]
            return "predict"

        settings = Namespace(channels=[32], prediction=prediction, course=course, device=torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(p3, "predictor", predictor)
            for name in ("ddpm", "ddim", "dpm_solver"):
                patch.setattr(p3, name, sampler(name))
            x = torch.randn(2, 3, 8, 8) if noise is None else noise
            given["images"] = p3.generate("model", settings, x, **options)
        assert torch.equal(given["x"], x) and given["predict"] == "predict" and given["inference"]
        assert np.allclose(given["alpha_bar"].numpy(), ABAR)
        model, alpha_bar, *rest = given["predictor"]
        assert model == "model" and alpha_bar is given["alpha_bar"]
        assert rest == [prediction, options.get("bf16", False)]
        return Namespace(**given)

    return run


def noise_of(seed, *keys):
    return p3.Noise(keys, (3, 8, 8), seed)()


def test_generate_by_ddim(generated):
    seen = generated(calls=4, eta=0.5, seed=7)
    assert seen.name == "ddim" and seen.times == [751, 501, 251, 1]
    eta, added = seen.more
    assert eta == 0.5 and seen.named == {"end": pytest.approx(0.9999)}
    assert torch.equal(added(), noise_of(7, (0, 1), (1, 1)))
    assert generated().times == list(range(981, 0, -20)) and generated().more[0] == 0.0
    with_keys = generated(keys=[(5, 2), (3,)], prediction="eps", bf16=True)
    assert torch.equal(with_keys.more[1](), noise_of(0, (5, 2), (3,)))


def test_generate_by_ddpm(generated):
    seen = generated(sampler="ddpm", keys=[(4, 1), (9, 1)], seed=2)
    assert seen.name == "ddpm" and seen.times == list(range(999, -1, -1))
    assert torch.equal(seen.more[0](), noise_of(2, (4, 1), (9, 1)))


@pytest.mark.parametrize("course, last", [(True, 0), (False, 20)])
def test_generate_by_dpm_solver(generated, course, last):
    """It goes on to time 0 with the given network alone."""
    seen = generated(course, sampler="dpm++", calls=12)
    assert seen.name == "dpm_solver" and len(seen.times) == 12
    assert seen.times[0] == 999 and seen.times[-1] == last


def test_generate_scales_images_of_the_given_network_by_min_and_max(generated):
    assert generated(course=False).images.unique().tolist() == [128, 191]
    assert generated(course=True).images.unique().tolist() == [0, 255]


def test_generate_refuses(generated):
    good = torch.zeros(2, 3, 8, 8)
    model = p3.UNet((32, 32), 1, ())
    settings = Namespace(channels=[32, 32], prediction="v", course=False, device=torch.device("cpu"))
    for bad in (
        good[0],
        good[:, :2],
        good.double(),
        good[:, :, :7],
        good * math.inf,
        good.to_sparse(),
        good[:0],
    ):
        with pytest.raises(ValueError, match="noise: "):
            p3.generate(model, settings, bad)
    for wrong in (
        {"sampler": "dpm"},
        {"calls": 30},
        {"calls": 50.0},
        {"calls": 0, "sampler": "dpm++"},
        {"calls": 501, "sampler": "dpm++"},
        {"seed": -1},
        {"seed": 2**32},
        {"keys": [(0, 1)]},
        {"keys": [(0, 1), (0, 1.5)]},
        {"keys": [(0, 1), (0, 2**32)]},
    ):
        with pytest.raises(ValueError, match="expected|expects"):
            p3.generate(model, settings, good, **wrong)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_keys_are_lists_arrays_or_tensors(generated, form):
    keys = form([[4, 1], [2**32 - 1, 1]])
    seen = generated(keys=keys, seed=np.int64(2), calls=torch.tensor(4))
    assert seen.times == [751, 501, 251, 1]
    assert torch.equal(seen.more[1](), noise_of(2, (4, 1), (2**32 - 1, 1)))


# ------------------------------------------------------------------ networks


def test_initial_weights():
    """Uniform, variance scale / mean of fan-in and fan-out, biases 0; convolutions keep or halve a side."""
    for layer, variance in (
        (p3.init(torch.nn.Linear(300, 100), 2.0), 2 / 200),
        (p3.init(torch.nn.Linear(300, 100)), 1 / 200),
        (p3.conv3x3(64, 32), 1 / (9 * 48)),
        (p3.conv3x3(64, 32, scale=4.0), 4 / (9 * 48)),
    ):
        bound = math.sqrt(3 * variance)
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05) and not layer.bias.any()
    x = torch.zeros(1, 64, 8, 8)
    assert p3.conv3x3(64, 32)(x).shape == (1, 32, 8, 8)
    assert p3.conv3x3(64, 32, stride=2)(x).shape == (1, 32, 4, 4)
    assert [p3.norm(c).num_groups for c in (32, 64, 128, 256)] == [8, 16, 32, 32]


def test_branches_start_at_zero():
    x, time = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
    assert torch.allclose(p3.ResBlock(32, 32, 8, 0.0)(x, time), x, atol=1e-3)
    assert torch.allclose(p3.Attention(32)(x), x, atol=1e-3)
    net = p3.UNet((32, 64), 1, (2,))
    assert net(torch.randn(1, 3, 8, 8), torch.tensor([5])).abs().max() < 1e-3
    assert {module.p for module in net.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_time_embedding_by_hand():
    found = p3.TimeEmbedding(4)(torch.tensor([0, 300]))
    assert found[0].tolist() == [0, 0, 1, 1]  # sines, then cosines, of 300 and 300 / 100
    expected = [math.sin(300), math.sin(3), math.cos(300), math.cos(3)]
    assert found[1].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("c_out", [32, 64])
def test_residual_block_by_hand(c_out):
    block = p3.ResBlock(32, c_out, 8, 0.5).eval()
    random_weights(block)
    w = dict(block.named_parameters())
    x, time = torch.randn(2, 32, 4, 4), torch.randn(2, 8)

    def part(x, i, groups):
        x = F.silu(F.group_norm(x, groups, w[f"norm{i}.weight"], w[f"norm{i}.bias"]))
        return F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1)

    h = part(x, 1, 8)
    h = h + F.linear(F.silu(time), w["time.1.weight"], w["time.1.bias"]).view(2, c_out, 1, 1)
    h = part(h, 2, c_out // 4)
    skip = F.conv2d(x, w["skip.weight"], w["skip.bias"]) if c_out == 64 else x
    assert torch.allclose(block(x, time), skip + h, atol=1e-4)
    assert not torch.equal(block.train()(x, time), block(x, time))  # dropout


def test_attention_by_hand():
    attention = p3.Attention(32)
    random_weights(attention)
    x = torch.randn(2, 32, 2, 3)
    q, k, v = attention.qkv(attention.norm(x)).view(2, 3, 32, 6).unbind(1)  # each (B, C, HW)
    weights = (q.transpose(1, 2) @ k / math.sqrt(32)).softmax(2)  # (B, to, from)
    h = attention.out((v @ weights.transpose(1, 2)).view(2, 32, 2, 3))
    assert torch.allclose(attention(x), x + h, atol=1e-5)


def test_guided_moves_away_from_the_guide():
    x, t = torch.zeros(1), torch.tensor([3])
    model, guide = (lambda x, t: x + t), (lambda x, t: x + 1)
    for w, expected in ((0, 1), (1, 3), (2, 5)):
        assert p3.Guided(model, guide, w)(x, t).item() == expected
    halves = p3.Guided(lambda x, t: x.bfloat16() + 3, lambda x, t: x.bfloat16() + 1.0078125, 1.4)(x, t)
    assert halves.dtype == torch.float32 and halves.item() == pytest.approx(3 + 0.4 * 1.9921875, rel=1e-6)


def test_build(monkeypatch):
    """The network that the settings describe; channels_last on a GPU alone."""
    moved = []

    class Net:
        def __init__(self, *arguments):
            moved.append(arguments)

        def to(self, *arguments, **named):
            moved.append((arguments, named))
            return self

    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    settings = dict(channels=[32, 64], blocks=3, attention=[4], dropout=0.25)
    net = p3.build(Namespace(**settings, device=cpu))
    assert net.down1.weight.is_contiguous() and net.down2.resblocks.dropout.p == 0.25
    monkeypatch.setattr(p3, "UNet", Net)
    p3.build(Namespace(**settings, device=gpu))
    last = {"memory_format": torch.channels_last}
    assert moved == [([32, 64], 3, [4], 0.25), ((), last), ((gpu,), {})]


def test_copies_of_the_network_are_independent():
    model = p3.UNet((32, 64), 1, (2,))
    random_weights(model)
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    other = copy.deepcopy(model)
    assert torch.equal(other(x, t), model(x, t))
    with torch.no_grad():
        other.down1.weight.zero_()
    assert not torch.equal(other(x, t), model(x, t))


# ------------------------------------------------------------------ the recipe, on a tiny network


def images(folder):
    """name -> integer array (H, W, 3) of all entries."""
    return {name: np.array(Image.open(folder / name)).astype(int) for name in sorted(os.listdir(folder))}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The course's network with two levels: (a model with random weights, a folder with it and noises)."""
    shape = {"channels": [32, 64], "blocks": 1, "attention": [2]}
    monkeypatch.setattr(p3, "COURSE", {**p3.COURSE, **shape})
    torch.manual_seed(0)
    model = p3.UNet(**shape).eval()
    random_weights(model)
    torch.save(model.state_dict(), tmp_path / "UNet.pt")
    call("--mode", "noise", "--size", 16, "--out", tmp_path / "noise")
    return model, tmp_path


def given(folder, mode, *arguments):
    options = ["--noise", folder / "noise", "--ckpt", folder / "UNet.pt", "--device", "cpu"]
    call("--mode", mode, *options, *arguments)


def test_sample_is_the_recipe(tiny):
    """The course's sampler, written independently, from the noise file to the bytes of the PNG."""
    model, folder = tiny
    for i in (1, 2, 3, 4, 5, 6, 9):
        os.remove(folder / "noise" / f"{i:02d}.pt")
    given(folder, "sample", "--out", folder / "out", "--batch-size", 2)
    written = images(folder / "out")
    assert list(written) == ["00.png", "07.png", "08.png"]
    names = ["00", "07", "08"]
    x = torch.cat([torch.load(folder / "noise" / f"{name}.pt", weights_only=True) for name in names])
    for k in range(49, -1, -1):
        t = 1 + 20 * k
        s = max(1 + 20 * (k - 1), 0)
        with torch.no_grad():
            eps = model(x, torch.full((3,), t))
        x0 = torch.clamp((x - np.sqrt(1 - ABAR[t]) * eps) / np.sqrt(ABAR[t]), -1, 1)
        x = np.sqrt(ABAR[s]) * x0 + np.sqrt(1 - ABAR[s]) * eps
    for name, own in zip(names, x):
        own = (own - own.min()) / (own.max() - own.min())
        expected = (own * 255 + 0.5).floor().permute(1, 2, 0).numpy()
        image = written[f"{name}.png"]
        assert image.min() == 0 and image.max() == 255
        assert np.abs(image - expected).max() <= 1 and (image != expected).mean() < 0.01


def test_generate_from_given_noise(tiny):
    _, folder = tiny
    model, settings = p3.load_model(folder / "UNet.pt")
    assert settings.course and settings.prediction == "eps" and settings.size == 256
    noise = torch.randn(3, 3, 16, 16)

    def generate(**options):
        return p3.generate(model, settings, noise, calls=5, **options).int()

    zero = generate()
    half = generate(eta=0.5)
    assert zero.shape == (3, 3, 16, 16) and torch.equal(zero, generate()) and not torch.equal(half, zero)
    one = p3.generate(model, settings, noise[1:2], [(1, 1)], calls=5, eta=0.5).int()
    assert (one - half[1:2]).abs().max() <= 1
    assert (generate(eta=0.5, seed=1) - half).abs().max() > 1


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
    right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert p3.slerp(*right, 1 / 3).tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert torch.lerp(a, b, 0.5).norm() < 0.75 * a.norm()
    assert torch.allclose(p3.slerp(a, a, 0.5), a)
    assert p3.slerp(a.float(), 1.000001 * a.float(), 0.5).isfinite().all()
    assert not p3.slerp(0 * a, 0 * a, 0.5).any()


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
    assert rows.shape == (4, 4, 3, 16, 16) and torch.equal(rows[0], once[0])
    assert torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("mode", ["eta-grid", "interpolate"])
def test_what_can_fail_fails_before_the_images_are_computed(tiny, mode, error, monkeypatch, capsys):
    _, folder = tiny
    (folder / "file").write_text("mine")
    arguments = [folder, mode, "--sample-steps", 2]
    with monkeypatch.context() as patch:
        patch.setattr(p3.UNet, "forward", lambda self, x, t: pytest.fail("the network was called"))
        assert "file" in error(given, *arguments, "--out", folder / "file")
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "matplotlib" in error(given, *arguments, "--out", folder / "figures")
    (folder / "figures").mkdir(exist_ok=True)
    assert os.listdir(folder / "figures") == []


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
    model, folder = tiny
    state = model.state_dict()
    if wrap.endswith("."):
        state = {f"{wrap}{name}": value for name, value in state.items()}
    else:
        state = {"epoch": 3, wrap: state}
    torch.save(state, folder / "UNet.pt")
    found, settings = p3.load_model(folder / "UNet.pt")
    pairs = zip(found.parameters(), model.parameters(), strict=True)
    assert settings.course and all(torch.equal(a, b) for a, b in pairs)


def test_given_weights_that_do_not_fit(tiny, error):
    model, folder = tiny
    state = model.state_dict()
    del state["mid1.attention.norm.bias"]
    torch.save(state, folder / "UNet.pt")
    assert "mid1.attention.norm.bias" in error(given, folder, "sample", "--out", folder / "out")
    assert not (folder / "out").exists()


def test_bad_noise(tiny, error):
    _, folder = tiny
    good = torch.zeros(1, 3, 16, 16)
    nan = good.clone()
    nan[0, 0, 3, 3] = math.nan
    for bad, found in (
        (torch.zeros(1, 3, 17, 16), "found 17x16"),
        (torch.zeros(3, 16, 16), "(3, 16, 16)"),
        (torch.zeros(2, 3, 16, 16), "(2, 3, 16, 16)"),
        (good.double(), "float64"),
        (good.to_sparse(), "sparse"),
        (nan, "not finite"),
        ([1], "list"),
        (torch.zeros(1, 3, 64, 64), "one shape"),
    ):
        torch.save(bad, folder / "noise" / "00.pt")
        assert found in error(given, folder, "sample", "--out", folder / "out")
    torch.save(Hostile(folder / "executed"), folder / "noise" / "00.pt")
    for mode in ("sample", "interpolate", "eta-grid"):
        assert "00.pt: not readable" in error(given, folder, mode, "--out", folder / "out")
    assert not (folder / "out").exists() and not (folder / "executed").exists()
    assert "found 0 files" in error(given, folder, "sample", "--noise", folder / "nothing")


def test_noise_goes_on_where_it_was_stopped(tiny, error):
    """Its own files stay, missing ones are written, any other file is refused before anything is written."""
    _, folder = tiny
    noise = folder / "noise"
    options = ["--mode", "noise", "--size", 16, "--out", noise]
    whole = {path.name: path.read_bytes() for path in noise.iterdir()}
    assert sorted(whole) == [f"{i:02d}.pt" for i in range(10)]
    (noise / "03.pt").unlink()
    kept = (noise / "02.pt").stat().st_mtime_ns
    call(*options)
    assert {path.name: path.read_bytes() for path in noise.iterdir()} == whole
    assert (noise / "02.pt").stat().st_mtime_ns == kept
    (noise / "03.pt").unlink()
    assert "another 00.pt" in error(call, *options, "--seed", 1)
    (noise / "05.pt").write_bytes(b"mine")
    assert "05.pt" in error(call, *options)
    assert (noise / "05.pt").read_bytes() == b"mine" and not (noise / "03.pt").exists()


def test_noise_is_drawn_batch_by_batch(tiny):
    """All at once, these were 78 GB; each has the noise that --mode noise writes."""
    _, folder = tiny
    _, settings = p3.load_model(folder / "UNet.pt")
    noise = p3.StartNoise(parse("--mode", "sample", "--num", 100_000), settings)
    assert len(noise.names) == 100_000 and noise.shape == (3, 256, 256)
    assert noise([99_998, 99_999]).shape == (2, 3, 256, 256)
    few = p3.StartNoise(parse("--mode", "sample", "--size", 16), settings)
    written = torch.load(folder / "noise" / "03.pt", weights_only=True)
    assert torch.equal(few([1, 3])[1:], written)


def test_batches():
    """On a CPU 16 images of 64x64 at a time, one of 256x256 or more; a GPU takes five times as many."""
    args = parse("--mode", "sample", "--device", "cpu")
    for device, side, size in (("cpu", 64, 16), ("cpu", 256, 1), ("cpu", 512, 1), ("cuda", 64, 80)):
        args.device = torch.device(device)
        groups = p3.batches(args, range(100), (3, side, side))
        assert {len(group) for group in groups[:-1]} == {size} and [*groups[0]][0] == 0
        assert sum(len(group) for group in groups) == 100
    args.batch_size = 7
    assert [len(group) for group in p3.batches(args, range(16), (3, 64, 64))] == [7, 7, 2]


# ------------------------------------------------------------------ one's own network


def train(path, n, *more):
    """Trains n steps on random images 16x16; returns the averaged network and the checkpoint."""
    args = parse("--mode", "train", "--steps", n, "--ckpt", path, *TINY, *more)
    return p3.train(args, random_images(8, 16)), torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint of three training steps."""
    path = tmp_path_factory.mktemp("own") / "own.pt"
    train(path, 3)
    return path


def test_what_training_leaves(tmp_path):
    """Network, average and optimiser are in the checkpoint, the loss in its log; load_model: the average."""
    path = tmp_path / "a.pt"
    ema, ckpt = train(path, 3)
    model, settings = p3.load_model(path)
    assert settings.size == 16 and settings.prediction == "v" and not settings.course and not model.training
    for name, value in ema.state_dict().items():
        assert torch.equal(value, ckpt["ema"][name]) and torch.equal(value, model.state_dict()[name])
    assert not torch.equal(ckpt["model"]["down1.weight"], ckpt["ema"]["down1.weight"])
    assert {state["step"].item() for state in ckpt["optim"]["state"].values()} == {3.0}
    rows = (tmp_path / "a.log.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,gradient") and float(rows[1].split(",")[1]) > 0


@pytest.mark.slow
def test_training_learns(tmp_path):
    args = parse("--mode", "train", "--steps", 300, "--ckpt", tmp_path / "a.pt", *TINY, "--batch-size", 8)
    p3.train(args, common.load_faces(None, "train", 16))
    rows = (tmp_path / "a.log.csv").read_text().splitlines()[1:]  # means of 15 steps
    loss = [float(row.split(",")[1]) for row in rows]
    assert sum(loss[-7:]) < 0.7 * sum(loss[:7])


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


def test_guide(own, tmp_path, error):
    """Autoguidance 1 is the network alone, 50 changes the images; a guide that does not fit is refused."""
    train(tmp_path / "guide.pt", 2, "--seed", 1)
    options = ["--ckpt", own, "--device", "cpu", "--precision", "float32", "--sampler", "dpm++"]
    options += ["--sample-steps", 3]

    def sample(name, *guide):
        call("--mode", "sample", "--num", 3, "--out", tmp_path / name, *options, *guide)
        return np.stack(list(images(tmp_path / name).values())).astype(int)

    plain = sample("plain")
    guide = ["--guide", tmp_path / "guide.pt"]
    assert np.abs(sample("one", *guide, "--autoguidance", 1) - plain).max() <= 1
    assert np.abs(sample("far", *guide, "--autoguidance", 50) - plain).max() > 1
    call("--mode", "grid", "--out", tmp_path / "grid", *options, *guide)
    assert sorted(os.listdir(tmp_path / "grid")) == ["first.png", "training.png"]

    def message(path):
        return error(call, "--mode", "sample", "--out", tmp_path / "new", *options, "--guide", path)

    assert "--guide" in message(tmp_path / "none.pt")
    ckpt = torch.load(tmp_path / "guide.pt", weights_only=True)
    ckpt["args"]["size"] = 32
    torch.save(ckpt, tmp_path / "other.pt")
    assert "other.pt" in message(tmp_path / "other.pt")
    assert not (tmp_path / "new").exists()
    assert "--guide" in error(call, "--mode", "invert", "--ckpt", own, *guide)


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


@pytest.mark.slow
def test_inversion_returns_the_image_and_its_noise_interpolates(tmp_path, capsys):
    """With a network of 100 steps: more iterations reconstruct better; the noises interpolate."""
    own = tmp_path / "own.pt"
    call("--mode", "train", "--steps", 100, "--ckpt", own, *TINY)
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


def test_the_file_copied_alone_trains_and_samples(tmp_path, monkeypatch):
    """Without common.py and what is installed for it alone."""
    for name in ("tqdm", "matplotlib", "sklearn", "scipy", "common"):
        monkeypatch.setitem(sys.modules, name, None)
    shutil.copy(ROOT / "p3_ddim.py", tmp_path / "alone.py")
    spec = importlib.util.spec_from_file_location("alone", tmp_path / "alone.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    path = str(tmp_path / "own.pt")
    args = alone.parse_args([str(option) for option in [*TINY, "--steps", 2, "--ckpt", path]])
    before = vars(args).copy()
    alone.train(args, random_images(20, 24))
    assert vars(args) == before
    model, settings = alone.load_model(path)
    assert settings.size == 24
    noise = torch.randn(2, 3, 24, 24)
    assert alone.generate(model, settings, noise, sampler="dpm++", calls=2).shape == (2, 3, 24, 24)
    options = f"--mode sample --ckpt {path} --num 3 --sample-steps 2 --device cpu --out"
    alone.main([*options.split(), str(tmp_path / "faces")])
    assert len(os.listdir(tmp_path / "faces")) == 3


# ------------------------------------------------------------------ options


def test_defaults_follow_mode_and_sampler():
    for mode in ("eta-grid", "interpolate", "grid"):
        assert parse("--mode", mode).out == "p3_figures"
    assert parse("--mode", "eta-grid").eta == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert parse("--mode", "sample").sample_steps == 50
    assert parse("--mode", "sample", "--sampler", "dpm++").sample_steps == 10
    assert parse("--mode", "sample", "--sampler", "dpm++", "--sample-steps", 7).sample_steps == 7
    guided = parse("--mode", "sample", "--guide", "guide.pt")
    assert (guided.sampler, guided.sample_steps, guided.autoguidance) == ("dpm++", 10, 1.4)
    assert (parse("--fast").size, parse("--fast").steps, parse().size) == (32, 1500, 64)
    assert parse("--fast", "--steps", 9).steps == 9 and parse("--mode", "noise").size == 256


@pytest.mark.parametrize(
    "arguments",
    [
        "--size 36 --channels 32 32 32 32",
        "--size 38",
        "--mode noise --size 100",
        "--channels 33",
        "--mode sample --eta 0 1",
        "--eta 2",
        "--sample-steps 501",
        "--sample-steps 30",
        "--mode invert --sampler dpm++",
        "--mode interpolate --eta 0.5",
        "--mode sample --sampler dpm++ --eta 0.5",
    ],
)
def test_wrong_options(arguments, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error(call, *arguments.split())
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ the course's network


def filler(j, shape):
    """r = 2 frac(sin(12.9898 i + 78.233 j) 43758.5453) - 1, float64."""
    v = torch.arange(math.prod(shape), dtype=torch.float64).mul_(12.9898).add_(78.233 * j).sin_()
    v.mul_(43758.5453)
    return v.sub_(v.floor()).mul_(2).sub_(1).view(shape)


def fill(model):
    """The closed-form weights of unet2023_golden.json."""
    state = model.state_dict()
    for j, name in enumerate(n for n in state if n != "time.0.inv_freq"):
        shape = state[name].shape
        r = filler(j, shape)
        if len(shape) >= 2:
            r.mul_(math.sqrt(3 / (math.prod(shape) / shape[0])))
        else:
            scale = ("norm" in name or name == "out.0.weight") and name.endswith("weight")
            r.mul_(0.1).add_(scale)
        state[name].copy_(r)
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
