"""run_all.sh's report in headless Chromium, its arguments, and the graders' calls."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import p1_gan as p1
import p2_diffusion as p2
import p3_ddim as p3
import p4_dann as p4

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def out(tmp_path):
    """What run_all.sh leaves, in small: scores, figures, a table with a long name, commands."""
    rng = np.random.default_rng(0)
    figures = {
        "p1_figures/compare.png": (1100, 260),
        "p2_figures/digits.png": (1000, 1000),
        "p3_figures/eta_grid.png": (1200, 900),
        "p4_figures/tsne_mnistm_svhn_dann_digit.png": (900, 800),
    }
    for name, (width, height) in figures.items():
        path = tmp_path / name
        path.parent.mkdir()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    scores = {
        "p1_sngan": {"n": 1000, "name": "FID", "distance": 21.5, "is": [2.0, 0.1], "face_rate": 0.95},
        "p1_dcgan": {"n": 1000, "name": "fd_random", "distance": 3.5, "is": [2.2, 0.1]},
        "p2_diffusion": {"n": 1000, "accuracy": 0.94, "diversity": 1.01},
        "p3_given": {"mse": 0.005, "largest": 21.0},
    }
    for name, score in scores.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(score))
    (tmp_path / "p4_table").mkdir()
    scenarios = ("mnistm-svhn", "mnistm-usps", "svhn-mnistm", "usps-svhn", "usps-mnistm")
    ckpts = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    runs = [{"accuracy": 0.6, "ckpt": ckpts[0]}, {"accuracy": 0.7, "ckpt": ckpts[1]}]
    table = {"dann": {scenario: runs for scenario in scenarios}}
    for name, seconds in (("a", 200), ("b", 400), ("p1_sngan", 660)):
        (tmp_path / f"{name}.log.csv").write_text(f"step,seconds,sure\n1,5,\n2,{seconds},0.5\n")
    (tmp_path / "p4_table" / "table.json").write_text(json.dumps(table))
    command = "python3 p1_gan.py --mode train --out a&b" + " --long-option" * 40
    (tmp_path / "commands.tsv").write_text(f"12\t{command}\n5\t{command} --resume\n")
    common.write_report(tmp_path)
    return tmp_path


def test_report_has_the_numbers(out):
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    rows = [re.sub("<[^>]+>", "|", row) for row in re.findall("<tr>(.*?)</tr>", page)]

    def row(name):
        return next(row for row in rows if name in row)

    assert row("FID, sngan") == "|FID, sngan||21.5||11||1000||27||22.97||pass|"
    assert row("face rate, sngan") == "|face rate, sngan||95.0%||11||1000||90.0%||92.2%||pass|"
    no_fid = row("fd_random, dcgan")  # is not compared with FID
    assert "pass" not in no_fid and "fail" not in no_fid and "27" not in no_fid
    assert "fail" in row("digit accuracy, diffusion")
    assert not {"pass", "fail"} & set(row("inception score, sngan").split("|"))
    assert "0.0072" in row("mean squared error, given") and "fail" in row("largest mean squared error, given")
    assert "inception score, dcgan" not in page  # random weights have no classes
    verdicts = "".join(row for row in rows if ", dann|" in row)
    assert verdicts.count("pass") == 3 and verdicts.count("fail") == 1  # usps-mnistm has no bar
    assert "||65.0%||5||2||40.0%|" in row("MNIST-M → SVHN, dann")  # the mean of 200 and 400 seconds
    assert "seconds: 0 minutes" in page
    assert "12\tpython3 p1_gan.py --mode train --out a&amp;b" in page
    common.write_report(out, built_in=("p1", "p2", "p3", "p4"))
    page = (out / "report.html").read_text()
    assert "built-in data" in page and 'class="pass"' not in page and 'class="fail"' not in page
    assert "22.97" not in page and "93.3%" not in page


def test_what_is_no_result_is_left_out_and_named(out, capsys):
    """A report is what there is to look at after a failure: it must not fail itself."""
    for name, text in (
        ("p1_cut.json", '{"n": 1'),
        ("p2_list.json", "[1, 2]"),
        ("p3_text.json", '{"mse": "a"}'),
    ):
        (out / name).write_text(text)
    (out / "p1_figures" / "._compare.png").write_bytes(b"x")
    (out / "commands.tsv").write_bytes(b"12\tpython3 a\xff\n")
    os.rename(out / "p3_figures" / "eta_grid.png", out / "p3_figures" / os.fsdecode(b"eta_grid\xff.png"))
    before = (out / "report.html").read_text()
    capsys.readouterr()
    common.write_report(out)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 3 and all(
        name in note for name, note in zip(("p1_cut", "p2_list", "p3_text"), notes)
    )
    page = (out / "report.html").read_text()
    assert re.findall("<tr>.*", page) == re.findall("<tr>.*", before)
    assert page.count("data:image/png;base64,") == 4 and "python3 a\\xff" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(out, width):
    """No broken picture and no horizontal overflow; wide tables scroll by themselves.

    The page is laid out in a frame of the given width.
    """
    page = (out / "report.html").read_text()
    check = """<script>addEventListener("load", () => document.documentElement.dataset.result =
        JSON.stringify({broken: [...document.images].filter(i => !i.naturalWidth).length,
        images: document.images.length,
        overflow: document.documentElement.scrollWidth > innerWidth, width: innerWidth}))</script>"""
    (out / "checked.html").write_text(page.replace("</body>", check + "</body>"))
    frame = f"""<iframe src="checked.html" style="width:{width}px;height:4000px;border:0"></iframe>
        <script>addEventListener("load", () => document.body.append(
        document.querySelector("iframe").contentDocument.documentElement.dataset.result))</script>"""
    (out / "frame.html").write_text(f"<!doctype html><body>{frame}</body>")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        f"--user-data-dir={out / 'profile'}",
        "--virtual-time-budget=10000",
        "--window-size=1400,1000",
    ]
    command += ["--dump-dom", (out / "frame.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'\{"broken.*?\}', result.stdout)[0])
    assert found == {"broken": 0, "images": 4, "overflow": False, "width": width}


def run_all(*arguments, script=ROOT / "run_all.sh", cwd=None):
    """run_all.sh with the python3 that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PATH": path})


