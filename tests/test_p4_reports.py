"""The reports' domain adaptation (--report of p4_dann.py)."""

import json
import math

import pytest
import torch

import p4_dann as p4

# report, direction, arch, parameters in all (large: of its features, for its heads are ours)
SYSTEMS = [
    ("2021", "mnistm-usps", "large", 6_274_560),
    ("2021", "usps-svhn", "tiny", 497_075),
    ("2022a", "mnistm-svhn", "dann", 205_891),
    ("2022b", "mnistm-usps", "small", 355_164),
    ("2022c", "mnistm-usps", "dann", 205_891),
    ("2023", "mnistm-svhn", "paper", 976_651),
]


def parse(report, direction, *argv):
    source, target = direction.split("-")
    options = ["--report", report, "--source", source, "--target", target, "--device", "cpu"]
    return p4.parse_args([*options, *argv])


def message(*argv):
    with pytest.raises(ValueError) as error:
        p4.parse_args(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def digits(n=8):
    return torch.randint(256, (n, 3, 28, 28), dtype=torch.uint8), torch.arange(n) % 10


@pytest.mark.parametrize("report, direction, arch, parameters", SYSTEMS)
def test_networks_are_exact(report, direction, arch, parameters):
    args = parse(report, direction)
    assert args.arch == arch and args.method == "dann"
    net = p4.build(args)
    counted = net.features if arch == "large" else net
    assert sum(parameter.numel() for parameter in counted.parameters()) == parameters
    assert net.eval()(torch.rand(2, 3, 28, 28)).shape == (2, 10)


def test_input_of_the_reports_is_rgb_as_it_is():
    """A report's network sees colour and contrast; ours sees neither."""
    x = torch.rand(4, 3, 28, 28)
    grey = x.mean(1, keepdim=True).expand_as(x)
    report = p4.build(parse("2022b", "mnistm-usps")).eval()
    ours = p4.build(p4.parse_args(["--target", "usps", "--device", "cpu"])).eval()
    with torch.no_grad():
        assert not torch.allclose(report.embed(x), report.embed(grey), atol=1e-3)
        assert torch.allclose(ours.embed(x), ours.embed(grey), atol=1e-3)


def test_presets():
    args = parse("2023", "mnistm-svhn")
    assert (args.optimizer, args.lr, args.batch_size, args.epochs, args.steps) == (
        "adam",
        3e-4,
        1024,
        100,
        None,
    )
    assert args.clip == math.inf and args.weight_decay == 0 and args.betas == [0.9, 0.999]
    assert p4.steps_of(args, torch.empty(44800, 0)) == 4400
    assert parse("2021", "mnistm-usps").epochs == 20 and parse("2021", "usps-svhn").epochs == 30
    for epochs in (3, 20):  # the second is the report's in its other directions
        assert parse("2021", "usps-svhn", "--epochs", str(epochs)).epochs == epochs
    assert parse("2022a", "mnistm-usps").optimizer == "radam"
    assert parse("2022c", "mnistm-usps").domain_weight == 2
    table = p4.parse_args(["--mode", "table", "--report", "2021"])
    assert table.scenarios == ["mnistm-usps", "svhn-mnistm", "usps-svhn"]
    assert table.methods == ["source", "dann", "target"]
    names = [
        parse("2021", "usps-svhn", *more).name for more in ([], ["--arch", "tiny-b"], ["--no-dropout2d"])
    ]
    assert names[0] == "p4_dann_usps_svhn_2021-tiny_0" and len(set(names)) == 3


def test_refusals():
    assert "expected one of 2021" in message("--report", "2024")
    assert "the reports have source dann target" in message("--report", "2022a", "--method", "dann-mt")
    assert "this report has paper" in message("--report", "2023", "--arch", "deep")
    assert "add --report" in message("--arch", "large")
    assert "only report 2021" in message("--no-dropout2d")
    for epochs in ("3", "100"):  # the second is the report's own
        assert "expected one of them" in message("--report", "2023", "--steps", "2", "--epochs", epochs)
    assert "expected one of them" in message("--steps", "2000", "--epochs", "3")


def test_rate_falls_at_thirds():
    args = parse("2022c", "mnistm-usps", "--lr", "1")
    rates = [p4.learning_rate(args, step, 1000) for step in (1, 331, 341, 661, 671, 1000)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert p4.learning_rate(parse("2022a", "mnistm-usps", "--lr", "1"), 900, 1000) == 1


def test_without_dropout2d():
    """The ablation of 2021 differs from its small network by the Dropout2d alone."""
    kinds = [
        [type(module) for module in p4.build(parse("2021", "usps-svhn", *more)).modules()]
        for more in ([], ["--no-dropout2d"])
    ]
    assert kinds[0].count(torch.nn.Dropout2d) == 1 and torch.nn.Dropout2d not in kinds[1]
    assert len(kinds[0]) == len(kinds[1]) + 1


def test_three_losses_in_one_sum():
    """2022c adds the domain losses of source and target; the others take their mean."""
    x, y = digits()
    losses = []
    for report in ("2022a", "2022c"):
        args = parse(report, "mnistm-usps")
        torch.manual_seed(0)
        net = p4.build(args)
        losses.append(p4.report_losses(args, net, None, x.float() / 255, y, x.float() / 255, 0.5)[1].item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


@pytest.mark.parametrize("report, direction, arch, parameters", SYSTEMS)
def test_train_and_predict(report, direction, arch, parameters, tmp_path):
    """Two steps; the network itself predicts, and the checkpoint alone says what it is."""
    images, labels = digits()
    path = str(tmp_path / "a.pt")
    args = parse(report, direction, "--steps", "2", "--batch-size", "4", "--ckpt", path)
    trained = p4.train(args, images, labels, images)
    state = torch.load(path, weights_only=True)
    for name, value in state["model"].items():
        assert torch.equal(value, state["ema"][name])
    model, settings = p4.load_model(path)
    assert (settings.report, settings.arch) == (report, arch)
    assert torch.equal(p4.predict([model], images), p4.predict([trained], images))


@pytest.mark.slow
def test_table_vote_and_tsne(tmp_path):
    """The table of a report goes on where it stopped; four similar networks vote."""
    options = ["--report", "2021", "--ckpt", str(tmp_path), "--steps", "2", "--batch-size", "4"]
    table = ["--mode", "table", *options, "--scenarios", "usps-svhn", "--seeds", "0"]
    for _ in range(2):
        p4.main([*table, "--out", str(tmp_path / "table")])
    cells = json.loads((tmp_path / "table" / "table.json").read_text())
    assert set(cells) == {"source", "dann", "target"}
    assert cells["dann"]["usps-svhn"][0]["ckpt"].endswith("p4_dann_usps_svhn_2021-tiny_0.pt")
    images, labels = digits()
    paths = [str(tmp_path / "p4_dann_usps_svhn_2021-tiny_0.pt")]
    for arch in ("tiny-b", "tiny-c", "tiny-d"):
        paths.append(str(tmp_path / f"{arch}.pt"))
        args = parse(
            "2021", "usps-svhn", "--arch", arch, "--steps", "2", "--batch-size", "4", "--ckpt", paths[-1]
        )
        p4.train(args, images, labels, images)
    votes = p4.predict([p4.load_model(path)[0] for path in paths], images)
    assert votes.shape == (8,)
    tsne = ["--mode", "tsne", "--report", "2021", "--ckpt", paths[0], "--num", "20"]
    p4.main([*tsne, "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "tsne_usps_svhn_dann_domain.png").is_file()


def test_table_of_a_report_names_its_rows(tmp_path):
    """The cells hold one accuracy for each seed."""
    options = ["--report", "2022a", "--ckpt", str(tmp_path), "--steps", "1", "--batch-size", "4"]
    options += ["--scenarios", "mnistm-usps", "--seeds", "0", "1", "--methods", "dann"]
    p4.main(["--mode", "table", *options, "--out", str(tmp_path / "table")])
    cells = json.loads((tmp_path / "table" / "table.json").read_text())
    assert [run["seed"] for run in cells["dann"]["mnistm-usps"]] == [0, 1]
