"""The scripts in `files` are run by a test, never imported."""

collect_ignore_glob = ["files/*"]
