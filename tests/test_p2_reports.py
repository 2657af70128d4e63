"""The reports' diffusion networks and presets (--report of p2_diffusion.py)."""

import math

import pytest
import torch

import p2_diffusion as p2

REPORTS = ("2022a", "2022b", "2022c", "2023")
PARAMETERS = {"2022a": 36_254_339, "2022b": 33_293_187, "2022c": 4_561_027, "context": 18_743_187}


def parse(*argv):
    return p2.parse_args([*argv, "--device", "cpu"])


def message(*argv):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("report", REPORTS)
def test_networks_are_exact(report):
    """The number of parameters is the report's; time and digit reach the output."""
    args = parse("--report", report)
    torch.manual_seed(0)
    net = p2.build(args)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[args.arch]
    for parameter in net.parameters():  # 2022b starts with an output of almost 0
        if parameter.abs().max() < 0.01 and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.05)
    net.eval()
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        out = net(x, torch.tensor([0, 150]), torch.tensor([1, 9]))
        assert out.shape == x.shape and out.isfinite().all()
        assert not torch.equal(out[0], net(x, torch.tensor([50, 150]), torch.tensor([1, 9]))[0])
        other = net(x, torch.tensor([0, 150]), torch.tensor([2, 9]))
        assert not torch.equal(out[0], other[0]) and torch.allclose(out[1], other[1], atol=1e-5)


def test_null_leaves_the_label_out():
    torch.manual_seed(0)
    net = p2.UNet2022b().eval()
    assert net.label[0](torch.tensor([(p2.NULL + 1) % 11])).abs().max() == 0
    small = p2.UNet2022c().eval()
    x, t = torch.randn(1, 3, 28, 28), torch.tensor([5])
    with torch.no_grad():
        null = small(x, t, torch.tensor([p2.NULL]))
        small.label.weight.normal_()
        assert torch.equal(null, small(x, t, torch.tensor([p2.NULL])))


@pytest.mark.parametrize("linear", (False, True))
def test_attention_against_its_formula(linear):
    torch.manual_seed(0)
    net = p2.ReportAttention(8, torch.nn.Identity(), heads=2, head=4, bias=False, linear=linear)
    x = torch.randn(1, 8, 3, 5)
    q, k, v = net.qkv(x).view(3, 2, 4, 15).double()  # each (heads, head, positions)
    if linear:
        weights = torch.einsum("hdn,hdm->hnm", q.softmax(1) / 2, k.softmax(2)) / 15
    else:
        weights = (torch.einsum("hdn,hdm->hnm", q, k) / 2).softmax(2)
    y = torch.einsum("hnm,hdm->hdn", weights, v).reshape(1, 8, 3, 5).float()
    assert torch.allclose(net(x), x + net.out(y), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("report", REPORTS)
def test_train_resume_and_sample(report, tmp_path, capsys):
    """Two steps and one more; the checkpoint alone says what the sampler needs to know of the network."""
    ckpt = str(tmp_path / "a.pt")
    options = ["--report", report, "--batch-size", "2", "--ckpt", ckpt, "--device", "cpu", "--T", "3"]
    p2.main([*options, "--steps", "2"])
    if p2.REPORTS[report]["lr_schedule"] == "constant":
        p2.main([*options, "--steps", "3", "--resume"])
        assert torch.load(ckpt, weights_only=True)["step"] == 3
    sample = ["--mode", "sample", "--ckpt", ckpt, "--num", "1", "--out", str(tmp_path / "digits")]
    p2.main([*sample, "--report", report])
    assert "ddpm, 3 steps" in capsys.readouterr().out
    assert len(list((tmp_path / "digits").iterdir())) == 10


def test_presets():
    """What four teams did differently; any option overrides."""
    assert set(p2.REPORTS) == set(REPORTS)
    args = parse("--report", "2023")
    found = args.T, args.batch_size, args.epochs, args.steps, args.lr, args.optimizer, args.ema, args.sampler
    assert found == (400, 256, 25, None, 1e-4, "adam", 0.0, "ddpm")
    assert args.prediction == "eps" and args.gamma == 0 and args.clip == math.inf and not args.clamp
    assert args.ckpt == "checkpoints/p2_diffusion_2023.pt" and args.guidance_interval == [0, 1]
    args = parse("--report", "2023", "--steps", "200", "--sampler", "ddim", "--guidance", "0.5", "--clamp")
    assert (args.steps, args.sampler, args.guidance, args.clamp) == (200, "ddim", 0.5, True)
    assert parse("--report", "2022c", "--T", "500").T == 500
    assert parse("--report", "2022a", "--epochs", "2").steps is None
    assert parse("--epochs", "2").steps is None and parse().steps == 10000


def test_contradictions():
    assert "2021 has no diffusion model" in message("--report", "2021")
    assert "contradicts --report 2023" in message("--report", "2023", "--arch", "unet")
    assert "no such setting" in message("--report", "2022a", "--channels", "32", "64")
    assert "no such setting" in message("--report", "2022c", "--width", "64")
    assert "no such setting" in message("--arch", "context", "--patch", "1")
    assert "no null class" in message("--report", "2022a", "--label-dropout", "0.1")
    for epochs in (2, parse("--report", "2022b").epochs):
        assert "expected one of them" in message("--report", "2022b", "--steps", "3", f"--epochs={epochs}")
    assert "--clip" in message("--clip", "0")


def test_epochs_count_passes_over_the_images(tmp_path):
    images = torch.randint(256, (20, 3, 28, 28), dtype=torch.uint8)
    options = ["--epochs", "2", "--batch-size", "8", "--channels", "32", "--ckpt", str(tmp_path / "a.pt")]
    p2.train(parse(*options), images, torch.arange(20) % 10)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 6  # 2 times 3 batches


def test_learning_rates():
    args = parse("--lr", "1", "--lr-schedule", "linear")
    assert [p2.learning_rate(args, step, 4) for step in (1, 2, 4)] == [1, 0.75, 0.25]
    args = parse("--lr", "1", "--lr-schedule", "cosine")
    rates = [p2.learning_rate(args, step, 100) for step in range(1, 101)]
    assert rates[0] == 0 and max(rates) == rates[10] == 1 and rates[-1] < 0.001
    assert p2.learning_rate(parse("--lr", "1", "--lr-schedule", "constant"), 99, 100) == 1


@pytest.mark.parametrize("variance", ("posterior", "beta"))
def test_variance_of_ddpm(variance):
    """From x = 0 and x0 = 0 a step leaves the noise alone; the last one adds none."""
    alpha_bar = p2.make_alpha_bar("linear", 10, 0.3)
    zeros = torch.zeros(1, 1, 2, 2)
    seen = []

    def predict(x, t):
        seen.append(x)
        return zeros, x

    result = p2.ddpm(predict, zeros, alpha_bar, [9, 4], lambda: torch.ones_like(zeros), variance)
    a, b = alpha_bar[9].item(), alpha_bar[4].item()
    wanted = 1 - a / b
    if variance == "posterior":
        wanted *= (1 - b) / (1 - a)
    assert seen[1].square().mean().item() == pytest.approx(wanted, rel=1e-5)
    assert result.abs().max() == 0
