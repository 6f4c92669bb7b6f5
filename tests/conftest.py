"""Settings for every test."""

import torch

# Tiny tensors gain nothing from threads and lose much to switching between them on a shared machine.
torch.set_num_threads(1)
