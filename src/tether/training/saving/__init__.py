"""What is saved of a run: found possible before the first step, whole after every save, proved by loading."""
