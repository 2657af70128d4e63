"""p4_dann.py: each line of a training step, augmentation, schedules; the modes and the graders' rules."""

# SPDX-License-Identifier: MIT
import csv
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import common
import p4_dann as p4

TINY = ["--arch", "small", "--batch-size", "8", "--device", "cpu"]


def run(text, *more):
    """p4.main with the words of `text`."""
    p4.main([*text.split(), *map(str, more)])


def parse(text, *more):
    return p4.parse_args([*f"--target svhn --device cpu --precision float32 {text}".split(), *map(str, more)])


def load(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def tensors(n, seed=0):
    """n random images with digits 0 to 9 in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n) % 10


def rig(monkeypatch, name, *values):
    """torch.NAME gives `values` in turn, spread over the shape that it is asked for."""
    values = list(values)

    def rigged(*shape, **_):
        wanted = shape[-1] if isinstance(shape[-1], tuple) else shape
        return torch.as_tensor(values.pop(0)).expand(wanted).clone()

    monkeypatch.setattr(torch, name, rigged)


# ------------------------------------------------------------------ losses and schedules


def test_gradient_reversal():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64)
    y = p4.ReverseGradient.apply(x, 0.7)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y @ w).sin().sum(), x)
    assert torch.allclose(gradient, -0.7 * (x @ w).cos()[:, None] * w, atol=1e-12)


def test_reversal_rises_from_0_to_1():
    assert p4.reversal(0) == 0 and p4.reversal(1) == pytest.approx(0.9999092, abs=1e-7)
    assert p4.reversal(0.1) == pytest.approx(math.tanh(0.5))  # 2 / (1 + e^-10p) - 1 = tanh(5p)


def domain_loss(logits, source, lambda_=1.0, digits=None):
    """p4.domain_loss of a head that gives `logits`, in bfloat16 as under autocast; source: how many."""
    logits = torch.tensor(logits).bfloat16()
    features = torch.zeros(len(logits), 3)
    loss = p4.domain_loss(
        SimpleNamespace(domain=lambda _: logits), features[:source], features[source:], lambda_, digits
    )
    assert loss.dtype == torch.float32
    return loss.item()


def test_domain_loss_by_hand():
    """Source is class 0, target class 1."""
    pair = domain_loss([[0.0, 1.0], [3.0, 1.0], [0.0, 2.0]], 2)
    expected = (math.log1p(math.exp(1)) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-2))) / 3
    assert pair == pytest.approx(expected, rel=1e-5)
    target = domain_loss([[1.0], [-2.0], [0.5]], 2)  # the logit of "target"; that of "source" is 0
    expected = (math.log1p(math.exp(1)) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5))) / 3
    assert target == pytest.approx(expected, rel=1e-5)


def test_domain_loss_by_digit():
    """The pair of logits of an image's digit counts; between two digits it is the weighted mean of theirs."""
    logits = torch.zeros(3, 10, 2)
    logits[0, 3] = torch.tensor([2.0, -1.0])
    logits[1, 7] = torch.tensor([0.5, 4.0])
    logits[2, 1] = torch.tensor([3.0, 0.0])
    logits[2, 2] = torch.tensor([1.0, 8.0])
    digits = torch.zeros(3, 10)
    digits[0, 3] = digits[1, 7] = 1
    digits[2, 1] = 0.75
    digits[2, 2] = 0.25  # (2.5, 2.0)
    loss = domain_loss(logits.flatten(1).tolist(), 1, digits=digits)
    expected = math.log1p(math.exp(-3)) + math.log1p(math.exp(-3.5)) + math.log1p(math.exp(0.5))
    assert loss == pytest.approx(expected / 3, rel=1e-5)


def test_the_domain_head_descends_and_the_features_ascend():
    net = nn.Module()
    net.domain = nn.Linear(2, 1, bias=False)
    nn.init.constant_(net.domain.weight, 1.0)
    source = torch.tensor([[1.0, -1.0]], requires_grad=True)
    target = torch.tensor([[2.0, -2.0]], requires_grad=True)
    p4.domain_loss(net, source, target, 0.25).backward()
    # logits 0: d loss / d logit is sigmoid(0) = 1/2 for source, sigmoid(0) - 1 for target, each over 2 images
    assert torch.allclose(net.domain.weight.grad, (0.25 * source - 0.25 * target).detach())
    assert torch.allclose(source.grad, torch.full((1, 2), -0.25 * 0.25))
    assert torch.allclose(target.grad, torch.full((1, 2), 0.25 * 0.25))


def test_align():
    """Odds are multiplied by (marginal ratio)^-power; a marginal of 0 counts as 0.001."""
    p = torch.tensor([[0.5, 0.4] + [0.1 / 8] * 8, [0.1] * 10])
    marginal = torch.tensor([0.4, 0.1] + [0.5 / 8] * 8)
    assert torch.allclose(p4.align(p, marginal, 0.0), p)
    aligned = p4.align(p, marginal, 0.5)
    assert torch.allclose(aligned.sum(1), torch.ones(2))
    odds = aligned[:, 0] / aligned[:, 1]
    assert torch.allclose(odds, torch.tensor([0.5 / 0.4 / 2, 1 / 2]), rtol=1e-5)
    odds = p4.align(p, torch.eye(10)[0], 0.5)[1]
    assert odds[1] / odds[0] == pytest.approx(1000**0.5, rel=1e-4)


def test_consistency_counts_sure_images_only():
    teacher = torch.tensor([[0.95] + [0.05 / 9] * 9, [0.04, 0.92] + [0.005] * 8, [0.89] + [0.11 / 9] * 9])
    student = torch.randn(3, 10)
    loss, sure = p4.consistency_loss(student, teacher, 0.9)
    log_p = student.log_softmax(1)
    assert loss.item() == pytest.approx(-(log_p[0, 0] + log_p[1, 1]).item() / 3, rel=1e-6)
    assert sure.shape == () and sure.item() == pytest.approx(2 / 3)


class Stub:
    """A network whose features, and logits, are the first ten pixels of an image; it keeps what it saw."""

    def __init__(self):
        self.marginal = torch.tensor([0.55] + [0.05] * 9)
        self.seen = []

    def embed(self, x):
        self.seen.append(x)
        self.with_gradient = torch.is_grad_enabled()
        return x[:, 0, 0, :10]

    def label(self, features):
        return features.bfloat16()  # as under autocast


@pytest.fixture
def step(monkeypatch):
    """step(method, p): the losses of one step of networks that are stubs, and what the parts were given."""

    def step(method, p, adapts=True, report=None):
        calls = SimpleNamespace(model=Stub(), ema=Stub())

        def domain(*given):
            calls.domain = given
            return torch.tensor(7.0)

        def consistency(*given):
            calls.consistency = given
            return torch.tensor(2.0), torch.tensor(0.5)

        monkeypatch.setattr(p4, "strong", lambda x: 2 * x)
        monkeypatch.setattr(p4, "cutout", lambda x: -x)
        monkeypatch.setattr(p4, "augment", lambda x, strength: 10 * strength * x)
        monkeypatch.setattr(p4, "domain_loss", domain)
        monkeypatch.setattr(p4, "consistency_loss", consistency)
        calls.x = torch.arange(2 * 3 * 28 * 28).view(2, 3, 28, 28) % 7 / 4
        calls.u = torch.arange(5 * 3 * 28 * 28).view(5, 3, 28, 28) % 5 / 8
        calls.y = torch.tensor([4, 9])
        args = SimpleNamespace(training=method, domain_weight=1.5)
        function = p4.report_losses if report else p4.losses
        u = calls.u if adapts else None
        calls.losses = function(args, calls.model, calls.ema, calls.x, calls.y, u, p)
        return calls

    return step


def cross_entropy(logits, y):
    return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()


@pytest.mark.parametrize("method, factor", [("source", 1), ("source-aug", 2)])
def test_a_step_on_one_domain(method, factor, step):
    calls = step(method, 0.5, adapts=False)
    assert len(calls.model.seen) == 1 and torch.equal(calls.model.seen[0], factor * calls.x)
    loss, adaptation, sure = calls.losses
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        cross_entropy(factor * calls.x[:, 0, 0, :10], calls.y).item(), rel=1e-5
    )
    assert adaptation == 0 and sure == 0 and calls.ema.seen == []


