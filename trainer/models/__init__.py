"""One model idea a file; every file opens with the legend of its shapes."""
