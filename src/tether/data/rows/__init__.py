"""Rows as they came: their columns, the check of every value, and the formats of other tools."""
