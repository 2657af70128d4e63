"""Class-conditional diffusion on 28x28 digits with classifier-free guidance.

Papers: DDPM (arXiv 2006.11239), classifier-free guidance (2207.12598), DDIM (2010.02502), DPM-Solver++ (2211.01095),
v-prediction (2202.00512), min-SNR weights (2303.09556), guidance interval (2404.07724), EMA profile and learning rate (2312.02696).

  python p2_diffusion.py --mode train --fast --ckpt fast.pt           # built-in digits, 3.5 minutes on 2 CPU cores
  python p2_diffusion.py --mode train --data hw2_data                 # the course's MNIST-M
  python p2_diffusion.py --mode sample --out digits                   # 0_001.png ... 9_100.png, as the grader reads them
  python p2_diffusion.py --mode eval --input digits --data hw2_data   # digit accuracy and diversity
  python p2_diffusion.py --mode grid --out figures                    # 10x10 grid, reverse process, guidance comparison

Real MNIST-M, --seed 0: 99.6 % digit accuracy of 1000 images (996 of 1000; diversity 1.02 of the real images') after 24,000 steps,
93 minutes on 2 Xeon cores with AMX; 1000 images in 29 s there. Measured once; README.md has the tables and commands.
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
    def tqdm(iterable, **_):
        return iterable

SIZE, DIGITS, NULL = 28, 10, 10  # NULL: the class index that stands for "no label"


def fail(message, code=2):
    """One line on standard error; exit code 2: wrong usage or input, 1: a failed run."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# ------------------------------------------------------------------ networks

class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, residual; the embedding scales and shifts the second norm (2105.05233, section 3); then attention."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention="none"):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(16, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(16, c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = nn.Identity() if attention == "none" else Attention(c_out, attention == "linear")

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.attention(self.skip(x) + self.conv2(self.dropout(h)))


