"""p4_dann.py: gradient reversal, BatchNorm per domain, exact resume, the graders' rules, one-file use, bad input."""
import copy
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import common
import p4_dann as p4
from conftest import ROOT, Hostile

TINY = ["--arch", "small", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A small network after four steps towards SVHN."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    p4.main(["--mode", "train", "--target", "svhn", "--steps", "4", "--ckpt", str(path), *TINY])
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten built-in house numbers as digits/svhn/test/NNNNN.png."""
    path = tmp_path / "digits" / "svhn" / "test"
    path.mkdir(parents=True)
    for i, image in enumerate(common.load_digits(None, "svhn", "val")[0][:10]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:05d}.png")
    return path


def load(path):
    return p4.load_model(path, p4.parse_args(["--device", "cpu", "--mode", "predict", "--ckpt", str(path), "--input", "x"]))[0]


def rows(path):
    with open(path, newline="") as f:
        return list(csv.reader(f))


def predicted(ckpt, folder, out, *options):
    p4.main(["--mode", "predict", "--input", str(folder), "--out", str(out), "--ckpt", *map(str, np.atleast_1d(ckpt)), "--device", "cpu", *options])
    return rows(out)


# ------------------------------------------------------------------ losses and schedules

def test_gradient_reversal_against_autograd_by_hand():
    x, w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    y = p4.ReverseGradient.apply(x, 0.7)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y @ w).sin().sum(), x)
    (plain,) = torch.autograd.grad((x @ w).sin().sum(), x)
    assert torch.allclose(gradient, -0.7 * plain, atol=1e-15) and torch.allclose(plain, (x @ w).cos()[:, None] * w, atol=1e-12)


@pytest.mark.parametrize("arch", ["deep", "small", "paper"])
def test_domain_loss_trains_the_head_and_reverses_the_features(arch):
    net = p4.Net(arch).eval()
    width = next(m for m in net.domain.modules() if isinstance(m, nn.Linear)).in_features
    source, target = torch.randn(6, width, requires_grad=True), torch.randn(4, width, requires_grad=True)

    def gradients(lambda_):
        loss = p4.domain_loss(net, source, target, lambda_)
        return loss, torch.autograd.grad(loss, [source, target, *net.domain.parameters()])

    (loss, one), (_, half), (_, none) = gradients(1.0), gradients(0.5), gradients(0.0)
    assert loss.item() == pytest.approx(math.log(2), abs=0.5)
    for a, b, c in zip(one[:2], half[:2], none[:2]):
        assert torch.allclose(b, a / 2) and not c.any() and a.any()
    for a, b in zip(one[2:], none[2:]):
        assert torch.equal(a, b) and a.any()  # the head itself learns at full rate, whatever lambda
    with torch.no_grad():  # a step of the features along their (reversed) gradient makes the domains harder to tell apart
        closer = p4.domain_loss(net, source - 0.5 * one[0], target - 0.5 * one[1], 1.0)
    assert closer > loss


def test_schedules():
    assert p4.schedules(0) == (0, 1)
    lambda_, rate = p4.schedules(1)
    assert lambda_ == pytest.approx(0.9999092, abs=1e-7) and rate == pytest.approx(11 ** -0.75)
    assert p4.schedules(0.5)[0] == pytest.approx(math.tanh(2.5))  # 2 / (1 + e^-10p) - 1 = tanh(5p)


def test_consistency_counts_sure_images_only():
    teacher = torch.tensor([[5.0] + [0.0] * 9, [0.0, 9.0] + [0.0] * 8, [1.0] + [0.0] * 9]).softmax(1)
    student = torch.randn(3, 10)
    loss, sure = p4.consistency_loss(student, teacher, 0.9)
    assert (teacher.amax(1) > 0.9).tolist() == [True, True, False] and sure.item() == pytest.approx(2 / 3)
    expected = -(student.log_softmax(1)[0, 0] + student.log_softmax(1)[1, 1]) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_distribution_alignment():
    p = torch.tensor([[0.5, 0.4] + [0.1 / 8] * 8, [0.1] * 10])
    marginal = torch.tensor([0.4, 0.1] + [0.5 / 8] * 8)
    assert torch.allclose(p4.align(p, marginal, 0.0), p) and torch.allclose(p4.align(p, torch.full((10,), 0.1), 0.5), p)
    aligned = p4.align(p, marginal, 0.5)
    assert torch.allclose(aligned.sum(1), torch.ones(2)) and aligned[0].argmax() == 1  # the rarer digit wins
    assert (aligned[0, 0] / aligned[0, 1]).item() == pytest.approx(0.5 / 0.4 * (0.1 / 0.4) ** 0.5, rel=1e-5)
    assert p4.align(p, torch.eye(10)[0], 0.5).isfinite().all()


def test_parameter_counts():
    counts = {arch: sum(p.numel() for p in p4.Net(arch).parameters()) for arch in ("small", "paper", "deep")}
    assert counts["small"] == 355_164 and counts["paper"] == 976_651 and f"{counts['deep']:,}" in p4.Net.__doc__


def test_network_ignores_brightness_and_contrast():
    net, x = p4.Net("small").eval(), torch.rand(4, 3, 28, 28)
    with torch.inference_mode():
        assert torch.allclose(net(10 * x), net(20 * x + 7), atol=0.02)


def test_augmentation():
    torch.manual_seed(0)
    x = torch.rand(200, 3, 28, 28) * 1.6 - 0.8
    y = p4.augment(x, 1.0)
    assert y.shape == x.shape and torch.equal(y[:, 0], y[:, 2]) and not torch.equal(y, p4.augment(x, 1.0))
    grey = x[:, :1].expand_as(x)
    assert ((p4.augment(grey, 0.0).abs() - grey.abs()).abs() < 1e-4).all()  # strength 0: the image itself or its negative
    flat = torch.full((400, 3, 28, 28), 0.5)
    assert 0.4 < (p4.augment(flat, 1.0).mean((1, 2, 3)) < 0).float().mean() < 0.6  # half of the images as negatives
    hidden = (p4.cutout(x) != x).any(1).float().mean((1, 2))
    assert 0 < hidden.max() <= (11 / 28) ** 2 and hidden.std() > 0


@pytest.mark.parametrize("method", ["dann", "dann-mt"])
def test_batchnorm_statistics_are_not_mixed(method):
    """Each pass holds one domain alone, and the EMA network, which predicts, sees the target only."""
    args = p4.parse_args(["--method", method, "--target", "svhn", *TINY])
    model, x, y = p4.build(args), torch.rand(8, 3, 28, 28), torch.arange(8)
    targets, start = [-torch.rand(8, 3, 28, 28) ** k for k in (1, 4)], copy.deepcopy(model.state_dict())

    def statistics(x, u):
        torch.manual_seed(1)
        ema = p4.build(args)
        ema.load_state_dict(start)
        p4.teaching(ema)
        p4.losses(args, model, ema, x, y, u, 0.5)
        return torch.cat([b.flatten().float() for name, b in ema.named_buffers() if "running" in name])

    one = statistics(x, targets[0])
    assert torch.equal(one, statistics(x ** 3, targets[0])) and not torch.allclose(one, statistics(x, targets[1]))
    sizes = []
    hook = model.features.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    p4.losses(args, model, p4.build(args), x, y, targets[0][:5], 0.5)
    hook.remove()
    assert sizes == [8, 5]


# ------------------------------------------------------------------ training

@pytest.fixture
def all_pseudo_labels_count(monkeypatch):
    """From the first step, however unsure the teacher: a few steps of training would have none."""
    monkeypatch.setattr(p4, "THRESHOLD", 0.0)
    monkeypatch.setattr(p4, "START", -1.0)


@pytest.mark.parametrize("method", ["source", "dann", "source-aug", "dann-mt", "target"])
@pytest.mark.usefixtures("all_pseudo_labels_count")
def test_resume_is_bit_equal(method, tmp_path, monkeypatch):
    """Six steps at once, and Ctrl-C after three with --resume: every tensor and the random state agree."""
    options = ["--mode", "train", "--target", "svhn", "--method", method, "--steps", "6", *TINY]
    p4.main([*options, "--ckpt", str(tmp_path / "whole.pt")])
    original = p4.update_ema

    def interrupted(ema, model, step, **more):
        original(ema, model, step, **more)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(p4, "update_ema", interrupted)
        p4.main([*options, "--ckpt", str(tmp_path / "parts.pt")])
    assert stop.value.code == 130
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 3
    p4.main([*options, "--ckpt", str(tmp_path / "parts.pt"), "--resume"])
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    assert all((row[3] == 1) == (method == "dann-mt") for row in a["log"])  # pseudo-labels took part
    assert a["step"] == b["step"] == 6 and torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    for part in ("model", "ema"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    for i, state in a["optim"]["state"].items():
        assert all(torch.equal(v, b["optim"]["state"][i][k]) for k, v in state.items())
    assert any(not torch.equal(v, a["ema"][k]) for k, v in a["model"].items())


def test_adaptation_beats_source_only_on_the_built_in_digits(tmp_path):
    images, labels = common.load_digits(None, "svhn", "val")
    accuracy = {}
    for method in ("source", "dann-mt"):
        path = str(tmp_path / f"{method}.pt")
        p4.main(["--mode", "train", "--target", "svhn", "--method", method, "--fast", "--ckpt", path, "--device", "cpu"])
        accuracy[method] = p4.accuracy(load(path), images, labels)
    assert accuracy["dann-mt"] > accuracy["source"] + 0.03 > 0.33


@pytest.mark.usefixtures("all_pseudo_labels_count")
def test_target_labels_are_not_used(tmp_path, monkeypatch):
    """Shuffled target labels give the same networks."""
    original = common.load_digits

    def shuffled(root, domain, split):
        images, labels = original(root, domain, split)
        return images, labels if domain == "mnistm" else labels.flip(0)

    states = []
    for load in (original, shuffled):
        monkeypatch.setattr(common, "load_digits", load)
        for method in ("dann", "dann-mt"):
            path = tmp_path / f"{load.__name__}_{method}.pt"
            p4.main(["--mode", "train", "--target", "svhn", "--method", method, "--steps", "2", "--ckpt", str(path), *TINY])
            states.append(torch.load(path, weights_only=True)["ema"])
    for a, b in (states[0::2], states[1::2]):
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_existing_checkpoint_is_not_overwritten(ckpt, error):
    before = ckpt.read_bytes()
    arguments = ["--mode", "train", "--target", "svhn", "--ckpt", str(ckpt), "--steps", "4", *TINY]
    assert "--resume" in error(p4.main, arguments)
    assert "lr 0.5 (checkpoint: 0.001)" in error(p4.main, [*arguments, "--resume", "--lr", "0.5"])
    assert "unlabelled usps (checkpoint: svhn)" in error(p4.main, [*arguments, "--resume", "--target", "usps"])
    assert ckpt.read_bytes() == before


def test_nan_stops_the_run_and_keeps_the_checkpoint(ckpt, tmp_path, capsys):
    path = tmp_path / "nan.pt"
    state = torch.load(ckpt, weights_only=True)
    state["model"]["features.0.0.weight"][0] = math.nan
    state["step"] = 2
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        p4.main(["--mode", "train", "--target", "svhn", "--resume", "--steps", "4", "--ckpt", str(path), *TINY])
    assert stop.value.code == 1 and "loss is nan" in capsys.readouterr().err and path.read_bytes() == before


def test_oracle_is_marked_as_a_leak(tmp_path, capsys):
    arguments = ["--mode", "train", "--target", "usps", "--steps", "3", *TINY]
    p4.main([*arguments, "--ckpt", str(tmp_path / "a.pt"), "--oracle"])
    assert re.search(r"oracle, a LEAK of target labels: [\d.]+ % at step \d", capsys.readouterr().out)
    p4.main([*arguments, "--ckpt", str(tmp_path / "b.pt")])
    out = capsys.readouterr().out
    assert "LEAK" not in out and re.search(r"usps val accuracy [\d.]+ %", out)
    a, b = (torch.load(tmp_path / name, weights_only=True)["ema"] for name in ("a.pt", "b.pt"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())  # looking does not change the training


# ------------------------------------------------------------------ predict and eval

def test_predictions_follow_the_graders_format(ckpt, folder, tmp_path):
    table = predicted(ckpt, folder, tmp_path / "sub dir" / "pred.csv")
    assert table[0] == ["image_name", "label"] and [name for name, _ in table[1:]] == sorted(os.listdir(folder))
    assert all(label in list("0123456789") for _, label in table[1:])
    assert b"\r" not in (tmp_path / "sub dir" / "pred.csv").read_bytes() and os.listdir(tmp_path / "sub dir") == ["pred.csv"]


def test_prediction_does_not_depend_on_batch_or_order(ckpt):
    model = load(ckpt)
    images = common.load_digits(None, "svhn", "val")[0][:1100]
    whole, order = p4.predict([model], images), torch.randperm(1100)
    assert torch.equal(p4.predict([model], images[order]), whole[order])
    assert torch.equal(torch.cat([p4.predict([model], b) for b in images[:120].split(7)]), whole[:120])


def test_vote():
    class Fixed(nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, x):
            return self.logits.expand(len(x), 10)

    def sure(digit, logit):
        return Fixed(*(logit if d == digit else 0.0 for d in range(10)))

    images = torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    assert p4.predict([sure(2, 1.0), sure(2, 1.0), sure(7, 9.0)], images).tolist() == [2, 2, 2]  # two votes beat one sure network
    assert p4.predict([sure(2, 1.0), sure(7, 9.0)], images).tolist() == [7, 7, 7]  # a tie goes to the higher mean probability


def test_vote_of_checkpoints(ckpt, folder, tmp_path):
    other = tmp_path / "other.pt"
    p4.main(["--mode", "train", "--target", "svhn", "--steps", "1", "--seed", "5", "--ckpt", str(other), *TINY])
    one, two = (predicted(path, folder, tmp_path / "one.csv") for path in (ckpt, other))
    assert one != two and predicted([ckpt, other, other], folder, tmp_path / "three.csv") == two


@pytest.mark.parametrize("path, domain", [("/x/digits", None), ("/x/digits/svhn/test", "svhn"), ("/mnistm/usps", "usps"), ("/a/USPS/data/svhn_test", "svhn"), ("/d/mnist-m/val", "mnistm"), ("/usps/mnistm_svhn/a", "usps")])
def test_domain_of_path(path, domain):
    assert p4.domain_of(path) == domain


def test_any_image(ckpt, folder, tmp_path, capsys):
    """Sizes, grey, palette, RGBA, 16 bits: the same picture gives the same digits; other files are skipped with a warning."""
    digit = Image.open(folder / "00003.png").convert("L")
    mixed = tmp_path / "svhn"
    mixed.mkdir()
    digit.save(mixed / "a.png")
    digit.convert("RGB").save(mixed / "b.png")
    digit.convert("RGBA").save(mixed / "c.png")
    digit.convert("P").save(mixed / "d.png")
    Image.fromarray(np.asarray(digit).astype(np.uint16) * 257).save(mixed / "e.png")
    digit.convert("LA").save(mixed / "e2.png")
    digit.convert("CMYK").save(mixed / "e3.tif")
    digit.point(lambda v: 255 * (v > 127)).convert("1").save(mixed / "e4.png")
    digit.resize((56, 56), Image.Resampling.NEAREST).save(mixed / "f.bmp")
    ink = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (10, 4, 18, 24))
    ink.save(mixed / "g.png")
    (mixed / "notes.txt").write_text("mine")
    (mixed / "damaged.png").write_bytes((mixed / "b.png").read_bytes()[:100])
    (mixed / "more").mkdir()
    names, images = p4.read_images(mixed)
    assert names == ["a.png", "b.png", "c.png", "d.png", "e.png", "e2.png", "e3.tif", "e4.png", "f.bmp", "g.png"] and images.shape == (10, 3, 28, 28)
    assert all((image.int() - images[0].int()).abs().max() <= 1 for image in images[1:7])
    assert set(images[7].unique().tolist()) == {0, 255} == set(images[9].unique().tolist())  # g: black ink on nothing is laid on white
    err = capsys.readouterr().err
    assert err.count("skipped") == 3 and all(name in err for name in ("notes.txt", "damaged.png", "more"))
    assert len(predicted(ckpt, mixed, tmp_path / "pred.csv")) == 11
    assert all(np.array_equal(common.read_image(mixed / name), image.permute(1, 2, 0).numpy()) for name, image in zip(names, images) if name != "f.bmp")  # training reads them alike


def test_warns_of_another_target(ckpt, folder, tmp_path, capsys):
    predicted(ckpt, folder, tmp_path / "a.csv")
    assert capsys.readouterr().err == ""
    predicted(ckpt, folder, tmp_path / "b.csv", "--target", "usps")
    assert "was adapted to svhn, the images are of usps" in capsys.readouterr().err


def test_the_file_copied_alone_predicts(ckpt, folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "p4_dann.py", alone)
    shutil.copy(ckpt, alone / "model.pt")
    code = "import sys; sys.modules['tqdm'] = sys.modules['matplotlib'] = sys.modules['sklearn'] = sys.modules['scipy'] = None; import p4_dann; p4_dann.main()"
    result = subprocess.run([sys.executable, "-c", code, "--mode", "predict", "--ckpt", "model.pt", "--input", str(folder), "--out", "pred.csv"],
                            cwd=alone, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert rows(alone / "pred.csv") == predicted(ckpt, folder, tmp_path / "pred.csv")


def write(path, text):
    path.write_text(text)
    return str(path)


def test_eval_follows_the_2021_grader(tmp_path, capsys, error):
    """Names and labels are text, the count runs over the predicted rows, the last of two rows counts."""
    gt = write(tmp_path / "gt.csv", "image_name,label\n00000.png,7\n00001.png,3\n00002.png,5\n00003.png,1\n")

    def score(text):
        p4.main(["--mode", "eval", "--input", write(tmp_path / "pred.csv", text), "--gt", gt])
        captured = capsys.readouterr()
        return captured.out.strip(), captured.err

    assert score("image_name,label\n00003.png,1\n00000.png,7\n00001.png,3\n00002.png,4\n") == ("Accuracy: 3/4 (75.00%)", "")
    out, err = score("image_name,label\n00000.png,7\n00001.png,3.0\n00002.png, 5\n")
    assert out == "Accuracy: 1/3 (33.33%)" and "1 of 4 images have no prediction" in err
    out, err = score("image_name,label\n00000.png,1\n00000.png,7\n")
    assert out == "Accuracy: 1/1 (100.00%)" and "occur twice" in err
    bad = write(tmp_path / "bad.csv", "image_name,label\n9.png,7\n")
    message = error(p4.main, ["--mode", "eval", "--input", bad, "--gt", gt])
    assert message == 'error: Item mismatch: "9.png" does not exist in the provided ground truth file.'
    assert "expected image_name,label" in error(p4.main, ["--mode", "eval", "--input", write(tmp_path / "h.csv", "name,label\na,1\n"), "--gt", gt])
    assert "found a row '00001.png'" in error(p4.main, ["--mode", "eval", "--input", write(tmp_path / "s.csv", "image_name,label\n00000.png,7\n00001.png\n"), "--gt", gt])
    assert "no predictions" in error(p4.main, ["--mode", "eval", "--input", write(tmp_path / "e.csv", "image_name,label\n"), "--gt", gt])
    assert "needs --gt" in error(p4.main, ["--mode", "eval", "--input", bad])
    assert "cannot be read" in error(p4.main, ["--mode", "eval", "--input", str(tmp_path / "none.csv"), "--gt", gt])


# ------------------------------------------------------------------ table and t-SNE

def test_table(tmp_path, capsys, monkeypatch):
    original = common.load_digits
    monkeypatch.setattr(common, "load_digits", lambda root, domain, split: tuple(v[:300] for v in original(root, domain, split)))
    arguments = ["--mode", "table", "--scenarios", "mnistm-usps", "svhn-usps", "--seeds", "0", "1", "--steps", "2", "--ckpt", str(tmp_path / "nets"), "--out", str(tmp_path / "table"), *TINY]
    p4.main([*arguments, "--methods", "source", "target"])
    assert sorted(p.name for p in (tmp_path / "nets").glob("*.pt")) == [f"p4_plain_{d}_small_{s}.pt" for d in ("mnistm", "svhn", "usps") for s in (0, 1)]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "nets").glob("*.pt")}
    capsys.readouterr()
    p4.main(arguments)
    text = capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == t for path, t in times.items())  # what is there is not trained again
    assert re.search(r"\| Trained on source \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|", text) and text.count("Adaptation") >= 2 and text.count("Trained") >= 3
    assert (tmp_path / "table" / "table.md").read_text(encoding="utf-8").strip() in text
    results = json.loads((tmp_path / "table" / "table.json").read_text())
    assert list(results) == list(p4.METHODS) and [run["seed"] for run in results["dann"]["svhn-usps"]] == [0, 1]
    assert results["target"]["mnistm-usps"] == results["target"]["svhn-usps"]
    assert "mnistm → usps (300)" in text


def test_table_refuses_networks_of_other_settings_or_data_before_it_trains(tmp_path, error, monkeypatch):
    arguments = ["--mode", "table", "--scenarios", "mnistm-usps", "--seeds", "0", "--ckpt", str(tmp_path / "nets"), "--out", str(tmp_path / "table"), *TINY]
    p4.main([*arguments, "--steps", "2", "--methods", "dann-mt"])
    assert "steps 3 (checkpoint: 2)" in error(p4.main, [*arguments, "--steps", "3"])
    original = common.load_digits
    monkeypatch.setattr(common, "load_digits", lambda root, domain, split: tuple(v[1:] for v in original(root, domain, split)))
    assert "images [[" in error(p4.main, [*arguments, "--steps", "2"])
    assert [p.name for p in (tmp_path / "nets").glob("*.pt")] == ["p4_dann-mt_mnistm_usps_small_0.pt"]


def test_tsne(ckpt, tmp_path, capsys):
    p4.main(["--mode", "tsne", "--target", "svhn", "--ckpt", str(ckpt), "--out", str(tmp_path), "--num", "40", "--device", "cpu"])
    assert sorted(os.listdir(tmp_path)) == ["network_dann-mt.txt", "tsne_mnistm_svhn_dann-mt_digit.png", "tsne_mnistm_svhn_dann-mt_domain.png"]
    for name in sorted(os.listdir(tmp_path))[1:]:
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        plot = pixels[100:-100, 100:700]
        coloured = np.ptp(plot, axis=2) > 40
        assert coloured.mean() > 0.002 and len(np.unique(plot[coloured] // 32, axis=0)) >= (2 if "domain" in name else 8)
    assert re.search(r"proxy A-distance \d\.\d", capsys.readouterr().out)


def test_a_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400, 5))
    assert p4.a_distance(a, b) < 0.3 and p4.a_distance(a, b + 5) > 1.95


# ------------------------------------------------------------------ command line and bad input

def test_readme():
    """Every p4 command is accepted and no figure is left out."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:python3?|OMP_NUM_THREADS=1 python) p4_dann.py (--mode .*?)(?:  +#.*| &)?$", text, re.M)
    for command in commands:
        p4.parse_args(command.split())
    assert len(commands) >= 5 and not re.search("@[A-Z]+@", text + p4.__doc__ + p4.Net.__doc__)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        p4.main(["-h"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--oracle" in text and "1505.07818" in text
    options = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(options) >= 20 and text.count("(default:") >= len(options) - 4


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--lr", "-1"], ["--mode", "fly"], ["--target", "mnist"], ["--method", "adda"], ["--source", "usps", "--target", "usps"],
                                       ["--scenarios", "usps-usps"], ["--seeds", "-1"], ["--device", "mps"], ["--num", "1"], ["--batch-size", "1"], ["--ckpt", "a", "b"], ["--archs", "x"]])
