"""One train step and one loop: losses, optimizers and precision are their arguments."""