@pytest.mark.parametrize("method, labelled, student, teacher", [("dann", 1, 1, 1), ("dann-mt", 2, -2, 3)])
def test_a_step_of_adaptation(method, labelled, student, teacher, step):
    """dann sees images as they are; dann-mt sees them augmented, the teacher more gently than the student."""
    calls = step(method, 0.4)
    source, target = calls.model.seen
    assert torch.equal(source, labelled * calls.x) and torch.equal(target, student * calls.u)
    assert len(calls.ema.seen) == 1 and torch.allclose(calls.ema.seen[0], teacher * calls.u)
    assert calls.model.with_gradient and not calls.ema.with_gradient
    probabilities = (teacher * calls.u[:, 0, 0, :10]).bfloat16().float().softmax(1)
    marginal = 0.99 * torch.tensor([0.55] + [0.05] * 9) + 0.01 * probabilities.mean(0)
    assert torch.allclose(calls.ema.marginal, marginal)
    pseudo = probabilities / marginal.sqrt()
    pseudo = pseudo / pseudo.sum(1, keepdim=True)

    model, source_features, target_features, lambda_, digits = calls.domain
    assert model is calls.model and lambda_ == pytest.approx(math.tanh(2))
    assert torch.equal(source_features, source[:, 0, 0, :10])
    assert torch.equal(target_features, target[:, 0, 0, :10])
    assert torch.equal(digits[:2], torch.eye(10)[calls.y]) and torch.allclose(digits[2:], pseudo, atol=1e-5)

    loss, adaptation, sure = calls.losses
    assert loss.item() == pytest.approx(cross_entropy(source[:, 0, 0, :10], calls.y).item(), rel=1e-5)
    if method == "dann":
        assert adaptation == 7 and sure == 0
    else:
        logits, given, threshold = calls.consistency
        assert logits.dtype == torch.float32 and torch.equal(logits, target_features)
        assert torch.allclose(given, pseudo, atol=1e-5) and threshold == 0.9
        assert adaptation.item() == pytest.approx(7 + 1.5 * 2) and sure == 0.5


@pytest.mark.parametrize("p, weight", [(0.0, 0), (0.3, 0), (0.35, 0.75), (0.5, 3), (0.95, 3)])
def test_the_weight_of_the_teacher_rises(p, weight, step):
    assert step("dann-mt", p).losses[1].item() == pytest.approx(7 + weight * 2)


def test_a_step_of_a_report(step):
    """Images as they are, no teacher, a weight of the domain loss."""
    calls = step("dann", 0.4, report="2022c")
    source, target = calls.model.seen
    assert torch.equal(source, calls.x) and torch.equal(target, calls.u) and calls.ema.seen == []
    model, *features, lambda_ = calls.domain
    assert model is calls.model and lambda_ == pytest.approx(math.tanh(2))
    assert torch.equal(features[0], source[:, 0, 0, :10]) and torch.equal(features[1], target[:, 0, 0, :10])
    loss, adaptation, sure = calls.losses
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(source[:, 0, 0, :10], calls.y).item(), rel=1e-5)
    assert adaptation == 1.5 * 7 and sure == 0
    assert [value.item() for value in step("dann", 0.4, adapts=False, report="2022c").losses[1:]] == [0, 0]


