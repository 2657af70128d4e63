"""The reports' GANs (--report of p1_gan.py)."""

import pytest
import torch

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


def test_a_report_s_settings_stand_over_the_method_s_and_options_over_both():
    args = p1.parse_args(["--report", "2021"])
    found = args.method, args.betas, args.batch_size, args.decay, args.epochs, args.steps
    assert found == ("dcgan", [0.9, 0.999], 64, "thirds", 120, None)
    assert args.ckpt == "checkpoints/p1_dcgan_2021.pt"
    for report, method in SYSTEMS:
        args = parse(report, method, "--steps", "5", "--lr", "0.5")
        assert (args.steps, args.lr, args.ema, args.diffaugment) == (5, 0.5, 0.0, "none")
    args = parse("2021", "dcgan", "--fast")
    assert args.epochs is None and args.steps > 0


def test_refusals():
    assert "2023" in message("--report", "2023")  # has no GAN
    assert "this report has dcgan and wgangp" in message("--report", "2022a", "--method", "acgan")
    for epochs in ("3", "120"):  # the second is the report's own
        assert "expected one of them" in message("--report", "2021", "--steps", "2", "--epochs", epochs)


@pytest.mark.parametrize(
    "report, method", [("2021", "dcgan"), ("2021", "acgan"), ("2022a", "wgangp"), ("2022b", "sngan")]
)
def test_train_and_sample(report, method, tmp_path):
    """The checkpoint alone says which network it holds: that of the last step, without statistics or
    contrast of our own.
    """
    options = ["--steps", "1", "--batch-size", "2", "--n-critic", "1", "--precision", "float32"]
    args = parse(report, method, *options, "--ckpt", str(tmp_path / "a.pt"))
    size = 28 if method == "acgan" else 64
    images = torch.randint(256, (8, 3, size, size), dtype=torch.uint8)
    p1.train(args, images, torch.arange(8) if method == "acgan" else None)
    model, settings = p1.load_model(tmp_path / "a.pt")
    digits = [1, 2, 3] if method == "acgan" else None
    assert p1.generate(model, settings, torch.randn(3, 100), digits).shape == (3, 3, size, size)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state["ema"]["gain"] == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name])


def test_the_generator_of_2021_draws_digits():
    args = parse("2021", "acgan")
    g, _ = p1.build(args)
    z = torch.randn(2, 100)
    assert g(z, torch.tensor([1, 2])).shape == (2, 3, 64, 64)
    one = p1.generate(g.eval(), args, z, [1, 2])
    other = p1.generate(g, args, z, [1, 3])
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_the_discriminator_of_2021_enlarges_digits():
    """Smoothly, and it leaves what G draws as it is."""
    _, d = p1.build(parse("2021", "acgan"))
    given = []
    d.main[0].register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    digits = torch.zeros(2, 3, 28, 28)
    digits[..., 14:] = 1.0
    real, logits = d(digits)
    assert real.shape == (2,) and logits.shape == (2, 10)
    assert given[0].shape == (2, 3, 64, 64) and given[0].mean().item() == pytest.approx(0.5)
    assert 2 < len(given[0].unique()) < 10  # between 0 and 1 as well
    drawn = torch.rand(2, 3, 64, 64)
    d(drawn)
    assert torch.equal(given[1], drawn)
