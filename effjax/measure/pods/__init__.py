"""What a training or decoding step would take on a slice of TPUs that is not there."""
