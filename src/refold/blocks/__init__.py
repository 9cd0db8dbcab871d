"""The building blocks of the papers, each written once, in its training form."""
