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

from ldm.callbacks.start import write_start
from ldm.cli.configure import compose
from ldm.evaluation.paper import KEYS, PAPER
from ldm.util import UserError

spec = importlib.util.spec_from_file_location("table_script", ROOT / "scripts" / "table.py")
assert spec is not None and spec.loader is not None
table = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = table  # for the dataclass
spec.loader.exec_module(table)


def paper_config(dataset: str = "shapes3d", *overlays: str):
    """A configuration with the paper's values."""
    names = [f"latent-diffusion/{dataset}-vq-4-16", "ablations/paper", *(f"ablations/{name}" for name in overlays)]
    return compose([ROOT / "configs" / f"{name}.yaml" for name in names], complete=False)


def values(config, dataset: str = "shapes3d") -> dict:
    """What `table.py` compares."""
    factors = PAPER["datasets"][dataset].get("factors", "")
    return {key: OmegaConf.select(config, key) for key in KEYS} | {"factors": factors}


def run(folder: Path, name: str, seed: int, scores: dict, tokens: dict | None = None, dataset="shapes3d", overlays=()):
    """A log directory, as a run leaves it: of two validations, the second counts."""
    logdir = folder / name
    for part in ("configs", "metrics"):
        (logdir / part).mkdir(parents=True)
    project = OmegaConf.masked_copy(paper_config(dataset, *overlays), ["model", "data"])
    OmegaConf.save(project, logdir / "configs" / "now-project.yaml")
    OmegaConf.save(OmegaConf.create({"lightning": {"seed": seed}}), logdir / "configs" / "now-lightning.yaml")

    def entries(values: dict) -> dict:
        return {metric: {table.HEADLINES[metric]: value} for metric, value in values.items()}

    sizes = PAPER["datasets"][dataset]["factors"].split()
    factors = {f"factor {place}": int(size) for place, size in enumerate(sizes)}
    record = {"factors": factors, "scores": entries(scores)} | ({"scores_of_tokens": entries(tokens)} if tokens else {})
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
            overlays=["adagn"],
        )
    lines = shown(capsys, tmp_path)
    mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
    cells = [f"{m:.3f} ± {s:.3f}".replace("0.", ".") for m, s in zip(mean, std, strict=True)]
    assert lines == [
        "|  | seeds | FactorVAE score | DCI | paper: FactorVAE score | paper: DCI |",
        "|---|---|---|---|---|---|",
        f"| shapes3d-vq-4-16 + adagn | 3 | {cells[0]} | {cells[1]} | .911 ± .101 | .637 ± .068 |",
    ]


def test_the_configuration_of_the_latest_start_counts(tmp_path):
    """It was resumed with another seed, by a clock that is behind."""
    logdir = run(tmp_path, "2024-01-02T00-00-00_a", 0, {"factor_vae": 0.5})
    stamp = write_start(logdir / "configs", "2023-01-01T00-00-00", {"started": "2024-01-02T05:00:00Z"})
    for kind, content in (("project", (logdir / "configs" / "now-project.yaml").read_text()),
                          ("lightning", "lightning: {seed: 7}")):  # fmt: skip
        (logdir / "configs" / f"{stamp}-{kind}.yaml").write_text(content)
    (row,), _ = table.collect([tmp_path])
    assert set(row.scores) == {"7"}


def test_latex_compiles_by_eye(tmp_path, capsys):
    for seed in (0, 1):
        run(tmp_path, f"2026-01-0{seed + 1}T00-00-00_mpi3d_x", seed, {"mig": 0.25 + 0.5 * seed}, dataset="mpi3d")
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


def test_every_number_of_the_paper_belongs_to_an_overlay():
    """With the paper's other values; no overlay needs a number."""
    stems = [path.stem for path in (ROOT / "configs" / "ablations").glob("*.yaml") if path.stem != "paper"]
    models = [values(paper_config("shapes3d", *names)) for names in ([], *([stem] for stem in stems))]
    found = {}
    for dataset, keys in PAPER["datasets"].items():
        data = values(paper_config(dataset), dataset)
        found[dataset] = [table.paper_numbers(model | {key: data[key] for key in keys})[0] for model in models]
    for row in PAPER["rows"]:
        for dataset, numbers in row["scores"].items():
            assert numbers in found[dataset], (dataset, row["has"])


