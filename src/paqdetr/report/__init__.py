"""Pages of sections, plots, tables and pictures; knows no detector."""
