"""DDIM on faces with the 2023 course's network: the graded sampler, eta grid, slerp and lerp.

Papers: DDIM (arXiv 2010.02502), DDPM (2006.11239).

  python p3_ddim.py --mode noise --out noise                              # noises 00.pt ... 09.pt, for those without the course's
  python p3_ddim.py --mode sample --noise noise --out out --ckpt UNet.pt  # NN.png for every NN.pt, the course's recipe
  python p3_ddim.py --mode mse --input out --gt face/GT                   # mean squared error of each image and their mean
  python p3_ddim.py --mode eta-grid --noise noise --ckpt UNet.pt          # rows eta = 0 ... 1, columns noises 00-03
  python p3_ddim.py --mode interpolate --noise noise --ckpt UNet.pt       # slerp and lerp of noises 00 and 01

Network and sampler agree with values of the course's original network (tests/test_p3.py).
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

T = 1000


def fail(message):
    """Wrong usage or input: one line on standard error, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------ network

class TimeEmbedding(nn.Module):
    """Integer steps (B,) -> (B, channels): sine of all frequencies, then cosine."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("inv_freq", torch.exp(-math.log(10000) * torch.arange(0, channels, 2) / channels))

    def forward(self, t):
        angles = t.float()[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], 1)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, with the time embedding added in between, and a skip connection."""

    def __init__(self, c_in, c_out, c_time, dropout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in), conv3x3(c_in, c_out)
        self.time = nn.Sequential(nn.SiLU(), init(nn.Linear(c_time, c_out)))
        self.norm2, self.dropout, self.conv2 = nn.GroupNorm(32, c_out), nn.Dropout(dropout), conv3x3(c_out, c_out, scale=1e-10)
        if c_in != c_out:
            self.skip = init(nn.Conv2d(c_in, c_out, 1))

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.skip(x) if hasattr(self, "skip") else x)


class Attention(nn.Module):
    """Single-head self-attention over all positions, scaled by the root of the channels, with a skip connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(32, channels), init(nn.Conv2d(channels, 3 * channels, 1))
        self.out = init(nn.Conv2d(channels, channels, 1), scale=1e-10)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # each (B, HW, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A residual block, then attention where asked for."""

    def __init__(self, c_in, c_out, c_time, dropout, attention=False):
        super().__init__()
        self.resblocks = ResBlock(c_in, c_out, c_time, dropout)
        if attention:
            self.attention = Attention(c_out)

    def forward(self, x, time):
        x = self.resblocks(x, time)
        return self.attention(x) if hasattr(self, "attention") else x


def init(layer, scale=1.0):
    """Uniform with variance scale / mean of fan-in and fan-out, zero bias; 1e-10 makes a branch start as zero."""
    fan_out, fan_in = layer.weight.shape[:2]
    bound = math.sqrt(3 * scale / ((fan_in + fan_out) / 2 * layer.weight[0, 0].numel()))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(c_in, c_out, stride=1, scale=1.0):
    """3x3 convolution that keeps height and width, or halves them at stride 2."""
    return init(nn.Conv2d(c_in, c_out, 3, stride, padding=1), scale)