def test_the_averaged_network_has_batchnorm_statistics_of_the_target():
    """0.9 old + 0.1 of the batch, in all BatchNorms; the model itself gets those of each pass in turn."""
    torch.manual_seed(0)
    args = parse("--method dann --arch small")
    model, ema = p4.build(args), p4.build(args)
    p4.teaching(ema)
    x = torch.rand(8, 3, 28, 28)
    u = -(torch.rand(8, 3, 28, 28) ** 4)
    seen = []
    ema.features[0][1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    p4.losses(args, model, ema, x, torch.arange(8), u, 0.5)
    assert len(seen) == 1
    mean = seen[0].mean((0, 2, 3))
    assert torch.allclose(ema.features[0][1].running_mean, 0.1 * mean, atol=1e-6)
    assert model.features[0][1].num_batches_tracked == 2 and ema.features[0][1].num_batches_tracked == 1


# ------------------------------------------------------------------ train


def test_update_ema():
    """For 100 steps the plain mean, then 0.99 old + 0.01 new; BatchNorm's statistics are copied on demand."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    nn.init.constant_(model[0].weight, 2.0)
    model[1].running_mean.fill_(5.0)
    for step, expected in ((1, 2.0), (4, 1.25), (50, 1.02), (100, 1.01), (10**6, 1.01)):
        nn.init.constant_(ema[0].weight, 1.0)
        p4.update_ema(ema, model, step, buffers=False)
        assert torch.allclose(ema[0].weight, torch.tensor(expected)) and not ema[1].running_mean.any()
    p4.update_ema(ema, model, 10**6, buffers=True)
    assert ema[1].running_mean.tolist() == [5.0] * 3


@pytest.mark.parametrize("arch", ["deep", "small"])
def test_the_teacher_has_no_dropout(arch):
    net = p4.Net(arch).eval()
    p4.teaching(net)
    for module in net.modules():
        assert module.training != isinstance(module, (nn.Dropout, nn.Dropout2d))


@pytest.mark.parametrize(
    "options, step, rate",
    [
        ("--method dann", 1, 0.01),  # warm-up: a hundredth
        ("--method dann", 50, 0.5 * 1.49**-0.75),
        ("--method dann", 501, 6**-0.75),
        ("--method dann-mt", 50, 0.5 * 0.951),
        ("--method dann-mt", 751, 0.25),
        ("--method source --decay none", 50, 0.5),
        ("--method source --decay none", 999, 1.0),
        ("--method source --decay thirds", 331, 1.0),
        ("--method source --decay thirds", 341, 0.1),
        ("--method source --decay thirds", 661, 0.1),
        ("--method dann-mt --decay thirds", 671, 0.01),
        ("--method dann --report 2022a", 1, 1.0),  # the reports have no warm-up
        ("--method dann --report 2022c", 341, 0.1),
    ],
)
def test_learning_rate(options, step, rate):
    args = parse(f"--lr 3 --source mnistm {options}")
    assert p4.learning_rate(args, step, 1000) == pytest.approx(3 * rate)


@pytest.mark.parametrize("name, kind", [("adamw", "AdamW"), ("adam", "Adam"), ("radam", "RAdam")])
def test_optimizer(name, kind):
    args = parse(f"--optimizer {name} --lr 0.2 --betas 0.3 0.4 --weight-decay 0.6")
    model = nn.Linear(2, 3)
    optim = p4.make_optimizer(args, model)
    (group,) = optim.param_groups
    assert type(optim) is getattr(torch.optim, kind)
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
    assert (group["lr"], *group["betas"], group["weight_decay"]) == (0.2, 0.3, 0.4, 0.6)
    assert name == "radam" or group["fused"]


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """trained(options, target): four steps of train with rigged losses, and what each step was given.

    The class loss is the sum of one layer's weights, the adaptation loss twice that sum: a gradient of 3.
    Image k is full of k, so x says which it is; its label is k % 10.
    """
    images = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 28, 28)

    def last(net):
        return [module for module in net.label.modules() if isinstance(module, nn.Linear)][-1]

    def trained(options, target=None):
        steps = []

        def losses(args, model, ema, x, y, u, p):
            weight = last(model).weight
            now = SimpleNamespace(x=x, y=y, u=u, p=p, weight=weight.detach().clone(), model=model, ema=ema)
            now.ema_weight = last(ema).weight.clone()
            now.bf16 = torch.is_autocast_enabled("cpu")
            now.modes = [[m.training for m in net.modules()] for net in (model, ema)]
            now.training = args.training
            if not steps:
                now.start = {name: value.clone() for name, value in model.state_dict().items()}
                now.ema_start = {name: value.clone() for name, value in ema.state_dict().items()}
            steps.append(now)
            next(b for name, b in model.named_buffers() if "running_mean" in name).fill_(len(steps))
            return weight.sum(), 2 * weight.sum(), torch.tensor(0.5)

        def no_losses(*_):
            raise AssertionError("the losses of other networks")

        args = parse(options, "--steps", 4, "--batch-size", 40, "--ckpt", tmp_path / "a.pt")
        monkeypatch.setattr(p4, "losses", no_losses if args.report else losses)
        monkeypatch.setattr(p4, "report_losses", losses if args.report else no_losses)
        monkeypatch.setattr(
            p4, "make_optimizer", lambda args, model: torch.optim.SGD(model.parameters(), 99.0)
        )
        monkeypatch.setattr(p4, "learning_rate", lambda args, step, steps: 0.1 * step + steps)
        labels = torch.arange(20) % 10
        before = vars(args).copy()
        net = p4.train(args, images, labels, target)
        assert vars(args) == before
        return args, steps, net

    return trained


def test_each_step_of_train(trained):
    target = torch.arange(200, 210, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 28, 28)
    args, steps, net = trained("--method dann --clip inf --seed 5", target)
    numbers = []
    others = []
    for k, now in enumerate(steps):
        assert now.x.shape == now.u.shape == (40, 3, 28, 28) and now.x.dtype == now.u.dtype == torch.float32
        number = (now.x[:, 0, 0, 0] + 1) * 127.5
        other = (now.u[:, 0, 0, 0] + 1) * 127.5
        assert torch.equal(number.round().long() % 10, now.y)
        assert torch.allclose(now.x, (number.round() / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 28, 28))
        numbers += number.round().int().tolist()
        others += other.round().int().tolist()
        assert now.p == k / 4 and not now.bf16 and now.training == "dann"
    assert set(numbers) == set(range(20)) and set(others) == set(range(200, 210))
    assert [n % 10 for n in numbers] != [n % 10 for n in others]  # drawn independently
    assert len({tuple(numbers[i : i + 40]) for i in range(0, 160, 40)}) == 4

    # the weights start from the seed, in both networks, and each step takes 3 times its rate from them
    torch.manual_seed(5)
    start = p4.build(args).state_dict()
    assert equal(steps[0].start, start) and equal(steps[0].ema_start, start)
    weights = [start["label.1.weight"]]
    for k in range(1, 5):
        weights.append(weights[-1] - 3 * (0.1 * k + 4))
    for now, weight in zip(steps, weights):
        assert torch.allclose(now.weight, weight, atol=1e-4)
    # the averaged network is the mean of the networks after each step, and keeps its own BatchNorm statistics
    for k in range(1, 4):
        assert torch.allclose(steps[k].ema_weight, torch.stack(weights[1 : k + 1]).mean(0), atol=1e-4)
    assert torch.allclose(net.label[-1].weight, torch.stack(weights[1:]).mean(0), atol=1e-4)
    assert not net.features[0][1].running_mean.any() and not net.training

    model_modes, ema_modes = steps[2].modes
    assert all(model_modes)
    dropout = [isinstance(module, nn.Dropout) for module in net.modules()]
    assert ema_modes == [not out for out in dropout]
    state = load(args.ckpt)
    assert equal(state["ema"], net.state_dict()) and state["step"] == 4
    assert torch.allclose(state["model"]["label.1.weight"], weights[-1], atol=1e-4)
    assert state["optim"]["param_groups"][0]["lr"] == pytest.approx(4.4)
    columns, row = rows(p4.log_path(args.ckpt))
    assert columns[:5] == ["step", "class_loss", "adaptation_loss", "sure", "gradient"]
    means = torch.stack(weights[:4]).sum((1, 2)).mean().item()
    assert [float(value) for value in row[:4]] == pytest.approx([4, means, 2 * means, 0.5], rel=1e-3)
    assert float(row[4]) == pytest.approx(3 * 2560**0.5, rel=1e-4)


def test_clip(trained):
    """The gradient, 3 in each of 2,560 weights, is scaled down to a norm of 6."""
    _, steps, _ = trained("--method source --clip 6")
    moved = steps[1].weight - steps[0].weight
    assert torch.allclose(moved, torch.full_like(moved, -4.1 * 6 / 2560**0.5), atol=1e-4)


@pytest.mark.parametrize("method", ["source", "source-aug", "target"])
def test_train_without_a_target(method, trained):
    """The averaged network copies the BatchNorm statistics: no batch passes through it."""
    _, steps, net = trained(f"--method {method} --clip inf")
    assert all(now.u is None for now in steps)
    assert steps[0].training == {"target": "source"}.get(method, method)
    assert net.features[0][1].running_mean.tolist() == [4.0] * 32


def test_train_of_a_report(trained):
    """The network of the last step predicts."""
    _, steps, net = trained("--source mnistm --method dann --report 2022b --clip inf", tensors(10)[0])
    assert torch.equal(steps[3].ema_weight, steps[3].weight)
    assert net.features[0][1].running_mean.tolist() == [4.0] * 64 and not net.training


def test_train_in_bf16(trained):
    _, steps, _ = trained("--method source --precision bf16")
    assert all(now.bf16 for now in steps)


def test_settings_of_training():
    """The defaults are those of README's table; a method says what is labelled and what is not."""
    args = parse("")
    assert (args.method, args.training, args.optimizer) == ("dann-mt", "dann-mt", "adamw")
    assert args.decay == "linear" and parse("--decay paper").decay == "paper"
    others = [method for method in p4.METHODS if method != "dann-mt"]
    assert {parse(f"--method {method}").decay for method in others} == {"paper"}
    assert (args.lr, args.betas, args.weight_decay, args.clip) == (1e-3, [0.9, 0.99], 1e-4, 10)
    assert (args.batch_size, args.steps, args.labelled, args.unlabelled) == (64, 2000, "mnistm", "svhn")
    names = {}
    for method in p4.METHODS:
        args = parse(f"--method {method} --source usps --seed 3")
        names[method] = (args.labelled, args.unlabelled, args.name)
    assert names == {
        "source": ("usps", None, "p4_source_usps_deep_3"),
        "source-aug": ("usps", None, "p4_source-aug_usps_deep_3"),
        "dann": ("usps", "svhn", "p4_dann_usps_svhn_deep_3"),
        "dann-mt": ("usps", "svhn", "p4_dann-mt_usps_svhn_deep_3"),
        "target": ("svhn", None, "p4_source_svhn_deep_3"),
    }
    assert parse("--fast").steps == 600


def test_labels_of_the_target_are_not_used():
    def load(*of):
        return f"images of {of}", f"labels of {of}"

    source, target = (None, "mnistm", "train"), ("folder", "svhn", "train")
    images, labels, unlabelled = p4.training_set(parse("--method dann"), load)
    assert (images, labels) == load(*source) and unlabelled == f"images of {(None, 'svhn', 'train')}"
    assert p4.training_set(parse("--method target --data folder"), load) == (*load(*target), None)


@pytest.mark.parametrize(
    "method, images, labels, target, what",
    [
        ("source", torch.zeros(4, 3, 28, 28), torch.zeros(4).long(), None, "images: found torch.float32"),
        ("source", torch.zeros(4, 3, 32, 32).byte(), torch.zeros(4).long(), None, "images: found"),
        ("source", torch.zeros(0, 3, 28, 28).byte(), torch.zeros(0).long(), None, "images: found"),
        ("source", "a folder", torch.zeros(4).long(), None, "images: found str, expected Tensor"),
        ("source", tensors(4)[0].numpy(), tensors(4)[1], None, "images: found ndarray, expected Tensor"),
        ("source", tensors(4)[0], torch.zeros(4), None, "labels: found torch.float32"),
        ("source", tensors(4)[0], torch.full((4,), 10), None, "labels: found"),
        ("source", tensors(4)[0], torch.ones(4).bool(), None, "labels: found torch.bool"),
        ("source", tensors(4)[0], [0, 1, 2, 3], None, "labels: found list, expected Tensor"),
        ("source", tensors(4)[0], torch.tensor([0, 1, -1, 3]), None, "labels: found torch.int64"),
        ("source", tensors(4)[0], torch.tensor([0, 1, 3]), None, "labels: found torch.int64"),
        ("source", tensors(4)[0], torch.tensor([[0], [1], [2], [3]]), None, "labels: found torch.int64"),
        (
            "source",
            *tensors(4),
            tensors(4)[0],
            "target: found Tensor, expected NoneType with --method source",
        ),
        ("dann", *tensors(4), None, "target: found NoneType, expected Tensor with --method dann"),
        ("dann", *tensors(4), torch.zeros(4, 3, 28, 28), "target: found torch.float32"),
        ("dann", *tensors(4), tensors(4)[0].numpy(), "target: found ndarray, expected Tensor"),
    ],
)
def test_tensors_that_cannot_be_trained_on(method, images, labels, target, what, tmp_path):
    args = parse(f"--method {method} --ckpt {tmp_path / 'a.pt'}")
    with pytest.raises(ValueError, match=what):
        p4.train(args, images, labels, target)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize("pairs, parameters", [(1, 611_788), (10, 614_110)])
def test_our_network(pairs, parameters):
    """Shapes after each block of the features, and the rates of dropout."""
    net = p4.Net(pairs=pairs).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert f"{parameters:,} parameters" in p4.Net.__doc__
    shapes = []
    for module in net.features:
        if not isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    features = net.embed(torch.rand(2, 3, 28, 28))
    assert shapes == [
        *[(32, 28, 28), (32, 14, 14), (64, 14, 14), (64, 14, 14), (64, 7, 7)],
        *[(128, 7, 7), (128, 7, 7), (128, 3, 3), (256, 3, 3), (256, 1, 1), (256,)],
    ]
    assert net.label(features).shape == (2, 10) and net.domain(features).shape == (2, 2 * pairs)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25, 0.5]
    kinds = [[type(module) for module in block] for block in (net.features[0], net.domain)]
    assert kinds[0] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds[1] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert torch.allclose(net.marginal, torch.full((10,), 0.1))
    assert net.views is False and net.report is False and p4.Net().domain[-1].out_features == 2


