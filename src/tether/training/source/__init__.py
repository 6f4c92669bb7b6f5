"""Where the batches of a run come from: rows in memory, a stream of them, or rollouts."""

from tether.training.source.base import Source
from tether.training.source.rows import RowSource
from tether.training.source.stream import StreamSource

__all__ = ["RowSource", "Source", "StreamSource"]