def test_wrong_options(arguments, error):
    assert arguments[0] in error(p4.main, arguments)


def test_bad_checkpoints(ckpt, folder, tmp_path, error):
    def message(path):
        return error(p4.main, ["--mode", "predict", "--ckpt", str(path), "--input", str(folder), "--out", str(tmp_path / "pred.csv")])

    assert "--mode train" in message(tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes(ckpt.read_bytes()[:-1000])
    assert "truncated" in message(tmp_path / "short.pt")
    torch.save({"script": "p1_gan", "args": {}}, tmp_path / "p1.pt")
    assert "found p1_gan" in message(tmp_path / "p1.pt")
    torch.save(Hostile(tmp_path / "executed"), tmp_path / "hostile.pt")
    assert "not a readable checkpoint" in message(tmp_path / "hostile.pt")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "pred.csv").exists()


def test_bad_folders(ckpt, folder, tmp_path, error, capsys):
    def message(path, *more):
        return error(p4.main, ["--mode", "predict", "--ckpt", str(ckpt), "--input", str(path), *more])

    empty = tmp_path / "usps"
    empty.mkdir()
    assert "no images" in message(empty)
    assert "no such folder" in message(tmp_path / "svhn_none")
    assert "pass --target" in error(p4.main, ["--mode", "predict", "--input", str(folder.parent.parent)])
    predicted(ckpt, shutil.copytree(folder, tmp_path / "pictures"), tmp_path / "pred.csv")  # a named checkpoint needs no named domain
    assert "needs --input" in error(p4.main, ["--mode", "predict"])
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in message(folder, "--out", str(tmp_path / "file" / "pred.csv"))
    assert "looked for" in error(p4.main, ["--mode", "train", "--data", str(tmp_path / "digits"), "--ckpt", str(tmp_path / "new.pt")])
    assert not (tmp_path / "new.pt").exists()
