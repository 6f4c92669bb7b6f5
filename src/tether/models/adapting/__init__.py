"""What adapters do to a model beyond what PEFT writes down: tensors beside them, rewritten bases, probing values."""
