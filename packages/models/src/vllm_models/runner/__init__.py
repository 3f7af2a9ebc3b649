"""From a batch to tokens: rows, inputs, the forward pass, sampling and pooling."""
