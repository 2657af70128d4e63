"""run_all.sh's report in headless Chromium, its arguments, and the graders' calls."""
import csv
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import common
import p1_gan as p1
import p2_diffusion as p2
import p3_ddim as p3
import p4_dann as p4
from conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def out(tmp_path):
    """What run_all.sh leaves, in small: scores, figures, a table with a long name, commands."""
    rng = np.random.default_rng(0)
    for folder, name, size in (("p1_figures", "compare", (1100, 260)), ("p2_figures", "digits", (1000, 1000)), ("p3_figures", "eta_grid", (1200, 900)), ("p4_figures", "tsne_mnistm_svhn_dann_digit", (900, 800))):
        (tmp_path / folder).mkdir()
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
        (tmp_path / folder / "network.txt").write_text("1,234 parameters\n" + "Sequential(Conv2d(3, 64, <3>)) " * 30)
    (tmp_path / "p1_sngan.json").write_text(json.dumps({"n": 1000, "name": "FID", "distance": 21.5, "is": [2.0, 0.1], "face_rate": 0.95}))
    (tmp_path / "p1_dcgan.json").write_text(json.dumps({"n": 1000, "name": "fd_random", "distance": 3.5, "is": [2.2, 0.1]}))
    (tmp_path / "p2_digits.json").write_text(json.dumps({"n": 1000, "accuracy": 0.94, "diversity": 1.01}))
    (tmp_path / "p4_table").mkdir()
    (tmp_path / "p4_table" / "table.json").write_text(json.dumps({"dann": {s: [{"accuracy": 0.6}, {"accuracy": 0.7}] for s in ("mnistm-svhn", "mnistm-usps", "svhn-mnistm", "usps-svhn", "usps-mnistm")}}))
    (tmp_path / "commands.tsv").write_text("12\tpython3 p1_gan.py --mode train --out a&b" + " --long-option" * 40 + "\n5\tpython3 p1_gan.py --mode train --out a&b" + " --long-option" * 40 + " --resume\n")
    common.write_report(tmp_path)
    return tmp_path


