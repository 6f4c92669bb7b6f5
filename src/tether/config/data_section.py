"""The section `data:` of the run file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tether.config.section import Allowed, Section, Text


class Rows(Section):
    """One source of rows, with what its columns are called and how often each row occurs."""

    path: Annotated[
        Text | Annotated[list[Text], Field(min_length=1)],
        Allowed("a path, glob, folder or hub name, or a list of paths"),
    ] = Field(description="Files, a folder or a hub name.")
    format: Annotated[Text | None, Allowed("the name of a format, such as chatml.intel; see docs/data.md")] = Field(
        default=None, description="How other tools lay out their rows; null: TRL's columns, or what it plainly is."
    )
    fields: Annotated[dict[str, Text], Allowed("a mapping such as {prompt: question}")] = Field(
        default_factory=dict, description="Name of a field to the column that holds it."
    )
    weight: Annotated[float, Field(gt=0, lt=1e6), Allowed("a number above 0")] = Field(
        default=1.0, description="How often each row occurs: 2 twice, 0.5 every second one."
    )
    split: Text = Field(
        default="train", description="Part of a hub data set, or of a folder with train and test files."
    )
    name: Text | None = Field(default=None, description="Configuration of a hub data set; null: its only one.")
    revision: Annotated[Text | None, Allowed("text (in quotes if it looks like a number), or null")] = Field(
        default=None, description="Branch, tag or commit of a hub data set."
    )
    data_dir: Text | None = Field(default=None, description="Folder inside a hub data set; null: all of it.")
    data_files: Annotated[
        Text | Annotated[list[Text], Field(min_length=1)] | None, Allowed("a path or pattern, or a list of them")
    ] = Field(default=None, description="Files of a hub data set; null: those of the split.")
    prompt_format: Annotated[Text | None, Allowed("text with {prompt} in it, or null")] = Field(
        default=None, description="Pattern of the prompt, for the format user_defined; so for the keys below."
    )
    chosen_format: Annotated[Text | None, Allowed("text with {chosen} in it, or null")] = None
    rejected_format: Annotated[Text | None, Allowed("text with {rejected} in it, or null")] = None
    completion_format: Annotated[Text | None, Allowed("text with {completion} in it, or null")] = None


class Held(Section):
    """`eval: {split: 0.05}`: rows of the training set that are set aside."""

    split: Annotated[int | float, Field(gt=0), Allowed("a share below 1, or a number of rows")] = Field(
        description="Share of the training rows, or how many of them."
    )
    by: Annotated[Literal["prompt", "row"], Allowed("prompt or row")] = Field(
        default="prompt", description="prompt: no prompt is on both sides."
    )


def _kind_of_source(value: Any) -> str:
    if isinstance(value, str):
        return "@text"
    if isinstance(value, (dict, Section)):
        keys = value.keys() if isinstance(value, dict) else type(value).model_fields.keys()
        return "@rows" if "path" in keys else "@held" if "split" in keys else "@named"
    return "@list"


# What stands for rows in `data`, told apart by its shape; the tags are in the places that pydantic reports.
SOURCE_TAGS: dict[str, type[Section] | None] = {
    "@text": None,
    "@rows": Rows,
    "@held": Held,
    "@list": None,
    "@named": None,
}
_Source = Annotated[
    Annotated[Text, Tag("@text")] | Annotated[Rows, Tag("@rows")] | Annotated[list[Text], Tag("@list")],
    Discriminator(_kind_of_source),
]
_Some = (
    Annotated[Text, Tag("@text")]
    | Annotated[Rows, Tag("@rows")]
    | Annotated[list[_Source], Field(min_length=1), Tag("@list")]
)
Sources = Annotated[_Some, Discriminator(_kind_of_source)]
_NAMED = Annotated[dict[str, Sources], Field(min_length=1), Tag("@named")]


class Data(Section):
    """`data:` the rows; relative paths start in the current folder."""

    train: Annotated[
        Sources, Allowed("a path, a glob or a hub name, a mapping such as {path: …, format: …}, or a list of them")
    ] = Field(description="Rows with prompt, chosen and rejected: path, glob, hub name, mapping, or a list.")
    eval: Annotated[
        Annotated[_Some | Annotated[Held, Tag("@held")] | _NAMED, Discriminator(_kind_of_source)] | None,
        Allowed("a path, a glob or a hub name, a list of them, {split: 0.05}, or a mapping of names to them"),
    ] = Field(default=None, description="Held-out rows, a share of the training rows, or a mapping of names to sets.")
    check: Annotated[
        dict[str, Annotated[float, Field(ge=0, le=1)]] | None,
        Allowed("a mapping of findings to shares, such as {identical: 0.01}; see docs/data.md"),
    ] = Field(default=None, description="Largest shares of rows that `tether data check` passes; null: any.")

    cache: Annotated[Text | Literal[False] | None, Allowed("a folder, auto, or null for no cache")] = Field(
        default="auto",
        description="Folder where prepared rows are kept for later runs; auto: `prepared` in $TETHER_CACHE or in "
        "~/.cache/tether; null or false: nowhere.",
    )

    streaming: Annotated[bool, Allowed("true or false")] = Field(
        default=False, description="Prepare the training rows while training goes on; needs train.max_steps."
    )
    buffer_size: Annotated[int, Field(ge=1), Allowed("a whole number from 1")] = Field(
        default=1000, description="Rows of a stream among which each next one is drawn."
    )

    @property
    def train_rows(self) -> Any:
        """What the trainer takes as training rows."""
        return _plain(self.train)

    @property
    def eval_rows(self) -> Any:
        """What the trainer takes as evaluation rows."""
        return _plain(self.eval)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
