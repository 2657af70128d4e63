"""Unsupervised domain adaptation between digit data sets: labelled source, unlabelled target (MNIST-M, SVHN, USPS).

Papers: DANN (arXiv 1505.07818), mean teacher (1703.01780) for adaptation (1706.05208) with
confident pseudo-labels under strong augmentation (2001.07685) and distribution alignment (1911.09785), BatchNorm of the target (1603.04779).

  python p4_dann.py --mode train --target svhn --fast --ckpt fast.pt                 # built-in digits, MNIST-M -> SVHN, a minute
  python p4_dann.py --mode train --data hw2_data --target svhn                       # the course's MNIST-M -> SVHN
  python p4_dann.py --mode predict --input test/svhn --out pred.csv                  # image_name,label; the path names the target
  python p4_dann.py --mode eval --input pred.csv --gt test.csv                       # accuracy by the grader's rules
  python p4_dann.py --mode table --data hw2_data --out table                         # trains what is missing; the reports' table
  python p4_dann.py --mode tsne --data hw2_data --target svhn --out figures          # CNN features by digit and by domain

dann: gradient reversal, as in the paper. dann-mt, the default: augmentation, gradient reversal and, after 30 % of training, the digits
that the EMA network is sure of.

Real data, three seeds, the last step's network: MNIST-M -> USPS 99.1 % (sd 0.1, 1,459 val images), MNIST-M -> SVHN 72.1 % (sd 4.2, 160 val
images, 640 unlabelled training images); 5 minutes for each network on one Xeon core with AMX. README.md has the table and the commands.
"""
import argparse
import csv
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

SIZE, DIGITS, DOMAINS = 28, 10, ("mnistm", "svhn", "usps")
SOURCE = {"mnistm": "svhn", "svhn": "mnistm", "usps": "mnistm"}  # the course's source of each target
SCENARIOS = ["mnistm-svhn", "mnistm-usps", "usps-mnistm", "svhn-mnistm", "usps-svhn"]
METHODS = {"source": "Trained on source", "dann": "Adaptation (DANN)", "target": "Trained on target",
           "source-aug": "Trained on source, augmented", "dann-mt": "Adaptation (DANN + mean teacher), augmented"}
STEPS, FAST_STEPS = 2000, 400
EMA_DECAY = 0.99  # of the teacher, which is also the network that predicts
THRESHOLD = 0.9  # the teacher's probability from which its digit counts
START, RAMP = 0.3, 0.2  # shares of training: the consistency loss sets in after START, and its weight rises to 1 within RAMP
ALIGN = 0.5  # 0: pseudo-labels as they come, 1: all digits made equally frequent
MAX_PIXELS = 2**24  # of one input image: a PNG of a few kB can unpack to gigabytes