def test_padding_of_a_convolution():
    assert p4.conv(3, 4, 5)(torch.rand(2, 3, 9, 9)).shape == (2, 4, 5, 5)
    assert p4.conv(3, 4, 5, padding=2)(torch.rand(2, 3, 9, 9)).shape == (2, 4, 9, 9)


def test_our_input_is_grey_standardised_and_noisy_in_training():
    torch.manual_seed(0)
    net = p4.Net()
    net.features = nn.Identity()
    x = torch.rand(3, 3, 28, 28) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1) - 0.4
    grey = x.numpy().astype(np.float64).mean(1)
    expected = (grey - grey.mean((1, 2), keepdims=True)) / (grey.std((1, 2), ddof=1, keepdims=True) + 0.05)
    quiet = net.eval().embed(x)
    assert quiet.shape == x.shape and torch.equal(quiet[:, 0], quiet[:, 2])
    assert np.allclose(quiet[:, 0].numpy(), expected, atol=1e-4)
    noise = net.train().embed(x) - quiet
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert noise[:, 0].std().item() == pytest.approx(0.1, rel=0.05) and abs(noise.mean()) < 0.01


@pytest.mark.parametrize(
    "report, direction, size", [("2022b", "mnistm svhn", 28), ("2021", "mnistm usps", 64)]
)
def test_input_of_the_reports_is_rgb_as_it_is(report, direction, size):
    source, target = direction.split()
    net = p4.build(
        p4.parse_args(f"--report {report} --source {source} --target {target} --device cpu".split())
    )
    net.features = nn.Identity()
    x = torch.rand(2, 3, 28, 28)
    expected = F.interpolate(x, (size, size), mode="bilinear")
    assert torch.equal(net.train().embed(x), expected) and (size == 64 or torch.equal(expected, x))


def test_six_views():
    """The channels and their differences, each as a grey image; the network takes the mean of the logits."""
    x = torch.rand(2, 3, 28, 28) * 2 - 1
    r, g, b = x[:, 0], x[:, 1], x[:, 2]
    views = p4.colour_views(x).view(6, 2, 3, 28, 28)
    for view, expected in zip(views, (r, g, b, r - g, r - b, g - b)):
        for channel in range(3):
            assert torch.equal(view[:, channel], expected)
    torch.manual_seed(0)
    net = p4.Net(views=True).eval()
    with torch.inference_mode():
        each = torch.stack([net.label(net.embed(view)) for view in views])
        assert torch.allclose(net(x), each.mean(0), atol=1e-5)
        net.views = False
        assert torch.allclose(net(x), net.label(net.embed(x)), atol=1e-5)