class UNet(nn.Module):
    """The 2023 course's face network; with the default arguments its UNet.pt loads strictly (113,673,219 parameters, 427 entries).

    forward(x, t): x (B, 3, H, W) noisy image, H and W multiples of 2^(levels - 1), t (B,) integer step -> eps (B, 3, H, W).
    channel: base width; multipliers: width of each level in units of it; blocks: residual blocks per level; attention: strides with attention.
    """

    def __init__(self, channel=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(16,), dropout=0.0):
        super().__init__()
        c_time = 4 * channel
        self.time = nn.Sequential(TimeEmbedding(channel), init(nn.Linear(channel, c_time)), nn.SiLU(), init(nn.Linear(c_time, c_time)))
        down, up, widths, c = [conv3x3(3, channel)], [], [channel], channel
        for level, m in enumerate(multipliers):
            for _ in range(blocks):
                down.append(Block(c, c := channel * m, c_time, dropout, 2**level in attention))
                widths.append(c)
            if level < len(multipliers) - 1:
                down.append(nn.Sequential(conv3x3(c, c, stride=2)))  # halves H and W
                widths.append(c)
        middle = [Block(c, c, c_time, dropout, True), Block(c, c, c_time, dropout)]
        for level, m in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                up.append(Block(c + widths.pop(), c := channel * m, c_time, dropout, 2**level in attention))
            if level:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3x3(c, c)))  # doubles H and W
        for name, modules in (("down", down), ("mid", middle), ("up", up)):  # the course's names: down1, down2, ...
            for i, module in enumerate(modules, 1):
                self.add_module(f"{name}{i}", module)
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), conv3x3(c, 3, scale=1e-10))
        self.names = [[f"{n}{i + 1}" for i in range(len(m))] for n, m in (("down", down), ("mid", middle), ("up", up))]

    def forward(self, x, t):
        time, skips = self.time(t), []
        for name in self.names[0]:
            module = getattr(self, name)
            x = module(x, time) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name in self.names[1]:
            x = getattr(self, name)(x, time)
        for name in self.names[2]:
            module = getattr(self, name)
            x = module(torch.cat([x, skips.pop()], 1), time) if isinstance(module, Block) else module(x)
        return self.out(x)


# ------------------------------------------------------------------ schedule and samplers

def make_alpha_bar():
    """alpha_bar (1000,) in float64 of the course's utils.py: beta linear from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def slerp(a, b, weight):
    """Spherical interpolation on the whole flattened tensor; 0 gives a, 1 gives b."""
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return torch.sin((1 - weight) * theta) / torch.sin(theta) * a + torch.sin(weight * theta) / torch.sin(theta) * b


def lerp(a, b, weight):
    """Linear interpolation: between two normal noises its norm falls to 0.7 of theirs, which the network never saw."""
    return (1 - weight) * a + weight * b


def ddim(eps_model, x, alpha_bar, steps=50, eta=0.0, noise=None):
    """The course's DDIM (2010.02502, equation 12): steps 1, 21, ..., 981 for 50; the last alpha_bar is alpha_bar[0], not 1.

    eps_model(x, t) -> eps; x0 is clamped to [-1, 1] and eps is not computed again after that; noise() -> like x is needed for eta > 0.
    """
    times = list(range(1, T, T // steps))
    for t, s in zip(reversed(times), reversed([0] + times[:-1])):
        a, b = alpha_bar[t].item(), alpha_bar[s].item()
        eps = eps_model(x, t)
        x0 = ((x - math.sqrt(1 - a) * eps) / math.sqrt(a)).clamp(-1, 1)
        sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noise()
    return x


def to_uint8(x):
    """Each image scaled by its own minimum and maximum over all channels to 0..255, rounded as torchvision's save_image does, on the CPU."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (((x - low) / (high - low).clamp(min=1e-5)) * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu()


# ------------------------------------------------------------------ sample

def load_model(args):
    """UNet in eval mode with the state dict of --ckpt, the course's UNet.pt."""
    if not Path(args.ckpt).is_file():
        fail(f"--ckpt {args.ckpt}: no such file; expected the course's UNet.pt")
    try:
        state = torch.load(args.ckpt, map_location=args.device, weights_only=True)
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        fail(f"--ckpt {args.ckpt}: not a readable state dict ({type(e).__name__})")
    model = UNet()
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    for what, names in (("missing", wanted.keys() - found.keys()), ("unknown", found.keys() - wanted.keys()),
                        ("of another shape", {n for n in wanted.keys() & found.keys() if wanted[n] != found[n]})):
        if names:
            fail(f"--ckpt {args.ckpt}: {len(names)} entries {what}, for instance {', '.join(sorted(names)[:3])}; expected the {len(wanted)} of the course's UNet.pt")
    model.load_state_dict(state)
    return model.to(args.device).eval()


