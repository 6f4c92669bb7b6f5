"""Datasets still has the places that `tether.compat.datasets` names, and they do what is relied on."""

from __future__ import annotations

import pyarrow as pa
from datasets import Dataset, load_from_disk

from tether.compat import datasets as places


def test_data_table_is_the_arrow_table(tmp_path):
    rows = Dataset.from_list([{"a": 1}, {"a": 2}, {"a": 3}])
    table = places.arrow_table(rows)
    assert isinstance(table, pa.Table)
    assert table.to_pydict() == {"a": [1, 2, 3]}
    assert places.arrow_table(rows.select([2, 0])).to_pydict() == {"a": [1, 2, 3]}  # indices are apart
    rows.save_to_disk(tmp_path)
    assert places.arrow_table(load_from_disk(tmp_path)).to_pydict() == {"a": [1, 2, 3]}