@pytest.mark.parametrize("method", p4.METHODS)
def test_build(method):
    net = p4.build(parse(f"--method {method}"))
    assert net.domain[-1].out_features == (20 if method == "dann-mt" else 2)
    assert net.views == (method in ("source-aug", "dann-mt")) and not net.report
    assert net.features[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_parameter_counts_of_other_networks():
    counts = {arch: sum(p.numel() for p in p4.Net(arch).parameters()) for arch in ("small", "paper")}
    assert counts == {"small": 355_164, "paper": 976_651}
    with pytest.raises(ValueError, match="expected deep, small, paper"):
        p4.Net("vgg")


# ------------------------------------------------------------------ augmentation


def test_mixture_of_channels(monkeypatch):
    """Uniform over the convex mixtures: a channel's share w has mean 1/3 and P(w > t) = (1 - t)^2."""
    torch.manual_seed(0)
    red = torch.tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1).expand(4000, 3, 4, 4)
    y = p4.augment(red, 0.0)
    assert y.shape == red.shape and torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    share = y[:, 0, 1, 1].abs() / 0.5
    assert share.mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert (share > 0.5).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (y[:, 0, 1, 1] < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)  # negatives
    rig(monkeypatch, "rand", torch.tensor([0.0, 1e-3, 0.5]).view(3, 1, 1), 0.5, 0.9)  # log(0) is no number
    assert p4.augment(red[:2], 0.0)[0, 0, 1, 1].item() == pytest.approx(
        0.5 * 6 / (6 + 3 + math.log10(2)), rel=1e-4
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("neighbours", [False, True])
def test_nothing_comes_from_outside_of_an_image(neighbours):
    torch.manual_seed(0)
    y = p4.augment(torch.full((200, 3, 28, 28), 0.5), 2.0, neighbours)
    assert torch.allclose(y.abs(), torch.tensor(0.5), atol=1e-5)


def test_affine_map(monkeypatch):
    """At strength 1: 0.25 radian, e^0.3 in each direction, shear 0.3, a shift of 0.15 half images."""
    given = []
    original = F.affine_grid

    def affine_grid(theta, *more, **options):
        given.append(theta)
        return original(theta, *more, **options)

    monkeypatch.setattr(F, "affine_grid", affine_grid)
    u = torch.full((6, 8), 0.5)
    for i in range(6):
        u[i, i] = 1.0
    u[:, 6] = 1.0
    u[:, 7] = torch.tensor([0.0, 0.0, 0.75, 0.0, 0.0, 0.25])
    rig(monkeypatch, "rand", 0.5, u, 0.9, 0.5, u, 0.9)
    for strength in (1.0, 0.5):
        p4.augment(torch.zeros(8, 3, 28, 28), strength)
    for strength, theta in zip((1.0, 0.5), given):
        for i in range(8):
            angle, wide, high, shear, dx, dy = (
                strength * (2 * u[:, i] - 1) * torch.tensor([0.25, 0.3, 0.3, 0.3, 0.15, 0.15])
            ).tolist()
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            linear = turn @ np.diag([math.exp(wide), math.exp(high)]) + [[0, shear], [0, 0]]
            expected = np.concatenate([linear, [[dx], [dy]]], 1)
            assert np.allclose(theta[i].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shift_by_one_pixel(axis, monkeypatch):
    """What leaves on one side; the border is reflected."""
    x = torch.rand(2, 1, 28, 28).expand(-1, 3, -1, -1)
    u = torch.full((6, 2), 0.5)
    u[5 - axis] = 0.5 + (2 / 28) / 0.3
    rig(monkeypatch, "rand", 0.5, u, 0.9)
    y = p4.augment(x, 1.0)
    dim = 2 + axis
    expected = torch.cat([x.narrow(dim, 1, 27), x.narrow(dim, 27, 1)], dim)
    assert torch.allclose(y, expected, atol=1e-5)
    rig(monkeypatch, "rand", 0.5, u, 0.1)
    assert torch.allclose(p4.augment(x, 1.0), -expected, atol=1e-5)


@pytest.mark.parametrize("draw, pitch", [(0, 20), (2, 24), (4, 28)])
def test_neighbours(draw, pitch, monkeypatch):
    """The middle of the image, `pitch` wide, between those of the two images before it."""
    x = torch.rand(4, 1, 28, 28).expand(-1, 3, -1, -1)
    alone = torch.tensor([0.1, 0.9, 0.9, 0.1]).view(4, 1, 1, 1)
    u = torch.full((6, 4), 0.5)
    u[5] = 0.5 + (2 / 28) / 0.3  # down by one pixel
    rig(monkeypatch, "rand", 0.5, u, alone, 0.9)
    rig(monkeypatch, "randint", draw)
    y = p4.augment(x, 1.0, neighbours=True)[:, 0]
    x = torch.cat([x[:, 0, 1:], x[:, 0, 27:]], 1)
    margin = (28 - pitch) // 2
    for i in (0, 3):
        assert torch.allclose(y[i], x[i], atol=1e-5)
    for i in (1, 2):
        assert torch.allclose(y[i, :, margin : 28 - margin], x[i, :, margin : 28 - margin], atol=1e-4)
        if margin:
            left, right = x[i - 1], x[i - 2]
            assert torch.allclose(y[i, :, :margin], left[:, 28 - 2 * margin : 28 - margin], atol=1e-4)
            assert torch.allclose(y[i, :, 28 - margin :], right[:, margin : 2 * margin], atol=1e-4)


def test_pitches_and_how_often():
    torch.manual_seed(0)
    levels = torch.linspace(0.1, 0.9, 50)
    x = levels.view(-1, 1, 1, 1).expand(-1, 3, 28, 28)
    widths = []
    alone = []
    for _ in range(60):
        y = p4.augment(x, 0.0, neighbours=True)[:, 0, 0].abs()
        own = ((y - levels[:, None]).abs() < 1e-4).sum(1)  # pixels of the first row that are the image's own
        widths.append(own.min().item())
        if widths[-1] < 28:
            alone.append((own == 28).float().mean().item())
    assert {w: widths.count(w) > 4 for w in widths} == dict.fromkeys((20, 22, 24, 26, 28), True)
    assert np.mean(alone) == pytest.approx(0.5, abs=0.05)


def test_cutout(monkeypatch):
    """Centres (14, 7) and (28, 0): 9 rows of 9 columns, and the part that lies within the image."""
    x = torch.rand(2, 3, 28, 28)
    rig(monkeypatch, "rand", torch.tensor([[0.5, 0.25], [1.0, 0.0]]).view(2, 2, 1, 1))
    y = p4.cutout(x)
    expected = x.clone()
    expected[0, :, 10:19, 3:12] = x[0].mean()
    expected[1, :, 24:, :5] = x[1].mean()
    assert torch.allclose(y, expected)
    monkeypatch.undo()
    torch.manual_seed(0)
    hidden = (p4.cutout(x[:1].expand(2000, -1, -1, -1)) != x[0])[:, 0].float().mean(0)
    assert hidden[5:23, 5:23].mean().item() == pytest.approx(100 / 784, rel=0.1)  # centres all over the image


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_random_convolution(share, monkeypatch):
    """A kernel of 2r + 1 pixels for each; mean and deviation of the image, then a mixture with it."""
    torch.manual_seed(0)
    x = (torch.rand(5, 1, 28, 28) - 0.3).expand(-1, 3, -1, -1)
    kernels = torch.randn(5, 1, 7, 7)
    chosen = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.9]).view(5, 1, 1, 1)
    rig(monkeypatch, "randn", kernels)
    rig(monkeypatch, "randint", torch.tensor([0, 1, 2, 3, 3]).view(5, 1, 1, 1))
    rig(monkeypatch, "rand", share, chosen)
    y = p4.random_convolution(x)
    assert y.shape == x.shape and torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    assert torch.equal(y[4], x[4])
    for r in range(4):
        image = x[r : r + 1, :1]
        kernel = kernels[r : r + 1, :, 3 - r : 4 + r, 3 - r : 4 + r]
        z = F.conv2d(F.pad(image, (r, r, r, r), "reflect"), kernel).double()
        z = image.mean() + (z - z.mean()) * image.std().double() / (z.std() + 1e-3)
        expected = (1 - share) * image + share * z
        assert torch.allclose(y[r, 0].double(), expected[0, 0], atol=2e-5)


