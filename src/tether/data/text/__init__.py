"""From records to token ids: chat template, rendering, which turns are scored, the prompt boundary, truncation."""
