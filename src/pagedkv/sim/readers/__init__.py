"""One small file for every format of trace."""
