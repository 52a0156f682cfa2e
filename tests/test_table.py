"""scripts/table.py: mean ± standard deviation of what log directories hold, next to the paper's numbers."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from omegaconf import OmegaConf

from ldm.util import UserError

spec = importlib.util.spec_from_file_location("table_script", ROOT / "scripts" / "table.py")
assert spec is not None and spec.loader is not None
table = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = table  # for the dataclass
spec.loader.exec_module(table)


def run(folder: Path, name: str, seed: int, scores: dict, tokens: dict | None = None, target: str = "Shapes3DTrain"):
    """A log directory, as a run leaves it: of two validations, the second counts."""
    logdir = folder / name
    for part in ("configs", "metrics"):
        (logdir / part).mkdir(parents=True)
    node = {"target": f"ldm.data.dis.{target}"}
    project = {"model": {"params": {"first_stage_config": {}}}, "data": {"params": {"validation": node}}}
    OmegaConf.save(OmegaConf.create(project), logdir / "configs" / "now-project.yaml")
    OmegaConf.save(OmegaConf.create({"lightning": {"seed": seed}}), logdir / "configs" / "now-lightning.yaml")

    def entries(values: dict) -> dict:
        return {metric: {table.HEADLINES[metric]: value} for metric, value in values.items()}

    record = {"scores": entries(scores)} | ({"scores_of_tokens": entries(tokens)} if tokens else {})
    (logdir / "metrics" / "999000.json").write_text(json.dumps({"scores": entries(dict.fromkeys(scores, 0.0))}))
    (logdir / "metrics" / "1000000.json").write_text(json.dumps(record))
    return logdir


def shown(capsys, *arguments) -> list[str]:
    table.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_mean_and_standard_deviation_over_seeds(tmp_path, capsys):
    values = np.array([[0.91, 0.5], [0.8, 0.625], [1.0, 0.71]])
    for seed, (factor_vae, dci) in enumerate(values):
        run(
            tmp_path,
            f"2026-01-0{seed + 1}T00-00-00_shapes3d-vq-4-16+adagn",
            seed,
            {"factor_vae": factor_vae, "dci": dci},
        )
    lines = shown(capsys, tmp_path)
    mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
    cells = [f"{m:.3f} ± {s:.3f}".replace("0.", ".") for m, s in zip(mean, std, strict=True)]
    assert lines == [
        "|  | seeds | FactorVAE score | DCI | paper: FactorVAE score | paper: DCI |",
        "|---|---|---|---|---|---|",
        f"| shapes3d-vq-4-16 + adagn | 3 | {cells[0]} | {cells[1]} | .911 ± .101 | .637 ± .068 |",
    ]


def test_latex_compiles_by_eye(tmp_path, capsys):
    for seed in (0, 1):
        run(tmp_path, f"2026-01-0{seed + 1}T00-00-00_mpi3d_x", seed, {"mig": 0.25 + 0.5 * seed}, target="MPI3DTrain")
    assert shown(capsys, tmp_path, "--latex", "--metrics", "mig") == [
        r"\begin{tabular}{lcc}",
        r"\toprule",
        r" & seeds & MIG \\",
        r"\midrule",
        r"mpi3d\_x & 2 & $.500 \pm .354$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_tokens_have_a_line_of_their_own(tmp_path, capsys):
    run(
        tmp_path, "2026-01-01T00-00-00_shapes3d", 0, {"factor_vae": 0.5, "dci": 0.25}, {"factor_vae": 1.0, "dci": 0.125}
    )
    assert len(shown(capsys, tmp_path)) == 3
    assert shown(capsys, tmp_path, "--tokens")[2:] == [
        "| shapes3d | 1 | .500 | .250 | .999 ± .000 | .969 ± .030 |",
        "| shapes3d, tokens scored | 1 | 1.000 | .125 | .998 | .955 |",
    ]


def test_the_rows_of_the_paper():
    """By overlays and data set; the paper's own values make no row of their own."""

    def dci(dataset: str, *overlays: str, tokens: bool = False):
        found = table.paper_numbers(table.Row("", list(overlays), dataset), tokens)
        return found.get("dci")

    assert dci("shapes3d") == dci("shapes3d", "paper") == [0.969, 0.030]
    assert dci("shapes3d", "vector", "no_diffusion") == dci("shapes3d", "vector_no_diffusion") == 0.246
    assert dci("shapes3d", "paper", "no_diffusion", "vector") == 0.246
    assert dci("mpi3d", "adagn") == 0.268 and dci("cars3d") == [0.279, 0.022]
    assert dci("shapes3d", "tokens_5", "adagn") is None and dci("", "adagn") is None
    assert dci("shapes3d", tokens=True) == 0.955 and dci("shapes3d", "adagn", tokens=True) is None
    names = {path.stem for path in (ROOT / "configs" / "ablations").glob("*.yaml")}
    numbers = OmegaConf.load(ROOT / "scripts" / "paper_numbers.yaml")
    assert set(numbers.shapes3d) - {""} == names - {"paper"}, "every overlay has its number"


