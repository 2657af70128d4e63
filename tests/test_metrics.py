"""FID, KID and IS in common.py: against analytic answers and against pytorch-fid with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import common


def message(call, *arguments):
    """The text of the ValueError or OSError that the call must raise."""
    with pytest.raises((ValueError, OSError)) as e:
        call(*arguments)
    return str(e.value)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Seeded random weights of pytorch-fid's network, scaled so that the features do not vanish."""
    torch.manual_seed(3)
    net = common.inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_7c = common.MaxPoolE(2048)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """8 and 10 built-in faces as PNG; some of the first folder's as grey, half-transparent, JPEG, 16 bits."""
    root = tmp_path_factory.mktemp("faces")
    for name, faces in (
        ("a", common.load_faces(None, "val")[:8]),
        ("b", common.load_faces(None, "train")[:10]),
    ):
        (root / name).mkdir()
        pictures = [Image.fromarray(face.permute(1, 2, 0).numpy()) for face in faces]
        for i, picture in enumerate(pictures):
            picture.save(root / name / f"{i:04d}.png")
    pictures = [Image.open(root / "a" / f"{i:04d}.png") for i in range(4)]
    pictures[0].convert("L").save(root / "a" / "0000.png")
    pictures[1].putalpha(128)
    pictures[1].save(root / "a" / "0001.png")
    pictures[2].save(root / "a" / "0002.jpg")
    (root / "a" / "0002.png").unlink()
    grey16 = np.asarray(pictures[3].convert("L")).astype(np.uint16) * 3
    Image.fromarray(grey16).save(root / "a" / "0003.png")
    return root / "a", root / "b"


