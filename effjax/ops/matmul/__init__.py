"""Integer products, grids, and packed codes: the arithmetic of quantized weights."""
