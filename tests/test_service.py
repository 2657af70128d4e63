"""The service of p1 to p4: files, checkpoints, Run, options, main. One text, so most tests use p2 alone."""

import contextlib
import fcntl
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, Hostile, write_as_a_gpu
from PIL import Image

import common
import p1_gan as p1
import p2_diffusion as p2
import p3_ddim as p3
import p4_dann as p4

TRAIN = {
    p1: ["--method", "dcgan", "--batch-size", "2"],
    p2: ["--channels", "32", "--T", "20", "--batch-size", "2", "--dropout", "0.2"],
    p3: ["--channels", "32", "--attention", "--batch-size", "2"],
    p4: ["--method", "dann-mt", "--source", "mnistm", "--target", "usps", "--batch-size", "4"],
}
SIZES = {p1: 64, p2: 28, p3: 16, p4: 28}
each = pytest.mark.parametrize("script", TRAIN, ids=lambda script: script.__name__)


def data(script):
    """Random images, and what else the script's `train` takes."""
    size = SIZES[script]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, size, size), generator=generator).byte()
    others = {p1: (), p2: (torch.arange(8),), p3: (), p4: (torch.arange(8), images.flip(0))}
    return images, *others[script]


def options(script, ckpt, *more, steps=4):
    fixed = ["--mode", "train", "--device", "cpu", "--precision", "float32", "--ckpt", str(ckpt)]
    return [*fixed, "--steps", str(steps), *TRAIN[script], *more]


def train(script, ckpt, *more, steps=4, sets=None):
    """Trains on `sets`, else on `data`; returns the dict in the checkpoint."""
    script.train(script.parse_args(options(script, ckpt, *more, steps=steps)), *(sets or data(script)))
    return torch.load(ckpt, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(script): the path of a checkpoint of four steps, made once."""
    made = {}

    def make(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("trained") / f"{script.NAME}.pt"
            train(script, made[script])
        return made[script]

    return make


def signals_at(monkeypatch, step, number):
    """Sends a signal to this process inside a step of p2's training."""

    def record(run, *, record=p2.Run.record, **values):
        record(run, **values)
        if run.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(p2.Run, "record", record)


# ------------------------------------------------------------------ one text


def test_the_service_is_one_text():
    texts = {}
    for script in TRAIN:
        source = (ROOT / f"{script.__name__}.py").read_text(encoding="utf-8")
        _, mark, text = source.partition(
            "# ---------------- service: the same text in p1 to p4 ----------------\n"
        )
        assert mark, script.__name__
        texts[script.__name__] = text
    advice = "copy the right one from its mark on: awk '/^# -+ service/,0' p2_diffusion.py"
    assert len(set(texts.values())) == 1, advice
    whole = "def write_whole(path, write):\n"
    own = (ROOT / "common.py").read_text(encoding="utf-8").partition(whole)[2].partition("\n\n\n")[0]
    assert own == texts["p2_diffusion"].partition(whole)[2].partition("\n\n\n")[0]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("write_whole", [p2.write_whole, common.write_whole], ids=["script", "common"])
def test_write_whole(write_whole, tmp_path, monkeypatch):
    """A link stays one; two writers do not meet; one that is stopped leaves nothing; usual rights."""
    real = tmp_path / "new" / "real.txt"
    write_whole(real, lambda file: file.write(b"one"))
    (tmp_path / "plain").write_text("")
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode
    link = tmp_path / "link.txt"
    link.symlink_to(real)

    def write(file):
        monkeypatch.setattr(os, "getpid", lambda: 5)  # another process writes meanwhile
        write_whole(link, lambda other: other.write(b"other"))
        monkeypatch.undo()
        file.write(b"two")

    write_whole(link, write)
    assert link.is_symlink() and real.read_bytes() == b"two"

    def stopped(file):
        file.write(b"thr")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(real, stopped)
    assert real.read_bytes() == b"two" and os.listdir(tmp_path / "new") == ["real.txt"]
    with pytest.raises(OSError, match="new: is a folder or a device"):
        write_whole(tmp_path / "new", write)
    with pytest.raises(OSError, match=r"x\.txt: cannot be written \(File exists\)"):
        write_whole(real / "x.txt", write)


def test_texts_and_pictures(tmp_path):
    p2.write_text(tmp_path / "a.txt", "é\udcff\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\xff\n"
    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8)
    p2.write_png(tmp_path / "a.png", image)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), image.permute(1, 2, 0).numpy())


