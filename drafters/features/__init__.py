"""Parts shared by drafters that read hidden states of the target."""
