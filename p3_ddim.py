"""DDIM on faces: the 2023 course's network and graded sampler, and networks of one's own.

Papers: DDIM (arXiv 2010.02502), DDPM (2006.11239), DPM-Solver++ (2211.01095), v-prediction (2202.00512),
min-SNR (2303.09556), EMA and learning rate (2312.02696), autoguidance (2406.02507), inversion (2312.12540).

  python p3_ddim.py --mode noise --out noise                               # noises 00.pt ... 09.pt
  python p3_ddim.py --mode sample --noise noise --out out --ckpt UNet.pt   # NN.png for every NN.pt
  python p3_ddim.py --mode mse --input out --gt face/GT                    # mean squared error
  python p3_ddim.py --mode eta-grid --noise noise --ckpt UNet.pt           # rows eta, columns noises
  python p3_ddim.py --mode interpolate --noise noise --ckpt UNet.pt        # slerp and lerp of two noises

  python p3_ddim.py --mode train --data hw2_data                           # a 64x64 network of one's own
  python p3_ddim.py --mode sample --sampler dpm++ --out faces              # 1000 faces of it
  python p3_ddim.py --mode sample --guide .weights/p3_guide.pt             # better ones, by autoguidance
  python p3_ddim.py --mode invert --input photos --out inverted            # face -> noise -> face

Real faces, --seed 0, 1000 images by dpm++ with 10 calls and a guide: Frechet distance on EfficientNet-Lite0
84.5, face rate 98.0 %, after 16,058 of 20,000 steps (813 minutes on one shared core of an AMD EPYC).
The method is what stands above `# evaluate and plots`, in reading order.
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

T = 1000
SAMPLERS = ("ddim", "dpm++", "ddpm")


# ---------------- networks ----------------


def init(layer, scale=1.0):
    """Uniform, variance scale / mean of fan-in and fan-out; bias 0. 1e-10 starts a branch at zero."""
    nn.init.xavier_uniform_(layer.weight, math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(c_in, c_out, stride=1, scale=1.0):
    """3x3 convolution that keeps height and width, or halves them at stride 2."""
    return init(nn.Conv2d(c_in, c_out, 3, stride, padding=1), scale)


def norm(channels):
    """GroupNorm with 32 groups, or fewer where that leaves a group less than four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels)


class TimeEmbedding(nn.Module):
    """Integer steps (B,) -> (B, channels): sine of all frequencies, then cosine."""

    def __init__(self, channels):
        super().__init__()
        exponents = torch.arange(0, channels, 2) / channels
        self.register_buffer("inv_freq", torch.exp(-math.log(10000) * exponents))

    def forward(self, t):
        angles = t[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], 1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the time embedding is added in between."""

    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.time = nn.Sequential(nn.SiLU(), init(nn.Linear(c_time, c_out)))
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(c_out, c_out, scale=1e-10)
        self.skip = init(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.skip(x)


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a skip connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = init(nn.Conv2d(channels, 3 * channels, 1))
        self.out = init(nn.Conv2d(channels, channels, 1), scale=1e-10)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # each (B, HW, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, c_in, c_out, c_time, dropout, attention=False):
        super().__init__()
        self.resblocks = ResBlock(c_in, c_out, c_time, dropout)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, time):
        return self.attention(self.resblocks(x, time))


class UNet(nn.Module):
    """Noisy images (B, 3, H, W) and integer steps (B,) -> eps or v (B, 3, H, W).

    channels: a width per resolution, multiples of 32; blocks: residual blocks at each; attention: the strides
    that have it. Without arguments it is the 2023 course's network of UNet.pt, 113,673,219 parameters.
    """

    def __init__(self, channels=(128, 128, 256, 256, 512, 512), blocks=2, attention=(16,), dropout=0.0):
        super().__init__()
        c = channels[0]
        c_time = 4 * c
        self.time = nn.Sequential(
            TimeEmbedding(c), init(nn.Linear(c, c_time)), nn.SiLU(), init(nn.Linear(c_time, c_time))
        )
        down = [conv3x3(3, c)]
        skips = [c]
        for level, width in enumerate(channels):
            for _ in range(blocks):
                down.append(Block(c, width, c_time, dropout, 2**level in attention))
                c = width
                skips.append(c)
            if level < len(channels) - 1:
                down.append(nn.Sequential(conv3x3(c, c, stride=2)))  # halves H and W
                skips.append(c)
        middle = [Block(c, c, c_time, dropout, attention=True), Block(c, c, c_time, dropout)]
        up = []
        for level, width in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):  # one more: the skip of the stem or of the downsampling
                up.append(Block(c + skips.pop(), width, c_time, dropout, 2**level in attention))
                c = width
            if level > 0:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3x3(c, c)))  # doubles H and W
        for name, modules in (("down", down), ("mid", middle), ("up", up)):
            for i, module in enumerate(modules, 1):
                self.add_module(f"{name}{i}", module)  # down1, down2, ...: the course's names
        self.out = nn.Sequential(norm(c), nn.SiLU(), conv3x3(c, 3, scale=1e-10))

    def forward(self, x, t):
        time = self.time(t)  # (B, c_time)
        h = x
        skips = []
        for name, module in list(self.named_children())[1:-1]:  # down1, ..., mid1, mid2, up1, ...
            if name.startswith("up") and isinstance(module, Block):
                h = torch.cat([h, skips.pop()], 1)
            h = module(h, time) if isinstance(module, Block) else module(h)
            if name.startswith("down"):
                skips.append(h)
        return self.out(h)


def build(args):
    """The network that `args` describes, on args.device."""
    net = UNet(args.channels, args.blocks, args.attention, args.dropout)
    if args.device.type == "cuda":  # on CPUs GroupNorm's gradient is several times slower in channels_last
        net = net.to(memory_format=torch.channels_last)
    return net.to(args.device)


class Guided(nn.Module):
    """Autoguidance (2406.02507): a network moved away from a weaker one, its guide; w = 1 is it alone."""

    def __init__(self, model, guide, w):
        super().__init__()
        self.model = model
        self.guide = guide
        self.w = w

    def forward(self, x, t):
        weak = self.guide(x, t).float()
        return weak + self.w * (self.model(x, t) - weak)


# ---------------- schedule, loss, samplers ----------------


def make_alpha_bar():
    """alpha_bar (1000,) in float64 of the course's utils.py: beta linear from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def diffusion_loss(model, x0, alpha_bar, gamma):
    """Mean squared error of v (2202.00512) at random steps, stratified over x0 (B, 3, H, W) in [-1, 1]."""
    b = len(x0)
    u = (torch.rand(1, device=x0.device) + torch.arange(b, device=x0.device) / b) % 1
    t = (u * T).long()
    a = alpha_bar[t].sqrt().float().view(-1, 1, 1, 1)
    s = (1 - alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)
    eps = torch.randn_like(x0)  # the noisy image is x_t = a x0 + s eps
    v = a * eps - s * x0
    error = (model(a * x0 + s * eps, t) - v).square().mean((1, 2, 3))
    if gamma > 0:  # min-SNR (2303.09556): x0's error, 1 / (snr + 1) of v's, has the weight min(snr, gamma)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        error = (snr.clamp(max=gamma) / (snr + 1)).float() * error
    return error.mean()


