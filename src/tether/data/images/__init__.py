"""Images of prompts: where they stand in rows, and what a processor makes of them."""
