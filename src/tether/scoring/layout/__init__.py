"""How a batch is given to a model: as a tree, padded, encoder-decoder, with images; and the proof of the choice."""