def test_random_convolution_of_many():
    """Half of the images; kernels of 1, 3, 5 and 7 pixels; float32 from bfloat16, as under autocast."""
    torch.manual_seed(0)
    x = torch.zeros(400, 3, 28, 28).bfloat16()
    x[:, :, 14, 14] = 1  # a point becomes the kernel
    y = p4.random_convolution(x)[:, 0]
    assert y.dtype == torch.float32
    touched = (y - y[:, :1, :1]).abs() > 1e-6
    width = touched[:, 14].sum(1)
    unchanged = torch.tensor([torch.equal(a, b) for a, b in zip(y, x[:, 0].float())])
    assert unchanged.float().mean().item() == pytest.approx(0.5, abs=0.06)
    counts = [(width[~unchanged] == w).float().mean().item() for w in (1, 3, 5, 7)]
    assert counts == pytest.approx([0.25] * 4, abs=0.08)


def test_strong(monkeypatch):
    calls = []

    def augment(*given, **more):
        calls.append((given, more))
        return "augmented"

    monkeypatch.setattr(p4, "augment", augment)
    monkeypatch.setattr(p4, "random_convolution", lambda x: f"{x} and another texture")
    assert p4.strong("images") == "augmented and another texture"
    assert calls == [(("images", 1.0), {"neighbours": True})]


# ------------------------------------------------------------------ predict


class Fixed(nn.Module):
    """The same logits for every image, which it keeps."""

    def __init__(self, **logits):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))
        for digit, logit in logits.items():
            self.logits.data[int(digit[1])] = logit
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.logits.expand(len(x), 10)


def test_vote():
    images = torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    two = [Fixed(d2=1.0), Fixed(d2=1.0)]
    assert p4.predict([*two, Fixed(d7=9.0)], images).tolist() == [2, 2, 2]  # two votes beat one sure network
    assert p4.predict([Fixed(d2=1.0), Fixed(d7=9.0)], images).tolist() == [7, 7, 7]  # a tie: the surer one
    # the mean of the probabilities decides, not that of the logits: 0.98 and 0.003 beat 0.003 and 0.95
    sure = Fixed(d1=12.0, d3=-90.0)
    other = Fixed(d1=0.0, d3=8.0)
    assert p4.predict([sure, other], images).tolist() == [1, 1, 1]


def test_predict_sees_each_image_once_in_minus_1_to_1():
    images = torch.zeros(250, 3, 28, 28, dtype=torch.uint8)
    images[:, 1] = 255
    images[:, 2] = 51
    images[:, :, 0, 0] = torch.arange(250, dtype=torch.uint8)[:, None]
    net = Fixed(d4=1.0)
    for form in (images, images.numpy()):
        net.seen.clear()
        assert p4.predict(net, form).tolist() == [4] * 250
        x = torch.cat(net.seen)
        assert torch.allclose(x[:, :, 5, 5], torch.tensor([-1.0, 1.0, -0.6]).expand(250, 3))
        assert torch.allclose(x[:, 0, 0, 0], torch.arange(250) / 127.5 - 1)


def test_prediction_does_not_depend_on_batch_or_order():
    torch.manual_seed(0)
    net = p4.Net("small")
    images, _ = tensors(230)
    for module in net.modules():
        module.momentum = 1.0
    net.embed(images / 127.5 - 1)  # else BatchNorm passes on what all images have in common
    net.eval()
    whole = p4.predict([net], images)
    order = torch.randperm(230)
    assert torch.equal(p4.predict([net], images[order]), whole[order]) and len(set(whole.tolist())) > 1
    assert torch.equal(torch.cat([p4.predict([net], b) for b in images[:60].split(7)]), whole[:60])


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 28, 28), torch.zeros(0, 3, 28, 28).byte(), "a folder", [1], None, 3]
)
def test_images_that_cannot_be_predicted(images):
    with pytest.raises(ValueError, match=r"images: found .*, expected uint8 \(N, 3, 28, 28\)"):
        p4.predict(Fixed(), images)


def test_accuracy():
    assert p4.accuracy(Fixed(d3=1.0), tensors(20)[0][:8], torch.tensor([3, 3, 1, 3, 2, 5, 6, 7])) == 3 / 8


# ------------------------------------------------------------------ --mode predict and eval


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A small network after two steps towards SVHN."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    args = parse("--method dann --arch small --batch-size 8 --steps 2 --ckpt", path)
    p4.train(args, *tensors(20), tensors(20, 1)[0])
    return path


@pytest.fixture(scope="module")
def state(ckpt):
    return load(ckpt)


def saved(path, state, **changes):
    """A checkpoint with some of its entries changed."""
    torch.save({**state, **changes}, path)
    return path


def settings(state, **changes):
    return {**state["args"], **changes}


@pytest.fixture
def folder(tmp_path):
    """Ten random images as digits/svhn/test/NNNNN.png."""
    path = tmp_path / "digits" / "svhn" / "test"
    path.mkdir(parents=True)
    for i, image in enumerate(tensors(10)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:05d}.png")
    return path


def rows(path):
    with open(path, newline="") as f:
        return list(csv.reader(f))


def predicted(ckpts, folder, out, *options):
    words = ["--input", folder, "--out", out, "--ckpt", *np.atleast_1d(ckpts), *options]
    run("--mode predict --device cpu", *words)
    return rows(out)


def test_predictions_follow_the_graders_format(ckpt, folder, tmp_path):
    out = tmp_path / "sub dir" / "pred.csv"
    table = predicted(ckpt, folder, out)
    assert table[0] == ["image_name", "label"]
    assert [name for name, _ in table[1:]] == sorted(os.listdir(folder))
    model, _ = p4.load_model(ckpt)
    assert [int(label) for _, label in table[1:]] == p4.predict(model, tensors(10)[0]).tolist()
    assert b"\r" not in out.read_bytes() and os.listdir(out.parent) == ["pred.csv"]


def test_vote_of_checkpoints(ckpt, state, folder, tmp_path):
    one = predicted(ckpt, folder, tmp_path / "one.csv")
    digit = (int(one[1][1]) + 1) % 10
    assert "label.5.3.bias" in state["ema"]
    weights = {**state["ema"], "label.5.3.bias": torch.eye(10)[digit] * 1e4}
    other = saved(tmp_path / "other.pt", state, ema=weights)  # sees this digit alone
    two = predicted(other, folder, tmp_path / "one.csv")
    assert one != two and predicted([ckpt, other, other], folder, tmp_path / "three.csv") == two


@pytest.mark.parametrize(
    "path, domain",
    [
        ("/x/digits", None),
        ("/x/digits/svhn/test", "svhn"),
        ("/mnistm/usps", "usps"),
        ("/a/USPS/data/svhn_test", "svhn"),
        ("/d/mnist-m/val", "mnistm"),
        ("/usps/mnistm_svhn/a", "usps"),
    ],
)
def test_domain_of_path(path, domain):
    assert p4.domain_of(path) == domain


def test_the_path_names_the_weights(tmp_path, error, monkeypatch):
    """The course's source of the target that --input names; else --target or --ckpt is needed."""
    monkeypatch.chdir(tmp_path)
    for domain, source in p4.SOURCE.items():
        args = p4.parse_args(["--mode", "predict", "--input", f"digits/{domain}/test"])
        assert os.path.basename(args.ckpt) == f"p4_dann-mt_{source}_{domain}_deep_0.pt"
        assert args.target == domain
    assert "pass --target or --ckpt" in error(run, "--mode predict --input", "images")
    assert "needs --input" in error(run, "--mode predict")