def fail(message, code=2):
    """One line on standard error; exit code 2: wrong usage or input, 1: a failed run."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# ------------------------------------------------------------------ networks

class ReverseGradient(torch.autograd.Function):
    """Identity forward; backward multiplies the gradient by -lambda_ (1505.07818, equations 16 and 17)."""

    @staticmethod
    def forward(ctx, x, lambda_):
        ctx.lambda_ = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.lambda_ * gradient, None


def conv(c_in, c_out, k, act=True, **kw):
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, **kw), nn.BatchNorm2d(c_out), *([nn.ReLU()] if act else []))


def mlp(act, *widths):
    """Linear layers with BatchNorm and `act` between them."""
    layers = []
    for c_in, c_out in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out), act()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class Net(nn.Module):
    """CNN features, label head and domain head. forward(x): float (B, 3, 28, 28) in [-1, 1] -> (B, 10) logits.

    arch: deep (the default, 611,788 parameters with the domain head), small (the 2022 report's, 355,164) or paper (the 2023 report's,
    976,651). Every image is turned grey and standardised first: colour, contrast and brightness tell domains apart, not digits.
    """

    def __init__(self, arch):
        super().__init__()
        if arch == "small":
            self.features = nn.Sequential(
                conv(3, 64, 5), nn.MaxPool2d(2),  # (B, 64, 12, 12)
                conv(64, 48, 5, act=False), nn.Dropout2d(0.3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())  # (B, 768)
            self.label = nn.Sequential(nn.Dropout(0.3), nn.Linear(768, 192), nn.BatchNorm1d(192), nn.Mish(), nn.Dropout(0.3), mlp(nn.Mish, 192, 128, DIGITS))
            self.domain = nn.Sequential(nn.Dropout(0.3), mlp(nn.Mish, 768, 128, 2))
        elif arch == "paper":
            self.features = nn.Sequential(
                conv(3, 64, 4), nn.MaxPool2d(3, 2),  # (B, 64, 12, 12)
                conv(64, 64, 5, act=False), nn.Dropout2d(0.5), nn.ReLU(), nn.MaxPool2d(3, 2),  # (B, 64, 3, 3)
                nn.Conv2d(64, 128, 3), nn.Flatten())  # (B, 128)
            self.label, self.domain = mlp(nn.ReLU, 128, 1024, 256, DIGITS), mlp(nn.ReLU, 128, 1024, 256, 1)
        else:
            self.features = nn.Sequential(
                conv(3, 32, 5, padding=2), nn.MaxPool2d(2),  # (B, 32, 14, 14)
                conv(32, 64, 3, padding=1), conv(64, 64, 3, padding=1), nn.MaxPool2d(2), nn.Dropout(0.25),  # (B, 64, 7, 7)
                conv(64, 128, 3, padding=1), conv(128, 128, 3, padding=1), nn.MaxPool2d(2), nn.Dropout(0.25),  # (B, 128, 3, 3)
                conv(128, 256, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, 256)
            self.label = nn.Sequential(nn.Dropout(0.5), nn.Linear(256, DIGITS))
            self.domain = mlp(nn.ReLU, 256, 128, 2)
        self.register_buffer("marginal", torch.full((DIGITS,), 1 / DIGITS))  # in the EMA network: mean probability of each digit on the target

    def embed(self, x):
        """(B, 3, 28, 28) -> features (B, C) of the grey, standardised image."""
        x = x.mean(1, keepdim=True)
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 0.05)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.features(x.expand(-1, 3, -1, -1))

    def forward(self, x):
        return self.label(self.embed(x))


def build(args):
    """The network of --arch on its device, channels_last."""
    return Net(args.arch).to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------ augmentation, losses

def augment(x, strength):
    """Random affine map, mixture of the channels and polarity, drawn for each image. x: float (B, 3, H, W) in [-1, 1] -> grey, the same shape.

    strength scales the affine map; at 1: up to 14 degrees, 35 % of scale in each direction, shear 0.3, 2 pixels of shift.
    """
    b, device = len(x), x.device
    weights = -torch.rand(b, 3, 1, 1, device=device).clamp(min=1e-6).log()  # normalised: uniform over all convex mixtures
    x = (x * weights / weights.sum(1, keepdim=True)).sum(1, keepdim=True)  # (B, 1, H, W)
    spread = strength * torch.tensor([0.25, 0.3, 0.3, 0.3, 0.15, 0.15], device=device)[:, None]
    angle, wide, high, shear, dx, dy = (torch.rand(6, b, device=device) * 2 - 1) * spread
    cos, sin, wide, high = angle.cos(), angle.sin(), wide.exp(), high.exp()
    affine = torch.stack([cos * wide, shear - sin * high, dx, sin * wide, cos * high, dy], 1).view(b, 2, 3)
    x = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    return torch.where(torch.rand(b, 1, 1, 1, device=device) < 0.5, -x, x).expand(-1, 3, -1, -1)  # dark on bright or bright on dark


def cutout(x, radius=5):
    """Sets a square at a random place of each image to the image's mean (1708.04552)."""
    centre = torch.rand(len(x), 2, 1, 1, device=x.device) * SIZE
    position = torch.arange(SIZE, device=x.device)
    hit = ((position[:, None] - centre[:, 0]).abs() < radius) & ((position - centre[:, 1]).abs() < radius)  # (B, 28, 28)
    return torch.where(hit[:, None], x.mean((1, 2, 3), keepdim=True), x)


def domain_loss(net, source, target, lambda_):
    """Cross-entropy of the domain head on gradient-reversed features (B, C) of both domains: the head learns to tell them apart, the features not to."""
    logits = net.domain(ReverseGradient.apply(torch.cat([source, target]), lambda_)).float()
    domain = (torch.arange(len(logits), device=logits.device) >= len(source)).long()
    return F.cross_entropy(F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits, domain)  # one logit: that of "target"


