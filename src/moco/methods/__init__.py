"""Methods of self-supervision: losses and the step that trains by them."""
