"""GANs: DCGAN, WGAN-GP and SN-GAN on 64x64 faces, ACGAN on 28x28 digits.

Papers: DCGAN (arXiv 1511.06434), WGAN-GP (1704.00028), spectral normalisation (1802.05957), hinge loss (1705.02894), ACGAN (1610.09585),
DiffAugment (2006.10738), EMA of the generator (1806.04498), R1 penalty (1801.04406), two time scales (1706.08500).

  python p1_gan.py --mode train --method dcgan --data hw2_data                   # the reports' method A
  python p1_gan.py --mode train --method sngan --data hw2_data                   # method B
  python p1_gan.py --mode sample --method sngan --out faces                      # 1000 PNG, 64x64
  python p1_gan.py --mode grid --ckpt checkpoints/p1_dcgan.pt checkpoints/p1_sngan.pt --out figures   # first 32 images, A beside B
  python p1_gan.py --mode train --method acgan --data hw2_data                   # digits by class; sample writes 0_001.png ... 9_100.png

Real data, --seed 0, one Xeon core with AMX each, measured once: sngan 154.2 Frechet distance on EfficientNet-Lite0 (1000 faces against 2,025) and 97.9 % face rate
after 64 epochs, 136 minutes (dcgan 209.3, 92.8 %, 103 minutes); acgan 99.5 % digit accuracy of 1000 images, 67 minutes. README.md has the tables and commands.
"""
import argparse
import csv
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
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

try:
    from tqdm import tqdm
except ImportError:  # the file copied alone runs without progress bars
    def tqdm(iterable, **_):
        return iterable

Z, DIGITS = 100, 10
# what each method trains with unless an option says otherwise; lr: generator, lr_d: discriminator, ema: decay of the generator that samples
PRESETS = {
    "dcgan": dict(lr=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, n_critic=1, g_updates=1, ema=0.0, diffaugment="", decay="none", batch_size=64, steps=7000),
    "wgangp": dict(lr=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9, n_critic=5, g_updates=1, ema=0.0, diffaugment="", decay="none", batch_size=64, steps=7000),
    "sngan": dict(lr=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, n_critic=1, g_updates=1, ema=0.999, diffaugment="translation", decay="linear", batch_size=16, steps=28000),
    "acgan": dict(lr=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, n_critic=1, g_updates=2, ema=0.999, diffaugment="translation", decay="linear", batch_size=32, steps=10000),
}


def fail(message, code=2):
    """One line on standard error; exit code 2: wrong usage or input, 1: a failed run."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# ------------------------------------------------------------------ networks

def up(c_in, c_out, stride=2, padding=1):
    """Doubles the height and width of a map; stride 1, padding 0: from 1x1 to 4x4."""
    return nn.Sequential(nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def refine(c):
    """A 3x3 convolution at the same size."""
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())


class Generator(nn.Module):
    """DCGAN's generator: z (B, 100) -> (B, 3, 64, 64) in [-1, 1]; 3,576,704 parameters. y is not used."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            up(Z, 512, 1, 0),  # (B, 512, 4, 4)
            up(512, 256), up(256, 128), up(128, 64),  # (B, 64, 32, 32)
            nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False))  # (B, 3, 64, 64)
        self.register_buffer("gain", torch.ones(()))  # 1 while it trains; recalibrate() sets that of the averaged generator

    def forward(self, z, y=None):
        return torch.tanh(self.gain * self.main(z[:, :, None, None]))