def align(probabilities, marginal, power):
    """Distribution alignment (1911.09785, section 3.1) towards equally frequent digits: (B, 10) times marginal^-power, normalised.

    Without it a digit that is often mistaken for another dies out: fewer pseudo-labels, fewer predictions, fewer pseudo-labels.
    """
    p = probabilities * marginal.clamp(min=1e-3) ** -power
    return p / p.sum(1, keepdim=True)


def consistency_loss(student, probabilities, threshold):
    """Cross-entropy with the teacher's digit where the teacher is surer than `threshold`, else 0 (2001.07685, equation 4).

    student: logits (B, 10); probabilities: the teacher's (B, 10). Returns the mean over the batch and the share of images that passed.
    """
    confidence, digit = probabilities.max(1)
    sure = (confidence > threshold).float()
    return (sure * F.cross_entropy(student, digit, reduction="none")).mean(), sure.mean()


def schedules(p):
    """(lambda_ up to 1, learning rate factor) at progress p in [0, 1] of training: 2 / (1 + e^-10p) - 1 and (1 + 10p)^-0.75 (1505.07818, section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * p)) - 1, (1 + 10 * p) ** -0.75


# ------------------------------------------------------------------ train

def bf16_available(device):
    """True where bfloat16 is fast: CUDA compute capability 8 and later, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


SETTINGS = ("arch", "training", "labelled", "unlabelled", "steps", "batch_size", "lr", "seed", "images")
KEYS = {"script", "args", "ema"}  # of a checkpoint that predicts; --resume needs the rest as well
LOG = ("step", "class_loss", "adaptation_loss", "sure", "images_per_s", "seconds")


