"""Running a model: decoding, sampling, generation, scoring."""
