"""One mesh, and parallelism as tables from logical axes to mesh axes."""
