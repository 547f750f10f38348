"""`rowgrad audit` from the command line: what it prints, its exit codes, and that it writes all or nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from rowgrad.cli import audit as command
from rowgrad.cli import main
from rowgrad.cli.output import staged
from rowgrad.errors import InputError
from rowgrad.uses.calibration import wilson

FILES = {"report.html", "scores.parquet", "metrics.jsonl"}
QUICK = ["--epochs", "2", "--hidden", "8"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_audit_of_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "digits", "--flip", "0.1", "--out", "found", "--epochs", "10"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar where there is no terminal
    assert {path.name for path in (tmp_path / "found").iterdir()} == FILES
    frame = pl.read_parquet("found/scores.parquet")
    assert frame.height == 1797
    assert frame["is_planted"].sum() == 180
    n_flagged = frame["likely_mislabelled"].sum()
    n_found = frame.filter(pl.col("likely_mislabelled") & pl.col("is_planted")).height
    assert f"Flagged {n_flagged} of 1,797 examples as likely mislabelled." in out
    (precision, *first_ends), (recall, *ends) = (
        (k / n, *wilson(k, n)) for k, n in ((n_found, n_flagged), (n_found, 180))
    )
    assert (
        f"Found {n_found} of 180 planted errors: precision of the flags {precision:.3f} (95%: {first_ends[0]:.2f} to "
        f"{first_ends[1]:.2f}), recall {recall:.3f} (95%: {ends[0]:.2f} to {ends[1]:.2f}), average precision of the "
        "ranking 0.9" in out
    )
    first = frame.sort("rank").row(0, named=True)
    words = next(line.split() for line in out.splitlines() if line.split()[:1] == ["1"])
    assert words[1:4] == [str(first["index"]), first["given"], first["suggested"]]
    assert re.search(r"An audited step, with gradient norms, took \d.\d\d times a plain step", out)
    assert f"Report: {tmp_path / 'found' / 'report.html'}" in out
    html = Path("found/report.html").read_text(encoding="utf-8")
    assert "rowgrad audit digits --flip 0.1 --out found --epochs 10" in html
    summary = json.loads(Path("found/metrics.jsonl").read_text().splitlines()[-1])
    assert summary["planted"]["n_found"] == n_found


def test_without_norms_the_same_is_found_for_less(capsys: pytest.CaptureFixture[str]) -> None:
    for out, options in (("with", []), ("without", ["--no-norms"])):
        assert main(["audit", "iris", "--flip", "0.2", "--out", out, *QUICK, *options]) == 0
    printed = capsys.readouterr().out
    assert "An audited step, without gradient norms, took" in printed
    one, other = (pl.read_parquet(f"{out}/scores.parquet") for out in ("with", "without"))
    assert one["mean_loss"].to_numpy() == pytest.approx(other["mean_loss"].to_numpy(), rel=1e-4)
    assert set(one.columns) - set(other.columns) == {
        *("mean_norm", "final_norm", "peak_norm", "peak_epoch", "self_influence", "spiking")
    }


def test_flips_that_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "iris", "--calibrate", "0.1", "--out", "found", "--epochs", "10"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ of 15 planted flips were flagged: estimated recall [01]\.\d\d \(95%: ", out)
    frame = pl.read_parquet("found/scores.parquet")
    assert frame["planted"].sum() == 15
    assert not (frame["planted"] & frame["likely_mislabelled"]).any()
    assert json.loads(Path("found/metrics.jsonl").read_text().splitlines()[-1])["calibration"]["n_planted"] == 15


def test_the_same_seed_writes_the_same_scores() -> None:
    for out, seed in (("one", "4"), ("two", "4"), ("three", "5")):
        assert main(["audit", "iris", "--flip", "0.2", "--seed", seed, "--out", out, *QUICK]) == 0
    one, two, three = (pl.read_parquet(f"{out}/scores.parquet") for out in ("one", "two", "three"))
    assert one.equals(two)
    assert not one.equals(three)


def test_a_table_with_its_own_target(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{k % 9},{'red' if k % 3 else 'blue'},{k * k % 11},{(k % 9) * 2.5}\n" for k in range(60))
    Path("cars.csv").write_text("doors,color,weight,price\n" + rows)
    assert main(["audit", "cars.csv", "--target", "price", "--drop", "weight", "--rows", "0.8", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "Regression on price, from 0 to 20: it holds numbers with fractions." in out
    assert "Text columns were one-hot encoded: color (2 values)." in out
    assert "R² on the rows held out: " in out
    assert "Flagged" not in out
    frame = pl.read_parquet("rowgrad-audit-cars/scores.parquet")
    assert frame.height == 48
    assert frame["line"].to_list() == [index + 2 for index in frame["index"]]


def _folder(name: str) -> Callable[[], None]:
    return lambda: Path(name).mkdir()


def _file(name: str, text: str) -> Callable[[], None]:
    return lambda: Path(name).write_text(text) and None


TABLE = _file("t.csv", "a,label\n1,x\n2,x\n3,y\n4,y\n")
# fmt: off
BAD = {
    "no such file":        (None, ["nosuch.csv"], "nosuch.csv: no such file, and not a bundled set (digits,"),
    "unknown column":      (TABLE, ["t.csv", "--target", "z"], "t.csv: no column is called 'z'; found a, label"),
    "empty file":          (_file("t.csv", ""), ["t.csv"], "t.csv: the file is empty"),
    "unknown extension":   (_file("t.txt", "x"), ["t.txt"], "t.txt: cannot read .txt; give .csv"),
    "a directory":         (_folder("d.csv"), ["d.csv"], "d.csv is a directory; give one file"),
    "junk for Parquet":    (_file("t.parquet", "junk"), ["t.parquet"], "t.parquet: not a readable Parquet file ("),
    "out is a file":       (TABLE, ["t.csv", "--out", "t.csv"], "t.csv: this is a file; name a directory"),
    "out under a file":    (TABLE, ["t.csv", "--out", "t.csv/deep"], "t.csv/deep: cannot be written (Not a directory)"),
    "out in no place":     (TABLE, ["t.csv", "--out", "/proc/none"], "--out /proc/none: cannot be written ("),
    "flip too large":      (TABLE, ["t.csv", "--flip", "0.6"], "--flip 0.6: the share of corrupted targets must be"),
    "flip below zero":     (TABLE, ["t.csv", "--flip", "-0.1"], "--flip -0.1: the share of corrupted targets"),
    "calibrate too much":  (TABLE, ["t.csv", "--calibrate", "0.6"], "--calibrate 0.6: the share of labels to"),
    "two kinds of flips":  (TABLE, ["t.csv", "--calibrate", "0.1", "--flip", "0.1"], "--flip and --calibrate both"),
    "quantities flipped":  (None, ["diabetes", "--calibrate", "0.1"], "only labels can be flipped"),
    "flip not a number":   (TABLE, ["t.csv", "--flip", "x"], "Invalid value for '--flip'"),
    "no epochs":           (TABLE, ["t.csv", "--epochs", "0"], "--epochs 0: at least one epoch is needed"),
    "widths":              (TABLE, ["t.csv", "--hidden", "a"], "--hidden a: expected widths separated by commas"),
    "rows":                (TABLE, ["t.csv", "--rows", "1.5"], "--rows 1.5: the share of rows to audit"),
    "too few rows":        (TABLE, ["t.csv", "--rows", "0.5"], "t.csv: the class '"),
    "an unknown task":     (TABLE, ["t.csv", "--task", "guess"], "Invalid value for '--task'"),
    "an unknown option":   (TABLE, ["t.csv", "--resume"], "No such option: --resume. There are --batch-size, "),
    "training diverged":   (TABLE, ["t.csv", "--lr", "1e30"], "training diverged in epoch"),
    "no data":             (None, [], "Missing argument"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    prepare, arguments, message = BAD[case]
    if prepare is not None:
        prepare()
    before = _everything(tmp_path)
    assert main(["audit", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rowgrad: ")
    assert message in err
    assert err.count("\n") == 1
    assert _everything(tmp_path) == before


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rowgrad 0.")
    assert main(["audit", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (
        "--target",
        "--flip",
        "--calibrate",
        "--no-norms",
        "--out",
        "--epochs",
        "--seed",
        "--rows",
        "--task",
        "--drop",
        "--nan",
    ):
        assert option in text
    assert main(["nosuch"]) == 2
    assert "No such command 'nosuch'" in capsys.readouterr().err


def test_an_earlier_audit_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    assert main(["audit", "iris", "--out", "here", *QUICK]) == 0
    first = Path("here/scores.parquet").read_bytes()
    Path("here/notes.txt").write_text("mine")
    assert main(["audit", "iris", "--seed", "1", "--out", "here", *QUICK]) == 0
    assert Path("here/scores.parquet").read_bytes() != first
    assert _everything(tmp_path / "here") == FILES | {"notes.txt"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_while_writing_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    if exists:
        assert main(["audit", "iris", "--out", "deep/here", *QUICK]) == 0
    before = {name: (tmp_path / name).read_bytes() for name in _everything(tmp_path) if (tmp_path / name).is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(command, "write_page", full)
    assert main(["audit", "iris", "--seed", "1", "--out", "deep/here", *QUICK]) == 2
    assert capsys.readouterr().err == "rowgrad: report.html: No space left on device\n"
    after = {name: (tmp_path / name).read_bytes() for name in _everything(tmp_path) if (tmp_path / name).is_file()}
    assert after == before
    assert (tmp_path / "deep").exists() is exists


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out) as stage:
        (stage / "x").write_text("1")
        assert not out.exists()
    assert _everything(tmp_path) == {"a", "a/b", "a/b/x"}
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_the_block_of_a_staged_directory_may_fail(tmp_path: Path) -> None:
    def stop(stage: Path) -> None:
        (stage / "x").write_text("1")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), staged(tmp_path / "a") as stage:
        stop(stage)
    assert _everything(tmp_path) == set()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="this is a file"), staged(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "told to end")],
)
def test_stopped_from_outside(tmp_path: Path, sent: signal.Signals, code: int, said: str) -> None:
    """Ctrl-C and `kill` in the middle of training leave nothing."""
    program = "import sys; from rowgrad.cli import main; sys.exit(main())"
    arguments = ["audit", "digits", "--epochs", "100000", "--out", "x"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 60
    while not _everything(tmp_path):  # the temporary folder appears when training begins
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"rowgrad: {said}; no results were written\n"
    assert _everything(tmp_path) == set()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "rowgrad.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["audit", "iris"]) == 2
    assert capsys.readouterr().err == "rowgrad: the command needs typer; install rowgrad[app]\n"


def test_where_to_write_is_asked_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rowgrad.cli.audit.read_table", lambda *a, **k: pytest.fail("the data were read"))
    (tmp_path / "taken").touch()
    assert main(["audit", "digits", "--out", str(tmp_path / "taken")]) == 2
    assert "this is a file" in capsys.readouterr().err


def test_a_label_is_suggested_where_one_is_flagged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["audit", "iris", "--epochs", "3", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    scores = pl.read_parquet(tmp_path / "out" / "scores.parquet").sort("rank").head(10)
    for row in scores.iter_rows(named=True):
        line = next(line for line in printed.splitlines() if line.split()[:2] == [str(row["rank"]), str(row["index"])])
        shown = line.split()[3] == row["suggested"]
        assert shown == row["likely_mislabelled"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("digits", "It learned next to nothing, and the flags say nothing about the labels"),
        ("diabetes", "In the last epoch 100% of the target's spread was left unexplained"),
    ],
)
def test_a_network_that_learned_nothing_is_told(data: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", data, "--out", "idle", "--epochs", "1", "--hidden", "4", "--lr", "1e-6"]) == 0
    assert re.search(said, capsys.readouterr().out)
    assert re.search(said.replace("'", "&#x?[0-9]*;"), Path("idle/report.html").read_text())
    assert main(["audit", data, "--out", "busy", "--epochs", "20"]) == 0
    assert not re.search(said, capsys.readouterr().out)
    assert 'class="doubt"' not in Path("busy/report.html").read_text()