class Attention(nn.Module):
    """Multi-head self-attention over all positions; `linear`: softmax over q's channels and k's positions (1812.01243), O(HW)."""

    def __init__(self, channels, linear=False, head=32):
        super().__init__()
        self.heads, self.linear = channels // head, linear
        self.norm, self.qkv = nn.GroupNorm(16, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, -1, h * w).transpose(-1, -2).unbind(1)  # each (B, heads, HW, head)
        scale = q.shape[-1] ** -0.5
        if self.linear:
            y = q.softmax(-1) * scale @ (k.softmax(-2).transpose(-1, -2) @ v)
        else:  # written out: faster on CPUs at 49 positions than scaled_dot_product_attention
            y = (q * scale @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


def zero(layer):
    """Starts a layer at zero, so that its residual block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class UNet(nn.Module):
    """Residual U-Net. forward(x, t, y): x (B, 3, H, W) noisy image, t (B,) time in [0, 1), y (B,) labels 0-9 or NULL -> (B, 3, H, W).

    channels: one width per resolution; patch: the image enters with patch x patch pixels folded into channels (space to depth),
    so that the widest maps are 14x14 at patch 2; attention: none, full (softmax, at every resolution but the first) or linear
    (linear attention at every resolution, softmax in the middle).
    """

    def __init__(self, channels=(64, 128), blocks=1, patch=2, attention="full", dropout=0.0):
        super().__init__()
        self.patch, c_emb = patch, 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(DIGITS + 1, c_emb)

        def block(c_in, c_out, level):
            kind = attention if attention == "linear" or level else "none"
            return ResBlock(c_in, c_out, c_emb, dropout, kind)

        c = channels[0]
        self.stem = nn.Conv2d(3 * patch**2, c, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [c]
        for level, width in enumerate(channels):
            if level:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))  # halves H and W
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, width, level))
                c = width
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, c_emb, dropout, "none" if attention == "none" else "full"), ResBlock(c, c, c_emb, dropout)])
        for level, width in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width, level))
                c = width
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))  # doubles H and W
        self.out = nn.Sequential(nn.GroupNorm(16, c), nn.SiLU(), zero(nn.Conv2d(c, 3 * patch**2, 3, padding=1)))

    def forward(self, x, t, y):
        frequencies = 1000 * torch.exp(torch.linspace(0, -math.log(1000), 32, device=x.device))
        angles = t[:, None] * frequencies
        emb = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(y))  # (B, c_emb)
        h = self.stem(F.pixel_unshuffle(x, self.patch))  # (B, C, H / patch, W / patch)
        skips = [h]
        for module in self.down:
            h = module(h, emb) if isinstance(module, ResBlock) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, emb)
        for module in self.up:
            h = module(torch.cat([h, skips.pop()], 1), emb) if isinstance(module, ResBlock) else module(h)
        return F.pixel_shuffle(self.out(h), self.patch)  # (B, 3, H, W)


class ConvPair(nn.Module):
    """Two conv-BatchNorm-GELU; `residual` adds the first one's output, divided by sqrt 2."""

    def __init__(self, c_in, c_out, residual=False):
        super().__init__()
        self.conv1, self.conv2 = (nn.Sequential(nn.Conv2d(c, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.GELU()) for c in (c_in, c_out))
        self.residual = residual

    def forward(self, x):
        first = self.conv1(x)
        second = self.conv2(first)
        return (first + second) / math.sqrt(2) if self.residual else second


class ContextUnet(nn.Module):
    """The network of the 2023 report (after TeaPearce/Conditional_Diffusion_MNIST): 18,743,187 parameters at width 216. Same call as UNet."""

    def __init__(self, width=216):
        super().__init__()
        n = width

        def embed(c_in, c_out):
            return nn.Sequential(nn.Linear(c_in, c_out), nn.GELU(), nn.Linear(c_out, c_out), nn.Unflatten(1, (c_out, 1, 1)))

        self.init_conv = ConvPair(3, n, residual=True)
        self.down1 = nn.Sequential(ConvPair(n, n), nn.MaxPool2d(2))  # 14x14
        self.down2 = nn.Sequential(ConvPair(n, 2 * n), nn.MaxPool2d(2))  # 7x7
        self.to_vec = nn.Sequential(nn.AvgPool2d(7), nn.GELU())  # 1x1
        self.time1, self.time2 = embed(1, 2 * n), embed(1, n)
        self.context1, self.context2 = embed(DIGITS, 2 * n), embed(DIGITS, n)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * n, 2 * n, 7, 7), nn.GroupNorm(8, 2 * n), nn.ReLU())  # 7x7
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4 * n, n, 2, 2), ConvPair(n, n), ConvPair(n, n))  # 14x14
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * n, n, 2, 2), ConvPair(n, n), ConvPair(n, n))  # 28x28
        self.out = nn.Sequential(nn.Conv2d(2 * n, n, 3, padding=1), nn.GroupNorm(8, n), nn.ReLU(), nn.Conv2d(n, 3, 3, padding=1))

    def forward(self, x, t, y):
        context, t = F.one_hot(y, DIGITS + 1)[:, :DIGITS].to(x.dtype), t[:, None]  # NULL becomes the zero vector
        x = self.init_conv(x)
        d1 = self.down1(x)
        d2 = self.down2(d1)
        h = self.context1(context) * self.up0(self.to_vec(d2)) + self.time1(t)
        h = self.context2(context) * self.up1(torch.cat([h, d2], 1)) + self.time2(t)
        h = self.up2(torch.cat([h, d1], 1))
        return self.out(torch.cat([h, x], 1))


def build(args):
    """The network that `args` (arch and its settings) describe, on its device."""
    if args.arch == "context":
        net = ContextUnet(args.width)
    else:
        net = UNet(args.channels, args.blocks, args.patch, args.attention, args.dropout)
    # channels_last on GPUs only: on CPUs GroupNorm is several times slower in it
    return net.to(args.device, memory_format=torch.channels_last if args.device.type == "cuda" else torch.preserve_format)


# ------------------------------------------------------------------ schedule, loss, samplers