class DigitGenerator(nn.Module):
    """Class-conditional generator: z (B, 100), y (B,) digits -> (B, 3, 28, 28) in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(DIGITS, Z)
        self.start = nn.Sequential(nn.Linear(Z, 256 * 49, bias=False), nn.Unflatten(1, (256, 7, 7)), nn.BatchNorm2d(256), nn.ReLU())
        self.main = nn.Sequential(refine(256), up(256, 128), refine(128), up(128, 64), refine(64), nn.Conv2d(64, 3, 3, padding=1), nn.Tanh())

    def forward(self, z, y):
        return self.main(self.start(z * self.label(y)))  # side by side, the label alone can make the image, and all images of a digit become the same


class Discriminator(nn.Module):
    """DCGAN's discriminator: (B, 3, 64, 64) -> logits (B,), None. norm: batch (2,765,568 parameters), spectral (spectral norm
    as well: without BatchNorm it learns too slowly to teach G in 64 epochs) or none (the critic, 2,763,776)."""

    def __init__(self, norm):
        super().__init__()
        wrap = spectral_norm if norm == "spectral" else lambda layer: layer

        def down(c_in, c_out, batch=True):
            return nn.Sequential(wrap(nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)), nn.BatchNorm2d(c_out) if norm != "none" and batch else nn.Identity(), nn.LeakyReLU(0.2))

        self.main = nn.Sequential(down(3, 64, batch=False), down(64, 128), down(128, 256), down(256, 512),  # (B, 512, 4, 4)
                                  wrap(nn.Conv2d(512, 1, 4, bias=False)), nn.Flatten(0))

    def forward(self, x):
        return self.main(x), None


class DigitDiscriminator(nn.Module):
    """Discriminator with an auxiliary classifier, spectral norm beside BatchNorm: (B, 3, 28, 28) -> logits (B,), digit logits (B, 10)."""

    def __init__(self):
        super().__init__()

        def conv(c_in, c_out, k, stride, batch=True):
            return nn.Sequential(spectral_norm(nn.Conv2d(c_in, c_out, k, stride, 1, bias=not batch)), nn.BatchNorm2d(c_out) if batch else nn.Identity(), nn.LeakyReLU(0.2))

        self.main = nn.Sequential(conv(3, 64, 3, 1, batch=False), conv(64, 128, 4, 2), conv(128, 128, 3, 1), conv(128, 256, 4, 2), conv(256, 256, 3, 1), nn.Flatten())  # (B, 256 * 49)
        self.real, self.digit = spectral_norm(nn.Linear(256 * 49, 1)), spectral_norm(nn.Linear(256 * 49, DIGITS))

    def forward(self, x):
        h = self.main(x)
        return self.real(h)[:, 0], self.digit(h)


def dcgan_init(module):
    """N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm (1511.06434, section 4)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


def build(args):
    """(generator, discriminator) of --method on its device."""
    if args.method == "acgan":
        nets = DigitGenerator(), DigitDiscriminator()
    else:
        nets = Generator(), Discriminator({"dcgan": "batch", "wgangp": "none", "sngan": "spectral"}[args.method])
        nets[0].apply(dcgan_init)
        if args.method != "sngan":
            nets[1].apply(dcgan_init)
    return tuple(net.to(args.device, memory_format=torch.channels_last) for net in nets)


# ------------------------------------------------------------------ losses, augmentation

def d_loss(method, real, fake, smoothing):
    """D's loss on logits (B,). dcgan: binary cross-entropy, real label 1 - smoothing; wgangp: difference of means; sngan, acgan: hinge."""
    if method == "dcgan":
        return F.binary_cross_entropy_with_logits(real, torch.full_like(real, 1 - smoothing)) + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    if method == "wgangp":
        return fake.mean() - real.mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def g_loss(method, fake):
    """G's loss on logits (B,). dcgan: non-saturating, - log D(G(z)); else minus the mean."""
    return F.softplus(-fake).mean() if method == "dcgan" else -fake.mean()


def gradient_penalty(critic, real, fake):
    """(|grad critic| - 1)^2 at random points between real and fake, in float32 (1704.00028, equation 3). critic(x) -> (B,)."""
    with torch.autocast(real.device.type, enabled=False):
        t = torch.rand(len(real), 1, 1, 1, device=real.device)
        x = (t * real + (1 - t) * fake).float().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def r1_penalty(discriminator, real):
    """Half the squared norm of D's gradient at real images, in float32 (1801.04406, equation 9). discriminator(x) -> (B,)."""
    with torch.autocast(real.device.type, enabled=False):
        x = real.float().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
        return gradient.flatten(1).square().sum(1).mean() / 2