def predictor(model, alpha_bar, prediction, bf16=False, clamp=True):
    """predict(x, t) -> (x0, eps) for the samplers, t an int. prediction: what `model` gives, "eps" or "v"."""

    def predict(x, t):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out = model(x, torch.full((len(x),), t, device=x.device)).float()
        a = alpha_bar[t].sqrt().item()
        s = (1 - alpha_bar[t]).sqrt().item()
        eps = out if prediction == "eps" else a * out + s * x  # a v + s x_t = eps
        x0 = (x - s * eps) / a
        if clamp:  # x0 alone, as in the course's recipe
            x0 = x0.clamp(-1, 1)
        return x0, eps

    return predict


# A sampler makes images in about [-1, 1] from normal noise x (B, 3, H, W), and calls predict once at each of
# the decreasing integer `times`. The last step ends at alpha_bar = 1, at the image itself; ddim's at `end`.


def ddpm(predict, x, alpha_bar, times, noise):
    """Ancestral sampling with the posterior's variance (2006.11239, equations 6 and 7). noise(): like x."""
    levels = [*alpha_bar[times].tolist(), 1.0]
    for t, bar, bar_next in zip(times, levels, levels[1:]):
        x0, _ = predict(x, t)
        alpha = bar / bar_next  # of this step alone
        beta = 1 - alpha
        mean = math.sqrt(bar_next) * beta / (1 - bar) * x0 + math.sqrt(alpha) * (1 - bar_next) / (1 - bar) * x
        x = mean + math.sqrt((1 - bar_next) / (1 - bar) * beta) * noise()
    return x


def ddim(predict, x, alpha_bar, times, eta=0.0, noise=None, end=1.0):
    """DDIM (2010.02502, equations 12 and 16). eta: 0 is deterministic, 1 is as noisy as ddpm."""
    levels = [*alpha_bar[times].tolist(), end]
    for t, bar, bar_next in zip(times, levels, levels[1:]):
        x0, eps = predict(x, t)
        sigma = eta * math.sqrt((1 - bar_next) / (1 - bar) * (1 - bar / bar_next))  # eta times that of ddpm
        x = math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noise()
    return x


def ddim_inverse(predict, x, alpha_bar, times, iterations=3, end=1.0):
    """The noise from which `ddim`, with the same times and end, eta 0 and no clamping, makes the image x."""
    levels = [*alpha_bar[times].tolist(), end]
    for t, bar, bar_next in reversed(list(zip(times, levels, levels[1:]))):
        start = x
        for _ in range(iterations):  # fixed-point iteration (2312.12540): a step from `start` ends at x
            _, eps = predict(start, t)
            x0 = (x - math.sqrt(1 - bar_next) * eps) / math.sqrt(bar_next)
            start = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * eps
        x = start
    return x