def make_alpha_bar(schedule, T):
    """alpha_bar (T,) in float64. linear: beta from 1e-4 to 0.02 whatever T, as the reports have it (2006.11239: T = 1000); cosine: 2102.09672, equation 17."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)


def diffusion_loss(model, x0, y, alpha_bar, prediction, gamma):
    """Mean squared error of eps or v at random steps. x0: float (B, 3, H, W) in [-1, 1]; y: (B,) with NULL where dropped.

    Steps are stratified over the batch. gamma: min-SNR weights (2303.09556); 0 leaves all weights at 1.
    """
    b, T = len(x0), len(alpha_bar)
    u = (torch.rand(1, device=x0.device) + torch.arange(b, device=x0.device) / b) % 1
    t = (u * T).long().clamp(max=T - 1)
    a, s = (v.float().view(-1, 1, 1, 1) for v in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
    eps = torch.randn_like(x0)
    out = model(a * x0 + s * eps, t / T, y).float()
    target = eps if prediction == "eps" else a * eps - s * x0  # v, 2202.00512
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    # a weight of min(snr, gamma) on the error of x0, which is 1/snr times that of eps and 1/(snr + 1) times that of v
    weight = snr.clamp(max=gamma) / (snr + (prediction == "v")) if gamma else torch.ones_like(snr)
    return (weight.float() * (out - target).square().mean((1, 2, 3))).mean()


def denoiser(model, y, alpha_bar, prediction, guidance, interval=(0.0, 1.0), bf16=False):
    """The guided predictor (x (B, 3, H, W), t int) -> x0 in [-1, 1] that the samplers call.

    guidance: w of (1 + w) eps(x, y) - w eps(x, NULL); both branches run as one batch, w = 0 runs the conditional one alone.
    interval: guidance acts while t / T lies in it (2404.07724). Linear in the output, so eps and v are guided alike.
    """
    def denoise(x, t):
        guided = guidance != 0 and interval[0] <= t / len(alpha_bar) <= interval[1]
        labels = torch.cat([y, torch.full_like(y, NULL)]) if guided else y
        time = torch.full((len(labels),), t / len(alpha_bar), device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out = model(torch.cat([x, x]) if guided else x, time, labels)
        out = out.float()
        if guided:
            cond, uncond = out.chunk(2)
            out = (1 + guidance) * cond - guidance * uncond
        a, s = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
        x0 = (x - s * out) / a if prediction == "eps" else a * x - s * out
        return x0.clamp(-1, 1)
    return denoise


def ddpm(denoise, x, alpha_bar, noise):
    """Ancestral sampling over all T steps with the posterior's variance (2006.11239, equations 6 and 7). noise() -> like x."""
    for t in range(len(alpha_bar) - 1, 0, -1):
        x0, ab, ab_next = denoise(x, t), alpha_bar[t].item(), alpha_bar[t - 1].item()
        beta = 1 - ab / ab_next
        mean = math.sqrt(ab_next) * beta / (1 - ab) * x0 + math.sqrt(1 - beta) * (1 - ab_next) / (1 - ab) * x
        x = mean + math.sqrt((1 - ab_next) / (1 - ab) * beta) * noise()
    return denoise(x, 0)


def time_steps(T, steps):
    """`steps` times from T - 1 down to 0, evenly spaced and rounded."""
    return np.linspace(T - 1, 0, steps).round().astype(int).tolist()


def ddim(denoise, x, alpha_bar, steps, eta=0.0, noise=None):
    """DDIM over `steps` network calls (2010.02502, equation 12), the last one's x0 returned; noise() -> like x is needed for eta > 0."""
    times = time_steps(len(alpha_bar), steps)
    for t, t_next in zip(times, times[1:]):
        x0, ab, ab_next = denoise(x, t), alpha_bar[t].item(), alpha_bar[t_next].item()
        eps = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
        sigma = eta * math.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
        x = math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noise()
    return denoise(x, times[-1])