def test_report_has_the_numbers(out):
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    rows = [re.sub("<[^>]+>", "|", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    row = {name: next(r for r in rows if name in r) for name in ("FID, sngan", "fd_random, dcgan", "face rate, sngan", "inception score, sngan", "digit accuracy, digits", "dann")}
    assert "pass" in row["FID, sngan"] and "27" in row["FID, sngan"] and "pass" in row["face rate, sngan"]
    assert "pass" not in row["fd_random, dcgan"] and "fail" not in row["fd_random, dcgan"] and "27" not in row["fd_random, dcgan"]  # no FID is not compared with FID
    assert "fail" in row["digit accuracy, digits"] and not {"pass", "fail"} & set(row["inception score, sngan"].split("|"))
    assert "inception score, dcgan" not in page  # random weights have no classes
    assert row["dann"].count("pass") == 3 and row["dann"].count("fail") == 1  # usps-mnistm has no bar
    assert "a&amp;b" in page and page.count("--long-option") == 40 and "<td>17</td>" in page  # both calls' seconds
    common.write_report(out, built_in=True)
    page = (out / "report.html").read_text()
    assert "built-in data" in page and 'class="pass"' not in page and 'class="fail"' not in page and "22.97" not in page and "93.3" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(out, width):
    """No broken picture and no horizontal overflow; wide tables scroll by themselves. The page is laid out in a frame of the given width."""
    page = (out / "report.html").read_text()
    check = """<script>addEventListener("load", () => document.documentElement.dataset.result = JSON.stringify({
        broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length, overflow: document.documentElement.scrollWidth > innerWidth, width: innerWidth}))</script>"""
    (out / "checked.html").write_text(page.replace("</body>", check + "</body>"))
    frame = f"""<iframe src="checked.html" style="width:{width}px;height:4000px;border:0"></iframe>
        <script>addEventListener("load", () => document.body.append(document.querySelector("iframe").contentDocument.documentElement.dataset.result))</script>"""
    (out / "frame.html").write_text(f"<!doctype html><body>{frame}</body>")
    result = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={out / 'profile'}", "--virtual-time-budget=10000",
                             "--window-size=1400,1000", "--dump-dom", (out / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'\{"broken.*?\}', result.stdout)[0])
    assert found == {"broken": 0, "images": 4, "overflow": False, "width": width}


def run_all(*arguments, **options):
    return subprocess.run(["bash", str(options.pop("script", ROOT / "run_all.sh")), *map(str, arguments)], capture_output=True, text=True, **options)


def test_usage(tmp_path):
    for arguments in (["nowhere"], [tmp_path / "nowhere", tmp_path / "out"], [tmp_path, tmp_path / "out", "p1", "p5"], ["p3", "noise", "out"]):
        result = run_all(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and "bash run_all.sh IN OUT" in result.stderr, arguments
    assert not (tmp_path / "out").exists()


def test_failure(tmp_path):
    """It stops with the message and the code of what failed, and reports what there is."""
    (tmp_path / "in").mkdir()
    result = run_all(tmp_path / "in", tmp_path / "out", "p4", "p2")
    assert result.returncode == 2 and "no mnistm val images" in result.stderr and "p2_diffusion.py" not in result.stdout
    assert "p4_dann.py --mode table" in (tmp_path / "out" / "report.html").read_text()


def test_graders_calls(tmp_path):
    """From another working directory, with spaces in every path, checkpoints beside the scripts."""
    home = tmp_path / "home of it"
    home.mkdir()
    for name in ("run_all.sh", "p1_gan.py", "p2_diffusion.py", "p4_dann.py", "p3_ddim.py", "common.py"):
        shutil.copy(ROOT / name, home)
    p2.main(["--mode", "train", "--steps", "1", "--channels", "32", "32", "--batch-size", "4", "--T", "20", "--ckpt", str(home / "checkpoints" / "p2_diffusion_unet.pt"), "--device", "cpu"])
    for method in ("dann", "dann-mt"):
        p4.main(["--mode", "train", "--method", method, "--target", "usps", "--steps", "2", "--batch-size", "8", "--ckpt", str(home / "checkpoints" / f"p4_{method}_mnistm_usps_deep_0.pt"), "--device", "cpu"])
    images = tmp_path / "some images" / "usps"
    images.mkdir(parents=True)
    for i in range(3):
        Image.new("L", (16, 16), 80 * i).save(images / f"{i}.png")
    script = home / "run_all.sh"
    for arguments in (["p4", "some images/usps", "new folder/pred.csv"], ["p4", "some images/usps", "usps", tmp_path / "of 2021.csv"], ["bonus", "some images/usps", "usps", tmp_path / "bonus.csv"]):
        result = run_all(*arguments, script=script, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        with open(tmp_path / arguments[-1]) as f:
            assert [row["image_name"] for row in csv.DictReader(f)] == ["0.png", "1.png", "2.png"]
    result = run_all("p4", "some images/usps", "svhn", "out.csv", script=script, cwd=tmp_path)
    assert result.returncode == 2 and "--method dann --source usps --target svhn --data DIR --ckpt checkpoints/p4_dann_usps_svhn_deep_0.pt" in result.stderr  # 2021's
    result = run_all("p2", "out put", script=script, cwd=tmp_path)
    assert result.returncode == 0 and len(os.listdir(tmp_path / "out put")) == 1000, result.stderr
    (tmp_path / "noise").mkdir()
    torch.save(torch.zeros(1, 3, 32, 32), tmp_path / "noise" / "00.pt")
    p3.main(["--mode", "train", "--steps", "1", "--size", "16", "--channel", "32", "--multipliers", "1", "--attention", "--ckpt", str(home / "checkpoints" / "p3.pt"), "--device", "cpu"])
    result = run_all("p3", "noise", "p3 out", "home of it/checkpoints/p3.pt", script=script, cwd=tmp_path)
    assert result.returncode == 0 and os.listdir(tmp_path / "p3 out") == ["00.png"], result.stderr
    p1.main(["--mode", "train", "--method", "acgan", "--steps", "1", "--batch-size", "4", "--ckpt", str(home / "checkpoints" / "p1_acgan.pt"), "--device", "cpu"])
    result = run_all("acgan", "p1 out", script=script, cwd=tmp_path)
    assert result.returncode == 0 and len(os.listdir(tmp_path / "p1 out")) == 1000, result.stderr
    result = run_all("p1", "faces", script=script, cwd=tmp_path)
    assert result.returncode == 2 and "p1_sngan.pt: no such file" in result.stderr