def test_other_files_in_the_folder_are_named(tmp_path, capsys):
    args = p2.parse_args(["--mode", "sample"])
    for name in ("0_001.png", "old.png", ".DS_Store"):
        (tmp_path / name).write_text("")
    p2.make_folder(args, tmp_path, ["0_001.png"])
    assert "holds 1 other entries, such as old.png; graders read every file" in capsys.readouterr().err
    args.rank = 1
    p2.make_folder(args, tmp_path / "new", [])
    p2.make_folder(args, tmp_path, [])
    assert (tmp_path / "new").is_dir() and capsys.readouterr().err == ""


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(p2, "HERE", tmp_path / "script")
    here, shipped, beside = "checkpoints/a.pt", "script/.weights/a.pt", "script/a.pt"
    for path in (beside, shipped, here):
        assert p2.find_ckpt("a", "train") == here
        p2.write_text(tmp_path / path, "")
        assert (tmp_path / p2.find_ckpt("a", "sample")).samefile(tmp_path / path)
    assert p2.find_ckpt("b", "sample") == "checkpoints/b.pt"


def test_whole_numbers():
    for values in (
        [3, 1],
        (3, 1),
        range(3, 0, -2),
        np.array([3, 1]),
        torch.tensor([3, 1]),
        [torch.tensor(3), 1],
    ):
        assert p2.whole_numbers(values, "digits") == [3, 1]
        assert all(type(value) is int for value in p2.whole_numbers(values, "digits"))
    assert p2.whole_numbers(5, "seed") == [5] and p2.whole_numbers([2**32 - 1], "seed") == [2**32 - 1]
    for wrong in ([True], [3.0], torch.tensor([3.7]), "31", ["3"], None, [None], [-1], [2**32], iter([3])):
        with pytest.raises(ValueError, match="digits: found .* expected whole numbers in 0 to 4294967295"):
            p2.whole_numbers(wrong, "digits")
    with pytest.raises(ValueError, match="found 10, expected whole numbers in 0 to 9"):
        p2.whole_numbers([3, 10], "digits", 0, 9)


# ------------------------------------------------------------------ checkpoints


@each
def test_what_load_model_refuses(script, trained, tmp_path):
    """Whatever stands in the place of a checkpoint, its settings and weights; the file is named."""
    ckpt = torch.load(trained(script), weights_only=True)
    name, value = next((name, value) for name, value in ckpt["ema"].items() if value.ndim == 4)
    setting = script.NETWORK[0]
    damages = {
        "lacks args": {"args": 5},
        f"lacks {setting}": {"args": {k: v for k, v in ckpt["args"].items() if k != setting}},
        "describe no network": {"args": {**ckpt["args"], setting: "unheard of"}},
        "lacks ema": {"ema": [1]},
        "lacks step": {"step": None},
        "lacks seconds, command": {"seconds": None, "command": 1},
        "found other,": {"script": "other"},
        "not this network's": {"ema": {**ckpt["ema"], name: value[:1]}},
        "found": {"ema": {**ckpt["ema"], name: value.to_sparse()}},
        "1 weights are not finite": {"ema": {**ckpt["ema"], name: value * math.nan}},
    }
    path = tmp_path / "damaged.pt"
    for message, damage in damages.items():
        torch.save({**ckpt, **damage}, path)
        with pytest.raises(ValueError, match=f"--ckpt {re.escape(str(path))}: .*{message}"):
            script.load_model(path)
    for weights in ({**ckpt["ema"], 7: value}, {**ckpt["ema"], name: 3}, {}):
        torch.save({**ckpt, "ema": weights}, path)
        with pytest.raises(ValueError, match="damaged.pt: found"):
            script.load_model(path)
    path.write_bytes(trained(script).read_bytes()[:5000])
    with pytest.raises(ValueError, match="--guide .*damaged.pt: not readable"):
        script.load_model(path, "cpu", "--guide")
    with pytest.raises(FileNotFoundError, match="--ckpt none.pt: no such file; .*--mode train"):
        script.load_model("none.pt")
    torch.save({f"module._orig_mod.{key}": value for key, value in ckpt["ema"].items()}, path)
    torch.save({**ckpt, "ema": torch.load(path, weights_only=True)}, path)
    model, settings = script.load_model(path)
    assert not model.training and settings.trained == "step 4 of 4"
    assert all(torch.equal(weight, ckpt["ema"][key]) for key, weight in model.state_dict().items())


