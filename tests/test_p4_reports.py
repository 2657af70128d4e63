"""The reports' domain adaptation (--report of p4_dann.py)."""

import json

import pytest
import torch

import common
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


def test_each_direction_has_its_network_and_epochs():
    """What the command line says counts more, also where it says what another direction has."""
    assert parse("2021", "mnistm-usps").epochs == 20 and parse("2021", "usps-svhn").epochs == 30
    for epochs in (3, 20):
        assert parse("2021", "usps-svhn", "--epochs", str(epochs)).epochs == epochs
    table = p4.parse_args(["--mode", "table", "--report", "2021"])
    assert table.scenarios == ["mnistm-usps", "svhn-mnistm", "usps-svhn"]
    assert table.methods == ["source", "dann", "target"]
    options = ([], ["--arch", "tiny-b"], ["--no-dropout2d"])
    names = [parse("2021", "usps-svhn", *more).name for more in options]
    assert names[0] == "p4_dann_usps_svhn_2021-tiny_0" and len(set(names)) == 3


def test_epochs_are_steps():
    """The last batch of an epoch may be smaller than the others in the reports; here it counts as one."""
    args = parse("2023", "mnistm-svhn")
    assert args.steps is None and p4.settings_of(args, torch.empty(44800, 0))["steps"] == 100 * 44


def test_refusals():
    assert "choose from '2021', '2022a'" in message("--report", "2024")
    assert "it has ['source', 'dann', 'target']" in message("--report", "2022a", "--method", "dann-mt")
    assert "expected ['paper']" in message("--report", "2023", "--arch", "deep")
    assert "expected ['deep', 'small', 'paper']" in message("--arch", "large")
    assert "only report 2021" in message("--no-dropout2d")
    for epochs in ("3", "100"):  # the second is the report's own
        assert "expected one of them" in message("--report", "2023", "--steps", "2", "--epochs", epochs)
    assert "expected one of them" in message("--steps", "2000", "--epochs", "3")


def test_without_dropout2d():
    """The ablation of 2021 differs from its small network by the Dropout2d alone."""
    kinds = [
        [type(module) for module in p4.build(parse("2021", "usps-svhn", *more)).modules()]
        for more in ([], ["--no-dropout2d"])
    ]
    assert kinds[0].count(torch.nn.Dropout2d) == 1 and torch.nn.Dropout2d not in kinds[1]
    assert len(kinds[0]) == len(kinds[1]) + 1
    assert kinds[0] == [type(module) for module in p4.Net("tiny", report=True).modules()]


@pytest.mark.parametrize("report, direction, arch, parameters", SYSTEMS)
def test_train_and_predict(report, direction, arch, parameters, tmp_path):
    """The network of the last step itself predicts, and the checkpoint alone says what it is."""
    images, labels = digits()
    path = str(tmp_path / "a.pt")
    args = parse(report, direction, "--steps", "1", "--batch-size", "4", "--ckpt", path)
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
    tsne = ["--mode", "tsne", "--ckpt", paths[0], "--num", "20"]
    p4.main([*tsne, "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "tsne_usps_svhn_dann_domain.png").is_file()


def test_table_of_a_report(tmp_path, monkeypatch):
    """It trains the report's networks under names of their own."""
    monkeypatch.setattr(common, "load_digits", lambda *_: digits(20))
    options = ["--report", "2022a", "--ckpt", str(tmp_path), "--steps", "1", "--batch-size", "4"]
    options += ["--scenarios", "usps-mnistm", "--seeds", "0", "1", "--methods", "dann"]
    p4.main(["--mode", "table", *options, "--out", str(tmp_path / "table")])
    cells = json.loads((tmp_path / "table" / "table.json").read_text())
    names = [run["ckpt"].split("/")[-1] for run in cells["dann"]["usps-mnistm"]]
    assert names == ["p4_dann_usps_mnistm_2022a-dann_0.pt", "p4_dann_usps_mnistm_2022a-dann_1.pt"]