def test_usage(tmp_path):
    for arguments in (
        ["nowhere"],
        [tmp_path / "nowhere", tmp_path / "out"],
        [tmp_path, tmp_path / "out", "p1", "p5"],
        [tmp_path, tmp_path / "out", "p1", "reports"],
        [tmp_path, tmp_path / "out", "reports", "2024"],
        ["--full"],
        ["--full", tmp_path],
        ["--full", tmp_path / "nowhere", tmp_path / "out"],
        ["p3", "noise", "out"],
        ["p1", ""],  # a script that passes on an argument that it did not get
        ["p3", "noise", "out", ""],
    ):
        result = run_all(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and "bash run_all.sh IN OUT" in result.stderr, arguments
    assert os.listdir(tmp_path) == []


@pytest.fixture
def pretend(tmp_path):
    """pretend(*arguments): the commands of run_all.sh, [(script, its settings)]; nothing is computed.

    A stand-in for python3 writes them down. What one of the scripts would refuse raises ValueError.
    """
    log = tmp_path / "log"
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" = - ] && exit
printf '%s\\n' "$*" >> {log}
[[ "$*" == *"--mode table --report 2021"* ]] && touch "{tmp_path}/out/p4_dann_usps_svhn_2021-tiny_0.pt"
exit 0
""")
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("face/train", "face/GT", "face/noise"):
        (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / "face" / "UNet.pt").touch()

    def check(*arguments):
        log.write_text("")
        command = ["bash", str(ROOT / "run_all.sh"), *arguments]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        scripts = {"p1_gan": p1, "p2_diffusion": p2, "p3_ddim": p3, "p4_dann": p4}
        found = []
        for line in log.read_text().splitlines():
            path, *options = line.split()
            if Path(path).stem in scripts:
                found.append((Path(path).stem, scripts[Path(path).stem].parse_args(options)))
        return found

    return check


def test_built_in_data_has_a_folder_of_its_own(pretend, tmp_path):
    """What --train leaves is not shown beside the images of the shipped weights."""
    for arguments, out in (([], "results"), (["--train"], "results-train")):
        commands = pretend(*arguments)
        assert {script for script, _ in commands} == {"p1_gan", "p2_diffusion", "p3_ddim", "p4_dann"}
        for _, args in commands:
            assert Path(args.out or args.ckpt).parts[0] == out
            assert args.data is None
        guides = [getattr(args, "guide", None) for _, args in commands if args.mode == "sample"]
        assert bool(arguments) != any(guides)  # those of the shipped weights fit no other network
        trained = {script for script, args in commands if args.mode == "train"}
        assert trained == (set() if not arguments else {"p1_gan", "p2_diffusion", "p3_ddim"})
    assert (tmp_path / "results-train" / "commands.tsv").is_file()


def trained_by(commands):
    """{(script, method)} of the trainings among commands."""
    return {(name, vars(args).get("method")) for name, args in commands if args.mode == "train"}


def test_the_hour_and_the_day(pretend):
    """IN OUT trains by --fast what the course grades; --full trains all, with all steps."""
    hour = pretend("in", "out")
    assert trained_by(hour) == {("p1_gan", "sngan"), ("p1_gan", "acgan"), ("p2_diffusion", None)}
    assert all(args.fast for _, args in hour if args.mode in ("train", "table"))
    table = next(args for _, args in hour if args.mode == "table")
    assert table.methods == ["dann", "dann-mt"]
    assert table.scenarios == ["mnistm-svhn", "mnistm-usps", "svhn-mnistm", "usps-svhn"]
    day = pretend("--full", "in", "out")
    assert not any(args.fast for _, args in day if args.mode in ("train", "table"))
    more = {("p1_gan", "dcgan"), ("p1_gan", "wgangp"), ("p3_ddim", None)}
    assert trained_by(day) == trained_by(hour) | more


def test_given_data_are_given_to_all_that_learn_or_compare(pretend):
    commands = pretend("--full", "in", "out")
    blind = {"sample", "mse", "eta-grid", "interpolate"}
    blind_grids = {"p1_gan", "p3_ddim"}
    for script, args in commands:
        if args.mode not in blind and (args.mode, script) not in {("grid", name) for name in blind_grids}:
            assert args.data == "in", (script, args.mode)


def test_reports_by_name(pretend):
    """Each of the five reports' systems is trained, and its figures are drawn as the report has them."""
    commands = pretend("in", "out", "reports")
    trained = [(script, args) for script, args in commands if args.mode in ("train", "table")]
    p1_systems = {(args.report, args.method) for script, args in trained if script == "p1_gan"}
    assert len(p1_systems) == 8
    years = {"2021", "2022a", "2022b", "2022c", "2023"}
    assert {args.report for script, args in trained if script == "p2_diffusion"} == years - {"2021"}
    assert {args.report for script, args in trained if script == "p4_dann"} == years
    grids = [args.states for script, args in commands if script == "p2_diffusion" and args.mode == "grid"]
    assert [1, 101, 201, 261, 361, 400] in grids
    etas = [args.eta for script, args in commands if args.mode == "eta-grid"]
    assert etas == [[i / 10 for i in range(10)], [0.5, 0.5]]


@pytest.mark.slow
def test_cost_of_the_reports(monkeypatch, capsys, tmp_path):
    """Hours of each training from three timed steps, p4's table times its seeds; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    table = "p4_dann.py --mode table --report 2022b --seeds 0 1 2 --ckpt here --out here\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(table + "p2_diffusion.py --mode grid --out here\n"))
    benchmark.cost(None)
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if "_2022b-small" in row]
    assert len(rows) == 5 and all(row[1] == "3 x 2,000" for row in rows)  # source of three, dann of two
    for _, _, seconds, hours in rows:
        assert float(hours.rstrip(" |")) == pytest.approx(float(seconds) * 6000 / 3600, abs=0.06)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["TERM", "HUP"])
def test_a_signal_reaches_the_script_that_runs(name, tmp_path):
    """It comes to run_all.sh alone, as from kill or docker stop, which waits until the script has saved."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"""#!/usr/bin/env bash
trap 'sleep 0.3; touch {tmp_path}/saved; exit 130' TERM HUP
touch {tmp_path}/running
while true; do sleep 0.1; done
""")
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", str(ROOT / "run_all.sh")], env=environment, cwd=tmp_path)
    while not (tmp_path / "running").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.wait(timeout=20) == 128 + getattr(signal, f"SIG{name}")
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_failure(tmp_path):
    """Missing digits show at the start; what fails later stops it, and it reports what there is."""
    (tmp_path / "in").mkdir()
    result = run_all(tmp_path / "in", tmp_path / "out", "p4", "p2")
    assert result.returncode == 2 and "no mnistm" in result.stderr and result.stdout.count("+ ") == 0
    assert not (tmp_path / "out").exists()
    face = tmp_path / "in" / "face" / "train" / "0.png"
    face.parent.mkdir(parents=True)
    face.write_bytes(b"damaged")
    result = run_all("--full", tmp_path / "in", tmp_path / "out", "p3")
    assert result.returncode == 2 and "cannot be read" in result.stderr
    assert "p3_ddim.py --mode train" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_link_to_it_works(home, tmp_path):
    (tmp_path / "hw.sh").symlink_to(home / "run_all.sh")
    result = run_all("acgan", "digits", script=tmp_path / "hw.sh", cwd=tmp_path)
    assert result.returncode == 0 and len(os.listdir(tmp_path / "digits")) == 1000, result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The scripts in a folder with spaces in its name, with checkpoints of a few steps beside them."""
    home = tmp_path_factory.mktemp("home") / "home of it"
    home.mkdir()
    for name in ("run_all.sh", "p1_gan.py", "p2_diffusion.py", "p4_dann.py", "p3_ddim.py", "common.py"):
        shutil.copy(ROOT / name, home)

    def train(script, options, ckpt):
        path = home / "checkpoints" / ckpt
        script.main(["--mode", "train", "--device", "cpu", *options.split(), "--ckpt", str(path)])

    train(p2, "--steps 1 --channels 32 32 --batch-size 4 --T 20", "p2_diffusion.pt")
    for method in ("dann", "dann-mt"):
        options = f"--method {method} --target usps --steps 2 --batch-size 8"
        train(p4, options, f"p4_{method}_mnistm_usps_deep_0.pt")
    train(p3, "--steps 1 --size 16 --channels 32 --attention --batch-size 4", "p3.pt")
    train(p1, "--method acgan --steps 1 --batch-size 4", "p1_acgan.pt")
    return home


@pytest.mark.slow
def test_graders_calls_of_p4(home, tmp_path):
    """From another working directory, with spaces in every path, checkpoints beside the scripts."""
    images = tmp_path / "some images" / "usps"
    images.mkdir(parents=True)
    for i in range(3):
        Image.new("L", (16, 16), 80 * i).save(images / f"{i}.png")
    calls = [["p4", "some images/usps", "new folder/pred.csv"]]
    calls += [["p4", "some images/usps", "usps", tmp_path / "of 2021.csv"]]
    calls += [["bonus", "some images/usps", "usps", tmp_path / "bonus.csv"]]
    for arguments in calls:
        result = run_all(*arguments, script=home / "run_all.sh", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        with open(tmp_path / arguments[-1]) as file:
            names = [row["image_name"] for row in csv.DictReader(file)]
        assert names == ["0.png", "1.png", "2.png"]
    result = run_all("p4", "some images/usps", "svhn", "out.csv", script=home / "run_all.sh", cwd=tmp_path)
    assert result.returncode == 2
    assert "p4_dann_usps_svhn_deep_0.pt: no such file" in result.stderr  # 2021's source and method


@pytest.mark.slow
def test_graders_calls_of_p1_to_p3(home, tmp_path):
    script = home / "run_all.sh"
    result = run_all("p2", "out put", script=script, cwd=tmp_path)
    assert result.returncode == 0 and len(os.listdir(tmp_path / "out put")) == 1000, result.stderr
    (tmp_path / "noise").mkdir()
    torch.save(torch.zeros(1, 3, 32, 32), tmp_path / "noise" / "00.pt")
    ckpt = home / "checkpoints" / "p3.pt"
    result = run_all("p3", "noise", "p3 out", ckpt, script=script, cwd=tmp_path)
    assert result.returncode == 0 and os.listdir(tmp_path / "p3 out") == ["00.png"], result.stderr
    result = run_all("acgan", "p1 out", script=script, cwd=tmp_path)
    assert result.returncode == 0 and len(os.listdir(tmp_path / "p1 out")) == 1000, result.stderr
    result = run_all("p1", "faces", script=script, cwd=tmp_path)
    assert result.returncode == 2 and "p1_sngan.pt: no such file" in result.stderr
