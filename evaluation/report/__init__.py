"""Reports: pages, tables, figures, comparison and publishing."""
