"""What is known of the run file's keys: their page, their schema, and the refusal of unknown ones without torch."""
