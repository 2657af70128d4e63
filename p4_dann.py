"""Unsupervised domain adaptation between digit data sets: labelled source, unlabelled target.

  python p4_dann.py --mode train --target svhn --fast --ckpt fast.pt       # built-in digits, a minute
  python p4_dann.py --mode train --data hw2_data --target svhn             # the course's MNIST-M -> SVHN
  python p4_dann.py --mode predict --input test/svhn --out pred.csv        # the path names the target
  python p4_dann.py --mode eval --input pred.csv --gt test.csv             # accuracy by the grader's rules
  python p4_dann.py --mode table --data hw2_data --out table               # trains what is missing
  python p4_dann.py --mode tsne --data hw2_data --target svhn              # features by digit and domain

source, source-aug (augmented) and target learn from the labels of one domain. dann is gradient reversal
(arXiv 1505.07818) on grey images. dann-mt, the default, adds augmentation, a domain head that knows the
digit, and a mean teacher (1703.01780, 1706.05208): after 30 % of training the network also learns the digits
that its own average is sure of (2001.07685). It predicts from six grey views of an image's colours.
Real data, three seeds, the last step's network: MNIST-M -> USPS 99.1 % (sd 0.1, 1,459 val images),
USPS -> MNIST-M 96.0 % (sd 0.1, 11,200), MNIST-M -> SVHN 80.0 % (sd 1.9, 160 val images, 640 unlabelled
training images); 6 minutes a network on one core of an AMD EPYC.
"""

# SPDX-License-Identifier: MIT
import argparse
import ast
import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

SIZE = 28
DIGITS = 10
DOMAINS = ("mnistm", "svhn", "usps")
# args.training is the method; but "target" is the training "source" on the other domain
AUGMENTED = ("source-aug", "dann-mt")  # they also predict from six views; the DANN paper has neither


# ---------------- networks ----------------


class ReverseGradient(torch.autograd.Function):
    """Identity forward; backward multiplies the gradient by -lambda_ (1505.07818, equations 16 and 17)."""

    @staticmethod
    def forward(ctx, x, lambda_):
        ctx.lambda_ = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.lambda_ * gradient, None


def conv(c_in, c_out, k, padding=0):
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, padding=padding), nn.BatchNorm2d(c_out), nn.ReLU())