def save_checkpoint(args, model, ema, optim, step, seconds, log):
    """Writes all that training needs to go on, and log.csv, whole or not at all. Returns what went wrong, or None."""
    path, temporary = Path(args.ckpt[0]), Path(f"{args.ckpt[0]}.tmp")
    rng = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(args.device)} if args.device.type == "cuda" else {})}
    state = {"script": "p4_dann", "args": {k: getattr(args, k) for k in SETTINGS}, "step": step, "seconds": seconds,
             "model": model.state_dict(), "ema": ema.state_dict(), "optim": optim.state_dict(), "rng": rng, "log": log}
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
        pair = f" --source {args.source} --target {args.target}" if args.target else ""
        fail(f"--ckpt {path}: no such file; make one with: python p4_dann.py --mode train --method {args.method}{pair} --data DIR --ckpt {path}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many types for damaged or hostile files
        fail(f"--ckpt {path}: not a readable checkpoint ({type(e).__name__}); truncated, or not written by p4_dann.py --mode train")
    if not isinstance(ckpt, dict) or ckpt.get("script") != "p4_dann" or KEYS - ckpt.keys() or not isinstance(ckpt["args"], dict) or set(SETTINGS) - set(ckpt["args"]):
        fail(f"--ckpt {path}: not a checkpoint of this p4_dann.py; found {ckpt.get('script', 'another dict') if isinstance(ckpt, dict) else type(ckpt).__name__}")
    return ckpt


def load_training_set(args):
    """(labelled images, their labels, target images without labels or None) on the device; args.images becomes their fingerprint."""
    from common import load_digits
    images, labels = (v.to(args.device) for v in load_digits(args.data, args.labelled, "train"))
    target = load_digits(args.data, args.unlabelled, "train")[0].to(args.device) if args.unlabelled else None
    args.images = [[len(v), v.sum().item()] for v in (images, target) if v is not None]
    return images, labels, target


def matching_checkpoint(args):
    """The checkpoint in --ckpt, if it was made with the settings and the images of `args`; any difference is refused, not ignored."""
    ckpt = load_checkpoint(args.ckpt[0], args)
    if "optim" not in ckpt:
        fail(f"{args.ckpt[0]} holds the averaged network alone, without the state of training; give another --ckpt")
    differ = [f"{k} {getattr(args, k)} (checkpoint: {ckpt['args'][k]})" for k in SETTINGS if getattr(args, k) != ckpt["args"][k]]
    if differ:
        fail(f"other settings than those of {args.ckpt[0]}: {', '.join(differ)}; pass the checkpoint's, or another --ckpt")
    return ckpt


def resume(args, model, ema, optim):
    """Loads --ckpt into the training state; returns step, seconds and log."""
    ckpt = matching_checkpoint(args)
    model.load_state_dict(ckpt["model"])
    ema.load_state_dict(ckpt["ema"])
    optim.load_state_dict(ckpt["optim"])
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if args.device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"], args.device)
    return ckpt["step"], ckpt["seconds"], ckpt["log"]


@torch.no_grad()
def update_ema(ema, model, step, buffers):
    """ema <- decay ema + (1 - decay) model (1703.01780); buffers: BatchNorm statistics are copied, else they are the EMA network's own."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(1 - EMA_DECAY, 1 / step))
    if buffers:
        for target, source in zip(ema.buffers(), model.buffers()):
            target.copy_(source)


def teaching(ema):
    """The EMA network's mode in training: BatchNorm by its own batches, noise on the input, no dropout."""
    for module in ema.modules():
        module.train(not isinstance(module, (nn.Dropout, nn.Dropout2d)))


def losses(args, model, ema, x, y, u, p):
    """Losses of one step: (class, adaptation, share of images with a sure teacher).

    x: labelled images, float (B, 3, 28, 28) in [-1, 1], y (B,) digits; u: unlabelled target images or None; p: progress of training in [0, 1].
    source, dann and target train on the images as they are, as the DANN paper does; source-aug and dann-mt augment.
    Source and target pass through the model separately: in training each is normalised with its own batch statistics. The EMA network
    sees target images only, so the BatchNorm statistics that predictions use later are the target's.
    """
    plain = args.training in ("plain", "dann")
    features = model.embed(x if plain else augment(x, 1.0))
    class_loss, sure = F.cross_entropy(model.label(features).float(), y), torch.zeros((), device=x.device)
    if u is None:
        return class_loss, torch.zeros_like(sure), sure
    with torch.no_grad():
        teacher = ema(u if plain else augment(u, 0.3)).float().softmax(1)
        ema.marginal.lerp_(teacher.mean(0), 0.01)
    target = model.embed(u if plain else cutout(augment(u, 1.0)))
    adaptation = domain_loss(model, features, target, schedules(p)[0])
    if args.training == "dann-mt":
        consistency, sure = consistency_loss(model.label(target).float(), align(teacher, ema.marginal, ALIGN), THRESHOLD)
        adaptation = adaptation + min(max(p - START, 0) / RAMP, 1) * consistency
    return class_loss, adaptation, sure


def train(args):
    """Trains --method for --steps steps; Ctrl-C saves and exits with 130. No label of the target is used (--method target: all of its)."""
    from common import claim_checkpoint, load_digits
    from tqdm import tqdm
    path = args.ckpt[0]
    claim_checkpoint(path, args.resume)
    images, labels, target = load_training_set(args)
    val, truth = load_digits(args.data, args.target, "val")  # for the accuracy that is printed
    torch.manual_seed(args.seed)
    model, ema = build(args), build(args)
    ema.load_state_dict(model.state_dict())
    teaching(ema)
    optim = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    step, seconds, log = resume(args, model, ema, optim) if args.resume else (0, 0.0, [])
    unlabelled = f", unlabelled {args.unlabelled} {len(target):,}" if args.unlabelled else ""
    print(f"{args.training}, labelled {args.labelled} {len(images):,} images{unlabelled}; {args.arch}: "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.device}, {'bf16' if args.bf16 else 'float32'}", flush=True)
    stop, leak = [], []
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=step, desc="train", unit="step", mininterval=1 if sys.stderr.isatty() else 60)
    start = saved = time.perf_counter()
    total, count, last, done = torch.zeros(3, device=args.device), 0, seconds, step >= args.steps
    try:
        while not done:
            p, i = step / args.steps, torch.randint(len(images), (args.batch_size,), device=args.device)
            u = target[torch.randint(len(target), (args.batch_size,), device=args.device)].float() / 127.5 - 1 if args.unlabelled else None
            optim.param_groups[0]["lr"] = args.lr * schedules(p)[1] * min((step + 1) / 100, 1)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                parts = torch.stack(losses(args, model, ema, images[i].float() / 127.5 - 1, labels[i], u, p))
            optim.zero_grad()
            parts[:2].sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optim.step()
            step += 1
            update_ema(ema, model, step, buffers=not args.unlabelled)
            total, count = total + parts.detach() + 0 * norm, count + 1  # 0 * inf is NaN: gradients are checked with the loss
            bar.update()
            done, due = step == args.steps or bool(stop), time.perf_counter() - saved > 120
            if step % min(100, max(10, args.steps // 20)) == 0 or done or due:
                mean, now = (total / count).tolist(), seconds + time.perf_counter() - start
                if not all(map(math.isfinite, mean)):
                    fail(f"loss is {mean[0] + mean[1]} at step {step}; {path} keeps the last good state, if any; try a lower --lr", code=1)
                log.append((step, *(round(v, 5) for v in mean), round(count * args.batch_size / max(now - last, 1e-9), 1), round(now, 1)))
                bar.set_postfix(loss=f"{mean[0]:.3f}", adaptation=f"{mean[1]:.3f}", images_per_s=f"{log[-1][-2]:.0f}")
                total, count, last = torch.zeros_like(total), 0, now
                if due and (problem := save_checkpoint(args, model, ema, optim, step, now, log)):
                    print(f"warning: {problem}; training goes on", file=sys.stderr)
                saved = time.perf_counter() if due else saved
            if args.oracle and step * 20 // args.steps > (step - 1) * 20 // args.steps:
                leak.append((accuracy(ema, val, truth), step))
                teaching(ema)
        seconds += time.perf_counter() - start
        if problem := save_checkpoint(args, model, ema, optim, step, seconds, log):
            fail(problem)
    finally:
        bar.close()
        for name, handler in handlers.items():
            signal.signal(name, handler)
    print(f"{path}: step {step}, {seconds:.0f} s of training")
    if step < args.steps:
        print("stopped; go on with --resume", file=sys.stderr)
        raise SystemExit(130)
    print(f"{args.target} val accuracy {100 * accuracy(ema, val, truth):.2f} % ({len(truth)} images, last step; nothing was chosen by it)")
    if leak:
        print(f"oracle, a LEAK of target labels: {100 * max(leak)[0]:.2f} % at step {max(leak)[1]}, the best of {len(leak)} evaluations")


# ------------------------------------------------------------------ predict

def load_model(path, args):
    """(EMA network of a checkpoint in eval mode, its settings); a warning if it was adapted to another target than --target."""
    ckpt = load_checkpoint(path, args)
    settings = ckpt["args"]
    model = build(argparse.Namespace(arch=settings["arch"], device=args.device)).eval()
    model.load_state_dict(ckpt["ema"])
    if args.target and settings["unlabelled"] not in (None, args.target):
        print(f"warning: {path} was adapted to {settings['unlabelled']}, the images are of {args.target}", file=sys.stderr)
    return model, settings


@torch.inference_mode()
def predict(models, images):
    """Vote of `models`: uint8 (N, 3, 28, 28) -> digits (N,) on the CPU; the mean probability decides between digits with equally many votes."""
    digits = []
    for batch in images.split(500):
        x = batch.to(next(models[0].parameters()).device).float() / 127.5 - 1
        probabilities = torch.stack([model(x).softmax(1) for model in models])  # (models, B, 10), float32 always
        votes = F.one_hot(probabilities.argmax(2), DIGITS).sum(0)
        digits.append((votes + 0.5 * probabilities.mean(0)).argmax(1).cpu())
    return torch.cat(digits)


def accuracy(model, images, labels):
    """Share of uint8 images (N, 3, 28, 28) whose digit `model`, put into eval mode, predicts as `labels` say."""
    return (predict([model.eval()], images) == labels).float().mean().item()


def read_images(folder):
    """All images of a folder, of any size and mode, as (sorted names, uint8 (N, 3, 28, 28)); what is no image is skipped with a warning."""
    if not Path(folder).is_dir():
        fail(f"--input {folder}: no such folder of images")
    names, images = [], []
    for name in sorted(os.listdir(folder)):
        try:
            with Image.open(Path(folder) / name) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, expected at most {MAX_PIXELS} in all")
                images.append(np.asarray(to_rgb(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
            names.append(name)
        except Exception as e:  # PIL's readers raise many types
            print(f"warning: {Path(folder) / name}: skipped, not a readable image ({type(e).__name__}: {str(e)[:80]})", file=sys.stderr)
    if not images:
        fail(f"--input {folder}: no images in it")
    return names, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def to_rgb(image):
    """PIL image of any mode -> RGB: 16 bits are scaled to 8, transparency is laid on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def domain_of(folder):
    """The domain that the last matching component of a path names, as the 2022 and 2023 graders need: .../digits/svhn/test -> svhn; or None."""
    for part in reversed(Path(os.path.abspath(folder)).parts):
        found = [d for d in DOMAINS if d in part.lower().replace("-", "").replace("_", "")]
        if len(found) == 1:
            return found[0]


def write_whole(path, text):
    """Writes a text file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")  # as the names came from the file system
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_predictions(args):
    """Writes --out, header image_name,label and one row per image of --input, by the vote of the networks in --ckpt."""
    names, images = read_images(args.input)
    models, settings = zip(*[load_model(path, args) for path in args.ckpt])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image_name", "label"), *zip(names, predict(models, images).tolist())])
    write_whole(args.out, table.getvalue())
    how = ", ".join(f"{path} ({s['training']}, {s['labelled']}{' to ' + s['unlabelled'] if s['unlabelled'] else ' alone'})" for path, s in zip(args.ckpt, settings))
    print(f"{args.out}: {len(names)} rows, target {args.target or 'not named'}, {how}")


# ------------------------------------------------------------------ evaluate, table and plots

def evaluate(args):
    """Accuracy of the CSV --input against the CSV --gt by the 2021 grader's rules.

    Both are read as names -> labels, as text; every predicted name must be in --gt; the share is that of the predicted rows.
    """
    def read(path):
        try:
            with open(path, newline="", encoding="utf-8-sig") as f:
                rows = [row for row in csv.reader(f) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            fail(f"{path}: cannot be read as CSV ({e})")
        if not rows or rows[0][:2] != ["image_name", "label"]:
            fail(f"{path}: found {','.join(rows[0])[:60] if rows else 'nothing'} in its first line, expected image_name,label")
        if short := [row for row in rows if len(row) < 2]:
            fail(f"{path}: found a row {short[0][0][:60]!r}, expected image_name,label in every row")
        return {row[0]: row[1] for row in rows[1:]}, len(rows) - 1

    (predicted, n), (truth, _) = read(args.input), read(args.gt)
    if n > len(predicted):
        print(f"warning: {args.input}: {n - len(predicted)} names occur twice or more; the last row of each counts", file=sys.stderr)
    for name in predicted:
        if name not in truth:
            fail(f'Item mismatch: "{name}" does not exist in the provided ground truth file.')
    if not predicted:
        fail(f"{args.input}: no predictions")
    if missing := len(truth) - len(predicted):
        print(f"warning: {args.input}: {missing} of {len(truth)} images have no prediction; the grader's rule leaves them out of the count", file=sys.stderr)
    correct = sum(truth[name] == label for name, label in predicted.items())
    print(f"Accuracy: {correct}/{len(predicted)} ({100 * correct / len(predicted):.2f}%)")


def table(args):
    """Trains what is missing among methods x scenarios x seeds, and writes the reports' table: accuracy on the target's val part, mean and standard deviation.

    "Trained on source" and "trained on target" share one network per domain and seed, whatever the scenario.
    """
    from common import load_digits
    runs = []
    for method, scenario, seed in itertools.product(args.methods, args.scenarios, args.seeds):
        source, target = scenario.split("-")
        run = argparse.Namespace(**{**vars(args), "method": method, "source": source, "target": target, "seed": seed, "ckpt": None})
        settle(run, (args.ckpt or ["checkpoints"])[0])
        if Path(run.ckpt[0]).exists():  # one of other settings or data shows now, not after hours of training
            load_training_set(run)
            matching_checkpoint(run)
        runs.append((method, scenario, run))
    validation = {target: load_digits(args.data, target, "val") for target in sorted({run.target for _, _, run in runs})}
    cells = {}
    for method, scenario, run in runs:
        run.resume = Path(run.ckpt[0]).exists()
        if not run.resume or load_checkpoint(run.ckpt[0], run)["step"] < run.steps:
            train(run)
        share = accuracy(load_model(run.ckpt[0], run)[0], *validation[run.target])
        cells.setdefault(method, {}).setdefault(scenario, []).append({"seed": run.seed, "ckpt": run.ckpt[0], "accuracy": share})
    rows = [f"| % of the val images, seeds {' '.join(map(str, args.seeds))} | " + " | ".join(f"{s.replace('-', ' → ')} ({len(validation[s.split('-')[1]][1])})" for s in args.scenarios) + " |",
            "|---" * (len(args.scenarios) + 1) + "|"]
    for method, results in cells.items():
        shares = [[100 * run["accuracy"] for run in results[scenario]] for scenario in args.scenarios]
        rows.append(f"| {METHODS[method]} | " + " | ".join(f"{np.mean(v):.1f}" + (f" ± {np.std(v, ddof=1):.1f}" if len(v) > 1 else "") for v in shares) + " |")
    write_whole(Path(args.out) / "table.md", "\n".join(rows) + "\n")
    write_whole(Path(args.out) / "table.json", json.dumps(cells, indent=1))
    print("\n".join(rows))


def a_distance(source, target):
    """Proxy A-distance 2 (1 - 2 error) of a linear classifier of the domains, error on a held-out half: 0 alike, 2 apart (1505.07818, section 5.1.5)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    x, y = np.concatenate([source, target]), np.repeat([0, 1], [len(source), len(target)])
    accuracy = cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), x, y, cv=2).mean()
    return max(2 * (2 * accuracy - 1), 0.0)


def tsne(args):
    """t-SNE after PCA of the CNN features of equally many val images of both domains: two figures, by digit and by domain; prints the proxy A-distance."""
    from common import load_digits, save_scatter
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    model, settings = load_model(args.ckpt[0], args)
    sets = [load_digits(args.data, domain, "val") for domain in (args.source, args.target)]
    num, features, digits = min(args.num, *(len(labels) for _, labels in sets)), [], []
    for images, labels in sets:
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))[:num]
        with torch.inference_mode():
            features.append(torch.cat([model.embed(b.to(args.device).float() / 127.5 - 1) for b in images[chosen].split(500)]).cpu().numpy())
        digits.append(labels[chosen].numpy())
    points = PCA(min(50, num), random_state=args.seed).fit_transform(np.concatenate(features))
    points = TSNE(random_state=args.seed, init="pca", perplexity=min(30, (2 * num - 1) / 3)).fit_transform(points)
    which = settings["training"] if settings["unlabelled"] else f"{settings['training']}-{settings['labelled']}"
    out, name = Path(args.out), f"tsne_{args.source}_{args.target}_{which}"
    write_whole(out / f"network_{which}.txt", f"{sum(p.numel() for p in model.parameters()):,} parameters\n{model}\n")
    title = f"{which}, {args.source} to {args.target}, {num} val images each"
    save_scatter(out / f"{name}_digit.png", points, np.concatenate(digits), [str(d) for d in range(DIGITS)], f"{title}, by digit")
    save_scatter(out / f"{name}_domain.png", points, np.repeat([0, 1], num), [args.source, args.target], f"{title}, by domain")
    print(f"{out}: {name}_digit.png, {name}_domain.png; proxy A-distance {a_distance(*features):.3f}")


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


def settle(args, folder="checkpoints"):
    """Derives from --method, --source and --target which domains training sees, and the default checkpoint's name."""
    args.source = args.source or SOURCE[args.target]
    if args.source == args.target:
        fail(f"--source {args.source} --target {args.target}: expected two domains")
    adapts = args.method in ("dann", "dann-mt")
    args.training = args.method if adapts else "supervised" if args.method == "source-aug" else "plain"  # source and target: the same, on different domains
    args.labelled = args.target if args.method == "target" else args.source
    args.unlabelled = args.target if adapts else None
    where = f"{args.source}_{args.target}" if adapts else args.labelled
    args.ckpt = args.ckpt or [f"{folder}/p4_{args.training}_{where}_{args.arch}_{args.seed}.pt"]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail

    def add(group, name, default, help, **kw):
        group.add_argument(name, default=default, help=f"{help} (default: {kw.pop('shown', default)})".replace("%", "%%"), **kw)

    add(p, "--mode", "train", "what to do", choices=("train", "predict", "eval", "table", "tsne"))
    add(p, "--method", "dann-mt", "train on the source alone, without or with augmentation, adapt (dann, dann-mt), or train on the target's labels", choices=tuple(METHODS))
    add(p, "--source", None, "labelled domain", choices=DOMAINS, shown="svhn for target mnistm, else mnistm")
    add(p, "--target", None, "domain to adapt to", choices=DOMAINS, shown="usps, svhn if --source is usps; predict: named by the last matching part of --input's path")
    add(p, "--data", None, "folder of the course's layout or a torchvision root", metavar="DIR", shown="built-in digits")
    add(p, "--input", None, "predict: folder of images; eval: CSV of predictions", metavar="PATH", shown="pred.csv for eval")
    add(p, "--gt", None, "eval: CSV of true labels", metavar="FILE", shown="none")
    add(p, "--out", None, "predict: CSV; table, tsne: folder", metavar="PATH", shown="pred.csv, table, figures")
    add(p, "--ckpt", None, "checkpoint to write or read; predict: several networks vote; table: the folder of all", metavar="FILE", nargs="+",
        shown="checkpoints/p4_<method>_<source>_<target>_<arch>_<seed>.pt; source, target: p4_plain_<domain>_..., source-aug: p4_supervised_<domain>_...")
    add(p, "--seed", 0, "random seed of training and of tsne", type=number(int, 0, 2**32 - 1))
    add(p, "--device", "auto", "auto, cpu, cuda or cuda:N")
    add(p, "--precision", "auto", "of training: bf16 autocast or float32; auto: bf16 where the hardware has it", choices=("auto", "bf16", "float32"))
    g = p.add_argument_group("training")
    add(g, "--arch", "deep", "network: ours, the 2022 report's or the 2023 report's (predict and tsne take it from the checkpoint)", choices=("deep", "small", "paper"))
    add(g, "--steps", None, "number of steps", type=number(int, 1), shown=f"{STEPS}; --fast {FAST_STEPS}")
    g.add_argument("--fast", action="store_true", help=f"preset for a CPU and a minute: {FAST_STEPS} steps")
    g.add_argument("--resume", action="store_true", help="go on from --ckpt exactly")
    add(g, "--batch-size", 64, "images per step, of each domain", type=number(int, 2))
    add(g, "--lr", 1e-3, "initial learning rate of AdamW", type=number(float, 0))
    g.add_argument("--oracle", action="store_true", help="also print the best of 20 evaluations on target labels: a leak, for comparison with reports that do so")
    g = p.add_argument_group("table, tsne")
    add(g, "--methods", list(METHODS), "table: rows", choices=tuple(METHODS), nargs="+", shown=" ".join(METHODS))
    add(g, "--scenarios", SCENARIOS, "table: columns", choices=[f"{s}-{t}" for s in DOMAINS for t in DOMAINS if s != t], nargs="+", metavar="SOURCE-TARGET", shown=" ".join(SCENARIOS))
    add(g, "--seeds", [0, 1, 2], "table: seeds", type=number(int, 0, 2**32 - 1), nargs="+", shown="0 1 2")
    add(g, "--num", 1000, "tsne: images of each domain", type=number(int, 10))
    args = p.parse_args(argv)
    args.steps = args.steps or (FAST_STEPS if args.fast else STEPS)
    args.out = args.out or {"predict": "pred.csv", "table": "table", "tsne": "figures"}.get(args.mode)
    if args.mode == "eval":
        args.input = args.input or "pred.csv"
        if not args.gt:
            fail("--mode eval needs --gt FILE, the CSV of true labels")
        return args
    if args.mode == "predict":
        if not args.input:
            fail("--mode predict needs --input DIR, the folder of images")
        args.target = args.target or domain_of(args.input)
        if not (args.target or args.ckpt):
            fail(f"--input {args.input}: no part of the path names a domain ({', '.join(DOMAINS)}); pass --target or --ckpt")
    if args.ckpt and len(args.ckpt) > 1 and args.mode != "predict":
        fail(f"--ckpt {' '.join(args.ckpt)}: --mode {args.mode} takes one; only predict votes")
    if args.mode != "predict":
        args.target = args.target or ("usps" if args.source != "usps" else "svhn")
    if args.target and args.mode != "table":
        settle(args)
    args.methods, args.scenarios, args.seeds = (list(dict.fromkeys(v)) for v in (args.methods, args.scenarios, args.seeds))
    try:
        args.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
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
        {"train": train, "predict": write_predictions, "eval": evaluate, "table": table, "tsne": tsne}[args.mode](args)
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
