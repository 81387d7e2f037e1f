"""What lies in a model's folder: which files are read, what is wrong with them, what their tensors are called."""