class Net(nn.Module):
    """CNN features with a label head and a domain head; 611,788 parameters.

    forward(x): float (B, 3, 28, 28) in [-1, 1] -> logits (B, 10); training calls embed, label and domain.
    arch: "deep" is ours, the others are in the section "the reports".
    pairs: pairs of domain logits in "deep": one, or one for each digit (dann-mt, 614,110 parameters).
    views: whether forward is the mean of the logits of six views (see colour_views).
    report: whether the input is the reports'. dropout2d: whether 2021's tiny networks have Dropout2d.
    """

    def __init__(self, arch="deep", pairs=1, views=False, report=False, dropout2d=True):
        super().__init__()
        self.views = views
        self.report = report
        self.size = 64 if arch == "large" else SIZE
        if arch == "deep":
            layers = [conv(3, 32, 5, padding=2), nn.MaxPool2d(2)]  # (B, 32, 14, 14)
            layers += [conv(32, 64, 3, padding=1), conv(64, 64, 3, padding=1)]
            layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]  # (B, 64, 7, 7)
            layers += [conv(64, 128, 3, padding=1), conv(128, 128, 3, padding=1)]
            layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]  # (B, 128, 3, 3)
            layers += [conv(128, 256, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]  # (B, 256)
            self.features = nn.Sequential(*layers)
            self.label = nn.Sequential(nn.Dropout(0.5), nn.Linear(256, DIGITS))
            hidden = [nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()]
            self.domain = nn.Sequential(*hidden, nn.Linear(128, 2 * pairs))
        else:
            self.features, self.label, self.domain = report_layers(arch, dropout2d)
        # in the EMA network: the mean probability of each digit on the target
        self.register_buffer("marginal", torch.full((DIGITS,), 1 / DIGITS))

    def embed(self, x):
        """(B, 3, 28, 28) -> features (B, C).

        Our input is grey and standardised: colour, contrast and brightness tell domains apart, not digits.
        In training it gets Gaussian noise (1706.05208). The reports' input is RGB as it is.
        """
        if self.report:
            return self.features(F.interpolate(x, self.size, mode="bilinear"))
        x = x.mean(1, keepdim=True)  # (B, 1, 28, 28)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) / (x.std((1, 2, 3), keepdim=True) + 0.05)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.features(x.expand(-1, 3, -1, -1))

    def forward(self, x):
        if not self.views:
            return self.label(self.embed(x))
        return self.label(self.embed(colour_views(x))).view(6, len(x), DIGITS).mean(0)


def colour_views(x):
    """The channels of colour images and their differences, as grey images: (B, 3, H, W) -> (6B, 3, H, W).

    MNIST-M inverts a photograph where the digit is. Where the mean of the channels is mid-grey a digit
    vanishes in it, but not in all differences of two channels.
    """
    r, g, b = x.split(1, 1)
    return torch.cat([r, g, b, r - g, r - b, g - b]).expand(-1, 3, -1, -1)


def build(args):
    """The network of args.arch and args.training, on args.device."""
    pairs = DIGITS if args.training == "dann-mt" else 1
    views = args.training in AUGMENTED
    net = Net(args.arch, pairs, views, report=args.report is not None, dropout2d=args.dropout2d)
    return net.to(args.device, memory_format=torch.channels_last)


# ---------------- augmentation and losses ----------------


def augment(x, strength, neighbours=False):
    """A random affine map, mixture of channels and polarity for each image (B, 3, H, W), which becomes grey.

    strength: of the affine map; 1 reaches 14 degrees, 35 % of scale, shear 0.3 and 2 pixels of shift.
    neighbours: half of the images get two others of the batch beside them, as digits of house numbers have.
    """
    b = len(x)
    # exponential variables, divided by their sum, are uniform over the convex mixtures
    weights = -torch.rand(b, 3, 1, 1, device=x.device).clamp(min=1e-6).log()
    x = (x * weights / weights.sum(1, keepdim=True)).sum(1, keepdim=True)  # (B, 1, H, W)
    spread = strength * torch.tensor([0.25, 0.3, 0.3, 0.3, 0.15, 0.15], device=x.device)
    angle, wide, high, shear, dx, dy = (torch.rand(6, b, device=x.device) * 2 - 1) * spread[:, None]
    cos = angle.cos()
    sin = angle.sin()
    wide = wide.exp()
    high = high.exp()
    affine = torch.stack([cos * wide, shear - sin * high, dx, sin * wide, cos * high, dy], 1).view(b, 2, 3)
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    y = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if neighbours:
        pitch = 20 + 2 * int(torch.randint(5, (1,)))  # pixels from digit to digit
        margin = (SIZE - pitch) // 2
        middle = x[..., margin : SIZE - margin]
        row = torch.cat([middle.roll(1, 0), middle, middle.roll(2, 0)], 3)  # (B, 1, H, 3 pitch)
        grid[..., 0] = grid[..., 0] * SIZE / (3 * pitch)  # the same map, in coordinates of the row
        alone = torch.rand(b, 1, 1, 1, device=x.device) < 0.5
        y = torch.where(alone, y, F.grid_sample(row, grid, padding_mode="reflection", align_corners=False))
    negative = torch.rand(b, 1, 1, 1, device=x.device) < 0.5  # dark on bright or bright on dark
    return torch.where(negative, -y, y).expand(-1, 3, -1, -1)


def cutout(x, radius=5):
    """Sets a square at a random place of each image to the image's mean (1708.04552)."""
    centre = torch.rand(len(x), 2, 1, 1, device=x.device) * SIZE
    position = torch.arange(SIZE, device=x.device)
    rows = (position[:, None] - centre[:, 0]).abs() < radius
    columns = (position - centre[:, 1]).abs() < radius
    hidden = (rows & columns)[:, None]  # (B, 1, 28, 28)
    return torch.where(hidden, x.mean((1, 2, 3), keepdim=True), x)


def random_convolution(x):
    """Another texture for half of the grey images (B, 3, H, W) in [-1, 1] (2007.13003).

    A random kernel of 1x1 to 7x7; the result gets the image's mean and standard deviation, and is then
    mixed with the image by a random share. The mixture keeps the mean, not the standard deviation.
    """
    b = len(x)
    x = x[:, :1].float()  # (B, 1, H, W)
    distance = torch.arange(-3, 4, device=x.device).abs()
    radius = torch.randint(4, (b, 1, 1, 1), device=x.device)
    inside = torch.maximum(distance[:, None], distance) <= radius  # (B, 1, 7, 7)
    kernel = torch.randn(b, 1, 7, 7, device=x.device).masked_fill(~inside, 0)
    padded = F.pad(x, (3, 3, 3, 3), "reflect").transpose(0, 1)  # the images as channels, a kernel for each
    y = F.conv2d(padded, kernel, groups=b).transpose(0, 1)
    mean = x.mean((2, 3), keepdim=True)
    spread = x.std((2, 3), keepdim=True)
    y = y - y.mean((2, 3), keepdim=True)
    y = mean + y * spread / (y.std((2, 3), keepdim=True) + 1e-3)
    y = torch.lerp(x, y, torch.rand(b, 1, 1, 1, device=x.device))
    chosen = torch.rand(b, 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, y, x).expand(-1, 3, -1, -1)


def strong(x):
    """The augmentation of all that a network learns from."""
    return random_convolution(augment(x, 1.0, neighbours=True))


def reversal(p):
    """lambda_ rises from 0 to 1 with the progress p of training (1505.07818, section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * p)) - 1


def domain_loss(net, source, target, lambda_, digits=None):
    """Cross-entropy of the domain head on gradient-reversed features (B, C) of both domains.

    domain head: minimise it; features: maximise it, lambda_ times as strongly (1505.07818).
    digits: probabilities (2B, 10); they weight the ten pairs of logits of dann-mt's head, so the threes of
    one domain are matched with those of the other (1809.02176 has ten heads). Other heads ignore them.
    """
    features = ReverseGradient.apply(torch.cat([source, target]), lambda_)
    logits = net.domain(features).float()  # (2B, 2), dann-mt's (2B, 20), most reports' (2B, 1)
    if logits.shape[1] == 2 * DIGITS:
        logits = (digits[:, :, None] * logits.view(-1, DIGITS, 2)).sum(1)
    if logits.shape[1] == 1:  # the logit of "target" alone
        logits = F.pad(logits, (1, 0))
    is_target = torch.arange(len(logits), device=logits.device) >= len(source)
    return F.cross_entropy(logits, is_target.long())


def align(probabilities, marginal, power):
    """Probabilities (B, 10) times marginal^-power, normalised (1911.09785, section 3.1).

    Without it a digit that is often mistaken dies out: fewer pseudo-labels lead to fewer predictions.
    """
    p = probabilities * marginal.clamp(min=1e-3) ** -power
    return p / p.sum(1, keepdim=True)


def consistency_loss(student, probabilities, threshold):
    """Cross-entropy with the teacher's digit where the teacher is surer than `threshold`, else 0.

    2001.07685, equation 4. student: logits (B, 10). probabilities: the teacher's (B, 10).
    Returns the mean over the batch and the share of images that counted.
    """
    confidence, digit = probabilities.max(1)
    sure = (confidence > threshold).float()
    return (sure * F.cross_entropy(student, digit, reduction="none")).mean(), sure.mean()


THRESHOLD = 0.9  # the teacher's digit counts where its probability is above this
ALIGN = 0.5  # 0: pseudo-labels as they come; 1: all digits made equally frequent
START = 0.3  # the share of training after which the consistency loss sets in
RAMP = 0.2  # the share of training within which its weight then rises to CONSISTENCY
CONSISTENCY = 3.0


def losses(args, model, ema, x, y, u, p):
    """The losses of one step: (class, adaptation, share of images with a sure teacher).

    x: labelled images, float (B, 3, 28, 28) in [-1, 1]; y: their digits (B,).
    u: target images like x, or None. p: progress of training in [0, 1].
    Source and target pass through the model one after the other, so BatchNorm does not mix them.
    """
    augmented = args.training in AUGMENTED
    nothing = torch.zeros((), device=x.device)

    # label head and features: minimise the cross-entropy of the labelled digits
    source = model.embed(strong(x) if augmented else x)
    class_loss = F.cross_entropy(model.label(source).float(), y)
    if u is None:
        return class_loss, nothing, nothing

    # the teacher is the EMA network (1703.01780). It sees the target alone: with the BatchNorm statistics of
    # this pass it predicts (1603.04779), for dann as well, which has no teacher
    with torch.no_grad():
        features = ema.embed(augment(u, 0.3) if augmented else u)
        teacher = ema.label(features).float().softmax(1)
        ema.marginal.lerp_(teacher.mean(0), 0.01)

    # domain head: minimise the cross-entropy of the domains, features: maximise it (1505.07818)
    target = model.embed(cutout(strong(u)) if augmented else u)
    pseudo = align(teacher, ema.marginal, ALIGN)
    digits = torch.cat([F.one_hot(y, DIGITS).float(), pseudo])
    adaptation = domain_loss(model, source, target, reversal(p), digits)
    if args.training == "dann":
        return class_loss, adaptation, nothing

    # label head and features: minimise the cross-entropy of the teacher's sure digits (2001.07685)
    consistency, sure = consistency_loss(model.label(target).float(), pseudo, THRESHOLD)
    weight = CONSISTENCY * min(max(p - START, 0) / RAMP, 1)
    return class_loss, adaptation + weight * consistency, sure


# ---------------- train ----------------

EMA_DECAY = 0.99  # of the teacher, which is also the network that predicts


@torch.no_grad()
def update_ema(ema, model, step, buffers):
    """ema <- decay ema + (1 - decay) model (1703.01780); for 100 steps it is the plain mean of all steps.

    buffers: whether the model's BatchNorm statistics are copied; if not, the EMA network keeps its own.
    """
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, max(1 - EMA_DECAY, 1 / step))
    if buffers:
        for average, buffer in zip(ema.buffers(), model.buffers()):
            average.copy_(buffer)


def teaching(ema):
    """The EMA network's mode in training: BatchNorm by its own batches, noisy input, no dropout."""
    ema.train()
    for module in ema.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.eval()


def learning_rate(args, step, steps):
    """The rate at a step. Ours rises over the first 100 steps.

    args.decay: paper (1505.07818, section 5.2.2), none, linear to 0 (dann-mt), or thirds: a tenth from 1/3,
    a hundredth from 2/3.
    """
    p = (step - 1) / steps
    paper = (1 + 10 * p) ** -0.75
    factors = {"paper": paper, "linear": 1 - p, "none": 1.0, "thirds": 0.1 ** int(3 * p)}
    warm_up = 1.0 if args.report else min(step / 100, 1)
    return args.lr * factors[args.decay] * warm_up


def make_optimizer(args, model):
    """AdamW, Adam or RAdam (1908.03265) of the network's parameters."""
    options = dict(lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    if args.optimizer == "radam":
        return torch.optim.RAdam(model.parameters(), **options)
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), fused=True, **options)


