"""GANs: DCGAN, WGAN-GP and SN-GAN on 64x64 faces, ACGAN on 28x28 digits.

Papers: DCGAN (arXiv 1511.06434), WGAN-GP (1704.00028), spectral normalisation (1802.05957), hinge loss
(1705.02894), ACGAN (1610.09585), DiffAugment (2006.10738), EMA of the generator (1806.04498).

  python p1_gan.py --mode train --fast --ckpt fast.pt                # sngan on built-in faces, minutes
  python p1_gan.py --mode train --method dcgan --data hw2_data       # the reports' method A
  python p1_gan.py --mode train --method sngan --data hw2_data       # ours; also wgangp, and acgan: digits
  python p1_gan.py --mode sample --method sngan --out faces          # 0000.png ... 0999.png
  python p1_gan.py --mode grid --ckpt checkpoints/p1_dcgan.pt checkpoints/p1_sngan.pt --out figures

Real data, --seed 0: sngan's weights here reach a Frechet distance of 117.2 on EfficientNet-Lite0 (1000 faces
against 2,025) after 19,307 steps at rates of 2e-4, replayed as CUDA graphs on an H200. acgan reaches 99.7 %
digit accuracy of 1000 images after 132 minutes on one shared core of an AMD EPYC. README.md has the tables.
"""

# SPDX-License-Identifier: MIT
import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
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
from torch.nn.utils import parametrizations, parametrize

Z = 100  # length of a latent
DIGITS = 10


# ---------------- networks ----------------


def up(c_in, c_out, stride=2, padding=1, bias=False):
    """Doubles height and width; with stride 1 and padding 0 it goes from 1x1 to 4x4."""
    conv = nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def refine(c):
    """A 3x3 convolution at the same size."""
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())


class Generator(nn.Module):
    """DCGAN's generator, 3,576,704 parameters: z (B, 100) -> (B, 3, 64, 64) in [-1, 1]; y is unused."""

    def __init__(self, z_dim=Z, bias=False):
        super().__init__()
        self.main = nn.Sequential(
            up(z_dim, 512, stride=1, padding=0, bias=bias),  # (B, 512, 4, 4)
            up(512, 256, bias=bias),  # (B, 256, 8, 8)
            up(256, 128, bias=bias),  # (B, 128, 16, 16)
            up(128, 64, bias=bias),  # (B, 64, 32, 32)
            nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=bias),  # (B, 3, 64, 64)
        )
        self.register_buffer("gain", torch.ones(()))  # 1 in training; recalibrate() sets the average's

    def logits(self, z):
        """The image before gain and tanh, (B, 3, 64, 64)."""
        return self.main(z[:, :, None, None])

    def forward(self, z, y=None):
        return torch.tanh(self.gain * self.logits(z))