def dpm_solver(predict, x, alpha_bar, times):
    """DPM-Solver++(2M) (2211.01095, algorithm 2), then one prediction of x0 at the last time."""
    a = alpha_bar.sqrt().tolist()
    s = (1 - alpha_bar).sqrt().tolist()
    before = None  # (h, x0) of the step before
    for t, t_next in zip(times, times[1:]):
        x0, _ = predict(x, t)
        h = math.log(a[t_next] / s[t_next]) - math.log(a[t] / s[t])  # the step in lambda, half the log-SNR
        middle = x0
        if before is not None:  # second order: x0 extrapolated to the middle of the step
            middle = x0 + (x0 - before[1]) * h / (2 * before[0])
        # exact where x0 stays `middle` during the step; with middle = x0 it is a step of DDIM
        x = s[t_next] / s[t] * x - a[t_next] * math.expm1(-h) * middle
        before = (h, x0)
    return predict(x, times[-1])[0]


def ddim_times(calls):
    """The course's times: 981, 961, ..., 21, 1 for 50 calls. Raises ValueError unless they are even."""
    if calls < 2 or T % calls:
        raise ValueError(f"--sample-steps {calls}: ddim expects a divisor of {T} from 2 on")
    return list(range(1, T, T // calls))[::-1]


def log_snr_times(alpha_bar, calls, last):
    """T - 1, then times evenly spaced in lambda, half the log-SNR, from -4 (almost pure noise) to `last`."""
    lambda_ = (alpha_bar / (1 - alpha_bar)).log() / 2
    grid = torch.linspace(max(lambda_[-1].item(), -4.0), lambda_[last].item(), calls, dtype=torch.float64)
    times = (lambda_[:, None] - grid).abs().argmin(0)
    times[0] = len(alpha_bar) - 1
    return times.unique().flip(0).tolist()  # fewer than `calls` where two coincide


# ---------------- train ----------------


@torch.no_grad()
def update_ema(ema, model, step):
    """Power-function average over about the last tenth of training (2312.02696, section 3.1: gamma 16)."""
    weight = 1 - (1 - 1 / step) ** 17
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, weight)


def train(args, images, labels=None):
    """Trains for args.steps steps, writes args.ckpt, returns the EMA network in eval mode.

    images: uint8 (N, 3, H, H), H what the network can halve. labels: not used. args: parse_args([...]).
    Raises ValueError, FloatingPointError (loss not finite), KeyboardInterrupt (after Ctrl-C; saved).
    """
    check_training_set(args, images)
    torch.manual_seed(args.seed)
    model = build(args)
    ema = build(args)
    ema.load_state_dict(model.state_dict())
    optim = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    settings = {name: getattr(args, name) for name in NETWORK + TRAINING} | {"size": images.shape[-1]}
    run = Run(args, args.steps, settings, (images,), dict(model=model, ema=ema, optim=optim))
    net = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    images = images.to(args.device)
    alpha_bar = make_alpha_bar().to(args.device)
    for step in run:
        i = torch.randint(len(images), (args.batch_size // args.world,), device=args.device)
        x0 = images[i].float() / 127.5 - 1
        flipped = torch.rand(len(i), 1, 1, 1, device=args.device) < 0.5
        x0 = torch.where(flipped, x0.flip(3), x0)

        # warm-up, then 1 / sqrt decay (2312.02696); like the EMA it does not depend on args.steps
        optim.param_groups[0]["lr"] = args.lr * min(step / 200, 1) / max((step - 1) / 5000, 1) ** 0.5
        # minimise the squared error of the predicted v
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = diffusion_loss(net, x0, alpha_bar, args.gamma)
        optim.zero_grad()
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        update_ema(ema, model, step)
        run.record(loss=loss, gradient=gradient)
    return ema.eval()


# ---------------- sample ----------------


class Noise:
    """Each call draws normal noise of `shape` for each image, which depends on (seed, its key) alone."""

    def __init__(self, keys, shape, seed=0, device="cpu"):
        self.generators = [np.random.default_rng([seed, *key]) for key in keys]
        self.shape = shape
        self.device = device

    def __call__(self):
        draws = [g.standard_normal(self.shape, np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(draws)).to(self.device)


def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, on the CPU."""
    return ((x.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).cpu()


def min_max_uint8(x):
    """Each image of (N, 3, H, W) from its minimum and maximum to 0..255, rounded as save_image does."""
    low = x.amin((1, 2, 3), keepdim=True)
    high = x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-5)
    return (x * 255 + 0.5).to(torch.uint8).cpu()


@torch.inference_mode()
def generate(model, settings, noise, keys=None, seed=0, sampler="ddim", calls=50, eta=0.0, bf16=False):
    """Images uint8 (N, 3, H, W) on the CPU, from normal noise (N, 3, H, W), float32. Raises ValueError.

    model, settings: of load_model. sampler: ddim, dpm++, ddpm; calls: of the network, for the first two.
    eta: of ddim; with eta > 0, and in ddpm, noise is added that depends on (seed, key of the image) alone.
    keys: whole numbers for each image, (i, 1) by default.
    """
    keys, seed, calls = check_request(settings, noise, keys, seed, sampler, calls)
    x = noise.to(settings.device)
    added = Noise(keys, x.shape[1:], seed, settings.device)
    alpha_bar = make_alpha_bar()
    predict = predictor(model, alpha_bar, settings.prediction, bf16)
    if sampler == "ddpm":
        x = ddpm(predict, x, alpha_bar, list(range(T))[::-1], added)
    elif sampler == "ddim":
        x = ddim(predict, x, alpha_bar, ddim_times(calls), eta, added, end=alpha_bar[0].item())
    else:  # ours ends best at 20: distances of 400 faces 128, 128, 131, 135 at 10, 20, 30, 40
        last = 0 if settings.course else 20
        x = dpm_solver(predict, x, alpha_bar, log_snr_times(alpha_bar, calls, last))
    return min_max_uint8(x) if settings.course else to_uint8(x)


# ---------------- evaluate and plots ----------------


def check_request(settings, noise, keys, seed, sampler, calls):
    """(keys, seed, calls) as whole numbers; raises ValueError for what `generate` cannot do."""
    check_noise(noise, settings, "noise")
    if keys is None:
        keys = [(i, 1) for i in range(len(noise))]
    keys = [whole_numbers(key, "keys") for key in keys]
    if len(keys) != len(noise):
        raise ValueError(f"keys: found {len(keys)}, expected one for each of {len(noise)} images")
    (seed,) = whole_numbers([seed], "--seed")
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler}: expected one of {', '.join(SAMPLERS)}")
    if sampler != "ddpm":  # which has T
        (calls,) = whole_numbers([calls], "--sample-steps (calls)", 1, T // 2)
    return keys, seed, calls


def load_model(path, device="cpu", option="--ckpt"):
    """(network in eval mode, settings) of a checkpoint, of weights in .weights/, or of the course's UNet.pt.

    settings.prediction: "v" or "eps". settings.size: height and width of its images.
    settings.course: True for the course's network: float32 by default, images scaled by min and max.
    Raises ValueError or OSError, naming the `option` of the command line, for other files.
    """
    ckpt = load_file(path, option)
    if isinstance(ckpt, dict) and "script" not in ckpt:  # the state dict of UNet.pt, or what holds it
        for wrapper in ("state_dict", "model"):
            if isinstance(ckpt.get(wrapper), dict):
                ckpt = ckpt[wrapper]
        ckpt = {"args": COURSE, "ema": ckpt}
    else:
        ckpt = check_checkpoint(ckpt, path, option)
    model, settings = load_network({**ckpt, "args": OWN | ckpt["args"]}, path, device, option)
    # without gradients channels_last is a fifth faster, on CPUs too
    return model.to(memory_format=torch.channels_last), settings


def load_guided(args):
    """load_model of --ckpt, and with --guide the two as one network. Says which weights they are."""
    model, settings = load_model(args.ckpt, args.device)
    if args.rank == 0:
        print(f"weights: {args.ckpt}, {settings.trained}" + (f", guide: {args.guide}" if args.guide else ""))
    if args.guide is None:
        return model, settings
    guide, other = load_model(args.guide, args.device, "--guide")
    found, expected = [
        f"size {s.size}, prediction {s.prediction}, {len(s.channels)} resolutions" for s in (other, settings)
    ]
    if found != expected:
        raise ValueError(f"--guide {args.guide}: found {found}; expected {expected}, as of {args.ckpt}")
    return Guided(model, guide, args.autoguidance), settings


def read_noise(path, settings):
    """The noise (1, 3, H, W) of a file, read without running code from it. Raises ValueError."""
    noise = load_file(path, "--noise")
    check_noise(noise, settings, path)
    if len(noise) != 1:
        raise ValueError(f"{path}: found {tuple(noise.shape)}, expected (1, 3, H, W)")
    return noise.detach()


def write_tensor(path, tensor):
    """Writes a tensor as .pt, whole or not at all."""
    alone = tensor.clone()  # torch.save writes the whole batch of a view
    write_whole(path, lambda file: torch.save(alone, file))


class StartNoise:
    """What images start from: the files of --noise, or noise drawn from --seed; read batch by batch.

    names: of the images, without .png. shape: (3, H, W). All files are checked at once; raises ValueError.
    count: the first so many; left out: all files, or --num images.
    """

    def __init__(self, args, settings, count=None):
        self.args = args
        self.settings = settings
        if args.noise is None:
            size = args.size or settings.size
            check_size([size], settings, "--size")
            self.shape = (3, size, size)
            self.names = [f"{i:04d}" for i in range(count or args.num)]
            return
        self.paths = sorted(Path(args.noise).glob("[!.]*.pt"))[:count]
        if len(self.paths) < (count or 1):
            found = f"found {len(self.paths)} files *.pt, expected at least {count or 1}"
            raise ValueError(f"--noise {args.noise}: {found}; --mode noise --out FOLDER makes ten")
        self.names = [path.stem for path in self.paths]
        shapes = {read_noise(path, settings).shape[1:] for path in self.paths}
        if len(shapes) > 1:
            found = sorted(tuple(shape) for shape in shapes)
            raise ValueError(f"--noise {args.noise}: found noises of {found}, expected one shape")
        self.shape = shapes.pop()

    def __call__(self, numbers):
        """Noise (B, 3, H, W) of the images with these numbers."""
        if self.args.noise is None:
            return Noise([(i,) for i in numbers], self.shape, self.args.seed)()
        return torch.cat([read_noise(self.paths[i], self.settings) for i in numbers])


class Watched:
    """A network with a bar over its `calls`, which whoever uses it closes."""

    def __init__(self, args, model, calls):
        self.model = model
        self.bar = progress_bar(args, calls, "network", "call")

    def __call__(self, x, t):
        self.bar.update()
        return self.model(x, t)


def use_bf16(args, settings):
    """True for bf16; --precision auto leaves the course's network in float32."""
    return args.bf16 and (args.precision == "bf16" or not settings.course)


def sampling(args, settings):
    """The keyword arguments of `generate` that the command line sets, but eta."""
    return dict(seed=args.seed, sampler=args.sampler, calls=args.sample_steps, bf16=use_bf16(args, settings))


def network_calls(args):
    """How often the sampler calls the network for one image."""
    return T if args.sampler == "ddpm" else args.sample_steps


def describe(args):
    """The sampler and its number of network calls, for titles."""
    guided = f", autoguidance {args.autoguidance}" if args.guide else ""
    return f"{args.sampler}, {network_calls(args)} steps{guided}"


def batches(args, numbers, shape):
    """`numbers` in groups of --batch-size, or of as many images as have the pixels of one of 256x256.

    Larger groups are slower on CPUs; a GPU gets five times as many.
    """
    pixels = 256**2 if args.device.type == "cpu" else 5 * 256**2
    size = args.batch_size or max(1, pixels // math.prod(shape[-2:]))
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def sample(args):
    """Writes NN.png into --out for every NN.pt in --noise, or --num images."""
    model, settings = load_guided(args)
    noise = StartNoise(args, settings)
    out = Path(args.out)
    make_folder(args, out, [f"{name}.png" for name in noise.names])
    start = time.perf_counter()
    mine = range(args.rank, len(noise.names), args.world)
    groups = batches(args, mine, noise.shape)
    network = Watched(args, model, len(groups) * network_calls(args))
    options = dict(sampling(args, settings), eta=args.eta[0])
    for group in groups:
        keys = [(i, 1) for i in group]
        images = generate(network, settings, noise(group), keys, **options)
        for i, image in zip(group, images):
            write_png(out / f"{noise.names[i]}.png", image)
    network.bar.close()
    seconds = time.perf_counter() - start
    print(f"{len(mine)} images in {out}: {seconds:.1f} s, {describe(args)}")


def write_noise(args):
    """Writes 00.pt ... 09.pt, noises (1, 3, --size, --size), into --out; equal ones that it holds stay."""
    check_size([args.size], args, "--size")
    shape = (3, args.size, args.size)
    noises = {Path(args.out) / f"{i:02d}.pt": Noise([(i,)], shape, args.seed)() for i in range(10)}
    missing = [path for path in noises if not path.exists()]
    for path, noise in noises.items():
        if path not in missing and not torch.equal(read_noise(path, args), noise):
            raise ValueError(f"--out {args.out}: holds another {path.name}; give another folder")
    for path in missing:
        write_tensor(path, noises[path])


@torch.inference_mode()
def invert(args):
    """Writes the noise NN.pt of each image NN of --input, and what comes back as NN.png, into --out.

    Neither way is clamped. Prints the PSNR of what comes back. Without --input it takes the first eight val
    faces of --data, and writes them as inversion.png and the PSNR as inversion.json instead.
    """
    from common import list_images, load_faces, read_images, save_grid

    out = Path(args.out)
    model, settings = load_guided(args)
    size = args.size or settings.size
    check_size([size], settings, "--size")
    if args.input is None:
        images = load_faces(args.data, "val", size)[: min(args.num, 8)]
    else:
        paths = list_images(args.input)[: args.num]
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):
            raise ValueError(f"--input {args.input}: expected images of different names before the dot")
        if out.resolve() == Path(args.input).resolve():
            raise ValueError(f"--out {args.out}: is --input; give another folder for what comes back")
        images = read_images(paths, (size, size))
    groups = batches(args, range(len(images)), images.shape)
    alpha_bar = make_alpha_bar()
    times = ddim_times(args.sample_steps)
    end = alpha_bar[0].item()
    network = Watched(args, model, len(groups) * len(times) * (args.iterations + 1))
    predict = predictor(network, alpha_bar, settings.prediction, use_bf16(args, settings), clamp=False)
    psnr = []
    states = []
    for group in groups:
        x = images[group].to(args.device) / 127.5 - 1
        noises = ddim_inverse(predict, x, alpha_bar, times, args.iterations, end)
        if not torch.isfinite(noises).all():
            raise ValueError(f"--iterations {args.iterations}: the inversion diverges; try 1")
        back = to_uint8(ddim(predict, noises, alpha_bar, times, end=end))
        errors = (back.double() - images[group]).square().mean((1, 2, 3))
        psnr += (10 * torch.log10(255**2 / errors.clamp(min=1e-9))).tolist()
        if args.input is None:
            states.append(torch.stack([images[group], to_uint8(noises / 3), back]))
            continue
        for i, noise, image in zip(group, noises.cpu(), back):
            write_tensor(out / f"{names[i]}.pt", noise[None])
            write_png(out / f"{names[i]}.png", image)
    network.bar.close()
    quality = f"PSNR of the reconstruction {np.mean(psnr):.2f} dB, worst {min(psnr):.2f}"
    how = f"{describe(args)}, {args.iterations} iterations"
    print(f"{len(images)} images in {out}: {quality}, {how}")
    if args.input is None:
        rows = ["face", "its noise", "back"]
        save_grid(out / "inversion.png", torch.cat(states, 1), rows, [""] * len(images), how)
        write_text(out / "inversion.json", json.dumps({"n": len(psnr), "psnr": float(np.mean(psnr))}))


def mse(args):
    """Prints each image's mean squared error against --gt, of pixel values 0 to 255 in float64."""
    from common import list_images, read_image

    mine = {path.name: path for path in list_images(args.input)}
    truth = {path.name: path for path in list_images(args.gt)}
    alone = sorted(mine.keys() ^ truth.keys())
    if alone:
        found = f"{len(alone)} images without a partner ({', '.join(alone[:3])})"
        raise ValueError(f"--input {args.input}, --gt {args.gt}: {found}; expected the same file names")
    errors = []
    for name, path in mine.items():
        a = read_image(path).astype(np.float64)
        b = read_image(truth[name]).astype(np.float64)
        if a.shape != b.shape:
            found = f"{a.shape[1]}x{a.shape[0]} in --input, {b.shape[1]}x{b.shape[0]} in --gt"
            raise ValueError(f"{name}: {found}; expected the same size")
        errors.append(float(((a - b) ** 2).mean()))
        print(f"{name}  {errors[-1]:.4f}")
    result = {"n": len(errors), "mse": float(np.mean(errors)), "largest": max(errors)}
    print(f"mean {result['mse']:.4f}  largest {result['largest']:.4f}  (the course's baseline: 20)")
    if args.out:
        write_text(args.out, json.dumps(result, indent=1))


def evaluate(args):
    """FID, KID and IS of --input's images against the val faces of --data; --out gets them as JSON."""
    from common import face_folder, score_images

    if not args.data:
        raise ValueError("--mode eval: expected --data DIR, whose face/val is the reference")
    result = score_images(args.input, face_folder(args.data, "val"), args.inception, args.device)
    if args.out:
        write_text(args.out, json.dumps(result, indent=1))


def figure(args, name, model, settings, noise, rows, columns, title="", scale=1.5):
    """Writes the figure `name` into --out: images of noise (N, 3, H, W) at each eta, as rows and columns.

    An eta that is repeated adds other noise: keys (i, 1), (i, 2), ...
    """
    from common import save_grid

    path = Path(args.out) / name
    trial = path.with_name(f".trial-{name}")
    title = f"{title}{describe(args)}"
    empty = torch.zeros(len(rows), len(columns), 3, 8, 8, dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # what can fail fails now, not when the images are computed
        save_grid(trial, empty, rows, columns, title, scale)
    finally:
        trial.unlink(missing_ok=True)
    groups = batches(args, range(len(noise)), noise.shape)
    network = Watched(args, model, len(args.eta) * len(groups) * network_calls(args))
    options = sampling(args, settings)
    images = []
    for row, eta in enumerate(args.eta):
        draw = 1 + args.eta[:row].count(eta)
        for group in groups:
            keys = [(i, draw) for i in group]
            images.append(generate(network, settings, noise[group], keys, eta=eta, **options))
    network.bar.close()
    images = torch.cat(images).view(len(rows), len(columns), *noise.shape[1:])
    save_grid(path, images, rows, columns, title, scale)


def eta_grid(args):
    """Writes eta_grid.png into --out: rows eta, columns the first four noises."""
    model, settings = load_guided(args)
    noise = StartNoise(args, settings, 4)
    rows = [f"eta = {eta}" for eta in args.eta]
    columns = [f"{name}.pt" for name in noise.names]
    figure(args, "eta_grid.png", model, settings, noise(range(4)), rows, columns, scale=2.5)


def slerp(a, b, weight):
    """Spherical interpolation of whole tensors; weight 0 gives a, 1 gives b. Parallel ones: as torch.lerp.

    It keeps the norm of normal noise; half-way torch.lerp falls to 0.7 of it.
    """
    theta = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    sine = torch.sin(theta)
    if not sine > 1e-6:  # nan for a tensor of zeros
        return torch.lerp(a, b, weight)
    return torch.sin((1 - weight) * theta) / sine * a + torch.sin(weight * theta) / sine * b


def interpolate(args):
    """Writes interpolation.png into --out: slerp above lerp of the first two noises; prints their norms."""
    model, settings = load_guided(args)
    noise = StartNoise(args, settings, 2)
    a, b = noise(range(2))
    weights = [i / 10 for i in range(11)]
    latents = []
    for name, function in (("slerp", slerp), ("lerp", torch.lerp)):
        row = [function(a, b, weight) for weight in weights]
        print(f"norm, {name}: " + "  ".join(f"{x.norm():.1f}" for x in row))
        latents += row
    title = f"from {noise.names[0]} to {noise.names[1]}, "
    latents = torch.stack(latents)
    figure(args, "interpolation.png", model, settings, latents, ["slerp", "lerp"], weights, title)


def grid(args):
    """Writes first.png (32 images) and training.png into --out."""
    from common import save_curves

    model, settings = load_guided(args)
    noise = StartNoise(args, settings, 32)
    out = Path(args.out)
    log = log_path(args.ckpt)
    if log.is_file():
        save_curves(out / "training.png", log, ["loss"], "training loss")
    figure(args, "first.png", model, settings, noise(range(32)), [""] * 4, [""] * 8)
    print(f"{out}: {', '.join(sorted(os.listdir(out)))}")


# ---------------- the reports ----------------

# The reports sample with the course's network `UNet()`, whose weights are the course's UNet.pt.
# load_model gives its settings, or adds OWN to those of a checkpoint of this script.
COURSE = {"prediction": "eps", "course": True, "size": 256}
COURSE.update(channels=[128, 128, 256, 256, 512, 512], blocks=2, attention=[16], dropout=0.0)
OWN = {"prediction": "v", "course": False}


# ---------------- command line ----------------

NAME = "p3_ddim"
ADVICE = f"make one with: python {NAME}.py --mode train --data DIR --ckpt FILE, or give the course's UNet.pt"
SHARED = ("train", "sample")  # the modes that torchrun's processes share
# settings that a checkpoint keeps: --resume refuses others
NETWORK = ("channels", "blocks", "attention", "dropout", "size")
TRAINING = ("batch_size", "lr", "gamma", "seed")

DRAWING = "sample eta-grid interpolate grid"
OPTIONS = f"""
--ckpt  FILE  None  train invert {DRAWING}  checkpoint to write or read, or the course's UNet.pt
--precision  auto|bf16|float32  "auto"  train invert {DRAWING}  auto: bf16 where fast, not for UNet.pt
--batch-size  int 1..  None  train invert {DRAWING}  images per step; else at a time, None: 256x256 pixels
--seed  int 0..4294967295  0  train noise {DRAWING}  of training and of all noise
--size  int 8..  None  train noise invert {DRAWING}  height and width of the images; None: the network's
--data  DIR  None  train eval invert  the course's layout; None: built-in faces
--out  PATH  None  noise eval mse invert {DRAWING}  folder for results; eval, mse: a JSON file
--input  DIR  "samples"  eval mse invert  folder of images; invert without one: eight faces of --data
--gt  DIR  "face/GT"  mse  ground truth with the same file names
--inception  FILE  None  eval  pytorch-fid's Inception weights; None: downloaded once
--fast  switch  False  train  preset for a CPU and some minutes
--resume  switch  False  train  go on from --ckpt, or from weights alone
--steps  int 1..  20000  train  in all; more with --resume prolong the run
--lr  float 0..  1e-3  train  peak learning rate of AdamW
--gamma  float 0..  5.0  train  min-SNR weighting; 0: none
--channels  int 32.. x+  [32, 64, 128, 256]  train  width at each resolution, multiples of 32
--blocks  int 1..  1  train  residual blocks per resolution
--attention  int 1.. x*  [8]  train  strides with attention
--dropout  float 0..1  0.0  train  in the residual blocks
--noise  DIR  None  {DRAWING}  folder of (1, 3, H, W) noises NN.pt; None: drawn from --seed
--sampler  ddim|dpm++|ddpm  "ddim"  {DRAWING}  DDIM, DPM-Solver++(2M), or DDPM over all 1000 steps
--sample-steps  int 1..500  50  invert {DRAWING}  network calls of ddim and dpm++
--eta  float 0..1 x+  [0.0]  sample eta-grid grid  ddim: 1 is as noisy as ddpm; eta-grid: its rows
--guide  FILE  None  {DRAWING}  a weaker network, whose mistakes the sampler avoids (2406.02507)
--autoguidance  float 0..  1.4  {DRAWING}  how far from the guide; 1 is the network alone
--num  int 1..  1000  sample invert  images without --noise; invert: at most so many
--iterations  int 1..  3  invert  network calls per step; 1: the usual inversion
"""


def check_size(sides, settings, what):
    """Raises ValueError unless the network of `settings` can halve these heights and widths."""
    factor = 2 ** (len(settings.channels) - 1)
    if any(side == 0 or side % factor for side in sides):
        found = "x".join(str(side) for side in sides)
        raise ValueError(f"{what}: found {found}, expected multiples of {factor}, for the network's halvings")


def check_training_set(args, images):
    """Raises ValueError unless images are uint8 (N, 3, H, H), with H a multiple that the network needs."""
    n, *shape = images.shape
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[0] != 3 or shape[1] != shape[2] or not n:
        raise ValueError(f"images: found {images.dtype} {tuple(images.shape)}, expected uint8 (N, 3, H, H)")
    check_size(shape[1:], args, "images")


def check_noise(noise, settings, what):
    """Raises ValueError unless `noise` is a dense, finite float32 tensor (N, 3, H, W) of a fitting size."""
    found = type(noise).__name__
    fits = isinstance(noise, torch.Tensor)
    if fits:
        found = f"{tuple(noise.shape)} {noise.dtype} {noise.layout}"
        fits = noise.ndim == 4 and noise.shape[1] == 3 and len(noise) > 0
        fits = fits and noise.dtype == torch.float32 and noise.layout == torch.strided
    if not fits:
        raise ValueError(f"{what}: found {found}, expected (N, 3, H, W) torch.float32 torch.strided")
    check_size(noise.shape[2:], settings, what)
    if not torch.isfinite(noise).all():
        raise ValueError(f"{what}: holds values that are not finite; expected normal noise")


def presets(args):
    """The defaults of this --mode, --fast, --guide and --sampler that are not those of OPTIONS."""
    defaults = {
        "train": {"size": 64, "batch_size": 32},
        "sample": {"out": "samples"},
        "eta-grid": {"out": "p3_figures", "eta": [0.0, 0.25, 0.5, 0.75, 1.0]},
        "interpolate": {"out": "p3_figures"},
        "noise": {"out": "noise", "size": 256},
        "invert": {"out": "inverted", "input": None},
        "grid": {"out": "p3_figures"},
    }.get(args.mode, {})
    defaults["ckpt"] = find_ckpt(NAME, args.mode)
    if args.fast:
        defaults |= {"steps": 1500, "size": 32}
    if args.guide and args.mode != "eta-grid":
        defaults["sampler"] = "dpm++"
    if args.sampler == "dpm++":
        defaults["sample_steps"] = 10
    return defaults


def parse_args(argv=None):
    """The settings that `build`, `train` and the modes take; raises ValueError for wrong usage."""
    args = parse(OPTIONS, argv, presets)
    uses = [
        (args.noise is None, "no --noise", "size num"),
        (args.sampler != "ddpm", "--sampler ddim or dpm++", "sample-steps"),
        (args.sampler == "ddim", "--sampler ddim", "eta"),
        (args.guide, "--guide", "autoguidance"),
    ]
    grid_alone = args.mode == "eta-grid"
    contradictions = [
        (any(c % 32 for c in args.channels), f"--channels {args.channels}: expected multiples of 32"),
        (grid_alone and args.sampler != "ddim", f"--sampler {args.sampler}: eta is DDIM's"),
        (args.mode == "interpolate" and args.sampler == "ddpm", "--sampler ddpm: adds noise of its own"),
        (len(args.eta) > 1 and not grid_alone, f"--eta {args.eta}: only --mode eta-grid shows several"),
    ]
    refuse(args, uses, contradictions)
    if args.mode == "train":
        check_size([args.size], args, "--size")
    if args.sampler == "ddim":
        ddim_times(args.sample_steps)
    return args


def train_faces(args):
    """--mode train: trains on face/train of --data, or on the built-in faces."""
    from common import load_faces

    train(args, load_faces(args.data, "train", args.size))


MODES = {"train": train_faces, "sample": sample, "eval": evaluate, "mse": mse, "noise": write_noise}
MODES |= {"eta-grid": eta_grid, "interpolate": interpolate, "invert": invert, "grid": grid}


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