def train(args, images, labels, target=None):
    """Trains for args.steps or args.epochs, writes args.ckpt, returns the EMA network in eval mode.

    args: parse_args([...]). images: uint8 (N, 3, 28, 28). labels: int64 (N,) in 0..9.
    target: unlabelled images like `images`; None for the methods source, source-aug and target.
    Raises ValueError, FloatingPointError (loss not finite), KeyboardInterrupt (after Ctrl-C; saved).
    """
    data = (images, labels) if target is None else (images, labels, target)
    check_training_set(args, *data)
    torch.manual_seed(args.seed)
    model = build(args)
    ema = build(args)
    ema.load_state_dict(model.state_dict())
    teaching(ema)
    optim = make_optimizer(args, model)
    settings = settings_of(args, images)
    steps = settings["steps"]
    run = Run(args, steps, settings, data, dict(model=model, ema=ema, optim=optim))
    images = images.to(args.device)
    labels = labels.to(args.device)
    target = None if target is None else target.to(args.device)
    step_losses = report_losses if args.report else losses
    for step in run:
        i = torch.randint(len(images), (args.batch_size,), device=args.device)
        x = images[i].float() / 127.5 - 1
        u = None
        if target is not None:
            j = torch.randint(len(target), (args.batch_size,), device=args.device)
            u = target[j].float() / 127.5 - 1

        optim.param_groups[0]["lr"] = learning_rate(args, step, steps)
        p = (step - 1) / steps
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            class_loss, adaptation, sure = step_losses(args, model, ema, x, labels[i], u, p)
        optim.zero_grad()
        (class_loss + adaptation).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optim.step()
        if args.report:  # the network itself predicts
            ema.load_state_dict(model.state_dict())
        else:
            update_ema(ema, model, step, buffers=target is None)
        run.record(class_loss=class_loss, adaptation_loss=adaptation, sure=sure, gradient=norm)
    return ema.eval()


# ---------------- predict ----------------


@torch.inference_mode()
def predict(models, images):
    """The vote of networks in eval mode, or of one: uint8 (N, 3, 28, 28) -> digits (N,) on the CPU.

    images: tensor or numpy array; ValueError for another form.
    Between digits with equally many votes the higher mean probability decides.
    """
    models = [models] if isinstance(models, nn.Module) else models
    images = check_images("images", images)
    device = next(models[0].parameters()).device
    digits = []
    for batch in images.split(100):
        x = batch.to(device).float() / 127.5 - 1
        probabilities = torch.stack([model(x).softmax(1) for model in models])  # (models, B, 10)
        votes = F.one_hot(probabilities.argmax(2), DIGITS).sum(0)
        tie_break = 0.5 * probabilities.mean(0)  # less than a vote
        digits.append((votes + tie_break).argmax(1).cpu())
    return torch.cat(digits)


# ---------------- evaluate and plots ----------------


def load_model(path, device="cpu", option="--ckpt"):
    """(EMA network in eval mode, its settings) of a checkpoint, or of weights in .weights/.

    Raises ValueError or OSError, naming the `option` of the command line, for other files.
    """
    return load_network(load_checkpoint(path, option), path, device, option)


def read_folder(folder):
    """(names, uint8 (N, 3, 28, 28)) of the images in `folder`; damaged ones are skipped with a warning."""
    from common import list_images, read_image

    names = []
    images = []
    for path in list_images(folder):
        try:
            images.append(read_image(path, (SIZE, SIZE)))
            names.append(path.name)
        except ValueError as e:
            print(f"warning: skipped: {e}", file=sys.stderr)
    if not images:
        raise ValueError(f"--input {folder}: none of its images can be read")
    return names, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def domain_of(folder):
    """The domain that the last matching part of a path names (.../digits/svhn/test: svhn), or None.

    The graders of 2022 and 2023 name the target in no other way.
    """
    for part in reversed(Path(os.path.abspath(folder)).parts):
        name = part.lower().replace("-", "").replace("_", "")
        found = [domain for domain in DOMAINS if domain in name]
        if len(found) == 1:
            return found[0]
    return None


def describe(settings):
    """The training of a network, for messages: "dann, mnistm to svhn" or "source, mnistm alone"."""
    if settings.unlabelled is None:
        return f"{settings.training}, {settings.labelled} alone"
    return f"{settings.training}, {settings.labelled} to {settings.unlabelled}"


def write_predictions(args):
    """Writes --out: the header image_name,label and a row for each image of --input, by vote of --ckpt."""
    names, images = read_folder(args.input)
    models = []
    for path in args.ckpts:
        model, settings = load_model(path, args.device)
        models.append(model)
        print(f"weights: {path}, {settings.trained}: {describe(settings)}")
        if args.target is not None and settings.unlabelled not in (None, args.target):
            message = f"{path} was adapted to {settings.unlabelled}, the images are of {args.target}"
            print(f"warning: {message}", file=sys.stderr)
    digits = predict(models, images).tolist()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image_name", "label"), *zip(names, digits)])
    write_text(args.out, text.getvalue())
    print(f"{args.out}: {len(names)} rows, target {args.target or 'not named'}")