def test_hostile_files_are_not_executed(tmp_path):
    """A pickle that runs code, offered as weights of all kinds, as noise and as reference statistics."""
    marker = tmp_path / "executed"
    hostile = tmp_path / "hostile.pt"
    torch.save(Hostile(marker), hostile)
    for script in TRAIN:
        with pytest.raises(ValueError, match="not readable"):
            script.load_model(hostile)
    with pytest.raises(ValueError):
        p3.read_noise(hostile, p3.parse_args([]))
    with pytest.raises(ValueError, match="not a state dict"):
        common.load_inception(hostile, "cpu")
    with pytest.raises(ValueError, match="not a state dict of the course's format"):
        common.load_classifier(hostile, "cpu")
    mu = np.array([Hostile(marker)], dtype=object)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=np.zeros(1))
    with pytest.raises(ValueError, match="not a readable .npz"):
        common.reference_statistics(tmp_path / "reference.npz", None, "")
    assert not marker.exists()
    torch.load(hostile, weights_only=False)  # the file does what it says
    assert marker.exists()


# ------------------------------------------------------------------ Run


@each
def test_resume_is_bit_equal(script, tmp_path):
    """Four steps are two, --resume and two: networks, optimisers, random numbers, losses."""
    more = ["--lr-schedule", "constant"] if script is p2 else []
    whole = train(script, tmp_path / "whole.pt", *more)
    if script is p4:  # its steps depend on their number, so it is stopped instead
        run = script.Run.agree_to_stop
        script.Run.agree_to_stop = lambda self: self.step == 2
        with pytest.raises(KeyboardInterrupt, match="stopped at step 2; go on with --resume"):
            train(script, tmp_path / "parts.pt", *more)
        script.Run.agree_to_stop = run
    else:
        train(script, tmp_path / "parts.pt", *more, steps=2)
        if script in (p2, p3):
            write_as_a_gpu(tmp_path / "parts.pt")
    parts = train(script, tmp_path / "parts.pt", *more, "--resume")

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    for key in whole.keys() - {"seconds", "command"}:
        assert equal(whole[key], parts[key]), key


def test_the_log_of_two_parts_is_that_of_one(tmp_path):
    """Rows at steps 10 and 20, and the rest at the end, also where the run was stopped at step 7."""
    train(p2, tmp_path / "whole.pt", steps=22)
    train(p2, tmp_path / "parts.pt", steps=7)
    assert [line.split(",")[0] for line in (tmp_path / "parts.log.csv").read_text().split()] == ["step", "7"]
    train(p2, tmp_path / "parts.pt", "--resume", steps=22)
    whole, parts = [
        [line.split(",")[:3] for line in (tmp_path / name).read_text().split()]
        for name in ("whole.log.csv", "parts.log.csv")
    ]
    assert whole == parts and [row[0] for row in whole] == ["step", "10", "20", "22"]


def test_rows_of_the_log(tmp_path):
    args = p2.parse_args(options(p2, tmp_path / "a.pt", steps=1300))
    run = p2.Run(args, 1300, {}, data(p2), {})
    for step in run:
        run.record(loss=torch.tensor(float(step)))
        if step % 300 == 0:
            run.record(rare=torch.tensor(2.0))
    assert [row["step"] for row in run.log] == [*range(10, 1001, 10), 1100, 1200, 1300]
    assert run.log[1]["loss"] == 15.5 and run.log[100]["loss"] == 1050.5  # means of 11 to 20, 1001 to 1100
    assert "rare" not in run.log[0] and run.log[29]["rare"] == 2.0
    header, first, *_ = (tmp_path / "a.log.csv").read_text().splitlines()
    assert (
        header == "step,loss,images_per_s,seconds,rare"
        and first.startswith("10,5.5,")
        and first.endswith(",")
    )


def test_images_per_second(tmp_path, monkeypatch):
    """Batches of two, half a second each; saved every two minutes."""
    clock = iter(np.arange(0, 10**6, 0.5))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    args = p2.parse_args(options(p2, tmp_path / "a.pt"))
    run = p2.Run(args, 600, {}, data(p2), {})
    saved = []
    monkeypatch.setattr(run, "save", lambda again=False: saved.append((run.step, again)))
    for _ in run:
        run.record(loss=torch.tensor(1.0))
    assert {row["images_per_s"] for row in run.log} == {4.0}
    assert saved == [(241, True), (482, True), (600, False)] and run.log[-1]["seconds"] == 300