def load_noises(folder, device, count=None):
    """(names without .pt, tensor (N, 3, H, W)) of all *.pt in `folder`, or of the first `count`."""
    paths = sorted(Path(folder).glob("*.pt"))[:count]
    if len(paths) < (count or 1):
        fail(f"--noise {folder}: found {len(paths)} files *.pt, expected at least {count or 1}; make some with --mode noise --out {folder}")
    noises = []
    for path in paths:
        try:
            noise = torch.load(path, map_location=device, weights_only=True)
        except Exception as e:
            fail(f"{path}: not a readable tensor ({type(e).__name__})")
        found = f"{tuple(noise.shape)} {noise.dtype}" if isinstance(noise, torch.Tensor) else type(noise).__name__
        if not (found.endswith("float32") and noise.ndim == 4 and noise.shape[:2] == (1, 3)) or any(s % 32 for s in noise.shape[2:]):
            fail(f"{path}: found {found}, expected (1, 3, H, W) torch.float32 with H and W multiples of 32")
        noises.append(noise)
        if noise.shape != noises[0].shape:
            fail(f"{path}: found {found}, expected {tuple(noises[0].shape)} as in {paths[0]}")
    return [p.stem for p in paths], torch.cat(noises)


@torch.inference_mode()
def generate(model, noises, args, eta=0.0):
    """Noises (N, 3, H, W) -> images uint8 (N, 3, H, W). What eta > 0 adds depends on --seed and the image's place in the folder alone."""
    out, calls, start, alpha_bar = [], 0, time.perf_counter(), make_alpha_bar()
    total = math.ceil(len(noises) / args.batch_size) * len(range(1, T, T // args.steps))
    for i in range(0, len(noises), args.batch_size):
        x = noises[i:i + args.batch_size]
        generators = [torch.Generator().manual_seed(args.seed * 100_003 + j) for j in range(i, i + len(x))]

        def noise():
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)

        def eps_model(x, t):
            nonlocal calls
            eps = model(x, torch.full((len(x),), t, device=x.device))
            calls += 1
            if calls == 2:  # the first call is slower
                print(f"about {(time.perf_counter() - start) / 2 * total:.0f} s for {len(noises)} images in {args.steps} steps on {x.device}", flush=True)
            return eps

        out.append(to_uint8(ddim(eps_model, x, alpha_bar, args.steps, eta, noise)))
    return torch.cat(out)


def sample(args):
    """Writes NN.png for every NN.pt in --noise."""
    names, noises = load_noises(args.noise, args.device)
    model, out = load_model(args), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, generate(model, noises, args)):
        write_png(out / f"{name}.png", image)
    print(f"{len(names)} images in {out}")


def write_png(path, image):
    """uint8 (3, H, W) as PNG, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_noise(args):
    """Writes ten noises 00.pt ... 09.pt of shape (1, 3, --size, --size)."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for i in range(10):
        noise = torch.randn(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(args.seed * 100_003 + i))
        torch.save(noise, Path(args.out) / f"{i:02d}.pt")


# ------------------------------------------------------------------ evaluate and plots

def mse(args):
    """Prints the mean squared error on the 0-255 scale, in float64, of each image of --input against --gt, and their mean."""
    from common import read_image
    folders = [{p.name: p for p in sorted(Path(f).glob("*.png"))} for f in (args.input, args.gt)]
    for folder, mine, other in ((args.input, *folders), (args.gt, *reversed(folders))):
        missing = sorted(other.keys() - mine.keys())
        if missing or not mine:
            fail(f"{folder}: {len(missing)} images missing ({', '.join(missing[:3])}); expected the same file names in --input and --gt")
    errors = []
    for name in folders[0]:
        a, b = (read_image(f[name]).astype(np.float64) for f in folders)
        if a.shape != b.shape:
            fail(f"{name}: {a.shape[1]}x{a.shape[0]} in --input, {b.shape[1]}x{b.shape[0]} in --gt")
        errors.append(((a - b) ** 2).mean())
        print(f"{name}  {errors[-1]:.4f}")
    print(f"mean {np.mean(errors):.4f}  largest {max(errors):.4f}  (baseline: every image below 20)")


