"""`tether precompute`: the store of a run filled ahead, by this process, a launcher's, or workers of Ray Data."""
