"""TRL's keys of data: sets by name, mixtures, and those of the alignment handbook's recipes, which its scripts read."""

from __future__ import annotations

from typing import Any

from tether.config.foreign.draft import Draft, Source, as_number
from tether.config.foreign.rules import shared

_SOURCE = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
# Of the handbook's `dataset_mixture`: its name of a key of a set to ours.
_HANDBOOK = {"id": "path", "config": "name", "split": "split", "columns": "columns", "weight": "weight"}


def data(draft: Draft, source: Source) -> None:
    """Sources of rows, to train and to evaluate on."""
    _sources(draft, source)
    if draft.get("data.eval") is None:
        shared.nothing_to_evaluate(draft, "there is nothing to evaluate: no rows, or eval_strategy is no")


def _sources(draft: Draft, source: Source) -> None:
    split = source.text("dataset_train_split", "train")
    field = {"text": source.get("dataset_text_field")} if source.has("dataset_text_field") else {}
    if field.get("text") == "text":
        draft.note("dataset_text_field", "the column has the name that is read")
        field = {}
    streaming = source.flag("dataset_streaming") or source.flag("streaming")
    if streaming:
        draft.set("data.streaming", True, "dataset_streaming" if source.has("dataset_streaming") else "streaming")
    if source.has("datasets"):
        _mixture(draft, source, field)
        return
    if source.has("dataset_mixer"):
        _mixer(draft, source)
        return
    if source.has("dataset_mixture"):
        _handbook(draft, source)
        return
    if not source.has("dataset_name"):
        source.refuse("dataset_name", "`dataset_name` is missing. Name the rows.")
    common = {"path": source.text("dataset_name"), "name": source.text("dataset_config")}
    evaluated = draft.get("train.eval_strategy", "no") != "no"
    test = source.text("dataset_test_split", "test")
    for part, name in (("train", split), ("eval", test)):
        if part == "train" or evaluated:
            rows = {**common, "split": name if name != "train" else None, "fields": field or None}
            draft.set(f"data.{part}", _short(rows), "dataset_name")
    for key in ("dataset_train_split", "dataset_config", "dataset_text_field"):
        if key in draft.fates and draft.fates[key].mark != "note":
            draft.fates[key].became.append("data.train")
    if evaluated and "dataset_test_split" in draft.fates:
        draft.fates["dataset_test_split"].became.append("data.eval")
    if not evaluated:
        draft.note("dataset_test_split", "nothing is evaluated: eval_strategy is no")


def _mixture(draft: Draft, source: Source, field: dict[str, Any]) -> None:
    entries = source.get("datasets")
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        source.wrong("datasets", entries, "a list of mappings, each with a `path`")
    made = []
    for index, entry in enumerate(entries):
        given = {name: value for name, value in entry.items() if value is not None}
        for name in given.keys() - set(_SOURCE):
            source.refuse(
                ("datasets", index, name), f"`{name}` is no key of a data set of TRL; there are {', '.join(_SOURCE)}."
            )
        if "path" not in given:
            source.refuse(("datasets", index), "`path` of a data set is missing.")
        if given["path"] in ("json", "csv", "parquet", "arrow") and "data_files" in given:
            given["path"] = given.pop("data_files")
        given = {name: value for name, value in given.items() if (name, value) != ("split", "train")}
        made.append(_short({**given, "fields": field or None}))
    draft.set("data.train", made if len(made) > 1 else made[0], "datasets")
    share = source.number("test_split_size")
    if share:
        draft.set("data.eval", {"split": share, "by": "row"}, "test_split_size")
        draft.explain("test_split_size", "rows are set aside by a hash, so that they are not the ones that TRL draws")


def _mixer(draft: Draft, source: Source) -> None:
    """`dataset_mixer`, `dataset_splits` and `dataset_configs` of the handbook: a share of each set, from its start."""
    shares, splits = source.mapping("dataset_mixer"), source.names("dataset_splits") or ["train", "test"]
    configs = source.names("dataset_configs") or [None] * len(shares)
    if len(configs) != len(shares):
        source.refuse("dataset_configs", f"`dataset_configs` has {len(configs)} names for {len(shares)} data sets.")
    made: dict[str, list[Any]] = {"train": [], "eval": []}
    for (path, given), config in zip(shares.items(), configs, strict=True):
        share = as_number(given)
        if share is None or not 0 < share <= 1:
            source.wrong(("dataset_mixer", path), given, "a share above 0, up to 1")
        for split in splits:
            part = "train" if "train" in split else "eval"
            cut = _cut(split, share if part == "train" else 1, ("dataset_mixer", path), source)
            made[part].append(_short({"path": path, "name": config, "split": cut if cut != "train" else None}))
    draft.set("data.train", made["train"] if len(made["train"]) > 1 else (made["train"] or [None])[0], "dataset_mixer")
    if made["eval"] and draft.get("train.eval_strategy", "no") != "no":
        draft.set("data.eval", made["eval"] if len(made["eval"]) > 1 else made["eval"][0], "dataset_mixer")
    for key in ("dataset_splits", "dataset_configs"):
        if key in draft.fates:
            draft.fates[key].became.append("data.train")


def _cut(split: str, share: float, place: tuple[str | int, ...], source: Source) -> str:
    """A part of a set with the share of it that is taken."""
    if share == 1:
        return split
    percent = share * 100
    if abs(percent - round(percent)) > 1e-9:
        source.wrong(place, share, "a share in whole per cent")
    return f"{split}[:{round(percent)}%]"


def _handbook(draft: Draft, source: Source) -> None:
    """`dataset_mixture` of the handbook's newer recipes."""
    mixture = source.mapping("dataset_mixture")
    entries = mixture.get("datasets")
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        source.wrong(("dataset_mixture", "datasets"), entries, "a list of mappings, each with an `id`")
    for name in mixture.keys() - {"datasets", "seed", "test_split_size"}:
        source.refuse(("dataset_mixture", name), f"`{name}` is no key of a mixture of the handbook. Take it out.")
    made = []
    for index, entry in enumerate(entries):
        place = ("dataset_mixture", "datasets", index)
        given = {name: value for name, value in entry.items() if value is not None}
        for name in given.keys() - _HANDBOOK.keys():
            source.refuse((*place, name), f"`{name}` of a data set is not read; known are {', '.join(_HANDBOOK)}.")
        rows = {_HANDBOOK[name]: value for name, value in given.items()}
        cut = _cut(rows.pop("split", "train"), as_number(rows.pop("weight", 1)) or 1, (*place, "weight"), source)
        made.append(_short({**rows, "split": cut if cut != "train" else None}))
    draft.set("data.train", made if len(made) > 1 else made[0], "dataset_mixture")
    share = as_number(mixture.get("test_split_size"))
    if share:
        draft.set("data.eval", {"split": share, "by": "row"}, "dataset_mixture")
    draft.explain(
        "dataset_mixture", "shares are of the first rows, and rows are set aside by a hash; there both are drawn"
    )


def _short(rows: dict[str, Any]) -> Any:
    """A source of rows; a path alone is text."""
    kept = {name: value for name, value in rows.items() if value is not None}
    return kept["path"] if kept.keys() == {"path"} else kept
