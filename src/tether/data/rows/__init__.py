"""Rows as they are given: their columns, the check of every value, and the formats of other tools."""