def read_labels(path):
    """Rows [image_name, label] of a CSV, both as text; ValueError where it is not in the course's form."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [row[:2] for row in csv.reader(file) if row]
    except (OSError, csv.Error) as e:
        raise ValueError(f"{path}: cannot be read as CSV ({e})") from e
    if rows[:1] != [["image_name", "label"]]:
        found = ",".join(rows[0])[:60] if rows else "nothing"
        raise ValueError(f"{path}: found {found} in its first line, expected image_name,label")
    for row in rows:
        if len(row) < 2:
            raise ValueError(f"{path}: found a row {row[0][:60]!r}, expected image_name,label in every row")
    odd = [label for _, label in rows[1:] if label not in tuple("0123456789")]
    if odd:
        found = f"{len(odd)} of {len(rows) - 1} labels are no plain digits ({odd[0][:20]!r})"
        print(f"warning: {path}: {found}; the grader compares text", file=sys.stderr)
    return rows[1:]


def evaluate(args):
    """Prints the accuracy of the CSV --input against the CSV --gt, by the rules of the 2021 grader.

    Names and labels are text. Every predicted name must be in --gt. The share is that of the predicted
    rows, and of rows with one name the last counts.
    """
    rows = read_labels(args.input)
    predicted = dict(rows)
    truth = dict(read_labels(args.gt))
    for name in predicted:
        if name not in truth:
            raise ValueError(f'Item mismatch: "{name}" does not exist in the provided ground truth file.')
    if not predicted:
        raise ValueError(f"{args.input}: no predictions")
    if not len(rows) == len(predicted) == len(truth):
        found = f"{len(rows)} rows for {len(predicted)} of {len(truth)} images"
        rule = "the last row of an image counts, and images without one do not"
        print(f"warning: {args.input}: {found}; {rule}", file=sys.stderr)
    correct = sum(truth[name] == label for name, label in predicted.items())
    print(f"Accuracy: {correct}/{len(predicted)} ({100 * correct / len(predicted):.2f}%)")


def table(args):
    """Trains what is missing among methods x scenarios x seeds; writes table.md and table.json into --out.

    A cell is the accuracy on the target's val part, as mean and standard deviation over the seeds.
    source and target have one network for each domain and seed, whatever the scenario.
    """
    from common import load_digits

    load = functools.cache(load_digits)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    runs = []
    for method, scenario, seed in itertools.product(args.methods, args.scenarios, args.seeds):
        source, target = scenario.split("-")
        run = settle(args, method=method, source=source, target=target, seed=seed)
        run.scenario = scenario
        run.ckpt = str(Path(args.ckpt) / f"{run.name}.pt")
        runs.append(run)
    for run in runs:  # what is missing, damaged or foreign shows now, not after hours of training
        images, *_ = training_set(run, load)
        load(args.data, run.target, "val")
        if Path(run.ckpt).exists():
            ckpt = load_checkpoint(run.ckpt)
            load_network(ckpt, run.ckpt)
            check_settings(ckpt, settings_of(run, images), f"--ckpt {run.ckpt}")

    cells = {method: {scenario: [] for scenario in args.scenarios} for method in args.methods}
    for run in runs:
        run.resume = Path(run.ckpt).exists()
        if not run.resume or "rng" in load_checkpoint(run.ckpt):  # a finished training does nothing more
            train(run, *training_set(run, load))
        model, _ = load_model(run.ckpt, run.device)
        share = accuracy(model, *load(args.data, run.target, "val"))
        cells[run.method][run.scenario].append({"seed": run.seed, "ckpt": run.ckpt, "accuracy": share})

    header = [f"% of the val images, seeds {' '.join(map(str, args.seeds))}"]
    for scenario in args.scenarios:
        source, target = scenario.split("-")
        _, labels = load(args.data, target, "val")
        header.append(f"{source} → {target} ({len(labels)})")
    rows = [header, ["---"] * len(header)]
    for method, results in cells.items():
        rows.append([METHODS[method], *map(mean_and_sd, results.values())])
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    print(text, end="")
    write_text(Path(args.out) / "table.md", text)
    write_text(Path(args.out) / "table.json", json.dumps(cells, indent=1))


def mean_and_sd(results):
    """A cell of the table: the mean in per cent and, of several seeds, the standard deviation."""
    shares = [100 * result["accuracy"] for result in results]
    text = f"{np.mean(shares):.1f}"
    if len(shares) > 1:
        text += f" ± {np.std(shares, ddof=1):.1f}"
    return text


def accuracy(model, images, labels):
    """The share of uint8 images (N, 3, 28, 28) that the network in eval mode predicts as `labels` say."""
    return (predict(model, images) == labels).float().mean().item()


def a_distance(source, target):
    """Proxy A-distance 2 (1 - 2 error) of features (N, C): 0 alike, 2 apart (1505.07818, section 5.1.5).

    The error is that of a linear classifier of the domains on a held-out half.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.concatenate([source, target])
    y = np.repeat([0, 1], [len(source), len(target)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    share = cross_val_score(classifier, x, y, cv=2).mean()
    return max(2 * (2 * share - 1), 0.0)


def drawn_domains(args, settings):
    """The (source, target) that tsne draws: those of the training; for one domain another one beside it."""
    source = args.source or settings.labelled
    target = args.target or settings.unlabelled or settings.labelled
    if source == target or not {settings.labelled, settings.unlabelled} <= {source, target, None}:
        expected = f"two domains, with those of {args.ckpt} ({describe(settings)}) among them"
        raise ValueError(f"--source {source} --target {target}: expected {expected}")
    return source, target


@torch.inference_mode()
def tsne(args):
    """Two figures, by digit and by domain: t-SNE, after PCA, of the CNN features of equally many val images.

    Prints the proxy A-distance.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    from common import import_matplotlib, load_digits, save_scatter

    import_matplotlib()  # if it is missing, this shows before the work
    model, settings = load_model(args.ckpt, args.device)
    print(f"weights: {args.ckpt}, {settings.trained}: {describe(settings)}")
    source, target = drawn_domains(args, settings)
    sets = [load_digits(args.data, domain, "val") for domain in (source, target)]
    num = min(args.num, *(len(labels) for _, labels in sets))
    features = []
    digits = []
    for images, labels in sets:
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))[:num]
        parts = [model.embed(x.to(args.device).float() / 127.5 - 1) for x in images[chosen].split(500)]
        features.append(torch.cat(parts).cpu().numpy())
        digits.append(labels[chosen].numpy())
    points = PCA(min(50, num), random_state=args.seed).fit_transform(np.concatenate(features))
    perplexity = min(30, (2 * num - 1) / 3)
    points = TSNE(random_state=args.seed, init="pca", perplexity=perplexity).fit_transform(points)

    which = settings.training
    if settings.unlabelled is None:
        which = f"{settings.training}-{settings.labelled}"
    stem = Path(args.out) / f"tsne_{source}_{target}_{which}"
    title = f"{which}, {source} to {target}, {num} val images each"
    numerals = [str(digit) for digit in range(DIGITS)]
    groups = np.repeat([0, 1], num)
    save_scatter(f"{stem}_digit.png", points, np.concatenate(digits), numerals, f"{title}, by digit")
    save_scatter(f"{stem}_domain.png", points, groups, [source, target], f"{title}, by domain")
    print(f"{stem}_digit.png, {stem}_domain.png; proxy A-distance {a_distance(*features):.3f}")


# ---------------- the reports ----------------


# 2021's small network, and three like it for the vote: kernels of both convolutions, width of the linear
# layers. The report tells the first alone; the others are ours.
TINY = {"tiny": (32, 48, 100), "tiny-b": (32, 64, 128), "tiny-c": (48, 48, 128), "tiny-d": (24, 64, 100)}


def report_layers(arch, dropout2d):
    """(features, label head, domain head) of a report's network; ValueError for another arch.

    Parameters in all: small (2022b) 355,164, paper (2023) 976,651, dann (of the DANN paper; 2022a, 2022c)
    205,891, tiny (2021) 497,075; large (2021): 6,274,560 in its features.
    """
    if arch in TINY:
        a, b, c = TINY[arch]
        layers = [nn.Conv2d(3, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)]
        if dropout2d:
            layers.append(nn.Dropout2d(0.5))
        features = nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())  # (B, 49 b)
        label = [nn.Linear(49 * b, c), nn.ReLU(), nn.Dropout(0.5), nn.Linear(c, c), nn.BatchNorm1d(c)]
        label += [nn.ReLU(), nn.Linear(c, DIGITS), nn.Sigmoid()]
        return features, nn.Sequential(*label), mlp(nn.ReLU, 49 * b, c, 1)
    if arch == "large":  # 64x64; the heads cannot be read in the report, these are of the paper's kind
        layers = []
        for c_in, c_out in itertools.pairwise((3, 64, 128, 256, 512, 1024)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)]
            layers += [nn.MaxPool2d(2), nn.ReLU()]
        features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, 1024)
        label = mlp(nn.ReLU, 1024, 1024, 1024, DIGITS, norm=False)
        return features, label, mlp(nn.ReLU, 1024, 1024, 1024, 1, norm=False)
    if arch == "dann":  # 1505.07818, figure 4a
        layers = [nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2)]  # (B, 32, 12, 12)
        layers += [nn.Conv2d(32, 48, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]  # (B, 768)
        label = mlp(nn.ReLU, 768, 100, 100, DIGITS, norm=False)
        return nn.Sequential(*layers), label, mlp(nn.ReLU, 768, 100, 1, norm=False)
    if arch == "small":
        layers = [conv(3, 64, 5), nn.MaxPool2d(2)]  # (B, 64, 12, 12)
        layers += [nn.Sequential(nn.Conv2d(64, 48, 5), nn.BatchNorm2d(48)), nn.Dropout2d(0.3), nn.ReLU()]
        features = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten())  # (B, 768)
        label = [nn.Dropout(0.3), nn.Linear(768, 192), nn.BatchNorm1d(192), nn.Mish()]
        label += [nn.Dropout(0.3), mlp(nn.Mish, 192, 128, DIGITS)]
        domain = nn.Sequential(nn.Dropout(0.3), mlp(nn.Mish, 768, 128, 2))
        return features, nn.Sequential(*label), domain
    if arch == "paper":
        layers = [conv(3, 64, 4), nn.MaxPool2d(3, 2)]  # (B, 64, 12, 12)
        layers += [nn.Sequential(nn.Conv2d(64, 64, 5), nn.BatchNorm2d(64)), nn.Dropout2d(0.5), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2), nn.Conv2d(64, 128, 3), nn.Flatten()]  # (B, 128)
        return nn.Sequential(*layers), mlp(nn.ReLU, 128, 1024, 256, DIGITS), mlp(nn.ReLU, 128, 1024, 256, 1)
    raise ValueError(f"--arch {arch}: expected {', '.join(ARCHS)}")


def mlp(act, *widths, norm=True):
    """Linear layers with BatchNorm, or without, and `act` between them."""
    layers = []
    for c_in, c_out in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(c_in, c_out))
        if norm:
            layers.append(nn.BatchNorm1d(c_out))
        layers.append(act())
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def report_losses(args, model, ema, x, y, u, p):
    """As `losses`: the reports train on images as they are, without a teacher."""
    nothing = torch.zeros((), device=x.device)
    source = model.embed(x)
    class_loss = F.cross_entropy(model.label(source).float(), y)
    if u is None:
        return class_loss, nothing, nothing
    adaptation = domain_loss(model, source, model.embed(u), reversal(p))
    return class_loss, args.domain_weight * adaptation, nothing


# What five teams did differently. (o): the report does not say; ours. All have the reports' input, RGB in
# [-1, 1], lambda_ of the paper, and predict with the network of the last step.
REPORTS = {  # 2021: 20 epochs, 30 from USPS to SVHN; (o) the batch
    "2021": dict(optimizer="adam", lr=2e-4, scenarios=["mnistm-usps", "svhn-mnistm", "usps-svhn"]),
    "2022a": dict(optimizer="radam", lr=1e-5, batch_size=60, epochs=20),  # (o) the epochs
    "2022b": dict(optimizer="adam", steps=2000),  # (o) all but lambda_
    "2022c": dict(optimizer="adam", decay="thirds", domain_weight=2.0, steps=2000),  # three losses in one sum
    "2023": dict(optimizer="adam", lr=3e-4, batch_size=1024, epochs=100),
}
# of each report the first is its own; None: without --report. (o) 2022c's
REPORT_ARCHS = {None: ["deep", "small", "paper"], "2021": ["large", *TINY], "2022a": ["dann"]}
REPORT_ARCHS |= {"2022b": ["small"], "2022c": ["dann"], "2023": ["paper"]}
EVERY_REPORT = dict(method="dann", methods=["source", "dann", "target"], decay="none", clip=math.inf)
EVERY_REPORT |= dict(scenarios=["mnistm-svhn", "mnistm-usps"], betas=[0.9, 0.999], weight_decay=0.0)
EVERY_REPORT["steps"] = None


# ---------------- command line ----------------

NAME = "p4_dann"
ADVICE = f"make one with: python {NAME}.py --mode train --data DIR, and the same method, domains, report"
SHARED = ()  # it runs in one process
METHODS = {
    "source": "Trained on source",
    "dann": "Adaptation (DANN)",
    "target": "Trained on target",
    "source-aug": "Trained on source, augmented",
    "dann-mt": "Adaptation (DANN + mean teacher), augmented",
}
ARCHS = ("deep", "small", "paper", "dann", "large", *TINY)
SOURCE = {"mnistm": "svhn", "svhn": "mnistm", "usps": "mnistm"}  # the course's source of each target
# settings that a checkpoint keeps: --resume refuses others
NETWORK = ("arch", "report", "dropout2d", "training", "labelled", "unlabelled")
TRAINING = ("batch_size", "optimizer", "lr", "betas", "weight_decay", "decay", "clip")
TRAINING += ("domain_weight", "seed")

SCENARIOS = ["mnistm-svhn", "mnistm-usps", "usps-mnistm", "svhn-mnistm", "usps-svhn"]
OPTIONS = f"""
--method  {"|".join(METHODS)}  "dann-mt"  train predict tsne  what learns, and from which labels
--source  mnistm|svhn|usps  None  train predict tsne  labelled; None: svhn for mnistm, else mnistm
--target  mnistm|svhn|usps  None  train predict tsne  to adapt to; None: of --input, of --ckpt
--seed  int 0..4294967295  0  train predict tsne  of training and of tsne
--report  2021|2022a|2022b|2022c|2023  None  train predict table tsne  preset: all that a report has
--ckpt  FILE x+  None  train predict table tsne  to write or read; predict: several vote; table: their folder
--arch  {"|".join(ARCHS)}  None  train predict table tsne  None: deep, ours; small: 2022b's, paper: 2023's
--no-dropout2d  switch  True  train predict table tsne  tiny: without it, which 2021 found important
--data  DIR  None  train table tsne  the course's layout; None: built-in digits
--out  PATH  None  predict table tsne  a CSV file; table, tsne: a folder
--input  PATH  None  predict eval  predict: folder of images; eval: a CSV file
--gt  FILE  None  eval  CSV of true labels
--fast  switch  False  train table  preset: a minute on two cores, passes the course's bars
--resume  switch  False  train  go on from --ckpt
--precision  auto|bf16|float32  "auto"  train table  auto: bf16 autocast where the hardware is fast at it
--steps  int 1..  2000  train table  in all; no run is prolonged, because the schedules depend on it
--epochs  int 1..  None  train table  passes over the labelled images, instead of --steps
--batch-size  int 2..  64  train table  images per step, of each domain
--optimizer  adamw|adam|radam  "adamw"  train table  AdamW, Adam or RAdam
--lr  float 0..  1e-3  train table  initial learning rate
--betas  float 0..0.9999 x2  [0.9, 0.99]  train table  of the optimiser
--weight-decay  float 0..  1e-4  train table  of the optimiser
--decay  paper|linear|none|thirds  None  train table  of the rate; None: linear for dann-mt, else paper
--clip  float 1e-9..inf  10.0  train table  largest norm of the gradient
--domain-weight  float 0..  1.0  train table  reports: weight of the domain loss
--methods  {"|".join(METHODS)} x+  {list(METHODS)}  table  its rows
--scenarios  SOURCE-TARGET x+  {SCENARIOS}  table  its columns
--seeds  int 0..4294967295 x+  [0, 1, 2]  table  of each cell
--num  int 10..  1000  tsne  images of each domain
"""
PAIRS = [f"{source}-{target}" for source, target in itertools.permutations(DOMAINS, 2)]


def settings_of(args, images):
    """What a checkpoint keeps of a training; `steps` too, for lambda and the rate depend on it."""
    steps = args.steps or args.epochs * math.ceil(len(images) / args.batch_size)
    return {name: getattr(args, name) for name in NETWORK + TRAINING} | {"steps": steps}


def check_images(name, images):
    """A tensor or array as a tensor; raises ValueError unless it is uint8 (N, 3, 28, 28), N > 0."""
    expected = f"expected uint8 (N, 3, {SIZE}, {SIZE})"
    try:
        images = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{name}: found {type(images).__name__}, {expected}") from e
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE) or len(images) == 0:
        raise ValueError(f"{name}: found {images.dtype} {tuple(images.shape)}, {expected}")
    return images


def check_training_set(args, images, labels, target=None):
    """Raises ValueError where one of them has another form than the method needs."""
    kinds = (torch.Tensor, torch.Tensor, type(None) if args.unlabelled is None else torch.Tensor)
    for name, value, kind in zip(("images", "labels", "target"), (images, labels, target), kinds):
        if not isinstance(value, kind):
            found = f"found {type(value).__name__}, expected {kind.__name__}"
            raise ValueError(f"{name}: {found} with --method {args.method}")
    n = len(check_images("images", images))
    if target is not None:
        check_images("target", target)
    if labels.dtype != torch.int64 or labels.shape != (n,) or labels.min() < 0 or labels.max() >= DIGITS:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels: found {found}, expected int64 ({n},) in 0 to {DIGITS - 1}")


def settle(args, **changes):
    """A copy of the settings for one network: what it is, what it learns from, and its checkpoint's name."""
    args = argparse.Namespace(**{**vars(args), **changes})
    args.target = args.target or ("svhn" if args.source == "usps" else "usps")
    args.source = args.source or SOURCE[args.target]
    if args.source == args.target:
        fail(f"--source {args.source} --target {args.target}: expected two domains")
    args.training = "source" if args.method == "target" else args.method
    args.labelled = args.target if args.method == "target" else args.source
    args.unlabelled = args.target if args.method in ("dann", "dann-mt") else None
    args.decay = args.decay or ("linear" if args.method == "dann-mt" else "paper")
    arch = REPORT_ARCHS[args.report][0]
    if args.report == "2021":
        small = (args.source, args.target) == ("usps", "svhn")
        arch = "tiny" if small else "large"
        if args.steps is None:
            args.epochs = args.epochs or (30 if small else 20)
    args.arch = args.arch or arch
    kind = f"{args.report}-{args.arch}" if args.report else args.arch
    if not args.dropout2d:
        if args.arch not in TINY:
            fail("--no-dropout2d: only report 2021's tiny networks (usps to svhn) have Dropout2d")
        kind += "-no-dropout2d"
    where = f"{args.source}_{args.target}" if args.unlabelled else args.labelled
    args.name = f"p4_{args.training}_{where}_{kind}_{args.seed}"
    return args


def presets(args):
    """The defaults of this --mode, --report, --fast, method and domains, but those of OPTIONS."""
    defaults = {
        "predict": {"out": "pred.csv"},
        "eval": {"input": "pred.csv"},
        "table": {"out": "table", "ckpt": ["checkpoints"]},
        "tsne": {"out": "p4_figures"},
    }.get(args.mode, {})
    if args.mode == "predict" and args.input:
        defaults["target"] = domain_of(args.input)
    if args.mode in ("train", "tsne") or (args.mode == "predict" and args.target):
        own = settle(args)
        defaults["ckpt"] = [find_ckpt(own.name, args.mode)]
        if args.mode == "train":
            shown = ("source", "target", "arch", "decay", "epochs")
            defaults |= {name: getattr(own, name) for name in shown}
    if args.report:
        defaults |= EVERY_REPORT | REPORTS[args.report]
    if args.fast:
        defaults |= {"steps": 600, "epochs": None}
    return defaults


def parse_args(argv=None):
    """The settings that `build`, `train` and the modes take; raises ValueError for wrong usage."""
    args = parse(OPTIONS, argv, presets)
    named = args.mode in ("train", "table") or "--ckpt" not in args.given
    uses = [
        (named, "no --ckpt, which says it", "method report arch no-dropout2d"),
        (args.report, "--report", "domain-weight"),
    ]
    methods = args.methods if args.mode == "table" else [args.method]
    foreign = [method for method in methods if args.report and method not in EVERY_REPORT["methods"]]
    archs = REPORT_ARCHS[args.report]
    headless = "dann-mt" in methods and args.arch not in (None, "deep")
    lost = args.mode == "predict" and args.ckpt is None
    contradictions = [
        (set(args.scenarios) - set(PAIRS), f"--scenarios {args.scenarios}: expected some of {PAIRS}"),
        ({"--epochs", "--steps"} <= args.given, "--epochs and --steps: expected one of them"),
        (foreign, f"--report {args.report} with method {foreign}: it has {EVERY_REPORT['methods']}"),
        (args.arch not in (None, *archs), f"--arch {args.arch} --report {args.report}: expected {archs}"),
        (headless, f"--arch {args.arch}: dann-mt needs deep, whose domain head knows the digit"),
        (args.mode == "eval" and args.gt is None, "--mode eval needs --gt FILE, the CSV of true labels"),
        (args.mode == "predict" and args.input is None, "--mode predict needs --input DIR, the images"),
        (lost, f"--input {args.input}: no part of the path names one of {DOMAINS}; pass --target or --ckpt"),
        (len(args.ckpt or []) > 1 and args.mode != "predict", "--ckpt: takes one; only --mode predict votes"),
    ]
    refuse(args, uses, contradictions)
    if "--epochs" in args.given:
        args.steps = None
    for name in ("methods", "scenarios", "seeds"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if named and args.mode != "table":
        args = settle(args)
    if args.mode != "eval":
        args.ckpts = args.ckpt
        args.ckpt = args.ckpts[0]
    return args


def training_set(args, load):
    """(images, labels, target images or None); load: common.load_digits."""
    images, labels = load(args.data, args.labelled, "train")
    target = None
    if args.unlabelled is not None:
        target, _ = load(args.data, args.unlabelled, "train")  # no label of the target is used
    return images, labels, target


def train_digits(args):
    """--mode train: trains on --data, then prints the accuracy on the target's val part."""
    from common import load_digits

    val, truth = load_digits(args.data, args.target, "val")
    network = train(args, *training_set(args, load_digits))
    share = 100 * accuracy(network, val, truth)
    print(f"{args.target} val accuracy {share:.2f} % ({len(truth)} images, last step, not chosen by it)")


MODES = {"train": train_digits, "predict": write_predictions, "eval": evaluate, "table": table, "tsne": tsne}


# ---------------- service: the same text in p1 to p4 ----------------
# Files, checkpoints, Run, devices, options, main. NAME, NETWORK, ADVICE, SHARED, MODES stand above.

HERE = Path(globals().get("__file__", "a notebook")).resolve().parent


class Screen:
    """Standard output or error, whatever it is, None too: what cannot be shown costs no work."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass
        except OSError:  # its reader is gone; else Python fails on what is left when it ends
            with contextlib.suppress(AttributeError, OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        """`write` has done it."""


def whole_numbers(values, what, low=0, high=2**32 - 1):
    """A list of ints out of a list, array or tensor of whole numbers; ValueError for anything else."""
    values = np.ravel(values.tolist() if isinstance(values, torch.Tensor) else values).tolist()
    wrong = [value for value in values if type(value) is not int or not low <= value <= high]
    if wrong:
        raise ValueError(f"{what}: found {wrong[0]!r:.60}, expected whole numbers in {low} to {high}")
    return values  # numpy's generators take a number from 2**32 on for several smaller ones


def write_whole(path, write):
    """Writes a file whole or not at all: write(file) fills a temporary file of this process, then renamed."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is a folder or a device; expected the name of a file")
    target = path.resolve()  # a symbolic link stays one
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason})") from e
    finally:  # after Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """Writes a text file, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_png(path, image):
    """Writes uint8 (3, H, W) as PNG, whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_whole(path, lambda file: picture.save(file, "PNG"))


def make_folder(args, out, names):
    """Makes the folder `out`; warns of entries that are none of `names`, for graders read them all."""
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(name for name in set(os.listdir(out)) - set(names) if not name.startswith("."))
    if others and args.rank == 0:
        found = f"holds {len(others)} other entries, such as {others[0]}"
        print(f"warning: --out {out}: {found}; graders read every file", file=sys.stderr)


def log_path(ckpt):
    """model.log.csv for model.pt; for any other name that name with .log.csv."""
    return Path(f"{str(ckpt).removesuffix('.pt')}.log.csv")


def find_ckpt(name, mode):
    """checkpoints/NAME.pt for training or where it is, else the weights that come with this script."""
    here = Path("checkpoints") / f"{name}.pt"
    for path in (here, HERE / ".weights" / here.name, HERE / here.name):
        if mode == "train" or path.is_file():
            return str(path)
    return str(here)


def load_file(path, option="--ckpt"):
    """What torch.load finds, on the CPU; no code of the file runs. `option` names the file in messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{option} {path}: no such file; {ADVICE}") from None
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        raise ValueError(f"{option} {path}: not readable ({type(e).__name__})") from e


