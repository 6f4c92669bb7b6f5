"""What trainers of sampled completions have in common: configuration, algorithm, and how prompts become experience."""