def test_images_are_read_as_all_scripts_read_them(ckpt, folder, tmp_path, capsys):
    """Every mode and size gives common.read_image's pixels; damaged and hidden files do not stop the rest."""
    digit = Image.open(folder / "00003.png").convert("L")
    grey = np.asarray(digit)
    mixed = tmp_path / "svhn"
    mixed.mkdir()
    files = {
        "a.png": digit,
        "b.png": digit.convert("RGB"),
        "d.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "g.bmp": digit.resize((56, 56), Image.Resampling.NEAREST),
        "i.tif": digit.convert("CMYK"),
    }
    for name, image in files.items():
        image.save(mixed / name)
    (mixed / "notes.txt").write_text("mine")
    (mixed / "damaged.png").write_bytes((mixed / "b.png").read_bytes()[:100])
    (mixed / "._a.png").write_bytes(b"\0\5\26\7")
    names, images = p4.read_folder(mixed)
    assert names == list(files) and images.shape == (5, 3, 28, 28)
    for name, image in zip(names, images):
        assert np.array_equal(common.read_image(mixed / name, (28, 28)), image.permute(1, 2, 0).numpy())
    assert torch.equal(images[0], images[1])
    err = capsys.readouterr().err
    assert err.count("skipped") == 1 and "damaged.png" in err and "notes.txt" in err and "._a.png" not in err
    assert len(predicted(ckpt, mixed, tmp_path / "pred.csv")) == 6


def test_warns_of_another_target(ckpt, folder, tmp_path, capsys):
    predicted(ckpt, folder, tmp_path / "a.csv")
    assert capsys.readouterr().err == ""
    predicted(ckpt, folder, tmp_path / "b.csv", "--target", "usps")
    assert "was adapted to svhn, the images are of usps" in capsys.readouterr().err


def test_bad_folders(ckpt, folder, tmp_path, error):
    def message(path):
        return error(predicted, ckpt, path, tmp_path / "pred.csv")

    empty = tmp_path / "usps"
    empty.mkdir()
    assert "found no image" in message(empty)
    assert "no such folder" in message(tmp_path / "svhn_none")
    pictures = shutil.copytree(folder, tmp_path / "pictures")  # a named checkpoint needs no named domain
    assert len(predicted(ckpt, pictures, tmp_path / "pred.csv")) == 11
    new = tmp_path / "new.pt"
    assert "looked for" in error(run, f"--mode train --data {tmp_path / 'digits'} --ckpt {new}")
    assert not new.exists()


def test_eval_reads_what_predict_wrote_of_any_name(ckpt, tmp_path, capsys):
    folder = tmp_path / "usps"
    folder.mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", os.fsencode(folder) + b"/\xff.png")
    csv = tmp_path / "pred.csv"
    run(f"--mode predict --device cpu --input {folder} --ckpt {ckpt} --out {csv}")
    run(f"--mode eval --input {csv} --gt {csv}")
    assert "Accuracy: 1/1 " in capsys.readouterr().out


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("label", ["3.0", "tensor(3)", "03", " 3"])
def test_eval_says_which_labels_are_no_digits(label, tmp_path, capsys):
    for name, first in (("plain.csv", "3"), ("odd.csv", label)):
        (tmp_path / name).write_text(f"image_name,label\na.png,{first}\nb.png,3\n")
    for predictions, truth in (("odd.csv", "plain.csv"), ("plain.csv", "odd.csv")):
        p4.main(["--mode", "eval", "--input", str(tmp_path / predictions), "--gt", str(tmp_path / truth)])
        captured = capsys.readouterr()
        assert captured.out == "Accuracy: 1/2 (50.00%)\n"  # the grader's
        assert f"odd.csv: 1 of 2 labels are no plain digits ({label!r})" in captured.err


def test_eval_follows_the_2021_grader(tmp_path, capsys, error):
    """Names and labels are text, the count runs over the predicted rows, the last of two rows counts."""
    text = "image_name,label\n00000.png,7\n00001.png,3\n00002.png,5\n00003.png,1\n"
    gt = write(tmp_path / "gt.csv", text)

    def score(text):
        run(f"--mode eval --input {write(tmp_path / 'pred.csv', text)} --gt {gt}")
        captured = capsys.readouterr()
        return captured.out.strip(), captured.err

    def message(text):
        path = write(tmp_path / "bad.csv", text)
        return error(run, f"--mode eval --input {path} --gt {gt}")

    whole = "image_name,label\n00003.png,1\n00000.png,7\n00001.png,3\n00002.png,4\n"
    assert score(whole) == ("Accuracy: 3/4 (75.00%)", "")
    wide = "image_name,label,sure\n00003.png,1,1\n00000.png,7,1\n00001.png,3,0\n00002.png,5,1\n"
    assert score(wide) == ("Accuracy: 4/4 (100.00%)", "")
    out, err = score("image_name,label\n00000.png,7\n00001.png,3\n00002.png,4\n")
    assert out == "Accuracy: 2/3 (66.67%)" and "3 rows for 3 of 4 images" in err
    out, err = score("image_name,label\n00000.png,1\n00000.png,7\n")
    assert out == "Accuracy: 1/1 (100.00%)" and "2 rows for 1 of 4 images" in err
    mismatch = 'error: Item mismatch: "9.png" does not exist in the provided ground truth file.'
    assert message("image_name,label\n9.png,7\n") == mismatch
    assert "found name,label in its first line, expected image_name,label" in message("name,label\na,1\n")
    assert "found nothing in its first line" in message("")
    assert "found a row '00001.png'" in message("image_name,label\n00000.png,7\n00001.png\n")
    assert "no predictions" in message("image_name,label\n")
    assert "needs --gt" in error(run, f"--mode eval --input {gt}")
    assert "cannot be read" in error(run, f"--mode eval --input {tmp_path / 'none.csv'} --gt {gt}")


# ------------------------------------------------------------------ --mode train, table and tsne


@pytest.fixture
def digits(monkeypatch):
    """Each domain has 30 random images of its own for training and 20 for validation."""

    def load_digits(root, domain, split):
        assert root is None
        return tensors(30 if split == "train" else 20, p4.DOMAINS.index(domain))

    monkeypatch.setattr(common, "load_digits", load_digits)


@pytest.mark.usefixtures("digits")
def test_mode_train(tmp_path, capsys):
    path = tmp_path / "a.pt"
    run(f"--mode train --method dann --target svhn --steps 1 --ckpt {path}", *TINY)
    model, args = p4.load_model(path)
    assert (args.labelled, args.unlabelled, args.training) == ("mnistm", "svhn", "dann")
    share = 100 * p4.accuracy(model, *tensors(20, 1))
    assert f"svhn val accuracy {share:.2f} % (20 images" in capsys.readouterr().out


def table(tmp_path, *more):
    text = f"--mode table --ckpt {tmp_path / 'nets'} --out {tmp_path / 'table'} --device cpu --batch-size 8"
    run(text, *more)


@pytest.mark.usefixtures("digits")
def test_table(tmp_path, capsys):
    options = ["--scenarios", "mnistm-usps", "svhn-usps", "--seeds", "0", "1", "0", "--steps", "2"]
    options += ["--arch", "small"]
    table(tmp_path, *options, "--methods", "source", "target")
    nets = sorted((tmp_path / "nets").glob("*.pt"))
    expected = [f"p4_source_{d}_small_{s}.pt" for d in ("mnistm", "svhn", "usps") for s in (0, 1)]
    assert [path.name for path in nets] == expected
    torch.save({**load(nets[0]), "step": 1}, nets[0])  # interrupted: is gone on with
    torch.save({key: value for key, value in load(nets[1]).items() if key != "rng"}, nets[1])  # weights alone
    times = [path.stat().st_mtime_ns for path in nets]
    capsys.readouterr()
    table(tmp_path, *options, "--methods", "source", "dann", "target")
    text = capsys.readouterr().out
    assert load(nets[0])["step"] == 2
    assert [path.stat().st_mtime_ns for path in nets[1:]] == times[1:]  # what is there is not trained again
    assert re.search(r"\| Trained on source \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|", text)
    assert (tmp_path / "table" / "table.md").read_text(encoding="utf-8").strip() in text
    results = json.loads((tmp_path / "table" / "table.json").read_text())
    assert list(results) == ["source", "dann", "target"] and "mnistm → usps (20)" in text
    cells = results["dann"]["svhn-usps"]
    assert [cell["seed"] for cell in cells] == [0, 1]
    assert cells[1]["ckpt"] == str(tmp_path / "nets" / "p4_dann_svhn_usps_small_1.pt")
    assert cells[1]["accuracy"] == p4.accuracy(p4.load_model(cells[1]["ckpt"])[0], *tensors(20, 2))
    assert results["target"]["mnistm-usps"] == results["target"]["svhn-usps"]