def load_checkpoint(path, option="--ckpt"):
    """The dict of a checkpoint of this script. Raises FileNotFoundError or ValueError."""
    return check_checkpoint(load_file(path, option), path, option)


def check_checkpoint(ckpt, path, option="--ckpt"):
    """What a file holds, if that is a checkpoint of this script; else ValueError."""
    found = ckpt.get("script", list(ckpt)[:3]) if isinstance(ckpt, dict) else type(ckpt).__name__
    if found != NAME:
        raise ValueError(f"{option} {path}: found {found}, expected a checkpoint of {NAME}.py")
    kinds = {"args": dict, "ema": dict, "step": int, "seconds": (int, float), "command": str}
    lacking = [key for key, kind in kinds.items() if not isinstance(ckpt.get(key), kind)]
    lacking = lacking or [key for key in NETWORK if key not in ckpt["args"]]
    if lacking:
        raise ValueError(f"{option} {path}: lacks {', '.join(lacking)}; damaged, or of another version")
    return ckpt


def load_network(ckpt, path, device="cpu", option="--ckpt"):
    """(averaged network in eval mode, settings) of a checkpoint's dict. Raises ValueError."""
    settings = argparse.Namespace(**{**ckpt["args"], "device": torch.device(device)})
    try:
        nets = build(settings)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{option} {path}: its settings describe no network ({e})") from e
    net = nets[0] if isinstance(nets, tuple) else nets
    load_weights(net, ckpt["ema"], path, option)
    settings.trained = "not of this script"
    if "step" in ckpt:
        settings.trained = f"step {ckpt['step']} of {ckpt.get('steps', 'a finished training')}"
    return net.eval(), settings


