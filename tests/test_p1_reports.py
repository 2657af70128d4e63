"""The reports' GANs (--report of p1_gan.py)."""

import pytest
import torch
import torch.nn.functional as F

import p1_gan as p1

SYSTEMS = [(report, method) for report, methods in p1.REPORTS.items() for method in methods]


def parse(report, method, *argv):
    return p1.parse_args(["--report", report, "--method", method, *argv, "--device", "cpu"])


def message(*argv):
    with pytest.raises(ValueError) as error:
        p1.parse_args(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "report, method, generator, discriminator",
    [
        ("2021", "dcgan", 3_577_667, 2_766_529),
        ("2021", "acgan", 3_741_727, 2_848_459),
        ("2022a", "dcgan", 3_576_704, 2_765_568),
        ("2022c", "wgangp", 3_576_704, 2_763_776),
        ("2022b", "sngan", 3_576_704, 2_765_568),
    ],
)
def test_networks_are_exact(report, method, generator, discriminator):
    networks = p1.build(parse(report, method))
    counts = [sum(p.numel() for p in net.parameters()) for net in networks]
    assert counts == [generator, discriminator]


def test_presets():
    assert {report: list(methods) for report, methods in p1.REPORTS.items()} == {
        "2021": ["dcgan", "acgan"],
        "2022a": ["dcgan", "wgangp"],
        "2022b": ["dcgan", "sngan"],
        "2022c": ["dcgan", "wgangp"],
    }
    args = p1.parse_args(["--report", "2021"])
    found = args.method, args.lr, args.beta1, args.beta2, args.g_updates, args.decay, args.epochs, args.steps
    assert found == ("dcgan", 2e-4, 0.9, 0.999, 2, "thirds", 120, None)
    assert args.ckpt == "checkpoints/p1_dcgan_2021.pt"
    args = parse("2022b", "sngan")
    assert (
        args.loss == "bce" and args.weight_decay > 0 and args.label_smoothing > 0 and args.instance_noise > 0
    )
    for report, method in SYSTEMS:
        args = parse(report, method, "--steps", "5", "--lr", "0.5")
        assert (args.steps, args.lr, args.ema, args.diffaugment) == (5, 0.5, 0.0, "none")


def test_refusals():
    assert "2023 has no GAN" in message("--report", "2023")
    assert "this report has dcgan and wgangp" in message("--report", "2022a", "--method", "acgan")
    for epochs in ("3", "120"):  # the second is the report's own
        assert "expected one of them" in message("--report", "2021", "--steps", "2", "--epochs", epochs)
    assert "only bce has" in message("--method", "sngan", "--label-smoothing", "0.1")


def test_rate_is_halved_at_thirds():
    """2021 halves it every 40 of 120 epochs."""
    rates = [p1.rate("thirds", epoch / 120) for epoch in (0, 39, 40, 79, 80, 119)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("report, method", SYSTEMS)
def test_train_and_sample(report, method, tmp_path):
    """Two steps; the checkpoint alone says which network it holds."""
    args = parse(report, method, "--steps", "2", "--batch-size", "2", "--ckpt", str(tmp_path / "a.pt"))
    size = 28 if method == "acgan" else 64
    images = torch.randint(256, (8, 3, size, size), dtype=torch.uint8)
    trained = p1.train(args, images, torch.arange(8))
    model, settings = p1.load_model(tmp_path / "a.pt")
    z = torch.randn(3, 100)
    made = p1.generate(model, settings, z, [1, 2, 3] if method == "acgan" else None)
    assert made.shape == (3, 3, size, size)
    for name, value in trained.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[name])


def test_digits_of_2021_are_enlarged_and_brought_back():
    """G of 2021 makes 64x64; `generate` gives the grader's 28x28, and the digit counts."""
    args = parse("2021", "acgan")
    g, d = p1.build(args)
    z = torch.randn(2, 100)
    assert g(z, torch.tensor([1, 2])).shape == (2, 3, 64, 64)
    assert d(torch.randn(2, 3, 64, 64))[1].shape == (2, 10)
    one = p1.generate(g.eval(), args, z, [1, 2])
    other = p1.generate(g, args, z, [1, 3])
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_discriminator_of_2021_reads_generated_digits_too(monkeypatch):
    """Its loss has the cross-entropy of real and of generated digits."""
    args = parse("2021", "acgan", "--batch-size", "4", "--precision", "float32")
    torch.manual_seed(0)
    g, d = p1.build(args)
    optim = torch.optim.SGD(d.parameters(), 0.0)
    calls = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(p1.F, "cross_entropy", lambda x, y: calls.append(1) or cross_entropy(x, y))
    images = torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8)
    p1.d_step(args, g, d, optim, images, torch.arange(8), 0.0)
    assert len(calls) == 2


def test_noise_of_method_b_decays_on_both_sides():
    """2022b: D sees noisy images in its own and in G's step, and none at the end."""
    args = parse("2022b", "sngan")
    x = torch.zeros(4, 3, 64, 64)
    spread = [p1.shown(args, x, progress).std().item() for progress in (0, 0.5)]
    assert spread == pytest.approx([args.instance_noise, args.instance_noise / 2], rel=0.02)
    assert torch.equal(p1.shown(args, x, 1.0), x)


def test_a_report_s_generator_stays_as_it_was_trained(tmp_path):
    """Neither statistics nor contrast of our own: it is the network of the last step."""
    args = parse("2022a", "dcgan", "--batch-size", "4", "--steps", "2", "--ckpt", str(tmp_path / "g.pt"))
    p1.train(args, torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8))
    state = torch.load(tmp_path / "g.pt", weights_only=True)
    assert all(torch.equal(value, state["model"][name]) for name, value in state["ema"].items())
    assert state["ema"]["gain"] == 1
