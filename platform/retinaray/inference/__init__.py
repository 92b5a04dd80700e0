"""One predictor protocol, several runtimes."""
