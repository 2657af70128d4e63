"""Speed, measured, never asserted. Run it with nothing else on the machine.

  python tests/benchmark.py p2                                              # training and sampling speed
  python tests/benchmark.py p2 --ckpt FILE --data DIR --num 100             # with the accuracy of each sampler
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

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


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["p2"])
    p.add_argument("--ckpt", help="trained checkpoint with the classifier of --mode eval beside it (default: an untrained network, no accuracy)")
    p.add_argument("--data", help="as in the scripts (default: built-in data)")
    p.add_argument("--num", type=int, default=100, help="images per digit; DDPM makes a fifth of them (default: 100)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options = p.parse_args()
    {"p2": p2}[options.what](options)