@each
def test_a_checkpoint_is_neither_overwritten_nor_resumed_with_other_settings_or_data(
    script, trained, tmp_path
):
    """Other settings, images in another order, other labels of the same sum, fewer steps: the file stays."""
    ckpt = tmp_path / "a.pt"
    shutil.copy(trained(script), ckpt)
    before = ckpt.read_bytes()
    images, *others = data(script)
    with pytest.raises(ValueError, match="exists; go on with --resume, or give another --ckpt"):
        train(script, ckpt)
    with pytest.raises(ValueError, match=r"with other settings: lr 0.5 \(checkpoint: "):
        train(script, ckpt, "--resume", "--lr", "0.5")
    sets = [(images.flip(0), *others)]
    if others:
        sets.append((images, others[0].flip(0), *others[1:]))
    for changed in sets:
        with pytest.raises(ValueError, match=r"other settings: data .* \(checkpoint: "):
            train(script, ckpt, "--resume", sets=changed)
    with pytest.raises(ValueError, match="is at step 4, expected fewer than 3|steps 3 .checkpoint: 4"):
        train(script, ckpt, "--resume", steps=3)
    train(script, ckpt, "--resume")  # it is done already
    assert ckpt.read_bytes() == before


@pytest.mark.parametrize("script", [p1, p2, p4], ids=lambda script: script.__name__)
def test_a_run_whose_steps_depend_on_its_length_is_not_prolonged(script, tmp_path):
    more = {p1: ["--decay", "linear"], p2: ["--lr-schedule", "linear"], p4: []}[script]
    train(script, tmp_path / "a.pt", *more, steps=1)
    with pytest.raises(ValueError, match=r"other settings: steps 2 \(checkpoint: 1\)"):
        train(script, tmp_path / "a.pt", *more, "--resume", steps=2)


