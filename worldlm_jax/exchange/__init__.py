"""What nodes do with each other's parameters: pure functions over stacked siblings."""