def test_mean_and_sd():
    assert p4.mean_and_sd([{"accuracy": 0.5}]) == "50.0"
    assert p4.mean_and_sd([{"accuracy": a} for a in (0.5, 0.52, 0.54)]) == "52.0 ± 2.0"


@pytest.mark.usefixtures("digits")
def test_table_refuses_other_networks_before_it_trains(tmp_path, error, monkeypatch):
    options = ["--scenarios", "mnistm-usps", "--seeds", "0"]
    table(tmp_path, *options, "--steps", "1", "--methods", "dann-mt")
    path = tmp_path / "nets" / "p4_dann-mt_mnistm_usps_deep_0.pt"
    assert "steps 3 (checkpoint: 1)" in error(table, tmp_path, *options, "--steps", "3")
    state = load(path)
    alone = {key: value for key, value in state.items() if key != "rng"}  # as in .weights/
    torch.save({**alone, "args": {**state["args"], "lr": 5.0, "unlabelled": "svhn"}}, path)
    found = error(table, tmp_path, *options, "--steps", "3")
    assert "unlabelled usps (checkpoint: svhn)" in found and "lr" not in found and "steps" not in found
    torch.save({**state, "ema": {**state["ema"], "marginal": torch.full((10,), math.nan)}}, path)
    assert "1 weights are not finite" in error(table, tmp_path, *options, "--steps", "1")
    path.write_bytes(b"damaged")
    assert str(path) in error(table, tmp_path, *options, "--steps", "1")
    assert [p.name for p in (tmp_path / "nets").glob("*.pt")] == [path.name]


def test_table_sees_that_it_cannot_write_before_it_trains(tmp_path, error):
    (tmp_path / "table").write_text("a file")
    assert str(tmp_path / "table") in error(table, tmp_path, "--steps", "2")
    assert not (tmp_path / "nets").exists()


@pytest.mark.usefixtures("digits")
def test_tsne(ckpt, tmp_path, capsys):
    run(f"--mode tsne --ckpt {ckpt} --out {tmp_path} --num 40 --device cpu")
    names = ["tsne_mnistm_svhn_dann_digit.png", "tsne_mnistm_svhn_dann_domain.png"]
    assert sorted(os.listdir(tmp_path)) == names
    for name, colours in zip(names, (8, 2)):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        plot = pixels[100:-100, 100:700]
        coloured = np.ptp(plot, axis=2) > 40
        assert coloured.mean() > 0.001 and len(np.unique(plot[coloured] // 32, axis=0)) >= colours
    assert re.search(r"proxy A-distance \d\.\d", capsys.readouterr().out)


def test_tsne_draws_the_domains_of_the_checkpoint():
    """USPS to SVHN, not the course's MNIST-M to SVHN; options that say otherwise are refused."""
    adapted = SimpleNamespace(training="dann", labelled="usps", unlabelled="svhn")
    alone = SimpleNamespace(training="source", labelled="usps", unlabelled=None)

    def drawn(settings, source=None, target=None):
        return p4.drawn_domains(SimpleNamespace(source=source, target=target, ckpt="a.pt"), settings)

    assert drawn(adapted) == drawn(adapted, target="svhn") == drawn(alone, "usps", "svhn") == ("usps", "svhn")
    assert drawn(alone, "mnistm", "usps") == ("mnistm", "usps")
    assert drawn(alone, None, "svhn") == ("usps", "svhn") and drawn(alone, "svhn") == ("svhn", "usps")
    for named in (("mnistm", "svhn"), (None, "usps")):
        with pytest.raises(
            ValueError, match=r"expected two domains, with those of a.pt \(dann, usps to svhn\)"
        ):
            drawn(adapted, *named)
    for named in ((None, None), (None, "usps"), ("mnistm", "svhn"), ("usps", "usps")):
        with pytest.raises(
            ValueError, match=r"expected two domains, with those of a.pt \(source, usps alone\)"
        ):
            drawn(alone, *named)


def test_tsne_sees_what_is_missing_before_it_computes(ckpt, tmp_path, error, monkeypatch):
    def computes(*_, **__):
        raise AssertionError("tsne computed before it looked")

    monkeypatch.setattr(p4, "load_model", computes)
    text = f"--mode tsne --ckpt {ckpt} --out {tmp_path / 'out'}"
    for name in ("sklearn.manifold", "matplotlib"):
        with monkeypatch.context() as patch:
            for module in list(sys.modules):
                if module.split(".")[0] == "matplotlib":
                    patch.delitem(sys.modules, module)
            patch.setitem(sys.modules, name, None)
            assert "pip install" in error(run, text)


def test_a_distance():
    a, b = np.random.default_rng(0).normal(size=(2, 400, 5))
    assert p4.a_distance(a, b) < 0.3 and p4.a_distance(a, b + 5) > 1.95


@pytest.mark.slow
def test_adaptation_beats_source_only_on_the_built_in_digits(tmp_path):
    images, labels = common.load_digits(None, "svhn", "val")
    accuracy = {}
    for method in ("source", "dann-mt"):
        path = tmp_path / f"{method}.pt"
        run(f"--mode train --target svhn --method {method} --fast --device cpu --ckpt {path}")
        accuracy[method] = p4.accuracy(p4.load_model(path)[0], images, labels)
    assert accuracy["dann-mt"] > accuracy["source"] + 0.03 > 0.33


# ------------------------------------------------------------------ command line


def test_torchrun_is_refused(monkeypatch, error):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "--mode train: cannot share its work among 2 processes"
    assert message in error(run, "--mode train --ckpt a.pt")


def test_readme():
    """Every p4 command is accepted."""
    text = (ROOT / "README.md").read_text()
    command = r"^(?:python3?|OMP_NUM_THREADS=1 python) p4_dann.py (--mode .*?)(?:  +#.*| &)?$"
    commands = re.findall(command, text, re.M)
    for command in commands:
        p4.parse_args(command.split())
    assert len(commands) >= 5


@pytest.mark.parametrize(
    "text",
    [
        "--steps 0",
        "--lr -1",
        "--lr inf",
        "--clip 0",
        "--mode fly",
        "--target mnist",
        "--method adda",
        "--method plain",
        "--source usps --target usps",
        "--scenarios usps-usps",
        "--seeds -1",
        "--device mps",
        "--num 1",
        "--batch-size 1",
        "--ckpt a b",
        "--arch vgg",
        "--arch large",
        "--domain-weight 2",
        "--stepz 5",
    ],
)
def test_wrong_options(text, error):
    with pytest.raises(ValueError):
        p4.parse_args(text.split())
    assert text.split()[0] in error(run, text)
