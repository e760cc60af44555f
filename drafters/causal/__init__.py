"""Causal drafters: any small causal LM with the vocabulary of the target."""
