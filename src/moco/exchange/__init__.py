"""Files that leave or enter: encoder, classifier, submission."""
