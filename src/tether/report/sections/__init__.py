"""The sections of the page, each from what was read to what its template shows."""
