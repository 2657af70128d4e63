"""DDIM on faces: the 2023 course's network and graded sampler, and training of smaller networks of the same kind.

Papers: DDIM (arXiv 2010.02502), DDPM (2006.11239), DPM-Solver++ (2211.01095), v-prediction (2202.00512), min-SNR weights (2303.09556),
EMA profile and learning rate (2312.02696), fixed-point inversion (2312.12540).

  python p3_ddim.py --mode noise --out noise                              # noises 00.pt ... 09.pt, for those without the course's
  python p3_ddim.py --mode sample --noise noise --out out --ckpt UNet.pt  # NN.png for every NN.pt, the course's recipe
  python p3_ddim.py --mode mse --input out --gt face/GT                   # mean squared error of each image and their mean
  python p3_ddim.py --mode eta-grid --noise noise --ckpt UNet.pt          # rows eta = 0 ... 1, columns noises 00-03
  python p3_ddim.py --mode interpolate --noise noise --ckpt UNet.pt       # slerp and lerp of noises 00 and 01

  python p3_ddim.py --mode train --data hw2_data                          # a 64x64 network of one's own, checkpoints/p3_ddim.pt
  python p3_ddim.py --mode sample --sampler dpm++ --out faces             # 1000 faces of it
  python p3_ddim.py --mode invert --input photos --out inverted           # face -> noise -> face; interpolate --noise inverted

Network and sampler agree with values of the course's original network (tests/test_p3.py). Own training on real faces, --seed 0, 14,792 steps, 269 minutes
on two Xeon cores, shared: Frechet distance on EfficientNet-Lite0 110.2, face rate 97.3 % (1000 images, dpm++), not trained to the end. README.md has the tables.
"""
import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

try:
    from tqdm import tqdm
except ImportError:  # the file copied alone runs without progress bars
    class tqdm:
        def __init__(self, *_, **__):
            self.update = self.close = self.set_postfix = lambda *_, **__: None

T = 1000
LAST = 40  # dpm_solver's `last` with one's own network: of 0, 20, 40 and 60 it has the lowest Frechet distance at 64x64 (228, 180, 169 and 171, 500 faces)


def fail(message, code=2):
    """One line on standard error; exit code 2: wrong usage or input, 1: a failed run."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


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
        self.skip = init(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.skip(x)


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
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, time):
        return self.attention(self.resblocks(x, time))


def init(layer, scale=1.0):
    """Uniform with variance scale / mean of fan-in and fan-out, zero bias; 1e-10 makes a branch start as zero."""
    nn.init.xavier_uniform_(layer.weight, math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(c_in, c_out, stride=1, scale=1.0):
    """3x3 convolution that keeps height and width, or halves them at stride 2."""
    return init(nn.Conv2d(c_in, c_out, 3, stride, padding=1), scale)


class UNet(nn.Module):
    """The 2023 course's face network; with the default arguments its UNet.pt loads strictly (113,673,219 parameters, 427 entries).

    forward(x, t): x (B, 3, H, W) noisy image, H and W multiples of self.factor, t (B,) integer step -> (B, 3, H, W), eps in the course's.
    channel: base width; multipliers: width of each level in units of it; blocks: residual blocks per level; attention: strides with attention;
    patch: patch x patch pixels are folded into channels at the entrance (space to depth), which makes everything cheaper by its square.
    """

    def __init__(self, channel=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(16,), dropout=0.0, patch=1):
        super().__init__()
        c_time, self.patch, self.factor = 4 * channel, patch, patch * 2 ** (len(multipliers) - 1)
        self.time = nn.Sequential(TimeEmbedding(channel), init(nn.Linear(channel, c_time)), nn.SiLU(), init(nn.Linear(c_time, c_time)))
        down, up, widths, c = [conv3x3(3 * patch**2, channel)], [], [channel], channel
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
        self.names = [[f"{name}{i + 1}" for i in range(len(modules))] for name, modules in (("down", down), ("mid", middle), ("up", up))]  # the course's
        for name, module in zip(sum(self.names, []), down + middle + up):
            self.add_module(name, module)
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), conv3x3(c, 3 * patch**2, scale=1e-10))

    def forward(self, x, t):
        time, skips, x = self.time(t), [], F.pixel_unshuffle(x, self.patch)
        for name in self.names[0]:
            module = getattr(self, name)
            x = module(x, time) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name in self.names[1]:
            x = getattr(self, name)(x, time)
        for name in self.names[2]:
            module = getattr(self, name)
            x = module(torch.cat([x, skips.pop()], 1), time) if isinstance(module, Block) else module(x)
        return F.pixel_shuffle(self.out(x), self.patch)


# ------------------------------------------------------------------ schedule, loss, samplers

def make_alpha_bar():
    """alpha_bar (1000,) in float64 of the course's utils.py: beta linear from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def slerp(a, b, weight):
    """Spherical interpolation on the whole flattened tensor; 0 gives a, 1 gives b; parallel ones as torch.lerp, which lets the norm fall to 0.7 of theirs between two normal noises."""
    theta = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    if not theta.sin() > 1e-6:  # nan for a tensor of zeros
        return torch.lerp(a, b, weight)
    return torch.sin((1 - weight) * theta) / torch.sin(theta) * a + torch.sin(weight * theta) / torch.sin(theta) * b


