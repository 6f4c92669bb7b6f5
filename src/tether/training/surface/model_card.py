"""The card of a trained model, `README.md`: metadata that the hub reads, and what a reader should know of the run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_FIGURES = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "accuracy")
_PACKAGES = ("tether", "transformers", "torch", "datasets", "peft")


def write_card(
    path: Path,
    *,
    name: str,
    base: str,
    datasets: str | list[str] | None,
    tags: list[str],
    adapter: bool,
    objective: str,
    reference: str,
    steps: int,
    figures: dict[str, float],
    language: str | None = None,
    license: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Write the card.

    Args:
        path: of the file; what is there is replaced, as transformers and TRL do.
        name: of the model.
        base: name of the model that it was trained from; a folder of this machine is not written down.
        datasets: names on the hub, or what else the user calls them.
        tags: for the hub.
        adapter: whether the folder holds an adapter and not a model.
        objective: the run's line about it.
        reference: the run's line about it.
        steps: that were made.
        figures: of the last training log.
        language: of the model, as a code; also `license`, `tasks` and `dataset_args` as transformers has them.
    """
    sets = [datasets] if isinstance(datasets, str) else list(datasets or ())
    parts = [dataset_args] if isinstance(dataset_args, str) else list(dataset_args or ())
    public = base if base and not Path(base).exists() and not Path(base).is_absolute() else None
    data = ModelCardData(
        base_model=public,
        datasets=sets or None,
        library_name="peft" if adapter else "transformers",
        language=language,
        license=license,
        model_name=name,
        pipeline_tag=(tasks if isinstance(tasks, str) else tasks[0]) if tasks else None,
        tags=["generated_from_trainer", *tags],
    )
    what = "An adapter for" if adapter else "Trained from"
    on = ", ".join(sets) + (f" ({', '.join(parts)})" if parts else "") if sets else "data that was not named"
    found = [f"| {key} | {figures[key]:.4g} |" for key in _FIGURES if isinstance(figures.get(key), (int, float))]
    table = ["| last training log | |", "|---|---|", *found] if found else []
    body = [
        f"# {name}",
        f"{what} {public or 'a model that was not published'}, on {on}, with Tether: {steps:,} steps.",
        f"- {objective}\n- {reference}",
        "\n".join(table),
        "Versions: " + ", ".join(f"{one} {version(one)}" for one in _PACKAGES) + ".",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, body)) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
