"""Trainers that TRL keeps under `experimental` and that are here."""
