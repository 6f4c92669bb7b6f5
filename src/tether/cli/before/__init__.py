"""Commands that look at a run before there is one."""
