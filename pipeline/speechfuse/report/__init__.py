"""Results to tables, plots, the chosen epoch, and one page."""