@pytest.mark.parametrize(
    "dataset, overlays, expected",
    [
        ("shapes3d", [], [0.969, 0.030]),
        ("shapes3d", ["adagn"], [0.637, 0.068]),
        ("shapes3d", ["schedule_linear"], 0.930),
        ("shapes3d", ["vector", "no_diffusion"], 0.246),
        ("shapes3d", ["vector_no_diffusion"], 0.246),
        ("shapes3d", ["../studies/adagn/scale"], None),
        ("shapes3d", ["tokens_5", "adagn"], None),
        ("mpi3d", ["adagn"], 0.268),
        ("cars3d", ["adagn"], None),
    ],
)
def test_the_paper_s_rows_are_known_by_what_they_are(dataset, overlays, expected):
    numbers, differ = table.paper_numbers(values(paper_config(dataset, *overlays), dataset))
    assert numbers.get("dci") == expected and bool(differ) == (expected is None)


@pytest.mark.parametrize(
    "change",
    [
        "model.params.loss_type=l1",
        "model.params.beta_schedule=mine",
        "model.params.cond_stage_config.params.latent_unit=21",
        "model.params.cond_stage_config.params.context_dim=16",
        "data.params.validation.target=ldm.data.rendered.RenderedTrain",
        "factors=4 4 4 4 4 4",
        "model.target=mine.Diffusion",
    ],
)
def test_other_values_have_no_number(change):
    """The differing value is named."""
    key, _, value = change.partition("=")
    numbers, differ = table.paper_numbers(values(paper_config()) | {key: value})
    assert not numbers and differ[0].startswith(f"{key} is {value}, and")
    release = compose([ROOT / "configs/latent-diffusion/shapes3d-vq-4-16.yaml"], complete=False)
    assert not table.paper_numbers(values(release))[0], "the release's values are not the paper's"


