"""Commands for files of other tools."""
