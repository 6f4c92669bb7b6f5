"""Losses: pure functions of numbers per example or per token, one value each, without reduction."""
