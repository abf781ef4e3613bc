"""Laws fitted to a table of results, with intervals; paired comparisons; recommendations."""
