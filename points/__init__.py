"""Points in the plane: data sets with a known answer, and their pictures."""
