"""From rows of a data set to labelled, packed token files."""