def test_unfinished_and_unscored_runs_are_left_out_and_named(tmp_path, capsys):
    good = run(tmp_path / "a" / "seed_0", "2026-01-01T00-00-00_a", 5, {"dci": 0.5})
    record = {"row": "Row A", "seed": 0, "overlays": [], "status": "done", "logdir": good.name}
    (good.parent / "run.json").write_text(json.dumps(record))
    run(good.parent, "2026-01-02T00-00-00_a", 5, {"dci": 0.75})  # not the one that counts
    running = run(tmp_path / "a" / "seed_1", "2026-01-01T00-00-00_a", 6, {"dci": 0.25})
    (running.parent / "run.json").write_text(json.dumps(record | {"seed": 1, "status": "running", "logdir": None}))
    empty = run(tmp_path / "a" / "seed_2", "2026-01-01T00-00-00_a", 6, {"dci": 0.25})
    (empty.parent / "run.json").write_text(json.dumps(record | {"seed": 2}))
    for file in (empty / "metrics").glob("*.json"):
        file.unlink()
    table.main([str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2:] == ["| Row A | 1 | .500 | .969 ± .030 |"]
    assert re.search(r"left out, running: .*seed_1", shown.err) and re.search("left out, without.*seed_2", shown.err)


def test_rows_are_of_one_name_data_set_and_configuration(tmp_path, capsys):
    """Names may end in numbers; two studies may have rows of one name; runs of other lengths are told."""
    run(tmp_path, "2026-01-01T00-00-00_shapes3d-vq-4-16", 0, {"dci": 0.5})
    run(tmp_path, "2026-01-01T00-00-00_shapes3d-vq-4-16-2", 1, {"dci": 0.25})
    run(tmp_path, "2026-01-01T00-00-00_shapes3d-vq-4-8", 0, {"dci": 0.125})
    longer = run(tmp_path, "2026-01-02T00-00-00_shapes3d-vq-4-8", 1, {"dci": 0.375})
    scored = json.loads((longer / "metrics" / "1000000.json").read_text())
    (longer / "metrics" / "1000000.json").write_text(json.dumps(scored | {"step": 7}))
    for seed, dataset in enumerate(("Shapes3DTrain", "MPI3DTrain")):
        logdir = run(
            tmp_path / dataset / f"seed_{seed}", "2026-01-01T00-00-00_encdiff", 5, {"dci": 0.5}, target=dataset
        )
        record = {"row": "EncDiff", "seed": seed, "overlays": [], "status": "done", "logdir": logdir.name}
        (logdir.parent / "run.json").write_text(json.dumps(record))
    table.main([str(tmp_path)])
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()[2:]) == [
        "| EncDiff (mpi3d) | 1 | .500 | .685 ± .044 |",
        "| EncDiff (shapes3d) | 1 | .500 | .969 ± .030 |",
        "| shapes3d-vq-4-16 | 2 | .375 ± .177 | .969 ± .030 |",
        "| shapes3d-vq-4-8 | 2 | .250 ± .177 | .969 ± .030 |",
    ]
    assert "'shapes3d-vq-4-8' averages scores of different steps: 0 (seed 0), 7 (seed 1)" in shown.err


def test_scores_that_are_none_show(tmp_path, capsys):
    """JSON has no NaN: a score that could not be computed is null there."""
    for seed, value in enumerate((0.5, None)):
        run(tmp_path, f"2026-01-0{seed + 1}T00-00-00_a", seed, {"mig": value})
    assert shown(capsys, tmp_path)[2] == "| a | 2 | nan ± nan |"


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        table.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="no scored runs"):
        table.main([str(tmp_path)])
    run(tmp_path, "2026-01-01T00-00-00_a", 0, {"dci": 0.5})
    with pytest.raises(UserError, match="no run was scored by mig; there are dci"):
        table.main([str(tmp_path), "--metrics", "mig"])
    with pytest.raises(UserError, match=r"unknown metric 'dcj'.*dci"):
        table.main([str(tmp_path), "--metrics", "dcj"])
    run(tmp_path, "2026-01-02T00-00-00_a", 0, {"dci": 0.25})
    with pytest.raises(UserError, match="two runs of 'a' with seed 0"):
        table.main([str(tmp_path)])
