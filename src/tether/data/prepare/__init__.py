"""Whole sets and streams prepared for training: by workers, once, cached, and with a report."""