def dpm_solver(denoise, x, alpha_bar, steps):
    """DPM-Solver++(2M) over `steps` network calls (2211.01095, algorithm 2), the last one's x0 returned."""
    times = time_steps(len(alpha_bar), steps)
    a, s = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
    lambda_ = [math.log(p / q) for p, q in zip(a, s)]
    before = None  # (h, x0) of the step before
    for t, t_next in zip(times, times[1:]):
        x0, h = denoise(x, t), lambda_[t_next] - lambda_[t]
        d = x0 if before is None else x0 + (x0 - before[1]) * h / (2 * before[0])
        x = s[t_next] / s[t] * x - a[t_next] * math.expm1(-h) * d
        before = h, x0
    return denoise(x, times[-1])


# ------------------------------------------------------------------ train

def bf16_available(device):
    """True where bfloat16 is fast: CUDA compute capability 8 and later, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


NETWORK = ("arch", "channels", "blocks", "patch", "attention", "dropout", "width", "T", "schedule", "prediction", "label_dropout")
TRAINING = ("batch_size", "lr", "gamma", "seed", "images")
KEYS = {"script", "args", "ema"}  # of a checkpoint that samples; --resume needs the rest as well


def save_checkpoint(args, model, ema, optim, step, seconds, log):
    """Writes all that training needs to go on, and log.csv, whole or not at all. Returns what went wrong, or None."""
    if args.rank:
        return None
    path, temporary = Path(args.ckpt), Path(f"{args.ckpt}.tmp")
    rng = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(args.device)} if args.device.type == "cuda" else {})}
    state = {"script": "p2_diffusion", "args": {k: getattr(args, k) for k in NETWORK + TRAINING}, "step": step, "seconds": seconds,
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
    """The checkpoint of this script in --ckpt, read without running code from it."""
    path = args.ckpt
    if not Path(path).is_file():
        fail(f"--ckpt {path}: no such file; make one with: python p2_diffusion.py --mode train --arch {args.arch} --data DIR --ckpt {path}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        fail(f"--ckpt {path}: not a readable checkpoint ({type(e).__name__}); truncated, or not written by p2_diffusion.py --mode train")
    if not isinstance(ckpt, dict) or ckpt.get("script") != "p2_diffusion" or KEYS - ckpt.keys() or not isinstance(ckpt["args"], dict) or set(NETWORK + TRAINING) - ckpt["args"].keys():
        fail(f"--ckpt {path}: not a checkpoint of this p2_diffusion.py; found {ckpt.get('script', 'another dict') if isinstance(ckpt, dict) else type(ckpt).__name__}")
    if ckpt["args"]["arch"] != args.arch:
        fail(f"--ckpt {path}: holds --arch {ckpt['args']['arch']}, expected {args.arch}; pass --arch {ckpt['args']['arch']} or another --ckpt")
    return ckpt


def resume(args, model, ema, optim):
    """Loads --ckpt into the training state; returns step, seconds and log. Differing settings are refused, not ignored."""
    ckpt = load_checkpoint(args)
    if "optim" not in ckpt:
        fail(f"--resume: {args.ckpt} holds the averaged network alone, without the state of training; give another --ckpt")
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
    """Power-function average over about the last tenth of training, however long (2312.02696, equation 15); buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - (1 - 1 / step) ** 17)
    for target, source in zip(ema.buffers(), model.buffers()):
        target.copy_(source)