@each
def test_weights_alone_start_a_training(script, trained, tmp_path):
    """Other settings of training and other data may be used, not another network; G needs a D."""
    ckpt = torch.load(trained(script), weights_only=True)
    alone = {key: ckpt[key] for key in ("script", "args", "step", "seconds", "command", "ema")}
    torch.save(alone, tmp_path / "a.pt")
    images, *others = data(script)
    more = ["--resume", "--lr", "0"]
    if script is p1:
        with pytest.raises(ValueError, match="found 0 weights, not this network's"):
            train(script, tmp_path / "a.pt", *more, steps=5)
        return
    with pytest.raises(ValueError, match="is at step 4, expected fewer than 4"):
        train(script, tmp_path / "a.pt", *more)
    after = train(script, tmp_path / "a.pt", *more, steps=5, sets=(images.flip(0), *others))
    assert after["step"] == 5 and after["args"]["lr"] == 0
    names = [name for name in ckpt["ema"] if name.endswith("weight")]
    assert all(torch.equal(after["model"][name], ckpt["ema"][name]) for name in names if script is not p4)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_stops_the_run_and_keeps_the_checkpoint(bad, trained, tmp_path, monkeypatch):
    shutil.copy(trained(p2), tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()

    def record(run, *, record=p2.Run.record, **values):
        record(run, **{**values, bad: values[bad] * math.nan})

    monkeypatch.setattr(p2.Run, "record", record)
    with pytest.raises(FloatingPointError, match=f"'{bad}': nan.* at step 6; .*keeps the last good state"):
        train(p2, tmp_path / "a.pt", "--resume", steps=6)
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_failed_save(trained, tmp_path, monkeypatch, capsys):
    """On the way it is a warning, at the end an error; the old files stay."""
    ckpt = tmp_path / "a.pt"
    shutil.copy(trained(p2), ckpt)
    before = ckpt.read_bytes()

    def full(*_):
        raise RuntimeError("no space left on the disk\nframe 1")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(time, "perf_counter", iter(range(0, 10**6, 200)).__next__)
    with pytest.raises(OSError, match=r"a\.pt: cannot be written \(no space left on the disk\)$"):
        train(p2, ckpt, "--resume", steps=6)
    assert "a.pt: cannot be written (no space left on the disk); training goes on" in capsys.readouterr().err
    assert ckpt.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save(number, tmp_path, monkeypatch):
    """The step is finished and saved, then the caller gets KeyboardInterrupt, and his handlers back."""
    signals_at(monkeypatch, 2, number)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2; go on with --resume"):
        train(p2, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 2
    assert signal.getsignal(number) == before and sorted(os.listdir(tmp_path)) == ["a.log.csv", "a.pt"]


def test_nohup_and_threads(tmp_path, monkeypatch):
    """A signal that is ignored stays ignored; a thread cannot set handlers."""
    signals_at(monkeypatch, 2, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(p2, tmp_path / "a.pt")["step"] == 4
        thread = threading.Thread(target=train, args=(p2, tmp_path / "b.pt"))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 4


LOCKED = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
)


def test_a_second_training_on_one_name_is_refused(tmp_path):
    """As long as the first one's process lives, and no longer; --resume too."""
    path = tmp_path / "new" / "a.pt"
    path.parent.mkdir()
    command = [sys.executable, "-c", LOCKED, f"{path}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"a\.pt: another training writes it"):
            train(p2, path)
        other.kill()
    assert train(p2, path)["step"] == 4 and sorted(os.listdir(path.parent)) == ["a.log.csv", "a.pt"]


def test_a_folder_that_cannot_be_written_shows_before_the_first_step(tmp_path, error):
    (tmp_path / "file").write_text("")
    args = p2.parse_args(options(p2, tmp_path / "file" / "a.pt"))
    with pytest.raises(OSError):
        next(iter(p2.Run(args, 4, {}, data(p2), {})))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert train(p2, tmp_path / "a.pt")["step"] == 4


def test_batches_of_processes(tmp_path):
    args = p2.parse_args(options(p2, tmp_path / "a.pt"))
    args.world = 3
    with pytest.raises(ValueError, match="--batch-size 2: expected a multiple of 3 processes"):
        p2.Run(args, 4, {}, data(p2), {})


def test_logs_have_the_names_of_their_checkpoints():
    assert str(p2.log_path("a/model.pt")) == "a/model.log.csv"
    assert str(p2.log_path("a/model.s0")) == "a/model.s0.log.csv"


# ------------------------------------------------------------------ the screen


class DeadPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


class Logger:
    """What a host program may put in the place of standard error: no isatty, no encoding, no flush."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("stream", [None, DeadPipe(), Logger()], ids=["none", "dead", "logger"])
def test_what_cannot_be_shown_costs_no_work(stream, tmp_path, monkeypatch):
    """Neither a training, nor images; with a bar."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert train(p2, tmp_path / "a.pt")["step"] == 4
    command = ["--mode", "sample", "--ckpt", str(tmp_path / "a.pt"), "--num", "1", "--sample-steps", "2"]
    p2.main([*command, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert len(os.listdir(tmp_path / "out")) == 10


def test_a_pipe_that_died_does_not_change_the_exit_code():
    """Python's own last flush must not fail."""
    code = "import p2_diffusion as p2, sys; s = p2.Screen(sys.stdout); s.write('x'); s.flush(); s.write('y')"
    run = f"{sys.executable} -c {code!r} | true; exit ${{PIPESTATUS[0]}}".replace("'\"'\"'", "'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_terminal_that_lacks_characters():
    raw = io.BytesIO()
    screen = p2.Screen(io.TextIOWrapper(raw, encoding="ascii"))
    print("é\udcff", file=screen)
    assert raw.getvalue() == b"\\xe9\\udcff\n" and screen.encoding == "ascii"


# ------------------------------------------------------------------ options


def help_of(script, *argv):
    """The text of -h, and what it says of each option: {option: default}."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
        script.parse_args([*argv, "-h"])
    assert stop.value.code == 0
    shown = {}
    for block in re.split(r"\n  (?=--)", text.getvalue())[1:]:
        words = " ".join(block.partition("\n\n")[0].split()).replace("- ", "-")  # of names that were broken
        default = re.search(r"\(default: (.*)\)$", words)
        if default:  # a switch shows none
            shown[words.split()[0].removeprefix("--")] = default[1]
    return text.getvalue(), shown


CASES = {
    p1: [
        [],
        ["--mode", "sample"],
        ["--method", "wgangp"],
        ["--report", "2021"],
        ["--method", "acgan", "--fast"],
    ],
    p2: [[], ["--mode", "sample"], ["--mode", "grid", "--guide", "x.pt"], ["--report", "2022b"], ["--fast"]],
    p3: [
        [],
        ["--mode", "sample", "--sampler", "dpm++"],
        ["--mode", "eta-grid"],
        ["--mode", "noise"],
        ["--fast"],
    ],
    p4: [[], ["--report", "2021"], ["--report", "2023", "--target", "svhn"], ["--mode", "table"]],
}


@pytest.mark.parametrize("script, argv", [(script, argv) for script in CASES for argv in CASES[script]])
def test_help_shows_the_defaults_that_hold(script, argv):
    """For this mode, method and report; on 90 lines of 110 columns at most."""
    text, shown = help_of(script, *argv)
    lines = text.splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) <= 110
    args = script.parse_args(argv)
    found = {name: getattr(args, name.replace("-", "_"), "?") for name in shown}
    found.update(device="auto", ckpt=getattr(args, "ckpts", args.ckpt))
    own = [name for name in shown if f"--{name}" not in argv]
    differ = {name: (shown[name], str(found[name])) for name in own if shown[name] != str(found[name])}
    assert not differ and len(shown) > 15


@pytest.mark.parametrize("script", [p1, p2])
def test_fast_is_short_and_shorter_with_built_in_images(script):
    steps = [script.parse_args(argv).steps for argv in (["--fast"], ["--fast", "--data", "x"], [])]
    assert steps == sorted(set(steps))


UNUSED = {
    p1: [
        "sample --steps 5", "sample --lr 1", "train --input x", "train --out x", "sample --data x",
        "grid --num 3", "train --digit-weight 3", "train --method dcgan --digit-weight 2", "eval --seed 1",
        "train --label-smoothing 0.1",
    ],
    p2: [
        "sample --schedule linear", "sample --T 3", "sample --prediction eps", "sample --channels 32",
        "sample --steps 3", "sample --autoguidance 50", "sample --sampler ddpm --sample-steps 3",
        "sample --guidance 0 --guidance-interval 0 1", "sample --eta 1", "train --states 1",
        "sample --sampler ddim --last-time 0.1",
        "eval --guide x", "train --width 8", "train --arch context --patch 4", "train --beta-end 0.1",
        "eval --seed 1", "sample --fast", "sample --resume",
    ],
    p3: [
        "sample --autoguidance 2", "sample --lr 1", "train --eta 0.5",
        "interpolate --sampler ddpm --sample-steps 5",
        "interpolate --sampler ddpm",
        "sample --sampler dpm++ --eta 0.5", "sample --iterations 2", "invert --guide x", "train --noise x",
        "sample --gt x", "mse --seed 1", "sample --channels 32",
    ],
    p4: [
        "table --method dann", "train --methods dann", "train --num 20", "predict --input svhn --lr 1",
        "train --method dann --domain-weight 2", "eval --gt x --seed 1", "train --gt x", "tsne --seeds 1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("script, argv", [(script, argv) for script in UNUSED for argv in UNUSED[script]])
def test_options_are_never_ignored(script, argv):
    with pytest.raises(ValueError, match="^--[a-zT-]+.*(has no use|has a use only|DDIM|adds noise)"):
        script.parse_args(["--mode", *argv.split()])


def test_numbers_of_options():
    wrong = {
        "--steps 0": r"expected int 1\.\.",
        "--steps x": "invalid int value",
        "--steps 1.5": "invalid int value",
        "--lr inf": r"expected float 0\.\.",
        "--clip 0": r"expected float 1e-9\.\.inf",
        "--betas 0.9": "expected 2 arguments",
        "--seed 4294967296": r"expected int 0\.\.4294967295",
        **dict.fromkeys(["--ema -1", "--ema 1.1", "--ema nan"], r"expected float 0\.\.1"),
    }
    for argv, message in wrong.items():
        with pytest.raises(ValueError, match=f"{argv.split()[0]}: .*{message}"):
            p2.parse_args(argv.split())
    with pytest.raises(ValueError, match="unrecognized arguments: --step"):
        p2.parse_args(["--step", "3"])
    assert p2.parse_args(["--seed", "4294967295", "--clip", "inf"]).seed == 2**32 - 1


def test_devices(monkeypatch):
    assert p2.parse_args(["--device", "cpu"]).device == torch.device("cpu")
    for name, message in (("mps", "expected auto, cpu, cuda or cuda:N"), ("cuda:99", "not available here")):
        with pytest.raises(ValueError, match=f"--device {name}: {message}"):
            p2.parse_args(["--device", name])
    for found, fast in (
        ({}, False),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"avx2": 1}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert p2.parse_args(["--device", "cpu"]).bf16 == fast
    assert p2.parse_args(["--precision", "bf16"]).bf16 and not p2.parse_args(["--precision", "float32"]).bf16


def test_processes(monkeypatch):
    """Variables that another launcher left over do not count; torchrun's do, in modes that share work."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    args = p2.parse_args(["--mode", "grid"])
    assert (args.rank, args.world) == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    args = p2.parse_args(["--mode", "sample"])
    assert (args.rank, args.world) == (1, 2)
    for script, mode in ((p2, "grid"), (p4, "train")):
        with pytest.raises(ValueError, match=f"--mode {mode}: cannot share its work among 2 processes"):
            script.parse_args(["--mode", mode])


# ------------------------------------------------------------------ main


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (ValueError("--x:\n  no"), 2, "error: --x: no"),
        (OSError("a.pt: cannot be written"), 2, "error: a.pt: cannot be written"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "error: [Errno 2] No such file: 'a.png'"),
        (FileExistsError(17, "File exists", "out"), 2, "error: [Errno 17] File exists: 'out'"),
        (FloatingPointError("loss nan"), 1, "error: loss nan"),
        (MemoryError("8 GB"), 1, "error: memory ran out (8 GB); use a smaller --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "error: memory ran out (DefaultCPUAllocator",
        ),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory.\nGPU 0"),
            1,
            "error: memory ran out (CUDA out of memory",
        ),
        (
            ImportError("No module named 'tqdm'"),
            2,
            "error: No module named 'tqdm'; pip install -r requirements.txt",
        ),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(raised, code, line, monkeypatch, capsys):
    def fails(args):
        raise raised

    monkeypatch.setitem(p2.MODES, "train", fails)
    with pytest.raises(SystemExit) as stop:
        p2.main(["--mode", "train"])
    (found,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and found.startswith(line)


def test_a_fault_of_the_program_is_a_traceback(monkeypatch):
    monkeypatch.setitem(p2.MODES, "train", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        p2.main([])
    with pytest.raises(SystemExit) as stop:
        p2.main(["--mode", "x"])
    assert stop.value.code == 2


ALONE = """
import sys
for name in ("common", "tqdm", "matplotlib", "sklearn", "scipy", "torchvision"):
    sys.modules[name] = None
import torch
import {name} as script
args = script.parse_args({argv})
before = dict(vars(args))
model = script.train(args, *torch.load("data.pt"))
assert not model.training and vars(args) == before
model, settings = script.load_model("a.pt")
"""


@pytest.mark.parametrize("script", [p2, *(pytest.param(s, marks=pytest.mark.slow) for s in (p1, p3, p4))])
def test_copied_alone_it_trains_on_tensors(script, tmp_path):
    """With torch, numpy and pillow; the settings are not written to."""
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    torch.save(data(script), tmp_path / "data.pt")
    code = ALONE.format(name=script.__name__, argv=options(script, "a.pt", steps=1))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_in_a_notebook_and_as_a_module(tmp_path):
    """Pasted into a cell there is no __file__; `python -m FOLDER.SCRIPT` finds common.py."""
    source = (ROOT / "p2_diffusion.py").read_text(encoding="utf-8")
    cell = {"__name__": "cell"}
    exec(compile(source, "cell", "exec"), cell)
    assert cell["parse_args"](["--mode", "sample"]).ckpt
    command = [sys.executable, "-m", f"{ROOT.name}.p2_diffusion", "--mode", "eval", "--input", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "found no images" in done.stderr


@pytest.mark.slow
def test_an_ascii_terminal_without_a_home(trained, tmp_path):
    left_over = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", PYTHONIOENCODING="ascii", LC_ALL="C")
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")},
        **left_over,
    }
    command = [
        sys.executable,
        ROOT / "p2_diffusion.py",
        "--mode",
        "sample",
        "--ckpt",
        trained(p2),
        "--num",
        "1",
    ]
    out = os.fsencode(tmp_path) + b"/\xff\xc3\xa9"
    done = subprocess.run(
        [*command, "--sample-steps", "2", "--out", out], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(out)) == 10


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(tmp_path):
    """Exit code 130, one line, the checkpoint; and a reader of the bar that dies of the same Ctrl-C."""
    command = [sys.executable, "-u", ROOT / "p2_diffusion.py", *options(p2, tmp_path / "a.pt", steps=10**6)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(2)
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 130
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] > 0
