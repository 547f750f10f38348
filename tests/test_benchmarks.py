"""The benchmark's machinery at tiny sizes; nothing here depends on how long anything takes."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import counting, floors, page, paths, readme, results, sweep
from benchmarks.methods import METHODS
from benchmarks.ours import FIRST, FORWARD
from benchmarks.probe import Setting
from benchmarks.reference import TINY_TOLERANCE, TOLERANCE, Reference, make_reference
from benchmarks.task import OURS, OUTPUTS, PLAIN, Goal
from benchmarks.timing import rounds_for, side_by_side, summary
from benchmarks.workloads import WORKLOADS

from tests.reference import flat, rows_by_loop

pytestmark = [  # PyTorch's, from what the rivals use
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
]

ROOT = Path(__file__).parents[1]
STRUCTURES = ["mlp-32", "cnn", "resnet", "gpt-64", "lstm", "embedding"]  # the others differ from these in sizes only
NEED_NO_RIVAL = [OURS, FIRST, FORWARD, "plain loop", "vmap(grad)", "vmap(grad), chunks of 8", "jvp", "double backward"]


@pytest.fixture(scope="module", params=STRUCTURES)
def case(request: pytest.FixtureRequest) -> tuple[str, Reference]:
    return request.param, make_reference(WORKLOADS[request.param].task(tiny=True))


@pytest.mark.parametrize("name", NEED_NO_RIVAL)
def test_methods_give_the_reference(case: tuple[str, Reference], name: str) -> None:
    key, reference = case
    method = next(m for m in METHODS if m.name == name)
    for output in method.outputs:
        task = WORKLOADS[key].task(tiny=True, for_hooks=method.for_hooks)
        step = method.make(task, output, reference.goal)
        step()
        task.model.zero_grad(set_to_none=True)
        assert reference.error(output, step()) < TINY_TOLERANCE, output


def test_the_reference_is_that_of_the_tests(case: tuple[str, Reference]) -> None:
    key, reference = case
    task = WORKLOADS[key].task(tiny=True).to(torch.float64)
    rows = rows_by_loop(task.model, task.batch, lambda model, x, y: task.loss(model(x), y))
    every = flat(rows)
    torch.testing.assert_close(reference.norms, every.norm(dim=1))
    direction = reference.goal.direction(task.params())
    torch.testing.assert_close(reference.dot, every @ torch.cat([direction[name].flatten() for name in rows]))
    torch.testing.assert_close(reference.gram, every @ every[list(reference.sampled)].T)
    clipped = reference.goal.weights(every.square().sum(1)) @ every
    torch.testing.assert_close(torch.cat([reference.clipped[name].flatten() for name in rows]), clipped)


def test_hooks_see_the_same_losses() -> None:
    for workload in WORKLOADS.values():
        plain, seen = workload.task(tiny=True), workload.task(tiny=True, for_hooks=True)
        torch.testing.assert_close(plain.losses(), seen.losses())


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_wrong_result_is_noticed(output: str) -> None:
    task = WORKLOADS["mlp-32"].task(tiny=True)
    reference = make_reference(task)
    step = next(m for m in METHODS if m.name == "plain loop").make(task, output, reference.goal)
    result = step()
    wrong = {name: 1.01 * r for name, r in result.items()} if isinstance(result, dict) else 1.01 * result
    assert reference.error(output, wrong) > TOLERANCE
    if isinstance(result, dict):
        del result["0.weight"]
        with pytest.raises(ValueError, match="1 of 8 parameters are missing"):
            reference.error(output, result)


def test_a_reference_survives_its_file(tmp_path: Path) -> None:
    reference = make_reference(WORKLOADS["lstm"].task(tiny=True))
    reference.save(tmp_path / "reference.pt")
    loaded = Reference.load(tmp_path / "reference.pt")
    assert loaded.goal == reference.goal
    assert loaded.error("norms", reference.norms) == 0
    assert loaded.error("clipped", reference.clipped) == 0


def test_slow_methods_sit_rounds_out() -> None:
    model = torch.nn.Linear(1, 1)
    steps = {name: (model, lambda: None) for name in (PLAIN, "fast", "slow")}
    seconds = side_by_side(steps, {"fast": 5, "slow": 2})
    assert [s is not None for s in seconds["slow"]] == [True, True, False, False, False]
    assert all(s is not None for name in (PLAIN, "fast") for s in seconds[name])
    assert summary(seconds, "slow")["rounds"] == 2
    assert rounds_for(1e9, share=1.0) < rounds_for(1e-9, share=1.0)


def test_what_is_quick_is_repeated_and_what_is_slow_is_not_even_warmed_up() -> None:
    calls = {PLAIN: 0, "fast": 0, "slow": 0}

    def step(name: str) -> None:
        calls[name] += 1

    steps = {name: (torch.nn.Linear(1, 1), partial(step, name)) for name in calls}
    side_by_side(steps, {"fast": 5, "slow": 2}, cold=["slow"], quick=[PLAIN, "fast"])
    assert calls == {PLAIN: 1 + 2 * 5, "fast": 1 + 2 * 5, "slow": 2}


def test_the_ratio_is_taken_within_a_round() -> None:
    seconds: dict[str, list[float | None]] = {PLAIN: [1.0, 10.0, 100.0], "slow": [2.0, None, 200.0]}
    assert summary(seconds, "slow") == {"rounds": 2, "seconds": [101.0, 51.5, 150.5], "ratio": [2.0, 2.0, 2.0]}


def test_products_are_counted() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert counting.count(lambda: a @ b) == (60, 0, 4 * (12 + 20 + 15))
    assert counting.count(lambda: (a + a).T) == (0, 12, 4 * 3 * 12)
    assert counting.count(lambda: torch.zeros(3, 5).addmm_(a, b)).products == 60


def test_products_of_fused_kernels_are_counted() -> None:
    n, t, d, h = 2, 5, 3, 4
    lstm, x = torch.nn.LSTM(d, h, batch_first=True), torch.randn(n, t, d)
    forward = n * t * (4 * h * d + 4 * h * h)
    assert counting.count(lambda: lstm(x)).products == forward
    assert counting.count(lambda: lstm(x)[0].sum().backward()).products == 3 * forward
    q, k, v = (torch.randn(n, 1, t, d, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    assert counting.count(lambda: attention(q, k, v)).products == 2 * n * t * t * d
    assert counting.count(lambda: attention(q, k, v).sum().backward()).products == 7 * n * t * t * d


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_products_of_convolutions_are_counted_by_group(kind: type[torch.nn.Conv1d], groups: int) -> None:
    layer, x = kind(4, 6, 3, groups=groups, padding=1), torch.randn(2, 4, 5, requires_grad=True)
    forward = 2 * 5 * 4 * 6 * 3 // groups
    assert counting.count(lambda: layer(x)).products == forward
    assert counting.count(lambda: layer(x).sum().backward()).products == 3 * forward


@pytest.mark.parametrize("key", ["mlp-32", "gpt-64"])
def test_floors_of_a_tiny_workload(key: str) -> None:
    steps = floors.measure(key, Setting(threads=1, tiny=True))
    plain, least = steps[PLAIN], steps[floors.DATA_PASS]
    assert plain["ratio"][0] == 1.0
    assert least["products"] < plain["products"] <= steps["clipped"]["products"]
    assert all(sum(m["kinds"].values()) > 0 for m in steps.values())
    shown = floors.table(key, steps).splitlines()
    assert len(shown) == 2 + len(steps)
    assert {line.count("|") for line in shown} == {len(floors.HEAD) + 1}


def test_norms_of_examples_of_one_position_need_no_more_products() -> None:
    """They are read off the factors: what is counted is the forward and the data pass."""
    steps = floors.steps_of("mlp-32", tiny=True)
    counted = {name: counting.count(steps[name][1]) for name in ("norms", floors.DATA_PASS) for _ in range(2)}
    assert counted["norms"].products == counted[floors.DATA_PASS].products


def test_section_5_at_one_small_point() -> None:
    points = [sweep.measure(p, m, threads=1) for p in (4, 8) for m in (2, 3)]
    largest = points[-1]
    n = 3 * sweep.N_LAYERS * 3 * 8 * 8 - 3 * 8 * 8  # three products a layer, but no gradient of the input
    assert largest["products"]["plain"] == n
    assert largest["products"]["naive"] == 2 * n
    assert sweep.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert sweep.fit(points).keys() >= {"plain, seconds", "entries added by norms"}


def made_up() -> dict:
    """Results of two workloads; one method is wrong, and one says something that HTML would take for a tag."""
    right = {"status": "ok", "reason": "", "error": 1e-7, "peak_bytes": 2_000_000, "rounds": 3}
    cell = {
        OURS: right | {"seconds": [0.01, 0.009, 0.012], "ratio": [0.8, 0.7, 0.9]},
        FIRST: right | {"seconds": [0.05, 0.04, 0.06], "ratio": [3.5, 3.0, 4.0]},
        "Opacus hooks": right | {"seconds": [0.02, 0.02, 0.02], "ratio": [1.6, 1.5, 1.7]},
        "TorchJD": right | {"seconds": None, "status": "wrong", "reason": "not within rounding"},
        "jvp": {"status": "failed", "reason": "no <tag>", "error": None, "peak_bytes": None, "seconds": None},
    }
    workload = {
        "title": "made up",
        "n_examples": 4,
        "n_parameters": 100,
        "plain": {"peak_bytes": 1_000_000, "seconds": {"norms": [0.0125, 0.012, 0.013]}},
        "host": {"call": 0.002, "backward": 0.001},
        "commits": {"norms": "abc"},
        "outputs": {"norms": cell},
    }
    other = workload | {
        "title": "made up too",
        "plain": {"peak_bytes": 1_000_000, "seconds": {"dot": [0.0125, 0.012, 0.013]}},
        "commits": {"dot": "def"},
        "outputs": {
            "dot": {m: cell[m] for m in cell if m != FIRST}
            | {FORWARD: right | {"seconds": [0.02, 0.02, 0.02], "ratio": [0.7, 0.6, 0.8]}}
        },
    }
    return {"about": results.about(2), "workloads": {"a": workload, "b": other}}


def made_up_point(depth: int) -> paths.Point:
    """Twice the seconds for each level by enumeration, in proportion to the depth by the others."""
    seconds = {"enumeration": 1e-5 * 2.0**depth} if depth < 10 else {}
    seconds |= dict.fromkeys(("sweep", "count", "engine"), 1e-05 * depth)
    return {"depth": depth, "paths": 2**depth, "edges": 2 * depth, "seconds": seconds, "errors": {}}


def test_the_growth_by_depth_is_fitted_and_shown() -> None:
    points = [made_up_point(depth) for depth in (1, 2, 4, 300)]
    assert paths.growth(points) == pytest.approx({"enumeration": 2, "sweep": 1, "count": 1, "engine": 1})
    assert paths.table(points).splitlines()[-1].split() == ["300", "2.0e+90", "600", "-", "3", "3", "3"]
    assert paths.shown(10**5000) == "1e5000"
    assert paths.growth(points[:2]) == {}


@pytest.mark.parametrize(
    ("name", "depth", "n_paths"), [("products", 5, 2**5), ("products", 40, 2**40), ("net", 2, 100)]
)
def test_the_sum_over_paths_and_the_sweep_are_the_engines(name: str, depth: int, n_paths: int, monkeypatch) -> None:
    monkeypatch.setattr(paths, "SECONDS", 0.0)
    point = paths.measure(name, depth)
    assert point["paths"] == n_paths
    assert set(point["seconds"]) == set(paths.METHODS) - (set() if n_paths < 1000 else {"enumeration"})
    assert max(point["errors"].values()) < 1e-12


def test_the_page_shows_everything() -> None:
    point = {"p": 8, "m": 4, "seconds": {}, "products": {}, "entries": {}}
    points = []
    for p in (8, 16, 32):
        values = {name: float(p) for name in sweep.METHODS}
        points.append(point | {"p": p, "seconds": values, "products": values, "entries": values})
    swept = {"points": points, "slopes": sweep.fit(points), "n_layers": 3, "naive_examples": 8}
    seconds = {PLAIN: 0.1, f"{OURS}: norms": 0.2}
    axis = [{"value": v, "seconds": seconds if v < 4 else {}, "reason": "" if v < 4 else "too slow"} for v in (1, 2, 4)]
    grown = {"axes": {"b": axis}, "base": {"b": 1, "t": 2, "width": 3, "depth": 4, "vocabulary": 5}}
    walked = {"graphs": {name: [made_up_point(depth) for depth in (1, 2, 4, 300)] for name in paths.FAMILIES}}
    kinds = dict.fromkeys(floors.KINDS, 0.25)
    step = {"seconds": [1.0] * 3, "ratio": [1.0] * 3, "products": 3_000_000, "bytes": 5_000_000, "kinds": kinds}
    least = {"workloads": {"cnn": {"title": "least", "steps": {PLAIN: step, "norms": step | {"ratio": [1.06] * 3}}}}}
    text = page.render(made_up(), grown, swept, walked, least)
    for shown in (
        "made up too",
        "Opacus hooks",
        "not within rounding",
        "no &lt;tag&gt;",
        "too slow",
        "0.8",
        "1.6 (2",
        "jvp <b>0.7</b>",
        "eq. 3 costs 2.0 times as much",
        "2.0e+90",
        "<h3>least</h3>",
        '<td class="n">1.06</td><td class="n">1.05</td><td class="n">3</td>',
    ):
        assert shown in text, shown
    charts = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    assert len(charts) == 5 + 2 + 1 + 4 + 2
    for chart in charts:
        ET.fromstring(f"<svg{chart}</svg>")
    assert "http://" not in text
    assert page.render({}, {}, {}, {}, {})


def test_a_statement_is_confirmed_only_by_figures() -> None:
    plain = {"plain": 1.0, "naive": 2.0, "both": 1.0, "norms": 1.0}
    point = {"p": 512, "m": 256, "products": plain, "entries": dict.fromkeys(plain, 0.0)}

    def found(naive_seconds: float, naive_products: float) -> list[bool]:
        told = point | {"seconds": plain | {"naive": naive_seconds}, "products": plain | {"naive": naive_products}}
        return [v["found"].startswith("Confirmed") for v in page.verdicts({"points": [told], "n_layers": 3})]

    assert found(30.0, 2.0) == [True, True, True]
    assert found(3.0, 2.0) == [True, True, False]
    assert found(30.0, 3.0) == [False, True, True]


def test_the_readme_has_the_figures_of_the_results() -> None:
    assert readme.page() == readme.README.read_text(encoding="utf-8")


def test_a_line_of_the_readme() -> None:
    assert readme.block(made_up()).splitlines()[-2:] == [
        "| made up | 0.8 (1.6) |  |  |  |  | 3.5 |",
        "| made up too |  |  |  | 0.8, jvp 0.7 (1.6) |  |  |",
    ]


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.json"
    assert results.read(path) == {}
    results.write(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == results.read(path) == {"a": 1}


@pytest.mark.long
def test_a_run_keeps_its_lines_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "benchmarks.runner", "--tiny", "--threads", "1", "--seconds", "0.1"]
    command += ["--only", "lstm", "--file", str(path), "--outputs"]
    subprocess.run([*command, "dot"], cwd=ROOT, check=True)
    dot = results.read(path)["workloads"]["lstm"]["outputs"]["dot"]
    assert set(dot) == {m.name for m in METHODS if "dot" in m.outputs}
    assert dot[OURS]["status"] == dot["jvp"]["status"] == "ok"
    assert all(m["status"] == "ok" or m["reason"] for m in dot.values())
    done = subprocess.run([*command, "dot", "norms"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert OUTPUTS["norms"] in done.stdout
    assert OUTPUTS["dot"] not in done.stdout
    workload = results.read(path)["workloads"]["lstm"]
    assert workload["outputs"]["dot"] == dot
    assert set(workload["plain"]["seconds"]) == {"dot", "norms"}


def test_every_method_has_a_place_in_the_legend() -> None:
    assert {page.family(m.name) for m in METHODS} <= page.LEGEND.keys()


def test_files_measured_otherwise_are_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    results.write(path, results.begun(path, 2) | {"workloads": {"a": 1}})
    assert results.begun(path, 2)["workloads"] == {"a": 1}
    for threads, tiny in ((1, False), (2, True)):
        with pytest.raises(SystemExit, match=r"threads was 2|tiny was False"):
            results.begun(path, threads, tiny=tiny)
    assert "workloads" not in results.begun(path, 1, fresh=True)


@pytest.mark.parametrize("content", ["", "{", "[1]", b"\xff"])
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "cpu.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match="no file of results"):
        results.begun(path, 2)


def test_weights_of_clipping() -> None:
    weights = replace(Goal(1.0), max_norm=2.0).weights(torch.tensor([1.0, 16.0, 0.0]))
    assert weights.tolist() == [1.0, 0.5, 1.0]