def gaussian(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_frechet_distance_of_two_gaussians():
    """Shift and scale of known size: |m|^2 + d (s - 1)^2, from exactly whitened samples."""
    x = gaussian(500)
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    assert common.frechet_distance(3 * x + 0.5, np.zeros(16), np.eye(16)) == pytest.approx(
        16 * 0.25 + 16 * 4, rel=1e-9
    )
    s1, s2 = (np.cov(gaussian(40, seed=i) @ np.diag(np.linspace(0.5, 2, 16)), rowvar=False) for i in (1, 2))
    w, v = np.linalg.eigh(s1)
    half = v @ np.diag(np.sqrt(w)) @ v.T
    expected = np.trace(s1) + np.trace(s2) - 2 * np.sqrt(np.linalg.eigvalsh(half @ s2 @ half)).sum()
    y = x @ np.linalg.cholesky(s1).T
    assert common.frechet_distance(y, y.mean(0), s2) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("n", [10, 15, 16, 17, 200])
def test_frechet_distance_of_a_set_to_itself_is_zero(n):
    """Also with fewer samples than dimensions, where the covariance is singular."""
    x = gaussian(n)
    assert abs(common.frechet_distance(x, x.mean(0), np.cov(x, rowvar=False))) < 1e-6


def test_kid_by_hand():
    """Features of one number: the kernel is (xy + 1)^3; no image is paired with itself."""
    x = np.array([[0.0], [1.0], [2.0]])
    y = np.array([[1.0], [-1.0]])
    own_x = (1 + 1 + 27) / 3  # 0*1, 0*2, 1*2
    own_y = 0  # 1*-1
    between = (1 + 1 + 8 + 0 + 27 - 1) / 6  # 0*1, 0*-1, 1*1, 1*-1, 2*1, 2*-1
    assert common.kernel_distance(x, y) == pytest.approx(own_x + own_y - 2 * between)
    z = np.array([[0.0, 0.0], [2.0, 4.0]])  # of two numbers: (xy / 2 + 1)^3
    assert common.kernel_distance(z, z) == pytest.approx(1 + 1 - 2 * (1 + 1 + 1 + 11**3) / 4)


def test_inception_score_bounds():
    assert common.inception_score(np.full((100, 10), 0.1)) == pytest.approx((1, 0))
    one_hot = np.eye(10)[np.arange(1000) % 10]
    assert common.inception_score(one_hot) == pytest.approx((10, 0))
    p = np.random.default_rng(0).dirichlet(np.ones(10), 1000)
    mean, spread = common.inception_score(p)
    parts = [
        np.exp(np.mean([np.sum(q * np.log(q / part.mean(0))) for q in part]))
        for part in p.reshape(10, 100, 10)
    ]  # the course's IS.py, written out
    assert (mean, spread) == pytest.approx((np.mean(parts), np.std(parts)))


@pytest.mark.slow
def test_features_against_pytorch_fid(weights, folders, tmp_path, monkeypatch, capsys):
    """The same number as pytorch-fid from the same weights and files, and from its .npz."""
    fid_inception = pytest.importorskip("pytorch_fid.inception")
    import pytorch_fid.fid_score as theirs

    def load_weights(*_, **__):
        return torch.load(weights, weights_only=True)

    monkeypatch.setattr(fid_inception, "load_state_dict_from_url", load_weights)
    model = fid_inception.InceptionV3([3])
    a, b = (sorted(map(str, folder.iterdir())) for folder in folders)
    mu_a, sigma_a = theirs.calculate_activation_statistics(a, model, 10, 2048, "cpu", 0)
    mu_b, sigma_b = theirs.calculate_activation_statistics(b, model, 10, 2048, "cpu", 0)
    net, name = common.load_inception(weights, "cpu")
    assert name.startswith("Frechet distance with random.pth")
    features, _ = common.inception_features(net, common.read_images([Path(f) for f in a]), batch=3)
    assert np.allclose(features.mean(0), mu_a, rtol=1e-3, atol=1e-4 * np.abs(mu_a).max())
    w, v = np.linalg.eigh(sigma_a)
    half = v @ np.diag(np.sqrt(w.clip(0))) @ v.T
    root = np.sqrt(np.linalg.eigvalsh(half @ sigma_b @ half).clip(0)).sum()
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * root
    np.savez(tmp_path / "b.npz", mu=mu_b, sigma=sigma_b, name=name)
    for reference, n in ((folders[1], "10"), (tmp_path / "b.npz", "unknown")):
        capsys.readouterr()
        result = common.score_images(folders[0], reference, weights, "cpu")
        assert result["distance"] == pytest.approx(expected, rel=1e-3)
        first = capsys.readouterr().out.splitlines()[0]
        assert first == f"{name} {result['distance']:.3f} (8 generated, {n} reference images)"
    foreign = tmp_path / "foreign.npz"  # as pytorch-fid writes it: of the published network
    np.savez(foreign, mu=mu_b, sigma=sigma_b)
    assert "statistics of 'FID'" in message(common.score_images, folders[0], foreign, weights, "cpu")


def test_statistics_of_another_network_are_refused(tmp_path):
    """A foreign .npz counts as the published network's."""
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert common.reference_statistics(tmp_path / "foreign.npz", None, "FID")["n"] == "unknown"
    text = message(common.reference_statistics, tmp_path / "foreign.npz", None, "fd_random")
    assert "'FID'" in text and "'fd_random'" in text and "--inception" in text


@pytest.mark.slow
def test_identical_folders_and_the_cache(weights, folders):
    net, name = common.load_inception(weights, "cpu")
    stats = common.reference_statistics(folders[1], net, name)
    distance = common.frechet_distance(stats["features"], stats["mu"], stats["sigma"])
    assert abs(distance) < 1e-6 * np.trace(stats["sigma"])
    again = common.reference_statistics(folders[1], None, name)  # without a network: from the cache
    assert np.array_equal(again["mu"], stats["mu"])


@pytest.mark.slow
def test_command_line_without_weights_says_that_it_is_no_fid(folders, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(SystemExit) as stop:
        common.main(["fid", str(folders[0]), str(folders[1])])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and "no FID" in err and "no network" in err
    assert out.startswith("fd_random ") and "(8 generated, 10 reference images)" in out.splitlines()[0]
    assert "\nFID" not in out and "KID" in out and "(8 splits" in out
    assert "5 against 5 other reference images" in out


def test_bad_input(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "a.png")
    assert "found 1 image" in message(common.score_images, tmp_path / "one", tmp_path, None, "cpu")
    assert "no such folder" in message(common.score_images, tmp_path / "one" / "a.png", tmp_path, None, "cpu")
    np.savez(tmp_path / "bad.npz", mean=np.zeros(3))
    assert "'mean': (3,)" in message(common.reference_statistics, tmp_path / "bad.npz", None, "")
    (tmp_path / "text.npz").write_text("x")
    assert "not a readable .npz" in message(common.reference_statistics, tmp_path / "text.npz", None, "")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "not a state dict" in message(common.load_inception, tmp_path / "other.pth", "cpu")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "not a state dict" in message(common.load_inception, tmp_path / "empty.pth", "cpu")
    Image.new("RGB", (32, 64)).save(tmp_path / "one" / "b.png")
    text = message(common.score_images, tmp_path / "one", tmp_path, None, "cpu")
    assert "b.png" in text and "expected images of one size" in text
