"""The paper's numbers, and to which runs they compare: those of the same values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

PAPER: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper_numbers.yaml")))
NODES = [PAPER["all"], *PAPER["datasets"].values(), *(row["has"] for row in PAPER["rows"])]
KEYS = list(dict.fromkeys(key for node in NODES for key in node))
# What papers call the metrics.
TITLES = {
    "factor_vae": "FactorVAE score",
    "dci": "DCI",
    "mig": "MIG",
    "beta_vae": "β-VAE score",
    "sap": "SAP",
    "tad": "TAD",
}


def compared_values(project: DictConfig, factors: Mapping[str, int]) -> dict[str, Any]:
    """What decides whether a run has the paper's values.

    Args:
        project: the run's configuration.
        factors: sizes of the factors that were scored, by name.

    Returns:
        values by key of `paper_numbers.yaml`.
    """
    values = {key: OmegaConf.select(project, key) for key in KEYS}
    return values | {"factors": " ".join(map(str, factors.values()))}


def paper_numbers(values: Mapping[str, Any], kind: str = "scores") -> tuple[dict[str, Any], list[str]]:
    """The paper's numbers for runs with these values: by metric, a mean or [mean, standard deviation].

    Args:
        values: by key of `paper_numbers.yaml`.
        kind: scores or scores_of_tokens.

    Returns:
        The numbers, and, if there are none, what differs from the nearest of the paper's rows.
    """
    nearest_row: list[str] = []
    for row in PAPER["rows"]:
        for dataset, numbers in row.get(kind, {}).items():
            differ = []
            for key, wanted in (PAPER["all"] | PAPER["datasets"][dataset] | row["has"]).items():
                allowed = wanted if isinstance(wanted, list) else [wanted]
                if values[key] not in allowed:
                    found = "not set" if values[key] is None else values[key]
                    differ.append(f"{key} is {found}, and {allowed[-1]} in the paper")
            if not differ:
                return numbers, []
            nearest_row = differ if not nearest_row else min(nearest_row, differ, key=len)
    return {}, nearest_row


def number(values: Any) -> str:
    """A mean, or mean ± standard deviation, to three digits, as the paper writes them."""

    def digits(value: float) -> str:
        text = f"{value:.3f}"
        return text[1:] if text.startswith("0.") else text.replace("-0.", "-.")

    return " ± ".join(map(digits, values)) if isinstance(values, list) else digits(values)