def diffaugment(x, policy):
    """Differentiable augmentation of real and generated images alike (2006.10738). x: (B, C, H, W); policy: words of color, translation, cutout, with commas."""
    b, _, h, w = x.shape
    for name in filter(None, policy.split(",")):
        if name == "color":
            brightness, saturation, contrast = (torch.rand(3, b, 1, 1, 1, device=x.device) * torch.tensor([1.0, 2.0, 1.0], device=x.device).view(3, 1, 1, 1, 1)).unbind(0)
            x = x + brightness - 0.5
            grey = x.mean(1, keepdim=True)
            x = (x - grey) * saturation + grey
            mean = x.mean((1, 2, 3), keepdim=True)
            x = (x - mean) * (contrast + 0.5) + mean
        elif name == "translation":
            dy, dx = torch.randint(-(h // 8), h // 8 + 1, (2, b), device=x.device)
            rows = (torch.arange(h, device=x.device) + dy[:, None]).clamp(-1, h) + 1  # (B, H), 0 and H + 1 are the zero border
            columns = (torch.arange(w, device=x.device) + dx[:, None]).clamp(-1, w) + 1
            x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)[torch.arange(b, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        else:
            cy, cx = (torch.randint(0, size + 1, (b, 1, 1), device=x.device) for size in (h, w))
            dy, dx = torch.arange(h, device=x.device)[:, None] - cy, torch.arange(w, device=x.device) - cx
            x = x * ~((-h // 4 <= dy) & (dy < h // 4) & (-w // 4 <= dx) & (dx < w // 4))[:, None]
    return x


# ------------------------------------------------------------------ train

def bf16_available(device):
    """True where bfloat16 is fast: CUDA compute capability 8 and later, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


SETTINGS = ("method", "steps", "batch_size", "lr", "lr_d", "beta1", "beta2", "weight_decay", "n_critic", "g_updates", "ema", "diffaugment", "decay",
            "label_smoothing", "instance_noise", "r1", "flip", "seed", "images")
KEYS = {"script", "args", "ema"}  # of a checkpoint that samples; --resume needs the rest as well
LOG = ("step", "d_loss", "g_loss", "d_real", "d_fake", "images_per_s", "seconds")


def save_checkpoint(args, path, nets, optims, step, seconds, log):
    """Writes all that training needs to go on, and log.csv, whole or not at all. Returns what went wrong, or None. nets: (G, EMA of G, D)."""
    if args.rank:
        return None
    temporary = Path(f"{path}.tmp")
    rng = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(args.device)} if args.device.type == "cuda" else {})}
    state = {"script": "p1_gan", "args": {k: getattr(args, k) for k in SETTINGS}, "step": step, "seconds": seconds, "log": log, "rng": rng,
             **{k: net.state_dict() for k, net in zip(("model", "ema", "discriminator"), nets)}, "optim": [optim.state_dict() for optim in optims]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", newline="") as f:
            csv.writer(f).writerows([LOG, *log])
        os.replace(temporary, path.with_suffix(".log.csv"))
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        return f"--ckpt {path}: cannot be written ({e}); an older checkpoint there is unchanged"


def load_checkpoint(path, args):
    """A checkpoint of this script, read without running code from it."""
    if not Path(path).is_file():
        fail(f"--ckpt {path}: no such file; make one with: python p1_gan.py --mode train --method {args.method} --data DIR --ckpt {path}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        fail(f"--ckpt {path}: not a readable checkpoint ({type(e).__name__}); truncated, or not written by p1_gan.py --mode train")
    if not isinstance(ckpt, dict) or ckpt.get("script") != "p1_gan" or KEYS - ckpt.keys() or not isinstance(ckpt["args"], dict) or set(SETTINGS) - set(ckpt["args"]):
        fail(f"--ckpt {path}: not a checkpoint of this p1_gan.py; found {ckpt.get('script', 'another dict') if isinstance(ckpt, dict) else type(ckpt).__name__}")
    return ckpt


def load_weights(net, state, path):
    """Fills a network from a checkpoint's state dict."""
    try:
        net.load_state_dict(state)
    except RuntimeError:
        fail(f"--ckpt {path}: its networks have other layers than this p1_gan.py's, for instance those of an earlier version; train again")


def resume(args, nets, optims):
    """Loads --ckpt into the training state; returns step, seconds and log. Differing settings are refused, not ignored."""
    ckpt = load_checkpoint(args.ckpt[0], args)
    if "optim" not in ckpt:
        fail(f"--resume: {args.ckpt[0]} holds the averaged network alone, without the state of training; give another --ckpt")
    differ = [f"{k} {getattr(args, k)} (checkpoint: {ckpt['args'][k]})" for k in SETTINGS if getattr(args, k) != ckpt["args"][k]]
    if differ:
        fail(f"--resume with other settings than {args.ckpt[0]}: {', '.join(differ)}; pass the checkpoint's, or another --ckpt")
    for key, net in zip(("model", "ema", "discriminator"), nets):
        load_weights(net, ckpt[key], args.ckpt[0])
    for optim, state in zip(optims, ckpt["optim"]):
        optim.load_state_dict(state)
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if args.device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"], args.device)
    return ckpt["step"], ckpt["seconds"], ckpt["log"]


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Average of G's parameters over about the last 1 / (1 - decay) steps, fewer at the start (1806.04498); buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(decay, (step - 1) / (step + 9)))
    for target, source in zip(ema.buffers(), model.buffers()):
        target.copy_(source)


@torch.no_grad()
def recalibrate(args, ema, spread):
    """Gives the averaged generator what training does not, from ten batches of 100: BatchNorm statistics of its own, as copied ones belong
    to other weights (standing statistics, 1809.11096), and for faces the contrast of the training images. spread: theirs, the mean over pixels of
    the standard deviation over images in [-1, 1]. D cannot teach contrast: without bias before its BatchNorm, a batch of x and one of 2 x have the same logits."""
    if args.method != "acgan":
        ema.gain.fill_(1)
    for module in ema.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    noise = torch.Generator().manual_seed(args.seed)  # training's random numbers stay as they are
    ema.train()
    x = []
    for _ in range(10):
        z, y = torch.randn(100, Z, generator=noise), torch.randint(DIGITS, (100,), generator=noise)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            x.append(ema(z.to(args.device), y.to(args.device)))
    ema.eval()
    if args.method != "acgan":
        x = torch.cat(x).float().atanh()
        for _ in range(10):
            ema.gain.mul_(spread / torch.tanh(ema.gain * x).std(0).mean()).clamp_(0.5, 2)


def d_step(args, g, d, optim, images, labels, p):
    """D step: tell real from generated images (hinge, cross-entropy or Wasserstein), and for acgan real digits from one another (1610.09585 trains on generated ones too). Returns (loss, D(x), D(G(z))), means."""
    i = torch.randint(len(images), (args.batch_size // args.world,), device=args.device)
    real, y = images[i].float() / 127.5 - 1, labels[i] if labels is not None else None
    if args.flip:
        real = torch.where(torch.rand(len(real), 1, 1, 1, device=args.device) < 0.5, real.flip(3), real)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16), parametrize.cached():
        with torch.no_grad():
            fake = g(torch.randn(len(real), Z, device=args.device), y).float()
        noise = args.instance_noise * (1 - p)  # decays to 0 at the end
        seen = [diffaugment(x + noise * torch.randn_like(x) if noise else x, args.diffaugment) for x in (real, fake)]
        (real_logits, digits), (fake_logits, _) = (d(x) for x in seen)
        loss = d_loss(args.method, real_logits.float(), fake_logits.float(), args.label_smoothing)
        if args.method == "acgan":
            loss = loss + F.cross_entropy(digits.float(), y)
    if args.method == "wgangp":
        loss = loss + 10 * gradient_penalty(lambda x: d(x)[0], real, fake)
    if args.r1:
        loss = loss + args.r1 * r1_penalty(lambda x: d(x)[0], real)
    optim.zero_grad()
    loss.backward()
    average_gradients(d, args)
    optim.step()
    show = torch.sigmoid if args.method == "dcgan" else lambda v: v
    return torch.stack([loss.detach() + gradient_check(d), show(real_logits.detach().float()).mean(), show(fake_logits.detach().float()).mean()])


def g_step(args, g, d, optim, p):
    """G step: make D take generated images for real, and for acgan read the digit that was asked for. Returns the loss."""
    b = args.batch_size // args.world
    y = torch.randint(DIGITS, (b,), device=args.device) if args.method == "acgan" else None
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16), parametrize.cached():
        logits, digits = d(diffaugment(g(torch.randn(b, Z, device=args.device), y).float(), args.diffaugment))
        loss = g_loss(args.method, logits.float())
        if y is not None:
            loss = loss + (1 + 29 * p ** 3) * F.cross_entropy(digits.float(), y)  # a large weight from the start: digits of a class become alike
    optim.zero_grad()
    loss.backward(inputs=list(g.parameters()))
    average_gradients(g, args)
    optim.step()
    return loss.detach() + gradient_check(g)


def gradient_check(net):
    """0, or NaN where a gradient is not finite: added to the loss, so that both are checked at once."""
    return 0 * torch.stack(torch._foreach_norm([p.grad for p in net.parameters()])).sum()


def rate(decay, p):
    """Factor of the learning rates at progress p in [0, 1]: none, linear to 0, or step: halved at 50 and 75 %."""
    return {"none": 1.0, "linear": 1 - p, "step": 0.5 ** ((p >= 0.5) + (p >= 0.75))}[decay]


def average_gradients(net, args):
    """Under torchrun: the mean of the processes' gradients. DistributedDataParallel does not go with the penalties' second derivatives."""
    if args.world > 1:
        gradients = [p.grad for p in net.parameters()]
        flat = torch.cat([v.flatten() for v in gradients]) / args.world
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([v.numel() for v in gradients])):
            gradient.copy_(part.view_as(gradient))


def train(args):
    """Trains for --steps updates of D; Ctrl-C saves and exits with 130. Every 500 steps a grid of fixed noises goes beside --ckpt."""
    from common import any_process, claim_checkpoint, join_processes, load_digits, load_faces
    path = Path(args.ckpt[0])
    join_processes(args)
    if args.rank == 0:
        claim_checkpoint(path, args.resume)
    images, labels = (v.to(args.device) for v in load_digits(args.data, "mnistm", "train")) if args.method == "acgan" else (load_faces(args.data, "train").to(args.device), None)
    if len(images) < 2:
        fail(f"--data {args.data}: one training image, expected two or more")
    args.images = [len(images), images.sum().item()]  # --resume asks for the same
    spread = images[::max(len(images) // 1000, 1)].float().std(0).mean() / 127.5
    torch.manual_seed(args.seed)
    (g, d), (ema, _) = build(args), build(args)
    ema.load_state_dict(g.state_dict())
    optim_g, optim_d = (torch.optim.AdamW(net.parameters(), lr, (args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True) for net, lr in ((g, args.lr), (d, args.lr_d)))
    step, seconds, log = resume(args, (g, ema, d), (optim_g, optim_d)) if args.resume else (0, 0.0, [])
    print(f"{args.method}: G {sum(p.numel() for p in g.parameters()):,} parameters, D {sum(p.numel() for p in d.parameters()):,}, {len(images):,} images, "
          f"{args.steps * args.batch_size / len(images):.0f} epochs, {args.device}, {'bf16' if args.bf16 else 'float32'}", flush=True)
    if args.rank:
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, args.rank]).generate_state(1)[0]))  # every process draws images and noise of its own
    stop, problem = [], None
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=step, desc="train", unit="step", disable=args.rank > 0, mininterval=1 if sys.stderr.isatty() else 60)
    start = saved = time.perf_counter()
    total, count, last, done, loss_g = torch.zeros(4, device=args.device), 0, seconds, step >= args.steps, torch.zeros((), device=args.device)
    try:
        while not done:
            p = step / args.steps
            optim_g.param_groups[0]["lr"], optim_d.param_groups[0]["lr"] = args.lr * rate(args.decay, p), args.lr_d * rate(args.decay, p)
            parts = d_step(args, g, d, optim_d, images, labels, p)
            step += 1
            if step % args.n_critic == 0:
                for _ in range(args.g_updates):
                    loss_g = g_step(args, g, d, optim_g, p)
                update_ema(ema, g, step // args.n_critic, args.ema)
            total, count = total + torch.cat([parts[:1], loss_g[None], parts[1:]]), count + 1
            bar.update()
            done, due, keep = step == args.steps or any_process(stop, args), time.perf_counter() - saved > 120, args.keep and step % args.keep == 0
            show = step % 500 == 0 or done
            if args.ema and (due or keep or show):
                recalibrate(args, ema, spread)
            if step % min(100, max(10, args.steps // 20)) == 0 or done or due or keep:
                mean, now = (total / count).tolist(), seconds + time.perf_counter() - start
                if not all(map(math.isfinite, mean)):
                    fail(f"losses are {mean[0]} (D) and {mean[1]} (G) at step {step}; {path} keeps the last good state, if any; try a lower --lr", code=1)
                log.append((step, *(round(v, 5) for v in mean), round(count * args.batch_size / max(now - last, 1e-9), 1), round(now, 1)))
                bar.set_postfix(D=f"{mean[0]:.3f}", G=f"{mean[1]:.3f}", images_per_s=f"{log[-1][-2]:.0f}")
                total, count, last = torch.zeros_like(total), 0, now
                for target in [path] * due + [path.with_name(f"{path.stem}_{step:06d}.pt")] * bool(keep):
                    if problem := save_checkpoint(args, target, (g, ema, d), (optim_g, optim_d), step, now, log):
                        print(f"warning: {problem}; training goes on", file=sys.stderr)
                saved = time.perf_counter() if due else saved
            if done:
                problem = save_checkpoint(args, path, (g, ema, d), (optim_g, optim_d), step, seconds + time.perf_counter() - start, log)
            if show and args.rank == 0:
                try:
                    write_png(path.with_name(f"{path.stem}_grids") / f"{step:06d}.png", sample_grid(ema.eval(), args.method, args.seed))
                except OSError as e:
                    print(f"warning: no grid of step {step} ({e.strerror or e}); training goes on", file=sys.stderr)
        seconds += time.perf_counter() - start
        if problem:
            fail(problem)
    finally:
        bar.close()
        if args.world > 1:
            dist.destroy_process_group()
        for name, handler in handlers.items():
            signal.signal(name, handler)
    print(f"{path}: step {step}, {seconds:.0f} s of training")
    if step < args.steps:
        print("stopped; go on with --resume", file=sys.stderr)
        raise SystemExit(130)


# ------------------------------------------------------------------ sample

def load_model(path, args):
    """(EMA generator of a checkpoint in eval mode, its method)."""
    ckpt = load_checkpoint(path, args)
    method = ckpt["args"]["method"]
    model, _ = build(argparse.Namespace(method=method, device=args.device))
    load_weights(model, ckpt["ema"], path)
    return model.eval(), method


def latents(keys, seed):
    """Normal latents (N, 100), one from a generator of its own for each key (a tuple of integers)."""
    states = [np.random.SeedSequence([seed, *key]).generate_state(1)[0] for key in keys]
    return torch.stack([torch.randn(Z, generator=torch.Generator().manual_seed(int(state))) for state in states])


@torch.inference_mode()
def generate(model, z, y=None):
    """Latents (N, 100) and, used by acgan alone, digits (N,) -> uint8 (N, 3, H, W) on the CPU, in float32: an image depends on its latent and digit alone."""
    device = next(model.parameters()).device
    x = model(z.to(device), None if y is None else y.to(device))
    return ((x + 1) * 127.5).round().to(torch.uint8).cpu()


def sample(args):
    """Writes --num faces 0000.png ... of 64x64, or --num / 10 digits of each class 0_001.png ... of 28x28, into the flat folder --out."""
    model, method = load_model(args.ckpt[0], args)
    if method == "acgan":
        each = max(args.num // DIGITS, 1)
        keys = [(digit, number) for digit in range(DIGITS) for number in range(1, each + 1)]
        names = [f"{digit}_{number:03d}.png" for digit, number in keys]
    else:
        keys = [(number,) for number in range(args.num)]
        names = [f"{number:04d}.png" for number in range(args.num)]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(set(os.listdir(out)) - {f"{Path(name).stem}{suffix}" for name in names for suffix in (".png", ".tmp")})
    if others and args.rank == 0:
        print(f"warning: {out} holds {len(others)} other entries ({', '.join(others[:20])}{', ...' if others[20:] else ''}); "
              "graders read every file: use an empty folder", file=sys.stderr)
    keys, names = keys[args.rank::args.world], names[args.rank::args.world]
    start = time.perf_counter()
    for i in tqdm(range(0, len(keys), 100), desc="sample", unit="batch"):
        batch = keys[i:i + 100]
        for name, image in zip(names[i:i + 100], generate(model, latents(batch, args.seed), torch.tensor([key[0] for key in batch]))):
            write_png(out / name, image)
    print(f"{len(keys)} images in {out}: {time.perf_counter() - start:.1f} s, {method}")


def write_png(path, image):
    """uint8 (3, H, W) as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tile(images, columns):
    """uint8 (N, 3, H, W) -> one picture (3, H', W') with `columns` images in a row."""
    from torchvision.utils import make_grid
    return make_grid(images, columns, pad_value=255)


def sample_grid(model, method, seed):
    """32 faces, or 10 digits of each class, of the same latents every time, as one picture (3, H, W)."""
    columns, keys = (10, [(digit, number) for digit in range(DIGITS) for number in range(1, 11)]) if method == "acgan" else (8, [(number,) for number in range(32)])
    return tile(generate(model, latents(keys, seed), torch.tensor([key[0] for key in keys])), columns)


# ------------------------------------------------------------------ evaluate and plots

def evaluate(args):
    """acgan: digit accuracy and diversity of --input's PNGs, as in p2_diffusion.py; else FID, KID and IS against the val faces."""
    import json

    from common import face_folder, score_digits, score_images
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.method == "acgan":
        result = score_digits(args.input, args.data, None, Path(args.ckpt[0]).parent, args.device)
    else:
        if not args.data:
            fail("--mode eval needs --data DIR, whose face/val is the reference")
        result = score_images(args.input, face_folder(args.data, "val"), args.inception, args.device)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


def grid(args):
    """For each --ckpt first_<name>.png (32 faces, 100 digits), network_<name>.txt, side by side compare.png where there are two or more, interpolation_<name>.png and training_<name>.png, into --out."""
    from common import save_curves
    out, firsts = Path(args.out), []
    if len({Path(path).stem for path in args.ckpt}) < len({Path(path).resolve() for path in args.ckpt}):
        fail(f"--ckpt {' '.join(args.ckpt)}: files of one name in different folders, whose pictures would overwrite each other; rename one")
    for path in args.ckpt:
        model, method = load_model(path, args)
        name = Path(path).stem
        firsts.append(sample_grid(model, method, args.seed))
        write_png(out / f"first_{name}.png", firsts[-1])
        ends, w = latents([(number,) for number in range(8)], args.seed), torch.linspace(0, 1, 9)[:, None, None]
        angle = torch.acos(F.cosine_similarity(ends[0::2], ends[1::2]))[:, None]
        path_z = (torch.sin((1 - w) * angle) * ends[0::2] + torch.sin(w * angle) * ends[1::2]) / torch.sin(angle)  # (9, 4, 100), slerp
        write_png(out / f"interpolation_{name}.png", tile(generate(model, path_z.transpose(0, 1).reshape(-1, Z), torch.arange(4).repeat_interleave(9)), 9))
        nets = build(argparse.Namespace(method=method, device="cpu"))
        (out / f"network_{name}.txt").write_text("\n".join(f"{sum(p.numel() for p in net.parameters()):,} parameters\n{net}" for net in nets) + "\n")
        log = Path(path).with_suffix(".log.csv")
        if log.is_file():
            save_curves(out / f"training_{name}.png", log, ["d_loss", "g_loss", "d_real", "d_fake"], f"{method}: losses, D(x) and D(G(z))", yscale="linear")
    if len(firsts) > 1 and len({first.shape for first in firsts}) == 1:
        gap = torch.full((3, firsts[0].shape[1], 24), 255, dtype=torch.uint8)
        write_png(out / "compare.png", torch.cat([v for first in firsts for v in (first, gap)][:-1], 2))
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


def policy(text):
    """argparse type: words of DiffAugment, or none."""
    words = [] if text in ("", "none") else text.split(",")
    if set(words) - {"color", "translation", "cutout"}:
        raise argparse.ArgumentTypeError(f"{text}: expected none, or color, translation, cutout with commas")
    return ",".join(words)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail

    def add(group, name, default, help, **kw):
        group.add_argument(name, default=default, help=f"{help} (default: {kw.pop('shown', default)})".replace("%", "%%"), **kw)

    def preset(key):
        return ", ".join(f"{method} {values[key] if values[key] != '' else 'none'}" for method, values in PRESETS.items())

    add(p, "--mode", "train", "what to do", choices=("train", "sample", "eval", "grid"))
    add(p, "--method", "sngan", "the algorithm", choices=tuple(PRESETS))
    add(p, "--data", None, "folder of the course's layout; acgan: or a torchvision root", metavar="DIR", shown="built-in faces or digits")
    add(p, "--input", "samples", "images that eval reads", metavar="DIR")
    add(p, "--inception", None, "eval: weights of pytorch-fid's Inception network", metavar="FILE", shown="downloaded once")
    add(p, "--out", None, "where sample and grid write; for eval, a JSON file", metavar="PATH", shown="samples, figures, none")
    add(p, "--ckpt", None, "checkpoint to write or read, its log.csv beside it; grid: several are shown side by side", metavar="FILE", nargs="+", shown="checkpoints/p1_<method>.pt")
    add(p, "--num", 1000, "sample: images in all", type=number(int, 1))
    add(p, "--seed", 0, "random seed of training and of the samples", type=number(int, 0, 2**63 - 1))
    add(p, "--device", "auto", "auto, cpu, cuda or cuda:N")
    add(p, "--precision", "auto", "of training: bf16 autocast or float32; auto: bf16 where the hardware has it", choices=("auto", "bf16", "float32"))
    g = p.add_argument_group("training")
    add(g, "--steps", None, "updates of D", type=number(int, 1), shown=preset("steps") + "; --fast 300")
    g.add_argument("--fast", action="store_true", help="preset for a CPU and a few minutes: 300 steps")
    g.add_argument("--resume", action="store_true", help="go on from --ckpt exactly")
    add(g, "--keep", 0, "also keep a checkpoint <ckpt>_<step>.pt every so many steps, for curves of quality over time; 0: none", type=number(int, 0))
    add(g, "--batch-size", None, "images per step", type=number(int, 2), shown=preset("batch_size"))
    add(g, "--lr", None, "learning rate of G", type=number(float, 0), shown=preset("lr"))
    add(g, "--lr-d", None, "learning rate of D", type=number(float, 0), shown=preset("lr_d"))
    add(g, "--beta1", None, "Adam's beta1", type=number(float, 0, 0.9999), shown=preset("beta1"))
    add(g, "--beta2", None, "Adam's beta2", type=number(float, 0, 0.9999), shown=preset("beta2"))
    add(g, "--weight-decay", 0.0, "AdamW's weight decay", type=number(float, 0))
    add(g, "--decay", None, "of the learning rates: linear to 0, or step: halved at 50 and 75 %", choices=("none", "linear", "step"), shown=preset("decay"))
    add(g, "--n-critic", None, "D updates per G update", type=number(int, 1), shown=preset("n_critic"))
    add(g, "--g-updates", None, "G updates after them", type=number(int, 1), shown=preset("g_updates"))
    add(g, "--ema", None, "decay of the averaged generator that samples; 0: the generator itself", type=number(float, 0, 1), shown=preset("ema"))
    add(g, "--diffaugment", None, "none, or color, translation, cutout with commas", type=policy, shown=preset("diffaugment"))
    add(g, "--label-smoothing", 0.0, "dcgan: real label 1 - this", type=number(float, 0, 1))
    add(g, "--instance-noise", 0.0, "standard deviation of noise on D's images, decaying to 0", type=number(float, 0))
    add(g, "--r1", 0.0, "weight of the R1 penalty on D", type=number(float, 0))
    g.add_argument("--no-flip", dest="flip", action="store_false", help="do not mirror faces at random")
    args = p.parse_args(argv)
    args.steps = args.steps or (300 if args.fast else None)
    for key, value in PRESETS[args.method].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.flip = args.flip and args.method != "acgan"
    args.ckpt = args.ckpt or [f"checkpoints/p1_{args.method}.pt"]
    if len(args.ckpt) > 1 and args.mode != "grid":
        fail(f"--ckpt {' '.join(args.ckpt)}: --mode {args.mode} takes one; only grid shows several")
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