class DigitGenerator(nn.Module):
    """Class-conditional generator: z (B, 100), y (B,) digits -> (B, 3, 28, 28) in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(DIGITS, Z)
        linear = nn.Linear(Z, 256 * 49, bias=False)
        self.start = nn.Sequential(linear, nn.Unflatten(1, (256, 7, 7)), nn.BatchNorm2d(256), nn.ReLU())
        layers = [refine(256), up(256, 128), refine(128), up(128, 64), refine(64)]  # (B, 64, 28, 28)
        self.main = nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1), nn.Tanh())

    def forward(self, z, y):
        return self.main(self.start(z * self.label(y)))  # a product: in a concatenation G ignored z


def down(conv, batch_norm):
    """A layer of a discriminator: convolution, BatchNorm or none, LeakyReLU."""
    norm = nn.BatchNorm2d(conv.out_channels) if batch_norm else nn.Identity()
    return nn.Sequential(conv, norm, nn.LeakyReLU(0.2))


class Discriminator(nn.Module):
    """DCGAN's discriminator: (B, 3, 64, 64) -> logits (B,), digit logits (B, digits).

    norm: batch (2,765,568 parameters), none (WGAN-GP's critic, 2,763,776), or spectral: spectral norm
    beside BatchNorm. Spectral norm alone learns too slowly to teach G with 448,000 images.
    """

    def __init__(self, norm, bias=False, digits=0):
        super().__init__()

        def conv(c_in, c_out, stride=2, padding=1):
            layer = nn.Conv2d(c_in, c_out, 4, stride, padding, bias=bias)
            return parametrizations.spectral_norm(layer) if norm == "spectral" else layer

        self.main = nn.Sequential(
            down(conv(3, 64), False),  # (B, 64, 32, 32)
            down(conv(64, 128), norm != "none"),  # (B, 128, 16, 16)
            down(conv(128, 256), norm != "none"),  # (B, 256, 8, 8)
            down(conv(256, 512), norm != "none"),  # (B, 512, 4, 4)
            conv(512, 1 + digits, stride=1, padding=0),
            nn.Flatten(),  # (B, 1 + digits)
        )

    def forward(self, x):
        h = self.main(x).float()
        return h[:, 0], h[:, 1:]


class DigitDiscriminator(nn.Module):
    """Spectral norm beside BatchNorm: (B, 3, 28, 28) -> logits (B,), digit logits (B, 10)."""

    def __init__(self):
        super().__init__()

        def conv(c_in, c_out, kernel, stride, batch_norm=True):
            layer = nn.Conv2d(c_in, c_out, kernel, stride, 1, bias=not batch_norm)
            return down(parametrizations.spectral_norm(layer), batch_norm)

        self.main = nn.Sequential(
            conv(3, 64, 3, 1, batch_norm=False),
            conv(64, 128, 4, 2),  # (B, 128, 14, 14)
            conv(128, 128, 3, 1),
            conv(128, 256, 4, 2),  # (B, 256, 7, 7)
            conv(256, 256, 3, 1),
            nn.Flatten(),  # (B, 256 * 49)
        )
        self.real = parametrizations.spectral_norm(nn.Linear(256 * 49, 1))
        self.digit = parametrizations.spectral_norm(nn.Linear(256 * 49, DIGITS))

    def forward(self, x):
        h = self.main(x)
        return self.real(h)[:, 0].float(), self.digit(h).float()


def dcgan_init(module):
    """N(0, 0.02) for convolutions (1511.06434, section 4), N(1, 0.02) for BatchNorm, as in its code."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


def build(args):
    """(generator, discriminator) of args.method and args.report, on args.device."""
    if args.report == "2021":
        g, d = networks_2021(args.method)
    elif args.method == "acgan":
        g = DigitGenerator()
        d = DigitDiscriminator()
    else:
        norms = {"dcgan": "batch", "wgangp": "none", "sngan": "spectral"}
        g = Generator()
        d = Discriminator(norms[args.method])
        g.apply(dcgan_init)
        if args.method != "sngan":  # spectral norm sets its own scale
            d.apply(dcgan_init)
    return tuple(net.to(args.device, memory_format=torch.channels_last) for net in (g, d))


# ---------------- losses and augmentation ----------------


def d_loss(loss, real, fake, smoothing=0.0):
    """D's loss on logits (B,) of real and generated images; smoothing: the real label is 1 - this."""
    if loss == "bce":  # binary cross-entropy
        of_real = F.binary_cross_entropy_with_logits(real, torch.full_like(real, 1 - smoothing))
        return of_real + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    if loss == "wasserstein":  # minus the estimate of the distance
        return fake.mean() - real.mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()  # hinge, 1705.02894


def g_loss(loss, fake):
    """G's loss on logits (B,): minus their mean; bce: the non-saturating - log D(G(z))."""
    return F.softplus(-fake).mean() if loss == "bce" else -fake.mean()


def gradient_penalty(critic, real, fake):
    """(|grad critic(x)| - 1)^2 at random x between real and fake, in float32 (1704.00028, equation 3)."""
    with torch.autocast(real.device.type, enabled=False):
        t = torch.rand(len(real), 1, 1, 1, device=real.device)
        x = (t * real + (1 - t) * fake).float().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def translate(x):
    """Moves each image of x (B, C, H, W) by up to an eighth of its size; zeros come in (2006.10738)."""
    b, _, h, w = x.shape
    border = h // 8
    dy, dx = torch.randint(2 * border + 1, (2, b), device=x.device)
    rows = torch.arange(h, device=x.device) + dy[:, None]  # (B, H), of the padded image
    columns = torch.arange(w, device=x.device) + dx[:, None]  # (B, W)
    image = torch.arange(b, device=x.device)[:, None, None]
    padded = F.pad(x, [border] * 4).permute(0, 2, 3, 1)  # (B, H + 2 border, W + 2 border, C)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def shown(args, x, progress):
    """What D sees of real and generated images x, in D's and G's steps; noise ends at progress 1."""
    sigma = args.instance_noise * (1 - progress)
    if sigma > 0:
        x = x + sigma * torch.randn_like(x)
    if args.diffaugment == "translation":
        x = translate(x)
    return x


# ---------------- train ----------------


def d_step(args, g, d, optim, images, labels, progress):
    """D step: minimise the loss of telling real from generated images; returns means for the log."""
    i = torch.randint(len(images), (args.batch_size // args.world,), device=args.device)
    real = images[i] / 127.5 - 1
    y = labels[i] if args.method == "acgan" else None
    if args.flip:
        mirrored = torch.rand(len(real), 1, 1, 1, device=args.device) < 0.5
        real = torch.where(mirrored, real.flip(3), real)
    # cached: one power iteration of the spectral norm for both calls of D
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16), parametrize.cached():
        with torch.no_grad():
            fake = g(torch.randn(len(real), Z, device=args.device), y).float()
        real_logits, digits = d(shown(args, real, progress))
        fake_logits, fake_digits = d(shown(args, fake, progress))
        loss = d_loss(args.loss, real_logits, fake_logits, args.label_smoothing)
        if args.method == "acgan":
            loss = loss + F.cross_entropy(digits, y)
            if args.report:  # 1610.09585 also reads the generated digits; ours does not
                loss = loss + F.cross_entropy(fake_digits, y)
    if args.method == "wgangp":  # weight 10, as in 1704.00028
        loss = loss + 10 * gradient_penalty(lambda x: d(x)[0], real, fake)
    norm = update(args, d, optim, loss)
    if args.loss == "bce":  # the log shows probabilities
        real_logits = real_logits.sigmoid()
        fake_logits = fake_logits.sigmoid()
    return dict(d_loss=loss, d_real=real_logits.mean(), d_fake=fake_logits.mean(), d_gradient=norm)


def g_step(args, g, d, optim, progress):
    """G step: minimise the loss of making D take generated images for real; returns means for the log."""
    b = args.batch_size // args.world
    y = torch.randint(DIGITS, (b,), device=args.device) if args.method == "acgan" else None
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        fake = g(torch.randn(b, Z, device=args.device), y).float()
        logits, digits = d(shown(args, fake, progress))
        loss = g_loss(args.loss, logits)
        if args.method == "acgan":  # a large weight from the start makes digits of a class alike
            weight = 1 + (args.digit_weight - 1) * progress**3
            loss = loss + weight * F.cross_entropy(digits, y)
    norm = update(args, g, optim, loss)
    return dict(g_loss=loss, g_gradient=norm)


def update(args, net, optim, loss):
    """One step of `optim` on the parameters of `net` alone; returns the norm of their gradient."""
    optim.zero_grad()
    loss.backward(inputs=list(net.parameters()))
    if args.world > 1:  # DistributedDataParallel does not support the penalty's torch.autograd.grad
        for parameter in net.parameters():
            parameter.grad /= args.world
            dist.all_reduce(parameter.grad)
    norm = nn.utils.clip_grad_norm_(net.parameters(), math.inf)  # measures, clips nothing
    optim.step()
    return norm


def rate(decay, progress):
    """Factor of the learning rates: 1 (none), linear to 0, or halved at each third (thirds)."""
    if decay == "linear":
        return 1 - progress
    if decay == "thirds":
        return 0.5 ** math.floor(3 * progress)
    return 1


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Average over about the last 1 / (1 - decay) rounds, fewer at the start (1806.04498)."""
    weight = 1 - min(decay, (step - 1) / (step + 9))
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, weight)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


def find_gain(logits, spread, low=0.1, high=4.0):
    """The gain, low to high, at which tanh(gain * logits) has the mean deviation `spread` over images."""
    for _ in range(12):  # to a thousandth
        gain = (low + high) / 2
        if torch.tanh(gain * logits).std(0).mean() < spread:
            low = gain
        else:
            high = gain
    return (low + high) / 2


@torch.no_grad()
def recalibrate(args, ema, spread):
    """Gives the averaged generator what training does not, from ten batches of 100, in float32.

    BatchNorm statistics of its own: those of training do not fit averaged weights (1809.11096).
    Faces also get the training images' contrast: BatchNorm hides the scale of a batch, so D cannot teach it.
    spread: the mean over pixels of the training images' standard deviation, in [-1, 1].
    """
    if args.ema == 0:  # it is G, and stays as it was trained
        return
    for module in ema.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    noise = torch.Generator().manual_seed(args.seed)  # training's random numbers stay as they are
    logits = []
    ema.train()
    for _ in range(10):
        z = torch.randn(100, Z, generator=noise).to(args.device)
        y = torch.randint(DIGITS, (100,), generator=noise).to(args.device)
        if args.method == "acgan":
            ema(z, y)
        else:
            logits.append(ema.logits(z))
    ema.eval()
    if args.method != "acgan":
        ema.gain.fill_(find_gain(torch.cat(logits), spread))


def train(args, images, labels=None):
    """Trains for args.steps updates of D, or args.epochs, writes args.ckpt, returns the EMA generator.

    images: uint8 (N, 3, 64, 64) faces, or for acgan (N, 3, 28, 28) digits with labels, int64 (N,) in 0..9.
    args: parse_args([...]). Every 500 steps a picture of fixed noises goes into <ckpt>_grids/.
    Raises ValueError, FloatingPointError (loss not finite), KeyboardInterrupt (after Ctrl-C; saved).
    """
    check_training_set(args.method, images, labels)
    torch.manual_seed(args.seed)
    g, d = build(args)
    ema = build(args)[0].eval()
    ema.load_state_dict(g.state_dict())
    options = dict(betas=args.betas, weight_decay=args.weight_decay, fused=True)
    optim_g = torch.optim.AdamW(g.parameters(), args.lr, **options)
    optim_d = torch.optim.AdamW(d.parameters(), args.lr_d, **options)
    thousand = images[:: max(len(images) // 1000, 1)]
    spread = thousand.float().std(0).mean().item() / 127.5
    parts = dict(model=g, ema=ema, discriminator=d, optim_g=optim_g, optim_d=optim_d)
    steps = args.steps or args.epochs * math.ceil(len(images) / args.batch_size)
    data = (images,) if labels is None else (images, labels)
    run = Run(args, steps, settings_of(args, steps), data, parts, lambda: recalibrate(args, ema, spread))
    images = images.to(args.device)
    labels = None if labels is None else labels.to(args.device)
    for step in run:
        progress = (step - 1) / steps
        optim_g.param_groups[0]["lr"] = args.lr * rate(args.decay, progress)
        optim_d.param_groups[0]["lr"] = args.lr_d * rate(args.decay, progress)
        losses = d_step(args, g, d, optim_d, images, labels, progress)
        if step % args.n_critic == 0:
            for _ in range(args.g_updates):
                losses.update(g_step(args, g, d, optim_g, progress))
            update_ema(ema, g, step // args.n_critic, args.ema)
        run.record(**losses)
        if args.rank == 0 and (step % 500 == 0 or step == steps):
            recalibrate(args, ema, spread)
            save_picture(args, ema, step)
    return ema


# ---------------- sample ----------------


def latents(keys, seed=0):
    """Normal noise (N, 100). keys: a tuple of integers for each image; its noise is of (seed, key) alone."""
    draws = [np.random.default_rng([seed, *key]).standard_normal(Z, np.float32) for key in keys]
    return torch.from_numpy(np.stack(draws))


def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, on the CPU."""
    return ((x.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).cpu()


@torch.inference_mode()
def generate(model, settings, z, digits=None):
    """Images of the latents z (N, 100): uint8 (N, 3, H, W) on the CPU, computed in float32.

    model, settings: of load_model. z: for instance latents([(i,) for i in range(N)]).
    digits: N integers in 0..9, for acgan alone. Raises ValueError for what is not of this form.
    """
    digits = check_latents(settings.method, z, digits)
    device = next(model.parameters()).device
    y = None if digits is None else torch.tensor(digits, device=device)
    x = model(z.to(device, torch.float32), y)
    if settings.method == "acgan" and x.shape[2] > 28:  # 2021's have 64x64 pixels; the grader wants 28x28
        x = F.interpolate(x, 28, mode="bilinear", antialias=True)
    return to_uint8(x)


# ---------------- evaluate and plots ----------------


def load_model(path, device="cpu", option="--ckpt"):
    """(EMA generator in eval mode, its settings) of a checkpoint, or of weights in .weights/.

    Raises ValueError or OSError, naming the `option` of the command line, for other files.
    """
    return load_network(load_checkpoint(path, option), path, device, option)


def image_keys(method, count):
    """Keys of `count` faces, (number,) from 0, or of `count` of each digit, (digit, number) from 1."""
    if method != "acgan":
        return [(number,) for number in range(count)]
    return [(digit, number) for digit in range(DIGITS) for number in range(1, count + 1)]


def from_keys(model, settings, keys, seed):
    """The images of `keys`, uint8 (N, 3, H, W); each depends on (seed, key) alone."""
    digits = [key[0] for key in keys] if settings.method == "acgan" else None
    return generate(model, settings, latents(keys, seed), digits)


def tile(images, columns):
    """uint8 (N, 3, H, W), N a multiple of `columns` -> one picture (3, H', W') with white lines between."""
    images = F.pad(images, (2, 0, 2, 0), value=255)
    _, channels, h, w = images.shape
    rows = images.view(-1, columns, channels, h, w).permute(2, 0, 3, 1, 4)
    return F.pad(rows.reshape(channels, -1, columns * w), (0, 2, 0, 2), value=255)


def first_images(model, settings, seed):
    """The first 32 faces, or 10 images of each digit, as one picture (3, H, W)."""
    count, columns = (10, 10) if settings.method == "acgan" else (32, 8)
    return tile(from_keys(model, settings, image_keys(settings.method, count), seed), columns)


def save_picture(args, ema, step):
    """Writes the first images beside the checkpoint; failing is a warning."""
    folder = Path(f"{str(args.ckpt).removesuffix('.pt')}_grids")
    try:
        write_png(folder / f"{step:06d}.png", first_images(ema, args, args.seed))
    except OSError as e:
        print(f"warning: {e}; training goes on", file=sys.stderr)


def interpolation(model, settings, seed):
    """Four rows of nine images, slerp between two latents; acgan: rows of the digits 0 to 3."""
    z = latents([(number,) for number in range(8)], seed)
    a = z[0::2]
    b = z[1::2]
    w = torch.linspace(0, 1, 9)[:, None, None]
    angle = torch.acos(F.cosine_similarity(a, b))[:, None]
    path = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)  # (9, 4, 100)
    digits = torch.arange(4).repeat_interleave(9)
    return tile(generate(model, settings, path.transpose(0, 1).reshape(-1, Z), digits), 9)


def sample(args):
    """Writes --num faces 0000.png ..., or --num digits of each class 0_001.png ..., into the folder --out."""
    model, settings = load_model(args.ckpt, args.device)
    if args.rank == 0:
        print(f"weights: {args.ckpt}, {settings.trained}")
    out = Path(args.out)
    if settings.method == "acgan":
        keys = image_keys("acgan", args.num or 100)
        names = [f"{digit}_{number:03d}.png" for digit, number in keys]
    else:
        keys = image_keys(settings.method, args.num or 1000)
        names = [f"{number:04d}.png" for (number,) in keys]
    make_folder(args, out, names)
    start = time.perf_counter()
    mine = range(args.rank, len(keys), args.world)
    bar = progress_bar(args, len(mine), "sample", "image")
    for i in range(0, len(mine), args.batch_size):
        batch = mine[i : i + args.batch_size]
        images = from_keys(model, settings, [keys[j] for j in batch], args.seed)
        for j, image in zip(batch, images):
            write_png(out / names[j], image)
        bar.update(len(batch))
    bar.close()
    print(f"{len(mine)} images in {out}: {time.perf_counter() - start:.1f} s, {settings.method}")


def evaluate(args):
    """Prints digit accuracy and diversity of --input's images (acgan), or FID, KID and IS against the
    val faces of --data; --out gets them as JSON. The checkpoint says which, without one --method.
    """
    from common import face_folder, score_digits, score_images

    method = args.method
    if Path(args.ckpt).is_file():
        method = load_checkpoint(args.ckpt)["args"]["method"]
    if args.inception and method == "acgan" or args.classifier and method != "acgan":
        raise ValueError(f"--inception is for faces, --classifier for acgan; found {method}")
    if method == "acgan":
        result = score_digits(args.input, args.data, args.classifier, Path(args.ckpt).parent, args.device)
    elif args.data is None:
        raise ValueError("--mode eval needs --data DIR, whose face/val is the reference")
    else:
        result = score_images(args.input, face_folder(args.data, "val"), args.inception, args.device)
    if args.out:
        write_text(args.out, json.dumps(result, indent=1))


def grid(args):
    """Writes first_<name>.png (32 faces, or 10 of each digit), interpolation_<name>.png and
    training_<name>.png of each --ckpt into --out; those like the first also as compare.png.
    """
    from common import save_curves

    names = [Path(path).name.removesuffix(".pt") for path in args.ckpts]
    if len(set(names)) < len({Path(path).resolve() for path in args.ckpts}):
        reason = "pictures of files of one name would overwrite each other; rename one"
        raise ValueError(f"--ckpt {' '.join(args.ckpts)}: {reason}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for path, name in zip(args.ckpts, names):
        model, settings = load_model(path, args.device)
        print(f"weights: {path}, {settings.trained}")
        pictures.append(first_images(model, settings, args.seed))
        write_png(out / f"first_{name}.png", pictures[-1])
        write_png(out / f"interpolation_{name}.png", interpolation(model, settings, args.seed))
        log = log_path(path)
        if log.is_file():
            columns = ["d_loss", "g_loss", "d_real", "d_fake"]
            title = f"{settings.method}: losses, D(x) and D(G(z))"
            save_curves(out / f"training_{name}.png", log, columns, title, yscale="linear")
    alike = [picture for picture in pictures if picture.shape == pictures[0].shape]
    if len(alike) > 1:
        apart = [F.pad(picture, (0, 24), value=255) for picture in alike]
        write_png(out / "compare.png", torch.cat(apart, 2)[:, :, :-24])
    print(f"{out}: {', '.join(sorted(os.listdir(out)))}")


# ---------------- the reports ----------------


class DigitGenerator2021(Generator):
    """ACGAN's generator of report 2021, 3,741,727 parameters: z (B, 100), y (B,) -> (B, 3, 64, 64)."""

    def __init__(self):
        super().__init__(Z + 20, bias=True)
        self.label = nn.Linear(DIGITS, 20)

    def forward(self, z, y):
        label = self.label(F.one_hot(y, DIGITS).to(z.dtype))
        return super().forward(torch.cat([z, label], 1))


class DigitDiscriminator2021(Discriminator):
    """ACGAN's discriminator of report 2021, 2,848,459 parameters: enlarges real digits to 64x64."""

    def __init__(self):
        super().__init__("batch", bias=True, digits=DIGITS)

    def forward(self, x):
        if x.shape[2] < 64:
            x = F.interpolate(x, 64, mode="bilinear")
        return super().forward(x)


def networks_2021(method):
    """(generator, discriminator): DCGAN with biases (3,577,667 and 2,766,529 parameters), or ACGAN."""
    if method == "acgan":
        g = DigitGenerator2021()
        d = DigitDiscriminator2021()
    else:
        g = Generator(bias=True)
        d = Discriminator("batch", bias=True)
    return g.apply(dcgan_init), d.apply(dcgan_init)


# What four reports say of their training; PRESETS has the rest. (p): the report does not say, the paper
# does. (o): neither says; ours. Method A of all reports is dcgan.
# fmt: off
REPORTS = {
    "2021": {
        "dcgan": dict(lr=2e-4, lr_d=2e-4, betas=[0.9, 0.999], g_updates=2, decay="thirds", epochs=120),
        "acgan": dict(lr=1e-4, lr_d=1e-4, betas=[0.5, 0.999], g_updates=1, epochs=10, digit_weight=1.0,
                      loss="bce", batch_size=64),  # (o) the batch
    },
    "2022a": {
        "dcgan": dict(betas=[0.5, 0.999], batch_size=64),
        "wgangp": dict(batch_size=64),  # (p) n_critic 5, weight 10 of the penalty, rate, betas
    },
    "2022b": {
        "dcgan": dict(),
        "sngan": dict(loss="bce", lr=2e-4, lr_d=2e-4, g_updates=1, batch_size=64,  # (o) but for the loss
                      steps=7000, weight_decay=0.01, label_smoothing=0.1, instance_noise=0.1),  # (o) how much
    },
    "2022c": {
        "dcgan": dict(n_critic=2),  # (o) "several" updates of D
        "wgangp": dict(),  # (p)
    },
}
# fmt: on
OF_REPORTS = dict(ema=0.0, diffaugment="none", decay="none")


# ---------------- command line ----------------

NAME = "p1_gan"
ADVICE = f"make one with: python {NAME}.py --mode train --data DIR, the same --method and --report"
SHARED = ("train", "sample")  # the modes that torchrun's processes share
# settings that a checkpoint keeps: --resume refuses others
NETWORK = ("method", "report")
TRAINING = ("batch_size", "lr", "lr_d", "betas", "weight_decay", "decay", "n_critic", "g_updates", "ema")
TRAINING += ("loss", "diffaugment", "label_smoothing", "instance_noise", "digit_weight", "flip", "seed")

# what each method trains with; -h explains the names
# fmt: off
PRESETS = {
    "dcgan":  dict(lr=2e-4, lr_d=2e-4, betas=[0.5, 0.999], n_critic=1, g_updates=1, ema=0.0, loss="bce",
                   diffaugment="none", decay="none", batch_size=64, steps=7000, flip=True),
    "wgangp": dict(lr=1e-4, lr_d=1e-4, betas=[0.0, 0.9], n_critic=5, g_updates=1, ema=0.0, loss="wasserstein",
                   diffaugment="none", decay="none", batch_size=64, steps=7000, flip=True),
    "sngan":  dict(lr=4e-4, lr_d=4e-4, betas=[0.5, 0.999], n_critic=1, g_updates=2, ema=0.999, loss="hinge",
                   diffaugment="translation", decay="linear", batch_size=16, steps=20000, flip=True),
    "acgan":  dict(lr=2e-4, lr_d=2e-4, betas=[0.5, 0.999], n_critic=1, g_updates=2, ema=0.999, loss="hinge",
                   diffaugment="translation", decay="linear", batch_size=32, steps=10000, flip=False),
}
# fmt: on

OPTIONS = """
--method  dcgan|wgangp|sngan|acgan  None  all  what to train; elsewhere it only names the default --ckpt
--report  2021|2022a|2022b|2022c  None  all  preset: networks and training of a report
--ckpt  FILE x+  None  all  checkpoint to write or read, its log.csv beside it; grid takes several
--seed  int 0..4294967295  0  train sample grid  of training and of all noise
--batch-size  int 1..  None  train sample  images per step; sample: images at a time
--data  DIR  None  train eval  the course's layout; None: built-in images
--out  PATH  None  sample eval grid  folder for results; eval: a JSON file
--input  DIR  "samples"  eval  folder of images
--classifier  FILE  None  eval  acgan: weights in the course's format; None: ours, or trained on --data
--inception  FILE  None  eval  faces: pytorch-fid's weights; None: downloaded once
--num  int 1..  None  sample  faces in all (None: 1000), or digits of each class (None: 100)
--fast  switch  False  train  preset: minutes on two cores; sngan and acgan pass the course's bars
--resume  switch  False  train  go on from --ckpt
--precision  auto|bf16|float32  "auto"  train  auto: bf16 autocast where the hardware is fast at it
--steps  int 1..  None  train  updates of D in all; more with --resume, where no step depends on it
--epochs  int 1..  None  train  passes over the images, instead of --steps
--lr  float 0..  None  train  learning rate of G
--lr-d  float 0..  None  train  learning rate of D
--betas  float 0..0.9999 x2  None  train  of AdamW
--weight-decay  float 0..  0.0  train  of AdamW
--decay  none|linear|thirds  None  train  of the rates; thirds: halved at 1/3 and 2/3
--n-critic  int 1..  None  train  updates of D per round
--g-updates  int 1..  None  train  updates of G after them
--ema  float 0..1  None  train  decay of the averaged generator that samples; 0: none
--diffaugment  none|translation  None  train  DiffAugment of all that D sees
--loss  bce|wasserstein|hinge  None  train  of D and G
--label-smoothing  float 0..1  0.0  train  bce: the real label is 1 - this
--digit-weight  float 0..  30.0  train  acgan: last weight of G's digit loss; the first is 1
--instance-noise  float 0..  0.0  train  standard deviation of noise on all that D sees; it decays to 0
--no-flip  switch  True  train  do not mirror images at random
"""


def settings_of(args, steps):
    """What a checkpoint keeps of a training; `steps` where a step depends on how many there are."""
    settings = {name: getattr(args, name) for name in NETWORK + TRAINING}
    fades = args.method == "acgan" and args.digit_weight != 1
    if args.decay != "none" or args.instance_noise > 0 or fades:
        settings["steps"] = steps
    return settings


def check_training_set(method, images, labels):
    """Raises ValueError unless images, and for acgan labels, are what `train` takes."""
    size = 28 if method == "acgan" else 64
    n, *shape = images.shape
    if images.dtype != torch.uint8 or shape != [3, size, size] or n < 2:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: found {found}, expected uint8 (N, 3, {size}, {size}) with two or more")
    if method != "acgan":
        return
    if labels is None:
        raise ValueError("labels: found none; acgan needs the digit of each image")
    if labels.dtype != torch.int64 or labels.shape != (n,) or labels.min() < 0 or labels.max() >= DIGITS:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels: found {found}, expected int64 ({n},) in 0 to {DIGITS - 1}")


def check_latents(method, z, digits):
    """The digits as a list, or None; raises ValueError unless z and digits are what `generate` takes."""
    if z.layout != torch.strided or not z.is_floating_point() or z.ndim != 2 or z.shape[1] != Z:
        found = f"{z.dtype} {tuple(z.shape)} ({z.layout})"
        raise ValueError(f"z: found {found}, expected a dense float tensor (N, {Z})")
    if not torch.isfinite(z).all():
        raise ValueError("z: found nan or inf, expected finite numbers")
    if method != "acgan":
        return None
    digits = whole_numbers([] if digits is None else digits, "digits", 0, DIGITS - 1)
    if len(digits) != len(z):
        raise ValueError(f"digits: found {len(digits)}, expected one for each of {len(z)} latents")
    return digits


def presets(args):
    """The defaults of this --mode, --method, --report and --fast that are not those of OPTIONS."""
    methods = REPORTS[args.report] if args.report else PRESETS
    method = args.method or ("dcgan" if args.report else "sngan")
    if method not in methods:
        fail(f"--report {args.report} --method {method}: this report has {' and '.join(methods)}")
    name = f"p1_{method}_{args.report}" if args.report else f"p1_{method}"
    defaults = {"method": method, "ckpt": [find_ckpt(name, args.mode)], **PRESETS[method]}
    if args.report:
        defaults |= OF_REPORTS | methods[method]
    if "epochs" in defaults:
        defaults["steps"] = None
    if args.fast:
        real = 1200 if method == "acgan" else 2000
        defaults |= {"steps": real if args.data else 300, "epochs": None}
    if args.mode == "sample":
        defaults |= {"out": "samples", "batch_size": 100}
    if args.mode == "grid":
        defaults["out"] = "p1_figures"
    return defaults


def parse_args(argv=None):
    """The settings that `build`, `train` and the modes take; raises ValueError for wrong usage."""
    args = parse(OPTIONS, argv, presets)
    uses = [
        (args.method == "acgan", "--method acgan", "digit-weight"),
        (args.mode == "train" or "--ckpt" not in args.given, "no --ckpt, which says it", "method report"),
        (args.loss == "bce", "--loss bce, which has a real label", "label-smoothing"),
    ]
    penalty = args.method == "wgangp"
    contradictions = [
        ({"--epochs", "--steps"} <= args.given, "--epochs and --steps: expected one of them"),
        (args.mode == "train" and args.batch_size < 2, "--batch-size: expected 2 or more, for BatchNorm"),
        (
            penalty != (args.loss == "wasserstein"),
            f"--loss {args.loss}: only wgangp has wasserstein's penalty",
        ),
        (len(args.ckpt) > 1 and args.mode != "grid", "--ckpt: takes one; only --mode grid shows several"),
    ]
    refuse(args, uses, contradictions)
    if "--epochs" in args.given:
        args.steps = None
    args.ckpts = args.ckpt
    args.ckpt = args.ckpts[0]
    return args


def train_data(args):
    """--mode train: trains on faces, or for acgan on MNIST-M, of --data or built-in."""
    from common import load_digits, load_faces

    if args.method == "acgan":
        train(args, *load_digits(args.data, "mnistm", "train"))
    else:
        train(args, load_faces(args.data, "train"))


MODES = {"train": train_data, "sample": sample, "eval": evaluate, "grid": grid}


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
