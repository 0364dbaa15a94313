"""One module per stage; each is a function from its sections of the configuration to its files."""
