"""See any model as a graph by running it: what ran, what holds for any size, and what each operator means."""