def diffusion_loss(model, x0, alpha_bar, gamma):
    """Mean squared error of v = a eps - s x0 (2202.00512) at random steps, stratified over the batch. x0: float (B, 3, H, W) in [-1, 1].

    Weighted by min(snr, gamma) on the error of x0 (2303.09556), which is 1 / (snr + 1) times that of v; gamma 0: unweighted.
    """
    b = len(x0)
    t = ((torch.rand(1, device=x0.device) + torch.arange(b, device=x0.device) / b) % 1 * T).long().clamp(max=T - 1)
    a, s = (v.float().view(-1, 1, 1, 1) for v in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
    eps = torch.randn_like(x0)
    error = (model(a * x0 + s * eps, t).float() - (a * eps - s * x0)).square().mean((1, 2, 3))
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    return (error * (snr.clamp(max=gamma) / (snr + 1)).float()).mean() if gamma else error.mean()


def ddim_times(steps):
    """The course's time steps: 1, 21, ..., 981 for 50, and 0, where the last update ends. steps: a divisor of 1000."""
    return [0, *range(1, T, T // steps)]


def predict_x0(x, eps, a, clamp=True):
    """The image behind x of alpha_bar a, clamped to [-1, 1]."""
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    return x0.clamp(-1, 1) if clamp else x0


def ddim(eps_model, x, alpha_bar, steps=50, eta=0.0, noise=None, clamp=True):
    """The course's DDIM (2010.02502, equation 12): the last alpha_bar is alpha_bar[0], not 1.

    eps_model(x, t) -> eps; x0 is clamped and eps is not computed again after that; noise() -> like x is needed for eta > 0.
    clamp False: the plain formula, which ddim_inverse undoes.
    """
    times = ddim_times(steps)[::-1]
    for t, s in zip(times, times[1:]):
        a, b = alpha_bar[t].item(), alpha_bar[s].item()
        eps = eps_model(x, t)
        x0 = predict_x0(x, eps, a, clamp)
        sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noise()
    return x


def ddim_inverse(eps_model, x, alpha_bar, steps=50, iterations=3):
    """The noise from which ddim with eta 0 and without clamping makes the image x: each of its steps solved for its starting point by fixed-point iteration.

    iterations: calls of eps_model per step (2312.12540); with 1 it is the usual inversion, which takes eps at the end of the step.
    """
    times = ddim_times(steps)
    for s, t in zip(times, times[1:]):
        a, b = alpha_bar[t].item(), alpha_bar[s].item()
        start = x
        for _ in range(iterations):
            eps = eps_model(start, t)
            start = math.sqrt(a / b) * (x - math.sqrt(1 - b) * eps) + math.sqrt(1 - a) * eps
        x = start
    return x


def dpm_times(alpha_bar, steps, last=0):
    """`steps` times from 999 to `last`, evenly spaced in log-SNR lambda_ (fewer where two fall on the same integer). At 20 steps even spacing in t errs ten times as much."""
    lambda_ = (alpha_bar / (1 - alpha_bar)).log() / 2
    grid = torch.linspace(lambda_[-1], lambda_[last], steps, dtype=torch.float64)
    return (lambda_[:, None] - grid).abs().argmin(0).unique().flip(0).tolist()


def dpm_solver(eps_model, x, alpha_bar, steps, last=0):
    """DPM-Solver++(2M) over `steps` network calls (2211.01095, algorithm 2); the last one's x0, at time `last`, is the result.

    A `last` above 0 leaves the finest noise to one call: a small network makes it into cleaner texture than many small steps do.
    """
    times = dpm_times(alpha_bar, steps, last)
    a, s = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
    lambda_ = [math.log(p / q) for p, q in zip(a, s)]
    before = None  # (h, x0) of the step before
    for t, t_next in zip(times, times[1:]):
        x0, h = predict_x0(x, eps_model(x, t), a[t] ** 2), lambda_[t_next] - lambda_[t]
        d = x0 if before is None else x0 + (x0 - before[1]) * h / (2 * before[0])
        x = s[t_next] / s[t] * x - a[t_next] * math.expm1(-h) * d
        before = h, x0
    return predict_x0(x, eps_model(x, times[-1]), a[times[-1]] ** 2)


def ddpm(eps_model, x, alpha_bar, noise):
    """Ancestral sampling over all 1000 steps with the posterior's variance (2006.11239, equations 6 and 7). noise() -> like x."""
    for t in range(T - 1, 0, -1):
        a, b = alpha_bar[t].item(), alpha_bar[t - 1].item()
        x0, beta = predict_x0(x, eps_model(x, t), a), 1 - a / b
        x = math.sqrt(b) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - b) / (1 - a) * x + math.sqrt((1 - b) / (1 - a) * beta) * noise()
    return predict_x0(x, eps_model(x, 0), alpha_bar[0].item())


def to_uint8(x, min_max=True):
    """Floats (N, 3, H, W) to 0..255, rounded as torchvision's save_image does, on the CPU.

    min_max: each image scaled by its own minimum and maximum over all channels, as the course does; else from [-1, 1].
    """
    low, high = (x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)) if min_max else (x.new_tensor(-1.0), x.new_tensor(1.0))
    return (((x - low) / (high - low).clamp(min=1e-5)) * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu()


# ------------------------------------------------------------------ train

def bf16_available(device):
    """True where bfloat16 is fast: CUDA compute capability 8 and later, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


NETWORK = ("size", "channel", "multipliers", "blocks", "attention", "dropout", "patch")
TRAINING = ("batch_size", "lr", "gamma", "seed", "images")
KEYS = {"script", "args", "ema"}  # of a checkpoint that samples; --resume needs the rest as well


def build(args):
    """The network that `args` describes, on its device."""
    model = UNet(args.channel, args.multipliers, args.blocks, args.attention, args.dropout, args.patch)
    # channels_last on GPUs only: on CPUs GroupNorm is several times slower in it
    return model.to(args.device, memory_format=torch.channels_last if args.device.type == "cuda" else torch.preserve_format)


def save_checkpoint(args, model, ema, optim, step, seconds, log):
    """Writes all that training needs to go on, and log.csv, whole or not at all. Returns what went wrong, or None."""
    if args.rank:
        return None
    path, temporary = Path(args.ckpt), Path(f"{args.ckpt}.tmp")
    rng = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(args.device)} if args.device.type == "cuda" else {})}
    state = {"script": "p3_ddim", "args": {k: getattr(args, k) for k in NETWORK + TRAINING}, "step": step, "seconds": seconds,
             "model": model.state_dict(), "ema": ema.state_dict(), "optim": optim.state_dict(), "rng": rng, "log": log}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", newline="") as f:
            csv.writer(f).writerows([("step", "loss", "images_per_s", "seconds"), *log])
        os.replace(temporary, path.with_suffix(".log.csv"))
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        return f"--ckpt {path}: cannot be written ({e}); an older checkpoint there is unchanged"


def load_checkpoint(args):
    """The dict in --ckpt, read without running code from it: a checkpoint of --mode train, or the course's state dict."""
    path = args.ckpt
    if not Path(path).is_file():
        fail(f"--ckpt {path}: no such file; make one with: python p3_ddim.py --mode train --data DIR --ckpt {path}; or give the course's UNet.pt")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        fail(f"--ckpt {path}: not a readable checkpoint or state dict ({type(e).__name__})")
    if isinstance(ckpt, dict) and "script" in ckpt and (ckpt["script"] != "p3_ddim" or KEYS - ckpt.keys() or not isinstance(ckpt["args"], dict) or set(NETWORK + TRAINING) - ckpt["args"].keys()):
        fail(f"--ckpt {path}: not a checkpoint of this p3_ddim.py; found {ckpt['script']}")
    return ckpt


def resume(args, model, ema, optim):
    """Loads --ckpt into the training state; returns step, seconds and log. Differing settings are refused, not ignored."""
    ckpt = load_checkpoint(args)
    if not isinstance(ckpt, dict) or {"script", "optim"} - ckpt.keys():
        fail(f"--resume: {args.ckpt} holds a network alone, without the state of training; give another --ckpt")
    differ = [f"{k} {getattr(args, k)} (checkpoint: {ckpt['args'][k]})" for k in NETWORK + TRAINING if getattr(args, k) != ckpt["args"][k]]
    if differ:
        fail(f"--resume with other settings than {args.ckpt}: {', '.join(differ)}; pass the checkpoint's, or another --ckpt")
    model.load_state_dict(ckpt["model"])
    ema.load_state_dict(ckpt["ema"])
    optim.load_state_dict(ckpt["optim"])
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if args.device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"], args.device)
    return ckpt["step"], ckpt["seconds"], ckpt["log"]


@torch.no_grad()
def update_ema(ema, model, step):
    """Power-function average over about the last tenth of training, however long (2312.02696, equation 15); there are no buffers that change."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - (1 - 1 / step) ** 17)


def train(args):
    """Trains on face/train for --steps steps; Ctrl-C saves and exits with 130."""
    from common import any_process, claim_checkpoint, join_processes, load_faces
    join_processes(args)
    if args.rank == 0:
        claim_checkpoint(args.ckpt, args.resume)
    images = load_faces(args.data, "train", args.size).to(args.device)
    args.images = [len(images), images.sum().item()]  # --resume asks for the same
    torch.manual_seed(args.seed)
    model, ema = build(args), build(args)
    ema.load_state_dict(model.state_dict())
    optim = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, seconds, log = resume(args, model, ema, optim) if args.resume else (0, 0.0, [])
    alpha_bar = make_alpha_bar().to(args.device)
    net = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    if args.rank:
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, args.rank]).generate_state(1)[0]))  # every process draws images and noise of its own
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(images):,} images of {args.size}x{args.size}, "
          f"{args.steps * args.batch_size / len(images):.0f} epochs, {args.device}, {'bf16' if args.bf16 else 'float32'}", flush=True)
    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=step, desc="train", unit="step", disable=args.rank > 0, mininterval=1 if sys.stderr.isatty() else 60)
    start = saved = time.perf_counter()
    total, count, last, done = 0.0, 0, seconds, step >= args.steps
    try:
        while not done:
            x0 = images[torch.randint(len(images), (args.batch_size // args.world,), device=args.device)].float() / 127.5 - 1
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=args.device) < 0.5, x0.flip(3), x0)
            # warm-up, then 1/sqrt decay: like the EMA it does not depend on --steps, so that a run can be prolonged (2312.02696)
            optim.param_groups[0]["lr"] = args.lr * min((step + 1) / 200, 1) / max(step / 5000, 1) ** 0.5
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                loss = diffusion_loss(net, x0, alpha_bar, args.gamma)
            optim.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            step += 1
            update_ema(ema, model, step)
            total, count = total + loss.detach() + 0 * norm, count + 1  # 0 * inf is NaN: gradients are checked with the loss
            bar.update()
            done, due = step == args.steps or any_process(stop, args), time.perf_counter() - saved > 120
            if step % min(100, max(10, args.steps // 20)) == 0 or done or due:
                mean, now = total.item() / count, seconds + time.perf_counter() - start
                if not math.isfinite(mean):
                    fail(f"loss is {mean} at step {step}; {args.ckpt} keeps the last good state, if any; try a lower --lr", code=1)
                log.append((step, round(mean, 5), round(count * args.batch_size / max(now - last, 1e-9), 1), round(now, 1)))
                bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{log[-1][2]:.0f}")
                total, count, last = 0.0, 0, now
                if due and (problem := save_checkpoint(args, model, ema, optim, step, now, log)):
                    print(f"warning: {problem}; training goes on", file=sys.stderr)
                saved = time.perf_counter() if due else saved
        seconds += time.perf_counter() - start
        if problem := save_checkpoint(args, model, ema, optim, step, seconds, log):
            fail(problem)
    finally:
        bar.close()
        if args.world > 1:
            dist.destroy_process_group()
        for name, handler in handlers.items():
            signal.signal(name, handler)
    print(f"{args.ckpt}: step {step}, {seconds:.0f} s of training")
    if step < args.steps:
        print("stopped; go on with --resume", file=sys.stderr)
        raise SystemExit(130)


# ------------------------------------------------------------------ sample

def load_model(args):
    """The network of --ckpt in eval mode: the course's UNet.pt, or the EMA network of a checkpoint of --mode train, whose settings `args` takes.

    Sets args.own, which says which of the two it is: the course's predicts eps, runs in float32 and its images are scaled by minimum and maximum;
    ours predicts v, runs in --precision, and its images are in [-1, 1].
    """
    state = load_checkpoint(args)
    args.own = isinstance(state, dict) and "script" in state
    if args.own:
        vars(args).update({k: state["args"][k] for k in NETWORK})
        state, model = state["ema"], build(args)
    else:
        args.size, args.bf16, model = args.size or 256, False, UNet()
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: getattr(value, "shape", None) for name, value in state.items()} if isinstance(state, dict) else {}
    for what, names in (("missing", wanted.keys() - found.keys()), ("unknown", found.keys() - wanted.keys()),
                        ("of another shape", {n for n in wanted.keys() & found.keys() if wanted[n] != found[n]})):
        if names:
            fail(f"--ckpt {args.ckpt}: {len(names)} entries {what}, for instance {', '.join(sorted(names)[:3])}; expected the {len(wanted)} of the course's UNet.pt")
    model.load_state_dict(state)
    if args.size % model.factor:
        fail(f"--size {args.size}: expected a multiple of {model.factor}, so that the network can halve it often enough")
    return model.to(args.device).eval()


def image_noise(args, *key):
    """A generator of normal noise for an image, the same whatever batch it is in. key: its number, and 1 for what the sampler adds on the way."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, *key]).generate_state(1)[0]))


def load_noises(args, model, count=None):
    """(names, tensor (N, 3, H, W) on the CPU) of all *.pt in --noise, or of the first `count`; without --noise, those that --mode noise would write, --num of them."""
    if args.noise is None:
        count = count or args.num
        names = [f"{i:04d}" for i in range(count)]
        return names, torch.cat([torch.randn(1, 3, args.size, args.size, generator=image_noise(args, i)) for i in range(count)])
    paths = sorted(Path(args.noise).glob("[!.]*.pt"))[:count]
    if len(paths) < (count or 1):
        fail(f"--noise {args.noise}: found {len(paths)} files *.pt, expected at least {count or 1}; make ten in another folder with --mode noise --out FOLDER")
    noises = []
    for path in paths:
        try:
            noise = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            fail(f"{path}: not a readable tensor ({type(e).__name__})")
        found = f"{tuple(noise.shape)} {noise.dtype}" if isinstance(noise, torch.Tensor) else type(noise).__name__
        if not (found.endswith("float32") and noise.ndim == 4 and noise.shape[:2] == (1, 3)) or any(s % model.factor for s in noise.shape[2:]):
            fail(f"{path}: found {found}, expected (1, 3, H, W) torch.float32 with H and W multiples of {model.factor}")
        noises.append(noise)
        if noise.shape != noises[0].shape:
            fail(f"{path}: found {found}, expected {tuple(noises[0].shape)} as in {paths[0]}")
    return [p.stem for p in paths], torch.cat(noises)


def predictor(model, args, alpha_bar, calls):
    """eps_model(x, t int) -> eps float32 that the samplers call, with a bar over `calls` network calls and a line that says how long they will take."""
    done, start = 0, 0.0
    bar = tqdm(total=calls, desc="network", unit="call", mininterval=1 if sys.stderr.isatty() else 60)

    def eps_model(x, t):
        nonlocal done, start
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            out = model(x, torch.full((len(x),), t, device=x.device)).float()
        done += 1
        bar.update()
        if done <= 2:
            out.sum().item()  # waits for a GPU
            if done == 2:  # the first call is slower
                print(f"about {(time.perf_counter() - start) * calls:.0f} s for {calls} network calls on {x.device}", flush=True)
            start = time.perf_counter()
        if done == calls:
            bar.close()
        return math.sqrt(alpha_bar[t]) * out + math.sqrt(1 - alpha_bar[t]) * x if args.own else out  # v -> eps

    return eps_model


@torch.inference_mode()
def generate(model, noises, args, eta=0.0, numbers=None):
    """Noises (N, 3, H, W) -> batches of images uint8 (B, 3, H, W), one after the other. What eta > 0 and ddpm add depends on --seed and the image's number alone (default: 0 to N - 1)."""
    alpha_bar, size, numbers = make_alpha_bar(), batch_size(args, noises), numbers or range(len(noises))
    eps_model = predictor(model, args, alpha_bar, math.ceil(len(noises) / size) * network_calls(args))
    for i in range(0, len(noises), size):
        x = noises[i:i + size].to(args.device)
        generators = [image_noise(args, j, 1) for j in numbers[i:i + size]]

        def noise():
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)

        if args.sampler == "ddim":
            x = ddim(eps_model, x, alpha_bar, args.sample_steps, eta, noise)
        else:
            x = dpm_solver(eps_model, x, alpha_bar, args.sample_steps, LAST * args.own) if args.sampler == "dpm++" else ddpm(eps_model, x, alpha_bar, noise)
        yield to_uint8(x, min_max=not args.own)


def batch_size(args, images):
    """--batch-size, or as many images as have the pixels of five 256x256."""
    return args.batch_size or max(1, 5 * 256**2 // math.prod(images.shape[2:]))


def sample(args):
    """Writes NN.png for every NN.pt in --noise, or --num images."""
    model, out = load_model(args), Path(args.out)
    names, noises = load_noises(args, model)
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(set(os.listdir(out)) - {f"{name}{suffix}" for name in names for suffix in (".png", ".tmp")})
    if others and args.rank == 0:
        print(f"warning: {out} holds {len(others)} other entries ({', '.join(others[:20])}{', ...' if others[20:] else ''}); use an empty folder", file=sys.stderr)
    numbers, start = range(args.rank, len(names), args.world), time.perf_counter()
    written = iter(numbers)
    for images in generate(model, noises[args.rank::args.world], args, args.eta[0], numbers):
        for image in images:
            write(out / f"{names[next(written)]}.png", image)
    print(f"{len(numbers)} images in {out}: {time.perf_counter() - start:.1f} s, {how(args)}")


def network_calls(args):
    """How often the sampler calls the network for one image."""
    return {"ddpm": T, "ddim": args.sample_steps, "dpm++": len(dpm_times(make_alpha_bar(), args.sample_steps, LAST * args.own))}[args.sampler]


def how(args):
    """The sampler and its number of network calls, for titles."""
    return f"{dict(zip(('ddim', 'dpm++', 'ddpm'), ('DDIM', 'DPM-Solver++(2M)', 'DDPM')))[args.sampler]}, {network_calls(args)} steps"


@torch.inference_mode()
def invert(args):
    """For each image of --input, writes the noise NN.pt that DDIM without clamping turns into it and what comes back as NN.png into --out; prints the PSNR of that."""
    from common import is_image, read_image
    out = Path(args.out)
    if not Path(args.input).is_dir():
        fail(f"--input {args.input}: no such folder of images")
    files = sorted(filter(is_image, Path(args.input).iterdir()))[:args.num]
    if not files or len({p.stem for p in files}) < len(files) or out.resolve() == Path(args.input).resolve():
        fail(f"--input {args.input}, --out {out}: expected PNG or JPEG images of different names before the dot, and another folder for what comes back")
    model, alpha_bar = load_model(args), make_alpha_bar()
    images = torch.from_numpy(np.stack([read_image(f, (args.size, args.size)) for f in files])).permute(0, 3, 1, 2).to(args.device)
    out.mkdir(parents=True, exist_ok=True)
    size, errors = batch_size(args, images), []
    eps_model = predictor(model, args, alpha_bar, math.ceil(len(files) / size) * network_calls(args) * (args.iterations + 1))
    for i in range(0, len(files), size):
        batch = images[i:i + size]
        noises = ddim_inverse(eps_model, batch / 127.5 - 1, alpha_bar, args.sample_steps, args.iterations)
        back = to_uint8(ddim(eps_model, noises, alpha_bar, args.sample_steps, clamp=False), min_max=False)
        errors += (back.double() - batch.cpu()).square().mean((1, 2, 3)).tolist()
        for file, noise, image in zip(files[i:i + size], noises, back):
            write(out / f"{file.stem}.pt", noise[None])
            write(out / f"{file.stem}.png", image)
    psnr = [10 * math.log10(255**2 / max(e, 1e-9)) for e in errors]
    print(f"{len(files)} images in {out}: PSNR of the reconstruction {np.mean(psnr):.2f} dB, worst {min(psnr):.2f}, {how(args)}, {args.iterations} iterations")


def write(path, data):
    """A noise as .pt, or an image, uint8 (3, H, W), as .png: whole or not at all; OSError where that fails."""
    temporary = path.with_suffix(".tmp")
    try:
        if path.suffix == ".pt":
            torch.save(data.cpu().clone(), temporary)
        else:
            Image.fromarray(data.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        os.replace(temporary, path)
    except RuntimeError as e:  # what torch.save says of a full disk
        raise OSError(None, str(e).splitlines()[0], str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)


def write_noise(args):
    """Writes ten noises 00.pt ... 09.pt of shape (1, 3, --size, --size)."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    paths = [Path(args.out) / f"{i:02d}.pt" for i in range(10)]
    if any(path.exists() for path in paths):
        fail(f"--out {args.out}: holds noises already; give another folder")
    for i, path in enumerate(paths):
        write(path, torch.randn(1, 3, args.size, args.size, generator=image_noise(args, i)))


# ------------------------------------------------------------------ evaluate and plots

def mse(args):
    """Prints the mean squared error on the 0-255 scale, in float64, of each image of --input against --gt, and their mean."""
    from common import read_image
    for folder in (args.input, args.gt):
        if not Path(folder).is_dir():
            fail(f"{folder}: no such folder of images")
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
    print(f"mean {np.mean(errors):.4f}  largest {max(errors):.4f}  (the course's baseline: 20)")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps({"n": len(errors), "mse": float(np.mean(errors)), "largest": max(errors)}, indent=1))


def eta_grid(args):
    """Writes eta_grid.png into --out: rows eta, columns the first four noises."""
    from common import save_grid
    model = load_model(args)
    names, noises = load_noises(args, model, 4)
    rows = torch.stack([torch.cat([*generate(model, noises, args, eta)]) for eta in args.eta])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    save_grid(Path(args.out) / "eta_grid.png", rows, [f"eta = {eta}" for eta in args.eta], [f"{n}.pt" for n in names], how(args), scale=2.5)


def interpolate(args):
    """Writes interpolation.png into --out: slerp above lerp between the first two noises in 11 steps, with the norm of each latent."""
    from common import save_grid
    model = load_model(args)
    names, (a, b) = load_noises(args, model, 2)
    weights = [i / 10 for i in range(11)]
    latents = [[f(a, b, w) for w in weights] for f in (slerp, torch.lerp)]
    for name, row in zip(("slerp", "lerp"), latents):
        print(f"norm, {name}: " + "  ".join(f"{x.norm():.1f}" for x in row))
    images = torch.cat([*generate(model, torch.stack([x for row in latents for x in row]), args)])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    save_grid(Path(args.out) / "interpolation.png", images.view(2, 11, *images.shape[1:]), ["slerp", "lerp"], weights,
              f"from {names[0]}.pt to {names[1]}.pt, {how(args)}", scale=1.5)


def evaluate(args):
    """FID, KID and IS of --input's images against the val faces; --out FILE gets them as JSON."""
    from common import face_folder, score_images
    if not args.data:
        fail("--mode eval needs --data DIR, whose face/val is the reference")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    result = score_images(args.input, face_folder(args.data, "val"), args.inception, args.device)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


def grid(args):
    """Writes first.png (32 images), training.png and network.txt into --out."""
    from common import save_curves, save_grid
    model, out, log = load_model(args), Path(args.out), Path(args.ckpt).with_suffix(".log.csv")
    images = torch.cat([*generate(model, load_noises(args, model, 32)[1], args, args.eta[0])])
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / "first.png", images.view(4, 8, *images.shape[1:]), [""] * 4, [""] * 8, how(args), scale=1.5)
    (out / "network.txt").write_text(f"{sum(p.numel() for p in model.parameters()):,} parameters\n{model}\n")
    if log.is_file():
        save_curves(out / "training.png", log, ["loss"], "training loss")
    print(f"{out}: {', '.join(sorted(os.listdir(out)))}")


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

    def add(group, name, default, help, **kw):
        group.add_argument(name, default=default, help=f"{help} (default: {kw.pop('shown', default)})".replace("%", "%%"), **kw)

    add(p, "--mode", "train", "what to do", choices=("train", "sample", "mse", "eta-grid", "interpolate", "noise", "invert", "eval", "grid"))
    add(p, "--data", None, "folder of the course's layout", metavar="DIR", shown="built-in faces")
    add(p, "--noise", None, "folder of noises NN.pt, each (1, 3, H, W) float32", metavar="DIR", shown="drawn from --seed")
    add(p, "--ckpt", "checkpoints/p3_ddim.pt", "checkpoint to write or read, or the course's UNet.pt", metavar="FILE")
    add(p, "--input", "samples", "mse, eval: generated images; invert: images", metavar="DIR")
    add(p, "--gt", "face/GT", "mse: ground truth with the same file names", metavar="DIR")
    add(p, "--inception", None, "eval: weights of pytorch-fid's Inception network", metavar="FILE", shown="downloaded once")
    add(p, "--out", None, "where results go; for eval and mse, a JSON file", metavar="PATH", shown="samples, noise, inverted, figures, none")
    add(p, "--size", None, "height and width in train and noise", type=number(int, 8), shown="train 64, --fast 32, noise 256")
    add(p, "--batch-size", None, "images at a time; bounds the memory", type=number(int, 1), shown="train 32; else 5 of 256x256, 80 of 64x64")
    add(p, "--seed", 0, "random seed of training and of all noise", type=number(int, 0, 2**40))
    add(p, "--device", "auto", "auto, cpu, cuda or cuda:N")
    add(p, "--precision", "auto", "bf16 autocast or float32; auto: bf16 where the hardware has it; the course's network always float32", choices=("auto", "bf16", "float32"))
    g = p.add_argument_group("sampling")
    add(g, "--num", 1000, "images without --noise; invert: at most so many", type=number(int, 1))
    add(g, "--sampler", "ddim", "DDIM, DPM-Solver++(2M), or DDPM over all 1000 steps", choices=("ddim", "dpm++", "ddpm"))
    add(g, "--sample-steps", None, "network calls of ddim and dpm++", type=number(int, 1, T // 2), shown="ddim 50, dpm++ 20")
    add(g, "--eta", None, "ddim: 0 deterministic, 1 as noisy as ddpm; eta-grid: its rows", type=number(float, 0, 1), nargs="+", shown="0; eta-grid 0 0.25 0.5 0.75 1")
    add(g, "--iterations", 3, "invert: fixed-point iterations per step; 1: the usual inversion", type=number(int, 1))
    g = p.add_argument_group("training")
    add(g, "--steps", None, "total number of steps, with --resume those of the runs before included", type=number(int, 1), shown="20000; --fast 1500")
    g.add_argument("--fast", action="store_true", help="preset for a CPU and a few minutes: 1500 steps at 32x32")
    g.add_argument("--resume", action="store_true", help="go on from --ckpt exactly")
    add(g, "--lr", 1e-3, "peak learning rate of AdamW", type=number(float, 0))
    add(g, "--gamma", 5.0, "min-SNR weighting; 0 switches it off", type=number(float, 0))
    g = p.add_argument_group("network to train (elsewhere it is taken from the checkpoint)")
    add(g, "--channel", 64, "base width, a multiple of 32", type=number(int, 32))
    add(g, "--multipliers", [1, 2, 4], "width of each level in units of it", type=number(int, 1), nargs="+", metavar="M")
    add(g, "--blocks", 1, "residual blocks per level", type=number(int, 1))
    add(g, "--attention", [4], "strides with attention", type=number(int, 1), nargs="*", metavar="S")
    add(g, "--dropout", 0.0, "dropout in the residual blocks", type=number(float, 0, 1))
    add(g, "--patch", 2, "pixels folded into channels at the entrance", type=int, choices=(1, 2, 4))
    args = p.parse_args(argv)
    train, factor = args.mode == "train", args.patch * 2 ** (len(args.multipliers) - 1)
    if train or args.mode == "noise":
        args.size = args.size or (256 if not train else 32 if args.fast else 64)
        if args.size % (factor if train else 8):
            fail(f"--size {args.size}: expected a multiple of {factor if train else 8}, so that the network can halve it often enough")
    if args.channel % 32:
        fail(f"--channel {args.channel}: expected a multiple of 32")
    args.steps = args.steps or (1500 if args.fast else 20000)
    args.batch_size = args.batch_size or (32 if train else None)
    args.sample_steps = args.sample_steps or (20 if args.sampler == "dpm++" else 50)
    args.eta = args.eta or ([0.0, 0.25, 0.5, 0.75, 1.0] if args.mode == "eta-grid" else [0.0])
    if len(args.eta) > 1 and args.mode != "eta-grid":
        fail(f"--eta {' '.join(map(str, args.eta))}: --mode {args.mode} takes one; only eta-grid shows several")
    if args.sampler == "ddim" and (T % args.sample_steps or args.sample_steps < 2):
        fail(f"--sample-steps {args.sample_steps}: expected a divisor of {T} from 2 on; DDIM's steps are evenly spaced")
    if args.sampler != "ddim" and (args.mode in ("invert", "eta-grid") or any(args.eta)):
        fail(f"--mode {args.mode} --sampler {args.sampler}: eta and inversion are DDIM's")
    if any(args.eta) and args.mode in ("invert", "interpolate"):
        fail(f"--eta {args.eta[0]}: --mode {args.mode} is deterministic; leave --eta out")
    args.out = args.out or {"sample": "samples", "noise": "noise", "invert": "inverted", "eval": None, "mse": None}.get(args.mode, "figures")
    args.rank, args.world = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")) if "LOCAL_RANK" in os.environ else (0, 1)  # torchrun's
    if args.world > 1 and args.mode not in ("train", "sample"):
        fail(f"--mode {args.mode} with {args.world} processes: only train and sample share their work")
    try:
        args.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
        if args.device.type == "cuda" and args.world > 1:
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=args.device)
        if args.device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device}: not available here ({str(e).splitlines()[0]}); use --device cpu")
    args.bf16 = bf16_available(args.device) if args.precision == "auto" else args.precision == "bf16"
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        {"train": train, "sample": sample, "mse": mse, "eta-grid": eta_grid, "interpolate": interpolate, "noise": write_noise,
         "invert": invert, "eval": evaluate, "grid": grid}[args.mode](args)
    except OSError as e:  # a full disk, a folder without permission, a file in a folder's place
        fail(f"{e.filename or args.out or args.mode}: {e.strerror or e}")
    except ModuleNotFoundError as e:
        fail(f"--mode {args.mode} needs {e.name}; {'copy common.py too' if e.name == 'common' else 'pip install -r requirements.txt'}")
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):  # what CPUs say
            raise
        fail(f"out of memory on {args.device}; lower --batch-size", code=1)
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
