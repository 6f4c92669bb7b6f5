"""Log-probabilities on disk, addressed by content: parts, index, the reference that reads through, tools."""
