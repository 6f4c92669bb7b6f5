"""What models write: sampled, side by side, in conversation, and judged."""
