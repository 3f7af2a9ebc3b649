"""How linear layers hold quantized weights: one file per format, all behind `LinearMethod`."""