def test_unfinished_and_unscored_runs_are_left_out_and_named(tmp_path, capsys):
    good = run(tmp_path / "a" / "seed_0", "2026-01-01T00-00-00_a", 5, {"dci": 0.5})
    record = {"row": "Row A", "seed": 0, "status": "done", "logdir": good.name}
    (good.parent / "run.json").write_text(json.dumps(record))
    run(good.parent, "2026-01-02T00-00-00_a", 5, {"dci": 0.75})  # not the one that counts
    running = run(tmp_path / "a" / "seed_1", "2026-01-01T00-00-00_a", 6, {"dci": 0.25})
    (running.parent / "run.json").write_text(json.dumps(record | {"seed": 1, "status": "running", "logdir": None}))
    empty = run(tmp_path / "a" / "seed_2", "2026-01-01T00-00-00_a", 6, {"dci": 0.25})
    (empty.parent / "run.json").write_text(json.dumps(record | {"seed": 2}))
    for file in (empty / "metrics").glob("*.json"):
        file.unlink()
    damaged = run(tmp_path / "a" / "seed_3", "2026-01-01T00-00-00_b", 7, {"dci": 0.25}, overlays=["tokens_5", "adagn"])
    (damaged.parent / "run.json").write_text('{"row": "Row')
    table.main([str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2:] == ["| Row A | 1 | .500 | .969 ± .030 |", "| b | 1 | .250 |  |"]
    assert shown.err.count("no numbers of the paper for b. b differs: model.params") == 1
    assert re.search(r"left out, running: .*seed_1", shown.err) and re.search("left out, without.*seed_2", shown.err)


def test_rows_are_of_one_name_data_set_and_configuration(tmp_path, capsys):
    """Names may end in numbers; two studies may have rows of one name; runs of other lengths are named."""
    run(tmp_path, "2026-01-01T00-00-00_shapes3d-vq-4-16", 0, {"dci": 0.5})
    run(tmp_path, "2026-01-01T00-00-00_shapes3d-vq-4-16-2", 1, {"dci": 0.25})
    run(tmp_path, "2026-01-01T00-00-00_shapes3d-vq-4-8", 0, {"dci": 0.125})
    longer = run(tmp_path, "2026-01-02T00-00-00_shapes3d-vq-4-8", 1, {"dci": 0.375})
    scored = json.loads((longer / "metrics" / "1000000.json").read_text())
    (longer / "metrics" / "1000000.json").write_text(json.dumps(scored | {"step": 7}))
    for seed, dataset in enumerate(("shapes3d", "mpi3d")):
        logdir = run(
            tmp_path / dataset / f"seed_{seed}", "2026-01-01T00-00-00_encdiff", 5, {"dci": 0.5}, dataset=dataset
        )
        record = {"row": "EncDiff", "seed": seed, "status": "done", "logdir": logdir.name}
        (logdir.parent / "run.json").write_text(json.dumps(record))
    table.main([str(tmp_path)])
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()[2:]) == [
        "| EncDiff (MPI3DTrain, 6 6 2 3 3 40 40) | 1 | .500 | .685 ± .044 |",
        "| EncDiff (Shapes3DTrain, 10 10 10 8 4 15) | 1 | .500 | .969 ± .030 |",
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


def test_rows_are_compared_seed_by_seed(tmp_path, capsys):
    for seed, (first, second) in enumerate([(0.9, 0.5), (0.8, 0.55), (0.7, 0.75)]):
        run(tmp_path, f"2026-01-01T00-00-0{seed}_ours", seed, {"dci": first})
        run(tmp_path, f"2026-01-01T00-00-0{seed}_theirs", seed, {"dci": second}, overlays=["adagn"])
    lines = shown(capsys, tmp_path, "--against", "ours")
    # The differences .4, .25, -.05: t = mean / (std / sqrt 3) = 1.512, 2 degrees of freedom.
    assert lines[-1] == "| ours - theirs | DCI | 3 | .200 ± .229 | 2 of 3 | 0.27 |"
    with pytest.raises(UserError, match="did you mean 'ours'"):
        table.main([str(tmp_path), "--against", "our"])


def write_rows(path, *rows):
    """A `curves.csv` of title, seed, images and DCI."""
    lines = [
        "row,seed,images,weights,dci",
        *(f"{title},{seed},{images},live,{dci}" for title, seed, images, dci in rows),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_of_several_files_are_joined(tmp_path, capsys):
    first = write_rows(tmp_path / "a.csv", ("EncDiff", 0, 10, 0.1), ("EncDiff", 0, 20, 0.2), ("other", 0, 10, 0.5))
    second = write_rows(tmp_path / "b.csv", ("EncDiff", 1, 20, 0.4))
    assert shown(capsys, first, second)[2:] == ["| EncDiff | 2 | .300 ± .141 |", "| other | 1 | .500 |"]
    with pytest.raises(UserError, match=r"two runs of 'EncDiff' with seed 1, one in '.*c\.csv'"):
        table.main([str(first), str(second), str(write_rows(tmp_path / "c.csv", ("EncDiff", 1, 20, 0.4)))])
    run(tmp_path, "2026-01-01T00-00-00_EncDiff", 0, {"dci": 0.6})
    table.main([str(tmp_path / "2026-01-01T00-00-00_EncDiff"), str(first), str(second)])
    done = capsys.readouterr()
    assert "| EncDiff | 1 | .600 |" in done.out and "| EncDiff (a.csv) | 2 | .300 ± .141 |" in done.out


def test_a_test_of_unequal_lengths_is_remarked(tmp_path, capsys):
    path = write_rows(tmp_path / "a.csv", ("a", 0, 10, 0.1), ("a", 1, 10, 0.2), ("b", 0, 10, 0.3), ("b", 1, 20, 0.5))
    table.main([str(path), "--against", "a"])
    told = capsys.readouterr().err
    assert "the test compares 'a' after 10 images with 'b' after 20 (seed 1)" in told
    assert "'b' averages scores of different numbers of images: 10 (seed 0), 20 (seed 1)" in told
