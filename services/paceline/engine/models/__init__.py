"""Model configurations and the decoder that runs them."""
