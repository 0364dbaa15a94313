"""All about labels: what to ask for, forms, replies, label files, and whether they are plausible."""
