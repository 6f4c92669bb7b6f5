"""From rows of preferences to token ids: sources, schema, render, tokenize, truncate, and the report of it all."""

from tether.data.prepare.cache import prepare_cached
from tether.data.prepare.prepare import Overlap, Prepared, overlap, prepare
from tether.data.prepare.report import Report
from tether.data.prepare.table import example_from_row, longest_row
from tether.data.rows.columns import kind_of
from tether.data.rows.schema import Schema, preferences, read_preferences, unpaired
from tether.data.sources.load import is_origin, load_rows
from tether.data.split import is_split, split_rows
from tether.data.text.render import Rendered, render
from tether.data.text.template import chat_template, text_tokenizer
from tether.data.text.tokenize import Encoder, Tokenized, answer_end, tokenize
from tether.data.text.truncate import truncated_lengths

__all__ = [
    "Encoder",
    "Overlap",
    "Prepared",
    "Rendered",
    "Report",
    "Schema",
    "Tokenized",
    "answer_end",
    "chat_template",
    "example_from_row",
    "is_origin",
    "is_split",
    "kind_of",
    "load_rows",
    "longest_row",
    "overlap",
    "preferences",
    "prepare",
    "prepare_cached",
    "read_preferences",
    "render",
    "split_rows",
    "text_tokenizer",
    "tokenize",
    "truncated_lengths",
    "unpaired",
]
