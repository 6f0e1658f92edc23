"""What makes a data set: one module per data set, one writer, readers of file formats, and shapes."""
