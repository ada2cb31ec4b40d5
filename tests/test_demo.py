"""The demo reports what it promises, upgrad never conflicts, the notebooks are saved executed."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", NOTEBOOKS / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_writes_a_table_and_figures(demo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "RATES", dict.fromkeys(demo.PROBLEMS, (0.1,)))
    monkeypatch.setattr(demo, "PILOT_SEEDS", (7,))
    demo.main(["--seeds", "2", "--epochs", "2", "--out", str(tmp_path)])
    table = (tmp_path / "table.txt").read_text()
    assert table in capsys.readouterr().out
    header, _, *rows = table.split("\n\n")[0].splitlines()
    assert [row.split()[:2] for row in rows] == [
        [problem, method] for problem in demo.PROBLEMS for method in demo.METHODS
    ]
    assert len(header.split("  ")) > 1
    for name in demo.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("problem", ["instance_wise", "multi_task"])
@pytest.mark.parametrize("method", ["mean", "upgrad"])
def test_upgrad_never_conflicts_and_the_mean_does(demo, problem, method):
    run = getattr(demo, problem)(demo.METHODS[method], lr=0.3, epochs=3, seed=0)
    assert run.losses.isfinite().all()
    assert run.opposed.max() > 0
    assert run.conflicts.any() == (method == "mean")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_saved_with_their_outputs(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for c in cells for output in c["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    shown = [output.get("data", {}) for output in outputs]
    assert any("image/png" in data for data in shown)
    text = json.dumps([output.get("text", []) for output in outputs])
    text += json.dumps([data.get("text/plain", []) for data in shown])
    assert not re.search(r"(?<![\w.])/\w+/\w+", text), "an absolute path of the machine"