def eta_grid(args):
    """Writes eta_grid.png into --out: rows eta, columns the first four noises."""
    from common import save_grid
    names, noises = load_noises(args.noise, args.device, 4)
    model = load_model(args)
    rows = torch.stack([generate(model, noises, args, eta) for eta in args.eta])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    save_grid(Path(args.out) / "eta_grid.png", rows, [f"eta = {eta}" for eta in args.eta], [f"{n}.pt" for n in names], f"DDIM, {args.steps} steps", scale=2.5)


def interpolate(args):
    """Writes interpolation.png into --out: slerp above lerp between the first two noises in 11 steps, with the norm of each latent."""
    from common import save_grid
    names, (a, b) = load_noises(args.noise, args.device, 2)
    weights = [i / 10 for i in range(11)]
    latents = [[f(a, b, w) for w in weights] for f in (slerp, lerp)]
    for name, row in zip(("slerp", "lerp"), latents):
        print(f"norm, {name}: " + "  ".join(f"{x.norm():.1f}" for x in row))
    images = generate(load_model(args), torch.stack([x for row in latents for x in row]), args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    save_grid(Path(args.out) / "interpolation.png", images.view(2, 11, *images.shape[1:]), ["slerp", "lerp"], weights,
              f"from {names[0]}.pt to {names[1]}.pt, DDIM, {args.steps} steps", scale=1.5)


# ------------------------------------------------------------------ command line

def number(kind, low, high=math.inf):
    """argparse type: a number of `kind` in [low, high]."""
    def convert(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text}: expected {'at least ' + str(low) if high == math.inf else f'{low} to {high}'}")
        return value
    convert.__name__ = kind.__name__
    return convert


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail

    def add(name, default, help, **kw):
        p.add_argument(name, default=default, help=f"{help} (default: {kw.pop('shown', default)})", **kw)

    add("--mode", "sample", "what to do", choices=("sample", "mse", "eta-grid", "interpolate", "noise"))
    add("--noise", "noise", "folder of noises NN.pt, each (1, 3, H, W) float32", metavar="DIR")
    add("--ckpt", "UNet.pt", "the course's weights", metavar="FILE")
    add("--input", "samples", "mse: generated images", metavar="DIR")
    add("--gt", "face/GT", "mse: ground truth with the same file names", metavar="DIR")
    add("--out", None, "where results go", metavar="DIR", shown="samples, figures, noise")
    add("--steps", 50, "DDIM steps", type=number(int, 1, T // 2))
    add("--eta", [0.0, 0.25, 0.5, 0.75, 1.0], "eta-grid: rows", type=number(float, 0, 1), nargs="+")
    add("--size", 256, "noise: height and width, a multiple of 32", type=number(int, 32))
    add("--batch-size", 5, "images at a time; bounds the memory", type=number(int, 1))
    add("--seed", 0, "of --mode noise and of eta > 0", type=number(int, 0, 2**40))
    add("--device", "auto", "auto, cpu, cuda or cuda:N")
    args = p.parse_args(argv)
    if args.size % 32:
        fail(f"--size {args.size}: expected a multiple of 32")
    args.out = args.out or {"sample": "samples", "noise": "noise"}.get(args.mode, "figures")
    try:
        args.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
        torch.empty(1, device=args.device)
        if args.device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device}: not available here ({str(e).splitlines()[0]}); use --device cpu")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        {"sample": sample, "mse": mse, "eta-grid": eta_grid, "interpolate": interpolate, "noise": write_noise}[args.mode](args)
    except OSError as e:  # a full disk, a folder without permission, a file in a folder's place
        fail(f"{e.filename or args.out}: {e.strerror or e}")
    except ModuleNotFoundError as e:
        fail(f"--mode {args.mode} needs {e.name}; {'copy common.py too' if e.name == 'common' else 'pip install -r requirements.txt'}")
    except torch.OutOfMemoryError:
        fail(f"out of memory on {args.device}; lower --batch-size")
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
