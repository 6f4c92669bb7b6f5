"""What checks types and shapes of arguments, results and fields at each call, see tests/conftest.py."""

from beartype import BeartypeConf, beartype

# A whole number is a number, as type checkers have it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