def train(args):
    """Trains on MNIST-M for --steps steps; Ctrl-C saves and exits with 130."""
    from common import any_process, claim_checkpoint, join_processes, load_digits
    join_processes(args)
    if args.rank == 0:
        claim_checkpoint(args.ckpt, args.resume)
    images, labels = (v.to(args.device) for v in load_digits(args.data, "mnistm", "train"))
    args.images = [len(images), images.sum().item()]  # --resume asks for the same
    torch.manual_seed(args.seed)
    model, ema = build(args), build(args)
    ema.load_state_dict(model.state_dict())
    optim = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, seconds, log = resume(args, model, ema, optim) if args.resume else (0, 0.0, [])
    alpha_bar = make_alpha_bar(args.schedule, args.T).to(args.device)
    net = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    if args.rank:
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, args.rank]).generate_state(1)[0]))  # every process draws images and noise of its own
    print(f"{args.arch}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(images):,} images, {args.device}, {'bf16' if args.bf16 else 'float32'}", flush=True)
    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=step, desc="train", unit="step", disable=args.rank > 0, mininterval=1 if sys.stderr.isatty() else 60)
    start = saved = time.perf_counter()
    total, count, last, done = 0.0, 0, seconds, step >= args.steps
    try:
        while not done:
            i = torch.randint(len(images), (args.batch_size // args.world,), device=args.device)
            x0 = images[i].float() / 127.5 - 1
            y = labels[i].masked_fill(torch.rand(len(i), device=args.device) < args.label_dropout, NULL)
            # warm-up, then 1/sqrt decay: like the EMA it does not depend on --steps, so that a run can be prolonged (2312.02696)
            optim.param_groups[0]["lr"] = args.lr * min((step + 1) / 200, 1) / max(step / 5000, 1) ** 0.5
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                loss = diffusion_loss(net, x0, y, alpha_bar, args.prediction, args.gamma)
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
    """The EMA network of --ckpt in eval mode and its alpha_bar; network settings are taken from the checkpoint."""
    ckpt = load_checkpoint(args)
    vars(args).update({k: ckpt["args"][k] for k in NETWORK})
    if args.sampler != "ddpm" and args.sample_steps > args.T:
        fail(f"--sample-steps {args.sample_steps}: expected at most the {args.T} steps that {args.ckpt} was trained with")
    if args.guidance and not args.label_dropout:
        fail(f"--guidance {args.guidance}: {args.ckpt} was trained with --label-dropout 0 and has no null class; use --guidance 0")
    args.how = f"{args.sampler}, {args.T if args.sampler == 'ddpm' else args.sample_steps} steps"
    model = build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return model, make_alpha_bar(args.schedule, args.T)


def image_noise(pairs, seed, device):
    """A function that draws normal noise (N, 3, 28, 28), for each (digit, number) of `pairs` from a generator of its own."""
    states = [np.random.SeedSequence([seed, *pair]).generate_state(1)[0] for pair in pairs]
    generators = [torch.Generator().manual_seed(int(state)) for state in states]
    return lambda: torch.stack([torch.randn(3, SIZE, SIZE, generator=g) for g in generators]).to(device)


def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, on the CPU."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@torch.inference_mode()
def generate(model, alpha_bar, pairs, args, trace=None):
    """One batch: images of `pairs` = [(digit, number)] as uint8 (N, 3, 28, 28); trace: a list that receives every (t, x_t of the first image).

    An image depends on (--seed, digit, number) alone, not on the batch that it is in.
    """
    noise = image_noise(pairs, args.seed, args.device)
    y = torch.tensor([digit for digit, _ in pairs], device=args.device)
    predict = denoiser(model, y, alpha_bar, args.prediction, args.guidance, args.guidance_interval, args.bf16)

    def denoise(x, t):
        if trace is not None:
            trace.append((t, to_uint8(x[0])))
        return predict(x, t)

    if args.sampler == "ddpm":
        x0 = ddpm(denoise, noise(), alpha_bar, noise)
    elif args.sampler == "ddim":
        x0 = ddim(denoise, noise(), alpha_bar, args.sample_steps, args.eta, noise)
    else:
        x0 = dpm_solver(denoise, noise(), alpha_bar, args.sample_steps)
    return to_uint8(x0)


def sample(args):
    """Writes --num images of each digit as <digit>_<number>.png, 28x28 RGB, into the flat folder --out."""
    model, alpha_bar = load_model(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pairs = [(digit, number) for digit in range(DIGITS) for number in range(1, args.num + 1)]
    others = sorted(set(os.listdir(out)) - {f"{digit}_{number:03d}{suffix}" for digit, number in pairs for suffix in (".png", ".tmp")})
    if others and args.rank == 0:
        print(f"warning: {out} holds {len(others)} other entries ({', '.join(others[:20])}{', ...' if others[20:] else ''}); "
              "graders read every file: use an empty folder", file=sys.stderr)
    pairs = pairs[args.rank::args.world]
    start = time.perf_counter()
    for i in tqdm(range(0, len(pairs), args.batch_size), desc="sample", unit="batch"):
        batch = pairs[i:i + args.batch_size]
        for (digit, number), image in zip(batch, generate(model, alpha_bar, batch, args)):
            write_png(out / f"{digit}_{number:03d}.png", image)
    print(f"{len(pairs)} images in {out}: {time.perf_counter() - start:.1f} s, {args.how}, w = {args.guidance}")


def write_png(path, image):
    """uint8 (3, H, W) as PNG, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------ evaluate and plots

def evaluate(args):
    """Prints accuracy and diversity of --input's PNGs, each named by its digit; --out FILE gets them as JSON."""
    from common import score_digits
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    result = score_digits(args.input, args.data, args.classifier, Path(args.ckpt).parent, args.device)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


def grid(args):
    """Writes digits.png (10x10), reverse.png (six states of the first 0), guidance.png (w = 0, 0.5, 2) training.png and network.txt into --out."""
    from common import save_curves, save_grid
    model, alpha_bar = load_model(args)
    out, trace, how = Path(args.out), [], args.how
    out.mkdir(parents=True, exist_ok=True)
    images = generate(model, alpha_bar, [(digit, number) for digit in range(DIGITS) for number in range(1, 11)], args, trace)
    save_grid(out / "digits.png", images.view(DIGITS, 10, 3, SIZE, SIZE), range(DIGITS), range(1, 11), f"rows: digit, columns: noise; {how}, w = {args.guidance}")
    trace.append((0, images[0]))
    times, states = zip(*[trace[i] for i in np.linspace(0, len(trace) - 1, 6).round().astype(int)])
    titles = [f"t = {t}" for t in times[:-1]] + ["result"]
    save_grid(out / "reverse.png", torch.stack(states)[None], [0], titles, f"reverse process, {how}, T = {args.T}", scale=1.5)
    weights = (0.0, 0.5, 2.0) if args.label_dropout else (0.0,)
    rows = [generate(model, alpha_bar, [(digit, 1) for digit in range(DIGITS)], argparse.Namespace(**{**vars(args), "guidance": w})) for w in weights]
    save_grid(out / "guidance.png", torch.stack(rows), [f"w = {w}" for w in weights], range(DIGITS), f"guidance, the same noise in each column, {how}")
    (out / "network.txt").write_text(f"{sum(p.numel() for p in model.parameters()):,} parameters\n{model}\n")
    log = Path(args.ckpt).with_suffix(".log.csv")
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

    add(p, "--mode", "train", "what to do", choices=("train", "sample", "eval", "grid"))
    add(p, "--data", None, "folder of the course's layout or a torchvision root", metavar="DIR", shown="built-in digits")
    add(p, "--input", "samples", "images that eval reads", metavar="DIR")
    add(p, "--out", None, "where sample and grid write; for eval, a JSON file", metavar="PATH", shown="samples, figures, none")
    add(p, "--ckpt", None, "checkpoint to write or read; its log.csv lies beside it", metavar="FILE", shown="checkpoints/p2_diffusion_<arch>.pt")
    add(p, "--classifier", None, "eval: weights in the course's format", metavar="FILE", shown="digit_classifier_<hash of --data>.pth beside --ckpt, trained if missing")
    add(p, "--seed", 0, "random seed of training and of the samples", type=number(int, 0, 2**63 - 1))
    add(p, "--device", "auto", "auto, cpu, cuda or cuda:N")
    add(p, "--precision", "auto", "bf16 autocast or float32; auto: bf16 where the hardware has it", choices=("auto", "bf16", "float32"))
    g = p.add_argument_group("training")
    add(g, "--steps", None, "total number of steps, with --resume those of the runs before included", type=number(int, 1), shown="24000; --fast 1600")
    g.add_argument("--fast", action="store_true", help="preset for a CPU and a few minutes: 1600 steps of 32 images")
    g.add_argument("--resume", action="store_true", help="go on from --ckpt exactly")
    add(g, "--batch-size", None, "images per step", type=number(int, 1), shown="64 to train (--fast 32), 100 to sample")
    add(g, "--lr", 1e-3, "peak learning rate of AdamW", type=number(float, 0))
    add(g, "--label-dropout", 0.1, "share of labels replaced by the null class", type=number(float, 0, 1))
    add(g, "--gamma", 5.0, "min-SNR weighting; 0 switches it off", type=number(float, 0))
    add(g, "--prediction", "v", "what the network predicts", choices=("v", "eps"))
    add(g, "--schedule", "cosine", "noise schedule", choices=("cosine", "linear"))
    add(g, "--T", 400, "number of diffusion steps", type=number(int, 2))
    g = p.add_argument_group("network (sample and grid take it from the checkpoint)")
    add(g, "--arch", "unet", "unet, or the ContextUnet of the 2023 report", choices=("unet", "context"))
    add(g, "--channels", [64, 128], "unet: width at each resolution, multiples of 32", type=number(int, 32), nargs="+", metavar="C")
    add(g, "--blocks", 1, "unet: residual blocks per resolution", type=number(int, 1))
    add(g, "--patch", 2, "unet: pixels folded into channels at the entrance", type=int, choices=(1, 2, 4))
    add(g, "--attention", "full", "unet: softmax at all but the first resolution, linear at all, or none", choices=("full", "linear", "none"))
    add(g, "--dropout", 0.0, "unet: dropout in the residual blocks", type=number(float, 0, 1))
    add(g, "--width", 216, "context: number of features", type=number(int, 8))
    g = p.add_argument_group("sampling")
    add(g, "--num", 100, "images per digit", type=number(int, 1))
    add(g, "--sampler", "dpm++", "DPM-Solver++(2M), DDIM, or DDPM over all T steps", choices=("dpm++", "ddim", "ddpm"))
    add(g, "--sample-steps", 15, "network calls of dpm++ and ddim", type=number(int, 1))
    add(g, "--eta", 0.0, "ddim: 0 deterministic, 1 as noisy as ddpm", type=number(float, 0, 1))
    add(g, "--guidance", 2.5, "w of (1 + w) eps(x, y) - w eps(x, null); 0: no guidance", type=number(float, 0))
    add(g, "--guidance-interval", [0.0, 1.0], "guide while t / T is in it", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"))
    args = p.parse_args(argv)
    if any(c % 32 for c in args.channels) or SIZE // args.patch % 2 ** (len(args.channels) - 1):
        fail(f"--channels {args.channels} with --patch {args.patch}: expected multiples of 32, and that {SIZE // args.patch} can be halved {len(args.channels) - 1} times")
    if args.width % 8:
        fail(f"--width {args.width}: expected a multiple of 8")
    if args.guidance_interval[0] > args.guidance_interval[1]:
        fail(f"--guidance-interval {args.guidance_interval}: expected LO <= HI")
    if args.eta and args.sampler != "ddim":
        fail(f"--eta {args.eta} with --sampler {args.sampler}: eta is DDIM's; pass --sampler ddim")
    args.steps = args.steps or (1600 if args.fast else 24000)
    args.batch_size = args.batch_size or (100 if args.mode != "train" else 32 if args.fast else 64)
    args.ckpt = args.ckpt or f"checkpoints/p2_diffusion_{args.arch}.pt"
    args.out = args.out or {"sample": "samples", "grid": "figures"}.get(args.mode)
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
        {"train": train, "sample": sample, "eval": evaluate, "grid": grid}[args.mode](args)
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
