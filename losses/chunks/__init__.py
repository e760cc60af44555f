"""Any loss from hidden states and output weights, chunk by chunk, never holding [N, V] logits."""
