"""Short depthwise causal convolutions as pure functions: naive, fast and one step."""
