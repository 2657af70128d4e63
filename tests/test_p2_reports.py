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
    seen = []
    net = p2.ContextUnet(16).eval()
    net.context1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    net(torch.randn(2, 3, 28, 28), torch.tensor([200, 200]), torch.tensor([3, p2.NULL]))
    assert seen == [[[0, 0, 0, 1, 0, 0, 0, 0, 0, 0], [0] * 10]]
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
    """A preset sets what has no option too; an option overrides it; sampling uses all of it."""
    args = parse("--report", "2023")
    assert (args.epochs, args.steps, args.prediction, args.clip) == (25, None, "eps", math.inf)
    assert args.ckpt == "checkpoints/p2_diffusion_2023.pt"
    args = parse("--mode", "sample", "--report", "2023", "--guidance", "0.5")
    found = p2.sampling(args)
    assert (found["variance"], found["clamp"], found["guidance_interval"]) == ("beta", False, [0, 1])
    assert (found["sampler"], found["guidance"]) == ("ddpm", 0.5)
    assert parse("--report", "2022c", "--T", "500", "--epochs", "2").T == 500
    assert parse("--report", "2022a", "--epochs", "2").steps is None
    assert parse("--report", "2023", "--steps", "7").steps == 7


def test_contradictions():
    assert "2021" in message("--report", "2021")
    assert "--arch" in message("--report", "2023", "--arch", "unet")
    assert "--channels" in message("--report", "2022a", "--channels", "32", "64")
    assert "--width" in message("--report", "2022c", "--width", "64")
    assert "--patch" in message("--arch", "context", "--patch", "1")
    assert "no null class" in message("--report", "2022a", "--label-dropout", "0.1")
    assert "expected one of them" in message("--report", "2022b", "--steps", "3", "--epochs=2")
