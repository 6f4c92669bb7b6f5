"""First words of warnings that Tether silences or acts on; no library promises them, and none has another mark.

Read in peft 0.21.2, torch 2.13.0 and transformers 5.23.0.
"""

# peft: trained biases stay in effect while adapters are off; whoever switches them off takes care of them.
BIAS_STAYS = "Careful, disabling adapter layers with bias"
# peft: a saved adapter lacks tensors. A warning there, an error here.
ADAPTER_INCOMPLETE = "Found missing adapter keys"
# peft: it saves the embeddings of new tokens, which is what is wanted.
EMBEDDINGS_SAVED = "Setting `save_embedding_layers`"
# torch: FlexAttention without its compiler, which is how it runs on a CPU.
FLEX_UNCOMPILED = "flex_attention called without torch.compile"
# torch: what the CPU has no use for.
NO_PINNED_MEMORY = "'pin_memory' argument is set as true but no accelerator is found"
# transformers: Tether tells padding by its mask; a tokenizer's tokens are the ones that count.
SPECIAL_TOKENS = "The tokenizer has new PAD/BOS/EOS tokens"
# transformers: Tether checks lengths itself, after truncation.
TOO_LONG = "Token indices sequence length is longer than the specified maximum"
