"""Networks: images in, features out."""