def check_settings(ckpt, new, what):
    """Raises ValueError where the settings of a checkpoint are others than the `new` ones.

    Of averaged weights alone, as in .weights/, only the network's count.
    """
    old = {**ckpt["args"], "data": ckpt.get("data")}
    names = [name for name in (new if "rng" in ckpt else NETWORK) if new[name] != old.get(name)]
    if names:
        differ = ", ".join(f"{name} {new[name]} (checkpoint: {old.get(name)})" for name in names)
        raise ValueError(f"{what} with other settings: {differ}")


def load_weights(net, state, path, option="--ckpt"):
    """Fills `net` from a state dict, also of DistributedDataParallel or torch.compile; or ValueError."""
    try:
        net.load_state_dict({re.sub(r"^((module|_orig_mod)\.)+", "", name): w for name, w in state.items()})
    except (TypeError, AttributeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{option} {path}: found {len(state)} weights, not this network's ({reason})") from e
    broken = [name for name, value in net.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{option} {path}: {len(broken)} weights are not finite, first {broken[0]}")


def progress_bar(args, total, what, unit, initial=0):
    """A tqdm bar of the first process; TQDM_DISABLE=1 hides it. In a file it writes a line a minute."""
    try:
        from tqdm import tqdm
    except ImportError:  # the file copied alone runs without progress bars
        tqdm = None
    if tqdm is None or args.rank > 0:
        nothing = lambda *_, **__: None
        return argparse.Namespace(update=nothing, set_postfix=nothing, close=nothing)
    terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
    options = dict(initial=initial, file=Screen(sys.stderr), mininterval=1 if terminal else 60)
    return tqdm(total=total, desc=what, unit=unit, **options)


class Run:
    """`for step in run`: --resume, progress bar, log, checkpoints, signals and torchrun around a training.

    settings: what --resume must find unchanged; `steps` is among them where a step depends on it.
    data: the tensors of the training set. parts: the networks and optimisers that a checkpoint holds.
    before_save(): makes the averaged network ready.
    """

    def __init__(self, args, steps, settings, data, parts, before_save=lambda: None):
        self.args = args
        self.steps = steps
        self.settings = settings
        self.images = len(data[0])
        self.data = [hashlib.sha256(x.cpu().contiguous().numpy()).hexdigest() for x in data]
        self.parts = parts
        self.before_save = before_save
        self.step = 0
        self.seconds = 0.0
        self.log = []
        self.totals = {}  # of each loss since the last row of the log: sum, count
        self.signalled = False
        if args.batch_size % args.world:
            raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of {args.world} processes")
        if args.resume:
            self.resume()
        elif args.rank == 0 and Path(args.ckpt).exists():
            raise ValueError(f"--ckpt {args.ckpt}: exists; go on with --resume, or give another --ckpt")
        if args.world > 1 and args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        if args.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        if args.rank > 0:  # every process draws images and noise of its own
            rng = np.random.default_rng([args.seed, self.step, args.rank])
            torch.manual_seed(int(rng.integers(2**62)))

    def __iter__(self):
        args = self.args
        lock = self.lock() if args.rank == 0 else None
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                    handlers[number] = signal.signal(number, lambda *_: setattr(self, "signalled", True))
        self.say(f"{args.ckpt}: {self.images:,} images, {args.device}, {'bf16' if args.bf16 else 'float32'}")
        bar = progress_bar(args, self.steps, "train", "step", initial=self.step)
        start = time.perf_counter() - self.seconds
        saved = self.seconds
        stopped = False
        try:
            while self.step < self.steps and not stopped:
                self.step += 1
                yield self.step
                self.seconds = time.perf_counter() - start
                stopped = self.agree_to_stop()
                if self.step % (10 if self.step <= 1000 else 100) == 0:
                    self.log.append(self.row())
                    self.totals = {}
                last = stopped or self.step == self.steps
                if last or self.seconds - saved > 120:
                    self.save(again=not last)
                    saved = self.seconds
                bar.update()  # the screen comes last: it may be gone
                bar.set_postfix(self.log[-1] if self.log else {}, refresh=False)
            if args.world > 1:  # after an error it would wait for the other processes
                dist.destroy_process_group()
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if lock:
                Path(lock.name).unlink(missing_ok=True)
                lock.close()
        self.say(f"{args.ckpt}: step {self.step}, {self.seconds:.0f} s of training")
        if self.step < self.steps:
            raise KeyboardInterrupt(f"stopped at step {self.step}; go on with --resume")

    def lock(self):
        """Refuses a second training on this checkpoint; the lock ends with the process, however it ends."""
        Path(self.args.ckpt).parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{self.args.ckpt}.lock", "w")  # noqa: SIM115 (what cannot be written shows now)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--ckpt {self.args.ckpt}: another training writes it; give another")
        except OSError:  # a file system without locks
            pass
        return file

    def agree_to_stop(self):
        """True after a signal; the processes of torchrun ask one another, and stop together."""
        flag = torch.tensor(float(self.signalled))
        if self.args.world > 1:
            dist.all_reduce(flag)
        return flag.item() > 0

    def say(self, text):
        if self.args.rank == 0:
            print(text, file=Screen(sys.stdout))

    def record(self, **values):
        """Adds a step's losses (tensors) to the means of the log's next row, without waiting for a GPU."""
        for name, value in values.items():
            total, count = self.totals.get(name, (0, 0))
            self.totals[name] = (total + value.detach(), count + 1)

    def row(self):
        """The means since the last row of the log; raises FloatingPointError for nan and inf."""
        means = {name: round(float(total / count), 5) for name, (total, count) in self.totals.items()}
        if not all(map(math.isfinite, means.values())):
            advice = f"{self.args.ckpt} keeps the last good state, if any; try a lower --lr"
            raise FloatingPointError(f"{means} at step {self.step}; {advice}")
        before = self.log[-1] if self.log else {"step": 0, "seconds": 0.0}
        images = (self.step - before["step"]) * self.args.batch_size
        rate = round(images / max(self.seconds - before["seconds"], 1e-9), 1)
        return {"step": self.step, **means, "images_per_s": rate, "seconds": round(self.seconds, 1)}

    def save(self, again=False):
        """Writes the checkpoint, then its log. again: there is another try later, so failing is a warning."""
        args = self.args
        rows = [*self.log, self.row()] if self.totals else self.log
        if args.rank > 0:
            return
        self.before_save()
        rng = {"cpu": torch.get_rng_state()}
        if args.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(args.device)
        state = dict(script=NAME, args=self.settings, data=self.data, step=self.step, steps=self.steps)
        state.update(seconds=self.seconds, log=self.log, totals=self.totals, rng=rng, command=args.command)
        state.update({name: part.state_dict() for name, part in self.parts.items()})
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        try:
            write_whole(args.ckpt, lambda file: torch.save(state, file))
            write_text(log_path(args.ckpt), "".join(",".join(map(str, line)) + "\n" for line in lines))
        except OSError as e:
            if not again:
                raise
            print(f"warning: {e}; training goes on", file=Screen(sys.stderr))

    def resume(self):
        """Loads args.ckpt into the parts; raises ValueError where settings, images or labels differ.

        With averaged weights alone, as in .weights/, the optimisers start anew.
        """
        path = self.args.ckpt
        ckpt = load_checkpoint(path)
        alone = "rng" not in ckpt
        check_settings(ckpt, {**self.settings, "data": self.data}, f"--resume {path}")
        self.step = ckpt["step"]
        self.seconds = ckpt["seconds"]
        if self.step + alone > self.steps:
            raise ValueError(f"--resume {path}: is at step {self.step}, expected fewer than {self.steps}")
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                load_weights(part, ckpt.get("ema" if alone and name == "model" else name, {}), path)
            elif not alone:
                part.load_state_dict(ckpt[name])
                for parameter, state in part.state.items():  # a GPU has them in channels_last
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.empty_like(parameter).copy_(state[key])
        if alone:
            torch.manual_seed(self.args.seed + self.step)
            return
        self.log = ckpt["log"]
        self.totals = ckpt["totals"]
        torch.set_rng_state(ckpt["rng"]["cpu"])
        if self.args.device.type == "cuda" and "cuda" in ckpt["rng"]:
            torch.cuda.set_rng_state(ckpt["rng"]["cuda"], self.args.device)


def choose_device(name):
    """auto, cpu, cuda or cuda:N -> a torch.device that works here; each process of torchrun gets its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not available here ({str(e).splitlines()[0]})") from e


def bf16_is_fast(device):
    """True where bfloat16 is known to be fast: CUDA capability 8 and later, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)


