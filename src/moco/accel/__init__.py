"""What only makes it faster: each piece has a plain counterpart that it equals."""
