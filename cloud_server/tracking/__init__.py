"""What TensorBoard and MLflow are told of a run: written from the records, in a thread of its own."""
