"""The look at rows before a run: duplicates, contradictions, lengths, languages."""