def fail(message):
    """What argparse calls for wrong usage: an importer gets an exception, never SystemExit."""
    raise ValueError(message)


def number(kind):
    """argparse type of a range: `int 1..`, `float 0..1`."""
    of, low, high = re.fullmatch(r"(int|float) (.*)\.\.(.*)", kind).groups()
    cast = {"int": int, "float": float}[of]

    def convert(text):
        if not float(low) <= cast(text) <= float(high or sys.float_info.max):  # nan is nowhere
            raise argparse.ArgumentTypeError(f"{text}: expected {kind}")
        return cast(text)

    convert.__name__ = of
    return convert


def add_option(p, line):
    """Adds an option to a parser from a line: name, kind, default, --modes and help, two spaces apart.

    kind: choices `a|b`, a range such as `int 1..9`, `switch`, or a word for any text. x2, x+, x*: a list.
    """
    name, kind, default, modes, text = re.split("  +", line, maxsplit=4)
    kind, _, nargs = kind.partition(" x")
    default = ast.literal_eval(default)
    how = dict(dest=name[2:].removeprefix("no-").replace("-", "_"), default=default)
    if kind == "switch":
        how["action"] = "store_false" if default else "store_true"
    else:
        text += " (default: %(default)s)"
        how.update(metavar=kind.split()[0], nargs=int(nargs) if nargs.isdecimal() else nargs or None)
    if "|" in kind:
        cast = int if isinstance(default, int) else str
        how.update(type=cast, choices=[cast(choice) for choice in kind.split("|")])
    if ".." in kind:
        how["type"] = number(kind)
    p.modes[name] = list(MODES) if modes == "all" else modes.split()
    title = f"of --mode {modes}" if len(p.modes[name]) == 1 else "of several modes"
    if title not in p.groups:
        p.groups[title] = p.add_argument_group(title)
    p.groups[title].add_argument(name, help=text, **how)


