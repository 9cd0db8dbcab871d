"""The networks of the papers: one file a family, channel tables as data, one registry."""
