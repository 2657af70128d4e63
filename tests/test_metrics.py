"""FID, KID and IS in common.py: against analytic answers and against pytorch-fid with the same weights."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import common
from conftest import ROOT


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
    """24 and 30 built-in faces as PNG; some of the first folder's as grey, RGBA and JPEG."""
    root = tmp_path_factory.mktemp("faces")
    for name, faces in (("a", common.load_faces(None, "val")[:24]), ("b", common.load_faces(None, "train")[:30])):
        (root / name).mkdir()
        for i, face in enumerate(faces):
            image = Image.fromarray(face.permute(1, 2, 0).numpy())
            if name == "a" and i < 3:
                image = image.convert(("L", "RGBA", "RGB")[i])
            image.save(root / name / f"{i:04d}.{'jpg' if name == 'a' and i == 2 else 'png'}")
    return root / "a", root / "b"


def gaussian(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_frechet_distance_of_two_gaussians():
    """Shift and scale of known size: |m|^2 + d (s - 1)^2, from exactly whitened samples."""
    x = gaussian(500)
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    assert common.frechet_distance(3 * x + 0.5, np.zeros(16), np.eye(16)) == pytest.approx(16 * 0.25 + 16 * 4, rel=1e-9)
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


def test_kid_is_unbiased():
    """Mean 0 on equal laws, where the biased estimate would be positive; clearly positive on different ones."""
    means = [common.kernel_distance(gaussian(60, seed=i), gaussian(60, seed=1000 + i))[0] for i in range(300)]
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(len(means))
    far, error = common.kernel_distance(gaussian(2000), gaussian(2000, seed=1) + 1)
    assert far > 20 * error > 0


def test_standard_error_of_kid():
    """It is the spread of the estimate over new draws of both sets, of different sizes."""
    values, errors = zip(*(common.kernel_distance(gaussian(60, seed=i), gaussian(100, seed=1000 + i) + 0.3) for i in range(300)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_inception_score_bounds():
    assert common.inception_score(np.full((100, 10), 0.1)) == pytest.approx((1, 0))
    one_hot = np.eye(10)[np.arange(1000) % 10]
    assert common.inception_score(one_hot) == pytest.approx((10, 0))
    p = np.random.default_rng(0).dirichlet(np.ones(10), 1000)
    mean, spread = common.inception_score(p)
    parts = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(0))) for q in part])) for part in p.reshape(10, 100, 10)]  # the course's IS.py, written out
    assert (mean, spread) == pytest.approx((np.mean(parts), np.std(parts)))


def test_features_against_pytorch_fid(weights, folders, tmp_path, monkeypatch):
    """The same number as pytorch-fid from the same weights and files, and its .npz both ways."""
    fid_inception = pytest.importorskip("pytorch_fid.inception")
    import pytorch_fid.fid_score as theirs
    monkeypatch.setattr(fid_inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
    model = fid_inception.InceptionV3([3])
    a, b = (sorted(map(str, folder.iterdir())) for folder in folders)
    mu_a, sigma_a = theirs.calculate_activation_statistics(a, model, 10, 2048, "cpu", 0)
    mu_b, sigma_b = theirs.calculate_activation_statistics(b, model, 10, 2048, "cpu", 0)
    net, name = common.load_inception(weights, "cpu")
    assert name.startswith("Frechet distance with random.pth")
    features, _ = common.inception_features(net, [common.read_image(f) for f in a])
    plain = [i for i in range(len(a)) if i != 1]  # pytorch-fid drops the alpha channel
    assert np.allclose(features.mean(0), mu_a, rtol=1e-3, atol=1e-4 * np.abs(mu_a).max()) and len(plain) == 23
    w, v = np.linalg.eigh(sigma_a)
    half = v @ np.diag(np.sqrt(w.clip(0))) @ v.T
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(np.linalg.eigvalsh(half @ sigma_b @ half).clip(0)).sum()
    np.savez(tmp_path / "b.npz", mu=mu_b, sigma=sigma_b)
    for reference in (folders[1], tmp_path / "b.npz"):
        result = common.score_images(folders[0], reference, weights, "cpu", tmp_path / "again.npz")
        assert result["distance"] == pytest.approx(expected, rel=1e-3)
    with np.load(tmp_path / "again.npz") as f:
        assert np.allclose(f["mu"], mu_b) and np.allclose(f["sigma"], sigma_b)


def test_identical_folders_and_mixed_sizes(weights, folders, capsys):
    net, name = common.load_inception(weights, "cpu")
    stats = common.reference_statistics(folders[1], net, name)
    assert abs(common.frechet_distance(stats["features"], stats["mu"], stats["sigma"])) < 1e-6 * np.trace(stats["sigma"])
    calls = []
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    again = common.reference_statistics(folders[1], net, name)
    hook.remove()
    assert not calls and np.array_equal(again["mu"], stats["mu"])  # from the cache
    images = [common.read_image(f) for f in sorted(folders[1].iterdir())[:4]]
    mixed = [images[0], np.asarray(Image.fromarray(images[1]).resize((80, 50))), images[2], images[3]]
    features, probabilities = common.inception_features(net, mixed)
    alone, _ = common.inception_features(net, [images[2]])
    assert np.allclose(features[2], alone[0], rtol=1e-3, atol=1e-3 * np.abs(alone).max()) and np.allclose(probabilities.sum(1), 1)


def test_command_line_without_weights_says_that_it_is_no_fid(folders, tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "common.py"), "fid", str(folders[0]), str(folders[1]), "--json", str(tmp_path / "out.json")],
                            capture_output=True, text=True, env={"PATH": "", "TORCH_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"})
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["name"] == "fd_random" and "no FID" in result.stderr and "\nFID" not in "\n" + result.stdout
    assert figures["n"] == 24 and figures["n_reference"] == 30 and figures["n_floor"] == 15 and "floor" in result.stdout and "KID" in result.stdout


def test_bad_input(weights, folders, tmp_path, error):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "a.png")
    assert "found 1 PNG" in error(common.image_files, tmp_path / "one", "generated")
    assert "it is a file" in error(common.image_files, tmp_path / "one" / "a.png", "generated")
    np.savez(tmp_path / "bad.npz", mean=np.zeros(3))
    assert "found mean (3,)" in error(common.reference_statistics, tmp_path / "bad.npz", None, "")
    (tmp_path / "text.npz").write_text("x")
    assert "not a readable .npz" in error(common.reference_statistics, tmp_path / "text.npz", None, "")
    named = tmp_path / "inception-6726825d.pth"
    named.write_bytes(weights.read_bytes())
    assert "expected 6726825d" in error(common.load_inception, named, "cpu")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "not a state dict" in error(common.load_inception, tmp_path / "other.pth", "cpu")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "not a state dict" in error(common.load_inception, tmp_path / "empty.pth", "cpu")