def parse(options, argv, presets):
    """The settings of a command line. options: the lines for add_option.

    presets(settings): the defaults that hold for this mode, method and report, where they are others.
    """
    style = functools.partial(argparse.RawDescriptionHelpFormatter, width=110, max_help_position=30)
    usage = f"python {NAME}.py --mode MODE [--option value ...]"
    p = argparse.ArgumentParser(NAME, usage, __doc__, formatter_class=style, allow_abbrev=False)
    p.error = fail
    p.modes = {}
    p.groups = {}
    add_option(p, f"--mode  {'|'.join(MODES)}  'train'  all  what to do")
    add_option(p, "--device  NAME  'auto'  all  auto, cpu, cuda or cuda:N")
    for line in options.strip().splitlines():
        add_option(p, line)
    argv = sys.argv[1:] if argv is None else list(argv)
    known = [text for text in argv if text not in ("-h", "--help")]
    for _ in range(2):  # of one option's default another's may depend
        p.set_defaults(**presets(p.parse_known_args(known)[0]))
    args = p.parse_args(argv)
    args.command = shlex.join(["python", f"{NAME}.py", *argv])
    args.given = {text.split("=")[0] for text in argv if text.startswith("--")}
    for name in sorted(args.given & p.modes.keys()):
        if args.mode not in p.modes[name]:
            fail(f"{name}: has no use with --mode {args.mode}, only with {', '.join(p.modes[name])}")
    launched = dist.is_torchelastic_launched()  # left-over variables of another launcher do not count
    args.rank = int(os.environ.get("RANK", 0)) if launched else 0
    args.world = int(os.environ.get("WORLD_SIZE", 1)) if launched else 1
    if args.world > 1 and args.mode not in SHARED:
        fail(f"--mode {args.mode}: cannot share its work among {args.world} processes")
    args.device = choose_device(args.device)
    args.bf16 = bf16_is_fast(args.device) if args.precision == "auto" else args.precision == "bf16"
    return args


def refuse(args, uses, contradictions):
    """Raises ValueError for options without a use, and for contradictions.

    uses: (whether there is one, with what, options). contradictions: (whether there is one, message).
    """
    for used, what, names in uses:
        unused = sorted(args.given & {f"--{name}" for name in names.split()})
        if unused and not used:
            fail(f"{unused[0]}: has a use only with {what}; leave it out")
    for wrong, message in contradictions:
        if wrong:
            fail(message)


def main(argv=None):
    """The command line: what goes wrong becomes one line on standard error and an exit code."""
    sys.path.append(str(HERE))  # of common.py, for python -m FOLDER.SCRIPT
    with contextlib.redirect_stdout(Screen(sys.stdout)), contextlib.redirect_stderr(Screen(sys.stderr)):
        try:
            args = parse_args(argv)
            return MODES[args.mode](args)
        except KeyboardInterrupt as e:
            code, line = 130, str(e) or "stopped"
        except FloatingPointError as e:
            code, line = 1, f"error: {e}"
        except ImportError as e:
            code = 2
            line = f"error: {e}; pip install -r requirements.txt, and keep common.py beside this file"
        except (ValueError, OSError) as e:
            code, line = 2, f"error: {e}"
        except (RuntimeError, MemoryError) as e:
            if not isinstance(e, MemoryError) and "memory" not in str(e):
                raise
            code, line = 1, f"error: memory ran out ({str(e)[:200]}); use a smaller --batch-size"
        print(" ".join(line.split()), file=sys.stderr)
        raise SystemExit(code)


if __name__ == "__main__":
    main()
