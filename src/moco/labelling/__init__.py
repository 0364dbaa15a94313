"""A page in the browser to answer a label request by hand."""
